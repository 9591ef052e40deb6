//! Looks for seeds that reach the rare states of `coverage.rs` and prints them as `pinned.txt` has them.
//!
//! `cargo run --release -p clutch-integration --example pin -- FIRST_SEED COUNT [metadata|data]`

use std::collections::{BTreeMap, BTreeSet};

use clutch_integration::{
    coverage,
    generate::{Profile, generate},
    run::run,
};

fn main() {
    let number =
        |n: usize, default: u64| std::env::args().nth(n).and_then(|a| a.parse().ok()).unwrap_or(default);
    let (first, count) = (number(1, 1), number(2, 1000));
    let profile = match std::env::args().nth(3).as_deref() {
        Some("metadata") => Profile::Metadata,
        Some("data") => Profile::Data,
        _ => Profile::Mixed,
    };
    let mut by_seed: BTreeMap<u64, BTreeSet<String>> = BTreeMap::new();
    let mut left: BTreeSet<String> = coverage::states().into_iter().collect();
    let mut times: BTreeMap<String, u64> = BTreeMap::new();
    for seed in first..first + count {
        let report = run(&generate(seed, profile));
        for violation in &report.violations {
            eprintln!("seed {seed}: {}: {}", violation.checker, violation.what);
        }
        for state in &report.coverage {
            *times.entry(state.clone()).or_default() += 1;
        }
        // What is rare is kept; what is common is in those seeds, too.
        let new = report.coverage.iter().any(|state| left.contains(state) || times[state] < 3);
        if new {
            left.retain(|state| !report.coverage.contains(state));
            by_seed.insert(seed, report.coverage);
        }
    }
    let mut uncovered: BTreeSet<String> = by_seed.values().flatten().cloned().collect();
    let mut pins: BTreeMap<String, u64> = BTreeMap::new();
    while !uncovered.is_empty() {
        let best = by_seed.iter().max_by_key(|(seed, states)| {
            (states.intersection(&uncovered).count(), std::cmp::Reverse(**seed))
        });
        let Some((seed, states)) = best else { break };
        for state in states {
            if uncovered.remove(state) {
                pins.insert(state.clone(), *seed);
            }
        }
    }
    for state in coverage::states() {
        match pins.get(&state) {
            Some(seed) => println!("{} {seed} {state}", format!("{profile:?}").to_lowercase()),
            None => println!("# not reached: {state}"),
        }
    }
}
