//! The service on a simulated disk: certificates, flips, losses.

use std::path::PathBuf;

use clutch_proto::{BlockId, ServiceId, blocks::*, limits::PAGE_BYTES};
use clutch_runtime::simulated::{DiskFaults, NodeId, World};

use super::*;
use crate::packed::PackOptions;

const NODE: NodeId = NodeId(0);
const SERVICE: ServiceId = ServiceId(5);

fn key() -> Key {
    Key { epoch: 1, secret: [9; 32] }
}

fn data() -> Vec<u8> {
    (0..3 * PAGE_BYTES).map(|i| (i * 31 % 251) as u8).collect()
}

fn claims(operation: Operation, now: Time) -> Claims {
    let data = data();
    Claims {
        operation,
        cluster: 1,
        service: SERVICE,
        block: BlockId(0x1234),
        size: data.len() as u32,
        crc: crc32fast::hash(&data),
        time: now,
        expiry: now.plus_ms(1000),
    }
}

/// Each block in a file of its own.
const FILES: PackOptions = PackOptions { below: 0, segment_bytes: 1 << 20, merge_at: 1 };

/// The service's disk, labelled when it is new.
fn open(runtime: &Runtime, options: PackOptions) -> BlockStore {
    let (disk, dir) = (runtime.disk.clone(), PathBuf::from("d"));
    if !runtime.disk.exists(&crate::label::path(&dir)) {
        BlockStore::create(disk.clone(), dir.clone(), 1, SERVICE, Time(1)).expect("labelled");
    }
    BlockStore::open(disk, dir, 1, SERVICE, options).expect("opens")
}

fn clock(runtime: &Runtime) -> Arc<HybridClock> {
    Arc::new(HybridClock::new(runtime.clock.clone()))
}

fn call(world: &World, op: Op) -> Result<BlocksReply, Refusal> {
    call_as(world, op, PackOptions::default())
}

fn call_as(world: &World, op: Op, options: PackOptions) -> Result<BlocksReply, Refusal> {
    let runtime = world.node(NODE);
    world
        .run(NODE, std::time::Duration::from_secs(5), async move {
            let store = open(&runtime, options);
            let service = BlockService::new(runtime.clone(), clock(&runtime), store, 1, vec![key()]);
            let body = BlocksRequest { op: Some(op) }.encode_to_vec().into();
            service.handle(body, &Budget::unbounded()).await.map(|answer| answer.reply)
        })
        .expect("answers")
}

fn write(world: &World) -> Result<BlocksReply, Refusal> {
    write_as(world, PackOptions::default())
}

fn write_as(world: &World, options: PackOptions) -> Result<BlocksReply, Refusal> {
    let certificate = claims(Operation::Write, world.node(NODE).clock.now()).sign(&key());
    call_as(world, Op::Write(WriteBlock { certificate, data: data().into() }), options)
}

fn read(world: &World, offset: u32, length: u32) -> Result<Bytes, Refusal> {
    read_as(world, offset, length, PackOptions::default())
}

fn read_as(world: &World, offset: u32, length: u32, options: PackOptions) -> Result<Bytes, Refusal> {
    let certificate = claims(Operation::Read, world.node(NODE).clock.now()).sign(&key());
    call_as(world, Op::Read(ReadBlock { certificate, offset, length }), options).map(|r| r.data)
}

#[test]
fn a_block_is_proven_read_back_and_survives_a_crash() {
    let world = World::new(1);
    let proof = write(&world).expect("writes").proof;
    let proven = Claims::verify(&proof, &[key()]).expect("a good proof");
    assert_eq!((proven.operation, proven.block), (Operation::Written, BlockId(0x1234)));
    assert!(write(&world).is_ok(), "the same block again is fine");
    world.crash(NODE);
    assert_eq!(read(&world, 0, 3 * PAGE_BYTES).expect("reads"), data());
    assert_eq!(read(&world, 4000, 200).expect("reads"), data()[4000..4200]);
    for (offset, length) in [(0, 0), (0, 3 * PAGE_BYTES + 1), (u32::MAX, 1), (3 * PAGE_BYTES, 1)] {
        assert_eq!(read(&world, offset, length).expect_err("refused").code, Code::InvalidArgument);
    }
}

