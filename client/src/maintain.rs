//! What looks after stored data: visits by slot, collection step by step, moving blocks and changing codes in place.
//!
//! Nothing here decides for good: the shards check every step again.

use bytes::Bytes;
use clutch_proto::{
    ContentId, InodeId, Refusal, Slot,
    blocks::{CheckBlock, EraseBlock, blocks_request},
    cdc::{ForgetDirectory, ForgetFile, UndeleteDirectory, cdc_request},
    flags::{FLAG_CONDEMNED, FLAG_DRAIN, FLAG_GONE},
    shard::{
        CollectContent, ContentHistory, ForgetContent, ForgetEdge, HeldBlock, MoveSpan, PastContent,
        PastEdge, Remaining, RemoveSpan, RestoreContent, SwapSpans, Transient, VisitBlocks, VisitDeadSpans,
        VisitInodes, VisitPastContents, VisitSpans, VisitTransients, shard_reply::Reply, shard_request::Op,
    },
    types::{Attributes, Block, Code, Extent, SnapshotPolicy, Span, extent::Source},
};

use crate::{
    draft::Draft,
    error::ClientError,
    files::{Created, attributes_of},
    policy::WritePolicy,
    rpc::Client,
};

impl Client {
    /// A page of the inodes of one kind: 1 directories, removed ones among them, 2 files, 3 links. Begin with nothing and
    /// go on with what was returned, until that is empty; so with all visits.
    pub async fn visit_inodes(
        &self,
        kind: u32,
        after: Bytes,
    ) -> Result<(Vec<Attributes>, Bytes), ClientError> {
        let slot = slot_of(&after);
        let op = Op::VisitInodes(VisitInodes { slot: u32::from(slot.0), after, kind, limit: 0 });
        match self.shard(op).await? {
            Reply::VisitInodes(page) => Ok((page.inodes, page.next)),
            _ => Err(ClientError::unexpected("inodes")),
        }
    }

    /// A page of the contents that are not published; of one slot those come first that expire first.
    pub async fn visit_transients(&self, after: Bytes) -> Result<(Vec<Transient>, Bytes), ClientError> {
        let slot = slot_of(&after);
        let op = Op::VisitTransients(VisitTransients { slot: u32::from(slot.0), after });
        match self.shard(op).await? {
            Reply::VisitTransients(page) => Ok((page.transients, page.next)),
            _ => Err(ClientError::unexpected("transients")),
        }
    }

    /// A page of all files' past contents.
    pub async fn visit_past_contents(&self, after: Bytes) -> Result<(Vec<PastContent>, Bytes), ClientError> {
        let slot = slot_of(&after);
        let op = Op::VisitPastContents(VisitPastContents { slot: u32::from(slot.0), after });
        match self.shard(op).await? {
            Reply::VisitPastContents(page) => Ok((page.past, page.next)),
            _ => Err(ClientError::unexpected("past contents")),
        }
    }

    /// A page of the dead spans, with certificates for erasing their blocks.
    pub async fn visit_dead_spans(&self, after: Bytes) -> Result<(Vec<Span>, Bytes), ClientError> {
        let slot = slot_of(&after);
        let op = Op::VisitDeadSpans(VisitDeadSpans { slot: u32::from(slot.0), after });
        match self.shard(op).await? {
            Reply::VisitDeadSpans(page) => Ok((page.spans, page.next)),
            _ => Err(ClientError::unexpected("spans")),
        }
    }

    /// A page of the blocks that a service has, each with its span.
    pub async fn visit_blocks(
        &self,
        service_id: u64,
        after: Bytes,
    ) -> Result<(Vec<HeldBlock>, Bytes), ClientError> {
        let slot = slot_of(&after);
        let op = Op::VisitBlocks(VisitBlocks { slot: u32::from(slot.0), after, service_id });
        match self.shard(op).await? {
            Reply::VisitBlocks(page) => Ok((page.blocks, page.next)),
            _ => Err(ClientError::unexpected("blocks")),
        }
    }

    /// A page of the spans in use that have a block on a service, or of all for 0, with certificates for reading. A page may be
    /// empty and not the last one.
    pub async fn visit_spans(
        &self,
        service_id: u64,
        after: Bytes,
    ) -> Result<(Vec<Span>, Bytes), ClientError> {
        let slot = slot_of(&after);
        let op = Op::VisitSpans(VisitSpans { slot: u32::from(slot.0), after, service_id });
        match self.shard(op).await? {
            Reply::VisitSpans(page) => Ok((page.spans, page.next)),
            _ => Err(ClientError::unexpected("spans")),
        }
    }

