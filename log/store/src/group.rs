//! What an engine may do with a group of its own.

use std::sync::{Arc, atomic::Ordering};

use bytes::Bytes;
use clutch_log::{Commit, Epoch, LogFault, LogletId, NodeId, Position, Rejected, check_batch};
use tokio::sync::{mpsc, oneshot, watch};

use crate::{
    reader::GroupReader,
    shared::{Handle, Options},
    state::{Command, Group, GroupState, TailRecord, Write},
    vote::Vote,
};

/// How a group stands. Vote, base and members are as they were written last, and durable when that was answered.
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
    pub(crate) handle: Handle,
    pub(crate) group: Arc<Group>,
}

impl StoredGroup {
    /// Its id.
    pub fn id(&self) -> LogletId {
        self.group.id
    }

    /// How its store behaves.
    pub fn options(&self) -> &Options {
        &self.handle.shared.options
    }

    /// Why its store stopped, if it has.
    pub fn failed(&self) -> Option<String> {
        self.handle.failed()
    }

    /// The fault of a store that has stopped.
    pub fn stopped(&self) -> LogFault {
        self.handle.stopped()
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
        self.handle.shared.first_position(self.group.id)
    }

    /// Bytes that wait for the writer, of all groups.
    pub fn queued_bytes(&self) -> usize {
        self.handle.shared.queued_bytes.load(Ordering::Relaxed)
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
        if let Some(reason) = self.handle.failed() {
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
        (state.resigned != state.epoch).then_some(self.handle.shared.options.node)
    }

    fn enqueue(&self, command: Command, bytes: usize) -> Result<(), Rejected> {
        let shared = &self.handle.shared;
        if shared.queued_bytes.load(Ordering::Relaxed) + bytes > shared.options.queued_bytes_max {
            return Err(Rejected::Overloaded);
        }
        // Counted before it is sent, so that the writer never subtracts first.
        shared.queued_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.handle.commands.try_send(command).map_err(|error| {
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
        self.handle.command(Command::BeginEpoch { group: self.group.clone(), done }).await?;
        self.handle.answer(answer).await?
    }

    /// Ends the group; idempotent.
    ///
    /// # Errors
    /// [`LogFault::NoRoom`] or [`LogFault::Storage`] when that cannot be written.
    pub async fn seal(&self) -> Result<Position, LogFault> {
        let (done, answer) = oneshot::channel();
        self.handle.command(Command::Seal { group: self.group.clone(), done }).await?;
        self.handle.answer(answer).await?
    }

    /// Writes records of an engine that gives out positions itself. Calls keep their order; the future resolves when all of it
    /// is durable.
    ///
    /// # Errors
    /// [`LogFault::Unsupported`] where it does not follow on what is there, [`LogFault::NoRoom`] where too much waits already: nothing
    /// of it is written then. [`LogFault::Storage`] when the store has stopped; how much is written is not known. Where the disk has no
    /// room it waits until there is.
    pub fn write(&self, writes: Vec<Write>) -> impl Future<Output = Result<(), LogFault>> + Send + use<> {
        let bytes = writes.iter().map(|write| write.size().0).sum();
        let (done, answer) = oneshot::channel();
        let sent = self.enqueue(Command::Write { group: self.group.clone(), writes, bytes, done }, bytes);
        let handle = self.handle.clone();
        async move {
            match sent {
                Ok(()) => handle.answer(answer).await?,
                Err(Rejected::Overloaded) => {
                    Err(LogFault::NoRoom("too much waits to be written; try again when something is".into()))
                }
                Err(_) => Err(handle.stopped()),
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
        self.handle.trim().await
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
            self.disk.get_or_insert_with(|| GroupReader::new(group.handle.shared.clone(), group.group.id));
        let record = reader.at(position)?;
        Ok(record.map(|record| TailRecord { kind: record.kind, batch: record.into_batch() }))
    }

    /// Gives back what reading from the segments takes.
    pub fn rest(&mut self) {
        self.disk = None;
    }
}
