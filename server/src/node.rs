//! A node: the roles that one process has.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use clutch_blocks::{BlockService, BlockStore};
use clutch_cdc::Cdc;
use clutch_client::{Client, ClientOptions, Registries};
use clutch_log::{Bounds, Chain, Engines, Log, LogId, NodeId, Position};
use clutch_proto::{
    ServiceId, Time, cdc,
    mutants::{self, Mutant},
    registry::{self, SpanPolicy, registry_entry},
    rules, shard,
    state::Entry,
};
use clutch_registry::{Registry, RegistryFacts};
use clutch_runtime::{ClusterKeys, Endpoint, HybridClock, Listening, PeerStream, Runtime, hlc::Start};
use clutch_shard::{Keyring, Lifetimes, Pages, Shard, ShardFacts};
use clutch_state::{Applier, Fault, Machine, StoreError, View, applier::batch_crc};
use clutch_state_replica::{LeaderEvent, Replica, ReplicaConfig, ReplicaHandle, Restore, SharedFacts};
use parking_lot::Mutex;
use prost::Message as _;
use tokio::sync::mpsc;

use crate::{
    cdc_driver,
    chains::{self, Chains, NewLogs},
    cluster_file::ClusterFile,
    handler::{NodeHandler, ProcessUsage, SharedHandler, node_faults},
    healer::{Board, HealSettings, Healer},
    joining::HandOver,
    keeper::{self, Keeper, Told},
    members::Asker,
    metrics::{Meters, Watch},
    packing::Packing,
    placer::{Placer, Placing, Reigns},
    room::Room,
    rotation::Rotation,
    routes::{Peers, Routes},
    snapshots::ReplicaSnapshots,
    stores::{StoreProvider, log_name},
};

/// Bytes of a span of the default policy.
pub const SPAN_BYTES: u32 = 8 << 20;
/// How often a node looks at the room for its logs and states.
const LOOK_AT_ROOM: Duration = Duration::from_millis(250);
/// Who hears of no leader asks the others after so long whether they have one.
const ASK_OTHERS: Duration = Duration::from_secs(1);
/// A node that stops waits so long for others to lead what it has led.
const HAND_OVER_MAX: Duration = Duration::from_secs(1);

/// Which roles a node has.
#[derive(Clone, Debug, Default)]
pub struct Roles {
    /// The registry.
    pub registry: bool,
    /// The CDC.
    pub cdc: bool,
    /// These shards.
    pub shards: Vec<u32>,
    /// These disks: service id and directory.
    pub disks: Vec<(u64, PathBuf)>,
    /// Logs that it would keep and goes on without in this run, and what is to be told of that.
    pub left_out: BTreeMap<LogId, String>,
}

impl Roles {
    /// Registry, CDC, so many shards and these disks.
    pub fn all(shards: u32, disks: Vec<(u64, PathBuf)>) -> Roles {
        Roles { registry: true, cdc: true, shards: (0..shards).collect(), disks, left_out: BTreeMap::new() }
    }

    /// The same without these logs.
    pub fn without(self, left_out: BTreeMap<LogId, String>) -> Roles {
        let keeps = |log: LogId| !left_out.contains_key(&log);
        let shards = self.shards.into_iter().filter(|number| keeps(LogId::shard(*number))).collect();
        let (registry, cdc) = (self.registry && keeps(LogId::REGISTRY), self.cdc && keeps(LogId::CDC));
        Roles { registry, cdc, shards, disks: self.disks, left_out }
    }

    /// The logs of these roles.
    pub fn logs(&self) -> Vec<LogId> {
        let shards = self.shards.iter().map(|number| LogId::shard(*number));
        let registry = self.registry.then_some(LogId::REGISTRY);
        registry.into_iter().chain(shards).chain(self.cdc.then_some(LogId::CDC)).collect()
    }
}

/// What a node of a cluster of several does beside its roles.
#[derive(Clone)]
pub struct OfSeveral {
    /// Gives what a new node is handed over.
    pub hand_over: HandOver,
    /// Goes from one key of the cluster to the next.
    pub rotation: Arc<Rotation>,
}

