//! The state hash: a sum over all hashed rows that costs O(1) for each write, whatever their order.
//!
//! Each row counts as XXH3-128 of table, key length, key and value, or instead of a large table's value its digest; a slot's sum is the wrapping sum of its rows
//! and the state's hash the sum of the slots'. It finds divergence and rot; it is no defence against someone who
//! chooses rows to collide (an additive hash cannot be), and nothing relies on that.

use std::fmt;

use clutch_proto::mutants::{self, Mutant};
use xxhash_rust::xxh3::xxh3_128;

use crate::store::Table;

/// The hash of a whole state.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct StateHash(pub u128);

impl StateHash {
    /// 16 bytes, little-endian.
    pub fn to_bytes(self) -> [u8; 16] {
        self.0.to_le_bytes()
    }

    /// `None` unless there are 16 bytes.
    pub fn from_bytes(bytes: &[u8]) -> Option<StateHash> {
        Some(StateHash(u128::from_le_bytes(bytes.try_into().ok()?)))
    }
}

impl fmt::Debug for StateHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Display for StateHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// What a large value counts as, and is known by: 16 bytes, XXH3-128, little-endian.
pub type Digest = [u8; 16];

/// The digest of a value.
pub fn digest(value: &[u8]) -> Digest {
    xxh3_128(value).to_le_bytes()
}

/// What one row counts.
pub fn row_hash(table: Table, key: &[u8], value: &[u8]) -> u128 {
    match table.is_large() {
        true => hash_of(table, key, &digest(value)),
        false => hash_of(table, key, value),
    }
}

fn hash_of(table: Table, key: &[u8], value: &[u8]) -> u128 {
    let parts = [&[table.0][..], &(key.len() as u32).to_le_bytes(), key, value];
    let mut room = [0; 256];
    let len = 5 + key.len() + value.len();
    let Some(bytes) = room.get_mut(..len) else { return xxh3_128(&parts.concat()) };
    bytes[0] = table.0;
    bytes[1..5].copy_from_slice(parts[1]);
    bytes[5..5 + key.len()].copy_from_slice(key);
    bytes[5 + key.len()..].copy_from_slice(value);
    xxh3_128(bytes)
}

/// The sums of the 256 slots.
#[derive(Clone)]
pub struct Sums {
    lanes: Box<[u128; 256]>,
    /// Bits of the lanes that changed.
    dirty: [u64; 4],
    total: u128,
}

impl Default for Sums {
    fn default() -> Sums {
        Sums { lanes: Box::new([0; 256]), dirty: [0; 4], total: 0 }
    }
}

impl Sums {
    /// Takes a row's old value out and its new one in.
    pub fn replace(&mut self, table: Table, key: &[u8], old: Option<&[u8]>, new: Option<&[u8]>) {
        if !table.is_hashed() || old == new {
            return;
        }
        if new.is_none() && mutants::is(Mutant::HashIgnoresDelete) {
            return;
        }
        let gone = old.map_or(0, |v| row_hash(table, key, v));
        let come = new.map_or(0, |v| row_hash(table, key, v));
        self.change(table, key, come.wrapping_sub(gone));
    }

    /// Takes a row of a large table out, of which only the digest of its value is known.
    pub fn remove_large(&mut self, table: Table, key: &[u8], digest: &Digest) {
        self.change(table, key, 0u128.wrapping_sub(hash_of(table, key, digest)));
    }

    fn change(&mut self, table: Table, key: &[u8], change: u128) {
        let lane = usize::from(table.lane(key));
        self.lanes[lane] = self.lanes[lane].wrapping_add(change);
        self.total = self.total.wrapping_add(change);
        self.dirty[lane / 64] |= 1 << (lane % 64);
    }

    /// The hash of the whole state.
    pub fn total(&self) -> StateHash {
        StateHash(self.total)
    }

    /// One slot's sum.
    pub fn lane(&self, lane: u8) -> u128 {
        self.lanes[usize::from(lane)]
    }

    /// Sets a slot's sum when a state is opened.
    pub fn load(&mut self, lane: u8, sum: u128) {
        let lane = usize::from(lane);
        self.total = self.total.wrapping_sub(self.lanes[lane]).wrapping_add(sum);
        self.lanes[lane] = sum;
    }

