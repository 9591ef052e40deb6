//! Logs run again: from a running cluster, from a stopped one, from a checkpoint; damage is found.

mod support;

use std::{path::Path, process::Command};

use bytes::Bytes;
use clutch_state::{Store as _, Table, View as _};
use clutch_state_rocks::{RocksStore, SharedMemory};
use support::{CLUTCH, Cluster};

fn work(cluster: &Cluster, round: u32) {
    cluster.ok(&["fs", "mkdir", "-p", &format!("/r{round}/a/b")]);
    for i in 0..10 {
        cluster.ok(&["fs", "touch", &format!("/r{round}/a/f{i}")]);
    }
    cluster.ok(&["fs", "mv", &format!("/r{round}/a"), &format!("/r{round}/c")]);
    cluster.ok(&["fs", "rm", &format!("/r{round}/c/f1")]);
}

fn offline(dir: &Path, arguments: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(CLUTCH)
        .args(["log", "replay", "--dir"])
        .arg(dir)
        .args(arguments)
        .output()
        .expect("runs");
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8_lossy(&text).into_owned())
}

fn copy_tree(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-r").arg(from).arg(to).status().expect("cp runs");
    assert!(copied.success());
}

#[test]
fn every_log_replays_to_the_hash_of_its_live_replica() {
    let temp = tempfile::tempdir().expect("temporary directory");
    let mut cluster = Cluster::start(&temp.path().join("c"), &["--shards", "2"]);
    work(&cluster, 0);
    for which in [&["--shard", "0"][..], &["--shard", "1"], &["--cdc"], &["--registry"], &["--all"]] {
        let report = cluster.json(&[&["log", "replay", "--verify", "--json"], which].concat());
        assert_eq!(report["verified"], true, "{which:?}: {report:#}");
    }
    cluster.fails(1, &["log", "replay", "--shard", "7", "--verify"]);
    // To an earlier position, and to a time.
    let whole = cluster.json(&["log", "replay", "--cdc", "--json"]);
    let position = whole["logs"][0]["position"].as_u64().expect("a position") - 3;
    let part = cluster.json(&[
        "log",
        "replay",
        "--cdc",
        "--verify",
        "--json",
        "--to-position",
        &position.to_string(),
    ]);
    assert_eq!(part["verified"], true, "{part:#}");
    let time = part["logs"][0]["time"].to_string();
    let by_time = cluster.json(&["log", "replay", "--cdc", "--json", "--to-time", &time]);
    assert_eq!(by_time["logs"][0]["hash"], part["logs"][0]["hash"]);

    assert!(cluster.stop());
    let dir = cluster.dir.clone();
    let (code, text) = offline(&dir, &["--all", "--verify"]);
    assert_eq!(code, Some(0), "{text}");
    assert_eq!(text.matches("equal to the live replica").count(), 4, "{text}");

    // After kill -9 the state may be older than the log; what was flushed is compared.
    cluster.boot();
    work(&cluster, 1);
    cluster.kill();
    let (code, text) = offline(&dir, &["--all", "--verify"]);
    assert_eq!(code, Some(0), "{text}");
    cluster.boot();
    cluster.fsck();
}

#[test]
fn a_trimmed_log_replays_from_the_oldest_checkpoint() {
    let temp = tempfile::tempdir().expect("temporary directory");
    let mut cluster = Cluster::start(&temp.path().join("c"), &["--shards", "1", "--segment-mib", "1"]);
    work(&cluster, 0);
    let refused = cluster.fails(1, &["log", "trim", "--shard", "0"]);
    assert!(refused.contains("checkpoint"), "{refused}");
    cluster.ok(&["log", "checkpoint", "--all"]);
    // Segments are removed as wholes: enough log to fill some is written.
    cluster.ok(&[
        "bench",
        "meta",
        "--ops",
        "create,unlink",
        "--files",
        "20000",
        "--clients",
        "2",
        "--depth",
        "256",
    ]);
    cluster.ok(&["log", "checkpoint", "--all"]);
    assert!(cluster.stop());
    cluster.boot();
    cluster.ok(&["log", "trim", "--all"]);
    work(&cluster, 1);
    let report = cluster.json(&["log", "replay", "--all", "--verify", "--json"]);
    assert_eq!(report["verified"], true, "{report:#}");
    let shard = &report["logs"].as_array().expect("logs")[2];
    assert!(
        shard["from_checkpoint"].as_u64() > Some(0),
        "the log is not long enough to be trimmed: {report:#}"
    );
    let said = cluster.ok(&["log", "replay", "--shard", "0", "--verify"]);
    assert!(said.contains("from the checkpoint at"), "{said}");
    assert!(cluster.stop());
    let (code, text) = offline(&cluster.dir, &["--shard", "0", "--verify"]);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("from the checkpoint at"), "{text}");
}

