//! Drives an applier from a log and serves requests: the one owner of a replica's state.
//!
//! Each turn of the loop waits for one event (a commit decided, something in the log, requests, a tick) and then
//! acts without waiting. A batch of requests becomes one log record; several records may be in flight.
//!
//! Invariants: a mutation is answered only after its batch is committed and applied; a read sees everything
//! acknowledged before it; a leader serves only after it has applied all earlier epochs; after a fault nothing is
//! served.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use clutch_log::{Batch, Commit, Epoch, Event, Log, Manifest, Outcome, Position, Refused, Rejected};
use clutch_proto::{
    Refusal, Time,
    limits::{BATCH_BYTES_MAX, BATCH_ENTRIES_MAX, INBOX_REQUESTS_MAX},
    mutants::{self, Mutant},
    state::{Entry, entry::Kind},
    types::{ClientTag, Code},
};
use clutch_runtime::{BoxFuture, HybridClock, Runtime};
use futures_util::{StreamExt as _, stream::FuturesUnordered};
use parking_lot::Mutex;
use prost::Message as _;
use tokio::sync::{mpsc, oneshot};

use clutch_state::{
    applier::{AppliedBatch, Applier, EntryOutcome, Fault, recorded},
    client_table::{Known, SYSTEM_CLIENTS},
    machine::{Machine, ProduceContext, Stop, decode},
    store::{StoreError, View},
};

mod admin;
mod confirmed;
mod facts;
mod fates;
mod handle;
mod levels;
mod reads;
mod restore;
mod room;
mod upkeep;
mod verdict;

pub use facts::SharedFacts;
use fates::{Answers, Fates};
pub use handle::{Answer, Freshness, ReplicaHandle};
use handle::{Input, Reply};
pub use levels::AskLevels;
use levels::Known as KnownLevels;
use reads::{Barrier, PendingRead, Waiting};
pub use restore::Restore;
pub use verdict::AskMembers;
use verdict::Poll;

/// Log records of one replica that may be in flight.
const PIPELINE_MAX: usize = 2;
/// Requests of those who look after a replica that may wait.
const ADMIN_REQUESTS_MAX: usize = 64;
/// The state is flushed at least every so many bytes of log, which bounds the replay after a crash.
const FLUSH_BYTES: u64 = 256 << 20;
const TICK: Duration = Duration::from_millis(250);
/// Batches of reads that may wait for their barriers; what comes then waits before it is looked at.
const BARRIERS_MAX: usize = 64;
/// How long reads wait for a quorum before they are sent elsewhere.
const BARRIER_PATIENCE: Duration = Duration::from_secs(1);

/// What a change is told that the log had no room for.
const NO_ROOM: &str =
    "there is no room for the log: metadata is read-only until there is; make room, or delete and collect";

/// What the leader's shell is told.
pub enum LeaderEvent<E> {
    /// This node leads from now on; these actions are in flight.
    Began(Vec<E>),
    /// An entry caused this action.
    Action(E),
    /// This node does not lead any more; drop all actions.
    Ended,
}

/// How a replica is set up.
pub struct ReplicaConfig<M: Machine> {
    /// For messages and threads.
    pub name: String,
    /// Where it runs.
    pub runtime: Runtime,
    /// Its node's clock.
    pub clock: Arc<HybridClock>,
    /// Highest time of a real entry in any log of the node; idle logs follow it with time marks.
    pub activity: Arc<AtomicU64>,
    /// Its log.
    pub log: Arc<dyn Log>,
    /// What the leader knows.
    pub facts: Arc<SharedFacts<M::Facts>>,
    /// The body of the entry that begins an empty state.
    pub genesis: Bytes,
    /// Where the leader's actions go.
    pub leader_events: mpsc::UnboundedSender<LeaderEvent<M::Effect>>,
    /// Told when a reign of this replica begins, and `None` when it ends.
    pub on_reign: OnReign,
    /// Where checkpoints are kept; `None` where the store cannot make any.
    pub checkpoints: Option<PathBuf>,
    /// Why there is hardly room for log and state, while that is so: only what gives space back is taken then.
    pub shortage: Arc<dyn Fn() -> Option<String> + Send + Sync>,
    /// Told when the state on disk turns out to be damaged, with what is wrong: so that the next start builds it anew.
    pub on_damage: Arc<dyn Fn(&str) + Send + Sync>,
    /// Opens a checkpoint for reading.
    pub open_checkpoint: OpenCheckpoint,
    /// Puts a snapshot that the log has received in the place of the state.
    pub restore: Restore,
    /// Asks the other members of the log what they have.
    pub ask_members: AskMembers,
    /// Asks the other members of the log what their builds know.
    pub ask_levels: AskLevels,
    /// The newest feature level that this node takes part in.
    pub level: u32,
}

