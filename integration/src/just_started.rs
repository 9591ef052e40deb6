//! A shard that has just started and cannot reach the registry yet, so that it knows its files but not where their blocks are: who
//! reads waits for a moment, and has every byte then.

use std::time::Duration;

use bytes::Bytes;
use clutch_client::{Client, ClientError};
use clutch_proto::InodeId;

use crate::{
    sim_cluster::{CLIENT, ClusterConfig, REGISTRY, SimCluster, shard_node},
    workload::attributes,
};

const FILE_BYTES: usize = 30_000;
const NAME: &str = "f";
/// How long the registry is away: longer than a start waits for it, shorter than the patience of anybody.
const AWAY: Duration = Duration::from_secs(10);

async fn write(client: &Client) -> Result<(), ClientError> {
    let bytes = vec![7u8; FILE_BYTES];
    client.write_file(InodeId::ROOT, &NAME.into(), attributes(), true, &mut &bytes[..]).await.map(drop)
}

async fn read(client: &Client) -> Result<usize, ClientError> {
    let found = client.lookup(InodeId::ROOT, &NAME.into()).await?;
    let id = InodeId::from_wire(found.target).ok_or_else(|| ClientError::Local("no such id".into()))?;
    let mut read = 0;
    client
        .read_file(id, &mut |part: Bytes| {
            read += part.len();
            Ok(())
        })
        .await?;
    Ok(read)
}

fn check(seed: u64) -> Result<(), String> {
    let config = ClusterConfig { flush_permille: 1000, ..ClusterConfig::of(1, 3, (2, 1)) };
    let cluster = SimCluster::start_with(seed, config).ok_or("the cluster does not come up")?;
    let client = cluster.client();
    let (writes, reads) = (client.clone(), client);
    cluster.run(async move { write(&writes).await }).map_err(|e| format!("write: {e}"))?;
    let shard = shard_node(0);
    for (from, to) in [(shard, REGISTRY), (REGISTRY, shard)] {
        cluster.world.set_blocked(from, to, true);
    }
    cluster.restart(shard);
    let (tell, told) = tokio::sync::oneshot::channel();
    cluster.world.node(CLIENT).spawn("reads", async move {
        tell.send(read(&reads).await).ok();
    });
    cluster.pause(AWAY);
    cluster.world.heal_network();
    match cluster.run(told) {
        Ok(Ok(FILE_BYTES)) => Ok(()),
        Ok(Ok(bytes)) => Err(format!("{bytes} of {FILE_BYTES} bytes are read")),
        Ok(Err(error)) => Err(format!("read: {error}")),
        Err(_) => Err("the reader is gone".into()),
    }
}

/// What is wrong.
pub fn all() -> Vec<String> {
    (1..=3).filter_map(|seed| check(seed).err().map(|what| format!("seed {seed}: {what}"))).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_shard_that_does_not_know_the_disks_says_so() {
        assert_eq!(super::all(), Vec::<String>::new());
    }
}
