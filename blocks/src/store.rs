//! One disk's blocks: small ones in segments ([`crate::packed`]), large ones as files in 256 directories, written under a temporary name
//! first.

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use clutch_proto::{
    BlockId, Refusal, ServiceId, Time,
    limits::{BLOCK_BYTES_MAX, PAGE_BYTES},
    mutants::{self, Mutant},
    types::Code,
};
use clutch_runtime::Disk;

use crate::{
    format::{HEADER_BYTES, Header, data_offset, page_table, pages},
    label::{self, Label},
    packed::{
        PACKED_DIR, Pack, PackFault, PackOptions, Record, Tail, Upkeep,
        format::{Location, SegmentHeader, number_of},
    },
    scrub::{self, SCRUB_FILE},
};

/// A block is looked at in pieces of so many bytes.
pub(crate) const VERIFY_BYTES: u32 = 4 << 20;

/// The blocks of one service. Its calls block on the disk.
pub struct BlockStore {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    cluster: u64,
    service: ServiceId,
    /// Bytes that blocks leave free.
    reserve_bytes: u64,
    next_temporary: AtomicU64,
    /// Why the directory is not used; looked at anew by [`BlockStore::look`].
    unusable: Mutex<Option<String>>,
    /// Directories of blocks that are known to be durable.
    directories: Mutex<BTreeSet<PathBuf>>,
    options: PackOptions,
    /// The small blocks; `None` until they are looked through, also when the disk has been away.
    pack: Mutex<Option<Arc<Pack>>>,
    /// Whoever changes small blocks has it.
    tail: Arc<tokio::sync::Mutex<Tail>>,
    /// Whether blocks may lie in files, too.
    has_files: AtomicBool,
    /// Grows with each exchange of what is known of small blocks.
    generation: AtomicU64,
    /// Directories whose names are owed a sync.
    owed: Mutex<BTreeSet<PathBuf>>,
    /// Whether `before_first` was called.
    is_noted: AtomicBool,
    /// Called before the first small block of a disk is packed.
    before_first: BeforeFirst,
}

/// Takes note that a disk's blocks are packed from now on.
type BeforeFirst = Arc<dyn Fn() -> io::Result<()> + Send + Sync>;

/// What a write is to leave behind.
#[derive(Clone, Copy, Debug)]
pub struct Expected {
    /// The block.
    pub block: BlockId,
    /// Its size.
    pub size: u32,
    /// Its CRC.
    pub crc: u32,
    /// When it was granted.
    pub time: u64,
}

/// One change of a disk's small blocks.
pub enum Change<'a> {
    /// A block is written; see [`BlockStore::write`].
    Write {
        /// What it is to leave behind.
        expected: Expected,
        /// The block.
        data: &'a [u8],
        /// Asked once more before it is written.
        is_granted: &'a dyn Fn() -> bool,
    },
    /// A block is removed, also one that is large.
    Erase(BlockId),
}

/// What is to be done for a change.
#[derive(Default)]
struct Prepared {
    records: Vec<Record>,
    /// Records that are dead then.
    dead: Vec<Location>,
    /// A file that goes then.
    file: Option<PathBuf>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // It is whole between any two statements.
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

fn disk_fault(what: &str, error: &io::Error) -> Refusal {
    let code = if error.kind() == io::ErrorKind::StorageFull { Code::NoSpace } else { Code::DiskFault };
    Refusal::new(code, format!("{what}: {error}"))
}

impl BlockStore {
    /// Labels a directory as the disk of a service and opens it: for a new disk, as an operator would.
    pub fn create(
        disk: Arc<dyn Disk>,
        dir: PathBuf,
        cluster: u64,
        service: ServiceId,
        now: Time,
    ) -> io::Result<BlockStore> {
        Label { cluster, service, created: now }.write(&*disk, &dir)?;
        BlockStore::open(disk, dir, cluster, service, PackOptions::default())
    }

