//! A store that a crash sets back to an earlier moment: what RocksDB without its own log does.
//!
//! Between any two writes the store may make everything so far durable, as a background flush would. What was
//! written after that is gone when its node crashes.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use clutch_log::LogId;
use clutch_runtime::{Runtime, simulated::NodeId};
use clutch_state::{
    MemoryStore, Store, StoreError, Table, View,
    store::{Rows, WriteBatch},
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
        self.memory.checkpoint(to)
    }
}
