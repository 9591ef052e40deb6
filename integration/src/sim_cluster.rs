//! A simulated cluster: registry, CDC, shards, disks and clients, each on a node of its own.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use clutch_blocks::{BlockStore, PackOptions, label::Label};
use clutch_client::{Client, ClientOptions, Observer, Reads, Registries};
use clutch_log::{Bounds, Engine as LogEngine, Engines, LogFault, LogId, Position};
use clutch_log_local::LocalEngine;
use clutch_log_raft::{Identities, Peers as RaftPeers, RaftEngine, Timing};
use clutch_log_sim::{Keepers, SimEngine, SimLogs};
use clutch_log_store::{Options as StoreOptions, Store as LogStore};
use clutch_proto::{
    ServiceId, Time,
    admin::{AdminRequest, TakeCheckpoint, TrimLog, admin_request::Op},
    certificate::Key,
    level,
    session::Role,
};
use clutch_runtime::{
    Endpoint, PeerStream, Runtime,
    simulated::{NodeId, SimDisk, World},
};
use clutch_server::{
    Chains, ClusterFile, NewLogs, Node, NodeConfig, OfSeveral, Packing, Peers, Roles,
    healer::HealSettings,
    joining::Belongings,
    room::Room,
    rotation::Rotation,
    stores::{IsHome, Rebuilt, StoreProvider},
};
use clutch_shard::{Keyring, Lifetimes, Pages};
use clutch_state::{Store, StoreError};
use clutch_state_replica::OpenCheckpoint;
use parking_lot::Mutex;

use crate::{
    recording::Recording,
    sim_store::{self, SimImages},
};

/// The registry's node.
pub const REGISTRY: NodeId = NodeId(1);
/// The CDC's node.
pub const CDC: NodeId = NodeId(2);
/// Where the operator sits.
const OPERATOR: NodeId = NodeId(499);
/// The first client's node.
pub const CLIENT: NodeId = NodeId(500);
/// What the nodes of a simulated cluster know each other by.
pub const SYSTEM_KEY: [u8; 32] = [7; 32];
/// Nanoseconds since 1970 when a simulated world begins.
const SIM_START: u64 = clutch_runtime::simulated::START_NS;
/// Nodes from here on take over roles of others.
const SPARE: u32 = 1000;
/// The nodes of the further members of logs are so far from those of the first ones.
const MEMBERS: u32 = 10_000;

/// Short, so that grants and contents expire within a script.
pub const LIFETIMES: Lifetimes = Lifetimes { grant_ms: 400, transient_ms: 4000 };
/// Small enough that segments are closed, moved and removed within a script.
pub const PACKED: PackOptions = PackOptions { below: 32 << 10, segment_bytes: 40 << 10, merge_at: 16 };
/// Generated scripts keep clocks closer than this.
pub const CLOCK_SKEW_MS_MAX: u64 = 450;

/// The first node of a shard.
pub fn shard_node(number: u32) -> NodeId {
    NodeId(10 + number)
}

/// The node of a log's member, by the node of the first.
fn member_node(first: NodeId, member: u32) -> NodeId {
    NodeId(first.0 + member * MEMBERS)
}

/// Where a node listens.
pub fn endpoint(node: NodeId) -> Endpoint {
    format!("node{}", node.0).as_str().into()
}

/// The node of a disk.
pub fn disk_node(number: u32) -> NodeId {
    NodeId(300 + number)
}

/// The key of a block service in simulated clusters.
pub fn service_key(service: u64) -> Key {
    Key { epoch: 1, secret: [service as u8; 32] }
}

/// Where the logs live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// Outside the nodes: what a quorum keeps. Leadership can move.
    Sim,
    /// The `local` engine, on the simulated disk of its node.
    Local,
    /// The `raft` engine, on the simulated disks of its members.
    Raft,
}

/// What keeps the logs of generated clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Members {
    /// One of the engines that have one member, as drawn.
    Drawn,
    /// This engine, with so many members of each log.
    Of(Engine, u32),
}

