//! The log contract: one trait, and consensus is whatever implements it.
//!
//! A log is a sequence of batches. A batch is one record: one position, all or nothing. Positions are assigned
//! at commit and increase by at least one; engines keep records of their own, so gaps are normal. An epoch is
//! one leader's reign; only the leader of the current epoch can append.
//!
//! Invariants every engine keeps ([`conformance`] checks them):
//! * [`Rejected`] means certainly no effect; [`Outcome::Unknown`] means the batch may appear later, or never.
//! * Every reader sees the same batches at the same positions, in order, each once.
//! * A reign's beginning ([`Event::Leader`]) comes after everything committed in earlier epochs; its end is told as soon as
//!   it is known, and always before another begins.
//! * [`Outcome::Refused`] and [`Outcome::Sealed`] mean certainly no effect, as [`Rejected`] does; they are only known later.
//! * What was committed is durable: it is there after a restart of every node.

pub mod chain;
pub mod conformance;
pub mod engine;
pub mod snapshot;
pub mod virtual_log;

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
pub use chain::{BadChain, Chain, INCARNATION_MAX, LogletId, LogletSpec};
pub use clutch_proto::log::{Batch, Epoch, LogId, NodeId, Position};
pub use engine::{Engine, Engines, Purpose, Usage};
pub use snapshot::{Manifest, NoSnapshots, SnapshotFile, Snapshots};
use tokio::sync::oneshot;
pub use virtual_log::VirtualLog;

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
    /// What comes next was trimmed: the state must be replaced by this snapshot, which was received whole. Batches follow from
    /// after it; what became of proposals before it is not told any more.
    Restore(Manifest),
    /// Who leads has changed. When a reign begins, everything of earlier reigns has been delivered. When this node's own ends,
    /// that is told with its epoch and `is_self: false` before any other begins.
    Leader {
        /// The reign.
        epoch: Epoch,
        /// The node that leads, as far as this one knows.
        leader: Option<NodeId>,
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
    #[error("epoch {} does not lead{}", .epoch.0, hinted(*.hint))]
    NotLeader {
        /// The epoch that was proposed in.
        epoch: Epoch,
        /// Who leads, as far as this node knows.
        hint: Option<NodeId>,
    },
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
    /// It was turned down after it had been taken: certainly no effect.
    Refused(Refused),
}

/// Why a batch was turned down after it had been taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// There was no room for it on the disk; the same batch may be taken when there is.
    NoRoom,
    /// The node had ceased to lead before it could write the batch.
    NotLeader {
        /// Who leads, as far as this node knows.
        hint: Option<NodeId>,
    },
}

/// Resolves when the fate of a batch is known.
pub struct Commit {
    decided: oneshot::Receiver<Outcome>,
    /// What is added to the position that the engine says.
    base: Position,
}

impl Commit {
    /// A commit and the sender that decides it. A dropped sender means unknown.
    pub fn pair() -> (oneshot::Sender<Outcome>, Commit) {
        let (sender, receiver) = oneshot::channel();
        (sender, Commit { decided: receiver, base: Position(0) })
    }

    /// The same where the engine counts from that position on.
    fn behind(self, base: Position) -> Commit {
        Commit { base: Position(self.base.0 + base.0), ..self }
    }
}

impl Future for Commit {
    type Output = Outcome;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Outcome> {
        let base = self.base.0;
        Pin::new(&mut self.decided).poll(context).map(|decided| match decided {
            Ok(Outcome::Committed(Position(index))) => Outcome::Committed(Position(base + index)),
            Ok(outcome @ (Outcome::Unknown | Outcome::Sealed | Outcome::Refused(_))) => outcome,
            Err(_) => Outcome::Unknown,
        })
    }
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
    #[error("not the leader{}", hinted(*.hint))]
    NotLeader {
        /// Who leads, as far as this node knows.
        hint: Option<NodeId>,
    },
    /// Too few members answered in time; nothing is known of what others have acknowledged.
    #[error("no quorum of the log answered within {} ms", .waited.as_millis())]
    NoQuorum {
        /// How long was waited.
        waited: Duration,
    },
}

/// ": node 3 does", where that is known.
fn hinted(hint: Option<NodeId>) -> String {
    hint.map_or_else(String::new, |node| format!(": node {node} does"))
}

/// What a log holds now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// The first position that can still be read.
    pub first: Position,
    /// The last committed position.
    pub last: Position,
}

