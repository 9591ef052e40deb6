//! Transcripts of every operation of the shard; [`clutch_state_transcript`] says how they are read and renewed.

use std::{path::Path, sync::Arc};

use bytes::Bytes;
use clutch_proto::{
    ContentId, InodeId, SpanId, rules,
    shard::*,
    types::{BlockService, DirectoryPolicy, SnapshotPolicy, Span, SpanShape},
};
use clutch_shard::{Shard, ShardFacts, tables};
use clutch_state::Table;
use clutch_state_transcript::{Shows, compare, short, shown};
use shard_entry::Body;
use shard_reply::Reply;
use shard_request::Op;

const ROOT: u64 = InodeId::ROOT.raw();
const COOKIE: Bytes = Bytes::from_static(b"0123456789abcdef");
/// A moment long after everything in a transcript.
const LATER: u64 = 1 << 60;

struct Transcript(clutch_state_transcript::Transcript<Shard>);

fn row(table: Table, value: &[u8]) -> (&'static str, String) {
    match table {
        tables::SHARD => ("shard", shown::<Genesis>(value)),
        tables::SERVICE => ("service", shown::<BlockService>(value)),
        tables::INODE => ("inode", shown::<InodeRow>(value)),
        tables::EDGE => ("edge", shown::<EdgeRow>(value)),
        tables::PAST_EDGE => ("past edge", shown::<PastEdgeRow>(value)),
        tables::CONTENT => ("content", shown::<ContentRow>(value)),
        tables::EXTENT => ("extent", shown::<ExtentRow>(value)),
        tables::SPAN => ("span", shown::<Span>(value)),
        tables::PAST_CONTENT => ("past content", shown::<PastContentRow>(value)),
        tables::COUNTER => ("counter", shown::<CounterRow>(value)),
        tables::TRANSIENT => ("transient", String::new()),
        tables::DEAD_SPAN => ("dead span", String::new()),
        tables::BLOCK => ("block", value.iter().map(|byte| format!("{byte:02x}")).collect()),
        tables::INLINE_BYTES => ("inline bytes", value.iter().map(|byte| format!("{byte:02x}")).collect()),
        tables::INLINE => ("inline data", format!("{} bytes", value.len())),
        other => panic!("{other:?} is in no transcript"),
    }
}

fn in_words(reply: &ShardReply) -> String {
    short(reply.reply.as_ref().expect("a reply"))
}

impl Transcript {
    fn new() -> Transcript {
        let shows = Shows { tables: 16..=u8::MAX, row, reply: in_words };
        let mut transcript = Transcript(clutch_state_transcript::Transcript::new(shows));
        let genesis = Genesis { slot_last: 255, cluster: 1, rules: rules::VERSION, ..Genesis::default() };
        transcript.entry(Body::Genesis(genesis));
        transcript
    }

    fn title(&mut self, words: &str) {
        self.0.title(words);
    }

    fn entry(&mut self, body: impl Into<Body>) -> Option<Reply> {
        let body = body.into();
        let words = match &body {
            Body::Request(ShardRequest { op: Some(op) }) => short(op),
            other => short(other),
        };
        let answer = self.0.entry(&words, &ShardEntry { tag: None, body: Some(body) })?;
        answer.ok().map(|reply| reply.reply.expect("a reply"))
    }

    fn read(&mut self, op: Op) -> Option<Reply> {
        let facts = ShardFacts {
            cluster: 1,
            services: Arc::new(vec![BlockService { service_id: 1, ..BlockService::default() }]),
            ..ShardFacts::default()
        };
        let words = short(&op);
        self.0.read(&words, &ShardRequest { op: Some(op) }, &facts)?.reply
    }

    fn file(&mut self, name: &'static str, data: &'static str) -> EdgeReply {
        let op = CreateFile {
            dir: ROOT,
            name: name.into(),
            mode: 0o644,
            data: data.into(),
            ..CreateFile::default()
        };
        match self.entry(Op::CreateFile(op)) {
            Some(Reply::Edge(edge)) => edge,
            other => panic!("{other:?}"),
        }
    }

