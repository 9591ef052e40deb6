//! `clutch fs`.

mod failures;
mod get;
mod list;
mod policy;
mod put;
mod small;
mod versions;

use std::{process::ExitCode, sync::Arc};

use anyhow::Result;
use clutch_client::Client;

use crate::args::FsCommand;

pub(crate) async fn run(client: Arc<Client>, command: &FsCommand) -> Result<ExitCode> {
    match command {
        FsCommand::Ls { path, long, recursive, json } => {
            list::ls(&client, path, *long, *recursive, *json).await?
        }
        FsCommand::Tree { path, json } => list::tree(&client, path, *json).await?,
        FsCommand::Du { path, json } => list::du(&client, path, *json).await?,
        FsCommand::Stat { path, json } => list::stat(&client, path, *json).await?,
        FsCommand::History { path, json } => list::history(&client, path, *json).await?,
        FsCommand::Put { recursive, verbose, jobs, source, target } => {
            return put::run(client, source, target, *recursive, *verbose, *jobs).await;
        }
        FsCommand::Get { recursive, jobs, source, target } => {
            return get::run(client, source, target, *recursive, *jobs).await;
        }
        FsCommand::Cat { paths } => return get::cat(&client, paths).await,
        FsCommand::Mkdir { parents, mode, paths } => {
            return small::mkdir(&client, paths, *parents, *mode).await;
        }
        FsCommand::Mv { source, target } => small::mv(&client, source, target).await?,
        FsCommand::Rm { recursive, force, paths } => {
            return small::rm(&client, paths, *recursive, *force).await;
        }
        FsCommand::Ln { target, path, .. } => small::ln(&client, target, path).await?,
        FsCommand::Chmod { mode, paths } => return small::chmod(&client, *mode, paths).await,
        FsCommand::Chown { owner, paths } => return small::chown(&client, owner, paths).await,
        FsCommand::Touch { date, paths } => return small::touch(&client, date.as_deref(), paths).await,
        FsCommand::Write { offset, truncate, source, path } => {
            versions::write(&client, source, path, *offset, *truncate).await?
        }
        FsCommand::Truncate { size, paths } => return versions::truncate(&client, *size, paths).await,
        FsCommand::Versions { path, json } => versions::list(&client, path, *json).await?,
        FsCommand::Restore { path, ended } => versions::restore(&client, path, *ended).await?,
        FsCommand::Policy(command) => policy::run(&client, command).await?,
        FsCommand::Undelete { path, new_path, ended } => {
            small::undelete(&client, path, new_path.as_ref(), *ended).await?
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Who makes files here.
fn identity() -> (u32, u32) {
    (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw())
}
