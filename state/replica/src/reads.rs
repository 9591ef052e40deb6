//! Reads: each waits until everything is applied that it must see: what was acknowledged before it, or a position that its
//! sender has seen.

use std::{collections::BTreeMap, time::Duration};

use clutch_log::{LogFault, Position};
use clutch_proto::{
    Refusal,
    mutants::{self, Mutant},
    types::Code,
};
use clutch_state::machine::{Machine, Stop};

use crate::{
    Replica,
    handle::{Answer, Freshness, Reply},
};

/// How long a read waits for a position before it is sent to another member.
const POSITION_PATIENCE: Duration = Duration::from_millis(500);
/// How long a follower keeps a read whose barrier it has not applied.
pub(crate) const BARRIER_WAIT: Duration = Duration::from_secs(2);
/// Reads that may wait; more are refused as too many.
const WAITING_MAX: usize = 16_384;

pub(crate) struct PendingRead<M: Machine> {
    pub(crate) request: M::Request,
    pub(crate) freshness: Freshness,
    pub(crate) reply: Reply,
}

/// The answer to a read barrier and the reads that wait for it.
pub(crate) type Barrier<M> = (Result<Position, LogFault>, Vec<PendingRead<M>>);

/// A read that waits, and when it gives up.
type Waiter<M> = (PendingRead<M>, Option<Duration>);

/// Reads that wait until a position is applied.
pub(crate) struct Waiting<M: Machine> {
    by_position: BTreeMap<Position, Vec<Waiter<M>>>,
    count: usize,
}

impl<M: Machine> Waiting<M> {
    pub(crate) fn new() -> Waiting<M> {
        Waiting { by_position: BTreeMap::new(), count: 0 }
    }

    /// Adds one, which may have a time by which it gives up; gives it back when too many wait.
    fn add(
        &mut self,
        position: Position,
        read: PendingRead<M>,
        until: Option<Duration>,
    ) -> Option<PendingRead<M>> {
        if self.count >= WAITING_MAX {
            return Some(read);
        }
        self.count += 1;
        self.by_position.entry(position).or_default().push((read, until));
        None
    }

    /// Those that wait for no more than what is applied.
    fn ready(&mut self, applied: Position) -> Vec<PendingRead<M>> {
        let mut ready = Vec::new();
        while let Some(first) = self.by_position.first_entry().filter(|first| *first.key() <= applied) {
            ready.extend(first.remove().into_iter().map(|(read, _)| read));
        }
        self.count -= ready.len();
        ready
    }

    /// Those that have waited for too long, with what they wait for.
    fn expired(&mut self, now: Duration) -> Vec<(Position, PendingRead<M>)> {
        let mut expired = Vec::new();
        for (position, reads) in &mut self.by_position {
            let late = reads.extract_if(.., |(read, until)| {
                until.is_some_and(|until| until <= now) || read.reply.is_closed()
            });
            expired.extend(late.map(|(read, _)| (*position, read)));
        }
        self.by_position.retain(|_, reads| !reads.is_empty());
        self.count -= expired.len();
        expired
    }

    /// All of them.
    pub(crate) fn take(&mut self) -> Vec<PendingRead<M>> {
        self.count = 0;
        std::mem::take(&mut self.by_position).into_values().flatten().map(|(read, _)| read).collect()
    }
}

fn refuse<M: Machine>(read: PendingRead<M>, refusal: Refusal) {
    // The caller may have given up.
    let _ = read.reply.send(Answer::refused(refusal));
}

impl<M: Machine> Replica<M> {
    /// Takes reads: some wait for a position, the others for the log to say how much there is.
    pub(crate) fn accept_reads(&mut self, mut reads: Vec<PendingRead<M>>) {
        // What was taken with them may have stopped it.
        if let Some(refusal) = self.unready(Freshness::Member) {
            reads.drain(..).for_each(|read| refuse(read, refusal.clone()));
        }
        if mutants::is(Mutant::ReadBeforeCatchUp) {
            return self.passed(Ok(Position(0)), reads);
        }
        let until = self.config.runtime.clock.monotonic() + POSITION_PATIENCE;
        let mut unbound = Vec::new();
        let mut is_any_ready = false;
        for read in reads {
            let Freshness::Position(position) = read.freshness else {
                unbound.push(read);
                continue;
            };
            let is_behind = position > self.applier.position();
            if is_behind {
                self.config.runtime.note("replica: a read waits for a position");
            }
            let position = if mutants::is(Mutant::PositionIgnored) { Position(0) } else { position };
            is_any_ready |= position <= self.applier.position();
            self.wait(position, read, Some(until));
        }
        if is_any_ready {
            self.serve_waiting_reads();
        }
        if unbound.is_empty() {
            return;
        }
        if mutants::is(Mutant::FollowerReadsAtOnce) && self.leading.is_none() {
            return self.passed(Ok(Position(0)), unbound);
        }
        let log = self.config.log.clone();
        let patience = crate::BARRIER_PATIENCE;
        self.barriers.push(Box::pin(async move { (log.read_barrier(patience).await, unbound) }));
    }

    fn wait(&mut self, position: Position, read: PendingRead<M>, until: Option<Duration>) {
        if let Some(read) = self.waiting_reads.add(position, read, until) {
            let text = format!("{WAITING_MAX} reads wait for {} to be applied", self.config.name);
            refuse(read, Refusal::new(Code::Overloaded, text));
        }
    }

    /// A read barrier was answered.
    pub(crate) fn passed(&mut self, barrier: Result<Position, LogFault>, reads: Vec<PendingRead<M>>) {
        let until = self.config.runtime.clock.monotonic() + BARRIER_WAIT;
        for read in reads {
            if let Some(refusal) = self.unready(read.freshness) {
                refuse(read, refusal);
                continue;
            }
            match &barrier {
                Ok(position) => {
                    if *position > self.applier.position() {
                        self.config.runtime.note("replica: reads wait for their barrier");
                    }
                    if self.leading.is_none() {
                        self.config.runtime.note("replica: a follower answers a read");
                    }
                    let until = self.leading.is_none().then_some(until);
                    self.wait(*position, read, until);
                }
                Err(fault) => refuse(read, Refusal::new(Code::NotLeader, fault.to_string())),
            }
        }
        self.serve_waiting_reads();
    }

    /// Sends those away that have waited for too long: another member may have come further.
    pub(crate) fn expire_reads(&mut self) {
        let now = self.config.runtime.clock.monotonic();
        for (position, read) in self.waiting_reads.expired(now) {
            self.config.runtime.note("replica: a position does not come in time");
            let applied = self.applier.position();
            let text = format!("{} has applied {applied}, not {position} yet", self.config.name);
            refuse(read, Refusal::new(Code::NotReady, text));
        }
    }

    pub(crate) fn serve_waiting_reads(&mut self) {
        let applied = self.applier.position();
        for PendingRead { request, reply, .. } in self.waiting_reads.ready(applied) {
            match M::read(&**self.applier.store(), &request, &self.config.facts.now()) {
                Ok(answer) => self.send(reply, applied, self.applier.time(), Ok(answer)),
                Err(Stop::Refused(refusal)) => self.send(reply, applied, self.applier.time(), Err(refusal)),
                Err(Stop::Unknown(what)) => {
                    self.send(reply, applied, self.applier.time(), Err(Refusal::malformed(what)))
                }
                Err(Stop::Fault(fault)) => return self.fail(&fault.into()),
            }
        }
    }
}
