//! Groups of engines that give out positions themselves.

use clutch_runtime::simulated::SimDisk;
use parking_lot::Mutex;

use super::*;

fn id(number: u32) -> LogletId {
    LogletId { log: LogId::shard(number), incarnation: number % 3 + 1 }
}

fn entry(position: u64, term: u64) -> Write {
    let (position, epoch) = (Position(position), Epoch(term));
    let text = format!("{position} in {}", epoch.0);
    Write::Record { kind: RecordKind::Batch, position, epoch, entries: vec![text.into()] }
}

fn options() -> Options {
    Options { segment_bytes_max: 6 << 10, tail_bytes_max: 500, may_quarantine: true, ..Options::default() }
}

/// What a group holds, by position: reign and first entry.
fn content(store: &Store, id: LogletId) -> Result<Vec<(u64, u64, Bytes)>, LogFault> {
    let group = store.group(id)?;
    let mut cursor = group.cursor();
    let (first, last) = (group.first(), group.view().last);
    (first.0..=last.0)
        .map(|position| {
            let record = cursor.stored(Position(position))?.expect("a group has no holes");
            assert_eq!(record.batch.position.0, position);
            Ok((position, record.batch.epoch.0, record.batch.entries.first().cloned().unwrap_or_default()))
        })
        .collect()
}

#[test]
fn what_is_taken_away_is_gone_and_what_follows_takes_its_place() {
    let world = World::new(1);
    let runtime = world.node(NODE);
    run(&world, async move {
        let store = Store::open(&runtime, "log".into(), options()).expect("opens");
        let (group, other) = (store.group(id(1)).expect("opens"), store.group(id(2)).expect("opens"));
        // Over several segments, with another group in between.
        for position in 1..=200 {
            group.write(vec![entry(position, 1)]).await.expect("written");
            other.write(vec![entry(position, 7)]).await.expect("written");
        }
        let mut before = group.cursor();
        assert!(before.stored(Position(150)).expect("reads").is_some());
        group.write(vec![Write::Truncate { from: Position(101) }, entry(101, 2)]).await.expect("written");
        assert_eq!(before.stored(Position(101)).expect("reads").expect("is there").batch.epoch, Epoch(2));
        assert!(before.stored(Position(150)).expect("reads").is_none(), "it is gone");
        for wrong in [
            vec![entry(101, 3)],
            vec![entry(103, 3)],
            vec![Write::Truncate { from: Position(103) }],
            vec![Write::Truncate { from: Position(0) }],
            vec![entry(102, 3), entry(104, 3)],
        ] {
            let refused = group.write(wrong.clone()).await;
            assert!(matches!(refused, Err(LogFault::Unsupported(_))), "{wrong:?}: {refused:?}");
        }
        assert_eq!(group.view().last, Position(101), "of what does not follow nothing is written");
        let vote = Vote { epoch: Epoch(9), content: Bytes::from_static(b"for 3") };
        group.write(vec![Write::Vote(vote.clone()), entry(102, 9)]).await.expect("written");
        let found = content(&store, id(1)).expect("reads");
        assert_eq!(found.len(), 102);
        assert_eq!((found[99].1, found[100].1, found[101].1), (1, 2, 9));
        assert_eq!(content(&store, id(2)).expect("reads").len(), 200);
        drop((store, group, other, before));
        runtime.clock.sleep(Duration::from_millis(50)).await;
        // The same from disk, with indexes and without.
        for step in 0..2 {
            let store = Store::open(&runtime, "log".into(), options()).expect("opens again");
            assert_eq!(content(&store, id(1)).expect("reads"), found, "step {step}");
            let view = store.group(id(1)).expect("opens").view();
            assert_eq!((view.vote, view.epoch), (Some(vote.clone()), Epoch(9)));
            drop(store);
            runtime.clock.sleep(Duration::from_millis(50)).await;
            for name in runtime.disk.list(Path::new("log")).expect("lists") {
                if name.ends_with(".idx") {
                    runtime.disk.remove(&Path::new("log").join(name)).expect("removed");
                }
            }
        }
    });
}

