//! A store in front of another: rows written lately wait in memory and go on in large batches sorted by key.
//!
//! The log is the write-ahead log, so what waits here is lost in a crash as everything unflushed is, and replayed. A row
//! that is written in every batch (a client's, a directory's, a hash sum) reaches the store below once for many of
//! them, and sorted rows cost it less than scattered ones. Rows that were read or passed on lately are kept, too,
//! but for those of tables that are written and seldom read.
//!
//! Invariants: batches are passed on whole and in order; `flush`, `snapshot` and `checkpoint` pass everything on first, but
//! that a snapshot while there is no room below is of the rows below and of those that wait; a kept row equals the one
//! below unless a newer one waits; once rows were lost on their way, nothing is read or written any more.

use std::{
    collections::BTreeMap,
    ops::Bound,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use bytes::Bytes;
use clutch_proto::mutants::{self, Mutant};
use parking_lot::RwLock;
use quick_cache::{Equivalent, Weighter, sync::Cache};

use clutch_state::store::{Key, Store, StoreError, Table, View, WriteBatch, key_after};

/// Bytes that a kept row costs besides its value: its key, which is kept in place, the links, and what the value shares.
const ROW_OVERHEAD: usize = 168;

/// Bytes that wait at most while the store below has no room; more stop the replica.
const FULL_BYTES_MAX: usize = 64 << 20;

/// Rows of all stores of a process that were used lately, within one budget; cheap to clone.
#[derive(Clone)]
pub struct RowCache {
    rows: Arc<Cache<(u32, Key), Bytes, RowWeight>>,
    stores: Arc<AtomicU32>,
}

#[derive(Clone)]
struct RowWeight;

impl Weighter<(u32, Key), Bytes> for RowWeight {
    fn weight(&self, (_, key): &(u32, Key), value: &Bytes) -> u64 {
        let key = if key.spilled() { key.len() } else { 0 };
        (key + value.len() + ROW_OVERHEAD) as u64
    }
}

/// A key to look for, without a copy of it.
#[derive(Hash)]
struct Probe<'a>(u32, &'a [u8]);

impl Equivalent<(u32, Key)> for Probe<'_> {
    fn equivalent(&self, (store, key): &(u32, Key)) -> bool {
        self.0 == *store && self.1 == &key[..]
    }
}

impl RowCache {
    /// A cache of so many bytes.
    pub fn new(bytes: usize) -> RowCache {
        // Rows are about that large; the figure only sizes the tables at first.
        let rows = Cache::with_weighter(bytes / 256, bytes as u64, RowWeight);
        RowCache { rows: Arc::new(rows), stores: Arc::default() }
    }
}

/// Rows by their keys as stored; `None` deletes.
type Rows = BTreeMap<Key, Option<Bytes>>;

#[derive(Default)]
struct Pending {
    rows: Rows,
    bytes: usize,
    /// Rows could not be passed on and are lost: nothing that is read or written from now on would be right.
    failed: Option<StoreError>,
}

impl Pending {
    fn check(&self) -> Result<(), StoreError> {
        self.failed.clone().map_or(Ok(()), Err)
    }
}

/// The store in front.
pub struct BufferedStore {
    below: Arc<dyn Store>,
    pending: RwLock<Pending>,
    cache: RowCache,
    /// This store's number in the cache.
    number: u32,
    rows_max: usize,
    bytes_max: usize,
    /// Rows of these are not kept.
    passing: &'static [Table],
}

impl BufferedStore {
    /// Passes rows on when more than `rows_max` of them, or more than `bytes_max` bytes, are waiting.
    pub fn new(below: Arc<dyn Store>, cache: RowCache, rows_max: usize, bytes_max: usize) -> BufferedStore {
        let number = cache.stores.fetch_add(1, Ordering::Relaxed);
        let pending = RwLock::default();
        BufferedStore { below, pending, cache, number, rows_max, bytes_max, passing: &[] }
    }

    /// The same, but rows of these tables, which are written and seldom read, leave the room in the cache to others.
    pub fn with_passing(self, tables: &'static [Table]) -> BufferedStore {
        BufferedStore { passing: tables, ..self }
    }

    fn is_kept(&self, stored: &[u8]) -> bool {
        stored.first().is_some_and(|table| !self.passing.contains(&Table(*table)))
    }

