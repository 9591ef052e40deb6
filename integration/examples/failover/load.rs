//! The load: lanes of clients that work on few names, so that they meet.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use bytes::Bytes;
use clutch_client::{Client, ClientError, FileAttributes, Resolved};
use clutch_log::LogId;
use clutch_proto::{InodeId, types::Code};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};
use tokio::task::JoinHandle;

use crate::trial::Trial;

const CLIENTS: u64 = 6;
/// Clients that only look: who writes soon learns that another node leads, and who only looks may go on asking the one that led.
const LOOKERS: u64 = 3;
/// Operations of one client at a time.
const LANES: u64 = 3;
/// Rest between two of them: what is recorded is looked through at the end.
const REST: Duration = Duration::from_millis(1);
const DIRECTORIES_OF_SHARD: usize = 3;
/// Names until each shard has as many.
const NAMES_TRIED: u32 = 1000;
const NAMES: u32 = 6;
/// Operations, as often as they are drawn.
const KINDS: [&str; 10] =
    ["create", "create", "create", "create", "lookup", "unlink", "unlink", "rename", "directory", "map"];
const LOOKUP: usize = 4;

/// Begins the load; it goes on until `stop`.
pub(crate) async fn begin(
    trial: &Arc<Trial>,
    seed: u64,
    stop: &Arc<AtomicBool>,
) -> Result<Vec<JoinHandle<()>>> {
    let directories = trial.prepare(&trial.client(Some(u64::MAX))).await?;
    let mut lanes = Vec::new();
    for number in 0..CLIENTS + LOOKERS {
        let client = trial.client(Some(number));
        for lane in 0..LANES {
            let (trial, client, stop) = (trial.clone(), client.clone(), stop.clone());
            let directories = directories.clone();
            let seed = seed.wrapping_mul(1000) + number * LANES + lane;
            let looks = number >= CLIENTS;
            lanes.push(tokio::spawn(async move { trial.lane(client, directories, seed, looks, stop).await }));
        }
    }
    Ok(lanes)
}

/// Makes so many files, which are there while things happen to nodes.
pub(crate) async fn fill(trial: &Trial, files: usize) -> Result<()> {
    const OUTSTANDING: usize = 256;
    const IN_ONE: usize = 10_000;
    let (client, begin) = (trial.client(None), Instant::now());
    for first in (0..files).step_by(IN_ONE) {
        let name = Bytes::from(format!("fill-{first}-{}", std::process::id()));
        let dir = client.make_directory(InodeId::ROOT, &name, FileAttributes::default()).await?.id;
        let made = (first..files.min(first + IN_ONE)).map(|number| {
            let (client, name) = (client.clone(), Bytes::from(format!("f{number}")));
            async move {
                client.write_file(dir, &name, FileAttributes::default(), false, &mut tokio::io::empty()).await
            }
        });
        stream::iter(made).buffer_unordered(OUTSTANDING).try_collect::<Vec<_>>().await?;
    }
    if files > 0 {
        let took = begin.elapsed().as_secs_f64();
        println!("{files} files are there after {took:.0} s ({:.0}/s)", files as f64 / took);
    }
    Ok(())
}

fn name_of(number: u32) -> Bytes {
    Bytes::from(format!("n{number}"))
}

impl Trial {
    /// Makes the directories that the load is on, as many on each shard: something of each must be acknowledged.
    async fn prepare(&self, client: &Client) -> Result<Vec<InodeId>> {
        let mut in_shards: BTreeMap<LogId, Vec<InodeId>> = BTreeMap::new();
        let is_full = |directories: &Vec<InodeId>| directories.len() >= DIRECTORIES_OF_SHARD;
        // Shards are drawn by names, so that one may stay without any for long.
        for number in 0..NAMES_TRIED {
            let name = Bytes::from(format!("failover-{number}-{}", std::process::id()));
            let made = client.make_directory(InodeId::ROOT, &name, FileAttributes::default()).await?;
            let directories = in_shards.entry(self.shard_of(made.id.slot())).or_default();
            if !is_full(directories) {
                directories.push(made.id);
            }
            if in_shards.len() == self.shards as usize && in_shards.values().all(is_full) {
                return Ok(in_shards.into_values().flatten().collect());
            }
        }
        bail!("{NAMES_TRIED} directories, and a shard has none of them")
    }

    async fn lane(
        &self,
        client: Client,
        directories: Vec<InodeId>,
        seed: u64,
        looks: bool,
        stop: Arc<AtomicBool>,
    ) {
        let mut random = StdRng::seed_from_u64(seed);
        while !stop.load(Ordering::Relaxed) {
            tokio::time::sleep(REST).await;
            let dir = *directories.choose(&mut random).expect("there are some");
            let name = name_of(random.random_range(0..NAMES));
            let kind = if looks { LOOKUP } else { random.random_range(0..KINDS.len()) };
            self.waiting.lock().insert(seed, (KINDS[kind], Instant::now()));
            let ended = match kind {
                0..=3 => create(&client, dir, &name).await,
                LOOKUP => client.lookup(dir, &name).await.map(drop),
                5 | 6 => take(&client, dir, &name).await,
                7 => {
                    let to = *directories.choose(&mut random).expect("there are some");
                    let to_name = name_of(random.random_range(0..NAMES));
                    rename(&client, (dir, &name), (to, &to_name)).await
                }
                8 => {
                    let name = Bytes::from(format!("d{}", random.random_range(0..NAMES)));
                    match random.random() {
                        true => client.make_directory(dir, &name, FileAttributes::default()).await.map(drop),
                        false => remove_directory(&client, dir, &name).await,
                    }
                }
                _ => client.refresh_map().await.map(drop),
            };
            self.done.fetch_add(1, Ordering::Relaxed);
            if let Err(error) = ended
                && !is_expected(&error)
            {
                self.failed.lock().push(error.to_string());
            }
        }
    }
}

/// Whether somebody else's work explains it.
fn is_expected(error: &ClientError) -> bool {
    let codes = [
        Code::NotFound,
        Code::Exists,
        Code::NotEmpty,
        Code::Busy,
        Code::IsDirectory,
        Code::NotDirectory,
        Code::Stale,
    ];
    error.code().is_some_and(|code| codes.contains(&code))
}

async fn create(client: &Client, dir: InodeId, name: &Bytes) -> Result<(), ClientError> {
    let text = format!("of {name:?}");
    let mut source = text.as_bytes();
    client.write_file(dir, name, FileAttributes::default(), false, &mut source).await.map(drop)
}

async fn found(client: &Client, dir: InodeId, name: &Bytes) -> Result<Resolved, ClientError> {
    let edge = client.lookup(dir, name).await?;
    let id = InodeId::from_wire(edge.target).ok_or_else(|| ClientError::Unreachable("no inode".into()))?;
    Ok(Resolved { id, parent: dir, name: name.clone(), created_at: edge.created_at })
}

async fn take(client: &Client, dir: InodeId, name: &Bytes) -> Result<(), ClientError> {
    client.unlink(&found(client, dir, name).await?).await
}

async fn remove_directory(client: &Client, dir: InodeId, name: &Bytes) -> Result<(), ClientError> {
    client.remove_directory(&found(client, dir, name).await?).await
}

async fn rename(
    client: &Client,
    (dir, name): (InodeId, &Bytes),
    (to, to_name): (InodeId, &Bytes),
) -> Result<(), ClientError> {
    let at = found(client, dir, name).await?;
    client.rename(&at, to, to_name).await.map(drop)
}
