//! Simulated logs as one of a node's engines.

use std::{collections::BTreeSet, sync::Arc};

use async_trait::async_trait;
use clutch_log::{
    Batch, Bounds, Engine, Log, LogFault, LogId, LogletId, LogletSpec, NodeId, Position, Purpose, Snapshots,
};
use clutch_runtime::Runtime;

use crate::SimLogs;

/// The members of a log; `None` where whoever opens it leads it.
pub type MembersOf = Arc<dyn Fn(LogId) -> Option<BTreeSet<NodeId>> + Send + Sync>;

/// What one node sees of simulated logs.
pub struct SimEngine {
    /// All logs.
    pub logs: SimLogs,
    /// What the node runs on.
    pub runtime: Runtime,
    /// The node.
    pub node: NodeId,
    /// Who keeps which log.
    pub members: MembersOf,
}

#[async_trait]
impl Engine for SimEngine {
    async fn open_loglet(
        &self,
        id: LogletId,
        _: &LogletSpec,
        purpose: Purpose,
        snapshots: Arc<dyn Snapshots>,
    ) -> Result<Arc<dyn Log>, LogFault> {
        let Self { logs, runtime, node, members } = self;
        let may_lead = purpose == Purpose::Append;
        if let Some(all) = members(id.log) {
            return Ok(logs.join_as(runtime, id, *node, &all, snapshots, may_lead));
        }
        if may_lead {
            // Whoever opens a log leads it; how much of what waited still commits is drawn.
            logs.elect(id, *node, runtime.random.below(3) as usize);
        }
        Ok(logs.log(runtime, id, *node))
    }

    async fn remove(&self, id: LogletId) -> Result<(), LogFault> {
        self.logs.groups.lock().remove(&id);
        Ok(())
    }

    fn bounds(&self, id: LogletId) -> Option<Bounds> {
        let group = self.logs.groups.lock().get(&id).cloned()?;
        let state = group.state.lock();
        Some(Bounds { first: state.floor.next(), last: state.tail() })
    }

    fn batch(&self, _: LogletId, _: Position) -> Result<Option<Batch>, LogFault> {
        // What a quorum keeps is not of this node's disk, so no copy of another time.
        Ok(None)
    }

    fn bytes(&self) -> u64 {
        0
    }
}
