//! The CDC crashes at every moment of every kind of transaction, forward and back; the outcome is right and all
//! invariants hold.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use clutch_client::{Client, ClientError, FileAttributes};
use clutch_integration::{
    SimCluster,
    sim_cluster::{CDC, CLIENT},
};
use clutch_proto::{InodeId, types::Code};

const ATTRIBUTES: FileAttributes = FileAttributes { mode: 0o755, uid: 0, gid: 0, mtime: 0 };

fn name(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

/// `/x/dir/inner`, `/x/full/file`, `/x/empty`, `/x/file`, `/y`, `/y/taken`.
async fn prepare(client: &Client) {
    let mkdir = async |parent: InodeId, n: &str| {
        client.make_directory(parent, &name(n), ATTRIBUTES).await.expect("mkdir").id
    };
    let create = async |dir: InodeId, n: &str| {
        client.write_file(dir, &name(n), ATTRIBUTES, false, &mut &b"content"[..]).await.expect("creates");
    };
    let (x, y) = (mkdir(InodeId::ROOT, "x").await, mkdir(InodeId::ROOT, "y").await);
    let dir = mkdir(x, "dir").await;
    mkdir(dir, "inner").await;
    let full = mkdir(x, "full").await;
    create(full, "file").await;
    mkdir(x, "empty").await;
    create(x, "file").await;
    create(y, "taken").await;
    mkdir(y, "taken-dir").await;
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    MakeDirectory,
    MakeDirectoryTaken,
    RemoveDirectory,
    RemoveDirectoryFull,
    MoveFile,
    MoveFileOverFile,
    MoveFileOverDirectory,
    MoveDirectory,
    MoveDirectoryTaken,
    MoveDirectoryBelowItself,
}

use Kind::*;

const KINDS: [(Kind, Option<Code>); 10] = [
    (MakeDirectory, None),
    (MakeDirectoryTaken, Some(Code::Exists)),
    (RemoveDirectory, None),
    (RemoveDirectoryFull, Some(Code::NotEmpty)),
    (MoveFile, None),
    (MoveFileOverFile, None),
    (MoveFileOverDirectory, Some(Code::IsDirectory)),
    (MoveDirectory, None),
    (MoveDirectoryTaken, Some(Code::Exists)),
    (MoveDirectoryBelowItself, Some(Code::Loop)),
];

async fn act(client: &Client, kind: Kind) -> Result<(), ClientError> {
    let at = async |path: &str| client.resolve(path).await.expect("prepared");
    let y = at("/y").await.id;
    match kind {
        MakeDirectory => client.make_directory(y, &name("new"), ATTRIBUTES).await.map(drop),
        MakeDirectoryTaken => client.make_directory(y, &name("taken"), ATTRIBUTES).await.map(drop),
        RemoveDirectory => client.remove_directory(&at("/x/empty").await).await,
        RemoveDirectoryFull => client.remove_directory(&at("/x/full").await).await,
        MoveFile => client.rename(&at("/x/file").await, y, &name("new")).await.map(drop),
        MoveFileOverFile => client.rename(&at("/x/file").await, y, &name("taken")).await.map(drop),
        MoveFileOverDirectory => client.rename(&at("/x/file").await, y, &name("taken-dir")).await.map(drop),
        MoveDirectory => client.rename(&at("/x/dir").await, y, &name("new")).await.map(drop),
        MoveDirectoryTaken => client.rename(&at("/x/dir").await, y, &name("taken")).await.map(drop),
        MoveDirectoryBelowItself => {
            let inner = at("/x/dir/inner").await.id;
            client.rename(&at("/x/dir").await, inner, &name("new")).await.map(drop)
        }
    }
}

/// Which paths exist afterwards, and which do not.
fn expected(kind: Kind) -> (Vec<&'static str>, Vec<&'static str>) {
    match kind {
        MakeDirectory => (vec!["/y/new"], vec![]),
        RemoveDirectory => (vec![], vec!["/x/empty"]),
        MoveFile => (vec!["/y/new"], vec!["/x/file"]),
        MoveFileOverFile => (vec!["/y/taken"], vec!["/x/file"]),
        MoveDirectory => (vec!["/y/new/inner"], vec!["/x/dir"]),
        _ => (
            vec!["/x/file", "/x/full/file", "/x/dir/inner", "/x/empty", "/y/taken", "/y/taken-dir"],
            vec!["/y/new"],
        ),
    }
}

/// Crashes the CDC `after` the request was sent (never for `None`); how long the request took.
fn check(kind: Kind, refusal: Option<Code>, seed: u64, after: Option<Duration>) -> Duration {
    let cluster = Arc::new(SimCluster::start(seed, 2, 3));
    let client = cluster.client();
    let preparing = client.clone();
    cluster.run(async move { prepare(&preparing).await });
    let start = cluster.world.elapsed();
    if let Some(after) = after {
        let (crashing, clock) = (cluster.clone(), cluster.world.node(CLIENT).clock);
        cluster.world.node(CLIENT).spawn("crash", async move {
            clock.sleep(after).await;
            crashing.restart(CDC);
        });
    }
    let acting = client.clone();
    let result = cluster.run(async move { act(&acting, kind).await });
    let took = cluster.world.elapsed() - start;
    assert_eq!(
        result.as_ref().err().and_then(ClientError::code),
        refusal,
        "{kind:?} with a crash after {after:?}: {result:?}"
    );
    let (there, gone) = expected(kind);
    cluster.run(async move {
        for path in there {
            client
                .resolve(path)
                .await
                .unwrap_or_else(|e| panic!("{kind:?}, crash after {after:?}: {path}: {e}"));
        }
        for path in gone {
            let found = client.resolve(path).await;
            assert!(found.is_err_and(|e| e.is_not_found()), "{kind:?}, crash after {after:?}: {path} exists");
        }
    });
    cluster.fsck();
    took
}

#[test]
fn every_kind_survives_a_crash_at_every_moment() {
    for (kind, refusal) in KINDS {
        let took = check(kind, refusal, 1, None);
        // A message takes 50 to 500 µs and a commit 20 to 200 µs: steps of 100 µs fall into every state.
        let mut after = Duration::ZERO;
        let mut seed = 1;
        while after < took + Duration::from_millis(1) {
            check(kind, refusal, seed, Some(after));
            after += Duration::from_micros(100);
            seed += 1;
        }
    }
}

/// Deep moves that share no directory to wait for: only the walk can see that they would make a loop.
#[test]
fn two_deep_moves_cannot_make_a_loop_together() {
    for seed in 0..150 {
        let cluster = SimCluster::start(seed, 2, 3);
        let client = cluster.client();
        let outcome = cluster.run(async move {
            let mkdir = async |parent: InodeId, n: &str| {
                client.make_directory(parent, &name(n), ATTRIBUTES).await.expect("mkdir").id
            };
            let (p, q) = (mkdir(InodeId::ROOT, "p").await, mkdir(InodeId::ROOT, "q").await);
            let (a, b) = (mkdir(p, "a").await, mkdir(q, "b").await);
            let (a2, b2) = (mkdir(a, "a2").await, mkdir(b, "b2").await);
            let (at_a, at_b) =
                (client.resolve("/p/a").await.expect("there"), client.resolve("/q/b").await.expect("there"));
            let (n1, n2) = (name("x"), name("y"));
            tokio::join!(client.rename(&at_a, b2, &n1), client.rename(&at_b, a2, &n2))
        });
        cluster.fsck();
        let (first, second) = outcome;
        assert_eq!(
            u8::from(first.is_ok()) + u8::from(second.is_ok()),
            1,
            "seed {seed}: {first:?} {second:?}"
        );
        let refused = first.err().or(second.err()).and_then(|e| e.code());
        assert_eq!(refused, Some(Code::Loop), "seed {seed}");
    }
}

#[test]
fn two_moves_cannot_make_a_loop_together() {
    for seed in 0..40 {
        let cluster = SimCluster::start(seed, 2, 3);
        let client = cluster.client();
        cluster.run(async move {
            let root = InodeId::ROOT;
            let a = client.make_directory(root, &name("a"), ATTRIBUTES).await.expect("mkdir").id;
            let b = client.make_directory(root, &name("b"), ATTRIBUTES).await.expect("mkdir").id;
            let (at_a, at_b) =
                (client.resolve("/a").await.expect("there"), client.resolve("/b").await.expect("there"));
            let (n1, n2) = (name("into-b"), name("into-a"));
            let (first, second) = tokio::join!(client.rename(&at_a, b, &n1), client.rename(&at_b, a, &n2));
            assert_eq!(u8::from(first.is_ok()) + u8::from(second.is_ok()), 1, "{first:?} {second:?}");
        });
        cluster.fsck();
    }
}

/// A walk to a deep destination takes several entries; the CDC crashes somewhere on it.
#[test]
fn a_move_into_the_deep_survives_a_crash_on_its_way() {
    const DEPTH: usize = 150;
    let mut interrupted = 0;
    for round in 0..12 {
        let cluster = Arc::new(SimCluster::start(round, 2, 3));
        let client = cluster.client();
        let (preparing, crashing) = (client.clone(), cluster.clone());
        let clock = cluster.world.node(CLIENT).clock;
        interrupted += cluster.run(async move {
            let mkdir = async |parent: InodeId, n: &str| {
                preparing.make_directory(parent, &name(n), ATTRIBUTES).await.expect("mkdir").id
            };
            let moved = mkdir(InodeId::ROOT, "moved").await;
            mkdir(moved, "inner").await;
            let top = mkdir(InodeId::ROOT, "top").await;
            let mut deepest = top;
            for _ in 0..DEPTH {
                deepest = mkdir(deepest, "d").await;
            }
            let at = preparing.resolve("/moved").await.expect("there");
            let has_ended = AtomicBool::new(false);
            let crash = async {
                // A step takes some 500 µs: the walk is under way for about 80 ms.
                clock.sleep(Duration::from_millis(8 * round)).await;
                crashing.restart(CDC);
                !has_ended.load(Ordering::Relaxed)
            };
            let into = name("moved");
            let rename = async {
                let moved = preparing.rename(&at, deepest, &into).await;
                has_ended.store(true, Ordering::Relaxed);
                moved
            };
            let (moved, is_interrupted) = tokio::join!(rename, crash);
            moved.expect("moves");
            let path = format!("/top{}/moved/inner", "/d".repeat(DEPTH));
            preparing.resolve(&path).await.expect("is where it went");
            assert!(preparing.resolve("/moved").await.is_err_and(|e| e.is_not_found()));
            // And its old ancestor cannot go below it.
            let at = preparing.resolve("/top").await.expect("there");
            let inner = preparing.resolve(&path).await.expect("there").id;
            let refused = preparing.rename(&at, inner, &name("loop")).await;
            assert_eq!(refused.expect_err("a loop").code(), Some(Code::Loop));
            u32::from(is_interrupted)
        });
        cluster.fsck();
    }
    assert!(interrupted >= 4, "only {interrupted} crashes met the move");
}
