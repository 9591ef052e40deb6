//! Every flag, once.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{Args, Parser, Subcommand};

use clutch_client::{INLINE_FILE_BYTES_DEFAULT, Registries};
use clutch_proto::limits::{INLINE_BYTES_MAX, INLINE_FILE_BYTES_MAX};
use clutch_runtime::Endpoint;

pub(crate) use self::{
    blocks::{BlocksCommand, Pace},
    fuzz::{FuzzArgs, FuzzEngine, FuzzProfile},
    nodes::{ClusterCommand, InitArgs, InviteArgs, JoinArgs, NodeArgs, RotateArgs},
};
use crate::remote::RemotePath;

mod blocks;
mod fuzz;
mod nodes;

/// Clutch: a distributed filesystem whose metadata is a set of replicated logs.
#[derive(Parser, Debug)]
#[command(
    name = "clutch",
    version,
    about,
    propagate_version = true,
    subcommand_required = true,
    arg_required_else_help = true
)]
pub(crate) struct Cli {
    /// The registry that commands ask: one address, or those of its members with commas between them, all of one cluster. One that
    /// answers is enough.
    #[arg(
        long,
        global = true,
        env = "CLUTCH_REGISTRY",
        default_value = "127.0.0.1:7400",
        value_name = "HOST:PORT,..."
    )]
    pub(crate) registry: String,
    /// Seconds that a command waits without getting on before it gives up and says why. What may have happened by then is
    /// reported as unknown.
    #[arg(long, global = true, default_value_t = 30, value_name = "SECONDS")]
    pub(crate) patience_s: u64,
    /// Files of up to this size lie in the metadata where no directory says otherwise (`clutch fs policy`); 0 for those of at most 255
    /// bytes alone.
    #[arg(long, global = true, env = "CLUTCH_INLINE_MAX", value_parser = parse_inline, default_value = "4K", value_name = "SIZE", hide_short_help = true)]
    pub(crate) inline_default: u32,
    /// The cluster's key, which changing or examining its insides needs: `keys/cluster.key` in the directory of any node. A node that
    /// runs on this machine under the same user needs not be named.
    #[arg(long, global = true, env = "CLUTCH_KEY", value_name = "FILE")]
    key: Option<String>,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Reads a bare `--registry` behind `log` as the registry's log: with a value it is where the registry listens.
pub(crate) fn registry_log_flag(args: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut args: Vec<OsString> = args.collect();
    let log = args.iter().position(|a| a == "log").unwrap_or(args.len());
    for i in log..args.len() {
        let bare = args.get(i + 1).is_none_or(|next| next.to_string_lossy().starts_with('-'));
        if args[i] == "--registry" && bare {
            args[i] = "--registry-log".into();
        }
    }
    args
}

/// So many seconds; more than a life has are as many as that.
pub(crate) fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds.min(100 * 365 * 24 * 60 * 60))
}

impl Cli {
    /// Where the cluster's key is, where that is said; an empty variable says nothing.
    pub(crate) fn key(&self) -> Option<&Path> {
        self.key.as_deref().filter(|key| !key.is_empty()).map(Path::new)
    }

    pub(crate) fn patience(&self) -> Duration {
        seconds(self.patience_s)
    }
}

impl Command {
    /// Whether one JSON document was asked for.
    pub(crate) fn wants_json(&self) -> bool {
        match self {
            Command::Status(args) => args.json,
            Command::Fs(command) => command.wants_json(),
            Command::Log(command) => match command {
                LogCommand::Status { json }
                | LogCommand::Replay { json, .. }
                | LogCommand::Rewind { json, .. } => *json,
                LogCommand::Checkpoint { command: Some(CheckpointCommand::Ls { json }), .. } => *json,
                LogCommand::Checkpoint { command: None, .. } | LogCommand::Trim { .. } => false,
            },
            Command::Cluster(ClusterCommand::Status(args)) => args.json,
            Command::Fsck(args) => args.json,
            Command::Collect(args) => args.json,
            Command::Blocks(command) => command.wants_json(),
            Command::Fuzz(args) => args.json,
            Command::Bench(command) => match command {
                BenchCommand::Meta { json, .. } | BenchCommand::Data { json, .. } => *json,
                BenchCommand::Table(args) => args.json,
            },
            Command::Up(_)
            | Command::Node(_)
            | Command::Cluster(_)
            | Command::Disk(_)
            | Command::Completions { .. }
            | Command::Man { .. }
            | Command::Crash { .. } => false,
        }
    }
}

