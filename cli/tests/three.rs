//! Three nodes as processes: they come up by two commands, bear the loss of any one, and refuse what is not theirs.

mod support;

use std::{
    fs,
    net::TcpListener,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::atomic::{AtomicU16, Ordering},
    time::{Duration, Instant},
};

use support::{CLUTCH, noise};

/// Nodes that `scripts/three.sh` started; they end with this.
struct Three {
    dir: PathBuf,
    port: u16,
}

/// The first of three ports that nobody listens on.
fn free_ports() -> u16 {
    let is_free = |port: u16| TcpListener::bind(("127.0.0.1", port)).is_ok();
    // Tests of one process look side by side, each in a part of its own. All are below what the system gives to who connects: it would be
    // taken while a node that had it starts again.
    static TAKEN: AtomicU16 = AtomicU16::new(0);
    let part = TAKEN.fetch_add(1, Ordering::Relaxed);
    let start = 12_000 + part * 1200 + (std::process::id() % 300) as u16 * 3;
    let mut ports = (start..u16::MAX - 3).step_by(3);
    ports.find(|port| (*port..port + 3).all(is_free)).expect("there are free ports")
}

fn text(output: &Output) -> String {
    [&output.stdout[..], &output.stderr[..]].map(String::from_utf8_lossy).concat()
}

impl Three {
    fn start(dir: &Path) -> Three {
        let three = Three { dir: dir.to_owned(), port: free_ports() };
        let started = three.script(&[]);
        assert!(started.status.success(), "{}", text(&started));
        let printed = String::from_utf8_lossy(&started.stdout).into_owned();
        assert_eq!(printed.trim(), format!("export CLUTCH_REGISTRY={}", three.registry()));
        three
    }

    /// A key of no cluster.
    fn wrong_key(&self) -> String {
        let path = self.dir.join("wrong.key");
        fs::write(&path, format!("1 {}\n", "ab".repeat(32))).expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("changed");
        path.to_str().expect("a name").to_owned()
    }

    fn registry(&self) -> String {
        let address = |n: u16| format!("127.0.0.1:{}", self.port + n);
        [0, 1, 2].map(address).join(",")
    }

    fn script(&self, arguments: &[&str]) -> Output {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/three.sh");
        let mut command = Command::new(script);
        command.env("CLUTCH_BIN", CLUTCH).arg(&self.dir).arg(self.port.to_string()).args(arguments);
        command.output().expect("runs")
    }

    fn run(&self, arguments: &[&str]) -> Output {
        Command::new(CLUTCH).args(arguments).env("CLUTCH_REGISTRY", self.registry()).output().expect("runs")
    }

    fn ok(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", text(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn logs(&self) -> Vec<serde_json::Value> {
        let status: serde_json::Value =
            serde_json::from_str(&self.ok(&["status", "--json", "--wait", "60"])).expect("JSON");
        status["logs"].as_array().expect("logs").clone()
    }

