//! What reads must see.

use bytes::Bytes;
use clutch_proto::{
    ContentId, InodeId, InodeKind, ServiceId, Slot, SpanId, listing,
    name::{self, hash63},
    shard::*,
    types::{Attributes, Code},
};
use clutch_shard::tables;
use clutch_state::Key;
use shard_reply::Reply;

use super::{Edge, Outcome, Past, ShardOracle, kind_of};

impl ShardOracle {
    /// What a read must see now; `None` for reads that are not modelled.
    pub fn read(&self, op: &shard_request::Op) -> Option<Outcome> {
        use shard_request::Op;
        Some(match op {
            Op::Lookup(op) => self.lookup(op),
            Op::Stat(op) => self.stat(op),
            Op::ReadDir(op) => self.read_dir(op),
            Op::Layout(op) => self.layout(op),
            Op::History(op) if op.with_present => self.whole_history(op)?,
            Op::History(op) => self.history(op)?,
            Op::ContentHistory(op) => self.content_history(op),
            Op::VisitInodes(op) => self.visit_inodes(op),
            Op::VisitTransients(op) => self.visit_transients(op),
            Op::VisitPastContents(op) => self.visit_past_contents(op),
            Op::VisitDeadSpans(op) => self.visit_dead_spans(op),
            Op::VisitBlocks(op) => self.visit_blocks(op),
            Op::VisitSpans(op) => self.visit_spans(op),
            _ => return None,
        })
    }

    fn lookup(&self, op: &Lookup) -> Outcome {
        self.directory_here(op.dir)?;
        name::check(&op.name).map_err(|r| r.code)?;
        let edge = self.edges.get(&(op.dir, op.name.clone())).ok_or(Code::NotFound)?;
        let Edge { target, created_at, locked } = *edge;
        Ok(Reply::Edge(EdgeReply { target, created_at, locked, replaced: 0 }))
    }

    fn stat(&self, op: &Stat) -> Outcome {
        let id = kind_of(op.id)?;
        self.check_slot(id.slot().0)?;
        let row = self.inodes.get(&op.id).ok_or(Code::NotFound)?;
        Ok(Reply::Attributes(attributes(op.id, row)))
    }

    fn read_dir(&self, op: &ReadDir) -> Outcome {
        self.directory_here(op.dir)?;
        if !self.inodes.contains_key(&op.dir) {
            return Err(Code::NotFound);
        }
        if op.cursor >> 63 != 0 || !op.after.is_empty() && hash63(&op.after) != op.cursor {
            return Err(Code::InvalidArgument);
        }
        let limit = match op.limit as usize {
            0 => self.pages.entries,
            asked => asked.min(self.pages.entries),
        };
        let all = self.edges.range((op.dir, Bytes::new())..).take_while(|((d, _), _)| *d == op.dir);
        let mut names: Vec<(u64, &Bytes, &Edge)> = all
            .map(|((_, name), edge)| (hash63(name), name, edge))
            .filter(|(hash, name, _)| (*hash, &name[..]) > (op.cursor, &op.after[..]))
            .collect();
        names.sort_by_key(|(hash, name, _)| (*hash, *name));
        let (mut next_cursor, mut next_after) = (0, Bytes::new());
        if let Some(((last, name, _), (next, ..))) =
            names[..names.len().min(limit)].last().zip(names.get(limit))
        {
            next_cursor = *next;
            if last == next {
                next_after = (*name).clone();
            }
        }
        names.truncate(limit);
        let mut entries = Vec::new();
        for (_, name, edge) in names {
            listing::push(&mut entries, name, edge.target, edge.created_at);
        }
        Ok(Reply::ReadDir(ReadDirReply { entries: entries.into(), next_cursor, next_after }))
    }

    /// Content, size and lengths; the spans' certificates are not modelled.
    fn layout(&self, op: &Layout) -> Outcome {
        let id = kind_of(op.id)?;
        self.check_slot(id.slot().0)?;
        match id.kind() {
            InodeKind::File => {}
            InodeKind::Directory => return Err(Code::IsDirectory),
            InodeKind::Symlink => return Err(Code::InvalidArgument),
        }
        let row = self.inodes.get(&op.id).ok_or(Code::NotFound)?;
        let content = if op.content == 0 { row.content } else { op.content };
        let mut reply = LayoutReply { content, ..LayoutReply::default() };
        if content != 0 {
            let found = self.contents.get(&content).filter(|c| c.file == op.id).ok_or(Code::NotFound)?;
            reply.size = found.size;
        }
        Ok(Reply::Layout(reply))
    }

