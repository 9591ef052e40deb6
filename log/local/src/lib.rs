//! The `local` log engine: all logs of a node in one sequence of segment files, one writer, one sync for all.
//!
//! Invariants:
//! * A batch is acknowledged only after the sync that covers it.
//! * A failed sync is final: everything waiting becomes unknown and the engine stops.
//! * What lies before the durable mark was synced; damage there is an error with a position, never dropped.
//!   What lies after it was never acknowledged; damage there is a torn tail and is cut off.
//! * Every opening of a log begins a new epoch with a record of its own.
//! * Positions of a log have no holes; one that is missing is damage, found when the engine opens wherever a segment was
//!   replaced or cut, and at the latest when it is read.

mod continuity;
pub mod cut;
mod format;
mod reader;
mod recovery;
mod unfinished;
mod writer;

use std::{
    collections::{BTreeMap, VecDeque},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use clutch_log::{
    Batch, Bounds, Commit, ConfigId, Epoch, Event, Events, Floors, Log, LogFault, LogId, Member, NodeId,
    Outcome, Position, Progress, Rejected, Status, check_batch,
};
use clutch_runtime::{Disk, Runtime};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot, watch};

pub use continuity::Continuity;
pub use format::{RECORD_HEADER_BYTES, Record, RecordKind, SEGMENT_HEADER_BYTES};
pub use reader::SegmentReader;
pub use recovery::{Summary, open_read_only};

/// How an engine behaves.
#[derive(Clone, Debug)]
pub struct Options {
    /// A segment file is closed when it is larger than this.
    pub segment_bytes_max: u64,
    /// Bytes of recent batches that each log keeps in memory for its readers.
    pub tail_bytes_max: usize,
    /// Bytes that may wait for the writer before proposals are refused as overloaded.
    pub queued_bytes_max: usize,
    /// Commands that one write takes along.
    pub commands_max: usize,
    /// The cluster that the segments belong to; segments of another are refused.
    pub cluster: u64,
    /// The node that writes, for those who ask who leads.
    pub node: NodeId,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            segment_bytes_max: 64 << 20,
            tail_bytes_max: 8 << 20,
            queued_bytes_max: 64 << 20,
            commands_max: 1024,
            cluster: 0,
            node: 1,
        }
    }
}

/// All logs of a node.
///
/// The writer ends when the engine and every log of it are dropped.
pub struct LocalEngine {
    handle: Handle,
}

/// What a log's user holds: the writer has [`Shared`] alone, so that it ends with the last handle.
#[derive(Clone)]
struct Handle {
    shared: Arc<Shared>,
    commands: mpsc::Sender<Command>,
}

struct Shared {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    options: Options,
    queued_bytes: AtomicUsize,
    groups: Mutex<BTreeMap<LogId, Arc<Group>>>,
    /// Segments on disk, oldest first, with what each holds.
    segments: Mutex<Vec<Segment>>,
    failed: Mutex<Option<String>>,
}

/// A segment file and, for every log, the first and last position in it.
#[derive(Clone, Debug, Default)]
struct Segment {
    number: u64,
    spans: BTreeMap<LogId, (Position, Position)>,
    /// Bytes of its file.
    bytes: u64,
}

/// One log.
struct Group {
    id: LogId,
    state: Mutex<GroupState>,
    /// Last durable position; readers wait on it.
    last: watch::Sender<Position>,
}

#[derive(Default)]
struct GroupState {
    epoch: Epoch,
    epoch_position: Position,
    /// The reign that was given up; none follows before the log is opened again.
    resigned: Epoch,
    /// The position that the writer gives out next.
    next: Position,
    sealed: Option<Position>,
    /// Up to here the replica needs nothing.
    floor: Position,
    /// Recent records, oldest first, without holes up to the last durable one.
    tail: VecDeque<TailRecord>,
    tail_bytes: usize,
}

#[derive(Clone)]
struct TailRecord {
    kind: RecordKind,
    batch: Batch,
}

enum Command {
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
    Trim {
        done: oneshot::Sender<Result<(), LogFault>>,
    },
}

