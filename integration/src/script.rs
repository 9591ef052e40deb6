//! What happens in a simulation: operations of clients and faults, each at its virtual time. Has a text form that
//! people can read, keep and write.
//!
//! One line each, in any order; `#` begins a comment:
//!
//! ```text
//! seed 42
//! cluster shards=2 disks=5 policy=2+1 engine=sim flush=20 page=0 names=plain clients=3
//! 0.001200 c0.1 create /d1/f3 120 7
//! 0.002000 fault crash shard0 0.300000
//! ```
//!
//! Times are seconds since the cluster was ready. A lane `cN.M` is one thread of client N: its operations run one
//! after another, none before its time. A person's own trace has only operations.

use std::{fmt, str::FromStr, time::Duration};

use clutch_proto::limits::{DATA_BLOCKS_MAX, PARITY_BLOCKS_MAX};

use crate::sim_cluster::{ClusterConfig, Engine};

/// A thread of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Lane {
    /// The client.
    pub client: u32,
    /// Its thread.
    pub thread: u32,
}

/// What a client does. Bytes of a file come from `salt` alone; salt 0 is zeros.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Makes a directory.
    MakeDirectory(String),
    /// Removes a directory.
    RemoveDirectory(String),
    /// Creates a small file, if the name is free.
    Create(String, u32, u64),
    /// Stores a file of any size in place of whatever file has the name.
    Write(String, u32, u64),
    /// Makes a symbolic link.
    Symlink(String, String),
    /// Reads a whole file.
    Read(String),
    /// Reads part of a file.
    ReadRange(String, u64, u32),
    /// Asks for attributes.
    Stat(String),
    /// Lists a directory.
    List(String),
    /// Asks what a directory held.
    History(String),
    /// Gives another name or place.
    Move(String, String),
    /// Removes a file or link.
    Remove(String),
    /// Sets permissions.
    ChangeMode(String, u32),
    /// Brings the last version that was deleted under a name back under another.
    Undelete(String, String),
    /// Replaces a range of a file's bytes.
    Patch(String, u64, u32, u64),
    /// Cuts a file or makes it longer.
    Truncate(String, u64),
    /// Makes the newest past content of a file its present one.
    Restore(String),
    /// Asks for a file's past contents.
    Contents(String),
    /// Sets how long a directory keeps what was: milliseconds and versions; neither lets it be inherited.
    Policy(String, Option<u64>, Option<u32>),
    /// Proposes to forget the newest past entry of a name, whatever its age, under a policy of so many milliseconds.
    Forget(String, u64),
    /// Collects what may go; `true` proposes contents that are still being written, too.
    Collect(bool),
    /// Writes a content and gives it up.
    Scrap(String, u32, u64),
    /// Writes a file as two contents that are put together.
    Assemble(String, u32, u64),
    /// Moves a block of a file to another disk.
    MoveBlock(String, u32),
    /// Gives a file's spans other places.
    Recode(String),
    /// Looks at all inodes, and at the blocks of a disk.
    Survey(u32),
    /// An operator sets a service's flags: 0 for none, 1 for no new blocks.
    Flag(u32, u32),
    /// Tries to have a span accepted, or a block written, that must not be; the kind is 0..11.
    Forge(String, u32),
}

/// Who a fault strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Party {
    /// The registry's node.
    Registry,
    /// The CDC's node.
    Cdc,
    /// A shard's node.
    Shard(u32),
    /// A disk's node.
    Disk(u32),
    /// A client's node.
    Client(u32),
}

