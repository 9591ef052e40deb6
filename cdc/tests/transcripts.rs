//! Transcripts of every transaction of the CDC: done to its end, refused at each of its steps, and waiting for another.
//! [`clutch_state_transcript`] says how they are read and renewed.

use std::{collections::VecDeque, path::Path};

use clutch_cdc::{Cdc, SendStep, tables};
use clutch_proto::{
    InodeId,
    cdc::{
        Begin, CdcEntry, CdcRequest, CountersRow, ForgetDirectory, ForgetFile, Genesis, Jump,
        ListTransactions, LockQueueRow, MakeDirectory, RemoveDirectory, RenameDirectory, RenameFile,
        StepDone, TransactionRow, UndeleteDirectory, cdc_entry::Body, cdc_request::Op,
    },
    rules,
    shard::{
        EdgeReply, ShardReply,
        shard_reply::Reply,
        shard_request::{self, Op as Step},
    },
    types::{Attributes, ClientTag, Code, Error},
};
use clutch_state::Table;
use clutch_state_transcript::{Shows, Transcript, compare, short, shown};

const ROOT: u64 = InodeId::ROOT.raw();

/// A directory, and a file, of slot 0.
fn dir(number: u64) -> u64 {
    1 << 62 | number << 8
}

fn file(number: u64) -> u64 {
    2 << 62 | number << 8
}

fn row(table: Table, value: &[u8]) -> (&'static str, String) {
    let number = || u64::from_be_bytes(value.try_into().expect("a number")).to_string();
    match table {
        tables::GENESIS => ("genesis", shown::<Genesis>(value)),
        tables::TRANSACTION => ("transaction", shown::<TransactionRow>(value)),
        tables::COUNTERS => ("counters", shown::<CountersRow>(value)),
        tables::LOCK => ("lock queue", shown::<LockQueueRow>(value)),
        tables::MOVING => ("moving", number()),
        tables::LOCK_WAITER => ("lock waiter", String::new()),
        tables::BLOCKED_WALK => ("blocked walk", String::new()),
        tables::MOVED => ("moved", number()),
        tables::MOVED_ORDER => ("moved order", number()),
        other => panic!("{other:?} is in no transcript"),
    }
}

struct Coordinator {
    transcript: Transcript<Cdc>,
    sequence: u64,
    /// What was sent to shards and is not answered.
    sent: VecDeque<SendStep>,
}

impl Coordinator {
    fn new() -> Coordinator {
        let shows = Shows { tables: 16..=u8::MAX, row, reply: |reply| short(reply) };
        let transcript = Transcript::new(shows);
        let mut coordinator = Coordinator { transcript, sequence: 0, sent: VecDeque::new() };
        coordinator.apply(None, Body::Genesis(Genesis { cluster: 1, rules: rules::VERSION }));
        coordinator
    }

    fn apply(&mut self, tag: Option<ClientTag>, body: Body) {
        let words = match &body {
            Body::Begin(Begin { request: Some(CdcRequest { op: Some(op) }), .. }) => short(op),
            other => short(other),
        };
        self.transcript.entry(&words, &CdcEntry { tag, body: Some(body) });
        self.sent.extend(self.transcript.actions.drain(..));
    }

    fn begin(&mut self, op: Op) {
        self.sequence += 1;
        let tag =
            ClientTag { client: 77, sequence: self.sequence, acknowledged: self.sequence - 1, issued_at: 1 };
        self.apply(Some(tag), Body::Begin(Begin { request: Some(CdcRequest { op: Some(op) }), slot: 0 }));
    }

    /// The oldest request that was sent is answered.
    fn answer(&mut self, answer: impl FnOnce(&Step) -> Result<Reply, Code>) {
        let SendStep { transaction, step, request, .. } = self.sent.pop_front().expect("something was sent");
        let answer = answer(request.op.as_ref().expect("an operation"));
        let reply = answer.as_ref().ok().map(|reply| ShardReply { reply: Some(reply.clone()) });
        let error = answer.err().map(|code| Error { code: code as i32, detail: String::new() });
        self.apply(None, Body::StepDone(StepDone { transaction, step, error, reply, ..StepDone::default() }));
    }

    /// Everything that was sent is answered as if all were well.
    fn finish(&mut self) {
        while !self.sent.is_empty() {
            self.answer(|step| Ok(good(step)));
        }
    }
}

