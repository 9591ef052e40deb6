//! The store as engines use it that give out positions themselves; what damage does to one group; marks and what memory keeps.

use std::{path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use clutch_log::{Epoch, LogFault, LogId, Outcome, Position};
use clutch_proto::mutants::{self, Mutant};
use clutch_runtime::simulated::{NodeId, World};

use crate::{
    LogletId, Options, RecordKind, Store, TailRecord, Vote, Write,
    format::{
        GroupLine, Mark, RECORD_HEADER_BYTES, decode_group, decode_header, decode_payload, encode_group,
        encode_record,
    },
    recovery::{make_durable, read_mark},
    segment::{Effect, Segment, cut_earlier},
    shared::Shared,
    writer::Writer,
};

mod following;
mod groups;

const NODE: NodeId = NodeId(0);

/// Runs a part on the node to its end.
fn run<T: Send + 'static>(world: &World, part: impl Future<Output = T> + Send + 'static) -> T {
    world.run(NODE, Duration::from_secs(600), part).expect("it ends")
}

#[test]
fn one_slot_of_the_mark_is_always_durable() {
    let dir = Path::new("log");
    for seed in 0..60 {
        let world = World::new(seed);
        let mut mark = Mark::default();
        let mut durable = 0;
        for round in 0..6 {
            let shared = Arc::new(Shared {
                disk: world.node(NODE).disk,
                dir: dir.into(),
                options: Options::default(),
                queued_bytes: Default::default(),
                appended: Default::default(),
                syncs: Default::default(),
                groups: Default::default(),
                quarantined: Default::default(),
                cuts: Default::default(),
                segments: Default::default(),
                failed: Default::default(),
            });
            let mut writer = Writer::new(&shared, None, mark);
            for step in 0..seed % 4 {
                writer.write_mark(1, 1000 * round + step).expect("writes");
            }
            if (seed >> 2 ^ round) % 3 == 0 {
                writer.write_mark(1, 1000 * round + 500).expect("writes");
                writer.sync_mark().expect("syncs");
                durable = 1000 * round + 500;
            }
            for step in 0..seed % 5 {
                writer.write_mark(1, 1000 * round + 600 + step).expect("writes");
            }
            // The process dies, and sometimes the machine.
            drop(writer);
            if (seed ^ round) % 2 == 0 {
                world.crash(NODE);
            }
            let read = read_mark(&*world.disk(NODE), dir).expect("reads");
            mark = read.unwrap_or_default();
            if mark.sequence > 0 {
                // As every start does.
                make_durable(&*world.disk(NODE), dir, mark).expect("written");
            }
            assert!(
                mark.offset >= durable,
                "seed {seed}, round {round}: {mark:?}, but {durable} was durable"
            );
        }
    }
}

#[test]
fn memory_keeps_the_newest_records_up_to_a_limit_and_always_one() {
    for (tail_bytes_max, kept) in [(3 * 1034, 3), (3 * 1034 - 1, 2), (1, 1)] {
        let world = World::new(43);
        let runtime = world.node(NODE);
        run(&world, async move {
            let options = Options { tail_bytes_max, ..Options::default() };
            let store = Store::open(&runtime, "log".into(), options).expect("opens");
            let group = store.group(LogId::CDC).expect("opens");
            let epoch = group.begin_epoch().await.expect("begins");
            let mut last = Position(0);
            for number in 0..12_u8 {
                let batch = vec![Bytes::from(vec![number; 453]), Bytes::from(vec![number; 453])];
                match group.append(epoch, batch).expect("is taken").await {
                    Outcome::Committed(position) => last = position,
                    other => panic!("{other:?}"),
                }
            }
            let state = group.group.state.lock();
            // 64 bytes for each, and 32 for each of its two entries.
            let weight =
                |record: &TailRecord| record.batch.entries.iter().map(|e| e.len() + 32).sum::<usize>() + 64;
            let weights: Vec<usize> = state.tail.iter().map(weight).collect();
            assert_eq!((weights.len(), weights.iter().sum::<usize>()), (kept, state.tail_bytes));
            assert!(weights.iter().all(|weight| *weight == 1034), "{weights:?}");
            assert_eq!(state.tail.back().expect("one").batch.position, last);
        });
    }
}

