//! The flags of commands for clusters of several nodes.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{parse_address, parse_policy, parse_shards};

#[derive(Args, Debug)]
pub(crate) struct NodeArgs {
    /// The node's `node.toml`, or the directory with it: `clutch cluster init` makes them.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: PathBuf,
    /// Believe the clock also where it is further ahead than the node can have been down. Times in the log never go back: be
    /// sure.
    #[arg(long)]
    pub(crate) accept_clock: bool,
}

#[derive(Subcommand, Debug)]
pub(crate) enum ClusterCommand {
    /// Make the directories of a new cluster's nodes, n1, n2 and so on: each is then carried to its machine, and kept from others, for
    /// it holds the cluster's keys.
    Init(InitArgs),
}

#[derive(Args, Debug)]
pub(crate) struct InitArgs {
    /// The nodes' directories are made under this one, which must be empty or not be there.
    #[arg(long)]
    pub(crate) dir: PathBuf,
    /// Where a node listens and is reached; once for each node, node 1 first. Three bear the loss of one, five of two.
    #[arg(long = "node", value_name = "HOST:PORT", value_parser = parse_address, required = true)]
    pub(crate) nodes: Vec<String>,
    /// Metadata shards, a power of two. Each has a member on every node.
    #[arg(long, default_value_t = 4, value_parser = parse_shards)]
    pub(crate) shards: u32,
    /// Disks, spread over the nodes; a node is one failure domain.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) disks: u32,
    /// Data and parity blocks of new files' spans, as D+P.
    #[arg(long, default_value = "4+2", value_parser = parse_policy, value_name = "D+P")]
    pub(crate) policy: (u32, u32),
}