    /// What a history is asked of, checked.
    fn history_of(&self, op: &History) -> Result<(), Code> {
        self.directory_here(op.dir)?;
        if !self.inodes.contains_key(&op.dir) {
            return Err(Code::NotFound);
        }
        if op.name.is_empty() { Ok(()) } else { name::check(&op.name).map_err(|refusal| refusal.code) }
    }

    /// Past entries of a directory or of one name, with their places in the order of keys.
    fn past_of(&self, op: &History) -> Vec<((u64, usize), PastEdge)> {
        let all = self.past.range((op.dir, Bytes::new(), 0)..).take_while(|((d, ..), _)| *d == op.dir);
        let all = all.filter(|((_, name, _), _)| op.name.is_empty() || *name == op.name);
        let mut past: Vec<((u64, usize), PastEdge)> = all
            .map(|((_, name, ended_at), p)| {
                let Past { target, created_at, owned } = *p;
                let edge = PastEdge { name: name.clone(), target, created_at, ended_at: *ended_at, owned };
                ((hash63(name), name.len()), edge)
            })
            .collect();
        past.sort_by(|(a, x), (b, y)| (a, &x.name, x.ended_at).cmp(&(b, &y.name, y.ended_at)));
        past
    }

    fn history(&self, op: &History) -> Option<Outcome> {
        if let Err(code) = self.history_of(op) {
            return Some(Err(code));
        }
        let dir = InodeId::from_wire(op.dir)?;
        let key = |edge: &PastEdge| tables::past_edge_key(dir, &edge.name, edge.ended_at);
        let mut past = self.past_of(op);
        // Where the page begins: any key of this directory, or of this name, may be given.
        let prefix = match op.name.is_empty() {
            true => tables::directory_prefix(dir),
            false => tables::past_edge_prefix(dir, &op.name),
        };
        if !op.after.is_empty() && !op.after.starts_with(&prefix) {
            return Some(Err(Code::InvalidArgument));
        }
        past.retain(|(_, edge)| key(edge)[..] > op.after[..]);
        let is_full = past.len() >= self.pages.entries;
        past.truncate(self.pages.entries);
        let next = past.last().filter(|_| is_full).map(|(_, edge)| Bytes::copy_from_slice(&key(edge)));
        let past = past.into_iter().map(|(_, edge)| edge).collect();
        Some(Ok(Reply::History(HistoryReply { past, next: next.unwrap_or_default() })))
    }

    /// What is present and what is past, of one moment: whole hashes, as many as fit.
    fn whole_history(&self, op: &History) -> Option<Outcome> {
        if let Err(code) = self.history_of(op) {
            return Some(Err(code));
        }
        let first = match op.after.as_ref() {
            [] => 0,
            after => match after.try_into() {
                Ok(bytes) => u64::from_be_bytes(bytes),
                Err(_) => return Some(Err(Code::InvalidArgument)),
            },
        };
        // A name's page begins and ends with what has its hash; the names here never share one.
        let first = if op.name.is_empty() { first } else { 0 };
        let mut past = self.past_of(op);
        past.retain(|((hash, _), _)| *hash >= first);
        let of_dir = self.edges.range((op.dir, Bytes::new())..).take_while(|((d, _), _)| *d == op.dir);
        let mut present: Vec<((u64, usize), PastEdge)> = of_dir
            .filter(|((_, name), _)| op.name.is_empty() || *name == op.name)
            .map(|((_, name), e)| {
                let Edge { target, created_at, .. } = *e;
                let edge = PastEdge { name: name.clone(), target, created_at, ended_at: 0, owned: true };
                ((hash63(name), name.len()), edge)
            })
            .filter(|((hash, _), _)| *hash >= first)
            .collect();
        present.sort_by(|(a, x), (b, y)| (a.0, &x.name).cmp(&(b.0, &y.name)));
        let mut fetch = self.pages.entries + 1;
        loop {
            let cut_of =
                |rows: &[((u64, usize), PastEdge)]| rows.get(fetch - 1).map_or(u64::MAX, |row| row.0.0);
            let cut = cut_of(&present).min(cut_of(&past));
            let mut all: Vec<_> =
                present.iter().chain(&past).filter(|((hash, _), _)| *hash < cut).cloned().collect();
            if all.is_empty() && cut != u64::MAX {
                fetch *= 2;
                continue;
            }
            // What is present comes behind what is past.
            all.sort_by(|((a, _), x), ((b, _), y)| {
                (a, &x.name, x.ended_at == 0, x.ended_at).cmp(&(b, &y.name, y.ended_at == 0, y.ended_at))
            });
            let past = all.into_iter().map(|(_, edge)| edge).collect();
            let next =
                if cut == u64::MAX { Bytes::new() } else { Bytes::copy_from_slice(&cut.to_be_bytes()) };
            return Some(Ok(Reply::History(HistoryReply { past, next })));
        }
    }

