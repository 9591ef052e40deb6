//! The conformance suite on logs that are led as they are told to, and on members that elect their leaders.

use std::sync::atomic::{AtomicU64, Ordering};

use clutch_log::conformance::{self, Harness, Part, SuiteSnapshots};
use clutch_runtime::simulated::{NodeId, World};

use super::*;

struct SimHarness {
    runtime: Runtime,
    logs: SimLogs,
    leader: AtomicU64,
}

#[async_trait]
impl Harness for SimHarness {
    fn runtime(&self) -> Runtime {
        self.runtime.clone()
    }

    async fn leader(&self) -> Arc<dyn Log> {
        self.logs.log(&self.runtime, LogId::CDC, self.leader.load(Ordering::Relaxed))
    }

    async fn all(&self) -> Vec<Arc<dyn Log>> {
        (1..=3).map(|n| self.logs.log(&self.runtime, LogId::CDC, n)).collect()
    }

    async fn change_leader(&self) {
        let next = self.leader.load(Ordering::Relaxed) % 3 + 1;
        self.leader.store(next, Ordering::Relaxed);
        self.logs.elect(LogId::CDC, next, self.runtime.random.below(3) as usize);
    }

    async fn restart(&self) -> bool {
        self.change_leader().await;
        true
    }

    fn any_member_answers(&self) -> bool {
        true
    }

    async fn make_next_unknown(&self, committed: bool) -> bool {
        self.logs.make_next_unknown(LogId::CDC, committed);
        true
    }

    async fn members(&self) -> Vec<Part> {
        // Those that are led as they are told to hear nothing of each other.
        vec![Part { node: self.leader.load(Ordering::Relaxed), log: self.leader().await }]
    }

    async fn cut_off(&self, _: clutch_log::NodeId, _: bool) -> bool {
        false
    }

    async fn wipe(&self, _: clutch_log::NodeId) -> bool {
        false
    }

    fn restores(&self) -> bool {
        false
    }

    async fn applied(&self, _: clutch_log::NodeId, _: Position) {}
}

#[test]
fn conforms() {
    for seed in 0..20 {
        let world = World::new(seed);
        let logs = SimLogs::new();
        logs.elect(LogId::CDC, 1, 0);
        let harness = SimHarness { runtime: world.node(NodeId(0)), logs, leader: AtomicU64::new(1) };
        let done =
            world.run(NodeId(0), Duration::from_secs(600), async move { conformance::full(&harness).await });
        assert!(done.is_some(), "seed {seed} got stuck");
    }
}

/// A member on a node of its own.
struct Member {
    number: clutch_log::NodeId,
    runtime: Runtime,
    log: Mutex<Option<Arc<dyn Log>>>,
    snapshots: Mutex<Arc<SuiteSnapshots>>,
}

impl Member {
    fn log(&self) -> Arc<dyn Log> {
        self.log.lock().clone().expect("it has begun")
    }

    /// With nothing of its own.
    fn begin(&self, logs: &SimLogs) {
        let snapshots = Arc::new(SuiteSnapshots::default());
        *self.snapshots.lock() = snapshots.clone();
        let all = BTreeSet::from([1, 2, 3]);
        *self.log.lock() = Some(logs.join(&self.runtime, LogId::CDC, self.number, &all, snapshots));
    }
}

/// Members which hear of each other and elect.
struct Elected {
    runtime: Runtime,
    logs: SimLogs,
    members: Vec<Member>,
    cut_off: Mutex<BTreeSet<clutch_log::NodeId>>,
}

impl Elected {
    async fn leads(&self, but: Option<u64>) -> u64 {
        loop {
            let is_there = |leader: &u64| Some(*leader) != but && !self.cut_off.lock().contains(leader);
            if let Some(leader) = self.logs.leader(LogId::CDC).filter(is_there) {
                return leader;
            }
            self.runtime.clock.sleep(Duration::from_millis(10)).await;
        }
    }
}

#[async_trait]
impl Harness for Elected {
    fn runtime(&self) -> Runtime {
        self.runtime.clone()
    }

    async fn leader(&self) -> Arc<dyn Log> {
        // Nobody needs to lead what has ended.
        let any = self.members[0].log();
        if any.status().sealed.is_some() {
            return any;
        }
        let leader = self.leads(None).await;
        self.members.iter().find(|member| member.number == leader).expect("a member leads").log()
    }

    async fn all(&self) -> Vec<Arc<dyn Log>> {
        self.members.iter().map(Member::log).collect()
    }

    async fn change_leader(&self) {
        let old = self.leads(None).await;
        self.logs.set_deaf(LogId::CDC, old, true);
        self.leads(Some(old)).await;
        self.logs.set_deaf(LogId::CDC, old, false);
    }

    async fn restart(&self) -> bool {
        if self.members[0].log().status().sealed.is_none() {
            self.change_leader().await;
        }
        true
    }

    fn any_member_answers(&self) -> bool {
        true
    }

    async fn make_next_unknown(&self, committed: bool) -> bool {
        self.logs.make_next_unknown(LogId::CDC, committed);
        true
    }

