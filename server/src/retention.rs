//! Keeps logs from growing for ever, where that is asked for: checkpoints now and then, and away with what is older.
//!
//! What is kept always begins with a checkpoint, so every moment of the time that was asked for can be replayed. In this
//! order: a checkpoint is durable and has been read whole before a log is trimmed up to it, and older ones go after that. Whoever stops half-way
//! leaves more than was asked for, never less.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use clutch_client::Client;
use clutch_log::LogId;
use clutch_proto::{
    Time,
    admin::{AdminReply, AdminRequest, Status, TakeCheckpoint, TrimLog, admin_request::Op},
    session::Role,
};
use clutch_runtime::{Endpoint, HybridClock, Runtime};
use clutch_state::applier;

use crate::stores::{RocksStores, StoreProvider as _, log_name};

/// So many checkpoints lie in the time that is kept, so a log is at most longer by this part.
const CHECKPOINTS: u32 = 4;
/// A checkpoint is taken at least this often, however much is kept.
const EVERY_MAX: Duration = Duration::from_secs(24 * 60 * 60);
/// How often all logs are looked at.
const LOOK_MIN: Duration = Duration::from_secs(1);
const LOOK_MAX: Duration = Duration::from_secs(10 * 60);

/// The logs of one process and how much of them is kept.
pub struct Retention {
    /// Asks the replicas.
    pub client: Client,
    /// Where those of this process are asked.
    pub at: Endpoint,
    /// What the checkpoints lie in.
    pub stores: Arc<RocksStores>,
    /// All logs.
    pub logs: Vec<LogId>,
    /// How far back every log can be replayed.
    pub keep: Duration,
}

/// What of one log may go.
#[derive(Debug, PartialEq, Eq)]
struct Plan {
    /// A checkpoint is due.
    take: bool,
    /// The log is trimmed up to this checkpoint, and older ones are removed.
    base: Option<u64>,
}

/// Decides from the times of the checkpoints by their positions.
fn plan(checkpoints: &BTreeMap<u64, Time>, applied: u64, now: Time, keep: Duration) -> Plan {
    let age = |time: Time| Duration::from_nanos(now.0.saturating_sub(time.0));
    let take = match checkpoints.last_key_value() {
        None => applied > 0,
        Some((position, time)) => applied > *position && age(*time) >= (keep / CHECKPOINTS).min(EVERY_MAX),
    };
    let base = checkpoints.iter().rev().find(|(_, time)| age(**time) >= keep).map(|(position, _)| *position);
    Plan { take, base }
}

impl Retention {
    /// Works until its task ends. Age is by the cluster's time: a wall clock that jumps lets nothing go.
    pub async fn run(self, clock: Arc<HybridClock>) {
        let runtime = self.client.runtime().clone();
        let mut times: BTreeMap<(LogId, u64), Time> = BTreeMap::new();
        let look = (self.keep / (4 * CHECKPOINTS)).clamp(LOOK_MIN, LOOK_MAX);
        loop {
            runtime.clock.sleep(look).await;
            for id in &self.logs {
                if let Err(error) = self.one(*id, &runtime, clock.now(), &mut times).await {
                    tracing::warn!(log = log_name(*id), error = format!("{error:#}"), "keep the log short");
                }
            }
        }
    }

    async fn ask(&self, id: LogId, op: Op) -> Result<AdminReply> {
        let role = Role::try_from(i32::from(id.role)).context("a role")?;
        Ok(self.client.admin_at(self.at.clone(), role, id.number, AdminRequest { op: Some(op) }).await?)
    }