    fn content_history(&self, op: &ContentHistory) -> Outcome {
        let id = kind_of(op.id)?;
        self.check_slot(id.slot().0)?;
        if !self.inodes.contains_key(&op.id) {
            return Err(Code::NotFound);
        }
        let all = self.past_contents.iter().filter(|((file, end), _)| *file == op.id && *end > op.after);
        let past: Vec<PastContent> =
            all.take(self.pages.rows).map(|(key, value)| self.past_content(*key, *value)).collect();
        let next = if past.len() == self.pages.rows { past.last().map_or(0, |p| p.ended_at) } else { 0 };
        Ok(Reply::ContentHistory(ContentHistoryReply { past, next }))
    }

    fn past_content(&self, (file, ended_at): (u64, u64), (content, dir): (u64, u64)) -> PastContent {
        let size = self.contents.get(&content).map_or(0, |c| c.size);
        PastContent { file, content, ended_at, size, dir }
    }

    /// A page of a visit: of all items of the shard, each with its key, those behind `after` or from a slot on.
    fn visit<T>(
        &self,
        slot: u32,
        after: &[u8],
        limit: usize,
        mut items: Vec<(Key, T)>,
    ) -> Result<(Vec<T>, Bytes), Code> {
        let first = u8::try_from(slot).map_err(|_| Code::InvalidArgument)?;
        self.check_slot(first)?;
        let begins_there = matches!(after, [] | [_]);
        if after.first().is_some_and(|other| *other != first) {
            return Err(Code::InvalidArgument);
        }
        items.retain(|(key, _)| if begins_there { key[0] >= first } else { key[..] > *after });
        items.sort_by(|(a, _), (b, _)| a.cmp(b));
        let last = self.slots.map_or(255, |(_, last)| last);
        let behind = if last == 255 { Bytes::new() } else { Bytes::copy_from_slice(&[last as u8 + 1]) };
        let next = match items.get(limit - 1) {
            Some((key, _)) => Bytes::copy_from_slice(key),
            None => behind,
        };
        items.truncate(limit);
        Ok((items.into_iter().map(|(_, item)| item).collect(), next))
    }

    fn visit_inodes(&self, op: &VisitInodes) -> Outcome {
        if !(1..=3).contains(&op.kind) {
            return Err(Code::InvalidArgument);
        }
        let limit = match op.limit as usize {
            0 => self.pages.rows,
            asked => asked.min(self.pages.rows),
        };
        let of_kind = self.inodes.iter().filter(|(id, _)| *id >> 62 == u64::from(op.kind));
        let items = of_kind.filter_map(|(id, row)| {
            Some((tables::inode_key(InodeId::from_wire(*id)?), attributes(*id, row)))
        });
        let (inodes, next) = self.visit(op.slot, &op.after, limit, items.collect())?;
        Ok(Reply::VisitInodes(VisitInodesReply { inodes, next }))
    }

    fn visit_transients(&self, op: &VisitTransients) -> Outcome {
        let unpublished = self.contents.iter().filter(|(_, c)| c.file == 0);
        let items = unpublished.map(|(id, c)| {
            let transient = Transient { content: *id, deadline: c.deadline, size: c.size };
            (tables::transient_key(c.deadline, ContentId(*id)), transient)
        });
        let (transients, next) = self.visit(op.slot, &op.after, self.pages.rows, items.collect())?;
        Ok(Reply::VisitTransients(VisitTransientsReply { transients, next }))
    }

    fn visit_past_contents(&self, op: &VisitPastContents) -> Outcome {
        let items = self.past_contents.iter().filter_map(|(key, value)| {
            let stored = tables::past_content_key(InodeId::from_wire(key.0)?, key.1);
            Some((stored, self.past_content(*key, *value)))
        });
        let (past, next) = self.visit(op.slot, &op.after, self.pages.rows, items.collect())?;
        Ok(Reply::VisitPastContents(VisitPastContentsReply { past, next }))
    }

