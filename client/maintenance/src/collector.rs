//! Gives space back: goes through all slots and proposes what their policies let go.
//!
//! In this order, so that one pass gets everything that can go: past edges (and files with them), removed directories,
//! past contents, expired contents, blocks of dead spans. The shards decide; whoever stops half-way leaves nothing
//! that the next pass does not find. Any number may run at the same time.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use bytes::Bytes;
use clutch_client::{Client, ClientError};
use clutch_proto::{
    ContentId, InodeId, Time,
    shard::{PastContent, PastEdge},
    types::{Attributes, Code, SnapshotPolicy},
};
use futures_util::stream::{FuturesUnordered, StreamExt as _};

/// How a pass goes.
#[derive(Clone, Copy, Debug)]
pub struct CollectOptions {
    /// Requests in a second at most, so that users come first; 0 for no limit.
    pub requests_per_s: u32,
    /// Requests that are on their way at a time.
    pub concurrency: usize,
    /// Proposes contents that have not expired by this clock, too. Only tests of the shards do that.
    pub eager: bool,
}

impl Default for CollectOptions {
    fn default() -> CollectOptions {
        CollectOptions { requests_per_s: 0, concurrency: 16, eager: false }
    }
}

/// What a pass did.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Collected {
    /// Past edges that were forgotten.
    pub past_edges: u64,
    /// Files and links among them whose last owner that was.
    pub files: u64,
    /// Removed directories that were forgotten.
    pub directories: u64,
    /// Past contents that were forgotten.
    pub past_contents: u64,
    /// Contents that were taken apart.
    pub contents: u64,
    /// Spans whose blocks were erased.
    pub spans: u64,
    /// Blocks of those.
    pub blocks: u64,
    /// Dead spans that must wait until no write of their blocks can come any more.
    pub too_early: u64,
    /// What could not be done, a sentence each; the next pass tries it again.
    pub failures: Vec<String>,
}

/// Sentences of failures that are kept.
const FAILURES_MAX: usize = 20;

impl Collected {
    fn failed(&mut self, what: &str, error: &ClientError) {
        if self.failures.len() < FAILURES_MAX {
            self.failures.push(format!("{what}: {error}"));
        }
    }

    /// Counts one proposal. What changed since it was looked at is no failure.
    fn count(&mut self, what: &str, result: Result<(), ClientError>) -> bool {
        match result {
            Ok(()) => true,
            Err(error) => {
                let moved_on = matches!(
                    error.code(),
                    Some(Code::NotFound | Code::Stale | Code::TooEarly | Code::NotEmpty)
                );
                if !moved_on {
                    self.failed(what, &error);
                }
                false
            }
        }
    }
}

/// Paces requests: what was not sent in time is not made up for.
struct Pace {
    client: Client,
    options: CollectOptions,
    due: Duration,
}

impl Pace {
    async fn next(&mut self) {
        if self.options.requests_per_s > 0 {
            let clock = &self.client.runtime().clock;
            let now = clock.monotonic();
            if self.due > now {
                clock.sleep(self.due - now).await;
            }
            self.due = self.due.max(now) + Duration::from_secs(1) / self.options.requests_per_s;
        }
    }
}

/// One pass over the whole cluster.
pub async fn collect(client: &Client, options: CollectOptions) -> Result<Collected, ClientError> {
    client.refresh_map().await?;
    let mut pace = Pace { client: client.clone(), options, due: client.runtime().clock.monotonic() };
    let mut done = Collected::default();
    // One that fails does not hold up the others.
    if let Err(error) = directories(&mut pace, &mut done).await {
        done.failed("visit directories", &error);
    }
    if let Err(error) = past_contents(&mut pace, &mut done).await {
        done.failed("visit past contents", &error);
    }
    if let Err(error) = transients(&mut pace, &mut done).await {
        done.failed("visit unpublished contents", &error);
    }
    if let Err(error) = dead_spans(&mut pace, &mut done).await {
        done.failed("visit dead spans", &error);
    }
    Ok(done)
}

