//! Where an applier stands and what it says of it; entries and states that it refuses.

use clutch_proto::log::Epoch;
use clutch_proto::state::{Check, Verdict, Voice};
use prost::Message;

use super::*;
use crate::{
    machine::ProduceContext,
    memory::MemoryStore,
    store::{Rows, WriteBatch},
};

const ROWS: Table = Table(64);

/// Every entry puts its number under its own slot.
struct Toy;

#[derive(Clone, PartialEq, Message)]
struct Put {
    #[prost(uint32, tag = "1")]
    slot: u32,
    #[prost(uint64, tag = "2")]
    value: u64,
}

impl Machine for Toy {
    const NAME: &'static str = "toy";
    type Request = Put;
    type Reply = Put;
    type Entry = Put;
    type Effect = u64;
    type Facts = ();

    fn check_home(_: &dyn View, _: u64, _: u32) -> Result<(), StoreError> {
        Ok(())
    }

    fn is_read(_: &Put) -> bool {
        false
    }

    fn gives_space_back(_: &Put) -> bool {
        false
    }

    fn read(_: &dyn View, _: &Put, (): &()) -> Result<Put, Stop> {
        Err(Stop::refuse(Code::Unsupported, "a toy is not asked"))
    }

    fn produce(
        _: &dyn View,
        request: Put,
        _: Option<ClientTag>,
        _: &mut ProduceContext<'_>,
        (): &(),
    ) -> Result<Put, Stop> {
        Ok(request)
    }

    fn tag(_: &Put) -> Option<&ClientTag> {
        None
    }

    fn apply(
        tx: &mut Tx<'_>,
        _: Position,
        _: Time,
        entry: Put,
        effects: &mut Effects<Toy>,
    ) -> Result<Applied<Put>, Stop> {
        tx.put_row(ROWS, &[entry.slot as u8, 1], &entry);
        effects.actions.push(entry.value);
        match entry.value {
            0 => Err(Stop::refuse(Code::NotFound, "zero")),
            1 => Err(Stop::unknown("one")),
            2 => Err(StoreError::Broken("two".into()).into()),
            _ => Ok(Applied::Reply(entry)),
        }
    }
}

fn entry(stamp: u64, kind: Kind) -> Bytes {
    Entry { stamp, kind: Some(kind) }.encode_to_vec().into()
}

fn put(stamp: u64, slot: u32, value: u64) -> Bytes {
    entry(stamp, Kind::Body(Put { slot, value }.encode_to_vec().into()))
}

fn check(position: u64, hash: StateHash) -> Bytes {
    entry(0, Kind::Check(Check { position, hash: hash.to_bytes().to_vec().into() }))
}

fn batch(position: u64, entries: Vec<Bytes>) -> Batch {
    Batch { position: Position(position), epoch: Epoch(1), entries }
}

fn opened(store: &Arc<MemoryStore>) -> Applier<Toy> {
    Applier::open(store.clone()).expect("opens")
}

/// The hash of the rows that are there, counted anew.
fn counted(store: &MemoryStore) -> StateHash {
    let mut total = 0u128;
    for table in (0..=255).map(Table).filter(|table| table.is_hashed()) {
        for (key, value) in store.scan(table, &[], &[], usize::MAX).expect("scans") {
            total = total.wrapping_add(row_hash(table, &key, &value));
        }
    }
    StateHash(total)
}

