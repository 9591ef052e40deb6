//! From a seed to a script. Every seed draws its own mix of operations, sizes, rates and kinds of faults (swarm
//! testing; Groce et al., 2012), so that rare combinations meet.

use std::{collections::BTreeSet, time::Duration};

use rand::{Rng as _, SeedableRng as _, seq::IndexedRandom as _};
use rand_chacha::ChaCha8Rng;

use crate::{
    script::{Action, Event, Fault, Lane, Operation, Party, Script},
    sim_cluster::{ClusterConfig, Engine, Members},
};

/// What scripts are like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// Everything.
    Mixed,
    /// Names and attributes, few bytes.
    Metadata,
    /// Many bytes, on bad disks.
    Data,
    /// No faults at all.
    Calm,
}

/// Kinds of operations; every seed weighs them anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    MakeDirectory,
    RemoveDirectory,
    Create,
    /// As often again.
    CreateMore,
    Write,
    Symlink,
    Read,
    ReadRange,
    Stat,
    List,
    /// As often again.
    ListMore,
    History,
    Move,
    /// One directory, or two that would make a loop together.
    MoveDirectories,
    Remove,
    Forge,
    Undelete,
    /// Also in place of what cannot be drawn.
    ChangeMode,
    Patch,
    /// A past content comes back, or the file is cut.
    Rework,
    Contents,
    Policy,
    Forget,
    Collect,
    /// A content that is given up, or put together from two.
    Draft,
    MoveBlock,
    Recode,
    Survey,
}

impl Kind {
    /// Every kind, and the largest weight that it is given; looking is cheap and finds stale answers, and some are many requests each.
    const ALL: [(Kind, u32); 28] = [
        (Kind::MakeDirectory, 6),
        (Kind::RemoveDirectory, 6),
        (Kind::Create, 6),
        (Kind::CreateMore, 6),
        (Kind::Write, 6),
        (Kind::Symlink, 6),
        (Kind::Read, 6),
        (Kind::ReadRange, 6),
        (Kind::Stat, 12),
        (Kind::List, 12),
        (Kind::ListMore, 12),
        (Kind::History, 6),
        (Kind::Move, 6),
        (Kind::MoveDirectories, 6),
        (Kind::Remove, 6),
        (Kind::Forge, 6),
        (Kind::Undelete, 6),
        (Kind::ChangeMode, 6),
        (Kind::Patch, 6),
        (Kind::Rework, 6),
        (Kind::Contents, 6),
        (Kind::Policy, 6),
        (Kind::Forget, 6),
        (Kind::Collect, 1),
        (Kind::Draft, 6),
        (Kind::MoveBlock, 3),
        (Kind::Recode, 3),
        (Kind::Survey, 1),
    ];
}
/// Names that directories and files of one directory can have.
const NAMES: u32 = 12;
/// Directories that a script makes at a time.
const DIRECTORIES_MAX: usize = 40;

/// Draws a script.
pub fn generate(seed: u64, profile: Profile) -> Script {
    generate_replicated(seed, profile, Members::Drawn)
}

/// The same for logs that are kept so.
pub fn generate_replicated(seed: u64, profile: Profile, members: Members) -> Script {
    let mut generator = Generator::new(seed, profile);
    members.set(seed, &mut generator.cluster);
    generator.script()
}

/// Adds faults to operations that came from elsewhere.
pub fn strike(script: &mut Script, seed: u64) {
    let mut generator = Generator::new(seed, Profile::Mixed);
    generator.cluster = script.cluster.clone();
    generator.clients = script.clients;
    generator.focus = None;
    generator.set_bad_disks();
    let length = script.events.last().map_or(Duration::from_secs(1), |e| e.at);
    let faults = generator.faults(length);
    script.seed = seed;
    script.events.extend(faults);
    script.events.sort_by_key(|e| e.at);
}

fn draw_cluster(rng: &mut ChaCha8Rng, seed: u64, data_blocks: u32, parity_blocks: u32) -> ClusterConfig {
    ClusterConfig {
        shards: *[1, 2, 2, 4].choose(rng).expect("some"),
        disks: data_blocks + parity_blocks + rng.random_range(1..3),
        data_blocks,
        parity_blocks,
        engine: if rng.random_ratio(3, 5) { Engine::Sim } else { Engine::Local },
        flush_permille: *[0, 5, 50, 300].choose(rng).expect("some"),
        // From the seed alone: it moves no other draw. Every third cluster has small pages.
        page: if seed.is_multiple_of(3) { 2 + (seed / 3 % 4) as u32 } else { 0 },
        // And in every fifth one many names have one hash.
        collide: seed % 5 == 4,
        replicas: 1,
        joint: false,
        leases: false,
        inline: [0, 600, 0, 65_536][(seed / 2 % 4) as usize],
        heal: None,
    }
}