    /// Passes on what waits.
    fn pass_on(&self, pending: &mut Pending) -> Result<(), StoreError> {
        pending.check()?;
        if pending.rows.is_empty() {
            return Ok(());
        }
        for (key, value) in pending.rows.iter().filter(|(key, _)| self.is_kept(key)) {
            // While the lock is held nobody reads below, so nobody can bring back what is replaced here.
            match value {
                Some(value) => self.cache.rows.insert((self.number, Key::from_slice(key)), value.clone()),
                None => drop(self.cache.rows.remove(&Probe(self.number, key))),
            }
        }
        let rows = pending.rows.iter().map(|(key, value)| (key.clone(), value.clone())).collect();
        match self.below.write(rows) {
            Ok(()) => {
                let bytes =
                    pending.rows.iter().map(|(key, value)| key.len() + value.as_ref().map_or(0, Bytes::len));
                assert!(bytes.sum::<usize>() <= pending.bytes, "no more waits than was reckoned");
                pending.rows.clear();
                pending.bytes = 0;
                Ok(())
            }
            // Nothing was written; the rows wait on.
            Err(error @ StoreError::Full(_)) => Err(error),
            Err(error) => {
                pending.failed = Some(error.clone());
                Err(error)
            }
        }
    }
}

impl View for BufferedStore {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        self.get_stored(&table.stored_key(key))
    }

    fn get_stored(&self, stored: &[u8]) -> Result<Option<Bytes>, StoreError> {
        let pending = self.pending.read();
        pending.check()?;
        if let Some(value) = pending.rows.get(stored) {
            return Ok(value.clone());
        }
        if let Some(value) = self.cache.rows.get(&Probe(self.number, stored)) {
            return Ok(Some(value));
        }
        let value = self.below.get_stored(stored)?;
        if let Some(value) = value.as_ref().filter(|_| self.is_kept(stored)) {
            self.cache.rows.insert((self.number, Key::from_slice(stored)), value.clone());
        }
        drop(pending);
        Ok(value)
    }

    fn visit(
        &self,
        table: Table,
        from: &[u8],
        until: &[u8],
        each: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), StoreError> {
        let pending = self.pending.read();
        pending.check()?;
        visit_with(&pending.rows, &*self.below, table, from, until, each)
    }
}

/// Visits the rows of a store together with newer ones in front of it.
fn visit_with(
    newer: &Rows,
    below: &dyn View,
    table: Table,
    from: &[u8],
    until: &[u8],
    each: &mut dyn FnMut(&[u8], &[u8]) -> bool,
) -> Result<(), StoreError> {
    let start = table.stored_key(from);
    let end = if until.is_empty() { key_after(&[table.0]) } else { table.stored_key(until) };
    if start >= end {
        return Ok(());
    }
    let range = (Bound::Included(start), Bound::Excluded(end));
    let mut waiting = newer.range(range).map(|(key, value)| (&key[1..], value)).peekable();
    let mut wanted = true;
    below.visit(table, from, until, &mut |key, value| {
        while wanted && let Some((newer, replaced)) = waiting.next_if(|(waiting, _)| *waiting <= key) {
            wanted = replaced.as_ref().is_none_or(|value| each(newer, value));
            if newer == key {
                return wanted;
            }
        }
        wanted = wanted && each(key, value);
        wanted
    })?;
    for (key, value) in waiting {
        wanted = wanted && value.as_ref().is_none_or(|value| each(key, value));
        if !wanted {
            break;
        }
    }
    Ok(())
}

/// A moment at which rows could not be passed on for want of room.
struct Moment {
    newer: Rows,
    below: Arc<dyn View>,
}

impl View for Moment {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        match self.newer.get(&table.stored_key(key)) {
            Some(value) => Ok(value.clone()),
            None => self.below.get(table, key),
        }
    }

    fn visit(
        &self,
        table: Table,
        from: &[u8],
        until: &[u8],
        each: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), StoreError> {
        visit_with(&self.newer, &*self.below, table, from, until, each)
    }
}

