//! One plan for each kind of transaction: what it holds, its steps, its point of no return. Which request is sent when, and
//! how it is taken back, follows from the plan alone ([`crate::steps`]).
//!
//! | kind | First | Walk | Insert | SetParent | Remove | back |
//! |---|---|---|---|---|---|---|
//! | make directory | make the inode | | insert the edge* | | | remove the inode |
//! | remove directory | lock the edge | | orphan the directory* | | end the edge | unlock the edge |
//! | move file | lock the old edge | | insert the new edge* | | end the old edge | unlock the old edge |
//! | move directory | lock the old edge | ancestors of the new parent | insert the new edge* | set the parent | end the old edge | unlock the old edge |
//! | forget file | end the past edge* | | | | remove the inode | |
//! | forget directory | remove the inode* | | | | | |
//! | undelete directory | read the inode | | insert the edge* | set the parent | | |
//!
//! `*` is the point of no return: when it is done, the transaction only goes forward.

use bytes::Bytes;
use clutch_proto::{
    InodeId, Refusal,
    cdc::{
        ForgetDirectory, ForgetFile, MakeDirectory, RemoveDirectory, RenameDirectory, RenameFile,
        TransactionRow, UndeleteDirectory, cdc_request,
    },
    name,
    shard::{
        AdoptDirectory, CreateDirectoryInode, DropPastEdge, ForgetDirectoryInode, InsertEdge, LockEdge,
        OrphanDirectory, RemoveDirectoryInode, RemoveFileInode, RemoveLockedEdge, SetParent, ShardReply,
        Stat, UnlockEdge,
        shard_reply::Reply,
        shard_request::{self, Op},
    },
    types::Code,
};

use crate::steps::State;

/// What follows from the kind of a transaction.
pub(crate) trait Plan {
    /// A word for people.
    fn kind(&self) -> &'static str;

    /// Refuses what can never work, before it is logged.
    fn check(&self) -> Result<(), Refusal>;

    /// The directories that it holds while it runs, perhaps one twice.
    fn holds(&self) -> Vec<u64>;

    /// Its states in their order; the last of them ends it.
    fn steps(&self) -> &'static [State];

    /// The point of no return, one of its steps.
    fn commits(&self) -> State;

    /// The request of one of its steps, but for a walk's. `None` when the plan has no such step.
    fn request(&self, state: State, row: &TransactionRow) -> Option<shard_request::Op>;

    /// What takes its first step back; `None` when that changes nothing.
    fn undo(&self, row: &TransactionRow) -> Option<shard_request::Op>;

    /// The inode that its reply names.
    fn id(&self, row: &TransactionRow) -> u64;

    /// What its first step has found out: the inode that it made, or 0.
    fn begun(&self, _reply: &ShardReply) -> Result<u64, Refusal> {
        Ok(0)
    }

    /// The directory that it moves, and where to.
    fn moves(&self) -> Option<(u64, u64)> {
        None
    }
}

/// The plan of an operation; `None` for one that is no transaction.
pub(crate) fn of(op: &cdc_request::Op) -> Option<&dyn Plan> {
    use cdc_request::Op;
    match op {
        Op::MakeDirectory(op) => Some(op),
        Op::RemoveDirectory(op) => Some(op),
        Op::RenameFile(op) => Some(op),
        Op::RenameDirectory(op) => Some(op),
        Op::ForgetFile(op) => Some(op),
        Op::ForgetDirectory(op) => Some(op),
        Op::UndeleteDirectory(op) => Some(op),
        Op::ListTransactions(_) => None,
    }
}

fn check_directory(raw: u64) -> Result<(), Refusal> {
    match InodeId::from_wire(raw) {
        None => Err(Refusal::invalid(format!("{raw:x} is not an inode id"))),
        Some(id) if !id.is_directory() => {
            Err(Refusal::new(Code::NotDirectory, format!("{id} is not a directory")))
        }
        Some(_) => Ok(()),
    }
}

