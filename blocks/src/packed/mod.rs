//! Packed blocks: the small blocks of a disk, appended to segment files.
//!
//! Whoever changes something has the [`Tail`]: records are appended to one segment by one write and one sync for all that wait, and only
//! what was synced is known to readers. What is erased, written again or moved has a record that says that the older one is dead,
//! as long as there is the segment in which that one lies; so segments say all, whatever is removed in which order. What is dead is given
//! back to the file system page by page, and segments of which less than half is needed are moved to the end.
//!
//! Invariants: a record is durable before it is known; a copy is durable before the record that it replaces is dead, and that before
//! its segment is removed; damage hides the records that it lies in, and no others.

mod compact;
pub mod format;
mod index;
mod open;
pub use compact::Upkeep;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use clutch_proto::{
    BlockId, Refusal, ServiceId,
    limits::PAGE_BYTES,
    mutants::{self, Mutant},
    types::Code,
};
use clutch_runtime::{Disk, File};
use parking_lot::Mutex;

use self::{
    compact::Moving,
    format::{
        Entry, Location, RECORD_HEADER_BYTES, RecordHeader, SEGMENT_HEADER_BYTES, SegmentHeader,
        SegmentIndex, index_name, record_length, segment_name,
    },
    index::{Delta, Index, IndexFault, Layers, Usage},
};
use crate::{format::pages, store::Expected};

/// The directory of packed blocks on a disk.
pub const PACKED_DIR: &str = "packed";
/// A record of up to so many bytes is read at once.
const READ_AT_ONCE: u32 = 64 << 10;
/// How often a block is looked up that is being moved while it is read.
const LOOK_UPS: usize = 8;

/// How small blocks are kept.
#[derive(Clone, Copy, Debug)]
pub struct PackOptions {
    /// Blocks of fewer bytes are packed.
    pub below: u32,
    /// A segment of so many bytes is closed.
    pub segment_bytes: u32,
    /// So many changes are kept in memory before they are written to the index.
    pub merge_at: usize,
}

impl PackOptions {
    /// Bytes that blocks leave free of a disk of so many, so that they can be erased when it is full: that takes some before it gives any
    /// back.
    pub fn room_to_erase(&self, total: u64) -> u64 {
        (2 * u64::from(self.segment_bytes)).min(total / 20)
    }
}

impl Default for PackOptions {
    fn default() -> PackOptions {
        PackOptions { below: 256 << 10, segment_bytes: 64 << 20, merge_at: 256 << 10 }
    }
}

/// A segment that there is.
#[derive(Clone, Debug)]
struct Segment {
    header: SegmentHeader,
    usage: Usage,
    is_closed: bool,
    /// How many segments had been removed, and how much of this one was needed, when it was looked through and was to stay.
    looked_at: Option<(u64, u32)>,
    /// How much of it was needed when it could not be moved.
    stays_at: Option<u32>,
}

impl Segment {
    fn new(header: SegmentHeader, usage: Usage) -> Segment {
        Segment { header, usage, is_closed: false, looked_at: None, stays_at: None }
    }
}

#[derive(Default)]
struct Known {
    /// Changes since the last ones that were, or are being, written to the index.
    active: Delta,
    layers: Layers,
    /// The last segment whose changes are being written.
    frozen_to: u32,
    segments: BTreeMap<u32, Segment>,
    /// Segments that were removed, which a crash may bring back.
    may_come_back: BTreeSet<u32>,
    removals: u64,
    /// Some of a segment could not be read when it was looked through.
    is_unread: bool,
    /// Since all were looked at, less than half of some closed segment has come to be needed.
    has_sparse: bool,
}

/// Where records are appended, and whoever has it is the only one who changes anything.
#[derive(Default)]
pub struct Tail {
    open: Option<Open>,
    /// What lies behind the end of the open segment, or was written last, is not known.
    is_doubtful: bool,
    /// Segments that were never closed and could not be made durable yet, and their ends.
    unproven: Vec<(u32, u32)>,
}

/// The segment that is being written.
struct Open {
    header: SegmentHeader,
    end: u32,
    entries: Vec<Entry>,
}

