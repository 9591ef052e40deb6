//! Every rare state is reached by its pinned seed, and seeds that met bugs which the simulation found pass. That those
//! bugs would be found again is shown by their mutants (`tests/mutants.rs`).
//!
//! The two are apart: a violation is a bug; a state that is not reached any more is not, because a change of timing or of the
//! generator moves what seeds reach. Then new pins are looked for with
//! `cargo run --release -p clutch-integration --example pin`, which keeps the pins that still hold, and does nothing when
//! there are violations.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::OnceLock,
};

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

/// A pinned seed's run: what it reached, and what was wrong.
struct Run {
    coverage: BTreeSet<String>,
    violations: Vec<String>,
}

/// Runs every pinned seed once for both tests.
fn runs() -> &'static BTreeMap<(String, u64), Run> {
    static RUNS: OnceLock<BTreeMap<(String, u64), Run>> = OnceLock::new();
    RUNS.get_or_init(|| {
        let seeds: BTreeMap<(String, u64), Profile> =
            pins().into_iter().map(|p| ((format!("{:?}", p.profile), p.seed), p.profile)).collect();
        let run = |((name, seed), profile): ((String, u64), Profile)| {
            // Bugs of determinism show in the second run.
            let report = run_checked(&generate(seed, profile), true);
            let violations =
                report.violations.iter().map(|v| format!("seed {seed}: {}: {}", v.checker, v.what));
            ((name, seed), Run { coverage: report.coverage, violations: violations.collect() })
        };
        seeds.into_iter().map(run).collect()
    })
}

/// Whatever else has changed, this is a bug, and no pin may be renewed before it is mended.
#[test]
fn no_pinned_seed_violates_anything() {
    let violations: Vec<&String> = runs().values().flat_map(|run| &run.violations).collect();
    assert!(
        violations.is_empty(),
        "VIOLATIONS, which are bugs (`clutch fuzz --seed N` repeats them; no pin may be renewed before): {violations:#?}"
    );
}

/// No bug by itself: a change of timing or of what is drawn moves what seeds reach.
#[test]
fn every_state_is_reached_by_its_pinned_seed() {
    let pins = pins();
    let pinned: BTreeSet<String> = pins.iter().map(|p| p.what.clone()).collect();
    let missing: Vec<String> = coverage::states().into_iter().filter(|s| !pinned.contains(s)).collect();
    assert!(missing.is_empty(), "no seed is pinned for {missing:?}");
    let is_reached =
        |pin: &Pin| runs()[&(format!("{:?}", pin.profile), pin.seed)].coverage.contains(&pin.what);
    let moved: Vec<String> = pins
        .iter()
        .filter(|pin| !pin.what.starts_with("bug: ") && !is_reached(pin))
        .map(|pin| format!("seed {} ({:?}) does not reach {:?} any more", pin.seed, pin.profile, pin.what))
        .collect();
    assert!(
        moved.is_empty(),
        "reach has moved, which is no violation; if the change was meant to, renew the pins (`--example pin`): {moved:#?}"
    );
}
