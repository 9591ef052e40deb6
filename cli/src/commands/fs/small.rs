//! The commands that change one thing, or several of a kind: what fails of several does not hold up the others.

use std::process::ExitCode;

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use clutch_client::{Client, DirCursor, FileAttributes, Resolved};
use clutch_proto::{
    InodeId,
    shard::{PastEdge, SetAttributes},
    types::Code,
};
use futures_util::StreamExt as _;

use super::{failures::Failures, identity};
use crate::remote::RemotePath;

/// Where something that is no directory is to be: its directory and name. A slash at the end asks for a directory that is
/// there, and there is none.
pub(super) async fn place_for_file(client: &Client, path: &RemotePath) -> Result<(InodeId, Bytes)> {
    ensure!(!path.means_directory(), "{path}: no such directory (its end says that it means one)");
    Ok(client.resolve_parent(path).await?)
}

pub(super) async fn mkdir(
    client: &Client,
    paths: &[RemotePath],
    parents: bool,
    mode: u32,
) -> Result<ExitCode> {
    let mut failures = Failures::default();
    for path in paths {
        failures.take(mkdir_one(client, path, parents, mode).await.with_context(|| path.to_string()));
    }
    Ok(failures.exit_code())
}

async fn mkdir_one(client: &Client, path: &RemotePath, parents: bool, mode: u32) -> Result<()> {
    let (uid, gid) = identity();
    let attributes = FileAttributes { mode, uid, gid, mtime: 0 };
    if !parents {
        let (dir, name) = client.resolve_parent(path).await?;
        client.make_directory(dir, &name, attributes).await?;
        return Ok(());
    }
    let mut at = InodeId::ROOT;
    for part in path.as_bytes().split(|b| *b == b'/').filter(|p| !p.is_empty() && *p != b".") {
        at = make_or_find(client, at, &Bytes::copy_from_slice(part), attributes).await?;
    }
    Ok(())
}

/// The directory of that name, made if it does not exist.
pub(super) async fn make_or_find(
    client: &Client,
    dir: InodeId,
    name: &Bytes,
    attributes: FileAttributes,
) -> Result<InodeId> {
    match client.make_directory(dir, name, attributes).await {
        Ok(created) => Ok(created.id),
        Err(error) if error.code() == Some(Code::Exists) => {
            let edge = client.lookup(dir, name).await?;
            match InodeId::from_wire(edge.target) {
                Some(id) if id.is_directory() => Ok(id),
                _ => bail!("{:?} exists and is not a directory", String::from_utf8_lossy(name)),
            }
        }
        Err(error) => Err(error.into()),
    }
}

pub(super) async fn mv(client: &Client, source: &RemotePath, target: &RemotePath) -> Result<()> {
    let from = client.resolve(source).await?;
    let (dir, name) = match client.resolve(target).await {
        // Into an existing directory, unless that is the thing itself under its own name.
        Ok(found) if found.id.is_directory() && found.id != from.id => (found.id, from.name.clone()),
        Ok(found) => (found.parent, found.name),
        Err(error) if error.is_not_found() && from.id.is_directory() => client.resolve_parent(target).await?,
        Err(error) if error.is_not_found() => place_for_file(client, target).await?,
        Err(error) => return Err(error.into()),
    };
    ensure!(
        (dir, &name) != (from.parent, &from.name) || source == target,
        "{source} and {target} are the same"
    );
    client.rename(&from, dir, &name).await.with_context(|| format!("move {source} to {target}"))?;
    Ok(())
}

pub(super) async fn rm(
    client: &Client,
    paths: &[RemotePath],
    recursive: bool,
    force: bool,
) -> Result<ExitCode> {
    let mut failures = Failures::default();
    for path in paths {
        let removed = rm_one(client, path, recursive, force, &mut failures).await;
        failures.take(removed.with_context(|| path.to_string()));
    }
    Ok(failures.exit_code())
}

