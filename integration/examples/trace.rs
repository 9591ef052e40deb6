//! Prints the trace hash of each seed, to compare builds.
//!
//! `cargo run -p clutch-integration --example trace -- FIRST_SEED COUNT`

use clutch_integration::{
    generate::{Profile, generate},
    run::run,
};

fn main() {
    let number =
        |n: usize, default: u64| std::env::args().nth(n).and_then(|a| a.parse().ok()).unwrap_or(default);
    let (first, count) = (number(1, 1), number(2, 10));
    for seed in first..first + count {
        let report = run(&generate(seed, Profile::Mixed));
        println!("{seed} {:016x} {} {}", report.trace_hash, report.operations, report.violations.len());
    }
}
