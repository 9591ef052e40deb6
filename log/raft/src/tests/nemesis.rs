//! One log of three members under everything that can happen to their nodes: what was acknowledged is there, once, in its place, for
//! everybody; what was refused is not; a barrier covers what was acknowledged before it; and afterwards all goes on.

use std::{
    collections::{BTreeMap, BTreeSet},
    panic::AssertUnwindSafe,
};

use bytes::Bytes;
use clutch_log::{Event, Floors, Member, Outcome};
use clutch_proto::mutants::{self, Mutant};
use clutch_runtime::simulated::Faults;
use parking_lot::Mutex;

use super::*;

/// How long things go wrong.
const FAULTS_FOR: Duration = Duration::from_secs(6);
/// How long the log may take to go on when they have ended.
const REST_MAX: Duration = Duration::from_secs(30);

/// What is known of the log from outside.
#[derive(Default)]
struct Seen {
    batches: BTreeMap<Position, Bytes>,
    acknowledged: BTreeMap<Bytes, Position>,
    refused: BTreeSet<Bytes>,
    wrong: Vec<String>,
    is_over: bool,
    next: u64,
    /// Changes of members that came about.
    changes: u64,
}

/// A replica: how far it has come, and what of that is on its disk.
#[derive(Default)]
struct Replica {
    /// Starts; a reader of an earlier one ends.
    starts: u64,
    applied: Position,
    flushed: Position,
}

struct Trial {
    nodes: Arc<Nodes>,
    seen: Arc<Mutex<Seen>>,
    replicas: Arc<Mutex<BTreeMap<NodeId, Replica>>>,
}

impl Trial {
    fn wrong(&self, what: String) {
        self.seen.lock().wrong.push(what);
    }

    async fn boot(&self, node: NodeId) {
        self.nodes.boot(node).await;
        let (from, starts) = {
            let mut replicas = self.replicas.lock();
            let replica = replicas.entry(node).or_default();
            replica.starts += 1;
            replica.applied = replica.flushed;
            (replica.flushed, replica.starts)
        };
        let held = self.nodes.log(node).0.log().group().view().last;
        if held < from {
            self.wrong(format!("the state of node {node} is at {from}, and its log ends at {held}"));
        }
        self.nodes.snapshots(node).applied(from);
        let (trial, mut events) = (self.share(), self.nodes.log(node).events(from.next()));
        let runtime = self.nodes.driver();
        runtime.clone().spawn("replica", async move {
            loop {
                let event = runtime.timeout(Duration::from_millis(100), events.next()).await;
                if trial.replicas.lock().get(&node).is_none_or(|replica| replica.starts != starts) {
                    return;
                }
                match event {
                    None => {}
                    Some(Ok(event)) => trial.apply(node, event),
                    // It is about to be noticed.
                    Some(Err(_)) if trial.nodes.world.disk(SimNode(node as u32)).is_dead() => return,
                    Some(Err(fault)) => return trial.wrong(format!("node {node} gets no more: {fault}")),
                }
            }
        });
    }

    /// The power of a node goes, and its replica with it.
    fn crash(&self, node: NodeId) {
        self.replicas.lock().entry(node).or_default().starts += 1;
        self.nodes.crash(node);
    }

    fn apply(&self, node: NodeId, event: Event) {
        let at = match &event {
            Event::Committed(batch) => {
                let mut seen = self.seen.lock();
                let text = batch.entries.first().cloned().unwrap_or_default();
                let known = seen.batches.entry(batch.position).or_insert_with(|| text.clone()).clone();
                if known != text {
                    seen.wrong.push(format!("{} is {known:?} and {text:?}", batch.position));
                }
                batch.position
            }
            Event::Gap { to } => *to,
            Event::Restore(manifest) => manifest.position,
            Event::Leader { .. } | Event::Sealed { .. } => return,
        };
        let mut replicas = self.replicas.lock();
        let replica = replicas.entry(node).or_default();
        if at <= replica.applied {
            self.seen.lock().wrong.push(format!("node {node} is given {at} behind {}", replica.applied));
        }
        replica.applied = at;
        if let Some(snapshots) = self.nodes.running_snapshots(node) {
            snapshots.applied(at);
        }
        // Or a power cut now would leave a state that is ahead of its log.
        let held = self.nodes.running(node).map(|log| *log.0.log().group().last().borrow());
        if let Some(held) = held.filter(|held| *held < at) {
            self.seen.lock().wrong.push(format!("node {node} is given {at}, and its disk has {held}"));
        }
        // A state is flushed now and then.
        if at.0.is_multiple_of(7) || matches!(event, Event::Restore(_)) {
            replica.flushed = at;
        }
    }

