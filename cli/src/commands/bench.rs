//! `clutch bench`: how fast this cluster is, seen from here.
//!
//! Rows say operations per second, latency at the 50th and 99th percentile, and the processor time of the serving
//! process for each operation, which is the figure that a noisy machine spares. With `clutch up` one process
//! serves everything, so its time is the cluster's.

use std::{
    process::ExitCode,
    sync::{Arc, atomic::AtomicUsize, atomic::Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use clutch_client::{Client, FileAttributes, Resolved};
use clutch_proto::{
    InodeId,
    admin::{AdminRequest, Status, admin_request::Op},
    session::Role,
};
use serde_json::json;
use tokio::task::JoinSet;

use crate::{args::BenchCommand, output};

pub(crate) async fn run(client: Arc<Client>, command: &BenchCommand) -> Result<ExitCode> {
    let root = Root::make(&client).await?;
    let (rows, as_json) = match command {
        BenchCommand::Meta { ops, clients, depth, files, json } => {
            ensure!(*clients > 0 && *depth > 0 && *files > 0, "clients, depth and files must be above 0");
            (meta(&client, &root, ops, *clients, *depth, *files).await, *json)
        }
        BenchCommand::Data { files, size_mib, clients, json } => {
            ensure!(*clients > 0 && *files > 0 && *size_mib > 0, "clients, files and size must be above 0");
            (data(&client, &root, *files, *size_mib << 20, *clients).await, *json)
        }
    };
    root.remove(&client).await?;
    print(&rows?, as_json)?;
    Ok(ExitCode::SUCCESS)
}

/// A directory of the benchmark's own.
struct Root {
    at: Resolved,
}

impl Root {
    async fn make(client: &Client) -> Result<Root> {
        let name = Bytes::from(format!(".bench-{:016x}", client.runtime().random.u64()));
        let made = client.make_directory(InodeId::ROOT, &name, directory()).await?;
        Ok(Root { at: Resolved { id: made.id, parent: InodeId::ROOT, name, created_at: made.created_at } })
    }

    async fn remove(&self, client: &Client) -> Result<()> {
        let mut directories = vec![self.at.clone()];
        let mut next = 0;
        while next < directories.len() {
            let dir = directories[next].id;
            next += 1;
            let entries: Vec<Resolved> =
                client.read_dir(dir).await?.into_iter().filter_map(|e| entry(dir, e)).collect();
            let (below, files): (Vec<_>, Vec<_>) = entries.into_iter().partition(|e| e.id.is_directory());
            for file in files {
                client.unlink(&file).await?;
            }
            directories.extend(below);
        }
        for directory in directories.iter().rev() {
            client.remove_directory(directory).await?;
        }
        Ok(())
    }
}

fn entry(parent: InodeId, entry: clutch_proto::shard::DirEntry) -> Option<Resolved> {
    Some(Resolved {
        id: InodeId::from_wire(entry.target)?,
        parent,
        name: entry.name,
        created_at: entry.created_at,
    })
}

fn directory() -> FileAttributes {
    FileAttributes { mode: 0o755, ..FileAttributes::default() }
}

struct Row {
    op: String,
    ops: usize,
    seconds: f64,
    latencies_us: Vec<u64>,
    server_cpu_us: u64,
    bytes: u64,
}

/// The serving process's time so far.
async fn server_cpu_us(client: &Client) -> Result<u64> {
    let reply = client.admin(Role::Registry, 0, AdminRequest { op: Some(Op::Status(Status {})) }).await?;
    Ok(reply.status.context("an answer without a status")?.process_cpu_us)
}

/// Runs `count` operations, `depth` at a time on each client, and measures every one.
async fn measure<F, Fut, T>(
    clients: &[Client],
    op: &str,
    count: usize,
    depth: usize,
    each: F,
) -> Result<(Row, Vec<T>)>
where
    F: Fn(Client, usize) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = Result<T>> + Send,
    T: Send + 'static,
{
    let before = server_cpu_us(&clients[0]).await?;
    let next = Arc::new(AtomicUsize::new(0));
    let start = Instant::now();
    let bar = output::bar(op, count as u64);
    let mut workers: JoinSet<Result<(Vec<u64>, Vec<T>)>> = JoinSet::new();
    for client in clients {
        for _ in 0..depth {
            let (client, next, each, bar) = (client.clone(), next.clone(), each.clone(), bar.clone());
            workers.spawn(async move {
                let (mut latencies, mut results) = (Vec::new(), Vec::new());
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= count {
                        return Ok((latencies, results));
                    }
                    let begin = Instant::now();
                    results.push(each(client.clone(), number).await?);
                    latencies.push(begin.elapsed().as_micros() as u64);
                    bar.inc(1);
                }
            });
        }
    }
    let (mut latencies_us, mut results) = (Vec::new(), Vec::new());
    while let Some(worker) = workers.join_next().await {
        let (latencies, of_worker) = worker??;
        latencies_us.extend(latencies);
        results.extend(of_worker);
    }
    let seconds = start.elapsed().as_secs_f64().max(1e-9);
    bar.finish_and_clear();
    latencies_us.sort_unstable();
    let server_cpu_us = server_cpu_us(&clients[0]).await?.saturating_sub(before);
    Ok((Row { op: op.to_owned(), ops: count, seconds, latencies_us, server_cpu_us, bytes: 0 }, results))
}

/// Directories that files are spread over, so that all shards have work.
const DIRECTORIES: usize = 16;

async fn meta(
    client: &Client,
    root: &Root,
    ops: &[String],
    clients: usize,
    depth: usize,
    files: usize,
) -> Result<Vec<Row>> {
    const KNOWN: [&str; 8] = ["mkdir", "create", "lookup", "stat", "readdir", "rename", "unlink", "rmdir"];
    if let Some(unknown) = ops.iter().find(|op| !KNOWN.contains(&op.as_str())) {
        bail!("unknown operation {unknown:?}; there are {}", KNOWN.join(", "));
    }
    let clients: Vec<Client> = (0..clients).map(|_| client.sibling()).collect();
    let mut parents = Vec::new();
    for i in 0..DIRECTORIES {
        parents.push(client.make_directory(root.at.id, &Bytes::from(format!("d{i}")), directory()).await?.id);
    }
    let parents = Arc::new(parents);
    let mut rows = Vec::new();
    // What the operations work on; made without being measured when its own operation was not asked for.
    let mut made: Vec<Resolved> = Vec::new();
    let mut directories: Vec<Resolved> = Vec::new();
    let mut ordered: Vec<&str> = KNOWN.into_iter().filter(|k| ops.iter().any(|op| op == k)).collect();
    if !ordered.contains(&"create") && ordered.iter().any(|op| !["mkdir", "rmdir"].contains(op)) {
        ordered.insert(usize::from(ordered.first() == Some(&"mkdir")), "create");
    }
    if ordered.contains(&"rmdir") && !ordered.contains(&"mkdir") {
        ordered.insert(0, "mkdir");
    }
    for op in ordered {
        let parents = parents.clone();
        let row = match op {
            "mkdir" | "create" => {
                let count = if op == "mkdir" { (files / 10).max(1) } else { files };
                let is_directory = op == "mkdir";
                let each = move |client: Client, i: usize| {
                    let dir = parents[i % DIRECTORIES];
                    async move {
                        let name = Bytes::from(format!("{}{i}", if is_directory { "dir" } else { "file" }));
                        let created = if is_directory {
                            client.make_directory(dir, &name, directory()).await?
                        } else {
                            let attributes = FileAttributes { mode: 0o644, ..FileAttributes::default() };
                            client.write_file(dir, &name, attributes, false, &mut tokio::io::empty()).await?
                        };
                        Ok(Resolved { id: created.id, parent: dir, name, created_at: created.created_at })
                    }
                };
                let (row, results) = measure(&clients, op, count, depth, each).await?;
                if is_directory {
                    directories = results
                } else {
                    made = results
                }
                row
            }
            "readdir" => {
                let each = move |client: Client, i: usize| {
                    let dir = parents[i % DIRECTORIES];
                    async move { Ok(client.read_dir(dir).await?.len()) }
                };
                measure(&clients, op, DIRECTORIES * 4, depth.min(8), each).await?.0
            }
            _ => {
                let targets =
                    Arc::new(if op == "rmdir" { std::mem::take(&mut directories) } else { made.clone() });
                let op_name = op.to_owned();
                let each = move |client: Client, i: usize| {
                    let (at, op) = (targets[i].clone(), op_name.clone());
                    async move {
                        match op.as_str() {
                            "lookup" => drop(client.lookup(at.parent, &at.name).await?),
                            "stat" => drop(client.stat(at.id).await?),
                            "unlink" => client.unlink(&at).await?,
                            "rmdir" => client.remove_directory(&at).await?,
                            _ => {
                                let name = Bytes::from(format!("renamed{i}"));
                                client.rename(&at, at.parent, &name).await?;
                            }
                        }
                        Ok(())
                    }
                };
                let count = if op == "rmdir" { (files / 10).max(1) } else { made.len() };
                let row = measure(&clients, op, count, depth, each).await?.0;
                if op == "rename" {
                    // Under their new names and times.
                    made.clear();
                    for dir in parents_of(client, root).await? {
                        let entries = client.read_dir(dir).await?;
                        made.extend(
                            entries
                                .into_iter()
                                .filter_map(|e| entry(dir, e))
                                .filter(|e| !e.id.is_directory()),
                        );
                    }
                }
                row
            }
        };
        if ops.iter().any(|asked| asked == op) {
            rows.push(row);
        }
    }
    Ok(rows)
}

async fn parents_of(client: &Client, root: &Root) -> Result<Vec<InodeId>> {
    Ok(client.read_dir(root.at.id).await?.into_iter().filter_map(|e| InodeId::from_wire(e.target)).collect())
}

async fn data(client: &Client, root: &Root, files: usize, size: usize, clients: usize) -> Result<Vec<Row>> {
    let clients: Vec<Client> = (0..clients).map(|_| client.sibling()).collect();
    let dir = root.at.id;
    let mut content = vec![0u8; size];
    client.runtime().random.fill(&mut content);
    let content = Bytes::from(content);
    let expected = clutch_proto::crc::of(&content);
    let write = move |client: Client, i: usize| {
        let content = content.clone();
        async move {
            let name = Bytes::from(format!("data{i}"));
            let attributes = FileAttributes { mode: 0o644, ..FileAttributes::default() };
            Ok(client.write_file(dir, &name, attributes, false, &mut &content[..]).await?.id)
        }
    };
    let (mut written, ids) = measure(&clients, "write", files, 1, write).await?;
    let ids = Arc::new(ids);
    let read = move |client: Client, i: usize| {
        let id = ids[i];
        async move {
            let mut crc = 0;
            let mut sink = |bytes: Bytes| {
                crc = clutch_proto::crc::concat(crc, clutch_proto::crc::of(&bytes), bytes.len() as u64);
                Ok(())
            };
            client.read_file(id, &mut sink).await?;
            ensure!(crc == expected, "other bytes were read than were written");
            Ok(())
        }
    };
    let mut back = measure(&clients, "read", files, 1, read).await?.0;
    (written.bytes, back.bytes) = ((files * size) as u64, (files * size) as u64);
    Ok(vec![written, back])
}

fn print(rows: &[Row], as_json: bool) -> Result<()> {
    let percentile =
        |row: &Row, p: usize| row.latencies_us.get(row.latencies_us.len() * p / 100).copied().unwrap_or(0);
    if as_json {
        let rows: Vec<_> = rows
            .iter()
            .map(|row| {
                let mut document = json!({
                    "op": row.op, "ops_per_s": row.ops as f64 / row.seconds, "p50_us": percentile(row, 50),
                    "p99_us": percentile(row, 99), "server_cpu_us_per_op": row.server_cpu_us as f64 / row.ops as f64,
                });
                if row.bytes > 0 {
                    document["mib_per_s"] = json!(row.bytes as f64 / f64::from(1 << 20) / row.seconds);
                }
                document
            })
            .collect();
        return output::json(&json!({ "rows": rows }));
    }
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_header(["operation", "per second", "p50 µs", "p99 µs", "server CPU µs each", "MiB/s"]);
    for row in rows {
        table.add_row([
            row.op.clone(),
            format!("{:.0}", row.ops as f64 / row.seconds),
            percentile(row, 50).to_string(),
            percentile(row, 99).to_string(),
            format!("{:.1}", row.server_cpu_us as f64 / row.ops as f64),
            if row.bytes > 0 {
                format!("{:.0}", row.bytes as f64 / f64::from(1 << 20) / row.seconds)
            } else {
                String::new()
            },
        ]);
    }
    output::line(table)?;
    let total: f64 = rows.iter().map(|r| r.seconds).sum();
    eprintln!(
        "({:.1} s in all; load generator and cluster share this machine)",
        Duration::from_secs_f64(total).as_secs_f64()
    );
    Ok(())
}
