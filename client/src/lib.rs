//! The client library: paths in, three outcomes out.
//!
//! [`Client`] finds the cluster through the registry, sends each request to the shard of its slot, retries what
//! may be retried under one tag, cuts files into spans and writes and reads their blocks in parallel.
//!
//! Invariants: a mutation that was not answered is reported as unknown, never as failed; bytes that do not match
//! their checksums are never returned; caches are bounded in entries and in time.

mod caches;
mod draft;
mod error;
mod files;
mod gather;
mod maintain;
mod moving;
mod path;
mod policy;
mod read;
mod registries;
mod routes;
mod rpc;
mod seen;
mod source;
mod span;
mod verdict;
mod write;

pub use draft::Draft;
pub use error::ClientError;
pub use files::{Created, DirCursor, FileAttributes};
pub use moving::Moving;
pub use path::{Resolved, means_directory};
pub use policy::{INLINE_FILE_BYTES_DEFAULT, MIRROR_BYTES_DEFAULT, WritePolicy};
pub use registries::Registries;
pub use rpc::{AnsweredAt, Call, Client, ClientOptions, Freshness, Observer, Reads};
pub use source::ContentSource;
