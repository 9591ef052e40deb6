//! The conformance suite on logs that are led as they are told to, and on members that elect their leaders.

use std::sync::atomic::{AtomicU64, Ordering};

use clutch_log::{
    Chain, Engines, LogId,
    conformance::{self, Harness, Part, SuiteSnapshots},
};
use clutch_proto::registry;
use clutch_runtime::simulated::{NodeId, World};

use futures_util::FutureExt as _;

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
    fn begin(&self, logs: &SimLogs, chain: &Chain) {
        let snapshots = Arc::new(SuiteSnapshots::default());
        *self.snapshots.lock() = snapshots.clone();
        let engine = SimEngine {
            logs: logs.clone(),
            runtime: self.runtime.clone(),
            node: self.number,
            keepers: Arc::new(|_| Keepers::Members(BTreeSet::from([1, 2, 3]))),
        };
        let engines = Engines::one("sim", Arc::new(engine));
        let opened = engines.open(chain.clone(), snapshots).now_or_never().expect("nothing to wait for");
        *self.log.lock() = Some(opened.expect("opens"));
    }
}

/// Members which hear of each other and elect.
struct Elected {
    runtime: Runtime,
    logs: SimLogs,
    chain: Chain,
    members: Vec<Member>,
    cut_off: Mutex<BTreeSet<clutch_log::NodeId>>,
}

impl Elected {
    /// What is appended to.
    fn id(&self) -> LogletId {
        self.chain.ids().last().expect("a chain has a loglet")
    }