impl FsCommand {
    fn wants_json(&self) -> bool {
        match self {
            FsCommand::Ls { json, .. }
            | FsCommand::Tree { json, .. }
            | FsCommand::Stat { json, .. }
            | FsCommand::Du { json, .. }
            | FsCommand::History { json, .. }
            | FsCommand::Versions { json, .. } => *json,
            FsCommand::Policy(PolicyCommand::Get { json, .. }) => *json,
            FsCommand::Policy(PolicyCommand::Set { .. })
            | FsCommand::Mkdir { .. }
            | FsCommand::Put { .. }
            | FsCommand::Get { .. }
            | FsCommand::Cat { .. }
            | FsCommand::Mv { .. }
            | FsCommand::Rm { .. }
            | FsCommand::Ln { .. }
            | FsCommand::Chmod { .. }
            | FsCommand::Chown { .. }
            | FsCommand::Touch { .. }
            | FsCommand::Write { .. }
            | FsCommand::Truncate { .. }
            | FsCommand::Restore { .. }
            | FsCommand::Undelete { .. } => false,
        }
    }
}

#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    /// Start a whole cluster in this process, under one directory; Ctrl-C stops it.
    Up(UpArgs),
    /// Run one node of a cluster of several; Ctrl-C stops it.
    Node(NodeArgs),
    /// Make clusters of several nodes, and change who is in them.
    #[command(subcommand)]
    Cluster(ClusterCommand),
    /// Show what runs and whether it serves.
    Status(StatusArgs),
    /// Work with files: ls, put, get, mv and so on. Remote paths are absolute.
    #[command(subcommand)]
    Fs(FsCommand),
    /// Look at logs, replay them, take checkpoints, trim.
    #[command(subcommand)]
    Log(LogCommand),
    /// Check the invariants of all metadata.
    Fsck(FsckArgs),
    /// Disks and how redundant what lies on them is: look, empty, rebuild, check.
    #[command(subcommand)]
    Blocks(BlocksCommand),
    /// Give back the space of what was deleted or replaced and is past its policy.
    Collect(CollectArgs),
    /// Run whole simulated clusters under faults, from seeds, and check everything.
    Fuzz(FuzzArgs),
    /// Look after the disks of a directory of `clutch up`.
    #[command(subcommand)]
    Disk(DiskCommand),
    /// Measure.
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Print completions for a shell.
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page, or write one page for each command.
    Man {
        /// Write the pages into this directory.
        #[arg(long)]
        dir: Option<PathBuf>,
    },
    /// End in a way that shows what a crash prints.
    #[command(hide = true)]
    Crash {
        /// `panic` or `segv`.
        signal: String,
    },
}

fn parse_count(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| *n > 0).ok_or_else(|| format!("{text:?} is not a number above 0"))
}

/// Threads of a simulation: each has worlds of its own.
fn parse_threads(text: &str) -> Result<usize, String> {
    parse_count(text)
        .and_then(|n| if n <= 1024 { Ok(n) } else { Err("at most 1024 threads are allowed".into()) })
}

/// How many at a time; 0 means one, and more than there is room for means as many as there is.
fn parse_jobs(text: &str) -> Result<usize, String> {
    text.parse().map_err(|_| format!("{text:?} is not a number of files"))
}

/// An instant: nanoseconds since 1970, also with the quotes that they have in JSON, or a date and time with its zone.
fn parse_instant(text: &str) -> Result<u64, String> {
    let plain = text.trim().trim_matches('"');
    if let Ok(nanoseconds) = plain.parse() {
        return Ok(nanoseconds);
    }
    let parsed = plain.parse::<jiff::Timestamp>().ok().and_then(|t| u64::try_from(t.as_nanosecond()).ok());
    parsed.ok_or_else(|| {
        format!(
            "{text:?} is no instant from 1970 on: write nanoseconds, as `--json` and the tables print them, or a time with \
             its zone, such as 2026-11-26T12:00:00Z"
        )
    })
}

