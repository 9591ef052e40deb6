//! Several members: one is cut off, one lags, one has lost its disk, one is restored from a snapshot.

use super::*;

/// A member, and the suite's snapshots of it where it is restored from those.
pub struct Part {
    /// Its id.
    pub node: NodeId,
    /// The log as it sees it.
    pub log: Arc<dyn Log>,
}

async fn parts(harness: &dyn Harness) -> (Part, Part) {
    let log = harness.leader().await;
    let leader = log.status().leader.expect("it leads");
    let members = harness.members().await;
    let other = members.into_iter().find(|part| part.node != leader).expect("another member");
    (Part { node: leader, log }, other)
}

/// Who hears nothing answers no barrier, and learns of everything when it hears again.
pub(super) async fn who_was_cut_off_catches_up(harness: &dyn Harness) {
    let runtime = harness.runtime();
    let (_, other) = parts(harness).await;
    let before = committed(harness, "before the cut").await;
    let mut reader = Reader::new(&other.log, &runtime, before);
    reader.until_position(before).await;
    if !harness.cut_off(other.node, true).await {
        return;
    }
    let end = committed(harness, "without one").await;
    if harness.any_member_answers() {
        let barrier = other.log.read_barrier(Duration::from_millis(500)).await;
        assert!(matches!(barrier, Err(LogFault::NoQuorum { .. })), "cut off, and: {barrier:?}");
    }
    harness.cut_off(other.node, false).await;
    reader.until_position(end).await;
    assert_eq!(reader.times("without one"), 1);
}

/// Leadership goes to whom it is handed, and the reign before has ended for all.
pub(super) async fn leadership_is_handed_over(harness: &dyn Harness) {
    let runtime = harness.runtime();
    let (leader, other) = parts(harness).await;
    let mut reader = Reader::new(&leader.log, &runtime, leader.log.status().bounds.last.next());
    let epoch = reader.until_leading().await;
    match leader.log.transfer_leader(other.node).await {
        Ok(()) => {}
        Err(LogFault::Unsupported(_)) => return,
        // The leader may have changed before it was asked.
        Err(LogFault::NotLeader { .. } | LogFault::NoQuorum { .. }) => return,
        Err(fault) => panic!("a calm log hands leadership over, but: {fault}"),
    }
    let ended =
        |_: &Reader, e: &Event| matches!(e, Event::Leader { epoch: of, is_self: false, .. } if *of == epoch);
    reader.until("the end of the reign", ended).await;
    committed(harness, "under who was handed it").await;
    let by_no_leader = leader.log.propose(epoch, vec![entry("after the hand-over")]).err();
    assert!(matches!(by_no_leader, Some(Rejected::NotLeader { .. })), "{by_no_leader:?}");
    let refused = leader.log.transfer_leader(leader.node).await;
    assert!(
        matches!(refused, Err(LogFault::NotLeader { .. }) | Ok(())),
        "only who leads hands leadership over: {refused:?}"
    );
}

/// A hand-over to who is not there is refused or comes to nothing: the log goes on, and what it had is there.
pub(super) async fn a_hand_over_to_the_dead_loses_nothing(harness: &dyn Harness) {
    let (leader, other) = parts(harness).await;
    let before = committed(harness, "before the dead").await;
    if !harness.cut_off(other.node, true).await {
        return;
    }
    // Whatever it answers.
    let _ = harness.runtime().timeout(PATIENCE, leader.log.transfer_leader(other.node)).await;
    let after = committed(harness, "after the dead").await;
    assert!(after > before);
    harness.cut_off(other.node, false).await;
    let end = committed(harness, "with it again").await;
    let mut reader = Reader::new(&other.log, &harness.runtime(), before);
    reader.until_position(end).await;
    assert_eq!((reader.times("before the dead"), reader.times("after the dead")), (1, 1));
}

