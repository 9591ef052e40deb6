//! A whole cluster in one process, under one directory, on embedded defaults.
//!
//! ```text
//! DIR/cluster.json        what the directory holds
//! DIR/lock                held while a process runs on it
//! DIR/keys/               keys of the block services, mode 0600
//! DIR/chains              which engine keeps which log
//! DIR/log/                segments of all logs
//! DIR/state/<log>/db      the state of each replica
//! DIR/blocks/<n>/         the blocks of disk n
//! ```

use std::{
    collections::BTreeSet,
    fs::File,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use clutch_blocks::label::Label;
use clutch_client_maintenance::collector::{self, CollectOptions};
use clutch_log::{Engines, LogId};
use clutch_log_local::{LocalEngine, Options};
use clutch_proto::{ServiceId, level};
use clutch_runtime::{Disk as _, Endpoint, HybridClock, Runtime, production::OsDisk};
use clutch_shard::Lifetimes;

use crate::{
    Chains, ClusterFile, Node, NodeConfig, Packing, Roles, chains,
    chains::NewLogs,
    clock_file,
    healer::HealSettings,
    keys,
    retention::Retention,
    room::Room,
    routes::Peers,
    several::layout::Layout,
    stores::{RocksStores, StoreProvider},
};

/// The engine that logs begin with here.
const LOCAL: &str = "local";

/// What `up` was asked for. Sizes of an existing directory are kept; asking for others is refused.
#[derive(Clone, Debug)]
pub struct UpConfig {
    /// Everything is under here.
    pub dir: PathBuf,
    /// Where to listen.
    pub listen: Endpoint,
    /// What others reach it by; where it listens when `None`, and this machine's own loopback where that is a wildcard.
    pub advertise: Option<String>,
    /// Metadata shards; `None` takes what is there, or 4.
    pub shards: Option<u32>,
    /// Disks; `None` takes what is there, or 8.
    pub disks: Option<u32>,
    /// Data and parity blocks; `None` takes what is there, or 4+2.
    pub policy: Option<(u32, u32)>,
    /// A log segment is closed when it is larger than this.
    pub segment_bytes_max: u64,
    /// How long what clients are given is good.
    pub lifetimes: Lifetimes,
    /// How far apart clocks may be, in milliseconds.
    pub clock_skew_ms_max: u64,
    /// Believe a wall clock that is further ahead than the cluster can have been down.
    pub accept_clock: bool,
    /// Bytes of the file system of logs and states that blocks leave free; `None` for a part of it.
    pub reserve_bytes: Option<u64>,
    /// How far back every log can be replayed; older parts are trimmed. `None` for the whole logs.
    pub retain_log: Option<Duration>,
    /// How long the collector rests between two passes; `None` for no collector.
    pub collect_pause: Option<Duration>,
    /// How it looks after what is stored.
    pub heal: HealSettings,
}

/// Files that all databases together keep open at most: half of what the process may open, and no more than this.
const DATABASE_FILES_MAX: usize = 4096;

/// Files that one replica's database has open at least: two directories, lock, log, manifest, messages.
const FILES_PER_REPLICA: u64 = 6;
/// Files that everything else has open at least.
const FILES_BESIDE: u64 = 52;

/// Refuses to start more shards than there can be files for.
pub(crate) fn check_files(shards: u32) -> Result<()> {
    let most = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
    let needed = (u64::from(shards) + 2) * FILES_PER_REPLICA + FILES_BESIDE;
    if needed > most {
        bail!(
            "{shards} shards need {needed} open files and {most} are allowed: raise the limit (ulimit -n {}, or LimitNOFILE= of the service)",
            needed.max(4096)
        );
    }
    Ok(())
}

/// How many files all databases may keep open.
pub(crate) fn database_files() -> usize {
    let most = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    most.and_then(|most| usize::try_from(most / 2).ok()).unwrap_or(DATABASE_FILES_MAX).min(DATABASE_FILES_MAX)
}

/// Requests of the background collector in a second: a small part of what a shard can do.
pub(crate) const COLLECT_REQUESTS_PER_S: u32 = 2000;

/// A running cluster and the lock on its directory.
pub struct Up {
    node: Node,
    /// What the directory holds.
    pub cluster: ClusterFile,
    /// Whether the directory was made by this start.
    pub created: bool,
    registered: Option<String>,
    dir: PathBuf,
    runtime: Runtime,
    _lock: File,
}

/// Makes a directory and its parents, durably: also those that a process made that did not come to its sync.
pub(crate) fn make_durable(dir: &Path) -> std::io::Result<()> {
    let dir = std::path::absolute(dir)?;
    OsDisk.create_dir_all(&dir)?;
    dir.parent().map_or(Ok(()), |parent| OsDisk.sync_dir(parent))
}

/// Whether this is the file that has the name now.
fn is_at(file: &File, path: &Path) -> std::io::Result<bool> {
    use std::os::unix::fs::MetadataExt as _;
    let ours = file.metadata()?;
    Ok(std::fs::metadata(path).is_ok_and(|named| (named.dev(), named.ino()) == (ours.dev(), ours.ino())))
}

/// Refuses the directory of a node of several, whose logs others have, too.
fn refuse_node(dir: &Path) -> Result<()> {
    ensure!(
        !crate::several::is_node_dir(dir),
        "{} is the directory of a node of several: start it with clutch node --config {}. What works on the logs of `clutch up` \
         does not work on it yet",
        dir.display(),
        dir.join(crate::several::layout::SETTINGS_FILE).display()
    );
    Ok(())
}

/// What a directory of `up` holds, for commands that work on it.
pub fn cluster_in(runtime: &Runtime, dir: &Path) -> Result<ClusterFile> {
    refuse_node(dir)?;
    ClusterFile::read(runtime, dir)?
        .with_context(|| format!("{} has no cluster.json; name a directory of `clutch up`", dir.display()))
}

/// Takes the lock that a process holds while it runs on a directory.
pub fn lock(dir: &Path) -> Result<File> {
    make_durable(dir).with_context(|| format!("make {}", dir.display()))?;
    let path = dir.join("lock");
    loop {
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .with_context(|| format!("open {}", path.display()))?;
        match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            // A first start that failed may have taken the name away between the two.
            Ok(()) if is_at(&file, &path)? => return Ok(file),
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                bail!(
                    "{} is in use by another clutch process; stop it first, or choose another --dir",
                    dir.display()
                )
            }
            Err(error) => return Err(error).with_context(|| format!("lock {}", path.display())),
        }
    }
}