fn check_file(raw: u64) -> Result<(), Refusal> {
    match InodeId::from_wire(raw) {
        Some(id) if !id.is_directory() => Ok(()),
        _ => Err(Refusal::new(Code::IsDirectory, format!("{raw:x} is not a file or link"))),
    }
}

fn check_move(old_parent: u64, new_parent: u64) -> Result<(), Refusal> {
    check_directory(old_parent)?;
    check_directory(new_parent)?;
    match old_parent == new_parent {
        true => Err(Refusal::invalid("a rename within one directory goes to its shard")),
        false => Ok(()),
    }
}

/// The edge that a transaction locks first and ends last.
struct OldEdge<'a> {
    dir: u64,
    name: &'a Bytes,
    target: u64,
    created_at: u64,
}

impl OldEdge<'_> {
    fn lock(&self) -> Op {
        let OldEdge { dir, name, target, created_at } = *self;
        Op::LockEdge(LockEdge { dir, name: name.clone(), target, created_at })
    }

    fn unlock(&self) -> Op {
        let OldEdge { dir, name, target, created_at } = *self;
        Op::UnlockEdge(UnlockEdge { dir, name: name.clone(), target, created_at })
    }

    fn end(&self) -> Op {
        let OldEdge { dir, name, target, created_at } = *self;
        Op::RemoveLockedEdge(RemoveLockedEdge { dir, name: name.clone(), target, created_at })
    }
}

impl Plan for MakeDirectory {
    fn kind(&self) -> &'static str {
        "make directory"
    }

    fn check(&self) -> Result<(), Refusal> {
        check_directory(self.parent)?;
        name::check(&self.name)
    }

    /// None: the edge itself decides who is first.
    fn holds(&self) -> Vec<u64> {
        vec![]
    }

    fn steps(&self) -> &'static [State] {
        &[State::First, State::Insert]
    }

    fn commits(&self) -> State {
        State::Insert
    }

    fn request(&self, state: State, row: &TransactionRow) -> Option<Op> {
        let MakeDirectory { parent, mode, uid, gid, mtime, .. } = *self;
        match state {
            State::First => {
                let slot = row.begin.as_ref().map_or(0, |begin| begin.slot);
                let create = CreateDirectoryInode { slot, parent, mode, uid, gid, mtime };
                Some(Op::CreateDirectoryInode(create))
            }
            State::Insert => {
                let (name, target) = (self.name.clone(), row.made);
                Some(Op::InsertEdge(InsertEdge { dir: parent, name, target, replace: false }))
            }
            State::Waiting | State::Walk | State::SetParent | State::Remove | State::Back => None,
        }
    }

    fn undo(&self, row: &TransactionRow) -> Option<Op> {
        Some(Op::RemoveDirectoryInode(RemoveDirectoryInode { dir: row.made }))
    }

    fn id(&self, row: &TransactionRow) -> u64 {
        row.made
    }

    fn begun(&self, reply: &ShardReply) -> Result<u64, Refusal> {
        match &reply.reply {
            Some(Reply::Edge(edge)) => Ok(edge.target),
            _ => Err(Refusal::malformed("a new directory without its id")),
        }
    }
}

impl<'a> From<&'a RemoveDirectory> for OldEdge<'a> {
    fn from(op: &'a RemoveDirectory) -> OldEdge<'a> {
        let RemoveDirectory { parent, target, created_at, .. } = *op;
        OldEdge { dir: parent, name: &op.name, target, created_at }
    }
}

impl Plan for RemoveDirectory {
    fn kind(&self) -> &'static str {
        "remove directory"
    }

    fn check(&self) -> Result<(), Refusal> {
        check_directory(self.parent)?;
        check_directory(self.target)?;
        name::check(&self.name)
    }

    fn holds(&self) -> Vec<u64> {
        vec![self.parent, self.target]
    }

    fn steps(&self) -> &'static [State] {
        &[State::First, State::Insert, State::Remove]
    }

    fn commits(&self) -> State {
        State::Insert
    }

    fn request(&self, state: State, _row: &TransactionRow) -> Option<Op> {
        match state {
            State::First => Some(OldEdge::from(self).lock()),
            State::Insert => {
                Some(Op::OrphanDirectory(OrphanDirectory { dir: self.target, parent: self.parent }))
            }
            State::Remove => Some(OldEdge::from(self).end()),
            State::Waiting | State::Walk | State::SetParent | State::Back => None,
        }
    }

    fn undo(&self, _row: &TransactionRow) -> Option<Op> {
        Some(OldEdge::from(self).unlock())
    }

    fn id(&self, _row: &TransactionRow) -> u64 {
        self.target
    }
}

