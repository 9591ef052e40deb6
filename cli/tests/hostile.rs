//! Bytes from someone who means harm, against the real process: it answers or hangs up, its memory stays within bounds, and
//! others are served as before.

mod support;

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    time::Duration,
};

use support::Cluster;

/// What the process may need at most for everything in here, above what it needs anyway.
const MEMORY_MIB: u64 = 200;

fn resident_mib(cluster: &Cluster) -> u64 {
    let status = cluster.json(&["status", "--json"]);
    status["replicas"][0]["resident_bytes"].as_u64().expect("status says what the process uses") >> 20
}

/// An HTTP/2 frame.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

/// The beginning of a gRPC call on a new connection: preface, settings, headers.
fn call(path: &str) -> Vec<u8> {
    let mut headers = Vec::new();
    let pairs = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "clutch"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
    ];
    for (name, value) in pairs {
        // A literal header without indexing and without Huffman coding.
        headers.extend([0, name.len() as u8]);
        headers.extend(name.as_bytes());
        headers.push(value.len() as u8);
        headers.extend(value.as_bytes());
    }
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    bytes.extend(frame(4, 0, 0, &[]));
    bytes.extend(frame(1, 4, 1, &headers));
    bytes
}

/// Sends bytes and waits until the peer has answered the call or hung up; returns what it said.
fn say(cluster: &Cluster, bytes: &[u8]) -> Vec<u8> {
    converse(cluster, &[(bytes, is_answered)])
}

/// Whether the peer has said enough, from all that it said.
type IsEnough = fn(&[u8]) -> bool;

/// On one connection: sends bytes and waits until the peer has said enough in all, then the next.
fn converse(cluster: &Cluster, turns: &[(&[u8], IsEnough)]) -> Vec<u8> {
    let mut stream = TcpStream::connect(&cluster.address).expect("connects");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
    let mut said = Vec::new();
    let mut part = [0; 4096];
    for (bytes, is_enough) in turns {
        // The peer may hang up in the middle.
        let _ = stream.write_all(bytes);
        while !is_enough(&said) {
            match stream.read(&mut part) {
                Ok(0) | Err(_) => return said,
                Ok(read) => said.extend_from_slice(&part[..read]),
            }
        }
    }
    said
}

/// Whether the call was answered with headers or trailers, or ended with a reset.
fn is_answered(said: &[u8]) -> bool {
    has_frame(said, |kind, _| matches!(kind, 1 | 3))
}

/// Whether the call was ended, with trailers or a reset.
fn has_ended(said: &[u8]) -> bool {
    has_frame(said, |kind, flags| kind == 3 || kind == 1 && flags & 1 != 0)
}

/// Whether there is a frame of the call with such a kind and such flags.
fn has_frame(mut said: &[u8], is_it: impl Fn(u8, u8) -> bool) -> bool {
    while let Some((head, rest)) = said.split_at_checked(9) {
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        if stream == 1 && is_it(head[3], head[4]) {
            return true;
        }
        said = rest.get(length..).unwrap_or_default();
    }
    false
}

#[test]
fn lengths_that_lie_cost_no_memory() {
    let temp = tempfile::tempdir().expect("temporary directory");
    let cluster = Cluster::start(&temp.path().join("c"), &["--shards", "1"]);
    cluster.ok(&["fs", "mkdir", "/before"]);
    let before = resident_mib(&cluster);
    let paths = ["/clutch.session.v1.Session/Call", "/clutch.session.v1.Session/Open"];
    for length in [u32::MAX, 1 << 31, 1 << 30, 300 << 20] {
        for path in paths {
            for compressed in [0, 1, 7] {
                let mut bytes = call(path);
                let mut message = vec![compressed];
                message.extend(length.to_be_bytes());
                message.extend([0x55; 100]);
                bytes.extend(frame(0, 0, 1, &message));
                let said = say(&cluster, &bytes);
                assert!(is_answered(&said), "{path}, {length} bytes, flag {compressed}: {said:?}");
            }
        }
    }
    // Within a message: a frame, a request or a body that says it is longer than everything there is.
    for field in [0x0a, 0x12, 0x2a, 0x32] {
        for length in [&[0xff, 0xff, 0xff, 0xff, 0x0f][..], &[0x80, 0x80, 0x80, 0x80, 0x08], &[0xff; 10]] {
            let inner = [&[field], length, &[1, 2, 3]].concat();
            let outer = [&[0x0a, inner.len() as u8], &inner[..]].concat();
            for (path, message) in [(paths[0], &inner), (paths[1], &outer)] {
                let mut bytes = call(path);
                let mut data = vec![0];
                data.extend((message.len() as u32).to_be_bytes());
                data.extend_from_slice(message);
                bytes.extend(frame(0, 1, 1, &data));
                let said = say(&cluster, &bytes);
                assert!(is_answered(&said), "{path}, field {field:#x}, {length:x?}: {said:?}");
            }
        }
    }
    // Frames without anything in them: two bytes each on the wire, many more in memory. As many as a window lets in at once:
    // the peer's settings, which say how large it is, are acknowledged first.
    let mut bytes = frame(4, 1, 0, &[]);
    let mut message = vec![0];
    message.extend((256_000u32).to_be_bytes());
    message.extend([0x0a, 0].repeat(128_000));
    message.chunks(1 << 14).for_each(|part| bytes.extend(frame(0, 0, 1, part)));
    let said = converse(&cluster, &[(&call(paths[1]), is_answered), (&bytes, has_ended)]);
    assert!(has_ended(&said), "128,000 frames in one message: {said:?}");
    for i in 0..200u32 {
        let noise: Vec<u8> =
            (0..i * 7).map(|n| (n.wrapping_mul(i | 1).wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let mut stream = TcpStream::connect(&cluster.address).expect("connects");
        // It may be hung up on.
        let _ = stream.write_all(&noise);
    }
    let after = resident_mib(&cluster);
    assert!(after < before + MEMORY_MIB, "{before} MiB before, {after} MiB after");
    cluster.ok(&["fs", "mkdir", "/after"]);
    assert_eq!(cluster.ok(&["fs", "ls", "/"]).lines().count(), 2);
    cluster.fsck();
}
