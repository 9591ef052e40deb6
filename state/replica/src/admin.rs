//! What operators' tools ask a replica: status, rows of one moment, log, hashes, checkpoints.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use clutch_log::{ConfigId, Event, Floors, Log, LogFault, Member, Position, Progress};
use clutch_proto::{
    Refusal, Time,
    admin::{
        AdminReply, AdminRequest, HashReply, LogBatch, LogMember, LogReply, MoveLeader, RescanReply, Row,
        ScanReply, ScanRows, StatusReply, admin_request::Op,
    },
    limits::SCAN_BYTES_MAX,
    mutants::{self, Mutant},
    types::Code,
};
use tokio::sync::oneshot;

use crate::{Replica, confirmed::confirmed};

use clutch_state::{
    applier::{rescan, stands_at},
    machine::Machine,
    store::{StoreError, Table, View},
};

/// Moments of the state that a scan may hold open.
const SNAPSHOTS_MAX: usize = 8;
const SNAPSHOT_IDLE: Duration = Duration::from_secs(60);

#[derive(Default)]
pub(super) struct Snapshots {
    open: BTreeMap<u64, Snapshot>,
}

struct Snapshot {
    view: Arc<dyn View>,
    position: Position,
    used: Duration,
}

impl Snapshots {
    pub(super) fn expire(&mut self, now: Duration) {
        self.open.retain(|_, s| now.saturating_sub(s.used) < SNAPSHOT_IDLE);
    }
}

type AdminResult = Result<AdminReply, Refusal>;

fn fault(error: impl std::fmt::Display) -> Refusal {
    Refusal::new(Code::ReplicaFault, error.to_string())
}

/// The same of a store, which may only be out of room.
fn store_fault(error: StoreError) -> Refusal {
    match error {
        StoreError::Full(text) => Refusal::new(Code::NoSpace, text),
        error => fault(error),
    }
}

/// Why the members of a log, or who leads it, were not changed.
pub(crate) fn not_changed(fault: LogFault) -> Refusal {
    let code = match fault {
        LogFault::NotLeader { .. } => Code::NotLeader,
        LogFault::Unsupported(_) => Code::InvalidArgument,
        LogFault::NoRoom(_) => Code::NoSpace,
        LogFault::NoQuorum { .. } => Code::OutcomeUnknown,
        LogFault::Corrupt { .. } | LogFault::Storage(_) | LogFault::Trimmed { .. } => Code::ReplicaFault,
    };
    Refusal::new(code, fault.to_string())
}

/// A member as it is told of.
pub(crate) fn member_of(progress: Progress) -> LogMember {
    LogMember {
        node: progress.member.node,
        voter: progress.member.voter,
        matched: progress.matched.map_or(0, |position| position.0),
        heard: progress.is_heard,
        ..LogMember::default()
    }
}

impl<M: Machine> Replica<M> {
    pub(super) fn admin(&mut self, request: AdminRequest, reply: oneshot::Sender<AdminResult>) {
        let runtime = self.config.runtime.clone();
        let answer = match request.op {
            // A node's, and not its replicas'.
            None | Some(Op::RotateKey(_)) => Err(Refusal::malformed("an admin request without an operation")),
            Some(Op::HashAt(at)) => {
                let hash = self
                    .applier
                    .hash_at(Position(at.position))
                    .map(|h| Bytes::copy_from_slice(&h.to_bytes()));
                let hash = HashReply { hash: hash.unwrap_or_default(), position: self.applier.position().0 };
                Ok(AdminReply { hash: Some(hash), ..AdminReply::default() })
            }
            Some(Op::ScanRows(scan)) => self.scan(&scan),
            // A state that was found wrong is kept as it is, as evidence.
            Some(Op::TakeCheckpoint(_)) if self.fault.get().is_some() => {
                Err(Refusal::new(Code::ReplicaFault, self.fault.get().cloned().unwrap_or_default()))
            }
            Some(Op::TakeCheckpoint(_)) => self.take_checkpoint().and_then(|()| self.status()),
            Some(
                Op::Status(clutch_proto::admin::Status { confirm: true, .. })
                | Op::TrimLog(_)
                | Op::Reconfigure(_)
                | Op::MoveLeader(_)
                | Op::ReadLog(_),
            ) => {
                return self.ask_log(request, reply);
            }
            Some(Op::Status(_)) => self.status(),
            Some(Op::Rescan(_)) => {
                let snapshot = self.applier.store().snapshot();
                let seam = runtime.clone();
                runtime.spawn("rescan", async move {
                    let scanned = match snapshot {
                        Ok(view) => seam.blocking(move || rescan(&*view)).await,
                        Err(error) => Some(Err(error)),
                    };
                    let _ = reply.send(rescan_reply(scanned));
                });
                return;
            }
        };
        let _ = reply.send(answer);
    }

