//! Rows that cannot be: whoever meets one stops, and says which. Each is made by hand in a state that was fine.

use std::sync::Arc;

use bytes::Bytes;
use clutch_proto::{
    ContentId, InodeId, SpanId, Time,
    limits::INLINE_OF_SHARD_BYTES_MAX,
    log::{Batch, Epoch},
    rules,
    shard::{
        AddHole, CertifySpan, CertifySpanEntry, CollectContent, ContentRow, CreateFile, CreateInline,
        EdgeReply, EdgeRow, ExtentRow, ForgetEdge, Genesis, InitiateSpan, InitiateSpanEntry, InodeRow,
        Layout, PastContentRow, PublishContent, RemoveSpan, RemoveSpanEntry, RestoreContent, ServicesChanged,
        ShardEntry, ShardRequest, ShareRange, StartContent, StartContentEntry, SwapSpans, Unlink,
        shard_entry::Body, shard_reply::Reply, shard_request::Op,
    },
    state::{Entry, entry::Kind},
    types::{BlockService, Code, SnapshotPolicy, Span, SpanShape},
};
use clutch_shard::{Shard, ShardFacts, tables};
use clutch_state::{
    Applier, EntryOutcome, Machine as _, MemoryStore, ProduceContext, Stop, Store as _, Table, get_row,
};
use prost::Message;

const ROOT: u64 = InodeId::ROOT.raw();
const COOKIE: Bytes = Bytes::from_static(b"0123456789abcdef");

struct Replica {
    store: Arc<MemoryStore>,
    applier: Applier<Shard>,
}

impl Replica {
    fn new() -> Replica {
        let store = Arc::new(MemoryStore::new());
        let applier = Applier::open(store.clone()).expect("an empty store opens");
        let mut replica = Replica { store, applier };
        let genesis = Genesis { slot_last: 255, cluster: 1, rules: rules::VERSION, ..Genesis::default() };
        replica.done(Body::Genesis(genesis));
        let service = |service_id| BlockService { service_id, ..BlockService::default() };
        replica.done(Body::ServicesChanged(ServicesChanged {
            services: vec![service(1), service(2)],
            version: 1,
        }));
        replica
    }

    /// The fault's words, or how the entry ended.
    fn apply(&mut self, body: Body) -> Result<Result<Reply, String>, String> {
        let entry = ShardEntry { tag: None, body: Some(body) }.encode_to_vec().into();
        let entry = Entry { stamp: 1, kind: Some(Kind::Body(entry)) }.encode_to_vec().into();
        let position = self.applier.position().next();
        let batch = Batch { position, epoch: Epoch(1), entries: vec![entry] };
        let mut applied = self.applier.apply(&batch).map_err(|fault| fault.to_string())?;
        match applied.outcomes.remove(0).1 {
            EntryOutcome::Done(Ok(reply)) => Ok(Ok(reply.reply.expect("a reply"))),
            EntryOutcome::Done(Err(refusal)) => Ok(Err(refusal.to_string())),
            EntryOutcome::Pending | EntryOutcome::Internal => panic!("an answer"),
        }
    }

    fn done(&mut self, body: Body) -> Reply {
        self.apply(body).expect("no fault").expect("no refusal")
    }

    fn edge(&mut self, name: &'static str) -> EdgeReply {
        let op = CreateFile { dir: ROOT, name: name.into(), data: "data".into(), ..CreateFile::default() };
        let Reply::Edge(edge) = self.done(Op::CreateFile(op).into()) else { panic!("an edge") };
        edge
    }

    fn content(&mut self, dir: u64) -> u64 {
        let op = Some(StartContent { dir });
        let entry = StartContentEntry { op, cookie: COOKIE, ..StartContentEntry::default() };
        let Reply::Content(content) = self.done(Body::StartContent(entry)) else { panic!("a content") };
        content.content
    }

