//! Says how redundant what is stored is, and gives spans back the redundancy that they were written with.
//!
//! A block is lost with a service that is gone or does not answer, or when its service says that it is missing or damaged. It
//! comes back on another service, computed from the others, and takes its place in the span by one entry of the shard's log.
//! What it takes the place of belongs to a span that nothing uses, and is erased with that. Whoever stops half-way leaves nothing
//! that the next pass does not find; any number may run at the same time.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::RangeInclusive,
    sync::Mutex,
    time::Duration,
};

use bytes::Bytes;
use clutch_client::{Client, ClientError, Moving};
use clutch_proto::{
    BlockId, InodeId, InodeKind, Slot, SpanId,
    mutants::{self, Mutant},
    registry::Map,
    types::{Block, Code, Span},
};
use clutch_shard::{FLAG_CONDEMNED, FLAG_DRAIN, FLAG_GONE};
use futures_util::stream::{self, StreamExt as _};

/// Failures that are told in words.
const FAILURES_MAX: usize = 100;
/// A block that a disk fails to give is asked for again after this.
const ASK_AGAIN: Duration = Duration::from_secs(3);

/// How a pass goes.
#[derive(Clone, Copy, Debug)]
pub struct HealOptions {
    /// Lets the services read every block and compare it with what was written.
    pub check: bool,
    /// Moves what is lost to services that have it not.
    pub repair: bool,
    /// Spans that are checked or repaired at a time.
    pub concurrency: usize,
    /// Of each span only what is on this service is checked; 0 for all.
    pub only: u64,
}

impl Default for HealOptions {
    fn default() -> HealOptions {
        HealOptions { check: false, repair: false, concurrency: 4, only: 0 }
    }
}

/// Services whose blocks count as lost.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lost {
    /// What these have is to be elsewhere.
    pub emptied: BTreeSet<u64>,
    /// These do not answer: they may come back with all that they have, so it stays where it is.
    pub away: BTreeSet<u64>,
}

impl Lost {
    fn has(&self, service: u64) -> bool {
        self.emptied.contains(&service) || self.away.contains(&service)
    }
}

/// What may be written in a second, by all who share it, so that users come first. What was not written is not made up for.
#[derive(Debug)]
pub struct Pace {
    bytes_per_s: u64,
    free_at: Mutex<Duration>,
}

impl Pace {
    /// So many bytes; 0 for no limit.
    pub fn of(bytes_per_s: u64) -> Pace {
        Pace { bytes_per_s, free_at: Mutex::default() }
    }

    /// So many bytes have been written by now: how long to wait before there may be more.
    fn spent(&self, bytes: u64, now: Duration) -> Duration {
        let Some(ns) = u128::from(bytes).saturating_mul(1_000_000_000).checked_div(self.bytes_per_s.into())
        else {
            return Duration::ZERO;
        };
        let took = Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX));
        let mut free_at = self.free_at.lock().unwrap_or_else(|e| e.into_inner());
        *free_at = (*free_at).max(now).saturating_add(took);
        *free_at - now
    }

    async fn write(&self, client: &Client, bytes: u64) {
        let clock = &client.runtime().clock;
        let wait = self.spent(bytes, clock.monotonic());
        if !wait.is_zero() {
            clock.sleep(wait).await;
        }
    }
}

/// A part of the slots.
pub type Slots = RangeInclusive<u8>;

