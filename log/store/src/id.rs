//! What a store's groups are called by, and what an engine promises to one.

use std::fmt;

use bytes::Bytes;
use clutch_log::{Epoch, LogId};

/// Incarnations are counted up to here; records have 24 bits for them.
pub const INCARNATION_MAX: u32 = 1 << 24;

/// What one engine keeps of a log: the log, and how often it was begun anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupId {
    /// The log.
    pub log: LogId,
    /// 1 for the first life of the log, at most [`INCARNATION_MAX`].
    pub incarnation: u32,
}

impl From<LogId> for GroupId {
    fn from(log: LogId) -> GroupId {
        GroupId { log, incarnation: 1 }
    }
}

impl fmt::Display for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.incarnation {
            1 => write!(f, "{}", self.log),
            incarnation => write!(f, "{} (incarnation {incarnation})", self.log),
        }
    }
}

/// What an engine has promised to its group, in its own words; the newest counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vote {
    /// The reign that it is about.
    pub epoch: Epoch,
    /// The engine's own.
    pub content: Bytes,
}
