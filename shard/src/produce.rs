//! From request to entry: everything that is not deterministic is decided here.

use bytes::Bytes;
use clutch_proto::{
    ContentId, Refusal, SpanId, Time,
    limits::{
        AVOID_MAX, CERTIFICATE_LIFETIME_MS, EXTENTS_PER_ENTRY_MAX, INLINE_OF_SHARD_BYTES_MAX,
        TRANSIENT_LIFETIME_MS,
    },
    operation::{self, Class},
    rules::v1::INLINE_PER_ENTRY_BYTES_MAX,
    shard::{
        CertifySpan, CertifySpanEntry, ContentRow, ExtentRow, InitiateSpan, InitiateSpanEntry, RemoveSpan,
        RemoveSpanEntry, ShardEntry, ShardRequest, ShareRange, StartContentEntry, extent_row::Source,
        shard_entry::Body, shard_request::Op,
    },
    types::{BlockService, ClientTag, Code, Span},
};
use clutch_state::{ProduceContext, Stop, View, client_table::SYSTEM_CLIENTS, get_row, store::decode_row};

use crate::{
    content, extent,
    facts::ShardFacts,
    inline,
    placement::{self, FLAG_GONE},
    policy,
    rows::check_slot,
    tables,
};

pub(crate) fn produce(
    mut view: &dyn View,
    request: ShardRequest,
    tag: Option<ClientTag>,
    context: &mut ProduceContext<'_>,
    facts: &ShardFacts,
) -> Result<ShardEntry, Stop> {
    let op = request.op.ok_or_else(|| Refusal::malformed("a request without an operation"))?;
    let (home, class) = operation::of_shard(&op);
    let from_cdc = tag.as_ref().is_some_and(|t| t.client < SYSTEM_CLIENTS);
    match class {
        Class::Read => return Err(Refusal::malformed("a read is not logged").into()),
        Class::Step if !from_cdc => {
            return Err(Stop::refuse(
                Code::Permission,
                "directories are made, moved and removed through the CDC",
            ));
        }
        Class::Step | Class::Change | Class::Release => {}
    }
    // Refused here and not only in apply, so that nobody can fill the log with what cannot work.
    check_slot(&mut view, home.check()?)?;
    let body = match op {
        Op::StartContent(op) => {
            let mut cookie = Vec::with_capacity(16);
            cookie.extend_from_slice(&(context.random)().to_le_bytes());
            cookie.extend_from_slice(&(context.random)().to_le_bytes());
            // 0 stands for the default: it need not be in the log.
            let lifetime_ms = Some(facts.lifetimes.transient_ms).filter(|ms| *ms != TRANSIENT_LIFETIME_MS);
            let lifetime_ms = lifetime_ms.unwrap_or(0);
            Body::StartContent(StartContentEntry { op: Some(op), cookie: cookie.into(), lifetime_ms })
        }
        Op::RemoveSpan(op) => Body::RemoveSpan(remove(view, op, facts)?),
        Op::InitiateSpan(op) => Body::InitiateSpan(initiate(view, op, context, facts)?),
        Op::CertifySpan(op) => Body::CertifySpan(certify(view, op, context.now, facts)?),
        op => {
            if let Op::SetPolicy(op) = &op {
                policy::check_parts(op)?;
            }
            if let Op::CreateInline(op) = &op {
                content::check_inline(op.data.len())?;
                check_room_for_inline(view, op.data.len() as u64)?;
            }
            if let Op::ShareRange(op) = &op {
                check_room_for_range(view, op)?;
            }
            op.into()
        }
    };
    Ok(ShardEntry { tag, body: Some(body) })
}

/// Refuses inline data that is too much together with what the shard has: files lie on block services then.
fn check_room_for_inline(view: &dyn View, bytes: u64) -> Result<(), Stop> {
    if inline::bytes(view)?.saturating_add(bytes) <= INLINE_OF_SHARD_BYTES_MAX {
        return Ok(());
    }
    let text = format!("the shard has {INLINE_OF_SHARD_BYTES_MAX} bytes of inline data and takes no more");
    Err(Stop::refuse(Code::NoSpace, text))
}

/// The same for a range that is shared: what lies in the metadata of it is copied.
fn check_room_for_range(view: &dyn View, op: &ShareRange) -> Result<(), Stop> {
    let most = op.length.min(INLINE_PER_ENTRY_BYTES_MAX);
    let Err(refused) = check_room_for_inline(view, most) else { return Ok(()) };
    let (from, end) = (ContentId(op.from_content), op.from_offset.saturating_add(op.length));
    let mut rows = view;
    let first = extent::start_of(&mut rows, from, op.from_offset)?;
    let (begin, until) = (tables::extent_key(from, first), tables::extent_key(from, end));
    for (key, value) in view.scan(tables::EXTENT, &begin, &until, EXTENTS_PER_ENTRY_MAX)? {
        let extent: ExtentRow = decode_row(tables::EXTENT, &key, value)?;
        if matches!(extent.source, Some(Source::Apart(_))) {
            return Err(refused);
        }
    }
    Ok(())
}

