//! Three members of etcd beside three nodes of Clutch, on one machine and one disk, in one run: the same number of requests in flight,
//! the same bytes in each, every change synced by a quorum before it is acknowledged.
//!
//! ```text
//! cargo run --release -p clutch-integration --example beside_etcd -- DIR [OPERATIONS [ROUNDS]]
//! ```
//!
//! Needs the program etcd (Debian: etcd-server) and a built `clutch`. Rounds go turn about. Processor time is that of each server's
//! process: the one that uses most of it leads.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use clutch_client::{Client, ClientOptions, FileAttributes, Registries};
use clutch_proto::InodeId;
use clutch_runtime::{Endpoint, production};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use tonic::{client::Grpc, codegen::http::uri::PathAndQuery, transport::Channel};
use tonic_prost::ProstCodec;

/// Requests in flight, over all connections.
const OUTSTANDING: usize = 256;
/// Connections, or clients.
const CONNECTIONS: usize = 4;
/// Bytes of each value, or file.
const VALUE_BYTES: usize = 64;
const PORT: u16 = 7810;

/// `etcdserverpb.PutRequest`, as far as it is used.
#[derive(Clone, PartialEq, prost::Message)]
struct Put {
    #[prost(bytes = "bytes", tag = "1")]
    key: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    value: Bytes,
}

/// `etcdserverpb.RangeRequest`, as far as it is used: one key, linearizable.
#[derive(Clone, PartialEq, prost::Message)]
struct Range {
    #[prost(bytes = "bytes", tag = "1")]
    key: Bytes,
}

/// `etcdserverpb.RangeResponse`, as far as it is used.
#[derive(Clone, PartialEq, prost::Message)]
struct Found {
    #[prost(int64, tag = "4")]
    count: i64,
}

/// An answer that is not looked into.
#[derive(Clone, PartialEq, prost::Message)]
struct Done {}

/// Processes that end with this.
struct Servers(Vec<Child>);

impl Drop for Servers {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // It may have ended.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Processor time that a process has used, in microseconds.
fn cpu_us(pid: u32) -> Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat.rsplit_once(')').context("a command")?.1.split_whitespace().collect();
    let ticks = |at: usize| -> Result<u64> { Ok(fields.get(at).context("a field")?.parse()?) };
    Ok((ticks(11)? + ticks(12)?) * 10_000)
}

impl Servers {
    fn start(&mut self, command: &mut Command, out: &Path) -> Result<()> {
        let file = File::create(out)?;
        let child = command.stdout(file.try_clone()?).stderr(file).spawn();
        self.0.push(child.with_context(|| format!("run {:?}", command.get_program()))?);
        Ok(())
    }

    fn cpu_us(&self) -> Result<Vec<u64>> {
        self.0.iter().map(|child| cpu_us(child.id())).collect()
    }
}

fn etcd(dir: &Path) -> Result<Servers> {
    let mut servers = Servers(Vec::new());
    let peer = |n: u16| format!("http://127.0.0.1:{}", PORT + 10 + n);
    let members = [0, 1, 2].map(|n| format!("m{n}={}", peer(n))).join(",");
    for n in 0..3u16 {
        let client = format!("http://127.0.0.1:{}", PORT + n);
        let mut command = Command::new("etcd");
        command.args(["--name", &format!("m{n}"), "--initial-cluster", &members]);
        command.args([
            "--initial-cluster-state",
            "new",
            "--log-level",
            "error",
            "--quota-backend-bytes",
            "8589934592",
        ]);
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer(n), "--initial-advertise-peer-urls", &peer(n)]);
        command.arg("--data-dir").arg(dir.join(format!("m{n}")));
        servers.start(&mut command, &dir.join(format!("m{n}.out")))?;
    }
    Ok(servers)
}

