//! Three nodes that keep one log.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use clutch_log::{LogId, NodeId, conformance::SuiteSnapshots};
use clutch_log_store::{Options, Store};
use clutch_runtime::{
    Answers, BoxFuture, Endpoint, Handled, Handler, Listening, PeerStream, Runtime,
    simulated::{NodeId as SimNode, World},
};
use parking_lot::Mutex;

use crate::{Identities, Peers, RaftEngine, RaftLog, Timing, parameters};

pub(super) const PATIENCE: Duration = Duration::from_secs(30);
pub(super) const CLUSTER: u64 = 7;
pub(super) const KEY: [u8; 32] = [5; 32];

/// Whom a node has met.
pub(super) fn identities(runtime: &Runtime, node: NodeId) -> Identities {
    Identities::open(runtime, "identities".into(), node, || Ok(true)).expect("is there")
}

/// Takes streams, and nothing else.
pub(super) struct Accepts(pub(super) Arc<Peers>);

impl Handler for Accepts {
    fn handle(&self, _: Bytes, _: Answers) -> BoxFuture<Handled> {
        Box::pin(async { Handled::default() })
    }

    fn accept(&self, stream: PeerStream) {
        self.0.accept(stream);
    }
}

struct Running {
    log: Arc<RaftLog>,
    snapshots: Arc<SuiteSnapshots>,
    _listening: Box<dyn Listening>,
}

/// A node on what its disk has; why it does not start.
async fn start(on: &Runtime, node: NodeId, members: &[NodeId], timing: Timing) -> Result<Running, String> {
    let addresses = Arc::new(|node| Some(endpoint(node)));
    let identities = Identities::open(on, "identities".into(), node, || Ok(true));
    let identities = identities.map_err(|error| error.to_string())?;
    let peers = Peers::new(on.clone(), CLUSTER, node, KEY, identities, "", addresses);
    let handler = Arc::new(Accepts(peers.clone()));
    let listening = on.network.listen(&endpoint(node), handler).await.map_err(|error| error.to_string())?;
    let options = Options { node, cluster: CLUSTER, may_quarantine: true, ..Options::default() };
    let store = Store::open(on, "log".into(), options).map_err(|error| error.to_string())?;
    let engine = RaftEngine::new(on.clone(), store, peers, timing);
    let snapshots = Arc::new(SuiteSnapshots::default());
    let log = engine.open(LogId::CDC.into(), &parameters(members), snapshots.clone()).await;
    let log = log.map_err(|error| error.to_string())?;
    Ok(Running { log, snapshots, _listening: listening })
}

/// The nodes; node 0 drives them.
pub(super) struct Nodes {
    pub(super) world: Arc<World>,
    count: u64,
    /// The nodes that the log begins on.
    first: Vec<NodeId>,
    timing: Timing,
    running: Mutex<BTreeMap<NodeId, Running>>,
    cut_off: Mutex<BTreeSet<NodeId>>,
}

fn endpoint(node: NodeId) -> Endpoint {
    format!("node{node}").as_str().into()
}

impl Nodes {
    pub(super) fn new(world: Arc<World>, count: u64) -> Nodes {
        Nodes::beginning_on(world, count, (1..=count).collect())
    }

    /// Nodes of which these keep the log at first.
    pub(super) fn beginning_on(world: Arc<World>, count: u64, first: Vec<NodeId>) -> Nodes {
        let timing = Timing::default();
        Nodes { world, count, first, timing, running: Mutex::default(), cut_off: Mutex::default() }
    }

    /// The same nodes, which read by leases with this margin.
    pub(super) fn reading_by_lease(mut self, margin: Duration) -> Nodes {
        self.timing.lease_reads = Some(margin);
        self
    }

    pub(super) fn numbers(&self) -> impl Iterator<Item = NodeId> + use<> {
        1..=self.count
    }

    pub(super) fn driver(&self) -> Runtime {
        self.world.node(SimNode(0))
    }

    /// Starts a node on what its disk has.
    pub(super) async fn boot(&self, node: NodeId) {
        self.try_boot(node).await.expect("the node starts");
    }

