//! `clutch bench`: how fast this cluster is, seen from here.
//!
//! Rows say operations per second, latency at the 50th and 99th percentile, and the processor time of the serving
//! process for each operation, which is the figure that a noisy machine spares. With `clutch up` one process
//! serves everything, so its time is the cluster's.

use std::{
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Instant,
};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use clutch_client::{Client, FileAttributes, Resolved};
use clutch_proto::{
    InodeId,
    admin::{AdminRequest, Status, admin_request::Op},
    session::Role,
};
use clutch_server::handler::process_usage;
use serde_json::json;
use tokio::task::JoinSet;

use crate::{
    args::BenchCommand,
    interrupt::{self, Cleanup},
    output::{self, talk},
};

mod data;
mod meta;
mod table;

pub(crate) async fn run(client: Arc<Client>, command: &BenchCommand) -> Result<ExitCode> {
    let (rows, as_json) = match command {
        BenchCommand::Meta { ops, clients, depth, files, json } => {
            ensure!(*clients > 0 && *depth > 0 && *files > 0, "clients, depth and files must be above 0");
            let load = Load { clients: (0..*clients).map(|_| client.sibling()).collect(), depth: *depth };
            let workload =
                meta::Workload { ops, files: *files, directories: (files / 10).max(1), parents: 16 };
            let (_cleanup, root) = (Cleanup::new(), Root::make(&client).await?);
            let rows = until_interrupted(meta::rows(&client, &root, &workload, &load)).await;
            root.remove(&client).await?;
            (rows, *json)
        }
        BenchCommand::Data { files, size_mib, clients, json } => {
            ensure!(*clients > 0 && *files > 0 && *size_mib > 0, "clients, files and size must be above 0");
            let (_cleanup, root) = (Cleanup::new(), Root::make(&client).await?);
            let rows = until_interrupted(data::rows(&client, &root, *files, *size_mib << 20, *clients)).await;
            root.remove(&client).await?;
            (rows, *json)
        }
        BenchCommand::Table(args) => return table::run(args).await,
    };
    print(&rows?, as_json)?;
    Ok(ExitCode::SUCCESS)
}