struct Generator {
    rng: ChaCha8Rng,
    seed: u64,
    profile: Profile,
    cluster: ClusterConfig,
    clients: u32,
    threads: u32,
    weights: [u32; Kind::ALL.len()],
    /// Longest file.
    bytes_max: u32,
    /// What would exist if everything worked.
    directories: BTreeSet<String>,
    files: BTreeSet<String>,
    removed: Vec<String>,
    salt: u64,
    /// Disks that may lose or change what they hold; no more than spans can do without.
    bad_disks: Vec<u32>,
    /// Half of all faults strike this one.
    focus: Option<Party>,
}

impl Generator {
    fn new(seed: u64, profile: Profile) -> Generator {
        let mut rng = ChaCha8Rng::seed_from_u64(seed ^ 0x5eed);
        let (data_blocks, parity_blocks) =
            *[(2, 1), (1, 1), (2, 2), (4, 2), (1, 2)].choose(&mut rng).expect("some");
        let cluster = draw_cluster(&mut rng, seed, data_blocks, parity_blocks);
        let mut weights = [0; Kind::ALL.len()];
        for ((kind, most), weight) in Kind::ALL.into_iter().zip(&mut weights) {
            assert_eq!(Kind::ALL[kind as usize].0, kind, "the table is in the order of the kinds");
            // A kind is left out now and then.
            *weight = if rng.random_ratio(1, 6) { 0 } else { rng.random_range(1..=most) };
        }
        let mut weigh = |kind: Kind, weight: u32| weights[kind as usize] = weight;
        match profile {
            Profile::Metadata => {
                let of_bytes = [
                    Kind::Write,
                    Kind::ReadRange,
                    Kind::Forge,
                    Kind::Patch,
                    Kind::Rework,
                    Kind::Draft,
                    Kind::MoveBlock,
                    Kind::Recode,
                ];
                of_bytes.into_iter().for_each(|kind| weigh(kind, 0));
                weigh(Kind::Read, 1);
            }
            Profile::Data => {
                weigh(Kind::Write, 8);
                weigh(Kind::Read, 10);
                weigh(Kind::ReadRange, 6);
            }
            Profile::Mixed | Profile::Calm => {}
        }
        // Something must come into being.
        for kind in [Kind::MakeDirectory, Kind::Create] {
            weights[kind as usize] = weights[kind as usize].max(2);
        }
        let mut generator = Generator {
            clients: rng.random_range(2..=6),
            threads: rng.random_range(1..=4),
            bytes_max: *[5_000, 20_000, 60_000].choose(&mut rng).expect("some"),
            rng,
            seed,
            profile,
            cluster,
            weights,
            directories: BTreeSet::from([String::new()]),
            files: BTreeSet::new(),
            removed: Vec::new(),
            salt: 0,
            bad_disks: Vec::new(),
            focus: None,
        };
        generator.focus = match generator.rng.random_range(0..6) {
            0 | 1 => Some(Party::Cdc),
            2 => Some(Party::Shard(generator.rng.random_range(0..generator.cluster.shards))),
            _ => None,
        };
        generator.set_bad_disks();
        generator
    }

    fn set_bad_disks(&mut self) {
        let disks: Vec<u32> = (0..self.cluster.disks).collect();
        self.bad_disks =
            disks.choose_multiple(&mut self.rng, self.cluster.parity_blocks as usize).copied().collect();
    }

