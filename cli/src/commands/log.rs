//! `clutch log`.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use anyhow::{Context as _, Result, bail};
use clutch_client::Client;
use clutch_log::LogId;
use clutch_proto::{
    admin::{AdminReply, AdminRequest, Status, TakeCheckpoint, TrimLog, admin_request::Op},
    session::Role,
};
use clutch_runtime::production::OsDisk;
use clutch_server::{
    replay::{self, Places, Report, Until},
    rewind::{Line, Plan, Rewind},
    up,
};
use clutch_state::Store;
use clutch_state_rocks::{RocksStore, SharedMemory};
use serde_json::json;

use crate::{
    args::{CheckpointCommand, LogCommand, Which},
    commands::status,
    interrupt::Temporary,
    output,
};

pub(crate) async fn run(
    client: impl Fn() -> Result<Client>,
    operator: impl AsyncFn() -> Result<Client>,
    command: &LogCommand,
) -> Result<ExitCode> {
    match command {
        LogCommand::Status { json } => show(&client()?, *json).await,
        LogCommand::Replay { which, verify, dir, from_checkpoint, to_position, to_time, json } => {
            let until = Until { position: *to_position, time: *to_time };
            let mut reports = Vec::new();
            let logs = match dir {
                Some(dir) => {
                    let runtime = clutch_runtime::production::runtime();
                    chosen(which, up::cluster_in(&runtime, dir)?.shards)?
                }
                None => chosen(which, client()?.map().await?.shards.len() as u32)?,
            };
            for id in logs {
                let work = tempdir()?;
                let store = open(work.path())?;
                let bar = output::bar(&format!("replay {id}"), 0);
                let mut progress = |done: u64, total: u64| {
                    bar.set_length(total);
                    bar.set_position(done);
                };
                let report = match dir {
                    Some(dir) => replay::from_directory(
                        &OsDisk,
                        &Places::of(dir),
                        id,
                        store,
                        until,
                        *from_checkpoint,
                        &mut progress,
                    ),
                    None => {
                        let client = operator().await?;
                        replay::from_cluster(&client, id, store, until, *from_checkpoint, &mut progress).await
                    }
                };
                bar.finish_and_clear();
                reports.push((id, report.with_context(|| format!("replay {id}"))?));
            }
            check_time(&reports, *to_time)?;
            print(&reports, *verify, *json)
        }
        LogCommand::Checkpoint { command: Some(CheckpointCommand::Ls { json }), .. } => {
            list_checkpoints(&client()?, *json).await
        }
        LogCommand::Checkpoint { which, command: None } => {
            let which = which.as_ref().context("say which log: --shard N, --cdc, --registry-log or --all")?;
            take_checkpoints(&operator().await?, which).await
        }
        LogCommand::Rewind { dir, to_time, yes, json } => rewind(dir, *to_time, *yes, *json).await,
        LogCommand::Trim { which, upto } => trim(&operator().await?, which, upto.unwrap_or(u64::MAX)).await,
    }
}

