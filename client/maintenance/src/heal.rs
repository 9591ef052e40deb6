//! Says how redundant what is stored is, and gives spans back the redundancy that they were written with.
//!
//! A block is lost with a service that is gone or does not answer, or when its service says that it is missing or damaged. It
//! comes back on another service, computed from the others, and takes its place in the span by one entry of the shard's log.
//! What it takes the place of belongs to a span that nothing uses, and is erased with that. Whoever stops half-way leaves nothing
//! that the next pass does not find; any number may run at the same time.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::RangeInclusive,
    time::Duration,
};

use bytes::Bytes;
use clutch_client::{Client, ClientError};
use clutch_proto::{
    BlockId, InodeId, InodeKind, Slot, SpanId,
    mutants::{self, Mutant},
    registry::Map,
    types::{Code, Span},
};
use clutch_shard::{FLAG_DRAIN, FLAG_GONE};
use futures_util::stream::{self, StreamExt as _};

/// Failures that are told in words.
const FAILURES_MAX: usize = 100;

/// How a pass goes.
#[derive(Clone, Copy, Debug)]
pub struct HealOptions {
    /// Lets the services read every block and compare it with what was written.
    pub check: bool,
    /// Moves what is lost to services that have it not.
    pub repair: bool,
    /// Spans that are checked or repaired at a time.
    pub concurrency: usize,
    /// Bytes of blocks that are written in a second at most, so that users come first; 0 for no limit.
    pub bytes_per_s: u64,
    /// Of each span only what is on this service is checked; 0 for all.
    pub only: u64,
}

/// A part of the slots.
pub type Slots = RangeInclusive<u8>;

/// All slots, in parts from the last to the first: whoever else moves the same goes the other way.
pub fn all_slots_backwards() -> Vec<Slots> {
    (0..16).rev().map(|part| part * 16..=part * 16 + 15).collect()
}

impl Default for HealOptions {
    fn default() -> HealOptions {
        HealOptions { check: false, repair: false, concurrency: 4, bytes_per_s: 0, only: 0 }
    }
}

/// What a service holds of spans in use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Load {
    /// Blocks.
    pub blocks: u64,
    /// Their bytes, without headers and checksums.
    pub bytes: u64,
}

/// What a pass found and did. Numbers of redundancy are of the spans as they were met.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Healed {
    /// Spans of which all blocks are there.
    pub full: u64,
    /// Spans that lack some, and can lose another.
    pub reduced: u64,
    /// Spans that can be read, and could not if they lost another.
    pub none: u64,
    /// Spans that lack more blocks than they can.
    pub unreadable: u64,
    /// Bytes of users in the spans.
    pub logical_bytes: u64,
    /// Bytes of their blocks as they are stored, without the zeros that small ones end with, headers and checksums.
    pub physical_bytes: u64,
    /// Blocks that their services were asked for, and had as they were written.
    pub checked: u64,
    /// Blocks that were missing or damaged where they should have been.
    pub damaged: u64,
    /// Those of them that were missing.
    pub missing: u64,
    /// Blocks that were written elsewhere.
    pub moved: u64,
    /// Bytes of those.
    pub moved_bytes: u64,
    /// Where services are emptied: spans that are still to be moved.
    #[serde(skip)]
    pub spans_left: u64,
    /// And the bytes of their blocks there.
    #[serde(skip)]
    pub bytes_left: u64,
    /// What each service holds.
    #[serde(skip)]
    pub services: BTreeMap<u64, Load>,
    /// What is not as it should be, or could not be done, a sentence each, as far as a hundred.
    pub failures: Vec<String>,
}

impl Healed {
    /// Spans that were looked at.
    pub fn spans(&self) -> u64 {
        self.full + self.reduced + self.none + self.unreadable
    }

    /// Whether all blocks of all spans are there.
    pub fn is_whole(&self) -> bool {
        self.reduced + self.none + self.unreadable == 0
    }

