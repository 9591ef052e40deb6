//! Who the members of a log are, by more than one member's word.

use clutch_log::{LogFault, Position, Status};
use clutch_proto::{
    Refusal,
    admin::{AdminReply, StatusReply},
    mutants::{self, Mutant},
    types::Code,
};

use crate::admin::{member_of, not_changed};

/// The members that a leader tells of, where most of them have confirmed that it leads: what a read barrier said, and how the log
/// stood after that.
pub(crate) fn confirmed(barrier: Result<Position, LogFault>, log: Status) -> Result<AdminReply, Refusal> {
    let committed = match barrier {
        Err(_) if mutants::is(Mutant::UnconfirmedMembers) => Position(log.config.0),
        barrier => barrier.map_err(not_changed)?,
    };
    if !log.is_self {
        return Err(Refusal::new(Code::NotLeader, LogFault::NotLeader { hint: log.leader }.to_string()));
    }
    if committed.0 < log.config.0 {
        return Err(Refusal::new(Code::NotReady, "the members are being changed: ask again"));
    }
    let status = StatusReply {
        leading: true,
        epoch: log.epoch.0,
        leader: log.leader.unwrap_or(0),
        log_first: log.bounds.first.0,
        log_last: log.bounds.last.0,
        members: log.members.into_iter().map(member_of).collect(),
        config: log.config.0,
        ..StatusReply::default()
    };
    Ok(AdminReply { status: Some(status), ..AdminReply::default() })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use clutch_log::{Bounds, ConfigId, Epoch, Member, Progress};

    use super::*;

    /// A log whose members became these by the record at 7, as one of them says that leads or does not.
    fn log(is_self: bool) -> Status {
        let member = Member { node: 2, voter: true };
        Status {
            epoch: Epoch(3),
            leader: Some(2),
            is_self,
            bounds: Bounds { first: Position(1), last: Position(9) },
            sealed: None,
            config: ConfigId(7),
            members: vec![Progress { member, matched: Some(Position(9)), is_heard: true }],
            changes_kept: 0,
            queued_bytes: 0,
            fault: None,
        }
    }

    fn no_quorum() -> Result<Position, LogFault> {
        Err(LogFault::NoQuorum { waited: Duration::from_secs(1) })
    }

    #[test]
    fn only_what_a_quorum_has_confirmed_is_told() {
        let told = confirmed(Ok(Position(7)), log(true)).expect("told").status.expect("a status");
        assert_eq!((told.leading, told.leader, told.config, told.members.len()), (true, 2, 7, 1));
        for (barrier, is_self, code) in [
            (Ok(Position(6)), true, Code::NotReady),
            (Ok(Position(9)), false, Code::NotLeader),
            (no_quorum(), true, Code::OutcomeUnknown),
            (Err(LogFault::NotLeader { hint: None }), true, Code::NotLeader),
        ] {
            let what = format!("{barrier:?} {is_self}");
            assert_eq!(confirmed(barrier, log(is_self)).expect_err("refused").code, code, "{what}");
        }
    }

    #[test]
    fn planted_bugs_are_found() {
        mutants::plant(Some(Mutant::UnconfirmedMembers));
        let (is_planted, is_found) =
            (mutants::planted().is_some(), confirmed(no_quorum(), log(true)).is_ok());
        mutants::plant(None);
        assert_eq!(is_planted, is_found);
    }
}
