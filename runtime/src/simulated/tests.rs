//! The simulated runtime against itself: determinism, crashes, faults.

use std::{path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use clutch_proto::Parts;

use super::*;
use crate::{Answers, Disk as _, Endpoint, Handled, Handler, Lane, PeerStream, SHARED_MOMENTS, ambient};

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

/// Sends back what comes on streams.
struct Returns(Runtime);

impl Handler for Returns {
    fn handle(&self, _: Bytes, _: Answers) -> BoxFuture<Handled> {
        Box::pin(async { Handled::default() })
    }

    fn accept(&self, mut stream: PeerStream) {
        self.0.spawn("returns", async move {
            while let Some(frame) = stream.receiver.recv().await {
                if stream.sender.send(frame).await.is_err() {
                    return;
                }
            }
        });
    }
}

/// Opens a stream and sends numbers on it: those that came back before it broke, if it did.
fn sent(world: &World, loss_permille: u32, cut_after: Option<u64>) -> Vec<u64> {
    world.set_faults(Faults { loss_permille, delay_us_max: 5_000, ..Faults::default() });
    let (server, client) = (world.node(NodeId(1)), world.node(NodeId(2)));
    let serving = server.clone();
    server.spawn("serve", async move {
        let handler = Arc::new(Returns(serving.clone()));
        let _listening = serving.network.listen(&"returns".into(), handler).await.expect("a free name");
        std::future::pending::<()>().await;
    });
    let shared = world.shared.clone();
    let task = async move {
        let mut stream = loop {
            match client.network.open(&"returns".into()).await {
                Ok(stream) => break stream,
                Err(_) => client.clock.sleep(Duration::from_millis(10)).await,
            }
        };
        let sender = stream.sender.clone();
        client.spawn("send", async move {
            for number in 0..500_u64 {
                if cut_after == Some(number) {
                    shared.network.lock().blocked.insert((NodeId(2), NodeId(1)));
                }
                if sender.send(Bytes::copy_from_slice(&number.to_le_bytes())).await.is_err() {
                    return;
                }
            }
        });
        let mut back = Vec::new();
        while back.len() < 500 {
            let Some(frame) = stream.receiver.recv().await else { break };
            back.push(u64::from_le_bytes(frame[..].try_into().expect("eight bytes")));
        }
        back
    };
    world.run(NodeId(2), Duration::from_secs(600), task).expect("it ends or breaks")
}

#[test]
fn streams_keep_their_order_and_break_for_good() {
    let in_order = |back: &[u64]| back.iter().copied().eq(0..back.len() as u64);
    let (mut whole, mut broken) = (0, 0);
    for seed in 0..40 {
        let calm = sent(&World::new(seed), 0, None);
        assert!(calm.len() == 500 && in_order(&calm), "seed {seed}: {} came", calm.len());
        let lossy = sent(&World::new(seed), 5, None);
        assert!(in_order(&lossy), "seed {seed}: {lossy:?}");
        whole += usize::from(lossy.len() == 500);
        broken += usize::from(lossy.len() < 500);
        let cut = sent(&World::new(seed), 0, Some(200));
        assert!(in_order(&cut) && cut.len() <= 200, "seed {seed}: {} came back over a cut", cut.len());
    }
    assert!(whole > 0 && broken > 0, "{whole} whole and {broken} broken");
}

#[test]
fn what_is_spawned_without_a_runtime_belongs_to_who_spawned_it() {
    let world = World::new(3);
    let ticks: Arc<Mutex<BTreeMap<u32, u64>>> = Arc::default();
    for number in [1, 2] {
        let (ticks, node) = (ticks.clone(), world.node(NodeId(number)));
        let own = node.clone();
        node.spawn("starts", async move {
            assert_eq!(ambient::monotonic(), own.clock.monotonic(), "each node has a clock of its own");
            ambient::spawn("ticks", async move {
                loop {
                    ambient::sleep(Duration::from_secs(1)).await;
                    *ticks.lock().entry(number).or_default() += 1;
                }
            });
        });
    }
    while world.step_until(Duration::from_millis(10_500)) {}
    world.kill(NodeId(1));
    while world.step_until(Duration::from_millis(20_500)) {}
    assert_eq!(*ticks.lock(), BTreeMap::from([(1, 10), (2, 20)]));
    let draw = |seed| {
        let world = World::new(seed);
        world.run(NodeId(1), Duration::from_secs(1), async { ambient::random() }).expect("draws")
    };
    assert_eq!(draw(4), draw(4));
    assert_ne!(draw(4), draw(5));
}

#[test]
fn a_thread_that_ends_drops_the_world_that_it_keeps() {
    thread_local! {
        static KEPT: std::cell::RefCell<Option<World>> = const { std::cell::RefCell::new(None) };
    }
    let keeper = std::thread::spawn(|| {
        // Before the thread knows of any node, so that it forgets them first.
        KEPT.with_borrow_mut(|kept| {
            let world = World::new(1);
            let node = world.node(NodeId(1));
            let asleep = node.clock.sleep(Duration::from_secs(3600));
            node.spawner.spawn("asleep", asleep);
            world.run(NodeId(1), Duration::from_secs(1), async { ambient::monotonic() }).expect("ends");
            *kept = Some(world);
        });
    });
    keeper.join().expect("ends");
}

#[test]
fn who_need_not_be_punctual_wakes_with_the_others() {
    let world = World::new(3);
    let runtime = world.node(NodeId(0));
    let woken = world.run(NodeId(0), Duration::from_secs(60), async move {
        let (told, mut heard) = tokio::sync::mpsc::unbounded_channel();
        for ms in [0u64, 1, 40, 99, 100, 101, 250] {
            let (clock, told, wait) = (runtime.clock.clone(), told.clone(), Duration::from_millis(ms));
            runtime.spawn("waits", async move {
                clock.sleep(Duration::from_micros(700 * ms)).await;
                let began = clock.monotonic();
                clock.sleep_about(wait).await;
                let late = clock.monotonic() - began - wait;
                let _ = told.send((clock.monotonic(), late));
            });
        }
        drop(told);
        let mut woken = Vec::new();
        while let Some(one) = heard.recv().await {
            woken.push(one);
        }
        woken
    });
    let woken = woken.expect("it ends");
    assert_eq!(woken.len(), 7);
    for (at, late) in woken {
        let past = at.as_nanos() % SHARED_MOMENTS.as_nanos();
        assert!(past < 1_000_000, "{past} ns behind a shared moment");
        assert!(late < SHARED_MOMENTS + Duration::from_millis(1), "{late:?} late");
    }
}
