//! Keys of the CDC's tables: their bytes, and that they sort as their numbers do.

use clutch_cdc::tables::{key, pair, parse, second};

const NUMBERS: [u64; 6] = [0, 1, 255, 256, 1 << 40, u64::MAX];

#[test]
fn keys_have_their_bytes_and_sort_as_their_numbers() {
    assert_eq!(key(0x0102_0304_0506_0708), [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(pair(1, 0x0200), [0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 2, 0]);
    let pairs: Vec<[u8; 16]> = NUMBERS.iter().flat_map(|a| NUMBERS.map(|b| pair(*a, b))).collect();
    assert!(NUMBERS.map(key).is_sorted() && pairs.is_sorted());
    for number in NUMBERS {
        assert_eq!(parse(&key(number)).ok(), Some(number));
        assert_eq!(second(&pair(7, number)).ok(), Some(number));
    }
}

#[test]
fn what_is_no_key_is_an_error() {
    for cut in (0..8).chain(9..16) {
        assert!(parse(&pair(1, 2)[..cut]).is_err(), "{cut} bytes");
        assert!(second(&pair(1, 2)[..cut]).is_err(), "{cut} bytes");
    }
    assert!(second(&[0; 17]).is_err());
}
