//! Kills the leaders of real nodes under load, one log after another, and lets the harness's checkers say whether anything was lost, or
//! done twice, or seen too early.
//!
//! ```text
//! scripts/three.sh DIR PORT
//! cargo run --release -p clutch-integration --example failover -- DIR PORT KILLS [SEED]
//! ```
//!
//! Each round finds the node that leads a log, ends its process by SIGKILL, measures how long it takes until something that was asked
//! after that is acknowledged of the log, and starts the node again. At the end the logs are read, every request is held against
//! them, and all members of a log must have the same state.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use clutch_client::{
    AnsweredAt, Call, Client, ClientError, ClientOptions, FileAttributes, Observer, Reads, Registries,
};
use clutch_integration::{
    checkers::{self, Evidence},
    history::{History, Watcher},
    recording::Batches,
};
use clutch_log::{LogId, Position};
use clutch_proto::{
    InodeId,
    admin::{AdminRequest, ReadLog, Status, StatusReply, admin_request::Op},
    limits::SCAN_BYTES_MAX,
    log::{Batch, Epoch},
    session::Role,
    types::Code,
};
use clutch_runtime::{Endpoint, production};
use clutch_shard::Pages;
use parking_lot::Mutex;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};

const CLIENTS: u64 = 6;
/// Operations of one client at a time.
const LANES: u64 = 3;
/// Rest between two of them: what is recorded is looked through at the end.
const REST: Duration = Duration::from_millis(12);
const DIRECTORIES: u32 = 12;
const NAMES: u32 = 6;
/// Who hears nothing for so long has lost.
const PATIENCE: Duration = Duration::from_secs(60);

/// What was acknowledged of each log, and when that began.
#[derive(Default)]
struct Acknowledged {
    began: HashMap<(u64, u64), (Instant, LogId)>,
    last: BTreeMap<LogId, Vec<(Instant, Instant)>>,
}

/// Watches a client for the checkers, and its times.
struct Eyes {
    watcher: Watcher,
    number: u64,
    shards: u32,
    acknowledged: Arc<Mutex<Acknowledged>>,
}

impl Observer for Eyes {
    fn began(&self, call: &Call) -> u64 {
        let id = self.watcher.began(call);
        let log = match (call.role, call.slot) {
            (Role::Registry, _) => LogId::REGISTRY,
            (Role::Cdc, _) => LogId::CDC,
            (_, Some(slot)) => LogId::shard(u32::from(slot.0) * self.shards / 256),
            (_, None) => return id,
        };
        // A read may be answered by a leader that is about to be none.
        if call.tag.is_some() || log == LogId::REGISTRY {
            self.acknowledged.lock().began.insert((self.number, id), (Instant::now(), log));
        }
        id
    }

    fn ended(&self, id: u64, result: Result<&Bytes, &ClientError>, at: AnsweredAt) {
        self.watcher.ended(id, result, at);
        let mut acknowledged = self.acknowledged.lock();
        if let Some((began, log)) = acknowledged.began.remove(&(self.number, id))
            && result.is_ok()
        {
            acknowledged.last.entry(log).or_default().push((began, Instant::now()));
        }
    }
}

/// The cluster, its processes, and the load on it.
struct Trial {
    dir: PathBuf,
    port: u16,
    shards: u32,
    registries: Registries,
    history: Arc<History>,
    acknowledged: Arc<Mutex<Acknowledged>>,
    failed: Arc<Mutex<Vec<String>>>,
    done: Arc<AtomicU64>,
}

fn name_of(number: u32) -> Bytes {
    Bytes::from(format!("n{number}"))
}

fn role(log: LogId) -> Role {
    match log {
        LogId::REGISTRY => Role::Registry,
        LogId::CDC => Role::Cdc,
        _ => Role::Shard,
    }
}

impl Trial {
    fn client(&self, observed: Option<u64>) -> Client {
        let runtime = production::runtime();
        let observer = observed.map(|number| -> Arc<dyn Observer> {
            let watcher = Watcher { history: self.history.clone(), runtime: runtime.clone() };
            let acknowledged = self.acknowledged.clone();
            Arc::new(Eyes { watcher, number, shards: self.shards, acknowledged })
        });
        let reads = match observed.map(|number| number % 3) {
            Some(1) => Reads::Member,
            Some(2) => Reads::Seen,
            _ => Reads::Leader,
        };
        let options = ClientOptions {
            patience: PATIENCE,
            cache_lifetime: Duration::ZERO,
            observer,
            reads,
            ..ClientOptions::default()
        };
        Client::new(runtime, self.registries.clone(), options)
    }

