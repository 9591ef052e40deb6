//! A log's time is computed anew from its stamps, so that it strictly increases over changes of leaders and whatever
//! clocks do; every answer must carry a position of the log and a time at or above the one there. That no later request
//! is told an earlier moment is the linearizability checker's to see.

use std::collections::BTreeMap;

use clutch_log::LogId;
use clutch_proto::{session::Role, state::Entry};
use prost::Message as _;

use super::{Evidence, Violation};

/// First and last time of each record of a log.
fn times(evidence: &Evidence, id: LogId) -> BTreeMap<u64, Vec<u64>> {
    let mut times = BTreeMap::new();
    let mut last = 0u64;
    for (position, batch) in evidence.logs.get(&id).into_iter().flatten() {
        let of_batch = batch.entries.iter().map(|entry| {
            let stamp = Entry::decode(entry.clone()).map_or(0, |e| e.stamp);
            last = stamp.max(last + 1);
            last
        });
        times.insert(position.0, of_batch.collect());
    }
    times
}

/// Checks what clients were told of times.
pub fn check(evidence: &Evidence) -> Vec<Violation> {
    let mut violations = Vec::new();
    let by_log: BTreeMap<LogId, BTreeMap<u64, Vec<u64>>> =
        evidence.logs.keys().map(|id| (*id, times(evidence, *id))).collect();
    for (index, record) in evidence.records.iter().enumerate() {
        let log = match record.call.role {
            Role::Cdc => Some(LogId::CDC),
            _ => evidence.requests.get(&index).map(|(log, _)| *log),
        };
        let (Some(ended), Some(times)) = (&record.ended, log.and_then(|log| by_log.get(&log))) else {
            continue;
        };
        if ended.at.position == 0 || ended.result.is_err() {
            continue;
        }
        let at = times.range(..=ended.at.position).next_back();
        let fits = match (at, &record.call.tag) {
            // A mutation is told the time of its entry; the handler may add what its node has seen since.
            (Some((position, times)), Some(_)) => {
                *position == ended.at.position && times.first().is_some_and(|first| ended.at.time >= *first)
            }
            (Some((_, times)), None) => times.last().is_some_and(|last| ended.at.time >= *last),
            (None, _) => false,
        };
        if !fits {
            let what = format!(
                "{}: an answer carries position {} and time {}; the log has {at:?}",
                log.unwrap_or(LogId::CDC),
                ended.at.position,
                ended.at.time
            );
            violations.push(Violation::new("log time", what));
        }
    }
    violations.truncate(10);
    violations
}
