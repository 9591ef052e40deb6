//! What is always true of a shard's rows, and of all shards together. Run by tests, the simulator and `fsck`.
//!
//! Of one shard:
//! 1. every edge and past edge lies in a directory of this shard; its stored hash is its name's
//! 2. a removed directory has no current edges
//! 3. a directory's `edge_time` is at or above the times of its edges; an edge is newer than its predecessors
//! 4. no past edge owns a directory
//! 5. a content's extents are contiguous from 0, or from where its collection stands, to its size; a file's content
//!    and size agree
//! 6. a span's `uses` is the number of extents that name it; what is used is certified and long enough
//! 7. the block index holds exactly the blocks of the spans; no block twice, each of its span's slot, no two of a span on
//!    one service
//! 8. exactly the unpublished contents are in the index of transients
//! 9. a span is dead exactly if nothing uses it and no content waits for it
//! 10. a published content is its file's present one or has exactly one row among the file's past ones
//! 16. an extent whose bytes lie apart has exactly one row of inline data, of its length and digest; there is no other, and the sum of
//!     their lengths is the shard's
//!
//! Of all shards, when the CDC has nothing in flight:
//! 11. every current edge leads to an inode that exists
//! 12. a file or link has exactly one parent: a current edge or an owned past edge
//! 13. a directory has a parent if and only if exactly one current edge leads to it, from that parent (root aside)
//! 14. no edge is locked
//! 15. every directory that has a parent lies below the root: there are no loops

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use clutch_proto::{
    ContentId, InodeId, SpanId,
    name::hash63,
    shard::{ContentRow, EdgeRow, ExtentRow, InodeRow, PastContentRow, PastEdgeRow, extent_row::Source},
    types::Span,
};
use clutch_state::{
    StoreError, Table, View,
    hash::{Digest, digest},
    key_after,
    store::{decode_row, hex},
};
use prost::Message;

use crate::{inline, tables};

/// What one shard contributes to the checks of all.
#[derive(Default)]
pub struct Facts {
    /// Every inode and, for directories, its parent.
    pub inodes: BTreeMap<InodeId, u64>,
    /// Current edges: directory, target, locked.
    pub edges: Vec<(InodeId, u64, bool)>,
    /// Targets of owned past edges.
    pub owned_past: Vec<u64>,
    /// Blocks: service and block.
    pub blocks: Vec<(u64, u64)>,
    /// Past edges.
    pub past_edges: u64,
    /// Contents, published or not.
    pub contents: u64,
    /// Spans, dead ones among them.
    pub spans: u64,
    /// Bytes of inline data.
    pub inline_bytes: u64,
}

/// What contents say of spans.
#[derive(Default)]
struct SpanUses {
    /// The ranges of each span that are used.
    ranges: BTreeMap<u64, Vec<(u64, u64)>>,
    /// Spans that an unpublished content waits for.
    pending: BTreeSet<u64>,
}

/// Calls `each` for all rows of a table, page by page.
fn for_rows<M: Message + Default>(
    view: &dyn View,
    table: Table,
    mut each: impl FnMut(&Bytes, M),
) -> Result<(), StoreError> {
    let mut from: Vec<u8> = Vec::new();
    loop {
        let rows = view.scan(table, &from, &[], 2048)?;
        let Some((last, _)) = rows.last() else { return Ok(()) };
        from = [last, &[0][..]].concat();
        for (key, value) in rows {
            each(&key, decode_row(table, &key, value)?);
        }
    }
}

impl Facts {
    /// Adds the facts of other slots.
    pub fn add(&mut self, other: Facts) {
        let Facts { inodes, edges, owned_past, blocks, past_edges, contents, spans, inline_bytes } = other;
        self.inodes.extend(inodes);
        self.edges.extend(edges);
        self.owned_past.extend(owned_past);
        self.blocks.extend(blocks);
        self.past_edges += past_edges;
        self.contents += contents;
        self.spans += spans;
        self.inline_bytes += inline_bytes;
    }
}

/// Checks one shard; returns what is wrong and what the others must know.
pub fn check_shard(view: &dyn View) -> Result<(Vec<String>, Facts), StoreError> {
    let (mut wrong, facts) = check_slots(view, &inline_rows(view)?)?;
    let sum = inline::bytes(view)?;
    if sum != facts.inline_bytes {
        wrong.push(format!("{} bytes of inline data, but their sum says {sum}", facts.inline_bytes));
    }
    Ok((wrong, facts))
}

