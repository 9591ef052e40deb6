//! What comes from outside and is wrong: a clear error each, nothing panics, others are unharmed.

use std::time::Duration;

use bytes::Bytes;
use clutch_client::{Client, FileAttributes};
use clutch_integration::{
    SimCluster,
    denied::proven,
    sim_cluster::{SYSTEM_KEY, shard_node},
};
use clutch_proto::{
    InodeId, InodeKind, Slot,
    blocks::{BlocksRequest, CheckBlock, EraseBlock, ReadBlock, WriteBlock, blocks_request},
    cdc::{self, CdcRequest, cdc_request},
    certificate::AdminClaims,
    registry::{RegistryRequest, SwapChain, registry_request},
    session::{Request, Response, Role},
    shard::{shard_request::Op, *},
    types::{
        ClientTag, Code, DirectoryPolicy, InlinePolicy, SnapshotPolicy, SpanClass, SpanClasses, SpanShape,
        StorageClass, StorageClasses, StripePolicy,
    },
};
use clutch_runtime::{Lane, Runtime};
use prost::Message as _;
use rand::{Rng as _, SeedableRng as _};

const EDGES: [u64; 12] =
    [0, 1, 255, 256, 4095, 4096, 65_535, 1 << 31, (1 << 32) - 1, 1 << 62, (1 << 63) - 1, u64::MAX];

fn tag(sequence: u64) -> ClientTag {
    ClientTag { client: 1 << 40, sequence, acknowledged: sequence - 1, issued_at: u64::MAX }
}

async fn send(runtime: &Runtime, to: &str, bytes: Bytes) -> Response {
    let answer =
        runtime.network.call(&to.into(), Lane::Metadata, bytes.into(), 0, Duration::from_secs(5)).await;
    Response::decode(answer.expect("an answer to everything")).expect("a response")
}

fn envelope(role: Role, number: u64, tag: Option<ClientTag>, body: Vec<u8>) -> Request {
    Request { role: role as i32, number, tag, body: body.into(), ..Request::default() }
}

