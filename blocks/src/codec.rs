//! Reed-Solomon for every (D, P), and mirroring.
//!
//! Encoding is `reed-solomon-simd`'s. What is lost is computed from coefficients: the code is linear over
//! GF(2¹⁶), so every block is a fixed combination of any D others. The coefficients are found once for each
//! pattern, by running the library's decoder on unit vectors of 64 bytes, and applied with its public
//! multiplication; for one lost block that is many times faster than its decoder. With D = 1 all blocks are equal.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use clutch_proto::limits::{DATA_BLOCKS_MAX, PARITY_BLOCKS_MAX};
use reed_solomon_simd::{
    ReedSolomonDecoder, ReedSolomonEncoder,
    engine::{DefaultEngine, Engine as _, tables::get_exp_log},
};

/// Bytes of the unit that the library computes in; every cell is a multiple.
pub const UNIT_BYTES: usize = 64;
/// Patterns whose coefficients are remembered.
const REMEMBERED_MAX: usize = 1024;
/// Encoders that are kept for the next stripe; each has room for a stripe.
const ENCODERS_IDLE_MAX: usize = 2;
/// Encoders of larger cells are not kept: what is idle must not hold much.
const ENCODER_CELL_BYTES_MAX: usize = 1 << 20;

/// Why nothing was computed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum CodecError {
    /// D or P lies outside the limits.
    #[error("{data} data and {parity} parity blocks are not supported")]
    Shape {
        /// Data blocks.
        data: usize,
        /// Parity blocks.
        parity: usize,
    },
    /// Not as many cells as the shape says, or of different or odd sizes.
    #[error("cells must be as many as the shape says and of one size, a multiple of {UNIT_BYTES} bytes")]
    Cells,
    /// Too little is left.
    #[error("{left} blocks are left, {needed} are needed")]
    TooFew {
        /// Blocks at hand.
        left: usize,
        /// D.
        needed: usize,
    },
    /// The library refused; its words.
    #[error("reed-solomon: {0}")]
    Library(String),
}

/// For each of the D blocks at hand, what it counts in every block of the stripe.
type Matrix = Vec<Vec<u16>>;

/// A code of D data and P parity blocks; cheap to share.
pub struct Codec {
    data: usize,
    parity: usize,
    coefficients: Mutex<BTreeMap<Vec<usize>, Arc<Matrix>>>,
    /// Encoders that are not in use, with their room for cells.
    encoders: Mutex<Vec<ReedSolomonEncoder>>,
}

/// What these locks guard is whole between any two statements, also when a thread panicked.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

fn library(error: reed_solomon_simd::Error) -> CodecError {
    CodecError::Library(error.to_string())
}

impl Codec {
    /// A code; refuses shapes outside the limits.
    pub fn new(data: usize, parity: usize) -> Result<Codec, CodecError> {
        if data == 0 || data > DATA_BLOCKS_MAX as usize || parity > PARITY_BLOCKS_MAX as usize {
            return Err(CodecError::Shape { data, parity });
        }
        Ok(Codec { data, parity, coefficients: Mutex::default(), encoders: Mutex::default() })
    }

    /// The parity cells of one stripe.
    pub fn encode(&self, cells: &[impl AsRef<[u8]>]) -> Result<Vec<Vec<u8>>, CodecError> {
        let mut parity = vec![Vec::new(); self.parity];
        self.encode_onto(cells, &mut parity)?;
        Ok(parity)
    }

    /// Appends the parity cells of one stripe to the parity blocks, one for each.
    pub fn encode_onto(&self, cells: &[impl AsRef<[u8]>], parity: &mut [Vec<u8>]) -> Result<(), CodecError> {
        let size = self.check(cells, self.data)?;
        if parity.len() != self.parity {
            return Err(CodecError::Cells);
        }
        if self.parity == 0 {
            return Ok(());
        }
        if self.data == 1 {
            parity.iter_mut().for_each(|block| block.extend_from_slice(cells[0].as_ref()));
            return Ok(());
        }
        let idle = lock(&self.encoders).pop();
        let mut encoder = match idle {
            Some(mut encoder) => {
                encoder.reset(self.data, self.parity, size).map_err(library)?;
                encoder
            }
            None => ReedSolomonEncoder::new(self.data, self.parity, size).map_err(library)?,
        };
        for cell in cells {
            encoder.add_original_shard(cell).map_err(library)?;
        }
        let encoded = encoder.encode().map_err(library)?;
        assert_eq!(encoded.recovery_iter().count(), self.parity, "a cell for each parity block");
        parity
            .iter_mut()
            .zip(encoded.recovery_iter())
            .for_each(|(block, cell)| block.extend_from_slice(cell));
        drop(encoded);
        let mut idle = lock(&self.encoders);
        if idle.len() < ENCODERS_IDLE_MAX && size <= ENCODER_CELL_BYTES_MAX {
            idle.push(encoder);
        }
        Ok(())
    }