    fn content(&mut self, dir: u64) -> u64 {
        let op = Some(StartContent { dir });
        let entry = StartContentEntry { op, cookie: COOKIE, ..StartContentEntry::default() };
        match self.entry(Body::StartContent(entry)) {
            Some(Reply::Content(content)) => content.content,
            other => panic!("{other:?}"),
        }
    }

    /// A content with one certified span.
    fn written(&mut self, dir: u64) -> (u64, Span) {
        let content = self.content(dir);
        let op = InitiateSpan {
            content,
            cookie: COOKIE,
            size: 3,
            crc: 5,
            shape: Some(SpanShape::for_size(3, 1, 1)),
            cell_crcs: vec![7; 2],
            ..InitiateSpan::default()
        };
        let entry = InitiateSpanEntry { op: Some(op), services: vec![1, 2], ..InitiateSpanEntry::default() };
        let Some(Reply::Span(span)) = self.entry(Body::InitiateSpan(entry)) else { panic!("a span") };
        let op = CertifySpan { content, cookie: COOKIE, span_id: span.span_id, proofs: vec![] };
        self.entry(Body::CertifySpan(CertifySpanEntry { op: Some(op), first_bad: 0 }));
        (content, span)
    }

    fn services(&mut self) {
        let service = |service_id| BlockService { service_id, ..BlockService::default() };
        let services = vec![service(1), service(2), service(3)];
        self.entry(Body::ServicesChanged(ServicesChanged { services, version: 1 }));
    }
}

fn forget() -> Option<SnapshotPolicy> {
    Some(SnapshotPolicy { age_ms: Some(0), ..SnapshotPolicy::default() })
}

fn files() -> String {
    let mut t = Transcript::new();
    t.title("files and links are made, found and listed");
    let f = t.file("f", "data");
    let link = CreateSymlink { dir: ROOT, name: "l".into(), target: "f".into(), ..CreateSymlink::default() };
    t.entry(Op::CreateSymlink(link));
    let again = CreateFile { dir: ROOT, name: "f".into(), ..CreateFile::default() };
    t.entry(Op::CreateFile(again));
    t.read(Op::Lookup(Lookup { dir: ROOT, name: "f".into() }));
    t.read(Op::Lookup(Lookup { dir: ROOT, name: "none".into() }));
    t.read(Op::Stat(Stat { id: f.target }));
    t.read(Op::ReadDir(ReadDir { dir: ROOT, ..ReadDir::default() }));
    t.read(Op::Layout(Layout { id: f.target, ..Layout::default() }));

    t.title("attributes, another name, no name, back again");
    let set = SetAttributes { id: f.target, mode: Some(0o600), mtime: Some(9), ..SetAttributes::default() };
    t.entry(Op::SetAttributes(set));
    let rename = RenameInDirectory {
        dir: ROOT,
        old_name: "f".into(),
        target: f.target,
        created_at: f.created_at,
        new_name: "g".into(),
    };
    let Some(Reply::Edge(g)) = t.entry(Op::RenameInDirectory(rename.clone())) else { panic!("an edge") };
    t.entry(Op::RenameInDirectory(rename));
    let unlink = Unlink { dir: ROOT, name: "g".into(), target: g.target, created_at: g.created_at };
    let Some(Reply::Edge(ended)) = t.entry(Op::Unlink(unlink)) else { panic!("an edge") };
    t.read(Op::History(History { dir: ROOT, name: "g".into(), ..History::default() }));
    let back = Undelete {
        dir: ROOT,
        name: "g".into(),
        target: g.target,
        ended_at: ended.created_at,
        new_name: "h".into(),
    };
    t.entry(Op::Undelete(back.clone()));
    t.entry(Op::Undelete(back));
    t.0.text
}