#[test]
fn a_group_begins_behind_its_base_and_is_removed_for_good() {
    let world = World::new(2);
    let runtime = world.node(NODE);
    run(&world, async move {
        let store = Store::open(&runtime, "log".into(), options()).expect("opens");
        let group = store.group(id(1)).expect("opens");
        for position in 1..=50 {
            group.write(vec![entry(position, 1)]).await.expect("written");
        }
        // Inside: what is before it is not shown any more.
        let members = Some(Bytes::from_static(b"1, 2, 3"));
        let base = Write::Base { position: Position(30), epoch: Epoch(1), members: members.clone() };
        group.write(vec![base]).await.expect("written");
        assert_eq!((group.first(), group.view().last), (Position(31), Position(50)));
        // Behind the end: nothing is left.
        let base = Write::Base { position: Position(900), epoch: Epoch(4), members };
        group.write(vec![base, entry(901, 4)]).await.expect("written");
        assert_eq!((group.first(), group.view().last), (Position(901), Position(901)));
        assert_eq!(content(&store, id(1)).expect("reads").len(), 1);
        for position in 902..=1000 {
            group.write(vec![entry(position, 4)]).await.expect("written");
        }
        let other = store.group(id(2)).expect("opens");
        other.write(vec![entry(1, 1)]).await.expect("written");
        drop((store, group, other));
        runtime.clock.sleep(Duration::from_millis(50)).await;
        let store = Store::open(&runtime, "log".into(), options()).expect("opens again");
        assert_eq!(content(&store, id(1)).expect("reads").len(), 100);
        let view = store.group(id(1)).expect("opens").view();
        assert_eq!((view.base, view.members.len()), ((Position(900), Epoch(4)), 1));
        store.remove(id(1)).await.expect("removed");
        assert!(store.group(id(1)).is_err(), "a log begins anew as another incarnation");
        assert_eq!(store.groups(), [id(2)]);
        let again = LogletId { incarnation: 9, ..id(1) };
        store.group(again).expect("another").write(vec![entry(1, 1)]).await.expect("written");
        let other = store.group(id(2)).expect("opens");
        for position in 2..=100 {
            other.write(vec![entry(position, 1)]).await.expect("written");
        }
        drop((store, other));
        runtime.clock.sleep(Duration::from_millis(50)).await;
        let store = Store::open(&runtime, "log".into(), options()).expect("opens again");
        assert_eq!(store.groups(), [again, id(2)]);
        assert!(store.group(id(1)).is_err(), "also after a start");
    });
}

/// Writes three groups, and says where the last three records of each begin and end.
fn three_groups(world: &World) -> Vec<(LogletId, u64, u64)> {
    let runtime = world.node(NODE);
    run(world, async move {
        let store = Store::open(&runtime, "log".into(), Options { segment_bytes_max: 1 << 20, ..options() })
            .expect("opens");
        for position in 1..=12 {
            for number in 1..=3 {
                let group = store.group(id(number)).expect("opens");
                group.write(vec![entry(position, 1)]).await.expect("written");
            }
        }
        // So that what lies before it was synced is known.
        runtime.clock.sleep(Duration::from_millis(50)).await;
    });
    world.crash(NODE);
    let mut reader = crate::SegmentReader::open(&*world.disk(NODE), Path::new("log"), 1).expect("opens");
    let mut places = Vec::new();
    loop {
        let begin = reader.offset();
        let Some(record) = reader.next_record().expect("reads") else { break };
        places.push((record.group, begin, reader.offset()));
    }
    places.split_off(places.len() - 9)
}

