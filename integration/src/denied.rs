//! Who may change a cluster: each request that does, from everybody who has not its key.

use std::time::Duration;

use bytes::Bytes;
use clutch_proto::{
    Time,
    admin::{
        AdminRequest, LogMember, MoveLeader, ReadLog, Reconfigure, Rescan, RotateKey, ScanRows,
        TakeCheckpoint, TrimLog, admin_request,
    },
    certificate::{AdminClaims, admin_mac},
    registry::{
        InviteNode, PlaceCdc, PlaceShard, RegisterServices, RegistryRequest, Segment, SetServiceFlags,
        SwapChain, registry_request,
    },
    session::{Request, Response, Role},
    types::{BlockService, ClientTag, Code, ShardPlacement},
};
use clutch_runtime::Lane;
use prost::Message as _;

use crate::sim_cluster::{CLIENT, ClusterConfig, REGISTRY, SYSTEM_KEY, SimCluster, endpoint};

/// Everything that changes the registry, so that it could be seen, and what operators do with its log and its tables.
fn changes(disk: u64) -> Vec<(String, bool, Bytes)> {
    use registry_request::Op;
    let service = BlockService {
        service_id: disk,
        address: "nowhere".into(),
        failure_domain: "none".into(),
        ..BlockService::default()
    };
    let placement = ShardPlacement {
        shard: 0,
        slot_first: 0,
        slot_last: 255,
        address: "nowhere".into(),
        epoch: u64::MAX,
        members: Vec::new(),
    };
    let segment =
        Segment { base_position: 0, engine: "sim".into(), parameters: String::new(), incarnation: 9 };
    let of_registry = [
        Op::RegisterServices(RegisterServices { services: vec![service] }),
        Op::SetServiceFlags(SetServiceFlags { service_id: disk, flags: 1 }),
        Op::PlaceShard(PlaceShard { placement: Some(placement) }),
        Op::PlaceCdc(PlaceCdc { address: "nowhere".into(), epoch: u64::MAX, members: Vec::new() }),
        Op::SwapChain(SwapChain { role: 3, number: 0, expect_incarnation: 1, append: Some(segment) }),
        Op::InviteNode(InviteNode { invitation: 5, lifetime_ms: 60_000 }),
    ];
    let member = LogMember { node: u64::from(REGISTRY.0), voter: true, ..LogMember::default() };
    let of_members = [
        admin_request::Op::Reconfigure(Reconfigure { expect_config: 0, members: vec![member] }),
        admin_request::Op::MoveLeader(MoveLeader { to: 7 }),
        admin_request::Op::ScanRows(ScanRows { limit_bytes: 1000, ..ScanRows::default() }),
        admin_request::Op::ReadLog(ReadLog { from: 1, limit_bytes: 1000 }),
        admin_request::Op::TakeCheckpoint(TakeCheckpoint {}),
        admin_request::Op::TrimLog(TrimLog { upto: 1 }),
        admin_request::Op::Rescan(Rescan {}),
        admin_request::Op::RotateKey(RotateKey::default()),
    ];
    let of_registry = of_registry.into_iter().map(|op| {
        let name = format!("{op:?}");
        (name, false, RegistryRequest { op: Some(op) }.encode_to_vec().into())
    });
    let of_members = of_members.into_iter().map(|op| {
        let name = format!("{op:?}");
        (name, true, AdminRequest { op: Some(op) }.encode_to_vec().into())
    });
    of_registry.chain(of_members).collect()
}

/// Asks the registry's node as it is asked over the network; what is refused.
fn ask(cluster: &SimCluster, request: &Request) -> Result<Option<Code>, String> {
    let network = cluster.world.node(CLIENT).network.clone();
    let bytes = request.encode_to_vec().into();
    let asked = cluster.world.run(CLIENT, Duration::from_secs(10), async move {
        network.call(&endpoint(REGISTRY), Lane::Metadata, bytes, 1 << 20, Duration::from_secs(5)).await
    });
    let answer = asked.ok_or("no answer")?.map_err(|error| error.to_string())?;
    let response = Response::decode(answer).map_err(|error| error.to_string())?;
    Ok(response.error.and_then(|error| Code::try_from(error.code).ok()))
}

/// A request with a MAC that was made with this key for these claims.
pub fn proven(request: &Request, key: &[u8; 32], claims: AdminClaims) -> Request {
    let mac = admin_mac(key, claims, &request.body);
    Request { system_mac: Bytes::copy_from_slice(&mac), ..request.clone() }
}