/// Everything a node is made of.
#[derive(Clone)]
pub struct NodeConfig {
    /// What it runs on.
    pub runtime: Runtime,
    /// Where it listens.
    pub listen: Endpoint,
    /// What others reach it by; the address that was bound when `None`.
    pub advertise: Option<String>,
    /// What its disks fail with; each disk fails by itself when `None`.
    pub failure_domain: Option<String>,
    /// Where the registry's members are; this node itself when `None`.
    pub registry: Option<Registries>,
    /// Where the nodes are that logs may have members on.
    pub peers: Peers,
    /// The cluster.
    pub cluster: ClusterFile,
    /// Its roles.
    pub roles: Roles,
    /// What keeps its logs.
    pub engines: Engines,
    /// Which engines keep which log, as far as the node knows by itself.
    pub chains: Arc<Chains>,
    /// Its stores.
    pub stores: Arc<dyn StoreProvider>,
    /// What new logs begin with.
    pub new_logs: NewLogs,
    /// Takes the streams that other nodes open to this one.
    pub accept: Arc<dyn Fn(PeerStream) + Send + Sync>,
    /// The block services' keys.
    pub keyring: Keyring,
    /// What the parts of the cluster know each other by.
    pub keys: ClusterKeys,
    /// What it does for others that come and go, and for their keys; `None` where the cluster is one process.
    pub of_several: Option<OfSeveral>,
    /// The newest feature level that it takes part in: `clutch_proto::level::KNOWN`.
    pub level: u32,
    /// How long what clients are given is good.
    pub lifetimes: Lifetimes,
    /// How much the answers of shards hold.
    pub pages: Pages,
    /// How far apart the clocks of the cluster's nodes may be, in milliseconds.
    pub clock_skew_ms_max: u64,
    /// Says how long ago the logs ended at a time, where a clock that nobody sets knows it.
    pub down: Arc<dyn Fn(Time) -> Option<Duration> + Send + Sync>,
    /// Believe a wall clock that is further ahead than the node can have been down.
    pub accept_clock: bool,
    /// Room for logs and states.
    pub room: Arc<Room>,
    /// Disks that share their file system with logs or states leave the reserve free.
    pub reserve_on: Vec<u64>,
    /// How it looks after what is stored; not at all when `None`.
    pub heal: Option<HealSettings>,
    /// How small blocks are kept.
    pub packing: Packing,
    /// What the process uses; a simulated node has no process of its own.
    pub process_usage: ProcessUsage,
}

/// A running node. Dropping it closes the endpoint; [`Node::stop`] also flushes.
pub struct Node {
    listening: Box<dyn Listening>,
    /// Logs that this node was no member of when it started.
    not_kept: usize,
    stopping: Arc<AtomicBool>,
    client: Client,
    notices: Vec<String>,
    watch: Watch,
}

impl Node {
    /// Starts all roles and returns when each log is led here, and the registry knows that, or is followed. When that fails,
    /// nothing of the node runs any more.
    ///
    /// # Errors
    /// Also when a state turns out to be damaged while its log is replayed; starting again builds it anew.
    pub async fn start(config: NodeConfig) -> Result<Node> {
        let (notices, started) = (Mutex::default(), Mutex::default());
        let heal = config.heal;
        let node = Node::start_all(config, &notices, &started).await;
        if node.is_err() {
            let started = std::mem::take(&mut *started.lock());
            for (_, replica, _) in started {
                replica.stop().await;
            }
        }
        let node = Node { notices: notices.into_inner(), ..node? };
        if let Some(settings) = heal {
            Healer::begin(&node, settings);
        }
        Ok(node)
    }

    async fn start_all(
        config: NodeConfig,
        notices: &Mutex<Vec<String>>,
        started: &Mutex<Vec<Replicating>>,
    ) -> Result<Node> {
        let (reigns, heard) = Reigns::new();
        let starter = Starter {
            config: &config,
            reigns: reigns.clone(),
            cluster: config.cluster.cluster_id()?,
            clock: Arc::new(clock_of(&config)),
            activity: Arc::new(AtomicU64::new(0)),
            notices,
            started,
            asker: Asker::default(),
            ready: Arc::new(AtomicBool::new(false)),
            meters: Arc::default(),
            board: Arc::default(),
        };
        let facts = starter.shard_facts();
        let registry_facts = Arc::new(SharedFacts::new(RegistryFacts::default()));
        let mut serving = Serving::default();
        let mut registry = config.roles.registry.then(|| starter.prepare_registry()).transpose()?;
        let door = starter.serve_registry(&mut registry, &mut serving, &registry_facts).await?;
        starter.learn_chains(registry.as_ref()).await?;
        let cdc = starter.start_others(registry, &mut serving, &registry_facts, &facts).await?;
        serving.blocks = starter.open_disks()?;
        starter.follow_keys(&facts, &serving.blocks);

        let routes = starter.routes();
        keeper::tell_members(&routes, &registry_facts);
        let door = match door {
            Some(door) => door,
            None => starter.open_door(&serving).await?,
        };
        door.handler.serve(starter.handler(&serving, routes.clone(), false));
        let Door { listening, address, client, .. } = door;
        starter.asker.begin(client.clone(), routes.clone());
        let replicas = started.lock().clone();
        let not_kept = starter.catch_up(&replicas).await?;
        let stopping = watch_room(&config.runtime, config.room.clone());
        let placed = Placing {
            address: address.clone(),
            shard_count: config.cluster.shards,
            chains: config.chains.clone(),
            routes: routes.clone(),
        };
        let placer = Placer::new(client.clone(), placed, reigns.clone(), heard);
        let keeper = Keeper {
            client: client.clone(),
            address,
            failure_domain: config.failure_domain.clone(),
            reigns,
            blocks: serving.blocks.clone(),
            shards: serving.shards,
            facts,
            routes,
            registry_facts,
            told: Told::default(),
        };
        placer.ask().await?;
        if let Some((handle, events)) = cdc {
            config.runtime.spawn("cdc driver", cdc_driver::run(client.clone(), handle, events));
        }
        keeper.run(stopping.clone()).await?;
        placer.run(stopping.clone()).await?;
        starter.ready.store(true, Ordering::Release);
        let watch = starter.watch(replicas, serving.blocks);
        Ok(Node { listening, not_kept, stopping, client, notices: Vec::new(), watch })
    }

