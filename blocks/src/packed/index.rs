//! Where the packed blocks of a disk lie: a sorted file of all that closed segments had when it was written, and in memory what came
//! since. So what is in memory does not grow with the disk.
//!
//! `packed/index`, all numbers little-endian:
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | `CLUTPIX1` |
//! | 8 | 8 | cluster |
//! | 16 | 8 | service |
//! | 24 | 8 | number of blocks |
//! | 32 | 4 | the last segment whose records it has |
//! | 36 | 4 | number of pages |
//! | 40 | 4 | number of segments in its table |
//! | 44 | 4 | CRC-32 of the table of segments and the first blocks of the pages |
//! | 48 | 4 | CRC-32 of bytes 0..48 |
//! | 52 | 4044 | zero |
//! | 4096 | 4096 × pages | pages: CRC-32 of what follows (4), number of blocks (4), and of each, ordered: block (8), segment, offset, length |
//! | … | 12 × segments | segment, its bytes, and how many of them are of blocks that were there |
//! | … | 8 × pages | the first block of each page |

use std::{
    collections::BTreeMap,
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use clutch_proto::{BlockId, ServiceId};
use clutch_runtime::{Disk, File};

use super::format::Location;

const MAGIC: &[u8; 8] = b"CLUTPIX1";
const PAGE_BYTES: usize = 4096;
const PAGE_HEADER_BYTES: usize = 8;
const LINE_BYTES: usize = 20;
/// Blocks of one page.
const PAGE_BLOCKS: usize = (PAGE_BYTES - PAGE_HEADER_BYTES) / LINE_BYTES;
/// Pages that are read or written at a time when all are passed.
const PAGES_AT_A_TIME: usize = 64;
const FILE: &str = "index";

/// What came to be known of a block since an index was written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Change {
    /// It lies there.
    pub(super) at: Option<Location>,
    /// It lay there before, and nothing says yet that it is dead there.
    pub(super) older: Vec<Location>,
    /// It lies in none of these places any more.
    pub(super) dead: Vec<Location>,
}

impl Change {
    /// Where the block lies, if an older index says that it lies there.
    pub(super) fn over(&self, older: Option<Location>) -> Option<Location> {
        let known = self.at.or_else(|| self.older.last().copied());
        known.or_else(|| older.filter(|at| !self.dead.contains(at)))
    }
}

/// Changes since an index was written.
pub(super) type Delta = BTreeMap<BlockId, Change>;

/// Takes note of a record of a block.
pub(super) fn put(delta: &mut Delta, block: BlockId, at: Location) {
    let change = delta.entry(block).or_default();
    let older = change.at.replace(at);
    change.older.extend(older.filter(|older| *older != at));
}

/// Takes note that a record is dead; false when that was known.
pub(super) fn bury(delta: &mut Delta, block: BlockId, at: Location) -> bool {
    let change = delta.entry(block).or_default();
    if change.at == Some(at) {
        change.at = None;
    }
    change.older.retain(|older| *older != at);
    let is_new = !change.dead.contains(&at);
    if is_new {
        change.dead.push(at);
    }
    is_new
}

/// How full a segment is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Usage {
    /// Its bytes.
    pub(super) bytes: u32,
    /// About how many of them are needed.
    pub(super) live: u32,
}

/// What an index cannot do.
#[derive(Debug)]
pub(super) enum IndexFault {
    /// It is damaged, and is to be made anew from the segments.
    Damaged(String),
    /// The disk fails.
    Disk(io::Error),
}

impl From<io::Error> for IndexFault {
    fn from(error: io::Error) -> IndexFault {
        IndexFault::Disk(error)
    }
}

