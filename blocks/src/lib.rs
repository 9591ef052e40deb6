//! Block services: erasure-coded blocks on disks, and the code that makes and repairs them.
//!
//! A service holds no metadata. It believes certificates and checksums, nothing else.
//!
//! Invariants: nothing is done for a request before its certificate is checked; a block that a proof speaks of is
//! durable under its name; a page whose checksum does not match is an error, never data.

pub mod codec;
pub mod format;
pub mod label;
pub mod packed;
mod queue;
pub mod scrub;
pub mod service;
pub mod store;

pub use codec::{Codec, CodecError};
pub use packed::PackOptions;
pub use service::BlockService;
pub use store::BlockStore;
