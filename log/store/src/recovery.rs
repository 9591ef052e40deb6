//! Finds out what a directory of segments holds: after a crash, or for a tool that only reads.

use std::{collections::BTreeMap, path::Path};

use clutch_log::{LogFault, LogletId, Position};
use clutch_proto::mutants::{self, Mutant};
use clutch_runtime::Disk;

use crate::{
    continuity::Continuity,
    format::{
        INDEX_READ_BYTES_MAX, Index, MARK_BYTES, MARK_FILE, MARK_SLOT_STRIDE, Mark, Record, RecordKind,
        SEGMENT_HEADER_BYTES, decode_group, decode_index, decode_mark, encode_index, encode_mark, index_path,
        mark_offset, segment_name, segment_number,
    },
    reader::{Found, SegmentReader},
    segment::{Effect, Segment, cut_earlier},
    state::GroupState,
    unfinished::check_finished,
};

#[derive(Default)]
pub(crate) struct Recovered {
    pub(crate) groups: BTreeMap<LogletId, GroupState>,
    /// Groups of which a record is damaged, and how.
    pub(crate) quarantined: BTreeMap<LogletId, LogFault>,
    pub(crate) segments: Vec<Segment>,
    /// The segment to append to and where; `None` starts a new one.
    pub(crate) current: Option<(u64, u64)>,
    pub(crate) mark: Mark,
}

fn storage(what: &str, error: &std::io::Error) -> LogFault {
    LogFault::Storage(format!("{what}: {error}"))
}

/// What to do about a file that is not there any more.
fn gone(dir: &Path, name: &str) -> LogFault {
    LogFault::Storage(format!(
        "{} is missing; restore it from a copy: without it the log is not whole",
        dir.join(name).display()
    ))
}

/// The newest mark of a directory that is whole.
pub fn read_mark(disk: &dyn Disk, dir: &Path) -> Result<Option<Mark>, LogFault> {
    let path = dir.join(MARK_FILE);
    if !disk.exists(&path) {
        return Ok(None);
    }
    let file = disk.open(&path, false).map_err(|e| storage("open the mark", &e))?;
    let mut best: Option<Mark> = None;
    for slot in 0..2 {
        let mut bytes = [0; MARK_BYTES];
        let read =
            file.read_at(&mut bytes, slot * MARK_SLOT_STRIDE).map_err(|e| storage("read the mark", &e))?;
        let found = decode_mark(&bytes[..read]);
        best = best.into_iter().chain(found).max_by_key(|mark| mark.sequence);
    }
    Ok(best)
}

impl Recovered {
    /// What was found is whole, before anything is written behind it.
    pub(crate) fn check(&self) {
        let numbers: Vec<u64> = self.segments.iter().map(|segment| segment.number).collect();
        assert!(
            numbers.windows(2).all(|pair| pair[0] + 1 == pair[1]),
            "segments without a hole: {numbers:?}"
        );
        let end = self.current.unwrap_or((u64::MAX, 0));
        let mark = (self.mark.segment, self.mark.offset);
        assert!(mark <= end, "nothing behind the end {end:?} was synced: {mark:?}");
        assert!(self.groups.values().all(|group| group.next > Position(0)), "positions begin with 1");
    }
}

/// What one segment holds.
struct Scanned {
    segment: Segment,
    end: u64,
    /// The segment's first record was read whole.
    begun: bool,
    /// Why reading stopped before the end of the file.
    damage: Option<LogFault>,
}

impl Scanned {
    /// Refuses a segment that ends before what was synced of it.
    fn check_synced(&self, synced_to: u64) -> Result<(), LogFault> {
        if self.end >= synced_to {
            return Ok(());
        }
        Err(self.damage.clone().unwrap_or_else(|| LogFault::Corrupt {
            position: Position(0),
            file: segment_name(self.segment.number),
            offset: self.end,
            what: format!("the file ends at {}, but {synced_to} bytes were synced", self.end),
        }))
    }
}

