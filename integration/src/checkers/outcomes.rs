//! Done is in the log, refused is not, and only unknown, or what was declined by a leader alone, may be either.

use std::collections::BTreeMap;

use clutch_client::ClientError;
use clutch_proto::{operation, shard::shard_request};

use super::{Evidence, Violation};

fn is_step(op: &shard_request::Op) -> bool {
    !operation::of_shard(op).1.is_read()
}

/// Checks every mutation of a shard.
pub fn check(evidence: &Evidence) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (id, shard) in &evidence.shards {
        let mut done: BTreeMap<(u64, u64), bool> = BTreeMap::new();
        for step in &shard.steps {
            if let (Some(tag), Some(outcome)) = (&step.tag, &step.outcome)
                && step.is_first
            {
                *done.entry((tag.client, tag.sequence)).or_default() |= outcome.is_ok();
            }
        }
        for (index, (_, op)) in evidence.requests.iter().filter(|(_, (log, op))| log == id && is_step(op)) {
            let record = &evidence.records[*index];
            let (Some(tag), Some(ended)) = (&record.call.tag, &record.ended) else { continue };
            let in_log = done.get(&(tag.client, tag.sequence)).copied();
            let what = match (&ended.result, in_log) {
                (Ok(_), Some(true))
                | (Err(_), Some(false) | None)
                | (Err(ClientError::Unknown(_) | ClientError::Declined(_)), _) => {
                    continue;
                }
                (Ok(_), _) => "was acknowledged and is not in the log",
                (Err(_), Some(true)) => "was reported as certainly without effect and is in the log",
            };
            violations.push(Violation::new("outcomes", format!("{id}: {op:?} {what} ({:?})", ended.result)));
        }
    }
    violations.truncate(10);
    violations
}
