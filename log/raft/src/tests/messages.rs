//! What members tell each other, byte by byte: known bytes, everything there and back, and nothing that bytes can do.

use bytes::Bytes;
use clutch_log::{Manifest, SnapshotFile};
use openraft::{
    Membership, SnapshotMeta as Meta, StoredMembership,
    impls::leader_id_std::LeaderId,
    raft::{AppendEntriesRequest, StreamAppendError, VoteRequest, VoteResponse},
};

use super::*;
use crate::{
    codec::{Builder, Form, Frame, Kind, Reader},
    messages as of,
    types::{Command, Entry, LogId, Payload, Vote},
};

fn id(term: u64, index: u64) -> LogId {
    LogId::new(term.into(), index)
}

fn vote() -> Vote {
    Vote { leader_id: LeaderId { term: 5, voted_for: 2 }, committed: true }
}

fn entries() -> Vec<Entry> {
    let members = Membership::new_with_defaults(vec![[1, 2].into(), [2, 3].into()], [4]);
    let payloads = [
        Payload::Blank,
        Payload::Normal(Command::Batch(vec![Bytes::from_static(b"one"), Bytes::new()])),
        Payload::Normal(Command::Seal),
        Payload::Membership(members),
    ];
    payloads.into_iter().zip(8..).map(|(payload, index)| Entry { log_id: id(5, index), payload }).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// One of each message.
fn all() -> Vec<Bytes> {
    let append = AppendEntriesRequest {
        vote: vote(),
        prev_log_id: Some(id(4, 7)),
        entries: entries(),
        leader_commit: Some(id(4, 6)),
    };
    let mut asks = VoteRequest::new(vote(), Some(id(4, 7)));
    asks.leadership_transfer = true;
    let files = vec![SnapshotFile { name: "rows".into(), bytes: 9, crc: 10 }];
    let manifest = Manifest { position: Position(8), hash: [3; 16], files };
    let members = Membership::new_with_defaults(vec![[1, 2, 3].into()], []);
    let meta =
        Meta { last_log_id: Some(id(4, 7)), last_membership: StoredMembership::new(Some(id(1, 0)), members) };
    vec![
        of::append(&append),
        of::vote(&asks),
        of::vote_answer(&VoteResponse { vote: vote(), vote_granted: true, last_log_id: None }),
        of::append_answer(&Ok(Some(id(5, 9)))),
        of::append_answer(&Err(StreamAppendError::Conflict(id(5, 9)))),
        of::append_answer(&Err(StreamAppendError::HigherVote(vote()))),
        of::snapshot(&vote(), &meta, &manifest),
    ]
}

/// What it is when it is read and written again; `None` where it cannot be read.
fn again(number: usize, bytes: Bytes) -> Option<Bytes> {
    match number {
        0 => of::read_append(bytes).ok().map(|request| of::append(&request)),
        1 => of::read_vote(bytes).ok().map(|request| of::vote(&request)),
        2 => of::read_vote_answer(bytes).ok().map(|answer| of::vote_answer(&answer)),
        3..=5 => of::read_append_answer(bytes).ok().map(|answer| of::append_answer(&answer)),
        _ => of::read_snapshot(bytes).ok().map(|(v, meta, m)| of::snapshot(&v, &meta, &m)),
    }
}

#[test]
fn messages_have_their_golden_bytes() {
    let (kind, form) = (Kind::Barrier, Form::Answer);
    let frame = Frame { kind, form, group: 0x0002_0000_0007, number: 9, body: Bytes::from_static(b"ab") };
    assert_eq!(hex(&frame.encode()[..18]), "070107000000020000000900000000000000");
    assert_eq!(Frame::decode(frame.encode()).expect("reads"), frame);
    let vote = "05000000000000000200000000000000";
    assert_eq!(hex(&all()[1]), format!("{vote}010104000000000000000700000000000000{}", "01"));
    assert_eq!(hex(&all()[3]), "0001050000000000000009000000000000 00".replace(' ', ""));
    let entry = Builder::default().entry(&entries()[1]).done();
    assert_eq!(
        hex(&entry),
        "0500000000000000090000000000000001020000000300000 06f6e6500000000".replace(' ', "")
    );
}

#[test]
fn messages_survive_their_bytes_and_nothing_else_does() {
    for (number, bytes) in all().into_iter().enumerate() {
        assert_eq!(again(number, bytes.clone()).as_ref(), Some(&bytes), "message {number}");
        for length in 0..bytes.len() {
            assert_eq!(again(number, bytes.slice(..length)), None, "message {number} cut at {length}");
        }
        // Whatever is changed: it is refused, or is another message; nothing panics.
        for at in 0..bytes.len() {
            for value in [0, 1, 2, 3, 127, 255] {
                let mut changed = bytes.to_vec();
                changed[at] = value;
                let changed = Bytes::from(changed);
                let read = again(number, changed.clone());
                assert!(read.is_none() || read == Some(changed), "message {number}, byte {at}");
            }
        }
    }
    // Of a frame every byte is under its checksum.
    let (kind, form) = (Kind::Append, Form::Request);
    let frame = Frame { kind, form, group: 1, number: 2, body: all()[0].clone() }.encode();
    for at in 0..frame.len() {
        let mut changed = frame.to_vec();
        changed[at] ^= 4;
        assert!(Frame::decode(changed.into()).is_err(), "byte {at}");
    }
    assert!(Reader(Bytes::from(vec![255; 17])).id().is_err(), "no log comes so far");
}
