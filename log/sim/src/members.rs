//! The members of a simulated group: who is there, who may lead, and how late those learn that do not.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use clutch_log::{Epoch, Log, LogletId, NodeId, Position, Snapshots};
use clutch_runtime::Runtime;

use crate::{SimLog, SimLogs};

/// How often a member is heard of.
pub(crate) const BEAT: Duration = Duration::from_millis(50);
/// After so long without a word a member is not there.
const SILENCE: Duration = Duration::from_millis(250);
/// Between these a member waits for a leader that is not there before it stands for election.
const ELECTION_MS: (u64, u64) = (250, 600);
/// A follower learns of what there is at most so much later, but for once in a few hundred times.
const LATE_US_MAX: u64 = 5_000;
const VERY_LATE_MS_MAX: u64 = 1_500;

/// Who was heard of, and when; none where nobody joined.
#[derive(Default)]
pub(crate) struct Members {
    /// All that the group has, whether they are there or not.
    all: BTreeSet<NodeId>,
    heard: BTreeMap<NodeId, Duration>,
    /// Up to where each needs nothing any more.
    floors: BTreeMap<NodeId, Position>,
    /// What each can be restored from, and others from it.
    snapshots: BTreeMap<NodeId, Arc<dyn Snapshots>>,
}

impl Members {
    pub(crate) fn is_there(&self, node: NodeId, now: Duration) -> bool {
        self.heard.get(&node).is_some_and(|heard| now.saturating_sub(*heard) < SILENCE)
    }

    fn has_quorum(&self, now: Duration) -> bool {
        let there = self.heard.keys().filter(|node| self.is_there(**node, now)).count();
        there > self.all.len() / 2
    }

    /// Whether a leader's word counts: always where there are no members.
    pub(crate) fn is_led_by(&self, leader: NodeId, now: Duration) -> bool {
        self.all.is_empty() || self.is_there(leader, now) && self.has_quorum(now)
    }

    /// A member needs nothing up to there. Returns up to where most of the members need nothing: real ones trim what they have
    /// themselves, and what one has trimmed the others still have.
    pub(crate) fn trimmed(&mut self, node: NodeId, upto: Position) -> Position {
        if self.all.is_empty() {
            return upto;
        }
        let floor = self.floors.entry(node).or_default();
        *floor = upto.max(*floor);
        let mut floors: Vec<Position> =
            self.all.iter().map(|member| self.floors.get(member).copied().unwrap_or_default()).collect();
        floors.sort_unstable_by(|a, b| b.cmp(a));
        floors[self.all.len() / 2]
    }

    /// Whether a member may get a snapshot of another.
    pub(crate) fn may_restore(&self, node: NodeId) -> bool {
        self.all.len() > 1 && self.snapshots.contains_key(&node)
    }

    pub(crate) fn snapshots(&self, node: NodeId) -> Option<Arc<dyn Snapshots>> {
        self.snapshots.get(&node).cloned()
    }

    /// The members that are there, but for one.
    pub(crate) fn others(&self, node: NodeId, now: Duration) -> Vec<NodeId> {
        self.all.iter().copied().filter(|other| *other != node && self.is_there(*other, now)).collect()
    }

    pub(crate) fn nodes(&self) -> BTreeSet<NodeId> {
        self.all.clone()
    }

    /// Whether there are members that hear of each other.
    pub(crate) fn has_any(&self) -> bool {
        !self.all.is_empty()
    }
}

/// How much later a follower learns of what there is.
pub(crate) fn lateness(runtime: &Runtime) -> Duration {
    match runtime.random.below(300) {
        0 => Duration::from_millis(runtime.random.below(VERY_LATE_MS_MAX)),
        _ => Duration::from_micros(runtime.random.below(LATE_US_MAX)),
    }
}

impl SimLogs {
    /// A node's handle of a log of which it is one of `all` members. It takes part until its node stops.
    pub fn join(
        &self,
        runtime: &Runtime,
        id: impl Into<LogletId>,
        node: NodeId,
        all: &BTreeSet<NodeId>,
        snapshots: Arc<dyn Snapshots>,
    ) -> Arc<dyn Log> {
        self.join_as(runtime, id.into(), node, all, snapshots, true)
    }

    /// The same, perhaps as one that does not lead.
    pub(crate) fn join_as(
        &self,
        runtime: &Runtime,
        id: LogletId,
        node: NodeId,
        all: &BTreeSet<NodeId>,
        snapshots: Arc<dyn Snapshots>,
        may_lead: bool,
    ) -> Arc<dyn Log> {
        assert!(all.contains(&node), "node {node} is none of {all:?}");
        let group = self.group(id);
        {
            let mut state = group.state.lock();
            state.members.all = all.clone();
            state.members.snapshots.insert(node, snapshots);
            state.resigned.remove(&node);
            // Whoever starts again does not lead: what it had proposed is decided by the next election.
            if state.leader == Some(node) {
                state.leader = None;
            }
        }
        group.changed.tell();
        let seam = runtime.clone();
        runtime.spawn("log member", async move {
            let draw = |seam: &Runtime| {
                let (least, most) = ELECTION_MS;
                Duration::from_millis(least + seam.random.below(most - least))
            };
            let mut patience = draw(&seam);
            let mut led_at = seam.clock.monotonic();
            loop {
                seam.clock.sleep(BEAT).await;
                let now = seam.clock.monotonic();
                let is_elected = {
                    let mut state = group.state.lock();
                    if state.deaf.contains(&node) {
                        led_at = now;
                        continue;
                    }
                    state.members.heard.insert(node, now);
                    if state.leader.is_some_and(|leader| state.members.is_there(leader, now)) {
                        led_at = now;
                    }
                    let may_lead = may_lead && state.sealed.is_none() && !state.resigned.contains(&node);
                    let stands = may_lead && now.saturating_sub(led_at) > patience;
                    let is_elected = stands && state.members.has_quorum(now);
                    if is_elected {
                        seam.note(match state.leader {
                            Some(leader) if leader == node => "log: a member is elected again",
                            None if state.epoch == Epoch(0) => "log: a member is elected first",
                            _ => "log: another member is elected",
                        });
                        let keep = seam.random.below(3) as usize;
                        state.elect(node, keep);
                        (led_at, patience) = (now, draw(&seam));
                    }
                    is_elected
                };
                if is_elected {
                    group.changed.tell();
                }
            }
        });
        Arc::new(SimLog { runtime: runtime.clone(), group: self.group(id), node })
    }
}