fn directories() -> String {
    let mut t = Transcript::new();
    t.title("a directory is made in steps");
    let make = CreateDirectoryInode { slot: 3, parent: ROOT, mode: 0o755, ..CreateDirectoryInode::default() };
    let Some(Reply::Edge(made)) = t.entry(Op::CreateDirectoryInode(make)) else { panic!("an edge") };
    let dir = made.target;
    let insert = InsertEdge { dir: ROOT, name: "d".into(), target: dir, replace: false };
    let Some(Reply::Edge(edge)) = t.entry(Op::InsertEdge(insert)) else { panic!("an edge") };
    t.entry(Op::SetParent(SetParent { dir, parent: ROOT }));
    let policy = DirectoryPolicy { snapshot: forget(), ..DirectoryPolicy::default() };
    t.entry(Op::SetPolicy(SetPolicy { id: dir, policy: Some(policy), inherit: vec![] }));

    t.title("its edge is locked, unlocked, locked and ended");
    let (name, created_at) = (Bytes::from("d"), edge.created_at);
    let lock = LockEdge { dir: ROOT, name: name.clone(), target: dir, created_at };
    t.entry(Op::LockEdge(lock.clone()));
    t.entry(Op::LockEdge(lock.clone()));
    t.entry(Op::UnlockEdge(UnlockEdge { dir: ROOT, name: name.clone(), target: dir, created_at }));
    t.entry(Op::LockEdge(lock));
    t.entry(Op::OrphanDirectory(OrphanDirectory { dir, parent: ROOT }));
    t.entry(Op::RemoveLockedEdge(RemoveLockedEdge {
        dir: ROOT,
        name: name.clone(),
        target: dir,
        created_at,
    }));
    t.read(Op::History(History { dir: ROOT, with_present: true, ..History::default() }));

    t.title("it comes back, goes again and is forgotten");
    t.entry(Op::AdoptDirectory(AdoptDirectory { dir, parent: ROOT }));
    t.entry(Op::OrphanDirectory(OrphanDirectory { dir, parent: ROOT }));
    t.0.stamp = LATER;
    t.entry(Op::ForgetDirectoryInode(ForgetDirectoryInode { dir, policy: forget() }));
    let make = CreateDirectoryInode { slot: 3, parent: ROOT, mode: 0o755, ..CreateDirectoryInode::default() };
    let Some(Reply::Edge(made)) = t.entry(Op::CreateDirectoryInode(make)) else { panic!("an edge") };
    t.entry(Op::RemoveDirectoryInode(RemoveDirectoryInode { dir: made.target }));
    t.0.text
}

fn inline() -> String {
    let mut t = Transcript::new();
    t.title("a small file lies in the metadata, its bytes beside its extent");
    let data = Bytes::from(vec![b'x'; 300]);
    let op = CreateInline { dir: ROOT, name: "f".into(), mode: 0o644, data, ..CreateInline::default() };
    let Some(Reply::Edge(file)) = t.entry(Op::CreateInline(op.clone())) else { panic!("an edge") };
    t.entry(Op::CreateInline(CreateInline { name: "g".into(), data: Bytes::new(), ..op.clone() }));
    t.entry(Op::CreateInline(op));
    let Some(Reply::Layout(layout)) = t.read(Op::Layout(Layout { id: file.target, ..Layout::default() }))
    else {
        panic!("a layout")
    };
    let content = layout.content;

    t.title("a part of it is shared, and lies by itself");
    let other = t.content(file.target);
    let share = |offset, from_offset, length| ShareRange {
        content: other,
        cookie: COOKIE,
        offset,
        from_content: content,
        from_offset,
        length,
    };
    t.entry(Op::ShareRange(share(0, 10, 280)));
    t.entry(Op::ShareRange(share(280, 290, 10)));
    let publish = PublishContent {
        id: file.target,
        content: other,
        cookie: COOKIE,
        expected_content: content,
        dir: ROOT,
        ..PublishContent::default()
    };
    t.entry(Op::PublishContent(publish));
    t.read(Op::Layout(Layout { id: file.target, ..Layout::default() }));

    t.title("what was before goes with its bytes");
    let Some(Reply::ContentHistory(past)) =
        t.read(Op::ContentHistory(ContentHistory { id: file.target, after: 0 }))
    else {
        panic!("a history")
    };
    t.0.stamp = LATER;
    let ended_at = past.past[0].ended_at;
    t.entry(Op::ForgetContent(ForgetContent { id: file.target, content, policy: forget(), ended_at }));
    t.entry(Op::CollectContent(CollectContent { content }));
    t.0.text
}

