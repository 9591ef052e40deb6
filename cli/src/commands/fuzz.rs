//! `clutch fuzz`: whole simulated clusters under faults, from seeds, a script or somebody's own trace.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, Result, bail, ensure};
use clutch_integration::{
    fuzz::{self, Failure, Options, Summary},
    generate::{Profile, generate_replicated},
    script::{Fault, Script},
    shrink::shrink,
    sim_cluster::{Engine, Members},
};
use serde_json::json;

use crate::{
    args::{FuzzArgs, FuzzEngine, FuzzProfile},
    output::{self, talk},
};

/// Lines of the timeline that are shown; the whole is in the file beside the script.
const TIMELINE_SHOWN: usize = 60;

fn profile(of: FuzzProfile) -> (Profile, &'static str) {
    match of {
        FuzzProfile::Mixed => (Profile::Mixed, "mixed"),
        FuzzProfile::Metadata => (Profile::Metadata, "metadata"),
        FuzzProfile::Data => (Profile::Data, "data"),
        FuzzProfile::Calm => (Profile::Calm, "calm"),
    }
}

fn read_script(path: &Path) -> Result<Script> {
    let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    text.parse().with_context(|| format!("{}: not a script", path.display()))
}

/// Members of each log where nothing is said of them.
fn replicas_unsaid(args: &FuzzArgs) -> u32 {
    match args.engine {
        Some(FuzzEngine::Raft) => 3,
        Some(FuzzEngine::Sim | FuzzEngine::Local) | None => 1,
    }
}

fn engine_name(engine: FuzzEngine) -> &'static str {
    match engine {
        FuzzEngine::Sim => "sim",
        FuzzEngine::Local => "local",
        FuzzEngine::Raft => "raft",
    }
}

fn members_of(args: &FuzzArgs) -> Result<Members> {
    let replicas = args.replicas.unwrap_or(replicas_unsaid(args));
    Ok(match args.engine {
        None if replicas == 1 => Members::Drawn,
        None | Some(FuzzEngine::Sim) => Members::Of(Engine::Sim, replicas),
        Some(FuzzEngine::Raft) => Members::Of(Engine::Raft, replicas),
        Some(FuzzEngine::Local) => {
            ensure!(replicas == 1, "the engine local has one member: say --engine sim or --engine raft");
            Members::Of(Engine::Local, 1)
        }
    })
}

