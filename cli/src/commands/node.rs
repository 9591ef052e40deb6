//! `clutch node`.

use std::{process::ExitCode, time::Duration};

use anyhow::{Context as _, Result};
use clutch_runtime::Runtime;
use clutch_server::several::{Several, StartOptions, layout::Layout};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::up::raise_open_files;
use crate::{
    args::{Keep, NodeArgs, parse_retention},
    output::talk,
};

/// What asks the process to end.
struct Stops([Signal; 3]);

impl Stops {
    fn new() -> Result<Stops> {
        let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
        let [interrupt, terminate, hang_up] = kinds.map(signal);
        Ok(Stops([interrupt?, terminate?, hang_up?]))
    }

    async fn next(&mut self) {
        let [interrupt, terminate, hang_up] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hang_up.recv() => {}
        }
    }
}

pub(crate) async fn run(runtime: Runtime, args: &NodeArgs) -> Result<ExitCode> {
    let mut stops = Stops::new()?;
    let started = std::time::Instant::now();
    raise_open_files();
    let settings = Layout::read(&runtime, &args.config)?.settings;
    let retain = settings.retain_log.as_deref().map(parse_retention).transpose();
    let retain = retain.map_err(anyhow::Error::msg).context("node.toml: retain_log")?;
    let options = StartOptions {
        settings: args.config.clone(),
        accept_clock: args.accept_clock,
        retain_log: match retain {
            None | Some(Keep::All) => None,
            Some(Keep::AtMost(ms)) => Some(Duration::from_millis(ms)),
        },
    };
    talk!("clutch: starting; it serves when most of the cluster's nodes run");
    let several = tokio::select! {
        several = Several::start(runtime, options) => several?,
        () = stops.next() => return Ok(ExitCode::FAILURE),
    };
    let (layout, node) = (several.layout(), several.node());
    talk!(
        "clutch: node {} of cluster {} serves from {} ({:.1} s)",
        layout.file.node,
        layout.cluster.cluster,
        layout.dir.display(),
        started.elapsed().as_secs_f64()
    );
    talk!("  listening on {}, reached as {}", node.endpoint(), layout.advertised());
    for notice in node.notices().iter().chain(&node.node_faults()) {
        talk!("  note: {notice}");
    }
    let ended_by_fault = tokio::select! {
        () = stops.next() => false,
        faults = useless(&several) => {
            for fault in faults {
                talk!("clutch: {fault}");
            }
            talk!("clutch: no replica serves any more");
            true
        }
    };
    talk!("clutch: stopping");
    tokio::select! {
        () = several.stop() => talk!("clutch: stopped"),
        () = stops.next() => talk!("clutch: stopped without flushing; the next start replays the log"),
    }
    // Whoever supervises the process must notice.
    Ok(if ended_by_fault { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Completes when nothing useful is served any more: all replicas have stopped for good. Why they have.
async fn useless(several: &Several) -> Vec<String> {
    loop {
        let (faults, serves) = several.node().faults();
        if !serves {
            return faults;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}