/// The same of some of its slots, whose inline data is not in the view.
pub fn check_slots(view: &dyn View, inline: &InlineRows) -> Result<(Vec<String>, Facts), StoreError> {
    let mut wrong = Vec::new();
    let mut facts = Facts::default();
    let mut inodes: BTreeMap<InodeId, InodeRow> = BTreeMap::new();
    for_rows(view, tables::INODE, |key, row: InodeRow| {
        match tables::parse_single(key).and_then(InodeId::from_wire).filter(|id| id.slot().0 == key[0]) {
            Some(id) => drop(inodes.insert(id, row)),
            None => wrong.push(format!("inode row with the key {}", clutch_state::store::hex(key))),
        }
    })?;
    check_edges(view, &inodes, &mut wrong, &mut facts)?;
    let spans = check_contents(view, &inodes, inline, &mut wrong, &mut facts)?;
    facts.inline_bytes = inline.values().map(|(length, _)| length).sum();
    check_spans(view, spans, &mut wrong, &mut facts)?;
    facts.inodes = inodes.into_iter().map(|(id, row)| (id, row.parent)).collect();
    Ok((wrong, facts))
}

fn check_edges(
    view: &dyn View,
    inodes: &BTreeMap<InodeId, InodeRow>,
    wrong: &mut Vec<String>,
    facts: &mut Facts,
) -> Result<(), StoreError> {
    let shown = |name: &[u8]| String::from_utf8_lossy(name).into_owned();
    let mut last_end: BTreeMap<(InodeId, Vec<u8>), u64> = BTreeMap::new();
    for_rows(view, tables::PAST_EDGE, |key, row: PastEdgeRow| {
        let Some((dir, hash, name, ended)) = tables::parse_past_edge_key(key) else {
            return wrong.push(format!("past edge with the key {}", clutch_state::store::hex(key)));
        };
        facts.past_edges += 1;
        let at = format!("past edge {:?} of directory {dir}", shown(name));
        if hash != hash63(name) {
            wrong.push(format!("{at}: the stored hash is not the name's"));
        }
        match inodes.get(&dir) {
            None => wrong.push(format!("{at}: the directory does not exist")),
            Some(row) if row.edge_time < ended => {
                wrong.push(format!("{at}: ended after the directory's edge time"))
            }
            Some(_) => {}
        }
        if row.created_at >= ended {
            wrong.push(format!("{at}: ended before it began"));
        }
        if row.owned {
            if InodeId::from_wire(row.target).is_none_or(InodeId::is_directory) {
                wrong.push(format!("{at}: owns a directory"));
            }
            facts.owned_past.push(row.target);
        }
        let end = last_end.entry((dir, name.to_vec())).or_default();
        if row.created_at < *end {
            wrong.push(format!("{at}: began before its predecessor ended"));
        }
        *end = ended;
    })?;
    for_rows(view, tables::EDGE, |key, row: EdgeRow| {
        let Some((dir, hash, name)) = tables::parse_edge_key(key) else {
            return wrong.push(format!("edge with the key {}", clutch_state::store::hex(key)));
        };
        let at = format!("edge {:?} of directory {dir}", shown(name));
        if hash != hash63(name) {
            wrong.push(format!("{at}: the stored hash is not the name's"));
        }
        match inodes.get(&dir) {
            None => wrong.push(format!("{at}: the directory does not exist")),
            Some(row) if row.parent == 0 => wrong.push(format!("{at}: the directory was removed")),
            Some(dir_row) if dir_row.edge_time < row.created_at => {
                wrong.push(format!("{at}: newer than the directory's edge time"));
            }
            Some(_) => {}
        }
        if last_end.get(&(dir, name.to_vec())).is_some_and(|end| row.created_at < *end) {
            wrong.push(format!("{at}: older than its predecessor's end"));
        }
        facts.edges.push((dir, row.target, row.locked));
    })
}

