//! clutch-log-raft.
