//! Whoever follows the records names exactly what is missing.

use clutch_log::{Epoch, LogFault, LogId, Position};

use crate::{
    Continuity, Record, RecordKind,
    format::{GroupLine, encode_group, segment_name},
};

fn groups(lines: &[(LogId, u64)]) -> Record {
    let line = |(log, last): &(LogId, u64)| {
        let line = GroupLine::new(*log, Position(*last), Epoch(1), None);
        encode_group(&line)
    };
    Record {
        kind: RecordKind::Groups,
        group: LogId { role: 0, number: 0 }.into(),
        position: Position(0),
        epoch: Epoch(0),
        entries: lines.iter().map(line).collect(),
    }
}

fn record(log: LogId, position: u64) -> Record {
    Record {
        kind: RecordKind::Batch,
        group: log.into(),
        position: Position(position),
        epoch: Epoch(1),
        entries: vec![],
    }
}

/// What is wrong, where: position, file, sentence.
fn fault(result: Result<(), LogFault>) -> (u64, String, String) {
    match result {
        Err(LogFault::Corrupt { position, file, what, .. }) => (position.0, file, what),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_does_not_follow_is_named_with_its_file_and_its_positions() {
    let (cdc, other) = (LogId::CDC, LogId::shard(4));
    let follow = || {
        let mut continuity = Continuity::default();
        continuity.begin(7, &groups(&[(cdc, 4), (other, 0)])).expect("the first says where all begins");
        continuity.record(&record(cdc, 5), 100).expect("follows");
        continuity.span(cdc.into(), Position(6), Position(9), 32).expect("follows");
        continuity
    };
    let (seventh, eighth) = (segment_name(7), segment_name(8));
    let (position, file, what) = fault(follow().record(&record(cdc, 12), 300));
    assert_eq!((position, &file), (10, &seventh));
    assert!(what.starts_with("positions 10 to 11 of "), "{what}");
    let (position, _, what) = fault(follow().record(&record(cdc, 11), 300));
    assert!(position == 10 && what.starts_with("position 10 of "), "{what}");
    for again in [9, 5, 1] {
        let (position, _, what) = fault(follow().record(&record(cdc, again), 300));
        assert_eq!(position, 10);
        assert!(
            what.starts_with(&format!("position {again} of ")) && what.ends_with("comes again after 9"),
            "{what}"
        );
    }
    // An index whose end is before its beginning.
    let (position, _, _) = fault(follow().span(cdc.into(), Position(10), Position(9), 32));
    assert_eq!(position, 10);
    follow().span(cdc.into(), Position(10), Position(10), 32).expect("one is enough");
    // The next segment knows more, less, or nothing of a log.
    follow().begin(8, &groups(&[(cdc, 9)])).expect("follows; a log without records needs no line");
    let (position, file, what) = fault(follow().begin(8, &groups(&[(cdc, 12)])));
    assert_eq!((position, &file), (10, &seventh));
    assert!(what.starts_with("positions 10 to 12 of "), "{what}");
    let (position, file, what) = fault(follow().begin(8, &groups(&[(cdc, 8)])));
    assert_eq!((position, &file), (9, &eighth));
    assert!(
        what.contains("begins after position 8 of") && what.contains(&format!("{seventh} holds 9")),
        "{what}"
    );
    let (position, file, what) = fault(follow().begin(8, &groups(&[])));
    assert_eq!((position, &file), (9, &eighth));
    assert!(what.contains("does not know"), "{what}");
    let mut garbled = groups(&[(cdc, 9)]);
    garbled.entries[0] = garbled.entries[0].slice(..31);
    let (_, file, _) = fault(follow().begin(8, &garbled));
    assert_eq!(file, eighth);
    assert_eq!((follow().last(cdc), follow().last(LogId::shard(5))), (Some(Position(9)), None));
}