    /// Lets a service read a block whole and compare it with what was written. The certificate is one for reading.
    pub async fn check_block(&self, block: &Block) -> Result<(), ClientError> {
        let op = blocks_request::Op::Check(CheckBlock { certificate: block.certificate.clone() });
        self.blocks(&block.address, block.service_id, op).await.map(drop)
    }

    /// Whether a block service answers: it is asked for what it must refuse.
    ///
    /// # Errors
    /// When nothing answers at its address, or not in time, or another node does.
    pub async fn ask_service(&self, address: &str, service: u64) -> Result<(), ClientError> {
        let op = blocks_request::Op::Check(CheckBlock::default());
        match self.blocks(address, service, op).await {
            Err(error) if error.code().is_none() || error.code() == Some(Code::WrongService) => Err(error),
            Ok(_) | Err(_) => Ok(()),
        }
    }

    /// A file's past contents, oldest first.
    pub async fn content_history(&self, file: InodeId) -> Result<Vec<PastContent>, ClientError> {
        let (mut all, mut after) = (Vec::new(), 0);
        loop {
            let op = Op::ContentHistory(ContentHistory { id: file.raw(), after });
            let Reply::ContentHistory(page) = self.shard(op).await? else {
                return Err(ClientError::unexpected("a history"));
            };
            all.extend(page.past);
            if page.next == 0 {
                return Ok(all);
            }
            after = page.next;
        }
    }

    /// Makes a past content the present one again; the present one becomes a past one.
    pub async fn restore_content(
        &self,
        past: &PastContent,
        expected_content: u64,
        dir: InodeId,
    ) -> Result<Attributes, ClientError> {
        file_id(past.file)?;
        let op = RestoreContent {
            id: past.file,
            content: past.content,
            expected_content,
            dir: dir.raw(),
            ended_at: past.ended_at,
        };
        attributes_of(self.shard(Op::RestoreContent(op)).await?)
    }

    /// Forgets a past content that a policy lets go.
    pub async fn forget_content(
        &self,
        past: &PastContent,
        policy: SnapshotPolicy,
    ) -> Result<(), ClientError> {
        file_id(past.file)?;
        let op = ForgetContent {
            id: past.file,
            content: past.content,
            policy: Some(policy),
            ended_at: past.ended_at,
        };
        self.shard(Op::ForgetContent(op)).await.map(drop)
    }

    /// Forgets a past edge that a policy lets go, and its file if the edge owns one. A file of another shard goes
    /// through the CDC.
    pub async fn forget_edge(
        &self,
        dir: InodeId,
        past: &PastEdge,
        policy: SnapshotPolicy,
    ) -> Result<(), ClientError> {
        let map = self.map().await?;
        let shard_of = |slot: Slot| {
            let slot = u32::from(slot.0);
            map.shards.iter().find(|s| (s.slot_first..=s.slot_last).contains(&slot)).map(|s| s.shard)
        };
        let target = InodeId::from_wire(past.target).ok_or_else(|| ClientError::unexpected("an inode id"))?;
        let (dir_raw, name) = (dir.raw(), past.name.clone());
        let (target_raw, ended_at, policy) = (past.target, past.ended_at, Some(policy));
        if past.owned && shard_of(target.slot()) != shard_of(dir.slot()) {
            let op = ForgetFile { dir: dir_raw, name, target: target_raw, ended_at, policy };
            return self.cdc(cdc_request::Op::ForgetFile(op)).await.map(drop);
        }
        let op = ForgetEdge { dir: dir_raw, name, target: target_raw, ended_at, policy };
        loop {
            // A file with a long history goes in parts.
            match self.shard(Op::ForgetEdge(op.clone())).await? {
                Reply::Remaining(Remaining { gone: false, .. }) => {}
                _ => return Ok(()),
            }
        }
    }

    /// Forgets a removed directory that holds nothing, not even a history, and that a policy lets go.
    pub async fn forget_directory(&self, dir: InodeId, policy: SnapshotPolicy) -> Result<(), ClientError> {
        let op = ForgetDirectory { target: dir.raw(), policy: Some(policy) };
        self.cdc(cdc_request::Op::ForgetDirectory(op)).await.map(drop)
    }

    /// Brings a removed directory back under a name that is free. What it held when it was removed is its history.
    pub async fn undelete_directory(
        &self,
        dir: InodeId,
        parent: InodeId,
        name: &Bytes,
    ) -> Result<Created, ClientError> {
        let op = UndeleteDirectory { target: dir.raw(), parent: parent.raw(), name: name.clone() };
        let reply = self.cdc(cdc_request::Op::UndeleteDirectory(op)).await?;
        Ok(Created { id: dir, created_at: reply.created_at })
    }