    /// How many logs this node was no member of when it started, and how many it would keep.
    pub fn not_kept(&self) -> (usize, usize) {
        (self.not_kept, self.watch.replicas.len())
    }

    /// Where the node listens.
    pub fn endpoint(&self) -> &Endpoint {
        self.listening.endpoint()
    }

    /// A client of the cluster.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Set when the node stops.
    pub(crate) fn stopping(&self) -> Arc<AtomicBool> {
        self.stopping.clone()
    }

    /// What an operator should know of the start.
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    /// The node's clock.
    pub fn clock(&self) -> &Arc<HybridClock> {
        &self.watch.clock
    }

    /// What is wrong with the node beside its replicas.
    pub fn node_faults(&self) -> Vec<String> {
        node_faults(&self.watch.blocks, &self.watch.room, &self.watch.left_out)
    }

    /// What is measured of the node, for as long as somebody asks.
    pub fn watch(&self) -> &Watch {
        &self.watch
    }

    /// Why replicas have stopped for good, and whether any goes on.
    pub fn faults(&self) -> (Vec<String>, bool) {
        let faults: Vec<String> =
            self.watch.replicas.iter().filter_map(|(_, r, _)| r.fault().map(str::to_owned)).collect();
        let serves = faults.len() < self.watch.replicas.len() || self.watch.replicas.is_empty();
        (faults, serves)
    }

    /// Lets others lead what is led here, so that nobody has to notice first that this node is gone.
    async fn hand_over(&self) {
        let clock = self.client.runtime().clock.clone();
        let end = clock.monotonic() + HAND_OVER_MAX;
        let mut led = Vec::new();
        for (_, _, log) in &self.watch.replicas {
            let status = log.status();
            if status.is_self && status.members.len() > 1 {
                log.resign();
                led.push((log, status.epoch));
            }
        }
        // Who cannot, because the others are gone, stops all the same.
        while led.iter().any(|(log, epoch)| log.status().epoch <= *epoch) && clock.monotonic() < end {
            clock.sleep(Duration::from_millis(10)).await;
        }
    }

    /// Ends cleanly: what is applied is flushed, so that the next start need not replay it.
    pub async fn stop(self) {
        self.stopping.store(true, Ordering::Relaxed);
        self.hand_over().await;
        for (_, replica, _) in &self.watch.replicas {
            replica.stop().await;
        }
    }
}

/// The client by which a node asks the others, and itself.
fn own_client(
    runtime: &Runtime,
    registry: Option<Registries>,
    address: &str,
    keys: ClusterKeys,
    clock: &Arc<HybridClock>,
) -> Client {
    let registries = registry.unwrap_or_else(|| address.into());
    let options = ClientOptions {
        cache_lifetime: Duration::ZERO,
        keys: Some(keys),
        clock: (!mutants::is(Mutant::UnsharedClock)).then(|| clock.clone()),
        ..ClientOptions::default()
    };
    Client::new(runtime.clone(), registries, options)
}

/// Looks at the room for logs and states again and again, until what it returns is set.
fn watch_room(runtime: &Runtime, room: Arc<Room>) -> Arc<AtomicBool> {
    let clock = runtime.clock.clone();
    let seam = runtime.clone();
    let node_stops = Arc::new(AtomicBool::new(false));
    let stopping = node_stops.clone();
    runtime.spawn("room", async move {
        while !stopping.load(Ordering::Relaxed) {
            let room = room.clone();
            seam.blocking(move || room.look()).await;
            clock.sleep(LOOK_AT_ROOM).await;
        }
    });
    node_stops
}

/// Who has no logs goes by what those say who have.
fn clock_of(config: &NodeConfig) -> HybridClock {
    let clock = config.runtime.clock.clone();
    match config.roles.registry || config.roles.cdc || !config.roles.shards.is_empty() {
        true => HybridClock::new(clock),
        false => HybridClock::following(clock),
    }
}

/// What an operator should know of the clock.
fn clock_notice(start: Start) -> Option<String> {
    let notice = match start {
        Start::Followed => return None,
        Start::Behind(by) => format!(
            "the clock is {} s behind the log: time goes on from where the log ended, and slowly comes back to the clock's{}",
            by.as_secs(),
            // What would take longer than a working day.
            if by.as_secs() > 1800 {
                ". If a wrong clock led the log ahead, `clutch log rewind` shows what that was and can cut it off"
            } else {
                ""
            }
        ),
        Start::Ahead(by) => format!(
            "the clock is {} s ahead of what the log and the time since its end give: it is not believed, and time goes on \
             from where the log ended. If the clock is right, start once with --accept-clock",
            by.as_secs()
        ),
    };
    tracing::warn!("{notice}");
    Some(notice)
}