    fn share(&self) -> Arc<Trial> {
        let (nodes, seen, replicas) = (self.nodes.clone(), self.seen.clone(), self.replicas.clone());
        Arc::new(Trial { nodes, seen, replicas })
    }

    /// Proposes once, where somebody leads.
    async fn propose(&self) {
        let runtime = self.nodes.driver();
        let (text, leader) = {
            let mut seen = self.seen.lock();
            seen.next += 1;
            (Bytes::from(format!("text {}", seen.next)), self.nodes.any_leader())
        };
        let Some(log) = leader else { return runtime.clock.sleep(Duration::from_millis(20)).await };
        match log.propose(log.status().epoch, vec![text.clone()]) {
            Err(_) => {
                self.seen.lock().refused.insert(text);
            }
            Ok(commit) => match runtime.timeout(Duration::from_secs(5), commit).await {
                Some(Outcome::Committed(position)) => {
                    self.seen.lock().acknowledged.insert(text, position);
                }
                Some(Outcome::Refused(_)) => {
                    self.seen.lock().refused.insert(text);
                }
                Some(Outcome::Sealed) => self.wrong("nobody has sealed the log".into()),
                Some(Outcome::Unknown) | None => {}
            },
        }
    }

    /// Asks a member for a barrier, and compares it with what was acknowledged before.
    async fn barrier(&self, node: NodeId) {
        let runtime = self.nodes.driver();
        let before = self.seen.lock().acknowledged.values().max().copied().unwrap_or_default();
        let Some(log) = self.nodes.running(node) else { return };
        let asked =
            runtime.timeout(Duration::from_secs(1), log.read_barrier(Duration::from_millis(500))).await;
        if let Some(Ok(position)) = asked
            && position < before
        {
            self.wrong(format!("node {node} answers {position}, and {before} was acknowledged"));
        }
    }

    /// One thing that goes wrong, and its end.
    async fn strike(&self, runtime: &Runtime) {
        let (world, draw) = (&self.nodes.world, |bound| runtime.random.below(bound));
        let count = self.nodes.numbers().count() as u64;
        let any = 1 + draw(count);
        // The leader every other time.
        let leads = |node: &NodeId| self.nodes.running(*node).is_some_and(|log| log.status().is_self);
        let victim = self.nodes.numbers().find(leads).filter(|_| draw(2) == 0).unwrap_or(any);
        let lasting = Duration::from_millis(10 + draw(1_200));
        let (at, other) = (SimNode(victim as u32), SimNode((victim % count + 1) as u32));
        match draw(if count > 3 { 20 } else { 12 }) {
            12.. => {
                // One comes, perhaps without a vote, or one goes, whatever it was; often with one that is away.
                let is_away = draw(3) == 0;
                self.nodes.cut_off(victim, is_away);
                let (node, how) = (1 + draw(count), draw(3));
                let _ = runtime.timeout(lasting * 4, self.change(node, how)).await;
                self.nodes.cut_off(victim, false);
            }
            0 | 1 => {
                self.crash(victim);
                runtime.clock.sleep(lasting).await;
                self.boot(victim).await;
            }
            2 => {
                self.nodes.numbers().for_each(|node| self.crash(node));
                for node in self.nodes.numbers() {
                    self.boot(node).await;
                }
            }
            9..=11 => {
                // In the middle of what it writes; a second time in the middle of the election that follows.
                for round in 0..2 {
                    let after = draw(8 - 4 * round);
                    let disk = |node| world.disk(SimNode(node as u32));
                    self.nodes.numbers().for_each(|node| disk(node).cut_power_after(after));
                    for _ in 0..100 {
                        runtime.clock.sleep(Duration::from_millis(2)).await;
                        if self.nodes.numbers().all(|node| disk(node).is_dead()) {
                            break;
                        }
                    }
                    self.nodes.numbers().for_each(|node| self.crash(node));
                    for node in self.nodes.numbers() {
                        self.boot(node).await;
                    }
                }
            }
            3 => {
                self.nodes.cut_off(victim, true);
                runtime.clock.sleep(lasting).await;
                self.nodes.cut_off(victim, false);
            }
            4 => {
                world.set_blocked(at, other, true);
                runtime.clock.sleep(lasting).await;
                world.set_blocked(at, other, false);
            }
            5 => {
                world.pause(at);
                runtime.clock.sleep(lasting).await;
                world.resume(at);
            }
            6 => {
                world.set_faults(Faults { loss_permille: 30, delay_us_max: 20_000, ..Faults::default() });
                runtime.clock.sleep(lasting).await;
                world.set_faults(Faults::default());
            }
            7 => {
                if let Some(log) = self.nodes.running(victim) {
                    // Whatever it answers.
                    let _ = runtime.timeout(lasting, log.transfer_leader(any)).await;
                }
            }
            _ => {
                // One is away while the others forget, comes back, and dies again.
                self.nodes.cut_off(victim, true);
                runtime.clock.sleep(lasting).await;
                for node in self.nodes.numbers().filter(|node| *node != victim) {
                    self.trim(node).await;
                }
                self.nodes.cut_off(victim, false);
                runtime.clock.sleep(lasting).await;
                self.crash(victim);
                self.boot(victim).await;
            }
        }
    }