/// What a shard says when all is well. Every directory lies in the root, also the root; one was removed.
fn good(step: &Step) -> Reply {
    let edge = |target| Reply::Edge(EdgeReply { target, created_at: 5, ..EdgeReply::default() });
    match step {
        Step::CreateDirectoryInode(_) => edge(dir(99)),
        Step::Stat(stat) => Reply::Attributes(Attributes {
            id: stat.id,
            parent: if stat.id == dir(2) { 0 } else { ROOT },
            ..Attributes::default()
        }),
        Step::InsertEdge(op) => edge(op.target),
        _ => Reply::Edge(EdgeReply::default()),
    }
}

/// One of each kind.
fn kinds() -> [(&'static str, Op); 7] {
    let (target, created_at) = (dir(2), 1);
    let rename = RenameDirectory {
        target,
        old_parent: ROOT,
        old_name: "d".into(),
        created_at,
        new_parent: dir(3),
        new_name: "e".into(),
    };
    let RenameDirectory { old_parent, old_name, new_parent, new_name, .. } = rename.clone();
    let rename_file = RenameFile { target: file(4), old_parent, old_name, created_at, new_parent, new_name };
    let remove = RemoveDirectory { parent: ROOT, name: "d".into(), target, created_at };
    let forget_file = ForgetFile { dir: ROOT, name: "f".into(), ended_at: 3, target: file(4), policy: None };
    let undelete = UndeleteDirectory { target, parent: ROOT, name: "back".into() };
    [
        (
            "make directory",
            Op::MakeDirectory(MakeDirectory { parent: ROOT, name: "d".into(), ..Default::default() }),
        ),
        ("remove directory", Op::RemoveDirectory(remove)),
        ("move file", Op::RenameFile(rename_file)),
        ("move directory", Op::RenameDirectory(rename)),
        ("forget file", Op::ForgetFile(forget_file)),
        ("forget directory", Op::ForgetDirectory(ForgetDirectory { target, policy: None })),
        ("undelete directory", Op::UndeleteDirectory(undelete)),
    ]
}

fn done() -> String {
    let mut c = Coordinator::new();
    for (kind, op) in kinds() {
        c.transcript.title(&format!("to {kind}"));
        c.begin(op);
        c.finish();
    }
    c.transcript.title("a log that was cut goes on behind its lost future");
    c.apply(None, Body::Jump(Jump { transaction: 1000 }));
    c.transcript.text
}

/// Each step of each kind is refused once: before the point of no return what was done is taken back; behind it what is not
/// there any more counts as done, and what may pass is asked again.
fn refused() -> String {
    let mut c = Coordinator::new();
    for (kind, op) in kinds() {
        for code in [Code::NotFound, Code::NotEmpty] {
            for good_steps in 0.. {
                c.begin(op.clone());
                for _ in 0..good_steps {
                    c.answer(|step| Ok(good(step)));
                }
                if c.sent.is_empty() {
                    // It was done before.
                    break;
                }
                c.transcript.title(&format!("to {kind}: {code:?} after {good_steps} steps"));
                c.answer(|_| Err(code));
                c.finish();
            }
        }
    }
    c.transcript.text
}

fn waiting() -> String {
    let mut c = Coordinator::new();
    c.transcript.title("a removal waits for a move out of the same directory, and is listed");
    let [_, (_, remove), (_, rename_file), (_, rename), ..] = kinds();
    c.begin(rename_file);
    c.begin(remove);
    let list = CdcRequest { op: Some(Op::ListTransactions(ListTransactions {})) };
    c.transcript.read("ListTransactions", &list, &());
    c.transcript.title("an answer that comes twice is none");
    let first = c.sent.front().cloned().expect("the move's first step");
    c.finish();
    c.sent.push_back(first);
    c.answer(|step| Ok(good(step)));
    c.transcript.title("a directory is not moved below itself");
    c.begin(rename);
    c.answer(|step| Ok(good(step)));
    c.answer(|step| match step {
        shard_request::Op::Stat(stat) => {
            Ok(Reply::Attributes(Attributes { id: stat.id, parent: dir(2), ..Attributes::default() }))
        }
        other => Ok(good(other)),
    });
    c.finish();
    c.transcript.text
}

#[test]
fn every_transaction_does_what_its_transcript_says() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata");
    let all = [("done", done()), ("refused", refused()), ("waiting", waiting())];
    let said: String = all.iter().map(|(_, text)| text.as_str()).collect();
    for (name, text) in &all {
        compare(&dir.join(format!("{name}.txt")), text);
    }
    for operation in Op::NAMES {
        let is_said = [format!("> {operation}("), format!("? {operation}")].iter().any(|w| said.contains(w));
        assert!(is_said, "no transcript has {operation}");
    }
}