    fn check(&self, cells: &[impl AsRef<[u8]>], count: usize) -> Result<usize, CodecError> {
        let size = cells.first().map_or(0, |c| c.as_ref().len());
        let fits = cells.len() == count && size != 0 && size.is_multiple_of(UNIT_BYTES);
        if !fits || cells.iter().any(|c| c.as_ref().len() != size) {
            return Err(CodecError::Cells);
        }
        Ok(size)
    }

    /// Computes block `lost`'s cell from the cells of D other blocks, given with their indices, in any order.
    pub fn recover(&self, lost: usize, from: &[(usize, impl AsRef<[u8]>)]) -> Result<Vec<u8>, CodecError> {
        if from.len() < self.data {
            return Err(CodecError::TooFew { left: from.len(), needed: self.data });
        }
        let from = &from[..self.data];
        let cells: Vec<&[u8]> = from.iter().map(|(_, cell)| cell.as_ref()).collect();
        let size = self.check(&cells, self.data)?;
        if lost >= self.data + self.parity {
            return Err(CodecError::Shape { data: self.data, parity: self.parity });
        }
        if self.data == 1 {
            return Ok(cells[0].to_vec());
        }
        let indices: Vec<usize> = from.iter().map(|(i, _)| *i).collect();
        assert!(
            (1..indices.len()).all(|i| !indices[..i].contains(&indices[i])),
            "each block once: {indices:?}"
        );
        let matrix = self.coefficients_of(&indices)?;
        assert_eq!(matrix.len(), cells.len(), "a row for each block at hand");
        let coefficients: Vec<u16> = matrix.iter().map(|row| row[lost]).collect();
        Ok(combined(&cells, &coefficients, size))
    }

    fn coefficients_of(&self, from: &[usize]) -> Result<Arc<Matrix>, CodecError> {
        // A thread that panicked while holding the lock left a whole map behind.
        let mut known = lock(&self.coefficients);
        if let Some(found) = known.get(from) {
            return Ok(found.clone());
        }
        let matrix: Result<Matrix, CodecError> = (0..from.len()).map(|unit| self.row(from, unit)).collect();
        let matrix = Arc::new(matrix?);
        if known.len() >= REMEMBERED_MAX {
            known.clear();
        }
        known.insert(from.to_vec(), matrix.clone());
        Ok(matrix)
    }

    /// What every block is when the one at `from[unit]` is 1 and the others at hand are 0.
    fn row(&self, from: &[usize], unit: usize) -> Result<Vec<u16>, CodecError> {
        // Element 0 of a unit has its low byte first and its high byte 32 further on.
        let one = get_exp_log().exp[0];
        let mut one_unit = [0u8; UNIT_BYTES];
        (one_unit[0], one_unit[UNIT_BYTES / 2]) = (one as u8, (one >> 8) as u8);
        let value = |i: usize| if i == unit { one_unit } else { [0u8; UNIT_BYTES] };
        let mut blocks = vec![[0u8; UNIT_BYTES]; self.data];
        let mut missing = vec![true; self.data];
        for (i, block) in from.iter().enumerate().filter(|(_, block)| **block < self.data) {
            blocks[*block] = value(i);
            missing[*block] = false;
        }
        if missing.contains(&true) {
            let mut decoder = ReedSolomonDecoder::new(self.data, self.parity, UNIT_BYTES).map_err(library)?;
            for (i, block) in from.iter().enumerate() {
                if *block < self.data {
                    decoder.add_original_shard(*block, value(i)).map_err(library)?;
                } else {
                    decoder.add_recovery_shard(*block - self.data, value(i)).map_err(library)?;
                }
            }
            for (block, bytes) in decoder.decode().map_err(library)?.restored_original_iter() {
                blocks[block].copy_from_slice(bytes);
            }
        }
        for parity in self.encode(&blocks)? {
            blocks.push(parity.as_slice().try_into().map_err(|_| CodecError::Cells)?);
        }
        Ok(blocks.iter().map(|unit| u16::from(unit[0]) | u16::from(unit[UNIT_BYTES / 2]) << 8).collect())
    }
}

