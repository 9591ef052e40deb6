//! The log that a replica holds: the loglets of a chain as one sequence of positions and reigns.
//!
//! Readers go from loglet to loglet; whatever is asked of a log, the newest loglet does. Positions and reigns are translated on
//! the way in and out, snapshots too, so that an engine knows of no loglet but its own.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use crate::{
    Batch, Bounds, Chain, Commit, ConfigId, Epoch, Event, Events, Floors, Log, LogFault, LogletId,
    LogletSpec, Manifest, Member, NodeId, Position, Progress, Rejected, Snapshots, Status,
    engine::{Engines, Purpose},
};

impl LogletSpec {
    /// The position of an index.
    pub fn position_of(&self, index: Position) -> Position {
        Position(self.base.0 + index.0)
    }

    /// The index of a position; `None` when it is an earlier loglet's.
    pub fn index_of(&self, position: Position) -> Option<Position> {
        position.0.checked_sub(self.base.0).map(Position)
    }

    /// A configuration as the whole log names it, by the position of its record; 0 stays the one that was there from the beginning.
    pub(crate) fn config(&self, config: ConfigId) -> ConfigId {
        if config.0 == 0 { config } else { ConfigId(self.position_of(Position(config.0)).0) }
    }

    /// A batch as the whole log has it.
    pub(crate) fn batch(&self, id: LogletId, batch: Batch) -> Batch {
        Batch { position: self.position_of(batch.position), epoch: id.epoch(batch.epoch), ..batch }
    }

    /// What an engine says is wrong, in the log's positions.
    pub(crate) fn fault(&self, fault: LogFault) -> LogFault {
        match fault {
            LogFault::Corrupt { position, file, offset, what } => {
                LogFault::Corrupt { position: self.position_of(position), file, offset, what }
            }
            LogFault::Trimmed { asked, first } => {
                LogFault::Trimmed { asked: self.position_of(asked), first: self.position_of(first) }
            }
            LogFault::Storage(_)
            | LogFault::NoRoom(_)
            | LogFault::Unsupported(_)
            | LogFault::NotLeader { .. }
            | LogFault::NoQuorum { .. } => fault,
        }
    }
}

impl Chain {
    /// What a log holds whose loglets hold that.
    pub(crate) fn bounds(&self, parts: &[Bounds]) -> Bounds {
        assert_eq!(parts.len(), self.loglets().len(), "each loglet of {} has bounds", self.log());
        let (newest, held) = (self.newest(), parts.last().expect("a chain has a loglet"));
        let first = (0..parts.len()).find_map(|number| {
            let end = self.end(number).unwrap_or(held.last);
            let Bounds { first, last } = parts[number];
            (first <= last.min(end)).then(|| self.loglets()[number].position_of(first))
        });
        let none = newest.position_of(held.first);
        Bounds { first: first.unwrap_or(none), last: newest.position_of(held.last) }
    }
}

/// A loglet that was opened.
struct Part {
    id: LogletId,
    spec: LogletSpec,
    log: Arc<dyn Log>,
}

struct Parts {
    chain: Chain,
    /// As many as the chain has.
    parts: Vec<Part>,
}

impl Parts {
    fn newest(&self) -> &Part {
        self.parts.last().expect("a chain has a loglet")
    }
}

/// One log, whatever engines have kept it. See [`Log`] for what it does; its chain is that of when it was opened.
pub struct VirtualLog {
    parts: Arc<Parts>,
}

impl VirtualLog {
    /// Opens every loglet of a chain, the newest to be appended to.
    ///
    /// # Errors
    /// When a loglet cannot be opened, or the node has not its engine.
    pub async fn open(
        engines: &Engines,
        chain: Chain,
        snapshots: Arc<dyn Snapshots>,
    ) -> Result<VirtualLog, LogFault> {
        let mut parts = Vec::new();
        for (number, (id, spec)) in chain.ids().zip(chain.loglets()).enumerate() {
            let purpose = chain.end(number).map_or(Purpose::Append, |upto| Purpose::Read { upto });
            let own = Arc::new(OfLoglet { snapshots: snapshots.clone(), base: spec.base });
            let opened = engines.get(id, spec)?.open_loglet(id, spec, purpose, own).await;
            let log = opened.map_err(|fault| spec.fault(fault))?;
            parts.push(Part { id, spec: spec.clone(), log });
        }
        Ok(VirtualLog { parts: Arc::new(Parts { chain, parts }) })
    }