/// Crashed while the segment was being begun: nothing in it was acknowledged, the groups are in the one before, and the segment
/// is begun anew. What is whole and does not follow on that one is no such crash.
fn remove_unbegun(disk: &dyn Disk, dir: &Path, scanned: Scanned) -> Result<(), LogFault> {
    let number = scanned.segment.number;
    if let Some(fault @ LogFault::Corrupt { .. }) = scanned.damage.filter(|_| is_whole(disk, dir, number)) {
        return Err(fault);
    }
    let path = dir.join(segment_name(number));
    disk.remove(&path).map_err(|e| storage("remove an empty segment", &e))?;
    disk.sync_dir(dir).map_err(|e| storage("sync the log's directory", &e))
}

/// The mark does not know a segment that has records.
fn unknown_segment(dir: &Path, number: u64, mark: Mark) -> LogFault {
    if mark.sequence == 0 {
        return no_mark(dir);
    }
    LogFault::Storage(format!(
        "{} is an older copy: it does not know segment {}; restore the newer one",
        dir.join(MARK_FILE).display(),
        segment_name(number)
    ))
}

/// Opens a segment and checks that it is one of this cluster's.
fn open_segment(disk: &dyn Disk, dir: &Path, number: u64, cluster: u64) -> Result<SegmentReader, LogFault> {
    let reader = SegmentReader::open(disk, dir, number)?;
    if reader.cluster() != cluster {
        let what = format!("it belongs to cluster {:016x}, not to {cluster:016x}", reader.cluster());
        return Err(reader.corrupt(0, Position(0), what));
    }
    Ok(reader)
}

/// Follows the segments of a directory in order.
struct Following<'a> {
    disk: &'a dyn Disk,
    dir: &'a Path,
    cluster: u64,
    /// Whether a damaged record keeps its group alone from being opened.
    may_quarantine: bool,
    continuity: Continuity,
    quarantined: BTreeMap<LogletId, LogFault>,
    segments: Vec<Segment>,
}

