//! `clutch status`.
//!
//! Says what there is, whatever does not work: a table always comes, with the faults in it.

use std::{
    collections::{BTreeMap, BTreeSet},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::Result;
use clutch_client::{Client, ClientError};
use clutch_proto::{
    admin::{
        AdminReply, AdminRequest, DiskStatus, HealingStatus, LogMember, Status, StatusReply,
        admin_request::Op,
    },
    level,
    limits::INLINE_OF_SHARD_BYTES_MAX,
    registry::Map,
    session::Role,
};
use serde_json::json;

use crate::{
    args::{StatusArgs, seconds},
    output,
};

/// A wall clock that is further away from the cluster's time than this is worth a line.
const CLOCK_OFF_MS: i64 = 5000;

/// What nodes say of their disks, and of what they do for what is stored.
#[derive(Default)]
pub(crate) struct OfDisks {
    /// By their ids.
    pub(crate) disks: BTreeMap<u64, DiskStatus>,
    /// Of each node that looks after it.
    pub(crate) healing: Vec<HealingStatus>,
}

/// Asks every node once.
pub(crate) async fn disks(client: &Client) -> Result<OfDisks, ClientError> {
    let map = client.refresh_map().await?;
    let mut asked: Vec<(Role, u32)> = vec![(Role::Registry, 0), (Role::Cdc, 0)];
    asked.extend(map.shards.iter().map(|shard| (Role::Shard, shard.shard)));
    let mut nodes: BTreeSet<(String, Role, u32)> = BTreeSet::new();
    let mut found = OfDisks::default();
    for (role, number) in asked {
        // A node may have a member of one log only; and one that was asked for one log says the same for the next.
        let Ok(status) = status_in(client.admin(role, number, status_request()).await) else { continue };
        let new = |address: &String| !address.is_empty() && nodes.iter().all(|(known, ..)| known != address);
        let members: Vec<_> = status.members.iter().map(|m| m.address.clone()).filter(new).collect();
        nodes.extend(members.into_iter().map(|address| (address, role, number)));
        if status.members.len() < 2 {
            let request = AdminRequest { op: Some(Op::Status(Status { disks: true, ..Status::default() })) };
            found.take(status_in(client.admin(role, number, request).await));
            return Ok(found);
        }
    }
    // Some have nothing but disks.
    for service in &map.services {
        if nodes.iter().all(|(known, ..)| *known != service.address) {
            nodes.insert((service.address.clone(), Role::Registry, 0));
        }
    }
    let answers = nodes.into_iter().map(|(address, role, number)| async move {
        let request = AdminRequest { op: Some(Op::Status(Status { disks: true, ..Status::default() })) };
        status_in(client.admin_at(address.as_str().into(), role, number, request).await)
    });
    futures_util::future::join_all(answers).await.into_iter().for_each(|answer| found.take(answer));
    Ok(found)
}

impl OfDisks {
    /// A node that does not answer says nothing of its disks.
    fn take(&mut self, status: Result<StatusReply, ClientError>) {
        let Ok(status) = status else { return };
        self.disks.extend(status.disks.into_iter().map(|disk| (disk.service_id, disk)));
        self.healing.extend(status.healing);
    }
}

/// One replica and what it says of itself.
pub(crate) struct ReplicaStatus {
    pub(crate) name: String,
    pub(crate) status: Result<StatusReply, ClientError>,
    /// What the members of its log say, where there are several.
    members: Vec<MemberStatus>,
}

/// A member of a log and what it says of itself.
struct MemberStatus {
    member: LogMember,
    status: Result<StatusReply, ClientError>,
}

impl MemberStatus {
    /// How many positions it is behind one.
    fn lag(&self, last: u64) -> Option<u64> {
        self.status.as_ref().ok().map(|status| last.saturating_sub(status.applied_position))
    }

    fn fault(&self) -> Option<String> {
        match &self.status {
            Ok(status) => (!status.fault.is_empty()).then(|| status.fault.clone()),
            Err(error) => Some(error.to_string()),
        }
    }
}

impl ReplicaStatus {
    fn serves(&self) -> bool {
        self.status.as_ref().is_ok_and(|s| s.leading && s.fault.is_empty())
    }

    /// Why it does not serve.
    fn fault(&self) -> Option<String> {
        match &self.status {
            Ok(status) if !status.fault.is_empty() => Some(status.fault.clone()),
            Ok(_) => None,
            Err(error) => Some(error.to_string()),
        }
    }
}

/// Asks every replica of the cluster.
pub(crate) async fn all(client: &Client) -> Result<(std::sync::Arc<Map>, Vec<ReplicaStatus>), ClientError> {
    let map = client.refresh_map().await?;
    let replicas = ask(client, &map).await;
    Ok((map, replicas))
}

async fn ask(client: &Client, map: &Map) -> Vec<ReplicaStatus> {
    let mut asked = vec![(Role::Registry, 0, "registry".to_owned()), (Role::Cdc, 0, "cdc".to_owned())];
    asked.extend(map.shards.iter().map(|s| (Role::Shard, s.shard, format!("shard {}", s.shard))));
    // Side by side: one that does not answer must not hold up the others.
    let answers = asked.into_iter().map(|(role, number, name)| async move {
        let status = status_in(client.admin(role, number, status_request()).await);
        let members = match &status {
            Ok(status) => ask_members(client, role, number, status).await,
            Err(_) => Vec::new(),
        };
        ReplicaStatus { name, status, members }
    });
    futures_util::future::join_all(answers).await
}

fn status_request() -> AdminRequest {
    AdminRequest { op: Some(Op::Status(Status::default())) }
}

fn status_in(reply: Result<AdminReply, ClientError>) -> Result<StatusReply, ClientError> {
    reply.and_then(|r| r.status.ok_or_else(|| ClientError::Unreachable("no status in the answer".into())))
}

/// Asks each member of a log of several.
async fn ask_members(client: &Client, role: Role, number: u32, status: &StatusReply) -> Vec<MemberStatus> {
    let asked = status.members.iter().filter(|member| !member.address.is_empty()).map(|member| async move {
        let reply = client.admin_at(member.address.as_str().into(), role, number, status_request()).await;
        MemberStatus { member: member.clone(), status: status_in(reply) }
    });
    futures_util::future::join_all(asked).await
}

/// What is known of the cluster.
pub(crate) struct Picture {
    map: std::sync::Arc<Map>,
    /// Why the registry gave no map.
    map_fault: Option<String>,
    pub(crate) replicas: Vec<ReplicaStatus>,
}

impl Picture {
    pub(crate) async fn take(client: &Client) -> Result<Picture, ClientError> {
        match client.refresh_map().await {
            Ok(map) => {
                let replicas = ask(client, &map).await;
                Ok(Picture { map, map_fault: None, replicas })
            }
            Err(error) => {
                // The registry does not serve, but its node may say why.
                let map = std::sync::Arc::new(Map::default());
                let replicas = ask_registry(client).await;
                if replicas.iter().all(|replica| replica.status.is_err()) {
                    return Err(error);
                }
                Ok(Picture { map, map_fault: Some(error.to_string()), replicas })
            }
        }
    }

    /// What is wrong, a sentence each.
    pub(crate) fn faults(&self) -> Vec<String> {
        let mut faults: Vec<String> = self
            .replicas
            .iter()
            .filter_map(|replica| Some(format!("{}: {}", replica.name, replica.fault()?)))
            .collect();
        for replica in &self.replicas {
            let of_members = replica.members.iter().filter_map(|of| Some((of.member.node, of.fault()?)));
            faults
                .extend(of_members.map(|(node, fault)| format!("{} on node {node}: {fault}", replica.name)));
        }
        faults.extend(self.map_fault.iter().map(|fault| format!("the registry gives no map: {fault}")));
        let of_nodes: BTreeSet<&String> = self
            .replicas
            .iter()
            .filter_map(|r| r.status.as_ref().ok())
            .flat_map(|s| &s.node_faults)
            .collect();
        faults.extend(of_nodes.into_iter().cloned());
        if self.replicas.iter().all(ReplicaStatus::serves) && !self.has_disks() {
            let need = self.map.default_policy.map_or(0, |policy| policy.data_blocks);
            faults.push(format!("fewer than {need} disks can be used: files in blocks cannot be read"));
        }
        faults
    }

    fn clock_ahead_ms(&self) -> i64 {
        let ahead = self.replicas.iter().filter_map(|r| r.status.as_ref().ok()).map(|s| s.clock_ahead_ms);
        ahead.max_by_key(|ms| ms.unsigned_abs()).unwrap_or(0)
    }

    /// The users' data in each shard's state.
    fn inline_bytes(&self) -> impl Iterator<Item = (&str, u64)> {
        self.replicas.iter().filter_map(|r| Some((&*r.name, r.status.as_ref().ok()?.inline_bytes)))
    }

    fn log_bytes(&self) -> u64 {
        self.replicas.iter().filter_map(|r| r.status.as_ref().ok()).map(|s| s.log_bytes).max().unwrap_or(0)
    }

    /// Whether as many disks can be used as a file needs at least.
    fn has_disks(&self) -> bool {
        let used = self.map.services.iter().filter(|s| s.capacity_bytes > 0).count();
        let need = self.map.default_policy.map_or(0, |policy| policy.data_blocks) as usize;
        self.map.services.len() < need || used >= need
    }

    /// Whether the map covers all slots and the CDC, every replica serves, and what is stored can be read.
    fn is_serving(&self) -> bool {
        let slots: u32 = self.map.shards.iter().map(|s| s.slot_last - s.slot_first + 1).sum();
        slots == 256
            && !self.map.cdc_address.is_empty()
            && !self.map.services.is_empty()
            && self.replicas.iter().all(ReplicaStatus::serves)
            && self.has_disks()
    }
}

async fn ask_registry(client: &Client) -> Vec<ReplicaStatus> {
    let status = status_in(client.admin(Role::Registry, 0, status_request()).await);
    vec![ReplicaStatus { name: "registry".into(), status, members: Vec::new() }]
}

pub(crate) async fn run(client: &Client, args: &StatusArgs) -> Result<ExitCode> {
    let start = Instant::now();
    let wait = seconds(args.wait.unwrap_or(0));
    // A cluster that is starting is asked again and again, each time with little patience.
    let client = client.with_patience(Duration::from_secs(3));
    let picture = loop {
        let picture = Picture::take(&client).await;
        let waits = start.elapsed() < wait;
        match picture {
            Ok(picture) if !waits || picture.is_serving() => break picture,
            Err(error) if !waits => return Err(error.into()),
            _ => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    };
    if args.json {
        output::json(&document(&picture))?;
    } else {
        print(&picture)?;
    }
    Ok(if picture.is_serving() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn hex(bytes: &[u8]) -> String {
    // Hashes are little-endian numbers; shown as one number.
    bytes.iter().rev().map(|b| format!("{b:02x}")).collect()
}

/// How long ago the newest checkpoint was taken, from which a replay begins and which another member gets.
fn checkpoint_age(status: &StatusReply) -> Option<Duration> {
    let taken = Duration::from_nanos(status.checkpoint_time);
    // A clock that stands before 1970 says nothing of how old anything is.
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).ok()?;
    (!taken.is_zero()).then(|| now.saturating_sub(taken))
}

/// A time in its largest unit.
fn in_short(time: Duration) -> String {
    match time.as_secs() {
        seconds @ 0..=119 => format!("{seconds} s"),
        seconds @ 120..=7199 => format!("{} min", seconds / 60),
        seconds @ 7200..=172_799 => format!("{} h", seconds / 3600),
        seconds => format!("{} days", seconds / 86_400),
    }
}

fn document(picture: &Picture) -> serde_json::Value {
    let replicas: Vec<_> = picture
        .replicas
        .iter()
        .map(|replica| match &replica.status {
            Ok(s) => json!({
                "name": replica.name, "serving": replica.serves(), "epoch": s.epoch, "applied": s.applied_position,
                "flushed": s.flushed_position, "time": output::nanoseconds(s.applied_time), "hash": hex(&s.hash),
                "log_first": s.log_first, "log_last": s.log_last, "checks_compared": s.checks_compared,
                "checks_not_compared": s.checks_not_compared, "checks_undecided": s.checks_undecided, "checkpoints": s.checkpoints, "checkpoint_age_s": checkpoint_age(s).map(|age| age.as_secs()), "fault": s.fault,
                "inline_bytes": s.inline_bytes, "process_cpu_us": s.process_cpu_us, "resident_bytes": s.resident_bytes,
            }),
            Err(error) => json!({ "name": replica.name, "serving": false, "fault": error.to_string() }),
        })
        .collect();
    let services: Vec<_> = picture
        .map
        .services
        .iter()
        .map(|s| {
            json!({
                "service": format!("{:016x}", s.service_id), "address": s.address, "failure_domain": s.failure_domain,
                "capacity_bytes": output::number(s.capacity_bytes),
                "available_bytes": output::number(s.available_bytes), "flags": s.flags,
            })
        })
        .collect();
    let logs: Vec<_> = picture.replicas.iter().filter_map(log).collect();
    let serving = picture.is_serving();
    json!({
        "serving": serving, "ready": serving, "faults": picture.faults(),
        "cluster": format!("{:016x}", picture.map.cluster), "replicas": replicas, "logs": logs, "block_services": services,
        "log_bytes": output::number(picture.log_bytes()), "clock_ahead_ms": picture.clock_ahead_ms(),
    })
}

/// Who keeps a log, and how far each has come.
fn log(replica: &ReplicaStatus) -> Option<serde_json::Value> {
    let status = replica.status.as_ref().ok()?;
    let member = |of: &MemberStatus| {
        json!({
            "node": of.member.node, "address": of.member.address, "voter": of.member.voter,
            "applied": of.status.as_ref().ok().map(|s| s.applied_position), "lag": of.lag(status.log_last),
            "hash": of.status.as_ref().ok().map(|s| hex(&s.hash)), "fault": of.fault().unwrap_or_default(),
            "feature_level_known": of.status.as_ref().ok().map(|s| s.level_known.max(level::FIRST)),
        })
    };
    let members: Vec<_> = match status.members.len() {
        0 | 1 => vec![json!({
            "node": status.leader, "address": "", "voter": true, "applied": status.applied_position,
            "lag": status.log_last.saturating_sub(status.applied_position), "hash": hex(&status.hash), "fault": status.fault,
        })],
        _ => replica.members.iter().map(member).collect(),
    };
    Some(json!({
        "name": replica.name, "leader": status.leader, "epoch": status.epoch, "feature_level": status.level.max(level::FIRST),
        "replicas": members,
    }))
}

/// Who keeps a log, for people: who leads, who lags, and who does not answer.
fn members(replica: &ReplicaStatus, status: &StatusReply) -> String {
    let one = |of: &MemberStatus| {
        let node = of.member.node;
        match (of.fault(), of.lag(status.applied_position)) {
            (Some(_), _) => format!("{node} FAILS"),
            (None, _) if node == status.leader => format!("{node} leads"),
            (None, None | Some(0)) => node.to_string(),
            (None, Some(lag)) => format!("{node} lags {lag}"),
        }
    };
    replica.members.iter().map(one).collect::<Vec<_>>().join(", ")
}

fn print(picture: &Picture) -> Result<()> {
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    let mut header = vec!["replica", "state", "applied", "log", "checkpoint", "state hash", "checks"];
    header.extend(picture.replicas.iter().any(|r| !r.members.is_empty()).then_some("on nodes"));
    table.set_header(header);
    for replica in &picture.replicas {
        match &replica.status {
            Ok(s) => table.add_row([
                replica.name.clone(),
                match (s.fault.is_empty(), s.leading) {
                    (false, _) => "STOPPED".to_owned(),
                    (true, true) => "serving".to_owned(),
                    (true, false) => "starting".to_owned(),
                },
                s.applied_position.to_string(),
                format!("{}..{}", s.log_first, s.log_last),
                checkpoint_age(s).map_or_else(
                    || if s.checkpoint_time == 0 { "none" } else { "unknown" }.to_owned(),
                    |age| format!("{} ago", in_short(age)),
                ),
                hex(&s.hash),
                format!("{} equal, {} not compared", s.checks_compared, s.checks_not_compared),
                members(replica, s),
            ]),
            Err(_) => table.add_row([replica.name.clone(), "no answer".to_owned()]),
        };
    }
    output::block(table)?;
    let available: u64 = picture.map.services.iter().map(|s| s.available_bytes).max().unwrap_or(0);
    output::line(format!(
        "block services: {}, up to {} free on one; logs: {}",
        picture.map.services.len(),
        output::bytes(available),
        output::bytes(picture.log_bytes())
    ))?;
    for (name, bytes) in
        picture.inline_bytes().filter(|(_, bytes)| *bytes > INLINE_OF_SHARD_BYTES_MAX / 4 * 3)
    {
        output::line(format!(
            "ALARM {name} has {} of inline data, and takes no more than {}: let fewer files lie in the metadata (clutch fs policy set / \
             --inline-max 0). What is removed counts until it is collected",
            output::bytes(bytes),
            output::bytes(INLINE_OF_SHARD_BYTES_MAX)
        ))?;
    }
    let ahead = picture.clock_ahead_ms();
    if ahead.abs() > CLOCK_OFF_MS {
        let how = if ahead > 0 { "ahead of" } else { "behind" };
        output::line(format!(
            "the clock is {} s {how} the cluster's time, which follows it slowly",
            ahead.abs() / 1000
        ))?;
    }
    let faults = picture.faults();
    for fault in &faults {
        output::line(format!("FAULT {fault}"))?;
    }
    output::line(match (picture.is_serving(), faults.is_empty()) {
        (true, true) => "everything serves",
        (true, false) => "serves, with faults",
        (false, _) => "not everything serves",
    })
}