impl<'a> From<&'a RenameFile> for OldEdge<'a> {
    fn from(op: &'a RenameFile) -> OldEdge<'a> {
        let RenameFile { old_parent, target, created_at, .. } = *op;
        OldEdge { dir: old_parent, name: &op.old_name, target, created_at }
    }
}

impl Plan for RenameFile {
    fn kind(&self) -> &'static str {
        "move file"
    }

    fn check(&self) -> Result<(), Refusal> {
        check_move(self.old_parent, self.new_parent)?;
        check_file(self.target)?;
        name::check(&self.old_name)?;
        name::check(&self.new_name)
    }

    fn holds(&self) -> Vec<u64> {
        vec![self.old_parent, self.new_parent]
    }

    fn steps(&self) -> &'static [State] {
        &[State::First, State::Insert, State::Remove]
    }

    fn commits(&self) -> State {
        State::Insert
    }

    fn request(&self, state: State, _row: &TransactionRow) -> Option<Op> {
        match state {
            State::First => Some(OldEdge::from(self).lock()),
            State::Insert => {
                let (name, target) = (self.new_name.clone(), self.target);
                Some(Op::InsertEdge(InsertEdge { dir: self.new_parent, name, target, replace: true }))
            }
            State::Remove => Some(OldEdge::from(self).end()),
            State::Waiting | State::Walk | State::SetParent | State::Back => None,
        }
    }

    fn undo(&self, _row: &TransactionRow) -> Option<Op> {
        Some(OldEdge::from(self).unlock())
    }

    fn id(&self, _row: &TransactionRow) -> u64 {
        self.target
    }
}

impl<'a> From<&'a RenameDirectory> for OldEdge<'a> {
    fn from(op: &'a RenameDirectory) -> OldEdge<'a> {
        let RenameDirectory { old_parent, target, created_at, .. } = *op;
        OldEdge { dir: old_parent, name: &op.old_name, target, created_at }
    }
}

impl Plan for RenameDirectory {
    fn kind(&self) -> &'static str {
        "move directory"
    }

    fn check(&self) -> Result<(), Refusal> {
        check_directory(self.old_parent)?;
        check_directory(self.new_parent)?;
        check_directory(self.target)?;
        check_move(self.old_parent, self.new_parent)?;
        if self.target == self.new_parent {
            return Err(Refusal::new(Code::Loop, "a directory cannot be moved into itself"));
        }
        name::check(&self.old_name)?;
        name::check(&self.new_name)
    }

    fn holds(&self) -> Vec<u64> {
        vec![self.old_parent, self.new_parent, self.target]
    }

    fn steps(&self) -> &'static [State] {
        &[State::First, State::Walk, State::Insert, State::SetParent, State::Remove]
    }

    fn commits(&self) -> State {
        State::Insert
    }

    fn request(&self, state: State, _row: &TransactionRow) -> Option<Op> {
        let (target, parent) = (self.target, self.new_parent);
        match state {
            State::First => Some(OldEdge::from(self).lock()),
            State::Insert => {
                let name = self.new_name.clone();
                Some(Op::InsertEdge(InsertEdge { dir: parent, name, target, replace: false }))
            }
            State::SetParent => Some(Op::SetParent(SetParent { dir: target, parent })),
            State::Remove => Some(OldEdge::from(self).end()),
            State::Waiting | State::Walk | State::Back => None,
        }
    }

    fn undo(&self, _row: &TransactionRow) -> Option<Op> {
        Some(OldEdge::from(self).unlock())
    }

    fn id(&self, _row: &TransactionRow) -> u64 {
        self.target
    }

    fn moves(&self) -> Option<(u64, u64)> {
        Some((self.target, self.new_parent))
    }
}

