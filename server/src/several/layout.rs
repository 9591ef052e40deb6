//! The directory of one node of several, and how those of a new cluster are made.
//!
//! ```text
//! DIR/node.toml        how the node runs; the operator's
//! DIR/node.json        which node of which cluster it is; never changed
//! DIR/cluster.json     what the cluster is made of, the same on all nodes
//! DIR/keys/            the cluster's key and those of all block services, mode 0600
//! DIR/blocks/<n>/      the n-th disk of this node
//! ```
//!
//! and what a node makes itself: `lock`, `chains`, `clock`, `log/` with `identities`, `state/`, and `begun` when it has begun to keep logs.
//!
//! Invariant: a node that has begun does not start without its logs, for a member whose log is gone has forgotten its votes; and one
//! that begins anew under its number, in a directory as it was made at first, is refused by those who have met it before.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use clutch_blocks::label::Label;
use clutch_log::NodeId;
use clutch_proto::ServiceId;
use clutch_runtime::Runtime;
use serde::{Deserialize, Serialize};

use crate::{
    ClusterFile,
    healer::HealSettings,
    joining::{Belongings, Secret},
    keys,
};

/// The layout that this build writes.
const LAYOUT: u32 = 1;
/// Nodes of a new cluster.
pub const NODES_MAX: usize = 7;
/// Disks of one node that is added.
const DISKS_OF_NODE_MAX: u32 = 256;
/// Where a node says which it is.
const NODE_FILE: &str = "node.json";
/// How a node runs.
pub const SETTINGS_FILE: &str = "node.toml";

/// Which node a directory is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeFile {
    layout: u32,
    /// The cluster, in hexadecimal.
    pub cluster: String,
    /// Its number in the cluster.
    pub node: NodeId,
    /// The nodes that the logs' first members are on.
    pub founders: Vec<NodeId>,
    /// Its disks, in hexadecimal: the n-th, counted from 0, lies in `blocks/n`.
    pub disks: Vec<String>,
    /// Whether it was added to a cluster that there was already. Then `cluster.json` does not know its disks, and their keys follow from
    /// the cluster's.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub joined: bool,
}

/// How a node runs, as an operator says.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Where it listens.
    pub listen: String,
    /// What others reach it by; its address among `nodes` when nothing is said.
    pub advertise: Option<String>,
    /// What its disks fail with: blocks of a file are spread over failure domains. The node when nothing is said.
    pub failure_domain: Option<String>,
    /// Where each node of the cluster is, by its number.
    nodes: BTreeMap<String, String>,
    /// A log segment is closed when it is larger than this.
    #[serde(default = "segment_mib")]
    pub segment_mib: u64,
    /// What blocks leave free of the file system of logs and states.
    pub reserve_mib: Option<u64>,
    /// Rest of the collector between two passes; 0 for none.
    #[serde(default = "collect_every_s")]
    pub collect_every_s: u64,
    /// How long a log's leader and members must have been who they are before another node is let lead it, so that nodes lead as many
    /// logs as others; 0 for never.
    #[serde(default = "balance_after_s")]
    pub balance_after_s: u64,
    /// Whether leaders answer reads by what a quorum has promised, without asking it for each.
    #[serde(default)]
    pub lease_reads: bool,
    /// A disk that has not answered for so long is rebuilt elsewhere; 0 for never.
    #[serde(default = "rebuild_after_s")]
    pub rebuild_after_s: u64,
    /// In so long each disk is read through once; 0 for never.
    #[serde(default = "scrub_every_s")]
    pub scrub_every_s: u64,
    /// What the node writes in a second at most so that blocks are where they should be; 0 for no limit.
    #[serde(default = "heal_mib_per_s")]
    pub heal_mib_per_s: u64,
    /// How far apart the cluster's clocks may be.
    #[serde(default = "clock_skew_s")]
    pub clock_skew_s: u64,
    /// Where metrics, health and readiness are asked over HTTP; nowhere when nothing is said.
    pub metrics: Option<String>,
    /// How far back logs can be replayed, for example `12h`; `all` for whole logs.
    pub retain_log: Option<String>,
}