#[test]
fn it_stands_where_its_last_batch_ends_and_remembers_its_hashes() {
    let store = Arc::new(MemoryStore::new());
    let mut applier = opened(&store);
    assert_eq!((applier.position(), applier.time(), applier.hash()), (Position(0), Time(0), StateHash(0)));
    assert_eq!(applier.hash_at(Position(0)), Some(StateHash(0)));
    let mut hashes = vec![(0, StateHash(0))];
    for number in 1..=20u64 {
        // Positions between batches are the engine's own.
        let position = number * 3;
        let entries = vec![put(number * 100, number as u32 % 5, number + 10), put(1, 9, number + 10)];
        let made = batch(position, entries);
        let applied = applier.apply(&made).expect("applies");
        let time = Time(number * 100 + 1);
        assert_eq!((applied.position, applied.time, applied.actions.len()), (made.position, time, 2));
        let times: Vec<Time> = applied.outcomes.iter().map(|(time, _)| *time).collect();
        assert_eq!(times, [Time(number * 100), time], "a stamp that is behind comes a nanosecond later");
        assert_eq!((applier.position(), applier.time()), (made.position, time));
        assert_eq!(applier.last_batch(), (made.position, batch_crc(&made.entries)));
        assert_eq!(applier.hash(), counted(&store));
        assert!(hashes.iter().all(|(_, hash)| *hash != applier.hash()), "every batch changes it");
        hashes.push((position, applier.hash()));
        for at in 0..=position + 1 {
            let known = hashes.iter().rev().find(|(p, _)| *p <= at && at <= position).map(|(_, hash)| *hash);
            assert_eq!(applier.hash_at(Position(at)), known, "at {at} of {position}");
        }
        assert!(rescan(&*store).expect("scans").differences.is_empty());
        assert_eq!(rescan(&*store).expect("scans").position, made.position);
        assert_eq!(stands_at(&*store).expect("reads"), (made.position, time));
        if number % 7 == 0 {
            let last = applier.last_batch();
            applier = opened(&store);
            assert_eq!(
                (applier.position(), applier.time(), applier.last_batch()),
                (made.position, time, last)
            );
            // Before it was opened nothing is remembered.
            assert_eq!(applier.hash_at(Position(position - 1)), None);
            hashes = vec![(position, counted(&store))];
            assert_eq!(applier.hash(), hashes[0].1);
        }
    }
    applier.skip(Position(99));
    assert_eq!((applier.position(), applier.last_batch().0), (Position(99), Position(60)));
    applier.skip(Position(70));
    assert_eq!(applier.position(), Position(99), "it never goes back");
    for position in [99, 98, 1] {
        let refused = applier.apply(&batch(position, vec![put(1, 1, 9)])).map(|applied| applied.position);
        assert!(matches!(refused, Err(Fault::Order { applied: Position(99), .. })), "{refused:?}");
    }
    applier.apply(&batch(100, vec![put(1, 1, 9)])).expect("follows");
}

#[test]
fn only_so_many_hashes_are_remembered() {
    let mut applier = opened(&Arc::new(MemoryStore::new()));
    let last = RECENT_HASHES_MAX as u64 + 5;
    for position in 1..=last {
        applier.apply(&batch(position, vec![])).expect("applies");
    }
    let oldest = last - RECENT_HASHES_MAX as u64 + 1;
    assert!(applier.hash_at(Position(oldest)).is_some() && applier.hash_at(Position(oldest - 1)).is_none());
}

#[test]
fn checks_are_compared_where_the_hash_is_known_and_stop_what_differs() {
    let store = Arc::new(MemoryStore::new());
    let mut applier = opened(&store);
    applier.apply(&batch(1, vec![put(1, 1, 9)])).expect("applies");
    let first = applier.hash();
    applier.apply(&batch(2, vec![put(1, 2, 9)])).expect("applies");
    let second = applier.hash();
    let mark = entry(500, Kind::TimeMark(true));
    let applied = applier.apply(&batch(3, vec![check(1, first), check(2, second), mark])).expect("is equal");
    assert!(applied.outcomes.iter().all(|(_, outcome)| *outcome == EntryOutcome::Internal));
    assert_eq!((applied.time, applier.hash()), (Time(500), second), "neither has a row");
    assert_eq!(applier.checks(), CheckCounts { compared: 2, ..CheckCounts::default() });
    // Of a position that lies ahead, or before the process.
    applier.apply(&batch(4, vec![check(50, first)])).expect("is not known");
    let mut applier = opened(&store);
    applier.apply(&batch(5, vec![check(2, first)])).expect("is not known any more");
    assert_eq!(applier.checks(), CheckCounts { not_compared: 1, ..CheckCounts::default() });
    let before = store.scan(ROWS, &[], &[], 9).expect("scans");
    let fault = applier.apply(&batch(6, vec![put(1, 7, 7), check(5, first)])).map(|a| a.position);
    let Err(Fault::Diverged { position, ours, theirs }) = fault else { panic!("{fault:?}") };
    assert_eq!((position, ours, theirs), (Position(5), second, first));
    assert_eq!(store.scan(ROWS, &[], &[], 9).expect("scans"), before, "nothing of the batch is written");
    let odd = entry(0, Kind::Check(Check { position: 5, hash: vec![1; 15].into() }));
    let fault = opened(&store).apply(&batch(7, vec![odd])).map(|a| a.position);
    assert!(matches!(fault, Err(Fault::Entry { .. })), "{fault:?}");
}

