//! Contents that are being written: nothing of a draft can be seen before it is linked or published, all at once.
//!
//! A draft that is dropped expires at its shard; [`Client::scrap`] gives its space back sooner.

use bytes::Bytes;
use clutch_proto::{
    InodeId, Refusal,
    limits::INLINE_BYTES_MAX,
    shard::{
        AddHole, AddInline, ContentReply, LinkFile, PublishContent, ScrapContent, ShareRange, StartContent,
        shard_reply::Reply, shard_request::Op,
    },
    types::{Attributes, Code, SpanShape},
};
use clutch_runtime::Held;

use crate::{
    error::ClientError,
    files::{Created, FileAttributes, attributes_of, created},
    path::Resolved,
    policy::WritePolicy,
    rpc::Client,
    source::{ContentSource, read_up_to},
    span::{Encoded, Never, encode},
};

/// So few bytes are encoded where they are: handing them to another thread would take longer.
const ENCODED_AT_ONCE: usize = 64 << 10;

/// A content that is not published yet. Appends go in order, one at a time.
#[derive(Clone, Debug)]
pub struct Draft {
    pub(crate) content: u64,
    pub(crate) cookie: Bytes,
    pub(crate) size: u64,
    /// The span that was appended last and how many bytes it has; 0 when the last extent is no span.
    pub(crate) last_span: u64,
    pub(crate) last_length: u64,
}

/// Bytes that are ready to be appended.
pub(crate) enum Prepared {
    Inline(Bytes),
    Hole(u64),
    Span {
        encoded: Encoded,
        storage_class: u32,
        /// What is encoded counts against the client's memory until it is written.
        _held: Held,
    },
}

impl Draft {
    /// The content's id.
    pub fn content(&self) -> u64 {
        self.content
    }

    /// The span that was appended last; `None` when the last extent is not a span.
    pub fn last_span(&self) -> Option<u64> {
        (self.last_span != 0).then_some(self.last_span)
    }

    /// Bytes so far.
    pub fn size(&self) -> u64 {
        self.size
    }
}

impl Client {
    /// Begins a content, for the directory in which it will be linked or for the file that will get it.
    pub async fn start_draft(&self, home: InodeId) -> Result<Draft, ClientError> {
        let op = Op::StartContent(StartContent { dir: home.raw() });
        match self.shard(op).await? {
            Reply::Content(ContentReply { content, cookie, .. }) => {
                Ok(Draft { content, cookie, size: 0, last_span: 0, last_length: 0 })
            }
            _ => Err(ClientError::unexpected("a content")),
        }
    }

    /// Appends bytes, at most a span of them: inline when they are few, as a hole when they are zeros.
    pub async fn append(
        &self,
        draft: &mut Draft,
        chunk: Vec<u8>,
        policy: &WritePolicy,
    ) -> Result<(), ClientError> {
        let prepared = self.prepare(chunk, policy, None).await?;
        self.append_prepared(draft, prepared).await
    }

    /// Does what can be done before it is known where the bytes go. `held` is the memory for them, where it was waited for
    /// before they were read.
    pub(crate) async fn prepare(
        &self,
        chunk: Vec<u8>,
        policy: &WritePolicy,
        held: Option<Held>,
    ) -> Result<Prepared, ClientError> {
        if chunk.len() <= INLINE_BYTES_MAX {
            return Ok(Prepared::Inline(chunk.into()));
        }
        if chunk.iter().all(|b| *b == 0) {
            return Ok(Prepared::Hole(chunk.len() as u64));
        }
        let size = u32::try_from(chunk.len())
            .map_err(|_| Refusal::new(Code::TooLarge, "more bytes than a span may have"))?;
        let held = match held {
            Some(held) => held,
            None => self.memory_for(size, policy).await,
        };
        let (data_blocks, parity_blocks) = policy.code_of(size);
        let codec = self.codec(data_blocks, parity_blocks)?;
        let shape = SpanShape::for_size_with(size, data_blocks, parity_blocks, policy.cell_size);
        let storage_class = policy.storage_class_of(shape.block_bytes());
        let encoded = if chunk.len() <= ENCODED_AT_ONCE {
            encode(&codec, shape, chunk)
        } else {
            let work = self.inner.runtime.blocking(move || encode(&codec, shape, chunk));
            work.await.ok_or_else(|| ClientError::Local("encoding did not finish".into()))?
        };
        let encoded = encoded.map_err(|e| Refusal::invalid(e.to_string()))?;
        Ok(Prepared::Span { encoded, storage_class, _held: held })
    }

