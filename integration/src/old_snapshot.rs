//! A member that has lost everything, beside one whose newest checkpoint is older than what the others have trimmed: it is restored
//! from something that the log goes on from.

use std::time::Duration;

use clutch_client::Client;
use clutch_log::LogId;
use clutch_proto::InodeId;

use crate::{
    sim_cluster::{ClusterConfig, SimCluster},
    workload::attributes,
};

const SHARD: LogId = LogId { role: 3, number: 0 };
const PER_PART: u32 = 12;

fn work(cluster: &SimCluster, client: &Client, part: &'static str) -> Result<(), String> {
    let client = client.clone();
    let done = cluster.run(async move {
        for number in 0..PER_PART {
            client.make_directory(InodeId::ROOT, &format!("{part}{number}").into(), attributes()).await?;
        }
        Ok::<_, clutch_client::ClientError>(())
    });
    done.map_err(|error| format!("{part}: {error}"))
}

fn check(seed: u64) -> Result<(), String> {
    let config = ClusterConfig { flush_permille: 1000, replicas: 3, ..ClusterConfig::of(1, 2, (1, 1)) };
    let cluster = SimCluster::start_with(seed, config).ok_or("the cluster does not come up")?;
    let client = cluster.client();
    let [first, second, third] = cluster.members(SHARD)[..] else { return Err("not three members".into()) };
    work(&cluster, &client, "first")?;
    // The second and the third; then the third and the first: the second has what is too old.
    cluster.trim(SHARD, second);
    cluster.pause(Duration::from_secs(5));
    work(&cluster, &client, "second")?;
    cluster.trim(SHARD, third);
    cluster.pause(Duration::from_secs(5));
    work(&cluster, &client, "third")?;
    cluster.world.crash(first);
    cluster.lose_states(first);
    cluster.boot(first);
    cluster.pause(Duration::from_secs(20));
    work(&cluster, &client, "fourth")?;
    match cluster.recording.violations() {
        violations if violations.is_empty() => Ok(()),
        violations => Err(format!("{violations:?}")),
    }
}

/// What is wrong.
pub fn all() -> Vec<String> {
    let wrong = |seed| match std::panic::catch_unwind(|| check(seed)) {
        Ok(found) => found.err().map(|what| format!("seed {seed}: {what}")),
        Err(_) => Some(format!("seed {seed}: it panicked")),
    };
    (1..=8).filter_map(wrong).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn no_snapshot_is_offered_that_is_too_old() {
        assert_eq!(super::all(), Vec::<String>::new());
    }
}
