//! Messages between simulated nodes: delayed, lost, doubled, reordered, cut off, as the faults say.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use clutch_proto::Parts;
use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::{NodeId, Shared, executor::Sleep, executor::TaskOwner, streams};
use crate::{Answers, CallError, Endpoint, Handler, Lane, Listening, Network, PeerStream};

/// How long somebody waits for a stream to be taken.
const OPEN_PATIENCE: Duration = Duration::from_millis(500);
/// How often a message on a clogged way looks whether it may go on.
const CLOG_LOOK: Duration = Duration::from_millis(2);

/// What happens to messages. The default is a quick and faithful network.
#[derive(Clone, Debug)]
pub struct Faults {
    /// Lost messages, per mille.
    pub loss_permille: u32,
    /// Requests that arrive twice, per mille.
    pub duplicate_permille: u32,
    /// Shortest delay of a message in microseconds.
    pub delay_us_min: u64,
    /// Longest delay of a message in microseconds; delays are drawn evenly, so messages overtake each other.
    pub delay_us_max: u64,
}

impl Default for Faults {
    fn default() -> Faults {
        Faults { loss_permille: 0, duplicate_permille: 0, delay_us_min: 50, delay_us_max: 500 }
    }
}

/// How often the network did wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MessageFaults {
    /// Messages that vanished by chance.
    pub lost: u64,
    /// Requests that were delivered twice.
    pub duplicated: u64,
    /// Messages that met a partition.
    pub blocked: u64,
}

#[derive(Default)]
pub(super) struct Wires {
    pub(super) faults: Faults,
    pub(super) blocked: BTreeSet<(NodeId, NodeId)>,
    pub(super) clogged: BTreeSet<(NodeId, NodeId)>,
    pub(super) counts: MessageFaults,
    listeners: BTreeMap<Endpoint, (NodeId, u64, Arc<dyn Handler>)>,
    next_listener: u64,
}

impl Wires {
    pub(super) fn close_all(&mut self, node: NodeId) {
        self.listeners.retain(|_, (at, _, _)| *at != node);
    }

    pub(super) fn clear(&mut self) {
        self.listeners.clear();
    }
}

pub(super) struct SimNetwork {
    pub(super) shared: Arc<Shared>,
    pub(super) node: NodeId,
}

impl SimNetwork {
    /// How long one message travels; `None` when it is lost.
    fn travel(shared: &Shared, from: NodeId, to: NodeId) -> Option<Duration> {
        let mut wires = shared.network.lock();
        let faults = &wires.faults;
        let lost = shared.below(1000) < u64::from(faults.loss_permille);
        let spread = faults.delay_us_max.saturating_sub(faults.delay_us_min) + 1;
        let delay_us = faults.delay_us_min + shared.below(spread);
        let blocked = wires.blocked.contains(&(from, to));
        wires.counts.blocked += u64::from(blocked);
        wires.counts.lost += u64::from(lost && !blocked);
        (!blocked && !lost).then_some(Duration::from_micros(delay_us))
    }

    /// Waits while the way is clogged.
    pub(super) async fn unclogged(shared: &Arc<Shared>, from: NodeId, to: NodeId) {
        while shared.network.lock().clogged.contains(&(from, to)) {
            Sleep::new(shared.clone(), CLOG_LOOK).await;
        }
    }

    /// Carries a request to its handler, after a while longer than it takes anyway, and the answer back, as a task of
    /// the target's node.
    /// Whichever copy of a request arrives first has the answer, and the caller hears of no other: what a transport tells its
    /// caller is of what it has delivered itself.
    fn deliver(&self, to: &Endpoint, request: Bytes, answer: FirstAnswer, late: Duration) {
        let (shared, from, to) = (self.shared.clone(), self.node, to.clone());
        let listener =
            shared.network.lock().listeners.get(&to).map(|(node, _, handler)| (*node, handler.clone()));
        let Some((target, handler)) = listener else { return };
        let Some(there) = Self::travel(&shared, from, target) else { return };
        let task_shared = shared.clone();
        let task = async move {
            Sleep::new(task_shared.clone(), there + late).await;
            Self::unclogged(&task_shared, from, target).await;
            task_shared.record("deliver", request.len() as u64);
            let answer = answer.lock().take();
            let reply = handler.handle(request, Answers::unbounded()).await.answer.joined();
            if let Some(back) = Self::travel(&task_shared, target, from) {
                Sleep::new(task_shared.clone(), back).await;
                Self::unclogged(&task_shared, target, from).await;
                task_shared.record("answer", reply.len() as u64);
                if let Some(answer) = answer {
                    // The caller may have given up.
                    let _ = answer.send(reply);
                }
            }
        };
        shared.executor.lock().spawn(TaskOwner { node: target, name: "deliver" }, Box::pin(task));
    }
}

