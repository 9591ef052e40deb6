//! `clutch up`.

use std::{process::ExitCode, time::Duration};

use anyhow::Result;
use clutch_runtime::Runtime;
use clutch_server::up::{Up, UpConfig};
use clutch_shard::Lifetimes;

use crate::args::UpArgs;

pub(crate) async fn run(runtime: Runtime, args: &UpArgs) -> Result<ExitCode> {
    let mut interrupted = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())?;
    let mut terminated = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let started = std::time::Instant::now();
    let config = UpConfig {
        dir: args.dir.clone(),
        listen: args.listen.as_str().into(),
        shards: args.shards,
        disks: args.disks,
        policy: args.policy,
        segment_bytes_max: args.segment_mib << 20,
        lifetimes: Lifetimes { grant_ms: args.grant_s * 1000, transient_ms: args.unfinished_s * 1000 },
        clock_skew_ms_max: args.clock_skew_s * 1000,
        collect_pause: Some(Duration::from_secs(args.collect_every_s)).filter(|pause| !pause.is_zero()),
    };
    let up = tokio::select! {
        up = Up::start(runtime, config) => up?,
        _ = interrupted.recv() => return Ok(ExitCode::FAILURE),
        _ = terminated.recv() => return Ok(ExitCode::FAILURE),
    };
    let cluster = &up.cluster;
    let address = up.node().endpoint();
    let what = if up.created { "made" } else { "opened" };
    eprintln!(
        "clutch: {what} cluster {} in {} ({:.1} s)",
        cluster.cluster,
        args.dir.display(),
        started.elapsed().as_secs_f64()
    );
    eprintln!(
        "  registry, CDC, {} shards, {} disks, policy {}+{}, log engine local",
        cluster.shards,
        cluster.disks.len(),
        cluster.data_blocks,
        cluster.parity_blocks
    );
    eprintln!("  listening on {address}; in another terminal:");
    eprintln!("    export CLUTCH_REGISTRY={address}");
    eprintln!("    clutch fs put FILE /FILE && clutch fs ls -l /");
    eprintln!("  Ctrl-C stops it.");
    let blocks = cluster.data_blocks + cluster.parity_blocks;
    if (cluster.disks.len() as u32) < blocks {
        eprintln!(
            "  note: files over 255 bytes need {blocks} disks and there are {}; writing one will be refused (no space)",
            cluster.disks.len()
        );
    }
    tokio::select! {
        _ = interrupted.recv() => {}
        _ = terminated.recv() => {}
    }
    eprintln!("clutch: stopping");
    tokio::select! {
        () = up.stop() => eprintln!("clutch: stopped"),
        _ = interrupted.recv() => eprintln!("clutch: stopped without flushing; the next start replays the log"),
    }
    Ok(ExitCode::SUCCESS)
}
