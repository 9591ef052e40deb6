//! Clusters whose nodes look after what is stored, and disks to which one thing after the other happens: they are exchanged for empty
//! ones, come back as they were an hour ago, rot, are away for long, or are to be emptied; all while files are written and read.
//!
//! Within a bounded time after each, without anybody who asks for it: every block of every file is where it should be and as it was
//! written; disks that are to be emptied hold nothing, those that were away are used again. At the end every file has its bytes.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use clutch_client::Client;
use clutch_client_maintenance::{
    fsck,
    heal::{self, HealOptions, Healed, Lost, Pace},
};
use clutch_proto::{
    InodeId,
    registry::{SetServiceFlags, registry_request},
};
use clutch_server::healer::HealSettings;
use clutch_shard::{FLAG_CONDEMNED, FLAG_DRAIN, FLAG_NO_WRITE};
use parking_lot::Mutex;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};

use crate::{
    history::{Data, bytes_of},
    sim_cluster::{CLIENT, ClusterConfig, SimCluster, disk_node},
    workload::attributes,
};

/// Two more than a span needs, or none.
const DISKS: [u32; 2] = [6, 4];
/// Directories, which lie in slots of all shards.
const DIRECTORIES: usize = 6;
const POLICY: (u32, u32) = (2, 2);
/// Faults of one cluster, one after the other.
const ROUNDS: u32 = 4;
/// Within this everything is as it should be again.
const HEALED_WITHIN: Duration = Duration::from_secs(400);
const REBUILD_AFTER: Duration = Duration::from_secs(20);
/// A file gets its name so many times so long after a disk is to be emptied: by then that was found empty.
const WAITS: u32 = 5;
const WAIT: Duration = Duration::from_secs(2);
/// Bytes of it that are written before, and each time.
const BEGUN: usize = 100_000;
const MORE: usize = 3000;
/// Longer than until a disk that is away is rebuilt, and shorter.
const AWAY: [u64; 2] = [90, 8];

/// What happens to a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    /// An empty one is labelled in its place.
    Exchanged,
    /// It is as it was when the round began.
    OfThePast,
    /// Bits flip all over it.
    Rots,
    /// The same, and its node is started again before all of it can have been written anew.
    ExchangedAndRestarted,
    /// Its node is down for so many seconds.
    Away(u64),
    /// Nobody hears its node for so many seconds.
    Silent(u64),
    /// An operator lets it be emptied, and used again when it is.
    Emptied,
}

/// The files that were acknowledged, by their directories and names.
type Files = Arc<Mutex<BTreeMap<(InodeId, String), Data>>>;

struct Trial {
    cluster: SimCluster,
    client: Client,
    files: Files,
    directories: Vec<InodeId>,
    disks: u32,
    rng: StdRng,
    /// Whether disks are read through by themselves.
    scrubs: bool,
}

type Outcome<T> = Result<T, String>;

fn said(error: impl ToString) -> String {
    error.to_string()
}

/// Writes files until it is told to stop. What is not acknowledged may be there or not.
async fn write(
    client: Client,
    directories: Vec<InodeId>,
    files: Files,
    (round, salt): (u32, u64),
    stop: Arc<AtomicBool>,
) {
    let mut number: u32 = 0;
    while !stop.load(Ordering::Relaxed) {
        let sizes = [3000, 20_000, 70_000, 400_000];
        let data = Data { salt: salt + u64::from(number) + 1, bytes: sizes[number as usize % sizes.len()] };
        let name = format!("r{round}-{number}");
        let (bytes, name_bytes) = (bytes_of(data), Bytes::from(name.clone()));
        let dir = directories[number as usize % directories.len()];
        let written = client.write_file(dir, &name_bytes, attributes(), true, &mut &bytes[..]).await;
        if written.is_ok() {
            files.lock().insert((dir, name), data);
        }
        number += 1;
        client.runtime().clock.sleep(Duration::from_millis(400)).await;
    }
}

async fn read_all(client: &Client, files: &Files) -> Outcome<()> {
    let all: Vec<_> = files.lock().iter().map(|(at, data)| (at.clone(), *data)).collect();
    for ((dir, name), data) in all {
        let found = client.lookup(dir, &Bytes::from(name.clone())).await.map_err(said)?;
        let id = InodeId::from_wire(found.target).ok_or("no inode")?;
        let mut read = Vec::new();
        let mut sink = |part: Bytes| {
            read.extend_from_slice(&part);
            Ok(())
        };
        let done = client.read_file(id, &mut sink).await;
        done.map_err(|error| format!("{name} cannot be read: {error}"))?;
        if read != bytes_of(data) {
            return Err(format!("{name} has other bytes"));
        }
    }
    Ok(())
}

async fn set_flags(client: &Client, service_id: u64, flags: u32) -> Outcome<()> {
    let op = SetServiceFlags { service_id, flags };
    client.registry(registry_request::Op::SetServiceFlags(op)).await.map(drop).map_err(said)
}