/// A written index.
pub(super) struct Index {
    file: Box<dyn File>,
    /// The last segment whose records it has.
    pub(super) mark: u32,
    /// The segments that there were.
    pub(super) segments: BTreeMap<u32, Usage>,
    /// The first block of each page.
    first: Vec<u64>,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn exact(file: &dyn File, offset: u64, length: usize) -> Result<Vec<u8>, IndexFault> {
    let mut bytes = Vec::new();
    // Where the disk cannot read it, it can be made anew elsewhere.
    let read = file.read_onto(&mut bytes, length, offset);
    let read = read.map_err(|error| IndexFault::Damaged(format!("it cannot be read: {error}")))?;
    if read < length {
        return Err(IndexFault::Damaged("it is cut short".into()));
    }
    Ok(bytes)
}

/// The blocks of a page.
fn lines(page: &[u8]) -> Result<impl Iterator<Item = (BlockId, Location)> + '_, IndexFault> {
    let count = u32_at(page, 4) as usize;
    if crc32fast::hash(&page[4..]) != u32_at(page, 0) || count == 0 || count > PAGE_BLOCKS {
        return Err(IndexFault::Damaged("a page does not match its checksum".into()));
    }
    Ok(page[PAGE_HEADER_BYTES..].chunks_exact(LINE_BYTES).take(count).map(|line| {
        let at = Location { segment: u32_at(line, 8), offset: u32_at(line, 12), length: u32_at(line, 16) };
        (BlockId(u64_at(line, 0)), at)
    }))
}

impl Index {
    /// Opens the index of a service; `None` where there is none that is whole.
    pub(super) fn open(
        disk: &dyn Disk,
        dir: &Path,
        cluster: u64,
        service: ServiceId,
    ) -> io::Result<Option<Index>> {
        let path = dir.join(FILE);
        if !disk.exists(&path) {
            return Ok(None);
        }
        let file = disk.open(&path, false)?;
        match Index::read(file, cluster, service) {
            Ok(index) => Ok(Some(index)),
            Err(IndexFault::Damaged(what)) => {
                tracing::warn!(index = %path.display(), what, "an index of blocks is made anew");
                Ok(None)
            }
            Err(IndexFault::Disk(error)) => Err(error),
        }
    }

    fn read(file: Box<dyn File>, cluster: u64, service: ServiceId) -> Result<Index, IndexFault> {
        let head = exact(&*file, 0, PAGE_BYTES)?;
        let is_whole = &head[..8] == MAGIC && crc32fast::hash(&head[..48]) == u32_at(&head, 48);
        if !is_whole || (u64_at(&head, 8), u64_at(&head, 16)) != (cluster, service.0) {
            return Err(IndexFault::Damaged("its header is not the one of this disk's".into()));
        }
        let (pages, segments) = (u32_at(&head, 36) as usize, u32_at(&head, 40) as usize);
        let tables = exact(&*file, ((pages + 1) * PAGE_BYTES) as u64, segments * 12 + pages * 8)?;
        if crc32fast::hash(&tables) != u32_at(&head, 44) {
            return Err(IndexFault::Damaged("its tables do not match their checksum".into()));
        }
        let (of_segments, of_pages) = tables.split_at(segments * 12);
        let usage = |line: &[u8]| (u32_at(line, 0), Usage { bytes: u32_at(line, 4), live: u32_at(line, 8) });
        Ok(Index {
            mark: u32_at(&head, 32),
            segments: of_segments.chunks_exact(12).map(usage).collect(),
            first: of_pages.chunks_exact(8).map(|line| u64_at(line, 0)).collect(),
            file,
        })
    }

    fn pages(&self, from: usize, count: usize) -> Result<Vec<u8>, IndexFault> {
        exact(&*self.file, ((from + 1) * PAGE_BYTES) as u64, count * PAGE_BYTES)
    }

    /// Where a block lay.
    pub(super) fn get(&self, block: BlockId) -> Result<Option<Location>, IndexFault> {
        let Some(page) = self.first.partition_point(|first| *first <= block.0).checked_sub(1) else {
            return Ok(None);
        };
        let page = self.pages(page, 1)?;
        let found = lines(&page)?.find(|(there, _)| *there == block);
        Ok(found.map(|(_, at)| at))
    }

