//! Whole clusters for tests: simulated on one thread, or in production form in a temporary directory; and the
//! harness that drives simulated ones from seeds.

pub mod batches;
pub mod begun_anew;
pub mod checkers;
pub mod coverage;
pub mod cut_off;
pub mod denied;
pub mod diverged;
pub mod fuzz;
pub mod generate;
pub mod golden_logs;
pub mod hanging;
pub mod healing;
pub mod history;
pub mod hot_paths;
pub mod joining;
pub mod just_started;
pub mod late_placement;
pub mod late_write;
pub mod led_ahead;
pub mod names;
pub mod old_snapshot;
pub mod oracle;
pub mod pins;
pub mod recording;
pub mod run;
pub mod script;
pub mod shrink;
pub mod sim_cluster;
pub mod sim_store;
pub mod slow_reader;
pub mod steps;
mod upkeep;
pub mod workload;

pub use sim_cluster::SimCluster;
