//! A failure becomes a small script that still fails, and whose text repeats it.
#![cfg(feature = "mutants")]

use clutch_integration::{
    generate::{Profile, generate},
    run::run,
    script::Script,
    shrink::shrink,
};
use clutch_proto::mutants::{self, Mutant};

#[test]
fn a_planted_bug_is_shown_in_a_few_events() {
    mutants::plant(Some(Mutant::RollbackForgets));
    let failing = (1..200).map(|seed| generate(seed, Profile::Mixed)).find_map(|script| {
        let report = run(&script);
        (!report.violations.is_empty()).then_some((script, report))
    });
    let (script, report) = failing.expect("the bug is found");
    let (small, small_report) = shrink(&script, &report);
    println!("{} events became {}:\n{small}", script.events.len(), small.events.len());
    for (at, what) in &small_report.timeline {
        println!("{:>12.6} {what}", at.as_secs_f64());
    }
    for violation in &small_report.violations {
        println!("{}: {}", violation.checker, violation.what);
    }
    assert!(small.events.len() < 30, "{} events are left", small.events.len());
    let again: Script = small.to_string().parse().expect("its own text");
    let repeated = run(&again);
    assert_eq!(repeated.violations, small_report.violations);
    assert_eq!(repeated.trace_hash, small_report.trace_hash);
    mutants::plant(None);
    assert!(run(&again).violations.is_empty(), "without the bug the script is fine");
}
