//! Who belongs to a log is changed: only as far as the log goes on.

use clutch_log::{ConfigId, Event, LogFault, Member, Outcome, Position};
use clutch_proto::mutants::{self, Mutant};

use super::*;

/// Holds that something goes wrong with this bug, where bugs can be planted, and only then.
fn assert_found(mutant: Mutant, goes_wrong: impl FnOnce() -> bool) {
    mutants::plant(Some(mutant));
    let is_planted = mutants::planted().is_some();
    let is_found = is_planted && goes_wrong();
    mutants::plant(None);
    assert_eq!(is_found, is_planted);
}

fn voters(nodes: &[NodeId]) -> Vec<Member> {
    nodes.iter().map(|node| Member { node: *node, voter: true }).collect()
}

/// Proposes; whether it was committed in time.
async fn commits(nodes: &Nodes) -> bool {
    let leader = nodes.log(nodes.leader(None).await);
    let Ok(commit) = leader.propose(leader.status().epoch, vec!["goes on".into()]) else { return false };
    let outcome = nodes.driver().timeout(Duration::from_secs(5), commit).await;
    matches!(outcome, Some(Outcome::Committed(_)))
}

/// Whether a log goes on whose voters are to be four, of which two do not answer.
fn goes_on() -> bool {
    let world = Arc::new(World::new(1));
    let nodes = Arc::new(Nodes::beginning_on(world.clone(), 4, vec![1, 2, 3]));
    let done = world.run(SimNode(0), Duration::from_secs(600), async move {
        for node in 1..=3 {
            nodes.boot(node).await;
        }
        let leader = nodes.leader(None).await;
        assert!(commits(&nodes).await);
        let away = nodes.numbers().find(|node| *node != leader && *node < 4).expect("two follow");
        nodes.crash(away);
        nodes.driver().clock.sleep(Duration::from_secs(5)).await;
        let log = nodes.log(leader);
        let change = log.reconfigure(log.status().config, voters(&[1, 2, 3, 4]));
        // What has begun may never end.
        let _ = nodes.driver().timeout(Duration::from_secs(5), change).await;
        // Who hears no quorum for long does not lead any more.
        nodes.any_leader().is_some() && commits(&nodes).await
    });
    done.expect("ends")
}

/// How often a log stood still because its reign was handed to who is not there.
fn stood_still() -> usize {
    let world = World::new(3);
    let world = Arc::new(world);
    let nodes = Arc::new(Nodes::new(world.clone(), 3));
    let done = world.run(SimNode(0), Duration::from_secs(600), async move {
        for node in nodes.numbers() {
            nodes.boot(node).await;
        }
        let leader = nodes.leader(None).await;
        let away = nodes.numbers().find(|node| *node != leader).expect("two follow");
        nodes.crash(away);
        nodes.driver().clock.sleep(Duration::from_secs(5)).await;
        let (log, mut stood_still) = (nodes.log(leader), 0);
        for to in [away, 9, leader] {
            // Whatever it answers, it goes on to lead.
            let _ = log.transfer_leader(to).await;
            nodes.driver().clock.sleep(Duration::from_millis(1)).await;
            let commit = log.propose(log.status().epoch, vec!["goes on".into()]);
            let Ok(commit) = commit else {
                stood_still += 1;
                continue;
            };
            let outcome = nodes.driver().timeout(Duration::from_secs(5), commit).await;
            stood_still += usize::from(!matches!(outcome, Some(Outcome::Committed(_))));
        }
        stood_still
    });
    done.expect("ends")
}

#[test]
fn a_reign_is_handed_to_nobody_who_cannot_take_it() {
    assert_eq!(stood_still(), 0);
}

mod handed {
    use super::*;

    #[test]
    fn planted_bugs_are_found() {
        assert_found(Mutant::HandedToAnybody, || stood_still() > 0);
    }
}

#[test]
fn a_log_goes_on_whatever_members_are_asked_for() {
    assert!(goes_on());
}