    /// Opens a disk's directory and removes what writes that never finished left behind. One without its label opens, too,
    /// and refuses everything until the right disk is there.
    pub fn open(
        disk: Arc<dyn Disk>,
        dir: PathBuf,
        cluster: u64,
        service: ServiceId,
        options: PackOptions,
    ) -> io::Result<BlockStore> {
        let store = BlockStore {
            disk,
            dir,
            cluster,
            service,
            reserve_bytes: 0,
            next_temporary: AtomicU64::new(1),
            unusable: Mutex::default(),
            directories: Mutex::default(),
            options,
            pack: Mutex::default(),
            tail: Arc::default(),
            has_files: AtomicBool::new(true),
            generation: AtomicU64::new(0),
            owed: Mutex::default(),
            is_noted: AtomicBool::new(false),
            before_first: Arc::new(|| Ok(())),
        };
        if store.look().is_some() {
            return Ok(store);
        }
        let temporary = store.dir.join("tmp");
        store.disk.create_dir_all(&temporary)?;
        for name in store.disk.list(&temporary)? {
            store.disk.remove(&temporary.join(name))?;
        }
        // What a disk that fails just now has is looked through when somebody asks for it.
        if store.small(None).is_ok() && mutants::is(Mutant::BlockErasedInUse) {
            for block in store.list()?.into_iter().take(3) {
                store.erase(block).map_err(|refusal| io::Error::other(refusal.detail))?;
            }
        }
        Ok(store)
    }

