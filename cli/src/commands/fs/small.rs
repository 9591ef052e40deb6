//! The commands that change one thing.

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use clutch_client::{Client, FileAttributes};
use clutch_proto::{
    InodeId,
    shard::{PastEdge, SetAttributes},
    types::Code,
};

use super::identity;

pub(super) async fn mkdir(client: &Client, paths: &[String], parents: bool, mode: u32) -> Result<()> {
    let (uid, gid) = identity();
    let attributes = FileAttributes { mode, uid, gid, mtime: 0 };
    for path in paths {
        if !parents {
            let (dir, name) = client.resolve_parent(path).await?;
            client.make_directory(dir, &name, attributes).await.with_context(|| path.clone())?;
            continue;
        }
        let mut at = InodeId::ROOT;
        ensure!(path.starts_with('/'), "{path:?} is not absolute; remote paths begin with /");
        for part in path.split('/').filter(|p| !p.is_empty() && *p != ".") {
            at = make_or_find(client, at, &Bytes::copy_from_slice(part.as_bytes()), attributes)
                .await
                .with_context(|| path.clone())?;
        }
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

pub(super) async fn mv(client: &Client, source: &str, target: &str) -> Result<()> {
    let from = client.resolve(source).await?;
    let (dir, name) = match client.resolve(target).await {
        // Into an existing directory, unless that is the thing itself under its own name.
        Ok(found) if found.id.is_directory() && found.id != from.id => (found.id, from.name.clone()),
        Ok(found) => (found.parent, found.name),
        Err(error) if error.is_not_found() => client.resolve_parent(target).await?,
        Err(error) => return Err(error.into()),
    };
    ensure!(
        (dir, &name) != (from.parent, &from.name) || source == target,
        "{source} and {target} are the same"
    );
    client.rename(&from, dir, &name).await.with_context(|| format!("move {source} to {target}"))?;
    Ok(())
}

pub(super) async fn rm(client: &Client, paths: &[String], recursive: bool, force: bool) -> Result<()> {
    for path in paths {
        let at = match client.resolve(path).await {
            Ok(at) => at,
            Err(error) if force && error.is_not_found() => continue,
            Err(error) => return Err(error.into()),
        };
        if !at.id.is_directory() {
            client.unlink(&at).await.with_context(|| path.clone())?;
        } else if recursive {
            ensure!(!at.name.is_empty(), "the root directory cannot be removed");
            remove_tree(client, at).await.with_context(|| path.clone())?;
        } else {
            bail!("{path}: is a directory; use -r to remove it with all that is in it");
        }
    }
    Ok(())
}

/// Files of a directory side by side, then the directories below it, then itself.
async fn remove_tree(client: &Client, top: clutch_client::Resolved) -> Result<()> {
    use futures_util::{StreamExt as _, TryStreamExt as _};
    // Directories are entered in the order found and removed in the opposite one.
    let mut found = vec![top];
    let mut next = 0;
    while next < found.len() {
        let dir = found[next].id;
        next += 1;
        let mut files = Vec::new();
        for entry in client.read_dir(dir).await? {
            let id = InodeId::from_wire(entry.target).context("an inode id")?;
            let at =
                clutch_client::Resolved { id, parent: dir, name: entry.name, created_at: entry.created_at };
            if id.is_directory() { found.push(at) } else { files.push(at) }
        }
        futures_util::stream::iter(&files)
            .map(|file| client.unlink(file))
            .buffer_unordered(64)
            .try_collect::<()>()
            .await?;
    }
    for at in found.iter().rev() {
        client.remove_directory(at).await?;
    }
    Ok(())
}

pub(super) async fn ln(client: &Client, target: &str, path: &str) -> Result<()> {
    let (dir, name) = client.resolve_parent(path).await?;
    let (uid, gid) = identity();
    let attributes = FileAttributes { uid, gid, ..FileAttributes::default() };
    let target = Bytes::copy_from_slice(target.as_bytes());
    client.symlink(dir, &name, target, attributes, false).await.with_context(|| path.to_owned())?;
    Ok(())
}

async fn change(client: &Client, paths: &[String], change: SetAttributes) -> Result<()> {
    for path in paths {
        let at = client.resolve(path).await?;
        client.set_attributes(at.id, change).await.with_context(|| path.clone())?;
    }
    Ok(())
}

pub(super) async fn chmod(client: &Client, mode: u32, paths: &[String]) -> Result<()> {
    change(client, paths, SetAttributes { mode: Some(mode), ..SetAttributes::default() }).await
}

pub(super) async fn chown(client: &Client, owner: &str, paths: &[String]) -> Result<()> {
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

pub(super) async fn touch(client: &Client, date: Option<&str>, paths: &[String]) -> Result<()> {
    let time = match date {
        None => client.runtime().clock.now().0,
        Some(text) => parse_time(text)?,
    };
    let (uid, gid) = identity();
    for path in paths {
        match client.resolve(path).await {
            Ok(at) => {
                let change =
                    SetAttributes { mtime: Some(time), atime: Some(time), ..SetAttributes::default() };
                client.set_attributes(at.id, change).await.with_context(|| path.clone())?;
            }
            Err(error) if error.is_not_found() => {
                let (dir, name) = client.resolve_parent(path).await?;
                let attributes = FileAttributes { mode: 0o644, uid, gid, mtime: time };
                client
                    .write_file(dir, &name, attributes, false, &mut tokio::io::empty())
                    .await
                    .with_context(|| path.clone())?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn parse_time(text: &str) -> Result<u64> {
    if let Ok(seconds) = text.parse::<u64>() {
        return seconds.checked_mul(1_000_000_000).context("a time that far ahead cannot be stored");
    }
    let time: jiff::Timestamp =
        text.parse().with_context(|| format!("{text:?} is neither RFC 3339 nor seconds since 1970"))?;
    u64::try_from(time.as_nanosecond()).context("times before 1970 cannot be stored")
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
            Ok(attributes) if attributes.owner == 0 && attributes.former_owner == dir.raw() => {
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
    path: &str,
    new_path: Option<&str>,
    ended: Option<u64>,
) -> Result<()> {
    let (dir, name) = client.resolve_parent(path).await?;
    let past = client.history(dir, Some(&name)).await?;
    if let Some(removed) = removed_directory(client, dir, &past, ended).await? {
        let (new_dir, new_name) = match new_path {
            Some(new_path) => client.resolve_parent(new_path).await?,
            None => (dir, name),
        };
        client.undelete_directory(removed, new_dir, &new_name).await.with_context(|| path.to_owned())?;
        return Ok(());
    }
    let chosen = match ended {
        Some(ended) => past.iter().find(|p| p.ended_at == ended && p.owned),
        None => past.iter().rev().find(|p| p.owned),
    };
    let chosen = chosen
        .with_context(|| format!("{path}: nothing that was deleted or replaced can be brought back"))?;
    let (new_dir, new_name) = match new_path {
        Some(new_path) => client.resolve_parent(new_path).await?,
        None => (dir, name),
    };
    ensure!(new_dir == dir, "a file is brought back into its own directory; move it afterwards");
    client.undelete(dir, chosen, &new_name).await.with_context(|| path.to_owned())?;
    Ok(())
}
