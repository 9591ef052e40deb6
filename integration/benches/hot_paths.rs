//! Times of the hot paths, and of applying each kind of entry as simulations logged them.
//! `cargo bench --package clutch-integration --no-default-features`.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use clutch_cdc::Cdc;
use clutch_integration::{
    generate::{Profile, generate},
    hot_paths, run,
};
use clutch_log::{Batch, LogId};
use clutch_proto::{
    cdc::CdcEntry,
    shard::ShardEntry,
    state::{Entry, entry::Kind},
};
use clutch_shard::Shard;
use clutch_state::{Applier, Machine, MemoryStore};
use criterion::{Criterion, criterion_group, criterion_main};
use prost::Message as _;

/// Simulations whose logs are applied.
const SEEDS: std::ops::Range<u64> = 0..40;

fn paths(c: &mut Criterion) {
    for name in hot_paths::NAMES {
        let Some(mut run) = hot_paths::path(name) else { continue };
        c.bench_function(name, |b| b.iter(&mut run));
    }
}

/// Applies logs, an entry at a time; time and count for each kind of entry.
fn replay<M: Machine>(
    logs: &[Vec<Batch>],
    kind: fn(&[u8]) -> Option<String>,
    into: &mut BTreeMap<String, (Duration, u64)>,
) {
    for log in logs {
        let Ok(mut applier) = Applier::<M>::open(Arc::new(MemoryStore::new())) else { continue };
        for batch in log {
            let kind = match &batch.entries[..] {
                [only] => Entry::decode(only.clone()).ok().and_then(|e| match e.kind {
                    Some(Kind::Body(body)) => kind(&body),
                    _ => None,
                }),
                _ => None,
            };
            let start = Instant::now();
            let applied = applier.apply(batch);
            let took = start.elapsed();
            assert!(applied.is_ok(), "a simulation's log applies");
            if let Some(kind) = kind {
                let sum = into.entry(kind).or_default();
                *sum = (sum.0 + took, sum.1 + 1);
            }
        }
    }
}

/// The name of a variant, from its debug text.
fn variant(text: String) -> String {
    text.split(['(', ' ', '{']).next().unwrap_or_default().to_owned()
}

fn applying(c: &mut Criterion) {
    let (mut shards, mut cdc) = (Vec::new(), Vec::new());
    for seed in SEEDS {
        for (id, batches) in run::collect_logs(&generate(seed, Profile::Mixed)) {
            let batches: Vec<Batch> = batches.into_values().collect();
            match id {
                LogId::CDC => cdc.push(batches),
                LogId::REGISTRY => {}
                _ => shards.push(batches),
            }
        }
    }
    let measure = || {
        let mut sums = BTreeMap::new();
        replay::<Shard>(
            &shards,
            |b| ShardEntry::decode(b).ok()?.body.map(|b| format!("shard {}", variant(format!("{b:?}")))),
            &mut sums,
        );
        replay::<Cdc>(
            &cdc,
            |b| CdcEntry::decode(b).ok()?.body.map(|b| format!("cdc {}", variant(format!("{b:?}")))),
            &mut sums,
        );
        sums
    };
    let names: Vec<String> = measure().into_keys().collect();
    let mut group = c.benchmark_group("apply");
    group.sample_size(10).warm_up_time(Duration::from_millis(1)).measurement_time(Duration::from_millis(1));
    for name in names {
        group.bench_function(&name, |b| {
            b.iter_custom(|rounds| {
                // As many replays as it takes; the mean of one entry times what was asked for.
                let (mut time, mut count) = (Duration::ZERO, 0);
                while count < rounds {
                    let (more, of) = measure()[&name];
                    (time, count) = (time + more, count + of);
                }
                time.mul_f64(rounds as f64 / count as f64)
            });
        });
    }
    group.finish();
}

criterion_group!(benches, paths, applying);
criterion_main!(benches);
