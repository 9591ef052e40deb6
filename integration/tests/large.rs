//! Large inputs that are allowed: a directory of a million names, a path of 4,096 directories.

use std::{collections::BTreeSet, sync::Arc};

use bytes::Bytes;
use clutch_client::{FileAttributes, Resolved};
use clutch_integration::{SimCluster, names};
use clutch_log::{Batch, Epoch, Position};
use clutch_proto::{
    InodeId,
    limits::{NAME_BYTES_MAX, PATH_DEPTH_MAX, READDIR_ENTRIES_MAX},
    listing,
    shard::{shard_request::Op, *},
    state::{Entry, entry::Kind},
    types::Code,
};
use clutch_shard::{Shard, ShardFacts, invariants};
use clutch_state::{Applier, Machine as _, MemoryStore};
use prost::Message as _;

const NAMES: usize = 1_000_000;
const BATCH: usize = 1000;

fn apply(applier: &mut Applier<Shard>, bodies: Vec<shard_entry::Body>) {
    let position = applier.position().next();
    let entries = bodies.into_iter().map(|body| {
        let entry = ShardEntry { tag: None, body: Some(body) }.encode_to_vec().into();
        Bytes::from(Entry { stamp: position.0, kind: Some(Kind::Body(entry)) }.encode_to_vec())
    });
    let batch = Batch { position, epoch: Epoch(1), entries: entries.collect() };
    applier.apply(&batch).expect("no fault");
}

fn facts() -> ShardFacts {
    ShardFacts { cluster: 1, ..ShardFacts::default() }
}

/// The root with `count` files in it.
fn directory(count: usize, name: impl Fn(usize) -> Bytes) -> Applier<Shard> {
    let mut applier = Applier::<Shard>::open(Arc::new(MemoryStore::new())).expect("opens");
    let genesis = Genesis { shard: 0, slot_first: 0, slot_last: 255, cluster: 1, root_mode: 0o755, rules: 1 };
    apply(&mut applier, vec![shard_entry::Body::Genesis(genesis)]);
    let dir = InodeId::ROOT.raw();
    for first in (0..count).step_by(BATCH) {
        let create = |i: usize| {
            let name = name(i);
            Op::CreateFile(CreateFile { dir, name, mode: 0o644, ..CreateFile::default() }).into()
        };
        apply(&mut applier, (first..first + BATCH).map(create).collect());
    }
    assert_eq!(applier.position(), Position((count / BATCH) as u64 + 1));
    applier
}

/// All names of the root, which come once each; in how many pages.
fn list(applier: &Applier<Shard>) -> (usize, BTreeSet<Bytes>) {
    let dir = InodeId::ROOT.raw();
    let (mut cursor, mut after, mut pages, mut names) = (0, Bytes::new(), 0, BTreeSet::new());
    loop {
        let list = ReadDir { dir, cursor, after, limit: u32::MAX };
        let request = ShardRequest { op: Some(Op::ReadDir(list)) };
        let reply = Shard::read(&**applier.store(), &request, &facts()).expect("a page");
        assert!(reply.encoded_len() <= READDIR_ENTRIES_MAX * (NAME_BYTES_MAX + 32));
        let Some(shard_reply::Reply::ReadDir(page)) = reply.reply else { panic!("not a page") };
        let entries = listing::entries(page.entries).expect("whole");
        assert!(entries.len() <= READDIR_ENTRIES_MAX, "{} names in one page", entries.len());
        pages += 1;
        for entry in entries {
            assert!(names.insert(entry.name), "a name twice");
        }
        if page.next_cursor == 0 {
            return (pages, names);
        }
        assert!(page.next_cursor > cursor || !page.next_after.is_empty());
        (cursor, after) = (page.next_cursor, page.next_after);
    }
}

#[test]
fn names_of_one_hash_come_in_bounded_pages_and_have_histories_of_their_own() {
    let name = |i: usize| Bytes::from(names::colliding(i as u32));
    let mut applier = directory(9000, name);
    let (pages, listed) = list(&applier);
    assert_eq!(listed.len(), 9000);
    assert!(pages <= 9000 / READDIR_ENTRIES_MAX + 1, "{pages} pages");
    let dir = InodeId::ROOT.raw();
    let read = |applier: &Applier<Shard>, op| {
        Shard::read(&**applier.store(), &ShardRequest { op: Some(op) }, &facts()).expect("reads").reply
    };
    let lookup = Lookup { dir, name: name(4321) };
    let Some(shard_reply::Reply::Edge(edge)) = read(&applier, Op::Lookup(lookup)) else { panic!("no edge") };
    let EdgeReply { target, created_at, .. } = edge;
    let unlink = Unlink { dir, name: name(4321), target, created_at };
    apply(&mut applier, vec![Op::Unlink(unlink).into()]);
    assert_eq!(list(&applier).1.len(), 8999);
    for with_present in [false, true] {
        for (asked, count) in [(4321, 1), (4322, usize::from(with_present))] {
            let history = History { dir, name: name(asked), with_present, ..History::default() };
            let Some(shard_reply::Reply::History(found)) = read(&applier, Op::History(history)) else {
                panic!("no history")
            };
            assert_eq!(found.past.len(), count, "of {asked}, with what is present: {with_present}");
            assert!(found.past.iter().all(|edge| edge.name == name(asked)));
        }
    }
    let (wrong, _) = invariants::check_shard(&**applier.store()).expect("reads");
    assert_eq!(wrong, Vec::<String>::new());
}