    /// Which service this is.
    pub fn service(&self) -> ServiceId {
        self.service
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes something small, and takes it away again.
    ///
    /// # Errors
    /// Why that is not possible.
    pub fn try_to_write(&self) -> Result<(), Refusal> {
        self.check_usable()?;
        let path = self.dir.join("try");
        let tried = self.disk.replace(&path, b"try").and_then(|()| self.disk.remove(&path));
        tried.map_err(|error| disk_fault("try to write to the disk", &error))
    }

    /// How far the disk has been read through, as it says itself; `None` where it does not.
    ///
    /// # Errors
    /// When the disk is not used.
    pub fn scrub_position(&self) -> Result<Option<scrub::Position>, Refusal> {
        self.check_usable()?;
        let read = self.disk.read(&self.dir.join(SCRUB_FILE)).ok();
        Ok(read.and_then(|bytes| scrub::Position::decode(&bytes)))
    }

    /// Keeps that, durably.
    ///
    /// # Errors
    /// When the disk is not used, or fails.
    pub fn keep_scrub_position(&self, position: &scrub::Position) -> Result<(), Refusal> {
        self.check_usable()?;
        let kept = self.disk.replace(&self.dir.join(SCRUB_FILE), &position.encode());
        kept.map_err(|error| disk_fault("keep how far the disk was read", &error))
    }

    /// Total and available bytes of the disk; none of one that is not used.
    pub fn space(&self) -> io::Result<(u64, u64)> {
        if self.look().is_some() {
            return Ok((0, 0));
        }
        let (total, available) = self.disk.space(&self.dir)?;
        Ok((total, available.saturating_sub(self.reserve_bytes.max(self.options.room_to_erase(total)))))
    }

    /// The same, but blocks leave so many bytes of the file system free: for logs and states that share it.
    pub fn with_reserve(self, reserve_bytes: u64) -> BlockStore {
        BlockStore { reserve_bytes, ..self }
    }

    /// The same, but this is called before the first small block is packed, which builds that do not know of that would not find; where it
    /// fails none is written.
    pub fn with_first_packing(self, before_first: BeforeFirst) -> BlockStore {
        BlockStore { before_first, ..self }
    }

    /// Looks at the disk's label anew. Why the disk is not used; `None` while all is well.
    pub fn look(&self) -> Option<String> {
        let found = label::check(&*self.disk, &self.dir, self.cluster, self.service).err();
        let found = found.filter(|_| !mutants::is(Mutant::EmptyDiskUsed));
        let mut unusable = lock(&self.unusable);
        if *unusable != found {
            match &found {
                Some(reason) => tracing::error!("{reason}"),
                None => tracing::warn!("disk {} is used again", self.dir.display()),
            }
            // What was known of its directories and segments was of another file system.
            lock(&self.directories).clear();
            self.retire(None);
        }
        (*unusable).clone_from(&found);
        found
    }

    /// Why the disk is not used, as it was when it was looked at last.
    pub fn unusable(&self) -> Option<String> {
        lock(&self.unusable).clone()
    }

    /// Refuses work on a disk that is not used, also on one that has vanished since it was looked at last.
    fn check_usable(&self) -> Result<(), Refusal> {
        let known = lock(&self.unusable).clone();
        let reason = match known {
            None if self.disk.exists(&label::path(&self.dir)) || mutants::is(Mutant::EmptyDiskUsed) => {
                return Ok(());
            }
            // Also what was wrong before may be right by now: a disk is used as soon as it is back.
            _ => match self.look() {
                Some(reason) => reason,
                None => return Ok(()),
            },
        };
        Err(Refusal::new(Code::DiskFault, reason))
    }

    /// The same behind some work, which may have taken long: what was done in the place of a disk that went away meanwhile was not
    /// done to it.
    fn check_still_usable(&self) -> Result<(), Refusal> {
        if mutants::is(Mutant::LabelLookedAtOnce) { Ok(()) } else { self.check_usable() }
    }

    fn path(&self, block: BlockId) -> PathBuf {
        // The bits above the slot spread one shard's blocks over all directories.
        self.dir.join(format!("{:02x}", block.0 >> 8 & 0xff)).join(format!("{:016x}", block.0))
    }

    /// Writes a block durably. The same block again is fine; another one under its id is refused. A small one waits for all other
    /// changes of small ones; see [`BlockStore::change`].
    ///
    /// `is_granted` is asked once more before the block gets its name: a write that took so long that its grant has
    /// ended may come after an erase.
    pub fn write(
        &self,
        expected: &Expected,
        data: &[u8],
        is_granted: &dyn Fn() -> bool,
    ) -> Result<(), Refusal> {
        if self.is_small(data.len()) {
            let change = Change::Write { expected: *expected, data, is_granted };
            return self.change(&mut self.tail.blocking_lock(), &[change]).pop().unwrap_or(Ok(()));
        }
        check_write(expected, data)?;
        self.check_usable()?;
        let path = self.path(expected.block);
        if self.disk.exists(&path) && self.is_there(expected, &path)? {
            return self.check_still_usable();
        }
        self.check_reserve(data.len())?;
        let table = page_table(data);
        let header = Header {
            cluster: self.cluster,
            service: self.service,
            block: expected.block,
            size: expected.size,
            crc: expected.crc,
            time: expected.time,
            table_crc: crc32fast::hash(&table),
        };
        let at = data_offset(expected.size);
        match self.write_file(&path, &header.encode(), &table, data, at, is_granted) {
            Ok(true) => self.check_still_usable(),
            Ok(false) => Err(Refusal::new(Code::CertificateExpired, "the write took longer than its grant")),
            Err(error) => Err(disk_fault("write block", &error)),
        }
    }

    /// Whether a block of so many bytes is packed with others.
    pub fn is_small(&self, bytes: usize) -> bool {
        bytes < self.options.below as usize
    }

    /// Whoever changes small blocks holds this meanwhile.
    pub fn tail(&self) -> Arc<tokio::sync::Mutex<Tail>> {
        self.tail.clone()
    }

    /// Whether a block is there, whole and durable, in a file. One that is damaged is to be written once more.
    fn is_there(&self, expected: &Expected, path: &Path) -> Result<bool, Refusal> {
        match self.verify(expected) {
            // Whoever wrote it may not have come to its last sync: what is proven must be durable.
            Ok(()) if mutants::is(Mutant::SettledUnsynced) => Ok(true),
            Ok(()) => self.settle(path).map_err(|e| disk_fault("sync block", &e)).map(|()| true),
            Err(refusal) if refusal.code == Code::BlockCorrupt => match self.holds_another(path, expected) {
                true => Err(exists(expected.block)),
                false => Ok(false),
            },
            Err(refusal) if refusal.code == Code::BlockNotFound => Ok(false),
            Err(refusal) => Err(refusal),
        }
    }

    /// Refuses blocks for which there is no room: what is left is for logs and states that share the file system, and for erasing, which
    /// takes some room before it gives any back.
    fn check_reserve(&self, bytes: usize) -> Result<(), Refusal> {
        let (total, available) = self.disk.space(&self.dir).map_err(|e| disk_fault("ask for space", &e))?;
        let reserve = self.reserve_bytes.max(self.options.room_to_erase(total));
        if available < reserve.saturating_add(bytes as u64) {
            let kept = if reserve == self.reserve_bytes { "logs and states" } else { "erasing" };
            let text = format!("service {} has no space: the rest is kept for {kept}", self.service);
            return Err(Refusal::new(Code::NoSpace, text));
        }
        Ok(())
    }

    /// Makes a block that is in place durable.
    fn settle(&self, path: &Path) -> io::Result<()> {
        self.disk.open(path, false)?.sync()?;
        let dir = path.parent().unwrap_or(&self.dir);
        self.disk.sync_dir(dir)?;
        self.disk.sync_dir(&self.dir)
    }

    /// Whether an undamaged header says that the file is of the same id and other data.
    fn holds_another(&self, path: &Path, expected: &Expected) -> bool {
        let mut bytes = vec![0; HEADER_BYTES as usize];
        let read = self.disk.open(path, false).and_then(|file| file.read_at(&mut bytes, 0));
        read.is_ok()
            && Header::decode(&bytes)
                .is_ok_and(|h| h.block == expected.block && (h.size, h.crc) != (expected.size, expected.crc))
    }

    /// Makes a directory for blocks, durably, before anybody relies on it.
    fn make_directory(&self, dir: &Path) -> io::Result<()> {
        let mut known = lock(&self.directories);
        // One that was there may have been emptied away by hand.
        if !known.contains(dir) || !self.disk.exists(dir) {
            self.disk.create_dir_all(dir)?;
            self.disk.sync_dir(&self.dir)?;
            known.insert(dir.to_owned());
        }
        // Whoever looked the disk through meanwhile may not have seen it.
        self.has_files.store(true, Ordering::Release);
        Ok(())
    }

    /// False when it must not get its name any more.
    fn write_file(
        &self,
        path: &Path,
        header: &[u8],
        table: &[u8],
        data: &[u8],
        at: u64,
        is_granted: &dyn Fn() -> bool,
    ) -> io::Result<bool> {
        let number = self.next_temporary.fetch_add(1, Ordering::Relaxed);
        let dir = path.parent().unwrap_or(&self.dir);
        self.make_directory(dir)?;
        let temporary_dir = self.dir.join("tmp");
        let temporary = temporary_dir.join(format!("{number:016x}"));
        let written = (|| {
            // The directory may have been emptied by hand.
            self.disk.create_dir_all(&temporary_dir)?;
            let file = self.disk.open(&temporary, true)?;
            if file.len()? > 0 {
                // Left behind on a disk that was away when such files were removed.
                file.set_len(0)?;
            }
            let mut head = header.to_vec();
            head.extend_from_slice(table);
            assert!(head.len() as u64 <= at, "header and table end before the data begin");
            head.resize(at as usize, 0);
            file.write_at(&head, 0)?;
            file.write_at(data, at)?;
            let is_named_first = mutants::is(Mutant::NamedBeforeSync);
            if !is_named_first {
                file.sync()?;
            }
            if !is_granted() {
                return Ok(false);
            }
            self.disk.rename(&temporary, path)?;
            if is_named_first {
                file.sync()?;
            }
            self.disk.sync_dir(dir)?;
            Ok(true)
        })();
        if !matches!(written, Ok(true)) && self.disk.exists(&temporary) {
            // The write has failed already; what stays behind is removed at the next start.
            let _ = self.disk.remove(&temporary);
        }
        written
    }

    /// Reads part of a block and verifies every page of it.
    pub fn read(&self, expected: &Expected, offset: u32, length: u32) -> Result<Bytes, Refusal> {
        let end = offset.checked_add(length).filter(|end| *end <= expected.size && length > 0);
        let Some(end) = end else {
            let text = format!("{length} bytes at {offset} of a block of {}", expected.size);
            return Err(Refusal::invalid(text));
        };
        self.check_usable()?;
        let pack = self.small(None)?;
        match pack.read(expected, offset, length).and_then(|read| match read {
            Some(bytes) => Ok(Some(bytes)),
            None => pack.check_read().map(|()| None),
        }) {
            Ok(Some(bytes)) => return Ok(bytes),
            Ok(None) => {}
            Err(fault) => return Err(self.pack_fault(&pack, fault, expected.block)),
        }
        let path = self.path(expected.block);
        let block = expected.block;
        let corrupt = |what: String| {
            Refusal::new(Code::BlockCorrupt, format!("block {block} on service {}: {what}", self.service))
        };
        let missing =
            || Refusal::new(Code::BlockNotFound, format!("block {block} is not on service {}", self.service));
        let file = match self.disk.open(&path, false) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(missing()),
            Err(e) => return Err(disk_fault("open block", &e)),
        };
        let exact = |offset: u64, length: u64| -> Result<Vec<u8>, Refusal> {
            let mut bytes = Vec::new();
            let read = file.read_onto(&mut bytes, length as usize, offset);
            let read = read.map_err(|e| disk_fault("read block", &e))?;
            if (read as u64) < length {
                return Err(corrupt(format!("the file ends at {}", offset + read as u64)));
            }
            Ok(bytes)
        };
        // What comes before the data has the length that it must have; anything else is of another block.
        let head = exact(0, data_offset(expected.size))?;
        let header = Header::decode(&head[..HEADER_BYTES as usize]).map_err(corrupt)?;
        let is_expected = header.cluster == self.cluster
            && header.service == self.service
            && header.block == block
            && (header.size, header.crc) == (expected.size, expected.crc);
        if !is_expected {
            return Err(corrupt("the file is of another block".into()));
        }
        let table = &head[HEADER_BYTES as usize..][..pages(header.size) as usize * 4];
        if crc32fast::hash(table) != header.table_crc {
            return Err(corrupt("the page table's checksum does not match".into()));
        }
        let first = offset / PAGE_BYTES;
        let last = end.div_ceil(PAGE_BYTES);
        let from = u64::from(first * PAGE_BYTES);
        let data = exact(data_offset(header.size) + from, u64::from(last - first) * u64::from(PAGE_BYTES))?;
        for (i, page) in data.chunks(PAGE_BYTES as usize).enumerate() {
            let at = (first as usize + i) * 4;
            let is_good = table[at..at + 4] == crc32fast::hash(page).to_le_bytes();
            if !is_good && !mutants::is(Mutant::CrcUnchecked) {
                return Err(corrupt(format!("page {} does not match its checksum", first as usize + i)));
            }
        }
        let start = (u64::from(offset) - from) as usize;
        Ok(Bytes::from(data).slice(start..start + length as usize))
    }

