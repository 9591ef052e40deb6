//! The records of a group in the node's store, as openraft wants to have them.
//!
//! Invariants:
//! * Votes and records are written in the order in which they were asked for: the store has one queue.
//! * A record is acknowledged after the sync that covers it, and can be read as soon as it was handed over: until it is durable it
//!   is in memory.
//! * What is said to be committed after a start is never ahead of the records that are there.

use std::{collections::BTreeMap, fmt, io, ops::Bound, ops::RangeBounds, sync::Arc, time::Duration};

use bytes::Bytes;
use clutch_log::{Epoch, LogFault, Position};
use clutch_log_store::{Cursor, RecordKind, StoredGroup, Write};
use clutch_proto::mutants::{self, Mutant};
use clutch_runtime::{BoxFuture, Runtime};
use openraft::{
    LogState, OptionalSend, RaftLogReader, StoredMembership,
    storage::{IOFlushed, RaftLogStorage},
};
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};

use crate::{
    codec::{Builder, Malformed, Reader},
    types::{Command, Entry, LogId, Payload, StoredMembers, TypeConfig, Vote, position_of},
};

/// Bytes of records that a group keeps in memory besides those that are not durable.
const CACHE_BYTES_MAX: usize = 4 << 20;
/// What could not be read is tried again after so long.
const UNREADABLE: Duration = Duration::from_secs(1);
/// Bytes of records that one message to another member takes, unless one record is larger.
const MESSAGE_BYTES_MAX: usize = 1 << 20;
/// How many records may be committed before that is written down.
const COMMITTED_EVERY: u64 = 256;
/// How long a group waits before it looks again whether the store's queue is shorter.
const FULL: Duration = Duration::from_millis(1);

/// What became durable, and who is to be told.
struct Flush {
    written: BoxFuture<Result<(), LogFault>>,
    callback: IOFlushed<TypeConfig>,
}

struct State {
    vote: Option<Vote>,
    /// The last record that is known to be committed, as far as this was told.
    committed: Option<LogId>,
    /// The same as it was written down last.
    written_committed: Option<LogId>,
    last: Option<LogId>,
    purged: Option<LogId>,
    /// The newest records.
    cache: BTreeMap<u64, Entry>,
    cache_bytes: usize,
}

impl State {
    fn keep(&mut self, entry: Entry) {
        self.cache_bytes += weight(&entry);
        if let Some(before) = self.cache.insert(entry.log_id.index, entry) {
            self.cache_bytes -= weight(&before);
        }
    }

    /// Forgets the oldest that are durable, which the store says, beyond the limit.
    fn shrink(&mut self, durable: Position) {
        while self.cache_bytes > CACHE_BYTES_MAX
            && self.cache.len() > 1
            && let Some(first) = self.cache.first_entry()
            && position_of(*first.key()) <= durable
        {
            self.cache_bytes -= weight(&first.remove());
        }
    }

    fn forget(&mut self, gone: impl Fn(u64) -> bool) {
        let all = std::mem::take(&mut self.cache);
        self.cache = all.into_iter().filter(|(index, _)| !gone(*index)).collect();
        self.cache_bytes = self.cache.values().map(weight).sum();
    }

    /// What is written as the group's vote.
    fn content(&self, vote: &Vote) -> Bytes {
        Builder::default().vote(vote).id(self.committed.as_ref()).done()
    }
}

fn weight(entry: &Entry) -> usize {
    match &entry.payload {
        Payload::Normal(Command::Batch(entries)) => {
            96 + entries.iter().map(|entry| entry.len() + 32).sum::<usize>()
        }
        Payload::Normal(Command::Seal) | Payload::Blank => 96,
        Payload::Membership(_) => 512,
    }
}

/// The records of a group; cheap to clone.
#[derive(Clone)]
pub(crate) struct GroupLog {
    runtime: Runtime,
    group: StoredGroup,
    state: Arc<Mutex<State>>,
    flushes: mpsc::UnboundedSender<Flush>,
    /// Counts what could not be read that another member needs.
    unreadable: Arc<watch::Sender<u64>>,
}

fn failed(error: impl fmt::Display) -> io::Error {
    io::Error::other(error.to_string())
}

