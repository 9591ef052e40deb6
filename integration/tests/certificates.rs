//! Grants and proofs as an attacker would use them: forged, flipped, replayed, expired, of another block, service,
//! cluster or operation. Each is refused with its own code, nothing on a disk changes, others are unharmed.

use std::time::Duration;

use bytes::Bytes;
use clutch_client::{Client, FileAttributes};
use clutch_integration::{SimCluster, sim_cluster::service_key};
use clutch_proto::{
    BlockId, ContentId, InodeId, ServiceId,
    blocks::{
        BlocksReply, BlocksRequest, CheckBlock, EraseBlock, ReadBlock, WriteBlock,
        blocks_request::Op as BlockOp,
    },
    certificate::{Claims, Key, Operation},
    session::{Request, Response, Role},
    shard::{
        CertifySpan, ContentReply, InitiateSpan, RemoveSpan, ScrapContent, StartContent, shard_reply::Reply,
        shard_request::Op,
    },
    types::{Block, Code, Span, SpanShape},
};
use clutch_runtime::Lane;
use prost::Message as _;

const CELL: usize = 4096;
const HOUR_MS: u64 = 60 * 60 * 1000;

fn bytes_of(seed: u8) -> Bytes {
    (0..CELL).map(|i| (i as u8).wrapping_mul(31) ^ seed).collect::<Vec<u8>>().into()
}

/// Sends what a client would not send.
async fn ask(client: &Client, address: &str, service: u64, op: BlockOp) -> Result<BlocksReply, Code> {
    let body = BlocksRequest { op: Some(op) }.encode_to_vec();
    let request =
        Request { role: Role::Blocks as i32, number: service, body: body.into(), ..Request::default() };
    let runtime = client.runtime();
    let sent = Bytes::from(request.encode_to_vec());
    let answer =
        runtime.network.call(&address.into(), Lane::Bulk, sent.into(), 0, Duration::from_secs(5)).await;
    let response = Response::decode(answer.expect("an answer to everything")).expect("a response");
    match response.error {
        Some(error) => {
            assert!(!error.detail.is_empty(), "an error without words: {error:?}");
            Err(Code::try_from(error.code).expect("a known code"))
        }
        None => Ok(BlocksReply::decode(response.body).expect("a reply")),
    }
}

fn op_for(operation: Operation, certificate: Bytes, data: &Bytes) -> BlockOp {
    match operation {
        Operation::Write => BlockOp::Write(WriteBlock { certificate, data: data.clone() }),
        Operation::Read => BlockOp::Read(ReadBlock { certificate, offset: 0, length: CELL as u32 }),
        Operation::Erase => BlockOp::Erase(EraseBlock { certificate }),
        _ => BlockOp::Check(CheckBlock { certificate }),
    }
}

/// Each byte by itself: one bit of it, and all of them.
fn flips(certificate: &Bytes) -> impl Iterator<Item = Bytes> + '_ {
    (0..certificate.len()).flat_map(move |at| {
        [1u8 << (at % 8), 0xff].map(|mask| {
            let mut flipped = certificate.to_vec();
            flipped[at] ^= mask;
            Bytes::from(flipped)
        })
    })
}

/// A mirrored span of one page that is initiated, but not written.
async fn initiated(client: &Client, content: &ContentReply, data: &Bytes) -> Span {
    let crc = crc32fast::hash(data);
    let op = InitiateSpan {
        content: content.content,
        cookie: content.cookie.clone(),
        offset: 0,
        size: CELL as u32,
        crc,
        shape: Some(SpanShape { data_blocks: 1, parity_blocks: 1, stripes: 1, cell_size: CELL as u32 }),
        cell_crcs: vec![crc; 2],
        ..InitiateSpan::default()
    };
    match client.shard(Op::InitiateSpan(op)).await {
        Ok(Reply::Span(span)) => span,
        other => panic!("{other:?}"),
    }
}

async fn started(client: &Client) -> ContentReply {
    match client.shard(Op::StartContent(StartContent { dir: InodeId::ROOT.raw() })).await {
        Ok(Reply::Content(content)) => content,
        other => panic!("{other:?}"),
    }
}