    /// Answers what the log is to do or to say, when it has.
    fn ask_log(&mut self, request: AdminRequest, reply: oneshot::Sender<AdminResult>) {
        let (runtime, log) = (self.config.runtime.clone(), self.config.log.clone());
        // Who asked may have gone when there is an answer.
        match request.op {
            Some(Op::TrimLog(trim)) => match self.floors(Position(trim.upto)) {
                Ok(floors) => runtime.spawn("trim", async move {
                    let first = |()| LogReply { first: log.status().bounds.first.0, ..LogReply::default() };
                    let trimmed = log.set_floors(floors).await.map(first).map_err(fault);
                    let _ = reply.send(trimmed.map(|l| AdminReply { log: Some(l), ..AdminReply::default() }));
                }),
                Err(refusal) => drop(reply.send(Err(refusal))),
            },
            Some(Op::Reconfigure(_)) if let Some(refusal) = self.want_of_changes() => {
                drop(reply.send(Err(refusal)));
            }
            Some(Op::Reconfigure(change)) => runtime.spawn("reconfigure", async move {
                let member = |m: LogMember| Member { node: m.node, voter: m.voter };
                let members: Vec<Member> = change.members.into_iter().map(member).collect();
                let changed = log.reconfigure(ConfigId(change.expect_config), members).await;
                let status = |ConfigId(config)| StatusReply { config, ..StatusReply::default() };
                let done = changed.map(status).map_err(not_changed);
                let _ = reply.send(done.map(|s| AdminReply { status: Some(s), ..AdminReply::default() }));
            }),
            Some(Op::Status(_)) => runtime.spawn("confirm", async move {
                let barrier = log.read_barrier(crate::BARRIER_PATIENCE).await;
                let _ = reply.send(confirmed(barrier, log.status()));
            }),
            Some(Op::MoveLeader(MoveLeader { to })) => runtime.spawn("move leader", async move {
                let moved = log.transfer_leader(to).await.map_err(not_changed);
                let _ = reply.send(moved.map(|()| AdminReply::default()));
            }),
            Some(Op::ReadLog(read)) => runtime.spawn("read log", async move {
                let limit = (read.limit_bytes as usize).clamp(1, SCAN_BYTES_MAX);
                let _ = reply.send(read_log(&*log, Position(read.from.max(1)), limit).await);
            }),
            None
            | Some(
                Op::ScanRows(_) | Op::HashAt(_) | Op::TakeCheckpoint(_) | Op::Rescan(_) | Op::RotateKey(_),
            ) => drop(reply.send(Err(Refusal::malformed("no request of a log")))),
        }
    }

    fn status(&self) -> AdminResult {
        let log = self.config.log.status();
        let bounds = log.bounds;
        let checkpoints = self.checkpoints()?;
        let checkpoint_time = self.time_of_newest(&checkpoints).map_or(0, |time| time.0);
        let checks = self.applier.checks();
        let status = StatusReply {
            name: self.config.name.clone(),
            leading: self.leading.is_some() && self.fault.get().is_none() && self.applier.time().0 != 0,
            epoch: self.leading.map_or(0, |e| e.0),
            applied_position: self.applier.position().0,
            applied_time: self.applier.time().0,
            hash: Bytes::copy_from_slice(&self.applier.hash().to_bytes()),
            flushed_position: self.applier.flushed().map_err(fault)?.0,
            log_first: bounds.first.0,
            log_last: bounds.last.0,
            checks_compared: checks.compared,
            checks_not_compared: checks.not_compared,
            checks_undecided: checks.undecided,
            fault: self.fault.get().cloned().unwrap_or_default(),
            checkpoints: checkpoints.iter().map(|p| p.0).collect(),
            checkpoint_time,
            leader: log.leader.unwrap_or(0),
            members: log.members.into_iter().map(member_of).collect(),
            config: log.config.0,
            level_known: self.config.level,
            level: self.applier.level(),
            // A store that has failed says nothing more, and the fault is what there is to tell.
            inline_bytes: match self.fault.get() {
                Some(_) => 0,
                None => M::inline_bytes(&**self.applier.store()).map_err(fault)?,
            },
            ..StatusReply::default()
        };
        Ok(AdminReply { status: Some(status), ..AdminReply::default() })
    }