fn segment_mib() -> u64 {
    64
}

fn collect_every_s() -> u64 {
    60
}

/// How long leaders are left where they are when nothing is said.
pub const BALANCE_AFTER_S: u64 = 600;

fn balance_after_s() -> u64 {
    BALANCE_AFTER_S
}

fn rebuild_after_s() -> u64 {
    HealSettings::default().rebuild_after.as_secs()
}

fn scrub_every_s() -> u64 {
    HealSettings::default().scrub_every.as_secs()
}

fn heal_mib_per_s() -> u64 {
    HealSettings::default().bytes_per_s >> 20
}

fn clock_skew_s() -> u64 {
    60
}

/// What a directory says of its node.
pub struct Layout {
    /// The directory.
    pub dir: PathBuf,
    /// Which node.
    pub file: NodeFile,
    /// Of which cluster.
    pub cluster: ClusterFile,
    /// How it runs.
    pub settings: Settings,
    /// Where all nodes are.
    pub nodes: BTreeMap<NodeId, String>,
}

impl Settings {
    fn nodes(&self) -> Result<BTreeMap<NodeId, String>> {
        let mut nodes = BTreeMap::new();
        for (number, address) in &self.nodes {
            let node = number.parse().ok().filter(|node: &NodeId| *node > 0);
            let node = node.with_context(|| {
                format!("[nodes]: {number:?} is not the number of a node; settings go above [nodes]")
            })?;
            check_reached(address).with_context(|| format!("[nodes]: node {node}"))?;
            ensure!(nodes.insert(node, address.clone()).is_none(), "[nodes]: node {node} is there twice");
        }
        Ok(nodes)
    }

    /// How the node looks after what is stored.
    pub fn heal(&self) -> HealSettings {
        HealSettings {
            rebuild_after: Duration::from_secs(self.rebuild_after_s),
            scrub_every: Duration::from_secs(self.scrub_every_s),
            bytes_per_s: self.heal_mib_per_s << 20,
            ..HealSettings::default()
        }
    }

    fn check(&self) -> Result<()> {
        check_address(&self.listen).context("listen")?;
        if let Some(address) = &self.metrics {
            check_address(address).context("metrics")?;
            ensure!(*address != self.listen, "metrics = {address:?} is what it listens on: say another port");
        }
        if let Some(address) = &self.advertise {
            check_reached(address).context("advertise")?;
        }
        let within = |what: &str, value: u64, least: u64, most: u64| {
            ensure!((least..=most).contains(&value), "{what} = {value}: {least} to {most} are allowed");
            Ok(())
        };
        within("segment_mib", self.segment_mib, 1, 4096)?;
        within("reserve_mib", self.reserve_mib.unwrap_or(0), 0, 1 << 20)?;
        within("collect_every_s", self.collect_every_s, 0, 31_536_000)?;
        within("balance_after_s", self.balance_after_s, 0, 31_536_000)?;
        within("rebuild_after_s", self.rebuild_after_s, 0, 31_536_000)?;
        within("scrub_every_s", self.scrub_every_s, 0, 315_360_000)?;
        within("heal_mib_per_s", self.heal_mib_per_s, 0, 1 << 20)?;
        within("clock_skew_s", self.clock_skew_s, 0, 3600)?;
        let domain = self.failure_domain.as_deref();
        ensure!(domain.is_none_or(|domain| !domain.trim().is_empty()), "failure_domain must not be empty");
        Ok(())
    }
}

fn check_address(address: &str) -> Result<()> {
    let (host, port) = address.rsplit_once(':').unwrap_or_default();
    let is_plain = address.len() <= 255 && address.bytes().all(|byte| byte.is_ascii_graphic());
    let is_host = !host.is_empty() && (!host.contains(':') || host.starts_with('[') && host.ends_with(']'));
    ensure!(
        is_host && is_plain && !host.contains(',') && port.parse::<u16>().is_ok_and(|port| port > 0),
        "{address:?} is no address: write HOST:PORT, for example 127.0.0.1:7400 or [::1]:7400"
    );
    Ok(())
}

