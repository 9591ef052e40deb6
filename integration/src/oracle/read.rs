//! What reads must see.

use bytes::Bytes;
use clutch_proto::{
    InodeKind,
    limits::{READDIR_ENTRIES_MAX, VISIT_ROWS_MAX, VISIT_SPANS_MAX},
    listing,
    name::{self, hash63},
    shard::*,
    types::{Attributes, Code},
};
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
            Op::History(op) => self.history(op)?,
            Op::ContentHistory(op) => self.content_history(op),
            Op::VisitInodes(op) => self.visit_inodes(op)?,
            Op::VisitTransients(op) => self.visit_transients(op)?,
            Op::VisitPastContents(op) => self.visit_past_contents(op)?,
            Op::VisitDeadSpans(op) => self.visit_dead_spans(op)?,
            Op::VisitBlocks(op) => self.visit_blocks(op)?,
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
        if op.cursor >> 63 != 0 {
            return Err(Code::InvalidArgument);
        }
        let limit = match op.limit as usize {
            0 => READDIR_ENTRIES_MAX,
            asked => asked.min(READDIR_ENTRIES_MAX),
        };
        let all = self.edges.range((op.dir, Bytes::new())..).take_while(|((d, _), _)| *d == op.dir);
        let mut names: Vec<(u64, &Bytes, &Edge)> = all
            .map(|((_, name), edge)| (hash63(name), name, edge))
            .filter(|(hash, ..)| *hash >= op.cursor)
            .collect();
        names.sort_by_key(|(hash, name, _)| (*hash, *name));
        let next_cursor = if names.len() <= limit { 0 } else { names[limit].0 };
        // Equal hashes stay together; the names here never have equal ones.
        names.truncate(limit);
        let mut entries = Vec::new();
        for (_, name, edge) in names {
            listing::push(&mut entries, name, edge.target, edge.created_at);
        }
        Ok(Reply::ReadDir(ReadDirReply { entries: entries.into(), next_cursor }))
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

    /// Only first pages that are the last, too.
    fn history(&self, op: &History) -> Option<Outcome> {
        if let Err(code) = self.directory_here(op.dir) {
            return Some(Err(code));
        }
        if !self.inodes.contains_key(&op.dir) {
            return Some(Err(Code::NotFound));
        }
        if !op.name.is_empty()
            && let Err(refusal) = name::check(&op.name)
        {
            return Some(Err(refusal.code));
        }
        let all = self.past.range((op.dir, Bytes::new(), 0)..).take_while(|((d, ..), _)| *d == op.dir);
        let with_present = op.with_present;
        let mut past: Vec<(u64, PastEdge)> = all
            .filter(|((_, name, _), _)| op.name.is_empty() || *name == op.name)
            .map(|((_, name, ended_at), p)| {
                let Past { target, created_at, owned } = *p;
                (
                    hash63(name),
                    PastEdge { name: name.clone(), target, created_at, ended_at: *ended_at, owned },
                )
            })
            .collect();
        if past.len() >= READDIR_ENTRIES_MAX || !op.after.is_empty() {
            return None;
        }
        if with_present {
            let present = self.edges.range((op.dir, Bytes::new())..).take_while(|((d, _), _)| *d == op.dir);
            let present = present.filter(|((_, name), _)| op.name.is_empty() || *name == op.name);
            past.extend(present.map(|((_, name), e)| {
                let Edge { target, created_at, .. } = *e;
                let edge = PastEdge { name: name.clone(), target, created_at, ended_at: 0, owned: true };
                (hash63(name), edge)
            }));
            if past.len() >= READDIR_ENTRIES_MAX {
                return None;
            }
            // What is present comes behind what is past.
            past.sort_by(|(a, x), (b, y)| {
                (a, &x.name, x.ended_at == 0, x.ended_at).cmp(&(b, &y.name, y.ended_at == 0, y.ended_at))
            });
        } else {
            past.sort_by(|(a, x), (b, y)| {
                (a, x.name.len(), &x.name, x.ended_at).cmp(&(b, y.name.len(), &y.name, y.ended_at))
            });
        }
        let past = past.into_iter().map(|(_, p)| p).collect();
        Some(Ok(Reply::History(HistoryReply { past, next: Bytes::new() })))
    }

    fn content_history(&self, op: &ContentHistory) -> Outcome {
        let id = kind_of(op.id)?;
        self.check_slot(id.slot().0)?;
        if !self.inodes.contains_key(&op.id) {
            return Err(Code::NotFound);
        }
        let all = self.past_contents.iter().filter(|((file, end), _)| *file == op.id && *end > op.after);
        let past: Vec<PastContent> =
            all.take(VISIT_ROWS_MAX).map(|(key, value)| self.past_content(*key, *value)).collect();
        let next = if past.len() == VISIT_ROWS_MAX { past.last().map_or(0, |p| p.ended_at) } else { 0 };
        Ok(Reply::ContentHistory(ContentHistoryReply { past, next }))
    }

    fn past_content(&self, (file, ended_at): (u64, u64), (content, dir): (u64, u64)) -> PastContent {
        let size = self.contents.get(&content).map_or(0, |c| c.size);
        PastContent { file, content, ended_at, size, dir }
    }

    /// Whether a visit begins at the beginning of a slot of this shard, and the key behind the shard. Other pages are
    /// not modelled.
    fn visit(&self, slot: u32, after: &[u8]) -> Option<Result<Bytes, Code>> {
        let Ok(first) = u8::try_from(slot) else { return Some(Err(Code::InvalidArgument)) };
        if let Err(code) = self.check_slot(first) {
            return Some(Err(code));
        }
        match after {
            [] => {}
            [one] if *one == first => {}
            [other, ..] if *other != first => return Some(Err(Code::InvalidArgument)),
            _ => return None,
        }
        let last = self.slots.map_or(255, |(_, last)| last);
        Some(Ok(if last == 255 { Bytes::new() } else { Bytes::copy_from_slice(&[last as u8 + 1]) }))
    }

    fn visit_inodes(&self, op: &VisitInodes) -> Option<Outcome> {
        if !(1..=3).contains(&op.kind) {
            return Some(Err(Code::InvalidArgument));
        }
        let next = match self.visit(op.slot, &op.after)? {
            Ok(next) => next,
            Err(code) => return Some(Err(code)),
        };
        let of_kind = |id: u64| id >> 62 == u64::from(op.kind) && u32::from(id as u8) >= op.slot;
        let mut ids: Vec<u64> = self.inodes.keys().copied().filter(|id| of_kind(*id)).collect();
        ids.sort_by_key(|id| (*id as u8, *id));
        if op.limit != 0 || ids.len() >= VISIT_ROWS_MAX {
            return None;
        }
        let inodes = ids.iter().filter_map(|id| Some(attributes(*id, self.inodes.get(id)?))).collect();
        Some(Ok(Reply::VisitInodes(VisitInodesReply { inodes, next })))
    }

    fn visit_transients(&self, op: &VisitTransients) -> Option<Outcome> {
        let next = match self.visit(op.slot, &op.after)? {
            Ok(next) => next,
            Err(code) => return Some(Err(code)),
        };
        let unpublished =
            self.contents.iter().filter(|(id, c)| c.file == 0 && u32::from(**id as u8) >= op.slot);
        let mut transients: Vec<Transient> = unpublished
            .map(|(id, c)| Transient { content: *id, deadline: c.deadline, size: c.size })
            .collect();
        transients.sort_by_key(|t| (t.content as u8, t.deadline, t.content));
        if transients.len() >= VISIT_ROWS_MAX {
            return None;
        }
        Some(Ok(Reply::VisitTransients(VisitTransientsReply { transients, next })))
    }

    fn visit_past_contents(&self, op: &VisitPastContents) -> Option<Outcome> {
        let next = match self.visit(op.slot, &op.after)? {
            Ok(next) => next,
            Err(code) => return Some(Err(code)),
        };
        let all = self.past_contents.iter().filter(|((file, _), _)| u32::from(*file as u8) >= op.slot);
        let mut past: Vec<PastContent> = all.map(|(key, value)| self.past_content(*key, *value)).collect();
        past.sort_by_key(|p| (p.file as u8, p.file, p.ended_at));
        if past.len() >= VISIT_ROWS_MAX {
            return None;
        }
        Some(Ok(Reply::VisitPastContents(VisitPastContentsReply { past, next })))
    }

    /// Only which spans; their certificates are not modelled.
    fn visit_dead_spans(&self, op: &VisitDeadSpans) -> Option<Outcome> {
        let next = match self.visit(op.slot, &op.after)? {
            Ok(next) => next,
            Err(code) => return Some(Err(code)),
        };
        let used: std::collections::BTreeSet<u64> = self
            .contents
            .values()
            .flat_map(|c| c.extents.iter().filter_map(|(_, _, s)| s.span()).chain([c.pending]))
            .collect();
        let mut dead: Vec<u64> = self
            .spans
            .keys()
            .copied()
            .filter(|id| !used.contains(id) && u32::from(*id as u8) >= op.slot)
            .collect();
        dead.sort_by_key(|id| (*id as u8, *id));
        if dead.len() >= VISIT_SPANS_MAX {
            return None;
        }
        let spans = dead
            .into_iter()
            .map(|span_id| clutch_proto::types::Span { span_id, ..Default::default() })
            .collect();
        Some(Ok(Reply::VisitDeadSpans(VisitDeadSpansReply { spans, next })))
    }

    fn visit_blocks(&self, op: &VisitBlocks) -> Option<Outcome> {
        let next = match self.visit(op.slot, &op.after)? {
            Ok(next) => next,
            Err(code) => return Some(Err(code)),
        };
        let mut blocks: Vec<HeldBlock> = self
            .spans
            .iter()
            .flat_map(|(id, span)| span.blocks.iter().map(|(service, block)| (*id, *service, *block)))
            .filter(|(id, service, _)| *service == op.service_id && u32::from(*id as u8) >= op.slot)
            .map(|(span_id, _, block_id)| HeldBlock { block_id, span_id })
            .collect();
        blocks.sort_by_key(|b| (b.span_id as u8, b.block_id));
        if blocks.len() >= VISIT_ROWS_MAX {
            return None;
        }
        Some(Ok(Reply::VisitBlocks(VisitBlocksReply { blocks, next })))
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
        owner: row.owner,
        edge_time: row.edge_time,
        content: row.content,
        symlink_target: row.symlink_target.clone(),
        policy: row.policy.clone(),
        former_owner: row.former_owner,
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
        _ => got == expected,
    }
}
