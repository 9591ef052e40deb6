//! Cuts all logs of a stopped engine in their past: the way back from a future that should not have been.
//!
//! [`prepare`] writes the logs that remain into `rewound/` in the engine's directory, where an engine can be opened on them.
//! [`put_in_place`] exchanges them with those that there are, which go to `before-rewind-N/` and are never removed.
//!
//! Invariants:
//! * Until the old mark goes, the directory holds the old logs, whole. From then on until the new mark comes it cannot be
//!   opened, and [`put_in_place`] again finishes what was begun. A cut of power anywhere leaves one of the three.
//! * What remains of a log is a prefix of it, byte for byte the same entries at the same positions, and its next reign is
//!   later than all that there were.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use clutch_log::{Epoch, LogFault, LogId, LogletId, Position};
use clutch_runtime::{Disk, File};

use crate::{
    continuity::Continuity,
    format::{
        Index, MARK_FILE, MARK_SLOT_STRIDE, Mark, RecordKind, encode_group, encode_index, encode_mark,
        encode_record, index_path, segment_header, segment_name, segment_number,
    },
    reader::SegmentReader,
    recovery::open_read_only,
    span::Span,
    state::GroupState,
    unfinished::{STAGE, check_finished, olds, unfinished},
};

pub use crate::unfinished::is_unfinished;

/// Where the logs that remain are made ready.
const NEW: &str = "rewound";
/// Old files are being moved away.
const MOVING_AWAY: &[u8] = b"1";
/// All old files have been moved away.
const MOVING_IN: &[u8] = b"2";
const WRITE_BYTES: usize = 4 << 20;

/// What remains of a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kept {
    /// The last position.
    pub position: Position,
    /// How many entries of the batch there; the rest is cut off.
    pub entries: usize,
}

fn storage(what: &str, error: &std::io::Error) -> LogFault {
    LogFault::Storage(format!("{what}: {error}"))
}

/// Where [`prepare`] puts what remains.
pub fn prepared(dir: &Path) -> PathBuf {
    dir.join(NEW)
}

/// Writes one segment after the other.
struct Copy<'a> {
    disk: &'a dyn Disk,
    dir: PathBuf,
    cluster: u64,
    open: Option<Open>,
    mark: Mark,
}

struct Open {
    number: u64,
    file: Box<dyn File>,
    written: u64,
    bytes: Vec<u8>,
    spans: BTreeMap<LogletId, Span>,
}

impl Copy<'_> {
    fn begin(&mut self, number: u64, lines: &[Bytes]) -> Result<(), LogFault> {
        self.close(true)?;
        let path = self.dir.join(segment_name(number));
        let file = self.disk.open(&path, true).map_err(|e| storage("make a segment", &e))?;
        let mut bytes = segment_header(number, self.cluster).to_vec();
        let none = LogId { role: 0, number: 0 };
        encode_record(&mut bytes, RecordKind::Groups, none, Position(0), Epoch(0), lines);
        self.mark.first = if self.mark.first == 0 { number } else { self.mark.first };
        self.open = Some(Open { number, file, written: 0, bytes, spans: BTreeMap::new() });
        Ok(())
    }

    fn record(
        &mut self,
        kind: RecordKind,
        id: LogletId,
        at: (Position, Epoch),
        entries: &[Bytes],
    ) -> Result<(), LogFault> {
        let open = self.open.as_mut().ok_or_else(|| LogFault::Storage("a record before a segment".into()))?;
        let offset = u32::try_from(open.written + open.bytes.len() as u64)
            .map_err(|_| LogFault::Storage("a segment has more than 4 GiB".into()))?;
        encode_record(&mut open.bytes, kind, id, at.0, at.1, entries);
        let span = open.spans.entry(id).or_default();
        span.first = if span.is_empty() { at.0 } else { span.first };
        span.last = at.0;
        span.offsets.push(offset);
        if open.bytes.len() > WRITE_BYTES { open.write() } else { Ok(()) }
    }

    /// Ends a segment; with `index` there is another one after it.
    fn close(&mut self, index: bool) -> Result<(), LogFault> {
        let Some(mut open) = self.open.take() else { return Ok(()) };
        open.write()?;
        open.file.sync().map_err(|e| storage("sync a segment", &e))?;
        (self.mark.segment, self.mark.offset) = (open.number, open.written);
        if index {
            let index = Index { number: open.number, bytes: open.written, spans: open.spans };
            let path = index_path(&self.dir, open.number);
            self.disk.replace(&path, &encode_index(&index)).map_err(|e| storage("write an index", &e))?;
        }
        Ok(())
    }

    /// The mark comes last: a directory without it was not made ready.
    fn finish(mut self) -> Result<(), LogFault> {
        self.close(false)?;
        self.disk.sync_dir(&self.dir).map_err(|e| storage("sync the new log's directory", &e))?;
        self.mark.sequence = 1;
        let path = self.dir.join(MARK_FILE);
        let file = self.disk.open(&path, true).map_err(|e| storage("make the mark", &e))?;
        let written = file.write_at(&encode_mark(self.mark), MARK_SLOT_STRIDE).and_then(|()| file.sync());
        written.map_err(|e| storage("write the mark", &e))?;
        self.disk.sync_dir(&self.dir).map_err(|e| storage("sync the new log's directory", &e))
    }
}

