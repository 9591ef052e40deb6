//! What a node does for what is stored, without being told.
//!
//! * Each of its disks is read through once in a set time, spread over it, as far as the metadata know blocks of it; what is missing or
//!   damaged is computed from the others and written elsewhere. How far that is, is kept on the disk. Where a block is missing
//!   the disk has lost more than a block, and is read through at once.
//! * A block that somebody has asked for in vain is looked at at once.
//! * The leader of a shard moves the shard's blocks away from disks that are gone or are to be emptied.
//! * The leader of the registry condemns disks that have not answered for too long: they are emptied as far as the others allow, and are
//!   used again when they are back; all that is left of them is read then.
//!
//! Invariants: nothing of a disk counts as lost because it does not answer for a moment; what an operator has said of a disk is not taken
//! back; whoever stops half-way leaves nothing that is not found by who goes on.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use clutch_blocks::BlockService;
use clutch_client::{Client, ClientError};
use clutch_client_maintenance::heal::{self, HealOptions, Healed, Lost, Pace, Slots};
use clutch_log::LogId;
use clutch_proto::{
    admin::{DiskStatus, HealingStatus},
    mutants::{self, Mutant},
    registry::Map,
};
use parking_lot::Mutex;

use crate::{Node, node::Replicating};

mod scrub;
mod watch;

/// A disk on which nothing was left is looked at again after so many looks: what was being written then may be in use by now.
const LOOKS_BETWEEN: u32 = 6;
/// And one of which nothing could be moved after so many at most.
const LOOKS_BETWEEN_MAX: u32 = 120;
/// A service that does not answer within this is away at the moment.
const ANSWERS_WITHIN: Duration = Duration::from_secs(5);
/// How spans are looked at that may be written anew.
const REPAIRING: HealOptions = HealOptions { check: false, repair: true, concurrency: 4, only: 0 };
/// Failures that are told.
const FAILURES_MAX: usize = 20;

/// How a node looks after what is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HealSettings {
    /// A disk that has not answered for so long is rebuilt elsewhere; zero for never.
    pub rebuild_after: Duration,
    /// In so long each disk is read through once; zero for never.
    pub scrub_every: Duration,
    /// Bytes of blocks that a node writes in a second at most for this; 0 for no limit.
    pub bytes_per_s: u64,
    /// How often it looks.
    pub look_every: Duration,
}

impl Default for HealSettings {
    fn default() -> HealSettings {
        HealSettings {
            rebuild_after: Duration::from_secs(900),
            scrub_every: Duration::from_secs(30 * 24 * 60 * 60),
            bytes_per_s: 64 << 20,
            look_every: Duration::from_secs(5),
        }
    }
}

/// What is to be emptied, as far as it is for this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Wanted {
    services: BTreeSet<u64>,
    slots: Vec<Slots>,
}

/// What a node has done and does, for those who ask.
#[derive(Default)]
pub(crate) struct Board {
    /// `None` while nobody looks after anything.
    healing: Mutex<Option<HealingStatus>>,
    disks: Mutex<BTreeMap<u64, DiskStatus>>,
}

impl Board {
    pub(crate) fn healing(&self) -> Option<HealingStatus> {
        self.healing.lock().clone()
    }

    /// All disks of the node.
    pub(crate) fn disks(&self, blocks: &BTreeMap<u64, Arc<BlockService>>) -> Vec<DiskStatus> {
        let known = self.disks.lock();
        let status = |(id, service): (&u64, &Arc<BlockService>)| DiskStatus {
            service_id: *id,
            directory: service.store().dir().display().to_string(),
            fault: service.fault().unwrap_or_default(),
            ..known.get(id).cloned().unwrap_or_default()
        };
        blocks.iter().map(status).collect()
    }

    fn heal(&self, change: impl FnOnce(&mut HealingStatus)) {
        change(self.healing.lock().get_or_insert_default());
    }

    fn disk(&self, id: u64, change: impl FnOnce(&mut DiskStatus)) {
        change(self.disks.lock().entry(id).or_default());
    }
}

/// Looks after what is stored, for one node.
pub(crate) struct Healer {
    client: Client,
    replicas: Vec<Replicating>,
    blocks: BTreeMap<u64, Arc<BlockService>>,
    settings: HealSettings,
    /// What it writes for all of this.
    pace: Pace,
    wanted: Mutex<Wanted>,
    board: Arc<Board>,
    stopping: Arc<AtomicBool>,
}

impl Healer {
    /// Begins, and goes on until the node stops.
    pub(crate) fn begin(node: &Node, settings: HealSettings) {
        let watch = node.watch();
        let healer = Arc::new(Healer {
            // With sessions of its own, so that what it waits for holds up nobody else.
            client: node.client().sibling(),
            replicas: watch.replicas.clone(),
            blocks: watch.blocks.clone(),
            settings,
            pace: Pace::of(settings.bytes_per_s),
            wanted: Mutex::default(),
            board: watch.board.clone(),
            stopping: node.stopping(),
        });
        healer.board.heal(|_| {});
        let runtime = healer.client.runtime().clone();
        let seeing = healer.clone();
        runtime.spawn("see map", async move { seeing.see_map().await });
        for (id, service) in healer.blocks.clone() {
            let healer = healer.clone();
            runtime.spawn("scrub", async move { healer.look_after(id, service).await });
        }
        if !healer.replicas.is_empty() {
            let of_shards = healer.clone();
            runtime.spawn("heal", async move { of_shards.empty_disks().await });
            runtime.spawn("watch disks", async move { healer.watch_disks().await });
        }
    }

