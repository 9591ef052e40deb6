//! The registry is one linearizable object, too: what clients saw of it and were told, its rows at the end, and at the
//! end of every run what it says of the disks, and a write that needs all of them.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use clutch_client::{Client, ClientError};
use clutch_log::{LogId, Position};
use clutch_log_sim::Faults;
use clutch_proto::{
    InodeId,
    registry::{RegisterServices, RegistryReply, RegistryRequest, SetServiceFlags, registry_request::Op},
    session::Role,
    shard::{Layout, ShardEntry, shard_entry, shard_reply::Reply, shard_request},
    state::{Entry, entry::Kind},
    types::{BlockService, ShardPlacement},
};
use clutch_registry::tables;
use clutch_runtime::{Disk as _, simulated::DiskFaults};
use prost::Message as _;

use super::{
    Evidence, Violation,
    linearizability::{Placed, contradictions},
    state::{Replayed, compare, rows},
};
use crate::{
    history::{Data, bytes_of},
    oracle::RegistryOracle,
    sim_cluster::{CLIENT, Engine, PACKED, SimCluster, disk_node},
    workload::attributes,
};

/// How soon the registry's rows follow a disk that has changed.
const REPORTED_WITHIN: Duration = Duration::from_secs(60);

/// Longer than a report is tried.
const APART: Duration = Duration::from_secs(45);

fn wrong(what: String) -> Violation {
    Violation::new("registry", what)
}

/// A client's request that was answered.
struct Answered {
    op: Op,
    index: usize,
    position: u64,
}

/// Replays the registry's log and compares it with what clients were told, and with the rows at its end.
pub fn check(evidence: &Evidence, replayed: &Replayed) -> Vec<Violation> {
    let mut violations = Vec::new();
    let mut answered: Vec<Answered> = Vec::new();
    for (index, record) in evidence.records.iter().enumerate().filter(|(_, r)| r.call.role == Role::Registry)
    {
        let Some(ended) = &record.ended else { continue };
        if let Ok(RegistryRequest { op: Some(op) }) = RegistryRequest::decode(record.call.body.clone()) {
            answered.push(Answered { op, index, position: ended.at.position });
        }
    }
    answered.sort_by_key(|a| a.position);
    let mut oracle = RegistryOracle::default();
    let mut done: BTreeMap<(u64, u64), bool> = BTreeMap::new();
    let mut reads = answered.iter().filter(|a| a.position > 0 && matches!(a.op, Op::GetMap(_))).peekable();
    for (position, batch) in evidence.logs.get(&LogId::REGISTRY).into_iter().flatten() {
        while let Some(read) = reads.next_if(|read| Position(read.position) < *position) {
            violations.extend(check_map(evidence, &oracle, read));
        }
        for entry in &batch.entries {
            match oracle.apply(*position, entry) {
                Ok(step) => {
                    if let (Some(tag), Some(outcome), true) = (step.tag, step.outcome, step.is_first) {
                        *done.entry((tag.client, tag.sequence)).or_default() |= outcome.is_ok();
                    }
                }
                Err(what) => violations.push(wrong(what)),
            }
        }
    }
    for read in reads {
        violations.extend(check_map(evidence, &oracle, read));
    }
    for change in &answered {
        let record = &evidence.records[change.index];
        let (Some(tag), Some(ended)) = (&record.call.tag, &record.ended) else { continue };
        let is_done = done.get(&(tag.client, tag.sequence)) == Some(&true);
        if ended.result.is_ok() && !is_done {
            violations.push(wrong(format!("{:?} was acknowledged and is not in the log", change.op)));
        }
        if matches!(ended.result, Err(ClientError::Refused(_))) && is_done {
            violations.push(wrong(format!("{:?} was refused and is in the log", change.op)));
        }
    }
    violations.extend(order(evidence, &answered));
    violations.extend(lists_grow_newer(evidence));
    if let Some(store) = replayed.get(&LogId::REGISTRY) {
        let mut found = Vec::new();
        let services = rows::<BlockService>(store, tables::SERVICE);
        let services = services.into_iter().map(|(_, row)| (row.service_id, row)).collect();
        compare("block service", &services, &oracle.services, &mut found);
        let shards = rows::<ShardPlacement>(store, tables::SHARD);
        let shards = shards.into_iter().map(|(_, row)| (row.shard, row)).collect();
        compare("shard", &shards, &oracle.shards, &mut found);
        let chains = rows::<clutch_proto::registry::Chain>(store, tables::CHAIN);
        let chains: BTreeMap<Bytes, _> = chains.into_iter().map(|(key, row)| (key, row.segments)).collect();
        let expected = oracle.chains.iter().map(|((role, number), segments)| {
            (Bytes::copy_from_slice(&tables::chain_key(*role, *number)), segments.clone())
        });
        compare("chain", &chains, &expected.collect(), &mut found);
        violations.extend(found.into_iter().map(wrong));
    }
    violations.truncate(10);
    violations
}