/// The same, by which others reach a node.
fn check_reached(address: &str) -> Result<()> {
    check_address(address)?;
    let host = address.rsplit_once(':').map_or("", |(host, _)| host);
    ensure!(
        !["0.0.0.0", "[::]", "*"].contains(&host),
        "nobody reaches a node by {address:?}: name the machine, and let the node listen on that in its node.toml"
    );
    Ok(())
}

impl Layout {
    /// Reads the directory in which a `node.toml` lies.
    ///
    /// # Errors
    /// When something is missing, damaged, or does not belong together; it says what to do.
    pub fn read(runtime: &Runtime, settings: &Path) -> Result<Layout> {
        let path = match settings.is_dir() {
            true => settings.join(SETTINGS_FILE),
            false => settings.to_owned(),
        };
        let text = fs::read_to_string(&path).with_context(|| {
            format!("read {}: name the node.toml of a node (clutch cluster init makes them)", path.display())
        })?;
        let settings: Settings = toml::from_str(&text).map_err(|error| {
            let line = error.span().map_or(0, |span| text[..span.start].lines().count().max(1));
            let said = text.lines().nth(line.saturating_sub(1)).unwrap_or_default().trim();
            anyhow::anyhow!(
                "{} is not as it should be: line {line} ({said}): {}",
                path.display(),
                error.message()
            )
        })?;
        settings.check().with_context(|| format!("{} is not as it should be", path.display()))?;
        let nodes = settings.nodes().with_context(|| format!("{} is not as it should be", path.display()))?;
        let dir = std::path::absolute(&path)?.parent().unwrap_or(Path::new("/")).to_owned();
        let of_node = dir.join(NODE_FILE);
        let bytes = fs::read(&of_node).with_context(|| {
            format!(
                "read {}: without it this is no node any more. Restore it from a copy; if the disk was lost, all of the node \
                 was, and it must not come back under its number",
                of_node.display()
            )
        })?;
        let file: NodeFile = serde_json::from_slice(&bytes)
            .with_context(|| format!("{} is damaged; restore it from a copy", of_node.display()))?;
        ensure!(
            file.layout == LAYOUT,
            "{}: layout {} is not known to this build, which knows {LAYOUT}",
            of_node.display(),
            file.layout
        );
        let cluster = ClusterFile::read(runtime, &dir)?.with_context(|| {
            format!("{} is missing; copy it from another node", dir.join("cluster.json").display())
        })?;
        ensure!(
            cluster.cluster == file.cluster,
            "{} is of cluster {}, and node.json of {}: put back the ones that belong together",
            dir.join("cluster.json").display(),
            cluster.cluster,
            file.cluster
        );
        let layout = Layout { dir, file, cluster, settings, nodes };
        layout.check()?;
        Ok(layout)
    }

    fn check(&self) -> Result<()> {
        let missing = self.file.founders.iter().find(|node| !self.nodes.contains_key(node));
        if let Some(node) = missing {
            bail!("node.toml: [nodes] does not say where node {node} is, which keeps logs of this cluster");
        }
        check_reached(&self.advertised()).with_context(|| {
            format!("node.toml: where is node {}? Say it in [nodes], or by advertise", self.file.node)
        })?;
        let known: BTreeSet<&String> = self.cluster.disks.iter().collect();
        ensure!(
            self.file.joined || self.file.disks.iter().all(|disk| known.contains(disk)),
            "node.json names disks that cluster.json does not: put back the ones that belong together"
        );
        Ok(())
    }

