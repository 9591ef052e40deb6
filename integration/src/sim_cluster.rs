//! A simulated cluster: registry, CDC, shards, disks and clients, each on a node of its own.

use std::{path::PathBuf, sync::Arc, time::Duration};

use async_trait::async_trait;
use clutch_client::{Client, ClientOptions};
use clutch_log::{Log, LogFault, LogId};
use clutch_log_sim::SimLogs;
use clutch_proto::{ServiceId, certificate::Key};
use clutch_runtime::{
    Runtime,
    simulated::{NodeId, World},
};
use clutch_server::{
    ClusterFile, Node, NodeConfig, Roles,
    stores::{LogProvider, StoreProvider},
};
use clutch_shard::Keyring;
use clutch_state::{MemoryStore, Store, StoreError, replica::OpenCheckpoint};

/// The registry's node.
pub const REGISTRY: NodeId = NodeId(1);
/// The CDC's node.
pub const CDC: NodeId = NodeId(2);
/// The node of all disks.
pub const DISKS: NodeId = NodeId(3);
/// The first client's node.
pub const CLIENT: NodeId = NodeId(50);

/// The node of a shard.
pub fn shard_node(number: u32) -> NodeId {
    NodeId(10 + number)
}

/// A cluster in a world.
pub struct SimCluster {
    /// The world it lives in.
    pub world: Arc<World>,
    /// Its logs: what survives every crash.
    pub logs: SimLogs,
    cluster: ClusterFile,
}

struct SimLogProvider {
    logs: SimLogs,
    runtime: Runtime,
    node: NodeId,
}

#[async_trait]
impl LogProvider for SimLogProvider {
    async fn log(&self, id: LogId) -> Result<Arc<dyn Log>, LogFault> {
        // Whoever opens a log leads it; how much of what waited still commits is drawn.
        self.logs.elect(id, u64::from(self.node.0), self.runtime.random.below(3) as usize);
        Ok(self.logs.log(&self.runtime, id, u64::from(self.node.0)))
    }
}

struct MemoryStores;

impl StoreProvider for MemoryStores {
    fn store(&self, _id: LogId) -> Result<Arc<dyn Store>, StoreError> {
        Ok(Arc::new(MemoryStore::new()))
    }

    fn checkpoints(&self, _id: LogId) -> Option<PathBuf> {
        None
    }

    fn open_checkpoint(&self) -> OpenCheckpoint {
        Arc::new(|_| Err(StoreError::Engine("the memory store has no checkpoints".into())))
    }
}

impl SimCluster {
    /// Starts all nodes; returns when a client sees the whole cluster.
    ///
    /// # Panics
    /// When the cluster does not come up within a minute of virtual time.
    pub fn start(seed: u64, shards: u32, disks: u32) -> SimCluster {
        let world = Arc::new(World::new(seed));
        let cluster =
            ClusterFile::generate(&world.node(NodeId(0)), shards, disks, 2, 1).expect("within the limits");
        let this = SimCluster { world, logs: SimLogs::new(), cluster };
        for node in this.nodes() {
            this.boot(node);
        }
        this.wait_ready();
        this
    }

    /// All nodes of the cluster itself.
    pub fn nodes(&self) -> Vec<NodeId> {
        [REGISTRY, CDC, DISKS].into_iter().chain((0..self.cluster.shards).map(shard_node)).collect()
    }

    fn roles(&self, node: NodeId) -> Roles {
        let mut roles = Roles { registry: node == REGISTRY, cdc: node == CDC, ..Roles::default() };
        if node == DISKS {
            let ids = self.cluster.service_ids().expect("made by generate");
            roles.disks =
                ids.into_iter().enumerate().map(|(n, id)| (id, PathBuf::from(format!("disk{n}")))).collect();
        }
        roles.shards = (0..self.cluster.shards).filter(|n| shard_node(*n) == node).collect();
        roles
    }

    /// Starts a node, or starts it again after a crash.
    pub fn boot(&self, node: NodeId) {
        let runtime = self.world.node(node);
        let mut keyring = Keyring::default();
        for id in self.cluster.service_ids().expect("made by generate") {
            keyring.add(ServiceId(id), Key { epoch: 1, secret: [id as u8; 32] });
        }
        let config = NodeConfig {
            runtime: runtime.clone(),
            listen: format!("node{}", node.0).as_str().into(),
            advertise: None,
            registry: Some(format!("node{}", REGISTRY.0).as_str().into()),
            cluster: self.cluster.clone(),
            roles: self.roles(node),
            logs: Arc::new(SimLogProvider { logs: self.logs.clone(), runtime: runtime.clone(), node }),
            stores: Arc::new(MemoryStores),
            engine: "sim".into(),
            keyring,
            system_key: [7; 32],
        };
        runtime.spawn("boot", async move {
            let _node = Node::start(config).await.expect("the node starts");
            std::future::pending::<()>().await;
        });
    }

    /// Stops a node at once and starts it again.
    pub fn restart(&self, node: NodeId) {
        self.world.crash(node);
        self.boot(node);
    }

    /// A client on its own node.
    pub fn client(&self) -> Client {
        self.client_on(CLIENT)
    }

    /// A client on a node.
    pub fn client_on(&self, node: NodeId) -> Client {
        let options = ClientOptions {
            attempt: Duration::from_millis(500),
            cache_lifetime: Duration::ZERO,
            ..ClientOptions::default()
        };
        Client::new(self.world.node(node), format!("node{}", REGISTRY.0).as_str().into(), options)
    }

    fn wait_ready(&self) {
        let client = self.client();
        let shards = self.cluster.shards as usize;
        let ready = self.world.run(CLIENT, Duration::from_secs(60), async move {
            loop {
                match client.refresh_map().await {
                    Ok(map)
                        if map.shards.len() == shards
                            && !map.cdc_address.is_empty()
                            && !map.services.is_empty() =>
                    {
                        // The shards compare themselves with the registry every two seconds.
                        return client.runtime().clock.sleep(Duration::from_secs(5)).await;
                    }
                    _ => client.runtime().clock.sleep(Duration::from_millis(50)).await,
                }
            }
        });
        ready.expect("the cluster comes up");
    }

    /// Runs a client's task to its end.
    ///
    /// # Panics
    /// When it does not end within ten minutes of virtual time.
    pub fn run<T: Send + 'static>(&self, task: impl Future<Output = T> + Send + 'static) -> T {
        self.world.run(CLIENT, Duration::from_secs(600), task).expect("the task ends")
    }

    /// Checks all invariants.
    ///
    /// # Panics
    /// When one does not hold.
    pub fn fsck(&self) {
        let client = self.client();
        let checked =
            self.run(
                async move { clutch_server::fsck::check(&client, &mut |_, _| {}).await.expect("fsck runs") },
            );
        assert!(checked.violations.is_empty(), "fsck: {:#?}", checked.violations);
    }
}
