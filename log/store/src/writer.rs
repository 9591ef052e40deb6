//! The one writer of a node: merges what all groups append into one write and one sync.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use clutch_log::{Batch, Epoch, LogFault, LogId, LogletId, NodeId, Outcome, Position, Refused};
use clutch_proto::mutants::{self, Mutant};
use clutch_runtime::{File, Runtime};
use tokio::sync::{mpsc, oneshot};

use crate::{
    format::{
        GroupLine, Index, MARK_FILE, Mark, PAYLOAD_BYTES_MAX, RECORD_HEADER_BYTES, Record, RecordKind,
        encode_group, encode_index, encode_mark, encode_record, index_path, mark_offset, segment_header,
        segment_name,
    },
    segment::{Effect, Segment, cut_earlier, effect},
    shared::Shared,
    state::{Command, Group, GroupState, TailRecord, Write},
};

/// Under load the mark is made durable after so many bytes; when nothing waits, at once.
const MARK_LAG_BYTES_MAX: u64 = 4 << 20;
/// Bytes of a vote or a members record: every segment begins with those of all groups.
const KEPT_BYTES_MAX: usize = 16 << 10;
/// Members records behind a group's base; a new base takes those before it away.
pub const MEMBERS_MAX: usize = 512;
/// Room that is set aside ahead of what is written.
const AHEAD_BYTES: u64 = 4 << 20;
/// What waits for room is tried again after so long.
const ROOM_AGAIN: Duration = Duration::from_millis(200);

pub(crate) struct Writer {
    shared: Arc<Shared>,
    /// Open segment and where the next byte goes.
    current: Option<OpenSegment>,
    resume: Option<(u64, u64)>,
    mark: Mark,
    mark_file: Option<Box<dyn File>>,
    /// The mark was written after the last sync and is not durable yet.
    mark_unsynced: bool,
    /// Bytes of records since the mark was made durable.
    unmarked_bytes: u64,
    /// Whether something was written last of what had waited for room.
    found_room: bool,
}

struct OpenSegment {
    number: u64,
    file: Box<dyn File>,
    offset: u64,
    /// Room is set aside for the bytes before here.
    allocated: u64,
    /// Where its first record may begin: a segment without any is not closed.
    begun: u64,
}

/// Why a segment could not be begun.
enum NewSegment {
    /// There is no room, and nothing has changed.
    NoRoom(String),
    Failed(String),
}

impl From<std::io::Error> for NewSegment {
    fn from(error: std::io::Error) -> NewSegment {
        match is_full(&error) {
            true => NewSegment::NoRoom(error.to_string()),
            false => NewSegment::Failed(error.to_string()),
        }
    }
}

fn is_full(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)
}

impl Command {
    /// Bytes of the record that it may become.
    fn bytes_max(&self) -> usize {
        match self {
            Command::Append { entries, bytes, .. } => RECORD_HEADER_BYTES + bytes + 4 * entries.len(),
            Command::BeginEpoch { .. } | Command::Seal { .. } => RECORD_HEADER_BYTES,
            Command::Write { writes, .. } => writes.iter().map(record_bytes_max).sum(),
            Command::Trim { .. } => 0,
        }
    }
}

fn record_bytes_max(write: &Write) -> usize {
    let (bytes, entries) = write.size();
    RECORD_HEADER_BYTES + bytes + 4 * entries
}

/// A record that was encoded and waits for the sync.
struct Staged {
    group: Arc<Group>,
    record: TailRecord,
    /// What it does to its group.
    effect: Effect,
    /// Where it begins, in what is written at once.
    offset: u64,
    /// The newest reign when it was encoded.
    begun: Epoch,
    answer: Answer,
}

enum Answer {
    /// Another record of the same call answers.
    None,
    Write(oneshot::Sender<Result<(), LogFault>>),
    Append(oneshot::Sender<Outcome>),
    Epoch(oneshot::Sender<Result<Epoch, LogFault>>),
    Seal(oneshot::Sender<Result<Position, LogFault>>),
}

