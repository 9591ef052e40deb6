//! Log entries, several in a row, into the appliers of shard, CDC and registry. The first byte chooses the machine, and
//! whether the bytes are a body or a whole entry; the rest is a list of entries with a length of two bytes each.
#![no_main]

use bytes::Bytes;
use clutch_cdc::Cdc;
use clutch_fuzz::{apply, apply_raw, begun, cdc_genesis, registry_genesis, shard_genesis};
use clutch_registry::Registry;
use clutch_shard::Shard;
use clutch_state::{Applier, Machine, applier::rescan};
use libfuzzer_sys::fuzz_target;

fn feed<M: Machine>(mut applier: Applier<M>, raw: bool, mut data: &[u8]) {
    while let Some((length, rest)) = data.split_first_chunk::<2>() {
        let length = usize::from(u16::from_le_bytes(*length)).min(rest.len());
        let (entry, rest) = rest.split_at(length);
        data = rest;
        let entry = Bytes::copy_from_slice(entry);
        match raw {
            true => apply_raw(&mut applier, vec![entry]),
            false => apply(&mut applier, entry),
        }
    }
    let found = rescan(&**applier.store()).expect("rows can be read");
    assert!(found.differences.is_empty(), "{:?}", found.differences);
}

fuzz_target!(|data: &[u8]| {
    let Some((choice, data)) = data.split_first() else { return };
    let raw = choice & 4 != 0;
    match choice & 3 {
        0 | 1 => feed::<Shard>(begun(shard_genesis()), raw, data),
        2 => feed::<Cdc>(begun(cdc_genesis()), raw, data),
        _ => feed::<Registry>(begun(registry_genesis()), raw, data),
    }
});