    /// Waits until there is memory for a span of so many bytes, its parity with it. Whoever waits holds none that it does
    /// not give back by itself, so nobody waits for ever.
    pub(crate) async fn memory_for(&self, size: u32, policy: &WritePolicy) -> Held {
        let (data_blocks, parity_blocks) = policy.code_of(size);
        let parity = u64::from(size) * u64::from(parity_blocks) / u64::from(data_blocks.max(1));
        self.inner.memory.hold(usize::try_from(u64::from(size) + parity).unwrap_or(usize::MAX)).await
    }

    pub(crate) async fn append_prepared(
        &self,
        draft: &mut Draft,
        prepared: Prepared,
    ) -> Result<(), ClientError> {
        let (content, cookie, offset) = (draft.content, draft.cookie.clone(), draft.size);
        match prepared {
            Prepared::Inline(data) if data.is_empty() => {}
            Prepared::Inline(data) => {
                let length = data.len() as u64;
                let op = AddInline { content, cookie, offset, data };
                self.shard(Op::AddInline(op)).await?;
                (draft.size, draft.last_span) = (offset + length, 0);
            }
            Prepared::Hole(length) => self.append_hole(draft, length).await?,
            Prepared::Span { encoded, storage_class, .. } => {
                let span = self.write_span(draft, offset, &encoded, storage_class, &Never::default()).await?;
                let length = u64::from(encoded.size);
                (draft.last_span, draft.last_length) = (span.span_id, length);
                draft.size = offset + length;
            }
        }
        Ok(())
    }

    /// Appends zeros that take no space.
    pub async fn append_hole(&self, draft: &mut Draft, length: u64) -> Result<(), ClientError> {
        if length == 0 {
            return Ok(());
        }
        let op = AddHole { content: draft.content, cookie: draft.cookie.clone(), offset: draft.size, length };
        self.shard(Op::AddHole(op)).await?;
        (draft.size, draft.last_span) = (draft.size + length, 0);
        Ok(())
    }

