//! A store that a crash sets back to an earlier moment: what RocksDB without its own log does.
//!
//! Between any two writes the store may make everything so far durable, as a background flush would. What was
//! written after that is gone when its node crashes.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use clutch_log::{Bounds, LogId, Position};
use clutch_runtime::{Disk, Runtime, simulated::NodeId};
use clutch_server::stores::{IsHome, log_name};
use clutch_state::{
    MemoryStore, Store, StoreError, Table, View, applier,
    store::{Key, Rows, WriteBatch},
};
use clutch_state_buffered::{BufferedStore, RowCache};
use parking_lot::Mutex;

/// Rows that a simulated replica holds back.
const WAITING_ROWS_MAX: usize = 12;
/// So small that rows leave it.
const CACHE_BYTES: usize = 4096;

type Image = Arc<Mutex<Arc<MemoryStore>>>;

/// What survives of every replica's state.
#[derive(Clone, Default)]
pub struct SimImages {
    images: Arc<Mutex<BTreeMap<(NodeId, LogId), Image>>>,
    flush_permille: Arc<AtomicU64>,
    condemned: Arc<Mutex<BTreeMap<(NodeId, LogId), String>>>,
}

impl SimImages {
    /// Nothing so far; of a thousand writes so many are followed by a flush.
    pub fn new(flush_permille: u32) -> SimImages {
        SimImages {
            images: Arc::default(),
            flush_permille: Arc::new(u64::from(flush_permille).into()),
            condemned: Arc::default(),
        }
    }

    /// Takes note that a replica's state is damaged.
    pub fn condemn(&self, node: NodeId, log: LogId, why: &str) {
        self.condemned.lock().insert((node, log), why.to_owned());
    }

    /// Why a state was condemned.
    pub fn condemned(&self, node: NodeId, log: LogId) -> Option<String> {
        self.condemned.lock().get(&(node, log)).cloned()
    }

    /// Removes a state, so that its replica builds it from the log.
    pub fn forget(&self, node: NodeId, log: LogId) {
        self.images.lock().remove(&(node, log));
        self.condemned.lock().remove(&(node, log));
    }

    /// How far a state is that survives a crash.
    pub fn flushed(&self, node: NodeId, log: LogId) -> Position {
        let image = self.images.lock().get(&(node, log)).map(|image| image.lock().clone());
        let stands = image.map(|image| applier::stands_at(&*image));
        stands.and_then(Result::ok).unwrap_or_default().0
    }

    /// Puts a state in the place of the one that there is; it survives crashes.
    pub fn put(&self, node: NodeId, log: LogId, store: MemoryStore) {
        self.images.lock().insert((node, log), Arc::new(Mutex::new(Arc::new(store))));
    }

    /// The store of a replica as the last flush before a crash left it.
    pub fn open(&self, node: NodeId, log: LogId, runtime: &Runtime) -> Arc<dyn Store> {
        let image = self.images.lock().entry((node, log)).or_default().clone();
        let memory = image.lock().fork();
        runtime.note(match memory.is_empty() {
            true => "store: begins empty",
            false => "store: begins in mid-log",
        });
        let store = Arc::new(SimStore {
            memory,
            image,
            runtime: runtime.clone(),
            flush_permille: self.flush_permille.clone(),
        });
        // Rows wait in memory as in production, but not so many that hardly any crash finds them written.
        let store = BufferedStore::new(store, RowCache::new(CACHE_BYTES), WAITING_ROWS_MAX, 1 << 20);
        Arc::new(store.with_passing(clutch_shard::tables::PASSING))
    }
}

struct SimStore {
    memory: MemoryStore,
    image: Image,
    runtime: Runtime,
    flush_permille: Arc<AtomicU64>,
}

impl View for SimStore {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        self.memory.get(table, key)
    }

    fn visit(
        &self,
        table: Table,
        from: &[u8],
        until: &[u8],
        each: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), StoreError> {
        self.memory.visit(table, from, until, each)
    }

    fn scan(&self, table: Table, from: &[u8], until: &[u8], limit: usize) -> Result<Rows, StoreError> {
        self.memory.scan(table, from, until, limit)
    }
}

