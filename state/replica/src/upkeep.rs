//! What a replica does from time to time: flushes, checks of the state hash, time marks.

use std::sync::atomic::Ordering;

use clutch_proto::{Time, state::entry::Kind};
use clutch_state::{StoreError, machine::Machine};

use crate::{Replica, Waiter};

/// A check is proposed after so many batches, or after so many ticks if there was any.
const CHECK_BATCHES: u64 = 256;
const CHECK_TICKS: u64 = 40;
/// A state that has changed is flushed at least every so many ticks, so that a crash leaves little to replay.
const FLUSH_TICKS: u64 = 120;
/// How long a log may stay behind the times of its node's other logs.
const MARK_LAG_NS: u64 = 1_000_000_000;

impl<M: Machine> Replica<M> {
    /// What happens by time: checks and time marks. Nothing else waits for it.
    pub(crate) fn tick(&mut self) {
        self.snapshots.expire(self.config.runtime.clock.monotonic());
        self.expire_reads();
        self.ticks_since_flush += 1;
        if self.fault.get().is_none() && self.flushed_bytes > 0 && self.ticks_since_flush >= FLUSH_TICKS {
            (self.flushed_bytes, self.ticks_since_flush) = (0, 0);
            match self.applier.store().flush() {
                // What is not flushed is replayed; it is tried again when there may be room.
                Err(StoreError::Full(text)) => {
                    tracing::warn!(replica = %self.config.name, %text, "no room to flush the state");
                    self.flushed_bytes = 1;
                }
                Err(error) => self.fail(&error.into()),
                Ok(()) => {}
            }
        }
        if self.leading.is_none() || self.fault.get().is_some() {
            return;
        }
        // What nobody waits for leaves the last room to what gives some back.
        if (self.config.shortage)().is_some() {
            self.hand_on_for_room();
            return;
        }
        if self.applier.time() == Time(0) {
            // The first entry may have been lost; a second copy of it is refused by the machine.
            if self.fates.is_idle() {
                self.propose_genesis();
            }
            return;
        }
        self.ticks_since_check += 1;
        let due = self.batches_since_check >= CHECK_BATCHES || self.ticks_since_check >= CHECK_TICKS;
        if self.batches_since_check > 0 && due {
            (self.batches_since_check, self.ticks_since_check) = (0, 0);
            self.compare_members();
        }
        let now = self.config.clock.now().0;
        let last = self.applier.time().0;
        let others = self.config.activity.load(Ordering::Relaxed);
        if others > last && now.saturating_sub(last) > MARK_LAG_NS && !self.fates.has_undecided() {
            self.propose(vec![(self.stamped(Kind::TimeMark(true)), Waiter::Nobody)]);
        }
    }
}
