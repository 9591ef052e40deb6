//! On which feature level the members of a log agree: the leader asks what each member's build knows, when something is asked of it
//! that belongs to a later level than the log is at.

use std::{collections::BTreeMap, sync::Arc};

use clutch_log::{Epoch, NodeId};
use clutch_proto::{
    Refusal, level,
    mutants::{self, Mutant},
    state::entry::Kind,
};
use clutch_runtime::BoxFuture;
use clutch_state::machine::Machine;

use crate::{Replica, Waiter};

/// Asks the other members for the newest feature level that their builds know; those that do not answer are left out.
pub type AskLevels = Arc<dyn Fn() -> BoxFuture<BTreeMap<NodeId, u32>> + Send + Sync>;

/// What the members know, asked in a reign because something of a level was wanted.
pub(crate) struct Known {
    reign: Epoch,
    wanted: u32,
    levels: BTreeMap<NodeId, u32>,
}

impl<M: Machine> Replica<M> {
    /// Why a request cannot be taken that belongs to a level; the members are asked for it.
    pub(crate) fn want_of_level(&mut self, wanted: u32) -> Option<Refusal> {
        let reign = self.leading?;
        if wanted <= self.applier.level() {
            return None;
        }
        // Also what was told of the last time, so that it is not found out again for each try.
        let text = match self.below.as_ref().filter(|(of, _)| *of == wanted) {
            Some((_, missing)) => missing.clone(),
            None => "its nodes are being asked whether they know what this needs".to_owned(),
        };
        if self.level_polls.is_empty() {
            self.config.runtime.note("replica: members are asked for their feature levels");
            let asked = (self.config.ask_levels)();
            self.level_polls.push(Box::pin(async move { Known { reign, wanted, levels: asked.await } }));
        }
        Some(Refusal::new(level::code_of(wanted), text))
    }

    /// Why members cannot be changed once more: an older build would end at the record.
    pub(crate) fn want_of_changes(&mut self) -> Option<Refusal> {
        let kept = self.config.log.status().changes_kept;
        if mutants::is(Mutant::ManyChangesAtOnce) {
            return None;
        }
        // Ahead of the need: a member that is built anew is taken out first, and cannot say then what it knows.
        let refusal = self.want_of_level(level::of_change(2 * kept));
        let refusal = refusal.filter(|_| level::of_change(kept) > self.applier.level())?;
        // Who does not answer may be who is to be taken out.
        let text = format!(
            "{}; or take a checkpoint and trim the log, which has {kept} changes of members and forgets them with that",
            refusal.detail
        );
        Some(Refusal::new(refusal.code, text))
    }

    /// Logs the level that was wanted, if the build of each member knows it.
    pub(crate) fn levels_known(&mut self, known: Known) {
        let Known { reign, wanted, mut levels } = known;
        if self.leading != Some(reign) || self.fault.get().is_some() || wanted <= self.applier.level() {
            return;
        }
        let status = self.config.log.status();
        if let Some(own) = status.leader {
            levels.insert(own, self.config.level);
        }
        let lacks = |node: &NodeId| levels.get(node).is_none_or(|known| (*known).max(level::FIRST) < wanted);
        let missing: Vec<NodeId> = status.members.iter().map(|one| one.member.node).filter(lacks).collect();
        if !missing.is_empty() && !mutants::is(Mutant::LevelOfLeader) {
            self.config.runtime.note("replica: a member does not know a feature level");
            let each = missing.iter().map(|node| match levels.get(node) {
                Some(_) => format!("node {node} runs an older build"),
                None => format!("node {node} does not answer"),
            });
            let text = format!(
                "all nodes that keep this log must know what this needs (feature level {wanted}) before it is used: {}. Start them, with this \
                 build, or take them out of the log",
                each.collect::<Vec<_>>().join(", ")
            );
            self.below = Some((wanted, text));
            return;
        }
        self.below = None;
        self.config.runtime.note("replica: a feature level is agreed on");
        self.propose(vec![(self.stamped(Kind::Level(wanted)), Waiter::Nobody)]);
    }
}
