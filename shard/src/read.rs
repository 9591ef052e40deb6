//! Requests that only read.

use bytes::Bytes;
use clutch_proto::{
    ContentId, InodeKind, Refusal, SpanId,
    limits::{LAYOUT_INLINE_BYTES_MAX, WHOLE_HISTORY_ROWS_MAX},
    listing,
    mutants::{self, Mutant},
    name,
    shard::{
        ContentRow, EdgeReply, EdgeRow, ExtentRow, History, HistoryReply, Layout, LayoutReply, Lookup,
        PastEdge, PastEdgeRow, ReadDir, ReadDirReply, ShardRequest, Stat, extent_row, shard_reply::Reply,
        shard_request::Op,
    },
    types::{Code, Extent, Span, extent::Source},
};
use clutch_state::{
    Stop, StoreError, View, get_row, key_after,
    store::{decode_row, hex},
};
use prost::Message as _;

use crate::{
    extent,
    facts::Pages,
    inline, inode,
    rows::{check_slot, parse_directory, parse_inode},
    tables, visit,
};

pub(crate) fn read(view: &dyn View, request: &ShardRequest, pages: &Pages) -> Result<Reply, Stop> {
    let unknown = || Refusal::malformed("a request without an operation that this build knows");
    match request.op.as_ref().ok_or_else(unknown)? {
        Op::Lookup(op) => lookup(view, op),
        Op::Stat(op) => stat(view, op),
        Op::ReadDir(op) => read_dir(view, op, pages),
        Op::Layout(op) => layout(view, op, pages),
        Op::History(op) if op.with_present => whole_history(view, op, pages),
        Op::History(op) => history(view, op, pages),
        Op::ContentHistory(op) => visit::content_history(view, op, pages),
        Op::VisitInodes(op) => visit::inodes(view, op, pages),
        Op::VisitTransients(op) => visit::transients(view, op, pages),
        Op::VisitPastContents(op) => visit::past_contents(view, op, pages),
        Op::VisitDeadSpans(op) => visit::dead_spans(view, op, pages),
        Op::VisitBlocks(op) => visit::blocks(view, op, pages),
        Op::VisitSpans(op) => visit::spans(view, op, pages),
        // Changes and steps do not come here.
        Op::CreateFile(_)
        | Op::CreateInline(_)
        | Op::CreateSymlink(_)
        | Op::StartContent(_)
        | Op::InitiateSpan(_)
        | Op::CertifySpan(_)
        | Op::AddInline(_)
        | Op::AddHole(_)
        | Op::LinkFile(_)
        | Op::RenameInDirectory(_)
        | Op::Unlink(_)
        | Op::SetAttributes(_)
        | Op::Undelete(_)
        | Op::SetPolicy(_)
        | Op::ShareRange(_)
        | Op::PublishContent(_)
        | Op::RestoreContent(_)
        | Op::ScrapContent(_)
        | Op::SwapBlocks(_)
        | Op::SwapSpans(_)
        | Op::MoveSpan(_)
        | Op::ForgetEdge(_)
        | Op::ForgetContent(_)
        | Op::CollectContent(_)
        | Op::RemoveSpan(_)
        | Op::CreateDirectoryInode(_)
        | Op::InsertEdge(_)
        | Op::LockEdge(_)
        | Op::UnlockEdge(_)
        | Op::RemoveLockedEdge(_)
        | Op::SetParent(_)
        | Op::OrphanDirectory(_)
        | Op::RemoveDirectoryInode(_)
        | Op::DropPastEdge(_)
        | Op::RemoveFileInode(_)
        | Op::AdoptDirectory(_)
        | Op::ForgetDirectoryInode(_) => Err(Refusal::malformed("not a read").into()),
    }
}

fn lookup(mut view: &dyn View, op: &Lookup) -> Result<Reply, Stop> {
    let dir = parse_directory(&mut view, op.dir)?;
    name::check(&op.name)?;
    let Some(edge) = get_row::<EdgeRow>(view, tables::EDGE, &tables::edge_key(dir, &op.name))? else {
        inode::get(&mut view, dir)?;
        return Err(Stop::refuse(
            Code::NotFound,
            format!("{:?} does not exist", String::from_utf8_lossy(&op.name)),
        ));
    };
    let EdgeRow { target, created_at, locked } = edge;
    Ok(Reply::Edge(EdgeReply { target, created_at, locked, replaced: 0 }))
}

