//! Finds out what a directory of segments holds: after a crash, or for a tool that only reads.

use std::{collections::BTreeMap, path::Path};

use clutch_log::{LogFault, LogId, Position};
use clutch_runtime::Disk;

use crate::{
    GroupState, Segment,
    format::{
        MARK_BYTES, MARK_SLOT_STRIDE, Mark, SEGMENT_HEADER_BYTES, decode_group, decode_mark, segment_name,
        segment_number,
    },
    reader::{RecordKind, SegmentReader},
};

pub(crate) const MARK_FILE: &str = "synced";

pub(crate) struct Recovered {
    pub(crate) groups: BTreeMap<LogId, GroupState>,
    pub(crate) segments: Vec<Segment>,
    /// The segment to append to and where; `None` starts a new one.
    pub(crate) current: Option<(u64, u64)>,
    pub(crate) mark: Mark,
}

fn storage(what: &str, error: &std::io::Error) -> LogFault {
    LogFault::Storage(format!("{what}: {error}"))
}

pub(crate) fn read_mark(disk: &dyn Disk, dir: &Path) -> Result<Option<Mark>, LogFault> {
    let path = dir.join(MARK_FILE);
    if !disk.exists(&path) {
        return Ok(None);
    }
    let file = disk.open(&path, false).map_err(|e| storage("open the mark", &e))?;
    let mut best = None;
    for slot in 0..2 {
        let mut bytes = [0; MARK_BYTES];
        let read =
            file.read_at(&mut bytes, slot * MARK_SLOT_STRIDE).map_err(|e| storage("read the mark", &e))?;
        best = best.max(decode_mark(&bytes[..read]).map(|m| (m.sequence, m.segment, m.offset)));
    }
    Ok(best.map(|(sequence, segment, offset)| Mark { sequence, segment, offset }))
}

/// What one segment holds.
struct Scanned {
    segment: Segment,
    groups: BTreeMap<LogId, GroupState>,
    end: u64,
    /// Why reading stopped before the end of the file.
    damage: Option<LogFault>,
}

fn scan(disk: &dyn Disk, dir: &Path, number: u64) -> Result<Scanned, LogFault> {
    let mut scanned = Scanned {
        segment: Segment { number, ..Segment::default() },
        groups: BTreeMap::new(),
        end: SEGMENT_HEADER_BYTES,
        damage: None,
    };
    let mut reader = match SegmentReader::open(disk, dir, number) {
        Ok(reader) => reader,
        Err(fault @ LogFault::Corrupt { .. }) => {
            (scanned.end, scanned.damage) = (0, Some(fault));
            return Ok(scanned);
        }
        Err(fault) => return Err(fault),
    };
    loop {
        let record = match reader.next_record() {
            Ok(Some(record)) => record,
            Ok(None) => return Ok(scanned),
            Err(fault @ LogFault::Corrupt { .. }) => {
                scanned.damage = Some(fault);
                return Ok(scanned);
            }
            Err(fault) => return Err(fault),
        };
        if record.kind == RecordKind::Groups {
            for line in &record.entries {
                let line = decode_group(line).map_err(LogFault::Storage)?;
                let state = GroupState {
                    next: line.last.next(),
                    epoch: line.epoch,
                    sealed: line.sealed,
                    ..GroupState::default()
                };
                scanned.groups.insert(line.log, state);
            }
        } else {
            let span = scanned.segment.spans.entry(record.log).or_insert((record.position, record.position));
            span.1 = record.position;
            let state = scanned.groups.entry(record.log).or_default();
            state.next = record.position.next();
            match record.kind {
                RecordKind::Epoch => (state.epoch, state.epoch_position) = (record.epoch, record.position),
                RecordKind::Seal => state.sealed = Some(record.position),
                RecordKind::Batch | RecordKind::Groups => {}
            }
        }
        scanned.end = reader.offset();
    }
}

