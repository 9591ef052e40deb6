//! What readers are promised, and proposers, while nothing is wrong.

use super::*;

/// Futures of readers are dropped all the time, by deadlines and by selects.
pub(super) async fn a_dropped_wait_loses_nothing(harness: &dyn Harness) {
    let runtime = harness.runtime();
    let log = harness.leader().await;
    let start = log.status().bounds.last.next();
    let mut reader = Reader::new(&log, &runtime, start);
    let epoch = reader.until_leading().await;
    let commits: Vec<_> = (0..20)
        .map(|i| log.propose(epoch, vec![entry(&format!("dropped {i}"))]))
        .collect::<Result<_, _>>()
        .expect("this node leads");
    let mut expected = Vec::new();
    for commit in commits {
        // Hardly ever long enough.
        let wait = Duration::from_micros(1 + runtime.random.below(200));
        if let Some(event) = runtime.timeout(wait, reader.events.next()).await {
            reader.take(event.expect("events"));
        }
        expected.extend(position_of(commit.await));
    }
    reader.until_position(*expected.last().expect("a calm log commits")).await;
    let seen: Vec<Position> = reader.seen.iter().map(|batch| batch.position).collect();
    assert!(expected.iter().all(|position| seen.contains(position)), "{expected:?} of {seen:?}");
}

/// Who does not wait for the outcome has proposed all the same.
pub(super) async fn a_dropped_commit_is_proposed(harness: &dyn Harness) {
    let runtime = harness.runtime();
    let log = harness.leader().await;
    let start = log.status().bounds.last.next();
    let mut reader = Reader::new(&log, &runtime, start);
    let epoch = reader.until_leading().await;
    for i in 0..5 {
        drop(log.propose(epoch, vec![entry(&format!("not waited for {i}"))]).expect("this node leads"));
    }
    let end = committed(harness, "after what nobody waits for").await;
    reader.until_position(end).await;
    for i in 0..5 {
        let times = reader.times(&format!("not waited for {i}"));
        assert_eq!(times, 1, "a leader that stays loses nothing");
    }
}

/// A reader begins anywhere, also behind the end, and sees what is there and nothing before.
pub(super) async fn readers_begin_anywhere(harness: &dyn Harness) {
    let runtime = harness.runtime();
    let first = committed(harness, "anywhere: first").await;
    committed(harness, "anywhere: second").await;
    let third = committed(harness, "anywhere: third").await;
    for log in harness.all().await {
        let mut all = Reader::new(&log, &runtime, first);
        all.until_position(third).await;
        for from in first.0..=third.0 {
            let mut reader = Reader::new(&log, &runtime, Position(from));
            reader.until_position(third).await;
            let expected: Vec<&Batch> = all.seen.iter().filter(|batch| batch.position.0 >= from).collect();
            assert_eq!(reader.seen.iter().collect::<Vec<_>>(), expected, "from {from}");
        }
    }
    let log = harness.leader().await;
    let mut ahead = Reader::new(&log, &runtime, Position(log.status().bounds.last.0 + 3));
    let end = loop {
        let end = committed(harness, "anywhere: ahead").await;
        if end > ahead.last {
            break end;
        }
    };
    ahead.until_position(end).await;
    assert_eq!(ahead.seen.first().map(|batch| batch.position), Some(end));
}

/// Two proposers at a time: each one's batches keep their order, and nothing comes twice.
pub(super) async fn proposers_keep_their_order(harness: &dyn Harness) {
    let runtime = harness.runtime();
    let log = harness.leader().await;
    let start = log.status().bounds.last.next();
    let mut reader = Reader::new(&log, &runtime, start);
    let epoch = reader.until_leading().await;
    let (done, mut ended) = tokio::sync::mpsc::unbounded_channel();
    for proposer in ["left", "right"] {
        let (log, done, clock) = (log.clone(), done.clone(), runtime.clock.clone());
        runtime.spawn("proposer", async move {
            let mut positions = Vec::new();
            for i in 0..30 {
                let commit =
                    log.propose(epoch, vec![entry(&format!("{proposer} {i}"))]).expect("this node leads");
                positions.push(commit);
                if i % 7 == 0 {
                    clock.sleep(Duration::from_micros(50)).await;
                }
            }
            let mut committed = Vec::new();
            for commit in positions {
                committed.extend(position_of(commit.await));
            }
            // The suite waits for both.
            let _ = done.send(committed);
        });
    }
    let mut last = Position(0);
    for _ in 0..2 {
        let positions = runtime.timeout(PATIENCE, ended.recv()).await.flatten().expect("a proposer ends");
        assert!(positions.windows(2).all(|pair| pair[0] < pair[1]), "in order: {positions:?}");
        last = last.max(*positions.last().expect("thirty"));
    }
    reader.until_position(last).await;
    for proposer in ["left", "right"] {
        let texts: Vec<Bytes> = (0..30).map(|i| entry(&format!("{proposer} {i}"))).collect();
        let seen: Vec<&Bytes> =
            reader.seen.iter().flat_map(|b| &b.entries).filter(|e| texts.contains(e)).collect();
        assert_eq!(seen, texts.iter().collect::<Vec<_>>());
    }
}

