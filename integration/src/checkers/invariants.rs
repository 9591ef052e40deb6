//! The invariants of each shard, and across shards once nothing is in flight.

use clutch_log::LogId;
use clutch_shard::invariants::{check_cluster, check_shard};

use super::{Violation, state::Replayed};

/// Checks the states at the end.
pub fn check(replayed: &Replayed) -> Vec<Violation> {
    let mut wrong = Vec::new();
    let mut facts = Vec::new();
    for (id, store) in replayed.iter().filter(|(id, _)| **id != LogId::REGISTRY) {
        match check_shard(&**store) {
            Ok((found, of_shard)) => {
                wrong.extend(found.into_iter().map(|what| format!("{id}: {what}")));
                facts.push(of_shard);
            }
            Err(error) => wrong.push(format!("{id}: {error}")),
        }
    }
    wrong.extend(check_cluster(&facts));
    wrong.into_iter().take(10).map(|what| Violation::new("invariants", what)).collect()
}
