//! Space that comes back: past edges, past contents, expired contents and dead spans.
//!
//! Whoever collects only proposes; every decision is made again here, from the rows and the log's time. Collection of
//! a file goes in bounded steps: edge and inode in one entry, then its contents part by part, then the spans that
//! nothing uses any more, once their blocks are erased.

use clutch_proto::{
    ContentId, InodeId, ServiceId, SpanId, Time,
    mutants::{self, Mutant},
    name,
    rules::v1::{CONTENTS_PER_ENTRY_MAX, EXTENTS_PER_ENTRY_MAX},
    shard::{
        CollectContent, ContentRow, Done, DropPastEdge, ForgetContent, ForgetEdge, PastEdgeRow, Remaining,
        RemoveFileInode, RemoveSpanEntry, shard_reply::Reply,
    },
    types::{Code, SnapshotPolicy, Span},
};
use clutch_state::{Key, Stop, StoreError, Tx, broken_unless, key_after};

use crate::{
    content, extent, inode, policy, publish,
    rows::{Reapplied, check_slot, parse_directory, parse_inode},
    span, tables,
};

const DONE: Reply = Reply::Done(Done {});
const GONE: Reply = Reply::Remaining(Remaining { bytes: 0, gone: true });
const LEFT: Reply = Reply::Remaining(Remaining { bytes: 0, gone: false });

/// A past edge that its policy lets go, and its key.
fn past_edge(
    tx: &mut Tx<'_>,
    time: Time,
    (dir, name): (InodeId, &[u8]),
    target: u64,
    ended_at: u64,
    policy: Option<&SnapshotPolicy>,
) -> Result<(Key, PastEdgeRow), Stop> {
    let directory = inode::get(tx, dir)?;
    name::check(name)?;
    let key = tables::past_edge_key(dir, name, ended_at);
    let row: Option<PastEdgeRow> = tx.get_row(tables::PAST_EDGE, &key)?;
    let row = row.filter(|p| p.target == target).ok_or_else(|| {
        let shown = String::from_utf8_lossy(name);
        Stop::refuse(Code::NotFound, format!("no such past version of {shown:?}"))
    })?;
    policy::may_go_from(&directory, policy, time, ended_at, |limit| {
        let until = key_after(&match mutants::is(Mutant::VersionsOfColliders) {
            true => tables::edge_from(dir, name::hash63(name)),
            false => tables::past_edge_prefix(dir, name),
        });
        Ok(tx.scan(tables::PAST_EDGE, &[&key[..], &[0]].concat(), &until, limit)?.len())
    })?;
    Ok((key, row))
}

pub(crate) fn forget_edge(tx: &mut Tx<'_>, time: Time, op: ForgetEdge) -> Reapplied {
    let dir = parse_directory(tx, op.dir)?;
    let (key, row) = past_edge(tx, time, (dir, &op.name), op.target, op.ended_at, op.policy.as_ref())?;
    if row.owned {
        let target = parse_inode(op.target)?;
        check_slot(tx, target.slot()).map_err(|stop| match stop {
            Stop::Refused(_) => {
                Stop::refuse(Code::InvalidArgument, "the file lives in another shard: ask the CDC")
            }
            fault => fault,
        })?;
        if !remove_file(tx, target)? {
            // The edge stays, and with it whoever brings it back in between has what is left.
            return Ok(LEFT);
        }
    }
    tx.delete(tables::PAST_EDGE, &key);
    Ok(GONE)
}

/// The first half of forgetting a file of another shard.
pub(crate) fn drop_past_edge(tx: &mut Tx<'_>, time: Time, op: &DropPastEdge) -> Reapplied {
    let dir = parse_directory(tx, op.dir)?;
    let (key, row) = past_edge(tx, time, (dir, &op.name), op.target, op.ended_at, op.policy.as_ref())?;
    if !row.owned {
        return Err(Stop::refuse(Code::Stale, "the edge does not own its file any more"));
    }
    tx.delete(tables::PAST_EDGE, &key);
    Ok(DONE)
}

/// The second half.
pub(crate) fn remove_file_inode(tx: &mut Tx<'_>, op: &RemoveFileInode) -> Reapplied {
    let id = parse_inode(op.id)?;
    check_slot(tx, id.slot())?;
    Ok(if remove_file(tx, id)? { GONE } else { LEFT })
}

