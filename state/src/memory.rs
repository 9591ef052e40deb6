//! The store in memory: for simulation, replay and tests. A crash loses all of it, as the log allows.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, PoisonError, RwLockReadGuard},
};

use bytes::Bytes;

use crate::store::{Key, Rows, Store, StoreError, Table, View, WriteBatch, key_after};

type Map = BTreeMap<Key, Bytes>;

/// A sorted map behind a lock.
#[derive(Default)]
pub struct MemoryStore {
    // The one lock of this crate: whoever holds the store's handle may read it beside its owner. Batches alone decide the rows.
    #[expect(clippy::disallowed_types, reason = "a store is shared; see above")]
    rows: std::sync::RwLock<Arc<Map>>,
}

impl MemoryStore {
    fn rows(&self) -> RwLockReadGuard<'_, Arc<Map>> {
        // A batch is put in whole or, when it panics, its replica has failed.
        self.rows.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// An empty store.
    pub fn new() -> MemoryStore {
        MemoryStore::default()
    }

    /// A store that begins with the same rows and goes its own way; they are shared until one of them writes.
    pub fn fork(&self) -> MemoryStore {
        MemoryStore { rows: self.rows().clone().into() }
    }

    /// Number of rows, of all tables.
    pub fn len(&self) -> usize {
        self.rows().len()
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

fn range<'a>(
    map: &'a Map,
    table: Table,
    from: &[u8],
    until: &[u8],
) -> impl Iterator<Item = (&'a [u8], &'a Bytes)> {
    let start = table.stored_key(from);
    let end = if until.is_empty() { key_after(&[table.0]) } else { table.stored_key(until) };
    let range = (start < end).then(|| map.range(start..end));
    range.into_iter().flatten().map(|(key, value)| (&key[1..], value))
}

fn scan(map: &Map, table: Table, from: &[u8], until: &[u8], limit: usize) -> Rows {
    range(map, table, from, until).take(limit).map(|(k, v)| (Bytes::copy_from_slice(k), v.clone())).collect()
}

impl View for Map {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        Ok(BTreeMap::get(self, &table.stored_key(key)).cloned())
    }

    fn visit(
        &self,
        table: Table,
        from: &[u8],
        until: &[u8],
        each: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), StoreError> {
        // Ends at the first row that nothing wants to follow.
        let _ = range(self, table, from, until).all(|(key, value)| each(key, value));
        Ok(())
    }

    fn scan(&self, table: Table, from: &[u8], until: &[u8], limit: usize) -> Result<Rows, StoreError> {
        Ok(scan(self, table, from, until, limit))
    }
}

impl View for MemoryStore {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        self.get_stored(&table.stored_key(key))
    }

    fn get_stored(&self, stored: &[u8]) -> Result<Option<Bytes>, StoreError> {
        Ok(self.rows().get(stored).cloned())
    }

    fn visit(
        &self,
        table: Table,
        from: &[u8],
        until: &[u8],
        each: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), StoreError> {
        self.rows().visit(table, from, until, each)
    }

    fn scan(&self, table: Table, from: &[u8], until: &[u8], limit: usize) -> Result<Rows, StoreError> {
        Ok(scan(&self.rows(), table, from, until, limit))
    }
}

impl Store for MemoryStore {
    fn write(&self, batch: WriteBatch) -> Result<(), StoreError> {
        let mut rows = self.rows.write().unwrap_or_else(PoisonError::into_inner);
        // Copies the map only while a snapshot still looks at it.
        let map = Arc::make_mut(&mut rows);
        for (key, value) in batch {
            match value {
                Some(value) => map.insert(key, value),
                None => map.remove(&key),
            };
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), StoreError> {
        Ok(())
    }

    fn get_flushed(&self, _table: Table, _key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        // Nothing survives a crash.
        Ok(None)
    }

    fn snapshot(&self) -> Result<Arc<dyn View>, StoreError> {
        Ok(self.rows().clone())
    }

    fn checkpoint(&self, _to: &Path) -> Result<(), StoreError> {
        Err(StoreError::Engine("the memory store writes no checkpoints".into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conforms() {
        crate::conformance::check(&mut || Arc::new(MemoryStore::new()));
    }
}