    /// Takes an expired content apart, whole. Returns the requests that it took.
    pub async fn collect_content(&self, content: ContentId) -> Result<u64, ClientError> {
        let mut requests = 0;
        loop {
            requests += 1;
            let op = Op::CollectContent(CollectContent { content: content.0 });
            match self.shard(op).await? {
                Reply::Remaining(Remaining { gone: true, .. }) => return Ok(requests),
                Reply::Remaining(_) => {}
                _ => return Err(ClientError::unexpected("what remains")),
            }
        }
    }

    /// Erases a dead span's blocks and forgets it. Refused as too early while writes of its blocks may still come.
    pub async fn remove_span(&self, span: &Span) -> Result<(), ClientError> {
        let map = self.map().await?;
        let flagged = |flag: u32| {
            let flagged = map.services.iter().filter(move |service| service.flags & flag != 0);
            flagged.map(|service| service.service_id).collect::<Vec<u64>>()
        };
        let (gone, suspects) = (flagged(FLAG_GONE), self.suspects());
        // Nothing can be asked of these for now, and asking would hold up all other spans.
        let (condemned, drained) = (flagged(FLAG_CONDEMNED), flagged(FLAG_DRAIN));
        let is_away = |service: &u64| {
            !gone.contains(service)
                && (condemned.contains(service) || drained.contains(service) && suspects.contains(service))
        };
        if let Some(block) = span.blocks.iter().find(|block| is_away(&block.service_id)) {
            let text = format!("the disk of service {:016x} is away", block.service_id);
            return Err(ClientError::Unreachable(text));
        }
        let erases = span.blocks.iter().map(|block| async {
            if gone.contains(&block.service_id) {
                return Ok(Bytes::new());
            }
            let op = blocks_request::Op::Erase(EraseBlock { certificate: block.certificate.clone() });
            let erased = self.blocks(&block.address, block.service_id, op).await;
            if erased.as_ref().is_err_and(|error| error.code().is_none())
                && drained.contains(&block.service_id)
            {
                self.suspect(block.service_id);
            }
            Ok(erased?.proof)
        });
        let proofs: Result<Vec<Bytes>, ClientError> =
            futures_util::future::join_all(erases).await.into_iter().collect();
        let op = RemoveSpan { span_id: span.span_id, proofs: proofs? };
        self.shard(Op::RemoveSpan(op)).await.map(drop)
    }

    /// Gives the bytes of a whole span another code or other places: the range is written anew and exchanged with what
    /// is there. The file's content stays the same content.
    pub async fn recode(
        &self,
        file: InodeId,
        content: ContentId,
        extent: &Extent,
        policy: &WritePolicy,
    ) -> Result<(), ClientError> {
        let Some(Source::Span(range)) = &extent.source else {
            return Err(Refusal::invalid("the extent has no blocks").into());
        };
        let (_, bytes) = self.read_range_of(file, content.0, extent.offset, extent.length as usize).await?;
        let mut draft = self.start_draft(file).await?;
        let exchanged = async {
            self.append(&mut draft, bytes, policy).await?;
            let new = last_span(&draft)?;
            let op = SwapSpans {
                content_a: content.0,
                offset_a: extent.offset,
                span_a: range.span_id,
                content_b: draft.content,
                offset_b: 0,
                span_b: new,
            };
            self.shard(Op::SwapSpans(op)).await.map(drop)
        };
        let exchanged = exchanged.await;
        // What was exchanged is in the draft now; if this fails, it expires.
        let _ = self.scrap(&draft).await;
        exchanged
    }

    /// Appends the last span of one draft to another: spans of one file can be written at the same time, each in a
    /// draft of its own, and put together in order.
    pub async fn append_span_of(&self, to: &mut Draft, from: &mut Draft) -> Result<(), ClientError> {
        if from.size() == 0 {
            return Ok(());
        }
        let span_id = last_span(from)?;
        let op = MoveSpan {
            from_content: from.content,
            from_cookie: from.cookie.clone(),
            content: to.content,
            cookie: to.cookie.clone(),
            span_id,
            offset: to.size(),
        };
        self.shard(Op::MoveSpan(op)).await?;
        let length = from.last_length;
        from.size -= length;
        to.size += length;
        to.last_span = span_id;
        to.last_length = length;
        (from.last_span, from.last_length) = (0, 0);
        Ok(())
    }
}

fn last_span(draft: &Draft) -> Result<u64, ClientError> {
    let none = || Refusal::new(Code::InvalidArgument, "the draft's last extent is not a span").into();
    draft.last_span().ok_or_else(none)
}

/// The slot at which a visit goes on.
fn slot_of(after: &[u8]) -> Slot {
    Slot(after.first().copied().unwrap_or(0))
}

fn file_id(raw: u64) -> Result<InodeId, ClientError> {
    InodeId::from_wire(raw).ok_or_else(|| ClientError::unexpected("an inode id"))
}