/// A member that has lost everything gets everything, from the log or from a snapshot of it.
pub(super) async fn who_lost_its_disk_gets_everything(harness: &dyn Harness) {
    let (_, other) = parts(harness).await;
    let position = committed(harness, "before the loss").await;
    if !harness.wipe(other.node).await {
        return;
    }
    let members = harness.members().await;
    let again = members.into_iter().find(|part| part.node == other.node).expect("it is a member");
    let end = committed(harness, "after the loss").await;
    let mut reader = Reader::new(&again.log, &harness.runtime(), Position(1));
    reader.until_position(end).await;
    let covered = reader.restored >= position || reader.times("before the loss") == 1;
    assert!(covered && (reader.restored >= end || reader.times("after the loss") == 1));
}

/// A reader whose next record was trimmed while it was away is given a snapshot that has it, and then what follows; also when it
/// stood in the middle of the log.
pub(super) async fn who_stays_away_too_long_is_restored(harness: &dyn Harness) {
    if !harness.restores() {
        return;
    }
    let runtime = harness.runtime();
    let (_, other) = parts(harness).await;
    let before = committed(harness, "before it goes").await;
    let mut reader = Reader::new(&other.log, &runtime, before);
    reader.until_position(before).await;
    assert!(harness.cut_off(other.node, true).await, "who restores members can cut one off");
    let mut last = before;
    for i in 0..10 {
        last = committed(harness, &format!("missed {i}")).await;
    }
    for part in harness.members().await.into_iter().filter(|part| part.node != other.node) {
        let floors = Floors { retain: last, snapshot: last, flushed: last };
        harness.applied(part.node, last).await;
        part.log.set_floors(floors).await.expect("floors");
    }
    let first = harness.leader().await.status().bounds.first;
    assert!(first > before.next(), "most of the members need nothing before {last}, and {first} is there");
    harness.cut_off(other.node, false).await;
    let end = committed(harness, "after it came back").await;
    reader.until_position(end).await;
    assert!(reader.restored >= Position(first.0 - 1), "restored at {}, {first} is there", reader.restored);
    assert_eq!(reader.times("after it came back"), usize::from(reader.restored < end));
    // What was on its way when it was cut off may come before the snapshot; [`Reader`] refuses what comes behind it.
    assert!((0..10).all(|i| reader.times(&format!("missed {i}")) <= 1));
    // One that begins anew is restored, too.
    let mut anew = Reader::new(&other.log, &runtime, Position(1));
    anew.until_position(end).await;
    assert!(anew.restored >= Position(first.0 - 1));
}

/// Everything stops at once with proposals on their way: what was acknowledged is there, in order, each once.
pub(super) async fn a_power_cut_of_all_keeps_what_was_acknowledged(harness: &dyn Harness) {
    let runtime = harness.runtime();
    let log = harness.leader().await;
    let start = log.status().bounds.last.next();
    let epoch = Reader::new(&log, &runtime, start).until_leading().await;
    let mut commits: Vec<_> = (0..40)
        .map(|i| log.propose(epoch, vec![entry(&format!("cut {i}"))]).expect("this node leads"))
        .collect();
    let mut acknowledged = Vec::new();
    for (i, commit) in commits.drain(..10).enumerate() {
        acknowledged.extend(position_of(commit.await).map(|position| (i, position)));
    }
    drop((log, commits));
    if !harness.restart().await {
        return;
    }
    let end = committed(harness, "after the cut").await;
    let log = harness.leader().await;
    let mut reader = Reader::new(&log, &runtime, start);
    reader.until_position(end).await;
    for (i, position) in acknowledged {
        let batch =
            reader.seen.iter().find(|batch| batch.position == position).expect("acknowledged, so there");
        assert_eq!(batch.entries, vec![entry(&format!("cut {i}"))]);
    }
    // What was on its way is there as it was proposed, or not at all; and what came first, first.
    let texts: Vec<Bytes> = (0..40).map(|i| entry(&format!("cut {i}"))).collect();
    let found: Vec<usize> = reader
        .seen
        .iter()
        .flat_map(|b| &b.entries)
        .filter_map(|e| texts.iter().position(|t| t == e))
        .collect();
    assert!(found.windows(2).all(|pair| pair[0] < pair[1]), "in order, each once: {found:?}");
}