impl<'a> Following<'a> {
    fn new(disk: &'a dyn Disk, dir: &'a Path, cluster: u64, may_quarantine: bool) -> Following<'a> {
        let (continuity, quarantined) = (Continuity::default(), BTreeMap::new());
        Following { disk, dir, cluster, may_quarantine, continuity, quarantined, segments: Vec::new() }
    }

    /// Reads a segment to its end, following its records. What lies before `synced_to` was synced.
    fn scan(&mut self, number: u64, synced_to: u64) -> Result<Scanned, LogFault> {
        let mut scanned = Scanned {
            segment: Segment { number, ..Segment::default() },
            end: SEGMENT_HEADER_BYTES,
            begun: false,
            damage: None,
        };
        let mut reader = match open_segment(self.disk, self.dir, number, self.cluster) {
            Ok(reader) => reader,
            Err(fault @ LogFault::Corrupt { .. }) => {
                (scanned.end, scanned.damage) = (0, Some(fault));
                return Ok(scanned);
            }
            Err(fault) => return Err(fault),
        };
        loop {
            let at = reader.offset();
            let is_synced = self.may_quarantine && at < synced_to;
            let record = match reader.next_found() {
                Ok(None) => break,
                Ok(Some(Found::Whole(record))) => record,
                Ok(Some(Found::Damaged(header, fault)))
                    if is_synced && scanned.begun && header.kind != RecordKind::Groups =>
                {
                    self.quarantine(header.group, fault);
                    scanned.end = reader.offset();
                    continue;
                }
                Ok(Some(Found::Damaged(_, fault))) | Err(fault @ LogFault::Corrupt { .. }) => {
                    scanned.damage = Some(fault);
                    break;
                }
                Err(fault) => return Err(fault),
            };
            let group = record.group;
            let followed = match (scanned.begun, record.kind) {
                (false, RecordKind::Groups) => self.begin(number, &record).map(|()| Effect::None),
                (false, _) => {
                    Err(reader.corrupt(at, Position(0), "it does not begin with its groups".into()))
                }
                (true, RecordKind::Groups) => {
                    Err(reader.corrupt(at, record.position, "groups in the middle of a segment".into()))
                }
                (true, RecordKind::Remove) => {
                    self.quarantined.remove(&group);
                    self.continuity.follow_again(group);
                    self.continuity.follow(&record, at)
                }
                (true, _) if self.continuity.is_quarantined(group) => Ok(Effect::None),
                (true, _) => self.continuity.follow(&record, at),
            };
            match followed {
                Ok(effect) => scanned.segment.take(group, record.position, effect, at),
                Err(fault) if is_synced && scanned.begun && record.kind != RecordKind::Groups => {
                    self.quarantine(group, fault);
                }
                Err(fault) => {
                    scanned.damage = Some(fault);
                    break;
                }
            }
            scanned.begun = true;
            assert!(reader.offset() > scanned.end, "every record takes some bytes");
            scanned.end = reader.offset();
        }
        scanned.segment.bytes = scanned.end;
        Ok(scanned)
    }

    /// Takes the record that begins a segment; it knows which groups were quarantined then, and which removed.
    fn begin(&mut self, number: u64, groups: &Record) -> Result<(), LogFault> {
        self.continuity.begin(number, groups)?;
        let continuity = &self.continuity;
        self.quarantined.retain(|group, _| continuity.is_quarantined(*group));
        for group in continuity.quarantined() {
            let damaged = || LogFault::Corrupt {
                position: continuity.last(*group).unwrap_or_default().next(),
                file: segment_name(number),
                offset: 0,
                what: format!("a record of {group} was damaged in a segment before this one"),
            };
            if !self.quarantined.contains_key(group) {
                if !self.may_quarantine {
                    return Err(damaged());
                }
                self.quarantined.insert(*group, damaged());
            }
        }
        Ok(())
    }

    fn quarantine(&mut self, group: LogletId, fault: LogFault) {
        tracing::error!(%group, %fault, "a group is not opened: one of its records is damaged");
        self.continuity.quarantine(group);
        self.quarantined.entry(group).or_insert(fault);
    }

    /// Adds the next segment, and takes away of those before it what it restarts.
    fn add(&mut self, segment: Segment) {
        for (group, span) in &segment.spans {
            if let Some(restart) = span.restart {
                cut_earlier(&mut self.segments, *group, restart);
            }
        }
        self.segments.push(segment);
    }

    /// What a closed segment holds: from its index, or from the segment itself where the index is missing or does not
    /// fit. Either must follow on the segments before.
    fn closed(&mut self, number: u64) -> Result<Segment, LogFault> {
        let bytes = self
            .disk
            .open(&self.dir.join(segment_name(number)), false)
            .and_then(|file| file.len())
            .map_err(|e| storage("size of a segment", &e))?;
        if let Some(index) = read_index(self.disk, self.dir, number).filter(|index| index.bytes == bytes) {
            let groups = first_record(self.disk, self.dir, number, self.cluster)?;
            self.begin(number, &groups)?;
            for (id, span) in &index.spans {
                self.continuity.indexed(*id, span, SEGMENT_HEADER_BYTES)?;
            }
            return Ok(Segment { number, spans: index.spans, bytes });
        }
        let scanned = self.scan(number, u64::MAX)?;
        // A closed segment was synced as a whole.
        if let Some(damage) = scanned.damage {
            return Err(damage);
        }
        if !scanned.begun {
            return Err(LogFault::Corrupt {
                position: Position(0),
                file: segment_name(number),
                offset: 0,
                what: "the segment holds nothing, but there are later ones; restore it".into(),
            });
        }
        let mut segment = scanned.segment;
        // An index would hide what is damaged.
        if self.quarantined.is_empty() {
            tracing::warn!(segment = %segment_name(number), "the index did not fit and is rebuilt");
            let index = Index { number, bytes, spans: segment.spans.clone() };
            // It only makes the next start quicker; without it what was found stays.
            if self.disk.replace(&index_path(self.dir, number), &encode_index(&index)).is_ok() {
                segment.spans.values_mut().for_each(|span| span.offsets = Vec::new());
            }
        }
        Ok(segment)
    }
}

