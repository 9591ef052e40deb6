//! Reading files: every cell is checked; what is missing or wrong is computed from the other blocks.

use std::time::Duration;

use bytes::Bytes;
use clutch_proto::{
    InodeId, Refusal,
    blocks::{ReadBlock, blocks_request},
    crc,
    mutants::{self, Mutant},
    shard::{Layout, LayoutReply, shard_reply::Reply, shard_request::Op},
    types::{Block, Code, Extent, Span, extent::Source},
};
use futures_util::{StreamExt as _, stream};

use crate::{
    error::ClientError,
    gather::{Gathered, best_first},
    rpc::{Client, lock},
    span::{Cells, recover},
};

/// How long a service that failed is tried only after the others.
const SUSPICION: Duration = Duration::from_secs(10);
/// Spans are read in pieces of about this size, whole stripes: what is in memory does not grow with the spans.
const PIECE_BYTES: u64 = 4 << 20;
/// Pieces of one file that are read at a time: one is handed out while the next ones are on their way.
const PIECES_AT_A_TIME: usize = 4;
/// A piece is in memory as the cells that came and as the bytes that are handed out.
const COPIES: usize = 2;
/// A hole is handed out in pieces of this size.
const ZEROS_MAX: u64 = 1 << 20;

impl Client {
    /// A page of a file's extents, from the one that holds `offset` on.
    pub async fn layout(&self, id: InodeId, content: u64, offset: u64) -> Result<LayoutReply, ClientError> {
        match self.shard(Op::Layout(Layout { id: id.raw(), offset, content })).await? {
            Reply::Layout(layout) => Ok(layout),
            _ => Err(ClientError::unexpected("a layout")),
        }
    }

    /// Reads a whole file and hands its bytes to `sink` in order. All bytes are of one version of the file.
    pub async fn read_file(
        &self,
        id: InodeId,
        sink: &mut (dyn FnMut(Bytes) -> std::io::Result<()> + Send),
    ) -> Result<u64, ClientError> {
        self.read_version(id, 0, sink).await.map(|(_, bytes)| bytes)
    }

    /// Reads one content of a file, present or past; 0 stands for the present one. Which it was, and its bytes.
    pub async fn read_version(
        &self,
        id: InodeId,
        content: u64,
        sink: &mut (dyn FnMut(Bytes) -> std::io::Result<()> + Send),
    ) -> Result<(u64, u64), ClientError> {
        let local = |e: std::io::Error| ClientError::Local(e.to_string());
        let mut page = self.layout(id, content, 0).await?;
        let mut done = 0u64;
        // Certificates last an hour: whoever reads more slowly than that asks for new ones.
        let mut renewed_at = None;
        loop {
            // Whatever the page says comes from the network: lengths are checked where they are used.
            let pieces = pieces(&page, done)?;
            let one = |index: usize| {
                let (piece, page) = (pieces[index], &page);
                async move {
                    // Whoever comes first gets memory first, so the piece that is handed out next never waits for others.
                    let held = self.inner.memory.hold(piece.memory()).await;
                    self.read_extent(id, page, piece.extent, piece.from, piece.count)
                        .await
                        .map(|read| (read, held))
                }
            };
            // What comes next is on its way while this is handed out.
            let mut reads = stream::iter(0..pieces.len()).map(one).buffered(PIECES_AT_A_TIME);
            let mut has_expired = false;
            for piece in &pieces {
                let Some(read) = reads.next().await else { break };
                has_expired = read.as_ref().is_err_and(|e| e.code() == Some(Code::CertificateExpired))
                    && renewed_at != Some(done);
                if has_expired {
                    break;
                }
                match read? {
                    (Some(bytes), _held) => sink(bytes).map_err(local)?,
                    (None, _) => {
                        let mut left = piece.count;
                        while left > 0 {
                            let zeros = left.min(ZEROS_MAX);
                            sink(Bytes::from(vec![0; zeros as usize])).map_err(local)?;
                            left -= zeros;
                        }
                    }
                }
                done = done
                    .checked_add(piece.count)
                    .ok_or_else(|| ClientError::unexpected("a possible length"))?;
            }
            drop(reads);
            if has_expired {
                renewed_at = Some(done);
                let of = if mutants::is(Mutant::RenewedOfPresent) { content } else { page.content };
                page = self.layout(id, of, done).await?;
                continue;
            }
            if page.next_offset == 0 {
                break;
            }
            if page.next_offset != done || page.extents.is_empty() {
                return Err(ClientError::unexpected("contiguous extents"));
            }
            page = self.layout(id, page.content, page.next_offset).await?;
        }
        if done != page.size {
            return Err(ClientError::unexpected("all of the file's extents"));
        }
        Ok((page.content, done))
    }