/// Removes a file or link and gives its contents to collection: the oldest past ones first, a bounded number at a
/// time. False while there are more.
fn remove_file(tx: &mut Tx<'_>, id: InodeId) -> Result<bool, Stop> {
    if id.is_directory() {
        return Err(Stop::refuse(Code::IsDirectory, format!("{id} is a directory")));
    }
    let row = inode::get(tx, id)?;
    let mut past = publish::past_contents(tx, id, CONTENTS_PER_ENTRY_MAX + 1)?;
    let has_more = past.len() > CONTENTS_PER_ENTRY_MAX;
    past.truncate(CONTENTS_PER_ENTRY_MAX);
    for (key, past) in past {
        disown(tx, ContentId(past.content))?;
        tx.delete(tables::PAST_CONTENT, &key);
    }
    if has_more {
        return Ok(false);
    }
    if row.content != 0 && !mutants::is(Mutant::ContentLeaks) {
        disown(tx, ContentId(row.content))?;
    }
    tx.delete(tables::INODE, &tables::inode_key(id));
    Ok(true)
}

/// Makes a published content one that has expired.
fn disown(tx: &mut Tx<'_>, id: ContentId) -> Result<(), Stop> {
    let row: ContentRow = tx
        .get_row(tables::CONTENT, &tables::content_key(id))?
        .ok_or_else(|| StoreError::Broken(format!("content {id} of a file does not exist")))?;
    content::expire(tx, id, row);
    Ok(())
}

pub(crate) fn forget_content(tx: &mut Tx<'_>, time: Time, op: &ForgetContent) -> Reapplied {
    let id = parse_inode(op.id)?;
    check_slot(tx, id.slot())?;
    inode::get(tx, id)?;
    let (key, row) = publish::past(tx, id, op.ended_at, op.content)?;
    policy::may_go(op.policy.as_ref(), time, op.ended_at, |limit| {
        let until = key_after(&key[..9]);
        Ok(tx.scan(tables::PAST_CONTENT, &[&key[..], &[0]].concat(), &until, limit)?.len())
    })?;
    disown(tx, ContentId(row.content))?;
    tx.delete(tables::PAST_CONTENT, &key);
    Ok(DONE)
}

pub(crate) fn collect_content(tx: &mut Tx<'_>, time: Time, op: &CollectContent) -> Reapplied {
    let id = ContentId(op.content);
    check_slot(tx, id.slot())?;
    let row: Option<ContentRow> = tx.get_row(tables::CONTENT, &tables::content_key(id))?;
    let mut row = row.ok_or_else(|| Stop::refuse(Code::NotFound, format!("content {id} does not exist")))?;
    if row.file != 0 {
        return Err(Stop::refuse(Code::Stale, format!("content {id} is published")));
    }
    if time.0 <= row.deadline && !mutants::is(Mutant::LiveTransientCollected) {
        return Err(Stop::refuse(Code::TooEarly, format!("content {id} has not expired")));
    }
    span::bury(tx, std::mem::take(&mut row.pending_span));
    extent::take_apart(tx, id, &mut row, EXTENTS_PER_ENTRY_MAX)?;
    if row.begin < row.size {
        tx.put_row(tables::CONTENT, &tables::content_key(id), &row);
        return Ok(Reply::Remaining(Remaining { bytes: row.size - row.begin, gone: false }));
    }
    tx.delete(tables::CONTENT, &tables::content_key(id));
    tx.delete(tables::TRANSIENT, &tables::transient_key(row.deadline, id));
    Ok(Reply::Remaining(Remaining { bytes: 0, gone: true }))
}

pub(crate) fn remove_span(tx: &mut Tx<'_>, entry: &RemoveSpanEntry) -> Reapplied {
    let op = entry.op.as_ref().ok_or_else(|| Stop::unknown("it has no operation that this build knows"))?;
    let id = SpanId(op.span_id);
    check_slot(tx, id.slot())?;
    let dead = tables::span_key(id);
    if tx.get(tables::DEAD_SPAN, &dead)?.is_none() {
        return Err(Stop::refuse(Code::NotFound, format!("span {id} does not exist or is not dead")));
    }
    if entry.first_bad != 0 {
        let text = format!("the proof of block {} is not valid", entry.first_bad - 1);
        return Err(Stop::refuse(Code::BadProof, text));
    }
    let span: Span = tx
        .get_row(tables::SPAN, &dead)?
        .ok_or_else(|| StoreError::Broken(format!("dead span {id} does not exist")))?;
    broken_unless!(span.uses == 0, "dead span {id} has {} uses", span.uses);
    for block in &span.blocks {
        tx.delete(tables::BLOCK, &tables::block_key(id.slot(), ServiceId(block.service_id), block.block_id));
    }
    tx.delete(tables::SPAN, &dead);
    tx.delete(tables::DEAD_SPAN, &dead);
    Ok(DONE)
}
