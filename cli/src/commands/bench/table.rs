//! `clutch bench table`: every figure that `docs/benchmarks.md` has, from clusters of its own.
//!
//! Each part starts `clutch up` as a process of its own on a new directory, so that what is measured is the server as
//! people run it, and its processor time is not the load generator's.

use std::{
    fs::File,
    io::Write as _,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::{ExitCode, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use clutch_client::{Client, ClientOptions};
use clutch_proto::{
    admin::{AdminRequest, Status, admin_request::Op},
    session::Role,
};
use clutch_runtime::production;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
};

use super::{HEADER, Load, Root, Row, cells, data, document, meta};
use crate::{
    args::TableArgs,
    output::{self, talk},
};

/// How the machine was while a part ran.
struct Surroundings {
    sync_us: u64,
    load: f64,
}

/// A figure that is not a rate.
struct Figure {
    name: &'static str,
    value: f64,
    unit: &'static str,
}

#[derive(Default)]
struct Part {
    rows: Vec<Row>,
    figures: Vec<Figure>,
}

pub(super) async fn run(args: &TableArgs) -> Result<ExitCode> {
    let mut interrupted = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())?;
    let mut terminated = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let mut documents = Vec::new();
    let done = tokio::select! {
        done = parts(args, &mut documents) => done,
        // What was started is dropped with the future: clusters end and their directories go.
        _ = interrupted.recv() => Err(anyhow::anyhow!("interrupted")),
        _ = terminated.recv() => Err(anyhow::anyhow!("terminated")),
    };
    if args.json {
        output::json(&json!({ "rows": documents }))?;
    }
    done.map(|()| ExitCode::SUCCESS)
}

/// Runs the parts that were asked for; prints each when it is known, or keeps it for the document.
async fn parts(args: &TableArgs, documents: &mut Vec<Value>) -> Result<()> {
    let asked = |part: &str| args.parts.is_empty() || args.parts.iter().any(|p| p == part);
    if asked("data") {
        check_space(&args.memory_dir, args.data_mib)?;
    }
    if !args.json {
        let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
        output::line(format!("{cores} cores, shared by cluster and load generator"))?;
    }
    for part in ["files", "directories", "many", "data"].into_iter().filter(|part| asked(part)) {
        let at = if part == "data" { &args.memory_dir } else { &args.dir };
        let dir = Scratch::make(at)?;
        let around = Surroundings { sync_us: sync_latency_us(&dir.0)?, load: load()? };
        let of_part = match part {
            "files" => files(&dir.0, args.files as usize).await,
            "directories" => directories(&dir.0, args.files as usize).await,
            "many" => many(&dir.0, args.many as usize).await,
            _ => file_data(&dir.0, args.data_mib as usize).await,
        };
        let of_part = of_part.with_context(|| format!("part {part:?}"))?;
        if args.json {
            documents.extend(json_rows(part, &of_part, &around));
        } else {
            show(part, &of_part, &around)?;
        }
    }
    Ok(())
}

/// File data with parity, and some room for logs: said before anything is measured, not after.
fn check_space(dir: &Path, data_mib: u64) -> Result<()> {
    let space = rustix::fs::statvfs(dir).with_context(|| format!("look at {}", dir.display()))?;
    let (there, needed) = ((space.f_bavail * space.f_frsize) >> 20, data_mib * 3 / 2 + 64);
    if there < needed {
        bail!(
            "{} has {there} MiB left and file data need {needed}; choose a smaller --data-mib or another --memory-dir, or leave data out with --parts",
            dir.display()
        );
    }
    Ok(())
}

/// One shard: what operations on files cost.
async fn files(dir: &Path, files: usize) -> Result<Part> {
    let cluster = Cluster::start(dir, 1, 1, "1+0").await?;
    let root = Root::make(&cluster.client).await?;
    let ops = words("create,lookup,stat,readdir,rename,unlink");
    let many = meta::Workload { ops: &ops, files, directories: 1, parents: 16 };
    let mut rows = meta::rows(&cluster.client, &root, &many, &cluster.load(4, 64)).await?;
    let alone = Root::make(&cluster.client).await?;
    let ops = words("create");
    let few = meta::Workload { ops: &ops, files: files.min(1000), directories: 1, parents: 1 };
    for mut row in meta::rows(&cluster.client, &alone, &few, &cluster.load(1, 1)).await? {
        row.op = "create, 1 outstanding".into();
        rows.push(row);
    }
    cluster.stop().await?;
    Ok(Part { rows, figures: Vec::new() })
}

