//! The writer's own rules: when segments end, what room it asks for and says when there is none, what stays in memory, what may be
//! trimmed; and that whoever follows the records names exactly what is missing.

use std::path::Path;

use clutch_log::Refused;
use clutch_runtime::simulated::DiskFaults;

use super::{
    edges::{append, batch, in_world},
    *,
};

const DIR: &str = "log";

fn options() -> Options {
    Options { segment_bytes_max: 6 << 10, ..small() }
}

/// Of every segment on disk, oldest first: its number, its size, and the last position of the log in it.
fn segments(disk: &dyn Disk) -> Vec<(u64, u64, Position)> {
    let mut found = Vec::new();
    for number in 1..=99 {
        let Ok(mut reader) = SegmentReader::open(disk, Path::new(DIR), number) else { continue };
        let mut last = Position(0);
        while let Some(record) = reader.next_record().expect("reads") {
            last = if record.kind == RecordKind::Groups { last } else { record.position };
        }
        found.push((number, reader.offset(), last));
    }
    found
}

#[test]
fn segments_end_where_the_next_record_would_not_fit() {
    let world = World::new(41);
    let (runtime, disk) = (world.node(NODE), world.disk(NODE));
    in_world(&world, async move {
        let engine = LocalEngine::open(&runtime, DIR.into(), options()).expect("opens");
        let log = engine.log(LogId::CDC).await.expect("opens");
        append(&log, Epoch(1), 0..20).await;
        let sizes: Vec<u64> = segments(&*disk).into_iter().map(|(_, bytes, _)| bytes).collect();
        // A record of such a batch, as it is reckoned before it is encoded: 48 bytes, the entries, 4 for each of them.
        let record: u64 = 48 + batch(0).iter().map(|entry| entry.len() as u64 + 4).sum::<u64>();
        let (open, closed) = sizes.split_last().expect("segments");
        assert!(closed.len() > 2, "{sizes:?}");
        for bytes in closed {
            assert!(*bytes <= 6 << 10 && bytes + record > 6 << 10, "{sizes:?}");
        }
        // One that fits exactly does not end it.
        let left = (6 << 10) - open;
        let fits = left - 48 - 4;
        let exact: Vec<u8> = (0..fits as u32).map(|n| scattered(n) as u8).collect();
        let commit = log.propose(Epoch(1), vec![exact.into()]).expect("leads");
        assert!(matches!(commit.await, Outcome::Committed(_)));
        let after = segments(&*disk);
        assert_eq!((after.len(), after[after.len() - 1].1), (sizes.len(), 6 << 10));
        // What is larger than a segment has one of its own.
        let large: Vec<u8> = (0..9000u32).map(|n| scattered(n) as u8).collect();
        for _ in 0..2 {
            let commit = log.propose(Epoch(1), vec![large.clone().into()]).expect("leads");
            assert!(matches!(commit.await, Outcome::Committed(_)));
        }
        assert_eq!(segments(&*disk).len(), sizes.len() + 2);
    });
}

#[test]
fn without_room_it_says_so_and_goes_on_when_there_is_some() {
    let world = World::new(42);
    let (runtime, disk) = (world.node(NODE), world.disk(NODE));
    in_world(&world, async move {
        let engine = LocalEngine::open(&runtime, DIR.into(), options()).expect("opens");
        let log = engine.log(LogId::CDC).await.expect("opens");
        append(&log, Epoch(1), 0..7).await;
        let last = log.status().bounds.last;
        disk.set_faults(DiskFaults { full: true, ..DiskFaults::default() });
        // What was set aside in the open segment is used up first.
        let mut taken = 0;
        while taken < 7 {
            match log.propose(Epoch(1), batch(100)).expect("leads").await {
                Outcome::Committed(position) => {
                    taken += 1;
                    assert_eq!(position.0, last.0 + taken);
                }
                Outcome::Refused(Refused::NoRoom) => break,
                other => panic!("on a full disk: {other:?}"),
            }
        }
        assert!(taken < 7, "a full disk takes batch after batch");
        // So are smaller records.
        let mut refused = None;
        for number in 0..25 {
            refused = engine.log(LogId::shard(number)).await.err();
            if refused.is_some() {
                break;
            }
        }
        assert!(matches!(refused, Some(LogFault::NoRoom(_))), "{refused:?}");
        let refused = log.seal().await;
        assert!(matches!(refused, Err(LogFault::NoRoom(_))), "{refused:?}");
        // Giving something back needs none.
        trim(&log, Position(4)).await.expect("trims");
        disk.set_faults(DiskFaults::default());
        append(&log, Epoch(1), 0..20).await;
        assert_eq!(log.status().bounds.last.0, last.0 + taken + 20);
    });
    world.crash(NODE);
    let recovered = recovery::recover(&*world.disk(NODE), Path::new(DIR), 0).expect("recovers");
    assert!(recovered.next(LogId::CDC).expect("it is there").0 > 28);
}

