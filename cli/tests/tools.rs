//! Commands that fail change nothing, neither in the cluster nor here; tools that verify are red when something differs;
//! whatever is checkpointed, trimmed and started again in whatever order, every log replays from something that is kept.

mod support;

use std::{
    collections::BTreeMap,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::Command,
};

use bytes::Bytes;
use clutch_state::{Store as _, Table, View as _};
use clutch_state_rocks::{RocksStore, SharedMemory};
use support::{CLUTCH, Cluster, noise};

/// What files that are on their way begin with.
const ARRIVING: &str = "/.clutch-";

/// What is below a local directory: modes, times and bytes by path.
fn local(dir: &Path) -> BTreeMap<PathBuf, (u32, i64, Vec<u8>)> {
    let mut found = BTreeMap::new();
    let mut waiting = vec![dir.to_owned()];
    while let Some(path) = waiting.pop() {
        let about = path.symlink_metadata().expect("there");
        let bytes = if about.is_symlink() {
            std::fs::read_link(&path).expect("a link").into_os_string().into_encoded_bytes()
        } else if about.is_dir() {
            waiting.extend(std::fs::read_dir(&path).expect("lists").map(|e| e.expect("an entry").path()));
            Vec::new()
        } else {
            std::fs::read(&path).unwrap_or_default()
        };
        // Time of a directory changes with the files that come and go beside their places.
        let time = if about.is_dir() { 0 } else { about.mtime_nsec() + about.mtime() * 1_000_000_000 };
        found.insert(path, (about.mode(), time, bytes));
    }
    found
}

/// Everything that can be seen of the cluster's files: attributes, entries, what is past, bytes.
fn remote(cluster: &Cluster) -> BTreeMap<String, Vec<u8>> {
    let mut seen = BTreeMap::new();
    let mut look = |arguments: &[&str]| {
        let output = cluster.run(&[&["fs"], arguments].concat());
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {text}");
        seen.insert(arguments.join(" "), output.stdout);
    };
    for dir in ["/", "/dir", "/dir/sub"] {
        look(&["stat", "--json", dir]);
        look(&["tree", "--json", dir]);
        look(&["history", "--json", dir]);
        look(&["policy", "get", "--json", dir]);
    }
    for file in ["/a", "/big", "/dir/x", "/dir/sub/y"] {
        look(&["stat", "--json", file]);
        look(&["versions", "--json", file]);
        look(&["cat", file]);
    }
    look(&["stat", "--json", "/link"]);
    seen
}

/// A cluster with a little of everything, and local files: `new` to put, `old` to fetch over, `tree` to do both with.
struct Place {
    cluster: Cluster,
    work: PathBuf,
}

impl Place {
    fn new(dir: &Path) -> Place {
        let arguments = ["--shards", "1", "--disks", "4", "--policy", "2+1"];
        let cluster = Cluster::start(&dir.join("c"), &arguments);
        let work = dir.join("work");
        std::fs::create_dir_all(work.join("tree/dir/sub")).expect("made");
        for (name, bytes) in [
            ("new", noise(50_000, 1)),
            ("old", b"what was here before".to_vec()),
            ("tree/a", b"an old a".to_vec()),
            ("tree/big", b"an old big".to_vec()),
            ("tree/dir/sub/y", b"an old y".to_vec()),
        ] {
            std::fs::write(work.join(name), bytes).expect("written");
        }
        let source = dir.join("source");
        std::fs::write(&source, noise(100_000, 2)).expect("written");
        let source = source.to_str().expect("text");
        cluster.ok(&["fs", "mkdir", "-p", "/dir/sub"]);
        for path in ["/big", "/dir/x"] {
            cluster.ok(&["fs", "put", source, path]);
        }
        cluster.ok(&["fs", "put", work.join("old").to_str().expect("text"), "/a"]);
        cluster.ok(&["fs", "put", work.join("old").to_str().expect("text"), "/dir/sub/y"]);
        cluster.ok(&["fs", "ln", "-s", "a", "/link"]);
        Place { cluster, work }
    }

