//! Every planted bug is found, by the checker that is there for it, within 1,000 seeds, or by what needs no seeds: the
//! enumeration of steps, the model of batches, and clusters in which one thing happens.

use clutch_integration::{
    batches, begun_anew, cut_off, denied, diverged,
    generate::{Profile, generate_replicated},
    hanging, healing, joining, just_started, late_placement, late_write, led_ahead, names, old_snapshot,
    run::run,
    sim_cluster::{Engine, Members},
    slow_reader, steps,
};
use clutch_proto::mutants::{self, Mutant};

const SEEDS_MAX: u64 = 1000;

/// How often those show that one kind of fault, or one order, brings out: in worlds without end they would be found, too, but late.
fn find_apart(mutant: Mutant, checker: &'static str) -> Result<(u64, &'static str), String> {
    mutants::plant(Some(mutant));
    let found = match checker {
        "steps" => [steps::blocks(), steps::log(), steps::stalled(), steps::recovery()].concat(),
        "names" => names::paths(),
        "hanging" => hanging::all(),
        "healing" => healing::all(),
        "slow reader" => slow_reader::all(),
        "late write" => late_write::all(),
        "led ahead" => led_ahead::all(),
        "diverged" => diverged::all(),
        "just started" => just_started::all(),
        "begun anew" => begun_anew::all(),
        "denied" => denied::all(),
        "cut off" => cut_off::all(),
        "joining" => joining::all(),
        "late placement" => late_placement::all(),
        "old snapshot" => old_snapshot::all(),
        _ if !batches::idle().is_empty() => batches::idle(),
        _ => (0..SEEDS_MAX).flat_map(batches::check).take(3).collect(),
    };
    mutants::plant(None);
    match found.len() {
        0 => Err(format!("{mutant:?} was not found by {checker}")),
        count => Ok((count as u64, checker)),
    }
}

fn find(mutant: Mutant, checkers: &[&'static str]) -> Result<(u64, &'static str), String> {
    if let [
        checker @ ("steps" | "batches" | "names" | "hanging" | "slow reader" | "led ahead" | "diverged"
        | "just started" | "begun anew" | "denied" | "cut off" | "joining" | "late placement"
        | "late write" | "old snapshot" | "healing"),
    ] = checkers
    {
        return find_apart(mutant, checker);
    }
    mutants::plant(Some(mutant));
    let members = match checkers.first() {
        Some(&"replicas") => Members::Of(Engine::Sim, 3),
        Some(&"raft") => Members::Of(Engine::Raft, 3),
        _ => Members::Drawn,
    };
    let (mut others, mut found) = (std::collections::BTreeSet::new(), None);
    for seed in 1..=SEEDS_MAX {
        let report = run(&generate_replicated(seed, Profile::Mixed, members));
        found = report.violations.iter().find(|v| checkers.contains(&v.checker)).map(|v| (seed, v.checker));
        if found.is_some() {
            break;
        }
        others.extend(report.violations.iter().map(|v| format!("{}: {}", v.checker, v.what)));
    }
    mutants::plant(None);
    found.ok_or_else(|| {
        format!(
            "{mutant:?} was not found by {checkers:?}; others said {:?}",
            others.iter().take(3).collect::<Vec<_>>()
        )
    })
}

#[test]
fn every_planted_bug_is_found() {
    let only = std::env::var("MUTANT").ok();
    let all: Vec<_> = Mutant::ALL
        .into_iter()
        // Those of the command line, and of what needs no world, are found by their own tests.
        .filter(|(_, checkers)| !matches!(checkers.first(), Some(&("tools" | "units"))))
        .filter(|(mutant, _)| {
            only.as_ref().is_none_or(|names| names.split(',').any(|name| format!("{mutant:?}") == name))
        })
        .collect();
    let next = std::sync::atomic::AtomicUsize::new(0);
    let missed = std::sync::Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some((mutant, checkers)) =
                    all.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed))
                {
                    match find(*mutant, checkers) {
                        Ok((seed, checker)) => println!("{mutant:?}: seed (or times) {seed}, by {checker}"),
                        Err(what) => missed.lock().expect("not poisoned").push(what),
                    }
                }
            });
        }
    });
    let missed = missed.into_inner().expect("not poisoned");
    assert!(missed.is_empty(), "{missed:#?}");
}
