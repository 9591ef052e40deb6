//! Places in logs, and what stands there. The engines are elsewhere: whoever applies a batch needs to know none.

use std::fmt;

use bytes::Bytes;

/// A place in a log; 0 lies before the first record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Position(pub u64);

impl Position {
    /// The place after this one.
    pub fn next(self) -> Position {
        Position(self.0 + 1)
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One leader's reign; later reigns are greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The reigns of one incarnation of a log are counted below here; the bits above name the incarnation.
    pub const OF_INCARNATION: u64 = 1 << 40;

    /// The incarnation of its log in which a reign is: how often the log was begun anew, counted from 1.
    pub fn incarnation(self) -> u32 {
        u32::try_from(self.0 / Epoch::OF_INCARNATION).unwrap_or(u32::MAX).saturating_add(1)
    }
}

/// Names a node of a cluster; never given to another.
pub type NodeId = u64;

/// Names a log within a cluster: role and number as in a session's request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LogId {
    /// 1 registry, 2 CDC, 3 shard.
    pub role: u8,
    /// The shard's number; 0 for the others.
    pub number: u32,
}

impl LogId {
    /// The registry's log.
    pub const REGISTRY: LogId = LogId { role: 1, number: 0 };
    /// The CDC's log.
    pub const CDC: LogId = LogId { role: 2, number: 0 };

    /// A shard's log.
    pub fn shard(number: u32) -> LogId {
        LogId { role: 3, number }
    }
}

impl fmt::Display for LogId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.role {
            1 => f.write_str("registry"),
            2 => f.write_str("cdc"),
            _ => write!(f, "shard {}", self.number),
        }
    }
}

/// One record.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// Where it stands.
    pub position: Position,
    /// The reign in which it was appended.
    pub epoch: Epoch,
    /// Its entries; the index is an entry's ordinal.
    pub entries: Vec<Bytes>,
}
