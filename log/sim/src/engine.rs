//! Simulated logs as one of a node's engines.

use std::{collections::BTreeSet, sync::Arc};

use async_trait::async_trait;
use clutch_log::{
    Batch, Bounds, Engine, Log, LogFault, LogId, LogletId, LogletSpec, NodeId, Position, Purpose, Snapshots,
    Usage,
};
use clutch_runtime::Runtime;

use crate::SimLogs;

/// Who keeps a log.
pub enum Keepers {
    /// These, who elect one of themselves.
    Members(BTreeSet<NodeId>),
    /// This node leads when it opens the log; who else opens it does not lead.
    Leader(NodeId),
}

/// Who keeps which log, at the moment.
pub type KeepersOf = Arc<dyn Fn(LogId) -> Keepers + Send + Sync>;

/// What one node sees of simulated logs.
pub struct SimEngine {
    /// All logs.
    pub logs: SimLogs,
    /// What the node runs on.
    pub runtime: Runtime,
    /// The node.
    pub node: NodeId,
    /// Who keeps which log.
    pub keepers: KeepersOf,
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
        let Self { logs, runtime, node, keepers } = self;
        let may_lead = purpose == Purpose::Append;
        match keepers(id.log) {
            Keepers::Members(all) => Ok(logs.join_as(runtime, id, *node, &all, snapshots, may_lead)),
            Keepers::Leader(leader) => {
                if may_lead && leader == *node {
                    // How much of what waited still commits is drawn.
                    logs.elect(id, *node, runtime.random.below(3) as usize);
                }
                Ok(logs.log(runtime, id, *node))
            }
        }
    }

    async fn remove(&self, id: LogletId) -> Result<(), LogFault> {
        self.logs.groups.lock().remove(&id);
        Ok(())
    }

    fn loglets(&self) -> Vec<LogletId> {
        Vec::new()
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

    fn usage(&self) -> Usage {
        Usage::default()
    }
}