    /// Reads up to `length` bytes from `offset`; fewer only at the end of the file.
    pub async fn read_range(&self, id: InodeId, offset: u64, length: usize) -> Result<Vec<u8>, ClientError> {
        self.read_range_of(id, 0, offset, length).await.map(|(_, bytes)| bytes)
    }

    /// The same of one content, present or past; 0 stands for the present one. Which it was, and the bytes.
    pub async fn read_range_of(
        &self,
        id: InodeId,
        content: u64,
        offset: u64,
        length: usize,
    ) -> Result<(u64, Vec<u8>), ClientError> {
        let mut out = Vec::new();
        let (mut at, mut content) = (offset, content);
        let end = offset.saturating_add(length as u64);
        loop {
            let page = self.layout(id, content, at).await?;
            content = page.content;
            let before = at;
            for extent in &page.extents {
                let extent_end = extent.offset.checked_add(extent.length);
                let extent_end = extent_end.ok_or_else(|| ClientError::unexpected("a possible length"))?;
                if extent_end <= at || extent.offset >= end {
                    continue;
                }
                if extent.offset > at {
                    return Err(ClientError::unexpected("contiguous extents"));
                }
                let from = at - extent.offset;
                let count = end.min(extent_end) - at;
                let _held = self.inner.memory.hold(Piece { extent, from, count }.memory()).await;
                match self.read_extent(id, &page, extent, from, count).await? {
                    Some(bytes) => out.extend_from_slice(&bytes),
                    None => out.resize(out.len() + count as usize, 0),
                }
                at += count;
                assert_eq!(out.len() as u64, at - offset, "as many bytes as were asked for so far");
            }
            if page.next_offset == 0 || at >= end || content == 0 || at == before {
                return Ok((content, out));
            }
        }
    }

    /// Part of an extent; `None` for a hole.
    async fn read_extent(
        &self,
        file: InodeId,
        page: &LayoutReply,
        extent: &Extent,
        from: u64,
        count: u64,
    ) -> Result<Option<Bytes>, ClientError> {
        let out_of = || ClientError::unexpected("a range inside its extent");
        if from.checked_add(count).is_none_or(|end| end > extent.length) {
            return Err(out_of());
        }
        match &extent.source {
            Some(Source::Inline(data)) => {
                if (from + count) as usize > data.len() {
                    return Err(out_of());
                }
                Ok(Some(data.slice(from as usize..(from + count) as usize)))
            }
            Some(Source::Hole(_)) => Ok(None),
            None => Err(ClientError::unexpected("an extent's source that this build knows")),
            Some(Source::Span(range)) => {
                let span = page.spans.iter().find(|s| s.span_id == range.span_id).ok_or_else(out_of)?;
                let start = u64::from(range.offset) + from;
                if start + count > u64::from(span.size) {
                    return Err(out_of());
                }
                Ok(Some(self.read_span(file, page, extent, span, start as usize, count as usize).await?))
            }
        }
    }

