//! Contents and spans: from the first cookie to the last certified block.
//!
//! Invariants: a content's extents are contiguous from 0 and sum to its size; a span's `uses` is the number of
//! extents that name it; a span is dead if nothing uses it and no content waits for it; every block of every span row is in the block index, also of spans that were given up,
//! so that nothing on the disks is unknown here.

use clutch_proto::{
    BlockId, ContentId, InodeKind, ServiceId, Slot, SpanId, Time,
    mutants::{self, Mutant},
    rules::v1::{
        CERTIFICATE_LIFETIME_MS, CONTENT_EXTENTS_MAX, FILE_BYTES_MAX, INLINE_BYTES_MAX,
        INLINE_FILE_BYTES_MAX, TRANSIENT_LIFETIME_MS,
    },
    shard::{
        AddHole, AddInline, CertifySpanEntry, ContentReply, ContentRow, Done, ExtentRow, InitiateSpanEntry,
        ScrapContent, StartContentEntry, extent_row::Source, shard_reply::Reply,
    },
    types::{Block, BlockService, Code, Span, SpanRange},
};
use clutch_state::{Stop, StoreError, Tx, broken_unless};

use crate::{
    inode,
    placement::{FLAG_GONE, FLAG_NO_WRITE},
    rows::{Reapplied, Rows, check_slot, parse_inode},
    span, tables,
};

fn from_counter(sequence: u64, slot: Slot) -> u64 {
    sequence << 8 | u64::from(slot.0)
}

pub(crate) fn next_id(tx: &mut Tx<'_>, slot: Slot) -> Result<ContentId, Stop> {
    let sequence = inode::with_counters(tx, slot, |c| {
        c.content += 1;
        c.content
    })?;
    Ok(ContentId(from_counter(sequence, slot)))
}

fn bumped(time: Time, row: &ContentRow) -> u64 {
    time.plus_ms(if row.lifetime_ms == 0 { TRANSIENT_LIFETIME_MS } else { row.lifetime_ms }).0
}

/// An unpublished content that the caller may write to.
pub(crate) fn transient(
    rows: &mut impl Rows,
    time: Time,
    id: ContentId,
    cookie: &[u8],
) -> Result<ContentRow, Stop> {
    check_slot(rows, id.slot())?;
    let row: Option<ContentRow> = rows.row(tables::CONTENT, &tables::content_key(id))?;
    let row = row.filter(|r| r.file == 0 && time.0 <= r.deadline);
    let row = row.ok_or_else(|| {
        Stop::refuse(Code::TransientGone, format!("content {id} was published or has expired"))
    })?;
    if row.cookie != cookie {
        return Err(Stop::refuse(Code::BadCookie, "the cookie is of another content"));
    }
    Ok(row)
}

pub(crate) fn put_transient(tx: &mut Tx<'_>, time: Time, id: ContentId, mut row: ContentRow) {
    tx.delete(tables::TRANSIENT, &tables::transient_key(row.deadline, id));
    row.deadline = bumped(time, &row);
    tx.put(tables::TRANSIENT, &tables::transient_key(row.deadline, id), Vec::new());
    tx.put_row(tables::CONTENT, &tables::content_key(id), &row);
}

pub(crate) fn start(tx: &mut Tx<'_>, time: Time, entry: StartContentEntry) -> Reapplied {
    let op = entry.op.ok_or_else(|| Stop::unknown("it has no operation that this build knows"))?;
    let home = parse_inode(op.dir)?;
    check_slot(tx, home.slot())?;
    match home.kind() {
        InodeKind::Directory => drop(inode::live_directory(tx, home)?),
        InodeKind::File => drop(inode::get(tx, home)?),
        InodeKind::Symlink => {
            return Err(Stop::refuse(Code::InvalidArgument, "a symbolic link has no content"));
        }
    }
    let id = next_id(tx, home.slot())?;
    let mut row = ContentRow {
        cookie: entry.cookie,
        dir: home.raw(),
        lifetime_ms: entry.lifetime_ms,
        ..ContentRow::default()
    };
    row.deadline = bumped(time, &row);
    let reply = ContentReply { content: id.0, cookie: row.cookie.clone(), deadline: row.deadline };
    put_transient(tx, time, id, row);
    Ok(Reply::Content(reply))
}

