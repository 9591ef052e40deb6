//! `clutch fs get` and `cat`: files out of the cluster.
//!
//! What comes from the cluster is hostile until shown otherwise. Invariants: nothing outside the target is written or
//! changed, so no symbolic link on the way below it is followed; a file has its name only when it is whole; while it
//! arrives nobody else can read it; nobody but its owner gets a file that runs as somebody.

use std::{
    ffi::{CString, OsStr},
    io::Write as _,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Instant,
};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use clutch_client::{Client, DirCursor};
use clutch_proto::{
    InodeId, InodeKind,
    mutants::{self, Mutant},
    types::Attributes,
};
use rustix::{
    fs::{AtFlags, FileType, FlockOperation, Mode, OFlags, Timespec, Timestamps},
    io::Errno,
};
use tokio::task::JoinSet;

use super::failures::{Failures, is_final};
use crate::{
    interrupt::Temporary,
    output::{self, printable, talk},
    remote::RemotePath,
};

/// What the names of files begin with that are still arriving.
const ARRIVING: &str = ".clutch-";

pub(super) async fn cat(client: &Client, paths: &[RemotePath]) -> Result<ExitCode> {
    let mut failures = Failures::default();
    for path in paths {
        match cat_one(client, path).await {
            Err(error) if is_final(&error) => return Err(error),
            read => drop(failures.take(read)),
        }
    }
    std::io::stdout().flush()?;
    Ok(failures.exit_code())
}

async fn cat_one(client: &Client, path: &RemotePath) -> Result<()> {
    let at = client.resolve(path).await?;
    let mut out = std::io::stdout();
    let mut broken = None;
    let mut sink = |bytes: Bytes| out.write_all(&bytes).inspect_err(|e| broken = Some(e.kind()));
    let read = client.read_file(at.id, &mut sink).await;
    if let Some(kind) = broken {
        return Err(std::io::Error::from(kind).into());
    }
    read.with_context(|| path.to_string())?;
    Ok(())
}

/// A local directory that is written into, by its handle: whatever happens to its path meanwhile.
struct Place {
    dir: OwnedFd,
    /// For messages, and for whoever must remove what is left.
    path: PathBuf,
}

fn c_name(name: &[u8]) -> Result<CString> {
    // Names from the cluster have neither slashes nor NUL; that is looked at here, whatever the cluster says.
    clutch_proto::name::check(name)?;
    CString::new(name).context("a name with NUL in it")
}

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

impl Place {
    /// A directory that the user named; links on the way to it are the user's.
    fn open(path: &Path) -> Result<Place> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let dir = rustix::fs::open(path, DIRECTORY, Mode::empty())
            .map_err(std::io::Error::from)
            .with_context(|| path.display().to_string())?;
        Ok(Place { dir, path: path.to_owned() })
    }

    /// A directory below, made if it is not there. A symbolic link in its place is not followed.
    fn enter(&self, name: &[u8]) -> Result<Place> {
        let path = self.path.join(OsStr::from_bytes(name));
        let shown = || path.display().to_string();
        let name = c_name(name)?;
        match rustix::fs::mkdirat(&self.dir, &name, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(std::io::Error::from(error)).with_context(shown),
        }
        match rustix::fs::openat(&self.dir, &name, DIRECTORY | OFlags::NOFOLLOW, Mode::empty()) {
            Ok(dir) => Ok(Place { dir, path }),
            Err(Errno::LOOP | Errno::NOTDIR) => {
                bail!("{}: a symbolic link or file is in the place of a directory; remove it first", shown())
            }
            Err(error) => Err(std::io::Error::from(error)).with_context(shown),
        }
    }

    /// Enters a path below, name by name.
    fn enter_all(&self, names: &[Bytes]) -> Result<Place> {
        let mut at = Place { dir: self.dir.try_clone()?, path: self.path.clone() };
        for name in names {
            at = at.enter(name)?;
        }
        Ok(at)
    }

    /// Removes what an earlier command left that was killed: files that were arriving and that nobody writes any more.
    fn remove_left_behind(&self) {
        let Ok(entries) = rustix::fs::Dir::read_from(&self.dir) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let digits = name.to_bytes().strip_prefix(ARRIVING.as_bytes());
            if digits.is_none_or(|d| d.len() != 16 || !d.iter().all(u8::is_ascii_hexdigit)) {
                continue;
            }
            let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
            let Ok(file) = rustix::fs::openat(&self.dir, name, flags, Mode::empty()) else { continue };
            let is_ours = rustix::fs::fstat(&file).is_ok_and(|stat| {
                FileType::from_raw_mode(stat.st_mode).is_file()
                    && stat.st_uid == rustix::process::geteuid().as_raw()
            });
            // Whoever still writes it holds the lock.
            if is_ours && rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
                // Another command may have been quicker.
                let _ = rustix::fs::unlinkat(&self.dir, name, AtFlags::empty());
            }
        }
    }
}

