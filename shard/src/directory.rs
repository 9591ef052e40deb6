//! Directories' inodes: steps of the CDC's transactions, each of which is executed once. Those on edges are in [`crate::edge`].

use clutch_proto::{
    InodeKind, Slot, Time,
    mutants::{self, Mutant},
    shard::{
        AdoptDirectory, CreateDirectoryInode, Done, EdgeReply, ForgetDirectoryInode, InodeRow,
        OrphanDirectory, RemoveDirectoryInode, SetParent, shard_reply::Reply,
    },
    types::Code,
};
use clutch_state::{Stop, Tx, key_after};

use crate::{
    inode, policy,
    rows::{Reapplied, check_slot, parse_directory, parse_inode},
    tables,
};

const DONE: Reply = Reply::Done(Done {});

/// Makes a directory that nothing points to yet.
pub(crate) fn create_inode(tx: &mut Tx<'_>, time: Time, op: &CreateDirectoryInode) -> Reapplied {
    let slot =
        u8::try_from(op.slot).map_err(|_| Stop::refuse(Code::InvalidArgument, "slots go from 0 to 255"))?;
    check_slot(tx, Slot(slot))?;
    let parent = parse_inode(op.parent)?;
    if !parent.is_directory() {
        return Err(Stop::refuse(Code::NotDirectory, format!("{parent} is not a directory")));
    }
    let id = inode::next_inode(tx, InodeKind::Directory, Slot(slot))?;
    let mut row = inode::new_row(time, op.mode, op.uid, op.gid, op.mtime);
    (row.parent, row.edge_time, row.nlink) = (parent.raw(), time.0, 2);
    inode::put(tx, id, &row);
    Ok(Reply::Edge(EdgeReply { target: id.raw(), ..EdgeReply::default() }))
}

pub(crate) fn set_parent(tx: &mut Tx<'_>, time: Time, op: &SetParent) -> Reapplied {
    let dir = parse_directory(tx, op.dir)?;
    let parent = parse_inode(op.parent)?;
    let row = inode::get(tx, dir)?;
    inode::put(tx, dir, &InodeRow { parent: parent.raw(), ctime: time.0, ..row });
    Ok(DONE)
}

fn has_rows(tx: &mut Tx<'_>, table: clutch_state::Table, dir: clutch_proto::InodeId) -> Result<bool, Stop> {
    let prefix = tables::directory_prefix(dir);
    Ok(!tx.scan(table, &prefix, &key_after(&prefix), 1)?.is_empty())
}

/// Takes an empty directory out of the tree: from here on nothing can be made in it.
pub(crate) fn orphan(tx: &mut Tx<'_>, time: Time, op: &OrphanDirectory) -> Reapplied {
    let dir = parse_directory(tx, op.dir)?;
    let row = inode::live_directory(tx, dir)?;
    if row.parent != op.parent {
        return Err(Stop::refuse(Code::Stale, "the directory has another parent now"));
    }
    if has_rows(tx, tables::EDGE, dir)? && !mutants::is(Mutant::RemoveNotEmpty) {
        return Err(Stop::refuse(Code::NotEmpty, "the directory is not empty"));
    }
    let former_parent = row.parent;
    inode::put(tx, dir, &InodeRow { parent: 0, former_parent, ctime: time.0, nlink: 0, ..row });
    Ok(DONE)
}

/// Puts a removed directory back into the tree; the edge that leads to it is there already.
pub(crate) fn adopt(tx: &mut Tx<'_>, time: Time, op: &AdoptDirectory) -> Reapplied {
    let dir = parse_directory(tx, op.dir)?;
    let parent = parse_inode(op.parent)?;
    let row = inode::get(tx, dir)?;
    if row.parent != 0 {
        return Err(Stop::refuse(Code::Stale, "the directory was not removed"));
    }
    inode::put(tx, dir, &InodeRow { parent: parent.raw(), former_parent: 0, ctime: time.0, nlink: 2, ..row });
    Ok(DONE)
}

/// Forgets a removed directory for good.
pub(crate) fn forget(tx: &mut Tx<'_>, time: Time, op: &ForgetDirectoryInode) -> Reapplied {
    let dir = parse_directory(tx, op.dir)?;
    let row = inode::get(tx, dir)?;
    if row.parent != 0 {
        return Err(Stop::refuse(Code::Stale, "the directory was not removed"));
    }
    // Its change time is that of its removal, or later.
    policy::may_go_from(&row, op.policy.as_ref(), time, row.ctime, |_| Ok(0))?;
    if has_rows(tx, tables::EDGE, dir)? || has_rows(tx, tables::PAST_EDGE, dir)? {
        return Err(Stop::refuse(Code::NotEmpty, "the directory still has a history"));
    }
    tx.delete(tables::INODE, &tables::inode_key(dir));
    Ok(DONE)
}

/// Takes back [`create_inode`].
pub(crate) fn remove_inode(tx: &mut Tx<'_>, op: &RemoveDirectoryInode) -> Reapplied {
    let dir = parse_directory(tx, op.dir)?;
    inode::get(tx, dir)?;
    if has_rows(tx, tables::EDGE, dir)? || has_rows(tx, tables::PAST_EDGE, dir)? {
        return Err(Stop::refuse(Code::NotEmpty, "the directory is in use"));
    }
    tx.delete(tables::INODE, &tables::inode_key(dir));
    Ok(DONE)
}