impl Store for BufferedStore {
    fn write(&self, batch: WriteBatch) -> Result<(), StoreError> {
        let mut pending = self.pending.write();
        pending.check()?;
        for (key, value) in batch {
            pending.bytes += key.len() + value.as_ref().map_or(0, Bytes::len);
            pending.rows.insert(key, value);
        }
        if pending.rows.len() > self.rows_max || pending.bytes > self.bytes_max {
            match self.pass_on(&mut pending) {
                // They wait for room, as long as not too many do.
                Err(StoreError::Full(_)) if pending.bytes <= FULL_BYTES_MAX => {}
                passed => passed?,
            }
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), StoreError> {
        self.pass_on(&mut self.pending.write())?;
        self.below.flush()
    }

    fn get_flushed(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        self.below.get_flushed(table, key)
    }

    fn snapshot(&self) -> Result<Arc<dyn View>, StoreError> {
        let mut pending = self.pending.write();
        match self.pass_on(&mut pending) {
            Ok(()) => self.below.snapshot(),
            // Who only reads need not wait for room.
            Err(StoreError::Full(_)) => {
                let (newer, below) = (pending.rows.clone(), self.below.snapshot()?);
                Ok(Arc::new(Moment { newer, below }))
            }
            Err(error) => Err(error),
        }
    }

    fn checkpoint(&self, to: &Path) -> Result<(), StoreError> {
        if !mutants::is(Mutant::CheckpointOfWritten) {
            self.pass_on(&mut self.pending.write())?;
        }
        self.below.checkpoint(to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clutch_state::MemoryStore;

    #[test]
    fn conforms_however_much_waits() {
        for rows_max in [0, 1, 2, 3, 1000] {
            clutch_state::conformance::check(&mut || {
                let below = Arc::new(MemoryStore::new());
                Arc::new(BufferedStore::new(below, RowCache::new(1 << 20), rows_max, 1 << 20))
            });
            clutch_state::conformance::check(&mut || {
                let store = BufferedStore::new(
                    Arc::new(MemoryStore::new()),
                    RowCache::new(1 << 20),
                    rows_max,
                    1 << 20,
                );
                Arc::new(store.with_passing(&[Table(64)]))
            });
        }
    }

    /// A store that fails writes in one way while it is told so.
    struct Failing(MemoryStore, StoreError, std::sync::atomic::AtomicBool);

    impl View for Failing {
        fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
            self.0.get(table, key)
        }

        fn visit(
            &self,
            table: Table,
            from: &[u8],
            until: &[u8],
            each: &mut dyn FnMut(&[u8], &[u8]) -> bool,
        ) -> Result<(), StoreError> {
            self.0.visit(table, from, until, each)
        }
    }

    impl Store for Failing {
        fn write(&self, batch: WriteBatch) -> Result<(), StoreError> {
            match self.2.load(Ordering::Relaxed) {
                true => Err(self.1.clone()),
                false => self.0.write(batch),
            }
        }

        fn flush(&self) -> Result<(), StoreError> {
            self.0.flush()
        }

        fn get_flushed(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
            // All that it has survives.
            self.0.get(table, key)
        }

        fn snapshot(&self) -> Result<Arc<dyn View>, StoreError> {
            self.0.snapshot()
        }

        fn checkpoint(&self, to: &Path) -> Result<(), StoreError> {
            self.0.checkpoint(to)
        }
    }

    #[test]
    fn after_rows_were_lost_nothing_goes_on() {
        let table = Table(64);
        let below = Failing(MemoryStore::new(), StoreError::Engine("broken".into()), true.into());
        let store = BufferedStore::new(Arc::new(below), RowCache::new(1 << 20), 100, 1 << 20);
        let row = || vec![(table.stored_key(b"k"), Some(Bytes::from_static(b"v")))];
        store.write(row()).expect("waits in memory");
        assert!(store.snapshot().is_err(), "the rows cannot be passed on");
        assert!(store.write(row()).is_err() && store.get(table, b"k").is_err() && store.flush().is_err());
        assert!(store.scan(table, b"", b"", 1).is_err() && store.snapshot().is_err());
    }

    #[test]
    fn rows_wait_for_room_and_are_read_meanwhile() {
        let table = Table(64);
        let below = Arc::new(Failing(MemoryStore::new(), StoreError::Full("no space".into()), true.into()));
        let store = BufferedStore::new(below.clone(), RowCache::new(1 << 20), 2, 1 << 20);
        for n in 0..10u8 {
            store.write(vec![(table.stored_key(&[n]), Some(Bytes::from(vec![n])))]).expect("waits");
        }
        assert!(matches!(store.flush(), Err(StoreError::Full(_))));
        assert_eq!(store.scan(table, b"", b"", 100).expect("reads").len(), 10);
        assert!(below.0.is_empty());
        let moment = store.snapshot().expect("reading needs no room");
        store.write(vec![(table.stored_key(&[3]), None)]).expect("waits");
        assert_eq!(moment.scan(table, b"", b"", 100).expect("reads").len(), 10, "a moment stays as it was");
        assert_eq!(moment.get(table, &[3]).expect("reads"), Some(Bytes::from(vec![3])));
        assert_eq!(store.get_flushed(table, &[7]).expect("reads"), None, "a crash would lose what waits");
        below.2.store(false, Ordering::Relaxed);
        store.flush().expect("there is room");
        assert_eq!(store.get_flushed(table, &[7]).expect("reads"), Some(Bytes::from(vec![7])));
        assert_eq!(below.scan(table, b"", b"", 100).expect("reads").len(), 9);
        assert_eq!(store.get(table, &[7]).expect("reads"), Some(Bytes::from(vec![7])));
    }

    #[test]
    fn reads_are_as_without_it() {
        // Every sequence of a few writes of a few keys, with scans after each, against the plain store.
        let table = Table(64);
        let keys: [&[u8]; 3] = [b"a", b"b", b"c"];
        for script in 0..2 * 6u32.pow(4) {
            let plain = MemoryStore::new();
            let cache = RowCache::new(1 << 20);
            let mut store = BufferedStore::new(Arc::new(MemoryStore::new()), cache, 2, 1 << 20);
            if script % 2 == 0 {
                store = store.with_passing(&[Table(64)]);
            }
            let mut rest = script / 2;
            for step in 0..4u8 {
                let (key, delete) = (keys[(rest % 3) as usize], rest / 3 % 2 == 1);
                rest /= 6;
                let value = (!delete).then(|| Bytes::from(vec![step]));
                for store in [&plain as &dyn Store, &store] {
                    store.write(vec![(table.stored_key(key), value.clone())]).expect("writes");
                }
                for limit in 1..4 {
                    let scan = |store: &dyn View| store.scan(table, b"a", b"", limit).expect("scans");
                    assert_eq!(scan(&store), scan(&plain), "script {script}, step {step}, limit {limit}");
                }
                for key in keys {
                    let get = |store: &dyn View| store.get(table, key).expect("reads");
                    assert_eq!(get(&store), get(&plain), "script {script}, step {step}");
                }
            }
        }
    }

    #[test]
    fn rows_go_on_when_more_wait_than_may() {
        let table = Table(64);
        let row = |n: u8, bytes: usize| vec![(table.stored_key(&[n]), Some(Bytes::from(vec![n; bytes])))];
        // By their number, and by their bytes: a stored key of two, and a value.
        for (rows_max, bytes_max, bytes, waiting) in [(3, 1 << 20, 1, 3), (100, 40, 8, 4), (100, 39, 8, 3)] {
            let below = Arc::new(MemoryStore::new());
            let store = BufferedStore::new(below.clone(), RowCache::new(1 << 20), rows_max, bytes_max);
            for n in 0..waiting {
                store.write(row(n, bytes)).expect("waits");
            }
            assert!(below.is_empty(), "{waiting} of {bytes} bytes wait");
            store.write(row(99, bytes)).expect("goes on");
            assert_eq!(below.scan(table, b"", b"", 100).expect("scans").len(), usize::from(waiting) + 1);
            // The count begins anew.
            store.write(row(100, bytes)).expect("waits");
            assert!(below.get(table, &[100]).expect("reads").is_none());
        }
    }

    #[test]
    fn what_waits_for_room_has_a_limit() {
        let below = Failing(MemoryStore::new(), StoreError::Full("no space".into()), true.into());
        let store = BufferedStore::new(Arc::new(below), RowCache::new(1 << 20), 2, 1 << 20);
        let part = Bytes::from(vec![1; FULL_BYTES_MAX / 4 - 2]);
        let write = |n: u8| store.write(vec![(Table(64).stored_key(&[n]), Some(part.clone()))]);
        for n in 0..4 {
            write(n).expect("exactly as much as may wait");
        }
        assert!(matches!(write(4), Err(StoreError::Full(_))));
    }

    #[test]
    fn rows_are_kept_within_the_budget_unless_their_table_is_passing() {
        let cache = RowCache::new(1 << 20);
        let store = |number: u8| {
            let below = Arc::new(MemoryStore::new());
            for table in [Table(64), Table(65)] {
                let row = (table.stored_key(b"k"), Some(Bytes::from(vec![number])));
                below.write(vec![row]).expect("writes");
            }
            let store = BufferedStore::new(below.clone(), cache.clone(), 10, 1 << 20);
            (store.with_passing(&[Table(65)]), below)
        };
        let stores = [store(1), store(2)];
        for (n, (store, below)) in (1..).zip(&stores) {
            for table in [Table(64), Table(65)] {
                assert_eq!(store.get(table, b"k").expect("reads"), Some(Bytes::from(vec![n])));
                // Behind its back, to see which is asked.
                below
                    .write(vec![(table.stored_key(b"k"), Some(Bytes::from_static(b"other")))])
                    .expect("writes");
            }
            assert_eq!(store.get(Table(64), b"k").expect("reads"), Some(Bytes::from(vec![n])), "kept");
            assert_eq!(store.get(Table(65), b"k").expect("reads"), Some(Bytes::from_static(b"other")));
        }
        // What a row counts: a long key is apart from the row, a short one is in its place.
        for (key_len, value_len) in [(3, 0), (3, 1000), (300, 7)] {
            let key = Key::from_slice(&vec![1; key_len]);
            let apart = if key.spilled() { key_len } else { 0 };
            assert_eq!(key.spilled(), key_len == 300);
            let weight = RowWeight.weight(&(0, key), &Bytes::from(vec![0; value_len]));
            assert_eq!(weight as usize, ROW_OVERHEAD + value_len + apart);
        }
    }
}