    /// Bytes `start..start + count` of a span; services that are away for a moment are waited for, and asked for
    /// again, because they may come back elsewhere.
    async fn read_span(
        &self,
        file: InodeId,
        page: &LayoutReply,
        extent: &Extent,
        span: &Span,
        start: usize,
        count: usize,
    ) -> Result<Bytes, ClientError> {
        let clock = self.inner.runtime.clock.clone();
        let begin = clock.monotonic();
        let mut renewed: Option<Span> = None;
        let mut looked_again = false;
        let mut pause = Duration::from_millis(100);
        loop {
            match self.read_span_once(renewed.as_ref().unwrap_or(span), start, count).await {
                Err(ClientError::Unreachable(text)) => {
                    if clock.monotonic() - begin >= self.inner.options.patience {
                        return Err(ClientError::Unreachable(text));
                    }
                    clock.sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_secs(2));
                    if mutants::is(Mutant::ServicesUnknown) {
                        continue;
                    }
                    // Without a new layout the old one is tried again; its error says more.
                    if let Ok(layout) = self.layout(file, page.content, extent.offset).await {
                        renewed = same_bytes(&layout, extent).or(renewed);
                    }
                }
                // Blocks may have been moved, or the range given another span, since the layout was read.
                Err(ClientError::DataLost(text)) if !looked_again => {
                    looked_again = true;
                    let layout = self.layout(file, page.content, extent.offset).await?;
                    match same_bytes(&layout, extent) {
                        Some(other) if places(&other) != places(renewed.as_ref().unwrap_or(span)) => {
                            renewed = Some(other);
                        }
                        _ => return Err(ClientError::DataLost(text)),
                    }
                }
                decided => return decided,
            }
        }
    }

    /// A whole block of a span, computed from the others if it cannot be read, or is lost.
    pub(crate) async fn read_block(
        &self,
        span: &Span,
        index: usize,
        is_lost: bool,
    ) -> Result<Bytes, ClientError> {
        let shape = span.shape.ok_or_else(|| ClientError::unexpected("a shape"))?;
        shape.check(span.size)?;
        let blocks = shape.blocks() as usize;
        if span.blocks.len() != blocks || span.cell_crcs.len() != blocks * shape.stripes as usize {
            return Err(ClientError::unexpected("a whole span"));
        }
        let last = shape.stripes as usize - 1;
        // This one, and those that it may have to be computed from.
        let memory = (shape.data_blocks as usize + 1).saturating_mul(shape.block_bytes() as usize);
        let _held = self.inner.memory.hold(memory).await;
        let (mut failures, mut may_pass) = (Vec::new(), false);
        // To wait for a machine that is off costs more than to compute.
        if !is_lost && !self.suspects().contains(&span.blocks[index].service_id) {
            match self.read_cells(span, &span.blocks[index], index, 0, last).await {
                Ok(cells) => return Ok(cells),
                Err(error) => self.failed_to_read(&span.blocks[index], &error, &mut failures, &mut may_pass),
            }
        }
        let data = shape.data_blocks as usize;
        let mut from: Vec<(usize, Cells)> = Vec::new();
        for other in self.trusted_first((0..blocks).filter(|i| *i != index), span) {
            if from.len() == data {
                break;
            }
            match self.read_cells(span, &span.blocks[other], other, 0, last).await {
                Ok(cells) => from.push((other, cells)),
                Err(error) => {
                    self.failed_to_read(&span.blocks[other], &error, &mut failures, &mut may_pass);
                }
            }
        }
        if from.len() < data {
            let text = format!(
                "block {:x} of span {:x} cannot be read or computed ({})",
                span.blocks[index].block_id,
                span.span_id,
                failures.join("; ")
            );
            return Err(if may_pass { ClientError::Unreachable(text) } else { ClientError::DataLost(text) });
        }
        let codec = self.codec(shape.data_blocks, shape.parity_blocks)?;
        let cell = shape.cell_size as usize;
        let work = self.inner.runtime.blocking(move || {
            let mut whole = Vec::with_capacity(shape.block_bytes() as usize);
            for stripe in 0..shape.stripes as usize {
                let at = stripe * cell..(stripe + 1) * cell;
                let cells: Vec<(usize, &[u8])> = from.iter().map(|(i, c)| (*i, &c[at.clone()])).collect();
                whole.extend(codec.recover(index, &cells)?);
            }
            Ok::<_, clutch_blocks::CodecError>(Bytes::from(whole))
        });
        let whole = work.await.ok_or_else(|| ClientError::Local("recovery did not finish".into()))?;
        let whole = whole.map_err(|e| ClientError::DataLost(format!("span {:x}: {e}", span.span_id)))?;
        if !cells_match(span, index, 0, &whole) {
            let text = format!("span {:x}: block {index} came out wrong", span.span_id);
            return Err(ClientError::DataLost(text));
        }
        Ok(whole)
    }

    fn failed_to_read(
        &self,
        block: &Block,
        error: &ClientError,
        failures: &mut Vec<String>,
        may_pass: &mut bool,
    ) {
        *may_pass |= error.may_pass() || error.code() == Some(Code::CertificateExpired);
        failures.push(error.to_string());
        if error.code().is_none() {
            self.suspect(block.service_id);
        }
    }

    async fn read_span_once(&self, span: &Span, start: usize, count: usize) -> Result<Bytes, ClientError> {
        let shape = span.shape.ok_or_else(|| ClientError::unexpected("a shape"))?;
        // What comes from the network is checked before it is divided by.
        shape.check(span.size)?;
        let cells_all = (shape.blocks() * shape.stripes) as usize;
        if span.blocks.len() != shape.blocks() as usize || span.cell_crcs.len() != cells_all || count == 0 {
            return Err(ClientError::unexpected("a whole span"));
        }
        let (cell, stripe) = (shape.cell_size as usize, shape.stripe_bytes() as usize);
        let (first, last) = (start / stripe, (start + count - 1) / stripe);
        let data = shape.data_blocks as usize;
        // Within one stripe only the blocks that hold the range are read at first.
        let wanted = if first == last {
            (start % stripe) / cell..=((start + count - 1) % stripe) / cell
        } else {
            0..=data - 1
        };
        let wanted: Vec<usize> = wanted.collect();
        let of = self.gather(span, &wanted, (first, last)).await;
        let (have, is_whole) = (of.have(), of.has(&wanted));
        let Gathered { mut blocks, failures, may_pass, expired, tried } = of;
        if !is_whole {
            if have < data {
                let text = format!(
                    "span {:x} cannot be read: {have} of the {data} blocks that are needed are left ({})",
                    span.span_id,
                    failures.join("; ")
                );
                self.inner.runtime.note("read: fewer than D blocks");
                return Err(match (expired, may_pass) {
                    (true, _) => Refusal::new(Code::CertificateExpired, text).into(),
                    (_, true) => ClientError::Unreachable(text),
                    _ => ClientError::DataLost(text),
                });
            }
            self.inner.runtime.note("read: degraded");
            if have == data && tried == span.blocks.len() {
                self.inner.runtime.note("read: degraded with exactly D blocks left");
            }
            let codec = self.codec(shape.data_blocks, shape.parity_blocks)?;
            let work =
                self.inner.runtime.blocking(move || recover(&codec, shape, &mut blocks).map(|()| blocks));
            let recovered = work.await.ok_or_else(|| ClientError::Local("recovery did not finish".into()))?;
            blocks = recovered.map_err(|e| ClientError::DataLost(format!("span {:x}: {e}", span.span_id)))?;
            for i in &wanted {
                if let Some(cells) = &blocks[*i]
                    && !cells_match(span, *i, first, cells)
                {
                    return Err(ClientError::DataLost(format!(
                        "span {:x}: block {i} came out wrong",
                        span.span_id
                    )));
                }
            }
        }
        let mut out = Vec::with_capacity(count);
        let mut at = start;
        while at < start + count {
            let (row, column, inside) = (at / stripe - first, at % stripe / cell, at % cell);
            let piece = (cell - inside).min(start + count - at);
            let cells =
                blocks[column].as_ref().ok_or_else(|| ClientError::unexpected("a block that was read"))?;
            out.extend_from_slice(&cells[row * cell + inside..row * cell + inside + piece]);
            at += piece;
        }
        Ok(out.into())
    }

    /// Cells `first..=last` of one block, each checked.
    pub(crate) async fn read_cells(
        &self,
        span: &Span,
        block: &Block,
        index: usize,
        first: usize,
        last: usize,
    ) -> Result<Cells, ClientError> {
        let cell = span.shape.map_or(0, |s| s.cell_size);
        let (offset, length) = (first as u32 * cell, (last - first + 1) as u32 * cell);
        let op =
            blocks_request::Op::Read(ReadBlock { certificate: block.certificate.clone(), offset, length });
        let data = self.blocks(&block.address, block.service_id, op).await?.data;
        let is_good = cells_match(span, index, first, &data) || mutants::is(Mutant::CrcUnchecked);
        if data.len() != length as usize || !is_good {
            let text = "the service sent other bytes than were written";
            return Err(Refusal::new(Code::BlockCorrupt, text).into());
        }
        Ok(data)
    }

    pub(crate) fn note_failed_read(&self, error: &ClientError) {
        self.inner.runtime.note(match error.code() {
            Some(Code::CertificateExpired) => "read: the certificate has expired",
            Some(Code::BlockNotFound) => "read: a block is missing",
            Some(Code::BlockCorrupt) => "read: a block is corrupt",
            Some(Code::DiskFault) => "read: a disk gives an error",
            _ => "read: a service does not answer",
        });
    }

    fn trusted_first(&self, blocks: impl Iterator<Item = usize>, span: &Span) -> Vec<usize> {
        best_first(blocks, span, &self.suspects())
    }

    /// Services that failed lately.
    pub(crate) fn suspects(&self) -> Vec<u64> {
        let now = self.inner.runtime.clock.monotonic();
        let mut suspects = lock(&self.inner.suspects);
        suspects.retain(|_, until| *until > now);
        suspects.keys().copied().collect()
    }

    pub(crate) fn suspect(&self, service: u64) {
        let until = self.inner.runtime.clock.monotonic() + SUSPICION;
        lock(&self.inner.suspects).insert(service, until);
    }
}

