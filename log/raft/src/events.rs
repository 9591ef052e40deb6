//! A reader's place in a group's log.
//!
//! Invariant: nobody is given what is not durable here, although a quorum has it: a state would be ahead of its log after a crash.

use async_trait::async_trait;
use clutch_log::{Batch, Epoch, Event, Events, LogFault, NodeId, Position};
use clutch_log_store::Cursor;
use clutch_proto::mutants::{self, Mutant};
use std::sync::Arc;

use crate::{
    member::Member,
    standing::Standing,
    types::{Command, Payload, index_of, position_of},
};

/// Reads what is delivered, and says who leads.
pub(crate) struct RaftEvents {
    member: Arc<Member>,
    changes: tokio::sync::watch::Receiver<u64>,
    resigning: tokio::sync::watch::Receiver<bool>,
    /// The last position that is durable here: what a quorum has may come before it is.
    durable: tokio::sync::watch::Receiver<Position>,
    /// Where what is not in memory any more is read.
    cursor: Cursor,
    standing: tokio::sync::watch::Receiver<Standing>,
    next: Position,
    /// The reign that was told last, and who was said to lead in it.
    told: (u64, Option<NodeId>),
    sealed_told: bool,
}

fn storage(error: impl std::fmt::Display) -> LogFault {
    LogFault::Storage(error.to_string())
}

impl RaftEvents {
    pub(crate) fn new(member: Arc<Member>, next: Position) -> RaftEvents {
        RaftEvents {
            changes: member.delivered().changes(),
            resigning: member.resigning(),
            durable: member.log().group().last(),
            cursor: member.log().group().cursor(),
            standing: member.standing_changes(),
            member,
            next,
            told: (0, None),
            sealed_told: false,
        }
    }

    /// What follows without waiting.
    fn ready(&mut self) -> Result<Option<Event>, LogFault> {
        let me = self.member.node();
        let (term, leader) = self.member.standing();
        let (told, told_leader) = self.told;
        // The end of a reign of this node is told at once.
        if told_leader == Some(me) && (term, leader) != self.told {
            self.told = (told, None);
            return Ok(Some(Event::Leader { epoch: Epoch(told), leader: None, is_self: false }));
        }
        let delivered = self.member.delivered();
        let (last, last_term) = delivered.last();
        let sealed = delivered.sealed();
        if let Some(restored) = delivered.restored().filter(|restored| restored.position >= self.next) {
            self.next = restored.position.next();
            return Ok(Some(Event::Restore(restored)));
        }
        let durable = match mutants::is(Mutant::DeliveredUnsynced) {
            true => last,
            false => *self.durable.borrow(),
        };
        let end = sealed.map_or(last, |tail| tail.min(last)).min(durable);
        if self.next <= end {
            return self.read();
        }
        if durable < last {
            return Ok(None);
        }
        // Everything that is delivered was read. The reign of the last record is that of a leader whose own first one is
        // committed, so all earlier reigns are behind the reader; of a later one is told when its first record is.
        let leader = leader.filter(|_| term == last_term);
        let is_over = sealed.is_some();
        if last_term > 0 && (last_term, leader) != self.told && told <= last_term && !is_over {
            self.told = (last_term, leader);
            let is_self = leader == Some(me);
            return Ok(Some(Event::Leader { epoch: Epoch(last_term), leader, is_self }));
        }
        match sealed {
            Some(tail) if !self.sealed_told && self.next > tail => {
                self.sealed_told = true;
                Ok(Some(Event::Sealed { tail }))
            }
            _ => Ok(None),
        }
    }

    /// The record that comes next, which is delivered; `None` where it was trimmed.
    fn read(&mut self) -> Result<Option<Event>, LogFault> {
        let index = index_of(self.next).expect("positions begin at 1");
        let entry = self.member.log().entry_by(&mut self.cursor, index).map_err(storage)?;
        let Some(entry) = entry else { return Ok(None) };
        let position = self.next;
        self.next = position.next();
        Ok(Some(match entry.payload {
            Payload::Normal(Command::Batch(entries)) => {
                Event::Committed(Batch { position, epoch: Epoch(entry.log_id.leader_id.term), entries })
            }
            Payload::Normal(Command::Seal) | Payload::Blank | Payload::Membership(_) => {
                Event::Gap { to: position }
            }
        }))
    }

    /// Waits until something is told.
    async fn changed(&mut self) -> Result<(), LogFault> {
        self.cursor.rest();
        tokio::select! {
            biased;
            _ = self.changes.changed() => Ok(()),
            _ = self.resigning.changed() => Ok(()),
            _ = self.durable.changed() => Ok(()),
            // Whoever tells it is gone, and nobody would wake the reader again.
            told = self.standing.changed() => told.map_err(|_| LogFault::Storage("the group has ended".into())),
        }
    }

    /// Where the record that comes next was trimmed here: a snapshot of another member has it. A state may not be ahead of its
    /// log, so it is told when that has come as far, durably.
    fn restored(&mut self) -> Result<Option<Event>, LogFault> {
        let purged = self.member.log().purged().map(|purged| position_of(purged.index));
        let Some(least) = purged.filter(|purged| *purged >= self.next) else { return Ok(None) };
        let me = self.member.node();
        let members: Vec<NodeId> =
            self.member.metrics().membership_config.nodes().map(|(node, _)| *node).collect();
        if members == [me] {
            return Err(LogFault::Trimmed { asked: self.next, first: least.next() });
        }
        let Some(manifest) = self.member.fetched(least) else { return Ok(None) };
        let here = self.member.delivered().last().0.min(*self.durable.borrow());
        if here < manifest.position {
            return Ok(None);
        }
        self.next = manifest.position.next();
        Ok(Some(Event::Restore(manifest)))
    }
}

#[async_trait]
impl Events for RaftEvents {
    async fn next(&mut self) -> Result<Event, LogFault> {
        loop {
            // Seen before it is looked, so that what comes meanwhile is not missed.
            self.changes.borrow_and_update();
            self.resigning.borrow_and_update();
            self.durable.borrow_and_update();
            self.standing.borrow_and_update();
            if let Some(event) = self.ready()? {
                return Ok(event);
            }
            if let Some(fault) = self.member.fault() {
                return Err(LogFault::Storage(fault));
            }
            if let Some(event) = self.restored()? {
                return Ok(event);
            }
            self.changed().await?;
        }
    }
}
