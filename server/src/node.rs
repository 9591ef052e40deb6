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

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use clutch_blocks::{BlockService, BlockStore};
use clutch_cdc::Cdc;
use clutch_client::{Client, ClientOptions};
use clutch_log::LogId;
use clutch_proto::{
    ServiceId, cdc,
    mutants::{self, Mutant},
    registry::{
        self, GetChain, PlaceCdc, PlaceShard, RegisterServices, Segment, SpanPolicy, SwapChain,
        registry_entry, registry_request::Op,
    },
    session::Role,
    shard, types,
};
use clutch_registry::Registry;
use clutch_runtime::{Endpoint, HybridClock, Listening, Runtime};
use clutch_shard::{Keyring, Lifetimes, Shard, ShardFacts};
use clutch_state::{Applier, Machine, Replica, ReplicaConfig, ReplicaHandle, replica::LeaderEvent};
use prost::Message as _;
use tokio::sync::mpsc;

use crate::{
    cdc_driver,
    cluster_file::ClusterFile,
    handler::{INCARNATION, NodeHandler, ProcessUsage, SharedHandler},
    stores::{LogProvider, StoreProvider, log_name},
};

/// Bytes of a span of the default policy.
pub const SPAN_BYTES: u32 = 8 << 20;
/// How often a node compares what it knows with the registry.
const REFRESH: Duration = Duration::from_secs(2);
/// Free space is reported when it has moved by this part of the capacity.
const SPACE_STEP: u64 = 32;

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
}

/// Everything a node is made of.
pub struct NodeConfig {
    /// What it runs on.
    pub runtime: Runtime,
    /// Where it listens.
    pub listen: Endpoint,
    /// What others reach it by; the address that was bound when `None`.
    pub advertise: Option<String>,
    /// Where the registry is; this node itself when `None`.
    pub registry: Option<Endpoint>,
    /// The cluster.
    pub cluster: ClusterFile,
    /// Its roles.
    pub roles: Roles,
    /// Its logs.
    pub logs: Arc<dyn LogProvider>,
    /// Its stores.
    pub stores: Arc<dyn StoreProvider>,
    /// The name of the log engine, for the chains.
    pub engine: String,
    /// The block services' keys.
    pub keyring: Keyring,
    /// What the parts of the cluster know each other by.
    pub system_key: [u8; 32],
    /// How long what clients are given is good.
    pub lifetimes: Lifetimes,
    /// How far apart the clocks of the cluster's nodes may be, in milliseconds.
    pub clock_skew_ms_max: u64,
    /// What the process uses; a simulated node has no process of its own.
    pub process_usage: ProcessUsage,
}

/// A running node. Dropping it closes the endpoint; [`Node::stop`] also flushes.
pub struct Node {
    listening: Box<dyn Listening>,
    replicas: Vec<ReplicaHandle>,
    stopping: Arc<AtomicBool>,
    client: Client,
}

