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
//! | 16 | 8 | group: number of the log in the low 32 bits, its role in the next 8, the incarnation less 1 in the high 24 |
//! | 24 | 8 | position |
//! | 32 | 8 | epoch |
//! | 40 | 4 | kind: 1 batch, 2 epoch, 3 seal, 4 groups, 5 packed batch, 6 vote, 7 truncate, 8 members, 9 base, 10 remove |
//! | 44 | 4 | entries in the payload |
//!
//! A batch's payload is, per entry, its length (4 bytes) and its bytes. A packed batch's payload is the length of
//! that (4 bytes), then that as one LZ4 block; payloads of 512 bytes and more are packed where it saves an eighth.
//! Records of the kinds batch, epoch, seal and members have a position, the one after the group's last. The others have none
//! of their own: a vote holds what its engine wants to find again, in one entry, and the newest counts; truncate takes
//! everything from its position on away; base everything up to it, and where the group does not reach so far it goes on
//! behind it, with the members that its entry names, if it has one; after remove the group is no more.
//!
//! The first record of every segment is of kind `groups`; its payload has at least 32 bytes per group: group, last position,
//! epoch, position of the seal or 0. A group that has a base, a vote, members or was removed has more: position and epoch
//! of the base, flags (4 bytes: 1 there is a vote, 2 removed, 4 a record of it was damaged), number of members records (4), the vote (epoch, length in 4
//! bytes, bytes), and of each members record position, length in 4 bytes, bytes. So recovery reads one segment, however
//! long the logs are.
//!
//! Positions of a group are contiguous, within a segment and from one to the next: a position that is missing is damage.
//!
//! The mark, file `synced`: two slots of 48 bytes at offsets 0 (even sequences) and 4096 (odd ones), of which one is
//! always durable: `CLUTMRK2`, sequence, segment, offset, first segment, 4 zero bytes, CRC-32 of bytes 0..44. The valid
//! slot with the higher sequence says: every byte before this offset of this segment, and of all segments before, was
//! synced, and segments before the first were trimmed.
//!
//! The index of a closed segment, file `<number>.idx`: `CLUTIDX3`, number of the segment, length of its file, how many groups
//! it has, then 48 bytes for each (group, first and last position or 0, position from which the segment restarted it or 0,
//! 4 bytes: 0 did not, 1 cut there, 2 began anew; CRC-32 of its offsets; where those begin in this file), then the CRC-32 of
//! all that. Behind it the offsets in the segment of each group's records, 4 bytes each. Can always be rebuilt.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use clutch_log::{Batch, Epoch, INCARNATION_MAX, LogId, LogletId, Position};

use crate::{
    span::{Restart, Span},
    vote::Vote,
};

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
    /// What an engine has promised to its group.
    Vote = 6,
    /// Everything from its position on is gone.
    Truncate = 7,
    /// Who belongs to the group.
    Members = 8,
    /// Everything up to its position is gone, whether it was here or not.
    Base = 9,
    /// The group is no more.
    Remove = 10,
}

impl RecordKind {
    pub(crate) fn from_number(number: u32) -> Option<RecordKind> {
        use RecordKind::{Base, Batch, Epoch, Groups, Members, Remove, Seal, Truncate, Vote};
        [Batch, Epoch, Seal, Groups, Vote, Truncate, Members, Base, Remove]
            .into_iter()
            .find(|k| *k as u32 == number)
    }

    /// Whether records of the kind take a position of their group.
    pub fn has_position(self) -> bool {
        match self {
            RecordKind::Batch | RecordKind::Epoch | RecordKind::Seal | RecordKind::Members => true,
            RecordKind::Groups
            | RecordKind::Vote
            | RecordKind::Truncate
            | RecordKind::Base
            | RecordKind::Remove => false,
        }
    }
}

/// One record.
#[derive(Clone, Debug)]
pub struct Record {
    /// What it is for.
    pub kind: RecordKind,
    /// The group it belongs to; of no meaning for `Groups`.
    pub group: LogletId,
    /// Its place; of those that take none, the one that they speak of, or 0.
    pub position: Position,
    /// The reign.
    pub epoch: Epoch,
    /// Its entries.
    pub entries: Vec<Bytes>,
}

