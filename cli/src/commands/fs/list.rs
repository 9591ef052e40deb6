//! The commands that only look.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result};
use clutch_client::{Client, ClientError};
use clutch_proto::{
    InodeId, InodeKind,
    listing::DirEntry,
    types::{Attributes, extent::Source},
};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use serde_json::{Value, json};

use crate::{output, remote::RemotePath};

/// Attributes that are asked for at a time.
const PARALLEL: usize = 64;

/// A name as a line has it: bytes for a program, characters that drive nothing for a terminal (see `output::line_of`).
fn raw(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

fn id_of(entry: &DirEntry) -> Result<InodeId> {
    InodeId::from_wire(entry.target).context("an inode id")
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

fn document(path: &RemotePath, attributes: &Attributes) -> Value {
    let id = InodeId::from_wire(attributes.id);
    let mut document = json!({
        "id": format!("{:x}", attributes.id),
        "kind": id.map_or("unknown", output::kind),
        "mode": format!("{:04o}", attributes.mode),
        "uid": attributes.uid,
        "gid": attributes.gid,
        "size": output::number(attributes.size),
        "nlink": attributes.nlink,
        "mtime": output::nanoseconds(attributes.mtime),
        "ctime": output::nanoseconds(attributes.ctime),
        "atime": output::nanoseconds(attributes.atime),
    });
    output::put_name(&mut document, "path", path.as_bytes());
    if id.is_some_and(|id| id.kind() == InodeKind::Symlink) {
        output::put_name(&mut document, "target", &attributes.symlink_target);
    }
    document
}

fn long_line(name: &[u8], attributes: &Attributes) -> Vec<u8> {
    let Some(id) = InodeId::from_wire(attributes.id) else { return name.to_vec() };
    let head = format!(
        "{} {:>2} {:>5} {:>5} {:>12} {} ",
        output::mode(id, attributes.mode),
        attributes.nlink,
        attributes.uid,
        attributes.gid,
        attributes.size,
        output::time(attributes.mtime)
    );
    match id.kind() {
        InodeKind::Symlink => raw(&[head.as_bytes(), name, b" -> ", &attributes.symlink_target]),
        InodeKind::Directory | InodeKind::File => raw(&[head.as_bytes(), name]),
    }
}

pub(super) async fn ls(
    client: &Client,
    path: &RemotePath,
    long: bool,
    recursive: bool,
    as_json: bool,
) -> Result<()> {
    let at = client.resolve(path).await?;
    if !at.id.is_directory() {
        let attributes = client.stat(at.id).await?;
        return match (as_json, long) {
            (true, _) => output::json(&json!({ "entries": [document(path, &attributes)] })),
            (false, true) => output::line_of(&long_line(path.as_bytes(), &attributes)),
            (false, false) => output::line_of(path.as_bytes()),
        };
    }
    let mut documents = Vec::new();
    let mut directories = vec![(path.trimmed(), at.id)];
    let mut first = true;
    while let Some((dir, id)) = directories.pop() {
        let entries = client.read_dir(id).await?;
        if recursive && !as_json {
            if !first {
                output::line("")?;
            }
            let shown: &[u8] = if dir.as_bytes().is_empty() { b"/" } else { dir.as_bytes() };
            output::line_of(&raw(&[shown, b":"]))?;
        }
        first = false;
        if recursive {
            let below = entries.iter().rev().filter(|e| id_of(e).is_ok_and(InodeId::is_directory));
            directories.extend(below.filter_map(|e| Some((dir.join(&e.name), id_of(e).ok()?))));
        }
        if long || as_json {
            for (entry, attributes) in with_attributes(client, entries).await? {
                if as_json {
                    let mut document = document(&dir.join(&entry.name), &attributes);
                    output::put_name(&mut document, "name", &entry.name);
                    documents.push(document);
                } else {
                    output::line_of(&long_line(&entry.name, &attributes))?;
                }
            }
        } else {
            for entry in entries {
                output::line_of(&entry.name)?;
            }
        }
    }
    if as_json { output::json(&json!({ "entries": documents })) } else { Ok(()) }
}

pub(super) async fn tree(client: &Client, path: &RemotePath, as_json: bool) -> Result<()> {
    let top = client.resolve_directory(path).await?;
    if as_json {
        return tree_document(client, path, top).await;
    }
    output::line_of(path.as_bytes())?;
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
        let branch = if last { "└── " } else { "├── " };
        output::line_of(&raw(&[prefix.as_bytes(), branch.as_bytes(), &entry.name]))?;
        let id = id_of(&entry)?;
        if id.is_directory() {
            directories += 1;
            let below = format!("{prefix}{}", if last { "    " } else { "│   " });
            push(&mut stack, &below, client.read_dir(id).await?);
        } else {
            files += 1;
        }
    }
    output::line("")?;
    output::line(format!("{directories} directories, {files} files"))
}

/// Prints a tree as one nested document while it is read: it may be deeper than any stack.
async fn tree_document(client: &Client, path: &RemotePath, top: InodeId) -> Result<()> {
    use std::io::Write as _;
    let mut out = std::io::BufWriter::new(std::io::stdout());
    let head = |name: &[u8], kind: &str| {
        let mut document = json!({ "kind": kind });
        output::put_name(&mut document, "name", name);
        document.to_string()
    };
    // A directory's document without its closing brace, and its entries.
    let open = |name: &[u8]| {
        let head = head(name, "directory");
        format!("{},\"entries\":[", &head[..head.len() - 1])
    };
    write!(out, "{}", open(path.as_bytes()))?;
    let mut way = vec![client.read_dir(top).await?.into_iter()];
    let mut is_first = true;
    while let Some(entries) = way.last_mut() {
        let Some(entry) = entries.next() else {
            way.pop();
            write!(out, "]}}")?;
            is_first = false;
            continue;
        };
        if !std::mem::replace(&mut is_first, false) {
            write!(out, ",")?;
        }
        let id = id_of(&entry)?;
        if id.is_directory() {
            write!(out, "{}", open(&entry.name))?;
            way.push(client.read_dir(id).await?.into_iter());
            is_first = true;
        } else {
            write!(out, "{}", head(&entry.name, output::kind(id)))?;
        }
    }
    writeln!(out)?;
    out.flush()?;
    Ok(())
}

/// Layouts that are asked for at a time.
const LAYOUTS_AT_A_TIME: usize = 32;

/// What files take on all disks and in the metadata. What several have in common counts once.
#[derive(Default)]
struct Physical {
    bytes: u128,
    spans: BTreeSet<u64>,
}

impl Physical {
    /// Of one file: bytes in the metadata, and its spans with the bytes of all their blocks.
    async fn of(client: &Client, file: InodeId) -> Result<(u64, Vec<(u64, u64)>)> {
        let (mut inline, mut spans) = (0, Vec::new());
        let (mut offset, mut content) = (0, 0);
        loop {
            let page = client.layout(file, content, offset).await?;
            for extent in &page.extents {
                if let Some(Source::Inline(data)) = &extent.source {
                    inline += data.len() as u64;
                }
            }
            spans.extend(page.spans.iter().map(|span| {
                let shape = span.shape.unwrap_or_default();
                (span.span_id, shape.stored_bytes(span.size))
            }));
            if page.next_offset <= offset {
                return Ok((inline, spans));
            }
            (offset, content) = (page.next_offset, page.content);
        }
    }

    async fn add(&mut self, client: &Client, files: impl IntoIterator<Item = InodeId>) -> Result<()> {
        let layouts = files.into_iter().map(|file| Physical::of(client, file));
        let mut layouts = stream::iter(layouts).buffer_unordered(LAYOUTS_AT_A_TIME);
        while let Some(layout) = layouts.next().await {
            let (inline, spans) = match layout {
                Ok(found) => found,
                // One that was removed meanwhile takes nothing.
                Err(error) if error.downcast_ref::<ClientError>().is_some_and(ClientError::is_not_found) => {
                    continue;
                }
                Err(error) => return Err(error),
            };
            self.bytes += u128::from(inline);
            for (span, bytes) in spans {
                self.bytes += if self.spans.insert(span) { u128::from(bytes) } else { 0 };
            }
        }
        Ok(())
    }
}

pub(super) async fn du(client: &Client, path: &RemotePath, as_json: bool) -> Result<()> {
    let at = client.resolve(path).await?;
    // Sizes go up to 2^62, and there may be many of them.
    let (mut bytes, mut files, mut directories) = (0u128, 0u64, 0u64);
    let mut physical = Physical::default();
    let mut queue = Vec::new();
    if at.id.is_directory() {
        queue.push(at.id);
    } else {
        (bytes, files) = (u128::from(client.stat(at.id).await?.size), 1);
        match at.id.kind() {
            InodeKind::File => physical.add(client, [at.id]).await?,
            _ => physical.bytes = bytes,
        }
    }
    let progress = output::counter("du");
    while let Some(dir) = queue.pop() {
        directories += 1;
        let (below, here): (Vec<_>, Vec<_>) =
            client.read_dir(dir).await?.into_iter().partition(|e| id_of(e).is_ok_and(InodeId::is_directory));
        queue.extend(below.iter().filter_map(|e| id_of(e).ok()));
        let mut with_bytes = Vec::new();
        for (entry, attributes) in with_attributes(client, here).await? {
            bytes += u128::from(attributes.size);
            files += 1;
            match id_of(&entry)?.kind() {
                InodeKind::File if attributes.size > 0 => with_bytes.push(id_of(&entry)?),
                // Where a link leads to lies in the metadata.
                _ => physical.bytes += u128::from(attributes.size),
            }
        }
        physical.add(client, with_bytes).await?;
        progress.set_message(format!("{files} files, {}", output::bytes(clamped(bytes))));
    }
    progress.finish_and_clear();
    if as_json {
        let sum =
            |bytes: u128| u64::try_from(bytes).map_or_else(|_| json!(bytes.to_string()), output::number);
        let mut document = json!({
            "bytes": sum(bytes), "physical_bytes": sum(physical.bytes), "files": files, "directories": directories,
        });
        output::put_name(&mut document, "path", path.as_bytes());
        return output::json(&document);
    }
    output::line(format!(
        "{} ({bytes} bytes) in {files} files and {directories} directories, {} on all disks",
        output::bytes(clamped(bytes)),
        output::bytes(clamped(physical.bytes))
    ))
}

fn clamped(bytes: u128) -> u64 {
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

pub(super) async fn stat(client: &Client, path: &RemotePath, as_json: bool) -> Result<()> {
    let at = client.resolve(path).await?;
    let attributes = client.stat(at.id).await?;
    let mut document = document(path, &attributes);
    if at.id.kind() == InodeKind::File {
        // All pages are of the content that the first one is of.
        let mut layout = client.layout(at.id, 0, 0).await?;
        let mut page = layout.next_offset;
        while page != 0 {
            let next = client.layout(at.id, layout.content, page).await?;
            page = if next.next_offset > page { next.next_offset } else { 0 };
            layout.extents.extend(next.extents);
            layout.spans.extend(next.spans);
        }
        layout.spans.sort_by_key(|span| span.span_id);
        layout.spans.dedup_by_key(|span| span.span_id);
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
    output::line_of(&raw(&[b"  path: ", path.as_bytes()]))?;
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
        output::line_of(&raw(&[b"target: ", &attributes.symlink_target]))?;
    }
    for span in document["spans"].as_array().into_iter().flatten() {
        output::line(format!("  span: {} {} bytes, {}", span["span"], span["size"], span["policy"]))?;
    }
    Ok(())
}

pub(super) async fn history(client: &Client, path: &RemotePath, as_json: bool) -> Result<()> {
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
                let mut document = json!({
                    "id": format!("{:x}", p.target), "created_at": output::nanoseconds(p.created_at),
                    "ended_at": output::nanoseconds(p.ended_at), "can_be_undeleted": p.owned,
                });
                output::put_name(&mut document, "name", &p.name);
                document
            })
            .collect();
        return output::json(&json!({ "past": past }));
    }
    for p in &past {
        let how = if p.owned { "deleted or replaced" } else { "moved away" };
        let (from, to) = (output::time(p.created_at), output::time(p.ended_at));
        let head = format!("{from} .. {to} ({}) {how} {:x} ", p.ended_at, p.target);
        output::line_of(&raw(&[head.as_bytes(), &p.name]))?;
    }
    Ok(())
}
