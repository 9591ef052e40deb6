//! Runs a log again, from its beginning or from a checkpoint, into an empty store: disaster recovery, and the
//! proof that apply is pure.
//!
//! Entries come from a running cluster or from a directory, also one that is a copy or belongs to a running
//! process; nothing there is written.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use clutch_cdc::Cdc;
use clutch_client::Client;
use clutch_log::{Batch, Epoch, LogFault, LogId, Position};
use clutch_log_local::{Continuity, RecordKind, SegmentReader, open_read_only};
use clutch_proto::{
    Time,
    admin::{AdminRequest, HashAt, ReadLog, ScanRows, Status, StatusReply, admin_request::Op},
    limits::SCAN_BYTES_MAX,
    mutants::{self, Mutant},
    session::Role,
};
use clutch_registry::Registry;
use clutch_runtime::Disk;
use clutch_shard::Shard;
use clutch_state::{Applier, Fault, Machine, StateHash, Store};
use clutch_state_rocks::{RocksStore, SharedMemory};

use crate::stores::RocksStores;

/// An applier of whatever machine a log is for.
pub trait Replayer: Send {
    /// Applies one batch.
    fn apply(&mut self, batch: &Batch) -> Result<(), Fault>;
    /// The last position applied.
    fn position(&self) -> Position;
    /// The time of the last entry.
    fn time(&self) -> Time;
    /// The hash of the state.
    fn hash(&self) -> StateHash;
}

impl<M: Machine> Replayer for Applier<M> {
    fn apply(&mut self, batch: &Batch) -> Result<(), Fault> {
        Applier::apply(self, batch).map(drop)
    }

    fn position(&self) -> Position {
        Applier::position(self)
    }

    fn time(&self) -> Time {
        Applier::time(self)
    }

    fn hash(&self) -> StateHash {
        Applier::hash(self)
    }
}

/// Opens a store for the machine of a log.
pub fn replayer(id: LogId, store: Arc<dyn Store>) -> Result<Box<dyn Replayer>, Fault> {
    Ok(match id.role {
        1 => Box::new(Applier::<Registry>::open(store)?),
        2 => Box::new(Applier::<Cdc>::open(store)?),
        _ => Box::new(Applier::<Shard>::open(store)?),
    })
}

/// What a replay did.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The checkpoint that it began from; 0 for the beginning of the log.
    pub from_checkpoint: u64,
    /// Batches applied.
    pub batches: u64,
    /// Entries applied.
    pub entries: u64,
    /// Those of the last batch among them.
    pub last_entries: usize,
    /// The cut went through a batch: no replica ever stood exactly there.
    pub cut_inside_batch: bool,
    /// It ended because the log does, not because of what it was asked.
    pub reached_end: bool,
    /// Where it ended.
    pub position: u64,
    /// The time of the last entry.
    pub time: u64,
    /// The hash at the end.
    pub hash: String,
    /// What it was compared with: position and hash; none where there was nothing to compare with.
    pub compared: Option<(u64, String)>,
    /// Whether the hashes are equal; false as long as nothing was compared.
    pub verified: bool,
}

/// How far to replay.
#[derive(Clone, Copy, Debug, Default)]
pub struct Until {
    /// The last position to apply.
    pub position: Option<u64>,
    /// The last time to apply, in nanoseconds.
    pub time: Option<u64>,
}

impl Until {
    /// Refuses a position before the place from which there is something to apply, or behind the log's end.
    fn check(&self, id: LogId, from_checkpoint: u64, last: u64) -> Result<()> {
        let Some(position) = self.position else { return Ok(()) };
        ensure!(position > 0, "position 0 lies before the beginning: positions count from 1");
        ensure!(
            position >= from_checkpoint,
            "position {position} of {id} was trimmed: what is kept begins with the checkpoint at {from_checkpoint}"
        );
        ensure!(position <= last, "position {position} of {id} lies behind the log's end, which is {last}");
        Ok(())
    }

