//! What travels between Clutch's processes and into its logs: messages, ids, error codes and limits.
//!
//! The messages are generated from `clutch/<area>/v1/<area>.proto`; the hand-written modules give their
//! numbers a type and a meaning. Nothing in here does I/O or reads a clock.

pub mod certificate;
pub mod crc;
pub mod error;
pub mod ids;
pub mod limits;
pub mod listing;
pub mod mutants;
pub mod name;
pub mod span;

pub use error::Refusal;
pub use ids::{BlockId, ClientId, ContentId, InodeId, InodeKind, ServiceId, Slot, SpanId, Time};

/// The encoded `FileDescriptorSet` of every proto, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

macro_rules! area {
    ($name:ident, $package:literal) => {
        #[allow(missing_docs, unreachable_pub, clippy::all)]
        #[doc = concat!("Generated from package `", $package, "`; the comments are in the proto file.")]
        pub mod $name {
            tonic::include_proto!($package);
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

impl session::Request {
    /// The number of the field `body`.
    pub const BODY: u32 = 6;
}

impl session::Response {
    /// The number of the field `body`.
    pub const BODY: u32 = 4;
}

/// Encodes `outer` with `inner` as its field of bytes `number`, which must be empty in `outer`: the same message as with
/// `inner` encoded first, without the copy between. Fields may come in any order.
pub fn encode_nested(outer: &impl prost::Message, number: u32, inner: &impl prost::Message) -> bytes::Bytes {
    use prost::encoding::{WireType, encode_key, encode_varint};
    let length = inner.encoded_len();
    let mut out = Vec::with_capacity(outer.encoded_len() + length + 16);
    out.extend_from_slice(&outer.encode_to_vec());
    encode_key(number, WireType::LengthDelimited, &mut out);
    encode_varint(length as u64, &mut out);
    inner.encode(&mut out).expect("a vector grows");
    out.into()
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::{
        blocks::BlocksReply,
        encode_nested,
        session::{Request, Response},
    };

    #[test]
    fn nested_is_the_same_as_encoded_first() {
        for data in [vec![], vec![7; 1], vec![9; 100_000]] {
            let reply = BlocksReply { data: data.into(), ..BlocksReply::default() };
            let outer = Response { time: 5, position: 6, ..Response::default() };
            let nested = encode_nested(&outer, Response::BODY, &reply);
            let expected = Response { body: reply.encode_to_vec().into(), ..outer };
            assert_eq!(Response::decode(nested).expect("decodes"), expected);
            let outer = Request { number: 3, admin: true, ..Request::default() };
            let nested = encode_nested(&outer, Request::BODY, &reply);
            let expected = Request { body: reply.encode_to_vec().into(), ..outer };
            assert_eq!(Request::decode(nested).expect("decodes"), expected);
        }
    }
}