fn clutch(dir: &Path, shards: u32) -> Result<Servers> {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/release/clutch");
    let program = std::env::var_os("CLUTCH_BIN").map_or(built, PathBuf::from);
    let mut init = Command::new(&program);
    init.args([
        "cluster",
        "init",
        "--disks",
        "6",
        "--policy",
        "4+2",
        "--shards",
        &shards.to_string(),
        "--dir",
    ]);
    init.arg(dir.join("nodes"));
    for n in 0..3 {
        init.args(["--node", &format!("127.0.0.1:{}", PORT + n)]);
    }
    ensure!(init.output()?.status.success(), "clutch cluster init");
    let mut servers = Servers(Vec::new());
    for n in 1..=3 {
        let mut command = Command::new(&program);
        command.args(["node", "--config"]).arg(dir.join(format!("nodes/n{n}/node.toml")));
        servers.start(&mut command, &dir.join(format!("n{n}.out")))?;
    }
    Ok(servers)
}

/// What was measured of one kind of request.
struct Row {
    what: String,
    per_s: f64,
    p50_us: u128,
    p99_us: u128,
    /// Processor time of each server for one request, most first, and of this process.
    cpu_us: Vec<f64>,
    own_us: f64,
}

/// Asks so often, as many at a time as may be in flight.
async fn measure<F: Future<Output = Result<()>>>(
    what: String,
    servers: &Servers,
    count: usize,
    each: impl Fn(usize) -> F,
) -> Result<Row> {
    let (before, own) = (servers.cpu_us()?, cpu_us(std::process::id())?);
    let took = Mutex::new(Vec::with_capacity(count));
    let begin = Instant::now();
    let all = (0..count).map(|number| {
        let asked = each(number);
        async {
            let begin = Instant::now();
            asked.await?;
            took.lock().expect("whole").push(begin.elapsed().as_micros());
            anyhow::Ok(())
        }
    });
    stream::iter(all).buffer_unordered(OUTSTANDING).try_collect::<Vec<()>>().await?;
    let seconds = begin.elapsed().as_secs_f64();
    let mut took = took.into_inner().expect("whole");
    took.sort_unstable();
    let used = servers
        .cpu_us()?
        .into_iter()
        .zip(before)
        .map(|(after, before)| (after - before) as f64 / count as f64);
    let mut cpu_us: Vec<f64> = used.collect();
    cpu_us.sort_by(|a, b| b.total_cmp(a));
    let own_us = (cpu_us_of_self()? - own) as f64 / count as f64;
    let at = |part: f64| took[((took.len() - 1) as f64 * part) as usize];
    Ok(Row { what, per_s: count as f64 / seconds, p50_us: at(0.5), p99_us: at(0.99), cpu_us, own_us })
}

fn cpu_us_of_self() -> Result<u64> {
    cpu_us(std::process::id())
}

async fn call<Q: prost::Message + 'static, A: prost::Message + Default + 'static>(
    channel: &Channel,
    path: &'static str,
    request: Q,
) -> Result<A> {
    let mut grpc = Grpc::new(channel.clone());
    grpc.ready().await?;
    let codec = ProstCodec::<Q, A>::default();
    let answer = grpc.unary(tonic::Request::new(request), PathAndQuery::from_static(path), codec).await?;
    Ok(answer.into_inner())
}

fn key(number: usize) -> Bytes {
    Bytes::from(format!("file-{number:011}"))
}