    /// Refuses a time before the first entry that could be applied.
    fn check_began(&self, id: LogId, report: &Report) -> Result<()> {
        let Some(time) = self.time else { return Ok(()) };
        ensure!(
            report.batches > 0 || report.from_checkpoint > 0 && report.time <= time,
            "time {time} lies before {}",
            match report.from_checkpoint {
                0 => format!("the first entry of {id}"),
                at => format!(
                    "the checkpoint of {id} at {at}, which is the oldest that is kept (its time is {})",
                    report.time
                ),
            }
        );
        Ok(())
    }

    fn includes(&self, position: u64) -> bool {
        self.position.is_none_or(|last| position <= last)
    }

    /// How many of a batch's entries belong to the cut: apply fixes each one's time as `max(stamp, last + 1)`.
    fn includes_entries(&self, entries: &[Bytes], mut time: u64) -> usize {
        use prost::Message as _;
        let Some(last) = self.time else { return entries.len() };
        let mut within = 0;
        for bytes in entries {
            let stamp = clutch_proto::state::Entry::decode(bytes.clone()).map_or(0, |e| e.stamp);
            time = stamp.max(time.saturating_add(1));
            if time > last {
                break;
            }
            within += 1;
        }
        within
    }
}

fn role(id: LogId) -> Role {
    match id.role {
        1 => Role::Registry,
        2 => Role::Cdc,
        _ => Role::Shard,
    }
}

async fn status(client: &Client, id: LogId) -> Result<StatusReply> {
    let reply =
        client.admin(role(id), id.number, AdminRequest { op: Some(Op::Status(Status::default())) }).await?;
    reply.status.context("an answer without a status")
}

/// Replays a log of a running cluster into `store` and compares with the live replica.
pub async fn from_cluster(
    client: &Client,
    id: LogId,
    store: Arc<dyn Store>,
    until: Until,
    from_checkpoint: Option<u64>,
    progress: &mut (dyn FnMut(u64, u64) + Send),
) -> Result<Report> {
    let live = status(client, id).await?;
    let from_checkpoint = begin_at(id, from_checkpoint, &live.checkpoints, live.log_first)?;
    let mut report = Report { from_checkpoint, ..Report::default() };
    until.check(id, report.from_checkpoint, live.log_last)?;
    if report.from_checkpoint > 0 {
        load_checkpoint(client, id, report.from_checkpoint, &*store).await?;
    }
    let mut replayer = replayer(id, store)?;
    let mut from = replayer.position().0 + 1;
    // The log grows while it is read: the end is where it stood at the beginning.
    let last = live.log_last;
    report.reached_end = true;
    'read: while from <= last {
        let op = Op::ReadLog(ReadLog { from, limit_bytes: SCAN_BYTES_MAX as u32 });
        let reply = client.admin(role(id), id.number, AdminRequest { op: Some(op) }).await?;
        let page = reply.log.context("an answer without log")?;
        if page.next <= from {
            break;
        }
        for batch in page.batches {
            if batch.position > last
                || !until.includes(batch.position)
                || !apply(&mut *replayer, &mut report, until, Position(batch.position), batch.entries)?
            {
                report.reached_end = batch.position > last;
                break 'read;
            }
        }
        from = page.next;
        progress(from.min(last), last);
    }
    finish(&*replayer, &mut report);
    until.check_began(id, &report)?;
    let op = Op::HashAt(HashAt { position: report.position });
    let live =
        client.admin(role(id), id.number, AdminRequest { op: Some(op) }).await?.hash.unwrap_or_default();
    if let Some(hash) = StateHash::from_bytes(&live.hash).filter(|_| !report.cut_inside_batch) {
        report.compared = Some((report.position, hash.to_string()));
        report.verified = hash == replayer.hash() || mutants::is(Mutant::ReplayAlwaysEqual);
    }
    Ok(report)
}

/// The checkpoint to begin from: the one that was asked for, or the oldest that the log goes on from where its beginning was
/// trimmed; 0 for the beginning of the log.
fn begin_at(id: LogId, asked: Option<u64>, checkpoints: &[u64], log_first: u64) -> Result<u64> {
    let covers = |position: &u64| position + 1 >= log_first;
    match asked {
        Some(asked) if checkpoints.contains(&asked) => {
            ensure!(
                covers(&asked),
                "{id}: the log begins at {log_first}, behind the checkpoint at {asked}; begin from a later one"
            );
            Ok(asked)
        }
        Some(asked) => bail!("{id}: there is no checkpoint at {asked} (see `clutch log checkpoint ls`)"),
        None if log_first <= 1 => Ok(0),
        None => checkpoints.iter().copied().filter(covers).min().with_context(|| {
            format!("{id}: the log begins at {log_first} and no checkpoint covers what was trimmed")
        }),
    }
}

