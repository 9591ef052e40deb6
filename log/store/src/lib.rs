//! A store for all log engines of a node: what their groups append lies in one sequence of segment files, with one writer and
//! one sync for all.
//!
//! A group is what one engine keeps of one log in one of its incarnations. Its records have contiguous positions; an engine
//! may take the newest away again, begin behind a base, and keep a vote and its members ([`Write`]).
//!
//! Invariants:
//! * What was written is answered only after the sync that covers it, and in the order in which it was asked for.
//! * A failed sync is final: everything waiting becomes unknown and the store stops.
//! * What lies before the durable mark was synced; damage there is an error with a position, never dropped.
//!   What lies after it was never acknowledged; damage there is a torn tail and is cut off.
//! * Positions of a group have no holes; one that is missing is damage, found when the store opens wherever a segment was
//!   replaced or cut, and at the latest when it is read.
//! * A reader of one group reads no record of another: each segment has an index of each group.

mod continuity;
pub mod cut;
mod format;
mod group;
mod reader;
mod recovery;
mod span;
mod unfinished;
mod writer;

use std::{
    collections::BTreeMap,
    fmt,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize},
    },
};

use bytes::Bytes;
use clutch_log::{Bounds, Epoch, LogFault, LogId, NodeId, Position};
use clutch_runtime::{Disk, Runtime};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

use group::{Group, GroupState};
use span::Span;

pub use continuity::Continuity;
pub use format::{RECORD_HEADER_BYTES, Record, RecordKind, SEGMENT_HEADER_BYTES};
pub use group::{Cursor, Look, StoredGroup, TailRecord, View, Write};
pub use reader::SegmentReader;
pub use recovery::{Summary, open_read_only};
pub use span::Restart;

/// Incarnations are counted up to here; records have 24 bits for them.
pub const INCARNATION_MAX: u32 = 1 << 24;

/// What one engine keeps of a log: the log, and how often it was begun anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupId {
    /// The log.
    pub log: LogId,
    /// 1 for the first life of the log, at most [`INCARNATION_MAX`].
    pub incarnation: u32,
}

impl From<LogId> for GroupId {
    fn from(log: LogId) -> GroupId {
        GroupId { log, incarnation: 1 }
    }
}

impl fmt::Display for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.incarnation {
            1 => write!(f, "{}", self.log),
            incarnation => write!(f, "{} (incarnation {incarnation})", self.log),
        }
    }
}

/// What an engine has promised to its group, in its own words; the newest counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vote {
    /// The reign that it is about.
    pub epoch: Epoch,
    /// The engine's own.
    pub content: Bytes,
}

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

/// All groups of a node; cheap to clone.
///
/// The writer ends when the store and every group of it are dropped.
#[derive(Clone)]
pub struct Store {
    shared: Arc<Shared>,
    commands: mpsc::Sender<group::Command>,
}

/// What the writer and the handles share; the writer has nothing else, so that it ends with the last handle.
struct Shared {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    options: Options,
    queued_bytes: AtomicUsize,
    groups: Mutex<BTreeMap<GroupId, Arc<Group>>>,
    /// Groups that are not opened, and why.
    quarantined: Mutex<BTreeMap<GroupId, LogFault>>,
    /// Segments on disk, oldest first, with what each holds.
    segments: Mutex<Vec<Segment>>,
    /// How often records of any group were taken away again.
    cuts: AtomicU64,
    failed: Mutex<Option<String>>,
}

/// A segment file and what it has of each group.
#[derive(Clone, Debug, Default)]
struct Segment {
    number: u64,
    spans: BTreeMap<GroupId, Span>,
    /// Bytes of its file.
    bytes: u64,
}

impl Store {
    /// Opens the store on a directory and recovers what is there. Blocks on the disk.
    ///
    /// # Errors
    /// [`LogFault::Corrupt`] when a synced record is damaged in a segment that recovery reads, or when positions of a group
    /// are missing, unless that group alone is not opened; [`LogFault::Storage`] when a file is missing or cannot be read.
    pub fn open(runtime: &Runtime, dir: PathBuf, options: Options) -> Result<Store, LogFault> {
        let recovered = recovery::recover(&*runtime.disk, &dir, options.cluster, options.may_quarantine)?;
        recovered.check();
        let (commands, receiver) = mpsc::channel(4096);
        let groups = recovered.groups.into_iter().map(|(id, state)| (id, Arc::new(Group::new(id, state))));
        let shared = Arc::new(Shared {
            disk: runtime.disk.clone(),
            dir,
            options,
            queued_bytes: AtomicUsize::new(0),
            groups: Mutex::new(groups.collect()),
            quarantined: Mutex::new(recovered.quarantined),
            segments: Mutex::new(recovered.segments),
            cuts: AtomicU64::new(0),
            failed: Mutex::new(None),
        });
        let writer = writer::Writer::new(&shared, recovered.current, recovered.mark);
        runtime.spawner.spawn_owner("log-writer".into(), Box::pin(writer.run(receiver)));
        Ok(Store { shared, commands })
    }

    /// How the store behaves.
    pub fn options(&self) -> &Options {
        &self.shared.options
    }