#[test]
fn what_most_members_have_decides() {
    let store = Arc::new(MemoryStore::new());
    let mut applier = opened(&store);
    applier.apply(&batch(1, vec![put(1, 1, 9)])).expect("applies");
    let (ours, other) = (applier.hash(), StateHash(7));
    let verdict = |members: u32, hashes: &[StateHash]| {
        let voice = |(node, hash): (u64, &StateHash)| Voice { node, hash: hash.to_bytes().to_vec().into() };
        let voices = (1..).zip(hashes).map(voice).collect();
        entry(0, Kind::Verdict(Verdict { position: 1, members, voices }))
    };
    // Members, what those have that answered, and whether this one may go on; `None` where it stops.
    let table: &[(u32, &[StateHash], Option<CheckCounts>)] = &[
        (3, &[ours, ours, other], Some(CheckCounts { compared: 1, ..CheckCounts::default() })),
        (3, &[other, ours, ours], Some(CheckCounts { compared: 2, ..CheckCounts::default() })),
        (3, &[ours, other], Some(CheckCounts { compared: 2, undecided: 1, ..CheckCounts::default() })),
        (3, &[other], Some(CheckCounts { compared: 2, undecided: 2, ..CheckCounts::default() })),
        (5, &[other, other, ours], Some(CheckCounts { compared: 2, undecided: 3, ..CheckCounts::default() })),
        (
            4,
            &[other, other, ours, ours],
            Some(CheckCounts { compared: 2, undecided: 4, ..CheckCounts::default() }),
        ),
        (3, &[], Some(CheckCounts { compared: 2, undecided: 5, ..CheckCounts::default() })),
        (3, &[other, ours, other], None),
        (1, &[other], None),
    ];
    for (position, (members, hashes, counts)) in (2..).zip(table) {
        let applied = applier.apply(&batch(position, vec![verdict(*members, hashes)])).map(|a| a.position);
        match counts {
            Some(counts) => assert_eq!((applied.is_ok(), applier.checks()), (true, *counts), "{hashes:?}"),
            None => assert!(matches!(applied, Err(Fault::Diverged { .. })), "{hashes:?}: {applied:?}"),
        }
    }
    // Who speaks twice, or not in hashes, is not understood.
    let twice =
        Verdict { position: 1, members: 3, voices: vec![Voice { node: 1, hash: vec![0; 16].into() }; 2] };
    let odd = Verdict { position: 1, members: 3, voices: vec![Voice { node: 1, hash: vec![0; 15].into() }] };
    for verdict in [twice, odd] {
        let fault =
            opened(&store).apply(&batch(99, vec![entry(0, Kind::Verdict(verdict))])).map(|a| a.position);
        assert!(matches!(fault, Err(Fault::Entry { .. })), "{fault:?}");
    }
}