    /// What a new node of the cluster is handed over from this one.
    ///
    /// # Errors
    /// When the keys cannot be read.
    pub fn belongings(&self) -> Result<Belongings> {
        let (cluster, founders) = (self.cluster.clone(), self.file.founders.clone());
        let keys = keys::texts(&self.dir.join("keys"))?;
        Ok(Belongings::new(cluster, founders, self.nodes.clone(), keys))
    }

    /// What others reach the node by.
    pub fn advertised(&self) -> String {
        let said = self.settings.advertise.clone();
        said.or_else(|| self.nodes.get(&self.file.node).cloned())
            .unwrap_or_else(|| self.settings.listen.clone())
    }

    /// Its disks: service ids and where they lie.
    pub fn disks(&self) -> Result<Vec<(u64, PathBuf)>> {
        let place = |(number, id): (usize, &String)| {
            let id = u64::from_str_radix(id, 16).context("node.json: a disk's id is not hexadecimal")?;
            Ok((id, self.dir.join("blocks").join(number.to_string())))
        };
        self.file.disks.iter().enumerate().map(place).collect()
    }
}

/// A cluster that is to be made.
#[derive(Clone, Debug)]
pub struct NewCluster {
    /// Its nodes' directories are made in here: `n1`, `n2` and so on.
    pub dir: PathBuf,
    /// Where the nodes will listen; node 1 first.
    pub nodes: Vec<String>,
    /// Metadata shards.
    pub shards: u32,
    /// Disks, spread over the nodes.
    pub disks: u32,
    /// Data and parity blocks.
    pub policy: (u32, u32),
}

impl NewCluster {
    /// Makes the directories of all nodes, durably: all, or none.
    ///
    /// # Errors
    /// When the numbers are not allowed, or the directory is not empty.
    pub fn create(&self, runtime: &Runtime) -> Result<ClusterFile> {
        ensure!(
            (1..=NODES_MAX).contains(&self.nodes.len()),
            "{} nodes: 1 to {NODES_MAX} are allowed; three bear the loss of one, five of two",
            self.nodes.len()
        );
        self.nodes.iter().try_for_each(|address| check_reached(address))?;
        let distinct: BTreeSet<&String> = self.nodes.iter().collect();
        ensure!(distinct.len() == self.nodes.len(), "two nodes have the same address");
        let (data, parity) = self.policy;
        let cluster = ClusterFile::generate(runtime, self.shards, self.disks, data, parity)?;
        let dir = empty_directory(&self.dir)?;
        let parent = dir.parent().context("the root directory is none for a cluster")?;
        runtime.disk.create_dir_all(parent)?;
        let name = dir.file_name().context("the root directory is none for a cluster")?;
        let made = parent.join(format!(".{}.clutch-init", name.to_string_lossy()));
        if made.exists() {
            // What an earlier creation did not come to the end of: nobody has used it.
            fs::remove_dir_all(&made).with_context(|| format!("remove {}", made.display()))?;
        }
        for number in 1..=self.nodes.len() {
            self.create_node(runtime, &made, &cluster, number)
                .with_context(|| format!("make the directory of node {number}"))?;
        }
        if dir.exists() {
            fs::remove_dir(&dir)?;
        }
        fs::rename(&made, &dir).with_context(|| format!("name {}", dir.display()))?;
        runtime.disk.sync_dir(parent)?;
        Ok(cluster)
    }

    /// The disks of a node: the n-th disk belongs to the n-th node, and around again.
    fn disks_of(&self, cluster: &ClusterFile, number: usize) -> Vec<String> {
        let count = self.nodes.len();
        cluster.disks.iter().skip(number - 1).step_by(count).cloned().collect()
    }

