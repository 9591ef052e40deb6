//! A person at the command line: every command, exit codes, JSON documents, errors, crashes.

mod support;

use std::process::Command;

use support::{CLUTCH, Cluster, noise};

#[test]
fn a_first_session() {
    let temp = tempfile::tempdir().expect("temporary directory");
    let mut cluster = Cluster::start(&temp.path().join("c"), &[]);
    let local = temp.path().join("local");
    std::fs::write(&local, b"hello\n").expect("writes");
    let local = local.to_str().expect("text");
    cluster.ok(&["fs", "mkdir", "-p", "/a/b/c"]);
    cluster.ok(&["fs", "mkdir", "-p", "/a/b/c"]);
    cluster.ok(&["fs", "put", local, "/a/file"]);
    cluster.ok(&["fs", "put", local, "/a/b"]);
    assert_eq!(cluster.ok(&["fs", "cat", "/a/file", "/a/b/local"]), "hello\nhello\n");
    assert_eq!(cluster.ok(&["fs", "ls", "/a"]), "b\nfile\n");
    assert!(cluster.ok(&["fs", "ls", "-l", "-R", "/"]).contains("-rw"));
    assert!(cluster.ok(&["fs", "tree", "/"]).contains("└── file"));
    cluster.ok(&["fs", "ln", "-s", "../file", "/a/b/link"]);
    let link = cluster.json(&["fs", "stat", "--json", "/a/b/link"]);
    assert_eq!((link["kind"].as_str(), link["target"].as_str()), (Some("symlink"), Some("../file")));
    cluster.ok(&["fs", "chmod", "600", "/a/file"]);
    cluster.ok(&["fs", "chown", "12:34", "/a/file"]);
    cluster.ok(&["fs", "touch", "-d", "2001-02-03T04:05:06Z", "/a/file"]);
    let stat = cluster.json(&["fs", "stat", "--json", "/a/file"]);
    assert_eq!(stat["mode"], "0600");
    assert_eq!((stat["uid"].as_u64(), stat["gid"].as_u64()), (Some(12), Some(34)));
    assert_eq!(stat["mtime"].as_str(), Some("981173106000000000"));
    cluster.ok(&["fs", "mv", "/a/file", "/a/b/c"]);
    cluster.ok(&["fs", "mv", "/a/b", "/moved"]);
    assert_eq!(cluster.ok(&["fs", "cat", "/moved/c/file"]), "hello\n");
    cluster.ok(&["fs", "rm", "/moved/c/file"]);
    let history = cluster.json(&["fs", "history", "--json", "/moved/c/file"]);
    assert_eq!(history["past"][0]["can_be_undeleted"], true);
    cluster.ok(&["fs", "undelete", "/moved/c/file"]);
    assert_eq!(cluster.ok(&["fs", "cat", "/moved/c/file"]), "hello\n");
    cluster.ok(&["fs", "touch", "/empty"]);
    assert_eq!(cluster.ok(&["fs", "cat", "/empty"]), "");
    let du = cluster.json(&["fs", "du", "--json", "/"]);
    assert!(du["files"].as_u64() >= Some(3), "{du}");
    assert!(du["physical_bytes"].as_u64() >= du["bytes"].as_u64() && du["bytes"] != 0, "{du}");
    cluster.ok(&["fs", "rm", "-r", "/moved"]);
    assert_eq!(cluster.json(&["status", "--json"])["ready"], true);
    assert!(cluster.json(&["log", "status", "--json"])["logs"].as_array().is_some_and(|l| l.len() == 6));
    cluster.fsck();
    assert!(cluster.ok(&["completions", "bash"]).contains("clutch"));
    assert!(cluster.ok(&["man"]).contains(".TH"));
    assert!(cluster.stop(), "Ctrl-C is a clean stop");
}

