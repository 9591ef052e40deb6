//! One log, one state: the live replicas (which came from a flushed image and the rest of the log), a full replay, and
//! a replay that is reopened every few batches all have the same hash; the rows give the stored hash.

use std::sync::Arc;

use clutch_cdc::Cdc;
use clutch_log::LogId;
use clutch_registry::Registry;
use clutch_shard::Shard;
use clutch_state::{Applier, Machine, MemoryStore, StateHash, applier::rescan};

use super::{Evidence, Violation, convergence::Statuses, state::Replayed};

/// A replay is reopened after so many batches, or up to twice as many.
const REOPENED_AFTER_MIN: usize = 10;

fn replay<M: Machine>(
    evidence: &Evidence,
    id: LogId,
    statuses: &Statuses,
    wrong: &mut Vec<String>,
) -> Option<Arc<MemoryStore>> {
    let batches = evidence.logs.get(&id)?;
    let store = Arc::new(MemoryStore::new());
    let mut applier = Applier::<M>::open(store.clone()).ok()?;
    for batch in batches.values() {
        if let Err(fault) = applier.apply(batch) {
            wrong.push(format!("{id}: full replay stops: {fault}"));
            return None;
        }
    }
    for (_, status) in statuses.iter().filter(|(of, _)| *of == id) {
        // The log's own records at its end belong to no batch.
        applier.skip(clutch_log::Position(status.applied_position));
        let ours = applier.hash_at(clutch_log::Position(status.applied_position));
        let theirs = StateHash::from_bytes(&status.hash);
        if ours != theirs {
            wrong.push(format!(
                "{id} at position {}: the live replica has {theirs:?}, full replay {ours:?}",
                status.applied_position
            ));
        }
    }
    // What an applier keeps in memory must not matter.
    let again = Arc::new(MemoryStore::new());
    let mut reopened = Applier::<M>::open(again.clone()).ok()?;
    let every = REOPENED_AFTER_MIN + batches.len() % REOPENED_AFTER_MIN;
    for (index, batch) in batches.values().enumerate() {
        if index % every == every - 1 {
            reopened = Applier::<M>::open(again.clone()).ok()?;
        }
        if let Err(fault) = reopened.apply(batch) {
            wrong.push(format!("{id}: a replay that is reopened stops: {fault}"));
            return None;
        }
    }
    if reopened.hash() != applier.hash() {
        wrong.push(format!(
            "{id}: a replay that is reopened every {every} batches gives another hash than full replay"
        ));
    }
    match rescan(&*store) {
        Ok(found) => wrong.extend(found.differences.into_iter().take(3).map(|d| format!("{id}: {d}"))),
        Err(error) => wrong.push(format!("{id}: {error}")),
    }
    Some(store)
}

/// Replays all logs; returns the states of the shards and of the registry.
pub fn check(evidence: &Evidence, statuses: &Statuses) -> (Replayed, Vec<Violation>) {
    let mut wrong = Vec::new();
    let mut replayed = Replayed::new();
    for id in evidence.logs.keys() {
        match *id {
            LogId::REGISTRY => {
                if let Some(store) = replay::<Registry>(evidence, *id, statuses, &mut wrong) {
                    replayed.insert(*id, store);
                }
            }
            LogId::CDC => drop(replay::<Cdc>(evidence, *id, statuses, &mut wrong)),
            _ => {
                if let Some(store) = replay::<Shard>(evidence, *id, statuses, &mut wrong) {
                    replayed.insert(*id, store);
                }
            }
        }
    }
    let violations = wrong.into_iter().take(10).map(|what| Violation::new("state hash", what)).collect();
    (replayed, violations)
}