impl LocalEngine {
    /// Opens the engine on a directory and recovers what is there. Blocks on the disk.
    ///
    /// # Errors
    /// [`LogFault::Corrupt`] when a synced record is damaged in a segment that recovery reads, or when positions of a log
    /// are missing; [`LogFault::Storage`] when a file is missing or cannot be read.
    pub fn open(runtime: &Runtime, dir: PathBuf, options: Options) -> Result<LocalEngine, LogFault> {
        let recovered = recovery::recover(&*runtime.disk, &dir, options.cluster)?;
        recovered.check();
        let (commands, receiver) = mpsc::channel(4096);
        let groups = recovered.groups.into_iter().map(|(id, state)| {
            let last = Position(state.next.0 - 1);
            (id, Arc::new(Group { id, state: Mutex::new(state), last: watch::Sender::new(last) }))
        });
        let shared = Arc::new(Shared {
            disk: runtime.disk.clone(),
            dir,
            options,
            queued_bytes: AtomicUsize::new(0),
            groups: Mutex::new(groups.collect()),
            segments: Mutex::new(recovered.segments),
            failed: Mutex::new(None),
        });
        let writer = writer::Writer::new(&shared, recovered.current, recovered.mark);
        runtime.spawner.spawn_owner("log-writer".into(), Box::pin(writer.run(receiver)));
        Ok(LocalEngine { handle: Handle { shared, commands } })
    }

    /// What a log holds, without opening it; `None` when there is none of that id.
    pub fn bounds(&self, id: LogId) -> Option<Bounds> {
        let group = self.handle.shared.groups.lock().get(&id).cloned()?;
        let last = *group.last.borrow();
        Some(Bounds { first: self.handle.shared.first_position(id), last })
    }

    /// Bytes of all segments.
    pub fn bytes(&self) -> u64 {
        self.handle.shared.segments.lock().iter().map(|segment| segment.bytes).sum()
    }

    /// The batch at a position, without opening its log; `None` when a record of the engine lies there. Blocks on the disk.
    pub fn batch(&self, id: LogId, position: Position) -> Result<Option<Batch>, LogFault> {
        let shared = &self.handle.shared;
        let holds =
            |s: &&Segment| s.spans.get(&id).is_some_and(|(first, last)| (*first..=*last).contains(&position));
        let number = shared.segments.lock().iter().find(holds).map(|segment| segment.number);
        let Some(number) = number else { return Ok(None) };
        let mut reader = reader::GroupReader::new(shared.disk.clone(), shared.dir.clone(), id, vec![number]);
        let record = reader.next_from(position)?;
        Ok(record.filter(|record| record.kind == RecordKind::Batch).map(Record::into_batch))
    }

    /// Opens one log and begins a new epoch in it; the log is made if there is none of that id.
    pub async fn log(&self, id: LogId) -> Result<Arc<dyn Log>, LogFault> {
        let group = self
            .handle
            .shared
            .groups
            .lock()
            .entry(id)
            .or_insert_with(|| {
                let state = GroupState { next: Position(1), ..GroupState::default() };
                Arc::new(Group { id, state: Mutex::new(state), last: watch::Sender::new(Position(0)) })
            })
            .clone();
        let (done, answer) = oneshot::channel();
        self.handle.command(Command::BeginEpoch { group: group.clone(), done }).await?;
        let epoch = self.handle.answer(answer).await??;
        Ok(Arc::new(LocalLog { handle: self.handle.clone(), group, epoch }))
    }
}

impl Handle {
    async fn command(&self, command: Command) -> Result<(), LogFault> {
        self.commands.send(command).await.map_err(|_| self.shared.stopped())
    }

    async fn answer<T>(&self, answer: oneshot::Receiver<T>) -> Result<T, LogFault> {
        answer.await.map_err(|_| self.shared.stopped())
    }
}

impl Shared {
    fn stopped(&self) -> LogFault {
        LogFault::Storage(self.failed.lock().clone().unwrap_or_else(|| "the writer has ended".into()))
    }

    /// The first position that a segment still has; the one after the last when none has any.
    fn first_position(&self, id: LogId) -> Position {
        let first = {
            let segments = self.segments.lock();
            segments.iter().filter_map(|s| s.spans.get(&id)).map(|(first, _)| *first).next()
        };
        first.unwrap_or_else(|| self.groups.lock().get(&id).map_or(Position(1), |g| g.last.borrow().next()))
    }
}

struct LocalLog {
    handle: Handle,
    group: Arc<Group>,
    /// The reign that began when this handle was opened; a later handle ends it.
    epoch: Epoch,
}