    /// Runs a command, in which `@` stands for the local directory; its exit code and what it complained.
    fn run(&self, line: &str) -> (Option<i32>, String) {
        let arguments: Vec<String> =
            line.split(' ').map(|word| word.replace('@', self.work.to_str().expect("text"))).collect();
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let output = self.cluster.run(&arguments);
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// Runs commands that must fail and leave the local files alone.
    fn fail(&self, lines: &[&str]) {
        let before = local(&self.work);
        for line in lines {
            let (code, text) = self.run(line);
            assert!(matches!(code, Some(1..=3)), "`{line}` ends with {code:?}: {text}");
            assert!(!text.trim().is_empty() && !text.contains("panicked"), "`{line}` says {text:?}");
            let after = local(&self.work);
            let changed = |path: &&PathBuf| before.get(*path) != after.get(*path);
            let changed: Vec<_> = before.keys().chain(after.keys()).filter(changed).collect();
            assert!(changed.is_empty(), "`{line}` fails ({}) and changes {changed:?}", text.trim());
        }
    }
}

/// Commands that a cluster in its best state refuses.
const REFUSED: &[&str] = &[
    "fs ls /none",
    "fs ls /a/b",
    "fs tree /none",
    "fs mkdir /dir",
    "fs mkdir /none/x",
    "fs mkdir -p /a/x",
    "fs put @/none /x",
    "fs put @/new /none/x",
    "fs put @/new /none/",
    "fs put @/new /a/x",
    "fs put @/tree /t",
    "fs put -r @/none /t",
    "fs put -r @/tree /a",
    "fs get /none @/old",
    "fs get /dir @/old",
    "fs get -r /dir @/old",
    "fs get /big @/none/x",
    "fs get /big @/old/x",
    "fs get /big @/new/",
    "fs cat /none",
    "fs cat /dir",
    "fs mv /none /x",
    "fs mv /a /none/x",
    "fs mv /a /dir/x/y",
    "fs mv /dir /dir/sub/in",
    "fs mv /dir /a",
    "fs rm /none",
    "fs rm /dir",
    "fs rm -r /",
    "fs stat /none",
    "fs ln -s x /a",
    "fs ln -s x /none/x",
    "fs chmod 999 /a",
    "fs chmod 600 /none",
    "fs chown nobody:none:x /a",
    "fs chown 1:1 /none",
    "fs touch /none/x",
    "fs du /none",
    "fs write @/none /a",
    "fs write @/new /none",
    "fs write @/new /dir",
    "fs write --offset 9223372036854775807 @/new /a",
    "fs truncate 10 /none",
    "fs truncate 10 /dir",
    "fs truncate x /a",
    "fs versions /none",
    "fs restore /a",
    "fs restore /none",
    "fs policy set /none --keep-versions 1",
    "fs policy get /none",
    "fs undelete /none",
    "fs undelete /a",
    "log trim --all",
    "log checkpoint --shard 9",
    "log checkpoint",
    "log replay --shard 9",
    "log replay --cdc --to-position 99999999",
    "log replay --all --from-checkpoint 5",
    "log rewind --dir @/../c --yes",
    "disk label --dir @/../c",
    "up --dir @/../c --listen 127.0.0.1:0",
    "up --dir @/new --listen 127.0.0.1:0",
    "fuzz --script @/new",
    "fuzz --script @/none",
    "bench meta --ops dance",
];

/// Commands that need disks.
const NEED_DISKS: &[&str] = &[
    "fs get /big @/old",
    "fs get /dir/x @/tree/dir/sub/y",
    "fs put @/new /a",
    "fs put @/new /big",
    "fs put @/new /new",
    "fs write @/new /big",
    "fs write --offset 60000 @/new /big",
];

/// Commands that need a cluster.
const NEED_CLUSTER: &[&str] = &[
    "fs get /a @/old",
    "fs get -r / @/tree",
    "fs put @/new /a",
    "fs put -r @/tree /t",
    "fs rm -r /dir",
    "fs mv /a /b",
    "fs write @/new /a",
    "fs truncate 0 /a",
    "fs chmod 600 /a",
    "fs touch /a",
    "fs undelete /a",
    "fs policy set / --keep-versions 0",
    "log checkpoint --all",
    "log replay --all --verify",
    "log trim --all",
    "collect --once",
    "fsck",
    "status",
];

#[test]
fn commands_that_fail_change_nothing() {
    let temp = tempfile::tempdir().expect("temporary directory");
    let mut place = Place::new(temp.path());
    let before = remote(&place.cluster);
    for line in REFUSED {
        place.fail(&[line]);
        assert_eq!(remote(&place.cluster), before, "after `{line}`");
    }
    // Files that cannot be written any further, as on a disk that is full: what was there stays. The system ends the
    // command; the next one of its kind removes what it left.
    let old = place.work.join("old");
    let script = format!("ulimit -f 16; exec '{CLUTCH}' fs get /big '{}'", old.display());
    let killed = Command::new("sh")
        .args(["-c", &script])
        .env("CLUTCH_REGISTRY", &place.cluster.address)
        .output()
        .expect("runs");
    assert!(!killed.status.success());
    assert_eq!(std::fs::read(&old).expect("there"), b"what was here before");
    place.cluster.ok(&["fs", "get", "/a", place.work.join("tree/a").to_str().expect("text")]);
    place.cluster.ok(&["fs", "get", "/a", old.to_str().expect("text")]);
    let names: Vec<_> =
        std::fs::read_dir(&place.work).expect("lists").map(|e| e.expect("an entry")).collect();
    assert_eq!(names.len(), 3, "{names:?}");

    // More disks are away than parity makes up for.
    let disk = |n: usize| place.cluster.dir.join("blocks").join(n.to_string());
    let aside = |n: usize| temp.path().join(format!("aside{n}"));
    for n in 0..3 {
        std::fs::rename(disk(n), aside(n)).expect("moved aside");
        std::fs::create_dir(disk(n)).expect("an empty disk");
    }
    place.fail(NEED_DISKS);
    // Of a tree, what can be read comes, and what cannot stays as it was.
    let (code, text) = place.run("fs get -r / @/tree");
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("big"), "{text}");
    let read = |name: &str| std::fs::read(place.work.join("tree").join(name)).expect("there");
    assert_eq!(
        (&read("big")[..], &read("dir/sub/y")[..]),
        (&b"an old big"[..], &b"what was here before"[..])
    );
    assert!(!place.work.join("tree/dir/x").exists());
    let left: Vec<_> =
        local(&place.work).into_keys().filter(|p| p.to_string_lossy().contains(ARRIVING)).collect();
    assert!(left.is_empty(), "{left:?}");
    for n in 0..3 {
        std::fs::remove_dir_all(disk(n)).expect("removed");
        std::fs::rename(aside(n), disk(n)).expect("moved back");
    }
    place.cluster.wait_until_over("missing or empty");
    assert_eq!(remote(&place.cluster), before, "after disks were away");