impl Node {
    /// Starts all roles and returns when the registry knows them.
    pub async fn start(config: NodeConfig) -> Result<Node> {
        let runtime = config.runtime.clone();
        let cluster = config.cluster.cluster_id()?;
        let clock = Arc::new(HybridClock::new(runtime.clock.clone()));
        let starter =
            Starter { config: &config, clock: clock.clone(), activity: Arc::new(AtomicU64::new(0)) };
        let facts = Arc::new(ShardFacts {
            cluster,
            keyring: std::sync::RwLock::new(config.keyring.clone()),
            lifetimes: config.lifetimes,
            ..ShardFacts::default()
        });

        let registry = match config.roles.registry {
            true => Some(
                starter
                    .start::<Registry>(LogId::REGISTRY, Arc::new(()), registry_genesis(&config.cluster)?)
                    .await?
                    .0,
            ),
            false => None,
        };
        let mut shards = BTreeMap::new();
        for number in &config.roles.shards {
            let genesis = shard_genesis(&config.cluster, *number)?;
            shards.insert(
                *number,
                starter.start::<Shard>(LogId::shard(*number), facts.clone(), genesis).await?.0,
            );
        }
        let cdc = match config.roles.cdc {
            true => {
                let entry = cdc::CdcEntry {
                    tag: None,
                    body: Some(cdc::cdc_entry::Body::Genesis(cdc::Genesis { cluster })),
                };
                Some(starter.start::<Cdc>(LogId::CDC, Arc::new(()), entry.encode_to_vec().into()).await?)
            }
            false => None,
        };
        let mut blocks = BTreeMap::new();
        for (service, dir) in &config.roles.disks {
            let store = BlockStore::open(runtime.disk.clone(), dir.clone(), cluster, ServiceId(*service))
                .with_context(|| format!("open disk {}", dir.display()))?;
            let keys = config.keyring.of(ServiceId(*service)).to_vec();
            let service_of_disk = BlockService::new(runtime.clone(), store, cluster, keys)
                .with_skew_ms_max(config.clock_skew_ms_max);
            blocks.insert(*service, Arc::new(service_of_disk));
        }

        let replicas: Vec<ReplicaHandle> = registry
            .iter()
            .chain(shards.values())
            .chain(cdc.iter().map(|(handle, _)| handle))
            .cloned()
            .collect();
        let handler = Arc::new(NodeHandler {
            cluster,
            clock,
            system_key: config.system_key,
            registry,
            cdc: cdc.as_ref().map(|(handle, _)| handle.clone()),
            shards: shards.clone(),
            blocks: blocks.clone(),
            process_usage: config.process_usage,
        });
        let listening = runtime.network.listen(&config.listen, Arc::new(SharedHandler(handler))).await?;
        let address = config.advertise.clone().unwrap_or_else(|| listening.endpoint().to_string());
        let registry_endpoint = config.registry.clone().unwrap_or_else(|| address.as_str().into());
        let options = ClientOptions {
            cache_lifetime: Duration::ZERO,
            system_key: Some(config.system_key),
            ..ClientOptions::default()
        };
        let client = Client::new(runtime.clone(), registry_endpoint, options);
        if let Some((handle, events)) = cdc {
            runtime.spawn("cdc driver", cdc_driver::run(client.clone(), handle, events));
        }
        let mut epochs = BTreeMap::new();
        for replica in &replicas {
            let (name, epoch) = caught_up(&runtime, replica).await?;
            epochs.insert(name, epoch);
        }
        let stopping = Arc::new(AtomicBool::new(false));
        let keeper = Keeper {
            client: client.clone(),
            address,
            roles: config.roles.clone(),
            shard_count: config.cluster.shards,
            engine: config.engine.clone(),
            epochs,
            blocks,
            shards,
            facts,
            logged_version: 0,
            reported: BTreeMap::new(),
        };
        keeper.run(stopping.clone()).await?;
        Ok(Node { listening, replicas, stopping, client })
    }

    /// Where the node listens.
    pub fn endpoint(&self) -> &Endpoint {
        self.listening.endpoint()
    }

    /// A client of the cluster.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Ends cleanly: what is applied is flushed, so that the next start need not replay it.
    pub async fn stop(self) {
        self.stopping.store(true, Ordering::Relaxed);
        for replica in &self.replicas {
            replica.stop().await;
        }
    }
}

