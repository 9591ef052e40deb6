//! Writes down what every log delivers to its replicas, and notices when two deliveries disagree.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use clutch_log::{
    Batch, Commit, ConfigId, Epoch, Event, Events, Floors, Log, LogFault, LogId, Member, NodeId, Position,
    Rejected, Status,
};
use clutch_proto::state::{Entry, entry::Kind};
use clutch_runtime::simulated::NodeId as SimNode;
use parking_lot::Mutex;
use prost::Message as _;

/// Batches by position.
pub type Batches = BTreeMap<Position, Batch>;

/// What was delivered of all logs.
#[derive(Default)]
pub struct Recording {
    logs: Mutex<BTreeMap<LogId, Batches>>,
    violations: Mutex<Vec<String>>,
    /// Replicas that are given something else than the others, once.
    altered: Mutex<BTreeSet<(LogId, NodeId)>>,
    /// Who was told last to lead each log, and in which reign.
    leaders: Mutex<BTreeMap<LogId, (Epoch, NodeId)>>,
    /// Up to where each replica's own log was trimmed, at most.
    trimmed: Mutex<BTreeMap<(LogId, NodeId), Position>>,
}

impl Recording {
    /// A node's log whose deliveries are written down.
    /// `flushed` says what of its state is on the node's disk.
    pub fn wrap(
        self: &Arc<Self>,
        id: LogId,
        node: SimNode,
        log: Arc<dyn Log>,
        flushed: impl Fn() -> Position + Send + Sync + 'static,
    ) -> Arc<dyn Log> {
        let node = u64::from(node.0);
        Arc::new(RecordedLog { id, node, log, flushed: Box::new(flushed), recording: self.clone() })
    }

    /// The next entry that a node's replica of a log is given has another time than the others are given: its state is another
    /// one from then on, and nobody says so.
    pub fn alter(&self, id: LogId, node: SimNode) {
        self.altered.lock().insert((id, u64::from(node.0)));
    }

    /// Who was told last to lead a log.
    pub fn leader(&self, id: LogId) -> Option<NodeId> {
        self.leaders.lock().get(&id).map(|(_, node)| *node)
    }

    /// Up to where a node's own log was trimmed, at most.
    pub fn trimmed(&self, id: LogId, node: SimNode) -> Position {
        self.trimmed.lock().get(&(id, u64::from(node.0))).copied().unwrap_or_default()
    }

    fn trims(&self, id: LogId, node: NodeId, upto: Position) {
        let mut trimmed = self.trimmed.lock();
        let known = trimmed.entry((id, node)).or_default();
        *known = upto.max(*known);
    }

    fn led(&self, id: LogId, epoch: Epoch, node: NodeId) {
        let mut leaders = self.leaders.lock();
        let known = leaders.entry(id).or_insert((epoch, node));
        if epoch >= known.0 {
            *known = (epoch, node);
        }
    }

    /// What a replica is given of a batch.
    fn given(&self, id: LogId, node: NodeId, mut batch: Batch) -> Batch {
        let is_altered = self.altered.lock().contains(&(id, node));
        if !is_altered {
            return batch;
        }
        for entry in &mut batch.entries {
            if let Ok(read) = Entry::decode(entry.clone())
                && matches!(read.kind, Some(Kind::Body(_)))
            {
                *entry = Entry { stamp: read.stamp + 1_000_000, ..read }.encode_to_vec().into();
                self.altered.lock().remove(&(id, node));
                break;
            }
        }
        batch
    }

    /// Everything delivered of a log.
    pub fn batches(&self, id: LogId) -> Batches {
        self.logs.lock().get(&id).cloned().unwrap_or_default()
    }

    /// Takes note of something that must not be.
    pub fn violation(&self, what: String) {
        let mut violations = self.violations.lock();
        if violations.len() < 20 && !violations.contains(&what) {
            violations.push(what);
        }
    }

    /// What disagreed.
    pub fn violations(&self) -> Vec<String> {
        self.violations.lock().clone()
    }

