//! What causes something comes before it in time, whatever the clocks of their nodes say: a cut of all logs at one time then has
//! the cause of everything that is in it. A transaction begins before each of its steps, and each step is done before the entry
//! that brings its answer.

use std::collections::BTreeMap;

use clutch_log::LogId;
use clutch_proto::{
    cdc::{CdcEntry, StepDone, cdc_entry::Body},
    state::{Entry, entry::Kind},
};
use prost::Message as _;

use super::{
    Evidence, Violation,
    transactions::{STEP_BITS, transactions},
};

/// Checks every transaction.
pub fn check(evidence: &Evidence) -> Vec<Violation> {
    let mut violations = Vec::new();
    let began = transactions(evidence);
    let answered = answered(evidence);
    for (log, shard) in &evidence.shards {
        for step in shard.steps.iter().filter(|step| step.is_first) {
            let Some(tag) = step.tag.filter(|tag| tag.client == clutch_cdc::STEP_CLIENT) else { continue };
            let id = tag.sequence >> STEP_BITS;
            let number = (tag.sequence & ((1 << STEP_BITS) - 1)) as u32;
            if let Some(begin) = began.get(&id).map(|row| row.started_at).filter(|begin| step.time <= *begin)
            {
                violations.push(wrong(format!(
                    "{log}: step {number} of transaction {id}, which began at {begin}, was done at {}",
                    step.time
                )));
            }
            if let Some(end) = answered.get(&(id, number)).filter(|end| **end <= step.time) {
                violations.push(wrong(format!(
                    "{log}: step {number} of transaction {id} was done at {}, and its answer was logged at {end}",
                    step.time
                )));
            }
        }
    }
    violations.truncate(10);
    violations
}

fn wrong(what: String) -> Violation {
    Violation::new("causality", what)
}

/// When the answer to each step was logged last, by transaction and step: where a walk begins again, answers that were read
/// ahead are thrown away, and their numbers are used again.
fn answered(evidence: &Evidence) -> BTreeMap<(u64, u32), u64> {
    let mut answered = BTreeMap::new();
    let mut time = 0;
    for entry in evidence.logs.get(&LogId::CDC).into_iter().flatten().flat_map(|(_, batch)| &batch.entries) {
        let Ok(entry) = Entry::decode(entry.clone()) else { continue };
        time = entry.stamp.max(time + 1);
        let Some(Kind::Body(body)) = entry.kind else { continue };
        let Ok(CdcEntry { body: Some(Body::StepDone(done)), .. }) = CdcEntry::decode(body) else { continue };
        let StepDone { transaction, step, earlier, .. } = done;
        for step in step..=step + earlier.len() as u32 {
            answered.insert((transaction, step), time);
        }
    }
    answered
}
