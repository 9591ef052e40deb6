//! The runtime that ships: tokio, the operating system's files, gRPC sessions.

mod admission;
mod files;
mod sessions;
mod sockets;
mod streams;

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use clutch_proto::Time;
use parking_lot::Mutex;
use rand::{RngCore as _, SeedableRng as _};
use rand_chacha::ChaCha12Rng;

use crate::{BoxFuture, Clock, Random, Runtime, Spawner};

pub use files::OsDisk;
pub use sessions::GrpcNetwork;

/// The production runtime on the current tokio runtime.
///
/// # Panics
/// Outside a tokio runtime.
pub fn runtime() -> Runtime {
    let handle = tokio::runtime::Handle::current();
    Runtime {
        clock: Arc::new(OsClock { start: Instant::now() }),
        random: Arc::new(OsRandom(Mutex::new(ChaCha12Rng::from_os_rng()))),
        spawner: Arc::new(TokioSpawner { handle }),
        network: Arc::new(GrpcNetwork::new()),
        disk: Arc::new(OsDisk),
        notes: crate::Notes::default(),
    }
}

struct OsClock {
    start: Instant,
}

impl Clock for OsClock {
    fn now(&self) -> Time {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Time(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
    }

    fn monotonic(&self) -> Duration {
        self.start.elapsed()
    }

    fn steady(&self) -> Duration {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        Duration::new(u64::try_from(now.tv_sec).unwrap_or(0), u32::try_from(now.tv_nsec).unwrap_or(0))
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<()> {
        Box::pin(tokio::time::sleep(duration))
    }
}

struct OsRandom(Mutex<ChaCha12Rng>);

impl Random for OsRandom {
    fn fill(&self, bytes: &mut [u8]) {
        self.0.lock().fill_bytes(bytes);
    }
}

struct TokioSpawner {
    handle: tokio::runtime::Handle,
}

impl Spawner for TokioSpawner {
    fn spawn(&self, _name: &'static str, task: BoxFuture<()>) {
        self.handle.spawn(task);
    }

    fn spawn_owner(&self, name: String, task: BoxFuture<()>) {
        let handle = self.handle.clone();
        let thread = std::thread::Builder::new().name(name.clone()).spawn(move || {
            let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| handle.block_on(task)));
            if ended.is_err() {
                // What it owned is in no known state, and nobody else may touch it: a node without it only looks alive.
                std::process::abort();
            }
        });
        if let Err(error) = thread {
            // Out of threads at start-up: nothing can serve, and a half-started node would look alive.
            panic!("start thread {name}: {error}");
        }
    }

    fn blocking(&self, work: Box<dyn FnOnce() + Send>) -> BoxFuture<()> {
        let task = self.handle.spawn_blocking(work);
        Box::pin(async move {
            // A panic in the work shows as the missing result of `Runtime::blocking`.
            let _ = task.await;
        })
    }
}
