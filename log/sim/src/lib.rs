//! The `sim` log engine: a replicated log in memory with every unpleasant outcome on demand.
//!
//! The records live in the [`SimLogs`] value, outside the nodes: they are what a quorum has made durable. A
//! proposal commits after a drawn delay; a leader change in between decides for each waiting proposal, in order,
//! whether it still commits, and its proposer never learns. Time and draws come from the runtime alone.
//!
//! Who opens a log with [`SimLogs::log`] does not lead before [`SimLogs::elect`] says so. Who joins one with [`SimLogs::join`]
//! is a member like those of a real group: the members hear of each other, elect one of themselves when the leader is not
//! heard of any more, commit only while most of them are there, and those that do not lead learn of everything later.

mod changes;
mod engine;
mod members;
mod restore;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use clutch_log::{
    Batch, Bounds, Commit, ConfigId, Epoch, Event, Events, Floors, Log, LogFault, LogletId, Manifest, Member,
    NodeId, Outcome, Position, Progress, Refused, Rejected, Status, check_batch,
};
use clutch_runtime::{BoxFuture, Runtime};
use parking_lot::Mutex;
use tokio::sync::oneshot;

use changes::Changes;
pub use engine::{Keepers, KeepersOf, SimEngine};
use members::Members;

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
    groups: Arc<Mutex<BTreeMap<LogletId, Arc<Group>>>>,
}

struct Group {
    state: Mutex<State>,
    changed: Changes,
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
    /// Nodes that have resigned and not opened the log again.
    resigned: BTreeSet<NodeId>,
    members: Members,
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

    fn elect(&mut self, node: NodeId, keep: usize) {
        let keep = keep.min(self.pending.len());
        for pending in self.pending.iter_mut().take(keep) {
            pending.decided = None;
        }
        for _ in 0..keep {
            self.commit_next();
        }
        // What is lost for certain: a leader that hears of its successor may know that, or not.
        let hears = self.leader.is_some_and(|leader| !self.deaf.contains(&leader));
        for (index, pending) in self.pending.drain(..).enumerate() {
            if let Some(decided) = pending.decided.filter(|_| hears && index % 2 == 0) {
                // The proposer may be gone.
                let _ = decided.send(Outcome::Refused(Refused::NotLeader { hint: Some(node) }));
            }
        }
        if self.sealed.is_none() {
            self.begin_epoch(node);
        }
    }