    /// The entry for a span of a content.
    fn span(content: u64) -> Body {
        let op = InitiateSpan {
            content,
            cookie: COOKIE,
            size: 3,
            shape: Some(SpanShape::for_size(3, 1, 1)),
            cell_crcs: vec![7; 2],
            ..InitiateSpan::default()
        };
        let services = vec![1, 2];
        Body::InitiateSpan(InitiateSpanEntry { op: Some(op), services, ..InitiateSpanEntry::default() })
    }

    /// A span that a content waits for.
    fn waits(&mut self, content: u64) -> Span {
        let Reply::Span(span) = self.done(Replica::span(content)) else { panic!("a span") };
        span
    }

    fn row<M: Message + Default>(&self, table: Table, key: &[u8]) -> M {
        get_row(&*self.store, table, key).expect("reads").expect("is there")
    }

    /// Makes a row what no entry would.
    fn set(&self, table: Table, key: &[u8], row: &impl Message) {
        let write = vec![(table.stored_key(key), Some(row.encode_to_vec().into()))];
        self.store.write(write).expect("writes");
    }

    fn content_of(&self, file: u64) -> (InodeId, u64) {
        let id = InodeId::from_wire(file).expect("an id");
        (id, self.row::<InodeRow>(tables::INODE, &tables::inode_key(id)).content)
    }

    fn breaks(&mut self, body: impl Into<Body>, words: &str) {
        let fault = self.apply(body.into()).expect_err(words);
        assert!(fault.contains(words), "{fault:?} does not say {words:?}");
    }
}

#[test]
fn an_edge_ends_after_it_began() {
    let mut replica = Replica::new();
    let EdgeReply { target, .. } = replica.edge("f");
    let (key, created_at) = (tables::edge_key(InodeId::ROOT, b"f"), 1 << 60);
    replica.set(tables::EDGE, &key, &EdgeRow { target, created_at, locked: false });
    let unlink = Unlink { dir: ROOT, name: "f".into(), target, created_at };
    replica.breaks(Op::Unlink(unlink), "ends at");
}

#[test]
fn a_directory_changes_after_its_edges() {
    let mut replica = Replica::new();
    let key = tables::inode_key(InodeId::ROOT);
    let row: InodeRow = replica.row(tables::INODE, &key);
    replica.set(tables::INODE, &key, &InodeRow { edge_time: 1 << 60, ..row });
    let create = CreateFile { dir: ROOT, name: "f".into(), ..CreateFile::default() };
    replica.breaks(Op::CreateFile(create), "had an edge at");
}

#[test]
fn inline_data_is_what_its_extent_names() {
    let mut replica = Replica::new();
    let data = Bytes::from(vec![1; 1000]);
    let op = CreateInline { dir: ROOT, name: "f".into(), data: data.clone(), ..CreateInline::default() };
    let Reply::Edge(file) = replica.done(Op::CreateInline(op).into()) else { panic!("an edge") };
    let (id, content) = replica.content_of(file.target);
    let request = ShardRequest { op: Some(Op::Layout(Layout { id: id.raw(), ..Layout::default() })) };
    let read = |replica: &Replica| Shard::read(&*replica.store, &request, &ShardFacts::default());
    read(&replica).expect("it is there");
    let key = tables::INLINE.stored_key(&tables::extent_key(ContentId(content), 0));
    for (row, words) in [(Some(Bytes::from(vec![2; 1000])), "other inline data"), (None, "no inline data")] {
        replica.store.write(vec![(key.clone(), row)]).expect("writes");
        let fault = read(&replica).expect_err(words);
        assert!(format!("{fault:?}").contains(words), "{fault:?}");
        let (wrong, _) = clutch_shard::invariants::check_shard(&*replica.store).expect("reads");
        assert!(wrong.iter().any(|what| what.contains(words)), "{wrong:?}");
    }
    // What is removed is not read; the sum tells of one that was counted twice.
    let write = vec![(key, Some(data)), (tables::INLINE_BYTES.stored_key(&[]), None)];
    replica.store.write(write).expect("writes");
    let unlink = Unlink { dir: ROOT, name: "f".into(), target: file.target, created_at: file.created_at };
    let Reply::Edge(ended) = replica.done(Op::Unlink(unlink).into()) else { panic!("an edge") };
    let policy = Some(SnapshotPolicy { age_ms: Some(0), ..SnapshotPolicy::default() });
    let (target, ended_at) = (file.target, ended.created_at);
    replica.done(Op::ForgetEdge(ForgetEdge { dir: ROOT, name: "f".into(), target, ended_at, policy }).into());
    replica.breaks(Op::CollectContent(CollectContent { content }), "less inline data than is removed");
}

