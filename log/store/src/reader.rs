//! Reads records back from segment files, checking every byte that it passes: a segment from one end to the other, or one group
//! by the index of each segment, without touching what belongs to others.

use std::{
    path::Path,
    sync::{Arc, atomic::Ordering},
};

use bytes::Bytes;
use clutch_log::{LogFault, LogletId, Position};
use clutch_proto::mutants::{self, Mutant};
use clutch_runtime::{Disk, File};

use crate::{
    format::{
        INDEX_READ_BYTES_MAX, RECORD_HEADER_BYTES, Record, RecordHeader, RecordKind, SEGMENT_HEADER_BYTES,
        check_segment_header, decode_header, decode_index, decode_offsets, decode_payload, index_path,
        mended_header, missing, segment_name,
    },
    segment::{Segment, effect},
    shared::Shared,
};

/// How many bytes are read ahead: many small records cost one read.
const READ_AHEAD: usize = 256 << 10;
/// The least that is read at a time: where the records of a group lie far apart, what is between them is not wanted.
const READ_LEAST: usize = 4 << 10;
/// How many records ahead the distance is looked at.
const RECORDS_AHEAD: usize = 16;
/// Records of the segment that is being written that are looked up at a time.
const OPEN_OFFSETS_MAX: usize = 4096;

/// Reads one segment from its first record on.
pub struct SegmentReader {
    file: Box<dyn File>,
    name: String,
    /// The cluster that the segment's header names.
    cluster: u64,
    /// Where the next record begins.
    offset: u64,
    len: u64,
    buffer: Bytes,
    buffer_offset: u64,
    /// Bytes that are read at a time.
    ahead: usize,
    /// The last position that was read, for messages.
    last_position: Position,
}

/// A record as it was found.
pub(crate) enum Found {
    /// It is whole.
    Whole(Record),
    /// It is damaged, and whose it is is known.
    Damaged(RecordHeader, LogFault),
}

impl SegmentReader {
    /// Opens a segment and checks its header.
    pub fn open(disk: &dyn Disk, dir: &Path, number: u64) -> Result<SegmentReader, LogFault> {
        let name = segment_name(number);
        let file = disk
            .open(&dir.join(&name), false)
            .map_err(|e| LogFault::Storage(format!("open segment {name}: {e}")))?;
        let len = file.len().map_err(|e| LogFault::Storage(format!("size of segment {name}: {e}")))?;
        let mut reader = SegmentReader {
            file,
            name,
            cluster: 0,
            offset: SEGMENT_HEADER_BYTES,
            len,
            buffer: Bytes::new(),
            buffer_offset: 0,
            ahead: READ_AHEAD,
            last_position: Position(0),
        };
        let header = reader.bytes(0, SEGMENT_HEADER_BYTES as usize)?;
        reader.cluster =
            check_segment_header(&header, number).map_err(|what| reader.corrupt(0, Position(0), what))?;
        Ok(reader)
    }

    /// The cluster that the segment belongs to.
    pub fn cluster(&self) -> u64 {
        self.cluster
    }