#[async_trait]
impl Log for LocalLog {
    fn propose(&self, epoch: Epoch, batch: Vec<Bytes>) -> Result<Commit, Rejected> {
        let bytes = check_batch(&batch)?;
        if let Some(reason) = self.handle.shared.failed.lock().clone() {
            return Err(Rejected::Stopped(reason));
        }
        {
            let state = self.group.state.lock();
            if state.sealed.is_some() {
                return Err(Rejected::Sealed);
            }
            if state.epoch != epoch || self.epoch != epoch || state.resigned == epoch {
                return Err(Rejected::NotLeader { epoch, hint: self.leader(&state) });
            }
        }
        if self.handle.shared.queued_bytes.load(Ordering::Relaxed) + bytes
            > self.handle.shared.options.queued_bytes_max
        {
            return Err(Rejected::Overloaded);
        }
        let (decided, commit) = Commit::pair();
        let command = Command::Append { group: self.group.clone(), epoch, entries: batch, bytes, decided };
        // Counted before it is sent, so that the writer never subtracts first.
        self.handle.shared.queued_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.handle.commands.try_send(command).map_err(|error| {
            self.handle.shared.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
            match error {
                mpsc::error::TrySendError::Full(_) => Rejected::Overloaded,
                mpsc::error::TrySendError::Closed(_) => Rejected::Stopped("the writer has ended".into()),
            }
        })?;
        Ok(commit)
    }

    fn events(&self, from: Position) -> Box<dyn Events> {
        Box::new(LocalEvents {
            shared: self.handle.shared.clone(),
            group: self.group.clone(),
            last: self.group.last.subscribe(),
            next: from.max(Position(1)),
            told: (Epoch(0), false),
            own_epoch: self.epoch,
            sealed_told: false,
            disk: None,
        })
    }

    async fn read_barrier(&self, _patience: Duration) -> Result<Position, LogFault> {
        // There is nobody to be asked: what is durable here is all that can have been acknowledged.
        let has_failed = self.handle.shared.failed.lock().is_some();
        match has_failed {
            true => Err(self.handle.shared.stopped()),
            false => Ok(*self.group.last.borrow()),
        }
    }

    async fn seal(&self) -> Result<Position, LogFault> {
        let (done, answer) = oneshot::channel();
        self.handle.command(Command::Seal { group: self.group.clone(), done }).await?;
        self.handle.answer(answer).await?
    }

    async fn set_floors(&self, floors: Floors) -> Result<(), LogFault> {
        let last = *self.group.last.borrow();
        floors.check(last).unwrap_or_else(|what| panic!("floors of {}: {what}", self.group.id));
        {
            let mut state = self.group.state.lock();
            state.floor = state.floor.max(floors.trim());
        }
        let (done, answer) = oneshot::channel();
        self.handle.command(Command::Trim { done }).await?;
        self.handle.answer(answer).await?
    }

    async fn transfer_leader(&self, _to: NodeId) -> Result<(), LogFault> {
        Err(LogFault::Unsupported(
            "the local engine has one node; there is nobody to hand leadership to".into(),
        ))
    }

    fn resign(&self) {
        {
            let mut state = self.group.state.lock();
            if state.epoch != self.epoch {
                return;
            }
            state.resigned = self.epoch;
        }
        // Wakes the readers: the position is the same.
        self.group.last.send_modify(|_| {});
    }

    async fn reconfigure(&self, _expect: ConfigId, _members: Vec<Member>) -> Result<ConfigId, LogFault> {
        Err(LogFault::Unsupported("the local engine has one node; its members are fixed".into()))
    }

    fn status(&self) -> Status {
        let shared = &self.handle.shared;
        let bounds = Bounds { first: shared.first_position(self.group.id), last: *self.group.last.borrow() };
        let (epoch, leader, sealed) = {
            let state = self.group.state.lock();
            (state.epoch, self.leader(&state), state.sealed)
        };
        let member = Member { node: shared.options.node, voter: true };
        Status {
            epoch,
            leader,
            is_self: leader.is_some() && epoch == self.epoch,
            bounds,
            sealed,
            config: ConfigId::default(),
            members: vec![Progress { member, matched: Some(bounds.last) }],
            queued_bytes: shared.queued_bytes.load(Ordering::Relaxed) as u64,
            fault: shared.failed.lock().clone(),
        }
    }
}