    fn fail(&mut self, text: String) {
        if self.failures.len() < FAILURES_MAX {
            self.failures.push(text);
        }
    }

    /// Counts a span; returns the bytes of each of its blocks.
    fn count(&mut self, span: &Span, lost: usize) -> u64 {
        let Some(shape) = span.shape else {
            self.unreadable += 1;
            self.fail(format!("span {:x} has no shape", span.span_id));
            return 0;
        };
        let parity = shape.parity_blocks as usize;
        match lost {
            0 => self.full += 1,
            lost if lost < parity => self.reduced += 1,
            lost if lost == parity => self.none += 1,
            _ => self.unreadable += 1,
        }
        let bytes = u64::from(shape.block_bytes());
        self.logical_bytes += u64::from(span.size);
        self.physical_bytes += shape.stored_bytes(span.size);
        for block in &span.blocks {
            let load = self.services.entry(block.service_id).or_default();
            load.blocks += 1;
            load.bytes += bytes;
        }
        bytes
    }
}

/// Services whose blocks are to be elsewhere: those that are gone, and those that are to be emptied.
pub fn to_be_emptied(map: &Map) -> BTreeSet<u64> {
    let flagged = map.services.iter().filter(|service| service.flags & (FLAG_GONE | FLAG_DRAIN) != 0);
    flagged.map(|service| service.service_id).collect()
}

/// Looks at all spans once. `lost` are the services whose blocks do not count.
///
/// # Errors
/// When a shard does not answer. What cannot be done with one span is in [`Healed::failures`].
pub async fn pass(
    client: &Client,
    lost: &BTreeSet<u64>,
    options: HealOptions,
    progress: &mut (dyn FnMut(&Healed) + Send),
) -> Result<Healed, ClientError> {
    let mut pass = Pass::new(client, lost, options);
    pass.walk(0, &(0..=u8::MAX), 1, progress).await?;
    Ok(pass.healed)
}

/// A page of the spans that have a block on a service: has it read each of these, and writes elsewhere what is missing or damaged, if
/// that is asked for. Also where the next page begins; empty behind the last.
///
/// # Errors
/// When a shard does not answer. What cannot be done with one span is in [`Healed::failures`].
pub async fn scrub_page(
    client: &Client,
    service: u64,
    after: Bytes,
    options: HealOptions,
) -> Result<(Healed, Bytes), ClientError> {
    let none = BTreeSet::new();
    let options = HealOptions { check: true, only: service, ..options };
    let mut pass = Pass::new(client, &none, options);
    let (page, next) = client.visit_spans(service, after).await?;
    pass.look_at_all(page, &mut |_| {}).await?;
    Ok((pass.healed, next))
}

/// Has a service look at a block by which it was told that it is not there as it was written. Written elsewhere where that is so, and the
/// block is in use.
///
/// # Errors
/// When a shard does not answer. What cannot be done is in [`Healed::failures`].
pub async fn repair_block(
    client: &Client,
    service: u64,
    block: BlockId,
    options: HealOptions,
) -> Result<Healed, ClientError> {
    let none = BTreeSet::new();
    let options = HealOptions { check: true, repair: true, only: service, ..options };
    let mut pass = Pass::new(client, &none, options);
    // The index of blocks is in the order of slot, service and block.
    let before = [&[block.slot().0][..], &service.to_be_bytes(), &block.0.saturating_sub(1).to_be_bytes()];
    let (page, _) = client.visit_spans(service, before.concat().into()).await?;
    let has_it = |span: &Span| span.blocks.iter().any(|b| (b.service_id, b.block_id) == (service, block.0));
    let span = page.into_iter().find(has_it);
    pass.look_at_all(span.into_iter().collect(), &mut |_| {}).await?;
    Ok(pass.healed)
}

/// The same of the spans of a file, or of all files of a directory and below.
///
/// # Errors
/// As [`pass`].
pub async fn pass_of(
    client: &Client,
    top: InodeId,
    lost: &BTreeSet<u64>,
    options: HealOptions,
    progress: &mut (dyn FnMut(&Healed) + Send),
) -> Result<Healed, ClientError> {
    let mut pass = Pass::new(client, lost, options);
    pass.tree(top, progress).await?;
    Ok(pass.healed)
}

