//! Cuts of logs in their past, and what a cut of power leaves of them.

use clutch_runtime::simulated::SimDisk;

use super::*;
use crate::cut::{Kept, is_unfinished, prepare, prepared, put_in_place};

const LOGS: [LogId; 2] = [LogId::CDC, LogId { role: 3, number: 1 }];

fn entry(log: LogId, number: u64, part: u64) -> Bytes {
    format!("{log} {number} {part} {}", "x".repeat(400)).into()
}

/// Batches of two entries each in both logs, over several segments.
async fn fill(runtime: &Runtime, dir: &Path, batches: u64) {
    let options = Options { segment_bytes_max: 6 << 10, cluster: 9, ..Options::default() };
    let engine = LocalEngine::open(runtime, dir.to_owned(), options).expect("opens");
    for id in LOGS {
        let log = engine.log(id).await.expect("opens a log");
        let epoch = Epoch(1);
        for number in 1..=batches {
            let batch = vec![entry(id, number, 0), entry(id, number, 1)];
            let outcome = log.propose(epoch, batch).expect("is taken").await;
            assert!(matches!(outcome, Outcome::Committed(_)), "{outcome:?}");
        }
    }
}

/// Every entry of every log, read as recovery finds them.
fn read(disk: &dyn Disk, dir: &Path) -> Result<BTreeMap<LogId, Vec<Bytes>>, LogFault> {
    let recovered = recovery::recover(disk, dir, 9)?;
    let mut found = BTreeMap::new();
    for number in recovered.segments() {
        let mut reader = SegmentReader::open(disk, dir, number)?;
        while let Some(record) = reader.next_record()? {
            if record.kind == RecordKind::Batch {
                found.entry(record.group.log).or_insert_with(Vec::new).extend(record.entries);
            }
        }
    }
    Ok(found)
}

/// A disk with both logs on it, and what is to remain: one log is cut inside a batch, the other one later.
fn filled() -> (World, BTreeMap<LogId, Kept>) {
    let world = World::new(5);
    let runtime = world.node(NODE);
    world.run(NODE, Duration::from_secs(60), async move { fill(&runtime, Path::new("log"), 30).await });
    let kept = |position, entries| Kept { position: Position(position), entries };
    // The first position of each is its epoch.
    (world, BTreeMap::from([(LOGS[0], kept(6, 1)), (LOGS[1], kept(21, usize::MAX))]))
}

fn expected() -> BTreeMap<LogId, Vec<Bytes>> {
    let entries = |id, all: u64| (1..=all).flat_map(move |n| [entry(id, n, 0), entry(id, n, 1)]);
    let first = entries(LOGS[0], 5).take(9).collect();
    BTreeMap::from([(LOGS[0], first), (LOGS[1], entries(LOGS[1], 20).collect())])
}

#[test]
fn what_remains_is_a_prefix_of_each_log() {
    let (world, keep) = filled();
    let (disk, dir) = (world.disk(NODE), Path::new("log"));
    let before = read(&*disk, dir).expect("reads");
    prepare(&*disk, dir, &keep).expect("is made ready");
    assert_eq!(read(&*disk, dir).expect("reads"), before, "nothing has changed yet");
    assert_eq!(read(&*disk, &prepared(dir)).expect("reads"), expected());
    let old = put_in_place(&*disk, dir).expect("is put in place");
    assert_eq!(read(&*disk, dir).expect("reads"), expected());
    assert_eq!(read(&*disk, &old).expect("reads"), before, "the old logs are kept");
    // Once more, further back: the first copies stay.
    let less = BTreeMap::from(LOGS.map(|id| (id, Kept { position: Position(2), entries: 2 })));
    prepare(&*disk, dir, &less).expect("is made ready");
    assert_ne!(put_in_place(&*disk, dir).expect("is put in place"), old);
    assert_eq!(read(&*disk, dir).expect("reads").values().map(Vec::len).sum::<usize>(), 4);
    assert_eq!(read(&*disk, &old).expect("reads"), before);
}

