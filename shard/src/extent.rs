//! Extents of contents: where they begin, parts of them, and taking them apart.
//!
//! Invariant: a content's extents are contiguous from 0 and sum to its size.

use clutch_proto::{
    ContentId, SpanId,
    shard::{ContentRow, ExtentRow, extent_row::Source},
    types::SpanRange,
};
use clutch_state::{Stop, StoreError, Tx, key_after, store::decode_row};

use crate::{inline, rows::Rows, span::release, tables};

/// An extent whose source this build does not know: nothing is guessed of it.
pub(crate) fn unknown_source(content: u64) -> Stop {
    StoreError::Broken(format!("content {content:x} has an extent of a source that this build does not know"))
        .into()
}

/// The offset of the extent that holds `offset`. Extents are contiguous, so the last one that begins at or below.
///
/// Rows can only be scanned upwards: a window below the offset is moved and halved until it holds few rows, so that
/// the work is bounded also for contents of very many small extents.
pub(crate) fn start_of(rows: &mut impl Rows, content: ContentId, offset: u64) -> Result<u64, Stop> {
    /// Rows that are looked at in one step.
    const ROWS_MAX: usize = 64;
    /// A few spans of the usual size.
    const FIRST_WINDOW: u64 = 16 << 20;
    if offset == 0 || rows.row::<ExtentRow>(tables::EXTENT, &tables::extent_key(content, offset))?.is_some() {
        return Ok(offset);
    }
    // What is looked for begins below `high`, and at `low` or above once that is known.
    let (mut low, mut high, mut window) = (None, offset, FIRST_WINDOW);
    loop {
        let from = match low {
            Some(low) => low + (high - low) / 2,
            None => offset.saturating_sub(window),
        };
        let (begin, until) = (tables::extent_key(content, from), tables::extent_key(content, high));
        let found = rows.page(tables::EXTENT, &begin, &until, ROWS_MAX)?;
        let last = found.last().and_then(|(key, _)| tables::parse_pair(key)).map(|(_, offset)| offset);
        match last {
            Some(last) if found.len() < ROWS_MAX => return Ok(last),
            // There are more, or there may be.
            Some(last) => low = Some(last),
            None if from == 0 => return Ok(0),
            None => {
                high = from;
                window = window.saturating_mul(16);
            }
        }
        if let Some(low) = low
            && high - low <= 1
        {
            return Ok(low);
        }
    }
}

/// Where the extent begins that ends where a content ends so far, and that extent; `None` in an empty content.
pub(crate) fn last_extent(
    rows: &mut impl Rows,
    content: ContentId,
    size: u64,
) -> Result<Option<(u64, ExtentRow)>, Stop> {
    let Some(last) = size.checked_sub(1) else { return Ok(None) };
    let begin = start_of(rows, content, last)?;
    Ok(rows.row(tables::EXTENT, &tables::extent_key(content, begin))?.map(|extent| (begin, extent)))
}

/// A part of an extent.
pub(crate) fn part(source: Option<Source>, from: u64, length: u64) -> Result<Source, StoreError> {
    match source {
        Some(Source::Inline(data)) if (from + length) as usize <= data.len() => {
            Ok(Source::Inline(data.slice(from as usize..(from + length) as usize)))
        }
        Some(Source::Span(range)) => {
            // Within a span, so within 32 bits.
            Ok(Source::Span(SpanRange { span_id: range.span_id, offset: range.offset + from as u32 }))
        }
        Some(Source::Hole(_)) => Ok(Source::Hole(true)),
        Some(Source::Apart(_)) => Err(StoreError::Broken("a part of inline data that was not read".into())),
        Some(Source::Inline(_)) => {
            Err(StoreError::Broken("an extent that is shorter than its length".into()))
        }
        None => Err(StoreError::Broken("an extent of a source that this build does not know".into())),
    }
}

/// Whether a range continues an extent, so that both are one: what was cut to be shared in parts does not stay in pieces.
pub(crate) fn goes_on(extent: &ExtentRow, next: &Source) -> bool {
    match (&extent.source, next) {
        (Some(Source::Span(range)), Source::Span(next)) => {
            range.span_id == next.span_id && u64::from(range.offset) + extent.length == u64::from(next.offset)
        }
        (Some(Source::Hole(_)), Source::Hole(_)) => true,
        (Some(Source::Span(_) | Source::Hole(_) | Source::Inline(_) | Source::Apart(_)) | None, _) => false,
    }
}

/// Takes the first extents of a content away, as many as one entry may.
pub(crate) fn take_apart(
    tx: &mut Tx<'_>,
    id: ContentId,
    row: &mut ContentRow,
    limit: usize,
) -> Result<(), Stop> {
    let from = tables::extent_key(id, row.begin);
    for (key, value) in tx.scan(tables::EXTENT, &from, &key_after(&from[..9]), limit)? {
        let extent: ExtentRow = decode_row(tables::EXTENT, &key, value)?;
        match extent.source {
            Some(Source::Span(range)) => release(tx, SpanId(range.span_id))?,
            Some(Source::Apart(digest)) => inline::remove(tx, &key, extent.length, &digest)?,
            Some(Source::Inline(_) | Source::Hole(_)) => {}
            None => return Err(unknown_source(id.0)),
        }
        tx.delete(tables::EXTENT, &key);
        row.begin = row.begin.saturating_add(extent.length);
    }
    if row.begin > row.size {
        return Err(StoreError::Broken(format!("content {id} has extents beyond its size")).into());
    }
    Ok(())
}