    /// Where the next record begins.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    pub(crate) fn corrupt(&self, offset: u64, position: Position, what: String) -> LogFault {
        LogFault::Corrupt { position, file: self.name.clone(), offset, what }
    }

    /// Up to `len` bytes from `offset`; fewer only at the end of the file.
    fn bytes(&mut self, offset: u64, len: usize) -> Result<Bytes, LogFault> {
        let inside = offset
            .checked_sub(self.buffer_offset)
            .filter(|start| start + len as u64 <= self.buffer.len() as u64);
        if let Some(start) = inside {
            return Ok(self.buffer.slice(start as usize..start as usize + len));
        }
        let mut buffer = vec![0; len.max(self.ahead)];
        let read = self
            .file
            .read_at(&mut buffer, offset)
            .map_err(|e| LogFault::Storage(format!("read segment {}: {e}", self.name)))?;
        buffer.truncate(read);
        self.buffer = buffer.into();
        self.buffer_offset = offset;
        Ok(self.buffer.slice(..len.min(read)))
    }

    /// The next record of any group; `None` at the end of the file.
    ///
    /// # Errors
    /// [`LogFault::Corrupt`] where it is damaged.
    pub fn next_record(&mut self) -> Result<Option<Record>, LogFault> {
        match self.next_found()? {
            None => Ok(None),
            Some(Found::Whole(record)) => Ok(Some(record)),
            Some(Found::Damaged(_, fault)) => Err(fault),
        }
    }

    /// The same, going on behind a damaged record where its header says how long it is.
    pub(crate) fn next_found(&mut self) -> Result<Option<Found>, LogFault> {
        let at = self.offset;
        let bytes = self.bytes(at, RECORD_HEADER_BYTES)?;
        if bytes.is_empty() {
            // The file may have grown since it was opened; at its true end there is nothing.
            return Ok(None);
        }
        let expected = self.last_position.next();
        let (header, damage) = match decode_header(&bytes) {
            Ok(header) => (header, None),
            Err(what) => {
                let fault = self.corrupt(at, expected, what);
                let Some(mended) = mended_header(&bytes) else { return Err(fault) };
                (mended, Some(fault))
            }
        };
        let (payload_at, length) = (at + RECORD_HEADER_BYTES as u64, u64::from(header.payload_len));
        let payload = self.bytes(payload_at, header.payload_len as usize)?;
        // One that lies alone would keep all that was read with it.
        let payload = if self.ahead < READ_AHEAD { Bytes::copy_from_slice(&payload) } else { payload };
        let is_whole = payload.len() == header.payload_len as usize;
        let decoded =
            decode_payload(&header, payload).map_err(|what| self.corrupt(at, header.position, what));
        let found = match (damage, decoded) {
            // What a mended header says must fit, and what is cut short may be the end.
            (Some(fault), Err(_)) => return Err(fault),
            (None, Err(fault)) if !is_whole => return Err(fault),
            (Some(fault), Ok(_)) | (None, Err(fault)) => Found::Damaged(header, fault),
            (None, Ok(record)) => {
                self.last_position = record.position;
                Found::Whole(record)
            }
        };
        self.offset = payload_at + length;
        self.len = self.len.max(self.offset);
        Ok(Some(found))
    }

    /// The record at an offset, which must be a group's at a position.
    fn record_at(&mut self, offset: u64, id: LogletId, position: Position) -> Result<Record, LogFault> {
        self.offset = offset;
        self.last_position = Position(position.0 - 1);
        let Some(record) = self.next_record()? else {
            return Err(self.corrupt(offset, position, missing(id, position, position)));
        };
        if record.group != id || record.position != position || !record.kind.has_position() {
            let what = format!(
                "position {} of {} lies there, not {position} of {id}",
                record.position, record.group
            );
            return Err(self.corrupt(offset, position, what));
        }
        Ok(record)
    }
}

/// Where records of a group lie in one segment, from a position on.
struct Places {
    number: u64,
    /// How often anything had been cut off then: positions may lie elsewhere since.
    generation: u64,
    from: Position,
    offsets: Vec<u32>,
}

impl Places {
    fn offset(&self, position: Position) -> Option<u64> {
        let index = position.0.checked_sub(self.from.0)?;
        self.offsets.get(index as usize).map(|offset| u64::from(*offset))
    }
}

/// Reads one group through the segments that hold it.
pub(crate) struct GroupReader {
    shared: Arc<Shared>,
    id: LogletId,
    segment: Option<(u64, SegmentReader)>,
    places: Option<Places>,
    /// What comes behind the record that was read last: who goes on there reads ahead.
    next: Option<Position>,
}

impl GroupReader {
    pub(crate) fn new(shared: Arc<Shared>, id: LogletId) -> GroupReader {
        GroupReader { shared, id, segment: None, places: None, next: None }
    }