    /// The chain that it walks.
    pub fn chain(&self) -> &Chain {
        &self.parts.chain
    }
}

#[async_trait]
impl Log for VirtualLog {
    fn propose(&self, epoch: Epoch, batch: Vec<Bytes>) -> Result<Commit, Rejected> {
        let Part { id, spec, log } = self.parts.newest();
        let Some(of_loglet) = id.epoch_of_loglet(epoch) else {
            return Err(Rejected::NotLeader { epoch, hint: log.status().leader });
        };
        match log.propose(of_loglet, batch) {
            Ok(commit) => Ok(commit.behind(spec.base)),
            Err(Rejected::NotLeader { epoch, hint }) => {
                Err(Rejected::NotLeader { epoch: id.epoch(epoch), hint })
            }
            Err(
                rejected @ (Rejected::Sealed
                | Rejected::Overloaded
                | Rejected::Size { .. }
                | Rejected::Stopped(_)),
            ) => Err(rejected),
        }
    }

    fn events(&self, from: Position) -> Box<dyn Events> {
        Box::new(ChainEvents::at(self.parts.clone(), from.max(Position(1))))
    }

    async fn read_barrier(&self, patience: std::time::Duration) -> Result<Position, LogFault> {
        let Part { spec, log, .. } = self.parts.newest();
        let index = log.read_barrier(patience).await.map_err(|fault| spec.fault(fault))?;
        Ok(spec.position_of(index))
    }

    async fn seal(&self) -> Result<Position, LogFault> {
        let Part { spec, log, .. } = self.parts.newest();
        Ok(spec.position_of(log.seal().await.map_err(|fault| spec.fault(fault))?))
    }

    async fn set_floors(&self, floors: Floors) -> Result<(), LogFault> {
        for (number, Part { spec, log, .. }) in self.parts.parts.iter().enumerate() {
            // Of what others follow, no more than counts, and than is there.
            let held = self.parts.chain.end(number).map(|end| end.min(log.status().bounds.last));
            let own = |position| {
                let index = spec.index_of(position).unwrap_or(Position(0));
                held.map_or(index, |held| index.min(held))
            };
            let Floors { retain, snapshot, flushed } = floors;
            let floors = Floors { retain: own(retain), snapshot: own(snapshot), flushed: own(flushed) };
            log.set_floors(floors).await.map_err(|fault| spec.fault(fault))?;
        }
        Ok(())
    }

    async fn transfer_leader(&self, to: NodeId) -> Result<(), LogFault> {
        let Part { spec, log, .. } = self.parts.newest();
        log.transfer_leader(to).await.map_err(|fault| spec.fault(fault))
    }

    fn resign(&self) {
        self.parts.newest().log.resign();
    }

    async fn reconfigure(&self, expect: ConfigId, members: Vec<Member>) -> Result<ConfigId, LogFault> {
        let Part { spec, log, .. } = self.parts.newest();
        let expect = ConfigId(spec.index_of(Position(expect.0)).map_or(0, |index| index.0));
        let changed = log.reconfigure(expect, members).await.map_err(|fault| spec.fault(fault))?;
        Ok(spec.config(changed))
    }

    fn status(&self) -> Status {
        let Part { id, spec, log } = self.parts.newest();
        let Status {
            epoch,
            leader,
            is_self,
            bounds,
            sealed,
            config,
            members,
            changes_kept,
            queued_bytes,
            fault,
        } = log.status();
        let earlier = &self.parts.parts[..self.parts.parts.len() - 1];
        let mut held: Vec<Bounds> = earlier.iter().map(|part| part.log.status().bounds).collect();
        held.push(bounds);
        let of_log = |Progress { member, matched, is_heard }| Progress {
            member,
            matched: matched.map(|index| spec.position_of(index)),
            is_heard,
        };
        Status {
            epoch: id.epoch(epoch),
            leader,
            is_self,
            bounds: self.parts.chain.bounds(&held),
            sealed: sealed.map(|index| spec.position_of(index)),
            config: spec.config(config),
            members: members.into_iter().map(of_log).collect(),
            changes_kept,
            queued_bytes,
            fault,
        }
    }
}

/// A reader's place in a chain.
struct ChainEvents {
    parts: Arc<Parts>,
    /// The loglet that is read.
    number: usize,
    events: Box<dyn Events>,
    /// The position that comes next.
    next: Position,
}

