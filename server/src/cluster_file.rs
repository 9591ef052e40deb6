//! `cluster.json`: what a directory holds. Written once, when `up` makes the directory.

use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use clutch_log::LogId;
use clutch_proto::limits::{DATA_BLOCKS_MAX, PARITY_BLOCKS_MAX, SHARDS_MAX};
use clutch_runtime::Runtime;
use serde::{Deserialize, Serialize};

/// The newest version of a directory's layout that this build knows: small blocks are packed. A directory is raised to it when the first
/// of them is written, and until then the build before can be gone back to.
pub const LAYOUT: u32 = 4;
/// What a new directory has: each block in a file of its own.
const LAYOUT_OF_FILES: u32 = 3;
/// Disks of one directory.
pub const DISKS_MAX: u32 = 4096;

/// A cluster that lives in one directory.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct ClusterFile {
    /// Layout of the directory.
    pub layout: u32,
    /// Random id of the cluster, in hexadecimal.
    pub cluster: String,
    /// Metadata shards; a power of two.
    pub shards: u32,
    /// Data blocks of a new file's spans.
    pub data_blocks: u32,
    /// Parity blocks of a new file's spans.
    pub parity_blocks: u32,
    /// Block service ids in hexadecimal; disk n is the n-th, counted from 0.
    pub disks: Vec<String>,
}

impl ClusterFile {
    /// A new cluster with random ids.
    pub fn generate(
        runtime: &Runtime,
        shards: u32,
        disks: u32,
        data_blocks: u32,
        parity_blocks: u32,
    ) -> Result<ClusterFile> {
        let id = || format!("{:016x}", runtime.random.u64().max(1));
        let file = ClusterFile {
            layout: LAYOUT_OF_FILES,
            cluster: id(),
            shards,
            data_blocks,
            parity_blocks,
            disks: (0..disks).map(|_| id()).collect(),
        };
        file.check()?;
        Ok(file)
    }

    /// Checks the numbers against the limits.
    pub fn check(&self) -> Result<()> {
        ensure!(
            (LAYOUT_OF_FILES..=LAYOUT).contains(&self.layout),
            "layout {} is not known to this build, which knows {LAYOUT}: with the build that made the directory, copy the \
             files out (clutch fs get -r), then put them into a new directory",
            self.layout
        );
        ensure!(
            self.shards.is_power_of_two() && self.shards <= SHARDS_MAX,
            "{} shards: a power of two from 1 to {SHARDS_MAX} is allowed",
            self.shards
        );
        ensure!(
            (1..=DATA_BLOCKS_MAX).contains(&self.data_blocks) && self.parity_blocks <= PARITY_BLOCKS_MAX,
            "policy {}+{}: 1 to {DATA_BLOCKS_MAX} data and up to {PARITY_BLOCKS_MAX} parity blocks are allowed",
            self.data_blocks,
            self.parity_blocks
        );
        ensure!((1..=DISKS_MAX as usize).contains(&self.disks.len()), "1 to {DISKS_MAX} disks are allowed");
        self.cluster_id()?;
        self.service_ids().map(drop)
    }

    /// Takes note, durably, that small blocks of a directory are packed: an older build would not find them, and must not start there.
    pub fn raise(runtime: &Runtime, dir: &Path) -> Result<()> {
        let file = ClusterFile::read(runtime, dir)?;
        let file = file.with_context(|| format!("{} is missing", dir.join("cluster.json").display()))?;
        if file.layout == LAYOUT {
            return Ok(());
        }
        let raised = serde_json::to_vec_pretty(&ClusterFile { layout: LAYOUT, ..file })?;
        runtime.disk.replace(&dir.join("cluster.json"), &raised).context("write cluster.json")
    }

    /// The cluster's id.
    pub fn cluster_id(&self) -> Result<u64> {
        u64::from_str_radix(&self.cluster, 16).context("the cluster's id is not hexadecimal")
    }

    /// The logs of all roles.
    pub fn logs(&self) -> Vec<LogId> {
        let shards = (0..self.shards).map(LogId::shard);
        [LogId::REGISTRY, LogId::CDC].into_iter().chain(shards).collect()
    }

    /// The disks' service ids.
    pub fn service_ids(&self) -> Result<Vec<u64>> {
        let ids: Result<Vec<u64>, _> = self.disks.iter().map(|d| u64::from_str_radix(d, 16)).collect();
        let ids = ids.context("a disk's id is not hexadecimal")?;
        let distinct: std::collections::BTreeSet<_> = ids.iter().collect();
        ensure!(distinct.len() == ids.len() && !ids.contains(&0), "two disks have the same id");
        Ok(ids)
    }