#[test]
fn members_are_changed_step_by_step() {
    let world = Arc::new(World::new(2));
    let nodes = Arc::new(Nodes::beginning_on(world.clone(), 4, vec![1, 2, 3]));
    let done = world.run(SimNode(0), Duration::from_secs(600), async move {
        for node in nodes.numbers() {
            nodes.boot(node).await;
        }
        let leader = nodes.leader(None).await;
        let log = nodes.log(leader);
        assert!(commits(&nodes).await);
        let (config, old) = (log.status().config, nodes.numbers().find(|node| *node != leader).expect("two"));
        let refused = log.reconfigure(ConfigId(config.0 + 1), voters(&[1, 2, 3, 4])).await;
        assert!(matches!(refused, Err(LogFault::Unsupported(_))), "another configuration: {refused:?}");
        let others: Vec<NodeId> = (1..=3).filter(|node| *node != leader).collect();
        let refused = log.reconfigure(config, voters(&others)).await;
        assert!(matches!(refused, Err(LogFault::Unsupported(_))), "who leads cannot go: {refused:?}");
        // First without a vote, then in the place of another.
        let mut members = voters(&[1, 2, 3]);
        members.push(Member { node: 4, voter: false });
        let config = log.reconfigure(config, members).await.expect("a member comes");
        assert!(commits(&nodes).await);
        let has_all = || log.status().members.iter().all(|is| is.matched >= Some(log.status().bounds.last));
        nodes.until("the new one has all", has_all).await;
        let without: Vec<NodeId> = nodes.numbers().filter(|node| *node != old).collect();
        log.reconfigure(config, voters(&without)).await.expect("one goes, and one votes");
        assert!(commits(&nodes).await);
        let now: Vec<Member> = log.status().members.iter().map(|progress| progress.member).collect();
        assert_eq!(now, voters(&without));
        // Those that are left bear the loss of one, whoever it is, and the one that went says nothing.
        nodes.crash(leader);
        assert!(commits(&nodes).await);
        assert_ne!(nodes.leader(None).await, old, "who is no member does not lead");
    });
    assert!(done.is_some());
}

/// Takes a member out of three that is away: who leads, who was taken out, who is left, and their configuration.
async fn taken_out(nodes: &Nodes) -> (NodeId, NodeId, Vec<NodeId>, ConfigId) {
    let leader = nodes.leader(None).await;
    assert!(commits(nodes).await);
    let log = nodes.log(leader);
    let away = nodes.numbers().find(|node| *node != leader).expect("two follow");
    nodes.crash(away);
    let left: Vec<NodeId> = nodes.numbers().filter(|node| *node != away).collect();
    let config = log.reconfigure(log.status().config, voters(&left)).await.expect("it is taken out");
    (leader, away, left, config)
}

/// Whether a member that has forgotten what it had, and was taken out before, stays out until it is taken in again; then it has
/// everything, and counts.
fn comes_back() -> bool {
    let world = Arc::new(World::new(4));
    let nodes = Arc::new(Nodes::new(world.clone(), 3));
    let done = world.run(SimNode(0), Duration::from_secs(600), async move {
        for node in nodes.numbers() {
            nodes.boot(node).await;
        }
        let (leader, away, left, config) = taken_out(&nodes).await;
        let log = nodes.log(leader);
        nodes.forget(away).await;
        nodes.boot(away).await;
        nodes.driver().clock.sleep(Duration::from_secs(5)).await;
        let alone = nodes.log(away).status();
        if !alone.members.is_empty() || alone.is_self {
            return false;
        }
        let mut members = voters(&left);
        members.push(Member { node: away, voter: false });
        let config = log.reconfigure(config, members).await.expect("it is taken in");
        let has_all = || nodes.log(away).status().bounds.last >= log.status().bounds.last;
        nodes.until("it has all", has_all).await;
        log.reconfigure(config, voters(&[1, 2, 3])).await.expect("it votes");
        let third = left.into_iter().find(|node| *node != leader).expect("one more follows");
        nodes.crash(third);
        assert!(commits(&nodes).await, "it counts");
        nodes.crash(away);
        nodes.boot(away).await;
        commits(&nodes).await
    });
    done.expect("ends")
}

