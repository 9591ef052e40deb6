//! What travels between Clutch's processes and into its logs: messages, ids, error codes and limits.
//!
//! The messages are generated from `clutch/<area>/v1/<area>.proto`; the hand-written modules give their
//! numbers a type and a meaning. Nothing in here does I/O or reads a clock.

pub mod answer;
pub mod certificate;
pub mod crc;
pub mod error;
pub mod flags;
pub mod ids;
pub mod level;
pub mod limits;
pub mod listing;
pub mod log;
pub mod mutants;
pub mod name;
pub mod operation;
pub mod parts;
pub mod rules;
pub mod span;

pub use error::Refusal;
pub use ids::{BlockId, ClientId, ContentId, InodeId, InodeKind, ServiceId, Slot, SpanId, Time};
pub use parts::Parts;

/// The encoded `FileDescriptorSet` of every proto, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

macro_rules! area {
    ($name:ident, $package:literal) => {
        #[allow(missing_docs, unreachable_pub, clippy::all)]
        #[doc = concat!("Generated from package `", $package, "`; the comments are in the proto file.")]
        pub mod $name {
            include!(concat!(env!("OUT_DIR"), "/", $package, ".rs"));
        }
    };
}

// prost names sibling packages by path (`super::super::types::v1`), so the module tree mirrors the packages.
/// The generated modules, nested like their packages.
pub mod clutch {
    macro_rules! nested {
        ($name:ident, $package:literal) => {
            /// One area.
            pub mod $name {
                area!(v1, $package);
            }
        };
    }
    nested!(types, "clutch.types.v1");
    nested!(session, "clutch.session.v1");
    nested!(registry, "clutch.registry.v1");
    nested!(shard, "clutch.shard.v1");
    nested!(cdc, "clutch.cdc.v1");
    nested!(blocks, "clutch.blocks.v1");
    nested!(state, "clutch.state.v1");
    nested!(admin, "clutch.admin.v1");
}

pub use clutch::{
    admin::v1 as admin, blocks::v1 as blocks, cdc::v1 as cdc, registry::v1 as registry,
    session::v1 as session, shard::v1 as shard, state::v1 as state, types::v1 as types,
};
