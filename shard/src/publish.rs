//! Other contents for files that exist: shared ranges, publishing, bringing back.
//!
//! Invariants: a published content is its file's present one or has exactly one row among the file's past ones; a
//! range is only shared from a published content, whose spans are in use and so not dead.

use clutch_proto::{
    ContentId, InodeId, InodeKind, SpanId, Time,
    mutants::{self, Mutant},
    rules::v1::{CONTENT_EXTENTS_MAX, EXTENTS_PER_ENTRY_MAX, INLINE_PER_ENTRY_BYTES_MAX},
    shard::{
        ContentRow, ExtentRow, InodeRow, PastContentRow, PublishContent, RestoreContent, ShareRange,
        extent_row::Source, shard_reply::Reply,
    },
    types::Code,
};
use clutch_state::{Key, Stop, StoreError, Tx, broken_unless, key_after, store::decode_row};

use crate::{
    content, extent, inline, inode,
    rows::{Reapplied, check_slot, parse_inode},
    span, tables,
};

pub(crate) fn share_range(tx: &mut Tx<'_>, time: Time, op: &ShareRange) -> Reapplied {
    let id = ContentId(op.content);
    let mut row = content::transient(tx, time, id, &op.cookie)?;
    let new_size = content::extended(&row, op.offset, op.length)?;
    let from = ContentId(op.from_content);
    if from.slot() != id.slot() {
        return Err(Stop::refuse(
            Code::InvalidArgument,
            "ranges are only shared between contents of one slot",
        ));
    }
    let source: Option<ContentRow> = tx.get_row(tables::CONTENT, &tables::content_key(from))?;
    let source = source.filter(|c| c.file != 0).ok_or_else(|| {
        Stop::refuse(Code::NotFound, format!("content {from} does not exist or is not published"))
    })?;
    let end = op.from_offset.checked_add(op.length).filter(|end| *end <= source.size);
    let end = end.ok_or_else(|| {
        let text = format!("{} bytes at {} of a content of {}", op.length, op.from_offset, source.size);
        Stop::refuse(Code::InvalidArgument, text)
    })?;
    let first = extent::start_of(tx, from, op.from_offset)?;
    let until = tables::extent_key(from, end);
    let rows =
        tx.scan(tables::EXTENT, &tables::extent_key(from, first), &until, EXTENTS_PER_ENTRY_MAX + 1)?;
    if rows.len() > EXTENTS_PER_ENTRY_MAX {
        let text = format!("the range has more than {EXTENTS_PER_ENTRY_MAX} extents; share it in parts");
        return Err(Stop::refuse(Code::TooLarge, text));
    }
    let (mut at, mut copied) = (op.offset, 0);
    let mut last = extent::last_extent(tx, id, row.size)?;
    for (key, value) in rows {
        let (_, offset) =
            tables::parse_pair(&key).ok_or_else(|| StoreError::Broken("an extent's key".into()))?;
        let extent: ExtentRow = decode_row(tables::EXTENT, &key, value)?;
        let begin = offset.max(op.from_offset);
        let length = (offset + extent.length).min(end) - begin;
        if matches!(extent.source, Some(Source::Apart(_))) {
            copied += length;
            check_copied(copied)?;
        }
        let source = extent::part(inline::fetched(tx, &key, extent)?, begin - offset, length)?;
        match &mut last {
            Some((begin, last)) if extent::goes_on(last, &source) => {
                last.length += length;
                tx.put_row(tables::EXTENT, &tables::extent_key(id, *begin), last);
            }
            _ => {
                if row.extents >= CONTENT_EXTENTS_MAX {
                    return Err(content::too_many_extents());
                }
                row.extents += 1;
                last = put_shared(tx, id, at, length, source)?.map(|extent| (at, extent));
            }
        }
        at += length;
    }
    if at != new_size {
        return Err(StoreError::Broken(format!("content {from} has a gap")).into());
    }
    broken_unless!(row.extents > 0, "content {id} has {new_size} bytes in no extent");
    row.size = new_size;
    content::put_transient(tx, time, id, row);
    content::progress(tx, id)
}

/// Adds an extent that shares a span, or has a part of what the other has in the metadata; one that may go on with the next.
fn put_shared(
    tx: &mut Tx<'_>,
    id: ContentId,
    at: u64,
    length: u64,
    source: Source,
) -> Result<Option<ExtentRow>, Stop> {
    if let Source::Inline(data) = source {
        inline::insert(tx, id, at, data)?;
        return Ok(None);
    }
    if let Source::Span(range) = &source
        && !mutants::is(Mutant::SharedUseNotCounted)
    {
        span::acquire(tx, SpanId(range.span_id))?;
    }
    let extent = ExtentRow { length, source: Some(source) };
    tx.put_row(tables::EXTENT, &tables::extent_key(id, at), &extent);
    Ok(Some(extent))
}

/// Refuses to copy more inline data than one entry may.
fn check_copied(bytes: u64) -> Result<(), Stop> {
    if bytes > INLINE_PER_ENTRY_BYTES_MAX {
        let text = format!(
            "the range has more than {INLINE_PER_ENTRY_BYTES_MAX} bytes in the metadata; share it in parts"
        );
        return Err(Stop::refuse(Code::TooLarge, text));
    }
    Ok(())
}