impl Record {
    /// Its entries in their place.
    pub fn into_batch(self) -> Batch {
        Batch { position: self.position, epoch: self.epoch, entries: self.entries }
    }
}

/// Bytes in front of the first record.
pub const SEGMENT_HEADER_BYTES: u64 = 32;
/// Bytes in front of a record's payload.
pub const RECORD_HEADER_BYTES: usize = 48;
/// Offset of the mark's second slot.
pub const MARK_SLOT_STRIDE: u64 = 4096;
/// Bytes of a slot of the mark.
pub const MARK_BYTES: usize = 48;
const SEGMENT_MAGIC: &[u8; 8] = b"CLUTLOG1";
const RECORD_MAGIC: &[u8; 4] = b"CREC";
const MARK_MAGIC: &[u8; 8] = b"CLUTMRK2";
/// Larger than any batch with its framing; a longer length is damage.
pub const PAYLOAD_BYTES_MAX: u32 = 64 << 20;
/// No log comes so far; a later position is damage.
pub const POSITION_MAX: Position = Position(1 << 62);
/// Batches with smaller payloads are not packed: there is little to gain.
pub const PACKED_BYTES_MIN: usize = 512;
/// The kind of a packed batch; a reader sees a batch.
pub const PACKED_BATCH: u32 = 5;

/// The file of the mark.
pub const MARK_FILE: &str = "synced";

/// Where the index of a segment is.
pub fn index_path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("{number:016x}.idx"))
}

/// Says that positions of a group are gone.
pub(crate) fn missing(id: LogletId, from: Position, to: Position) -> String {
    let which = if from == to { format!("position {from}") } else { format!("positions {from} to {to}") };
    format!("{which} of {id} are missing: the file was cut or replaced by an older copy; restore it")
}

/// The file of a segment.
pub fn segment_name(number: u64) -> String {
    format!("{number:016x}.log")
}

/// The segment of a file; `None` for a file that is none.
pub fn segment_number(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".log")?;
    (digits.len() == 16).then(|| u64::from_str_radix(digits, 16).ok())?
}

/// The bytes in front of a segment's first record.
pub fn segment_header(number: u64, cluster: u64) -> [u8; SEGMENT_HEADER_BYTES as usize] {
    let mut header = [0; SEGMENT_HEADER_BYTES as usize];
    header[..8].copy_from_slice(SEGMENT_MAGIC);
    header[8..16].copy_from_slice(&number.to_le_bytes());
    header[16..24].copy_from_slice(&cluster.to_le_bytes());
    let crc = crc32fast::hash(&header[..28]);
    header[28..].copy_from_slice(&crc.to_le_bytes());
    header
}

