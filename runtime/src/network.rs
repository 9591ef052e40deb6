//! Requests between named endpoints.

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use clutch_proto::Parts;
use tokio::sync::mpsc;

use crate::{BoxFuture, Budget, Held};

/// Where a node listens: `HOST:PORT`, or any name in the simulator.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Endpoint(pub Arc<str>);

impl From<&str> for Endpoint {
    fn from(address: &str) -> Endpoint {
        Endpoint(address.into())
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Which connection a call takes: large transfers must not delay small requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Lane {
    /// Requests to registry, CDC and shards.
    Metadata,
    /// Block data.
    Bulk,
}

/// Why a call has no answer.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CallError {
    /// The request never left: certainly no effect.
    #[error("cannot reach {0}: {1}")]
    NotSent(Endpoint, String),
    /// The request may have been carried out.
    #[error("no answer from {0}: {1}")]
    Unknown(Endpoint, String),
}

impl CallError {
    /// Whether the request certainly had no effect.
    pub fn certainly_no_effect(&self) -> bool {
        matches!(self, CallError::NotSent(..))
    }
}

/// An answer, and what is held for it until it is sent.
#[derive(Debug, Default)]
pub struct Handled {
    /// The encoded answer.
    pub answer: Parts,
    /// Its part of the budget for answers.
    pub held: Held,
}

/// Memory for answers.
#[derive(Clone)]
pub struct Answers {
    /// For what replicas answer.
    pub pages: Budget,
    /// For blocks.
    pub blocks: Budget,
}

impl Answers {
    /// No bound.
    pub fn unbounded() -> Answers {
        Answers { pages: Budget::unbounded(), blocks: Budget::unbounded() }
    }
}

/// One end of a stream between two nodes: frames arrive in the order in which they were sent, each at most once, until it
/// breaks; then none do any more, in either direction, and which of the last ones have arrived is not known. Both channels are
/// bounded. Dropping an end breaks the stream.
pub struct PeerStream {
    /// Frames for the other end; closed when the stream has broken.
    pub sender: mpsc::Sender<Bytes>,
    /// Frames of the other end; ends when the stream has broken.
    pub receiver: mpsc::Receiver<Bytes>,
}

/// Answers requests. Takes and returns an encoded envelope; every failure is an answer.
pub trait Handler: Send + Sync {
    /// Handles one request; many run at a time. Before a large answer takes memory, that is asked for in `answers`.
    fn handle(&self, request: Bytes, answers: Answers) -> BoxFuture<Handled>;

    /// Takes a stream that another node has opened. Who takes none drops it, which breaks it.
    fn accept(&self, stream: PeerStream) {
        drop(stream);
    }

    /// Whether requests are served: what a health check is told.
    fn is_serving(&self) -> bool {
        true
    }
}

/// Keeps an endpoint open; dropping it stops accepting and ends its sessions.
pub trait Listening: Send + Sync {
    /// The address in fact bound, with the port that the system chose for port 0.
    fn endpoint(&self) -> &Endpoint;
}

/// Sends requests and serves them.
#[async_trait]
pub trait Network: Send + Sync {
    /// Serves `handler` at an endpoint. Fails when the address is taken or not an address.
    async fn listen(&self, at: &Endpoint, handler: Arc<dyn Handler>) -> std::io::Result<Box<dyn Listening>>;
    /// Sends one request and waits for its answer, as long as `timeout` without getting on. The time in which this
    /// request, its answer, or what was asked for before on the same way, is moving does not count; `answer_bytes` is
    /// about how long the answer will be.
    async fn call(
        &self,
        to: &Endpoint,
        lane: Lane,
        request: Parts,
        answer_bytes: usize,
        timeout: Duration,
    ) -> Result<Bytes, CallError>;
    /// Opens a stream to another node. That it was taken there is not known before the first frame comes back.
    ///
    /// # Errors
    /// When the node cannot be reached.
    async fn open(&self, to: &Endpoint) -> std::io::Result<PeerStream>;
    /// A network with connections of its own; `None` where calls share nothing anyway.
    fn separate(&self) -> Option<Arc<dyn Network>> {
        None
    }
}