    async fn leads(&self, but: Option<u64>) -> u64 {
        loop {
            let is_there = |leader: &u64| Some(*leader) != but && !self.cut_off.lock().contains(leader);
            if let Some(leader) = self.logs.leader(self.id()).filter(is_there) {
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
        self.logs.set_deaf(self.id(), old, true);
        self.leads(Some(old)).await;
        self.logs.set_deaf(self.id(), old, false);
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
        self.logs.make_next_unknown(self.id(), committed);
        true
    }

    async fn members(&self) -> Vec<Part> {
        self.members.iter().map(|member| Part { node: member.number, log: member.log() }).collect()
    }

    async fn cut_off(&self, node: clutch_log::NodeId, is_cut_off: bool) -> bool {
        self.logs.set_deaf(self.id(), node, is_cut_off);
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
        member.begin(&self.logs, &self.chain);
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
    elected_on(World::new(seed), SimLogs::new(), Chain::first(LogId::CDC, "sim"))
}

fn elected_on(world: World, logs: SimLogs, chain: Chain) -> (World, Elected) {
    let member = |number: u32| {
        let runtime = world.node(NodeId(number));
        Member { number: u64::from(number), runtime, log: Mutex::default(), snapshots: Mutex::default() }
    };
    let members: Vec<Member> = (1..=3).map(member).collect();
    members.iter().for_each(|member| member.begin(&logs, &chain));
    let harness = Elected { runtime: world.node(NodeId(0)), logs, chain, members, cut_off: Mutex::default() };
    (world, harness)
}

/// A log whose first life was sealed, and whose second was given up two records behind what counts of it.
fn lives(world: &World, logs: &SimLogs) -> Chain {
    let runtime = world.node(NodeId(0));
    let (logs, id) = (logs.clone(), |incarnation| LogletId { log: LogId::CDC, incarnation });
    let bases = world.run(NodeId(0), Duration::from_secs(60), async move {
        let mut tails = Vec::new();
        for (incarnation, count) in [(1, 20), (2, 10)] {
            logs.elect(id(incarnation), 1, 0);
            let log = logs.log(&runtime, id(incarnation), 1);
            for number in 0..count {
                let text = Bytes::from(format!("{incarnation}: {number}"));
                let outcome = log.propose(log.status().epoch, vec![text]).expect("leads").await;
                assert!(matches!(outcome, Outcome::Committed(_)), "{outcome:?}");
            }
            if incarnation == 1 {
                log.seal().await.expect("seals");
            }
            tails.push(log.status().bounds.last.0);
        }
        (tails[0], tails[0] + tails[1] - 2)
    });
    let (sealed, given_up) = bases.expect("ends");
    let segment = |(incarnation, base_position)| registry::Segment {
        base_position,
        engine: "sim".into(),
        parameters: String::new(),
        incarnation,
    };
    let wire = registry::Chain { segments: [(1, 0), (2, sealed), (5, given_up)].map(segment).to_vec() };
    Chain::from_wire(LogId::CDC, &wire).expect("a good chain")
}

#[test]
fn members_conform_behind_other_lives() {
    for seed in 0..20 {
        let (world, logs) = (World::new(seed), SimLogs::new());
        let chain = lives(&world, &logs);
        let (world, harness) = elected_on(world, logs, chain);
        let done =
            world.run(NodeId(0), Duration::from_secs(600), async move { conformance::full(&harness).await });
        assert!(done.is_some(), "seed {seed} got stuck");
    }
}

#[test]
fn who_lacks_what_was_trimmed_of_an_earlier_life_is_restored_into_a_later_one() {
    for seed in 0..20 {
        let (world, logs) = (World::new(seed), SimLogs::new());
        let chain = lives(&world, &logs);
        let newest = chain.newest().base;
        let (world, harness) = elected_on(world, logs, chain);
        let done = world.run(NodeId(0), Duration::from_secs(600), async move {
            let leader = harness.leader().await;
            let last = loop {
                let proposed = leader.propose(leader.status().epoch, vec![Bytes::from_static(b"5: 0")]);
                match proposed.expect("leads").await {
                    Outcome::Committed(position) => break position,
                    _ => harness.runtime.clock.sleep(Duration::from_millis(20)).await,
                }
            };
            assert!(last > newest, "{last} is behind the earlier lives, which end at {newest}");
            // In the middle of the first life, at its end, in the second, and everything.
            for floor in [7, 22, 25, last.0] {
                for member in &harness.members {
                    member.snapshots.lock().applied(Position(floor));
                    let all = Position(floor);
                    let floors = Floors { retain: all, snapshot: all, flushed: all };
                    member.log().set_floors(floors).await.expect("trims");
                }
                assert_eq!(leader.status().bounds.first, Position(floor).next());
                for member in &harness.members {
                    let mut events = member.log().events(Position(3));
                    let restored = loop {
                        match harness.runtime.timeout(Duration::from_secs(60), events.next()).await {
                            Some(Ok(Event::Restore(manifest))) => break manifest.position,
                            Some(Ok(Event::Leader { .. })) => {}
                            other => panic!("seed {seed}, trimmed up to {floor}: {other:?}"),
                        }
                    };
                    assert!(restored >= Position(floor) && restored <= last, "{restored} for {floor}");
                    let mut at = restored;
                    while at < last {
                        match events.next().await.expect("events") {
                            Event::Committed(batch) => {
                                assert_eq!(batch.position, at.next(), "nothing is left out");
                                at = batch.position;
                            }
                            Event::Gap { to } => at = to.max(at),
                            _ => {}
                        }
                    }
                }
            }
        });
        assert!(done.is_some(), "seed {seed} got stuck");
    }
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
                harness.logs.depose(harness.id());
                clock.sleep(Duration::from_secs(2)).await;
            }
            harness.members[2].log().resign();
            clock.sleep(Duration::from_secs(10)).await;
            assert_eq!(harness.logs.leader(harness.id()), None);
            harness.members[0].begin(&harness.logs, &harness.chain);
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
            others.clone().for_each(|node| harness.logs.set_deaf(harness.id(), node, true));
            // Until it is noticed.
            harness.runtime.clock.sleep(Duration::from_secs(1)).await;
            let commit = log.propose(epoch, vec![Bytes::from_static(b"x")]).expect("it still leads");
            let patience = Duration::from_secs(2);
            let barrier = log.read_barrier(patience).await;
            assert!(matches!(barrier, Err(LogFault::NoQuorum { .. })), "{barrier:?}");
            let waited = harness.runtime.timeout(patience, commit).await;
            assert_eq!(waited, None, "nobody else has it");
            others.for_each(|node| harness.logs.set_deaf(harness.id(), node, false));
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
