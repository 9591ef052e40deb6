//! Every shard is one linearizable object: its log is the order that it claims. Replayed in that order by the
//! oracle, each answer must come out as it was given, and the order must not contradict real time.
//!
//! Linearizability is local (Herlihy and Wing, 1990): what holds for every shard holds for all together.

use std::collections::BTreeMap;

use bytes::Bytes;
use clutch_client::{ClientError, Freshness};
use clutch_log::{LogId, Position};
use clutch_proto::{
    session::Role,
    shard::{ShardReply, ShardRequest},
};
use prost::Message as _;

use super::{Evidence, ShardEvidence, Violation};
use crate::oracle::{ShardOracle, agrees};

/// Finds out which log each request was for.
pub fn assign(evidence: &mut Evidence, shards: u32) {
    for (index, record) in evidence.records.iter().enumerate() {
        let (Role::Shard, Some(slot)) = (record.call.role, record.call.slot) else { continue };
        let log = LogId::shard(u32::from(slot.0) * shards / 256);
        if let Ok(ShardRequest { op: Some(op) }) = ShardRequest::decode(record.call.body.clone()) {
            evidence.requests.insert(index, (log, op));
        }
    }
}

/// Replays a shard's log, and asks the oracle what every read must have seen.
pub fn replay(evidence: &Evidence, id: LogId) -> Result<ShardEvidence, String> {
    let mut reads: Vec<(u64, usize)> = Vec::new();
    for (index, (log, _)) in &evidence.requests {
        let record = &evidence.records[*index];
        let is_read_here = *log == id && record.call.tag.is_none();
        if let Some(ended) = record.ended.as_ref().filter(|e| is_read_here && e.at.position > 0) {
            reads.push((ended.at.position, *index));
        }
    }
    reads.sort_unstable();
    let mut reads = reads.into_iter().peekable();
    let mut oracle = ShardOracle::default();
    oracle.pages = evidence.pages;
    let mut shard =
        ShardEvidence { oracle: ShardOracle::default(), steps: Vec::new(), reads: BTreeMap::new() };
    let empty = BTreeMap::new();
    for (position, batch) in evidence.logs.get(&id).unwrap_or(&empty) {
        while let Some((_, index)) = reads.next_if(|(at, _)| Position(*at) < *position) {
            answer(evidence, &oracle, index, &mut shard);
        }
        for entry in &batch.entries {
            let step = oracle.apply(*position, entry).map_err(|what| format!("{id}: {what}"))?;
            shard.steps.push(step);
        }
    }
    for (_, index) in reads {
        answer(evidence, &oracle, index, &mut shard);
    }
    shard.oracle = oracle;
    Ok(shard)
}

fn answer(evidence: &Evidence, oracle: &ShardOracle, index: usize, shard: &mut ShardEvidence) {
    if let Some((_, op)) = evidence.requests.get(&index)
        && let Some(outcome) = oracle.read(op)
    {
        shard.reads.insert(index, outcome);
    }
}

/// One completed request at its place in the claimed order.
#[derive(Clone, Copy, Debug)]
pub struct Placed {
    /// When it began.
    pub began: u64,
    /// When it ended.
    pub ended: u64,
    /// The log's time of its effect, or of what it saw.
    pub time: u64,
    /// It changed nothing.
    pub is_read: bool,
    /// For messages.
    pub index: usize,
}

/// Finds requests that the claimed order puts before others that had ended when they began.
pub fn contradictions(placed: &[Placed]) -> Vec<(usize, usize)> {
    let mut events: Vec<(u64, bool, usize)> = Vec::with_capacity(placed.len() * 2);
    for (i, p) in placed.iter().enumerate() {
        events.push((p.began, false, i));
        events.push((p.ended, true, i));
    }
    events.sort_unstable();
    let mut highest: Option<usize> = None;
    let mut found = Vec::new();
    for (_, is_end, i) in events {
        let p = placed[i];
        if is_end {
            if highest.is_none_or(|h| placed[h].time < p.time) {
                highest = Some(i);
            }
        } else if let Some(h) = highest {
            let before = placed[h].time;
            if p.time < before || (p.time == before && !p.is_read) {
                found.push((placed[h].index, p.index));
            }
        }
    }
    found
}

fn shown(result: &Result<Bytes, ClientError>) -> String {
    match result {
        Ok(bytes) => format!("{:?}", ShardReply::decode(bytes.clone()).ok().and_then(|r| r.reply)),
        Err(error) => error.to_string(),
    }
}

