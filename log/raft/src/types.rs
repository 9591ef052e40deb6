//! What openraft is told of our types; none of them leaves the crate.

use std::fmt;

use bytes::Bytes;
use clutch_log::Position;
use openraft::{
    OptionalSend, RaftTypeConfig,
    impls::leader_id_std,
    raft::responder::Responder,
    type_config::alias::{
        EntryOf, EntryPayloadOf, LogIdOf, SnapshotMetaOf, SnapshotOf, StoredMembershipOf, VoteOf,
    },
    vote::RaftLeaderId,
};

use crate::{delivered::Delivered, seam::SeamRuntime};

/// What a record holds that is not openraft's own.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Command {
    /// Entries of the log.
    Batch(Vec<Bytes>),
    /// The log ends here.
    Seal,
}

impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Command::Batch(entries) => write!(f, "batch of {}", entries.len()),
            Command::Seal => f.write_str("seal"),
        }
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// What became of a record that was committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// It is delivered.
    Delivered,
    /// It lies behind a seal, and nobody is given it.
    BehindSeal(Position),
}

/// Who is told what became of a proposal.
pub(crate) struct Teller<T>(pub Box<dyn FnOnce(T) + Send>);

impl<T: OptionalSend + 'static> Responder<TypeConfig, T> for Teller<T> {
    fn on_complete(self, result: T) {
        (self.0)(result);
    }
}

/// What openraft is told of our types.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct TypeConfig;

type Leader = leader_id_std::LeaderId<u64, u64>;

impl RaftTypeConfig for TypeConfig {
    type D = Command;
    type R = Taken;
    type NodeId = u64;
    type Node = openraft::EmptyNode;
    type Term = u64;
    type LeaderId = Leader;
    type Vote = openraft::impls::Vote<Leader>;
    type Payload = openraft::EntryPayload<Command, u64, openraft::EmptyNode>;
    type Entry = openraft::Entry<<Leader as RaftLeaderId>::Committed, Self::Payload>;
    type Responder<T>
        = Teller<T>
    where
        T: OptionalSend + 'static;
    type Batch<T>
        = openraft::impls::InlineBatch<T>
    where
        T: OptionalSend + 'static;
    type AsyncRuntime = SeamRuntime;
    type ErrorSource = openraft::impls::BoxedErrorSource;
}

pub(crate) type Raft = openraft::Raft<TypeConfig, Delivered>;
pub(crate) type LogId = LogIdOf<TypeConfig>;
pub(crate) type Entry = EntryOf<TypeConfig>;
pub(crate) type Payload = EntryPayloadOf<TypeConfig>;
pub(crate) type Vote = VoteOf<TypeConfig>;
pub(crate) type Members = openraft::Membership<u64, openraft::EmptyNode>;
pub(crate) type StoredMembers = StoredMembershipOf<TypeConfig>;
pub(crate) type SnapshotMeta = SnapshotMetaOf<TypeConfig>;
pub(crate) type RaftSnapshot = SnapshotOf<TypeConfig, Option<clutch_log::Manifest>>;

/// The position of a record: openraft counts from 0, the log from 1.
pub(crate) fn position_of(index: u64) -> Position {
    Position(index + 1)
}

/// openraft's name of a position; `None` of the one before all.
pub(crate) fn index_of(position: Position) -> Option<u64> {
    position.0.checked_sub(1)
}
