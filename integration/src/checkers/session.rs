//! What one client did and saw it sees from then on, also where it asks followers that ask nobody: reads of a position need not
//! see what others have done meanwhile, but never an earlier moment than the client's own.
//!
//! A transaction's steps in a shard count as the client's, once the transaction was answered.

use std::collections::BTreeMap;

use clutch_client::{ClientError, Freshness};
use clutch_log::LogId;
use clutch_proto::session::Role;

use super::{
    Evidence, Violation,
    linearizability::{Placed, contradictions},
    transactions::{STEP_BITS, transactions},
};

/// Checks every client that read positions.
pub fn check(evidence: &Evidence) -> Vec<Violation> {
    let mut violations = early(evidence);
    let mut by_client: BTreeMap<(u64, LogId), Vec<Placed>> = BTreeMap::new();
    let is_of_position =
        |index: &usize| matches!(evidence.records[*index].call.freshness, Freshness::Position(_));
    for (index, (log, _)) in evidence.requests.iter().filter(|(index, _)| is_of_position(index)) {
        by_client.entry((evidence.records[*index].call.client, *log)).or_default();
    }
    if by_client.is_empty() {
        return violations;
    }
    for (index, (log, _)) in &evidence.requests {
        let client = evidence.records[*index].call.client;
        if let Some(placed) = by_client.get_mut(&(client, *log)) {
            placed.extend(place(evidence, *index, *log));
        }
    }
    for (client, log, step) in steps(evidence) {
        if let Some(placed) = by_client.get_mut(&(client, log)) {
            placed.push(step);
        }
    }
    for ((client, log), placed) in by_client {
        for (earlier, later) in contradictions(&placed) {
            let shown = |index: usize| format!("{:?}", evidence.records[index].call);
            violations.push(wrong(format!(
                "{log}: client {client:x} did or saw {} before it began {}, which saw an earlier moment",
                shown(earlier),
                shown(later)
            )));
        }
    }
    violations.truncate(10);
    violations
}

fn wrong(what: String) -> Violation {
    Violation::new("session", what)
}

/// Reads that were answered from before the position that they named.
fn early(evidence: &Evidence) -> Vec<Violation> {
    let mut violations = Vec::new();
    for record in &evidence.records {
        let Freshness::Position(asked) = record.call.freshness else { continue };
        let Some(ended) = record.ended.as_ref().filter(|ended| ended.at.position > 0) else { continue };
        if ended.at.position < asked {
            let (call, at) = (&record.call, ended.at.position);
            violations.push(wrong(format!("{call:?} was answered from {at}, before {asked}")));
        }
    }
    violations
}

/// A shard's request at its place in the log.
fn place(evidence: &Evidence, index: usize, log: LogId) -> Option<Placed> {
    let (record, shard) = (&evidence.records[index], evidence.shards.get(&log)?);
    let ended = record.ended.as_ref()?;
    let is_answered = match &ended.result {
        Ok(_) => true,
        Err(ClientError::Refused(_)) => ended.at.position > 0,
        Err(_) => false,
    };
    // A change is where it had its effect, which may be before it was answered last.
    let is_read = record.call.tag.is_none();
    let seen = shard.steps.partition_point(|step| step.position.0 <= ended.at.position);
    let time = match &record.call.tag {
        None => seen.checked_sub(1).map_or(0, |last| shard.steps[last].time),
        Some(tag) => {
            let is_its = |step: &&crate::oracle::Step| {
                step.is_first
                    && step.tag.is_some_and(|of| (of.client, of.sequence) == (tag.client, tag.sequence))
            };
            shard.steps[..seen].iter().rev().find(is_its)?.time
        }
    };
    is_answered.then_some(Placed { began: record.began, ended: ended.order, time, is_read, index })
}

/// The steps of clients' transactions, by client and shard, as if the client had taken them itself.
fn steps(evidence: &Evidence) -> Vec<(u64, LogId, Placed)> {
    let tags: BTreeMap<u64, (u64, u64)> = transactions(evidence)
        .into_iter()
        .filter_map(|(id, row)| row.tag.map(|tag| (id, (tag.client, tag.sequence))))
        .collect();
    let mut answered = BTreeMap::new();
    for (index, record) in evidence.records.iter().enumerate().filter(|(_, r)| r.call.role == Role::Cdc) {
        if let (Some(tag), Some(ended)) = (&record.call.tag, &record.ended)
            && ended.result.is_ok()
        {
            answered.insert((tag.client, tag.sequence), (index, record.began, ended));
        }
    }
    let mut all = Vec::new();
    for (log, shard) in &evidence.shards {
        for step in shard.steps.iter().filter(|step| step.is_first) {
            let Some(tag) = step.tag.filter(|tag| tag.client == clutch_cdc::STEP_CLIENT) else { continue };
            let Some(of) = tags.get(&(tag.sequence >> STEP_BITS)) else { continue };
            let Some((index, began, ended)) = answered.get(of).copied() else { continue };
            // What a transaction does after it was answered is not what the client was told.
            if step.time <= ended.at.time {
                let (ended, time) = (ended.order, step.time);
                all.push((of.0, *log, Placed { began, ended, time, is_read: true, index }));
            }
        }
    }
    all
}
