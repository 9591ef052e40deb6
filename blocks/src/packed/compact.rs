//! Upkeep: changes are written to the index, and segments that are mostly dead are moved and removed.

use std::{
    io,
    sync::{Arc, atomic::Ordering},
};

use clutch_proto::{
    BlockId,
    mutants::{self, Mutant},
};

use super::{
    Pack, PackFault, Record, Tail,
    format::{Entry, Location, RECORD_HEADER_BYTES, RecordHeader},
    index,
};
use crate::{
    format::pages,
    store::{Expected, VERIFY_BYTES},
};

/// So many bytes are moved at a time, and what changes meanwhile waits for no more.
const MOVED_AT_A_TIME: u32 = 1 << 20;
/// And so many records are looked at.
const LOOKED_AT_AT_A_TIME: usize = 1024;

/// A segment that is being moved.
pub(super) struct Moving {
    number: u32,
    /// What is still to be looked at, the next one last.
    left: Vec<Entry>,
    /// A record that is needed cannot be read.
    is_damaged: bool,
}

/// What was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Upkeep {
    /// There is nothing to do.
    Nothing,
    /// Changes were written to the index.
    Merged,
    /// A segment was looked through.
    Looked,
    /// Some records were moved.
    Moved,
    /// A segment was removed.
    Removed,
    /// A segment stays although it is mostly dead: a record in it is damaged.
    Stays,
}

impl Upkeep {
    /// What a simulation takes note of.
    pub(crate) fn note(self) -> &'static str {
        match self {
            Upkeep::Nothing => "blocks: nothing to look after",
            Upkeep::Merged => "blocks: an index is written",
            Upkeep::Looked => "blocks: a segment is looked through",
            Upkeep::Moved => "blocks: small blocks are moved",
            Upkeep::Removed => "blocks: a segment is removed",
            Upkeep::Stays => "blocks: a damaged record keeps its segment",
        }
    }
}

impl Pack {
    /// Whether there may be something to do.
    pub(crate) fn is_due(&self) -> bool {
        let known = self.known.lock();
        known.layers.frozen.is_some() || known.has_sparse
    }

    /// Writes changes to the index, while others go on. One at a time.
    pub(crate) fn merge(&self) -> Result<Upkeep, PackFault> {
        let (older, frozen, standing) = {
            let known = self.known.lock();
            let Some(frozen) = known.layers.frozen.clone() else { return Ok(Upkeep::Nothing) };
            (known.layers.index.clone(), frozen, self.standing(&known, known.frozen_to))
        };
        let is_of_disk = || !self.is_retired.load(Ordering::Acquire);
        let (disk, dir) = (&*self.disk, &self.dir);
        let index = index::write(disk, dir, older.as_deref(), &frozen, &standing, &is_of_disk)?;
        let mut known = self.known.lock();
        known.layers.index = Some(Arc::new(index));
        known.layers.frozen = None;
        Ok(Upkeep::Merged)
    }

    /// Looks for a segment that is to be moved, and how much of it is needed, while others go on. One at a time.
    pub(crate) fn look(&self) -> Result<Upkeep, PackFault> {
        if self.moving.lock().is_some() {
            return Ok(Upkeep::Nothing);
        }
        let Some(number) = self.known.lock().candidate() else { return Ok(Upkeep::Nothing) };
        match self.look_through(number) {
            Ok(moving) => *self.moving.lock() = moving,
            Err(PackFault::Disk(error)) if error.kind() == io::ErrorKind::NotFound => {
                // It was removed, and only that was not durable.
                self.forget(number);
            }
            Err(fault) => {
                self.known.lock().stays(number);
                return Err(fault);
            }
        }
        Ok(Upkeep::Looked)
    }

    /// Moves some of what is needed of the segment that is being moved, or removes it.
    pub(crate) fn compact(&self, tail: &mut Tail) -> Result<Upkeep, PackFault> {
        let Some(mut moving) = self.moving.lock().take() else { return Ok(Upkeep::Nothing) };
        let (mut records, mut bytes, mut looked_at) = (Vec::new(), 0, 0);
        while bytes < MOVED_AT_A_TIME
            && looked_at < LOOKED_AT_AT_A_TIME
            && let Some(entry) = moving.left.pop()
        {
            looked_at += 1;
            if self.is_death_needed(moving.number, &entry)
                && let Some(dead) = entry.dead
            {
                records.push(Record::Bury(entry.block, dead));
                bytes += RECORD_HEADER_BYTES;
            }
            if !self.is_block_needed(moving.number, &entry)? {
                continue;
            }
            bytes += entry.length;
            let at = Location { segment: moving.number, offset: entry.offset, length: entry.length };
            match self.copy(entry.block, at) {
                Ok(record) => records.push(record),
                Err(PackFault::Index(what)) => return Err(PackFault::Index(what)),
                // Also one that the disk cannot read: the others are moved.
                Err(PackFault::Corrupt(_) | PackFault::Disk(_)) => {
                    moving.is_damaged = !mutants::is(Mutant::DamagedRecordRemoved);
                }
            }
        }
        // A copy says itself that what it replaces is dead: neither is durable without the other.
        self.append(tail, &records)?;
        if !moving.left.is_empty() {
            *self.moving.lock() = Some(moving);
            return Ok(Upkeep::Moved);
        }
        if moving.is_damaged {
            self.known.lock().stays(moving.number);
            return Ok(Upkeep::Stays);
        }
        self.remove(moving.number)?;
        Ok(Upkeep::Removed)
    }