/// What is appended.
pub(crate) enum Record {
    /// A block.
    Put {
        /// Which.
        expected: Expected,
        /// Its page table and what is stored of its data.
        body: Vec<u8>,
        /// How much of its data is stored.
        stored: u32,
        /// The record in whose place it is.
        replaces: Option<Location>,
    },
    /// A record of a block is dead.
    Bury(BlockId, Location),
}

impl Record {
    /// The record of a block.
    pub(crate) fn put(expected: Expected, data: &[u8], replaces: Option<Location>) -> Record {
        // What is behind the last byte that is not zero need not be stored.
        let stored = data.iter().rposition(|byte| *byte != 0).map_or(0, |last| last as u32 + 1);
        let mut body = Vec::with_capacity(record_length(stored) as usize);
        for page in data.chunks(PAGE_BYTES as usize).take(pages(stored) as usize) {
            body.extend_from_slice(&crc32fast::hash(page).to_le_bytes());
        }
        body.extend_from_slice(&data[..stored as usize]);
        Record::Put { expected, body, stored, replaces }
    }

    fn header(&self) -> RecordHeader {
        match self {
            Record::Put { expected, body, stored, replaces } => RecordHeader::Block {
                block: expected.block,
                size: expected.size,
                crc: expected.crc,
                time: expected.time,
                stored: *stored,
                table_crc: crc32fast::hash(&body[..4 * pages(*stored) as usize]),
                replaces: *replaces,
            },
            Record::Bury(block, at) => RecordHeader::Dead { block: *block, at: *at },
        }
    }

    fn length(&self) -> u32 {
        match self {
            Record::Put { stored, .. } => record_length(*stored),
            Record::Bury(..) => RECORD_HEADER_BYTES,
        }
    }
}

/// The packed blocks of one disk.
pub struct Pack {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    cluster: u64,
    service: ServiceId,
    options: PackOptions,
    /// Never held while the disk is waited for.
    known: Mutex<Known>,
    /// The segment that is being moved.
    moving: Mutex<Option<Moving>>,
    /// The disk has been away: what is known here is not of it any more.
    is_retired: AtomicBool,
}

/// Why something cannot be read or found.
#[derive(Debug)]
pub(crate) enum PackFault {
    /// The record is damaged.
    Corrupt(String),
    /// The index is damaged: it must be made anew.
    Index(String),
    /// The disk fails.
    Disk(io::Error),
}

impl From<io::Error> for PackFault {
    fn from(error: io::Error) -> PackFault {
        PackFault::Disk(error)
    }
}

impl From<IndexFault> for PackFault {
    fn from(fault: IndexFault) -> PackFault {
        match fault {
            IndexFault::Damaged(what) => PackFault::Index(what),
            IndexFault::Disk(error) => PackFault::Disk(error),
        }
    }
}

impl PackFault {
    /// What a request is refused with.
    pub(crate) fn refusal(self, block: BlockId, service: ServiceId) -> Refusal {
        match self {
            PackFault::Corrupt(what) => {
                Refusal::new(Code::BlockCorrupt, format!("block {block} on service {service}: {what}"))
            }
            PackFault::Index(what) => Refusal::new(
                Code::DiskFault,
                format!("the index of the blocks of service {service} is damaged ({what}) and is made anew"),
            ),
            PackFault::Disk(error) => {
                let is_full = error.kind() == io::ErrorKind::StorageFull;
                let code = if is_full { Code::NoSpace } else { Code::DiskFault };
                Refusal::new(code, format!("packed blocks: {error}"))
            }
        }
    }
}

impl Pack {
    /// From now on its index is not written. `with_index` removes that, so that it is made anew from the segments.
    pub(crate) fn retire(&self, with_index: bool) {
        self.is_retired.store(true, Ordering::Release);
        // One that cannot be removed is found damaged again.
        if with_index && let Err(error) = index::remove(&*self.disk, &self.dir) {
            tracing::warn!(%error, "cannot remove a damaged index of blocks");
        }
    }

    fn segment_path(&self, number: u32) -> PathBuf {
        self.dir.join(segment_name(number))
    }

    fn index_path(&self, number: u32) -> PathBuf {
        self.dir.join(index_name(number))
    }