/// Something that goes wrong. A span of time is how long it lasts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Messages vanish, so many of a thousand.
    Loss(u32, Duration),
    /// Requests arrive twice, so many of a thousand.
    Duplicate(u32, Duration),
    /// Messages take up to so many microseconds and overtake each other.
    Delay(u32, Duration),
    /// Two parties do not hear each other.
    Partition(Party, Party, Duration),
    /// The second does not hear the first.
    OneWay(Party, Party, Duration),
    /// Nobody hears the party, nor it anybody.
    Isolate(Party, Duration),
    /// What travels from the first to the second is held back.
    Clog(Party, Party, Duration),
    /// The party's node stops at once, and starts again after a while.
    Crash(Party, Duration),
    /// The party's process dies and its machine goes on: what it wrote is still there, synced or not.
    Kill(Party, Duration),
    /// The node stops, its states are gone, and it starts again after a while, with its log or with that of the others.
    Lose(Party, Duration),
    /// A member of the log, counted from 0, takes a checkpoint, and the log is trimmed up to it.
    Trim(Party, u32),
    /// After so many operations one on the node's disk takes a while; everybody waits for it.
    Stall(Party, u32, Duration),
    /// The node's power goes after so many operations on its disk; it starts again after a while.
    PowerCut(Party, u32, Duration),
    /// After so many more changes all of the node's disk hangs for a while, reads too.
    Hang(Party, u32, Duration),
    /// The node stands still and goes on where it was.
    Pause(Party, Duration),
    /// The node stands still again and again.
    Slow(Party, Duration),
    /// The party's log is led by a new node; the old one goes on, unaware, and then stops.
    Move(Party, Duration),
    /// The outcome of the log's next proposal stays unknown; it is committed.
    UnknownCommitted(Party),
    /// The outcome of the log's next proposal stays unknown; it is lost.
    UnknownLost(Party),
    /// The node's wall clock is off by so many milliseconds, all at once.
    Skew(Party, i32),
    /// The node's wall clock drifts by so many parts per million.
    Drift(Party, i32),
    /// All wall clocks go forward together: the cluster was suspended.
    Suspend(Duration),
    /// Bits flip in a block on the disk.
    Flip(u32, u64),
    /// The disk's next write lands at a wrong place.
    Misdirect(u32),
    /// The disk fails reads and writes, so many of a thousand.
    DiskErrors(Party, u32, Duration),
    /// The disk is full.
    Full(Party, Duration),
    /// The disk is exchanged for an empty one.
    Wipe(u32),
    /// The node's wall clock is set by so many seconds, and set right after a while.
    Step(Party, i64, Duration),
    /// The disk's node starts without it, as when it is not mounted, and with it again after a while.
    Unmount(u32, Duration),
}

impl Fault {
    /// Every kind, for reports.
    pub const KINDS: [&'static str; 29] = [
        "loss",
        "duplicate",
        "delay",
        "partition",
        "oneway",
        "isolate",
        "clog",
        "crash",
        "powercut",
        "pause",
        "slow",
        "move",
        "unknown-committed",
        "unknown-lost",
        "skew",
        "drift",
        "suspend",
        "flip",
        "misdirect",
        "disk-errors",
        "full",
        "wipe",
        "step",
        "unmount",
        "kill",
        "stall",
        "hang",
        "lose",
        "trim",
    ];

    /// Whether a kind is drawn only where logs have several members.
    pub fn needs_members(kind: &str) -> bool {
        kind == "trim"
    }

    /// Whether a kind is one of logs that live outside the nodes.
    pub fn needs_logs_outside(kind: &str) -> bool {
        matches!(kind, "unknown-committed" | "unknown-lost")
    }

    /// Its kind.
    pub fn kind(&self) -> &'static str {
        match self {
            Fault::Loss(..) => "loss",
            Fault::Duplicate(..) => "duplicate",
            Fault::Delay(..) => "delay",
            Fault::Partition(..) => "partition",
            Fault::OneWay(..) => "oneway",
            Fault::Isolate(..) => "isolate",
            Fault::Clog(..) => "clog",
            Fault::Crash(..) => "crash",
            Fault::PowerCut(..) => "powercut",
            Fault::Pause(..) => "pause",
            Fault::Slow(..) => "slow",
            Fault::Move(..) => "move",
            Fault::UnknownCommitted(_) => "unknown-committed",
            Fault::UnknownLost(_) => "unknown-lost",
            Fault::Skew(..) => "skew",
            Fault::Drift(..) => "drift",
            Fault::Suspend(_) => "suspend",
            Fault::Flip(..) => "flip",
            Fault::Misdirect(_) => "misdirect",
            Fault::DiskErrors(..) => "disk-errors",
            Fault::Full(..) => "full",
            Fault::Wipe(_) => "wipe",
            Fault::Step(..) => "step",
            Fault::Unmount(..) => "unmount",
            Fault::Kill(..) => "kill",
            Fault::Stall(..) => "stall",
            Fault::Hang(..) => "hang",
            Fault::Lose(..) => "lose",
            Fault::Trim(..) => "trim",
        }
    }
}

/// One line of a script.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// A client does something.
    Operate(Lane, Operation),
    /// Something goes wrong.
    Strike(Fault),
}

/// An action at its time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Since the cluster was ready.
    pub at: Duration,
    /// What happens.
    pub action: Action,
}

