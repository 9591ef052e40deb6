//! A leader that hears nothing of a quorum gives its reign up.
//!
//! openraft's leader leads until it hears of a later reign. One that is cut off would go on to take what it cannot commit, and to
//! say that it leads, for as long as it is cut off, while the others have long elected another. A reign that was given up stays
//! so, and ends in this member's raft, too: it stands for another one, or votes for who does.
//!
//! Invariant: what is given up is taken for no outcome; what was proposed may still be committed.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use clutch_proto::mutants::{self, Mutant};
use clutch_runtime::Runtime;
use openraft::{Instant as _, RaftMetrics, ServerState, raft::VoteRequest};

use crate::{
    member::Member,
    seam::SeamInstant,
    types::{TypeConfig, Vote},
};

/// How often it is looked.
const LOOK: Duration = Duration::from_millis(500);
/// A quorum that has said nothing for so long is lost. The others have elected somebody else by then, if they could: they take two
/// leases for that.
const SILENT: Duration = Duration::from_secs(2);
/// Looks in a row that must see the same: what was stopped as a whole hears of the others again before it is looked twice.
const LOOKS: u32 = 2;

/// What was seen of the present reign.
struct Reign {
    term: u64,
    began: SeamInstant,
    silent: u32,
}

/// Looks at the quorum of a member's reigns as long as there is the member.
pub(crate) async fn watch(runtime: Runtime, member: Weak<Member>) {
    let mut reign: Option<Reign> = None;
    loop {
        runtime.clock.sleep_about(LOOK).await;
        let Some(member) = member.upgrade() else { return };
        if member.fault().is_some() {
            return;
        }
        look(&member, &mut reign).await;
    }
}

async fn look(member: &Arc<Member>, reign: &mut Option<Reign>) {
    let metrics = member.metrics();
    if metrics.state != ServerState::Leader {
        *reign = None;
        return;
    }
    let term = metrics.current_term;
    if member.leading().is_none() {
        step_down(member, &metrics).await;
        return;
    }
    let now = reign.get_or_insert_with(|| Reign { term, began: SeamInstant::now(), silent: 0 });
    if now.term != term {
        *now = Reign { term, began: SeamInstant::now(), silent: 0 };
    }
    let is_alone = metrics.membership_config.voter_ids().all(|voter| voter == member.node());
    let heard = metrics.last_quorum_acked.as_deref().map_or(now.began, |acked| (*acked).max(now.began));
    if is_alone || heard.elapsed() < SILENT {
        now.silent = 0;
        return;
    }
    now.silent += 1;
    if now.silent >= LOOKS && !mutants::is(Mutant::CutOffLeads) {
        tracing::warn!(log = %member.parts.id, term, "hears nothing of a quorum, and does not lead any more");
        member.runtime().note("raft: a leader gives up without a quorum");
        member.give_up(term);
    }
}

/// Ends a reign that was given up: this member votes in the next one, for another, as if that had asked, and so leads no more.
///
/// Whoever stands may still be elected in it, and this member in the one behind. Handing the lead to somebody is not enough: who leads
/// and does not stand for it any more can hold what nobody else has, and then nobody can be elected.
async fn step_down(member: &Member, metrics: &RaftMetrics<TypeConfig>) {
    let others = metrics.membership_config.voter_ids().filter(|voter| *voter != member.node());
    let Some(other) = member.most_recent(metrics).or(others.min()) else { return };
    let vote = Vote::new(metrics.current_term + 1, other);
    let mut request = VoteRequest::new(vote, member.log().last_id());
    // A quorum may be heard again, and then nobody but the leader itself may end its reign: its lease is passed over, which is
    // right because a reign that was given up is read by no lease.
    request.leadership_transfer = true;
    // Refused where something was appended meanwhile: it is tried again then.
    match member.raft().vote(request).await {
        Ok(answer) if answer.vote_granted => {
            member.runtime().note("raft: a reign that was given up has ended")
        }
        Ok(_) => {}
        Err(error) => tracing::debug!(%error, "a reign that was given up does not end"),
    }
}
