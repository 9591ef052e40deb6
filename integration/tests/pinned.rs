//! Every rare state is reached by its pinned seed, and seeds that met bugs which the simulation found pass. That those
//! bugs would be found again is shown by their mutants (`tests/mutants.rs`).
//!
//! A change of timing or of the generator moves what seeds reach. Then new pins are looked for with
//! `cargo run --release -p clutch-integration --example pin`, which keeps the pins that still hold.

use std::collections::{BTreeMap, BTreeSet};

use clutch_integration::{
    coverage,
    fuzz::run_checked,
    generate::{Profile, generate},
};

struct Pin {
    profile: Profile,
    seed: u64,
    what: String,
}

fn pins() -> Vec<Pin> {
    let text = include_str!("../pinned.txt");
    let lines = text.lines().filter(|l| !l.is_empty() && !l.starts_with('#'));
    lines
        .map(|line| {
            let mut words = line.splitn(3, ' ');
            let profile = match words.next() {
                Some("mixed") => Profile::Mixed,
                Some("metadata") => Profile::Metadata,
                Some("data") => Profile::Data,
                other => panic!("{other:?} is not a profile"),
            };
            let seed = words.next().and_then(|s| s.parse().ok()).expect("a seed");
            Pin { profile, seed, what: words.next().expect("a state").to_owned() }
        })
        .collect()
}

#[test]
fn every_state_is_reached_by_its_pinned_seed() {
    let pins = pins();
    let pinned: BTreeSet<String> = pins.iter().map(|p| p.what.clone()).collect();
    let missing: Vec<String> = coverage::states().into_iter().filter(|s| !pinned.contains(s)).collect();
    assert!(missing.is_empty(), "no seed is pinned for {missing:?}");
    let mut by_seed: BTreeMap<(String, u64), Vec<&Pin>> = BTreeMap::new();
    for pin in &pins {
        by_seed.entry((format!("{:?}", pin.profile), pin.seed)).or_default().push(pin);
    }
    let mut wrong = Vec::new();
    for of_seed in by_seed.values() {
        let first = of_seed[0];
        // Bugs of determinism show in the second run.
        let report = run_checked(&generate(first.seed, first.profile), true);
        for violation in &report.violations {
            wrong.push(format!("seed {}: {}: {}", first.seed, violation.checker, violation.what));
        }
        for pin in
            of_seed.iter().filter(|p| !p.what.starts_with("bug: ") && !report.coverage.contains(&p.what))
        {
            wrong.push(format!(
                "seed {} ({:?}) does not reach {:?} any more",
                pin.seed, pin.profile, pin.what
            ));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