    async fn one(
        &self,
        id: LogId,
        runtime: &Runtime,
        now: Time,
        times: &mut BTreeMap<(LogId, u64), Time>,
    ) -> Result<()> {
        let status = self
            .ask(id, Op::Status(Status::default()))
            .await?
            .status
            .context("an answer without a status")?;
        // One from a history that the log does not have is nothing to begin from.
        let known = status.checkpoints.iter().copied().filter(|at| *at <= status.applied_position);
        let mut checkpoints = BTreeMap::new();
        for position in known {
            let time = match times.get(&(id, position)) {
                Some(time) => *time,
                None => match self.verified_time_of(id, position, runtime).await {
                    Ok(time) => time,
                    Err(error) => {
                        // It counts as none. What is kept only becomes more by that.
                        let error = format!("{error:#}");
                        tracing::warn!(log = log_name(id), position, error, "a checkpoint is of no use");
                        continue;
                    }
                },
            };
            times.insert((id, position), time);
            checkpoints.insert(position, time);
        }
        times.retain(|(of, position), _| *of != id || checkpoints.contains_key(position));
        let Plan { take, base } = plan(&checkpoints, status.applied_position, now, self.keep);
        // First what gives room: without any no checkpoint can be taken.
        if let Some(base) = base {
            assert!(checkpoints.contains_key(&base), "what is kept begins with a checkpoint");
            if status.log_first <= base {
                self.ask(id, Op::TrimLog(TrimLog { upto: base })).await.context("trim the log")?;
            }
            for position in checkpoints.into_keys().filter(|position| *position < base) {
                let stores = self.stores.clone();
                let removed = runtime.blocking(move || stores.remove_checkpoint(id, position)).await;
                removed.context("removing did not finish")?.context("remove a checkpoint")?;
            }
        }
        if take {
            self.ask(id, Op::TakeCheckpoint(TakeCheckpoint {})).await.context("take a checkpoint")?;
        }
        Ok(())
    }

    /// When the state of a checkpoint was the present one; an error unless all of its rows are as they were.
    async fn verified_time_of(&self, id: LogId, position: u64, runtime: &Runtime) -> Result<Time> {
        let path = self.stores.checkpoints(id).context("a place for checkpoints")?;
        let (path, open) = (path.join(format!("{position:020}")), self.stores.open_checkpoint());
        let read = runtime.blocking(move || {
            let view = open(&path)?;
            Ok::<_, clutch_state::StoreError>((applier::rescan(&*view)?, applier::stands_at(&*view)?.1))
        });
        let (found, time) = read.await.context("reading did not finish")??;
        anyhow::ensure!(found.differences.is_empty(), "it is damaged: {}", found.differences.join("; "));
        Ok(time)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_begins_with_a_checkpoint_that_is_old_enough() {
        let keep = Duration::from_secs(100);
        let at = |seconds: u64| Time(seconds * 1_000_000_000);
        let of = |list: &[(u64, u64)]| list.iter().map(|(p, s)| (*p, at(*s))).collect::<BTreeMap<_, _>>();
        let check = |list: &[(u64, u64)], applied, now, take, base| {
            assert_eq!(plan(&of(list), applied, at(now), keep), Plan { take, base }, "{list:?} at {now}");
        };
        // Nothing yet, of an empty log and of another.
        check(&[], 0, 1000, false, None);
        check(&[], 5, 1000, true, None);
        // Not due, due, and due but nothing has happened since.
        check(&[(5, 1000)], 9, 1024, false, None);
        check(&[(5, 1000)], 9, 1025, true, None);
        check(&[(5, 1000)], 5, 1025, false, None);
        // Of those that are old enough the newest one is the beginning.
        check(&[(5, 1000), (7, 1030), (9, 1060)], 9, 1099, false, None);
        check(&[(5, 1000), (7, 1030), (9, 1060)], 9, 1100, false, Some(5));
        check(&[(5, 1000), (7, 1030), (9, 1060)], 10, 1135, true, Some(7));
        // A clock that is behind lets nothing go.
        check(&[(5, 1000), (7, 1030)], 9, 10, false, None);
        // A log that rests keeps its last one.
        check(&[(5, 1000), (7, 1030)], 7, 9999, false, Some(7));
    }
}
