//! Bytes as a client sends them, at every node of a cluster: registry, CDC, shard and block service. The first byte
//! chooses the node. Whatever comes, the cluster must answer, and go on answering others.
#![no_main]

use std::{cell::RefCell, time::Duration};

use bytes::Bytes;
use clutch_integration::{SimCluster, sim_cluster::{CLIENT, disk_node}};
use clutch_proto::InodeId;
use clutch_runtime::{Lane, simulated::NodeId};
use libfuzzer_sys::fuzz_target;

thread_local! {
    static CLUSTER: RefCell<Option<(SimCluster, u64)>> = const { RefCell::new(None) };
}

fuzz_target!(|data: &[u8]| {
    let Some((choice, data)) = data.split_first() else { return };
    CLUSTER.with_borrow_mut(|slot| {
        // A fresh cluster now and then, so that what grew does not slow it down.
        if slot.as_ref().is_none_or(|(_, used)| *used >= 2000) {
            *slot = Some((SimCluster::start(1, 1, 3), 0));
        }
        let (cluster, used) = slot.as_mut().expect("made above");
        *used += 1;
        let node = match choice & 3 {
            0 => NodeId(1),
            1 => NodeId(2),
            2 => NodeId(10),
            _ => disk_node(0),
        };
        let runtime = cluster.world.node(CLIENT);
        let request = Bytes::copy_from_slice(data);
        let to = format!("node{}", node.0).as_str().into();
        let answer = cluster.world.run(CLIENT, Duration::from_secs(100), async move {
            runtime.network.call(&to, Lane::Metadata, request.into(), 0, Duration::from_secs(50)).await
        });
        // A transaction that waits for a shard that refuses for ever may keep its caller waiting; nothing else may.
        assert!(answer.is_some_and(|a| a.is_ok()) || choice & 3 == 1, "no answer");
        if *used % 64 == 0 {
            let client = cluster.client();
            let stat = cluster.world.run(CLIENT, Duration::from_secs(100), async move { client.stat(InodeId::ROOT).await });
            assert!(stat.is_some_and(|s| s.is_ok()), "others are not served any more");
        }
    });
});
