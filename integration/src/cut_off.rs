//! A member of a log that hears nothing of the others, as one that was replaced: it shows neither its rows nor its log as what there
//! is, whether it led or followed.

use std::time::Duration;

use clutch_client::Client;
use clutch_log::LogId;
use clutch_proto::{
    admin::{AdminRequest, ReadLog, ScanRows, admin_request::Op},
    session::Role,
};
use clutch_runtime::simulated::NodeId;

use crate::{
    diverged::work,
    sim_cluster::{CLIENT, ClusterConfig, Engine, SimCluster, endpoint},
};

/// How many directories a member shows, by its rows and by its log; `None` where it shows none of either.
async fn shown(client: &Client, node: NodeId) -> Option<usize> {
    let scan = ScanRows { limit_bytes: 1 << 20, ..ScanRows::default() };
    let mut most = None;
    for op in [Op::ScanRows(scan), Op::ReadLog(ReadLog { from: 1, limit_bytes: 1 << 20 })] {
        let request = AdminRequest { op: Some(op) };
        let Ok(reply) = client.admin_at(endpoint(node), Role::Shard, 0, request).await else { continue };
        let rows = reply.scan.map_or(0, |scan| scan.rows.len());
        let batches = reply.log.map_or(0, |log| log.batches.len());
        most = most.max(Some(rows.max(batches)));
    }
    most
}

fn check(seed: u64, leads: bool) -> Result<(), String> {
    let config = ClusterConfig { replicas: 3, engine: Engine::Raft, ..ClusterConfig::of(1, 3, (1, 1)) };
    let cluster = SimCluster::start_with(seed, config).ok_or("the cluster does not come up")?;
    let client = cluster.client();
    let run = |part| {
        let ended = cluster.world.run(CLIENT, Duration::from_secs(600), part);
        ended.ok_or("it does not come to an end")
    };
    let (c, shard) = (client.clone(), LogId::shard(0));
    run(Box::pin(async move { work(&c, "before").await.err().map(|e| e.to_string()) }) as BoxedPart)?;
    let leader = cluster.home(shard).ok_or("nobody leads")?;
    let members = cluster.members(shard);
    let other = *members.iter().find(|node| **node != leader).ok_or("nobody follows")?;
    let apart = if leads { leader } else { other };
    for node in members.iter().filter(|node| **node != apart) {
        cluster.world.set_blocked(apart, *node, true);
        cluster.world.set_blocked(*node, apart, true);
    }
    let wrong = run(Box::pin(async move {
        // At once, too: one that led may not know yet that it leads no more.
        let at_once = shown(&client, apart).await;
        if let Err(error) = work(&client, "meanwhile").await {
            return Some(error.to_string());
        }
        let later = shown(&client, apart).await;
        let by_others = match members.iter().find(|node| **node != apart) {
            Some(node) => shown(&client, *node).await,
            None => None,
        };
        (at_once.is_some() || later.is_some() || by_others.is_none())
            .then(|| format!("shown at once {at_once:?}, later {later:?}, by others {by_others:?}"))
    }))?;
    wrong.map_or(Ok(()), Err)
}

type BoxedPart = std::pin::Pin<Box<dyn Future<Output = Option<String>> + Send>>;

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
    fn who_is_cut_off_shows_nothing_as_what_there_is() {
        assert_eq!(super::all(), Vec::<String>::new());
    }
}
