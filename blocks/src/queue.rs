//! What one disk may have in hand: a disk that hangs keeps its own work waiting and nobody else's.
//!
//! A bound in bytes, so in threads and memory, for the work that runs; the rest waits its turn. When nothing has ended for
//! [`STUCK_AFTER`] although something began or waits since the last end, the disk is stuck: whoever waits for it is told so,
//! and so is who comes later, until something ends. One piece of work that hangs while others end is no reason. Work that has begun is never taken back; only nobody waits for it any more.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use clutch_proto::{Refusal, ServiceId, types::Code};
use clutch_runtime::{Budget, Held, Runtime};

/// A disk on which nothing has ended for so long hangs. Less than a client waits for a block, so that it learns the reason.
pub(crate) const STUCK_AFTER: Duration = Duration::from_secs(6);
/// How often those who wait look.
const LOOK: Duration = Duration::from_millis(500);
/// Bytes that are in work in one queue at a time; a larger block is alone.
const BYTES_MAX: u32 = 16 << 20;
/// The slowest disk that is not called stuck: large blocks get their time.
const BYTES_PER_S: usize = 16 << 20;
/// What any work counts as: bounds how many threads one disk takes.
const WORK_BYTES_MIN: usize = 1 << 20;

/// The work of one disk.
pub(crate) struct DiskQueue {
    runtime: Runtime,
    service: ServiceId,
    budget: Budget,
    running: Arc<Mutex<Running>>,
}

/// What runs, and when something ended last; times of the monotonic clock.
#[derive(Default)]
struct Running {
    next: u64,
    since: BTreeMap<u64, Duration>,
    /// Bytes in work.
    bytes: usize,
    ended: Duration,
    /// Nothing more begins before something ends.
    is_stuck: bool,
}

/// One piece of work while it runs.
struct Turn {
    id: u64,
    bytes: usize,
    running: Arc<Mutex<Running>>,
    runtime: Runtime,
    _held: Held,
}

fn lock(running: &Mutex<Running>) -> MutexGuard<'_, Running> {
    // It is whole between any two statements.
    running.lock().unwrap_or_else(|e| e.into_inner())
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut running = lock(&self.running);
        let began = running.since.remove(&self.id);
        assert!(began.is_some(), "work ends once");
        running.bytes -= self.bytes;
        running.ended = running.ended.max(self.runtime.clock.monotonic());
        running.is_stuck = false;
    }
}

impl DiskQueue {
    pub(crate) fn new(runtime: Runtime, service: ServiceId) -> DiskQueue {
        DiskQueue { runtime, service, budget: Budget::new(BYTES_MAX), running: Arc::default() }
    }

    /// For how long nothing has ended, if that is too long.
    pub(crate) fn stuck(&self) -> Option<Duration> {
        let mut running = lock(&self.running);
        let oldest = running.since.values().next()?;
        let standing = self.runtime.clock.monotonic().saturating_sub(running.ended.max(*oldest));
        let bound = STUCK_AFTER + Duration::from_millis((running.bytes * 1000 / BYTES_PER_S) as u64);
        let is_asked = self.budget.waiting() > 0
            || running.since.last_key_value().is_some_and(|(_, since)| *since >= running.ended);
        running.is_stuck |= standing >= bound && is_asked;
        running.is_stuck.then_some(standing)
    }

    /// Why the disk takes no work.
    pub(crate) fn fault(&self) -> Option<String> {
        let standing = self.stuck()?;
        Some(format!("the disk of service {} has not answered for {} s", self.service, standing.as_secs()))
    }

    pub(crate) fn refuse_stuck(&self) -> Result<(), Refusal> {
        self.fault().map_or(Ok(()), |text| Err(Refusal::new(Code::Unreachable, text)))
    }

    /// Completes when the disk is stuck.
    pub(crate) async fn is_stuck(&self) -> Refusal {
        loop {
            self.runtime.clock.sleep(LOOK).await;
            if let Err(refusal) = self.refuse_stuck() {
                return refusal;
            }
        }
    }