impl Up {
    /// Starts everything and returns when it serves.
    pub async fn start(runtime: Runtime, config: UpConfig) -> Result<Up> {
        // An address that cannot be listened on is said before anything is made.
        drop(tokio::net::TcpListener::bind(&*config.listen.0).await.with_context(|| {
            format!("listen on {}: choose a free address of this machine with --listen", config.listen)
        })?);
        let dir = config.dir.clone();
        refuse_node(&dir)?;
        let (had_dir, had_lock) = (dir.exists(), dir.join("lock").exists());
        // Held while it is looked at, and while something is removed again: what another process makes is not touched.
        let lock = lock(&dir)?;
        let before = Traces::look(&dir, had_dir, had_lock);
        let started = Up::start_on(runtime, config, lock.try_clone()?).await;
        if started.is_err() {
            before.remove_new(&dir);
        }
        started
    }

    async fn start_on(runtime: Runtime, config: UpConfig, lock: File) -> Result<Up> {
        let (cluster, created) = match ClusterFile::read(&runtime, &config.dir)? {
            Some(cluster) => {
                check_same(&cluster, &config)?;
                (cluster, false)
            }
            None => (new_cluster(&runtime, &config)?, true),
        };
        check_files(cluster.shards)?;
        let services = cluster.service_ids()?;
        let system_key = keys::system_key(&runtime, &config.dir.join("keys"))?;
        let keyring = keys::load_or_create(&runtime, &config.dir.join("keys"), &services)?;
        let disk = |(n, id): (usize, &u64)| (*id, config.dir.join("blocks").join(n.to_string()));
        let disks: Vec<(u64, PathBuf)> = services.iter().enumerate().map(disk).collect();
        let roles = Roles::all(cluster.shards, disks.clone());
        let seam = runtime.clone();
        let places = vec![config.dir.join("log"), config.dir.join("state")];
        for place in &places {
            make_durable(place).with_context(|| format!("make {}", place.display()))?;
        }
        let room = Arc::new(Room::new(runtime.disk.clone(), places, config.reserve_bytes, Some(&config.dir)));
        room.release_for_start();
        let (log_seam, log_dir) = (runtime.clone(), config.dir.join("log"));
        let options = Options {
            segment_bytes_max: config.segment_bytes_max,
            cluster: cluster.cluster_id()?,
            ..Options::default()
        };
        ensure!(
            !clutch_log_local::cut::is_unfinished(&*seam.disk, &log_dir),
            "a rewind of {} was interrupted; finish it: clutch log rewind --dir {}",
            config.dir.display(),
            config.dir.display()
        );
        let engine =
            tokio::task::spawn_blocking(move || LocalEngine::open(&log_seam, log_dir, options)).await?;
        let engine = engine.with_context(|| {
            let log = config.dir.join("log");
            format!("the log in {} cannot be opened; restore what is named here from a copy", log.display())
        })?;
        let chains =
            Arc::new(Chains::open(seam.disk.clone(), config.dir.join(chains::FILE), cluster.cluster_id()?)?);
        let replicas = cluster.shards as usize + 2;
        let rocks = Arc::new(RocksStores::new(config.dir.join("state"), replicas, database_files()));
        let stores: Arc<dyn StoreProvider> = rocks.clone();
        let registered = advertised(&config);
        let node_config = NodeConfig {
            runtime,
            listen: config.listen,
            advertise: registered.clone(),
            failure_domain: None,
            registry: None,
            peers: Peers::none(),
            cluster: cluster.clone(),
            roles,
            engines: Engines::one(LOCAL, Arc::new(engine)),
            chains,
            process_usage: crate::handler::process_usage,
            stores: stores.clone(),
            new_logs: NewLogs::of(LOCAL),
            accept: Arc::new(drop),
            keyring,
            keys: system_key.into(),
            level: level::KNOWN,
            of_several: None,
            lifetimes: config.lifetimes,
            pages: clutch_shard::Pages::default(),
            clock_skew_ms_max: config.clock_skew_ms_max,
            heal: Some(config.heal),
            down: clock_file::downtime(&seam, &config.dir),
            accept_clock: config.accept_clock,
            room: room.clone(),
            reserve_on: on_the_same_file_system(&config.dir, &disks),
            packing: Packing::of(&seam, &config.dir),
        };
        let node = start_node(node_config, &*stores, &cluster).await;
        let node = node.with_context(|| format!("start the cluster in {}", config.dir.display()))?;
        room.hold_again();
        if let Some(pause) = config.collect_pause {
            let options = CollectOptions { requests_per_s: COLLECT_REQUESTS_PER_S, ..Default::default() };
            // With a name and sessions of its own, so that what it waits for holds up nobody else.
            let client = node.client().sibling();
            node.client().runtime().spawn("collector", collector::run(client, options, pause));
        }
        if let Some(keep) = config.retain_log {
            let (logs, at) = (cluster.logs(), node.endpoint().clone());
            let retention = Retention { client: node.client().sibling(), at, stores: rocks, logs, keep };
            node.client().runtime().spawn("retention", retention.run(node.clock().clone()));
        }
        keep_clock_file(&seam, &config.dir, node.clock());
        Ok(Up { node, cluster, created, registered, dir: config.dir, runtime: seam, _lock: lock })
    }