    /// Reads a whole block, piece by piece, and checks its own CRC too.
    pub fn verify(&self, expected: &Expected) -> Result<(), Refusal> {
        let mut hasher = crc32fast::Hasher::new();
        let mut at = 0;
        // One without bytes is refused by the first read.
        while at < expected.size || at == 0 {
            let piece = self.read(expected, at, VERIFY_BYTES.min(expected.size - at))?;
            hasher.update(&piece);
            at += piece.len() as u32;
        }
        if hasher.finalize() != expected.crc {
            return Err(Refusal::new(
                Code::BlockCorrupt,
                format!("block {} does not have its CRC", expected.block),
            ));
        }
        Ok(())
    }

    /// Removes a block durably; one that is not there is fine.
    pub fn erase(&self, block: BlockId) -> Result<(), Refusal> {
        self.change(&mut self.tail.blocking_lock(), &[Change::Erase(block)]).pop().unwrap_or(Ok(()))
    }

    /// Ids of all blocks, in order, for comparison with the metadata.
    pub fn list(&self) -> io::Result<Vec<BlockId>> {
        let mut blocks = Vec::new();
        for dir in self.disk.list(&self.dir)?.iter().filter(|d| d.len() == 2) {
            let names = self.disk.list(&self.dir.join(dir))?;
            blocks.extend(names.iter().filter_map(|n| u64::from_str_radix(n, 16).ok()).map(BlockId));
        }
        let refused = |refusal: Refusal| io::Error::other(refusal.detail);
        let pack = self.small(None).map_err(refused)?;
        let visited = pack.visit(&mut |block| blocks.push(block));
        visited.map_err(|fault| refused(self.pack_fault(&pack, fault, BlockId(0))))?;
        blocks.sort_unstable();
        blocks.dedup();
        Ok(blocks)
    }