/// Hears of reigns; must not wait.
pub type OnReign = Arc<dyn Fn(Option<Epoch>) + Send + Sync>;

/// Opens the checkpoint in a directory.
pub type OpenCheckpoint = Arc<dyn Fn(&std::path::Path) -> Result<Arc<dyn View>, StoreError> + Send + Sync>;

/// Someone who waits for an entry's outcome.
enum Waiter {
    Caller { tag: Option<ClientTag>, reply: Reply },
    Nobody,
}

/// What became of one entry, and the log's time at it.
type Ended<M> = (Time, EntryOutcome<<M as Machine>::Reply>);

/// The owner of a replica's state.
pub struct Replica<M: Machine> {
    config: ReplicaConfig<M>,
    applier: Applier<M>,
    leading: Option<Epoch>,
    /// The last reign of this replica.
    led: Epoch,
    fault: Arc<OnceLock<String>>,
    in_flight: FuturesUnordered<BoxFuture<(u64, Outcome)>>,
    fates: Fates<Waiter, Ended<M>>,
    /// Callers whose entry was pending.
    deferred: BTreeMap<(u64, u64), Vec<Reply>>,
    barriers: FuturesUnordered<BoxFuture<Barrier<M>>>,
    /// Members that are being asked.
    polls: FuturesUnordered<BoxFuture<Poll>>,
    /// Members that are being asked for their feature levels.
    level_polls: FuturesUnordered<BoxFuture<KnownLevels>>,
    /// The level that was wanted last and who did not know it.
    below: Option<(u32, String)>,
    /// Reads of what is not applied yet.
    waiting_reads: Waiting<M>,
    flushed_bytes: u64,
    ticks_since_flush: u64,
    batches_since_check: u64,
    ticks_since_check: u64,
    /// When it was tried last to hand a reign on because there is no room here.
    handed_on: Option<Duration>,
    /// Checkpoints whose time was read, or is being read, and the log's time at them.
    checkpoint_times: Arc<Mutex<BTreeMap<Position, Option<Time>>>>,
    snapshots: admin::Snapshots,
}

impl<M: Machine> Replica<M> {
    /// Starts a replica on a thread of its own.
    pub fn start(applier: Applier<M>, config: ReplicaConfig<M>) -> ReplicaHandle {
        let (sender, receiver) = mpsc::channel(INBOX_REQUESTS_MAX);
        let (admin, admin_receiver) = mpsc::channel(ADMIN_REQUESTS_MAX);
        let (spawner, name) = (config.runtime.spawner.clone(), config.name.clone());
        let (log, clock) = (config.log.clone(), config.runtime.clock.clone());
        let fault = Arc::new(OnceLock::new());
        let replica = Replica::new(applier, config, fault.clone());
        spawner.spawn_owner(name, Box::pin(restore::run_restored(replica, receiver, admin_receiver)));
        ReplicaHandle { sender, admin, fault, log, clock }
    }

