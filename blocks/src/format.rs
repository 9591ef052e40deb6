//! The bytes of a block file. All numbers are little-endian.
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | `CLUTBLK1` |
//! | 8 | 8 | cluster |
//! | 16 | 8 | service |
//! | 24 | 8 | block |
//! | 32 | 4 | size of the data in bytes, a multiple of 4096 |
//! | 36 | 4 | CRC-32 of the data |
//! | 40 | 8 | time of the grant |
//! | 48 | 4 | CRC-32 of the page table |
//! | 52 | 4 | CRC-32 of bytes 0..52 |
//! | 56 | 4040 | zero |
//! | 4096 | 4 × pages | the page table: CRC-32 of each page of 4096 bytes |
//! | … | | zero up to a multiple of 4096 |
//! | … | size | the data |

use clutch_proto::{
    BlockId, ServiceId,
    limits::{BLOCK_BYTES_MAX, PAGE_BYTES},
};

const MAGIC: &[u8; 8] = b"CLUTBLK1";
/// Bytes of the header with its padding.
pub const HEADER_BYTES: u64 = PAGE_BYTES as u64;
const CHECKED_BYTES: usize = 56;

/// The header of a block file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The cluster that granted the block.
    pub cluster: u64,
    /// The service it was written to.
    pub service: ServiceId,
    /// The block.
    pub block: BlockId,
    /// Bytes of data.
    pub size: u32,
    /// CRC of the data.
    pub crc: u32,
    /// When the write was granted.
    pub time: u64,
    /// CRC of the page table.
    pub table_crc: u32,
}

/// Pages of a block.
pub fn pages(size: u32) -> u64 {
    u64::from(size).div_ceil(u64::from(PAGE_BYTES))
}

/// Where the data begin.
pub fn data_offset(size: u32) -> u64 {
    HEADER_BYTES + (pages(size) * 4).next_multiple_of(u64::from(PAGE_BYTES))
}

/// The checksum of each page.
pub fn page_table(data: &[u8]) -> Vec<u8> {
    data.chunks(PAGE_BYTES as usize).flat_map(|page| crc32fast::hash(page).to_le_bytes()).collect()
}

impl Header {
    /// The header's bytes, padded.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES as usize);
        bytes.extend_from_slice(MAGIC);
        for number in [self.cluster, self.service.0, self.block.0] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.extend_from_slice(&self.size.to_le_bytes());
        bytes.extend_from_slice(&self.crc.to_le_bytes());
        bytes.extend_from_slice(&self.time.to_le_bytes());
        bytes.extend_from_slice(&self.table_crc.to_le_bytes());
        bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
        bytes.resize(HEADER_BYTES as usize, 0);
        bytes
    }

    /// Reads and checks a header.
    pub fn decode(bytes: &[u8]) -> Result<Header, String> {
        if bytes.len() < CHECKED_BYTES {
            return Err(format!("the header is cut short at {} bytes", bytes.len()));
        }
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        if &bytes[..8] != MAGIC {
            return Err("not a block file".into());
        }
        if crc32fast::hash(&bytes[..52]) != u32_at(52) {
            return Err("the header's checksum does not match".into());
        }
        let size = u32_at(32);
        if size == 0 || size > BLOCK_BYTES_MAX || !size.is_multiple_of(PAGE_BYTES) {
            return Err(format!("a size of {size} bytes is not possible"));
        }
        Ok(Header {
            cluster: u64_at(8),
            service: ServiceId(u64_at(16)),
            block: BlockId(u64_at(24)),
            size,
            crc: u32_at(36),
            time: u64_at(40),
            table_crc: u32_at(48),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_header_and_every_flip() {
        let header = Header {
            cluster: 0x0102_0304_0506_0708,
            service: ServiceId(7),
            block: BlockId(0x1ff),
            size: 8192,
            crc: 0xdead_beef,
            time: 99,
            table_crc: 0x1234_5678,
        };
        let bytes = header.encode();
        let golden = include_str!("../../docs/formats/golden/block-header.hex");
        let hex: String = bytes[..CHECKED_BYTES].iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hex, golden.trim());
        assert_eq!(Header::decode(&bytes), Ok(header));
        for bit in 0..CHECKED_BYTES * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::decode(&flipped).is_err(), "bit {bit}");
        }
        assert_eq!(
            (data_offset(4096), data_offset(4096 * 1024), data_offset(4096 * 1025)),
            (8192, 8192, 12288)
        );
    }
}
