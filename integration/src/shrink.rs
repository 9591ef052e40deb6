//! Makes a failing script small: removes what is not needed for the same checker to fail.
//!
//! Delta debugging (Zeller and Hildebrandt, 2002) over the events. A removal moves all later draws of the world, so a
//! candidate that does not fail is tried again under a few other seeds of the world before it is given up.

use std::time::{Duration, Instant};

use crate::{
    fuzz::{DETERMINISM, run_checked},
    run::Report,
    script::{Action, Fault, Party, Script},
};

/// Runs that shrinking may take, and the time after which it is content with what it has.
const RUNS_MAX: usize = 3000;
const TIME_MAX: Duration = Duration::from_secs(90);
/// Seeds of the world that are tried for one candidate once the script is short.
const SEEDS_PER_CANDIDATE: u64 = 4;
/// A script of so many events is short.
const SHORT: usize = 60;

struct Shrinker {
    checker: &'static str,
    runs_left: usize,
    begun: Instant,
    best: Script,
    report: Report,
}

/// The smallest script found that fails the same checker, and its report.
pub fn shrink(script: &Script, report: &Report) -> (Script, Report) {
    let Some(first) = report.violations.first() else { return (script.clone(), report.clone()) };
    let mut shrinker = Shrinker {
        checker: first.checker,
        runs_left: RUNS_MAX,
        begun: Instant::now(),
        best: script.clone(),
        report: report.clone(),
    };
    shrinker.drop_late_events();
    let mut before = usize::MAX;
    while shrinker.best.events.len() < before && shrinker.runs_left > 0 {
        before = shrinker.best.events.len();
        shrinker.remove_lanes();
        shrinker.remove_chunks();
    }
    shrinker.simplify_cluster();
    (shrinker.best, shrinker.report)
}

impl Shrinker {
    /// Keeps the candidate if it fails, too.
    fn attempt(&mut self, mut candidate: Script) -> bool {
        let seeds = if candidate.events.len() > SHORT { 1 } else { SEEDS_PER_CANDIDATE };
        let clients = candidate.events.iter().filter_map(|e| match &e.action {
            Action::Operate(lane, _) => Some(lane.client + 1),
            Action::Strike(fault) => fault.parties().iter().filter_map(|p| client_of(*p)).max(),
        });
        candidate.clients = clients.max().unwrap_or(1);
        let seed = candidate.seed;
        for other in 0..seeds {
            if self.begun.elapsed() > TIME_MAX {
                self.runs_left = 0;
            }
            if self.runs_left == 0 {
                return false;
            }
            self.runs_left -= 1;
            // Even and odd seeds end differently.
            candidate.seed = seed.wrapping_add(other * 2);
            let report = run_checked(&candidate, self.checker == DETERMINISM);
            if report.violations.iter().any(|v| v.checker == self.checker) {
                (self.best, self.report) = (candidate, report);
                return true;
            }
        }
        false
    }

    /// What came long after the failure is rarely needed.
    fn drop_late_events(&mut self) {
        let mut keep = self.best.events.len() / 2;
        while keep > 0 && self.runs_left > 0 {
            let mut candidate = self.best.clone();
            candidate.events.truncate(keep);
            if !self.attempt(candidate) {
                break;
            }
            keep = self.best.events.len() / 2;
        }
    }

    fn remove_lanes(&mut self) {
        let lanes: std::collections::BTreeSet<_> = self
            .best
            .events
            .iter()
            .filter_map(|e| match &e.action {
                Action::Operate(lane, _) => Some(*lane),
                Action::Strike(_) => None,
            })
            .collect();
        for lane in lanes {
            let mut candidate = self.best.clone();
            candidate.events.retain(|e| !matches!(&e.action, Action::Operate(of, _) if *of == lane));
            if candidate.events.len() < self.best.events.len() {
                self.attempt(candidate);
            }
        }
    }

    fn remove_chunks(&mut self) {
        let mut size = (self.best.events.len() / 2).max(1);
        loop {
            let mut at = 0;
            while at < self.best.events.len() && self.runs_left > 0 {
                let mut candidate = self.best.clone();
                let end = (at + size).min(candidate.events.len());
                candidate.events.drain(at..end);
                if !self.attempt(candidate) {
                    at += size;
                }
            }
            if size == 1 || self.runs_left == 0 {
                return;
            }
            size = (size / 2).max(1);
        }
    }

    fn simplify_cluster(&mut self) {
        for shards in [1, 2] {
            if shards < self.best.cluster.shards
                && self.names_only(|p| !matches!(p, Party::Shard(n) if n >= shards))
            {
                let mut candidate = self.best.clone();
                candidate.cluster.shards = shards;
                if self.attempt(candidate) {
                    break;
                }
            }
        }
        let blocks = self.best.cluster.data_blocks + self.best.cluster.parity_blocks;
        if blocks < self.best.cluster.disks
            && self.names_only(|p| !matches!(p, Party::Disk(n) if n >= blocks))
        {
            let mut candidate = self.best.clone();
            candidate.cluster.disks = blocks;
            self.attempt(candidate);
        }
    }

    fn names_only(&self, allowed: impl Fn(Party) -> bool) -> bool {
        self.best.events.iter().all(|e| match &e.action {
            Action::Strike(fault) => Fault::parties(fault).into_iter().all(&allowed),
            Action::Operate(..) => true,
        })
    }
}

fn client_of(party: Party) -> Option<u32> {
    match party {
        Party::Client(n) => Some(n + 1),
        _ => None,
    }
}