impl Writer {
    pub(crate) fn new(shared: &Arc<Shared>, resume: Option<(u64, u64)>, mark: Mark) -> Writer {
        Writer {
            shared: shared.clone(),
            current: None,
            resume,
            mark,
            mark_file: None,
            mark_unsynced: false,
            unmarked_bytes: 0,
            found_room: false,
        }
    }

    /// Runs until every handle is gone or the disk fails.
    pub(crate) async fn run(mut self, runtime: Runtime, mut commands: mpsc::Receiver<Command>) {
        let (mut batch, mut is_told) = (Vec::new(), false);
        loop {
            is_told &= !batch.is_empty();
            if !batch.is_empty() {
                // What waits for room is tried again, in its order and before what comes now; some of that may give room back.
                runtime.note("log: records wait for room");
                if !is_told {
                    is_told = true;
                    let bytes: usize = batch.iter().map(Command::bytes_max).sum();
                    tracing::warn!(dir = %self.shared.dir.display(), bytes, "records wait for room on the disk");
                }
                if self.mark_unsynced
                    && let Err(reason) = self.sync_mark()
                {
                    return self.fail(reason, commands).await;
                }
                let mut more = Vec::new();
                let most = self.shared.options.commands_max;
                // Some of it found room: the next may, too.
                let again = if self.found_room { Duration::ZERO } else { ROOM_AGAIN };
                let come = runtime.timeout(again, commands.recv_many(&mut more, most)).await;
                if come == Some(0) {
                    return;
                }
                batch.append(&mut more);
                if let Err(reason) = self.write(&mut batch) {
                    return self.fail(reason, commands).await;
                }
                continue;
            }
            if commands.is_empty() && self.mark_unsynced {
                // Nothing waits, so making the mark durable delays nobody.
                if let Err(reason) = self.sync_mark() {
                    return self.fail(reason, commands).await;
                }
            }
            if commands.recv_many(&mut batch, self.shared.options.commands_max).await == 0 {
                return;
            }
            if let Err(reason) = self.write(&mut batch) {
                return self.fail(reason, commands).await;
            }
        }
    }

    /// The disk failed: nothing that waits is known to be durable, and nothing new is taken.
    async fn fail(&mut self, reason: String, mut commands: mpsc::Receiver<Command>) {
        tracing::error!(%reason, "the log stops");
        *self.shared.failed.lock() = Some(reason);
        for group in self.shared.groups.lock().values() {
            // Wakes the readers, which then see the failure.
            group.last.send_modify(|_| {});
        }
        commands.close();
        while commands.recv().await.is_some() {
            // Dropping a command's sender answers unknown.
        }
    }

    /// Writes what these ask for; records of engines that give out positions themselves stay where there is no room for them, for others of
    /// their log may be on their way behind them.
    fn write(&mut self, commands: &mut Vec<Command>) -> Result<(), String> {
        // Before anything gets a position: what there is no room for is certainly not in the log.
        let needed: usize = commands.iter().map(Command::bytes_max).sum();
        let room = match needed {
            0 => Ok(()),
            needed => self.make_room(needed as u64)?,
        };
        // Where there is not enough for all there may be for the first: small ones must not wait for large ones behind them.
        let mut alone = match (&room, commands.first()) {
            (Err(_), Some(first @ Command::Write { .. })) if commands.len() > 1 => {
                self.make_room(first.bytes_max() as u64)?.is_ok()
            }
            _ => false,
        };
        let node = self.shared.options.node;
        let mut merged = Merged { room, node, bytes: Vec::new(), staged: Vec::new(), released: 0 };
        let (mut trims, mut waiting) = (Vec::new(), Vec::new());
        self.found_room = false;
        for command in commands.drain(..) {
            match command {
                Command::Append { group, epoch, entries, bytes, decided } => {
                    merged.released += bytes;
                    merged.append(group, epoch, entries, decided);
                }
                Command::BeginEpoch { group, done } => merged.begin_epoch(group, done),
                Command::Seal { group, done } => merged.seal(group, done),
                Command::Write { group, writes, bytes, done } if std::mem::take(&mut alone) => {
                    merged.released += bytes;
                    let none = std::mem::replace(&mut merged.room, Ok(()));
                    merged.records(&group, writes, done);
                    (merged.room, self.found_room) = (none, true);
                }
                Command::Write { .. } if merged.room.is_err() && !mutants::is(Mutant::FullIsForGood) => {
                    waiting.push(command);
                }
                Command::Write { group, writes, bytes, done } => {
                    merged.released += bytes;
                    merged.records(&group, writes, done);
                }
                Command::Trim { done } => trims.push(done),
            }
        }
        let Merged { bytes, staged, released, .. } = merged;
        if !staged.is_empty() {
            assert!(bytes.len() <= needed, "{} bytes for which {needed} were reckoned", bytes.len());
            let at = self.append(&bytes)?;
            self.publish(staged, at);
        }
        self.shared.queued_bytes.fetch_sub(released, Ordering::Relaxed);
        *commands = waiting;
        for done in trims {
            match self.trim() {
                Ok(trimmed) => drop(done.send(trimmed.map_err(LogFault::Storage))),
                // Whether the mark is durable is not known, and a later sync would not say so either.
                Err(reason) => {
                    let _ = done.send(Err(LogFault::Storage(reason.clone())));
                    return Err(reason);
                }
            }
        }
        Ok(())
    }

