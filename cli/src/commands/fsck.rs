//! `clutch fsck`.

use std::process::ExitCode;

use anyhow::Result;
use clutch_client::Client;
use clutch_client_maintenance::fsck;
use serde_json::json;

use crate::{
    args::FsckArgs,
    commands::{blocks, status::Picture},
    output,
};

pub(crate) async fn run(client: &Client, args: &FsckArgs) -> Result<ExitCode> {
    let picture = Picture::take(client).await?;
    let replicas = &picture.replicas;
    let mut checked = fsck::Checked::default();
    let has_stopped = replicas.iter().any(|r| r.status.as_ref().map_or(true, |s| !s.fault.is_empty()));
    let faults = picture.faults();
    checked.violations.extend(faults.iter().cloned());
    let mut rescanned = 0;
    if args.rescan {
        let rescan = fsck::rescan(client).await?;
        rescanned = rescan.rows;
        checked.violations.extend(rescan.violations);
    }
    // A replica that has stopped serves no rows; what it stopped on is the finding.
    if !has_stopped {
        let bar = output::bar("fsck: shards", replicas.len() as u64);
        let mut progress = |done: u64, total: u64| {
            bar.set_length(total);
            bar.set_position(done);
        };
        let before = std::mem::take(&mut checked.violations);
        checked = fsck::check(client, &mut progress).await?;
        checked.violations.extend(before);
        bar.finish_and_clear();
    }
    let mut data = None;
    if let Some(path) = &args.data {
        let found = blocks::check(client, path.as_ref()).await?;
        if !found.is_whole() {
            checked.violations.extend(found.failures.iter().cloned());
            checked.violations.insert(format!("data: {}", blocks::redundancy(&found)));
        }
        data = Some(found);
    }
    let clean = checked.violations.is_empty();
    if args.json {
        output::json(&json!({
            "clean": clean,
            "violations": &checked.violations,
            "rows": checked.rows,
            "rescanned_rows": rescanned,
            "counts": checked.counts,
            "data": data,
        }))?;
    } else {
        for violation in &checked.violations {
            output::line(violation)?;
        }
        let rescan = if args.rescan { format!(", {rescanned} read again from disk") } else { String::new() };
        output::line(format!(
            "{} ({} rows{rescan})",
            if clean { "clean" } else { "NOT clean" },
            checked.rows
        ))?;
        let counts = &checked.counts;
        output::line(format!(
            "{} inodes, {} entries and {} past ones, {} contents, {} spans, {} blocks",
            counts.inodes, counts.edges, counts.past_edges, counts.contents, counts.spans, counts.blocks
        ))?;
        if let Some(data) = &data {
            output::line(format!("read {} blocks; {}", data.checked, blocks::redundancy(data)))?;
        }
    }
    Ok(if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
