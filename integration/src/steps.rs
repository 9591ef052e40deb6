//! Every step of what must be durable: it fails, the process dies, or the power goes at the k-th disk operation; the work is done
//! again, and the power goes once more. Whatever was proven, acknowledged or shown to a reader must be there then.
//!
//! What lies above the simulated disk is enumerated here; RocksDB's part, checkpoints and trimming among it, by
//! `cli/tests/power.rs` in a real process.

use std::{path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use clutch_blocks::store::{BlockStore, Expected};
use clutch_log::{Event, LogFault, LogId, Outcome, Position};
use clutch_log_local::{LocalEngine, Options};
use clutch_proto::{BlockId, Refusal, ServiceId, Time, types::Code};
use clutch_runtime::{
    Runtime,
    simulated::{NodeId, SimDisk, World},
};

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

fn data() -> Vec<u8> {
    (0..8192u32).map(|i| (i * 31 % 251) as u8).collect()
}

fn open_blocks(disk: &Arc<SimDisk>) -> std::io::Result<BlockStore> {
    BlockStore::open(disk.clone(), PathBuf::from("d"), 1, ServiceId(5))
}

/// Whether the step was reached.
fn block_step(erase: bool, how: How, seed: u64, step: u64) -> Result<bool, String> {
    let world = World::new(seed);
    let disk = world.disk(NODE);
    let data = data();
    let expected = Expected { block: BlockId(0x1234), size: 8192, crc: crc32fast::hash(&data), time: 7 };
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
    let mut wrong = each_step("write a block", |how, seed, step| block_step(false, how, seed, step));
    wrong.extend(each_step("erase a block", |how, seed, step| block_step(true, how, seed, step)));
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
async fn append(runtime: Runtime) -> Result<u64, LogFault> {
    let engine = LocalEngine::open(&runtime, "log".into(), options())?;
    let log = engine.log(LogId::CDC).await?;
    let mut events = log.events(Position(1));
    let epoch = loop {
        if let Event::Leader { epoch, is_self: true } = events.next().await? {
            break epoch;
        }
    };
    let mut acknowledged = 0;
    for number in 0..9 {
        let Ok(commit) = log.propose(epoch, vec![entry(number)]) else { break };
        match commit.await {
            Outcome::Committed(_) => acknowledged += 1,
            _ => break,
        }
        if number == 6 && log.trim(Position(3)).await.is_err() {
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

/// Whether the step was reached.
fn log_step(how: How, seed: u64, step: u64) -> Result<bool, String> {
    let world = World::new(seed);
    let disk = world.disk(NODE);
    how.arm(&disk, step);
    let runtime = world.node(NODE);
    let limit = Duration::from_secs(60);
    let acknowledged = world.run(NODE, limit, append(runtime)).and_then(Result::ok).unwrap_or(0);
    let reached = disk.is_dead() || disk.faults_met() > 0;
    match how {
        How::Fail | How::Kill => {
            disk.heal();
            world.kill(NODE);
        }
        How::Cut => world.crash(NODE),
    }
    let read = || {
        let runtime = world.node(NODE);
        let found = world.run(NODE, limit, async move { shown(&runtime) });
        found.unwrap_or_else(|| Err("reading does not come to an end".into()))
    };
    let first = read()?;
    if first.last().map_or(0, |last| last + 1) < acknowledged {
        return Err(format!("{acknowledged} were acknowledged, {first:?} are there"));
    }
    if first.windows(2).any(|pair| pair[1] != pair[0] + 1) {
        return Err(format!("{first:?} have a hole"));
    }
    world.crash(NODE);
    let second = read()?;
    // Trimming may have come to its end meanwhile.
    if !first.ends_with(&second) || second.last() != first.last() {
        return Err(format!("readers were shown {first:?}, and {second:?} are there"));
    }
    Ok(reached)
}

/// Batches are appended, segments begun and trimmed.
pub fn log() -> Vec<String> {
    each_step("append to a log", log_step)
}