    /// Sets room aside for so many bytes of records. A segment that is full is closed first, so a record never spans two.
    /// The inner error says that there is none, and that nothing has changed.
    fn make_room(&mut self, needed: u64) -> Result<Result<(), String>, String> {
        let limit = self.shared.options.segment_bytes_max;
        if self.current.is_none()
            && let Some((number, offset)) = self.resume.take()
        {
            let path = self.shared.dir.join(segment_name(number));
            let file = self.shared.disk.open(&path, false).map_err(|e| e.to_string())?;
            self.current = Some(OpenSegment { number, file, offset, allocated: 0, begun: 4096 });
        }
        if self.current.as_ref().is_none_or(|c| c.offset + needed > limit && c.offset > c.begun) {
            match self.begin_segment() {
                Ok(()) => {}
                Err(NewSegment::NoRoom(reason)) => return Ok(Err(reason)),
                Err(NewSegment::Failed(reason)) => return Err(reason),
            }
        }
        let current = self.current.as_mut().ok_or("no open segment")?;
        let end = current.offset + needed;
        if end <= current.allocated {
            return Ok(Ok(()));
        }
        // Some more than is needed, so that there is something left for what gives space back when the disk is full.
        for wanted in [(end + AHEAD_BYTES).min(limit.max(end)), end] {
            match current.file.allocate(wanted) {
                Ok(()) => {
                    current.allocated = wanted;
                    return Ok(Ok(()));
                }
                Err(error) if is_full(&error) => {}
                Err(error) => return Err(error.to_string()),
            }
        }
        Ok(Err(format!("{} has no room for {needed} bytes more", self.shared.dir.display())))
    }

    /// Writes and syncs; says where.
    fn append(&mut self, bytes: &[u8]) -> Result<u64, String> {
        let current = self.current.as_mut().ok_or("no open segment")?;
        let begin = current.offset;
        let end = begin + bytes.len() as u64;
        assert!(end <= current.allocated, "{end} is behind the room for {}", current.allocated);
        current.file.write_at(bytes, current.offset).map_err(|e| e.to_string())?;
        if !mutants::is(Mutant::AcknowledgeBeforeSync) {
            current.file.sync().map_err(|e| e.to_string())?;
        }
        self.shared.appended.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.shared.syncs.fetch_add(1, Ordering::Relaxed);
        current.offset = end;
        let (segment, offset) = (current.number, current.offset);
        self.write_mark(segment, offset)?;
        self.unmarked_bytes += bytes.len() as u64;
        if self.unmarked_bytes > MARK_LAG_BYTES_MAX {
            self.sync_mark()?;
        }
        Ok(begin)
    }