/// Services that cannot be used at the moment, and why; without those that are gone.
pub async fn unavailable(client: &Client, map: &Map) -> BTreeMap<u64, String> {
    let asked = map.services.iter().filter(|service| service.flags & FLAG_GONE == 0).map(|service| async {
        let why = match client.ask_service(&service.address, service.service_id).await {
            Err(error) => Some(error.to_string()),
            Ok(()) if service.capacity_bytes == 0 => Some("its node cannot use the disk".to_owned()),
            Ok(()) => None,
        };
        Some((service.service_id, why?))
    });
    futures_util::future::join_all(asked).await.into_iter().flatten().collect()
}

/// Empties services: moves what they hold of these slots until a look finds nothing there any more, spans that have lost most
/// first. What was found at last is returned, with everything that was moved. Ends early when a
/// look finds as much as the one before it.
///
/// # Errors
/// When a shard does not answer.
pub async fn empty(
    client: &Client,
    services: &BTreeSet<u64>,
    slots: &[Slots],
    options: HealOptions,
    progress: &mut (dyn FnMut(&Healed) + Send),
) -> Result<Healed, ClientError> {
    let begun = client.runtime().clock.monotonic();
    let (mut moved, mut moved_bytes) = (0, 0);
    let (mut left, mut failures) = (u64::MAX, Vec::new());
    loop {
        let looking = HealOptions { repair: false, check: false, ..options };
        let mut look = Pass::new(client, services, looking);
        for (slots, service) in each(slots, services) {
            look.walk(service, slots, 1, &mut |_| {}).await?;
        }
        let most = look.most_lost;
        look.healed.moved = moved;
        look.healed.moved_bytes = moved_bytes;
        look.healed.spans_left = look.healed.spans();
        look.healed.bytes_left = look.lost_bytes;
        progress(&look.healed);
        if most == 0 {
            return Ok(look.healed);
        }
        if look.healed.spans() >= left {
            look.healed.failures = failures;
            return Ok(look.healed);
        }
        left = look.healed.spans();
        let mut pass = Pass::new(client, services, HealOptions { repair: true, ..options });
        (pass.healed.moved, pass.healed.moved_bytes) = (moved, moved_bytes);
        (pass.healed.spans_left, pass.healed.bytes_left) = (look.healed.spans_left, look.healed.bytes_left);
        pass.begun = begun;
        for least in (1..=most).rev() {
            for (slots, service) in each(slots, services) {
                pass.walk(service, slots, least, progress).await?;
            }
        }
        (moved, moved_bytes, failures) = (pass.healed.moved, pass.healed.moved_bytes, pass.healed.failures);
    }
}

fn each<'a>(slots: &'a [Slots], services: &'a BTreeSet<u64>) -> impl Iterator<Item = (&'a Slots, u64)> {
    slots.iter().flat_map(move |slots| services.iter().map(move |service| (slots, *service)))
}

struct Pass<'a> {
    client: &'a Client,
    lost: &'a BTreeSet<u64>,
    options: HealOptions,
    healed: Healed,
    /// The most blocks that a span has lost.
    most_lost: usize,
    /// Bytes of blocks that are lost.
    lost_bytes: u64,
    /// A file or directory of each slot: what is written for a span is written for it.
    homes: BTreeMap<u8, Option<InodeId>>,
    begun: Duration,
}

/// What has become of a span.
struct Looked {
    span: Span,
    lost: Vec<usize>,
    checked: u64,
    missing: u64,
    damaged: u64,
    moved: u64,
    failures: Vec<String>,
}

