//! Every step of what must be durable: it fails, the process dies, or the power goes at the k-th disk operation; the work is done
//! again, and the power goes once more. Whatever was proven, acknowledged or shown to a reader must be there then.
//!
//! What lies above the simulated disk is enumerated here; RocksDB's part, checkpoints and trimming among it, by
//! `cli/tests/power.rs` in a real process.

use std::{ops::Range, path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use clutch_blocks::{
    PackOptions,
    service::BlockService,
    store::{BlockStore, Expected},
};
use clutch_log::{Event, Floors, LogFault, LogId, Outcome, Position};
use clutch_log_local::{LocalEngine, Options};
use clutch_proto::{
    BlockId, Refusal, ServiceId, Time,
    blocks::{BlocksRequest, EraseBlock, WriteBlock, blocks_request},
    certificate::{Claims, Key, Operation},
    types::Code,
};
use clutch_runtime::{
    Budget, HybridClock, Runtime,
    simulated::{NodeId, SimDisk, World},
};
use prost::Message as _;
use tokio::sync::oneshot;

const NODE: NodeId = NodeId(0);
/// A crash draws what survives of what was not synced: some worlds for each step.
const WORLDS: u64 = 6;
/// No work has so many steps; more would mean that it never ends.
const STEPS_MAX: u64 = 400;

/// What happens at the step.
#[derive(Clone, Copy, Debug)]
enum How {
    /// It and all later ones fail, until the work is done again.
    Fail,
    /// The process dies, its machine goes on.
    Kill,
    /// The power goes.
    Cut,
}

impl How {
    const ALL: [How; 3] = [How::Fail, How::Kill, How::Cut];

    fn arm(self, disk: &SimDisk, step: u64) {
        match self {
            How::Fail => disk.fail_writes_after(step),
            How::Kill | How::Cut => disk.cut_power_after(step),
        }
    }
}

/// Tries all steps of some work until one lies behind its end; what was wrong.
fn each_step(what: &str, work: impl Fn(How, u64, u64) -> Result<bool, String>) -> Vec<String> {
    let mut wrong = Vec::new();
    for how in How::ALL {
        for seed in 0..WORLDS {
            let mut step = 0;
            loop {
                match work(how, seed, step) {
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(error) => {
                        wrong.push(format!("{what}, {how:?} at step {step}, world {seed}: {error}"))
                    }
                }
                // Where even the end of the work is wrong there is no step behind it.
                if wrong.len() > 20 {
                    return wrong;
                }
                step += 1;
                assert!(step < STEPS_MAX, "{what} does not end");
            }
            assert!(step > 1, "{what} has {step} steps");
        }
    }
    wrong
}

/// Small blocks share segments, a large one has a file of its own.
const SIZES: [u32; 2] = [8192, 256 << 10];

fn data(size: u32) -> Vec<u8> {
    (0..size).map(|i| (i * 31 % 251) as u8).collect()
}

fn open_blocks(disk: &Arc<SimDisk>) -> std::io::Result<BlockStore> {
    BlockStore::open(disk.clone(), PathBuf::from("d"), 1, ServiceId(5), PackOptions::default())
}

/// Whether the step was reached.
fn block_step(size: u32, erase: bool, how: How, seed: u64, step: u64) -> Result<bool, String> {
    let world = World::new(seed);
    let disk = world.disk(NODE);
    let data = data(size);
    let expected = Expected { block: BlockId(0x1234), size, crc: crc32fast::hash(&data), time: 7 };
    let mut store = BlockStore::create(disk.clone(), PathBuf::from("d"), 1, ServiceId(5), Time(1))
        .map_err(|e| format!("make a disk: {e}"))?;
    let act = |store: &BlockStore| -> Result<(), Refusal> {
        match erase {
            true => store.erase(expected.block),
            false => store.write(&expected, &data, &|| true),
        }
    };
    if erase {
        store.write(&expected, &data, &|| true).map_err(|e| format!("write before: {e}"))?;
    }
    how.arm(&disk, step);
    let first = act(&store);
    let reached = first.is_err() || disk.is_dead() || disk.faults_met() > 0;
    match how {
        How::Fail => disk.heal(),
        How::Kill => {
            disk.heal();
            store = open_blocks(&disk).map_err(|e| format!("open after: {e}"))?;
        }
        How::Cut => {
            world.crash(NODE);
            store = open_blocks(&disk).map_err(|e| format!("open after: {e}"))?;
        }
    }
    act(&store).map_err(|e| format!("do it again: {e}"))?;
    world.crash(NODE);
    let store = open_blocks(&disk).map_err(|e| format!("open at the end: {e}"))?;
    match (erase, store.verify(&expected)) {
        (false, Ok(())) => Ok(reached),
        (true, Err(refusal)) if refusal.code == Code::BlockNotFound => Ok(reached),
        (_, found) => Err(format!("it was proven, and {found:?} is there")),
    }
}

/// Blocks are written and erased.
pub fn blocks() -> Vec<String> {
    let mut wrong = Vec::new();
    for size in SIZES {
        for (erase, what) in [(false, "write"), (true, "erase")] {
            let what = format!("{what} a block of {size} bytes");
            wrong.extend(each_step(&what, |how, seed, step| block_step(size, erase, how, seed, step)));
        }
    }
    wrong
}

fn options() -> Options {
    // Some segments.
    Options { segment_bytes_max: 5 << 10, cluster: 9, ..Options::default() }
}

fn entry(number: u64) -> Bytes {
    let mut bytes = number.to_le_bytes().to_vec();
    // Not to be packed.
    bytes.extend((0..1500u64).map(|i| (i.wrapping_mul(number + 7).wrapping_mul(0x9e37_79b9) >> 13) as u8));
    bytes.into()
}

/// Appends, and trims once, until something fails; how many were acknowledged.
async fn append(runtime: Runtime, numbers: Range<u64>) -> Result<u64, LogFault> {
    let engine = LocalEngine::open(&runtime, "log".into(), options())?;
    let log = engine.log(LogId::CDC).await?;
    let mut events = log.events(Position(1));
    let epoch = loop {
        if let Event::Leader { epoch, is_self: true, .. } = events.next().await? {
            break epoch;
        }
    };
    let mut acknowledged = 0;
    let three = Position(3);
    let floors = Floors { retain: three, snapshot: three, flushed: three };
    for number in numbers {
        let Ok(commit) = log.propose(epoch, vec![entry(number)]) else { break };
        match commit.await {
            Outcome::Committed(_) => acknowledged += 1,
            _ => break,
        }
        if number == 6 && log.set_floors(floors).await.is_err() {
            break;
        }
    }
    Ok(acknowledged)
}

/// What a reader is shown: the numbers of all entries that the log still has.
fn shown(runtime: &Runtime) -> Result<Vec<u64>, String> {
    let engine = LocalEngine::open(runtime, "log".into(), options()).map_err(|e| format!("open: {e}"))?;
    let Some(bounds) = engine.bounds(LogId::CDC) else { return Ok(Vec::new()) };
    let mut numbers = Vec::new();
    for position in bounds.first.0..=bounds.last.0 {
        let batch = engine.batch(LogId::CDC, Position(position)).map_err(|e| format!("read: {e}"))?;
        for bytes in batch.into_iter().flat_map(|batch| batch.entries) {
            let number = bytes.first_chunk::<8>().map(|b| u64::from_le_bytes(*b));
            let number =
                number.filter(|number| entry(*number) == bytes).ok_or("an entry that nobody wrote")?;
            numbers.push(number);
        }
    }
    Ok(numbers)
}

/// In virtual time: nothing that comes to an end takes so long.
const LIMIT: Duration = Duration::from_secs(60);

/// See [`append`]; 0 when it does not come to an end.
fn append_in(world: &World, numbers: Range<u64>) -> u64 {
    let work = append(world.node(NODE), numbers);
    world.run(NODE, LIMIT, work).and_then(Result::ok).unwrap_or(0)
}

/// See [`shown`].
fn read_in(world: &World) -> Result<Vec<u64>, String> {
    let runtime = world.node(NODE);
    let found = world.run(NODE, LIMIT, async move { shown(&runtime) });
    found.unwrap_or_else(|| Err("reading does not come to an end".into()))
}

/// Whether the step was reached.
fn log_step(how: How, seed: u64, step: u64) -> Result<bool, String> {
    let world = World::new(seed);
    let disk = world.disk(NODE);
    how.arm(&disk, step);
    let acknowledged = append_in(&world, 0..9);
    let reached = disk.is_dead() || disk.faults_met() > 0;
    match how {
        How::Fail | How::Kill => {
            disk.heal();
            world.kill(NODE);
        }
        How::Cut => world.crash(NODE),
    }
    let first = read_in(&world)?;
    if first.last().map_or(0, |last| last + 1) < acknowledged {
        return Err(format!("{acknowledged} were acknowledged, {first:?} are there"));
    }
    if first.windows(2).any(|pair| pair[1] != pair[0] + 1) {
        return Err(format!("{first:?} have a hole"));
    }
    world.crash(NODE);
    let second = read_in(&world)?;
    // Trimming may have come to its end meanwhile.
    if !first.ends_with(&second) || second.last() != first.last() {
        return Err(format!("readers were shown {first:?}, and {second:?} are there"));
    }
    Ok(reached)
}

/// What an interrupted trim left is removed by the next process, which dies or loses power at each of its steps.
pub fn recovery() -> Vec<String> {
    let mut wrong = Vec::new();
    for (first, seed) in
        [How::Fail, How::Kill].into_iter().flat_map(|how| (0..3).map(move |seed| (how, seed)))
    {
        for step in 0..STEPS_MAX {
            let mut reached = false;
            for then in 0..STEPS_MAX {
                match recovery_step(first, seed, step, then) {
                    Ok((of_first, of_then)) => {
                        reached = of_first;
                        if !of_then || !of_first {
                            break;
                        }
                    }
                    Err(error) => {
                        reached = true;
                        wrong.push(format!("{first:?} at step {step}, power at {then} of recovery: {error}"));
                        break;
                    }
                }
            }
            if wrong.len() > 5 || !reached {
                break;
            }
        }
    }
    wrong
}

/// The first number of what the next process appends.
const LATER: u64 = 100;

/// Whether either step was reached.
fn recovery_step(first: How, seed: u64, step: u64, then: u64) -> Result<(bool, bool), String> {
    let world = World::new(seed);
    let disk = world.disk(NODE);
    first.arm(&disk, step);
    let acknowledged = append_in(&world, 0..9);
    let reached = disk.is_dead() || disk.faults_met() > 0;
    disk.heal();
    world.kill(NODE);
    let met = disk.faults_met();
    disk.cut_power_after(then);
    // It may have come to its end before the power went, or not.
    let later = append_in(&world, LATER..LATER + 2);
    let is_cut = disk.is_dead() || disk.faults_met() > met;
    world.crash(NODE);
    let there = read_in(&world)?;
    for (first, count) in [(0, acknowledged), (LATER, later)] {
        if count > 0 && !there.contains(&(first + count - 1)) {
            return Err(format!("{count} from {first} on were acknowledged, {there:?} are there"));
        }
    }
    Ok((reached, is_cut))
}

const KEY: Key = Key { epoch: 1, secret: [3; 32] };

/// What happens while something takes long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scene {
    /// A block is written, who asked gives up, and it is erased.
    Erased,
    /// A block is written, and its disk is taken away.
    WrittenNowhere,
    /// A block is erased, and its disk is taken away.
    ErasedNowhere,
}