    fn script(&self, arguments: &[&str]) -> Result<()> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/three.sh");
        let port = self.port.to_string();
        let mut command = Command::new(script);
        let status = command.arg(&self.dir).arg(port).args(arguments).status().context("run three.sh")?;
        ensure!(status.success(), "three.sh {arguments:?}: {status}");
        Ok(())
    }

    fn logs(&self) -> Vec<LogId> {
        let shards = (0..self.shards).map(LogId::shard);
        [LogId::REGISTRY, LogId::CDC].into_iter().chain(shards).collect()
    }

    async fn status(&self, client: &Client, log: LogId) -> Result<StatusReply> {
        let request = AdminRequest { op: Some(Op::Status(Status {})) };
        let reply = client.admin(role(log), log.number, request).await?;
        reply.status.context("an answer without a status")
    }

    /// Ends the process of the node that leads a log; which node that was.
    async fn kill_leader(&self, client: &Client, log: LogId) -> Result<u64> {
        let leader = self.status(client, log).await?.leader;
        let pid = std::fs::read_to_string(self.dir.join(format!("n{leader}/pid")))
            .with_context(|| format!("the process of node {leader}"))?;
        let killed = Command::new("kill").args(["-9", pid.trim()]).status()?;
        ensure!(killed.success(), "kill node {leader}");
        Ok(leader)
    }

    /// How long it takes until something of a log is acknowledged that was asked after `since`.
    async fn next_acknowledged(&self, log: LogId, since: Instant) -> Result<Duration> {
        loop {
            let ends = {
                let acknowledged = self.acknowledged.lock();
                let all = acknowledged.last.get(&log).into_iter().flatten();
                all.filter(|(began, _)| *began > since).map(|(_, ended)| *ended - since).min()
            };
            if let Some(took) = ends {
                return Ok(took);
            }
            ensure!(since.elapsed() < PATIENCE, "nothing of {log} is acknowledged any more");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Waits until all members of all logs have what the leader has.
    async fn whole(&self, client: &Client) -> Result<()> {
        let begin = Instant::now();
        'again: loop {
            ensure!(begin.elapsed() < PATIENCE, "the cluster does not become whole again");
            tokio::time::sleep(Duration::from_millis(50)).await;
            for log in self.logs() {
                let Ok(status) = self.status(client, log).await else { continue 'again };
                for member in &status.members {
                    let Ok(of_member) = self.member(client, log, &member.address).await else {
                        continue 'again;
                    };
                    if !of_member.fault.is_empty() {
                        bail!("{log} on node {}: {}", member.node, of_member.fault);
                    }
                    if of_member.applied_position < status.log_last {
                        continue 'again;
                    }
                }
                if status.members.len() != 3 {
                    continue 'again;
                }
            }
            return Ok(());
        }
    }

    async fn member(&self, client: &Client, log: LogId, address: &str) -> Result<StatusReply> {
        let request = AdminRequest { op: Some(Op::Status(Status {})) };
        let reply = client.admin_at(Endpoint::from(address), role(log), log.number, request).await?;
        reply.status.context("an answer without a status")
    }

    /// Makes the directories that the load is on; in which they are.
    async fn prepare(&self, client: &Client) -> Result<Vec<InodeId>> {
        let mut directories = Vec::new();
        for number in 0..DIRECTORIES {
            let name = Bytes::from(format!("failover-{number}-{}", std::process::id()));
            let made = client.make_directory(InodeId::ROOT, &name, FileAttributes::default()).await?;
            directories.push(made.id);
        }
        Ok(directories)
    }

    async fn lane(&self, client: Client, directories: Vec<InodeId>, seed: u64, stop: Arc<AtomicBool>) {
        let mut random = StdRng::seed_from_u64(seed);
        while !stop.load(Ordering::Relaxed) {
            tokio::time::sleep(REST).await;
            let dir = *directories.choose(&mut random).expect("there are some");
            let name = name_of(random.random_range(0..NAMES));
            let ended = match random.random_range(0..10) {
                0..=3 => create(&client, dir, &name).await,
                4 => client.lookup(dir, &name).await.map(drop),
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

async fn found(client: &Client, dir: InodeId, name: &Bytes) -> Result<clutch_client::Resolved, ClientError> {
    let edge = client.lookup(dir, name).await?;
    let id = InodeId::from_wire(edge.target).ok_or_else(|| ClientError::Unreachable("no inode".into()))?;
    Ok(clutch_client::Resolved { id, parent: dir, name: name.clone(), created_at: edge.created_at })
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

/// A whole log, as its leader tells it.
async fn read_log(client: &Client, log: LogId) -> Result<Batches> {
    let mut batches = Batches::new();
    let mut from = 1;
    loop {
        let op = Op::ReadLog(ReadLog { from, limit_bytes: SCAN_BYTES_MAX as u32 });
        let reply = client.admin(role(log), log.number, AdminRequest { op: Some(op) }).await?;
        let page = reply.log.context("an answer without a log")?;
        for batch in page.batches {
            let position = Position(batch.position);
            batches.insert(position, Batch { position, epoch: Epoch(0), entries: batch.entries });
        }
        if page.next <= from {
            return Ok(batches);
        }
        from = page.next;
    }
}

/// Prints how long it took, as a histogram and its corners.
fn print(what: &str, mut times: Vec<Duration>) {
    if times.is_empty() {
        return;
    }
    times.sort_unstable();
    let at = |part: f64| times[((times.len() - 1) as f64 * part).round() as usize].as_millis();
    println!("{what}: {} kills, p50 {} ms, p99 {} ms, most {} ms", times.len(), at(0.5), at(0.99), at(1.0));
    let mut bins: BTreeMap<u128, usize> = BTreeMap::new();
    for time in &times {
        *bins.entry(time.as_millis() / 200).or_default() += 1;
    }
    for (bin, count) in bins {
        println!("  {:>5} to {:>5} ms  {}", bin * 200, bin * 200 + 199, "#".repeat(count));
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [dir, port, kills, rest @ ..] = &arguments[..] else {
        bail!("say DIR PORT KILLS [SEED], of a cluster that scripts/three.sh has started");
    };
    let (port, kills): (u16, u32) = (port.parse()?, kills.parse()?);
    let seed: u64 = rest.first().map_or(Ok(1), |seed| seed.parse())?;
    let addresses = (0..3).map(|n| Endpoint::from(format!("127.0.0.1:{}", port + n).as_str())).collect();
    let registries = Registries::new(addresses).context("three addresses")?;
    let mut trial = Trial {
        dir: PathBuf::from(dir),
        port,
        shards: 1,
        registries,
        history: Arc::default(),
        acknowledged: Arc::default(),
        failed: Arc::default(),
        done: Arc::default(),
    };
    let operator = trial.client(None);
    trial.shards = operator.refresh_map().await?.shards.len() as u32;
    let directories = trial.prepare(&trial.client(Some(u64::MAX))).await?;
    let (trial, stop) = (Arc::new(trial), Arc::new(AtomicBool::new(false)));
    let mut lanes = Vec::new();
    for number in 0..CLIENTS {
        let client = trial.client(Some(number));
        for lane in 0..LANES {
            let (trial, client, directories, stop) =
                (trial.clone(), client.clone(), directories.clone(), stop.clone());
            let seed = seed.wrapping_mul(1000) + number * LANES + lane;
            lanes.push(tokio::spawn(async move { trial.lane(client, directories, seed, stop).await }));
        }
    }
    let mut times: BTreeMap<&str, Vec<Duration>> = BTreeMap::new();
    for round in 0..kills {
        trial.whole(&operator).await?;
        let logs = trial.logs();
        let log = logs[round as usize % logs.len()];
        let leader = trial.kill_leader(&operator, log).await?;
        let since = Instant::now();
        let took = trial.next_acknowledged(log, since).await?;
        println!(
            "{round:>3}: {log} was led by node {leader}; acknowledged again after {} ms",
            took.as_millis()
        );
        let kind = match log {
            LogId::REGISTRY => "registry",
            LogId::CDC => "cdc",
            _ => "shards",
        };
        times.entry(kind).or_default().push(took);
        times.entry("all").or_default().push(took);
        trial.script(&["start", &leader.to_string()])?;
    }
    trial.whole(&operator).await?;
    stop.store(true, Ordering::Relaxed);
    for lane in lanes {
        lane.await?;
    }
    trial.whole(&operator).await?;
    judge(&trial, &operator, times).await
}

/// Reads all logs and says what is wrong.
async fn judge(trial: &Trial, operator: &Client, times: BTreeMap<&str, Vec<Duration>>) -> Result<()> {
    let mut logs = BTreeMap::new();
    let mut wrong: Vec<String> = Vec::new();
    for log in trial.logs() {
        logs.insert(log, read_log(operator, log).await?);
        let status = trial.status(operator, log).await?;
        let mut hashes = Vec::new();
        for member in &status.members {
            let of_member = trial.member(operator, log, &member.address).await?;
            hashes.push((of_member.applied_position, of_member.hash));
        }
        hashes.dedup();
        if hashes.len() != 1 {
            wrong.push(format!("{log}: its members have different states: {hashes:?}"));
        }
    }
    let records = trial.history.take_records();
    let (count, done) = (records.len(), trial.done.load(Ordering::Relaxed));
    let evidence = Evidence::of(logs, records, trial.shards, Pages::default());
    let violations = evidence.violations.iter().cloned().chain(checkers::check_history(&evidence));
    wrong.extend(violations.map(|violation| format!("{}: {}", violation.checker, violation.what)));
    for (what, times) in times {
        print(what, times);
    }
    let failed = std::mem::take(&mut *trial.failed.lock());
    println!("{done} operations, {count} requests; {} failed for their users", failed.len());
    for error in failed.iter().take(10) {
        println!("  {error}");
    }
    for what in &wrong {
        println!("VIOLATION {what}");
    }
    ensure!(wrong.is_empty(), "{} violations", wrong.len());
    ensure!(failed.is_empty(), "{} operations failed", failed.len());
    println!("no violations");
    Ok(())
}
