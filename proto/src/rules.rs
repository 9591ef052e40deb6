//! The numbers that `apply` uses. They are part of what an old log means: a log begins with the version of its rules, and
//! the numbers of a version never change.
//!
//! [`crate::limits`] has the numbers of the front door, which refuses before anything is logged and may change with any
//! build. To change a number here, add a version: a module of its own that machines choose by what their genesis says.

/// The version that new logs begin with.
pub const VERSION: u32 = 1;

/// Refuses rules that this build does not have.
///
/// # Errors
/// A sentence for the operator.
pub fn check(version: u32) -> Result<(), String> {
    match version {
        VERSION => Ok(()),
        other => Err(format!("rules of version {other}; this build knows version {VERSION}")),
    }
}

/// The first version.
pub mod v1 {
    /// Bytes in a name.
    pub const NAME_BYTES_MAX: usize = 255;
    /// Bytes in a symbolic link's target.
    pub const SYMLINK_BYTES_MAX: usize = 4095;
    /// Directories between a path's end and the root.
    pub const PATH_DEPTH_MAX: usize = 4096;
    /// Bytes that are stored in the metadata instead of in blocks.
    pub const INLINE_BYTES_MAX: usize = 255;
    /// Bytes of a file that is stored in the metadata as a whole.
    pub const INLINE_FILE_BYTES_MAX: usize = 65_536;
    /// Bytes of inline data that one entry may copy.
    pub const INLINE_PER_ENTRY_BYTES_MAX: u64 = 65_536;
    /// Data blocks of a span.
    pub const DATA_BLOCKS_MAX: u32 = 16;
    /// Parity blocks of a span.
    pub const PARITY_BLOCKS_MAX: u32 = 16;
    /// Bytes of user data in a span.
    pub const SPAN_BYTES_MAX: u32 = 104_857_600;
    /// Stripes in a span.
    pub const STRIPES_MAX: u32 = 255;
    /// A page of a block.
    pub const PAGE_BYTES: u32 = 4096;
    /// Bytes of one block.
    pub const BLOCK_BYTES_MAX: u32 = 105_902_080;
    /// Bytes of a file.
    pub const FILE_BYTES_MAX: u64 = 4_611_686_018_427_387_904;
    /// Extents of one content.
    pub const CONTENT_EXTENTS_MAX: u64 = 4_194_304;
    /// Extents that one request shares, moves or takes apart.
    pub const EXTENTS_PER_ENTRY_MAX: usize = 256;
    /// Past contents that go with their file in one entry.
    pub const CONTENTS_PER_ENTRY_MAX: usize = 256;
    /// Newer versions that a snapshot policy may ask for.
    pub const SNAPSHOT_VERSIONS_MAX: u32 = 1000;
    /// How long what was deleted is kept where no directory says otherwise.
    pub const SNAPSHOT_AGE_MS_DEFAULT: u64 = 604_800_000;
    /// Classes in one part of a directory's policy.
    pub const POLICY_CLASSES_MAX: usize = 16;
    /// Bytes of a cell that a policy may ask for.
    pub const CELL_BYTES_MAX: u32 = 16_777_216;
    /// Outcomes that are kept for one client above its acknowledged watermark.
    pub const CLIENT_OUTCOMES_MAX: usize = 4096;
    /// Clients that one log remembers at a time.
    pub const CLIENTS_MAX: u64 = 10_000_000;
    /// How long a client's outcomes are kept after its last request.
    pub const CLIENT_IDLE_LIFETIME_MS: u64 = 3_600_000;
    /// Idle clients forgotten by one batch at most, besides as many as it brought.
    pub const FORGOTTEN_PER_BATCH_MAX: usize = 64;
    /// How long an unpublished content lives without use.
    pub const TRANSIENT_LIFETIME_MS: u64 = 28_800_000;
    /// How long a write of a block is granted.
    pub const CERTIFICATE_LIFETIME_MS: u64 = 3_600_000;
    /// Block services of a cluster.
    pub const SERVICES_MAX: usize = 1_000_000;
    /// Shards of a cluster.
    pub const SHARDS_MAX: u32 = 256;
    /// Transactions of the CDC that may be in flight.
    pub const TRANSACTIONS_MAX: u64 = 10_000;
    /// Invitations of nodes that may be open.
    pub const INVITATIONS_MAX: usize = 1000;
    /// How long an invitation may be good.
    pub const INVITATION_LIFETIME_MS_MAX: u64 = 2_592_000_000;
    /// How long an invitation that is over is remembered.
    pub const INVITATION_SWEPT_AFTER_MS: u64 = 600_000;
    /// The highest number of a node that is invited.
    pub const NODE_NUMBER_MAX: u64 = 4_294_967_295;
    /// Ended moves that the CDC remembers for walks.
    pub const MOVES_REMEMBERED: u64 = 1024;
}

#[cfg(test)]
mod tests {
    use super::v1;
    use crate::limits;

    #[test]
    fn rules_of_other_versions_are_refused() {
        assert_eq!(super::check(super::VERSION), Ok(()));
        for other in [0, super::VERSION + 1] {
            let refused = super::check(other).expect_err("is refused");
            assert!(refused.contains(&format!("version {other};")), "{refused}");
        }
    }

    #[test]
    fn the_front_door_lets_nothing_in_that_apply_refuses() {
        let pairs = [
            (limits::NAME_BYTES_MAX as u64, v1::NAME_BYTES_MAX as u64),
            (limits::SYMLINK_BYTES_MAX as u64, v1::SYMLINK_BYTES_MAX as u64),
            (limits::INLINE_BYTES_MAX as u64, v1::INLINE_BYTES_MAX as u64),
            (limits::INLINE_FILE_BYTES_MAX as u64, v1::INLINE_FILE_BYTES_MAX as u64),
            (u64::from(limits::SPAN_BYTES_MAX), u64::from(v1::SPAN_BYTES_MAX)),
            (u64::from(limits::BLOCK_BYTES_MAX), u64::from(v1::BLOCK_BYTES_MAX)),
            (limits::EXTENTS_PER_ENTRY_MAX as u64, v1::EXTENTS_PER_ENTRY_MAX as u64),
            (u64::from(limits::SHARDS_MAX), u64::from(v1::SHARDS_MAX)),
        ];
        for (door, apply) in pairs {
            assert!(door <= apply, "{door} > {apply}");
        }
    }
}
