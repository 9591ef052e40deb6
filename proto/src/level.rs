//! Feature levels: what may be written into a log.
//!
//! An operation that builds have learned later belongs to a later level. The members of a log agree on a level, which its leader logs
//! when each of them has said that its build knows it; until then the operation is refused, and so nothing is in a log that a member
//! could not apply. A level that nobody has asked for is not agreed on: as long as what is new is not used, a cluster can go back to
//! the build that it had.

use crate::registry::registry_request;

/// What every build knows, and what a log is at that has agreed on nothing.
pub const FIRST: u32 = 1;
/// The newest level that this build knows: invitations of nodes came with it, and logs that keep many changes of members.
pub const KNOWN: u32 = 2;
/// Builds that know the first level only keep no more changes of members in a log.
const CHANGES_OF_FIRST: usize = 32;
/// Changes that are recorded for one that is asked for.
const RECORDS_OF_CHANGE_MAX: usize = 4;

/// The level that one more change of members belongs to, in a log that keeps so many.
pub fn of_change(kept: usize) -> u32 {
    if kept + RECORDS_OF_CHANGE_MAX >= CHANGES_OF_FIRST { 2 } else { FIRST }
}

/// The level that an operation of the registry belongs to.
pub fn of_registry(op: &registry_request::Op) -> u32 {
    use registry_request::Op;
    match op {
        Op::GetMap(_)
        | Op::GetChain(_)
        | Op::RegisterServices(_)
        | Op::PlaceShard(_)
        | Op::PlaceCdc(_)
        | Op::SwapChain(_)
        | Op::SetServiceFlags(_) => FIRST,
        Op::InviteNode(_) | Op::RedeemInvitation(_) => 2,
    }
}
