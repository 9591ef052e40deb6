//! The `local` log engine: all logs of a node in one store, with one writer and one sync for all, and nobody else to agree with.
//!
//! Invariants:
//! * A batch is acknowledged only after the sync that covers it ([`clutch_log_store`]).
//! * Every opening of a log begins a new epoch with a record of its own.
//! * There is one copy of each log. Where a record is damaged nothing is opened: what to do about it is for an operator to say.

use std::{path::PathBuf, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use clutch_log::{
    Batch, Bounds, Commit, ConfigId, Engine, Epoch, Event, Events, Floors, Log, LogFault, LogletId,
    LogletSpec, Member, NodeId, Position, Progress, Purpose, Rejected, Snapshots, Status, Usage,
};
use clutch_log_store::{Cursor, Look, Store, StoredGroup};
use clutch_runtime::Runtime;
use tokio::sync::watch;

pub use clutch_log_store::{
    Continuity, Options, RECORD_HEADER_BYTES, Record, RecordKind, SEGMENT_HEADER_BYTES, SegmentReader,
    Summary, cut, open_read_only,
};

/// All logs of a node.
///
/// The writer ends when the engine and every log of it are dropped.
pub struct LocalEngine {
    store: Store,
}

impl LocalEngine {
    /// Opens the engine on a directory and recovers what is there. Blocks on the disk.
    ///
    /// # Errors
    /// [`LogFault::Corrupt`] when a synced record is damaged in a segment that recovery reads, or when positions of a log
    /// are missing; [`LogFault::Storage`] when a file is missing or cannot be read.
    pub fn open(runtime: &Runtime, dir: PathBuf, options: Options) -> Result<LocalEngine, LogFault> {
        let options = Options { may_quarantine: false, ..options };
        Ok(LocalEngine { store: Store::open(runtime, dir, options)? })
    }

    /// What a log holds, without opening it; `None` when there is none of that id.
    pub fn bounds(&self, id: impl Into<LogletId>) -> Option<Bounds> {
        self.store.bounds(id)
    }

    /// The batch at a position, without opening its log; `None` when a record of the engine lies there. Blocks on the disk.
    pub fn batch(&self, id: impl Into<LogletId>, position: Position) -> Result<Option<Batch>, LogFault> {
        let record = self.store.record(id, position)?;
        Ok(record.filter(|record| record.kind == RecordKind::Batch).map(Record::into_batch))
    }

    /// Opens one log and begins a new epoch in it; the log is made if there is none of that id.
    pub async fn log(&self, id: impl Into<LogletId>) -> Result<Arc<dyn Log>, LogFault> {
        let group = self.store.group(id)?;
        let epoch = group.begin_epoch().await?;
        Ok(Arc::new(LocalLog { group, epoch, ended: None }))
    }

    /// A loglet that others follow. There is one copy of it: what is missing here is missing.
    fn ended(&self, id: LogletId, upto: Position) -> Result<Arc<dyn Log>, LogFault> {
        let last = self.store.bounds(id).map_or(Position(0), |bounds| bounds.last);
        if last < upto {
            return Err(LogFault::Storage(format!(
                "{id} has {last} records, and its chain counts {upto}: the others are missing. Put back the directory of \
                 logs that has them"
            )));
        }
        // No reign of it is this handle's.
        Ok(Arc::new(LocalLog { group: self.store.group(id)?, epoch: Epoch(0), ended: Some(upto) }))
    }
}

#[async_trait]
impl Engine for LocalEngine {
    async fn open_loglet(
        &self,
        id: LogletId,
        _: &LogletSpec,
        purpose: Purpose,
        _: Arc<dyn Snapshots>,
    ) -> Result<Arc<dyn Log>, LogFault> {
        match purpose {
            Purpose::Append => self.log(id).await,
            Purpose::Read { upto } => self.ended(id, upto),
        }
    }

    async fn remove(&self, id: LogletId) -> Result<(), LogFault> {
        self.store.remove(id).await
    }

    fn loglets(&self) -> Vec<LogletId> {
        self.store.groups()
    }

    fn bounds(&self, id: LogletId) -> Option<Bounds> {
        LocalEngine::bounds(self, id)
    }

    fn batch(&self, id: LogletId, index: Position) -> Result<Option<Batch>, LogFault> {
        LocalEngine::batch(self, id, index)
    }

    fn usage(&self) -> Usage {
        self.store.usage()
    }
}

struct LocalLog {
    group: StoredGroup,
    /// The reign that began when this handle was opened; a later handle ends it.
    epoch: Epoch,
    /// Where others follow this loglet: the last record that counts.
    ended: Option<Position>,
}

#[async_trait]
impl Log for LocalLog {
    fn propose(&self, epoch: Epoch, batch: Vec<Bytes>) -> Result<Commit, Rejected> {
        self.group.append_in(epoch, self.epoch, batch)
    }

    fn events(&self, from: Position) -> Box<dyn Events> {
        Box::new(LocalEvents {
            group: self.group.clone(),
            last: self.group.last(),
            next: from.max(Position(1)),
            told: (Epoch(0), false),
            own_epoch: self.epoch,
            sealed_told: false,
            cursor: self.group.cursor(),
        })
    }

    async fn read_barrier(&self, _patience: Duration) -> Result<Position, LogFault> {
        // There is nobody to be asked: what is durable here is all that can have been acknowledged.
        match self.group.failed() {
            Some(_) => Err(self.group.stopped()),
            None => Ok(*self.group.last().borrow()),
        }
    }

    async fn seal(&self) -> Result<Position, LogFault> {
        self.group.seal().await
    }

    async fn set_floors(&self, floors: Floors) -> Result<(), LogFault> {
        let last = *self.group.last().borrow();
        floors.check(last).unwrap_or_else(|what| panic!("floors of {}: {what}", self.group.id()));
        // Behind what counts there may be records of a life that was given up: nobody wants them either, and while they
        // stayed, no segment of any log behind them could go.
        let is_over = self.ended.is_some_and(|ended| floors.trim() >= ended);
        self.group.set_floor(if is_over { last } else { floors.trim() }).await
    }

    async fn transfer_leader(&self, _to: NodeId) -> Result<(), LogFault> {
        Err(LogFault::Unsupported(
            "the local engine has one node; there is nobody to hand leadership to".into(),
        ))
    }

    fn resign(&self) {
        self.group.give_up(self.epoch);
    }

    async fn reconfigure(&self, _expect: ConfigId, _members: Vec<Member>) -> Result<ConfigId, LogFault> {
        Err(LogFault::Unsupported("the local engine has one node; its members are fixed".into()))
    }

    fn status(&self) -> Status {
        let bounds = Bounds { first: self.group.first(), last: *self.group.last().borrow() };
        let Look { epoch: (epoch, _), resigned, sealed, .. } = self.group.look(Position(0), Position(0));
        let node = self.group.options().node;
        // This node, through whichever handle, unless the reign was given up.
        let leader = (resigned != epoch).then_some(node);
        Status {
            epoch,
            leader,
            is_self: leader.is_some() && epoch == self.epoch,
            bounds,
            sealed,
            config: ConfigId::default(),
            members: vec![Progress {
                member: Member { node, voter: true },
                matched: Some(bounds.last),
                is_heard: true,
            }],
            changes_kept: 0,
            queued_bytes: self.group.queued_bytes() as u64,
            fault: self.group.failed(),
        }
    }
}

/// A reader: recent records from memory, older ones from the segments.
struct LocalEvents {
    group: StoredGroup,
    last: watch::Receiver<Position>,
    next: Position,
    /// The reign that was told last, and whether it was said to be this handle's.
    told: (Epoch, bool),
    own_epoch: Epoch,
    sealed_told: bool,
    cursor: Cursor,
}

impl LocalEvents {
    /// What follows without waiting; `None` at the end of the log.
    fn ready(&mut self) -> Result<Option<Event>, LogFault> {
        let durable = *self.last.borrow_and_update();
        let Look { record, epoch: (epoch, epoch_position), resigned, sealed } =
            self.group.look(self.next, durable);
        let (told, led) = self.told;
        if led && (told < epoch || resigned == told) {
            self.told = (told, false);
            return Ok(Some(Event::Leader { epoch: told, leader: None, is_self: false }));
        }
        if told < epoch && self.next > epoch_position && durable >= epoch_position {
            let is_self = epoch == self.own_epoch && resigned != epoch;
            self.told = (epoch, is_self);
            let leader = (resigned != epoch).then_some(self.group.options().node);
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
                self.cursor.rest();
                record
            }
            None => match self.stored()? {
                Some(record) => record,
                // The segment was removed between the look and the read, or the tail moved on: look again.
                None => match self.stored()? {
                    Some(record) => record,
                    None => {
                        let text = format!("position {} of {} is in no segment", self.next, self.group.id());
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
            _ => Event::Gap { to: position },
        }))
    }

    fn stored(&mut self) -> Result<Option<clutch_log_store::TailRecord>, LogFault> {
        let first = self.group.first();
        if self.next < first {
            return Err(LogFault::Trimmed { asked: self.next, first });
        }
        self.cursor.stored(self.next)
    }
}

#[async_trait]
impl Events for LocalEvents {
    async fn next(&mut self) -> Result<Event, LogFault> {
        loop {
            if let Some(event) = self.ready()? {
                return Ok(event);
            }
            if let Some(reason) = self.group.failed() {
                return Err(LogFault::Storage(reason));
            }
            if self.last.changed().await.is_err() {
                return Err(self.group.stopped());
            }
        }
    }
}

#[cfg(test)]
mod tests;
