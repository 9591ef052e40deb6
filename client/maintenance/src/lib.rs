//! Looking after what is stored, over the client library alone: collection of space, checks of the whole cluster, and healing.
//!
//! Whoever looks after things only proposes: every decision is made again where it takes effect.

pub mod collector;
pub mod fsck;
pub mod heal;
pub mod members;
