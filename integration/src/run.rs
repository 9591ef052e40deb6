//! Runs a script in a world of its own: operations, faults, then healing, convergence and all checks.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use clutch_client::Reads;
use clutch_log::LogId;
use clutch_runtime::simulated::{NodeId, Unmounted};
use parking_lot::Mutex;

use crate::{
    checkers::Violation,
    history::{History, Performed, Watcher},
    script::{Action, Fault, Lane, Operation, Party, Script},
    sim_cluster::{CLIENT, SimCluster, disk_node},
    workload::Worker,
};

mod faults;
mod report;

use faults::End;
pub use report::Report;

/// How long a node that could not start waits before it tries again.
const RESTART_PAUSE: Duration = Duration::from_millis(300);

type Lanes = Arc<Mutex<BTreeMap<Lane, VecDeque<(Duration, Operation)>>>>;

struct Runner {
    cluster: SimCluster,
    history: Arc<History>,
    lanes: Lanes,
    /// Lanes with an operation in flight.
    busy: Arc<Mutex<BTreeSet<Lane>>>,
    start: Duration,
    queue: BTreeMap<(Duration, u64), Timed>,
    next: u64,
    network: BTreeMap<usize, Fault>,
    down: BTreeSet<NodeId>,
    paused: BTreeSet<NodeId>,
    /// Nodes that lost their roles and still run.
    zombies: BTreeSet<NodeId>,
    /// Members of logs that are cut off from the others, and by how many faults.
    deaf: BTreeMap<(LogId, NodeId), u32>,
    /// Nodes whose power will go, and for how long.
    armed: BTreeMap<NodeId, Duration>,
    blocked: BTreeMap<(NodeId, NodeId), u32>,
    /// Disks that are not mounted.
    unmounted: BTreeMap<u32, Unmounted>,
    /// What was seen that must not be.
    seen: Vec<Violation>,
    clients: u32,
    faults: BTreeMap<&'static str, u64>,
    timeline: Vec<(Duration, String)>,
}

enum Timed {
    Strike(Fault),
    End(End),
}

fn client_node(client: u32) -> NodeId {
    NodeId(CLIENT.0 + 1 + client)
}

/// Runs a script and checks everything. A panic anywhere in it is a violation, too.
pub fn run(script: &Script) -> Report {
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run_unguarded(script)));
    caught.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("without a message");
        Report { violations: vec![Violation::new("panic", text.to_owned())], ..Report::default() }
    })
}

/// Runs a script's operations and returns what all logs delivered.
pub fn collect_logs(script: &Script) -> BTreeMap<LogId, crate::recording::Batches> {
    let Some(mut runner) = Runner::start(script) else { return BTreeMap::new() };
    runner.run_until_done(Duration::from_secs(24 * 3600));
    let ids = runner.cluster.log_ids();
    ids.into_iter().map(|id| (id, runner.cluster.recording.batches(id))).collect()
}

fn run_unguarded(script: &Script) -> Report {
    let Some(mut runner) = Runner::start(script) else {
        let what = "the cluster does not come up, without any fault".to_owned();
        return Report { violations: vec![Violation::new("convergence", what)], ..Report::default() };
    };
    runner.run_until_done(Duration::from_secs(24 * 3600));
    runner.heal(script.seed);
    runner.finish()
}

impl Runner {
    fn start(script: &Script) -> Option<Runner> {
        let cluster = SimCluster::start_with(script.seed, script.cluster.clone())?;
        let start = cluster.world.elapsed();
        let mut runner = Runner {
            start,
            cluster,
            history: Arc::default(),
            lanes: Lanes::default(),
            busy: Arc::default(),
            queue: BTreeMap::new(),
            next: 0,
            network: BTreeMap::new(),
            down: BTreeSet::new(),
            paused: BTreeSet::new(),
            zombies: BTreeSet::new(),
            deaf: BTreeMap::new(),
            armed: BTreeMap::new(),
            blocked: BTreeMap::new(),
            unmounted: BTreeMap::new(),
            seen: Vec::new(),
            clients: script.clients,
            faults: BTreeMap::new(),
            timeline: Vec::new(),
        };
        for event in &script.events {
            match &event.action {
                Action::Operate(lane, operation) => {
                    let mut lanes = runner.lanes.lock();
                    lanes.entry(*lane).or_default().push_back((event.at, operation.clone()));
                }
                Action::Strike(fault) => runner.schedule(start + event.at, Timed::Strike(fault.clone())),
            }
        }
        (0..script.clients).for_each(|client| runner.start_client(client));
        Some(runner)
    }

    fn schedule(&mut self, at: Duration, what: Timed) {
        self.next += 1;
        self.queue.insert((at, self.next), what);
    }