/// All slots, in parts from the last to the first: whoever else moves the same goes the other way.
pub fn all_slots_backwards() -> Vec<Slots> {
    (0..16).rev().map(|part| part * 16..=part * 16 + 15).collect()
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
    /// Blocks of which their services did not say how they are.
    pub unanswered: u64,
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

/// Looks at all spans once.
///
/// # Errors
/// When a shard does not answer. What cannot be done with one span is in [`Healed::failures`].
pub async fn pass(
    client: &Client,
    lost: &Lost,
    options: HealOptions,
    pace: &Pace,
    progress: &mut (dyn FnMut(&Healed) + Send),
) -> Result<Healed, ClientError> {
    let mut pass = Pass::new(client, lost, options, pace);
    pass.walk(0, &(0..=u8::MAX), 1, progress).await?;
    Ok(pass.healed)
}

/// The same of the spans of a file, or of all files of a directory and below.
///
/// # Errors
/// As [`pass`].
pub async fn pass_of(
    client: &Client,
    top: InodeId,
    lost: &Lost,
    options: HealOptions,
    pace: &Pace,
    progress: &mut (dyn FnMut(&Healed) + Send),
) -> Result<Healed, ClientError> {
    let mut pass = Pass::new(client, lost, options, pace);
    pass.tree(top, progress).await?;
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
    pace: &Pace,
) -> Result<(Healed, Bytes), ClientError> {
    let lost = Lost::default();
    let options = HealOptions { check: true, only: service, ..options };
    let mut pass = Pass::new(client, &lost, options, pace);
    let (page, next) = client.visit_spans(service, after).await?;
    pass.look(page.into_iter().map(|span| (span, Vec::new())), None, &mut |_| {}).await?;
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
    pace: &Pace,
) -> Result<Healed, ClientError> {
    let lost = Lost::default();
    let options = HealOptions { check: true, repair: true, only: service, ..options };
    let mut pass = Pass::new(client, &lost, options, pace);
    // The index of blocks is in the order of slot, service and block.
    let before = [&[block.slot().0][..], &service.to_be_bytes(), &block.0.saturating_sub(1).to_be_bytes()];
    let (page, _) = client.visit_spans(service, before.concat().into()).await?;
    let has_it = |span: &Span| span.blocks.iter().any(|b| (b.service_id, b.block_id) == (service, block.0));
    let span = page.into_iter().find(has_it).map(|span| (span, Vec::new()));
    pass.look(span, None, &mut |_| {}).await?;
    Ok(pass.healed)
}

/// Services whose blocks are to be elsewhere: those that are gone, and those that are to be emptied.
pub fn to_be_emptied(map: &Map) -> BTreeSet<u64> {
    let flagged = map.services.iter().filter(|service| service.flags & (FLAG_GONE | FLAG_DRAIN) != 0);
    flagged.map(|service| service.service_id).collect()
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
/// look finds as much as the one before it, and when it is not to go on.
///
/// # Errors
/// When a shard does not answer.
pub async fn empty(
    client: &Client,
    lost: &Lost,
    slots: &[Slots],
    options: HealOptions,
    (pace, goes_on): (&Pace, &(dyn Fn() -> bool + Sync)),
    progress: &mut (dyn FnMut(&Healed) + Send),
) -> Result<Healed, ClientError> {
    let (mut moved, mut moved_bytes) = (0, 0);
    let (mut left, mut failures) = (u64::MAX, Vec::new());
    loop {
        let looking = HealOptions { repair: false, check: false, ..options };
        let mut look = Pass { goes_on, ..Pass::new(client, lost, looking, pace) };
        for (slots, service) in each(slots, &lost.emptied) {
            look.walk(service, slots, 1, &mut |_| {}).await?;
        }
        let most = look.most_lost;
        look.healed.moved = moved;
        look.healed.moved_bytes = moved_bytes;
        look.healed.spans_left = look.healed.spans();
        look.healed.bytes_left = look.lost_bytes;
        progress(&look.healed);
        if most == 0 || look.healed.spans() >= left || !goes_on() {
            look.healed.failures = failures;
            return Ok(look.healed);
        }
        left = look.healed.spans();
        let mut pass =
            Pass { goes_on, ..Pass::new(client, lost, HealOptions { repair: true, ..options }, pace) };
        (pass.healed.moved, pass.healed.moved_bytes) = (moved, moved_bytes);
        (pass.healed.spans_left, pass.healed.bytes_left) = (look.healed.spans_left, look.healed.bytes_left);
        for least in (1..=most).rev() {
            for (slots, service) in each(slots, &lost.emptied) {
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
    lost: &'a Lost,
    options: HealOptions,
    pace: &'a Pace,
    /// Asked before each page.
    goes_on: &'a (dyn Fn() -> bool + Sync),
    healed: Healed,
    /// The most blocks that a span has lost.
    most_lost: usize,
    /// Bytes of blocks on services that are to be emptied.
    lost_bytes: u64,
    /// A file or directory of each slot: what is written for a span is written for it.
    homes: BTreeMap<u8, Option<InodeId>>,
}

/// What has become of a span.
struct Looked {
    span: Span,
    /// Places of blocks that cannot be had.
    lost: Vec<usize>,
    /// Those of them that are written elsewhere, if anything is.
    movable: Vec<usize>,
    checked: u64,
    missing: u64,
    damaged: u64,
    unanswered: u64,
    moved: u64,
    failures: Vec<String>,
}

impl<'a> Pass<'a> {
    fn new(client: &'a Client, lost: &'a Lost, options: HealOptions, pace: &'a Pace) -> Pass<'a> {
        let (healed, homes) = (Healed::default(), BTreeMap::new());
        Pass { client, lost, options, pace, goes_on: &|| true, healed, most_lost: 0, lost_bytes: 0, homes }
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
        while (self.goes_on)() {
            let (page, next) = self.client.visit_spans(service, after).await?;
            let mut work = Vec::new();
            for span in page.into_iter().filter(|span| slots.contains(&SpanId(span.span_id).slot().0)) {
                let lost = self.lost_of(&span);
                // A span that is held by several of these services is met with each.
                let first = lost.iter().find(|i| self.lost.emptied.contains(&span.blocks[**i].service_id));
                let is_first = service == 0 || first.is_some_and(|i| span.blocks[*i].service_id == service);
                if is_first && (service == 0 || lost.len() >= least) {
                    work.push((span, lost));
                }
            }
            self.look(work, None, progress).await?;
            if next.first().is_none_or(|slot| slot > slots.end()) {
                return Ok(());
            }
            after = next;
        }
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
                let work: Vec<_> = new.map(|span| (self.lost_of(&span), span)).collect();
                let work = work.into_iter().map(|(lost, span)| (span, lost));
                self.look(work, Some(id), progress).await?;
                if page.next_offset == 0 {
                    break;
                }
                (offset, content) = (page.next_offset, page.content);
            }
        }
        Ok(())
    }

    /// Spans with what they have lost; what is written for them is written for `home`, or for one of their slots.
    async fn look(
        &mut self,
        spans: impl IntoIterator<Item = (Span, Vec<usize>)>,
        home: Option<InodeId>,
        progress: &mut (dyn FnMut(&Healed) + Send),
    ) -> Result<(), ClientError> {
        let (client, options, lost, pace) = (self.client, self.options, self.lost, self.pace);
        let at_a_time = options.concurrency.max(1);
        let all: Vec<_> =
            spans.into_iter().map(|(span, of_span)| check(client, options, lost, span, of_span)).collect();
        let mut checks = stream::iter(all).buffer_unordered(at_a_time);
        let mut to_repair = Vec::new();
        while let Some(looked) = checks.next().await {
            if options.repair && !looked.movable.is_empty() {
                to_repair.push(looked);
                continue;
            }
            self.take(looked);
            progress(&self.healed);
        }
        drop(checks);
        let mut with_homes = Vec::new();
        for looked in to_repair {
            let home = match home {
                Some(home) => Some(home),
                None => self.home(SpanId(looked.span.span_id).slot()).await?,
            };
            with_homes.push(repair(client, pace, lost, looked, home));
        }
        let mut repairs = stream::iter(with_homes).buffer_unordered(at_a_time);
        while let Some(looked) = repairs.next().await {
            self.take(looked);
            progress(&self.healed);
        }
        Ok(())
    }

    /// Blocks of a span that are on services that count as lost, by their places.
    fn lost_of(&self, span: &Span) -> Vec<usize> {
        let blocks = span.blocks.iter().enumerate();
        blocks.filter(|(_, block)| self.lost.has(block.service_id)).map(|(i, _)| i).collect()
    }

    async fn home(&mut self, slot: Slot) -> Result<Option<InodeId>, ClientError> {
        if let Some(home) = self.homes.get(&slot.0) {
            return Ok(*home);
        }
        let home = match self.first_of(1, slot).await? {
            // Directories outlive files.
            Some(home) => Some(home),
            None => self.first_of(2, slot).await?,
        };
        self.homes.insert(slot.0, home);
        Ok(home)
    }

    /// The first inode of a kind in a slot; of directories one that was not removed.
    async fn first_of(&self, kind: u32, slot: Slot) -> Result<Option<InodeId>, ClientError> {
        let mut after = Bytes::copy_from_slice(&[slot.0]);
        loop {
            let (page, next) = self.client.visit_inodes(kind, after).await?;
            let usable = page.iter().filter_map(|inode| Some((InodeId::from_wire(inode.id)?, inode)));
            let mut usable = usable
                .filter(|(id, inode)| kind != 1 || inode.parent != 0 || *id == InodeId::ROOT)
                .map(|(id, _)| id);
            // A page may reach into the next slot.
            if let Some(found) = usable.find(|id| id.slot() == slot) {
                return Ok(Some(found));
            }
            if next.first() != Some(&slot.0) {
                return Ok(None);
            }
            after = next;
        }
    }

    fn take(&mut self, looked: Looked) {
        let Looked { span, lost, checked, missing, damaged, unanswered, moved, failures, .. } = looked;
        self.most_lost = self.most_lost.max(lost.len());
        let bytes = self.healed.count(&span, lost.len());
        self.healed.checked += checked;
        self.healed.missing += missing;
        self.healed.damaged += damaged;
        self.healed.unanswered += unanswered;
        self.healed.moved += moved;
        self.healed.moved_bytes += moved * bytes;
        let to_go = span.blocks.iter().filter(|block| self.lost.emptied.contains(&block.service_id)).count();
        self.lost_bytes += bytes * to_go as u64;
        self.healed.spans_left = self.healed.spans_left.saturating_sub(u64::from(moved > 0));
        self.healed.bytes_left = self.healed.bytes_left.saturating_sub(moved * bytes);
        failures.into_iter().for_each(|failure| self.healed.fail(failure));
    }
}

/// How one block is.
enum State {
    Good,
    Missing,
    /// Also where the disk cannot give it and gives others.
    Damaged(ClientError),
    Unanswered(ClientError),
}

async fn state(client: &Client, block: &Block) -> State {
    let is_used = async {
        let map = client.refresh_map().await.ok();
        let known =
            map.as_ref().and_then(|map| map.services.iter().find(|s| s.service_id == block.service_id));
        known.is_some_and(|service| service.capacity_bytes > 0)
    };
    let mut has_failed = false;
    loop {
        return match client.check_block(block).await {
            Ok(()) => State::Good,
            Err(error) => match error.code() {
                Some(Code::BlockNotFound) => State::Missing,
                Some(Code::BlockCorrupt) => State::Damaged(error),
                // An error may pass, and a disk that is not there fails with all: by then its node has said so.
                Some(Code::DiskFault) if !has_failed => {
                    has_failed = true;
                    client.runtime().clock.sleep(ASK_AGAIN).await;
                    continue;
                }
                Some(Code::DiskFault) if is_used.await => State::Damaged(error),
                _ => State::Unanswered(error),
            },
        };
    }
}

/// Has the services of a span look at their blocks, if that is asked for.
async fn check(client: &Client, options: HealOptions, of: &Lost, span: Span, mut lost: Vec<usize>) -> Looked {
    let is_to_go = |i: &usize| of.emptied.contains(&span.blocks[*i].service_id);
    let mut movable: Vec<usize> = lost.iter().copied().filter(is_to_go).collect();
    let (mut checked, mut missing, mut damaged, mut unanswered) = (0, 0, 0, 0);
    let mut failures = Vec::new();
    for (index, block) in span.blocks.iter().enumerate().filter(|_| options.check) {
        if lost.contains(&index) || options.only != 0 && block.service_id != options.only {
            continue;
        }
        let (is_bad, why) = match state(client, block).await {
            State::Good => {
                checked += 1;
                continue;
            }
            State::Missing => {
                missing += 1;
                (!mutants::is(Mutant::MissingNotRepaired), "it is missing".to_owned())
            }
            State::Damaged(error) => (true, error.to_string()),
            State::Unanswered(error) => {
                unanswered += 1;
                (false, error.to_string())
            }
        };
        if is_bad {
            damaged += 1;
            movable.push(index);
        }
        lost.push(index);
        failures.push(format!("block {:x} on service {:016x}: {why}", block.block_id, block.service_id));
    }
    Looked { span, lost, movable, checked, missing, damaged, unanswered, moved: 0, failures }
}

/// Writes elsewhere what of a span is to be moved.
async fn repair(
    client: &Client,
    pace: &Pace,
    lost: &Lost,
    mut looked: Looked,
    home: Option<InodeId>,
) -> Looked {
    let Some(home) = home else {
        let text =
            format!("span {:x} belongs to no file any more; it will be collected", looked.span.span_id);
        looked.failures.push(text);
        return looked;
    };
    let flags: BTreeMap<u64, u32> = match client.map().await {
        Ok(map) => map.services.iter().map(|service| (service.service_id, service.flags)).collect(),
        Err(_) => BTreeMap::new(),
    };
    let bytes = looked.span.shape.map_or(0, |shape| shape.block_bytes());
    for index in looked.movable.clone() {
        let (id, service) = (looked.span.blocks[index].block_id, looked.span.blocks[index].service_id);
        let flags = flags.get(&service).copied().unwrap_or(0);
        let is_to_go = flags & (FLAG_GONE | FLAG_DRAIN) != 0;
        let how = Moving {
            is_lost: !is_to_go || flags & (FLAG_GONE | FLAG_CONDEMNED) != 0 || lost.away.contains(&service),
            may_stay: !is_to_go,
            is_for_now: flags & FLAG_CONDEMNED != 0 && flags & FLAG_GONE == 0,
        };
        match client.move_block(home, &looked.span, index, how).await {
            Ok(Some((block, scratch))) => {
                // Else the old block would be met again as one that is in use; if this fails, it expires.
                let _ = client.collect_content(scratch).await;
                client.runtime().note("heal: a block is somewhere else");
                // Its next one goes to yet another service.
                looked.span.blocks[index] = block;
                looked.moved += 1;
                pace.write(client, u64::from(bytes)).await;
            }
            // The next look says.
            Ok(None) => client.runtime().note("heal: a span has changed"),
            Err(error) => {
                looked.failures.push(format!("move block {id:x} from service {service:016x}: {error}"));
            }
        }
    }
    looked
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_written_is_not_made_up_for() {
        let (pace, at) = (Pace::of(1000), Duration::from_millis);
        assert_eq!(pace.spent(500, at(0)), at(500));
        assert_eq!(pace.spent(1, at(0)), at(501), "whoever shares it waits for the others");
        assert_eq!(pace.spent(100, at(10_000)), at(100));
        assert_eq!(Pace::of(0).spent(u64::MAX, at(0)), at(0));
        assert_eq!(Pace::of(1).spent(u64::MAX, at(0)), Duration::from_nanos(u64::MAX));
    }
}