#[derive(Args, Debug)]
pub(crate) struct UpArgs {
    /// Everything is kept under this directory.
    #[arg(long, default_value = "clutch-data")]
    pub(crate) dir: PathBuf,
    /// Metadata shards, a power of two; 4 for a new directory.
    #[arg(long, value_parser = parse_shards)]
    pub(crate) shards: Option<u32>,
    /// Disks, each a failure domain of its own; 8 for a new directory.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) disks: Option<u32>,
    /// Data and parity blocks of new files' spans, as D+P; 4+2 for a new directory.
    #[arg(long, value_parser = parse_policy, value_name = "D+P")]
    pub(crate) policy: Option<(u32, u32)>,
    /// A log segment is closed when it is larger than this; whole segments are trimmed.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=4096), value_name = "MIB")]
    pub(crate) segment_mib: u64,
    /// Nodes, each with a member of every log, in this process: how a cluster of several works can be tried with 3. They listen on as many
    /// ports one behind the other, and each has its settings in DIR/nN/node.toml.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=5), value_name = "N",
        conflicts_with_all = ["segment_mib", "advertise", "metrics", "collect_every_s", "rebuild_after_s", "scrub_every_s", "grant_s", "clock_skew_s", "accept_clock", "reserve_mib", "retain_log", "unfinished_s"])]
    pub(crate) replicas: u16,
    /// Where to listen.
    #[arg(long, default_value = "127.0.0.1:7400", value_name = "HOST:PORT", value_parser = parse_address)]
    pub(crate) listen: String,
    /// What others reach the cluster by, where that is not what it listens on.
    #[arg(long, value_name = "HOST:PORT", value_parser = parse_advertised)]
    pub(crate) advertise: Option<String>,
    /// Answer over HTTP here: /metrics for Prometheus, /healthz and /readyz; nowhere when nothing is said.
    #[arg(long, value_name = "HOST:PORT", value_parser = parse_address)]
    pub(crate) metrics: Option<String>,
    /// Collect what may go every so often; 0 leaves it to `clutch collect`.
    #[arg(long, default_value_t = 60, value_name = "SECONDS")]
    pub(crate) collect_every_s: u64,
    /// Rebuild elsewhere what is on a disk that has not been there for so long; 0 leaves it to `clutch blocks drain`.
    #[arg(long, default_value_t = 900, value_parser = clap::value_parser!(u64).range(0..=31_536_000), value_name = "SECONDS")]
    pub(crate) rebuild_after_s: u64,
    /// Read each disk through once in so long, and repair what is found; 0 leaves it to `clutch blocks scrub`.
    #[arg(long, default_value_t = 2_592_000, value_parser = clap::value_parser!(u64).range(0..=315_360_000), value_name = "SECONDS")]
    pub(crate) scrub_every_s: u64,
    /// A write of a block is allowed for so long, and no block is erased before that; at most an hour.
    #[arg(long, default_value_t = 3600, value_parser = clap::value_parser!(u64).range(1..=3600), value_name = "SECONDS")]
    pub(crate) grant_s: u64,
    /// How far apart the clocks of the cluster may be; erasing waits for twice as long after the last grant.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(0..=3600), value_name = "SECONDS")]
    pub(crate) clock_skew_s: u64,
    /// Believe the clock also where it is further ahead than the cluster can have been down. Times in the log never go back:
    /// be sure.
    #[arg(long)]
    pub(crate) accept_clock: bool,
    /// Blocks leave so much of the file system free that holds logs and states; a sixteenth of it, and at most 1 GiB, when
    /// nothing is said.
    #[arg(long, value_parser = clap::value_parser!(u64).range(0..=1_048_576), value_name = "MIB")]
    pub(crate) reserve_mib: Option<u64>,
    /// Keep so much of the logs that every moment of it can be replayed, for example 12h or 7d: checkpoints are taken by
    /// themselves, what is older is trimmed, and checkpoints that nothing needs are removed; `all` keeps everything.
    #[arg(long, default_value = "all", value_parser = parse_retention, value_name = "AGE")]
    pub(crate) retain_log: Keep<u64>,
    /// A file that is being written and that nobody writes to is given up after so long.
    #[arg(long, default_value_t = 28_800, value_parser = clap::value_parser!(u64).range(1..=31_536_000), value_name = "SECONDS")]
    pub(crate) unfinished_s: u64,
}

#[derive(Args, Debug)]
pub(crate) struct CollectArgs {
    /// One pass; without it, pass after pass until it is stopped.
    #[arg(long)]
    pub(crate) once: bool,
    /// Seconds between two passes.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..), conflicts_with = "once")]
    pub(crate) every_s: u64,
    /// Requests in a second at most; 0 for no limit.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) requests_per_s: u32,
    /// Print one JSON document for each pass.
    #[arg(long)]
    pub(crate) json: bool,
}

