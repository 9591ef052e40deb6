//! The bytes of a segment file and of the mark. All numbers are little-endian.
//!
//! Segment file `<number, 16 hex digits>.log`: a header of 32 bytes, then records without space between.
//!
//! | header offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | `CLUTLOG1` |
//! | 8 | 8 | number of the segment |
//! | 16 | 8 | the cluster that the segment belongs to |
//! | 24 | 4 | zero |
//! | 28 | 4 | CRC-32 of bytes 0..28 |
//!
//! | record offset | bytes | what |
//! |---|---|---|
//! | 0 | 4 | `CREC` |
//! | 4 | 4 | CRC-32 of bytes 8..48 |
//! | 8 | 4 | length of the payload |
//! | 12 | 4 | CRC-32 of the payload |
//! | 16 | 8 | log: role in the high 32 bits, number in the low |
//! | 24 | 8 | position |
//! | 32 | 8 | epoch |
//! | 40 | 4 | kind: 1 batch, 2 epoch, 3 seal, 4 groups, 5 packed batch |
//! | 44 | 4 | entries in the payload |
//!
//! A batch's payload is, per entry, its length (4 bytes) and its bytes. A packed batch's payload is the length of
//! that (4 bytes), then that as one LZ4 block; payloads of 512 bytes and more are packed where it saves an eighth.
//! The first record of every segment is of kind `groups`; its payload has 32 bytes per log: log, last position,
//! epoch, position of the seal or 0. So recovery reads one segment, however long the logs are.
//!
//! Positions of a log are contiguous, within a segment and from one to the next: a position that is missing is damage.
//!
//! The mark, file `synced`: two slots of 48 bytes at offsets 0 (even sequences) and 4096 (odd ones), of which one is
//! always durable: `CLUTMRK2`, sequence, segment, offset, first segment, 4 zero bytes, CRC-32 of bytes 0..44. The valid
//! slot with the higher sequence says: every byte before this offset of this segment, and of all segments before, was
//! synced, and segments before the first were trimmed.
//!
//! The index of a closed segment, file `<number>.idx`: `CLUTIDX2`, number of the segment, length of its file, then 24
//! bytes for each log in it (log, first position, last position), then the CRC-32 of all that. Can always be rebuilt.

use std::collections::BTreeMap;

use bytes::Bytes;
use clutch_log::{Batch, Epoch, LogId, Position};

/// What a record is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordKind {
    /// Entries of a log.
    Batch = 1,
    /// A new reign.
    Epoch = 2,
    /// The end of a log.
    Seal = 3,
    /// Where every log stands when the segment begins.
    Groups = 4,
}

impl RecordKind {
    pub(crate) fn from_number(number: u32) -> Option<RecordKind> {
        [RecordKind::Batch, RecordKind::Epoch, RecordKind::Seal, RecordKind::Groups]
            .into_iter()
            .find(|k| *k as u32 == number)
    }
}

/// One record.
#[derive(Clone, Debug)]
pub struct Record {
    /// What it is for.
    pub kind: RecordKind,
    /// The log it belongs to; of no meaning for `Groups`.
    pub log: LogId,
    /// Its place.
    pub position: Position,
    /// The reign.
    pub epoch: Epoch,
    /// Its entries.
    pub entries: Vec<Bytes>,
}

impl Record {
    pub(crate) fn into_batch(self) -> Batch {
        Batch { position: self.position, epoch: self.epoch, entries: self.entries }
    }
}

/// Bytes in front of the first record.
pub const SEGMENT_HEADER_BYTES: u64 = 32;
/// Bytes in front of a record's payload.
pub const RECORD_HEADER_BYTES: usize = 48;
/// Offset of the mark's second slot.
pub(crate) const MARK_SLOT_STRIDE: u64 = 4096;
pub(crate) const MARK_BYTES: usize = 48;
const SEGMENT_MAGIC: &[u8; 8] = b"CLUTLOG1";
const RECORD_MAGIC: &[u8; 4] = b"CREC";
const MARK_MAGIC: &[u8; 8] = b"CLUTMRK2";
/// Larger than any batch with its framing; a longer length is damage.
pub(crate) const PAYLOAD_BYTES_MAX: u32 = 64 << 20;
/// Batches with smaller payloads are not packed: there is little to gain.
pub(crate) const PACKED_BYTES_MIN: usize = 512;
/// The kind of a packed batch; a reader sees a batch.
pub(crate) const PACKED_BATCH: u32 = 5;