async fn take_checkpoints(client: &Client, which: &Which) -> Result<ExitCode> {
    for id in chosen(which, client.map().await?.shards.len() as u32)? {
        let reply = admin(client, id, Op::TakeCheckpoint(TakeCheckpoint {})).await?;
        let newest = reply.status.and_then(|s| s.checkpoints.last().copied()).unwrap_or(0);
        output::line(format!("{id}: checkpoint at {newest}"))?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn trim(client: &Client, which: &Which, upto: u64) -> Result<ExitCode> {
    let ids = chosen(which, client.map().await?.shards.len() as u32)?;
    let mut failed = None;
    for &id in &ids {
        // One that cannot be trimmed keeps no other from it.
        if let Err(error) = admin(client, id, Op::TrimLog(TrimLog { upto })).await {
            if ids.len() == 1 {
                return Err(error);
            }
            output::line(format!("{id}: not trimmed: {error:#}"))?;
            failed = Some(error);
        }
    }
    // A segment goes when no log needs it any more: only now is it known where each of them begins.
    for id in ids {
        let reply = admin(client, id, Op::Status(Status::default())).await?;
        let first = reply.status.map_or(0, |status| status.log_first);
        output::line(format!("{id}: the log begins at {first} (whole segments are removed)"))?;
    }
    failed.map_or(Ok(ExitCode::SUCCESS), |error| Err(error.context("not all logs were trimmed")))
}

async fn list_checkpoints(client: &Client, as_json: bool) -> Result<ExitCode> {
    let (_, replicas) = status::all(client).await?;
    let mut rows = Vec::new();
    for replica in &replicas {
        let s = replica.status.as_ref().map_err(|e| anyhow::anyhow!("{}: {e}", replica.name))?;
        // What a replay begins from, and so how far back it reaches.
        let begin = match s.log_first {
            0 | 1 => Some(0),
            first => s.checkpoints.iter().copied().filter(|position| position + 1 >= first).min(),
        };
        rows.push(json!({
            "log": replica.name, "checkpoints": s.checkpoints.iter().map(|p| output::number(*p)).collect::<Vec<_>>(),
            "log_first": output::number(s.log_first), "log_last": output::number(s.log_last),
            "replays_from": begin.map(output::number),
        }));
        if !as_json {
            let begin = match begin {
                Some(0) => "replays from its beginning".to_owned(),
                Some(position) => format!("replays from the checkpoint at {position}"),
                None => "CANNOT be replayed: no checkpoint covers what was trimmed".to_owned(),
            };
            let checkpoints: Vec<String> = s.checkpoints.iter().map(u64::to_string).collect();
            let checkpoints = if checkpoints.is_empty() { "none".to_owned() } else { checkpoints.join(", ") };
            output::line(format!(
                "{}: checkpoints {checkpoints}; log {}..{}; {begin}",
                replica.name, s.log_first, s.log_last
            ))?;
        }
    }
    if as_json {
        output::json(&json!({ "logs": rows }))?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn rewind(dir: &Path, to_time: Option<u64>, yes: bool, as_json: bool) -> Result<ExitCode> {
    let runtime = clutch_runtime::production::runtime();
    let rewind = Rewind::new(&runtime, dir)?;
    let _lock = up::lock(dir)?;
    let say = |text: String| if as_json { Ok(()) } else { output::line(text) };
    if rewind.is_unfinished() {
        let old = rewind.finish()?;
        say(format!(
            "the rewind that was interrupted is finished, to the instant that was given then; the old logs are in {}",
            old.display()
        ))?;
        if to_time.is_none() {
            if as_json {
                output::json(
                    &json!({ "done": true, "finished": true, "old_logs": old.display().to_string() }),
                )?;
            }
            return Ok(ExitCode::SUCCESS);
        }
    }
    let present = u64::try_from(jiff::Timestamp::now().as_nanosecond()).unwrap_or(0);
    let mut plan = Plan { time: to_time.unwrap_or(present), lines: Vec::new() };
    for id in rewind.logs() {
        let (cut, whole) = (tempdir()?, tempdir()?);
        let stores = [open(cut.path())?, open(whole.path())?];
        let (bar, rewind, time) = (output::bar(&format!("replay {id}"), 0), rewind.clone(), plan.time);
        let shown = bar.clone();
        let mut progress = move |done: u64, total: u64| {
            shown.set_length(total);
            shown.set_position(done);
        };
        // On a thread of its own, so that the command can be interrupted.
        let line = tokio::task::spawn_blocking(move || rewind.plan(id, time, stores, &mut progress)).await?;
        bar.finish_and_clear();
        plan.lines.push(line?);
    }
    let lost: u64 = plan.lines.iter().map(Line::entries_lost).sum();
    for line in &plan.lines {
        say(format!(
            "{}: loses {} entries; it ends at position {} of {} instead of {} of {}",
            line.log,
            line.entries_lost(),
            line.remains.position,
            instant(line.remains.time),
            line.whole.position,
            instant(line.whole.time),
        ))?;
    }
    let old = match (lost, yes) {
        (0, _) => {
            say(format!("nothing is later than {}; nothing to do", instant(plan.time)))?;
            None
        }
        (_, false) => {
            say(format!(
                "{lost} entries are later than {} and would be lost; say --yes to do it (nothing was changed)",
                instant(plan.time)
            ))?;
            None
        }
        (_, true) => Some(execute(&rewind, &plan).await?),
    };
    if let Some(old) = &old {
        let ends = plan.lines.iter().map(|line| line.remains.time).max().unwrap_or(0);
        say(format!(
            "the logs end at {}; the old ones are in {}, the old states in {}; remove them when nobody \
             needs them. Blocks that were written after the instant stay on the disks",
            instant(ends),
            old.display(),
            dir.join("state/*/before-rewind-*").display()
        ))?;
    }
    if as_json {
        let row = |line: &Line| {
            json!({
                "log": line.log.to_string(), "entries_lost": output::number(line.entries_lost()),
                "entries": output::number(line.whole.entries), "position": output::number(line.remains.position),
                "time": output::nanoseconds(line.remains.time), "last_position": output::number(line.whole.position),
                "last_time": output::nanoseconds(line.whole.time),
            })
        };
        let logs: Vec<_> = plan.lines.iter().map(row).collect();
        output::json(&json!({
            "done": old.is_some(), "time": output::nanoseconds(plan.time), "entries_lost": output::number(lost),
            "old_logs": old.map(|old| old.display().to_string()), "logs": logs,
        }))?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn execute(rewind: &Rewind, plan: &Plan) -> Result<PathBuf> {
    // One directory at a time: whoever had the one before is done with it.
    let mut work = None;
    let store = || {
        work = None;
        let dir = tempdir()?;
        let store = open(dir.path())?;
        work = Some(dir);
        Ok(store)
    };
    rewind.execute(plan, store).await
}

/// A time as a person reads it, and exactly.
fn instant(time: u64) -> String {
    match jiff::Timestamp::from_nanosecond(i128::from(time)) {
        Ok(stamp) => stamp.to_string(),
        Err(_) => format!("{time} ns"),
    }
}

fn open(dir: &Path) -> Result<Arc<dyn Store>> {
    Ok(Arc::new(RocksStore::open(dir, &SharedMemory::new(32 << 20, 64 << 20))?))
}

/// Refuses a time behind the end of all logs that were replayed: a log may rest while others go on, but where all end
/// before it, nobody can say what was there.
fn check_time(reports: &[(LogId, Report)], to_time: Option<u64>) -> Result<()> {
    let Some(time) = to_time else { return Ok(()) };
    let newest = reports.iter().map(|(_, report)| report.time).max().unwrap_or(0);
    if reports.iter().all(|(_, report)| report.reached_end) && newest < time {
        bail!(
            "time {time} lies behind the end of the log, whose last entry is of {newest}; leave --to-time away to replay all"
        );
    }
    Ok(())
}

/// A directory for a store that is removed when it is not needed any more, or when the command is interrupted.
fn tempdir() -> Result<Temporary> {
    let random = clutch_runtime::production::runtime().random;
    let path = std::env::temp_dir().join(format!("clutch-replay-{:016x}", random.u64()));
    let temporary = Temporary::new(path.clone());
    std::fs::create_dir(&path).with_context(|| format!("make {}", path.display()))?;
    Ok(temporary)
}

pub(crate) fn chosen(which: &Which, shards: u32) -> Result<Vec<LogId>> {
    if let Some(shard) = which.shard {
        if shard >= shards {
            bail!("shard {shard}: there are {shards}, counted from 0");
        }
        return Ok(vec![LogId::shard(shard)]);
    }
    Ok(if which.cdc {
        vec![LogId::CDC]
    } else if which.registry_log {
        vec![LogId::REGISTRY]
    } else {
        [LogId::REGISTRY, LogId::CDC].into_iter().chain((0..shards).map(LogId::shard)).collect()
    })
}

pub(crate) async fn admin(client: &Client, id: LogId, op: Op) -> Result<AdminReply> {
    let role = match id.role {
        1 => Role::Registry,
        2 => Role::Cdc,
        _ => Role::Shard,
    };
    client.admin(role, id.number, AdminRequest { op: Some(op) }).await.with_context(|| id.to_string())
}

fn print(reports: &[(LogId, Report)], verify: bool, as_json: bool) -> Result<ExitCode> {
    let verified = reports.iter().all(|(_, r)| r.verified);
    if as_json {
        let logs: Vec<_> = reports
            .iter()
            .map(|(id, r)| {
                json!({
                    "log": id.to_string(), "from_checkpoint": output::number(r.from_checkpoint),
                    "batches": output::number(r.batches), "entries": output::number(r.entries),
                    "position": output::number(r.position), "time": output::nanoseconds(r.time), "hash": r.hash,
                    "compared_at": r.compared.as_ref().map(|c| c.0),
                    "live_hash": r.compared.as_ref().map(|c| c.1.clone()), "verified": r.verified,
                })
            })
            .collect();
        output::json(&json!({ "verified": verified, "logs": logs }))?;
    } else {
        for (id, r) in reports {
            let from = match r.from_checkpoint {
                0 => "from the beginning".to_owned(),
                position => format!("from the checkpoint at {position}"),
            };
            output::line(format!(
                "{id}: {} entries in {} batches {from} to position {}",
                r.entries, r.batches, r.position
            ))?;
            output::line(format!("  hash {}", r.hash))?;
            match &r.compared {
                Some((at, _)) if r.verified => {
                    let rest = match r.position.saturating_sub(*at) {
                        0 => String::new(),
                        rest => format!("; the {rest} positions behind it have nothing to be compared with"),
                    };
                    output::line(format!("  equal to the live replica's at position {at}{rest}"))?
                }
                Some((at, hash)) => {
                    output::line(format!("  DIFFERENT from the live replica's at position {at}: {hash}"))?
                }
                None => {
                    output::line("  not compared: the live replica does not know its hash at this position")?
                }
            }
        }
    }
    Ok(if verify && !verified { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

async fn show(client: &Client, as_json: bool) -> Result<ExitCode> {
    let (_, replicas) = status::all(client).await?;
    let mut rows = Vec::new();
    for replica in &replicas {
        let s = replica.status.as_ref().map_err(|e| anyhow::anyhow!("{}: {e}", replica.name))?;
        rows.push(json!({
            "log": replica.name, "first": s.log_first, "last": s.log_last, "applied": s.applied_position,
            "flushed": s.flushed_position, "epoch": s.epoch, "time": output::nanoseconds(s.applied_time),
            "checkpoints": s.checkpoints,
        }));
        if !as_json {
            output::line(format!(
                "{}: {}..{}, applied {}, flushed {}, epoch {}, checkpoints {:?}",
                replica.name,
                s.log_first,
                s.log_last,
                s.applied_position,
                s.flushed_position,
                s.epoch,
                s.checkpoints
            ))?;
        }
    }
    if as_json {
        output::json(&json!({ "logs": rows }))?;
    }
    Ok(ExitCode::SUCCESS)
}