    /// Waits until the next look; whether there is to be one.
    async fn goes_on(&self) -> bool {
        self.client.runtime().clock.sleep(self.settings.look_every).await;
        !self.stopping.load(Ordering::Relaxed)
    }

    fn leads(&self, log: impl Fn(LogId) -> bool) -> BTreeSet<LogId> {
        let led = self.replicas.iter().filter(|(id, _, of)| log(*id) && of.status().is_self);
        led.map(|(id, _, _)| *id).collect()
    }

    /// The slots of the shards that are led here.
    fn slots(&self, map: &Map) -> Vec<Slots> {
        let led = self.leads(|id| id.role == LogId::shard(0).role);
        let of = map.shards.iter().filter(|shard| led.contains(&LogId::shard(shard.shard)));
        // Within 0..=255, or not of this build.
        let slots = of.filter_map(|shard| {
            Some(u8::try_from(shard.slot_first).ok()?..=u8::try_from(shard.slot_last).ok()?)
        });
        slots.collect()
    }

    /// Keeps in mind what is to be emptied by whom, so that whoever does that stops when it is over.
    async fn see_map(&self) {
        while self.goes_on().await {
            if let Ok(map) = self.client.refresh_map().await {
                *self.wanted.lock() = Wanted { services: heal::to_be_emptied(&map), slots: self.slots(&map) };
            }
        }
    }

    async fn empty_disks(&self) {
        let mut last = Wanted::default();
        // How many looks are left out: nothing was left, or nothing could be done.
        let (mut pause, mut looks) = (0, 0);
        // Where that is enough: a bug.
        let mut found_empty = Vec::new();
        while self.goes_on().await {
            let wanted = self.wanted.lock().clone();
            if wanted != last {
                pause = 0;
                last.clone_from(&wanted);
            }
            if wanted.services.is_empty() || wanted.slots.is_empty() {
                self.board.heal(|told| {
                    *told =
                        HealingStatus { away: std::mem::take(&mut told.away), ..HealingStatus::default() };
                });
                continue;
            }
            looks += 1;
            if looks <= pause || found_empty.contains(&wanted) {
                continue;
            }
            looks = 0;
            pause = match self.empty(&wanted).await {
                Ok(healed) if healed.spans_left == 0 => {
                    found_empty.extend(mutants::is(Mutant::EmptiedAtOneLook).then(|| wanted.clone()));
                    LOOKS_BETWEEN
                }
                Ok(healed) if healed.moved > 0 => 0,
                // It may take an operator until more can be done.
                Ok(_) => (pause * 2).clamp(1, LOOKS_BETWEEN_MAX),
                Err(error) => {
                    tracing::debug!(%error, "disks are not emptied for now");
                    (pause * 2).clamp(1, LOOKS_BETWEEN)
                }
            };
        }
    }

    async fn empty(&self, wanted: &Wanted) -> Result<Healed, ClientError> {
        let clock = self.client.runtime().clock.clone();
        let begun = clock.monotonic();
        let map = self.client.map().await?;
        let away = heal::unavailable(&self.client.with_patience(ANSWERS_WITHIN), &map).await;
        let lost = Lost { emptied: wanted.services.clone(), away: away.into_keys().collect() };
        let mut tell = |healed: &Healed| {
            let took_ms = (clock.monotonic() - begun).as_millis().max(1) as u64;
            self.board.heal(|told| {
                (told.spans_left, told.bytes_left) = (healed.spans_left, healed.bytes_left);
                (told.moved_bytes, told.bytes_per_s) =
                    (healed.moved_bytes, healed.moved_bytes.saturating_mul(1000) / took_ms);
            });
        };
        let goes_on = || !self.stopping.load(Ordering::Relaxed) && *self.wanted.lock() == *wanted;
        let by = (&self.pace, &goes_on as &(dyn Fn() -> bool + Sync));
        let healed = heal::empty(&self.client, &lost, &wanted.slots, REPAIRING, by, &mut tell).await;
        self.board.heal(|told| {
            told.failures = match &healed {
                Ok(healed) => healed.failures.iter().take(FAILURES_MAX).cloned().collect(),
                Err(error) => vec![error.to_string()],
            };
        });
        if let Ok(healed) = &healed
            && healed.moved > 0
        {
            self.client.runtime().note("heal: a disk is emptied by the nodes");
            let (blocks, left) = (healed.moved, healed.spans_left);
            tracing::warn!(blocks, left, "moved blocks from disks that are gone or are to be emptied");
        }
        healed
    }
}
