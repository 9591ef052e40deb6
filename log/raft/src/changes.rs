//! What a member does besides taking proposals: it forgets, gives up its reign, and changes who belongs to the group.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use clutch_log::{ConfigId, Floors, LogFault, NodeId, Position};
use clutch_log_store::MEMBERS_MAX;
use clutch_proto::mutants::{self, Mutant};
use openraft::{
    ChangeMembers, EmptyNode, Instant as _, RaftMetrics,
    async_runtime::WatchReceiver as _,
    errors::{ClientWriteError, RaftError},
    raft::Precondition,
};

use crate::{
    member::{Member, Parts, storage},
    network::meta_of,
    types::{TypeConfig, index_of, position_of},
};

/// Members of one log.
const NODES_OF_LOG_MAX: usize = 16;
/// How long one step of a change of members may take to be committed; what comes of it later is seen then.
const CHANGE_PATIENCE: Duration = Duration::from_secs(10);
/// Who is handed a reign lacks no more entries than this.
const HAND_OVER_LAG_MAX: u64 = 4096;
/// Records that one change of members may take.
const CHANGE_RECORDS_MAX: usize = 4;
/// A member that has not answered for so long is not counted on when members change.
const HEARD_WITHIN: Duration = Duration::from_secs(2);
/// How long a change of what openraft does may take before it is done later.
const TRIGGER_PATIENCE: Duration = Duration::from_secs(2);

/// Names the present members by the record that says who they are.
pub(crate) fn config_of(metrics: &RaftMetrics<TypeConfig>) -> ConfigId {
    let id = metrics.membership_config.log_id();
    ConfigId(id.map_or(0, |id| position_of(id.index).0))
}

impl Member {
    /// Forgets what the replica needs no more, as far as it has a snapshot of it.
    pub(crate) async fn trim(&self, floors: Floors) -> Result<(), LogFault> {
        let Parts { delivered, log, runtime, .. } = &self.parts;
        let (last, _) = delivered.last();
        // What the replica has on its disk is committed, also when that is not known here yet, after a start.
        let committed = last.max(log.group().view().last);
        floors.check(committed).unwrap_or_else(|what| panic!("floors of {}: {what}", self.parts.id));
        let trim = match mutants::is(Mutant::PurgedAboveFloor) {
            true => last,
            false => floors.trim().min(last),
        };
        let Some(index) = index_of(trim) else { return Ok(()) };
        if log.purged().is_none_or(|purged| purged.index < index) {
            let id = log.id_at(index).map_err(storage)?;
            let id = id.ok_or_else(|| storage(format!("no record at {trim}, which is to be trimmed")))?;
            delivered.has_snapshot(meta_of(id, log.members_at(index).map_err(storage)?));
            self.raft.trigger().snapshot().await.map_err(storage)?;
            let is_known = |metrics: &RaftMetrics<TypeConfig>| metrics.snapshot >= Some(id);
            if self.until(is_known).await {
                self.raft.trigger().purge_log(index).await.map_err(storage)?;
                // While others are sent what is to be trimmed, it stays; it is asked for again with the next floors.
                if !self.until(|metrics| metrics.purged >= Some(id)).await {
                    runtime.note("raft: a purge waits");
                }
            }
        }
        let purged = log.purged().map_or(Position(0), |purged| position_of(purged.index));
        log.group().set_floor(purged.min(trim)).await
    }

    /// Waits for something that openraft does in its time; false where that takes long.
    async fn until(&self, is_so: impl Fn(&RaftMetrics<TypeConfig>) -> bool + Send + Sync) -> bool {
        let mut metrics = self.raft.metrics();
        let waited = async {
            loop {
                if is_so(&metrics.borrow_watched()) {
                    return true;
                }
                if metrics.changed().await.is_err() {
                    return false;
                }
            }
        };
        self.parts.runtime.timeout(TRIGGER_PATIENCE, waited).await.unwrap_or(false)
    }

    pub(crate) fn resign(&self) {
        self.retire();
        let Some(term) = self.leading() else { return };
        self.give_up(term);
        // The others hear nothing more of it, and elect another.
        self.raft.runtime_config().heartbeat(false);
        if let Some(other) = self.most_recent(&self.metrics()) {
            let raft = self.raft.clone();
            self.parts.runtime.spawn("raft resign", async move {
                // One that cannot be told will hear nothing.
                let _ = raft.trigger().transfer_leader(other).await;
            });
        }
    }

