//! The snapshots of a replica are its checkpoints: its log reads them where another member needs one, and puts those here that
//! this member needs.
//!
//! Invariants: what is being received has a name of its own; a checkpoint gets its name when all of its bytes are durable, are
//! those of the manifest, and give its hash; who has stopped on a fault offers none.

use std::{
    path::{Component, Path, PathBuf},
    sync::OnceLock,
};

use async_trait::async_trait;
use bytes::Bytes;
use clutch_log::{LogFault, Manifest, Position, SnapshotFile, Snapshots};
use clutch_proto::{
    admin::{AdminRequest, TakeCheckpoint, admin_request::Op},
    mutants::{self, Mutant},
};
use clutch_runtime::{Disk, Runtime};
use clutch_state::{View, applier};
use clutch_state_replica::{OpenCheckpoint, ReplicaHandle};

/// Bytes that are read at a time for a checksum.
const READ_BYTES: usize = 1 << 20;

/// The checkpoints of one replica.
pub(crate) struct ReplicaSnapshots {
    runtime: Runtime,
    /// Where they lie; `None` where the store makes none.
    dir: Option<PathBuf>,
    open: OpenCheckpoint,
    /// Who takes new ones; known once it has started.
    replica: OnceLock<ReplicaHandle>,
}

fn failed(what: &str, error: impl std::fmt::Display) -> LogFault {
    LogFault::Storage(format!("{what}: {error}"))
}

/// Names come from other nodes: none leads out of the checkpoint.
fn check_name(name: &str) -> Result<(), LogFault> {
    let mut components = Path::new(name).components();
    match (components.next(), components.next()) {
        (None, _) => Ok(()),
        (Some(Component::Normal(only)), None) if only == name => Ok(()),
        _ => Err(failed("a snapshot", format!("{name:?} is no name of a file in it"))),
    }
}

/// A file of a checkpoint, which may itself be one file.
fn file_at(checkpoint: &Path, name: &str) -> PathBuf {
    if name.is_empty() { checkpoint.to_owned() } else { checkpoint.join(name) }
}

fn names(disk: &dyn Disk, checkpoint: &Path) -> Vec<String> {
    match disk.list(checkpoint) {
        Ok(names) if !names.is_empty() => names,
        _ => vec![String::new()],
    }
}

/// Length and checksum of a file.
fn measured(disk: &dyn Disk, path: &Path) -> std::io::Result<(u64, u32)> {
    let file = disk.open(path, false)?;
    let (bytes, mut hasher, mut at) = (file.len()?, crc32fast::Hasher::new(), 0);
    let mut buffer = vec![0; READ_BYTES];
    while at < bytes {
        let read = file.read_at(&mut buffer, at)?;
        if read == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        hasher.update(&buffer[..read]);
        at += read as u64;
    }
    Ok((bytes, hasher.finalize()))
}

impl ReplicaSnapshots {
    pub(crate) fn new(runtime: Runtime, dir: Option<PathBuf>, open: OpenCheckpoint) -> ReplicaSnapshots {
        ReplicaSnapshots { runtime, dir, open, replica: OnceLock::new() }
    }

    /// From now on new ones can be taken.
    pub(crate) fn begin(&self, replica: ReplicaHandle) {
        assert!(self.replica.set(replica).is_ok(), "a replica starts once");
    }

    /// A state that was found wrong is nothing for others.
    fn check_well(&self) -> Result<(), LogFault> {
        match self.replica.get().and_then(ReplicaHandle::fault) {
            Some(fault) => Err(failed("take a checkpoint", fault)),
            None => Ok(()),
        }
    }

    fn dir(&self) -> Result<&Path, LogFault> {
        let none = || LogFault::Unsupported("this replica keeps its state in memory: no snapshots".into());
        self.dir.as_deref().ok_or_else(none)
    }

    fn whole(&self, position: Position) -> Result<PathBuf, LogFault> {
        Ok(self.dir()?.join(format!("{:020}", position.0)))
    }

    fn part(&self, position: Position) -> Result<PathBuf, LogFault> {
        Ok(self.dir()?.join(format!("{:020}.part", position.0)))
    }

    fn newest(&self) -> Result<Option<Position>, LogFault> {
        let names = self.runtime.disk.list(self.dir()?).map_err(|e| failed("list checkpoints", e))?;
        Ok(names.iter().filter_map(|name| name.parse().ok()).max().map(Position))
    }

    async fn taken(&self) -> Result<Position, LogFault> {
        let replica =
            self.replica.get().ok_or_else(|| failed("take a checkpoint", "the replica is starting"))?;
        let request = AdminRequest { op: Some(Op::TakeCheckpoint(TakeCheckpoint {})) };
        let reply = replica.admin(request).await.map_err(|e| failed("take a checkpoint", e))?;
        let newest = reply.status.and_then(|status| status.checkpoints.into_iter().max());
        newest.map(Position).ok_or_else(|| failed("take a checkpoint", "none is there"))
    }

    /// The hash of a checkpoint, which has nothing behind its position.
    fn hash(&self, path: &Path, position: Position) -> Result<[u8; 16], LogFault> {
        let view = (self.open)(path).map_err(|e| failed("open a checkpoint", e))?;
        let (stands, _) = applier::stands_at(&*view).map_err(|e| failed("read a checkpoint", e))?;
        if stands > position {
            return Err(failed("a checkpoint", format!("it is of {stands}, and is called {position}")));
        }
        Ok(applier::stored_hash(&*view).map_err(|e| failed("read a checkpoint", e))?.to_bytes())
    }
}

