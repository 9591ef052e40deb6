//! A build with other limits and other words (feature `changed`) goes on where the shipped one was killed: it starts on its
//! directory, applies what the state has not seen yet, and replays every log to the hash that the state has.
//!
//! `CLUTCH_BIN` names the shipped binary: the test's own package is built with the feature.

use std::{
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
};

use clutch_log::LogId;
use clutch_proto::limits;
use clutch_server::{
    replay::{self, Until},
    up::{Up, UpConfig},
};
use clutch_state::MemoryStore;

const SHARDS: u32 = 2;

/// The shipped build's server; killed when dropped.
struct Shipped {
    binary: PathBuf,
    server: Child,
    address: String,
}

impl Drop for Shipped {
    fn drop(&mut self) {
        self.server.kill().expect("killed");
        self.server.wait().expect("reaped");
    }
}

impl Shipped {
    fn start(dir: &Path) -> Shipped {
        let binary =
            PathBuf::from(std::env::var_os("CLUTCH_BIN").expect("CLUTCH_BIN names the shipped binary"));
        // A test runs in its package's directory, the variable is given for the workspace's.
        let binary = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(binary);
        let mut server = Command::new(&binary)
            .args(["up", "--listen", "127.0.0.1:0", "--disks", "6", "--shards", &SHARDS.to_string(), "--dir"])
            .arg(dir)
            .stderr(Stdio::piped())
            .spawn()
            .expect("starts");
        let mut lines = BufReader::new(server.stderr.take().expect("piped")).lines();
        let address = loop {
            let line = lines.next().expect("it serves").expect("a line");
            if let Some(rest) = line.trim().strip_prefix("listening on ") {
                break rest.split(';').next().expect("an address").to_owned();
            }
        };
        std::thread::spawn(move || for _ in lines {});
        let shipped = Shipped { binary, server, address };
        assert_eq!(shipped.run(&["status", "--wait", "60"]), Some(0), "does not serve");
        shipped
    }

    /// The highest position that a state on disk has.
    fn flushed(&self) -> u64 {
        let output = self.command(&["status", "--json"]).output().expect("runs");
        let status: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let replicas = status["replicas"].as_array().expect("replicas");
        replicas.iter().map(|replica| replica["flushed"].as_u64().expect("a number")).max().unwrap_or(0)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command.env("CLUTCH_REGISTRY", &self.address).args(arguments);
        command
    }

    /// The exit code.
    fn run(&self, arguments: &[&str]) -> Option<i32> {
        let mut command = self.command(arguments);
        command.stdout(Stdio::null()).stderr(Stdio::null()).status().expect("runs").code()
    }
}

fn config(dir: &Path) -> UpConfig {
    UpConfig {
        dir: dir.to_owned(),
        listen: "127.0.0.1:0".into(),
        shards: None,
        disks: None,
        policy: None,
        segment_bytes_max: 64 << 20,
        lifetimes: clutch_shard::Lifetimes::default(),
        clock_skew_ms_max: limits::CLOCK_SKEW_MS_MAX,
        accept_clock: false,
        advertise: None,
        reserve_bytes: None,
        retain_log: None,
        collect_pause: None,
        heal: clutch_server::healer::HealSettings::default(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_build_goes_on_where_the_shipped_one_was_killed() {
    assert_eq!(limits::NAME_BYTES_MAX, 200, "this build is the other one");
    let scratch = tempfile::tempdir().expect("a directory");
    let (dir, long) = (scratch.path().join("cluster"), "n".repeat(255));
    let data: Vec<u8> = (0..2_000_000u32).map(|i| (i * 7 % 253) as u8).collect();
    let local = scratch.path().join("local");
    std::fs::write(&local, &data).expect("written");
    {
        let shipped = Shipped::start(&dir);
        let local = local.to_str().expect("UTF-8");
        assert_eq!(shipped.run(&["fs", "mkdir", "-p", "/a/b/c"]), Some(0));
        assert_eq!(shipped.run(&["fs", "put", local, &format!("/a/b/{long}")]), Some(0));
        assert_eq!(shipped.run(&["fs", "mv", "/a/b/c", "/a/c"]), Some(0));
        // Refusals that apply decides: the CDC's, after it has asked the shards.
        for refused in [["fs", "mkdir", "/a"].as_slice(), &["fs", "mv", "/a", "/a/c/inside"]] {
            assert_eq!(shipped.run(refused), Some(1), "{refused:?}");
        }
        assert_eq!(shipped.flushed(), 0, "the state on disk is behind its log: the other build applies it");
    }
    let runtime = clutch_runtime::production::runtime();
    let up = Up::start(runtime, config(&dir)).await.expect("starts");
    let client = up.node().client().clone();
    let id = client.resolve(&format!("/a/b/{long}")).await.expect("resolves").id;
    assert!(client.resolve("/a/c").await.is_ok());
    let mut back = Vec::new();
    let mut sink = |bytes: bytes::Bytes| {
        back.extend_from_slice(&bytes);
        Ok(())
    };
    client.read_file(id, &mut sink).await.expect("reads");
    assert!(back == data, "other content");
    for log in [LogId::REGISTRY, LogId::CDC].into_iter().chain((0..SHARDS).map(LogId::shard)) {
        let store = Arc::new(MemoryStore::new());
        let report = replay::from_cluster(&client, log, store, Until::default(), None, &mut |_, _| {})
            .await
            .expect("replays");
        assert!(report.batches > 0 && report.verified, "{log}: {report:?}");
    }
    up.stop().await;
}
