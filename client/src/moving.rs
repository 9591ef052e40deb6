//! Moving one block of a span to another service: for disks that fail, are emptied, or have lost it.

use std::collections::BTreeMap;

use clutch_proto::{
    ContentId, InodeId, Refusal,
    flags::{FLAG_GONE, FLAG_NO_WRITE},
    registry::Map,
    shard::{SwapBlocks, shard_request::Op},
    types::{Block, BlockService, Code, Span, SpanShape},
};

use crate::{
    draft::Draft,
    error::ClientError,
    rpc::Client,
    span::{Encoded, Never},
};

/// What a disk keeps free of what comes only because another one is away for now: a twentieth.
const KEPT_FREE: u64 = 20;

/// How a block is moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moving {
    /// Its service is not asked for it: it has lost it, or does not answer.
    pub is_lost: bool,
    /// Its service may get it again where no other can: it works, and has lost the block only.
    pub may_stay: bool,
    /// Its disk may come back, so it goes nowhere where the loss of a failure domain would lose more blocks than the span can, and
    /// fills no disk: else it would be better off as it is.
    pub is_for_now: bool,
}

/// Services that a request may name.
const NAMED_MAX: usize = 200;

/// What must not get a block so that it is as well off as it can be; `None` where nothing may. Suspects get it only where nobody else can.
fn never(map: &Map, span: &Span, index: usize, how: Moving, suspects: &[u64]) -> Option<Never> {
    let (block, shape) = (span.blocks.get(index)?, span.shape?);
    let of: BTreeMap<u64, &BlockService> = map.services.iter().map(|s| (s.service_id, s)).collect();
    let others = span.blocks.iter().enumerate().filter(|(i, _)| *i != index);
    let mut beside: BTreeMap<&str, usize> = BTreeMap::new();
    for service in others.clone().filter_map(|(_, other)| of.get(&other.service_id)) {
        *beside.entry(&service.failure_domain).or_default() += 1;
    }
    let count = |service: &BlockService| beside.get(&*service.failure_domain).copied().unwrap_or(0);
    let mut services: Vec<u64> = others.map(|(_, other)| other.service_id).collect();
    let takes = |service: &BlockService| {
        service.storage_class == span.storage_class && service.flags & (FLAG_NO_WRITE | FLAG_GONE) == 0
    };
    let has_room = |service: &BlockService| {
        let kept = if how.is_for_now { service.capacity_bytes / KEPT_FREE } else { 0 };
        service.available_bytes > u64::from(shape.block_bytes()) + kept
    };
    let fits = |service: &&BlockService| {
        takes(service) && has_room(service) && !services.contains(&service.service_id)
    };
    let elsewhere =
        || map.services.iter().filter(|service| service.service_id != block.service_id).filter(fits);
    let trusted = elsewhere().filter(|service| !suspects.contains(&service.service_id));
    let least = trusted.map(count).min().or_else(|| elsewhere().map(count).min());
    let parity = shape.parity_blocks as usize;
    let least = least.filter(|least| !how.is_for_now || *least < parity);
    // What is more than a domain may lose is worse than the place where the block was.
    let stays = of.get(&block.service_id).filter(|own| {
        how.may_stay && fits(own) && least.is_none_or(|least| least >= parity.max(1) && count(own) < least)
    });
    let most = match stays {
        Some(own) => count(own),
        None => least?,
    };
    let domains = beside.iter().filter(|(_, count)| **count > most).map(|(domain, _)| (*domain).to_owned());
    let domains = domains.collect();
    services.extend(stays.is_none().then_some(block.service_id));
    if how.is_for_now {
        let full = map.services.iter().filter(|service| takes(service) && !has_room(service));
        services
            .extend(full.map(|service| service.service_id).take(NAMED_MAX.saturating_sub(services.len())));
    }
    Some(Never { services, domains })
}

impl Client {
    /// Moves one block of a span, computing it from the others if it cannot be read. Readers notice nothing.
    /// `home` is a file or directory of the span's slot. Returns the block in its new place, and the content that has the old one now: it was
    /// given up, but its span counts as used until that is collected. `None` when the span is not used any more, or the block was moved by
    /// somebody else.
    ///
    /// # Errors
    /// `NoSpace`, before anything is read, when no disk may get it.
    pub async fn move_block(
        &self,
        home: InodeId,
        span: &Span,
        index: usize,
        how: Moving,
    ) -> Result<Option<(Block, ContentId)>, ClientError> {
        let block = span.blocks.get(index).ok_or_else(|| ClientError::unexpected("that block"))?;
        let shape = span.shape.ok_or_else(|| ClientError::unexpected("a shape"))?;
        let never = never(&*self.map().await?, span, index, how, &self.suspects()).ok_or_else(|| {
            let text = match how.is_for_now {
                true => "no disk can take it that leaves the span as safe as without it",
                false => "no disk with room has no block of the span",
            };
            Refusal::new(Code::NoSpace, text)
        })?;
        let data = self.read_block(span, index, how.is_lost).await?;
        let stripes = shape.stripes as usize;
        let scratch = SpanShape { data_blocks: 1, parity_blocks: 0, ..shape };
        let encoded = Encoded {
            shape: scratch,
            size: shape.block_bytes(),
            crc: block.crc,
            cell_crcs: span.cell_crcs[index * stripes..(index + 1) * stripes].to_vec(),
            blocks: vec![data],
        };
        let mut draft = self.start_draft(home).await?;
        let moved = self.exchange_block(&mut draft, span, block, &encoded, &never).await;
        if moved.is_err() {
            // If this fails, it expires.
            let _ = self.scrap(&draft).await;
        }
        moved.map(|block| block.map(|block| (block, ContentId(draft.content))))
    }