    /// What others reach the node by, where that was said or chosen.
    pub fn registered(&self) -> Option<String> {
        self.registered.clone()
    }

    /// The node that does it all.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Ends cleanly.
    pub async fn stop(self) {
        let clock = self.node.clock().clone();
        self.node.stop().await;
        clock_file::write(&self.runtime, &self.dir, clock.now());
    }
}

/// Writes down what time it is, now and again and again.
pub(crate) fn keep_clock_file(runtime: &Runtime, dir: &Path, clock: &Arc<HybridClock>) {
    clock_file::write(runtime, dir, clock.now());
    let (clock, dir, seam) = (clock.clone(), dir.to_owned(), runtime.clone());
    runtime.spawn("clock file", async move {
        loop {
            seam.clock.sleep(clock_file::PERIOD).await;
            let (seam_of_write, dir, now) = (seam.clone(), dir.clone(), clock.now());
            seam.blocking(move || clock_file::write(&seam_of_write, &dir, now)).await;
        }
    });
}

/// A cluster of its own in a new directory, with labelled disks.
fn new_cluster(runtime: &Runtime, config: &UpConfig) -> Result<ClusterFile> {
    let (data, parity) = config.policy.unwrap_or((4, 2));
    let (shards, count) = (config.shards.unwrap_or(4), config.disks.unwrap_or(8));
    let cluster = ClusterFile::generate(runtime, shards, count, data, parity)?;
    let disks = |n: usize| config.dir.join("blocks").join(n.to_string());
    cluster.create(runtime, &config.dir, &|cluster| label_disks(runtime, cluster, disks))?;
    Ok(cluster)
}