fn no_mark(dir: &Path) -> LogFault {
    LogFault::Storage(format!(
        "{} (the mark of what was synced) is missing or damaged; restore it from a copy",
        dir.join(MARK_FILE).display()
    ))
}

/// The mark of a directory that holds these segments. One without a mark never synced anything, or has lost it: then what
/// was acknowledged cannot be told from a torn tail.
fn known_mark(disk: &dyn Disk, dir: &Path, mark: Option<Mark>, numbers: &[u64]) -> Result<Mark, LogFault> {
    let mark = match mark {
        Some(mark) => mark,
        None if is_first_start(disk, dir, numbers) => Mark { first: 1, ..Mark::default() },
        None => return Err(no_mark(dir)),
    };
    match numbers.last() {
        Some(last) if mark.segment <= *last => Ok(mark),
        _ => Err(gone(dir, &segment_name(mark.segment))),
    }
}

/// Recovers for writing: cuts a torn tail off, refuses damage before the mark and positions that are missing. With
/// `may_quarantine` damage to a record keeps its group alone from being opened.
pub(crate) fn recover(
    disk: &dyn Disk,
    dir: &Path,
    cluster: u64,
    may_quarantine: bool,
) -> Result<Recovered, LogFault> {
    disk.create_dir_all(dir).map_err(|e| storage("make the log's directory", &e))?;
    check_finished(disk, dir)?;
    let mark = read_mark(disk, dir)?;
    let (numbers, trimmed) = kept(disk, dir, mark.as_ref())?;
    let Some(&last) = numbers.last() else {
        if let Some(mark) = mark {
            return Err(gone(dir, &segment_name(mark.segment)));
        }
        return Ok(Recovered { mark: Mark { first: 1, ..Mark::default() }, ..Recovered::default() });
    };
    let mut mark = known_mark(disk, dir, mark, &numbers)?;
    if mutants::is(Mutant::SyncedTailCut) && mark.segment == last {
        mark.offset = SEGMENT_HEADER_BYTES;
    }
    // The process before this one may have left it in the system's memory only, and a sync that failed may have left it there
    // for good. What it calls trimmed goes, and what it knows grows, only once it is durable.
    if mark.sequence > 0 && !mutants::is(Mutant::CachedMarkBelieved) {
        make_durable(disk, dir, mark)?;
    }
    remove_trimmed(disk, dir, trimmed)?;
    let mut following = Following::new(disk, dir, cluster, may_quarantine);
    for &number in &numbers[..numbers.len() - 1] {
        let segment = following.closed(number)?;
        following.add(segment);
    }
    let synced_to = if mark.segment == last { mark.offset } else { 0 };
    let scanned = following.scan(last, synced_to)?;
    scanned.check_synced(synced_to)?;
    if !scanned.begun {
        remove_unbegun(disk, dir, scanned)?;
        return match numbers.len() {
            1 => Ok(Recovered { mark, ..Recovered::default() }),
            _ => recover(disk, dir, cluster, may_quarantine),
        };
    }
    if mark.segment < last && scanned.end > first_record_end(disk, dir, last)? {
        return Err(unknown_segment(dir, last, mark));
    }
    settle_tail(disk, dir, last, scanned.end, (mark.segment == last).then_some(synced_to))?;
    if mark.segment < last && !mutants::is(Mutant::SegmentGoesOnUnmarked) {
        // Whoever began it did not come to its mark. Before anything more is in it the mark must know it, durably.
        disk.sync_dir(dir).map_err(|e| storage("sync the log's directory", &e))?;
        mark = Mark { sequence: mark.sequence + 1, segment: last, offset: scanned.end, ..mark };
        make_durable(disk, dir, mark)?;
    }
    following.add(scanned.segment);
    Ok(Recovered {
        groups: following.continuity.into_groups(),
        quarantined: following.quarantined,
        segments: following.segments,
        current: Some((last, scanned.end)),
        mark,
    })
}