#[test]
fn a_shard_takes_so_much_inline_data_and_no_more() {
    let mut replica = Replica::new();
    let file = |name: &'static str| CreateInline {
        dir: ROOT,
        name: name.into(),
        data: vec![1; 1000].into(),
        ..CreateInline::default()
    };
    let Reply::Edge(edge) = replica.done(Op::CreateInline(file("f")).into()) else { panic!("an edge") };
    let (_, content) = replica.content_of(edge.target);
    let share = |content, from_content, length| ShareRange {
        content,
        cookie: COOKIE,
        from_content,
        length,
        ..ShareRange::default()
    };
    let (draft, plain) = (replica.content(ROOT), replica.edge("plain").target);
    let plain = replica.content_of(plain).1;
    let all = [
        Op::CreateInline(file("g")),
        Op::ShareRange(share(draft, content, 1000)),
        // Nothing of it is copied into the table.
        Op::ShareRange(share(draft, plain, 4)),
    ];
    for (room, taken) in [(1000, [true, true, true]), (999, [false, false, true])] {
        let bytes = INLINE_OF_SHARD_BYTES_MAX - room;
        let key = tables::INLINE_BYTES.stored_key(&[]);
        replica.store.write(vec![(key, Some(bytes.to_be_bytes().to_vec().into()))]).expect("writes");
        let produced = all.clone().map(|op| {
            let mut random = || 1;
            let mut context = ProduceContext { now: Time(1), random: &mut random };
            let request = ShardRequest { op: Some(op) };
            let facts = ShardFacts::default();
            match Shard::produce(&*replica.store, request, None, &mut context, &facts) {
                Ok(_) => true,
                Err(Stop::Refused(refusal)) if refusal.code == Code::NoSpace => false,
                Err(other) => panic!("{other}"),
            }
        });
        assert_eq!(produced, taken, "with room for {room}");
    }
}

#[test]
fn two_contents_of_a_file_do_not_end_at_once() {
    let mut replica = Replica::new();
    let id = replica.edge("f").target;
    let (file, expected_content) = replica.content_of(id);
    let content = replica.content(id);
    let next_time = replica.applier.time().0 + 1;
    let past = PastContentRow { content: 9, dir: ROOT };
    replica.set(tables::PAST_CONTENT, &tables::past_content_key(file, next_time), &past);
    let publish =
        PublishContent { id, content, cookie: COOKIE, expected_content, ..PublishContent::default() };
    replica.breaks(Op::PublishContent(publish), "two contents of file");
}

#[test]
fn what_comes_back_is_the_files_own() {
    let mut replica = Replica::new();
    let (id, other) = (replica.edge("f").target, replica.edge("g").target);
    let ((file, expected_content), (_, content)) = (replica.content_of(id), replica.content_of(other));
    let past = PastContentRow { content, dir: ROOT };
    replica.set(tables::PAST_CONTENT, &tables::past_content_key(file, 5), &past);
    let op = RestoreContent { id, content, expected_content, dir: ROOT, ended_at: 5 };
    replica.breaks(Op::RestoreContent(op), "is of file");
}

