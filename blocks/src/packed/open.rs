//! Finds out what a disk's segments hold, after a crash or not.

use std::{collections::BTreeMap, io, path::PathBuf, sync::Arc};

use clutch_proto::{
    ServiceId,
    limits::PAGE_BYTES,
    mutants::{self, Mutant},
};
use clutch_runtime::{Disk, File};
use parking_lot::Mutex;

use super::{
    Index, Known, Open, Pack, PackFault, PackOptions, Segment, Tail,
    format::{
        ALIGNMENT, Entry, RECORD_HEADER_BYTES, RecordHeader, SEGMENT_HEADER_BYTES, SegmentHeader,
        SegmentIndex, number_of,
    },
    index::{self, Standing, Usage},
};
use crate::format::pages;

/// A segment is looked through in pieces of so many bytes.
const PIECE_BYTES: usize = 1 << 20;

/// What one segment holds.
pub(super) struct Held {
    pub(super) entries: Vec<Entry>,
    /// Where its last record ends.
    pub(super) end: u32,
    /// Some of it could not be read: there may be more.
    is_unread: bool,
}

/// Reads a file piece by piece.
struct Pieces<'a> {
    file: &'a dyn File,
    bytes: Vec<u8>,
    at: u64,
    has_failed: bool,
}

impl Pieces<'_> {
    /// Bytes at an offset; fewer at the end of the file, and none where they cannot be read.
    fn at(&mut self, offset: u64, length: usize) -> &[u8] {
        let inside = offset.checked_sub(self.at).map(|from| from as usize);
        let from = match inside.filter(|from| from + length <= self.bytes.len()) {
            Some(from) => from,
            None => {
                self.bytes.clear();
                self.at = offset;
                if let Err(error) = self.file.read_onto(&mut self.bytes, PIECE_BYTES.max(length), offset) {
                    tracing::warn!(%error, offset, "part of a segment of blocks cannot be read");
                    self.bytes.clear();
                    self.has_failed = true;
                }
                0
            }
        };
        &self.bytes[from..self.bytes.len().min(from + length)]
    }
}

/// Whether a record is whole, with its page table and data.
fn is_whole(record: &RecordHeader, bytes: &[u8]) -> bool {
    let RecordHeader::Block { stored, table_crc, .. } = *record else { return true };
    let table = RECORD_HEADER_BYTES as usize..RECORD_HEADER_BYTES as usize + 4 * pages(stored) as usize;
    let (Some(table), Some(data)) =
        (bytes.get(table.clone()), bytes.get(table.end..table.end + stored as usize))
    else {
        return false;
    };
    let fits = |(page, crc): (&[u8], &[u8])| {
        let mut whole = page.to_vec();
        whole.resize(PAGE_BYTES as usize, 0);
        crc == crc32fast::hash(&whole).to_le_bytes()
    };
    crc32fast::hash(table) == table_crc && data.chunks(PAGE_BYTES as usize).zip(table.chunks(4)).all(fits)
}

/// Looks through a segment from one record to the next, past what is damaged. A block that is torn is none: it would hide the one that it
/// is a copy of.
fn scan(file: &dyn File, header: &SegmentHeader) -> io::Result<Held> {
    let length = file.len()?;
    let mut pieces = Pieces { file, bytes: Vec::new(), at: 0, has_failed: false };
    let mut held = Held { entries: Vec::new(), end: SEGMENT_HEADER_BYTES, is_unread: false };
    let mut offset = u64::from(SEGMENT_HEADER_BYTES);
    while let Ok(at) = u32::try_from(offset)
        && offset + u64::from(RECORD_HEADER_BYTES) <= length
    {
        let bytes = pieces.at(offset, RECORD_HEADER_BYTES as usize);
        match RecordHeader::decode(bytes, header, at) {
            Ok(record) if offset + u64::from(record.length()) <= length => {
                let bytes = pieces.at(offset, record.length() as usize);
                let (block, is_block, dead) = match record {
                    RecordHeader::Block { block, replaces, .. } => (block, true, replaces),
                    RecordHeader::Dead { block, at } => (block, false, Some(at)),
                };
                if is_whole(&record, bytes) || mutants::is(Mutant::TornCopyTaken) {
                    held.entries.push(Entry { block, offset: at, length: record.length(), is_block, dead });
                }
                offset += u64::from(record.length());
                held.end = at + record.length();
            }
            _ if mutants::is(Mutant::ScanEndsAtDamage) => break,
            _ => offset += u64::from(ALIGNMENT),
        }
    }
    held.is_unread = pieces.has_failed;
    if u64::from(held.end) < length {
        tracing::warn!(segment = header.number, end = held.end, length, "a segment of blocks has a torn end");
    }
    Ok(held)
}