fn parse_policy(text: &str) -> Result<(u32, u32), String> {
    let (data, parity) = text.split_once('+').ok_or("write it as D+P, for example 4+2")?;
    let number = |part: &str| part.trim().parse::<u32>().map_err(|e| format!("{part:?}: {e}"));
    match (number(data)?, number(parity)?) {
        (data @ 1..=16, parity @ 0..=16) => Ok((data, parity)),
        _ => Err("1 to 16 data blocks and 0 to 16 parity blocks are allowed".into()),
    }
}

fn parse_shards(text: &str) -> Result<u32, String> {
    match text.parse::<u32>() {
        Ok(shards) if shards.is_power_of_two() && shards <= 256 => Ok(shards),
        _ => Err("a power of two from 1 to 256 is allowed".into()),
    }
}

fn parse_advertised(text: &str) -> Result<String, String> {
    let address = parse_address(text)?;
    match address.rsplit_once(':') {
        Some(("0.0.0.0" | "[::]" | "*", _)) => {
            Err("a wildcard leads everybody to himself; name an address".into())
        }
        Some((_, "0")) => Err("port 0 leads nowhere; name the port".into()),
        _ => Ok(address),
    }
}

/// Reads where the registry listens: the addresses of its members.
pub(crate) fn parse_registry(text: &str) -> Result<Registries, String> {
    let address = |text: &str| {
        if text.is_empty() {
            return Err("an address is missing beside a comma".to_owned());
        }
        let address = parse_address(text).map_err(|what| format!("{text:?}: {what}"))?;
        let host = address.rsplit_once(':').map_or("", |(host, _)| host);
        if text.contains(' ') || text.contains('/') {
            return Err(format!("{text:?}: write HOST:PORT, and a comma before the next address"));
        }
        if host.contains(':') && !(host.starts_with('[') && host.ends_with(']')) {
            return Err(format!("{text:?}: write an IPv6 address in brackets, for example [::1]:7400"));
        }
        Ok(Endpoint::from(address.as_str()))
    };
    let wrong = |what: String| format!("--registry {text:?}: {what}");
    if text.trim().is_empty() {
        return Err(wrong("name an address, for example 127.0.0.1:7400".to_owned()));
    }
    let all: Result<Vec<Endpoint>, String> = text.split(',').map(str::trim).map(address).collect();
    Registries::new(all.map_err(wrong)?).ok_or_else(|| wrong("no address".to_owned()))
}

fn parse_address(text: &str) -> Result<String, String> {
    match text.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => Ok(text.to_owned()),
        Some((host, port)) if !host.is_empty() && port.parse::<u64>().is_ok() => {
            Err("a port is at most 65535".into())
        }
        _ => Err("write it as HOST:PORT, for example 127.0.0.1:7400".into()),
    }
}