/// Where the answer goes, until a copy of the request has arrived.
type FirstAnswer = Arc<Mutex<Option<oneshot::Sender<Bytes>>>>;

struct SimListening {
    shared: Arc<Shared>,
    endpoint: Endpoint,
    id: u64,
}

impl Listening for SimListening {
    fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }
}

impl Drop for SimListening {
    fn drop(&mut self) {
        // A crash drops tasks outside all locks; a torn-down world has no listeners left.
        if let Some(mut wires) = self.shared.network.try_lock()
            && wires.listeners.get(&self.endpoint).is_some_and(|(_, id, _)| *id == self.id)
        {
            wires.listeners.remove(&self.endpoint);
        }
    }
}

#[async_trait]
impl Network for SimNetwork {
    async fn listen(&self, at: &Endpoint, handler: Arc<dyn Handler>) -> io::Result<Box<dyn Listening>> {
        let mut wires = self.shared.network.lock();
        if wires.listeners.contains_key(at) {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, format!("listen on {at}: in use")));
        }
        wires.next_listener += 1;
        let id = wires.next_listener;
        wires.listeners.insert(at.clone(), (self.node, id, handler));
        Ok(Box::new(SimListening { shared: self.shared.clone(), endpoint: at.clone(), id }))
    }

    async fn call(
        &self,
        to: &Endpoint,
        _lane: Lane,
        request: Parts,
        _answer_bytes: usize,
        timeout: Duration,
    ) -> Result<Bytes, CallError> {
        let request = request.joined();
        if !self.shared.network.lock().listeners.contains_key(to) {
            Sleep::new(self.shared.clone(), Duration::from_micros(200)).await;
            return Err(CallError::NotSent(to.clone(), "connection refused".into()));
        }
        let (answer, answered) = oneshot::channel();
        let answer = Arc::new(Mutex::new(Some(answer)));
        let duplicate_permille = self.shared.network.lock().faults.duplicate_permille;
        if self.shared.below(1000) < u64::from(duplicate_permille) {
            self.shared.network.lock().counts.duplicated += 1;
            // Some come much later than what they repeat: long after the sender has gone on, or given up.
            let late = match self.shared.below(4) {
                0 => Duration::from_micros(1 << (10 + self.shared.below(10))),
                _ => Duration::ZERO,
            };
            self.deliver(to, request.clone(), answer.clone(), late);
        }
        self.deliver(to, request, answer, Duration::ZERO);
        let limit = Sleep::new(self.shared.clone(), timeout);
        tokio::select! {
            biased;
            Ok(reply) = answered => Ok(reply),
            () = limit => Err(CallError::Unknown(to.clone(), format!("nothing within {timeout:?}"))),
        }
    }

    async fn open(&self, to: &Endpoint) -> io::Result<PeerStream> {
        let (shared, from) = (&self.shared, self.node);
        let listener =
            shared.network.lock().listeners.get(to).map(|(node, _, handler)| (*node, handler.clone()));
        let Some((target, handler)) = listener else {
            Sleep::new(shared.clone(), Duration::from_micros(200)).await;
            return Err(io::Error::new(io::ErrorKind::ConnectionRefused, format!("open {to}: refused")));
        };
        for (from, to) in [(from, target), (target, from)] {
            let Some(travels) = Self::travel(shared, from, to) else {
                Sleep::new(shared.clone(), OPEN_PATIENCE).await;
                return Err(io::Error::new(io::ErrorKind::TimedOut, format!("open {}: no answer", to.0)));
            };
            Sleep::new(shared.clone(), travels).await;
        }
        let (own, theirs) = streams::pair(shared, from, target);
        let accept = Box::pin(async move { handler.accept(theirs) });
        shared.executor.lock().spawn(TaskOwner { node: target, name: "accept" }, accept);
        Ok(own)
    }
}
