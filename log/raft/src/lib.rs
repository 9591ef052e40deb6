//! A prototype of the `raft` log engine: openraft between nodes of one process, everything in memory.
//!
//! It exists to show that the log contract can be kept by consensus, before the contract is frozen; nothing ships
//! on it. It passes the core of the conformance suite. What it taught is in
//! `docs/design/2026-11-22-log-contract-on-raft.md`.
//!
//! A batch is one raft entry; its position is the raft index and its epoch the term (standard leader ids, so that
//! a term has one leader). The state machine is a stub: it notes what was delivered, and readers read the log.

mod network;
mod storage;

use std::{collections::BTreeSet, fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use clutch_log::{
    Batch, Bounds, Commit, ConfigId, Epoch, Event, Events, Floors, Log, LogFault, Member, NodeId, Outcome,
    Position, Progress, Refused, Rejected, Status, check_batch,
};
use openraft::{
    Config, EmptyNode, EntryPayload, Raft, ReadPolicy, SnapshotPolicy, async_runtime::WatchReceiver as _,
    error::ClientWriteError, impls::ProgressResponder, raft::ClientWriteResult,
};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

pub use network::Router;
use storage::{Delivered, MemoryLog};

/// A batch as raft carries it.
#[derive(Clone, PartialEq, Eq)]
pub struct Command(pub Vec<Bytes>);

impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "batch of {}", self.0.len())
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

openraft::declare_raft_types!(
    /// What openraft is told of our types.
    pub TypeConfig:
        D = Command,
        R = (),
        NodeId = u64,
        Node = EmptyNode,
        LeaderId = openraft::impls::leader_id_std::LeaderId<u64, u64>,
);

type Node = Raft<TypeConfig, Delivered>;

/// A proposal whose fate raft has not told after this long is reported as unknown; it may still commit.
const PROPOSAL_PATIENCE: Duration = Duration::from_secs(3);
/// How often a reader at the end of the log looks whether leadership has changed.
const LEADER_POLL: Duration = Duration::from_millis(10);

/// A node's view of the replicated log.
pub struct RaftLog {
    raft: Node,
    log: MemoryLog,
    delivered: Delivered,
    proposals: mpsc::UnboundedSender<Proposal>,
    /// For the suite: the next answer is lost on its way.
    lose_next_answer: Mutex<bool>,
}

struct Proposal {
    term: u64,
    command: Command,
    decided: oneshot::Sender<Outcome>,
    lose_answer: bool,
}

/// Starts `nodes` members, connected through the router.
pub async fn start(router: &Router, nodes: u64) -> Result<Vec<Arc<RaftLog>>, Box<dyn std::error::Error>> {
    let config = Config {
        // A lease of a second: a busy machine must not look like a dead leader.
        heartbeat_interval: 100,
        election_timeout_min: 500,
        election_timeout_max: 1000,
        snapshot_policy: SnapshotPolicy::Never,
        enable_pre_vote: Some(true),
        enable_leader_restore: Some(false),
        backoff: "20ms 20ms 20ms".to_owned(),
        ..Config::default()
    };
    let config = Arc::new(config.validate()?);
    let mut logs = Vec::new();
    for id in 1..=nodes {
        let (log, delivered) = (MemoryLog::default(), Delivered::default());
        let raft = Node::new(id, config.clone(), router.factory(id), log.clone(), delivered.clone()).await?;
        router.add(id, raft.clone());
        let (proposals, receiver) = mpsc::unbounded_channel();
        tokio::spawn(submit(raft.clone(), receiver));
        logs.push(Arc::new(RaftLog { raft, log, delivered, proposals, lose_next_answer: Mutex::new(false) }));
    }
    let first = logs.first().ok_or("a group needs a node")?;
    first.raft.initialize((1..=nodes).collect::<BTreeSet<u64>>()).await?;
    Ok(logs)
}

/// Hands proposals to raft one by one: one submitter keeps their order.
async fn submit(raft: Node, mut proposals: mpsc::UnboundedReceiver<Proposal>) {
    while let Some(Proposal { term, command, decided, lose_answer }) = proposals.recv().await {
        let (responder, answer) =
            ProgressResponder::<TypeConfig, ClientWriteResult<TypeConfig>>::complete_only();
        if raft.write(command).with_leader(term).responder(responder).await.is_err() {
            // Dropping the sender answers unknown.
            continue;
        }
        tokio::spawn(async move {
            let outcome = match tokio::time::timeout(PROPOSAL_PATIENCE, answer).await {
                Ok(Ok(Ok(written))) => Outcome::Committed(Position(written.log_id.index)),
                Ok(Ok(Err(ClientWriteError::ForwardToLeader(to)))) => {
                    Outcome::Refused(Refused::NotLeader { hint: to.leader_id })
                }
                // Discarded, dropped, silent.
                _ => Outcome::Unknown,
            };
            if !lose_answer {
                // The proposer may be gone.
                let _ = decided.send(outcome);
            }
        });
    }
}

impl RaftLog {
    /// The term in which this node leads, with a quorum behind it not long ago.
    pub fn leading(&self) -> Option<u64> {
        self.raft.as_leader().ok().map(|leader| leader.term())
    }

    /// The node that this one believes to lead.
    pub async fn believed_leader(&self) -> Option<u64> {
        self.raft.current_leader().await
    }

    /// Waits until this node leads and may write.
    pub async fn writable(&self, patience: Duration) -> bool {
        self.raft.wait(Some(patience)).leader_with_quorum_acked(None, "writable").await.is_ok()
    }

    /// Makes the next proposal's answer go missing.
    pub fn lose_next_answer(&self) {
        *self.lose_next_answer.lock() = true;
    }
}

