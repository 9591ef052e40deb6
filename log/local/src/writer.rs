//! The one writer of a node: merges what all logs append into one write and one sync.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
};

use bytes::Bytes;
use clutch_log::{Batch, Epoch, LogFault, LogId, Outcome, Position, Refused};
use clutch_proto::mutants::{self, Mutant};
use clutch_runtime::File;
use tokio::sync::{mpsc, oneshot};

use crate::{
    Command, Group, Segment, Shared, TailRecord,
    format::{
        GroupLine, Index, Mark, RECORD_HEADER_BYTES, RecordKind, encode_group, encode_index, encode_mark,
        encode_record, mark_offset, segment_header, segment_name,
    },
    recovery::{MARK_FILE, index_path},
};

/// Under load the mark is made durable after so many bytes; when nothing waits, at once.
const MARK_LAG_BYTES_MAX: u64 = 4 << 20;
/// Room that is set aside ahead of what is written.
const AHEAD_BYTES: u64 = 4 << 20;

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
}

struct OpenSegment {
    number: u64,
    file: Box<dyn File>,
    offset: u64,
    /// Room is set aside for the bytes before here.
    allocated: u64,
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
            Command::Trim { .. } => 0,
        }
    }
}

/// A record that was encoded and waits for the sync.
struct Staged {
    group: Arc<Group>,
    record: TailRecord,
    answer: Answer,
}