    /// Whether [`BlockStore::look_after`] may have something to do.
    pub fn is_due(&self) -> bool {
        lock(&self.pack).as_ref().is_some_and(|pack| pack.is_due())
    }

    /// Looks after small blocks beside everything else: writes changes to their index, or looks for a segment that is mostly dead. One at
    /// a time.
    pub fn look_after(&self) -> Result<Upkeep, Refusal> {
        self.check_usable()?;
        let pack = self.small(None)?;
        let done = match pack.merge() {
            Ok(Upkeep::Nothing) => pack.look(),
            done => done,
        };
        done.map_err(|fault| self.pack_fault(&pack, fault, BlockId(0)))
    }

    /// Moves some small blocks of a segment that is mostly dead, or removes it.
    pub fn move_some(&self, tail: &mut Tail) -> Result<Upkeep, Refusal> {
        self.check_usable()?;
        let pack = self.small(Some(tail))?;
        pack.compact(tail).map_err(|fault| self.pack_fault(&pack, fault, BlockId(0)))
    }

    /// The small blocks, looked through when that was not done yet: by who has the tail, or while nobody has it.
    fn small(&self, tail: Option<&mut Tail>) -> Result<Arc<Pack>, Refusal> {
        if let Some(pack) = &*lock(&self.pack) {
            return Ok(pack.clone());
        }
        let mut guard = None;
        let tail = match tail {
            Some(tail) => tail,
            None => {
                let text = "the disk is being looked through; try again";
                let free = self.tail.try_lock().map_err(|_| Refusal::new(Code::Unreachable, text))?;
                &mut **guard.insert(free)
            }
        };
        // Somebody else may have done it meanwhile.
        if let Some(pack) = &*lock(&self.pack) {
            return Ok(pack.clone());
        }
        let dir = self.dir.join(PACKED_DIR);
        let generation = self.generation.load(Ordering::Acquire);
        let opened = Pack::open(self.disk.clone(), dir, self.cluster, self.service, self.options);
        let (pack, new) = opened.map_err(|fault| fault.refusal(BlockId(0), self.service))?;
        let names = self.disk.list(&self.dir).map_err(|e| disk_fault("list blocks", &e))?;
        self.has_files.store(names.iter().any(|name| name.len() == 2), Ordering::Release);
        *tail = new;
        let pack = Arc::new(pack);
        let mut known = lock(&self.pack);
        if self.generation.load(Ordering::Acquire) != generation {
            return Err(Refusal::new(Code::Unreachable, "the disk was exchanged just now; try again"));
        }
        *known = Some(pack.clone());
        Ok(pack)
    }