#[test]
fn a_flipped_byte_keeps_its_group_alone_from_being_opened() {
    let world = World::new(3);
    let places = three_groups(&world);
    let disk = world.disk(NODE);
    let path = Path::new("log/0000000000000001.log");
    let mut flips = 0;
    for (group, begin, end) in places {
        for offset in begin..end {
            for mask in [0x01, 0x40] {
                assert!(disk.corrupt(path, offset, mask));
                let runtime = world.node(NODE);
                run(&world, async move {
                    let store = Store::open(&runtime, "log".into(), options())
                        .unwrap_or_else(|e| panic!("the flip at {offset}: {e}"));
                    let quarantined: Vec<LogletId> = store.quarantined().into_keys().collect();
                    assert_eq!(quarantined, [group], "the flip at {offset}");
                    assert!(matches!(store.group(group), Err(LogFault::Corrupt { .. })));
                    for number in 1..=3 {
                        if id(number) != group {
                            assert_eq!(content(&store, id(number)).expect("reads").len(), 12);
                        }
                    }
                });
                // An engine with one copy opens nothing.
                let strict = crate::internals::recover(&*disk, Path::new("log"), 0).map(drop);
                assert!(matches!(strict, Err(LogFault::Corrupt { .. })), "the flip at {offset}: {strict:?}");
                disk.corrupt(path, offset, mask);
                flips += 1;
            }
        }
    }
    assert!(flips > 900, "{flips} flips");
}

mod closed {
    use clutch_runtime::Disk as _;

    use super::*;

    /// These bytes of a record of a closed segment are damaged, and it is read. What is in quarantine after the next start.
    fn quarantined_after_damage_was_read(damaged: &'static [u64]) -> Vec<LogletId> {
        let world = World::new(5);
        let places = three_groups(&world);
        let (group, begin, _) = places[4];
        let runtime = world.node(NODE);
        let disk = world.disk(NODE);
        run(&world, async move {
            let store = Store::open(&runtime, "log".into(), options()).expect("opens");
            go_on_without(&store, group, 0).await;
            runtime.clock.sleep(Duration::from_millis(50)).await;
            drop(store);
            assert!(disk.exists(&crate::format::index_path(Path::new("log"), 1)), "the segment is closed");
            for byte in damaged {
                assert!(disk.corrupt(Path::new("log/0000000000000001.log"), begin + byte, 1));
            }
            let store = Store::open(&runtime, "log".into(), options()).expect("opens");
            assert!(store.quarantined().is_empty(), "the index is believed");
            assert!(matches!(content(&store, group), Err(LogFault::Corrupt { .. })));
            drop(store);
            runtime.clock.sleep(Duration::from_millis(50)).await;
            let store = Store::open(&runtime, "log".into(), options()).expect("opens");
            for number in (1..=3).filter(|number| id(*number) != group) {
                assert_eq!(
                    content(&store, id(number)).expect("reads").len(),
                    112,
                    "the others are as they were"
                );
            }
            store.quarantined().into_keys().collect()
        })
    }

    #[test]
    fn damage_that_was_read_is_found_by_the_next_start() {
        assert_eq!(quarantined_after_damage_was_read(&[50]).len(), 1);
        // Behind what cannot be mended nothing would be found, of no group.
        assert_eq!(quarantined_after_damage_was_read(&[4, 5, 9, 17]).len(), 0);
    }

    #[test]
    fn planted_bugs_are_found() {
        mutants::plant(Some(Mutant::DamagedIndexKept));
        let (is_planted, found) = (mutants::planted().is_some(), quarantined_after_damage_was_read(&[50]));
        mutants::plant(None);
        assert_eq!(is_planted, found.is_empty());
    }
}

/// A hundred records more in each group but one, over several segments.
async fn go_on_without(store: &Store, group: LogletId, round: u64) {
    for number in (1..=3).filter(|number| id(*number) != group) {
        let other = store.group(id(number)).expect("opens");
        for position in 13 + round * 100..113 + round * 100 {
            other.write(vec![entry(position, 1)]).await.expect("written");
        }
    }
}

