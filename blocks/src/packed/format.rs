//! The bytes of packed blocks. All numbers are little-endian.
//!
//! A segment, `packed/<number in 8 hex digits>.pack`:
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | `CLUTPAK1` |
//! | 8 | 8 | cluster |
//! | 16 | 8 | service |
//! | 24 | 8 | number of the segment |
//! | 32 | 8 | salt: random, so that nothing that is stored in a block can look like a record |
//! | 40 | 20 | zero |
//! | 60 | 4 | CRC-32 of bytes 0..60 |
//! | 64 | | records, each at a multiple of 8 |
//!
//! A record:
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 4 | `CBLK`, a block; `CDED`, only that a record is dead |
//! | 4 | 4 | bytes of data that are stored; what a block has behind them is zeros |
//! | 8 | 8 | block |
//! | 16 | 4 | size of the block in bytes, a multiple of 4096; zero of `CDED`, as what follows up to 36 |
//! | 20 | 4 | CRC-32 of the block's data |
//! | 24 | 8 | time of the grant |
//! | 32 | 4 | CRC-32 of the page table |
//! | 36 | 12 | the record of the block that is dead from here on: its segment, where it begins, its length; zeros for none |
//! | 48 | 4 | zero |
//! | 52 | 4 | CRC-32 of bytes 0..52, the salt, the segment's number in 4 bytes and the record's offset in 4 |
//! | 56 | 4 × pages | the page table: CRC-32 of each page of 4096 bytes of which something is stored, filled up with zeros |
//! | … | stored | the data; then zeros up to a multiple of 8 |
//!
//! What a closed segment has is told by `packed/<number>.index`, so that it need not be read whole:
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | `CLUTPSX1` |
//! | 8 | 4 | number of the segment |
//! | 12 | 4 | bytes of the segment |
//! | 16 | 8 | its salt |
//! | 24 | 4 | number of records |
//! | 28 | 32 × records | block (8), offset, length, 1 of a block and 0 of `CDED`, and the dead record's segment, offset and length |
//! | … | 4 | CRC-32 of what is before |

use clutch_proto::{
    BlockId, ServiceId,
    limits::{BLOCK_BYTES_MAX, PAGE_BYTES},
};

use crate::format::pages;

const SEGMENT_MAGIC: &[u8; 8] = b"CLUTPAK1";
const INDEX_MAGIC: &[u8; 8] = b"CLUTPSX1";
const BLOCK_MAGIC: &[u8; 4] = b"CBLK";
const DEAD_MAGIC: &[u8; 4] = b"CDED";
/// Bytes of a segment before its first record.
pub const SEGMENT_HEADER_BYTES: u32 = 64;
/// Bytes of a record before its page table.
pub const RECORD_HEADER_BYTES: u32 = 56;
/// Records begin at multiples of this.
pub const ALIGNMENT: u32 = 8;
/// Bytes of a record's header before its checksum.
const CHECKED_BYTES: usize = RECORD_HEADER_BYTES as usize - 4;
const ENTRY_BYTES: usize = 32;
const INDEX_HEADER_BYTES: usize = 28;

/// Where a record lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Location {
    /// The segment's number; the first one is 1.
    pub segment: u32,
    /// Where it begins.
    pub offset: u32,
    /// Its bytes.
    pub length: u32,
}

/// What a segment is known by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentHeader {
    /// The cluster that granted its blocks.
    pub cluster: u64,
    /// The service that they were written to.
    pub service: ServiceId,
    /// Its number.
    pub number: u32,
    /// Part of the checksum of each record.
    pub salt: u64,
}

/// The beginning of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordHeader {
    /// A block.
    Block {
        /// Which.
        block: BlockId,
        /// Its size.
        size: u32,
        /// CRC of its data.
        crc: u32,
        /// When it was granted.
        time: u64,
        /// Bytes of data that are stored.
        stored: u32,
        /// CRC of the page table.
        table_crc: u32,
        /// The record in whose place it is, which is dead from here on.
        replaces: Option<Location>,
    },
    /// A record of a block is dead.
    Dead {
        /// Which block.
        block: BlockId,
        /// Which record.
        at: Location,
    },
}

