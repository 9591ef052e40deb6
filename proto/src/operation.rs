//! What every operation is, said once: its home, and whether it looks, changes, gives space back or is a step.
//!
//! The matches have no default: whoever adds an operation to a proto is asked here what it is.

use crate::{
    cdc::cdc_request,
    error::Refusal,
    ids::{InodeId, Slot},
    registry::registry_request,
    shard::{ShardRequest, shard_entry, shard_request},
};

include!(concat!(env!("OUT_DIR"), "/names.rs"));

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

/// What says which shard an operation is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Home {
    /// The shard of this inode.
    Inode(u64),
    /// The shard of this content or span.
    Part(u64),
    /// The shard of this slot.
    Slot(u32),
}

impl Home {
    /// The slot whose shard is asked: the low byte of every id. A number that is no id or slot has one, too, whose shard
    /// refuses it.
    pub fn slot(self) -> Slot {
        match self {
            Home::Inode(id) | Home::Part(id) => Slot(id as u8),
            Home::Slot(slot) => Slot(slot as u8),
        }
    }

    /// The slot, if the number is an id or a slot at all.
    ///
    /// # Errors
    /// Invalid.
    pub fn check(self) -> Result<Slot, Refusal> {
        match self {
            Home::Inode(id) if InodeId::from_wire(id).is_none() => {
                Err(Refusal::invalid(format!("{id:x} is not an inode id")))
            }
            Home::Slot(slot) if slot > u32::from(u8::MAX) => {
                Err(Refusal::invalid(format!("slot {slot}; slots go from 0 to 255")))
            }
            home => Ok(home.slot()),
        }
    }
}

/// An operation of a shard: whose shard it is for, and its class.
pub fn of_shard(op: &shard_request::Op) -> (Home, Class) {
    use Class::{Change, Read, Release, Step};
    use shard_request::Op;
    match op {
        Op::Lookup(op) => (Home::Inode(op.dir), Read),
        Op::Stat(op) => (Home::Inode(op.id), Read),
        Op::ReadDir(op) => (Home::Inode(op.dir), Read),
        Op::Layout(op) => (Home::Inode(op.id), Read),
        Op::History(op) => (Home::Inode(op.dir), Read),
        Op::ContentHistory(op) => (Home::Inode(op.id), Read),
        Op::VisitInodes(op) => (Home::Slot(op.slot), Read),
        Op::VisitTransients(op) => (Home::Slot(op.slot), Read),
        Op::VisitPastContents(op) => (Home::Slot(op.slot), Read),
        Op::VisitDeadSpans(op) => (Home::Slot(op.slot), Read),
        Op::VisitBlocks(op) => (Home::Slot(op.slot), Read),
        Op::VisitSpans(op) => (Home::Slot(op.slot), Read),
        Op::CreateFile(op) => (Home::Inode(op.dir), Change),
        Op::CreateInline(op) => (Home::Inode(op.dir), Change),
        Op::CreateSymlink(op) => (Home::Inode(op.dir), Change),
        Op::StartContent(op) => (Home::Inode(op.dir), Change),
        Op::InitiateSpan(op) => (Home::Part(op.content), Change),
        Op::CertifySpan(op) => (Home::Part(op.content), Change),
        Op::AddInline(op) => (Home::Part(op.content), Change),
        Op::AddHole(op) => (Home::Part(op.content), Change),
        Op::LinkFile(op) => (Home::Inode(op.dir), Change),
        Op::RenameInDirectory(op) => (Home::Inode(op.dir), Change),
        Op::Unlink(op) => (Home::Inode(op.dir), Release),
        Op::SetAttributes(op) => (Home::Inode(op.id), Change),
        Op::Undelete(op) => (Home::Inode(op.dir), Change),
        Op::SetPolicy(op) => (Home::Inode(op.id), Change),
        Op::ShareRange(op) => (Home::Part(op.content), Change),
        Op::PublishContent(op) => (Home::Inode(op.id), Change),
        Op::RestoreContent(op) => (Home::Inode(op.id), Change),
        Op::ScrapContent(op) => (Home::Part(op.content), Release),
        Op::SwapBlocks(op) => (Home::Part(op.span_a), Change),
        Op::SwapSpans(op) => (Home::Part(op.content_a), Change),
        Op::MoveSpan(op) => (Home::Part(op.content), Change),
        Op::ForgetEdge(op) => (Home::Inode(op.dir), Release),
        Op::ForgetContent(op) => (Home::Inode(op.id), Release),
        Op::CollectContent(op) => (Home::Part(op.content), Release),
        Op::RemoveSpan(op) => (Home::Part(op.span_id), Release),
        Op::CreateDirectoryInode(op) => (Home::Slot(op.slot), Step),
        Op::InsertEdge(op) => (Home::Inode(op.dir), Step),
        Op::LockEdge(op) => (Home::Inode(op.dir), Step),
        Op::UnlockEdge(op) => (Home::Inode(op.dir), Step),
        Op::RemoveLockedEdge(op) => (Home::Inode(op.dir), Step),
        Op::SetParent(op) => (Home::Inode(op.dir), Step),
        Op::OrphanDirectory(op) => (Home::Inode(op.dir), Step),
        Op::RemoveDirectoryInode(op) => (Home::Inode(op.dir), Step),
        Op::DropPastEdge(op) => (Home::Inode(op.dir), Step),
        Op::RemoveFileInode(op) => (Home::Inode(op.id), Step),
        Op::AdoptDirectory(op) => (Home::Inode(op.dir), Step),
        Op::ForgetDirectoryInode(op) => (Home::Inode(op.dir), Step),
    }
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
        Op::InviteNode(_) | Op::RedeemInvitation(_) => Class::Change,
    }
}

impl From<shard_request::Op> for shard_entry::Body {
    /// The entry of a request to which the producer adds nothing.
    fn from(op: shard_request::Op) -> shard_entry::Body {
        shard_entry::Body::Request(ShardRequest { op: Some(op) })
    }
}