/// Up to where a replica needs no record of its log any more, each for a reason of its own. In the order of their names each is
/// at most the next: what is trimmed is in a snapshot, and what is in a snapshot is in the replica's store, durably.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Floors {
    /// Up to here nobody wants the records: an operator's or a policy's word.
    pub retain: Position,
    /// A snapshot of the replica has everything up to here: whoever needs what is trimmed gets that.
    pub snapshot: Position,
    /// The replica's store has this durably: after a crash it asks for what follows.
    pub flushed: Position,
}

impl Floors {
    /// Up to where the engine may trim.
    pub fn trim(&self) -> Position {
        self.retain.min(self.snapshot).min(self.flushed)
    }

    /// Whether the order holds that all of a log's positions have: trimmed, snapshot, flushed, committed.
    ///
    /// # Errors
    /// Which two are the wrong way round.
    pub fn check(&self, committed: Position) -> Result<(), String> {
        let order = [("snapshot", self.snapshot), ("flushed", self.flushed), ("committed", committed)];
        match order.windows(2).find(|pair| pair[0].1 > pair[1].1) {
            Some(pair) => Err(format!("{} {} lies behind {} {}", pair[0].0, pair[0].1, pair[1].0, pair[1].1)),
            None => Ok(()),
        }
    }
}

/// A node that keeps a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Member {
    /// Its id.
    pub node: NodeId,
    /// Whether it votes; others are told everything and asked nothing.
    pub voter: bool,
}

/// How far a member has come, as the node sees it that was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Who.
    pub member: Member,
    /// The last position that it is known to have; `None` where only a leader would know.
    pub matched: Option<Position>,
    /// Whether the node has heard of it of late, as its leader; of itself it always has.
    pub is_heard: bool,
}

/// How a log stands, as one node sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// The newest reign that the node knows of.
    pub epoch: Epoch,
    /// Who leads in it, as far as the node knows.
    pub leader: Option<NodeId>,
    /// Whether that is the node itself.
    pub is_self: bool,
    /// What can be read.
    pub bounds: Bounds,
    /// Where the log was sealed.
    pub sealed: Option<Position>,
    /// Names the present members.
    pub config: ConfigId,
    /// The present members.
    pub members: Vec<Progress>,
    /// Changes of members that the log keeps, until it is trimmed behind them.
    pub changes_kept: usize,
    /// Bytes that wait to be written.
    pub queued_bytes: u64,
    /// Why the engine stopped.
    pub fault: Option<String>,
}

/// A replicated, append-only log, as one node sees it. No method has a body here: what wraps a log must pass on all of them.
#[async_trait]
pub trait Log: Send + Sync {
    /// Appends a batch if `epoch` still leads. Does not wait; batches of one proposer keep their order.
    fn propose(&self, epoch: Epoch, batch: Vec<Bytes>) -> Result<Commit, Rejected>;
    /// Everything after the position before `from`, and then what comes.
    fn events(&self, from: Position) -> Box<dyn Events>;
    /// The position that a read must have applied to see everything that was acknowledged before it began. Any member may be
    /// asked; one that has to ask others and hears nothing gives up after `patience`. A read that is content with less, some
    /// position or whatever is here, needs no barrier.
    async fn read_barrier(&self, patience: Duration) -> Result<Position, LogFault>;
    /// Ends the log for good and returns its last position. Idempotent.
    async fn seal(&self) -> Result<Position, LogFault>;
    /// Says up to where this node's replica needs nothing any more. Trimming is the engine's own act: it forgets what it will,
    /// nothing behind [`Floors::trim`], and has done so when this returns. A floor that is lower than before changes nothing.
    ///
    /// # Panics
    /// Where the floors are out of order ([`Floors::check`]): the replica would lose what it relies on.
    async fn set_floors(&self, floors: Floors) -> Result<(), LogFault>;
    /// Hands leadership to another node; engines with one node refuse.
    async fn transfer_leader(&self, to: NodeId) -> Result<(), LogFault>;
    /// Gives up a reign of this node, if there is one, and stands for no other before the log is opened again, whoever may
    /// lead: for a replica that can do nothing any more.
    fn resign(&self);
    /// Changes the members if the present configuration is `expect`; engines with one node refuse.
    async fn reconfigure(&self, expect: ConfigId, members: Vec<Member>) -> Result<ConfigId, LogFault>;
    /// How the log stands, without waiting.
    fn status(&self) -> Status;
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
