//! One member of one group: a log as this node sees it.
//!
//! Invariants:
//! * A proposal is taken in the reign that it names or not at all, and proposals of one reign keep their order.
//! * What openraft refuses before it has appended it is refused; whatever else is not committed is unknown.
//! * Nobody is given what lies behind the first seal that was committed.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use clutch_log::{
    Commit, LogFault, LogletId, Manifest, NodeId, Outcome, Position, Progress, Refused, Rejected,
};
use clutch_proto::mutants::{self, Mutant};
use clutch_runtime::Runtime;
use openraft::{
    Instant as _, RaftMetrics, ReadPolicy, ServerState,
    async_runtime::WatchReceiver as _,
    errors::{ClientWriteError, LinearizableReadError, RaftError},
    raft::ClientWriteResult,
};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

use crate::{
    delivered::Delivered,
    lease::Lease,
    peers::Peers,
    quorum,
    seam::SeamInstant,
    snapshots::{Received, Sent},
    standing::{self, Standing},
    storage::GroupLog,
    types::{Command, Raft, Taken, Teller, TypeConfig, position_of},
};

/// A proposal whose fate is not known after so long is reported as unknown; it may still be committed.
pub(crate) const PROPOSAL_PATIENCE: Duration = Duration::from_secs(3);
/// How often that is looked at.
const SWEEP: Duration = Duration::from_millis(100);

/// Before another member is asked for a snapshot.
const AGAIN: Duration = Duration::from_millis(100);

/// Where the fate of a proposal is told, until it was.
type Slot = Arc<Mutex<Option<oneshot::Sender<Outcome>>>>;

struct Proposal {
    term: u64,
    command: Command,
    slot: Slot,
    held: Held,
}

/// Bytes of a proposal, until its fate is told.
struct Held {
    all: Arc<AtomicU64>,
    bytes: u64,
}

impl Drop for Held {
    fn drop(&mut self) {
        let before = self.all.fetch_sub(self.bytes, Ordering::Relaxed);
        assert!(before >= self.bytes, "{} bytes wait, and {} were told", before, self.bytes);
    }
}

/// Parts of a member that are made before it starts.
pub(crate) struct Parts {
    pub(crate) runtime: Runtime,
    pub(crate) id: LogletId,
    pub(crate) peers: Arc<Peers>,
    pub(crate) log: GroupLog,
    pub(crate) delivered: Delivered,
    pub(crate) sent: Arc<Sent>,
    pub(crate) received: Arc<Received>,
    pub(crate) lease: Arc<Lease>,
}

/// See the module.
pub(crate) struct Member {
    pub(crate) parts: Parts,
    pub(crate) raft: Raft,
    proposals: mpsc::UnboundedSender<Proposal>,
    /// Bytes of proposals whose fate is not told.
    pub(crate) queued_bytes: Arc<AtomicU64>,
    /// The last reign of this node that was given up; it stands for no other.
    pub(crate) resigned: Mutex<Option<u64>>,
    barriers: Arc<Mutex<Barriers>>,
    fetched: Mutex<Fetched>,
    /// Told when a reign was given up.
    pub(crate) resigning: tokio::sync::watch::Sender<bool>,
    standing: tokio::sync::watch::Receiver<Standing>,
    /// This member stands for no reign any more.
    retired: AtomicBool,
    /// The next answer is lost on its way.
    #[cfg(test)]
    lose_next_answer: Mutex<bool>,
}

/// A snapshot that a reader needs, because what comes next was trimmed here.
#[derive(Default)]
struct Fetched {
    is_coming: bool,
    whole: Option<Manifest>,
}

/// Readers that share one question.
#[derive(Default)]
struct Barriers {
    is_asking: bool,
    waiting: Vec<oneshot::Sender<Result<Position, LogFault>>>,
}

pub(crate) fn storage(error: impl std::fmt::Display) -> LogFault {
    LogFault::Storage(error.to_string())
}

/// A member that could not read something lets another lead, and not again before so long.
const WAY_AGAIN: Duration = Duration::from_secs(60);

/// Lets another member lead where this one cannot read what a third one needs: once in a while, for the other may not be able to either, and
/// two that hand a reign to each other without end would serve nobody.
async fn make_way(
    runtime: Runtime,
    mut unreadable: tokio::sync::watch::Receiver<u64>,
    member: std::sync::Weak<Member>,
) {
    let mut last: Option<Duration> = None;
    while unreadable.changed().await.is_ok() {
        let Some(member) = member.upgrade() else { return };
        let now = runtime.clock.monotonic();
        if last.is_some_and(|last| now.saturating_sub(last) < WAY_AGAIN) {
            continue;
        }
        let other = member.leading().and_then(|_| member.most_recent(&member.metrics()));
        if let Some(other) = other {
            last = Some(now);
            // Where it does not come about the read is tried again, and so is this, later.
            let _ = member.raft.trigger().transfer_leader(other).await;
        }
    }
}

