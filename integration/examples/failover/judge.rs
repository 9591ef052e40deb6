//! What came of it: the logs, held against what clients were told.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use clutch_client::Client;
use clutch_integration::{
    checkers::{self, Evidence},
    recording::Batches,
};
use clutch_log::{LogId, Position};
use clutch_proto::{
    admin::{LogReply, ReadLog, admin_request::Op},
    limits::SCAN_BYTES_MAX,
    log::{Batch, Epoch},
};
use clutch_shard::Pages;

use crate::trial::Trial;

/// When nothing is asked any more members have the same within so long.
const EVEN_WITHIN: Duration = Duration::from_secs(30);

/// What has been read of the logs, from their beginning: it is trimmed while a trial runs.
#[derive(Default)]
pub(crate) struct Archive {
    logs: BTreeMap<LogId, Batches>,
    /// The position behind what has been read of each: not all have a batch.
    next: BTreeMap<LogId, u64>,
}

impl Archive {
    /// The position behind what has been read of a log.
    pub(crate) fn next(&self, log: LogId) -> u64 {
        self.next.get(&log).copied().unwrap_or(1)
    }
}

/// What comes in a log from a position on, from its leader. One that began behind a snapshot does not have what is before; then
/// whoever has it.
async fn page(trial: &Trial, client: &Client, log: LogId, from: u64) -> Result<LogReply> {
    let op = || Op::ReadLog(ReadLog { from, limit_bytes: SCAN_BYTES_MAX as u32 });
    let mut asked = trial.ask(client, log, op()).await;
    for address in &trial.addresses {
        if asked.is_err() {
            asked = trial.ask_at(client, log, address.clone(), op()).await;
        }
    }
    asked?.log.context("an answer without a log")
}

/// Reads on in a log, to its present end.
pub(crate) async fn read_on(trial: &Trial, client: &Client, log: LogId) -> Result<()> {
    let mut from = trial.archive.lock().next(log);
    loop {
        let page = page(trial, client, log, from).await?;
        let mut archive = trial.archive.lock();
        let batches = archive.logs.entry(log).or_default();
        for batch in page.batches {
            let position = Position(batch.position);
            batches.insert(position, Batch { position, epoch: Epoch(0), entries: batch.entries });
        }
        if page.next <= from {
            return Ok(());
        }
        from = page.next;
        archive.next.insert(log, from);
    }
}

/// Prints how long it took, as a histogram and its corners.
fn print(what: &str, mut times: Vec<Duration>) {
    if times.is_empty() {
        return;
    }
    times.sort_unstable();
    let at = |part: f64| times[((times.len() - 1) as f64 * part).round() as usize].as_millis();
    println!("{what}: {} times, p50 {} ms, p99 {} ms, most {} ms", times.len(), at(0.5), at(0.99), at(1.0));
    // Of all logs together; the kinds of logs have their corners alone.
    if what.contains(',') {
        return;
    }
    let mut bins: BTreeMap<u128, usize> = BTreeMap::new();
    for time in &times {
        *bins.entry(time.as_millis() / 200).or_default() += 1;
    }
    for (bin, count) in bins {
        println!("  {:>5} to {:>5} ms  {}", bin * 200, bin * 200 + 199, "#".repeat(count));
    }
}

/// The states of a log's members at one position, or where they stand if they do not come to one: a follower hears with the next
/// heartbeat of what was committed last.
async fn states(trial: &Trial, operator: &Client, log: LogId) -> Result<BTreeSet<(u64, Bytes)>> {
    let begin = Instant::now();
    loop {
        let status = trial.status(operator, log).await?;
        let mut states = BTreeSet::new();
        for member in &status.members {
            let of_member = trial.member(operator, log, &member.address).await?;
            states.insert((of_member.applied_position, of_member.hash));
        }
        let positions: BTreeSet<u64> = states.iter().map(|(position, _)| *position).collect();
        if positions.len() == 1 || begin.elapsed() > EVEN_WITHIN {
            return Ok(states);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Reads all logs and says what is wrong.
pub(crate) async fn judge(
    trial: &Trial,
    operator: &Client,
    times: BTreeMap<String, Vec<Duration>>,
) -> Result<()> {
    let mut wrong: Vec<String> = Vec::new();
    for log in trial.logs() {
        read_on(trial, operator, log).await?;
        let hashes = states(trial, operator, log).await?;
        if hashes.len() != 1 {
            wrong.push(format!("{log}: its members have different states: {hashes:?}"));
        }
    }
    let logs = std::mem::take(&mut trial.archive.lock().logs);
    let records = trial.history.take_records();
    let (count, done) = (records.len(), trial.done.load(Ordering::Relaxed));
    let evidence = Evidence::of(logs, records, trial.shards, Pages::default());
    let violations = evidence.violations.iter().cloned().chain(checkers::check_history(&evidence));
    wrong.extend(violations.map(|violation| format!("{}: {}", violation.checker, violation.what)));
    for (what, times) in times {
        print(&what, times);
    }
    let failed = std::mem::take(&mut *trial.failed.lock());
    println!("{done} operations, {count} requests; {} failed for their users", failed.len());
    for error in failed.iter().take(10) {
        println!("  {error}");
    }
    for what in &wrong {
        println!("VIOLATION {what}");
    }
    ensure!(wrong.is_empty(), "{} violations", wrong.len());
    ensure!(failed.is_empty(), "{} operations failed", failed.len());
    println!("no violations");
    Ok(())
}
