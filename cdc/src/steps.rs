//! The steps of every kind of transaction.
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

use clutch_proto::{
    InodeId, Refusal,
    cdc::{CdcReply, RenameDirectory, TransactionRow, begin::Op},
    mutants::{self, Mutant},
    rules::v1::PATH_DEPTH_MAX,
    shard::{
        AdoptDirectory, CreateDirectoryInode, DropPastEdge, ForgetDirectoryInode, InsertEdge, LockEdge,
        OrphanDirectory, Remaining, RemoveDirectoryInode, RemoveFileInode, RemoveLockedEdge, SetParent,
        ShardReply, ShardRequest, Stat, UnlockEdge, shard_reply::Reply, shard_request,
    },
    types::{Code, Error},
};

/// Where a transaction stands. The numbers are in the rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Waits for its directories.
    Waiting = 0,
    /// Makes the inode, locks the edge, or whatever a kind begins with.
    First = 1,
    /// Reads the ancestors of the new parent, one by one.
    Walk = 2,
    /// The point of no return.
    Insert = 3,
    /// Tells the moved directory of its new parent.
    SetParent = 4,
    /// Ends the old edge, or removes the file.
    Remove = 5,
    /// Takes the first step back.
    Back = 6,
}

impl State {
    pub(crate) fn of(row: &TransactionRow) -> State {
        use State::{Back, First, Insert, Remove, SetParent, Waiting, Walk};
        [First, Walk, Insert, SetParent, Remove, Back]
            .into_iter()
            .find(|s| *s as u32 == row.state)
            .unwrap_or(Waiting)
    }
}

/// What follows a step.
pub(crate) enum Next {
    Enter(State),
    Finish(Result<CdcReply, Refusal>),
}

fn op(row: &TransactionRow) -> Option<&Op> {
    row.begin.as_ref().and_then(|b| b.op.as_ref())
}

/// A word for people.
pub fn kind_name(row: &TransactionRow) -> &'static str {
    match op(row) {
        Some(Op::MakeDirectory(_)) => "make directory",
        Some(Op::RemoveDirectory(_)) => "remove directory",
        Some(Op::RenameFile(_)) => "move file",
        Some(Op::RenameDirectory(_)) => "move directory",
        Some(Op::ForgetFile(_)) => "forget file",
        Some(Op::ForgetDirectory(_)) => "forget directory",
        Some(Op::UndeleteDirectory(_)) => "undelete directory",
        None => "nothing",
    }
}

/// A few words for people.
pub fn state_name(row: &TransactionRow) -> String {
    match row.walk_blocked_by {
        0 => format!("{:?}", State::of(row)).to_lowercase(),
        other => format!("waits for transaction {other}"),
    }
}

/// The directories that a transaction holds while it runs, each once. Making a directory holds none: the edge
/// itself decides who is first.
pub(crate) fn directories(row: &TransactionRow) -> Vec<u64> {
    let mut dirs = match op(row) {
        // Whoever ends the past edge of a file is the only one who knows the file.
        Some(Op::MakeDirectory(_) | Op::ForgetFile(_)) | None => vec![],
        Some(Op::ForgetDirectory(op)) => vec![op.target],
        Some(Op::UndeleteDirectory(op)) => vec![op.parent, op.target],
        Some(Op::RemoveDirectory(op)) => vec![op.parent, op.target],
        Some(Op::RenameFile(op)) => vec![op.old_parent, op.new_parent],
        Some(Op::RenameDirectory(op)) => vec![op.old_parent, op.new_parent, op.target],
    };
    dirs.sort_unstable();
    dirs.dedup();
    dirs
}

/// The directory that a move takes with it.
pub(crate) fn moved_directory(row: &TransactionRow) -> Option<u64> {
    match op(row) {
        Some(Op::RenameDirectory(op)) => Some(op.target),
        _ => None,
    }
}

/// Puts the walk at its beginning: the new parent itself.
pub(crate) fn begin_walk(row: &mut TransactionRow) {
    if let Some(Op::RenameDirectory(op)) = op(row) {
        row.walk_at = op.new_parent;
        row.walk_depth = 0;
    }
}

/// The old edge of a transaction that locks one.
fn old_edge(op: &Op) -> Option<(u64, bytes::Bytes, u64, u64)> {
    match op {
        Op::MakeDirectory(_) | Op::ForgetFile(_) | Op::ForgetDirectory(_) | Op::UndeleteDirectory(_) => None,
        Op::RemoveDirectory(op) => Some((op.parent, op.name.clone(), op.target, op.created_at)),
        Op::RenameFile(op) => Some((op.old_parent, op.old_name.clone(), op.target, op.created_at)),
        Op::RenameDirectory(op) => Some((op.old_parent, op.old_name.clone(), op.target, op.created_at)),
    }
}

/// Enters a state: the next step begins.
pub(crate) fn enter(row: &mut TransactionRow, state: State) {
    row.state = state as u32;
    row.step += 1;
    row.walk_blocked_by = 0;
}