    /// Appends a range of a published content of the same slot; its blocks are shared, not copied.
    pub async fn append_shared(
        &self,
        draft: &mut Draft,
        from_content: u64,
        mut from_offset: u64,
        length: u64,
    ) -> Result<(), ClientError> {
        let end = from_offset.saturating_add(length);
        let mut part = length;
        while from_offset < end {
            part = part.min(end - from_offset);
            let op = ShareRange {
                content: draft.content,
                cookie: draft.cookie.clone(),
                offset: draft.size,
                from_content,
                from_offset,
                length: part,
            };
            match self.shard(Op::ShareRange(op)).await {
                Ok(_) => {
                    (draft.size, draft.last_span) = (draft.size + part, 0);
                    from_offset += part;
                    // What lies behind a dense place may fit in larger parts again.
                    part = part.saturating_mul(2);
                }
                // More extents than one entry takes.
                Err(error) if error.code() == Some(Code::TooLarge) && part > 1 => part = part.div_ceil(2),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Makes the draft a new file.
    pub async fn link(
        &self,
        draft: Draft,
        dir: InodeId,
        name: &Bytes,
        attributes: FileAttributes,
        replace: bool,
    ) -> Result<Created, ClientError> {
        let FileAttributes { mode, uid, gid, mtime } = attributes;
        let Draft { content, cookie, .. } = draft;
        let op =
            LinkFile { dir: dir.raw(), name: name.clone(), content, cookie, mode, uid, gid, mtime, replace };
        created(self.shard(Op::LinkFile(op)).await?)
    }

    /// Makes the draft the content of a file that exists. Refused as stale when the file has another content by now
    /// than the one that is named. `dir` is where the file was found: its policy keeps the old content.
    pub async fn publish(
        &self,
        draft: Draft,
        file: InodeId,
        expected_content: u64,
        dir: InodeId,
    ) -> Result<Attributes, ClientError> {
        let op = PublishContent {
            id: file.raw(),
            content: draft.content,
            cookie: draft.cookie,
            expected_content,
            mtime: 0,
            dir: dir.raw(),
        };
        attributes_of(self.shard(Op::PublishContent(op)).await?)
    }

    /// Gives a draft up.
    pub async fn scrap(&self, draft: &Draft) -> Result<(), ClientError> {
        let op = ScrapContent { content: draft.content, cookie: draft.cookie.clone() };
        self.shard(Op::ScrapContent(op)).await.map(drop)
    }

    /// Replaces bytes of a file from an offset on and keeps the rest, or with `truncate` nothing behind them. The file
    /// keeps its id; what does not change is shared with the content before; readers see the old bytes until all new
    /// ones are durable. Refused as stale when somebody else has changed the file meanwhile.
    pub async fn write_range(
        &self,
        file: &Resolved,
        offset: u64,
        truncate: bool,
        source: &mut dyn ContentSource,
    ) -> Result<Attributes, ClientError> {
        let (before, draft) = self.draft_range(file, offset, truncate, source).await?;
        self.publish_over(file, before, draft).await
    }

    /// The first half of [`Client::write_range`]: what the file is, and the content that is to be published in place of that;
    /// `None` where nothing changes.
    pub async fn draft_range(
        &self,
        file: &Resolved,
        offset: u64,
        truncate: bool,
        source: &mut dyn ContentSource,
    ) -> Result<(Attributes, Option<Draft>), ClientError> {
        let before = self.stat(file.id).await?;
        let policy = self.write_policy(file.parent).await?;
        let first = read_up_to(source, policy.span_bytes()).await?;
        // Nothing that is written lengthens nothing.
        let offset = if first.is_empty() { offset.min(before.size) } else { offset };
        if first.is_empty() && (!truncate || offset == before.size) {
            return Ok((before, None));
        }
        let mut draft = self.start_draft(file.id).await?;
        let written = async {
            let mut end = offset;
            let kept = offset.min(before.size);
            self.append_shared(&mut draft, before.content, 0, kept).await?;
            self.append_hole(&mut draft, offset - kept).await?;
            let mut chunk = first;
            loop {
                let length = chunk.len();
                end += length as u64;
                self.append(&mut draft, chunk, &policy).await?;
                if length < policy.span_bytes() {
                    break;
                }
                chunk = read_up_to(source, policy.span_bytes()).await?;
            }
            if !truncate && draft.size < before.size {
                let from = draft.size;
                self.append_shared(&mut draft, before.content, from, before.size - from).await?;
            }
            let whole = if truncate { end } else { end.max(before.size) };
            assert_eq!(draft.size, whole, "what is written and what is kept make up the file");
            Ok(())
        };
        let written = written.await;
        self.give_up(&draft, &written).await;
        written.map(|()| (before, Some(draft)))
    }

    /// Cuts a file, or makes it longer with zeros.
    pub async fn truncate(&self, file: &Resolved, size: u64) -> Result<Attributes, ClientError> {
        let (before, draft) = self.draft_truncated(file, size).await?;
        self.publish_over(file, before, Some(draft)).await
    }

    /// The first half of [`Client::truncate`], as [`Client::draft_range`].
    pub async fn draft_truncated(
        &self,
        file: &Resolved,
        size: u64,
    ) -> Result<(Attributes, Draft), ClientError> {
        let before = self.stat(file.id).await?;
        let mut draft = self.start_draft(file.id).await?;
        let written = async {
            self.append_shared(&mut draft, before.content, 0, size.min(before.size)).await?;
            self.append_hole(&mut draft, size.saturating_sub(before.size)).await?;
            assert_eq!(draft.size, size, "what is kept and what is added make up the file");
            Ok(())
        };
        let written = written.await;
        self.give_up(&draft, &written).await;
        written.map(|()| (before, draft))
    }

    /// The second half: publishes a draft in place of what the file was, or gives it up.
    pub async fn publish_over(
        &self,
        file: &Resolved,
        before: Attributes,
        draft: Option<Draft>,
    ) -> Result<Attributes, ClientError> {
        let Some(draft) = draft else { return Ok(before) };
        let written = self.publish(draft.clone(), file.id, before.content, file.parent).await;
        self.give_up(&draft, &written).await;
        written
    }

    /// Gives the space of a draft back at once that was not published. If that fails, it expires; where a copy of the
    /// publication comes first, it is refused.
    pub(crate) async fn give_up<T>(&self, draft: &Draft, written: &Result<T, ClientError>) {
        if matches!(written, Err(ClientError::Refused(_) | ClientError::Declined(_) | ClientError::Local(_)))
        {
            let _ = self.scrap(draft).await;
        }
    }
}