    fn checkpoints(&self) -> Result<Vec<Position>, Refusal> {
        let Some(dir) = &self.config.checkpoints else { return Ok(Vec::new()) };
        let names = self.config.runtime.disk.list(dir).map_err(fault)?;
        Ok(names.iter().filter_map(|n| n.parse().ok()).map(Position).collect())
    }

    /// The log's time at the newest of these checkpoints, once that was read: beside the replica, which does not wait for it.
    fn time_of_newest(&self, checkpoints: &[Position]) -> Option<Time> {
        let newest = checkpoints.iter().max().copied()?;
        {
            let mut times = self.checkpoint_times.lock();
            times.retain(|at, _| *at == newest);
            if let Some(time) = times.get(&newest) {
                return *time;
            }
            times.insert(newest, None);
        }
        let (times, open) = (self.checkpoint_times.clone(), self.config.open_checkpoint.clone());
        let path = self.config.checkpoints.as_ref()?.join(format!("{:020}", newest.0));
        let runtime = self.config.runtime.clone();
        self.config.runtime.spawn("checkpoint time", async move {
            let read = runtime.blocking(move || open(&path).and_then(|view| stands_at(&*view))).await;
            let mut times = times.lock();
            match read {
                Some(Ok((_, time))) => drop(times.insert(newest, Some(time))),
                // It is tried again when somebody asks again.
                Some(Err(_)) | None => drop(times.remove(&newest)),
            }
        });
        None
    }

    fn open_checkpoint(&self, at: Position) -> Result<Arc<dyn View>, Refusal> {
        let dir =
            self.config.checkpoints.as_ref().filter(|_| self.checkpoints().is_ok_and(|c| c.contains(&at)));
        let dir =
            dir.ok_or_else(|| Refusal::new(Code::NotFound, format!("there is no checkpoint at {at}")))?;
        (self.config.open_checkpoint)(&dir.join(format!("{:020}", at.0))).map_err(fault)
    }

    /// Copies the state into `<checkpoints>/<position, 20 digits>`.
    fn take_checkpoint(&mut self) -> Result<(), Refusal> {
        let Some(dir) = self.config.checkpoints.clone() else {
            return Err(Refusal::new(
                Code::Unsupported,
                "this replica keeps its state in memory: no checkpoints",
            ));
        };
        self.config.runtime.disk.create_dir_all(&dir).map_err(fault)?;
        let path: PathBuf = dir.join(format!("{:020}", self.applier.position().0));
        if !self.config.runtime.disk.exists(&path) {
            self.applier.store().checkpoint(&path).map_err(store_fault)?;
            self.checkpoint_times.lock().insert(self.applier.position(), Some(self.applier.time()));
        }
        // Also of one that is there: who made it may not have come to this.
        self.config.runtime.disk.sync_dir(&dir).map_err(fault)
    }

    /// What may be trimmed: nothing that a restart or a replay from the newest checkpoint needs.
    fn floors(&self, retain: Position) -> Result<Floors, Refusal> {
        let flushed = self.applier.flushed().map_err(fault)?;
        let Some(newest) = self.checkpoints()?.into_iter().max() else {
            return Err(Refusal::invalid(
                "there is no checkpoint to replay from; take one first (clutch log checkpoint)",
            ));
        };
        if mutants::is(Mutant::FloorsOfApplied) {
            let applied = self.applier.position();
            return Ok(Floors { retain, snapshot: applied, flushed: applied });
        }
        // A checkpoint may have more than the store has durably.
        let snapshot = if mutants::is(Mutant::TrimPastCheckpoint) { flushed } else { newest.min(flushed) };
        Ok(Floors { retain, snapshot, flushed })
    }

