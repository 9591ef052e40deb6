//! Directory entries: create, link, rename within a directory, unlink, undelete.
//!
//! Invariants: an edge's creation time is the log's time of the entry that made it; what ends becomes a past
//! edge with the time of its end, so an edge is newer than its predecessors of that name; the directory's
//! `edge_time` is at or above the times of all its edges.

use clutch_proto::{
    ContentId, InodeId, InodeKind, Time,
    mutants::{self, Mutant},
    name,
    rules::v1::{INLINE_BYTES_MAX, SYMLINK_BYTES_MAX},
    shard::{
        ContentRow, CreateFile, CreateInline, CreateSymlink, Done, EdgeReply, EdgeRow, InodeRow, InsertEdge,
        LinkFile, LockEdge, PastEdgeRow, RemoveLockedEdge, RenameInDirectory, Undelete, Unlink, UnlockEdge,
        shard_reply::Reply,
    },
    types::Code,
};
use clutch_state::{Stop, StoreError, Tx, broken_unless};

use crate::{
    content, inline, inode,
    rows::{Reapplied, parse_directory, parse_inode},
    tables,
};

fn shown(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}

/// The edge that a request names by its target and creation time, or why it is not that any more.
pub(crate) fn expect(
    tx: &mut Tx<'_>,
    dir: InodeId,
    name: &[u8],
    target: u64,
    created_at: u64,
) -> Result<EdgeRow, Stop> {
    let edge: EdgeRow = tx.get_row(tables::EDGE, &tables::edge_key(dir, name))?.ok_or_else(|| {
        Stop::refuse(Code::NotFound, format!("{:?} is not in directory {dir}", shown(name)))
    })?;
    if edge.target != target || edge.created_at != created_at {
        return Err(Stop::refuse(
            Code::Stale,
            format!("{:?} is another file now; look it up again", shown(name)),
        ));
    }
    Ok(edge)
}

fn unlocked(edge: EdgeRow, name: &[u8]) -> Result<EdgeRow, Stop> {
    if edge.locked && !mutants::is(Mutant::LockIgnored) {
        return Err(Stop::refuse(Code::Busy, format!("{:?} is being moved; try again", shown(name))));
    }
    Ok(edge)
}

/// Turns a current edge into a past one.
pub(crate) fn end(
    tx: &mut Tx<'_>,
    time: Time,
    dir: InodeId,
    name: &[u8],
    edge: &EdgeRow,
    owned: bool,
) -> Result<(), StoreError> {
    broken_unless!(
        edge.created_at < time.0,
        "an edge of directory {dir} ends at {} and began at {}",
        time.0,
        edge.created_at
    );
    tx.delete(tables::EDGE, &tables::edge_key(dir, name));
    let past = PastEdgeRow { target: edge.target, created_at: edge.created_at, owned };
    tx.insert_row(tables::PAST_EDGE, &tables::past_edge_key(dir, name, time.0), &past);
    Ok(())
}

/// Puts an edge in place of whatever file has the name; returns the inode that was replaced, or 0.
pub(crate) fn insert(
    tx: &mut Tx<'_>,
    time: Time,
    dir: InodeId,
    name: &[u8],
    target: InodeId,
    replace: bool,
) -> Result<u64, Stop> {
    name::check(name)?;
    let key = tables::edge_key(dir, name);
    let mut replaced = 0;
    if let Some(existing) = tx.get_row::<EdgeRow>(tables::EDGE, &key)? {
        let existing = unlocked(existing, name)?;
        if parse_inode(existing.target)?.is_directory() {
            let code = if replace && !target.is_directory() { Code::IsDirectory } else { Code::Exists };
            return Err(Stop::refuse(code, format!("{:?} is a directory", shown(name))));
        }
        if target.is_directory() && replace {
            return Err(Stop::refuse(Code::NotDirectory, format!("{:?} is not a directory", shown(name))));
        }
        if !replace {
            return Err(Stop::refuse(Code::Exists, format!("{:?} exists already", shown(name))));
        }
        replaced = existing.target;
        end(tx, time, dir, name, &existing, true)?;
    }
    tx.put_row(tables::EDGE, &key, &EdgeRow { target: target.raw(), created_at: time.0, locked: false });
    Ok(replaced)
}

/// A directory's own times after a change of its entries.
pub(crate) fn touch(tx: &mut Tx<'_>, time: Time, dir: InodeId, mut row: InodeRow) -> Result<(), StoreError> {
    broken_unless!(
        row.edge_time < time.0,
        "directory {dir} had an edge at {}, and it is {}",
        row.edge_time,
        time.0
    );
    let edge_time = if mutants::is(Mutant::EdgeTimeForgotten) { row.edge_time } else { time.0 };
    (row.mtime, row.ctime, row.edge_time) = (time.0, time.0, edge_time);
    inode::put(tx, dir, &row);
    Ok(())
}

fn made(time: Time, id: InodeId, replaced: u64) -> Reply {
    Reply::Edge(EdgeReply { target: id.raw(), created_at: time.0, locked: false, replaced })
}

