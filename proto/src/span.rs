//! The shape of a span: how user bytes become cells, and what a shard checks before it grants blocks.
//!
//! User data, zero-padded, is cut into stripes; a stripe is D consecutive cells of data and P cells of
//! parity. Block *i* is the concatenation of the *i*-th cells of all stripes. With D = 1 the parity cells
//! are copies (mirroring).

use crate::{
    crc,
    error::Refusal,
    rules::v1::{DATA_BLOCKS_MAX, PAGE_BYTES, PARITY_BLOCKS_MAX, SPAN_BYTES_MAX, STRIPES_MAX},
    types::{Code, SpanShape},
};

impl SpanShape {
    /// Blocks in all.
    pub fn blocks(&self) -> u32 {
        self.data_blocks + self.parity_blocks
    }

    /// Bytes of one block.
    pub fn block_bytes(&self) -> u32 {
        self.stripes * self.cell_size
    }

    /// Bytes that all blocks of a span of `size` bytes take where the zeros that a block ends with are not stored; without headers and
    /// checksums.
    pub fn stored_bytes(&self, size: u32) -> u64 {
        let (cell, stripe) = (u64::from(self.cell_size), self.stripe_bytes());
        let before = u64::from(self.stripes.saturating_sub(1));
        let last = u64::from(size).saturating_sub(before * stripe).min(stripe);
        let data = before * stripe + last;
        // A byte of parity is zero where those of all data blocks are.
        data + u64::from(self.parity_blocks) * (before * cell + last.min(cell))
    }

    /// Bytes of user data in one stripe, with padding.
    pub fn stripe_bytes(&self) -> u64 {
        u64::from(self.data_blocks) * u64::from(self.cell_size)
    }

    /// The shape for `size` bytes: as few stripes as a target cell size of 1 MiB gives.
    ///
    /// # Panics
    /// When `data_blocks` or `size` is 0; both are checked where they enter.
    pub fn for_size(size: u32, data_blocks: u32, parity_blocks: u32) -> SpanShape {
        SpanShape::for_size_with(size, data_blocks, parity_blocks, 1 << 20)
    }

    /// The same for another target cell size.
    ///
    /// # Panics
    /// When `data_blocks` or `size` is 0.
    pub fn for_size_with(size: u32, data_blocks: u32, parity_blocks: u32, cell_target: u32) -> SpanShape {
        assert!(size > 0 && data_blocks > 0);
        let cell_target = u64::from(cell_target.max(PAGE_BYTES));
        let page = u64::from(PAGE_BYTES);
        let (size, d) = (u64::from(size), u64::from(data_blocks));
        let stripes = size.div_ceil(d * cell_target).clamp(1, u64::from(STRIPES_MAX));
        let cell = size.div_ceil(d * stripes).next_multiple_of(page);
        // Rounding cells up can leave whole stripes empty; they are dropped.
        let stripes = size.div_ceil(d * cell);
        SpanShape { data_blocks, parity_blocks, stripes: stripes as u32, cell_size: cell as u32 }
    }

    /// Checks a shape that came from outside against the limits and the size that it must hold.
    pub fn check(&self, size: u32) -> Result<(), Refusal> {
        let bad = |what: String| Err(Refusal::invalid(what));
        if size == 0 || size > SPAN_BYTES_MAX {
            return Err(Refusal::new(
                Code::TooLarge,
                format!("a span of {size} bytes; 1 to {SPAN_BYTES_MAX} are allowed"),
            ));
        }
        if self.data_blocks == 0 || self.data_blocks > DATA_BLOCKS_MAX {
            return bad(format!("{} data blocks; 1 to {DATA_BLOCKS_MAX} are allowed", self.data_blocks));
        }
        if self.parity_blocks > PARITY_BLOCKS_MAX {
            return bad(format!(
                "{} parity blocks; at most {PARITY_BLOCKS_MAX} are allowed",
                self.parity_blocks
            ));
        }
        if self.stripes == 0 || self.stripes > STRIPES_MAX {
            return bad(format!("{} stripes; 1 to {STRIPES_MAX} are allowed", self.stripes));
        }
        if self.cell_size == 0
            || !self.cell_size.is_multiple_of(PAGE_BYTES)
            || self.cell_size > SPAN_BYTES_MAX + PAGE_BYTES
        {
            return bad(format!("cells of {} bytes; multiples of {PAGE_BYTES} are allowed", self.cell_size));
        }
        if u64::from(self.stripes) * u64::from(self.cell_size) > u64::from(crate::rules::v1::BLOCK_BYTES_MAX)
        {
            return bad(format!(
                "blocks of {} stripes of {} bytes are too large",
                self.stripes, self.cell_size
            ));
        }
        let capacity = self.stripe_bytes() * u64::from(self.stripes);
        let least = capacity - self.stripe_bytes();
        if u64::from(size) > capacity || u64::from(size) <= least {
            return bad(format!("{size} bytes in {} stripes of {} bytes", self.stripes, self.stripe_bytes()));
        }
        Ok(())
    }

