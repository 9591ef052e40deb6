//! What the real process and its commands have in memory, whatever many others send or ask for at once.

mod support;

use std::{
    process::{Command, Stdio},
    time::Duration,
};

use bytes::Bytes;
use support::{Cluster, noise};

/// What a server may have in memory at most.
const SERVER_MIB: u64 = 400;
/// What a client may.
const CLIENT_MIB: u64 = 200;
/// A span of the largest size.
const LARGE: usize = 100 << 20;

/// The most that a process has had in memory so far, in MiB; `None` when it has ended.
fn most_mib(process: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? >> 10)
}

fn check_server(cluster: &Cluster) {
    let most = most_mib(cluster.pid()).expect("the server runs");
    assert!(most < SERVER_MIB, "the server had {most} MiB in memory");
}

/// Runs a command to its end; the most that it had in memory.
fn run_watched(mut command: Command) -> u64 {
    let mut process = command.stderr(Stdio::null()).spawn().expect("starts");
    let mut most = 0;
    loop {
        most = most.max(most_mib(process.id()).unwrap_or(0));
        if let Some(status) = process.try_wait().expect("waits") {
            assert!(status.success(), "{command:?}");
            return most;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn trees_of_the_largest_spans_are_fetched_piece_by_piece() {
    let dir = tempfile::tempdir().expect("a directory");
    let cluster = Cluster::start(&dir.path().join("data"), &[]);
    cluster.ok(&["fs", "policy", "set", "/", "--spans", "100M=4+2"]);
    let tree = dir.path().join("tree");
    std::fs::create_dir(&tree).expect("made");
    let bytes = noise(LARGE, 1);
    for name in ["a", "b", "c", "d", "e", "f"] {
        std::fs::write(tree.join(name), &bytes).expect("written");
    }
    cluster.ok(&["fs", "put", "-r", tree.to_str().expect("text"), "/tree"]);
    let fetched = dir.path().join("fetched");
    let most = run_watched(cluster.command(&["fs", "get", "-r", "/tree", fetched.to_str().expect("text")]));
    assert!(most > 1 && most < CLIENT_MIB, "the client had {most} MiB in memory");
    for name in ["a", "b", "c", "d", "e", "f"] {
        assert!(std::fs::read(fetched.join(name)).expect("there") == bytes, "{name} differs");
    }
    check_server(&cluster);
}

#[test]
fn many_clients_write_at_once() {
    let dir = tempfile::tempdir().expect("a directory");
    let cluster = Cluster::start(&dir.path().join("data"), &[]);
    let file = dir.path().join("file");
    std::fs::write(&file, noise(8 << 20, 2)).expect("written");
    let file = file.to_str().expect("text");
    let mut puts: Vec<_> = (0..60)
        .map(|number| cluster.command(&["fs", "put", file, &format!("/{number}")]).spawn().expect("starts"))
        .collect();
    for put in &mut puts {
        assert!(put.wait().expect("ends").success());
    }
    check_server(&cluster);
}

/// Opens calls on one connection and sends a message on each but for its last bytes, as far as the server takes it. No call
/// is ended.
async fn unfinished(
    address: &str,
    calls: usize,
    length: usize,
    missing: usize,
) -> Vec<h2::SendStream<Bytes>> {
    let stream = tokio::net::TcpStream::connect(address).await.expect("connects");
    let (client, connection) = h2::client::handshake(stream).await.expect("shakes hands");
    tokio::spawn(connection);
    let mut client = client.ready().await.expect("ready");
    let mut streams = Vec::new();
    for _ in 0..calls {
        let request = http::Request::post(format!("http://{address}/clutch.session.v1.Session/Call"))
            .header("te", "trailers")
            .header("content-type", "application/grpc")
            .body(())
            .expect("a request");
        let (_, mut body) = client.send_request(request, false).expect("sent");
        // A request that can be decoded: a body of zeros.
        let mut begin = vec![0x32];
        prost::encoding::encode_varint((length - 6) as u64, &mut begin);
        begin.resize(6, 0);
        let prefix = [&[0][..], &(length as u32).to_be_bytes(), &begin].concat();
        body.send_data(prefix.into(), false).expect("sent");
        streams.push((body, length - 6 - missing));
    }
    let piece = Bytes::from(vec![0; 64 << 10]);
    // As long as any of them takes anything.
    loop {
        let mut has_moved = false;
        for (body, left) in &mut streams {
            body.reserve_capacity(piece.len().min(*left));
            while *left > 0 {
                let capacity = match body.capacity() {
                    0 => {
                        let more = std::future::poll_fn(|context| body.poll_capacity(context));
                        match tokio::time::timeout(Duration::from_millis(20), more).await {
                            Ok(Some(Ok(capacity))) => capacity,
                            _ => break,
                        }
                    }
                    capacity => capacity,
                };
                let sent = capacity.min(*left).min(piece.len());
                if body.send_data(piece.slice(..sent), false).is_err() {
                    break;
                }
                *left -= sent;
                has_moved |= sent > 0;
                body.reserve_capacity(piece.len().min(*left));
            }
        }
        if !has_moved {
            return streams.into_iter().map(|(body, _)| body).collect();
        }
    }
}

#[test]
fn messages_and_calls_that_never_end_take_no_memory_from_others() {
    let dir = tempfile::tempdir().expect("a directory");
    let cluster = Cluster::start(&dir.path().join("data"), &[]);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let streams = runtime.block_on(async {
        // All but the last byte, and all of it but no end of the call: large ones, and many small ones.
        let mut streams = unfinished(&cluster.address, 30, LARGE, 1).await;
        streams.extend(unfinished(&cluster.address, 3, LARGE, 0).await);
        streams.extend(unfinished(&cluster.address, 15, 2 << 20, 0).await);
        streams
    });
    assert_eq!(streams.len(), 48);
    check_server(&cluster);
    // Others are served meanwhile, blocks included.
    let file = dir.path().join("file");
    let bytes = noise(3 << 20, 3);
    std::fs::write(&file, &bytes).expect("written");
    cluster.ok(&["fs", "put", file.to_str().expect("text"), "/file"]);
    assert!(cluster.run(&["fs", "cat", "/file"]).stdout == bytes);
    drop(streams);
    check_server(&cluster);
}
