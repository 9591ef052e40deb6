//! `clutch fsck`: reads all metadata rows of one moment of each replica and checks the invariants.

use std::{collections::BTreeSet, process::ExitCode, sync::Arc, time::Duration};

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
use serde_json::json;

use crate::{args::FsckArgs, commands::status, output};

/// Checks of the whole that must agree before something is called wrong: what moves between two is no fault.
const ROUNDS: usize = 3;

pub(crate) async fn run(client: &Client, args: &FsckArgs) -> Result<ExitCode> {
    let mut violations: BTreeSet<String> = BTreeSet::new();
    let (map, replicas) = status::all(client).await?;
    for replica in &replicas {
        match &replica.status {
            Ok(status) if !status.fault.is_empty() => {
                drop(violations.insert(format!("{}: {}", replica.name, status.fault)))
            }
            Ok(_) => {}
            Err(error) => drop(violations.insert(format!("{}: {error}", replica.name))),
        }
    }
    let shards: Vec<u32> = map.shards.iter().map(|s| s.shard).collect();
    let mut rows = 0;
    if violations.is_empty() {
        let mut persistent: Option<BTreeSet<String>> = None;
        for round in 0..ROUNDS {
            let found = check(client, &shards, &mut rows).await?;
            let both = match persistent {
                None => found,
                Some(before) => before.intersection(&found).cloned().collect(),
            };
            let done = both.is_empty() || round + 1 == ROUNDS;
            persistent = Some(both);
            if done {
                break;
            }
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        violations.extend(persistent.unwrap_or_default());
    }
    let mut rescanned = 0;
    if args.rescan {
        let mut all = vec![(Role::Registry, 0, "registry".to_owned()), (Role::Cdc, 0, "cdc".to_owned())];
        all.extend(shards.iter().map(|n| (Role::Shard, *n, format!("shard {n}"))));
        for (role, number, name) in all {
            let reply = client.admin(role, number, AdminRequest { op: Some(Op::Rescan(Rescan {})) }).await;
            let rescan = match reply {
                Ok(reply) => reply.rescan.context("an answer without a rescan")?,
                // A row that cannot be read any more is a finding, not a failure of the check.
                Err(error) => {
                    violations.insert(format!("{name}: {error}"));
                    continue;
                }
            };
            rescanned += rescan.rows;
            violations.extend(rescan.differences.into_iter().map(|d| format!("{name}: {d}")));
        }
    }
    let clean = violations.is_empty();
    if args.json {
        output::json(
            &json!({ "clean": clean, "violations": violations, "rows": rows, "rescanned_rows": rescanned }),
        )?;
    } else {
        for violation in &violations {
            output::line(violation)?;
        }
        let rescan = if args.rescan { format!(", {rescanned} read again from disk") } else { String::new() };
        output::line(format!("{} ({rows} rows{rescan})", if clean { "clean" } else { "NOT clean" }))?;
    }
    Ok(if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// One round over all shards.
async fn check(client: &Client, shards: &[u32], rows: &mut u64) -> Result<BTreeSet<String>> {
    let in_flight = || async {
        let reply = client.cdc(cdc_request::Op::ListTransactions(ListTransactions {})).await?;
        anyhow::Ok(reply.transactions.len())
    };
    // Between two moments at which nothing is in flight much may happen; the rounds sort that out.
    for _ in 0..50 {
        if in_flight().await? == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let mut found = BTreeSet::new();
    let mut facts = Vec::new();
    *rows = 0;
    let progress = output::bar("fsck: shards", shards.len() as u64);
    for shard in shards {
        let store = copy(client, *shard).await?;
        *rows += store.len() as u64;
        let checked = tokio::task::spawn_blocking(move || {
            let hashes = applier::rescan(&*store)?;
            invariants::check_shard(&*store).map(|(wrong, facts)| (wrong, facts, hashes))
        });
        let (wrong, of_shard, hashes) = checked.await?.with_context(|| format!("check shard {shard}"))?;
        found.extend(wrong.into_iter().chain(hashes.differences).map(|w| format!("shard {shard}: {w}")));
        facts.push(of_shard);
        progress.inc(1);
    }
    progress.finish_and_clear();
    let idle = in_flight().await? == 0;
    let across = invariants::check_cluster(&facts);
    if idle {
        found.extend(across);
    }
    Ok(found)
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
        store.write(page.rows.into_iter().map(|row| (row.key.to_vec(), Some(row.value))).collect())?;
        if page.last {
            return Ok(Arc::new(store));
        }
    }
}
