//! Bytes: from the first cookie to the last block, and what is shared, published and exchanged.

use bytes::Bytes;
use clutch_proto::{
    InodeKind,
    limits::{
        CELL_BYTES_MAX, DATA_BLOCKS_MAX, EXTENTS_PER_ENTRY_MAX, FILE_BYTES_MAX, INLINE_BYTES_MAX,
        PARITY_BLOCKS_MAX, POLICY_CLASSES_MAX, SNAPSHOT_VERSIONS_MAX, SPAN_BYTES_MAX, TRANSIENT_LIFETIME_MS,
    },
    shard::*,
    types::{Code, DirectoryPolicy, PolicyPart},
};
use shard_reply::Reply;

use super::{Content, Outcome, ShardOracle, Source, Span, kind_of, read::attributes};

impl ShardOracle {
    pub(super) fn transient(&self, id: u64, cookie: &Bytes) -> Result<Content, Code> {
        self.check_slot(id as u8)?;
        let content = self.contents.get(&id).filter(|c| c.file == 0 && self.time <= c.deadline);
        let content = content.ok_or(Code::TransientGone)?;
        if content.cookie == *cookie { Ok(content.clone()) } else { Err(Code::BadCookie) }
    }

    pub(super) fn bump(&mut self, id: u64, mut content: Content) -> Outcome {
        let lifetime_ms = if content.lifetime_ms == 0 { TRANSIENT_LIFETIME_MS } else { content.lifetime_ms };
        content.deadline = self.time + lifetime_ms * 1_000_000;
        let reply = ContentReply { content: id, cookie: content.cookie.clone(), deadline: content.deadline };
        self.contents.insert(id, content);
        Ok(Reply::Content(reply))
    }

    pub(super) fn start_content(&mut self, entry: StartContentEntry) -> Outcome {
        let op = entry.op.ok_or(Code::Malformed)?;
        let home = kind_of(op.dir)?;
        self.check_slot(home.slot().0)?;
        match home.kind() {
            InodeKind::Directory => self.live(op.dir)?,
            InodeKind::File => drop(self.inodes.get(&op.dir).ok_or(Code::NotFound)?),
            InodeKind::Symlink => return Err(Code::InvalidArgument),
        }
        let counter = self.counter(op.dir as u8);
        counter.content += 1;
        let id = counter.content << 8 | op.dir & 0xff;
        self.bump(id, Content { cookie: entry.cookie, lifetime_ms: entry.lifetime_ms, ..Content::default() })
    }

    pub(super) fn extend(content: &Content, offset: u64, length: u64) -> Result<(), Code> {
        if offset != content.size || length == 0 {
            return Err(Code::InvalidArgument);
        }
        match offset.checked_add(length) {
            Some(size) if size <= FILE_BYTES_MAX => Ok(()),
            _ => Err(Code::TooLarge),
        }
    }

    pub(super) fn append(&mut self, id: u64, mut content: Content, length: u64, source: Source) -> Outcome {
        content.extents.push((content.size, length, source));
        content.size += length;
        self.bump(id, content)
    }

    pub(super) fn add_inline(&mut self, op: AddInline) -> Outcome {
        let content = self.transient(op.content, &op.cookie)?;
        let length = op.data.len() as u64;
        Self::extend(&content, op.offset, length)?;
        if op.data.len() > INLINE_BYTES_MAX {
            return Err(Code::TooLarge);
        }
        self.append(op.content, content, length, Source::Inline(op.data))
    }

    pub(super) fn add_hole(&mut self, op: &AddHole) -> Outcome {
        let content = self.transient(op.content, &op.cookie)?;
        Self::extend(&content, op.offset, op.length)?;
        self.append(op.content, content, op.length, Source::Hole)
    }