    /// Reads the file of a directory; `None` when there is none.
    pub fn read(runtime: &Runtime, dir: &Path) -> Result<Option<ClusterFile>> {
        let path = dir.join("cluster.json");
        if !runtime.disk.exists(&path) {
            return Ok(None);
        }
        let bytes = runtime.disk.read(&path).context("read cluster.json")?;
        let file: ClusterFile = serde_json::from_slice(&bytes)
            .with_context(|| format!("{} is damaged; restore it from a copy", path.display()))?;
        file.check().with_context(|| format!("{} is not valid", path.display()))?;
        Ok(Some(file))
    }

    /// Writes the file, durably, as the last thing after `prepare` has made what belongs to a cluster. A directory with
    /// foreign files in it is refused; what a creation left that did not come to its end is removed.
    pub fn create(
        &self,
        runtime: &Runtime,
        dir: &Path,
        prepare: &dyn Fn(&ClusterFile) -> Result<()>,
    ) -> Result<()> {
        runtime.disk.create_dir_all(dir)?;
        remove_interrupted(dir)?;
        let foreign: Vec<String> = runtime
            .disk
            .list(dir)?
            .into_iter()
            .filter(|n| n != "lock" && n != "keys" && n != "cluster.new" && n != LOST_AND_FOUND)
            // Where file systems of their own wait for them, or for disks, there may be empty ones.
            .filter(|n| !(PARTS.contains(&n.as_str()) && holds_nothing(&dir.join(n))))
            .collect();
        if let Some(name) = PARTS.iter().find(|name| foreign.iter().any(|f| f == *name)) {
            bail!(
                "{} is missing, but {} is there: this was a cluster. Restore cluster.json from a copy; without it nothing \
                 can be started. If it never was one, choose another directory",
                dir.join("cluster.json").display(),
                dir.join(name).display()
            );
        }
        if let Some(name) = foreign.first() {
            bail!(
                "{} is not a Clutch directory and not empty (it has {name:?}); choose another",
                dir.display()
            );
        }
        prepare(self)?;
        runtime
            .disk
            .replace(&dir.join("cluster.json"), &serde_json::to_vec_pretty(self)?)
            .context("write cluster.json")
    }
}

/// Directories that only a cluster has something in.
const PARTS: [&str; 3] = ["log", "state", "blocks"];
/// What some file systems have in their first directory.
const LOST_AND_FOUND: &str = "lost+found";

/// Whether a directory has nothing in it; what cannot be read is not taken for empty.
fn is_empty(dir: &Path) -> bool {
    std::fs::read_dir(dir)
        .is_ok_and(|mut names| names.all(|name| name.is_ok_and(|name| name.file_name() == LOST_AND_FOUND)))
}

/// Whether a directory has nothing in it but empty directories.
fn holds_nothing(dir: &Path) -> bool {
    let is_nothing = |entry: std::io::Result<std::fs::DirEntry>| {
        entry.is_ok_and(|entry| entry.file_name() == LOST_AND_FOUND || is_empty(&entry.path()))
    };
    std::fs::read_dir(dir).is_ok_and(|mut entries| entries.all(is_nothing))
}

/// Removes a disk's label, and the directory unless a file system is mounted there.
fn remove_or_empty(dir: &Path) -> Result<()> {
    for name in [clutch_blocks::label::LABEL_FILE, "label.new"] {
        match std::fs::remove_file(dir.join(name)) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            removed => removed.with_context(|| format!("remove {}", dir.join(name).display()))?,
        }
    }
    match std::fs::remove_dir(dir) {
        Err(_) if is_empty(dir) => Ok(()),
        removed => removed.with_context(|| format!("remove {}", dir.display())),
    }
}

/// Removes the disks that a creation made which did not come to its end: labels and nothing else.
fn remove_interrupted(dir: &Path) -> Result<()> {
    let blocks = dir.join("blocks");
    let has = |name: &str| dir.join(name).exists() && !is_empty(&dir.join(name));
    if !blocks.is_dir() || has("log") || has("state") {
        return Ok(());
    }
    let mut disks = Vec::new();
    for disk in std::fs::read_dir(&blocks)? {
        let disk = disk?.path();
        if disk.file_name().is_some_and(|name| name == LOST_AND_FOUND) {
            continue;
        }
        let names: Vec<_> =
            std::fs::read_dir(&disk)?.filter_map(|entry| Some(entry.ok()?.file_name())).collect();
        let known = [clutch_blocks::label::LABEL_FILE, "label.new", LOST_AND_FOUND];
        if names.iter().any(|name| known.iter().all(|known| name != known)) {
            return Ok(());
        }
        disks.push(disk);
    }
    for disk in disks {
        remove_or_empty(&disk)?;
    }
    match std::fs::remove_dir(&blocks) {
        // Mounted, or with what file systems have of their own.
        Err(_) if holds_nothing(&blocks) => Ok(()),
        removed => removed.with_context(|| format!("remove {}", blocks.display())),
    }
}