#[derive(Args, Debug)]
pub(crate) struct StatusArgs {
    /// Wait until everything serves, at most so many seconds.
    #[arg(long, value_name = "SECONDS")]
    pub(crate) wait: Option<u64>,
    /// Print one JSON document.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Subcommand, Debug)]
pub(crate) enum FsCommand {
    /// List a directory.
    Ls {
        /// The directory, or a file.
        #[arg(default_value = "/")]
        path: RemotePath,
        /// Kind, mode, owner, size and time of each entry.
        #[arg(short, long)]
        long: bool,
        /// Directories below, too.
        #[arg(short = 'R', long)]
        recursive: bool,
        /// Print one JSON document.
        #[arg(long)]
        json: bool,
    },
    /// Draw a directory and what is below it.
    Tree {
        /// The directory.
        #[arg(default_value = "/")]
        path: RemotePath,
        /// Print one JSON document.
        #[arg(long)]
        json: bool,
    },
    /// Make directories.
    Mkdir {
        /// Make the directories above, too, and do not mind if it exists.
        #[arg(short, long)]
        parents: bool,
        /// Permission bits in octal.
        #[arg(short, long, default_value = "755", value_parser = parse_mode)]
        mode: u32,
        /// The directories.
        #[arg(required = true)]
        paths: Vec<RemotePath>,
    },
    /// Store local files.
    Put {
        /// Directories with all that is in them.
        #[arg(short, long)]
        recursive: bool,
        /// Print the remote path of every file when it is durable.
        #[arg(short, long)]
        verbose: bool,
        /// Files that are stored at a time.
        #[arg(short, long, default_value_t = 64, value_parser = parse_jobs)]
        jobs: usize,
        /// A local file or directory; `-` is standard input.
        source: PathBuf,
        /// Where to; an existing directory takes it under its own name.
        target: RemotePath,
    },
    /// Fetch files.
    Get {
        /// Directories with all that is in them.
        #[arg(short, long)]
        recursive: bool,
        /// Files that are fetched at a time.
        #[arg(short, long, default_value_t = 32, value_parser = parse_jobs)]
        jobs: usize,
        /// The remote file or directory.
        source: RemotePath,
        /// Where to; an existing directory takes it under its own name.
        target: PathBuf,
    },
    /// Print files.
    Cat {
        /// The files.
        #[arg(required = true)]
        paths: Vec<RemotePath>,
    },
    /// Move or rename.
    Mv {
        /// What.
        source: RemotePath,
        /// Where to; an existing directory takes it under its own name.
        target: RemotePath,
    },
    /// Remove files and links; they stay in the history of their directory as long as its policy keeps them.
    Rm {
        /// Directories with all that is in them.
        #[arg(short, long)]
        recursive: bool,
        /// Do not mind what does not exist.
        #[arg(short, long)]
        force: bool,
        /// What.
        #[arg(required = true)]
        paths: Vec<RemotePath>,
    },
    /// Show all that is known of a file.
    Stat {
        /// The file.
        path: RemotePath,
        /// Print one JSON document.
        #[arg(long)]
        json: bool,
    },
    /// Make a symbolic link.
    Ln {
        /// Symbolic; other links do not exist yet.
        #[arg(short, long, required = true)]
        symbolic: bool,
        /// What the link says.
        target: OsString,
        /// The link.
        path: RemotePath,
    },
    /// Change permission bits.
    Chmod {
        /// In octal.
        #[arg(value_parser = parse_mode)]
        mode: u32,
        /// Of what.
        #[arg(required = true)]
        paths: Vec<RemotePath>,
    },
    /// Change owner and group.
    Chown {
        /// Numbers: UID, UID:GID or :GID.
        owner: String,
        /// Of what.
        #[arg(required = true)]
        paths: Vec<RemotePath>,
    },
    /// Set the modification time to now, or make an empty file.
    Touch {
        /// This time instead: RFC 3339, or seconds since 1970.
        #[arg(short, long)]
        date: Option<String>,
        /// Of what.
        #[arg(required = true)]
        paths: Vec<RemotePath>,
    },
    /// Add up sizes, and what the files take on all disks: what they have in common counts once, headers and checksums do not.
    Du {
        /// The directory.
        #[arg(default_value = "/")]
        path: RemotePath,
        /// Print one JSON document.
        #[arg(long)]
        json: bool,
    },
    /// Show what a directory or a name held before.
    History {
        /// A directory, or a name in one.
        path: RemotePath,
        /// Print one JSON document.
        #[arg(long)]
        json: bool,
    },
    /// Replace part of a file and keep the rest, or write over all of it; the file stays the same file.
    Write {
        /// Where the new bytes begin; what lies between the old end and here is zeros.
        #[arg(long, default_value_t = 0)]
        offset: u64,
        /// Let the file end behind the new bytes.
        #[arg(long)]
        truncate: bool,
        /// A local file; `-` is standard input.
        source: PathBuf,
        /// The remote file, which must exist.
        path: RemotePath,
    },
    /// Cut a file, or make it longer with zeros.
    Truncate {
        /// In bytes.
        size: u64,
        /// Of what.
        #[arg(required = true)]
        paths: Vec<RemotePath>,
    },
    /// Show the earlier contents of a file that was written over in place.
    Versions {
        /// The file.
        path: RemotePath,
        /// Print one JSON document.
        #[arg(long)]
        json: bool,
    },
    /// Make an earlier content of a file its present one.
    Restore {
        /// The file.
        path: RemotePath,
        /// The content that ended at this time, as `versions` prints it; the newest when left away.
        #[arg(long, value_parser = parse_instant)]
        ended: Option<u64>,
    },
    /// Look at a directory's policies, or change them.
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// Bring the newest deleted or replaced file of a name back, or a removed directory.
    Undelete {
        /// The name it had.
        path: RemotePath,
        /// The name it gets; the old one when left away.
        new_path: Option<RemotePath>,
        /// The version that ended at this time, as `history` prints it.
        #[arg(long, value_parser = parse_instant)]
        ended: Option<u64>,
    },
}

#[derive(Subcommand, Debug)]
pub(crate) enum PolicyCommand {
    /// Print what holds in a directory, and which of it is set there.
    Get {
        /// The directory.
        #[arg(default_value = "/")]
        path: RemotePath,
        /// Print one JSON document.
        #[arg(long)]
        json: bool,
    },
    /// Change what a directory says for itself and for what is below it.
    Set {
        /// The directory.
        path: RemotePath,
        /// Old versions may be collected after so long: 30s, 12h, 7d; `forever` for no such limit.
        #[arg(long, value_parser = parse_age, value_name = "AGE")]
        keep_age: Option<Keep<u64>>,
        /// Of each name and file so many old versions are kept at most; `all` for no such limit. Of age and versions, what
        /// is not named is set to what holds now.
        #[arg(long, value_parser = parse_versions, value_name = "N")]
        keep_versions: Option<Keep<u32>>,
        /// Code of spans up to a size, smallest first: `64K=1+2,1M=4+2,8M=10+4`. Files are cut at the last size.
        #[arg(long, value_parser = parse_span_class, value_delimiter = ',', value_name = "SIZE=D+P")]
        spans: Vec<(u32, u32, u32)>,
        /// Storage class of blocks from a size on: `0=0,1M=1`.
        #[arg(long, value_parser = parse_storage_class, value_delimiter = ',', value_name = "SIZE=CLASS")]
        storage: Vec<(u32, u32)>,
        /// About the size of the cells that spans are cut into.
        #[arg(long, value_parser = parse_size, value_name = "SIZE")]
        cell_size: Option<u32>,
        /// Files of up to this size lie in the metadata, with one request each: 255 to 64K, or 0 for those of at most 255 bytes alone, which
        /// always do.
        #[arg(long, value_parser = parse_size, value_name = "SIZE")]
        inline_max: Option<u32>,
        /// Inherit these again.
        #[arg(long, value_delimiter = ',', value_enum)]
        inherit: Vec<Part>,
    },
}

/// A limit on what is kept, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Keep<T> {
    /// At most this.
    AtMost(T),
    /// Without limit.
    All,
}

