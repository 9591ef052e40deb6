//! Clocks that are wrong, or are set: of the server at its start and while it runs, and of the client. All is served, nothing is
//! lost, and nothing goes because of its age.

mod support;

use std::{
    path::Path,
    time::{Duration, Instant},
};

use support::{Cluster, noise};

const HOUR: i64 = 60 * 60;
const DAY: i64 = 24 * HOUR;
const YEAR: i64 = 365 * DAY;
const SHIFTS: [i64; 8] = [30, -30, HOUR, -HOUR, DAY, -DAY, YEAR, -YEAR];
const ARGUMENTS: [&str; 6] = ["--shards", "1", "--disks", "6", "--collect-every-s", "1"];

struct Files<'a> {
    local: &'a Path,
    bytes: Vec<u8>,
    /// How many were stored so far.
    count: usize,
}

impl Files<'_> {
    /// Stores a file with blocks, replaces a small one, and reads all that was stored before.
    fn work(&mut self, cluster: &Cluster, client_shift: Option<&Path>, when: &str) {
        let run = |arguments: &[&str]| {
            let mut command = cluster.command(arguments);
            command.args(["--patience-s", "15"]);
            if let Some(shift) = client_shift {
                command.env("CLUTCH_CLOCK_SHIFT", shift);
            }
            let output = command.output().expect("runs");
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(output.status.success(), "{when}: {arguments:?}: {text}");
            output.stdout
        };
        let name = format!("/f{}", self.count);
        run(&["fs", "put", self.local.to_str().expect("text"), &name]);
        run(&["fs", "touch", "/small"]);
        run(&["fs", "mkdir", &format!("/d{}", self.count)]);
        self.count += 1;
        for number in [0, self.count / 2, self.count - 1] {
            let read = run(&["fs", "cat", &format!("/f{number}")]);
            assert!(read == self.bytes, "{when}: /f{number} differs");
        }
    }
}

#[test]
fn everything_is_served_whatever_the_clocks_say() {
    let dir = tempfile::tempdir().expect("a directory");
    let (local, shift, client_shift) =
        (dir.path().join("file"), dir.path().join("shift"), dir.path().join("client"));
    let bytes = noise(300_000, 1);
    std::fs::write(&local, &bytes).expect("written");
    std::fs::write(&shift, "0").expect("written");
    let mut files = Files { local: &local, bytes, count: 0 };
    let mut cluster = Cluster::start_with_clock(&dir.path().join("data"), &ARGUMENTS, &shift);
    files.work(&cluster, None, "at first");
    cluster.ok(&["fs", "put", local.to_str().expect("text"), "/deleted"]);
    cluster.ok(&["fs", "rm", "/deleted"]);
    for seconds in SHIFTS {
        // The client's clock alone.
        std::fs::write(&client_shift, seconds.to_string()).expect("written");
        files.work(&cluster, Some(&client_shift), &format!("the client's clock is wrong by {seconds} s"));
        // The server's is set while it runs, and set right again.
        for shown in [seconds, 0] {
            std::fs::write(&shift, shown.to_string()).expect("written");
            await_clock(&cluster, shown);
            files.work(&cluster, None, &format!("the running server's clock was set to {shown} s"));
        }
        // It is wrong at a start.
        std::fs::write(&shift, seconds.to_string()).expect("written");
        assert!(cluster.stop(), "stops");
        cluster.boot();
        files.work(&cluster, None, &format!("the clock is wrong by {seconds} s at a start"));
        cluster.kill();
        std::fs::write(&shift, "0").expect("written");
        cluster.boot();
        files.work(&cluster, None, &format!("the clock is right again after {seconds} s"));
    }
    // What was deleted is kept for a week, and no week has passed.
    cluster.ok(&["fs", "undelete", "/deleted"]);
    cluster.fsck();
    let report = cluster.json(&["log", "replay", "--all", "--verify", "--json"]);
    assert_eq!(report["verified"], true, "{report:#}");
}

/// Waits until the process has seen that its clock was set.
fn await_clock(cluster: &Cluster, seconds: i64) {
    let begin = Instant::now();
    loop {
        let status = cluster.json(&["status", "--json"]);
        let ahead = status["clock_ahead_ms"].as_i64().expect("a number");
        // The cluster's time follows a clock slowly, and never back; a small step it may have followed by now.
        let is_small = seconds.abs() < 60 && begin.elapsed() > Duration::from_secs(2);
        if (ahead - seconds * 1000).abs() < 20_000 || is_small {
            return;
        }
        assert!(begin.elapsed() < Duration::from_secs(60), "set to {seconds} s, and {ahead} ms are shown");
    }
}