/// Ends the work, not what comes after it, when the command is interrupted.
async fn until_interrupted(rows: impl Future<Output = Result<Vec<Row>>>) -> Result<Vec<Row>> {
    tokio::select! {
        rows = rows => rows,
        () = interrupt::interrupted() => bail!("interrupted"),
    }
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

fn entry(parent: InodeId, entry: clutch_proto::listing::DirEntry) -> Option<Resolved> {
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

/// Who asks, and how much at a time.
struct Load {
    /// Each with sessions of its own.
    clients: Vec<Client>,
    /// Requests that each keeps in flight.
    depth: usize,
}

struct Row {
    op: String,
    ops: usize,
    seconds: f64,
    latencies_us: Vec<u64>,
    server_cpu_us: u64,
    client_cpu_us: u64,
    /// Directory entries that were read; 0 where none are.
    entries: usize,
    /// File bytes that were moved; 0 where none are.
    bytes: u64,
}

impl Row {
    /// What a rate counts: directory entries where there are some, else operations.
    fn units(&self) -> f64 {
        (if self.entries > 0 { self.entries } else { self.ops }) as f64
    }

    /// Latency that so many per cent of the operations stayed below, in microseconds.
    fn percentile(&self, percent: usize) -> u64 {
        self.latencies_us.get(self.latencies_us.len() * percent / 100).copied().unwrap_or(0)
    }
}

/// The serving process's time so far.
async fn server_cpu_us(client: &Client) -> Result<u64> {
    let reply =
        client.admin(Role::Registry, 0, AdminRequest { op: Some(Op::Status(Status::default())) }).await?;
    Ok(reply.status.context("an answer without a status")?.process_cpu_us)
}

/// The benchmark's own time so far.
fn client_cpu_us() -> u64 {
    process_usage().map_or(0, |(cpu_us, _)| cpu_us)
}

/// What one worker saw: latencies, and results with the numbers of their operations.
type Measured<T> = (Vec<u64>, Vec<(usize, T)>);

/// Runs `count` operations and measures every one.
async fn measure<F, Fut, T>(load: &Load, op: &str, count: usize, each: F) -> Result<(Row, Vec<T>)>
where
    F: Fn(Client, usize) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = Result<T>> + Send,
    T: Send + 'static,
{
    let before = (server_cpu_us(&load.clients[0]).await?, client_cpu_us());
    let next = Arc::new(AtomicUsize::new(0));
    let start = Instant::now();
    let bar = output::bar(op, count as u64);
    let mut workers: JoinSet<Result<Measured<T>>> = JoinSet::new();
    for client in &load.clients {
        for _ in 0..load.depth {
            let (client, next, each, bar) = (client.clone(), next.clone(), each.clone(), bar.clone());
            workers.spawn(async move {
                let (mut latencies, mut results) = (Vec::new(), Vec::new());
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= count {
                        return Ok((latencies, results));
                    }
                    let begin = Instant::now();
                    results.push((number, each(client.clone(), number).await?));
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
    let client_cpu_us = client_cpu_us().saturating_sub(before.1);
    let server_cpu_us = server_cpu_us(&load.clients[0]).await?.saturating_sub(before.0);
    latencies_us.sort_unstable();
    results.sort_unstable_by_key(|(number, _)| *number);
    let results = results.into_iter().map(|(_, result)| result).collect();
    let (op, ops) = (op.to_owned(), count);
    let row = Row { op, ops, seconds, latencies_us, server_cpu_us, client_cpu_us, entries: 0, bytes: 0 };
    Ok((row, results))
}

/// A row as scripts read it.
fn document(row: &Row) -> serde_json::Value {
    let mut document = json!({
        "op": row.op, "ops_per_s": row.ops as f64 / row.seconds,
        "p50_us": row.percentile(50), "p99_us": row.percentile(99),
        "server_cpu_us_per_op": row.server_cpu_us as f64 / row.ops as f64,
        "client_cpu_us_per_op": row.client_cpu_us as f64 / row.ops as f64,
    });
    if row.entries > 0 {
        document["entries_per_s"] = json!(row.entries as f64 / row.seconds);
        document["server_cpu_us_per_entry"] = json!(row.server_cpu_us as f64 / row.entries as f64);
    }
    if row.bytes > 0 {
        document["mib_per_s"] = json!(row.bytes as f64 / f64::from(1 << 20) / row.seconds);
    }
    document
}

/// A row as people read it: name, rate, latencies, processor times.
fn cells(row: &Row) -> Vec<String> {
    let rate = match row {
        Row { bytes: 1.., .. } => {
            format!("{:.0} MiB/s", row.bytes as f64 / f64::from(1 << 20) / row.seconds)
        }
        Row { entries: 1.., .. } => format!("{:.0} entries/s", row.entries as f64 / row.seconds),
        _ => format!("{:.0}", row.ops as f64 / row.seconds),
    };
    let each = |cpu_us: u64| match row.bytes {
        0 => {
            let each = cpu_us as f64 / row.units();
            if each < 1.0 { format!("{each:.3}") } else { format!("{each:.1}") }
        }
        bytes => format!("{:.0} /MiB", cpu_us as f64 / (bytes as f64 / f64::from(1 << 20))),
    };
    vec![
        row.op.clone(),
        rate,
        row.percentile(50).to_string(),
        row.percentile(99).to_string(),
        each(row.server_cpu_us),
        each(row.client_cpu_us),
    ]
}

const HEADER: [&str; 6] =
    ["operation", "per second", "p50 µs", "p99 µs", "server CPU µs each", "client CPU µs each"];

fn print(rows: &[Row], as_json: bool) -> Result<()> {
    if as_json {
        return output::json(&json!({ "rows": rows.iter().map(document).collect::<Vec<_>>() }));
    }
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_header(HEADER);
    for row in rows {
        table.add_row(cells(row));
    }
    output::block(table)?;
    let total: f64 = rows.iter().map(|r| r.seconds).sum();
    talk!("({total:.1} s in all; load generator and cluster share this machine)");
    Ok(())
}
