//! Where replicas keep their state.

use std::{path::PathBuf, sync::Arc};

use clutch_log::{Bounds, LogId};
use clutch_state::{Store, StoreError, View};
use clutch_state_replica::OpenCheckpoint;

/// Opens the stores of a node.
pub trait StoreProvider: Send + Sync {
    /// The store of that log's replica.
    fn store(&self, id: LogId) -> Result<Arc<dyn Store>, StoreError>;
    /// Where that replica keeps checkpoints.
    fn checkpoints(&self, id: LogId) -> Option<PathBuf>;
    /// How a checkpoint is opened for reading.
    fn open_checkpoint(&self) -> OpenCheckpoint;
    /// Takes note that a replica's state is damaged, so that the next start builds it anew.
    fn condemn(&self, id: LogId, why: &str);
    /// Why a state was condemned, if it was.
    fn condemned(&self, id: LogId) -> Option<String>;
    /// Sets a state aside that is damaged, missing or of somebody else, and puts another in its place: from the newest
    /// checkpoint that is whole and from which the log goes on, or an empty one where the log is there from its beginning.
    /// No store of the replica may be open. `is_home` refuses a checkpoint of another replica.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] when the log was trimmed and no checkpoint fits; nothing was changed then.
    fn rebuild(&self, id: LogId, log: Bounds, is_home: IsHome<'_>) -> Result<Rebuilt, StoreError>;
}

/// Refuses a state that is not the one that is looked for.
pub type IsHome<'a> = &'a dyn Fn(&dyn View) -> Result<(), StoreError>;

/// What [`StoreProvider::rebuild`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rebuilt {
    /// The position of the checkpoint that it begins from; `None` for the beginning of the log.
    pub from_checkpoint: Option<u64>,
    /// Where the old files are now; `None` when there were none.
    pub set_aside: Option<PathBuf>,
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
mod rocks;

#[cfg(feature = "rocks")]
pub use rocks::RocksStores;
