//! Disks that are lost are rebuilt from the others, and what is damaged or missing is found and comes back.

use std::collections::BTreeSet;

use bytes::Bytes;
use clutch_client::{Client, FileAttributes};
use clutch_client_maintenance::{
    collector::{CollectOptions, collect},
    fsck,
    heal::{self, HealOptions, Lost, Pace},
};
use clutch_integration::{
    SimCluster, healing,
    sim_cluster::{ClusterConfig, disk_node},
};
use clutch_proto::{
    InodeId,
    registry::{SetServiceFlags, registry_request},
};
use clutch_shard::{FLAG_DRAIN, FLAG_GONE, FLAG_NO_WRITE};

/// More than a span needs, so that there is somewhere to go.
const DISKS: u32 = 6;

fn noise(length: u64, seed: u64) -> Vec<u8> {
    (0..length).map(|i| ((i + 1).wrapping_mul(seed | 1).wrapping_mul(0x9e37_79b9) >> 13) as u8).collect()
}

/// Files of all sizes, one of which is shared in part by another.
fn files() -> Vec<(String, Vec<u8>)> {
    let sizes = [3000, 9000, 20_000, 70_000, 300_000, 2_500_000];
    (0..24).map(|n| (format!("f{n}"), noise(sizes[n % sizes.len()] + n as u64, n as u64))).collect()
}

async fn put_all(client: &Client) {
    for (name, bytes) in files() {
        let attributes = FileAttributes { mode: 0o644, ..FileAttributes::default() };
        let name = Bytes::from(name);
        client.write_file(InodeId::ROOT, &name, attributes, true, &mut &bytes[..]).await.expect("writes");
    }
}

async fn read_all(client: &Client) {
    for (name, bytes) in files() {
        let at = client.resolve(format!("/{name}")).await.expect("resolves");
        let mut read = Vec::new();
        let mut sink = |part: Bytes| {
            read.extend_from_slice(&part);
            Ok(())
        };
        client.read_file(at.id, &mut sink).await.unwrap_or_else(|e| panic!("read {name}: {e}"));
        assert!(read == bytes, "{name} has other bytes");
    }
}

async fn flag(client: &Client, service_id: u64, flags: u32) {
    let op = SetServiceFlags { service_id, flags };
    client.registry(registry_request::Op::SetServiceFlags(op)).await.expect("sets");
}

async fn is_clean(client: &Client) {
    let checked = fsck::check(client, &mut |_, _| {}).await.expect("checks");
    assert!(checked.violations.is_empty(), "{:?}", checked.violations);
}

/// Two of four blocks may be lost.
fn cluster_of(seed: u64) -> SimCluster {
    SimCluster::start_with(seed, ClusterConfig::of(2, DISKS, (2, 2))).expect("serves")
}

fn run<T: Send + 'static>(cluster: &SimCluster, work: impl Future<Output = T> + Send + 'static) -> T {
    cluster.run(work)
}

#[test]
fn a_disk_that_is_gone_is_rebuilt_from_the_others() {
    let cluster = cluster_of(21);
    let client = cluster.client();
    let services = cluster.service_ids();
    let (c, gone, next) = (client.clone(), services[0], services[1]);
    run(&cluster, async move { put_all(&c).await });
    cluster.world.crash(disk_node(0));
    let c = client.clone();
    let placed = run(&cluster, async move {
        let emptied = BTreeSet::from([gone]);
        let (lost, pace) = (Lost { emptied: emptied.clone(), ..Lost::default() }, Pace::of(0));
        let looking = HealOptions::default();
        let before = heal::pass(&c, &lost, looking, &pace, &mut |_| {}).await.expect("looks");
        assert!(before.reduced + before.none > 0 && before.unreadable == 0, "{before:?}");
        flag(&c, gone, FLAG_NO_WRITE | FLAG_DRAIN).await;
        let map = c.refresh_map().await.expect("a map");
        assert_eq!(heal::to_be_emptied(&map), emptied);
        let healed =
            heal::empty(&c, &lost, &heal::all_slots_backwards(), looking, (&pace, &|| true), &mut |_| {})
                .await
                .expect("empties");
        assert_eq!((healed.spans(), healed.failures), (0, Vec::new()));
        assert_eq!(healed.moved, before.services[&gone].blocks);
        assert_eq!(healed.moved_bytes, before.services[&gone].bytes);
        flag(&c, gone, FLAG_NO_WRITE | FLAG_DRAIN | FLAG_GONE).await;
        let after = heal::pass(&c, &lost, looking, &pace, &mut |_| {}).await.expect("looks");
        assert!(after.is_whole(), "{after:?}");
        assert_eq!((after.full, after.physical_bytes), (before.spans(), before.physical_bytes));
        let checking = HealOptions { check: true, ..looking };
        let checked = heal::pass(&c, &Lost::default(), checking, &pace, &mut |_| {}).await.expect("checks");
        assert_eq!((checked.damaged, checked.is_whole()), (0, true), "{:?}", checked.failures);
        assert_eq!(checked.checked, after.services.values().map(|load| load.blocks).sum::<u64>());
        is_clean(&c).await;
        after.services
    });
    assert!(!placed.contains_key(&gone));
    // Whatever was on the first disk is on others now: another one can be lost.
    assert!(placed[&next].blocks > 0);
    cluster.world.crash(disk_node(1));
    run(&cluster, async move {
        read_all(&client).await;
        // What the blocks took the place of goes without the disk.
        let done = collect(&client, CollectOptions { eager: true, ..CollectOptions::default() }).await;
        done.expect("collects");
    });
}

#[test]
fn what_is_not_where_it_should_be_is_found_and_written_elsewhere() {
    let cluster = cluster_of(22);
    let client = cluster.client();
    let c = client.clone();
    run(&cluster, async move { put_all(&c).await });
    // As if an empty disk had been labelled in the place of the one that was there.
    cluster.world.crash(disk_node(2));
    cluster.world.disk(disk_node(2)).wipe();
    cluster.label(2);
    cluster.boot(disk_node(2));
    run(&cluster, async move {
        let checking = HealOptions { check: true, repair: true, ..HealOptions::default() };
        let (none, pace) = (Lost::default(), Pace::of(0));
        let found = heal::pass(&client, &none, checking, &pace, &mut |_| {}).await.expect("checks");
        assert!(found.damaged > 0 && found.moved == found.damaged, "{found:?}");
        let again = heal::pass(&client, &none, checking, &pace, &mut |_| {}).await.expect("checks");
        assert_eq!((again.damaged, again.moved, again.is_whole()), (0, 0, true), "{again:?}");
        assert_eq!(again.spans(), found.spans());
        let tree =
            heal::pass_of(&client, InodeId::ROOT, &none, checking, &pace, &mut |_| {}).await.expect("checks");
        assert_eq!((tree.spans(), tree.is_whole()), (again.spans(), true), "{tree:?}");
        read_all(&client).await;
        is_clean(&client).await;
    });
}

#[test]
fn nodes_look_after_what_is_stored_by_themselves() {
    // More of them: HEALING_SEEDS=1000.
    let seeds = std::env::var("HEALING_SEEDS").map_or(Ok(16), |seeds| seeds.parse::<u64>());
    assert_eq!(healing::of_seeds(1..=seeds.expect("a number")), Vec::<String>::new());
}
