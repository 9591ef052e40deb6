//! `clutch up`.

use std::{process::ExitCode, time::Duration};

use anyhow::Result;
use clutch_runtime::Runtime;
use clutch_server::up::{Up, UpConfig};
use clutch_shard::Lifetimes;

use crate::{
    args::{Keep, UpArgs, seconds},
    output::talk,
};

/// Below this many open files a cluster of many shards, or one with many clients, meets the limit.
const OPEN_FILES_LOW: u64 = 4096;

/// Raises the limit of open files as far as it goes without privileges: the usual soft limit of 1,024 is for programs that
/// use `select`, and databases and sessions need more.
pub(crate) fn raise_open_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if limit.current < limit.maximum || limit.maximum.is_none() {
        let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
        if let Err(error) = setrlimit(Resource::Nofile, raised) {
            tracing::warn!(%error, "raise the limit of open files");
        }
    }
    if let Some(most) = getrlimit(Resource::Nofile).current.filter(|most| *most < OPEN_FILES_LOW) {
        talk!(
            "clutch: at most {most} files may be open at a time (ulimit -n); {OPEN_FILES_LOW} or more are advised"
        );
    }
}

pub(crate) async fn run(runtime: Runtime, args: &UpArgs) -> Result<ExitCode> {
    let mut interrupted = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())?;
    let mut terminated = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let mut hung_up = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::hangup())?;
    let started = std::time::Instant::now();
    raise_open_files();
    let config = UpConfig {
        dir: args.dir.clone(),
        listen: args.listen.as_str().into(),
        advertise: args.advertise.clone(),
        shards: args.shards,
        disks: args.disks,
        policy: args.policy,
        segment_bytes_max: args.segment_mib << 20,
        lifetimes: Lifetimes { grant_ms: args.grant_s * 1000, transient_ms: args.unfinished_s * 1000 },
        clock_skew_ms_max: args.clock_skew_s * 1000,
        accept_clock: args.accept_clock,
        reserve_bytes: args.reserve_mib.map(|mib| mib << 20),
        retain_log: match args.retain_log {
            Keep::All => None,
            Keep::AtMost(ms) => Some(Duration::from_millis(ms)),
        },
        collect_pause: Some(seconds(args.collect_every_s)).filter(|pause| !pause.is_zero()),
    };
    let up = tokio::select! {
        up = Up::start(runtime, config) => up?,
        _ = interrupted.recv() => return Ok(ExitCode::FAILURE),
        _ = terminated.recv() => return Ok(ExitCode::FAILURE),
        _ = hung_up.recv() => return Ok(ExitCode::FAILURE),
    };
    let cluster = &up.cluster;
    let address = up.node().endpoint();
    let what = if up.created { "made" } else { "opened" };
    talk!(
        "clutch: {what} cluster {} in {} ({:.1} s)",
        cluster.cluster,
        args.dir.display(),
        started.elapsed().as_secs_f64()
    );
    talk!(
        "  registry, CDC, {} shards, {} disks, policy {}+{}, log engine local",
        cluster.shards,
        cluster.disks.len(),
        cluster.data_blocks,
        cluster.parity_blocks
    );
    talk!("  listening on {address}; in another terminal:");
    talk!("    export CLUTCH_REGISTRY={address}");
    talk!("    clutch fs put FILE /FILE && clutch fs ls -l /");
    talk!("  Ctrl-C stops it.");
    if let Some(registered) = up.registered().filter(|registered| *registered != address.to_string()) {
        let hint = match args.advertise {
            Some(_) => "",
            None => ", which only this machine reaches; say --advertise HOST:PORT for others",
        };
        talk!("  registered as {registered}{hint}");
    }
    let blocks = cluster.data_blocks + cluster.parity_blocks;
    if (cluster.disks.len() as u32) < blocks {
        talk!(
            "  note: files over 255 bytes need {blocks} disks and there are {}; writing one will be refused (no space)",
            cluster.disks.len()
        );
    }
    for notice in up.node().notices().iter().chain(&up.node().node_faults()) {
        talk!("  note: {notice}");
    }
    let ended_by_fault = tokio::select! {
        _ = interrupted.recv() => false,
        _ = terminated.recv() => false,
        _ = hung_up.recv() => false,
        faults = useless(&up) => {
            for fault in faults {
                talk!("clutch: {fault}");
            }
            talk!("clutch: no replica serves any more");
            true
        }
    };
    talk!("clutch: stopping");
    tokio::select! {
        () = up.stop() => talk!("clutch: stopped"),
        _ = interrupted.recv() => talk!("clutch: stopped without flushing; the next start replays the log"),
    }
    // Whoever supervises the process must notice.
    Ok(if ended_by_fault { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Completes when nothing useful is served any more: all replicas have stopped for good. Why they have.
async fn useless(up: &Up) -> Vec<String> {
    loop {
        let (faults, serves) = up.node().faults();
        if !serves {
            return faults;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}
