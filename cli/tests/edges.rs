//! Edges of the command line: names that are hostile or no text, ends of numbers, interruptions, slashes at the end.

mod support;

use std::{
    ffi::OsStr,
    io::Read as _,
    os::unix::ffi::OsStrExt as _,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use support::{Cluster, noise};

fn cluster(dir: &Path) -> Cluster {
    Cluster::start(&dir.join("data"), &["--shards", "1", "--collect-every-s", "0"])
}

/// All that a command says to a terminal.
fn said_to_terminal(mut command: Command) -> Vec<u8> {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
    grantpt(&ours).expect("granted");
    unlockpt(&ours).expect("unlocked");
    let name = ptsname(&ours, Vec::new()).expect("it has a name");
    let open = || {
        let path = Path::new(OsStr::from_bytes(name.as_bytes()));
        std::fs::OpenOptions::new().read(true).write(true).open(path).expect("opens")
    };
    let mut process = command.stdin(Stdio::null()).stdout(open()).stderr(open()).spawn().expect("starts");
    // Ours too must be closed, or the end is never seen.
    drop(command);
    let mut said = Vec::new();
    // A terminal that nobody has open any more ends with an error.
    let _ = std::fs::File::from(ours).read_to_end(&mut said);
    process.wait().expect("ends");
    said
}

#[test]
fn control_characters_of_names_never_reach_a_terminal() {
    let dir = tempfile::tempdir().expect("a directory");
    let cluster = cluster(dir.path());
    let (hostile, no_text) =
        (OsStr::from_bytes(b"a\x1b]0;owned\x07\x1b[2Jb"), OsStr::from_bytes(b"n\xff\xfe"));
    let tree = dir.path().join("tree");
    std::fs::create_dir(&tree).expect("made");
    for name in [hostile, no_text] {
        std::fs::write(tree.join(name), b"x").expect("written");
    }
    cluster.ok(&["fs", "put", "-r", tree.to_str().expect("text"), "/t"]);
    let missing = OsStr::from_bytes(b"/no\x1b[31m\x9bsuch");
    for arguments in [
        &["fs", "ls"][..],
        &["fs", "ls", "-l"],
        &["fs", "ls", "--json"],
        &["fs", "tree"],
        &["fs", "tree", "--json"],
        &["fs", "history"],
        &["fs", "du"],
        &["fs", "rm"],
        &["fs", "stat"],
        &["fs", "rm", "-r"],
    ] {
        for path in [OsStr::new("/t"), missing] {
            let mut command = cluster.command(arguments);
            command.arg(path);
            let text = String::from_utf8(said_to_terminal(command)).expect("text");
            // Bars draw themselves anew by clearing their line.
            let text = text.replace("\r\x1b[2K", "");
            let control = |c: char| c.is_control() && !matches!(c, '\r' | '\n' | '\t');
            assert!(!text.contains(control), "{arguments:?}: {text:?}");
        }
    }
}

#[test]
fn the_far_ends_of_numbers_end_in_words() {
    let dir = tempfile::tempdir().expect("a directory");
    let cluster = cluster(dir.path());
    let most = u64::MAX.to_string();
    let beyond = "99999999999999999999999";
    for (code, arguments) in [
        (2, &["status", "--wait", beyond][..]),
        (1, &["log", "replay", "--shard", "0", "--to-time", &most]),
        (1, &["log", "replay", "--shard", "0", "--to-position", &most]),
        (1, &["log", "replay", "--shard", "4294967295"]),
        (2, &["log", "replay", "--shard", "4294967296"]),
        (2, &["bench", "meta", "--files", &most]),
        (2, &["up", "--shards", "4294967296"]),
        (2, &["up", "--retain-log", "18446744073709551615d"]),
        (2, &["up", "--retain-log", "0s"]),
        (2, &["fs", "policy", "set", "/", "--keep-age", "18446744073709551615d"]),
        (2, &["fs", "policy", "set", "/", "--spans", "8M=0+4294967296"]),
        (1, &["fuzz", "--first-seed", &most, "--seeds", &most]),
    ] {
        let complaint = cluster.fails(code, arguments);
        assert!(complaint.len() > 20, "{arguments:?}: {complaint:?}");
    }
    // The largest wait and the largest patience are long, not wrong.
    cluster.ok(&["status", "--wait", &most]);
    cluster.ok(&["--patience-s", &most, "status"]);
}

#[test]
fn numbers_of_64_bits_are_strings_in_json() {
    let dir = tempfile::tempdir().expect("a directory");
    let cluster = cluster(dir.path());
    cluster.ok(&["fs", "touch", "/f"]);
    cluster.ok(&["fs", "truncate", "4611686018427387904", "/f"]);
    let stat = cluster.json(&["fs", "stat", "--json", "/f"]);
    // What is too large for a number of JavaScript is a string; what is not stays a number.
    assert_eq!(stat["size"], "4611686018427387904", "{stat:#}");
    assert!(stat["mtime"].is_string() && stat["id"].is_string() && stat["uid"].is_number(), "{stat:#}");
    assert_eq!(cluster.json(&["fs", "du", "--json", "/"])["bytes"], "4611686018427387904");
}

#[test]
fn a_slash_at_the_end_means_a_directory() {
    let dir = tempfile::tempdir().expect("a directory");
    let cluster = cluster(dir.path());
    let (old, new) = (dir.path().join("old"), dir.path().join("new"));
    std::fs::write(&old, b"old").expect("written");
    std::fs::write(&new, b"new").expect("written");
    let (old, new) = (old.to_str().expect("text"), new.to_str().expect("text"));
    cluster.ok(&["fs", "put", old, "/backup"]);
    cluster.fails(1, &["fs", "put", new, "/backup/"]);
    cluster.fails(1, &["fs", "put", new, "/none/"]);
    cluster.fails(1, &["fs", "mv", "/backup", "/other/"]);
    cluster.fails(1, &["fs", "cat", "/backup/"]);
    assert_eq!(cluster.ok(&["fs", "cat", "/backup"]), "old");
    let there = dir.path().join("there");
    std::fs::write(&there, b"mine").expect("written");
    cluster.fails(1, &["fs", "get", "/backup", &format!("{}/", there.display())]);
    assert_eq!(std::fs::read(&there).expect("there"), b"mine");
}

#[test]
fn an_interrupted_transfer_leaves_nothing_behind() {
    let dir = tempfile::tempdir().expect("a directory");
    let cluster = cluster(dir.path());
    let file = dir.path().join("file");
    std::fs::write(&file, noise(64 << 20, 1)).expect("written");
    cluster.ok(&["fs", "put", file.to_str().expect("text"), "/f"]);
    let target = dir.path().join("target");
    std::fs::create_dir(&target).expect("made");
    let names = || -> Vec<String> {
        let entries = std::fs::read_dir(&target).expect("lists").flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    };
    for signal in ["-INT", "-TERM", "-HUP"] {
        let mut get =
            cluster.command(&["fs", "get", "/f"]).arg(&target).stderr(Stdio::null()).spawn().expect("starts");
        let begin = Instant::now();
        // Something arrives; a fast machine may be done before it is looked at.
        while names().is_empty() && get.try_wait().expect("waits").is_none() {
            assert!(begin.elapsed() < Duration::from_secs(60), "nothing arrives");
        }
        let sent = Command::new("kill").args([signal, &get.id().to_string()]).stderr(Stdio::null()).status();
        sent.expect("kill runs");
        let ended = get.wait().expect("ends");
        match ended.success() {
            true => std::fs::remove_file(target.join("f")).expect("it was all there"),
            false => assert_eq!(names(), Vec::<String>::new(), "after {signal}"),
        }
    }
}