#[test]
fn more_than_there_is_cannot_remain() {
    let (world, mut keep) = filled();
    let (disk, dir) = (world.disk(NODE), Path::new("log"));
    keep.insert(LOGS[1], Kept { position: Position(99), entries: 1 });
    let refused = prepare(&*disk, dir, &keep).expect_err("is refused").to_string();
    assert!(refused.contains("ends before position 99"), "{refused}");
    keep.remove(&LOGS[1]);
    let refused = prepare(&*disk, dir, &keep).expect_err("is refused").to_string();
    assert!(refused.contains("not of this cluster"), "{refused}");
    assert!(put_in_place(&*disk, dir).is_err(), "nothing was made ready");
    assert!(!is_unfinished(&*disk, dir));
}

fn rewind(disk: &SimDisk, dir: &Path, keep: &BTreeMap<LogId, Kept>) -> Result<(), LogFault> {
    if !is_unfinished(disk, dir) {
        prepare(disk, dir, keep)?;
    }
    put_in_place(disk, dir).map(drop)
}

/// Power goes at every step: then there are the old logs, or those that remain, or it is said that it must be finished; and
/// doing it again always ends well.
#[test]
fn a_cut_of_power_leaves_the_old_logs_or_what_remains() {
    let (mut was_old, mut was_new, mut was_between) = (0, 0, 0);
    for steps in 0.. {
        let (world, keep) = filled();
        let (disk, dir) = (world.disk(NODE), Path::new("log"));
        let before = read(&*disk, dir).expect("reads");
        disk.cut_power_after(steps);
        let done = rewind(&disk, dir, &keep).is_ok();
        if done && !disk.is_dead() {
            assert!(steps > 50, "{steps} steps");
            break;
        }
        world.crash(NODE);
        match read(&*disk, dir) {
            Ok(found) if found == before => was_old += 1,
            Ok(found) => {
                assert_eq!(found, expected(), "after {steps} steps");
                was_new += 1;
            }
            Err(fault) => {
                assert!(fault.to_string().contains("run `clutch log rewind` once more"), "{fault}");
                was_between += 1;
            }
        }
        if read(&*disk, dir).ok().is_none_or(|found| found == before) {
            rewind(&disk, dir, &keep).unwrap_or_else(|fault| panic!("after {steps} steps: {fault}"));
        }
        assert_eq!(read(&*disk, dir).expect("reads"), expected(), "after {steps} steps");
    }
    assert!(was_old > 10 && was_between > 10 && was_new > 0, "{was_old}, {was_between}, {was_new}");
}

/// The records of a log in a directory: kind, position, epoch.
fn records(disk: &dyn Disk, dir: &Path, id: LogId) -> Vec<(RecordKind, u64, u64)> {
    let mut found = Vec::new();
    for number in 1..=99 {
        let Ok(mut reader) = SegmentReader::open(disk, dir, number) else { continue };
        while let Some(record) = reader.next_record().expect("reads") {
            if record.group.log == id {
                found.push((record.kind, record.position.0, record.epoch.0));
            }
        }
    }
    found
}

