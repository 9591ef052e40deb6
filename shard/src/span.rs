//! Spans and their uses.
//!
//! Invariants: a span is dead exactly if nothing uses it and no content waits for it; dead is for good, so its blocks
//! may be erased by whoever sees it.

use clutch_proto::{
    SpanId,
    types::{Code, Span},
};
use clutch_state::{Stop, StoreError, Tx};

use crate::{rows::check_slot, tables};

/// Nothing will use the span again. 0 stands for no span.
pub(crate) fn bury(tx: &mut Tx<'_>, id: u64) {
    if id != 0 {
        tx.put(tables::DEAD_SPAN, &tables::span_key(SpanId(id)), Vec::new());
    }
}

fn known(tx: &mut Tx<'_>, id: SpanId) -> Result<Span, StoreError> {
    tx.get_row(tables::SPAN, &tables::span_key(id))?
        .ok_or_else(|| StoreError::Broken(format!("span {id} is used, but does not exist")))
}

/// Counts one use more.
pub(crate) fn acquire(tx: &mut Tx<'_>, id: SpanId) -> Result<(), Stop> {
    let span = known(tx, id)?;
    let uses = span.uses.checked_add(1).ok_or_else(|| {
        Stop::refuse(Code::TooLarge, format!("span {id} is used too often; write the bytes anew"))
    })?;
    let span = Span { uses, ..span };
    tx.put_row(tables::SPAN, &tables::span_key(id), &span);
    Ok(())
}

/// Counts one use less; the last one ends the span.
pub(crate) fn release(tx: &mut Tx<'_>, id: SpanId) -> Result<(), StoreError> {
    let span = known(tx, id)?;
    let left =
        span.uses.checked_sub(1).ok_or_else(|| StoreError::Broken(format!("span {id} has no uses")))?;
    tx.put_row(tables::SPAN, &tables::span_key(id), &Span { uses: left, ..span });
    if left == 0 {
        bury(tx, id.0);
    }
    Ok(())
}

/// A span that a request names: in use, so that nobody erases its blocks.
pub(crate) fn in_use(tx: &mut Tx<'_>, raw: u64) -> Result<Span, Stop> {
    let id = SpanId(raw);
    check_slot(tx, id.slot())?;
    let span: Option<Span> = tx.get_row(tables::SPAN, &tables::span_key(id))?;
    span.filter(|s| s.certified && s.uses > 0)
        .ok_or_else(|| Stop::refuse(Code::NotFound, format!("span {id} does not exist or is not in use")))
}
