//! `clutch log rewind`: logs that a wrong clock has led into the future come back, and what was there before it is there.

mod support;

use std::{
    path::Path,
    process::{Command, Output},
};

use support::{CLUTCH, Cluster, noise};

const DAY: i64 = 24 * 60 * 60;
const YEAR: i64 = 365 * DAY;
const ARGUMENTS: [&str; 6] = ["--shards", "2", "--disks", "6", "--segment-mib", "1"];

/// What there is of the logs before they go astray.
#[derive(Clone, Copy, PartialEq)]
enum Logs {
    Whole,
    /// Whole, with checkpoints of before and of the future.
    WithCheckpoints,
    /// From a checkpoint on.
    Trimmed,
}

fn rewind(dir: &Path, more: &[&str]) -> Output {
    Command::new(CLUTCH).args(["log", "rewind", "--dir"]).arg(dir).args(more).output().expect("runs")
}

fn text(output: &Output) -> String {
    [&output.stdout[..], &output.stderr[..]].map(String::from_utf8_lossy).concat()
}

fn stat(cluster: &Cluster, path: &str) -> serde_json::Value {
    cluster.json(&["fs", "stat", "--json", path])
}

/// A cluster that has been in the next year and is stopped, with files of before and of then; the time before the jump.
fn led_astray(dir: &Path, local: &str, shift: &Path, logs: Logs) -> (Vec<String>, String) {
    // All that remains is old by then.
    std::fs::write(shift, (-3 * DAY).to_string()).expect("written");
    let mut cluster = Cluster::start_with_clock(dir, &ARGUMENTS, shift);
    cluster.ok(&["fs", "mkdir", "/a"]);
    cluster.ok(&["fs", "put", local, "/a/kept"]);
    cluster.ok(&["fs", "put", local, "/a/gone-later"]);
    if logs != Logs::Whole {
        cluster.ok(&["log", "checkpoint", "--all"]);
    }
    if logs == Logs::Trimmed {
        // Only whole segments go.
        let crowd = [
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
        ];
        cluster.ok(&crowd);
        cluster.ok(&["log", "checkpoint", "--all"]);
        assert!(cluster.stop(), "stops");
        cluster.boot();
        cluster.ok(&["log", "trim", "--all"]);
        assert!(!dir.join("log/0000000000000001.log").exists(), "the log is trimmed");
    }
    assert!(cluster.stop(), "stops");
    let before = jiff::Timestamp::now().to_string();
    std::fs::write(shift, YEAR.to_string()).expect("written");
    let mut cluster = Cluster::start_with_clock(dir, &[&ARGUMENTS[..], &["--accept-clock"]].concat(), shift);
    let ids = (0..5).map(|n| {
        let path = format!("/a/lost{n}");
        cluster.ok(&["fs", "put", local, &path]);
        stat(&cluster, &path)["id"].as_str().expect("an id").to_owned()
    });
    let ids = ids.collect();
    cluster.ok(&["fs", "mkdir", "/a/new"]);
    cluster.ok(&["fs", "mv", "/a/kept", "/a/new/kept"]);
    cluster.ok(&["fs", "rm", "/a/gone-later"]);
    if logs != Logs::Whole {
        cluster.ok(&["log", "checkpoint", "--all"]);
    }
    assert!(rewind(dir, &[]).status.code() == Some(1), "a running cluster is left alone");
    assert!(cluster.stop(), "stops");
    std::fs::write(shift, "0").expect("written");
    (ids, before)
}

