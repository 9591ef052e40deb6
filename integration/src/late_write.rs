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
/// The block that is granted an hour ago.
const LATE: u64 = 0x2300;
const HOUR_MS: u64 = 60 * 60 * 1000;
/// So many times is a node asked again that does not listen yet.
const TRIES_MAX: u32 = 2000;
const AGAIN: Duration = Duration::from_millis(5);
/// So many seconds after its network is whole a node knows the time: its patience with a request is shorter, and so is a grant.
const PAUSES_MAX: u32 = 40;

/// A write and how it was answered.
struct Write {
    cluster: u64,
    service: u64,
    granted: Time,
    is_late: bool,
    /// What the client says of the time.
    says: Time,
}

/// Writes a block, and says with what code that was refused, nothing when it was done; and what time the service says it is.
async fn write(runtime: Runtime, to: Endpoint, write: Write) -> (Option<Code>, Time) {
    let Write { cluster, service, granted, is_late, says } = write;
    let data = Bytes::from(vec![7; BYTES as usize]);
    let claims = Claims {
        operation: Operation::Write,
        cluster,
        service: ServiceId(service),
        block: BlockId(if is_late { LATE } else { LATE + 0x100 }),
        size: BYTES,
        crc: crc32fast::hash(&data),
        time: granted,
        expiry: granted.plus_ms(60_000),
    };
    let op = WriteBlock { certificate: claims.sign(&service_key(service)), data };
    let body = BlocksRequest { op: Some(Op::Write(op)) }.encode_to_vec().into();
    let request =
        Request { role: Role::Blocks as i32, number: service, body, time: says.0, ..Request::default() };
    let sent = Bytes::from(request.encode_to_vec());
    for _ in 0..TRIES_MAX {
        let asked =
            runtime.network.call(&to, Lane::Bulk, sent.clone().into(), 0, Duration::from_secs(5)).await;
        let Ok(answer) = asked else {
            runtime.clock.sleep(AGAIN).await;
            continue;
        };
        let Ok(response) = Response::decode(answer) else { break };
        let code = match response.error {
            Some(error) => Some(Code::try_from(error.code).unwrap_or(Code::Malformed)),
            None => BlocksReply::decode(response.body).err().map(|_| Code::Malformed),
        };
        return (code, Time(response.time));
    }
    (Some(Code::Unreachable), Time(0))
}

fn check(seed: u64, wall_ahead_ms: i64) -> Result<(), String> {
    let cluster =
        SimCluster::start_with(seed, ClusterConfig::of(1, 3, (2, 1))).ok_or("it does not come up")?;
    let (disk, service) = (disk_node(0), cluster.service_ids()[0]);
    let id = cluster.cluster_id();
    let now = cluster.world.node(disk).clock.now();
    let long_ago = Time(now.0 - HOUR_MS * 1_000_000);
    let ask = |granted: Time, says: Time| {
        let of = Write { cluster: id, service, granted, is_late: granted == long_ago, says };
        cluster.run(write(cluster.world.node(CLIENT), endpoint(disk), of))
    };
    let tomorrow = now.plus_ms(wall_ahead_ms.unsigned_abs());
    for (from, to) in [(disk, REGISTRY), (REGISTRY, disk)] {
        cluster.world.set_blocked(from, to, true);
    }
    cluster.world.set_step_ms(disk, wall_ahead_ms);
    cluster.restart(disk);
    for granted in [long_ago, now] {
        let (code, told) = ask(granted, tomorrow);
        if code != Some(Code::NotReady) {
            return Err(format!("it does not know the time, and a write granted at {}: {code:?}", granted.0));
        }
        if told > now.plus_ms(HOUR_MS) {
            return Err(format!("it does not know the time, and says {} at {}", told.0, now.0));
        }
    }
    cluster.world.heal_network();
    for _ in 0..PAUSES_MAX {
        if ask(now, now).0 != Some(Code::NotReady) {
            break;
        }
        cluster.pause(Duration::from_secs(1));
    }
    match (ask(long_ago, now).0, ask(now, now).0) {
        (Some(Code::CertificateExpired), None) => {}
        other => return Err(format!("it knows the time; a write of an hour ago, and one of now: {other:?}")),
    }
    match cluster.blocks_on(0)?.contains(&LATE) {
        true => Err("the late block is there".into()),
        false => Ok(()),
    }
}

/// What is wrong: by a right clock, and by one that is a day ahead.
pub fn all() -> Vec<String> {
    let mut wrong = Vec::new();
    for seed in 1..=3 {
        for wall_ahead_ms in [0, 24 * HOUR_MS as i64] {
            let found = check(seed, wall_ahead_ms).err();
            wrong.extend(found.map(|what| format!("seed {seed}, {wall_ahead_ms} ms ahead: {what}")));
        }
    }
    wrong
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_disk_that_does_not_know_the_time_takes_nothing() {
        assert_eq!(super::all(), Vec::<String>::new());
    }
}