/// Whether a member that was away when it was taken out is told what to wait for; it would wait for good.
fn waits_in_vain() -> bool {
    let world = Arc::new(World::new(5));
    let nodes = Arc::new(Nodes::new(world.clone(), 3));
    let done = world.run(SimNode(0), Duration::from_secs(600), async move {
        for node in nodes.numbers() {
            nodes.boot(node).await;
        }
        let (leader, away, left, _) = taken_out(&nodes).await;
        assert!(commits(&nodes).await);
        nodes.boot(away).await;
        let removed = nodes.log(away);
        assert_eq!(removed.status().members.len(), 3, "it has not heard that it is out");
        nodes.until("it knows who leads", || removed.status().leader == Some(leader)).await;
        let barrier = removed.read_barrier(Duration::from_secs(3)).await;
        let is_refused = matches!(&barrier, Err(LogFault::NotLeader { hint }) if *hint == Some(leader));
        assert!(is_refused || barrier.is_ok(), "{barrier:?}");
        let member = nodes.log(*left.iter().find(|node| **node != leader).expect("one more follows"));
        member.read_barrier(Duration::from_secs(3)).await.expect("a member is told");
        barrier.is_ok()
    });
    done.expect("ends")
}

#[test]
fn who_was_taken_out_is_told_no_position_to_wait_for() {
    assert!(!waits_in_vain());
}

mod removed {
    use super::*;

    #[test]
    fn planted_bugs_are_found() {
        assert_found(Mutant::AnybodyReads, waits_in_vain);
    }
}

#[test]
fn a_member_that_has_forgotten_everything_comes_back_when_it_is_taken_in() {
    assert!(comes_back());
}

/// Whether a leader that is cut off says so within seconds, to who asks and to its reader, and the log goes on when it is back;
/// `all`: whether everybody is cut off from everybody.
fn gives_up(all: bool) -> bool {
    let world = Arc::new(World::new(5));
    let nodes = Arc::new(Nodes::new(world.clone(), 3));
    let done = world.run(SimNode(0), Duration::from_secs(600), async move {
        for node in nodes.numbers() {
            nodes.boot(node).await;
        }
        let leader = nodes.leader(None).await;
        assert!(commits(&nodes).await);
        let log = nodes.log(leader);
        let epoch = log.status().epoch;
        let mut events = log.events(Position(1));
        let (told, ended) = tokio::sync::oneshot::channel();
        nodes.driver().spawn("reader", async move {
            while let Ok(event) = events.next().await {
                if matches!(event, Event::Leader { epoch: of, is_self: false, .. } if of == epoch) {
                    let _ = told.send(());
                    return;
                }
            }
        });
        let cut: Vec<NodeId> = nodes.numbers().filter(|node| all || *node == leader).collect();
        cut.iter().for_each(|node| nodes.cut_off(*node, true));
        nodes.driver().clock.sleep(Duration::from_secs(5)).await;
        if log.status().is_self {
            return false;
        }
        nodes.driver().timeout(Duration::from_secs(1), ended).await.expect("told in time").expect("told");
        cut.iter().for_each(|node| nodes.cut_off(*node, false));
        nodes.leader(None).await;
        let goes_on = commits(&nodes).await;
        assert!(nodes.log(nodes.leader(None).await).status().epoch > epoch, "what was given up stays so");
        goes_on
    });
    done.expect("ends")
}

#[test]
fn who_is_cut_off_does_not_go_on_to_lead() {
    assert!(gives_up(false) && gives_up(true));
}

mod cut_off {
    use super::*;

    #[test]
    fn planted_bugs_are_found() {
        assert_found(Mutant::CutOffLeads, || !gives_up(false));
    }
}

mod forgotten {
    use super::*;

    #[test]
    fn planted_bugs_are_found() {
        assert_found(Mutant::RejoinsAsFounder, || !comes_back());
    }
}

mod silent {
    use super::*;

    #[test]
    fn planted_bugs_are_found() {
        assert_found(Mutant::SilentVotersTaken, || !goes_on());
    }
}
