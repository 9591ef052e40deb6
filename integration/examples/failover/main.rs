//! Does to real nodes under load what happens to machines and networks, one log's leader after another, and lets the harness's
//! checkers say whether anything was lost, or done twice, or seen too early.
//!
//! ```text
//! scripts/three.sh DIR PORT
//! cargo run --release -p clutch-integration --example failover -- DIR PORT ROUNDS [SEED [FAULT,... [FILES]]]
//! ```
//!
//! Each round does one of the faults (`kill`, when none are named) to the node that leads a log, measures how long it takes until
//! something that was asked after that is acknowledged of the log, and undoes it. At the end the logs are read, every request is held
//! against them, and all members of a log must have the same state. With FILES there are so many before it begins. Faults of the network need scripts/namespaces.sh around it.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Result, bail, ensure};
use clutch_log::LogId;
use rand::{SeedableRng as _, rngs::StdRng};

use crate::{faults::Fault, trial::Trial};

mod faults;
mod flips;
mod judge;
mod load;
mod replace;
mod trial;

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [dir, port, rounds, rest @ ..] = &arguments[..] else {
        bail!(
            "say DIR PORT ROUNDS [SEED [FAULT,... [FILES]]], of a cluster that scripts/three.sh has started"
        );
    };
    let rounds: u32 = rounds.parse()?;
    let seed: u64 = rest.first().map_or(Ok(1), |seed| seed.parse())?;
    let faults = rest.get(1).map_or(Ok(vec![Fault::Kill]), |names| faults::of_names(names))?;
    let files: usize = rest.get(2).map_or(Ok(0), |files| files.parse())?;
    let namespaces = std::env::var("CLUTCH_NAMESPACES").ok();
    ensure!(
        namespaces.is_some() || !faults.iter().any(|fault| fault.needs_namespaces()),
        "faults of the network need namespaces: run this under scripts/namespaces.sh"
    );
    let mut trial = Trial::new(PathBuf::from(dir), port.parse()?, namespaces)?;
    let operator = trial.client(None);
    trial.shards = operator.refresh_map().await?.shards.len() as u32;
    let (trial, stop) = (Arc::new(trial), Arc::new(AtomicBool::new(false)));
    load::fill(&trial, files).await?;
    let lanes = load::begin(&trial, seed, &stop).await?;
    let mut random = StdRng::seed_from_u64(seed);
    let mut times: BTreeMap<String, Vec<Duration>> = BTreeMap::new();
    for round in 0..rounds {
        trial.whole(&operator).await?;
        let logs = trial.logs();
        let log = logs[round as usize % logs.len()];
        let fault = faults[(round as usize + round as usize / faults.len()) % faults.len()];
        let (node, took) = trial.strike(fault, &operator, log, &mut random).await?;
        let Some(took) = took else {
            println!("{round:>3}: {fault:?}, node {node}, {log}");
            continue;
        };
        println!(
            "{round:>3}: {fault:?} of node {node}; {log} acknowledged again after {} ms",
            took.as_millis()
        );
        let kind = match log {
            LogId::REGISTRY => "registry",
            LogId::CDC => "cdc",
            _ => "shards",
        };
        times.entry(format!("{fault:?}, {kind}")).or_default().push(took);
        times.entry(format!("{fault:?}")).or_default().push(took);
    }
    trial.whole(&operator).await?;
    stop.store(true, Ordering::Relaxed);
    for lane in lanes {
        lane.await?;
    }
    trial.whole(&operator).await?;
    judge::judge(&trial, &operator, times).await
}
