//! A span's bytes as blocks, and back. Works on memory only.

use std::sync::Arc;

use bytes::Bytes;
use clutch_blocks::{Codec, CodecError};
use clutch_proto::{crc, types::SpanShape};

/// Where a span must not go, whatever fails elsewhere.
#[derive(Clone, Debug, Default)]
pub(crate) struct Never {
    pub(crate) services: Vec<u64>,
    pub(crate) domains: Vec<String>,
}

/// A span that is ready to be written.
pub(crate) struct Encoded {
    pub(crate) shape: SpanShape,
    pub(crate) size: u32,
    pub(crate) crc: u32,
    pub(crate) cell_crcs: Vec<u32>,
    /// One for each block of the shape.
    pub(crate) blocks: Vec<Bytes>,
}

impl Encoded {
    /// It is as its shape says, before anybody is asked to store it.
    fn check(&self) {
        let (shape, blocks) = (&self.shape, self.blocks.len());
        assert_eq!(blocks, shape.blocks() as usize, "a block for each of {shape:?}");
        assert_eq!(
            self.cell_crcs.len(),
            blocks * shape.stripes as usize,
            "a checksum for each cell of {shape:?}"
        );
        let block_bytes = shape.block_bytes() as usize;
        assert!(self.blocks.iter().all(|block| block.len() == block_bytes), "blocks of {block_bytes} bytes");
    }
}

/// Cuts bytes into cells, computes parity and checksums.
pub(crate) fn encode(codec: &Codec, shape: SpanShape, mut data: Vec<u8>) -> Result<Encoded, CodecError> {
    let size = data.len();
    assert!(size as u64 <= shape.stripe_bytes() * u64::from(shape.stripes), "{size} bytes in {shape:?}");
    data.resize(shape.stripe_bytes() as usize * shape.stripes as usize, 0);
    let data = Bytes::from(data);
    let cell = shape.cell_size as usize;
    let stripes = data.chunks(shape.stripe_bytes() as usize);
    let mut blocks: Vec<Bytes> = if shape.stripes == 1 {
        // The blocks lie in the data as they are.
        (0..shape.data_blocks as usize).map(|i| data.slice(i * cell..(i + 1) * cell)).collect()
    } else {
        let block = |i: usize| {
            let mut block = Vec::with_capacity(shape.block_bytes() as usize);
            stripes.clone().for_each(|stripe| block.extend_from_slice(&stripe[i * cell..(i + 1) * cell]));
            Bytes::from(block)
        };
        (0..shape.data_blocks as usize).map(block).collect()
    };
    let mut parity: Vec<Vec<u8>> =
        (0..shape.parity_blocks).map(|_| Vec::with_capacity(shape.block_bytes() as usize)).collect();
    for stripe in stripes {
        let cells: Vec<&[u8]> = stripe.chunks(cell).collect();
        codec.encode_onto(&cells, &mut parity)?;
    }
    blocks.extend(parity.into_iter().map(Bytes::from));
    let cell_crcs: Vec<u32> = blocks.iter().flat_map(|block| block.chunks(cell).map(crc::of)).collect();
    // Cells that are full of the span's bytes have been looked at already; the test holds this to the CRC of the bytes.
    let mut span_crc = 0;
    for (index, bytes) in data[..size].chunks(cell).enumerate() {
        let (stripe, block) = (index / shape.data_blocks as usize, index % shape.data_blocks as usize);
        let of_cell = match bytes.len() {
            full if full == cell => cell_crcs[block * shape.stripes as usize + stripe],
            _ => crc::of(bytes),
        };
        span_crc = crc::concat(span_crc, of_cell, bytes.len() as u64);
    }
    let encoded = Encoded { shape, size: size as u32, crc: span_crc, cell_crcs, blocks };
    encoded.check();
    Ok(encoded)
}

