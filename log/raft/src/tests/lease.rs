//! Reads by a lease see all that was acknowledged before them, whatever became of those who promised it.

use bytes::Bytes;
use clutch_log::{Log, Outcome};
use clutch_proto::mutants::{self, Mutant};

use super::*;

/// Small, so that what is not promised shows.
const MARGIN: Duration = Duration::from_millis(40);

/// Runs a part on three nodes that read by leases.
fn on_leases<F, T>(seed: u64, part: impl FnOnce(Arc<Nodes>) -> F + Send + 'static) -> T
where
    F: Future<Output = T> + Send + 'static,
    T: Send + 'static,
{
    on_nodes(seed, |world| Nodes::new(world, 3).reading_by_lease(MARGIN), part).0
}

/// Has something committed; where.
async fn committed(log: &RaftLog) -> Position {
    let epoch = log.status().epoch;
    let outcome = log.propose(epoch, vec![Bytes::from_static(b"x")]).expect("it leads").await;
    let Outcome::Committed(position) = outcome else { panic!("{outcome:?}") };
    position
}

/// The others, of three.
fn others(nodes: &Nodes, node: NodeId) -> Vec<NodeId> {
    nodes.numbers().filter(|other| *other != node).collect()
}

/// A leader by which reads go, with something committed.
async fn reading(nodes: &Nodes) -> (NodeId, Arc<RaftLog>) {
    let leader = nodes.leader(None).await;
    let log = nodes.log(leader);
    let last = committed(&log).await;
    let before = nodes.world.notes().get("raft: a read by a lease").copied().unwrap_or(0);
    let read = log.read_barrier(Duration::from_secs(1)).await.expect("it leads");
    assert!(read >= last, "{read} is read behind {last}");
    assert_eq!(nodes.world.notes()["raft: a read by a lease"], before + 1);
    (leader, log)
}

/// Whether the old leader says less than was acknowledged.
async fn is_stale(old: &Arc<RaftLog>, acknowledged: Position) -> bool {
    let (told, read) = tokio::sync::oneshot::channel();
    let log = old.clone();
    // By the clock of its own node.
    old.0.runtime().spawn("reads", async move {
        let _ = told.send(log.read_barrier(Duration::from_millis(20)).await);
    });
    read.await.expect("it is answered").is_ok_and(|read| read < acknowledged)
}

/// Waits until another leads, and has something committed there.
async fn succeeded(nodes: &Nodes, old: NodeId) -> Position {
    let next = nodes.leader(Some(old)).await;
    committed(&nodes.log(next)).await
}

/// How often a read is stale where all who promised something start anew.
fn stale_after_restarts(seeds: u64) -> u64 {
    let stale = |seed| {
        on_leases(seed, |nodes| async move {
            let (old, log) = reading(&nodes).await;
            nodes.cut_off(old, true);
            for node in others(&nodes, old) {
                nodes.crash(node);
                nodes.boot(node).await;
            }
            let acknowledged = succeeded(&nodes, old).await;
            is_stale(&log, acknowledged).await
        })
    };
    (0..seeds).map(|seed| u64::from(stale(seed))).sum()
}

/// How often a read is stale of a leader whose machine was suspended.
fn stale_after_suspensions(seeds: u64) -> u64 {
    let stale = |seed| {
        on_leases(seed, |nodes| async move {
            let (old, log) = reading(&nodes).await;
            let node = SimNode(old as u32);
            nodes.world.suspend(node);
            nodes.cut_off(old, true);
            let acknowledged = succeeded(&nodes, old).await;
            nodes.world.resume(node);
            is_stale(&log, acknowledged).await
        })
    };
    (0..seeds).map(|seed| u64::from(stale(seed))).sum()
}

/// How often a read is stale of a leader that hands its reign on, and hears nothing of it.
fn stale_after_handing(seeds: u64) -> u64 {
    let stale = |seed| {
        on_leases(seed, |nodes| async move {
            let (old, log) = reading(&nodes).await;
            let to = others(&nodes, old)[0];
            let has_all = || nodes.log(to).status().bounds.last >= log.status().bounds.last;
            nodes.until("the successor has all", has_all).await;
            for other in others(&nodes, old) {
                nodes.world.set_blocked(SimNode(other as u32), SimNode(old as u32), true);
            }
            log.transfer_leader(to).await.expect("it is handed on");
            let acknowledged = succeeded(&nodes, old).await;
            is_stale(&log, acknowledged).await
        })
    };
    (0..seeds).map(|seed| u64::from(stale(seed))).sum()
}

#[test]
fn nobody_reads_what_is_over() {
    assert_eq!(stale_after_restarts(20), 0);
    assert_eq!(stale_after_suspensions(20), 0);
    assert_eq!(stale_after_handing(20), 0);
}

#[test]
fn the_suite_holds_with_leases() {
    for seed in 0..5 {
        on_leases(seed, |nodes| async move { conformance::full(&Elected(nodes)).await });
    }
}

/// How often it goes wrong with a planted bug, and whether one can be planted in this build.
fn planted(bug: Mutant, stale: impl Fn(u64) -> u64) -> (u64, bool) {
    mutants::plant(Some(bug));
    let found = (stale(20), mutants::planted().is_some());
    mutants::plant(None);
    found
}

mod restart {
    use super::*;

    #[test]
    fn planted_bugs_are_found() {
        let (stale, is_planted) = planted(Mutant::VotesAfterRestart, stale_after_restarts);
        assert_eq!(stale > 0, is_planted, "{stale} times");
    }
}

mod suspension {
    use super::*;

    #[test]
    fn planted_bugs_are_found() {
        let (stale, is_planted) = planted(Mutant::LeaseThroughSuspension, stale_after_suspensions);
        assert_eq!(stale > 0, is_planted, "{stale} times");
    }
}