/// Every shard operation, with numbers from the edges.
fn shard_operations(number: u64, content: u64, cookie: &Bytes) -> Vec<Op> {
    let name = Bytes::from_static(b"n");
    let (small, id) = (number as u32, number);
    let shape =
        Some(SpanShape { data_blocks: small, parity_blocks: small, stripes: small, cell_size: small });
    let fine = Some(SpanShape { data_blocks: 2, parity_blocks: 1, stripes: 1, cell_size: 4096 });
    let span =
        InitiateSpan { content, cookie: cookie.clone(), offset: id, size: small, ..InitiateSpan::default() };
    vec![
        Op::Lookup(Lookup { dir: id, name: name.clone() }),
        Op::Stat(Stat { id }),
        Op::ReadDir(ReadDir { dir: id, cursor: id, limit: small, after: Bytes::new() }),
        Op::ReadDir(ReadDir { dir: InodeId::ROOT.raw(), cursor: id, limit: small, after: name.clone() }),
        Op::Layout(Layout { id, offset: id, content: id }),
        Op::History(History { dir: id, name: name.clone(), after: name.clone(), with_present: false }),
        Op::History(History { dir: id, name: name.clone(), after: name.clone(), with_present: true }),
        Op::History(History {
            dir: InodeId::ROOT.raw(),
            after: Bytes::from(vec![7; 40]),
            with_present: number.is_multiple_of(2),
            ..History::default()
        }),
        Op::CreateFile(CreateFile {
            dir: id,
            name: name.clone(),
            mode: small,
            mtime: id,
            ..CreateFile::default()
        }),
        Op::CreateInline(CreateInline {
            dir: if number.is_multiple_of(2) { id } else { InodeId::ROOT.raw() },
            name: name.clone(),
            data: vec![small as u8; small as usize % 100_000].into(),
            replace: true,
            ..CreateInline::default()
        }),
        Op::CreateSymlink(CreateSymlink { dir: id, name: name.clone(), ..CreateSymlink::default() }),
        Op::StartContent(StartContent { dir: id }),
        Op::InitiateSpan(InitiateSpan { shape, ..span.clone() }),
        Op::InitiateSpan(InitiateSpan { shape: fine, cell_crcs: vec![1, 2, 3], ..span.clone() }),
        Op::InitiateSpan(InitiateSpan {
            shape: fine,
            cell_crcs: vec![small; small as usize % 1000],
            ..span.clone()
        }),
        Op::InitiateSpan(InitiateSpan { shape: None, ..span }),
        Op::CertifySpan(CertifySpan {
            content,
            cookie: cookie.clone(),
            span_id: id,
            proofs: vec![name.clone()],
        }),
        Op::AddInline(AddInline { content, cookie: cookie.clone(), offset: id, data: name.clone() }),
        Op::AddHole(AddHole { content, cookie: cookie.clone(), offset: id, length: id }),
        Op::AddHole(AddHole { content: id, cookie: name.clone(), offset: 0, length: id }),
        Op::LinkFile(LinkFile {
            dir: id,
            name: name.clone(),
            content: id,
            cookie: name.clone(),
            ..LinkFile::default()
        }),
        Op::RenameInDirectory(RenameInDirectory {
            dir: id,
            target: id,
            created_at: id,
            ..RenameInDirectory::default()
        }),
        Op::Unlink(Unlink { dir: id, name: name.clone(), target: id, created_at: id }),
        Op::SetAttributes(SetAttributes {
            id,
            mode: Some(small),
            mtime: Some(id),
            ..SetAttributes::default()
        }),
        Op::Undelete(Undelete {
            dir: id,
            name: name.clone(),
            target: id,
            ended_at: id,
            new_name: name.clone(),
        }),
        Op::CreateDirectoryInode(CreateDirectoryInode {
            slot: small,
            parent: id,
            ..CreateDirectoryInode::default()
        }),
        Op::InsertEdge(InsertEdge { dir: id, name: name.clone(), target: id, replace: true }),
        Op::LockEdge(LockEdge { dir: id, name: name.clone(), target: id, created_at: id }),
        Op::UnlockEdge(UnlockEdge { dir: id, name: name.clone(), target: id, created_at: id }),
        Op::RemoveLockedEdge(RemoveLockedEdge { dir: id, name, target: id, created_at: id }),
        Op::SetParent(SetParent { dir: id, parent: id }),
        Op::OrphanDirectory(OrphanDirectory { dir: id, parent: id }),
        Op::RemoveDirectoryInode(RemoveDirectoryInode { dir: id }),
    ]
}