/// More than the engine takes at once: it says so, loses nothing of what it took, and goes on.
pub(super) async fn overload_is_said(harness: &dyn Harness) {
    let runtime = harness.runtime();
    let log = harness.leader().await;
    let start = log.status().bounds.last.next();
    let mut reader = Reader::new(&log, &runtime, start);
    let epoch = reader.until_leading().await;
    let mut taken = Vec::new();
    for i in 0..5000_u32 {
        match log.propose(epoch, vec![entry(&format!("many {i}"))]) {
            Ok(commit) => taken.push((i, commit)),
            Err(Rejected::Overloaded) => {}
            Err(other) => panic!("rejected for another reason: {other}"),
        }
    }
    let mut last = Position(0);
    for (i, commit) in taken {
        let outcome = runtime.timeout(PATIENCE, commit).await.expect("an outcome");
        let position = position_of(outcome).unwrap_or_else(|| panic!("{i} was taken, and: {outcome:?}"));
        assert!(position > last, "{position} after {last}");
        last = position;
    }
    reader.until_position(last).await;
    committed(harness, "after all that").await;
}

/// Waits until every member was given everything up to there: nobody has floors ahead of that.
async fn everybody_has(harness: &dyn Harness, upto: Position) {
    for part in harness.members().await {
        Reader::new(&part.log, &harness.runtime(), upto).until_position(upto).await;
        harness.applied(part.node, upto).await;
    }
}

/// What has been said to be needed is not forgotten, and a floor that falls brings nothing back.
pub(super) async fn floors_only_rise(harness: &dyn Harness) {
    let runtime = harness.runtime();
    let mut positions = Vec::new();
    for i in 0..40 {
        positions.push(committed(harness, &format!("kept {i}")).await);
    }
    let needed = positions[20];
    let last = *positions.last().expect("forty");
    everybody_has(harness, last).await;
    for log in harness.all().await {
        log.set_floors(Floors { retain: Position(needed.0 - 1), snapshot: last, flushed: last })
            .await
            .expect("floors");
        let first = log.status().bounds.first;
        assert!(first <= needed, "{needed} is needed, and the log begins at {first}");
        log.set_floors(Floors::default()).await.expect("lower floors");
        assert_eq!(log.status().bounds.first, first);
    }
    for log in harness.all().await {
        let mut reader = Reader::new(&log, &runtime, needed);
        reader.until_position(*positions.last().expect("forty")).await;
        assert_eq!(reader.seen.first().map(|batch| batch.position), Some(needed));
    }
}

/// What can be asked for what a trimmed log still has, or a snapshot comes, or it is said that it is gone.
pub(super) async fn trimming_is_a_request(harness: &dyn Harness) {
    let last = committed(harness, "before the trim").await;
    everybody_has(harness, last).await;
    for log in harness.all().await {
        log.set_floors(Floors { retain: last, snapshot: last, flushed: last })
            .await
            .expect("a request is taken");
    }
    let log = harness.leader().await;
    let bounds = log.status().bounds;
    assert!(bounds.last >= last);
    if bounds.first.0 > 1 && !harness.restores() {
        let answer = log.events(Position(1)).next().await;
        assert!(matches!(answer, Err(LogFault::Trimmed { .. })), "{answer:?}");
    }
    committed(harness, "after the trim").await;
}
