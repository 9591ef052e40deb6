//! The rows of a checkpoint: a state of any content. Opening it, checking it and reading from it give an answer or an
//! error. The input is a list of rows: length of the key, length of the value (two bytes), key with its table, value.
#![no_main]

use std::sync::Arc;

use clutch_proto::shard::{
    ContentHistory, History, Layout, Lookup, ReadDir, ShardRequest, Stat, VisitBlocks, VisitDeadSpans, VisitInodes,
    VisitPastContents, VisitSpans, VisitTransients, shard_request::Op,
};
use clutch_shard::{Shard, ShardFacts, invariants};
use clutch_state::{Applier, Machine as _, MemoryStore, Store as _, applier::rescan};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let store = Arc::new(MemoryStore::new());
    let mut data = data;
    let mut ids = vec![0x4000_0000_0000_0100u64];
    while let Some(([key, low, high], rest)) = data.split_first_chunk::<3>() {
        let key_length = usize::from(*key).min(rest.len());
        let (key, rest) = rest.split_at(key_length);
        let value_length = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len());
        let (value, rest) = rest.split_at(value_length);
        data = rest;
        if let Some(id) = key.get(2..10) {
            ids.push(u64::from_be_bytes(id.try_into().expect("eight bytes")));
        }
        if !key.is_empty() {
            store.write(vec![(key[..].into(), Some(bytes::Bytes::copy_from_slice(value)))]).expect("writes");
        }
    }
    let _ = rescan(&*store);
    if let Ok((_, facts)) = invariants::check_shard(&*store) {
        let _ = invariants::check_cluster(&[facts]);
    }
    let facts = ShardFacts::default();
    for id in ids.into_iter().take(8) {
        for op in [
            Op::Stat(Stat { id }),
            Op::Lookup(Lookup { dir: id, name: "a".into() }),
            Op::ReadDir(ReadDir { dir: id, limit: 2, ..ReadDir::default() }),
            Op::Layout(Layout { id, ..Layout::default() }),
            Op::History(History { dir: id, ..History::default() }),
            Op::History(History { dir: id, with_present: true, ..History::default() }),
            Op::ContentHistory(ContentHistory { id, after: 0 }),
            Op::VisitInodes(VisitInodes { slot: id as u32 & 0xff, kind: 2, ..VisitInodes::default() }),
            Op::VisitTransients(VisitTransients { slot: id as u32 & 0xff, ..VisitTransients::default() }),
            Op::VisitPastContents(VisitPastContents { slot: id as u32 & 0xff, ..VisitPastContents::default() }),
            Op::VisitDeadSpans(VisitDeadSpans { slot: id as u32 & 0xff, ..VisitDeadSpans::default() }),
            Op::VisitBlocks(VisitBlocks { slot: id as u32 & 0xff, service_id: id, ..VisitBlocks::default() }),
            Op::VisitSpans(VisitSpans { slot: id as u32 & 0xff, ..VisitSpans::default() }),
            Op::VisitSpans(VisitSpans { slot: id as u32 & 0xff, service_id: id, ..VisitSpans::default() }),
        ] {
            let _ = Shard::read(&*store, &ShardRequest { op: Some(op) }, &facts);
        }
    }
    let _ = Applier::<Shard>::open(store);
});