/// The same for what looks after stored data.
fn upkeep_operations(number: u64, content: u64, cookie: &Bytes) -> Vec<Op> {
    let (small, id, cookie) = (number as u32, number, cookie.clone());
    let name = Bytes::from_static(b"n");
    let odd = Bytes::from(number.to_le_bytes()[..(number % 9) as usize].to_vec());
    let policy = Some(SnapshotPolicy { age_ms: Some(number), versions: Some(small) });
    let whole = DirectoryPolicy {
        snapshot: policy,
        spans: Some(SpanClasses {
            classes: vec![SpanClass { size_max: small, data_blocks: small, parity_blocks: small }; 2],
        }),
        storage: Some(StorageClasses { classes: vec![StorageClass::default(); small as usize % 100] }),
        stripe: Some(StripePolicy { cell_size: small }),
        inline: Some(InlinePolicy { size_max: small }),
    };
    let visits =
        [Bytes::new(), odd.clone(), Bytes::from(vec![small as u8; 40])].into_iter().flat_map(|after| {
            let slot = small;
            [
                Op::VisitInodes(VisitInodes { slot, after: after.clone(), kind: small, limit: small }),
                Op::VisitInodes(VisitInodes { slot, after: after.clone(), kind: 3, limit: small }),
                Op::VisitTransients(VisitTransients { slot, after: after.clone() }),
                Op::VisitPastContents(VisitPastContents { slot, after: after.clone() }),
                Op::VisitDeadSpans(VisitDeadSpans { slot, after: after.clone() }),
                Op::VisitBlocks(VisitBlocks { slot, after: after.clone(), service_id: id }),
                Op::VisitSpans(VisitSpans { slot, after: after.clone(), service_id: id }),
                Op::VisitSpans(VisitSpans { slot, after, service_id: 0 }),
            ]
        });
    let dir = InodeId::ROOT.raw();
    let mut all = vec![
        Op::ContentHistory(ContentHistory { id, after: id }),
        Op::SetPolicy(SetPolicy { id: dir, policy: Some(whole), inherit: vec![small as i32] }),
        Op::SetPolicy(SetPolicy { id, policy: None, inherit: vec![small as i32; 3] }),
        Op::StartContent(StartContent { dir: id }),
        Op::ShareRange(ShareRange {
            content,
            cookie: cookie.clone(),
            offset: 0,
            from_content: id,
            from_offset: id,
            length: id,
        }),
        Op::ShareRange(ShareRange { content, offset: id, from_content: content, ..ShareRange::default() }),
        Op::PublishContent(PublishContent {
            id,
            content,
            cookie: cookie.clone(),
            expected_content: id,
            ..PublishContent::default()
        }),
        Op::RestoreContent(RestoreContent { id, content, ended_at: id, ..RestoreContent::default() }),
        Op::ScrapContent(ScrapContent { content: id, cookie: odd.clone() }),
        Op::SwapBlocks(SwapBlocks { span_a: id, block_a: id, span_b: id ^ 256, block_b: id }),
        Op::SwapSpans(SwapSpans {
            content_a: id,
            offset_a: id,
            span_a: id,
            content_b: content,
            offset_b: id,
            span_b: id,
        }),
        Op::MoveSpan(MoveSpan {
            from_content: content,
            from_cookie: cookie.clone(),
            content,
            cookie,
            span_id: id,
            offset: id,
        }),
        Op::ForgetEdge(ForgetEdge { dir, name: name.clone(), target: id, ended_at: id, policy }),
        Op::ForgetEdge(ForgetEdge { dir: id, name: odd.clone(), target: id, ended_at: id, policy: None }),
        Op::ForgetContent(ForgetContent { id, content, policy, ended_at: id }),
        Op::CollectContent(CollectContent { content: id }),
        Op::RemoveSpan(RemoveSpan { span_id: id, proofs: vec![odd; small as usize % 40] }),
        Op::DropPastEdge(DropPastEdge { dir, name, target: id, ended_at: id, policy }),
        Op::RemoveFileInode(RemoveFileInode { id }),
        Op::AdoptDirectory(AdoptDirectory { dir: id, parent: id }),
        Op::ForgetDirectoryInode(ForgetDirectoryInode { dir: id, policy }),
    ];
    all.extend(visits);
    all
}

async fn still_serves(client: &Client, name: &str) {
    let name = Bytes::copy_from_slice(name.as_bytes());
    let data = vec![3u8; 10_000];
    let attributes = FileAttributes { mode: 0o600, ..FileAttributes::default() };
    let id =
        client.write_file(InodeId::ROOT, &name, attributes, false, &mut &data[..]).await.expect("writes").id;
    assert_eq!(client.read_range(id, 0, 20_000).await.expect("reads"), data);
}

#[test]
fn numbers_at_every_edge_get_an_answer() {
    let cluster = SimCluster::start(3, 2, 4);
    let client = cluster.client();
    cluster.run(async move {
        let runtime = client.runtime().clone();
        let started = client.shard(Op::StartContent(StartContent { dir: InodeId::ROOT.raw() })).await;
        let Ok(shard_reply::Reply::Content(content)) = started else { panic!("{started:?}") };
        let mut sequence = 0;
        let mut refused = 0;
        for number in EDGES {
            let upkeep = upkeep_operations(number, content.content, &content.cookie);
            for op in shard_operations(number, content.content, &content.cookie).into_iter().chain(upkeep) {
                for shard in [0, 1, 7] {
                    sequence += 1;
                    let body = ShardRequest { op: Some(op.clone()) }.encode_to_vec();
                    let request = envelope(Role::Shard, shard, Some(tag(sequence)), body);
                    let to = format!("node{}", shard_node(shard.min(1) as u32).0);
                    let response = send(&runtime, &to, request.encode_to_vec().into()).await;
                    if let Some(error) = response.error {
                        refused += 1;
                        let code = Code::try_from(error.code).expect("a known code");
                        assert!(!error.detail.is_empty(), "{op:?}: {code:?} without words");
                        assert!(
                            !matches!(code, Code::ReplicaFault | Code::OutcomeUnknown),
                            "{op:?}: {error:?}"
                        );
                    }
                }
            }
        }
        assert!(refused > 900, "only {refused} were refused");
        still_serves(&client, "after the edges").await;
    });
    cluster.fsck();
}