async fn load_checkpoint(client: &Client, id: LogId, checkpoint: u64, store: &dyn Store) -> Result<()> {
    let mut scan = ScanRows {
        snapshot: 0,
        after: Bytes::new(),
        limit_bytes: SCAN_BYTES_MAX as u32,
        checkpoint,
        until: Bytes::new(),
    };
    loop {
        let request = AdminRequest { op: Some(Op::ScanRows(scan.clone())) };
        let page =
            client.admin(role(id), id.number, request).await?.scan.context("an answer without rows")?;
        scan.snapshot = page.snapshot;
        if let Some(row) = page.rows.last() {
            scan.after = row.key.clone();
        }
        store.write(page.rows.into_iter().map(|row| (row.key[..].into(), Some(row.value))).collect())?;
        if page.last {
            return Ok(());
        }
    }
}

/// Applies what of a batch belongs to the cut; false when the cut is reached.
fn apply(
    replayer: &mut dyn Replayer,
    report: &mut Report,
    until: Until,
    position: Position,
    mut entries: Vec<Bytes>,
) -> Result<bool> {
    let (all, within) = (entries.len(), until.includes_entries(&entries, replayer.time().0));
    if within == 0 {
        return Ok(false);
    }
    entries.truncate(within);
    report.batches += 1;
    report.entries += within as u64;
    report.last_entries = within;
    report.cut_inside_batch |= within < all;
    let batch = Batch { position, epoch: Epoch(0), entries };
    replayer.apply(&batch).with_context(|| format!("apply position {position}"))?;
    Ok(within == all)
}

fn finish(replayer: &dyn Replayer, report: &mut Report) {
    report.position = replayer.position().0;
    report.time = replayer.time().0;
    report.hash = replayer.hash().to_string();
}

/// Where the logs and the states of a cluster are; they may lie apart.
#[derive(Clone, Debug)]
pub struct Places {
    /// Segments of all logs.
    pub log: PathBuf,
    /// States and checkpoints.
    pub state: PathBuf,
}

impl Places {
    /// Those of a directory of `up`.
    pub fn of(dir: &Path) -> Places {
        Places { log: dir.join("log"), state: dir.join("state") }
    }
}