    fn new(applier: Applier<M>, config: ReplicaConfig<M>, fault: Arc<OnceLock<String>>) -> Replica<M> {
        Replica {
            config,
            applier,
            leading: None,
            led: Epoch(0),
            fault,
            in_flight: FuturesUnordered::new(),
            fates: Fates::new(),
            deferred: BTreeMap::new(),
            barriers: FuturesUnordered::new(),
            polls: FuturesUnordered::new(),
            level_polls: FuturesUnordered::new(),
            below: None,
            waiting_reads: Waiting::new(),
            flushed_bytes: 0,
            ticks_since_flush: 0,
            batches_since_check: 0,
            ticks_since_check: 0,
            handed_on: None,
            checkpoint_times: Arc::default(),
            snapshots: admin::Snapshots::default(),
        }
    }

    /// Runs until it is stopped, or until its state must be replaced.
    async fn run(
        mut self,
        inbox: &mut mpsc::Receiver<Input>,
        admin: &mut mpsc::Receiver<Input>,
    ) -> Option<(ReplicaConfig<M>, Manifest)> {
        let mut events = self.config.log.events(self.applier.position().next());
        let clock = self.config.runtime.clock.clone();
        let mut tick = clock.sleep_about(TICK);
        let mut inputs = Vec::new();
        loop {
            tokio::select! {
                biased;
                // First, because under load something else is always ready.
                () = &mut tick => {
                    tick = clock.sleep_about(TICK);
                    self.tick();
                }
                Some((id, outcome)) = self.in_flight.next(), if !self.in_flight.is_empty() => self.decided(id, outcome),
                event = events.next(), if self.fault.get().is_none() => match event {
                    Ok(Event::Restore(manifest)) => {
                        drop(events);
                        return Some((self.leave(), manifest));
                    }
                    Ok(event) => if let Err(fault) = self.step(event) {
                        self.fail(&fault);
                    },
                    Err(fault) => self.stop_on(fault.to_string()),
                },
                Some(poll) = self.polls.next(), if !self.polls.is_empty() => self.polled(poll),
                Some(known) = self.level_polls.next(), if !self.level_polls.is_empty() => self.levels_known(known),
                Some((barrier, reads)) = self.barriers.next(), if !self.barriers.is_empty() => self.passed(barrier, reads),
                Some(input) = admin.recv() => {
                    inputs.push(input);
                    if let Some(stopped) = self.accept(&mut inputs) {
                        let flushed = self.applier.store().flush();
                        if let Err(error) = flushed {
                            tracing::error!(replica = %self.config.name, %error, "flush at stop");
                        }
                        // Whoever is told so may open the store again.
                        drop((events, self));
                        // The asker may be gone.
                        let _ = stopped.send(());
                        return None;
                    }
                }
                count = inbox.recv_many(&mut inputs, BATCH_ENTRIES_MAX), if self.takes_requests() => {
                    if count == 0 {
                        return None;
                    }
                    // Only the other lane stops a replica.
                    let stopped = self.accept(&mut inputs);
                    assert!(stopped.is_none(), "{}: a stop among requests", self.config.name);
                }
            }
        }
    }

    /// Whether requests are looked at: while the pipeline is full they wait for a place in it, but not where nobody will make any.
    fn takes_requests(&self) -> bool {
        (self.in_flight.len() < PIPELINE_MAX || self.leading.is_none()) && self.barriers.len() < BARRIERS_MAX
    }

    /// Takes one event of the log.
    fn step(&mut self, event: Event) -> Result<(), Fault> {
        match event {
            Event::Committed(batch) => self.apply(&batch)?,
            Event::Gap { to } => self.applier.skip(to),
            Event::Restore(manifest) => {
                return Err(Fault::Order { applied: self.applier.position(), got: manifest.position });
            }
            Event::Leader { epoch, is_self: true, .. } => self.begin_leading(epoch)?,
            Event::Leader { is_self: false, .. } if mutants::is(Mutant::EndOfReignLost) => {}
            Event::Leader { is_self: false, .. } | Event::Sealed { .. } => self.end_leading(),
        }
        self.serve_waiting_reads();
        Ok(())
    }