    // A target that may not be written.
    let locked = place.work.join("locked");
    std::fs::create_dir(&locked).expect("made");
    std::fs::write(locked.join("f"), b"kept").expect("written");
    std::fs::set_permissions(&locked, std::fs::Permissions::from_mode(0o500)).expect("set");
    if std::fs::write(locked.join("g"), b"").is_err() {
        place.fail(&["fs get /a @/locked/f", "fs get -r /dir @/locked"]);
    }
    std::fs::set_permissions(&locked, std::fs::Permissions::from_mode(0o700)).expect("set");

    assert!(place.cluster.stop());
    let lines: Vec<String> = NEED_CLUSTER.iter().map(|line| format!("--patience-s 1 {line}")).collect();
    place.fail(&lines.iter().map(String::as_str).collect::<Vec<_>>());
    place.cluster.boot();
    assert_eq!(remote(&place.cluster), before, "after nobody listened");
    place.cluster.fsck();
}

/// Changes rows of a stopped shard behind its back.
fn tamper(dir: &Path, table: Table, change: impl Fn(&[u8]) -> Option<Vec<u8>>) {
    let path = dir.join("state/shard-000/db");
    let store = RocksStore::open(&path, &SharedMemory::new(8 << 20, 8 << 20)).expect("opens");
    let rows = store.scan(table, &[], &[], 1000).expect("scans");
    let (key, value) = rows.last().expect("a row").clone();
    store.write(vec![(table.stored_key(&key), change(&value).map(Bytes::from))]).expect("writes");
    store.flush().expect("flushes");
}