/// What a group is said to have that was cut in an earlier segment.
fn cut_in_an_earlier_segment() -> Vec<u64> {
    let first = |position: u64, offset: u64| (position, Effect::Next, offset);
    let mut segments = vec![Segment { number: 1, ..Segment::default() }];
    for (position, effect, offset) in (1..=9).map(|n| first(n, 100 * n)) {
        segments[0].take(LogId::CDC.into(), Position(position), effect, offset);
    }
    let mut next = Segment { number: 2, ..Segment::default() };
    next.take(LogId::CDC.into(), Position(4), Effect::Cut(Position(4)), 32);
    let restart = next.spans[&LogId::CDC.into()].restart.expect("it reaches into the one before");
    cut_earlier(&mut segments, LogId::CDC.into(), restart);
    let span = &segments[0].spans[&LogId::CDC.into()];
    (1..=9).filter(|position| span.has(Position(*position))).collect()
}

#[test]
fn planted_bugs_are_found() {
    mutants::plant(Some(Mutant::EarlierNotCut));
    let (is_planted, left) = (mutants::planted().is_some(), cut_in_an_earlier_segment());
    mutants::plant(None);
    assert_ne!(is_planted, left == [1, 2, 3]);
}

#[test]
fn records_of_groups_have_their_golden_bytes() {
    let id = LogletId { log: LogId::shard(7), incarnation: 3 };
    let member = Bytes::from_static(b"1, 2, 3");
    let records = [
        (RecordKind::Vote, Position(0), Epoch(5), vec![Bytes::from_static(b"for 2")]),
        (RecordKind::Members, Position(8), Epoch(5), vec![member.clone()]),
        (RecordKind::Truncate, Position(8), Epoch(0), vec![]),
        (RecordKind::Base, Position(20), Epoch(6), vec![member.clone()]),
        (RecordKind::Remove, Position(0), Epoch(0), vec![]),
    ];
    let mut bytes = Vec::new();
    for (kind, position, epoch, entries) in &records {
        let begin = bytes.len();
        encode_record(&mut bytes, *kind, id, *position, *epoch, entries);
        let header = decode_header(&bytes[begin..]).expect("whole");
        let payload = bytes[begin + RECORD_HEADER_BYTES..].to_vec();
        let read = decode_payload(&header, payload.into()).expect("whole");
        assert_eq!((read.kind, read.group, read.position, read.epoch), (*kind, id, *position, *epoch));
        assert_eq!(&read.entries, entries);
    }
    let line = GroupLine {
        base: (Position(20), Epoch(6)),
        vote: Some(Vote { epoch: Epoch(5), content: Bytes::from_static(b"for 2") }),
        members: vec![(Position(20), member.clone()), (Position(22), member)],
        is_removed: false,
        ..GroupLine::new(id, Position(22), Epoch(6), None)
    };
    let removed = GroupLine { is_removed: true, ..GroupLine::new(id, Position(0), Epoch(0), None) };
    for line in [line, removed] {
        let encoded = encode_group(&line);
        assert_eq!(decode_group(&encoded), Ok(line));
        // The first 32 bytes are a line of their own, of a group that has no more.
        for end in (0..encoded.len()).filter(|end| *end != 32) {
            assert!(decode_group(&encoded[..end]).is_err(), "cut short at {end}");
        }
        bytes.extend_from_slice(&encoded);
    }
    let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/formats/golden/group-records.hex");
    if std::env::var_os("UPDATE_VECTORS").is_some() {
        std::fs::write(path, format!("{hex}\n")).expect("written");
    }
    assert_eq!(hex, std::fs::read_to_string(path).expect("there").trim());
}
