//! Many seeds, one after another or side by side: what `clutch fuzz` does.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use crate::{
    coverage,
    generate::{Profile, generate_replicated, strike},
    run::{Report, run},
    script::{Fault, Script},
    sim_cluster::Members,
};

/// What to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// The first seed; the others follow it.
    pub first_seed: u64,
    /// How many seeds at most.
    pub seeds: u64,
    /// No new seed begins after this.
    pub time: Option<Duration>,
    /// What the scripts are like.
    pub profile: Profile,
    /// What keeps the logs.
    pub members: Members,
    /// Operations that came from elsewhere, each seed under its own faults; instead of generated ones.
    pub trace: Option<Script>,
    /// Threads, each with worlds of its own.
    pub jobs: usize,
    /// Every so manieth seed runs twice and must give the same trace; 0 for none.
    pub repeat_every: u64,
    /// Ends with so many failing seeds.
    pub failures_max: usize,
}

impl Options {
    fn script(&self, seed: u64) -> Script {
        match &self.trace {
            None => generate_replicated(seed, self.profile, self.members),
            Some(trace) => {
                let mut script = trace.clone();
                self.members.set(seed, &mut script.cluster);
                strike(&mut script, seed);
                script
            }
        }
    }
}

/// A seed that failed.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The seed.
    pub seed: u64,
    /// What it ran.
    pub script: Script,
    /// What came of it.
    pub report: Report,
}

/// What all seeds gave together.
#[derive(Debug, Default)]
pub struct Summary {
    /// Seeds that ran.
    pub seeds: u64,
    /// Operations of clients that ended.
    pub operations: u64,
    /// Requests that they took.
    pub requests: u64,
    /// Faults that struck, by kind.
    pub faults: BTreeMap<&'static str, u64>,
    /// Hash of all traces; the same for the same seeds, in any order.
    pub trace_hash: u64,
    /// In how many seeds each rare state was reached; all that are known are listed.
    pub coverage: BTreeMap<String, u64>,
    /// Seeds that failed.
    pub failures: Vec<Failure>,
}

impl Summary {
    fn new() -> Summary {
        let coverage = coverage::states().into_iter().map(|s| (s, 0)).collect();
        let faults = Fault::KINDS.into_iter().map(|k| (k, 0)).collect();
        Summary { coverage, faults, ..Summary::default() }
    }

    /// Adds what one run gave.
    pub fn add(&mut self, seed: u64, script: &Script, report: Report) {
        self.seeds += 1;
        self.operations += report.operations;
        self.requests += report.requests;
        for (kind, count) in &report.faults {
            *self.faults.entry(kind).or_default() += count;
        }
        self.trace_hash = self.trace_hash.wrapping_add(report.trace_hash.wrapping_mul(seed | 1));
        for state in &report.coverage {
            // What is reached and not in the list is no rare state.
            if let Some(count) = self.coverage.get_mut(state) {
                *count += 1;
            }
        }
        if !report.violations.is_empty() {
            self.failures.push(Failure { seed, script: script.clone(), report });
        }
    }

    /// Faults in all.
    pub fn faults_all(&self) -> u64 {
        self.faults.values().sum()
    }

    /// Rare states that were reached.
    pub fn reached(&self) -> usize {
        self.coverage.values().filter(|count| **count > 0).count()
    }
}

/// The name under which another trace of the same script is reported.
pub const DETERMINISM: &str = "determinism";

/// Runs one script twice if asked; another trace the second time is a violation.
pub fn run_checked(script: &Script, twice: bool) -> Report {
    let mut report = run(script);
    if twice {
        let again = run(script);
        if again.trace_hash != report.trace_hash {
            let what = format!(
                "the same script gave the trace {:016x} and then {:016x}",
                report.trace_hash, again.trace_hash
            );
            report.violations.push(crate::checkers::Violation::new(DETERMINISM, what));
        }
    }
    report
}

/// Runs a script that came from elsewhere, twice, because it may be determinism that failed.
pub fn run_script(script: &Script) -> Summary {
    let mut summary = Summary::new();
    summary.add(script.seed, script, run_checked(script, true));
    summary
}

/// Runs seeds until there are enough, the time is up or too many have failed. `progress` is called after every seed.
pub fn fuzz(options: &Options, progress: &(dyn Fn(&Summary) + Sync)) -> Summary {
    let begin = Instant::now();
    let next = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let summary = Mutex::new(Summary::new());
    std::thread::scope(|scope| {
        for _ in 0..options.jobs.max(1) {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= options.seeds || options.time.is_some_and(|t| begin.elapsed() >= t) {
                        return;
                    }
                    let seed = options.first_seed.wrapping_add(number);
                    let script = options.script(seed);
                    let twice = options.repeat_every > 0 && seed.is_multiple_of(options.repeat_every);
                    let report = run_checked(&script, twice);
                    let mut summary = summary.lock();
                    summary.add(seed, &script, report);
                    if summary.failures.len() >= options.failures_max {
                        stop.store(true, Ordering::Relaxed);
                    }
                    progress(&summary);
                }
            });
        }
    });
    let mut summary = summary.into_inner();
    summary.failures.sort_by_key(|f| f.seed);
    summary
}
