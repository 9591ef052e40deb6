//! Keeps registry and node in step.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::Result;
use bytes::Bytes;
use clutch_blocks::BlockService;
use clutch_client::Client;
use clutch_log::{Epoch, LogId};
use clutch_proto::{
    Refusal,
    mutants::{self, Mutant},
    registry::{Map, RegisterServices, registry_request::Op},
    shard, types,
};
use clutch_registry::RegistryFacts;
use clutch_shard::ShardFacts;
use clutch_state_replica::{ReplicaHandle, SharedFacts};
use prost::Message as _;

use crate::{chains, placer::Reigns, routes::Routes, services};

/// How often a node compares what it knows with the registry.
const REFRESH: Duration = Duration::from_secs(2);
/// Pause before a shard is told again.
const PROPOSE_AGAIN: Duration = Duration::from_millis(20);
/// How long a shard may take to log what it is told, retries included, before the others are looked after.
const PROPOSE_PATIENCE: Duration = Duration::from_secs(10);
/// Where most disks of a node hang for longer, they are said to have no room.
const HANG_FOR_NOW: Duration = Duration::from_secs(300);
/// Free space is reported when it has moved by this part of the capacity, or of what was reported where that is less: at the
/// edge, a little decides.
const SPACE_STEP: u64 = 32;

/// Keeps registry and node in step: what is here is registered there, what is known there is logged here.
pub(crate) struct Keeper {
    pub(crate) client: Client,
    pub(crate) address: String,
    /// What its disks fail with; each by itself when `None`.
    pub(crate) failure_domain: Option<String>,
    /// Which logs are led here.
    pub(crate) reigns: Arc<Reigns>,
    pub(crate) blocks: BTreeMap<u64, Arc<BlockService>>,
    pub(crate) shards: BTreeMap<u32, ReplicaHandle>,
    pub(crate) facts: Arc<SharedFacts<ShardFacts>>,
    /// Where the members of logs are, of which clients are told the registry's.
    pub(crate) routes: Arc<Routes>,
    pub(crate) registry_facts: Arc<SharedFacts<RegistryFacts>>,
    pub(crate) told: Told,
}

/// What was told last, so that it is not told again.
#[derive(Default)]
pub(crate) struct Told {
    /// The services' version that was logged in each shard that is led here, and in which reign.
    logged_versions: BTreeMap<u32, (Epoch, u64)>,
    /// Capacity and free space as they were registered.
    reported: BTreeMap<u64, (u64, u64)>,
    /// Disks that hung when they were looked at last.
    hanging: BTreeSet<u64>,
    /// Since when most of them have, by the monotonic clock.
    most_hang_since: Option<Duration>,
}

/// Of every disk, in the order of their ids.
type Spaces = Vec<std::io::Result<(u64, u64)>>;

/// Whether capacity or free space of a disk have moved enough to be told: by a step of the capacity, or of what is left when that
/// is little; and whenever there is none, or some again. On some file systems both move with every write of others.
fn is_news(told: (u64, u64), found: (u64, u64)) -> bool {
    let step = found.0.min(told.1.max(found.1).saturating_mul(4)) / SPACE_STEP;
    told.1.abs_diff(found.1) > step
        || told.0.abs_diff(found.0) > found.0 / SPACE_STEP
        || (told.1 == 0) != (found.1 == 0)
}

/// Clients of the registry here are told where its members are now.
pub(crate) fn tell_members(routes: &Routes, facts: &SharedFacts<RegistryFacts>) {
    let members = routes.members(LogId::REGISTRY);
    facts.update(|_| RegistryFacts { members: members.clone() });
}

impl Keeper {
    /// The first round before it returns, however long the registry is away, the others as a task.
    pub(crate) async fn run(mut self, stopping: Arc<AtomicBool>) -> Result<()> {
        while let Err(error) = self.round().await {
            if !chains::is_for_now(&error) {
                return Err(error);
            }
            self.client.runtime().note("node: starts without the registry");
            tracing::warn!(%error, "waits for the registry, and serves what needs no disks");
            self.client.runtime().clock.sleep(REFRESH).await;
        }
        let runtime = self.client.runtime().clone();
        runtime.spawn("keeper", async move {
            let clock = self.client.runtime().clock.clone();
            while !stopping.load(Ordering::Relaxed) {
                clock.sleep(REFRESH).await;
                if let Err(error) = self.round().await {
                    tracing::warn!(%error, "compare with the registry");
                }
            }
        });
        Ok(())
    }