/// The record that an entry becomes.
fn written(entry: &Entry) -> Write {
    let (kind, entries) = match &entry.payload {
        Payload::Blank => (RecordKind::Epoch, vec![]),
        Payload::Normal(Command::Batch(entries)) => (RecordKind::Batch, entries.clone()),
        Payload::Normal(Command::Seal) => (RecordKind::Seal, vec![]),
        Payload::Membership(members) => (RecordKind::Members, vec![named(Some(entry.log_id), members)]),
    };
    let epoch = Epoch(entry.log_id.leader_id.term);
    Write::Record { kind, position: position_of(entry.log_id.index), epoch, entries }
}

/// Members as a record of the store has them.
fn named(id: Option<LogId>, members: &crate::types::Members) -> Bytes {
    Builder::default().stored_members(&StoredMembership::new(id, members.clone())).done()
}

/// Members as a record of the store has them.
pub(crate) fn members_of(content: Bytes) -> Result<StoredMembers, Malformed> {
    let mut from = Reader(content);
    let members = from.stored_members()?;
    from.end()?;
    Ok(members)
}

/// The entry that a record is.
fn entry_of(kind: RecordKind, position: Position, epoch: Epoch, entries: Vec<Bytes>) -> io::Result<Entry> {
    let payload = match kind {
        RecordKind::Epoch => Payload::Blank,
        RecordKind::Batch => Payload::Normal(Command::Batch(entries)),
        RecordKind::Seal => Payload::Normal(Command::Seal),
        RecordKind::Members => {
            let content = entries.into_iter().next();
            let content = content.ok_or_else(|| failed(format!("{position} names no members")))?;
            Payload::Membership(members_of(content).map_err(failed)?.membership().clone())
        }
        RecordKind::Groups
        | RecordKind::Vote
        | RecordKind::Truncate
        | RecordKind::Base
        | RecordKind::Remove => return Err(failed(format!("{kind:?} at {position} has no place in a log"))),
    };
    let index = position.0.checked_sub(1).ok_or_else(|| failed("a record at position 0"))?;
    Ok(Entry { log_id: LogId::new(epoch.0.into(), index), payload })
}

/// What a group begins with that has forgotten what it promised: nothing is promised to anybody.
pub(crate) fn no_vote(node: u64) -> clutch_log_store::Vote {
    let content = Builder::default().vote(&Vote::new(0, node)).id(None).done();
    clutch_log_store::Vote { epoch: Epoch(0), content }
}

impl GroupLog {
    /// The records of a group that was opened.
    ///
    /// # Errors
    /// When what is there cannot be read.
    pub(crate) fn open(runtime: &Runtime, group: StoredGroup) -> io::Result<GroupLog> {
        let view = group.view();
        let (base, base_epoch) = view.base;
        let purged = base.0.checked_sub(1).map(|index| LogId::new(base_epoch.0.into(), index));
        let (vote, committed) = match view.vote {
            None => (None, None),
            Some(vote) => {
                let mut from = Reader(vote.content);
                let read = (from.vote().map_err(failed)?, from.id().map_err(failed)?);
                (Some(read.0), read.1)
            }
        };
        let state = State {
            vote,
            committed,
            written_committed: committed,
            last: purged,
            purged,
            cache: BTreeMap::new(),
            cache_bytes: 0,
        };
        let (flushes, receiver) = mpsc::unbounded_channel();
        let this = GroupLog {
            runtime: runtime.clone(),
            group,
            state: Arc::new(Mutex::new(state)),
            flushes,
            unreadable: Arc::new(watch::Sender::new(0)),
        };
        if view.last > base {
            let last = this.stored(&mut this.group.cursor(), view.last.0 - 1)?;
            this.state.lock().last = Some(last.log_id);
        }
        {
            let mut state = this.state.lock();
            // What the others had committed may not have been durable here.
            state.committed = state.committed.min(state.last).max(state.purged);
        }
        runtime.spawn("raft flush", flush(this.state.clone(), this.group.last(), receiver));
        Ok(this)
    }

    /// What the store knows of the group.
    pub(crate) fn group(&self) -> &StoredGroup {
        &self.group
    }

    /// What the group runs on.
    pub(crate) fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// Counts what could not be read that another member needs.
    pub(crate) fn unreadable(&self) -> watch::Receiver<u64> {
        self.unreadable.subscribe()
    }

    /// The last record that was appended, or purged.
    pub(crate) fn last_id(&self) -> Option<LogId> {
        self.state.lock().last
    }

    /// The record that was purged last.
    pub(crate) fn purged(&self) -> Option<LogId> {
        self.state.lock().purged
    }