impl Open {
    fn write(&mut self) -> Result<(), LogFault> {
        self.file.write_at(&self.bytes, self.written).map_err(|e| storage("write a segment", &e))?;
        self.written += self.bytes.len() as u64;
        self.bytes.clear();
        Ok(())
    }
}

fn lines(groups: &BTreeMap<LogletId, GroupState>) -> Vec<Bytes> {
    groups.iter().map(|(id, state)| encode_group(&state.line(*id))).collect()
}

/// Writes what remains of every log into a directory of its own; what an attempt before this one left there goes first.
///
/// # Errors
/// [`LogFault::Corrupt`] when what remains is damaged, or does not reach as far as it is asked to; [`LogFault::Storage`]
/// when a file cannot be read or written, or there is a log that `keep` does not name. Nothing has changed then.
pub fn prepare(disk: &dyn Disk, dir: &Path, keep: &BTreeMap<LogId, Kept>) -> Result<(), LogFault> {
    check_finished(disk, dir)?;
    discard(disk, dir)?;
    let new = prepared(dir);
    disk.create_dir_all(&new).map_err(|e| storage("make a directory for the new log", &e))?;
    let summary = open_read_only(disk, dir)?;
    let cluster = SegmentReader::open(disk, dir, summary.segments[0])?.cluster();
    let mut copy = Copy { disk, dir: new, cluster, open: None, mark: Mark::default() };
    // Damage is looked for along the old logs, lines come from what remains of them.
    let (mut old, mut rest) = (Continuity::default(), Continuity::default());
    'segments: for &number in &summary.segments {
        let mut reader = SegmentReader::open(disk, dir, number)?;
        loop {
            let at = reader.offset();
            let record = match reader.next_record() {
                Ok(Some(record)) => record,
                Ok(None) => break,
                // What was never synced was never acknowledged.
                Err(LogFault::Corrupt { .. }) if (number, at) >= summary.synced => break 'segments,
                Err(fault) => return Err(fault),
            };
            if record.kind == RecordKind::Groups {
                old.begin(number, &record)?;
                if copy.mark.first == 0 {
                    rest.begin(number, &record)?;
                }
                copy.begin(number, &lines(rest.groups()))?;
                continue;
            }
            old.record(&record, at)?;
            if !matches!(record.kind, RecordKind::Batch | RecordKind::Epoch | RecordKind::Seal) {
                return Err(LogFault::Unsupported(format!(
                    "{} has records of a replicated log, of which no copy is cut alone",
                    record.group
                )));
            }
            let kept = keep.get(&record.group.log).ok_or_else(|| {
                LogFault::Storage(format!(
                    "{} holds {}, which is not of this cluster",
                    dir.display(),
                    record.group
                ))
            })?;
            if record.position > kept.position {
                continue;
            }
            let mut record = record;
            if record.position == kept.position {
                record.entries.truncate(kept.entries);
            }
            rest.record(&record, at)?;
            copy.record(record.kind, record.group, (record.position, record.epoch), &record.entries)?;
        }
    }
    if let Some((id, kept)) = keep.iter().find(|(id, kept)| rest.last(**id) < Some(kept.position)) {
        return Err(LogFault::Storage(format!(
            "{id} ends before position {}, which is asked for",
            kept.position
        )));
    }
    // A reign of the lost future is known elsewhere: the next one must be later.
    for (id, state) in old.groups() {
        if let Some((last, epoch)) = rest.groups().get(id).map(|kept| (Position(kept.next.0 - 1), kept.epoch))
            && epoch < state.epoch
        {
            copy.record(RecordKind::Epoch, *id, (last.next(), state.epoch), &[])?;
        }
    }
    copy.finish()
}

