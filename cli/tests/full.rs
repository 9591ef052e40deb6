//! File systems that are full: all of a cluster on one, and its logs, its states and its blocks each on one of their own. Reads
//! and deletions go on, and service comes back by itself when there is room. In memory and on loop devices, in a namespace of the
//! process's own. And one disk of several on a file system that is frozen.

mod support;

use std::{
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use support::{Cluster, Mount, noise};

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

/// Whether file systems in files can be mounted here.
fn can_mount_devices() -> bool {
    let dir = tempfile::tempdir().expect("a directory");
    let is_root =
        std::fs::metadata("/proc/self").is_ok_and(|meta| std::os::unix::fs::MetadataExt::uid(&meta) == 0);
    let tried = || {
        let mount = Mount::device(dir.path().join("at"), 8, dir.path().join("image"));
        let script = format!(
            "mkdir '{0}' && mount -o loop '{1}' '{0}'",
            mount.at.display(),
            dir.path().join("image").display()
        );
        Command::new("unshare").args(["--mount", "sh", "-c", &script]).output()
    };
    let can = is_root && tried().is_ok_and(|output| output.status.success());
    if !can {
        eprintln!("NOT TESTED: loop devices cannot be mounted here");
    }
    can
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Memory,
    Device,
}

impl Kind {
    fn is_possible(self) -> bool {
        match self {
            Kind::Memory => can_mount(),
            Kind::Device => can_mount_devices(),
        }
    }
}

fn start(dir: &Path, part: &str, mib: u32, kind: Kind) -> Cluster {
    let data = dir.join("data");
    let mount = match kind {
        Kind::Memory => Mount::memory(data.join(part), mib),
        Kind::Device => Mount::device(data.join(part), mib, dir.join("image")),
    };
    let cluster = Cluster::start_on(&data, &ARGUMENTS, &[mount]);
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

/// Kills the process and starts it again, where what is full outlives it.
fn start_while_full(cluster: &mut Cluster, kind: Kind) {
    if kind == Kind::Device {
        cluster.kill();
        cluster.boot();
    }
}

/// Fills a file system with blocks, then gives room by deleting.
fn fill_with_blocks(part: &str, mib: u32, kind: Kind) {
    if !kind.is_possible() {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let mut cluster = start(dir.path(), part, mib, kind);
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
    start_while_full(&mut cluster, kind);
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

/// Fills a file system with metadata, then gives room.
fn fill_with_metadata(part: &str, mib: u32, kind: Kind, give_room: impl Fn(&Cluster)) {
    if !kind.is_possible() {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let mut cluster = start(dir.path(), part, mib, kind);
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
        if part == "state" {
            // What is in memory only takes no room; a checkpoint keeps what is written then.
            cluster.run(&["log", "checkpoint", "--all"]);
        }
    }
    assert!(count >= 1);
    let first = std::fs::read(tree.join("0")).expect("there");
    start_while_full(&mut cluster, kind);
    assert!(cluster.run(&["fs", "cat", "/t0/0"]).stdout == first, "reads go on");
    let report = cluster.json(&["fsck", "--json"]);
    let mut violations = report["violations"].as_array().expect("a check needs no room").iter();
    assert!(violations.all(|v| v.as_str().is_some_and(|v| v.starts_with("no space:"))), "{report:#}");
    cluster.ok(&["fs", "rm", "/t0/1"]);
    comes_back(&cluster, &["fs", "put", &format!("{local}/0"), "/again"], || give_room(&cluster));
    assert!(serves(&cluster));
    assert!(cluster.run(&["fs", "cat", "/again"]).stdout == first);
    cluster.fsck();
}

fn trim(cluster: &Cluster) {
    cluster.run(&["log", "checkpoint", "--all"]);
    cluster.run(&["log", "trim", "--all"]);
}

#[test]
fn all_on_one_file_system() {
    fill_with_blocks("", 128, Kind::Memory);
}

#[test]
fn blocks_on_one_of_their_own() {
    fill_with_blocks("blocks", 64, Kind::Memory);
}

#[test]
fn logs_on_one_of_their_own() {
    fill_with_metadata("log", 24, Kind::Memory, trim);
}

#[test]
fn states_on_one_of_their_own() {
    fill_with_metadata("state", 8, Kind::Memory, |cluster| {
        let at = cluster.dir.join("state");
        assert!(cluster.inside(&["mount", "-o", "remount,size=64m", at.to_str().expect("text")]));
    });
}

#[test]
fn all_on_a_loop_device() {
    fill_with_blocks("", 160, Kind::Device);
}

#[test]
fn logs_on_a_loop_device() {
    fill_with_metadata("log", 32, Kind::Device, trim);
}

/// Thaws a file system when the test ends, however that is: a frozen one cannot even be left.
struct Frozen<'a>(&'a Cluster, String);

impl Frozen<'_> {
    fn freeze(cluster: &Cluster, at: String) -> Frozen<'_> {
        assert!(cluster.inside(&["fsfreeze", "--freeze", &at]), "freezes {at}");
        Frozen(cluster, at)
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        self.0.inside(&["fsfreeze", "--unfreeze", &self.1]);
    }
}

#[test]
fn a_disk_that_hangs_is_done_without() {
    if !can_mount_devices() {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let data = dir.path().join("data");
    // All alike, so that all are used alike.
    let mounts: Vec<Mount> = (0..6)
        .map(|n| {
            let (at, image) = (data.join(format!("blocks/{n}")), dir.path().join(format!("image{n}")));
            Mount::device(at, 64, image)
        })
        .collect();
    let cluster = Cluster::start_on(&data, &["--shards", "1", "--disks", "6", "--policy", "2+2"], &mounts);
    let bytes = noise(1 << 20, 4);
    let local = dir.path().join("file");
    std::fs::write(&local, &bytes).expect("written");
    let local = local.to_str().expect("text");
    for number in 0..6 {
        cluster.ok(&["fs", "put", local, &format!("/before{number}")]);
    }
    {
        let _frozen = Frozen::freeze(&cluster, data.join("blocks/0").to_str().expect("text").to_owned());
        for number in 0..6 {
            cluster.ok(&["--patience-s", "60", "fs", "put", local, &format!("/frozen{number}")]);
            let read = cluster.run(&["--patience-s", "60", "fs", "cat", &format!("/before{number}")]);
            assert!(read.stdout == bytes, "{}", String::from_utf8_lossy(&read.stderr));
        }
        let status = cluster.json(&["status", "--json"]);
        assert!(status["faults"].to_string().contains("has not answered"), "{status:#}");
        assert_eq!(status["serving"], true);
    }
    cluster.wait_until_over("has not answered");
    for number in 0..6 {
        for name in ["before", "frozen"] {
            assert!(
                cluster.run(&["fs", "cat", &format!("/{name}{number}")]).stdout == bytes,
                "/{name}{number}"
            );
        }
    }
    cluster.fsck();
}

#[test]
fn a_disk_that_becomes_read_only_is_named() {
    if !can_mount() {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let data = dir.path().join("data");
    let mount = Mount::memory(data.join("blocks"), 64);
    let cluster = Cluster::start_on(&data, &["--shards", "1", "--disks", "4", "--policy", "2+2"], &[mount]);
    let local = dir.path().join("file");
    std::fs::write(&local, noise(300_000, 4)).expect("written");
    let local = local.to_str().expect("text");
    cluster.ok(&["fs", "put", local, "/before"]);
    let at = data.join("blocks").to_str().expect("text").to_owned();
    assert!(cluster.inside(&["mount", "-o", "remount,ro", &at]));
    assert!(!cluster.run(&["--patience-s", "3", "fs", "put", local, "/no"]).status.success());
    let status = cluster.json(&["status", "--json"]);
    assert!(status["faults"].to_string().contains("fails: "), "{status:#}");
    assert!(cluster.inside(&["mount", "-o", "remount,rw", &at]));
    for number in 0..8 {
        cluster.ok(&["fs", "put", local, &format!("/again{number}")]);
    }
    let status = cluster.json(&["status", "--json"]);
    assert!(!status["faults"].to_string().contains("fails: "), "{status:#}");
}