/// Gives a file or directory its owner, mode and times. Without the right to give it away it stays the user's, and then it
/// must not run as its owner.
fn set(file: impl AsFd, shown: &Path, attributes: &Attributes) -> Result<()> {
    let fail =
        |error: Errno| anyhow::Error::new(std::io::Error::from(error)).context(shown.display().to_string());
    let stat = rustix::fs::fstat(&file).map_err(fail)?;
    let is_owned = (stat.st_uid, stat.st_gid) == (attributes.uid, attributes.gid);
    let mut mode = attributes.mode & 0o7777;
    if !is_owned {
        let (uid, gid) =
            (rustix::fs::Uid::from_raw(attributes.uid), rustix::fs::Gid::from_raw(attributes.gid));
        let is_possible = attributes.uid != u32::MAX && attributes.gid != u32::MAX;
        let given = is_possible && rustix::fs::fchown(&file, Some(uid), Some(gid)).is_ok();
        if !given && mode & 0o6000 != 0 {
            mode &= !0o6000;
            talk!(
                "clutch: {}: its owner {}:{} cannot be restored, so its set-id bits are left out",
                shown.display(),
                attributes.uid,
                attributes.gid
            );
        }
    }
    rustix::fs::fchmod(&file, Mode::from_raw_mode(mode)).map_err(fail)?;
    rustix::fs::futimens(&file, &times(attributes.mtime)).map_err(fail)
}

fn times(mtime: u64) -> Timestamps {
    let time = Timespec { tv_sec: (mtime / 1_000_000_000) as i64, tv_nsec: (mtime % 1_000_000_000) as _ };
    Timestamps { last_access: time, last_modification: time }
}

/// Fetches a file or link beside its place and renames it there, so that no half file takes the name.
async fn fetch(client: &Client, id: InodeId, place: &Place, name: &[u8]) -> Result<u64> {
    let path = place.path.join(OsStr::from_bytes(name));
    let shown = || path.display().to_string();
    let system = |error: Errno| anyhow::Error::new(std::io::Error::from(error)).context(shown());
    let c_name = c_name(name)?;
    let attributes = client.stat(id).await.with_context(shown)?;
    let in_place = mutants::is(Mutant::GetWritesInPlace);
    let arriving = match in_place {
        true => String::from_utf8_lossy(name).into_owned(),
        false => format!("{ARRIVING}{:016x}", client.runtime().random.u64()),
    };
    let temporary = Temporary::new(std::path::absolute(&place.path).unwrap_or_default().join(&arriving));
    if id.kind() == InodeKind::Symlink {
        let target =
            CString::new(&attributes.symlink_target[..]).context("a link's target with NUL in it")?;
        rustix::fs::symlinkat(&target, &place.dir, &arriving).map_err(system)?;
        let link_times = times(attributes.mtime);
        rustix::fs::utimensat(&place.dir, &arriving, &link_times, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(system)?;
        rustix::fs::renameat(&place.dir, &arriving, &place.dir, &c_name).map_err(system)?;
        temporary.kept();
        return Ok(0);
    }
    let new = if in_place { OFlags::TRUNC } else { OFlags::EXCL };
    let flags = OFlags::WRONLY | OFlags::CREATE | new | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(&place.dir, &arriving, flags, Mode::RUSR | Mode::WUSR).map_err(system)?;
    // Held while it is written; a file system without locks only keeps more of what a killed command leaves.
    let _ = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive);
    let mut file = std::fs::File::from(file);
    let count = client.read_file(id, &mut |bytes| file.write_all(&bytes)).await.with_context(shown)?;
    set(&file, &path, &attributes)?;
    rustix::fs::renameat(&place.dir, &arriving, &place.dir, &c_name).map_err(system)?;
    temporary.kept();
    Ok(count)
}

pub(super) async fn run(
    client: Arc<Client>,
    source: &RemotePath,
    target: &Path,
    recursive: bool,
    jobs: usize,
) -> Result<ExitCode> {
    let at = client.resolve(source).await?;
    let is_directory = at.id.is_directory();
    if is_directory && !recursive {
        bail!("{source} is a directory; use -r to fetch it with all that is in it");
    }
    let means_directory = clutch_client::means_directory(target.as_os_str().as_bytes());
    let (place, name) = if target.is_dir() {
        (Place::open(target)?, at.name.clone())
    } else {
        ensure!(
            is_directory || !means_directory,
            "{}: no such directory (its end says that it means one)",
            target.display()
        );
        let name = target.file_name().with_context(|| format!("{} has no name", target.display()))?;
        let parent = target.parent().unwrap_or(Path::new("."));
        (Place::open(parent)?, Bytes::copy_from_slice(name.as_bytes()))
    };
    if !is_directory {
        // Renaming would put a file in the place of the device or pipe, or of the link that leads to it.
        let path = place.path.join(OsStr::from_bytes(&name));
        ensure!(
            std::fs::metadata(&path).map_or(true, |there| there.is_file() || there.is_dir()),
            "{}: is neither a file nor a directory; `clutch fs cat` writes to pipes and devices",
            path.display()
        );
        place.remove_left_behind();
        fetch(&client, at.id, &place, &name).await.with_context(|| source.to_string())?;
        return Ok(ExitCode::SUCCESS);
    }
    // The root has no name: its entries go into the directory that was named.
    let top = if name.is_empty() { vec![] } else { vec![name] };
    Tree { client, place: Arc::new(place), jobs: jobs.clamp(1, 1024) }.get(at.id, top, source).await
}

