//! What every request passes through, piece by piece, for measuring: by time (`cargo bench`) and by instructions
//! (`cargo xtask instructions`, which CI compares with `integration/instructions.txt`).
//!
//! Each path does the same work every time it runs, on production code and without input or output. What the whole
//! adds up to on a real disk is `clutch bench`'s to say.

use std::{hint::black_box, sync::Arc};

use bytes::Bytes;
use clutch_blocks::Codec;
use clutch_log::{Batch, Epoch};
use clutch_proto::{
    InodeId, Time, crc,
    parts::{Frame, Frames},
    session::{Request, Role},
    shard::{
        CreateDirectoryInode, CreateFile, EdgeReply, Genesis, InsertEdge, LockEdge, Lookup, ReadDir,
        RemoveDirectoryInode, RenameInDirectory, SetAttributes, ShardEntry, ShardReply, ShardRequest, Stat,
        Unlink, UnlockEdge, shard_entry::Body, shard_reply::Reply, shard_request::Op,
    },
    state::{Entry, entry::Kind},
    types::ClientTag,
};
use clutch_shard::{Shard, ShardFacts};
use clutch_state::{Applier, EntryOutcome, Machine, MemoryStore, ProduceContext, Table, hash::row_hash};
use prost::Message as _;

/// Does one path once.
pub type Run = Box<dyn FnMut()>;

/// Names of all paths.
pub const NAMES: &[&str] = &[
    "entry: encode",
    "entry: decode",
    "session: encode 64 requests",
    "session: decode 64 requests",
    "hash: a row",
    "crc: 64 KiB",
    "reed-solomon: encode 10+4 of 64 KiB",
    "reed-solomon: recover 1 of 10+4 of 64 KiB",
    "apply: create and unlink",
    "apply: create, rename and unlink",
    "apply: set attributes",
    "apply: make and remove a directory's inode",
    "apply: insert, lock, unlock and unlink an edge",
    "produce: create",
    "read: lookup",
    "read: stat",
    "read: list 1,000 entries",
];

/// A path by its name, with what it needs; `None` for a name that is not in [`NAMES`].
pub fn path(name: &str) -> Option<Run> {
    Some(match name {
        "entry: encode" => {
            let entry = entry(create(7));
            Box::new(move || drop(black_box(black_box(&entry).encode_to_vec())))
        }
        "entry: decode" => {
            let bytes = Bytes::from(entry(create(7)).encode_to_vec());
            Box::new(move || {
                let outer = Entry::decode(black_box(bytes.clone())).expect("encoded here");
                let Some(Kind::Body(body)) = outer.kind else { return };
                black_box(ShardEntry::decode(body).expect("encoded here"));
            })
        }
        "session: encode 64 requests" => Box::new(|| drop(black_box(frames(black_box(64)).encode_to_vec()))),
        "session: decode 64 requests" => {
            let bytes = Bytes::from(frames(64).encode_to_vec());
            Box::new(move || {
                for frame in Frames::decode(black_box(bytes.clone())).expect("encoded here").frames {
                    black_box(Request::decode(frame.message.joined()).expect("encoded here"));
                }
            })
        }
        "hash: a row" => {
            let (key, value) = ([3; 28], [5; 72]);
            Box::new(move || {
                black_box(row_hash(Table(30), black_box(&key), black_box(&value)));
            })
        }
        "crc: 64 KiB" => {
            let bytes = vec![7; 64 << 10];
            Box::new(move || {
                black_box(crc::of(black_box(&bytes)));
            })
        }
        "reed-solomon: encode 10+4 of 64 KiB" => {
            let (codec, cells) = (Codec::new(10, 4).expect("a known scheme"), cells());
            Box::new(move || drop(black_box(codec.encode(black_box(&cells)).expect("equal cells"))))
        }
        "reed-solomon: recover 1 of 10+4 of 64 KiB" => {
            let (codec, mut cells) = (Codec::new(10, 4).expect("a known scheme"), cells());
            cells.extend(codec.encode(&cells).expect("equal cells"));
            let from: Vec<(usize, Vec<u8>)> = cells.into_iter().enumerate().skip(1).take(10).collect();
            Box::new(move || drop(black_box(codec.recover(0, black_box(&from)).expect("enough cells"))))
        }
        "produce: create" => {
            let shard = Replica::new();
            Box::new(move || drop(black_box(shard.produce(Op::CreateFile(create_file(1))))))
        }
        "read: lookup" => {
            let shard = Replica::with_files(1000);
            Box::new(move || shard.read(Op::Lookup(Lookup { dir: ROOT, name: self::name(500) })))
        }
        "read: stat" => {
            let shard = Replica::new();
            Box::new(move || shard.read(Op::Stat(Stat { id: ROOT })))
        }
        "read: list 1,000 entries" => {
            let shard = Replica::with_files(1000);
            Box::new(move || shard.read(Op::ReadDir(ReadDir { dir: ROOT, ..ReadDir::default() })))
        }
        _ => return applied(name),
    })
}

