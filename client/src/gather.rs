//! Gathers cells of a span: those that are wanted, or any from which they can be computed.
//!
//! A block that fails is made up for by others, and so is one that is late: when reads have taken much longer than they usually do, others
//! are begun, and whichever come first are used. That is bounded: where everything is slow, more reads would make it slower.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Mutex,
    time::Duration,
};

use clutch_proto::{
    mutants::{self, Mutant},
    types::{Code, Span},
};
use futures_util::{StreamExt as _, stream::FuturesUnordered};

use crate::{
    rpc::{Client, lock},
    span::Cells,
};

/// No read is late before this.
const LATE_MIN: Duration = Duration::from_millis(30);
/// Reads are late after the usual time and so many of its usual deviations.
const DEVIATIONS: u32 = 4;
/// For so long whoever was late is read only where others do not do.
const LATE_FOR: Duration = Duration::from_secs(10);
/// One read in so many may be of a block beside the late ones.
const BESIDE_ONE_IN: u32 = 20;
/// So many of them at once.
const BESIDE_MAX: u32 = 64;

/// What reads of blocks usually take, and how many more of them there may be.
#[derive(Debug)]
pub(crate) struct Usual(Mutex<State>);

#[derive(Debug)]
struct State {
    /// Zero before the first.
    took: Duration,
    deviation: Duration,
    /// In parts of [`BESIDE_ONE_IN`].
    credit: u32,
    /// Services that were late, and until when they are read last. Of writes that says nothing.
    late: BTreeMap<u64, Duration>,
}

impl Default for Usual {
    fn default() -> Usual {
        let credit = BESIDE_MAX * BESIDE_ONE_IN;
        let late = BTreeMap::new();
        Usual(Mutex::new(State { took: Duration::ZERO, deviation: Duration::ZERO, credit, late }))
    }
}

impl Usual {
    /// A read has taken so long.
    fn record(&self, took: Duration) {
        let mut state = lock(&self.0);
        if state.took.is_zero() {
            (state.took, state.deviation) = (took, took / 2);
        }
        state.deviation = (state.deviation * 7 + state.took.abs_diff(took)) / 8;
        state.took = (state.took * 7 + took) / 8;
        state.credit = (state.credit + 1).min(BESIDE_MAX * BESIDE_ONE_IN);
    }

    /// A service was late at this time.
    fn is_late(&self, service: u64, now: Duration) {
        lock(&self.0).late.insert(service, now + LATE_FOR);
    }

    /// Services that were late lately.
    fn late(&self, now: Duration) -> Vec<u64> {
        let mut state = lock(&self.0);
        state.late.retain(|_, until| *until > now);
        state.late.keys().copied().collect()
    }

    /// After so long a read is late.
    fn late_after(&self) -> Duration {
        let state = lock(&self.0);
        (state.took + state.deviation * DEVIATIONS).max(LATE_MIN)
    }

    /// Whether so many more may be read because others are late.
    fn spend(&self, reads: usize) -> bool {
        let mut state = lock(&self.0);
        let cost = u32::try_from(reads).unwrap_or(u32::MAX).saturating_mul(BESIDE_ONE_IN);
        let left = state.credit.checked_sub(cost);
        state.credit = left.unwrap_or(state.credit);
        left.is_some()
    }
}

/// Blocks of a span, those on suspects last.
pub(crate) fn best_first(blocks: impl Iterator<Item = usize>, span: &Span, suspects: &[u64]) -> Vec<usize> {
    let mut blocks: Vec<usize> = blocks.collect();
    blocks.sort_by_key(|i| suspects.contains(&span.blocks[*i].service_id));
    blocks
}

/// What has come of a span's blocks.
#[derive(Default)]
pub(crate) struct Gathered {
    /// By their places in the span.
    pub(crate) blocks: Vec<Option<Cells>>,
    pub(crate) failures: Vec<String>,
    /// A failure may be over in a moment.
    pub(crate) may_pass: bool,
    /// A certificate has expired.
    pub(crate) expired: bool,
    /// Blocks that came or failed.
    pub(crate) tried: usize,
}

impl Gathered {
    pub(crate) fn have(&self) -> usize {
        self.blocks.iter().flatten().count()
    }

    /// Whether all of these are there.
    pub(crate) fn has(&self, wanted: &[usize]) -> bool {
        wanted.iter().all(|i| self.blocks[*i].is_some())
    }
}

