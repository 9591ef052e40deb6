//! What the real shard has at the end is what the oracle has.

use std::collections::BTreeMap;

use bytes::Bytes;
use clutch_log::LogId;
use clutch_proto::{
    shard::{ContentRow, EdgeRow, ExtentRow, InodeRow, PastContentRow, PastEdgeRow, extent_row},
    types::Span,
};
use clutch_shard::tables;
use clutch_state::{MemoryStore, Table, View};
use prost::Message;

use super::{Evidence, Violation};
use crate::oracle::{Edge, Past, Source};

/// The states that full replays gave.
pub type Replayed = BTreeMap<LogId, std::sync::Arc<MemoryStore>>;

/// Size, whether it is certified, its uses, and services and blocks.
type SpanFacts = (u32, bool, usize, Vec<(u64, u64)>);

pub(crate) fn rows<M: Message + Default>(store: &MemoryStore, table: Table) -> Vec<(Bytes, M)> {
    let rows = store.scan(table, &[], &[], usize::MAX).unwrap_or_default();
    rows.into_iter().filter_map(|(key, value)| Some((key, M::decode(value).ok()?))).collect()
}

pub(super) fn compare<K: Ord + std::fmt::Debug, V: PartialEq + std::fmt::Debug>(
    what: &str,
    got: &BTreeMap<K, V>,
    expected: &BTreeMap<K, V>,
    wrong: &mut Vec<String>,
) {
    for (key, value) in got {
        match expected.get(key) {
            None => wrong.push(format!("{what} {key:?} is {value:?}, the oracle has none")),
            Some(expected) if expected != value => {
                wrong.push(format!("{what} {key:?} is {value:?}, the oracle has {expected:?}"));
            }
            Some(_) => {}
        }
    }
    for (key, value) in expected.iter().filter(|(key, _)| !got.contains_key(key)) {
        wrong.push(format!("{what} {key:?} is not there, the oracle has {value:?}"));
    }
}

/// Compares all shards.
pub fn check(evidence: &Evidence, replayed: &Replayed) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (id, shard) in &evidence.shards {
        let Some(store) = replayed.get(id) else { continue };
        let oracle = &shard.oracle;
        let mut wrong = Vec::new();
        let inodes: BTreeMap<u64, InodeRow> = rows::<InodeRow>(store, tables::INODE)
            .into_iter()
            .filter_map(|(key, row)| Some((tables::parse_single(&key)?, row)))
            .collect();
        compare("inode", &inodes, &oracle.inodes, &mut wrong);
        let edges: BTreeMap<(u64, Bytes), Edge> = rows::<EdgeRow>(store, tables::EDGE)
            .into_iter()
            .filter_map(|(key, e)| {
                let (dir, _, name) = tables::parse_edge_key(&key)?;
                let EdgeRow { target, created_at, locked } = e;
                Some(((dir.raw(), Bytes::copy_from_slice(name)), Edge { target, created_at, locked }))
            })
            .collect();
        compare("edge", &edges, &oracle.edges, &mut wrong);
        let past: BTreeMap<(u64, Bytes, u64), Past> = rows::<PastEdgeRow>(store, tables::PAST_EDGE)
            .into_iter()
            .filter_map(|(key, p)| {
                let (dir, _, name, ended) = tables::parse_past_edge_key(&key)?;
                let PastEdgeRow { target, created_at, owned } = p;
                Some(((dir.raw(), Bytes::copy_from_slice(name), ended), Past { target, created_at, owned }))
            })
            .collect();
        compare("past edge", &past, &oracle.past, &mut wrong);
        let contents: BTreeMap<u64, (u64, u64)> = rows::<ContentRow>(store, tables::CONTENT)
            .into_iter()
            .filter_map(|(key, c)| Some((tables::parse_single(&key)?, (c.size, c.file))))
            .collect();
        let expected = oracle.contents.iter().map(|(id, c)| (*id, (c.size, c.file))).collect();
        compare("content", &contents, &expected, &mut wrong);
        let past_contents: BTreeMap<(u64, u64), (u64, u64)> =
            rows::<PastContentRow>(store, tables::PAST_CONTENT)
                .into_iter()
                .filter_map(|(key, p)| Some((tables::parse_pair(&key)?, (p.content, p.dir))))
                .collect();
        compare("past content", &past_contents, &oracle.past_contents, &mut wrong);
        let extents = extents(store);
        let expected = oracle
            .contents
            .iter()
            .flat_map(|(id, c)| c.extents.iter().map(|(at, length, s)| ((*id, *at), (*length, s.clone()))))
            .collect();
        compare("extent", &extents, &expected, &mut wrong);
        let spans: BTreeMap<u64, SpanFacts> = rows::<Span>(store, tables::SPAN)
            .into_iter()
            .map(|(_, s)| {
                let blocks = s.blocks.iter().map(|b| (b.service_id, b.block_id)).collect();
                (s.span_id, (s.size, s.certified, s.uses as usize, blocks))
            })
            .collect();
        let expected = oracle
            .spans
            .iter()
            .map(|(id, s)| (*id, (s.size, s.certified, oracle.uses(*id), s.blocks.clone())));
        compare("span", &spans, &expected.collect(), &mut wrong);
        violations
            .extend(wrong.into_iter().take(5).map(|what| Violation::new("oracle", format!("{id}: {what}"))));
    }
    violations
}

/// Lengths and sources of all extents, by content and offset.
fn extents(store: &MemoryStore) -> BTreeMap<(u64, u64), (u64, Source)> {
    let rows = rows::<ExtentRow>(store, tables::EXTENT).into_iter();
    let extents = rows.filter_map(|(key, extent)| {
        let source = match extent.source? {
            extent_row::Source::Inline(data) => Source::Inline(data),
            extent_row::Source::Apart(_) => {
                Source::Inline(store.get(tables::INLINE, &key).expect("memory is read")?)
            }
            extent_row::Source::Hole(_) => Source::Hole,
            extent_row::Source::Span(range) => Source::Span(range.span_id, range.offset),
        };
        Some((tables::parse_pair(&key)?, (extent.length, source)))
    });
    extents.collect()
}