    pub(super) fn initiate(&mut self, entry: InitiateSpanEntry) -> Outcome {
        let op = entry.op.ok_or(Code::Malformed)?;
        let mut content = self.transient(op.content, &op.cookie)?;
        Self::extend(&content, op.offset, u64::from(op.size))?;
        let shape = op.shape.ok_or(Code::Malformed)?;
        shape.check(op.size).map_err(|r| r.code)?;
        let count = shape.blocks() as usize;
        if op.cell_crcs.len() != count * shape.stripes as usize || entry.services.len() != count {
            return Err(Code::Malformed);
        }
        for (i, service) in entry.services.iter().enumerate() {
            if entry.services[..i].contains(service) {
                return Err(Code::Malformed);
            }
            if self.services.get(service).is_none_or(|flags| flags & 3 != 0) {
                return Err(Code::NotReady);
            }
        }
        let slot = op.content as u8;
        let counter = self.counter(slot);
        counter.span += 1;
        let id = counter.span << 8 | u64::from(slot);
        let first = counter.block + 1;
        counter.block += count as u64;
        let block = |i: usize| (first + i as u64) << 8 | u64::from(slot);
        let blocks: Vec<(u64, u64)> =
            entry.services.iter().enumerate().map(|(i, service)| (*service, block(i))).collect();
        let reply = clutch_proto::types::Span {
            span_id: id,
            size: op.size,
            crc: op.crc,
            shape: Some(shape),
            ..Default::default()
        };
        let span = Span {
            size: op.size,
            certified: false,
            blocks,
            crc: op.crc,
            block_bytes: shape.block_bytes(),
            block_crcs: shape.block_crcs(&op.cell_crcs),
        };
        self.spans.insert(id, span);
        content.pending = id;
        self.bump(op.content, content)?;
        Ok(Reply::Span(reply))
    }

    pub(super) fn certify(&mut self, entry: &CertifySpanEntry) -> Outcome {
        let op = entry.op.as_ref().ok_or(Code::Malformed)?;
        let mut content = self.transient(op.content, &op.cookie)?;
        if content.pending == 0 || content.pending != op.span_id {
            return Err(Code::Stale);
        }
        if entry.first_bad != 0 {
            return Err(Code::BadProof);
        }
        let span = self.spans.get_mut(&op.span_id).ok_or(Code::NotFound)?;
        span.certified = true;
        let size = u64::from(span.size);
        content.pending = 0;
        self.append(op.content, content, size, Source::Span(op.span_id, 0))
    }

    pub(super) fn link_file(&mut self, op: LinkFile) -> Outcome {
        self.live(op.dir)?;
        let mut content = self.transient(op.content, &op.cookie)?;
        if op.content as u8 != op.dir as u8 || content.pending != 0 {
            return Err(Code::InvalidArgument);
        }
        self.may_insert(op.dir, &op.name, false, op.replace)?;
        let id = self.next_inode(InodeKind::File, op.dir as u8);
        let mut row = self.new_inode(op.mode, op.uid, op.gid, op.mtime);
        (row.size, row.content, content.file) = (content.size, op.content, id);
        self.contents.insert(op.content, content);
        self.inodes.insert(id, row);
        Ok(self.insert(op.dir, &op.name, id))
    }

    pub(super) fn scrap(&mut self, op: &ScrapContent) -> Outcome {
        self.transient(op.content, &op.cookie)?;
        self.disown(op.content);
        Ok(Reply::Done(Done {}))
    }

    /// From here on a content is as one that has expired.
    pub(super) fn disown(&mut self, id: u64) {
        if let Some(content) = self.contents.get_mut(&id) {
            (content.file, content.deadline, content.lifetime_ms) = (0, 0, 0);
            content.cookie = Bytes::new();
        }
    }