/// Waits until a replica has applied its log and leads, however long that takes. Returns its name and epoch.
async fn caught_up(runtime: &Runtime, replica: &ReplicaHandle) -> Result<(String, u64)> {
    use clutch_proto::admin::{AdminRequest, Status, admin_request};
    let mut last_told = runtime.clock.monotonic();
    loop {
        let reply = replica.admin(AdminRequest { op: Some(admin_request::Op::Status(Status {})) }).await?;
        let status = reply.status.context("an answer without a status")?;
        ensure!(status.fault.is_empty(), "{}: {}", status.name, status.fault);
        if status.leading {
            return Ok((status.name, status.epoch));
        }
        if runtime.clock.monotonic() - last_told > Duration::from_secs(5) {
            last_told = runtime.clock.monotonic();
            tracing::warn!(replica = %status.name, applied = status.applied_position, of = status.log_last, "replays its log");
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
    };
    let entry = registry::RegistryEntry { tag: None, body: Some(registry_entry::Body::Genesis(genesis)) };
    Ok(entry.encode_to_vec().into())
}

fn shard_genesis(cluster: &ClusterFile, number: u32) -> Result<Bytes> {
    let (slot_first, slot_last) = clutch_registry::slots(number, cluster.shards);
    let genesis = shard::Genesis {
        shard: number,
        slot_first,
        slot_last,
        cluster: cluster.cluster_id()?,
        root_mode: 0o755,
    };
    let entry = shard::ShardEntry { tag: None, body: Some(shard::shard_entry::Body::Genesis(genesis)) };
    Ok(entry.encode_to_vec().into())
}

struct Starter<'a> {
    config: &'a NodeConfig,
    clock: Arc<HybridClock>,
    activity: Arc<AtomicU64>,
}

type Started<M> = (ReplicaHandle, mpsc::UnboundedReceiver<LeaderEvent<<M as Machine>::Effect>>);

impl Starter<'_> {
    async fn start<M: Machine>(&self, id: LogId, facts: Arc<M::Facts>, genesis: Bytes) -> Result<Started<M>> {
        let name = log_name(id);
        let store = self.config.stores.store(id).with_context(|| format!("open the state of {name}"))?;
        let applier = Applier::<M>::open(store).with_context(|| format!("open the state of {name}"))?;
        if !mutants::is(Mutant::TimeGoesBack) {
            self.clock.advance(applier.time());
        }
        let log = self.config.logs.log(id).await.with_context(|| format!("open the log of {name}"))?;
        let (leader_events, receiver) = mpsc::unbounded_channel();
        let replica = ReplicaConfig {
            name,
            runtime: self.config.runtime.clone(),
            clock: self.clock.clone(),
            activity: self.activity.clone(),
            log,
            facts,
            genesis,
            leader_events,
            checkpoints: self.config.stores.checkpoints(id),
            open_checkpoint: self.config.stores.open_checkpoint(),
        };
        Ok((Replica::start(applier, replica), receiver))
    }
}

/// Keeps registry and node in step: what is here is registered there, what is known there is logged here.
struct Keeper {
    client: Client,
    address: String,
    roles: Roles,
    shard_count: u32,
    engine: String,
    /// In which epoch each log here is led, by its name.
    epochs: BTreeMap<String, u64>,
    blocks: BTreeMap<u64, Arc<BlockService>>,
    shards: BTreeMap<u32, ReplicaHandle>,
    facts: Arc<ShardFacts>,
    /// The services' version that was logged in every shard here.
    logged_version: u64,
    /// Free space as it was registered.
    reported: BTreeMap<u64, u64>,
}

impl Keeper {
    /// The first round before it returns, the others as a task.
    async fn run(mut self, stopping: Arc<AtomicBool>) -> Result<()> {
        self.register_services().await?;
        self.log_services().await?;
        self.place().await?;
        let runtime = self.client.runtime().clone();
        runtime.spawn("keeper", async move {
            let clock = self.client.runtime().clock.clone();
            while !stopping.load(Ordering::Relaxed) {
                clock.sleep(REFRESH).await;
                let round = async {
                    self.register_services().await?;
                    self.log_services().await
                };
                if let Err(error) = round.await {
                    tracing::warn!(%error, "compare with the registry");
                }
            }
        });
        Ok(())
    }

    async fn register_services(&mut self) -> Result<()> {
        let mut services = Vec::new();
        let mut reported = Vec::new();
        for (id, service) in &self.blocks {
            let store = service.store().clone();
            let space = self.client.runtime().blocking(move || store.space()).await;
            let (capacity_bytes, available_bytes) = match space {
                Some(Ok(space)) => space,
                // A disk that cannot be asked takes no new blocks until it can.
                _ => (0, 0),
            };
            let moved = self
                .reported
                .get(id)
                .is_none_or(|r| r.abs_diff(available_bytes) > capacity_bytes / SPACE_STEP);
            if moved {
                reported.push((*id, available_bytes));
                services.push(types::BlockService {
                    service_id: *id,
                    address: self.address.clone(),
                    failure_domain: format!("{}/{id:x}", self.address),
                    capacity_bytes,
                    available_bytes,
                    ..types::BlockService::default()
                });
            }
        }
        if !services.is_empty() {
            self.client.registry(Op::RegisterServices(RegisterServices { services }), true).await?;
        }
        self.reported.extend(reported);
        Ok(())
    }

