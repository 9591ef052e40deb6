//! Every rare state is reached by a pinned script, and scripts that met bugs which the simulation found pass. That those
//! bugs would be found again is shown by their mutants (`tests/mutants.rs`).
//!
//! The two are apart: a violation is a bug; a state that is not reached any more is not, because a change of timing moves what
//! scripts reach. Then new pins are looked for with `cargo run --release -p clutch-integration --example pin`, which keeps
//! the pins that still hold, and does nothing when there are violations.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::OnceLock,
};

use clutch_integration::{
    coverage,
    fuzz::run_checked,
    pins::{self, Pin},
};

/// A pinned script's run: what it reached, and what was wrong.
struct Run {
    coverage: BTreeSet<String>,
    violations: Vec<String>,
}

fn pins() -> &'static [Pin] {
    static PINS: OnceLock<Vec<Pin>> = OnceLock::new();
    PINS.get_or_init(|| pins::load().expect("the pins are scripts"))
}

/// Runs every pin once for both tests.
fn runs() -> &'static BTreeMap<String, Run> {
    static RUNS: OnceLock<BTreeMap<String, Run>> = OnceLock::new();
    RUNS.get_or_init(|| {
        let run = |pin: &Pin| {
            // Bugs of determinism show in the second run.
            let report = run_checked(&pin.script, true);
            let violations =
                report.violations.iter().map(|v| format!("{}: {}: {}", pin.name, v.checker, v.what));
            (pin.name.clone(), Run { coverage: report.coverage, violations: violations.collect() })
        };
        pins().iter().map(run).collect()
    })
}

/// Whatever else has changed, this is a bug, and no pin may be renewed before it is mended.
#[test]
fn no_pinned_script_violates_anything() {
    let violations: Vec<&String> = runs().values().flat_map(|run| &run.violations).collect();
    assert!(
        violations.is_empty(),
        "VIOLATIONS, which are bugs (`clutch fuzz --script integration/pins/NAME` repeats them; no pin may be renewed before): {violations:#?}"
    );
}

/// A new operation needs its way through a client, a script, the generator and the oracle.
#[test]
fn every_operation_is_done_by_a_pinned_script() {
    let missing: Vec<String> = coverage::operations()
        .into_iter()
        .filter(|operation| !runs().values().any(|run| run.coverage.contains(operation)))
        .collect();
    assert!(
        missing.is_empty(),
        "no pinned script does {missing:?}: let a script's operation do it, and renew the pins (`--example pin`)"
    );
}

/// No bug by itself: a change of timing moves what scripts reach.
#[test]
fn every_state_is_reached_by_a_pinned_script() {
    let pinned: BTreeSet<&String> = pins().iter().flat_map(|pin| &pin.reaches).collect();
    let missing: Vec<String> = coverage::states().into_iter().filter(|s| !pinned.contains(s)).collect();
    assert!(missing.is_empty(), "no script is pinned for {missing:?}");
    let bugs = pins().iter().map(|pin| pin.bugs.len()).sum::<usize>();
    assert!(bugs >= 9, "{bugs} scripts of bugs are left of the nine that there were");
    let states = pins().iter().flat_map(|pin| pin.reaches.iter().map(|state| (&pin.name, state)));
    let moved: Vec<String> = states
        .filter(|(name, state)| !runs()[*name].coverage.contains(*state))
        .map(|(name, state)| format!("{name} does not reach {state:?} any more"))
        .collect();
    assert!(
        moved.is_empty(),
        "reach has moved, which is no violation; if the change was meant to, renew the pins (`--example pin`): {moved:#?}"
    );
}