/// What others reach the node by, where that is not what it listens on.
fn advertised(config: &UpConfig) -> Option<String> {
    if config.advertise.is_some() {
        return config.advertise.clone();
    }
    let (host, port) = config.listen.0.rsplit_once(':')?;
    // Whoever is told a wildcard asks himself. The port is known: a wildcard with port 0 is told apart below.
    let loopback = match host {
        "0.0.0.0" | "*" => "127.0.0.1",
        "[::]" | "::" => "[::1]",
        _ => return None,
    };
    Some(format!("{loopback}:{port}"))
}

/// What was in a directory before a start, so that a first start that fails leaves nothing behind.
struct Traces {
    had_dir: bool,
    had_cluster: bool,
    names: BTreeSet<std::ffi::OsString>,
}

impl Traces {
    fn names_in(dir: &Path) -> BTreeSet<std::ffi::OsString> {
        std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.file_name()).collect()
    }

    fn look(dir: &Path, had_dir: bool, had_lock: bool) -> Traces {
        let mut names = Traces::names_in(dir);
        if !had_lock {
            names.remove(std::ffi::OsStr::new("lock"));
        }
        Traces { had_dir, had_cluster: dir.join("cluster.json").exists(), names }
    }

    /// Removes what a start made, if there was no cluster before it: what it made nobody has used.
    fn remove_new(&self, dir: &Path) {
        const OURS: [&str; 10] = [
            "lock",
            "keys",
            "log",
            "state",
            "blocks",
            "cluster.json",
            "clock",
            "reserve",
            chains::FILE,
            "chains.new",
        ];
        if self.had_cluster {
            return;
        }
        for name in
            Traces::names_in(dir).difference(&self.names).filter(|name| OURS.iter().any(|our| name == our))
        {
            let path = dir.join(name);
            // What stays is in nobody's way: the next start goes on with it or says what it is.
            let _ = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
        }
        if !self.had_dir {
            let _ = std::fs::remove_dir(dir);
        }
    }
}

/// Disks that take room from logs or states.
pub(crate) fn on_the_same_file_system(dir: &Path, disks: &[(u64, PathBuf)]) -> Vec<u64> {
    use std::os::unix::fs::MetadataExt as _;
    let device = |path: &Path| path.metadata().ok().map(|metadata| metadata.dev());
    let ours = [device(&dir.join("log")), device(&dir.join("state"))];
    let shares = |path: &Path| device(path).is_some_and(|device| ours.contains(&Some(device)));
    disks.iter().filter(|(_, path)| shares(path)).map(|(id, _)| *id).collect()
}

