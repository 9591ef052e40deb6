//! Policies, contents that are written over in place, and space that comes back, at the command line.

mod support;

use std::path::Path;

use support::{Cluster, noise};

/// Grants that end soon, and no collector but the one that is asked for.
const SHORT: &[&str] =
    &["--grant-s", "1", "--clock-skew-s", "0", "--unfinished-s", "2", "--collect-every-s", "0"];

/// Blocks of which a disk's segments say that they are there and not that they are gone. None of these files is large enough for blocks
/// in files of their own, or for segments that are moved.
fn blocks_on_disks(dir: &Path) -> usize {
    let mut blocks = 0;
    for disk in std::fs::read_dir(dir.join("blocks")).expect("reads") {
        let segment = disk.expect("an entry").path().join("packed/00000001.pack");
        let bytes = std::fs::read(segment).unwrap_or_default();
        let records = |magic: &[u8; 4]| bytes.chunks(8).filter(|record| record.starts_with(magic)).count();
        blocks += records(b"CBLK") - records(b"CDED");
    }
    blocks
}

/// Collects until nothing has to wait any more.
fn collect_all(cluster: &Cluster) -> serde_json::Value {
    for _ in 0..100 {
        let done = cluster.json(&["collect", "--once", "--json"]);
        assert_eq!(done["failures"].as_array().map(Vec::len), Some(0), "{done}");
        if done["too_early"] == 0 {
            return done;
        }
        // What has to wait has to wait for a clock, and nothing shows it sooner.
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    panic!("spans have to wait for ever");
}

#[test]
fn after_deleting_everything_nothing_is_left() {
    let temp = tempfile::tempdir().expect("temporary directory");
    let cluster = Cluster::start(&temp.path().join("c"), SHORT);
    let tree = temp.path().join("tree");
    for n in 0..20 {
        let dir = tree.join(format!("d{}", n % 4)).join(format!("e{n}"));
        std::fs::create_dir_all(&dir).expect("makes");
        std::fs::write(dir.join("large"), noise(60_000 + n, n as u64)).expect("writes");
        std::fs::write(dir.join("small"), noise(10 + n, n as u64)).expect("writes");
    }
    let tree = tree.to_str().expect("text");
    cluster.ok(&["fs", "put", "-r", tree, "/"]);
    cluster.ok(&["fs", "put", "-r", tree, "/"]);
    cluster.ok(&["fs", "mv", "/tree/d0/e0/large", "/tree/d1/e1/large"]);
    cluster.ok(&["fs", "rm", "-r", "/tree"]);
    // Kept for a week where nobody says otherwise.
    let done = cluster.json(&["collect", "--once", "--json"]);
    assert_eq!((done["files"].as_u64(), done["spans"].as_u64()), (Some(0), Some(0)), "{done}");
    assert!(blocks_on_disks(&cluster.dir) > 0);
    cluster.ok(&["fs", "policy", "set", "/", "--keep-age", "0s"]);
    collect_all(&cluster);
    let report = cluster.json(&["fsck", "--json"]);
    assert_eq!(report["clean"], true, "{report:#}");
    let counts = &report["counts"];
    for what in ["edges", "past_edges", "contents", "spans", "blocks"] {
        assert_eq!(counts[what], 0, "{what}: {report:#}");
    }
    assert_eq!(counts["inodes"], 1, "the root is left: {report:#}");
    assert_eq!(blocks_on_disks(&cluster.dir), 0);
    assert!(cluster.ok(&["collect", "--once"]).contains("erased 0 blocks"));
}

#[test]
fn contents_are_written_over_and_come_back() {
    let temp = tempfile::tempdir().expect("temporary directory");
    let cluster = Cluster::start(&temp.path().join("c"), SHORT);
    let local = |name: &str, bytes: &[u8]| {
        let path = temp.path().join(name);
        std::fs::write(&path, bytes).expect("writes");
        path.to_str().expect("text").to_owned()
    };
    let mut expected = noise(200_000, 1);
    cluster.ok(&["fs", "put", &local("whole", &expected), "/f"]);
    let id = cluster.json(&["fs", "stat", "--json", "/f"])["id"].clone();
    let fetch = || {
        let to = temp.path().join("fetched");
        cluster.ok(&["fs", "get", "/f", to.to_str().expect("text")]);
        std::fs::read(to).expect("reads")
    };
    let first = expected.clone();
    let part = noise(30_000, 2);
    cluster.ok(&["fs", "write", "--offset", "50000", &local("part", &part), "/f"]);
    expected[50_000..80_000].copy_from_slice(&part);
    assert!(fetch() == expected);
    assert_eq!(cluster.json(&["fs", "stat", "--json", "/f"])["id"], id, "it stays the same file");
    cluster.ok(&["fs", "truncate", "60000", "/f"]);
    assert!(fetch() == expected[..60_000]);
    cluster.ok(&["fs", "truncate", "61000", "/f"]);
    assert!(fetch() == [&expected[..60_000], &[0; 1000]].concat());
    cluster.ok(&["fs", "write", "--truncate", &local("few", b"few"), "/f"]);
    assert!(fetch() == b"few");
    cluster.ok(&["fs", "write", "--offset", "10", &local("far", b"far"), "/f"]);
    assert!(fetch() == b"few\0\0\0\0\0\0\0far");
    let versions = cluster.json(&["fs", "versions", "--json", "/f"]);
    let past = versions["past"].as_array().expect("past").clone();
    assert_eq!(past.len(), 5, "{versions}");
    cluster.ok(&["fs", "restore", "/f", "--ended", &past[0]["ended"].to_string()]);
    assert!(fetch() == first);
    cluster.ok(&["fs", "restore", "/f"]);
    assert!(fetch() == b"few\0\0\0\0\0\0\0far", "the newest past one is what was there before");
    assert!(cluster.fails(1, &["fs", "restore", "/f", "--ended", "1"]).contains("no such earlier content"));
    assert!(cluster.fails(1, &["fs", "write", &local("x", b"x"), "/nowhere"]).contains("not found"));
    assert!(cluster.fails(1, &["fs", "truncate", "0", "/"]).contains("not a file"));
    // Sharing what was not written anew must not outlive, or be outlived by, what it is shared with.
    cluster.ok(&["fs", "policy", "set", "/", "--keep-age", "0s"]);
    cluster.ok(&["fs", "write", "--offset", "3", &local("y", &noise(5000, 9)), "/f"]);
    collect_all(&cluster);
    assert!(fetch() == [b"few", &noise(5000, 9)[..]].concat());
    assert_eq!(cluster.json(&["fs", "versions", "--json", "/f"])["past"].as_array().map(Vec::len), Some(0));
    cluster.fsck();
}

#[test]
fn policies_are_set_inherited_and_shown() {
    let temp = tempfile::tempdir().expect("temporary directory");
    let cluster = Cluster::start(&temp.path().join("c"), SHORT);
    cluster.ok(&["fs", "mkdir", "-p", "/a/b"]);
    let get = |path: &str| cluster.json(&["fs", "policy", "get", "--json", path]);
    let default = get("/a/b");
    assert_eq!(default["keep"]["age_ms"], 604_800_000u64);
    assert_eq!(default["spans"]["classes"][0]["data_blocks"], 1, "small spans are mirrored");
    assert_eq!(default["spans"]["classes"][1]["data_blocks"], 4);
    cluster.ok(&[
        "fs",
        "policy",
        "set",
        "/a",
        "--keep-age",
        "30d",
        "--keep-versions",
        "3",
        "--cell-size",
        "64K",
    ]);
    cluster.ok(&["fs", "policy", "set", "/a/b", "--spans", "64K=1+2,1M=2+1"]);
    let both = get("/a/b");
    assert_eq!((both["keep"]["versions"].as_u64(), &both["keep"]["from"]), (Some(3), &"inherited".into()));
    assert_eq!(
        (both["spans"]["classes"][0]["parity_blocks"].as_u64(), &both["spans"]["from"]),
        (Some(2), &"set here".into())
    );
    assert_eq!(both["cell_size"]["bytes"], 65_536);
    assert!(cluster.ok(&["fs", "policy", "get", "/a"]).contains("30d"));
    // New files follow: a small one is mirrored, a large one is cut at the last size.
    let file = temp.path().join("file");
    let count = || cluster.json(&["fsck", "--json"])["counts"].clone();
    std::fs::write(&file, noise(10_000, 1)).expect("writes");
    cluster.ok(&["fs", "put", file.to_str().expect("text"), "/a/b/small"]);
    assert_eq!((count()["spans"].as_u64(), count()["blocks"].as_u64()), (Some(1), Some(3)));
    std::fs::write(&file, noise(3 << 20, 1)).expect("writes");
    cluster.ok(&["fs", "put", file.to_str().expect("text"), "/a/b/large"]);
    assert_eq!((count()["spans"].as_u64(), count()["blocks"].as_u64()), (Some(4), Some(12)));
    // What is smaller lies in the metadata, unless the directory says otherwise.
    for (name, inline_max, spans) in
        [("tiny", None, 4), ("tiny-in-blocks", Some("0"), 5), ("small-inline", Some("16K"), 5)]
    {
        let bytes = noise(if name == "small-inline" { 10_000 } else { 3000 }, 2);
        std::fs::write(&file, &bytes).expect("writes");
        if let Some(inline_max) = inline_max {
            cluster.ok(&["fs", "policy", "set", "/a/b", "--inline-max", inline_max]);
        }
        let path = format!("/a/b/{name}");
        cluster.ok(&["fs", "put", file.to_str().expect("text"), &path]);
        assert_eq!(count()["spans"].as_u64(), Some(spans), "{name}");
        let back = temp.path().join("back");
        cluster.ok(&["fs", "get", &path, back.to_str().expect("text")]);
        assert!(std::fs::read(&back).expect("reads") == bytes);
        std::fs::remove_file(back).expect("removes");
    }
    assert_eq!(get("/a/b")["inline"]["size_max"], 16_384);
    cluster.ok(&["fs", "policy", "set", "/a/b", "--inherit", "inline-max"]);
    assert_eq!(
        (get("/a/b")["inline"]["size_max"].as_u64(), &get("/a/b")["inline"]["from"]),
        (Some(4096), &"default".into())
    );
    cluster.ok(&["fs", "policy", "set", "/a/b", "--inherit", "spans"]);
    assert_eq!(get("/a/b")["spans"]["from"], "default");
    for (words, arguments) in [
        ("nothing to set", &["fs", "policy", "set", "/a"][..]),
        ("order of their sizes", &["fs", "policy", "set", "/a", "--spans", "1M=2+1,64K=1+2"]),
        ("not a directory", &["fs", "policy", "set", "/a/b/small", "--keep-age", "1d"]),
        ("versions", &["fs", "policy", "set", "/a", "--keep-versions", "100000"]),
        ("255 to 65536", &["fs", "policy", "set", "/a", "--inline-max", "128K"]),
    ] {
        let text = cluster.fails(1, arguments);
        assert!(text.contains(words), "{arguments:?} says {text:?}, not {words:?}");
    }
    for arguments in [
        &["fs", "policy", "set", "/a", "--keep-age", "soon"][..],
        &["fs", "policy", "set", "/a", "--spans", "1M=0+1"],
        &["fs", "policy", "set", "/a", "--cell-size", "9G"],
    ] {
        cluster.fails(2, arguments);
    }
    cluster.fsck();
}

#[test]
fn removed_directories_come_back() {
    let temp = tempfile::tempdir().expect("temporary directory");
    let cluster = Cluster::start(&temp.path().join("c"), SHORT);
    cluster.ok(&["fs", "mkdir", "/d"]);
    let file = temp.path().join("file");
    std::fs::write(&file, noise(10_000, 4)).expect("writes");
    cluster.ok(&["fs", "put", file.to_str().expect("text"), "/d/f"]);
    cluster.ok(&["fs", "rm", "-r", "/d"]);
    cluster.ok(&["fs", "undelete", "/d"]);
    assert_eq!(cluster.ok(&["fs", "ls", "/d"]), "", "what it held is in its history");
    cluster.ok(&["fs", "undelete", "/d/f"]);
    let back = temp.path().join("back");
    cluster.ok(&["fs", "get", "/d/f", back.to_str().expect("text")]);
    assert!(std::fs::read(back).expect("reads") == noise(10_000, 4));
    cluster.ok(&["fs", "rm", "-r", "/d"]);
    cluster.ok(&["fs", "undelete", "/d", "/other"]);
    assert_eq!(cluster.ok(&["fs", "ls", "/"]), "other\n");
    cluster.fsck();
}
