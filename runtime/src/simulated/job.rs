//! Blocking work on a thread of its own, so that time can pass in the middle of it while others go on.
//!
//! Invariant: of a world and its jobs exactly one thread runs at a time; the others wait for their turn. So a job changes nothing
//! about determinism.

use std::{
    any::Any,
    cell::{Cell, RefCell},
    io,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::Arc,
    thread::JoinHandle,
    time::Duration,
};

use clutch_proto::mutants;
use parking_lot::{Condvar, Mutex};

use super::{Shared, executor::Sleep};

/// Whose turn it is, and why.
enum Turn {
    /// The job's.
    Job,
    /// The world's; the job sleeps for so many nanoseconds.
    Sleeping(u64),
    /// The world's: the job has ended, perhaps in a panic.
    Ended(Option<Box<dyn Any + Send>>),
    /// The job's, whose node is gone: nothing that it does has an effect any more.
    Abandoned,
}

struct Baton {
    turn: Mutex<Turn>,
    changed: Condvar,
}

thread_local! {
    static JOB: RefCell<Option<Arc<Baton>>> = const { RefCell::new(None) };
    static ABANDONED: Cell<bool> = const { Cell::new(false) };
}

impl Baton {
    fn give(&self, turn: Turn) {
        *self.turn.lock() = turn;
        self.changed.notify_all();
    }

    /// Waits until it is the job's turn; false when its node is gone.
    fn await_turn(&self) -> bool {
        let mut turn = self.turn.lock();
        loop {
            match *turn {
                Turn::Job => return true,
                Turn::Abandoned => return false,
                Turn::Sleeping(_) | Turn::Ended(_) => self.changed.wait(&mut turn),
            }
        }
    }

    /// Lets the job run until it sleeps or ends: how long it sleeps, or what it ended with.
    fn run(&self, first: Turn) -> Result<u64, Option<Box<dyn Any + Send>>> {
        let mut turn = self.turn.lock();
        *turn = first;
        self.changed.notify_all();
        loop {
            match &mut *turn {
                Turn::Sleeping(ns) => return Ok(*ns),
                Turn::Ended(panic) => return Err(panic.take()),
                Turn::Job | Turn::Abandoned => self.changed.wait(&mut turn),
            }
        }
    }
}

/// Lets time pass in the middle of a job. False when no job runs on this thread.
pub(super) fn pass(ns: u64) -> bool {
    // A thread that ends may still drop a world; it runs no job.
    let Some(baton) = JOB.try_with(|job| job.borrow().clone()).ok().flatten() else { return false };
    if !ABANDONED.get() {
        baton.give(Turn::Sleeping(ns));
        ABANDONED.set(!baton.await_turn());
    }
    true
}

/// The error of everything that a job does whose node is gone.
pub(super) fn check_alive() -> io::Result<()> {
    if ABANDONED.get() { Err(io::Error::other("the process is gone")) } else { Ok(()) }
}

/// Ends the job with its future: the node that asked for it is gone.
struct Running {
    baton: Arc<Baton>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            // It runs to its end, without effect, and sleeps no more.
            let _ = self.baton.run(Turn::Abandoned);
            let _ = thread.join();
        }
    }
}

/// Does the work on a thread of its own.
pub(super) async fn run(shared: Arc<Shared>, work: Box<dyn FnOnce() + Send>) {
    let baton = Arc::new(Baton { turn: Mutex::new(Turn::Sleeping(0)), changed: Condvar::new() });
    let (of_job, planted) = (baton.clone(), mutants::planted());
    let thread = std::thread::spawn(move || {
        mutants::plant(planted);
        JOB.set(Some(of_job.clone()));
        ABANDONED.set(!of_job.await_turn());
        let ended = catch_unwind(AssertUnwindSafe(work));
        of_job.give(Turn::Ended(ended.err()));
    });
    let mut running = Running { baton, thread: Some(thread) };
    loop {
        match running.baton.run(Turn::Job) {
            Ok(ns) => Sleep::new(shared.clone(), Duration::from_nanos(ns)).await,
            Err(panic) => {
                if let Some(thread) = running.thread.take() {
                    // It has nothing left to do.
                    let _ = thread.join();
                }
                if let Some(panic) = panic {
                    resume_unwind(panic);
                }
                return;
            }
        }
    }
}