#[test]
fn nothing_happens_without_the_right_certificate() {
    let world = World::new(2);
    let now = world.node(NODE).clock.now();
    let good = claims(Operation::Write, now);
    let mut refused = vec![
        (good.sign(&Key { epoch: 1, secret: [8; 32] }), Code::BadCertificate),
        (claims(Operation::Read, now).sign(&key()), Code::BadCertificate),
        (Claims { cluster: 2, ..good }.sign(&key()), Code::WrongCluster),
        (Claims { service: ServiceId(6), ..good }.sign(&key()), Code::WrongService),
        (Claims { expiry: Time(1), ..good }.sign(&key()), Code::CertificateExpired),
        (Claims { crc: 1, ..good }.sign(&key()), Code::CrcMismatch),
        (Claims { size: 4096, ..good }.sign(&key()), Code::InvalidArgument),
        (Bytes::new(), Code::BadCertificate),
    ];
    let signed = good.sign(&key());
    for i in 0..signed.len() {
        let mut flipped = signed.to_vec();
        flipped[i] ^= 0x10;
        refused.push((flipped.into(), Code::BadCertificate));
    }
    for (certificate, code) in refused {
        let write = WriteBlock { certificate, data: data().into() };
        assert_eq!(call(&world, Op::Write(write)).expect_err("refused").code, code);
    }
    assert_eq!(world.disk(NODE).files().len(), 1, "nothing was written but the label");
    assert_eq!(read(&world, 0, 1).expect_err("nothing there").code, Code::BlockNotFound);
}

#[test]
fn every_flipped_byte_is_an_error_or_the_right_bytes() {
    let world = World::new(3);
    write_as(&world, FILES).expect("writes");
    let disk = world.disk(NODE);
    let is_block = |(path, _): &(PathBuf, u64)| !path.ends_with("label");
    let (path, len) = disk.files().into_iter().find(is_block).expect("one block");
    let mut errors = 0u64;
    for offset in 0..len {
        assert!(disk.corrupt(&path, offset, 0x04));
        match read_as(&world, 0, 3 * PAGE_BYTES, FILES) {
            Ok(bytes) => assert_eq!(bytes, data(), "flip at {offset}"),
            Err(refusal) => {
                assert_eq!(refusal.code, Code::BlockCorrupt);
                errors += 1;
            }
        }
        disk.corrupt(&path, offset, 0x04);
    }
    // All data, the page table and the header; only padding may flip unseen.
    assert_eq!(errors, u64::from(3 * PAGE_BYTES + 3 * 4 + 56));
}

#[test]
fn an_erase_waits_until_no_write_can_be_granted() {
    let world = World::new(4);
    write(&world).expect("writes");
    let certificate = claims(Operation::Erase, world.node(NODE).clock.now()).sign(&key());
    let erase = || Op::Erase(EraseBlock { certificate: certificate.clone() });
    assert_eq!(call(&world, erase()).expect_err("too early").code, Code::TooEarly);
    let clock = world.node(NODE).clock;
    world.run(NODE, std::time::Duration::from_secs(600), async move {
        clock.sleep(std::time::Duration::from_secs(130)).await;
    });
    let proof = call(&world, erase()).expect("erases").proof;
    assert_eq!(Claims::verify(&proof, &[key()]).expect("good").operation, Operation::Erased);
    assert_eq!(read(&world, 0, 1).expect_err("gone").code, Code::BlockNotFound);
    assert!(call(&world, erase()).is_ok(), "again is fine");
}