    /// Where a block lies; `None` when it is not here.
    pub(crate) fn locate(&self, block: BlockId) -> Result<Option<Location>, PackFault> {
        let mut before = None;
        loop {
            let (layers, change) = self.what_is_known(block);
            match layers.get(block, change.as_ref())? {
                Some(at) if self.has(at.segment) => return Ok(Some(at)),
                // It may have been moved meanwhile; or nothing says that it is gone, since its segment is.
                Some(at) if before != Some(at) => before = Some(at),
                Some(_) | None => return Ok(None),
            }
        }
    }

    fn what_is_known(&self, block: BlockId) -> (Layers, Option<index::Change>) {
        let known = self.known.lock();
        (known.layers.clone(), known.active.get(&block).cloned())
    }

    /// Refuses to say what is not there, and to change anything, where some of a segment could not be read: it is to be looked through
    /// again.
    pub(crate) fn check_read(&self) -> Result<(), PackFault> {
        match self.known.lock().is_unread {
            true => Err(PackFault::Index("a segment of blocks could not be read whole".into())),
            false => Ok(()),
        }
    }

    /// Whether there is a segment. An index may name one that is gone: what of it was needed was moved, and nothing says of the rest
    /// that it is dead.
    fn has(&self, number: u32) -> bool {
        self.known.lock().segments.contains_key(&number)
    }

    /// All places where a record of a block would be found by somebody: more than one after a crash while it was moved. Changes nothing
    /// only for who has the tail.
    pub(crate) fn places(&self, block: BlockId) -> Result<Vec<Location>, PackFault> {
        let (layers, change) = self.what_is_known(block);
        let mut places = layers.places(block, change.as_ref())?;
        places.retain(|at| self.has(at.segment));
        Ok(places)
    }

    /// Reads part of a block and verifies every page of it; `None` when it is not here.
    pub(crate) fn read(
        &self,
        expected: &Expected,
        offset: u32,
        length: u32,
    ) -> Result<Option<Bytes>, PackFault> {
        let Some(mut at) = self.locate(expected.block)? else { return Ok(None) };
        let mut read = self.read_at(at, expected, offset, length);
        for _ in 0..LOOK_UPS {
            let may_be_gone = match &read {
                Err(PackFault::Disk(error)) => error.kind() == io::ErrorKind::NotFound,
                Err(PackFault::Corrupt(_)) => true,
                Ok(_) | Err(PackFault::Index(_)) => false,
            };
            if !may_be_gone {
                return read.map(Some);
            }
            // It was moved, and its segment removed; or it was erased.
            match self.locate(expected.block)? {
                None => return Ok(None),
                Some(there) if there == at => break,
                Some(there) => at = there,
            }
            read = self.read_at(at, expected, offset, length);
        }
        match read {
            Err(PackFault::Disk(error)) if error.kind() == io::ErrorKind::NotFound => {
                Err(PackFault::Corrupt(format!("its segment {} is missing", segment_name(at.segment))))
            }
            read => read.map(Some),
        }
    }

    fn salted(&self, number: u32) -> Option<SegmentHeader> {
        self.known.lock().segments.get(&number).map(|segment| segment.header)
    }

    /// The header of a record, and its first bytes.
    fn head(&self, file: &dyn File, at: Location) -> Result<(RecordHeader, Vec<u8>), PackFault> {
        let segment = self.salted(at.segment).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        let wanted = match at.length <= READ_AT_ONCE {
            true => at.length,
            // No more than its header and page table.
            false => RECORD_HEADER_BYTES + 4 * pages(at.length) as u32,
        };
        let mut bytes = Vec::new();
        file.read_onto(&mut bytes, wanted as usize, u64::from(at.offset))?;
        let header = RecordHeader::decode(&bytes, &segment, at.offset).map_err(PackFault::Corrupt)?;
        if header.length() != at.length {
            return Err(PackFault::Corrupt("its record has another length than its index says".into()));
        }
        Ok((header, bytes))
    }