    fn apply(&mut self, batch: &Batch) -> Result<(), Fault> {
        let before = self.applier.position();
        assert!(batch.position > before, "{}: {} was applied already", self.config.name, batch.position);
        let applied = self.applier.apply(batch)?;
        assert_eq!(applied.outcomes.len(), batch.entries.len(), "an outcome for each entry");
        if !mutants::is(Mutant::TimeGoesBack) {
            self.config.clock.advance(applied.time);
        }
        if applied.outcomes.iter().any(|(_, o)| *o != EntryOutcome::Internal) {
            self.batches_since_check += 1;
            self.config.activity.fetch_max(applied.time.0, Ordering::Relaxed);
        }
        self.flushed_bytes += batch.entries.iter().map(|e| e.len() as u64 + 64).sum::<u64>();
        if self.flushed_bytes >= FLUSH_BYTES {
            match self.applier.store().flush() {
                Err(StoreError::Full(text)) => {
                    tracing::warn!(replica = %self.config.name, %text, "no room to flush the state");
                }
                flushed => flushed?,
            }
            self.flushed_bytes = 0;
        }
        let AppliedBatch { position, outcomes, actions, resolved, time } = applied;
        if let Some(answers) = self.fates.applied(position, outcomes) {
            self.answer(answers);
        }
        for (tag, result) in resolved {
            for reply in self.deferred.remove(&(tag.client, tag.sequence)).unwrap_or_default() {
                self.send(reply, position, time, result.clone());
            }
        }
        if self.leading.is_some() {
            for action in actions {
                // The shell ends with its node.
                let _ = self.config.leader_events.send(LeaderEvent::Action(action));
            }
        }
        Ok(())
    }

    fn begin_leading(&mut self, epoch: Epoch) -> Result<(), Fault> {
        assert!(
            self.leading.is_none(),
            "{}: a reign ends before {epoch:?} begins, but {:?}",
            self.config.name,
            self.leading
        );
        assert!(self.led < epoch, "{}: {epoch:?} after {:?}", self.config.name, self.led);
        (self.leading, self.led) = (Some(epoch), epoch);
        (self.config.on_reign)(Some(epoch));
        if self.applier.time() == Time(0) {
            self.propose_genesis();
        }
        let actions = M::recover(&**self.applier.store())?;
        let _ = self.config.leader_events.send(LeaderEvent::Began(actions));
        Ok(())
    }

    fn propose_genesis(&mut self) {
        let genesis = self.config.genesis.clone();
        self.propose(vec![(self.stamped(Kind::Body(genesis)), Waiter::Nobody)]);
    }

    fn end_leading(&mut self) {
        if self.leading.take().is_some() {
            self.config.runtime.note(match self.fates.has_undecided() {
                false => "replica: loses leadership at rest",
                true => "replica: loses leadership with proposals in flight",
            });
            if !self.deferred.is_empty() {
                self.config.runtime.note("replica: loses leadership with transactions pending");
            }
            let _ = self.config.leader_events.send(LeaderEvent::Ended);
            (self.config.on_reign)(None);
        }
        let unknown =
            || Refusal::new(Code::OutcomeUnknown, "leadership moved while the request was in flight");
        for (_, replies) in std::mem::take(&mut self.deferred) {
            for reply in replies {
                let _ = reply.send(Answer::refused(unknown()));
            }
        }
    }

    fn fail(&mut self, fault: &Fault) {
        let text = fault.to_string();
        if fault.is_damage() {
            self.config.runtime.note("replica: its state is damaged");
            (self.config.on_damage)(&text);
        }
        self.stop_on(text);
    }

    fn stop_on(&mut self, fault: String) {
        self.config.runtime.note("replica: stops on a fault");
        tracing::error!(replica = %self.config.name, %fault, "the replica stops");
        self.end_leading();
        // Another member may be able to do what this one cannot.
        self.config.log.resign();
        // The first one is the reason; what comes after follows from it.
        let _ = self.fault.set(fault);
        for waiter in self.fates.abandon() {
            if let Waiter::Caller { reply, .. } = waiter {
                let _ = reply.send(Answer::refused(Refusal::new(
                    Code::OutcomeUnknown,
                    "the replica stopped on a fault",
                )));
            }
        }
        for read in self.waiting_reads.take() {
            let _ = read
                .reply
                .send(Answer::refused(Refusal::new(Code::ReplicaFault, "the replica stopped on a fault")));
        }
    }