impl Members {
    /// Makes a cluster that was drawn with this seed one of that kind.
    pub fn set(self, seed: u64, cluster: &mut ClusterConfig) {
        if let Members::Of(engine, replicas) = self {
            (cluster.engine, cluster.replicas) = (engine, replicas);
            // Odd and even seeds differ in how they end.
            cluster.joint = engine == Engine::Raft && replicas > 1 && seed / 2 % 2 == 1;
            cluster.leases = engine == Engine::Raft && replicas > 1 && seed / 4 % 2 == 1;
        }
    }
}

/// What a cluster is made of.
#[derive(Clone, Debug)]
pub struct ClusterConfig {
    /// Metadata shards; a power of two.
    pub shards: u32,
    /// Disks, each a block service on a node of its own.
    pub disks: u32,
    /// Data blocks of a span.
    pub data_blocks: u32,
    /// Parity blocks of a span.
    pub parity_blocks: u32,
    /// Where the logs live.
    pub engine: Engine,
    /// Of a thousand writes to a store, after how many what was written so far survives a crash.
    pub flush_permille: u32,
    /// How much the answers of shards hold; 0 for what ships.
    pub page: u32,
    /// Whether names of scripts stand for such that have one hash.
    pub collide: bool,
    /// Members of each log, each on a node of its own, that elect their leader; 1 for a log that whoever opens it leads.
    pub replicas: u32,
    /// Whether a node has a member of every log, as small clusters have; else each member has a node of its own.
    pub joint: bool,
    /// Whether leaders answer reads by leases; of the engine raft.
    pub leases: bool,
    /// Files of up to so many bytes lie in the metadata, besides the shortest.
    pub inline: u32,
    /// How its nodes look after what is stored; `None` where that is for scripts.
    pub heal: Option<HealSettings>,
}

impl ClusterConfig {
    /// One with simulated logs of one member each, whose stores flush by themselves only; spans of so many data and parity blocks.
    pub fn of(shards: u32, disks: u32, (data_blocks, parity_blocks): (u32, u32)) -> ClusterConfig {
        ClusterConfig {
            shards,
            disks,
            data_blocks,
            parity_blocks,
            engine: Engine::Sim,
            flush_permille: 0,
            page: 0,
            collide: false,
            replicas: 1,
            joint: false,
            leases: false,
            inline: 0,
            heal: None,
        }
    }

    /// How much the answers of shards hold.
    pub fn pages(&self) -> Pages {
        match self.page {
            0 => Pages::default(),
            count => Pages::of(count as usize),
        }
    }
}

/// A cluster in a world.
pub struct SimCluster {
    /// The world it lives in.
    pub world: Arc<World>,
    /// Its logs, when they live outside the nodes.
    pub logs: SimLogs,
    /// What the replicas were given from their logs.
    pub recording: Arc<Recording>,
    config: ClusterConfig,
    cluster: ClusterFile,
    images: SimImages,
    /// The nodes of each log's members.
    homes: Homes,
    spares: Mutex<u32>,
    /// Nodes whose start failed; whoever drives the world starts them again.
    failed: Arc<Mutex<Vec<NodeId>>>,
    /// Nodes that run an older build.
    older: Mutex<BTreeSet<NodeId>>,
    /// Disks that were made to lose or change what they hold.
    spoiled: Mutex<BTreeSet<u32>>,
}

/// The logs on a node's disk; `None` when they cannot be opened.
fn open_local(runtime: &Runtime, recording: &Recording, node: NodeId) -> Option<LocalEngine> {
    let opened = LocalEngine::open(runtime, "log".into(), clutch_log_local::Options::default());
    // A crash may tear what was never acknowledged; damage to what was is a loss.
    if let Err(error @ LogFault::Corrupt { .. }) = &opened {
        recording.violation(format!("node {} cannot open its logs: {error}", node.0));
    }
    opened.ok()
}

