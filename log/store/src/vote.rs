//! What an engine promises to its group.

use bytes::Bytes;
use clutch_log::Epoch;

/// What an engine has promised to its group, in its own words; the newest counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vote {
    /// The reign that it is about.
    pub epoch: Epoch,
    /// The engine's own.
    pub content: Bytes,
}