/// A part of a policy.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// How long old versions are kept.
    Keep,
    /// Codes of spans.
    Spans,
    /// Storage classes.
    Storage,
    /// Size of cells.
    CellSize,
    /// Sizes of files in the metadata.
    InlineMax,
}

/// The size up to which files are inline where nothing else is said; an empty variable says nothing.
fn parse_inline(text: &str) -> Result<u32, String> {
    const WHAT: &str = "CLUTCH_INLINE_MAX and --inline-default take 255 to 64K, or 0";
    let size = if text.is_empty() {
        INLINE_FILE_BYTES_DEFAULT
    } else {
        parse_size(text).map_err(|error| format!("{error} ({WHAT})"))?
    };
    match size as usize {
        0 | INLINE_BYTES_MAX..=INLINE_FILE_BYTES_MAX => Ok(size),
        _ => Err(WHAT.into()),
    }
}

fn parse_age(text: &str) -> Result<Keep<u64>, String> {
    if text == "forever" {
        return Ok(Keep::All);
    }
    let unit_at = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(unit_at);
    let unit_ms = match unit {
        "ms" => 1,
        "s" | "" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err("write an age with its unit, for example 30s, 15m, 12h or 7d".into()),
    };
    let number: u64 = number.parse().map_err(|_| format!("{text:?} is not an age; write for example 7d"))?;
    number.checked_mul(unit_ms).map(Keep::AtMost).ok_or_else(|| "an age that long cannot be stored".into())
}

pub(crate) fn parse_retention(text: &str) -> Result<Keep<u64>, String> {
    match text {
        "all" => Ok(Keep::All),
        "forever" => Err("write `all` to keep the whole logs".into()),
        age => match parse_age(age)? {
            Keep::AtMost(ms) if ms < 1000 => Err("keep at least one second; `all` keeps everything".into()),
            kept => Ok(kept),
        },
    }
}

fn parse_versions(text: &str) -> Result<Keep<u32>, String> {
    if text == "all" {
        return Ok(Keep::All);
    }
    text.parse().map(Keep::AtMost).map_err(|_| format!("{text:?} is neither a number nor `all`"))
}

fn parse_size(text: &str) -> Result<u32, String> {
    let unit_at = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(unit_at);
    let shift = match unit {
        "" => 0,
        "K" | "KiB" => 10,
        "M" | "MiB" => 20,
        _ => return Err(format!("{text:?} is not a size; write for example 65536, 64K or 8M")),
    };
    let number: u32 = number.parse().map_err(|_| format!("{text:?} is not a size"))?;
    number.checked_mul(1 << shift).ok_or_else(|| "sizes stay below 4 GiB".into())
}

fn parse_span_class(text: &str) -> Result<(u32, u32, u32), String> {
    let (size, code) = text.split_once('=').ok_or("write it as SIZE=D+P, for example 8M=4+2")?;
    let (data, parity) = parse_policy(code)?;
    Ok((parse_size(size)?, data, parity))
}