/// A part of an extent that is read at once.
#[derive(Clone, Copy)]
struct Piece<'a> {
    extent: &'a Extent,
    from: u64,
    count: u64,
}

impl Piece<'_> {
    /// About how much memory it takes.
    fn memory(&self) -> usize {
        match &self.extent.source {
            Some(Source::Span(_)) => (self.count as usize).saturating_mul(COPIES),
            Some(Source::Inline(_) | Source::Hole(_)) | None => 0,
        }
    }
}

/// The pieces of a page's extents from `start` on.
fn pieces(page: &LayoutReply, start: u64) -> Result<Vec<Piece<'_>>, ClientError> {
    let mut pieces = Vec::new();
    let mut at = start;
    for (index, extent) in page.extents.iter().enumerate() {
        let end = extent.offset.checked_add(extent.length);
        let end = end.ok_or_else(|| ClientError::unexpected("a possible length"))?;
        // The first one may have begun before.
        if extent.offset > at || (index > 0 && extent.offset != at) || end < at {
            return Err(ClientError::unexpected("contiguous extents"));
        }
        while at < end {
            let from = at - extent.offset;
            let count = match &extent.source {
                Some(Source::Span(range)) => {
                    let span = page.spans.iter().find(|span| span.span_id == range.span_id);
                    let span = span.ok_or_else(|| ClientError::unexpected("a range inside its span"))?;
                    let shape = span.shape.ok_or_else(|| ClientError::unexpected("a shape"))?;
                    shape.check(span.size)?;
                    if u64::from(range.offset).saturating_add(extent.length) > u64::from(span.size) {
                        return Err(ClientError::unexpected("a range inside its span"));
                    }
                    let stripe = shape.stripe_bytes();
                    // Up to a stripe's end within the span, however the extent lies in it.
                    let whole = (PIECE_BYTES / stripe).max(1) * stripe;
                    whole - (u64::from(range.offset) + from) % whole
                }
                Some(Source::Inline(_) | Source::Hole(_)) | None => u64::MAX,
            };
            let count = count.min(end - at);
            pieces.push(Piece { extent, from, count });
            at += count;
        }
    }
    Ok(pieces)
}

fn places(span: &Span) -> Vec<(u64, u64)> {
    span.blocks.iter().map(|b| (b.service_id, b.block_id)).collect()
}

/// The span that holds an extent's bytes now, if it holds them at the same place within it.
fn same_bytes(layout: &LayoutReply, extent: &Extent) -> Option<Span> {
    let now = layout.extents.iter().find(|e| (e.offset, e.length) == (extent.offset, extent.length))?;
    match (&now.source, &extent.source) {
        (Some(Source::Span(now)), Some(Source::Span(before))) if now.offset == before.offset => {
            layout.spans.iter().find(|s| s.span_id == now.span_id).cloned()
        }
        _ => None,
    }
}

fn cells_match(span: &Span, block: usize, first: usize, cells: &[u8]) -> bool {
    let Some(shape) = span.shape else { return false };
    let crcs = &span.cell_crcs[block * shape.stripes as usize + first..];
    cells.chunks(shape.cell_size as usize).zip(crcs).all(|(cell, expected)| crc::of(cell) == *expected)
}