/// Recovers for writing: cuts a torn tail off, refuses damage before the mark.
pub(crate) fn recover(disk: &dyn Disk, dir: &Path) -> Result<Recovered, LogFault> {
    disk.create_dir_all(dir).map_err(|e| storage("make the log's directory", &e))?;
    let numbers = list(disk, dir)?;
    let mark = read_mark(disk, dir)?;
    let Some(&last) = numbers.last() else {
        if let Some(mark) = mark {
            return Err(LogFault::Storage(format!(
                "segment {} is missing; restore it, or start on an empty directory",
                segment_name(mark.segment)
            )));
        }
        return Ok(Recovered {
            groups: BTreeMap::new(),
            segments: vec![],
            current: None,
            mark: Mark::default(),
        });
    };
    // A first start that crashed before its first sync acknowledged nothing and has no mark.
    let mark = match mark {
        Some(mark) => mark,
        None if numbers.len() == 1
            && last == 1
            && disk
                .open(&dir.join(segment_name(1)), false)
                .is_ok_and(|f| f.len().is_ok_and(|l| l <= 4096)) =>
        {
            Mark::default()
        }
        None => {
            return Err(LogFault::Storage(
                "the mark (file `synced`) is missing or damaged; restore it from a copy".into(),
            ));
        }
    };
    if mark.segment > last {
        return Err(LogFault::Storage(format!("segment {} is missing", segment_name(mark.segment))));
    }
    let mut segments = Vec::new();
    for &number in &numbers[..numbers.len() - 1] {
        segments.push(load_closed(disk, dir, number)?);
    }
    let mut scanned = scan(disk, dir, last)?;
    let synced_to = if mark.segment == last { mark.offset } else { 0 };
    if let Some(damage) = scanned.damage.take()
        && scanned.end < synced_to
    {
        return Err(damage);
    }
    if scanned.end < synced_to {
        return Err(LogFault::Corrupt {
            position: Position(0),
            file: segment_name(last),
            offset: scanned.end,
            what: format!("the file ends at {}, but {synced_to} bytes were synced", scanned.end),
        });
    }
    let current = if scanned.end <= SEGMENT_HEADER_BYTES
        || scanned.groups.is_empty() && scanned.end < SEGMENT_HEADER_BYTES + 48
    {
        // Crashed while the segment was being begun: nothing in it was acknowledged, the groups are in the one
        // before, and the segment is begun anew.
        let path = dir.join(segment_name(last));
        disk.remove(&path).map_err(|e| storage("remove an empty segment", &e))?;
        disk.sync_dir(dir).map_err(|e| storage("sync the log's directory", &e))?;
        match numbers.len() {
            1 => None,
            _ => return recover(disk, dir),
        }
    } else {
        let file = disk
            .open(&dir.join(segment_name(last)), false)
            .map_err(|e| storage("open the last segment", &e))?;
        if file.len().map_err(|e| storage("size of the last segment", &e))? > scanned.end {
            file.set_len(scanned.end).map_err(|e| storage("cut a torn tail", &e))?;
        }
        // What was found may not be durable, and a sync that failed before may have left its pages looking clean:
        // readers will see these bytes from now on, so they are written once more.
        let from = synced_to.clamp(SEGMENT_HEADER_BYTES, scanned.end);
        let mut tail = vec![0; (scanned.end - from) as usize];
        let read = file.read_at(&mut tail, from).map_err(|e| storage("read the tail", &e))?;
        file.write_at(&tail[..read], from).map_err(|e| storage("write the tail again", &e))?;
        file.sync().map_err(|e| storage("sync the last segment", &e))?;
        segments.push(scanned.segment.clone());
        Some((last, scanned.end))
    };
    Ok(Recovered { groups: scanned.groups, segments, current, mark })
}

/// What a closed segment holds: from its index, or from the segment itself where the index is missing.
fn load_closed(disk: &dyn Disk, dir: &Path, number: u64) -> Result<Segment, LogFault> {
    let path = index_path(dir, number);
    if disk.exists(&path) {
        let bytes = disk.read(&path).map_err(|e| storage("read an index", &e))?;
        if let Some(segment) = decode_index(number, &bytes) {
            return Ok(segment);
        }
    }
    let scanned = scan(disk, dir, number)?;
    // A closed segment was synced as a whole.
    scanned.damage.map_or(Ok(scanned.segment), Err)
}

pub(crate) fn index_path(dir: &Path, number: u64) -> std::path::PathBuf {
    dir.join(format!("{number:016x}.idx"))
}

/// The index of a closed segment, file `<number>.idx`: 24 bytes per log (log, first, last), then a CRC-32. Can
/// always be rebuilt from the segment.
pub(crate) fn encode_index(segment: &Segment) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (id, (first, last)) in &segment.spans {
        for number in [crate::format::log_key(*id), first.0, last.0] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
    }
    bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
    bytes
}

fn decode_index(number: u64, bytes: &[u8]) -> Option<Segment> {
    let (lines, crc) = bytes.split_at_checked(bytes.len().checked_sub(4)?)?;
    if crc32fast::hash(lines).to_le_bytes() != crc || lines.len() % 24 != 0 {
        return None;
    }
    let u64_at = |b: &[u8], at: usize| u64::from_le_bytes(b[at..at + 8].try_into().expect("eight bytes"));
    let spans = lines
        .chunks_exact(24)
        .map(|l| (crate::format::log_id(u64_at(l, 0)), (Position(u64_at(l, 8)), Position(u64_at(l, 16)))))
        .collect();
    Some(Segment { number, spans })
}

fn list(disk: &dyn Disk, dir: &Path) -> Result<Vec<u64>, LogFault> {
    let names = disk.list(dir).map_err(|e| storage("list the log's directory", &e))?;
    let numbers: Vec<u64> = names.iter().filter_map(|n| segment_number(n)).collect();
    if let Some(hole) = numbers.windows(2).find(|w| w[1] != w[0] + 1) {
        return Err(LogFault::Storage(format!("segment {} is missing", segment_name(hole[0] + 1))));
    }
    Ok(numbers)
}

/// What [`open_read_only`] found.
pub struct Summary {
    /// Segments, oldest first.
    pub segments: Vec<u64>,
    /// Every record before this place was synced: segment and offset.
    pub synced: (u64, u64),
    /// The last position of each log before the first segment; what lies at or below was trimmed.
    pub before: BTreeMap<LogId, Position>,
}

/// Looks at a directory of segments without changing it: for replay and verification, also of a running engine.
pub fn open_read_only(disk: &dyn Disk, dir: &Path) -> Result<Summary, LogFault> {
    let segments = list(disk, dir)?;
    if segments.is_empty() {
        return Err(LogFault::Storage(format!("{} holds no log segments", dir.display())));
    }
    let mark = read_mark(disk, dir)?.unwrap_or_default();
    let mut before = BTreeMap::new();
    if let Some(first) = SegmentReader::open(disk, dir, segments[0])?.next_record()?
        && first.kind == RecordKind::Groups
    {
        for line in &first.entries {
            let line = decode_group(line).map_err(LogFault::Storage)?;
            before.insert(line.log, line.last);
        }
    }
    Ok(Summary { segments, synced: (mark.segment, mark.offset), before })
}