/// The sum of the cells, each times its coefficient. Not generic, so that it is compiled here, once, and as fast for
/// every caller.
fn combined(cells: &[&[u8]], coefficients: &[u16], size: usize) -> Vec<u8> {
    assert_eq!(cells.len(), coefficients.len(), "a coefficient for each cell");
    let log = &get_exp_log().log;
    let engine = DefaultEngine::new();
    let mut sum = vec![0u8; size];
    // A window that stays in the first cache level while it is multiplied and added.
    let mut window = vec![[0u8; UNIT_BYTES]; 128];
    let bytes = window.len() * UNIT_BYTES;
    for (cell, coefficient) in cells.iter().zip(coefficients).filter(|(_, c)| **c != 0) {
        for (source, target) in cell.chunks(bytes).zip(sum.chunks_mut(bytes)) {
            let used = &mut window[..source.len() / UNIT_BYTES];
            used.copy_from_slice(source.as_chunks::<UNIT_BYTES>().0);
            engine.mul(used, log[usize::from(*coefficient)]);
            target.iter_mut().zip(used.as_flattened()).for_each(|(t, u)| *t ^= *u);
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stripe(data: usize, size: usize, seed: u64) -> Vec<Vec<u8>> {
        let mut state = seed | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        };
        (0..data).map(|_| (0..size).map(|_| next()).collect()).collect()
    }

    fn check_loss(codec: &Codec, blocks: &[Vec<u8>], lost: &[usize]) {
        let left: Vec<(usize, &Vec<u8>)> =
            blocks.iter().enumerate().filter(|(i, _)| !lost.contains(i)).collect();
        // In whatever order they came: who reads asks services that he trusts first.
        let backwards: Vec<_> = left.iter().rev().copied().collect();
        for lost in lost {
            assert_eq!(&codec.recover(*lost, &left).expect("enough is left"), &blocks[*lost]);
            assert_eq!(&codec.recover(*lost, &backwards).expect("enough is left"), &blocks[*lost]);
        }
    }

    #[test]
    fn every_shape_recovers_every_block() {
        for data in 1..=16 {
            for parity in 0..=16 {
                let codec = Codec::new(data, parity).expect("within the limits");
                let mut blocks = stripe(data, 192, (data * 31 + parity) as u64);
                blocks.extend(codec.encode(&blocks).expect("encodes"));
                assert_eq!(blocks.len(), data + parity);
                if parity == 0 {
                    continue;
                }
                // As many lost as can be, in windows that begin in different places.
                for start in (0..data + parity).step_by((data + parity).div_ceil(3)) {
                    let lost: Vec<usize> = (0..parity).map(|i| (start + i) % (data + parity)).collect();
                    check_loss(&codec, &blocks, &lost);
                }
                for lost in 0..data + parity {
                    check_loss(&codec, &blocks, &[lost]);
                }
            }
        }
    }

    #[test]
    fn every_pattern_of_small_shapes_recovers() {
        for (data, parity) in [(4, 2), (3, 3), (2, 4), (5, 3), (6, 2)] {
            let codec = Codec::new(data, parity).expect("within the limits");
            let mut blocks = stripe(data, 8192 + 64, 77);
            blocks.extend(codec.encode(&blocks).expect("encodes"));
            for pattern in 0u32..1 << (data + parity) {
                if pattern.count_ones() as usize <= parity {
                    let lost: Vec<usize> = (0..data + parity).filter(|i| pattern >> i & 1 == 1).collect();
                    check_loss(&codec, &blocks, &lost);
                }
            }
        }
    }

    #[test]
    fn too_few_blocks_and_odd_cells_are_errors() {
        let codec = Codec::new(4, 2).expect("within the limits");
        let blocks = stripe(4, 64, 3);
        let left: Vec<(usize, &Vec<u8>)> = blocks.iter().enumerate().take(3).collect();
        assert_eq!(codec.recover(3, &left), Err(CodecError::TooFew { left: 3, needed: 4 }));
        assert_eq!(codec.encode(&blocks[..3]), Err(CodecError::Cells));
        assert_eq!(codec.encode(&stripe(4, 63, 3)), Err(CodecError::Cells));
        assert!(Codec::new(0, 1).is_err() && Codec::new(17, 0).is_err() && Codec::new(1, 17).is_err());

        // One condition of several at a time.
        assert_eq!(codec.encode(&vec![Vec::new(); 4]), Err(CodecError::Cells));
        let mut uneven = stripe(4, 64, 3);
        uneven[2].extend([0; 64]);
        assert_eq!(codec.encode(&uneven), Err(CodecError::Cells));
        assert_eq!(codec.encode_onto(&blocks, &mut [Vec::new()]), Err(CodecError::Cells));
        assert_eq!(codec.encode_onto(&blocks, &mut vec![Vec::new(); 3]), Err(CodecError::Cells));
        let all: Vec<(usize, &Vec<u8>)> = blocks.iter().enumerate().collect();
        for lost in [6, 7, 100] {
            assert_eq!(codec.recover(lost, &all), Err(CodecError::Shape { data: 4, parity: 2 }));
        }
    }

    /// More than one window of a computation, and a last one that is not full.
    #[test]
    fn large_cells_recover() {
        let codec = Codec::new(3, 2).expect("within the limits");
        for size in [128 * UNIT_BYTES - UNIT_BYTES, 128 * UNIT_BYTES, 129 * UNIT_BYTES, 300 * UNIT_BYTES] {
            let mut blocks = stripe(3, size, 5);
            blocks.extend(codec.encode(&blocks).expect("encodes"));
            check_loss(&codec, &blocks, &[0, 3]);
            check_loss(&codec, &blocks, &[1, 2]);
        }
    }

    #[test]
    fn parity_is_appended_and_mirrors_are_copies() {
        let codec = Codec::new(2, 1).expect("within the limits");
        let blocks = stripe(2, 64, 9);
        let mut parity = vec![b"before".to_vec()];
        codec.encode_onto(&blocks, &mut parity).expect("encodes");
        assert_eq!(parity[0][..6], *b"before");
        assert_eq!(parity[0][6..], codec.encode(&blocks).expect("encodes")[0]);
        let mirrors = Codec::new(1, 2).expect("within the limits");
        assert_eq!(mirrors.encode(&blocks[..1]).expect("encodes"), vec![blocks[0].clone(); 2]);
        assert_eq!(mirrors.recover(0, &[(2, &blocks[0])]), Ok(blocks[0].clone()));
    }

    /// What is idle holds little, and what is remembered is bounded.
    #[test]
    fn few_encoders_and_patterns_are_kept() {
        assert_eq!((ENCODER_CELL_BYTES_MAX, ENCODERS_IDLE_MAX), (1_048_576, 2));
        let codec = Codec::new(2, 1).expect("within the limits");
        let idle = || lock(&codec.encoders).len();
        codec.encode(&stripe(2, ENCODER_CELL_BYTES_MAX + UNIT_BYTES, 1)).expect("encodes");
        assert_eq!(idle(), 0, "an encoder of large cells is not kept");
        codec.encode(&stripe(2, ENCODER_CELL_BYTES_MAX, 1)).expect("encodes");
        assert_eq!(idle(), 1);
        codec.encode(&stripe(2, 64, 1)).expect("encodes");
        assert_eq!(idle(), 1, "the one that is kept is used again");
        let kept = || ReedSolomonEncoder::new(2, 1, 64).expect("within the limits");
        lock(&codec.encoders).extend([kept(), kept()]);
        assert_eq!(idle(), 3);
        codec.encode(&stripe(2, 64, 1)).expect("encodes");
        assert_eq!(idle(), ENCODERS_IDLE_MAX, "what is too many goes");

        let patterns = Codec::new(8, 8).expect("within the limits");
        let known = || lock(&patterns.coefficients).len();
        let (mut asked, mut largest) = (0, 0);
        for pattern in (0u32..1 << 16).filter(|p| p.count_ones() == 8) {
            let from: Vec<usize> = (0..16).filter(|i| pattern >> i & 1 == 1).collect();
            patterns.coefficients_of(&from).expect("is computed");
            (asked, largest) = (asked + 1, largest.max(known()));
            if asked == REMEMBERED_MAX + 1 {
                break;
            }
        }
        assert_eq!((largest, known()), (REMEMBERED_MAX, 1), "all are forgotten when they are too many");
    }
}