    /// Whether what the leader says counts: it is there, and so are most of the members, as far as there are any.
    fn is_led(&self, now: Duration) -> bool {
        self.leader.is_some_and(|leader| !self.deaf.contains(&leader) && self.members.is_led_by(leader, now))
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

    fn group(&self, id: impl Into<LogletId>) -> Arc<Group> {
        let mut groups = self.groups.lock();
        groups
            .entry(id.into())
            .or_insert_with(|| Arc::new(Group { state: Mutex::default(), changed: Changes::default() }))
            .clone()
    }

    /// A node's handle of a log. Does not make it leader.
    pub fn log(&self, runtime: &Runtime, id: impl Into<LogletId>, node: NodeId) -> Arc<dyn Log> {
        Arc::new(SimLog { runtime: runtime.clone(), group: self.group(id), node })
    }

    /// The last position of a log that is gone.
    pub fn trimmed(&self, id: impl Into<LogletId>) -> Position {
        self.group(id).state.lock().floor
    }

    /// The leader of a log, as whoever sees everything knows it.
    pub fn leader(&self, id: impl Into<LogletId>) -> Option<NodeId> {
        self.group(id).state.lock().leader
    }

    /// Makes a node the leader in a new epoch. `keep` of the waiting proposals commit first; their proposers and
    /// all others waiting never learn what happened.
    pub fn elect(&self, id: impl Into<LogletId>, node: NodeId, keep: usize) {
        let group = self.group(id);
        group.state.lock().elect(node, keep);
        group.changed.tell();
    }

    /// Ends the present reign before another begins. What waits is decided by the next election.
    pub fn depose(&self, id: impl Into<LogletId>) {
        let group = self.group(id);
        group.state.lock().leader = None;
        group.changed.tell();
    }

    /// Sets the faults of a log.
    pub fn set_faults(&self, id: impl Into<LogletId>, faults: Faults) {
        self.group(id).state.lock().faults = faults;
    }

    /// Makes the next proposal's outcome unknown.
    pub fn make_next_unknown(&self, id: impl Into<LogletId>, committed: bool) {
        self.group(id).state.lock().next_unknown = Some(committed);
    }

    /// Cuts a node's handle off the others, or joins it again. While it is deaf nothing reaches it, what it proposes
    /// is lost with an unknown outcome, and its barriers are not answered: it may still think that it leads.
    pub fn set_deaf(&self, id: impl Into<LogletId>, node: NodeId, deaf: bool) {
        let group = self.group(id);
        {
            let mut state = group.state.lock();
            if deaf {
                state.deaf.insert(node);
            } else {
                state.deaf.remove(&node);
            }
        }
        group.changed.tell();
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
            loop {
                {
                    let mut state = group.state.lock();
                    if state.epoch != epoch || state.leader.is_none() {
                        break;
                    }
                    if state.is_led(runtime.clock.monotonic()) {
                        state.commit_next();
                        break;
                    }
                }
                // Most of the members are not there: it waits for them, or for another leader.
                runtime.note("log: a proposal waits for a quorum");
                runtime.clock.sleep(members::BEAT).await;
            }
            group.changed.tell();
        });
        Ok(commit)
    }

    fn events(&self, from: Position) -> Box<dyn Events> {
        Box::new(SimEvents {
            runtime: self.runtime.clone(),
            group: self.group.clone(),
            node: self.node,
            seen: 0,
            visible: Position(0),
            due: None,
            next: from.max(Position(1)),
            told: (Epoch(0), None),
            sealed_told: false,
            restoring: None,
        })
    }

    async fn read_barrier(&self, patience: Duration) -> Result<Position, LogFault> {
        let waited = self.runtime.timeout(patience, async {
            loop {
                let seen = self.group.changed.count();
                {
                    let state = self.group.state.lock();
                    // Whoever leads answers for all, whichever member asks.
                    if !state.deaf.contains(&self.node) && state.is_led(self.runtime.clock.monotonic()) {
                        return state.tail();
                    }
                }
                // Who is there changes with time alone.
                let _ = self.runtime.timeout(members::BEAT, self.group.changed.after(seen)).await;
            }
        });
        waited.await.ok_or(LogFault::NoQuorum { waited: patience })
    }

    async fn seal(&self) -> Result<Position, LogFault> {
        let tail = {
            let mut state = self.group.state.lock();
            if state.deaf.contains(&self.node) {
                return Err(LogFault::NoQuorum { waited: Duration::ZERO });
            }
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
        self.group.changed.tell();
        Ok(tail)
    }

    async fn set_floors(&self, floors: Floors) -> Result<(), LogFault> {
        let mut state = self.group.state.lock();
        floors.check(state.tail()).unwrap_or_else(|what| panic!("floors of node {}: {what}", self.node));
        let floor = state.members.trimmed(self.node, floors.trim());
        state.floor = state.floor.max(floor);
        assert!(state.floor <= state.tail(), "what is trimmed was there");
        Ok(())
    }

    async fn transfer_leader(&self, to: NodeId) -> Result<(), LogFault> {
        {
            let mut state = self.group.state.lock();
            if state.leader != Some(self.node) {
                return Err(LogFault::NotLeader { hint: state.leader });
            }
            if !state.is_led(self.runtime.clock.monotonic()) {
                return Err(LogFault::NoQuorum { waited: Duration::ZERO });
            }
            if state.sealed.is_some() {
                return Ok(());
            }
            while !state.pending.is_empty() {
                state.commit_next();
            }
            state.begin_epoch(to);
        }
        self.group.changed.tell();
        Ok(())
    }

    fn resign(&self) {
        {
            let mut state = self.group.state.lock();
            state.resigned.insert(self.node);
            // The others do not hear of it from who is cut off.
            if state.leader != Some(self.node) || state.deaf.contains(&self.node) {
                return;
            }
            state.leader = None;
        }
        self.group.changed.tell();
    }

    async fn reconfigure(&self, _expect: ConfigId, _members: Vec<Member>) -> Result<ConfigId, LogFault> {
        Err(LogFault::Unsupported("the members of a simulated log are fixed".into()))
    }

    fn status(&self) -> Status {
        let state = self.group.state.lock();
        let bounds = Bounds { first: state.floor.next(), last: state.tail() };
        let mut nodes = state.members.nodes();
        nodes.extend(state.leader);
        nodes.insert(self.node);
        let members = nodes.into_iter().map(|node| {
            let matched = (node == self.node).then_some(bounds.last);
            let is_heard = !state.deaf.contains(&node) && !state.resigned.contains(&node);
            Progress {
                member: Member { node, voter: true },
                matched,
                is_heard: is_heard || node == self.node,
            }
        });
        // Who is cut off knows no other leader.
        let is_known = !state.deaf.contains(&self.node) || state.leader == Some(self.node);
        Status {
            epoch: state.epoch,
            leader: state.leader.filter(|_| is_known),
            is_self: state.leader == Some(self.node),
            bounds,
            sealed: state.sealed,
            config: ConfigId::default(),
            members: members.collect(),
            changes_kept: 0,
            queued_bytes: state.pending.iter().flat_map(|p| &p.entries).map(|e| e.len() as u64).sum(),
            fault: None,
        }
    }
}