    fn stamped(&self, kind: Kind) -> Bytes {
        Entry { stamp: self.config.clock.stamp().0, kind: Some(kind) }.encode_to_vec().into()
    }

    /// Proposes entries as few records as the limits allow, and keeps who waits.
    fn propose(&mut self, entries: Vec<(Bytes, Waiter)>) {
        let mut batch = Vec::new();
        let mut waiters = Vec::new();
        let mut bytes = 0;
        for (entry, waiter) in entries {
            if !batch.is_empty()
                && (batch.len() >= BATCH_ENTRIES_MAX || bytes + entry.len() > BATCH_BYTES_MAX)
            {
                self.propose_batch(std::mem::take(&mut batch), std::mem::take(&mut waiters));
                bytes = 0;
            }
            bytes += entry.len();
            batch.push(entry);
            waiters.push(waiter);
        }
        if !batch.is_empty() {
            self.propose_batch(batch, waiters);
        }
    }

    fn propose_batch(&mut self, batch: Vec<Bytes>, waiters: Vec<Waiter>) {
        assert_eq!(batch.len(), waiters.len(), "one who waits for each entry");
        assert!(batch.len() <= BATCH_ENTRIES_MAX, "{} entries in one record", batch.len());
        let proposed = match self.leading {
            Some(epoch) => {
                if batch.len() > 1 {
                    self.config.runtime.note("replica: several entries in one record");
                }
                if self.in_flight.len() + 1 >= PIPELINE_MAX {
                    self.config.runtime.note("replica: the pipeline is full");
                }
                self.config.log.propose(epoch, batch)
            }
            None => Err(Rejected::NotLeader { epoch: Epoch(0), hint: None }),
        };
        match proposed {
            Ok(commit) => self.watch(commit, waiters),
            Err(rejected) => {
                let code = match rejected {
                    Rejected::NotLeader { .. } | Rejected::Sealed => Code::NotLeader,
                    Rejected::Overloaded => Code::Overloaded,
                    Rejected::Size { .. } => Code::TooLarge,
                    Rejected::Stopped(_) => Code::ReplicaFault,
                };
                for waiter in waiters {
                    if let Waiter::Caller { reply, .. } = waiter {
                        let _ = reply.send(Answer::refused(Refusal::new(code, rejected.to_string())));
                    }
                }
            }
        }
    }

    fn watch(&mut self, commit: Commit, waiters: Vec<Waiter>) {
        let id = self.fates.proposed(waiters);
        self.in_flight.push(Box::pin(async move { (id, commit.await) }));
    }

    /// A proposal's fate is known.
    fn decided(&mut self, id: u64, outcome: Outcome) {
        let (code, text) = match outcome {
            Outcome::Committed(position) => {
                if let Some(answers) = self.fates.committed(id, position) {
                    self.answer(answers);
                }
                return;
            }
            Outcome::Refused(Refused::NoRoom) => (Code::NoSpace, NO_ROOM),
            Outcome::Refused(Refused::NotLeader { .. }) => {
                (Code::NotLeader, "leadership moved before the request could be written")
            }
            Outcome::Sealed => (Code::NotLeader, "the log was sealed"),
            Outcome::Unknown => {
                (Code::OutcomeUnknown, "the log does not say whether the request was committed")
            }
        };
        self.config.runtime.note(match outcome {
            Outcome::Refused(Refused::NoRoom) => "replica: a proposal found no room",
            Outcome::Refused(_) | Outcome::Sealed => "replica: a proposal is refused after it was taken",
            Outcome::Committed(_) | Outcome::Unknown => "replica: the outcome of a proposal is unknown",
        });
        for waiter in self.fates.lost(id) {
            if let Waiter::Caller { reply, .. } = waiter {
                let _ = reply.send(Answer::refused(Refusal::new(code, text)));
            }
        }
    }

