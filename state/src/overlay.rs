//! The rows of one batch in the making: reads see earlier writes of the batch, an entry can be undone.

use std::{
    collections::{BTreeMap, btree_map},
    ops::Bound,
};

use bytes::Bytes;
use clutch_proto::mutants::{self, Mutant};
use prost::Message;

use crate::{
    hash::{Digest, Sums, digest},
    store::{Key, Rows, StoreError, Table, View, WriteBatch, decode_row, key_after},
};

/// What the store has.
enum Base {
    /// Nobody has looked.
    Unknown,
    /// This, or nothing.
    Known(Option<Bytes>),
    /// A large value that nobody has read, of this digest.
    Of(Digest),
}

struct Row {
    base: Base,
    current: Option<Bytes>,
    dirty: bool,
}

/// Rows read and written since the batch began.
#[derive(Default)]
pub struct Overlay {
    rows: BTreeMap<Key, Row>,
    /// What the current entry overwrote: value and dirtiness before.
    undo: Vec<(Key, Option<Bytes>, bool)>,
}

impl Overlay {
    /// An entry begins; what follows can be undone as a whole.
    pub fn begin_entry(&mut self) {
        self.undo.clear();
    }

    /// Takes back everything since [`Overlay::begin_entry`].
    pub fn undo_entry(&mut self) {
        for (key, value, dirty) in self.undo.drain(..).rev() {
            if let btree_map::Entry::Occupied(mut row) = self.rows.entry(key) {
                let is_unread = match row.get().base {
                    Base::Known(_) => false,
                    Base::Of(_) => !mutants::is(Mutant::RemovalNotUndone),
                    Base::Unknown => true,
                };
                if is_unread && (!dirty || mutants::is(Mutant::UndoTakesTooMuch)) {
                    // Nobody had looked at it before: what the store has is still unknown.
                    row.remove();
                } else {
                    (row.get_mut().current, row.get_mut().dirty) = (value, dirty);
                }
            }
        }
    }

    fn get(&mut self, store: &dyn View, table: Table, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        match self.rows.entry(table.stored_key(key)) {
            btree_map::Entry::Occupied(row) => Ok(row.get().current.clone()),
            btree_map::Entry::Vacant(vacant) => {
                let value = store.get_stored(vacant.key())?;
                vacant.insert(Row { base: Base::Known(value.clone()), current: value.clone(), dirty: false });
                Ok(value)
            }
        }
    }

    /// Writes a row, and takes the caller's word that there is none of that key.
    fn insert(&mut self, table: Table, key: &[u8], value: Bytes) {
        let stored = table.stored_key(key);
        if let btree_map::Entry::Vacant(vacant) = self.rows.entry(stored) {
            self.undo.push((Key::from_slice(vacant.key()), None, false));
            vacant.insert(Row { base: Base::Known(None), current: Some(value), dirty: true });
        } else {
            self.set(table, key, Some(value));
        }
    }

    fn set(&mut self, table: Table, key: &[u8], value: Option<Bytes>) {
        let stored = table.stored_key(key);
        match self.rows.entry(Key::from_slice(&stored)) {
            btree_map::Entry::Occupied(mut row) => {
                let row = row.get_mut();
                self.undo.push((stored, std::mem::replace(&mut row.current, value), row.dirty));
                row.dirty = true;
            }
            btree_map::Entry::Vacant(vacant) => {
                vacant.insert(Row { base: Base::Unknown, current: value, dirty: true });
                self.undo.push((stored, None, false));
            }
        }
    }

    /// Removes a row of a large table, and takes the caller's word for the digest of its value.
    fn remove_large(&mut self, table: Table, key: &[u8], digest: Digest) {
        match self.rows.entry(table.stored_key(key)) {
            btree_map::Entry::Occupied(_) => self.set(table, key, None),
            btree_map::Entry::Vacant(vacant) => {
                self.undo.push((Key::from_slice(vacant.key()), None, false));
                vacant.insert(Row { base: Base::Of(digest), current: None, dirty: true });
            }
        }
    }

    fn scan(
        &self,
        store: &dyn View,
        table: Table,
        from: &[u8],
        until: &[u8],
        limit: usize,
    ) -> Result<Rows, StoreError> {
        let start = table.stored_key(from);
        let end = if until.is_empty() { key_after(&[table.0]) } else { table.stored_key(until) };
        if start >= end {
            return Ok(Rows::new());
        }
        let range = (Bound::Included(start), Bound::Excluded(end));
        let written: Vec<(&[u8], &Option<Bytes>)> =
            self.rows.range(range).filter(|(_, r)| r.dirty).map(|(k, r)| (&k[1..], &r.current)).collect();
        // Every written row can hide at most one stored row.
        let hidden = if mutants::is(Mutant::ScanEndsEarly) { 0 } else { written.len() };
        let stored = store.scan(table, from, until, limit.saturating_add(hidden))?;
        let mut merged = Rows::new();
        let mut written = written.into_iter().peekable();
        let mut stored = stored.into_iter().peekable();
        while merged.len() < limit {
            let take_written = match (written.peek(), stored.peek()) {
                (Some((w, _)), Some((s, _))) => {
                    if *w == &s[..] {
                        stored.next();
                        true
                    } else {
                        *w < &s[..]
                    }
                }
                (Some(_), None) => true,
                (None, Some(_)) => false,
                (None, None) => break,
            };
            if take_written {
                if let Some((key, Some(value))) = written.next() {
                    merged.push((Bytes::copy_from_slice(key), value.clone()));
                }
            } else if let Some(row) = stored.next() {
                merged.push(row);
            }
        }
        Ok(merged)
    }

