//! Whether the members of a log have the same state: the leader asks each for its hash at a position and logs what they said.
//!
//! The leader's own hash is one voice among them. With one member there is nobody to ask, and its own word is logged as before.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use clutch_log::{Epoch, NodeId, Position};
use clutch_proto::{
    mutants::{self, Mutant},
    state::{Check, Verdict, Voice, entry::Kind},
};
use clutch_runtime::BoxFuture;
use clutch_state::machine::Machine;

use crate::{Replica, Waiter};

/// Asks the other members for their hashes at a position, and waits a little for those that are not there yet; those that do
/// not answer are left out.
pub type AskMembers = Arc<dyn Fn(Position) -> BoxFuture<BTreeMap<NodeId, Bytes>> + Send + Sync>;

/// What the members said of a position, asked in a reign.
pub(crate) struct Poll {
    reign: Epoch,
    position: Position,
    /// The leader's own.
    hash: Bytes,
    voices: BTreeMap<NodeId, Bytes>,
}

impl<M: Machine> Replica<M> {
    /// Begins to compare the members, or logs the own hash where there is one member.
    pub(crate) fn compare_members(&mut self) {
        let Some(reign) = self.leading else { return };
        let (position, hash) = (self.applier.position(), self.applier.hash());
        let hash = Bytes::copy_from_slice(&hash.to_bytes());
        if self.voters().len() < 2 {
            let check = Check { position: position.0, hash };
            return self.propose(vec![(self.stamped(Kind::Check(check)), Waiter::Nobody)]);
        }
        // One at a time: the next is due soon enough.
        let Some(own) = self.config.log.status().leader.filter(|_| self.polls.is_empty()) else { return };
        let asked = (self.config.ask_members)(position);
        self.polls.push(Box::pin(async move {
            let mut voices = asked.await;
            voices.insert(own, hash.clone());
            Poll { reign, position, hash, voices }
        }));
    }

    /// Logs what the members said, if enough did to decide anything.
    pub(crate) fn polled(&mut self, poll: Poll) {
        let voters = self.voters();
        let Poll { reign, position, hash, mut voices } = poll;
        if self.leading != Some(reign) || self.fault.get().is_some() {
            return;
        }
        voices.retain(|node, _| voters.contains(node));
        if mutants::is(Mutant::LeadersWord) {
            voices = voters.iter().map(|node| (*node, hash.clone())).collect();
        }
        if voices.len() <= voters.len() / 2 {
            self.config.runtime.note("replica: too few members say what their state is");
            return;
        }
        if voices.values().any(|other| *other != hash) {
            self.config.runtime.note("replica: members differ");
            tracing::error!(replica = %self.config.name, %position, "the members of the log have different states");
        }
        let members = voters.len() as u32;
        let voices = voices.into_iter().map(|(node, hash)| Voice { node, hash }).collect();
        let verdict = Verdict { position: position.0, members, voices };
        self.propose(vec![(self.stamped(Kind::Verdict(verdict)), Waiter::Nobody)]);
    }

    fn voters(&self) -> Vec<NodeId> {
        let members = self.config.log.status().members;
        members.into_iter().filter(|one| one.member.voter).map(|one| one.member.node).collect()
    }
}
