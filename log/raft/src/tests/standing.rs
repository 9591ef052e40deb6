//! What wakes the readers of a group: the end of a reign, and no heartbeat.

use clutch_log::{Epoch, Event, Log as _, LogId};
use clutch_proto::mutants::{self, Mutant};
use openraft::{impls::leader_id_std::LeaderId, raft::VoteRequest};

use super::*;
use crate::{codec::Kind, messages, types::Vote};

/// A reign that nobody has come to.
const TERM: u64 = 1_000;

/// Whether a leader's reader is told that its reign has ended, although nothing is delivered in the next one.
fn is_told_of_the_end(seed: u64) -> bool {
    let told = on_three(seed, |nodes| async move {
        let (runtime, leader) = (nodes.driver(), nodes.leader(None).await);
        let log = nodes.log(leader);
        let mut events = log.events(Position(1));
        let reign = loop {
            match events.next().await.expect("the group goes on") {
                Event::Leader { epoch, is_self: true, .. } => break epoch,
                _ => continue,
            }
        };
        // Nobody is there to be elected.
        nodes.numbers().filter(|node| *node != leader).for_each(|node| nodes.crash(node));
        let vote = Vote { leader_id: LeaderId { term: TERM, voted_for: 9 }, committed: false };
        let mut request = VoteRequest::new(vote, log.0.log().last_id());
        request.leadership_transfer = true;
        let peers = votes::outsider(&runtime);
        let body = messages::vote(&request);
        let told = async {
            loop {
                match events.next().await.expect("the group goes on") {
                    Event::Leader { epoch, leader: None, is_self: false } => return epoch,
                    _ => continue,
                }
            }
        };
        let asked = async {
            // The reader waits by then.
            runtime.clock.sleep(Duration::from_millis(1)).await;
            peers.ask(leader, LogId::CDC.into(), Kind::Vote, body, Duration::from_secs(1)).await
        };
        let (told, asked) = tokio::join!(runtime.timeout(Duration::from_secs(1), told), asked);
        assert!(asked.is_ok(), "the vote is asked for");
        (reign, told)
    });
    let (reign, told): (Epoch, Option<Epoch>) = told.0;
    assert!(told.is_none_or(|told| told == reign), "{told:?} has ended, not {reign:?}");
    told.is_some()
}

#[test]
fn the_end_of_a_reign_is_told_at_once() {
    for seed in 0..5 {
        assert!(is_told_of_the_end(seed), "seed {seed}");
    }
}

#[test]
fn planted_bugs_are_found() {
    mutants::plant(Some(Mutant::StandingUntold));
    let (is_planted, is_told) = (mutants::planted().is_some(), is_told_of_the_end(0));
    mutants::plant(None);
    assert_ne!(is_told, is_planted);
}

#[test]
fn heartbeats_wake_no_reader() {
    let woken = on_three(0, |nodes| async move {
        let leader = nodes.leader(None).await;
        let clock = nodes.driver().clock.clone();
        clock.sleep(Duration::from_secs(5)).await;
        let mut heard = Vec::new();
        for node in nodes.numbers() {
            let member = &nodes.log(node).0;
            let mut standing = member.standing_changes();
            standing.borrow_and_update();
            heard.push((standing, member.metrics().last_quorum_acked));
        }
        clock.sleep(Duration::from_secs(10)).await;
        let now = nodes.log(leader).0.metrics().last_quorum_acked;
        assert!(heard.iter().all(|(_, before)| *before < now), "heartbeats were answered");
        heard.iter().filter(|(standing, _)| standing.has_changed().unwrap_or(true)).count()
    });
    assert_eq!(woken.0, 0);
}
