//! Whole clusters for tests: simulated on one thread, or in production form in a temporary directory.

pub mod sim_cluster;

pub use sim_cluster::SimCluster;
