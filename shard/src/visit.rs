//! Reads for those who look after the whole: collection, repair, moving disks. All go in pages through the slots.

use bytes::Bytes;
use clutch_proto::{
    InodeId, Slot, SpanId,
    mutants::{self, Mutant},
    shard::{
        ContentHistory, ContentHistoryReply, ContentRow, Genesis, HeldBlock, InodeRow, PastContent,
        PastContentRow, Transient, VisitBlocks, VisitBlocksReply, VisitDeadSpans, VisitDeadSpansReply,
        VisitInodes, VisitInodesReply, VisitPastContents, VisitPastContentsReply, VisitSpans,
        VisitSpansReply, VisitTransients, VisitTransientsReply, shard_reply::Reply,
    },
    types::{Code, Span},
};
use clutch_state::{Key, Stop, StoreError, Table, View, get_row, key_after, store::decode_row};

use crate::{
    facts::Pages,
    inode,
    rows::{check_slot, parse_inode, parse_slot},
    tables,
};

/// Where a visit goes on, and the shard's last slot.
fn begin(mut view: &dyn View, slot: u32, after: &[u8]) -> Result<(Key, Slot), Stop> {
    let slot = parse_slot(&mut view, slot)?;
    let from = match after {
        [] | [_] => Key::from_slice(&[slot.0]),
        after => [after, &[0]].concat().into(),
    };
    if from[0] != slot.0 {
        return Err(Stop::refuse(Code::InvalidArgument, "`after` is of another slot than the request"));
    }
    let shard: Genesis = get_row(view, tables::SHARD, &[])?.unwrap_or_default();
    // Within 0..=255 since genesis.
    Ok((from, Slot(shard.slot_last as u8)))
}

/// The first key behind a shard.
fn behind(last: Slot) -> Bytes {
    last.0.checked_add(1).map_or_else(Bytes::new, |next| Bytes::copy_from_slice(&[next]))
}

/// A page of a table's rows from a slot on, and where the next one begins.
fn page(
    view: &dyn View,
    table: Table,
    slot: u32,
    after: &[u8],
    limit: usize,
) -> Result<(Vec<(Bytes, Bytes)>, Bytes), Stop> {
    let (from, last) = begin(view, slot, after)?;
    let rows = view.scan(table, &from, &key_after(&[last.0]), limit)?;
    let next = match rows.last() {
        Some((key, _)) if rows.len() == limit => key.clone(),
        _ => behind(last),
    };
    Ok((rows, next))
}

/// The same where only part of every slot is of interest: the keys that begin with what `part` gives.
fn page_of_parts(
    view: &dyn View,
    table: Table,
    slot: u32,
    after: &[u8],
    limit: usize,
    part: impl Fn(Slot) -> (Key, Key),
) -> Result<(Vec<(Bytes, Bytes)>, Bytes), Stop> {
    let (mut from, last) = begin(view, slot, after)?;
    let mut rows = Vec::new();
    for slot in (from[0]..=last.0).map(Slot) {
        let (begin, until) = part(slot);
        if from < begin {
            from = begin;
        }
        rows.extend(view.scan(table, &from, &until, limit - rows.len())?);
        if rows.len() == limit && !(slot == last && mutants::is(Mutant::LastSlotEndsEarly)) {
            let next = rows.last().map(|(key, _): &(Bytes, Bytes)| key.clone());
            return Ok((rows, next.unwrap_or_default()));
        }
    }
    Ok((rows, behind(last)))
}

fn broken(what: &str) -> StoreError {
    StoreError::Broken(format!("{what}'s key"))
}

pub(crate) fn inodes(view: &dyn View, op: &VisitInodes, pages: &Pages) -> Result<Reply, Stop> {
    if !(1..=3).contains(&op.kind) {
        return Err(Stop::refuse(Code::InvalidArgument, "kinds of inodes are 1, 2 and 3"));
    }
    let limit = match op.limit as usize {
        0 => pages.rows,
        asked => asked.min(pages.rows),
    };
    // The kind is in the two highest bits of an id.
    let kind = u64::from(op.kind);
    let part = |slot: Slot| {
        let until = kind.checked_add(1).filter(|k| *k < 4).map(|k| tables::from_number(slot, k << 62));
        (tables::from_number(slot, kind << 62), until.unwrap_or_else(|| key_after(&[slot.0])))
    };
    let (rows, next) = page_of_parts(view, tables::INODE, op.slot, &op.after, limit, part)?;
    let mut reply = VisitInodesReply { next, ..VisitInodesReply::default() };
    for (key, value) in rows {
        let id = tables::parse_single(&key).and_then(InodeId::from_wire).ok_or_else(|| broken("an inode"))?;
        let row: InodeRow = decode_row(tables::INODE, &key, value)?;
        reply.inodes.push(inode::attributes(id, row));
    }
    Ok(Reply::VisitInodes(reply))
}

pub(crate) fn transients(view: &dyn View, op: &VisitTransients, pages: &Pages) -> Result<Reply, Stop> {
    let (rows, next) = page(view, tables::TRANSIENT, op.slot, &op.after, pages.rows)?;
    let mut reply = VisitTransientsReply { next, ..VisitTransientsReply::default() };
    for (key, _) in rows {
        let (deadline, content) = tables::parse_pair(&key).ok_or_else(|| broken("a transient"))?;
        let row: Option<ContentRow> =
            get_row(view, tables::CONTENT, &tables::content_key(clutch_proto::ContentId(content)))?;
        reply.transients.push(Transient { content, deadline, size: row.map_or(0, |r| r.size) });
    }
    Ok(Reply::VisitTransients(reply))
}