    fn answer(&mut self, (position, answers): Answers<Waiter, Ended<M>>) {
        for (waiter, (time, outcome)) in answers {
            let Waiter::Caller { tag, reply } = waiter else { continue };
            match outcome {
                EntryOutcome::Done(result) => self.send(reply, position, time, result),
                EntryOutcome::Pending => match tag {
                    // It may have ended already, in an entry that was applied before this commit was decided.
                    Some(tag) => match self.applier.peek(&tag) {
                        Ok(Ok(Known::Done(outcome))) => {
                            let (position, time) = (Position(outcome.position), Time(outcome.time));
                            match recorded::<M>(outcome) {
                                Ok(result) => self.send(reply, position, time, result),
                                Err(fault) => self.fail(&fault.into()),
                            }
                        }
                        Ok(Ok(Known::Pending)) => self.defer(&tag, reply),
                        // It ended with a refusal that may be retried, and was forgotten.
                        Ok(Ok(Known::New)) => {
                            self.config
                                .runtime
                                .note("replica: a transaction was turned back before its commit was known");
                            let refusal =
                                Refusal::new(Code::Busy, "the transaction was turned back; try again");
                            self.send(reply, position, time, Err(refusal));
                        }
                        Ok(Err(refusal)) => self.send(reply, position, time, Err(refusal)),
                        Err(fault) => self.fail(&fault.into()),
                    },
                    None => self.send(
                        reply,
                        position,
                        time,
                        Err(Refusal::malformed("this request needs a client tag")),
                    ),
                },
                EntryOutcome::Internal => self.send(reply, position, time, Ok(M::Reply::default())),
            }
        }
    }

    fn defer(&mut self, tag: &ClientTag, reply: Reply) {
        let waiting = self.deferred.entry((tag.client, tag.sequence)).or_default();
        // Retries of callers that gave up must not pile up.
        waiting.retain(|w| !w.is_closed());
        waiting.push(reply);
    }

    fn send(&self, reply: Reply, position: Position, time: Time, result: Result<M::Reply, Refusal>) {
        let result = result.map(|mut reply| {
            M::finish(&mut reply, &|| self.config.clock.stamp(), &self.config.facts.now());
            reply.encode_to_vec().into()
        });
        // The caller may have given up.
        let _ = reply.send(Answer { result, position, time });
    }

    /// Why a request cannot be looked at now.
    fn unready(&self, freshness: Freshness) -> Option<Refusal> {
        if let Some(fault) = self.fault.get() {
            return Some(Refusal::new(Code::ReplicaFault, format!("{}: {fault}", self.config.name)));
        }
        if freshness == Freshness::Leader && self.leading.is_none() && !mutants::is(Mutant::ReadBeforeCatchUp)
        {
            return Some(Refusal::new(
                Code::NotLeader,
                format!("this node does not lead {}", self.config.name),
            ));
        }
        if self.applier.time() == Time(0) {
            return Some(Refusal::new(Code::NotReady, format!("{} is being started", self.config.name)));
        }
        None
    }