#[test]
fn a_reign_of_the_lost_future_is_over_also_in_what_remains() {
    let world = World::new(6);
    let runtime = world.node(NODE);
    world.run(NODE, Duration::from_secs(60), async move {
        let options = Options { cluster: 9, ..Options::default() };
        let engine = LocalEngine::open(&runtime, "log".into(), options).expect("opens");
        for id in LOGS {
            for epoch in 1..=3 {
                let log = engine.log(id).await.expect("opens a log");
                let outcome = log.propose(Epoch(epoch), vec![entry(id, epoch, 0)]).expect("is taken").await;
                assert!(matches!(outcome, Outcome::Committed(_)), "{outcome:?}");
            }
        }
    });
    let (disk, dir) = (world.disk(NODE), Path::new("log"));
    // One in the middle of its second reign, the other whole.
    let kept = |position| Kept { position: Position(position), entries: usize::MAX };
    let keep = BTreeMap::from([(LOGS[0], kept(4)), (LOGS[1], kept(6))]);
    prepare(&*disk, dir, &keep).expect("is made ready");
    let (epoch, batch) = (RecordKind::Epoch, RecordKind::Batch);
    let whole =
        vec![(epoch, 1, 1), (batch, 2, 1), (epoch, 3, 2), (batch, 4, 2), (epoch, 5, 3), (batch, 6, 3)];
    assert_eq!(records(&*disk, &prepared(dir), LOGS[0]), [&whole[..4], &[(epoch, 5, 3)]].concat());
    assert_eq!(records(&*disk, &prepared(dir), LOGS[1]), whole);
}

#[test]
fn what_was_made_ready_can_be_thrown_away() {
    let (world, keep) = filled();
    let (disk, dir) = (world.disk(NODE), Path::new("log"));
    prepare(&*disk, dir, &keep).expect("is made ready");
    assert!(!disk.list(&prepared(dir)).expect("lists").is_empty());
    crate::cut::discard(&*disk, dir).expect("is removed");
    assert!(disk.list(&prepared(dir)).expect("lists").is_empty());
    assert!(put_in_place(&*disk, dir).is_err(), "nothing is ready");
}

#[test]
fn damage_before_the_mark_is_refused_and_a_torn_tail_does_not_remain() {
    let (world, keep) = filled();
    let (disk, dir) = (world.disk(NODE), Path::new("log"));
    let mark = recovery::read_mark(&*disk, dir).expect("reads").expect("a mark");
    let last = dir.join(format::segment_name(mark.segment));
    // Behind the mark, at it, and before it.
    let file = disk.open(&last, false).expect("opens");
    file.write_at(&[7; 90], mark.offset).expect("writes");
    prepare(&*disk, dir, &keep).expect("what is behind the mark does not matter");
    assert_eq!(read(&*disk, &prepared(dir)).expect("reads"), expected());
    assert!(disk.corrupt(&last, mark.offset - 1, 0x20));
    let refused = prepare(&*disk, dir, &keep).map(drop);
    assert!(matches!(refused, Err(LogFault::Corrupt { .. })), "{refused:?}");
}

#[test]
fn more_is_copied_than_is_written_at_once() {
    let world = World::new(7);
    let runtime = world.node(NODE);
    let noise = |number: u32| -> Bytes {
        (0..150_000).flat_map(|n| scattered(number * 1_000_000 + n).to_le_bytes()).collect::<Vec<u8>>().into()
    };
    world.run(NODE, Duration::from_secs(60), async move {
        let options = Options { cluster: 9, ..Options::default() };
        let engine = LocalEngine::open(&runtime, "log".into(), options).expect("opens");
        let log = engine.log(LOGS[0]).await.expect("opens a log");
        for number in 0..16 {
            let outcome = log.propose(Epoch(1), vec![noise(number)]).expect("is taken").await;
            assert!(matches!(outcome, Outcome::Committed(_)), "{outcome:?}");
        }
    });
    let (disk, dir) = (world.disk(NODE), Path::new("log"));
    let keep = BTreeMap::from([(LOGS[0], Kept { position: Position(17), entries: 1 })]);
    prepare(&*disk, dir, &keep).expect("is made ready");
    assert_eq!(read(&*disk, &prepared(dir)).expect("reads"), read(&*disk, dir).expect("reads"));
    let mark = recovery::read_mark(&*disk, &prepared(dir)).expect("reads").expect("a mark");
    let length = disk.read(&prepared(dir).join(format::segment_name(1))).expect("reads").len() as u64;
    assert_eq!((mark.segment, mark.offset, mark.first), (1, length, 1));
}
