//! The store on RocksDB: one database for each replica, without its write-ahead log.
//!
//! The replicated log is the write-ahead log; a crash loses what was not flushed and the replica replays it. All
//! tables live in one column family, keyed by table number first: one memtable, so one flush is one moment of all
//! tables and no flush can tear a batch apart. The databases of a process share block cache and write buffers.

use std::{path::Path, sync::Arc};

use bytes::Bytes;
use clutch_state::store::{Store, StoreError, Table, View, WriteBatch, key_after};
use rocksdb::{
    BlockBasedIndexType, BlockBasedOptions, Cache, DB, DBCompressionType, ErrorKind, FlushOptions,
    LruCacheOptions, Options, ReadOptions, ReadTier, WriteBufferManager, WriteOptions,
    checkpoint::Checkpoint,
};

/// What all databases of a process share.
#[derive(Clone)]
pub struct SharedMemory {
    cache: Cache,
    write_buffers: WriteBufferManager,
    /// Files that each database keeps open at most.
    files_max: i32,
}

impl SharedMemory {
    /// Block cache and write buffers of these sizes, in bytes, for all databases together.
    pub fn new(cache_bytes: usize, write_buffer_bytes: usize) -> SharedMemory {
        // Few shards: each gets its part of the budget, and what is larger than that part is never kept.
        let mut cache = LruCacheOptions::default();
        cache.set_capacity(cache_bytes);
        cache.set_num_shard_bits(CACHE_SHARD_BITS);
        let cache = Cache::new_lru_cache_opts(&cache);
        // Each has its own budget: memtables that wait to be merged must not push filters out of the cache.
        let write_buffers = WriteBufferManager::new_write_buffer_manager(write_buffer_bytes, false);
        SharedMemory { cache, write_buffers, files_max: 256 }
    }

    /// The same with another bound for the files that each database keeps open.
    pub fn with_files_max(self, files_max: usize) -> SharedMemory {
        SharedMemory { files_max: i32::try_from(files_max).unwrap_or(i32::MAX), ..self }
    }
}

/// Shards of the block cache, as a power of two. Each database has one writer and few readers.
const CACHE_SHARD_BITS: i32 = 2;

/// Values from so many bytes on are kept in files of their own.
const LARGE_BYTES_MIN: u64 = 1024;

/// A database.
pub struct RocksStore {
    db: Arc<DB>,
}

/// What the system says when files are as they should be and it cannot give them now.
const TRANSIENT: [&str; 7] = [
    "lock ",
    "Permission denied",
    "Too many open files",
    "Resource temporarily unavailable",
    "Read-only file system",
    "Cannot allocate memory",
    "Operation not permitted",
];

fn engine(error: rocksdb::Error) -> StoreError {
    let kind = error.kind();
    let text = error.into_string();
    let has = |words: &str| text.contains(words);
    if has("No space left on device") || has("Disk quota exceeded") || has("NoSpace") {
        return StoreError::Full(text);
    }
    match kind {
        ErrorKind::Corruption
        | ErrorKind::InvalidArgument
        | ErrorKind::NotSupported
        | ErrorKind::NotFound => StoreError::Damaged(text),
        // A file that is missing or cannot be read is damage; what the system refuses for other reasons is not.
        ErrorKind::IOError if !TRANSIENT.iter().any(|words| has(words)) => StoreError::Damaged(text),
        _ => StoreError::Engine(text),
    }
}