fn contents() -> String {
    let mut t = Transcript::new();
    t.services();
    t.title("a content of bytes, a hole and a span becomes a file");
    let (content, _) = t.written(ROOT);
    t.entry(Op::AddInline(AddInline { content, cookie: COOKIE, offset: 3, data: "four".into() }));
    t.entry(Op::AddHole(AddHole { content, cookie: COOKIE, offset: 7, length: 9 }));
    t.entry(Op::AddHole(AddHole { content, cookie: COOKIE, offset: 7, length: 9 }));
    let link =
        LinkFile { dir: ROOT, name: "f".into(), content, cookie: COOKIE, mode: 0o644, ..LinkFile::default() };
    let Some(Reply::Edge(file)) = t.entry(Op::LinkFile(link)) else { panic!("an edge") };
    t.read(Op::Layout(Layout { id: file.target, ..Layout::default() }));

    t.title("it gets another content that shares a range, and the first one back");
    let other = t.content(file.target);
    let share = ShareRange {
        content: other,
        cookie: COOKIE,
        offset: 0,
        from_content: content,
        from_offset: 1,
        length: 4,
    };
    t.entry(Op::ShareRange(share));
    let publish = PublishContent {
        id: file.target,
        content: other,
        cookie: COOKIE,
        expected_content: content,
        dir: ROOT,
        ..PublishContent::default()
    };
    t.entry(Op::PublishContent(publish.clone()));
    t.entry(Op::PublishContent(publish));
    let Some(Reply::ContentHistory(past)) =
        t.read(Op::ContentHistory(ContentHistory { id: file.target, after: 0 }))
    else {
        panic!("a history")
    };
    let restore = RestoreContent {
        id: file.target,
        content,
        expected_content: other,
        dir: ROOT,
        ended_at: past.past[0].ended_at,
    };
    t.entry(Op::RestoreContent(restore));

    t.title("one is given up");
    let given_up = t.content(ROOT);
    t.entry(Op::ScrapContent(ScrapContent { content: given_up, cookie: COOKIE }));
    t.0.text
}

fn spans() -> String {
    let mut t = Transcript::new();
    t.services();
    t.title("blocks and spans of the same bytes change places");
    let ((a, span_a), (b, span_b)) = (t.written(ROOT), t.written(ROOT));
    let swap = SwapBlocks {
        span_a: span_a.span_id,
        block_a: span_a.blocks[0].block_id,
        span_b: span_b.span_id,
        block_b: span_b.blocks[0].block_id,
    };
    t.entry(Op::SwapBlocks(swap));
    let swap = SwapSpans {
        content_a: a,
        offset_a: 0,
        span_a: span_a.span_id,
        content_b: b,
        offset_b: 0,
        span_b: span_b.span_id,
    };
    t.entry(Op::SwapSpans(swap));
    let moved = MoveSpan {
        from_content: a,
        from_cookie: COOKIE,
        content: b,
        cookie: COOKIE,
        span_id: span_b.span_id,
        offset: 3,
    };
    t.entry(Op::MoveSpan(moved));

    t.title("all of it is seen by those who look after it");
    t.read(Op::VisitInodes(VisitInodes { kind: 1, ..VisitInodes::default() }));
    t.read(Op::VisitTransients(VisitTransients::default()));
    t.read(Op::VisitBlocks(VisitBlocks { service_id: 1, ..VisitBlocks::default() }));
    t.read(Op::VisitSpans(VisitSpans { service_id: 1, ..VisitSpans::default() }));
    t.read(Op::VisitSpans(VisitSpans::default()));
    t.read(Op::VisitPastContents(VisitPastContents::default()));
    t.read(Op::VisitDeadSpans(VisitDeadSpans::default()));
    t.0.text
}