/// Waits until all blocks are there and good and no disk is condemned; what is wrong when that does not come.
async fn healed(client: &Client) -> Outcome<Healed> {
    let clock = client.runtime().clock.clone();
    let end = clock.monotonic() + HEALED_WITHIN;
    loop {
        let map = client.refresh_map().await.map_err(said)?;
        let condemned = map.services.iter().filter(|service| service.flags & FLAG_CONDEMNED != 0).count();
        let options = HealOptions { check: true, concurrency: 8, ..HealOptions::default() };
        let lost = Lost { emptied: heal::to_be_emptied(&map), ..Lost::default() };
        let looked = heal::pass(client, &lost, options, &Pace::of(0), &mut |_| {}).await;
        let looked = looked.map_err(said)?;
        if looked.is_whole() && condemned == 0 {
            return Ok(looked);
        }
        if clock.monotonic() > end {
            let failures = &looked.failures[..looked.failures.len().min(3)];
            return Err(format!(
                "after {} s {condemned} disks are condemned, {} spans lack blocks and {} cannot be read: {failures:?}",
                HEALED_WITHIN.as_secs(),
                looked.reduced + looked.none,
                looked.unreadable
            ));
        }
        clock.sleep(Duration::from_secs(5)).await;
    }
}

/// Directories in which files are written. The oldest ones are removed, and still there as what once was.
async fn make_directories(client: &Client) -> Outcome<Vec<InodeId>> {
    let mut made = Vec::new();
    for number in 0..2 * DIRECTORIES {
        let name = Bytes::from(format!("d{number}"));
        made.push(client.make_directory(InodeId::ROOT, &name, attributes()).await.map_err(said)?.id);
    }
    for number in 0..DIRECTORIES {
        let at = client.resolve(format!("/d{number}")).await.map_err(said)?;
        client.remove_directory(&at).await.map_err(said)?;
    }
    Ok(made.split_off(DIRECTORIES))
}

impl Trial {
    fn run<T: Send + 'static>(&self, part: impl Future<Output = Outcome<T>> + Send + 'static) -> Outcome<T> {
        let ended = self.cluster.world.run(CLIENT, Duration::from_secs(2000), part);
        ended.ok_or("it does not come to an end")?
    }

    fn wait(&self, seconds: u64) -> Outcome<()> {
        let clock = self.client.runtime().clock.clone();
        self.run(async move {
            clock.sleep(Duration::from_secs(seconds)).await;
            Ok(())
        })
    }

    fn draw(&mut self) -> Trouble {
        // What rots and is never read is nobody's to find.
        let rots = if self.scrubs { Trouble::Rots } else { Trouble::Exchanged };
        let away = AWAY[self.rng.random_range(0..AWAY.len())];
        let mut all = vec![Trouble::Exchanged, Trouble::ExchangedAndRestarted, Trouble::OfThePast, rots];
        all.extend([Trouble::Away(away), Trouble::Silent(away)]);
        // Where there is nowhere to go nothing can be emptied.
        all.extend((self.disks > POLICY.0 + POLICY.1).then_some(Trouble::Emptied));
        *all.choose(&mut self.rng).expect("some")
    }

    fn flip_bits(&mut self, disk: u32) {
        let disk = self.cluster.world.disk(disk_node(disk));
        let is_of_blocks = |path: &PathBuf| {
            path.starts_with("disk") && !["label", "scrub", "index"].iter().any(|name| path.ends_with(name))
        };
        let files: Vec<_> = disk.files().into_iter().filter(|(path, _)| is_of_blocks(path)).collect();
        for _ in 0..20 {
            let Some((path, length)) = files.choose(&mut self.rng) else { return };
            disk.corrupt(path, self.rng.random_range(0..*length.max(&1)), 1 << self.rng.random_range(0..8));
        }
    }

    /// One thing happens to a disk while files are written.
    fn strike(&mut self, round: u32, trouble: Trouble) -> Outcome<()> {
        let disk = self.rng.random_range(0..self.disks);
        let (node, world) = (disk_node(disk), self.cluster.world.clone());
        let before = world.disk(node).copy();
        let stop = Arc::new(AtomicBool::new(false));
        let (client, files, stopped) = (self.client.clone(), self.files.clone(), stop.clone());
        let salt = self.rng.random_range(0..1_u64 << 40);
        let writes = write(client, self.directories.clone(), files, (round, salt), stopped);
        self.client.runtime().spawn("writes", writes);
        self.wait(10)?;
        match trouble {
            Trouble::Exchanged | Trouble::ExchangedAndRestarted => {
                world.crash(node);
                world.disk(node).wipe();
                self.cluster.label(disk);
                self.cluster.boot(node);
                if trouble == Trouble::ExchangedAndRestarted {
                    self.wait(2)?;
                    world.crash(node);
                    self.cluster.boot(node);
                }
            }
            Trouble::OfThePast => {
                world.crash(node);
                drop(world.disk(node).mount(before));
                // One that had no label yet gets one as a new disk does.
                if !self.cluster.is_labelled(disk) {
                    self.cluster.label(disk);
                }
                self.cluster.boot(node);
            }
            Trouble::Rots => self.flip_bits(disk),
            Trouble::Away(seconds) => {
                world.crash(node);
                self.wait(seconds)?;
                self.cluster.boot(node);
            }
            Trouble::Silent(seconds) => {
                self.silence(disk, true);
                self.wait(seconds)?;
                self.silence(disk, false);
            }
            Trouble::Emptied => {
                // It takes blocks again in between.
                self.empty(disk)?;
                self.wait(15)?;
                self.empty(disk)?;
            }
        }
        self.wait(10)?;
        stop.store(true, Ordering::Relaxed);
        // What is being written has come to its end by then.
        self.wait(20)?;
        let (client, files) = (self.client.clone(), self.files.clone());
        self.run(async move { read_all(&client, &files).await })?;
        let client = self.client.clone();
        self.run(async move { healed(&client).await }).map(drop)
    }

    /// Nobody hears the node of a disk, nor it anybody; or all do again.
    fn silence(&self, disk: u32, is_silent: bool) {
        let logs = self.cluster.log_ids().into_iter().flat_map(|log| self.cluster.members(log));
        let disks = (0..self.disks).filter(|other| *other != disk).map(disk_node);
        for other in logs.chain(disks).chain([CLIENT]) {
            self.cluster.world.set_blocked(disk_node(disk), other, is_silent);
            self.cluster.world.set_blocked(other, disk_node(disk), is_silent);
        }
    }

    /// Lets a disk be emptied while a file is written that has blocks on it, and whose name comes late.
    fn empty(&self, disk: u32) -> Outcome<()> {
        let (client, files, dir) = (self.client.clone(), self.files.clone(), self.directories[0]);
        let service = self.cluster.service_ids()[disk as usize];
        self.run(async move {
            let clock = client.runtime().clock.clone();
            let policy = client.write_policy(dir).await.map_err(said)?;
            let mut drafts = Vec::new();
            for number in 0..4 {
                let data = Data { salt: service % 1000 + number, bytes: BEGUN as u32 + MORE as u32 * WAITS };
                let bytes = bytes_of(data);
                let mut draft = client.start_draft(dir).await.map_err(said)?;
                client.append(&mut draft, bytes[..BEGUN].to_vec(), &policy).await.map_err(said)?;
                drafts.push((format!("late-{:x}-{number}", draft.content()), data, draft));
            }
            set_flags(&client, service, FLAG_DRAIN | FLAG_NO_WRITE).await?;
            for wait in 0..WAITS as usize {
                clock.sleep(WAIT).await;
                // What nobody writes to is given up.
                for (_, data, draft) in &mut drafts {
                    let (bytes, at) = (bytes_of(*data), BEGUN + wait * MORE);
                    client.append(draft, bytes[at..at + MORE].to_vec(), &policy).await.map_err(said)?;
                }
            }
            for (name, data, draft) in drafts {
                let linked = client.link(draft, dir, &Bytes::from(name.clone()), attributes(), true).await;
                linked.map_err(said)?;
                files.lock().insert((dir, name), data);
            }
            healed(&client).await?;
            let (left, _) = client.visit_spans(service, Bytes::new()).await.map_err(said)?;
            if !left.is_empty() {
                return Err(format!("{} spans are still on a disk that was emptied", left.len()));
            }
            set_flags(&client, service, 0).await
        })
    }
}