    async fn exchange_block(
        &self,
        draft: &mut Draft,
        span: &Span,
        block: &Block,
        encoded: &Encoded,
        never: &Never,
    ) -> Result<Option<Block>, ClientError> {
        let other = self.write_span(draft, 0, encoded, span.storage_class, never).await?;
        let new = other.blocks.first().ok_or_else(|| ClientError::unexpected("a block"))?;
        // Before the exchange: whoever ends behind it would else leave what holds the old block, which looks like what is in use and
        // can be read from nowhere else.
        self.scrap(draft).await?;
        let op = SwapBlocks {
            span_a: span.span_id,
            block_a: block.block_id,
            span_b: other.span_id,
            block_b: new.block_id,
        };
        match self.shard(Op::SwapBlocks(op)).await {
            Err(error) if matches!(error.code(), Some(Code::NotFound | Code::Stale)) => Ok(None),
            swapped => swapped.map(|_| Some(new.clone())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: u32 = 4096;

    /// Disks of these failure domains, numbered from 1, and a span of 2+2 on the first four.
    fn placed(domains: &[&str]) -> (Map, Span) {
        let service = |(n, domain): (usize, &&str)| BlockService {
            service_id: n as u64 + 1,
            failure_domain: (*domain).to_owned(),
            capacity_bytes: 1 << 30,
            available_bytes: 1 << 29,
            ..BlockService::default()
        };
        let services = domains.iter().enumerate().map(service).collect();
        let shape = SpanShape { data_blocks: 2, parity_blocks: 2, stripes: 1, cell_size: BYTES };
        let block = |n| Block { service_id: n, block_id: n, ..Block::default() };
        let blocks = (1..=4).map(block).collect();
        (Map { services, ..Map::default() }, Span { shape: Some(shape), blocks, ..Span::default() })
    }

    /// The disks that may get the first block; none where it is not moved.
    fn may_get(map: &Map, span: &Span, how: Moving) -> Vec<u64> {
        let Some(never) = never(map, span, 0, how, &[]) else { return Vec::new() };
        let may = |s: &&BlockService| {
            !never.services.contains(&s.service_id)
                && !never.domains.contains(&s.failure_domain)
                && s.flags & FLAG_NO_WRITE == 0
                && s.available_bytes > u64::from(BYTES)
        };
        map.services.iter().filter(may).map(|s| s.service_id).collect()
    }

    #[test]
    fn a_block_goes_where_fewest_of_its_span_are() {
        let (map, span) = placed(&["a", "b", "c", "d", "e", "b"]);
        assert_eq!(may_get(&map, &span, Moving::default()), [5]);
        let (mut map, span) = placed(&["a", "b", "b", "c", "b", "c", "a"]);
        assert_eq!(may_get(&map, &span, Moving::default()), [7]);
        map.services[6].flags = FLAG_NO_WRITE;
        assert_eq!(may_get(&map, &span, Moving::default()), [6], "one beside it, not two");
        map.services[5].available_bytes = u64::from(BYTES);
        assert_eq!(may_get(&map, &span, Moving::default()), [5]);
    }

    #[test]
    fn for_now_it_goes_nowhere_where_a_domain_could_take_more_than_the_span_can_lose() {
        let for_now = Moving { is_for_now: true, ..Moving::default() };
        let (mut map, span) = placed(&["a", "b", "b", "c", "b", "c"]);
        assert_eq!(may_get(&map, &span, for_now), [6]);
        map.services[5].available_bytes = map.services[5].capacity_bytes / KEPT_FREE;
        assert_eq!(may_get(&map, &span, for_now), [0_u64; 0], "two in b already");
        assert_eq!(may_get(&map, &span, Moving::default()), [6], "there is room for what stays");
    }

    #[test]
    fn a_block_that_a_working_disk_has_lost_may_come_back_there_where_nothing_else_can_take_it() {
        let (mut map, span) = placed(&["a", "b", "c", "d"]);
        let lost = Moving { is_lost: true, may_stay: true, is_for_now: false };
        assert_eq!(may_get(&map, &span, lost), [1]);
        assert_eq!(may_get(&map, &span, Moving::default()), [0_u64; 0]);
        map.services[0].flags = FLAG_NO_WRITE;
        assert_eq!(may_get(&map, &span, lost), [0_u64; 0]);
        // Three nodes with two blocks each, and disks to spare: nowhere may a third one lie.
        let (mut map, mut span) = placed(&["a", "a", "b", "b", "c", "c", "a", "b"]);
        span.blocks = (1..=6).map(|n| Block { service_id: n, block_id: n, ..Block::default() }).collect();
        span.blocks.swap(0, 4);
        assert_eq!(may_get(&map, &span, lost), [5]);
        assert_eq!(may_get(&map, &span, Moving::default()), [7, 8], "what must go goes");
        map.services[4].available_bytes = 0;
        assert_eq!(may_get(&map, &span, lost), [7, 8]);
    }

    #[test]
    fn who_is_suspected_does_not_keep_others_from_getting_it() {
        let (map, span) = placed(&["a", "b", "c", "d", "e", "b"]);
        let avoided = never(&map, &span, 0, Moving::default(), &[5]).expect("there is a place");
        assert!(!avoided.domains.contains(&"b".to_owned()), "{:?}", avoided.domains);
        let only = never(&map, &span, 0, Moving::default(), &[5, 6]).expect("there is a place");
        assert!(only.domains.contains(&"b".to_owned()), "{:?}", only.domains);
    }
}
