//! Rare states that a simulation must reach sometimes. Every one has a pinned seed that reaches it.
//!
//! Some are noted by what runs ([`clutch_runtime::Runtime::note`]); those of appliers, which may note nothing, are read
//! off the logs and the clients' answers afterwards.

use std::collections::{BTreeMap, BTreeSet};

use clutch_cdc::{Cdc, tables};
use clutch_client::ClientError;
use clutch_log::LogId;
use clutch_proto::{
    cdc::{CdcRequest, TransactionRow, cdc_request},
    session::Role,
    shard::{shard_reply::Reply, shard_request::Op},
    types::Code,
};
use clutch_runtime::simulated::World;
use clutch_state::{Applier, MemoryStore};

use prost::Message as _;

use crate::{
    checkers::{Evidence, state::rows},
    history::Record,
    oracle::Step,
};

/// States that what runs takes note of.
const NOTED: &[&str] = &[
    "blocks: a certificate is refused",
    "blocks: a change before the time is known",
    "blocks: a damaged record keeps its segment",
    "blocks: a segment is removed",
    "blocks: an index is written",
    "blocks: an expired certificate",
    "cdc driver: a step is dropped with the reign",
    "cdc driver: a step waits for its shard",
    "cdc driver: an answer is proposed again",
    "client: a tag is drawn again",
    "client: declined, which no log holds",
    "client: a refusal after an unknown attempt stays unknown",
    "client: an answer after an unknown attempt",
    "client: expired, and a copy may be forgotten",
    "client: nobody listens",
    "client: patience ended",
    "client: refused for good",
    "client: was sent elsewhere",
    "client: a hint is followed",
    "client: any member is asked",
    "log: a member is restored from a snapshot",
    "log: a proposal waits for a quorum",
    "log: another member is elected",
    "node: a newer leader was placed first",
    "node: does not start",
    "node: starts as a follower",
    "raft: a log begins behind a snapshot",
    "raft: a member fetches a snapshot",
    "raft: a read by a lease",
    "raft: a stream cannot be opened",
    "raft: a stream has broken",
    "raft: a vote is refused after a start",
    "read: a block is corrupt",
    "read: a block is missing",
    "read: a disk gives an error",
    "read: a service does not answer",
    "read: degraded",
    "read: degraded with exactly D blocks left",
    "read: fewer than D blocks",
    "read: others are read instead of a block that is late",
    "replica: a follower answers a read",
    "replica: a read waits for a position",
    "replica: its state is replaced by a snapshot",
    "replica: a change is refused for want of room",
    "replica: a repeated request gets its recorded answer",
    "replica: a request arrives after its client was forgotten",
    "replica: a request that was given up arrives late",
    "replica: asked again while the transaction runs",
    "replica: loses leadership at rest",
    "replica: loses leadership with transactions pending",
    "replica: several entries in one record",
    "replica: stops on a fault",
    "replica: the outcome of a proposal is unknown",
    "store: begins empty",
    "store: begins in mid-log",
    "world: a cut ends a stream",
    "world: a loss ends a stream",
    "world: a process dies and its machine goes on",
    "world: the power goes in the middle of a disk operation",
    "world: time passes in the middle of blocking work",
    "write: a block is sent again",
    "write: a span gets less parity than its policy says",
    "write: a span is placed again",
    "write: suspects are better than none",
];

/// States of transactions in which the CDC has crashed, or lost its reign; its driver takes note of them.
const CRASHED: &[(&str, &[&str])] = &[
    ("make directory", &["first", "insert", "back"]),
    ("remove directory", &["first", "insert", "remove", "back"]),
    ("move file", &["first", "insert", "remove", "back"]),
    ("move directory", &["first", "walk", "insert", "setparent", "remove", "back"]),
    ("forget file", &["first", "remove"]),
    ("forget directory", &["first"]),
    ("undelete directory", &["first", "insert", "setparent"]),
];

