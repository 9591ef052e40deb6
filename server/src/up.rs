//! A whole cluster in one process, under one directory, on embedded defaults.
//!
//! ```text
//! DIR/cluster.json        what the directory holds
//! DIR/lock                held while a process runs on it
//! DIR/keys/               keys of the block services, mode 0600
//! DIR/log/                segments of all logs
//! DIR/state/<log>/db      the state of each replica
//! DIR/blocks/<n>/         the blocks of disk n
//! ```

use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use clutch_log_local::{LocalEngine, Options};
use clutch_runtime::{Endpoint, Runtime};
use clutch_shard::Lifetimes;

use crate::{
    ClusterFile, Node, NodeConfig, Roles,
    collector::{self, CollectOptions},
    keys,
    stores::RocksStores,
};

/// What `up` was asked for. Sizes of an existing directory are kept; asking for others is refused.
#[derive(Clone, Debug)]
pub struct UpConfig {
    /// Everything is under here.
    pub dir: PathBuf,
    /// Where to listen.
    pub listen: Endpoint,
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
    /// How long the collector rests between two passes; `None` for no collector.
    pub collect_pause: Option<Duration>,
}

/// Requests of the background collector in a second: a small part of what a shard can do.
const COLLECT_REQUESTS_PER_S: u32 = 2000;

/// A running cluster and the lock on its directory.
pub struct Up {
    node: Node,
    /// What the directory holds.
    pub cluster: ClusterFile,
    /// Whether the directory was made by this start.
    pub created: bool,
    _lock: File,
}

/// Takes the lock that a process holds while it runs on a directory.
pub fn lock(dir: &Path) -> Result<File> {
    std::fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
    let path = dir.join("lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("open {}", path.display()))?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            bail!(
                "{} is in use by another clutch process; stop it first, or choose another --dir",
                dir.display()
            )
        }
        Err(error) => Err(error).with_context(|| format!("lock {}", path.display())),
    }
}

impl Up {
    /// Starts everything and returns when it serves.
    pub async fn start(runtime: Runtime, config: UpConfig) -> Result<Up> {
        let lock = lock(&config.dir)?;
        let (cluster, created) = match ClusterFile::read(&runtime, &config.dir)? {
            Some(cluster) => {
                check_same(&cluster, &config)?;
                (cluster, false)
            }
            None => {
                let (data, parity) = config.policy.unwrap_or((4, 2));
                let cluster = ClusterFile::generate(
                    &runtime,
                    config.shards.unwrap_or(4),
                    config.disks.unwrap_or(8),
                    data,
                    parity,
                )?;
                cluster.create(&runtime, &config.dir)?;
                (cluster, true)
            }
        };
        let services = cluster.service_ids()?;
        let system_key = keys::system_key(&runtime, &config.dir.join("keys"))?;
        let keyring = keys::load_or_create(&runtime, &config.dir.join("keys"), &services)?;
        let disks =
            services.iter().enumerate().map(|(n, id)| (*id, config.dir.join("blocks").join(n.to_string())));
        let roles = Roles {
            registry: true,
            cdc: true,
            shards: (0..cluster.shards).collect(),
            disks: disks.collect(),
        };
        let (seam, log_dir) = (runtime.clone(), config.dir.join("log"));
        let options = Options { segment_bytes_max: config.segment_bytes_max, ..Options::default() };
        let engine =
            tokio::task::spawn_blocking(move || LocalEngine::open(&seam, log_dir, options)).await??;
        let node = Node::start(NodeConfig {
            runtime,
            listen: config.listen,
            advertise: None,
            registry: None,
            cluster: cluster.clone(),
            roles,
            logs: Arc::new(engine),
            process_usage: crate::handler::process_usage,
            stores: Arc::new(RocksStores::new(config.dir.join("state"), cluster.shards as usize + 2)),
            engine: "local".into(),
            keyring,
            system_key,
            lifetimes: config.lifetimes,
            clock_skew_ms_max: config.clock_skew_ms_max,
        })
        .await?;
        if let Some(pause) = config.collect_pause {
            let options =
                CollectOptions { requests_per_s: COLLECT_REQUESTS_PER_S, ..CollectOptions::default() };
            // With a name and sessions of its own, so that what it waits for holds up nobody else.
            let client = node.client().sibling();
            node.client().runtime().spawn("collector", collector::run(client, options, pause));
        }
        Ok(Up { node, cluster, created, _lock: lock })
    }

    /// The node that does it all.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Ends cleanly.
    pub async fn stop(self) {
        self.node.stop().await;
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
