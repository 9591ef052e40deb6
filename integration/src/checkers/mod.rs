//! What must be true of every run, one file each.

pub mod causality;
pub mod clock;
pub mod convergence;
pub mod data;
pub mod invariants;
pub mod linearizability;
pub mod log_time;
pub mod outcomes;
pub mod registry;
pub mod search;
pub mod session;
pub mod state;
pub mod state_hash;
pub mod transactions;

use std::collections::BTreeMap;

use clutch_log::LogId;
use clutch_proto::shard::shard_request;
use clutch_shard::Pages;

use crate::{
    history::{History, Record},
    oracle::{ShardOracle, Step},
    recording::Batches,
    sim_cluster::SimCluster,
};

/// Something that must not be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The checker that found it.
    pub checker: &'static str,
    /// What.
    pub what: String,
}

impl Violation {
    /// A finding of a checker.
    pub fn new(checker: &'static str, what: String) -> Violation {
        Violation { checker, what }
    }
}

/// A shard's log, replayed by the oracle.
pub struct ShardEvidence {
    /// The state at the end.
    pub oracle: ShardOracle,
    /// What every entry must have done, in order.
    pub steps: Vec<Step>,
    /// What reads of clients must have seen, by their place in the records.
    pub reads: BTreeMap<usize, Result<clutch_proto::shard::shard_reply::Reply, clutch_proto::types::Code>>,
}

/// What a run left behind.
pub struct Evidence {
    /// What every log delivered.
    pub logs: BTreeMap<LogId, Batches>,
    /// What clients asked and were told.
    pub records: Vec<Record>,
    /// For each record of a shard's request: its log and what was asked.
    pub requests: BTreeMap<usize, (LogId, shard_request::Op)>,
    /// The oracle's word on each shard.
    pub shards: BTreeMap<LogId, ShardEvidence>,
    /// What was wrong while it was collected.
    pub violations: Vec<Violation>,
    /// How much answers of shards hold.
    pub pages: Pages,
}

impl Evidence {
    /// Replays all logs.
    pub fn collect(cluster: &SimCluster, records: Vec<Record>) -> Evidence {
        let logs: BTreeMap<LogId, Batches> =
            cluster.log_ids().into_iter().map(|id| (id, cluster.recording.batches(id))).collect();
        Evidence::of(logs, records, cluster.config().shards, cluster.config().pages())
    }

    /// Replays the logs of some cluster.
    pub fn of(logs: BTreeMap<LogId, Batches>, records: Vec<Record>, shards: u32, pages: Pages) -> Evidence {
        let mut evidence = Evidence {
            logs,
            records,
            requests: BTreeMap::new(),
            shards: BTreeMap::new(),
            violations: Vec::new(),
            pages,
        };
        linearizability::assign(&mut evidence, shards);
        for id in (0..shards).map(LogId::shard) {
            match linearizability::replay(&evidence, id) {
                Ok(shard) => drop(evidence.shards.insert(id, shard)),
                Err(what) => evidence.violations.push(Violation::new("log", what)),
            }
        }
        evidence
    }
}

/// Runs the checkers that need nothing but what clients saw and what the logs hold: of any cluster, simulated or not.
pub fn check_history(evidence: &Evidence) -> Vec<Violation> {
    let mut violations = outcomes::check(evidence);
    violations.extend(linearizability::check(evidence));
    violations.extend(search::check(evidence));
    violations.extend(session::check(evidence));
    violations.extend(log_time::check(evidence));
    violations.extend(causality::check(evidence));
    violations.extend(transactions::check(evidence));
    violations
}

/// Runs all checkers.
pub fn check(
    evidence: &mut Evidence,
    cluster: &SimCluster,
    history: &std::sync::Arc<History>,
    statuses: &convergence::Statuses,
) -> Vec<Violation> {
    let mut violations = std::mem::take(&mut evidence.violations);
    violations.extend(cluster.recording.violations().into_iter().map(|w| Violation::new("log", w)));
    violations.extend(check_history(evidence));
    violations.extend(clock::check(evidence, cluster));
    let (replayed, hashes) = state_hash::check(evidence, statuses);
    violations.extend(hashes);
    violations.extend(state::check(evidence, &replayed));
    violations.extend(invariants::check(&replayed));
    violations.extend(registry::check(evidence, &replayed));
    violations.extend(data::check(evidence, cluster, history));
    // It changes disks and logs; nothing may be looked at after it.
    violations.extend(registry::probe(cluster));
    violations
}