#[async_trait]
impl Snapshots for ReplicaSnapshots {
    async fn take(&self, least: Position) -> Result<Manifest, LogFault> {
        self.check_well()?;
        let is_enough = |newest: &Position| *newest >= least || mutants::is(Mutant::OldSnapshotOffered);
        let position = match self.newest()?.filter(is_enough) {
            Some(newest) => newest,
            None => self.taken().await?,
        };
        if position < least && !mutants::is(Mutant::OldSnapshotOffered) {
            return Err(failed(
                "take a checkpoint",
                format!("it is at {position}, and {least} is asked for"),
            ));
        }
        let (path, disk) = (self.whole(position)?, self.runtime.disk.clone());
        let hash = self.hash(&path, position)?;
        let measure = move || {
            let files = names(&*disk, &path).into_iter().map(|name| {
                let (bytes, crc) = measured(&*disk, &file_at(&path, &name))?;
                Ok(SnapshotFile { name, bytes, crc })
            });
            files.collect::<std::io::Result<Vec<SnapshotFile>>>()
        };
        let files = self.runtime.blocking(measure).await;
        let files = files.ok_or_else(|| failed("read a checkpoint", "it did not end"))?;
        let files = files.map_err(|e| failed("read a checkpoint", e))?;
        let is_past = mutants::is(Mutant::SnapshotPastState);
        Ok(Manifest { position: if is_past { position.next() } else { position }, hash, files })
    }

    async fn read(
        &self,
        position: Position,
        file: &str,
        offset: u64,
        bytes: usize,
    ) -> Result<Bytes, LogFault> {
        self.check_well()?;
        check_name(file)?;
        let is_past = mutants::is(Mutant::SnapshotPastState);
        let position = if is_past { Position(position.0 - 1) } else { position };
        let mut buffer = vec![0; bytes];
        let path = file_at(&self.whole(position)?, file);
        let opened = self.runtime.disk.open(&path, false);
        let read = opened.and_then(|file| file.read_at(&mut buffer, offset));
        buffer.truncate(read.map_err(|e| failed("read a checkpoint", e))?);
        Ok(buffer.into())
    }

    async fn receive(&self, manifest: &Manifest) -> Result<(), LogFault> {
        manifest.files.iter().try_for_each(|file| check_name(&file.name))?;
        let (dir, disk) = (self.dir()?, &self.runtime.disk);
        let begun = || {
            disk.create_dir_all(dir)?;
            for left in disk.list(dir)?.iter().filter(|name| name.ends_with(".part")) {
                let left = dir.join(left);
                for name in names(&**disk, &left) {
                    // Of a directory only the name may be left.
                    let _ = disk.remove(&file_at(&left, &name));
                }
            }
            if manifest.files.iter().all(|file| !file.name.is_empty()) {
                disk.create_dir_all(&dir.join(format!("{:020}.part", manifest.position.0)))?;
            }
            Ok(())
        };
        begun().map_err(|e: std::io::Error| failed("begin to receive a snapshot", e))
    }

    async fn write(&self, position: Position, file: &str, offset: u64, bytes: Bytes) -> Result<(), LogFault> {
        check_name(file)?;
        let path = file_at(&self.part(position)?, file);
        let opened = self.runtime.disk.open(&path, true);
        let written = opened.and_then(|file| file.write_at(&bytes, offset));
        written.map_err(|e| failed("write what is received of a snapshot", e))
    }

    async fn commit(&self, manifest: &Manifest) -> Result<(), LogFault> {
        let (part, whole) = (self.part(manifest.position)?, self.whole(manifest.position)?);
        let (dir, disk, open) = (self.dir()?.to_owned(), self.runtime.disk.clone(), self.open.clone());
        let manifest = manifest.clone();
        let finish = move || {
            check_received(&*disk, &part, &manifest)?;
            check_state(&*open(&part)?, &manifest)?;
            // One of that position that is here already may be a wrong one.
            if names(&*disk, &whole) != [String::new()] {
                disk.rename(&whole, &dir.join(format!("{:020}.gone", manifest.position.0)))?;
            }
            disk.rename(&part, &whole)?;
            disk.sync_dir(&dir)?;
            anyhow::Ok(())
        };
        let finished = self.runtime.blocking(finish).await;
        let finished = finished.ok_or_else(|| failed("finish a snapshot", "it did not end"))?;
        finished.map_err(|e| failed("finish a snapshot", format!("{e:#}")))
    }
}

/// Every file is durable and is what was sent.
fn check_received(disk: &dyn Disk, part: &Path, manifest: &Manifest) -> anyhow::Result<()> {
    for file in &manifest.files {
        let path = file_at(part, &file.name);
        disk.open(&path, true)?.sync()?;
        let is_same = measured(disk, &path)? == (file.bytes, file.crc);
        anyhow::ensure!(is_same, "{} is not what was sent", path.display());
    }
    disk.sync_dir(part)?;
    Ok(())
}

/// The rows give the manifest's hash, and none is of later than its position.
fn check_state(view: &dyn View, manifest: &Manifest) -> anyhow::Result<()> {
    let rescan = applier::rescan(view)?;
    anyhow::ensure!(rescan.differences.is_empty(), "its rows do not give its hash: {:?}", rescan.differences);
    anyhow::ensure!(rescan.position <= manifest.position, "it is of {}", rescan.position);
    let is_same = applier::stored_hash(view)?.to_bytes() == manifest.hash;
    anyhow::ensure!(is_same, "it has another hash than its sender's");
    Ok(())
}
