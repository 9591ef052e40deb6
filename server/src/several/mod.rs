//! One node of a cluster of several: a process with a member of every log, and disks.
//!
//! Logs are kept by the engine `raft`, states by RocksDB, all under the node's directory ([`layout`]). The nodes find each other by
//! the addresses in their settings.

mod balance;
mod heal;
pub mod layout;

use std::{collections::BTreeMap, fs::File, path::Path, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, bail};
use clutch_client::{Client, ClientOptions, Registries};
use clutch_client_maintenance::collector::{self, CollectOptions};
use clutch_log::{Engines, LogId, LogletId, NodeId};
use clutch_log_raft::{Identities, Peers as Streams, RaftEngine, Timing};
use clutch_log_store::{Options, Store};
use clutch_proto::level;
use clutch_runtime::{ClusterKeys, Endpoint, PeerStream, Runtime};
use clutch_shard::{Lifetimes, Pages};
use tokio::sync::watch;

use self::{
    heal::{Healing, Rejoining},
    layout::Layout,
};
use crate::{
    Chains, ClusterFile, Node, NodeConfig, OfSeveral, Packing, Peers, Roles, chains,
    chains::NewLogs,
    clock_file,
    joining::{Belongings, HandOver},
    keys,
    retention::Retention,
    room::Room,
    rotation::Rotation,
    stores::{RocksStores, StoreProvider},
    up,
};

/// A file that is there since the node has begun to keep logs.
const BEGUN: &str = "begun";
/// By so much clocks may be apart after a lease where reads go by it: a fifth of one.
const LEASE_MARGIN: Duration = Duration::from_millis(100);
/// How often it is looked whether the node is what it says it is.
const LOOK_AT_IDENTITY: Duration = Duration::from_millis(200);
/// The engine that logs begin with here.
const RAFT: &str = "raft";

/// How a node is started, beside what its directory says.
#[derive(Clone, Debug)]
pub struct StartOptions {
    /// Believe a wall clock that is further ahead than the node can have been down.
    pub accept_clock: bool,
    /// How far back every log can be replayed; `None` for whole logs. What the settings say is read by whoever asks.
    pub retain_log: Option<Duration>,
}

/// A running node, and the lock on its directory.
pub struct Several {
    node: Node,
    layout: Layout,
    runtime: Runtime,
    identities: Identities,
    rotation: Arc<Rotation>,
    _lock: File,
}

impl Several {
    /// Starts the node and returns when it serves: when its logs are led by it or by others, and it has caught up with them.
    ///
    /// # Errors
    /// When its directory is in use, or its address is taken.
    pub async fn start(runtime: Runtime, layout: Layout, options: StartOptions) -> Result<Several> {
        let listen = &layout.settings.listen;
        let lock = up::lock(&layout.dir)?;
        drop(tokio::net::TcpListener::bind(listen).await.with_context(|| {
            format!("listen on {listen}: say a free address of this machine in node.toml")
        })?);
        let started = start_on(&runtime, &layout, &options).await;
        let Started { node, stores, identities, rotation } = started
            .with_context(|| format!("start node {} in {}", layout.file.node, layout.dir.display()))?;
        let collector = layout.settings.collect_every_s;
        if collector > 0 {
            runtime.spawn(
                "collector",
                collect(node.client().sibling(), node.endpoint().clone(), Duration::from_secs(collector)),
            );
        }
        let settled_after = layout.settings.balance_after_s;
        if settled_after > 0 {
            let (client, at, logs) =
                (node.client().sibling(), node.endpoint().clone(), layout.cluster.logs());
            let settled_after = Duration::from_secs(settled_after);
            runtime.spawn("balance", balance::balance(client, at, logs, settled_after));
        }
        if let Some(keep) = options.retain_log {
            let client = node.client().sibling();
            let (at, logs) = (node.endpoint().clone(), layout.cluster.logs());
            let retention = Retention { client, at, stores, logs, keep };
            runtime.spawn("retention", retention.run(node.clock().clone()));
        }
        up::keep_clock_file(&runtime, &layout.dir, node.clock());
        Ok(Several { node, layout, runtime, identities, rotation, _lock: lock })
    }

    /// What it runs.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Completes when the node turns out to be one that must not go on; why that is.
    pub async fn condemned(&self) -> String {
        condemned(&self.runtime, &self.identities).await
    }

    /// Counts the changes of the cluster's key in its directory.
    pub fn key_changes(&self) -> watch::Receiver<u64> {
        self.rotation.changes()
    }

    /// What its directory says.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Ends cleanly.
    pub async fn stop(self) {
        let clock = self.node.clock().clone();
        self.node.stop().await;
        clock_file::write(&self.runtime, &self.layout.dir, clock.now());
    }
}

