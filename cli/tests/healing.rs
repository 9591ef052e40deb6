//! Disks that are emptied, removed, damaged and exchanged for empty ones, at the command line.

mod support;

use std::{
    collections::BTreeMap,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use support::{Cluster, files_below, noise};

const ARGUMENTS: &[&str] =
    &["--disks", "8", "--shards", "2", "--grant-s", "1", "--clock-skew-s", "0", "--collect-every-s", "0"];

/// Files of several sizes, stored.
fn store_files(cluster: &Cluster, temp: &Path) -> BTreeMap<String, Vec<u8>> {
    let tree = temp.join("tree");
    let mut stored = BTreeMap::new();
    for n in 0..30u64 {
        let dir = tree.join(format!("d{}", n % 5));
        std::fs::create_dir_all(&dir).expect("makes");
        let bytes = noise([6_000, 40_000, 200_000, 1_500_000, 4_000_000][n as usize % 5] + n as usize, n + 1);
        std::fs::write(dir.join(format!("f{n}")), &bytes).expect("writes");
        stored.insert(format!("/tree/d{}/f{n}", n % 5), bytes);
    }
    cluster.ok(&["fs", "put", "-r", tree.to_str().expect("text"), "/"]);
    stored
}

fn assert_reads(cluster: &Cluster, stored: &BTreeMap<String, Vec<u8>>, when: &str) {
    for (path, bytes) in stored {
        let output = cluster.run(&["fs", "cat", path]);
        assert!(output.status.success(), "{when}: {path}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(output.stdout == *bytes, "{when}: {path} has other bytes");
    }
}

/// Every block of every span is there and as it was written. What the nodes say of disks is another matter.
fn assert_whole(cluster: &Cluster, path: Option<&str>) {
    let arguments: Vec<&str> = ["fsck", "--json", "--data"].into_iter().chain(path).collect();
    let output = cluster.run(&arguments);
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).expect("a document");
    let data = &found["data"];
    let lacking = ["reduced", "none", "unreadable", "damaged"].map(|key| data[key].as_u64());
    assert_eq!(lacking, [Some(0); 4], "{found}");
    assert_ne!(data["checked"], 0, "{found}");
}

/// The services with their states, in the order of their ids.
fn services(status: &serde_json::Value) -> Vec<(String, String)> {
    let text = |service: &serde_json::Value, key: &str| service[key].as_str().expect("text").to_owned();
    let services = status["services"].as_array().expect("a list").iter();
    services.map(|service| (text(service, "id"), text(service, "state"))).collect()
}

fn blocks_of(status: &serde_json::Value, id: &str) -> u64 {
    let services = status["services"].as_array().expect("a list");
    let service = services.iter().find(|service| service["id"] == id).expect("is listed");
    service["blocks"].as_u64().expect("a number")
}

#[test]
fn a_disk_is_emptied_and_removed_and_nothing_is_lost() {
    let temp = tempfile::tempdir().expect("temporary directory");
    let cluster = Cluster::start(&temp.path().join("c"), ARGUMENTS);
    let stored = store_files(&cluster, temp.path());
    let before = cluster.json(&["blocks", "status", "--json"]);
    let all = services(&before);
    assert!(all.iter().all(|(_, state)| state == "good"), "{before}");
    let (id, held) = (&all[0].0, blocks_of(&before, &all[0].0));
    assert!(
        held > 0 && before["redundancy"]["reduced"] == 0 && before["redundancy"]["full"] != 0,
        "{before}"
    );
    let (logical, physical) = (before["logical_bytes"].as_u64(), before["physical_bytes"].as_u64());
    assert!(physical > logical, "{before}");
    assert_eq!(logical, Some(stored.values().map(|bytes| bytes.len() as u64).sum()));

    assert!(cluster.fails(1, &["blocks", "remove", id]).contains("drain"));
    assert!(cluster.fails(2, &["blocks", "remove", "nonsense"]).contains("hexadecimal"));
    assert!(cluster.fails(1, &["blocks", "drain", "123"]).contains("blocks status"));
    let moved = cluster.json(&["blocks", "drain", id, "--json"]);
    // The nodes have moved the rest.
    assert!(moved["spans_left"] == 0 && moved["moved"].as_u64() <= Some(held), "{moved}");
    let after = cluster.json(&["blocks", "status", "--json"]);
    assert_eq!(blocks_of(&after, id), 0, "{after}");
    assert_eq!(services(&after)[0].1, "draining");
    assert_eq!(after["redundancy"]["full"], before["redundancy"]["full"]);
    cluster.ok(&["blocks", "remove", id]);
    assert!(cluster.fails(1, &["blocks", "drain", id]).contains("removed for good"));
    assert_eq!(services(&cluster.json(&["blocks", "status", "--json"]))[0].1, "gone");
    std::fs::remove_dir_all(directory_of(&cluster, id)).expect("removed");
    assert_reads(&cluster, &stored, "without the disk");
    assert_whole(&cluster, Some("/"));
    // One that is to be emptied by mistake takes blocks again.
    let other = &all[1].0;
    cluster.ok(&["blocks", "drain", other]);
    cluster.ok(&["blocks", "drain", other, "--cancel"]);
    assert_eq!(services(&cluster.json(&["blocks", "status", "--json"]))[1].1, "good");
}

/// Where the disk of a service is, as its label says.
fn directory_of(cluster: &Cluster, id: &str) -> PathBuf {
    let disks = (0..8).map(|n| cluster.dir.join(format!("blocks/{n}")));
    let is_of =
        |disk: &PathBuf| std::fs::read_to_string(disk.join("label")).is_ok_and(|label| label.contains(id));
    disks.into_iter().find(is_of).expect("has a directory")
}

/// Flips a bit in every file of a disk that holds blocks, in several places.
fn flip_bits(disk: &Path) {
    for path in files_below(disk) {
        let name = path.file_name().and_then(|name| name.to_str()).expect("text");
        if ["label", "index", "scrub"].contains(&name) {
            continue;
        }
        let file = std::fs::File::options().read(true).write(true).open(&path).expect("opens");
        let len = file.metadata().expect("metadata").len();
        for part in 1..4 {
            let (at, mut byte) = (len * part / 4, [0]);
            file.read_exact_at(&mut byte, at).expect("reads");
            file.write_all_at(&[byte[0] ^ 16], at).expect("writes");
        }
    }
}

#[test]
fn a_scrub_finds_what_rots_and_what_is_missing_and_writes_it_elsewhere() {
    let temp = tempfile::tempdir().expect("temporary directory");
    let cluster = Cluster::start(&temp.path().join("c"), ARGUMENTS);
    let stored = store_files(&cluster, temp.path());
    assert_whole(&cluster, None);
    flip_bits(&cluster.dir.join("blocks/3"));
    let found = cluster.run(&["fsck", "--data", "/tree"]);
    let text = String::from_utf8_lossy(&found.stdout);
    assert!(found.status.code() == Some(1) && text.contains("on service"), "{text}");
    let whole = files_below(&cluster.dir.join("blocks/5"));
    let block = whole.iter().find(|path| {
        !path.starts_with(cluster.dir.join("blocks/5/packed"))
            && !path.ends_with("label")
            && !path.ends_with("scrub")
    });
    std::fs::remove_file(block.expect("a block of its own")).expect("removed");
    let scrubbed = cluster.json(&["blocks", "scrub", "--now", "--wait", "--json"]);
    assert!(scrubbed["damaged"].as_u64() > Some(1), "{scrubbed}");
    assert_whole(&cluster, None);
    let again = cluster.json(&["blocks", "scrub", "--now", "--wait", "--json"]);
    assert_eq!((again["damaged"].as_u64(), again["moved"].as_u64()), (Some(0), Some(0)), "{again}");
    assert_reads(&cluster, &stored, "after the scrub");
}

/// Asks how the disks are until that is so.
fn await_status(
    cluster: &Cluster,
    what: &str,
    is_so: impl Fn(&serde_json::Value) -> bool,
) -> serde_json::Value {
    for _ in 0..1200 {
        let output = cluster.run(&["blocks", "status", "--json"]);
        let status: serde_json::Value = serde_json::from_slice(&output.stdout).expect("a document");
        if is_so(&status) {
            return status;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    panic!("it does not come to that: {what}: {}", cluster.json(&["blocks", "status", "--json"]));
}

#[test]
fn a_disk_that_stays_away_is_rebuilt_without_a_command_and_used_when_it_is_back() {
    let temp = tempfile::tempdir().expect("temporary directory");
    let arguments: Vec<&str> = ARGUMENTS.iter().copied().chain(["--rebuild-after-s", "3"]).collect();
    let cluster = Cluster::start(&temp.path().join("c"), &arguments);
    let stored = store_files(&cluster, temp.path());
    let all = cluster.json(&["blocks", "status", "--json"])["redundancy"]["full"].clone();
    let (disk, aside) = (cluster.dir.join("blocks/2"), temp.path().join("aside"));
    std::fs::rename(&disk, &aside).expect("moved");
    let one_is = |status: &serde_json::Value, state: &str| {
        services(status).iter().filter(|(_, found)| found == state).count() == 1
    };
    let named = await_status(&cluster, "it is condemned", |status| one_is(status, "condemned"));
    let services_of = named["services"].as_array().expect("a list");
    let bad = services_of.iter().find(|service| service["state"] == "condemned").expect("one");
    assert!(bad["directory"].as_str().is_some_and(|dir| Path::new(dir) == disk), "{bad}");
    assert!(bad["reason"].as_str().is_some_and(|reason| reason.contains("label")), "{bad}");
    await_status(&cluster, "all is rebuilt", |status| {
        let rebuilding = &status["redundancy"]["rebuilding"];
        status["redundancy"]["full"] == all
            && rebuilding["blocks_left"] == 0
            && rebuilding["by_nodes"] == true
    });
    assert_whole(&cluster, None);
    std::fs::rename(&aside, &disk).expect("moved back");
    let are_good = |status: &serde_json::Value| services(status).iter().all(|(_, state)| state == "good");
    await_status(&cluster, "it is used again", are_good);
    assert_reads(&cluster, &stored, "with the disk that is back");
    assert_whole(&cluster, None);
}

#[test]
fn what_is_read_in_vain_is_written_elsewhere_with_all_that_the_disk_has_lost() {
    let temp = tempfile::tempdir().expect("temporary directory");
    let arguments: Vec<&str> = ARGUMENTS.iter().copied().chain(["--scrub-every-s", "0"]).collect();
    let cluster = Cluster::start(&temp.path().join("c"), &arguments);
    let stored = store_files(&cluster, temp.path());
    let disk = cluster.dir.join("blocks/4");
    let of_their_own = files_below(&disk).into_iter().filter(|path| {
        let below = path.strip_prefix(&disk).expect("below");
        below.components().count() == 2 && !below.starts_with("packed")
    });
    let lost = of_their_own.map(|path| std::fs::remove_file(path).expect("removed")).count();
    assert!(lost > 3, "{lost}");
    assert_reads(&cluster, &stored, "without them");
    await_status(&cluster, "all of them are found", |status| {
        let services = status["services"].as_array().expect("a list").iter();
        let repaired: u64 = services.filter_map(|service| service["scrub"]["repaired"].as_u64()).sum();
        repaired == lost as u64
    });
    assert_whole(&cluster, None);
    assert_reads(&cluster, &stored, "with others in their place");
}

#[test]
fn a_disk_that_is_taken_away_is_named_and_rebuilt() {
    let temp = tempfile::tempdir().expect("temporary directory");
    let cluster = Cluster::start(&temp.path().join("c"), ARGUMENTS);
    let stored = store_files(&cluster, temp.path());
    let disk = cluster.dir.join("blocks/2");
    std::fs::rename(&disk, temp.path().join("aside")).expect("moved");
    std::fs::create_dir(&disk).expect("an empty one");
    // Nodes look at their disks every two seconds.
    let mut status = serde_json::Value::Null;
    for _ in 0..600 {
        let output = cluster.run(&["blocks", "status", "--json"]);
        status = serde_json::from_slice(&output.stdout).expect("a document");
        if services(&status).iter().any(|(_, state)| state == "suspect") {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    let bad: Vec<String> =
        services(&status).into_iter().filter(|(_, state)| state == "suspect").map(|(id, _)| id).collect();
    assert_eq!(bad.len(), 1, "{status}");
    assert_ne!(status["redundancy"]["reduced"], 0, "{status}");
    let reasons: Vec<&str> =
        status["services"].as_array().expect("a list").iter().filter_map(|s| s["reason"].as_str()).collect();
    assert!(reasons.iter().any(|reason| !reason.is_empty()), "{status}");
    let moved = cluster.json(&["blocks", "drain", &bad[0], "--json"]);
    assert_eq!(moved["spans_left"], 0, "{moved}");
    cluster.ok(&["blocks", "remove", &bad[0]]);
    assert_whole(&cluster, None);
    assert_reads(&cluster, &stored, "after the rebuild");
    // What was put away is of no use any more, and does no harm.
    std::fs::remove_dir(&disk).expect("removed");
    std::fs::rename(temp.path().join("aside"), &disk).expect("moved back");
    assert_reads(&cluster, &stored, "with the disk of before");
    assert_whole(&cluster, None);
}

#[test]
fn a_cluster_that_is_killed_while_it_empties_a_disk_goes_on_and_loses_nothing() {
    let temp = tempfile::tempdir().expect("temporary directory");
    let mut cluster = Cluster::start(&temp.path().join("c"), ARGUMENTS);
    let stored = store_files(&cluster, temp.path());
    let before = cluster.json(&["blocks", "status", "--json"]);
    let (id, held) = (services(&before)[3].0.clone(), blocks_of(&before, &services(&before)[3].0));
    let (mut left, mut kills) = (held, 0);
    while left > 0 && kills < 5 {
        // Ends with the cluster that it asks.
        let mut drain = cluster.command(&["blocks", "drain", &id, "--bytes-per-s", "1000000"]);
        let quiet = std::process::Stdio::null;
        let mut drain = drain.stderr(quiet()).stdout(quiet()).spawn().expect("runs");
        let moved = await_status(&cluster, "some of it is moved", |status| blocks_of(status, &id) < left);
        cluster.kill();
        drain.kill().expect("killed");
        drain.wait().expect("ended");
        left = blocks_of(&moved, &id);
        kills += usize::from(left > 0);
        cluster.boot();
    }
    assert!(kills > 0, "no kill came in the middle of it");
    cluster.ok(&["collect", "--once"]);
    await_status(&cluster, "it is emptied", |status| blocks_of(status, &id) == 0);
    assert_whole(&cluster, None);
    assert_reads(&cluster, &stored, "after all kills");
    cluster.fsck();
    cluster.ok(&["blocks", "remove", &id]);
}
