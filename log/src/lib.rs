//! The log contract: one trait, and consensus is whatever implements it.
//!
//! A log is a sequence of batches. A batch is one record: one position, all or nothing. Positions are assigned
//! at commit and increase by at least one; engines keep records of their own, so gaps are normal. An epoch is
//! one leader's reign; only the leader of the current epoch can append.
//!
//! Invariants every engine keeps ([`conformance`] checks them):
//! * [`Rejected`] means certainly no effect; [`Outcome::Unknown`] means the batch may appear later, or never.
//! * Every reader sees the same batches at the same positions, in order, each once.
//! * [`Event::Leader`] comes after everything committed in earlier epochs.
//! * What was committed is durable: it is there after a restart of every node.

pub mod conformance;

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use async_trait::async_trait;
use bytes::Bytes;
pub use clutch_proto::log::{Batch, Epoch, LogId, Position};
use tokio::sync::oneshot;

/// A snapshot by reference: state up to `position` lies at `location`, which the store can open.
#[derive(Clone, Debug, PartialEq)]
pub struct SnapshotRef {
    /// The last position that the snapshot contains.
    pub position: Position,
    /// A directory.
    pub location: String,
}

/// What a log tells its replica, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The next batch.
    Committed(Batch),
    /// Nothing for the state up to and including `to`.
    Gap {
        /// The last position of the gap.
        to: Position,
    },
    /// The state must be replaced by the snapshot; batches follow from after it.
    Restore(SnapshotRef),
    /// A reign began, and everything of earlier reigns has been delivered.
    Leader {
        /// The reign.
        epoch: Epoch,
        /// Whether this node leads.
        is_self: bool,
    },
    /// Nothing will follow after `tail`.
    Sealed {
        /// The last position.
        tail: Position,
    },
}

/// The batch was not taken: certainly no effect.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Rejected {
    /// Another epoch leads, or none.
    #[error("epoch {0:?} does not lead")]
    NotLeader(Epoch),
    /// The log was sealed.
    #[error("the log is sealed")]
    Sealed,
    /// Too much is waiting; try again when something has been committed.
    #[error("the log's queue is full")]
    Overloaded,
    /// Over the limits of a batch, or empty.
    #[error("a batch of {entries} entries and {bytes} bytes is empty or over the limit")]
    Size {
        /// Entries offered.
        entries: usize,
        /// Bytes offered.
        bytes: usize,
    },
    /// The engine stopped on a fault.
    #[error("the log has stopped: {0}")]
    Stopped(String),
}

/// How an append ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Durable at this position.
    Committed(Position),
    /// It may be in the log, now or later, or never.
    Unknown,
    /// The log was sealed before it: certainly no effect.
    Sealed,
    /// There was no room for it on the disk: certainly no effect, and the same batch may be taken when there is.
    NoRoom,
}

/// Resolves when the fate of a batch is known.
pub struct Commit(oneshot::Receiver<Outcome>);

impl Commit {
    /// A commit and the sender that decides it. A dropped sender means unknown.
    pub fn pair() -> (oneshot::Sender<Outcome>, Commit) {
        let (sender, receiver) = oneshot::channel();
        (sender, Commit(receiver))
    }
}

impl Future for Commit {
    type Output = Outcome;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Outcome> {
        Pin::new(&mut self.0).poll(context).map(|decided| decided.unwrap_or(Outcome::Unknown))
    }
}

/// How fresh a read must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadLevel {
    /// Whatever this replica has.
    Local,
    /// At least this position.
    AtLeast(Position),
    /// Everything that was acknowledged before the read began.
    Linearizable,
    /// The same as long as clocks drift less than the engine's lease allows; cheaper where a quorum is asked.
    Lease,
}

/// Names a configuration of members; grows with each change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ConfigId(pub u64);

/// The engine cannot go on.
#[derive(Clone, Debug, thiserror::Error)]
pub enum LogFault {
    /// A record that was synced once cannot be read any more.
    #[error("log record corrupt at position {position} (file {file}, offset {offset}): {what}")]
    Corrupt {
        /// The record's position, or the one after the last good record when its header is damaged.
        position: Position,
        /// The segment file.
        file: String,
        /// Byte offset of the record.
        offset: u64,
        /// What does not fit.
        what: String,
    },
    /// Reading or writing failed.
    #[error("log storage: {0}")]
    Storage(String),
    /// There is no room on the disk; the engine goes on when there is.
    #[error("no room on the disk of the log: {0}")]
    NoRoom(String),
    /// The position asked for was trimmed.
    #[error("position {asked} was trimmed; the log begins at {first}")]
    Trimmed {
        /// What was asked for.
        asked: Position,
        /// What there is.
        first: Position,
    },
    /// The operation is not for this engine.
    #[error("{0}")]
    Unsupported(String),
    /// This node does not lead, so it cannot answer.
    #[error("not the leader")]
    NotLeader,
}

/// What a log holds now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// The first position that can still be read.
    pub first: Position,
    /// The last committed position.
    pub last: Position,
}

/// A replicated, append-only log, as one node sees it.
#[async_trait]
pub trait Log: Send + Sync {
    /// Appends a batch if `epoch` still leads. Does not wait; batches of one proposer keep their order.
    fn propose(&self, epoch: Epoch, batch: Vec<Bytes>) -> Result<Commit, Rejected>;
    /// Everything after the position before `from`, and then what comes.
    fn events(&self, from: Position) -> Box<dyn Events>;
    /// The position that a read of this level must have applied.
    async fn read_barrier(&self, level: ReadLevel) -> Result<Position, LogFault>;
    /// Ends the log for good and returns its last position. Idempotent.
    async fn seal(&self) -> Result<Position, LogFault>;
    /// Allows the engine to forget everything up to `upto`; floors of the engine are kept.
    async fn trim(&self, upto: Position) -> Result<(), LogFault>;
    /// The replica has a snapshot that others may be restored from.
    async fn snapshot_ready(&self, snapshot: SnapshotRef);
    /// Hands leadership to another node; engines with one node refuse.
    async fn transfer_leader(&self, to: u64) -> Result<(), LogFault>;
    /// Changes the members if the present configuration is `expect`; engines with one node refuse.
    async fn reconfigure(&self, _expect: ConfigId, _members: Vec<u64>) -> Result<ConfigId, LogFault> {
        Err(LogFault::Unsupported("this engine's members are fixed".into()))
    }
    /// What the log holds now.
    fn bounds(&self) -> Bounds;
}

/// A reader's place in a log.
#[async_trait]
pub trait Events: Send {
    /// The next event; waits when there is none. Dropping the future loses nothing.
    async fn next(&mut self) -> Result<Event, LogFault>;
}

/// Checks a batch against the limits.
pub fn check_batch(batch: &[Bytes]) -> Result<usize, Rejected> {
    use clutch_proto::limits::{BATCH_BYTES_MAX, BATCH_ENTRIES_MAX};
    let bytes = batch.iter().map(Bytes::len).sum();
    if batch.is_empty() || batch.len() > BATCH_ENTRIES_MAX || bytes > BATCH_BYTES_MAX {
        return Err(Rejected::Size { entries: batch.len(), bytes });
    }
    Ok(bytes)
}