#[test]
fn a_feature_level_is_kept_and_one_that_is_not_known_stops_it() {
    let store = Arc::new(MemoryStore::new());
    let mut applier = opened(&store);
    assert_eq!(applier.level(), level::FIRST);
    let before = applier.hash();
    applier.apply(&batch(1, vec![entry(1, Kind::Level(level::FIRST))])).expect("applies");
    assert_eq!(applier.hash(), before, "nothing is agreed on that was not before");
    applier.apply(&batch(2, vec![entry(1, Kind::Level(level::KNOWN)), put(1, 1, 9)])).expect("applies");
    // It never sinks.
    applier.apply(&batch(3, vec![entry(1, Kind::Level(level::FIRST))])).expect("applies");
    assert_eq!((applier.level(), opened(&store).level()), (level::KNOWN, level::KNOWN));
    assert_eq!(applier.hash(), counted(&store), "the state has it");
    let fault = applier.apply(&batch(4, vec![entry(1, Kind::Level(level::KNOWN + 1))])).map(|a| a.position);
    assert!(
        fault.as_ref().is_err_and(|fault| fault.to_string().contains("run the newer build")),
        "{fault:?}"
    );
    assert_eq!((applier.position(), applier.level()), (Position(3), level::KNOWN));
    let rows = |number: &[u8]| vec![(Table::LEVEL.stored_key(&[]), Some(Bytes::copy_from_slice(number)))];
    store.write(rows(&(level::KNOWN + 1).to_be_bytes())).expect("writes");
    assert!(matches!(Applier::<Toy>::open(store.clone()), Err(Fault::Level(_))));
    store.write(rows(&[1])).expect("writes");
    assert!(matches!(Applier::<Toy>::open(store), Err(Fault::Store(StoreError::Broken(_)))));
}