/// Four shards: what transactions over several of them cost.
async fn directories(dir: &Path, files: usize) -> Result<Part> {
    let cluster = Cluster::start(dir, 4, 1, "1+0").await?;
    let root = Root::make(&cluster.client).await?;
    let ops = words("mkdir,rename-dir,rmdir");
    let workload = meta::Workload { ops: &ops, files, directories: (files / 5).max(16), parents: 256 };
    let rows = meta::rows(&cluster.client, &root, &workload, &cluster.load(4, 64)).await?;
    cluster.stop().await?;
    Ok(Part { rows, figures: Vec::new() })
}

/// One shard with many files: memory, time to start, bytes on disk.
async fn many(dir: &Path, files: usize) -> Result<Part> {
    const MIB: f64 = (1 << 20) as f64;
    let mut cluster = Cluster::start(dir, 1, 1, "1+0").await?;
    let figure = |name, value, unit| Figure { name, value, unit };
    let mut figures = vec![figure("memory, empty", cluster.resident().await? as f64 / MIB, "MiB")];
    let before = (bytes_under(&dir.join("state"))?, bytes_under(&dir.join("log"))?);
    let root = Root::make(&cluster.client).await?;
    let ops = words("create");
    let workload = meta::Workload { ops: &ops, files, directories: 1, parents: 64 };
    let mut rows = meta::rows(&cluster.client, &root, &workload, &cluster.load(4, 64)).await?;
    rows[0].op = format!("create, {files} files");
    figures.push(figure("memory, all files", cluster.resident().await? as f64 / MIB, "MiB"));
    cluster.kill().await?;
    let log = bytes_under(&dir.join("log"))?.saturating_sub(before.1);
    figures.push(figure("log on disk, per file", log as f64 / files as f64, "B"));
    let start = Instant::now();
    let cluster = Cluster::start(dir, 1, 1, "1+0").await?;
    figures.push(figure("start after kill -9", start.elapsed().as_secs_f64(), "s"));
    cluster.stop().await?;
    let state = bytes_under(&dir.join("state"))?.saturating_sub(before.0);
    figures.push(figure("state on disk, per file", state as f64 / files as f64, "B"));
    let start = Instant::now();
    let cluster = Cluster::start(dir, 1, 1, "1+0").await?;
    figures.push(figure("start after a stop", start.elapsed().as_secs_f64(), "s"));
    cluster.stop().await?;
    Ok(Part { rows, figures })
}

/// Sixteen disks in memory: one stream of file data.
async fn file_data(dir: &Path, mib: usize) -> Result<Part> {
    // Memory that nobody has used lately is slow to get, here and for the cluster.
    let plain = plain_write_mib_per_s(dir, mib * 14 / 10)?;
    let cluster = Cluster::start(dir, 1, 16, "10+4").await?;
    let root = Root::make(&cluster.client).await?;
    let files = mib.div_ceil(256);
    let mut rows = data::rows(&cluster.client, &root, files, (mib << 20) / files, 1).await?;
    for row in &mut rows {
        row.op += ", one stream, RS(10,4), 16 disks in memory";
    }
    cluster.stop().await?;
    let plain = Figure { name: "plain write of as much", value: plain, unit: "MiB/s" };
    Ok(Part { rows, figures: vec![plain] })
}

/// How fast so many MiB are written to a file, without anything else.
fn plain_write_mib_per_s(dir: &Path, mib: usize) -> Result<f64> {
    let path = dir.join("plain");
    let file = File::create(&path).with_context(|| format!("make {}", path.display()))?;
    let piece = vec![7u8; 1 << 20];
    let start = Instant::now();
    for i in 0..mib as u64 {
        file.write_all_at(&piece, i << 20)?;
    }
    let took = start.elapsed();
    std::fs::remove_file(&path)?;
    Ok(mib as f64 / took.as_secs_f64())
}

fn words(list: &str) -> Vec<String> {
    list.split(',').map(str::to_owned).collect()
}

/// A directory that is removed at the end, also after an error.
struct Scratch(PathBuf);

impl Scratch {
    fn make(under: &Path) -> Result<Scratch> {
        let path = under.join(format!("clutch-bench-{:016x}", production::runtime().random.u64()));
        std::fs::create_dir_all(&path).with_context(|| format!("make {}", path.display()))?;
        Ok(Scratch(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            talk!("clutch: remove {}: {error}", self.0.display());
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // It must not write any more when its directory is removed. An error says that it has ended already.
        let _ = self.process.start_kill();
        for _ in 0..500 {
            match self.process.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(10)),
                _ => return,
            }
        }
    }
}

/// `clutch up` as a process of its own; it is ended with this value.
struct Cluster {
    process: Child,
    client: Client,
}