fn stat(mut view: &dyn View, op: &Stat) -> Result<Reply, Stop> {
    let id = parse_inode(op.id)?;
    check_slot(&mut view, id.slot())?;
    let row = inode::get(&mut view, id)?;
    Ok(Reply::Attributes(inode::attributes(id, row)))
}

/// A page of a listing. The cursor is a hash; a page that ends among names of one hash says behind which of them the
/// next one begins, so that a page is bounded whatever the names are.
fn read_dir(mut view: &dyn View, op: &ReadDir, pages: &Pages) -> Result<Reply, Stop> {
    let dir = parse_directory(&mut view, op.dir)?;
    inode::get(&mut view, dir)?;
    if op.cursor >> 63 != 0 {
        return Err(Stop::refuse(Code::InvalidArgument, "a cursor has 63 bits"));
    }
    let is_among = !op.after.is_empty();
    if is_among && name::hash63(&op.after) != op.cursor {
        return Err(Stop::refuse(Code::InvalidArgument, "`after` is not from a page of this listing"));
    }
    let limit = match op.limit as usize {
        0 => pages.entries,
        asked => asked.min(pages.entries),
    };
    let from = if is_among { tables::edge_behind(dir, &op.after) } else { tables::edge_from(dir, op.cursor) };
    let until = key_after(&tables::directory_prefix(dir));
    let mut reply = ReadDirReply::default();
    let mut page = Vec::new();
    let (mut count, mut last_hash, mut last_name) = (0, 0, 0..0);
    let (mut is_cut_among, mut broken) = (false, None);
    view.visit(tables::EDGE, &from, &until, &mut |key, value| {
        let parsed = tables::parse_edge_key(key).zip(EdgeRow::decode(value).ok());
        let Some(((_, hash, name), edge)) = parsed else {
            broken = Some(StoreError::Broken(format!("the edge at key {} cannot be decoded", hex(key))));
            return false;
        };
        if count >= limit {
            is_cut_among = hash == last_hash;
            let skips = if is_cut_among { Mutant::CollidersSkipped } else { Mutant::ListingSkips };
            reply.next_cursor = hash + u64::from(mutants::is(skips));
            return false;
        }
        let begin = page.len() + 1;
        listing::push(&mut page, name, edge.target, edge.created_at);
        (count, last_hash, last_name) = (count + 1, hash, begin..begin + name.len());
        true
    })?;
    if let Some(error) = broken {
        return Err(error.into());
    }
    reply.entries = page.into();
    if is_cut_among && reply.next_cursor == last_hash {
        reply.next_after = reply.entries.slice(last_name);
    }
    Ok(Reply::ReadDir(reply))
}

fn layout(mut view: &dyn View, op: &Layout, pages: &Pages) -> Result<Reply, Stop> {
    let id = parse_inode(op.id)?;
    check_slot(&mut view, id.slot())?;
    match id.kind() {
        InodeKind::File => {}
        InodeKind::Directory => return Err(Stop::refuse(Code::IsDirectory, format!("{id} is a directory"))),
        InodeKind::Symlink => {
            return Err(Stop::refuse(Code::InvalidArgument, format!("{id} is a symbolic link")));
        }
    }
    let row = inode::get(&mut view, id)?;
    let is_newest = op.content == 0 || op.offset > 0 && mutants::is(Mutant::SecondPageOfNewer);
    let content = ContentId(if is_newest { row.content } else { op.content });
    let mut reply = LayoutReply { content: content.0, ..LayoutReply::default() };
    if content.0 == 0 {
        return Ok(Reply::Layout(reply));
    }
    check_slot(&mut view, content.slot())?;
    let found: Option<ContentRow> = get_row(view, tables::CONTENT, &tables::content_key(content))?;
    let found = found.filter(|c| c.file == id.raw());
    let found = found.ok_or_else(|| Stop::refuse(Code::NotFound, "the file has no such content"))?;
    reply.size = found.size;
    let until = key_after(&tables::extent_key(content, 0)[..9]);
    let from = extent::start_of(&mut view, content, op.offset)?;
    let rows = view.scan(tables::EXTENT, &tables::extent_key(content, from), &until, pages.extents + 1)?;
    let mut inline_bytes = 0;
    for (key, value) in rows {
        let (_, offset) =
            tables::parse_pair(&key).ok_or_else(|| StoreError::Broken("an extent's key".into()))?;
        let row: ExtentRow = decode_row(tables::EXTENT, &key, value)?;
        if matches!(row.source, Some(extent_row::Source::Apart(_))) {
            inline_bytes += row.length as usize;
        }
        let is_full = inline_bytes > LAYOUT_INLINE_BYTES_MAX && !reply.extents.is_empty();
        if reply.extents.len() == pages.extents || is_full {
            reply.next_offset = offset;
            break;
        }
        let source = match row.source {
            Some(extent_row::Source::Inline(data)) => Source::Inline(data),
            Some(extent_row::Source::Apart(digest)) => {
                Source::Inline(inline::checked(&key, row.length, &digest, view.get(tables::INLINE, &key)?)?)
            }
            Some(extent_row::Source::Hole(_)) => Source::Hole(true),
            None => return Err(extent::unknown_source(content.0)),
            Some(extent_row::Source::Span(range)) => {
                let key = tables::span_key(SpanId(range.span_id));
                let span: Span = get_row(view, tables::SPAN, &key)?.ok_or_else(|| {
                    StoreError::Broken(format!("span {:x} of a content does not exist", range.span_id))
                })?;
                if !reply.spans.iter().any(|s| s.span_id == span.span_id) {
                    reply.spans.push(span);
                }
                Source::Span(range)
            }
        };
        reply.extents.push(Extent { offset, length: row.length, source: Some(source) });
    }
    Ok(Reply::Layout(reply))
}

