//! A vote that was answered for is on the disk: whoever asks again after a power cut, for somebody else, is refused.

use clutch_log::LogId;
use clutch_proto::mutants::{self, Mutant};
use openraft::{impls::leader_id_std::LeaderId, raft::VoteRequest};

use super::*;
use crate::{
    codec::Kind,
    messages,
    types::{LogId as RaftLogId, Vote},
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
            let addresses = Arc::new(|node| Some(format!("node{node}").as_str().into()));
            let peers = Peers::new(
                runtime.clone(),
                group::CLUSTER,
                9,
                group::KEY,
                group::identities(&runtime, 9),
                "",
                addresses,
            );
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