    fn scan(&mut self, scan: &ScanRows) -> AdminResult {
        let now = self.config.runtime.clock.monotonic();
        let id = if scan.snapshot == 0 {
            if self.snapshots.open.len() >= SNAPSHOTS_MAX {
                return Err(Refusal::new(
                    Code::Overloaded,
                    format!("{SNAPSHOTS_MAX} scans are open already"),
                ));
            }
            // Not to be taken for another member's, or for one from before a restart.
            let id = self.config.runtime.random.u64().max(1);
            let (view, position) = match scan.checkpoint {
                0 => (self.applier.store().snapshot().map_err(store_fault)?, self.applier.position()),
                at => (self.open_checkpoint(Position(at))?, Position(at)),
            };
            let snapshot = Snapshot { view, position, used: now };
            self.snapshots.open.insert(id, snapshot);
            id
        } else {
            scan.snapshot
        };
        let Some(snapshot) = self.snapshots.open.get_mut(&id) else {
            return Err(Refusal::new(
                Code::NotFound,
                "that scan was idle for too long or has ended; begin a new one",
            ));
        };
        snapshot.used = now;
        let limit = (scan.limit_bytes as usize).clamp(1, SCAN_BYTES_MAX);
        let (rows, last) = page(&*snapshot.view, &scan.after, &scan.until, limit).map_err(fault)?;
        let position = snapshot.position.0;
        if last && scan.until.is_empty() {
            self.snapshots.open.remove(&id);
        }
        Ok(AdminReply {
            scan: Some(ScanReply { snapshot: id, rows, last, position }),
            ..AdminReply::default()
        })
    }
}

/// Rows of all tables after the stored key `after`, and before `until` unless that is empty; whether these are the last.
fn page(view: &dyn View, after: &[u8], until: &[u8], limit: usize) -> Result<(Vec<Row>, bool), StoreError> {
    let mut rows = Vec::new();
    let mut bytes = 0;
    let first = after.first().copied().unwrap_or(0);
    for table in first..=255 {
        let from =
            if table == first && !after.is_empty() { [&after[1..], &[0]].concat() } else { Vec::new() };
        let mut is_behind = false;
        view.visit(Table(table), &from, &[], &mut |key, value| {
            let key = Table(table).stored_key(key);
            is_behind = !until.is_empty() && key[..] >= *until;
            if !is_behind {
                bytes += key.len() + value.len() + 16;
                rows.push(Row { key: key.into_vec().into(), value: Bytes::copy_from_slice(value) });
            }
            !is_behind && bytes < limit
        })?;
        if is_behind || bytes >= limit {
            return Ok((rows, is_behind));
        }
    }
    Ok((rows, true))
}

fn trimmed(asked: Position, first: Position) -> Refusal {
    let text = format!("position {asked} was trimmed; the log begins at {first}");
    Refusal::new(Code::NotFound, text)
}

/// Batches from `from` on, without waiting at the end.
async fn read_log(log: &dyn Log, from: Position, limit: usize) -> AdminResult {
    let bounds = log.status().bounds;
    if from < bounds.first {
        return Err(trimmed(from, bounds.first));
    }
    let mut reply = LogReply { batches: Vec::new(), next: from.0, first: bounds.first.0 };
    let mut events = log.events(from);
    let mut bytes = 0;
    while reply.next <= bounds.last.0 && bytes < limit {
        match events.next().await {
            Ok(Event::Committed(batch)) => {
                bytes += batch.entries.iter().map(Bytes::len).sum::<usize>() + 32;
                reply.next = batch.position.next().0;
                reply.batches.push(LogBatch { position: batch.position.0, entries: batch.entries });
            }
            Ok(Event::Gap { to }) => reply.next = to.next().0,
            Ok(Event::Sealed { .. }) => break,
            Ok(Event::Leader { .. }) => {}
            // It was trimmed meanwhile.
            Ok(Event::Restore(_)) => return Err(trimmed(from, log.status().bounds.first)),
            Err(LogFault::Trimmed { asked, first }) => return Err(trimmed(asked, first)),
            Err(error) => return Err(fault(error)),
        }
    }
    Ok(AdminReply { log: Some(reply), ..AdminReply::default() })
}

fn rescan_reply(scanned: Option<Result<clutch_state::applier::Rescan, StoreError>>) -> AdminResult {
    let found = scanned.ok_or_else(|| fault("the rescan did not finish"))?.map_err(fault)?;
    let rescan = RescanReply { rows: found.rows, differences: found.differences, position: found.position.0 };
    Ok(AdminReply { rescan: Some(rescan), ..AdminReply::default() })
}