/// No list of services is logged behind a newer one, whoever leads.
fn lists_grow_newer(evidence: &Evidence) -> Vec<Violation> {
    let mut violations = Vec::new();
    for id in evidence.shards.keys() {
        let mut newest = 0;
        for (position, batch) in evidence.logs.get(id).into_iter().flatten() {
            for entry in &batch.entries {
                let Ok(Entry { kind: Some(Kind::Body(body)), .. }) = Entry::decode(entry.clone()) else {
                    continue;
                };
                let body = ShardEntry::decode(body).ok().and_then(|entry| entry.body);
                let Some(shard_entry::Body::ServicesChanged(list)) = body else { continue };
                if list.version < newest {
                    violations.push(wrong(format!(
                        "{id}: the list of services of version {} is logged at {position}, behind version {newest}",
                        list.version
                    )));
                }
                newest = newest.max(list.version);
            }
        }
    }
    violations
}

fn check_map(evidence: &Evidence, oracle: &RegistryOracle, read: &Answered) -> Option<Violation> {
    let Op::GetMap(op) = &read.op else { return None };
    let expected = oracle.map(op.services_version);
    let ended = evidence.records[read.index].ended.as_ref()?;
    let got = ended.result.as_ref().ok().map(|bytes| RegistryReply::decode(bytes.clone()));
    // Who the registry's members are is in no log.
    let got = got.map(|reply| {
        reply.map(|mut reply| {
            reply.map.iter_mut().for_each(|map| map.registry_members.clear());
            reply
        })
    });
    match got {
        Some(Ok(reply)) if reply.map == expected.as_ref().ok().cloned() => None,
        Some(got) => Some(wrong(format!(
            "a map was read at position {}: {got:?}; the oracle has {expected:?}",
            read.position
        ))),
        // Not every refusal is the machine's.
        None => None,
    }
}

/// Nobody sees an earlier moment than somebody who was answered before he asked.
fn order(evidence: &Evidence, answered: &[Answered]) -> Vec<Violation> {
    let placed: Vec<Placed> = answered
        .iter()
        .filter(|a| a.position > 0)
        .filter_map(|a| {
            let record = &evidence.records[a.index];
            let ended = record.ended.as_ref().filter(|e| e.result.is_ok())?;
            // Several changes may stand in one record.
            Some(Placed {
                began: record.began,
                ended: ended.order,
                time: a.position,
                is_read: true,
                index: a.index,
            })
        })
        .collect();
    let shown = |index: usize| format!("{:?}", evidence.records[index].call);
    contradictions(&placed)
        .into_iter()
        .map(|(a, b)| wrong(format!("{} had ended before {} began, which saw less", shown(a), shown(b))))
        .collect()
}