    /// Passes all blocks in order.
    pub(super) fn visit(
        &self,
        each: &mut dyn FnMut(BlockId, Location) -> Result<(), IndexFault>,
    ) -> Result<(), IndexFault> {
        let mut from = 0;
        while from < self.first.len() {
            let count = PAGES_AT_A_TIME.min(self.first.len() - from);
            for page in self.pages(from, count)?.chunks_exact(PAGE_BYTES) {
                lines(page)?.try_for_each(|(block, at)| each(block, at))?;
            }
            from += count;
        }
        Ok(())
    }
}

/// Passes all blocks that an index and what came since have, in order.
pub(super) fn visit_merged(
    index: Option<&Index>,
    delta: &Delta,
    each: &mut dyn FnMut(BlockId, Location) -> Result<(), IndexFault>,
) -> Result<(), IndexFault> {
    let mut changes = delta.iter().peekable();
    if let Some(index) = index {
        index.visit(&mut |block, at| {
            while let Some((new, change)) = changes.next_if(|(of, _)| **of < block) {
                change.over(None).map_or(Ok(()), |at| each(*new, at))?;
            }
            let change = changes.next_if(|(of, _)| **of == block).map(|(_, change)| change);
            let there = change.map_or(Some(at), |change| change.over(Some(at)));
            there.map_or(Ok(()), |at| each(block, at))
        })?;
    }
    changes.try_for_each(|(block, change)| change.over(None).map_or(Ok(()), |at| each(*block, at)))
}

/// Writes an index page after page.
struct Writer {
    file: Box<dyn File>,
    first: Vec<u64>,
    blocks: u64,
    page: Vec<u8>,
    waiting: Vec<u8>,
    at: u64,
}

impl Writer {
    fn add(&mut self, block: BlockId, at: Location) -> io::Result<()> {
        if self.page.is_empty() {
            self.page.resize(PAGE_HEADER_BYTES, 0);
            self.first.push(block.0);
        }
        self.page.extend_from_slice(&block.0.to_le_bytes());
        for number in [at.segment, at.offset, at.length] {
            self.page.extend_from_slice(&number.to_le_bytes());
        }
        self.blocks += 1;
        if self.page.len() + LINE_BYTES > PAGE_BYTES { self.end_page() } else { Ok(()) }
    }

    fn end_page(&mut self) -> io::Result<()> {
        if self.page.is_empty() {
            return Ok(());
        }
        let count = (self.page.len() - PAGE_HEADER_BYTES) / LINE_BYTES;
        self.page[4..8].copy_from_slice(&(count as u32).to_le_bytes());
        self.page.resize(PAGE_BYTES, 0);
        let crc = crc32fast::hash(&self.page[4..]);
        self.page[..4].copy_from_slice(&crc.to_le_bytes());
        self.waiting.append(&mut self.page);
        if self.waiting.len() >= PAGES_AT_A_TIME * PAGE_BYTES { self.write() } else { Ok(()) }
    }

    fn write(&mut self) -> io::Result<()> {
        self.file.write_at(&self.waiting, self.at)?;
        self.at += self.waiting.len() as u64;
        self.waiting.clear();
        Ok(())
    }
}

/// Whose index is written, and what it stands for.
pub(super) struct Standing {
    /// The cluster.
    pub(super) cluster: u64,
    /// The service.
    pub(super) service: ServiceId,
    /// The last segment whose records it has.
    pub(super) mark: u32,
    /// The segments up to that one.
    pub(super) segments: BTreeMap<u32, Usage>,
}

/// Writes an index that has what an older one and the changes since have, durably, in the place of that one, unless it is of a disk that
/// has been away.
pub(super) fn write(
    disk: &dyn Disk,
    dir: &Path,
    older: Option<&Index>,
    delta: &Delta,
    standing: &Standing,
    is_of_disk: &dyn Fn() -> bool,
) -> Result<Index, IndexFault> {
    // Another may be written for a disk that was away meanwhile.
    static WRITTEN: AtomicU64 = AtomicU64::new(0);
    let temporary = dir.join(format!("index-{}.new", WRITTEN.fetch_add(1, Ordering::Relaxed)));
    let written = write_as(disk, dir, &temporary, older, delta, standing, is_of_disk);
    if written.is_err() && disk.exists(&temporary) {
        // It only takes room, and is removed at the next start.
        let _ = disk.remove(&temporary);
    }
    written
}