/// The same data blocks with another number of parity blocks.
pub(crate) fn with_parity(
    codec: &Codec,
    shape: SpanShape,
    parity_blocks: u32,
    size: u32,
    crc: u32,
    data: Vec<Bytes>,
) -> Result<Encoded, CodecError> {
    let cell = shape.cell_size as usize;
    let mut blocks = data;
    let mut parity: Vec<Vec<u8>> =
        (0..parity_blocks).map(|_| Vec::with_capacity(shape.block_bytes() as usize)).collect();
    for stripe in 0..shape.stripes as usize {
        let cells: Vec<&[u8]> =
            blocks.iter().map(|block| &block[stripe * cell..(stripe + 1) * cell]).collect();
        codec.encode_onto(&cells, &mut parity)?;
    }
    blocks.extend(parity.into_iter().map(Bytes::from));
    let cell_crcs = blocks.iter().flat_map(|block| block.chunks(cell).map(crc::of)).collect();
    let encoded = Encoded { shape: SpanShape { parity_blocks, ..shape }, size, crc, cell_crcs, blocks };
    encoded.check();
    Ok(encoded)
}

/// Cells of consecutive stripes of one block.
pub(crate) type Cells = Bytes;

/// Puts data blocks that are missing in place, from those that are there, stripe by stripe.
pub(crate) fn recover(
    codec: &Arc<Codec>,
    shape: SpanShape,
    blocks: &mut [Option<Cells>],
) -> Result<(), CodecError> {
    let cell = shape.cell_size as usize;
    let have: Vec<usize> = (0..blocks.len()).filter(|i| blocks[*i].is_some()).collect();
    let from: Vec<(usize, Cells)> = have.iter().filter_map(|i| Some((*i, blocks[*i].clone()?))).collect();
    let bytes = from.first().map_or(0, |(_, cells)| cells.len());
    assert!(from.iter().all(|(_, cells)| cells.len() == bytes), "the same stripes of every block");
    let stripes = bytes / cell;
    for (lost, block) in blocks.iter_mut().enumerate().take(shape.data_blocks as usize) {
        if block.is_some() {
            continue;
        }
        let mut recovered = Vec::with_capacity(stripes * cell);
        for stripe in 0..stripes {
            let cells: Vec<(usize, &[u8])> =
                from.iter().map(|(i, cells)| (*i, &cells[stripe * cell..(stripe + 1) * cell])).collect();
            recovered.extend(codec.recover(lost, &cells)?);
        }
        *block = Some(recovered.into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_crc_is_that_of_the_bytes_and_the_blocks_hold_them() {
        const CELL: usize = 4096;
        for (data_blocks, parity_blocks) in [(1u32, 0u32), (1, 2), (2, 1), (10, 4)] {
            let codec = Codec::new(data_blocks as usize, parity_blocks as usize).expect("a known scheme");
            let stripe = CELL * data_blocks as usize;
            for size in
                [256, CELL - 1, CELL, CELL + 1, stripe - 1, stripe, stripe + 1, 3 * stripe, 3 * stripe + 77]
            {
                let bytes: Vec<u8> = (0..size).map(|at| (at * 31 + at / 251) as u8).collect();
                let stripes = size.div_ceil(stripe) as u32;
                let shape = SpanShape { data_blocks, parity_blocks, cell_size: CELL as u32, stripes };
                let encoded = encode(&codec, shape, bytes.clone()).expect("encodes");
                assert_eq!(encoded.crc, crc::of(&bytes), "{data_blocks}+{parity_blocks}, {size} bytes");
                let mut back = Vec::new();
                for stripe in 0..stripes as usize {
                    for block in &encoded.blocks[..data_blocks as usize] {
                        back.extend_from_slice(&block[stripe * CELL..(stripe + 1) * CELL]);
                    }
                }
                assert_eq!(back[..size], bytes);
                assert!(back[size..].iter().all(|byte| *byte == 0));
                // With another number of parity blocks it is what it would have been from the beginning.
                for fewer in 1..parity_blocks {
                    let codec = Codec::new(data_blocks as usize, fewer as usize).expect("a known scheme");
                    let data = encoded.blocks[..data_blocks as usize].to_vec();
                    let again =
                        with_parity(&codec, shape, fewer, encoded.size, encoded.crc, data).expect("encodes");
                    let shape = SpanShape { parity_blocks: fewer, ..shape };
                    let whole = encode(&codec, shape, bytes.clone()).expect("encodes");
                    assert_eq!((again.crc, again.cell_crcs), (whole.crc, whole.cell_crcs));
                    assert_eq!((again.blocks, again.shape), (whole.blocks, whole.shape));
                }
            }
        }
    }
}
