//! Every transaction of the CDC happened as a whole or not at all, and its client was told which.

use std::collections::{BTreeMap, BTreeSet};

use clutch_cdc::{Cdc, tables};
use clutch_client::ClientError;
use clutch_log::LogId;
use clutch_proto::{
    cdc::{
        CdcReply, CdcRequest, TransactionRow,
        cdc_request::{self, Op},
    },
    session::Role,
    shard::{shard_reply::Reply, shard_request},
};
use clutch_state::{Applier, MemoryStore};
use prost::Message as _;

use super::{Evidence, Violation, state::rows};

/// Bits of a step's number within a tag's sequence; part of the format of tags.
pub(super) const STEP_BITS: u32 = 24;

/// What a transaction's steps did in shards.
#[derive(Debug, Default)]
struct Traces {
    made: Option<u64>,
    unmade: bool,
    inserted_at: Option<u64>,
    locked: bool,
    unlocked: bool,
    ended_edge: bool,
    orphaned: bool,
    parent_set: bool,
    dropped: bool,
    file_removed: bool,
    adopted: bool,
    forgotten: bool,
}

fn operation_of(row: &TransactionRow) -> Option<&Op> {
    row.begin.as_ref()?.request.as_ref()?.op.as_ref()
}

impl Traces {
    /// Why this is not the trace of a whole transaction, and whether it took effect.
    fn judge(&self, op: &Op) -> Result<bool, &'static str> {
        match op {
            Op::MakeDirectory(_) => match (self.made, self.inserted_at, self.unmade) {
                (Some(_), Some(_), false) => Ok(true),
                (Some(_), None, true) | (None, None, _) => Ok(false),
                (Some(_), None, false) => Err("made a directory that nothing leads to"),
                _ => Err("made an edge and took its directory away"),
            },
            Op::RemoveDirectory(_) => self.judge_ended(self.orphaned),
            Op::ForgetFile(_) => match (self.dropped, self.file_removed) {
                (true, true) => Ok(true),
                (false, false) => Ok(false),
                (true, false) => Err("dropped the last owner of a file and left the file"),
                (false, true) => Err("removed a file that something still owns"),
            },
            Op::ForgetDirectory(_) => Ok(self.forgotten),
            Op::UndeleteDirectory(_) => match (self.inserted_at.is_some(), self.adopted) {
                (true, true) => Ok(true),
                (false, false) => Ok(false),
                (true, false) => Err("made an edge to a directory that is still removed"),
                (false, true) => Err("brought a directory back that nothing leads to"),
            },
            Op::RenameFile(_) => self.judge_ended(self.inserted_at.is_some()),
            Op::RenameDirectory(_) => {
                if self.inserted_at.is_some() && !self.parent_set {
                    return Err("moved a directory without telling it");
                }
                self.judge_ended(self.inserted_at.is_some())
            }
            Op::ListTransactions(_) => Err("it is a read"),
        }
    }

    fn judge_ended(&self, decided: bool) -> Result<bool, &'static str> {
        match (decided, self.ended_edge, self.unlocked) {
            (true, true, false) => Ok(true),
            (true, _, true) => Err("went back after the point of no return"),
            (true, false, _) => Err("left the old edge"),
            (false, true, _) => Err("ended the old edge without having decided"),
            (false, false, _) if self.locked && !self.unlocked => Err("left the old edge locked"),
            (false, false, _) => Ok(false),
        }
    }
}

/// All transactions that ever were, from the CDC's own rows after every record.
pub fn transactions(evidence: &Evidence) -> BTreeMap<u64, TransactionRow> {
    let mut all = BTreeMap::new();
    let store = std::sync::Arc::new(MemoryStore::new());
    let Ok(mut applier) = Applier::<Cdc>::open(store.clone()) else { return all };
    for batch in evidence.logs.get(&LogId::CDC).into_iter().flat_map(BTreeMap::values) {
        // One entry at a time would show more; but a transaction needs answers of shards and outlives its batch.
        if applier.apply(batch).is_err() {
            break;
        }
        for (key, row) in rows::<TransactionRow>(&store, tables::TRANSACTION) {
            if let Ok(id) = tables::parse(&key) {
                all.insert(id, row);
            }
        }
    }
    all
}