    /// Takes requests from the inbox; returns who asked to stop.
    fn accept(&mut self, inputs: &mut Vec<Input>) -> Option<oneshot::Sender<()>> {
        let mut entries = Vec::new();
        let mut reads = Vec::new();
        let mut stop = None;
        for input in inputs.drain(..) {
            match input {
                Input::Request { body, tag, freshness, reply } => match self.unready(freshness) {
                    Some(refusal) => drop(reply.send(Answer::refused(refusal))),
                    None => self.accept_request(body, tag, freshness, reply, &mut entries, &mut reads),
                },
                Input::Entry { reign: Some(reign), reply, .. } if self.leading != Some(reign) => {
                    self.config.runtime.note("replica: an entry of another reign is refused");
                    let text = format!("{reign:?} of {} is over", self.config.name);
                    drop(reply.send(Answer::refused(Refusal::new(Code::NotLeader, text))));
                }
                Input::Entry { body, reply, .. } => match self.unready(Freshness::Leader) {
                    Some(refusal) => drop(reply.send(Answer::refused(refusal))),
                    None => {
                        entries.push((self.stamped(Kind::Body(body)), Waiter::Caller { tag: None, reply }))
                    }
                },
                Input::Admin { at_least, reply, .. } if at_least > self.applier.position() => {
                    let applied = self.applier.position();
                    let text = format!("{} has applied {applied}, not {at_least} yet", self.config.name);
                    drop(reply.send(Err(Refusal::new(Code::NotReady, text))));
                }
                Input::Admin { request, reply, .. } => self.admin(request, reply),
                Input::Stop { done } => stop = Some(done),
            }
        }
        self.propose(entries);
        if !reads.is_empty() {
            self.accept_reads(reads);
        }
        stop
    }

    fn accept_request(
        &mut self,
        body: Bytes,
        tag: Option<ClientTag>,
        freshness: Freshness,
        reply: Reply,
        entries: &mut Vec<(Bytes, Waiter)>,
        reads: &mut Vec<PendingRead<M>>,
    ) {
        let request: M::Request = match decode("request", body) {
            Ok(request) => request,
            Err(refusal) => return drop(reply.send(Answer::refused(refusal))),
        };
        if M::is_read(&request) {
            reads.push(PendingRead { request, freshness, reply });
            return;
        }
        if let Some(refusal) = self.unready(Freshness::Leader) {
            return drop(reply.send(Answer::refused(refusal)));
        }
        let store = self.applier.store().clone();
        if let Some(tag) = &tag {
            match self.applier.peek(tag) {
                Ok(Ok(Known::New)) => {}
                Ok(Ok(Known::Pending)) => {
                    self.config.runtime.note("replica: asked again while the transaction runs");
                    return self.defer(tag, reply);
                }
                Ok(Ok(Known::Done(outcome))) => {
                    self.config.runtime.note("replica: a repeated request gets its recorded answer");
                    let (position, time) = (Position(outcome.position), Time(outcome.time));
                    return match recorded::<M>(outcome) {
                        Ok(result) => self.send(reply, position, time, result),
                        Err(fault) => self.fail(&fault.into()),
                    };
                }
                Ok(Err(refusal)) => {
                    self.config.runtime.note(match refusal.code {
                        Code::Acknowledged => "replica: a request that was given up arrives late",
                        Code::ExpiredUnknown => "replica: a request arrives after its client was forgotten",
                        _ => "replica: a tag is refused",
                    });
                    return drop(reply.send(Answer::refused(refusal)));
                }
                Err(fault) => return self.fail(&fault.into()),
            }
        }
        let is_step = tag.as_ref().is_some_and(|tag| tag.client < SYSTEM_CLIENTS);
        if !is_step
            && !M::gives_space_back(&request)
            && let Some(refusal) = self.want_of_room()
        {
            return drop(reply.send(Answer::refused(refusal)));
        }
        if let Some(refusal) = self.want_of_level(M::level(&request)) {
            return drop(reply.send(Answer::refused(refusal)));
        }
        let random = self.config.runtime.random.clone();
        let mut draw = || random.u64();
        let mut context = ProduceContext { now: self.config.clock.stamp(), random: &mut draw };
        match M::produce(&*store, request, tag, &mut context, &self.config.facts.now()) {
            Ok(entry) => {
                let body = Bytes::from(entry.encode_to_vec());
                entries.push((self.stamped(Kind::Body(body)), Waiter::Caller { tag, reply }));
            }
            Err(Stop::Refused(refusal)) => drop(reply.send(Answer::refused(refusal))),
            Err(Stop::Fault(fault)) => self.fail(&fault.into()),
            Err(Stop::Unknown(what)) => drop(reply.send(Answer::refused(Refusal::malformed(what)))),
        }
    }
}