/// A whole run: the world's seed, the cluster and what happens.
#[derive(Clone, Debug)]
pub struct Script {
    /// The seed of the world: delays, order of tasks, what a crash loses.
    pub seed: u64,
    /// The cluster.
    pub cluster: ClusterConfig,
    /// How many clients.
    pub clients: u32,
    /// In the order of their times.
    pub events: Vec<Event>,
}

fn or_dash(number: Option<&impl fmt::Display>) -> String {
    number.map_or_else(|| "-".to_owned(), ToString::to_string)
}

fn seconds(duration: Duration) -> String {
    format!("{}.{:06}", duration.as_secs(), duration.subsec_micros())
}

impl fmt::Display for Party {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Party::Registry => f.write_str("registry"),
            Party::Cdc => f.write_str("cdc"),
            Party::Shard(n) => write!(f, "shard{n}"),
            Party::Disk(n) => write!(f, "disk{n}"),
            Party::Client(n) => write!(f, "client{n}"),
        }
    }
}

impl fmt::Display for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "c{}.{}", self.client, self.thread)
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Operation::MakeDirectory(p) => write!(f, "mkdir {p}"),
            Operation::RemoveDirectory(p) => write!(f, "rmdir {p}"),
            Operation::Create(p, bytes, salt) => write!(f, "create {p} {bytes} {salt}"),
            Operation::Write(p, bytes, salt) => write!(f, "write {p} {bytes} {salt}"),
            Operation::Symlink(p, target) => write!(f, "symlink {p} {target}"),
            Operation::Read(p) => write!(f, "read {p}"),
            Operation::ReadRange(p, offset, bytes) => write!(f, "read-range {p} {offset} {bytes}"),
            Operation::Stat(p) => write!(f, "stat {p}"),
            Operation::List(p) => write!(f, "ls {p}"),
            Operation::History(p) => write!(f, "history {p}"),
            Operation::Move(p, to) => write!(f, "mv {p} {to}"),
            Operation::Remove(p) => write!(f, "rm {p}"),
            Operation::ChangeMode(p, mode) => write!(f, "chmod {p} {mode:o}"),
            Operation::Undelete(p, to) => write!(f, "undelete {p} {to}"),
            Operation::Forge(p, kind) => write!(f, "forge {p} {kind}"),
            Operation::Patch(p, offset, bytes, salt) => write!(f, "patch {p} {offset} {bytes} {salt}"),
            Operation::Truncate(p, size) => write!(f, "truncate {p} {size}"),
            Operation::Restore(p) => write!(f, "restore {p}"),
            Operation::Contents(p) => write!(f, "contents {p}"),
            Operation::Policy(p, age, versions) => {
                write!(f, "policy {p} {} {}", or_dash(age.as_ref()), or_dash(versions.as_ref()))
            }
            Operation::Forget(p, age) => write!(f, "forget {p} {age}"),
            Operation::Collect(early) => f.write_str(if *early { "collect-early" } else { "collect" }),
            Operation::Scrap(p, bytes, salt) => write!(f, "scrap {p} {bytes} {salt}"),
            Operation::Assemble(p, bytes, salt) => write!(f, "assemble {p} {bytes} {salt}"),
            Operation::MoveBlock(p, index) => write!(f, "move-block {p} {index}"),
            Operation::Recode(p) => write!(f, "recode {p}"),
            Operation::Survey(disk) => write!(f, "survey disk{disk}"),
            Operation::Flag(disk, flags) => write!(f, "flag disk{disk} {flags}"),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = self.kind();
        match self {
            Fault::Loss(n, d) | Fault::Duplicate(n, d) | Fault::Delay(n, d) => {
                write!(f, "{kind} {n} {}", seconds(*d))
            }
            Fault::Partition(a, b, d) | Fault::OneWay(a, b, d) | Fault::Clog(a, b, d) => {
                write!(f, "{kind} {a} {b} {}", seconds(*d))
            }
            Fault::Isolate(a, d)
            | Fault::Crash(a, d)
            | Fault::Kill(a, d)
            | Fault::Lose(a, d)
            | Fault::Pause(a, d)
            | Fault::Slow(a, d)
            | Fault::Move(a, d)
            | Fault::Full(a, d) => write!(f, "{kind} {a} {}", seconds(*d)),
            Fault::PowerCut(a, n, d)
            | Fault::Stall(a, n, d)
            | Fault::Hang(a, n, d)
            | Fault::DiskErrors(a, n, d) => {
                write!(f, "{kind} {a} {n} {}", seconds(*d))
            }
            Fault::UnknownCommitted(a) | Fault::UnknownLost(a) => write!(f, "{kind} {a}"),
            Fault::Trim(a, member) => write!(f, "{kind} {a} {member}"),
            Fault::Skew(a, n) | Fault::Drift(a, n) => write!(f, "{kind} {a} {n}"),
            Fault::Suspend(d) => write!(f, "{kind} {}", seconds(*d)),
            Fault::Flip(disk, draw) => write!(f, "{kind} disk{disk} {draw}"),
            Fault::Misdirect(disk) | Fault::Wipe(disk) => write!(f, "{kind} disk{disk}"),
            Fault::Step(a, by, d) => write!(f, "{kind} {a} {by} {}", seconds(*d)),
            Fault::Unmount(disk, d) => write!(f, "{kind} disk{disk} {}", seconds(*d)),
        }
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.action {
            Action::Operate(lane, operation) => write!(f, "{} {lane} {operation}", seconds(self.at)),
            Action::Strike(fault) => write!(f, "{} fault {fault}", seconds(self.at)),
        }
    }
}

