//! Rows of inodes and the counters that ids come from.

use clutch_proto::{
    InodeId, InodeKind, Slot, Time,
    mutants::{self, Mutant},
    shard::{CounterRow, InodeRow, SetAttributes, shard_reply::Reply},
    types::{Attributes, Code},
};
use clutch_state::{Stop, Tx};

use crate::{
    rows::{Reapplied, Rows, check_slot, parse_inode},
    tables,
};

/// What of a mode is kept: permissions, set-id and sticky bits. The kind is in the id.
pub(crate) const MODE_MASK: u32 = 0o7777;

pub(crate) fn get(rows: &mut impl Rows, id: InodeId) -> Result<InodeRow, Stop> {
    rows.row(tables::INODE, &tables::inode_key(id))?
        .ok_or_else(|| Stop::refuse(Code::NotFound, format!("inode {id} does not exist")))
}

/// A directory that can take entries.
pub(crate) fn live_directory(rows: &mut impl Rows, id: InodeId) -> Result<InodeRow, Stop> {
    let row = get(rows, id)?;
    if row.parent == 0 {
        return Err(Stop::refuse(Code::NotFound, format!("directory {id} was removed")));
    }
    Ok(row)
}

pub(crate) fn put(tx: &mut Tx<'_>, id: InodeId, row: &InodeRow) {
    tx.put_row(tables::INODE, &tables::inode_key(id), row);
}

/// Writes the row of an inode whose id was drawn just now.
pub(crate) fn insert(tx: &mut Tx<'_>, id: InodeId, row: &InodeRow) {
    tx.insert_row(tables::INODE, &tables::inode_key(id), row);
}

/// Draws the next numbers of a slot.
pub(crate) fn with_counters<T>(
    tx: &mut Tx<'_>,
    slot: Slot,
    draw: impl FnOnce(&mut CounterRow) -> T,
) -> Result<T, Stop> {
    // Sequence 1 of slot 0 is the root directory.
    let mut row: CounterRow =
        tx.get_row(tables::COUNTER, &[slot.0])?.unwrap_or(CounterRow { inode: 1, ..CounterRow::default() });
    let drawn = draw(&mut row);
    tx.put_row(tables::COUNTER, &[slot.0], &row);
    Ok(drawn)
}

pub(crate) fn next_inode(tx: &mut Tx<'_>, kind: InodeKind, slot: Slot) -> Result<InodeId, Stop> {
    let sequence = with_counters(tx, slot, |c| {
        c.inode += 1;
        c.inode
    })?;
    InodeId::new(kind, sequence, slot)
        .ok_or_else(|| Stop::refuse(Code::NoSpace, "the slot's inode ids are used up"))
}

/// A row with all times set to the log's.
pub(crate) fn new_row(time: Time, mode: u32, uid: u32, gid: u32, mtime: u64) -> InodeRow {
    let mtime = if mtime == 0 { time.0 } else { mtime };
    InodeRow {
        mode: mode & MODE_MASK,
        uid,
        gid,
        mtime,
        ctime: time.0 + if mutants::is(Mutant::ApplyReadsClock) { mutants::ticks() % 3 } else { 0 },
        atime: mtime,
        nlink: 1,
        ..InodeRow::default()
    }
}

pub(crate) fn set_attributes(tx: &mut Tx<'_>, time: Time, op: &SetAttributes) -> Reapplied {
    let id = parse_inode(op.id)?;
    check_slot(tx, id.slot())?;
    let mut row = get(tx, id)?;
    if let Some(mode) = op.mode {
        row.mode = mode & MODE_MASK;
    }
    row.uid = op.uid.unwrap_or(row.uid);
    row.gid = op.gid.unwrap_or(row.gid);
    row.mtime = op.mtime.unwrap_or(row.mtime);
    row.atime = op.atime.unwrap_or(row.atime);
    row.ctime = time.0;
    put(tx, id, &row);
    Ok(Reply::Attributes(attributes(id, row)))
}

pub(crate) fn attributes(id: InodeId, row: InodeRow) -> Attributes {
    Attributes {
        id: id.raw(),
        mode: row.mode,
        uid: row.uid,
        gid: row.gid,
        size: row.size,
        mtime: row.mtime,
        ctime: row.ctime,
        atime: row.atime,
        nlink: row.nlink,
        parent: row.parent,
        edge_time: row.edge_time,
        content: row.content,
        symlink_target: row.symlink_target,
        policy: row.policy,
        former_parent: row.former_parent,
    }
}
