//! Streams between simulated nodes: ordered, delayed, and broken as connections are.
//!
//! Nothing is lost or doubled within a stream: what the network loses is sent again, which takes its time, and a way that
//! stays cut ends the stream. Who waits at one end learns late, or at once, that the other is gone.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::sync::mpsc;

use super::{NodeId, Shared, executor::Sleep, executor::TaskOwner, network::SimNetwork};
use crate::PeerStream;

/// Frames that wait at each end.
const WAITING_MAX: usize = 64;
/// What was lost is sent again after about so long.
const AGAIN_MS: u64 = 200;
/// Of so many losses one ends the stream.
const LOSSES_ENDING: u64 = 20;
/// A way that stays cut for longer than something between these ends the stream.
const CUT_MS: (u64, u64) = (300, 3_000);
/// So much later at most the other end hears that a process is gone.
const GONE_MS_MAX: u64 = 2_000;
/// How often a cut way is looked at.
const LOOK: Duration = Duration::from_millis(5);

/// Makes both ends of a stream: the first for `from`, the second for `to`.
pub(super) fn pair(shared: &Arc<Shared>, from: NodeId, to: NodeId) -> (PeerStream, PeerStream) {
    let (there_in, there_out) = way(shared, from, to);
    let (back_in, back_out) = way(shared, to, from);
    (PeerStream { sender: there_in, receiver: back_out }, PeerStream { sender: back_in, receiver: there_out })
}

/// One direction.
fn way(shared: &Arc<Shared>, from: NodeId, to: NodeId) -> (mpsc::Sender<Bytes>, mpsc::Receiver<Bytes>) {
    let (sender, taken) = mpsc::channel(WAITING_MAX);
    let (wire, arriving) = mpsc::unbounded_channel();
    let (given, receiver) = mpsc::channel(WAITING_MAX);
    let spawn = |node, task| shared.executor.lock().spawn(TaskOwner { node, name: "stream" }, task);
    spawn(from, Box::pin(take(shared.clone(), taken, wire)));
    spawn(to, Box::pin(give(shared.clone(), from, to, arriving, given)));
    (sender, receiver)
}

/// Puts frames on their way, with the time at which each arrives. `None` says that the sender has closed its end.
async fn take(
    shared: Arc<Shared>,
    mut frames: mpsc::Receiver<Bytes>,
    wire: mpsc::UnboundedSender<Option<(u64, Bytes)>>,
) {
    loop {
        // Who waits for a frame must hear that nobody takes it any more.
        let next = tokio::select! {
            biased;
            next = frames.recv() => next,
            () = wire.closed() => return,
        };
        let Some(frame) = next else {
            // The other end may be gone.
            let _ = wire.send(None);
            return;
        };
        let Some(delay) = SimNetwork::delay(&shared) else { return };
        let due = shared.executor.lock().now_ns() + delay.as_nanos() as u64;
        if wire.send(Some((due, frame))).is_err() {
            return;
        }
    }
}

/// Hands frames over when they have arrived.
async fn give(
    shared: Arc<Shared>,
    from: NodeId,
    to: NodeId,
    mut wire: mpsc::UnboundedReceiver<Option<(u64, Bytes)>>,
    frames: mpsc::Sender<Bytes>,
) {
    loop {
        let next = tokio::select! {
            biased;
            next = wire.recv() => next,
            () = frames.closed() => return,
        };
        let (due, frame) = match next {
            Some(Some(next)) => next,
            Some(None) => return,
            None => {
                // A machine that has lost its power says nothing.
                let late = if shared.below(2) == 0 { 0 } else { shared.below(GONE_MS_MAX) };
                return Sleep::new(shared.clone(), Duration::from_millis(late)).await;
            }
        };
        let now = shared.executor.lock().now_ns();
        if due > now {
            Sleep::new(shared.clone(), Duration::from_nanos(due - now)).await;
        }
        SimNetwork::unclogged(&shared, from, to).await;
        let (least, most) = CUT_MS;
        let mut patience = Duration::from_millis(least + shared.below(most - least));
        while SimNetwork::is_blocked(&shared, from, to) {
            if patience.is_zero() {
                return shared.notes.add("world: a cut ends a stream");
            }
            Sleep::new(shared.clone(), LOOK).await;
            patience = patience.saturating_sub(LOOK);
        }
        shared.record("frame", frame.len() as u64);
        if frames.send(frame).await.is_err() {
            return;
        }
    }
}

impl SimNetwork {
    fn is_blocked(shared: &Shared, from: NodeId, to: NodeId) -> bool {
        let mut wires = shared.network.lock();
        let blocked = wires.blocked.contains(&(from, to));
        wires.counts.blocked += u64::from(blocked);
        blocked
    }

    /// How long a frame travels; `None` when its loss ends the stream.
    fn delay(shared: &Shared) -> Option<Duration> {
        let (loss_permille, spread, least) = {
            let wires = shared.network.lock();
            let faults = &wires.faults;
            let spread = faults.delay_us_max.saturating_sub(faults.delay_us_min) + 1;
            (faults.loss_permille, spread, faults.delay_us_min)
        };
        let mut delay = Duration::from_micros(least + shared.below(spread));
        while shared.below(1000) < u64::from(loss_permille) {
            shared.network.lock().counts.lost += 1;
            if shared.below(LOSSES_ENDING) == 0 {
                shared.notes.add("world: a loss ends a stream");
                return None;
            }
            delay += Duration::from_millis(AGAIN_MS + shared.below(AGAIN_MS));
        }
        Some(delay)
    }
}