/// Checks contents and says how they use spans.
fn check_contents(
    view: &dyn View,
    inodes: &BTreeMap<InodeId, InodeRow>,
    inline: &InlineRows,
    wrong: &mut Vec<String>,
    facts: &mut Facts,
) -> Result<SpanUses, StoreError> {
    let mut contents: BTreeMap<u64, ContentRow> = BTreeMap::new();
    for_rows(view, tables::CONTENT, |key, row: ContentRow| match tables::parse_single(key) {
        Some(id) => drop(contents.insert(id, row)),
        None => wrong.push(format!("content row with the key {}", clutch_state::store::hex(key))),
    })?;
    facts.contents = contents.len() as u64;
    let mut uses = SpanUses::default();
    let mut ends: BTreeMap<u64, u64> = BTreeMap::new();
    let mut counts: BTreeMap<u64, u64> = BTreeMap::new();
    let mut apart: Vec<(Bytes, u64, Bytes)> = Vec::new();
    for_rows(view, tables::EXTENT, |key, row: ExtentRow| {
        let Some((content, offset)) = tables::parse_pair(key) else {
            return wrong.push(format!("extent with the key {}", clutch_state::store::hex(key)));
        };
        let end = ends.entry(content).or_insert_with(|| contents.get(&content).map_or(0, |c| c.begin));
        if *end != offset || row.length == 0 {
            wrong.push(format!("content {content:x}: an extent at {offset}, expected at {end}"));
        }
        *end = offset.saturating_add(row.length);
        *counts.entry(content).or_default() += 1;
        match row.source {
            Some(Source::Apart(digest)) => apart.push((key.clone(), row.length, digest)),
            Some(Source::Span(range)) => {
                uses.ranges.entry(range.span_id).or_default().push((u64::from(range.offset), row.length))
            }
            Some(Source::Inline(data)) if data.len() as u64 != row.length => {
                wrong.push(format!("content {content:x}: an inline extent of another length"));
            }
            Some(_) => {}
            None => wrong.push(format!("content {content:x}: an extent without a source")),
        }
        if !contents.contains_key(&content) {
            wrong.push(format!("an extent of content {content:x}, which does not exist"));
        }
    })?;
    check_inline(&apart, inline, wrong);
    for (id, row) in &contents {
        if row.begin > 0 && row.file != 0 {
            wrong.push(format!("content {id:x}: is published and begins at {}", row.begin));
        }
        if ends.get(id).copied().unwrap_or(row.begin) != row.size {
            wrong.push(format!("content {id:x}: its extents do not sum to its size {}", row.size));
        }
        let transient =
            view.get(tables::TRANSIENT, &tables::transient_key(row.deadline, ContentId(*id)))?.is_some();
        if transient != (row.file == 0) {
            wrong.push(format!("content {id:x}: published and transient, or neither"));
        }
        // What was given up, or is being taken apart, is not written to any more, and so not counted.
        let may_grow = row.file == 0 && row.begin == 0 && !row.cookie.is_empty();
        if may_grow && counts.get(id).copied().unwrap_or(0) != row.extents {
            wrong.push(format!("content {id:x}: counts {} extents", row.extents));
        }
        if row.file != 0 {
            let file = InodeId::from_wire(row.file).and_then(|f| inodes.get(&f));
            // Whether a past content is known as such is checked with the past ones.
            if file.is_none_or(|f| f.content == *id && f.size != row.size) {
                wrong.push(format!("content {id:x}: its file does not exist or has another size"));
            }
        }
        if row.pending_span != 0 {
            uses.pending.insert(row.pending_span);
        }
        if row.pending_span != 0
            && view.get(tables::SPAN, &tables::span_key(SpanId(row.pending_span)))?.is_none()
        {
            wrong.push(format!("content {id:x}: waits for a span that does not exist"));
        }
    }
    check_past_contents(view, inodes, &contents, wrong)?;
    for_rows(view, tables::TRANSIENT, |key, (): ()| {
        let known = tables::parse_pair(key)
            .and_then(|(deadline, id)| contents.get(&id).filter(|c| c.deadline == deadline));
        if known.is_none() {
            wrong.push(format!("a transient without its content ({})", clutch_state::store::hex(key)));
        }
    })?;
    Ok(uses)
}

/// What there is of inline data: lengths and digests by the extents' keys.
pub type InlineRows = BTreeMap<Bytes, (u64, Digest)>;

fn inline_rows(view: &dyn View) -> Result<InlineRows, StoreError> {
    let mut rows = InlineRows::new();
    view.visit(tables::INLINE, &[], &[], &mut |key, value| {
        rows.insert(Bytes::copy_from_slice(key), (value.len() as u64, digest(value)));
        true
    })?;
    Ok(rows)
}

