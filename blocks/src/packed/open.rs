//! Finds out what a disk's segments hold, after a crash or not.

use std::{collections::BTreeMap, io, path::PathBuf, sync::Arc};

use clutch_proto::{
    ServiceId,
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

/// A segment is looked through in pieces of so many bytes.
const PIECE_BYTES: usize = 1 << 20;

/// What one segment holds.
pub(super) struct Held {
    pub(super) entries: Vec<Entry>,
    /// Where its last record ends.
    pub(super) end: u32,
}

/// Reads a file piece by piece.
struct Pieces<'a> {
    file: &'a dyn File,
    bytes: Vec<u8>,
    at: u64,
}

impl Pieces<'_> {
    /// The bytes of a header at an offset; fewer only at the end of the file.
    fn header(&mut self, offset: u64) -> io::Result<&[u8]> {
        let length = RECORD_HEADER_BYTES as usize;
        let inside = offset.checked_sub(self.at).map(|from| from as usize);
        let from = match inside.filter(|from| from + length <= self.bytes.len()) {
            Some(from) => from,
            None => {
                self.bytes.clear();
                self.file.read_onto(&mut self.bytes, PIECE_BYTES, offset)?;
                self.at = offset;
                0
            }
        };
        Ok(&self.bytes[from..self.bytes.len().min(from + length)])
    }
}

/// Looks through a segment from one record to the next, past what is damaged.
fn scan(file: &dyn File, header: &SegmentHeader) -> io::Result<Held> {
    let length = file.len()?;
    let mut pieces = Pieces { file, bytes: Vec::new(), at: 0 };
    let mut held = Held { entries: Vec::new(), end: SEGMENT_HEADER_BYTES };
    let mut offset = u64::from(SEGMENT_HEADER_BYTES);
    while let Ok(at) = u32::try_from(offset) {
        let bytes = pieces.header(offset)?;
        if bytes.len() < RECORD_HEADER_BYTES as usize {
            break;
        }
        match RecordHeader::decode(bytes, header, at) {
            Ok(record) if offset + u64::from(record.length()) <= length => {
                let (block, dead) = match record {
                    RecordHeader::Block { block, .. } => (block, None),
                    RecordHeader::Dead { block, at } => (block, Some(at)),
                };
                held.entries.push(Entry { block, offset: at, length: record.length(), dead });
                offset += u64::from(record.length());
                held.end = at + record.length();
            }
            _ if mutants::is(Mutant::ScanEndsAtDamage) => break,
            _ => offset += u64::from(ALIGNMENT),
        }
    }
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
        let pack =
            Pack { disk, dir, cluster, service, options, known: Mutex::default(), is_retired: false.into() };
        let (disk, dir) = (&*pack.disk, &pack.dir);
        let names = disk.list(dir)?;
        let numbers: Vec<u32> = names.iter().filter_map(|name| number_of(name, ".pack")).collect();
        let index = Index::open(disk, dir, cluster, service)?;
        let mut known = Known::default();
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
                disk.remove(&dir.join(name))?;
            }
        }
        *pack.known.lock() = known;
        Ok((pack, tail))
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
        let closed = self.told(number, length)?;
        let mut bytes = vec![0; SEGMENT_HEADER_BYTES as usize];
        let read = file.read_at(&mut bytes, 0)?;
        let header = SegmentHeader::decode(&bytes[..read]);
        let of_index = |index: &SegmentIndex| SegmentHeader {
            cluster: self.cluster,
            service: self.service,
            number,
            salt: index.salt,
        };
        let is_ours =
            |h: &SegmentHeader| (h.cluster, h.service, h.number) == (self.cluster, self.service, number);
        let header = header.ok().filter(is_ours).or_else(|| closed.as_ref().map(of_index));
        let usage = Usage { bytes: u32::try_from(length).unwrap_or(u32::MAX), live: 0 };
        let mut segment = Segment { header, usage, is_closed: true, looked_at: None };
        let written = known.layers.index.as_ref().and_then(|index| index.segments.get(&number));
        if is_indexed {
            segment.usage.live = written.map_or(segment.usage.bytes, |usage| usage.live);
            known.segments.insert(number, segment);
            return Ok(());
        }
        let Some(header) = header else {
            if is_last && length <= u64::from(SEGMENT_HEADER_BYTES) {
                // It was just about to begin.
                self.disk.remove(&self.segment_path(number))?;
                return Ok(());
            }
            tracing::error!(segment = number, service = %self.service, "a segment of blocks is damaged: nothing of it can be read");
            known.segments.insert(number, segment);
            return Ok(());
        };
        let entries = match closed {
            Some(index) => {
                known.segments.insert(number, segment);
                index.entries
            }
            None => {
                let held = scan(&*file, &header)?;
                self.make_durable(&*file, &held)?;
                (segment.usage.bytes, segment.is_closed) = (held.end, false);
                known.segments.insert(number, segment);
                tail.open = Some(Open { header, end: held.end, entries: held.entries.clone() });
                held.entries
            }
        };
        for entry in &entries {
            known.follow(number, entry);
        }
        if tail.open.is_some() && !is_last {
            self.tell(known, tail)?;
        }
        if known.active.len() >= self.options.merge_at && tail.open.is_none() {
            self.write_index(known, number)?;
        }
        Ok(())
    }

    /// Says durably what a segment has that was never closed and is not the last one.
    fn tell(&self, known: &mut Known, tail: &mut Tail) -> io::Result<()> {
        let Some(open) = tail.open.take() else { return Ok(()) };
        let Open { header: SegmentHeader { number, salt, .. }, end, entries } = open;
        let index = SegmentIndex { number, bytes: end, salt, entries };
        self.disk.replace(&self.index_path(number), &index.encode())?;
        if let Some(segment) = known.segments.get_mut(&number) {
            segment.is_closed = true;
        }
        Ok(())
    }

    /// What the index of a closed segment says; `None` where there is none that fits.
    pub(super) fn told(&self, number: u32, length: u64) -> io::Result<Option<SegmentIndex>> {
        let path = self.index_path(number);
        if !self.disk.exists(&path) {
            return Ok(None);
        }
        let index = SegmentIndex::decode(&self.disk.read(&path)?);
        Ok(index.filter(|index| (index.number, u64::from(index.bytes)) == (number, length)))
    }

    /// What a closed segment has, in order.
    pub(super) fn entries(&self, number: u32) -> Result<Vec<Entry>, PackFault> {
        let file = self.disk.open(&self.segment_path(number), false)?;
        if let Some(index) = self.told(number, file.len()?)? {
            return Ok(index.entries);
        }
        let header = self.salted(number);
        let header = header.ok_or_else(|| PackFault::Corrupt(format!("segment {number} is damaged")))?;
        Ok(scan(&*file, &header)?.entries)
    }

    /// What was found may be in the system's memory only, and a sync that failed may have left it there for good: it is written once
    /// more before anybody is told of it. What is torn behind it goes.
    fn make_durable(&self, file: &dyn File, held: &Held) -> io::Result<()> {
        if file.len()? > u64::from(held.end) {
            file.set_len(u64::from(held.end))?;
        }
        if mutants::is(Mutant::PackedTailNotWrittenAgain) {
            return Ok(());
        }
        let mut at = 0;
        while at < u64::from(held.end) {
            let length = PIECE_BYTES.min((u64::from(held.end) - at) as usize);
            let mut bytes = Vec::new();
            file.read_onto(&mut bytes, length, at)?;
            file.write_at(&bytes, at)?;
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
