//! A log that several loglets have kept, one after the other, each with a directory of its own or the same.

use clutch_log::{LogletId, VirtualLog};
use clutch_proto::registry;

use super::*;

/// A chain of loglets of `local`: incarnation and base of each.
fn chain(parts: &[(u64, u64)]) -> Chain {
    let segment = |(incarnation, base_position): &(u64, u64)| registry::Segment {
        base_position: *base_position,
        engine: "local".into(),
        parameters: String::new(),
        incarnation: *incarnation,
    };
    let wire = registry::Chain { segments: parts.iter().map(segment).collect() };
    Chain::from_wire(LogId::CDC, &wire).expect("a good chain")
}

fn id(incarnation: u32) -> LogletId {
    LogletId { log: LogId::CDC, incarnation }
}

/// Writes batches to a loglet, whose texts name it; the index of the last.
async fn write(engine: &LocalEngine, incarnation: u32, count: u32) -> Position {
    let log = engine.log(id(incarnation)).await.expect("opens");
    let epoch = log.status().epoch;
    for number in 0..count {
        let text = Bytes::from(format!("{incarnation}: {number}"));
        let outcome = log.propose(epoch, vec![text]).expect("leads").await;
        assert!(matches!(outcome, Outcome::Committed(_)), "{outcome:?}");
    }
    log.status().bounds.last
}

/// A log with a life that was sealed, one that was given up three batches behind what counts of it, one in which nothing was
/// written that counts, and one that has just begun.
async fn lives(engine: &LocalEngine) -> Chain {
    write(engine, 1, 10).await;
    let sealed = engine.log(id(1)).await.expect("opens").seal().await.expect("seals").0;
    let given_up = sealed + write(engine, 4, 8).await.0 - 3;
    write(engine, 5, 2).await;
    chain(&[(1, 0), (4, sealed), (5, given_up), (9, given_up)])
}

async fn open(engine: &Arc<LocalEngine>, chain: Chain) -> Result<VirtualLog, LogFault> {
    VirtualLog::open(&Engines::one("local", engine.clone()), chain, Arc::new(NoSnapshots)).await
}

/// Runs in a world of its own.
fn simulated<T: Send + 'static, F: Future<Output = T> + Send + 'static>(
    task: impl FnOnce(Runtime, Arc<LocalEngine>) -> F,
) -> T {
    let world = World::new(3);
    let runtime = world.node(NODE);
    let engine = Arc::new(LocalEngine::open(&runtime, "log".into(), small()).expect("opens"));
    world.run(NODE, Duration::from_secs(600), task(runtime, engine)).expect("ends")
}

#[test]
fn conforms_behind_other_lives() {
    for seed in 0..10 {
        let world = World::new(seed);
        let runtime = world.node(NODE);
        let done = world.run(NODE, Duration::from_secs(600), async move {
            let engine = LocalEngine::open(&runtime, "log".into(), small()).expect("opens");
            let chain = Some(lives(&engine).await);
            drop(engine);
            runtime.clock.sleep(Duration::from_millis(50)).await;
            let harness = LocalHarness { runtime, dir: "log".into(), chain, open: Default::default() };
            conformance::full(&harness).await;
        });
        assert!(done.is_some(), "seed {seed} got stuck");
    }
}

#[test]
fn a_reader_walks_from_life_to_life() {
    simulated(|_, engine| async move {
        let chain = lives(&engine).await;
        let ends: Vec<u64> = chain.loglets().iter().map(|spec| spec.base.0).collect();
        let log = open(&engine, chain).await.expect("opens");
        let epoch = log.status().epoch;
        assert_eq!(epoch.incarnation(), 9);
        let old = log.propose(Epoch(1), vec![Bytes::from_static(b"of the first life")]).err();
        assert!(matches!(old, Some(Rejected::NotLeader { epoch: Epoch(1), .. })), "{old:?}");
        let at = log.propose(epoch, vec![Bytes::from_static(b"9: 0")]).expect("leads").await;
        assert_eq!(at, Outcome::Committed(Position(ends[3] + 2)), "behind the record of its reign");
        let mut whole = Vec::new();
        for from in 0..=ends[3] + 2 {
            let mut events = log.events(Position(from));
            let (mut last, mut seen) = (from.max(1) - 1, Vec::new());
            while last < ends[3] + 2 {
                match events.next().await.expect("events") {
                    Event::Committed(batch) => {
                        assert_eq!(batch.position.0, last + 1, "each position once, from {from}");
                        last = batch.position.0;
                        seen.push((last, batch.epoch, batch.entries[0].clone()));
                    }
                    Event::Gap { to } => {
                        assert!(to.0 > last, "from {from}: a gap to {to} after {last}");
                        last = to.0;
                    }
                    Event::Leader { epoch: told, is_self, .. } => {
                        assert_eq!((told, is_self), (epoch, true), "nobody leads what is over");
                    }
                    other => panic!("from {from}: {other:?}"),
                }
            }
            if from == 0 {
                whole = seen.clone();
            }
            let expected: Vec<_> = whole.iter().filter(|(at, ..)| *at >= from).cloned().collect();
            assert_eq!(seen, expected, "from {from}");
        }
        let texts: Vec<&[u8]> = whole.iter().map(|(_, _, text)| &text[..]).collect();
        let expected: Vec<String> = (0..10)
            .map(|number| format!("1: {number}"))
            .chain((0..5).map(|number| format!("4: {number}")))
            .chain(["9: 0".to_owned()])
            .collect();
        assert_eq!(texts, expected.iter().map(String::as_bytes).collect::<Vec<_>>());
        assert!(whole.is_sorted_by_key(|(_, epoch, _)| *epoch), "reigns grow");
    });
}