/// The number at a place.
pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// Checks a header and returns the cluster that it names.
pub fn check_segment_header(bytes: &[u8], number: u64) -> Result<u64, String> {
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

/// As records name a group.
pub fn group_key(LogletId { log, incarnation }: LogletId) -> u64 {
    assert!((1..=INCARNATION_MAX).contains(&incarnation), "no group has incarnation {incarnation}");
    u64::from(incarnation - 1) << 40 | u64::from(log.role) << 32 | u64::from(log.number)
}

/// The group of a key.
pub fn group_of(key: u64) -> LogletId {
    let log = LogId { role: (key >> 32) as u8, number: key as u32 };
    LogletId { log, incarnation: (key >> 40) as u32 + 1 }
}

/// Appends a record to `out`.
pub fn encode_record(
    out: &mut Vec<u8>,
    kind: RecordKind,
    id: impl Into<LogletId>,
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
    header[16..24].copy_from_slice(&group_key(id.into()).to_le_bytes());
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
pub struct RecordHeader {
    /// What the record is for.
    pub kind: RecordKind,
    /// Whose it is.
    pub group: LogletId,
    /// Its place.
    pub position: Position,
    /// Its reign.
    pub epoch: Epoch,
    /// Bytes behind the header.
    pub payload_len: u32,
    is_packed: bool,
    payload_crc: u32,
    entries: u32,
}

/// Checks a record's header.
pub fn decode_header(bytes: &[u8]) -> Result<RecordHeader, String> {
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
    let position = Position(u64_at(bytes, 24));
    if position > POSITION_MAX {
        return Err(format!("position {position} is over the limit"));
    }
    if payload_len > PAYLOAD_BYTES_MAX {
        return Err(format!("a payload of {payload_len} bytes is over the limit"));
    }
    let number = u32_at(bytes, 40);
    let is_packed = number == PACKED_BATCH;
    let kind = if is_packed { Some(RecordKind::Batch) } else { RecordKind::from_number(number) };
    Ok(RecordHeader {
        kind: kind.ok_or_else(|| format!("unknown record kind {number}"))?,
        is_packed,
        group: group_of(u64_at(bytes, 16)),
        position,
        epoch: Epoch(u64_at(bytes, 32)),
        payload_len,
        payload_crc: u32_at(bytes, 12),
        entries: u32_at(bytes, 44),
    })
}

/// Checks a record's payload.
pub fn decode_payload(header: &RecordHeader, payload: Bytes) -> Result<Record, String> {
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
    let RecordHeader { kind, group, position, epoch, .. } = *header;
    Ok(Record { kind, group, position, epoch, entries })
}

/// A header of which one byte is damaged, as it was: so it is known whose record it is. Chance finds one in a hundred thousand
/// times where there is none, and then the record's payload does not fit.
pub fn mended_header(bytes: &[u8]) -> Option<RecordHeader> {
    let mut header: [u8; RECORD_HEADER_BYTES] = bytes.get(..RECORD_HEADER_BYTES)?.try_into().ok()?;
    for at in 0..RECORD_HEADER_BYTES {
        let damaged = header[at];
        for byte in 0..=u8::MAX {
            header[at] = byte;
            if byte != damaged
                && let Ok(mended) = decode_header(&header)
            {
                return Some(mended);
            }
        }
        header[at] = damaged;
    }
    None
}

/// One line of a `groups` record.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupLine {
    /// The group.
    pub group: LogletId,
    /// Its last position.
    pub last: Position,
    /// Its newest reign.
    pub epoch: Epoch,
    /// Where it was sealed.
    pub sealed: Option<Position>,
    /// The position and the reign that it begins behind.
    pub base: (Position, Epoch),
    /// What its engine has promised.
    pub vote: Option<Vote>,
    /// Who belonged to it from each position on.
    pub members: Vec<(Position, Bytes)>,
    /// Whether it is no more.
    pub is_removed: bool,
    /// Whether a record of it was damaged, and it can only be removed.
    pub is_quarantined: bool,
}

impl GroupLine {
    /// One of a group without base, vote and members.
    pub fn new(
        group: impl Into<LogletId>,
        last: Position,
        epoch: Epoch,
        sealed: Option<Position>,
    ) -> GroupLine {
        let base = (Position(0), Epoch(0));
        GroupLine {
            group: group.into(),
            last,
            epoch,
            sealed,
            base,
            vote: None,
            members: vec![],
            is_removed: false,
            is_quarantined: false,
        }
    }
}

const HAS_VOTE: u32 = 1;
const IS_REMOVED: u32 = 2;
const IS_QUARANTINED: u32 = 4;

/// As the payload of a `groups` record has it.
pub fn encode_group(line: &GroupLine) -> Bytes {
    let mut bytes = Vec::with_capacity(32);
    for number in [group_key(line.group), line.last.0, line.epoch.0, line.sealed.map_or(0, |p| p.0)] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    let is_plain = line.base.0 == Position(0) && line.vote.is_none() && line.members.is_empty();
    if is_plain && !line.is_removed && !line.is_quarantined {
        return bytes.into();
    }
    let sized = |bytes: &mut Vec<u8>, at: u64, content: &Bytes| {
        bytes.extend_from_slice(&at.to_le_bytes());
        // Smaller than the payload of the record that it came with.
        bytes.extend_from_slice(&(content.len() as u32).to_le_bytes());
        bytes.extend_from_slice(content);
    };
    let flags = if line.vote.is_some() { HAS_VOTE } else { 0 }
        | if line.is_removed { IS_REMOVED } else { 0 }
        | if line.is_quarantined { IS_QUARANTINED } else { 0 };
    bytes.extend_from_slice(&line.base.0.0.to_le_bytes());
    bytes.extend_from_slice(&line.base.1.0.to_le_bytes());
    bytes.extend_from_slice(&flags.to_le_bytes());
    bytes.extend_from_slice(&(line.members.len() as u32).to_le_bytes());
    if let Some(vote) = &line.vote {
        sized(&mut bytes, vote.epoch.0, &vote.content);
    }
    line.members.iter().for_each(|(position, content)| sized(&mut bytes, position.0, content));
    bytes.into()
}

/// What [`encode_group`] made.
pub fn decode_group(bytes: &[u8]) -> Result<GroupLine, String> {
    let wrong = || "a line of the groups record has a wrong length".to_owned();
    let (head, mut rest) = bytes.split_at_checked(32).ok_or_else(wrong)?;
    let sealed = Some(Position(u64_at(head, 24))).filter(|p| p.0 != 0);
    let mut line =
        GroupLine::new(group_of(u64_at(head, 0)), Position(u64_at(head, 8)), Epoch(u64_at(head, 16)), sealed);
    if line.last > POSITION_MAX {
        return Err(format!("position {} is over the limit", line.last));
    }
    if rest.is_empty() {
        return Ok(line);
    }
    let (numbers, behind) = rest.split_at_checked(24).ok_or_else(wrong)?;
    rest = behind;
    line.base = (Position(u64_at(numbers, 0)), Epoch(u64_at(numbers, 8)));
    let (flags, members) = (u32_at(numbers, 16), u32_at(numbers, 20));
    line.is_removed = flags & IS_REMOVED != 0;
    line.is_quarantined = flags & IS_QUARANTINED != 0;
    if line.base.0 > POSITION_MAX || flags > HAS_VOTE | IS_REMOVED | IS_QUARANTINED {
        return Err("a line of the groups record says what this build does not know".into());
    }
    let mut sized = || -> Result<(u64, Bytes), String> {
        let (head, behind) = rest.split_at_checked(12).ok_or_else(wrong)?;
        let (content, behind) = behind.split_at_checked(u32_at(head, 8) as usize).ok_or_else(wrong)?;
        rest = behind;
        Ok((u64_at(head, 0), Bytes::copy_from_slice(content)))
    };
    if flags & HAS_VOTE != 0 {
        let (epoch, content) = sized()?;
        line.vote = Some(Vote { epoch: Epoch(epoch), content });
    }
    for _ in 0..members {
        let (position, content) = sized()?;
        line.members.push((Position(position), content));
    }
    if rest.is_empty() { Ok(line) } else { Err(wrong()) }
}

/// Everything before `offset` of `segment` was synced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Mark {
    /// Grows with each mark.
    pub sequence: u64,
    /// The segment up to which everything was synced.
    pub segment: u64,
    /// Where in it.
    pub offset: u64,
    /// The first segment that was not trimmed.
    pub first: u64,
}