/// States that are read off the logs and the answers.
const FOUND: &[&str] = &[
    "log: a repeated entry is recognised in apply",
    "log: a step of a transaction is repeated",
    "log: a step is repeated after its transaction was turned back",
    "log: an entry of a client that is long forgotten",
    "log: a transaction is turned back",
    "log: a directory move waits for another",
    "log: a content that is being written is not collected",
    "log: a file's last owner is forgotten",
    "log: a past content comes back",
    "log: a past content is forgotten",
    "log: a policy keeps what was proposed",
    "log: a published content is replaced",
    "log: a publication comes too late",
    "log: a range is shared",
    "log: a removed directory comes back",
    "log: a removed directory is forgotten",
    "log: a span is removed",
    "log: a span moves to another content",
    "log: blocks are exchanged",
    "log: spans are exchanged",
    "history: unknown, and done",
    "history: unknown, and not done",
    "history: never answered, and done",
    "history: never answered, and not done",
];

/// Answers that clients must get sometimes.
const ANSWERS: &[Code] = &[
    Code::NotFound,
    Code::Exists,
    Code::NotEmpty,
    Code::IsDirectory,
    Code::NotDirectory,
    Code::Loop,
    Code::Stale,
    Code::NoSpace,
    Code::TransientGone,
    Code::BadProof,
    Code::TooEarly,
    Code::CrcMismatch,
];

/// All states, in order.
pub fn states() -> Vec<String> {
    let mut all: BTreeSet<String> = NOTED.iter().chain(FOUND).map(|s| (*s).to_owned()).collect();
    for (kind, states) in CRASHED {
        all.extend(states.iter().map(|state| crashed(kind, state)));
    }
    all.extend(ANSWERS.iter().map(|code| answered(*code)));
    all.into_iter().collect()
}

fn crashed(kind: &str, state: &str) -> String {
    format!("cdc: crashes while a {kind} is in {state}")
}

fn answered(code: Code) -> String {
    format!("history: an answer of {code:?}")
}

/// Every operation that a simulation must do: each has to have its way through a client, a script and the oracle.
pub fn operations() -> Vec<String> {
    let shard = Op::NAMES.iter().map(|name| done("shard", name));
    shard.chain(cdc_request::Op::NAMES.iter().map(|name| done("cdc", name))).collect()
}

fn done(whose: &str, name: &str) -> String {
    format!("done: {whose} {name}")
}

/// What a run reached, and which operations were done in it.
pub fn reached(evidence: &Evidence, world: &World) -> BTreeSet<String> {
    let known: BTreeSet<String> = states().into_iter().collect();
    let mut reached: BTreeSet<String> =
        world.notes().keys().filter_map(|noted| known.get(&**noted)).cloned().collect();
    transactions(evidence, &mut reached);
    entries(evidence, &mut reached);
    answers(evidence, &mut reached);
    performed(evidence, &mut reached);
    reached
}

/// Operations that had their effect, or answered.
fn performed(evidence: &Evidence, reached: &mut BTreeSet<String>) {
    let is_done = |step: &&Step| step.is_first && step.outcome.as_ref().is_some_and(Result::is_ok);
    let steps = evidence.shards.values().flat_map(|shard| shard.steps.iter().filter(is_done));
    let mut names: BTreeSet<&str> = steps.filter_map(|step| step.op.as_ref().map(Op::name)).collect();
    let is_answered =
        |index: &usize| evidence.records[*index].ended.as_ref().is_some_and(|ended| ended.result.is_ok());
    let reads = evidence.requests.iter().filter(|(index, _)| is_answered(index));
    names.extend(reads.map(|(_, (_, op))| op.name()));
    reached.extend(names.into_iter().map(|name| done("shard", name)));
    let of_cdc = |record: &&Record| {
        record.call.role == Role::Cdc && record.ended.as_ref().is_some_and(|ended| ended.result.is_ok())
    };
    let requests = evidence.records.iter().filter(of_cdc).filter_map(|record| {
        CdcRequest::decode(record.call.body.clone()).ok().and_then(|request| request.op)
    });
    reached.extend(requests.map(|op| done("cdc", op.name())));
}

fn transactions(evidence: &Evidence, reached: &mut BTreeSet<String>) {
    let store = std::sync::Arc::new(MemoryStore::new());
    let Ok(mut applier) = Applier::<Cdc>::open(store.clone()) else { return };
    for batch in evidence.logs.get(&LogId::CDC).into_iter().flat_map(BTreeMap::values) {
        if applier.apply(batch).is_err() {
            return;
        }
        for (_, row) in rows::<TransactionRow>(&store, tables::TRANSACTION) {
            if row.walk_blocked_by != 0 {
                reached.insert("log: a directory move waits for another".into());
            }
            if row.cause.is_some() {
                reached.insert("log: a transaction is turned back".into());
            }
        }
    }
}

