//! Checks all metadata of a running cluster against the invariants.

use std::{
    collections::{BTreeSet, VecDeque},
    time::Duration,
};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use clutch_client::Client;
use clutch_proto::{
    admin::{AdminRequest, Rescan, Row, ScanRows, admin_request::Op},
    cdc::{ListTransactions, cdc_request},
    limits::SCAN_BYTES_MAX,
    mutants::{self, Mutant},
    session::Role,
};
use clutch_shard::{
    invariants::{self, InlineRows},
    tables::{BY_SLOT, INLINE, INLINE_BYTES},
};
use clutch_state::{MemoryStore, Store as _, Table, applier::Rescanner, hash::digest};

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
    let mut rounds = Rounds::default();
    for number in 0..ROUNDS_MAX {
        if number > 0 {
            client.runtime().clock.sleep(Duration::from_millis(300)).await;
        }
        if rounds.take(round(client, &shards, progress).await?) {
            break;
        }
    }
    let mut result = rounds.result.unwrap_or_default();
    if slots != 256 {
        result.violations.insert(format!("the registry knows shards for {slots} of 256 slots"));
    }
    if !result.across {
        let text = "what spans shards was not checked: transactions were in flight all the time (see the CDC's list)";
        result.violations.insert(text.into());
    }
    Ok(result)
}

/// What several rounds found, together.
#[derive(Default)]
struct Rounds {
    result: Option<Checked>,
    /// How many looked at everything.
    whole: usize,
}

impl Rounds {
    /// Takes what one more found; true when that is enough.
    fn take(&mut self, round: Checked) -> bool {
        let was_whole = self.result.as_ref().is_some_and(|before| before.across);
        let is_whole = round.across || was_whole && mutants::is(Mutant::PartialRoundClears);
        if !is_whole {
            // Rounds that could not look at everything neither confirm nor clear anything.
            self.result.get_or_insert(round);
            return false;
        }
        self.whole += 1;
        match &mut self.result {
            Some(before) if was_whole => {
                before.counts = round.counts;
                before.violations.retain(|violation| round.violations.contains(violation));
            }
            other => *other = Some(round),
        }
        self.whole >= ROUNDS || self.result.as_ref().is_some_and(|r| r.violations.is_empty())
    }
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
        let of_shard = shard_facts(client, *shard, &mut checked).await;
        facts.push(of_shard.with_context(|| format!("check shard {shard}"))?);
        progress(done as u64 + 1, shards.len() as u64);
    }
    let across = invariants::check_cluster(&facts);
    if was_idle && in_flight(client).await? == 0 {
        checked.violations.extend(across);
        checked.across = true;
    }
    Ok(checked)
}

/// All rows of one moment of a shard, as far as they are asked for.
struct Scan<'a> {
    client: &'a Client,
    shard: u32,
    snapshot: u64,
}

impl Scan<'_> {
    /// Rows after one key and before another, unless that is empty; whether these are the last of them.
    async fn page(&mut self, after: &[u8], until: &[u8], limit: usize) -> Result<(Vec<Row>, bool)> {
        let scan = ScanRows {
            snapshot: self.snapshot,
            after: Bytes::copy_from_slice(after),
            limit_bytes: limit as u32,
            checkpoint: 0,
            until: Bytes::copy_from_slice(until),
        };
        let request = AdminRequest { op: Some(Op::ScanRows(scan)) };
        let reply = self.client.admin(Role::Shard, self.shard, request).await?;
        let page = reply.scan.context("an answer without rows")?;
        self.snapshot = page.snapshot;
        anyhow::ensure!(page.last || !page.rows.is_empty(), "a page without rows that is not the last one");
        let is_within = |row: &Row| &row.key[..] > after && (until.is_empty() || &row.key[..] < until);
        anyhow::ensure!(page.rows.iter().all(is_within), "rows that were not asked for; the server is older");
        Ok((page.rows, page.last))
    }

    /// Takes the rows between two keys into the comparison with the stored hashes.
    /// Returns the shard's sum of its inline data, where that lies between them.
    async fn rescan(&mut self, after: &[u8], until: &[u8], rescanner: &mut Rescanner) -> Result<Bytes> {
        let (mut after, mut sum) = (after.to_vec(), Bytes::new());
        loop {
            let (rows, is_last) = self.page(&after, until, SCAN_BYTES_MAX).await?;
            for row in &rows {
                let (table, key) = parts_of(row)?;
                rescanner.row(table, key, &row.value);
                if table == INLINE_BYTES {
                    sum = row.value.clone();
                }
            }
            if is_last {
                return Ok(sum);
            }
            after = rows.last().map(|row| row.key.to_vec()).unwrap_or_default();
        }
    }
}

fn parts_of(row: &Row) -> Result<(Table, &[u8])> {
    let (table, key) = row.key.split_first().context("a row without a table")?;
    Ok((Table(*table), key))
}

/// Where the scan of one table is: its rows come in the order of slots.
struct Cursor {
    table: u8,
    rows: VecDeque<Row>,
    after: Vec<u8>,
    is_last: bool,
}

/// Bytes of a page of one table: as many of them as there are tables are in memory, with the rows of one slot.
const CURSOR_BYTES: usize = 256 << 10;

impl Cursor {
    /// The next row if it is of that slot, or of one before it, where none should be.
    async fn next(&mut self, scan: &mut Scan<'_>, slot: u8) -> Result<Option<Row>> {
        if self.rows.is_empty() && !self.is_last {
            let (rows, is_last) = scan.page(&self.after, &[self.table + 1], CURSOR_BYTES).await?;
            if let Some(last) = rows.last() {
                self.after = last.key.to_vec();
            }
            (self.rows, self.is_last) = (rows.into(), is_last);
        }
        let is_of_slot = |row: &Row| row.key.get(1).is_none_or(|of| *of <= slot);
        Ok(if self.rows.front().is_some_and(is_of_slot) { self.rows.pop_front() } else { None })
    }
}

