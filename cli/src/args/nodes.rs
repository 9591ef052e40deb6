//! The flags of commands for clusters of several nodes.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{Which, parse_address, parse_policy, parse_shards};

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
    /// Make the directory of a node that is to be added to a running cluster. It is carried to its machine and started there, and
    /// becomes a member of logs by `add-replica` or `replace-node`.
    Join(JoinArgs),
    /// Make a node a member of logs: it gets what they have, and votes as soon as it has it.
    AddReplica(NodeChange),
    /// Let a node be no member of logs any more. What it has of them stays on its disk.
    RemoveReplica(NodeChange),
    /// Put one node in the place of another in every log, one log after the other. Told again, it goes on where it stopped.
    ReplaceNode {
        /// The node that goes; it may be gone already.
        node: u64,
        /// The node that comes.
        #[arg(long, value_name = "NODE")]
        with: u64,
    },
    /// Let a node be no member of any log any more, so that it can be switched off for good.
    RemoveNode {
        /// The node that goes.
        node: u64,
    },
    /// Let another member lead.
    MoveLeader {
        /// Who is to lead.
        #[arg(long, value_name = "NODE")]
        to: u64,
        #[command(flatten)]
        which: Option<Which>,
    },
    /// Let others lead what a node leads: before it is looked after.
    Drain {
        /// The node.
        node: u64,
    },
}

/// What is changed, and by whom.
#[derive(Args, Debug)]
pub(crate) struct NodeChange {
    /// The node.
    pub(crate) node: u64,
    #[command(flatten)]
    pub(crate) which: Option<Which>,
}

#[derive(Args, Debug)]
pub(crate) struct JoinArgs {
    /// The new node's directory, which must be empty or not be there.
    #[arg(long)]
    pub(crate) dir: PathBuf,
    /// The directory of any node of the cluster: the cluster's keys and what all nodes know are taken from it.
    #[arg(long, value_name = "DIR")]
    pub(crate) from: PathBuf,
    /// Where the new node listens and is reached.
    #[arg(long = "node", value_name = "HOST:PORT", value_parser = parse_address)]
    pub(crate) address: String,
    /// Disks that it brings.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(0..=256))]
    pub(crate) disks: u32,
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