    /// Only which spans; their certificates are not modelled.
    fn visit_dead_spans(&self, op: &VisitDeadSpans) -> Outcome {
        let used: std::collections::BTreeSet<u64> = self
            .contents
            .values()
            .flat_map(|c| c.extents.iter().filter_map(|(_, _, s)| s.span()).chain([c.pending]))
            .collect();
        let dead = self.spans.keys().copied().filter(|id| !used.contains(id));
        let items = dead.map(|span_id| {
            (tables::span_key(SpanId(span_id)), clutch_proto::types::Span { span_id, ..Default::default() })
        });
        let (spans, next) = self.visit(op.slot, &op.after, self.pages.spans, items.collect())?;
        Ok(Reply::VisitDeadSpans(VisitDeadSpansReply { spans, next }))
    }

    fn visit_blocks(&self, op: &VisitBlocks) -> Outcome {
        let all = self.spans.iter().flat_map(|(id, span)| span.blocks.iter().map(|held| (*id, *held)));
        let items =
            all.filter(|(_, (service, _))| *service == op.service_id).map(|(span_id, (_, block_id))| {
                let key = tables::block_key(Slot(span_id as u8), ServiceId(op.service_id), block_id);
                (key, HeldBlock { block_id, span_id })
            });
        let (blocks, next) = self.visit(op.slot, &op.after, self.pages.rows, items.collect())?;
        Ok(Reply::VisitBlocks(VisitBlocksReply { blocks, next }))
    }

    /// Only which spans; their certificates are not modelled.
    fn visit_spans(&self, op: &VisitSpans) -> Outcome {
        let used: std::collections::BTreeSet<u64> = self
            .contents
            .values()
            .flat_map(|content| content.extents.iter().filter_map(|(_, _, source)| source.span()))
            .collect();
        let shown = |id: u64| {
            used.contains(&id).then(|| clutch_proto::types::Span { span_id: id, ..Default::default() })
        };
        let mut items = Vec::new();
        for (id, span) in &self.spans {
            if op.service_id == 0 {
                items.push((tables::span_key(SpanId(*id)), shown(*id)));
                continue;
            }
            let here = span.blocks.iter().filter(|(service, _)| *service == op.service_id);
            items.extend(here.map(|(service, block)| {
                (tables::block_key(Slot(*id as u8), ServiceId(*service), *block), shown(*id))
            }));
        }
        let (spans, next) = self.visit(op.slot, &op.after, self.pages.spans, items)?;
        let spans = spans.into_iter().flatten().collect();
        Ok(Reply::VisitSpans(VisitSpansReply { spans, next }))
    }
}

/// Written again on purpose: the oracle shares no step with the shard that it judges.
pub(super) fn attributes(id: u64, row: &InodeRow) -> Attributes {
    Attributes {
        id,
        mode: row.mode,
        uid: row.uid,
        gid: row.gid,
        size: row.size,
        mtime: row.mtime,
        ctime: row.ctime,
        atime: row.atime,
        nlink: row.nlink,
        parent: row.parent,
        edge_time: row.edge_time,
        content: row.content,
        symlink_target: row.symlink_target.clone(),
        policy: row.policy.clone(),
        former_parent: row.former_parent,
    }
}

/// Whether an answer is what the oracle says, as far as the oracle models it.
pub fn agrees(got: &Reply, expected: &Reply) -> bool {
    match (got, expected) {
        (Reply::Span(got), Reply::Span(expected)) => {
            (got.span_id, got.size, got.crc, got.shape)
                == (expected.span_id, expected.size, expected.crc, expected.shape)
        }
        (Reply::Layout(got), Reply::Layout(expected)) => {
            (got.content, got.size) == (expected.content, expected.size)
        }
        (Reply::VisitDeadSpans(got), Reply::VisitDeadSpans(expected)) => {
            let ids = |page: &VisitDeadSpansReply| page.spans.iter().map(|s| s.span_id).collect::<Vec<_>>();
            (ids(got), &got.next) == (ids(expected), &expected.next)
        }
        (Reply::VisitSpans(got), Reply::VisitSpans(expected)) => {
            let ids = |page: &VisitSpansReply| page.spans.iter().map(|s| s.span_id).collect::<Vec<_>>();
            (ids(got), &got.next) == (ids(expected), &expected.next)
        }
        _ => got == expected,
    }
}