impl Cluster {
    async fn start(dir: &Path, shards: u32, disks: u32, policy: &str) -> Result<Cluster> {
        let own = std::env::current_exe().context("find this program")?;
        let mut process = Command::new(own)
            .args(["up", "--listen", "127.0.0.1:0", "--collect-every-s", "0", "--policy", policy])
            .args(["--shards", &shards.to_string(), "--disks", &disks.to_string(), "--dir"])
            .arg(dir)
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("start a cluster")?;
        let mut lines = BufReader::new(process.stderr.take().context("no standard error")?).lines();
        let mut said = String::new();
        let address = loop {
            let Some(line) = lines.next_line().await? else { bail!("the cluster did not start: {said}") };
            if let Some(rest) = line.trim().strip_prefix("listening on ") {
                break rest.split(';').next().unwrap_or(rest).to_owned();
            }
            said += &line;
        };
        // What it says later is not lost, and never blocks it.
        tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                if line.contains("ERROR") || line.contains("WARN") {
                    talk!("{line}");
                }
            }
        });
        let client = Client::new(production::runtime(), address.as_str(), ClientOptions::default());
        Ok(Cluster { process, client })
    }

    fn load(&self, clients: usize, depth: usize) -> Load {
        Load { clients: (0..clients).map(|_| self.client.sibling()).collect(), depth }
    }

    async fn resident(&self) -> Result<u64> {
        let request = AdminRequest { op: Some(Op::Status(Status::default())) };
        let reply = self.client.admin(Role::Registry, 0, request).await?;
        Ok(reply.status.context("an answer without a status")?.resident_bytes)
    }

    /// As Ctrl-C does.
    async fn stop(mut self) -> Result<()> {
        let pid = self.process.id().and_then(|id| rustix::process::Pid::from_raw(id as i32));
        let pid = pid.context("the cluster has ended")?;
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        let status = self.process.wait().await?;
        if !status.success() {
            bail!("the cluster ended with {status}");
        }
        Ok(())
    }

    async fn kill(&mut self) -> Result<()> {
        self.process.kill().await.context("end the cluster")
    }
}

/// What a write of 4 KiB and its sync take here: the median of many.
fn sync_latency_us(dir: &Path) -> Result<u64> {
    let path = dir.join("sync");
    let file = File::create(&path).with_context(|| format!("make {}", path.display()))?;
    let block = [7u8; 4096];
    let mut times = Vec::new();
    for i in 0..200 {
        let start = Instant::now();
        file.write_all_at(&block, i * 4096)?;
        file.sync_data()?;
        times.push(start.elapsed());
    }
    std::fs::remove_file(&path)?;
    times.sort_unstable();
    Ok(times.get(times.len() / 2).map_or(0, Duration::as_micros) as u64)
}

/// Runnable processes over the last minute.
fn load() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/loadavg").context("read the load")?;
    text.split_whitespace().next().unwrap_or_default().parse().context("read the load")
}

/// What all files under a directory occupy.
fn bytes_under(dir: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt as _;
    let mut total = 0;
    let mut left = vec![dir.to_owned()];
    while let Some(dir) = left.pop() {
        for entry in std::fs::read_dir(&dir).with_context(|| format!("list {}", dir.display()))? {
            let entry = entry?;
            // RocksDB may remove a file meanwhile.
            let Ok(found) = entry.metadata() else { continue };
            if found.is_dir() {
                left.push(entry.path());
            } else {
                total += found.blocks() * 512;
            }
        }
    }
    Ok(total)
}

fn json_rows(part: &str, of_part: &Part, around: &Surroundings) -> Vec<Value> {
    let mut rows: Vec<Value> = of_part.rows.iter().map(document).collect();
    rows.extend(of_part.figures.iter().map(|f| json!({ "op": f.name, "value": f.value, "unit": f.unit })));
    for row in &mut rows {
        row["part"] = json!(part);
        row["sync_us"] = json!(around.sync_us);
        row["load"] = json!(around.load);
    }
    rows
}

fn show(part: &str, of_part: &Part, around: &Surroundings) -> Result<()> {
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_header(HEADER);
    for row in &of_part.rows {
        table.add_row(cells(row));
    }
    for figure in &of_part.figures {
        table.add_row([figure.name.to_owned(), format!("{:.1} {}", figure.value, figure.unit)]);
    }
    output::line(format!(
        "\n{part}: a sync of 4 KiB took {} µs, load {:.2} before",
        around.sync_us, around.load
    ))?;
    output::line(table)?;
    // Each part takes a while; what is known is shown at once.
    Ok(std::io::stdout().flush()?)
}