#[test]
fn wrong_slots_tags_and_times_are_refused() {
    let cluster = SimCluster::start(4, 2, 4);
    let client = cluster.client();
    cluster.run(async move {
        let runtime = client.runtime().clone();
        let code = async |to: &str, request: Request| {
            let response = send(&runtime, to, request.encode_to_vec().into()).await;
            response.error.map(|e| Code::try_from(e.code).expect("a known code"))
        };
        let stat = |id: InodeId| ShardRequest { op: Some(Op::Stat(Stat { id: id.raw() })) }.encode_to_vec();
        let elsewhere = InodeId::new(InodeKind::Directory, 9, Slot(200)).expect("an id");
        let node = format!("node{}", shard_node(0).0);
        assert_eq!(
            code(&node, envelope(Role::Shard, 0, None, stat(elsewhere))).await,
            Some(Code::WrongShard)
        );
        assert_eq!(
            code(&node, envelope(Role::Shard, 5, None, stat(InodeId::ROOT))).await,
            Some(Code::WrongShard)
        );
        assert_eq!(code(&node, envelope(Role::Unspecified, 0, None, vec![])).await, Some(Code::Malformed));
        let other = Request { cluster: 99, ..envelope(Role::Shard, 0, None, stat(InodeId::ROOT)) };
        assert_eq!(code(&node, other).await, Some(Code::WrongCluster));
        let future = Request { time: u64::MAX, ..envelope(Role::Shard, 0, None, stat(InodeId::ROOT)) };
        assert_eq!(code(&node, future).await, Some(Code::ClockAhead));
        let touch =
            CreateFile { dir: InodeId::ROOT.raw(), name: Bytes::from_static(b"t"), ..CreateFile::default() };
        let touch = ShardRequest { op: Some(Op::CreateFile(touch)) }.encode_to_vec();
        for bad in [
            ClientTag { sequence: 0, ..tag(5) },
            ClientTag { client: 0, ..tag(5) },
            ClientTag { acknowledged: u64::MAX, ..tag(5) },
        ] {
            let refused = code(&node, envelope(Role::Shard, 0, Some(bad), touch.clone())).await;
            assert!(matches!(refused, Some(Code::Malformed | Code::Permission)), "{bad:?}: {refused:?}");
        }
        let system = ClientTag { client: 1, ..tag(5) };
        assert_eq!(
            code(&node, envelope(Role::Shard, 0, Some(system), touch.clone())).await,
            Some(Code::Permission)
        );
        let old = ClientTag { issued_at: 1, ..tag(5) };
        assert_eq!(code(&node, envelope(Role::Shard, 0, Some(old), touch)).await, Some(Code::ExpiredUnknown));
        let swap = RegistryRequest { op: Some(registry_request::Op::SwapChain(SwapChain::default())) }
            .encode_to_vec();
        let swap = envelope(Role::Registry, 0, None, swap);
        assert_eq!(code("node1", swap.clone()).await, Some(Code::Permission));
        let time = runtime.clock.now();
        let claims = AdminClaims { cluster: swap.cluster, role: swap.role, number: 0, time };
        let swap = proven(&Request { time: time.0, ..swap }, &SYSTEM_KEY, claims);
        assert_eq!(code("node1", swap).await, Some(Code::Malformed));
        let mkdir =
            cdc::MakeDirectory { parent: 7, name: Bytes::from_static(b"x"), ..cdc::MakeDirectory::default() };
        let mkdir = CdcRequest { op: Some(cdc_request::Op::MakeDirectory(mkdir)) }.encode_to_vec();
        assert_eq!(
            code("node2", envelope(Role::Cdc, 0, Some(tag(6)), mkdir)).await,
            Some(Code::InvalidArgument)
        );
        for (n, number) in EDGES.iter().copied().enumerate() {
            let name = Bytes::from_static(b"n");
            let ops = [
                cdc_request::Op::ForgetFile(cdc::ForgetFile {
                    dir: InodeId::ROOT.raw(),
                    name: name.clone(),
                    target: number,
                    ended_at: number,
                    policy: None,
                }),
                cdc_request::Op::ForgetDirectory(cdc::ForgetDirectory { target: number, policy: None }),
                cdc_request::Op::UndeleteDirectory(cdc::UndeleteDirectory {
                    target: number,
                    parent: InodeId::ROOT.raw(),
                    name,
                }),
            ];
            for (m, op) in ops.into_iter().enumerate() {
                let body = CdcRequest { op: Some(op) }.encode_to_vec();
                let sequence = 100 + (n * 3 + m) as u64;
                let refused = code("node2", envelope(Role::Cdc, 0, Some(tag(sequence)), body)).await;
                assert!(refused.is_some(), "number {number:x} in transaction {m}");
            }
        }
        for op in [
            blocks_request::Op::Write(WriteBlock {
                certificate: Bytes::new(),
                data: Bytes::from_static(b"x"),
            }),
            blocks_request::Op::Read(ReadBlock {
                certificate: Bytes::from(vec![1; 74]),
                offset: 1,
                length: u32::MAX,
            }),
            blocks_request::Op::Erase(EraseBlock { certificate: Bytes::from(vec![0; 73]) }),
            blocks_request::Op::Check(CheckBlock { certificate: Bytes::from(vec![9; 75]) }),
        ] {
            let services = client.refresh_map().await.expect("a map").services.clone();
            let body = BlocksRequest { op: Some(op) }.encode_to_vec();
            let refused =
                code(&services[0].address, envelope(Role::Blocks, services[0].service_id, None, body)).await;
            assert_eq!(refused, Some(Code::BadCertificate));
        }
        still_serves(&client, "after the refusals").await;
    });
    cluster.fsck();
}