fn offline(dir: &Path) -> (Option<i32>, String) {
    let mut command = Command::new(CLUTCH);
    let output = command.args(["log", "replay", "--verify", "--shard", "0", "--dir"]).arg(dir).output();
    let output = output.expect("runs");
    (output.status.code(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
}

#[test]
fn what_verifies_is_red_when_something_differs() {
    let temp = tempfile::tempdir().expect("temporary directory");
    let mut place = Place::new(temp.path());
    place.cluster.fsck();
    let verify = ["log", "replay", "--verify", "--json", "--shard", "0"];
    assert_eq!(place.cluster.json(&verify)["verified"], true);
    assert_eq!(place.cluster.json(&["fsck", "--rescan", "--json"])["clean"], true);
    assert!(place.cluster.stop());
    assert_eq!(offline(&place.cluster.dir).0, Some(0));

    // A state that did not come from its log.
    let other = temp.path().join("other");
    assert!(
        Command::new("cp").arg("-r").arg(&place.cluster.dir).arg(&other).status().expect("runs").success()
    );
    tamper(&place.cluster.dir, Table::SUMS, |sum| {
        let mut sum = sum.to_vec();
        sum[3] ^= 4;
        Some(sum)
    });
    let (code, text) = offline(&place.cluster.dir);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("DIFFERENT"), "{text}");
    place.cluster.boot();
    let report = place.cluster.json(&verify);
    assert_eq!(report["verified"], false, "{report:#}");
    place.cluster.fails(1, &["log", "replay", "--verify", "--shard", "0"]);
    let report = place.cluster.json(&["fsck", "--rescan", "--json"]);
    assert_eq!(report["clean"], false, "{report:#}");
    assert!(place.cluster.stop());

    // An inode that is gone, though a name leads to it.
    place.cluster.dir = other;
    tamper(&place.cluster.dir, Table(64), |_| None);
    place.cluster.boot();
    let report = place.cluster.json(&["fsck", "--json"]);
    assert_eq!(report["clean"], false, "{report:#}");
    place.cluster.fails(1, &["fsck"]);
}

/// A generator for choices; the same for the same seed.
struct Choices(u64);

impl Choices {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit
    }
}

/// Every log replays whole, from its beginning or from a checkpoint that is kept.
fn replays(cluster: &Cluster, done: &[String]) {
    let report = cluster.json(&["log", "replay", "--all", "--verify", "--json"]);
    assert_eq!(report["verified"], true, "after {done:?}: {report:#}");
    let kept = cluster.json(&["log", "checkpoint", "ls", "--json"]);
    for log in kept["logs"].as_array().expect("logs") {
        assert!(!log["replays_from"].is_null(), "after {done:?}: {log:#}");
    }
}