    fn begin_segment(&mut self) -> Result<(), NewSegment> {
        let number = self.current.as_ref().map_or(1, |c| c.number + 1);
        if self.current.is_some() {
            let closed = self.shared.segments.lock().last().cloned().unwrap_or_default();
            let path = index_path(&self.shared.dir, closed.number);
            let index = Index { number: closed.number, bytes: closed.bytes, spans: closed.spans };
            // Damage to a record would not be noticed behind an index.
            if self.shared.quarantined.lock().is_empty() {
                self.shared.disk.replace(&path, &encode_index(&index))?;
            } else if self.shared.disk.exists(&path) {
                self.shared.disk.remove(&path)?;
            }
        }
        // Where every log stands before the records that are about to be written.
        let quarantined = self.shared.quarantined.lock().clone();
        let mut lines = Vec::new();
        for (id, group) in &*self.shared.groups.lock() {
            let last = *group.last.borrow();
            let state = group.state.lock();
            assert_eq!(state.next, last.next(), "nothing is on its way while a segment is begun");
            let is_quarantined = quarantined.contains_key(id);
            lines.push(encode_group(&GroupLine { is_quarantined, ..state.line(*id) }));
        }
        let mut bytes = segment_header(number, self.shared.options.cluster).to_vec();
        encode_record(
            &mut bytes,
            RecordKind::Groups,
            LogId { role: 0, number: 0 },
            Position(0),
            Epoch(0),
            &lines,
        );
        if bytes.len() > PAYLOAD_BYTES_MAX as usize {
            return Err(NewSegment::Failed(format!("{} groups do not fit one record", lines.len())));
        }
        let path = self.shared.dir.join(segment_name(number));
        let file = self.shared.disk.open(&path, true)?;
        let begun = (|| {
            file.set_len(0)?;
            file.allocate(bytes.len() as u64)?;
            file.write_at(&bytes, 0)
        })();
        if let Err(error) = begun {
            // Nothing was synced: the next start, too, finds a segment that was being begun.
            let _ = self.shared.disk.remove(&path);
            return Err(error.into());
        }
        let failed = |e: std::io::Error| NewSegment::Failed(e.to_string());
        file.sync().map_err(failed)?;
        if !mutants::is(Mutant::SegmentNameUnsynced) {
            self.shared.disk.sync_dir(&self.shared.dir).map_err(failed)?;
        }
        let length = bytes.len() as u64;
        self.current = Some(OpenSegment { number, file, offset: length, allocated: length, begun: length });
        {
            let mut segments = self.shared.segments.lock();
            // Whoever needs them finds them in the index.
            if let Some(closed) = segments.last_mut() {
                closed.spans.values_mut().for_each(|span| span.offsets = Vec::new());
            }
            segments.push(Segment { number, bytes: length, ..Segment::default() });
        }
        // From here on damage to the segment's beginning is damage, not a segment that was being begun.
        self.write_mark(number, length).map_err(NewSegment::Failed)?;
        self.sync_mark().map_err(NewSegment::Failed)
    }

    /// Written, and durable with the next [`Writer::sync_mark`].
    pub(crate) fn write_mark(&mut self, segment: u64, offset: u64) -> Result<(), String> {
        // Until the next sync one slot is written again and again; the other keeps the mark that is durable, for a crash
        // may tear what was written.
        let step = if self.mark_unsynced { 2 } else { 1 };
        self.mark = self.mark.moved_on(step, segment, offset);
        let mark = self.mark;
        write_slot(self.mark_file()?, mark)?;
        self.mark_unsynced = true;
        Ok(())
    }

    pub(crate) fn sync_mark(&mut self) -> Result<(), String> {
        self.mark_file()?.sync().map_err(|e| e.to_string())?;
        self.mark_unsynced = false;
        self.unmarked_bytes = 0;
        Ok(())
    }

    fn mark_file(&mut self) -> Result<&dyn File, String> {
        let file = match self.mark_file.take() {
            Some(file) => file,
            None => {
                let path = self.shared.dir.join(MARK_FILE);
                let file = self.shared.disk.open(&path, true).map_err(|e| e.to_string())?;
                self.shared.disk.sync_dir(&self.shared.dir).map_err(|e| e.to_string())?;
                file
            }
        };
        Ok(&**self.mark_file.insert(file))
    }

