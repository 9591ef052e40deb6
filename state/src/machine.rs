//! What shard, CDC and registry must be: a producer and an applier over rows.

use bytes::Bytes;
use clutch_proto::{
    Refusal, Time, level,
    log::Position,
    types::{ClientTag, Code},
};
use prost::Message;

use crate::{
    overlay::Tx,
    store::{StoreError, View},
};

/// Why producing or applying stopped.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Stop {
    /// The request is refused. Its writes are undone; the position advances.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The storage failed. The replica stops.
    #[error(transparent)]
    Fault(#[from] StoreError),
    /// A committed entry holds something that this build does not know. The replica stops: to refuse it here and apply it on
    /// another build would give two states.
    #[error("{0}")]
    Unknown(String),
}

impl Stop {
    /// Part of an entry that this build does not know, or without which it means nothing.
    pub fn unknown(what: impl Into<String>) -> Stop {
        Stop::Unknown(what.into())
    }

    /// Shorthand for a refusal with its reason.
    pub fn refuse(code: Code, detail: impl Into<String>) -> Stop {
        Stop::Refused(Refusal::new(code, detail))
    }
}

/// Where something does not hold that must: the rows are broken, and the replica stops before harm is done. For pure code, whose
/// apply is total: it says so in place of a panic.
#[macro_export]
macro_rules! broken_unless {
    ($holds:expr, $($words:tt)+) => {
        if !$holds {
            return Err($crate::StoreError::Broken(format!($($words)+)).into());
        }
    };
}

/// What a producer may use to decide: the time and randomness that end up in the entry.
pub struct ProduceContext<'a> {
    /// The stamp that the entry will carry.
    pub now: Time,
    /// 64 random bits for each call.
    pub random: &'a mut dyn FnMut() -> u64,
}

/// What applying an entry gave.
#[derive(Clone, Debug, PartialEq)]
pub enum Applied<R> {
    /// The answer for whoever proposed it.
    Reply(R),
    /// The answer comes with a later entry, through [`Effects::resolve`].
    Pending,
}

/// What an entry causes beside rows and its reply. Data; the leader's shell acts on it.
pub struct Effects<M: Machine> {
    /// Actions for the leader's shell.
    pub actions: Vec<M::Effect>,
    /// Answers to requests that were pending.
    pub resolved: Vec<(ClientTag, Result<M::Reply, Refusal>)>,
}

impl<M: Machine> Default for Effects<M> {
    fn default() -> Effects<M> {
        Effects { actions: Vec::new(), resolved: Vec::new() }
    }
}

impl<M: Machine> Effects<M> {
    /// Answers a request whose entry was [`Applied::Pending`].
    pub fn resolve(&mut self, tag: ClientTag, result: Result<M::Reply, Refusal>) {
        self.resolved.push((tag, result));
    }
}

/// A replicated machine.
pub trait Machine: Sized + Send + Sync + 'static {
    /// A word for messages and thread names.
    const NAME: &'static str;
    /// What clients ask.
    type Request: Message + Default + Clone;
    /// What they get.
    type Reply: Message + Default + Clone + PartialEq;
    /// What is logged.
    type Entry: Message + Default;
    /// What the leader's shell is asked to do.
    type Effect: Send + 'static;
    /// What the leader's shell knows and the log does not: keys, addresses.
    type Facts: Send + Sync + 'static;

    /// Checks that an opened state is of this cluster and, for a shard, of this number; an empty one is anybody's.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] when it is somebody else's.
    fn check_home(view: &dyn View, cluster: u64, number: u32) -> Result<(), StoreError>;

    /// The feature level that the request belongs to.
    fn level(_request: &Self::Request) -> u32 {
        level::FIRST
    }

    /// Bytes of users' data in the rows.
    ///
    /// # Errors
    /// When the store cannot be read, or its sum of them.
    fn inline_bytes(_view: &dyn View) -> Result<u64, StoreError> {
        Ok(0)
    }

    /// Whether the request only reads.
    fn is_read(request: &Self::Request) -> bool;

    /// Whether the request gives space back: it may use what is kept for that when there is hardly any left.
    fn gives_space_back(request: &Self::Request) -> bool;

    /// Answers a read.
    fn read(view: &dyn View, request: &Self::Request, facts: &Self::Facts) -> Result<Self::Reply, Stop>;

    /// Turns a request into an entry. May see slightly stale rows; decides everything that is not deterministic.
    fn produce(
        view: &dyn View,
        request: Self::Request,
        tag: Option<ClientTag>,
        context: &mut ProduceContext<'_>,
        facts: &Self::Facts,
    ) -> Result<Self::Entry, Stop>;

    /// The client's tag in an entry.
    fn tag(entry: &Self::Entry) -> Option<&ClientTag>;

    /// Executes an entry. Total: every entry that decodes is applied or refused.
    fn apply(
        tx: &mut Tx<'_>,
        position: Position,
        time: Time,
        entry: Self::Entry,
        effects: &mut Effects<Self>,
    ) -> Result<Applied<Self::Reply>, Stop>;

    /// Adds what only the leader's shell can: signatures and addresses. Few replies need the time for that.
    fn finish(_reply: &mut Self::Reply, _now: &dyn Fn() -> Time, _facts: &Self::Facts) {}

    /// The actions that a new leader must start again.
    fn recover(_view: &dyn View) -> Result<Vec<Self::Effect>, StoreError> {
        Ok(Vec::new())
    }
}

/// Decodes a request.
pub fn decode<M: Message + Default>(what: &str, bytes: Bytes) -> Result<M, Refusal> {
    M::decode(bytes).map_err(|e| Refusal::malformed(format!("decode {what}: {e}")))
}