/// Paths through an applier. Each ends with the rows that it found, but for what has become past.
fn applied(name: &str) -> Option<Run> {
    let mut shard = Replica::new();
    let mut round = 0;
    Some(match name {
        "apply: create and unlink" => Box::new(move || {
            round += 1;
            let made = shard.edge(create(round));
            shard.edge(unlink(round, &made));
        }),
        "apply: create, rename and unlink" => Box::new(move || {
            round += 2;
            let made = shard.edge(create(round));
            let (old_name, new_name) = (self::name(round), self::name(round + 1));
            let EdgeReply { target, created_at, .. } = made;
            let rename = RenameInDirectory { dir: ROOT, old_name, target, created_at, new_name };
            let renamed = shard.edge(Op::RenameInDirectory(rename).into());
            let renamed = EdgeReply { target, ..renamed };
            shard.edge(unlink(round + 1, &renamed));
        }),
        "apply: set attributes" => Box::new(move || {
            round += 1;
            let set = SetAttributes { id: ROOT, mtime: Some(round), ..SetAttributes::default() };
            shard.apply(Op::SetAttributes(set).into());
        }),
        "apply: make and remove a directory's inode" => Box::new(move || {
            let make = CreateDirectoryInode { parent: ROOT, mode: 0o755, ..CreateDirectoryInode::default() };
            let dir = shard.step_edge(Op::CreateDirectoryInode(make).into()).target;
            shard.step(Op::RemoveDirectoryInode(RemoveDirectoryInode { dir }).into());
        }),
        "apply: insert, lock, unlock and unlink an edge" => {
            let file = shard.edge(create(1)).target;
            Box::new(move || {
                round += 1;
                let name = self::name(1 + round);
                let insert = InsertEdge { dir: ROOT, name: name.clone(), target: file, replace: false };
                let EdgeReply { created_at, .. } = shard.step_edge(Op::InsertEdge(insert).into());
                let lock = LockEdge { dir: ROOT, name: name.clone(), target: file, created_at };
                shard.step(Op::LockEdge(lock).into());
                shard.step(Op::UnlockEdge(UnlockEdge { dir: ROOT, name, target: file, created_at }).into());
                shard
                    .edge(unlink(1 + round, &EdgeReply { target: file, created_at, ..EdgeReply::default() }));
            })
        }
        _ => return None,
    })
}

const ROOT: u64 = InodeId::ROOT.raw();

fn cells() -> Vec<Vec<u8>> {
    (0..10).map(|cell| (0..64usize << 10).map(|at| (at * 7 + cell) as u8).collect()).collect()
}

fn name(number: u64) -> Bytes {
    format!("file-{number:09}").into()
}

fn create_file(number: u64) -> CreateFile {
    CreateFile { dir: ROOT, name: name(number), mode: 0o644, ..CreateFile::default() }
}

fn create(number: u64) -> Body {
    Op::CreateFile(create_file(number)).into()
}

fn unlink(number: u64, edge: &EdgeReply) -> Body {
    let (target, created_at) = (edge.target, edge.created_at);
    Op::Unlink(Unlink { dir: ROOT, name: name(number), target, created_at }).into()
}

fn entry(body: Body) -> Entry {
    let tag = ClientTag { client: 99, sequence: 7, acknowledged: 6, issued_at: 1 << 60 };
    stamped(ShardEntry { tag: Some(tag), body: Some(body) }, 1 << 60)
}

fn stamped(entry: ShardEntry, stamp: u64) -> Entry {
    Entry { stamp, kind: Some(Kind::Body(entry.encode_to_vec().into())) }
}