fn parse_storage_class(text: &str) -> Result<(u32, u32), String> {
    let (size, class) = text.split_once('=').ok_or("write it as SIZE=CLASS, for example 1M=1")?;
    let class = class.parse().map_err(|_| format!("{class:?} is not the number of a storage class"))?;
    Ok((parse_size(size)?, class))
}

fn parse_mode(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text.trim_start_matches("0o"), 8)
        .map_err(|_| "write the mode in octal, for example 644")?;
    if mode > 0o7777 { Err("modes go up to 7777".into()) } else { Ok(mode) }
}

fn parse_up_to(text: &str, what: &str, max: usize) -> Result<usize, String> {
    text.parse()
        .ok()
        .filter(|n| (1..=max).contains(n))
        .ok_or_else(|| format!("1 to {max} {what} are allowed"))
}

fn parse_clients(text: &str) -> Result<usize, String> {
    parse_up_to(text, "clients", 1024)
}

fn parse_depth(text: &str) -> Result<usize, String> {
    parse_up_to(text, "requests in flight", 65_536)
}

fn parse_files(text: &str) -> Result<usize, String> {
    parse_up_to(text, "files", 100_000_000)
}

fn parse_size_mib(text: &str) -> Result<usize, String> {
    parse_up_to(text, "MiB", 65_536)
}

/// Which logs.
#[derive(Args, Debug, Clone)]
#[group(required = true, multiple = false)]
pub(crate) struct Which {
    /// This shard's.
    #[arg(long, value_name = "N")]
    pub(crate) shard: Option<u32>,
    /// The CDC's.
    #[arg(long)]
    pub(crate) cdc: bool,
    /// The registry's; `--registry` without a value says the same.
    #[arg(long = "registry-log")]
    pub(crate) registry_log: bool,
    /// All of the cluster.
    #[arg(long)]
    pub(crate) all: bool,
}