    pub(super) fn share_range(&mut self, op: &ShareRange) -> Outcome {
        let mut content = self.transient(op.content, &op.cookie)?;
        Self::extend(&content, op.offset, op.length)?;
        if op.from_content as u8 != op.content as u8 {
            return Err(Code::InvalidArgument);
        }
        let from = self.contents.get(&op.from_content).filter(|c| c.file != 0).ok_or(Code::NotFound)?;
        let end = op.from_offset.checked_add(op.length).ok_or(Code::InvalidArgument)?;
        if end > from.size {
            return Err(Code::InvalidArgument);
        }
        let (mut pieces, mut copied) = (Vec::new(), 0);
        for (at, length, source) in &from.extents {
            let (begin, stop) = ((*at).max(op.from_offset), (at + length).min(end));
            if begin >= stop {
                continue;
            }
            let skip = begin - at;
            let source = match source {
                Source::Inline(data) => {
                    copied += if data.len() > INLINE_BYTES_MAX { stop - begin } else { 0 };
                    Source::Inline(data.slice(skip as usize..(skip + stop - begin) as usize))
                }
                Source::Hole => Source::Hole,
                Source::Span(span, offset) => Source::Span(*span, offset + skip as u32),
            };
            pieces.push((stop - begin, source));
        }
        if pieces.len() > EXTENTS_PER_ENTRY_MAX || copied > 65_536 {
            return Err(Code::TooLarge);
        }
        for (length, source) in pieces {
            match (content.extents.last_mut(), &source) {
                (Some((_, before, Source::Span(span, begin))), Source::Span(same, offset))
                    if span == same && u64::from(*begin) + *before == u64::from(*offset) =>
                {
                    *before += length
                }
                (Some((_, before, Source::Hole)), Source::Hole) => *before += length,
                _ => content.extents.push((content.size, length, source)),
            }
            content.size += length;
        }
        self.bump(op.content, content)
    }

    /// A file with the content that is expected.
    fn file_with(&self, id: u64, expected_content: u64) -> Result<(), Code> {
        let kind = kind_of(id)?;
        self.check_slot(kind.slot().0)?;
        match kind.kind() {
            InodeKind::File => {}
            InodeKind::Directory => return Err(Code::IsDirectory),
            InodeKind::Symlink => return Err(Code::InvalidArgument),
        }
        let row = self.inodes.get(&id).ok_or(Code::NotFound)?;
        if row.content == expected_content { Ok(()) } else { Err(Code::Stale) }
    }

    fn replace_content(&mut self, id: u64, content: u64, mtime: u64, dir: u64) -> Outcome {
        let (time, size) = (self.time, self.contents.get(&content).map_or(0, |c| c.size));
        let row = self.inodes.get_mut(&id).ok_or(Code::NotFound)?;
        if row.content != 0 {
            self.past_contents.insert((id, time), (row.content, dir));
        }
        (row.content, row.size, row.ctime) = (content, size, time);
        row.mtime = if mtime == 0 { time } else { mtime };
        Ok(Reply::Attributes(attributes(id, row)))
    }

    pub(super) fn publish(&mut self, op: &PublishContent) -> Outcome {
        self.file_with(op.id, op.expected_content)?;
        let draft = self.transient(op.content, &op.cookie)?;
        if op.content as u8 != op.id as u8 || draft.pending != 0 {
            return Err(Code::InvalidArgument);
        }
        if let Some(content) = self.contents.get_mut(&op.content) {
            content.file = op.id;
        }
        self.replace_content(op.id, op.content, op.mtime, op.dir)
    }

    /// A file's content of these bytes, all in the metadata.
    pub(super) fn whole_content(&mut self, slot: u8, file: u64, data: Bytes) -> u64 {
        let counter = self.counter(slot);
        counter.content += 1;
        let (id, size) = (counter.content << 8 | u64::from(slot), data.len() as u64);
        let extents = vec![(0, size, Source::Inline(data))];
        self.contents.insert(id, Content { size, file, extents, ..Content::default() });
        id
    }