/// The map as the registry has it, without what the disks say of their room now and then.
fn map(cluster: &SimCluster) -> Result<String, String> {
    let client = cluster.client();
    let map = cluster.world.run(CLIENT, Duration::from_secs(30), async move { client.refresh_map().await });
    let map = map.ok_or("no map")?.map_err(|error| error.to_string())?;
    let services: Vec<_> = map.services.iter().map(|s| (s.service_id, &s.address, s.flags)).collect();
    Ok(format!("{:?} {:?} {services:?}", map.shards, map.cdc_address))
}

fn denied() -> Result<Vec<String>, String> {
    let cluster = SimCluster::start_with(1, ClusterConfig::of(1, 3, (1, 1))).ok_or("it does not come up")?;
    let mut wrong = Vec::new();
    let before = map(&cluster)?;
    let disk = cluster.service_ids()[0];
    for (number, (name, admin, body)) in (0..).zip(changes(disk)) {
        let now = cluster.world.node(CLIENT).clock.now();
        let tag = ClientTag { client: 1000, sequence: 1 + number, acknowledged: number, issued_at: now.0 };
        let role = Role::Registry as i32;
        let plain = Request {
            role,
            admin,
            time: now.0,
            cluster: cluster.cluster_id(),
            tag: (!admin).then_some(tag),
            body: body.clone(),
            ..Request::default()
        };
        let claims = AdminClaims { cluster: cluster.cluster_id(), role, number: 0, time: now };
        let long_ago = Time(now.0 - 120_000_000_000);
        let other_body = Request { body: Bytes::from_static(b"other"), ..plain.clone() };
        let of_other_body = proven(&other_body, &SYSTEM_KEY, claims).system_mac;
        let old = AdminClaims { time: long_ago, ..claims };
        for (who, request) in [
            ("a client", plain.clone()),
            ("another key", proven(&plain, &[9; 32], claims)),
            ("for another cluster", proven(&plain, &SYSTEM_KEY, AdminClaims { cluster: 1, ..claims })),
            ("for another replica", proven(&plain, &SYSTEM_KEY, AdminClaims { number: 1, ..claims })),
            ("for another role", proven(&plain, &SYSTEM_KEY, AdminClaims { role: 3, ..claims })),
            ("for another time", proven(&plain, &SYSTEM_KEY, old)),
            ("from two minutes ago", Request { time: long_ago.0, ..proven(&plain, &SYSTEM_KEY, old) }),
            ("for another body", Request { system_mac: of_other_body, ..plain.clone() }),
            ("half a proof", {
                let whole = proven(&plain, &SYSTEM_KEY, claims);
                Request { system_mac: whole.system_mac.slice(..8), ..whole }
            }),
            ("without naming the cluster", Request { cluster: 0, ..proven(&plain, &SYSTEM_KEY, claims) }),
        ] {
            let refused = ask(&cluster, &request)?;
            if refused != Some(Code::Permission) {
                wrong.push(format!("{name} by {who}: {refused:?}"));
            }
        }
        if wrong.is_empty() && map(&cluster)? != before {
            wrong.push(format!("{name} was refused and has changed something"));
        }
    }
    // Who has the key is let in.
    for (number, (name, admin, body)) in (100..).zip(changes(disk)) {
        let now = cluster.world.node(CLIENT).clock.now();
        let tag = ClientTag { client: 1000, sequence: number, acknowledged: number - 1, issued_at: now.0 };
        let (role, id) = (Role::Registry as i32, cluster.cluster_id());
        let tag = (!admin).then_some(tag);
        let plain = Request { role, admin, time: now.0, cluster: id, tag, body, ..Request::default() };
        let claims = AdminClaims { cluster: id, role, number: 0, time: now };
        let refused = ask(&cluster, &proven(&plain, &SYSTEM_KEY, claims))?;
        if refused == Some(Code::Permission) {
            wrong.push(format!("{name} by who has the key: {refused:?}"));
        }
    }
    wrong.extend(first_request(&cluster)?);
    Ok(wrong)
}

/// Why who has the key is not let in by his first request, before he knows the cluster's time.
fn first_request(cluster: &SimCluster) -> Result<Option<String>, String> {
    let client = cluster.client();
    let first = async move {
        let op = admin_request::Op::ReadLog(ReadLog { from: 1, limit_bytes: 1000 });
        client.admin_at(endpoint(REGISTRY), Role::Registry, 0, AdminRequest { op: Some(op) }).await
    };
    let answered = cluster.world.run(CLIENT, Duration::from_secs(30), first).ok_or("no answer")?;
    Ok(answered.err().map(|error| format!("a first request by who has the key: {error}")))
}

/// What is wrong in any case.
pub fn all() -> Vec<String> {
    denied().unwrap_or_else(|error| vec![error])
}

#[cfg(test)]
mod tests {
    #[test]
    fn only_who_has_the_key_changes_a_cluster() {
        assert_eq!(super::all(), Vec::<String>::new());
    }
}
