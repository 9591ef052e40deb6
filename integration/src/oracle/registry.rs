//! A naive registry: who registered what, and what the operator said of it.

use std::collections::BTreeMap;

use bytes::Bytes;
use clutch_log::Position;
use clutch_proto::{
    registry::{Genesis, Map, RegistryEntry, Segment, SwapChain, registry_entry::Body, registry_request::Op},
    state::{self, entry::Kind},
    types::{BlockService, ClientTag, Code, ShardPlacement},
};
use prost::Message as _;

use super::clients::Clients;

/// What one entry must have done.
pub struct RegistryStep {
    /// Whose request it was.
    pub tag: Option<ClientTag>,
    /// Whether it succeeded; `None` for what nobody asks.
    pub outcome: Option<Result<(), Code>>,
    /// It had its effect now, and not at an earlier time.
    pub is_first: bool,
}

/// The registry, in plain maps.
#[derive(Default)]
pub struct RegistryOracle {
    time: u64,
    genesis: Option<Genesis>,
    /// Grows with every change that placement or routing must know.
    pub services_version: u64,
    /// Block services by their ids.
    pub services: BTreeMap<u64, BlockService>,
    /// Where each shard is led.
    pub shards: BTreeMap<u32, ShardPlacement>,
    /// Where the CDC is led, and in which epoch.
    pub cdc: (String, u64),
    /// Where the members of the CDC's log are.
    pub cdc_members: Vec<String>,
    /// Segments of each log by role and number.
    pub chains: BTreeMap<(u32, u64), Vec<Segment>>,
    clients: Clients<()>,
}

impl RegistryOracle {
    /// Takes the next entry of the log.
    pub fn apply(&mut self, position: Position, entry: &Bytes) -> Result<RegistryStep, String> {
        let broken = |e: prost::DecodeError| format!("entry at {position}: {e}");
        let entry = state::Entry::decode(entry.clone()).map_err(broken)?;
        self.time = entry.stamp.max(self.time + 1);
        let nothing = RegistryStep { tag: None, outcome: None, is_first: false };
        let Some(Kind::Body(body)) = entry.kind else { return Ok(nothing) };
        let RegistryEntry { tag, body } = RegistryEntry::decode(body).map_err(broken)?;
        let body = body.ok_or_else(|| format!("entry at {position} has no body"))?;
        if let Some(known) = tag.and_then(|tag| self.clients.admit(&tag, self.time)) {
            return Ok(RegistryStep { tag, outcome: Some(known), is_first: false });
        }
        let outcome = self.execute(body);
        if let Some(tag) = &tag {
            self.clients.record(tag, &outcome);
        }
        Ok(RegistryStep { tag, outcome: Some(outcome), is_first: true })
    }

    fn execute(&mut self, body: Body) -> Result<(), Code> {
        match body {
            Body::Genesis(genesis) => {
                if self.genesis.is_some() {
                    return Err(Code::Exists);
                }
                self.genesis = Some(genesis);
            }
            Body::Request(request) => self.change(request.op.ok_or(Code::Malformed)?)?,
        }
        Ok(())
    }

    fn change(&mut self, op: Op) -> Result<(), Code> {
        match op {
            Op::RegisterServices(op) => {
                let mut is_news = false;
                for mut service in op.services {
                    service.seen_at = self.time;
                    if let Some(known) = self.services.get(&service.service_id) {
                        service.flags = known.flags;
                        let moved = known.available_bytes.abs_diff(service.available_bytes);
                        let as_before = BlockService {
                            available_bytes: service.available_bytes,
                            blocks: service.blocks,
                            seen_at: service.seen_at,
                            ..known.clone()
                        };
                        is_news |= as_before != service || moved > service.capacity_bytes / 16;
                    } else {
                        is_news = true;
                    }
                    self.services.insert(service.service_id, service);
                }
                self.services_version += u64::from(is_news);
            }
            Op::SetServiceFlags(op) => {
                self.services.get_mut(&op.service_id).ok_or(Code::NotFound)?.flags = op.flags;
                self.services_version += 1;
            }
            Op::PlaceShard(op) => {
                let placement = op.placement.ok_or(Code::Malformed)?;
                if self.shards.get(&placement.shard).is_some_and(|known| known.epoch > placement.epoch) {
                    return Err(Code::Stale);
                }
                self.shards.insert(placement.shard, placement);
            }
            Op::PlaceCdc(op) => {
                if self.cdc.1 > op.epoch {
                    return Err(Code::Stale);
                }
                self.cdc = (op.address, op.epoch);
                self.cdc_members = op.members;
            }
            Op::SwapChain(op) => self.swap_chain(op)?,
            // No client of a world joins; the tests of the registry and of three nodes do.
            Op::InviteNode(_) | Op::RedeemInvitation(_) => return Err(Code::Unsupported),
            // Reads are in no log.
            Op::GetMap(_) | Op::GetChain(_) => return Err(Code::Malformed),
        }
        Ok(())
    }

    fn swap_chain(&mut self, op: SwapChain) -> Result<(), Code> {
        let append = op.append.ok_or(Code::Malformed)?;
        let segments = self.chains.entry((op.role, op.number)).or_default();
        let newest = segments.last().map_or((0, 0), |s| (s.incarnation, s.base_position));
        if newest.0 != op.expect_incarnation {
            return Err(Code::StaleIncarnation);
        }
        if append.incarnation <= newest.0 || append.base_position < newest.1 {
            return Err(Code::InvalidArgument);
        }
        segments.push(append);
        Ok(())
    }

    /// What a request for the map must see, from a client that knows a version of the services (0: none).
    pub fn map(&self, known_version: u64) -> Result<Map, Code> {
        let genesis = self.genesis.as_ref().ok_or(Code::NotReady)?;
        let is_known = known_version != 0 && known_version == self.services_version;
        Ok(Map {
            cluster: genesis.cluster,
            shards: self.shards.values().cloned().collect(),
            cdc_address: self.cdc.0.clone(),
            services_version: self.services_version,
            services: if is_known { Vec::new() } else { self.services.values().cloned().collect() },
            default_policy: genesis.default_policy,
            cdc_members: self.cdc_members.clone(),
            registry_members: Vec::new(),
        })
    }
}