fn entries(evidence: &Evidence, reached: &mut BTreeSet<String>) {
    let mut note = |what: &str| {
        reached.insert(what.to_owned());
    };
    for shard in evidence.shards.values() {
        let mut turned_back = BTreeSet::new();
        for step in &shard.steps {
            let (Some(tag), Some(outcome)) = (step.tag, &step.outcome) else { continue };
            let is_step = tag.client == clutch_cdc::STEP_CLIENT;
            let transaction = tag.sequence >> 24;
            if step.is_first {
                if matches!(step.op, Some(Op::UnlockEdge(_) | Op::RemoveDirectoryInode(_))) {
                    turned_back.insert(transaction);
                }
                if let Some(what) = step.op.as_ref().and_then(|op| upkeep(op, outcome)) {
                    note(what);
                }
                continue;
            }
            match outcome {
                Err(Code::Acknowledged) if !is_step => {}
                Err(Code::ExpiredUnknown) => note("log: an entry of a client that is long forgotten"),
                _ if is_step && turned_back.contains(&transaction) => {
                    note("log: a step is repeated after its transaction was turned back");
                }
                _ if is_step => note("log: a step of a transaction is repeated"),
                _ => note("log: a repeated entry is recognised in apply"),
            }
        }
    }
}

/// What looking after stored data did for the first time.
fn upkeep(op: &Op, outcome: &Result<Reply, Code>) -> Option<&'static str> {
    Some(match (op, outcome) {
        (Op::CollectContent(_), Err(Code::TooEarly)) => {
            "log: a content that is being written is not collected"
        }
        (Op::ForgetEdge(_) | Op::ForgetContent(_) | Op::DropPastEdge(_), Err(Code::TooEarly)) => {
            "log: a policy keeps what was proposed"
        }
        (Op::PublishContent(_), Err(Code::Stale)) => "log: a publication comes too late",
        (Op::RemoveFileInode(_), Ok(_)) => "log: a file's last owner is forgotten",
        (Op::RestoreContent(_), Ok(_)) => "log: a past content comes back",
        (Op::ForgetContent(_), Ok(_)) => "log: a past content is forgotten",
        (Op::PublishContent(_), Ok(_)) => "log: a published content is replaced",
        (Op::ShareRange(_), Ok(_)) => "log: a range is shared",
        (Op::AdoptDirectory(_), Ok(_)) => "log: a removed directory comes back",
        (Op::ForgetDirectoryInode(_), Ok(_)) => "log: a removed directory is forgotten",
        (Op::RemoveSpan(_), Ok(_)) => "log: a span is removed",
        (Op::MoveSpan(_), Ok(_)) => "log: a span moves to another content",
        (Op::SwapBlocks(_), Ok(_)) => "log: blocks are exchanged",
        (Op::SwapSpans(_), Ok(_)) => "log: spans are exchanged",
        _ => return None,
    })
}

fn answers(evidence: &Evidence, reached: &mut BTreeSet<String>) {
    let done: BTreeSet<(u64, u64)> = evidence
        .shards
        .values()
        .flat_map(|s| &s.steps)
        .filter(|s| s.is_first && s.outcome.as_ref().is_some_and(Result::is_ok))
        .filter_map(|s| s.tag.map(|t| (t.client, t.sequence)))
        .collect();
    for index in evidence.requests.keys() {
        let record = &evidence.records[*index];
        let Some(tag) = record.call.tag else { continue };
        let is_done = done.contains(&(tag.client, tag.sequence));
        let what = match (record.ended.as_ref().map(|e| &e.result), is_done) {
            (Some(Err(ClientError::Unknown(_))), true) => "history: unknown, and done",
            (Some(Err(ClientError::Unknown(_))), false) => "history: unknown, and not done",
            (None, true) => "history: never answered, and done",
            (None, false) => "history: never answered, and not done",
            _ => continue,
        };
        reached.insert(what.into());
    }
    for record in &evidence.records {
        if let Some(Err(ClientError::Refused(refusal) | ClientError::Declined(refusal))) =
            record.ended.as_ref().map(|e| &e.result)
            && ANSWERS.contains(&refusal.code)
        {
            reached.insert(answered(refusal.code));
        }
    }
}
