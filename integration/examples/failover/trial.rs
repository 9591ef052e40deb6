//! The cluster under trial: its nodes, what was acknowledged of it, and how to ask it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, atomic::AtomicU64},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use clutch_client::{AnsweredAt, Call, Client, ClientError, ClientOptions, Observer, Reads, Registries};
use clutch_integration::history::{History, Watcher};
use clutch_log::LogId;
use clutch_proto::{
    Slot,
    admin::{AdminReply, AdminRequest, Status, StatusReply, admin_request::Op},
    session::Role,
};
use clutch_runtime::{Endpoint, production};
use clutch_server::keys;
use parking_lot::Mutex;

use crate::judge::Archive;

/// Who hears nothing for so long has lost.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// What was acknowledged of each log, and when that began.
#[derive(Default)]
pub(crate) struct Acknowledged {
    began: HashMap<(u64, u64), (Instant, LogId)>,
    last: BTreeMap<LogId, Vec<(Instant, Instant)>>,
}

/// The shard that a slot belongs to, where there are so many shards.
fn shard_of(slot: Slot, shards: u32) -> LogId {
    LogId::shard(u32::from(slot.0) * shards / 256)
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
            (_, Some(slot)) => shard_of(slot, self.shards),
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
pub(crate) struct Trial {
    pub(crate) dir: PathBuf,
    pub(crate) port: u16,
    /// Namespaces of the nodes' hosts begin with this; `None` where all are on this one.
    pub(crate) namespaces: Option<String>,
    /// The cluster's, for who looks into logs.
    key: [u8; 32],
    pub(crate) shards: u32,
    pub(crate) addresses: Vec<Endpoint>,
    /// Those that keep the logs.
    nodes: Mutex<BTreeSet<u64>>,
    pub(crate) history: Arc<History>,
    pub(crate) acknowledged: Arc<Mutex<Acknowledged>>,
    /// What operations said that failed, though nothing explains it.
    pub(crate) failed: Arc<Mutex<Vec<String>>>,
    pub(crate) done: Arc<AtomicU64>,
    /// What each lane of the load does, and since when.
    pub(crate) waiting: Mutex<BTreeMap<u64, (&'static str, Instant)>>,
    /// What has been read of the logs.
    pub(crate) archive: Mutex<Archive>,
    /// Nodes on whose disks bytes have changed: some of them are met much later.
    pub(crate) damaged: Mutex<BTreeSet<u64>>,
}

fn role(log: LogId) -> Role {
    match log {
        LogId::REGISTRY => Role::Registry,
        LogId::CDC => Role::Cdc,
        _ => Role::Shard,
    }
}

/// Where scripts/three.sh lets a node listen.
fn address(has_hosts: bool, port: u16, node: u64) -> Endpoint {
    let at = match has_hosts {
        true => format!("10.98.0.{node}:{port}"),
        false => format!("127.0.0.1:{}", u64::from(port) + node - 1),
    };
    Endpoint::from(at.as_str())
}

impl Trial {
    pub(crate) fn new(dir: PathBuf, port: u16, namespaces: Option<String>) -> Result<Trial> {
        let addresses = (1..=3).map(|node| address(namespaces.is_some(), port, node)).collect();
        let key = keys::read_key(&dir.join("n1/keys/cluster.key"))?;
        Ok(Trial {
            dir,
            key,
            port,
            shards: 1,
            addresses,
            nodes: Mutex::new((1..=3).collect()),
            namespaces,
            history: Arc::default(),
            acknowledged: Arc::default(),
            failed: Arc::default(),
            done: Arc::default(),
            waiting: Mutex::default(),
            archive: Mutex::default(),
            damaged: Mutex::default(),
        })
    }

    /// The nodes that keep the logs.
    pub(crate) fn nodes(&self) -> Vec<u64> {
        self.nodes.lock().iter().copied().collect()
    }

    /// Where a node is.
    pub(crate) fn address(&self, node: u64) -> Endpoint {
        address(self.namespaces.is_some(), self.port, node)
    }

    /// From now on a node keeps the logs in the place of another.
    pub(crate) fn replaced(&self, old: u64, new: u64) {
        let mut nodes = self.nodes.lock();
        nodes.remove(&old);
        nodes.insert(new);
    }

    /// The shard that a slot belongs to.
    pub(crate) fn shard_of(&self, slot: Slot) -> LogId {
        shard_of(slot, self.shards)
    }

    /// A client; what one with a number asks is recorded, and a third of them read from members that do not lead.
    pub(crate) fn client(&self, observed: Option<u64>) -> Client {
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
            keys: observed.is_none().then(|| self.key.into()),
            ..ClientOptions::default()
        };
        let registries = Registries::new(self.addresses.clone()).expect("three addresses");
        Client::new(runtime, registries, options)
    }

    pub(crate) fn script(&self, arguments: &[&str]) -> Result<()> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/three.sh");
        let port = self.port.to_string();
        let mut command = Command::new(script);
        let status = command.arg(&self.dir).arg(port).args(arguments).status().context("run three.sh")?;
        ensure!(status.success(), "three.sh {arguments:?}: {status}");
        Ok(())
    }

    pub(crate) fn logs(&self) -> Vec<LogId> {
        let shards = (0..self.shards).map(LogId::shard);
        [LogId::REGISTRY, LogId::CDC].into_iter().chain(shards).collect()
    }

    pub(crate) async fn status(&self, client: &Client, log: LogId) -> Result<StatusReply> {
        // One that keeps it no more would tell what it knew last.
        Ok(clutch_client_maintenance::members::leader_of(client, log).await?.0)
    }

    /// Asks the leader of a log.
    pub(crate) async fn ask(&self, client: &Client, log: LogId, op: Op) -> Result<AdminReply> {
        Ok(client.admin(role(log), log.number, AdminRequest { op: Some(op) }).await?)
    }

    /// Asks a member of a log.
    pub(crate) async fn ask_at(
        &self,
        client: &Client,
        log: LogId,
        at: Endpoint,
        op: Op,
    ) -> Result<AdminReply> {
        Ok(client.admin_at(at, role(log), log.number, AdminRequest { op: Some(op) }).await?)
    }

    /// The process of a node.
    pub(crate) fn process(&self, node: u64) -> Result<String> {
        let file = self.dir.join(format!("n{node}/pid"));
        let pid =
            std::fs::read_to_string(file).with_context(|| format!("read the process of node {node}"))?;
        Ok(pid.trim().to_string())
    }

    /// How long it takes until something of a log is acknowledged that was asked after `since`.
    pub(crate) async fn next_acknowledged(&self, log: LogId, since: Instant) -> Result<Duration> {
        loop {
            let ends = {
                let acknowledged = self.acknowledged.lock();
                let all = acknowledged.last.get(&log).into_iter().flatten();
                all.filter(|(began, _)| *began > since).map(|(_, ended)| *ended - since).min()
            };
            if let Some(took) = ends {
                return Ok(took);
            }
            if since.elapsed() > PATIENCE {
                self.describe().await;
                bail!("nothing of {log} is acknowledged any more");
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Prints what every node says of every log, and what lanes wait for.
    async fn describe(&self) {
        for (lane, (what, since)) in self.waiting.lock().iter() {
            println!("lane {lane} waits for {what} since {} ms", since.elapsed().as_millis());
        }
        let client = self.client(None);
        for (log, address) in
            self.logs().into_iter().flat_map(|log| self.addresses.iter().map(move |at| (log, at)))
        {
            let asked = self.member(&client, log, &address.0);
            match tokio::time::timeout(Duration::from_secs(5), asked).await {
                Ok(Ok(StatusReply { leading, epoch, leader, applied_position, log_last, fault, .. })) => {
                    println!(
                        "{address}: {log} leads {leading} in {epoch}, leader {leader}, applied {applied_position} of {log_last} {fault}"
                    )
                }
                Ok(Err(error)) => println!("{address}: {log}: {error:#}"),
                Err(_) => println!("{address}: {log}: silent"),
            }
        }
    }

    /// Waits until all members of all logs have what the leader has.
    pub(crate) async fn whole(&self, client: &Client) -> Result<()> {
        let begin = Instant::now();
        loop {
            match self.is_whole(client).await {
                Ok(true) => break,
                Ok(false) => {}
                Err(fault) => self.start_stopped(client, fault).await?,
            }
            ensure!(begin.elapsed() < PATIENCE, "the cluster does not become whole again");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    /// Whether all members of all logs have what the leader has; an error when one has a fault.
    pub(crate) async fn is_whole(&self, client: &Client) -> Result<bool> {
        for log in self.logs() {
            let Ok(status) = self.status(client, log).await else { return Ok(false) };
            for member in &status.members {
                let Ok(of_member) = self.member(client, log, &member.address).await else { return Ok(false) };
                ensure!(of_member.fault.is_empty(), "{log} on node {}: {}", member.node, of_member.fault);
                if of_member.applied_position < status.log_last {
                    return Ok(false);
                }
            }
            if status.members.iter().filter(|member| member.voter).count() != 3 {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The nodes with a member that has stopped, and why.
    pub(crate) async fn stopped(&self, client: &Client) -> BTreeMap<u64, String> {
        let mut stopped = BTreeMap::new();
        for log in self.logs() {
            let Ok(status) = self.status(client, log).await else { continue };
            for member in &status.members {
                let of_member = self.member(client, log, &member.address).await;
                if let Some(fault) = of_member.ok().map(|of_member| of_member.fault).filter(|f| !f.is_empty())
                {
                    stopped.insert(member.node, fault);
                }
            }
        }
        stopped
    }

    pub(crate) async fn member(&self, client: &Client, log: LogId, address: &str) -> Result<StatusReply> {
        let reply = self.ask_at(client, log, Endpoint::from(address), Op::Status(Status::default())).await?;
        reply.status.context("an answer without a status")
    }
}
