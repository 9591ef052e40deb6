//! File systems that are full: all of a cluster on one, and its logs, its states and its blocks each on one of their own. Reads
//! and deletions go on, and service comes back by itself when there is room. In memory, in a namespace of the process's own.

mod support;

use std::{
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use support::{Cluster, noise};

const ARGUMENTS: [&str; 12] = [
    "--shards",
    "1",
    "--disks",
    "6",
    "--segment-mib",
    "1",
    "--grant-s",
    "1",
    "--clock-skew-s",
    "1",
    "--collect-every-s",
    "0",
];

/// Whether this machine lets its users mount something for themselves.
fn can_mount() -> bool {
    let tried = Command::new("unshare").args(["--map-root-user", "--mount", "true"]).output();
    let can = tried.is_ok_and(|output| output.status.success());
    if !can {
        eprintln!("NOT TESTED: namespaces of one's own are not allowed here");
    }
    can
}

fn start(dir: &Path, part: &str, mib: u32) -> Cluster {
    let data = dir.join("data");
    let cluster = Cluster::start_on(&data, &ARGUMENTS, &[(data.join(part), mib)]);
    cluster.ok(&["fs", "policy", "set", "/", "--keep-age", "0s"]);
    cluster
}

fn serves(cluster: &Cluster) -> bool {
    cluster.json(&["status", "--json"])["serving"] == true
}

/// Tries until it succeeds.
fn comes_back(cluster: &Cluster, arguments: &[&str], give_room: impl Fn()) {
    let begin = Instant::now();
    loop {
        give_room();
        let output = cluster.run(arguments);
        if output.status.success() {
            return;
        }
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(begin.elapsed() < Duration::from_secs(90), "does not come back: {text}");
    }
}

/// Fills a file system with blocks, then gives room by deleting.
fn fill_with_blocks(part: &str, mib: u32) {
    let dir = tempfile::tempdir().expect("a directory");
    let cluster = start(dir.path(), part, mib);
    let local = dir.path().join("file");
    let bytes = noise(2 << 20, 1);
    std::fs::write(&local, &bytes).expect("written");
    let local = local.to_str().expect("text");
    let mut count = 0;
    let complaint = loop {
        let output = cluster.run(&["--patience-s", "5", "fs", "put", local, &format!("/f{count}")]);
        if !output.status.success() {
            break String::from_utf8_lossy(&output.stderr).into_owned();
        }
        count += 1;
        assert!(count < 200, "it is never full");
    };
    assert!(count >= 3 && complaint.contains("space"), "after {count}: {complaint}");
    assert!(serves(&cluster));
    for number in 0..count {
        assert!(cluster.run(&["fs", "cat", &format!("/f{number}")]).stdout == bytes, "/f{number} differs");
    }
    for number in 1..count {
        cluster.ok(&["fs", "rm", &format!("/f{number}")]);
    }
    comes_back(&cluster, &["fs", "put", local, "/again"], || {
        cluster.run(&["collect", "--once"]);
    });
    for name in ["/f0", "/again"] {
        assert!(cluster.run(&["fs", "cat", name]).stdout == bytes, "{name} differs");
    }
    cluster.fsck();
}

/// Fills a file system with metadata, then gives room by trimming or deleting.
fn fill_with_metadata(part: &str, mib: u32) {
    let dir = tempfile::tempdir().expect("a directory");
    let cluster = start(dir.path(), part, mib);
    let tree = dir.path().join("tree");
    std::fs::create_dir(&tree).expect("made");
    for number in 0..2000 {
        std::fs::write(tree.join(number.to_string()), noise(250, number)).expect("written");
    }
    let local = tree.to_str().expect("text");
    let mut count = 0;
    loop {
        let output = cluster.run(&["--patience-s", "3", "fs", "put", "-r", local, &format!("/t{count}")]);
        if !output.status.success() {
            break;
        }
        count += 1;
        assert!(count < 200, "it is never full");
    }
    assert!(count >= 1);
    let first = std::fs::read(tree.join("0")).expect("there");
    assert!(cluster.run(&["fs", "cat", "/t0/0"]).stdout == first, "reads go on");
    cluster.ok(&["fs", "rm", "/t0/1"]);
    comes_back(&cluster, &["fs", "put", &format!("{local}/0"), "/again"], || {
        cluster.run(&["log", "checkpoint", "--all"]);
        cluster.run(&["log", "trim", "--all"]);
    });
    assert!(serves(&cluster));
    assert!(cluster.run(&["fs", "cat", "/again"]).stdout == first);
    cluster.fsck();
}

#[test]
fn all_on_one_file_system() {
    if can_mount() {
        fill_with_blocks("", 128);
    }
}

#[test]
fn blocks_on_one_of_their_own() {
    if can_mount() {
        fill_with_blocks("blocks", 64);
    }
}

#[test]
fn logs_on_one_of_their_own() {
    if can_mount() {
        fill_with_metadata("log", 24);
    }
}
