//! Follows the records of a directory of segments in order and notices what is missing.
//!
//! Invariants: the positions of a log are contiguous, within a segment and from one to the next; the `groups` record that
//! begins a segment says where every log stands when the one before it ends.

use std::collections::{BTreeMap, BTreeSet};

use clutch_log::{LogFault, LogletId, Position};

use crate::{
    format::{GroupLine, Record, decode_group, missing, segment_name},
    segment::{Effect, effect},
    span::Span,
    state::GroupState,
};

/// Where every log stands, as far as the segments have been followed.
#[derive(Default)]
pub struct Continuity {
    groups: BTreeMap<LogletId, GroupState>,
    /// The segment that is being followed.
    number: u64,
    begun: bool,
    /// Groups of which a record is damaged: what they have is not followed any more.
    quarantined: BTreeSet<LogletId>,
}

impl Continuity {
    /// The last position of a log so far; `None` for one that has not been met.
    pub fn last(&self, id: impl Into<LogletId>) -> Option<Position> {
        self.groups.get(&id.into()).map(|state| Position(state.next.0 - 1))
    }

    /// Does not follow a group any more.
    pub(crate) fn quarantine(&mut self, id: LogletId) {
        self.quarantined.insert(id);
        self.groups.entry(id).or_default();
    }

    /// A group that was damaged is removed, or begins anew.
    pub(crate) fn follow_again(&mut self, id: LogletId) {
        self.quarantined.remove(&id);
    }

    pub(crate) fn is_quarantined(&self, id: LogletId) -> bool {
        self.quarantined.contains(&id)
    }

    /// Groups that are not followed.
    pub(crate) fn quarantined(&self) -> &BTreeSet<LogletId> {
        &self.quarantined
    }

    pub(crate) fn groups(&self) -> &BTreeMap<LogletId, GroupState> {
        &self.groups
    }

    pub(crate) fn into_groups(self) -> BTreeMap<LogletId, GroupState> {
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
            let known = self.last(line.group).unwrap_or(Position(0));
            if line.is_removed {
                self.quarantined.remove(&line.group);
            } else if line.is_quarantined {
                self.quarantined.insert(line.group);
            }
            let is_followed = !is_first && !line.is_removed && !self.is_quarantined(line.group);
            if is_followed && line.last > known {
                return Err(corrupt(before, known.next(), missing(line.group, known.next(), line.last)));
            }
            if is_followed && line.last < known {
                let what = format!(
                    "it begins after position {} of {}, but {} holds {known}: it is of another time; restore it",
                    line.last,
                    line.group,
                    segment_name(before)
                );
                return Err(corrupt(number, known, what));
            }
            let state = self.groups.entry(line.group).or_default();
            (state.next, state.epoch, state.sealed) = (line.last.next(), line.epoch, line.sealed);
            (state.base, state.is_removed) = (line.base, line.is_removed);
            (state.vote, state.members) = (line.vote.clone(), line.members.clone());
        }
        for (id, state) in &self.groups {
            if !lines.iter().any(|line| line.group == *id) && state.next.0 > 1 && !self.is_quarantined(*id) {
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
        self.follow(record, offset).map(drop)
    }

    /// The same, and what it does to its group.
    pub(crate) fn follow(&mut self, record: &Record, offset: u64) -> Result<Effect, LogFault> {
        let (id, position) = (record.group, record.position);
        if record.kind.has_position() {
            self.span(id, position, position, offset)?;
        }
        let state = self.groups.entry(id).or_default();
        state.check_next(record).map_err(|what| LogFault::Corrupt {
            position,
            file: segment_name(self.number),
            offset,
            what,
        })?;
        let effect = effect(record.kind, position, state.next);
        state.change(record, effect);
        Ok(effect)
    }

    /// Takes all records of a log in the segment that was begun last, as its index has them.
    pub(crate) fn span(
        &mut self,
        id: LogletId,
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

    /// Takes what the index of the segment that was begun last has of a group.
    pub(crate) fn indexed(&mut self, id: LogletId, span: &Span, offset: u64) -> Result<(), LogFault> {
        if self.is_quarantined(id) {
            return Ok(());
        }
        if let Some(restart) = span.restart {
            self.groups.entry(id).or_default().next = restart.at;
        }
        if span.is_empty() { Ok(()) } else { self.span(id, span.first, span.last, offset) }
    }
}