    /// Takes the registry's list of services over: for placement at once, into the shards' logs if it is new.
    async fn log_services(&mut self) -> Result<()> {
        if self.shards.is_empty() {
            return Ok(());
        }
        let map = self.client.refresh_map().await?;
        *self.facts.services.write().unwrap_or_else(|e| e.into_inner()) = Arc::new(map.services.clone());
        if map.services_version == self.logged_version {
            return Ok(());
        }
        let changed =
            shard::ServicesChanged { version: map.services_version, services: map.services.clone() };
        let entry =
            shard::ShardEntry { tag: None, body: Some(shard::shard_entry::Body::ServicesChanged(changed)) };
        let body = Bytes::from(entry.encode_to_vec());
        for (number, shard) in &self.shards {
            let clock = self.client.runtime().clock.clone();
            let start = clock.monotonic();
            loop {
                match shard.propose(body.clone()).await.result {
                    Ok(_) => break,
                    Err(refusal)
                        if refusal.is_retryable() && clock.monotonic() - start < Duration::from_secs(30) =>
                    {
                        clock.sleep(Duration::from_millis(20)).await;
                    }
                    Err(refusal) => {
                        return Err(refusal)
                            .with_context(|| format!("tell shard {number} of the block services"));
                    }
                }
            }
        }
        self.logged_version = map.services_version;
        Ok(())
    }

    /// Tells the registry where this node's roles are, unless it knows.
    async fn place(&mut self) -> Result<()> {
        let map = self.client.refresh_map().await?;
        for number in &self.roles.shards {
            let (slot_first, slot_last) = clutch_registry::slots(*number, self.shard_count);
            let placement = types::ShardPlacement {
                shard: *number,
                slot_first,
                slot_last,
                address: self.address.clone(),
                epoch: self.epoch(LogId::shard(*number)),
            };
            self.begin_chain(Role::Shard, u64::from(*number)).await?;
            if !map.shards.contains(&placement) {
                self.tell(Op::PlaceShard(PlaceShard { placement: Some(placement) })).await?;
            }
        }
        if self.roles.cdc {
            self.begin_chain(Role::Cdc, 0).await?;
            let op = PlaceCdc { address: self.address.clone(), epoch: self.epoch(LogId::CDC) };
            self.tell(Op::PlaceCdc(op)).await?;
        }
        Ok(())
    }

    fn epoch(&self, id: LogId) -> u64 {
        self.epochs.get(&log_name(id)).copied().unwrap_or(0)
    }

    /// Tells the registry where something is led; that a newer leader was first is no failure.
    async fn tell(&self, op: Op) -> Result<()> {
        match self.client.registry(op, true).await {
            Err(error) if error.code() == Some(types::Code::Stale) => {
                self.client.runtime().note("node: a newer leader was placed first");
                tracing::warn!(%error, "this node's leadership is over before it was known");
                Ok(())
            }
            told => Ok(told.map(drop)?),
        }
    }

    async fn begin_chain(&self, role: Role, number: u64) -> Result<()> {
        let role = role as u32;
        match self.client.registry(Op::GetChain(GetChain { role, number }), false).await {
            Ok(_) => Ok(()),
            Err(error) if error.is_not_found() => {
                let append = Segment {
                    base_position: 0,
                    engine: self.engine.clone(),
                    parameters: String::new(),
                    incarnation: INCARNATION,
                };
                let swap = SwapChain { role, number, expect_incarnation: 0, append: Some(append) };
                self.client.registry(Op::SwapChain(swap), true).await?;
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }
}
