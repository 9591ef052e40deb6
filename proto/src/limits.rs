//! Every limit in one place, with its reason. A request over a limit gets an error that names it.
//!
//! They are the front door's and may change with any build, but for what describes a block on a disk (a page, stripes). The
//! feature `changed` makes another build: what it replays must have the same hashes, because `apply` takes its numbers from
//! [`crate::rules`].

/// The limit of this build: the second one with the feature `changed`.
const fn pick<T: Copy>(shipped: T, changed: T) -> T {
    if cfg!(feature = "changed") { changed } else { shipped }
}

/// Bytes in a name, as POSIX has it.
pub const NAME_BYTES_MAX: usize = pick(255, 200);
/// Bytes in a symbolic link's target, as Linux has it.
pub const SYMLINK_BYTES_MAX: usize = pick(4095, 4000);
/// Directories between a path's end and the root: bounds every ancestor walk.
pub const PATH_DEPTH_MAX: usize = pick(4096, 4000);
/// Bytes that are stored in the metadata instead of in blocks.
pub const INLINE_BYTES_MAX: usize = pick(255, 200);
/// Bytes of a file that is stored in the metadata as a whole, in a table of its own: what one more round of syncs would cost more
/// than its bytes in the log.
pub const INLINE_FILE_BYTES_MAX: usize = pick(64 << 10, 32 << 10);
/// Such bytes in one shard: they are on every replica, and in every snapshot.
pub const INLINE_OF_SHARD_BYTES_MAX: u64 = pick(16 << 30, 8 << 30);
/// The same bytes in one page of a layout, but for the first extent.
pub const LAYOUT_INLINE_BYTES_MAX: usize = 1 << 20;
/// Data blocks of a span.
pub const DATA_BLOCKS_MAX: u32 = pick(16, 12);
/// Parity blocks of a span.
pub const PARITY_BLOCKS_MAX: u32 = pick(16, 12);
/// Bytes of user data in a span.
pub const SPAN_BYTES_MAX: u32 = pick(100 << 20, 96 << 20);
/// Stripes in a span: bounds the list of cell CRCs.
pub const STRIPES_MAX: u32 = 255;
/// A page of a block: the unit that carries a CRC on disk.
pub const PAGE_BYTES: u32 = 4096;
/// Bytes of one block: a span of one data block.
pub const BLOCK_BYTES_MAX: u32 = SPAN_BYTES_MAX + PAGE_BYTES * STRIPES_MAX;
/// Bytes of a file: offsets stay positive as signed 64-bit numbers.
pub const FILE_BYTES_MAX: u64 = pick(1 << 62, 1 << 61);
/// Extents, and so spans, of one content: 400 TiB of the largest spans, 32 TiB of those of the default policy. Bounds what
/// one file makes of the metadata and how many entries its collection takes.
pub const CONTENT_EXTENTS_MAX: u64 = pick(1 << 22, 1 << 21);
/// Entries of one page of a listing.
pub const READDIR_ENTRIES_MAX: usize = pick(4096, 1000);
/// Extents of one page of a layout.
pub const LAYOUT_EXTENTS_MAX: usize = pick(512, 100);
/// Rows of one page of a visit: inodes, unpublished contents, past contents, blocks.
pub const VISIT_ROWS_MAX: usize = 1024;
/// Dead spans of one page: each carries a certificate for every block.
pub const VISIT_SPANS_MAX: usize = 64;
/// Extents that one request shares, moves or takes apart: bounds the work of an entry.
pub const EXTENTS_PER_ENTRY_MAX: usize = pick(256, 128);
/// Rows of one hash, and of one kind (present or past), up to which a whole history is read at once.
pub const WHOLE_HISTORY_ROWS_MAX: usize = 40_000;
/// Past contents that go with their file in one entry; the file goes with the last of them.
pub const CONTENTS_PER_ENTRY_MAX: usize = pick(256, 128);
/// Newer versions that a snapshot policy may ask for: bounds the look at a name's history.
pub const SNAPSHOT_VERSIONS_MAX: u32 = pick(1000, 900);
/// How long what was deleted is kept where no directory says otherwise: time to notice a mistake.
pub const SNAPSHOT_AGE_MS_DEFAULT: u64 = pick(7 * 24 * 60 * 60 * 1000, 24 * 60 * 60 * 1000);
/// Classes in one part of a directory's policy.
pub const POLICY_CLASSES_MAX: usize = pick(16, 12);
/// Bytes of a cell that a policy may ask for.
pub const CELL_BYTES_MAX: u32 = pick(16 << 20, 8 << 20);
/// Bytes of one request or answer on the wire; a block with its certificate must fit.
pub const MESSAGE_BYTES_MAX: usize = BLOCK_BYTES_MAX as usize + (1 << 20);
/// Bytes of one metadata request; keeps a log record small.
pub const METADATA_REQUEST_BYTES_MAX: usize = 1 << 20;
/// Requests of one session that may be unanswered at a time; its receiver stops reading until some are.
pub const SESSION_REQUESTS_MAX: usize = 4096;
/// Sessions that a node serves at a time; more are refused. Each costs some buffers even when nothing happens on it.
pub const SESSIONS_MAX: usize = 4096;
/// Calls and sessions that one connection may have open at a time.
pub const CONNECTION_STREAMS_MAX: u32 = 256;
/// Frames in one message of a session.
pub const MESSAGE_FRAMES_MAX: usize = 512;
/// Entries in one batch of a log.
pub const BATCH_ENTRIES_MAX: usize = pick(1024, 500);
/// Bytes in one batch of a log.
pub const BATCH_BYTES_MAX: usize = 4 << 20;
/// Requests that wait in front of a replica before more are refused as overloaded.
pub const INBOX_REQUESTS_MAX: usize = 8192;
/// Bytes that an answer of a scan or a log read carries.
pub const SCAN_BYTES_MAX: usize = 4 << 20;
/// Outcomes that are kept for one client above its acknowledged watermark.
pub const CLIENT_OUTCOMES_MAX: usize = pick(4096, 2048);
/// Clients that one log remembers at a time: ten for each of the million that a cluster is made for, because every run of
/// a command line is one and is remembered for [`CLIENT_IDLE_LIFETIME_MS`]. One batch may take it beyond this.
pub const CLIENTS_MAX: u64 = pick(10_000_000, 1_000_000);
/// How long a client's outcomes are kept after its last request.
pub const CLIENT_IDLE_LIFETIME_MS: u64 = pick(60 * 60 * 1000, 30 * 60 * 1000);
/// How long an unpublished content lives without use.
pub const TRANSIENT_LIFETIME_MS: u64 = pick(8 * 60 * 60 * 1000, 4 * 60 * 60 * 1000);
/// How far ahead of the receiver's clock a sender's time may be.
pub const CLOCK_AHEAD_MS_MAX: u64 = 500;
/// How long a certificate for a block is good.
pub const CERTIFICATE_LIFETIME_MS: u64 = pick(60 * 60 * 1000, 30 * 60 * 1000);
/// The highest skew between two clocks that certificates tolerate.
pub const CLOCK_SKEW_MS_MAX: u64 = 60 * 1000;
/// Services that a client may ask to avoid in one request.
pub const AVOID_MAX: usize = 256;
/// Block services of a cluster that the shards' states carry.
pub const SERVICES_MAX: usize = pick(1_000_000, 500_000);
/// Shards of a cluster.
pub const SHARDS_MAX: u32 = pick(256, 128);

const _: () = assert!(CONTENT_EXTENTS_MAX * SPAN_BYTES_MAX as u64 <= FILE_BYTES_MAX);
const _: () = assert!(BATCH_BYTES_MAX > METADATA_REQUEST_BYTES_MAX);
const _: () = assert!(
    STRIPES_MAX as usize * (DATA_BLOCKS_MAX + PARITY_BLOCKS_MAX) as usize * 4 < METADATA_REQUEST_BYTES_MAX
);
const _: () = assert!(BLOCK_BYTES_MAX.is_multiple_of(PAGE_BYTES) && MESSAGE_BYTES_MAX < u32::MAX as usize);