impl LocalLog {
    /// This node, through whichever handle, unless the reign was given up.
    fn leader(&self, state: &GroupState) -> Option<NodeId> {
        (state.resigned != state.epoch).then_some(self.handle.shared.options.node)
    }
}

/// A reader: recent records from memory, older ones from the segments.
struct LocalEvents {
    shared: Arc<Shared>,
    group: Arc<Group>,
    last: watch::Receiver<Position>,
    next: Position,
    /// The reign that was told last, and whether it was said to be this handle's.
    told: (Epoch, bool),
    own_epoch: Epoch,
    sealed_told: bool,
    disk: Option<reader::GroupReader>,
}

impl LocalEvents {
    /// What follows without waiting; `None` at the end of the log.
    fn ready(&mut self) -> Result<Option<Event>, LogFault> {
        let durable = *self.last.borrow_and_update();
        let (record, epoch, epoch_position, resigned, sealed) = {
            let state = self.group.state.lock();
            // The tail has no holes, so the place of a position in it is known.
            let found = state.tail.front().filter(|f| f.batch.position <= self.next).and_then(|f| {
                state
                    .tail
                    .get((self.next.0 - f.batch.position.0) as usize)
                    .filter(|r| r.batch.position <= durable)
            });
            (found.cloned(), state.epoch, state.epoch_position, state.resigned, state.sealed)
        };
        let (told, led) = self.told;
        if led && (told < epoch || resigned == told) {
            self.told = (told, false);
            return Ok(Some(Event::Leader { epoch: told, leader: None, is_self: false }));
        }
        if told < epoch && self.next > epoch_position && durable >= epoch_position {
            let is_self = epoch == self.own_epoch && resigned != epoch;
            self.told = (epoch, is_self);
            let leader = (resigned != epoch).then_some(self.shared.options.node);
            return Ok(Some(Event::Leader { epoch, leader, is_self }));
        }
        if self.next > durable {
            return Ok(match sealed {
                Some(tail) if !self.sealed_told && durable >= tail => {
                    self.sealed_told = true;
                    Some(Event::Sealed { tail })
                }
                _ => None,
            });
        }
        let record = match record {
            Some(record) => {
                self.disk = None;
                record
            }
            None => match self.read_disk()? {
                Some(record) => record,
                // The segment was removed between the look and the read, or the tail moved on: look again.
                None => match self.read_disk()? {
                    Some(record) => record,
                    None => {
                        let text = format!("position {} of {} is in no segment", self.next, self.group.id);
                        return Err(LogFault::Storage(text));
                    }
                },
            },
        };
        let position = record.batch.position;
        assert_eq!(position, self.next, "the tail has no holes, and the reader refuses them");
        self.next = position.next();
        Ok(Some(match record.kind {
            RecordKind::Batch => Event::Committed(record.batch),
            RecordKind::Epoch | RecordKind::Seal | RecordKind::Groups => Event::Gap { to: position },
        }))
    }

    fn read_disk(&mut self) -> Result<Option<TailRecord>, LogFault> {
        let first = self.shared.first_position(self.group.id);
        if self.next < first {
            return Err(LogFault::Trimmed { asked: self.next, first });
        }
        if self.disk.is_none() {
            let segments = self.shared.segments.lock();
            let numbers: Vec<u64> = segments
                .iter()
                .filter(|s| s.spans.get(&self.group.id).is_some_and(|(_, last)| *last >= self.next))
                .map(|s| s.number)
                .collect();
            drop(segments);
            self.disk = Some(reader::GroupReader::new(
                self.shared.disk.clone(),
                self.shared.dir.clone(),
                self.group.id,
                numbers,
            ));
        }
        let Some(disk) = &mut self.disk else { return Ok(None) };
        let record = disk.next_from(self.next)?;
        if record.is_none() {
            // The list of segments has grown since.
            self.disk = None;
        }
        Ok(record.map(|r| TailRecord { kind: r.kind, batch: r.into_batch() }))
    }
}

#[async_trait]
impl Events for LocalEvents {
    async fn next(&mut self) -> Result<Event, LogFault> {
        loop {
            if let Some(event) = self.ready()? {
                return Ok(event);
            }
            if let Some(reason) = self.shared.failed.lock().clone() {
                return Err(LogFault::Storage(reason));
            }
            if self.last.changed().await.is_err() {
                return Err(self.shared.stopped());
            }
        }
    }
}

#[cfg(test)]
mod tests;