impl fmt::Display for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let c = &self.cluster;
        writeln!(f, "seed {}", self.seed)?;
        writeln!(
            f,
            "cluster shards={} disks={} policy={}+{} engine={} flush={} page={} names={} clients={}{}{}{}{}",
            c.shards,
            c.disks,
            c.data_blocks,
            c.parity_blocks,
            match c.engine {
                Engine::Sim => "sim",
                Engine::Local => "local",
                Engine::Raft => "raft",
            },
            c.flush_permille,
            c.page,
            if c.collide { "colliding" } else { "plain" },
            self.clients,
            // One is not said: stored scripts stay as they are.
            if c.replicas == 1 { String::new() } else { format!(" replicas={}", c.replicas) },
            if c.joint { " nodes=joint" } else { "" },
            if c.leases { " reads=leases" } else { "" },
            if c.inline == 0 { String::new() } else { format!(" inline={}", c.inline) }
        )?;
        self.events.iter().try_for_each(|event| writeln!(f, "{event}"))
    }
}

/// Why a script cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}{what}", if *line == 0 { String::new() } else { format!("line {line}: ") })]
pub struct ParseError {
    /// Counted from 1; 0 for what is wrong with the whole.
    pub line: usize,
    /// What is wrong, and what would be right.
    pub what: String,
}

struct Words<'a>(std::str::SplitWhitespace<'a>);

