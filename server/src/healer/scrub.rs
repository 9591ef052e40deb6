//! Reading a disk through, and what was asked for in vain.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use clutch_blocks::{BlockService, scrub::Position};
use clutch_client::ClientError;
use clutch_client_maintenance::heal::{self, Healed};
use clutch_proto::{
    Time,
    mutants::{self, Mutant},
};
use clutch_shard::FLAG_CONDEMNED;

use super::{Healer, REPAIRING};

/// Bytes of a disk's blocks that are read in a second at most so that they are looked at.
const BYTES_PER_S: u64 = 64 << 20;
/// How often it is written down how far a disk has been read.
const KEEP_EVERY: Duration = Duration::from_secs(60);
/// A disk of which not all that was lost could be repaired is not read at once again before this: it would be read for ever.
const HURRY_EVERY: Duration = Duration::from_secs(600);
/// A page of which not all blocks could be looked at is tried so often again.
const TRIES: u32 = 3;
/// Parts of what is stored: slots.
const PARTS: u128 = 256;

/// How far a disk has been read, and how it goes on.
struct Reading {
    position: Position,
    /// When the position was written down last, by the monotonic clock.
    kept: Duration,
    /// Before this, by the monotonic clock, no hasty reading begins.
    rests_until: Duration,
    /// One is to begin then.
    wants_hurry: bool,
    /// The present one has met what could not be repaired.
    has_failed: bool,
    /// How often the present page was tried.
    tries: u32,
}

impl Reading {
    fn at(position: Position, now: Duration) -> Reading {
        let rests_until = Duration::ZERO;
        Reading { position, kept: now, rests_until, wants_hurry: false, has_failed: false, tries: 0 }
    }

    /// Whether more of it is to be read now, when it is to be read once in so long.
    fn is_due(&mut self, now: Time, every: Duration) -> bool {
        if self.position.is_hasty {
            return true;
        }
        if every.is_zero() {
            return false;
        }
        let position = &mut self.position;
        // A clock that was set back, or has never been right.
        if position.begun > now {
            position.begun = now;
        }
        let (age, every) = (u128::from(now.0 - position.begun.0), every.as_nanos());
        match position.after.first() {
            None => age >= every,
            Some(part) => age * PARTS >= every * u128::from(*part),
        }
    }

    /// All of the disk is read, from the beginning and at once; whether that is new.
    fn hurry(&mut self, now: Duration) -> bool {
        if self.position.is_hasty {
            return false;
        }
        if now < self.rests_until {
            self.wants_hurry = true;
            return false;
        }
        (self.wants_hurry, self.has_failed) = (false, false);
        self.position.is_hasty = true;
        self.position.after.clear();
        true
    }

    /// A page has been read; `next` is where the one behind it begins.
    fn advance(&mut self, next: &Bytes, (now, monotonic): (Time, Duration), every: Duration) {
        let position = &mut self.position;
        if position.after.is_empty() {
            // The next one begins so long after this one should have, so that rests do not add up.
            let every = u64::try_from(every.as_nanos()).unwrap_or(u64::MAX);
            let due = position.begun.0.saturating_add(every);
            let is_on_time = !position.is_hasty && now.0 >= due && now.0 - due <= every / 8;
            position.begun = if is_on_time { Time(due) } else { now };
        }
        position.after = next.to_vec();
        self.tries = 0;
        if next.is_empty() {
            position.ended = now;
            if position.is_hasty && self.has_failed {
                // Something may be in the way that is not there later.
                (self.rests_until, self.wants_hurry) = (monotonic + HURRY_EVERY, true);
            }
            position.is_hasty = false;
        }
    }
}

impl Healer {
    /// Looks after one disk until the node stops.
    pub(super) async fn look_after(&self, id: u64, service: Arc<BlockService>) {
        let mut reading = None;
        while self.goes_on().await {
            if service.is_away() {
                // What comes back may be another disk.
                reading = None;
                continue;
            }
            if reading.is_none() {
                reading = self.position_of(id, &service).await;
            }
            let Some(reading) = &mut reading else { continue };
            self.look_around(id, &service, reading).await;
            while !service.is_away() && reading.is_due(self.now(), self.settings.scrub_every) {
                match self.read_page(id, &service, reading).await {
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(error) => {
                        tracing::debug!(%error, "a disk is not read through for now");
                        break;
                    }
                }
                if self.stopping.load(Ordering::Relaxed) {
                    return;
                }
                self.look_around(id, &service, reading).await;
            }
        }
    }