fn collection() -> String {
    let mut t = Transcript::new();
    t.services();
    t.title("what a policy keeps stays, and goes later");
    let (content, span) = t.written(ROOT);
    let link = LinkFile { dir: ROOT, name: "f".into(), content, cookie: COOKIE, ..LinkFile::default() };
    let Some(Reply::Edge(file)) = t.entry(Op::LinkFile(link)) else { panic!("an edge") };
    let other = t.content(file.target);
    let publish = PublishContent {
        id: file.target,
        content: other,
        cookie: COOKIE,
        expected_content: content,
        dir: ROOT,
        ..PublishContent::default()
    };
    t.entry(Op::PublishContent(publish));
    let Some(Reply::ContentHistory(past)) =
        t.read(Op::ContentHistory(ContentHistory { id: file.target, after: 0 }))
    else {
        panic!("a history")
    };
    let ended_at = past.past[0].ended_at;
    let forget_content =
        |policy| Op::ForgetContent(ForgetContent { id: file.target, content, policy, ended_at });
    t.entry(forget_content(Some(SnapshotPolicy { age_ms: Some(1000), ..SnapshotPolicy::default() })));
    t.0.stamp = LATER;
    t.entry(forget_content(forget()));

    t.title("the content is taken apart, and its span with its blocks");
    t.entry(Op::CollectContent(CollectContent { content }));
    t.read(Op::VisitDeadSpans(VisitDeadSpans {
        slot: SpanId(span.span_id).slot().0.into(),
        after: Bytes::new(),
    }));
    let op = RemoveSpan { span_id: span.span_id, proofs: vec![] };
    t.entry(Body::RemoveSpan(RemoveSpanEntry { op: Some(op.clone()), first_bad: 1 }));
    t.entry(Body::RemoveSpan(RemoveSpanEntry { op: Some(op), first_bad: 0 }));

    t.title("past edges with their files, here and in steps");
    for (name, steps) in [("f", false), ("g", true)] {
        let edge = match name {
            "f" => file,
            _ => t.file("g", "data"),
        };
        let unlink =
            Unlink { dir: ROOT, name: name.into(), target: edge.target, created_at: edge.created_at };
        let Some(Reply::Edge(ended)) = t.entry(Op::Unlink(unlink)) else { panic!("an edge") };
        let (target, ended_at) = (edge.target, ended.created_at);
        t.0.stamp += 1 << 40;
        if steps {
            let drop = DropPastEdge { dir: ROOT, name: name.into(), target, ended_at, policy: forget() };
            t.entry(Op::DropPastEdge(drop));
            t.entry(Op::RemoveFileInode(RemoveFileInode { id: target }));
        } else {
            let forget = ForgetEdge { dir: ROOT, name: name.into(), target, ended_at, policy: forget() };
            t.entry(Op::ForgetEdge(forget));
        }
    }
    t.entry(Op::CollectContent(CollectContent { content: ContentId(other).0 }));

    t.title("a log that was cut goes on behind its lost future");
    let counters = CounterRow { inode: 100, content: 100, span: 100, block: 100 };
    let slots = vec![SlotCounters { slot: 0, counters: Some(counters) }];
    t.entry(Body::Jump(Jump { slots }));
    t.0.text
}

#[test]
fn every_operation_does_what_its_transcript_says() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata");
    let all = [
        ("files", files()),
        ("directories", directories()),
        ("contents", contents()),
        ("inline", inline()),
        ("spans", spans()),
        ("collection", collection()),
    ];
    let mut said = String::new();
    for (name, text) in all {
        compare(&dir.join(format!("{name}.txt")), &text);
        said += &text;
    }
    // The types of a request's operations, as the protocol has them.
    let proto = include_str!("../../proto/clutch/shard/v1/shard.proto");
    let body = proto.split_once("message ShardRequest {").expect("the message").1;
    let body = body.split_once("\n}").expect("its end").0;
    for operation in body.lines().filter(|l| l.contains(" = ")).filter_map(|l| l.split_whitespace().next()) {
        let is_said = [format!("> {operation}("), format!("> {operation}Entry"), format!("? {operation}(")];
        let is_said =
            is_said.iter().any(|words| said.contains(words)) || said.contains(&format!("({operation} "));
        assert!(is_said, "no transcript has {operation}");
    }
}