fn check(seed: u64) -> Outcome<()> {
    let scrubs = seed.is_multiple_of(2);
    let heal = HealSettings {
        rebuild_after: REBUILD_AFTER,
        scrub_every: Duration::from_secs(if scrubs { 100 } else { 0 }),
        bytes_per_s: 0,
        look_every: Duration::from_secs(1),
    };
    let disks = DISKS[usize::from(seed % 4 == 3)];
    let page = if seed.is_multiple_of(3) { 2 } else { 0 };
    let config = ClusterConfig { heal: Some(heal), page, ..ClusterConfig::of(2, disks, POLICY) };
    let cluster = SimCluster::start_with(seed, config).ok_or("the cluster does not come up")?;
    let client = cluster.client();
    let (rng, files, directories) = (StdRng::seed_from_u64(seed), Files::default(), Vec::new());
    let mut trial = Trial { cluster, client, files, directories, disks, rng, scrubs };
    let c = trial.client.clone();
    trial.directories = trial.run(async move { make_directories(&c).await })?;
    for round in 0..ROUNDS {
        let trouble = trial.draw();
        trial.strike(round, trouble).map_err(|what| format!("round {round}, {trouble:?}: {what}"))?;
    }
    let (client, files) = (trial.client.clone(), trial.files.clone());
    trial.run(async move {
        read_all(&client, &files).await?;
        let checked = fsck::check(&client, &mut |_, _| {}).await.map_err(said)?;
        match checked.violations.first() {
            Some(violation) => Err(format!("fsck: {violation}")),
            None => Ok(()),
        }
    })
}

/// What is wrong in clusters of these seeds.
pub fn of_seeds(seeds: impl IntoIterator<Item = u64>) -> Vec<String> {
    let checked = seeds.into_iter().map(|seed| check(seed).map_err(|what| format!("seed {seed}: {what}")));
    checked.filter_map(Result::err).collect()
}

/// What is wrong.
pub fn all() -> Vec<String> {
    of_seeds(1..=8)
}
