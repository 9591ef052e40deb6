//! The local engine: the conformance suite on a simulated and on a real disk, and what damage does.

use std::{
    collections::{BTreeMap, VecDeque},
    path::Path,
    time::Duration,
};

use clutch_log::{
    Chain, Engines, LogId, NoSnapshots, Outcome,
    conformance::{self, Harness, Part},
};
use clutch_runtime::{
    Disk,
    simulated::{NodeId, World},
};
use parking_lot::Mutex;

use super::*;

use clutch_log_store::internals::{self as format, self as recovery};

mod chained;
mod cut;
mod edges;
mod holes;
mod writing;

struct LocalHarness {
    runtime: Runtime,
    dir: PathBuf,
    /// What the log is opened through; the engine's own log when `None`.
    chain: Option<Chain>,
    open: tokio::sync::Mutex<Option<Opened>>,
}

type Opened = (Arc<LocalEngine>, Arc<dyn Log>);

impl LocalHarness {
    async fn opened(&self, engine: &Arc<LocalEngine>) -> Arc<dyn Log> {
        let opened = match &self.chain {
            Some(chain) => {
                Engines::one("local", engine.clone()).open(chain.clone(), Arc::new(NoSnapshots)).await
            }
            None => engine.log(LogId::CDC).await,
        };
        opened.expect("opens a log")
    }
}

const NODE: NodeId = NodeId(0);

fn small() -> Options {
    // Few commands for each write, so that something waits while one is done.
    Options { segment_bytes_max: 64 << 10, tail_bytes_max: 4 << 10, commands_max: 4, ..Options::default() }
}

#[async_trait]
impl Harness for LocalHarness {
    fn runtime(&self) -> Runtime {
        self.runtime.clone()
    }

    async fn leader(&self) -> Arc<dyn Log> {
        let mut open = self.open.lock().await;
        if open.is_none() {
            let engine = LocalEngine::open(&self.runtime, self.dir.clone(), small()).expect("opens");
            let engine = Arc::new(engine);
            let log = self.opened(&engine).await;
            // A second log in the same segments: its records must not show in the first.
            let other = engine.log(LogId::shard(7)).await.expect("opens a log");
            drop(other.propose(Epoch(1), vec![Bytes::from_static(b"other log")]));
            *open = Some((engine, log));
        }
        open.as_ref().expect("just opened").1.clone()
    }

    async fn all(&self) -> Vec<Arc<dyn Log>> {
        vec![self.leader().await]
    }

    async fn change_leader(&self) {
        // The engine has one node: opening the log again begins a new reign.
        let mut open = self.open.lock().await;
        if let Some((engine, log)) = &mut *open {
            *log = self.opened(engine).await;
        }
    }

    async fn restart(&self) -> bool {
        *self.open.lock().await = None;
        // The old writer ends when it notices that its handles are gone.
        self.runtime.clock.sleep(Duration::from_millis(50)).await;
        true
    }

    fn any_member_answers(&self) -> bool {
        true
    }

    async fn make_next_unknown(&self, _committed: bool) -> bool {
        false
    }

    async fn members(&self) -> Vec<Part> {
        let log = self.leader().await;
        vec![Part { node: small().node, log }]
    }

    async fn cut_off(&self, _: clutch_log::NodeId, _: bool) -> bool {
        false
    }

    async fn wipe(&self, _: clutch_log::NodeId) -> bool {
        false
    }

    fn restores(&self) -> bool {
        false
    }

    async fn applied(&self, _: clutch_log::NodeId, _: Position) {}
}