    fn now(&self) -> Time {
        self.client.runtime().clock.now()
    }

    /// Where a disk that is used goes on. One that says nothing may be another one than before, or has just been made: then all of what the
    /// metadata know of it is looked for, and of a new one that is nothing.
    async fn position_of(&self, id: u64, service: &Arc<BlockService>) -> Option<Reading> {
        let (store, kept) = (service.store().clone(), self.client.runtime().clock.monotonic());
        let position = self.client.runtime().blocking(move || store.scrub_position()).await?.ok()?;
        let mut reading = Reading::at(Position::default(), kept);
        match position {
            Some(position) => reading.position = position,
            None => {
                reading.hurry(kept);
                self.keep(service, &mut reading).await;
            }
        }
        self.tell_position(id, &reading.position);
        Some(reading)
    }

    fn tell_position(&self, id: u64, position: &Position) {
        self.board.disk(id, |told| {
            told.scrubbed_at = position.ended.0;
            told.scrub_begun_at = if position.after.is_empty() { 0 } else { position.begun.0 };
            told.scrub_parts = position.after.first().copied().map_or(0, u32::from);
        });
    }

    async fn keep(&self, service: &Arc<BlockService>, reading: &mut Reading) {
        reading.kept = self.client.runtime().clock.monotonic();
        let (store, position) = (service.store().clone(), reading.position.clone());
        let kept = self.client.runtime().blocking(move || store.keep_scrub_position(&position)).await;
        if let Some(Err(error)) = kept {
            tracing::debug!(%error, "it is not written down how far a disk was read");
        }
    }

    /// Whether all of the disk is to be read from now on.
    async fn hurry(&self, service: &Arc<BlockService>, reading: &mut Reading) -> bool {
        let is_new = reading.hurry(self.client.runtime().clock.monotonic());
        if is_new {
            self.client.runtime().note("heal: a disk is read at once");
            self.keep(service, reading).await;
        }
        is_new
    }

    /// What comes before the next page: blocks that somebody has asked for in vain, and a disk that was condemned and is used again, which is
    /// compared with what the metadata know, not trusted.
    async fn look_around(&self, id: u64, service: &Arc<BlockService>, reading: &mut Reading) {
        self.repair_owed(id, service, reading).await;
        if reading.wants_hurry {
            self.hurry(service, reading).await;
        }
        let Ok(map) = self.client.map().await else { return };
        let flags = map.services.iter().find(|known| known.service_id == id).map_or(0, |known| known.flags);
        let is_condemned = flags & FLAG_CONDEMNED != 0;
        if reading.position.was_condemned != is_condemned {
            reading.position.was_condemned = is_condemned;
            match is_condemned {
                true => self.keep(service, reading).await,
                false => drop(self.hurry(service, reading).await),
            }
        }
    }

    async fn repair_owed(&self, id: u64, service: &Arc<BlockService>, reading: &mut Reading) {
        let mut owed = service.take_owed();
        if mutants::is(Mutant::OwedForgotten) {
            return;
        }
        while let Some(block) = owed.pop_first() {
            match heal::repair_block(&self.client, id, block, REPAIRING, &self.pace).await {
                Ok(healed) => {
                    self.tell(id, &healed);
                    if healed.missing > 0 {
                        self.hurry(service, reading).await;
                    }
                }
                Err(error) => {
                    tracing::debug!(%error, "what was asked for in vain is not looked at for now");
                    service.owe_again([block]);
                    break;
                }
            }
        }
        service.owe_again(owed);
    }