fn frames(count: u64) -> Frames {
    let frame = |id| {
        let request = Request {
            role: Role::Shard.into(),
            number: 3,
            time: 1 << 60,
            tag: Some(ClientTag { client: 99, sequence: 7 + id, acknowledged: 6, issued_at: 1 << 60 }),
            body: ShardRequest { op: Some(Op::CreateFile(create_file(id))) }.encode_to_vec().into(),
            cluster: 1 << 50,
            ..Request::default()
        };
        Frame { id, message: request.encode_to_vec().into() }
    };
    Frames::new((0..count).map(frame).collect())
}

/// A shard without a log, in memory.
struct Replica {
    applier: Applier<Shard>,
    facts: ShardFacts,
    sequence: u64,
}

impl Replica {
    fn new() -> Replica {
        let applier = Applier::open(Arc::new(MemoryStore::new())).expect("an empty store opens");
        let facts = ShardFacts { cluster: 1, ..ShardFacts::default() };
        let mut shard = Replica { applier, facts, sequence: 0 };
        let genesis =
            Genesis { shard: 0, slot_first: 0, slot_last: 255, cluster: 1, root_mode: 0o755, rules: 1 };
        shard.apply_entry(ShardEntry { tag: None, body: Some(Body::Genesis(genesis)) });
        shard
    }

    fn with_files(count: u64) -> Replica {
        let mut shard = Replica::new();
        for number in 0..count {
            shard.edge(create(number));
        }
        shard
    }

    fn tag(&mut self, client: u64) -> ClientTag {
        self.sequence += 1;
        let sequence = self.sequence;
        ClientTag { client, sequence, acknowledged: sequence - 1, issued_at: sequence }
    }

    fn apply_entry(&mut self, entry: ShardEntry) -> Option<Reply> {
        let entry = stamped(entry, self.sequence + 1);
        let position = self.applier.position().next();
        let batch = Batch { position, epoch: Epoch(1), entries: vec![entry.encode_to_vec().into()] };
        let mut applied = self.applier.apply(&batch).expect("memory does not fail");
        match applied.outcomes.pop() {
            Some((_, EntryOutcome::Done(Ok(ShardReply { reply })))) => reply,
            // A path that is refused would measure something else.
            other => panic!("a path does not do what it says: {other:?}"),
        }
    }

    fn apply(&mut self, body: Body) -> Option<Reply> {
        let tag = self.tag(99);
        self.apply_entry(ShardEntry { tag: Some(tag), body: Some(body) })
    }

    fn edge(&mut self, body: Body) -> EdgeReply {
        edge_of(self.apply(body))
    }

    /// As the CDC sends it.
    fn step(&mut self, body: Body) -> Option<Reply> {
        let tag = self.tag(clutch_cdc::STEP_CLIENT);
        self.apply_entry(ShardEntry { tag: Some(tag), body: Some(body) })
    }

    fn step_edge(&mut self, body: Body) -> EdgeReply {
        edge_of(self.step(body))
    }

    fn produce(&self, op: Op) -> ShardEntry {
        let tag = ClientTag { client: 99, sequence: 2, acknowledged: 1, issued_at: 5 };
        let mut random = || 5;
        let mut context = ProduceContext { now: Time(5), random: &mut random };
        let request = ShardRequest { op: Some(op) };
        match Shard::produce(&**self.applier.store(), request, Some(tag), &mut context, &self.facts) {
            Ok(entry) => entry,
            Err(_) => panic!("a path does not do what it says"),
        }
    }

    fn read(&self, op: Op) {
        let request = ShardRequest { op: Some(op) };
        match Shard::read(&**self.applier.store(), black_box(&request), &self.facts) {
            Ok(reply) => drop(black_box(reply)),
            Err(_) => panic!("a path does not do what it says"),
        }
    }
}

fn edge_of(reply: Option<Reply>) -> EdgeReply {
    match reply {
        Some(Reply::Edge(edge)) => edge,
        other => panic!("a path does not do what it says: {other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_does_what_it_says() {
        for name in NAMES {
            let mut run = path(name).expect("a path of that name");
            (0..3).for_each(|_| run());
        }
        assert!(path("nothing").is_none());
    }
}