    /// Where one reader is told that there is nothing, no other may have been given something.
    fn skipped(&self, id: LogId, after: Position, to: Position) {
        let lost = self.logs.lock().get(&id).and_then(|l| l.range(after.next()..=to).next().map(|(p, _)| *p));
        if let Some(position) = lost {
            self.violation(format!("{id}: position {position} was delivered once and is gone"));
        }
    }

    fn delivered(&self, id: LogId, batch: &Batch) {
        let mut logs = self.logs.lock();
        let known = logs.entry(id).or_default().entry(batch.position).or_insert_with(|| batch.clone());
        let same = known.entries.len() == batch.entries.len()
            && known.entries.iter().zip(&batch.entries).all(|(a, b)| a == b);
        drop(logs);
        if !same {
            self.violation(format!("{id}: position {} was delivered with two contents", batch.position));
        }
    }
}

struct RecordedLog {
    id: LogId,
    node: NodeId,
    log: Arc<dyn Log>,
    flushed: Box<dyn Fn() -> Position + Send + Sync>,
    recording: Arc<Recording>,
}

#[async_trait]
impl Log for RecordedLog {
    fn propose(&self, epoch: Epoch, batch: Vec<Bytes>) -> Result<Commit, Rejected> {
        self.log.propose(epoch, batch)
    }

    fn events(&self, from: Position) -> Box<dyn Events> {
        Box::new(RecordedEvents {
            id: self.id,
            node: self.node,
            last: Position(from.0.saturating_sub(1)),
            events: self.log.events(from),
            recording: self.recording.clone(),
        })
    }

    async fn read_barrier(&self, patience: Duration) -> Result<Position, LogFault> {
        self.log.read_barrier(patience).await
    }

    async fn seal(&self) -> Result<Position, LogFault> {
        self.log.seal().await
    }

    async fn set_floors(&self, floors: Floors) -> Result<(), LogFault> {
        // What the replica calls durable must be on its disk.
        let flushed = (self.flushed)();
        if floors.flushed > flushed {
            self.recording.violation(format!(
                "{}: node {} calls {} flushed, and its disk has {flushed}",
                self.id, self.node, floors.flushed
            ));
        }
        self.recording.trims(self.id, self.node, floors.trim());
        self.log.set_floors(floors).await
    }

    async fn transfer_leader(&self, to: NodeId) -> Result<(), LogFault> {
        self.log.transfer_leader(to).await
    }

    fn resign(&self) {
        self.log.resign();
    }

    async fn reconfigure(&self, expect: ConfigId, members: Vec<Member>) -> Result<ConfigId, LogFault> {
        self.log.reconfigure(expect, members).await
    }

    fn status(&self) -> Status {
        self.log.status()
    }
}

struct RecordedEvents {
    id: LogId,
    node: NodeId,
    /// Up to where this reader has come.
    last: Position,
    events: Box<dyn Events>,
    recording: Arc<Recording>,
}

#[async_trait]
impl Events for RecordedEvents {
    async fn next(&mut self) -> Result<Event, LogFault> {
        let event = self.events.next().await?;
        match &event {
            Event::Committed(batch) => {
                self.recording.delivered(self.id, batch);
                self.last = batch.position;
                return Ok(Event::Committed(self.recording.given(self.id, self.node, batch.clone())));
            }
            Event::Restore(manifest) => {
                if manifest.position <= self.last {
                    let (at, last) = (manifest.position, self.last);
                    self.recording.violation(format!("{}: restored at {at}, behind {last}", self.id));
                }
                self.last = manifest.position;
                self.recording.trims(self.id, self.node, manifest.position);
            }
            Event::Leader { epoch, is_self: true, .. } => self.recording.led(self.id, *epoch, self.node),
            Event::Gap { to } => {
                self.recording.skipped(self.id, self.last, *to);
                self.last = *to;
            }
            _ => {}
        }
        Ok(event)
    }
}