/// Removes what [`prepare`] made, unless it is being put in place.
///
/// # Errors
/// [`LogFault::Storage`] when a file cannot be removed.
pub fn discard(disk: &dyn Disk, dir: &Path) -> Result<(), LogFault> {
    if is_unfinished(disk, dir) {
        return Ok(());
    }
    let new = prepared(dir);
    for name in disk.list(&new).map_err(|e| storage("list what an attempt left", &e))? {
        disk.remove(&new.join(name)).map_err(|e| storage("remove what an attempt left", &e))?;
    }
    Ok(())
}

/// Exchanges the logs with those that were made ready, or finishes an exchange that was interrupted. Returns where the old
/// ones are. Durable when it returns.
///
/// # Errors
/// [`LogFault::Storage`] when a file cannot be moved, or nothing was made ready.
pub fn put_in_place(disk: &dyn Disk, dir: &Path) -> Result<PathBuf, LogFault> {
    let new = prepared(dir);
    let failed = |e: std::io::Error| storage("exchange the logs", &e);
    let (old, stage) = match unfinished(disk, dir)? {
        Some(begun) => begun,
        None if !disk.exists(&new.join(MARK_FILE)) => {
            return Err(LogFault::Storage(format!("{} holds no log that was made ready", new.display())));
        }
        None => {
            let taken = olds(disk, dir)?;
            let name = (1..).map(|n| format!("before-rewind-{n}")).find(|name| !taken.contains(name));
            let old = dir.join(name.expect("there are more numbers than directories"));
            disk.create_dir_all(&old).map_err(failed)?;
            disk.replace(&old.join(STAGE), MOVING_AWAY).map_err(failed)?;
            (old, MOVING_AWAY.to_vec())
        }
    };
    if stage == MOVING_AWAY {
        // The mark first: what is half moved is then nobody's log.
        move_files(disk, dir, &old, |name| name == MARK_FILE)?;
        move_files(disk, dir, &old, is_segment_file)?;
        disk.replace(&old.join(STAGE), MOVING_IN).map_err(failed)?;
    }
    move_files(disk, &new, dir, is_segment_file)?;
    move_files(disk, &new, dir, |name| name == MARK_FILE)?;
    disk.remove(&old.join(STAGE)).map_err(failed)?;
    disk.sync_dir(&old).map_err(failed)?;
    Ok(old)
}

fn is_segment_file(name: &str) -> bool {
    segment_number(name).is_some() || name.ends_with(".idx")
}

fn move_files(
    disk: &dyn Disk,
    from: &Path,
    to: &Path,
    wanted: impl Fn(&str) -> bool,
) -> Result<(), LogFault> {
    let failed = |e: std::io::Error| storage("move a file of the log", &e);
    for name in disk.list(from).map_err(failed)? {
        if wanted(&name) {
            disk.rename(&from.join(&name), &to.join(&name)).map_err(failed)?;
            // Both names of one file may have survived a cut of power; then renaming it does nothing.
            if disk.exists(&from.join(&name)) {
                disk.remove(&from.join(&name)).map_err(failed)?;
            }
        }
    }
    disk.sync_dir(to).map_err(failed)?;
    disk.sync_dir(from).map_err(failed)
}