/// Cuts off what is torn behind the end of the last segment, and makes durable what lies before it. `synced_to` is how far that
/// was synced, where the mark knows the segment.
fn settle_tail(
    disk: &dyn Disk,
    dir: &Path,
    last: u64,
    end: u64,
    synced_to: Option<u64>,
) -> Result<(), LogFault> {
    let file =
        disk.open(&dir.join(segment_name(last)), false).map_err(|e| storage("open the last segment", &e))?;
    if file.len().map_err(|e| storage("size of the last segment", &e))? > end {
        file.set_len(end).map_err(|e| storage("cut a torn tail", &e))?;
    }
    // What was found may not be durable, and a sync that failed before may have left its pages looking clean:
    // readers will see these bytes from now on, so they are written once more.
    if !mutants::is(Mutant::TailNotWrittenAgain) {
        // Of a segment that the mark does not know, the header, too.
        let from = synced_to.map_or(0, |synced_to| synced_to.clamp(SEGMENT_HEADER_BYTES, end));
        let mut tail = vec![0; (end - from) as usize];
        let read = file.read_at(&mut tail, from).map_err(|e| storage("read the tail", &e))?;
        file.write_at(&tail[..read], from).map_err(|e| storage("write the tail again", &e))?;
        file.sync().map_err(|e| storage("sync the last segment", &e))?;
    }
    Ok(())
}

/// A first start that crashed before its first sync acknowledged nothing and has no mark.
fn is_first_start(disk: &dyn Disk, dir: &Path, numbers: &[u64]) -> bool {
    numbers == [1]
        && disk.open(&dir.join(segment_name(1)), false).is_ok_and(|file| {
            file.len().is_ok_and(|length| length <= 4096 || begins_and_ends(disk, dir, length))
        })
}

/// Whether the first segment has its first record and nothing behind it: more groups than fit a page were about to begin.
fn begins_and_ends(disk: &dyn Disk, dir: &Path, length: u64) -> bool {
    is_whole(disk, dir, 1) && first_record_end(disk, dir, 1).is_ok_and(|end| end == length)
}

/// Whether a segment's first record can be read.
fn is_whole(disk: &dyn Disk, dir: &Path, number: u64) -> bool {
    SegmentReader::open(disk, dir, number).is_ok_and(|mut reader| matches!(reader.next_record(), Ok(Some(_))))
}

/// Where the record that begins a segment ends.
fn first_record_end(disk: &dyn Disk, dir: &Path, number: u64) -> Result<u64, LogFault> {
    let mut reader = SegmentReader::open(disk, dir, number)?;
    reader.next_record()?;
    Ok(reader.offset())
}

fn read_index(disk: &dyn Disk, dir: &Path, number: u64) -> Option<Index> {
    let file = disk.open(&index_path(dir, number), false).ok()?;
    let mut bytes = vec![0; INDEX_READ_BYTES_MAX.min(usize::try_from(file.len().ok()?).ok()?)];
    let read = file.read_at(&mut bytes, 0).ok()?;
    decode_index(&bytes[..read]).map(|(index, _)| index).filter(|index| index.number == number)
}

fn first_record(disk: &dyn Disk, dir: &Path, number: u64, cluster: u64) -> Result<Record, LogFault> {
    let mut reader = open_segment(disk, dir, number, cluster)?;
    let at = reader.offset();
    match reader.next_record()? {
        Some(record) if record.kind == RecordKind::Groups => Ok(record),
        _ => Err(reader.corrupt(at, Position(0), "it does not begin with its groups".into())),
    }
}