/// So many versions are forgotten by a policy before it is read again.
const FORGET_AT_ONCE: usize = 64;

/// Runs one future for each item, some at a time, each paced; calls `each` with what came of them.
async fn for_all<T, F>(
    pace: &mut Pace,
    items: Vec<T>,
    run: impl Fn(Client, T) -> F,
    mut each: impl FnMut(F::Output),
) where
    F: Future,
{
    let mut running = FuturesUnordered::new();
    for item in items {
        if running.len() >= pace.options.concurrency.max(1)
            && let Some(output) = running.next().await
        {
            each(output);
        }
        pace.next().await;
        running.push(run(pace.client.clone(), item));
    }
    while let Some(output) = running.next().await {
        each(output);
    }
}

/// Whether a policy seems to let something go; the shard has the last word.
fn may_go(policy: &SnapshotPolicy, now: Time, ended_at: u64, newer: usize) -> bool {
    policy.age_ms.is_some_and(|age| now >= Time(ended_at).plus_ms(age))
        || policy.versions.is_some_and(|versions| newer >= versions as usize)
}

fn now_of(client: &Client) -> Time {
    client.cluster_time()
}

async fn directories(pace: &mut Pace, done: &mut Collected) -> Result<(), ClientError> {
    /// The kind of inodes that are directories.
    const DIRECTORIES: u32 = 1;
    let mut after = Bytes::new();
    loop {
        pace.next().await;
        let (inodes, next) = pace.client.visit_inodes(DIRECTORIES, after).await?;
        for attributes in inodes {
            if let Some(dir) = InodeId::from_wire(attributes.id).filter(|id| id.is_directory())
                && let Err(error) = directory(pace, dir, &attributes, done).await
                && !error.is_not_found()
            {
                done.failed(&format!("directory {dir}"), &error);
            }
        }
        if next.is_empty() {
            return Ok(());
        }
        after = next;
    }
}

/// Whole groups at the beginning of what was read, a page at a time: what belongs together is looked at together, and a page
/// may end within a group. What remains waits for the next page, unless there is none.
fn whole_groups<T, K: PartialEq>(all: &mut Vec<T>, key: impl Fn(&T) -> K, has_next: bool) -> Vec<T> {
    let whole = match all.last().filter(|_| has_next).map(&key) {
        Some(last) => all.iter().rposition(|item| key(item) != last).map_or(0, |at| at + 1),
        None => all.len(),
    };
    all.drain(..whole).collect()
}

async fn directory(
    pace: &mut Pace,
    dir: InodeId,
    attributes: &Attributes,
    done: &mut Collected,
) -> Result<(), ClientError> {
    let now = now_of(&pace.client);
    let (mut all, mut after) = (Vec::new(), Bytes::new());
    let (mut total, mut forgotten) = (0, 0);
    loop {
        pace.next().await;
        let (page, next) = pace.client.history_page(dir, None, after).await?;
        all.extend(page);
        let past = whole_groups(&mut all, |edge: &PastEdge| edge.name.clone(), !next.is_empty());
        total += past.len() as u64;
        forgotten += past_edges(pace, dir, past, now, done).await?;
        if next.is_empty() {
            break;
        }
        after = next;
    }
    if attributes.parent == 0 && forgotten == total {
        let policy = pace.client.snapshot_policy_now(dir).await?;
        if may_go(&policy, now, attributes.ctime, 0) {
            pace.next().await;
            if done.count("forget a directory", pace.client.forget_directory(dir, policy).await) {
                done.directories += 1;
            }
        }
    }
    Ok(())
}