#[test]
fn floors_bounds_and_batches_are_the_logs_own() {
    simulated(|_, engine| async move {
        let chain = lives(&engine).await;
        let ends: Vec<u64> = chain.loglets().iter().map(|spec| spec.base.0).collect();
        let engines = Engines::one("local", engine.clone());
        let bounds = |first, last| Bounds { first: Position(first), last: Position(last) };
        assert_eq!(engines.bounds(&chain).expect("reads"), bounds(1, ends[3]), "before it is opened");
        let log = open(&engine, chain.clone()).await.expect("opens");
        assert_eq!(log.status().bounds, bounds(1, ends[3] + 1));
        for position in [0, 1, 2, ends[1], ends[1] + 2, ends[3], ends[3] + 1, ends[3] + 9] {
            let batch = engines.batch(&chain, Position(position)).expect("reads");
            let expected = match position {
                2 => Some("1: 0".to_owned()),
                _ if position == ends[1] + 2 => Some("4: 0".to_owned()),
                _ if position == ends[3] => Some("4: 4".to_owned()),
                _ => None,
            };
            let found = batch.map(|batch| {
                assert_eq!(batch.position, Position(position));
                String::from_utf8(batch.entries[0].to_vec()).expect("a text")
            });
            assert_eq!(found, expected, "{position}");
        }
        // What was given up is behind what counts: it is not trimmed into view.
        for floor in [3, ends[1], ends[1] + 4, ends[3]] {
            let all = Position(floor);
            log.set_floors(Floors { retain: all, snapshot: all, flushed: all }).await.expect("trims");
            let first = log.status().bounds.first;
            assert!(first <= all.next(), "{first} of what was trimmed up to {floor}");
            assert_eq!(log.status().bounds.last, Position(ends[3] + 1));
            let mut events = log.events(all.next());
            let seen = events.next().await;
            assert!(seen.is_ok(), "behind {floor}: {seen:?}");
        }
    });
}

#[test]
fn what_was_given_up_keeps_no_segment() {
    simulated(|runtime, engine| async move {
        let chain = lives(&engine).await;
        let log = open(&engine, chain).await.expect("opens");
        let epoch = log.status().epoch;
        // Into a second segment, and a third.
        for _ in 0..6 {
            // Nothing that can be packed.
            let bytes: Vec<u8> = (0..4000).flat_map(|_| runtime.random.u64().to_le_bytes()).collect();
            let outcome = log.propose(epoch, vec![Bytes::from(bytes)]).expect("leads").await;
            assert!(matches!(outcome, Outcome::Committed(_)), "{outcome:?}");
        }
        let before = engine.usage().bytes;
        let all = log.status().bounds.last;
        log.set_floors(Floors { retain: all, snapshot: all, flushed: all }).await.expect("trims");
        for incarnation in [1, 4, 5] {
            let Bounds { first, last } = engine.bounds(id(incarnation)).expect("it is known");
            assert!(first > last, "incarnation {incarnation} still has {first} to {last}");
        }
        assert!(engine.usage().bytes < before / 2, "{} of {before} bytes", engine.usage().bytes);
    });
}

#[test]
fn a_life_that_lacks_records_is_not_opened() {
    simulated(|_, engine| async move {
        write(&engine, 1, 4).await;
        let missing = open(&engine, chain(&[(1, 0), (2, 6)])).await.err().map(|fault| fault.to_string());
        let text = "log storage: cdc has 5 records, and its chain counts 6: the others are missing. Put back the directory of \
                    logs that has them";
        assert_eq!(missing.as_deref(), Some(text));
        assert!(open(&engine, chain(&[(1, 0), (2, 5)])).await.is_ok());
        let other = registry::Segment { engine: "raft".into(), incarnation: 3, ..Default::default() };
        let other = Chain::from_wire(LogId::CDC, &registry::Chain { segments: vec![other] }).expect("good");
        let unknown = open(&engine, other).await.err().map(|fault| fault.to_string());
        let text = "cdc (incarnation 3) is kept by the engine \"raft\", which this node does not have (it has local); start a \
                    build that has it";
        assert_eq!(unknown.as_deref(), Some(text));
    });
}
