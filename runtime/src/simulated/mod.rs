//! The simulated runtime: every node of a cluster on one thread, in virtual time, from one seed.
//!
//! [`World`] owns the executor, the virtual clock and the faults; [`World::node`] gives the [`Runtime`] of one
//! node. Ready tasks run in an order drawn from the seed. Every step is folded into a trace hash: two runs of
//! one seed that differ anywhere differ there.
//!
//! Invariants: nothing in here reads the real clock, the real random source or the order of a hash map; a
//! crashed node's tasks never run again, and its unsynced writes are lost or torn.

mod disk;
mod executor;
mod job;
mod network;
pub(crate) mod standing;
mod streams;

use std::{borrow::Cow, collections::BTreeMap, future::Future, sync::Arc, time::Duration};

use clutch_proto::Time;
use parking_lot::Mutex;
use rand::{RngCore as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use crate::{BoxFuture, Clock, NoteCounts, Notes, Random, Runtime, Spawner};

pub use disk::{DiskFaults, SimDisk, Unmounted};
use executor::{Executor, TaskOwner};
use network::SimNetwork;
pub use network::{Faults, MessageFaults};
use standing::Standing;

/// A node of the simulated cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub u32);

/// A simulated cluster of nodes.
pub struct World {
    shared: Arc<Shared>,
}

/// What all seams of all nodes share.
struct Shared {
    executor: Mutex<Executor>,
    random: Mutex<ChaCha8Rng>,
    trace: Mutex<Trace>,
    network: Mutex<network::Wires>,
    disks: Mutex<BTreeMap<NodeId, Arc<SimDisk>>>,
    clocks: Mutex<Clocks>,
    notes: Notes,
    seed: u64,
}

/// How far the wall clocks are off the virtual time.
#[derive(Default)]
struct Clocks {
    skew_ms: BTreeMap<NodeId, i64>,
    /// Milliseconds by which somebody set a clock.
    step_ms: BTreeMap<NodeId, i64>,
    /// Parts per million, and since when in virtual nanoseconds.
    drift: BTreeMap<NodeId, (i64, u64)>,
    /// Added to all wall clocks at once.
    suspended_ms: u64,
    /// Virtual nanoseconds in which a node was suspended by itself: its monotonic clock has stood still.
    stood_ns: BTreeMap<NodeId, u64>,
    /// Since when a node is suspended by itself.
    suspended: BTreeMap<NodeId, u64>,
}

#[derive(Default)]
struct Trace {
    hash: u64,
    events: u64,
}

impl Shared {
    fn record(&self, what: &str, number: u64) {
        let now = self.executor.lock().now_ns();
        let mut trace = self.trace.lock();
        let mut bytes = [0u8; 24];
        bytes[..8].copy_from_slice(&trace.hash.to_le_bytes());
        bytes[8..16].copy_from_slice(&now.to_le_bytes());
        bytes[16..].copy_from_slice(&number.to_le_bytes());
        trace.hash =
            xxhash_rust::xxh3::xxh3_64_with_seed(&bytes, xxhash_rust::xxh3::xxh3_64(what.as_bytes()));
        trace.events += 1;
    }

    fn below(&self, bound: u64) -> u64 {
        self.random.lock().next_u64() % bound.max(1)
    }

    /// How much faster a node's monotonic clock runs than the virtual time, in parts per million: quartz is no better.
    fn monotonic_ppm(&self, node: NodeId) -> i64 {
        let mixed =
            (self.seed ^ 0x6d6f_6e6f).wrapping_add(u64::from(node.0)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        // The driver of the world is node 0.
        if node.0 == 0 { 0 } else { (mixed >> 32) as i64 % (2 * DRIFT_PPM_MAX + 1) - DRIFT_PPM_MAX }
    }
}

/// The virtual start: 2026-01-01T00:00:00Z.
pub const START_NS: u64 = 1_767_225_600_000_000_000;

impl World {
    /// A world without nodes or faults.
    pub fn new(seed: u64) -> World {
        World {
            shared: Arc::new(Shared {
                seed,
                executor: Mutex::new(Executor::new()),
                random: Mutex::new(ChaCha8Rng::seed_from_u64(seed)),
                trace: Mutex::default(),
                network: Mutex::default(),
                disks: Mutex::default(),
                clocks: Mutex::default(),
                notes: Notes::counting(),
            }),
        }
    }

    /// The runtime of a node. Asking again gives the same disk: that is how a node restarts.
    pub fn node(&self, node: NodeId) -> Runtime {
        let shared = self.shared.clone();
        let disk = self.disk(node);
        Runtime {
            clock: Arc::new(SimClock { shared: shared.clone(), node, ppm: self.shared.monotonic_ppm(node) }),
            random: Arc::new(SimRandom { shared: shared.clone() }),
            spawner: Arc::new(SimSpawner { shared: shared.clone(), node }),
            notes: shared.notes.clone(),
            network: Arc::new(SimNetwork { shared, node }),
            disk,
        }
    }

    /// A node's disk, for tests that damage it.
    pub fn disk(&self, node: NodeId) -> Arc<SimDisk> {
        let seed = self.shared.seed ^ u64::from(node.0).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let weak = Arc::downgrade(&self.shared);
        let pass = move |ns| {
            if let Some(shared) = weak.upgrade() {
                shared.record("a disk takes long", ns);
                if job::pass(ns) {
                    shared.notes.add("world: time passes in the middle of blocking work");
                } else {
                    shared.executor.lock().pass(ns);
                }
            }
        };
        let weak = Arc::downgrade(&self.shared);
        let now = move || weak.upgrade().map_or(0, |shared| shared.executor.lock().now_ns());
        let new =
            || Arc::new(SimDisk::in_time(seed, disk::Time { now: Arc::new(now), pass: Arc::new(pass) }));
        self.shared.disks.lock().entry(node).or_insert_with(new).clone()
    }

    /// Stops a node's process at once: its tasks are dropped, its endpoints closed. The machine goes on: what was written is
    /// still there for the next process, synced or not.
    pub fn kill(&self, node: NodeId) {
        self.shared.record("kill", u64::from(node.0));
        self.stop(node);
    }

    fn stop(&self, node: NodeId) {
        self.end_suspension(node);
        self.shared.executor.lock().resume(node);
        self.drop_all(node, |executor| executor.take_tasks(node));
        self.shared.network.lock().close_all(node);
    }

    /// Drops tasks, and those that they leave behind.
    fn drop_all(&self, node: NodeId, take: impl Fn(&mut Executor) -> Vec<Option<BoxFuture<()>>>) {
        let _standing = Standing::on(&self.shared, node);
        loop {
            // Dropped when the executor is not locked any more.
            let dropped = take(&mut self.shared.executor.lock());
            if dropped.is_empty() {
                return;
            }
        }
    }

    /// Stops a node at once as a power cut does: as [`World::kill`], and its unsynced writes are lost or torn.
    pub fn crash(&self, node: NodeId) {
        self.shared.record("crash", u64::from(node.0));
        self.stop(node);
        let disk = self.shared.disks.lock().get(&node).cloned();
        if let Some(disk) = disk {
            disk.crash(&mut |bound| self.shared.below(bound));
        }
    }

    /// What the network does to messages from now on.
    pub fn set_faults(&self, faults: Faults) {
        self.shared.network.lock().faults = faults;
    }

    /// Blocks or unblocks messages in one direction.
    pub fn set_blocked(&self, from: NodeId, to: NodeId, blocked: bool) {
        let mut wires = self.shared.network.lock();
        if blocked {
            wires.blocked.insert((from, to));
        } else {
            wires.blocked.remove(&(from, to));
        }
    }

    /// Holds back or lets go everything that travels in one direction; nothing is lost.
    pub fn set_clogged(&self, from: NodeId, to: NodeId, clogged: bool) {
        let mut wires = self.shared.network.lock();
        if clogged {
            wires.clogged.insert((from, to));
        } else {
            wires.clogged.remove(&(from, to));
        }
    }

    /// Ends all that the network does wrong.
    pub fn heal_network(&self) {
        let mut wires = self.shared.network.lock();
        wires.faults = Faults::default();
        wires.blocked.clear();
        wires.clogged.clear();
    }

    /// Messages that were lost, doubled and blocked so far.
    pub fn message_faults(&self) -> MessageFaults {
        self.shared.network.lock().counts
    }

    /// Sets a node's wall clock that far off the virtual time.
    pub fn set_skew_ms(&self, node: NodeId, skew_ms: i64) {
        self.shared.clocks.lock().skew_ms.insert(node, skew_ms);
    }

    /// Sets a node's wall clock by so many milliseconds, as an operator does; 0 sets it right.
    pub fn set_step_ms(&self, node: NodeId, step_ms: i64) {
        self.shared.clocks.lock().step_ms.insert(node, step_ms);
    }

    /// What a clock would show that nobody sets and that is never wrong.
    pub fn true_time(&self) -> Time {
        let now = self.shared.executor.lock().now_ns();
        Time(START_NS + now + self.shared.clocks.lock().suspended_ms * 1_000_000)
    }

    /// Lets a node's wall clock run too fast or too slow from now on.
    pub fn set_drift_ppm(&self, node: NodeId, ppm: i64) {
        let now = self.shared.executor.lock().now_ns();
        self.shared.clocks.lock().drift.insert(node, (ppm, now));
    }

    /// Puts all wall clocks forward at once, as when a whole cluster was suspended.
    pub fn suspend_ms(&self, ms: u64) {
        self.shared.clocks.lock().suspended_ms += ms;
    }

    /// Sets all wall clocks right again, relative to each other.
    pub fn heal_clocks(&self) {
        let mut clocks = self.shared.clocks.lock();
        clocks.skew_ms.clear();
        clocks.step_ms.clear();
        clocks.drift.clear();
    }

    /// A node's tasks do not run until [`World::resume`]; messages wait for it.
    pub fn pause(&self, node: NodeId) {
        self.shared.record("pause", u64::from(node.0));
        self.shared.executor.lock().pause(node);
    }

    /// The same where the node's machine is suspended, so that its monotonic clock stands still, too. What it waits for then comes as if
    /// it had not: a sleep may end before its clock says so.
    pub fn suspend(&self, node: NodeId) {
        self.pause(node);
        let now = self.shared.executor.lock().now_ns();
        self.shared.clocks.lock().suspended.insert(node, now);
    }

    /// Ends a pause.
    pub fn resume(&self, node: NodeId) {
        self.shared.record("resume", u64::from(node.0));
        self.end_suspension(node);
        self.shared.executor.lock().resume(node);
    }

    fn end_suspension(&self, node: NodeId) {
        let now = self.shared.executor.lock().now_ns();
        let mut clocks = self.shared.clocks.lock();
        if let Some(since) = clocks.suspended.remove(&node) {
            *clocks.stood_ns.entry(node).or_default() += now - since;
        }
    }

    /// What was noted through [`Runtime::note`], and how often.
    pub fn notes(&self) -> NoteCounts {
        self.shared.notes.counts()
    }

    /// Notes something that only the world's driver can see.
    pub fn note(&self, what: impl Into<Cow<'static, str>>) {
        self.shared.notes.add(what);
    }

    /// Runs everything until `future`, a task of `node`, completes; `None` when nothing can run any more or
    /// `limit` of virtual time has passed.
    pub fn run<T: Send + 'static>(
        &self,
        node: NodeId,
        limit: Duration,
        future: impl Future<Output = T> + Send + 'static,
    ) -> Option<T> {
        let result = Arc::new(Mutex::new(None));
        let slot = result.clone();
        self.shared.executor.lock().spawn(
            TaskOwner { node, name: "main" },
            Box::pin(async move {
                let output = future.await;
                *slot.lock() = Some(output);
            }),
        );
        let deadline = self.shared.executor.lock().now_ns().saturating_add(limit.as_nanos() as u64);
        loop {
            if let Some(output) = result.lock().take() {
                return Some(output);
            }
            if !self.step(deadline) {
                return None;
            }
        }
    }

    /// Runs one task, or moves the clock to the next timer. False when nothing is left before `deadline`; the clock
    /// then stands there.
    pub fn step_until(&self, deadline: Duration) -> bool {
        self.step(u64::try_from(deadline.as_nanos()).unwrap_or(u64::MAX))
    }

    fn step(&self, deadline_ns: u64) -> bool {
        let ready = self.shared.executor.lock().ready_count();
        if ready == 0 {
            return self.shared.executor.lock().advance(deadline_ns);
        }
        let pick = if ready > 1 { self.shared.below(ready as u64) as usize } else { 0 };
        let taken = self.shared.executor.lock().take_ready(pick);
        let Some((id, owner, mut task, waker)) = taken else { return true };
        self.shared.record(owner.name, id);
        let _standing = Standing::on(&self.shared, owner.node);
        // The executor is not locked here: the task may spawn, wake and set timers.
        match task.as_mut().poll(&mut std::task::Context::from_waker(&waker)) {
            std::task::Poll::Ready(()) => {
                drop(task);
                self.shared.executor.lock().finish(id);
            }
            std::task::Poll::Pending => self.shared.executor.lock().put_back(id, task),
        }
        true
    }

    /// Hash and number of the events so far.
    pub fn trace(&self) -> (u64, u64) {
        let trace = self.shared.trace.lock();
        (trace.hash, trace.events)
    }

    /// Virtual time since the start.
    pub fn elapsed(&self) -> Duration {
        Duration::from_nanos(self.shared.executor.lock().now_ns())
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // Tasks hold runtimes, which hold the world: break the circle.
        self.drop_all(NodeId(0), Executor::take_all);
        self.shared.network.lock().clear();
    }
}

struct SimClock {
    shared: Arc<Shared>,
    node: NodeId,
    /// How much faster its monotonic clock runs than the virtual time.
    ppm: i64,
}

/// By how much monotonic clocks are too fast or too slow at most, in parts per million.
const DRIFT_PPM_MAX: i64 = 100;

/// So many parts per million of a time.
fn parts(ns: u64, ppm: i64) -> i64 {
    i64::try_from(i128::from(ns) * i128::from(ppm) / 1_000_000).unwrap_or(i64::MAX)
}

impl SimClock {
    /// The monotonic clock, and how long it has stood still.
    fn counting(&self) -> (Duration, Duration) {
        let now = self.shared.executor.lock().now_ns();
        let clocks = self.shared.clocks.lock();
        let stands = clocks.suspended.get(&self.node).map_or(0, |since| now - since);
        let stood = clocks.stood_ns.get(&self.node).copied().unwrap_or(0) + stands;
        let shows = |ns: u64| Duration::from_nanos(ns.saturating_add_signed(parts(ns, self.ppm)));
        let monotonic = shows(now.saturating_sub(stood));
        (monotonic, shows(now).saturating_sub(monotonic))
    }
}

impl Clock for SimClock {
    fn now(&self) -> Time {
        let now = self.shared.executor.lock().now_ns();
        let clocks = self.shared.clocks.lock();
        let step_ms = clocks.step_ms.get(&self.node).copied().unwrap_or(0);
        let skew_ms = clocks.skew_ms.get(&self.node).copied().unwrap_or(0).saturating_add(step_ms);
        let skew_ns = skew_ms.saturating_mul(1_000_000);
        let drift = clocks.drift.get(&self.node).copied();
        let drift_ns = drift.map_or(0, |(ppm, since)| (now - since) as i64 / 1_000_000 * ppm);
        let suspended_ns = clocks.suspended_ms.saturating_mul(1_000_000);
        Time((START_NS + now + suspended_ns).saturating_add_signed(skew_ns).saturating_add_signed(drift_ns))
    }

    fn monotonic(&self) -> Duration {
        self.counting().0
    }

    fn steady(&self) -> Duration {
        let (monotonic, stood) = self.counting();
        let suspended = Duration::from_millis(self.shared.clocks.lock().suspended_ms);
        monotonic + stood + suspended
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<()> {
        // Never less than was asked for by its own clock, which counts whole nanoseconds.
        let rate = (1_000_000 + self.ppm).unsigned_abs();
        let least = duration.as_nanos().saturating_mul(1_000_000).div_ceil(u128::from(rate));
        let least = u64::try_from(least).unwrap_or(u64::MAX).saturating_add(u64::from(self.ppm != 0));
        Box::pin(executor::Sleep::new(self.shared.clone(), Duration::from_nanos(least)))
    }
}

struct SimRandom {
    shared: Arc<Shared>,
}

impl Random for SimRandom {
    fn fill(&self, bytes: &mut [u8]) {
        self.shared.random.lock().fill_bytes(bytes);
    }
}

struct SimSpawner {
    shared: Arc<Shared>,
    node: NodeId,
}

impl Spawner for SimSpawner {
    fn spawn(&self, name: &'static str, task: BoxFuture<()>) {
        self.shared.executor.lock().spawn(TaskOwner { node: self.node, name }, task);
    }

    fn spawn_owner(&self, _name: String, task: BoxFuture<()>) {
        self.spawn("owner", task);
    }

    fn blocking(&self, work: Box<dyn FnOnce() + Send>) -> BoxFuture<()> {
        let (shared, node) = (self.shared.clone(), self.node);
        Box::pin(async move {
            let disk = shared.disks.lock().get(&node).cloned();
            // A thread is only made for work in which time may pass.
            if disk.is_some_and(|disk| disk.is_about_to_stall()) {
                // It goes on when nobody waits for it any more, as blocking work does, and ends with its node.
                let (ended, end) = tokio::sync::oneshot::channel();
                let job = Box::pin({
                    let shared = shared.clone();
                    async move {
                        job::run(shared, work).await;
                        let _ = ended.send(());
                    }
                });
                shared.executor.lock().spawn(TaskOwner { node, name: "blocking" }, job);
                let _ = end.await;
            } else {
                work();
            }
        })
    }
}

#[cfg(test)]
mod tests;
