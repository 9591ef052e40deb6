//! The suite that every store must pass.

use std::sync::Arc;

use bytes::Bytes;

use crate::store::{Key, Store, Table, key_after};

const A: Table = Table(64);
const B: Table = Table(65);

fn put(table: Table, key: &[u8], value: &[u8]) -> (Key, Option<Bytes>) {
    (table.stored_key(key), Some(Bytes::copy_from_slice(value)))
}

/// Runs every check, each on a new empty store.
///
/// # Panics
/// When a check fails.
pub fn check(new_store: &mut dyn FnMut() -> Arc<dyn Store>) {
    points_and_ranges(&*new_store());
    snapshots_stay(&*new_store());
    many_rows_come_back_sorted(&*new_store());
}

fn points_and_ranges(store: &dyn Store) {
    let keys: [&[u8]; 5] = [b"", b"a", b"ab", b"b", &[0xff, 0xff]];
    store.write(keys.iter().map(|k| put(A, k, k)).chain([put(B, b"a", b"other")]).collect()).expect("writes");
    for key in keys {
        assert_eq!(store.get(A, key).expect("reads").as_deref(), Some(key));
    }
    assert_eq!(store.get(B, b"a").expect("reads").as_deref(), Some(&b"other"[..]));
    assert_eq!(store.get(A, b"missing").expect("reads"), None);
    let scan = |from: &[u8], until: &[u8], limit| -> Vec<Vec<u8>> {
        store.scan(A, from, until, limit).expect("scans").into_iter().map(|(k, _)| k.to_vec()).collect()
    };
    assert_eq!(scan(b"", b"", 100), keys.map(<[u8]>::to_vec));
    assert_eq!(scan(b"a", b"b", 100), [b"a".to_vec(), b"ab".to_vec()]);
    assert_eq!(scan(b"a", &key_after(b"a"), 1), [b"a".to_vec()]);
    assert_eq!(scan(b"b", b"a", 100), Vec::<Vec<u8>>::new());
    for stop_after in 1..=keys.len() {
        let mut seen = Vec::new();
        let mut see = |key: &[u8], _: &[u8]| {
            seen.push(key.to_vec());
            seen.len() < stop_after
        };
        store.visit(A, b"", b"", &mut see).expect("visits");
        assert_eq!(seen, keys[..stop_after].iter().map(|k| k.to_vec()).collect::<Vec<_>>());
    }
    store
        .write(vec![(A.stored_key(b"a"), None), put(A, b"b", b"new"), put(A, b"b", b"newer")])
        .expect("writes");
    assert_eq!(store.get(A, b"a").expect("reads"), None);
    assert_eq!(store.get(A, b"b").expect("reads").as_deref(), Some(&b"newer"[..]));
}

fn snapshots_stay(store: &dyn Store) {
    store.write(vec![put(A, b"k", b"old")]).expect("writes");
    let snapshot = store.snapshot().expect("snapshot");
    store.write(vec![put(A, b"k", b"new"), put(A, b"k2", b"new")]).expect("writes");
    assert_eq!(snapshot.get(A, b"k").expect("reads").as_deref(), Some(&b"old"[..]));
    assert_eq!(snapshot.scan(A, b"", b"", 10).expect("scans").len(), 1);
    assert_eq!(store.scan(A, b"", b"", 10).expect("scans").len(), 2);
}

fn many_rows_come_back_sorted(store: &dyn Store) {
    let key = |i: u32| (i.wrapping_mul(2_654_435_761)).to_be_bytes();
    for chunk in (0..5000u32).collect::<Vec<_>>().chunks(500) {
        store.write(chunk.iter().map(|i| put(A, &key(*i), &i.to_le_bytes())).collect()).expect("writes");
    }
    store.flush().expect("flushes");
    let rows = store.scan(A, b"", b"", usize::MAX).expect("scans");
    assert!(rows.len() == 5000 && rows.is_sorted_by(|a, b| a.0 < b.0));
    for i in 0..5000 {
        assert_eq!(store.get(A, &key(i)).expect("reads").as_deref(), Some(&i.to_le_bytes()[..]));
    }
}