    /// Tells readers and proposers what is durable now; it was written from `at` on.
    fn publish(&self, staged: Vec<Staged>, at: u64) {
        {
            let mut segments = self.shared.segments.lock();
            let (segment, earlier) = segments.split_last_mut().expect("there is an open segment");
            if let Some(current) = &self.current {
                segment.bytes = current.offset;
            }
            for Staged { group, record, effect, offset, .. } in &staged {
                segment.take(group.id, record.batch.position, *effect, at + offset);
                if let (Effect::Cut(_) | Effect::Anew(_), Some(span)) = (effect, segment.spans.get(&group.id))
                {
                    if let Some(restart) = span.restart {
                        cut_earlier(earlier, group.id, restart);
                    }
                    self.shared.cuts.fetch_add(1, Ordering::AcqRel);
                }
            }
        }
        for Staged { group, record, effect, begun, answer, .. } in staged {
            let (position, epoch) = (record.batch.position, record.batch.epoch);
            let last = {
                let mut state = group.state.lock();
                match effect {
                    Effect::Next => {
                        check_follows(&group, (position, epoch), begun);
                        state.keep(record, self.shared.options.tail_bytes_max);
                        Some(position)
                    }
                    Effect::None => None,
                    Effect::Cut(from) => {
                        state.forget_from(from);
                        Some(Position(from.0 - 1))
                    }
                    Effect::Anew(at) => {
                        state.forget_from(Position(0));
                        Some(Position(at.0 - 1))
                    }
                }
            };
            if let Some(last) = last {
                group.last.send_replace(last);
            }
            // A caller that gave up does not want the answer.
            match answer {
                Answer::None => {}
                Answer::Write(sender) => drop(sender.send(Ok(()))),
                Answer::Append(sender) => drop(sender.send(Outcome::Committed(position))),
                Answer::Epoch(sender) => drop(sender.send(Ok(epoch))),
                Answer::Seal(sender) => drop(sender.send(Ok(position))),
            }
        }
    }

    /// Removes the oldest segments that no log needs any more; the open one stays. The inner error is one of removing, after
    /// which the log goes on.
    fn trim(&mut self) -> Result<Result<(), String>, String> {
        // Where damage lies is known from the damaged record alone, until a segment begins that says so.
        if !self.shared.quarantined.lock().is_empty() {
            return Ok(Ok(()));
        }
        let floor = |group: &Group| {
            let state = group.state.lock();
            state.floor.max(state.base.0)
        };
        let floors: BTreeMap<LogletId, Position> =
            self.shared.groups.lock().iter().map(|(id, group)| (*id, floor(group))).collect();
        loop {
            let removable = {
                let segments = self.shared.segments.lock();
                let needed = |s: &Segment| {
                    let is_needed = |id: &LogletId, last| floors.get(id).is_none_or(|floor| *floor < last);
                    s.spans.iter().any(|(id, span)| !span.is_empty() && is_needed(id, span.last))
                };
                segments.first().filter(|s| segments.len() > 1 && !needed(s)).map(|s| s.number)
            };
            let Some(number) = removable else { return Ok(Ok(())) };
            // First it is said that it was trimmed: a file that is missing without that is a loss.
            // One that could not be removed was said to be trimmed, and is there still.
            assert!(
                self.mark.first <= number + 1,
                "{number} lies before {}, which was trimmed",
                self.mark.first
            );
            self.mark.first = number + 1;
            self.write_mark(self.mark.segment, self.mark.offset)?;
            self.sync_mark()?;
            // Readers must not look for it any more before it goes.
            let segment = self.shared.segments.lock().remove(0);
            assert_eq!(segment.number, number, "nobody else removes segments");
            if let Err(error) = self.shared.disk.remove(&self.shared.dir.join(segment_name(number))) {
                // Still there: it must go before any later one, or the rest looks incomplete.
                self.shared.segments.lock().insert(0, segment);
                return Ok(Err(error.to_string()));
            }
            let index = index_path(&self.shared.dir, number);
            if self.shared.disk.exists(&index)
                && let Err(error) = self.shared.disk.remove(&index)
            {
                return Ok(Err(error.to_string()));
            }
            // A name that comes back is removed at the next start.
            if let Err(error) = self.shared.disk.sync_dir(&self.shared.dir) {
                return Ok(Err(error.to_string()));
            }
        }
    }
}