/// Forgets what may go of whole histories of some names, and says how many past edges that were.
async fn past_edges(
    pace: &mut Pace,
    dir: InodeId,
    past: Vec<PastEdge>,
    now: Time,
    done: &mut Collected,
) -> Result<u64, ClientError> {
    let client = pace.client.clone();
    let mut policy = client.snapshot_policy(dir).await?;
    let mut doomed = doomed_of(&past, &policy, now);
    if !doomed.is_empty() {
        // What was remembered decides what is looked at, but only what holds now, read after the history, lets go.
        policy = client.snapshot_policy_now(dir).await?;
        doomed = doomed_of(&past, &policy, now);
    }
    let mut forgotten = 0;
    while !doomed.is_empty() {
        let rest = doomed.split_off(doomed.len().min(FORGET_AT_ONCE));
        let forget = |client: Client, edge: PastEdge| async move {
            let result = client.forget_edge(dir, &edge, policy).await;
            (edge.owned, result)
        };
        for_all(pace, std::mem::take(&mut doomed), forget, |(owned, result)| {
            if done.count("forget a past edge", result) {
                forgotten += 1;
                done.past_edges += 1;
                done.files += u64::from(owned);
            }
        })
        .await;
        if !rest.is_empty() {
            // It may have been replaced meanwhile. What is newer than what was forgotten counts as before.
            let fresh = client.snapshot_policy_now(dir).await?;
            doomed = rest;
            if fresh != policy {
                policy = fresh;
                let again = doomed_of(&past, &policy, now);
                let again: BTreeSet<(Bytes, u64)> = again.into_iter().map(|e| (e.name, e.ended_at)).collect();
                doomed.retain(|edge| again.contains(&(edge.name.clone(), edge.ended_at)));
            }
        }
    }
    Ok(forgotten)
}

/// Past edges that a policy seems to let go, oldest first, so that what is newer still counts.
fn doomed_of(past: &[PastEdge], policy: &SnapshotPolicy, now: Time) -> Vec<PastEdge> {
    let mut newer: BTreeMap<Bytes, usize> = BTreeMap::new();
    let mut doomed = Vec::new();
    for edge in past.iter().rev() {
        let count = newer.entry(edge.name.clone()).or_default();
        if may_go(policy, now, edge.ended_at, *count) {
            doomed.push(edge.clone());
        }
        *count += 1;
    }
    doomed.reverse();
    doomed
}

async fn past_contents(pace: &mut Pace, done: &mut Collected) -> Result<(), ClientError> {
    let mut all: Vec<PastContent> = Vec::new();
    let mut after = Bytes::new();
    loop {
        pace.next().await;
        let (page, next) = pace.client.visit_past_contents(after).await?;
        all.extend(page);
        let part = whole_groups(&mut all, |past: &PastContent| past.file, !next.is_empty());
        forget_past_contents(pace, part, done).await?;
        if next.is_empty() {
            return Ok(());
        }
        after = next;
    }
}

/// A directory's policy, as remembered or as it is now. One that is gone for good has that of the root.
async fn policy_of(client: &Client, dir: InodeId, now: bool) -> Result<SnapshotPolicy, ClientError> {
    let of = |dir: InodeId| async move {
        if now { client.snapshot_policy_now(dir).await } else { client.snapshot_policy(dir).await }
    };
    match of(dir).await {
        Err(error) if error.is_not_found() => of(InodeId::ROOT).await,
        found => found,
    }
}

/// Whose policy says how long a past content is kept.
fn directory_of(past: &PastContent) -> InodeId {
    InodeId::from_wire(past.dir).filter(|dir| dir.is_directory()).unwrap_or(InodeId::ROOT)
}

