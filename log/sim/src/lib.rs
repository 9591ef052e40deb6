//! The `sim` log engine: a replicated log in memory with every unpleasant outcome on demand.
//!
//! The records live in the [`SimLogs`] value, outside the nodes: they are what a quorum has made durable. A
//! proposal commits after a drawn delay; a leader change in between decides for each waiting proposal, in order,
//! whether it still commits, and its proposer never learns. Time and draws come from the runtime alone.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use clutch_log::{
    Batch, Bounds, Commit, ConfigId, Epoch, Event, Events, Log, LogFault, LogId, Member, NodeId, Outcome,
    Position, Progress, Rejected, SnapshotRef, Status, check_batch,
};
use clutch_runtime::Runtime;
use parking_lot::Mutex;
use tokio::sync::{oneshot, watch};

/// What can go wrong, and how slow a commit is.
#[derive(Clone, Debug)]
pub struct Faults {
    /// Commits whose proposer never hears of them, per mille.
    pub unknown_committed_permille: u32,
    /// Proposals that vanish and whose proposer never hears of them, per mille.
    pub unknown_lost_permille: u32,
    /// Shortest time from proposal to commit, in microseconds.
    pub commit_us_min: u64,
    /// Longest time from proposal to commit, in microseconds.
    pub commit_us_max: u64,
}

impl Default for Faults {
    fn default() -> Faults {
        Faults {
            unknown_committed_permille: 0,
            unknown_lost_permille: 0,
            commit_us_min: 20,
            commit_us_max: 200,
        }
    }
}

/// All logs of a simulated cluster.
#[derive(Clone, Default)]
pub struct SimLogs {
    groups: Arc<Mutex<BTreeMap<LogId, Arc<Group>>>>,
}

struct Group {
    state: Mutex<State>,
    /// Counts changes; readers wait on it.
    changed: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    /// The record at index i has position i + 1; `None` is a record of the engine.
    records: Vec<(Epoch, Option<Vec<Bytes>>)>,
    epoch: Epoch,
    /// Nobody before the first election, and after a leader has gone without a successor.
    leader: Option<NodeId>,
    epoch_position: Position,
    pending: std::collections::VecDeque<Pending>,
    sealed: Option<Position>,
    floor: Position,
    faults: Faults,
    next_unknown: Option<bool>,
    /// Nodes that hear nothing of the others and do not know it.
    deaf: BTreeSet<NodeId>,
    restore: BTreeMap<NodeId, SnapshotRef>,
}

struct Pending {
    epoch: Epoch,
    entries: Vec<Bytes>,
    decided: Option<oneshot::Sender<Outcome>>,
    vanishes: bool,
}

impl State {
    fn tail(&self) -> Position {
        Position(self.records.len() as u64)
    }

    fn begin_epoch(&mut self, leader: NodeId) {
        self.epoch = Epoch(self.epoch.0 + 1);
        self.leader = Some(leader);
        self.records.push((self.epoch, None));
        self.epoch_position = self.tail();
    }

    fn commit_next(&mut self) {
        let Some(pending) = self.pending.pop_front() else { return };
        if self.sealed.is_some() {
            if let Some(decided) = pending.decided {
                let _ = decided.send(Outcome::Sealed);
            }
            return;
        }
        if pending.vanishes {
            return;
        }
        assert_eq!(pending.epoch, self.epoch, "what was proposed in an earlier reign is gone with it");
        self.records.push((pending.epoch, Some(pending.entries)));
        if let Some(decided) = pending.decided {
            // The proposer may be gone.
            let _ = decided.send(Outcome::Committed(self.tail()));
        }
    }
}

impl SimLogs {
    /// No logs.
    pub fn new() -> SimLogs {
        SimLogs::default()
    }

    fn group(&self, id: LogId) -> Arc<Group> {
        let mut groups = self.groups.lock();
        groups
            .entry(id)
            .or_insert_with(|| Arc::new(Group { state: Mutex::default(), changed: watch::Sender::new(0) }))
            .clone()
    }

    /// A node's handle of a log. Does not make it leader.
    pub fn log(&self, runtime: &Runtime, id: LogId, node: NodeId) -> Arc<dyn Log> {
        Arc::new(SimLog { runtime: runtime.clone(), group: self.group(id), node })
    }

    /// Makes a node the leader in a new epoch. `keep` of the waiting proposals commit first; their proposers and
    /// all others waiting never learn what happened.
    pub fn elect(&self, id: LogId, node: NodeId, keep: usize) {
        let group = self.group(id);
        {
            let mut state = group.state.lock();
            for pending in &mut state.pending {
                pending.decided = None;
            }
            for _ in 0..keep.min(state.pending.len()) {
                state.commit_next();
            }
            state.pending.clear();
            if state.sealed.is_none() {
                state.begin_epoch(node);
            }
        }
        group.changed.send_modify(|c| *c += 1);
    }