    pub(super) fn restore(&mut self, op: &RestoreContent) -> Outcome {
        self.file_with(op.id, op.expected_content)?;
        let key = (op.id, op.ended_at);
        if self.past_contents.get(&key).is_none_or(|(content, _)| *content != op.content) {
            return Err(Code::NotFound);
        }
        self.past_contents.remove(&key);
        self.replace_content(op.id, op.content, 0, op.dir)
    }

    /// How many extents name a span.
    pub fn uses(&self, span: u64) -> usize {
        let extents = self.contents.values().flat_map(|c| &c.extents);
        extents.filter(|(_, _, s)| matches!(s, Source::Span(id, _) if *id == span)).count()
    }

    /// Whether nothing uses a span and no content waits for it.
    pub fn is_dead(&self, span: u64) -> bool {
        self.spans.contains_key(&span)
            && self.uses(span) == 0
            && !self.contents.values().any(|c| c.pending == span)
    }

    fn in_use(&self, span: u64) -> Result<&Span, Code> {
        self.check_slot(span as u8)?;
        let found = self.spans.get(&span).filter(|s| s.certified).ok_or(Code::NotFound)?;
        if self.uses(span) == 0 { Err(Code::NotFound) } else { Ok(found) }
    }

    pub(super) fn swap_blocks(&mut self, op: &SwapBlocks) -> Outcome {
        let a = self.in_use(op.span_a)?;
        let b = self.in_use(op.span_b)?;
        let at_a = a.blocks.iter().position(|(_, block)| *block == op.block_a).ok_or(Code::Stale)?;
        let at_b = b.blocks.iter().position(|(_, block)| *block == op.block_b).ok_or(Code::Stale)?;
        if op.span_a == op.span_b || op.span_a as u8 != op.span_b as u8 {
            return Err(Code::InvalidArgument);
        }
        if (a.block_bytes, a.block_crcs[at_a]) != (b.block_bytes, b.block_crcs[at_b]) {
            return Err(Code::CrcMismatch);
        }
        let (block_a, block_b) = (a.blocks[at_a], b.blocks[at_b]);
        let would_double = |span: &Span, at: usize, service: u64| {
            span.blocks.iter().enumerate().any(|(i, (s, _))| i != at && *s == service)
        };
        if would_double(a, at_a, block_b.0) || would_double(b, at_b, block_a.0) {
            return Err(Code::InvalidArgument);
        }
        for (span, at, block) in [(op.span_a, at_a, block_b), (op.span_b, at_b, block_a)] {
            if let Some(span) = self.spans.get_mut(&span) {
                span.blocks[at] = block;
            }
        }
        Ok(Reply::Done(Done {}))
    }

    /// The place of the extent at an offset, if it is of that span.
    fn extent_at(&self, content: u64, offset: u64, span: u64) -> Result<(usize, u64, u32), Code> {
        self.check_slot(content as u8)?;
        let extents = self.contents.get(&content).map_or(&[][..], |c| &c.extents);
        let place = extents.iter().position(|(at, ..)| *at == offset).ok_or(Code::NotFound)?;
        match &extents[place] {
            (_, length, Source::Span(id, from)) if *id == span => Ok((place, *length, *from)),
            _ => Err(Code::Stale),
        }
    }

    pub(super) fn swap_spans(&mut self, op: &SwapSpans) -> Outcome {
        let (place_a, length_a, from_a) = self.extent_at(op.content_a, op.offset_a, op.span_a)?;
        let (place_b, length_b, from_b) = self.extent_at(op.content_b, op.offset_b, op.span_b)?;
        if op.content_a as u8 != op.content_b as u8 {
            return Err(Code::InvalidArgument);
        }
        let (a, b) = (self.in_use(op.span_a)?, self.in_use(op.span_b)?);
        if (a.size, a.crc, from_a, length_a) != (b.size, b.crc, from_b, length_b) {
            return Err(Code::CrcMismatch);
        }
        for (content, place, span) in [(op.content_a, place_a, op.span_b), (op.content_b, place_b, op.span_a)]
        {
            if let Some(content) = self.contents.get_mut(&content) {
                content.extents[place].2 = Source::Span(span, from_a);
            }
        }
        Ok(Reply::Done(Done {}))
    }

