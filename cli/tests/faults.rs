//! Lost disks, flipped bytes, killed processes: what was acknowledged is there and right, or an error says so.

mod support;

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader},
    path::Path,
    process::Stdio,
    time::Duration,
};

use support::{Cluster, files_below, noise};

/// Files of several sizes, stored.
fn store_files(cluster: &Cluster, temp: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut stored = BTreeMap::new();
    for (i, len) in [100, 300, 5_000, 70_000, 1_000_000, 9_000_000].into_iter().enumerate() {
        let (path, bytes) = (temp.join(format!("f{i}")), noise(len, i as u64 + 1));
        std::fs::write(&path, &bytes).expect("writes");
        cluster.ok(&["fs", "put", path.to_str().expect("text"), &format!("/f{i}")]);
        stored.insert(format!("/f{i}"), bytes);
    }
    stored
}

fn assert_reads(cluster: &Cluster, stored: &BTreeMap<String, Vec<u8>>, when: &str) {
    for (path, bytes) in stored {
        let output = cluster.run(&["fs", "cat", path]);
        assert!(output.status.success(), "{when}: {path}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(output.stdout == *bytes, "{when}: {path} has other bytes");
    }
}

#[test]
fn any_two_disks_of_4_plus_2_may_be_emptied() {
    let temp = tempfile::tempdir().expect("temporary directory");
    let cluster = Cluster::start(&temp.path().join("c"), &["--disks", "6", "--shards", "1"]);
    let stored = store_files(&cluster, temp.path());
    let disk = |n: usize| cluster.dir.join("blocks").join(n.to_string());
    let aside = |n: usize| temp.path().join(format!("aside{n}"));
    let take = |n: usize| {
        std::fs::rename(disk(n), aside(n)).expect("moved aside");
        std::fs::create_dir(disk(n)).expect("an empty disk");
    };
    let give_back = |n: usize| {
        std::fs::remove_dir_all(disk(n)).expect("removed");
        std::fs::rename(aside(n), disk(n)).expect("moved back");
    };
    for a in 0..6 {
        for b in a + 1..6 {
            take(a);
            take(b);
            assert_reads(&cluster, &stored, &format!("without disks {a} and {b}"));
            give_back(a);
            give_back(b);
        }
    }
    (0..3).for_each(take);
    for (path, bytes) in &stored {
        let output = cluster.run(&["fs", "cat", path]);
        if bytes.len() <= 255 {
            assert!(output.status.success() && output.stdout == *bytes, "inline bytes need no disk");
            continue;
        }
        let text = String::from_utf8_lossy(&output.stderr);
        if bytes.len() < 4 * 4096 && output.status.success() {
            // It fills fewer than all four data blocks, and those are left.
            assert!(output.stdout == *bytes, "{path}: wrong bytes");
            continue;
        }
        assert_eq!(output.status.code(), Some(1), "{path}: {text}");
        assert!(text.contains("span ") && text.contains("on service "), "{path}: {text}");
        assert!(bytes.starts_with(&output.stdout), "{path}: wrong bytes");
    }
    (0..3).for_each(give_back);
    assert_reads(&cluster, &stored, "with all disks again");
    cluster.wait_until_over("missing or empty");
    // The registry hears of their room with the next round.
    cluster.wait_until_over("can be used");
    cluster.fsck();
}

/// Flips bytes of a file's blocks, one of which lies on each of three disks.
fn flip_blocks(bytes: &[u8], places: &[usize]) {
    let temp = tempfile::tempdir().expect("temporary directory");
    let cluster =
        Cluster::start(&temp.path().join("c"), &["--disks", "3", "--shards", "1", "--policy", "2+1"]);
    let path = temp.path().join("f");
    std::fs::write(&path, bytes).expect("writes");
    cluster.ok(&["fs", "put", path.to_str().expect("text"), "/f"]);
    let mut blocks = files_below(&cluster.dir.join("blocks"));
    blocks.retain(|path| !path.ends_with("label"));
    assert_eq!(blocks.len(), 3, "{blocks:?}");
    let flip = |path: &Path, at: usize| {
        let mut image = std::fs::read(path).expect("reads");
        image[at] ^= 0x20;
        std::fs::write(path, image).expect("writes");
    };
    for block in &blocks {
        let len = std::fs::metadata(block).expect("there").len() as usize;
        for at in places.iter().copied().chain([len - 1]) {
            flip(block, at);
            let output = cluster.run(&["fs", "cat", "/f"]);
            assert!(
                output.status.success() && output.stdout == bytes,
                "a flip at {at} of {}",
                block.display()
            );
            flip(block, at);
        }
    }
    let last = *places.last().expect("some");
    flip(&blocks[0], last);
    flip(&blocks[1], last);
    let output = cluster.run(&["fs", "cat", "/f"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("on service "));
}

#[test]
fn flipped_bytes_in_blocks_are_corrected_or_refused() {
    // Header, page table and data, with their borders: of a block in a file of its own, and of one in a segment.
    flip_blocks(&noise(600_000, 5), &[0, 8, 24, 40, 55, 100, 4096, 4099, 4200, 8191, 8192, 9000, 12_287]);
    flip_blocks(&noise(20_000, 5), &[0, 8, 63, 64, 80, 119, 120, 131, 132, 200, 4200, 7000]);
}

#[test]
fn a_disk_that_takes_no_writes_is_avoided() {
    let temp = tempfile::tempdir().expect("temporary directory");
    let cluster =
        Cluster::start(&temp.path().join("c"), &["--disks", "4", "--shards", "1", "--policy", "2+1"]);
    // All the metadata are as they should be; the disks that are gone are named.
    let only_disks_are_missed = |disks: usize| {
        let report = cluster.json(&["fsck", "--json"]);
        let violations = report["violations"].as_array().expect("a list");
        assert_eq!(violations.len(), disks, "{report:#}");
        assert!(violations.iter().all(|v| v.as_str().is_some_and(|v| v.starts_with("disk "))), "{report:#}");
    };
    // A file where the disk's directory was: every write there fails.
    let broken = cluster.dir.join("blocks").join("2");
    std::fs::remove_dir_all(&broken).expect("removed");
    std::fs::write(&broken, b"not a directory").expect("writes");
    let stored = store_files(&cluster, temp.path());
    assert_reads(&cluster, &stored, "with one broken disk");
    only_disks_are_missed(1);
    // With two of four broken, three cannot be found, and the error says why.
    let broken = cluster.dir.join("blocks").join("0");
    std::fs::remove_dir_all(&broken).expect("removed");
    std::fs::write(&broken, b"not a directory").expect("writes");
    let text = cluster.fails(1, &["fs", "put", temp.path().join("f4").to_str().expect("text"), "/too-few"]);
    assert!(text.contains("no space") && text.contains("service "), "{text}");
    cluster.fails(1, &["fs", "stat", "/too-few"]);
    only_disks_are_missed(2);
}

/// Kills the cluster in the middle of a `put -r`, again and again.
#[test]
fn kill_9_in_the_middle_of_a_put_loses_nothing_acknowledged() {
    const TIMES: u64 = 20;
    let temp = tempfile::tempdir().expect("temporary directory");
    let source = temp.path().join("source");
    let mut contents = BTreeMap::new();
    for i in 0..400usize {
        let dir = source.join(format!("d{}", i % 20));
        std::fs::create_dir_all(&dir).expect("made");
        let bytes = noise([0, 40, 200, 900, 5_000, 60_000][i % 6], i as u64);
        std::fs::write(dir.join(format!("f{i}")), &bytes).expect("writes");
        contents.insert(format!("d{}/f{i}", i % 20), bytes);
    }
    let mut cluster = Cluster::start(&temp.path().join("c"), &["--disks", "6", "--shards", "2"]);
    let mut acknowledged_in_all = 0;
    for round in 0..TIMES {
        let target = format!("/round{round}");
        let mut put = cluster
            .command(&["--patience-s", "2", "fs", "put", "-r", "-v", source.to_str().expect("text"), &target])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("starts");
        let mut lines = BufReader::new(put.stdout.take().expect("piped")).lines();
        let mut acknowledged = Vec::new();
        // Another moment in each round: after so many files.
        for line in lines.by_ref().take(round as usize * 17 + 1) {
            acknowledged.push(line.expect("a line"));
        }
        std::thread::sleep(Duration::from_millis(round % 7));
        cluster.kill();
        acknowledged.extend(lines.map(|l| l.expect("a line")));
        put.wait().expect("reaped");
        cluster.boot();
        cluster.fsck();
        acknowledged_in_all += acknowledged.len();
        let back = temp.path().join(format!("back{round}"));
        cluster.ok(&["fs", "get", "-r", &target, back.to_str().expect("text")]);
        for path in &acknowledged {
            let name = path.strip_prefix(&format!("{target}/")).expect("below the target");
            let bytes =
                std::fs::read(back.join(name)).unwrap_or_else(|e| panic!("round {round}: {path}: {e}"));
            assert!(bytes == contents[name], "round {round}: {path} was acknowledged and has other bytes");
        }
        for file in files_below(&back) {
            let name = file.strip_prefix(&back).expect("below").to_str().expect("text").to_owned();
            assert!(
                std::fs::read(&file).expect("reads") == contents[&name],
                "round {round}: {name} is half there"
            );
        }
        std::fs::remove_dir_all(&back).expect("removed");
    }
    assert!(acknowledged_in_all > TIMES as usize * 50, "the kills came too early to show anything");
    let replay = cluster.json(&["log", "replay", "--all", "--verify", "--json"]);
    assert_eq!(replay["verified"], true, "{replay:#}");
}