    fn now(&self) -> Duration {
        self.cluster.world.elapsed()
    }

    fn end_after(&mut self, after: Duration, end: End) {
        self.schedule(self.now() + after, Timed::End(end));
    }

    fn start_client(&self, client: u32) {
        let node = client_node(client);
        let runtime = self.cluster.world.node(node);
        let watcher = Arc::new(Watcher { history: self.history.clone(), runtime: runtime.clone() });
        // Where logs have followers, two of three clients ask them.
        let reads = match (self.cluster.config().replicas, client % 3) {
            (1, _) | (_, 0) => Reads::Leader,
            (_, 1) => Reads::Seen,
            _ => Reads::Member,
        };
        let worker = Worker {
            client: self.cluster.client_that_reads(node, Some(watcher), reads),
            history: self.history.clone(),
            cluster: self.cluster.cluster_id(),
            collide: self.cluster.config().collide,
        };
        let mine: Vec<Lane> = self.lanes.lock().keys().filter(|l| l.client == client).copied().collect();
        for lane in mine {
            let (worker, lanes, busy, start) =
                (worker.clone(), self.lanes.clone(), self.busy.clone(), self.start);
            busy.lock().remove(&lane);
            runtime.spawn("lane", async move {
                let clock = worker.client.runtime().clock.clone();
                loop {
                    let next = lanes.lock().get_mut(&lane).and_then(VecDeque::pop_front);
                    let Some((at, operation)) = next else { return };
                    busy.lock().insert(lane);
                    clock.sleep((start + at).saturating_sub(clock.monotonic())).await;
                    let began = clock.monotonic();
                    let outcome = worker.perform(&operation).await;
                    let ended = clock.monotonic();
                    worker.history.performed(Performed { began, ended, lane, operation, outcome });
                    busy.lock().remove(&lane);
                }
            });
        }
    }

    fn is_done(&self) -> bool {
        self.busy.lock().is_empty() && self.lanes.lock().values().all(VecDeque::is_empty)
    }

    /// Drives the world until all lanes are at their end; false when `limit` has passed before.
    fn run_until_done(&mut self, limit: Duration) -> bool {
        let end = self.now() + limit;
        let mut steps = 0u32;
        loop {
            steps = steps.wrapping_add(1);
            if steps.is_multiple_of(64) && self.is_done() {
                return true;
            }
            let until = self.queue.keys().next().map_or(end, |(at, _)| *at).min(end);
            if self.drive(until) {
                continue;
            }
            if self.is_done() {
                return true;
            }
            let due = self.queue.first_key_value().map(|(key, _)| *key).filter(|(at, _)| *at <= until);
            match due.and_then(|key| self.queue.remove(&key)) {
                Some(Timed::Strike(fault)) => self.strike(fault),
                Some(Timed::End(end)) => self.end(end),
                None if self.now() >= end => return false,
                // Nothing can run and nothing is planned: whoever waits, waits for ever.
                None if self.queue.is_empty() => return false,
                None => {}
            }
        }
    }

    /// One step of the world, and what only its driver can do. False when nothing is left before `until`.
    fn drive(&mut self, until: Duration) -> bool {
        let more = self.cluster.world.step_until(until);
        if !self.armed.is_empty() {
            let dead: Vec<NodeId> =
                self.armed.keys().filter(|n| self.cluster.world.disk(**n).is_dead()).copied().collect();
            for node in dead {
                let lasting = self.armed.remove(&node).unwrap_or(RESTART_PAUSE);
                self.cluster.world.note("world: the power goes in the middle of a disk operation");
                self.tell(format!("the power of node {} goes", node.0));
                self.crash(node);
                self.end_after(lasting, End::Boot(node));
            }
        }
        for node in self.cluster.take_failed() {
            // It ends its process, and a supervisor starts another.
            self.kill(node);
            self.end_after(RESTART_PAUSE, End::Boot(node));
        }
        more
    }

    fn tell(&mut self, what: String) {
        self.timeline.push((self.now(), what));
    }

    /// The node that a fault of a log strikes: its leader every other time, else any member.
    fn struck(&self, log: LogId) -> Option<NodeId> {
        let members = self.cluster.members(log);
        let draw = (self.now().as_micros() / 7) as usize % (2 * members.len()).max(1);
        members.get(draw).copied().or_else(|| self.cluster.home(log))
    }

    fn node(&self, party: Party) -> NodeId {
        let home = |log| self.struck(log).unwrap_or(NodeId(0));
        match party {
            Party::Registry => home(LogId::REGISTRY),
            Party::Cdc => home(LogId::CDC),
            Party::Shard(n) => home(LogId::shard(n)),
            Party::Disk(n) => disk_node(n),
            Party::Client(n) => client_node(n),
        }
    }
}
