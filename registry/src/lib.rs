//! The registry: who is where. Shard placement, block services, the chain of every log. Pure.
//!
//! Invariants: a chain only grows, and only by whoever names its newest incarnation; a service keeps its id for
//! good; `services_version` grows with every change that placement or routing must know.

use clutch_proto::{
    Refusal, Time, level,
    log::Position,
    mutants::{self, Mutant},
    operation::{self, Class},
    registry::{
        Chain, ClusterRow, Map, RegistryEntry, RegistryReply, RegistryRequest, Segment, SwapChain,
        registry_entry::Body, registry_request::Op,
    },
    rules::{
        self,
        v1::{SERVICES_MAX, SHARDS_MAX},
    },
    types::{BlockService, ClientTag, Code, ShardPlacement},
};
use clutch_state::{
    Applied, Machine, ProduceContext, Stop, StoreError, Tx, View, broken_unless, get_row, machine::Effects,
    store::decode_row,
};

mod invitations;

/// The registry's tables.
pub mod tables {
    use clutch_state::Table;

    /// One row: `ClusterRow`.
    pub const CLUSTER: Table = Table(16);
    /// Service → `BlockService`.
    pub const SERVICE: Table = Table(17);
    /// Shard → `ShardPlacement`.
    pub const SHARD: Table = Table(18);
    /// Role, number → `Chain`.
    pub const CHAIN: Table = Table(19);
    /// Invitation → `InvitationRow`.
    pub const INVITATION: Table = Table(20);

    /// Key of an invitation.
    pub fn invitation_key(invitation: u64) -> [u8; 8] {
        invitation.to_be_bytes()
    }

    /// Key of a service.
    pub fn service_key(service: u64) -> [u8; 8] {
        service.to_be_bytes()
    }

    /// Key of a shard.
    pub fn shard_key(shard: u32) -> [u8; 4] {
        shard.to_be_bytes()
    }

    /// Key of a chain.
    pub fn chain_key(role: u32, number: u64) -> [u8; 12] {
        let mut key = [0; 12];
        key[..4].copy_from_slice(&role.to_be_bytes());
        key[4..].copy_from_slice(&number.to_be_bytes());
        key
    }
}

/// The registry's machine.
pub struct Registry;

/// What the node knows that answers, and no log holds.
#[derive(Clone, Debug, Default)]
pub struct RegistryFacts {
    /// Where the registry's members are; none where it has one.
    pub members: Vec<String>,
}

/// The registry causes nothing outside itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoEffect {}

impl Machine for Registry {
    const NAME: &'static str = "registry";
    type Request = RegistryRequest;
    type Reply = RegistryReply;
    type Entry = RegistryEntry;
    type Effect = NoEffect;
    type Facts = RegistryFacts;

    fn check_home(view: &dyn View, cluster: u64, _number: u32) -> Result<(), StoreError> {
        let row: Option<ClusterRow> = get_row(view, tables::CLUSTER, &[])?;
        match row {
            Some(row) if row.cluster != cluster => {
                Err(StoreError::Damaged(format!("they are of cluster {:016x}", row.cluster)))
            }
            _ => Ok(()),
        }
    }

    fn level(request: &RegistryRequest) -> u32 {
        request.op.as_ref().map_or(level::FIRST, level::of_registry)
    }

    fn is_read(request: &RegistryRequest) -> bool {
        request.op.as_ref().is_none_or(|op| operation::of_registry(op).is_read())
    }

    fn gives_space_back(request: &RegistryRequest) -> bool {
        request.op.as_ref().is_some_and(|op| operation::of_registry(op) == Class::Release)
    }

    fn read(
        view: &dyn View,
        request: &RegistryRequest,
        facts: &RegistryFacts,
    ) -> Result<RegistryReply, Stop> {
        match &request.op {
            Some(Op::GetMap(op)) => {
                let map = Map { registry_members: facts.members.clone(), ..map(view, op.services_version)? };
                Ok(RegistryReply { map: Some(map), ..RegistryReply::default() })
            }
            Some(Op::GetChain(op)) => {
                let chain = chain_of(view, op.role, op.number)?;
                let chain = chain.ok_or_else(|| Stop::refuse(Code::NotFound, "no such log"))?;
                Ok(RegistryReply { chain: Some(chain), ..RegistryReply::default() })
            }
            Some(
                Op::RegisterServices(_)
                | Op::PlaceShard(_)
                | Op::PlaceCdc(_)
                | Op::SwapChain(_)
                | Op::SetServiceFlags(_)
                | Op::InviteNode(_)
                | Op::RedeemInvitation(_),
            ) => Err(Refusal::malformed("not a read").into()),
            None => Err(Refusal::malformed("a request without an operation that this build knows").into()),
        }
    }