impl Pack {
    /// Opens the packed blocks of a disk. Nothing is made where there are none.
    pub(crate) fn open(
        disk: Arc<dyn Disk>,
        dir: PathBuf,
        cluster: u64,
        service: ServiceId,
        options: PackOptions,
    ) -> Result<(Pack, Tail), PackFault> {
        let pack = Pack {
            disk,
            dir,
            cluster,
            service,
            options,
            known: Mutex::default(),
            moving: Mutex::default(),
            is_retired: false.into(),
        };
        let (disk, dir) = (&*pack.disk, &pack.dir);
        let names = disk.list(dir)?;
        let numbers: Vec<u32> = names.iter().filter_map(|name| number_of(name, ".pack")).collect();
        let index = Index::open(disk, dir, cluster, service)?.filter(|index| pack.fits(index, &numbers));
        let mut known = Known { has_sparse: true, ..Known::default() };
        let mark = index.as_ref().map_or(0, |index| index.mark);
        let mut tail = Tail::default();
        known.layers.index = index.map(Arc::new);
        for (place, number) in numbers.iter().enumerate() {
            let is_last = place + 1 == numbers.len();
            pack.take(&mut known, &mut tail, *number, *number <= mark, is_last)?;
        }
        for name in &names {
            // What a crash left of a segment that was removed.
            let left = number_of(name, ".index").filter(|number| numbers.binary_search(number).is_err());
            if left.is_some() || name.ends_with(".new") {
                // It only takes room.
                let _ = disk.remove(&dir.join(name));
            }
        }
        *pack.known.lock() = known;
        Ok((pack, tail))
    }

    /// Whether an index is of these segments, not of ones that were there before somebody put a copy in their place.
    fn fits(&self, index: &Index, numbers: &[u32]) -> bool {
        let is_wrong = numbers.iter().filter(|number| **number <= index.mark).any(|number| {
            let length = self.disk.open(&self.segment_path(*number), false).and_then(|file| file.len());
            let known = index.segments.get(number).map(|usage| u64::from(usage.bytes));
            length.is_ok_and(|length| known != Some(length))
        });
        if is_wrong {
            tracing::warn!(service = %self.service, "the index of small blocks is of other segments, and is made anew");
        }
        !is_wrong
    }

    /// Takes in one segment, later ones after earlier ones.
    fn take(
        &self,
        known: &mut Known,
        tail: &mut Tail,
        number: u32,
        is_indexed: bool,
        is_last: bool,
    ) -> Result<(), PackFault> {
        let file = self.disk.open(&self.segment_path(number), false)?;
        let length = file.len()?;
        if is_last && length < u64::from(SEGMENT_HEADER_BYTES) {
            // It was just about to begin.
            self.disk.remove(&self.segment_path(number))?;
            return Ok(());
        }
        let read = self.header(&*file, number);
        let header = match &read {
            Some(header) => *header,
            None => self.new_header(number)?,
        };
        let bytes = u32::try_from(length).unwrap_or(u32::MAX);
        let written = known.layers.index.as_ref().and_then(|index| index.segments.get(&number));
        let live = written.filter(|_| is_indexed).map_or(0, |usage| usage.live);
        let mut segment = Segment::new(header, Usage { bytes, live });
        segment.is_closed = true;
        if is_indexed {
            known.segments.insert(number, segment);
            return Ok(());
        }
        if let Some(index) = self.told(number, length) {
            known.segments.insert(number, segment);
            index.entries.iter().for_each(|entry| known.follow(number, entry));
        } else {
            let held = scan(&*file, &header)?;
            if read.is_none() && held.entries.is_empty() && !held.is_unread {
                // It may be another disk's: it is left as it is, and never moved or removed.
                segment.stays_at = Some(0);
                known.segments.insert(number, segment);
                return Ok(());
            }
            (segment.usage.bytes, segment.is_closed) = (held.end, false);
            known.segments.insert(number, segment);
            held.entries.iter().for_each(|entry| known.follow(number, entry));
            let (end, entries) = (held.end, held.entries);
            let open = Open { header, end, entries };
            // Before that is possible nothing is changed, and what is there can be read.
            if held.is_unread {
                known.is_unread = true;
                return Ok(());
            }
            match self.make_durable(&*file, end) {
                Ok(()) if is_last => tail.open = Some(open),
                Ok(()) => self.tell(known, open)?,
                Err(error) => {
                    tracing::error!(%error, segment = number, "a segment of blocks cannot be made durable");
                    tail.unproven.push((number, end));
                    tail.open = is_last.then_some(open);
                }
            }
        }
        let is_settled = tail.open.is_none() && tail.unproven.is_empty() && !known.is_unread;
        if known.active.len() >= self.options.merge_at && is_settled {
            self.write_index(known, number)?;
        }
        Ok(())
    }