struct SimEvents {
    runtime: Runtime,
    group: Arc<Group>,
    node: NodeId,
    /// How many changes there were at the last look.
    seen: u64,
    /// Up to where a follower knows the log.
    visible: Position,
    /// Up to where it will know it, and when.
    due: Option<(Position, Duration)>,
    next: Position,
    /// The reign that was told last, and who was said to lead in it.
    told: (Epoch, Option<NodeId>),
    sealed_told: bool,
    /// A snapshot is being received.
    restoring: Option<BoxFuture<Manifest>>,
}

impl SimEvents {
    fn ready(&mut self) -> Result<Option<Event>, LogFault> {
        self.seen = self.group.changed.count();
        let state = self.group.state.lock();
        if state.deaf.contains(&self.node) {
            return Ok(None);
        }
        if self.next <= state.floor {
            if state.members.may_restore(self.node) {
                let (runtime, group) = (self.runtime.clone(), self.group.clone());
                self.restoring = Some(Box::pin(restore::restored(runtime, group, self.node)));
                return Ok(None);
            }
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
            if state.leader != Some(self.node) && position > self.visible && state.members.has_any() {
                let now = self.runtime.clock.monotonic();
                let upto = state.tail();
                let (upto, due) =
                    *self.due.get_or_insert_with(|| (upto, now + members::lateness(&self.runtime)));
                if due > now {
                    return Ok(None);
                }
                (self.visible, self.due) = (upto, None);
            }
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
            // It goes on where it was when the future before was dropped.
            if let Some(restoring) = &mut self.restoring {
                let manifest = restoring.await;
                self.restoring = None;
                self.next = manifest.position.next();
                return Ok(Event::Restore(manifest));
            }
            if let Some(event) = self.ready()? {
                return Ok(event);
            }
            if self.restoring.is_some() {
                continue;
            }
            let changed = self.group.changed.after(self.seen);
            let now = self.runtime.clock.monotonic();
            match self.due.filter(|(_, due)| *due > now) {
                // Dropping this loses nothing: when it is due is kept.
                Some((_, due)) => self.runtime.timeout(due - now, changed).await.unwrap_or_default(),
                None => changed.await,
            }
        }
    }
}

#[cfg(test)]
mod tests;