    /// The sums that changed since the last call.
    pub fn take_dirty(&mut self) -> Vec<(u8, u128)> {
        let mut changed = Vec::new();
        for (word, bits) in self.dirty.iter_mut().enumerate() {
            while *bits != 0 {
                let lane = word * 64 + bits.trailing_zeros() as usize;
                *bits &= *bits - 1;
                changed.push((lane as u8, self.lanes[lane]));
            }
        }
        changed
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn a_row_counts_as_the_page_of_formats_says_however_long_it_is() {
        for (key_len, value_len) in
            [(0, 0), (1, 0), (0, 1), (9, 242), (9, 241), (9, 243), (255, 1), (300, 2000)]
        {
            let (key, value) = (vec![3u8; key_len], vec![5u8; value_len]);
            let plain = [&[7][..], &(key_len as u32).to_le_bytes(), &key, &value].concat();
            assert_eq!(row_hash(Table(7), &key, &value), xxh3_128(&plain), "{key_len} and {value_len} bytes");
        }
        // A large value counts as its digest.
        let value = vec![5u8; 70_000];
        let plain = [&[200][..], &2u32.to_le_bytes(), b"ab", &xxh3_128(&value).to_le_bytes()].concat();
        assert_eq!(row_hash(Table(200), b"ab", &value), xxh3_128(&plain));
        // Where the key ends is part of it.
        assert_ne!(row_hash(Table(7), b"ab", b"c"), row_hash(Table(7), b"a", b"bc"));
    }

    #[test]
    fn hashes_are_sixteen_bytes_and_thirty_two_digits() {
        let hash = StateHash(0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10);
        assert_eq!(hash.to_bytes()[..2], [0x10, 0x0f]);
        assert_eq!(StateHash::from_bytes(&hash.to_bytes()), Some(hash));
        assert_eq!(StateHash::from_bytes(&[0; 15]), None);
        assert_eq!(hash.to_string(), "0102030405060708090a0b0c0d0e0f10");
        assert_eq!(format!("{:?}", StateHash(1)), format!("{:032x}", 1));
    }

    /// The sums of all rows, counted anew.
    fn counted(rows: &BTreeMap<(u8, Vec<u8>), Vec<u8>>) -> (BTreeMap<u8, u128>, u128) {
        let (mut lanes, mut total) = (BTreeMap::new(), 0u128);
        for ((table, key), value) in rows.iter().filter(|((table, _), _)| Table(*table).is_hashed()) {
            let hash = row_hash(Table(*table), key, value);
            let lane: &mut u128 = lanes.entry(Table(*table).lane(key)).or_default();
            *lane = lane.wrapping_add(hash);
            total = total.wrapping_add(hash);
        }
        (lanes, total)
    }

    #[test]
    fn the_sums_are_those_of_the_rows_that_are_there_and_what_changed_is_told_once() {
        let mut rows: BTreeMap<(u8, Vec<u8>), Vec<u8>> = BTreeMap::new();
        let (mut sums, mut stored) = (Sums::default(), BTreeMap::<u8, u128>::new());
        for step in 0..4000u64 {
            let draw = step.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
            let table = [Table::SUMS.0, Table::CLIENTS.0, 64, 70][(draw % 4) as usize];
            let key = vec![(draw >> 3) as u8, (draw >> 11) as u8 % 4];
            let new = (draw >> 13 & 3 != 0).then(|| vec![(draw >> 17) as u8; (draw >> 25) as usize % 5]);
            let old = rows.get(&(table, key.clone())).cloned();
            sums.replace(Table(table), &key, old.as_deref(), new.as_deref());
            match new {
                Some(new) => drop(rows.insert((table, key), new)),
                None => drop(rows.remove(&(table, key))),
            }
            if step % 37 == 0 {
                stored.extend(sums.take_dirty());
                assert_eq!(sums.take_dirty(), [], "it is told once");
                let (lanes, total) = counted(&rows);
                assert_eq!(sums.total(), StateHash(total), "step {step}");
                for lane in 0..=255 {
                    let expected = lanes.get(&lane).copied().unwrap_or(0);
                    assert_eq!(
                        (sums.lane(lane), stored.get(&lane).copied().unwrap_or(0)),
                        (expected, expected)
                    );
                }
            }
        }
        stored.extend(sums.take_dirty());
        // Opened anew from what was stored, in any order and more than once.
        let mut opened = Sums::default();
        for (lane, sum) in stored.iter().rev().chain(&stored) {
            opened.load(*lane, *sum);
        }
        assert_eq!((opened.total(), opened.lane(3)), (sums.total(), sums.lane(3)));
        assert_eq!(opened.take_dirty(), [], "nothing changed");
    }
}