    /// The same; why it does not start.
    pub(super) async fn try_boot(&self, node: NodeId) -> Result<(), String> {
        let runtime = self.world.node(SimNode(node as u32));
        let (members, timing) = (self.first.clone(), self.timing);
        let (started, running) = tokio::sync::oneshot::channel();
        let on = runtime.clone();
        runtime.spawn("boot", async move {
            // Nobody waits any more where the node was crashed meanwhile.
            let _ = started.send(start(&on, node, &members, timing).await);
        });
        let running = running.await.map_err(|_| "its power went".to_owned())??;
        self.running.lock().insert(node, running);
        Ok(())
    }

    /// A node that is down forgets what it has of the log.
    pub(super) async fn forget(&self, node: NodeId) {
        let runtime = self.world.node(SimNode(node as u32));
        let (done, forgotten) = tokio::sync::oneshot::channel();
        let on = runtime.clone();
        runtime.spawn("forget", async move {
            let addresses = Arc::new(|node| Some(endpoint(node)));
            let peers = Peers::new(on.clone(), CLUSTER, node, KEY, identities(&on, node), "", addresses);
            let options = Options { node, cluster: CLUSTER, may_quarantine: true, ..Options::default() };
            let store = Store::open(&on, "log".into(), options).expect("the store opens");
            let engine = RaftEngine::new(on.clone(), store, peers, Timing::default());
            engine.forget(LogId::CDC.into()).await.expect("forgets");
            let _ = done.send(());
        });
        forgotten.await.expect("it forgets");
        self.world.crash(SimNode(node as u32));
    }

    /// The power of a node goes.
    pub(super) fn crash(&self, node: NodeId) {
        self.running.lock().remove(&node);
        self.world.crash(SimNode(node as u32));
    }

    /// A node's log, if it runs.
    pub(super) fn running(&self, node: NodeId) -> Option<Arc<RaftLog>> {
        self.running.lock().get(&node).map(|running| running.log.clone())
    }

    pub(super) fn running_snapshots(&self, node: NodeId) -> Option<Arc<SuiteSnapshots>> {
        self.running.lock().get(&node).map(|running| running.snapshots.clone())
    }

    /// The log of a node that believes to lead.
    pub(super) fn any_leader(&self) -> Option<Arc<RaftLog>> {
        let running = self.running.lock();
        running.values().map(|is| is.log.clone()).find(|log| clutch_log::Log::status(&**log).is_self)
    }

    pub(super) fn log(&self, node: NodeId) -> Arc<RaftLog> {
        self.running.lock().get(&node).expect("the node runs").log.clone()
    }

    pub(super) fn snapshots(&self, node: NodeId) -> Arc<SuiteSnapshots> {
        self.running.lock().get(&node).expect("the node runs").snapshots.clone()
    }

    /// Cuts a node off from the others.
    pub(super) fn cut_off(&self, node: NodeId, is_cut_off: bool) {
        for other in self.numbers().filter(|other| *other != node) {
            let (node, other) = (SimNode(node as u32), SimNode(other as u32));
            self.world.set_blocked(node, other, is_cut_off);
            self.world.set_blocked(other, node, is_cut_off);
        }
        let mut cut_off = self.cut_off.lock();
        if is_cut_off {
            cut_off.insert(node);
        } else {
            cut_off.remove(&node);
        }
    }

    /// Waits until something is so.
    pub(super) async fn until(&self, what: &str, is_so: impl Fn() -> bool) {
        let runtime = self.driver();
        let end = runtime.clock.monotonic() + PATIENCE;
        while !is_so() {
            assert!(runtime.clock.monotonic() < end, "waited in vain until {what}");
            runtime.clock.sleep(Duration::from_millis(5)).await;
        }
    }

    /// A node that leads and can be reached, other than `but`.
    pub(super) async fn leader(&self, but: Option<NodeId>) -> NodeId {
        self.until("a member leads", || self.settled(but).is_some()).await;
        self.settled(but).expect("it was there")
    }

    /// The same, if there is one now, which has delivered all of earlier reigns.
    pub(super) fn settled(&self, but: Option<NodeId>) -> Option<NodeId> {
        let running = self.running.lock();
        let cut_off = self.cut_off.lock();
        let leads = |(node, is): (&NodeId, &Running)| {
            let may = Some(*node) != but && !cut_off.contains(node);
            let settled = is.log.0.leading() == Some(is.log.0.delivered().last().1);
            (may && settled).then_some(*node)
        };
        running.iter().find_map(leads)
    }
}