fn write_slot(file: &dyn File, mark: Mark) -> Result<(), String> {
    file.write_at(&encode_mark(mark), mark_offset(mark)).map_err(|e| e.to_string())
}

/// What readers are shown lies without a hole behind what they were shown, in a reign that has begun.
fn check_follows(group: &Group, (position, epoch): (Position, Epoch), begun: Epoch) {
    let before = *group.last.borrow();
    assert_eq!(position, before.next(), "{}: what is published follows what was", group.id);
    assert!(epoch <= begun, "{}: {epoch:?} has not begun", group.id);
}

/// What one write takes along. Callers that gave up do not want their answers.
struct Merged {
    /// Why nothing but giving back may be done.
    room: Result<(), String>,
    node: NodeId,
    bytes: Vec<u8>,
    staged: Vec<Staged>,
    /// Bytes that do not wait any more.
    released: usize,
}

impl Merged {
    /// Encodes a record at the next position of its group.
    fn stage(
        &mut self,
        group: Arc<Group>,
        kind: RecordKind,
        epoch: Epoch,
        entries: Vec<Bytes>,
        answer: Answer,
    ) {
        let (position, begun) = {
            let mut state = group.state.lock();
            let position = state.next;
            state.next = position.next();
            (position, state.epoch)
        };
        let offset = self.bytes.len() as u64;
        encode_record(&mut self.bytes, kind, group.id, position, epoch, &entries);
        let record = TailRecord { kind, batch: Batch { position, epoch, entries } };
        self.staged.push(Staged { group, record, effect: Effect::Next, offset, begun, answer });
    }

    /// Why a batch that waited is not written; `None` where it is.
    fn refusal(&self, group: &Group, epoch: Epoch) -> Option<Outcome> {
        let state = group.state.lock();
        if state.is_removed {
            return Some(Outcome::Refused(Refused::NotLeader { hint: None }));
        }
        if state.sealed.is_some() {
            return Some(Outcome::Sealed);
        }
        if self.room.is_err() {
            return Some(Outcome::Refused(Refused::NoRoom));
        }
        // The epoch may have ended while it waited; whoever began the next is of this node, too.
        let hint = Some(self.node);
        (state.epoch != epoch).then_some(Outcome::Refused(Refused::NotLeader { hint }))
    }

    fn append(
        &mut self,
        group: Arc<Group>,
        epoch: Epoch,
        entries: Vec<Bytes>,
        decided: oneshot::Sender<Outcome>,
    ) {
        match self.refusal(&group, epoch) {
            Some(refused) => drop(decided.send(refused)),
            None => self.stage(group, RecordKind::Batch, epoch, entries, Answer::Append(decided)),
        }
    }

    fn begin_epoch(&mut self, group: Arc<Group>, done: oneshot::Sender<Result<Epoch, LogFault>>) {
        if let Some(fault) = removed(&group) {
            return drop(done.send(Err(fault)));
        }
        let sealed = group.state.lock().sealed.is_some();
        if let (Err(reason), false) = (&self.room, sealed) {
            return drop(done.send(Err(LogFault::NoRoom(reason.clone()))));
        }
        let epoch = {
            let mut state = group.state.lock();
            state.epoch = Epoch(state.epoch.0 + 1);
            state.epoch_position = state.next;
            state.epoch
        };
        match sealed {
            true => drop(done.send(Ok(epoch))),
            false => self.stage(group, RecordKind::Epoch, epoch, vec![], Answer::Epoch(done)),
        }
    }

    fn seal(&mut self, group: Arc<Group>, done: oneshot::Sender<Result<Position, LogFault>>) {
        if let Some(fault) = removed(&group) {
            return drop(done.send(Err(fault)));
        }
        let (sealed, epoch, next) = {
            let state = group.state.lock();
            (state.sealed, state.epoch, state.next)
        };
        if let Some(tail) = sealed {
            return drop(done.send(Ok(tail)));
        }
        if let Err(reason) = &self.room {
            return drop(done.send(Err(LogFault::NoRoom(reason.clone()))));
        }
        group.state.lock().sealed = Some(next);
        self.stage(group, RecordKind::Seal, epoch, vec![], Answer::Seal(done));
    }