/// Checks all shards.
pub fn check(evidence: &Evidence) -> Vec<Violation> {
    let mut violations = Vec::new();
    let wrong = |what: String| Violation::new("linearizability", what);
    for (id, shard) in &evidence.shards {
        let firsts: BTreeMap<(u64, u64), &crate::oracle::Step> = shard
            .steps
            .iter()
            .filter(|s| s.is_first)
            .filter_map(|s| s.tag.map(|t| ((t.client, t.sequence), s)))
            .collect();
        let mut placed = Vec::new();
        for (index, (log, op)) in evidence.requests.iter().filter(|(_, (log, _))| log == id) {
            let record = &evidence.records[*index];
            let Some(ended) = &record.ended else { continue };
            let decided = match &ended.result {
                Ok(_) => true,
                Err(ClientError::Refused(_)) => ended.at.position > 0,
                Err(_) => false,
            };
            if !decided {
                continue;
            }
            let (time, expected) = match &record.call.tag {
                Some(tag) => match firsts.get(&(tag.client, tag.sequence)) {
                    Some(step) => (step.time, step.outcome.clone()),
                    None => continue,
                },
                None => {
                    let seen = shard.steps.partition_point(|s| s.position.0 <= ended.at.position);
                    let time = seen.checked_sub(1).map_or(0, |last| shard.steps[last].time);
                    (time, shard.reads.get(index).cloned())
                }
            };
            let (began, ended_at, is_read) = (record.began, ended.order, record.call.tag.is_none());
            // What a read of a position sees is right there, and may be behind what others have done.
            if !matches!(record.call.freshness, Freshness::Position(_)) {
                placed.push(Placed { began, ended: ended_at, time, is_read, index: *index });
            }
            let agrees = match (&ended.result, &expected) {
                (_, None) => true,
                (Ok(bytes), Some(Ok(expected))) => ShardReply::decode(bytes.clone())
                    .ok()
                    .and_then(|r| r.reply)
                    .is_some_and(|got| agrees(&got, expected)),
                // What became of a request may be forgotten once it is acknowledged or has expired.
                (Err(ClientError::Refused(refusal)), Some(Err(code))) => {
                    refusal.code == *code || !refusal.code.is_decision()
                }
                (Err(ClientError::Refused(refusal)), Some(Ok(_))) => !refusal.code.is_decision(),
                _ => false,
            };
            if !agrees {
                violations.push(wrong(format!(
                    "{log} at position {}: {op:?} was answered {}, the oracle says {expected:?}",
                    ended.at.position,
                    shown(&ended.result)
                )));
            }
        }
        for (earlier, later) in contradictions(&placed) {
            let shown =
                |i: &usize| evidence.requests.get(i).map(|(_, op)| format!("{op:?}")).unwrap_or_default();
            violations.push(wrong(format!(
                "{id}: {} had ended before {} began, but is ordered after it",
                shown(&earlier),
                shown(&later)
            )));
        }
    }
    violations.truncate(10);
    violations
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placed(began: u64, ended: u64, time: u64, is_read: bool) -> Placed {
        Placed { began, ended, time, is_read, index: began as usize }
    }

    #[test]
    fn bad_orders_are_found_and_good_ones_are_not() {
        // Overlapping requests may be ordered either way.
        assert!(contradictions(&[placed(1, 4, 9, false), placed(2, 3, 5, false)]).is_empty());
        // A stale read: it began after a write had ended and saw an earlier moment.
        assert_eq!(contradictions(&[placed(1, 2, 9, false), placed(3, 4, 8, true)]), [(1, 3)]);
        // A read of the very moment of the write is fine, a second write at it is not.
        assert!(contradictions(&[placed(1, 2, 9, false), placed(3, 4, 9, true)]).is_empty());
        assert_eq!(contradictions(&[placed(1, 2, 9, false), placed(3, 4, 9, false)]), [(1, 3)]);
        // Reads must not go back in time either.
        assert_eq!(contradictions(&[placed(1, 2, 9, true), placed(3, 4, 8, true)]), [(1, 3)]);
    }

    #[test]
    fn a_hundred_thousand_requests_are_checked_quickly() {
        let all: Vec<Placed> =
            (0..100_000).map(|i| placed(i * 2 + 1, i * 2 + 9, i + 1, i % 3 == 0)).collect();
        assert!(contradictions(&all).is_empty());
        let mut bad = all;
        bad[77_777].time = 5;
        assert!(!contradictions(&bad).is_empty());
    }
}
