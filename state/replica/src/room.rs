//! A leader that has no room for its log lets another member lead, which may have some.

use std::time::Duration;

use clutch_log::{NodeId, Progress, Status};
use clutch_proto::{
    Refusal,
    mutants::{self, Mutant},
    types::Code,
};
use clutch_state::machine::Machine;

use crate::Replica;

/// A reign that is handed on ends within so long, or was not taken.
const HANDING_ON: Duration = Duration::from_secs(3);
/// Where others have no room either, a reign goes round no more often than this.
const HAND_ON_AGAIN: Duration = Duration::from_secs(30);

/// What a leader without room does.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    /// It lets this member lead.
    HandOn(NodeId),
    /// It has just asked another one to.
    Wait,
    /// It goes on to lead, and refuses what takes room.
    Stay,
}

/// Who lacks more of the log is not asked to lead.
const LAG_MAX: u64 = 1024;

/// By what the log says, and how long ago it was tried last. The reign goes round in the order of the nodes' numbers, so that it comes
/// to whoever has room.
fn answer(status: &Status, tried_ago: Option<Duration>) -> Answer {
    match tried_ago {
        Some(ago) if ago < HANDING_ON => return Answer::Wait,
        Some(ago) if ago < HAND_ON_AGAIN => return Answer::Stay,
        Some(_) | None => {}
    }
    let others = status
        .members
        .iter()
        .filter(|other| other.member.voter && other.is_heard && Some(other.member.node) != status.leader);
    let has_most =
        |other: &&Progress| other.matched.is_some_and(|matched| matched.0 + LAG_MAX >= status.bounds.last.0);
    match others
        .filter(has_most)
        .min_by_key(|other| (Some(other.member.node) < status.leader, other.member.node))
    {
        Some(other) if !mutants::is(Mutant::LeadsWithoutRoom) => Answer::HandOn(other.member.node),
        Some(_) | None => Answer::Stay,
    }
}

impl<M: Machine> Replica<M> {
    /// Why what takes room is refused, if it is.
    pub(crate) fn want_of_room(&mut self) -> Option<Refusal> {
        let shortage = (self.config.shortage)()?;
        if self.hand_on_for_room() {
            let text = format!("another member is to lead: {shortage}");
            return Some(Refusal::new(Code::NotLeader, text));
        }
        self.config.runtime.note("replica: a change is refused for want of room");
        Some(Refusal::new(Code::NoSpace, shortage))
    }

    /// Lets another member lead, because there is no room here and there may be there; false where there is none that answers, or
    /// it was tried of late.
    pub(crate) fn hand_on_for_room(&mut self) -> bool {
        let now = self.config.runtime.clock.monotonic();
        let tried_ago = self.handed_on.map(|at| now.saturating_sub(at));
        let to = match answer(&self.config.log.status(), tried_ago) {
            Answer::Stay => return false,
            Answer::Wait => return true,
            Answer::HandOn(to) => to,
        };
        self.handed_on = Some(now);
        self.config.runtime.note("replica: a reign is handed on for want of room");
        tracing::warn!(replica = %self.config.name, to, "has no room, and lets another member lead");
        let log = self.config.log.clone();
        self.config.runtime.spawn("hand on", async move {
            if let Err(error) = log.transfer_leader(to).await {
                tracing::warn!(%error, "another member does not take the lead");
            }
        });
        true
    }
}

#[cfg(test)]
mod tests {
    use clutch_log::{Bounds, ConfigId, Epoch, Member, Position, Progress};

    use super::*;

    /// What node 1 says of a log that it leads: its members, whether they vote and are heard, and how far they have come.
    fn status(members: &[(NodeId, bool, bool, u64)]) -> Status {
        let progress = |(node, voter, is_heard, matched): &(NodeId, bool, bool, u64)| Progress {
            member: Member { node: *node, voter: *voter },
            matched: Some(Position(*matched)),
            is_heard: *is_heard,
        };
        Status {
            epoch: Epoch(3),
            leader: Some(1),
            is_self: true,
            bounds: Bounds { first: Position(1), last: Position(9) },
            sealed: None,
            config: ConfigId::default(),
            members: members.iter().map(progress).collect(),
            changes_kept: 0,
            queued_bytes: 0,
            fault: None,
        }
    }

    #[test]
    fn a_reign_without_room_goes_round_once() {
        let own = (1, true, true, 9);
        let three = status(&[own, (2, true, true, 8), (3, true, true, 9)]);
        let lags = status(&[(1, true, true, 9000), (2, true, true, 8), (3, true, true, 9000)]);
        let lags = Status { bounds: Bounds { first: Position(1), last: Position(9000) }, ..lags };
        let seconds = |s| Some(Duration::from_secs(s));
        for (status, ago, expected) in [
            (&three, None, Answer::HandOn(2)),
            (&Status { leader: Some(2), ..three.clone() }, None, Answer::HandOn(3)),
            (&Status { leader: Some(3), ..three.clone() }, None, Answer::HandOn(1)),
            (&three, seconds(1), Answer::Wait),
            (&three, seconds(4), Answer::Stay),
            (&three, seconds(31), Answer::HandOn(2)),
            (&status(&[own, (2, true, false, 9), (3, true, true, 8)]), None, Answer::HandOn(3)),
            (&lags, None, Answer::HandOn(3)),
            (&status(&[own, (2, false, true, 9), (3, true, false, 9)]), None, Answer::Stay),
            (&status(&[own]), None, Answer::Stay),
        ] {
            assert_eq!(answer(status, ago), expected, "{:?} {ago:?}", status.members);
        }
    }

    #[test]
    fn planted_bugs_are_found() {
        mutants::plant(Some(Mutant::LeadsWithoutRoom));
        let two = status(&[(1, true, true, 9), (2, true, true, 8)]);
        let (is_planted, is_found) = (mutants::planted().is_some(), answer(&two, None) == Answer::Stay);
        mutants::plant(None);
        assert_eq!(is_planted, is_found);
    }
}
