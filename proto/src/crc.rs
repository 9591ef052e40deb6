//! CRC-32 (IEEE 802.3, as in `crc32fast`) and its algebra: checksums of a whole from those of its parts.

/// The CRC of some bytes.
pub fn of(bytes: &[u8]) -> u32 {
    crc32fast::hash(bytes)
}

/// The CRC of `a ++ b` from the CRCs of both and the length of `b` in bytes.
pub fn concat(a: u32, b: u32, b_len: u64) -> u32 {
    let mut hasher = crc32fast::Hasher::new_with_initial_len(a, 0);
    hasher.combine(&crc32fast::Hasher::new_with_initial_len(b, b_len));
    hasher.finalize()
}

/// The CRC of `len` zero bytes, in O(log len).
pub fn zeroes(len: u64) -> u32 {
    let (mut crc, mut unit, mut unit_len, mut rest) = (0u32, of(&[0]), 1u64, len);
    while rest != 0 {
        if rest & 1 == 1 {
            crc = concat(crc, unit, unit_len);
        }
        unit = concat(unit, unit, unit_len);
        unit_len = unit_len.wrapping_mul(2);
        rest >>= 1;
    }
    crc
}

/// The CRC of `a XOR b`, both of `len` bytes: CRC is affine, so the constant part appears three times.
pub fn xor(a: u32, b: u32, len: u64) -> u32 {
    a ^ b ^ zeroes(len)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn algebra_holds() {
        let a: Vec<u8> = (0..1000u32).map(|i| (i * 7 + 3) as u8).collect();
        let b: Vec<u8> = (0..1000u32).map(|i| (i * 13 + 1) as u8).collect();
        // The check value of the algorithm's description.
        assert_eq!(of(b"123456789"), 0xcbf4_3926);
        let both = [a.clone(), b.clone()].concat();
        assert_eq!(concat(of(&a), of(&b), 1000), of(&both));
        for len in [0usize, 1, 2, 3, 63, 4096, 100_001] {
            assert_eq!(zeroes(len as u64), of(&vec![0; len]));
        }
        let x: Vec<u8> = a.iter().zip(&b).map(|(a, b)| a ^ b).collect();
        assert_eq!(xor(of(&a), of(&b), 1000), of(&x));
    }
}