enum Answer {
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
        }
    }

    /// Runs until every handle is gone or the disk fails.
    pub(crate) async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        let mut batch = Vec::new();
        loop {
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

    /// Why a batch that waited is not written; `None` where it is.
    fn refusal(&self, group: &Group, epoch: Epoch, is_full: bool) -> Option<Outcome> {
        let state = group.state.lock();
        if state.sealed.is_some() {
            return Some(Outcome::Sealed);
        }
        if is_full {
            return Some(Outcome::Refused(Refused::NoRoom));
        }
        // The epoch may have ended while it waited; whoever began the next is of this node, too.
        let hint = Some(self.shared.options.node);
        (state.epoch != epoch).then_some(Outcome::Refused(Refused::NotLeader { hint }))
    }

    fn write(&mut self, commands: &mut Vec<Command>) -> Result<(), String> {
        // Before anything gets a position: what there is no room for is certainly not in the log.
        let needed: usize = commands.iter().map(Command::bytes_max).sum();
        let room = match needed {
            0 => Ok(()),
            needed => self.make_room(needed as u64)?,
        };
        let mut staged: Vec<Staged> = Vec::new();
        let mut bytes = Vec::new();
        let mut trims = Vec::new();
        let mut released = 0;
        for command in commands.drain(..) {
            match command {
                Command::Append { group, epoch, entries, bytes: size, decided } => {
                    released += size;
                    let refused = self.refusal(&group, epoch, room.is_err());
                    if let Some(refused) = refused {
                        // The caller may be gone.
                        let _ = decided.send(refused);
                        continue;
                    }
                    let answer = Answer::Append(decided);
                    staged.push(stage(&mut bytes, group, RecordKind::Batch, epoch, entries, answer));
                }
                Command::BeginEpoch { group, done } => {
                    let sealed = group.state.lock().sealed.is_some();
                    if let (Err(reason), false) = (&room, sealed) {
                        let _ = done.send(Err(LogFault::NoRoom(reason.clone())));
                        continue;
                    }
                    let epoch = {
                        let mut state = group.state.lock();
                        state.epoch = Epoch(state.epoch.0 + 1);
                        state.epoch_position = state.next;
                        state.epoch
                    };
                    if sealed {
                        let _ = done.send(Ok(epoch));
                    } else {
                        staged.push(stage(
                            &mut bytes,
                            group,
                            RecordKind::Epoch,
                            epoch,
                            vec![],
                            Answer::Epoch(done),
                        ));
                    }
                }
                Command::Seal { group, done } => {
                    let (sealed, epoch, next) = {
                        let state = group.state.lock();
                        (state.sealed, state.epoch, state.next)
                    };
                    if let Some(tail) = sealed {
                        let _ = done.send(Ok(tail));
                    } else if let Err(reason) = &room {
                        let _ = done.send(Err(LogFault::NoRoom(reason.clone())));
                    } else {
                        group.state.lock().sealed = Some(next);
                        staged.push(stage(
                            &mut bytes,
                            group,
                            RecordKind::Seal,
                            epoch,
                            vec![],
                            Answer::Seal(done),
                        ));
                    }
                }
                Command::Trim { done } => trims.push(done),
            }
        }
        if !staged.is_empty() {
            assert!(bytes.len() <= needed, "{} bytes for which {needed} were reckoned", bytes.len());
            self.append(&bytes)?;
        }
        self.publish(staged);
        self.shared.queued_bytes.fetch_sub(released, Ordering::Relaxed);
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
            self.current = Some(OpenSegment { number, file, offset, allocated: 0 });
        }
        if self.current.as_ref().is_none_or(|c| c.offset + needed > limit && c.offset > 4096) {
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

    /// Writes and syncs.
    fn append(&mut self, bytes: &[u8]) -> Result<(), String> {
        let current = self.current.as_mut().ok_or("no open segment")?;
        let end = current.offset + bytes.len() as u64;
        assert!(end <= current.allocated, "{end} is behind the room for {}", current.allocated);
        current.file.write_at(bytes, current.offset).map_err(|e| e.to_string())?;
        if !mutants::is(Mutant::AcknowledgeBeforeSync) {
            current.file.sync().map_err(|e| e.to_string())?;
        }
        current.offset = end;
        let (segment, offset) = (current.number, current.offset);
        self.write_mark(segment, offset)?;
        self.unmarked_bytes += bytes.len() as u64;
        if self.unmarked_bytes > MARK_LAG_BYTES_MAX { self.sync_mark() } else { Ok(()) }
    }

    fn begin_segment(&mut self) -> Result<(), NewSegment> {
        let number = self.current.as_ref().map_or(1, |c| c.number + 1);
        if self.current.is_some() {
            let closed = self.shared.segments.lock().last().cloned().unwrap_or_default();
            let path = index_path(&self.shared.dir, closed.number);
            let index = Index { number: closed.number, bytes: closed.bytes, spans: closed.spans };
            self.shared.disk.replace(&path, &encode_index(&index))?;
        }
        // Where every log stands before the records that are about to be written.
        let mut lines = Vec::new();
        for (id, group) in &*self.shared.groups.lock() {
            let last = *group.last.borrow();
            let state = group.state.lock();
            assert_eq!(state.next, last.next(), "nothing is on its way while a segment is begun");
            lines.push(encode_group(&GroupLine { log: *id, last, epoch: state.epoch, sealed: state.sealed }));
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
        self.current = Some(OpenSegment { number, file, offset: length, allocated: length });
        self.shared.segments.lock().push(Segment { number, bytes: length, ..Segment::default() });
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

    /// Tells readers and proposers what is durable now.
    fn publish(&self, staged: Vec<Staged>) {
        {
            let mut segments = self.shared.segments.lock();
            if let Some(segment) = segments.last_mut() {
                if let Some(current) = &self.current {
                    segment.bytes = current.offset;
                }
                for Staged { group, record, .. } in &staged {
                    let position = record.batch.position;
                    segment.spans.entry(group.id).or_insert((position, position)).1 = position;
                }
            }
        }
        for Staged { group, record, answer } in staged {
            let (position, epoch) = (record.batch.position, record.batch.epoch);
            {
                let mut state = group.state.lock();
                check_follows(&group, (position, epoch), state.epoch);
                state.tail_bytes += weight(&record.batch);
                state.tail.push_back(record);
                while state.tail_bytes > self.shared.options.tail_bytes_max && state.tail.len() > 1 {
                    let dropped = state.tail.pop_front().map_or(0, |r| weight(&r.batch));
                    state.tail_bytes -= dropped;
                }
            }
            group.last.send_replace(position);
            // A caller that gave up does not want the answer.
            match answer {
                Answer::Append(sender) => drop(sender.send(Outcome::Committed(position))),
                Answer::Epoch(sender) => drop(sender.send(Ok(epoch))),
                Answer::Seal(sender) => drop(sender.send(Ok(position))),
            }
        }
    }

    /// Removes the oldest segments that no log needs any more; the open one stays. The inner error is one of removing, after
    /// which the log goes on.
    fn trim(&mut self) -> Result<Result<(), String>, String> {
        let floors: BTreeMap<LogId, Position> =
            self.shared.groups.lock().iter().map(|(id, g)| (*id, g.state.lock().floor)).collect();
        loop {
            let removable = {
                let segments = self.shared.segments.lock();
                let needed = |s: &Segment| {
                    s.spans.iter().any(|(id, (_, last))| floors.get(id).is_none_or(|floor| floor < last))
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

fn weight(batch: &Batch) -> usize {
    64 + batch.entries.iter().map(|e| e.len() + 32).sum::<usize>()
}

fn stage(
    bytes: &mut Vec<u8>,
    group: Arc<Group>,
    kind: RecordKind,
    epoch: Epoch,
    entries: Vec<Bytes>,
    answer: Answer,
) -> Staged {
    let position = {
        let mut state = group.state.lock();
        let position = state.next;
        state.next = position.next();
        position
    };
    encode_record(bytes, kind, group.id, position, epoch, &entries);
    Staged { group, record: TailRecord { kind, batch: Batch { position, epoch, entries } }, answer }
}

#[cfg(test)]
mod tests {
    use tokio::sync::watch;

    use super::*;

    fn group() -> Group {
        Group { id: LogId::CDC, state: parking_lot::Mutex::default(), last: watch::Sender::new(Position(4)) }
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
