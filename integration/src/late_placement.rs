//! A node tells the registry that it leads a shard, and another leads it before that arrives: the registry goes by the reigns, not by
//! what it hears last.

use std::time::Duration;

use clutch_log::LogId;

use crate::sim_cluster::{ClusterConfig, REGISTRY, SimCluster, endpoint};

const SHARD: LogId = LogId { role: 3, number: 0 };

/// Holds back what the node says that long after it starts; true when the registry names the newer leader in the end.
fn check(seed: u64, after: Duration) -> Result<(), String> {
    let config = ClusterConfig::of(1, 2, (1, 1));
    let cluster = SimCluster::start_with(seed, config).ok_or("the cluster does not come up")?;
    let older = cluster.home(SHARD).ok_or("nobody keeps the shard")?;
    cluster.restart(older);
    cluster.pause(after);
    cluster.world.set_clogged(older, REGISTRY, true);
    let (_, newer) = cluster.move_log(SHARD).ok_or("it does not move")?;
    cluster.pause(Duration::from_secs(3));
    cluster.world.set_clogged(older, REGISTRY, false);
    cluster.pause(Duration::from_secs(3));
    let client = cluster.client();
    let map = cluster.run(async move { client.refresh_map().await }).map_err(|e| e.to_string())?;
    let named = map.shards.first().map(|shard| shard.address.clone()).unwrap_or_default();
    match named == endpoint(newer).to_string() {
        true => Ok(()),
        false => Err(format!("the registry names {named}, and {} leads", endpoint(newer))),
    }
}

/// What is wrong.
pub fn all() -> Vec<String> {
    let wrong = |step: u64| {
        let after = Duration::from_micros(step * 250);
        check(step, after).err().map(|what| format!("held back after {} µs: {what}", after.as_micros()))
    };
    (0..80).filter_map(wrong).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_registry_names_the_newer_leader() {
        assert_eq!(super::all(), Vec::<String>::new());
    }
}
