//! The composition root: turns crates into nodes. The only shipped crate that names a concrete log engine or
//! store.
//!
//! [`node`] starts roles over whatever runtime, logs and stores it is given; [`up`] gives it the embedded
//! defaults: the `local` log engine and RocksDB under one directory, [`several`] one node of a cluster of several: the
//! `raft` engine. [`replay`] runs logs again, offline or from a
//! running cluster.

pub mod cdc_driver;
pub mod chains;
#[cfg(feature = "rocks")]
pub mod clock_file;
pub mod cluster_file;
pub mod handler;
pub mod healer;
pub mod joining;
mod keeper;
pub mod keys;
mod members;
pub mod metrics;
pub mod node;
pub mod packing;
mod placer;
#[cfg(feature = "rocks")]
pub mod replay;
#[cfg(feature = "rocks")]
pub mod retention;
#[cfg(feature = "rocks")]
pub mod rewind;
pub mod room;
pub mod rotation;
pub mod routes;
mod services;
#[cfg(feature = "rocks")]
pub mod several;
mod snapshots;
pub mod stores;
#[cfg(feature = "rocks")]
pub mod up;

pub use chains::{Chains, NewLogs};
pub use cluster_file::ClusterFile;
pub use node::{Node, NodeConfig, OfSeveral, Roles};
pub use packing::Packing;
pub use routes::Peers;
