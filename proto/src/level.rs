//! Feature levels: what may be written into a log.
//!
//! An operation that builds have learned later belongs to a later level. The members of a log agree on a level, which its leader logs
//! when each of them has said that its build knows it; until then the operation is refused, and so nothing is in a log that a member
//! could not apply. A level that nobody has asked for is not agreed on: as long as what is new is not used, a cluster can go back to
//! the build that it had.

use crate::registry::registry_request;

/// What every build knows, and what a log is at that has agreed on nothing.
pub const FIRST: u32 = 1;
/// The newest level that this build knows: invitations of nodes came with it.
pub const KNOWN: u32 = 2;

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
