//! `clutch fs put`: local files into the cluster.

use std::{
    fs::File,
    io::{Cursor, Read as _},
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Instant,
};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use clutch_client::{Client, FileAttributes};
use clutch_proto::{InodeId, shard::SetAttributes};
use tokio::{io::AsyncReadExt, task::JoinSet};

use super::{
    failures::{Failures, is_final},
    small::{make_or_find, place_for_file},
};
use crate::{
    output::{self, talk},
    remote::RemotePath,
};

/// So much of a file is read before the first of it is sent.
const READ_AT_ONCE: u64 = 1 << 20;

pub(super) async fn run(
    client: Arc<Client>,
    source: &Path,
    target: &RemotePath,
    recursive: bool,
    verbose: bool,
    jobs: usize,
) -> Result<ExitCode> {
    if source == Path::new("-") {
        if let Ok(existing) = client.resolve(target).await {
            ensure!(!existing.id.is_directory(), "{target} is a directory; name the file in it");
        }
        let (dir, name) = place_for_file(&client, target).await?;
        let (uid, gid) = super::identity();
        let attributes = FileAttributes { mode: 0o644, uid, gid, mtime: 0 };
        client
            .write_file(dir, &name, attributes, true, &mut tokio::io::stdin())
            .await
            .with_context(|| target.to_string())?;
        say_less_parity(&client);
        return Ok(ExitCode::SUCCESS);
    }
    let metadata = source.symlink_metadata().with_context(|| source.display().to_string())?;
    let (dir, name, path) = destination(&client, source, target, metadata.is_dir()).await?;
    if !metadata.is_dir() {
        let stored = store(&client, source.to_owned(), dir, name).await?;
        if stored.is_none() {
            bail!("{}: only files, directories and symbolic links can be stored", source.display());
        }
        say_less_parity(&client);
        if verbose {
            output::line_of(path.as_bytes())?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    if !recursive {
        bail!("{} is a directory; use -r to store it with all that is in it", source.display());
    }
    let tree = Tree { client: client.clone(), jobs: jobs.clamp(1, 1024), verbose };
    let stored = tree.put(source, dir, name, path).await;
    say_less_parity(&client);
    stored
}

/// Says what was stored less safely than the policy asks for.
fn say_less_parity(client: &Client) {
    match client.spans_with_less_parity() {
        0 => {}
        spans => talk!(
            "clutch: disks are missing or full, so {spans} spans were stored with less parity than the policy says; `clutch \
             status` names the disks, and what is written again when they are back has all of it"
        ),
    }
}

/// The remote directory, the name in it and the whole path.
async fn destination(
    client: &Client,
    source: &Path,
    target: &RemotePath,
    is_directory: bool,
) -> Result<(InodeId, Bytes, RemotePath)> {
    match client.resolve(target).await {
        Ok(existing) if existing.id.is_directory() => {
            let absolute = std::path::absolute(source).context("the source's own name")?;
            let name = absolute.file_name().context("the source has no name; name the target")?.to_owned();
            Ok((existing.id, Bytes::copy_from_slice(name.as_bytes()), target.join(name.as_bytes())))
        }
        Ok(existing) => Ok((existing.parent, existing.name, target.clone())),
        Err(error) if error.is_not_found() => {
            let (dir, name) = match is_directory {
                true => client.resolve_parent(target).await?,
                false => place_for_file(client, target).await?,
            };
            Ok((dir, name, target.trimmed()))
        }
        Err(error) => Err(error.into()),
    }
}

/// A local file's modification time; `None` for one that lies before 1970 or too far ahead to be stored.
fn mtime(metadata: &std::fs::Metadata) -> Option<u64> {
    let seconds = u64::try_from(metadata.mtime()).ok()?;
    let ns = seconds.checked_mul(1_000_000_000)?.checked_add(u64::try_from(metadata.mtime_nsec()).ok()?)?;
    // 0 stands for the time of the change itself.
    Some(ns.max(1))
}

/// Says that a time could not be kept.
fn kept_mtime(metadata: &std::fs::Metadata, source: &Path) -> u64 {
    mtime(metadata).unwrap_or_else(|| {
        talk!(
            "clutch: {}: its time lies before 1970 or after 2554 and is stored as that of 1970",
            source.display()
        );
        1
    })
}

fn attributes(metadata: &std::fs::Metadata, source: &Path) -> FileAttributes {
    FileAttributes {
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        mtime: kept_mtime(metadata, source),
    }
}

/// Stores a file or link; its bytes, or `None` for what cannot be stored.
async fn store(client: &Client, source: PathBuf, dir: InodeId, name: Bytes) -> Result<Option<u64>> {
    let metadata = source.symlink_metadata().with_context(|| source.display().to_string())?;
    if metadata.is_symlink() {
        let target = std::fs::read_link(&source).with_context(|| source.display().to_string())?;
        let target = Bytes::copy_from_slice(target.as_os_str().as_bytes());
        client
            .symlink(dir, &name, target, attributes(&metadata, &source), true)
            .await
            .with_context(|| source.display().to_string())?;
        return Ok(Some(0));
    }
    if !metadata.is_file() {
        return Ok(None);
    }
    let shown = || source.display().to_string();
    let (of_file, attributes) = (source.clone(), attributes(&metadata, &source));
    let (begin, rest) = tokio::task::spawn_blocking(move || begin(&of_file)).await?.with_context(shown)?;
    let written = match rest {
        None => client.write_file(dir, &name, attributes, true, &mut &begin.get_ref()[..]).await,
        Some(file) => {
            let mut whole = AsyncReadExt::chain(begin, tokio::fs::File::from_std(file));
            client.write_file(dir, &name, attributes, true, &mut whole).await
        }
    };
    written.with_context(shown)?;
    Ok(Some(metadata.len()))
}

/// The begin of a file; with the file, where there is more of it. Most files are read by one piece of work that way.
fn begin(source: &Path) -> std::io::Result<(Cursor<Vec<u8>>, Option<File>)> {
    let mut file = File::open(source)?;
    let mut bytes = Vec::new();
    let read = (&mut file).take(READ_AT_ONCE).read_to_end(&mut bytes)?;
    let is_whole = (read as u64) < READ_AT_ONCE;
    Ok((Cursor::new(bytes), (!is_whole).then_some(file)))
}

/// A tree on its way.
struct Tree {
    client: Arc<Client>,
    jobs: usize,
    verbose: bool,
}

/// A directory whose entries are still to be stored.
struct Waiting {
    source: PathBuf,
    dir: InodeId,
    name: Bytes,
    path: RemotePath,
}

#[derive(Default)]
struct Counts {
    files: u64,
    bytes: u64,
    directories: u64,
}

enum Done {
    Directory(Waiting, InodeId),
    File { bytes: u64, path: RemotePath },
    Skipped(PathBuf),
    Finished,
}

/// A directory that is there; it is finished when everything in it has let go of it.
struct Open {
    source: PathBuf,
    id: InodeId,
    above: Option<Arc<Open>>,
}

type Running = JoinSet<(Option<Arc<Open>>, Result<Done>)>;

/// What a walk keeps: the directories that are still to be read, the work under way, and what came of it.
struct Walk {
    waiting: Vec<(Waiting, InodeId, Option<Arc<Open>>)>,
    running: Running,
    failures: Failures,
    counts: Counts,
    progress: indicatif::ProgressBar,
}

impl Tree {
    async fn put(&self, source: &Path, dir: InodeId, name: Bytes, path: RemotePath) -> Result<ExitCode> {
        let start = Instant::now();
        let first = Waiting { source: source.to_owned(), dir, name, path };
        let id = make(&self.client, &first).await?;
        let mut walk = Walk {
            waiting: vec![(first, id, None)],
            running: Running::new(),
            failures: Failures::default(),
            counts: Counts::default(),
            progress: output::counter("put"),
        };
        loop {
            match walk.waiting.pop() {
                Some((waiting, id, above)) => self.read(&mut walk, waiting, id, above).await?,
                None => match walk.running.join_next().await {
                    Some(done) => self.take(&mut walk, done)?,
                    None => break,
                },
            }
        }
        let Walk { failures, counts, progress, .. } = walk;
        progress.finish_and_clear();
        let seconds = start.elapsed().as_secs_f64().max(1e-9);
        let failed = match failures.count() {
            0 => String::new(),
            count => format!("; {count} could NOT be stored"),
        };
        talk!(
            "stored {} files in {} directories, {} in {seconds:.1} s ({:.0} files/s, {:.1} MB/s){failed}",
            counts.files,
            counts.directories,
            output::bytes(counts.bytes),
            counts.files as f64 / seconds,
            counts.bytes as f64 / 1e6 / seconds
        );
        Ok(failures.exit_code())
    }

    /// Starts the work for everything in a directory, waiting for room.
    async fn read(
        &self,
        walk: &mut Walk,
        waiting: Waiting,
        id: InodeId,
        above: Option<Arc<Open>>,
    ) -> Result<()> {
        let open = Arc::new(Open { source: waiting.source.clone(), id, above });
        walk.counts.directories += 1;
        let shown = || waiting.source.display().to_string();
        if let Some(entries) = walk.failures.take(std::fs::read_dir(&waiting.source).with_context(shown)) {
            for entry in entries {
                let Some(entry) = walk.failures.take(entry.with_context(shown)) else { continue };
                while walk.running.len() >= self.jobs
                    && let Some(done) = walk.running.join_next().await
                {
                    self.take(walk, done)?;
                }
                let (source, name) = (entry.path(), Bytes::copy_from_slice(entry.file_name().as_bytes()));
                let path = waiting.path.join(&name);
                let kind = entry.file_type().with_context(|| source.display().to_string());
                let Some(kind) = walk.failures.take(kind) else { continue };
                let (client, open) = (self.client.clone(), Some(open.clone()));
                walk.running.spawn(async move {
                    let done = if kind.is_dir() {
                        let below = Waiting { source, dir: id, name, path };
                        make(&client, &below).await.map(|id| Done::Directory(below, id))
                    } else {
                        store(&client, source.clone(), id, name).await.map(|stored| match stored {
                            Some(bytes) => Done::File { bytes, path },
                            None => Done::Skipped(source),
                        })
                    };
                    (open, done)
                });
            }
        }
        self.release(walk, Some(open));
        Ok(())
    }

    fn take(
        &self,
        walk: &mut Walk,
        done: Result<(Option<Arc<Open>>, Result<Done>), tokio::task::JoinError>,
    ) -> Result<()> {
        let (open, done) = done?;
        match done {
            Err(error) if is_final(&error) => return Err(error),
            Err(error) => {
                walk.failures.add(&error);
                if walk.failures.is_hopeless() {
                    return Err(error);
                }
            }
            Ok(Done::Directory(below, id)) => walk.waiting.push((below, id, open.clone())),
            Ok(Done::File { bytes, path }) => {
                walk.failures.succeeded();
                let counts = &mut walk.counts;
                (counts.files, counts.bytes) = (counts.files + 1, counts.bytes + bytes);
                walk.progress.set_message(format!("{} files, {}", counts.files, output::bytes(counts.bytes)));
                // A closed pipe must not end the work.
                if self.verbose && output::line_of(path.as_bytes()).is_err() {
                    talk!("clutch: nobody reads the list of stored files any more");
                }
            }
            Ok(Done::Skipped(source)) => {
                let what = "not a file, directory or symbolic link; left out";
                walk.failures.add(&anyhow::anyhow!("{}: {what}", source.display()));
            }
            Ok(Done::Finished) => {}
        }
        self.release(walk, open);
        Ok(())
    }

    /// Finishes a directory when nothing in it is under way any more; the one above follows when that is done.
    fn release(&self, walk: &mut Walk, open: Option<Arc<Open>>) {
        if let Some(done) = open.and_then(Arc::into_inner) {
            let client = self.client.clone();
            walk.running.spawn(async move {
                let finished = finish(&client, &done).await.map(|()| Done::Finished);
                (done.above, finished)
            });
        }
    }
}

async fn make(client: &Client, waiting: &Waiting) -> Result<InodeId> {
    let metadata = waiting.source.metadata().with_context(|| waiting.source.display().to_string())?;
    let attributes = FileAttributes {
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        mtime: mtime(&metadata).unwrap_or(1),
    };
    make_or_find(client, waiting.dir, &waiting.name, attributes)
        .await
        .with_context(|| waiting.path.to_string())
}

/// The mode and time of a directory, which storing its entries has changed.
async fn finish(client: &Client, done: &Open) -> Result<()> {
    let shown = || done.source.display().to_string();
    let metadata = done.source.metadata().with_context(shown)?;
    let change = SetAttributes {
        mode: Some(metadata.mode() & 0o7777),
        mtime: Some(kept_mtime(&metadata, &done.source)),
        ..SetAttributes::default()
    };
    client.set_attributes(done.id, change).await.with_context(shown).map(drop)
}