/// Waits until a replica has applied its log and leads, or follows whoever does, however long that takes. Where this node, whose number
/// is `own`, is no member of the log, or none yet, there is nothing to wait for: what it is sent when it becomes one is applied then.
/// Whether it is one.
async fn caught_up(
    runtime: &Runtime,
    (id, replica, log): &Replicating,
    own: Option<NodeId>,
    others: &Asker,
) -> Result<bool> {
    use clutch_proto::admin::{AdminRequest, Status, admin_request};
    let mut last_told = runtime.clock.monotonic();
    let mut last_asked = last_told;
    // What was committed when a leader was first known: not what has come since, which may come faster than it is applied.
    let mut followed = None;
    loop {
        let reply =
            replica.admin(AdminRequest { op: Some(admin_request::Op::Status(Status::default())) }).await?;
        let status = reply.status.context("an answer without a status")?;
        ensure!(status.fault.is_empty(), "{}: {}", status.name, status.fault);
        if status.leading {
            return Ok(true);
        }
        let seen = log.status();
        if own.is_some_and(|own| seen.members.iter().all(|progress| progress.member.node != own)) {
            runtime.note("node: starts as no member");
            return Ok(false);
        }
        let has_ended = seen.sealed.filter(|tail| status.applied_position >= tail.0);
        if let Some(tail) = has_ended.filter(|_| seen.is_self || seen.leader.is_none()) {
            bail!(
                "the log of {} was sealed at {tail}: it goes on in a later incarnation, of which this node has not heard. Start \
                 it again when the registry can be reached; if it stays so, the log was sealed and not begun anew",
                status.name
            );
        }
        if seen.leader.is_some() && !seen.is_self {
            let target = *followed.get_or_insert(seen.bounds.last.0);
            if status.applied_position >= target {
                runtime.note("node: starts as a follower");
                // The leader that it remembers may know it no more.
                let is_none = match own {
                    Some(own) => others.has_gone_on(*id, own, seen.config).await,
                    None => false,
                };
                return Ok(!is_none);
            }
        }
        // Who is no member any more is told nothing, not even that.
        if let Some(own) = own.filter(|_| runtime.clock.monotonic() - last_asked > ASK_OTHERS) {
            if others.has_gone_on(*id, own, seen.config).await {
                runtime.note("node: starts as no member any more");
                return Ok(false);
            }
            last_asked = runtime.clock.monotonic();
        }
        if runtime.clock.monotonic() - last_told > Duration::from_secs(5) {
            last_told = runtime.clock.monotonic();
            let (replica, applied, of) = (&status.name, status.applied_position, status.log_last);
            match applied < of {
                true => tracing::warn!(%replica, applied, of, "replays its log"),
                false => tracing::warn!(%replica, applied, "waits for a leader of its log"),
            }
        }
        runtime.clock.sleep(Duration::from_millis(5)).await;
    }
}

fn registry_genesis(cluster: &ClusterFile) -> Result<Bytes> {
    let genesis = registry::Genesis {
        cluster: cluster.cluster_id()?,
        shards: cluster.shards,
        default_policy: Some(SpanPolicy {
            data_blocks: cluster.data_blocks,
            parity_blocks: cluster.parity_blocks,
            span_size_max: SPAN_BYTES,
        }),
        rules: rules::VERSION,
    };
    let entry = registry::RegistryEntry { tag: None, body: Some(registry_entry::Body::Genesis(genesis)) };
    Ok(entry.encode_to_vec().into())
}

fn cdc_genesis(cluster: u64) -> Bytes {
    let genesis = cdc::Genesis { cluster, rules: rules::VERSION };
    let entry = cdc::CdcEntry { tag: None, body: Some(cdc::cdc_entry::Body::Genesis(genesis)) };
    entry.encode_to_vec().into()
}

fn shard_genesis(cluster: &ClusterFile, number: u32) -> Result<Bytes> {
    let (slot_first, slot_last) = clutch_registry::slots(number, cluster.shards);
    let genesis = shard::Genesis {
        shard: number,
        slot_first,
        slot_last,
        cluster: cluster.cluster_id()?,
        root_mode: 0o755,
        rules: rules::VERSION,
    };
    let entry = shard::ShardEntry { tag: None, body: Some(shard::shard_entry::Body::Genesis(genesis)) };
    Ok(entry.encode_to_vec().into())
}

/// What the registry's state says of a log.
fn chain_in(registry: &Applier<Registry>, log: LogId) -> Result<Option<Chain>> {
    let found = clutch_registry::chain_of(&**registry.store(), u32::from(log.role), u64::from(log.number));
    let chain = found.with_context(|| format!("read the chain of {log}"))?;
    Ok(chain.map(|chain| Chain::from_wire(log, &chain)).transpose()?)
}

