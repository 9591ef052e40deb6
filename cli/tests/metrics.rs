//! What monitoring is answered over HTTP, and that the dashboard asks for nothing that is not there.

mod support;

use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
    net::TcpStream,
};

use support::Cluster;

/// The status and the body of an answer.
fn get(address: &str, path: &str) -> (u32, String) {
    let mut stream = TcpStream::connect(address).expect("connects");
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").expect("asks");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("answers");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
    (status, body.to_owned())
}

/// The value of a sample.
fn value(text: &str, sample: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("{sample} is not in {text}")).parse().expect("a number")
}

/// Names of Clutch's metrics in a text.
fn names(text: &str) -> BTreeSet<&str> {
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    words.filter(|word| word.starts_with("clutch_")).collect()
}

#[test]
fn a_node_tells_what_it_does_and_whether_it_is_ready() {
    // A port that was free a moment ago.
    let address = std::net::TcpListener::bind("127.0.0.1:0").and_then(|at| at.local_addr());
    let address = address.expect("a port").to_string();
    let dir = tempfile::tempdir().expect("a directory");
    let cluster = Cluster::start(
        &dir.path().join("data"),
        &["--shards", "2", "--disks", "4", "--policy", "2+2", "--metrics", &address],
    );
    assert_eq!(get(&address, "/healthz"), (200, "ok\n".into()));
    assert_eq!(get(&address, "/readyz"), (200, "ready\n".into()));
    assert_eq!(get(&address, "/other").0, 404);
    let (status, before) = get(&address, "/metrics");
    assert_eq!(status, 200);
    for number in 0..10 {
        cluster.ok(&["fs", "mkdir", &format!("/d{number}")]);
    }
    let (_, after) = get(&address, "/metrics");
    for log in ["registry", "cdc", "shard 0", "shard 1"] {
        assert_eq!(value(&after, &format!("clutch_replica_leads{{log=\"{log}\"}}")), 1.0);
        assert_eq!(value(&after, &format!("clutch_replica_stopped{{log=\"{log}\"}}")), 0.0);
    }
    for counter in [
        "clutch_request_duration_seconds_count{role=\"cdc\"}",
        "clutch_log_appended_bytes_total",
        "clutch_log_syncs_total",
        "clutch_replica_applied_position{log=\"cdc\"}",
    ] {
        assert!(value(&after, counter) > value(&before, counter), "{counter} does not grow");
    }
    let disks = after.lines().filter(|line| line.starts_with("clutch_disk_used{") && line.ends_with(" 1"));
    assert_eq!(disks.count(), 4);
    for name in
        ["clutch_disk_damaged_blocks{", "clutch_disk_repaired_blocks{", "clutch_disk_scrubbed_time_seconds{"]
    {
        assert_eq!(after.lines().filter(|line| line.starts_with(name)).count(), 4, "{name}");
    }
    assert_eq!(value(&after, "clutch_heal_disks_away"), 0.0);
    assert!(after.ends_with("# EOF\n"), "the end of OpenMetrics");

    let dashboard = include_str!("../../deploy/grafana.json");
    let parsed: serde_json::Value = serde_json::from_str(dashboard).expect("JSON");
    assert!(parsed["panels"].as_array().is_some_and(|panels| panels.len() > 10));
    // Members are told of where a log has several.
    let there: BTreeSet<&str> = names(&after).into_iter().chain(["clutch_member_lag_positions"]).collect();
    let missing: Vec<&str> = names(dashboard).into_iter().filter(|name| !there.contains(name)).collect();
    assert!(missing.is_empty(), "the dashboard asks for what is not there: {missing:?}");
}
