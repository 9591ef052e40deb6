//! Runs a script in a world of its own: operations, faults, then healing, convergence and all checks.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use clutch_log::LogId;
use clutch_runtime::simulated::{DiskFaults, Faults, NodeId, Unmounted};
use parking_lot::Mutex;

use crate::{
    checkers::{self, Violation},
    history::{History, Performed, Watcher},
    script::{Action, Fault, Lane, Operation, Party, Script},
    sim_cluster::{CLIENT, Engine, SimCluster, disk_node},
    workload::Worker,
};

/// Virtual time within which everything must have come to rest after the faults.
const CONVERGENCE_MAX: Duration = Duration::from_secs(180);
/// How long a node that could not start waits before it tries again.
const RESTART_PAUSE: Duration = Duration::from_millis(300);

/// What a run gave.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Operations of the script that ended.
    pub operations: u64,
    /// Requests to shards and CDC that were answered.
    pub requests: u64,
    /// Faults that struck, by kind.
    pub faults: BTreeMap<&'static str, u64>,
    /// What must not be.
    pub violations: Vec<Violation>,
    /// Hash of everything that happened.
    pub trace_hash: u64,
    /// Rare states that were reached.
    pub coverage: BTreeSet<String>,
    /// What happened, for people.
    pub timeline: Vec<(Duration, String)>,
    /// Virtual time.
    pub elapsed: Duration,
    /// What every log delivered.
    pub logs: crate::golden_logs::Logs,
}

/// How long a clock drifts before somebody sets it: not so long that nobody believes its node any more.
const DRIFT: Duration = Duration::from_secs(8);