    /// The CRC of each block from the CRCs of its cells (block-major).
    ///
    /// # Panics
    /// When `cell_crcs` does not have one CRC for each cell; [`SpanShape::check_crcs`] refuses those.
    pub fn block_crcs(&self, cell_crcs: &[u32]) -> Vec<u32> {
        assert_eq!(cell_crcs.len(), (self.blocks() * self.stripes) as usize);
        let cell = u64::from(self.cell_size);
        cell_crcs
            .chunks_exact(self.stripes as usize)
            .map(|cells| cells.iter().fold(0, |all, &c| crc::concat(all, c, cell)))
            .collect()
    }

    /// Checks that the CRCs of the data cells combine to the span's, and that mirrors and the first parity
    /// (which is not a plain XOR in Reed-Solomon) are as long as the shape says. Mirrors must equal their data.
    pub fn check_crcs(&self, size: u32, span_crc: u32, cell_crcs: &[u32]) -> Result<(), Refusal> {
        let cells = (self.blocks() * self.stripes) as usize;
        if cell_crcs.len() != cells {
            return Err(Refusal::invalid(format!("{} cell CRCs for {cells} cells", cell_crcs.len())));
        }
        let (stripes, cell) = (self.stripes as usize, u64::from(self.cell_size));
        let mut whole = 0;
        for stripe in 0..stripes {
            for block in 0..self.data_blocks as usize {
                whole = crc::concat(whole, cell_crcs[block * stripes + stripe], cell);
            }
        }
        let padding = self.stripe_bytes() * u64::from(self.stripes) - u64::from(size);
        if whole != crc::concat(span_crc, crc::zeroes(padding), padding) {
            return Err(Refusal::new(Code::CrcMismatch, "the cells' CRCs do not combine to the span's CRC"));
        }
        if self.data_blocks == 1
            && cell_crcs.chunks_exact(stripes).any(|mirror| mirror != &cell_crcs[..stripes])
        {
            return Err(Refusal::new(Code::CrcMismatch, "a mirror's CRCs differ from its data's"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_size_gets_a_shape_that_passes() {
        for d in 1..=16 {
            for size in [
                1,
                255,
                256,
                4096,
                4097,
                65_536,
                1 << 20,
                (1 << 20) + 1,
                10 << 20,
                SPAN_BYTES_MAX - 1,
                SPAN_BYTES_MAX,
            ] {
                let shape = SpanShape::for_size(size, d, 2);
                shape.check(size).unwrap_or_else(|e| panic!("{size} in {shape:?}: {e}"));
                assert!(shape.block_bytes() <= crate::rules::v1::BLOCK_BYTES_MAX);
            }
        }
    }

    const MIB: u32 = 1 << 20;

    #[test]
    fn zeros_at_the_end_of_blocks_are_not_stored() {
        // Mirrored; less than a cell; less than a stripe, of cells of 8 KiB.
        for (size, d, p, stored) in
            [(6000, 1, 2, 18_000), (100, 4, 2, 300), (20_000, 4, 2, 20_000 + 2 * 8192), (1, 1, 0, 1)]
        {
            assert_eq!(SpanShape::for_size(size, d, p).stored_bytes(size), stored, "{size} in {d}+{p}");
        }
        for size in [1, 4096, 70_001, 3 * MIB, 10 * MIB + 1] {
            let shape = SpanShape::for_size(size, 4, 2);
            let (stored, whole) = (shape.stored_bytes(size), u64::from(shape.block_bytes()));
            assert!((u64::from(size) + 2..=6 * whole).contains(&stored), "{size}: {stored}");
            // Full stripes have no zeros of their own.
            let full = shape.stripe_bytes() as u32 * shape.stripes;
            assert_eq!(shape.stored_bytes(full), 6 * whole, "{full}");
        }
    }

    #[test]
    fn shapes_are_what_the_size_and_the_target_of_cells_give() {
        for (size, d, p, target, stripes, cell) in [
            (1, 1, 0, MIB, 1, 4096),
            (4097, 1, 2, MIB, 1, 8192),
            (10 * MIB, 10, 4, MIB, 1, MIB),
            (10 * MIB + 1, 10, 4, MIB, 2, 528_384),
            (20 * MIB, 2, 1, MIB, 10, MIB),
            (6 * 4096, 2, 1, 4096, 3, 4096),
            // No cell is smaller than a page, whatever the target.
            (6 * 4096, 2, 1, 1, 3, 4096),
            // Rounded up to pages, four stripes hold what five were reckoned for.
            (9 * 4096, 1, 0, 2 * 4096, 5, 8192),
            (SPAN_BYTES_MAX, 1, 0, 4096, 254, 413_696),
        ] {
            let shape = SpanShape::for_size_with(size, d, p, target);
            let expected = SpanShape { data_blocks: d, parity_blocks: p, stripes, cell_size: cell };
            assert_eq!(shape, expected, "{size} bytes");
            assert_eq!((shape.blocks(), shape.block_bytes()), (d + p, stripes * cell));
            assert_eq!(shape.stripe_bytes(), u64::from(d) * u64::from(cell));
            if target == MIB {
                assert_eq!(SpanShape::for_size(size, d, p), shape);
            }
        }
    }

    #[test]
    fn shapes_are_good_up_to_their_limits_and_not_beyond() {
        let shape = |data_blocks, parity_blocks, stripes, cell_size| SpanShape {
            data_blocks,
            parity_blocks,
            stripes,
            cell_size,
        };
        // Cells of 100 MiB and a page are allowed: a span in one block has at most that.
        let largest = SPAN_BYTES_MAX.next_multiple_of(PAGE_BYTES);
        for (shape, size, is_good) in [
            (shape(1, 0, 1, 4096), 0, false),
            (shape(1, 0, 1, 4096), 1, true),
            (shape(1, 0, 1, 4096), 4096, true),
            (shape(1, 0, 1, 4096), 4097, false),
            // Not more stripes than are needed.
            (shape(1, 0, 2, 4096), 4096, false),
            (shape(1, 0, 2, 4096), 4097, true),
            (shape(2, 0, 2, 4096), 8192, false),
            (shape(2, 0, 2, 4096), 8193, true),
            (shape(0, 1, 1, 4096), 1, false),
            (shape(16, 16, 1, 4096), 1, true),
            (shape(17, 16, 1, 4096), 1, false),
            (shape(16, 17, 1, 4096), 1, false),
            (shape(1, 0, 0, 4096), 1, false),
            (shape(1, 0, 255, 4096), 255 * 4096, true),
            (shape(1, 0, 256, 4096), 256 * 4096, false),
            (shape(1, 0, 1, 0), 1, false),
            (shape(1, 0, 1, 4095), 1, false),
            (shape(1, 0, 1, largest), SPAN_BYTES_MAX, true),
            (shape(1, 0, 1, largest), SPAN_BYTES_MAX + 1, false),
            (shape(16, 0, 1, SPAN_BYTES_MAX + 2 * PAGE_BYTES), 1, false),
            (shape(16, 0, 255, largest), SPAN_BYTES_MAX, false),
            (shape(16, 0, 2, largest), SPAN_BYTES_MAX, false),
            (shape(16, 0, u32::MAX, u32::MAX), 1, false),
        ] {
            assert_eq!(shape.check(size).is_ok(), is_good, "{size} bytes in {shape:?}");
        }
        let too_large = shape(1, 0, 1, largest).check(SPAN_BYTES_MAX + 1).expect_err("is refused");
        assert_eq!(too_large.code, Code::TooLarge);
    }

    /// Some bytes in that shape: the CRC of all of them and of each cell, block by block; parity cells hold what `parity` gives.
    fn crcs(shape: &SpanShape, size: u32, parity: impl Fn(&[u8]) -> Vec<u8>) -> (u32, Vec<u32>, Vec<u32>) {
        let user: Vec<u8> = (0..size).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let mut padded = user.clone();
        padded.resize((shape.stripe_bytes() * u64::from(shape.stripes)) as usize, 0);
        let cell = shape.cell_size as usize;
        let mut blocks = vec![Vec::new(); shape.blocks() as usize];
        for stripe in padded.chunks(shape.stripe_bytes() as usize) {
            for (block, bytes) in blocks.iter_mut().enumerate() {
                match stripe.get(block * cell..(block + 1) * cell) {
                    Some(data) => bytes.extend_from_slice(data),
                    None => bytes.extend(parity(&stripe[..cell])),
                }
            }
        }
        let cells = blocks.iter().flat_map(|block| block.chunks(cell).map(crc::of)).collect();
        (crc::of(&user), cells, blocks.iter().map(|block| crc::of(block)).collect())
    }

    #[test]
    fn checksums_of_cells_give_those_of_blocks_and_of_the_span() {
        for (d, p, stripes, size) in
            [(3, 2, 4, 3 * 4 * 4096 - 77), (1, 2, 3, 9000), (2, 1, 1, 8192), (1, 0, 1, 5)]
        {
            let shape = SpanShape { data_blocks: d, parity_blocks: p, stripes, cell_size: 4096 };
            shape.check(size).expect("is good");
            let (span, cells, blocks) = crcs(&shape, size, <[u8]>::to_vec);
            assert_eq!(shape.block_crcs(&cells), blocks, "{shape:?}");
            shape.check_crcs(size, span, &cells).expect("they fit");
            let code = |size, span, cells: &[u32]| shape.check_crcs(size, span, cells).map_err(|r| r.code);
            assert_eq!(code(size, span ^ 1, &cells), Err(Code::CrcMismatch));
            assert_eq!(code(size - 1, span, &cells), Err(Code::CrcMismatch));
            assert_eq!(code(size, span, &cells[1..]), Err(Code::InvalidArgument));
            assert_eq!(code(size, span, &[&cells[..], &[0]].concat()), Err(Code::InvalidArgument));
            for cell in 0..cells.len() {
                let mut changed = cells.clone();
                changed[cell] ^= 1;
                // Parity of several blocks cannot be told from the data's checksums; a mirror can.
                let is_told = cell < (d * stripes) as usize || d == 1;
                assert_eq!(code(size, span, &changed).is_err(), is_told, "cell {cell} of {shape:?}");
            }
        }
    }
}