#[test]
fn flipped_cut_and_random_messages_get_an_answer() {
    let cluster = SimCluster::start(5, 2, 4);
    let client = cluster.client();
    cluster.run(async move {
        let runtime = client.runtime().clone();
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(5);
        let mut sequence = 0;
        let nodes = ["node1", "node2", "node300", "node10", "node11"];
        for round in 0..6000 {
            sequence += 1;
            let mut ops = shard_operations(EDGES[round % EDGES.len()], 1, &Bytes::new());
            ops.extend(upkeep_operations(EDGES[round % EDGES.len()], 1, &Bytes::new()));
            let body = ShardRequest { op: Some(ops[round % ops.len()].clone()) }.encode_to_vec();
            let role = [Role::Registry, Role::Cdc, Role::Shard, Role::Blocks][round % 4];
            let mut request = envelope(role, round as u64 % 2, Some(tag(sequence)), body);
            request.admin = round % 7 == 0;
            let mut bytes = request.encode_to_vec();
            match round % 3 {
                0 => {
                    for _ in 0..rng.random_range(1..4) {
                        let at = rng.random_range(0..bytes.len());
                        bytes[at] ^= 1 << rng.random_range(0..8);
                    }
                }
                1 => bytes.truncate(rng.random_range(0..bytes.len())),
                _ => bytes = (0..rng.random_range(0..200)).map(|_| rng.random()).collect(),
            }
            let response = send(&runtime, nodes[round % nodes.len()], bytes.into()).await;
            if let Some(error) = response.error {
                let code = Code::try_from(error.code).expect("a known code");
                assert!(code != Code::ReplicaFault, "{error:?}");
            }
        }
        still_serves(&client, "after the noise").await;
    });
    cluster.fsck();
}