/// What ends a fault.
#[derive(Clone, Debug)]
enum End {
    Network(usize),
    Unblock(NodeId, NodeId),
    Unclog(NodeId, NodeId),
    Boot(NodeId),
    Resume(NodeId),
    SlowPause(NodeId, Duration),
    Stop(NodeId),
    Hear(LogId, NodeId),
    HealDisk(Party),
    SetClock(NodeId),
    SetRight(NodeId),
    Mount(u32),
}

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
        let worker = Worker {
            client: self.cluster.client_on(node, Some(watcher)),
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

    fn node(&self, party: Party) -> NodeId {
        let home = |log| self.cluster.home(log).unwrap_or(NodeId(0));
        match party {
            Party::Registry => home(LogId::REGISTRY),
            Party::Cdc => home(LogId::CDC),
            Party::Shard(n) => home(LogId::shard(n)),
            Party::Disk(n) => disk_node(n),
            Party::Client(n) => client_node(n),
        }
    }

    fn crash(&mut self, node: NodeId) {
        self.cluster.world.crash(node);
        self.paused.remove(&node);
        self.armed.remove(&node);
        self.down.insert(node);
    }

    /// As [`Runner::crash`], and the machine goes on.
    fn kill(&mut self, node: NodeId) {
        // A power cut that was to come finds the machine all the same.
        self.cluster.world.kill(node);
        self.paused.remove(&node);
        self.down.insert(node);
    }

    fn block(&mut self, from: NodeId, to: NodeId, lasting: Duration) {
        *self.blocked.entry((from, to)).or_default() += 1;
        self.cluster.world.set_blocked(from, to, true);
        self.end_after(lasting, End::Unblock(from, to));
    }

    fn clients(&self) -> Vec<NodeId> {
        (0..self.clients).map(client_node).collect()
    }

    fn strike(&mut self, fault: Fault) {
        self.tell(format!("fault {fault}"));
        if self.can_strike(&fault) {
            *self.faults.entry(fault.kind()).or_default() += 1;
        }
        let node = |this: &Runner, party: &Party| this.node(*party);
        match &fault {
            Fault::Loss(_, d) | Fault::Duplicate(_, d) | Fault::Delay(_, d) => {
                let id = self.next as usize;
                self.network.insert(id, fault.clone());
                self.end_after(*d, End::Network(id));
                self.set_network();
            }
            Fault::Partition(a, b, d) => {
                let (a, b) = (node(self, a), node(self, b));
                self.block(a, b, *d);
                self.block(b, a, *d);
            }
            Fault::OneWay(a, b, d) => {
                let (a, b) = (node(self, a), node(self, b));
                self.block(a, b, *d);
            }
            Fault::Isolate(party, d) => {
                let lonely = node(self, party);
                let others: Vec<NodeId> =
                    self.cluster.nodes().into_iter().chain(self.clients()).filter(|n| *n != lonely).collect();
                for other in others {
                    self.block(lonely, other, *d);
                    self.block(other, lonely, *d);
                }
            }
            Fault::Clog(a, b, d) => {
                let (a, b) = (node(self, a), node(self, b));
                self.cluster.world.set_clogged(a, b, true);
                self.end_after(*d, End::Unclog(a, b));
            }
            Fault::Crash(party, d) => {
                let node = node(self, party);
                if !self.down.contains(&node) {
                    self.crash(node);
                    self.end_after(*d, End::Boot(node));
                }
            }
            Fault::Kill(party, d) => {
                let node = node(self, party);
                if !self.down.contains(&node) {
                    self.cluster.world.note("world: a process dies and its machine goes on");
                    self.kill(node);
                    self.end_after(*d, End::Boot(node));
                }
            }
            Fault::Stall(party, operations, d) => {
                self.cluster.world.disk(node(self, party)).stall_after(u64::from(*operations), *d);
            }
            Fault::Hang(party, operations, d) => {
                self.cluster.world.disk(node(self, party)).hang_after(u64::from(*operations), *d);
            }
            Fault::PowerCut(party, operations, d) => {
                let node = node(self, party);
                if !self.down.contains(&node) {
                    self.cluster.world.disk(node).cut_power_after(u64::from(*operations));
                    self.armed.insert(node, *d);
                }
            }
            Fault::Pause(party, d) => {
                let node = node(self, party);
                if !self.down.contains(&node) && self.paused.insert(node) {
                    self.cluster.world.pause(node);
                    self.end_after(*d, End::Resume(node));
                }
            }
            Fault::Slow(party, d) => {
                let node = node(self, party);
                let until = self.now() + *d;
                self.end(End::SlowPause(node, until));
            }
            Fault::Move(party, d) => {
                let log = log_of(*party);
                if let Some((old, _)) = log.and_then(|log| self.cluster.move_log(log)) {
                    // For the first half of the time the old leader hears nothing of the new one.
                    self.zombies.insert(old);
                    if let Some(log) = log {
                        self.cluster.logs.set_deaf(log, u64::from(old.0), true);
                        self.end_after(*d / 2, End::Hear(log, old));
                    }
                    self.end_after(*d, End::Stop(old));
                }
            }
            Fault::UnknownCommitted(party) | Fault::UnknownLost(party) => {
                if let Some(log) = log_of(*party) {
                    self.cluster.logs.make_next_unknown(log, matches!(fault, Fault::UnknownCommitted(_)));
                }
            }
            Fault::Skew(party, ms) => self.cluster.world.set_skew_ms(node(self, party), i64::from(*ms)),
            Fault::Drift(party, ppm) => {
                let node = node(self, party);
                self.cluster.world.set_drift_ppm(node, i64::from(*ppm));
                self.end_after(DRIFT, End::SetClock(node));
            }
            Fault::Suspend(d) => self.cluster.world.suspend_ms(d.as_millis() as u64),
            Fault::Flip(disk, draw) => {
                self.cluster.spoil(*disk);
                self.flip(*disk, *draw);
            }
            Fault::Misdirect(disk) => {
                self.cluster.spoil(*disk);
                self.cluster.world.disk(disk_node(*disk)).misdirect_next();
            }
            Fault::DiskErrors(party, permille, d) => {
                let faults = DiskFaults {
                    read_error_permille: *permille,
                    write_error_permille: *permille,
                    full: false,
                };
                self.cluster.world.disk(node(self, party)).set_faults(faults);
                self.end_after(*d, End::HealDisk(*party));
            }
            Fault::Full(party, d) => {
                let faults = DiskFaults { full: true, ..DiskFaults::default() };
                self.cluster.world.disk(node(self, party)).set_faults(faults);
                self.end_after(*d, End::HealDisk(*party));
            }
            Fault::Step(party, seconds, d) => {
                let node = node(self, party);
                self.cluster.world.set_step_ms(node, seconds.saturating_mul(1000));
                self.end_after(*d, End::SetRight(node));
            }
            Fault::Unmount(disk, d) => {
                let node = disk_node(*disk);
                if !self.unmounted.contains_key(disk) {
                    self.crash(node);
                    self.unmounted.insert(*disk, self.cluster.world.disk(node).unmount());
                    self.end_after(RESTART_PAUSE, End::Boot(node));
                    self.end_after(RESTART_PAUSE + *d, End::Mount(*disk));
                }
            }
            // The right disk is not there.
            Fault::Wipe(disk) if self.unmounted.contains_key(disk) => {}
            Fault::Wipe(disk) => {
                // As an operator would: stop the node, change the disk, start it.
                let node = disk_node(*disk);
                self.cluster.spoil(*disk);
                self.crash(node);
                self.cluster.world.disk(node).wipe();
                self.cluster.label(*disk);
                self.end_after(RESTART_PAUSE, End::Boot(node));
            }
        }
    }

    /// Whether a fault does anything now: nobody is cut off from himself, and who is down cannot fall. Chances (loss,
    /// disk errors) count once, when they begin to act.
    fn can_strike(&self, fault: &Fault) -> bool {
        let is_up = |party: &Party| !self.down.contains(&self.node(*party));
        match fault {
            Fault::Partition(a, b, _) | Fault::OneWay(a, b, _) | Fault::Clog(a, b, _) => a != b,
            Fault::Crash(party, _) | Fault::Kill(party, _) | Fault::PowerCut(party, ..) => is_up(party),
            Fault::Pause(party, _) | Fault::Slow(party, _) => {
                is_up(party) && !self.paused.contains(&self.node(*party))
            }
            Fault::Flip(disk, _) => !self.cluster.world.disk(disk_node(*disk)).files().is_empty(),
            _ => true,
        }
    }

    fn flip(&self, disk: u32, draw: u64) {
        let disk = self.cluster.world.disk(disk_node(disk));
        let blocks: Vec<_> = disk
            .files()
            .into_iter()
            .filter(|(p, _)| !p.components().any(|c| c.as_os_str() == "tmp"))
            .collect();
        let Some((path, length)) = blocks.get((draw % blocks.len().max(1) as u64) as usize) else { return };
        let offset = draw.rotate_left(17) % (*length).max(1);
        disk.corrupt(path, offset, 1 << (draw >> 60 & 7));
    }

    fn set_network(&self) {
        let mut faults = Faults::default();
        for fault in self.network.values() {
            match fault {
                Fault::Loss(permille, _) => faults.loss_permille = faults.loss_permille.max(*permille),
                Fault::Duplicate(permille, _) => {
                    faults.duplicate_permille = faults.duplicate_permille.max(*permille);
                }
                Fault::Delay(us, _) => faults.delay_us_max = faults.delay_us_max.max(u64::from(*us)),
                _ => {}
            }
        }
        self.cluster.world.set_faults(faults);
    }

    fn end(&mut self, end: End) {
        match end {
            End::Network(id) => {
                self.network.remove(&id);
                self.set_network();
            }
            End::Unblock(from, to) => {
                let count = self.blocked.entry((from, to)).or_default();
                *count = count.saturating_sub(1);
                if *count == 0 {
                    self.cluster.world.set_blocked(from, to, false);
                }
            }
            End::Unclog(from, to) => self.cluster.world.set_clogged(from, to, false),
            End::Boot(node) => {
                if self.down.remove(&node) {
                    self.boot(node);
                }
            }
            End::Resume(node) => {
                if self.paused.remove(&node) {
                    self.cluster.world.resume(node);
                }
            }
            End::SlowPause(node, until) => {
                if self.now() < until && !self.down.contains(&node) && self.paused.insert(node) {
                    self.cluster.world.pause(node);
                    self.end_after(Duration::from_millis(3), End::Resume(node));
                    self.end_after(Duration::from_millis(4), End::SlowPause(node, until));
                }
            }
            End::Stop(node) => {
                if self.zombies.remove(&node) {
                    self.cluster.world.crash(node);
                    self.paused.remove(&node);
                }
            }
            End::SetRight(node) => self.cluster.world.set_step_ms(node, 0),
            End::Mount(disk) => {
                self.mount(disk);
                let node = disk_node(disk);
                if self.down.insert(node) {
                    self.end_after(RESTART_PAUSE, End::Boot(node));
                }
            }
            End::SetClock(node) => self.cluster.world.set_drift_ppm(node, 0),
            End::Hear(log, node) => self.cluster.logs.set_deaf(log, u64::from(node.0), false),
            End::HealDisk(party) => {
                let node = self.node(party);
                self.cluster.world.disk(node).set_faults(DiskFaults::default());
                if !matches!(party, Party::Disk(_)) && !self.down.contains(&node) {
                    // A log that met a failed write has stopped for good: its operator starts the node again.
                    self.kill(node);
                    self.end_after(RESTART_PAUSE, End::Boot(node));
                }
            }
        }
    }

    /// Puts a disk back in its place; its node is down afterwards. Nothing may have been written there meanwhile.
    fn mount(&mut self, disk: u32) {
        let Some(unmounted) = self.unmounted.remove(&disk) else { return };
        let node = disk_node(disk);
        self.cluster.world.crash(node);
        let hidden = self.cluster.world.disk(node).mount(unmounted);
        if let Some(path) = hidden.first() {
            let what =
                format!("disk {disk} was not mounted, and {} was written in its place", path.display());
            self.seen.push(Violation::new("data", what));
        }
    }

    fn boot(&mut self, node: NodeId) {
        self.tell(format!("node {} starts", node.0));
        match (0..self.clients).find(|c| client_node(*c) == node) {
            Some(client) => self.start_client(client),
            None if self.cluster.nodes().contains(&node) => self.cluster.boot(node),
            None => {}
        }
    }

    /// Ends all faults; for every second seed all nodes stop at once and start again.
    fn heal(&mut self, seed: u64) {
        self.tell("all faults end".into());
        self.queue.clear();
        self.network.clear();
        let world = self.cluster.world.clone();
        world.heal_network();
        world.heal_clocks();
        for node in std::mem::take(&mut self.paused) {
            world.resume(node);
        }
        for node in std::mem::take(&mut self.zombies) {
            world.crash(node);
        }
        let unmounted: Vec<u32> = self.unmounted.keys().copied().collect();
        for disk in unmounted {
            self.mount(disk);
            self.down.insert(disk_node(disk));
        }
        let mut nodes = self.cluster.nodes();
        let mut hung = Duration::ZERO;
        for node in &nodes {
            let disk = world.disk(*node);
            disk.set_faults(DiskFaults::default());
            hung = hung.max(disk.end_stall());
        }
        if !hung.is_zero() {
            // What waits for a disk already waits until then.
            let clock = world.node(CLIENT).clock;
            world.run(CLIENT, hung * 2, async move { clock.sleep(hung).await });
        }
        let everything = seed.is_multiple_of(2);
        // Power cuts that have not come yet must not come any more, and replicas that failed start again.
        let local = self.cluster.config().engine == Engine::Local;
        nodes.retain(|n| everything || self.down.contains(n) || self.armed.contains_key(n) || local);
        for node in nodes {
            self.crash(node);
            self.cluster.boot(node);
        }
        for client in 0..self.clients {
            if self.down.contains(&client_node(client)) {
                self.start_client(client);
            }
        }
        self.down.clear();
        self.armed.clear();
    }

    fn finish(mut self) -> Report {
        let mut violations = std::mem::take(&mut self.seen);
        if !self.run_until_done(CONVERGENCE_MAX) {
            let busy: Vec<String> = self.busy.lock().iter().map(ToString::to_string).collect();
            violations.push(Violation::new("convergence", format!("lanes {busy:?} do not come to an end")));
        }
        let (found, statuses) = self.converge();
        violations.extend(found);
        let records = self.history.take_records();
        let performed = self.history.take_performed();
        let mut report = Report {
            operations: performed.len() as u64,
            requests: records.iter().filter(|r| r.ended.is_some()).count() as u64,
            faults: std::mem::take(&mut self.faults),
            elapsed: self.now(),
            ..Report::default()
        };
        let mut evidence = checkers::Evidence::collect(&self.cluster, records);
        if !violations.is_empty() {
            let found = self.cluster.recording.violations();
            violations.extend(found.into_iter().map(|what| Violation::new("log", what)));
        } else {
            violations.extend(checkers::check(&mut evidence, &self.cluster, &self.history, &statuses));
        }
        violations.extend(
            self.history.violations().into_iter().map(|(checker, what)| Violation::new(checker, what)),
        );
        report.coverage = crate::coverage::reached(&evidence, &self.cluster.world);
        report.logs = std::mem::take(&mut evidence.logs);
        report.timeline = std::mem::take(&mut self.timeline);
        for p in performed {
            let text = format!(
                "{} {} -> {} ({} µs)",
                p.lane,
                p.operation,
                p.outcome,
                (p.ended - p.began).as_micros()
            );
            report.timeline.push((p.began, text));
        }
        report.timeline.sort_by_key(|(at, _)| *at);
        for (at, _) in &mut report.timeline {
            *at = at.saturating_sub(self.start);
        }
        report.trace_hash = self.cluster.world.trace().0;
        report.violations = violations;
        report
    }

    /// Drives the world until nothing is in flight.
    fn converge(&mut self) -> (Vec<Violation>, checkers::convergence::Statuses) {
        let client = self.cluster.client();
        let done = Arc::new(Mutex::new(None));
        let slot = done.clone();
        let runtime = self.cluster.world.node(CLIENT);
        runtime.spawn("converge", async move {
            let result = checkers::convergence::at_rest(&client).await;
            *slot.lock() = Some(result);
        });
        let end = self.now() + CONVERGENCE_MAX;
        while done.lock().is_none() {
            let until = self.queue.keys().next().map_or(end, |(at, _)| *at).min(end);
            if self.drive(until) {
                continue;
            }
            let due = self.queue.first_key_value().map(|(key, _)| *key).filter(|(at, _)| *at <= until);
            match due.and_then(|key| self.queue.remove(&key)) {
                Some(Timed::End(end)) => self.end(end),
                Some(Timed::Strike(_)) => {}
                None if self.now() >= end || self.queue.is_empty() => break,
                None => {}
            }
        }
        match done.lock().take() {
            Some(found) => found,
            None => {
                let what = "the cluster does not come to rest after the faults".to_owned();
                (vec![Violation::new("convergence", what)], Vec::new())
            }
        }
    }
}

fn log_of(party: Party) -> Option<LogId> {
    match party {
        Party::Registry => Some(LogId::REGISTRY),
        Party::Cdc => Some(LogId::CDC),
        Party::Shard(n) => Some(LogId::shard(n)),
        _ => None,
    }
}
