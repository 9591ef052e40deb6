//! Where replicas keep their state and their logs.

use std::{path::PathBuf, sync::Arc};

use async_trait::async_trait;
use clutch_log::{Log, LogFault, LogId};
use clutch_log_local::LocalEngine;
use clutch_state::{Store, StoreError, replica::OpenCheckpoint};

/// Opens the logs of a node.
#[async_trait]
pub trait LogProvider: Send + Sync {
    /// The log of that id.
    async fn log(&self, id: LogId) -> Result<Arc<dyn Log>, LogFault>;
}

#[async_trait]
impl LogProvider for LocalEngine {
    async fn log(&self, id: LogId) -> Result<Arc<dyn Log>, LogFault> {
        LocalEngine::log(self, id).await
    }
}

/// Opens the stores of a node.
pub trait StoreProvider: Send + Sync {
    /// The store of that log's replica.
    fn store(&self, id: LogId) -> Result<Arc<dyn Store>, StoreError>;
    /// Where that replica keeps checkpoints.
    fn checkpoints(&self, id: LogId) -> Option<PathBuf>;
    /// How a checkpoint is opened for reading.
    fn open_checkpoint(&self) -> OpenCheckpoint;
}

/// A directory name for a log.
pub fn log_name(id: LogId) -> String {
    match id.role {
        1 => "registry".into(),
        2 => "cdc".into(),
        _ => format!("shard-{:03}", id.number),
    }
}

#[cfg(feature = "rocks")]
pub use rocks::RocksStores;

#[cfg(feature = "rocks")]
mod rocks {
    use std::{
        path::{Path, PathBuf},
        sync::Arc,
    };

    use clutch_log::LogId;
    use clutch_shard::tables;
    use clutch_state::{BufferedStore, RowCache, Store, StoreError, replica::OpenCheckpoint};
    use clutch_state_rocks::{RocksStore, SharedMemory};

    use super::{StoreProvider, log_name};

    /// RocksDB databases under one directory: `<dir>/<log>/db`, checkpoints in `<dir>/<log>/checkpoints`.
    pub struct RocksStores {
        dir: PathBuf,
        memory: SharedMemory,
        cache: RowCache,
    }

    /// Rows that one replica holds back before RocksDB gets them: enough to write hot rows once for many batches, few
    /// enough that passing them on delays nobody for more than some milliseconds.
    const WAITING_ROWS_MAX: usize = 4096;
    const WAITING_BYTES_MAX: usize = 1 << 20;

    impl RocksStores {
        /// Stores that share a cache of rows of 48 MiB, a block cache of 32 MiB and write buffers of 64 MiB, or of 2 MiB for
        /// each replica where that is more.
        pub fn new(dir: PathBuf, replicas: usize) -> RocksStores {
            let cache = RowCache::new(48 << 20);
            // Each memtable takes half a MiB when it is made; a budget that is used up by that would flush for ever.
            let write_buffers = (replicas << 21).max(64 << 20);
            RocksStores { dir, memory: SharedMemory::new(32 << 20, write_buffers), cache }
        }

        /// Where a replica's database lies.
        pub fn database(dir: &Path, id: LogId) -> PathBuf {
            dir.join(log_name(id)).join("db")
        }
    }

    impl StoreProvider for RocksStores {
        fn store(&self, id: LogId) -> Result<Arc<dyn Store>, StoreError> {
            let path = RocksStores::database(&self.dir, id);
            std::fs::create_dir_all(&path)
                .map_err(|e| StoreError::Engine(format!("make {}: {e}", path.display())))?;
            let store = Arc::new(RocksStore::open(&path, &self.memory)?);
            let store = BufferedStore::new(store, self.cache.clone(), WAITING_ROWS_MAX, WAITING_BYTES_MAX);
            Ok(Arc::new(store.with_passing(tables::PASSING)))
        }

        fn checkpoints(&self, id: LogId) -> Option<PathBuf> {
            Some(self.dir.join(log_name(id)).join("checkpoints"))
        }

        fn open_checkpoint(&self) -> OpenCheckpoint {
            let memory = self.memory.clone();
            Arc::new(move |path| Ok(Arc::new(RocksStore::open_read_only(path, &memory)?)))
        }
    }
}