#[derive(Subcommand, Debug)]
pub(crate) enum LogCommand {
    /// Where every log stands.
    Status {
        /// Print one JSON document.
        #[arg(long)]
        json: bool,
    },
    /// Apply a log again into an empty store.
    Replay {
        #[command(flatten)]
        which: Which,
        /// Compare the result's hash with the live replica's; exit 1 when it differs or nothing could be compared.
        #[arg(long)]
        verify: bool,
        /// Read this directory of `clutch up` (or a copy) instead of asking the cluster.
        #[arg(long)]
        dir: Option<PathBuf>,
        /// Begin from the checkpoint at this position instead of the beginning, or of the oldest one of a trimmed log.
        #[arg(long, value_name = "POSITION")]
        from_checkpoint: Option<u64>,
        /// Stop after this position.
        #[arg(long)]
        to_position: Option<u64>,
        /// Stop at this instant: nanoseconds since 1970, or a time such as 2026-11-26T12:00:00Z.
        #[arg(long, value_name = "INSTANT", value_parser = parse_instant)]
        to_time: Option<u64>,
        /// Print one JSON document.
        #[arg(long)]
        json: bool,
    },
    /// Copy the present state beside the log, to replay from; `log checkpoint ls` lists the copies.
    #[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
    Checkpoint {
        #[command(flatten)]
        which: Option<Which>,
        #[command(subcommand)]
        command: Option<CheckpointCommand>,
    },
    /// Allow what a checkpoint and the flushed state cover to be removed.
    Trim {
        #[command(flatten)]
        which: Which,
        /// Up to this position; as far as possible when left away.
        #[arg(long)]
        upto: Option<u64>,
    },
    /// Take a stopped cluster back to an instant, or its logs out of the future that a wrong clock has led them into.
    ///
    /// All logs are cut at one time; what was acknowledged after it is lost to the cluster. The old logs and states stay
    /// beside the new ones, in directories `before-rewind-N`: moved back into their places they undo it. Blocks that were
    /// erased after the instant do not come back: reading says which files miss them. Those that were written after it stay
    /// on the disks. The machine's clock must be right. An interrupted rewind is finished by the next one.
    Rewind {
        /// The directory of `clutch up`.
        #[arg(long, default_value = "clutch-data")]
        dir: PathBuf,
        /// The instant: nanoseconds since 1970, or a time such as 2026-11-26T12:00:00Z; this machine's present time when
        /// left away.
        #[arg(long, value_name = "INSTANT", value_parser = parse_instant)]
        to_time: Option<u64>,
        /// Do it; without, it is only said what would be done.
        #[arg(long)]
        yes: bool,
        /// Print one JSON document.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Subcommand, Debug)]
pub(crate) enum CheckpointCommand {
    /// List the checkpoints of every log, and from where each log can be replayed.
    Ls {
        /// Print one JSON document.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Args, Debug)]
pub(crate) struct FsckArgs {
    /// Read every row from disk and compare with the stored hashes, too.
    #[arg(long)]
    pub(crate) rescan: bool,
    /// Let the block services read every block of the files at or below a path, all where none is named, and compare it with what
    /// was written, too. What is unreadable or below its full redundancy is a fault.
    #[arg(long, value_name = "PATH", num_args = 0..=1)]
    pub(crate) data: Option<Option<RemotePath>>,
    /// Print one JSON document.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Subcommand, Debug)]
pub(crate) enum DiskCommand {
    /// Label a disk of a stopped cluster: an empty one that takes the place of another, or one whose label is damaged. A
    /// directory without its label is never written to.
    Label {
        /// The directory of `clutch up`.
        #[arg(long, default_value = "clutch-data")]
        dir: PathBuf,
        /// Which disk: N of DIR/blocks/N.
        disk: u32,
    },
}

#[derive(Subcommand, Debug)]
pub(crate) enum BenchCommand {
    /// Metadata operations.
    Meta {
        /// Comma-separated: mkdir, create, lookup, stat, readdir, rename, unlink, rename-dir, rmdir.
        #[arg(
            long,
            default_value = "mkdir,create,lookup,stat,readdir,rename,unlink,rename-dir,rmdir",
            value_delimiter = ',',
            value_parser =
                ["mkdir", "create", "lookup", "stat", "readdir", "rename", "unlink", "rename-dir", "rmdir"]
        )]
        ops: Vec<String>,
        /// Clients, each with a session of its own.
        #[arg(long, default_value_t = 4, value_parser = parse_clients)]
        clients: usize,
        /// Requests that each client keeps in flight.
        #[arg(long, default_value_t = 64, value_parser = parse_depth)]
        depth: usize,
        /// Files of each operation, over all clients.
        #[arg(long, default_value_t = 20_000, value_parser = parse_files)]
        files: usize,
        /// Print one JSON document.
        #[arg(long)]
        json: bool,
    },
    /// Writing and reading file data.
    Data {
        /// Files.
        #[arg(long, default_value_t = 8, value_parser = parse_files)]
        files: usize,
        /// Bytes of each, in MiB.
        #[arg(long, default_value_t = 32, value_parser = parse_size_mib)]
        size_mib: usize,
        /// Files at a time.
        #[arg(long, default_value_t = 1, value_parser = parse_clients)]
        clients: usize,
        /// Print one JSON document.
        #[arg(long)]
        json: bool,
    },
    /// The whole table, on clusters that it starts for itself: rates, latencies, processor time, memory, restart, disk.
    Table(TableArgs),
}

#[derive(Args, Debug)]
pub(crate) struct TableArgs {
    /// Clusters are made in new directories under this one, and removed afterwards.
    #[arg(long, default_value = ".")]
    pub(crate) dir: PathBuf,
    /// Where the clusters for file data are made: a file system in memory, so that the disk does not count.
    #[arg(long, default_value = "/dev/shm")]
    pub(crate) memory_dir: PathBuf,
    /// Comma-separated parts of the table; all of them when nothing is said.
    #[arg(long, value_delimiter = ',', value_parser = ["files", "directories", "many", "data"])]
    pub(crate) parts: Vec<String>,
    /// Files of the rows on files and directories.
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    pub(crate) files: u64,
    /// Files of the rows on memory, restart and disk.
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1..=1_000_000_000))]
    pub(crate) many: u64,
    /// MiB of file data.
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(1..=1_048_576))]
    pub(crate) data_mib: u64,
    /// Print one JSON document.
    #[arg(long)]
    pub(crate) json: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_registry_has_one_address_or_several() {
        for text in ["h:1", "h:1,i:2,j:3", "h:1, [::1]:2", "h:1,h:1"] {
            assert!(parse_registry(text).is_ok(), "{text:?}");
        }
        for text in
            ["", ",", "h:1,", "h:1,,i:2", "h", "h:1,i", "h:1 i:2", "::1:7400", "h:1,::1:7400", "h:70000"]
        {
            let what = parse_registry(text).expect_err(text);
            assert!(what.contains(&format!("{text:?}")), "{what}");
        }
    }
}
