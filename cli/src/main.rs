//! `clutch`, the one binary. Parses, dispatches and turns errors into exit codes; the commands are in `commands`.
//!
//! Exit codes: 0 done, 1 refused or failed, 2 usage, 3 outcome unknown.

mod args;
mod commands;
mod crash;
mod output;

use std::{process::ExitCode, sync::Arc};

use anyhow::Result;
use args::{Cli, Command};
use clap::Parser as _;
use clutch_client::{Client, ClientError, ClientOptions};
use clutch_runtime::production;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Spans and blocks are as large as what jemalloc gives back to the system at once by default; taking them anew for each
/// costs a page fault for every page.
#[allow(unsafe_code)]
// SAFETY: jemalloc reads a string that ends with NUL under this name once, at its start.
#[unsafe(export_name = "_rjem_malloc_conf")]
static ALLOCATOR_OPTIONS: &[u8; 22] = b"oversize_threshold:0\0\0";

fn main() -> ExitCode {
    crash::install();
    let cli = Cli::parse_from(args::registry_log_flag(std::env::args_os()));
    // Simulated clusters are full of faults on purpose; their complaints are not news.
    let level = if matches!(cli.command, Command::Fuzz(_)) { "off" } else { "warn" };
    let filter = tracing_subscriber::EnvFilter::try_from_env("CLUTCH_LOG").unwrap_or_else(|_| level.into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&anyhow::anyhow!("start the runtime: {error}")),
    };
    let code = match runtime.block_on(run(cli)) {
        Ok(code) => code,
        Err(error) => fail(&error),
    };
    // Owners on threads of their own must not see the timers end under them: the process ends them all.
    std::mem::forget(runtime);
    crash::end(code)
}

fn fail(error: &anyhow::Error) -> ExitCode {
    if error.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe) {
        // Whoever read our output has had enough. There is nobody to tell, but the work may not be done.
        return ExitCode::FAILURE;
    }
    eprintln!("clutch: {error:#}");
    match error.downcast_ref::<ClientError>() {
        Some(ClientError::Unknown(_)) => ExitCode::from(3),
        _ => ExitCode::FAILURE,
    }
}

async fn run(cli: Cli) -> Result<ExitCode> {
    let runtime = production::runtime();
    let client = || {
        let options = ClientOptions { patience: cli.patience(), ..ClientOptions::default() };
        Client::new(production::runtime(), cli.registry.as_str().into(), options)
    };
    match &cli.command {
        Command::Up(args) => commands::up::run(runtime, args).await,
        Command::Status(args) => commands::status::run(&client(), args).await,
        Command::Fs(command) => commands::fs::run(Arc::new(client()), command).await,
        Command::Log(command) => commands::log::run(client, command).await,
        Command::Fsck(args) => commands::fsck::run(&client(), args).await,
        Command::Collect(args) => commands::collect::run(&client(), args).await,
        Command::Fuzz(args) => commands::fuzz::run(args),
        Command::Bench(command) => commands::bench::run(Arc::new(client()), command).await,
        Command::Completions { shell } => commands::shell::completions(*shell),
        Command::Man { dir } => commands::shell::man(dir.as_deref()),
        Command::Crash { signal } => crash::provoke(signal),
    }
}