    /// This node does not stand for a reign of its own any more.
    pub(crate) fn give_up(&self, term: u64) {
        *self.resigned.lock() = Some(term);
        self.resigning.send_replace(true);
    }

    /// The other voter that is heard and has most of the log.
    pub(crate) fn most_recent(&self, metrics: &RaftMetrics<TypeConfig>) -> Option<NodeId> {
        let members = self.members(metrics).into_iter();
        let others = members.filter(|p| p.member.voter && p.member.node != self.node() && p.is_heard);
        others.max_by_key(|progress| progress.matched).map(|progress| progress.member.node)
    }

    /// Adds who is new, then lets those vote that are to, then lets those go that are none any more.
    pub(crate) async fn reconfigure(
        &self,
        expect: ConfigId,
        members: &[clutch_log::Member],
    ) -> Result<ConfigId, LogFault> {
        if self.leading().is_none() {
            return Err(LogFault::NotLeader { hint: self.hint() });
        }
        let voters: BTreeSet<NodeId> = members.iter().filter(|m| m.voter).map(|m| m.node).collect();
        if voters.is_empty() {
            return Err(LogFault::Unsupported("a log needs a member that votes".into()));
        }
        if !voters.contains(&self.node()) {
            return Err(LogFault::Unsupported(format!(
                "node {} leads the log and is to be no voter of it: let another lead first",
                self.node()
            )));
        }
        if members.len() > NODES_OF_LOG_MAX {
            return Err(LogFault::Unsupported(format!(
                "{} members: a log has at most {NODES_OF_LOG_MAX}",
                members.len()
            )));
        }
        let metrics = self.metrics();
        // What goes beyond would end the group on every member; a trim makes room.
        let kept = self.parts.log.group().view().members.len();
        if kept + CHANGE_RECORDS_MAX >= MEMBERS_MAX {
            return Err(LogFault::NoRoom(format!(
                "{kept} changes of members are in the log, which keeps {MEMBERS_MAX}: take a checkpoint and trim the log first"
            )));
        }
        let present = config_of(&metrics);
        if present != expect {
            let (has, wants) = (present.0, expect.0);
            return Err(LogFault::Unsupported(format!(
                "the members are those of configuration {has}, and not of {wants}: look again"
            )));
        }
        let known: BTreeSet<NodeId> = metrics.membership_config.nodes().map(|(node, _)| *node).collect();
        let wanted: BTreeSet<NodeId> = members.iter().map(|member| member.node).collect();
        let mut id = *metrics.membership_config.log_id();
        let new: BTreeMap<NodeId, EmptyNode> =
            wanted.difference(&known).map(|node| (*node, EmptyNode {})).collect();
        let voting: BTreeSet<NodeId> = metrics.membership_config.voter_ids().collect();
        // One that an earlier leader did not come to the end of.
        let is_between = metrics.membership_config.membership().get_joint_config().len() > 1;
        self.check_new(&metrics, voters.difference(&voting).copied())?;
        let gone: BTreeSet<NodeId> = known.difference(&wanted).copied().collect();
        let steps = [
            (!new.is_empty()).then_some(ChangeMembers::AddNodes(new)),
            (voting != voters || is_between).then_some(ChangeMembers::ReplaceAllVoters(voters.clone())),
            (!gone.is_empty()).then_some(ChangeMembers::RemoveNodes(gone)),
        ];
        for step in steps.into_iter().flatten() {
            // Those who answered a moment ago may be gone.
            self.check_heard(&self.metrics(), &voters)?;
            let only = [Precondition::LastMembershipLogId { last_membership_log_id: id }];
            let changed = self.raft.change_membership_if(step, true, only);
            let changed = self.parts.runtime.timeout(CHANGE_PATIENCE, changed).await;
            let changed = changed.ok_or(LogFault::NoQuorum { waited: CHANGE_PATIENCE })?;
            id = Some(changed.map_err(|error| self.not_changed(error))?.log_id);
        }
        self.parts.runtime.note("raft: members have changed");
        Ok(ConfigId(id.map_or(0, |id| position_of(id.index).0)))
    }

