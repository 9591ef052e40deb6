//! `clutch fs get` and `cat`: files out of the cluster.

use std::{
    fs::{File, Permissions},
    io::Write as _,
    os::unix::{
        ffi::OsStrExt as _,
        fs::{PermissionsExt as _, symlink},
    },
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, Result, bail, ensure};
use clutch_client::Client;
use clutch_proto::{InodeId, InodeKind, types::Attributes};
use tokio::{sync::Semaphore, task::JoinSet};

use crate::output;

pub(super) async fn cat(client: &Client, paths: &[String]) -> Result<()> {
    for path in paths {
        let at = client.resolve(path).await?;
        let mut out = std::io::stdout();
        let mut broken = None;
        let mut sink = |bytes: bytes::Bytes| out.write_all(&bytes).inspect_err(|e| broken = Some(e.kind()));
        let read = client.read_file(at.id, &mut sink).await;
        if let Some(kind) = broken {
            return Err(std::io::Error::from(kind).into());
        }
        read.with_context(|| path.clone())?;
    }
    std::io::stdout().flush()?;
    Ok(())
}

pub(super) async fn run(
    client: Arc<Client>,
    source: &str,
    target: &Path,
    recursive: bool,
    jobs: usize,
) -> Result<ExitCode> {
    let at = client.resolve(source).await?;
    let target = if target.is_dir() && !at.name.is_empty() {
        target.join(std::ffi::OsStr::from_bytes(&at.name))
    } else {
        target.to_owned()
    };
    if !at.id.is_directory() {
        fetch(&client, at.id, &target).await.with_context(|| source.to_owned())?;
        return Ok(ExitCode::SUCCESS);
    }
    if !recursive {
        bail!("{source} is a directory; use -r to fetch it with all that is in it");
    }
    let start = Instant::now();
    let progress = output::counter("get");
    let jobs = Arc::new(Semaphore::new(jobs.clamp(1, 1024)));
    let mut running: JoinSet<Result<u64>> = JoinSet::new();
    let mut waiting = vec![(at.id, target)];
    let mut directories = Vec::new();
    let (mut files, mut bytes) = (0u64, 0u64);
    while let Some((id, local)) = waiting.pop() {
        match std::fs::create_dir(&local) {
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists && local.is_dir() => {}
            other => other.with_context(|| local.display().to_string())?,
        }
        for entry in client.read_dir(id).await? {
            let child = InodeId::from_wire(entry.target).context("an inode id")?;
            // Names have no slash in them, so nothing can be written outside the target.
            let path = local.join(std::ffi::OsStr::from_bytes(&entry.name));
            if child.is_directory() {
                waiting.push((child, path));
                continue;
            }
            let permit = jobs.clone().acquire_owned().await?;
            let client = client.clone();
            running.spawn(async move {
                let count = fetch(&client, child, &path).await.with_context(|| path.display().to_string())?;
                drop(permit);
                Ok(count)
            });
            while let Some(done) = running.try_join_next() {
                (files, bytes) = (files + 1, bytes + done??);
            }
            progress.set_message(format!("{files} files, {}", output::bytes(bytes)));
        }
        directories.push((id, local));
    }
    while let Some(done) = running.join_next().await {
        (files, bytes) = (files + 1, bytes + done??);
    }
    // The deepest first: setting what is above must not be undone, and modes may forbid entering.
    for (id, local) in directories.iter().rev() {
        set(local, &client.stat(*id).await?)?;
    }
    progress.finish_and_clear();
    let seconds = start.elapsed().as_secs_f64().max(1e-9);
    eprintln!(
        "fetched {files} files in {} directories, {} in {seconds:.1} s ({:.0} files/s, {:.1} MB/s)",
        directories.len(),
        output::bytes(bytes),
        files as f64 / seconds,
        bytes as f64 / 1e6 / seconds
    );
    Ok(ExitCode::SUCCESS)
}

/// Fetches a file or link beside its place and renames it there, so that no half file takes the name.
async fn fetch(client: &Client, id: InodeId, local: &Path) -> Result<u64> {
    let attributes = client.stat(id).await?;
    if id.kind() == InodeKind::Symlink {
        let target = std::ffi::OsStr::from_bytes(&attributes.symlink_target);
        match symlink(target, local) {
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
                ensure!(!local.is_dir() || local.is_symlink(), "{} is a directory", local.display());
                std::fs::remove_file(local)?;
                symlink(target, local)?;
            }
            other => other?,
        }
        set_link_time(local, attributes.mtime)?;
        return Ok(0);
    }
    ensure!(!local.is_dir(), "{} is a directory", local.display());
    let temporary = Temporary(beside(local, client.runtime().random.u64())?);
    let mut file = File::options().write(true).create_new(true).open(&temporary.0)?;
    let count = client.read_file(id, &mut |bytes| file.write_all(&bytes)).await?;
    drop(file);
    set(&temporary.0, &attributes)?;
    std::fs::rename(&temporary.0, local)?;
    Ok(count)
}

/// A file that is removed unless it was renamed away.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        // Not there any more when all went well.
        let _ = std::fs::remove_file(&self.0);
    }
}

fn beside(local: &Path, random: u64) -> Result<PathBuf> {
    local.file_name().context("a file without a name")?;
    Ok(local.with_file_name(format!(".clutch-{random:016x}")))
}

fn set(local: &Path, attributes: &Attributes) -> Result<()> {
    let file = File::open(local).with_context(|| local.display().to_string())?;
    let time = SystemTime::UNIX_EPOCH + Duration::from_nanos(attributes.mtime);
    file.set_times(std::fs::FileTimes::new().set_modified(time).set_accessed(time))?;
    file.set_permissions(Permissions::from_mode(attributes.mode)).with_context(|| local.display().to_string())
}

fn set_link_time(local: &Path, mtime: u64) -> Result<()> {
    use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, utimensat};
    let time = Timespec { tv_sec: (mtime / 1_000_000_000) as i64, tv_nsec: (mtime % 1_000_000_000) as _ };
    let times = Timestamps { last_access: time, last_modification: time };
    utimensat(CWD, local, &times, AtFlags::SYMLINK_NOFOLLOW).with_context(|| local.display().to_string())
}