async fn write(client: &Client, block: &Block, data: &Bytes) -> Result<Bytes, Code> {
    let op = op_for(Operation::Write, block.certificate.clone(), data);
    ask(client, &block.address, block.service_id, op).await.map(|reply| reply.proof)
}

/// A file of somebody else, and what it must hold to the end.
async fn other_client(client: &Client) -> (InodeId, Vec<u8>) {
    let data: Vec<u8> = (0..50_000u32).map(|i| (i % 253) as u8).collect();
    let attributes = FileAttributes { mode: 0o600, ..FileAttributes::default() };
    let name = Bytes::from_static(b"others");
    let file = client.write_file(InodeId::ROOT, &name, attributes, false, &mut &data[..]).await;
    (file.expect("writes").id, data)
}

#[test]
fn a_service_does_only_what_was_granted_to_it_and_now() {
    let cluster = SimCluster::start(11, 1, 4);
    let (client, other) = (cluster.client(), cluster.client());
    let cluster_id = cluster.cluster_id();
    cluster.run(async move {
        let (file, kept) = other_client(&other).await;
        let data = bytes_of(1);
        let content = started(&client).await;
        let span = initiated(&client, &content, &data).await;
        for block in &span.blocks {
            write(&client, block, &data).await.expect("writes");
        }
        let [mine, elsewhere] = &span.blocks[..] else { panic!("two blocks: {span:?}") };
        let now = client.runtime().clock.now();
        let key = service_key(mine.service_id);
        let claims = |operation: Operation| Claims {
            operation,
            cluster: cluster_id,
            service: ServiceId(mine.service_id),
            block: BlockId(mine.block_id),
            size: CELL as u32,
            crc: mine.crc,
            time: now,
            // An erase may be done from its expiry and twice the skew on, which is not yet.
            expiry: now.plus_ms(100_000),
        };
        let all = [Operation::Write, Operation::Read, Operation::Check, Operation::Erase];
        let mut refused = 0;
        for asked in all {
            let mut wrong: Vec<(Bytes, Code)> = Vec::new();
            for granted in all.into_iter().chain([Operation::Written, Operation::Erased]) {
                // Who may read may also let the service check.
                if granted != asked && (granted, asked) != (Operation::Read, Operation::Check) {
                    wrong.push((claims(granted).sign(&key), Code::BadCertificate));
                }
            }
            let good = claims(asked);
            let stranger = Claims { service: ServiceId(elsewhere.service_id), ..good };
            wrong.extend([
                (good.sign(&Key { secret: [0x55; 32], ..key }), Code::BadCertificate),
                (good.sign(&Key { epoch: 2, ..key }), Code::BadCertificate),
                (Claims { cluster: cluster_id ^ 1, ..good }.sign(&key), Code::WrongCluster),
                (stranger.sign(&key), Code::WrongService),
                // What the other service would take: signed with its own key.
                (stranger.sign(&service_key(elsewhere.service_id)), Code::BadCertificate),
                (
                    Claims { time: now.plus_ms(HOUR_MS), expiry: now.plus_ms(HOUR_MS + 1), ..good }
                        .sign(&key),
                    Code::ClockAhead,
                ),
                (good.proof(Operation::Written, now).sign(&key), Code::BadCertificate),
                (good.proof(Operation::Erased, now).sign(&key), Code::BadCertificate),
                (Bytes::new(), Code::BadCertificate),
            ]);
            if asked == Operation::Erase {
                wrong.push((good.sign(&key), Code::TooEarly));
            } else {
                let expired = Claims { expiry: clutch_proto::Time(now.0 - 1), ..good };
                wrong.push((expired.sign(&key), Code::CertificateExpired));
                let too_long = Claims { expiry: now.plus_ms(HOUR_MS + 1), ..good };
                wrong.push((too_long.sign(&key), Code::BadCertificate));
            }
            if asked == Operation::Write {
                wrong.push((Claims { crc: mine.crc ^ 1, ..good }.sign(&key), Code::CrcMismatch));
                wrong.push((Claims { size: 2 * CELL as u32, ..good }.sign(&key), Code::InvalidArgument));
            }
            // Flipped ones are forged, whatever else is wrong with them; also the good one's.
            let flipped: Vec<(Bytes, Code)> = wrong
                .iter()
                .map(|(certificate, _)| certificate)
                .chain([&good.sign(&key)])
                .flat_map(|certificate| flips(certificate).map(|f| (f, Code::BadCertificate)))
                .filter(|(certificate, _)| Claims::verify(certificate, std::slice::from_ref(&key)).is_err())
                .collect();
            assert!(flipped.len() > 10 * 2 * 74, "{} flipped ones", flipped.len());
            for (certificate, code) in wrong.into_iter().chain(flipped) {
                let op = op_for(asked, certificate.clone(), &data);
                let answer = ask(&client, &mine.address, mine.service_id, op).await;
                assert_eq!(answer.expect_err("refused"), code, "{asked:?} with {certificate:02x?}");
                refused += 1;
            }
        }
        assert!(refused > 8000, "{refused} refusals");
        // The block is as it was, and so is what others wrote.
        let read = op_for(Operation::Read, claims(Operation::Read).sign(&key), &data);
        assert_eq!(ask(&client, &mine.address, mine.service_id, read).await.expect("reads").data, data);
        assert_eq!(other.read_range(file, 0, 100_000).await.expect("reads"), kept);
    });
    cluster.fsck();
}