impl<'a> Words<'a> {
    fn next(&mut self, what: &str) -> Result<&'a str, String> {
        self.0.next().ok_or_else(|| format!("{what} is missing"))
    }

    fn number<T: FromStr>(&mut self, what: &str) -> Result<T, String> {
        let word = self.next(what)?;
        word.parse().map_err(|_| format!("{word:?} is not {what}"))
    }

    /// A number, or nothing.
    fn or_dash<T: FromStr>(&mut self, what: &str) -> Result<Option<T>, String> {
        match self.next(what)? {
            "-" => Ok(None),
            word => word.parse().map(Some).map_err(|_| format!("{word:?} is neither {what} nor -")),
        }
    }

    /// Bytes that are written.
    fn bytes(&mut self) -> Result<u32, String> {
        let bytes: u32 = self.number("a number of bytes")?;
        match bytes <= WRITE_BYTES_MAX {
            true => Ok(bytes),
            false => Err(format!("{bytes} bytes: a simulated write has at most {WRITE_BYTES_MAX}")),
        }
    }

    /// A size that a file gets, or an offset.
    fn size(&mut self, what: &str) -> Result<u64, String> {
        let size = self.number(what)?;
        match size <= FILE_SIZE_MAX || size > clutch_proto::limits::FILE_BYTES_MAX {
            true => Ok(size),
            false => Err(format!("{size}: simulated files have at most {FILE_SIZE_MAX} bytes")),
        }
    }

    fn path(&mut self) -> Result<String, String> {
        let word = self.next("a path")?;
        if word.starts_with('/') {
            Ok(word.to_owned())
        } else {
            Err(format!("{word:?} does not begin with /"))
        }
    }

    fn time(&mut self) -> Result<Duration, String> {
        parse_time(self.next("a time in seconds")?)
    }

    fn party(&mut self) -> Result<Party, String> {
        let word = self.next("a party")?;
        let number = |prefix: &str| word.strip_prefix(prefix).and_then(|n| n.parse().ok());
        match word {
            "registry" => Ok(Party::Registry),
            "cdc" => Ok(Party::Cdc),
            _ => None
                .or_else(|| number("shard").map(Party::Shard))
                .or_else(|| number("disk").map(Party::Disk))
                .or_else(|| number("client").map(Party::Client))
                .ok_or_else(|| format!("{word:?} is not registry, cdc, shardN, diskN or clientN")),
        }
    }

    fn disk(&mut self) -> Result<u32, String> {
        match self.party()? {
            Party::Disk(n) => Ok(n),
            other => Err(format!("{other} is not a disk")),
        }
    }

    fn operation(&mut self) -> Result<Operation, String> {
        Ok(match self.next("an operation")? {
            "mkdir" => Operation::MakeDirectory(self.path()?),
            "rmdir" => Operation::RemoveDirectory(self.path()?),
            "create" => Operation::Create(self.path()?, self.bytes()?, self.number("a salt")?),
            "write" => Operation::Write(self.path()?, self.bytes()?, self.number("a salt")?),
            "symlink" => Operation::Symlink(self.path()?, self.next("a target")?.to_owned()),
            "read" => Operation::Read(self.path()?),
            "read-range" => Operation::ReadRange(
                self.path()?,
                self.number("an offset")?,
                self.number("a number of bytes")?,
            ),
            "stat" => Operation::Stat(self.path()?),
            "ls" => Operation::List(self.path()?),
            "history" => Operation::History(self.path()?),
            "mv" => Operation::Move(self.path()?, self.path()?),
            "rm" => Operation::Remove(self.path()?),
            "chmod" => {
                let (path, word) = (self.path()?, self.next("a mode")?);
                let mode =
                    u32::from_str_radix(word, 8).map_err(|_| format!("{word:?} is not an octal mode"))?;
                Operation::ChangeMode(path, mode)
            }
            "undelete" => Operation::Undelete(self.path()?, self.path()?),
            "forge" => {
                let (path, kind) = (self.path()?, self.number("a kind")?);
                if kind >= FORGERIES {
                    return Err(format!(
                        "{kind} is not a kind of forgery; they go from 0 to {}",
                        FORGERIES - 1
                    ));
                }
                Operation::Forge(path, kind)
            }
            "patch" => {
                Operation::Patch(self.path()?, self.size("an offset")?, self.bytes()?, self.number("a salt")?)
            }
            "truncate" => Operation::Truncate(self.path()?, self.size("a size")?),
            "restore" => Operation::Restore(self.path()?),
            "contents" => Operation::Contents(self.path()?),
            "policy" => Operation::Policy(
                self.path()?,
                self.or_dash("milliseconds")?,
                self.or_dash("a number of versions")?,
            ),
            "forget" => Operation::Forget(self.path()?, self.number("milliseconds")?),
            "collect" => Operation::Collect(false),
            "collect-early" => Operation::Collect(true),
            "scrap" => Operation::Scrap(self.path()?, self.bytes()?, self.number("a salt")?),
            "assemble" => Operation::Assemble(self.path()?, self.bytes()?, self.number("a salt")?),
            "move-block" => Operation::MoveBlock(self.path()?, self.number("the number of a block")?),
            "recode" => Operation::Recode(self.path()?),
            "survey" => Operation::Survey(self.disk()?),
            "flag" => match (self.disk()?, self.number("flags")?) {
                (disk, flags @ 0..=1) => Operation::Flag(disk, flags),
                (_, flags) => return Err(format!("{flags} is no flag; 0 and 1 are")),
            },
            other => return Err(format!("{other:?} is not an operation")),
        })
    }

    fn fault(&mut self) -> Result<Fault, String> {
        Ok(match self.next("a fault")? {
            "loss" => Fault::Loss(self.number("a per mille")?, self.time()?),
            "duplicate" => Fault::Duplicate(self.number("a per mille")?, self.time()?),
            "delay" => Fault::Delay(self.number("microseconds")?, self.time()?),
            "partition" => Fault::Partition(self.party()?, self.party()?, self.time()?),
            "oneway" => Fault::OneWay(self.party()?, self.party()?, self.time()?),
            "isolate" => Fault::Isolate(self.party()?, self.time()?),
            "clog" => Fault::Clog(self.party()?, self.party()?, self.time()?),
            "crash" => Fault::Crash(self.party()?, self.time()?),
            "powercut" => {
                Fault::PowerCut(self.party()?, self.number("a number of disk operations")?, self.time()?)
            }
            "kill" => Fault::Kill(self.party()?, self.time()?),
            "lose" => match self.party()? {
                party @ (Party::Registry | Party::Cdc | Party::Shard(_)) => Fault::Lose(party, self.time()?),
                other => return Err(format!("{other} has no states; registry, cdc and shards have")),
            },
            "trim" => match self.party()? {
                party @ (Party::Registry | Party::Cdc | Party::Shard(_)) => {
                    Fault::Trim(party, self.number("the number of a member, from 0")?)
                }
                other => return Err(format!("{other} has no log; registry, cdc and shards have")),
            },
            "stall" => Fault::Stall(self.party()?, self.number("a number of disk operations")?, self.time()?),
            "hang" => Fault::Hang(self.party()?, self.number("a number of disk operations")?, self.time()?),
            "pause" => Fault::Pause(self.party()?, self.time()?),
            "slow" => Fault::Slow(self.party()?, self.time()?),
            "move" => Fault::Move(self.party()?, self.time()?),
            "unknown-committed" => Fault::UnknownCommitted(self.party()?),
            "unknown-lost" => Fault::UnknownLost(self.party()?),
            "skew" => Fault::Skew(self.party()?, self.number("milliseconds")?),
            "drift" => Fault::Drift(self.party()?, self.number("parts per million")?),
            "suspend" => Fault::Suspend(self.time()?),
            "flip" => Fault::Flip(self.disk()?, self.number("a draw")?),
            "misdirect" => Fault::Misdirect(self.disk()?),
            "disk-errors" => Fault::DiskErrors(self.party()?, self.number("a per mille")?, self.time()?),
            "full" => Fault::Full(self.party()?, self.time()?),
            "wipe" => Fault::Wipe(self.disk()?),
            "step" => Fault::Step(self.party()?, self.number("seconds")?, self.time()?),
            "unmount" => Fault::Unmount(self.disk()?, self.time()?),
            other => return Err(format!("{other:?} is not a fault; known are {}", Fault::KINDS.join(", "))),
        })
    }
}