#[test]
fn a_span_has_no_uses_before_it_is_certified_and_none_when_it_goes() {
    let mut replica = Replica::new();
    let content = replica.content(ROOT);
    let span = replica.waits(content);
    let (span_id, key) = (span.span_id, tables::span_key(SpanId(span.span_id)));
    replica.set(tables::SPAN, &key, &Span { uses: 1, ..span });
    let op = Some(CertifySpan { content, cookie: COOKIE, span_id, ..CertifySpan::default() });
    replica.breaks(Body::CertifySpan(CertifySpanEntry { op, first_bad: 0 }), "before it is certified");

    let mut replica = Replica::new();
    let content = replica.content(ROOT);
    let span = replica.waits(content);
    replica.set(tables::SPAN, &key, &Span { uses: 1, ..span });
    replica.set(tables::DEAD_SPAN, &key, &Span::default());
    let op = Some(RemoveSpan { span_id, proofs: vec![] });
    replica.breaks(Body::RemoveSpan(RemoveSpanEntry { op, first_bad: 0 }), "has 1 uses");
}

#[test]
fn a_content_waits_for_a_span_of_its_own_slot() {
    let mut replica = Replica::new();
    let content = replica.content(ROOT);
    let key = tables::content_key(ContentId(content));
    let row: ContentRow = replica.row(tables::CONTENT, &key);
    replica.set(tables::CONTENT, &key, &ContentRow { pending_span: 1 << 8 | 7, ..row });
    replica.breaks(Replica::span(content), "of another slot");
}

/// An extent of a source that this build does not know is no hole: nothing is read and nothing is given up.
#[test]
fn an_unknown_source_is_no_hole() {
    const WORDS: &str = "a source that this build does not know";
    let mut replica = Replica::new();
    let id = replica.edge("f").target;
    let content = ContentId(replica.content_of(id).1);
    let unknown = ExtentRow { length: 4, source: None };
    replica.set(tables::EXTENT, &tables::extent_key(content, 0), &unknown);
    let request = ShardRequest { op: Some(Op::Layout(Layout { id, ..Layout::default() })) };
    let facts = ShardFacts { cluster: 1, ..ShardFacts::default() };
    let read = Shard::read(&*replica.store, &request, &facts).expect_err("is not served");
    assert!(read.to_string().contains(WORDS), "{read}");

    let draft = replica.content(ROOT);
    let hole = AddHole { content: draft, cookie: COOKIE, offset: 0, length: 4 };
    replica.done(Op::AddHole(hole).into());
    replica.set(tables::EXTENT, &tables::extent_key(ContentId(draft), 0), &unknown);
    let key = tables::content_key(ContentId(draft));
    let row: ContentRow = replica.row(tables::CONTENT, &key);
    replica.set(tables::CONTENT, &key, &ContentRow { deadline: 0, ..row });
    replica.breaks(Op::CollectContent(CollectContent { content: draft }), WORDS);

    // One whose span is to be exchanged for another's.
    let mut replica = Replica::new();
    let file = replica.edge("f").target;
    let content = ContentId(replica.content_of(file).1);
    replica.set(tables::EXTENT, &tables::extent_key(content, 0), &unknown);
    let swap = SwapSpans { content_a: content.0, content_b: content.0, ..SwapSpans::default() };
    replica.breaks(Op::SwapSpans(swap), WORDS);
}

/// An entry that holds a read, nothing, or a request that lacks what a producer adds: no build wrote it.
#[test]
fn entries_that_nobody_writes_stop_the_replica() {
    Replica::new().breaks(Op::Layout(Layout::default()), "it holds a read");
    Replica::new().breaks(Op::StartContent(StartContent { dir: ROOT }), "lacks what a producer adds");
    Replica::new().breaks(Body::Request(ShardRequest { op: None }), "no operation that this build knows");
}

#[test]
fn bytes_lie_in_extents() {
    let mut replica = Replica::new();
    let draft = replica.content(ROOT);
    let key = tables::content_key(ContentId(draft));
    let row: ContentRow = replica.row(tables::CONTENT, &key);
    replica.set(tables::CONTENT, &key, &ContentRow { size: 5, ..row });
    let hole = AddHole { content: draft, cookie: COOKIE, offset: 5, length: 4 };
    replica.breaks(Op::AddHole(hole), "has 5 bytes in 0 extents");
}