    /// Capacity and free space of every disk; says which began to hang, and which answer again.
    async fn look_at_disks(&mut self) -> Spaces {
        let early = mutants::is(Mutant::HangingSeenEarly).then(|| self.those_that_hang());
        let spaces =
            futures_util::future::join_all(self.blocks.values().map(|service| service.space())).await;
        let hanging = early.unwrap_or_else(|| self.those_that_hang());
        for id in hanging.difference(&self.told.hanging) {
            tracing::error!(service = %format!("{id:016x}"), "a disk does not answer; it gets no new blocks until it does");
        }
        for id in self.told.hanging.difference(&hanging) {
            tracing::warn!(service = %format!("{id:016x}"), "the disk answers again");
        }
        self.told.hanging = hanging;
        spaces
    }

    fn those_that_hang(&self) -> BTreeSet<u64> {
        self.blocks.iter().filter(|(_, service)| service.hangs()).map(|(id, _)| *id).collect()
    }

    /// Compares with the registry: it learns of this node's disks, and the shards here of all.
    async fn round(&mut self) -> Result<()> {
        tell_members(&self.routes, &self.registry_facts);
        // Also while the registry does not answer: what becomes of disks is said.
        let spaces = self.look_at_disks().await;
        // Before the map is asked for: what is logged in a reign is of a map of that reign, so none that is older than what an
        // earlier leader has logged. Nothing is logged into a life of a log that may be over.
        let mut reigns = self.reigns.newest();
        let mut map = match mutants::is(Mutant::OldListLogged) {
            true => self.client.map().await?,
            false => self.client.refresh_map().await?,
        };
        if self.register_services(&map, spaces).await? {
            reigns = self.reigns.newest();
            map = self.client.refresh_map().await?;
        }
        self.log_services(&map, &reigns).await
    }

    /// Tells the registry what is new of this node's disks, and what it has otherwise: a report of an earlier process here may
    /// have come late and been taken for the newest. True when there was something to tell.
    async fn register_services(&mut self, map: &Map, spaces: Spaces) -> Result<bool> {
        let rows = map.services.iter().filter(|row| self.blocks.contains_key(&row.service_id));
        let rows: BTreeMap<u64, &types::BlockService> = rows.map(|row| (row.service_id, row)).collect();
        let now = self.client.runtime().clock.monotonic();
        let most_hang = self.told.hanging.len() * 2 > self.blocks.len();
        self.told.most_hang_since = most_hang.then(|| self.told.most_hang_since.unwrap_or(now));
        // What many disks share may hang for a while: that is no lack of space, and whoever writes waits.
        let is_for_now = self.told.most_hang_since.is_some_and(|since| now - since < HANG_FOR_NOW);
        let mut services = Vec::new();
        let mut reported = Vec::new();
        for (id, space) in self.blocks.keys().zip(spaces) {
            if space.is_err() && is_for_now {
                continue;
            }
            // A disk that cannot be asked, or hangs, takes no new blocks until it answers.
            let (capacity_bytes, available_bytes) = space.unwrap_or_default();
            let told = self.told.reported.get(id);
            let moved = told.is_none_or(|told| {
                is_news(*told, (capacity_bytes, available_bytes)) && !mutants::is(Mutant::SpaceReportedOnce)
            });
            let by_itself = || format!("{}/{id:x}", self.address);
            let failure_domain = self.failure_domain.clone().unwrap_or_else(by_itself);
            let is_known = rows.get(id).is_some_and(|row| {
                (&row.address, &row.failure_domain) == (&self.address, &failure_domain)
                    && Some(&(row.capacity_bytes, row.available_bytes)) == told
            });
            let is_believed = mutants::is(Mutant::LateReportStays) || mutants::is(Mutant::ReportedBeforeTold);
            if moved || !is_known && !is_believed {
                if !moved {
                    self.client.runtime().note("node: the registry has another report of a disk");
                }
                reported.push((*id, (capacity_bytes, available_bytes)));
                services.push(types::BlockService {
                    service_id: *id,
                    address: self.address.clone(),
                    failure_domain,
                    capacity_bytes,
                    available_bytes,
                    ..types::BlockService::default()
                });
            }
        }
        if mutants::is(Mutant::ReportedBeforeTold) {
            self.told.reported.extend(reported.iter().copied());
        }
        let is_told = !services.is_empty();
        if is_told {
            self.client.registry(Op::RegisterServices(RegisterServices { services })).await?;
        }
        self.told.reported.extend(reported);
        Ok(is_told)
    }

