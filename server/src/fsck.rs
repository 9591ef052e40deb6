//! Checks all metadata of a running cluster against the invariants.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use clutch_client::Client;
use clutch_proto::{
    admin::{AdminRequest, Rescan, ScanRows, admin_request::Op},
    cdc::{ListTransactions, cdc_request},
    limits::SCAN_BYTES_MAX,
    session::Role,
};
use clutch_shard::invariants;
use clutch_state::{MemoryStore, Store as _, applier};

/// Rounds that must agree before something is called wrong: what moves between two of them is no fault.
const ROUNDS: usize = 3;
/// Rounds that are tried in all, with those that met the CDC at work.
const ROUNDS_MAX: usize = 8;

/// What was found.
#[derive(Clone, Debug, Default)]
pub struct Checked {
    /// What is wrong; empty when all is well.
    pub violations: BTreeSet<String>,
    /// Rows of the shards.
    pub rows: u64,
    /// What the shards hold.
    pub counts: Counts,
    /// Whether what spans shards was checked, too; it cannot be while the CDC is at work.
    pub across: bool,
}

/// How much of everything there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Counts {
    /// Inodes, the root and removed directories among them.
    pub inodes: u64,
    /// Current entries of directories.
    pub edges: u64,
    /// Past entries, as far as they are kept.
    pub past_edges: u64,
    /// Contents: present, past, unpublished.
    pub contents: u64,
    /// Spans, dead ones among them.
    pub spans: u64,
    /// Blocks that the metadata knows.
    pub blocks: u64,
}

impl Counts {
    fn add(&mut self, facts: &invariants::Facts) {
        self.inodes += facts.inodes.len() as u64;
        self.edges += facts.edges.len() as u64;
        self.past_edges += facts.past_edges;
        self.contents += facts.contents;
        self.spans += facts.spans;
        self.blocks += facts.blocks.len() as u64;
    }
}

/// Checks all shards, each at one moment of its own, and what spans them.
pub async fn check(client: &Client, progress: &mut (dyn FnMut(u64, u64) + Send)) -> Result<Checked> {
    let map = client.refresh_map().await?;
    let shards: Vec<u32> = map.shards.iter().map(|s| s.shard).collect();
    let slots: u32 = map.shards.iter().map(|s| s.slot_last - s.slot_first + 1).sum();
    let mut result: Option<Checked> = None;
    let mut agreeing = 0;
    for number in 0..ROUNDS_MAX {
        if number > 0 {
            client.runtime().clock.sleep(Duration::from_millis(300)).await;
        }
        let round = round(client, &shards, progress).await?;
        if !round.across {
            // Rounds that could not look at everything neither confirm nor clear anything.
            result.get_or_insert(round);
            continue;
        }
        agreeing += 1;
        match &mut result {
            Some(before) if before.across => {
                before.counts = round.counts;
                before.violations.retain(|violation| round.violations.contains(violation))
            }
            other => *other = Some(round),
        }
        if agreeing >= ROUNDS || result.as_ref().is_some_and(|r| r.violations.is_empty()) {
            break;
        }
    }
    let mut result = result.unwrap_or_default();
    if slots != 256 {
        result.violations.insert(format!("the registry knows shards for {slots} of 256 slots"));
    }
    if !result.across {
        let text = "what spans shards was not checked: transactions were in flight all the time (see the CDC's list)";
        result.violations.insert(text.into());
    }
    Ok(result)
}

async fn in_flight(client: &Client) -> Result<usize> {
    let reply = client.cdc(cdc_request::Op::ListTransactions(ListTransactions {})).await?;
    Ok(reply.transactions.len())
}

async fn round(
    client: &Client,
    shards: &[u32],
    progress: &mut (dyn FnMut(u64, u64) + Send),
) -> Result<Checked> {
    // Between two moments at which nothing is in flight much may happen; the rounds sort that out.
    let mut was_idle = false;
    for _ in 0..50 {
        was_idle = in_flight(client).await? == 0;
        if was_idle {
            break;
        }
        client.runtime().clock.sleep(Duration::from_millis(100)).await;
    }
    let mut checked = Checked::default();
    let mut facts = Vec::new();
    for (done, shard) in shards.iter().enumerate() {
        let store = copy(client, *shard).await?;
        checked.rows += store.len() as u64;
        let work = client.runtime().blocking(move || {
            let hashes = applier::rescan(&*store)?;
            invariants::check_shard(&*store).map(|(wrong, facts)| (wrong, facts, hashes))
        });
        let (wrong, of_shard, hashes) = work
            .await
            .context("the check did not finish")?
            .with_context(|| format!("check shard {shard}"))?;
        checked
            .violations
            .extend(wrong.into_iter().chain(hashes.differences).map(|w| format!("shard {shard}: {w}")));
        checked.counts.add(&of_shard);
        facts.push(of_shard);
        progress(done as u64 + 1, shards.len() as u64);
    }
    let across = invariants::check_cluster(&facts);
    if was_idle && in_flight(client).await? == 0 {
        checked.violations.extend(across);
        checked.across = true;
    }
    Ok(checked)
}

/// All rows of one moment of a shard.
async fn copy(client: &Client, shard: u32) -> Result<Arc<MemoryStore>> {
    let store = MemoryStore::new();
    let mut scan =
        ScanRows { snapshot: 0, after: Bytes::new(), limit_bytes: SCAN_BYTES_MAX as u32, checkpoint: 0 };
    loop {
        let reply =
            client.admin(Role::Shard, shard, AdminRequest { op: Some(Op::ScanRows(scan.clone())) }).await?;
        let page = reply.scan.context("an answer without rows")?;
        scan.snapshot = page.snapshot;
        if let Some(row) = page.rows.last() {
            scan.after = row.key.clone();
        }
        store.write(page.rows.into_iter().map(|row| (row.key[..].into(), Some(row.value))).collect())?;
        if page.last {
            return Ok(Arc::new(store));
        }
    }
}

/// Lets every replica read all its rows from disk and compare with the stored hashes.
pub async fn rescan(client: &Client) -> Result<Checked> {
    let map = client.refresh_map().await?;
    let mut all = vec![(Role::Registry, 0, "registry".to_owned()), (Role::Cdc, 0, "cdc".to_owned())];
    all.extend(map.shards.iter().map(|s| (Role::Shard, s.shard, format!("shard {}", s.shard))));
    let mut checked = Checked::default();
    for (role, number, name) in all {
        match client.admin(role, number, AdminRequest { op: Some(Op::Rescan(Rescan {})) }).await {
            Ok(reply) => {
                let rescan = reply.rescan.context("an answer without a rescan")?;
                checked.rows += rescan.rows;
                checked.violations.extend(rescan.differences.into_iter().map(|d| format!("{name}: {d}")));
            }
            // A row that cannot be read any more is a finding, not a failure of the check.
            Err(error) => {
                checked.violations.insert(format!("{name}: {error}"));
            }
        }
    }
    Ok(checked)
}