/// What of a node answers requests.
#[derive(Default)]
struct Serving {
    registry: Option<ReplicaHandle>,
    cdc: Option<ReplicaHandle>,
    shards: BTreeMap<u32, ReplicaHandle>,
    blocks: BTreeMap<u64, Arc<BlockService>>,
}

/// Where a node is asked.
struct Door {
    listening: Box<dyn Listening>,
    handler: Arc<SharedHandler>,
    /// What others reach it by.
    address: String,
    client: Client,
}

struct Starter<'a> {
    config: &'a NodeConfig,
    /// Where the reigns of all replicas are told.
    reigns: Arc<Reigns>,
    cluster: u64,
    clock: Arc<HybridClock>,
    activity: Arc<AtomicU64>,
    /// What an operator should know of this start.
    notices: &'a Mutex<Vec<String>>,
    /// By what members of logs are asked.
    asker: Asker,
    /// Replicas that run, so that they are stopped when the start fails.
    started: &'a Mutex<Vec<Replicating>>,
    /// Whether everything has started.
    ready: Arc<AtomicBool>,
    meters: Arc<Meters>,
    board: Arc<Board>,
}

/// A replica and its log.
pub(crate) type Replicating = (LogId, ReplicaHandle, Arc<dyn Log>);

type Started<M> = (ReplicaHandle, mpsc::UnboundedReceiver<LeaderEvent<<M as Machine>::Effect>>);