#[test]
fn a_segment_goes_when_nothing_in_it_is_needed_and_not_before() {
    let world = World::new(44);
    let (runtime, disk) = (world.node(NODE), world.disk(NODE));
    in_world(&world, async move {
        let engine = LocalEngine::open(&runtime, DIR.into(), options()).expect("opens");
        let log = engine.log(LogId::CDC).await.expect("opens");
        append(&log, Epoch(1), 0..30).await;
        let all = segments(&*disk);
        assert!(all.len() > 4, "{all:?}");
        for floor in 1..=40 {
            trim(&log, Position(floor)).await.expect("trims");
            let left: Vec<u64> = segments(&*disk).into_iter().map(|(number, ..)| number).collect();
            let open = all[all.len() - 1].0;
            let expected = all.iter().filter(|(number, _, last)| last.0 > floor || *number == open);
            assert_eq!(left, expected.map(|(number, ..)| *number).collect::<Vec<_>>(), "up to {floor}");
            for (number, ..) in &all[..all.len() - 1] {
                let index = recovery::index_path(Path::new(DIR), *number);
                assert_eq!(disk.exists(&index), left.contains(number), "the index goes with its segment");
            }
            // A smaller one does not bring it back.
            trim(&log, Position(0)).await.expect("trims");
        }
        // What another log needs stays, too.
        let other = engine.log(LogId::shard(2)).await.expect("opens");
        append(&other, Epoch(1), 0..1).await;
        append(&log, Epoch(1), 0..20).await;
        let before = segments(&*disk).len();
        trim(&log, Position(99)).await.expect("trims");
        assert_eq!(segments(&*disk).len(), before);
        trim(&other, Position(99)).await.expect("trims");
        assert_eq!(segments(&*disk).len(), 1);
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_segment_that_cannot_be_removed_is_removed_later() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let dir = dir.path().join("log");
    let runtime = clutch_runtime::production::runtime();
    let engine = LocalEngine::open(&runtime, dir.clone(), small()).expect("opens");
    let log = engine.log(LogId::CDC).await.expect("opens a log");
    for _ in 0..200 {
        // Bytes that are not packed into fewer.
        let bytes: Vec<u8> = (0..125).flat_map(|_| runtime.random.u64().to_le_bytes()).collect();
        let commit = log.propose(Epoch(1), vec![bytes.into()]).expect("is taken");
        assert!(matches!(commit.await, Outcome::Committed(_)));
    }
    // Something else lies under its name, which no file's removal removes.
    let first = dir.join(format::segment_name(1));
    std::fs::remove_file(&first).expect("removed");
    std::fs::create_dir_all(first.join("in the way")).expect("made");
    let upto = log.status().bounds.last;
    for _ in 0..3 {
        let trimmed = trim(&log, upto).await;
        assert!(matches!(&trimmed, Err(LogFault::Storage(_))), "{trimmed:?}");
    }
    let commit = log.propose(Epoch(1), vec![Bytes::from_static(b"goes on")]).expect("is taken");
    assert!(matches!(commit.await, Outcome::Committed(_)));
    std::fs::remove_dir_all(&first).expect("removed");
    std::fs::write(&first, b"").expect("written");
    trim(&log, upto).await.expect("is trimmed");
    assert!(!first.exists() && log.status().bounds.first > Position(100));
}
