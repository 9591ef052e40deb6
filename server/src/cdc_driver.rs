//! Sends the steps of the CDC's transactions and brings the answers back as entries.
//!
//! Each step is sent until it is answered for good: a refusal that may be retried, silence or an unreachable
//! shard only delay it. The shard executes it once, by its tag. Where the machine allows it, the next step is sent
//! without the answer being logged first, and one entry brings several answers. When leadership ends, all sending
//! ends; the next leader begins again from the rows.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use clutch_cdc::{STEPS_PER_ENTRY_MAX, SendStep};
use clutch_client::{Client, ClientError};
use clutch_proto::{
    cdc::{CdcEntry, StepDone, cdc_entry::Body},
    shard::ShardReply,
    types::Error,
};
use clutch_state_replica::{LeaderEvent, ReplicaHandle};
use prost::Message as _;
use tokio::sync::mpsc;

/// Pause before a step is sent again after patience has ended.
const PAUSE: Duration = Duration::from_millis(200);
/// Steps of one transaction whose refusal is passed on at once; more mean that it goes round.
const REFUSALS_UNPAUSED: u32 = 16;

/// Runs until the replica ends.
pub async fn run(
    client: Client,
    replica: ReplicaHandle,
    mut events: mpsc::UnboundedReceiver<LeaderEvent<SendStep>>,
) {
    // Counts reigns; a task of an earlier one stops at its next turn.
    let reign = Arc::new(AtomicU64::new(0));
    while let Some(event) = events.recv().await {
        let steps = match event {
            LeaderEvent::Began(steps) => {
                reign.fetch_add(1, Ordering::Relaxed);
                steps
            }
            LeaderEvent::Action(step) => vec![step],
            LeaderEvent::Ended => {
                reign.fetch_add(1, Ordering::Relaxed);
                continue;
            }
        };
        for step in steps {
            let (client, replica, reign) = (client.clone(), replica.clone(), reign.clone());
            let now = reign.load(Ordering::Relaxed);
            let runtime = client.runtime().clone();
            runtime.spawn("cdc step", async move {
                drive(&client, &replica, step, &|| reign.load(Ordering::Relaxed) == now).await
            });
        }
    }
}

/// Notes, for simulations, where a transaction stood whose step was not brought to its end.
struct Cut<'a> {
    client: &'a Client,
    step: SendStep,
    is_done: bool,
}

impl Drop for Cut<'_> {
    fn drop(&mut self) {
        if !self.is_done {
            let (kind, state) = self.step.names();
            self.client.runtime().note(format!("cdc: crashes while a {kind} is in {state}"));
        }
    }
}

/// Sends a step until it is answered, and those that may follow at once; then proposes the answers until they are
/// taken.
async fn drive(
    client: &Client,
    replica: &ReplicaHandle,
    first: SendStep,
    still_leading: &(dyn Fn() -> bool + Sync),
) {
    let clock = client.runtime().clock.clone();
    let (transaction, first_step) = (first.transaction, first.step);
    let mut cut = Cut { client, step: first, is_done: false };
    let mut earlier = Vec::new();
    let (error, reply) = loop {
        let Some(answer) = send(client, &cut.step, still_leading).await else { return };
        match answer {
            Ok(reply) => match cut.step.after(&reply).filter(|_| earlier.len() + 1 < STEPS_PER_ENTRY_MAX) {
                Some(next) => {
                    cut.step = next;
                    earlier.push(reply);
                }
                None => break (None, Some(reply)),
            },
            Err(error) => break (Some(error), None),
        }
    };
    if let Some(error) = &error {
        // The machine may ask for the step again; a refusal that stays must not become a busy loop.
        tracing::debug!(transaction, step = cut.step.step, detail = %error.detail, "a step was refused");
        if cut.step.step > REFUSALS_UNPAUSED {
            clock.sleep(PAUSE).await;
        }
    }
    let done = StepDone { transaction, step: first_step, error, reply, earlier };
    let entry = CdcEntry { tag: None, body: Some(Body::StepDone(done)) };
    let body = bytes::Bytes::from(entry.encode_to_vec());
    while still_leading() {
        // A second copy in the log is ignored: the step has moved on by then.
        if replica.propose(body.clone()).await.result.is_ok() {
            cut.is_done = true;
            return;
        }
        client.runtime().note("cdc driver: an answer is proposed again");
        clock.sleep(PAUSE).await;
    }
}

/// The answer to one step; `None` when the reign has ended.
async fn send(
    client: &Client,
    step: &SendStep,
    still_leading: &(dyn Fn() -> bool + Sync),
) -> Option<Result<ShardReply, Error>> {
    let op = step.request.op.clone()?;
    loop {
        if !still_leading() {
            client.runtime().note("cdc driver: a step is dropped with the reign");
            return None;
        }
        match client.shard_step(op.clone(), step.tag.as_ref()).await {
            Ok(reply) => return Some(Ok(ShardReply { reply: Some(reply) })),
            // Anything else may hide an earlier attempt that was executed: the tag makes asking again safe.
            Err(ClientError::Refused(refusal)) if refusal.code.is_decision() => {
                return Some(Err(refusal.to_wire()));
            }
            Err(error) => {
                client.runtime().note("cdc driver: a step waits for its shard");
                tracing::debug!(transaction = step.transaction, step = step.step, %error, "a step waits");
                client.runtime().clock.sleep(PAUSE).await;
            }
        }
    }
}
