//! Ordered key-value storage as the machines see it: named tables, points and ranges.

use std::{path::Path, sync::Arc};

use bytes::Bytes;
use prost::Message;
use smallvec::SmallVec;

/// A key, or a beginning of one; a longer one than this has room for is allocated.
pub type Key = SmallVec<[u8; 56]>;

/// A table. Its number is the first byte of every key on disk, so numbers are never reused.
///
/// 0..16 belong to this crate. 16..64 are for rows that belong to a whole machine. From 64 on the first byte of
/// every key is a slot, and the hash is kept for each slot by itself. From 192 on values are large: in the hash such a
/// row counts by its value's digest, so that whoever knows the digest removes the row without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Table(pub u8);

impl Table {
    /// Applied position and time. Not hashed: replicas flush at different moments.
    pub const APPLIED: Table = Table(0);
    /// Hash sums. Not hashed.
    pub const SUMS: Table = Table(1);
    /// One row for each client with its recent outcomes.
    pub const CLIENTS: Table = Table(2);
    /// Clients by the minute of their last use.
    pub const CLIENTS_BY_MINUTE: Table = Table(3);
    /// How many rows the table before has: one row, a number of 8 bytes, big-endian; none stands for 0.
    pub const CLIENT_COUNT: Table = Table(4);
    /// The feature level that the log has agreed on: one row, a number of 4 bytes, big-endian; none stands for the first.
    pub const LEVEL: Table = Table(5);

    /// Whether rows must match on every replica.
    pub fn is_hashed(self) -> bool {
        self != Table::APPLIED && self != Table::SUMS
    }

    /// Whether values are large and rows count by their digests.
    pub fn is_large(self) -> bool {
        self.0 >= 192
    }

    /// How many rows are read at a time by who reads all of them: together they fit into memory.
    pub fn page_rows(self) -> usize {
        if self.is_large() { 64 } else { 4096 }
    }

    /// The hash sum that a row counts in.
    pub fn lane(self, key: &[u8]) -> u8 {
        if self.0 >= 64 { key.first().copied().unwrap_or(0) } else { 0 }
    }

    /// The key as stored.
    pub fn stored_key(self, key: &[u8]) -> Key {
        let mut stored = Key::with_capacity(1 + key.len());
        stored.push(self.0);
        stored.extend_from_slice(key);
        stored
    }
}

/// Reading or writing the store failed, or a row is not what it must be. Fatal to the replica.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    /// The storage engine's words.
    #[error("store: {0}")]
    Engine(String),
    /// There is no room on the disk. Nothing was written; the same write may succeed later.
    #[error("no room on the disk of the state: {0}")]
    Full(String),
    /// Files of the store are damaged or missing: it must be rebuilt.
    #[error("the state's files are damaged: {0}")]
    Damaged(String),
    /// A row cannot be decoded.
    #[error("row of table {table} cannot be decoded (key {key}): {what}")]
    Row {
        /// The table's number.
        table: u8,
        /// The key in hexadecimal.
        key: String,
        /// The decoder's words.
        what: String,
    },
    /// An invariant that every earlier apply has kept does not hold.
    #[error("invariant broken: {0}")]
    Broken(String),
}

impl StoreError {
    /// Whether what is on disk is wrong, so that opening it again does not help and building it anew does.
    pub fn is_damage(&self) -> bool {
        match self {
            StoreError::Damaged(_) | StoreError::Row { .. } | StoreError::Broken(_) => true,
            StoreError::Engine(_) | StoreError::Full(_) => false,
        }
    }
}

/// Rows of one table in the order of their keys.
pub type Rows = Vec<(Bytes, Bytes)>;

/// A moment of the state, readable.
pub trait View: Send + Sync {
    /// One row.
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, StoreError>;
    /// The same by the key as stored.
    fn get_stored(&self, stored: &[u8]) -> Result<Option<Bytes>, StoreError> {
        match stored.split_first() {
            Some((table, key)) => self.get(Table(*table), key),
            None => Ok(None),
        }
    }
    /// Shows the rows with `from <= key < until`, ascending, until `each` returns false; an empty `until` means to the
    /// table's end. Keys and values are not copied. `each` must not read the same store: a lock may be held.
    fn visit(
        &self,
        table: Table,
        from: &[u8],
        until: &[u8],
        each: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), StoreError>;

    /// Up to `limit` rows with `from <= key < until`, ascending; an empty `until` means to the table's end.
    fn scan(&self, table: Table, from: &[u8], until: &[u8], limit: usize) -> Result<Rows, StoreError> {
        let mut rows = Rows::new();
        if limit > 0 {
            self.visit(table, from, until, &mut |key, value| {
                rows.push((Bytes::copy_from_slice(key), Bytes::copy_from_slice(value)));
                rows.len() < limit
            })?;
        }
        Ok(rows)
    }
}

/// Rows to write: the key as stored, and the value or `None` to delete.
pub type WriteBatch = Vec<(Key, Option<Bytes>)>;

/// A store of one replica.
pub trait Store: View {
    /// Writes all rows or none. Durable only from the next [`Store::flush`] on.
    fn write(&self, batch: WriteBatch) -> Result<(), StoreError>;
    /// Makes everything written so far durable.
    fn flush(&self) -> Result<(), StoreError>;
    /// One row as it would be found after a crash now.
    fn get_flushed(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, StoreError>;
    /// The present moment, kept readable while the store moves on.
    fn snapshot(&self) -> Result<Arc<dyn View>, StoreError>;
    /// Writes a copy of the present state into a new directory.
    fn checkpoint(&self, to: &Path) -> Result<(), StoreError>;
}

/// Reads and decodes one row.
pub fn get_row<M: Message + Default>(
    view: &dyn View,
    table: Table,
    key: &[u8],
) -> Result<Option<M>, StoreError> {
    view.get(table, key)?.map(|value| decode_row(table, key, value)).transpose()
}

/// Decodes a row that was read.
pub fn decode_row<M: Message + Default>(table: Table, key: &[u8], value: Bytes) -> Result<M, StoreError> {
    M::decode(value).map_err(|e| StoreError::Row { table: table.0, key: hex(key), what: e.to_string() })
}

/// Bytes in hexadecimal, for messages.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// The smallest key above all keys that begin with `prefix`; empty (the table's end) when there is none.
pub fn key_after(prefix: &[u8]) -> Key {
    let mut key = Key::from_slice(prefix);
    while let Some(last) = key.pop() {
        if last < 0xff {
            key.push(last + 1);
            return key;
        }
    }
    key
}