/// Writes and erases take long at each of their steps; what was proven must be true.
pub fn stalled() -> Vec<String> {
    let mut wrong = Vec::new();
    for scene in [Scene::Erased, Scene::WrittenNowhere, Scene::ErasedNowhere] {
        for (size, step) in SIZES.into_iter().flat_map(|size| (0..8).map(move |step| (size, step))) {
            if let Err(error) = stall_step(size, scene, step) {
                wrong.push(format!("{scene:?} of {size} bytes, step {step} takes long: {error}"));
            }
        }
    }
    wrong
}

fn stall_step(size: u32, scene: Scene, step: u64) -> Result<(), String> {
    // Longer than a disk may take before it counts as hanging, or shorter: then work is waited for.
    let stall = Duration::from_secs(if scene == Scene::Erased { 40 } else { 5 });
    let world = World::new(step);
    let (disk, runtime) = (world.disk(NODE), world.node(NODE));
    let store = BlockStore::create(disk.clone(), PathBuf::from("d"), 1, ServiceId(5), Time(1))
        .map_err(|e| format!("make a disk: {e}"))?;
    let clock = Arc::new(HybridClock::new(runtime.clock.clone()));
    let service = BlockService::new(runtime.clone(), clock.clone(), store, 1, vec![KEY]).with_skew_ms_max(0);
    let service = Arc::new(service);
    let data = Bytes::from(data(size));
    let now = clock.now();
    let claims = Claims {
        operation: Operation::Write,
        cluster: 1,
        service: ServiceId(5),
        block: BlockId(0x1234),
        size: data.len() as u32,
        crc: crc32fast::hash(&data),
        time: now,
        expiry: now.plus_ms(500),
    };
    let expected = Expected { block: claims.block, size: claims.size, crc: claims.crc, time: now.0 };
    let write = blocks_request::Op::Write(WriteBlock { certificate: claims.sign(&KEY), data });
    let erase = Claims { operation: Operation::Erase, ..claims }.sign(&KEY);
    let erase = blocks_request::Op::Erase(EraseBlock { certificate: erase });
    let ask = |service: Arc<BlockService>, op| async move {
        let body = Bytes::from(BlocksRequest { op: Some(op) }.encode_to_vec());
        service.handle(body, &Budget::new(1 << 20)).await.map(drop)
    };
    let (worker, eraser, away) = (service.clone(), service, disk.clone());
    let clock = runtime.clock.clone();
    let outcome = world.run(NODE, Duration::from_secs(600), async move {
        if scene == Scene::ErasedNowhere {
            let written = ask(worker.clone(), write.clone()).await;
            assert!(written.is_ok(), "{written:?}");
            // Until its grant has ended.
            clock.sleep(Duration::from_secs(1)).await;
        }
        away.stall_after(step, stall);
        let (told, worked) = oneshot::channel();
        let (op, patience) =
            (if scene == Scene::ErasedNowhere { erase.clone() } else { write }, clock.clone());
        runtime.spawn("work", async move {
            // Who gives up soon does not stop the work.
            let patience = patience.sleep(if scene == Scene::Erased { stall / 40 } else { stall * 4 });
            let done = tokio::select! {
                done = ask(worker, op) => done.is_ok(),
                () = patience => false,
            };
            let _ = told.send(done);
        });
        clock.sleep(Duration::from_secs(2)).await;
        let unmounted = (scene != Scene::Erased).then(|| away.unmount());
        let mut is_erased = false;
        let begin = clock.monotonic();
        while scene == Scene::Erased && !is_erased && clock.monotonic() - begin < stall * 3 {
            is_erased = ask(eraser.clone(), erase.clone()).await.is_ok();
            clock.sleep(Duration::from_secs(1)).await;
        }
        let is_done = worked.await.unwrap_or(false);
        clock.sleep(stall * 2).await;
        (is_done, is_erased, unmounted)
    });
    let (is_done, is_erased, unmounted) = outcome.ok_or("does not come to an end")?;
    world.kill(NODE);
    if let Some(unmounted) = unmounted {
        disk.mount(unmounted);
    }
    let store = open_blocks(&disk).map_err(|e| format!("open at the end: {e}"))?;
    let is_there = store.verify(&expected).is_ok();
    match scene {
        Scene::Erased if !is_erased => Err("it is never erased".into()),
        Scene::Erased if is_there => Err("it was proven erased, and it is there".into()),
        Scene::WrittenNowhere if is_done && !is_there => {
            Err("it was proven written, and it is not there".into())
        }
        Scene::ErasedNowhere if is_done && is_there => Err("it was proven erased, and it is there".into()),
        _ => Ok(()),
    }
}

/// Batches are appended, segments begun and trimmed.
pub fn log() -> Vec<String> {
    each_step("append to a log", log_step)
}
