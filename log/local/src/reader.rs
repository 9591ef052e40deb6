//! Reads records back from segment files, checking every byte that it passes.

use std::{path::PathBuf, sync::Arc};

use bytes::Bytes;
use clutch_log::{LogFault, LogId, Position};
use clutch_runtime::{Disk, File};

use crate::format::{
    RECORD_HEADER_BYTES, Record, RecordHeader, RecordKind, SEGMENT_HEADER_BYTES, check_segment_header,
    decode_header, decode_payload, segment_name,
};

/// How many bytes are read ahead: many small records cost one read.
const READ_AHEAD: usize = 256 << 10;

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
    /// The last position of the log of interest that was read, for messages.
    last_position: Position,
}

impl SegmentReader {
    /// Opens a segment and checks its header.
    pub fn open(disk: &dyn Disk, dir: &std::path::Path, number: u64) -> Result<SegmentReader, LogFault> {
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
        let mut buffer = vec![0; len.max(READ_AHEAD)];
        let read = self
            .file
            .read_at(&mut buffer, offset)
            .map_err(|e| LogFault::Storage(format!("read segment {}: {e}", self.name)))?;
        buffer.truncate(read);
        self.buffer = buffer.into();
        self.buffer_offset = offset;
        Ok(self.buffer.slice(..len.min(read)))
    }

    /// The next record, its header alone when `wanted` says no; `None` at the end of the file.
    pub(crate) fn next(
        &mut self,
        wanted: impl Fn(&RecordHeader) -> bool,
    ) -> Result<Option<(RecordHeader, Option<Record>)>, LogFault> {
        let at = self.offset;
        let bytes = self.bytes(at, RECORD_HEADER_BYTES)?;
        if bytes.is_empty() {
            // The file may have grown since it was opened; at its true end there is nothing.
            return Ok(None);
        }
        let expected = self.last_position.next();
        let header = decode_header(&bytes).map_err(|what| self.corrupt(at, expected, what))?;
        let payload_at = at + RECORD_HEADER_BYTES as u64;
        let record = if wanted(&header) {
            let payload = self.bytes(payload_at, header.payload_len as usize)?;
            let record =
                decode_payload(&header, payload).map_err(|what| self.corrupt(at, header.position, what))?;
            self.last_position = record.position;
            Some(record)
        } else {
            None
        };
        self.offset = payload_at + u64::from(header.payload_len);
        self.len = self.len.max(self.offset);
        Ok(Some((header, record)))
    }

    /// The next record of any log; `None` at the end of the file.
    pub fn next_record(&mut self) -> Result<Option<Record>, LogFault> {
        Ok(self.next(|_| true)?.and_then(|(_, record)| record))
    }
}

/// Reads one log through the segments that hold it.
pub(crate) struct GroupReader {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    log: LogId,
    /// Segments still to read, next one last.
    numbers: Vec<u64>,
    segment: Option<SegmentReader>,
}

impl GroupReader {
    pub(crate) fn new(disk: Arc<dyn Disk>, dir: PathBuf, log: LogId, mut numbers: Vec<u64>) -> GroupReader {
        numbers.reverse();
        GroupReader { disk, dir, log, numbers, segment: None }
    }

    /// The record of the log at `from`; `None` after the last segment. One that lies behind it instead is damage: the
    /// positions of a log have no holes.
    pub(crate) fn next_from(&mut self, from: Position) -> Result<Option<Record>, LogFault> {
        loop {
            if self.segment.is_none() {
                let Some(number) = self.numbers.pop() else { return Ok(None) };
                let mut segment = SegmentReader::open(&*self.disk, &self.dir, number)?;
                segment.last_position = Position(from.0.saturating_sub(1));
                self.segment = Some(segment);
            }
            let Some(segment) = &mut self.segment else { continue };
            let log = self.log;
            let wanted =
                |h: &RecordHeader| h.kind != RecordKind::Groups && h.log == log && h.position >= from;
            let at = segment.offset();
            match segment.next(wanted)? {
                Some((_, Some(record))) if record.position != from => {
                    let what = missing(log, from, Position(record.position.0 - 1));
                    return Err(segment.corrupt(at, from, what));
                }
                Some((_, Some(record))) => return Ok(Some(record)),
                Some((_, None)) => {}
                None => self.segment = None,
            }
        }
    }
}

/// Says that positions of a log are gone.
pub(crate) fn missing(log: LogId, from: Position, to: Position) -> String {
    let which = if from == to { format!("position {from}") } else { format!("positions {from} to {to}") };
    format!("{which} of {log} are missing: the file was cut or replaced by an older copy; restore it")
}