fn check(dir: &Path, local: &str, shift: &Path, bytes: &[u8], lost_ids: &[String]) {
    let mut cluster = Cluster::start_with_clock(dir, &ARGUMENTS, shift);
    for path in ["/a/kept", "/a/gone-later"] {
        assert!(cluster.run(&["fs", "cat", path]).stdout == bytes, "{path}");
    }
    cluster.fails(1, &["fs", "stat", "/a/lost0"]);
    cluster.fails(1, &["fs", "stat", "/a/new"]);
    for n in 0..5 {
        let path = format!("/a/again{n}");
        cluster.ok(&["fs", "put", local, &path]);
        let id = stat(&cluster, &path)["id"].as_str().expect("an id").to_owned();
        assert!(!lost_ids.contains(&id), "{id} was handed out before");
        assert!(cluster.run(&["fs", "cat", &path]).stdout == bytes, "{path}");
    }
    cluster.ok(&["fs", "mkdir", "/a/new"]);
    cluster.ok(&["fs", "mv", "/a/kept", "/a/new/kept"]);
    let ctime =
        stat(&cluster, "/a/again0")["ctime"].as_str().expect("a time").parse::<i128>().expect("a number");
    let present = jiff::Timestamp::now().as_nanosecond();
    assert!((ctime - present).abs() < 600_000_000_000, "{ctime} at {present}");
    cluster.fsck();
    cluster.ok(&["log", "replay", "--all", "--verify"]);
    assert!(cluster.stop(), "stops");
    let output = Command::new(CLUTCH)
        .args(["log", "replay", "--all", "--verify", "--dir"])
        .arg(dir)
        .output()
        .expect("runs");
    assert!(output.status.success(), "{}", text(&output));
}

fn leads_back(logs: Logs) {
    let scratch = tempfile::tempdir().expect("a directory");
    let (dir, local, shift) =
        (scratch.path().join("data"), scratch.path().join("file"), scratch.path().join("shift"));
    let bytes = noise(300_000, 3);
    std::fs::write(&local, &bytes).expect("written");
    let local = local.to_str().expect("text");
    let (lost_ids, _) = led_astray(&dir, local, &shift, logs);
    let said = rewind(&dir, &[]);
    assert!(said.status.success() && text(&said).contains("say --yes"), "{}", text(&said));
    assert!(!dir.join("log/before-rewind-1").exists(), "nothing was changed");
    let said: serde_json::Value = serde_json::from_slice(&rewind(&dir, &["--json"]).stdout).expect("JSON");
    assert!(said["done"] == false && said["entries_lost"].as_u64() > Some(10), "{said:#}");
    // A state that is broken is not needed.
    std::fs::write(dir.join("state/shard-000/db/CURRENT"), "broken").expect("written");
    let done = rewind(&dir, &["--yes"]);
    assert!(done.status.success() && text(&done).contains("before-rewind-1"), "{}", text(&done));
    check(&dir, local, &shift, &bytes, &lost_ids);
    let nothing = rewind(&dir, &["--yes"]);
    assert!(nothing.status.success() && text(&nothing).contains("nothing to do"), "{}", text(&nothing));
}

#[test]
fn a_log_in_the_future_comes_back() {
    leads_back(Logs::Whole);
}

#[test]
fn checkpoints_of_the_future_are_set_aside() {
    leads_back(Logs::WithCheckpoints);
}

#[test]
fn a_trimmed_log_comes_back_to_what_is_kept() {
    leads_back(Logs::Trimmed);
}

#[test]
fn what_cannot_be_is_refused() {
    let scratch = tempfile::tempdir().expect("a directory");
    let (dir, local, shift) =
        (scratch.path().join("data"), scratch.path().join("file"), scratch.path().join("shift"));
    let none = rewind(&dir, &["--yes"]);
    assert!(none.status.code() == Some(1) && text(&none).contains("no cluster.json"), "{}", text(&none));
    assert!(!dir.exists(), "nothing is made");
    std::fs::write(&local, noise(300_000, 3)).expect("written");
    let (_, before) = led_astray(&dir, local.to_str().expect("text"), &shift, Logs::Whole);
    for (time, says) in
        [("2020-01-01T00:00:00Z", "lies before"), ("5", "lies before"), ("yesterday", "no instant")]
    {
        let refused = rewind(&dir, &["--yes", "--to-time", time]);
        assert!(!refused.status.success() && text(&refused).contains(says), "{time}: {}", text(&refused));
    }
    let same = rewind(&dir, &["--to-time", &before]);
    assert!(same.status.success() && text(&same).contains("say --yes"), "{}", text(&same));
    // Nothing has changed: it starts as it was.
    let cluster = Cluster::start_with_clock(&dir, &ARGUMENTS, &shift);
    cluster.ok(&["fs", "stat", "/a/new/kept"]);
}
