//! Feature levels: what may be written into a log.
//!
//! An operation that builds have learned later belongs to a later level. The members of a log agree on a level, which its leader logs
//! when each of them has said that its build knows it; until then the operation is refused, and so nothing is in a log that a member
//! could not apply. A level that nobody has asked for is not agreed on: as long as what is new is not used, a cluster can go back to
//! the build that it had.

use crate::{
    registry::registry_request,
    shard::shard_request,
    types::{Code, PolicyPart},
};

/// What every build knows, and what a log is at that has agreed on nothing.
pub const FIRST: u32 = 1;
/// The newest level that this build knows. With level 2 came invitations of nodes, and logs that keep many changes of members; with
/// level 3 inline data.
pub const KNOWN: u32 = 3;
/// The level of inline data.
pub const INLINE: u32 = 3;
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

/// The level that an operation of a shard belongs to.
pub fn of_shard(op: &shard_request::Op) -> u32 {
    use shard_request::Op;
    match op {
        Op::CreateInline(_) => INLINE,
        Op::SetPolicy(op) => {
            let has_inline = op.policy.as_ref().is_some_and(|policy| policy.inline.is_some());
            let inherits = op.inherit.contains(&(PolicyPart::Inline as i32));
            if has_inline || inherits { INLINE } else { FIRST }
        }
        Op::Lookup(_)
        | Op::Stat(_)
        | Op::ReadDir(_)
        | Op::Layout(_)
        | Op::History(_)
        | Op::ContentHistory(_)
        | Op::VisitInodes(_)
        | Op::VisitTransients(_)
        | Op::VisitPastContents(_)
        | Op::VisitDeadSpans(_)
        | Op::VisitBlocks(_)
        | Op::VisitSpans(_)
        | Op::CreateFile(_)
        | Op::CreateSymlink(_)
        | Op::StartContent(_)
        | Op::InitiateSpan(_)
        | Op::CertifySpan(_)
        | Op::AddInline(_)
        | Op::AddHole(_)
        | Op::LinkFile(_)
        | Op::RenameInDirectory(_)
        | Op::Unlink(_)
        | Op::SetAttributes(_)
        | Op::Undelete(_)
        | Op::ShareRange(_)
        | Op::PublishContent(_)
        | Op::RestoreContent(_)
        | Op::ScrapContent(_)
        | Op::SwapBlocks(_)
        | Op::SwapSpans(_)
        | Op::MoveSpan(_)
        | Op::ForgetEdge(_)
        | Op::ForgetContent(_)
        | Op::CollectContent(_)
        | Op::RemoveSpan(_)
        | Op::CreateDirectoryInode(_)
        | Op::InsertEdge(_)
        | Op::LockEdge(_)
        | Op::UnlockEdge(_)
        | Op::RemoveLockedEdge(_)
        | Op::SetParent(_)
        | Op::OrphanDirectory(_)
        | Op::RemoveDirectoryInode(_)
        | Op::DropPastEdge(_)
        | Op::RemoveFileInode(_)
        | Op::AdoptDirectory(_)
        | Op::ForgetDirectoryInode(_) => FIRST,
    }
}

/// What a request of a level is refused with as long as that is not agreed on. Who asks for what came with level 2 knows only that
/// the cluster is not ready.
pub fn code_of(wanted: u32) -> Code {
    if wanted < INLINE { Code::NotReady } else { Code::NotAgreed }
}
