//! A member that needs what was trimmed gets the snapshot of another, in parts, and begins again when that one goes away.

use std::{sync::Arc, time::Duration};

use clutch_log::{LogFault, Manifest, NodeId, Position, SnapshotFile, Snapshots};
use clutch_runtime::Runtime;

use crate::Group;

/// Bytes of a file that are sent at a time; so few that snapshots of small worlds have several parts.
const PART_BYTES: usize = 4096;
/// What a part takes on its way.
const PART_US_MAX: u64 = 2_000;
/// Before another member is asked.
const AGAIN: Duration = Duration::from_millis(50);

/// Receives a snapshot that has everything that was trimmed; as often as it takes.
pub(crate) async fn restored(runtime: Runtime, group: Arc<Group>, node: NodeId) -> Manifest {
    loop {
        let (floor, own, other) = {
            let state = group.state.lock();
            let others = state.members.others(node, runtime.clock.monotonic());
            let drawn = runtime.random.below(others.len().max(1) as u64) as usize;
            let is_cut_off = state.deaf.contains(&node);
            let other = others.get(drawn).filter(|other| !is_cut_off && !state.deaf.contains(other)).copied();
            let from = other.and_then(|other| Some((other, state.members.snapshots(other)?)));
            (state.floor, state.members.snapshots(node), from)
        };
        if let (Some(own), Some((other, from))) = (own, other) {
            let is_there = || group.state.lock().members.is_there(other, runtime.clock.monotonic());
            match transfer(&runtime, &*from, &*own, floor, &is_there).await {
                Ok(manifest) => {
                    runtime.note("log: a member is restored from a snapshot");
                    return manifest;
                }
                Err(error) => {
                    runtime.note("log: a snapshot does not arrive");
                    tracing::debug!(node, other, %error, "a snapshot does not arrive");
                }
            }
        }
        runtime.clock.sleep(AGAIN).await;
    }
}

async fn transfer(
    runtime: &Runtime,
    from: &dyn Snapshots,
    to: &dyn Snapshots,
    least: Position,
    is_there: &(dyn Fn() -> bool + Sync),
) -> Result<Manifest, LogFault> {
    let manifest = from.take(least).await?;
    assert!(
        manifest.position >= least,
        "a snapshot at {} of a log that begins after {least}",
        manifest.position
    );
    to.receive(&manifest).await?;
    for SnapshotFile { name, bytes, .. } in &manifest.files {
        let mut offset = 0;
        while offset < *bytes {
            runtime.clock.sleep(Duration::from_micros(runtime.random.below(PART_US_MAX))).await;
            if !is_there() {
                return Err(LogFault::Storage("the other member is gone".into()));
            }
            let part = from.read(manifest.position, name, offset, PART_BYTES).await?;
            if part.is_empty() {
                return Err(LogFault::Storage(format!("{name} ends at {offset} of {bytes} bytes")));
            }
            let length = part.len() as u64;
            to.write(manifest.position, name, offset, part).await?;
            offset += length;
        }
    }
    to.commit(&manifest).await?;
    Ok(manifest)
}