    /// Asks who leads to make a node a voter, a member without a vote, or none.
    async fn change(&self, node: NodeId, how: u64) {
        let Some(log) = self.nodes.any_leader() else { return };
        let status = log.status();
        let others = status.members.iter().map(|progress| progress.member).filter(|m| m.node != node);
        let member = (how < 2).then_some(Member { node, voter: how == 0 });
        let members: Vec<Member> = others.chain(member).collect();
        if log.reconfigure(status.config, members).await.is_ok() {
            self.seen.lock().changes += 1;
        }
    }

    /// The same of a node that does not vote.
    async fn come(&self, node: NodeId, how: u64) {
        let leader = self.nodes.any_leader();
        let members = leader.map(|log| log.status().members).unwrap_or_default();
        if !members.iter().any(|progress| progress.member == Member { node, voter: true }) {
            self.change(node, how).await;
        }
    }

    /// Makes all nodes voters.
    async fn gather(&self, runtime: &Runtime) {
        let end = runtime.clock.monotonic() + REST_MAX;
        let are_all = || {
            let leader = self.nodes.any_leader();
            let voters = leader.map_or(0, |log| {
                log.status().members.iter().filter(|progress| progress.member.voter).count()
            });
            voters == self.nodes.numbers().count()
        };
        while !are_all() {
            if runtime.clock.monotonic() > end {
                return self.wrong("the nodes do not all become voters".into());
            }
            for node in self.nodes.numbers() {
                // Who is to vote is heard first.
                for how in [1, 0] {
                    let _ = runtime.timeout(Duration::from_secs(5), self.come(node, how)).await;
                    runtime.clock.sleep(Duration::from_millis(200)).await;
                }
            }
            runtime.clock.sleep(Duration::from_millis(100)).await;
        }
    }

    /// A replica says what it does not need any more, and no more than that may go.
    async fn trim(&self, node: NodeId) {
        let flushed = self.replicas.lock().get(&node).map_or(Position(0), |replica| replica.flushed);
        let Some(log) = self.nodes.running(node) else { return };
        let (first, restored) = (log.status().bounds.first, log.0.delivered().restored());
        let floors = Floors { retain: flushed, snapshot: flushed, flushed };
        // It may wait for others.
        let _ = self.nodes.driver().timeout(Duration::from_secs(3), log.set_floors(floors)).await;
        let now = log.status().bounds.first;
        if now > first.max(flushed.next()) && log.0.delivered().restored() == restored {
            self.wrong(format!("node {node} needs what follows {flushed}, and its log begins at {now}"));
        }
    }

    /// Everything is well again: the log goes on, and everybody gets all of it.
    async fn rest(&self, runtime: &Runtime) {
        let end = runtime.clock.monotonic() + REST_MAX;
        let before = self.seen.lock().acknowledged.values().max().copied();
        let mut goal = None;
        loop {
            if goal.is_none() {
                self.propose().await;
            }
            let last = self.seen.lock().acknowledged.values().max().copied();
            goal = goal.or(last.filter(|last| Some(*last) > before));
            let all = self.replicas.lock().values().all(|replica| Some(replica.applied) >= goal);
            let count = self.nodes.numbers().count();
            let has_all = |node| self.nodes.log(node).status().members.len() == count;
            if goal.is_some() && all && self.nodes.numbers().all(has_all) {
                return;
            }
            if runtime.clock.monotonic() > end {
                let at: Vec<Position> =
                    self.replicas.lock().values().map(|replica| replica.applied).collect();
                return self.wrong(format!("the log does not go on behind {before:?}: {at:?}, {last:?}"));
            }
            runtime.clock.sleep(Duration::from_millis(20)).await;
        }
    }