fn options(memory: &SharedMemory) -> Options {
    let mut table = BlockBasedOptions::default();
    table.set_block_cache(&memory.cache);
    table.set_bloom_filter(10.0, false);
    table.set_cache_index_and_filter_blocks(true);
    table.set_pin_l0_filter_and_index_blocks_in_cache(true);
    // In parts of a few KiB: a file's whole filter has a MiB or more, and to look for one row would read all of it
    // again whenever the cache had no room for it.
    table.set_index_type(BlockBasedIndexType::TwoLevelIndexSearch);
    table.set_partition_filters(true);
    table.set_metadata_block_size(4 << 10);
    table.set_pin_top_level_index_and_filter(true);
    table.set_format_version(6);
    // Rows are small and looked up one by one: a larger block is decompressed for a hundred of them.
    table.set_block_size(4 << 10);
    // Rows arrive sorted: with a hint for each table, the place of one is found from that of the one before. The
    // wrapper has no call for this option; a build of RocksDB that does not know it only works a little more. It must not
    // be used together with DeleteRange, which nothing here does.
    let hinted = "memtable_insert_with_hint_prefix_extractor=rocksdb.CappedPrefix.1";
    let mut options = Options::default().get_options_from_string(hinted).unwrap_or_default();
    options.create_if_missing(true);
    options.set_block_based_table_factory(&table);
    options.set_write_buffer_manager(&memory.write_buffers);
    // Rows go into a skip list that fits the processor's cache; two of them become one file, which also bounds what is
    // replayed after a crash.
    options.set_write_buffer_size(16 << 20);
    options.set_min_write_buffer_number_to_merge(2);
    options.set_max_write_buffer_number(5);
    // Half of all looks are for what is not there yet; without this each walks a memtable of a million rows.
    options.set_memtable_whole_key_filtering(true);
    options.set_memtable_prefix_bloom_ratio(0.015);
    options.set_arena_block_size(256 << 10);
    options.set_compression_type(DBCompressionType::Lz4);
    // Large values lie beside the sorted rows, which are merged again and again without them. The oldest files of them are written anew
    // when half of what they have is gone.
    options.set_enable_blob_files(true);
    options.set_min_blob_size(LARGE_BYTES_MIN);
    options.set_blob_compression_type(DBCompressionType::Lz4);
    options.set_blob_file_size(64 << 20);
    options.set_enable_blob_gc(true);
    options.set_blob_gc_age_cutoff(0.5);
    options.set_blob_gc_force_threshold(0.5);
    options.set_max_open_files(memory.files_max);
    options.set_keep_log_file_num(2);
    options.set_max_log_file_size(4 << 20);
    options.set_paranoid_checks(true);
    options.set_max_background_jobs(2);
    options.set_bytes_per_sync(1 << 20);
    options
}

impl RocksStore {
    /// Opens a database, or makes it.
    pub fn open(path: &Path, memory: &SharedMemory) -> Result<RocksStore, StoreError> {
        let db = DB::open(&options(memory), path).map_err(engine)?;
        Ok(RocksStore { db: Arc::new(db) })
    }

    /// Opens a database that may belong to a running process, to read what is flushed.
    pub fn open_read_only(path: &Path, memory: &SharedMemory) -> Result<RocksStore, StoreError> {
        let db = DB::open_for_read_only(&options(memory), path, false).map_err(engine)?;
        Ok(RocksStore { db: Arc::new(db) })
    }
}

fn visit(
    db: &DB,
    mut options: ReadOptions,
    table: Table,
    from: &[u8],
    until: &[u8],
    each: &mut dyn FnMut(&[u8], &[u8]) -> bool,
) -> Result<(), StoreError> {
    let start = table.stored_key(from);
    let end = if until.is_empty() { key_after(&[table.0]) } else { table.stored_key(until) };
    if !end.is_empty() && start >= end {
        return Ok(());
    }
    if !end.is_empty() {
        options.set_iterate_upper_bound(&end[..]);
    }
    let mut iterator = db.raw_iterator_opt(options);
    iterator.seek(&start[..]);
    while let Some((key, value)) = iterator.item()
        && each(&key[1..], value)
    {
        iterator.next();
    }
    iterator.status().map_err(engine)
}

impl View for RocksStore {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        self.get_stored(&table.stored_key(key))
    }

    fn get_stored(&self, stored: &[u8]) -> Result<Option<Bytes>, StoreError> {
        Ok(self.db.get(stored).map_err(engine)?.map(Bytes::from))
    }

    fn visit(
        &self,
        table: Table,
        from: &[u8],
        until: &[u8],
        each: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), StoreError> {
        visit(&self.db, ReadOptions::default(), table, from, until, each)
    }
}

impl Store for RocksStore {
    fn write(&self, batch: WriteBatch) -> Result<(), StoreError> {
        // A record has at most two lengths and a kind in front.
        let bytes =
            batch.iter().map(|(key, value)| 11 + key.len() + value.as_ref().map_or(0, Bytes::len)).sum();
        let mut writes = rocksdb::WriteBatch::with_capacity_bytes(bytes);
        for (key, value) in batch {
            match value {
                Some(value) => writes.put(key, value),
                None => writes.delete(key),
            }
        }
        let mut options = WriteOptions::default();
        options.disable_wal(true);
        self.db.write_opt(writes, &options).map_err(engine)
    }