#[test]
fn a_group_that_is_not_opened_can_be_removed_and_the_others_go_on() {
    let world = World::new(4);
    let places = three_groups(&world);
    let (group, begin, _) = places[4];
    assert!(world.disk(NODE).corrupt(Path::new("log/0000000000000001.log"), begin + 50, 1));
    let runtime = world.node(NODE);
    run(&world, async move {
        for round in 0..3 {
            let store = Store::open(&runtime, "log".into(), options()).expect("opens");
            assert_eq!(store.quarantined().into_keys().collect::<Vec<_>>(), [group]);
            go_on_without(&store, group, round).await;
            drop(store);
            runtime.clock.sleep(Duration::from_millis(50)).await;
        }
        let store = Store::open(&runtime, "log".into(), options()).expect("opens");
        store.remove(group).await.expect("removed");
        assert!(store.quarantined().is_empty());
        drop(store);
        runtime.clock.sleep(Duration::from_millis(50)).await;
        let store = Store::open(&runtime, "log".into(), options()).expect("opens");
        assert!(store.quarantined().is_empty() && store.groups().len() == 2);
        for id in store.groups() {
            assert_eq!(content(&store, id).expect("reads").len(), 312);
        }
        drop(store);
        runtime.clock.sleep(Duration::from_millis(50)).await;
        // It does not come back when the segment that says so is closed, either, and may be removed again.
        for round in 3..6 {
            let store = Store::open(&runtime, "log".into(), options()).expect("opens");
            assert!(store.quarantined().is_empty() && store.group(group).is_err(), "round {round}");
            store.remove(group).await.expect("is removed");
            go_on_without(&store, group, round).await;
            drop(store);
            runtime.clock.sleep(Duration::from_millis(50)).await;
        }
    });
}

mod again {
    use super::*;

    /// When a closed segment loses its index because something of another group is damaged.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Lost {
        BeforeStart,
        /// A reader has met the damage.
        WhileOpen,
    }

    /// A group of which a record was damaged is removed and begins again in the same segment, which is closed and loses its index.
    /// How many of its records can be read then, and again when nobody could read the segment from its beginning any more.
    fn read_past_what_was_damaged(lost: Lost) -> Result<(usize, Option<usize>), LogFault> {
        let world = World::new(7);
        let places = three_groups(&world);
        let ((group, begin, _), (other, other_begin, _)) = (places[4], places[5]);
        let (path, disk) = (Path::new("log/0000000000000001.log"), world.disk(NODE));
        assert!(group != other && disk.corrupt(path, begin + 50, 1));
        let runtime = world.node(NODE);
        run(&world, async move {
            let whole = Options { segment_bytes_max: 1 << 20, ..options() };
            let store = Store::open(&runtime, "log".into(), whole).expect("opens");
            store.remove(group).await.expect("removed");
            let nothing = Vote { epoch: Epoch(0), content: Bytes::from_static(b"nothing") };
            store.revive(group, nothing).await.expect("begins again");
            for position in 1..=20 {
                store.group(group).expect("opens").write(vec![entry(position, 3)]).await.expect("written");
            }
            drop(store);
            runtime.clock.sleep(Duration::from_millis(50)).await;
            let store = Store::open(&runtime, "log".into(), options()).expect("opens");
            go_on_without(&store, group, 0).await;
            drop(store);
            runtime.clock.sleep(Duration::from_millis(50)).await;
            let index = crate::format::index_path(Path::new("log"), 1);
            assert!(runtime.disk.exists(&index), "the segment is closed");
            let open = || Store::open(&runtime, "log".into(), options()).expect("opens");
            let opened = (lost == Lost::WhileOpen).then(open);
            assert!(disk.corrupt(path, other_begin + 50, 1));
            let store = match opened {
                Some(store) => {
                    content(&store, other).expect_err("it is damaged");
                    assert!(!runtime.disk.exists(&index), "the next start finds it");
                    store
                }
                None => {
                    runtime.disk.remove(&index).expect("it is there");
                    let store = open();
                    assert_eq!(store.quarantined().into_keys().collect::<Vec<_>>(), [other]);
                    store
                }
            };
            let first = content(&store, group)?.len();
            for byte in [4, 5, 9, 17] {
                assert!(disk.corrupt(path, other_begin + byte, 1));
            }
            Ok((first, content(&store, group).ok().map(|records| records.len())))
        })
    }

    #[test]
    fn what_was_damaged_before_it_was_removed_is_not_in_the_way_and_looked_at_once() {
        for lost in [Lost::BeforeStart, Lost::WhileOpen] {
            assert_eq!(read_past_what_was_damaged(lost).expect("reads"), (20, Some(20)), "{lost:?}");
        }
    }

    #[test]
    fn planted_bugs_are_found() {
        for mutant in [Mutant::DamageOutlivesRemoval, Mutant::SegmentScannedForEach] {
            mutants::plant(Some(mutant));
            let (is_planted, read) =
                (mutants::planted().is_some(), read_past_what_was_damaged(Lost::WhileOpen));
            mutants::plant(None);
            assert_eq!(is_planted, !matches!(read, Ok((20, Some(20)))), "{mutant:?}");
        }
    }
}

