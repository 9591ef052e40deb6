//! The end of a log: one last position, for everybody, whatever was on its way.

use super::*;

/// Proposals around a seal: what is behind it certainly has no effect, and its proposer is told.
pub(super) async fn nothing_comes_behind_a_seal(harness: &dyn Harness) {
    let runtime = harness.runtime();
    let log = harness.leader().await;
    let start = log.status().bounds.last.next();
    let mut reader = Reader::new(&log, &runtime, start);
    let epoch = reader.until_leading().await;
    let mut commits = Vec::new();
    let propose = |i: usize| (i, log.propose(epoch, vec![entry(&format!("around the seal {i}"))]));
    commits.extend((0..20).map(propose));
    let (done, sealed) = tokio::sync::oneshot::channel();
    let sealer = log.clone();
    runtime.spawn("seals", async move {
        // The suite waits for it.
        let _ = done.send(sealer.seal().await);
    });
    for i in 20..60 {
        commits.push(propose(i));
        if i % 10 == 0 {
            runtime.clock.sleep(Duration::from_micros(30)).await;
        }
    }
    let tail = runtime.timeout(PATIENCE, sealed).await.expect("it seals").expect("an answer").expect("seals");
    reader.until("the seal", |_, event| matches!(event, Event::Sealed { .. })).await;
    for (i, commit) in commits {
        let times = reader.times(&format!("around the seal {i}"));
        match commit {
            Err(Rejected::Sealed | Rejected::NotLeader { .. }) => assert_eq!(times, 0, "{i} was rejected"),
            Err(other) => panic!("rejected for another reason: {other}"),
            Ok(commit) => match runtime.timeout(PATIENCE, commit).await.unwrap_or(Outcome::Unknown) {
                Outcome::Committed(position) => {
                    assert!(position <= tail && times == 1, "{i} at {position}, the end is {tail}");
                }
                Outcome::Sealed | Outcome::Refused(_) => assert_eq!(times, 0, "{i} has no effect"),
                Outcome::Unknown => assert!(times <= 1),
            },
        }
    }
    assert!(reader.seen.iter().all(|batch| batch.position <= tail));
}

/// The end is where it is for everybody: those who ask again, late readers, other members, after a restart.
pub(super) async fn sealing_ends_the_log(harness: &dyn Harness) {
    let runtime = harness.runtime();
    let log = harness.leader().await;
    let epoch = log.status().epoch;
    let tail = log.seal().await.expect("seals");
    assert_eq!(log.seal().await.expect("seals again"), tail);
    assert_eq!(log.status().sealed, Some(tail));
    let refused = log.propose(epoch, vec![entry("too late")]).err();
    assert!(matches!(refused, Some(Rejected::Sealed | Rejected::NotLeader { .. })), "{refused:?}");
    for log in harness.all().await {
        for from in [tail, tail.next()] {
            let mut reader = Reader::new(&log, &runtime, from);
            reader.until("the seal", |_, e| matches!(e, Event::Sealed { tail: at } if *at == tail)).await;
        }
    }
    if harness.restart().await {
        let log = harness.leader().await;
        assert_eq!(log.seal().await.expect("still sealed"), tail);
        let mut reader = Reader::new(&log, &runtime, tail);
        reader.until("the seal", |_, e| matches!(e, Event::Sealed { tail: at } if *at == tail)).await;
    }
}
