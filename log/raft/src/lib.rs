//! The `raft` log engine: openraft between nodes, on the store that all engines share.
//!
//! A batch is one record of raft; its index in the loglet is raft's and one more, its reign is the term (standard leader ids, so
//! that a term has one leader). openraft's state machine is a stub that notes how far the log is delivered; readers read the
//! log itself. docs/design/2026-11-27-raft.md says what of openraft is used, and what is not.
//!
//! Invariants: no type of openraft leaves this crate; what is acknowledged is durable on a quorum; a member whose disk was lost is
//! none any more, because its votes are lost, too.

#![allow(dead_code, reason = "the engine that uses these parts follows")]

mod codec;
mod delivered;
mod messages;
mod network;
mod peers;
mod seam;
mod snapshots;
mod storage;
mod types;

pub use peers::{Addresses, Peers};
