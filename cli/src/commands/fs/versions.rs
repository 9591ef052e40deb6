//! Files that are written over in place, and their earlier contents.

use std::{path::Path, process::ExitCode};

use anyhow::{Context as _, Result, ensure};
use clutch_client::{Client, ContentSource, Resolved};
use clutch_proto::{InodeKind, types::Code};
use serde_json::json;

use super::failures::Failures;
use crate::{output, remote::RemotePath};

async fn file(client: &Client, path: &RemotePath) -> Result<Resolved> {
    let at = client.resolve(path).await?;
    ensure!(at.id.kind() == InodeKind::File, "{path}: not a file");
    Ok(at)
}

fn published<T>(result: Result<T, clutch_client::ClientError>, path: &RemotePath) -> Result<T> {
    result.map_err(|error| match error.code() {
        Some(Code::Stale) => anyhow::Error::new(error).context(format!(
            "{path}: somebody else changed it at the same time; nothing was written, try again"
        )),
        _ => anyhow::Error::new(error).context(path.to_string()),
    })
}

pub(super) async fn write(
    client: &Client,
    source: &Path,
    path: &RemotePath,
    offset: u64,
    truncate: bool,
) -> Result<()> {
    let at = file(client, path).await?;
    let mut source: Box<dyn ContentSource> = if source == Path::new("-") {
        Box::new(tokio::io::stdin())
    } else {
        let opened = tokio::fs::File::open(source).await;
        Box::new(opened.with_context(|| format!("open {}", source.display()))?)
    };
    published(client.write_range(&at, offset, truncate, &mut *source).await, path)?;
    Ok(())
}

pub(super) async fn truncate(client: &Client, size: u64, paths: &[RemotePath]) -> Result<ExitCode> {
    let mut failures = Failures::default();
    for path in paths {
        let truncated = async { published(client.truncate(&file(client, path).await?, size).await, path) };
        failures.take(truncated.await);
    }
    Ok(failures.exit_code())
}

pub(super) async fn list(client: &Client, path: &RemotePath, as_json: bool) -> Result<()> {
    let at = file(client, path).await?;
    let past = client.content_history(at.id).await?;
    if as_json {
        let past: Vec<_> = past
            .iter()
            .map(|p| {
                json!({
                    "content": format!("{:x}", p.content),
                    "ended": output::nanoseconds(p.ended_at),
                    "size": output::number(p.size),
                })
            })
            .collect();
        return output::json(&json!({ "past": past }));
    }
    for version in past.iter().rev() {
        output::line(format!(
            "{:>20}  {:>12}  until {}",
            version.ended_at,
            version.size,
            output::time(version.ended_at)
        ))?;
    }
    Ok(())
}

pub(super) async fn restore(client: &Client, path: &RemotePath, ended: Option<u64>) -> Result<()> {
    let at = file(client, path).await?;
    let past = client.content_history(at.id).await?;
    let chosen = match ended {
        Some(ended) => past.iter().find(|p| p.ended_at == ended),
        None => past.last(),
    };
    let chosen = chosen.with_context(|| format!("{path}: no such earlier content (see `fs versions`)"))?;
    let present = client.stat(at.id).await?;
    published(client.restore_content(chosen, present.content, at.parent).await, path)?;
    Ok(())
}