/// What clients were told is in flight must be what the log says, up to where it stood.
fn check_listings(evidence: &Evidence) -> Vec<Violation> {
    let wrong = |what: String| Violation::new("transactions", what);
    let mut violations = Vec::new();
    let mut listings: Vec<(u64, BTreeSet<u64>)> = Vec::new();
    for record in evidence.records.iter().filter(|record| record.call.role == Role::Cdc) {
        let Ok(CdcRequest { op: Some(Op::ListTransactions(_)) }) =
            CdcRequest::decode(record.call.body.clone())
        else {
            continue;
        };
        let Some(Ok(bytes)) = record.ended.as_ref().map(|ended| &ended.result) else { continue };
        let listed = match CdcReply::decode(bytes.clone()) {
            Ok(reply) => reply.transactions.iter().map(|t| t.transaction).collect(),
            Err(error) => {
                violations.push(wrong(format!("a listing cannot be read: {error}")));
                continue;
            }
        };
        listings.push((record.ended.as_ref().map_or(0, |ended| ended.at.position), listed));
    }
    listings.sort();
    let store = std::sync::Arc::new(MemoryStore::new());
    let Ok(mut applier) = Applier::<Cdc>::open(store.clone()) else { return violations };
    let mut batches = evidence.logs.get(&LogId::CDC).into_iter().flatten().peekable();
    for (position, listed) in listings {
        while let Some((_, batch)) = batches.next_if(|(at, _)| at.0 <= position) {
            if let Err(fault) = applier.apply(batch) {
                violations.push(wrong(format!("the log cannot be replayed: {fault}")));
                return violations;
            }
        }
        let live = rows::<TransactionRow>(&store, tables::TRANSACTION).into_iter();
        let live: BTreeSet<u64> = live.filter_map(|(key, _)| tables::parse(&key).ok()).collect();
        if live != listed {
            violations.push(wrong(format!("listed at {position}: {listed:?}, and the log says {live:?}")));
        }
    }
    violations
}

/// Checks all transactions.
pub fn check(evidence: &Evidence) -> Vec<Violation> {
    let wrong = |what: String| Violation::new("transactions", what);
    let mut violations = check_listings(evidence);
    let mut traces: BTreeMap<u64, Traces> = BTreeMap::new();
    for step in evidence.shards.values().flat_map(|s| &s.steps) {
        let Some(tag) = step.tag.filter(|t| t.client == clutch_cdc::STEP_CLIENT && step.is_first) else {
            continue;
        };
        let (Some(Ok(reply)), Some(op)) = (&step.outcome, &step.op) else { continue };
        let trace = traces.entry(tag.sequence >> STEP_BITS).or_default();
        match (op, reply) {
            (shard_request::Op::CreateDirectoryInode(_), Reply::Edge(edge)) => trace.made = Some(edge.target),
            (shard_request::Op::InsertEdge(_), _) => trace.inserted_at = Some(step.time),
            (shard_request::Op::LockEdge(_), _) => trace.locked = true,
            (shard_request::Op::UnlockEdge(_), _) => trace.unlocked = true,
            (shard_request::Op::RemoveLockedEdge(_), _) => trace.ended_edge = true,
            (shard_request::Op::SetParent(_), _) => trace.parent_set = true,
            (shard_request::Op::OrphanDirectory(_), _) => trace.orphaned = true,
            (shard_request::Op::RemoveDirectoryInode(_), _) => trace.unmade = true,
            (shard_request::Op::DropPastEdge(_), _) => trace.dropped = true,
            (shard_request::Op::RemoveFileInode(_), _) => trace.file_removed = true,
            (shard_request::Op::AdoptDirectory(_), _) => trace.adopted = true,
            (shard_request::Op::ForgetDirectoryInode(_), _) => trace.forgotten = true,
            _ => {}
        }
    }
    let all = transactions(evidence);
    // By tag: what took effect, and the trace of it.
    let mut effective: BTreeMap<(u64, u64), u64> = BTreeMap::new();
    let mut seen: BTreeSet<(u64, u64)> = BTreeSet::new();
    let none = Traces::default();
    for (id, row) in &all {
        let (Some(op), Some(tag)) = (operation_of(row), &row.tag) else {
            continue;
        };
        seen.insert((tag.client, tag.sequence));
        match traces.get(id).unwrap_or(&none).judge(op) {
            Ok(true) => {
                if effective.insert((tag.client, tag.sequence), *id).is_some() {
                    violations.push(wrong(format!("transaction {id} ({op:?}) took effect twice")));
                }
            }
            Ok(false) => {}
            Err(what) => violations.push(wrong(format!("transaction {id} ({op:?}) {what}"))),
        }
    }
    for record in evidence.records.iter().filter(|r| r.call.role == Role::Cdc) {
        let (Some(tag), Some(ended)) = (&record.call.tag, &record.ended) else { continue };
        let key = (tag.client, tag.sequence);
        let took_effect = effective.get(&key).and_then(|id| traces.get(id));
        let request = CdcRequest::decode(record.call.body.clone()).ok().and_then(|r| r.op);
        match (&ended.result, took_effect) {
            (Ok(bytes), Some(trace)) => {
                let reply = CdcReply::decode(bytes.clone()).unwrap_or_default();
                let makes = matches!(request, Some(cdc_request::Op::MakeDirectory(_)));
                let differs = trace.inserted_at.is_some_and(|at| at != reply.created_at)
                    || makes && trace.made != Some(reply.id);
                if differs {
                    violations
                        .push(wrong(format!("{request:?} was answered {reply:?}, its steps say {trace:?}")));
                }
            }
            (Ok(_), None) => violations.push(wrong(format!(
                "{request:?} was acknowledged and has no effect ({})",
                if seen.contains(&key) { "it was turned back" } else { "it is not in the log" }
            ))),
            (Err(ClientError::Unknown(_)), _) | (Err(_), None) => {}
            (Err(error), Some(_)) => {
                violations.push(wrong(format!("{request:?} took effect, its client was told: {error}")));
            }
        }
    }
    violations.truncate(10);
    violations
}
