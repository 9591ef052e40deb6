//! A page of a directory in one field: an entry costs its bytes and nothing else, on both sides.
//!
//! Entries follow each other without space between: length of the name (1 byte, never 0), the name, the target's id and
//! the entry's creation time (8 bytes each, little-endian).

use bytes::{Buf as _, Bytes};

use crate::{Refusal, limits::NAME_BYTES_MAX};

/// Bytes of an entry besides its name.
const FIXED_BYTES: usize = 1 + 8 + 8;

/// One name of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    /// The name.
    pub name: Bytes,
    /// The inode that it leads to, as on the wire.
    pub target: u64,
    /// When the entry was made; what later requests must name.
    pub created_at: u64,
}

/// Appends an entry to a page. The name has 1 to [`NAME_BYTES_MAX`] bytes, as every name in a directory has.
pub fn push(page: &mut Vec<u8>, name: &[u8], target: u64, created_at: u64) {
    debug_assert!(!name.is_empty() && name.len() <= NAME_BYTES_MAX);
    page.push(name.len() as u8);
    page.extend_from_slice(name);
    page.extend_from_slice(&target.to_le_bytes());
    page.extend_from_slice(&created_at.to_le_bytes());
}

/// The entries of a page; their names share its bytes.
///
/// # Errors
/// [`Code::Malformed`](crate::types::Code::Malformed) when it is cut short or a name is empty.
pub fn entries(mut page: Bytes) -> Result<Vec<DirEntry>, Refusal> {
    // A guess, bounded by what there is: names are seldom shorter than this.
    let mut entries = Vec::with_capacity(page.len() / (FIXED_BYTES + 4));
    while page.has_remaining() {
        let len = usize::from(page[0]);
        if len == 0 || page.len() < FIXED_BYTES + len {
            return Err(Refusal::malformed("a page of a directory that is cut short"));
        }
        let name = page.slice(1..=len);
        page.advance(1 + len);
        let (target, created_at) = (page.get_u64_le(), page.get_u64_le());
        entries.push(DirEntry { name, target, created_at });
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_come_back_and_every_cut_is_refused() {
        let names: [&[u8]; 3] = [b"a", b"some name", &[b'x'; NAME_BYTES_MAX]];
        let mut page = Vec::new();
        let mut ends = vec![0];
        for (i, name) in names.iter().enumerate() {
            push(&mut page, name, i as u64, u64::MAX - i as u64);
            ends.push(page.len());
        }
        let back = entries(page.clone().into()).expect("whole");
        for (i, (entry, name)) in back.iter().zip(names).enumerate() {
            let expected = (name, i as u64, u64::MAX - i as u64);
            assert_eq!((&entry.name[..], entry.target, entry.created_at), expected);
        }
        for cut in 0..page.len() {
            let read = entries(page[..cut].to_vec().into());
            assert_eq!(read.is_ok(), ends.contains(&cut), "cut at {cut}");
        }
        page[0] = 0;
        assert!(entries(page.into()).is_err());
    }

    #[test]
    fn the_layout_is_part_of_the_protocol() {
        let mut page = Vec::new();
        push(&mut page, b"ab", 0x0102, 0x0304);
        assert_eq!(page, [2, b'a', b'b', 2, 1, 0, 0, 0, 0, 0, 0, 4, 3, 0, 0, 0, 0, 0, 0]);
    }
}
