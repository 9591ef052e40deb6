//! The commands that only look.

use anyhow::{Context as _, Result};
use clutch_client::Client;
use clutch_proto::{InodeId, InodeKind, listing::DirEntry, types::Attributes};
use futures_util::{StreamExt as _, TryStreamExt as _};
use serde_json::{Value, json};

use crate::output;

/// Attributes that are asked for at a time.
const PARALLEL: usize = 64;

fn shown(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}

fn id_of(entry: &DirEntry) -> Result<InodeId> {
    InodeId::from_wire(entry.target).context("an inode id")
}

fn join(dir: &str, name: &str) -> String {
    format!("{}/{name}", dir.trim_end_matches('/'))
}

async fn with_attributes(client: &Client, entries: Vec<DirEntry>) -> Result<Vec<(DirEntry, Attributes)>> {
    futures_util::stream::iter(entries)
        .map(|entry| async {
            let attributes = client.stat(id_of(&entry)?).await?;
            anyhow::Ok((entry, attributes))
        })
        .buffered(PARALLEL)
        .try_collect()
        .await
}

fn document(path: &str, attributes: &Attributes) -> Value {
    let id = InodeId::from_wire(attributes.id);
    let mut document = json!({
        "path": path,
        "id": format!("{:x}", attributes.id),
        "kind": id.map_or("unknown", output::kind),
        "mode": format!("{:04o}", attributes.mode),
        "uid": attributes.uid,
        "gid": attributes.gid,
        "size": attributes.size,
        "nlink": attributes.nlink,
        "mtime": attributes.mtime,
        "ctime": attributes.ctime,
        "atime": attributes.atime,
    });
    if id.is_some_and(|id| id.kind() == InodeKind::Symlink) {
        document["target"] = json!(shown(&attributes.symlink_target));
    }
    document
}

fn long_line(name: &str, attributes: &Attributes) -> String {
    let Some(id) = InodeId::from_wire(attributes.id) else { return name.to_owned() };
    let target = match id.kind() {
        InodeKind::Symlink => format!(" -> {}", shown(&attributes.symlink_target)),
        _ => String::new(),
    };
    format!(
        "{} {:>2} {:>5} {:>5} {:>12} {} {name}{target}",
        output::mode(id, attributes.mode),
        attributes.nlink,
        attributes.uid,
        attributes.gid,
        attributes.size,
        output::time(attributes.mtime)
    )
}

pub(super) async fn ls(
    client: &Client,
    path: &str,
    long: bool,
    recursive: bool,
    as_json: bool,
) -> Result<()> {
    let at = client.resolve(path).await?;
    if !at.id.is_directory() {
        let attributes = client.stat(at.id).await?;
        return match (as_json, long) {
            (true, _) => output::json(&json!({ "entries": [document(path, &attributes)] })),
            (false, true) => output::line(long_line(path, &attributes)),
            (false, false) => output::line(path),
        };
    }
    let mut documents = Vec::new();
    let mut directories = vec![(path.trim_end_matches('/').to_owned(), at.id)];
    let mut first = true;
    while let Some((dir, id)) = directories.pop() {
        let entries = client.read_dir(id).await?;
        if recursive && !as_json {
            output::line(format!(
                "{}{}:",
                if first { "" } else { "\n" },
                if dir.is_empty() { "/" } else { &dir }
            ))?;
        }
        first = false;
        if recursive {
            let below = entries.iter().rev().filter(|e| id_of(e).is_ok_and(InodeId::is_directory));
            directories.extend(below.filter_map(|e| Some((join(&dir, &shown(&e.name)), id_of(e).ok()?))));
        }
        if long || as_json {
            for (entry, attributes) in with_attributes(client, entries).await? {
                let name = shown(&entry.name);
                if as_json {
                    let mut document = document(&join(&dir, &name), &attributes);
                    document["name"] = json!(name);
                    documents.push(document);
                } else {
                    output::line(long_line(&name, &attributes))?;
                }
            }
        } else {
            for entry in entries {
                output::line(shown(&entry.name))?;
            }
        }
    }
    if as_json { output::json(&json!({ "entries": documents })) } else { Ok(()) }
}

pub(super) async fn tree(client: &Client, path: &str, as_json: bool) -> Result<()> {
    let top = client.resolve_directory(path).await?;
    if as_json {
        return output::json(&tree_document(client, path, top).await?);
    }
    output::line(path)?;
    let (mut directories, mut files) = (0u64, 0u64);
    // What is still to be printed, the next one last: prefix, entry, whether it is the last of its directory.
    let mut stack: Vec<(String, DirEntry, bool)> = Vec::new();
    let push = |stack: &mut Vec<_>, prefix: &str, entries: Vec<DirEntry>| {
        let count = entries.len();
        let numbered = entries.into_iter().enumerate().rev();
        stack.extend(numbered.map(|(i, entry)| (prefix.to_owned(), entry, i + 1 == count)));
    };
    push(&mut stack, "", client.read_dir(top).await?);
    while let Some((prefix, entry, last)) = stack.pop() {
        output::line(format!("{prefix}{}{}", if last { "└── " } else { "├── " }, shown(&entry.name)))?;
        let id = id_of(&entry)?;
        if id.is_directory() {
            directories += 1;
            let below = format!("{prefix}{}", if last { "    " } else { "│   " });
            push(&mut stack, &below, client.read_dir(id).await?);
        } else {
            files += 1;
        }
    }
    output::line(format!("\n{directories} directories, {files} files"))
}