    /// Runs blocking work that has about so many bytes in memory, when it is its turn.
    ///
    /// # Errors
    /// [`Code::Unreachable`] when the disk is stuck: the work has not begun, or it is not known when it ends.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        bytes: usize,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Refusal> {
        self.refuse_stuck()?;
        let bytes = bytes.max(WORK_BYTES_MIN);
        let held = tokio::select! {
            biased;
            held = self.budget.hold(bytes) => held,
            refusal = self.is_stuck() => {
                self.runtime.note("blocks: a disk hangs");
                return Err(refusal);
            }
        };
        let turn = {
            let mut running = lock(&self.running);
            let id = running.next;
            running.next += 1;
            running.since.insert(id, self.runtime.clock.monotonic());
            running.bytes = running.bytes.saturating_add(bytes);
            Turn { id, bytes, running: self.running.clone(), runtime: self.runtime.clone(), _held: held }
        };
        let done = self.runtime.blocking(move || {
            let done = work();
            drop(turn);
            done
        });
        tokio::select! {
            biased;
            done = done => {
                done.ok_or_else(|| Refusal::new(Code::DiskFault, "the disk's work did not finish"))
            }
            refusal = self.is_stuck() => Err(refusal),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use clutch_runtime::{
        BoxFuture, Spawner,
        simulated::{NodeId, World},
    };

    use super::*;

    /// Blocking work that ends when it is told to, in virtual time.
    struct Gate(Arc<Mutex<Vec<tokio::sync::oneshot::Sender<()>>>>, Arc<dyn Spawner>);

    impl Spawner for Gate {
        fn spawn(&self, name: &'static str, task: BoxFuture<()>) {
            self.1.spawn(name, task);
        }
        fn spawn_owner(&self, name: String, task: BoxFuture<()>) {
            self.1.spawn_owner(name, task);
        }
        fn blocking(&self, work: Box<dyn FnOnce() + Send>) -> BoxFuture<()> {
            let (open, opened) = tokio::sync::oneshot::channel();
            self.0.lock().expect("not poisoned").push(open);
            let (sender, receiver) = tokio::sync::oneshot::channel();
            // As on a thread of its own: the work goes on whether anybody waits or not.
            self.1.spawn(
                "disk",
                Box::pin(async move {
                    let _ = opened.await;
                    work();
                    let _ = sender.send(());
                }),
            );
            Box::pin(async move {
                let _ = receiver.await;
            })
        }
    }

    #[test]
    fn a_disk_that_hangs_is_said_to_and_comes_back() {
        let world = World::new(1);
        let node = NodeId(1);
        let mut runtime = world.node(node);
        let gates = Arc::new(Mutex::new(Vec::new()));
        runtime.spawner = Arc::new(Gate(gates.clone(), runtime.spawner.clone()));
        let (began, order) = mpsc::channel();
        let ran = world.run(node, Duration::from_secs(600), async move {
            let queue = Arc::new(DiskQueue::new(runtime.clone(), ServiceId(7)));
            let outcomes = Arc::new(Mutex::new(Vec::new()));
            // More than its bytes allow: sixteen run, the others wait.
            for number in 0..20 {
                let (queue, outcomes, began) = (queue.clone(), outcomes.clone(), began.clone());
                runtime.spawn("asks", async move {
                    let done = queue.run(1, move || began.send(number)).await;
                    lock_list(&outcomes).push(done.err().map(|refusal| refusal.code));
                });
            }
            runtime.clock.sleep(Duration::from_secs(5)).await;
            assert_eq!((lock_list(&gates).len(), lock_list(&outcomes).len()), (16, 0));
            assert!(queue.stuck().is_none());
            // One that ends shows that the disk works, if slowly; another begins.
            let _ = lock_list(&gates).remove(0).send(());
            runtime.clock.sleep(Duration::from_secs(5)).await;
            assert_eq!((lock_list(&gates).len(), lock_list(&outcomes).len()), (16, 1));
            assert!(queue.stuck().is_none());
            runtime.clock.sleep(Duration::from_secs(4)).await;
            assert_eq!(lock_list(&outcomes).len(), 20, "all were told");
            assert!(queue.fault().expect("stuck").contains("has not answered for 9 s"));
            let refused = queue.run(1, || ()).await.expect_err("refused at once");
            assert_eq!(refused.code, Code::Unreachable);
            // What had begun ends after all; then the disk is used again.
            for gate in lock_list(&gates).drain(..) {
                let _ = gate.send(());
            }
            runtime.clock.sleep(Duration::from_secs(1)).await;
            assert!(queue.stuck().is_none());
            let codes = lock_list(&outcomes).clone();
            assert_eq!(codes.iter().filter(|code| **code == Some(Code::Unreachable)).count(), 19);
            let again = queue.run(100 << 20, || 3);
            let open = async {
                while lock_list(&gates).is_empty() {
                    runtime.clock.sleep(Duration::from_millis(1)).await;
                }
                let _ = lock_list(&gates).remove(0).send(());
            };
            let (again, ()) = tokio::join!(again, open);
            assert_eq!(again.expect("runs"), 3);
            // One that hangs alone, while others end, holds up nobody.
            let hangs = queue.clone();
            runtime.spawn("hangs", async move { assert!(hangs.run(1, || ()).await.is_ok()) });
            runtime.clock.sleep(Duration::from_secs(1)).await;
            let quick = queue.run(1, || ());
            let open = async {
                while lock_list(&gates).len() < 2 {
                    runtime.clock.sleep(Duration::from_millis(1)).await;
                }
                let _ = lock_list(&gates).remove(1).send(());
            };
            let (quick, ()) = tokio::join!(quick, open);
            assert!(quick.is_ok());
            runtime.clock.sleep(Duration::from_secs(60)).await;
            assert!(queue.stuck().is_none());
            let _ = lock_list(&gates).remove(0).send(());
            runtime.clock.sleep(Duration::from_secs(1)).await;
        });
        assert!(ran.is_some(), "ends in time");
        // What was told that the disk hangs before its turn never began.
        assert_eq!(order.try_iter().count(), 17);
    }

    fn lock_list<T>(list: &Mutex<Vec<T>>) -> MutexGuard<'_, Vec<T>> {
        list.lock().expect("not poisoned")
    }
}