impl Mark {
    /// The next mark: behind this one, or as far.
    pub fn moved_on(self, step: u64, segment: u64, offset: u64) -> Mark {
        assert!(step > 0, "every mark has a number of its own");
        assert!(
            (self.segment, self.offset) <= (segment, offset),
            "the mark only moves on: {self:?}, then {offset} of {segment}"
        );
        Mark { sequence: self.sequence + step, segment, offset, first: self.first }
    }
}

/// Where a mark has its place: two take turns, so that one that is torn leaves the one before.
pub fn mark_offset(mark: Mark) -> u64 {
    mark.sequence % 2 * MARK_SLOT_STRIDE
}

/// The bytes of a mark's slot.
pub fn encode_mark(mark: Mark) -> [u8; MARK_BYTES] {
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

/// What [`encode_mark`] made; `None` where it is damaged.
pub fn decode_mark(bytes: &[u8]) -> Option<Mark> {
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

const INDEX_MAGIC: &[u8; 8] = b"CLUTIDX3";
/// More than an index takes before its offsets, however many groups a node has.
pub const INDEX_READ_BYTES_MAX: usize = 8 << 20;
const INDEX_HEAD_BYTES: usize = 32;
const INDEX_LINE_BYTES: usize = 48;

/// What a closed segment holds, as its index says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Index {
    /// Number of the segment.
    pub number: u64,
    /// Length of the segment's file in bytes.
    pub bytes: u64,
    /// What it has of each group. Offsets are there where it is written, and are read apart.
    pub spans: BTreeMap<LogletId, Span>,
}

/// Where an index has the offsets of a group's records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offsets {
    /// Where they begin in the index's file.
    pub start: u64,
    /// How many there are.
    pub count: u64,
    /// The CRC-32 of their bytes.
    pub crc: u32,
}