fn write_as(
    disk: &dyn Disk,
    dir: &Path,
    temporary: &Path,
    older: Option<&Index>,
    delta: &Delta,
    standing: &Standing,
    is_of_disk: &dyn Fn() -> bool,
) -> Result<Index, IndexFault> {
    let file = disk.open(temporary, true)?;
    file.set_len(0)?;
    let (first, page, waiting) = (Vec::new(), Vec::new(), Vec::new());
    let mut writer = Writer { file, first, blocks: 0, page, waiting, at: PAGE_BYTES as u64 };
    visit_merged(older, delta, &mut |block, at| match standing.segments.contains_key(&at.segment) {
        true => Ok(writer.add(block, at)?),
        false => Ok(()),
    })?;
    writer.end_page()?;
    let mut tables = Vec::new();
    for (number, usage) in &standing.segments {
        for number in [*number, usage.bytes, usage.live] {
            tables.extend_from_slice(&number.to_le_bytes());
        }
    }
    for block in &writer.first {
        tables.extend_from_slice(&block.to_le_bytes());
    }
    let mut head = MAGIC.to_vec();
    for number in [standing.cluster, standing.service.0, writer.blocks] {
        head.extend_from_slice(&number.to_le_bytes());
    }
    let counts = [writer.first.len() as u32, standing.segments.len() as u32];
    for number in [standing.mark, counts[0], counts[1], crc32fast::hash(&tables)] {
        head.extend_from_slice(&number.to_le_bytes());
    }
    head.extend_from_slice(&crc32fast::hash(&head).to_le_bytes());
    head.resize(PAGE_BYTES, 0);
    writer.waiting.append(&mut tables);
    writer.write()?;
    writer.file.write_at(&head, 0)?;
    writer.file.sync()?;
    if !is_of_disk() {
        return Err(io::Error::other("the disk has been away").into());
    }
    disk.rename(temporary, &dir.join(FILE))?;
    disk.sync_dir(dir)?;
    let Writer { file, first, .. } = writer;
    Ok(Index { file, mark: standing.mark, segments: standing.segments.clone(), first })
}

/// Removes an index, so that it is made anew.
pub(super) fn remove(disk: &dyn Disk, dir: &Path) -> io::Result<()> {
    let path = dir.join(FILE);
    if disk.exists(&path) {
        disk.remove(&path)?;
        disk.sync_dir(dir)?;
    }
    Ok(())
}

/// What is known of where blocks lie: written, being written, and in memory.
#[derive(Clone, Default)]
pub(super) struct Layers {
    /// What was written.
    pub(super) index: Option<Arc<Index>>,
    /// What is being written.
    pub(super) frozen: Option<Arc<Delta>>,
}

impl Layers {
    /// Where a block lies; `change` is what is known beyond these.
    pub(super) fn get(
        &self,
        block: BlockId,
        change: Option<&Change>,
    ) -> Result<Option<Location>, IndexFault> {
        match change.and_then(|change| change.at) {
            Some(at) => Ok(Some(at)),
            None => Ok(self.places(block, change)?.first().copied()),
        }
    }

    /// All places where a block lies as long as nobody says of those before that they are dead.
    pub(super) fn places(
        &self,
        block: BlockId,
        change: Option<&Change>,
    ) -> Result<Vec<Location>, IndexFault> {
        let frozen = self.frozen.as_ref().and_then(|frozen| frozen.get(&block));
        let changes = || change.into_iter().chain(frozen);
        let written = self.index.as_ref().map_or(Ok(None), |index| index.get(block))?;
        let mut places: Vec<Location> = Vec::new();
        let known = changes().flat_map(|change| change.at.iter().chain(change.older.iter().rev()));
        for at in known.copied().chain(written) {
            if !places.contains(&at) && !changes().any(|change| change.dead.contains(&at)) {
                places.push(at);
            }
        }
        Ok(places)
    }
}
