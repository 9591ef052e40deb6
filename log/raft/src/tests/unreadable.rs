//! A record that another member needs is damaged at who leads: who has it lets a member lead that can send it, and the log goes on.

use std::path::Path;

use bytes::Bytes;
use clutch_log::{Log as _, Outcome};
use clutch_proto::mutants::{self, Mutant};

use super::*;

/// More, all together, than is kept in memory.
const BATCHES: usize = 12;
const BATCH_BYTES: usize = 600 << 10;

/// Whether a member that was away gets everything, and the log goes on, though the leader cannot read what it lacks.
fn goes_on(seed: u64) -> bool {
    let world = Arc::new(World::new(seed));
    let nodes = Arc::new(Nodes::new(world.clone(), 3));
    let ended = world.run(SimNode(0), Duration::from_secs(600), async move {
        for node in nodes.numbers() {
            nodes.boot(node).await;
        }
        let leader = nodes.leader(None).await;
        let away = nodes.numbers().find(|node| *node != leader).expect("three");
        nodes.crash(away);
        let runtime = nodes.driver();
        let propose = async |node: NodeId| {
            let mut bytes = vec![0; BATCH_BYTES];
            runtime.random.fill(&mut bytes);
            let log = nodes.log(node);
            let Ok(commit) = log.propose(log.status().epoch, vec![Bytes::from(bytes)]) else { return false };
            matches!(runtime.timeout(Duration::from_secs(5), commit).await, Some(Outcome::Committed(_)))
        };
        for _ in 0..BATCHES {
            assert!(propose(leader).await);
        }
        let last = nodes.log(leader).status().bounds.last;
        // What was written since a start is in memory, too.
        for node in nodes.numbers().filter(|node| *node != away) {
            nodes.crash(node);
            nodes.boot(node).await;
        }
        let leader = nodes.leader(None).await;
        let disk = nodes.world.disk(SimNode(leader as u32));
        assert!(disk.corrupt(Path::new("log/0000000000000001.log"), 2 * BATCH_BYTES as u64, 1));
        nodes.boot(away).await;
        let end = runtime.clock.monotonic() + Duration::from_secs(60);
        let has_all = || nodes.log(away).status().bounds.last >= last;
        while !has_all() && runtime.clock.monotonic() < end {
            runtime.clock.sleep(Duration::from_millis(50)).await;
        }
        for _ in 0..5 {
            match nodes.settled(None) {
                Some(leads) if propose(leads).await => {
                    return has_all() && nodes.log(leader).status().fault.is_none();
                }
                _ => runtime.clock.sleep(Duration::from_secs(2)).await,
            }
        }
        false
    });
    ended.expect("it comes to an end")
}

#[test]
fn who_cannot_send_a_record_lets_another_member_lead() {
    assert_eq!([1, 2, 3].map(goes_on), [true; 3]);
}

#[test]
fn planted_bugs_are_found() {
    mutants::plant(Some(Mutant::UnreadableEndsGroup));
    let (is_planted, goes_on) = (mutants::planted().is_some(), goes_on(1));
    mutants::plant(None);
    assert_eq!(goes_on, !is_planted);
}