#[test]
fn in_any_order_of_upkeep_every_log_replays_from_what_is_kept() {
    for seed in [1, 2] {
        let temp = tempfile::tempdir().expect("temporary directory");
        let arguments = ["--shards", "1", "--disks", "3", "--policy", "1+1", "--segment-mib", "1"];
        let mut cluster = Cluster::start(&temp.path().join("c"), &arguments);
        let (mut choices, mut done, mut trimmed) = (Choices(seed), Vec::<String>::new(), 0);
        while done.len() < 16 || trimmed == 0 {
            assert!(done.len() < 60, "nothing was trimmed: {done:?}");
            let which = if choices.below(3) == 0 { "--cdc" } else { "--all" };
            let step = match choices.below(12) {
                0..=3 => {
                    let mut bench = vec!["bench", "meta", "--ops", "create,unlink", "--files", "12000"];
                    bench.extend(["--clients", "2", "--depth", "256"]);
                    cluster.ok(&bench);
                    "work".into()
                }
                4 | 5 => {
                    cluster.ok(&["log", "checkpoint", which]);
                    format!("checkpoint {which}")
                }
                6 | 7 => {
                    // Refused where a log has no checkpoint.
                    let output = cluster.run(&["log", "trim", which]);
                    let text = String::from_utf8_lossy(&output.stderr);
                    assert!(output.status.success() || text.contains("no checkpoint"), "{done:?}: {text}");
                    let status = cluster.json(&["log", "checkpoint", "ls", "--json"]);
                    let begins =
                        status["logs"].as_array().expect("logs").iter().map(|l| l["log_first"].as_u64());
                    trimmed += u32::from(begins.flatten().any(|first| first > 1));
                    format!("trim {which}")
                }
                8 => {
                    assert!(cluster.stop());
                    cluster.boot();
                    "restart".into()
                }
                9 => {
                    cluster.kill();
                    cluster.boot();
                    "kill".into()
                }
                10 => {
                    assert!(cluster.stop());
                    let (code, text) = offline(&cluster.dir);
                    assert_eq!(code, Some(0), "after {done:?}: {text}");
                    cluster.boot();
                    "offline".into()
                }
                _ => {
                    replays(&cluster, &done);
                    "replay".into()
                }
            };
            done.push(step);
        }
        replays(&cluster, &done);
        cluster.fsck();
        assert!(cluster.stop());
        let (code, text) = offline(&cluster.dir);
        assert_eq!(code, Some(0), "after {done:?}: {text}");
    }
}

#[test]
fn who_has_not_the_key_of_a_cluster_does_not_change_its_members() {
    let temporary = tempfile::tempdir().expect("a directory");
    let place = Place::new(temporary.path());
    let mut keys = vec![temporary.path().join("c/keys/cluster.key")];
    for (n, text) in [format!("1 {}\n", "ab".repeat(32)), "1 ab\n".into(), String::new()].iter().enumerate() {
        let path = temporary.path().join(format!("wrong{n}"));
        std::fs::write(&path, text).expect("written");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("changed");
        keys.push(path);
    }
    for line in ["move-leader --to 2 --all", "add-replica 2 --cdc", "remove-node 1"] {
        let said: Vec<String> = keys
            .iter()
            .map(|key| {
                let (code, said) = place.run(&format!("cluster {line} --key {}", key.display()));
                assert_ne!(code, Some(0), "{line}: a log of one member keeps that");
                said
            })
            .collect();
        let is_refused = |said: &String| said.contains("is not this cluster's");
        // A change that comes to nothing is not even tried.
        assert!(!is_refused(&said[0]), "{line}: {}", said[0]);
        assert!(
            is_refused(&said[1]) || said[1].contains("no voter") || said[1] == said[0],
            "{line}: {}",
            said[1]
        );
        assert!(said[2].contains("64 hexadecimal digits"), "{line}: {}", said[2]);
        assert!(said[3].contains("holds no key"), "{line}: {}", said[3]);
    }
    let key = &keys[1];
    let (_, said) = place.run(&format!("cluster add-replica 2 --cdc --key {}", key.display()));
    assert!(said.contains("is not this cluster's"), "{said}");
    place.cluster.ok(&["fs", "ls", "/"]);
}

/// In a build that has planted bugs, each of these tools' makes the test fail that is there for it.
#[cfg(feature = "mutants")]
#[test]
fn planted_bugs_of_tools_are_found() {
    let this = std::env::current_exe().expect("a path");
    let mut missed = Vec::new();
    for (mutant, checkers) in clutch_proto::mutants::Mutant::ALL {
        let ["tools", test] = checkers else { continue };
        let output = Command::new(&this)
            .args(["--exact", test])
            .env("CLUTCH_PLANT", format!("{mutant:?}"))
            .output()
            .expect("runs");
        let text = String::from_utf8_lossy(&output.stdout);
        // Exactly one test ran, and it failed.
        if output.status.success() || !text.contains("0 passed; 1 failed") {
            missed.push(format!("{mutant:?} is not found by {test}: {text}"));
        }
    }
    assert!(missed.is_empty(), "{missed:#?}");
}