/// Seconds that a script may last: a day.
const TIME_S_MAX: f64 = 86_400.0;
/// Bytes of one write: they are kept in memory several times over.
const WRITE_BYTES_MAX: u32 = 32 << 20;
/// Bytes of a file that are compared; above the limit of all files a size is refused by the cluster.
const FILE_SIZE_MAX: u64 = 256 << 20;

fn parse_time(word: &str) -> Result<Duration, String> {
    let seconds: f64 = word.parse().map_err(|_| format!("{word:?} is not a time in seconds"))?;
    // Later than that, nothing but the nodes' own ticks would be simulated for a very long time.
    if !(0.0..=TIME_S_MAX).contains(&seconds) {
        return Err(format!("{word:?} is not a time from 0 to {TIME_S_MAX} seconds"));
    }
    Ok(Duration::from_micros((seconds * 1e6).round() as u64))
}

fn parse_lane(word: &str) -> Result<Lane, String> {
    let lane = word.strip_prefix('c').map(|rest| rest.split_once('.').unwrap_or((rest, "0")));
    let lane = lane.and_then(|(c, t)| Some(Lane { client: c.parse().ok()?, thread: t.parse().ok()? }));
    lane.ok_or_else(|| format!("{word:?} is neither `fault` nor a lane like c0.1"))
}

/// What a script without a `cluster` line gets.
pub fn default_cluster() -> ClusterConfig {
    ClusterConfig {
        shards: 2,
        disks: 5,
        data_blocks: 2,
        parity_blocks: 1,
        engine: Engine::Sim,
        flush_permille: 20,
        page: 0,
        collide: false,
        replicas: 1,
        joint: false,
        leases: false,
        inline: 0,
        heal: None,
    }
}

/// Kinds of forged certificates and proofs.
pub const FORGERIES: u32 = 11;
/// Members that a log may have.
pub const REPLICAS_MAX: u32 = 7;
/// Clients and threads of a client that a script may have.
const LANES_MAX: u32 = 64;

