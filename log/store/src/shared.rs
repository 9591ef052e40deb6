//! What the writer and all handles of a store share.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize},
    },
};

use clutch_log::{LogFault, LogletId, NodeId, Position};
use clutch_runtime::Disk;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

use crate::{
    segment::Segment,
    state::{Command, Group},
};

/// How a store behaves.
#[derive(Clone, Debug)]
pub struct Options {
    /// A segment file is closed when it is larger than this.
    pub segment_bytes_max: u64,
    /// Bytes of recent batches that each group keeps in memory for its readers.
    pub tail_bytes_max: usize,
    /// Bytes that may wait for the writer before proposals are refused as overloaded.
    pub queued_bytes_max: usize,
    /// Commands that one write takes along.
    pub commands_max: usize,
    /// The cluster that the segments belong to; segments of another are refused.
    pub cluster: u64,
    /// The node that writes, for those who ask who leads.
    pub node: NodeId,
    /// Whether a damaged record keeps its group alone from being opened, because others have what it had; else nothing is.
    pub may_quarantine: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            segment_bytes_max: 64 << 20,
            tail_bytes_max: 8 << 20,
            queued_bytes_max: 64 << 20,
            commands_max: 1024,
            cluster: 0,
            node: 1,
            may_quarantine: false,
        }
    }
}

/// What the writer and the handles share; the writer has nothing else, so that it ends with the last handle.
pub(crate) struct Shared {
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) dir: PathBuf,
    pub(crate) options: Options,
    pub(crate) queued_bytes: AtomicUsize,
    /// Bytes appended since the start, and how often they were synced.
    pub(crate) appended: AtomicU64,
    pub(crate) syncs: AtomicU64,
    pub(crate) groups: Mutex<BTreeMap<LogletId, Arc<Group>>>,
    /// Groups that are not opened, and why.
    pub(crate) quarantined: Mutex<BTreeMap<LogletId, LogFault>>,
    /// Segments on disk, oldest first, with what each holds.
    pub(crate) segments: Mutex<Vec<Segment>>,
    /// How often records of any group were taken away again.
    pub(crate) cuts: AtomicU64,
    pub(crate) failed: Mutex<Option<String>>,
}

impl Shared {
    /// Whether a segment was not trimmed.
    pub(crate) fn has_segment(&self, number: u64) -> bool {
        self.segments.lock().iter().any(|segment| segment.number == number)
    }

    /// The first position that a segment still has; the one after the last when none has any.
    pub(crate) fn first_position(&self, id: LogletId) -> Position {
        let first = {
            let segments = self.segments.lock();
            segments
                .iter()
                .filter_map(|s| s.spans.get(&id))
                .find(|span| !span.is_empty())
                .map(|span| span.first)
        };
        let groups = self.groups.lock();
        let Some(group) = groups.get(&id) else { return first.unwrap_or(Position(1)) };
        let base = group.state.lock().base.0;
        first.unwrap_or_else(|| group.last.borrow().next()).max(base.next())
    }
}

/// The way to the writer.
#[derive(Clone)]
pub(crate) struct Handle {
    pub(crate) shared: Arc<Shared>,
    pub(crate) commands: mpsc::Sender<Command>,
}

impl Handle {
    pub(crate) fn failed(&self) -> Option<String> {
        self.shared.failed.lock().clone()
    }

    /// Removes the segments that no group needs any more.
    pub(crate) async fn trim(&self) -> Result<(), LogFault> {
        let (done, answer) = oneshot::channel();
        self.command(Command::Trim { done }).await?;
        self.answer(answer).await?
    }

    pub(crate) async fn command(&self, command: Command) -> Result<(), LogFault> {
        self.commands.send(command).await.map_err(|_| self.stopped())
    }

    pub(crate) async fn answer<T>(&self, answer: oneshot::Receiver<T>) -> Result<T, LogFault> {
        answer.await.map_err(|_| self.stopped())
    }

    /// The fault of a store that has stopped.
    pub(crate) fn stopped(&self) -> LogFault {
        LogFault::Storage(self.failed().unwrap_or_else(|| "the writer has ended".into()))
    }
}
