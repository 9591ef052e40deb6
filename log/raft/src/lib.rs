//! The `raft` log engine: openraft between nodes, on the store that all engines share.
//!
//! A batch is one record of raft; its index in the loglet is raft's and one more, its reign is the term (standard leader ids, so
//! that a term has one leader). openraft's state machine is a stub that notes how far the log is delivered; readers read the
//! log itself. docs/design/2026-11-27-raft.md says what of openraft is used, and what is not.
//!
//! Invariants: no type of openraft leaves this crate; what is acknowledged is durable on a quorum; a member whose disk was lost is
//! none any more, because its votes are lost, too.

mod answers;
mod changes;
mod codec;
mod delivered;
mod events;
mod greeting;
mod identities;
mod lease;
mod log;
mod member;
mod messages;
mod network;
mod peers;
mod quorum;
mod seam;
mod snapshots;
mod standing;
mod storage;
mod types;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use async_trait::async_trait;
use clutch_log::{
    Batch, Bounds, Engine, Log, LogFault, LogletId, LogletSpec, NodeId, Position, Purpose, Snapshots, Usage,
};
use clutch_log_store::{RecordKind, Store};
use clutch_proto::mutants::{self, Mutant};
use clutch_runtime::{Runtime, SHARED_MOMENTS};
use openraft::{Config, EmptyNode, SnapshotPolicy};

pub use identities::Identities;
pub use log::RaftLog;
use member::{Member, Parts};
pub use peers::{Addresses, Peers};
use snapshots::{Received, Sent};
use types::Raft;

/// How quickly a group notices that its leader is gone.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// How often a leader is heard of.
    pub heartbeat: Duration,
    /// After so long without a word a member believes that there is no leader; elections follow within as long again, at the next
    /// shared moment.
    pub lease: Duration,
    /// Leaders answer reads by what a quorum has promised, without asking it, and stop so much before that ends: as much as clocks may
    /// be apart after a lease. `None` where they always ask.
    pub lease_reads: Option<Duration>,
}

impl Default for Timing {
    fn default() -> Timing {
        // openraft sends a heartbeat at the first tick after so long, and ticks come at shared moments: at each second one, also
        // where one comes half of the way late.
        let heartbeat = SHARED_MOMENTS * 2 - SHARED_MOMENTS / 2;
        Timing { heartbeat, lease: Duration::from_millis(450), lease_reads: None }
    }
}

/// All groups of a node.
pub struct RaftEngine {
    runtime: Runtime,
    store: Store,
    peers: Arc<Peers>,
    config: Arc<Config>,
    timing: Timing,
}

fn storage(error: impl std::fmt::Display) -> LogFault {
    LogFault::Storage(error.to_string())
}

/// What a loglet of this engine begins with: these members, all of which vote.
pub fn parameters(members: &[NodeId]) -> String {
    let members: Vec<String> = members.iter().map(ToString::to_string).collect();
    format!("members {}", members.join(","))
}

/// The members that a loglet begins with.
fn first_members(parameters: &str) -> Result<BTreeMap<NodeId, EmptyNode>, LogFault> {
    let wrong = || {
        LogFault::Unsupported(format!(
            "a log of the engine raft begins with {parameters:?}, which is not of the form \"members 1,2,3\""
        ))
    };
    let list = parameters.strip_prefix("members ").ok_or_else(wrong)?;
    let members = list.split(',').map(|node| node.parse().map(|node| (node, EmptyNode {})));
    members.collect::<Result<BTreeMap<NodeId, EmptyNode>, _>>().map_err(|_| wrong())
}

impl RaftEngine {
    /// Groups on this store, which others keep, too.
    ///
    /// # Panics
    /// When the timing is none: elections must take longer than heartbeats.
    pub fn new(runtime: Runtime, store: Store, peers: Arc<Peers>, timing: Timing) -> RaftEngine {
        let ms = |time: Duration| u64::try_from(time.as_millis()).expect("times of milliseconds");
        let config = Config {
            heartbeat_interval: ms(timing.heartbeat),
            election_timeout_min: ms(timing.lease / 2),
            election_timeout_max: ms(timing.lease),
            // Snapshots are the replica's, and floors say what may go.
            snapshot_policy: SnapshotPolicy::Never,
            max_in_snapshot_log_to_keep: 0,
            purge_batch_size: 1,
            replication_lag_threshold: u64::MAX / 2,
            enable_pre_vote: Some(true),
            enable_leader_restore: Some(false),
            backoff: "20ms 20ms 20ms".to_owned(),
            ..Config::default()
        };
        let config = Arc::new(config.validate().expect("elections take longer than heartbeats"));
        RaftEngine { runtime, store, peers, config, timing }
    }