/// After all the rest: what is registered is what the disks have, also when they change, and a file is written to
/// as many disks as its policy says.
pub fn probe(cluster: &SimCluster) -> Vec<Violation> {
    let found = probe_all(cluster).err().map(wrong);
    let late = report_late(cluster).and_then(|()| agree(cluster, "after a late report"));
    found.into_iter().chain(late.err().map(|what| Violation::new("late reports", what))).collect()
}

fn probe_all(cluster: &SimCluster) -> Result<(), String> {
    agree(cluster, "at the end")?;
    let disk = cluster.world.disk(disk_node(0));
    // It becomes full while it cannot say so.
    let registry = cluster.home(LogId::REGISTRY).ok_or("no registry")?;
    let set_apart = |apart| {
        cluster.world.set_blocked(disk_node(0), registry, apart);
        cluster.world.set_blocked(registry, disk_node(0), apart);
    };
    // Which takes long, in two of four clusters: it is cut off, or the registry can be asked and told nothing.
    let is_apart = cluster.cluster_id().is_multiple_of(4);
    let is_deaf = cluster.cluster_id() % 4 == 1 && cluster.config().engine == Engine::Sim;
    set_apart(is_apart);
    let lost = if is_deaf { 1000 } else { 0 };
    cluster.logs.set_faults(LogId::REGISTRY, Faults { unknown_lost_permille: lost, ..Faults::default() });
    disk.set_faults(DiskFaults { full: true, ..DiskFaults::default() });
    let clock = cluster.world.node(CLIENT).clock;
    if is_apart || is_deaf {
        cluster.world.run(CLIENT, APART * 2, async move { clock.sleep(APART).await });
    }
    set_apart(false);
    cluster.logs.set_faults(LogId::REGISTRY, Faults::default());
    let full = agree(cluster, "with disk 0 full");
    disk.set_faults(DiskFaults::default());
    full?;
    agree(cluster, "with room on disk 0 again")?;
    let blocks = cluster.config().data_blocks + cluster.config().parity_blocks;
    if (0..cluster.config().disks).filter(|disk| cluster.is_labelled(*disk)).count() < blocks as usize {
        return Ok(());
    }
    patiently(cluster, || write_at_full_width(cluster, blocks))
}

/// A report of disk 0 arrives that an earlier process of its node once sent, when it had no room, or was elsewhere.
fn report_late(cluster: &SimCluster) -> Result<(), String> {
    let (client, id) = (cluster.client(), cluster.service_ids()[0]);
    let was_elsewhere = cluster.cluster_id().is_multiple_of(2);
    let reported = cluster.world.run(CLIENT, REPORTED_WITHIN * 2, async move {
        let map = client.refresh_map().await?;
        let late = |row: &BlockService| match was_elsewhere {
            true => BlockService { address: "node99999".into(), ..row.clone() },
            false => BlockService { available_bytes: 0, ..row.clone() },
        };
        let services = map.services.iter().filter(|row| row.service_id == id).map(late).collect();
        client.registry(Op::RegisterServices(RegisterServices { services })).await
    });
    let failed = |e: ClientError| format!("a late report: {e}");
    reported.ok_or("a late report does not come to an end")?.map(drop).map_err(failed)
}

/// Clears all flags and writes, again and again while disks are on their way.
fn write_at_full_width(cluster: &SimCluster, blocks: u32) -> Result<(), String> {
    let (client, services) = (cluster.client(), cluster.service_ids());
    // Not in the metadata.
    let bytes = (cluster.config().data_blocks * 5000).max(cluster.config().inline + 1);
    let written = cluster.world.run(CLIENT, Duration::from_secs(300), async move {
        for service_id in services {
            let op = Op::SetServiceFlags(SetServiceFlags { service_id, flags: 0 });
            client.registry(op).await.map_err(|e| format!("flags are not cleared: {e}"))?;
        }
        let begin = client.runtime().clock.monotonic();
        loop {
            let found = write_wide(&client, blocks, bytes).await;
            if found.is_ok() || client.runtime().clock.monotonic() - begin > REPORTED_WITHIN {
                return found;
            }
            client.runtime().clock.sleep(Duration::from_secs(1)).await;
        }
    });
    written.unwrap_or_else(|| Err("a write at full width does not come to an end".into()))
}