#[test]
fn a_group_that_was_removed_begins_again_with_nothing_and_only_when_that_is_asked() {
    let world = World::new(6);
    let places = three_groups(&world);
    let (group, begin, _) = places[4];
    assert!(world.disk(NODE).corrupt(Path::new("log/0000000000000001.log"), begin + 50, 1));
    let runtime = world.node(NODE);
    run(&world, async move {
        let nothing = Vote { epoch: Epoch(0), content: Bytes::from_static(b"nothing") };
        let open = || Store::open(&runtime, "log".into(), options()).expect("opens");
        let store = open();
        assert!(store.revive(group, nothing.clone()).await.is_err(), "it is damaged, and there");
        store.remove(group).await.expect("removed");
        let something = Vote { epoch: Epoch(1), ..nothing.clone() };
        assert!(store.revive(group, something).await.is_err(), "it would promise something");
        store.revive(group, nothing.clone()).await.expect("begins again");
        assert!(store.revive(group, nothing.clone()).await.is_err(), "it is there");
        drop(store);
        runtime.clock.sleep(Duration::from_millis(50)).await;
        let store = open();
        let opened = store.group(group).expect("opens");
        let view = opened.view();
        assert_eq!((view.last, view.vote, view.base.0), (Position(0), Some(nothing.clone()), Position(0)));
        for id in store.groups().into_iter().filter(|id| *id != group) {
            assert_eq!(content(&store, id).expect("reads").len(), 12, "the others are as they were");
        }
        // What it has from now on is its own, over segments and starts.
        for position in 1..=150 {
            opened.write(vec![entry(position, 3)]).await.expect("written");
        }
        drop((opened, store));
        runtime.clock.sleep(Duration::from_millis(50)).await;
        for _ in 0..2 {
            let store = open();
            let held = content(&store, group).expect("reads");
            assert!(held.len() == 150 && held.iter().all(|(_, epoch, _)| *epoch == 3), "{held:?}");
            drop(store);
            runtime.clock.sleep(Duration::from_millis(50)).await;
        }
        // A node that never had anything of it begins as well.
        let store = open();
        store.revive(id(9), nothing.clone()).await.expect("begins");
        assert_eq!(store.group(id(9)).expect("opens").view().vote, Some(nothing));
    });
}

#[test]
fn a_group_that_begins_late_begins_with_whatever_its_engine_writes() {
    let vote = || Write::Vote(Vote { epoch: Epoch(4), content: Bytes::from_static(b"for 1") });
    let base = |position| Write::Base { position: Position(position), epoch: Epoch(4), members: None };
    let firsts = [
        (vec![vote()], 0),
        (vec![Write::Truncate { from: Position(1) }], 0),
        (vec![base(0)], 0),
        (vec![base(7)], 7),
        (vec![vote(), entry(1, 4)], 1),
    ];
    for (seed, (first, last)) in firsts.into_iter().enumerate() {
        let world = World::new(seed as u64);
        let runtime = world.node(NODE);
        run(&world, async move {
            let store = Store::open(&runtime, "log".into(), options()).expect("opens");
            // The segment has begun, and does not know the other group.
            store.group(id(1)).expect("opens").write(vec![entry(1, 1)]).await.expect("written");
            let group = store.group(id(2)).expect("opens");
            group.write(first).await.expect("written");
            assert_eq!(group.view().last, Position(last));
            drop((store, group));
            runtime.clock.sleep(Duration::from_millis(50)).await;
            let store = Store::open(&runtime, "log".into(), options()).expect("opens again");
            let group = store.group(id(2)).expect("opens");
            assert_eq!(group.view().last, Position(last));
            group.write(vec![entry(last + 1, 5)]).await.expect("goes on");
        });
    }
}