/// Replays a log from files into `store` and compares with the replica's state there.
pub fn from_directory(
    disk: &dyn Disk,
    places: &Places,
    id: LogId,
    store: Arc<dyn Store>,
    until: Until,
    from_checkpoint: Option<u64>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Report> {
    let (log_dir, state_dir) = (&*places.log, &*places.state);
    let summary = open_read_only(disk, log_dir)?;
    let memory = SharedMemory::new(16 << 20, 16 << 20);
    let mut report = Report { reached_end: true, ..Report::default() };
    // Only to compare with: a state that is broken does not keep its log from being replayed.
    let live = live_state(state_dir, id, &memory).unwrap_or_else(|error| {
        tracing::warn!("not compared: {error:#}; the next start builds the state anew");
        None
    });
    let trimmed = summary.before.get(&id.into()).map_or(0, |position| position.0);
    let kept = RocksStores::checkpoint_positions(state_dir, id)?;
    report.from_checkpoint = begin_at(id, from_checkpoint, &kept, trimmed + 1)?;
    if report.from_checkpoint > 0 {
        let path = RocksStores::checkpoints_of(state_dir, id).join(format!("{:020}", report.from_checkpoint));
        let copy = RocksStore::open_read_only(&path, &memory)?;
        copy_rows(&copy, &*store)?;
    }
    // Only the end of the log is not known before it was read.
    until.check(id, report.from_checkpoint, u64::MAX)?;
    let mut replayer = replayer(id, store)?;
    let mut compared = None;
    let compare = |replayer: &dyn Replayer, compared: &mut Option<(u64, StateHash, StateHash)>, next: u64| {
        // The live state may have skipped records of the engine after its last batch.
        if let Some((position, hash)) = live
            && compared.is_none()
            && replayer.position().0 <= position
            && next > position
        {
            *compared = Some((position, hash, replayer.hash()));
        }
    };
    let total = summary.segments.len() as u64;
    let mut continuity = Continuity::default();
    let mut cluster = None;
    'segments: for (done, number) in summary.segments.iter().enumerate() {
        let mut reader = match SegmentReader::open(disk, log_dir, *number) {
            Ok(reader) => reader,
            Err(LogFault::Corrupt { .. }) if *number > summary.synced.0 => break,
            Err(fault) => return Err(fault.into()),
        };
        ensure!(
            *cluster.get_or_insert(reader.cluster()) == reader.cluster(),
            "segment {number:016x} belongs to another cluster than those before it; restore the right one"
        );
        loop {
            let at = (*number, reader.offset());
            let record = match reader.next_record() {
                Ok(Some(record)) => record,
                Ok(None) if *number == summary.synced.0 && at < summary.synced => {
                    bail!("segment {number:016x} ends at {}, but more was synced: it was cut short", at.1)
                }
                Ok(None) => break,
                // What was never synced was never acknowledged.
                Err(LogFault::Corrupt { .. }) if at >= summary.synced => break 'segments,
                Err(fault) => return Err(fault.into()),
            };
            let followed = match record.kind {
                RecordKind::Groups => continuity.begin(*number, &record),
                RecordKind::Batch | RecordKind::Epoch | RecordKind::Seal => continuity.record(&record, at.1),
                kind => bail!("{}: a record of kind {kind:?}, which is not replayed yet", record.group),
            };
            match followed {
                Ok(()) => {}
                Err(_) if at >= summary.synced => break 'segments,
                Err(fault) => return Err(fault.into()),
            }
            let is_wanted = record.kind == RecordKind::Batch && record.group.log == id;
            if !is_wanted || record.position <= replayer.position() {
                continue;
            }
            compare(&*replayer, &mut compared, record.position.0);
            if !until.includes(record.position.0)
                || !apply(&mut *replayer, &mut report, until, record.position, record.entries)?
            {
                report.reached_end = false;
                break 'segments;
            }
        }
        progress(done as u64 + 1, total);
    }
    if until.position.is_none() && until.time.is_none() {
        compare(&*replayer, &mut compared, u64::MAX);
    }
    finish(&*replayer, &mut report);
    if report.reached_end {
        until.check(id, report.from_checkpoint, continuity.last(id).map_or(0, |last| last.0))?;
    }
    until.check_began(id, &report)?;
    if let Some((position, theirs, ours)) = compared {
        report.compared = Some((position, theirs.to_string()));
        report.verified = theirs == ours || mutants::is(Mutant::ReplayAlwaysEqual);
    }
    Ok(report)
}

/// Where a replica's flushed state stands; `None` when nothing was flushed yet.
fn live_state(state_dir: &Path, id: LogId, memory: &SharedMemory) -> Result<Option<(u64, StateHash)>> {
    let path = RocksStores::database(state_dir, id);
    if !path.exists() {
        return Ok(None);
    }
    let store =
        RocksStore::open_read_only(&path, memory).with_context(|| format!("open the state of {id}"))?;
    let state = replayer(id, Arc::new(store))?;
    Ok((state.position().0 > 0).then(|| (state.position().0, state.hash())))
}

fn copy_rows(from: &RocksStore, to: &dyn Store) -> Result<()> {
    use clutch_state::{Table, View as _};
    for table in 0..=255u8 {
        let table = Table(table);
        let mut start: Vec<u8> = Vec::new();
        loop {
            let rows = from.scan(table, &start, &[], table.page_rows())?;
            let Some((last, _)) = rows.last() else { break };
            start = [last, &[0][..]].concat();
            to.write(rows.into_iter().map(|(key, value)| (table.stored_key(&key), Some(value))).collect())?;
        }
    }
    Ok(())
}