    fn script(mut self) -> Script {
        let lanes = self.clients * self.threads;
        let operations = match self.profile {
            Profile::Data => self.rng.random_range(100..400),
            _ => *[150, 600, 1500, 3000].choose(&mut self.rng).expect("some") + self.rng.random_range(0..200),
        };
        // The time that a lane thinks between two operations.
        let think_us = *[200u64, 1500, 6000].choose(&mut self.rng).expect("some");
        let mut at: Vec<u64> = vec![0; lanes as usize];
        let mut events = Vec::new();
        let mut count = 0;
        if self.weights[Kind::Collect as usize] > 0 {
            // Where nothing is said, everything is kept for days.
            let action = Action::Operate(Lane { client: 0, thread: 0 }, self.keep("/".into()));
            events.push(Event { at: Duration::ZERO, action });
        }
        if self.weights[Kind::MoveDirectories as usize] > 0 {
            // A tree that is deep enough for moves to meet in it.
            for path in ["/d0", "/d1", "/d0/d2", "/d1/d3", "/d0/d2/d4", "/d1/d3/d5"] {
                self.directories.insert(path.to_owned());
                let action =
                    Action::Operate(Lane { client: 0, thread: 0 }, Operation::MakeDirectory(path.into()));
                events.push(Event { at: Duration::ZERO, action });
            }
        }
        while count < operations {
            let lane = (0..lanes as usize).min_by_key(|l| at[*l]).expect("at least one lane");
            let (client, thread) = (lane as u32 / self.threads, lane as u32 % self.threads);
            let other = (lane + 1) % lanes as usize;
            for (which, operation) in self.operations() {
                let lane = if which == 0 {
                    Lane { client, thread }
                } else {
                    Lane { client: other as u32 / self.threads, thread: other as u32 % self.threads }
                };
                let action = Action::Operate(lane, operation);
                events.push(Event {
                    at: Duration::from_micros(at[client as usize * self.threads as usize + thread as usize]),
                    action,
                });
                count += 1;
            }
            at[lane] += 100 + self.rng.random_range(0..think_us * 2);
        }
        let length = Duration::from_micros(at.into_iter().max().unwrap_or(0));
        if self.profile != Profile::Calm {
            let faults = self.faults(length);
            events.extend(faults);
            events.extend(self.flags(length));
            events.extend(self.slow_reads(length));
        }
        events.sort_by_key(|e| e.at);
        Script { seed: self.seed, cluster: self.cluster, clients: self.clients, events }
    }

