//! `clutch`, the one binary. Parses, dispatches and turns errors into exit codes; the commands are in `commands`.
//!
//! Exit codes: 0 done, 1 refused or failed, 2 usage, 3 outcome unknown.

mod args;
mod commands;
mod crash;
mod http;
mod interrupt;
mod keyring;
mod output;
mod remote;

use std::{io::IsTerminal as _, process::ExitCode, sync::Arc};

use anyhow::Result;
use args::{Cli, Command};
use clap::Parser as _;
use clutch_client::{Client, ClientError, ClientOptions};
use clutch_runtime::production;
use clutch_server::keys;
use output::talk;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Spans and blocks are as large as what jemalloc gives back to the system at once by default; taking them anew for each
/// costs a page fault for every page. What was not used for a moment goes back.
#[allow(unsafe_code)]
// SAFETY: jemalloc reads a string that ends with NUL under this name once, at its start.
#[unsafe(export_name = "_rjem_malloc_conf")]
static ALLOCATOR_OPTIONS: &[u8; 80] =
    b"oversize_threshold:0,background_thread:true,dirty_decay_ms:250,muzzy_decay_ms:0\0";

/// Each disk has sixteen at most, and disks that hang keep theirs.
const BLOCKING_THREADS_MAX: usize = 4096;

fn main() -> ExitCode {
    crash::install();
    #[cfg(feature = "mutants")]
    if let Ok(name) = std::env::var("CLUTCH_PLANT") {
        assert!(clutch_proto::mutants::plant_everywhere(&name), "{name} is no planted bug");
    }
    let cli = Cli::parse_from(args::registry_log_flag(std::env::args_os()));
    // Simulated clusters are full of faults on purpose; their complaints are not news.
    let level = if matches!(cli.command, Command::Fuzz(_)) { "off" } else { "warn,openraft=error" };
    if let Err(error) = begin_messages(level) {
        return fail(&error, cli.command.wants_json());
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .max_blocking_threads(BLOCKING_THREADS_MAX)
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => return fail(&anyhow::anyhow!("start the runtime: {error}"), false),
    };
    let as_json = cli.command.wants_json();
    // `up` stops in its own way, and a simulation holds the thread: the system ends it.
    let guarded = !matches!(cli.command, Command::Up(_) | Command::Node(_) | Command::Fuzz(_));
    let code = runtime.block_on(async {
        match guarded {
            true => match interrupt::guard(run(cli)).await {
                Ok(ended) => ended,
                Err(number) => Ok(ExitCode::from(number)),
            },
            false => run(cli).await,
        }
    });
    let code = code.unwrap_or_else(|error| fail(&error, as_json));
    interrupt::remove_all();
    // Owners on threads of their own must not see the timers end under them: the process ends them all.
    std::mem::forget(runtime);
    crash::end(code)
}

/// What is said on the way goes to standard error: lines for people, or objects where `CLUTCH_LOG_FORMAT` is `json`.
fn begin_messages(level: &str) -> Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_from_env("CLUTCH_LOG").unwrap_or_else(|_| level.into());
    let messages = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| output::Quiet)
        .with_ansi(std::io::stderr().is_terminal())
        .log_internal_errors(false);
    match std::env::var("CLUTCH_LOG_FORMAT").as_deref() {
        Err(_) | Ok("" | "text") => messages.init(),
        Ok("json") => messages.json().flatten_event(true).init(),
        Ok(other) => anyhow::bail!("CLUTCH_LOG_FORMAT is {other:?}: it is text or json"),
    }
    Ok(())
}

/// Says why a command failed, in JSON too where that was asked for, and what exit code that is.
fn fail(error: &anyhow::Error, as_json: bool) -> ExitCode {
    if error.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe) {
        // Whoever read our output has had enough. There is nobody to tell, but the work may not be done.
        return ExitCode::FAILURE;
    }
    let text = format!("{error:#}");
    talk!("clutch: {text}");
    let client_error = error.chain().find_map(|cause| cause.downcast_ref::<ClientError>());
    if as_json {
        let code = client_error.map_or("failed".to_owned(), code_name);
        // Whoever asked for it may have gone.
        let _ = output::json(
            &serde_json::json!({ "error": { "code": code, "message": output::printable(text.as_bytes()) } }),
        );
    }
    match client_error {
        Some(ClientError::Unknown(_)) => ExitCode::from(3),
        _ => ExitCode::FAILURE,
    }
}

/// A word for what went wrong, for scripts: the code of a refusal in lower case, or what kind of failure it was.
fn code_name(error: &ClientError) -> String {
    match error {
        ClientError::Refused(refusal) | ClientError::Declined(refusal) => {
            let name = format!("{:?}", refusal.code);
            let mut word = String::new();
            for c in name.chars() {
                if c.is_uppercase() && !word.is_empty() {
                    word.push('_');
                }
                word.extend(c.to_lowercase());
            }
            word
        }
        ClientError::Unreachable(_) => "unreachable".into(),
        ClientError::Unknown(_) => "outcome_unknown".into(),
        ClientError::DataLost(_) => "data_lost".into(),
        ClientError::Local(_) => "local".into(),
    }
}

async fn run(cli: Cli) -> Result<ExitCode> {
    let runtime = production::runtime();
    let client_with = |key: Option<[u8; 32]>| {
        let registry = args::parse_registry(&cli.registry).map_err(anyhow::Error::msg)?;
        let options = ClientOptions {
            patience: cli.patience(),
            inline_bytes: cli.inline_default,
            keys: key.map(Into::into),
            ..ClientOptions::default()
        };
        anyhow::Ok(Client::new(production::runtime(), registry, options))
    };
    let client = || client_with(None);
    // One that has the cluster's key, where that can be had; who has it not is told what to do when he is refused.
    let operator = async || match cli.key() {
        Some(file) => client_with(Some(keys::read_key(file)?)),
        None => client_with(keyring::find_of(&runtime, client()?.map().await?.cluster, &cli.registry).await),
    };
    match &cli.command {
        Command::Up(args) if args.replicas > 1 => commands::up_several::run(runtime, args).await,
        Command::Up(args) => commands::up::run(runtime, args).await,
        Command::Node(args) => commands::node::run(runtime, args).await,
        Command::Cluster(command) => commands::cluster::run(&runtime, client_with, operator, command).await,
        Command::Status(args) => commands::status::run(&client()?, args).await,
        Command::Fs(command) => commands::fs::run(Arc::new(client()?), command).await,
        Command::Log(command) => commands::log::run(client, operator, command).await,
        Command::Fsck(args) => commands::fsck::run(&operator().await?, args).await,
        Command::Blocks(command) => commands::blocks::run(operator, command).await,
        Command::Collect(args) => commands::collect::run(&client()?, args).await,
        Command::Disk(command) => commands::disk::run(&runtime, command),
        Command::Fuzz(args) => commands::fuzz::run(args),
        Command::Bench(command) => commands::bench::run(Arc::new(client()?), command).await,
        Command::Completions { shell } => commands::shell::completions(*shell),
        Command::Man { dir } => commands::shell::man(dir.as_deref()),
        Command::Crash { signal } => crash::provoke(signal),
    }
}