/// Present and past entries of a directory, or of one name, of one moment. What has one hash comes on one page, or is
/// refused.
fn whole_history(mut view: &dyn View, op: &History, pages: &Pages) -> Result<Reply, Stop> {
    let dir = parse_directory(&mut view, op.dir)?;
    inode::get(&mut view, dir)?;
    let first = match op.after.as_ref() {
        [] => 0,
        after => after
            .try_into()
            .map(u64::from_be_bytes)
            .map_err(|_| Stop::refuse(Code::InvalidArgument, "`after` is not from a page of this listing"))?,
    };
    let (present_keys, past_keys) = if op.name.is_empty() {
        let all = (tables::edge_from(dir, first), key_after(&tables::directory_prefix(dir)));
        (all.clone(), all)
    } else {
        name::check(&op.name)?;
        let past = tables::past_edge_prefix(dir, &op.name);
        let past_end = key_after(&past);
        let present = match mutants::is(Mutant::PresentOfColliders) {
            true => tables::edge_from(dir, name::hash63(&op.name)),
            false => tables::edge_key(dir, &op.name),
        };
        ((present, tables::edge_behind(dir, &op.name)), (past, past_end))
    };
    let broken = || StoreError::Broken("an edge's key".into());
    let mut fetch = pages.entries + 1;
    loop {
        let (present, past) = (
            view.scan(tables::EDGE, &present_keys.0, &present_keys.1, fetch)?,
            view.scan(tables::PAST_EDGE, &past_keys.0, &past_keys.1, fetch)?,
        );
        let hash_of = |rows: &[(Bytes, Bytes)]| match rows.last() {
            // Both kinds of keys have the hash at the same place.
            Some((key, _)) if rows.len() == fetch => {
                tables::parse_edge_key(key).map(|(_, hash, _)| hash).ok_or_else(broken)
            }
            _ => Ok(u64::MAX),
        };
        let cut = hash_of(&present)?.min(hash_of(&past)?);
        let mut all: Vec<(u64, PastEdge)> = Vec::new();
        for (key, value) in present {
            let (_, hash, name) = tables::parse_edge_key(&key).ok_or_else(broken)?;
            let row: EdgeRow = decode_row(tables::EDGE, &key, value)?;
            let name = Bytes::copy_from_slice(name);
            let EdgeRow { target, created_at, .. } = row;
            all.push((hash, PastEdge { name, target, created_at, ended_at: 0, owned: true }));
        }
        for (key, value) in past {
            let (_, hash, name, ended_at) = tables::parse_past_edge_key(&key).ok_or_else(broken)?;
            let PastEdgeRow { target, created_at, owned } = decode_row(tables::PAST_EDGE, &key, value)?;
            let name = Bytes::copy_from_slice(name);
            all.push((hash, PastEdge { name, target, created_at, ended_at, owned }));
        }
        all.retain(|(hash, _)| *hash < cut);
        if all.is_empty() && cut != u64::MAX {
            // More of one hash than a page holds: the page grows, as far as an answer may.
            fetch *= 2;
            if fetch > WHOLE_HISTORY_ROWS_MAX {
                let text = "a name, or several of one hash, have too long a history to be read at once; read what \
                            is past in pages";
                return Err(Stop::refuse(Code::TooLarge, text));
            }
            continue;
        }
        all.sort_by(|(a, x), (b, y)| {
            let end = |edge: &PastEdge| edge.ended_at.wrapping_sub(1);
            (a, &x.name, end(x)).cmp(&(b, &y.name, end(y)))
        });
        let past = all.into_iter().map(|(_, edge)| edge).collect();
        let next = if cut == u64::MAX { Bytes::new() } else { Bytes::copy_from_slice(&cut.to_be_bytes()) };
        return Ok(Reply::History(HistoryReply { past, next }));
    }
}