    /// In every fourth seed an operator sets flags of disks, and takes them back now and then. Drawn by themselves: they
    /// move no other draw.
    fn flags(&self, length: Duration) -> Vec<Event> {
        if self.seed % 4 != 1 {
            return Vec::new();
        }
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed ^ 0xf1a6);
        let lane = Lane { client: 0, thread: 0 };
        let end_us = (length.as_micros() as u64).max(1000);
        let mut flag = |_| {
            let at = Duration::from_micros(rng.random_range(0..end_us));
            let (disk, flags) = (rng.random_range(0..self.cluster.disks), rng.random_range(0..2));
            Event { at, action: Action::Operate(lane, Operation::Flag(disk, flags)) }
        };
        (0..6).map(&mut flag).collect()
    }

    /// In every fourth seed files of many pieces are read, and while they are, they change and all grants end. Drawn like
    /// [`Generator::flags`].
    fn slow_reads(&self, length: Duration) -> Vec<Event> {
        if self.seed % 4 != 2 || self.profile == Profile::Metadata {
            return Vec::new();
        }
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed ^ 0x510e);
        let (reader, writer) =
            (Lane { client: 0, thread: 0 }, Lane { client: self.clients - 1, thread: self.threads - 1 });
        let mut events = Vec::new();
        for file in 0..5 {
            let (path, salt) = (format!("/slow{file}"), 1_000_000 + file * 100);
            // Scripts say microseconds.
            let mut at = Duration::from_micros(length.as_micros() as u64 * file / 5);
            let mut add = |at: Duration, lane, operation| {
                events.push(Event { at, action: Action::Operate(lane, operation) });
            };
            add(at, writer, Operation::Write(path.clone(), 40_000, salt));
            for patch in 1..4u64 {
                add(at, writer, Operation::Patch(path.clone(), patch * 9000, 3000, salt + patch));
            }
            at += Duration::from_millis(400);
            add(at, reader, Operation::Read(path.clone()));
            let mut soon = || at + Duration::from_micros(rng.random_range(0..12_000));
            add(soon(), writer, Operation::Patch(path, 0, 40_000, salt + 50));
            let ends =
                Event { at: soon(), action: Action::Strike(Fault::Suspend(Duration::from_secs(3600))) };
            events.push(ends);
        }
        events
    }

    fn directory(&mut self) -> String {
        let all: Vec<&String> = self.directories.iter().collect();
        (*all.choose(&mut self.rng).expect("the root")).clone()
    }

    fn file(&mut self) -> String {
        let all: Vec<&String> = self.files.iter().collect();
        match all.choose(&mut self.rng).filter(|_| self.rng.random_ratio(9, 10)) {
            Some(file) => (*file).clone(),
            None => format!("{}/f{}", self.directory(), self.rng.random_range(0..NAMES)),
        }
    }

    fn new_name(&mut self) -> String {
        let kind = if self.rng.random_ratio(1, 30) { 'd' } else { 'f' };
        format!("{}/{kind}{}", self.directory(), self.rng.random_range(0..NAMES))
    }

    fn next_salt(&mut self) -> u64 {
        self.salt += 1;
        if self.rng.random_ratio(1, 20) { 0 } else { self.salt }
    }

    /// One operation, or several that belong together: the lane's own have the number 0, another lane's 1.
    fn operations(&mut self) -> Vec<(u32, Operation)> {
        let total: u32 = self.weights.iter().sum();
        let mut draw = self.rng.random_range(0..total);
        let kind = self.weights.iter().position(|w| {
            if draw < *w {
                return true;
            }
            draw -= w;
            false
        });
        let one = |operation| vec![(0, operation)];
        let kind = kind.map_or(Kind::Create, |kind| Kind::ALL[kind].0);
        match kind {
            Kind::MakeDirectory if self.directories.len() < DIRECTORIES_MAX => {
                let mut parent = self.directory();
                if parent.matches('/').count() > 4 {
                    parent = String::new();
                }
                let path = format!("{parent}/d{}", self.rng.random_range(0..6));
                self.directories.insert(path.clone());
                one(Operation::MakeDirectory(path))
            }
            Kind::RemoveDirectory => {
                let path = match self.directory() {
                    path if path.is_empty() => format!("/d{}", self.rng.random_range(0..6)),
                    path => path,
                };
                let below = format!("{path}/");
                if !self.directories.iter().chain(&self.files).any(|p| p.starts_with(&below)) {
                    self.directories.remove(&path);
                    self.removed.push(path.clone());
                }
                if self.rng.random_ratio(1, 6) {
                    // One that was just made is empty; it comes back at once.
                    let (path, to) = (format!("{path}/e0"), format!("{path}/e1"));
                    return vec![
                        (0, Operation::MakeDirectory(path.clone())),
                        (0, Operation::RemoveDirectory(path.clone())),
                        (0, Operation::Undelete(path, to)),
                    ];
                }
                one(Operation::RemoveDirectory(path))
            }
            Kind::Create | Kind::CreateMore => {
                let path = self.new_name();
                self.files.insert(path.clone());
                let bytes = *[0, 1, 100, 255].choose(&mut self.rng).expect("some");
                one(Operation::Create(path, bytes, self.next_salt()))
            }
            Kind::Write => {
                let path = self.new_name();
                self.files.insert(path.clone());
                let bytes = self.rng.random_range(1..self.bytes_max);
                one(Operation::Write(path, bytes, self.next_salt()))
            }
            Kind::Symlink => {
                let path = self.new_name();
                self.files.insert(path.clone());
                one(Operation::Symlink(path, "../elsewhere".into()))
            }
            Kind::Read => one(Operation::Read(self.file())),
            Kind::ReadRange => one(Operation::ReadRange(
                self.file(),
                self.rng.random_range(0..u64::from(self.bytes_max)),
                self.rng.random_range(1..9000),
            )),
            Kind::Stat => one(Operation::Stat(self.file())),
            Kind::List | Kind::ListMore => {
                let path = match self.directory() {
                    path if path.is_empty() => "/".to_owned(),
                    path => path,
                };
                one(Operation::List(path))
            }
            Kind::History => {
                let path = self.directory();
                one(Operation::History(if path.is_empty() { "/".into() } else { path }))
            }
            Kind::Move => {
                let (from, to) = (self.file(), self.new_name());
                if self.rng.random_ratio(1, 3) {
                    // Onto a directory: it is turned back, if there is something to move.
                    let (onto, from) = (self.directory(), self.new_name());
                    let salt = self.next_salt();
                    self.files.insert(from.clone());
                    return vec![
                        (0, Operation::Create(from.clone(), 1, salt)),
                        (0, Operation::Move(from, if onto.is_empty() { to } else { onto })),
                    ];
                }
                self.files.remove(&from);
                self.files.insert(to.clone());
                one(Operation::Move(from, to))
            }
            Kind::MoveDirectories => self.move_directories(),
            Kind::Remove => {
                let path = self.file();
                self.files.remove(&path);
                self.removed.push(path.clone());
                one(Operation::Remove(path))
            }
            Kind::Forge => one(Operation::Forge(self.new_name(), self.rng.random_range(0..11))),
            Kind::Undelete if !self.removed.is_empty() => {
                let from = self.removed.choose(&mut self.rng).expect("not empty").clone();
                let parent = from.rsplit_once('/').map_or("", |(parent, _)| parent);
                let to = format!("{parent}/f{}", self.rng.random_range(0..NAMES));
                self.files.insert(to.clone());
                one(Operation::Undelete(from, to))
            }
            Kind::Forget if self.rng.random() => {
                // A file that lives elsewhere than its last directory goes through the CDC.
                let (from, to) = (self.file(), self.new_name());
                self.files.remove(&from);
                vec![
                    (0, Operation::Move(from, to.clone())),
                    (0, Operation::Remove(to.clone())),
                    (0, Operation::Forget(to, 0)),
                ]
            }
            Kind::Draft if self.rng.random_ratio(1, 4) => {
                // Writes of its blocks may still be under way when their span is collected.
                let (path, bytes) = (self.new_name(), self.rng.random_range(600..self.bytes_max));
                vec![(0, Operation::Scrap(path, bytes, self.next_salt())), (0, Operation::Collect(false))]
            }
            Kind::Patch
            | Kind::Rework
            | Kind::Contents
            | Kind::Policy
            | Kind::Forget
            | Kind::Collect
            | Kind::Draft
            | Kind::MoveBlock
            | Kind::Recode
            | Kind::Survey => one(self.upkeep(kind)),
            Kind::ChangeMode | Kind::MakeDirectory | Kind::Undelete => {
                one(Operation::ChangeMode(self.file(), self.rng.random_range(0..0o1000)))
            }
        }
    }

    /// What looks after files that exist.
    fn upkeep(&mut self, kind: Kind) -> Operation {
        match kind {
            Kind::Patch => {
                let bytes = *[1, 200, 5000, self.bytes_max].choose(&mut self.rng).expect("some");
                let offset = self.rng.random_range(0..u64::from(self.bytes_max));
                let offset = *[0, offset].choose(&mut self.rng).expect("some");
                let bytes = self.rng.random_range(1..=bytes);
                Operation::Patch(self.file(), offset, bytes, self.next_salt())
            }
            Kind::Rework if self.rng.random() => Operation::Restore(self.file()),
            Kind::Rework => {
                Operation::Truncate(self.file(), self.rng.random_range(0..u64::from(self.bytes_max) * 2))
            }
            Kind::Contents => Operation::Contents(self.file()),
            Kind::Policy => {
                let path = self.directory();
                self.keep(if path.is_empty() { "/".into() } else { path })
            }
            Kind::Forget => {
                let path = match self.removed.choose(&mut self.rng) {
                    Some(path) if self.rng.random() => path.clone(),
                    _ => self.file(),
                };
                Operation::Forget(path, *[0, 1, 50, 3_600_000].choose(&mut self.rng).expect("some"))
            }
            Kind::Collect => Operation::Collect(self.rng.random_ratio(1, 4)),
            Kind::Draft => {
                let (path, bytes) = (self.new_name(), self.rng.random_range(600..self.bytes_max));
                if self.rng.random() {
                    return Operation::Scrap(path, bytes, self.next_salt());
                }
                self.files.insert(path.clone());
                // Zeros are no spans, and only spans can be put together.
                self.salt += 1;
                Operation::Assemble(path, bytes, self.salt)
            }
            Kind::MoveBlock => Operation::MoveBlock(self.file(), self.rng.random_range(0..8)),
            Kind::Recode => Operation::Recode(self.file()),
            Kind::Survey => Operation::Survey(self.rng.random_range(0..self.cluster.disks)),
            other => unreachable!("{other:?} does not look after files"),
        }
    }

    /// A policy that lets things go within the time of a script, mostly.
    fn keep(&mut self, path: String) -> Operation {
        let (age_ms, versions) = match self.rng.random_range(0..5) {
            0 => (None, None),
            1 => (None, Some(self.rng.random_range(0..3))),
            2 => (Some(self.rng.random_range(0..2000)), Some(2)),
            _ => (Some(*[0, 1, 20, 500].choose(&mut self.rng).expect("some")), None),
        };
        Operation::Policy(path, age_ms, versions)
    }

    /// One move of a directory, or two at the same time that would make a loop together.
    fn move_directories(&mut self) -> Vec<(u32, Operation)> {
        let all: Vec<String> = self.directories.iter().filter(|d| !d.is_empty()).cloned().collect();
        let (Some(a), Some(b)) = (all.choose(&mut self.rng).cloned(), all.choose(&mut self.rng).cloned())
        else {
            return vec![(0, Operation::Stat("/".into()))];
        };
        let name = |n: u32| format!("m{n}");
        let child = |rng: &mut ChaCha8Rng, of: &str| {
            let below = format!("{of}/");
            let children: Vec<&String> = all.iter().filter(|d| d.starts_with(&below)).collect();
            children.choose(rng).map_or(of.to_owned(), |d| (*d).clone())
        };
        let is_apart = |a: &str, b: &str| !format!("{a}/").starts_with(&format!("{b}/"));
        if self.rng.random_ratio(1, 2) && is_apart(&a, &b) && is_apart(&b, &a) {
            let (below_a, below_b) = (child(&mut self.rng, &a), child(&mut self.rng, &b));
            let (x, y) = (name(self.rng.random_range(0..4)), name(self.rng.random_range(0..4)));
            return vec![
                (0, Operation::Move(a, format!("{below_b}/{x}"))),
                (1, Operation::Move(b, format!("{below_a}/{y}"))),
            ];
        }
        let kind = if self.rng.random_ratio(1, 10) { 'f' } else { 'd' };
        let parent = match self.rng.random_ratio(1, 3) {
            true => a.rsplit_once('/').map_or(String::new(), |(parent, _)| parent.to_owned()),
            false => self.directory(),
        };
        let to = format!("{parent}/{kind}{}", self.rng.random_range(0..6));
        let below = format!("{a}/");
        if !to.starts_with(&below) && to != a {
            let moved = |paths: &BTreeSet<String>| -> BTreeSet<String> {
                paths
                    .iter()
                    .map(|p| match p.strip_prefix(&below) {
                        Some(rest) => format!("{to}/{rest}"),
                        None if *p == a => to.clone(),
                        None => p.clone(),
                    })
                    .collect()
            };
            (self.directories, self.files) = (moved(&self.directories), moved(&self.files));
        }
        vec![(0, Operation::Move(a, to))]
    }

    fn party(&mut self) -> Party {
        if let Some(focus) = self.focus
            && self.rng.random()
        {
            return focus;
        }
        match self.rng.random_range(0..10) {
            0 => Party::Registry,
            1 | 2 => Party::Cdc,
            3..=6 => Party::Shard(self.rng.random_range(0..self.cluster.shards)),
            7 | 8 => Party::Disk(self.rng.random_range(0..self.cluster.disks)),
            _ => Party::Client(self.rng.random_range(0..self.clients)),
        }
    }

    fn server(&mut self) -> Party {
        loop {
            match self.party() {
                Party::Client(_) => {}
                party => return party,
            }
        }
    }

    fn log_party(&mut self) -> Party {
        if self.rng.random_ratio(1, 3) {
            Party::Cdc
        } else {
            Party::Shard(self.rng.random_range(0..self.cluster.shards))
        }
    }

    /// How long something lasts: mostly short against the clients' patience.
    fn lasting(&mut self) -> Duration {
        if self.rng.random_ratio(1, 60) {
            return Duration::from_secs(25);
        }
        let most = *[2_000u64, 50_000, 700_000, 2_500_000].choose(&mut self.rng).expect("some");
        Duration::from_micros(self.rng.random_range(500..most))
    }

    fn faults(&mut self, length: Duration) -> Vec<Event> {
        let enabled: Vec<&str> = Fault::KINDS
            .into_iter()
            // They come in place of others, by the seed.
            .filter(|kind| *kind != "hang" && *kind != "trim")
            .filter(|_| self.rng.random_ratio(1, 2))
            .collect();
        let most = *[8, 25, 60].choose(&mut self.rng).expect("some");
        let count = self.rng.random_range(3..most);
        let end_us = (length.as_micros() as u64).max(1000);
        let mut events = Vec::new();
        for _ in 0..count {
            let Some(kind) = enabled.choose(&mut self.rng) else { break };
            let at = Duration::from_micros(self.rng.random_range(0..end_us));
            if let Some(fault) = self.fault(kind) {
                if let Fault::Skew(party, _) = &fault
                    && self.rng.random()
                {
                    // A clock that is set back shows when its node forgets what it has seen.
                    let at = at + Duration::from_micros(self.rng.random_range(100..50_000));
                    let crash = Fault::Crash(*party, Duration::from_millis(2));
                    events.push(Event { at, action: Action::Strike(crash) });
                }
                if let Fault::Step(party, ..) = &fault
                    && self.rng.random_ratio(1, 3)
                {
                    // A clock that is wrong when its node starts.
                    let at = at + Duration::from_micros(self.rng.random_range(100..50_000));
                    let crash = Fault::Crash(*party, Duration::from_millis(2));
                    events.push(Event { at, action: Action::Strike(crash) });
                }
                if let Fault::DiskErrors(party, _, lasting) | Fault::Kill(party, lasting) = &fault
                    && self.rng.random()
                {
                    // What was not synced shows when the power goes.
                    let at = at + *lasting + Duration::from_micros(self.rng.random_range(0..80_000));
                    let crash = Fault::Crash(*party, Duration::from_millis(2));
                    events.push(Event { at, action: Action::Strike(crash) });
                }
                if let Fault::Full(Party::Disk(disk), lasting) = &fault
                    && self.rng.random()
                {
                    // What is refused for want of disks, and whose copy comes when there are some again.
                    let other = (disk + 1) % self.cluster.disks;
                    for with in [
                        Fault::Full(Party::Disk(other), *lasting),
                        Fault::Duplicate(500, *lasting),
                        Fault::Delay(3_000_000, *lasting),
                    ] {
                        events.push(Event { at, action: Action::Strike(with) });
                    }
                }
                if let Fault::Move(party, lasting) = &fault
                    && self.rng.random_ratio(1, 4)
                {
                    // Two changes of leaders in a row.
                    let at = at + Duration::from_micros(self.rng.random_range(100..30_000));
                    let again = Fault::Move(*party, *lasting);
                    events.push(Event { at, action: Action::Strike(again) });
                    if self.rng.random() {
                        // Neither can say where it is, until both can.
                        let away = Fault::Crash(Party::Registry, Duration::from_millis(60));
                        let at = at.saturating_sub(Duration::from_millis(40));
                        events.push(Event { at, action: Action::Strike(away) });
                    }
                }
                events.extend(self.with_trims(fault, at));
            }
        }
        events
    }

    /// A fault, and what makes a member need what was trimmed, from what was drawn already: it loses its state behind a trim, or
    /// hears nothing while there is one.
    fn with_trims(&self, fault: Fault, at: Duration) -> Vec<Event> {
        let count = self.cluster.replicas;
        let event = |at: Duration, fault: Fault| Event { at, action: Action::Strike(fault) };
        let (ms, us) = (Duration::from_millis, at.as_micros() as u32);
        let mut events = match &fault {
            Fault::Lose(party, _) if count > 1 => {
                vec![event(at.saturating_sub(ms(30)), Fault::Trim(*party, us % count))]
            }
            Fault::Trim(party, member) if us.is_multiple_of(2) => vec![
                event(at.saturating_sub(ms(400)), Fault::Isolate(*party, ms(900))),
                event(at + ms(100), Fault::Trim(*party, (member + 1) % count)),
            ],
            Fault::Trim(party, _) => vec![event(at + ms(30), Fault::Lose(*party, ms(5)))],
            _ => Vec::new(),
        };
        events.push(event(at, fault));
        events
    }

    fn crash(&mut self, lasting: Duration) -> Fault {
        let party = self.party();
        // One of two, by what was drawn already.
        match party {
            Party::Registry | Party::Cdc | Party::Shard(_)
                if self.cluster.replicas > 1 && lasting.as_micros().is_multiple_of(2) =>
            {
                Fault::Trim(party, (lasting.as_micros() / 2) as u32 % self.cluster.replicas)
            }
            party => Fault::Crash(party, lasting),
        }
    }

    fn kill(&mut self, lasting: Duration) -> Fault {
        match self.server() {
            // Three of five, by what was drawn already, so that no other draw moves.
            party @ (Party::Registry | Party::Cdc | Party::Shard(_)) if lasting.as_micros() % 5 < 3 => {
                Fault::Lose(party, lasting)
            }
            party => Fault::Kill(party, lasting),
        }
    }

    fn stall(&mut self) -> Option<Fault> {
        // Longer than a grant, or than a client's patience, and mostly not.
        let ms = *[20u64, 300, 700, 3_000, 40_000].choose(&mut self.rng)?;
        let (server, after) = (self.server(), self.rng.random_range(0..12));
        // From the seed alone, so that no other draw moves.
        Some(match self.seed % 4 {
            3 => Fault::Hang(server, after, Duration::from_millis(ms)),
            _ => Fault::Stall(server, after, Duration::from_millis(ms)),
        })
    }

    fn fault(&mut self, kind: &str) -> Option<Fault> {
        let lasting = self.lasting();
        let bad = self.bad_disks.choose(&mut self.rng).copied();
        let is_local = self.cluster.engine == Engine::Local;
        let has_logs_on_disks = self.cluster.engine != Engine::Sim;
        Some(match kind {
            "loss" => Fault::Loss(self.rng.random_range(10..=300), lasting),
            "duplicate" => Fault::Duplicate(self.rng.random_range(20..=500), lasting),
            "delay" => Fault::Delay(self.rng.random_range(1_000..300_000), lasting),
            "partition" => Fault::Partition(self.party(), self.server(), lasting),
            "oneway" => Fault::OneWay(self.party(), self.server(), lasting),
            "isolate" => Fault::Isolate(self.party(), lasting),
            "clog" => Fault::Clog(self.party(), self.party(), lasting),
            "crash" => self.crash(lasting),
            "kill" => self.kill(lasting),
            "stall" => self.stall()?,
            "powercut" => {
                let party = match self.cluster.engine {
                    Engine::Local | Engine::Raft => self.server(),
                    Engine::Sim => Party::Disk(self.rng.random_range(0..self.cluster.disks)),
                };
                Fault::PowerCut(party, self.rng.random_range(0..12), lasting)
            }
            "pause" => Fault::Pause(self.party(), lasting),
            "slow" => Fault::Slow(self.server(), lasting),
            "move" if !is_local => Fault::Move(self.log_party(), lasting),
            "unknown-committed" if !has_logs_on_disks => Fault::UnknownCommitted(self.log_party()),
            "unknown-lost" if !has_logs_on_disks => Fault::UnknownLost(self.log_party()),
            // Instead of what only logs outside the nodes can do.
            "move" | "unknown-committed" | "unknown-lost" => Fault::Crash(self.log_party(), lasting),
            "skew" => Fault::Skew(self.party(), self.rng.random_range(-200..200)),
            "drift" => Fault::Drift(self.party(), self.rng.random_range(-20_000..20_000)),
            "suspend" => Fault::Suspend(Duration::from_secs(
                *[1, 60, 3500, 4000, 8 * 3600 + 60].choose(&mut self.rng)?,
            )),
            "flip" => Fault::Flip(bad?, self.rng.random()),
            "misdirect" => Fault::Misdirect(bad?),
            "disk-errors" => {
                let party = match has_logs_on_disks && self.rng.random() {
                    true => self.log_party(),
                    false => Party::Disk(self.rng.random_range(0..self.cluster.disks)),
                };
                Fault::DiskErrors(party, self.rng.random_range(20..500), lasting)
            }
            "full" => {
                let party = match has_logs_on_disks && self.rng.random() {
                    true => self.log_party(),
                    false => Party::Disk(self.rng.random_range(0..self.cluster.disks)),
                };
                Fault::Full(party, lasting)
            }
            "wipe" => Fault::Wipe(bad?),
            "step" => {
                let by = *[30i64, 3600, 86_400, 365 * 86_400].choose(&mut self.rng)?;
                let by = if self.rng.random() { by } else { -by };
                Fault::Step(self.party(), by, lasting)
            }
            "unmount" => Fault::Unmount(bad?, lasting),
            _ => return None,
        })
    }
}
