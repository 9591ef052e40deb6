//! Whole directories that earlier builds left behind after `kill -9`, with their logs, states, checkpoints and blocks: every
//! build opens them, replays their logs to the hashes of then, and serves their files.
//!
//! `docs/formats/golden/directories` has them, each beside what is in it. `KEEP_DIRECTORY=1` makes one for a new layout, and never
//! writes over one. The keys in them are of clusters that are no more.

mod support;

use std::{fmt::Write as _, os::unix::fs::PermissionsExt as _, path::Path, process::Command};

use clutch_server::cluster_file::LAYOUT;
use support::{CLUTCH, Cluster, noise};

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/formats/golden/directories");

fn tar(arguments: &[&str]) {
    assert!(Command::new("tar").args(arguments).status().expect("tar runs").success(), "tar {arguments:?}");
}

fn text(path: &Path) -> &str {
    path.to_str().expect("text")
}

/// Position and hash of every log, replayed from its beginning or its oldest checkpoint.
fn replayed(dir: &Path) -> String {
    let arguments = ["log", "replay", "--all", "--json", "--dir", text(dir)];
    let output = Command::new(CLUTCH).args(arguments).output().expect("runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let logs = document["logs"].as_array().expect("a list");
    logs.iter().fold(String::new(), |mut lines, log| {
        let _ = writeln!(lines, "log {} {} {}", log["log"], log["position"], log["hash"]);
        lines
    })
}

fn mode(path: &Path) -> u32 {
    path.metadata().expect("is there").permissions().mode() & 0o7777
}

/// What every path below a directory holds.
fn listed(dir: &Path, below: &Path, lines: &mut Vec<String>) {
    for entry in std::fs::read_dir(dir).expect("reads") {
        let path = entry.expect("an entry").path();
        let name = text(path.strip_prefix(below).expect("below")).to_owned();
        if path.is_symlink() {
            lines.push(format!("link {name} {}", text(&std::fs::read_link(&path).expect("a link"))));
        } else if path.is_dir() {
            lines.push(format!("directory {name} {:o}", mode(&path)));
            listed(&path, below, lines);
        } else {
            let bytes = std::fs::read(&path).expect("reads");
            let crc = crc32fast::hash(&bytes);
            lines.push(format!("file {name} {:o} {} {crc:08x}", mode(&path), bytes.len()));
        }
    }
}

/// Everything that a client sees.
fn fetched(cluster: &Cluster, into: &Path) -> String {
    cluster.ok(&["fs", "get", "-r", "/tree", text(into)]);
    let mut lines = Vec::new();
    listed(into, into, &mut lines);
    lines.sort();
    for dir in ["/tree", "/tree/a"] {
        let history = cluster.json(&["fs", "history", "--json", dir]);
        for past in history["past"].as_array().expect("a list") {
            lines.push(format!("past {dir} {} {} {}", past["name"], past["id"], past["ended_at"]));
        }
    }
    lines.join("\n") + "\n"
}

/// Opens what an archive holds, years later: everything is as it was, and goes on.
fn check(archive: &Path, kept: &str, seconds_later: u64) {
    let name = archive.with_extension("").with_extension("");
    let name = text(Path::new(name.file_name().expect("a name"))).to_owned();
    let work = tempfile::tempdir().expect("a directory");
    tar(&["-xzf", text(archive), "-C", text(work.path())]);
    let dir = work.path().join(&name);
    let replayed = replayed(&dir);
    let shift = work.path().join("shift");
    std::fs::write(&shift, seconds_later.to_string()).expect("written");
    let mut cluster = Cluster::start_with_clock(&dir, &["--collect-every-s", "0"], &shift);
    let now = replayed + &fetched(&cluster, &work.path().join("seen"));
    for (kept, now) in kept.lines().zip(now.lines()) {
        assert_eq!(kept, now, "{name}");
    }
    assert_eq!(kept.lines().count(), now.lines().count(), "{name}");
    cluster.ok(&["fsck", "--rescan"]);
    cluster.ok(&["log", "replay", "--all", "--verify"]);
    let (more, back) = (work.path().join("more"), work.path().join("back"));
    std::fs::write(&more, noise(9_000, 7)).expect("written");
    cluster.ok(&["fs", "put", text(&more), "/tree/more"]);
    cluster.ok(&["fs", "get", "/tree/more", text(&back)]);
    assert_eq!(std::fs::read(back).ok(), std::fs::read(more).ok(), "{name}");
    assert!(cluster.stop(), "{name}");
}

fn named() -> String {
    format!("layout{LAYOUT}")
}

/// A cluster with something of everything, killed.
fn make(scratch: &Path) -> String {
    let tree = scratch.join("tree");
    std::fs::create_dir_all(tree.join("a/b")).expect("made");
    for (number, len) in [0, 1, 255, 256, 5_000, 70_000].into_iter().enumerate() {
        std::fs::write(tree.join(format!("a/{len}")), noise(len, number as u64 + 1)).expect("written");
    }
    std::os::unix::fs::symlink("../255", tree.join("a/b/link")).expect("made");
    let dir = scratch.join(named());
    let arguments = ["--shards", "2", "--disks", "3", "--policy", "1+1"];
    let mut cluster = Cluster::start(&dir, &arguments);
    cluster.ok(&["fs", "put", "-r", text(&tree), "/tree"]);
    cluster.ok(&["fs", "policy", "set", "/tree", "--keep-versions", "3"]);
    cluster.ok(&["fs", "put", text(&tree.join("a/5000")), "/tree/replaced"]);
    cluster.ok(&["log", "checkpoint", "--all"]);
    cluster.ok(&["fs", "put", text(&tree.join("a/256")), "/tree/replaced"]);
    cluster.ok(&["fs", "mkdir", "/tree/c"]);
    cluster.ok(&["fs", "mv", "/tree/a/b", "/tree/c/moved"]);
    cluster.ok(&["fs", "mv", "/tree/a/1", "/tree/c/one"]);
    cluster.ok(&["fs", "rm", "/tree/a/256"]);
    cluster.ok(&["fs", "chmod", "600", "/tree/a/255"]);
    let seen = fetched(&cluster, &scratch.join("seen"));
    cluster.kill();
    // Room for a start on a full disk, and nothing else.
    let _ = std::fs::remove_file(dir.join("reserve"));
    replayed(&dir) + &seen
}

#[test]
fn directories_of_earlier_builds_are_opened_replayed_and_served() {
    let scratch = tempfile::tempdir().expect("a directory");
    let archive = Path::new(GOLDEN).join(named() + ".tar.gz");
    if std::env::var_os("KEEP_DIRECTORY").is_some() && !archive.exists() {
        let said = make(scratch.path());
        std::fs::create_dir_all(GOLDEN).expect("made");
        tar(&["-czf", text(&archive), "-C", text(scratch.path()), &named()]);
        std::fs::write(archive.with_extension("").with_extension("txt"), said).expect("written");
    }
    let archives = std::fs::read_dir(GOLDEN).expect("the kept directories").map(|e| e.expect("reads").path());
    let archives: Vec<_> = archives.filter(|path| path.extension().is_some_and(|e| e == "gz")).collect();
    assert!(
        archives.contains(&archive),
        "no directory of layout {LAYOUT} is kept: KEEP_DIRECTORY=1 makes one"
    );
    for archive in archives {
        let kept = std::fs::read_to_string(archive.with_extension("").with_extension("txt"));
        let kept = kept.expect("what is in it");
        for years in [0, 5] {
            check(&archive, &kept, years * 365 * 86_400);
        }
    }
}

#[test]
fn a_layout_to_come_is_refused_before_anything_is_written() {
    let work = tempfile::tempdir().expect("a directory");
    let archive = Path::new(GOLDEN).join(named() + ".tar.gz");
    tar(&["-xzf", text(&archive), "-C", text(work.path())]);
    let dir = work.path().join(named());
    let file = dir.join("cluster.json");
    let mut facts: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&file).expect("reads")).expect("JSON");
    facts["layout"] = (LAYOUT + 1).into();
    std::fs::write(&file, facts.to_string()).expect("written");
    let before = std::fs::read(dir.join("log/synced")).expect("reads");
    let output = Command::new(CLUTCH)
        .args(["up", "--listen", "127.0.0.1:0", "--dir", text(&dir)])
        .output()
        .expect("runs");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let words = format!("layout {} is not known to this build, which knows {LAYOUT}", LAYOUT + 1);
    assert!(!output.status.success() && said.contains(&words), "{said}");
    assert_eq!(std::fs::read(dir.join("log/synced")).expect("reads"), before);
    assert!(!dir.join("reserve").exists());
}
