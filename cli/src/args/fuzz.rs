//! The flags of `clutch fuzz`.

use std::path::PathBuf;

use clap::Args;
use clutch_integration::script::REPLICAS_MAX;

use super::{parse_count, parse_threads};

/// What keeps the logs of simulated clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum FuzzEngine {
    /// Logs outside the nodes, with every unpleasant outcome on demand.
    Sim,
    /// The engine of one node, on its simulated disk.
    Local,
    /// Consensus between nodes, on their simulated disks.
    Raft,
}

/// What `clutch fuzz` lays stress on.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FuzzProfile {
    /// Everything.
    Mixed,
    /// Names and attributes.
    Metadata,
    /// Bytes, on bad disks.
    Data,
    /// No faults.
    Calm,
}

#[derive(Args, Debug)]
pub(crate) struct FuzzArgs {
    /// Run so many seeds; 100 when nothing else is said.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) seeds: Option<u64>,
    /// Run one seed.
    #[arg(long, conflicts_with_all = ["seeds", "minutes", "script"])]
    pub(crate) seed: Option<u64>,
    /// Begin no new seed after so many minutes.
    #[arg(long, value_parser = parse_minutes)]
    pub(crate) minutes: Option<f64>,
    /// The first seed; drawn when it is not given.
    #[arg(long, conflicts_with = "seed")]
    pub(crate) first_seed: Option<u64>,
    /// Run a script, as a failure leaves it behind.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["seeds", "minutes", "trace", "first_seed"])]
    pub(crate) script: Option<PathBuf>,
    /// Run the operations of a trace, each seed under faults of its own.
    #[arg(long, value_name = "FILE")]
    pub(crate) trace: Option<PathBuf>,
    /// What the scripts are like.
    #[arg(long, value_enum, default_value_t = FuzzProfile::Mixed, conflicts_with_all = ["trace", "script"])]
    pub(crate) profile: FuzzProfile,
    /// Members of each log, 1 to 7: with more than one they elect a leader, and faults strike leaders and followers. One when
    /// nothing else is said, three with `--engine raft`.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(REPLICAS_MAX)), conflicts_with = "script")]
    pub(crate) replicas: Option<u32>,
    /// What keeps the logs; with one member and nothing said, `local` or `sim` as drawn, with several `sim`.
    #[arg(long, value_enum, conflicts_with = "script")]
    pub(crate) engine: Option<FuzzEngine>,
    /// Threads, each with worlds of its own; one world never uses more than one.
    #[arg(long, value_name = "N", value_parser = parse_threads, conflicts_with = "script")]
    pub(crate) jobs: Option<usize>,
    /// Seeds divisible by this run twice and must give the same trace; 0 for none.
    #[arg(long, default_value_t = 20, value_name = "N")]
    pub(crate) repeat_every: u64,
    /// Stop after so many failing seeds.
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = parse_count)]
    pub(crate) failures_max: usize,
    /// Fail unless every kind of fault has struck so often.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) require_faults: u64,
    /// Where scripts and timelines of failures are stored.
    #[arg(long, default_value = ".", value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Leave failures as long as they are.
    #[arg(long)]
    pub(crate) no_shrink: bool,
    /// Print the script of `--seed` instead of running it.
    #[arg(long, requires = "seed", conflicts_with_all = ["trace", "script"])]
    pub(crate) print: bool,
    /// Print one JSON document.
    #[arg(long)]
    pub(crate) json: bool,
}

fn parse_minutes(text: &str) -> Result<f64, String> {
    let minutes: f64 = text.parse().map_err(|_| format!("{text:?} is not a number of minutes"))?;
    if minutes > 0.0 && minutes < 1e6 {
        Ok(minutes)
    } else {
        Err("more than 0 and fewer than 10^6 minutes".into())
    }
}
