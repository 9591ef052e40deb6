//! The runtime of whoever is running right now, for libraries that ask global functions for the time and for tasks.
//!
//! In a simulated world that is the node whose task is being polled or dropped: the world says which, on its thread, around each
//! poll, and what is spawned belongs to the same node. Everywhere else it is the tokio runtime that the caller is on.
//!
//! Code of our own is handed a [`crate::Runtime`] instead.

use std::{
    future::Future,
    sync::OnceLock,
    time::{Duration, Instant},
};

use rand::{RngCore as _, SeedableRng as _};
use rand_chacha::ChaCha12Rng;

use crate::{BoxFuture, simulated::standing};

/// Time since some fixed moment; never goes back. As [`crate::Clock::monotonic`].
pub fn monotonic() -> Duration {
    standing::monotonic().unwrap_or_else(|| start().elapsed())
}

/// The moment from which the process counts, so that all its clocks have the same shared moments.
pub(crate) fn start() -> Instant {
    static START: OnceLock<Instant> = OnceLock::new();
    *START.get_or_init(Instant::now)
}

/// Completes after `duration`.
pub fn sleep(duration: Duration) -> BoxFuture<()> {
    standing::sleep(duration).unwrap_or_else(|| Box::pin(tokio::time::sleep(duration)))
}

/// Completes after `duration` or a little later, as [`crate::Clock::sleep_about`].
pub fn sleep_about(duration: Duration) -> BoxFuture<()> {
    sleep(crate::to_shared_moment(monotonic(), duration))
}

/// Runs a task beside the others. It ends with its node.
///
/// # Panics
/// Outside of both runtimes.
pub fn spawn(name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
    if let Err(task) = standing::spawn(name, Box::pin(task)) {
        tokio::spawn(task);
    }
}

/// 64 random bits: drawn from the seed in a world, unpredictable elsewhere.
pub fn random() -> u64 {
    standing::random().unwrap_or_else(|| ChaCha12Rng::from_os_rng().next_u64())
}