    /// The log begins behind a record, which a snapshot has, with these members. Durable when it returns.
    pub(crate) async fn begin_behind(&self, id: LogId, members: &StoredMembers) -> io::Result<()> {
        self.room().await;
        let written = {
            let mut state = self.state.lock();
            if state.purged >= Some(id) {
                return Ok(());
            }
            state.purged = Some(id);
            state.last = state.last.max(Some(id));
            state.committed = state.committed.max(Some(id));
            state.forget(|index| index <= id.index);
            let lost = mutants::is(Mutant::SnapshotWithoutMembers);
            let members = (!lost).then(|| Builder::default().stored_members(members).done());
            let (position, epoch) = (position_of(id.index), Epoch(id.leader_id.term));
            self.group.write(vec![Write::Base { position, epoch, members }])
        };
        written.await.map_err(failed)
    }

    /// What is known to be committed since the start, or was before it.
    pub(crate) fn committed(&self) -> Option<LogId> {
        self.state.lock().committed
    }

    /// The newest members at or before a record.
    pub(crate) fn members_at(&self, index: u64) -> io::Result<StoredMembers> {
        let members = self.group.view().members;
        let newest = members.into_iter().rfind(|(at, _)| *at <= position_of(index));
        newest.map_or(Ok(StoredMembership::default()), |(_, content)| members_of(content).map_err(failed))
    }

    /// The identity of a record that is here, or of the one that was purged last.
    pub(crate) fn id_at(&self, index: u64) -> io::Result<Option<LogId>> {
        if let Some(purged) = self.purged().filter(|purged| purged.index >= index) {
            return Ok((purged.index == index).then_some(purged));
        }
        Ok(self.entry(index)?.map(|entry| entry.log_id))
    }

    /// A record that is here.
    pub(crate) fn entry(&self, index: u64) -> io::Result<Option<Entry>> {
        self.entry_by(&mut self.group.cursor(), index)
    }

    /// The same for who reads one after the other: where they lie is looked up once, and each part of a segment is read once.
    pub(crate) fn entry_by(&self, cursor: &mut Cursor, index: u64) -> io::Result<Option<Entry>> {
        {
            let state = self.state.lock();
            if let Some(entry) = state.cache.get(&index) {
                return Ok(Some(entry.clone()));
            }
            let is_here = state.last.is_some_and(|last| index <= last.index)
                && state.purged.is_none_or(|purged| index > purged.index);
            if !is_here {
                return Ok(None);
            }
        }
        match mutants::is(Mutant::CursorForgotten) {
            true => self.stored(&mut self.group.cursor(), index).map(Some),
            false => self.stored(cursor, index).map(Some),
        }
    }

    fn stored(&self, cursor: &mut Cursor, index: u64) -> io::Result<Entry> {
        let position = position_of(index);
        let record = cursor.at(position).map_err(failed)?;
        let record =
            record.ok_or_else(|| failed(format!("{position} of {} is in no segment", self.group.id())))?;
        assert_eq!(record.batch.position, position, "the store gives what it was asked for");
        entry_of(record.kind, position, record.batch.epoch, record.batch.entries)
    }

    fn entries(&self, from: u64, until: u64, bytes_max: usize) -> io::Result<Vec<Entry>> {
        let (mut entries, mut bytes, mut cursor) = (Vec::new(), 0, self.group.cursor());
        for index in from..until {
            match self.entry_by(&mut cursor, index)? {
                Some(entry) => {
                    bytes += weight(&entry);
                    entries.push(entry);
                }
                // Missing at the beginning or the end; a hole is found by the store.
                None if entries.is_empty() => {}
                None => break,
            }
            if bytes >= bytes_max {
                break;
            }
        }
        Ok(entries)
    }

    async fn room(&self) {
        let most = self.group.options().queued_bytes_max / 2;
        while self.group.queued_bytes() > most && self.group.failed().is_none() {
            self.runtime.clock.sleep(FULL).await;
        }
    }
}

/// Tells openraft what has become durable, in the order in which it was written.
async fn flush(
    state: Arc<Mutex<State>>,
    durable: tokio::sync::watch::Receiver<Position>,
    mut flushes: mpsc::UnboundedReceiver<Flush>,
) {
    while let Some(Flush { written, callback }) = flushes.recv().await {
        let ended = written.await.map_err(failed);
        state.lock().shrink(*durable.borrow());
        callback.io_completed(ended);
    }
}

