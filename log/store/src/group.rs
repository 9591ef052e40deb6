//! One group: its state in memory, and what its engine may do with it.

use std::{
    collections::VecDeque,
    sync::{Arc, atomic::Ordering},
};

use bytes::Bytes;
use clutch_log::{Batch, Commit, Epoch, LogFault, NodeId, Outcome, Position, Rejected, check_batch};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot, watch};

use crate::{GroupId, Record, RecordKind, Store, Vote, format::GroupLine, reader::GroupReader};

/// A group as the writer and the handles share it.
pub(crate) struct Group {
    pub(crate) id: GroupId,
    pub(crate) state: Mutex<GroupState>,
    /// Last durable position; readers wait on it.
    pub(crate) last: watch::Sender<Position>,
}

impl Group {
    pub(crate) fn new(id: GroupId, state: GroupState) -> Group {
        let last = watch::Sender::new(Position(state.next.0.saturating_sub(1)));
        Group { id, state: Mutex::new(state), last }
    }
}

#[derive(Default)]
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

impl GroupState {
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
    pub(crate) fn line(&self, group: GroupId) -> GroupLine {
        GroupLine {
            group,
            last: Position(self.next.0 - 1),
            epoch: self.epoch,
            sealed: self.sealed,
            base: self.base,
            vote: self.vote.clone(),
            members: self.members.clone(),
            is_removed: self.is_removed,
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
    /// A record of a kind that has a position, which must be the next one.
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
        /// Who belongs to the group there, unless that is known from its own records.
        members: Option<Bytes>,
    },
    /// The group is gone for good.
    Remove,
}

impl Write {
    /// The record that it becomes.
    pub(crate) fn into_record(self, group: GroupId) -> Record {
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

/// How a group stands.
#[derive(Clone, Debug)]
pub struct View {
    /// The newest reign.
    pub epoch: Epoch,
    /// The last durable position.
    pub last: Position,
    /// Where it was sealed.
    pub sealed: Option<Position>,
    /// Everything up to there is gone, and of which reign that was.
    pub base: (Position, Epoch),
    /// What its engine has promised.
    pub vote: Option<Vote>,
    /// Who belonged to it from each position on: the newest up to the base, and all after it.
    pub members: Vec<(Position, Bytes)>,
}

/// What a reader sees without the disk.
pub struct Look {
    /// The record that it asked for, where it is in memory.
    pub record: Option<TailRecord>,
    /// The newest reign, and where it began.
    pub epoch: (Epoch, Position),
    /// The reign that was given up.
    pub resigned: Epoch,
    /// Where the group was sealed.
    pub sealed: Option<Position>,
}

/// A group that is open; cheap to clone.
#[derive(Clone)]
pub struct StoredGroup {
    pub(crate) store: Store,
    pub(crate) group: Arc<Group>,
}

impl StoredGroup {
    /// Its id.
    pub fn id(&self) -> GroupId {
        self.group.id
    }

    /// The store that it lies in.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The last durable position, and whoever waits for another.
    pub fn last(&self) -> watch::Receiver<Position> {
        self.group.last.subscribe()
    }

    /// How it stands.
    pub fn view(&self) -> View {
        let last = *self.group.last.borrow();
        let state = self.group.state.lock();
        View {
            epoch: state.epoch,
            last,
            sealed: state.sealed,
            base: state.base,
            vote: state.vote.clone(),
            members: state.members.clone(),
        }
    }

    /// The first position that can be read.
    pub fn first(&self) -> Position {
        self.store.shared.first_position(self.group.id)
    }

    /// Bytes that wait for the writer, of all groups.
    pub fn queued_bytes(&self) -> usize {
        self.store.shared.queued_bytes.load(Ordering::Relaxed)
    }

    /// Appends a batch at the next position if the reign is the newest, and not given up, when it is written. Does not wait;
    /// batches keep their order.
    ///
    /// # Errors
    /// [`Rejected`]: it is certainly not written.
    pub fn append(&self, epoch: Epoch, batch: Vec<Bytes>) -> Result<Commit, Rejected> {
        self.append_in(epoch, epoch, batch)
    }

    /// The same, for a handle that has a reign of its own.
    ///
    /// # Errors
    /// [`Rejected`]: it is certainly not written.
    pub fn append_in(&self, epoch: Epoch, own: Epoch, batch: Vec<Bytes>) -> Result<Commit, Rejected> {
        let bytes = check_batch(&batch)?;
        if let Some(reason) = self.store.failed() {
            return Err(Rejected::Stopped(reason));
        }
        {
            let state = self.group.state.lock();
            if state.sealed.is_some() {
                return Err(Rejected::Sealed);
            }
            if state.epoch != epoch || own != epoch || state.resigned == epoch {
                return Err(Rejected::NotLeader { epoch, hint: self.leader(&state) });
            }
        }
        let (decided, commit) = Commit::pair();
        let group = self.group.clone();
        self.enqueue(Command::Append { group, epoch, entries: batch, bytes, decided }, bytes)?;
        Ok(commit)
    }

    fn leader(&self, state: &GroupState) -> Option<NodeId> {
        (state.resigned != state.epoch).then_some(self.store.shared.options.node)
    }

    fn enqueue(&self, command: Command, bytes: usize) -> Result<(), Rejected> {
        let shared = &self.store.shared;
        if shared.queued_bytes.load(Ordering::Relaxed) + bytes > shared.options.queued_bytes_max {
            return Err(Rejected::Overloaded);
        }
        // Counted before it is sent, so that the writer never subtracts first.
        shared.queued_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.store.commands.try_send(command).map_err(|error| {
            shared.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
            match error {
                mpsc::error::TrySendError::Full(_) => Rejected::Overloaded,
                mpsc::error::TrySendError::Closed(_) => Rejected::Stopped("the writer has ended".into()),
            }
        })
    }

    /// Begins the next reign with a record of its own, if the group is not sealed.
    ///
    /// # Errors
    /// [`LogFault::NoRoom`] or [`LogFault::Storage`] when it cannot be written.
    pub async fn begin_epoch(&self) -> Result<Epoch, LogFault> {
        let (done, answer) = oneshot::channel();
        self.store.command(Command::BeginEpoch { group: self.group.clone(), done }).await?;
        self.store.answer(answer).await?
    }

    /// Ends the group; idempotent.
    ///
    /// # Errors
    /// [`LogFault::NoRoom`] or [`LogFault::Storage`] when that cannot be written.
    pub async fn seal(&self) -> Result<Position, LogFault> {
        let (done, answer) = oneshot::channel();
        self.store.command(Command::Seal { group: self.group.clone(), done }).await?;
        self.store.answer(answer).await?
    }

    /// Writes records of an engine that gives out positions itself. Calls keep their order; the future resolves when all of it
    /// is durable.
    ///
    /// # Errors
    /// [`LogFault::Unsupported`] where it does not follow on what is there, [`LogFault::NoRoom`] where there is none: nothing
    /// of it is written then. [`LogFault::Storage`] when the store has stopped; how much is written is not known.
    pub fn write(&self, writes: Vec<Write>) -> impl Future<Output = Result<(), LogFault>> + Send + use<> {
        let bytes = writes.iter().map(|write| write.size().0).sum();
        let (done, answer) = oneshot::channel();
        let sent = self.enqueue(Command::Write { group: self.group.clone(), writes, bytes, done }, bytes);
        let store = self.store.clone();
        async move {
            match sent {
                Ok(()) => store.answer(answer).await?,
                Err(Rejected::Overloaded) => {
                    Err(LogFault::NoRoom("too much waits to be written; try again when something is".into()))
                }
                Err(_) => Err(store.stopped()),
            }
        }
    }

    /// The replica needs nothing up to there: segments that no group needs are removed.
    ///
    /// # Errors
    /// [`LogFault::Storage`] where a file cannot be removed; it is tried again with the next one.
    pub async fn set_floor(&self, floor: Position) -> Result<(), LogFault> {
        {
            let mut state = self.group.state.lock();
            state.floor = state.floor.max(floor);
        }
        self.store.trim().await
    }

    /// Nothing more is appended in a reign, if it is the newest.
    pub fn give_up(&self, epoch: Epoch) {
        {
            let mut state = self.group.state.lock();
            if state.epoch != epoch {
                return;
            }
            state.resigned = epoch;
        }
        // Wakes the readers: the position is the same.
        self.group.last.send_modify(|_| {});
    }

    /// What can be said of a position without the disk; records behind `durable` are not shown.
    pub fn look(&self, position: Position, durable: Position) -> Look {
        let state = self.group.state.lock();
        // The tail has no holes, so the place of a position in it is known.
        let found = state.tail.front().filter(|f| f.batch.position <= position).and_then(|f| {
            let at = (position.0 - f.batch.position.0) as usize;
            state.tail.get(at).filter(|r| r.batch.position <= durable)
        });
        Look {
            record: found.cloned(),
            epoch: (state.epoch, state.epoch_position),
            resigned: state.resigned,
            sealed: state.sealed,
        }
    }

    /// Reads records of the group, wherever they are.
    pub fn cursor(&self) -> Cursor {
        Cursor { group: self.clone(), disk: None }
    }
}

/// Reads a group from memory and from its segments.
pub struct Cursor {
    group: StoredGroup,
    disk: Option<GroupReader>,
}

impl Cursor {
    /// The record at a position; `None` where there is none. May block on the disk.
    ///
    /// # Errors
    /// [`LogFault::Corrupt`] where it is damaged.
    pub fn at(&mut self, position: Position) -> Result<Option<TailRecord>, LogFault> {
        let durable = *self.group.group.last.borrow();
        if let Some(record) = self.group.look(position, durable).record {
            self.disk = None;
            return Ok(Some(record));
        }
        self.stored(position)
    }

    /// The same, from the segments.
    ///
    /// # Errors
    /// [`LogFault::Corrupt`] where it is damaged.
    pub fn stored(&mut self, position: Position) -> Result<Option<TailRecord>, LogFault> {
        let group = &self.group;
        let reader =
            self.disk.get_or_insert_with(|| GroupReader::new(group.store.shared.clone(), group.group.id));
        let record = reader.at(position)?;
        Ok(record.map(|record| TailRecord { kind: record.kind, batch: record.into_batch() }))
    }

    /// Gives back what reading from the segments takes.
    pub fn rest(&mut self) {
        self.disk = None;
    }
}
