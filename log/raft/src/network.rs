//! Messages between nodes of one process, which can be cut off from each other.

use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    sync::Arc,
};

use openraft::{
    EmptyNode, OptionalSend, RaftNetworkFactory, RaftNetworkV2,
    errors::{RPCError, ReplicationClosed, StreamingError, Unreachable},
    network::RPCOption,
    raft::{
        AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, TransferLeaderRequest,
        TransferLeaderResponse, VoteRequest, VoteResponse,
    },
};
use parking_lot::Mutex;

use crate::{
    Node, TypeConfig,
    storage::{Snap, Vote},
};

type Rpc = RPCError<TypeConfig>;

/// Knows all nodes and which of them cannot hear each other.
#[derive(Clone, Default)]
pub struct Router {
    nodes: Arc<Mutex<BTreeMap<u64, Node>>>,
    isolated: Arc<Mutex<BTreeSet<u64>>>,
}

impl Router {
    pub(crate) fn add(&self, id: u64, node: Node) {
        self.nodes.lock().insert(id, node);
    }

    pub(crate) fn factory(&self, from: u64) -> Factory {
        Factory { router: self.clone(), from }
    }

    /// Cuts a node off from all others, or lets it back.
    pub fn set_isolated(&self, id: u64, isolated: bool) {
        let mut all = self.isolated.lock();
        if isolated {
            all.insert(id);
        } else {
            all.remove(&id);
        }
    }

    /// Ends all nodes.
    pub async fn shutdown(&self) {
        let nodes = std::mem::take(&mut *self.nodes.lock());
        for node in nodes.into_values() {
            // A node that has panicked is as good as shut down.
            let _ = node.shutdown().await;
        }
    }

    fn link(&self, from: u64, to: u64) -> Result<Node, Unreachable<TypeConfig>> {
        let isolated = self.isolated.lock();
        if isolated.contains(&from) || isolated.contains(&to) {
            return Err(Unreachable::from_string(format!("{from} and {to} are cut off from each other")));
        }
        let node = self.nodes.lock().get(&to).cloned();
        node.ok_or_else(|| Unreachable::from_string(format!("node {to} is down")))
    }
}

fn down(error: impl ToString) -> Rpc {
    RPCError::Unreachable(Unreachable::from_string(error))
}

pub(crate) struct Factory {
    router: Router,
    from: u64,
}

impl RaftNetworkFactory<TypeConfig> for Factory {
    type Network = Connection;

    async fn new_client(&mut self, target: u64, _node: &EmptyNode) -> Connection {
        Connection { router: self.router.clone(), from: self.from, to: target }
    }
}

pub(crate) struct Connection {
    router: Router,
    from: u64,
    to: u64,
}

impl Connection {
    fn target(&self) -> Result<Node, Rpc> {
        Ok(self.router.link(self.from, self.to)?)
    }

    /// The answer must get back, too.
    fn answer<T>(&self, answer: T) -> Result<T, Rpc> {
        self.router.link(self.to, self.from)?;
        Ok(answer)
    }
}

impl RaftNetworkV2<TypeConfig> for Connection {
    type SnapshotData = Vec<u8>;

    async fn append_entries(
        &mut self,
        request: AppendEntriesRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<AppendEntriesResponse<TypeConfig>, Rpc> {
        let answer = self.target()?.append_entries(request).await.map_err(down)?;
        self.answer(answer)
    }

    async fn vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, Rpc> {
        let answer = self.target()?.vote(request).await.map_err(down)?;
        self.answer(answer)
    }

    async fn pre_vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, Rpc> {
        let answer = self.target()?.pre_vote(request).await.map_err(down)?;
        self.answer(answer)
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snap,
        _cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let target = self.router.link(self.from, self.to)?;
        let installed = target.install_full_snapshot(vote, snapshot).await;
        installed.map_err(|e| StreamingError::Unreachable(Unreachable::from_string(e)))
    }

    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>, Rpc> {
        self.target()?.handle_transfer_leader(request).await.map_err(down)
    }
}
