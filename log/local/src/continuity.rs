//! Follows the records of a directory of segments in order and notices what is missing.
//!
//! Invariants: the positions of a log are contiguous, within a segment and from one to the next; the `groups` record that
//! begins a segment says where every log stands when the one before it ends.

use std::collections::BTreeMap;

use clutch_log::{LogFault, LogId, Position};

use crate::{
    GroupState, Record, RecordKind,
    format::{GroupLine, decode_group, segment_name},
    reader::missing,
};

/// Where every log stands, as far as the segments have been followed.
#[derive(Default)]
pub struct Continuity {
    groups: BTreeMap<LogId, GroupState>,
    /// The segment that is being followed.
    number: u64,
    begun: bool,
}

impl Continuity {
    /// The last position of a log so far; `None` for one that has not been met.
    pub fn last(&self, id: LogId) -> Option<Position> {
        self.groups.get(&id).map(|state| Position(state.next.0 - 1))
    }

    pub(crate) fn groups(&self) -> &BTreeMap<LogId, GroupState> {
        &self.groups
    }

    pub(crate) fn into_groups(self) -> BTreeMap<LogId, GroupState> {
        self.groups
    }

    /// Takes the record that begins a segment. Those after it follow with [`Continuity::record`], or all at once.
    ///
    /// # Errors
    /// [`LogFault::Corrupt`] when the segment before it lacks records that this one knows of, or the other way round.
    pub fn begin(&mut self, number: u64, groups: &Record) -> Result<(), LogFault> {
        let lines: Result<Vec<GroupLine>, String> = groups.entries.iter().map(|l| decode_group(l)).collect();
        let corrupt = |number: u64, position: Position, what: String| LogFault::Corrupt {
            position,
            file: segment_name(number),
            offset: 0,
            what,
        };
        let lines = lines.map_err(|what| corrupt(number, Position(0), what))?;
        let before = std::mem::replace(&mut self.number, number);
        let is_first = !std::mem::replace(&mut self.begun, true);
        for line in &lines {
            // A log that has no record yet is in the list with position 0, or is not.
            let known = self.last(line.log).unwrap_or(Position(0));
            if !is_first && line.last > known {
                return Err(corrupt(before, known.next(), missing(line.log, known.next(), line.last)));
            }
            if !is_first && line.last < known {
                let what = format!(
                    "it begins after position {} of {}, but {} holds {known}: it is of another time; restore it",
                    line.last,
                    line.log,
                    segment_name(before)
                );
                return Err(corrupt(number, known, what));
            }
            let state = self.groups.entry(line.log).or_default();
            (state.next, state.epoch, state.sealed) = (line.last.next(), line.epoch, line.sealed);
        }
        for (id, state) in &self.groups {
            if !lines.iter().any(|line| line.log == *id) && state.next.0 > 1 {
                let what = format!("it does not know {id}, which the segments before it hold; restore it");
                return Err(corrupt(number, Position(state.next.0 - 1), what));
            }
        }
        Ok(())
    }

    /// Takes one record of the segment that was begun last, which starts at `offset`.
    ///
    /// # Errors
    /// [`LogFault::Corrupt`] when it does not follow on the one before it.
    pub fn record(&mut self, record: &Record, offset: u64) -> Result<(), LogFault> {
        self.span(record.log, record.position, record.position, offset)?;
        let state = self.groups.entry(record.log).or_default();
        match record.kind {
            RecordKind::Epoch => (state.epoch, state.epoch_position) = (record.epoch, record.position),
            RecordKind::Seal => state.sealed = Some(record.position),
            RecordKind::Batch | RecordKind::Groups => {}
        }
        Ok(())
    }

    /// Takes all records of a log in the segment that was begun last, as its index has them.
    pub(crate) fn span(
        &mut self,
        id: LogId,
        first: Position,
        last: Position,
        offset: u64,
    ) -> Result<(), LogFault> {
        let expected = self.last(id).unwrap_or(Position(0)).next();
        if first != expected || last < first {
            let what = if first > expected {
                missing(id, expected, Position(first.0 - 1))
            } else {
                format!("position {first} of {id} comes again after {}", expected.0 - 1)
            };
            return Err(LogFault::Corrupt {
                position: expected,
                file: segment_name(self.number),
                offset,
                what,
            });
        }
        self.groups.entry(id).or_default().next = last.next();
        Ok(())
    }
}