fn past_content(view: &dyn View, key: &[u8], value: Bytes) -> Result<PastContent, StoreError> {
    let (file, ended_at) = tables::parse_pair(key).ok_or_else(|| broken("a past content"))?;
    let PastContentRow { content, dir } = decode_row(tables::PAST_CONTENT, key, value)?;
    let row: Option<ContentRow> =
        get_row(view, tables::CONTENT, &tables::content_key(clutch_proto::ContentId(content)))?;
    Ok(PastContent { file, content, ended_at, size: row.map_or(0, |r| r.size), dir })
}

pub(crate) fn past_contents(view: &dyn View, op: &VisitPastContents, pages: &Pages) -> Result<Reply, Stop> {
    let (rows, next) = page(view, tables::PAST_CONTENT, op.slot, &op.after, pages.rows)?;
    let past = rows.into_iter().map(|(key, value)| past_content(view, &key, value));
    Ok(Reply::VisitPastContents(VisitPastContentsReply { past: past.collect::<Result<_, _>>()?, next }))
}

/// Past contents of one file.
pub(crate) fn content_history(
    mut view: &dyn View,
    op: &ContentHistory,
    pages: &Pages,
) -> Result<Reply, Stop> {
    let id = parse_inode(op.id)?;
    check_slot(&mut view, id.slot())?;
    inode::get(&mut view, id)?;
    let from = tables::past_content_key(id, op.after.saturating_add(1));
    let rows = view.scan(tables::PAST_CONTENT, &from, &key_after(&from[..9]), pages.rows)?;
    let more = rows.len() == pages.rows;
    let past = rows.into_iter().map(|(key, value)| past_content(view, &key, value));
    let past: Vec<PastContent> = past.collect::<Result<_, _>>()?;
    let next = past.last().filter(|_| more).map_or(0, |p| p.ended_at);
    Ok(Reply::ContentHistory(ContentHistoryReply { past, next }))
}

pub(crate) fn dead_spans(view: &dyn View, op: &VisitDeadSpans, pages: &Pages) -> Result<Reply, Stop> {
    let (rows, next) = page(view, tables::DEAD_SPAN, op.slot, &op.after, pages.spans)?;
    let mut reply = VisitDeadSpansReply { next, ..VisitDeadSpansReply::default() };
    for (key, _) in rows {
        let id = tables::parse_single(&key).ok_or_else(|| broken("a dead span"))?;
        let span: Span = get_row(view, tables::SPAN, &tables::span_key(SpanId(id)))?
            .ok_or_else(|| StoreError::Broken(format!("dead span {id:x} does not exist")))?;
        reply.spans.push(Span { cell_crcs: Vec::new(), ..span });
    }
    Ok(Reply::VisitDeadSpans(reply))
}

/// A page of the block index: what of each slot belongs to a service.
fn held_by(
    view: &dyn View,
    slot: u32,
    after: &[u8],
    service: u64,
    limit: usize,
) -> Result<(Vec<HeldBlock>, Bytes), Stop> {
    let part = |slot: Slot| {
        let prefix = tables::from_number(slot, service);
        let until = key_after(&prefix);
        (prefix, until)
    };
    let (rows, next) = page_of_parts(view, tables::BLOCK, slot, after, limit, part)?;
    let mut held = Vec::with_capacity(rows.len());
    for (key, value) in rows {
        let (_, block_id) = tables::parse_pair(&key).ok_or_else(|| broken("a block"))?;
        let span_id = value.as_ref().try_into().map(u64::from_be_bytes).map_err(|_| broken("a block"))?;
        held.push(HeldBlock { block_id, span_id });
    }
    Ok((held, next))
}

pub(crate) fn blocks(view: &dyn View, op: &VisitBlocks, pages: &Pages) -> Result<Reply, Stop> {
    let (blocks, next) = held_by(view, op.slot, &op.after, op.service_id, pages.rows)?;
    Ok(Reply::VisitBlocks(VisitBlocksReply { blocks, next }))
}

/// Only what is in use: what is written at the moment, and what is dead, needs nobody who looks after it.
pub(crate) fn spans(view: &dyn View, op: &VisitSpans, pages: &Pages) -> Result<Reply, Stop> {
    let (ids, next) = match op.service_id {
        0 => {
            let (rows, next) = page(view, tables::SPAN, op.slot, &op.after, pages.spans)?;
            let ids = rows.iter().map(|(key, _)| tables::parse_single(key).ok_or_else(|| broken("a span")));
            (ids.collect::<Result<Vec<u64>, _>>()?, next)
        }
        service => {
            let (held, next) = held_by(view, op.slot, &op.after, service, pages.spans)?;
            (held.iter().map(|block| block.span_id).collect(), next)
        }
    };
    let mut reply = VisitSpansReply { next, ..VisitSpansReply::default() };
    for id in ids {
        let span: Span = get_row(view, tables::SPAN, &tables::span_key(SpanId(id)))?
            .ok_or_else(|| StoreError::Broken(format!("span {id:x} has a block and does not exist")))?;
        reply.spans.extend(Some(span).filter(|span| span.certified && span.uses > 0));
    }
    Ok(Reply::VisitSpans(reply))
}
