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
    Batch, Bounds, Commit, Epoch, Event, Events, Log, LogFault, Outcome, Position, ReadLevel, Rejected,
    SnapshotRef, check_batch,
};
use openraft::{
    Config, EmptyNode, EntryPayload, Raft, ReadPolicy, SnapshotPolicy, impls::ProgressResponder,
    raft::ClientWriteResult,
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
                // Turned down after it was taken: certainly no effect, but a commit has no word for that. Discarded,
                // dropped, silent: unknown.
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
            return Err(Rejected::NotLeader(epoch));
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
            told: None,
        })
    }

    async fn read_barrier(&self, level: ReadLevel) -> Result<Position, LogFault> {
        match level {
            ReadLevel::Local => Ok(Position(self.delivered.index())),
            ReadLevel::AtLeast(position) => {
                self.delivered.wait_for(position.0).await;
                Ok(Position(self.delivered.index()))
            }
            ReadLevel::Linearizable | ReadLevel::Lease => {
                let policy =
                    if level == ReadLevel::Lease { ReadPolicy::LeaseRead } else { ReadPolicy::ReadIndex };
                let read = self.raft.ensure_linearizable(policy).await;
                read.map(|read| Position(read.index())).map_err(|_| LogFault::NotLeader)
            }
        }
    }

    async fn seal(&self) -> Result<Position, LogFault> {
        Err(LogFault::Unsupported("the prototype does not seal".into()))
    }

    async fn trim(&self, _upto: Position) -> Result<(), LogFault> {
        Ok(())
    }

    async fn snapshot_ready(&self, _snapshot: SnapshotRef) {}

    async fn transfer_leader(&self, to: u64) -> Result<(), LogFault> {
        self.raft.trigger().transfer_leader(to).await.map_err(|e| LogFault::Storage(e.to_string()))
    }

    fn bounds(&self) -> Bounds {
        Bounds { first: Position(1), last: Position(self.delivered.index()) }
    }
}

struct RaftEvents {
    raft: Node,
    log: MemoryLog,
    delivered: Delivered,
    next: u64,
    /// The reign and side that the reader was told last.
    told: Option<(u64, bool)>,
}

impl RaftEvents {
    fn ready(&mut self) -> Option<Event> {
        let (last, last_term) = self.delivered.last();
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
        let is_self = self.raft.as_leader().is_ok_and(|leader| leader.term() == last_term);
        let now = (last_term, is_self);
        if last_term > 0 && self.told.is_none_or(|told| told < now) {
            self.told = Some(now);
            return Some(Event::Leader { epoch: Epoch(last_term), is_self });
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
