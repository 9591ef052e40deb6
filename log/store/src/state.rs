//! What a group is in memory, what an engine may write, and what becomes of the group by that.

use std::{collections::VecDeque, sync::Arc};

use bytes::Bytes;
use clutch_log::{Batch, Epoch, LogFault, LogletId, Outcome, Position};
use parking_lot::Mutex;
use tokio::sync::{oneshot, watch};

use crate::{
    format::{GroupLine, POSITION_MAX, Record, RecordKind},
    segment::Effect,
    vote::Vote,
};

/// A group as the writer and the handles share it.
pub(crate) struct Group {
    pub(crate) id: LogletId,
    pub(crate) state: Mutex<GroupState>,
    /// Last durable position; readers wait on it.
    pub(crate) last: watch::Sender<Position>,
}

impl Group {
    pub(crate) fn new(id: LogletId, state: GroupState) -> Group {
        let last = watch::Sender::new(Position(state.next.0.saturating_sub(1)));
        Group { id, state: Mutex::new(state), last }
    }
}

pub(crate) struct GroupState {
    pub(crate) epoch: Epoch,
    pub(crate) epoch_position: Position,
    /// The reign that was given up; none follows before the log is opened again.
    pub(crate) resigned: Epoch,
    /// The position that the writer gives out next.
    pub(crate) next: Position,
    pub(crate) sealed: Option<Position>,
    /// Everything up to there is gone, and of which reign it was.
    pub(crate) base: (Position, Epoch),
    pub(crate) vote: Option<Vote>,
    /// The newest at or before the base, and all after it.
    pub(crate) members: Vec<(Position, Bytes)>,
    pub(crate) is_removed: bool,
    /// Up to here the replica needs nothing.
    pub(crate) floor: Position,
    /// Recent records, oldest first, without holes up to the last durable one.
    pub(crate) tail: VecDeque<TailRecord>,
    pub(crate) tail_bytes: usize,
}

impl Default for GroupState {
    fn default() -> GroupState {
        GroupState {
            epoch: Epoch(0),
            epoch_position: Position(0),
            resigned: Epoch(0),
            next: Position(1),
            sealed: None,
            base: (Position(0), Epoch(0)),
            vote: None,
            members: Vec::new(),
            is_removed: false,
            floor: Position(0),
            tail: VecDeque::new(),
            tail_bytes: 0,
        }
    }
}

impl GroupState {
    /// Whether a record may come next, but for its position where its kind has one.
    ///
    /// # Errors
    /// Why not.
    pub(crate) fn check_next(&self, record: &Record) -> Result<(), String> {
        let Record { kind, position, entries, .. } = record;
        let may = match kind {
            _ if *position > POSITION_MAX => false,
            _ if self.is_removed => self.is_revival(record),
            RecordKind::Vote | RecordKind::Members => entries.len() == 1,
            RecordKind::Truncate => *position > self.base.0 && *position <= self.next,
            RecordKind::Base => *position >= self.base.0 && entries.len() <= 1,
            RecordKind::Groups => false,
            RecordKind::Batch | RecordKind::Epoch | RecordKind::Seal | RecordKind::Remove => true,
        };
        if may {
            return Ok(());
        }
        let (group, next, base) = (record.group, self.next, self.base.0);
        let removed = if self.is_removed { " and was removed" } else { "" };
        let of = entries.len();
        Err(format!(
            "{kind:?} of {of} entries for {position} of {group}, which goes on at {next} behind {base}{removed}"
        ))
    }

    /// Whether a record begins a group again that was removed, with nothing: a vote that promises nothing.
    fn is_revival(&self, record: &Record) -> bool {
        self.is_removed
            && record.kind == RecordKind::Vote
            && record.epoch == Epoch(0)
            && record.entries.len() == 1
    }

    /// The same without its records.
    pub(crate) fn without_tail(&self) -> GroupState {
        GroupState {
            epoch: self.epoch,
            epoch_position: self.epoch_position,
            resigned: self.resigned,
            next: self.next,
            sealed: self.sealed,
            base: self.base,
            vote: self.vote.clone(),
            members: self.members.clone(),
            is_removed: self.is_removed,
            floor: self.floor,
            tail: VecDeque::new(),
            tail_bytes: 0,
        }
    }

    /// How it stands, as the record says that begins a segment.
    pub(crate) fn line(&self, group: LogletId) -> GroupLine {
        GroupLine {
            group,
            last: Position(self.next.0 - 1),
            epoch: self.epoch,
            sealed: self.sealed,
            base: self.base,
            vote: self.vote.clone(),
            members: self.members.clone(),
            is_removed: self.is_removed,
            is_quarantined: false,
        }
    }

    /// Keeps a record in memory, and no more bytes than the limit, but always one.
    pub(crate) fn keep(&mut self, record: TailRecord, bytes_max: usize) {
        self.tail_bytes += weight(&record.batch);
        self.tail.push_back(record);
        while self.tail_bytes > bytes_max && self.tail.len() > 1 {
            let dropped = self.tail.pop_front().map_or(0, |r| weight(&r.batch));
            self.tail_bytes -= dropped;
        }
    }

    /// Keeps no record from a position on.
    pub(crate) fn forget_from(&mut self, from: Position) {
        while let Some(last) = self.tail.pop_back_if(|r| r.batch.position >= from) {
            self.tail_bytes -= weight(&last.batch);
        }
    }
}

