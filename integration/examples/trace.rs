//! Prints the trace hash of each seed, to compare builds.
//!
//! `cargo run -p clutch-integration --example trace -- FIRST_SEED COUNT`

use clutch_integration::{
    generate::{Profile, generate_replicated},
    run::run,
    sim_cluster::{Engine, Members},
};

fn main() {
    let number =
        |n: usize, default: u64| std::env::args().nth(n).and_then(|a| a.parse().ok()).unwrap_or(default);
    let (first, count) = (number(1, 1), number(2, 10));
    for seed in first..first + count {
        // One of four on the raft engine, whose library is another one with debug assertions.
        let members = match seed % 4 {
            0 => Members::Of(Engine::Raft, 3),
            _ => Members::Drawn,
        };
        let report = run(&generate_replicated(seed, Profile::Mixed, members));
        println!("{seed} {:016x} {} {}", report.trace_hash, report.operations, report.violations.len());
    }
}
