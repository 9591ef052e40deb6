//! States in RocksDB databases under one directory: `<dir>/<log>/db`, checkpoints in `<dir>/<log>/checkpoints`.
//!
//! A database that is damaged is set aside as `db.broken-<n>` and built anew, from a checkpoint or from the log. Invariants:
//! `db` is either a whole database or not there; the directories above it are durable before anything relies on what is in it;
//! a database is set aside only when there is something to build it from.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use clutch_log::{Bounds, LogId, Position};
use clutch_runtime::{Disk as _, production::OsDisk};
use clutch_shard::tables;
use clutch_state::{Store, StoreError, applier};
use clutch_state_buffered::{BufferedStore, RowCache};
use clutch_state_replica::OpenCheckpoint;
use clutch_state_rocks::{RocksStore, SharedMemory};

use super::{IsHome, Rebuilt, StoreProvider, log_name};

/// RocksDB databases under one directory.
pub struct RocksStores {
    dir: PathBuf,
    memory: SharedMemory,
    cache: RowCache,
}

/// Rows that one replica holds back before RocksDB gets them: enough to write hot rows once for many batches, few
/// enough that passing them on delays nobody for more than some milliseconds.
const WAITING_ROWS_MAX: usize = 4096;
const WAITING_BYTES_MAX: usize = 1 << 20;
/// Databases that were set aside and are kept for whoever looks for the reason.
const SET_ASIDE_MAX: usize = 2;
/// Says why a database must be built anew.
const CONDEMNED: &str = "condemned";

fn failed(what: &str, path: &Path, error: &io::Error) -> StoreError {
    let text = format!("{what} {}: {error}", path.display());
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => StoreError::Full(text),
        _ => StoreError::Engine(text),
    }
}

impl RocksStores {
    /// Stores that share a cache of rows of 48 MiB, a block cache of 32 MiB and write buffers of 64 MiB, or of 2 MiB for
    /// each replica where that is more. `files_max` is how many files all databases together may keep open.
    pub fn new(dir: PathBuf, replicas: usize, files_max: usize) -> RocksStores {
        let cache = RowCache::new(48 << 20);
        // Each memtable takes half a MiB when it is made; a budget that is used up by that would flush for ever.
        let write_buffers = (replicas << 21).max(64 << 20);
        let files = (files_max / replicas.max(1)).clamp(8, 256);
        RocksStores { dir, memory: SharedMemory::new(32 << 20, write_buffers).with_files_max(files), cache }
    }

    /// Where a replica's database lies.
    pub fn database(dir: &Path, id: LogId) -> PathBuf {
        dir.join(log_name(id)).join("db")
    }

    /// Where a replica's checkpoints lie.
    pub fn checkpoints_of(dir: &Path, id: LogId) -> PathBuf {
        dir.join(log_name(id)).join("checkpoints")
    }

    /// Where it is noted why a replica's state must be built anew, if it must.
    pub fn condemned_note(dir: &Path, id: LogId) -> PathBuf {
        dir.join(log_name(id)).join(CONDEMNED)
    }

    /// Positions of a replica's checkpoints, oldest first.
    pub fn checkpoint_positions(dir: &Path, id: LogId) -> io::Result<Vec<u64>> {
        let names = OsDisk.list(&RocksStores::checkpoints_of(dir, id))?;
        let mut positions: Vec<u64> = names.iter().filter_map(|name| name.parse().ok()).collect();
        positions.sort_unstable();
        Ok(positions)
    }

    /// Removes a checkpoint, which nobody can begin from any more after that.
    pub fn remove_checkpoint(&self, id: LogId, position: u64) -> io::Result<()> {
        let dir = RocksStores::checkpoints_of(&self.dir, id);
        let path = dir.join(format!("{position:020}"));
        // What an earlier removal did not come to the end of.
        for left in OsDisk.list(&dir)?.iter().filter(|name| name.ends_with(".gone")) {
            fs::remove_dir_all(dir.join(left))?;
        }
        // Its name goes first: half of a checkpoint must not look like one.
        let gone = dir.join(format!("{position:020}.gone"));
        fs::rename(&path, &gone)?;
        OsDisk.sync_dir(&dir)?;
        fs::remove_dir_all(&gone)
    }

    fn home(&self, id: LogId) -> PathBuf {
        self.dir.join(log_name(id))
    }

    /// Makes a replica's directory, durably: also one that a process made that did not come to its sync.
    fn make_home(&self, id: LogId) -> Result<PathBuf, StoreError> {
        let home = self.home(id);
        let made = (|| {
            OsDisk.create_dir_all(&home)?;
            OsDisk.sync_dir(&self.dir)?;
            OsDisk.sync_dir(self.dir.parent().unwrap_or(Path::new(".")))
        })();
        made.map_err(|e| failed("make", &home, &e))?;
        Ok(home)
    }

    /// The newest checkpoint that is whole and from which the log goes on.
    fn newest_good_checkpoint(
        &self,
        id: LogId,
        log: Bounds,
        is_home: IsHome<'_>,
    ) -> Result<Option<u64>, StoreError> {
        let dir = RocksStores::checkpoints_of(&self.dir, id);
        let positions = RocksStores::checkpoint_positions(&self.dir, id);
        let positions = positions.map_err(|e| failed("list", &dir, &e))?;
        for position in positions.into_iter().rev() {
            let at = Position(position);
            if at > log.last || at.next() < log.first {
                continue;
            }
            let path = dir.join(format!("{position:020}"));
            let checked = RocksStore::open_read_only(&path, &self.memory).and_then(|copy| {
                is_home(&copy)?;
                applier::rescan(&copy)
            });
            match checked {
                Ok(rescan)
                    if rescan.differences.is_empty()
                        && rescan.position <= at
                        && rescan.position.next() >= log.first =>
                {
                    return Ok(Some(position));
                }
                Ok(rescan) => {
                    tracing::warn!(path = %path.display(), differences = ?rescan.differences, "a checkpoint is damaged");
                }
                Err(error) => tracing::warn!(path = %path.display(), %error, "a checkpoint is damaged"),
            }
        }
        Ok(None)
    }