fn weight(batch: &Batch) -> usize {
    64 + batch.entries.iter().map(|e| e.len() + 32).sum::<usize>()
}

/// A record in memory.
#[derive(Clone)]
pub struct TailRecord {
    /// What it is for.
    pub kind: RecordKind,
    /// Its entries in their place.
    pub batch: Batch,
}

/// What an engine has written of its own accord. Of several in one call, and of calls that were not answered, a crash may leave a
/// beginning.
#[derive(Clone, Debug)]
pub enum Write {
    /// A record of a kind that has a position, which must be the next one. Behind a seal too: as long as that may be taken away
    /// again, the log may go on.
    Record {
        /// What it is for.
        kind: RecordKind,
        /// Its place.
        position: Position,
        /// Its reign.
        epoch: Epoch,
        /// Its entries.
        entries: Vec<Bytes>,
    },
    /// A promise in the place of the one before.
    Vote(Vote),
    /// Takes everything from a position on away, which lies behind the base.
    Truncate {
        /// The first that is gone.
        from: Position,
    },
    /// Everything up to a position is gone; where the group does not reach so far it goes on behind it.
    Base {
        /// The last that is gone.
        position: Position,
        /// Its reign.
        epoch: Epoch,
        /// Who belongs to the group there. Needed where the group does not reach so far: what it knew itself is gone then.
        members: Option<Bytes>,
    },
    /// The group is gone for good.
    Remove,
}

impl Write {
    /// The record that it becomes.
    pub(crate) fn into_record(self, group: LogletId) -> Record {
        let (kind, position, epoch, entries) = match self {
            Write::Record { kind, position, epoch, entries } => (kind, position, epoch, entries),
            Write::Vote(Vote { epoch, content }) => (RecordKind::Vote, Position(0), epoch, vec![content]),
            Write::Truncate { from } => (RecordKind::Truncate, from, Epoch(0), vec![]),
            Write::Base { position, epoch, members } => {
                (RecordKind::Base, position, epoch, members.into_iter().collect())
            }
            Write::Remove => (RecordKind::Remove, Position(0), Epoch(0), vec![]),
        };
        Record { kind, group, position, epoch, entries }
    }

    /// Bytes of its entries, and how many those are.
    pub(crate) fn size(&self) -> (usize, usize) {
        match self {
            Write::Record { entries, .. } => (entries.iter().map(Bytes::len).sum(), entries.len()),
            Write::Vote(vote) => (vote.content.len(), 1),
            Write::Base { members, .. } => (members.as_ref().map_or(0, Bytes::len), 1),
            Write::Truncate { .. } | Write::Remove => (0, 0),
        }
    }
}

pub(crate) enum Command {
    Append {
        group: Arc<Group>,
        epoch: Epoch,
        entries: Vec<Bytes>,
        bytes: usize,
        decided: oneshot::Sender<Outcome>,
    },
    BeginEpoch {
        group: Arc<Group>,
        done: oneshot::Sender<Result<Epoch, LogFault>>,
    },
    Seal {
        group: Arc<Group>,
        done: oneshot::Sender<Result<Position, LogFault>>,
    },
    Write {
        group: Arc<Group>,
        writes: Vec<Write>,
        bytes: usize,
        done: oneshot::Sender<Result<(), LogFault>>,
    },
    Trim {
        done: oneshot::Sender<Result<(), LogFault>>,
    },
}

impl GroupState {
    /// Becomes what it is after a record, whose effect is known.
    pub(crate) fn change(&mut self, record: &Record, effect: Effect) {
        let (position, epoch) = (record.position, record.epoch);
        if self.is_revival(record) {
            *self = GroupState::default();
        }
        // Checked to have one where it is asked for.
        let content = || record.entries.first().cloned().expect("an entry");
        match effect {
            Effect::None => {}
            Effect::Next => self.next = position.next(),
            Effect::Cut(from) => self.next = from,
            Effect::Anew(at) => self.next = at,
        }
        match record.kind {
            RecordKind::Epoch if epoch < self.epoch => {}
            RecordKind::Epoch => self.epoch_position = position,
            // What engines put behind the first one counts for nobody; that one may be taken away again.
            RecordKind::Seal => self.sealed = self.sealed.or(Some(position)),
            RecordKind::Batch | RecordKind::Groups => {}
            RecordKind::Vote => self.vote = Some(Vote { epoch, content: content() }),
            RecordKind::Truncate => {
                self.members.retain(|(at, _)| *at < position);
                self.sealed = self.sealed.filter(|at| *at < position);
            }
            RecordKind::Members => self.members.push((position, content())),
            RecordKind::Base => {
                self.base = (position, epoch);
                let named = (!record.entries.is_empty()).then(|| (position, content()));
                let known = self.members.iter().rfind(|(at, _)| *at <= position).cloned();
                // What it threw away says nothing any more.
                let is_anew = matches!(effect, Effect::Anew(_));
                let known = known.filter(|_| !is_anew);
                self.sealed = self.sealed.filter(|_| !is_anew);
                self.members.retain(|(at, _)| *at > position && !is_anew);
                if let Some(members) = known.or(named) {
                    self.members.insert(0, members);
                }
            }
            RecordKind::Remove => {
                *self = GroupState { is_removed: true, ..GroupState::default() };
            }
        }
        self.epoch = self.epoch.max(if self.is_removed { Epoch(0) } else { epoch });
    }
}