    fn read_at(
        &self,
        at: Location,
        expected: &Expected,
        offset: u32,
        length: u32,
    ) -> Result<Bytes, PackFault> {
        let file = self.disk.open(&self.segment_path(at.segment), false)?;
        let (header, head) = self.head(&*file, at)?;
        let RecordHeader::Block { block, size, crc, stored, table_crc, .. } = header else {
            return Err(PackFault::Corrupt("its record is of something else".into()));
        };
        if (block, size, crc) != (expected.block, expected.size, expected.crc) {
            return Err(PackFault::Corrupt("its record is of another block".into()));
        }
        let data_at = RECORD_HEADER_BYTES as usize + 4 * pages(stored) as usize;
        let table = head.get(RECORD_HEADER_BYTES as usize..data_at);
        let table = table.filter(|table| crc32fast::hash(table) == table_crc);
        let table =
            table.ok_or_else(|| PackFault::Corrupt("the page table's checksum does not match".into()))?;
        let (first, last) = (offset / PAGE_BYTES, (offset + length).div_ceil(PAGE_BYTES));
        let (from, until) = (first * PAGE_BYTES, (last * PAGE_BYTES).min(stored));
        let mut data = Vec::with_capacity(((last - first) * PAGE_BYTES) as usize);
        if from < until {
            let wanted = (until - from) as usize;
            match head.get(data_at + from as usize..data_at + until as usize) {
                Some(bytes) => data.extend_from_slice(bytes),
                None => {
                    let begin = u64::from(at.offset) + data_at as u64 + u64::from(from);
                    file.read_onto(&mut data, wanted, begin)?;
                }
            }
            if data.len() < wanted {
                return Err(PackFault::Corrupt("its segment ends before it does".into()));
            }
        }
        data.resize(((last - first) * PAGE_BYTES) as usize, 0);
        for (number, page) in (first..pages(stored) as u32).zip(data.chunks(PAGE_BYTES as usize)) {
            let entry = &table[number as usize * 4..][..4];
            if entry != crc32fast::hash(page).to_le_bytes() && !mutants::is(Mutant::CrcUnchecked) {
                return Err(PackFault::Corrupt(format!("page {number} does not match its checksum")));
            }
        }
        let start = (offset - from) as usize;
        Ok(Bytes::from(data).slice(start..start + length as usize))
    }

    /// Whether the undamaged record of a block has other data than these.
    pub(crate) fn holds_another(&self, at: Location, expected: &Expected) -> bool {
        let Ok(file) = self.disk.open(&self.segment_path(at.segment), false) else { return false };
        let head = self.head(&*file, at).map(|(header, _)| header);
        matches!(head, Ok(RecordHeader::Block { block, size, crc, .. })
            if block == expected.block && (size, crc) != (expected.size, expected.crc))
    }

    /// Appends records, durably: known to readers when it returns, in this order.
    ///
    /// # Errors
    /// The disk's: nothing of it is known then. What is on the disk is found out before anything more is appended.
    pub(crate) fn append(&self, tail: &mut Tail, records: &[Record]) -> Result<(), PackFault> {
        if records.is_empty() {
            return Ok(());
        }
        self.settle(tail)?;
        let open = self.ready(tail)?;
        let mut bytes = Vec::with_capacity(records.iter().map(|record| record.length() as usize).sum());
        let mut entries = Vec::with_capacity(records.len());
        for record in records {
            let (offset, header) = (open.end + bytes.len() as u32, record.header());
            bytes.extend_from_slice(&header.encode(&open.header, offset));
            let (block, is_block, dead) = match record {
                Record::Put { expected, body, replaces, .. } => {
                    bytes.extend_from_slice(body);
                    (expected.block, true, *replaces)
                }
                Record::Bury(block, at) => (*block, false, Some(*at)),
            };
            bytes.resize((offset - open.end + record.length()) as usize, 0);
            entries.push(Entry { block, offset, length: record.length(), is_block, dead });
        }
        let (number, end) = (open.header.number, open.end);
        let file = self.disk.open(&self.segment_path(number), false)?;
        if file.len()? != u64::from(end) {
            tail.is_doubtful = true;
            let text =
                format!("{} does not end where it ended: the disk was exchanged", segment_name(number));
            return Err(PackFault::Index(text));
        }
        if let Err(error) = file.write_at(&bytes, u64::from(end)) {
            // What was written of it must not be found by a later start.
            let cut = file.set_len(u64::from(end)).and_then(|()| file.sync());
            tail.is_doubtful = cut.is_err();
            return Err(error.into());
        }
        if !mutants::is(Mutant::PackedUnsynced) {
            file.sync().inspect_err(|_| tail.is_doubtful = true)?;
        }
        let Some(open) = &mut tail.open else { return Ok(()) };
        open.end += bytes.len() as u32;
        let mut known = self.known.lock();
        for entry in &entries {
            known.follow(number, entry);
        }
        if let Some(segment) = known.segments.get_mut(&number) {
            segment.usage.bytes = open.end;
        }
        open.entries.append(&mut entries);
        Ok(())
    }