    #[cfg(test)]
    pub(crate) fn small_for_tests(&self) -> Arc<Pack> {
        self.small(None).expect("opens")
    }

    fn has_files(&self) -> bool {
        self.has_files.load(Ordering::Acquire)
    }

    /// What is known of small blocks is of no use any more. `damaged` are those whose index is, if they are still the ones.
    fn retire(&self, damaged: Option<&Arc<Pack>>) {
        let mut known = lock(&self.pack);
        let is_other = |pack: &Arc<Pack>| damaged.is_some_and(|damaged| !Arc::ptr_eq(pack, damaged));
        if known.as_ref().is_some_and(is_other) {
            return;
        }
        self.has_files.store(true, Ordering::Release);
        self.generation.fetch_add(1, Ordering::AcqRel);
        if let Some(pack) = known.take() {
            pack.retire(damaged.is_some());
        }
    }

    fn pack_fault(&self, pack: &Arc<Pack>, fault: PackFault, block: BlockId) -> Refusal {
        if let PackFault::Index(what) = &fault {
            tracing::error!(service = %self.service, what, "where small blocks lie is found out anew");
            self.retire(Some(pack));
        }
        fault.refusal(block, self.service)
    }

    /// Makes changes of small blocks, with one write and one sync for all of them; what became of each, in order.
    pub fn change(&self, tail: &mut Tail, changes: &[Change<'_>]) -> Vec<Result<(), Refusal>> {
        let ready = self.check_usable().and_then(|()| {
            let pack = self.small(Some(tail))?;
            pack.settle(tail).map_err(|fault| self.pack_fault(&pack, fault, BlockId(0)))?;
            Ok(pack)
        });
        let pack = match ready {
            Ok(pack) => pack,
            Err(refusal) => return changes.iter().map(|_| Err(refusal.clone())).collect(),
        };
        let mut prepared = Vec::new();
        let mut records = Vec::new();
        for change in changes {
            prepared.push(self.prepare(&pack, change).map(|mut change| {
                records.append(&mut change.records);
                change
            }));
        }
        if let Err(fault) = self.note_first(&records).and_then(|()| pack.append(tail, &records)) {
            let refusal = self.pack_fault(&pack, fault, BlockId(0));
            return prepared.into_iter().map(|change| change.and_then(|_| Err(refusal.clone()))).collect();
        }
        let gone = self.remove_files(prepared.iter().flatten().filter_map(|change| change.file.as_deref()));
        for change in prepared.iter().flatten() {
            pack.discard(&change.dead);
        }
        let usable = self.check_still_usable();
        let done = gone.and(usable);
        prepared.into_iter().map(|change| change.and_then(|_| done.clone())).collect()
    }

    /// What is to be appended for a change, and removed then.
    fn prepare(&self, pack: &Arc<Pack>, change: &Change<'_>) -> Result<Prepared, Refusal> {
        let fault = |fault, block| self.pack_fault(pack, fault, block);
        match change {
            Change::Erase(block) => {
                let dead = pack.places(*block).map_err(|e| fault(e, *block))?;
                let path = self.path(*block);
                // One that is nowhere, too: whoever removed its file may not have come to the sync, and what is proven erased must not
                // come back.
                let is_file = self.has_files() && (dead.is_empty() || self.disk.exists(&path));
                let file = is_file.then_some(path);
                let records = dead.iter().map(|at| Record::Bury(*block, *at)).collect();
                Ok(Prepared { records, dead, file })
            }
            Change::Write { expected, data, is_granted } => {
                check_write(expected, data)?;
                let block = expected.block;
                let path = self.path(block);
                let dead = pack.places(block).map_err(|e| fault(e, block))?;
                let is_file = self.has_files() && dead.is_empty() && self.disk.exists(&path);
                if let Some(at) = dead.first() {
                    match self.verify(expected) {
                        Ok(()) => return Ok(Prepared::default()),
                        Err(refusal) if refusal.code != Code::BlockCorrupt => return Err(refusal),
                        Err(_) if pack.holds_another(*at, expected) => return Err(exists(block)),
                        Err(_) => {}
                    }
                } else if is_file && self.is_there(expected, &path)? {
                    return Ok(Prepared::default());
                }
                self.check_reserve(data.len())?;
                if !is_granted() {
                    let text = "the write took longer than its grant";
                    return Err(Refusal::new(Code::CertificateExpired, text));
                }
                let mut records = vec![Record::put(*expected, data, dead.first().copied())];
                records.extend(dead.iter().skip(1).map(|at| Record::Bury(block, *at)));
                Ok(Prepared { records, dead, file: is_file.then_some(path) })
            }
        }
    }

    /// Before the first record of this process.
    fn note_first(&self, records: &[Record]) -> Result<(), PackFault> {
        if !records.is_empty() && !self.is_noted.load(Ordering::Acquire) {
            (self.before_first)().map_err(PackFault::Disk)?;
            self.is_noted.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Removes files of blocks durably; those that are not there are fine.
    fn remove_files<'a>(&self, paths: impl Iterator<Item = &'a Path>) -> Result<(), Refusal> {
        // Those that could not be synced before come first: what is proven then may rest on them.
        let mut dirs = std::mem::take(&mut *lock(&self.owed));
        for path in paths {
            match self.disk.remove(path) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::NotFound && mutants::is(Mutant::GoneUnsynced) => {
                    continue;
                }
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => {
                    lock(&self.owed).append(&mut dirs);
                    return Err(disk_fault("erase block", &e));
                }
            }
            dirs.insert(path.parent().unwrap_or(&self.dir).to_owned());
        }
        while let Some(dir) = dirs.first().cloned() {
            match self.disk.sync_dir(&dir) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    lock(&self.owed).append(&mut dirs);
                    return Err(disk_fault("erase block", &e));
                }
                _ => dirs.remove(&dir),
            };
        }
        Ok(())
    }
}

