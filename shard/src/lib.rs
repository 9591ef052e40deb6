//! clutch-shard.
