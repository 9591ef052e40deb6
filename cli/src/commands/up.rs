//! `clutch up`.

use std::{process::ExitCode, time::Duration};

use anyhow::Result;
use clutch_runtime::Runtime;
use clutch_server::{
    healer::HealSettings,
    up::{Up, UpConfig},
};
use clutch_shard::Lifetimes;

use super::serving::{Stops, raise_open_files};
use crate::{
    args::{Keep, UpArgs, seconds},
    http, keyring,
    output::talk,
};

fn config(args: &UpArgs) -> UpConfig {
    UpConfig {
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
        heal: HealSettings {
            rebuild_after: seconds(args.rebuild_after_s),
            scrub_every: seconds(args.scrub_every_s),
            ..HealSettings::default()
        },
        collect_pause: Some(seconds(args.collect_every_s)).filter(|pause| !pause.is_zero()),
    }
}

pub(crate) async fn run(runtime: Runtime, args: &UpArgs) -> Result<ExitCode> {
    let mut stops = Stops::new()?;
    let started = std::time::Instant::now();
    raise_open_files();
    let monitored = http::listen(args.metrics.as_deref()).await?;
    let up = tokio::select! {
        up = Up::start(runtime, config(args)) => up?,
        () = stops.next() => return Ok(ExitCode::FAILURE),
    };
    monitored.of(up.node().watch().clone());
    let cluster = &up.cluster;
    let address = up.node().endpoint();
    let _published =
        keyring::publish(cluster.cluster_id()?, &address.to_string(), &args.dir.join("keys/cluster.key"));
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
    let ended_by_fault = stops.serve(up.node()).await;
    Ok(stops.end(up.stop(), ended_by_fault).await)
}