#[test]
fn a_seal_that_is_taken_away_is_none_and_what_is_removed_takes_nothing() {
    let world = World::new(8);
    let runtime = world.node(NODE);
    run(&world, async move {
        let store = Store::open(&runtime, "log".into(), options()).expect("opens");
        let group = store.group(id(1)).expect("opens");
        let seal = |position, epoch| Write::Record {
            kind: RecordKind::Seal,
            position: Position(position),
            epoch: Epoch(epoch),
            entries: vec![],
        };
        group.write(vec![entry(1, 9), seal(2, 9)]).await.expect("written");
        // As long as the seal may be taken away again the log may go on, and the first seal is the one that counts.
        group.write(vec![entry(3, 9), seal(4, 9)]).await.expect("written");
        assert_eq!(group.view().sealed, Some(Position(2)));
        let batch = vec![Bytes::from_static(b"x")];
        assert!(matches!(group.append(Epoch(9), batch), Err(clutch_log::Rejected::Sealed)));
        // A later reign may send records of an earlier one.
        let older = Write::Record {
            kind: RecordKind::Epoch,
            position: Position(2),
            epoch: Epoch(7),
            entries: vec![],
        };
        group.write(vec![Write::Truncate { from: Position(2) }, older]).await.expect("written");
        group.write(vec![entry(3, 10)]).await.expect("written");
        let view = group.view();
        assert_eq!((view.sealed, view.epoch, view.last), (None, Epoch(10), Position(3)));
        let too_far = Write::Base { position: Position(u64::MAX), epoch: Epoch(1), members: None };
        assert!(matches!(group.write(vec![too_far]).await, Err(LogFault::Unsupported(_))));
        let nobody = Write::Record {
            kind: RecordKind::Members,
            position: Position(4),
            epoch: Epoch(10),
            entries: vec![],
        };
        assert!(matches!(group.write(vec![nobody]).await, Err(LogFault::Unsupported(_))));
        let large = Write::Vote(Vote { epoch: Epoch(1), content: Bytes::from(vec![1; 20 << 10]) });
        assert!(matches!(group.write(vec![large]).await, Err(LogFault::Unsupported(_))));
        // In one call, and by whoever still has the group.
        group.write(vec![entry(4, 11), Write::Remove]).await.expect("written");
        assert!(group.begin_epoch().await.is_err() && group.seal().await.is_err());
        assert!(group.write(vec![entry(1, 12)]).await.is_err());
        drop((store, group));
        runtime.clock.sleep(Duration::from_millis(50)).await;
        let store = Store::open(&runtime, "log".into(), options()).expect("opens again");
        assert_eq!(store.groups(), []);
    });
}

/// What a group must hold after a power cut: everything that was answered, and of what was asked for after that a beginning.
#[derive(Clone, Default, PartialEq, Debug)]
struct Expected {
    base: u64,
    /// Terms of the positions behind the base.
    terms: Vec<u64>,
    vote: Option<u64>,
}

impl Expected {
    fn apply(&mut self, write: &Write) {
        match write {
            Write::Record { position, epoch, .. } => {
                assert_eq!(position.0, self.base + self.terms.len() as u64 + 1);
                self.terms.push(epoch.0);
            }
            Write::Vote(vote) => self.vote = Some(vote.epoch.0),
            Write::Truncate { from } => self.terms.truncate((from.0 - self.base - 1) as usize),
            Write::Base { position, .. } => {
                let gone = (position.0 - self.base).min(self.terms.len() as u64) as usize;
                self.terms.drain(..gone);
                self.base = position.0;
            }
            Write::Remove => unreachable!("groups are not removed here"),
        }
    }