    pub(super) fn move_span(&mut self, op: &MoveSpan) -> Outcome {
        let mut from = self.transient(op.from_content, &op.from_cookie)?;
        let to = self.transient(op.content, &op.cookie)?;
        if op.from_content == op.content || op.from_content as u8 != op.content as u8 {
            return Err(Code::InvalidArgument);
        }
        let (offset, length, source) = from.extents.last().cloned().ok_or(Code::NotFound)?;
        if !matches!(source, Source::Span(id, _) if id == op.span_id) {
            return Err(Code::Stale);
        }
        Self::extend(&to, op.offset, length)?;
        from.extents.pop();
        from.size = offset;
        self.bump(op.from_content, from)?;
        self.append(op.content, to, length, source)
    }

    pub(super) fn set_policy(&mut self, op: SetPolicy) -> Outcome {
        self.directory_here(op.id)?;
        let row = self.inodes.get(&op.id).ok_or(Code::NotFound)?;
        let mut policy = row.policy.clone().unwrap_or_default();
        let change = op.policy.unwrap_or_default();
        if !is_possible(&change) {
            return Err(Code::InvalidArgument);
        }
        for part in op.inherit {
            match PolicyPart::try_from(part) {
                Ok(PolicyPart::Snapshot) => policy.snapshot = None,
                Ok(PolicyPart::Spans) => policy.spans = None,
                Ok(PolicyPart::Storage) => policy.storage = None,
                Ok(PolicyPart::Stripe) => policy.stripe = None,
                Ok(PolicyPart::Inline) => policy.inline = None,
                _ => return Err(Code::InvalidArgument),
            }
        }
        if change.snapshot.is_some() {
            policy.snapshot = change.snapshot;
        }
        if change.spans.is_some() {
            policy.spans = change.spans;
        }
        if change.storage.is_some() {
            policy.storage = change.storage;
        }
        if change.stripe.is_some() {
            policy.stripe = change.stripe;
        }
        if change.inline.is_some() {
            policy.inline = change.inline;
        }
        let (time, is_empty) = (self.time, policy == DirectoryPolicy::default());
        let row = self.inodes.get_mut(&op.id).ok_or(Code::NotFound)?;
        row.policy = if is_empty { None } else { Some(policy) };
        row.ctime = time;
        Ok(Reply::Attributes(attributes(op.id, row)))
    }
}

/// Whether a directory may have such a policy.
fn is_possible(policy: &DirectoryPolicy) -> bool {
    let rising = |sizes: Vec<u32>| {
        (1..=POLICY_CLASSES_MAX).contains(&sizes.len()) && sizes.windows(2).all(|pair| pair[0] < pair[1])
    };
    let snapshot =
        policy.snapshot.is_none_or(|s| s.versions.is_none_or(|versions| versions <= SNAPSHOT_VERSIONS_MAX));
    let spans = policy.spans.as_ref().is_none_or(|s| {
        rising(s.classes.iter().map(|c| c.size_max).collect())
            && s.classes.iter().all(|c| {
                (4096..=SPAN_BYTES_MAX).contains(&c.size_max)
                    && (1..=DATA_BLOCKS_MAX).contains(&c.data_blocks)
                    && c.parity_blocks <= PARITY_BLOCKS_MAX
            })
    });
    let storage =
        policy.storage.as_ref().is_none_or(|s| rising(s.classes.iter().map(|c| c.size_min).collect()));
    let stripe = policy
        .stripe
        .is_none_or(|s| s.cell_size > 0 && s.cell_size % 4096 == 0 && s.cell_size <= CELL_BYTES_MAX);
    let inline = policy.inline.is_none_or(|i| i.size_max == 0 || (255..=65_536).contains(&i.size_max));
    snapshot && spans && storage && stripe && inline
}
