//! Make a directory, create a file, read it back: through registry, CDC and shards, in both runtimes.

use bytes::Bytes;
use clutch_client::{Client, FileAttributes};
use clutch_integration::SimCluster;
use clutch_proto::InodeId;
use clutch_server::up::{Up, UpConfig};

async fn story(client: Client) -> Vec<u8> {
    let attributes = FileAttributes { mode: 0o755, ..FileAttributes::default() };
    let mut at = InodeId::ROOT;
    for name in ["a", "b", "c"] {
        at = client
            .make_directory(at, &Bytes::from_static(name.as_bytes()), attributes)
            .await
            .expect("mkdir")
            .id;
    }
    let name = Bytes::from_static(b"file");
    let made =
        client.write_file(at, &name, attributes, false, &mut &b"first light"[..]).await.expect("creates");
    assert_eq!(client.resolve("/a/b/c/file").await.expect("resolves").id, made.id);
    // A large file goes through spans and the disks.
    let large: Vec<u8> = (0..3_000_000u32).map(|i| (i * 7 % 253) as u8).collect();
    let name = Bytes::from_static(b"large");
    let id = client.write_file(at, &name, attributes, false, &mut &large[..]).await.expect("writes").id;
    assert_eq!(client.read_range(id, 1_000_000, 5000).await.expect("reads"), large[1_000_000..1_005_000]);
    let mut back = Vec::new();
    let mut sink = |bytes: Bytes| {
        back.extend_from_slice(&bytes);
        Ok(())
    };
    client.read_file(id, &mut sink).await.expect("reads");
    assert_eq!(back, large);
    let mut small = Vec::new();
    let mut sink = |bytes: Bytes| {
        small.extend_from_slice(&bytes);
        Ok(())
    };
    client.read_file(made.id, &mut sink).await.expect("reads");
    small
}

fn simulated(seed: u64) -> (u64, u64) {
    let cluster = SimCluster::start(seed, 2, 4);
    let client = cluster.client();
    assert_eq!(cluster.run(story(client)), b"first light");
    cluster.fsck();
    cluster.world.trace()
}

#[test]
fn simulated_and_the_same_seed_gives_the_same_trace() {
    let first = simulated(11);
    assert_eq!(first, simulated(11));
    assert_ne!(first, simulated(12));
}

#[tokio::test(flavor = "multi_thread")]
async fn in_production_form() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let config = || UpConfig {
        dir: dir.path().join("cluster"),
        listen: "127.0.0.1:0".into(),
        shards: Some(2),
        disks: Some(6),
        policy: None,
        segment_bytes_max: 64 << 20,
        lifetimes: clutch_shard::Lifetimes::default(),
        clock_skew_ms_max: clutch_proto::limits::CLOCK_SKEW_MS_MAX,
        accept_clock: false,
        advertise: None,
        reserve_bytes: None,
        retain_log: None,
        collect_pause: None,
        heal: clutch_server::healer::HealSettings::default(),
    };
    let runtime = clutch_runtime::production::runtime();
    let up = Up::start(runtime.clone(), config()).await.expect("starts");
    assert_eq!(story(up.node().client().clone()).await, b"first light");
    let refused = Up::start(runtime.clone(), config()).await.err().expect("a second one is refused");
    assert!(refused.to_string().contains("in use"), "{refused:#}");
    up.stop().await;
}