/// Refuses what cannot be written.
fn check_write(expected: &Expected, data: &[u8]) -> Result<(), Refusal> {
    if data.len() != expected.size as usize {
        let text = format!("{} bytes for a block of {}", data.len(), expected.size);
        return Err(Refusal::invalid(text));
    }
    if expected.size == 0 || expected.size > BLOCK_BYTES_MAX || !expected.size.is_multiple_of(PAGE_BYTES) {
        let text = format!(
            "a block of {} bytes; multiples of {PAGE_BYTES} up to {BLOCK_BYTES_MAX} are allowed",
            expected.size
        );
        return Err(Refusal::invalid(text));
    }
    if crc32fast::hash(data) != expected.crc && !mutants::is(Mutant::CrcNotBound) {
        return Err(Refusal::new(Code::CrcMismatch, "the data do not have the CRC that was granted"));
    }
    Ok(())
}

fn exists(block: BlockId) -> Refusal {
    Refusal::new(Code::Exists, format!("block {block} exists with other data"))
}

/// A block file or segment in a directory that another service or cluster wrote; the first of each directory is looked at.
pub fn foreign_block(
    disk: &dyn Disk,
    dir: &Path,
    cluster: u64,
    service: ServiceId,
) -> io::Result<Option<String>> {
    for name in disk.list(dir)?.iter().filter(|name| name.len() == 2) {
        let dir = dir.join(name);
        let Some(block) = disk.list(&dir)?.into_iter().next() else { continue };
        let path = dir.join(block);
        let mut bytes = vec![0; HEADER_BYTES as usize];
        let read = disk.open(&path, false)?.read_at(&mut bytes, 0)?;
        if Header::decode(&bytes[..read]).is_ok_and(|h| (h.cluster, h.service) != (cluster, service)) {
            return Ok(Some(path.display().to_string()));
        }
    }
    let packed = dir.join(PACKED_DIR);
    for name in disk.list(&packed)?.iter().filter(|name| number_of(name, ".pack").is_some()).take(1) {
        let path = packed.join(name);
        let mut bytes = vec![0; HEADER_BYTES as usize];
        let read = disk.open(&path, false)?.read_at(&mut bytes, 0)?;
        if SegmentHeader::decode(&bytes[..read]).is_ok_and(|h| (h.cluster, h.service) != (cluster, service)) {
            return Ok(Some(path.display().to_string()));
        }
    }
    Ok(None)
}