fn tree_document<'a>(
    client: &'a Client,
    name: &'a str,
    dir: InodeId,
) -> std::pin::Pin<Box<dyn Future<Output = Result<Value>> + Send + 'a>> {
    Box::pin(async move {
        let mut entries = Vec::new();
        for entry in client.read_dir(dir).await? {
            let (id, name) = (id_of(&entry)?, shown(&entry.name));
            entries.push(match id.is_directory() {
                true => tree_document(client, &name, id).await?,
                false => json!({ "name": name, "kind": output::kind(id) }),
            });
        }
        Ok(json!({ "name": name, "kind": "directory", "entries": entries }))
    })
}

pub(super) async fn du(client: &Client, path: &str, as_json: bool) -> Result<()> {
    let at = client.resolve(path).await?;
    let (mut bytes, mut files, mut directories) = (0u64, 0u64, 0u64);
    let mut queue = Vec::new();
    if at.id.is_directory() {
        queue.push(at.id);
    } else {
        (bytes, files) = (client.stat(at.id).await?.size, 1);
    }
    let progress = output::counter("du");
    while let Some(dir) = queue.pop() {
        directories += 1;
        let (below, here): (Vec<_>, Vec<_>) =
            client.read_dir(dir).await?.into_iter().partition(|e| id_of(e).is_ok_and(InodeId::is_directory));
        queue.extend(below.iter().filter_map(|e| id_of(e).ok()));
        for (_, attributes) in with_attributes(client, here).await? {
            bytes += attributes.size;
            files += 1;
        }
        progress.set_message(format!("{files} files, {}", output::bytes(bytes)));
    }
    progress.finish_and_clear();
    if as_json {
        return output::json(
            &json!({ "path": path, "bytes": bytes, "files": files, "directories": directories }),
        );
    }
    output::line(format!(
        "{} ({bytes} bytes) in {files} files and {directories} directories",
        output::bytes(bytes)
    ))
}

pub(super) async fn stat(client: &Client, path: &str, as_json: bool) -> Result<()> {
    let at = client.resolve(path).await?;
    let attributes = client.stat(at.id).await?;
    let mut document = document(path, &attributes);
    if at.id.kind() == InodeKind::File {
        let layout = client.layout(at.id, 0, 0).await?;
        document["extents"] = json!(layout.extents.len());
        let spans: Vec<_> = layout
            .spans
            .iter()
            .map(|span| {
                let shape = span.shape.unwrap_or_default();
                json!({
                    "span": format!("{:x}", span.span_id),
                    "size": span.size,
                    "policy": format!("{}+{}", shape.data_blocks, shape.parity_blocks),
                    "blocks": span.blocks.iter().map(|b| json!({
                        "block": format!("{:016x}", b.block_id),
                        "service": format!("{:016x}", b.service_id),
                    })).collect::<Vec<_>>(),
                })
            })
            .collect();
        document["spans"] = json!(spans);
    }
    if as_json {
        return output::json(&document);
    }
    output::line(format!("  path: {path}"))?;
    output::line(format!("    id: {} ({}, slot {})", at.id, output::kind(at.id), at.id.slot().0))?;
    output::line(format!("  mode: {:04o} {}", attributes.mode, output::mode(at.id, attributes.mode)))?;
    output::line(format!(" owner: {}:{}", attributes.uid, attributes.gid))?;
    output::line(format!("  size: {}", attributes.size))?;
    for (what, time) in
        [("mtime", attributes.mtime), ("ctime", attributes.ctime), ("atime", attributes.atime)]
    {
        output::line(format!(" {what}: {}.{:09} UTC", output::time(time), time % 1_000_000_000))?;
    }
    if at.id.kind() == InodeKind::Symlink {
        output::line(format!("target: {}", shown(&attributes.symlink_target)))?;
    }
    for span in document["spans"].as_array().into_iter().flatten() {
        output::line(format!("  span: {} {} bytes, {}", span["span"], span["size"], span["policy"]))?;
    }
    Ok(())
}

pub(super) async fn history(client: &Client, path: &str, as_json: bool) -> Result<()> {
    let (dir, name) = match client.resolve(path).await {
        Ok(at) if at.id.is_directory() => (at.id, None),
        Ok(at) => (at.parent, Some(at.name)),
        Err(error) if error.is_not_found() => {
            let (dir, name) = client.resolve_parent(path).await?;
            (dir, Some(name))
        }
        Err(error) => return Err(error.into()),
    };
    let past = client.history(dir, name.as_ref()).await?;
    if as_json {
        let past: Vec<_> = past
            .iter()
            .map(|p| {
                json!({
                    "name": shown(&p.name), "id": format!("{:x}", p.target), "created_at": p.created_at,
                    "ended_at": p.ended_at, "can_be_undeleted": p.owned,
                })
            })
            .collect();
        return output::json(&json!({ "past": past }));
    }
    for p in &past {
        let how = if p.owned { "deleted or replaced" } else { "moved away" };
        let (from, to) = (output::time(p.created_at), output::time(p.ended_at));
        output::line(format!("{from} .. {to} ({}) {how} {:x} {}", p.ended_at, p.target, shown(&p.name)))?;
    }
    Ok(())
}
