//! Writes the first inputs of every target: from the golden files of the formats and from a small run.
//!
//! `seeds GOLDEN_DIR CORPUS_DIR`

use std::{fs, path::Path};

use clutch_integration::{
    generate::{Profile, generate},
    run::collect_logs,
};
use clutch_log::LogId;
use clutch_proto::{
    BlockId, InodeId, ServiceId, Time,
    blocks::{BlocksRequest, ReadBlock, blocks_request},
    certificate::{Claims, Key, Operation},
    parts::{Frame, Frames},
    registry::{GetMap, RegistryRequest, registry_request},
    session::{Request, Response, Role},
    shard::{CreateFile, ReadDir, ShardRequest, shard_request},
    state::{Entry, entry::Kind},
    types::ClientTag,
};
use prost::Message;

fn golden(dir: &Path, name: &str) -> Vec<u8> {
    let text = fs::read_to_string(dir.join(format!("{name}.hex"))).expect("a golden file");
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    let digit = |d: u8| (d as char).to_digit(16).expect("filtered") as u8;
    digits.chunks_exact(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect()
}

fn listed(choice: Option<u8>, items: &[Vec<u8>]) -> Vec<u8> {
    let mut out: Vec<u8> = choice.into_iter().collect();
    for item in items {
        out.extend_from_slice(&(item.len() as u16).to_le_bytes());
        out.extend_from_slice(item);
    }
    out
}

fn main() {
    let mut args = std::env::args().skip(1);
    let golden_dir = args.next().expect("usage: seeds GOLDEN_DIR CORPUS_DIR");
    let corpus = args.next().expect("usage: seeds GOLDEN_DIR CORPUS_DIR");
    let (golden_dir, corpus) = (Path::new(&golden_dir), Path::new(&corpus));
    let put = |target: &str, name: &str, bytes: &[u8]| {
        let dir = corpus.join(target);
        fs::create_dir_all(&dir).expect("make the corpus");
        fs::write(dir.join(name), bytes).expect("write a seed");
    };

    put("block_file", "golden", &golden(golden_dir, "block-header"));
    let (segment, mark) = (golden(golden_dir, "segment"), golden(golden_dir, "mark"));
    put("log_segment", "golden", &[&[mark.len() as u8, 0, 0], &mark[..], &segment[..]].concat());
    put("log_segment", "no-mark", &[&[0, 0, 0], &segment[..]].concat());

    let packed = golden(golden_dir, "packed-batch");
    put("packed_record", "golden", &[&[packed[40]], &packed[44..48], &packed[48..]].concat());
    put("packed_record", "plain", &[1, 2, 0, 0, 0, 1, 0, 0, 0, 7, 0, 0, 0, 0]);

    let key = Key { epoch: 1, secret: [7; 32] };
    let claims = Claims {
        operation: Operation::Read,
        cluster: 1,
        service: ServiceId(2),
        block: BlockId(3),
        size: 4096,
        crc: 5,
        time: Time(6),
        expiry: Time(7),
    };
    let certificate = claims.sign(&key);
    put("certificates", "signed", &certificate);

    let script = generate(3, Profile::Calm);
    put("script", "generated", script.to_string().chars().take(4000).collect::<String>().as_bytes());
    put("script", "faults", generate(5, Profile::Mixed).to_string().as_bytes());
    for (id, batches) in collect_logs(&script) {
        let choice = match id {
            LogId::CDC => 2,
            LogId::REGISTRY => 3,
            _ => 0,
        };
        let bodies: Vec<Vec<u8>> = batches
            .values()
            .flat_map(|b| &b.entries)
            .filter_map(|e| match Entry::decode(e.clone()).ok()?.kind? {
                Kind::Body(body) => Some(body.to_vec()),
                _ => None,
            })
            .collect();
        for (n, some) in bodies.chunks(12).take(8).enumerate() {
            put("entries", &format!("{choice}-{n}"), &listed(Some(choice), some));
        }
        let raw: Vec<Vec<u8>> = batches.values().flat_map(|b| &b.entries).map(|e| e.to_vec()).take(20).collect();
        put("entries", &format!("{choice}-raw"), &listed(Some(choice | 4), &raw));
    }

    let tag = ClientTag { client: 1 << 33, sequence: 1, acknowledged: 0, issued_at: u64::MAX / 4 };
    let create = CreateFile { dir: InodeId::ROOT.raw(), name: "a".into(), data: "data".into(), ..CreateFile::default() };
    let list = ReadDir { dir: InodeId::ROOT.raw(), ..ReadDir::default() };
    let read = ReadBlock { certificate, offset: 0, length: 10 };
    for (n, choice, role, tag, body) in [
        (0, 0, Role::Registry, None, RegistryRequest {
            op: Some(registry_request::Op::GetMap(GetMap { services_version: 0 })),
        }.encode_to_vec()),
        (1, 2, Role::Shard, Some(tag), ShardRequest { op: Some(shard_request::Op::CreateFile(create)) }.encode_to_vec()),
        (2, 2, Role::Shard, None, ShardRequest { op: Some(shard_request::Op::ReadDir(list)) }.encode_to_vec()),
        (3, 3, Role::Blocks, None, BlocksRequest { op: Some(blocks_request::Op::Read(read)) }.encode_to_vec()),
        (4, 1, Role::Cdc, Some(tag), vec![10, 2, 8, 1]),
    ] {
        let request = Request { role: role as i32, tag, body: body.into(), ..Request::default() };
        put("requests", &format!("{n}"), &[&[choice], &request.encode_to_vec()[..]].concat());
    }
    let frames = (0..3).map(|id| Frame { id, message: vec![7; 20].into() }).collect();
    put("frames", "three", &Frames::new(frames).encode_to_vec());
    let answer = Response { body: vec![10, 4, 8, 1, 16, 1].into(), time: 5, position: 1, ..Response::default() };
    put("answers", "0", &listed(None, &[answer.encode_to_vec(), Response::default().encode_to_vec()]));
    let row = |key: &[u8], value: &[u8]| {
        [&[key.len() as u8][..], &(value.len() as u16).to_le_bytes(), key, value].concat()
    };
    let inode_key = [&[64, 0][..], &InodeId::ROOT.raw().to_be_bytes()].concat();
    put("rows", "0", &[row(&[16], &[16, 0, 24, 255, 1]), row(&inode_key, &[72, 1, 80, 5])].concat());
}
