//! One member of a log has another state than the others, whether it leads or follows: it alone stops and says why, the others go
//! on. Where the leader's hash were believed, they would stop and it would go on with what is wrong.

use std::time::Duration;

use clutch_client::{Client, ClientError};
use clutch_log::LogId;
use clutch_proto::{
    InodeId,
    admin::{AdminRequest, Status, StatusReply, admin_request},
    session::Role,
};
use clutch_runtime::{Endpoint, simulated::NodeId};

use crate::{
    sim_cluster::{CLIENT, ClusterConfig, SimCluster, endpoint},
    workload::attributes,
};

/// Longer than it takes to compare members of an idle log, with an election behind it.
const COMPARED_AFTER: Duration = Duration::from_secs(40);

fn cluster(seed: u64) -> Result<SimCluster, String> {
    let config = ClusterConfig { replicas: 3, ..ClusterConfig::of(1, 3, (1, 1)) };
    SimCluster::start_with(seed, config).ok_or_else(|| "the cluster does not come up".into())
}

/// Makes a few directories.
pub(crate) async fn work(client: &Client, part: &str) -> Result<(), ClientError> {
    for number in 0..8 {
        client.make_directory(InodeId::ROOT, &format!("{part}{number}").into(), attributes()).await?;
    }
    Ok(())
}

async fn status(client: &Client, at: Endpoint) -> Result<StatusReply, ClientError> {
    let request = AdminRequest { op: Some(admin_request::Op::Status(Status::default())) };
    let reply = client.admin_at(at, Role::Shard, 0, request).await?;
    reply.status.ok_or_else(|| ClientError::Local("an answer without a status".into()))
}

fn run<T: Send + 'static>(
    cluster: &SimCluster,
    part: impl Future<Output = Result<T, ClientError>> + Send + 'static,
) -> Result<T, String> {
    let ended = cluster.world.run(CLIENT, Duration::from_secs(600), part);
    ended.ok_or("it does not come to an end")?.map_err(|e| e.to_string())
}

/// What is wrong when a member's state becomes another one.
fn check(seed: u64, leads: bool) -> Result<(), String> {
    let cluster = cluster(seed)?;
    let client = cluster.client();
    let (c, shard) = (client.clone(), LogId::shard(0));
    run(&cluster, async move { work(&c, "before").await })?;
    let leader = cluster.home(shard).ok_or("nobody leads")?;
    let members = cluster.members(shard);
    let other = members.iter().find(|node| **node != leader).ok_or("nobody follows")?;
    let altered: NodeId = if leads { leader } else { *other };
    cluster.recording.alter(shard, altered);
    let part = async move {
        work(&client, "meanwhile").await?;
        client.runtime().clock.sleep(COMPARED_AFTER).await;
        work(&client, "after").await?;
        let mut faults = Vec::new();
        for node in members {
            faults.push((node, status(&client, endpoint(node)).await?.fault));
        }
        Ok(faults)
    };
    for (node, fault) in run(&cluster, part)? {
        match (node == altered, fault.contains("state differs")) {
            (true, true) => {}
            (true, false) => {
                return Err(format!("{node:?} has another state and does not say so ({fault:?})"));
            }
            (false, _) if fault.is_empty() => {}
            (false, _) => return Err(format!("{node:?} is right, and stopped: {fault}")),
        }
    }
    Ok(())
}

/// What is wrong.
pub fn all() -> Vec<String> {
    let mut wrong = Vec::new();
    for seed in [1, 2, 3] {
        for leads in [false, true] {
            wrong.extend(check(seed, leads).err().map(|what| format!("seed {seed}, leads {leads}: {what}")));
        }
    }
    wrong
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_member_that_differs_stops_alone() {
        assert_eq!(super::all(), Vec::<String>::new());
    }
}