async fn of_etcd(dir: &Path, count: usize) -> Result<Vec<Row>> {
    let servers = etcd(dir)?;
    let mut channels = Vec::new();
    for n in 0..CONNECTIONS {
        let at = format!("http://127.0.0.1:{}", PORT + (n % 3) as u16);
        channels.push(Channel::from_shared(at)?.connect_lazy());
    }
    let channels = Arc::new(channels);
    let put = |channels: Arc<Vec<Channel>>, number: usize| async move {
        let put = Put { key: key(number), value: Bytes::from(vec![7; VALUE_BYTES]) };
        let Done {} = call(&channels[number % CONNECTIONS], "/etcdserverpb.KV/Put", put).await?;
        anyhow::Ok(())
    };
    let begin = Instant::now();
    while put(channels.clone(), usize::MAX >> 32).await.is_err() {
        ensure!(begin.elapsed() < Duration::from_secs(60), "etcd does not serve");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let get = |channels: Arc<Vec<Channel>>, number: usize| async move {
        let found: Found =
            call(&channels[number % CONNECTIONS], "/etcdserverpb.KV/Range", Range { key: key(number) })
                .await?;
        ensure!(found.count == 1, "{number} is not there");
        Ok(())
    };
    let puts = measure("etcd, put".into(), &servers, count, |number| put(channels.clone(), number)).await?;
    let gets = measure("etcd, get".into(), &servers, count, |number| get(channels.clone(), number)).await?;
    Ok(vec![puts, gets])
}

async fn of_clutch(dir: &Path, shards: u32, count: usize) -> Result<Vec<Row>> {
    let servers = clutch(dir, shards)?;
    let addresses = (0..3).map(|n| Endpoint::from(format!("127.0.0.1:{}", PORT + n).as_str())).collect();
    let registries = Registries::new(addresses).context("addresses")?;
    let client = || {
        let options = ClientOptions { cache_lifetime: Duration::ZERO, ..ClientOptions::default() };
        Client::new(production::runtime(), registries.clone(), options)
    };
    let clients: Vec<Client> = (0..CONNECTIONS).map(|_| client()).collect();
    let clients = Arc::new(clients);
    let mut dirs = Vec::new();
    for number in 0..(shards as usize * 4) {
        let name = Bytes::from(format!("d{number}"));
        let begin = Instant::now();
        let made = loop {
            match clients[0].make_directory(InodeId::ROOT, &name, FileAttributes::default()).await {
                Ok(made) => break made,
                Err(error) if begin.elapsed() > Duration::from_secs(60) => bail!("{error}"),
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        };
        dirs.push(made.id);
    }
    let dirs = Arc::new(dirs);
    let create = |clients: Arc<Vec<Client>>, dirs: Arc<Vec<InodeId>>, number: usize| async move {
        let (client, dir) = (&clients[number % CONNECTIONS], dirs[number % dirs.len()]);
        let content = [7; VALUE_BYTES];
        client.write_file(dir, &key(number), FileAttributes::default(), false, &mut &content[..]).await?;
        anyhow::Ok(())
    };
    let lookup = |clients: Arc<Vec<Client>>, dirs: Arc<Vec<InodeId>>, number: usize| async move {
        clients[number % CONNECTIONS].lookup(dirs[number % dirs.len()], &key(number)).await?;
        anyhow::Ok(())
    };
    let what = |op: &str| format!("Clutch, {shards} shards, {op}");
    let creates =
        measure(what("create"), &servers, count, |n| create(clients.clone(), dirs.clone(), n)).await?;
    let lookups =
        measure(what("lookup"), &servers, count, |n| lookup(clients.clone(), dirs.clone(), n)).await?;
    Ok(vec![creates, lookups])
}

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [dir, rest @ ..] = &arguments[..] else { bail!("say DIR [OPERATIONS [ROUNDS]]") };
    let count: usize = rest.first().map_or(Ok(50_000), |count| count.parse())?;
    let rounds: u32 = rest.get(1).map_or(Ok(3), |rounds| rounds.parse())?;
    ensure!(!Path::new(dir).exists(), "{dir} is there already");
    println!(
        "{OUTSTANDING} requests in flight over {CONNECTIONS} connections, {VALUE_BYTES} bytes each, {count} requests of each kind"
    );
    println!("| what | per second | p50 ms | p99 ms | servers' processor time, µs each | client's |");
    println!("|---|---|---|---|---|---|");
    for round in 0..rounds {
        for kind in 0..3 {
            let dir = Path::new(dir).join(format!("{round}-{kind}"));
            fs::create_dir_all(&dir)?;
            let rows = match kind {
                0 => of_etcd(&dir, count).await?,
                1 => of_clutch(&dir, 1, count).await?,
                _ => of_clutch(&dir, 4, count).await?,
            };
            for Row { what, per_s, p50_us, p99_us, cpu_us, own_us } in rows {
                let cpu: Vec<String> = cpu_us.iter().map(|us| format!("{us:.0}")).collect();
                let (p50, p99) = (p50_us as f64 / 1e3, p99_us as f64 / 1e3);
                println!("| {what} | {per_s:.0} | {p50:.1} | {p99:.1} | {} | {own_us:.0} |", cpu.join(", "));
            }
            fs::remove_dir_all(&dir)?;
        }
    }
    Ok(())
}
