//! What is measured of a node, in the text format that Prometheus reads, and whether it is ready.
//!
//! Most is looked at when it is asked for; only requests are counted as they come.

use std::{collections::BTreeMap, fmt::Write as _, sync::Arc, time::Duration};

use clutch_blocks::BlockService;
use clutch_log::{Engines, LogId, NodeId, Status as LogStatus};
use clutch_proto::{
    admin::{AdminRequest, DiskStatus, Status, StatusReply, admin_request::Op},
    session::Role,
};
use clutch_runtime::{HybridClock, Runtime};
use futures_util::future::join_all;
use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
        info::Info,
    },
    registry::{Registry, Unit},
};

use crate::{
    handler::{ProcessUsage, node_faults},
    healer::Board,
    node::Replicating,
    room::Room,
};

/// How long a replica, or a disk, may take to say how it is.
const PATIENCE: Duration = Duration::from_secs(2);

/// Requests of one role.
struct Requests {
    took: Histogram,
    refused: Counter,
}

/// What is counted while requests come.
pub(crate) struct Meters {
    took: Family<OfRole, Histogram, fn() -> Histogram>,
    refused: Family<OfRole, Counter>,
    /// The same, at hand.
    by_role: [(Role, Requests); 4],
}

impl Default for Meters {
    fn default() -> Meters {
        // From a tenth of a millisecond to three seconds.
        let buckets: fn() -> Histogram = || Histogram::new(exponential_buckets(1e-4, 2.0, 16));
        let (took, refused) = (Family::new_with_constructor(buckets), Family::<OfRole, Counter>::default());
        let by_role = [Role::Registry, Role::Cdc, Role::Shard, Role::Blocks].map(|role| {
            let of = OfRole { role: name_of(role) };
            let (took, refused) = (took.get_or_create_owned(&of), refused.get_or_create_owned(&of));
            (role, Requests { took, refused })
        });
        Meters { took, refused, by_role }
    }
}

impl Meters {
    /// A request of a role was answered; requests that could not be read are of none, and not counted.
    pub(crate) fn answered(&self, role: Option<Role>, took: Duration, is_refused: bool) {
        if let Some((_, requests)) = self.by_role.iter().find(|(known, _)| Some(*known) == role) {
            requests.took.observe(took.as_secs_f64());
            if is_refused {
                requests.refused.inc();
            }
        }
    }
}