#[test]
fn what_is_proven_erased_does_not_come_back() {
    let block = BlockId(0x1234);
    let mut half_way = 0;
    for seed in 1..=60 {
        let world = World::new(seed);
        write_as(&world, FILES).expect("writes");
        let (runtime, disk) = (world.node(NODE), world.disk(NODE));
        let store = open(&runtime, FILES);
        let is_there = |store: &BlockStore| store.list().expect("lists").contains(&block);
        disk.set_faults(DiskFaults { write_error_permille: 500, ..DiskFaults::default() });
        let first = store.erase(block);
        disk.set_faults(DiskFaults::default());
        // Removed, but not durably: nothing was proven yet.
        half_way += usize::from(first.is_err() && !is_there(&store));
        store.erase(block).expect("erases");
        world.crash(NODE);
        assert!(!is_there(&store), "seed {seed}: the block came back");
    }
    assert!(half_way > 3, "{half_way} erases stopped half-way");
}

/// What a disk has available while it takes writes, when one has just failed, and when it takes them again; and the faults that it told.
fn fail_and_recover() -> ([u64; 3], [Option<String>; 3]) {
    let world = World::new(9);
    let (runtime, disk) = (world.node(NODE), world.disk(NODE));
    let certificate = claims(Operation::Write, runtime.clock.now()).sign(&key());
    let ran = world.run(NODE, std::time::Duration::from_secs(60), async move {
        let store = open(&runtime, PackOptions::default());
        let service = BlockService::new(runtime.clone(), clock(&runtime), store, 1, vec![key()]);
        let op = Op::Write(WriteBlock { certificate, data: data().into() });
        let body = Bytes::from(BlocksRequest { op: Some(op) }.encode_to_vec());
        let budget = Budget::unbounded();
        let write = || service.handle(body.clone(), &budget);
        let available = async || service.space().await.expect("answers").1;
        let mut seen = Vec::new();
        seen.push((available().await, service.fault()));
        disk.set_faults(DiskFaults { write_error_permille: 1000, ..DiskFaults::default() });
        assert_eq!(write().await.expect_err("fails").code, Code::DiskFault);
        seen.push((available().await, service.fault()));
        disk.set_faults(DiskFaults::default());
        seen.push((available().await, service.fault()));
        seen
    });
    let seen: [(u64, Option<String>); 3] = ran.expect("ends").try_into().expect("three");
    (seen.clone().map(|(available, _)| available), seen.map(|(_, fault)| fault))
}

mod failing {
    use super::*;

    #[test]
    fn a_disk_whose_writes_fail_has_no_room_until_something_can_be_written() {
        let ([before, failing, after], faults) = fail_and_recover();
        assert!(before > 0 && failing == 0 && after > 0, "{before} {failing} {after}");
        assert!(faults[0].is_none() && faults[2].is_none(), "{faults:?}");
        assert!(faults[1].as_ref().is_some_and(|fault| fault.contains("fails")), "{faults:?}");
    }

    #[test]
    fn planted_bugs_are_found() {
        mutants::plant(Some(Mutant::FailingDiskChosen));
        let (is_planted, ([_, failing, _], _)) = (mutants::planted().is_some(), fail_and_recover());
        mutants::plant(None);
        assert_eq!(is_planted, failing > 0);
    }
}

#[test]
fn what_is_asked_for_in_vain_is_owed_once() {
    let world = World::new(10);
    let runtime = world.node(NODE);
    let certificate = claims(Operation::Read, runtime.clock.now()).sign(&key());
    let owed = world.run(NODE, std::time::Duration::from_secs(60), async move {
        let store = open(&runtime, PackOptions::default());
        let service = BlockService::new(runtime.clone(), clock(&runtime), store, 1, vec![key()]);
        for _ in 0..2 {
            let op = Op::Read(ReadBlock { certificate: certificate.clone(), offset: 0, length: 10 });
            let body = BlocksRequest { op: Some(op) }.encode_to_vec().into();
            let refused = service.handle(body, &Budget::unbounded()).await.expect_err("is not there");
            assert_eq!(refused.code, Code::BlockNotFound);
        }
        (service.take_owed().len(), service.take_owed().len())
    });
    assert_eq!(owed, Some((1, 0)));
}
