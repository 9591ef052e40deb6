//! Writing files: inline, or spans whose blocks are written in parallel.
//!
//! A block that cannot be written makes the whole span be initiated again elsewhere, with what failed in the
//! request's list of services to avoid; the shard keeps the blocks of the first try in its index, so none leaks.

use std::{
    pin::pin,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use clutch_blocks::Codec;
use clutch_proto::{
    InodeId, Refusal,
    blocks::{WriteBlock, blocks_request},
    limits::{AVOID_MAX, INLINE_BYTES_MAX},
    shard::{CertifySpan, CreateFile, CreateInline, InitiateSpan, shard_reply::Reply, shard_request::Op},
    types::{Block, Code, Span},
};
use clutch_runtime::Held;
use futures_util::future::{Either, join_all, select};

use crate::{
    draft::Draft,
    error::ClientError,
    files::{Created, FileAttributes, created},
    policy::WritePolicy,
    rpc::{Client, lock},
    source::{ContentSource, read_onto, read_up_to},
    span::{Encoded, Never, with_parity},
};

/// Room behind a span's bytes for filling up its last cells.
const PADDING_BYTES: usize = 64 << 10;
/// What is read of a file before memory is waited for: most files are no longer.
const SMALL_BYTES: usize = 256 << 10;
/// Times a span is tried on other services.
const PLACEMENTS_MAX: usize = 6;
/// Pauses between further tries, as long as what failed may pass.
const PLACEMENT_PAUSE_MIN: Duration = Duration::from_millis(250);
const PLACEMENT_PAUSE_MAX: Duration = Duration::from_secs(4);
/// Services that cannot be reached are waited for so long before a span is written without them, with less parity. Who has just done
/// that does it again at once for as long as the second says.
const LESS_PARITY_AFTER: Duration = Duration::from_secs(3);
const LESS_PARITY_FOR: Duration = Duration::from_secs(30);
/// Failures that an error lists at most, besides the last ones.
const FAILURES_SHOWN: usize = 16;
/// Times a small file is given to a shard whose members are being asked whether they know of inline data.
const INLINE_ATTEMPTS_MAX: usize = 4;
/// Pause between them.
const INLINE_PAUSE: Duration = Duration::from_millis(20);
/// A shard that would not take one in a slot is not asked again for so long.
const INLINE_AGAIN: Duration = Duration::from_secs(10);
/// Times one block is tried on its service.
const BLOCK_ATTEMPTS_MAX: usize = 4;

impl Client {
    /// Stores a file: nothing of it is visible before all of it is durable.
    pub async fn write_file(
        &self,
        dir: InodeId,
        name: &Bytes,
        attributes: FileAttributes,
        replace: bool,
        source: &mut dyn ContentSource,
    ) -> Result<Created, ClientError> {
        let mut first = read_up_to(source, INLINE_BYTES_MAX + 1).await?;
        let FileAttributes { mode, uid, gid, mtime } = attributes;
        if first.len() <= INLINE_BYTES_MAX {
            let op = CreateFile {
                dir: dir.raw(),
                name: name.clone(),
                mode,
                uid,
                gid,
                mtime,
                data: first.into(),
                replace,
            };
            return created(self.shard(Op::CreateFile(op)).await?);
        }
        let policy = self.write_policy(dir).await?;
        if policy.inline_bytes > INLINE_BYTES_MAX && self.may_be_inline(dir) {
            read_onto(source, &mut first, policy.inline_bytes + 1).await?;
            // A hole takes less.
            if first.len() <= policy.inline_bytes && first.iter().any(|byte| *byte != 0) {
                match self.create_inline(dir, name, attributes, replace, first).await? {
                    Ok(made) => return Ok(made),
                    Err(bytes) => first = bytes,
                }
            }
        }
        let span_bytes = policy.span_bytes();
        let held = self.first_span(&policy, &mut first, source).await?;
        let mut draft = self.start_draft(dir).await?;
        let written = async {
            let mut is_last = first.len() < span_bytes;
            let mut prepared = self.prepare(first, &policy, held).await?;
            while !is_last {
                // The next span is read and encoded while this one is written.
                let next = async {
                    let held = self.memory_for(span_bytes as u32, &policy).await;
                    let mut chunk = Vec::with_capacity(room_for(span_bytes));
                    read_onto(source, &mut chunk, span_bytes).await?;
                    let is_last = chunk.len() < span_bytes;
                    Ok::<_, ClientError>((is_last, self.prepare(chunk, &policy, Some(held)).await?))
                };
                let (append, next) = (pin!(self.append_prepared(&mut draft, prepared)), pin!(next));
                (is_last, prepared) = match select(append, next).await {
                    Either::Left((appended, next)) => {
                        // What cannot be written is said at once, however slow the source is.
                        appended?;
                        next.await?
                    }
                    // Also when the source fails: what is under way is not left in the middle.
                    Either::Right((next, append)) => {
                        append.await?;
                        next?
                    }
                };
            }
            self.append_prepared(&mut draft, prepared).await?;
            self.link(draft.clone(), dir, name, attributes, replace).await
        };
        let written = written.await;
        self.give_up(&draft, &written).await;
        written
    }

    /// Whether a file in a directory can be inline data, as far as its shard has said of late.
    fn may_be_inline(&self, dir: InodeId) -> bool {
        let not_before = lock(&self.inner.inline_not_before).get(&dir.slot().0).copied();
        not_before.is_none_or(|at| self.inner.runtime.clock.monotonic() >= at)
    }

    /// Stores a small file in the metadata with one request; its bytes again when the shard does not take it there.
    async fn create_inline(
        &self,
        dir: InodeId,
        name: &Bytes,
        attributes: FileAttributes,
        replace: bool,
        data: Vec<u8>,
    ) -> Result<Result<Created, Vec<u8>>, ClientError> {
        let clock = &self.inner.runtime.clock;
        let FileAttributes { mode, uid, gid, mtime } = attributes;
        let (slot, name, data) = (dir.slot().0, name.clone(), Bytes::from(data));
        let op = CreateInline { dir: dir.raw(), name, mode, uid, gid, mtime, data, replace };
        for attempt in 1..=INLINE_ATTEMPTS_MAX {
            let error = match self.shard(Op::CreateInline(op.clone())).await {
                Ok(reply) => return created(reply).map(Ok),
                Err(error) => error,
            };
            match error.code() {
                // Its members are being asked; mostly all of them know.
                Some(Code::NotAgreed) if attempt < INLINE_ATTEMPTS_MAX => clock.sleep(INLINE_PAUSE).await,
                // Builds from before inline data do not know the request, and a shard takes so much of it at most.
                Some(
                    Code::NotAgreed | Code::Malformed | Code::Unsupported | Code::TooLarge | Code::NoSpace,
                ) => break,
                _ => return Err(error),
            }
        }
        self.inner.runtime.note("write: a small file is not taken as inline data");
        lock(&self.inner.inline_not_before).insert(slot, clock.monotonic() + INLINE_AGAIN);
        Ok(Err(op.data.into()))
    }

    /// Waits for memory and reads the rest of a file's first span, if it has one.
    async fn first_span(
        &self,
        policy: &WritePolicy,
        first: &mut Vec<u8>,
        source: &mut dyn ContentSource,
    ) -> Result<Option<Held>, ClientError> {
        let span_bytes = policy.span_bytes();
        // What is small is read at once; more only when there is memory for a whole span.
        read_onto(source, first, span_bytes.min(SMALL_BYTES)).await?;
        if first.len() < SMALL_BYTES {
            return Ok(None);
        }
        let held = self.memory_for(span_bytes as u32, policy).await;
        first.reserve_exact(room_for(span_bytes) - first.len());
        read_onto(source, first, span_bytes).await?;
        Ok(Some(held))
    }

    /// Initiates, writes the blocks and certifies; elsewhere again when a service fails.
    pub(crate) async fn write_span(
        &self,
        to: &Draft,
        offset: u64,
        encoded: &Encoded,
        storage_class: u32,
        never: &Never,
    ) -> Result<Span, ClientError> {
        let mut less: Option<Encoded> = None;
        // Patience is for the whole of it, however often it is tried.
        let clock = self.inner.runtime.clock.clone();
        let end = clock.monotonic().saturating_add(self.inner.options.patience);
        let mut trying = Trying { end, failed: Vec::new() };
        loop {
            let encoded = less.as_ref().unwrap_or(encoded);
            match self.write_span_as(to, offset, encoded, storage_class, never, &mut trying).await {
                // Disks are missing: bytes with less parity are better than none, as long as they have some.
                Err(error) if error.code() == Some(Code::NoSpace) && encoded.shape.parity_blocks > 1 => {
                    self.inner.runtime.note("write: a span gets less parity than its policy says");
                    let fewer = encoded.shape.parity_blocks - 1;
                    let codec = self.codec(encoded.shape.data_blocks, fewer)?;
                    let (shape, size, crc) = (encoded.shape, encoded.size, encoded.crc);
                    let blocks = encoded.blocks[..shape.data_blocks as usize].to_vec();
                    let work = self
                        .inner
                        .runtime
                        .blocking(move || with_parity(&codec, shape, fewer, size, crc, blocks));
                    let again =
                        work.await.ok_or_else(|| ClientError::Local("encoding did not finish".into()))?;
                    match again {
                        Ok(again) => less = Some(again),
                        Err(_) => return Err(error),
                    }
                }
                written => {
                    if written.is_ok() && less.is_some() {
                        self.inner.less_parity.fetch_add(1, Ordering::Relaxed);
                        *lock(&self.inner.less_parity_at) = Some(clock.monotonic());
                    }
                    return written;
                }
            }
        }
    }

    async fn write_span_as(
        &self,
        to: &Draft,
        offset: u64,
        encoded: &Encoded,
        storage_class: u32,
        never: &Never,
        trying: &mut Trying,
    ) -> Result<Span, ClientError> {
        let end = trying.end;
        let mut avoid = never.services.clone();
        add(&mut avoid, &self.suspects());
        // Those that failed a while ago for this span are no better for not being suspects any more.
        add(&mut avoid, &trying.failed);
        let mut failures: Vec<String> = Vec::new();
        let clock = self.inner.runtime.clock.clone();
        let (mut may_pass, mut pause) = (false, PLACEMENT_PAUSE_MIN);
        let began = clock.monotonic();
        for attempt in 0.. {
            if attempt > 0 && (clock.monotonic() >= end || attempt >= PLACEMENTS_MAX && !may_pass) {
                break;
            }
            if attempt > 0 {
                self.inner.runtime.note("write: a span is placed again");
            }
            // What hangs everywhere is waited for, but not by asking all the time.
            if attempt >= PLACEMENTS_MAX {
                clock.sleep(pause).await;
                pause = (pause * 2).min(PLACEMENT_PAUSE_MAX);
                avoid = never.services.clone();
            }
            let initiate = InitiateSpan {
                storage_class,
                avoid_services: avoid.clone(),
                avoid_failure_domains: never.domains.clone(),
                ..initiation(to, offset, encoded)
            };
            let avoids = avoid.len() > never.services.len();
            let lacks = |error: &ClientError| avoids && error.code() == Some(Code::NoSpace);
            let span = match self.shard(Op::InitiateSpan(initiate)).await {
                Ok(Reply::Span(span)) => span,
                Ok(_) => return Err(ClientError::unexpected("a span")),
                // Those that can be reached are too few for all of it, and the others have had their time.
                Err(error)
                    if lacks(&error) && encoded.shape.parity_blocks > 1 && self.had_their_time(began) =>
                {
                    return Err(error);
                }
                // Services that failed for somebody else are better than none, and what hangs may come back.
                Err(error) if lacks(&error) && (attempt < 2 || may_pass && clock.monotonic() < end) => {
                    self.inner.runtime.note("write: suspects are better than none");
                    if attempt >= 2 {
                        clock.sleep(pause).await;
                        pause = (pause * 2).min(PLACEMENT_PAUSE_MAX);
                    }
                    avoid = never.services.clone();
                    continue;
                }
                Err(ClientError::Refused(refusal) | ClientError::Declined(refusal))
                    if refusal.code == Code::NoSpace && !failures.is_empty() =>
                {
                    let text = format!("{}; writes failed: {}", refusal.detail, failures.join("; "));
                    return Err(Refusal::new(Code::NoSpace, text).into());
                }
                Err(error) => return Err(error),
            };
            match self.write_blocks(&span, encoded).await {
                Ok(proofs) => {
                    let op = CertifySpan {
                        content: to.content,
                        cookie: to.cookie.clone(),
                        span_id: span.span_id,
                        proofs,
                    };
                    self.shard(Op::CertifySpan(op)).await?;
                    return Ok(span);
                }
                Err(failed) => {
                    may_pass = failed.iter().all(|(_, error)| error.may_pass());
                    failures.truncate(FAILURES_SHOWN);
                    for (service, error) in failed {
                        self.suspect(service);
                        add(&mut avoid, &[service]);
                        add(&mut trying.failed, &[service]);
                        failures.push(format!("service {service:016x}: {error}"));
                    }
                }
            }
        }
        let text = format!("a span could not be written anywhere: {}", failures.join("; "));
        // What hangs has room, and less parity would not help.
        Err(if may_pass { ClientError::Unreachable(text) } else { Refusal::new(Code::NoSpace, text).into() })
    }

    /// Whether services that cannot be reached have been waited for long enough since `began`.
    fn had_their_time(&self, began: Duration) -> bool {
        let now = self.inner.runtime.clock.monotonic();
        let was_just_done = *lock(&self.inner.less_parity_at);
        now.saturating_sub(began) >= LESS_PARITY_AFTER
            || was_just_done.is_some_and(|at| now.saturating_sub(at) < LESS_PARITY_FOR)
    }

    /// Writes all blocks of a span at once; proofs in their order, or which services failed.
    async fn write_blocks(
        &self,
        span: &Span,
        encoded: &Encoded,
    ) -> Result<Vec<Bytes>, Vec<(u64, ClientError)>> {
        let writes = span
            .blocks
            .iter()
            .zip(&encoded.blocks)
            .map(|(block, data)| self.write_block(block, data.clone()));
        let mut proofs = Vec::new();
        let mut failed = Vec::new();
        for (block, written) in span.blocks.iter().zip(join_all(writes).await) {
            match written {
                Ok(proof) => proofs.push(proof),
                Err(error) => failed.push((block.service_id, error)),
            }
        }
        if failed.is_empty() { Ok(proofs) } else { Err(failed) }
    }

    /// Writes one block; what may pass is tried again, because writing the same block twice is the same as once.
    pub(crate) async fn write_block(&self, block: &Block, data: Bytes) -> Result<Bytes, ClientError> {
        let clock = &self.inner.runtime.clock;
        let (begin, patience) = (clock.monotonic(), self.inner.options.patience);
        let mut pause = Duration::from_millis(50);
        for _ in 1..BLOCK_ATTEMPTS_MAX {
            match self.write_block_once(block, data.clone()).await {
                Err(error) if error.may_pass() && clock.monotonic() - begin < patience => {
                    self.inner.runtime.note("write: a block is sent again");
                    self.inner.runtime.clock.sleep(pause).await;
                }
                decided => return decided,
            }
            pause *= 4;
        }
        self.write_block_once(block, data).await
    }

    async fn write_block_once(&self, block: &Block, data: Bytes) -> Result<Bytes, ClientError> {
        let op = blocks_request::Op::Write(WriteBlock { certificate: block.certificate.clone(), data });
        Ok(self.blocks(&block.address, block.service_id, op).await?.proof)
    }

    pub(crate) fn codec(&self, data_blocks: u32, parity_blocks: u32) -> Result<Arc<Codec>, ClientError> {
        let mut codecs = lock(&self.inner.codecs);
        if let Some(codec) = codecs.get(&(data_blocks, parity_blocks)) {
            return Ok(codec.clone());
        }
        let codec = Codec::new(data_blocks as usize, parity_blocks as usize)
            .map_err(|e| Refusal::invalid(e.to_string()))?;
        let codec = Arc::new(codec);
        codecs.insert((data_blocks, parity_blocks), codec.clone());
        Ok(codec)
    }
}

/// How far the writing of a span has come.
struct Trying {
    /// When it is given up.
    end: Duration,
    /// Services that have failed for it.
    failed: Vec<u64>,
}

/// Adds services, each once, as many as may be avoided.
fn add(to: &mut Vec<u64>, services: &[u64]) {
    for service in services {
        if !to.contains(service) && to.len() < AVOID_MAX {
            to.push(*service);
        }
    }
}

/// What a shard is told of a span that is to be written, anywhere.
fn initiation(to: &Draft, offset: u64, encoded: &Encoded) -> InitiateSpan {
    InitiateSpan {
        content: to.content,
        cookie: to.cookie.clone(),
        offset,
        size: encoded.size,
        crc: encoded.crc,
        shape: Some(encoded.shape),
        cell_crcs: encoded.cell_crcs.clone(),
        ..InitiateSpan::default()
    }
}

/// A large file uses all of a span's room; the rest is for the last stripe's padding.
fn room_for(span_bytes: usize) -> usize {
    span_bytes + span_bytes / 64 + PADDING_BYTES
}
