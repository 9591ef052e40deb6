//! A vote that was answered for is on the disk: whoever asks again after a power cut, for somebody else, is refused.

use clutch_log::{LogId, Manifest};
use clutch_proto::mutants::{self, Mutant};
use openraft::{impls::leader_id_std::LeaderId, raft::VoteRequest};

use super::*;
use crate::{
    codec::{Kind, Reader},
    messages,
    types::{LogId as RaftLogId, SnapshotMeta, Vote, position_of},
};

/// A reign that nobody has come to.
const TERM: u64 = 1_000;

/// Asks a member for its vote, as a candidate to whom leadership was handed and whose log is longer; whether it is given.
async fn gives_vote(nodes: &Nodes, peers: &Arc<Peers>, member: NodeId, candidate: NodeId) -> bool {
    let vote = Vote { leader_id: LeaderId { term: TERM, voted_for: candidate }, committed: false };
    let mut request = VoteRequest::new(vote, Some(RaftLogId::new((TERM - 1).into(), 1_000_000)));
    request.leadership_transfer = true;
    let body = messages::vote(&request);
    for _ in 0..20 {
        let asked =
            peers.ask(member, LogId::CDC.into(), Kind::Vote, body.clone(), Duration::from_millis(200)).await;
        if let Ok(answer) = asked {
            let answer = messages::read_vote_answer(answer).expect("an answer");
            return answer.vote_granted && answer.vote == vote;
        }
        if nodes.world.disk(SimNode(member as u32)).is_dead() {
            return false;
        }
    }
    false
}

/// How often a member voted twice in one reign.
fn votes_twice(seeds: u64) -> u64 {
    let twice = |seed: u64| {
        let (twice, _) = on_three(seed, move |nodes| async move {
            nodes.leader(None).await;
            let (member, runtime) = (1, nodes.driver());
            let peers = outsider(&runtime);
            // The others are gone, so that nobody else's reign comes in between.
            [2, 3].into_iter().for_each(|node| nodes.crash(node));
            // Of the writes that follow one is the vote.
            nodes.world.disk(SimNode(1)).cut_power_after(seed % 8);
            let first = gives_vote(&nodes, &peers, member, 2).await;
            nodes.crash(member);
            nodes.boot(member).await;
            first && gives_vote(&nodes, &peers, member, 3).await
        });
        u64::from(twice)
    };
    (0..seeds).map(twice).sum()
}

/// Streams of a node that is no member.
pub(super) fn outsider(runtime: &Runtime) -> Arc<Peers> {
    let addresses = Arc::new(|node| Some(format!("node{node}").as_str().into()));
    let identities = group::identities(runtime, 9);
    Peers::new(runtime.clone(), group::CLUSTER, 9, group::KEY, identities, "", addresses)
}

/// Whether a member that has voted in a later reign says so to the leader of an earlier one, whose snapshot it has already: whoever
/// is answered otherwise counts on this member.
fn tells_of_a_later_reign(seed: u64) -> bool {
    let (tells, _) = on_three(seed, |nodes| async move {
        let (leader, runtime) = (nodes.leader(None).await, nodes.driver());
        let log = nodes.log(leader).0.log().clone();
        let last = log.last_id().expect("a leader has written something");
        let member = nodes.numbers().find(|node| *node != leader).expect("there are three");
        let has_all = || nodes.log(member).0.delivered().last().0 >= position_of(last.index);
        nodes.until("the member has all", has_all).await;
        let vote = nodes.log(leader).0.metrics().vote;
        assert!(vote.committed, "it leads by it");
        let last_membership = log.members_at(last.index).expect("it is there");
        let meta = SnapshotMeta { last_log_id: Some(last), last_membership };
        let manifest = Manifest { position: position_of(last.index), hash: [0; 16], files: vec![] };
        nodes.numbers().filter(|node| *node != member).for_each(|node| nodes.crash(node));
        let peers = outsider(&runtime);
        assert!(gives_vote(&nodes, &peers, member, leader).await, "it votes");
        let body = messages::snapshot(&vote, &meta, &manifest);
        let asked = peers.ask(member, LogId::CDC.into(), Kind::Snapshot, body, Duration::from_secs(1));
        let answer = asked.await.expect("it is answered");
        let answered = Reader(answer).vote().expect("a vote");
        assert!(answered == vote || answered.leader_id.term == TERM, "{answered}");
        answered != vote
    });
    tells
}

#[test]
fn a_snapshot_that_is_here_is_no_promise_to_an_earlier_leader() {
    for seed in 0..5 {
        assert!(tells_of_a_later_reign(seed), "seed {seed}");
    }
}

mod snapshot {
    use super::*;

    #[test]
    fn planted_bugs_are_found() {
        mutants::plant(Some(Mutant::SnapshotAnsweredUnasked));
        let (is_planted, tells) = (mutants::planted().is_some(), tells_of_a_later_reign(0));
        mutants::plant(None);
        assert_ne!(tells, is_planted);
    }
}

#[test]
fn nobody_votes_twice() {
    assert_eq!(votes_twice(24), 0);
}

#[test]
fn planted_bugs_are_found() {
    mutants::plant(Some(Mutant::VoteNotSynced));
    let (is_planted, twice) = (mutants::planted().is_some(), votes_twice(24));
    mutants::plant(None);
    assert_eq!(twice > 0, is_planted, "{twice} times");
}
