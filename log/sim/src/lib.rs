//! clutch-log-sim.
