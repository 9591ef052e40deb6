//! Tasks, wakers and timers on one thread.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap},
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Wake, Waker},
    time::Duration,
};

use parking_lot::Mutex;

use super::{NodeId, Shared};
use crate::BoxFuture;

/// Who a task belongs to.
#[derive(Clone, Copy)]
pub(super) struct TaskOwner {
    pub(super) node: NodeId,
    pub(super) name: &'static str,
}

struct Task {
    owner: TaskOwner,
    /// `None` while it is being polled.
    future: Option<BoxFuture<()>>,
    waker: Waker,
}

/// Sorted, so that the order in which a library wakes several tasks at once does not matter: tokio draws it from a
/// random source of its own.
type ReadyQueue = Arc<Mutex<BTreeSet<u64>>>;

struct TaskWaker {
    id: u64,
    ready: ReadyQueue,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.ready.lock().insert(self.id);
    }
}

pub(super) struct Executor {
    now_ns: u64,
    next_id: u64,
    tasks: BTreeMap<u64, Task>,
    ready: ReadyQueue,
    timers: BinaryHeap<Reverse<(u64, u64)>>,
    timer_wakers: BTreeMap<u64, Waker>,
    /// Nodes whose tasks do not run, with the tasks that would.
    paused: BTreeMap<NodeId, Vec<u64>>,
}

impl Executor {
    pub(super) fn new() -> Executor {
        Executor {
            now_ns: 0,
            next_id: 1,
            tasks: BTreeMap::new(),
            ready: ReadyQueue::default(),
            timers: BinaryHeap::new(),
            timer_wakers: BTreeMap::new(),
            paused: BTreeMap::new(),
        }
    }

    /// Holds a node's tasks back until [`Executor::resume`].
    pub(super) fn pause(&mut self, node: NodeId) {
        self.paused.entry(node).or_default();
    }

    /// Lets a node's tasks run again, those that became ready meanwhile first.
    pub(super) fn resume(&mut self, node: NodeId) {
        let held = self.paused.remove(&node).unwrap_or_default();
        self.ready.lock().extend(held);
    }

    /// Time passes while a task runs.
    pub(super) fn pass(&mut self, ns: u64) {
        self.now_ns += ns;
    }

    pub(super) fn now_ns(&self) -> u64 {
        self.now_ns
    }

    pub(super) fn spawn(&mut self, owner: TaskOwner, future: BoxFuture<()>) {
        let id = self.next_id;
        self.next_id += 1;
        let waker = Waker::from(Arc::new(TaskWaker { id, ready: self.ready.clone() }));
        // A world may run inside a tokio task, whose budget must not make the world's tasks wait for nothing.
        let future: BoxFuture<()> = Box::pin(tokio::task::unconstrained(future));
        self.tasks.insert(id, Task { owner, future: Some(future), waker });
        self.ready.lock().insert(id);
    }

    pub(super) fn ready_count(&self) -> usize {
        self.ready.lock().len()
    }

    /// Takes the `pick`th ready task out for polling; `None` when it has ended meanwhile.
    pub(super) fn take_ready(&mut self, pick: usize) -> Option<(u64, TaskOwner, BoxFuture<()>, Waker)> {
        let id = {
            let mut ready = self.ready.lock();
            let id = *ready.iter().nth(pick)?;
            ready.remove(&id);
            id
        };
        let task = self.tasks.get_mut(&id)?;
        if let Some(held) = self.paused.get_mut(&task.owner.node) {
            if !held.contains(&id) {
                held.push(id);
            }
            return None;
        }
        Some((id, task.owner, task.future.take()?, task.waker.clone()))
    }

    pub(super) fn put_back(&mut self, id: u64, future: BoxFuture<()>) {
        // A task that crashed its own node is gone by now and is dropped here.
        if let Some(task) = self.tasks.get_mut(&id) {
            task.future = Some(future);
        }
    }

    pub(super) fn finish(&mut self, id: u64) {
        self.tasks.remove(&id);
    }

    /// Removes a node's tasks. The caller drops them when the executor is no longer locked.
    pub(super) fn take_tasks(&mut self, node: NodeId) -> Vec<Option<BoxFuture<()>>> {
        let ids: Vec<u64> =
            self.tasks.iter().filter(|(_, t)| t.owner.node == node).map(|(id, _)| *id).collect();
        ids.iter().filter_map(|id| self.tasks.remove(id)).map(|t| t.future).collect()
    }

    pub(super) fn take_all(&mut self) -> Vec<Option<BoxFuture<()>>> {
        self.timer_wakers.clear();
        self.timers.clear();
        std::mem::take(&mut self.tasks).into_values().map(|t| t.future).collect()
    }

    /// Moves the clock to the next timer and wakes its task.
    pub(super) fn advance(&mut self, deadline_ns: u64) -> bool {
        while let Some(Reverse((at, timer))) = self.timers.pop() {
            if at > deadline_ns {
                self.timers.push(Reverse((at, timer)));
                self.now_ns = deadline_ns.max(self.now_ns);
                return false;
            }
            // Cancelled timers have no waker and do not move the clock.
            if let Some(waker) = self.timer_wakers.remove(&timer) {
                self.now_ns = self.now_ns.max(at);
                waker.wake();
                return true;
            }
        }
        false
    }
}

/// Waits in virtual time.
pub(super) struct Sleep {
    shared: Arc<Shared>,
    duration: Duration,
    /// Timer id and when it fires, from the first poll on.
    timer: Option<(u64, u64)>,
}

impl Sleep {
    pub(super) fn new(shared: Arc<Shared>, duration: Duration) -> Sleep {
        Sleep { shared, duration, timer: None }
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let shared = self.shared.clone();
        let mut executor = shared.executor.lock();
        match self.timer {
            None => {
                let id = executor.next_id;
                executor.next_id += 1;
                let at = executor
                    .now_ns
                    .saturating_add(u64::try_from(self.duration.as_nanos()).unwrap_or(u64::MAX));
                executor.timers.push(Reverse((at, id)));
                executor.timer_wakers.insert(id, context.waker().clone());
                self.timer = Some((id, at));
                Poll::Pending
            }
            Some((id, at)) => {
                if let Some(waker) = executor.timer_wakers.get_mut(&id) {
                    waker.clone_from(context.waker());
                    Poll::Pending
                } else {
                    debug_assert!(executor.now_ns >= at);
                    Poll::Ready(())
                }
            }
        }
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some((id, _)) = self.timer {
            // Skipped when the world itself is being torn down with the executor locked.
            if let Some(mut executor) = self.shared.executor.try_lock() {
                executor.timer_wakers.remove(&id);
            }
        }
    }
}