impl<'a> Pass<'a> {
    fn new(client: &'a Client, lost: &'a BTreeSet<u64>, options: HealOptions) -> Pass<'a> {
        let begun = client.runtime().clock.monotonic();
        let (healed, homes) = (Healed::default(), BTreeMap::new());
        Pass { client, lost, options, healed, most_lost: 0, lost_bytes: 0, homes, begun }
    }

    /// The spans of a service, or all, of these slots that have lost at least so many blocks.
    async fn walk(
        &mut self,
        service: u64,
        slots: &Slots,
        least: usize,
        progress: &mut (dyn FnMut(&Healed) + Send),
    ) -> Result<(), ClientError> {
        let mut after = Bytes::copy_from_slice(&[*slots.start()]);
        loop {
            let (page, next) = self.client.visit_spans(service, after).await?;
            let mut work = Vec::new();
            for span in page.into_iter().filter(|span| slots.contains(&SpanId(span.span_id).slot().0)) {
                let lost = self.lost_of(&span);
                // A span that is held by several of these services is met with each.
                let is_first =
                    service == 0 || lost.first().is_some_and(|i| span.blocks[*i].service_id == service);
                if !is_first || service != 0 && lost.len() < least {
                    continue;
                }
                let home =
                    if self.options.repair { self.home(SpanId(span.span_id).slot()).await? } else { None };
                work.push((span, lost, home));
            }
            self.look(work, progress).await;
            if next.first().is_none_or(|slot| slot > slots.end()) {
                return Ok(());
            }
            after = next;
        }
    }

    /// These spans, whatever they have lost.
    async fn look_at_all(
        &mut self,
        spans: Vec<Span>,
        progress: &mut (dyn FnMut(&Healed) + Send),
    ) -> Result<(), ClientError> {
        let mut work = Vec::new();
        for span in spans {
            let home = self.home(SpanId(span.span_id).slot()).await?;
            work.push((span, Vec::new(), home));
        }
        self.look(work, progress).await;
        Ok(())
    }

    /// The spans of a file, or of all files of a directory and below.
    async fn tree(
        &mut self,
        top: InodeId,
        progress: &mut (dyn FnMut(&Healed) + Send),
    ) -> Result<(), ClientError> {
        let mut queue = vec![top];
        let mut seen = BTreeSet::new();
        while let Some(id) = queue.pop() {
            if id.is_directory() {
                let entries = self.client.read_dir(id).await?;
                queue.extend(entries.iter().filter_map(|entry| InodeId::from_wire(entry.target)));
                continue;
            }
            if id.kind() == InodeKind::Symlink {
                continue;
            }
            let (mut offset, mut content) = (0, 0);
            loop {
                let page = self.client.layout(id, content, offset).await?;
                let new = page.spans.into_iter().filter(|span| seen.insert(span.span_id));
                let work =
                    new.map(|span| (self.lost_of(&span), span)).map(|(lost, span)| (span, lost, Some(id)));
                let work = work.collect();
                self.look(work, progress).await;
                if page.next_offset == 0 {
                    break;
                }
                (offset, content) = (page.next_offset, page.content);
            }
        }
        Ok(())
    }

    async fn look(
        &mut self,
        work: Vec<(Span, Vec<usize>, Option<InodeId>)>,
        progress: &mut (dyn FnMut(&Healed) + Send),
    ) {
        let (client, options) = (self.client, self.options);
        let mut looks = stream::iter(work)
            .map(|(span, lost, home)| look_at(client, options, span, lost, home))
            .buffer_unordered(options.concurrency.max(1));
        while let Some(looked) = looks.next().await {
            self.take(looked);
            self.rest().await;
            progress(&self.healed);
        }
    }

    /// Blocks of a span that are on services that count as lost, by their places.
    fn lost_of(&self, span: &Span) -> Vec<usize> {
        let blocks = span.blocks.iter().enumerate();
        blocks.filter(|(_, block)| self.lost.contains(&block.service_id)).map(|(i, _)| i).collect()
    }

    async fn home(&mut self, slot: Slot) -> Result<Option<InodeId>, ClientError> {
        if let Some(home) = self.homes.get(&slot.0) {
            return Ok(*home);
        }
        let mut home = None;
        // Directories outlive files.
        for kind in [1, 2] {
            let (page, _) = self.client.visit_inodes(kind, Bytes::copy_from_slice(&[slot.0])).await?;
            let first = page.first().and_then(|inode| InodeId::from_wire(inode.id));
            home = home.or(first.filter(|id| id.slot() == slot));
        }
        self.homes.insert(slot.0, home);
        Ok(home)
    }

    fn take(&mut self, looked: Looked) {
        let Looked { span, lost, checked, missing, damaged, moved, failures } = looked;
        self.healed.missing += missing;
        self.most_lost = self.most_lost.max(lost.len());
        let bytes = self.healed.count(&span, lost.len());
        self.healed.checked += checked;
        self.healed.damaged += damaged;
        self.healed.moved += moved;
        self.healed.moved_bytes += moved * bytes;
        self.lost_bytes += bytes * lost.len() as u64;
        self.healed.spans_left = self.healed.spans_left.saturating_sub(u64::from(moved > 0));
        self.healed.bytes_left = self.healed.bytes_left.saturating_sub(moved * bytes);
        failures.into_iter().for_each(|failure| self.healed.fail(failure));
    }

    /// Waits until no more has been written than may have been by now.
    async fn rest(&self) {
        let Some(seconds) = self.healed.moved_bytes.checked_div(self.options.bytes_per_s) else { return };
        let clock = &self.client.runtime().clock;
        let due = self.begun + Duration::from_secs(seconds);
        let now = clock.monotonic();
        if now < due {
            clock.sleep(due - now).await;
        }
    }
}