impl Script {
    fn cluster_line(&mut self, words: Words<'_>) -> Result<(), String> {
        for word in words.0 {
            let (key, value) = word.split_once('=').ok_or_else(|| format!("{word:?} is not key=value"))?;
            let number = || value.parse::<u32>().map_err(|_| format!("{value:?} is not a number"));
            match key {
                "shards" => self.cluster.shards = number()?,
                "disks" => self.cluster.disks = number()?,
                "flush" => self.cluster.flush_permille = number()?,
                "page" => self.cluster.page = number()?,
                "clients" => self.clients = number()?,
                "inline" => self.cluster.inline = number()?,
                "replicas" => self.cluster.replicas = number()?,
                "nodes" => {
                    self.cluster.joint = match value {
                        "apart" => false,
                        "joint" => true,
                        _ => return Err(format!("{value:?} are no nodes; apart and joint are")),
                    }
                }
                "reads" => {
                    self.cluster.leases = match value {
                        "asked" => false,
                        "leases" => true,
                        _ => return Err(format!("{value:?} are no reads; asked and leases are")),
                    }
                }
                "policy" => {
                    let parts =
                        value.split_once('+').and_then(|(d, p)| Some((d.parse().ok()?, p.parse().ok()?)));
                    (self.cluster.data_blocks, self.cluster.parity_blocks) =
                        parts.ok_or_else(|| format!("{value:?} is not a policy like 2+1"))?;
                }
                "engine" => {
                    self.cluster.engine = match value {
                        "sim" => Engine::Sim,
                        "local" => Engine::Local,
                        "raft" => Engine::Raft,
                        _ => return Err(format!("{value:?} is not an engine; sim, local and raft are")),
                    }
                }
                "names" => {
                    self.cluster.collide = match value {
                        "plain" => false,
                        "colliding" => true,
                        _ => return Err(format!("{value:?} are no names; plain and colliding are")),
                    }
                }
                _ => {
                    return Err(format!(
                        "{key:?} is not known; shards, disks, policy, engine, flush, page, names, clients, replicas, nodes are"
                    ));
                }
            }
        }
        Ok(())
    }

    fn line(&mut self, line: &str) -> Result<(), String> {
        let mut words = Words(line.split('#').next().unwrap_or("").split_whitespace());
        let Some(first) = words.0.next() else { return Ok(()) };
        match first {
            "seed" => self.seed = words.number("a seed")?,
            "cluster" => return self.cluster_line(words),
            time => {
                let at = parse_time(time)?;
                let action = match words.next("a lane or `fault`")? {
                    "fault" => Action::Strike(words.fault()?),
                    lane => Action::Operate(parse_lane(lane)?, words.operation()?),
                };
                self.events.push(Event { at, action });
            }
        }
        match words.0.next() {
            None => Ok(()),
            Some(rest) => Err(format!("{rest:?} is too much")),
        }
    }

    fn check(&mut self) -> Result<(), String> {
        let c = &self.cluster;
        let blocks = c.data_blocks.saturating_add(c.parity_blocks);
        if !c.shards.is_power_of_two() || c.shards > 16 {
            return Err("shards: 1, 2, 4, 8 or 16".into());
        }
        if c.replicas == 0 || c.replicas > REPLICAS_MAX {
            return Err(format!("replicas: 1 to {REPLICAS_MAX}"));
        }
        if c.replicas > 1 && c.engine == Engine::Local {
            return Err("replicas: the engine local has one; write engine=sim or engine=raft".into());
        }
        if c.joint && (c.replicas == 1 || c.engine != Engine::Raft) {
            return Err("nodes: joint ones keep logs of several members; write engine=raft replicas=3".into());
        }
        if c.leases && c.engine != Engine::Raft {
            return Err("reads: only the engine raft has leases; write engine=raft".into());
        }
        if c.data_blocks == 0 || c.data_blocks > DATA_BLOCKS_MAX || c.parity_blocks > PARITY_BLOCKS_MAX {
            return Err(format!(
                "policy: 1 to {DATA_BLOCKS_MAX} data and up to {PARITY_BLOCKS_MAX} parity blocks"
            ));
        }
        if c.disks < blocks || c.disks > 64 {
            return Err("disks: at least as many as a span has blocks, at most 64".into());
        }
        let clients = self.events.iter().filter_map(|e| match &e.action {
            Action::Operate(lane, _) => Some(*lane),
            Action::Strike(_) => None,
        });
        for lane in clients {
            if lane.client >= LANES_MAX || lane.thread >= LANES_MAX {
                return Err(format!("lane {lane}: clients and threads go from 0 to {}", LANES_MAX - 1));
            }
            self.clients = self.clients.max(lane.client + 1);
        }
        self.clients = self.clients.clamp(1, LANES_MAX);
        let (shards, disks, clients, replicas) = (c.shards, c.disks, self.clients, c.replicas);
        let exists = |party: &Party| match party {
            Party::Registry | Party::Cdc => true,
            Party::Shard(n) => *n < shards,
            Party::Disk(n) => *n < disks,
            Party::Client(n) => *n < clients,
        };
        for event in &self.events {
            let what = match &event.action {
                Action::Operate(_, operation @ (Operation::Survey(disk) | Operation::Flag(disk, _)))
                    if *disk >= disks =>
                {
                    operation.to_string()
                }
                Action::Strike(fault) if !fault.parties().iter().all(exists) => fault.to_string(),
                Action::Strike(fault @ Fault::Trim(_, member)) if *member >= replicas => fault.to_string(),
                Action::Operate(..) | Action::Strike(_) => continue,
            };
            return Err(format!("`{what}` names a party that the cluster does not have"));
        }
        self.events.sort_by_key(|e| e.at);
        Ok(())
    }
}