    /// All groups, but for those that were removed.
    pub fn groups(&self) -> Vec<GroupId> {
        let groups = self.shared.groups.lock();
        groups.iter().filter(|(_, group)| !group.state.lock().is_removed).map(|(id, _)| *id).collect()
    }

    /// Groups that are not opened because a record of theirs is damaged: they can only be removed.
    pub fn quarantined(&self) -> BTreeMap<GroupId, LogFault> {
        self.shared.quarantined.lock().clone()
    }

    /// A group; it is made if there is none of that id.
    ///
    /// # Errors
    /// Why it is not opened: a record of it is damaged, or it was removed.
    pub fn group(&self, id: impl Into<GroupId>) -> Result<StoredGroup, LogFault> {
        let id = id.into();
        if let Some(fault) = self.shared.quarantined.lock().get(&id) {
            return Err(fault.clone());
        }
        let made = || Arc::new(Group::new(id, GroupState { next: Position(1), ..GroupState::default() }));
        let group = self.shared.groups.lock().entry(id).or_insert_with(made).clone();
        if group.state.lock().is_removed {
            return Err(LogFault::Unsupported(format!(
                "{id} was removed; a log begins anew as another incarnation"
            )));
        }
        Ok(StoredGroup { store: self.clone(), group })
    }

    /// Removes a group for good, quarantined or not; durable when it returns.
    ///
    /// # Errors
    /// [`LogFault::Storage`] or [`LogFault::NoRoom`] when that cannot be written.
    pub async fn remove(&self, id: GroupId) -> Result<(), LogFault> {
        let Some(group) = self.shared.groups.lock().get(&id).cloned() else { return Ok(()) };
        let group = StoredGroup { store: self.clone(), group };
        group.write(vec![Write::Remove]).await?;
        self.shared.quarantined.lock().remove(&id);
        self.trim().await
    }

    /// What a group holds, without opening it; `None` when there is none of that id.
    pub fn bounds(&self, id: impl Into<GroupId>) -> Option<Bounds> {
        let id = id.into();
        let group = self.shared.groups.lock().get(&id).cloned()?;
        let last = *group.last.borrow();
        Some(Bounds { first: self.shared.first_position(id), last })
    }

    /// The record at a position, without opening its group; `None` when there is none. Blocks on the disk.
    ///
    /// # Errors
    /// [`LogFault::Corrupt`] where it is damaged.
    pub fn record(&self, id: impl Into<GroupId>, position: Position) -> Result<Option<Record>, LogFault> {
        reader::GroupReader::new(self.shared.clone(), id.into()).at(position)
    }

    /// Bytes of all segments.
    pub fn bytes(&self) -> u64 {
        self.shared.segments.lock().iter().map(|segment| segment.bytes).sum()
    }

    /// Why the store stopped, if it has.
    pub fn failed(&self) -> Option<String> {
        self.shared.failed.lock().clone()
    }

    /// Removes the segments that no group needs any more.
    async fn trim(&self) -> Result<(), LogFault> {
        let (done, answer) = oneshot::channel();
        self.command(group::Command::Trim { done }).await?;
        self.answer(answer).await?
    }

    async fn command(&self, command: group::Command) -> Result<(), LogFault> {
        self.commands.send(command).await.map_err(|_| self.stopped())
    }

    async fn answer<T>(&self, answer: oneshot::Receiver<T>) -> Result<T, LogFault> {
        answer.await.map_err(|_| self.stopped())
    }

    /// The fault of a store that has stopped.
    pub fn stopped(&self) -> LogFault {
        LogFault::Storage(self.failed().unwrap_or_else(|| "the writer has ended".into()))
    }
}

impl Shared {
    /// The first position that a segment still has; the one after the last when none has any.
    fn first_position(&self, id: GroupId) -> Position {
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

/// For tests of what lies on disk.
#[doc(hidden)]
pub mod internals {
    use crate::{LogFault, recovery};
    pub use crate::{
        format::*,
        recovery::{MARK_FILE, index_path, make_durable, read_mark},
        span::Span,
    };

    /// Recovers a directory as a store does, and says nothing of it but what is wrong.
    pub fn recover(
        disk: &dyn clutch_runtime::Disk,
        dir: &std::path::Path,
        cluster: u64,
    ) -> Result<Found, LogFault> {
        recovery::recover(disk, dir, cluster, false).map(Found)
    }

    /// What was recovered.
    pub struct Found(recovery::Recovered);

    impl Found {
        /// The position that a group goes on at.
        pub fn next(&self, id: impl Into<crate::GroupId>) -> Option<clutch_log::Position> {
            self.0.groups.get(&id.into()).map(|state| state.next)
        }

        /// The newest reign of a group.
        pub fn epoch(&self, id: impl Into<crate::GroupId>) -> Option<clutch_log::Epoch> {
            self.0.groups.get(&id.into()).map(|state| state.epoch)
        }

        /// The mark.
        pub fn mark(&self) -> crate::format::Mark {
            self.0.mark
        }

        /// Where it would be gone on.
        pub fn current(&self) -> Option<(u64, u64)> {
            self.0.current
        }

        /// The numbers of the segments.
        pub fn segments(&self) -> Vec<u64> {
            self.0.segments.iter().map(|segment| segment.number).collect()
        }
    }
}

#[cfg(test)]
mod tests;
