//! Bytes that may be in memory at a time, shared by whoever needs some: first come, first served.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// A number of bytes of which each holder has a part. Clones share it, but for who is waiting: see [`Budget::view`].
#[derive(Clone)]
pub struct Budget {
    /// `None` where nothing is bounded.
    room: Option<(Arc<Semaphore>, u32)>,
    waiting: Arc<AtomicUsize>,
}

/// A part of a budget, given back when it is dropped.
#[derive(Debug, Default)]
pub struct Held {
    _permit: Option<OwnedSemaphorePermit>,
}

impl Held {
    /// Gives back what is more than `bytes`.
    pub fn shrink(&mut self, bytes: usize) {
        if let Some(permit) = &mut self._permit {
            let more = permit.num_permits().saturating_sub(bytes);
            drop(permit.split(more));
        }
    }
}

impl Budget {
    /// A budget of so many bytes.
    pub fn new(bytes: u32) -> Budget {
        Budget { room: Some((Arc::new(Semaphore::new(bytes as usize)), bytes)), waiting: Arc::default() }
    }

    /// No bound: where one request at a time is in memory anyway, and in the simulator.
    pub fn unbounded() -> Budget {
        Budget { room: None, waiting: Arc::default() }
    }

    /// The same budget for one of those who share it, with a count of its own of who waits.
    pub fn view(&self) -> Budget {
        Budget { waiting: Arc::default(), ..self.clone() }
    }

    /// Waits for `bytes`; those who asked before get theirs first. Whoever asks for more than there is gets all of it.
    pub async fn hold(&self, bytes: usize) -> Held {
        let Some((room, all)) = &self.room else { return Held::default() };
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX).min(*all);
        if let Ok(permit) = room.clone().try_acquire_many_owned(bytes) {
            return Held { _permit: Some(permit) };
        }
        let _waiting = Waiting::new(&self.waiting);
        // It is never closed.
        Held { _permit: room.clone().acquire_many_owned(bytes).await.ok() }
    }

    /// `bytes`, if they are there and nobody waits for them.
    pub fn try_hold(&self, bytes: usize) -> Option<Held> {
        let Some((room, all)) = &self.room else { return Some(Held::default()) };
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX).min(*all);
        room.clone().try_acquire_many_owned(bytes).ok().map(|permit| Held { _permit: Some(permit) })
    }

    /// How many of those who ask through this view wait.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }
}

struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicUsize) -> Waiting<'a> {
        count.fetch_add(1, Ordering::Relaxed);
        Waiting(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn parts_are_handed_out_in_the_order_in_which_they_were_asked_for() {
        let budget = Budget::new(100);
        let first = budget.hold(60).await;
        let view = budget.view();
        let large = tokio::spawn({
            let view = view.clone();
            async move { view.hold(usize::MAX).await }
        });
        while view.waiting() == 0 {
            tokio::task::yield_now().await;
        }
        // What would fit does not overtake what came before; only those of one view are counted there.
        assert!(budget.try_hold(1).is_none() && budget.waiting() == 0);
        drop(first);
        let all = large.await.expect("the task ends");
        assert!(budget.try_hold(1).is_none() && view.waiting() == 0);
        drop(all);
        let mut whole = budget.try_hold(100).expect("all of it");
        whole.shrink(200);
        assert!(budget.try_hold(1).is_none());
        whole.shrink(30);
        assert!(budget.try_hold(70).is_some() && budget.try_hold(71).is_none());
        assert!(Budget::unbounded().try_hold(usize::MAX).is_some());
    }
}
