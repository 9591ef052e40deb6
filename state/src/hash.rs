//! The state hash: a sum over all hashed rows that costs O(1) for each write, whatever their order.
//!
//! Each row counts as XXH3-128 of table, key length, key and value; a slot's sum is the wrapping sum of its rows
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

/// What one row counts.
pub fn row_hash(table: Table, key: &[u8], value: &[u8]) -> u128 {
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
        let change = come.wrapping_sub(gone);
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