impl Fault {
    /// Whom it names.
    pub fn parties(&self) -> Vec<Party> {
        match self {
            Fault::Loss(..) | Fault::Duplicate(..) | Fault::Delay(..) | Fault::Suspend(_) => vec![],
            Fault::Partition(a, b, _) | Fault::OneWay(a, b, _) | Fault::Clog(a, b, _) => vec![*a, *b],
            Fault::Isolate(a, _)
            | Fault::Crash(a, _)
            | Fault::Kill(a, _)
            | Fault::Lose(a, _)
            | Fault::Trim(a, _)
            | Fault::Stall(a, ..)
            | Fault::Hang(a, ..)
            | Fault::PowerCut(a, ..)
            | Fault::Pause(a, _)
            | Fault::Slow(a, _)
            | Fault::Move(a, _)
            | Fault::UnknownCommitted(a)
            | Fault::UnknownLost(a)
            | Fault::Skew(a, _)
            | Fault::Drift(a, _)
            | Fault::DiskErrors(a, ..)
            | Fault::Full(a, _)
            | Fault::Step(a, ..) => vec![*a],
            Fault::Flip(disk, _) | Fault::Misdirect(disk) | Fault::Wipe(disk) | Fault::Unmount(disk, _) => {
                vec![Party::Disk(*disk)]
            }
        }
    }
}

impl FromStr for Script {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Script, ParseError> {
        let mut script = Script { seed: 0, cluster: default_cluster(), clients: 1, events: Vec::new() };
        for (index, line) in text.lines().enumerate() {
            script.line(line).map_err(|what| ParseError { line: index + 1, what })?;
        }
        script.check().map_err(|what| ParseError { line: 0, what })?;
        Ok(script)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_survives_its_text() {
        for seed in 0..50 {
            let script = crate::generate::generate(seed, crate::generate::Profile::Mixed);
            let text = script.to_string();
            let again: Script = text.parse().expect("reads what was written");
            assert_eq!(again.to_string(), text);
            assert_eq!(again.events, script.events);
        }
    }

    #[test]
    fn what_cannot_be_read_is_named_with_its_line() {
        for (text, line, part) in [
            ("seed x", 1, "a seed"),
            ("seed 1\n0.1 c0 fly /a", 2, "not an operation"),
            ("0.1 c0 mkdir a", 1, "begin with /"),
            ("0.1 c99 mkdir /a", 0, "0 to 63"),
            ("-1 c0 mkdir /a", 1, "time"),
            ("0.1 fault crash shard7 1", 0, "does not have"),
            ("0.1 fault melt shard0", 1, "not a fault"),
            ("cluster replicas=3\n0.1 fault trim shard0 3", 0, "does not have"),
            ("cluster shards=3", 0, "1, 2, 4"),
            ("cluster disks=2", 0, "at least as many"),
            ("cluster policy=20+2 disks=30", 0, "1 to 16 data"),
            ("0.1 c0 mkdir /a /b", 1, "too much"),
        ] {
            let error = text.parse::<Script>().expect_err(text);
            assert!(error.line == line && error.what.contains(part), "{text}: {error}");
        }
    }
}
