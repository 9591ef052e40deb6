//! `clutch fs put`: local files into the cluster.

use std::{
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Instant,
};

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use clutch_client::{Client, ClientError, FileAttributes, Resolved};
use clutch_proto::{InodeId, shard::SetAttributes};
use tokio::{sync::Semaphore, task::JoinSet};

use super::small::make_or_find;
use crate::output;

pub(super) async fn run(
    client: Arc<Client>,
    source: &Path,
    target: &str,
    recursive: bool,
    verbose: bool,
    jobs: usize,
) -> Result<ExitCode> {
    if source == Path::new("-") {
        let (dir, name) = client.resolve_parent(target).await?;
        let (uid, gid) = super::identity();
        let attributes = FileAttributes { mode: 0o644, uid, gid, mtime: 0 };
        client
            .write_file(dir, &name, attributes, true, &mut tokio::io::stdin())
            .await
            .with_context(|| target.to_owned())?;
        return Ok(ExitCode::SUCCESS);
    }
    let metadata = source.symlink_metadata().with_context(|| source.display().to_string())?;
    let (dir, name, path) = destination(&client, source, target).await?;
    if !metadata.is_dir() {
        let stored = store(&client, source.to_owned(), dir, name).await?;
        if stored.is_none() {
            bail!("{}: only files, directories and symbolic links can be stored", source.display());
        }
        if verbose {
            output::line(&path)?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    if !recursive {
        bail!("{} is a directory; use -r to store it with all that is in it", source.display());
    }
    Tree { client, jobs: Arc::new(Semaphore::new(jobs.clamp(1, 1024))), verbose }
        .put(source, dir, name, path)
        .await
}

/// The remote directory, the name in it and the whole path.
async fn destination(client: &Client, source: &Path, target: &str) -> Result<(InodeId, Bytes, String)> {
    let into = |existing: Resolved| {
        let absolute = std::path::absolute(source).context("the source's own name")?;
        let name = absolute.file_name().context("the source has no name; name the target")?.to_owned();
        let path = format!("{}/{}", target.trim_end_matches('/'), name.to_string_lossy());
        anyhow::Ok((existing.id, Bytes::copy_from_slice(name.as_bytes()), path))
    };
    match client.resolve(target).await {
        Ok(existing) if existing.id.is_directory() => into(existing),
        Ok(existing) => Ok((existing.parent, existing.name, target.to_owned())),
        Err(error) if error.is_not_found() => {
            let (dir, name) = client.resolve_parent(target).await?;
            Ok((dir, name, target.trim_end_matches('/').to_owned()))
        }
        Err(error) => Err(error.into()),
    }
}

fn mtime(metadata: &std::fs::Metadata) -> u64 {
    u64::try_from(metadata.mtime())
        .unwrap_or(0)
        .saturating_mul(1_000_000_000)
        .saturating_add(metadata.mtime_nsec() as u64)
        .max(1)
}

fn attributes(metadata: &std::fs::Metadata) -> FileAttributes {
    FileAttributes {
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        mtime: mtime(metadata),
    }
}

/// Stores a file or link; its bytes, or `None` for what cannot be stored.
async fn store(client: &Client, source: PathBuf, dir: InodeId, name: Bytes) -> Result<Option<u64>> {
    let metadata = source.symlink_metadata().with_context(|| source.display().to_string())?;
    if metadata.is_symlink() {
        let target = std::fs::read_link(&source).with_context(|| source.display().to_string())?;
        let target = Bytes::copy_from_slice(target.as_os_str().as_bytes());
        client
            .symlink(dir, &name, target, attributes(&metadata), true)
            .await
            .with_context(|| source.display().to_string())?;
        return Ok(Some(0));
    }
    if !metadata.is_file() {
        return Ok(None);
    }
    let mut file = tokio::fs::File::open(&source).await.with_context(|| source.display().to_string())?;
    client
        .write_file(dir, &name, attributes(&metadata), true, &mut file)
        .await
        .with_context(|| source.display().to_string())?;
    Ok(Some(metadata.len()))
}

/// Whether an error is about a local file and not about the cluster.
fn is_local(error: &anyhow::Error) -> bool {
    match error.downcast_ref::<ClientError>() {
        Some(error) => matches!(error, ClientError::Local(_)),
        None => error.downcast_ref::<std::io::Error>().is_some(),
    }
}

/// A tree on its way.
struct Tree {
    client: Arc<Client>,
    jobs: Arc<Semaphore>,
    verbose: bool,
}

enum Done {
    Directory { source: PathBuf, id: InodeId, path: String },
    File { bytes: Option<u64>, source: PathBuf, path: String },
}

impl Tree {
    async fn put(&self, source: &Path, dir: InodeId, name: Bytes, path: String) -> Result<ExitCode> {
        let start = Instant::now();
        let progress = output::counter("put");
        let mut running: JoinSet<Result<Done>> = JoinSet::new();
        // Directories whose entries are still to be stored; at most one is being read at a time.
        let mut waiting: Vec<(PathBuf, InodeId, String)> = Vec::new();
        let mut directories: Vec<(PathBuf, InodeId)> = Vec::new();
        let (mut files, mut bytes, mut skipped) = (0u64, 0u64, 0u64);
        self.start_directory(&mut running, source.to_owned(), dir, name, path).await?;
        loop {
            if let Some((source, id, path)) = waiting.pop() {
                match self.start_entries(&mut running, &source, id, &path).await {
                    Err(error) if is_local(&error) => {
                        skipped += 1;
                        eprintln!("clutch: {error:#}; the rest of the directory is left out");
                    }
                    other => other?,
                }
                directories.push((source, id));
            }
            let done = if waiting.is_empty() {
                match running.join_next().await {
                    Some(done) => done,
                    None => break,
                }
            } else {
                match running.try_join_next() {
                    Some(done) => done,
                    None => continue,
                }
            };
            let done = match done? {
                Ok(done) => done,
                // What is wrong with one local file is no reason to leave the others out.
                Err(error) if is_local(&error) => {
                    skipped += 1;
                    eprintln!("clutch: {error:#}; left out");
                    continue;
                }
                Err(error) => return Err(error),
            };
            match done {
                Done::Directory { source, id, path } => waiting.push((source, id, path)),
                Done::File { bytes: Some(stored), path, .. } => {
                    (files, bytes) = (files + 1, bytes + stored);
                    progress.set_message(format!("{files} files, {}", output::bytes(bytes)));
                    // A closed pipe must not end the work.
                    if self.verbose && output::line(path).is_err() {
                        eprintln!("clutch: nobody reads the list of stored files any more");
                    }
                }
                Done::File { bytes: None, source, .. } => {
                    skipped += 1;
                    eprintln!(
                        "clutch: {}: not a file, directory or symbolic link; left out",
                        source.display()
                    );
                }
            }
        }
        self.finish_directories(&directories).await?;
        progress.finish_and_clear();
        let seconds = start.elapsed().as_secs_f64().max(1e-9);
        eprintln!(
            "stored {files} files in {} directories, {} in {seconds:.1} s ({:.0} files/s, {:.1} MB/s)",
            directories.len(),
            output::bytes(bytes),
            files as f64 / seconds,
            bytes as f64 / 1e6 / seconds
        );
        Ok(if skipped == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    async fn start_directory(
        &self,
        running: &mut JoinSet<Result<Done>>,
        source: PathBuf,
        dir: InodeId,
        name: Bytes,
        path: String,
    ) -> Result<()> {
        let permit = self.jobs.clone().acquire_owned().await?;
        let client = self.client.clone();
        running.spawn(async move {
            let metadata = source.metadata().with_context(|| source.display().to_string())?;
            let id = make_or_find(&client, dir, &name, attributes(&metadata))
                .await
                .with_context(|| path.clone())?;
            drop(permit);
            Ok(Done::Directory { source, id, path })
        });
        Ok(())
    }

    async fn start_entries(
        &self,
        running: &mut JoinSet<Result<Done>>,
        source: &Path,
        dir: InodeId,
        path: &str,
    ) -> Result<()> {
        for entry in std::fs::read_dir(source).with_context(|| source.display().to_string())? {
            let entry = entry.with_context(|| source.display().to_string())?;
            let name = Bytes::copy_from_slice(entry.file_name().as_bytes());
            let path = format!("{path}/{}", entry.file_name().to_string_lossy());
            if entry.file_type()?.is_dir() {
                self.start_directory(running, entry.path(), dir, name, path).await?;
                continue;
            }
            let permit = self.jobs.clone().acquire_owned().await?;
            let client = self.client.clone();
            running.spawn(async move {
                let bytes = store(&client, entry.path(), dir, name).await?;
                drop(permit);
                Ok(Done::File { bytes, source: entry.path(), path })
            });
        }
        Ok(())
    }

    /// Modes and times of directories, which storing their entries has changed.
    async fn finish_directories(&self, directories: &[(PathBuf, InodeId)]) -> Result<()> {
        use futures_util::{StreamExt as _, TryStreamExt as _};
        futures_util::stream::iter(directories)
            .map(|(source, id)| async move {
                let metadata = source.metadata().with_context(|| source.display().to_string())?;
                let time = Some(mtime(&metadata));
                let change = SetAttributes {
                    mode: Some(metadata.mode() & 0o7777),
                    mtime: time,
                    ..SetAttributes::default()
                };
                self.client
                    .set_attributes(*id, change)
                    .await
                    .with_context(|| source.display().to_string())
                    .map(drop)
            })
            .buffer_unordered(32)
            .try_collect()
            .await
    }
}