/// Looks at a node; cheap to clone.
#[derive(Clone)]
pub struct Watch {
    pub(crate) runtime: Runtime,
    /// The node's number; `None` of one that is alone.
    pub(crate) own: Option<NodeId>,
    pub(crate) replicas: Vec<Replicating>,
    pub(crate) blocks: BTreeMap<u64, Arc<BlockService>>,
    pub(crate) board: Arc<Board>,
    pub(crate) room: Arc<Room>,
    pub(crate) left_out: BTreeMap<LogId, String>,
    pub(crate) engines: Engines,
    pub(crate) clock: Arc<HybridClock>,
    pub(crate) meters: Arc<Meters>,
    pub(crate) process_usage: ProcessUsage,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfLog {
    log: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfMember {
    log: String,
    node: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfDisk {
    service: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfRole {
    role: &'static str,
}

/// A replica as it says itself, if it answers, and its log.
struct Seen {
    id: LogId,
    replica: Option<StatusReply>,
    log: LogStatus,
}

/// A disk as it says itself.
struct Disk {
    service: u64,
    is_used: bool,
    hangs: bool,
    /// Bytes in all, and those that are free; `None` where it does not answer.
    space: Option<(u64, u64)>,
    /// What its node has found there and done about it.
    healed: DiskStatus,
}

fn name_of(role: Role) -> &'static str {
    match role {
        Role::Registry => "registry",
        Role::Cdc => "cdc",
        Role::Shard => "shard",
        Role::Blocks => "blocks",
        Role::Unspecified => "none",
    }
}

impl Watch {
    async fn replicas(&self) -> Vec<Seen> {
        let all = self.replicas.iter().map(|(id, replica, log)| async move {
            let request = AdminRequest { op: Some(Op::Status(Status::default())) };
            let asked = self.runtime.timeout(PATIENCE, replica.admin(request)).await;
            let replica = asked.and_then(Result::ok).and_then(|reply| reply.status);
            Seen { id: *id, replica, log: log.status() }
        });
        join_all(all).await
    }

    async fn disks(&self) -> Vec<Disk> {
        let mut healed: BTreeMap<u64, DiskStatus> =
            self.board.disks(&self.blocks).into_iter().map(|disk| (disk.service_id, disk)).collect();
        let all = self.blocks.iter().map(|(service, of)| (service, of, healed.remove(service)));
        let all: Vec<_> = all.collect();
        let all = all.into_iter().map(|(service, of, healed)| async move {
            let hangs = of.hangs();
            let is_used = of.store().unusable().is_none() && of.fault().is_none();
            let space = self.runtime.timeout(PATIENCE, of.space()).await.and_then(Result::ok);
            Disk { service: *service, is_used, hangs, space, healed: healed.unwrap_or_default() }
        });
        join_all(all).await
    }

    /// Why the node is not ready to serve what it should; nothing when it is.
    pub async fn unready(&self) -> Vec<String> {
        let (mut reasons, mut members) = (Vec::new(), Vec::new());
        for Seen { id, replica, log } in self.replicas().await {
            // A node that is no member, yet or any more, serves its disks.
            let is_own = |own| log.members.iter().any(|progress| progress.member.node == own);
            if !self.own.is_none_or(is_own) {
                continue;
            }
            match replica {
                None => reasons.push(format!("{id} does not answer")),
                Some(status) if !status.fault.is_empty() => reasons.push(format!("{id}: {}", status.fault)),
                Some(_) => members.push((id, log.leader)),
            }
        }
        // Who follows remembers a leader that is gone, and who leads may be cut off: only a quorum knows.
        let confirmed = members.into_iter().map(|(id, leader)| async move {
            let (_, _, log) = self.replicas.iter().find(|(of, _, _)| *of == id)?;
            let said = self.runtime.timeout(PATIENCE, log.read_barrier(PATIENCE)).await;
            let led_by = leader.map_or_else(String::new, |leader| format!(" (node {leader} led it)"));
            match said {
                Some(Ok(_)) => None,
                Some(Err(fault)) => Some(format!("{id}: no quorum confirms who leads{led_by}: {fault}")),
                None => Some(format!("{id}: no quorum confirms who leads{led_by}")),
            }
        });
        reasons.extend(join_all(confirmed).await.into_iter().flatten());
        reasons.extend(self.left_out.values().cloned());
        reasons
    }

    /// All that is measured, in the text format of OpenMetrics.
    ///
    /// # Panics
    /// Never: writing to a text does not fail.
    pub async fn text(&self) -> String {
        let (replicas, disks) = (self.replicas().await, self.disks().await);
        let mut registry = Registry::with_prefix("clutch");
        let version = Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("build", "The build that runs", version);
        self.of_node(&mut registry);
        self.of_requests(&mut registry);
        of_replicas(&mut registry, &replicas);
        of_disks(&mut registry, &disks);
        let mut text = String::new();
        if let Err(error) = encode(&mut text, &registry) {
            // Only a text that takes no more refuses.
            let _ = writeln!(text, "# {error}");
        }
        text
    }

    fn of_node(&self, registry: &mut Registry) {
        if let Some((cpu_us, resident)) = (self.process_usage)() {
            registry.register_with_unit(
                "process_cpu",
                "Processor time that the process has used",
                Unit::Seconds,
                ConstCounter::new(cpu_us as f64 / 1e6),
            );
            let what = "Memory of the process that is resident";
            registry.register_with_unit("process_resident", what, Unit::Bytes, number(resident));
        }
        let faults = node_faults(&self.blocks, &self.room, &self.left_out).len() as u64;
        registry.register(
            "node_faults",
            "What is wrong with the node beside its replicas, as status says it",
            number(faults),
        );
        let ahead = Gauge::<f64, std::sync::atomic::AtomicU64>::default();
        ahead.set(self.clock.wall_ahead_ms() as f64 / 1e3);
        let what = "How far the wall clock is ahead of the cluster's time";
        registry.register_with_unit("clock_ahead", what, Unit::Seconds, ahead);
        let usage = self.engines.usage();
        registry.register_with_unit(
            "log",
            "What the logs of the node take",
            Unit::Bytes,
            number(usage.bytes),
        );
        let what = "Bytes appended to logs since the start";
        registry.register_with_unit("log_appended", what, Unit::Bytes, ConstCounter::new(usage.appended));
        if let Some(healing) = self.board.healing() {
            let what = "Spans that this node has to move from disks that are gone or are to be emptied";
            registry.register("heal_spans_left", what, number(healing.spans_left));
            let what = "Disks that do not answer, as far as this node watches";
            registry.register("heal_disks_away", what, number(healing.away.len() as u64));
        }
        let what = "How often what was appended to logs was synced since the start";
        registry.register("log_syncs", what, ConstCounter::new(usage.syncs));
    }

    fn of_requests(&self, registry: &mut Registry) {
        let Meters { took, refused, .. } = &*self.meters;
        let what = "How long requests took until they were answered";
        registry.register_with_unit("request_duration", what, Unit::Seconds, took.clone());
        registry.register("requests_refused", "Requests that were answered with a refusal", refused.clone());
    }
}

/// A gauge of whole numbers.
fn number(value: u64) -> Gauge {
    let gauge = Gauge::default();
    gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
    gauge
}

/// Registers a gauge that each of these has a value of.
fn register<L: EncodeLabelSet + Clone + std::hash::Hash + Eq + std::fmt::Debug + Send + Sync + 'static>(
    registry: &mut Registry,
    name: &str,
    what: &str,
    values: impl Iterator<Item = (L, u64)>,
) {
    let family = Family::<L, Gauge>::default();
    for (labels, value) in values {
        family.get_or_create(&labels).set(i64::try_from(value).unwrap_or(i64::MAX));
    }
    registry.register(name, what, family);
}

/// A number that a replica says of itself.
type Said = fn(&StatusReply) -> u64;

/// A number of what is found on a disk.
type SaidOfDisk = fn(&DiskStatus) -> u64;

/// What is found on each disk by whoever looks after it, by its name and what it is.
const OF_HEALED_DISK: [(&str, &str, SaidOfDisk); 4] = [
    ("disk_checked_blocks", "Blocks that were read to see how they are, since the start", |disk| {
        disk.checked
    }),
    ("disk_damaged_blocks", "Blocks that were found missing or damaged since the start", |disk| disk.damaged),
    ("disk_repaired_blocks", "Blocks that were written anew for that since the start", |disk| disk.repaired),
    (
        "disk_scrubbed_time_seconds",
        "When all of the disk had been read for the last time, in seconds since 1970; 0 for never",
        |disk| disk.scrubbed_at / 1_000_000_000,
    ),
];

/// What each replica says of itself, by its name and what it is.
const OF_REPLICA: [(&str, &str, Said); 10] = [
    ("replica_leads", "Whether the replica leads its log", |status| u64::from(status.leading)),
    ("replica_stopped", "Whether the replica has stopped for good", |status| {
        u64::from(!status.fault.is_empty())
    }),
    ("replica_applied_position", "The last position that the state has", |status| status.applied_position),
    ("replica_flushed_position", "The last position that the state has on disk", |status| {
        status.flushed_position
    }),
    (
        "replica_checkpoint_time_seconds",
        "The log's time at the newest checkpoint, in seconds since 1970; 0 for none",
        |status| status.checkpoint_time / 1_000_000_000,
    ),
    ("log_first_position", "The first position that the log still has", |status| status.log_first),
    ("log_last_position", "The last position of the log", |status| status.log_last),
    ("state_hashes_compared", "Positions at which the members' state hashes were compared", |status| {
        status.checks_compared
    }),
    ("inline_bytes", "Bytes of users' data in the state of a shard", |status| status.inline_bytes),
    ("state_hashes_undecided", "Positions at which no state hash had most members", |status| {
        status.checks_undecided
    }),
];

fn of_replicas(registry: &mut Registry, replicas: &[Seen]) {
    let log_of = |seen: &Seen| OfLog { log: seen.id.to_string() };
    let answers = replicas.iter().map(|seen| (log_of(seen), u64::from(seen.replica.is_some())));
    register(registry, "replica_answers", "Whether the replica says how it is", answers);
    for (name, what, said) in OF_REPLICA {
        let said = |seen: &Seen| Some((log_of(seen), said(seen.replica.as_ref()?)));
        register(registry, name, what, replicas.iter().filter_map(said));
    }
    let epochs = replicas.iter().map(|seen| (log_of(seen), seen.log.epoch.0));
    register(registry, "log_epoch", "The newest reign of the log that the node knows of", epochs);
    let leaders = replicas.iter().map(|seen| (log_of(seen), seen.log.leader.unwrap_or(0)));
    register(registry, "log_leader", "The node that leads the log as far as is known, 0 for none", leaders);
    let queued = replicas.iter().map(|seen| (log_of(seen), seen.log.queued_bytes));
    register(registry, "log_queued_bytes", "Bytes that wait to be written", queued);
    // Only who leads knows how far the others are.
    let led = || replicas.iter().filter(|seen| seen.log.is_self);
    let members = || led().flat_map(|seen| seen.log.members.iter().map(move |progress| (seen, progress)));
    let of = |seen: &Seen, node| OfMember { log: seen.id.to_string(), node };
    let lags = members().map(|(seen, progress)| {
        let matched = progress.matched.map_or(0, |position| position.0);
        (of(seen, progress.member.node), seen.log.bounds.last.0.saturating_sub(matched))
    });
    register(registry, "member_lag_positions", "Positions that a member of a log led here lacks", lags);
    let heard =
        members().map(|(seen, progress)| (of(seen, progress.member.node), u64::from(progress.is_heard)));
    register(registry, "member_heard", "Whether a member of a log led here has answered of late", heard);
    let voters =
        members().map(|(seen, progress)| (of(seen, progress.member.node), u64::from(progress.member.voter)));
    register(registry, "member_votes", "Whether a member of a log led here votes", voters);
}

fn of_disks(registry: &mut Registry, disks: &[Disk]) {
    let of = |disk: &Disk| OfDisk { service: format!("{:016x}", disk.service) };
    let used = disks.iter().map(|disk| (of(disk), u64::from(disk.is_used)));
    register(registry, "disk_used", "Whether the block service uses its disk", used);
    let hang = disks.iter().map(|disk| (of(disk), u64::from(disk.hangs)));
    register(registry, "disk_hangs", "Whether the disk of the block service does not answer", hang);
    let all = disks.iter().filter_map(|disk| Some((of(disk), disk.space?.0)));
    register(registry, "disk_size_bytes", "Bytes of the disk's file system", all);
    let free = disks.iter().filter_map(|disk| Some((of(disk), disk.space?.1)));
    register(registry, "disk_free_bytes", "Bytes that blocks may still take on the disk", free);
    for (name, what, said) in OF_HEALED_DISK {
        register(registry, name, what, disks.iter().map(|disk| (of(disk), said(&disk.healed))));
    }
}