impl Plan for ForgetFile {
    fn kind(&self) -> &'static str {
        "forget file"
    }

    fn check(&self) -> Result<(), Refusal> {
        check_directory(self.dir)?;
        check_file(self.target)?;
        name::check(&self.name)
    }

    /// None: whoever ends the past edge of a file is the only one who knows the file.
    fn holds(&self) -> Vec<u64> {
        vec![]
    }

    fn steps(&self) -> &'static [State] {
        &[State::First, State::Remove]
    }

    fn commits(&self) -> State {
        State::First
    }

    fn request(&self, state: State, _row: &TransactionRow) -> Option<Op> {
        let ForgetFile { dir, target, ended_at, policy, .. } = *self;
        match state {
            State::First => {
                let name = self.name.clone();
                Some(Op::DropPastEdge(DropPastEdge { dir, name, target, ended_at, policy }))
            }
            State::Remove => Some(Op::RemoveFileInode(RemoveFileInode { id: target })),
            State::Waiting | State::Walk | State::Insert | State::SetParent | State::Back => None,
        }
    }

    fn undo(&self, _row: &TransactionRow) -> Option<Op> {
        None
    }

    fn id(&self, _row: &TransactionRow) -> u64 {
        self.target
    }
}

impl Plan for ForgetDirectory {
    fn kind(&self) -> &'static str {
        "forget directory"
    }

    fn check(&self) -> Result<(), Refusal> {
        check_directory(self.target)
    }

    fn holds(&self) -> Vec<u64> {
        vec![self.target]
    }

    fn steps(&self) -> &'static [State] {
        &[State::First]
    }

    fn commits(&self) -> State {
        State::First
    }

    fn request(&self, state: State, _row: &TransactionRow) -> Option<Op> {
        let forget = ForgetDirectoryInode { dir: self.target, policy: self.policy };
        (state == State::First).then_some(Op::ForgetDirectoryInode(forget))
    }

    fn undo(&self, _row: &TransactionRow) -> Option<Op> {
        None
    }

    fn id(&self, _row: &TransactionRow) -> u64 {
        self.target
    }
}

impl Plan for UndeleteDirectory {
    fn kind(&self) -> &'static str {
        "undelete directory"
    }

    fn check(&self) -> Result<(), Refusal> {
        check_directory(self.target)?;
        check_directory(self.parent)?;
        if self.target == self.parent {
            return Err(Refusal::new(Code::Loop, "a directory cannot be brought back into itself"));
        }
        name::check(&self.name)
    }

    fn holds(&self) -> Vec<u64> {
        vec![self.parent, self.target]
    }

    fn steps(&self) -> &'static [State] {
        &[State::First, State::Insert, State::SetParent]
    }

    fn commits(&self) -> State {
        State::Insert
    }

    fn request(&self, state: State, _row: &TransactionRow) -> Option<Op> {
        let UndeleteDirectory { parent, target, .. } = *self;
        match state {
            State::First => Some(Op::Stat(Stat { id: target })),
            State::Insert => {
                let name = self.name.clone();
                Some(Op::InsertEdge(InsertEdge { dir: parent, name, target, replace: false }))
            }
            State::SetParent => Some(Op::AdoptDirectory(AdoptDirectory { dir: target, parent })),
            State::Waiting | State::Walk | State::Remove | State::Back => None,
        }
    }

    fn undo(&self, _row: &TransactionRow) -> Option<Op> {
        None
    }

    fn id(&self, _row: &TransactionRow) -> u64 {
        self.target
    }

    /// A directory may come back if it was removed and is still known.
    fn begun(&self, reply: &ShardReply) -> Result<u64, Refusal> {
        match &reply.reply {
            Some(Reply::Attributes(attributes)) if attributes.parent == 0 => Ok(0),
            Some(Reply::Attributes(_)) => Err(Refusal::new(Code::Stale, "the directory was not removed")),
            _ => Err(Refusal::malformed("a stat without attributes")),
        }
    }
}