impl ChainEvents {
    fn at(parts: Arc<Parts>, next: Position) -> ChainEvents {
        let number = parts.chain.holder(next);
        let Part { spec, log, .. } = &parts.parts[number];
        let events = log.events(spec.index_of(next).unwrap_or(Position(1)));
        ChainEvents { parts, number, events, next }
    }

    fn go_to(&mut self, next: Position) {
        let number = self.parts.chain.holder(next);
        if number == self.number {
            self.next = next;
        } else {
            *self = ChainEvents::at(self.parts.clone(), next);
        }
    }

    /// What an event of the loglet that is read is in the whole log; `None` when it is not for the reader.
    fn take(&mut self, event: Event) -> Option<Event> {
        let parts = self.parts.clone();
        let Part { id, spec, .. } = &parts.parts[self.number];
        let end = parts.chain.end(self.number).map(|end| spec.position_of(end));
        match event {
            Event::Committed(batch) => {
                let batch = spec.batch(*id, batch);
                // Written to an incarnation that was given up behind what counts of it.
                if let Some(end) = end.filter(|end| batch.position > *end) {
                    return self.skip_to(end);
                }
                self.go_to(batch.position.next());
                Some(Event::Committed(batch))
            }
            Event::Gap { to } => {
                let to = spec.position_of(to);
                self.skip_to(end.map_or(to, |end| to.min(end)))
            }
            Event::Restore(manifest) => {
                let manifest = Manifest { position: spec.position_of(manifest.position), ..manifest };
                self.go_to(manifest.position.next());
                Some(Event::Restore(manifest))
            }
            // Who led what is over is of no interest.
            Event::Leader { .. } if end.is_some() => None,
            Event::Leader { epoch, leader, is_self } => {
                Some(Event::Leader { epoch: id.epoch(epoch), leader, is_self })
            }
            Event::Sealed { tail } => match end {
                Some(end) => self.skip_to(end),
                None => Some(Event::Sealed { tail: spec.position_of(tail) }),
            },
        }
    }

    /// Nothing comes up to there.
    fn skip_to(&mut self, to: Position) -> Option<Event> {
        let is_news = to >= self.next;
        self.go_to(to.next().max(self.next));
        is_news.then_some(Event::Gap { to })
    }
}

#[async_trait]
impl Events for ChainEvents {
    async fn next(&mut self) -> Result<Event, LogFault> {
        loop {
            let event = self.events.next().await;
            let event = event.map_err(|fault| self.parts.parts[self.number].spec.fault(fault))?;
            if let Some(event) = self.take(event) {
                return Ok(event);
            }
        }
    }
}

/// A replica's snapshots in the indices of one loglet.
struct OfLoglet {
    snapshots: Arc<dyn Snapshots>,
    base: Position,
}

impl OfLoglet {
    fn position_of(&self, index: Position) -> Position {
        Position(self.base.0 + index.0)
    }

    fn of_log(&self, manifest: &Manifest) -> Manifest {
        Manifest { position: self.position_of(manifest.position), ..manifest.clone() }
    }
}

#[async_trait]
impl Snapshots for OfLoglet {
    async fn take(&self, least: Position) -> Result<Manifest, LogFault> {
        let manifest = self.snapshots.take(self.position_of(least)).await?;
        let index = manifest.position.0.checked_sub(self.base.0);
        let index = index.ok_or_else(|| {
            let (position, base) = (manifest.position, self.base);
            LogFault::Storage(format!("a snapshot at {position} of what begins behind {base}"))
        })?;
        Ok(Manifest { position: Position(index), ..manifest })
    }

    async fn read(
        &self,
        position: Position,
        file: &str,
        offset: u64,
        bytes: usize,
    ) -> Result<Bytes, LogFault> {
        self.snapshots.read(self.position_of(position), file, offset, bytes).await
    }

    async fn receive(&self, manifest: &Manifest) -> Result<(), LogFault> {
        self.snapshots.receive(&self.of_log(manifest)).await
    }

    async fn write(&self, position: Position, file: &str, offset: u64, bytes: Bytes) -> Result<(), LogFault> {
        self.snapshots.write(self.position_of(position), file, offset, bytes).await
    }

    async fn commit(&self, manifest: &Manifest) -> Result<(), LogFault> {
        self.snapshots.commit(&self.of_log(manifest)).await
    }
}