fn history(mut view: &dyn View, op: &History, pages: &Pages) -> Result<Reply, Stop> {
    let dir = parse_directory(&mut view, op.dir)?;
    inode::get(&mut view, dir)?;
    let prefix = if op.name.is_empty() {
        tables::directory_prefix(dir)
    } else {
        name::check(&op.name)?;
        match mutants::is(Mutant::HistoryOfColliders) {
            true => tables::edge_from(dir, name::hash63(&op.name)),
            false => tables::past_edge_prefix(dir, &op.name),
        }
    };
    let from = if op.after.is_empty() { prefix.clone() } else { [&op.after[..], &[0]].concat().into() };
    if !from.starts_with(&prefix) {
        return Err(Stop::refuse(Code::InvalidArgument, "`after` is not from a page of this listing"));
    }
    let mut rows = view.scan(tables::PAST_EDGE, &from, &key_after(&prefix), pages.entries)?;
    let next = if rows.len() == pages.entries { rows.last().map(|(k, _)| k.clone()) } else { None };
    if next.is_some() && mutants::is(Mutant::HistoryCutAtWrongEnd) {
        rows.pop();
    }
    let mut reply = HistoryReply { past: Vec::with_capacity(rows.len()), next: next.unwrap_or_default() };
    for (key, value) in rows {
        let broken = || StoreError::Broken("a past edge's key".into());
        let (_, _, name, ended_at) = tables::parse_past_edge_key(&key).ok_or_else(broken)?;
        let row: PastEdgeRow = decode_row(tables::PAST_EDGE, &key, value)?;
        let PastEdgeRow { target, created_at, owned } = row;
        reply.past.push(PastEdge {
            name: bytes::Bytes::copy_from_slice(name),
            target,
            created_at,
            ended_at,
            owned,
        });
    }
    Ok(Reply::History(reply))
}

#[cfg(test)]
mod tests {
    use clutch_state::{MemoryStore, Store as _};
    use prost::Message as _;

    use super::*;

    #[test]
    fn the_extent_of_an_offset_is_found_among_few_and_many() {
        let content = ContentId(0x100);
        // One byte, ten thousand times; a long one; some of all sizes.
        let lengths = std::iter::repeat_n(1u64, 10_000)
            .chain([1 << 40])
            .chain((0..2000u64).map(|i| 1 + i * i * 7919 % 100_000));
        let store = MemoryStore::new();
        let (mut at, mut starts) = (0, Vec::new());
        for length in lengths {
            let row = ExtentRow { length, source: Some(extent_row::Source::Hole(true)) };
            let key = tables::EXTENT.stored_key(&tables::extent_key(content, at));
            store.write(vec![(key, Some(row.encode_to_vec().into()))]).expect("writes");
            starts.push(at);
            at += length;
        }
        let mut view: &dyn View = &store;
        let end = at;
        let mut found = |offset: u64| extent::start_of(&mut view, content, offset).expect("reads");
        for window in starts.windows(2).step_by(37) {
            for offset in [window[0], window[0] + (window[1] - window[0]) / 2, window[1] - 1] {
                assert_eq!(found(offset), window[0], "of {offset}");
            }
        }
        assert_eq!(Some(found(end - 1)), starts.last().copied());
        assert_eq!(Some(found(u64::MAX)), starts.last().copied());
    }
}