impl Client {
    /// Rows `rows.0..=rows.1` of the wanted blocks, or else of as many as all can be computed from, or of all that can be had.
    pub(crate) async fn gather(&self, span: &Span, wanted: &[usize], rows: (usize, usize)) -> Gathered {
        let data = span.shape.map_or(0, |shape| shape.data_blocks as usize);
        let clock = &self.inner.runtime.clock;
        let mut suspects = self.suspects();
        suspects.extend(self.inner.usual.late(clock.monotonic()));
        // With a suspect among them, D blocks are chosen that are not: waiting for it would cost more than computing.
        let mut any = wanted.iter().any(|i| suspects.contains(&span.blocks[*i].service_id));
        let begin: Vec<usize> = match any {
            true => best_first(0..span.blocks.len(), span, &suspects).into_iter().take(data).collect(),
            false => wanted.to_vec(),
        };
        let others = (0..span.blocks.len()).filter(|i| !begin.contains(i));
        let mut left = VecDeque::from(best_first(others, span, &suspects));
        let read = |i: usize| async move {
            let began = clock.monotonic();
            let read = self.read_cells(span, &span.blocks[i], i, rows.0, rows.1).await;
            (i, clock.monotonic() - began, read)
        };
        let mut reads: FuturesUnordered<_> = begin.iter().map(|i| read(*i)).collect();
        let (mut running, mut late): (BTreeSet<usize>, BTreeSet<usize>) =
            (begin.into_iter().collect(), BTreeSet::new());
        let mut of = Gathered { blocks: vec![None; span.blocks.len()], ..Gathered::default() };
        while !(of.has(wanted) || any && of.have() >= data) {
            // As many as make up D, if all come that are not late.
            while any && of.have() + running.len() - late.len() < data {
                let Some(next) = left.pop_front() else { break };
                running.insert(next);
                reads.push(read(next));
            }
            if running.is_empty() {
                break;
            }
            let may_be_late = running.len() > late.len() && !left.is_empty();
            let came = match may_be_late && !mutants::is(Mutant::LateAwaited) {
                true => self.inner.runtime.timeout(self.inner.usual.late_after(), reads.next()).await,
                false => Some(reads.next().await),
            };
            match came {
                Some(Some((i, took, read))) => {
                    running.remove(&i);
                    late.remove(&i);
                    self.inner.usual.record(took);
                    any |= read.is_err();
                    self.take(&mut of, span, i, read);
                }
                Some(None) => break,
                None => {
                    let new: Vec<usize> = running.difference(&late).copied().collect();
                    let instead = (data.saturating_sub(of.have())).min(left.len());
                    late.extend(&new);
                    if self.inner.usual.spend(instead) {
                        self.inner.runtime.note("read: others are read instead of a block that is late");
                        new.iter().for_each(|i| {
                            self.inner.usual.is_late(span.blocks[*i].service_id, clock.monotonic())
                        });
                        any = true;
                    }
                }
            }
        }
        of
    }

    fn take(&self, of: &mut Gathered, span: &Span, i: usize, read: Result<Cells, crate::error::ClientError>) {
        of.tried += 1;
        let error = match read {
            Ok(cells) => return of.blocks[i] = Some(cells),
            Err(error) => error,
        };
        let block = &span.blocks[i];
        of.may_pass |= error.may_pass();
        of.expired |= error.code() == Some(Code::CertificateExpired);
        self.note_failed_read(&error);
        of.failures.push(format!("block {:x} on service {:016x}: {error}", block.block_id, block.service_id));
        if !matches!(error.code(), Some(Code::BlockNotFound | Code::BlockCorrupt)) {
            self.suspect(block.service_id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_is_late_by_what_reads_usually_take_and_few_are_made_beside() {
        let usual = Usual::default();
        assert_eq!(usual.late_after(), LATE_MIN);
        (0..100).for_each(|_| usual.record(Duration::from_millis(100)));
        let steady = usual.late_after();
        assert!((100..140).contains(&steady.as_millis()), "{steady:?}");
        (0..100).for_each(|n| usual.record(Duration::from_millis(if n % 2 == 0 { 20 } else { 180 })));
        assert!(usual.late_after() > Duration::from_millis(300));
        // Everything is slow: what may be read beside is soon used up, and one in twenty is left.
        let mut beside = (0..1000).filter(|_| usual.spend(1)).count();
        assert_eq!(beside, BESIDE_MAX as usize);
        beside = (0..1000)
            .filter(|_| {
                usual.record(Duration::from_millis(100));
                usual.spend(1)
            })
            .count();
        assert_eq!(beside, 1000 / BESIDE_ONE_IN as usize);
    }
}
