//! The flags of commands for clusters of several nodes.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{Keep, StatusArgs, Which, parse_address, parse_policy, parse_retention, parse_shards};

/// How long an invitation may be good: what the registry allows.
const LIFETIME_MS_MAX: u64 = clutch_proto::rules::v1::INVITATION_LIFETIME_MS_MAX;

fn parse_lifetime(text: &str) -> Result<u64, String> {
    match parse_retention(text)? {
        Keep::AtMost(ms) if ms <= LIFETIME_MS_MAX => Ok(ms),
        _ => Err("a token is good for 30 days at most: write for example 1h".into()),
    }
}

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
    /// Print a token by which one node can join, once: for `join`, on the new node's machine.
    Invite(InviteArgs),
    /// Make the directory of a node that is to be added to a running cluster: by a token, on the node's machine; or from the directory of
    /// another node, and then it is carried to its machine. It becomes a member of logs by `add-replica` or `replace-node`.
    Join(JoinArgs),
    /// Go to another key by which the nodes know each other, while the cluster runs: all believe it, then all use it; with --finish, all forget
    /// the one before.
    RotateKey(RotateArgs),
    /// What `clutch status` shows.
    Status(StatusArgs),
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
pub(crate) struct RotateArgs {
    /// Let all nodes forget the key before, when what was granted under it is over.
    #[arg(long)]
    pub(crate) finish: bool,
    /// Also where it is not over.
    #[arg(long, requires = "finish")]
    pub(crate) at_once: bool,
    /// Go on without this node, which is gone for good; once for each.
    #[arg(long, value_name = "NODE")]
    pub(crate) without: Vec<u64>,
}

#[derive(Args, Debug)]
pub(crate) struct InviteArgs {
    /// How long the token is good, for example 30m, 12h or 7d; 30 days at most.
    #[arg(long = "for", value_name = "TIME", default_value = "1h", value_parser = parse_lifetime)]
    pub(crate) lifetime_ms: u64,
}

#[derive(Args, Debug)]
pub(crate) struct JoinArgs {
    /// The new node's directory, which must be empty or not be there.
    #[arg(long)]
    pub(crate) dir: PathBuf,
    /// What `clutch cluster invite` has printed; `-` reads it from standard input, so that others on the machine do not see it.
    #[arg(long, required_unless_present = "from")]
    pub(crate) token: Option<String>,
    /// In the place of a token: the directory of any node of the cluster, from which the cluster's keys and what all nodes know are taken.
    #[arg(long, value_name = "DIR", conflicts_with = "token")]
    pub(crate) from: Option<PathBuf>,
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