    fn create_node(
        &self,
        runtime: &Runtime,
        made: &Path,
        cluster: &ClusterFile,
        number: usize,
    ) -> Result<()> {
        let dir = made.join(format!("n{number}"));
        let disk = &*runtime.disk;
        disk.create_dir_all(&dir)?;
        let keys = dir.join("keys");
        match number {
            1 => {
                keys::system_key(runtime, &keys)?;
                keys::load_or_create(runtime, &keys, &cluster.service_ids()?)?;
            }
            _ => {
                write_keys(runtime, &keys::texts(&made.join("n1").join("keys"))?, &keys)?;
            }
        }
        let file = NodeFile {
            layout: LAYOUT,
            cluster: cluster.cluster.clone(),
            node: number as NodeId,
            founders: (1..=self.nodes.len() as NodeId).collect(),
            disks: self.disks_of(cluster, number),
            joined: false,
        };
        let nodes = (1..).zip(self.nodes.iter().cloned()).collect();
        write_node(runtime, &dir, cluster, &file, &settings_text(file.node, &nodes))?;
        disk.sync_dir(made)?;
        Ok(())
    }
}

/// A node that is to be added to a cluster that there is.
#[derive(Clone, Debug)]
pub struct NewNode {
    /// Its directory, which must be empty or not be there.
    pub dir: PathBuf,
    /// What all nodes of its cluster know.
    pub belongings: Belongings,
    /// Its number: one that no node ever had.
    pub node: NodeId,
    /// All nodes, and where they are; the new one among them.
    pub nodes: BTreeMap<NodeId, String>,
    /// Disks that it brings.
    pub disks: u32,
}

impl NewNode {
    /// Checks what does not depend on the cluster.
    ///
    /// # Errors
    /// When the directory is not empty, or an address or a number is not allowed.
    pub fn check(dir: &Path, address: &str, disks: u32) -> Result<()> {
        check_reached(address)?;
        ensure!(disks <= DISKS_OF_NODE_MAX, "{disks} disks: up to {DISKS_OF_NODE_MAX} are allowed");
        empty_directory(dir).map(drop)
    }

    /// Makes the directory, still empty, that becomes the node's when it is whole; both. So what would fail for want of room or of a right
    /// fails before the cluster is asked for anything.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn prepare(runtime: &Runtime, dir: &Path) -> Result<(PathBuf, PathBuf)> {
        let dir = empty_directory(dir)?;
        let parent = dir.parent().context("the root directory is none for a node")?;
        let name = dir.file_name().context("the root directory is none for a node")?;
        runtime.disk.create_dir_all(parent).with_context(|| format!("make {}", parent.display()))?;
        let made = parent.join(format!(".{}.clutch-join", name.to_string_lossy()));
        if made.exists() {
            // What an earlier creation did not come to the end of: nobody has used it.
            fs::remove_dir_all(&made).with_context(|| format!("remove {}", made.display()))?;
        }
        runtime.disk.create_dir_all(&made).with_context(|| format!("make {}", made.display()))?;
        Ok((dir, made))
    }

    /// Makes its directory, durably, or nothing.
    ///
    /// # Errors
    /// When the directory is not empty, or what was handed over is not as it should be.
    pub fn create(&self, runtime: &Runtime) -> Result<NodeFile> {
        let own = self.nodes.get(&self.node).context("nobody says where the new node is")?;
        NewNode::check(&self.dir, own, self.disks)?;
        self.nodes.values().try_for_each(|address| check_reached(address))?;
        let of = &self.belongings;
        of.cluster.check().context("what the cluster hands over")?;
        let (dir, made) = NewNode::prepare(runtime, &self.dir)?;
        write_keys(runtime, &of.keys, &made.join("keys"))?;
        let file = NodeFile {
            layout: LAYOUT,
            cluster: of.cluster.cluster.clone(),
            node: self.node,
            founders: of.founders.clone(),
            disks: (0..self.disks).map(|_| format!("{:016x}", runtime.random.u64().max(1))).collect(),
            joined: true,
        };
        write_node(runtime, &made, &of.cluster, &file, &settings_text(self.node, &self.nodes))?;
        if dir.exists() {
            fs::remove_dir(&dir)?;
        }
        fs::rename(&made, &dir).with_context(|| format!("name {}", dir.display()))?;
        runtime.disk.sync_dir(dir.parent().unwrap_or(Path::new("/")))?;
        Ok(file)
    }
}