    /// The header of a segment; `None` where it is damaged, cannot be read or is another disk's.
    fn header(&self, file: &dyn File, number: u32) -> Option<SegmentHeader> {
        let mut bytes = vec![0; SEGMENT_HEADER_BYTES as usize];
        let read = file.read_at(&mut bytes, 0).map_err(|error| error.to_string());
        let decoded = read.and_then(|read| SegmentHeader::decode(&bytes[..read]));
        let ours = decoded.and_then(|h| match (h.cluster, h.service, h.number) {
            of if of == (self.cluster, self.service, number) => Ok(h),
            _ => Err("it is another segment's".to_owned()),
        });
        let told = |what: &String| {
            tracing::error!(segment = number, service = %self.service, what, "the header of a segment of blocks is damaged");
        };
        ours.inspect_err(told).ok()
    }

    /// Says durably what a segment has that was never closed and is not the last one.
    fn tell(&self, known: &mut Known, open: Open) -> io::Result<()> {
        let Open { header: SegmentHeader { number, salt, .. }, end, entries } = open;
        let index = SegmentIndex { number, bytes: end, salt, entries };
        self.disk.replace(&self.index_path(number), &index.encode())?;
        if let Some(segment) = known.segments.get_mut(&number) {
            segment.is_closed = true;
        }
        Ok(())
    }

    /// What the list of a closed segment says; `None` where there is none that fits.
    pub(super) fn told(&self, number: u32, length: u64) -> Option<SegmentIndex> {
        let path = self.index_path(number);
        if !self.disk.exists(&path) {
            return None;
        }
        let index = self.disk.read(&path).ok().and_then(|bytes| SegmentIndex::decode(&bytes));
        index.filter(|index| (index.number, u64::from(index.bytes)) == (number, length))
    }

    /// What a closed segment has, in order.
    pub(super) fn entries(&self, number: u32) -> Result<Vec<Entry>, PackFault> {
        let file = self.disk.open(&self.segment_path(number), false)?;
        if let Some(index) = self.told(number, file.len()?) {
            return Ok(index.entries);
        }
        let header = self.salted(number).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        Ok(scan(&*file, &header)?.entries)
    }

    /// What was found may be in the system's memory only, and a sync that failed may have left it there for good: it is written once
    /// more before anything is proven. What is torn behind it goes.
    pub(super) fn make_durable(&self, file: &dyn File, end: u32) -> io::Result<()> {
        if file.len()? > u64::from(end) {
            file.set_len(u64::from(end))?;
        }
        if mutants::is(Mutant::PackedTailNotWrittenAgain) {
            return Ok(());
        }
        let mut at = 0;
        while at < u64::from(end) {
            let length = PIECE_BYTES.min((u64::from(end) - at) as usize);
            let mut bytes = Vec::new();
            file.read_onto(&mut bytes, length, at)?;
            // Holes stay holes.
            for (number, page) in bytes.chunks(PAGE_BYTES as usize).enumerate() {
                if page.iter().any(|byte| *byte != 0) {
                    file.write_at(page, at + number as u64 * u64::from(PAGE_BYTES))?;
                }
            }
            at += length as u64;
        }
        file.sync()?;
        // Its name, too.
        self.disk.sync_dir(&self.dir)
    }

    fn write_index(&self, known: &mut Known, mark: u32) -> Result<(), PackFault> {
        let standing = self.standing(known, mark);
        let older = known.layers.index.clone();
        let index =
            index::write(&*self.disk, &self.dir, older.as_deref(), &known.active, &standing, &|| true)?;
        known.active.clear();
        known.layers.index = Some(Arc::new(index));
        Ok(())
    }

    pub(super) fn standing(&self, known: &Known, mark: u32) -> Standing {
        let of_index: BTreeMap<u32, Usage> =
            known.segments.range(..=mark).map(|(number, segment)| (*number, segment.usage)).collect();
        Standing { cluster: self.cluster, service: self.service, mark, segments: of_index }
    }
}