    async fn members(&self) -> Vec<Part> {
        self.members.iter().map(|member| Part { node: member.number, log: member.log() }).collect()
    }

    async fn cut_off(&self, node: clutch_log::NodeId, is_cut_off: bool) -> bool {
        self.logs.set_deaf(LogId::CDC, node, is_cut_off);
        let mut cut_off = self.cut_off.lock();
        match is_cut_off {
            true => cut_off.insert(node),
            false => cut_off.remove(&node),
        };
        true
    }

    async fn wipe(&self, node: clutch_log::NodeId) -> bool {
        // What most of them have is outside of them; a member's own is its snapshots, and its place in the log.
        let member = self.members.iter().find(|member| member.number == node).expect("a member");
        member.begin(&self.logs);
        true
    }

    fn restores(&self) -> bool {
        true
    }

    async fn applied(&self, node: clutch_log::NodeId, upto: Position) {
        let member = self.members.iter().find(|member| member.number == node).expect("a member");
        member.snapshots.lock().applied(upto);
    }
}

fn elected(seed: u64) -> (World, Elected) {
    let world = World::new(seed);
    let logs = SimLogs::new();
    let member = |number: u32| {
        let runtime = world.node(NodeId(number));
        Member { number: u64::from(number), runtime, log: Mutex::default(), snapshots: Mutex::default() }
    };
    let members: Vec<Member> = (1..=3).map(member).collect();
    members.iter().for_each(|member| member.begin(&logs));
    let harness = Elected { runtime: world.node(NodeId(0)), logs, members, cut_off: Mutex::default() };
    (world, harness)
}

#[test]
fn members_that_elect_conform() {
    for seed in 0..20 {
        let (world, harness) = elected(seed);
        let done =
            world.run(NodeId(0), Duration::from_secs(600), async move { conformance::full(&harness).await });
        assert!(done.is_some(), "seed {seed} got stuck");
    }
}

#[test]
fn who_resigned_is_not_elected_before_it_opens_the_log_again() {
    for seed in 0..20 {
        let (world, harness) = elected(seed);
        let done = world.run(NodeId(0), Duration::from_secs(600), async move {
            let clock = harness.runtime.clock.clone();
            // Also those that do not lead.
            harness.members[0].log().resign();
            harness.members[1].log().resign();
            for _ in 0..20 {
                assert_eq!(harness.leads(None).await, 3, "the others have resigned");
                harness.logs.depose(LogId::CDC);
                clock.sleep(Duration::from_secs(2)).await;
            }
            harness.members[2].log().resign();
            clock.sleep(Duration::from_secs(10)).await;
            assert_eq!(harness.logs.leader(LogId::CDC), None);
            harness.members[0].begin(&harness.logs);
            assert_eq!(harness.leads(None).await, 1);
        });
        assert!(done.is_some(), "seed {seed} got stuck");
    }
}

#[test]
fn without_most_of_the_members_nothing_is_committed_and_no_barrier_answered() {
    for seed in 0..20 {
        let (world, harness) = elected(seed);
        let done = world.run(NodeId(0), Duration::from_secs(600), async move {
            let leader = harness.leads(None).await;
            let log = harness.leader().await;
            let epoch = log.status().epoch;
            let others = (1..=3).filter(|node| *node != leader);
            others.clone().for_each(|node| harness.logs.set_deaf(LogId::CDC, node, true));
            // Until it is noticed.
            harness.runtime.clock.sleep(Duration::from_secs(1)).await;
            let commit = log.propose(epoch, vec![Bytes::from_static(b"x")]).expect("it still leads");
            let patience = Duration::from_secs(2);
            let barrier = log.read_barrier(patience).await;
            assert!(matches!(barrier, Err(LogFault::NoQuorum { .. })), "{barrier:?}");
            let waited = harness.runtime.timeout(patience, commit).await;
            assert_eq!(waited, None, "nobody else has it");
            others.for_each(|node| harness.logs.set_deaf(LogId::CDC, node, false));
            log.read_barrier(patience).await.expect("there is a quorum again");
        });
        assert!(done.is_some(), "seed {seed} got stuck");
    }
}

#[test]
fn all_who_wait_are_woken_once() {
    let changes = Changes::default();
    let woken = Arc::new(Mutex::new(Vec::new()));
    let world = World::new(1);
    let runtime = world.node(NodeId(0));
    for number in 0..20 {
        let (changes, woken) = (changes.clone(), woken.clone());
        runtime.spawn("waits", async move {
            changes.after(0).await;
            woken.lock().push(number);
        });
    }
    let (clock, told) = (runtime.clock.clone(), changes.clone());
    let done = world.run(NodeId(0), Duration::from_secs(1), async move {
        clock.sleep(Duration::from_millis(1)).await;
        let seen = told.count();
        told.tell();
        assert_eq!(told.count(), seen + 1);
        // It has changed already.
        told.after(seen).await;
        clock.sleep(Duration::from_millis(1)).await;
    });
    assert!(done.is_some());
    let mut woken = woken.lock().clone();
    woken.sort_unstable();
    assert_eq!(woken, (0..20).collect::<Vec<_>>(), "each once");
}