fn location_at(bytes: &[u8], at: usize) -> Option<Location> {
    let location =
        Location { segment: u32_at(bytes, at), offset: u32_at(bytes, at + 4), length: u32_at(bytes, at + 8) };
    (location.segment > 0).then_some(location)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

impl SegmentHeader {
    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = SEGMENT_MAGIC.to_vec();
        for number in [self.cluster, self.service.0, u64::from(self.number), self.salt] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.resize(60, 0);
        bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
        bytes
    }

    /// Reads and checks it.
    pub fn decode(bytes: &[u8]) -> Result<SegmentHeader, String> {
        let Some(bytes) = bytes.get(..SEGMENT_HEADER_BYTES as usize) else {
            return Err(format!("the header is cut short at {} bytes", bytes.len()));
        };
        if &bytes[..8] != SEGMENT_MAGIC {
            return Err("not a segment of blocks".into());
        }
        if crc32fast::hash(&bytes[..60]) != u32_at(bytes, 60) {
            return Err("the header's checksum does not match".into());
        }
        let number = u32::try_from(u64_at(bytes, 24)).map_err(|_| "no segment has such a number")?;
        let (cluster, service) = (u64_at(bytes, 8), ServiceId(u64_at(bytes, 16)));
        Ok(SegmentHeader { cluster, service, number, salt: u64_at(bytes, 32) })
    }
}

/// Bytes of a record with so many bytes of data.
pub fn record_length(stored: u32) -> u32 {
    (RECORD_HEADER_BYTES + 4 * pages(stored) as u32 + stored).next_multiple_of(ALIGNMENT)
}

impl RecordHeader {
    /// Bytes of the whole record.
    pub fn length(&self) -> u32 {
        match self {
            RecordHeader::Block { stored, .. } => record_length(*stored),
            RecordHeader::Dead { .. } => RECORD_HEADER_BYTES,
        }
    }

    /// The bytes of one that lies at an offset of a segment.
    pub fn encode(&self, segment: &SegmentHeader, offset: u32) -> [u8; RECORD_HEADER_BYTES as usize] {
        let mut bytes = [0; RECORD_HEADER_BYTES as usize];
        let (magic, stored, block, numbers, time, table_crc, dead) = match *self {
            RecordHeader::Block { block, size, crc, time, stored, table_crc, replaces } => {
                (BLOCK_MAGIC, stored, block, [size, crc], time, table_crc, replaces)
            }
            RecordHeader::Dead { block, at } => (DEAD_MAGIC, 0, block, [0; 2], 0, 0, Some(at)),
        };
        bytes[..4].copy_from_slice(magic);
        bytes[4..8].copy_from_slice(&stored.to_le_bytes());
        bytes[8..16].copy_from_slice(&block.0.to_le_bytes());
        bytes[16..20].copy_from_slice(&numbers[0].to_le_bytes());
        bytes[20..24].copy_from_slice(&numbers[1].to_le_bytes());
        bytes[24..32].copy_from_slice(&time.to_le_bytes());
        bytes[32..36].copy_from_slice(&table_crc.to_le_bytes());
        let dead = dead.map_or([0; 3], |at| [at.segment, at.offset, at.length]);
        for (number, place) in dead.iter().zip(bytes[36..48].chunks_mut(4)) {
            place.copy_from_slice(&number.to_le_bytes());
        }
        let crc = header_crc(&bytes[..CHECKED_BYTES], segment, offset);
        bytes[CHECKED_BYTES..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads and checks one that lies at an offset of a segment.
    pub fn decode(bytes: &[u8], segment: &SegmentHeader, offset: u32) -> Result<RecordHeader, String> {
        let Some(bytes) = bytes.get(..RECORD_HEADER_BYTES as usize) else {
            return Err(format!("the record is cut short at {} bytes", bytes.len()));
        };
        let is_block = &bytes[..4] == BLOCK_MAGIC;
        if !is_block && &bytes[..4] != DEAD_MAGIC {
            return Err("no record begins here".into());
        }
        if header_crc(&bytes[..CHECKED_BYTES], segment, offset) != u32_at(bytes, CHECKED_BYTES) {
            return Err("the record's checksum does not match".into());
        }
        let (block, dead) = (BlockId(u64_at(bytes, 8)), location_at(bytes, 36));
        if !is_block {
            let at = dead.ok_or("it says that nothing is dead")?;
            return Ok(RecordHeader::Dead { block, at });
        }
        let (stored, size, crc) = (u32_at(bytes, 4), u32_at(bytes, 16), u32_at(bytes, 20));
        let is_possible = size > 0 && size <= BLOCK_BYTES_MAX && size.is_multiple_of(PAGE_BYTES);
        if !is_possible || stored > size {
            return Err(format!("a size of {size} bytes, {stored} of them stored, is not possible"));
        }
        let (time, table_crc) = (u64_at(bytes, 24), u32_at(bytes, 32));
        Ok(RecordHeader::Block { block, size, crc, time, stored, table_crc, replaces: dead })
    }
}

fn header_crc(bytes: &[u8], segment: &SegmentHeader, offset: u32) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(bytes);
    hasher.update(&segment.salt.to_le_bytes());
    hasher.update(&segment.number.to_le_bytes());
    hasher.update(&offset.to_le_bytes());
    hasher.finalize()
}

/// What one record of a segment says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The block that it is about.
    pub block: BlockId,
    /// Where the record lies.
    pub offset: u32,
    /// Its bytes.
    pub length: u32,
    /// Whether it is a block.
    pub is_block: bool,
    /// The record that is dead from here on.
    pub dead: Option<Location>,
}

