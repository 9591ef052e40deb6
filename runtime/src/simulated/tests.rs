//! The simulated runtime against itself: determinism, crashes, faults.

use std::{path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use clutch_proto::Parts;

use super::*;
use crate::{Answers, Disk as _, Endpoint, Handled, Handler, Lane};

struct Echo(Runtime);

impl Handler for Echo {
    fn handle(&self, request: Bytes, _: Answers) -> BoxFuture<Handled> {
        let runtime = self.0.clone();
        Box::pin(async move {
            runtime.clock.sleep(Duration::from_micros(runtime.random.below(100))).await;
            Handled { answer: request.into(), ..Handled::default() }
        })
    }
}

fn busy_world(seed: u64) -> (u64, u64) {
    let world = World::new(seed);
    world.set_faults(Faults { loss_permille: 100, duplicate_permille: 200, ..Faults::default() });
    let (server, client) = (world.node(NodeId(1)), world.node(NodeId(2)));
    let answered = world.run(NodeId(2), Duration::from_secs(60), async move {
        let at = Endpoint::from("echo");
        let _listening = server.network.listen(&at, Arc::new(Echo(server.clone()))).await.expect("free name");
        let mut answered = 0;
        for i in 0..200u64 {
            let request = Bytes::copy_from_slice(&i.to_le_bytes());
            if let Ok(reply) = client
                .network
                .call(&at, Lane::Metadata, request.clone().into(), 0, Duration::from_millis(50))
                .await
            {
                assert_eq!(reply, request);
                answered += 1;
            }
        }
        answered
    });
    assert!((120..200).contains(&answered.expect("ends")));
    world.trace()
}

#[test]
fn one_seed_one_trace() {
    assert_eq!(busy_world(7), busy_world(7));
    assert_ne!(busy_world(7), busy_world(8));
}

#[test]
fn unsynced_bytes_and_names_are_lost_in_a_crash() {
    let (mut names, mut lengths) = (std::collections::BTreeSet::new(), std::collections::BTreeSet::new());
    for seed in 0..40 {
        let world = World::new(seed);
        let disk = world.disk(NodeId(0));
        let (kept, unsynced) = (Path::new("d/kept"), Path::new("d/unsynced"));
        let file = disk.open(kept, true).expect("create");
        file.write_at(b"synced", 0).expect("write");
        file.sync().expect("sync");
        disk.sync_dir(Path::new("d")).expect("sync names");
        file.write_at(&[b'x'; 4096], 6).expect("write");
        disk.open(unsynced, true).expect("create").sync().expect("sync");
        world.crash(NodeId(0));
        let bytes = disk.read(kept).expect("read");
        assert_eq!(&bytes[..6], b"synced");
        names.insert(disk.exists(unsynced));
        lengths.insert(bytes.len());
    }
    assert_eq!(names.len(), 2, "an unsynced name is lost sometimes and survives sometimes");
    assert!(lengths.len() > 2 && lengths.contains(&6), "lost, torn and whole: {lengths:?}");
}

#[test]
fn a_power_cut_ends_every_operation_until_the_crash() {
    let world = World::new(5);
    let disk = world.disk(NodeId(0));
    disk.cut_power_after(1);
    let file = disk.open(Path::new("d/f"), true).expect("one operation is left");
    assert!(file.write_at(b"x", 0).is_err() && disk.is_dead());
    world.crash(NodeId(0));
    assert!(!disk.is_dead());
    disk.open(Path::new("d/f"), true).expect("works again");
}

#[test]
fn a_paused_node_goes_on_where_it_was() {
    let world = World::new(9);
    let (paused, other) = (world.node(NodeId(1)), world.node(NodeId(2)));
    world.pause(NodeId(1));
    let done = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let flag = done.clone();
    paused.spawn("sleeper", async move { flag.store(true, std::sync::atomic::Ordering::Relaxed) });
    world.run(
        NodeId(2),
        Duration::from_secs(9),
        async move { other.clock.sleep(Duration::from_secs(1)).await },
    );
    assert!(!done.load(std::sync::atomic::Ordering::Relaxed));
    world.resume(NodeId(1));
    while world.step_until(Duration::from_secs(5)) {}
    assert!(done.load(std::sync::atomic::Ordering::Relaxed));
}

#[test]
fn a_crashed_node_answers_nothing() {
    let world = World::new(3);
    let (server, client) = (world.node(NodeId(1)), world.node(NodeId(2)));
    let at = Endpoint::from("echo");
    let listen_at = at.clone();
    world.run(NodeId(1), Duration::from_secs(1), async move {
        let listening =
            server.network.listen(&listen_at, Arc::new(Echo(server.clone()))).await.expect("free");
        std::mem::forget(listening);
    });
    world.crash(NodeId(1));
    let result = world.run(NodeId(2), Duration::from_secs(5), async move {
        client.network.call(&at, Lane::Metadata, Parts::default(), 0, Duration::from_secs(1)).await
    });
    assert!(result.expect("ends").expect_err("refused").certainly_no_effect());
}

#[test]
fn monotonic_clocks_drift_and_nobody_wakes_early_by_his_own() {
    let world = World::new(7);
    let mut rates = std::collections::BTreeSet::new();
    for node in 0..20 {
        let (runtime, began) = (world.node(NodeId(node)), world.elapsed());
        let slept = world.run(NodeId(node), Duration::from_secs(600), async move {
            let begin = runtime.clock.monotonic();
            for nanos in [1, 999, 1_000_003, 100_000_000_000] {
                let before = runtime.clock.monotonic();
                runtime.clock.sleep(Duration::from_nanos(nanos)).await;
                assert!(runtime.clock.monotonic() - before >= Duration::from_nanos(nanos), "{nanos} ns");
            }
            runtime.clock.monotonic() - begin
        });
        let slept = slept.expect("it ends").as_nanos() as i64;
        let ppm = (slept - (world.elapsed() - began).as_nanos() as i64) / 100_000;
        assert!(ppm.abs() <= DRIFT_PPM_MAX + 1, "node {node}: {ppm}");
        assert!(node != 0 || ppm == 0, "the driver's clock is the world's");
        rates.insert(ppm);
    }
    assert!(rates.len() > 10, "{rates:?}");
}