/// Checks inline data against the extents that it belongs to: key, length and digest.
fn check_inline(apart: &[(Bytes, u64, Bytes)], rows: &InlineRows, wrong: &mut Vec<String>) {
    for (key, length, expected) in apart {
        let at = hex(key);
        match rows.get(key) {
            None => wrong.push(format!("no inline data for the extent at {at}")),
            Some((found, digest)) if found != length || digest[..] != expected[..] => {
                wrong.push(format!("other inline data at {at} than its extent names"));
            }
            Some(_) => {}
        }
    }
    if rows.len() != apart.len() {
        wrong.push(format!("{} rows of inline data for {} extents", rows.len(), apart.len()));
    }
}

fn check_past_contents(
    view: &dyn View,
    inodes: &BTreeMap<InodeId, InodeRow>,
    contents: &BTreeMap<u64, ContentRow>,
    wrong: &mut Vec<String>,
) -> Result<(), StoreError> {
    for (id, row) in inodes {
        if row.content != 0 && contents.get(&row.content).is_none_or(|c| c.file != id.raw()) {
            wrong.push(format!("file {id}: its content {:x} does not exist or is another's", row.content));
        }
    }
    let mut past: BTreeSet<u64> = BTreeSet::new();
    for_rows(view, tables::PAST_CONTENT, |key, row: PastContentRow| {
        let file = tables::parse_pair(key).and_then(|(file, _)| InodeId::from_wire(file));
        let Some(file) = file.filter(|f| inodes.contains_key(f)) else {
            return wrong.push(format!("content {:x} is a past one of no file", row.content));
        };
        if contents.get(&row.content).is_none_or(|c| c.file != file.raw()) {
            wrong
                .push(format!("content {:x} is a past one of file {file}, but not that file's", row.content));
        }
        if !past.insert(row.content) {
            wrong.push(format!("content {:x} is a past one twice", row.content));
        }
    })?;
    for (id, row) in contents.iter().filter(|(_, row)| row.file != 0) {
        let is_present =
            InodeId::from_wire(row.file).and_then(|f| inodes.get(&f)).is_some_and(|f| f.content == *id);
        if is_present == past.contains(id) {
            let what = if is_present { "both present and past" } else { "neither present nor past" };
            wrong.push(format!("content {id:x} of file {:x} is {what}", row.file));
        }
    }
    Ok(())
}

fn check_spans(
    view: &dyn View,
    mut uses: SpanUses,
    wrong: &mut Vec<String>,
    facts: &mut Facts,
) -> Result<(), StoreError> {
    let mut dead: BTreeSet<u64> = BTreeSet::new();
    for_rows(view, tables::DEAD_SPAN, |key, (): ()| match tables::parse_single(key) {
        Some(id) => drop(dead.insert(id)),
        None => wrong.push(format!("dead span with the key {}", clutch_state::store::hex(key))),
    })?;
    let mut held: BTreeMap<(u64, u64), u64> = BTreeMap::new();
    for_rows(view, tables::SPAN, |_, span: Span| {
        let id = span.span_id;
        facts.spans += 1;
        let used = uses.ranges.remove(&id).unwrap_or_default();
        let should_be_dead = used.is_empty() && !uses.pending.contains(&id);
        if should_be_dead != dead.remove(&id) {
            let what = if should_be_dead { "of no use, but not dead" } else { "dead, but of use" };
            wrong.push(format!("span {id:x} is {what}"));
        }
        if used.len() != span.uses as usize {
            wrong.push(format!("span {id:x}: counts {} uses, has {}", span.uses, used.len()));
        }
        if !used.is_empty() && !span.certified {
            wrong.push(format!("span {id:x}: used, but not certified"));
        }
        if used.iter().any(|(offset, length)| offset.saturating_add(*length) > u64::from(span.size)) {
            wrong.push(format!("span {id:x}: used beyond its end"));
        }
        let services: BTreeSet<u64> = span.blocks.iter().map(|b| b.service_id).collect();
        if services.len() != span.blocks.len() {
            wrong.push(format!("span {id:x}: two blocks on one service"));
        }
        for block in &span.blocks {
            if block.block_id as u8 != SpanId(id).slot().0 {
                wrong.push(format!("block {:x} of span {id:x} is of another slot", block.block_id));
            }
            if held.insert((block.service_id, block.block_id), id).is_some() {
                wrong.push(format!("block {:x} is in two spans", block.block_id));
            }
        }
    })?;
    for span in &dead {
        wrong.push(format!("dead span {span:x} does not exist"));
    }
    for span in uses.ranges.keys() {
        wrong.push(format!("span {span:x} is used, but does not exist"));
    }
    let mut indexed = BTreeSet::new();
    let mut from: Vec<u8> = Vec::new();
    loop {
        let rows = view.scan(tables::BLOCK, &from, &key_after(&[0xff]), 2048)?;
        let Some((last, _)) = rows.last() else { break };
        from = [last, &[0][..]].concat();
        for (key, value) in rows {
            let span = value.as_ref().try_into().map(u64::from_be_bytes).unwrap_or(0);
            match tables::parse_pair(&key).filter(|pair| held.get(pair) == Some(&span)) {
                Some(pair) => drop(indexed.insert(pair)),
                None => {
                    wrong.push(format!("the block index has {} of no span", clutch_state::store::hex(&key)))
                }
            }
        }
    }
    for (service, block) in held.keys().filter(|pair| !indexed.contains(pair)) {
        wrong.push(format!("block {block:x} on service {service:x} is not in the block index"));
    }
    facts.blocks = held.into_keys().collect();
    Ok(())
}