    fn of(store: &Store, id: LogletId) -> Expected {
        let view = store.group(id).expect("opens").view();
        let terms = content(store, id).expect("reads").into_iter().map(|(_, term, _)| term).collect();
        Expected { base: view.base.0.0, terms, vote: view.vote.map(|vote| vote.epoch.0) }
    }
}

/// Something that may be written next, by drawn numbers.
fn drawn(expected: &Expected, term: u64, mut below: impl FnMut(u64) -> u64) -> Vec<Write> {
    let mut after = expected.clone();
    let mut writes = Vec::new();
    for _ in 0..1 + below(3) {
        let last = after.base + after.terms.len() as u64;
        let write = match below(12) {
            0 => Write::Vote(Vote { epoch: Epoch(term), content: Bytes::from_static(b"granted") }),
            1 if !after.terms.is_empty() => {
                Write::Truncate { from: Position(last + 1 - below(after.terms.len() as u64).min(6)) }
            }
            2 => Write::Base {
                position: Position(after.base + below(after.terms.len() as u64 + 1)),
                epoch: Epoch(term),
                members: None,
            },
            3 if below(8) == 0 => {
                Write::Base { position: Position(last + below(5)), epoch: Epoch(term), members: None }
            }
            _ => entry(last + 1, term),
        };
        after.apply(&write);
        writes.push(write);
    }
    writes
}

/// How each group stood after what was answered, and what it may be after what was not.
#[derive(Clone, Default)]
struct Known {
    answered: [Expected; 3],
    asked: [Vec<Expected>; 3],
}

/// One life of a node: everything is as it may be, and then it goes on until the power is cut.
async fn life(
    runtime: clutch_runtime::Runtime,
    disk: Arc<SimDisk>,
    known: Arc<Mutex<Known>>,
    cut: u64,
    what: String,
) {
    let options = Options { segment_bytes_max: 3 << 10, may_quarantine: false, ..options() };
    let store = Store::open(&runtime, "log".into(), options).unwrap_or_else(|e| panic!("{what}: {e}"));
    {
        let mut known = known.lock();
        for number in 0..3 {
            let found = Expected::of(&store, id(number as u32 + 1));
            let asked = std::mem::take(&mut known.asked[number]);
            assert!(
                found == known.answered[number] || asked.contains(&found),
                "{what}, group {number}: {found:?}, answered {:?}, asked for {asked:?}",
                known.answered[number]
            );
            known.answered[number] = found;
        }
    }
    disk.cut_power_after(1 + runtime.random.below(25));
    for step in 0..40 {
        let number = runtime.random.below(3) as usize;
        let mut after = known.lock().answered[number].clone();
        let mut writes = drawn(&after, cut * 100 + step + 1, |below| runtime.random.below(below));
        // Sometimes two calls, of which nobody waits for the first.
        let second = if runtime.random.below(2) == 0 { writes.split_off(writes.len() / 2) } else { vec![] };
        let writes = [writes, second];
        for write in writes.iter().flatten() {
            after.apply(write);
            // A beginning of it may be there.
            known.lock().asked[number].push(after.clone());
        }
        let group = store.group(id(number as u32 + 1)).expect("opens");
        let [first, second] = writes.map(|writes| group.write(writes));
        if first.await.is_err() || second.await.is_err() {
            break;
        }
        let mut known = known.lock();
        known.answered[number] = after;
        known.asked[number].clear();
    }
}

/// Power is cut at a drawn step of the disk, which keeps what it likes of what was not synced.
#[test]
fn ten_thousand_cuts_of_power_lose_nothing_that_was_answered() {
    let mut unanswered = 0;
    for seed in 0..500 {
        let world = World::new(seed);
        let known = Arc::new(Mutex::new(Known::default()));
        for cut in 0..20 {
            let (runtime, disk) = (world.node(NODE), world.disk(NODE));
            disk.heal();
            run(&world, life(runtime, disk, known.clone(), cut, format!("seed {seed}, cut {cut}")));
            world.crash(NODE);
            unanswered += known.lock().asked.iter().filter(|asked| !asked.is_empty()).count();
        }
    }
    assert!(unanswered > 5_000, "in {unanswered} of 10,000 cuts something was on its way");
}