/// Opens the store of all logs, and the engine on it.
async fn open_engine(
    runtime: &Runtime,
    layout: &Layout,
    keys: ClusterKeys,
) -> Result<(RaftEngine, Arc<Streams>, Identities)> {
    let cluster = layout.cluster.cluster_id()?;
    let (seam, dir) = (runtime.clone(), layout.dir.join("log"));
    let store_options = Options {
        segment_bytes_max: layout.settings.segment_mib << 20,
        cluster,
        node: layout.file.node,
        may_quarantine: true,
        ..Options::default()
    };
    let store = tokio::task::spawn_blocking(move || Store::open(&seam, dir, store_options)).await?;
    let store = store
        .with_context(|| format!("the logs in {} cannot be opened", layout.dir.join("log").display()))?;
    let (seam, path, node) = (runtime.clone(), layout.dir.join("log").join("identities"), layout.file.node);
    let (has_logs, begun) = (!store.groups().is_empty(), layout.dir.join(BEGUN));
    let identities = tokio::task::spawn_blocking(move || {
        let is_new = || Ok(!has_logs && !seam.disk.exists(&begun));
        let identities = Identities::open(&seam, path, node, is_new)?;
        // From now on a node without logs is one that has lost them.
        seam.disk.replace(&begun, b"")?;
        Ok::<_, std::io::Error>(identities)
    });
    let identities = identities.await?.with_context(|| {
        format!(
            "the log in {} is not the one that this node has kept. Put its log back. If that is lost, the node must not vote any \
             more: what it promised is lost, too, and acknowledged work could be undone",
            layout.dir.join("log").display()
        )
    })?;
    let nodes = layout.nodes.clone();
    let address = move |node: NodeId| nodes.get(&node).map(|address| Endpoint::from(address.as_str()));
    let (own, met) = (layout.advertised(), identities.clone());
    let streams =
        Streams::new(runtime.clone(), cluster, layout.file.node, keys, identities, &own, Arc::new(address));
    let lease_reads = layout.settings.lease_reads.then_some(LEASE_MARGIN);
    let timing = Timing { lease_reads, ..Timing::default() };
    Ok((RaftEngine::new(runtime.clone(), store, streams.clone(), timing), streams, met))
}

fn accepting(streams: &Arc<Streams>) -> Arc<dyn Fn(PeerStream) + Send + Sync> {
    let streams = streams.clone();
    Arc::new(move |stream| streams.accept(stream))
}

/// What a new node is handed over: what this one has, and where the nodes are by now.
fn handing_over(layout: &Layout, identities: Identities) -> HandOver {
    let (own, of) = (layout.file.clone(), layout.cluster.clone());
    let (dir, peers) = (layout.dir.join("keys"), peers(layout, identities));
    Arc::new(move || {
        let nodes = peers.all().into_iter().map(|(node, endpoint)| (node, endpoint.to_string())).collect();
        Ok(Belongings::new(of.clone(), own.founders.clone(), nodes, keys::texts(&dir)?))
    })
}

/// Where the nodes are: as each has said, and where one has not, as the settings say.
fn peers(layout: &Layout, identities: Identities) -> Peers {
    let mut said = layout.nodes.clone();
    said.insert(layout.file.node, layout.advertised());
    Peers::known(layout.file.node, move || {
        let met = identities.met().into_iter().filter(|(_, address)| !address.is_empty());
        let mut nodes = said.clone();
        nodes.extend(met);
        nodes.into_iter().map(|(node, address)| (node, Endpoint::from(address.as_str()))).collect()
    })
}

/// Lets the others take this node out of logs that are damaged here; those that it must go on without, and why.
async fn leave_out(
    layout: &Layout,
    (registries, keys): (&Registries, ClusterKeys),
    (engine, chains): (&RaftEngine, &Chains),
    (runtime, stores): (&Runtime, &RocksStores),
    rejoining: &Rejoining,
) -> Result<BTreeMap<LogId, String>> {
    let options = ClientOptions { keys: Some(keys), ..ClientOptions::default() };
    let client = Client::new(runtime.clone(), registries.clone(), options);
    let healing = Healing { runtime, client: &client, node: layout.file.node, engine, stores, rejoining };
    healing.finish().await?;
    let damaged = engine.damaged();
    // What a sealed life of a log had is not to be had from its members any more.
    let is_over =
        |id: &LogletId| chains.get(id.log).is_some_and(|chain| chain.incarnation() != id.incarnation);
    if let Some((id, fault)) = damaged.iter().find(|(id, _)| is_over(id)) {
        bail!(
            "{id} is damaged here, which the log has behind it: {fault}. Put another node in the place of this one: clutch cluster \
             replace-node"
        );
    }
    if damaged.is_empty() {
        return Ok(BTreeMap::new());
    }
    Ok(healing.take_out(damaged).await)
}

/// A node that serves, and what looks after it.
struct Started {
    node: Node,
    stores: Arc<RocksStores>,
    identities: Identities,
    rotation: Arc<Rotation>,
}

