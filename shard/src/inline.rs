//! Inline data: bytes of contents in a table of their own, so that neither their extents nor anything else carries them.
//!
//! Invariants: an extent whose bytes lie apart has exactly one row of inline data, under its own key, of its length and of the
//! digest that it names, and there is no other; the sum of their lengths is a row, too. What is removed is not read for it.

use bytes::Bytes;
use clutch_proto::{
    ContentId,
    mutants::{self, Mutant},
    rules::v1::INLINE_BYTES_MAX,
    shard::{ExtentRow, extent_row::Source},
};
use clutch_state::{
    StoreError, Tx, View,
    hash::{Digest, digest},
    store::hex,
};

use crate::tables;

/// How much inline data a shard has.
pub(crate) fn bytes(view: &dyn View) -> Result<u64, StoreError> {
    parse_total(view.get(tables::INLINE_BYTES, &[])?)
}

fn parse_total(row: Option<Bytes>) -> Result<u64, StoreError> {
    let Some(row) = row else { return Ok(0) };
    let total = row[..].try_into().map(u64::from_be_bytes);
    total.map_err(|_| StoreError::Broken(format!("a sum of inline data of {} bytes", row.len())))
}

fn count(tx: &mut Tx<'_>, add: u64, take: u64) -> Result<(), StoreError> {
    let total = parse_total(tx.get(tables::INLINE_BYTES, &[])?)?;
    let total = total.checked_add(add).and_then(|total| total.checked_sub(take));
    let total = total.ok_or_else(|| StoreError::Broken("less inline data than is removed".into()))?;
    tx.put(tables::INLINE_BYTES, &[], total.to_be_bytes().to_vec());
    Ok(())
}

/// Adds an extent of these bytes where a content ends so far: beside the extent when they are many.
pub(crate) fn insert(
    tx: &mut Tx<'_>,
    content: ContentId,
    offset: u64,
    data: Bytes,
) -> Result<(), StoreError> {
    let (key, length) = (tables::extent_key(content, offset), data.len() as u64);
    let source = if data.len() <= INLINE_BYTES_MAX {
        Source::Inline(data)
    } else {
        count(tx, length, 0)?;
        Source::Apart(Bytes::copy_from_slice(&tx.insert_large(tables::INLINE, &key, data)))
    };
    tx.insert_row(tables::EXTENT, &key, &ExtentRow { length, source: Some(source) });
    Ok(())
}

/// Removes the bytes of an extent, which is removed, too.
pub(crate) fn remove(tx: &mut Tx<'_>, key: &[u8], length: u64, digest: &[u8]) -> Result<(), StoreError> {
    if mutants::is(Mutant::InlineLeaks) {
        return Ok(());
    }
    tx.remove_large(tables::INLINE, key, parse_digest(key, digest)?);
    count(tx, 0, length)
}

fn parse_digest(key: &[u8], digest: &[u8]) -> Result<Digest, StoreError> {
    let what =
        || StoreError::Broken(format!("the extent at {} has a digest of {} bytes", hex(key), digest.len()));
    digest.try_into().map_err(|_| what())
}

/// The bytes of an extent, if they are those that it names.
pub(crate) fn checked(
    key: &[u8],
    length: u64,
    expected: &[u8],
    data: Option<Bytes>,
) -> Result<Bytes, StoreError> {
    let data = data.ok_or_else(|| StoreError::Broken(format!("no inline data at {}", hex(key))))?;
    if data.len() as u64 != length || digest(&data) != parse_digest(key, expected)? {
        return Err(StoreError::Broken(format!("other inline data at {} than its extent names", hex(key))));
    }
    Ok(data)
}

/// The source of an extent, with its bytes where they lie apart.
pub(crate) fn fetched(tx: &mut Tx<'_>, key: &[u8], extent: ExtentRow) -> Result<Option<Source>, StoreError> {
    let Some(Source::Apart(digest)) = extent.source else { return Ok(extent.source) };
    let data = tx.get(tables::INLINE, key)?;
    Ok(Some(Source::Inline(checked(key, extent.length, &digest, data)?)))
}