/// A directory that is empty or not there, as an absolute path.
fn empty_directory(dir: &Path) -> Result<PathBuf> {
    let dir = std::path::absolute(dir)?;
    let is_empty = || fs::read_dir(&dir).is_ok_and(|mut names| names.next().is_none());
    ensure!(
        !dir.exists() || is_empty(),
        "{} exists and is not empty; choose another directory",
        dir.display()
    );
    Ok(dir)
}

/// What is in the directory of a node beside its keys.
fn write_node(
    runtime: &Runtime,
    dir: &Path,
    cluster: &ClusterFile,
    file: &NodeFile,
    settings: &str,
) -> Result<()> {
    let disk = &*runtime.disk;
    for (n, id) in file.disks.iter().enumerate() {
        let service = ServiceId(u64::from_str_radix(id, 16).context("made as hexadecimal")?);
        let label = Label { cluster: cluster.cluster_id()?, service, created: runtime.clock.now() };
        label.write(disk, &dir.join("blocks").join(n.to_string()))?;
    }
    disk.create_dir_all(&dir.join("log"))?;
    disk.create_dir_all(&dir.join("state"))?;
    disk.replace(&dir.join(NODE_FILE), &serde_json::to_vec_pretty(file)?)?;
    disk.replace(&dir.join(SETTINGS_FILE), settings.as_bytes())?;
    disk.replace(&dir.join("cluster.json"), &serde_json::to_vec_pretty(cluster)?)?;
    disk.sync_dir(dir)?;
    Ok(())
}

/// A `node.toml` to begin with.
fn settings_text(number: NodeId, nodes: &BTreeMap<NodeId, String>) -> String {
    let mut text = format!(
        "# How node {number} runs: clutch node --config {SETTINGS_FILE}\n\n\
             # Where it listens; on another machine perhaps 0.0.0.0 and the port.\n\
             listen = \"{}\"\n\n\
             # Blocks of a file are spread over failure domains: say the rack where machines of one fail together.\n\
             #failure_domain = \"{number}\"\n\n\
             # Everything else, with what holds when nothing is said:\n\
             #advertise = \"HOST:PORT\"   # what others reach it by: its address below\n\
             #metrics = \"HOST:PORT\"   # where metrics, health and readiness are asked over HTTP\n\
             #segment_mib = {}\n\
             #reserve_mib = 1024          # a sixteenth of the file system, and at most this\n\
             #collect_every_s = {}\n\
             #balance_after_s = {}       # leaders are spread over nodes when nothing has changed for so long; 0 for never\n\
             #rebuild_after_s = {}       # a disk that has not answered for so long is rebuilt elsewhere; 0 for never\n\
             #scrub_every_s = {}     # in so long each disk is read through once; 0 for never\n\
             #heal_mib_per_s = {}         # what is written for both in a second at most; 0 for no limit\n\
             #clock_skew_s = {}\n\
             #lease_reads = false         # reads by what a quorum has promised, without asking it for each\n\
             #retain_log = \"all\"         # or an age, for example \"7d\"\n\n\
             # Where the nodes of the cluster are, the same on all of them.\n\
             [nodes]\n",
        nodes.get(&number).map_or("", String::as_str),
        segment_mib(),
        collect_every_s(),
        balance_after_s(),
        rebuild_after_s(),
        scrub_every_s(),
        heal_mib_per_s(),
        clock_skew_s(),
    );
    for (number, address) in nodes {
        text += &format!("{number} = \"{address}\"\n");
    }
    text
}

/// The same keys for another node.
fn write_keys(runtime: &Runtime, all: &BTreeMap<String, Secret>, to: &Path) -> Result<()> {
    let disk = &*runtime.disk;
    disk.create_dir_all(to)?;
    fs::set_permissions(to, fs::Permissions::from_mode(0o700))?;
    for (name, Secret(text)) in all {
        keys::store(to, name, text)?;
    }
    disk.sync_dir(to)?;
    Ok(())
}