impl Store for SimStore {
    fn write(&self, batch: WriteBatch) -> Result<(), StoreError> {
        self.memory.write(batch)?;
        let permille = self.flush_permille.load(Ordering::Relaxed);
        if permille > 0 && self.runtime.random.below(1000) < permille {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), StoreError> {
        *self.image.lock() = Arc::new(self.memory.fork());
        Ok(())
    }

    fn get_flushed(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        let image = self.image.lock().clone();
        image.get(table, key)
    }

    fn snapshot(&self) -> Result<Arc<dyn View>, StoreError> {
        self.memory.snapshot()
    }

    fn checkpoint(&self, to: &Path) -> Result<(), StoreError> {
        self.runtime.disk.replace(to, &encode(&self.memory)?).map_err(|e| failed("write", to, &e))
    }
}

fn failed(what: &str, path: &Path, error: &std::io::Error) -> StoreError {
    let text = format!("{what} {}: {error}", path.display());
    match error.kind() {
        std::io::ErrorKind::StorageFull => StoreError::Full(text),
        _ => StoreError::Engine(text),
    }
}

/// Where a replica's checkpoints lie on its node's disk, each one file.
pub fn checkpoints_of(id: LogId) -> PathBuf {
    PathBuf::from("state").join(log_name(id)).join("checkpoints")
}

/// A checkpoint: of each row the lengths of key and value, and both; then a CRC-32 of all that.
fn encode(store: &MemoryStore) -> Result<Vec<u8>, StoreError> {
    let mut bytes = Vec::new();
    for table in (0..=255).map(Table) {
        for (key, value) in store.scan(table, &[], &[], usize::MAX)? {
            let key = table.stored_key(&key);
            bytes.extend_from_slice(&(key.len() as u32).to_le_bytes());
            bytes.extend_from_slice(&(value.len() as u32).to_le_bytes());
            bytes.extend_from_slice(&key);
            bytes.extend_from_slice(&value);
        }
    }
    bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
    Ok(bytes)
}

fn decode(bytes: &[u8]) -> Option<MemoryStore> {
    let (mut rest, crc) = bytes.split_last_chunk::<4>()?;
    if crc32fast::hash(rest) != u32::from_le_bytes(*crc) {
        return None;
    }
    let mut rows = WriteBatch::new();
    while !rest.is_empty() {
        let (key, after) = rest.split_first_chunk::<4>()?;
        let (value, after) = after.split_first_chunk::<4>()?;
        let (key, after) = after.split_at_checked(u32::from_le_bytes(*key) as usize)?;
        let (value, after) = after.split_at_checked(u32::from_le_bytes(*value) as usize)?;
        rows.push((Key::from_slice(key), Some(Bytes::copy_from_slice(value))));
        rest = after;
    }
    let store = MemoryStore::new();
    store.write(rows).ok()?;
    Some(store)
}

/// Opens a checkpoint.
pub fn read(disk: &dyn Disk, path: &Path) -> Result<MemoryStore, StoreError> {
    let bytes = disk.read(path).map_err(|e| failed("read", path, &e))?;
    decode(&bytes).ok_or_else(|| StoreError::Damaged(format!("{} is damaged", path.display())))
}

/// The newest checkpoint that is whole and from which a log goes on.
pub fn newest(
    disk: &dyn Disk,
    id: LogId,
    log: Bounds,
    is_home: IsHome<'_>,
) -> Result<Option<(Position, MemoryStore)>, StoreError> {
    let dir = checkpoints_of(id);
    let names = disk.list(&dir).map_err(|e| failed("list", &dir, &e))?;
    let mut positions: Vec<u64> = names.iter().filter_map(|name| name.parse().ok()).collect();
    positions.sort_unstable();
    for position in positions.into_iter().rev().map(Position) {
        if position > log.last || position.next() < log.first {
            continue;
        }
        let path = dir.join(format!("{:020}", position.0));
        let store = read(disk, &path).and_then(|store| {
            is_home(&store)?;
            Ok((applier::rescan(&store)?, store))
        });
        match store {
            Ok((rescan, store)) if rescan.differences.is_empty() && rescan.position <= position => {
                return Ok(Some((position, store)));
            }
            Ok((rescan, _)) => tracing::debug!(differences = ?rescan.differences, "a checkpoint is damaged"),
            Err(error) => tracing::debug!(%error, "a checkpoint cannot be read"),
        }
    }
    Ok(None)
}