async fn rm_one(
    client: &Client,
    path: &RemotePath,
    recursive: bool,
    force: bool,
    failures: &mut Failures,
) -> Result<()> {
    let at = match client.resolve(path).await {
        Ok(at) => at,
        Err(error) if force && error.is_not_found() => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    if !at.id.is_directory() {
        return Ok(client.unlink(&at).await?);
    }
    ensure!(recursive, "is a directory; use -r to remove it with all that is in it");
    ensure!(!at.name.is_empty(), "the root directory cannot be removed");
    remove_tree(client, at, path, failures).await
}

/// Files of a directory side by side, then the directories below it, then itself. What cannot be removed is said, and the
/// directories above it stay.
async fn remove_tree(
    client: &Client,
    top: Resolved,
    path: &RemotePath,
    failures: &mut Failures,
) -> Result<()> {
    // The way down to where the work is; each with the directories below it that are still to come.
    struct Level {
        at: Resolved,
        path: RemotePath,
        below: Vec<Resolved>,
        failed: bool,
    }
    let mut way: Vec<Level> = Vec::new();
    let mut next = Some((top, path.clone()));
    loop {
        if let Some((at, path)) = next.take() {
            let mut level = Level { at, path, below: Vec::new(), failed: false };
            let mut cursor = Some(DirCursor::default());
            while let Some(begin) = cursor {
                let page = client.read_dir_page(level.at.id, &begin, 0).await;
                let Some((entries, following)) = failures.take(page.with_context(|| level.path.to_string()))
                else {
                    level.failed = true;
                    break;
                };
                let mut files = Vec::new();
                for entry in entries {
                    let id = InodeId::from_wire(entry.target).context("an inode id")?;
                    let parent = level.at.id;
                    let at = Resolved { id, parent, name: entry.name, created_at: entry.created_at };
                    if id.is_directory() { level.below.push(at) } else { files.push(at) }
                }
                let mut removing = futures_util::stream::iter(&files)
                    .map(|file| async move { (file, client.unlink(file).await) })
                    .buffer_unordered(64);
                while let Some((file, removed)) = removing.next().await {
                    // Somebody else was quicker.
                    let removed = removed.or_else(|e| if e.is_not_found() { Ok(()) } else { Err(e) });
                    let said = removed.with_context(|| level.path.join(&file.name).to_string());
                    level.failed |= failures.take(said).is_none();
                }
                cursor = following;
            }
            way.push(level);
        }
        let Some(level) = way.last_mut() else { return Ok(()) };
        if let Some(below) = level.below.pop() {
            let path = level.path.join(&below.name);
            next = Some((below, path));
            continue;
        }
        let Some(done) = way.pop() else { return Ok(()) };
        let removed = match done.failed {
            true => None,
            false => {
                let removed = client.remove_directory(&done.at).await;
                failures.take(removed.with_context(|| done.path.to_string()))
            }
        };
        if let (None, Some(above)) = (removed, way.last_mut()) {
            above.failed = true;
        }
    }
}

pub(super) async fn ln(client: &Client, target: &std::ffi::OsStr, path: &RemotePath) -> Result<()> {
    use std::os::unix::ffi::OsStrExt as _;
    let (dir, name) = place_for_file(client, path).await?;
    let (uid, gid) = identity();
    let attributes = FileAttributes { uid, gid, ..FileAttributes::default() };
    let target = Bytes::copy_from_slice(target.as_bytes());
    client.symlink(dir, &name, target, attributes, false).await.with_context(|| path.to_string())?;
    Ok(())
}

async fn change(client: &Client, paths: &[RemotePath], change: SetAttributes) -> Result<ExitCode> {
    let mut failures = Failures::default();
    for path in paths {
        let changed = async {
            let at = client.resolve(path).await?;
            client.set_attributes(at.id, change).await
        };
        failures.take(changed.await.with_context(|| path.to_string()));
    }
    Ok(failures.exit_code())
}

pub(super) async fn chmod(client: &Client, mode: u32, paths: &[RemotePath]) -> Result<ExitCode> {
    change(client, paths, SetAttributes { mode: Some(mode), ..SetAttributes::default() }).await
}

pub(super) async fn chown(client: &Client, owner: &str, paths: &[RemotePath]) -> Result<ExitCode> {
    let (uid, gid) = owner.split_once(':').unwrap_or((owner, ""));
    let number = |text: &str| match text {
        "" => Ok(None),
        text => text
            .parse()
            .map(Some)
            .with_context(|| format!("{text:?} is not a number; names are not resolved")),
    };
    let (uid, gid) = (number(uid)?, number(gid)?);
    ensure!(uid.is_some() || gid.is_some(), "say UID, UID:GID or :GID");
    change(client, paths, SetAttributes { uid, gid, ..SetAttributes::default() }).await
}

pub(super) async fn touch(client: &Client, date: Option<&str>, paths: &[RemotePath]) -> Result<ExitCode> {
    let time = match date {
        None => client.runtime().clock.now().0,
        Some(text) => parse_time(text)?,
    };
    let mut failures = Failures::default();
    for path in paths {
        failures.take(touch_one(client, time, path).await.with_context(|| path.to_string()));
    }
    Ok(failures.exit_code())
}

async fn touch_one(client: &Client, time: u64, path: &RemotePath) -> Result<()> {
    let (uid, gid) = identity();
    match client.resolve(path).await {
        Ok(at) => {
            let change = SetAttributes { mtime: Some(time), atime: Some(time), ..SetAttributes::default() };
            client.set_attributes(at.id, change).await?;
        }
        Err(error) if error.is_not_found() => {
            let (dir, name) = place_for_file(client, path).await?;
            let attributes = FileAttributes { mode: 0o644, uid, gid, mtime: time };
            client.write_file(dir, &name, attributes, false, &mut tokio::io::empty()).await?;
        }
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

fn parse_time(text: &str) -> Result<u64> {
    if let Ok(seconds) = text.parse::<u64>() {
        return seconds.checked_mul(1_000_000_000).context("a time that far ahead cannot be stored");
    }
    let time: jiff::Timestamp =
        text.parse().with_context(|| format!("{text:?} is neither RFC 3339 nor seconds since 1970"))?;
    ensure!(time.as_nanosecond() >= 0, "times before 1970 cannot be stored");
    u64::try_from(time.as_nanosecond()).context("a time that far ahead cannot be stored")
}

/// The directory that a name led to, if that was removed and nothing newer of the name can be brought back.
async fn removed_directory(
    client: &Client,
    dir: InodeId,
    past: &[PastEdge],
    ended: Option<u64>,
) -> Result<Option<InodeId>> {
    for edge in past.iter().rev().filter(|p| ended.is_none_or(|ended| p.ended_at == ended)) {
        if edge.owned {
            return Ok(None);
        }
        let Some(id) = InodeId::from_wire(edge.target).filter(|id| id.is_directory()) else { continue };
        match client.stat(id).await {
            Ok(attributes) if attributes.parent == 0 && attributes.former_parent == dir.raw() => {
                return Ok(Some(id));
            }
            // Moved away, or brought back already.
            Ok(_) => {}
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(None)
}

pub(super) async fn undelete(
    client: &Client,
    path: &RemotePath,
    new_path: Option<&RemotePath>,
    ended: Option<u64>,
) -> Result<()> {
    let (dir, name) = client.resolve_parent(path).await?;
    let past = client.history(dir, Some(&name)).await?;
    if let Some(removed) = removed_directory(client, dir, &past, ended).await? {
        let (new_dir, new_name) = match new_path {
            Some(new_path) => client.resolve_parent(new_path).await?,
            None => (dir, name),
        };
        client.undelete_directory(removed, new_dir, &new_name).await.with_context(|| path.to_string())?;
        return Ok(());
    }
    let chosen = match ended {
        Some(ended) => past.iter().find(|p| p.ended_at == ended && p.owned),
        None => past.iter().rev().find(|p| p.owned),
    };
    let chosen = chosen
        .with_context(|| format!("{path}: nothing that was deleted or replaced can be brought back"))?;
    let (new_dir, new_name) = match new_path {
        Some(new_path) => place_for_file(client, new_path).await?,
        None => place_for_file(client, path).await?,
    };
    ensure!(new_dir == dir, "a file is brought back into its own directory; move it afterwards");
    client.undelete(dir, chosen, &new_name).await.with_context(|| path.to_string())?;
    Ok(())
}
