//! Exchanging what holds the same bytes: blocks between spans, spans between contents.
//!
//! Invariants: what is exchanged has the same size and CRC on both sides, and the services of a span stay distinct.

use clutch_proto::{
    ContentId, ServiceId, SpanId, Time,
    mutants::{self, Mutant},
    shard::{Done, ExtentRow, MoveSpan, SwapBlocks, SwapSpans, extent_row::Source, shard_reply::Reply},
    types::{Code, Span},
};
use clutch_state::{Stop, StoreError, Tx};

use crate::{
    content, extent,
    rows::{Reapplied, check_slot},
    span::in_use,
    tables,
};

pub(crate) fn swap_blocks(tx: &mut Tx<'_>, op: &SwapBlocks) -> Reapplied {
    let (mut a, mut b) = (in_use(tx, op.span_a)?, in_use(tx, op.span_b)?);
    let place = |span: &Span, block: u64| {
        span.blocks.iter().position(|b| b.block_id == block).ok_or_else(|| {
            Stop::refuse(Code::Stale, format!("span {:x} has no block {block:x} any more", span.span_id))
        })
    };
    let (at_a, at_b) = (place(&a, op.block_a)?, place(&b, op.block_b)?);
    if a.span_id == b.span_id {
        return Err(Stop::refuse(Code::InvalidArgument, "both blocks are of one span"));
    }
    if SpanId(a.span_id).slot() != SpanId(b.span_id).slot() {
        return Err(Stop::refuse(Code::InvalidArgument, "the spans are of two slots"));
    }
    let bytes = |span: &Span, at: usize| (span.shape.map(|s| s.block_bytes()), span.blocks[at].crc);
    if bytes(&a, at_a) != bytes(&b, at_b) {
        return Err(Stop::refuse(Code::CrcMismatch, "the blocks do not hold the same bytes"));
    }
    let doubled = |span: &Span, at: usize, service: u64| {
        span.blocks.iter().enumerate().any(|(i, b)| i != at && b.service_id == service)
    };
    if doubled(&a, at_a, b.blocks[at_b].service_id) || doubled(&b, at_b, a.blocks[at_a].service_id) {
        return Err(Stop::refuse(Code::InvalidArgument, "two blocks of a span would be on one service"));
    }
    std::mem::swap(&mut a.blocks[at_a], &mut b.blocks[at_b]);
    // Writes that were granted for either may still arrive at what is now the other's.
    let granted_until = a.granted_until.max(b.granted_until);
    (a.granted_until, b.granted_until) = (granted_until, granted_until);
    for (span, at) in [(&a, at_a), (&b, at_b)] {
        let id = SpanId(span.span_id);
        tx.put_row(tables::SPAN, &tables::span_key(id), span);
        let block = &span.blocks[at];
        let index = tables::block_key(id.slot(), ServiceId(block.service_id), block.block_id);
        if !mutants::is(Mutant::SwapNotIndexed) {
            tx.put(tables::BLOCK, &index, id.0.to_be_bytes().to_vec());
        }
    }
    Ok(Reply::Done(Done {}))
}

/// The extent at an offset, which must be of that span.
fn extent_of(tx: &mut Tx<'_>, content: u64, offset: u64, span: u64) -> Result<(ExtentRow, u32), Stop> {
    let id = ContentId(content);
    check_slot(tx, id.slot())?;
    let extent: Option<ExtentRow> = tx.get_row(tables::EXTENT, &tables::extent_key(id, offset))?;
    match extent {
        Some(extent) => match extent.source {
            Some(Source::Span(range)) if range.span_id == span => Ok((extent, range.offset)),
            Some(Source::Span(_) | Source::Hole(_) | Source::Inline(_) | Source::Apart(_)) => {
                Err(Stop::refuse(Code::Stale, format!("content {id} has another span at {offset} now")))
            }
            None => Err(extent::unknown_source(content)),
        },
        None => {
            Err(Stop::refuse(Code::NotFound, format!("content {id} has no extent that begins at {offset}")))
        }
    }
}

pub(crate) fn swap_spans(tx: &mut Tx<'_>, op: &SwapSpans) -> Reapplied {
    let (extent_a, from_a) = extent_of(tx, op.content_a, op.offset_a, op.span_a)?;
    let (extent_b, from_b) = extent_of(tx, op.content_b, op.offset_b, op.span_b)?;
    let (content_a, content_b) = (ContentId(op.content_a), ContentId(op.content_b));
    if content_a.slot() != content_b.slot() {
        return Err(Stop::refuse(Code::InvalidArgument, "the contents are of two slots"));
    }
    let (a, b) = (in_use(tx, op.span_a)?, in_use(tx, op.span_b)?);
    if (a.size, a.crc) != (b.size, b.crc) || (from_a, extent_a.length) != (from_b, extent_b.length) {
        return Err(Stop::refuse(Code::CrcMismatch, "the extents do not hold the same bytes"));
    }
    tx.put_row(tables::EXTENT, &tables::extent_key(content_a, op.offset_a), &extent_b);
    tx.put_row(tables::EXTENT, &tables::extent_key(content_b, op.offset_b), &extent_a);
    Ok(Reply::Done(Done {}))
}

pub(crate) fn move_span(tx: &mut Tx<'_>, time: Time, op: &MoveSpan) -> Reapplied {
    let (from, to) = (ContentId(op.from_content), ContentId(op.content));
    let mut from_row = content::transient(tx, time, from, &op.from_cookie)?;
    let to_row = content::transient(tx, time, to, &op.cookie)?;
    if from == to {
        return Err(Stop::refuse(Code::InvalidArgument, "both contents are the same"));
    }
    if from.slot() != to.slot() {
        return Err(Stop::refuse(Code::InvalidArgument, "the contents are of two slots"));
    }
    let offset = match from_row.size {
        0 => 0,
        size => extent::start_of(tx, from, size - 1)?,
    };
    let (extent, _) = extent_of(tx, from.0, offset, op.span_id)?;
    content::extended(&to_row, op.offset, extent.length)?;
    let source = extent.source.ok_or_else(|| extent::unknown_source(from.0))?;
    tx.delete(tables::EXTENT, &tables::extent_key(from, offset));
    from_row.size = offset;
    from_row.extents = from_row
        .extents
        .checked_sub(1)
        .ok_or_else(|| StoreError::Broken(format!("content {from} has an extent that was not counted")))?;
    content::put_transient(tx, time, from, from_row);
    content::append(tx, time, to, to_row, extent.length, source)?;
    content::progress(tx, to)
}