pub(crate) fn segment_name(number: u64) -> String {
    format!("{number:016x}.log")
}

pub(crate) fn segment_number(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".log")?;
    (digits.len() == 16).then(|| u64::from_str_radix(digits, 16).ok())?
}

pub(crate) fn segment_header(number: u64, cluster: u64) -> [u8; SEGMENT_HEADER_BYTES as usize] {
    let mut header = [0; SEGMENT_HEADER_BYTES as usize];
    header[..8].copy_from_slice(SEGMENT_MAGIC);
    header[8..16].copy_from_slice(&number.to_le_bytes());
    header[16..24].copy_from_slice(&cluster.to_le_bytes());
    let crc = crc32fast::hash(&header[..28]);
    header[28..].copy_from_slice(&crc.to_le_bytes());
    header
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// Checks a header and returns the cluster that it names.
pub(crate) fn check_segment_header(bytes: &[u8], number: u64) -> Result<u64, String> {
    if bytes.len() < SEGMENT_HEADER_BYTES as usize {
        return Err("the segment header is cut short".into());
    }
    let (found, cluster) = (u64_at(bytes, 8), u64_at(bytes, 16));
    if bytes[..SEGMENT_HEADER_BYTES as usize] != segment_header(found, cluster) {
        return Err("the segment header is damaged".into());
    }
    if found != number {
        return Err(format!("the file holds segment {found:016x}: it was put in the place of another"));
    }
    Ok(cluster)
}

pub(crate) fn log_key(id: LogId) -> u64 {
    u64::from(id.role) << 32 | u64::from(id.number)
}

pub(crate) fn log_id(key: u64) -> LogId {
    LogId { role: (key >> 32) as u8, number: key as u32 }
}

/// Appends a record to `out`.
pub(crate) fn encode_record(
    out: &mut Vec<u8>,
    kind: RecordKind,
    id: LogId,
    position: Position,
    epoch: Epoch,
    entries: &[Bytes],
) {
    let start = out.len();
    out.resize(start + RECORD_HEADER_BYTES, 0);
    for entry in entries {
        // Checked against the batch limit before it came here, so it fits.
        out.extend_from_slice(&(entry.len() as u32).to_le_bytes());
        out.extend_from_slice(entry);
    }
    let payload = start + RECORD_HEADER_BYTES;
    let is_packed = kind == RecordKind::Batch && pack(out, payload);
    let kind = if is_packed { PACKED_BATCH } else { kind as u32 };
    let payload_len = (out.len() - payload) as u32;
    let payload_crc = crc32fast::hash(&out[payload..]);
    let header = &mut out[start..payload];
    header[..4].copy_from_slice(RECORD_MAGIC);
    header[8..12].copy_from_slice(&payload_len.to_le_bytes());
    header[12..16].copy_from_slice(&payload_crc.to_le_bytes());
    header[16..24].copy_from_slice(&log_key(id).to_le_bytes());
    header[24..32].copy_from_slice(&position.0.to_le_bytes());
    header[32..40].copy_from_slice(&epoch.0.to_le_bytes());
    header[40..44].copy_from_slice(&kind.to_le_bytes());
    header[44..48].copy_from_slice(&(entries.len() as u32).to_le_bytes());
    let crc = crc32fast::hash(&header[8..]);
    header[4..8].copy_from_slice(&crc.to_le_bytes());
}

/// Packs everything from `payload` on if that saves enough, and says whether it did.
fn pack(out: &mut Vec<u8>, payload: usize) -> bool {
    let plain = &out[payload..];
    let len = plain.len();
    if len < PACKED_BYTES_MIN {
        return false;
    }
    let block = lz4_flex::block::compress(plain);
    if block.len() + 4 > len - len / 8 {
        return false;
    }
    out.truncate(payload);
    // A batch is smaller than the limit of a payload, so its length fits.
    out.extend_from_slice(&(len as u32).to_le_bytes());
    out.extend_from_slice(&block);
    true
}

/// What [`pack`] was given.
fn unpack(payload: &[u8]) -> Result<Bytes, String> {
    let (len, block) = payload.split_first_chunk::<4>().ok_or("a packed batch's length is cut short")?;
    let len = u32::from_le_bytes(*len);
    if len > PAYLOAD_BYTES_MAX {
        return Err(format!("a packed batch of {len} bytes is over the limit"));
    }
    let plain = lz4_flex::block::decompress(block, len as usize)
        .map_err(|error| format!("a packed batch cannot be unpacked: {error}"))?;
    if plain.len() != len as usize {
        return Err(format!("a packed batch has {} bytes instead of {len}", plain.len()));
    }
    Ok(plain.into())
}

/// A record's header, checked.
pub(crate) struct RecordHeader {
    pub(crate) kind: RecordKind,
    pub(crate) log: LogId,
    pub(crate) position: Position,
    pub(crate) epoch: Epoch,
    pub(crate) payload_len: u32,
    is_packed: bool,
    payload_crc: u32,
    entries: u32,
}

pub(crate) fn decode_header(bytes: &[u8]) -> Result<RecordHeader, String> {
    if bytes.len() < RECORD_HEADER_BYTES {
        return Err("the record's header is cut short".into());
    }
    if &bytes[..4] != RECORD_MAGIC {
        return Err("no record begins here".into());
    }
    if crc32fast::hash(&bytes[8..RECORD_HEADER_BYTES]) != u32_at(bytes, 4) {
        return Err("the header's checksum does not match".into());
    }
    let payload_len = u32_at(bytes, 8);
    if payload_len > PAYLOAD_BYTES_MAX {
        return Err(format!("a payload of {payload_len} bytes is over the limit"));
    }
    let number = u32_at(bytes, 40);
    let is_packed = number == PACKED_BATCH;
    let kind = if is_packed { Some(RecordKind::Batch) } else { RecordKind::from_number(number) };
    Ok(RecordHeader {
        kind: kind.ok_or_else(|| format!("unknown record kind {number}"))?,
        is_packed,
        log: log_id(u64_at(bytes, 16)),
        position: Position(u64_at(bytes, 24)),
        epoch: Epoch(u64_at(bytes, 32)),
        payload_len,
        payload_crc: u32_at(bytes, 12),
        entries: u32_at(bytes, 44),
    })
}

pub(crate) fn decode_payload(header: &RecordHeader, payload: Bytes) -> Result<Record, String> {
    if payload.len() != header.payload_len as usize {
        return Err("the payload is cut short".into());
    }
    if crc32fast::hash(&payload) != header.payload_crc {
        return Err("the payload's checksum does not match".into());
    }
    let payload = if header.is_packed { unpack(&payload)? } else { payload };
    let mut entries = Vec::with_capacity(header.entries.min(4096) as usize);
    let mut at = 0;
    for _ in 0..header.entries {
        let end = at + 4;
        if end > payload.len() {
            return Err("an entry's length is cut short".into());
        }
        let len = u32_at(&payload, at) as usize;
        if payload.len() - end < len {
            return Err("an entry is longer than its record".into());
        }
        entries.push(payload.slice(end..end + len));
        at = end + len;
    }
    if at != payload.len() {
        return Err("bytes are left over after the last entry".into());
    }
    let RecordHeader { kind, log, position, epoch, .. } = *header;
    Ok(Record { kind, log, position, epoch, entries })
}

/// One line of a `groups` record.
pub(crate) struct GroupLine {
    pub(crate) log: LogId,
    pub(crate) last: Position,
    pub(crate) epoch: Epoch,
    pub(crate) sealed: Option<Position>,
}

pub(crate) fn encode_group(line: &GroupLine) -> Bytes {
    let mut bytes = Vec::with_capacity(32);
    for number in [log_key(line.log), line.last.0, line.epoch.0, line.sealed.map_or(0, |p| p.0)] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    bytes.into()
}

pub(crate) fn decode_group(bytes: &[u8]) -> Result<GroupLine, String> {
    if bytes.len() != 32 {
        return Err("a line of the groups record is not 32 bytes long".into());
    }
    Ok(GroupLine {
        log: log_id(u64_at(bytes, 0)),
        last: Position(u64_at(bytes, 8)),
        epoch: Epoch(u64_at(bytes, 16)),
        sealed: Some(Position(u64_at(bytes, 24))).filter(|p| p.0 != 0),
    })
}

/// Everything before `offset` of `segment` was synced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) struct Mark {
    pub(crate) sequence: u64,
    pub(crate) segment: u64,
    pub(crate) offset: u64,
    /// The first segment that was not trimmed.
    pub(crate) first: u64,
}