/// The members of groups that a node has, on its disk, and what takes streams for them; `None` when they cannot be opened.
fn open_raft(
    runtime: &Runtime,
    recording: &Recording,
    node: NodeId,
    cluster: u64,
    leases: bool,
) -> Option<(RaftEngine, Arc<RaftPeers>)> {
    let options = StoreOptions {
        node: u64::from(node.0),
        cluster,
        may_quarantine: true,
        segment_bytes_max: 64 << 10,
        ..StoreOptions::default()
    };
    let opened = LogStore::open(runtime, "log".into(), options);
    if let Err(error @ LogFault::Corrupt { .. }) = &opened {
        recording.violation(format!("node {} cannot open its logs: {error}", node.0));
    }
    let store = opened.ok()?;
    for (id, fault) in store.quarantined() {
        recording.violation(format!("node {} cannot open {id}: {fault}", node.0));
    }
    let addresses = Arc::new(|node| Some(endpoint(NodeId(u32::try_from(node).ok()?))));
    let is_new = || Ok(store.groups().is_empty());
    let opened = Identities::open(runtime, "log/identities".into(), u64::from(node.0), is_new);
    // The disk may not answer; what was written and does not fit is a loss.
    if let Err(error) = opened.as_ref().map_err(std::io::Error::kind).map(drop)
        && error == std::io::ErrorKind::InvalidData
    {
        recording.violation(format!("node {} has lost its identity", node.0));
    }
    let identities = opened.ok()?;
    let peers =
        RaftPeers::new(runtime.clone(), cluster, u64::from(node.0), SYSTEM_KEY, identities, "", addresses);
    let lease_reads = leases.then_some(Duration::from_millis(100));
    let timing = Timing { lease_reads, ..Timing::default() };
    Some((RaftEngine::new(runtime.clone(), store, peers.clone(), timing), peers))
}

/// What a node knows of its logs' chains; `None` when its disk does not say.
fn open_chains(runtime: &Runtime, cluster: u64, seen: &Seen) -> Option<Arc<Chains>> {
    let Seen { recording, node, .. } = seen;
    let opened = Chains::open(runtime.disk.clone(), "chains".into(), cluster);
    // The disk may not answer; what was written and does not fit is a loss.
    if let Err(error) = &opened
        && error.downcast_ref::<std::io::Error>().is_none()
    {
        recording.violation(format!("node {}: {error}", node.0));
    }
    opened.ok().map(Arc::new)
}

/// How long ago a time was, by a boot clock that nobody sets.
fn down_since(runtime: &Runtime) -> Arc<dyn Fn(Time) -> Option<Duration> + Send + Sync> {
    let runtime = runtime.clone();
    Arc::new(move |last: Time| {
        let now = SIM_START.saturating_add(runtime.clock.steady().as_nanos() as u64);
        Some(Duration::from_nanos(now.saturating_sub(last.0)))
    })
}

/// The nodes of each log's members.
type Homes = Arc<Mutex<BTreeMap<LogId, Vec<NodeId>>>>;

/// Who keeps a log now. A node from which it was moved opens it, perhaps late, and does not lead.
fn keepers(homes: &Homes, log: LogId) -> Keepers {
    let homes = homes.lock();
    let nodes = homes.get(&log).into_iter().flatten().map(|node| u64::from(node.0));
    let nodes: Vec<u64> = nodes.collect();
    match nodes[..] {
        [only] => Keepers::Leader(only),
        _ => Keepers::Members(nodes.into_iter().collect()),
    }
}