    /// Whether there may be more to read at once.
    async fn read_page(
        &self,
        id: u64,
        service: &Arc<BlockService>,
        reading: &mut Reading,
    ) -> Result<bool, ClientError> {
        let (clock, every) = (self.client.runtime().clock.clone(), self.settings.scrub_every);
        let after = Bytes::from(reading.position.after.clone());
        let begun = clock.monotonic();
        let (healed, next) = heal::scrub_page(&self.client, id, after, REPAIRING, &self.pace).await?;
        self.tell(id, &healed);
        if healed.missing > 0 && self.hurry(service, reading).await {
            // From the beginning, which comes to this page again.
            return Ok(true);
        }
        if healed.unanswered > 0 && reading.tries < TRIES {
            reading.tries += 1;
            return Ok(false);
        }
        // What could not be repaired is met again in the next round; the others do not wait for it.
        reading.has_failed |= healed.damaged > healed.moved;
        reading.advance(&next, (self.now(), clock.monotonic()), every);
        self.tell_position(id, &reading.position);
        if next.is_empty() {
            self.client.runtime().note("heal: a disk was read through");
        }
        if next.is_empty() || clock.monotonic() - reading.kept >= KEEP_EVERY {
            self.keep(service, reading).await;
        }
        let bytes = healed.services.get(&id).map_or(0, |load| load.bytes);
        let due = Duration::from_millis(bytes.saturating_mul(1000) / BYTES_PER_S);
        clock.sleep(due.saturating_sub(clock.monotonic() - begun)).await;
        Ok(true)
    }

    fn tell(&self, id: u64, healed: &Healed) {
        self.board.disk(id, |told| {
            told.checked += healed.checked + healed.damaged;
            told.damaged += healed.damaged;
            told.repaired += healed.moved;
        });
        if healed.damaged > 0 {
            self.client.runtime().note("heal: a block that was lost is found");
            let (service, lost, repaired) = (format!("{id:016x}"), healed.damaged, healed.moved);
            let failure = healed.failures.last().filter(|_| repaired < lost).map_or("", String::as_str);
            tracing::warn!(%service, lost, repaired, failure, "blocks were missing or damaged, and were written anew");
        }
        if healed.moved > 0 {
            self.client.runtime().note("heal: a block that was lost is written anew");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVERY: Duration = Duration::from_secs(2560);

    fn at(seconds: u64) -> Time {
        Time(seconds * 1_000_000_000)
    }

    fn reading() -> Reading {
        let position = Position { begun: at(1000), ..Position::default() };
        Reading::at(position, Duration::ZERO)
    }

    /// Reads what is due at a time; the parts that were read.
    fn read(reading: &mut Reading, now: u64) -> usize {
        let mut parts = 0;
        while reading.is_due(at(now), EVERY) {
            parts += 1;
            let part = reading.position.after.first().copied().unwrap_or(0);
            let next = part.checked_add(1).map_or_else(Bytes::new, |part| Bytes::copy_from_slice(&[part]));
            reading.advance(&next, (at(now), Duration::from_secs(now)), EVERY);
        }
        parts
    }

    #[test]
    fn a_disk_is_read_once_in_its_time_and_spread_over_it() {
        let mut of = reading();
        assert_eq!(read(&mut of, 1001), 0, "a new one waits");
        assert_eq!(read(&mut of, 3000), 0);
        let mut parts = 0;
        for now in 3560..3560 + 2560 {
            let read = read(&mut of, now);
            assert!(read <= 1, "{read} parts at {now}");
            parts += read;
        }
        assert_eq!((parts, of.position.ended > at(3560 + 2500)), (256, true));
        assert_eq!(of.position.after, [0_u8; 0]);
        // The next one begins on time, and what was missed meanwhile is made up for.
        assert_eq!(read(&mut of, 3560 + 2560 + 105), 11);
    }

    #[test]
    fn a_disk_that_has_lost_something_is_read_at_once() {
        let mut of = reading();
        read(&mut of, 1000 + 2560 + 100);
        assert!(of.hurry(Duration::from_secs(5)) && !of.hurry(Duration::from_secs(6)));
        assert_eq!(read(&mut of, 4000), 256);
        assert_eq!((of.position.ended, of.position.is_hasty), (at(4000), false));
        assert_eq!(read(&mut of, 4001), 0);
        // All was repaired, so what is lost now is new; and where it was not, it is tried again later.
        assert!(of.hurry(Duration::from_secs(4001)));
        of.has_failed = true;
        assert_eq!((read(&mut of, 4002), of.wants_hurry), (256, true));
        assert!(!of.hurry(Duration::from_secs(4601)), "not again so soon");
        assert!(of.hurry(Duration::from_secs(4602)) && !of.wants_hurry && !of.has_failed);
        of.position.is_hasty = false;
        assert!(!of.is_due(at(1_000_000), Duration::ZERO), "where it is never to be read");
        // A clock that goes back to where it never was is not waited for.
        assert_eq!(read(&mut of, 10), 0);
        assert!(read(&mut of, 10 + 2560) > 0);
    }
}
