//! Looking after what is stored, over the client library alone: collection of space and checks of the whole cluster.
//!
//! Whoever looks after things only proposes: every decision is made again where it takes effect.

pub mod collector;
pub mod fsck;
pub mod members;
