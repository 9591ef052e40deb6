//! `clutch status`.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::Result;
use clutch_client::{Client, ClientError};
use clutch_proto::{
    admin::{AdminRequest, Status, StatusReply, admin_request::Op},
    registry::Map,
    session::Role,
};
use serde_json::json;

use crate::{args::StatusArgs, output};

/// One replica and what it says of itself.
pub(crate) struct ReplicaStatus {
    pub(crate) name: String,
    pub(crate) status: Result<StatusReply, ClientError>,
}

impl ReplicaStatus {
    fn serves(&self) -> bool {
        self.status.as_ref().is_ok_and(|s| s.leading && s.fault.is_empty())
    }
}

/// Asks every replica of the cluster.
pub(crate) async fn all(client: &Client) -> Result<(std::sync::Arc<Map>, Vec<ReplicaStatus>), ClientError> {
    let map = client.refresh_map().await?;
    let mut asked = vec![(Role::Registry, 0, "registry".to_owned()), (Role::Cdc, 0, "cdc".to_owned())];
    asked.extend(map.shards.iter().map(|s| (Role::Shard, s.shard, format!("shard {}", s.shard))));
    let mut replicas = Vec::new();
    for (role, number, name) in asked {
        let request = AdminRequest { op: Some(Op::Status(Status {})) };
        let status = client.admin(role, number, request).await;
        let status = status
            .and_then(|r| r.status.ok_or_else(|| ClientError::Unreachable("no status in the answer".into())));
        replicas.push(ReplicaStatus { name, status });
    }
    Ok((map, replicas))
}

/// Whether the map covers all slots and the CDC, and every replica serves.
fn is_ready(map: &Map, replicas: &[ReplicaStatus]) -> bool {
    let slots: u32 = map.shards.iter().map(|s| s.slot_last - s.slot_first + 1).sum();
    slots == 256
        && !map.cdc_address.is_empty()
        && !map.services.is_empty()
        && replicas.iter().all(ReplicaStatus::serves)
}

pub(crate) async fn run(client: &Client, args: &StatusArgs) -> Result<ExitCode> {
    let deadline = args.wait.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let (map, replicas) = loop {
        // A cluster that is starting is asked again and again, each time with little patience.
        let round =
            tokio::time::timeout(Duration::from_secs(if deadline.is_some() { 3 } else { 10 }), all(client))
                .await;
        let waits = deadline.is_some_and(|deadline| Instant::now() < deadline);
        match round {
            Ok(Ok((map, replicas))) if !waits || is_ready(&map, &replicas) => break (map, replicas),
            Ok(Err(error)) if !waits => return Err(error.into()),
            Err(_) if !waits => {
                anyhow::bail!("no answer from the cluster; is `clutch up` running, and --registry right?")
            }
            _ => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    };
    let ready = is_ready(&map, &replicas);
    if args.json {
        output::json(&document(&map, &replicas, ready))?;
    } else {
        print(&map, &replicas, ready)?;
    }
    Ok(if ready { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn hex(bytes: &[u8]) -> String {
    // Hashes are little-endian numbers; shown as one number.
    bytes.iter().rev().map(|b| format!("{b:02x}")).collect()
}

fn document(map: &Map, replicas: &[ReplicaStatus], ready: bool) -> serde_json::Value {
    let replicas: Vec<_> = replicas
        .iter()
        .map(|replica| match &replica.status {
            Ok(s) => json!({
                "name": replica.name, "serving": replica.serves(), "epoch": s.epoch, "applied": s.applied_position,
                "flushed": s.flushed_position, "time": s.applied_time, "hash": hex(&s.hash), "log_first": s.log_first,
                "log_last": s.log_last, "checks_compared": s.checks_compared,
                "checks_not_compared": s.checks_not_compared, "checkpoints": s.checkpoints, "fault": s.fault,
                "process_cpu_us": s.process_cpu_us, "resident_bytes": s.resident_bytes,
            }),
            Err(error) => json!({ "name": replica.name, "serving": false, "fault": error.to_string() }),
        })
        .collect();
    let services: Vec<_> = map
        .services
        .iter()
        .map(|s| {
            json!({
                "service": format!("{:016x}", s.service_id), "address": s.address, "failure_domain": s.failure_domain,
                "capacity_bytes": s.capacity_bytes, "available_bytes": s.available_bytes, "flags": s.flags,
            })
        })
        .collect();
    json!({ "ready": ready, "cluster": format!("{:016x}", map.cluster), "replicas": replicas, "block_services": services })
}

fn print(map: &Map, replicas: &[ReplicaStatus], ready: bool) -> Result<()> {
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_header(["replica", "state", "applied", "log", "state hash", "checks"]);
    for replica in replicas {
        match &replica.status {
            Ok(s) => table.add_row([
                replica.name.clone(),
                if !s.fault.is_empty() {
                    s.fault.clone()
                } else if s.leading {
                    "serving".to_owned()
                } else {
                    "starting".to_owned()
                },
                s.applied_position.to_string(),
                format!("{}..{}", s.log_first, s.log_last),
                hex(&s.hash),
                format!("{} equal, {} not compared", s.checks_compared, s.checks_not_compared),
            ]),
            Err(error) => table.add_row([replica.name.clone(), error.to_string()]),
        };
    }
    output::line(table)?;
    let available: u64 = map.services.iter().map(|s| s.available_bytes).max().unwrap_or(0);
    output::line(format!(
        "block services: {}, up to {} free on one",
        map.services.len(),
        output::bytes(available)
    ))?;
    output::line(if ready { "everything serves" } else { "not everything serves" })
}
