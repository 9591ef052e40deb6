//! What every operation is, said once: its home, and whether it looks, changes, gives space back or is a step.
//!
//! The matches have no default: whoever adds an operation to a proto is asked here what it is.

use crate::{
    cdc::cdc_request,
    ids::Slot,
    registry::registry_request,
    shard::{ShardRequest, shard_entry, shard_request},
};

/// What an operation may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// It looks and is not logged.
    Read,
    /// It changes something, at most once for each tag.
    Change,
    /// A change that gives space back, or without which nobody learns of any: taken also while there is hardly room.
    Release,
    /// A step of a CDC transaction; refused from anyone else.
    Step,
}

impl Class {
    /// Whether it only looks.
    pub fn is_read(self) -> bool {
        self == Class::Read
    }
}

/// An operation of a shard: the slot whose shard it is for, and its class.
pub fn of_shard(op: &shard_request::Op) -> (Slot, Class) {
    use Class::{Change, Read, Release, Step};
    use shard_request::Op;
    let (id, class) = match op {
        Op::Lookup(op) => (op.dir, Read),
        Op::Stat(op) => (op.id, Read),
        Op::ReadDir(op) => (op.dir, Read),
        Op::Layout(op) => (op.id, Read),
        Op::History(op) => (op.dir, Read),
        Op::ContentHistory(op) => (op.id, Read),
        Op::VisitInodes(op) => (op.slot.into(), Read),
        Op::VisitTransients(op) => (op.slot.into(), Read),
        Op::VisitPastContents(op) => (op.slot.into(), Read),
        Op::VisitDeadSpans(op) => (op.slot.into(), Read),
        Op::VisitBlocks(op) => (op.slot.into(), Read),
        Op::CreateFile(op) => (op.dir, Change),
        Op::CreateSymlink(op) => (op.dir, Change),
        Op::StartContent(op) => (op.dir, Change),
        Op::InitiateSpan(op) => (op.content, Change),
        Op::CertifySpan(op) => (op.content, Change),
        Op::AddInline(op) => (op.content, Change),
        Op::AddHole(op) => (op.content, Change),
        Op::LinkFile(op) => (op.dir, Change),
        Op::RenameInDirectory(op) => (op.dir, Change),
        Op::Unlink(op) => (op.dir, Release),
        Op::SetAttributes(op) => (op.id, Change),
        Op::Undelete(op) => (op.dir, Change),
        Op::SetPolicy(op) => (op.id, Change),
        Op::ShareRange(op) => (op.content, Change),
        Op::PublishContent(op) => (op.id, Change),
        Op::RestoreContent(op) => (op.id, Change),
        Op::ScrapContent(op) => (op.content, Release),
        Op::SwapBlocks(op) => (op.span_a, Change),
        Op::SwapSpans(op) => (op.content_a, Change),
        Op::MoveSpan(op) => (op.content, Change),
        Op::ForgetEdge(op) => (op.dir, Release),
        Op::ForgetContent(op) => (op.id, Release),
        Op::CollectContent(op) => (op.content, Release),
        Op::RemoveSpan(op) => (op.span_id, Release),
        Op::CreateDirectoryInode(op) => (op.slot.into(), Step),
        Op::InsertEdge(op) => (op.dir, Step),
        Op::LockEdge(op) => (op.dir, Step),
        Op::UnlockEdge(op) => (op.dir, Step),
        Op::RemoveLockedEdge(op) => (op.dir, Step),
        Op::SetParent(op) => (op.dir, Step),
        Op::OrphanDirectory(op) => (op.dir, Step),
        Op::RemoveDirectoryInode(op) => (op.dir, Step),
        Op::DropPastEdge(op) => (op.dir, Step),
        Op::RemoveFileInode(op) => (op.id, Step),
        Op::AdoptDirectory(op) => (op.dir, Step),
        Op::ForgetDirectoryInode(op) => (op.dir, Step),
    };
    // The slot is the low byte of every id.
    (Slot(id as u8), class)
}

/// The class of an operation of the CDC.
pub fn of_cdc(op: &cdc_request::Op) -> Class {
    use cdc_request::Op;
    match op {
        Op::ListTransactions(_) => Class::Read,
        Op::MakeDirectory(_) | Op::RenameFile(_) | Op::RenameDirectory(_) | Op::UndeleteDirectory(_) => {
            Class::Change
        }
        Op::RemoveDirectory(_) | Op::ForgetFile(_) | Op::ForgetDirectory(_) => Class::Release,
    }
}

/// The class of an operation of the registry. Its changes are few and small.
pub fn of_registry(op: &registry_request::Op) -> Class {
    use registry_request::Op;
    match op {
        Op::GetMap(_) | Op::GetChain(_) => Class::Read,
        Op::RegisterServices(_)
        | Op::PlaceShard(_)
        | Op::PlaceCdc(_)
        | Op::SwapChain(_)
        | Op::SetServiceFlags(_) => Class::Release,
    }
}

impl From<shard_request::Op> for shard_entry::Body {
    /// The entry of a request to which the producer adds nothing.
    fn from(op: shard_request::Op) -> shard_entry::Body {
        shard_entry::Body::Request(ShardRequest { op: Some(op) })
    }
}