    fn produce(
        _view: &dyn View,
        request: RegistryRequest,
        tag: Option<ClientTag>,
        _context: &mut ProduceContext<'_>,
        _facts: &RegistryFacts,
    ) -> Result<RegistryEntry, Stop> {
        match &request.op {
            Some(Op::PlaceShard(op)) if op.placement.is_none() => {
                return Err(Refusal::malformed("no placement").into());
            }
            Some(Op::SwapChain(op)) if op.append.is_none() => {
                return Err(Refusal::malformed("no segment to append").into());
            }
            Some(op) if !operation::of_registry(op).is_read() => {}
            _ => return Err(Refusal::malformed("not a change").into()),
        }
        Ok(RegistryEntry { tag, body: Some(Body::Request(request)) })
    }

    fn tag(entry: &RegistryEntry) -> Option<&ClientTag> {
        entry.tag.as_ref()
    }

    fn apply(
        tx: &mut Tx<'_>,
        _position: Position,
        time: Time,
        entry: RegistryEntry,
        _effects: &mut Effects<Registry>,
    ) -> Result<Applied<RegistryReply>, Stop> {
        let reply = match entry.body {
            Some(Body::Genesis(genesis)) => {
                if tx.get(tables::CLUSTER, &[])?.is_some() {
                    return Err(Stop::refuse(Code::Exists, "the registry has begun already"));
                }
                rules::check(genesis.rules).map_err(Stop::unknown)?;
                if genesis.shards == 0 || genesis.shards > SHARDS_MAX || !genesis.shards.is_power_of_two() {
                    let text =
                        format!("{} shards; a power of two up to {SHARDS_MAX} is allowed", genesis.shards);
                    return Err(Stop::refuse(Code::InvalidArgument, text));
                }
                let row = ClusterRow {
                    cluster: genesis.cluster,
                    shards: genesis.shards,
                    default_policy: genesis.default_policy,
                    ..ClusterRow::default()
                };
                tx.put_row(tables::CLUSTER, &[], &row);
                RegistryReply::default()
            }
            Some(Body::Request(request)) => apply_request(tx, time, request)?,
            None => return Err(Stop::unknown("it has no operation that this build knows")),
        };
        Ok(Applied::Reply(reply))
    }
}

fn apply_request(tx: &mut Tx<'_>, time: Time, request: RegistryRequest) -> Result<RegistryReply, Stop> {
    let op = request.op.ok_or_else(|| Stop::unknown("it has no operation that this build knows"))?;
    match op {
        Op::RegisterServices(op) => register(tx, time, op.services),
        Op::SetServiceFlags(op) => {
            let key = tables::service_key(op.service_id);
            let mut service: BlockService = tx.get_row(tables::SERVICE, &key)?.ok_or_else(|| {
                Stop::refuse(Code::NotFound, format!("block service {:x} is not known", op.service_id))
            })?;
            service.flags = op.flags;
            tx.put_row(tables::SERVICE, &key, &service);
            if !mutants::is(Mutant::FlagsUnversioned) {
                bump_services(tx)?;
            }
            Ok(RegistryReply::default())
        }
        Op::PlaceShard(op) => {
            let placement = op.placement.ok_or_else(|| Stop::unknown("no placement"))?;
            place(tx, &placement)?;
            Ok(RegistryReply::default())
        }
        Op::PlaceCdc(op) => {
            let mut row = cluster(tx)?;
            check_epoch("the CDC", row.cdc_epoch, op.epoch)?;
            (row.cdc_address, row.cdc_epoch, row.cdc_members) = (op.address, op.epoch, op.members);
            tx.put_row(tables::CLUSTER, &[], &row);
            Ok(RegistryReply::default())
        }
        Op::SwapChain(op) => swap_chain(tx, op),
        Op::InviteNode(op) => invitations::invite(tx, time, op),
        Op::RedeemInvitation(op) => invitations::redeem(tx, time, op),
        Op::GetMap(_) | Op::GetChain(_) => Err(Stop::unknown("it holds a read")),
    }
}

/// The slots of a shard: the 256 slots in equal ranges.
pub fn slots(shard: u32, shards: u32) -> (u32, u32) {
    let each = 256 / shards;
    (shard * each, (shard + 1) * each - 1)
}

fn cluster(tx: &mut Tx<'_>) -> Result<ClusterRow, Stop> {
    tx.get_row(tables::CLUSTER, &[])?
        .ok_or_else(|| Stop::refuse(Code::NotReady, "the registry has not begun yet"))
}

fn bump_services(tx: &mut Tx<'_>) -> Result<(), Stop> {
    let mut row = cluster(tx)?;
    broken_unless!(row.services_version < u64::MAX, "the versions of services are used up");
    row.services_version += 1;
    tx.put_row(tables::CLUSTER, &[], &row);
    Ok(())
}

