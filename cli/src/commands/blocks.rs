//! `clutch blocks`: disks, and how redundant what lies on them is.

use std::{
    collections::{BTreeMap, BTreeSet},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use clutch_client::Client;
use clutch_client_maintenance::heal::{self, HealOptions, Healed, Lost, Pace as Rate};
use clutch_proto::{
    registry::{Map, SetServiceFlags, registry_request::Op},
    types::BlockService,
};
use clutch_shard::{FLAG_CONDEMNED, FLAG_DRAIN, FLAG_GONE, FLAG_NO_WRITE, FLAG_STAYS_NO_WRITE};
use serde_json::json;

use crate::{
    args::{BlocksCommand, Pace},
    commands::status::{self, OfDisks},
    output::{self, talk},
};

/// What the node that leads the registry says of disks.
const OF_THE_WATCHER: u32 = FLAG_CONDEMNED | FLAG_STAYS_NO_WRITE;
/// How long a service may take to answer before it counts as away.
const ANSWERS_WITHIN: Duration = Duration::from_secs(5);
/// Spans that `fsck` looks at at a time.
const CHECKS_AT_A_TIME: usize = 32;
/// Passes of a scrub: what is repaired is read again.
const SCRUBS_MAX: usize = 4;

pub(crate) async fn run(
    operator: impl AsyncFn() -> Result<Client>,
    command: &BlocksCommand,
) -> Result<ExitCode> {
    let client = operator().await?;
    match command {
        BlocksCommand::Status { json } => status(&client, *json).await,
        BlocksCommand::Drain { service, cancel: true, .. } => {
            set_flags(&client, *service, |flags| flags & !(FLAG_DRAIN | FLAG_NO_WRITE | OF_THE_WATCHER))
                .await?;
            output::line(format!("{service:016x} takes blocks again"))?;
            Ok(ExitCode::SUCCESS)
        }
        BlocksCommand::Drain { service, pace, .. } => {
            // From now on it is the operator's word, and stays.
            set_flags(&client, *service, |flags| (flags | FLAG_DRAIN | FLAG_NO_WRITE) & !OF_THE_WATCHER)
                .await?;
            empty(&client, &BTreeSet::from([*service]), pace).await
        }
        BlocksCommand::Repair { pace } => {
            let services = heal::to_be_emptied(&*client.refresh_map().await?);
            empty(&client, &services, pace).await
        }
        BlocksCommand::Scrub { pace, .. } => scrub(&client, pace).await,
        BlocksCommand::Remove { service } => remove(&client, *service).await,
    }
}

fn known(map: &Map, service: u64) -> Result<&BlockService> {
    let found = map.services.iter().find(|known| known.service_id == service);
    found.with_context(|| {
        format!("no block service {service:016x} is known; `clutch blocks status` lists those that are")
    })
}

async fn set_flags(client: &Client, service: u64, change: impl Fn(u32) -> u32) -> Result<()> {
    let map = client.refresh_map().await?;
    let before = known(&map, service)?.flags;
    if before & FLAG_GONE != 0 {
        bail!("{service:016x} was removed for good; make a new disk in its place");
    }
    let flags = change(before);
    if flags != before {
        let op = SetServiceFlags { service_id: service, flags };
        client.registry(Op::SetServiceFlags(op)).await?;
    }
    Ok(())
}

fn options(pace: &Pace) -> HealOptions {
    let concurrency = pace.at_a_time.into();
    HealOptions { concurrency, ..HealOptions::default() }
}

/// Services whose blocks cannot be had, and why.
async fn lost(client: &Client, map: &Map) -> BTreeMap<u64, String> {
    let mut lost = heal::unavailable(&client.with_patience(ANSWERS_WITHIN), map).await;
    let gone = map.services.iter().filter(|service| service.flags & FLAG_GONE != 0);
    lost.extend(gone.map(|service| (service.service_id, "removed for good".to_owned())));
    lost
}

/// Looks at the spans of a tree, or all, block by block.
pub(crate) async fn check(client: &Client, path: Option<&crate::remote::RemotePath>) -> Result<Healed> {
    let map = client.refresh_map().await?;
    let lost = Lost { away: lost(client, &map).await.into_keys().collect(), ..Lost::default() };
    let (options, rate) =
        (HealOptions { check: true, concurrency: CHECKS_AT_A_TIME, ..HealOptions::default() }, Rate::of(0));
    let bar = output::counter("fsck: data");
    let mut progress = |healed: &Healed| {
        bar.set_message(format!("{} spans, {}", healed.spans(), output::bytes(healed.physical_bytes)));
    };
    let checked = match path {
        None => heal::pass(client, &lost, options, &rate, &mut progress).await?,
        Some(path) => {
            let at = client.resolve(path).await?;
            heal::pass_of(client, at.id, &lost, options, &rate, &mut progress).await?
        }
    };
    bar.finish_and_clear();
    Ok(checked)
}

/// A line of how redundant spans are.
pub(crate) fn redundancy(healed: &Healed) -> String {
    format!(
        "{} spans have all of their blocks, {} lack some, {} can lose no other, {} cannot be read",
        healed.full, healed.reduced, healed.none, healed.unreadable
    )
}

async fn empty(client: &Client, services: &BTreeSet<u64>, pace: &Pace) -> Result<ExitCode> {
    if services.is_empty() {
        output::line("no disk is gone or to be emptied")?;
        return Ok(ExitCode::SUCCESS);
    }
    let bar = output::counter("moving");
    let mut progress = |healed: &Healed| {
        bar.set_message(format!("{} blocks, {}", healed.moved, output::bytes(healed.moved_bytes)));
    };
    let begun = client.runtime().clock.monotonic();
    let map = client.refresh_map().await?;
    let away = heal::unavailable(&client.with_patience(ANSWERS_WITHIN), &map).await;
    let lost = Lost { emptied: services.clone(), away: away.into_keys().collect() };
    let (rate, slots) = (Rate::of(pace.bytes_per_s), heal::all_slots_backwards());
    let healed = heal::empty(client, &lost, &slots, options(pace), (&rate, &|| true), &mut progress).await?;
    let took = (client.runtime().clock.monotonic() - begun).as_secs_f64();
    bar.finish_and_clear();
    let left = healed.spans();
    if pace.json {
        output::json(&json!({
            "moved": healed.moved, "moved_bytes": output::number(healed.moved_bytes), "seconds": took, "spans_left": left,
            "failures": healed.failures,
        }))?;
    } else {
        for failure in &healed.failures {
            talk!("clutch: {failure}");
        }
        let bytes = output::bytes(healed.moved_bytes);
        output::line(format!("moved {} blocks, {bytes}, in {took:.1} s", healed.moved))?;
        match left {
            0 => output::line("nothing that is in use is left there")?,
            left => output::line(format!(
                "{left} spans are still there; tell it again when what hinders it is away"
            ))?,
        }
    }
    Ok(if left == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn scrub(client: &Client, pace: &Pace) -> Result<ExitCode> {
    let bar = output::counter("scrub");
    let (mut found, mut moved, mut last) = (0, 0, Healed::default());
    let rate = Rate::of(pace.bytes_per_s);
    for _ in 0..SCRUBS_MAX {
        let map = client.refresh_map().await?;
        // What a service has that does not answer is not rebuilt: it may come back with all of it.
        let away = heal::unavailable(&client.with_patience(ANSWERS_WITHIN), &map).await;
        for (service, why) in &away {
            talk!("clutch: {service:016x} is not read: {why}");
        }
        let lost = Lost { emptied: heal::to_be_emptied(&map), away: away.into_keys().collect() };
        let options = HealOptions { check: true, repair: true, ..options(pace) };
        let mut progress = |healed: &Healed| {
            bar.set_message(format!(
                "{} blocks, {} damaged",
                healed.checked + healed.damaged,
                healed.damaged
            ));
        };
        last = heal::pass(client, &lost, options, &rate, &mut progress).await?;
        found += last.damaged;
        moved += last.moved;
        if last.moved == 0 {
            break;
        }
    }
    bar.finish_and_clear();
    if pace.json {
        output::json(&json!({
            "damaged": found, "moved": moved, "checked": last.checked, "redundancy": numbers(&last),
            "failures": last.failures,
        }))?;
    } else {
        for failure in &last.failures {
            talk!("clutch: {failure}");
        }
        output::line(format!(
            "read {} blocks; {found} were missing or damaged, {moved} were written elsewhere",
            last.checked
        ))?;
        output::line(redundancy(&last))?;
    }
    Ok(if last.is_whole() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn remove(client: &Client, service: u64) -> Result<ExitCode> {
    let map = client.refresh_map().await?;
    let flags = known(&map, service)?.flags;
    if flags & FLAG_GONE == 0 {
        if flags & FLAG_NO_WRITE == 0 {
            bail!("{service:016x} still takes blocks; first say `clutch blocks drain {service:016x}`");
        }
        let held = held(client, service).await?;
        if held.in_use > 0 {
            bail!(
                "{} blocks that are in use are on {service:016x}; first say `clutch blocks drain {service:016x}`",
                held.in_use
            );
        }
        if held.in_writing > 0 {
            bail!(
                "{} blocks of files that are being written are on {service:016x}; try again when these are written, or have been \
                 given up (`clutch collect`)",
                held.in_writing
            );
        }
        let op = SetServiceFlags { service_id: service, flags: (flags | FLAG_GONE) & !OF_THE_WATCHER };
        client.registry(Op::SetServiceFlags(op)).await?;
    }
    output::line(format!("{service:016x} is removed for good; what was on it is used by nobody"))?;
    Ok(ExitCode::SUCCESS)
}

struct HeldBlocks {
    in_use: u64,
    in_writing: u64,
}

/// What metadata know of a service's blocks, without those of dead spans.
async fn held(client: &Client, service: u64) -> Result<HeldBlocks> {
    let (mut all, mut known) = (0, BTreeSet::new());
    let mut after = bytes::Bytes::new();
    loop {
        let (page, next) = client.visit_spans(service, after).await?;
        known.extend(page.iter().map(|span| span.span_id));
        after = next;
        if after.is_empty() {
            break;
        }
    }
    let in_use = known.len() as u64;
    loop {
        let (page, next) = client.visit_dead_spans(after).await?;
        let here = page.iter().filter(|span| span.blocks.iter().any(|block| block.service_id == service));
        known.extend(here.map(|span| span.span_id));
        after = next;
        if after.is_empty() {
            break;
        }
    }
    loop {
        let (page, next) = client.visit_blocks(service, after).await?;
        all += page.iter().filter(|held| !known.contains(&held.span_id)).count() as u64;
        after = next;
        if after.is_empty() {
            return Ok(HeldBlocks { in_use, in_writing: all });
        }
    }
}

fn numbers(healed: &Healed) -> serde_json::Value {
    json!({
        "full": healed.full, "reduced": healed.reduced, "none": healed.none, "unreadable": healed.unreadable,
    })
}

fn state(service: &BlockService, lost: &BTreeMap<u64, String>) -> &'static str {
    match service.flags {
        flags if flags & FLAG_GONE != 0 => "gone",
        flags if flags & FLAG_CONDEMNED != 0 => "condemned",
        _ if lost.contains_key(&service.service_id) => "suspect",
        flags if flags & FLAG_DRAIN != 0 => "draining",
        flags if flags & FLAG_NO_WRITE != 0 => "no-write",
        _ => "good",
    }
}

/// What is still to be moved from disks that are gone or are to be emptied.
struct Rebuilding {
    is_done_by_nodes: bool,
    spans_left: u64,
    bytes_left: u64,
    bytes_per_s: u64,
    /// `None` while nothing moves.
    seconds_left: Option<u64>,
    failures: Vec<String>,
}

impl Rebuilding {
    /// Of so many blocks.
    fn line(&self, blocks: u64) -> String {
        if !self.is_done_by_nodes {
            return format!("{blocks} blocks are to be moved: say `clutch blocks repair`");
        }
        let (bytes, rate) = (output::bytes(self.bytes_left), output::bytes(self.bytes_per_s));
        let mut line = format!("{blocks} blocks are to be moved; the nodes have {bytes} of it ahead of them");
        if let Some(seconds) = self.seconds_left.filter(|_| self.spans_left > 0) {
            line += &format!(", at {rate} per second: {seconds} s");
        }
        if let Some(failure) = self.failures.first() {
            line += &format!("; what they could not do: {failure}");
        }
        line
    }
}

/// What there is, and how it is.
struct Disks {
    map: std::sync::Arc<Map>,
    /// Services whose blocks cannot be had, and why.
    lost: BTreeMap<u64, String>,
    /// What nodes say.
    said: OfDisks,
    healed: Healed,
}

impl Disks {
    async fn look(client: &Client) -> Result<Disks> {
        let map = client.refresh_map().await?;
        let lost = lost(client, &map).await;
        let away = Lost { away: lost.keys().copied().collect(), ..Lost::default() };
        let bar = output::counter("counting");
        let mut progress = |healed: &Healed| bar.set_message(format!("{} spans", healed.spans()));
        let healed = heal::pass(client, &away, HealOptions::default(), &Rate::of(0), &mut progress).await?;
        bar.finish_and_clear();
        let said = status::disks(&client.with_patience(ANSWERS_WITHIN)).await;
        let said = said.unwrap_or_else(|error| {
            talk!("clutch: what nodes say of their disks is not known: {error}");
            OfDisks::default()
        });
        Ok(Disks { map, lost, said, healed })
    }

    /// Why a service's blocks cannot be had, or are not safe there; what its node says of the disk says more.
    fn reason(&self, service: u64) -> Option<String> {
        let said = self.said.disks.get(&service);
        let fault = said.map(|disk| disk.fault.clone()).filter(|fault| !fault.is_empty());
        let mut reason = fault.or_else(|| self.lost.get(&service).cloned())?;
        let away = self.said.healing.iter().flat_map(|healing| &healing.away);
        if let Some(away) = away.into_iter().find(|away| away.service_id == service) {
            reason += &format!(", for {} s", away.for_s);
            let left = away.rebuild_after_s.saturating_sub(away.for_s);
            let is_condemned = heal::to_be_emptied(&self.map).contains(&service);
            if !is_condemned && away.rebuild_after_s > 0 {
                reason += &format!("; if that lasts it is rebuilt elsewhere in {left} s");
            }
        }
        Some(reason)
    }

    fn directory(&self, service: u64) -> &str {
        self.said.disks.get(&service).map_or("", |disk| &disk.directory)
    }

    /// What the nodes have to move yet, and how fast they do.
    fn rebuilding(&self) -> Rebuilding {
        let busy = self.said.healing.iter().filter(|healing| healing.spans_left > 0);
        let bytes_per_s: u64 = busy.map(|healing| healing.bytes_per_s).sum();
        let bytes_left: u64 = self.said.healing.iter().map(|healing| healing.bytes_left).sum();
        let spans: u64 = self.said.healing.iter().map(|healing| healing.spans_left).sum();
        Rebuilding {
            is_done_by_nodes: !self.said.healing.is_empty(),
            // Before the nodes have looked, no more than this.
            spans_left: if spans > 0 { spans } else { self.blocks_left() },
            bytes_left,
            bytes_per_s,
            seconds_left: bytes_left.checked_div(bytes_per_s),
            failures: self.said.healing.iter().flat_map(|healing| healing.failures.clone()).collect(),
        }
    }

    fn held(&self, service: u64) -> heal::Load {
        self.healed.services.get(&service).copied().unwrap_or_default()
    }

    fn blocks_left(&self) -> u64 {
        heal::to_be_emptied(&self.map).into_iter().map(|service| self.held(service).blocks).sum()
    }

    fn document(&self) -> serde_json::Value {
        let service = |service: &BlockService| {
            let (id, held) = (service.service_id, self.held(service.service_id));
            let mut document = json!({
                "id": format!("{id:016x}"), "directory": self.directory(id), "address": service.address,
                "failure_domain": service.failure_domain, "state": state(service, &self.lost),
                "reason": self.reason(id).unwrap_or_default(), "blocks": held.blocks,
                "bytes": output::number(held.bytes), "capacity_bytes": output::number(service.capacity_bytes),
                "available_bytes": output::number(service.available_bytes),
            });
            if let Some(disk) = self.said.disks.get(&id) {
                let when = |at: u64| (at > 0).then(|| output::nanoseconds(at));
                document["scrub"] = json!({
                    "ended": when(disk.scrubbed_at), "begun": when(disk.scrub_begun_at), "parts_of_256": disk.scrub_parts,
                    "checked": disk.checked, "damaged": disk.damaged, "repaired": disk.repaired,
                });
            }
            document
        };
        let services: Vec<_> = self.map.services.iter().map(service).collect();
        let mut redundancy = numbers(&self.healed);
        let rebuilding = self.rebuilding();
        redundancy["rebuilding"] = json!({
            "by_nodes": rebuilding.is_done_by_nodes, "blocks_left": self.blocks_left(), "spans_left": rebuilding.spans_left,
            "bytes_left": output::number(rebuilding.bytes_left), "rate": rebuilding.bytes_per_s,
            "seconds_left": rebuilding.seconds_left, "failures": rebuilding.failures,
        });
        json!({
            "services": services, "redundancy": redundancy,
            "logical_bytes": output::number(self.healed.logical_bytes),
            "physical_bytes": output::number(self.healed.physical_bytes),
        })
    }

    fn print(&self) -> Result<()> {
        let mut table = comfy_table::Table::new();
        table.load_preset(comfy_table::presets::NOTHING);
        table.set_header(["service", "node", "state", "blocks", "bytes", "free"]);
        for service in &self.map.services {
            let held = self.held(service.service_id);
            table.add_row([
                format!("{:016x}", service.service_id),
                output::printable(service.address.as_bytes()),
                state(service, &self.lost).to_owned(),
                held.blocks.to_string(),
                output::bytes(held.bytes),
                output::bytes(service.available_bytes),
            ]);
        }
        output::block(table)?;
        for service in self.map.services.iter().filter(|service| service.flags & FLAG_GONE == 0) {
            if let Some(reason) = self.reason(service.service_id) {
                output::line(format!(
                    "{:016x}: {}",
                    service.service_id,
                    output::printable(reason.as_bytes())
                ))?;
            }
        }
        output::line(redundancy(&self.healed))?;
        let (logical, physical) =
            (output::bytes(self.healed.logical_bytes), output::bytes(self.healed.physical_bytes));
        output::line(format!("{logical} of files in blocks of {physical}"))?;
        for id in heal::to_be_emptied(&self.map).into_iter().filter(|id| self.held(*id).blocks == 0) {
            if known(&self.map, id)?.flags & FLAG_GONE == 0 {
                output::line(format!(
                    "{id:016x} has nothing that is in use: `clutch blocks remove {id:016x}` forgets it"
                ))?;
            }
        }
        match self.blocks_left() {
            0 => Ok(()),
            left => output::line(self.rebuilding().line(left)),
        }
    }
}

async fn status(client: &Client, as_json: bool) -> Result<ExitCode> {
    let disks = Disks::look(client).await?;
    match as_json {
        true => output::json(&disks.document())?,
        false => disks.print()?,
    }
    Ok(if disks.healed.is_whole() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