/// Ends a content's life at once: from here on it is as one that has expired.
pub(crate) fn expire(tx: &mut Tx<'_>, id: ContentId, row: ContentRow) {
    tx.delete(tables::TRANSIENT, &tables::transient_key(row.deadline, id));
    tx.put(tables::TRANSIENT, &tables::transient_key(0, id), Vec::new());
    let row = ContentRow { size: row.size, pending_span: row.pending_span, ..ContentRow::default() };
    tx.put_row(tables::CONTENT, &tables::content_key(id), &row);
}

pub(crate) fn scrap(tx: &mut Tx<'_>, time: Time, op: &ScrapContent) -> Reapplied {
    let id = ContentId(op.content);
    let row = transient(tx, time, id, &op.cookie)?;
    expire(tx, id, row);
    Ok(Reply::Done(Done {}))
}

pub(crate) fn too_many_extents() -> Stop {
    let text = format!("files have at most {CONTENT_EXTENTS_MAX} spans; write it anew with larger ones");
    Stop::refuse(Code::TooLarge, text)
}

/// The row as long as `offset` is where it ends and `length` more fits.
pub(crate) fn extended(row: &ContentRow, offset: u64, length: u64) -> Result<u64, Stop> {
    if offset != row.size {
        let text = format!("offset {offset}, but the content has {} bytes so far", row.size);
        return Err(Stop::refuse(Code::InvalidArgument, text));
    }
    if length == 0 {
        return Err(Stop::refuse(Code::InvalidArgument, "an extent of 0 bytes"));
    }
    if row.extents >= CONTENT_EXTENTS_MAX {
        return Err(too_many_extents());
    }
    offset
        .checked_add(length)
        .filter(|size| *size <= FILE_BYTES_MAX)
        .ok_or_else(|| Stop::refuse(Code::TooLarge, format!("files have at most {FILE_BYTES_MAX} bytes")))
}

pub(crate) fn append(
    tx: &mut Tx<'_>,
    time: Time,
    id: ContentId,
    mut row: ContentRow,
    length: u64,
    source: Source,
) -> Result<(), Stop> {
    let size = extended(&row, row.size, length)?;
    let extent = ExtentRow { length, source: Some(source) };
    tx.put_row(tables::EXTENT, &tables::extent_key(id, row.size), &extent);
    broken_unless!(
        (row.size == 0) == (row.extents == 0),
        "content {id} has {} bytes in {} extents",
        row.size,
        row.extents
    );
    row.size = size;
    row.extents += 1;
    put_transient(tx, time, id, row);
    Ok(())
}

pub(crate) fn progress(tx: &mut Tx<'_>, id: ContentId) -> Reapplied {
    let row: ContentRow = tx
        .get_row(tables::CONTENT, &tables::content_key(id))?
        .ok_or_else(|| StoreError::Broken(format!("content {id} vanished")))?;
    Ok(Reply::Content(ContentReply { content: id.0, cookie: row.cookie, deadline: row.deadline }))
}

pub(crate) fn add_inline(tx: &mut Tx<'_>, time: Time, op: AddInline) -> Reapplied {
    let id = ContentId(op.content);
    let row = transient(tx, time, id, &op.cookie)?;
    extended(&row, op.offset, op.data.len() as u64)?;
    if op.data.len() > INLINE_BYTES_MAX {
        let text = format!("{} inline bytes; at most {INLINE_BYTES_MAX} are allowed", op.data.len());
        return Err(Stop::refuse(Code::TooLarge, text));
    }
    append(tx, time, id, row, op.data.len() as u64, Source::Inline(op.data))?;
    progress(tx, id)
}

/// Refuses inline data of a whole file that is none, or too much.
pub(crate) fn check_inline(bytes: usize) -> Result<(), Stop> {
    if !(1..=INLINE_FILE_BYTES_MAX).contains(&bytes) {
        let text = format!("{bytes} bytes in the metadata; 1 to {INLINE_FILE_BYTES_MAX} are allowed");
        return Err(Stop::refuse(Code::TooLarge, text));
    }
    Ok(())
}

