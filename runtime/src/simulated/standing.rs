//! Whose task this thread is polling or dropping.

use std::{cell::RefCell, sync::Arc, time::Duration};

use rand::RngCore as _;

use super::{NodeId, Shared, SimClock, executor::TaskOwner};
use crate::{BoxFuture, Clock as _};

thread_local! {
    static STANDING: RefCell<Option<SimClock>> = const { RefCell::new(None) };
}

/// While it lives, this thread acts for a node.
pub(super) struct Standing {
    before: Option<SimClock>,
}

impl Standing {
    pub(super) fn on(shared: &Arc<Shared>, node: NodeId) -> Standing {
        let clock = SimClock { shared: shared.clone(), node, ppm: shared.monotonic_ppm(node) };
        Standing { before: set(Some(clock)) }
    }
}

impl Drop for Standing {
    fn drop(&mut self) {
        set(self.before.take());
    }
}

/// Whom the thread acted for before. A thread that ends may still drop a world, and acts for nobody.
fn set(clock: Option<SimClock>) -> Option<SimClock> {
    STANDING.try_with(|standing| standing.replace(clock)).ok().flatten()
}

fn with<T>(ask: impl FnOnce(&SimClock) -> T) -> Option<T> {
    STANDING.try_with(|standing| standing.borrow().as_ref().map(ask)).ok().flatten()
}

/// The node's monotonic clock; `None` outside of a world.
pub(crate) fn monotonic() -> Option<Duration> {
    with(SimClock::monotonic)
}

/// Waits on the node's clock.
pub(crate) fn sleep(duration: Duration) -> Option<BoxFuture<()>> {
    with(|clock| clock.sleep(duration))
}

/// Starts a task of the node, or gives it back outside of a world.
pub(crate) fn spawn(name: &'static str, task: BoxFuture<()>) -> Result<(), BoxFuture<()>> {
    let on = with(|clock| (clock.shared.clone(), clock.node));
    let Some((shared, node)) = on else { return Err(task) };
    shared.executor.lock().spawn(TaskOwner { node, name }, task);
    Ok(())
}

/// Drawn from the world's seed.
pub(crate) fn random() -> Option<u64> {
    with(|clock| clock.shared.random.lock().next_u64())
}
