//! Reading a disk through, and what was asked for in vain.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use clutch_blocks::{BlockService, scrub::Position};
use clutch_client::ClientError;
use clutch_client_maintenance::heal::{self, Healed};
use clutch_proto::{
    Time,
    mutants::{self, Mutant},
};
use clutch_shard::FLAG_CONDEMNED;

use super::Healer;

/// Bytes of a disk's blocks that are read in a second at most so that they are looked at.
const BYTES_PER_S: u64 = 64 << 20;
/// How often it is written down how far a disk has been read.
const KEEP_EVERY: Duration = Duration::from_secs(60);
/// Parts of what is stored: slots.
const PARTS: u128 = 256;

/// How far a disk has been read, and how it goes on.
struct Reading {
    position: Position,
    /// When the position was written down last, by the monotonic clock.
    kept: Duration,
    /// The disk has lost something: it is read at once, and not spread over the time that there is.
    is_hasty: bool,
    /// It was condemned when it was looked at last.
    was_condemned: bool,
}

impl Reading {
    /// Whether more of it is to be read now, when it is to be read once in so long.
    fn is_due(&mut self, now: Time, every: Duration) -> bool {
        if self.is_hasty {
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

    /// All of the disk is read, from the beginning and at once.
    fn hurry(&mut self) {
        if !self.is_hasty {
            self.is_hasty = true;
            self.position.after.clear();
        }
    }

    /// A page has been read; `next` is where the one behind it begins.
    fn advance(&mut self, next: &Bytes, now: Time, every: Duration) {
        let position = &mut self.position;
        if position.after.is_empty() {
            // The next one begins so long after this one should have, so that rests do not add up.
            let every = u64::try_from(every.as_nanos()).unwrap_or(u64::MAX);
            let due = position.begun.0.saturating_add(every);
            let is_on_time = !self.is_hasty && now.0 >= due && now.0 - due <= every / 8;
            position.begun = if is_on_time { Time(due) } else { now };
        }
        position.after = next.to_vec();
        if next.is_empty() {
            position.ended = now;
            self.is_hasty = false;
        }
    }
}

impl Healer {
    /// Looks after one disk until the node stops.
    pub(super) async fn look_after(&self, id: u64, service: Arc<BlockService>) {
        let mut reading = self.position_of(&service).await;
        while self.goes_on().await {
            let what_is_owed = self.repair_owed(id, &service, &mut reading).await;
            if let Err(error) = what_is_owed {
                tracing::debug!(%error, "what was asked for in vain is not looked at for now");
            }
            self.see_flags(id, &mut reading).await;
            let every = self.settings.scrub_every;
            while service.fault().is_none() && reading.is_due(self.now(), every) {
                if let Err(error) = self.read_page(id, &service, &mut reading).await {
                    tracing::debug!(%error, "a disk is not read through for now");
                    break;
                }
                if self.stopping.load(std::sync::atomic::Ordering::Relaxed) {
                    return;
                }
            }
        }
    }

    fn now(&self) -> Time {
        self.client.runtime().clock.now()
    }

    async fn position_of(&self, service: &Arc<BlockService>) -> Reading {
        let store = service.store().clone();
        let now = self.now();
        let position = self.client.runtime().blocking(move || {
            let mut position = store.scrub_position();
            if position.begun == Time(0) {
                // What a new disk has is read when its time has passed, however often its node is started until then.
                position.begun = now;
                // Where the disk does not take that, it begins anew with the next start.
                let _ = store.keep_scrub_position(&position);
            }
            position
        });
        let position = position.await.unwrap_or_default();
        let kept = self.client.runtime().clock.monotonic();
        Reading { position, kept, is_hasty: false, was_condemned: false }
    }

    /// A disk that was condemned and is used again is compared with what the metadata know, not trusted.
    async fn see_flags(&self, id: u64, reading: &mut Reading) {
        let Ok(map) = self.client.map().await else { return };
        let flags = map.services.iter().find(|known| known.service_id == id).map_or(0, |known| known.flags);
        let is_condemned = flags & FLAG_CONDEMNED != 0;
        if reading.was_condemned && !is_condemned {
            reading.hurry();
        }
        reading.was_condemned = is_condemned;
    }

    async fn repair_owed(
        &self,
        id: u64,
        service: &BlockService,
        reading: &mut Reading,
    ) -> Result<(), ClientError> {
        for block in service.take_owed() {
            if mutants::is(Mutant::OwedForgotten) {
                continue;
            }
            let healed = heal::repair_block(&self.client, id, block, self.settings.options()).await?;
            if healed.missing > 0 {
                reading.hurry();
            }
            self.tell(id, &healed);
        }
        Ok(())
    }

    async fn read_page(
        &self,
        id: u64,
        service: &Arc<BlockService>,
        reading: &mut Reading,
    ) -> Result<(), ClientError> {
        let (clock, every) = (self.client.runtime().clock.clone(), self.settings.scrub_every);
        let after = Bytes::from(reading.position.after.clone());
        let begun = clock.monotonic();
        let (healed, next) = heal::scrub_page(&self.client, id, after, self.settings.options()).await?;
        if healed.missing > 0 {
            reading.hurry();
        }
        // What could not be repaired is met again in the next round; the others do not wait for it.
        reading.advance(&next, self.now(), every);
        self.tell(id, &healed);
        self.board.disk(id, |told| {
            told.scrubbed_at = reading.position.ended.0;
            told.scrub_begun_at = if next.is_empty() { 0 } else { reading.position.begun.0 };
            told.scrub_parts = next.first().copied().map_or(0, u32::from);
        });
        if next.is_empty() {
            self.client.runtime().note("heal: a disk was read through");
        }
        if next.is_empty() || clock.monotonic() - reading.kept >= KEEP_EVERY {
            reading.kept = clock.monotonic();
            let (store, position) = (service.store().clone(), reading.position.clone());
            let kept = self.client.runtime().blocking(move || store.keep_scrub_position(&position)).await;
            if let Some(Err(error)) = kept {
                tracing::debug!(%error, "it is not written down how far a disk was read");
            }
        }
        let bytes = healed.services.get(&id).map_or(0, |load| load.bytes);
        let due = Duration::from_millis(bytes.saturating_mul(1000) / BYTES_PER_S);
        clock.sleep(due.saturating_sub(clock.monotonic() - begun)).await;
        Ok(())
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
            tracing::warn!(%service, lost, repaired, "blocks were missing or damaged, and were written elsewhere");
        }
        if healed.moved > 0 {
            self.client.runtime().note("heal: a block that was lost is written elsewhere");
        }
        for failure in healed.failures.iter().filter(|_| healed.moved < healed.damaged) {
            tracing::warn!(failure, "a block is not repaired");
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
        Reading {
            position: Position { begun: at(1000), ..Position::default() },
            kept: Duration::ZERO,
            is_hasty: false,
            was_condemned: false,
        }
    }

    /// Reads what is due at a time; the parts that were read.
    fn read(reading: &mut Reading, now: u64) -> usize {
        let mut parts = 0;
        while reading.is_due(at(now), EVERY) {
            parts += 1;
            let part = reading.position.after.first().copied().unwrap_or(0);
            let next = part.checked_add(1).map_or_else(Bytes::new, |part| Bytes::copy_from_slice(&[part]));
            reading.advance(&next, at(now), EVERY);
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
        of.hurry();
        of.hurry();
        assert_eq!(read(&mut of, 4000), 256);
        assert_eq!((of.position.ended, of.is_hasty), (at(4000), false));
        assert_eq!(read(&mut of, 4001), 0);
        assert!(!of.is_due(at(1_000_000), Duration::ZERO), "where it is never to be read");
        // A clock that goes back to where it never was is not waited for.
        assert_eq!(read(&mut of, 10), 0);
        assert!(read(&mut of, 10 + 2560) > 0);
    }
}