/// A key behind all of a table.
fn end_of(table: u8) -> Vec<u8> {
    [&[table][..], &[0xff; 300]].concat()
}

/// Checks one moment of a shard; the moment does not stay open when that fails.
async fn shard_facts(client: &Client, shard: u32, checked: &mut Checked) -> Result<invariants::Facts> {
    let mut scan = Scan { client, shard, snapshot: 0 };
    let facts = facts_of(&mut scan, checked).await;
    if facts.is_err() && scan.snapshot != 0 {
        // It would be closed after a minute anyway; the failure says more.
        let _ = scan.page(&end_of(u8::MAX), &[], 1).await;
    }
    facts
}

/// Checks one moment of a shard, slot by slot: what is in memory are the rows of one slot, and the facts of all.
async fn facts_of(scan: &mut Scan<'_>, checked: &mut Checked) -> Result<invariants::Facts> {
    let (client, shard) = (scan.client, scan.shard);
    let mut rescanner = Rescanner::default();
    let mut wrong = Vec::new();
    let mut facts = invariants::Facts::default();
    let sum = scan.rescan(&[], &[*BY_SLOT.start()], &mut rescanner).await?;
    let mut cursors: Vec<Cursor> = BY_SLOT
        .chain([INLINE.0])
        .map(|table| Cursor { table, rows: VecDeque::new(), after: end_of(table - 1), is_last: false })
        .collect();
    for slot in 0..=255u8 {
        let (store, mut inline) = (MemoryStore::new(), InlineRows::new());
        for cursor in &mut cursors {
            let mut rows = Vec::new();
            while let Some(row) = cursor.next(scan, slot).await? {
                let (table, key) = parts_of(&row)?;
                rescanner.row(table, key, &row.value);
                if table == INLINE {
                    // The bytes may be many.
                    inline.insert(row.key.slice(1..), (row.value.len() as u64, digest(&row.value)));
                } else {
                    rows.push((row.key[..].into(), Some(row.value)));
                }
            }
            store.write(rows)?;
        }
        if store.is_empty() && inline.is_empty() {
            continue;
        }
        let work = client.runtime().blocking(move || invariants::check_slots(&store, &inline)).await;
        let (found, mut of_slot) = work.context("the check did not finish")??;
        wrong.extend(found);
        checked.counts.add(&of_slot);
        // Only their number is of interest.
        of_slot.blocks = Vec::new();
        facts.add(of_slot);
    }
    // Other tables, if a later build made some. The scan ends with them.
    scan.rescan(&end_of(*BY_SLOT.end()), &[INLINE.0], &mut rescanner).await?;
    scan.rescan(&end_of(INLINE.0), &[], &mut rescanner).await?;
    let is_sum = match &sum[..] {
        [] => facts.inline_bytes == 0,
        sum => sum == facts.inline_bytes.to_be_bytes(),
    };
    if !is_sum {
        wrong.push(format!("{} bytes of inline data are not what the shard says", facts.inline_bytes));
    }
    let rescan = rescanner.finish()?;
    checked.rows += rescan.rows;
    let found = wrong.into_iter().chain(rescan.differences);
    checked.violations.extend(found.map(|what| format!("shard {shard}: {what}")));
    Ok(facts)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn round(across: bool, violations: &[&str]) -> Checked {
        let violations = violations.iter().map(|what| (*what).to_owned()).collect();
        Checked { violations, across, ..Checked::default() }
    }

    /// Whether it looked at everything, and what it found.
    type Round<'a> = (bool, &'a [&'a str]);

    /// What rounds find together until that is enough, and whether it was.
    fn together(rounds: &[Round<'_>]) -> (bool, Checked) {
        let mut all = Rounds::default();
        let is_enough = rounds.iter().any(|(across, violations)| all.take(round(*across, violations)));
        (is_enough, all.result.expect("a round was taken"))
    }

    fn partial_rounds_clear_nothing() -> bool {
        let (is_enough, found) = together(&[(true, &["lost"]), (false, &[]), (true, &["lost"])]);
        !is_enough && found.across && found.violations.len() == 1
    }

    #[test]
    fn only_what_all_whole_rounds_found_is_wrong() {
        assert!(partial_rounds_clear_nothing());
        let cases: [(&[Round<'_>], bool, &[&str]); 6] = [
            (&[(true, &[])], true, &[]),
            (&[(true, &["a"])], false, &["a"]),
            (&[(true, &["a", "b"]), (true, &["b", "c"])], false, &["b"]),
            (&[(true, &["a"]), (true, &["a"]), (true, &["a"])], true, &["a"]),
            (&[(false, &["a"]), (true, &["b"])], false, &["b"]),
            (&[(false, &["a"]), (false, &["b"])], false, &["a"]),
        ];
        for (rounds, is_enough, expected) in cases {
            let found = together(rounds);
            let violations: Vec<&str> = found.1.violations.iter().map(String::as_str).collect();
            assert_eq!((found.0, &violations[..]), (is_enough, expected), "{rounds:?}");
        }
    }

    #[test]
    fn planted_bugs_are_found() {
        mutants::plant(Some(Mutant::PartialRoundClears));
        let (is_planted, is_right) = (mutants::planted().is_some(), partial_rounds_clear_nothing());
        mutants::plant(None);
        assert_ne!(is_planted, is_right);
    }
}
