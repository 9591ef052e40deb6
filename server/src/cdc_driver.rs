//! Sends the steps of the CDC's transactions and brings the answers back as entries.
//!
//! Each step is sent until it is answered for good: a refusal that may be retried, silence or an unreachable
//! shard only delay it. The shard executes it once, by its tag. When leadership ends, all sending ends; the next
//! leader begins again from the rows.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use clutch_cdc::SendStep;
use clutch_client::{Client, ClientError};
use clutch_proto::{
    Slot,
    cdc::{CdcEntry, StepDone, cdc_entry::Body},
    shard::ShardReply,
};
use clutch_state::{ReplicaHandle, replica::LeaderEvent};
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
                drive(&client, &replica, &step, &|| reign.load(Ordering::Relaxed) == now).await
            });
        }
    }
}

/// Sends one step until it is answered, then proposes the answer until it is taken.
async fn drive(
    client: &Client,
    replica: &ReplicaHandle,
    step: &SendStep,
    still_leading: &(dyn Fn() -> bool + Sync),
) {
    let clock = client.runtime().clock.clone();
    let Some(op) = step.request.op.clone() else { return };
    let (error, reply) = loop {
        if !still_leading() {
            client.runtime().note("cdc driver: a step is dropped with the reign");
            return;
        }
        match client.shard_step(Slot(step.slot), op.clone(), step.tag.as_ref()).await {
            Ok(reply) => break (None, Some(ShardReply { reply: Some(reply) })),
            // Anything else may hide an earlier attempt that was executed: the tag makes asking again safe.
            Err(ClientError::Refused(refusal)) if refusal.code.is_decision() => {
                break (Some(refusal.to_wire()), None);
            }
            Err(error) => {
                client.runtime().note("cdc driver: a step waits for its shard");
                tracing::debug!(transaction = step.transaction, step = step.step, %error, "a step waits");
                clock.sleep(PAUSE).await;
            }
        }
    };
    if let Some(error) = &error {
        // The machine may ask for the step again; a refusal that stays must not become a busy loop.
        tracing::debug!(transaction = step.transaction, step = step.step, detail = %error.detail, "a step was refused");
        if step.step > REFUSALS_UNPAUSED {
            clock.sleep(PAUSE).await;
        }
    }
    let done = StepDone { transaction: step.transaction, step: step.step, error, reply };
    let entry = CdcEntry { tag: None, body: Some(Body::StepDone(done)) };
    let body = bytes::Bytes::from(entry.encode_to_vec());
    while still_leading() {
        // A second copy in the log is ignored: the step has moved on by then.
        if replica.propose(body.clone()).await.result.is_ok() {
            return;
        }
        client.runtime().note("cdc driver: an answer is proposed again");
        clock.sleep(PAUSE).await;
    }
}