/// The request of the state that a transaction is in, and the slot whose shard gets it.
pub(crate) fn request(row: &TransactionRow) -> (u8, ShardRequest) {
    let made = row.made;
    let (to, op) = match (State::of(row), op(row)) {
        (State::First, Some(Op::MakeDirectory(op))) => {
            let slot = row.begin.as_ref().map_or(0, |b| b.slot);
            let create = CreateDirectoryInode {
                slot,
                parent: op.parent,
                mode: op.mode,
                uid: op.uid,
                gid: op.gid,
                mtime: op.mtime,
            };
            (u64::from(slot), shard_request::Op::CreateDirectoryInode(create))
        }
        (State::Insert, Some(Op::MakeDirectory(op))) => {
            let insert = InsertEdge { dir: op.parent, name: op.name.clone(), target: made, replace: false };
            (op.parent, shard_request::Op::InsertEdge(insert))
        }
        (State::Back, Some(Op::MakeDirectory(_))) => {
            (made, shard_request::Op::RemoveDirectoryInode(RemoveDirectoryInode { dir: made }))
        }
        (State::Insert, Some(Op::RemoveDirectory(op))) => (
            op.target,
            shard_request::Op::OrphanDirectory(OrphanDirectory { dir: op.target, parent: op.parent }),
        ),
        (State::Insert, Some(Op::RenameFile(op))) => {
            let insert = InsertEdge {
                dir: op.new_parent,
                name: op.new_name.clone(),
                target: op.target,
                replace: true,
            };
            (op.new_parent, shard_request::Op::InsertEdge(insert))
        }
        (State::Insert, Some(Op::RenameDirectory(op))) => {
            let insert = InsertEdge {
                dir: op.new_parent,
                name: op.new_name.clone(),
                target: op.target,
                replace: false,
            };
            (op.new_parent, shard_request::Op::InsertEdge(insert))
        }
        (State::Remove, Some(Op::ForgetFile(op))) => {
            (op.target, shard_request::Op::RemoveFileInode(RemoveFileInode { id: op.target }))
        }
        (_, Some(Op::ForgetFile(op))) => {
            let drop = DropPastEdge {
                dir: op.dir,
                name: op.name.clone(),
                target: op.target,
                ended_at: op.ended_at,
                policy: op.policy,
            };
            (op.dir, shard_request::Op::DropPastEdge(drop))
        }
        (_, Some(Op::ForgetDirectory(op))) => {
            let forget = ForgetDirectoryInode { dir: op.target, policy: op.policy };
            (op.target, shard_request::Op::ForgetDirectoryInode(forget))
        }
        (State::Insert, Some(Op::UndeleteDirectory(op))) => {
            let insert =
                InsertEdge { dir: op.parent, name: op.name.clone(), target: op.target, replace: false };
            (op.parent, shard_request::Op::InsertEdge(insert))
        }
        (State::SetParent, Some(Op::UndeleteDirectory(op))) => {
            let adopt = AdoptDirectory { dir: op.target, parent: op.parent };
            (op.target, shard_request::Op::AdoptDirectory(adopt))
        }
        (_, Some(Op::UndeleteDirectory(op))) => (op.target, shard_request::Op::Stat(Stat { id: op.target })),
        (State::Walk, _) => (row.walk_at, shard_request::Op::Stat(Stat { id: row.walk_at })),
        (State::SetParent, Some(Op::RenameDirectory(op))) => {
            (op.target, shard_request::Op::SetParent(SetParent { dir: op.target, parent: op.new_parent }))
        }
        (state, other) => {
            let (dir, name, target, created_at) = other.and_then(old_edge).unwrap_or_default();
            let op = match state {
                State::Remove => {
                    shard_request::Op::RemoveLockedEdge(RemoveLockedEdge { dir, name, target, created_at })
                }
                State::Back => shard_request::Op::UnlockEdge(UnlockEdge { dir, name, target, created_at }),
                _ => shard_request::Op::LockEdge(LockEdge { dir, name, target, created_at }),
            };
            (dir, op)
        }
    };
    // The slot is the low byte of every id.
    (to as u8, ShardRequest { op: Some(op) })
}

fn roll_back(row: &mut TransactionRow, cause: &Refusal) -> Next {
    if mutants::is(Mutant::RollbackForgets) {
        return Next::Finish(Err(cause.clone()));
    }
    // The code alone: a sentence of this build must not become part of the state.
    row.cause = Some(Error { code: cause.code as i32, detail: String::new() });
    Next::Enter(State::Back)
}

fn done(row: &TransactionRow) -> Next {
    let id = match op(row) {
        Some(Op::MakeDirectory(_)) | None => row.made,
        Some(Op::RemoveDirectory(op)) => op.target,
        Some(Op::RenameFile(op)) => op.target,
        Some(Op::RenameDirectory(op)) => op.target,
        Some(Op::ForgetFile(op)) => op.target,
        Some(Op::ForgetDirectory(op)) => op.target,
        Some(Op::UndeleteDirectory(op)) => op.target,
    };
    Next::Finish(Ok(CdcReply { id, created_at: row.created_at, ..CdcReply::default() }))
}