#[async_trait]
impl Log for RaftLog {
    fn propose(&self, epoch: Epoch, batch: Vec<Bytes>) -> Result<Commit, Rejected> {
        check_batch(&batch)?;
        if self.leading() != Some(epoch.0) {
            return Err(Rejected::NotLeader { epoch, hint: self.hint() });
        }
        let (decided, commit) = Commit::pair();
        let lose_answer = std::mem::take(&mut *self.lose_next_answer.lock());
        let proposal = Proposal { term: epoch.0, command: Command(batch), decided, lose_answer };
        self.proposals.send(proposal).map_err(|_| Rejected::Stopped("the group was shut down".into()))?;
        Ok(commit)
    }

    fn events(&self, from: Position) -> Box<dyn Events> {
        Box::new(RaftEvents {
            raft: self.raft.clone(),
            log: self.log.clone(),
            delivered: self.delivered.clone(),
            next: from.0.max(1),
            told: (0, None),
        })
    }

    async fn read_barrier(&self, patience: Duration) -> Result<Position, LogFault> {
        let asked = tokio::time::timeout(patience, self.raft.ensure_linearizable(ReadPolicy::ReadIndex));
        let read = asked.await.map_err(|_| LogFault::NoQuorum { waited: patience })?;
        // The prototype does not ask the leader for a follower.
        read.map(|read| Position(read.index())).map_err(|_| LogFault::NotLeader { hint: self.hint() })
    }

    async fn seal(&self) -> Result<Position, LogFault> {
        Err(LogFault::Unsupported("the prototype does not seal".into()))
    }

    async fn set_floors(&self, _floors: Floors) -> Result<(), LogFault> {
        Ok(())
    }

    async fn transfer_leader(&self, to: NodeId) -> Result<(), LogFault> {
        self.raft.trigger().transfer_leader(to).await.map_err(|e| LogFault::Storage(e.to_string()))
    }

    fn resign(&self) {
        // openraft knows no other way down than a successor.
        let other =
            self.members().into_iter().find(|p| p.member.voter && p.member.node != *self.raft.node_id());
        if let (Some(other), true) = (other, self.leading().is_some()) {
            let raft = self.raft.clone();
            // One that cannot be told has no reign to give up.
            tokio::spawn(async move { drop(raft.trigger().transfer_leader(other.member.node).await) });
        }
    }

    async fn reconfigure(&self, _expect: ConfigId, _members: Vec<Member>) -> Result<ConfigId, LogFault> {
        Err(LogFault::Unsupported("the prototype's members are fixed".into()))
    }

    fn status(&self) -> Status {
        let (last, term) = self.delivered.last();
        Status {
            epoch: Epoch(term),
            leader: self.hint(),
            is_self: self.leading() == Some(term),
            bounds: Bounds { first: Position(1), last: Position(last) },
            sealed: None,
            config: ConfigId::default(),
            members: self.members(),
            queued_bytes: 0,
            fault: None,
        }
    }
}

impl RaftLog {
    /// Who leads, as far as this node knows.
    fn hint(&self) -> Option<NodeId> {
        self.raft.metrics().borrow_watched().current_leader
    }

    fn members(&self) -> Vec<Progress> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let membership = metrics.membership_config.membership();
        let voters: BTreeSet<NodeId> = membership.voter_ids().collect();
        let matched = |node| {
            let known = metrics.replication.as_ref()?.get(node)?.as_ref();
            known.map(|log_id| Position(log_id.index))
        };
        let members = membership.nodes().map(|(node, _)| Progress {
            member: Member { node: *node, voter: voters.contains(node) },
            matched: matched(node),
        });
        members.collect()
    }
}

struct RaftEvents {
    raft: Node,
    log: MemoryLog,
    delivered: Delivered,
    next: u64,
    /// The reign that the reader was told last, and who was said to lead in it.
    told: (u64, Option<NodeId>),
}

impl RaftEvents {
    fn ready(&mut self) -> Option<Event> {
        let (last, last_term) = self.delivered.last();
        let (term, leader) = {
            let metrics = self.raft.metrics();
            let metrics = metrics.borrow_watched();
            (metrics.current_term, metrics.current_leader)
        };
        let me = *self.raft.node_id();
        let (told, told_leader) = self.told;
        if told_leader == Some(me) && (term, leader) != self.told {
            self.told = (told, None);
            return Some(Event::Leader { epoch: Epoch(told), leader: None, is_self: false });
        }
        if self.next <= last {
            let entry = self.log.entry(self.next)?;
            let position = Position(self.next);
            self.next += 1;
            return Some(match entry.payload {
                EntryPayload::Normal(Command(entries)) => {
                    Event::Committed(Batch { position, epoch: Epoch(entry.log_id.leader_id.term), entries })
                }
                EntryPayload::Blank | EntryPayload::Membership(_) => Event::Gap { to: position },
            });
        }
        // Everything delivered was read. The term of the last entry is that of a leader whose own first entry is
        // committed, so all earlier reigns are behind the reader.
        // Who leads in a later term is told when that term's first record is.
        let leader = leader.filter(|_| term == last_term);
        if last_term > 0 && (last_term, leader) != self.told && told <= last_term {
            self.told = (last_term, leader);
            return Some(Event::Leader { epoch: Epoch(last_term), leader, is_self: leader == Some(me) });
        }
        None
    }
}

#[async_trait]
impl Events for RaftEvents {
    async fn next(&mut self) -> Result<Event, LogFault> {
        loop {
            if let Some(event) = self.ready() {
                return Ok(event);
            }
            tokio::select! {
                biased;
                () = self.delivered.wait_for(self.next) => {}
                () = tokio::time::sleep(LEADER_POLL) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests;