/// A tree on its way.
struct Tree {
    client: Arc<Client>,
    place: Arc<Place>,
    jobs: usize,
}

/// A directory and its way from the place, name by name.
type Waiting = (InodeId, Vec<Bytes>);

#[derive(Default)]
struct Counts {
    files: u64,
    bytes: u64,
    directories: u64,
}

/// What a walk keeps: the directories that are still to be read, the files under way, and what came of them.
struct Walk {
    waiting: Vec<Waiting>,
    running: JoinSet<Result<u64>>,
    failures: Failures,
    counts: Counts,
    progress: indicatif::ProgressBar,
}

impl Tree {
    async fn get(&self, id: InodeId, top: Vec<Bytes>, source: &RemotePath) -> Result<ExitCode> {
        let start = Instant::now();
        let mut walk = Walk {
            waiting: vec![(id, top)],
            running: JoinSet::new(),
            failures: Failures::default(),
            counts: Counts::default(),
            progress: output::counter("get"),
        };
        // Attributes are set when all is there: what is put into a directory changes its times, and its mode may forbid it.
        let mut entered: Vec<Waiting> = Vec::new();
        while let Some((id, names)) = walk.waiting.pop() {
            match self.directory(&mut walk, id, &names).await {
                Err(error) if is_final(&error) => return Err(error),
                Err(error) => {
                    walk.failures.add(&error);
                    if walk.failures.is_hopeless() {
                        return Err(error);
                    }
                }
                Ok(()) => {
                    walk.counts.directories += 1;
                    entered.push((id, names));
                }
            }
        }
        while let Some(done) = walk.running.join_next().await {
            walk.take(done)?;
        }
        // The deepest first.
        for (id, names) in entered.iter().rev().filter(|(_, names)| !names.is_empty()) {
            match self.finish_directory(*id, names).await {
                Ok(()) => walk.failures.succeeded(),
                Err(error) => {
                    walk.failures.add(&error);
                    if walk.failures.is_hopeless() {
                        return Err(error);
                    }
                }
            }
        }
        let Walk { failures, counts, progress, .. } = walk;
        progress.finish_and_clear();
        let seconds = start.elapsed().as_secs_f64().max(1e-9);
        let failed = match failures.count() {
            0 => String::new(),
            count => format!("; {count} could NOT be fetched"),
        };
        talk!(
            "fetched {} files in {} directories of {source}, {} in {seconds:.1} s ({:.0} files/s, {:.1} MB/s){failed}",
            counts.files,
            counts.directories,
            output::bytes(counts.bytes),
            counts.files as f64 / seconds,
            counts.bytes as f64 / 1e6 / seconds
        );
        Ok(failures.exit_code())
    }

    /// Starts the work for the files of one directory, waiting for room, and takes note of the directories in it.
    async fn directory(&self, walk: &mut Walk, id: InodeId, names: &[Bytes]) -> Result<()> {
        let place = Arc::new(self.place.enter_all(names)?);
        place.remove_left_behind();
        let mut cursor = Some(DirCursor::default());
        while let Some(begin) = cursor {
            let shown = || place.path.display().to_string();
            let (entries, next) = self.client.read_dir_page(id, &begin, 0).await.with_context(shown)?;
            for entry in entries {
                let child = InodeId::from_wire(entry.target).context("an inode id");
                let child = walk.failures.take(child.with_context(|| printable(&entry.name)));
                let Some(child) = child else { continue };
                if child.is_directory() {
                    walk.waiting.push((child, [names, &[entry.name]].concat()));
                    continue;
                }
                while walk.running.len() >= self.jobs
                    && let Some(done) = walk.running.join_next().await
                {
                    walk.take(done)?;
                }
                let (client, place) = (self.client.clone(), place.clone());
                walk.running.spawn(async move { fetch(&client, child, &place, &entry.name).await });
            }
            cursor = next;
        }
        Ok(())
    }

    async fn finish_directory(&self, id: InodeId, names: &[Bytes]) -> Result<()> {
        let place = self.place.enter_all(names)?;
        let attributes = self.client.stat(id).await.with_context(|| place.path.display().to_string())?;
        set(&place.dir, &place.path, &attributes)
    }
}

impl Walk {
    fn take(&mut self, done: Result<Result<u64>, tokio::task::JoinError>) -> Result<()> {
        match done? {
            Err(error) if is_final(&error) => return Err(error),
            Err(error) => {
                self.failures.add(&error);
                if self.failures.is_hopeless() {
                    return Err(error);
                }
            }
            Ok(bytes) => {
                self.failures.succeeded();
                let counts = &mut self.counts;
                (counts.files, counts.bytes) = (counts.files + 1, counts.bytes + bytes);
                self.progress.set_message(format!("{} files, {}", counts.files, output::bytes(counts.bytes)));
            }
        }
        Ok(())
    }
}
