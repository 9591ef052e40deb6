//! What a segment has of all groups, and what its records take away from segments before it.

use std::collections::BTreeMap;

use clutch_log::{LogletId, Position};
use clutch_proto::mutants::{self, Mutant};

use crate::{
    format::RecordKind,
    span::{Restart, Span},
};

/// A segment file and what it has of each group.
#[derive(Clone, Debug, Default)]
pub(crate) struct Segment {
    pub(crate) number: u64,
    pub(crate) spans: BTreeMap<LogletId, Span>,
    /// Bytes of its file.
    pub(crate) bytes: u64,
}

/// What a record does to its group, beside having a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Nothing to the positions.
    None,
    /// Takes the next position.
    Next,
    /// Everything from there on is gone.
    Cut(Position),
    /// Everything is gone, and it goes on there.
    Anew(Position),
}

impl Segment {
    /// Takes a record that begins at an offset of this segment.
    pub(crate) fn take(&mut self, group: LogletId, position: Position, effect: Effect, offset: u64) {
        let offset = u32::try_from(offset).expect("a segment is closed long before it has 4 GiB");
        match effect {
            Effect::None => {}
            Effect::Next => {
                let span = self.spans.entry(group).or_default();
                if span.is_empty() {
                    span.first = position;
                }
                span.last = position;
                span.offsets.push(offset);
            }
            Effect::Cut(from) => {
                let span = self.spans.entry(group).or_default();
                if span.cut(from) {
                    let is_anew = span.restart.is_some_and(|restart| restart.is_anew);
                    let at = span.restart.map_or(from, |restart| restart.at.min(from));
                    span.restart = Some(Restart { at, is_anew });
                }
            }
            Effect::Anew(at) => {
                let span = self.spans.entry(group).or_default();
                span.clear();
                span.restart = Some(Restart { at, is_anew: true });
            }
        }
    }
}

/// Takes away of earlier segments what a later one has restarted.
pub(crate) fn cut_earlier(segments: &mut [Segment], group: LogletId, Restart { at, is_anew }: Restart) {
    if mutants::is(Mutant::EarlierNotCut) {
        return;
    }
    let from = if is_anew { Position(0) } else { at };
    for span in segments.iter_mut().filter_map(|segment| segment.spans.get_mut(&group)) {
        span.cut(from);
    }
}

/// What a record of a kind does to a group that would go on at `next`.
pub(crate) fn effect(kind: RecordKind, position: Position, next: Position) -> Effect {
    match kind {
        RecordKind::Batch | RecordKind::Epoch | RecordKind::Seal | RecordKind::Members => Effect::Next,
        RecordKind::Groups | RecordKind::Vote => Effect::None,
        RecordKind::Truncate => Effect::Cut(position),
        RecordKind::Base if position < next => Effect::None,
        RecordKind::Base => Effect::Anew(position.next()),
        RecordKind::Remove => Effect::Anew(Position(1)),
    }
}