    /// Ends the present reign before another begins. What waits is decided by the next election.
    pub fn depose(&self, id: LogId) {
        let group = self.group(id);
        group.state.lock().leader = None;
        group.changed.send_modify(|c| *c += 1);
    }

    /// Sets the faults of a log.
    pub fn set_faults(&self, id: LogId, faults: Faults) {
        self.group(id).state.lock().faults = faults;
    }

    /// Makes the next proposal's outcome unknown.
    pub fn make_next_unknown(&self, id: LogId, committed: bool) {
        self.group(id).state.lock().next_unknown = Some(committed);
    }

    /// Cuts a node's handle off the others, or joins it again. While it is deaf nothing reaches it, what it proposes
    /// is lost with an unknown outcome, and its barriers are not answered: it may still think that it leads.
    pub fn set_deaf(&self, id: LogId, node: NodeId, deaf: bool) {
        let group = self.group(id);
        {
            let mut state = group.state.lock();
            if deaf {
                state.deaf.insert(node);
            } else {
                state.deaf.remove(&node);
            }
        }
        group.changed.send_modify(|c| *c += 1);
    }

    /// A node's readers get this snapshot in mid-stream.
    pub fn restore(&self, id: LogId, node: NodeId, snapshot: SnapshotRef) {
        let group = self.group(id);
        group.state.lock().restore.insert(node, snapshot);
        group.changed.send_modify(|c| *c += 1);
    }
}

struct SimLog {
    runtime: Runtime,
    group: Arc<Group>,
    node: NodeId,
}

#[async_trait]
impl Log for SimLog {
    fn propose(&self, epoch: Epoch, batch: Vec<Bytes>) -> Result<Commit, Rejected> {
        check_batch(&batch)?;
        let mut state = self.group.state.lock();
        if state.deaf.contains(&self.node) {
            // Its sender is dropped: unknown.
            return Ok(Commit::pair().1);
        }
        if state.sealed.is_some() {
            return Err(Rejected::Sealed);
        }
        if state.epoch != epoch || state.leader != Some(self.node) {
            return Err(Rejected::NotLeader { epoch, hint: state.leader });
        }
        let (decided, commit) = Commit::pair();
        let mut pending = Pending { epoch, entries: batch, decided: Some(decided), vanishes: false };
        let drawn = self.runtime.random.below(1000) as u32;
        let faults = state.faults.clone();
        let fate = state.next_unknown.take().or_else(|| {
            if drawn < faults.unknown_committed_permille {
                Some(true)
            } else if drawn < faults.unknown_committed_permille + faults.unknown_lost_permille {
                Some(false)
            } else {
                None
            }
        });
        if let Some(committed) = fate {
            pending.decided = None;
            pending.vanishes = !committed;
        }
        state.pending.push_back(pending);
        let spread = faults.commit_us_max.saturating_sub(faults.commit_us_min) + 1;
        let delay = Duration::from_micros(faults.commit_us_min + self.runtime.random.below(spread));
        drop(state);
        let (runtime, group) = (self.runtime.clone(), self.group.clone());
        self.runtime.spawn("commit", async move {
            runtime.clock.sleep(delay).await;
            {
                let mut state = group.state.lock();
                if state.epoch == epoch && state.leader.is_some() {
                    state.commit_next();
                }
            }
            group.changed.send_modify(|c| *c += 1);
        });
        Ok(commit)
    }

    fn events(&self, from: Position) -> Box<dyn Events> {
        Box::new(SimEvents {
            group: self.group.clone(),
            node: self.node,
            changed: self.group.changed.subscribe(),
            next: from.max(Position(1)),
            told: (Epoch(0), None),
            sealed_told: false,
        })
    }

    async fn read_barrier(&self, patience: Duration) -> Result<Position, LogFault> {
        let waited = self.runtime.timeout(patience, async {
            let mut changed = self.group.changed.subscribe();
            loop {
                {
                    let state = self.group.state.lock();
                    // Whoever leads answers for all, whichever member asks.
                    if !state.deaf.contains(&self.node)
                        && state.leader.is_some_and(|leader| !state.deaf.contains(&leader))
                    {
                        return Ok(state.tail());
                    }
                }
                changed.changed().await.map_err(|_| LogFault::Storage("the simulated log is gone".into()))?;
            }
        });
        waited.await.unwrap_or(Err(LogFault::NoQuorum { waited: patience }))
    }

    async fn seal(&self) -> Result<Position, LogFault> {
        let tail = {
            let mut state = self.group.state.lock();
            match state.sealed {
                Some(tail) => tail,
                None => {
                    let epoch = state.epoch;
                    state.records.push((epoch, None));
                    let tail = state.tail();
                    state.sealed = Some(tail);
                    tail
                }
            }
        };
        self.group.changed.send_modify(|c| *c += 1);
        Ok(tail)
    }