    fn records(
        &mut self,
        group: &Arc<Group>,
        writes: Vec<Write>,
        done: oneshot::Sender<Result<(), LogFault>>,
    ) {
        let records: Vec<Record> = writes.into_iter().map(|write| write.into_record(group.id)).collect();
        let follows = match &self.room {
            Err(reason) => Err(LogFault::NoRoom(reason.clone())),
            Ok(()) => check_records(group.id, &group.state.lock(), &records),
        };
        if follows.is_err() || records.is_empty() {
            return drop(done.send(follows));
        }
        for record in records {
            let staged = stage_record(&mut self.bytes, group.clone(), record);
            self.staged.push(staged);
        }
        if let Some(last) = self.staged.last_mut() {
            last.answer = Answer::Write(done);
        }
    }
}

/// Why nothing is written of a group that is no more.
fn removed(group: &Group) -> Option<LogFault> {
    let is_removed = group.state.lock().is_removed;
    is_removed.then(|| LogFault::Unsupported(format!("{} was removed", group.id)))
}

/// Encodes a record of an engine that gives out positions itself; it was checked.
fn stage_record(bytes: &mut Vec<u8>, group: Arc<Group>, record: Record) -> Staged {
    let (effect, begun) = {
        let mut state = group.state.lock();
        let effect = effect(record.kind, record.position, state.next);
        state.change(&record, effect);
        (effect, state.epoch)
    };
    let offset = bytes.len() as u64;
    let Record { kind, position, epoch, entries, .. } = record;
    encode_record(bytes, kind, group.id, position, epoch, &entries);
    let record = TailRecord { kind, batch: Batch { position, epoch, entries } };
    Staged { group, record, effect, offset, begun, answer: Answer::None }
}

/// Whether records follow on a group, one after the other.
fn check_records(id: LogletId, state: &GroupState, records: &[Record]) -> Result<(), LogFault> {
    let mut after = state.without_tail();
    for record in records {
        let Record { kind, position, .. } = record;
        after.check_next(record).map_err(LogFault::Unsupported)?;
        if kind.has_position() && *position != after.next {
            let what = format!("{kind:?} at {position} of {id}, which goes on at {}", after.next);
            return Err(LogFault::Unsupported(what));
        }
        let bytes: usize = record.entries.iter().map(|entry| entry.len() + 4).sum();
        let is_kept = matches!(kind, RecordKind::Vote | RecordKind::Members | RecordKind::Base);
        let bytes_max = if is_kept { KEPT_BYTES_MAX } else { PAYLOAD_BYTES_MAX as usize };
        if bytes > bytes_max || *kind == RecordKind::Members && after.members.len() >= MEMBERS_MAX {
            let what =
                format!("{kind:?} of {bytes} bytes of {id} is over the limit, or one member record too many");
            return Err(LogFault::Unsupported(what));
        }
        let effect = effect(*kind, *position, after.next);
        after.change(record, effect);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group() -> Group {
        Group::new(LogId::CDC.into(), GroupState { next: Position(5), ..GroupState::default() })
    }

    #[test]
    fn what_follows_is_published() {
        check_follows(&group(), (Position(5), Epoch(2)), Epoch(2));
        let mark = Mark { sequence: 3, segment: 1, offset: 10, first: 1 };
        assert_eq!(mark.moved_on(2, 2, 0), Mark { sequence: 5, segment: 2, offset: 0, first: 1 });
    }

    #[test]
    #[should_panic(expected = "follows what was")]
    fn a_hole_is_not_published() {
        check_follows(&group(), (Position(6), Epoch(2)), Epoch(2));
    }

    #[test]
    #[should_panic(expected = "has not begun")]
    fn a_reign_to_come_is_not_published() {
        check_follows(&group(), (Position(5), Epoch(3)), Epoch(2));
    }

    #[test]
    #[should_panic(expected = "only moves on")]
    fn the_mark_does_not_go_back() {
        let mark = Mark { sequence: 3, segment: 2, offset: 10, first: 1 };
        mark.moved_on(1, 2, 9);
    }
}
