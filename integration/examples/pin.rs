//! Renews `integration/pins`: pins that still reach their states stay, and fresh seeds are tried for the others.
//!
//! `cargo run --release -p clutch-integration --example pin -- [FIRST_SEED] [COUNT] [raft]` tries the seeds of that range, with `raft`
//! on that engine alone, for states that only it has. Of the
//! scripts that reach what is missing it keeps few and short ones. A state that none of them reaches is named on standard
//! error, and its old pin stays.
//!
//! A script that violates anything is a bug to be mended, not a pin to be replaced: then nothing is written.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use anyhow::{Result, ensure};
use clutch_integration::{
    coverage,
    generate::{Profile, generate_replicated},
    pins::{self, Pin},
    run::run,
    script::Script,
    sim_cluster::{Engine, Members},
};

/// What each script reaches, by as many threads as there are cores; with how many violations.
fn reach(scripts: &(dyn Fn(u64) -> Script + Sync), count: u64) -> (BTreeMap<u64, BTreeSet<String>>, u64) {
    let (next, violations) = (AtomicU64::new(0), AtomicU64::new(0));
    let found = Mutex::new(BTreeMap::new());
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    if at >= count {
                        return;
                    }
                    let script = scripts(at);
                    let report = run(&script);
                    for violation in &report.violations {
                        violations.fetch_add(1, Ordering::Relaxed);
                        eprintln!("seed {}: {}: {}", script.seed, violation.checker, violation.what);
                    }
                    found.lock().expect("no thread panics").insert(at, report.coverage);
                }
            });
        }
    });
    (found.into_inner().expect("no thread panics"), violations.into_inner())
}

/// Every third one has logs of several members, and one of six the raft engine, or all of them.
fn fresh_script(seed: u64) -> Script {
    let members = match seed % 6 {
        _ if std::env::args().nth(3).is_some_and(|engine| engine == "raft") => Members::Of(Engine::Raft, 3),
        0 | 3 => Members::Of(Engine::Sim, 3),
        5 => Members::Of(Engine::Raft, 3),
        _ => Members::Drawn,
    };
    generate_replicated(seed, Profile::Mixed, members)
}

fn main() -> Result<()> {
    let number =
        |n: usize, default: u64| std::env::args().nth(n).and_then(|a| a.parse().ok()).unwrap_or(default);
    let (first, count) = (number(1, 1), number(2, 6000));
    let mut pins = pins::load()?;
    let (reached, violations) = reach(&|at| pins[at as usize].script.clone(), pins.len() as u64);
    ensure!(violations == 0, "there are violations: mend what they show first; the pins stay as they are");
    let states: BTreeSet<String> = coverage::states().into_iter().chain(coverage::operations()).collect();
    let mut left = states.clone();
    let mut lost: BTreeMap<String, usize> = BTreeMap::new();
    for (at, pin) in pins.iter_mut().enumerate() {
        let reached = &reached[&(at as u64)];
        lost.extend(pin.reaches.difference(reached).map(|state| (state.clone(), at)));
        pin.reaches.retain(|state| reached.contains(state) && states.contains(state));
        left.retain(|state| !pin.reaches.contains(state));
    }
    // What another pinned script reaches needs no new one.
    for (at, pin) in pins.iter_mut().enumerate() {
        let more: Vec<String> = left.intersection(&reached[&(at as u64)]).cloned().collect();
        left.retain(|state| !more.contains(state));
        pin.reaches.extend(more);
    }
    eprintln!("{} states need a new script", left.len());
    if !left.is_empty() {
        let (fresh, violations) = reach(&|at| fresh_script(first + at), count);
        ensure!(
            violations == 0,
            "there are violations: mend what they show first; the pins stay as they are"
        );
        let lengths: BTreeMap<u64, usize> = fresh
            .iter()
            .filter(|(_, states)| !states.is_disjoint(&left))
            .map(|(at, _)| (*at, fresh_script(first + at).to_string().len()))
            .collect();
        // The most new states for a byte.
        let worth = |at: u64, left: &BTreeSet<String>| {
            fresh[&at].intersection(left).count() as f64 / (2000 + lengths[&at]) as f64
        };
        while let Some(best) = lengths
            .keys()
            .copied()
            .filter(|at| !fresh[at].is_disjoint(&left))
            .max_by(|a, b| worth(*a, &left).total_cmp(&worth(*b, &left)))
        {
            let reaches: BTreeSet<String> = left.intersection(&fresh[&best]).cloned().collect();
            left.retain(|state| !reaches.contains(state));
            let seed = first + best;
            let script = fresh_script(seed);
            // The seed may have made another script once, which stays.
            let is_free = |name: &String| pins.iter().all(|pin| pin.name != *name);
            let names = (0..).map(|n| match n {
                0 => format!("{seed}.script"),
                n => format!("{seed}-{n}.script"),
            });
            let name = { names }.find(is_free).expect("one of them is free");
            pins.push(Pin { name, reaches, bugs: Vec::new(), script });
        }
    }
    for state in &left {
        eprintln!("not reached: {state}");
        if let Some(pin) = lost.get(state) {
            pins[*pin].reaches.insert(state.clone());
        }
    }
    let mut bytes = 0;
    for pin in &pins {
        let path = pins::dir().join(&pin.name);
        if pin.reaches.is_empty() && pin.bugs.is_empty() {
            fs::remove_file(&path).ok();
            continue;
        }
        bytes += pin.text().len();
        fs::write(path, pin.text())?;
    }
    eprintln!("{} scripts, {bytes} bytes", pins.len());
    Ok(())
}
