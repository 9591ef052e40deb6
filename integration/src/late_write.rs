//! A write that comes an hour late, to a disk whose node has just started and has not heard what time it is: its block may be proven
//! erased by then, so it must not be there.

use std::time::Duration;

use bytes::Bytes;
use clutch_proto::{
    BlockId, ServiceId, Time,
    blocks::{BlocksReply, BlocksRequest, WriteBlock, blocks_request::Op},
    certificate::{Claims, Operation},
    session::{Request, Response, Role},
    types::Code,
};
use clutch_runtime::{Endpoint, Lane, Runtime};
use prost::Message as _;

use crate::sim_cluster::{CLIENT, ClusterConfig, REGISTRY, SimCluster, disk_node, endpoint, service_key};

const BYTES: u32 = 4096;
const HOUR_MS: u64 = 60 * 60 * 1000;
/// So many times is a node asked again that does not listen yet.
const TRIES_MAX: u32 = 2000;
const AGAIN: Duration = Duration::from_millis(5);
/// So many seconds after its network is whole a node knows the time: its patience with a request is shorter, and so is a grant.
const PAUSES_MAX: u32 = 40;

/// Writes a block that was granted at a time, and says with what code that was refused; nothing when it was done.
async fn write(runtime: Runtime, to: Endpoint, cluster: u64, service: u64, granted: Time) -> Option<Code> {
    let data = Bytes::from(vec![7; BYTES as usize]);
    let claims = Claims {
        operation: Operation::Write,
        cluster,
        service: ServiceId(service),
        block: BlockId(0x2300 + granted.0 % 2),
        size: BYTES,
        crc: crc32fast::hash(&data),
        time: granted,
        expiry: granted.plus_ms(60_000),
    };
    let op = WriteBlock { certificate: claims.sign(&service_key(service)), data };
    let body = BlocksRequest { op: Some(Op::Write(op)) }.encode_to_vec().into();
    let request = Request { role: Role::Blocks as i32, number: service, body, ..Request::default() };
    let sent = Bytes::from(request.encode_to_vec());
    for _ in 0..TRIES_MAX {
        let asked =
            runtime.network.call(&to, Lane::Bulk, sent.clone().into(), 0, Duration::from_secs(5)).await;
        let Ok(answer) = asked else {
            runtime.clock.sleep(AGAIN).await;
            continue;
        };
        let Ok(response) = Response::decode(answer) else { return Some(Code::Malformed) };
        return match response.error {
            Some(error) => Some(Code::try_from(error.code).unwrap_or(Code::Malformed)),
            None => BlocksReply::decode(response.body).err().map(|_| Code::Malformed),
        };
    }
    Some(Code::Unreachable)
}

fn check(seed: u64) -> Result<(), String> {
    let cluster =
        SimCluster::start_with(seed, ClusterConfig::of(1, 3, (2, 1))).ok_or("it does not come up")?;
    let (disk, service) = (disk_node(0), cluster.service_ids()[0]);
    let id = cluster.cluster_id();
    let now = cluster.world.node(disk).clock.now();
    let ask =
        |granted: Time| cluster.run(write(cluster.world.node(CLIENT), endpoint(disk), id, service, granted));
    let long_ago = Time(now.0 - HOUR_MS * 1_000_000);
    for (from, to) in [(disk, REGISTRY), (REGISTRY, disk)] {
        cluster.world.set_blocked(from, to, true);
    }
    cluster.restart(disk);
    match ask(long_ago) {
        Some(Code::NotReady) => {}
        other => return Err(format!("it does not know the time, and a write of an hour ago: {other:?}")),
    }
    match ask(now) {
        Some(Code::NotReady) => {}
        other => return Err(format!("it does not know the time, and a write of now: {other:?}")),
    }
    cluster.world.heal_network();
    for _ in 0..PAUSES_MAX {
        if ask(long_ago) != Some(Code::NotReady) {
            break;
        }
        cluster.pause(Duration::from_secs(1));
    }
    match (ask(long_ago), ask(now)) {
        (Some(Code::CertificateExpired), None) => Ok(()),
        other => Err(format!("it knows the time; a write of an hour ago, and one of now: {other:?}")),
    }
}

/// What is wrong.
pub fn all() -> Vec<String> {
    (1..=3).filter_map(|seed| check(seed).err().map(|what| format!("seed {seed}: {what}"))).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_disk_that_does_not_know_the_time_takes_nothing() {
        assert_eq!(super::all(), Vec::<String>::new());
    }
}