pub(crate) fn create_file(tx: &mut Tx<'_>, time: Time, op: CreateFile) -> Reapplied {
    let dir = parse_directory(tx, op.dir)?;
    let dir_row = inode::live_directory(tx, dir)?;
    if op.data.len() > INLINE_BYTES_MAX {
        let text =
            format!("{} bytes of data with a create; at most {INLINE_BYTES_MAX} are allowed", op.data.len());
        return Err(Stop::refuse(Code::TooLarge, text));
    }
    create(tx, time, (dir, dir_row), op)
}

pub(crate) fn create_inline(tx: &mut Tx<'_>, time: Time, op: CreateInline) -> Reapplied {
    let dir = parse_directory(tx, op.dir)?;
    let dir_row = inode::live_directory(tx, dir)?;
    content::check_inline(op.data.len())?;
    let CreateInline { dir: raw, name, mode, uid, gid, mtime, data, replace } = op;
    create(tx, time, (dir, dir_row), CreateFile { dir: raw, name, mode, uid, gid, mtime, data, replace })
}

/// Makes a file, with its bytes when it has some.
fn create(tx: &mut Tx<'_>, time: Time, (dir, dir_row): (InodeId, InodeRow), op: CreateFile) -> Reapplied {
    let id = inode::next_inode(tx, InodeKind::File, dir.slot())?;
    let mut row = inode::new_row(time, op.mode, op.uid, op.gid, op.mtime);
    let replaced = insert(tx, time, dir, &op.name, id, op.replace)?;
    if !op.data.is_empty() {
        let content = content::next_id(tx, dir.slot())?;
        row.size = op.data.len() as u64;
        row.content = content.0;
        let content_row = ContentRow { size: row.size, file: id.raw(), ..ContentRow::default() };
        tx.insert_row(tables::CONTENT, &tables::content_key(content), &content_row);
        inline::insert(tx, content, 0, op.data)?;
    }
    inode::insert(tx, id, &row);
    touch(tx, time, dir, dir_row)?;
    Ok(made(time, id, replaced))
}

pub(crate) fn create_symlink(tx: &mut Tx<'_>, time: Time, op: CreateSymlink) -> Reapplied {
    let dir = parse_directory(tx, op.dir)?;
    let dir_row = inode::live_directory(tx, dir)?;
    if op.target.is_empty() || op.target.len() > SYMLINK_BYTES_MAX || op.target.contains(&0) {
        let text = format!(
            "a link target of {} bytes; 1 to {SYMLINK_BYTES_MAX} without NUL are allowed",
            op.target.len()
        );
        return Err(Stop::refuse(Code::InvalidArgument, text));
    }
    let id = inode::next_inode(tx, InodeKind::Symlink, dir.slot())?;
    let replaced = insert(tx, time, dir, &op.name, id, op.replace)?;
    let mut row = inode::new_row(time, 0o777, op.uid, op.gid, op.mtime);
    row.size = op.target.len() as u64;
    row.symlink_target = op.target;
    inode::insert(tx, id, &row);
    touch(tx, time, dir, dir_row)?;
    Ok(made(time, id, replaced))
}

pub(crate) fn link_file(tx: &mut Tx<'_>, time: Time, op: LinkFile) -> Reapplied {
    let dir = parse_directory(tx, op.dir)?;
    let dir_row = inode::live_directory(tx, dir)?;
    let content = ContentId(op.content);
    let mut content_row = content::transient(tx, time, content, &op.cookie)?;
    if content.slot() != dir.slot() {
        return Err(Stop::refuse(
            Code::InvalidArgument,
            "the content was started for a directory of another slot",
        ));
    }
    if content_row.pending_span != 0 {
        return Err(Stop::refuse(Code::InvalidArgument, "the content's last span is not certified yet"));
    }
    let id = inode::next_inode(tx, InodeKind::File, dir.slot())?;
    let replaced = insert(tx, time, dir, &op.name, id, op.replace)?;
    tx.delete(tables::TRANSIENT, &tables::transient_key(content_row.deadline, content));
    content_row = ContentRow { size: content_row.size, file: id.raw(), ..ContentRow::default() };
    tx.put_row(tables::CONTENT, &tables::content_key(content), &content_row);
    let mut row = inode::new_row(time, op.mode, op.uid, op.gid, op.mtime);
    (row.size, row.content) = (content_row.size, content.0);
    inode::insert(tx, id, &row);
    touch(tx, time, dir, dir_row)?;
    Ok(made(time, id, replaced))
}

pub(crate) fn rename(tx: &mut Tx<'_>, time: Time, op: RenameInDirectory) -> Reapplied {
    let dir = parse_directory(tx, op.dir)?;
    let dir_row = inode::live_directory(tx, dir)?;
    let edge = expect(tx, dir, &op.old_name, op.target, op.created_at)?;
    let edge = unlocked(edge, &op.old_name)?;
    let target = parse_inode(op.target)?;
    if op.old_name == op.new_name {
        return Ok(Reply::Edge(EdgeReply {
            target: op.target,
            created_at: edge.created_at,
            ..EdgeReply::default()
        }));
    }
    let replaced = insert(tx, time, dir, &op.new_name, target, true)?;
    end(tx, time, dir, &op.old_name, &edge, false)?;
    touch(tx, time, dir, dir_row)?;
    Ok(made(time, target, replaced))
}