    /// The group's record at a position; `None` where no segment has it. Where it is damaged the next start finds that, too.
    pub(crate) fn at(&mut self, position: Position) -> Result<Option<Record>, LogFault> {
        let read = self.read(position);
        if let (Err(fault @ LogFault::Corrupt { .. }), Some((number, _))) = (&read, &self.segment)
            && self.shared.options.may_quarantine
            && !mutants::is(Mutant::DamagedIndexKept)
        {
            self.doubt(*number, fault);
        }
        read
    }

    /// Removes the index of a segment: a start believes an index, and reads a segment that has none, so that it finds what is damaged.
    /// Where that could not go past the damage, no group of the segment would be opened, and it is better believed.
    fn doubt(&self, number: u64, fault: &LogFault) {
        let Shared { disk, dir, .. } = &*self.shared;
        let index = index_path(dir, number);
        let is_passed = || -> Result<(), LogFault> {
            let mut reader = SegmentReader::open(&**disk, dir, number)?;
            while reader.next_found()?.is_some() {}
            Ok(())
        };
        if !disk.exists(&index) || is_passed().is_err() {
            return;
        }
        match disk.remove(&index).and_then(|()| disk.sync_dir(dir)) {
            Ok(()) => {
                tracing::warn!(%fault, index = %index.display(), "the index of a damaged segment is removed")
            }
            Err(error) => {
                tracing::warn!(%error, index = %index.display(), "cannot remove the index of a damaged segment");
            }
        }
    }

    fn read(&mut self, position: Position) -> Result<Option<Record>, LogFault> {
        let placed = self.place(position).inspect_err(|_| self.segment = None)?;
        let Some((number, offset)) = placed else { return Ok(None) };
        if self.segment.as_ref().is_none_or(|(open, _)| *open != number) {
            let reader = match SegmentReader::open(&*self.shared.disk, &self.shared.dir, number) {
                Ok(reader) => reader,
                // It was trimmed since it was found.
                Err(_) if !self.shared.has_segment(number) => return Ok(None),
                Err(fault) => return Err(fault),
            };
            self.segment = Some((number, reader));
        }
        let Some((_, segment)) = &mut self.segment else { return Ok(None) };
        let later = self.places.as_ref().and_then(|p| {
            let at = (position.0 - p.from.0) as usize;
            p.offsets
                .get((at + RECORDS_AHEAD).min(p.offsets.len() - 1))
                .map(|o| u64::from(*o).saturating_sub(offset))
        });
        let goes_on = self.next.replace(position.next()) == Some(position);
        let dense = goes_on && later.is_some_and(|later| later <= READ_AHEAD as u64);
        segment.ahead = if dense { READ_AHEAD } else { READ_LEAST };
        segment.record_at(offset, self.id, position).map(Some)
    }

    /// The segment that has a position, and where in it.
    fn place(&mut self, position: Position) -> Result<Option<(u64, u64)>, LogFault> {
        let generation = self.shared.cuts.load(Ordering::Acquire);
        let known = self.places.as_ref().filter(|places| places.generation == generation);
        if let Some(found) = known.and_then(|p| Some((p.number, p.offset(position)?))) {
            return Ok(Some(found));
        }
        let (number, bytes, first, count) = {
            let segments = self.shared.segments.lock();
            // The newest are asked for most.
            let found = segments.iter().rev().find_map(|segment| {
                segment.spans.get(&self.id).filter(|span| span.has(position)).map(|span| (segment, span))
            });
            let Some((segment, span)) = found else { return Ok(None) };
            if !span.offsets.is_empty() {
                let from = (position.0 - span.first.0) as usize;
                let upto = span.offsets.len().min(from + OPEN_OFFSETS_MAX);
                let offsets = span.offsets[from..upto].to_vec();
                let offset = u64::from(offsets[0]);
                self.places = Some(Places { number: segment.number, generation, from: position, offsets });
                return Ok(Some((segment.number, offset)));
            }
            (segment.number, segment.bytes, span.first, span.count())
        };
        let indexed = self.indexed(number, bytes, first, count);
        let is_indexed = indexed.is_some();
        let mut offsets = match indexed {
            Some(offsets) => offsets,
            None => self.scanned(number, first, count)?,
        };
        if !is_indexed && !mutants::is(Mutant::SegmentScannedForEach) {
            self.keep(number, generation, first, count, &offsets);
        }
        // What a later segment has taken away is not of this one any more.
        offsets.truncate(usize::try_from(count).unwrap_or(usize::MAX));
        let places = Places { number, generation, from: first, offsets };
        let offset = places.offset(position);
        self.places = Some(places);
        Ok(offset.map(|offset| (number, offset)))
    }

