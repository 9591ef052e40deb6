//! One disk's blocks: files in 256 directories, written under a temporary name first.

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
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

use crate::format::{HEADER_BYTES, Header, data_offset, page_table, pages};
use crate::label::{self, Label};

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
}

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
        BlockStore::open(disk, dir, cluster, service)
    }

    /// Opens a disk's directory and removes what writes that never finished left behind. One without its label opens, too,
    /// and refuses everything until the right disk is there.
    pub fn open(
        disk: Arc<dyn Disk>,
        dir: PathBuf,
        cluster: u64,
        service: ServiceId,
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
        };
        if store.look().is_some() {
            return Ok(store);
        }
        let temporary = store.dir.join("tmp");
        store.disk.create_dir_all(&temporary)?;
        for name in store.disk.list(&temporary)? {
            store.disk.remove(&temporary.join(name))?;
        }
        if mutants::is(Mutant::BlockErasedInUse) {
            for block in store.list()?.into_iter().take(3) {
                store.disk.remove(&store.path(block))?;
            }
        }
        Ok(store)
    }

    /// Which service this is.
    pub fn service(&self) -> ServiceId {
        self.service
    }

    /// Total and available bytes of the disk; none of one that is not used.
    pub fn space(&self) -> io::Result<(u64, u64)> {
        if self.look().is_some() {
            return Ok((0, 0));
        }
        let (total, available) = self.disk.space(&self.dir)?;
        Ok((total, available.saturating_sub(self.reserve_bytes)))
    }

    /// The same, but blocks leave so many bytes of the file system free: for logs and states that share it.
    pub fn with_reserve(self, reserve_bytes: u64) -> BlockStore {
        BlockStore { reserve_bytes, ..self }
    }

    /// Looks at the disk's label anew. Why the disk is not used; `None` while all is well.
    pub fn look(&self) -> Option<String> {
        let found = label::check(&*self.disk, &self.dir, self.cluster, self.service).err();
        let found = found.filter(|_| !mutants::is(Mutant::EmptyDiskUsed));
        let mut unusable = self.unusable.lock().unwrap_or_else(|e| e.into_inner());
        if *unusable != found {
            match &found {
                Some(reason) => tracing::error!("{reason}"),
                None => tracing::warn!("disk {} is used again", self.dir.display()),
            }
            // What was known of its directories was of another file system.
            self.directories.lock().unwrap_or_else(|e| e.into_inner()).clear();
        }
        (*unusable).clone_from(&found);
        found
    }

    /// Why the disk is not used, as it was when it was looked at last.
    pub fn unusable(&self) -> Option<String> {
        self.unusable.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Refuses work on a disk that is not used, also on one that has vanished since it was looked at last.
    fn check_usable(&self) -> Result<(), Refusal> {
        let known = self.unusable.lock().unwrap_or_else(|e| e.into_inner()).clone();
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

    /// Writes a block durably. The same block again is fine; another one under its id is refused.
    ///
    /// `is_granted` is asked once more before the block gets its name: a write that took so long that its grant has
    /// ended may come after an erase.
    pub fn write(
        &self,
        expected: &Expected,
        data: &[u8],
        is_granted: &dyn Fn() -> bool,
    ) -> Result<(), Refusal> {
        if data.len() != expected.size as usize {
            let text = format!("{} bytes for a block of {}", data.len(), expected.size);
            return Err(Refusal::invalid(text));
        }
        if expected.size == 0 || expected.size > BLOCK_BYTES_MAX || !expected.size.is_multiple_of(PAGE_BYTES)
        {
            let text = format!(
                "a block of {} bytes; multiples of {PAGE_BYTES} up to {BLOCK_BYTES_MAX} are allowed",
                expected.size
            );
            return Err(Refusal::invalid(text));
        }
        if crc32fast::hash(data) != expected.crc && !mutants::is(Mutant::CrcNotBound) {
            return Err(Refusal::new(Code::CrcMismatch, "the data do not have the CRC that was granted"));
        }
        self.check_usable()?;
        let path = self.path(expected.block);
        if self.disk.exists(&path) {
            match self.verify(expected) {
                // Whoever wrote it may not have come to its last sync: what is proven must be durable.
                Ok(()) if mutants::is(Mutant::SettledUnsynced) => return Ok(()),
                Ok(()) => {
                    self.settle(&path).map_err(|e| disk_fault("sync block", &e))?;
                    return self.check_still_usable();
                }
                Err(refusal) if refusal.code == Code::BlockCorrupt => {
                    if self.holds_another(&path, expected) {
                        let text = format!("block {} exists with other data", expected.block);
                        return Err(Refusal::new(Code::Exists, text));
                    }
                }
                Err(refusal) if refusal.code == Code::BlockNotFound => {}
                Err(refusal) => return Err(refusal),
            }
        }
        if self.reserve_bytes > 0 {
            let space = self.disk.space(&self.dir).map_err(|e| disk_fault("ask for space", &e))?;
            if space.1 < self.reserve_bytes.saturating_add(data.len() as u64) {
                let text =
                    format!("service {} has no space: the rest is kept for logs and states", self.service);
                return Err(Refusal::new(Code::NoSpace, text));
            }
        }
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
        let mut known = self.directories.lock().unwrap_or_else(|e| e.into_inner());
        // One that was there may have been emptied away by hand.
        if !known.contains(dir) || !self.disk.exists(dir) {
            self.disk.create_dir_all(dir)?;
            self.disk.sync_dir(&self.dir)?;
            known.insert(dir.to_owned());
        }
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
        // A block that cannot be seen is not gone.
        self.check_usable()?;
        let path = self.path(block);
        match self.disk.remove(&path) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound && mutants::is(Mutant::GoneUnsynced) => {
                return Ok(());
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(disk_fault("erase block", &e)),
        }
        // Also for one that is not there: whoever removed it may not have come to the sync, and what is proven erased
        // must not come back.
        match self.disk.sync_dir(path.parent().unwrap_or(&self.dir)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(disk_fault("erase block", &e)),
            _ => self.check_still_usable(),
        }
    }

    /// Ids of all blocks, for comparison with the metadata.
    pub fn list(&self) -> io::Result<Vec<BlockId>> {
        let mut blocks = Vec::new();
        for dir in self.disk.list(&self.dir)?.iter().filter(|d| d.len() == 2) {
            let names = self.disk.list(&self.dir.join(dir))?;
            blocks.extend(names.iter().filter_map(|n| u64::from_str_radix(n, 16).ok()).map(BlockId));
        }
        Ok(blocks)
    }
}

/// A block file in a directory that another service or cluster wrote; the first block of each directory is looked at.
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
    Ok(None)
}
