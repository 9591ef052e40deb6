//! Renews `pinned.txt`: pins that still reach their state stay, and fresh seeds are tried for the others.
//!
//! `cargo run --release -p clutch-integration --example pin -- [FIRST_SEED] [COUNT]` tries the seeds of that range and
//! writes the file. A state that none of them reaches keeps its old line, and is named on standard error.
//!
//! A seed that violates anything is a bug to be mended, not a pin to be replaced: then nothing is written.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use clutch_integration::{
    coverage,
    generate::{Profile, generate},
    run::run,
};

fn profile_of(word: &str) -> Profile {
    match word {
        "metadata" => Profile::Metadata,
        "data" => Profile::Data,
        _ => Profile::Mixed,
    }
}

/// What every seed of `jobs` reaches, found by as many threads as there are cores; those that nothing is left for
/// after `enough` says so are not run.
fn reach(
    jobs: &[(String, u64)],
    enough: &(dyn Fn(&BTreeSet<String>) -> bool + Sync),
    violations: &AtomicU64,
) -> BTreeMap<(String, u64), BTreeSet<String>> {
    let next = AtomicU64::new(0);
    let found = Mutex::new((BTreeMap::new(), BTreeSet::new()));
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed) as usize;
                    if at >= jobs.len() || enough(&found.lock().expect("no thread panics").1) {
                        return;
                    }
                    let (profile, seed) = &jobs[at];
                    let report = run(&generate(*seed, profile_of(profile)));
                    for violation in &report.violations {
                        violations.fetch_add(1, Ordering::Relaxed);
                        eprintln!("seed {seed}: {}: {}", violation.checker, violation.what);
                    }
                    let mut found = found.lock().expect("no thread panics");
                    found.1.extend(report.coverage.iter().cloned());
                    found.0.insert(jobs[at].clone(), report.coverage);
                }
            });
        }
    });
    found.into_inner().expect("no thread panics").0
}

fn main() -> std::io::Result<()> {
    let number =
        |n: usize, default: u64| std::env::args().nth(n).and_then(|a| a.parse().ok()).unwrap_or(default);
    let (first, count) = (number(1, 1), number(2, 6000));
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("pinned.txt");
    let text = std::fs::read_to_string(&path)?;
    let lines: Vec<&str> = text.lines().collect();
    let pins: Vec<(&str, u64, &str)> = lines
        .iter()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| {
            let mut words = line.splitn(3, ' ');
            Some((words.next()?, words.next()?.parse().ok()?, words.next()?))
        })
        .collect();
    let of_states: Vec<_> = pins.iter().filter(|pin| !pin.2.starts_with("bug: ")).collect();
    let jobs: BTreeSet<(String, u64)> =
        of_states.iter().map(|(profile, seed, _)| ((*profile).to_owned(), *seed)).collect();
    let violations = AtomicU64::new(0);
    let reached = reach(&Vec::from_iter(jobs), &|_| false, &violations);
    let mut kept: BTreeMap<String, (String, u64)> = BTreeMap::new();
    for (profile, seed, state) in &of_states {
        let at = ((*profile).to_owned(), *seed);
        if reached[&at].contains(*state) {
            kept.insert((*state).to_owned(), at);
        }
    }
    // What another pinned seed reaches needs no new one.
    let mut left: BTreeSet<String> =
        coverage::states().into_iter().filter(|s| !kept.contains_key(s)).collect();
    let mut take = |reached: &BTreeMap<(String, u64), BTreeSet<String>>, left: &mut BTreeSet<String>| {
        while let Some((at, states)) = reached
            .iter()
            .max_by_key(|(at, states)| (states.intersection(left).count(), std::cmp::Reverse(at.1)))
            .filter(|(_, states)| !states.is_disjoint(left))
        {
            for state in states {
                if left.remove(state) {
                    kept.insert(state.clone(), at.clone());
                }
            }
        }
    };
    take(&reached, &mut left);
    eprintln!("{} states need a new seed", left.len());
    let fresh: Vec<(String, u64)> =
        (first..first.saturating_add(count)).map(|seed| ("mixed".to_owned(), seed)).collect();
    let wanted = left.clone();
    take(&reach(&fresh, &|seen| wanted.is_subset(seen), &violations), &mut left);
    let mut out: Vec<String> =
        lines.iter().take_while(|l| l.starts_with('#')).map(|l| (*l).to_owned()).collect();
    for state in coverage::states() {
        if let Some((profile, seed)) = kept.get(&state) {
            out.push(format!("{profile} {seed} {state}"));
        } else {
            eprintln!("not reached: {state}");
            out.extend(
                of_states
                    .iter()
                    .filter(|pin| pin.2 == state)
                    .map(|(profile, seed, state)| format!("{profile} {seed} {state}")),
            );
        }
    }
    out.extend(
        pins.iter()
            .filter(|pin| pin.2.starts_with("bug: "))
            .map(|(profile, seed, what)| format!("{profile} {seed} {what}")),
    );
    if violations.into_inner() > 0 {
        return Err(std::io::Error::other(
            "there are violations: mend what they show first; the pins stay as they are",
        ));
    }
    std::fs::write(&path, out.join("\n") + "\n")
}