#[test]
fn what_it_does_not_know_stops_it_and_what_is_refused_leaves_nothing() {
    let store = Arc::new(MemoryStore::new());
    let mut applier = opened(&store);
    let applied = applier.apply(&batch(1, vec![put(1, 1, 0), put(1, 2, 5)])).expect("applies");
    assert_eq!(applied.actions, [5], "a refused entry asks for nothing");
    let codes: Vec<_> = applied
        .outcomes
        .into_iter()
        .map(|(_, outcome)| match outcome {
            EntryOutcome::Done(result) => result.map(|put| put.value).map_err(|refusal| refusal.code),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(codes, [Err(Code::NotFound), Ok(5)]);
    let rows: Rows = store.scan(ROWS, &[], &[], 9).expect("scans");
    assert_eq!(rows.len(), 1);
    let good = put(1, 3, 7);
    let body = |bytes: &[u8]| entry(1, Kind::Body(Bytes::copy_from_slice(bytes)));
    let unknown_field = [&Put { slot: 1, value: 5 }.encode_to_vec()[..], &[0x78, 1]].concat();
    for (bad, what) in [
        (Bytes::from_static(&[0xff; 9]), ""),
        ([&good[..], &[0x78, 1]].concat().into(), "fields that this build does not know"),
        (body(&[0xff]), ""),
        (body(&unknown_field), "its body has fields"),
        (entry(1, Kind::Body(Put { slot: 1, value: 1 }.encode_to_vec().into())), "one"),
        (Entry { stamp: 1, kind: None }.encode_to_vec().into(), "no kind"),
    ] {
        match applier.apply(&batch(2, vec![good.clone(), bad])).map(|applied| applied.position) {
            Err(fault @ Fault::Entry { position: Position(2), ordinal: 1, .. }) => {
                assert!(fault.to_string().contains(what) && !fault.is_damage(), "{fault}");
            }
            other => panic!("{what}: {other:?}"),
        }
        assert_eq!(store.scan(ROWS, &[], &[], 9).expect("scans"), rows);
    }
    let fault =
        applier.apply(&batch(2, vec![put(1, 1, 2)])).map(|applied| applied.position).expect_err("two");
    assert!(fault.is_damage(), "{fault}");
}

#[test]
fn states_of_other_builds_and_broken_sums_are_not_opened() {
    let with = |rows: WriteBatch| {
        let store = Arc::new(MemoryStore::new());
        store.write(rows).expect("writes");
        Applier::<Toy>::open(store).map(|applier| applier.position())
    };
    let stands = |position, format| {
        let row = AppliedRow { position, format, ..AppliedRow::default() };
        vec![(Table::APPLIED.stored_key(APPLIED_KEY), Some(Bytes::from(row.encode_to_vec())))]
    };
    assert_eq!(with(stands(7, FORMAT)).expect("opens"), Position(7));
    assert!(matches!(with(stands(7, FORMAT + 1)), Err(Fault::Format(_))));
    assert!(matches!(with(stands(7, FORMAT - 1)), Err(Fault::OldFormat(_))));
    assert_eq!(with(stands(0, 0)).expect("an empty one is of no format"), Position(0));
    for (key, value) in [(&[1][..], &[0; 15][..]), (&[], &[0; 16])] {
        let rows = vec![(Table::SUMS.stored_key(key), Some(Bytes::copy_from_slice(value)))];
        let fault = with(rows).expect_err("is broken");
        assert!(fault.is_damage(), "{fault}");
    }
}

#[test]
fn a_rescan_finds_every_row_that_was_changed_behind_its_back() {
    let store = Arc::new(MemoryStore::new());
    let mut applier = opened(&store);
    applier.apply(&batch(1, (0..200).map(|n| put(1, n, 9)).collect())).expect("applies");
    let found = rescan(&*store).expect("scans");
    assert_eq!((found.rows, found.differences), (200, vec![]));
    let (key, value) = store.scan(ROWS, &[7], &[], 1).expect("scans")[0].clone();
    for changed in [None, Some(Bytes::from_static(b"\x08\x07\x10\x08"))] {
        store.write(vec![(ROWS.stored_key(&key), changed)]).expect("writes");
        let found = rescan(&*store).expect("scans").differences;
        assert!(found.len() == 1 && found[0].starts_with("slot 7: "), "{found:?}");
        store.write(vec![(ROWS.stored_key(&key), Some(value.clone()))]).expect("writes");
    }
    // More rows than are read at once.
    let many: WriteBatch = (0..9000u32)
        .map(|n| {
            (Table(99).stored_key(&[&[3], &n.to_be_bytes()[..]].concat()), Some(Bytes::from_static(b"x")))
        })
        .collect();
    store.write(many).expect("writes");
    let found = rescan(&*store).expect("scans");
    assert_eq!((found.rows, found.differences.len()), (9200, 1));
    // Clients whose count or rows are wrong.
    let count =
        |n: u64| vec![(Table::CLIENT_COUNT.stored_key(&[]), Some(Bytes::copy_from_slice(&n.to_be_bytes())))];
    for (rows, what) in [
        (count(1), "0 clients, but their count"),
        (vec![(Table::CLIENTS.stored_key(&[1]), Some(Bytes::from_static(&[0xff])))], "cannot be decoded"),
    ] {
        let store = MemoryStore::new();
        store.write(rows).expect("writes");
        let found = rescan(&store).expect("scans").differences;
        assert!(found.iter().any(|line| line.contains(what)), "{found:?}");
    }
    let store = MemoryStore::new();
    store.write(count(0)).expect("writes");
    let found = rescan(&store).expect("scans").differences;
    assert!(!found.iter().any(|line| line.contains("clients")), "{found:?}");
}

#[test]
fn the_checksum_of_a_batch_knows_where_its_entries_end() {
    let (a, b) = (Bytes::from_static(b"ab"), Bytes::from_static(b"c"));
    assert_eq!(batch_crc(&[]), 0);
    let expected = crc32fast::hash(b"\x02\0\0\0\0\0\0\0ab\x01\0\0\0\0\0\0\0c");
    assert_eq!(batch_crc(&[a, b]), expected);
    assert_ne!(batch_crc(&[Bytes::from_static(b"a"), Bytes::from_static(b"bc")]), expected);
}
