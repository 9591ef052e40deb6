//! The shard's tables and their keys. All numbers in keys are big-endian, so that keys sort like them.

use clutch_proto::{ContentId, InodeId, ServiceId, Slot, SpanId, name::hash63};
use clutch_state::{Key, Table};

/// One row: which slots this shard has (`Genesis`).
pub const SHARD: Table = Table(16);
/// Service id → `BlockService`, as logged.
pub const SERVICE: Table = Table(17);
/// slot, inode → `InodeRow`.
pub const INODE: Table = Table(64);
/// slot, directory, name hash, name → `EdgeRow`.
pub const EDGE: Table = Table(65);
/// slot, directory, name hash, name length, name, end → `PastEdgeRow`.
pub const PAST_EDGE: Table = Table(66);
/// slot, content → `ContentRow`.
pub const CONTENT: Table = Table(67);
/// slot, content, offset → `ExtentRow`.
pub const EXTENT: Table = Table(68);
/// slot, span → `Span`.
pub const SPAN: Table = Table(69);
/// slot, deadline, content → nothing.
pub const TRANSIENT: Table = Table(70);
/// slot, service, block → span.
pub const BLOCK: Table = Table(71);
/// slot, file, end → `PastContentRow`.
pub const PAST_CONTENT: Table = Table(73);
/// slot, span that nothing will use again → nothing.
pub const DEAD_SPAN: Table = Table(74);
/// slot → `CounterRow`.
pub const COUNTER: Table = Table(72);

/// One row: bytes of all inline data that lie in the table below, 8 bytes, big-endian; none stands for 0.
pub const INLINE_BYTES: Table = Table(18);
/// slot, content, offset → bytes of a content, by the digest that its `ExtentRow` has.
pub const INLINE: Table = Table(192);

/// The tables whose keys begin with a slot, all of them but for that of inline data: rows of one slot speak only of rows of the same slot.
pub const BY_SLOT: std::ops::RangeInclusive<u8> = INODE.0..=DEAD_SPAN.0;

/// Tables that are written for later and seldom read, history and indexes for those who collect and repair; no other
/// machine has tables of these numbers.
pub const PASSING: &[Table] =
    &[Table::CLIENTS_BY_MINUTE, PAST_EDGE, PAST_CONTENT, TRANSIENT, BLOCK, DEAD_SPAN, INLINE];

fn key(slot: Slot, numbers: &[u64]) -> Key {
    let mut key = Key::with_capacity(1 + numbers.len() * 8);
    key.push(slot.0);
    for number in numbers {
        key.extend_from_slice(&number.to_be_bytes());
    }
    key
}

/// Key of an inode.
pub fn inode_key(id: InodeId) -> Key {
    key(id.slot(), &[id.raw()])
}

/// Key of an edge.
pub fn edge_key(dir: InodeId, name: &[u8]) -> Key {
    let mut key = key(dir.slot(), &[dir.raw(), hash63(name)]);
    key.extend_from_slice(name);
    key
}

/// What all edges of a directory from a hash on are at or above.
pub fn edge_from(dir: InodeId, hash: u64) -> Key {
    key(dir.slot(), &[dir.raw(), hash])
}

/// What all edges of a directory behind a name are at or above.
pub fn edge_behind(dir: InodeId, name: &[u8]) -> Key {
    let mut key = edge_key(dir, name);
    key.push(0);
    key
}

/// What all edges and past edges of a directory begin with.
pub fn directory_prefix(dir: InodeId) -> Key {
    key(dir.slot(), &[dir.raw()])
}

/// Directory, hash and name of an edge's key; `None` when it is not one.
pub fn parse_edge_key(key: &[u8]) -> Option<(InodeId, u64, &[u8])> {
    let (numbers, name) = key.get(1..)?.split_at_checked(16)?;
    let dir = InodeId::from_wire(u64::from_be_bytes(numbers[..8].try_into().ok()?))?;
    Some((dir, u64::from_be_bytes(numbers[8..].try_into().ok()?), name))
}

/// What all past edges of a name begin with.
pub fn past_edge_prefix(dir: InodeId, name: &[u8]) -> Key {
    let mut key = key(dir.slot(), &[dir.raw(), hash63(name)]);
    // Names have at most 255 bytes.
    key.push(name.len() as u8);
    key.extend_from_slice(name);
    key
}

/// Key of a past edge.
pub fn past_edge_key(dir: InodeId, name: &[u8], ended_at: u64) -> Key {
    let mut key = past_edge_prefix(dir, name);
    key.extend_from_slice(&ended_at.to_be_bytes());
    key
}

/// Directory, hash, name and end of a past edge's key; `None` when it is not one.
pub fn parse_past_edge_key(key: &[u8]) -> Option<(InodeId, u64, &[u8], u64)> {
    let (numbers, rest) = key.get(1..)?.split_at_checked(16)?;
    let dir = InodeId::from_wire(u64::from_be_bytes(numbers[..8].try_into().ok()?))?;
    let hash = u64::from_be_bytes(numbers[8..].try_into().ok()?);
    let (len, rest) = rest.split_first()?;
    let (name, ended) = rest.split_at_checked(usize::from(*len))?;
    Some((dir, hash, name, u64::from_be_bytes(ended.try_into().ok()?)))
}

/// Key of a content.
pub fn content_key(id: ContentId) -> Key {
    key(id.slot(), &[id.0])
}

/// Key of an extent; with offset 0, the first that a content can have.
pub fn extent_key(content: ContentId, offset: u64) -> Key {
    key(content.slot(), &[content.0, offset])
}

/// Key of a past content; with end 0, what all of a file's are at or above.
pub fn past_content_key(file: InodeId, ended_at: u64) -> Key {
    key(file.slot(), &[file.raw(), ended_at])
}

/// A slot's rows from a number on.
pub fn from_number(slot: Slot, number: u64) -> Key {
    key(slot, &[number])
}

/// Key of a span.
pub fn span_key(id: SpanId) -> Key {
    key(id.slot(), &[id.0])
}

/// Key of a transient's deadline.
pub fn transient_key(deadline: u64, content: ContentId) -> Key {
    key(content.slot(), &[deadline, content.0])
}

/// Key in the block index.
pub fn block_key(slot: Slot, service: ServiceId, block: u64) -> Key {
    key(slot, &[service.0, block])
}

/// Reads two numbers behind the slot.
pub fn parse_pair(key: &[u8]) -> Option<(u64, u64)> {
    let numbers = key.get(1..17).filter(|_| key.len() == 17)?;
    Some((
        u64::from_be_bytes(numbers[..8].try_into().ok()?),
        u64::from_be_bytes(numbers[8..].try_into().ok()?),
    ))
}

/// Reads the number behind the slot.
pub fn parse_single(key: &[u8]) -> Option<u64> {
    key.get(1..).and_then(|n| Some(u64::from_be_bytes(n.try_into().ok()?)))
}