    /// The segment to append to.
    fn ready<'a>(&self, tail: &'a mut Tail) -> Result<&'a Open, PackFault> {
        // Many small records, too: what is in memory is bounded by their number.
        let is_full = |open: &Open| {
            open.end >= self.options.segment_bytes || open.entries.len() >= self.options.merge_at
        };
        if tail.open.as_ref().is_some_and(is_full) {
            self.close(tail)?;
        }
        let open = match tail.open.take() {
            Some(open) => open,
            None => self.begin()?,
        };
        Ok(tail.open.insert(open))
    }

    /// After a write or a sync that failed: the open segment ends where it ended before that, and is closed. Before that nothing is
    /// proven erased: what failed might be found by a later start.
    pub(crate) fn settle(&self, tail: &mut Tail) -> Result<(), PackFault> {
        self.check_read()?;
        if mutants::is(Mutant::ErasedInDoubt) && tail.unproven.is_empty() {
            return Ok(());
        }
        while let Some((number, end)) = tail.unproven.last().copied() {
            let file = self.disk.open(&self.segment_path(number), false)?;
            self.make_durable(&*file, end)?;
            tail.unproven.pop();
        }
        if !tail.is_doubtful {
            return Ok(());
        }
        if let Some(open) = &tail.open {
            let file = self.disk.open(&self.segment_path(open.header.number), false)?;
            if file.len()? < u64::from(open.end) {
                return Err(io::Error::other("the disk was exchanged").into());
            }
            file.set_len(u64::from(open.end))?;
            file.sync()?;
            tail.is_doubtful = false;
            self.close(tail)?;
        }
        tail.is_doubtful = false;
        Ok(())
    }

    /// Closes the open segment: says durably what it has.
    fn close(&self, tail: &mut Tail) -> io::Result<()> {
        let Some(open) = &mut tail.open else { return Ok(()) };
        let entries = std::mem::take(&mut open.entries);
        let (number, salt) = (open.header.number, open.header.salt);
        let index = SegmentIndex { number, bytes: open.end, salt, entries };
        if let Err(error) = self.disk.replace(&self.index_path(number), &index.encode()) {
            open.entries = index.entries;
            return Err(error);
        }
        tail.open = None;
        let mut known = self.known.lock();
        if let Some(segment) = known.segments.get_mut(&number) {
            segment.is_closed = true;
        }
        known.has_sparse = true;
        if known.active.len() >= self.options.merge_at && known.layers.frozen.is_none() {
            known.layers.frozen = Some(Arc::new(std::mem::take(&mut known.active)));
            known.frozen_to = number;
        }
        Ok(())
    }

    /// Begins a segment, durably.
    fn begin(&self) -> Result<Open, PackFault> {
        let number = {
            let known = self.known.lock();
            let written = known.layers.index.as_ref().map_or(0, |index| index.mark);
            known.segments.last_key_value().map_or(0, |(last, _)| *last).max(written) + 1
        };
        self.disk.create_dir_all(&self.dir)?;
        let header = self.new_header(number)?;
        let path = self.segment_path(number);
        let file = self.disk.open(&path, true)?;
        if file.len()? > u64::from(SEGMENT_HEADER_BYTES) {
            let text = format!("{} is there already: the disk was exchanged", segment_name(number));
            return Err(PackFault::Index(text));
        }
        // A list that a crash left would speak of another segment.
        let left = self.index_path(number);
        if self.disk.exists(&left) {
            self.disk.remove(&left)?;
        }
        file.write_at(&header.encode(), 0)?;
        file.sync()?;
        self.disk.sync_dir(&self.dir)?;
        let segment = Segment::new(header, Usage { bytes: SEGMENT_HEADER_BYTES, live: 0 });
        let mut known = self.known.lock();
        known.segments.insert(number, segment);
        // The one before is the last one no more.
        known.has_sparse = true;
        Ok(Open { header, end: SEGMENT_HEADER_BYTES, entries: Vec::new() })
    }

    /// The header of a segment. Its salt is what whoever writes blocks cannot know: it depends on when the disk was labelled.
    fn new_header(&self, number: u32) -> io::Result<SegmentHeader> {
        let parent = self.dir.parent().unwrap_or(Path::new("."));
        let label = self.disk.read(&crate::label::path(parent))?;
        let mut hasher = blake3::Hasher::new();
        hasher.update(&label).update(&number.to_le_bytes());
        let salt = u64::from_le_bytes(hasher.finalize().as_bytes()[..8].try_into().expect("eight bytes"));
        Ok(SegmentHeader { cluster: self.cluster, service: self.service, number, salt })
    }

    /// Gives the pages that lie whole in dead records back to the file system. What fails is tried no more: the room comes back when
    /// the segment is moved.
    pub(crate) fn discard(&self, places: &[Location]) {
        for at in places {
            let page = u64::from(PAGE_BYTES);
            // Its header stays: it says where the next record begins.
            let begin = u64::from(at.offset + RECORD_HEADER_BYTES).next_multiple_of(page);
            let end = u64::from(at.offset + at.length) / page * page;
            if begin < end
                && let Ok(file) = self.disk.open(&self.segment_path(at.segment), false)
                && self.says_nothing_more(&*file, *at)
            {
                // See above.
                let _ = file.discard(begin, end - begin);
            }
        }
    }

    /// Whether a dead record is not needed to say that another one is dead: with a hole in it nobody would believe it.
    fn says_nothing_more(&self, file: &dyn File, at: Location) -> bool {
        let Ok((RecordHeader::Block { replaces, .. }, _)) = self.head(file, at) else { return false };
        replaces.is_none_or(|at| !self.known.lock().can_be_found(at)) || mutants::is(Mutant::HoleInDeath)
    }

    /// Passes the ids of all packed blocks, in order.
    pub(crate) fn visit(&self, each: &mut dyn FnMut(BlockId)) -> Result<(), PackFault> {
        self.check_read()?;
        let (layers, mut delta) = {
            let known = self.known.lock();
            (known.layers.clone(), known.active.clone())
        };
        for (block, older) in layers.frozen.iter().flat_map(|frozen| frozen.iter()) {
            let change = delta.entry(*block).or_default();
            change.at = change.over(older.over(None));
            change.dead.extend_from_slice(&older.dead);
        }
        index::visit_merged(layers.index.as_deref(), &delta, &mut |block, at| {
            if self.has(at.segment) {
                each(block);
            }
            Ok(())
        })?;
        Ok(())
    }

    /// How many bytes the segments have.
    pub fn bytes(&self) -> u64 {
        self.known.lock().segments.values().map(|segment| u64::from(segment.usage.bytes)).sum()
    }
}

impl Known {
    /// Whether a start may find a record.
    fn can_be_found(&self, at: Location) -> bool {
        self.segments.contains_key(&at.segment) || self.may_come_back.contains(&at.segment)
    }

    /// Takes a record in.
    fn follow(&mut self, number: u32, entry: &Entry) {
        let Entry { block, offset, length, is_block, dead } = *entry;
        if is_block {
            index::put(&mut self.active, block, Location { segment: number, offset, length });
            if let Some(segment) = self.segments.get_mut(&number) {
                segment.usage.live += length;
            }
        }
        let Some(at) = dead else { return };
        let is_new = index::bury(&mut self.active, block, at);
        if let Some(segment) = self.segments.get_mut(&at.segment).filter(|_| is_new) {
            segment.usage.live = segment.usage.live.saturating_sub(at.length);
            self.has_sparse |= segment.is_closed && segment.usage.live < segment.usage.bytes / 2;
        }
    }
}
