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
    format::{Entry, Location, RecordHeader},
    index,
};
use crate::{
    format::pages,
    store::{Expected, VERIFY_BYTES},
};

/// So many bytes are moved at a time, and what changes meanwhile waits for no more.
const MOVED_AT_A_TIME: u32 = 1 << 20;

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
        known.layers.frozen.is_some() || known.candidate(self.options.segment_bytes).is_some()
    }

    /// Writes changes to the index, while others go on. One at a time.
    pub(crate) fn merge(&self) -> Result<Upkeep, PackFault> {
        let (older, frozen, standing) = {
            let known = self.known.lock();
            let Some(frozen) = known.layers.frozen.clone() else { return Ok(Upkeep::Nothing) };
            (known.layers.index.clone(), frozen, self.standing(&known, known.frozen_to))
        };
        let is_of_disk = || !self.is_retired.load(Ordering::Acquire);
        let index = index::write(&*self.disk, &self.dir, older.as_deref(), &frozen, &standing, &is_of_disk)?;
        let mut known = self.known.lock();
        known.layers.index = Some(Arc::new(index));
        known.layers.frozen = None;
        Ok(Upkeep::Merged)
    }

    /// Moves some of what is needed of the segment of which least is, or removes it.
    pub(crate) fn compact(&self, tail: &mut Tail) -> Result<Upkeep, PackFault> {
        let mut moving = match tail.moving.take() {
            Some(moving) => moving,
            None => {
                let candidate = self.known.lock().candidate(self.options.segment_bytes);
                let Some(number) = candidate else { return Ok(Upkeep::Nothing) };
                let Some(moving) = self.look_through(number)? else { return Ok(Upkeep::Moved) };
                moving
            }
        };
        let (mut records, mut moved, mut bytes) = (Vec::new(), Vec::new(), 0);
        while bytes < MOVED_AT_A_TIME
            && let Some(entry) = moving.left.pop()
        {
            if !self.is_needed(moving.number, &entry)? {
                continue;
            }
            let at = Location { segment: moving.number, offset: entry.offset, length: entry.length };
            match entry.dead {
                Some(dead) => records.push(Record::Bury(entry.block, dead)),
                None => match self.copy(entry.block, at) {
                    Ok(record) => {
                        records.push(record);
                        moved.push(Record::Bury(entry.block, at));
                    }
                    Err(PackFault::Corrupt(_)) if !mutants::is(Mutant::DamagedRecordRemoved) => {
                        moving.is_damaged = true;
                    }
                    Err(PackFault::Corrupt(_)) => {}
                    Err(fault) => return Err(fault),
                },
            }
            bytes += entry.length;
        }
        // What replaces a record is durable before that is dead.
        self.append(tail, &records)?;
        self.append(tail, &moved)?;
        if !moving.left.is_empty() {
            tail.moving = Some(moving);
            return Ok(Upkeep::Moved);
        }
        if moving.is_damaged {
            return Ok(Upkeep::Stays);
        }
        self.remove(moving.number)?;
        Ok(Upkeep::Removed)
    }

    /// Finds out how much of a segment is needed; `None` when that is so much that it stays.
    fn look_through(&self, number: u32) -> Result<Option<Moving>, PackFault> {
        let mut left = self.entries(number)?;
        let mut live = 0;
        for entry in &left {
            if self.is_needed(number, entry)? {
                live += entry.length;
            }
        }
        left.reverse();
        let mut known = self.known.lock();
        let removals = known.removals;
        if let Some(segment) = known.segments.get_mut(&number) {
            segment.usage.live = live;
            segment.looked_at = Some((removals, live));
        }
        Ok((live < self.options.segment_bytes / 2).then_some(Moving { number, left, is_damaged: false }))
    }

    /// Whether anybody needs a record of a segment.
    fn is_needed(&self, number: u32, entry: &Entry) -> Result<bool, PackFault> {
        match entry.dead {
            // As long as what is dead can be found.
            Some(at) if mutants::is(Mutant::DeadForgotten) => Ok(at.segment == 0),
            Some(at) => Ok(at.segment != number && self.has(at.segment)),
            None => {
                let at = Location { segment: number, offset: entry.offset, length: entry.length };
                Ok(self.locate(entry.block)? == Some(at))
            }
        }
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
        Ok(Record::put(expected, &data))
    }

    /// Removes a segment of which nothing is needed.
    fn remove(&self, number: u32) -> io::Result<()> {
        self.disk.remove(&self.segment_path(number))?;
        let index = self.index_path(number);
        if self.disk.exists(&index) {
            self.disk.remove(&index)?;
        }
        self.disk.sync_dir(&self.dir)?;
        let mut known = self.known.lock();
        known.segments.remove(&number);
        known.removals += 1;
        Ok(())
    }
}

impl super::Known {
    /// The segment of which least is needed, if that is less than half of one. Never the last one: numbers are not used again, since
    /// records speak of them.
    fn candidate(&self, segment_bytes: u32) -> Option<u32> {
        let last = self.segments.keys().next_back()?;
        let sparse = self.segments.range(..last).filter(|(_, segment)| {
            let known = segment.looked_at == Some((self.removals, segment.usage.live));
            segment.is_closed && segment.header.is_some() && segment.usage.live < segment_bytes / 2 && !known
        });
        sparse.min_by_key(|(_, segment)| segment.usage.live).map(|(number, _)| *number)
    }
}
