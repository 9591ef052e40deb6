//! The runtime that ships: tokio, the operating system's files, gRPC sessions.

mod admission;
mod files;
mod peers;
mod sessions;
mod sockets;
mod streams;

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicI64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use clutch_proto::Time;
use parking_lot::Mutex;
use rand::{RngCore as _, SeedableRng as _};
use rand_chacha::ChaCha12Rng;

use crate::{BoxFuture, Clock, Random, Runtime, Spawner, ambient};

pub use files::OsDisk;
pub use sessions::GrpcNetwork;

/// The production runtime on the current tokio runtime.
///
/// # Panics
/// Outside a tokio runtime.
pub fn runtime() -> Runtime {
    let handle = tokio::runtime::Handle::current();
    Runtime {
        clock: Arc::new(OsClock { start: ambient::start() }),
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

/// Names a file with a number of seconds by which this process's wall clock is wrong, as long as the file says so: for tests
/// of clocks that are wrong, and are set while a process runs.
const CLOCK_SHIFT: &str = "CLUTCH_CLOCK_SHIFT";
/// How often that file is read.
const CLOCK_SHIFT_LOOK: Duration = Duration::from_millis(20);

/// Seconds by which the wall clock is to be wrong.
fn clock_shift_s() -> i64 {
    static SHIFT: OnceLock<Option<Arc<AtomicI64>>> = OnceLock::new();
    let shift = SHIFT.get_or_init(|| {
        let path = std::env::var_os(CLOCK_SHIFT)?;
        let read = move || std::fs::read_to_string(&path).ok()?.trim().parse::<i64>().ok();
        let shift = Arc::new(AtomicI64::new(read().unwrap_or(0)));
        let seen = shift.clone();
        let look = move || loop {
            std::thread::sleep(CLOCK_SHIFT_LOOK);
            if let Some(seconds) = read() {
                seen.store(seconds, Ordering::Relaxed);
            }
        };
        std::thread::Builder::new().name("clock shift".into()).spawn(look).ok()?;
        Some(shift)
    });
    shift.as_ref().map_or(0, |shift| shift.load(Ordering::Relaxed))
}

impl Clock for OsClock {
    fn now(&self) -> Time {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let nanoseconds = i128::try_from(since.as_nanos()).unwrap_or(i128::MAX);
        let shifted = nanoseconds + i128::from(clock_shift_s()) * 1_000_000_000;
        Time(u64::try_from(shifted.max(0)).unwrap_or(u64::MAX))
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