/// An engine by its name, and what takes streams for it.
type Opened = (&'static str, Arc<dyn LogEngine>, Arc<dyn Fn(PeerStream) + Send + Sync>);

/// Logs outside the nodes.
fn sim_engine(runtime: &Runtime, node: NodeId, logs: SimLogs, homes: &Homes) -> Opened {
    let (runtime, node, homes) = (runtime.clone(), u64::from(node.0), homes.clone());
    let keepers = Arc::new(move |log| keepers(&homes, log));
    ("sim", Arc::new(SimEngine { logs, runtime, node, keepers }), Arc::new(drop))
}

/// What keeps the logs of a node; `None` when they cannot be opened.
fn open_engine(
    engine: Engine,
    runtime: &Runtime,
    seen: &Seen,
    cluster: u64,
    logs: SimLogs,
    homes: &Homes,
) -> Option<Opened> {
    Some(match engine {
        Engine::Local => {
            ("local", Arc::new(open_local(runtime, &seen.recording, seen.node)?), Arc::new(drop))
        }
        Engine::Raft => {
            let (raft, peers) = open_raft(runtime, &seen.recording, seen.node, cluster, seen.leases)?;
            ("raft", Arc::new(raft), Arc::new(move |stream| peers.accept(stream)))
        }
        Engine::Sim => sim_engine(runtime, seen.node, logs, homes),
    })
}

/// What new logs begin with.
fn new_logs(engine: &str, homes: Homes) -> NewLogs {
    if engine != "raft" {
        return NewLogs::of(engine);
    }
    NewLogs::with(engine, move |log| {
        let members: Vec<u64> =
            homes.lock().get(&log).into_iter().flatten().map(|node| u64::from(node.0)).collect();
        clutch_log_raft::parameters(&members)
    })
}

/// What every node begins its logs with: one engine, and everything written down that it delivers.
fn engines(name: &str, engine: Arc<dyn LogEngine>, seen: &Seen) -> Engines {
    let Seen { recording, images, node, .. } = seen.clone();
    Engines::one(name, engine).seen_through(Arc::new(move |id, log| {
        let images = images.clone();
        recording.wrap(id, node, log, move || images.flushed(node, id))
    }))
}

/// Who writes down what a node's replicas are given.
#[derive(Clone)]
struct Seen {
    recording: Arc<Recording>,
    /// What is on the node's disk of its states.
    images: SimImages,
    node: NodeId,
    /// Whether leaders answer reads by leases.
    leases: bool,
}

struct SimStores {
    images: SimImages,
    runtime: Runtime,
    node: NodeId,
}

impl StoreProvider for SimStores {
    fn store(&self, id: LogId) -> Result<Arc<dyn Store>, StoreError> {
        Ok(self.images.open(self.node, id, &self.runtime))
    }

    fn checkpoints(&self, id: LogId) -> Option<PathBuf> {
        Some(sim_store::checkpoints_of(id))
    }

    fn open_checkpoint(&self) -> OpenCheckpoint {
        let disk = self.runtime.disk.clone();
        Arc::new(move |path| Ok(Arc::new(sim_store::read(&*disk, path)?)))
    }

    fn condemn(&self, id: LogId, why: &str) {
        self.images.condemn(self.node, id, why);
    }

    fn condemned(&self, id: LogId) -> Option<String> {
        self.images.condemned(self.node, id)
    }

    fn rebuild(&self, id: LogId, log: Bounds, is_home: IsHome<'_>) -> Result<Rebuilt, StoreError> {
        let found = sim_store::newest(&*self.runtime.disk, id, log, is_home)?;
        if found.is_none() && log.first > Position(1) {
            return Err(StoreError::Damaged(format!("the log of {id} begins at {}", log.first)));
        }
        self.images.forget(self.node, id);
        let from_checkpoint = found.map(|(position, store)| {
            self.images.put(self.node, id, store);
            position.0
        });
        Ok(Rebuilt { from_checkpoint, set_aside: None })
    }
}

impl SimCluster {
    /// A cluster with logs outside its nodes; returns when a client sees all of it.
    ///
    /// # Panics
    /// When the cluster does not come up within a minute of virtual time.
    pub fn start(seed: u64, shards: u32, disks: u32) -> SimCluster {
        let config = ClusterConfig::of(shards, disks, (2, 1));
        SimCluster::start_with(seed, config).expect("the cluster comes up")
    }

    /// A cluster of that kind; `None` when it does not come up within a minute of virtual time.
    pub fn start_with(seed: u64, config: ClusterConfig) -> Option<SimCluster> {
        let world = Arc::new(World::new(seed));
        let cluster = ClusterFile::generate(
            &world.node(NodeId(0)),
            config.shards,
            config.disks,
            config.data_blocks,
            config.parity_blocks,
        )
        .expect("within the limits");
        let members = |first| {
            let first = if config.joint { REGISTRY } else { first };
            (0..config.replicas).map(|member| member_node(first, member)).collect()
        };
        let mut homes = BTreeMap::from([(LogId::REGISTRY, members(REGISTRY)), (LogId::CDC, members(CDC))]);
        homes.extend((0..config.shards).map(|n| (LogId::shard(n), members(shard_node(n)))));
        let images = SimImages::new(config.flush_permille);
        let this = SimCluster {
            world,
            logs: SimLogs::new(),
            recording: Arc::default(),
            config,
            cluster,
            images,
            homes: Arc::new(Mutex::new(homes)),
            spares: Mutex::new(0),
            failed: Arc::default(),
            older: Mutex::default(),
            spoiled: Mutex::default(),
        };
        for disk in 0..this.config.disks {
            this.label(disk);
        }
        for node in this.nodes() {
            this.boot(node);
        }
        this.wait_ready().then_some(this)
    }

    /// What it is made of.
    pub fn config(&self) -> &ClusterConfig {
        &self.config
    }

    /// All nodes that have a role now.
    pub fn nodes(&self) -> Vec<NodeId> {
        let mut nodes: Vec<NodeId> = self.homes.lock().values().flatten().copied().collect();
        nodes.extend((0..self.config.disks).map(disk_node));
        nodes.sort_unstable();
        nodes.dedup();
        nodes
    }

    /// The node that leads a log, or has its only replica.
    pub fn home(&self, log: LogId) -> Option<NodeId> {
        let members = self.members(log);
        let leader = match self.config.engine {
            Engine::Raft => self.recording.leader(log),
            Engine::Sim | Engine::Local => self.logs.leader(log),
        };
        let leads = |node: &&NodeId| leader == Some(u64::from(node.0));
        members.iter().find(leads).or(members.first()).copied()
    }

    /// The nodes of a log's members.
    pub fn members(&self, log: LogId) -> Vec<NodeId> {
        self.homes.lock().get(&log).cloned().unwrap_or_default()
    }

    /// Where the registry's members are.
    pub fn registries(&self) -> Registries {
        let all = self.members(LogId::REGISTRY).into_iter().map(endpoint).collect();
        Registries::new(all).expect("a log has a member")
    }

    /// Where all members of all logs are; none where each log has one.
    fn peers(&self) -> Peers {
        let nodes = self.homes.lock().values().filter(|all| all.len() > 1).flatten().copied().collect();
        let nodes: BTreeSet<NodeId> = nodes;
        Peers::fixed(nodes.into_iter().map(|node| (u64::from(node.0), endpoint(node))).collect())
    }

    /// All logs.
    pub fn log_ids(&self) -> Vec<LogId> {
        self.homes.lock().keys().copied().collect()
    }

    /// The ids of the block services; disk n has the n-th.
    pub fn service_ids(&self) -> Vec<u64> {
        self.cluster.service_ids().expect("made by generate")
    }

    /// The cluster's id.
    pub fn cluster_id(&self) -> u64 {
        self.cluster.cluster_id().expect("made by generate")
    }

    fn roles(&self, node: NodeId) -> Roles {
        let homes = self.homes.lock();
        let is_home = |log: LogId| homes.get(&log).is_some_and(|members| members.contains(&node));
        let mut roles =
            Roles { registry: is_home(LogId::REGISTRY), cdc: is_home(LogId::CDC), ..Roles::default() };
        roles.shards = (0..self.config.shards).filter(|n| is_home(LogId::shard(*n))).collect();
        for (n, id) in self.service_ids().into_iter().enumerate() {
            if disk_node(n as u32) == node {
                roles.disks.push((id, PathBuf::from("disk")));
            }
        }
        roles
    }

    /// Labels a disk, as an operator does with a new one.
    pub fn label(&self, disk: u32) {
        let label = Label {
            cluster: self.cluster_id(),
            service: ServiceId(self.service_ids()[disk as usize]),
            created: clutch_proto::Time(1),
        };
        label
            .write(&*self.world.disk(disk_node(disk)), Path::new("disk"))
            .expect("a new disk can be written");
    }

    /// The blocks that somebody finds who looks a disk through.
    pub fn blocks_on(&self, disk: u32) -> Result<Vec<u64>, String> {
        let service = ServiceId(self.service_ids()[disk as usize]);
        // Not the disk itself: its node may be running.
        let copy = Arc::new(SimDisk::new(0));
        copy.mount(self.world.disk(disk_node(disk)).copy());
        let store = BlockStore::open(copy, "disk".into(), self.cluster_id(), service, PACKED);
        let listed =
            store.and_then(|store| if store.look().is_none() { store.list() } else { Ok(Vec::new()) });
        Ok(listed.map_err(|error| error.to_string())?.into_iter().map(|block| block.0).collect())
    }

    /// Whether a disk's label says that it is the one.
    pub fn is_labelled(&self, disk: u32) -> bool {
        let service = ServiceId(self.service_ids()[disk as usize]);
        let (disk, dir) = (self.world.disk(disk_node(disk)), Path::new("disk"));
        clutch_blocks::label::check(&*disk, dir, self.cluster_id(), service).is_ok()
    }

    /// Starts a node, or starts it again after a crash.
    pub fn boot(&self, node: NodeId) {
        let runtime = self.world.node(node);
        let mut keyring = Keyring::default();
        for id in self.service_ids() {
            keyring.add(ServiceId(id), service_key(id));
        }
        let (cluster, roles, failed) = (self.cluster.clone(), self.roles(node), self.failed.clone());
        let images = self.images.clone();
        let stores = SimStores { images: images.clone(), runtime: runtime.clone(), node };
        let (logs, recording, engine) = (self.logs.clone(), self.recording.clone(), self.config.engine);
        let (registries, peers, homes) = (self.registries(), self.peers(), self.homes.clone());
        let has_logs = roles.registry || roles.cdc || !roles.shards.is_empty();
        let (pages, id) = (self.config.pages(), self.cluster_id());
        let (leases, heal) = (self.config.leases, self.config.heal);
        let level = if self.older.lock().contains(&node) { level::FIRST } else { level::KNOWN };
        let of_several = self.of_several();
        let boot_runtime = runtime.clone();
        runtime.spawn("boot", async move {
            let runtime = boot_runtime;
            let seen = Seen { recording, images, node, leases };
            let opened = match has_logs {
                true => open_engine(engine, &runtime, &seen, id, logs, &homes),
                false => Some(sim_engine(&runtime, node, logs, &homes)),
            };
            let Some((name, engine, accept)) = opened else { return failed.lock().push(node) };
            let Some(chains) = open_chains(&runtime, id, &seen) else { return failed.lock().push(node) };
            let config = NodeConfig {
                listen: endpoint(node),
                advertise: None,
                failure_domain: None,
                registry: Some(registries),
                peers,
                cluster,
                roles,
                engines: engines(name, engine, &seen),
                chains,
                stores: Arc::new(stores),
                new_logs: new_logs(name, homes),
                accept,
                keyring,
                keys: of_several.rotation.keys().clone(),
                level,
                of_several: Some(of_several),
                process_usage: || None,
                lifetimes: LIFETIMES,
                pages,
                clock_skew_ms_max: CLOCK_SKEW_MS_MAX,
                packing: Packing::with(PACKED),
                down: down_since(&runtime),
                accept_clock: false,
                room: Arc::new(Room::new(runtime.disk.clone(), vec!["log".into()], Some(1 << 30), None)),
                reserve_on: Vec::new(),
                heal,
                runtime: runtime.clone(),
            };
            match Node::start(config).await {
                Ok(_node) => std::future::pending::<()>().await,
                Err(error) => {
                    tracing::debug!(node = node.0, %error, "a simulated node does not start");
                    runtime.note("node: does not start");
                    failed.lock().push(node);
                }
            }
        });
    }

    /// Nodes whose start failed since this was asked last.
    pub fn take_failed(&self) -> Vec<NodeId> {
        std::mem::take(&mut self.failed.lock())
    }

    /// A node runs a build that knows the first feature level only, or the newest one, when it is started next.
    pub fn runs_older(&self, node: NodeId, is_older: bool) {
        let mut older = self.older.lock();
        match is_older {
            true => older.insert(node),
            false => older.remove(&node),
        };
    }

    /// What new nodes are handed over. The keys of a world are in no files.
    fn of_several(&self) -> OfSeveral {
        let nodes = self.peers().all();
        let nodes = nodes.into_iter().map(|(node, endpoint)| (node, endpoint.to_string())).collect();
        let belongings = Belongings::new(self.cluster.clone(), vec![1], nodes, BTreeMap::new());
        let rotation = Rotation::in_memory(self.cluster_id(), Key { epoch: 1, secret: SYSTEM_KEY });
        OfSeveral { hand_over: Arc::new(move || Ok(belongings.clone())), rotation: Arc::new(rotation) }
    }

    /// Removes all states of a node that is down.
    pub fn lose_states(&self, node: NodeId) {
        for log in self.log_ids() {
            if self.members(log).contains(&node) {
                self.images.forget(node, log);
            }
        }
        match self.config.engine {
            // Checkpoints are all that is on it.
            Engine::Sim => self.world.disk(node).wipe(),
            // A member that has lost its votes is none any more.
            Engine::Raft => self.world.disk(node).wipe_under(Path::new("state")),
            Engine::Local => {}
        }
    }

    /// Whether a log loses nothing with a node's disk: another member has on its own what was trimmed.
    pub fn is_kept_without(&self, node: NodeId) -> bool {
        self.log_ids().into_iter().filter(|log| self.members(*log).contains(&node)).all(|log| {
            let trimmed = match self.config.engine {
                Engine::Raft => self.recording.trimmed(log, node),
                Engine::Sim | Engine::Local => self.logs.trimmed(log),
            };
            let has = |member: &NodeId| *member != node && self.images.flushed(*member, log) >= trimmed;
            trimmed == Position(0) || self.members(log).iter().any(has)
        })
    }

    /// A member of a log takes a checkpoint, and what is before it is trimmed, as an operator does; the next one, too, so that
    /// most of three have.
    pub fn trim(&self, log: LogId, node: NodeId) {
        let members = self.members(log);
        let at = members.iter().position(|member| *member == node).unwrap_or(0);
        let both = members.iter().cycle().skip(at).take(members.len() / 2 + 1);
        both.for_each(|member| self.trim_of(log, *member));
    }

    fn trim_of(&self, log: LogId, node: NodeId) {
        let (role, number) = match log {
            LogId::REGISTRY => (Role::Registry, 0),
            LogId::CDC => (Role::Cdc, 0),
            shard => (Role::Shard, shard.number),
        };
        let client = self.client_on(OPERATOR, None);
        let runtime = client.runtime().clone();
        runtime.spawn("trim", async move {
            for op in [Op::TakeCheckpoint(TakeCheckpoint {}), Op::TrimLog(TrimLog { upto: u64::MAX })] {
                let request = AdminRequest { op: Some(op) };
                let done = client.admin_at(endpoint(node), role, number, request).await;
                client.runtime().note(match done {
                    Ok(_) => "world: an operator is obeyed",
                    Err(_) => "world: an operator is not obeyed",
                });
            }
        });
    }

    /// Takes note that a disk is made to lose or change what it holds.
    pub fn spoil(&self, disk: u32) {
        self.spoiled.lock().insert(disk);
    }

    /// Whether everything that was proven to be on a disk must be there.
    pub fn is_sound(&self, disk: u32) -> bool {
        !self.spoiled.lock().contains(&disk)
    }

    /// Stops a node at once and starts it again.
    pub fn restart(&self, node: NodeId) {
        self.world.crash(node);
        self.boot(node);
    }

    /// Gives a log's replica to a new node while the old one goes on, unaware. Returns both, old first; `None` when
    /// logs live on their nodes, or for the registry, whose address everybody knows.
    pub fn move_log(&self, log: LogId) -> Option<(NodeId, NodeId)> {
        if self.config.engine != Engine::Sim || log == LogId::REGISTRY {
            return None;
        }
        let new = {
            let mut spares = self.spares.lock();
            *spares += 1;
            NodeId(SPARE + *spares)
        };
        let old = self.homes.lock().insert(log, vec![new])?;
        self.boot(new);
        Some((*old.first()?, new))
    }

    /// Lets so much time pass.
    pub fn pause(&self, lasting: Duration) {
        let until = self.world.elapsed() + lasting;
        while self.world.step_until(until) {}
    }

    /// A client on its own node.
    pub fn client(&self) -> Client {
        self.client_on(CLIENT, None)
    }

    /// A client that keeps what it has looked up for a second, as real ones do.
    pub fn keeping_client(&self) -> Client {
        let options = ClientOptions {
            inline_bytes: self.config.inline,
            mirror_bytes: 0,
            keys: Some(SYSTEM_KEY.into()),
            ..ClientOptions::default()
        };
        Client::new(self.world.node(CLIENT), self.registries(), options)
    }

    /// A client on a node, perhaps watched.
    pub fn client_on(&self, node: NodeId, observer: Option<Arc<dyn Observer>>) -> Client {
        self.client_that_reads(node, observer, Reads::Leader)
    }

    /// A client that asks others than leaders, too.
    pub fn client_that_reads(
        &self,
        node: NodeId,
        observer: Option<Arc<dyn Observer>>,
        reads: Reads,
    ) -> Client {
        let options = ClientOptions {
            attempt: Duration::from_millis(500),
            block_attempt: Duration::from_millis(500),
            patience: Duration::from_secs(20),
            cache_lifetime: Duration::ZERO,
            inline_bytes: self.config.inline,
            // Codes with several data blocks have more to go wrong.
            mirror_bytes: 0,
            reads,
            observer,
            keys: Some(SYSTEM_KEY.into()),
            ..ClientOptions::default()
        };
        Client::new(self.world.node(node), self.registries(), options)
    }

    fn wait_ready(&self) -> bool {
        let client = self.client();
        let (shards, disks) = (self.config.shards as usize, self.config.disks as usize);
        let ready = self.world.run(CLIENT, Duration::from_secs(60), async move {
            loop {
                match client.refresh_map().await {
                    Ok(map)
                        if map.shards.len() == shards
                            && !map.cdc_address.is_empty()
                            && map.services.len() == disks =>
                    {
                        // The shards compare themselves with the registry every two seconds.
                        return client.runtime().clock.sleep(Duration::from_secs(5)).await;
                    }
                    _ => client.runtime().clock.sleep(Duration::from_millis(50)).await,
                }
            }
        });
        ready.is_some()
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
        let checked = self.run(async move {
            clutch_client_maintenance::fsck::check(&client, &mut |_, _| {}).await.expect("fsck runs")
        });
        assert!(checked.violations.is_empty(), "fsck: {:#?}", checked.violations);
    }
}