/// The segments that were not trimmed, in order and without a hole, and what an interrupted trim left.
fn kept(disk: &dyn Disk, dir: &Path, mark: Option<&Mark>) -> Result<(Vec<u64>, Vec<u64>), LogFault> {
    let names = disk.list(dir).map_err(|e| storage("list the log's directory", &e))?;
    let mut numbers: Vec<u64> = names.iter().filter_map(|n| segment_number(n)).collect();
    numbers.sort_unstable();
    let first = mark.map_or(1, |mark| mark.first.max(1));
    let trimmed: Vec<u64> = numbers.iter().copied().filter(|number| *number < first).collect();
    numbers.retain(|number| *number >= first);
    // Without a mark nothing was trimmed yet, or it is lost: that is told apart by the caller.
    let begins = if mark.is_some() { Some(first) } else { numbers.first().copied() };
    let expected = begins.into_iter().flat_map(|first| first..);
    for (number, expected) in numbers.iter().zip(expected) {
        if *number != expected {
            return Err(gone(dir, &segment_name(expected)));
        }
    }
    Ok((numbers, trimmed))
}

/// Writes a mark in its place, once more if it is there: that it was read says nothing of the disk.
pub fn make_durable(disk: &dyn Disk, dir: &Path, mark: Mark) -> Result<(), LogFault> {
    let written = || {
        let file = disk.open(&dir.join(MARK_FILE), true)?;
        let is_late = mutants::is(Mutant::MarkRenewedAfterSync);
        if is_late {
            file.sync()?;
        }
        file.write_at(&encode_mark(mark), mark_offset(mark))?;
        if !is_late {
            file.sync()?;
        }
        disk.sync_dir(dir)
    };
    written().map_err(|e| storage(&format!("write {} once more", dir.join(MARK_FILE).display()), &e))
}

/// Removes what an interrupted trim left.
fn remove_trimmed(disk: &dyn Disk, dir: &Path, trimmed: Vec<u64>) -> Result<(), LogFault> {
    if trimmed.is_empty() {
        return Ok(());
    }
    for number in trimmed {
        disk.remove(&dir.join(segment_name(number))).map_err(|e| storage("remove a segment", &e))?;
        let index = index_path(dir, number);
        if disk.exists(&index) {
            disk.remove(&index).map_err(|e| storage("remove an index", &e))?;
        }
    }
    disk.sync_dir(dir).map_err(|e| storage("sync the log's directory", &e))
}

/// What [`open_read_only`] found.
pub struct Summary {
    /// Segments, oldest first.
    pub segments: Vec<u64>,
    /// Every record before this place was synced: segment and offset.
    pub synced: (u64, u64),
    /// The last position of each log before the first segment; what lies at or below was trimmed.
    pub before: BTreeMap<LogletId, Position>,
}

/// Looks at a directory of segments without changing it: for replay and verification, also of a running engine.
pub fn open_read_only(disk: &dyn Disk, dir: &Path) -> Result<Summary, LogFault> {
    check_finished(disk, dir)?;
    let mark = read_mark(disk, dir)?;
    let (segments, _) = kept(disk, dir, mark.as_ref())?;
    if segments.is_empty() {
        return Err(LogFault::Storage(format!("{} holds no log segments", dir.display())));
    }
    let mark = known_mark(disk, dir, mark, &segments)?;
    let mut before = BTreeMap::new();
    if let Some(first) = SegmentReader::open(disk, dir, segments[0])?.next_record()?
        && first.kind == RecordKind::Groups
    {
        for line in &first.entries {
            let line = decode_group(line).map_err(LogFault::Storage)?;
            before.insert(line.group, line.last);
        }
    }
    Ok(Summary { segments, synced: (mark.segment, mark.offset), before })
}