async fn look_at(
    client: &Client,
    options: HealOptions,
    mut span: Span,
    mut lost: Vec<usize>,
    home: Option<InodeId>,
) -> Looked {
    let (mut checked, mut missing, mut damaged, mut moved, mut failures) = (0, 0, 0, 0, Vec::new());
    // What can be repaired: a service that does not answer may come back with all that it has.
    let mut repairable = lost.clone();
    if options.check {
        for (index, block) in span.blocks.iter().enumerate() {
            if lost.contains(&index) || options.only != 0 && block.service_id != options.only {
                continue;
            }
            match client.check_block(block).await {
                Ok(()) => checked += 1,
                Err(error) => {
                    let is_missing = error.code() == Some(Code::BlockNotFound);
                    // A disk that cannot give this block, and answers, has lost it.
                    let is_bad = is_missing && !mutants::is(Mutant::MissingNotRepaired)
                        || matches!(error.code(), Some(Code::BlockCorrupt | Code::DiskFault));
                    missing += u64::from(is_missing);
                    if is_bad {
                        damaged += 1;
                        repairable.push(index);
                    }
                    lost.push(index);
                    let (id, service) = (block.block_id, block.service_id);
                    failures.push(format!("block {id:x} on service {service:016x}: {error}"));
                }
            }
        }
    }
    let to_move = if options.repair { repairable } else { Vec::new() };
    for index in to_move {
        let Some(home) = home else {
            failures
                .push(format!("span {:x} belongs to no file any more; it will be collected", span.span_id));
            break;
        };
        let (id, service) = (span.blocks[index].block_id, span.blocks[index].service_id);
        match client.move_block(home, &span, index).await {
            Ok((block, scratch)) => {
                // Else the old block would be met again as one that is in use; if this fails, it expires.
                let _ = client.collect_content(scratch).await;
                client.runtime().note("heal: a block is somewhere else");
                // Its next one goes to yet another service.
                span.blocks[index] = block;
                moved += 1;
            }
            // Somebody else was first, or it is used no more: the next look says.
            Err(error) if matches!(error.code(), Some(Code::NotFound | Code::Stale)) => {
                client.runtime().note("heal: a span has changed");
            }
            Err(error) => failures.push(format!("move block {id:x} from service {service:016x}: {error}")),
        }
    }
    Looked { span, lost, checked, missing, damaged, moved, failures }
}