pub(crate) fn add_hole(tx: &mut Tx<'_>, time: Time, op: &AddHole) -> Reapplied {
    let id = ContentId(op.content);
    let row = transient(tx, time, id, &op.cookie)?;
    extended(&row, op.offset, op.length)?;
    append(tx, time, id, row, op.length, Source::Hole(true))?;
    progress(tx, id)
}

pub(crate) fn initiate(tx: &mut Tx<'_>, time: Time, entry: InitiateSpanEntry) -> Reapplied {
    let op = entry.op.ok_or_else(|| Stop::unknown("it has no operation that this build knows"))?;
    let id = ContentId(op.content);
    let mut row = transient(tx, time, id, &op.cookie)?;
    extended(&row, op.offset, u64::from(op.size))?;
    let shape = op.shape.ok_or_else(|| Stop::unknown("a span without a shape"))?;
    shape.check(op.size)?;
    let blocks = shape.blocks() as usize;
    if op.cell_crcs.len() != blocks * shape.stripes as usize || entry.services.len() != blocks {
        return Err(Stop::unknown("its CRCs, services, cells and blocks do not fit each other"));
    }
    let slot = id.slot();
    broken_unless!(
        row.pending_span == 0 || SpanId(row.pending_span).slot() == slot,
        "content {id} waits for span {:x} of another slot",
        row.pending_span
    );
    let (span, first_block) = inode::with_counters(tx, slot, |c| {
        c.span += 1;
        c.block += blocks as u64;
        (SpanId(from_counter(c.span, slot)), c.block - blocks as u64 + 1)
    })?;
    let mut span_row = Span {
        span_id: span.0,
        shape: Some(shape),
        size: op.size,
        crc: op.crc,
        storage_class: op.storage_class,
        granted_until: match entry.grant_ms {
            _ if mutants::is(Mutant::EraseBeforeGrantsEnd) => 0,
            0 => time.plus_ms(CERTIFICATE_LIFETIME_MS).0,
            grant_ms => time.plus_ms(grant_ms).0,
        },
        ..Span::default()
    };
    let crcs = shape.block_crcs(&op.cell_crcs);
    for (i, (service, crc)) in entry.services.iter().zip(crcs).enumerate() {
        if entry.services[..i].contains(service) {
            return Err(Stop::unknown("two blocks of a span on one service"));
        }
        let known: Option<BlockService> = tx.get_row(tables::SERVICE, &service.to_be_bytes())?;
        if known.is_none_or(|s| s.flags & (FLAG_NO_WRITE | FLAG_GONE) != 0) {
            return Err(Stop::refuse(
                Code::NotReady,
                format!("block service {service:x} takes no blocks now; try again"),
            ));
        }
        let block = BlockId(from_counter(first_block + i as u64, slot));
        span_row.blocks.push(Block { block_id: block.0, service_id: *service, crc, ..Block::default() });
        let index = tables::block_key(slot, ServiceId(*service), block.0);
        if row.pending_span == 0 || !mutants::is(Mutant::FirstTryNotIndexed) {
            tx.put(tables::BLOCK, &index, span.0.to_be_bytes().to_vec());
        }
    }
    span_row.cell_crcs = op.cell_crcs;
    tx.put_row(tables::SPAN, &tables::span_key(span), &span_row);
    // A span that was pending before was given up; its blocks may be on their disks.
    span::bury(tx, row.pending_span);
    row.pending_span = span.0;
    put_transient(tx, time, id, row);
    Ok(Reply::Span(span_row))
}

