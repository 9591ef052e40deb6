//! What a member does besides taking proposals: it forgets, gives up its reign, and changes who belongs to the group.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use clutch_log::{ConfigId, Floors, LogFault, NodeId, Position};
use clutch_log_store::MEMBERS_MAX;
use clutch_proto::mutants::{self, Mutant};
use openraft::{
    ChangeMembers, EmptyNode, RaftMetrics, async_runtime::WatchReceiver as _, raft::Precondition,
};

use crate::{
    member::{Member, Parts, storage},
    network::meta_of,
    types::{TypeConfig, index_of, position_of},
};

/// Records that one change of members may take.
const CHANGE_RECORDS_MAX: usize = 4;
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
        let config = self.raft.runtime_config();
        config.elect(false);
        let Some(term) = self.leading() else { return };
        *self.resigned.lock() = Some(term);
        // The others hear nothing more of it, and elect another.
        config.heartbeat(false);
        self.resigning.send_replace(true);
        let metrics = self.metrics();
        let others =
            self.members(&metrics).into_iter().filter(|p| p.member.voter && p.member.node != self.node());
        if let Some(other) = others.max_by_key(|progress| progress.matched) {
            let raft = self.raft.clone();
            self.parts.runtime.spawn("raft resign", async move {
                // One that cannot be told will hear nothing.
                let _ = raft.trigger().transfer_leader(other.member.node).await;
            });
        }
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
        let gone: BTreeSet<NodeId> = known.difference(&wanted).copied().collect();
        let steps = [
            (!new.is_empty()).then_some(ChangeMembers::AddNodes(new)),
            (voting != voters).then_some(ChangeMembers::ReplaceAllVoters(voters)),
            (!gone.is_empty()).then_some(ChangeMembers::RemoveNodes(gone)),
        ];
        for step in steps.into_iter().flatten() {
            let only = [Precondition::LastMembershipLogId { last_membership_log_id: id }];
            let changed = self.raft.change_membership_if(step, true, only).await.map_err(storage)?;
            id = Some(changed.log_id);
        }
        Ok(ConfigId(id.map_or(0, |id| position_of(id.index).0)))
    }
}
