//! Wrong clocks do no harm: no log is pulled into the future by one, no request is refused as too old that was never sent
//! before, no good certificate is refused.

use clutch_proto::state::Entry;
use clutch_runtime::{hlc, simulated::START_NS};
use prost::Message as _;

use super::{Evidence, Violation};
use crate::sim_cluster::SimCluster;

/// How far ahead small errors of clocks may add up to: a start believes a quarter of a second, skew and drift are below seconds.
const SLACK_NS: u64 = 10_000_000_000;

/// What must never be noted.
const NEVER: &[&str] = &["client: expired before it was ever sent", "blocks: a good certificate is refused"];

/// Looks at the times of all entries and at what was noted.
pub fn check(evidence: &Evidence, cluster: &SimCluster) -> Vec<Violation> {
    let mut violations = Vec::new();
    let elapsed = cluster.world.true_time().0 - START_NS;
    // Time may go faster than the true one by as much as the clocks may slew.
    let latest = START_NS + elapsed + elapsed / hlc::SLEW + SLACK_NS;
    for (id, batches) in &evidence.logs {
        let late = batches.iter().find_map(|(position, batch)| {
            let stamps = batch.entries.iter().filter_map(|entry| Entry::decode(entry.clone()).ok());
            stamps.map(|entry| entry.stamp).find(|stamp| *stamp > latest).map(|stamp| (position, stamp))
        });
        if let Some((position, stamp)) = late {
            let ahead = (stamp - cluster.world.true_time().0) / 1_000_000_000;
            let what = format!("{id}: the entry at {position} is stamped {ahead} s in the future");
            violations.push(Violation::new("clock", what));
        }
    }
    let notes = cluster.world.notes();
    for never in NEVER.iter().filter(|never| notes.contains_key(**never)) {
        violations.push(Violation::new("clock", (*never).to_owned()));
    }
    violations
}
