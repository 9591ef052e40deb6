//! Changes of small blocks: those that wait at the same time share one write and one sync.

use std::{
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use clutch_proto::{BlockId, Refusal, types::Code};
use tokio::sync::{OwnedMutexGuard, oneshot};

use super::BlockService;
use crate::{
    packed::{Tail, Upkeep},
    store::{BlockStore, Change, Expected},
};

/// So many bytes are written at a time, and one more change.
const BYTES_AT_A_TIME: usize = 4 << 20;

/// A disk that could not be looked after is left alone for so long.
const UPKEEP_AGAIN: Duration = Duration::from_secs(10);

/// A change that is asked for.
pub(super) enum Asked {
    Write { expected: Expected, data: Bytes, is_granted: Box<dyn Fn() -> bool + Send> },
    Erase(BlockId),
}

impl Asked {
    fn bytes(&self) -> usize {
        match self {
            Asked::Write { data, .. } => data.len(),
            Asked::Erase(_) => 0,
        }
    }
}

struct Waiting {
    number: u64,
    asked: Asked,
    answer: oneshot::Sender<Result<(), Refusal>>,
    /// Ends when the change is made.
    _turn: Option<OwnedMutexGuard<()>>,
}

#[derive(Default)]
struct Queue {
    next: u64,
    waiting: Vec<Waiting>,
}

/// What waits for a disk.
#[derive(Default)]
pub(super) struct SmallChanges {
    queue: Mutex<Queue>,
    /// Somebody looks after the disk.
    is_upkeep: AtomicBool,
}

impl SmallChanges {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        // It is whole between any two statements.
        self.queue.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Takes what waits, first come, first served, but not more than is written at a time.
    fn take(&self) -> Vec<Waiting> {
        let mut queue = self.lock();
        let mut bytes = 0;
        let ends = queue.waiting.iter().position(|one| {
            bytes += one.asked.bytes();
            bytes > BYTES_AT_A_TIME
        });
        let count = ends.map_or(queue.waiting.len(), |last| last + 1);
        queue.waiting.drain(..count).collect()
    }
}

/// While somebody looks after the disk.
struct Upkeeping(Arc<SmallChanges>);

impl Drop for Upkeeping {
    fn drop(&mut self) {
        self.0.is_upkeep.store(false, Ordering::Release);
    }
}

/// Takes a change back that nobody waits for any more, if it has not begun.
struct Place<'a> {
    small: &'a SmallChanges,
    number: u64,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.small.lock().waiting.retain(|one| one.number != self.number);
    }
}

/// Makes all changes that wait.
fn make(store: &BlockStore, small: &SmallChanges, tail: &mut Tail) {
    let waiting = small.take();
    let changes: Vec<Change<'_>> = waiting
        .iter()
        .map(|one| match &one.asked {
            Asked::Write { expected, data, is_granted } => {
                Change::Write { expected: *expected, data, is_granted: &**is_granted }
            }
            Asked::Erase(block) => Change::Erase(*block),
        })
        .collect();
    let done = store.change(tail, &changes);
    for (one, result) in waiting.into_iter().zip(done) {
        // Nobody may wait any more.
        let _ = one.answer.send(result);
    }
}

impl BlockService {
    /// Makes a change of a small block when it is its turn, with all that wait then. A change that has begun goes on, also when nobody
    /// waits for it.
    pub(super) async fn change(
        &self,
        asked: Asked,
        turn: Option<OwnedMutexGuard<()>>,
    ) -> Result<Result<(), Refusal>, Refusal> {
        let (answer, mut answered) = oneshot::channel();
        let place = {
            let mut queue = self.small.lock();
            let number = queue.next;
            queue.next += 1;
            queue.waiting.push(Waiting { number, asked, answer, _turn: turn });
            Place { small: &self.small, number }
        };
        let done = loop {
            tokio::select! {
                biased;
                done = &mut answered => break done,
                tail = self.store.tail().lock_owned() => self.make_waiting(tail).await?,
                refusal = self.changes.is_stuck() => return Err(refusal),
            }
        };
        drop(place);
        self.look_after();
        done.map_err(|_| Refusal::new(Code::DiskFault, "the disk's work did not finish"))
    }

    async fn make_waiting(&self, mut tail: OwnedMutexGuard<Tail>) -> Result<(), Refusal> {
        let (store, small) = (self.store.clone(), self.small.clone());
        let bytes: usize = self.small.lock().waiting.iter().map(|one| one.asked.bytes()).sum();
        let work = move || make(&store, &small, &mut tail);
        self.changes.run(bytes.min(BYTES_AT_A_TIME), work).await
    }

    /// Begins to look after the disk where something is to do and nobody does it.
    fn look_after(&self) {
        if !self.store.is_due() || self.small.is_upkeep.swap(true, Ordering::AcqRel) {
            return;
        }
        let guard = Upkeeping(self.small.clone());
        let (store, changes, runtime) = (self.store.clone(), self.changes.clone(), self.runtime.clone());
        self.runtime.spawn("blocks", async move {
            let _guard = guard;
            loop {
                let looking = store.clone();
                let looked = changes.run(0, move || looking.look_after()).await;
                let (moving, mut tail) = (store.clone(), store.tail().lock_owned().await);
                let moved = changes.run(0, move || moving.move_some(&mut tail)).await;
                let mut goes_on = false;
                for done in [looked, moved] {
                    match done.and_then(|done| done) {
                        Ok(Upkeep::Nothing) => {}
                        Ok(done) => {
                            runtime.note(done.note());
                            goes_on = true;
                        }
                        Err(refusal) => {
                            tracing::warn!(service = %store.service(), %refusal, "a disk cannot be looked after");
                            // Not again with each change.
                            runtime.clock.sleep(UPKEEP_AGAIN).await;
                            return;
                        }
                    }
                }
                if !goes_on {
                    return;
                }
            }
        });
    }
}
