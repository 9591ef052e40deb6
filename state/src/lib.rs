//! Turns committed entries into state and replies: the machine that shard, CDC and registry instantiate.
//!
//! A [`Machine`] is pure logic: `produce` decides, `apply` executes. [`Applier`] runs a machine over a [`Store`];
//! `clutch-state-replica` drives an applier from a log and serves requests.
//!
//! Invariants:
//! * `apply` sees its arguments and the transaction, nothing else; the same entries give the same rows.
//! * One batch is one atomic write: rows, outcomes of clients, applied position and time, hash sums.
//! * The state hash covers every row that must match after replay and is known at every position.
//! * A refusal advances the applied position; a storage fault stops the replica and is never a reply.

pub mod applier;
pub mod client_table;
pub mod conformance;
pub mod hash;
pub mod machine;
pub mod memory;
pub mod overlay;
pub mod store;

pub use applier::{AppliedBatch, Applier, EntryOutcome, Fault};
pub use hash::StateHash;
pub use machine::{Applied, Machine, ProduceContext, Stop};
pub use memory::MemoryStore;
pub use overlay::Tx;
pub use store::{Key, Store, StoreError, Table, View, get_row, key_after};