    /// Whether a member has answered this one, its leader, of late.
    pub(crate) fn hears(&self, metrics: &RaftMetrics<TypeConfig>, node: NodeId) -> bool {
        let heard = metrics.heartbeat.as_ref().and_then(|heard| heard.get(&node)).copied().flatten();
        node == self.node() || heard.is_some_and(|heard| heard.elapsed() < HEARD_WITHIN)
    }

    /// What the leader knows that a member has of the log.
    fn matched(metrics: &RaftMetrics<TypeConfig>, node: NodeId) -> Option<u64> {
        metrics.replication.as_ref()?.get(&node)?.map(|id| id.index)
    }

    /// Refuses new voters that say nothing, or have nothing of the log: the log would bear less with them than without.
    fn check_new(
        &self,
        metrics: &RaftMetrics<TypeConfig>,
        mut new: impl Iterator<Item = NodeId>,
    ) -> Result<(), LogFault> {
        let is_ready =
            |node: &NodeId| self.hears(metrics, *node) && Member::matched(metrics, *node).is_some();
        match new.find(|node| !is_ready(node)) {
            Some(node) if !mutants::is(Mutant::SilentVotersTaken) => Err(LogFault::Unsupported(format!(
                "node {node} does not answer the leader, or has nothing of the log yet: make it a member without a vote first, and wait"
            ))),
            _ => Ok(()),
        }
    }

    /// Lets another member lead, if it can: what openraft begins stops the log until somebody is elected.
    pub(crate) async fn hand_over(&self, to: NodeId) -> Result<(), LogFault> {
        let Some(term) = self.leading() else { return Err(LogFault::NotLeader { hint: self.hint() }) };
        if to == self.node() {
            return Ok(());
        }
        let metrics = self.metrics();
        let is_voter =
            metrics.membership_config.membership().get_joint_config().iter().all(|c| c.contains(&to));
        let lag = metrics
            .last_log_index
            .zip(Member::matched(&metrics, to))
            .map(|(last, has)| last.saturating_sub(has));
        let is_ready = self.hears(&metrics, to) && lag.is_some_and(|lag| lag <= HAND_OVER_LAG_MAX);
        if !(is_voter && is_ready || mutants::is(Mutant::HandedToAnybody)) {
            return Err(LogFault::Unsupported(format!(
                "node {to} cannot lead in the place of node {} (term {term}): it does not vote, does not answer, or lacks too much of the log",
                self.node()
            )));
        }
        self.raft.trigger().transfer_leader(to).await.map_err(storage)
    }

    /// Refuses voters of which so few answer that nothing could be committed any more, not even another change.
    fn check_heard(
        &self,
        metrics: &RaftMetrics<TypeConfig>,
        voters: &BTreeSet<NodeId>,
    ) -> Result<(), LogFault> {
        let is_heard = |node: &NodeId| self.hears(metrics, *node);
        let heard = voters.iter().filter(|node| is_heard(node)).count();
        if heard * 2 > voters.len() || mutants::is(Mutant::SilentVotersTaken) {
            return Ok(());
        }
        let silent: Vec<String> = voters.iter().filter(|n| !is_heard(n)).map(ToString::to_string).collect();
        Err(LogFault::Unsupported(format!(
            "of the {} voters that there would be, node {} does not answer the leader: the log would stand still. Add who is new \
             without a vote first, or wait",
            voters.len(),
            silent.join(", node ")
        )))
    }

    /// Why members were not changed, or not all of the way.
    fn not_changed(&self, error: RaftError<TypeConfig, ClientWriteError<TypeConfig>>) -> LogFault {
        match error {
            RaftError::APIError(ClientWriteError::ForwardToLeader(to)) => {
                LogFault::NotLeader { hint: to.leader_id }
            }
            RaftError::APIError(ClientWriteError::LogEntryDiscarded(_)) => {
                LogFault::NotLeader { hint: self.hint() }
            }
            RaftError::APIError(error) => {
                LogFault::Unsupported(format!("{error}: look again, and try again"))
            }
            RaftError::Fatal(fatal) => storage(fatal),
        }
    }
}
