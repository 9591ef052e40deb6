//! What a segment has of a group, and what of earlier segments a record takes away.

use clutch_log::Position;
use clutch_proto::mutants::{self, Mutant};

use crate::{GroupId, RecordKind, Segment};

/// A segment has taken something away that lay in segments before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restart {
    /// The group goes on here.
    pub at: Position,
    /// Everything of earlier segments is gone; else what lies at `at` and behind.
    pub is_anew: bool,
}

/// Which records of a group a segment has: those at contiguous positions that nothing in it has taken away again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// The first position; 0 where there is none.
    pub first: Position,
    /// The last one.
    pub last: Position,
    /// What it does to earlier segments.
    pub restart: Option<Restart>,
    /// Where in the segment's file each record begins; only in the segment that is written, and where an index is made.
    pub offsets: Vec<u32>,
}

impl Span {
    /// Whether there is no record.
    pub fn is_empty(&self) -> bool {
        self.first == Position(0)
    }

    /// How many records there are.
    pub fn count(&self) -> u64 {
        if self.is_empty() { 0 } else { self.last.0 - self.first.0 + 1 }
    }

    /// Whether the record at a position is among them.
    pub fn has(&self, position: Position) -> bool {
        !self.is_empty() && (self.first..=self.last).contains(&position)
    }

    fn clear(&mut self) {
        (self.first, self.last) = (Position(0), Position(0));
        self.offsets.clear();
    }

    /// Takes away everything from a position on; says whether all of it.
    fn cut(&mut self, from: Position) -> bool {
        if self.is_empty() || from <= self.first {
            self.clear();
            return true;
        }
        if from <= self.last {
            self.last = Position(from.0 - 1);
            self.offsets.truncate((from.0 - self.first.0) as usize);
        }
        false
    }
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
    pub(crate) fn take(&mut self, group: GroupId, position: Position, effect: Effect, offset: u64) {
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
pub(crate) fn cut_earlier(segments: &mut [Segment], group: GroupId, Restart { at, is_anew }: Restart) {
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