impl Mark {
    /// The next mark: behind this one, or as far.
    pub(crate) fn moved_on(self, step: u64, segment: u64, offset: u64) -> Mark {
        assert!(step > 0, "every mark has a number of its own");
        assert!(
            (self.segment, self.offset) <= (segment, offset),
            "the mark only moves on: {self:?}, then {offset} of {segment}"
        );
        Mark { sequence: self.sequence + step, segment, offset, first: self.first }
    }
}

/// Where a mark has its place: two take turns, so that one that is torn leaves the one before.
pub(crate) fn mark_offset(mark: Mark) -> u64 {
    mark.sequence % 2 * MARK_SLOT_STRIDE
}

pub(crate) fn encode_mark(mark: Mark) -> [u8; MARK_BYTES] {
    let mut bytes = [0; MARK_BYTES];
    bytes[..8].copy_from_slice(MARK_MAGIC);
    bytes[8..16].copy_from_slice(&mark.sequence.to_le_bytes());
    bytes[16..24].copy_from_slice(&mark.segment.to_le_bytes());
    bytes[24..32].copy_from_slice(&mark.offset.to_le_bytes());
    bytes[32..40].copy_from_slice(&mark.first.to_le_bytes());
    let crc = crc32fast::hash(&bytes[..44]);
    bytes[44..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

pub(crate) fn decode_mark(bytes: &[u8]) -> Option<Mark> {
    (bytes.len() == MARK_BYTES
        && &bytes[..8] == MARK_MAGIC
        && crc32fast::hash(&bytes[..44]) == u32_at(bytes, 44))
    .then(|| Mark {
        sequence: u64_at(bytes, 8),
        segment: u64_at(bytes, 16),
        offset: u64_at(bytes, 24),
        first: u64_at(bytes, 32),
    })
}

const INDEX_MAGIC: &[u8; 8] = b"CLUTIDX2";

/// What a closed segment holds, as its index says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Index {
    pub(crate) number: u64,
    /// Length of the segment's file in bytes.
    pub(crate) bytes: u64,
    /// Of each log in it, the first and the last position.
    pub(crate) spans: BTreeMap<LogId, (Position, Position)>,
}

pub(crate) fn encode_index(index: &Index) -> Vec<u8> {
    let mut bytes = INDEX_MAGIC.to_vec();
    bytes.extend_from_slice(&index.number.to_le_bytes());
    bytes.extend_from_slice(&index.bytes.to_le_bytes());
    for (id, (first, last)) in &index.spans {
        for number in [log_key(*id), first.0, last.0] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
    }
    bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
    bytes
}

pub(crate) fn decode_index(bytes: &[u8]) -> Option<Index> {
    let (body, crc) = bytes.split_at_checked(bytes.len().checked_sub(4)?)?;
    if crc32fast::hash(body).to_le_bytes() != crc {
        return None;
    }
    let (head, lines) = body.split_at_checked(24)?;
    if &head[..8] != INDEX_MAGIC || lines.len() % 24 != 0 {
        return None;
    }
    let spans = lines
        .chunks_exact(24)
        .map(|l| (log_id(u64_at(l, 0)), (Position(u64_at(l, 8)), Position(u64_at(l, 16)))))
        .collect();
    Some(Index { number: u64_at(head, 8), bytes: u64_at(head, 16), spans })
}