#[test]
fn damage_is_reported_with_its_place() {
    let temp = tempfile::tempdir().expect("temporary directory");
    let mut cluster = Cluster::start(&temp.path().join("c"), &["--shards", "1"]);
    work(&cluster, 0);
    assert!(cluster.stop());
    let segment = Path::new("log").join("0000000000000001.log");
    let len = std::fs::metadata(cluster.dir.join(&segment)).expect("there").len() as usize;
    for at in [100, len / 3, len / 2, len - 60, len - 1] {
        let copy = temp.path().join(format!("copy{at}"));
        copy_tree(&cluster.dir, &copy);
        let mut image = std::fs::read(copy.join(&segment)).expect("reads");
        image[at] ^= 1;
        std::fs::write(copy.join(&segment), image).expect("writes");
        let (code, text) = offline(&copy, &["--all", "--verify"]);
        assert_eq!(code, Some(1), "a flip at {at} of {len}: {text}");
        assert!(text.contains("corrupt at position"), "{text}");
        std::fs::remove_dir_all(&copy).expect("removed");
    }

    // A row that was changed on disk behind our back.
    let path = cluster.dir.join("state/shard-000/db");
    {
        let store = RocksStore::open(&path, &SharedMemory::new(8 << 20, 8 << 20)).expect("opens");
        let rows = store.scan(Table(64), &[], &[], 10).expect("scans");
        let (key, value) = rows.last().expect("an inode").clone();
        let mut changed = value.to_vec();
        changed[1] ^= 1;
        store.write(vec![(Table(64).stored_key(&key), Some(Bytes::from(changed)))]).expect("writes");
        store.flush().expect("flushes");
    }
    cluster.boot();
    let report = cluster.json(&["fsck", "--rescan", "--json"]);
    assert_eq!(report["clean"], false, "{report:#}");
    assert!(report["violations"].to_string().contains("changed on disk"), "{report:#}");
}

#[test]
fn a_log_that_is_kept_for_a_while_stays_short_and_replays() {
    let temp = tempfile::tempdir().expect("temporary directory");
    let arguments = ["--shards", "1", "--segment-mib", "1", "--retain-log", "2s", "--collect-every-s", "0"];
    let mut cluster = Cluster::start(&temp.path().join("c"), &arguments);
    let tree = temp.path().join("tree");
    std::fs::create_dir(&tree).expect("made");
    for number in 0..2000 {
        std::fs::write(tree.join(number.to_string()), support::noise(200, number)).expect("written");
    }
    let state = |cluster: &Cluster| {
        let status = cluster.json(&["status", "--json"]);
        let replicas = status["replicas"].as_array().expect("replicas").clone();
        let shard = replicas.into_iter().find(|replica| replica["name"] == "shard 0").expect("a shard");
        let number = |name: &str| shard[name].as_u64().or_else(|| shard[name].as_str()?.parse().ok());
        let checkpoints = shard["checkpoints"].as_array().expect("checkpoints").len();
        (number("log_first").expect("where the log begins"), checkpoints)
    };
    // Until its beginning is gone twice, so that checkpoints were removed, too.
    let mut rounds = 0;
    let (mut first, mut begins) = (1, 0);
    while begins < 2 {
        assert!(rounds < 200, "the log was not trimmed");
        cluster.ok(&["fs", "put", "-r", tree.to_str().expect("text"), &format!("/tree{rounds}")]);
        rounds += 1;
        let (now, checkpoints) = state(&cluster);
        begins += u32::from(now > first);
        first = now;
        assert!(checkpoints < 12, "{checkpoints} checkpoints");
    }
    let report = cluster.json(&["log", "replay", "--verify", "--json", "--all"]);
    assert_eq!(report["verified"], true, "{report:#}");
    cluster.kill();
    cluster.boot();
    cluster.fsck();
    assert!(cluster.stop());
    let (code, text) = offline(&cluster.dir, &["--all", "--verify"]);
    assert_eq!(code, Some(0), "{text}");
}