/// Moves a transaction on by the answer to its current step.
pub(crate) fn next(row: &mut TransactionRow, result: Result<ShardReply, Refusal>) -> Next {
    let is_move_of_directory = matches!(op(row), Some(Op::RenameDirectory(_)));
    let is_make = matches!(op(row), Some(Op::MakeDirectory(_)));
    let is_undelete = matches!(op(row), Some(Op::UndeleteDirectory(_)));
    match (State::of(row), result) {
        (State::First, Err(refusal)) => Next::Finish(Err(refusal)),
        (State::First, Ok(reply)) => {
            match op(row) {
                Some(Op::ForgetFile(_)) => return Next::Enter(State::Remove),
                Some(Op::ForgetDirectory(_)) => return done(row),
                Some(Op::UndeleteDirectory(_)) => return found_removed(&reply),
                _ => {}
            }
            if is_make && let Some(Reply::Edge(edge)) = reply.reply {
                row.made = edge.target;
            }
            if is_move_of_directory {
                begin_walk(row);
                return Next::Enter(State::Walk);
            }
            Next::Enter(State::Insert)
        }
        (State::Walk, Err(refusal)) => roll_back(row, &refusal),
        (State::Walk, Ok(reply)) => walked(row, reply),
        // Nothing was done before.
        (State::Insert, Err(refusal)) if is_undelete => Next::Finish(Err(refusal)),
        (State::Insert, Err(refusal)) => roll_back(row, &refusal),
        (State::Insert, Ok(reply)) => {
            if let Some(Reply::Edge(edge)) = reply.reply {
                row.created_at = edge.created_at;
            }
            if is_make {
                done(row)
            } else if is_move_of_directory || is_undelete {
                Next::Enter(State::SetParent)
            } else {
                Next::Enter(State::Remove)
            }
        }
        // Only forward from here. What these steps change is held by this transaction, so "not there" and "not as it
        // was" mean that it is done already; any other refusal means that it is not, and it is asked for again.
        (state @ (State::SetParent | State::Remove | State::Back), Err(refusal))
            if !matches!(refusal.code, Code::NotFound | Code::Stale) =>
        {
            Next::Enter(state)
        }
        (State::SetParent, _) if is_undelete => done(row),
        (State::SetParent, _) => Next::Enter(State::Remove),
        // A file with a long history goes in parts.
        (State::Remove, Ok(ShardReply { reply: Some(Reply::Remaining(Remaining { gone: false, .. })) })) => {
            Next::Enter(State::Remove)
        }
        (State::Remove, _) => done(row),
        (State::Back | State::Waiting, _) => {
            let cause = row.cause.take().map(Refusal::from_wire);
            Next::Finish(Err(cause.unwrap_or_else(|| Refusal::new(Code::Stale, "rolled back"))))
        }
    }
}

/// A directory may come back if it was removed and is still known.
fn found_removed(reply: &ShardReply) -> Next {
    match &reply.reply {
        Some(Reply::Attributes(attributes)) if attributes.parent == 0 => Next::Enter(State::Insert),
        Some(Reply::Attributes(_)) => {
            Next::Finish(Err(Refusal::new(Code::Stale, "the directory was not removed")))
        }
        _ => Next::Finish(Err(Refusal::malformed("a stat without attributes"))),
    }
}

/// One ancestor is known: go on to its parent, or decide.
fn walked(row: &mut TransactionRow, reply: ShardReply) -> Next {
    let Some(Op::RenameDirectory(RenameDirectory { target, .. })) = op(row) else {
        return Next::Enter(State::Insert);
    };
    let target = *target;
    let Some(Reply::Attributes(attributes)) = reply.reply else {
        return roll_back(row, &Refusal::malformed("a stat without attributes"));
    };
    if attributes.parent == 0 {
        return roll_back(row, &Refusal::new(Code::NotFound, "the new parent was removed"));
    }
    if row.walk_at == target || attributes.parent == target {
        return roll_back(
            row,
            &Refusal::new(Code::Loop, "the new parent lies below the directory that moves"),
        );
    }
    if row.walk_at == InodeId::ROOT.raw() {
        return Next::Enter(State::Insert);
    }
    row.walk_depth += 1;
    if mutants::is(Mutant::WalkEndsEarly) {
        return Next::Enter(State::Insert);
    }
    if row.walk_depth as usize > PATH_DEPTH_MAX {
        return roll_back(
            row,
            &Refusal::new(Code::TooLarge, format!("deeper than {PATH_DEPTH_MAX} directories")),
        );
    }
    row.walk_at = attributes.parent;
    Next::Enter(State::Walk)
}