/// A file of this shard whose present content is the expected one.
fn file_with(tx: &mut Tx<'_>, raw: u64, expected_content: u64) -> Result<(InodeId, InodeRow), Stop> {
    let id = parse_inode(raw)?;
    check_slot(tx, id.slot())?;
    match id.kind() {
        InodeKind::File => {}
        InodeKind::Directory => return Err(Stop::refuse(Code::IsDirectory, format!("{id} is a directory"))),
        InodeKind::Symlink => {
            return Err(Stop::refuse(Code::InvalidArgument, format!("{id} is a symbolic link")));
        }
    }
    let row = inode::get(tx, id)?;
    if row.content != expected_content {
        return Err(Stop::refuse(Code::Stale, "the file has another content now; look at it again"));
    }
    Ok((id, row))
}

/// Makes a content the present one and the one before it a past one.
fn replace(
    tx: &mut Tx<'_>,
    time: Time,
    id: InodeId,
    row: InodeRow,
    content: ContentId,
    size: u64,
    (mtime, dir): (u64, u64),
) -> Reapplied {
    if row.content != 0 {
        let key = tables::past_content_key(id, time.0);
        broken_unless!(
            tx.get(tables::PAST_CONTENT, &key)?.is_none(),
            "two contents of file {id} end at {}",
            time.0
        );
        let past = PastContentRow { content: row.content, dir };
        tx.put_row(tables::PAST_CONTENT, &key, &past);
    }
    let mtime = if mtime == 0 { time.0 } else { mtime };
    let row = InodeRow { content: content.0, size, mtime, ctime: time.0, ..row };
    inode::put(tx, id, &row);
    Ok(Reply::Attributes(inode::attributes(id, row)))
}

pub(crate) fn publish(tx: &mut Tx<'_>, time: Time, op: &PublishContent) -> Reapplied {
    let content = ContentId(op.content);
    let expected = if mutants::is(Mutant::PublishIgnoresExpected) {
        // Whatever is there.
        let id = parse_inode(op.id)?;
        check_slot(tx, id.slot())?;
        inode::get(tx, id)?.content
    } else {
        op.expected_content
    };
    let (id, row) = file_with(tx, op.id, expected)?;
    let draft = content::transient(tx, time, content, &op.cookie)?;
    if content.slot() != id.slot() {
        return Err(Stop::refuse(
            Code::InvalidArgument,
            "the content was started for a file of another slot",
        ));
    }
    if draft.pending_span != 0 {
        return Err(Stop::refuse(Code::InvalidArgument, "the content's last span is not certified yet"));
    }
    tx.delete(tables::TRANSIENT, &tables::transient_key(draft.deadline, content));
    let published = ContentRow { size: draft.size, file: id.raw(), ..ContentRow::default() };
    tx.put_row(tables::CONTENT, &tables::content_key(content), &published);
    replace(tx, time, id, row, content, draft.size, (op.mtime, op.dir))
}

pub(crate) fn restore(tx: &mut Tx<'_>, time: Time, op: &RestoreContent) -> Reapplied {
    let (id, row) = file_with(tx, op.id, op.expected_content)?;
    let (key, _) = past(tx, id, op.ended_at, op.content)?;
    let content = ContentId(op.content);
    let found: ContentRow = tx
        .get_row(tables::CONTENT, &tables::content_key(content))?
        .ok_or_else(|| StoreError::Broken(format!("past content {content} does not exist")))?;
    tx.delete(tables::PAST_CONTENT, &key);
    broken_unless!(found.file == id.raw(), "past content {content} of file {id} is of file {:x}", found.file);
    replace(tx, time, id, row, content, found.size, (0, op.dir))
}

/// The row of a past content, and its key.
pub(crate) fn past(
    tx: &mut Tx<'_>,
    id: InodeId,
    ended_at: u64,
    content: u64,
) -> Result<(Key, PastContentRow), Stop> {
    let key = tables::past_content_key(id, ended_at);
    let row: Option<PastContentRow> = tx.get_row(tables::PAST_CONTENT, &key)?;
    let row = row.filter(|r| r.content == content).ok_or_else(|| {
        Stop::refuse(Code::NotFound, format!("content {content:x} is not a past one of file {id}"))
    })?;
    Ok((key, row))
}

/// All past contents of a file, oldest first, as far as a limit.
pub(crate) fn past_contents(
    tx: &mut Tx<'_>,
    id: InodeId,
    limit: usize,
) -> Result<Vec<(Key, PastContentRow)>, Stop> {
    let from = tables::past_content_key(id, 0);
    let rows = tx.scan(tables::PAST_CONTENT, &from, &key_after(&from[..9]), limit)?;
    let decoded = rows.into_iter().map(|(key, value)| {
        let row = decode_row(tables::PAST_CONTENT, &key, value)?;
        Ok((Key::from_slice(&key), row))
    });
    Ok(decoded.collect::<Result<_, StoreError>>()?)
}