    /// Finds out how much of a segment is needed; `None` when that is so much that it stays.
    fn look_through(&self, number: u32) -> Result<Option<Moving>, PackFault> {
        let mut left = self.entries(number)?;
        let (mut live, mut deaths) = (0, 0);
        for entry in &left {
            if self.is_block_needed(number, entry)? {
                live += entry.length;
            }
            if self.is_death_needed(number, entry) {
                deaths += RECORD_HEADER_BYTES;
            }
        }
        left.reverse();
        let mut known = self.known.lock();
        let removals = known.removals;
        let Some(segment) = known.segments.get_mut(&number) else { return Ok(None) };
        segment.usage.live = live;
        segment.looked_at = Some((removals, live));
        let is_sparse = live + deaths < segment.usage.bytes / 2;
        Ok(is_sparse.then_some(Moving { number, left, is_damaged: false }))
    }

    /// Whether a record of a segment is what a block is read from.
    fn is_block_needed(&self, number: u32, entry: &Entry) -> Result<bool, PackFault> {
        let at = Location { segment: number, offset: entry.offset, length: entry.length };
        Ok(entry.is_block && self.locate(entry.block)? == Some(at))
    }

    /// Whether a record of a segment must go on to say what is dead: as long as that can be found.
    fn is_death_needed(&self, number: u32, entry: &Entry) -> bool {
        let is_dead = |at: Location| at.segment != number && self.known.lock().can_be_found(at);
        entry.dead.is_some_and(is_dead) && !mutants::is(Mutant::DeadForgotten)
    }

    /// A record once more, when it is whole.
    fn copy(&self, block: BlockId, at: Location) -> Result<Record, PackFault> {
        let file = self.disk.open(&self.segment_path(at.segment), false)?;
        let (header, _) = self.head(&*file, at)?;
        let RecordHeader::Block { block: there, size, crc, time, stored, .. } = header else {
            return Err(PackFault::Corrupt("its record is of something else".into()));
        };
        let expected = Expected { block, size, crc, time };
        assert!(pages(stored) <= pages(size), "no more is stored than there is");
        if there != block {
            return Err(PackFault::Corrupt("its record is of another block".into()));
        }
        let mut data = Vec::with_capacity(size as usize);
        while (data.len() as u32) < size {
            let from = data.len() as u32;
            data.extend_from_slice(&self.read_at(at, &expected, from, VERIFY_BYTES.min(size - from))?);
        }
        if crc32fast::hash(&data) != crc {
            return Err(PackFault::Corrupt("it does not have its CRC".into()));
        }
        Ok(Record::put(expected, &data, Some(at)))
    }

    /// Removes a segment of which nothing is needed.
    fn remove(&self, number: u32) -> io::Result<()> {
        self.disk.remove(&self.segment_path(number))?;
        self.forget(number);
        let index = self.index_path(number);
        if self.disk.exists(&index) {
            self.disk.remove(&index)?;
        }
        self.disk.sync_dir(&self.dir)?;
        self.known.lock().may_come_back.remove(&number);
        Ok(())
    }

    /// A segment is not there any more. A crash may bring it back, with nothing that is needed.
    fn forget(&self, number: u32) {
        let mut known = self.known.lock();
        known.segments.remove(&number);
        known.may_come_back.insert(number);
        known.removals += 1;
        known.has_sparse = true;
    }
}

impl super::Known {
    /// A segment cannot be moved, as long as no more of it is dead.
    fn stays(&mut self, number: u32) {
        if let Some(segment) = self.segments.get_mut(&number) {
            segment.stays_at = Some(segment.usage.live);
        }
    }

    /// The segment of which least is needed, if that is less than half of it. Never the last one: numbers are not used again, since
    /// records speak of them.
    fn candidate(&mut self) -> Option<u32> {
        self.has_sparse = false;
        let last = self.segments.keys().next_back()?;
        let sparse = self.segments.range(..last).filter(|(_, segment)| {
            let live = segment.usage.live;
            let is_known = segment.looked_at == Some((self.removals, live)) || segment.stays_at == Some(live);
            segment.is_closed && live < segment.usage.bytes / 2 && !is_known
        });
        let (number, _) = sparse.min_by_key(|(_, segment)| segment.usage.live)?;
        self.has_sparse = true;
        Some(*number)
    }
}