    async fn trim(&self, upto: Position) -> Result<(), LogFault> {
        let mut state = self.group.state.lock();
        state.floor = state.floor.max(upto.min(state.tail()));
        Ok(())
    }

    async fn snapshot_ready(&self, _snapshot: SnapshotRef) {}

    async fn transfer_leader(&self, to: NodeId) -> Result<(), LogFault> {
        {
            let mut state = self.group.state.lock();
            if state.leader != Some(self.node) {
                return Err(LogFault::NotLeader { hint: state.leader });
            }
            if state.sealed.is_some() {
                return Ok(());
            }
            while !state.pending.is_empty() {
                state.commit_next();
            }
            state.begin_epoch(to);
        }
        self.group.changed.send_modify(|c| *c += 1);
        Ok(())
    }

    fn resign(&self) {
        {
            let mut state = self.group.state.lock();
            if state.leader != Some(self.node) {
                return;
            }
            state.leader = None;
        }
        self.group.changed.send_modify(|c| *c += 1);
    }

    async fn reconfigure(&self, _expect: ConfigId, _members: Vec<Member>) -> Result<ConfigId, LogFault> {
        Err(LogFault::Unsupported("every node of the simulation is a member".into()))
    }

    fn status(&self) -> Status {
        let state = self.group.state.lock();
        let bounds = Bounds { first: state.floor.next(), last: state.tail() };
        let member = Member { node: self.node, voter: true };
        Status {
            epoch: state.epoch,
            leader: state.leader,
            is_self: state.leader == Some(self.node),
            bounds,
            sealed: state.sealed,
            config: ConfigId::default(),
            members: vec![Progress { member, matched: Some(bounds.last) }],
            queued_bytes: state.pending.iter().flat_map(|p| &p.entries).map(|e| e.len() as u64).sum(),
            fault: None,
        }
    }
}

struct SimEvents {
    group: Arc<Group>,
    node: NodeId,
    changed: watch::Receiver<u64>,
    next: Position,
    /// The reign that was told last, and who was said to lead in it.
    told: (Epoch, Option<NodeId>),
    sealed_told: bool,
}

impl SimEvents {
    fn ready(&mut self) -> Result<Option<Event>, LogFault> {
        self.changed.borrow_and_update();
        let mut state = self.group.state.lock();
        if state.deaf.contains(&self.node) {
            return Ok(None);
        }
        if let Some(snapshot) = state.restore.remove(&self.node) {
            self.next = snapshot.position.next();
            return Ok(Some(Event::Restore(snapshot)));
        }
        if self.next <= state.floor {
            return Err(LogFault::Trimmed { asked: self.next, first: state.floor.next() });
        }
        let (told, leader) = self.told;
        if leader == Some(self.node) && (told < state.epoch || state.leader != leader) {
            self.told = (told, None);
            return Ok(Some(Event::Leader { epoch: told, leader: None, is_self: false }));
        }
        let begins = told < state.epoch && self.next > state.epoch_position;
        if begins || told == state.epoch && leader != state.leader {
            self.told = (state.epoch, state.leader);
            let is_self = state.leader == Some(self.node);
            return Ok(Some(Event::Leader { epoch: state.epoch, leader: state.leader, is_self }));
        }
        if let Some((epoch, record)) = state.records.get(self.next.0 as usize - 1) {
            let position = self.next;
            self.next = position.next();
            return Ok(Some(match record {
                Some(entries) => {
                    Event::Committed(Batch { position, epoch: *epoch, entries: entries.clone() })
                }
                None => Event::Gap { to: position },
            }));
        }
        if let Some(tail) = state.sealed
            && !self.sealed_told
        {
            self.sealed_told = true;
            return Ok(Some(Event::Sealed { tail }));
        }
        Ok(None)
    }
}

#[async_trait]
impl Events for SimEvents {
    async fn next(&mut self) -> Result<Event, LogFault> {
        loop {
            if let Some(event) = self.ready()? {
                return Ok(event);
            }
            self.changed
                .changed()
                .await
                .map_err(|_| LogFault::Storage("the simulated log is gone".into()))?;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use clutch_log::conformance::{self, Harness};
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
    }

    #[test]
    fn conforms() {
        for seed in 0..20 {
            let world = World::new(seed);
            let logs = SimLogs::new();
            logs.elect(LogId::CDC, 1, 0);
            let harness = SimHarness { runtime: world.node(NodeId(0)), logs, leader: AtomicU64::new(1) };
            let done = world
                .run(NodeId(0), Duration::from_secs(600), async move { conformance::full(&harness).await });
            assert!(done.is_some(), "seed {seed} got stuck");
        }
    }
}
