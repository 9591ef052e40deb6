//! Where the members of the logs are that this node keeps, for those who ask the wrong one.

use std::{collections::BTreeMap, sync::Arc};

use clutch_log::{Log, LogId, NodeId};
use clutch_proto::session::Role;
use clutch_runtime::Endpoint;

/// The nodes that logs may have members on, this one among them, and where they are, as far as that is known now; none where every
/// log has one member. Cheap to clone.
#[derive(Clone)]
pub struct Peers {
    own: Option<NodeId>,
    nodes: Arc<dyn Fn() -> BTreeMap<NodeId, Endpoint> + Send + Sync>,
}

impl Peers {
    /// None: every log has one member.
    pub fn none() -> Peers {
        Peers::fixed(BTreeMap::new())
    }

    /// These, for good.
    pub fn fixed(nodes: BTreeMap<NodeId, Endpoint>) -> Peers {
        Peers { own: None, nodes: Arc::new(move || nodes.clone()) }
    }

    /// Those that it says whenever it is asked, of which members may come and go; `own` is this node.
    pub fn known(
        own: NodeId,
        nodes: impl Fn() -> BTreeMap<NodeId, Endpoint> + Send + Sync + 'static,
    ) -> Peers {
        Peers { own: Some(own), nodes: Arc::new(nodes) }
    }

    /// This node, where members of logs may come and go.
    pub(crate) fn own(&self) -> Option<NodeId> {
        self.own
    }

    /// All of them.
    pub fn all(&self) -> BTreeMap<NodeId, Endpoint> {
        (self.nodes)()
    }

    /// Whether logs may have several members.
    pub(crate) fn are_several(&self) -> bool {
        self.all().len() > 1
    }
}

/// The logs of a node, and where their members are.
pub(crate) struct Routes {
    peers: Peers,
    logs: BTreeMap<LogId, Arc<dyn Log>>,
}

impl Routes {
    pub(crate) fn new(peers: Peers, logs: impl Iterator<Item = (LogId, Arc<dyn Log>)>) -> Routes {
        Routes { peers, logs: logs.collect() }
    }

    /// Where a node is; empty where that is not known.
    pub(crate) fn address(&self, node: NodeId) -> String {
        self.peers.all().get(&node).map(Endpoint::to_string).unwrap_or_default()
    }

    /// All nodes that are known, and where they are.
    pub(crate) fn nodes(&self) -> BTreeMap<NodeId, Endpoint> {
        self.peers.all()
    }

    /// Whether this node leads a log.
    pub(crate) fn leads(&self, log: LogId) -> bool {
        self.logs.get(&log).is_some_and(|log| log.status().is_self)
    }

    /// Gives up the reign of this node in a log.
    pub(crate) fn resign(&self, log: LogId) {
        if let Some(log) = self.logs.get(&log) {
            log.resign();
        }
    }

    /// Where a log is led, as far as this node knows; empty when it does not. Where it hears of no leader and knows a node that came later
    /// than the members that it knows, that is named: others may have been put in the place of all that a client was told of.
    pub(crate) fn leader(&self, log: LogId) -> String {
        let Some(log) = self.logs.get(&log) else { return String::new() };
        let status = log.status();
        let is_member = |node: NodeId| status.members.iter().any(|progress| progress.member.node == node);
        // Where members do not come and go there is nobody else.
        let Some(own) = self.peers.own() else {
            return status.leader.map(|node| self.address(node)).unwrap_or_default();
        };
        if let Some(leader) = status.leader.filter(|_| is_member(own)) {
            return self.address(leader);
        }
        let nodes = self.peers.all();
        let newest = nodes.last_key_value().filter(|(node, _)| **node != own && !is_member(**node));
        newest.map(|(_, endpoint)| endpoint.to_string()).unwrap_or_default()
    }

    /// The other members of a log, and where they are.
    pub(crate) fn others(&self, log: LogId) -> Vec<(NodeId, Endpoint)> {
        let Some(log) = self.logs.get(&log) else { return Vec::new() };
        let status = log.status();
        let others = status.members.into_iter().map(|progress| progress.member.node);
        // Whoever asks leads.
        let others = others.filter(|node| Some(*node) != status.leader);
        let nodes = self.peers.all();
        others.filter_map(|node| Some((node, nodes.get(&node)?.clone()))).collect()
    }

    /// Where the members of a log are; none when this node is the only one.
    pub(crate) fn members(&self, log: LogId) -> Vec<String> {
        let members = self.logs.get(&log).map(|log| log.status().members).unwrap_or_default();
        if members.len() < 2 {
            return Vec::new();
        }
        let nodes = self.peers.all();
        let known = members.iter().filter_map(|progress| nodes.get(&progress.member.node));
        known.map(Endpoint::to_string).collect()
    }
}

/// The log that a request is for; `None` where it is for none.
pub(crate) fn log_of(role: Role, number: u64) -> Option<LogId> {
    match role {
        Role::Registry => Some(LogId::REGISTRY),
        Role::Cdc => Some(LogId::CDC),
        Role::Shard => u32::try_from(number).ok().map(LogId::shard),
        Role::Blocks | Role::Unspecified => None,
    }
}
