//! Messages of a session: what is decoded is what the proto's own decoder sees, and is encoded as it was.
#![no_main]

use bytes::Bytes;
use clutch_proto::{limits::MESSAGE_FRAMES_MAX, parts::Frames};
use libfuzzer_sys::fuzz_target;
use prost::Message as _;

/// `Frame` as `session.proto` has it.
#[derive(Clone, PartialEq, prost::Message)]
struct PlainFrame {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(bytes = "bytes", tag = "2")]
    message: Bytes,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PlainFrames {
    #[prost(message, repeated, tag = "1")]
    frames: Vec<PlainFrame>,
}

fuzz_target!(|data: &[u8]| {
    let (ours, plain) = (Frames::decode(data), PlainFrames::decode(data));
    match (ours, plain) {
        (Ok(ours), Ok(plain)) => {
            assert!(ours.frames.len() <= MESSAGE_FRAMES_MAX);
            assert_eq!(ours.encode_to_vec(), plain.encode_to_vec());
            assert_eq!(ours.encoded_len(), plain.encoded_len());
        }
        (Err(_), Ok(plain)) => assert!(plain.frames.len() > MESSAGE_FRAMES_MAX, "refused without a reason"),
        (Ok(_), Err(error)) => panic!("taken, though {error}"),
        (Err(_), Err(_)) => {}
    }
});