    fn kill(&self, node: u64) {
        let pid = fs::read_to_string(self.dir.join(format!("n{node}/pid"))).expect("a process");
        let killed = Command::new("kill").args(["-9", pid.trim()]).status();
        assert!(killed.is_ok_and(|status| status.success()), "kill node {node}");
        // One that nobody has waited for has no command line.
        let command = PathBuf::from(format!("/proc/{}/cmdline", pid.trim()));
        let begin = Instant::now();
        while fs::read(&command).is_ok_and(|line| !line.is_empty()) {
            assert!(begin.elapsed() < Duration::from_secs(60), "node {node} does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until every member of every log has all of it.
    fn whole(&self) {
        let begin = Instant::now();
        let is_whole = |log: &serde_json::Value| {
            let members = log["replicas"].as_array().expect("members");
            members.len() == 3 && members.iter().all(|member| member["lag"] == 0 && member["fault"] == "")
        };
        while !self.logs().iter().all(is_whole) {
            assert!(begin.elapsed() < Duration::from_secs(60), "{:?}", self.logs());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Starts a node again, when its last process has ended.
    fn start_again(&self, node: u64) {
        let begin = Instant::now();
        loop {
            let started = self.script(&["start", &node.to_string()]);
            assert!(started.status.success(), "{}", text(&started));
            if !text(&started).contains("runs already") {
                return;
            }
            assert!(begin.elapsed() < Duration::from_secs(60), "node {node} does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn said(&self, node: u64) -> String {
        fs::read_to_string(self.dir.join(format!("n{node}/out"))).unwrap_or_default()
    }
}

/// What a node says that does not start.
fn refused(dir: &Path) -> String {
    let begin = Instant::now();
    loop {
        let output = Command::new(CLUTCH).args(["node", "--config"]).arg(dir).output().expect("runs");
        assert!(!output.status.success(), "{}", text(&output));
        // The one before, which was killed, may still be about to end.
        if !text(&output).contains("is in use by another") {
            return text(&output);
        }
        assert!(begin.elapsed() < Duration::from_secs(60), "{}", text(&output));
        std::thread::sleep(Duration::from_millis(20));
    }
}

impl Drop for Three {
    fn drop(&mut self) {
        for node in 1..=4 {
            if let Ok(pid) = fs::read_to_string(self.dir.join(format!("n{node}/pid"))) {
                // It may have ended.
                let _ = Command::new("kill").args(["-9", pid.trim()]).output();
            }
        }
    }
}

#[test]
fn three_nodes_bear_the_loss_of_any_one() {
    let temporary = tempfile::tempdir().expect("a directory");
    let three = Three::start(&temporary.path().join("cluster"));
    let (local, back) = (temporary.path().join("local"), temporary.path().join("back"));
    fs::write(&local, noise(300_000, 1)).expect("written");
    let (local, back) = (local.to_str().expect("a name"), back.to_str().expect("a name"));
    three.ok(&["fs", "put", local, "/file"]);
    three.whole();
    for victim in 1..=3u64 {
        let led: Vec<String> = three
            .logs()
            .iter()
            .filter(|log| log["leader"] == victim)
            .map(|log| log["name"].to_string())
            .collect();
        three.kill(victim);
        three.ok(&["fs", "mkdir", "-p", &format!("/lost{victim}/a/b")]);
        three.ok(&["fs", "get", "/file", back]);
        assert_eq!(fs::read(back).expect("read"), fs::read(local).expect("read"), "without node {victim}");
        // Five disks are left, or six.
        three.ok(&["fs", "put", local, &format!("/lost{victim}/file")]);
        let now = three.logs();
        assert!(now.iter().all(|log| log["leader"] != victim && log["leader"] != 0), "{led:?}: {now:?}");
        three.start_again(victim);
        three.whole();
    }
    three.ok(&["fsck"]);
    let names = three.ok(&["fs", "ls", "/"]);
    for victim in 1..=3 {
        assert!(names.contains(&format!("lost{victim}")), "{names}");
        three.ok(&["fs", "get", &format!("/lost{victim}/file"), back]);
        assert_eq!(
            fs::read(back).expect("read"),
            fs::read(local).expect("read"),
            "of when {victim} was lost"
        );
    }
    // One that is told to stop lets others lead first.
    let victim = three.logs()[1]["leader"].as_u64().expect("a leader");
    let pid = fs::read_to_string(three.dir.join(format!("n{victim}/pid"))).expect("a process");
    assert!(Command::new("kill").arg(pid.trim()).status().is_ok_and(|status| status.success()));
    let begin = Instant::now();
    while three.logs().iter().any(|log| log["leader"] == victim || log["leader"] == 0) {
        assert!(begin.elapsed() < Duration::from_secs(60), "{:?}", three.logs());
    }
    assert!(!three.said(victim).contains("without flushing"), "{}", three.said(victim));
    three.start_again(victim);
    three.whole();
    // One that is told to stop says so and ends well.
    assert!(three.script(&["stop"]).status.success());
    let begin = Instant::now();
    while !three.said(1).contains("clutch: stopped") {
        assert!(begin.elapsed() < Duration::from_secs(60), "{}", three.said(1));
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn an_older_copy_of_a_node_that_is_put_back_does_not_go_on() {
    let temporary = tempfile::tempdir().expect("a directory");
    let three = Three::start(&temporary.path().join("cluster"));
    three.whole();
    let (dir, copy) = (three.dir.join("n3"), temporary.path().join("copy"));
    three.kill(3);
    let copied = |from: &Path, to: &Path| {
        let copied = Command::new("cp").arg("-a").arg(from).arg(to).status();
        assert!(copied.is_ok_and(|status| status.success()));
    };
    copied(&dir, &copy);
    // As it is it comes back, again and again.
    three.start_again(3);
    three.whole();
    three.kill(3);
    three.start_again(3);
    three.whole();
    three.ok(&["fs", "mkdir", "/since"]);
    // Others have taken note of where it is by now.
    let mark = || {
        fs::read_to_string(dir.join("log/identities")).expect("is there").lines().next().map(str::to_owned)
    };
    let (first, begin) = (mark(), Instant::now());
    while mark() == first {
        assert!(begin.elapsed() < Duration::from_secs(60), "{first:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
    // That is told to the others a moment later.
    let noted = || fs::read_to_string(three.dir.join("n1/log/identities")).expect("is there");
    let at = mark().and_then(|line| Some(line.split(' ').nth(2)?.to_owned())).expect("a mark");
    while !noted().contains(&at) {
        assert!(begin.elapsed() < Duration::from_secs(60), "{at}: {}", noted());
        std::thread::sleep(Duration::from_millis(50));
    }
    three.kill(3);
    fs::remove_dir_all(&dir).expect("removed");
    copied(&copy, &dir);
    let said = refused(&dir);
    assert!(said.contains("is an older copy of itself"), "{said}");
    three.ok(&["fs", "mkdir", "/without"]);
    assert!(three.ok(&["fs", "ls", "/"]).contains("since"));
}

#[test]
fn a_node_is_put_in_the_place_of_one_that_is_gone() {
    let temporary = tempfile::tempdir().expect("a directory");
    let three = Three::start(&temporary.path().join("cluster"));
    let (local, back) = (temporary.path().join("local"), temporary.path().join("back"));
    fs::write(&local, noise(300_000, 1)).expect("written");
    let (local, back) = (local.to_str().expect("a name"), back.to_str().expect("a name"));
    three.ok(&["fs", "put", local, "/file"]);
    three.whole();
    // It has what a snapshot has, and what came after it.
    three.ok(&["log", "checkpoint", "--all"]);
    three.ok(&["log", "trim", "--all"]);
    three.kill(3);
    let (from, new) = (three.dir.join("n1"), three.dir.join("n4"));
    let address = format!("127.0.0.1:{}", free_ports());
    let (from, at) = (from.to_str().expect("a name"), new.to_str().expect("a name"));
    three.ok(&["cluster", "join", "--dir", at, "--from", from, "--node", &address, "--disks", "3"]);
    assert!(
        text(&three.run(&["cluster", "join", "--dir", at, "--from", from, "--node", &address]))
            .contains("is not empty")
    );
    assert!(three.script(&["start", "4"]).status.success());
    let key = three.dir.join("n2/keys/cluster.key");
    let key = key.to_str().expect("a name");
    let wrong = &three.wrong_key();
    let refused = three.run(&["cluster", "replace-node", "3", "--with", "4", "--key", wrong]);
    assert!(text(&refused).contains("is not this cluster's"), "{}", text(&refused));
    let unknown = three.run(&["cluster", "add-replica", "9", "--cdc", "--key", key]);
    assert!(text(&unknown).contains("node 9 is not known here"), "{}", text(&unknown));
    let mistyped = three.run(&["cluster", "replace-node", "9", "--with", "4", "--key", key]);
    assert!(text(&mistyped).contains("which one is to be replaced"), "{}", text(&mistyped));
    let member = three.run(&["cluster", "replace-node", "1", "--with", "2", "--key", key]);
    assert!(text(&member).contains("node 2 keeps"), "{}", text(&member));
    for command in [["cluster", "drain", "9"], ["cluster", "remove-node", "9"]] {
        let mistyped = three.run(&[&command[..], &["--key", key]].concat());
        assert!(
            text(&mistyped).contains("node 9 is not known; these are: 1, 2, 3, 4"),
            "{}",
            text(&mistyped)
        );
    }
    let replaced = three.ok(&["cluster", "replace-node", "3", "--with", "4", "--key", key]);
    assert_eq!(replaced.matches("kept by nodes 1, 2, 4").count(), 6, "{replaced}");
    // Told again, there is nothing left to do.
    assert_eq!(three.ok(&["cluster", "replace-node", "3", "--with", "4", "--key", key]), replaced);
    three.whole();
    // The three that keep the logs now bear the loss of one, and the new one leads where it is told to.
    three.ok(&["cluster", "move-leader", "--to", "4", "--all", "--key", key]);
    assert!(three.logs().iter().all(|log| log["leader"] == 4), "{:?}", three.logs());
    // With the disks of the new one, whose keys nobody had before.
    three.ok(&["fs", "put", local, "/without"]);
    // Whoever was a member and is none any more serves its disks, and disturbs nobody.
    three.start_again(3);
    let begin = Instant::now();
    while !three.said(3).contains("no member of 6 of 6 logs") {
        assert!(begin.elapsed() < Duration::from_secs(60), "{}", three.said(3));
        std::thread::sleep(Duration::from_millis(50));
    }
    three.ok(&["cluster", "drain", "4", "--key", key]);
    assert!(three.logs().iter().all(|log| log["leader"] != 4), "{:?}", three.logs());
    three.kill(1);
    three.ok(&["fs", "mkdir", "/later"]);
    for file in ["/file", "/without"] {
        three.ok(&["fs", "get", file, back]);
        assert_eq!(fs::read(back).expect("read"), fs::read(local).expect("read"));
    }
    three.start_again(1);
    three.whole();
    assert!(three.logs().iter().all(|log| log["leader"] != 3), "{:?}", three.logs());
}

#[test]
fn a_node_joins_by_a_token_that_is_good_once() {
    let temporary = tempfile::tempdir().expect("a directory");
    let three = Three::start(&temporary.path().join("cluster"));
    let key = three.dir.join("n2/keys/cluster.key");
    let key = key.to_str().expect("a name");
    let token = three.ok(&["cluster", "invite", "--for", "10m", "--key", key]);
    let join = |token: &str, dir: &str, address: &str| {
        let dir = three.dir.join(dir);
        let dir = dir.to_str().expect("a name");
        three.run(&["cluster", "join", "--token", token, "--dir", dir, "--node", address, "--disks", "1"])
    };
    let address = format!("127.0.0.1:{}", free_ports());
    // What is refused before anybody is asked does not use the token up.
    for (dir, address) in [("n1", address.as_str()), ("n4", "0.0.0.0:1"), ("n4", &three.registry()[..15])] {
        assert!(!join(token.trim(), dir, address).status.success(), "{dir} {address}");
    }
    let mistyped = join(&token.trim().replace("clutch-", "clutch-0"), "n4", &address);
    assert!(text(&mistyped).contains("no whole token"), "{}", text(&mistyped));
    let joined = join(token.trim(), "n4", &address);
    assert!(text(&joined).contains("made node 4 of cluster"), "{}", text(&joined));
    let again = join(token.trim(), "n5", &format!("127.0.0.1:{}", free_ports()));
    assert!(text(&again).contains("has been used already"), "{}", text(&again));
    assert!(!three.dir.join("n5").exists());
    // Another one gets another number, although nobody has met the fourth yet.
    let token = three.ok(&["cluster", "invite", "--key", key]);
    let fifth = join(token.trim(), "n5", &format!("127.0.0.1:{}", free_ports()));
    assert!(text(&fifth).contains("made node 5 of cluster"), "{}", text(&fifth));
    // Nobody looks into its keys.
    for name in ["keys", "keys/cluster.key"] {
        let mode = fs::metadata(three.dir.join("n4").join(name)).expect("is there").permissions().mode();
        assert_eq!(mode & 0o077, 0, "{name}: {mode:o}");
    }
    assert!(three.script(&["start", "4"]).status.success());
    let begin = Instant::now();
    while !text(&three.run(&["cluster", "replace-node", "3", "--with", "4", "--key", key]))
        .contains("1, 2, 4")
    {
        assert!(begin.elapsed() < Duration::from_secs(60), "{}", three.said(4));
        std::thread::sleep(Duration::from_millis(100));
    }
    three.whole();
    three.kill(1);
    three.ok(&["fs", "mkdir", "/by the one that joined"]);
}

#[test]
fn the_clusters_key_is_exchanged_under_load() {
    let temporary = tempfile::tempdir().expect("a directory");
    let three = Three::start(&temporary.path().join("cluster"));
    let name = |path: &Path| path.to_str().expect("a name").to_owned();
    let (local, back) = (temporary.path().join("local"), temporary.path().join("back"));
    fs::write(&local, noise(300_000, 1)).expect("written");
    let old = temporary.path().join("old.key");
    fs::copy(three.dir.join("n1/keys/cluster.key"), &old).expect("copied");
    let (local, back, old) = (name(&local), name(&back), name(&old));
    let key = name(&three.dir.join("n2/keys/cluster.key"));
    three.ok(&["fs", "put", &local, "/before"]);
    struct Over<'a>(&'a std::sync::atomic::AtomicBool);
    impl Drop for Over<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let is_over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Also when something is not as it should be: else nobody would hear of that.
        let over = Over(&is_over);
        // Nobody who works with files notices anything.
        let works = scope.spawn(|| {
            let mut count = 0;
            while !is_over.load(Ordering::Relaxed) {
                three.ok(&["fs", "put", &local, &format!("/under load {count}")]);
                count += 1;
            }
            count
        });
        // A node that is down would be left behind.
        three.kill(3);
        let refused = three.run(&["cluster", "rotate-key", "--key", &key]);
        assert!(text(&refused).contains("every node must take part"), "{}", text(&refused));
        three.start_again(3);
        three.whole();
        let wrong = three.run(&["cluster", "rotate-key", "--key", &three.wrong_key()]);
        assert!(text(&wrong).contains("is not this cluster's"), "{}", text(&wrong));
        let rotated = three.ok(&["cluster", "rotate-key", "--key", &old]);
        assert_eq!(rotated, "");
        let early = three.run(&["cluster", "rotate-key", "--finish", "--key", &key]);
        assert!(text(&early).contains("--at-once"), "{}", text(&early));
        let twice = three.run(&["cluster", "rotate-key", "--key", &key]);
        assert!(text(&twice).contains("end that change first"), "{}", text(&twice));
        // Under either key, until the old one is forgotten; also by a node that starts in between.
        three.kill(1);
        three.start_again(1);
        three.whole();
        three.ok(&["fsck", "--key", &old]);
        drop(over);
        assert!(works.join().expect("it goes on") > 0);
    });
    // What was granted under the old key ends with it, so nothing is being written.
    three.ok(&["cluster", "rotate-key", "--finish", "--at-once", "--key", &key]);
    three.ok(&["cluster", "rotate-key", "--finish", "--key", &key]);
    let refused = three.run(&["fsck", "--key", &old]);
    assert!(text(&refused).contains("is not this cluster's"), "{}", text(&refused));
    three.ok(&["fsck", "--key", &key]);
    // The copy that running nodes keep for commands is the new one.
    three.ok(&["fsck"]);
    for node in [2, 3] {
        three.kill(node);
        three.ok(&["fs", "put", &local, &format!("/without {node}")]);
        three.start_again(node);
        three.whole();
    }
    for file in ["/before", "/under load 0", "/without 3"] {
        three.ok(&["fs", "get", file, &back]);
        assert_eq!(fs::read(&back).expect("read"), fs::read(&local).expect("read"), "{file}");
    }
    let text_of =
        |node: u64| fs::read_to_string(three.dir.join(format!("n{node}/keys/cluster.key"))).expect("its key");
    assert!(text_of(1).starts_with("2 ") && text_of(1).lines().count() == 1, "one key, of the next epoch");
    assert_eq!((text_of(1), text_of(2)), (text_of(2), text_of(3)));
}

#[test]
fn a_node_with_another_key_is_refused_and_the_others_go_on() {
    let temporary = tempfile::tempdir().expect("a directory");
    let three = Three::start(&temporary.path().join("cluster"));
    three.kill(3);
    let key = three.dir.join("n3/keys/cluster.key");
    fs::write(&key, format!("1 {}\n", "ab".repeat(32))).expect("written");
    assert!(three.script(&["start", "3"]).status.success());
    let begin = Instant::now();
    while !three.said(3).contains("it has another key than this node") {
        assert!(begin.elapsed() < Duration::from_secs(60), "{}", three.said(3));
        std::thread::sleep(Duration::from_millis(20));
    }
    three.ok(&["fs", "mkdir", "/without"]);
    assert!(three.logs().iter().all(|log| log["leader"] != 3), "{:?}", three.logs());
}

#[test]
fn a_node_that_has_lost_its_log_does_not_come_back() {
    let temporary = tempfile::tempdir().expect("a directory");
    let three = Three::start(&temporary.path().join("cluster"));
    three.whole();
    three.kill(3);
    let dir = three.dir.join("n3");
    fs::remove_dir_all(dir.join("log")).expect("removed");
    fs::create_dir(dir.join("log")).expect("made");
    let said = refused(&dir);
    assert!(said.contains("must not vote any more"), "it knows that itself: {said}");
    let up = Command::new(CLUTCH).args(["up", "--dir"]).arg(&dir).output().expect("runs");
    assert!(text(&up).contains("is the directory of a node of several"), "{}", text(&up));
    // As it was made at first: it cannot know, and the others do.
    for name in ["state", "begun", "chains", "clock"] {
        let path = dir.join(name);
        let _ = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
    }
    three.start_again(3);
    let begin = Instant::now();
    let said = || three.said(1) + &three.said(2);
    while !said().contains("node 3 is not the one that was met under its number before") {
        assert!(begin.elapsed() < Duration::from_secs(60), "{}", said());
        std::thread::sleep(Duration::from_millis(20));
    }
    three.ok(&["fs", "mkdir", "/without"]);
    assert!(three.logs().iter().all(|log| log["leader"] != 3), "{:?}", three.logs());
}

#[test]
fn a_node_of_which_a_record_is_damaged_comes_back_by_itself() {
    let temporary = tempfile::tempdir().expect("a directory");
    let three = Three::start(&temporary.path().join("cluster"));
    for number in 0..20 {
        three.ok(&["fs", "mkdir", &format!("/d{number}")]);
    }
    three.whole();
    three.kill(3);
    let log = three.dir.join("n3/log/0000000000000001.log");
    let mut bytes = fs::read(&log).expect("is there");
    let at = bytes.len() * 3 / 4;
    bytes[at] ^= 0x10;
    fs::write(&log, &bytes).expect("written");
    three.ok(&["fs", "mkdir", "/meanwhile"]);
    three.start_again(3);
    let begin = Instant::now();
    while !three.said(3).contains("this node has everything of it again, and votes") {
        assert!(begin.elapsed() < Duration::from_secs(60), "{}", three.said(3));
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(three.said(3).contains("was damaged here; it comes anew from the others"), "{}", three.said(3));
    three.whole();
    let votes = |log: &serde_json::Value| {
        log["replicas"].as_array().expect("members").iter().filter(|member| member["voter"] == true).count()
    };
    assert!(three.logs().iter().all(|log| votes(log) == 3), "{:?}", three.logs());
    // It is counted on, as it was, also when it has been away again.
    three.kill(3);
    three.start_again(3);
    three.whole();
    three.kill(1);
    three.ok(&["fs", "mkdir", "/after"]);
    assert!(three.ok(&["fs", "ls", "/"]).contains("meanwhile"));
    assert!(!three.dir.join("n3/rejoin").exists(), "nothing is left to come back to");
}

#[test]
fn directories_that_are_not_as_they_should_be_are_refused_with_advice() {
    let temporary = tempfile::tempdir().expect("a directory");
    let dir = temporary.path().join("cluster");
    let init = |dir: &Path, nodes: &[&str], more: &[&str]| {
        let mut command = Command::new(CLUTCH);
        command.args(["cluster", "init", "--dir"]).arg(dir);
        for node in nodes {
            command.args(["--node", node]);
        }
        command.args(more).output().expect("runs")
    };
    let port = free_ports();
    let nodes = [0, 1, 2].map(|n| format!("127.0.0.1:{}", port + n));
    let nodes = [&*nodes[0], &nodes[1], &nodes[2]];
    for (nodes, more, advice) in [
        (&nodes[..0], &[][..], "--node"),
        (&["127.0.0.1:1", "127.0.0.1:1"], &[], "same address"),
        (&["127.0.0.1"], &[], "HOST:PORT"),
        (&nodes, &["--policy", "40+2"], "1 to 16 data blocks"),
        (&["h:1", "h:2", "h:3", "h:4", "h:5", "h:6", "h:7", "h:8"], &[], "1 to 7"),
    ] {
        let output = init(&dir, nodes, more);
        assert!(!output.status.success() && text(&output).contains(advice), "{advice}: {}", text(&output));
        assert!(!dir.exists(), "{advice}: nothing is made");
    }
    let made = init(&dir, &nodes, &[]);
    assert!(made.status.success(), "{}", text(&made));
    assert!(text(&init(&dir, &nodes, &[])).contains("is not empty"));
    let node = |what: &Path| {
        text(&Command::new(CLUTCH).args(["node", "--config"]).arg(what).output().expect("runs"))
    };
    assert!(node(&temporary.path().join("nowhere/node.toml")).contains("clutch cluster init makes them"));
    // Each change on a copy of its own.
    let changed = |change: &dyn Fn(&Path)| {
        let copy = temporary.path().join("copy");
        let _ = fs::remove_dir_all(&copy);
        let copied = Command::new("cp").arg("-a").arg(dir.join("n1")).arg(&copy).status();
        assert!(copied.is_ok_and(|status| status.success()));
        change(&copy);
        let said = node(&copy.join("node.toml"));
        assert!(!said.contains("panicked"), "{said}");
        said
    };
    let write = |name: &'static str, bytes: &'static str| {
        move |dir: &Path| fs::write(dir.join(name), bytes).expect("written")
    };
    let remove = |name: &'static str| move |dir: &Path| fs::remove_file(dir.join(name)).expect("removed");
    assert!(changed(&remove("node.json")).contains("must not come back under its number"));
    assert!(changed(&write("node.json", "{")).contains("restore it from a copy"));
    assert!(changed(&remove("cluster.json")).contains("copy it from another node"));
    assert!(changed(&write("begun", "")).contains("must not vote any more"));
    assert!(changed(&write("log/identities", "1 0\n")).contains("must not vote any more"));
    assert!(changed(&remove("keys/cluster.key")).contains("copy it from another node"));
    assert!(changed(&write("node.toml", "listen = \"here\"\n[nodes]\n")).contains("HOST:PORT"));
    assert!(
        changed(&write("node.toml", "listen = \"127.0.0.1:1\"\nlisten_on = 1\n[nodes]\n"))
            .contains("listen_on")
    );
    assert!(
        changed(&write("node.toml", "listen = \"127.0.0.1:1\"\n[nodes]\n1 = \"127.0.0.1:1\"\n"))
            .contains("does not say where node 2 is")
    );
    assert!(
        changed(&|dir: &Path| {
            let key = dir.join("keys/cluster.key");
            fs::set_permissions(key, fs::Permissions::from_mode(0o644)).expect("changed");
        })
        .contains("chmod 600")
    );
}

#[test]
fn leaders_are_spread_over_the_nodes_when_nothing_changes() {
    let temporary = tempfile::tempdir().expect("a directory");
    let three = Three::start(&temporary.path().join("cluster"));
    for node in 1..=3u64 {
        let settings = three.dir.join(format!("n{node}/node.toml"));
        let said = fs::read_to_string(&settings).expect("settings");
        fs::write(&settings, format!("balance_after_s = 2\nlease_reads = true\n{said}")).expect("written");
        three.kill(node);
        three.start_again(node);
        three.whole();
    }
    three.ok(&["cluster", "move-leader", "--to", "1", "--all"]);
    let begin = Instant::now();
    loop {
        let logs = three.logs();
        let leads = |node: u64| logs.iter().filter(|log| log["leader"] == node).count();
        if (1..=3).all(|node| leads(node) == 2) {
            break;
        }
        assert!(begin.elapsed() < Duration::from_secs(120), "{logs:#?}");
        std::thread::sleep(Duration::from_millis(100));
    }
    three.ok(&["fs", "mkdir", "/after"]);
    assert!(three.ok(&["fs", "ls", "/"]).contains("after"));
    let ages = || -> Vec<Option<u64>> {
        let status: serde_json::Value = serde_json::from_str(&three.ok(&["status", "--json"])).expect("JSON");
        let replicas = status["replicas"].as_array().expect("replicas").clone();
        replicas.iter().map(|replica| replica["checkpoint_age_s"].as_u64()).collect()
    };
    assert!(ages().iter().all(Option::is_none), "{:?}", ages());
    three.ok(&["log", "checkpoint", "--all"]);
    assert!(ages().iter().all(|age| age.is_some_and(|age| age < 600)), "{:?}", ages());
}

#[test]
fn three_nodes_run_in_one_process_for_a_trial() {
    let temporary = tempfile::tempdir().expect("a directory");
    let dir = temporary.path().join("trial");
    let port = free_ports();
    let registry = [0, 1, 2].map(|n| format!("127.0.0.1:{}", port + n)).join(",");
    let up = |more: &[&str]| {
        let mut command = Command::new(CLUTCH);
        command.args(["up", "--listen", &format!("127.0.0.1:{port}"), "--dir"]).arg(&dir).args(more);
        command
    };
    let clutch = |arguments: &[&str]| {
        let output =
            Command::new(CLUTCH).args(arguments).env("CLUTCH_REGISTRY", &registry).output().expect("runs");
        assert!(output.status.success(), "{arguments:?}: {}", text(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    for round in 0..2 {
        let mut process = up(&["--replicas", "3"]).spawn().expect("runs");
        let status: serde_json::Value =
            serde_json::from_str(&clutch(&["status", "--json", "--wait", "60"])).expect("JSON");
        let logs = status["logs"].as_array().expect("logs");
        assert!(
            logs.iter().all(|log| log["replicas"].as_array().is_some_and(|all| all.len() == 3)),
            "{logs:?}"
        );
        clutch(&["fs", "mkdir", &format!("/round{round}")]);
        assert_eq!(clutch(&["fs", "ls", "/"]).lines().count(), round + 1);
        clutch(&["fsck"]);
        let pid = process.id().to_string();
        assert!(Command::new("kill").arg(&pid).status().is_ok_and(|status| status.success()));
        assert!(process.wait().is_ok_and(|status| status.success()), "it stops when it is told to");
    }
    for (more, said) in [
        (&["--replicas", "2"][..], "another number of nodes"),
        (&["--replicas", "3", "--retain-log", "7d"], "cannot be used with"),
        (&["--replicas", "9"], "is not in 1..=5"),
        (&[], "n1"),
    ] {
        let refused = up(more).output().expect("runs");
        assert!(!refused.status.success() && text(&refused).contains(said), "{more:?}: {}", text(&refused));
    }
}