impl Starter<'_> {
    /// The chain by which a log is opened.
    fn chain(&self, id: LogId) -> Chain {
        self.config.chains.get(id).expect("chains are learned before logs are opened")
    }

    /// In which life each log of this node is, as far as that is known yet.
    fn incarnations(&self) -> BTreeMap<LogId, u32> {
        let incarnation = |id| Some((id, self.config.chains.get(id)?.incarnation()));
        self.config.roles.logs().into_iter().filter_map(incarnation).collect()
    }

    /// Whether the registry serves before it is known what keeps the other logs. Where each of its members keeps others of its logs, too,
    /// nobody could say that else: all of them would wait for each other.
    fn registry_serves_first(&self) -> bool {
        self.config.roles.registry && self.has_others() && self.config.roles.logs().len() > 1
    }

    fn shard_facts(&self) -> Arc<SharedFacts<ShardFacts>> {
        let config = self.config;
        Arc::new(SharedFacts::new(ShardFacts {
            cluster: self.cluster,
            keyring: Arc::new(config.keyring.clone()),
            lifetimes: config.lifetimes,
            pages: config.pages,
            services: Arc::default(),
        }))
    }

    /// Begins the clock where the logs ended, whose states end at these times.
    fn begin_clock(&self, states: impl IntoIterator<Item = Time>) -> Result<()> {
        let Some(states_end) = states.into_iter().max() else { return Ok(()) };
        let ended = states_end.max(self.logs_end()?);
        let since = if mutants::is(Mutant::DownSinceStates) { states_end } else { ended };
        let start = self.clock.begin(ended, (self.config.down)(since), self.config.accept_clock);
        self.notices.lock().extend(clock_notice(start));
        Ok(())
    }

    /// Serves the registry, where that must come first.
    async fn serve_registry(
        &self,
        registry: &mut Option<Applier<Registry>>,
        serving: &mut Serving,
        facts: &Arc<SharedFacts<RegistryFacts>>,
    ) -> Result<Option<Door>> {
        if !self.registry_serves_first() {
            return Ok(None);
        }
        let Some(applier) = registry.take() else { return Ok(None) };
        self.begin_clock([applier.time()])?;
        serving.registry = Some(self.start_registry(applier, facts.clone()).await?);
        Ok(Some(self.open_door(serving).await?))
    }

    async fn start_registry(
        &self,
        applier: Applier<Registry>,
        facts: Arc<SharedFacts<RegistryFacts>>,
    ) -> Result<ReplicaHandle> {
        let genesis = registry_genesis(&self.config.cluster)?;
        Ok(self.start(LogId::REGISTRY, applier, facts, genesis).await?.0)
    }

    /// Starts shards and CDC, and the registry where that does not serve yet. All states are opened and compared with their logs
    /// before anything is appended to any of these.
    async fn start_others(
        &self,
        registry: Option<Applier<Registry>>,
        serving: &mut Serving,
        registry_facts: &Arc<SharedFacts<RegistryFacts>>,
        facts: &Arc<SharedFacts<ShardFacts>>,
    ) -> Result<Option<Started<Cdc>>> {
        let roles = &self.config.roles;
        let mut shards = Vec::new();
        for number in &roles.shards {
            shards.push((*number, self.prepare::<Shard>(LogId::shard(*number))?));
        }
        let cdc = roles.cdc.then(|| self.prepare::<Cdc>(LogId::CDC)).transpose()?;
        if serving.registry.is_none() {
            let times =
                registry.iter().map(Applier::time).chain(shards.iter().map(|(_, shard)| shard.time()));
            self.begin_clock(times.chain(cdc.iter().map(Applier::time)))?;
        }
        if let Some(applier) = registry {
            serving.registry = Some(self.start_registry(applier, registry_facts.clone()).await?);
        }
        for (number, applier) in shards {
            let genesis = shard_genesis(&self.config.cluster, number)?;
            let started = self.start(LogId::shard(number), applier, facts.clone(), genesis).await?;
            serving.shards.insert(number, started.0);
        }
        let Some(applier) = cdc else { return Ok(None) };
        let facts = Arc::new(SharedFacts::new(()));
        let started = self.start(LogId::CDC, applier, facts, cdc_genesis(self.cluster)).await?;
        serving.cdc = Some(started.0.clone());
        Ok(Some(started))
    }

    fn open_disks(&self) -> Result<BTreeMap<u64, Arc<BlockService>>> {
        let config = self.config;
        let mut blocks = BTreeMap::new();
        for (service, dir) in &config.roles.disks {
            let disk = config.runtime.disk.clone();
            let store = BlockStore::open(
                disk,
                dir.clone(),
                self.cluster,
                ServiceId(*service),
                config.packing.options,
            )
            .with_context(|| format!("open disk {}", dir.display()))?
            .with_first_packing(config.packing.before_first.clone());
            let store = match config.reserve_on.contains(service) {
                true => store.with_reserve(config.room.reserve_bytes()),
                false => store,
            };
            let keys = config.keyring.of(ServiceId(*service)).to_vec();
            let (runtime, clock) = (config.runtime.clone(), self.clock.clone());
            let of_disk = BlockService::new(runtime, clock, store, self.cluster, keys)
                .with_skew_ms_max(config.clock_skew_ms_max);
            blocks.insert(*service, Arc::new(of_disk));
        }
        Ok(blocks)
    }

    /// What signs, and what is believed, goes with the cluster's keys.
    fn follow_keys(&self, facts: &Arc<SharedFacts<ShardFacts>>, blocks: &BTreeMap<u64, Arc<BlockService>>) {
        let Some(OfSeveral { rotation, .. }) = &self.config.of_several else { return };
        let (keyring, facts, blocks) = (self.config.keyring.clone(), facts.clone(), blocks.clone());
        rotation.tell(move |keys| {
            let keyring = Arc::new(keyring.with_cluster_keys(keys));
            for (service, disk) in &blocks {
                disk.set_keys(keyring.of(ServiceId(*service)).to_vec());
            }
            facts.update(|facts| ShardFacts { keyring: keyring.clone(), ..facts.clone() });
        });
    }

    /// Where the logs that run are led.
    fn routes(&self) -> Arc<Routes> {
        let started = self.started.lock();
        let logs = started.iter().map(|(id, _, log)| (*id, log.clone()));
        Arc::new(Routes::new(self.config.peers.clone(), logs))
    }

    fn watch(&self, replicas: Vec<Replicating>, blocks: BTreeMap<u64, Arc<BlockService>>) -> Watch {
        Watch {
            runtime: self.config.runtime.clone(),
            own: self.config.peers.own(),
            replicas,
            blocks,
            board: self.board.clone(),
            room: self.config.room.clone(),
            left_out: self.config.roles.left_out.clone(),
            engines: self.config.engines.clone(),
            clock: self.clock.clone(),
            meters: self.meters.clone(),
            process_usage: self.config.process_usage,
        }
    }

    fn handler(&self, serving: &Serving, routes: Arc<Routes>, is_starting: bool) -> NodeHandler {
        NodeHandler {
            cluster: self.cluster,
            clock: self.clock.clone(),
            keys: self.config.keys.clone(),
            of_several: self.config.of_several.clone(),
            runtime: self.config.runtime.clone(),
            registry: serving.registry.clone(),
            cdc: serving.cdc.clone(),
            shards: serving.shards.clone(),
            blocks: serving.blocks.clone(),
            board: self.board.clone(),
            process_usage: self.config.process_usage,
            meters: self.meters.clone(),
            monotonic: self.config.runtime.clock.clone(),
            engines: self.config.engines.clone(),
            incarnations: self.incarnations(),
            room: self.config.room.clone(),
            left_out: self.config.roles.left_out.clone(),
            routes,
            is_starting,
            ready: self.ready.clone(),
        }
    }

    /// Listens. What is not served yet is said to be starting.
    async fn open_door(&self, serving: &Serving) -> Result<Door> {
        let config = self.config;
        let handler = self.handler(serving, self.routes(), true).shared(&config.accept);
        let listening = config.runtime.network.listen(&config.listen, handler.clone()).await?;
        let address = config.advertise.clone().unwrap_or_else(|| listening.endpoint().to_string());
        let client =
            own_client(&config.runtime, config.registry.clone(), &address, config.keys.clone(), &self.clock);
        Ok(Door { listening, handler, address, client })
    }

    /// The registry's state, by the newest chain of its log that the file or the state itself knows.
    fn prepare_registry(&self) -> Result<Applier<Registry>> {
        let Self { config, .. } = self;
        config.chains.keep([config.new_logs.chain(LogId::REGISTRY)])?;
        // Before the state is compared with a life of the log that may be over.
        let chain = self.chain(LogId::REGISTRY);
        chains::refuse_older(&config.engines, &BTreeMap::from([(LogId::REGISTRY, chain)]))?;
        let registry = self.prepare::<Registry>(LogId::REGISTRY)?;
        let begun = self.chain(LogId::REGISTRY).incarnation();
        config.chains.keep(chain_in(&registry, LogId::REGISTRY)?)?;
        if self.chain(LogId::REGISTRY).incarnation() == begun {
            return Ok(registry);
        }
        // Its store is closed before it is opened again.
        drop(registry);
        self.prepare::<Registry>(LogId::REGISTRY)
    }

    /// Learns what keeps the logs of this node: from the registry's state where that is here, and from the registry, which knows
    /// more than the state of a member that was away.
    async fn learn_chains(&self, registry: Option<&Applier<Registry>>) -> Result<()> {
        let config = self.config;
        let logs = config.roles.logs();
        let others: Vec<LogId> = logs.iter().copied().filter(|log| *log != LogId::REGISTRY).collect();
        if let Some(registry) = registry {
            let chain = |log: &LogId| {
                let known = chain_in(registry, *log)?;
                Ok(known.unwrap_or_else(|| config.new_logs.chain(*log)))
            };
            config.chains.keep(others.iter().map(chain).collect::<Result<Vec<Chain>>>()?)?;
        }
        // Whoever keeps the registry by himself knows all that it knows.
        let is_whole = registry.is_some() && (!self.has_others() || config.registry.is_none());
        if !others.is_empty() && !is_whole {
            let registries = config.registry.clone().context("a node without the registry names none")?;
            // With a clock of its own: the node's is set by what its logs say, which come next.
            let options = ClientOptions { cache_lifetime: Duration::ZERO, ..ClientOptions::default() };
            let client = Client::new(config.runtime.clone(), registries, options);
            let learned = chains::ask(&client, &others, &config.chains, &config.new_logs).await?;
            config.chains.keep(learned)?;
        }
        let chains: BTreeMap<LogId, Chain> = logs.into_iter().map(|log| (log, self.chain(log))).collect();
        chains::refuse_older(&config.engines, &chains)
    }

    /// Waits until all replicas have caught up; how many logs this node is no member of.
    async fn catch_up(&self, replicas: &[Replicating]) -> Result<usize> {
        let own = self.config.peers.own();
        let caught_up = |of| caught_up(&self.config.runtime, of, own, &self.asker);
        let members = match own {
            // Others may be asked, and some of those are silent: not of one log after the other.
            Some(_) => futures_util::future::try_join_all(replicas.iter().map(caught_up)).await?,
            None => {
                let mut members = Vec::new();
                for replicating in replicas {
                    members.push(caught_up(replicating).await?);
                }
                members
            }
        };
        Ok(members.iter().filter(|is_member| !**is_member).count())
    }

    /// Opens a state and compares it with its log. One that is damaged, missing behind a trimmed log, or of somebody else is
    /// built anew; one that the log does not reach is refused.
    fn prepare<M: Machine>(&self, id: LogId) -> Result<Applier<M>> {
        let stores = &self.config.stores;
        let log = self.config.engines.bounds(&self.chain(id))?;
        let reason = match stores.condemned(id) {
            Some(why) => why,
            None => match self.open::<M>(id) {
                // What other members have is sent where the log does not go on from here.
                Ok(applier) if applier.position().next() >= log.first || self.has_others() => {
                    self.compare(id, &applier, log)?;
                    return Ok(applier);
                }
                Ok(applier) if applier.position().0 == 0 => "there is none".to_owned(),
                Ok(applier) => {
                    format!("it ends at {} and the log begins at {}", applier.position(), log.first)
                }
                Err(fault) if fault.is_damage() => fault.to_string(),
                Err(fault) => return Err(fault).with_context(|| format!("open the state of {id}")),
            },
        };
        let is_home = |view: &dyn View| M::check_home(view, self.cluster, id.number);
        let begins = if self.has_others() { Position(1) } else { log.first };
        let rebuilt = stores
            .rebuild(id, Bounds { first: begins, ..log }, &is_home)
            .with_context(|| format!("build the state of {id} anew ({reason})"))?;
        let from = match rebuilt.from_checkpoint {
            Some(position) => format!("from the checkpoint at {position}"),
            None => "from the beginning of the log".to_owned(),
        };
        let aside = rebuilt
            .set_aside
            .map_or(String::new(), |path| format!("; the old files are in {}", path.display()));
        let notice = format!("the state of {id} cannot be used ({reason}) and is built anew {from}{aside}");
        tracing::warn!("{notice}");
        self.config.runtime.note("node: a state is built anew");
        self.notices.lock().push(notice);
        let applier = self.open::<M>(id).with_context(|| format!("open the state of {id}"))?;
        self.compare(id, &applier, log)?;
        Ok(applier)
    }

    /// The time of the newest entry in any log of the node; a state may be behind its log.
    fn logs_end(&self) -> Result<Time> {
        let mut end = Time(0);
        for id in self.config.roles.logs() {
            // What nobody has begun has no end.
            let (engines, Some(chain)) = (&self.config.engines, self.config.chains.get(id)) else { continue };
            let last = engines.bounds(&chain).and_then(|bounds| engines.batch(&chain, bounds.last));
            let last = last.with_context(|| format!("read the log of {id}"))?;
            let entries = last.iter().flat_map(|batch| &batch.entries);
            let stamps =
                entries.filter_map(|entry| Entry::decode(entry.clone()).ok()).map(|entry| entry.stamp);
            end = end.max(Time(stamps.max().unwrap_or(0)));
        }
        Ok(end)
    }

    fn open<M: Machine>(&self, id: LogId) -> Result<Applier<M>, Fault> {
        let applier = Applier::<M>::open(self.config.stores.store(id)?)?;
        M::check_home(&**applier.store(), self.cluster, id.number)?;
        Ok(applier)
    }

    /// Refuses a log that is not the one that a state was made from.
    fn compare<M: Machine>(&self, id: LogId, applier: &Applier<M>, log: Bounds) -> Result<()> {
        let (position, crc) = applier.last_batch();
        let batch = self.config.engines.batch(&self.chain(id), position);
        let batch = batch.with_context(|| format!("read the log of {id}"))?;
        let is_same = batch.as_ref().is_none_or(|batch| batch_crc(&batch.entries) == crc);
        ensure!(
            position <= log.last && is_same || !self.has_others(),
            "the log of {id} here is not the one that its state at {position} was made from: it was lost in part, or is a copy of \
             another time. This node must not vote any more, for it may have forgotten what it promised: put the right log \
             back, or leave the node stopped"
        );
        ensure!(
            position <= log.last,
            "the log of {id} ends at position {}, but its state is at {position}: the log is older than the state, or it is \
             gone. Put the newer log back; or, to go on with this one and lose what came after it, move the state of \
             every log away (DIR/state), so that it is built from the log",
            log.last
        );
        ensure!(
            is_same,
            "the state of {id} at position {position} was made from another log than the one that is here: one of the two \
             is a copy of another time. Put the right one back; or, to go on with this log, move the state of every log \
             away (DIR/state), so that it is built from the log"
        );
        Ok(())
    }

    /// Whether the logs here have members elsewhere.
    fn has_others(&self) -> bool {
        self.config.peers.are_several()
    }

    /// Puts the state of a checkpoint in the place of the one that there is, and opens it.
    fn restoring<M: Machine>(&self, id: LogId) -> Restore {
        let (stores, cluster) = (self.config.stores.clone(), self.cluster);
        Arc::new(move |position| {
            let is_home = |view: &dyn View| M::check_home(view, cluster, id.number);
            let rebuilt = stores.rebuild(id, Bounds { first: Position(1), last: position }, &is_home)?;
            if rebuilt.from_checkpoint != Some(position.0) {
                return Err(StoreError::Damaged(format!("the snapshot at {position} cannot be used")));
            }
            stores.store(id)
        })
    }

    async fn start<M: Machine>(
        &self,
        id: LogId,
        applier: Applier<M>,
        facts: Arc<SharedFacts<M::Facts>>,
        genesis: Bytes,
    ) -> Result<Started<M>> {
        let name = log_name(id);
        if !mutants::is(Mutant::TimeGoesBack) {
            self.clock.advance(applier.time());
        }
        let (checkpoints, open) = (self.config.stores.checkpoints(id), self.config.stores.open_checkpoint());
        let runtime = self.config.runtime.clone();
        let snapshots = Arc::new(ReplicaSnapshots::new(runtime, checkpoints, open));
        let log = self.config.engines.open(self.chain(id), snapshots.clone()).await;
        let log = log.with_context(|| format!("open the log of {name}"))?;
        let (leader_events, receiver) = mpsc::unbounded_channel();
        let replica = ReplicaConfig {
            name,
            runtime: self.config.runtime.clone(),
            clock: self.clock.clone(),
            activity: self.activity.clone(),
            log: log.clone(),
            facts,
            genesis,
            leader_events,
            on_reign: {
                let reigns = self.reigns.clone();
                Arc::new(move |epoch| reigns.tell(id, epoch))
            },
            checkpoints: self.config.stores.checkpoints(id),
            open_checkpoint: self.config.stores.open_checkpoint(),
            ask_members: self.asker.of(id),
            ask_levels: self.asker.levels(id),
            level: self.config.level,
            restore: self.restoring::<M>(id),
            shortage: {
                let room = self.config.room.clone();
                Arc::new(move || room.shortage())
            },
            on_damage: {
                let stores = self.config.stores.clone();
                Arc::new(move |why| stores.condemn(id, why))
            },
        };
        let handle = Replica::start(applier, replica);
        snapshots.begin(handle.clone());
        self.started.lock().push((id, handle.clone(), log));
        Ok((handle, receiver))
    }
}