/// Labels the disks of a new cluster.
fn label_disks(runtime: &Runtime, cluster: &ClusterFile, dir: impl Fn(usize) -> PathBuf) -> Result<()> {
    for (n, service) in cluster.service_ids()?.into_iter().enumerate() {
        let dir = dir(n);
        let label = Label {
            cluster: cluster.cluster_id()?,
            service: ServiceId(service),
            created: runtime.clock.now(),
        };
        label.write(&*runtime.disk, &dir).with_context(|| format!("label {}", dir.display()))?;
    }
    Ok(())
}

/// Labels one disk of a stopped cluster's directory: an empty one that takes the place of another, or one whose label is
/// damaged. A disk that holds the blocks of another service is refused.
pub fn label_disk(runtime: &Runtime, dir: &Path, number: u32) -> Result<PathBuf> {
    let _lock = lock(dir)?;
    let cluster = ClusterFile::read(runtime, dir)?
        .with_context(|| format!("{} has no cluster.json; name a directory of `clutch up`", dir.display()))?;
    let services = match crate::several::is_node_dir(dir) {
        true => Layout::read(runtime, dir)?.disks()?.into_iter().map(|(service, _)| service).collect(),
        false => cluster.service_ids()?,
    };
    let service = services
        .get(number as usize)
        .with_context(|| format!("disk {number}: there are {}, counted from 0", services.len()))?;
    let disk = dir.join("blocks").join(number.to_string());
    let (cluster, service) = (cluster.cluster_id()?, ServiceId(*service));
    let found = std::fs::read(clutch_blocks::label::path(&disk)).ok().and_then(|bytes| Label::decode(&bytes));
    if let Some(found) = found.filter(|found| (found.cluster, found.service) != (cluster, service)) {
        bail!(
            "{} is the disk of service {} of cluster {:016x}; mount it in its own place, or empty it first",
            disk.display(),
            found.service,
            found.cluster
        );
    }
    if let Some(other) = clutch_blocks::store::foreign_block(&*runtime.disk, &disk, cluster, service)? {
        bail!("{} holds blocks of another service or cluster ({other}); empty it first", disk.display());
    }
    Label { cluster, service, created: runtime.clock.now() }
        .write(&*runtime.disk, &disk)
        .with_context(|| format!("label {}", disk.display()))?;
    Ok(disk)
}

/// Starts the node. A state that turns out to be damaged while its log is replayed is built anew, once.
pub(crate) async fn start_node(
    config: NodeConfig,
    stores: &dyn StoreProvider,
    cluster: &ClusterFile,
) -> Result<Node> {
    let logs = cluster.logs();
    let mut tried: BTreeSet<LogId> = BTreeSet::new();
    loop {
        let error = match Node::start(config.clone()).await {
            Ok(node) => return Ok(node),
            Err(error) => error,
        };
        let condemned: Vec<LogId> =
            logs.iter().copied().filter(|id| stores.condemned(*id).is_some()).collect();
        if condemned.is_empty() || condemned.iter().any(|id| !tried.insert(*id)) {
            return Err(error);
        }
        tracing::warn!(%error, "a state is damaged; it is built anew");
    }
}

fn check_same(cluster: &ClusterFile, config: &UpConfig) -> Result<()> {
    let differs = |what: &str, asked: Option<u32>, is: u32| match asked {
        Some(asked) if asked != is => {
            bail!(
                "{} has {is} {what}, not {asked}; leave --{what} away to use it as it is",
                config.dir.display()
            )
        }
        _ => Ok(()),
    };
    differs("shards", config.shards, cluster.shards)?;
    differs("disks", config.disks, cluster.disks.len() as u32)?;
    if let Some((data, parity)) = config.policy
        && (data, parity) != (cluster.data_blocks, cluster.parity_blocks)
    {
        bail!(
            "{} has policy {}+{}; leave --policy away",
            config.dir.display(),
            cluster.data_blocks,
            cluster.parity_blocks
        );
    }
    Ok(())
}