    /// Loglets that are not opened, because a record of theirs is damaged here, and how.
    pub fn damaged(&self) -> BTreeMap<LogletId, LogFault> {
        self.store.quarantined()
    }

    /// Throws away what this node has of a loglet, its votes among it, so that it begins with nothing when it is opened. Only for a
    /// loglet of which this node is no member any more, which its leader must have said: its votes are lost. Durable when it returns.
    ///
    /// # Errors
    /// When that cannot be written.
    pub async fn forget(&self, id: LogletId) -> Result<(), LogFault> {
        // What is removed begins again, also where only its room could not be given back, or an earlier attempt ended between.
        let removed = self.store.remove(id).await;
        let begun = self.store.revive(id, storage::no_vote(self.peers.node())).await;
        begun.map_err(|fault| removed.err().unwrap_or(fault))
    }

    /// Whether forgetting a loglet was cut off in its middle: it cannot be opened until that is done again.
    pub fn is_half_forgotten(&self, id: LogletId) -> bool {
        self.store.is_removed(id)
    }

    /// Opens a loglet to be appended to.
    ///
    /// # Errors
    /// When its records cannot be read.
    pub async fn open(
        &self,
        id: LogletId,
        parameters: &str,
        snapshots: Arc<dyn Snapshots>,
    ) -> Result<Arc<RaftLog>, LogFault> {
        let first = first_members(parameters)?;
        let group = self.store.group(id)?;
        let has_voted = group.view().vote.is_some();
        let log = storage::GroupLog::open(&self.runtime, group).map_err(storage)?;
        let delivered = delivered::Delivered::open(log.clone()).map_err(storage)?;
        let sent = Arc::new(Sent { log: log.clone(), snapshots: snapshots.clone() });
        let received = Arc::new(Received::new(self.runtime.clone(), self.peers.clone(), id, snapshots));
        let network = network::Factory { peers: self.peers.clone(), id, sent: sent.clone() };
        let node = self.peers.node();
        let raft = Raft::new(node, self.config.clone(), network, log.clone(), delivered.clone());
        let raft = raft.await.map_err(storage)?;
        // All of the first members say the same, so it does not matter who begins. Who has forgotten what it had is none of them
        // any more, whatever the parameters say.
        let may_begin = !has_voted || mutants::is(Mutant::RejoinsAsFounder);
        let others = log.last_id().map(|last| log.members_at(last.index)).transpose().map_err(storage)?;
        let is_alone = others.is_some_and(|members| members.voter_ids().eq([node]));
        let lease = Arc::new(lease::Lease::new(&self.runtime, self.timing, !has_voted || is_alone));
        if !lease.may_vote() {
            raft.runtime_config().elect(false);
        }
        let is_founder = may_begin && first.contains_key(&node);
        if is_founder && !raft.is_initialized().await.map_err(storage)? {
            raft.initialize(first).await.map_err(storage)?;
        }
        let (runtime, peers) = (self.runtime.clone(), self.peers.clone());
        let parts = Parts {
            runtime: runtime.clone(),
            id,
            peers,
            log,
            delivered,
            sent,
            received,
            lease: lease.clone(),
        };
        let member = Member::start(parts, raft);
        if !lease.may_vote() {
            runtime.spawn("raft lease", lease::wait(runtime.clone(), lease, Arc::downgrade(&member)));
        }
        Ok(Arc::new(RaftLog(member)))
    }
}

#[async_trait]
impl Engine for RaftEngine {
    async fn open_loglet(
        &self,
        id: LogletId,
        spec: &LogletSpec,
        purpose: Purpose,
        snapshots: Arc<dyn Snapshots>,
    ) -> Result<Arc<dyn Log>, LogFault> {
        let held = self.store.bounds(id).map_or(Position(0), |bounds| bounds.last);
        if let Purpose::Read { upto } = purpose
            && held < upto
        {
            return Err(LogFault::Unsupported(format!(
                "{id} has ended at {upto}, and this node has it up to {held}: take the replica's state from another node"
            )));
        }
        Ok(self.open(id, &spec.parameters, snapshots).await?)
    }

    async fn remove(&self, id: LogletId) -> Result<(), LogFault> {
        self.store.remove(id).await
    }

    fn loglets(&self) -> Vec<LogletId> {
        self.store.groups()
    }

    fn bounds(&self, id: LogletId) -> Option<Bounds> {
        self.store.bounds(id)
    }

    fn batch(&self, id: LogletId, index: Position) -> Result<Option<Batch>, LogFault> {
        let record = self.store.record(id, index)?;
        Ok(record.filter(|record| record.kind == RecordKind::Batch).map(clutch_log_store::Record::into_batch))
    }

    fn usage(&self) -> Usage {
        self.store.usage()
    }
}

#[cfg(test)]
mod tests;