impl RaftLogReader<TypeConfig> for GroupLog {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + fmt::Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, io::Error> {
        let from = match range.start_bound() {
            Bound::Included(from) => *from,
            Bound::Excluded(before) => before + 1,
            Bound::Unbounded => 0,
        };
        let until = match range.end_bound() {
            Bound::Included(last) => last + 1,
            Bound::Excluded(until) => *until,
            Bound::Unbounded => self.state.lock().last.map_or(0, |last| last.index + 1),
        };
        self.entries(from, until, usize::MAX)
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, io::Error> {
        // An error here would end the group, which has only one member less that can send this: another one is let lead, and meanwhile
        // it may be that it can be read again.
        let mut turn = 0;
        loop {
            match self.entries(start, end, MESSAGE_BYTES_MAX) {
                Err(error) if !mutants::is(Mutant::UnreadableEndsGroup) => {
                    // Once a minute: nobody else says so where no other member can lead.
                    if turn % 60 == 0 {
                        self.runtime.note("raft: a record that another member needs cannot be read");
                        tracing::error!(group = %self.group.id(), %error, "what another member needs cannot be read: another is to lead");
                    }
                    self.unreadable.send_modify(|count| *count += 1);
                    turn += 1;
                    self.runtime.clock.sleep(UNREADABLE).await;
                }
                read => return read,
            }
        }
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(self.state.lock().vote)
    }
}

impl RaftLogStorage<TypeConfig> for GroupLog {
    type LogReader = GroupLog;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        let state = self.state.lock();
        Ok(LogState { last_purged_log_id: state.purged, last_log_id: state.last })
    }

    async fn get_log_reader(&mut self) -> GroupLog {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        self.room().await;
        let written = {
            let mut state = self.state.lock();
            let content = state.content(vote);
            (state.vote, state.written_committed) = (Some(*vote), state.committed);
            let vote = clutch_log_store::Vote { epoch: Epoch(vote.leader_id.term), content };
            self.group.write(vec![Write::Vote(vote)])
        };
        if mutants::is(Mutant::VoteNotSynced) {
            self.runtime.spawn("a vote", async { drop(written.await) });
            return Ok(());
        }
        written.await.map_err(failed)
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        // Written down with the next records: after a start that is only where delivering goes on.
        let mut state = self.state.lock();
        state.committed = state.committed.max(committed);
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        Ok(self.state.lock().committed)
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<Entry> = entries.into_iter().collect();
        self.room().await;
        let flush = {
            let mut state = self.state.lock();
            let mut writes: Vec<Write> = entries.iter().map(written).collect();
            for entry in entries {
                assert_eq!(
                    entry.log_id.index,
                    state.last.map_or(0, |last| last.index + 1),
                    "records of {} follow on each other",
                    self.group.id()
                );
                state.last = Some(entry.log_id);
                state.keep(entry);
            }
            let index = |id: Option<LogId>| id.map_or(0, |id| id.index);
            if let Some(vote) = state.vote
                && index(state.committed) >= index(state.written_committed) + COMMITTED_EVERY
            {
                let content = state.content(&vote);
                state.written_committed = state.committed;
                let epoch = Epoch(vote.leader_id.term);
                writes.push(Write::Vote(clutch_log_store::Vote { epoch, content }));
            }
            Flush { written: Box::pin(self.group.write(writes)), callback }
        };
        if mutants::is(Mutant::UnsyncedAcknowledged) {
            let Flush { written, callback, .. } = flush;
            self.runtime.spawn("unsynced", async { drop(written.await) });
            callback.io_completed(Ok(()));
            return Ok(());
        }
        self.flushes.send(flush).map_err(|_| failed("the group has ended"))
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> Result<(), io::Error> {
        // Nothing lies behind it.
        if self.last_id().map(|here| here.index) <= last.map(|last| last.index) {
            return Ok(());
        }
        self.room().await;
        let from = last.map_or(0, |last| last.index + 1);
        let written = {
            let mut state = self.state.lock();
            state.last = last;
            state.forget(|index| index >= from);
            let lost = mutants::is(Mutant::TruncationLost);
            (!lost).then(|| self.group.write(vec![Write::Truncate { from: position_of(from) }]))
        };
        match written {
            Some(written) => written.await.map_err(failed),
            None => Ok(()),
        }
    }

    async fn purge(&mut self, id: LogId) -> Result<(), io::Error> {
        let members = self.members_at(id.index)?;
        self.begin_behind(id, &members).await
    }
}