fn initiate(
    mut view: &dyn View,
    op: InitiateSpan,
    context: &mut ProduceContext<'_>,
    facts: &ShardFacts,
) -> Result<InitiateSpanEntry, Stop> {
    // Refused here and not only in apply, so that nobody can fill the log with what cannot work.
    let row = content::transient(&mut view, context.now, ContentId(op.content), &op.cookie)?;
    let shape = op.shape.ok_or_else(|| Refusal::malformed("a span without a shape"))?;
    shape.check(op.size)?;
    shape.check_crcs(op.size, op.crc, &op.cell_crcs)?;
    if op.avoid_services.len() > AVOID_MAX || op.avoid_failure_domains.len() > AVOID_MAX {
        return Err(Stop::refuse(
            Code::TooLarge,
            format!("at most {AVOID_MAX} services or domains can be avoided"),
        ));
    }
    let blocks = shape.blocks() as usize;
    let earlier = earlier_services(view, &op, &row)?;
    let services =
        placement::place(&facts.services, &op, blocks, shape.block_bytes(), &earlier, context.random)?;
    // What was to be avoided has done its work and need not be in the log.
    let op = InitiateSpan { avoid_services: Vec::new(), avoid_failure_domains: Vec::new(), ..op };
    let grant_ms = Some(facts.lifetimes.grant_ms).filter(|ms| *ms < CERTIFICATE_LIFETIME_MS).unwrap_or(0);
    Ok(InitiateSpanEntry { op: Some(op), services, grant_ms })
}

/// The services of the span before: a file that is lost with any few disks is lost with the same few.
fn earlier_services(mut view: &dyn View, op: &InitiateSpan, row: &ContentRow) -> Result<Vec<u64>, Stop> {
    let last = crate::extent::last_extent(&mut view, ContentId(op.content), row.size)?;
    let Some((_, ExtentRow { source: Some(Source::Span(range)), .. })) = last else {
        return Ok(Vec::new());
    };
    let span: Option<Span> = get_row(view, tables::SPAN, &tables::span_key(SpanId(range.span_id)))?;
    Ok(span.map_or_else(Vec::new, |s| s.blocks.iter().map(|b| b.service_id).collect()))
}

/// Checks the proofs that a dead span's blocks are erased.
fn remove(view: &dyn View, op: RemoveSpan, facts: &ShardFacts) -> Result<RemoveSpanEntry, Stop> {
    let mut rows = view;
    check_slot(&mut rows, SpanId(op.span_id).slot())?;
    let span: Span = get_row(view, tables::SPAN, &tables::span_key(SpanId(op.span_id)))?
        .ok_or_else(|| Stop::refuse(Code::NotFound, format!("span {:x} does not exist", op.span_id)))?;
    if op.proofs.len() != span.blocks.len() {
        let text = format!("{} proofs for {} blocks", op.proofs.len(), span.blocks.len());
        return Err(Stop::refuse(Code::InvalidArgument, text));
    }
    let mut first_bad = 0;
    for (i, (proof, block)) in op.proofs.iter().zip(&span.blocks).enumerate() {
        let service: Option<BlockService> = get_row(view, tables::SERVICE, &block.service_id.to_be_bytes())?;
        let is_gone = service.is_some_and(|s| s.flags & FLAG_GONE != 0);
        let is_proven = facts.proves_erased(proof, block) || is_gone && proof.is_empty();
        if !is_proven {
            first_bad = i as u32 + 1;
            break;
        }
    }
    let op = RemoveSpan { proofs: Vec::new(), ..op };
    Ok(RemoveSpanEntry { op: Some(op), first_bad })
}

fn certify(
    mut view: &dyn View,
    op: CertifySpan,
    now: Time,
    facts: &ShardFacts,
) -> Result<CertifySpanEntry, Stop> {
    content::transient(&mut view, now, ContentId(op.content), &op.cookie)?;
    let span: Span = get_row(view, tables::SPAN, &tables::span_key(SpanId(op.span_id)))?
        .ok_or_else(|| Stop::refuse(Code::NotFound, format!("span {:x} does not exist", op.span_id)))?;
    if op.proofs.len() != span.blocks.len() {
        let text = format!("{} proofs for {} blocks", op.proofs.len(), span.blocks.len());
        return Err(Stop::refuse(Code::InvalidArgument, text));
    }
    let size = span.shape.map_or(0, |s| s.block_bytes());
    let bad = op
        .proofs
        .iter()
        .zip(&span.blocks)
        .position(|(proof, block)| !facts.proves_written(proof, block, size));
    let first_bad = bad.map_or(0, |i| i as u32 + 1);
    // The verdict is what counts from here on.
    let op = CertifySpan { proofs: Vec::<Bytes>::new(), ..op };
    Ok(CertifySpanEntry { op: Some(op), first_bad })
}