/// Writes a file in place of what has the name, and looks at how many disks it is on.
async fn write_wide(client: &Client, blocks: u32, bytes: u32) -> Result<(), String> {
    let shown = |e: ClientError| format!("a write at full width: {e}");
    let data = bytes_of(Data { salt: 77, bytes });
    let name = Bytes::from_static(b"full-width");
    let made =
        client.write_file(InodeId::ROOT, &name, attributes(), true, &mut &data[..]).await.map_err(shown)?;
    let op = shard_request::Op::Layout(Layout { id: made.id.raw(), ..Layout::default() });
    let Reply::Layout(layout) = client.shard(op).await.map_err(shown)? else {
        return Err("no layout".into());
    };
    let widths = layout.spans.iter().map(|s| {
        s.blocks.iter().map(|b| b.service_id).collect::<std::collections::BTreeSet<_>>().len() as u32
    });
    match widths.min() {
        Some(width) if width == blocks => Ok(()),
        width => Err(format!("a write at full width has {width:?} of {blocks} blocks: {:?}", layout.spans)),
    }
}

/// A node that was cut off while it started may give up only now: whoever looks after it starts it again, and what failed is
/// looked at anew.
fn patiently(cluster: &SimCluster, look: impl Fn() -> Result<(), String>) -> Result<(), String> {
    let found = look();
    let gave_up = cluster.take_failed();
    // Whether or not it was missed.
    gave_up.iter().for_each(|node| cluster.restart(*node));
    if found.is_ok() || gave_up.is_empty() { found } else { look() }
}

/// Waits until every row of a service says what its disk has.
fn agree(cluster: &SimCluster, when: &str) -> Result<(), String> {
    patiently(cluster, || agree_once(cluster, when))
}

fn agree_once(cluster: &SimCluster, when: &str) -> Result<(), String> {
    let client = cluster.client();
    let mut expected: BTreeMap<u64, (String, u64, u64)> = BTreeMap::new();
    for (number, id) in cluster.service_ids().into_iter().enumerate() {
        let number = number as u32;
        let space = match cluster.is_labelled(number) {
            true => {
                let disk = cluster.world.disk(disk_node(number));
                let (total, available) = disk.space("disk".as_ref()).map_err(|e| e.to_string())?;
                (total, available.saturating_sub(PACKED.room_to_erase(total)))
            }
            // It is not used.
            false => (0, 0),
        };
        expected.insert(id, (format!("node{}", disk_node(number).0), space.0, space.1));
    }
    let waited = cluster.world.run(CLIENT, REPORTED_WITHIN * 2, async move {
        let clock = client.runtime().clock.clone();
        let begin = clock.monotonic();
        loop {
            let found = match client.refresh_map().await {
                Err(error) => Err(format!("the registry does not answer: {error}")),
                Ok(map) => expected.iter().try_for_each(|(id, (address, capacity, available))| {
                    let row = map.services.iter().find(|s| s.service_id == *id);
                    let row = row.ok_or_else(|| format!("service {id:x} is not registered"))?;
                    let is_so = (&row.address, row.capacity_bytes, row.available_bytes) == (address, *capacity, *available);
                    match is_so {
                        true => Ok(()),
                        false => Err(format!(
                            "service {id:x} is registered at {} with {} of {} bytes; it is at {address} with {available} of {capacity}",
                            row.address, row.available_bytes, row.capacity_bytes
                        )),
                    }
                }),
            };
            if found.is_ok() || clock.monotonic() - begin > REPORTED_WITHIN {
                return found;
            }
            clock.sleep(Duration::from_millis(500)).await;
        }
    });
    waited.unwrap_or_else(|| Err("no answer".into())).map_err(|what| format!("{when}: {what}"))
}