async fn forget_past_contents(
    pace: &mut Pace,
    past: Vec<PastContent>,
    done: &mut Collected,
) -> Result<(), ClientError> {
    let now = now_of(&pace.client);
    let mut doomed = Vec::new();
    let mut newer: BTreeMap<u64, usize> = BTreeMap::new();
    // All of these were read before: a policy is asked for once.
    let mut fresh: BTreeMap<InodeId, SnapshotPolicy> = BTreeMap::new();
    for past in past.into_iter().rev() {
        let dir = directory_of(&past);
        let count = newer.entry(past.file).or_default();
        if may_go(&policy_of(&pace.client, dir, false).await?, now, past.ended_at, *count) {
            let policy = match fresh.get(&dir) {
                Some(policy) => *policy,
                None => {
                    let policy = policy_of(&pace.client, dir, true).await?;
                    fresh.insert(dir, policy);
                    policy
                }
            };
            if may_go(&policy, now, past.ended_at, *count) {
                doomed.push((past, policy));
            }
        }
        *count += 1;
    }
    doomed.reverse();
    while !doomed.is_empty() {
        let rest = doomed.split_off(doomed.len().min(FORGET_AT_ONCE));
        let forget = |client: Client, (past, policy): (PastContent, SnapshotPolicy)| async move {
            client.forget_content(&past, policy).await
        };
        for_all(pace, std::mem::take(&mut doomed), forget, |result| {
            done.past_contents += u64::from(done.count("forget a past content", result));
        })
        .await;
        // Policies may have been replaced meanwhile.
        fresh.clear();
        for (past, _) in rest {
            let dir = directory_of(&past);
            let policy = match fresh.get(&dir) {
                Some(policy) => *policy,
                None => policy_of(&pace.client, dir, true).await?,
            };
            fresh.insert(dir, policy);
            // The shard counts what is newer.
            doomed.push((past, policy));
        }
    }
    Ok(())
}

async fn transients(pace: &mut Pace, done: &mut Collected) -> Result<(), ClientError> {
    let mut after = Bytes::new();
    loop {
        pace.next().await;
        let (page, next) = pace.client.visit_transients(after).await?;
        let now = now_of(&pace.client);
        let eager = pace.options.eager;
        let expired: Vec<ContentId> =
            page.iter().filter(|t| now.0 > t.deadline || eager).map(|t| ContentId(t.content)).collect();
        let run = |client: Client, content| async move { client.collect_content(content).await.map(drop) };
        for_all(pace, expired, run, |result| {
            done.contents += u64::from(done.count("take a content apart", result));
        })
        .await;
        if next.is_empty() {
            return Ok(());
        }
        after = next;
    }
}

async fn dead_spans(pace: &mut Pace, done: &mut Collected) -> Result<(), ClientError> {
    let mut after = Bytes::new();
    loop {
        pace.next().await;
        let (spans, next) = pace.client.visit_dead_spans(after).await?;
        // Before its grants end nobody erases anything of a span.
        let now = now_of(&pace.client).0;
        let (spans, waiting): (Vec<_>, Vec<_>) = spans.into_iter().partition(|s| s.granted_until <= now);
        done.too_early += waiting.len() as u64;
        let run = |client: Client, span: clutch_proto::types::Span| async move {
            (span.blocks.len() as u64, client.remove_span(&span).await)
        };
        for_all(pace, spans, run, |(blocks, result)| {
            if result.as_ref().is_err_and(|e| e.code() == Some(Code::TooEarly)) {
                done.too_early += 1;
            } else if done.count("remove a span", result) {
                done.spans += 1;
                done.blocks += blocks;
            }
        })
        .await;
        if next.is_empty() {
            return Ok(());
        }
        after = next;
    }
}

/// Collects again and again, until the task ends. `pause` lies between two passes.
pub async fn run(client: Client, options: CollectOptions, pause: Duration) {
    let clock = client.runtime().clock.clone();
    loop {
        clock.sleep(pause).await;
        pass(&client, &options).await;
    }
}

/// Collects once, and logs what came of it.
pub async fn pass(client: &Client, options: &CollectOptions) {
    match collect(client, *options).await {
        Ok(done) if done.failures.is_empty() => tracing::debug!(?done, "collected"),
        Ok(done) => tracing::warn!(failures = ?done.failures, "collected, but for some"),
        Err(error) => tracing::warn!(%error, "collect"),
    }
}