pub(crate) fn unlink(tx: &mut Tx<'_>, time: Time, op: &Unlink) -> Reapplied {
    let dir = parse_directory(tx, op.dir)?;
    let dir_row = inode::live_directory(tx, dir)?;
    if parse_inode(op.target)?.is_directory() {
        return Err(Stop::refuse(Code::IsDirectory, "a directory is removed through the CDC"));
    }
    let edge = expect(tx, dir, &op.name, op.target, op.created_at)?;
    let edge = unlocked(edge, &op.name)?;
    end(tx, time, dir, &op.name, &edge, true)?;
    touch(tx, time, dir, dir_row)?;
    Ok(made(time, parse_inode(op.target)?, 0))
}

pub(crate) fn undelete(tx: &mut Tx<'_>, time: Time, op: Undelete) -> Reapplied {
    let dir = parse_directory(tx, op.dir)?;
    let dir_row = inode::live_directory(tx, dir)?;
    name::check(&op.name)?;
    let key = tables::past_edge_key(dir, &op.name, op.ended_at);
    let past: PastEdgeRow =
        tx.get_row(tables::PAST_EDGE, &key)?.filter(|p: &PastEdgeRow| p.target == op.target).ok_or_else(
            || Stop::refuse(Code::NotFound, format!("no such past version of {:?}", shown(&op.name))),
        )?;
    if !past.owned {
        let text = format!("{:?} was moved or brought back, not deleted, at that time", shown(&op.name));
        return Err(Stop::refuse(Code::Stale, text));
    }
    let target = parse_inode(op.target)?;
    insert(tx, time, dir, &op.new_name, target, false)?;
    tx.put_row(tables::PAST_EDGE, &key, &PastEdgeRow { owned: false, ..past });
    touch(tx, time, dir, dir_row)?;
    Ok(made(time, target, 0))
}

// Steps of the CDC's transactions. Each is executed once: the CDC tags it with transaction and step.

pub(crate) fn insert_step(tx: &mut Tx<'_>, time: Time, op: &InsertEdge) -> Reapplied {
    let dir = parse_directory(tx, op.dir)?;
    let row = inode::live_directory(tx, dir)?;
    let target = parse_inode(op.target)?;
    let replaced = insert(tx, time, dir, &op.name, target, op.replace)?;
    touch(tx, time, dir, row)?;
    Ok(Reply::Edge(EdgeReply { target: op.target, created_at: time.0, locked: false, replaced }))
}

/// Keeps an edge as it is until it is unlocked or removed.
pub(crate) fn lock_edge(tx: &mut Tx<'_>, op: &LockEdge) -> Reapplied {
    let dir = parse_directory(tx, op.dir)?;
    let edge = expect(tx, dir, &op.name, op.target, op.created_at)?;
    if edge.locked {
        return Err(Stop::refuse(Code::Busy, "another transaction holds the edge"));
    }
    tx.put_row(tables::EDGE, &tables::edge_key(dir, &op.name), &EdgeRow { locked: true, ..edge });
    Ok(Reply::Done(Done {}))
}

fn locked_edge(
    tx: &mut Tx<'_>,
    dir: InodeId,
    name: &[u8],
    target: u64,
    created_at: u64,
) -> Result<EdgeRow, Stop> {
    let edge = expect(tx, dir, name, target, created_at)?;
    if !edge.locked {
        return Err(Stop::refuse(Code::Stale, "the edge is not locked"));
    }
    Ok(edge)
}

pub(crate) fn unlock_edge(tx: &mut Tx<'_>, op: &UnlockEdge) -> Reapplied {
    let dir = parse_directory(tx, op.dir)?;
    let edge = locked_edge(tx, dir, &op.name, op.target, op.created_at)?;
    if mutants::is(Mutant::UnlockSkipped) {
        return Ok(Reply::Done(Done {}));
    }
    tx.put_row(tables::EDGE, &tables::edge_key(dir, &op.name), &EdgeRow { locked: false, ..edge });
    Ok(Reply::Done(Done {}))
}

/// Ends a locked edge whose target lives elsewhere now, or is gone.
pub(crate) fn remove_locked_edge(tx: &mut Tx<'_>, time: Time, op: &RemoveLockedEdge) -> Reapplied {
    let dir = parse_directory(tx, op.dir)?;
    let row = inode::get(tx, dir)?;
    let edge = locked_edge(tx, dir, &op.name, op.target, op.created_at)?;
    end(tx, time, dir, &op.name, &edge, false)?;
    touch(tx, time, dir, row)?;
    Ok(Reply::Done(Done {}))
}