/// The index of a closed segment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SegmentIndex {
    /// The segment's number.
    pub number: u32,
    /// Bytes of the segment.
    pub bytes: u32,
    /// Its salt.
    pub salt: u64,
    /// Its records, in order.
    pub entries: Vec<Entry>,
}

impl SegmentIndex {
    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = INDEX_MAGIC.to_vec();
        let mut put = |number: u32| bytes.extend_from_slice(&number.to_le_bytes());
        let salt = [self.salt as u32, (self.salt >> 32) as u32];
        let head = [self.number, self.bytes, salt[0], salt[1], self.entries.len() as u32];
        head.into_iter().for_each(&mut put);
        for entry in &self.entries {
            let dead = entry.dead.map_or([0; 3], |at| [at.segment, at.offset, at.length]);
            put(entry.block.0 as u32);
            put((entry.block.0 >> 32) as u32);
            let own = [entry.offset, entry.length, u32::from(entry.is_block)];
            own.into_iter().chain(dead).for_each(&mut put);
        }
        let crc = crc32fast::hash(&bytes);
        bytes.extend_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads and checks it; `None` when it is damaged.
    pub fn decode(bytes: &[u8]) -> Option<SegmentIndex> {
        let (checked, crc) = bytes.split_at_checked(bytes.len().checked_sub(4)?)?;
        if checked.len() < INDEX_HEADER_BYTES
            || &checked[..8] != INDEX_MAGIC
            || crc32fast::hash(checked) != u32_at(crc, 0)
        {
            return None;
        }
        let lines = &checked[INDEX_HEADER_BYTES..];
        if lines.len() != (u32_at(checked, 24) as usize).checked_mul(ENTRY_BYTES)? {
            return None;
        }
        let entry = |line: &[u8]| Entry {
            block: BlockId(u64_at(line, 0)),
            offset: u32_at(line, 8),
            length: u32_at(line, 12),
            is_block: u32_at(line, 16) == 1,
            dead: location_at(line, 20),
        };
        let entries = lines.chunks_exact(ENTRY_BYTES).map(entry).collect();
        let (number, bytes, salt) = (u32_at(checked, 8), u32_at(checked, 12), u64_at(checked, 16));
        Some(SegmentIndex { number, bytes, salt, entries })
    }
}

/// The file of a segment.
pub fn segment_name(number: u32) -> String {
    format!("{number:08x}.pack")
}

/// The file of a closed segment's index.
pub fn index_name(number: u32) -> String {
    format!("{number:08x}.index")
}

/// The segment that a file is of, or its index.
pub fn number_of(name: &str, ending: &str) -> Option<u32> {
    let number = name.strip_suffix(ending).filter(|digits| digits.len() == 8)?;
    u32::from_str_radix(number, 16).ok().filter(|number| *number > 0)
}