/// Follows parents upwards; what was found to reach the root, or not to, is not followed again.
fn check_loops(inodes: &BTreeMap<InodeId, u64>, wrong: &mut Vec<String>) {
    let mut known: BTreeSet<InodeId> = BTreeSet::from([InodeId::ROOT]);
    for start in inodes.keys().filter(|id| id.is_directory()) {
        let (mut at, mut path) = (*start, BTreeSet::new());
        while known.insert(at) {
            path.insert(at);
            match inodes.get(&at).copied().and_then(InodeId::from_wire) {
                Some(parent) => at = parent,
                // Removed, or its parent does not exist: told by other checks.
                None => break,
            }
        }
        if path.contains(&at) && inodes.get(&at).is_some_and(|parent| *parent != 0) {
            wrong.push(format!("directory {at} is its own ancestor"));
        }
    }
}

/// Checks what spans shards. Only meaningful when the CDC has nothing in flight.
pub fn check_cluster(shards: &[Facts]) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut inodes: BTreeMap<InodeId, u64> = BTreeMap::new();
    for facts in shards {
        for (id, parent) in &facts.inodes {
            if inodes.insert(*id, *parent).is_some() {
                wrong.push(format!("inode {id} is in two shards"));
            }
        }
    }
    check_loops(&inodes, &mut wrong);
    let mut parents: BTreeMap<InodeId, (u32, Option<InodeId>)> = BTreeMap::new();
    for (dir, target, locked) in shards.iter().flat_map(|f| &f.edges) {
        let known = InodeId::from_wire(*target).filter(|id| inodes.contains_key(id));
        let Some(target) = known else {
            wrong.push(format!("an edge of directory {dir} leads to inode {target:x}, which does not exist"));
            continue;
        };
        if *locked {
            wrong.push(format!(
                "an edge of directory {dir} to {target} is locked with no transaction in flight"
            ));
        }
        let entry = parents.entry(target).or_default();
        (entry.0, entry.1) = (entry.0 + 1, Some(*dir));
    }
    for target in shards.iter().flat_map(|f| &f.owned_past) {
        match InodeId::from_wire(*target).filter(|id| inodes.contains_key(id)) {
            Some(id) => parents.entry(id).or_default().0 += 1,
            None => wrong.push(format!("a past edge owns inode {target:x}, which does not exist")),
        }
    }
    for (id, parent) in &inodes {
        let (count, dir) = parents.get(id).copied().unwrap_or_default();
        if *id == InodeId::ROOT {
            if count != 0 {
                wrong.push("an edge leads to the root directory".into());
            }
        } else if id.is_directory() {
            let owned = *parent != 0;
            if owned && (count != 1 || dir.is_none_or(|d| d.raw() != *parent)) {
                wrong.push(format!("directory {id} has the parent {parent:x}, but {count} edges lead to it"));
            }
            if !owned && count != 0 {
                wrong.push(format!("directory {id} was removed, but {count} edges lead to it"));
            }
        } else if count != 1 {
            wrong.push(format!("inode {id} has {count} parents"));
        }
    }
    wrong
}