    /// Moves the database away; where it is now. An empty one is removed.
    fn set_aside(&self, home: &Path) -> io::Result<Option<PathBuf>> {
        let db = home.join("db");
        if !db.exists() {
            return Ok(None);
        }
        if !OsDisk.list(&db)?.iter().any(|name| name.ends_with(".sst")) {
            // It has never held anything; this start may have made it.
            fs::remove_dir_all(&db)?;
            OsDisk.sync_dir(home)?;
            return Ok(None);
        }
        let mut aside: Vec<u64> = OsDisk
            .list(home)?
            .iter()
            .filter_map(|name| name.strip_prefix("db.broken-")?.parse().ok())
            .collect();
        aside.sort_unstable();
        let path = home.join(format!("db.broken-{}", aside.last().map_or(1, |last| last + 1)));
        fs::rename(&db, &path)?;
        OsDisk.sync_dir(home)?;
        // The newest ones are enough to find out what happened.
        while aside.len() >= SET_ASIDE_MAX {
            fs::remove_dir_all(home.join(format!("db.broken-{}", aside.remove(0))))?;
        }
        Ok(Some(path))
    }
}

/// Copies a checkpoint into `<home>/db`, durably. Its tables never change, so they are shared where the file system can.
fn copy_checkpoint(from: &Path, home: &Path) -> io::Result<()> {
    let new = home.join("db.new");
    if new.exists() {
        fs::remove_dir_all(&new)?;
    }
    fs::create_dir(&new)?;
    for entry in fs::read_dir(from)? {
        let path = entry?.path();
        let Some(name) = path.file_name() else { continue };
        let to = new.join(name);
        // Nobody changes these any more.
        let is_whole = path.extension().is_some_and(|extension| extension == "sst" || extension == "blob");
        if !is_whole || fs::hard_link(&path, &to).is_err() {
            fs::copy(&path, &to)?;
            fs::File::open(&to)?.sync_all()?;
        }
    }
    OsDisk.sync_dir(&new)?;
    fs::rename(&new, home.join("db"))?;
    OsDisk.sync_dir(home)
}

impl StoreProvider for RocksStores {
    fn store(&self, id: LogId) -> Result<Arc<dyn Store>, StoreError> {
        let home = self.make_home(id)?;
        let path = home.join("db");
        let is_new = !path.exists();
        if is_new {
            fs::create_dir(&path).map_err(|e| failed("make", &path, &e))?;
        }
        let store = Arc::new(RocksStore::open(&path, &self.memory)?);
        // RocksDB syncs its own files and names; the name of the directory that holds them is ours.
        OsDisk.sync_dir(&home).map_err(|e| failed("sync", &home, &e))?;
        let store = BufferedStore::new(store, self.cache.clone(), WAITING_ROWS_MAX, WAITING_BYTES_MAX);
        Ok(Arc::new(store.with_passing(tables::PASSING)))
    }

    fn checkpoints(&self, id: LogId) -> Option<PathBuf> {
        Some(RocksStores::checkpoints_of(&self.dir, id))
    }

    fn open_checkpoint(&self) -> OpenCheckpoint {
        let memory = self.memory.clone();
        Arc::new(move |path| Ok(Arc::new(RocksStore::open_read_only(path, &memory)?)))
    }

    fn condemn(&self, id: LogId, why: &str) {
        let path = self.home(id).join(CONDEMNED);
        let home = self.make_home(id).map_err(|error| error.to_string());
        let replace = |_| OsDisk.replace(&path, why.as_bytes()).map_err(|error| error.to_string());
        let noted = home.and_then(replace);
        if let Err(error) = noted {
            // The next start meets the damage again and builds the state anew then.
            tracing::warn!(%error, "take note of a damaged state");
        }
    }

    fn condemned(&self, id: LogId) -> Option<String> {
        fs::read_to_string(self.home(id).join(CONDEMNED)).ok()
    }

    fn rebuild(&self, id: LogId, log: Bounds, is_home: IsHome<'_>) -> Result<Rebuilt, StoreError> {
        let home = self.make_home(id)?;
        let checkpoint = self.newest_good_checkpoint(id, log, is_home)?;
        if checkpoint.is_none() && log.first > Position(1) {
            return Err(StoreError::Damaged(format!(
                "the log of {id} was trimmed up to {} and no checkpoint in {} is whole and covers that; restore that \
                 directory from a backup, or {} (and remove {} if it is there)",
                log.first.0 - 1,
                RocksStores::checkpoints_of(&self.dir, id).display(),
                home.join("db").display(),
                home.join(CONDEMNED).display()
            )));
        }
        let set_aside = self.set_aside(&home).map_err(|e| failed("set aside", &home.join("db"), &e))?;
        if let Some(position) = checkpoint {
            let from = RocksStores::checkpoints_of(&self.dir, id).join(format!("{position:020}"));
            copy_checkpoint(&from, &home).map_err(|e| failed("copy", &from, &e))?;
        }
        let note = home.join(CONDEMNED);
        if note.exists() {
            OsDisk
                .remove(&note)
                .and_then(|()| OsDisk.sync_dir(&home))
                .map_err(|e| failed("remove", &note, &e))?;
        }
        Ok(Rebuilt { from_checkpoint: checkpoint, set_aside })
    }
}