    fn check(&self) -> Vec<String> {
        let seen = self.seen.lock();
        let mut wrong = seen.wrong.clone();
        for (text, position) in &seen.acknowledged {
            let there = seen.batches.get(position);
            if there != Some(text) {
                wrong.push(format!("{text:?} was acknowledged at {position}, where {there:?} is"));
            }
        }
        let mut once = BTreeSet::new();
        for text in seen.batches.values() {
            if !once.insert(text) || seen.refused.contains(text) {
                wrong.push(format!("{text:?} is there twice, or was refused"));
            }
        }
        wrong
    }
}

/// Runs one seed; what was wrong.
fn trial(seed: u64) -> Vec<String> {
    trial_of(seed, 3).0
}

/// The same on so many nodes, three of which begin: the others come, and all may go. How often members changed, too.
fn trial_of(seed: u64, count: u64) -> (Vec<String>, u64) {
    let found = std::panic::catch_unwind(AssertUnwindSafe(|| {
        let world = Arc::new(World::new(seed));
        let nodes = Arc::new(Nodes::beginning_on(world.clone(), count, vec![1, 2, 3]));
        let done = world.run(SimNode(0), Duration::from_secs(600), async move {
            let trial = Arc::new(Trial { nodes, seen: Arc::default(), replicas: Arc::default() });
            let runtime = trial.nodes.driver();
            for node in trial.nodes.numbers() {
                trial.boot(node).await;
            }
            for lane in 1..=3 {
                let (trial, own) = (trial.clone(), runtime.clone());
                runtime.spawn("lane", async move {
                    while !trial.seen.lock().is_over {
                        trial.propose().await;
                        trial.barrier(lane).await;
                        own.clock.sleep(Duration::from_micros(own.random.below(10_000))).await;
                    }
                });
            }
            let end = runtime.clock.monotonic() + FAULTS_FOR;
            while runtime.clock.monotonic() < end {
                runtime.clock.sleep(Duration::from_millis(runtime.random.below(300))).await;
                trial.strike(&runtime).await;
            }
            trial.seen.lock().is_over = true;
            trial.gather(&runtime).await;
            trial.rest(&runtime).await;
            (trial.check(), trial.seen.lock().changes)
        });
        done.unwrap_or_else(|| (vec!["it got stuck".into()], 0))
    }));
    found.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        (vec![format!("panic: {}", text.unwrap_or_else(|| "without a message".into()))], 0)
    })
}

#[test]
fn nothing_acknowledged_is_lost() {
    for seed in 0..40 {
        let wrong = trial(seed);
        assert!(wrong.is_empty(), "seed {seed}: {wrong:#?}");
    }
}

#[test]
fn members_come_and_go_and_nothing_acknowledged_is_lost() {
    let mut changes = 0;
    for seed in 0..40 {
        let (wrong, changed) = trial_of(seed, 4);
        assert!(wrong.is_empty(), "seed {seed}: {wrong:#?}");
        changes += changed;
    }
    assert!(changes > 80, "{changes} changes of members");
}

/// A planted bug is found within so many seeds.
fn is_found(mutant: Mutant, seeds: u64) {
    mutants::plant(Some(mutant));
    let is_planted = mutants::planted().is_some();
    let found = (0..if is_planted { seeds } else { 0 }).find_map(|seed| Some((seed, trial(seed).pop()?)));
    mutants::plant(None);
    println!("{mutant:?}: {found:?}");
    assert_eq!(found.is_some(), is_planted, "{mutant:?} is not found by {seeds} seeds");
}

macro_rules! planted {
    ($($module:ident: $mutant:ident,)*) => {
        $(mod $module {
            #[test]
            fn planted_bugs_are_found() {
                super::is_found(clutch_proto::mutants::Mutant::$mutant, 40);
            }
        })*
    };
}

planted! {
    truncation: TruncationLost,
    sync: UnsyncedAcknowledged,
    delivery: DeliveredUnsynced,
    quorum: AppendAssumed,
    barriers: ReadWithoutQuorum,
    members: SnapshotWithoutMembers,
    floors: PurgedAboveFloor,
}