    fn flush(&self) -> Result<(), StoreError> {
        let mut options = FlushOptions::default();
        options.set_wait(true);
        self.db.flush_opt(&options).map_err(engine)
    }

    fn get_flushed(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        let mut options = ReadOptions::default();
        options.set_read_tier(ReadTier::Persisted);
        Ok(self.db.get_opt(table.stored_key(key), &options).map_err(engine)?.map(Bytes::from))
    }

    fn snapshot(&self) -> Result<Arc<dyn View>, StoreError> {
        Ok(Arc::new(RocksSnapshot::new(self.db.clone())))
    }

    fn checkpoint(&self, to: &Path) -> Result<(), StoreError> {
        Checkpoint::new(&*self.db).map_err(engine)?.create_checkpoint(to).map_err(engine)
    }
}

/// A moment of a database. The snapshot borrows the database that it keeps alive.
///
/// The order of the fields matters: the snapshot is released before the database.
struct RocksSnapshot {
    snapshot: rocksdb::SnapshotWithThreadMode<'static, DB>,
    db: Arc<DB>,
}

#[allow(unsafe_code)]
impl RocksSnapshot {
    fn new(db: Arc<DB>) -> RocksSnapshot {
        // SAFETY: the reference points into the Arc that this value keeps, and fields are dropped in the
        // order of their declaration: the snapshot before the Arc.
        let borrowed: &'static DB = unsafe { &*Arc::as_ptr(&db) };
        RocksSnapshot { snapshot: borrowed.snapshot(), db }
    }
}

impl View for RocksSnapshot {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        Ok(self.snapshot.get(table.stored_key(key)).map_err(engine)?.map(Bytes::from))
    }

    fn visit(
        &self,
        table: Table,
        from: &[u8],
        until: &[u8],
        each: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), StoreError> {
        let mut options = ReadOptions::default();
        options.set_snapshot(&self.snapshot);
        visit(&self.db, options, table, from, until, each)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> SharedMemory {
        SharedMemory::new(8 << 20, 8 << 20)
    }

    #[test]
    fn conforms() {
        let mut dirs = Vec::new();
        clutch_state::conformance::check(&mut || {
            let dir = tempfile::tempdir().expect("temporary directory");
            let store = RocksStore::open(dir.path(), &memory()).expect("opens");
            dirs.push(dir);
            Arc::new(store)
        });
    }

    #[test]
    fn the_hint_for_sorted_rows_is_known_to_this_build() {
        let dir = tempfile::tempdir().expect("temporary directory");
        drop(RocksStore::open(dir.path(), &memory()).expect("opens"));
        let files =
            std::fs::read_dir(dir.path()).expect("lists").map(|entry| entry.expect("an entry").path());
        let mut options = files.filter(|path| path.to_string_lossy().contains("OPTIONS-"));
        let text = std::fs::read_to_string(options.next().expect("an options file")).expect("reads");
        assert!(text.contains("memtable_insert_with_hint_prefix_extractor=rocksdb.CappedPrefix.1"), "{text}");
    }

    #[test]
    fn only_what_was_flushed_counts_as_flushed_and_survives() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let table = Table(64);
        let put = |store: &RocksStore, value: &'static [u8]| {
            store.write(vec![(table.stored_key(b"k"), Some(Bytes::from_static(value)))]).expect("writes");
        };
        {
            let store = RocksStore::open(dir.path(), &memory()).expect("opens");
            put(&store, b"flushed");
            assert_eq!(store.get_flushed(table, b"k").expect("reads"), None);
            store.flush().expect("flushes");
            put(&store, b"not flushed");
            assert_eq!(store.get(table, b"k").expect("reads").as_deref(), Some(&b"not flushed"[..]));
            assert_eq!(store.get_flushed(table, b"k").expect("reads").as_deref(), Some(&b"flushed"[..]));
        }
        let copy = dir.path().join("copy");
        let store = RocksStore::open(dir.path(), &memory()).expect("opens");
        put(&store, b"in the copy");
        store.checkpoint(&copy).expect("checkpoint");
        put(&store, b"after the copy");
        let copied = RocksStore::open_read_only(&copy, &memory()).expect("opens");
        assert_eq!(copied.get(table, b"k").expect("reads").as_deref(), Some(&b"in the copy"[..]));
    }
}