impl Member {
    /// Begins to take part.
    pub(crate) fn start(parts: Parts, raft: Raft) -> Arc<Member> {
        let (proposals, receiver) = mpsc::unbounded_channel();
        let (peers, id, runtime) = (parts.peers.clone(), parts.id, parts.runtime.clone());
        let member = Arc::new(Member {
            parts,
            raft: raft.clone(),
            proposals,
            queued_bytes: Arc::default(),
            resigned: Mutex::new(None),
            barriers: Arc::default(),
            fetched: Mutex::default(),
            resigning: tokio::sync::watch::Sender::new(false),
            standing: standing::watch(&runtime, &raft),
            retired: AtomicBool::new(false),
            #[cfg(test)]
            lose_next_answer: Mutex::new(false),
        });
        peers.serve(id, member.clone());
        runtime.spawn("raft proposals", submit(runtime.clone(), raft, receiver));
        runtime.spawn(
            "raft unreadable",
            make_way(runtime.clone(), member.log().unreadable(), Arc::downgrade(&member)),
        );
        runtime.spawn("raft quorum", quorum::watch(runtime.clone(), Arc::downgrade(&member)));
        member
    }

    pub(crate) fn raft(&self) -> &Raft {
        &self.raft
    }

    pub(crate) fn log(&self) -> &GroupLog {
        &self.parts.log
    }

    pub(crate) fn delivered(&self) -> &Delivered {
        &self.parts.delivered
    }

    pub(crate) fn sent(&self) -> &Sent {
        &self.parts.sent
    }

    pub(crate) fn received(&self) -> &Received {
        &self.parts.received
    }

    pub(crate) fn runtime(&self) -> &Runtime {
        &self.parts.runtime
    }

    pub(crate) fn node(&self) -> NodeId {
        self.parts.peers.node()
    }

    pub(crate) fn resigning(&self) -> tokio::sync::watch::Receiver<bool> {
        self.resigning.subscribe()
    }

    /// Tells when the reign or who leads in it has changed, or where the log begins, or that the group has failed.
    pub(crate) fn standing_changes(&self) -> tokio::sync::watch::Receiver<Standing> {
        self.standing.clone()
    }

    pub(crate) fn metrics(&self) -> RaftMetrics<TypeConfig> {
        self.raft.metrics().borrow_watched().clone()
    }

    /// The reign in which this node leads, unless it has given that up.
    pub(crate) fn leading(&self) -> Option<u64> {
        let (term, leader) = self.standing();
        (leader == Some(self.node())).then_some(term)
    }

    /// The newest reign that is known, and who leads in it.
    pub(crate) fn standing(&self) -> (u64, Option<NodeId>) {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        // A node that has led is called leader by its own vote when it starts again, although nobody follows it.
        let leads =
            metrics.state == ServerState::Leader && *self.resigned.lock() != Some(metrics.current_term);
        let leader = metrics.current_leader.filter(|leader| *leader != self.node() || leads);
        (metrics.current_term, leader)
    }

    /// A position, or the end of the log where it lies behind that.
    pub(crate) fn up_to_the_end(&self, position: Position) -> Position {
        self.parts.delivered.sealed().map_or(position, |tail| tail.min(position))
    }

    pub(crate) fn hint(&self) -> Option<NodeId> {
        self.standing().1
    }

    /// Makes the next proposal's answer go missing.
    #[cfg(test)]
    pub(crate) fn lose_next_answer(&self) {
        *self.lose_next_answer.lock() = true;
    }