    /// Takes the registry's list of services over: for placement at once, into the shards' logs if it is new.
    async fn log_services(&mut self, map: &Map, reigns: &BTreeMap<LogId, Epoch>) -> Result<()> {
        if self.shards.is_empty() {
            return Ok(());
        }
        let services = Arc::new(map.services.clone());
        self.facts.update(|facts| ShardFacts { services, ..facts.clone() });
        let news: Vec<(u32, Epoch)> = self
            .shards
            .keys()
            .filter_map(|number| reigns.get(&LogId::shard(*number)).map(|epoch| (*number, *epoch)))
            .filter(|(number, epoch)| {
                self.told.logged_versions.get(number) != Some(&(*epoch, map.services_version))
            })
            .collect();
        if news.is_empty() {
            return Ok(());
        }
        let parts = services::in_parts(&map.services, services::PART_BYTES).into_iter().map(|services| {
            let changed =
                shard::ServicesChanged { version: map.services_version, services: services.to_vec() };
            let body = shard::shard_entry::Body::ServicesChanged(changed);
            Bytes::from(shard::ShardEntry { tag: None, body: Some(body) }.encode_to_vec())
        });
        let parts: Vec<Bytes> = parts.collect();
        let mut failed = None;
        for (number, epoch) in news {
            let Some(shard) = self.shards.get(&number) else { continue };
            let runtime = self.client.runtime();
            let told = runtime.timeout(PROPOSE_PATIENCE, self.tell_services(shard, epoch, &parts)).await;
            let told = match told {
                Some(Ok(false)) => continue,
                Some(Ok(true)) => Ok(self.told.logged_versions.insert(number, (epoch, map.services_version))),
                Some(Err(refusal)) => Err(anyhow::Error::from(refusal)),
                None => Err(anyhow::anyhow!("no answer within {} s", PROPOSE_PATIENCE.as_secs())),
            };
            // The others are told all the same.
            if let Err(error) = told {
                failed = Some(error.context(format!("tell shard {number} of the block services")));
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// False when the reign is over: then it is for the next leader to tell.
    async fn tell_services(
        &self,
        shard: &ReplicaHandle,
        reign: Epoch,
        parts: &[Bytes],
    ) -> Result<bool, Refusal> {
        let clock = self.client.runtime().clock.clone();
        for part in parts {
            loop {
                match shard.propose_in(reign, part.clone()).await.result {
                    Ok(_) => break,
                    Err(refusal) if refusal.code == types::Code::NotLeader => return Ok(false),
                    Err(refusal) if refusal.is_retryable() => clock.sleep(PROPOSE_AGAIN).await,
                    Err(refusal) => return Err(refusal),
                }
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_told_again_when_it_has_moved_and_not_for_every_write() {
        const GIB: u64 = 1 << 30;
        let full = 64 * GIB;
        for (told, found, is_told) in [
            ((full, 32 * GIB), (full, 32 * GIB - 4096), false),
            ((full, 32 * GIB), (full, 29 * GIB), true),
            // What is left of little counts more.
            ((full, 32 << 20), (full, 20 << 20), true),
            ((full, 1), (full, 0), true),
            ((full, 0), (full, 1), true),
            ((full, 0), (0, 0), true),
            ((0, 0), (full, 0), true),
            // A file system that shares a pool has another size with every write of the others.
            ((full, 32 * GIB), (full - GIB, 32 * GIB), false),
            ((full, 32 * GIB), (full + 3 * GIB, 32 * GIB), true),
        ] {
            assert_eq!(is_news(told, found), is_told, "{told:?}, then {found:?}");
        }
    }
}