#[test]
fn a_grant_that_is_used_again_gives_nothing_new() {
    let cluster = SimCluster::start(12, 1, 4);
    let client = cluster.client();
    cluster.run(async move {
        let (data, lie) = (bytes_of(1), bytes_of(2));
        let content = started(&client).await;
        let span = initiated(&client, &content, &data).await;
        let block = &span.blocks[0];
        write(&client, block, &data).await.expect("writes");
        write(&client, block, &data).await.expect("the same bytes again are fine");
        assert_eq!(write(&client, block, &lie).await, Err(Code::CrcMismatch), "other bytes are not");
        // At another service that has the address of this one, and at the neighbour with its own number.
        let neighbour = &span.blocks[1];
        let op = op_for(Operation::Write, block.certificate.clone(), &data);
        let answer = ask(&client, &neighbour.address, neighbour.service_id, op).await;
        assert_eq!(answer.expect_err("refused"), Code::BadCertificate);
        let op = op_for(Operation::Write, block.certificate.clone(), &data);
        let answer = ask(&client, &neighbour.address, block.service_id, op).await;
        assert_eq!(answer.expect_err("refused"), Code::WrongService);

        // Given up, erased, and removed: the old grant must not bring the block back.
        let scrap = ScrapContent { content: content.content, cookie: content.cookie.clone() };
        client.shard(Op::ScrapContent(scrap)).await.expect("scraps");
        let clock = client.runtime().clock.clone();
        client.collect_content(ContentId(content.content)).await.expect("collects");
        let (dead, _) = client.visit_dead_spans(Bytes::new()).await.expect("visits");
        let dead = dead.into_iter().find(|s| s.span_id == span.span_id).expect("dead");
        let mut proofs = Vec::new();
        for block in &dead.blocks {
            proofs.push(loop {
                let op = op_for(Operation::Erase, block.certificate.clone(), &data);
                match ask(&client, &block.address, block.service_id, op).await {
                    Ok(reply) => break reply.proof,
                    Err(code) => assert_eq!(code, Code::TooEarly),
                }
                clock.sleep(Duration::from_millis(50)).await;
            });
        }
        assert_eq!(write(&client, block, &data).await, Err(Code::CertificateExpired), "a replayed write");
        let op = op_for(Operation::Erase, dead.blocks[0].certificate.clone(), &data);
        ask(&client, &dead.blocks[0].address, dead.blocks[0].service_id, op).await.expect("again is fine");

        // Proofs of erasure: each for its block only, none but these.
        let remove = async |proofs: Vec<Bytes>| {
            let op = RemoveSpan { span_id: span.span_id, proofs };
            let answer = client.shard(Op::RemoveSpan(op)).await;
            answer.map(drop).map_err(|e| e.code().expect("a refusal"))
        };
        let mut wrong: Vec<Vec<Bytes>> = vec![
            vec![proofs[1].clone(), proofs[0].clone()],
            vec![proofs[0].clone(), proofs[0].clone()],
            vec![proofs[0].clone(), Bytes::new()],
            vec![proofs[0].clone(), dead.blocks[1].certificate.clone()],
        ];
        wrong.extend(flips(&proofs[1]).map(|flipped| vec![proofs[0].clone(), flipped]));
        for proofs in wrong {
            assert_eq!(remove(proofs).await, Err(Code::BadProof));
        }
        for proofs in [vec![], vec![proofs[0].clone()], vec![proofs[0].clone(); 3]] {
            assert_eq!(remove(proofs).await, Err(Code::InvalidArgument));
        }
        remove(proofs).await.expect("removes");
    });
    cluster.fsck();
}