    /// Why the group cannot go on.
    pub(crate) fn fault(&self) -> Option<String> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        metrics.running_state.as_ref().err().map(ToString::to_string)
    }

    pub(crate) fn members(&self, metrics: &RaftMetrics<TypeConfig>) -> Vec<Progress> {
        let membership = metrics.membership_config.membership();
        // While members change, those vote who will, and who has: only who does both does so for certain.
        let configs = membership.get_joint_config();
        let is_voter = |node: &NodeId| configs.iter().all(|config| config.contains(node));
        let own = metrics.last_log_index.map(position_of);
        let matched = |node: &NodeId| {
            let replication = metrics.replication.as_ref()?;
            if *node == self.node() {
                return own;
            }
            Some(replication.get(node)?.as_ref().map_or(Position(0), |id| position_of(id.index)))
        };
        let members = membership.nodes().map(|(node, _)| Progress {
            member: clutch_log::Member { node: *node, voter: is_voter(node) },
            matched: matched(node),
            is_heard: self.hears(metrics, *node),
        });
        members.collect()
    }

    /// The snapshot that reaches `least` and was fetched; it is fetched from now on where there is none. Readers come and go
    /// meanwhile.
    pub(crate) fn fetched(self: &Arc<Self>, least: Position) -> Option<Manifest> {
        let mut fetched = self.fetched.lock();
        let whole = fetched.whole.clone().filter(|whole| whole.position >= least);
        if whole.is_none() && !std::mem::replace(&mut fetched.is_coming, true) {
            let this = self.clone();
            self.parts.runtime.spawn("raft fetch", async move { this.fetch(least).await });
        }
        whole
    }

    /// Fetches a snapshot from one of the others, as often as it takes.
    async fn fetch(&self, least: Position) {
        let Parts { runtime, received, delivered, .. } = &self.parts;
        for turn in 0.. {
            let others: Vec<NodeId> = {
                let metrics = self.metrics();
                let nodes = metrics.membership_config.nodes().map(|(node, _)| *node);
                nodes.filter(|node| *node != self.node()).collect()
            };
            let other = others.get(turn % others.len().max(1)).copied();
            if let Some(other) = other {
                match received.fetch(other, least).await {
                    Ok(manifest) => {
                        runtime.note("raft: a member fetches a snapshot");
                        *self.fetched.lock() = Fetched { is_coming: false, whole: Some(manifest) };
                        return delivered.tell();
                    }
                    Err(error) => tracing::debug!(other, %error, "a snapshot does not come"),
                }
            }
            if self.fault().is_some() {
                self.fetched.lock().is_coming = false;
                return;
            }
            runtime.clock.sleep(AGAIN).await;
        }
    }

    /// This member stands where the others hear of no leader, unless it has retired.
    pub(crate) fn stand(&self) {
        self.raft.runtime_config().elect(true);
        // Who retires meanwhile has said so before.
        if self.retired.load(Ordering::SeqCst) {
            self.raft.runtime_config().elect(false);
        }
    }

    /// This member does not stand any more.
    pub(crate) fn retire(&self) {
        self.retired.store(true, Ordering::SeqCst);
        self.raft.runtime_config().elect(false);
    }

    /// The position that a read must have seen, where a quorum has promised that nobody else leads.
    async fn by_lease(&self) -> Option<Position> {
        let Parts { lease, runtime, .. } = &self.parts;
        if !lease.is_used() {
            return None;
        }
        let (read, _) = self.raft.get_read_log_id(ReadPolicy::LeaseRead).await.ok()?;
        // It held when the position was taken where it holds now.
        (self.leading().is_some() && lease.holds(runtime, &self.metrics())).then(|| {
            runtime.note("raft: a read by a lease");
            position_of(read.index())
        })
    }

    /// Asks a quorum, as the leader, for the position that a read must have seen; who asks meanwhile shares the next question.
    pub(crate) async fn barrier_here(&self, patience: Duration) -> Result<Position, LogFault> {
        let answered = async {
            match self.by_lease().await {
                Some(position) => Ok(position),
                None => self.by_question().await,
            }
        };
        let answered = self.parts.runtime.timeout(patience, answered).await;
        answered.unwrap_or(Err(LogFault::NoQuorum { waited: patience }))
    }

    async fn by_question(&self) -> Result<Position, LogFault> {
        let (told, answer) = oneshot::channel();
        let asks = {
            let mut barriers = self.barriers.lock();
            barriers.waiting.push(told);
            !std::mem::replace(&mut barriers.is_asking, true)
        };
        if asks {
            self.parts.runtime.spawn("raft barrier", ask_barriers(self.raft.clone(), self.barriers.clone()));
        }
        answer.await.unwrap_or_else(|_| Err(storage("the group has ended")))
    }

    /// Ends the log, as the leader.
    pub(crate) async fn seal_here(&self) -> Result<Position, LogFault> {
        if let Some(tail) = self.parts.delivered.sealed() {
            return Ok(tail);
        }
        let term = self.leading().ok_or(LogFault::NotLeader { hint: self.hint() })?;
        let commit = self.take(term, Command::Seal, 0).map_err(storage)?;
        match commit.await {
            Outcome::Committed(tail) => Ok(tail),
            Outcome::Sealed => {
                self.parts.delivered.sealed().ok_or_else(|| storage("sealed, and not said where"))
            }
            Outcome::Refused(_) => Err(LogFault::NotLeader { hint: self.hint() }),
            Outcome::Unknown => Err(LogFault::NoQuorum { waited: PROPOSAL_PATIENCE }),
        }
    }

    pub(crate) fn take(&self, term: u64, command: Command, bytes: u64) -> Result<Commit, Rejected> {
        let (decided, commit) = Commit::pair();
        let slot: Slot = Arc::new(Mutex::new(Some(decided)));
        #[cfg(test)]
        if std::mem::take(&mut *self.lose_next_answer.lock()) {
            slot.lock().take();
        }
        self.queued_bytes.fetch_add(bytes, Ordering::Relaxed);
        let held = Held { all: self.queued_bytes.clone(), bytes };
        let proposal = Proposal { term, command, slot, held };
        self.proposals.send(proposal).map_err(|_| Rejected::Stopped("the group has ended".into()))?;
        Ok(commit)
    }
}

