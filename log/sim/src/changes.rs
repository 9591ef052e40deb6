//! Waking everybody who waits for a log to change, in the order in which they began to: the order in which a simulation goes on
//! must not be drawn by anybody else.

use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use parking_lot::Mutex;

#[derive(Default)]
struct State {
    count: u64,
    next: u64,
    waiting: BTreeMap<u64, Waker>,
}

/// Counts changes; cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct Changes {
    state: Arc<Mutex<State>>,
}

impl Changes {
    /// How many there have been.
    pub(crate) fn count(&self) -> u64 {
        self.state.lock().count
    }

    /// There is one more.
    pub(crate) fn tell(&self) {
        let waiting = {
            let mut state = self.state.lock();
            state.count += 1;
            std::mem::take(&mut state.waiting)
        };
        waiting.into_values().for_each(Waker::wake);
    }

    /// Waits until there have been more than `seen`.
    pub(crate) fn after(&self, seen: u64) -> After {
        After { changes: self.clone(), seen, id: None }
    }
}

/// See [`Changes::after`].
pub(crate) struct After {
    changes: Changes,
    seen: u64,
    id: Option<u64>,
}

impl Future for After {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let changes = self.changes.clone();
        let mut state = changes.state.lock();
        if state.count > self.seen {
            return Poll::Ready(());
        }
        let id = *self.id.get_or_insert_with(|| {
            state.next += 1;
            state.next
        });
        state.waiting.insert(id, context.waker().clone());
        Poll::Pending
    }
}

impl Drop for After {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            self.changes.state.lock().waiting.remove(&id);
        }
    }
}