#[test]
fn refusals_have_clear_words_and_codes() {
    let temp = tempfile::tempdir().expect("temporary directory");
    let cluster = Cluster::start(&temp.path().join("c"), &["--disks", "3", "--shards", "2"]);
    let large = temp.path().join("large");
    std::fs::write(&large, noise(100_000, 1)).expect("writes");
    let large = large.to_str().expect("text");
    let name_256 = format!("/{}", "n".repeat(256));
    let name_255 = format!("/{}", "n".repeat(255));
    cluster.ok(&["fs", "touch", &name_255]);
    cluster.ok(&["fs", "mkdir", "/d"]);
    cluster.ok(&["fs", "touch", "/d/f"]);
    cluster.ok(&["fs", "mkdir", "/d/sub"]);
    for (words, arguments) in [
        ("not found", &["fs", "cat", "/nowhere"][..]),
        ("name too long", &["fs", "touch", &name_256]),
        ("exists", &["fs", "mkdir", "/d"]),
        ("not a directory", &["fs", "ls", "/d/f/g"]),
        ("is a directory", &["fs", "cat", "/d"]),
        ("is a directory", &["fs", "rm", "/d"]),
        ("no space", &["fs", "put", large, "/large"]),
        ("own ancestor", &["fs", "mv", "/d", "/d/sub/x"]),
        ("root directory", &["fs", "rm", "-r", "/"]),
        ("already", &["fs", "ln", "-s", "x", "/d/f"]),
        ("nothing that was deleted", &["fs", "undelete", "/d/f"]),
    ] {
        let text = cluster.fails(1, arguments);
        assert!(text.to_lowercase().contains(words), "{arguments:?} says {text:?}, not {words:?}");
    }
    for arguments in [
        &["fs", "ls", "relative"][..],
        &["fs", "chmod", "9", "/d"],
        &["nonsense"],
        &["up", "--shards", "3"],
        &["up", "--policy", "0+2"],
        &["up", "--listen", "here"],
        &["bench", "meta", "--ops", "dance"],
        &["log", "replay", "--verify"],
    ] {
        cluster.fails(2, arguments);
    }
    let second = Command::new(CLUTCH).args(["up", "--dir"]).arg(&cluster.dir).output().expect("runs");
    assert_eq!(second.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&second.stderr).contains("in use"));
    let nobody = Command::new(CLUTCH)
        .args(["--registry", "127.0.0.1:1", "--patience-s", "1", "fs", "ls", "/"])
        .output()
        .expect("runs");
    assert_eq!(nobody.status.code(), Some(1));
    let one_listens = format!("127.0.0.1:1, {}", cluster.address);
    let finds =
        Command::new(CLUTCH).args(["--registry", &one_listens, "fs", "ls", "/"]).output().expect("runs");
    assert!(finds.status.success(), "{}", String::from_utf8_lossy(&finds.stderr));
    cluster.fsck();
}

#[test]
fn a_crash_shows_where_it_happened() {
    for (how, words) in [("segv", "SIGSEGV"), ("panic", "provoked")] {
        let output = Command::new(CLUTCH).args(["crash", how]).output().expect("runs");
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success());
        assert!(text.contains(words) && text.contains("provoke") && text.contains("main"), "{text}");
    }
}

#[test]
fn benchmarks_print_their_rows() {
    let temp = tempfile::tempdir().expect("temporary directory");
    let cluster = Cluster::start(&temp.path().join("c"), &["--shards", "2"]);
    let meta = cluster.json(&["bench", "meta", "--files", "200", "--clients", "2", "--depth", "8", "--json"]);
    let ops: Vec<_> =
        meta["rows"].as_array().expect("rows").iter().map(|r| r["op"].as_str().expect("op")).collect();
    assert_eq!(
        ops,
        ["mkdir", "create", "lookup", "stat", "readdir", "rename", "unlink", "rename-dir", "rmdir"]
    );
    for row in meta["rows"].as_array().expect("rows") {
        for field in ["ops_per_s", "p50_us", "p99_us", "server_cpu_us_per_op"] {
            assert!(row[field].is_number(), "{row}");
        }
    }
    let data = cluster.json(&["bench", "data", "--files", "2", "--size-mib", "4", "--json"]);
    assert_eq!(data["rows"].as_array().map(Vec::len), Some(2));
    assert_eq!(cluster.ok(&["fs", "ls", "/"]), "", "a benchmark leaves nothing behind");
    cluster.fsck();
}

#[test]
fn fuzzing_prints_counts_and_runs_scripts() {
    let temp = tempfile::tempdir().expect("temporary directory");
    let run = |args: &[&str]| {
        let output = Command::new(CLUTCH).current_dir(temp.path()).args(args).output().expect("runs");
        (output.status.code(), String::from_utf8(output.stdout).expect("text"), output.stderr)
    };
    let (code, text, _) = run(&["fuzz", "--first-seed", "1", "--seeds", "4", "--json"]);
    let document: serde_json::Value = serde_json::from_str(&text).expect("one document");
    assert_eq!((code, document["violations"].as_u64()), (Some(0), Some(0)));
    assert_eq!(document["seeds"].as_u64(), Some(4));
    assert!(document["operations"].as_u64() > Some(100) && document["coverage"].is_object());
    let (_, again, _) = run(&["fuzz", "--first-seed", "1", "--seeds", "4", "--jobs", "2", "--json"]);
    let again: serde_json::Value = serde_json::from_str(&again).expect("one document");
    assert_eq!(document["trace_hash"], again["trace_hash"], "threads change nothing");
    // A long script on the command's own runtime must end, too.
    let (code, script, _) = run(&["fuzz", "--seed", "2", "--print"]);
    assert_eq!(code, Some(0));
    std::fs::write(temp.path().join("two.script"), script).expect("writes");
    assert_eq!(run(&["fuzz", "--script", "two.script"]).0, Some(0));
    std::fs::write(temp.path().join("bad.script"), "0.1 c0 mkdir /a\n0.2 c0 fly /a\n").expect("writes");
    let (code, _, error) = run(&["fuzz", "--script", "bad.script"]);
    assert_eq!(code, Some(1));
    assert!(String::from_utf8_lossy(&error).contains("line 2"), "{}", String::from_utf8_lossy(&error));
}
