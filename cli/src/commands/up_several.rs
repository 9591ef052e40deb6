//! `clutch up --replicas N`: the nodes of a cluster of several in one process, for a trial.

use std::{path::Path, process::ExitCode};

use anyhow::{Context as _, Result, bail, ensure};
use clutch_runtime::Runtime;
use clutch_server::several::{
    Several,
    layout::{Layout, NewCluster},
};
use futures_util::future::{join_all, select_all, try_join_all};

use super::{
    node,
    serving::{Stops, raise_open_files, useless},
};
use crate::{args::UpArgs, keyring, output::talk};

/// Where the nodes listen: on as many ports one behind the other.
fn addresses(listen: &str, count: u16) -> Result<Vec<String>> {
    let (host, port) = listen.rsplit_once(':').context("an address is HOST:PORT")?;
    let port: u16 = port.parse().context("a port is a number")?;
    ensure!(port > 0, "port 0 leads nowhere: name the first of {count} ports");
    let address = |n| port.checked_add(n).map(|port| format!("{host}:{port}"));
    let addresses: Option<Vec<String>> = (0..count).map(address).collect();
    addresses.with_context(|| format!("there are not {count} ports from {port} on"))
}

/// The nodes of a directory, which is made where it is not there.
fn layouts(runtime: &Runtime, args: &UpArgs) -> Result<Vec<Layout>> {
    let count = args.replicas;
    let dir_of = |n: u16| args.dir.join(format!("n{n}"));
    if !dir_of(1).exists() {
        let new = NewCluster {
            dir: args.dir.clone(),
            nodes: addresses(&args.listen, count)?,
            shards: args.shards.unwrap_or(4),
            disks: args.disks.unwrap_or(8),
            policy: args.policy.unwrap_or((4, 2)),
        };
        let cluster = new.create(runtime)?;
        talk!("clutch: made cluster {} of {count} nodes in {}", cluster.cluster, args.dir.display());
    }
    if !dir_of(count).exists() || dir_of(count + 1).exists() {
        bail!(
            "{} has another number of nodes than {count}: say --replicas as it was made",
            args.dir.display()
        );
    }
    (1..=count).map(|n| Layout::read(runtime, Path::new(&dir_of(n)))).collect()
}

pub(crate) async fn run(runtime: Runtime, args: &UpArgs) -> Result<ExitCode> {
    let mut stops = Stops::new()?;
    let started = std::time::Instant::now();
    raise_open_files();
    let mut starting = Vec::new();
    for layout in layouts(&runtime, args)? {
        let options = node::options(&layout, false)?;
        starting.push(Several::start(runtime.clone(), layout, options));
    }
    // None serves before most of them do.
    let nodes = tokio::select! {
        nodes = try_join_all(starting) => nodes?,
        () = stops.next() => return Ok(ExitCode::FAILURE),
    };
    let (mut published, mut registry) = (Vec::new(), Vec::new());
    for several in &nodes {
        let (layout, address) = (several.layout(), several.layout().advertised());
        let key = layout.dir.join("keys/cluster.key");
        let copies = keyring::publish(layout.cluster.cluster_id()?, &address, &key);
        published.push(tokio::spawn(keyring::follow(copies, key, several.key_changes())));
        registry.push(address);
    }
    let seconds = started.elapsed().as_secs_f64();
    talk!("clutch: {} nodes serve from {}, in one process ({seconds:.1} s)", nodes.len(), args.dir.display());
    talk!("  how each runs is in {}/nN/node.toml; one alone is started by clutch node", args.dir.display());
    talk!("  listening on {}; in another terminal:", registry.join(","));
    talk!("    export CLUTCH_REGISTRY={}", registry.join(","));
    talk!("    clutch status && clutch fs put FILE /FILE && clutch fs ls -l /");
    talk!("  Ctrl-C stops it.");
    let ends = nodes.iter().map(|several| {
        Box::pin(async move {
            tokio::select! {
                why = several.condemned() => vec![why],
                faults = useless(several.node()) => faults,
            }
        })
    });
    let ended_by_fault = tokio::select! {
        () = stops.next() => false,
        (faults, number, _) = select_all(ends) => {
            for fault in faults {
                talk!("clutch: node {}: {fault}", number + 1);
            }
            true
        }
    };
    let stop = async {
        join_all(nodes.into_iter().map(Several::stop)).await;
    };
    Ok(stops.end(stop, ended_by_fault).await)
}