/// Asks for all who wait, until nobody does.
async fn ask_barriers(raft: Raft, barriers: Arc<Mutex<Barriers>>) {
    loop {
        let waiting = {
            let mut barriers = barriers.lock();
            if barriers.waiting.is_empty() {
                barriers.is_asking = false;
                return;
            }
            std::mem::take(&mut barriers.waiting)
        };
        // What comes from here on may have been acknowledged later, and waits for the next question.
        let began = SeamInstant::now();
        let asked = match mutants::is(Mutant::ReadWithoutQuorum) {
            false => raft.get_read_log_id(ReadPolicy::ReadIndex).await,
            true => {
                let committed = raft.metrics().borrow_watched().cluster_committed;
                let position = committed.map_or(Position(0), |committed| position_of(committed.index));
                waiting.into_iter().for_each(|told| drop(told.send(Ok(position))));
                continue;
            }
        };
        let answer = match asked {
            Ok((read, _)) => Ok(position_of(read.index())),
            Err(RaftError::APIError(LinearizableReadError::QuorumNotEnough(_))) => {
                Err(LogFault::NoQuorum { waited: began.elapsed() })
            }
            Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(to))) => {
                Err(LogFault::NotLeader { hint: to.leader_id })
            }
            Err(RaftError::Fatal(fatal)) => Err(storage(fatal)),
        };
        for told in waiting {
            // Who asked may have given up.
            let _ = told.send(answer.clone());
        }
    }
}

/// Hands proposals to raft one by one, so that they keep their order, and ends the patience of those that are not told.
async fn submit(runtime: Runtime, raft: Raft, mut proposals: mpsc::UnboundedReceiver<Proposal>) {
    let mut waiting: VecDeque<(Duration, Slot)> = VecDeque::new();
    loop {
        let sweep = runtime.clock.sleep(SWEEP);
        let next = tokio::select! {
            biased;
            next = proposals.recv() => next,
            () = sweep, if !waiting.is_empty() => {
                let now = runtime.clock.monotonic();
                while let Some((_, slot)) = waiting.pop_front_if(|(due, slot)| *due <= now || slot.lock().is_none()) {
                    // Dropping it says that nothing is known.
                    slot.lock().take();
                }
                continue;
            }
        };
        let Some(Proposal { term, command, slot, held }) = next else { return };
        waiting.push_back((runtime.clock.monotonic() + PROPOSAL_PATIENCE, slot.clone()));
        let teller = Teller(Box::new(move |result: ClientWriteResult<TypeConfig>| {
            drop(held);
            let outcome = match result {
                Ok(written) => match written.data {
                    Taken::Delivered => Outcome::Committed(position_of(written.log_id.index)),
                    Taken::BehindSeal(_) => Outcome::Sealed,
                },
                Err(ClientWriteError::ForwardToLeader(to)) => {
                    Outcome::Refused(Refused::NotLeader { hint: to.leader_id })
                }
                Err(_) => Outcome::Unknown,
            };
            if let Some(slot) = slot.lock().take() {
                // The proposer may be gone.
                let _ = slot.send(outcome);
            }
        }));
        // A group that has ended drops the teller, which says that nothing is known.
        let _ = raft.write(command).with_leader(term).responder(teller).await;
    }
}