fn register(tx: &mut Tx<'_>, time: Time, services: Vec<BlockService>) -> Result<RegistryReply, Stop> {
    cluster(tx)?;
    let mut changed = false;
    // Counted once, however many are new.
    let mut count = None;
    for mut service in services {
        if service.service_id == 0 || service.address.is_empty() || service.failure_domain.is_empty() {
            return Err(Stop::refuse(
                Code::InvalidArgument,
                "a block service needs an id, an address and a failure domain",
            ));
        }
        let key = tables::service_key(service.service_id);
        let known: Option<BlockService> = tx.get_row(tables::SERVICE, &key)?;
        service.seen_at = time.0;
        match known {
            None => {
                let before = match count {
                    Some(count) => count,
                    None => tx.scan(tables::SERVICE, &[], &[], SERVICES_MAX)?.len(),
                };
                count = Some(before + 1);
                if before >= SERVICES_MAX {
                    return Err(Stop::refuse(
                        Code::TooLarge,
                        format!("a cluster has at most {SERVICES_MAX} block services"),
                    ));
                }
                changed = true;
            }
            Some(known) => {
                // Flags are the operator's: registering again must not take them back.
                if !mutants::is(Mutant::FlagsLost) {
                    service.flags = known.flags;
                }
                let moved =
                    known.available_bytes.abs_diff(service.available_bytes) > service.capacity_bytes / 16;
                let same = BlockService {
                    available_bytes: known.available_bytes,
                    blocks: known.blocks,
                    seen_at: known.seen_at,
                    ..service.clone()
                } == known;
                changed |= moved || !same;
                if same && !moved && mutants::is(Mutant::SmallMovesLost) {
                    continue;
                }
            }
        }
        tx.put_row(tables::SERVICE, &key, &service);
    }
    if changed {
        bump_services(tx)?;
    }
    Ok(RegistryReply::default())
}

fn place(tx: &mut Tx<'_>, placement: &ShardPlacement) -> Result<(), Stop> {
    let row = cluster(tx)?;
    if placement.shard >= row.shards
        || (placement.slot_first, placement.slot_last) != slots(placement.shard, row.shards)
    {
        let text = format!(
            "shard {} with slots {} to {}",
            placement.shard, placement.slot_first, placement.slot_last
        );
        return Err(Stop::refuse(Code::InvalidArgument, text));
    }
    let key = tables::shard_key(placement.shard);
    let known: Option<ShardPlacement> = tx.get_row(tables::SHARD, &key)?;
    check_epoch("the shard", known.map_or(0, |known| known.epoch), placement.epoch)?;
    tx.put_row(tables::SHARD, &key, placement);
    Ok(())
}

/// A leader that was late to say where it is must not replace its successor.
fn check_epoch(what: &str, known: u64, offered: u64) -> Result<(), Stop> {
    if offered < known && !mutants::is(Mutant::OlderLeaderPlaced) {
        let text = format!("{what} is led in epoch {known} by another node; epoch {offered} is over");
        return Err(Stop::refuse(Code::Stale, text));
    }
    Ok(())
}

/// Which loglets a log is made of, as far as this state knows it; `None` when it never heard of the log.
pub fn chain_of(view: &dyn View, role: u32, number: u64) -> Result<Option<Chain>, Stop> {
    Ok(get_row(view, tables::CHAIN, &tables::chain_key(role, number))?)
}

fn swap_chain(tx: &mut Tx<'_>, op: SwapChain) -> Result<RegistryReply, Stop> {
    let append = op.append.ok_or_else(|| Stop::unknown("no segment to append"))?;
    let key = tables::chain_key(op.role, op.number);
    let mut chain: Chain = tx.get_row(tables::CHAIN, &key)?.unwrap_or_default();
    let newest = chain.segments.last().cloned().unwrap_or_default();
    if newest.incarnation != op.expect_incarnation {
        let text = format!("the newest segment has incarnation {}", newest.incarnation);
        return Err(Stop::refuse(Code::StaleIncarnation, text));
    }
    if append.incarnation <= newest.incarnation || append.base_position < newest.base_position {
        return Err(Stop::refuse(
            Code::InvalidArgument,
            "a new segment needs a higher incarnation and may not begin earlier",
        ));
    }
    chain.segments.push(Segment { ..append });
    tx.put_row(tables::CHAIN, &key, &chain);
    Ok(RegistryReply { chain: Some(chain), ..RegistryReply::default() })
}

fn map(view: &dyn View, known_version: u64) -> Result<Map, Stop> {
    let row: ClusterRow = get_row(view, tables::CLUSTER, &[])?
        .ok_or_else(|| Stop::refuse(Code::NotReady, "the registry has not begun yet"))?;
    fn all<M: prost::Message + Default>(
        view: &dyn View,
        table: clutch_state::Table,
    ) -> Result<Vec<M>, StoreError> {
        view.scan(table, &[], &[], usize::MAX)?.into_iter().map(|(k, v)| decode_row(table, &k, v)).collect()
    }
    let services = match known_version != 0 && known_version == row.services_version {
        true => Vec::new(),
        false => all(view, tables::SERVICE)?,
    };
    Ok(Map {
        cluster: row.cluster,
        shards: all(view, tables::SHARD)?,
        cdc_address: row.cdc_address,
        services_version: row.services_version,
        services,
        default_policy: row.default_policy,
        cdc_members: row.cdc_members,
        registry_members: Vec::new(),
    })
}