pub(crate) fn certify(tx: &mut Tx<'_>, time: Time, entry: &CertifySpanEntry) -> Reapplied {
    let op = entry.op.as_ref().ok_or_else(|| Stop::unknown("it has no operation that this build knows"))?;
    let id = ContentId(op.content);
    let mut row = transient(tx, time, id, &op.cookie)?;
    if row.pending_span == 0 || row.pending_span != op.span_id {
        return Err(Stop::refuse(Code::Stale, "the span is not the one that the content waits for"));
    }
    if entry.first_bad != 0 {
        return Err(Stop::refuse(
            Code::BadProof,
            format!("the proof of block {} is not valid", entry.first_bad - 1),
        ));
    }
    let key = tables::span_key(SpanId(op.span_id));
    let mut span: Span = tx
        .get_row(tables::SPAN, &key)?
        .ok_or_else(|| StoreError::Broken(format!("span {:x} vanished", op.span_id)))?;
    broken_unless!(span.uses == 0, "span {:x} has {} uses before it is certified", op.span_id, span.uses);
    (span.certified, span.uses) = (true, 1);
    tx.put_row(tables::SPAN, &key, &span);
    row.pending_span = 0;
    let source = Source::Span(SpanRange { span_id: op.span_id, offset: 0 });
    append(tx, time, id, row, u64::from(span.size), source)?;
    progress(tx, id)
}

#[cfg(test)]
mod tests {
    use clutch_proto::shard::{Genesis, ShareRange};
    use clutch_state::{MemoryStore, overlay::Overlay};

    use super::*;
    use crate::publish;

    const TIME: Time = Time(1000);

    fn add_content(tx: &mut Tx<'_>, extents: u64, file: u64) -> ContentId {
        let id = next_id(tx, Slot(0)).expect("an id");
        // As many extents as it says are not needed: only the count is looked at.
        let mut row =
            ContentRow { cookie: b"c".to_vec().into(), extents, file, size: 2, ..ContentRow::default() };
        row.deadline = bumped(TIME, &row);
        put_transient(tx, TIME, id, row);
        for offset in 0..2 {
            // Of bytes, which are never joined when they are shared.
            let extent = ExtentRow { length: 1, source: Some(Source::Inline(b"x".to_vec().into())) };
            tx.put_row(tables::EXTENT, &tables::extent_key(id, offset), &extent);
        }
        id
    }

    fn code(result: Reapplied) -> Option<Code> {
        match result {
            Ok(_) => None,
            Err(Stop::Refused(refusal)) => Some(refusal.code),
            Err(Stop::Fault(fault)) => panic!("{fault}"),
            Err(Stop::Unknown(what)) => panic!("{what}"),
        }
    }

    #[test]
    fn a_content_has_a_bounded_number_of_extents() {
        let store = MemoryStore::new();
        let mut overlay = Overlay::default();
        let mut tx = Tx::new(&mut overlay, &store);
        tx.put_row(tables::SHARD, &[], &Genesis { slot_last: 255, ..Genesis::default() });
        let id = add_content(&mut tx, CONTENT_EXTENTS_MAX - 1, 0);
        let published = add_content(&mut tx, 0, 7);
        let other = add_content(&mut tx, 2, 0);
        let hole = |tx: &mut Tx<'_>, offset| {
            add_hole(tx, TIME, &AddHole { content: id.0, cookie: b"c".to_vec().into(), offset, length: 1 })
        };
        let share = ShareRange {
            content: id.0,
            cookie: b"c".to_vec().into(),
            offset: 2,
            from_content: published.0,
            from_offset: 0,
            length: 2,
        };
        assert_eq!(code(publish::share_range(&mut tx, TIME, &share)), Some(Code::TooLarge), "two more");
        assert_eq!(code(hole(&mut tx, 2)), None, "the last one");
        assert_eq!(code(hole(&mut tx, 3)), Some(Code::TooLarge));
        let inline =
            AddInline { content: id.0, cookie: b"c".to_vec().into(), offset: 3, data: b"x".to_vec().into() };
        assert_eq!(code(add_inline(&mut tx, TIME, inline)), Some(Code::TooLarge));
        let op = InitiateSpanEntry {
            op: Some(clutch_proto::shard::InitiateSpan {
                content: id.0,
                cookie: b"c".to_vec().into(),
                offset: 3,
                size: 1,
                ..Default::default()
            }),
            ..InitiateSpanEntry::default()
        };
        assert_eq!(code(initiate(&mut tx, TIME, op)), Some(Code::TooLarge));
        let row: ContentRow =
            tx.get_row(tables::CONTENT, &tables::content_key(other)).expect("reads").expect("there");
        assert_eq!(row.extents, 2, "others are counted by themselves");
    }
}