    /// Ends the batch: brings the hash up to date and returns what must be written.
    pub fn finish(&mut self, store: &dyn View, sums: &mut Sums) -> Result<WriteBatch, StoreError> {
        let rows = std::mem::take(&mut self.rows);
        let mut batch = WriteBatch::with_capacity(rows.len());
        for (stored, row) in rows {
            if !row.dirty {
                continue;
            }
            let (table, key) = (Table(stored[0]), &stored[1..]);
            let old = match row.base {
                Base::Known(base) => {
                    debug_assert_eq!(store.get(table, key)?, base, "a row was said to be new");
                    base
                }
                Base::Of(of) if row.current.is_none() => {
                    debug_assert_eq!(
                        store.get(table, key)?.map(|value| digest(&value)),
                        Some(of),
                        "a large value"
                    );
                    sums.remove_large(table, key, &of);
                    batch.push((stored, None));
                    continue;
                }
                Base::Of(_) | Base::Unknown => store.get_stored(&stored)?,
            };
            if old == row.current {
                continue;
            }
            sums.replace(table, key, old.as_deref(), row.current.as_deref());
            batch.push((stored, row.current));
        }
        self.undo.clear();
        Ok(batch)
    }
}

/// What `apply` may touch: the rows of its machine.
pub struct Tx<'a> {
    overlay: &'a mut Overlay,
    store: &'a dyn View,
}

impl<'a> Tx<'a> {
    /// A transaction over a store.
    pub fn new(overlay: &'a mut Overlay, store: &'a dyn View) -> Tx<'a> {
        Tx { overlay, store }
    }

    /// Takes back what the current entry wrote.
    pub(crate) fn undo_entry(&mut self) {
        self.overlay.undo_entry();
    }

    /// One row, as the earlier writes of the batch left it.
    pub fn get(&mut self, table: Table, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        self.overlay.get(self.store, table, key)
    }

    /// One row, decoded.
    pub fn get_row<M: Message + Default>(
        &mut self,
        table: Table,
        key: &[u8],
    ) -> Result<Option<M>, StoreError> {
        self.get(table, key)?.map(|value| decode_row(table, key, value)).transpose()
    }

    /// Writes a row.
    pub fn put(&mut self, table: Table, key: &[u8], value: impl Into<Bytes>) {
        self.overlay.set(table, key, Some(value.into()));
    }

    /// Encodes and writes a row that is new: its key holds an id or a time that the log never gave out before. Spares the
    /// look at what was there, which the hash needs otherwise.
    pub fn insert_row<M: Message>(&mut self, table: Table, key: &[u8], row: &M) {
        self.overlay.insert(table, key, row.encode_to_vec().into());
    }

    /// Writes a row of a large table whose key is new, as with [`Tx::insert_row`]; returns the digest of the value.
    pub fn insert_large(&mut self, table: Table, key: &[u8], value: Bytes) -> Digest {
        assert!(table.is_large(), "table {} has no large values", table.0);
        let digest = digest(&value);
        self.overlay.insert(table, key, value);
        digest
    }

    /// Removes a row of a large table whose value has this digest, without reading it. There must be that row: the hash takes the
    /// caller's word.
    pub fn remove_large(&mut self, table: Table, key: &[u8], digest: Digest) {
        assert!(table.is_large(), "table {} has no large values", table.0);
        self.overlay.remove_large(table, key, digest);
    }

    /// Encodes and writes a row.
    pub fn put_row<M: Message>(&mut self, table: Table, key: &[u8], row: &M) {
        self.put(table, key, row.encode_to_vec());
    }

    /// Removes a row; nothing happens when there is none.
    pub fn delete(&mut self, table: Table, key: &[u8]) {
        self.overlay.set(table, key, None);
    }

    /// Up to `limit` rows with `from <= key < until`; an empty `until` means to the table's end.
    pub fn scan(
        &mut self,
        table: Table,
        from: &[u8],
        until: &[u8],
        limit: usize,
    ) -> Result<Rows, StoreError> {
        self.overlay.scan(self.store, table, from, until, limit)
    }
}
