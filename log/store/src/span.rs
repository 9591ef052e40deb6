//! What a segment has of a group.

use clutch_log::Position;

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
    /// Where in the segment's file each record begins; only in the segment that is written, where an index is made, and where there is
    /// none.
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

    pub(crate) fn clear(&mut self) {
        (self.first, self.last) = (Position(0), Position(0));
        self.offsets.clear();
    }

    /// Takes away everything from a position on; says whether all of it.
    pub(crate) fn cut(&mut self, from: Position) -> bool {
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