async fn start_on(runtime: &Runtime, layout: &Layout, options: &StartOptions) -> Result<Started> {
    let (dir, cluster) = (&layout.dir, &layout.cluster);
    up::check_files(cluster.shards)?;
    let keys_dir = dir.join("keys");
    let rotation = Arc::new(Rotation::read(&keys_dir, cluster.cluster_id()?)?);
    let keyring = keys::load(&keys_dir, &cluster.service_ids()?)?;
    let disks = layout.disks()?;
    let places = vec![dir.join("log"), dir.join("state")];
    for place in &places {
        up::make_durable(place).with_context(|| format!("make {}", place.display()))?;
    }
    let reserve = layout.settings.reserve_mib.map(|mib| mib << 20);
    let room = Arc::new(Room::new(runtime.disk.clone(), places, reserve, Some(dir)));
    room.release_for_start();
    let (engine, streams, identities) = open_engine(runtime, layout, rotation.keys().clone()).await?;
    let rejoining = Rejoining::open(runtime.disk.clone(), dir.join(heal::FILE), &cluster.logs())?;
    let rejoining = Arc::new(rejoining);
    let known = Chains::open(runtime.disk.clone(), dir.join(chains::FILE), cluster.cluster_id()?)?;
    let replicas = cluster.shards as usize + 2;
    let rocks = Arc::new(RocksStores::new(dir.join("state"), replicas, up::database_files()));
    let stores: Arc<dyn StoreProvider> = rocks.clone();
    let hand_over = handing_over(layout, identities.clone());
    let peers = peers(layout, identities.clone());
    let registries = Registries::new(peers.all().into_values().collect()).context("[nodes] names none")?;
    let (by, with, on) = ((&registries, rotation.keys().clone()), (&engine, &known), (runtime, &*rocks));
    let left_out = leave_out(layout, by, with, on, &rejoining).await?;
    let lost: Vec<LogId> = left_out.keys().copied().collect();
    let greeted = layout.nodes.keys().copied().collect();
    let founders = layout.file.founders.clone();
    let config = NodeConfig {
        runtime: runtime.clone(),
        listen: layout.settings.listen.as_str().into(),
        advertise: Some(layout.advertised()),
        failure_domain: Some(
            layout.settings.failure_domain.clone().unwrap_or_else(|| layout.file.node.to_string()),
        ),
        registry: Some(registries),
        peers,
        cluster: cluster.clone(),
        roles: Roles::all(cluster.shards, disks.clone()).without(left_out),
        engines: Engines::one(RAFT, Arc::new(engine)),
        chains: Arc::new(known),
        stores: stores.clone(),
        new_logs: NewLogs::with(RAFT, move |_| clutch_log_raft::parameters(&founders)),
        accept: accepting(&streams),
        keyring,
        keys: rotation.keys().clone(),
        level: level::KNOWN,
        of_several: Some(OfSeveral { hand_over, rotation: rotation.clone() }),
        lifetimes: Lifetimes::default(),
        pages: Pages::default(),
        clock_skew_ms_max: layout.settings.clock_skew_s * 1000,
        down: clock_file::downtime(runtime, dir),
        accept_clock: options.accept_clock,
        room: room.clone(),
        reserve_on: up::on_the_same_file_system(dir, &disks),
        packing: Packing::of(runtime, dir),
        heal: Some(layout.settings.heal()),
        process_usage: crate::handler::process_usage,
    };
    // One that is to become a member is looked for where it says that it is.
    streams.greet(greeted);
    let node = start_or_know(config, &*stores, cluster, &identities).await?;
    room.hold_again();
    let coming = heal::come_back(node.client().sibling(), layout.file.node, rejoining, lost);
    runtime.spawn("come back", coming);
    Ok(Started { node, stores: rocks, identities, rotation })
}

/// Starts a node, unless it learns meanwhile that it must not go on.
async fn start_or_know(
    config: NodeConfig,
    stores: &dyn StoreProvider,
    cluster: &ClusterFile,
    identities: &Identities,
) -> Result<Node> {
    let runtime = config.runtime.clone();
    tokio::select! {
        node = up::start_node(config, stores, cluster) => node,
        why = condemned(&runtime, identities) => bail!(why),
    }
}

/// Completes when a node learns that it must not go on.
async fn condemned(runtime: &Runtime, identities: &Identities) -> String {
    loop {
        if let Some(why) = identities.condemned() {
            return why;
        }
        runtime.clock.sleep(LOOK_AT_IDENTITY).await;
    }
}

/// Collects again and again while this node leads the registry, so that one node of all does.
async fn collect(client: Client, own: Endpoint, pause: Duration) {
    let options = CollectOptions { requests_per_s: up::COLLECT_REQUESTS_PER_S, ..CollectOptions::default() };
    let clock = client.runtime().clock.clone();
    loop {
        clock.sleep(pause).await;
        match balance::leads_registry(&client, &own).await {
            Ok(true) => collector::pass(&client, &options).await,
            Ok(false) => {}
            Err(error) => tracing::warn!(%error, "ask this node whether it is to collect"),
        }
    }
}

/// A directory of a node, as commands that look after it are told.
pub fn is_node_dir(dir: &Path) -> bool {
    dir.join(layout::SETTINGS_FILE).exists()
}