#[test]
fn a_directory_of_a_million_names_is_listed_in_bounded_pages() {
    let mut applier = directory(NAMES, |i| Bytes::from(format!("name-{i}")));
    let (pages, names) = list(&applier);
    assert_eq!(names.len(), NAMES);
    assert!(pages <= NAMES / READDIR_ENTRIES_MAX + 1, "{pages} pages");
    let (dir, facts) = (InodeId::ROOT.raw(), facts());
    // One name among the million is found, replaced and removed like any other.
    let name = Bytes::from_static(b"name-500000");
    let request = ShardRequest { op: Some(Op::Lookup(Lookup { dir, name: name.clone() })) };
    let reply = Shard::read(&**applier.store(), &request, &facts).expect("found").reply;
    let Some(shard_reply::Reply::Edge(EdgeReply { target, created_at, .. })) = reply else {
        panic!("no edge")
    };
    apply(&mut applier, vec![Op::Unlink(Unlink { dir, name, target, created_at }).into()]);
    assert!(Shard::read(&**applier.store(), &request, &facts).is_err());
    let (wrong, _) = invariants::check_shard(&**applier.store()).expect("reads");
    assert_eq!(wrong, Vec::<String>::new());
}

#[test]
fn paths_of_4096_directories_work_and_longer_ones_are_refused() {
    let cluster = SimCluster::start(11, 2, 3);
    let client = cluster.client();
    cluster.run(async move {
        let attributes = FileAttributes { mode: 0o755, ..FileAttributes::default() };
        let (mut dir, mut chain) = (InodeId::ROOT, Vec::new());
        let name = Bytes::from_static(b"d");
        for _ in 0..PATH_DEPTH_MAX {
            let made = client.make_directory(dir, &name, attributes).await.expect("makes");
            chain.push(Resolved {
                id: made.id,
                parent: dir,
                name: name.clone(),
                created_at: made.created_at,
            });
            dir = made.id;
        }
        let path = "/d".repeat(PATH_DEPTH_MAX);
        assert_eq!(client.resolve(&path).await.expect("resolves").id, dir);
        let longer = client.resolve(&format!("{path}/d")).await.expect_err("too deep");
        assert_eq!(longer.code(), Some(Code::NameTooLong), "{longer}");
        assert!(longer.to_string().len() < 4096, "an error is not as long as the path");
        // A directory that moves to the end walks the whole way up.
        let moved = client.make_directory(InodeId::ROOT, &Bytes::from_static(b"m"), attributes).await;
        let moved = moved.expect("makes");
        let at =
            Resolved { id: moved.id, parent: InodeId::ROOT, name: "m".into(), created_at: moved.created_at };
        let above_last = chain[PATH_DEPTH_MAX - 2].id;
        let moved = client.rename(&at, above_last, &Bytes::from_static(b"m")).await.expect("moves");
        // One that would end below itself is refused, however far down.
        let into_itself = client.rename(&chain[0], moved.id, &Bytes::from_static(b"x")).await;
        assert_eq!(into_itself.expect_err("a loop").code(), Some(Code::Loop));
        // And below the last one a move is refused: nothing could walk up from there.
        let deeper = client.make_directory(dir, &name, attributes).await.expect("makes");
        let other = client.make_directory(InodeId::ROOT, &Bytes::from_static(b"o"), attributes).await;
        let other = other.expect("makes");
        let at =
            Resolved { id: other.id, parent: InodeId::ROOT, name: "o".into(), created_at: other.created_at };
        let refused = client.rename(&at, deeper.id, &Bytes::from_static(b"o")).await.expect_err("too deep");
        assert_eq!(refused.code(), Some(Code::TooLarge), "{refused}");
        // Nothing of it is left locked.
        client.rename(&at, InodeId::ROOT, &Bytes::from_static(b"p")).await.expect("moves");
    });
    cluster.fsck();
}
