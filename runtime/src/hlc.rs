//! The hybrid logical clock of a node: its wall clock, pulled forward by every message it sees.
//!
//! Invariant: [`HybridClock::stamp`] is above every time observed before it, so a cut of all logs at a time
//! is causally closed. A sender too far ahead is refused instead of observed (Kulkarni et al., 2014).

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use clutch_proto::{Refusal, Time, limits::CLOCK_AHEAD_MS_MAX, types::Code};

use crate::Clock;

/// Shared by everything on a node.
pub struct HybridClock {
    clock: Arc<dyn Clock>,
    highest: AtomicU64,
}

impl HybridClock {
    /// A clock that has observed nothing yet.
    pub fn new(clock: Arc<dyn Clock>) -> HybridClock {
        HybridClock { clock, highest: AtomicU64::new(0) }
    }

    /// Takes note of a peer's time; refuses one more than 500 ms ahead of the wall clock.
    pub fn observe(&self, incoming: Time) -> Result<(), Refusal> {
        if incoming <= self.highest() {
            // Seen before, so it cannot pull this clock further; the wall clock may have been set back meanwhile.
            return Ok(());
        }
        let now = self.clock.now();
        if incoming > now.plus_ms(CLOCK_AHEAD_MS_MAX) {
            let ahead_ms = (incoming.0 - now.0) / 1_000_000;
            return Err(Refusal::new(
                Code::ClockAhead,
                format!(
                    "the sender's time is {ahead_ms} ms ahead of this node's clock; synchronise the clocks"
                ),
            ));
        }
        self.highest.fetch_max(incoming.0, Ordering::Relaxed);
        Ok(())
    }

    /// Takes note of a time that this node's own logs have fixed already.
    pub fn advance(&self, own: Time) {
        self.highest.fetch_max(own.0, Ordering::Relaxed);
    }

    /// A time at or above the wall clock and above everything observed.
    pub fn stamp(&self) -> Time {
        let now = self.clock.now().0;
        let before = self
            .highest
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |h| Some(now.max(h.saturating_add(1))))
            .unwrap_or_else(|h| h);
        Time(now.max(before.saturating_add(1)))
    }

    /// The highest time seen: what this node tells its peers.
    pub fn highest(&self) -> Time {
        Time(self.highest.load(Ordering::Relaxed))
    }
}