pub(crate) fn run(args: &FuzzArgs) -> Result<ExitCode> {
    let begin = Instant::now();
    if let (true, Some(seed)) = (args.print, args.seed) {
        output::line(generate_replicated(seed, profile(args.profile).0, members_of(args)?))?;
        return Ok(ExitCode::SUCCESS);
    }
    ensure!(!args.print, "--print needs --seed");
    let summary = match &args.script {
        Some(path) => fuzz::run_script(&read_script(path)?),
        None => run_seeds(args, begin)?,
    };
    let mut failures = Vec::new();
    for failure in &summary.failures {
        failures.push(report_failure(args, failure)?);
    }
    let short = short_of_faults(args, &summary);
    if args.json {
        output::json(&json!({
            "operations": summary.operations,
            "requests": summary.requests,
            "faults": summary.faults_all(),
            "fault_kinds": summary.faults,
            "violations": summary.failures.iter().map(|f| f.report.violations.len()).sum::<usize>(),
            "failures": failures,
            "seeds": summary.seeds,
            "first_seed": args.script.is_none().then(|| first_seed_of(args)),
            "replicas": args.script.is_none().then(|| args.replicas.unwrap_or(replicas_unsaid(args))),
            "trace_hash": format!("{:016x}", summary.trace_hash),
            "coverage": summary.coverage,
            "seconds": begin.elapsed().as_secs_f64(),
        }))?;
    } else {
        show(&summary, begin.elapsed())?;
    }
    if let Some(kinds) = &short {
        talk!("clutch: these kinds of faults struck fewer than {} times: {kinds}", args.require_faults);
    }
    Ok(if summary.failures.is_empty() && short.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn first_seed_of(args: &FuzzArgs) -> u64 {
    args.seed.or(args.first_seed).unwrap_or_else(|| {
        // Drawn once for a process: what is printed is what is run.
        static DRAWN: std::sync::OnceLock<u64> = std::sync::OnceLock::new();
        *DRAWN.get_or_init(|| {
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            now.as_nanos() as u64 % 1_000_000_000_000
        })
    })
}

fn run_seeds(args: &FuzzArgs, begin: Instant) -> Result<Summary> {
    let trace = args.trace.as_deref().map(read_script).transpose()?;
    if let Some(trace) = &trace
        && trace.events.is_empty()
    {
        bail!("the trace has no operations");
    }
    let first_seed = first_seed_of(args);
    let time = args.minutes.map(|minutes| Duration::from_secs_f64(minutes * 60.0));
    let seeds = match (args.seed, args.seeds, time) {
        (Some(_), ..) => 1,
        (None, Some(seeds), _) => {
            ensure!(
                first_seed.checked_add(seeds - 1).is_some(),
                "seeds from {first_seed} on: there are not {seeds}; they end at {}",
                u64::MAX
            );
            seeds
        }
        (None, None, Some(_)) => u64::MAX,
        (None, None, None) => 100,
    };
    let options = Options {
        first_seed,
        seeds,
        time,
        profile: profile(args.profile).0,
        members: members_of(args)?,
        trace,
        jobs: args.jobs.unwrap_or(1),
        // A single seed is run to see a failure again: it may be one of determinism.
        repeat_every: if args.seed.is_some() { 1 } else { args.repeat_every },
        failures_max: args.failures_max,
    };
    talk!("clutch: fuzzing from seed {first_seed}");
    let bar = output::counter("fuzz");
    let progress = |summary: &Summary| {
        let seconds = begin.elapsed().as_secs_f64().max(0.001);
        bar.set_message(format!(
            "{} seeds, {} operations ({:.0}/s), {} faults ({:.0}/s), {} of {} states, {} failures",
            summary.seeds,
            summary.operations,
            summary.operations as f64 / seconds,
            summary.faults_all(),
            summary.faults_all() as f64 / seconds,
            summary.reached(),
            summary.coverage.len(),
            summary.failures.len()
        ));
    };
    let summary = fuzz::fuzz(&options, &progress);
    bar.finish_and_clear();
    Ok(summary)
}

fn short_of_faults(args: &FuzzArgs, summary: &Summary) -> Option<String> {
    let replicas = args.replicas.unwrap_or(replicas_unsaid(args));
    let short: Vec<String> = summary
        .faults
        .iter()
        .filter(|(kind, _)| replicas > 1 || !Fault::needs_members(kind))
        .filter(|(kind, _)| args.engine != Some(FuzzEngine::Raft) || !Fault::needs_logs_outside(kind))
        .filter(|(_, count)| **count < args.require_faults)
        .map(|(kind, count)| format!("{kind} {count}"))
        .collect();
    (!short.is_empty()).then(|| short.join(", "))
}

fn show(summary: &Summary, took: Duration) -> Result<()> {
    let seconds = took.as_secs_f64().max(0.001);
    output::line(format!(
        "{} seeds, {} operations ({:.0}/s), {} requests, {} faults ({:.0}/s) in {seconds:.1} s",
        summary.seeds,
        summary.operations,
        summary.operations as f64 / seconds,
        summary.requests,
        summary.faults_all(),
        summary.faults_all() as f64 / seconds
    ))?;
    let kinds: Vec<String> = summary.faults.iter().map(|(kind, count)| format!("{kind} {count}")).collect();
    output::line(format!("faults: {}", kinds.join(", ")))?;
    output::line(format!("states: {} of {} reached", summary.reached(), summary.coverage.len()))?;
    output::line(format!("trace: {:016x}", summary.trace_hash))?;
    output::line(match summary.failures.len() {
        0 => "no violations".to_owned(),
        n => format!("{n} seeds FAILED"),
    })
}

/// Minimises a failure, stores and shows it, and says how to repeat it.
fn report_failure(args: &FuzzArgs, failure: &Failure) -> Result<serde_json::Value> {
    let (script, report) = match args.no_shrink || args.script.is_some() {
        true => (failure.script.clone(), failure.report.clone()),
        false => {
            talk!("clutch: seed {} failed; minimising {} events", failure.seed, failure.script.events.len());
            shrink(&failure.script, &failure.report)
        }
    };
    let mut text = String::new();
    for violation in &report.violations {
        text.push_str(&format!("# {}: {}\n", violation.checker, violation.what.replace('\n', " ")));
    }
    text.push_str(&script.to_string());
    let mut timeline = String::new();
    for (at, what) in &report.timeline {
        timeline.push_str(&format!("{:>12.6} {what}\n", at.as_secs_f64()));
    }
    for violation in &report.violations {
        timeline.push_str(&format!("VIOLATION {}: {}\n", violation.checker, violation.what));
    }
    let path = args.out.join(format!("fuzz-{}.script", failure.seed));
    let command = match (&args.script, &args.trace) {
        (Some(given), _) => format!("clutch fuzz --script {}", given.display()),
        (None, Some(trace)) => format!("clutch fuzz --seed {} --trace {}", failure.seed, trace.display()),
        (None, None) => format!("clutch fuzz --seed {} --profile {}", failure.seed, profile(args.profile).1),
    };
    let command = match args.replicas {
        None => command,
        Some(replicas) => format!("{command} --replicas {replicas}"),
    };
    let command = match args.engine {
        None => command,
        Some(engine) => format!("{command} --engine {}", engine_name(engine)),
    };
    let stored: Option<PathBuf> = match &args.script {
        Some(_) => None,
        None => {
            std::fs::create_dir_all(&args.out).with_context(|| format!("make {}", args.out.display()))?;
            std::fs::write(&path, &text).with_context(|| format!("write {}", path.display()))?;
            std::fs::write(path.with_extension("timeline"), &timeline)
                .with_context(|| format!("write the timeline beside {}", path.display()))?;
            Some(path)
        }
    };
    talk!("seed {} failed:", failure.seed);
    for violation in &failure.report.violations {
        talk!("  {}: {}", violation.checker, violation.what);
    }
    talk!("timeline of {} events:", script.events.len());
    let skipped = timeline.lines().count().saturating_sub(TIMELINE_SHOWN);
    if skipped > 0 {
        talk!("  ... {skipped} lines before");
    }
    for line in timeline.lines().skip(skipped) {
        talk!("  {line}");
    }
    talk!("repeat it: {command}");
    if let Some(path) = &stored {
        talk!("the small one: clutch fuzz --script {}", path.display());
    }
    let violations: Vec<_> =
        failure.report.violations.iter().map(|v| json!({ "checker": v.checker, "what": v.what })).collect();
    Ok(json!({
        "seed": failure.seed,
        "violations": violations,
        "script": stored,
        "events": script.events.len(),
        "repeat": command,
    }))
}