#[test]
fn conforms_on_a_simulated_disk() {
    for seed in 0..20 {
        let world = World::new(seed);
        let runtime = world.node(NODE);
        let harness = LocalHarness { runtime, dir: "log".into(), chain: None, open: Default::default() };
        let done =
            world.run(NODE, Duration::from_secs(600), async move { conformance::full(&harness).await });
        assert!(done.is_some(), "seed {seed} got stuck");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn conforms_on_a_real_disk() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let harness = LocalHarness {
        runtime: clutch_runtime::production::runtime(),
        dir: dir.path().join("log"),
        chain: None,
        open: Default::default(),
    };
    conformance::full(&harness).await;
}

/// Appends `count` batches and returns how many were acknowledged before `limit` of virtual time.
fn append_until(world: &World, limit: Duration, count: u32, acknowledged: &Arc<Mutex<Vec<(Position, u32)>>>) {
    append_many_until(world, limit, count, 1, acknowledged);
}

/// The same with several of them on their way at a time, so that something always waits for the writer.
fn append_many_until(
    world: &World,
    limit: Duration,
    count: u32,
    in_flight: usize,
    acknowledged: &Arc<Mutex<Vec<(Position, u32)>>>,
) {
    let runtime = world.node(NODE);
    let acknowledged = acknowledged.clone();
    world.run(NODE, limit, async move {
        let engine = LocalEngine::open(&runtime, "log".into(), small()).expect("opens");
        let log = engine.log(LogId::CDC).await.expect("opens");
        let mut events = log.events(log.status().bounds.last);
        let epoch = loop {
            if let Event::Leader { epoch, .. } = events.next().await.expect("events") {
                break epoch;
            }
        };
        let start = acknowledged.lock().len() as u32;
        let mut waiting = VecDeque::new();
        for i in start..start + count {
            let text = Bytes::from(format!("{i} {}", "x".repeat((i % 700) as usize)));
            // Refused once the power has gone.
            let Ok(commit) = log.propose(epoch, vec![text]) else { break };
            waiting.push_back((i, commit));
            if in_flight == 1 {
                runtime.clock.sleep(Duration::from_micros(runtime.random.below(300))).await;
            }
            while waiting.len() >= in_flight
                && let Some((i, commit)) = waiting.pop_front()
            {
                if let Outcome::Committed(position) = commit.await {
                    acknowledged.lock().push((position, i));
                }
            }
        }
    });
}

fn read_all(world: &World) -> Result<BTreeMap<Position, Bytes>, LogFault> {
    let runtime = world.node(NODE);
    world
        .run(NODE, Duration::from_secs(60), async move {
            let engine = LocalEngine::open(&runtime, "log".into(), small())?;
            let log = engine.log(LogId::CDC).await?;
            let mut events = log.events(Position(1));
            let mut seen = BTreeMap::new();
            loop {
                match events.next().await? {
                    Event::Committed(batch) => drop(seen.insert(batch.position, batch.entries[0].clone())),
                    Event::Leader { .. } => return Ok(seen),
                    _ => {}
                }
            }
        })
        .expect("ends")
}

#[test]
fn crashes_lose_nothing_acknowledged_and_never_look_like_damage() {
    for seed in 0..60 {
        let world = World::new(seed);
        let acknowledged = Arc::new(Mutex::new(Vec::new()));
        for round in 0..4 {
            let limit = Duration::from_micros(3_000 + 700 * (seed + round));
            // In every other world the power goes while the mark is written many times between two of its syncs.
            let in_flight = if seed % 2 == 0 { 1 } else { 40 };
            if in_flight > 1 {
                world.disk(NODE).cut_power_after(60 + (seed * 31 + round * 17) % 50);
            }
            append_many_until(&world, limit, 400, in_flight, &acknowledged);
            world.crash(NODE);
            let seen = read_all(&world).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
            world.crash(NODE);
            for (position, i) in &*acknowledged.lock() {
                let entry = seen.get(position).unwrap_or_else(|| panic!("seed {seed}: {position} is lost"));
                assert!(entry.starts_with(format!("{i} ").as_bytes()));
            }
        }
    }
}

#[test]
fn every_flipped_byte_of_a_synced_segment_is_an_error_or_harmless() {
    let world = World::new(5);
    let acknowledged = Arc::new(Mutex::new(Vec::new()));
    append_until(&world, Duration::from_secs(60), 30, &acknowledged);
    world.crash(NODE);
    let whole = read_all(&world).expect("undamaged");
    world.crash(NODE);
    let disk = world.disk(NODE);
    let path = Path::new("log/0000000000000001.log");
    let len = disk.read(path).expect("reads").len() as u64;
    let mut refused = 0;
    for offset in 0..len {
        assert!(disk.corrupt(path, offset, 0x40));
        match recovery::recover(&*disk, Path::new("log"), 0) {
            Err(LogFault::Corrupt { .. }) => refused += 1,
            Ok(_) => panic!("the flip at {offset} of {len} was not seen"),
            Err(other) => panic!("the flip at {offset}: {other}"),
        }
        disk.corrupt(path, offset, 0x40);
    }
    assert_eq!(refused, len);
    assert_eq!(read_all(&world).expect("undamaged again").len(), whole.len());
}

#[test]
fn a_failed_sync_stops_the_engine() {
    let world = World::new(9);
    let runtime = world.node(NODE);
    let disk = world.disk(NODE);
    let outcome = world.run(NODE, Duration::from_secs(60), async move {
        let engine = LocalEngine::open(&runtime, "log".into(), small()).expect("opens");
        let log = engine.log(LogId::CDC).await.expect("opens");
        disk.fail_writes_after(1);
        let commit = log.propose(Epoch(1), vec![Bytes::from_static(b"never synced")]).expect("leads");
        assert_eq!(commit.await, Outcome::Unknown);
        assert!(matches!(log.propose(Epoch(1), vec![Bytes::from_static(b"x")]), Err(Rejected::Stopped(_))));
        let mut events = log.events(log.status().bounds.last.next());
        loop {
            match events.next().await {
                Ok(Event::Committed(batch)) => panic!("committed after a failed sync: {batch:?}"),
                Ok(_) => {}
                Err(fault) => return fault,
            }
        }
    });
    assert!(matches!(outcome, Some(LogFault::Storage(_))));
}

#[test]
fn segments_and_marks_have_their_golden_bytes() {
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    let line = format::GroupLine::new(LogId::CDC, Position(6), Epoch(2), None);
    let mut segment = format::segment_header(1, 0x0102_0304_0506_0708).to_vec();
    let none = LogId { role: 0, number: 0 };
    format::encode_record(
        &mut segment,
        RecordKind::Groups,
        none,
        Position(0),
        Epoch(0),
        &[format::encode_group(&line)],
    );
    format::encode_record(&mut segment, RecordKind::Epoch, LogId::CDC, Position(7), Epoch(3), &[]);
    let entries = [Bytes::from_static(b"first"), Bytes::from_static(b"second")];
    format::encode_record(&mut segment, RecordKind::Batch, LogId::CDC, Position(8), Epoch(3), &entries);
    format::encode_record(&mut segment, RecordKind::Seal, LogId::CDC, Position(9), Epoch(3), &[]);
    assert_eq!(hex(&segment), include_str!("../../../../docs/formats/golden/segment.hex").trim());
    let mark = format::encode_mark(format::Mark { sequence: 5, segment: 1, offset: 4096, first: 1 });
    assert_eq!(hex(&mark), include_str!("../../../../docs/formats/golden/mark.hex").trim());
}

/// Entries of a batch that is worth packing.
fn alike(count: u32) -> Vec<Bytes> {
    (0..count).map(|n| Bytes::from(format!("an entry that looks like the others, number {n:04}"))).collect()
}

fn decode(record: &[u8]) -> Result<crate::Record, String> {
    let header = format::decode_header(record)?;
    let payload = record[format::RECORD_HEADER_BYTES..].to_vec();
    format::decode_payload(&header, payload.into())
}

#[test]
fn large_batches_are_packed_and_read_back() {
    for (entries, is_smaller) in [(alike(5), false), (alike(200), true), (vec![Bytes::new(); 300], true)] {
        let mut record = Vec::new();
        format::encode_record(&mut record, RecordKind::Batch, LogId::CDC, Position(8), Epoch(3), &entries);
        let plain: usize = entries.iter().map(|e| e.len() + 4).sum();
        assert_eq!(record.len() < format::RECORD_HEADER_BYTES + plain, is_smaller);
        let read = decode(&record).expect("reads back");
        assert_eq!((read.kind, read.entries), (RecordKind::Batch, entries));
    }
    // What does not become smaller stays as it is.
    let noise: Vec<u8> = (0..5000u32).flat_map(|n| scattered(n).to_le_bytes()).collect();
    let mut record = Vec::new();
    let entries = [Bytes::from(noise)];
    format::encode_record(&mut record, RecordKind::Batch, LogId::CDC, Position(8), Epoch(3), &entries);
    assert_eq!(record.len(), format::RECORD_HEADER_BYTES + 4 + entries[0].len());
    assert_eq!(decode(&record).expect("reads back").entries, entries);
}

/// Numbers without a pattern.
fn scattered(n: u32) -> u32 {
    (n.wrapping_mul(0x9e37_79b9) ^ (n >> 7)).wrapping_mul(0x85eb_ca6b).rotate_left(n % 31)
}

#[test]
fn packed_batches_that_lie_are_refused() {
    let mut record = Vec::new();
    format::encode_record(&mut record, RecordKind::Batch, LogId::CDC, Position(8), Epoch(3), &alike(200));
    let at = format::RECORD_HEADER_BYTES;
    let reseal = |mut record: Vec<u8>| {
        let len = (record.len() - at) as u32;
        record[8..12].copy_from_slice(&len.to_le_bytes());
        let crc = crc32fast::hash(&record[at..]);
        record[12..16].copy_from_slice(&crc.to_le_bytes());
        let crc = crc32fast::hash(&record[8..at]);
        record[4..8].copy_from_slice(&crc.to_le_bytes());
        record
    };
    assert!(decode(&reseal(record.clone())).is_ok());
    for len in [0, 1, 200, 11_000, 64 << 20, (64 << 20) + 1, u32::MAX] {
        let mut lying = record.clone();
        lying[at..at + 4].copy_from_slice(&len.to_le_bytes());
        assert!(decode(&reseal(lying)).is_err(), "a length of {len} was believed");
    }
    for end in at..record.len() {
        assert!(decode(&reseal(record[..end].to_vec())).is_err(), "cut at {end}");
    }
    for flipped in at + 4..record.len() {
        let mut lying = record.clone();
        lying[flipped] ^= 0x40;
        // With checksums that match, other bytes are other entries or an error, never a panic.
        let _ = decode(&reseal(lying));
    }
}

#[test]
fn a_packed_batch_written_before_still_reads() {
    let golden = include_str!("../../../../docs/formats/golden/packed-batch.hex").trim();
    let record: Vec<u8> = (0..golden.len() / 2)
        .map(|at| u8::from_str_radix(&golden[2 * at..2 * at + 2], 16).expect("hex"))
        .collect();
    assert_eq!(decode(&record).expect("reads").entries, alike(200));
}

#[test]
fn indexes_have_their_golden_bytes() {
    let span = |first: u64, last: u64| format::Span {
        first: Position(first),
        last: Position(last),
        restart: (first == 1).then_some(clutch_log_store::Restart { at: Position(1), is_anew: true }),
        offsets: (first..=last).map(|n| n as u32 * 100).collect(),
    };
    let spans = BTreeMap::from([(LogId::CDC.into(), span(7, 9)), (LogId::shard(1).into(), span(1, 20))]);
    let index = format::Index { number: 3, bytes: 70_000, spans };
    let bytes = format::encode_index(&index);
    let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/formats/golden/index-3.hex");
    if std::env::var_os("UPDATE_VECTORS").is_some() {
        std::fs::write(path, format!("{hex}\n")).expect("written");
    }
    assert_eq!(hex, std::fs::read_to_string(path).expect("there").trim());
    let (read, places) = format::decode_index(&bytes).expect("whole");
    let offsets = |id| {
        let place: format::Offsets = places[&id];
        format::decode_offsets(place, &bytes[place.start as usize..][..place.count as usize * 4])
    };
    let mut whole = read;
    for (id, span) in &mut whole.spans {
        span.offsets = offsets(*id).expect("whole");
    }
    assert_eq!(whole, index);
    for bit in 0..bytes.len() * 8 {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        let all = format::decode_index(&flipped).and_then(|(_, places)| {
            let read = |p: &format::Offsets| {
                format::decode_offsets(*p, &flipped[p.start as usize..][..p.count as usize * 4])
            };
            places.values().map(read).collect::<Option<Vec<_>>>()
        });
        assert_eq!(all, None, "bit {bit}");
    }
    // One of the build before is made anew.
    let before = include_str!("../../../../docs/formats/golden/index.hex").trim();
    let byte = |at: usize| u8::from_str_radix(&before[at..at + 2], 16).expect("hex");
    let before: Vec<u8> = (0..before.len()).step_by(2).map(byte).collect();
    assert!(before.starts_with(b"CLUTIDX2") && format::decode_index(&before).is_none());
}

/// Trims as a replica does whose state is durable up to the log's end.
async fn trim(log: &Arc<dyn Log>, retain: Position) -> Result<(), LogFault> {
    let last = log.status().bounds.last;
    log.set_floors(Floors { retain, snapshot: last, flushed: last }).await
}
