//! A member whose disk is full waits for room, and goes on by itself when there is some: what it has is not lost, and the others need not
//! wait for it.

use bytes::Bytes;
use clutch_log::{Log as _, Outcome};
use clutch_proto::mutants::{self, Mutant};
use clutch_runtime::simulated::DiskFaults;

use super::*;

/// More than is set aside when there is room.
const LARGE: usize = 600 << 10;
const BATCHES: u8 = 12;

/// Nothing that could be packed.
fn large(runtime: &Runtime) -> Bytes {
    let mut bytes = vec![0; LARGE];
    runtime.random.fill(&mut bytes);
    bytes.into()
}

/// Proposes large batches; how many of them are acknowledged within a while.
async fn fill(nodes: &Nodes, node: NodeId) -> u8 {
    let (log, runtime) = (nodes.log(node), nodes.driver());
    let mut acknowledged = 0;
    for _ in 0..BATCHES {
        let Ok(commit) = log.propose(log.status().epoch, vec![large(&runtime)]) else {
            break;
        };
        match runtime.timeout(Duration::from_secs(5), commit).await {
            Some(Outcome::Committed(_)) => acknowledged += 1,
            _ => break,
        }
    }
    acknowledged
}

/// The disks of so many followers are full for a while; whether all members have everything afterwards, without a start.
fn goes_on(seed: u64, full: usize) -> bool {
    let world = Arc::new(World::new(seed));
    let nodes = Arc::new(Nodes::new(world.clone(), 3));
    let ended = world.run(SimNode(0), Duration::from_secs(600), async move {
        for node in nodes.numbers() {
            nodes.boot(node).await;
        }
        let leader = nodes.leader(None).await;
        let followers: Vec<NodeId> = nodes.numbers().filter(|node| *node != leader).take(full).collect();
        let set_full = |full| {
            for node in &followers {
                let faults = DiskFaults { full, ..DiskFaults::default() };
                nodes.world.disk(SimNode(*node as u32)).set_faults(faults);
            }
        };
        set_full(true);
        let acknowledged = fill(&nodes, leader).await;
        assert_eq!(acknowledged == BATCHES, full < 2, "{acknowledged} with {full} disks that are full");
        set_full(false);
        let runtime = nodes.driver();
        let end = runtime.clock.monotonic() + Duration::from_secs(30);
        let is_whole = || {
            let Some(leads) = nodes.settled(None) else { return false };
            let last = nodes.log(leads).status().bounds.last;
            last.0 > u64::from(acknowledged)
                && nodes.numbers().all(|node| nodes.log(node).status().bounds.last >= last)
        };
        while !is_whole() && runtime.clock.monotonic() < end {
            runtime.clock.sleep(Duration::from_millis(20)).await;
        }
        if !is_whole() {
            return false;
        }
        // Who led may have given up meanwhile, and another may just have begun.
        for _ in 0..5 {
            if fill(&nodes, nodes.leader(None).await).await == BATCHES {
                return true;
            }
            runtime.clock.sleep(Duration::from_secs(2)).await;
        }
        false
    });
    ended.expect("it comes to an end")
}

#[test]
fn who_has_no_room_goes_on_when_there_is_some() {
    for seed in 1..=3 {
        for full in [1, 2] {
            assert!(goes_on(seed, full), "seed {seed}, {full} disks");
        }
    }
}

#[test]
fn planted_bugs_are_found() {
    mutants::plant(Some(Mutant::FullIsForGood));
    let (is_planted, goes_on) = (mutants::planted().is_some(), goes_on(1, 1));
    mutants::plant(None);
    assert_eq!(is_planted, !goes_on);
}