fn offset_bytes(offsets: &[u32]) -> Vec<u8> {
    offsets.iter().flat_map(|offset| offset.to_le_bytes()).collect()
}

/// The bytes of an index.
pub fn encode_index(index: &Index) -> Vec<u8> {
    let mut bytes = INDEX_MAGIC.to_vec();
    for number in [index.number, index.bytes, index.spans.len() as u64] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    let mut start = (INDEX_HEAD_BYTES + INDEX_LINE_BYTES * index.spans.len() + 4) as u64;
    let mut offsets = Vec::new();
    for (id, span) in &index.spans {
        assert_eq!(span.count(), span.offsets.len() as u64, "{id}: an offset for each record");
        let of = offset_bytes(&span.offsets);
        let (restart, kind) = match span.restart {
            None => (Position(0), 0_u32),
            Some(Restart { at, is_anew: false }) => (at, 1),
            Some(Restart { at, is_anew: true }) => (at, 2),
        };
        for number in [group_key(*id), span.first.0, span.last.0, restart.0] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.extend_from_slice(&kind.to_le_bytes());
        bytes.extend_from_slice(&crc32fast::hash(&of).to_le_bytes());
        bytes.extend_from_slice(&start.to_le_bytes());
        start += of.len() as u64;
        offsets.extend(of);
    }
    bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
    bytes.extend_from_slice(&offsets);
    bytes
}

/// What [`encode_index`] made, but for the offsets; those and where they are for each group. `None` where it is damaged.
pub fn decode_index(bytes: &[u8]) -> Option<(Index, BTreeMap<LogletId, Offsets>)> {
    let head = bytes.get(..INDEX_HEAD_BYTES)?;
    if &head[..8] != INDEX_MAGIC {
        return None;
    }
    let lines = usize::try_from(u64_at(head, 24)).ok()?.checked_mul(INDEX_LINE_BYTES)?;
    let end = INDEX_HEAD_BYTES.checked_add(lines)?;
    let crc = bytes.get(end..end.checked_add(4)?)?;
    if crc32fast::hash(&bytes[..end]).to_le_bytes() != crc {
        return None;
    }
    let (mut spans, mut places) = (BTreeMap::new(), BTreeMap::new());
    for line in bytes[INDEX_HEAD_BYTES..end].chunks_exact(INDEX_LINE_BYTES) {
        let at = Position(u64_at(line, 24));
        let (first, last) = (Position(u64_at(line, 8)), Position(u64_at(line, 16)));
        let is_span = last.0 == 0 && first.0 == 0 || first.0 > 0 && first <= last && last <= POSITION_MAX;
        if !is_span || at > POSITION_MAX {
            return None;
        }
        let restart = match u32_at(line, 32) {
            0 => None,
            _ if at.0 == 0 => return None,
            1 => Some(Restart { at, is_anew: false }),
            2 => Some(Restart { at, is_anew: true }),
            _ => return None,
        };
        let span = Span { first, last, restart, offsets: Vec::new() };
        let group = group_of(u64_at(line, 0));
        let place = Offsets { start: u64_at(line, 40), count: span.count(), crc: u32_at(line, 36) };
        places.insert(group, place);
        spans.insert(group, span);
    }
    Some((Index { number: u64_at(head, 8), bytes: u64_at(head, 16), spans }, places))
}

/// The offsets that lie at their place in an index; `None` where they are damaged.
pub fn decode_offsets(place: Offsets, bytes: &[u8]) -> Option<Vec<u32>> {
    (place.count.checked_mul(4) == Some(bytes.len() as u64) && crc32fast::hash(bytes) == place.crc)
        .then(|| bytes.chunks_exact(4).map(|b| u32_at(b, 0)).collect())
}
