//! `clutch node`.

use std::{process::ExitCode, time::Duration};

use anyhow::{Context as _, Result};
use clutch_runtime::Runtime;
use clutch_server::several::{Several, StartOptions, layout::Layout};

use super::serving::{Stops, raise_open_files};
use crate::{
    args::{Keep, NodeArgs, parse_retention},
    http, keyring,
    output::talk,
};

/// How a node is started, by its settings.
pub(super) fn options(layout: &Layout, accept_clock: bool) -> Result<StartOptions> {
    let retain = layout.settings.retain_log.as_deref().map(parse_retention).transpose();
    let retain_log = match retain.map_err(anyhow::Error::msg).context("node.toml: retain_log")? {
        None | Some(Keep::All) => None,
        Some(Keep::AtMost(ms)) => Some(Duration::from_millis(ms)),
    };
    Ok(StartOptions { accept_clock, retain_log })
}

pub(crate) async fn run(runtime: Runtime, args: &NodeArgs) -> Result<ExitCode> {
    let mut stops = Stops::new()?;
    let started = std::time::Instant::now();
    raise_open_files();
    let layout = Layout::read(&runtime, &args.config)?;
    let monitored = http::listen(layout.settings.metrics.as_deref()).await?;
    let options = options(&layout, args.accept_clock)?;
    talk!("clutch: starting; it serves when most of the cluster's nodes run");
    let several = tokio::select! {
        several = Several::start(runtime, layout, options) => several?,
        () = stops.next() => return Ok(ExitCode::FAILURE),
    };
    let (layout, node) = (several.layout(), several.node());
    monitored.of(node.watch().clone());
    let key = layout.dir.join("keys/cluster.key");
    let published = keyring::publish(layout.cluster.cluster_id()?, &layout.advertised(), &key);
    let following = tokio::spawn(keyring::follow(published, key, several.key_changes()));
    talk!(
        "clutch: node {} of cluster {} serves from {} ({:.1} s)",
        layout.file.node,
        layout.cluster.cluster,
        layout.dir.display(),
        started.elapsed().as_secs_f64()
    );
    talk!("  listening on {}, reached as {}", node.endpoint(), layout.advertised());
    let (number, (not_kept, logs)) = (layout.file.node, node.not_kept());
    if not_kept > 0 {
        talk!(
            "  note: it is no member of {not_kept} of {logs} logs, and serves its disks. To make it one: clutch cluster add-replica \
             {number} --all"
        );
    }
    for notice in node.notices().iter().chain(&node.node_faults()) {
        talk!("  note: {notice}");
    }
    let ended_by_fault = tokio::select! {
        by_fault = stops.serve(node) => by_fault,
        why = several.condemned() => {
            talk!("clutch: {why}");
            true
        }
    };
    let ended = stops.end(several.stop(), ended_by_fault).await;
    // Takes the copies with it.
    following.abort();
    let _ = following.await;
    Ok(ended)
}