    /// Keeps the offsets of a segment without an index in memory: to find them takes a look at all of the segment.
    fn keep(&self, number: u64, generation: u64, first: Position, count: u64, offsets: &[u32]) {
        let mut segments = self.shared.segments.lock();
        if self.shared.cuts.load(Ordering::Acquire) != generation {
            return;
        }
        let segment = segments.iter_mut().find(|segment| segment.number == number);
        let span = segment.and_then(|segment| segment.spans.get_mut(&self.id));
        let Some(span) = span.filter(|span| span.first == first && span.count() == count) else { return };
        if span.offsets.is_empty() && offsets.len() as u64 >= count {
            span.offsets = offsets.iter().take(count as usize).copied().collect();
        }
    }

    /// The offsets that the index of a segment has; `None` where it is missing or damaged.
    fn indexed(&self, number: u64, bytes: u64, first: Position, count: u64) -> Option<Vec<u32>> {
        let file = self.shared.disk.open(&index_path(&self.shared.dir, number), false).ok()?;
        let mut head = vec![0; INDEX_READ_BYTES_MAX.min(usize::try_from(file.len().ok()?).ok()?)];
        let read = file.read_at(&mut head, 0).ok()?;
        head.truncate(read);
        let (index, places) = decode_index(&head)?;
        let fits =
            (index.number, index.bytes) == (number, bytes) && index.spans.get(&self.id)?.first == first;
        let place = *places.get(&self.id).filter(|place| fits && place.count >= count)?;
        let end = place.start.checked_add(place.count.checked_mul(4)?)?;
        if end > file.len().ok()? {
            return None;
        }
        let mut bytes = vec![0; usize::try_from(place.count * 4).ok()?];
        let read = file.read_at(&mut bytes, place.start).ok()?;
        decode_offsets(place, &bytes[..read])
    }

    /// The offsets as the segment itself has them.
    fn scanned(&self, number: u64, first: Position, count: u64) -> Result<Vec<u32>, LogFault> {
        let mut reader = SegmentReader::open(&*self.shared.disk, &self.shared.dir, number)?;
        let mut segment = Segment { number, ..Segment::default() };
        let mut damage = None;
        loop {
            let at = reader.offset();
            let record = match reader.next_found()? {
                None => break,
                Some(Found::Damaged(header, fault)) => {
                    if header.group == self.id {
                        damage.get_or_insert(fault);
                    }
                    continue;
                }
                Some(Found::Whole(record)) => record,
            };
            if record.group == self.id {
                if record.kind == RecordKind::Remove && !mutants::is(Mutant::DamageOutlivesRemoval) {
                    // What was damaged is gone with all that was there.
                    damage = None;
                }
                let span = segment.spans.get(&self.id).filter(|span| !span.is_empty());
                let next = span.map_or(record.position, |span| span.last.next());
                segment.take(self.id, record.position, effect(record.kind, record.position, next), at);
            }
        }
        if let Some(fault) = damage {
            return Err(fault);
        }
        let span = segment.spans.remove(&self.id).unwrap_or_default();
        if span.first != first || span.count() < count {
            let what = missing(self.id, first, Position(first.0 + count - 1));
            return Err(reader.corrupt(0, first, what));
        }
        Ok(span.offsets)
    }
}
