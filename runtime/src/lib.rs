//! The seams to the world: everything that waits, draws, sends or stores goes through here.
//!
//! One [`Clock`], one [`Random`], one [`Spawner`], one [`Network`] and one [`Disk`], bundled in a [`Runtime`].
//! [`production`] implements them on tokio and the operating system; [`simulated`] on one thread, in virtual time,
//! from one seed. Code above this crate cannot tell which it runs on, so the simulator runs what ships.
//!
//! Invariants: in the simulated runtime the same seed gives the same order of events; a call that fails says
//! whether it certainly never reached its target ([`CallError::NotSent`]).

pub mod ambient;
pub mod budget;
pub mod cluster_keys;
pub mod disk;
pub mod hlc;
pub mod network;
pub mod production;
pub mod simulated;

use std::{borrow::Cow, collections::BTreeMap, future::Future, pin::Pin, sync::Arc, time::Duration};

use clutch_proto::Time;

pub use budget::{Budget, Held};
pub use cluster_keys::ClusterKeys;
pub use disk::{Disk, File};
pub use hlc::HybridClock;
pub use network::{Answers, CallError, Endpoint, Handled, Handler, Lane, Listening, Network, PeerStream};

/// A boxed future that may move between threads.
pub type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send + 'static>>;

/// Wall time and waiting.
pub trait Clock: Send + Sync {
    /// The wall clock. May jump; never used to order anything by itself.
    fn now(&self) -> Time;
    /// Time since some fixed moment; never goes back.
    fn monotonic(&self) -> Duration;
    /// Time since some fixed moment that also counts while the machine sleeps; never goes back, and nobody sets it.
    fn steady(&self) -> Duration;
    /// Completes after `duration`.
    fn sleep(&self, duration: Duration) -> BoxFuture<()>;
    /// Completes after `duration`, or up to [`SHARED_MOMENTS`] later: at a moment at which all wake that wait like this, so that
    /// a node with many groups wakes once for all of them. For what is done again and again and need not be punctual.
    fn sleep_about(&self, duration: Duration) -> BoxFuture<()> {
        self.sleep(to_shared_moment(self.monotonic(), duration))
    }
}

/// How far the moments lie apart at which whoever need not be punctual wakes.
pub const SHARED_MOMENTS: Duration = Duration::from_millis(100);

/// How long it is until the first shared moment that lies `duration` after now, or later.
fn to_shared_moment(now: Duration, duration: Duration) -> Duration {
    let due = now.saturating_add(duration);
    let past = due.as_nanos() % SHARED_MOMENTS.as_nanos();
    match u64::try_from(past) {
        Ok(0) | Err(_) => duration,
        Ok(past) => duration.saturating_add(SHARED_MOMENTS - Duration::from_nanos(past)),
    }
}

/// The one source of randomness.
pub trait Random: Send + Sync {
    /// Fills `bytes`; unpredictable in production, seeded in the simulator.
    fn fill(&self, bytes: &mut [u8]);
    /// 64 random bits.
    fn u64(&self) -> u64 {
        let mut bytes = [0; 8];
        self.fill(&mut bytes);
        u64::from_le_bytes(bytes)
    }
    /// A number below `bound`; the bias of the modulo is below 2⁻³² for bounds below 2³².
    fn below(&self, bound: u64) -> u64 {
        self.u64() % bound.max(1)
    }
}

/// Starts tasks.
pub trait Spawner: Send + Sync {
    /// Runs a task beside the others. It ends with its node.
    fn spawn(&self, name: &'static str, task: BoxFuture<()>);
    /// Runs the one owner of something heavy: on a thread of its own in production, so that it may block.
    fn spawn_owner(&self, name: String, task: BoxFuture<()>);
    /// Runs blocking work off the reactor; the future completes when it is done.
    fn blocking(&self, work: Box<dyn FnOnce() + Send>) -> BoxFuture<()>;
}

/// The five seams together; cheap to clone.
#[derive(Clone)]
pub struct Runtime {
    /// Wall time and waiting.
    pub clock: Arc<dyn Clock>,
    /// Randomness.
    pub random: Arc<dyn Random>,
    /// Tasks.
    pub spawner: Arc<dyn Spawner>,
    /// Messages.
    pub network: Arc<dyn Network>,
    /// Files.
    pub disk: Arc<dyn Disk>,
    /// What a simulation wants to know was reached.
    pub notes: Notes,
}

/// Counts rare states that a simulation must reach sometimes; nobody listens in production.
#[derive(Clone, Default)]
pub struct Notes(Option<Arc<parking_lot::Mutex<NoteCounts>>>);

/// What was noted, and how often.
pub type NoteCounts = BTreeMap<Cow<'static, str>, u64>;

impl Notes {
    /// Notes that are counted.
    pub fn counting() -> Notes {
        Notes(Some(Arc::default()))
    }

    /// Takes note.
    pub fn add(&self, what: impl Into<Cow<'static, str>>) {
        if let Some(counts) = &self.0 {
            *counts.lock().entry(what.into()).or_default() += 1;
        }
    }

    /// What was noted, and how often.
    pub fn counts(&self) -> NoteCounts {
        self.0.as_ref().map(|counts| counts.lock().clone()).unwrap_or_default()
    }
}

impl Runtime {
    /// Takes note of a rare state; see [`Notes`].
    pub fn note(&self, what: impl Into<Cow<'static, str>>) {
        self.notes.add(what);
    }

    /// The same runtime with connections of its own, where there are connections.
    pub fn separate(&self) -> Runtime {
        match self.network.separate() {
            Some(network) => Runtime { network, ..self.clone() },
            None => self.clone(),
        }
    }

    /// Starts a task.
    pub fn spawn(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.spawner.spawn(name, Box::pin(task));
    }

    /// Runs blocking work off the reactor and returns its result; `None` if the work panicked or the node stopped.
    pub async fn blocking<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        self.spawner
            .blocking(Box::new(move || {
                // The receiver is gone when the caller gave up; the work is done all the same.
                let _ = sender.send(work());
            }))
            .await;
        receiver.await.ok()
    }

    /// `Some(output)` if the future completes within `limit`.
    pub async fn timeout<T>(&self, limit: Duration, future: impl Future<Output = T> + Send) -> Option<T> {
        tokio::select! {
            biased;
            output = future => Some(output),
            () = self.clock.sleep(limit) => None,
        }
    }
}