#[test]
fn a_span_is_certified_by_its_own_blocks_proofs_only() {
    let cluster = SimCluster::start(13, 1, 4);
    let (client, other) = (cluster.client(), cluster.client());
    let cluster_id = cluster.cluster_id();
    cluster.run(async move {
        let (file, kept) = other_client(&other).await;
        let data = bytes_of(1);
        let (content, twin) = (started(&client).await, started(&client).await);
        // Two spans of the same bytes: proofs of one are no proofs of the other.
        let (span, twin_span) =
            (initiated(&client, &content, &data).await, initiated(&client, &twin, &data).await);
        let (mut proofs, mut twin_proofs) = (Vec::new(), Vec::new());
        for (span, proofs) in [(&span, &mut proofs), (&twin_span, &mut twin_proofs)] {
            for block in &span.blocks {
                proofs.push(write(&client, block, &data).await.expect("writes"));
            }
        }
        let certify = async |proofs: Vec<Bytes>| {
            let op = CertifySpan {
                content: content.content,
                cookie: content.cookie.clone(),
                span_id: span.span_id,
                proofs,
            };
            let answer = client.shard(Op::CertifySpan(op)).await;
            answer.map(drop).map_err(|e| e.code().expect("a refusal"))
        };
        let block = &span.blocks[1];
        let key = service_key(block.service_id);
        let proven = Claims::verify(&proofs[1], std::slice::from_ref(&key)).expect("a proof");
        let forged = |claims: Claims| vec![proofs[0].clone(), claims.sign(&key)];
        let mut wrong = vec![
            vec![proofs[1].clone(), proofs[0].clone()],
            vec![proofs[0].clone(), proofs[0].clone()],
            twin_proofs.clone(),
            vec![proofs[0].clone(), block.certificate.clone()],
            vec![proofs[0].clone(), Bytes::new()],
            forged(Claims { operation: Operation::Erased, ..proven }),
            forged(Claims { operation: Operation::Write, ..proven }),
            forged(Claims { cluster: cluster_id ^ 1, ..proven }),
            forged(Claims { service: ServiceId(span.blocks[0].service_id), ..proven }),
            forged(Claims { block: BlockId(twin_span.blocks[1].block_id), ..proven }),
            forged(Claims { crc: proven.crc ^ 1, ..proven }),
            forged(Claims { size: proven.size + 4096, ..proven }),
            vec![proofs[0].clone(), proven.sign(&Key { secret: [0x55; 32], ..key })],
            vec![proofs[0].clone(), proven.sign(&Key { epoch: 2, ..key })],
        ];
        wrong.extend(flips(&proofs[1]).map(|flipped| vec![proofs[0].clone(), flipped]));
        wrong.extend((0..proofs[1].len()).map(|len| vec![proofs[0].clone(), proofs[1].slice(..len)]));
        for proofs in wrong {
            assert_eq!(certify(proofs.clone()).await, Err(Code::BadProof), "{proofs:02x?}");
        }
        for proofs in [vec![], vec![proofs[0].clone()], vec![proofs[0].clone(); 3]] {
            assert_eq!(certify(proofs).await, Err(Code::InvalidArgument));
        }
        certify(proofs.clone()).await.expect("certifies");
        // Once more, as a lost answer would have it: the span is not pending any more.
        assert_eq!(certify(proofs).await, Err(Code::Stale));
        assert_eq!(other.read_range(file, 0, 100_000).await.expect("reads"), kept);
    });
    cluster.fsck();
}
