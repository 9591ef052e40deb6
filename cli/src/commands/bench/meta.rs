//! Rows of metadata operations.

use std::sync::Arc;

use anyhow::{Result, bail};
use bytes::Bytes;
use clutch_client::{Client, FileAttributes, Resolved};
use clutch_proto::InodeId;

use super::{Load, Root, Row, directory, measure};

/// Every operation that has a row, in the order in which they run.
pub(super) const OPERATIONS: [&str; 9] =
    ["mkdir", "create", "lookup", "stat", "readdir", "rename", "unlink", "rename-dir", "rmdir"];

/// What to run.
pub(super) struct Workload<'a> {
    /// Operations, of [`OPERATIONS`].
    pub(super) ops: &'a [String],
    /// Files that operations on files work on.
    pub(super) files: usize,
    /// Directories that operations on directories work on.
    pub(super) directories: usize,
    /// Directories that they are spread over, so that all shards have work.
    pub(super) parents: usize,
}

/// What was made and is there to work on.
struct Subjects {
    parents: Arc<Vec<InodeId>>,
    files: Arc<Vec<Resolved>>,
    directories: Vec<Resolved>,
}

pub(super) async fn rows(
    client: &Client,
    root: &Root,
    workload: &Workload<'_>,
    load: &Load,
) -> Result<Vec<Row>> {
    let ops = workload.ops;
    if let Some(unknown) = ops.iter().find(|op| !OPERATIONS.contains(&op.as_str())) {
        bail!("unknown operation {unknown:?}; there are {}", OPERATIONS.join(", "));
    }
    let mut parents = Vec::new();
    for i in 0..workload.parents {
        parents.push(client.make_directory(root.at.id, &Bytes::from(format!("d{i}")), directory()).await?.id);
    }
    let mut subjects =
        Subjects { parents: Arc::new(parents), files: Arc::default(), directories: Vec::new() };
    let asked = |op: &str| ops.iter().any(|asked| asked == op);
    let mut rows = Vec::new();
    for op in OPERATIONS {
        // What the operations work on is made without being measured when its own operation was not asked for.
        let is_needed = match op {
            "mkdir" => asked("rmdir"),
            "create" => ["lookup", "stat", "readdir", "rename", "unlink"].iter().any(|op| asked(op)),
            _ => false,
        };
        if asked(op) || is_needed {
            let row = run(op, workload, load, &mut subjects).await?;
            if asked(op) {
                rows.push(row);
            }
        }
    }
    Ok(rows)
}

async fn run(op: &str, workload: &Workload<'_>, load: &Load, subjects: &mut Subjects) -> Result<Row> {
    let parents = subjects.parents.clone();
    let files = subjects.files.clone();
    let ordinary = FileAttributes { mode: 0o644, ..FileAttributes::default() };
    Ok(match op {
        "mkdir" => {
            let each = move |client: Client, i: usize| {
                let dir = parents[i % parents.len()];
                async move {
                    let name = Bytes::from(format!("dir{i}"));
                    let made = client.make_directory(dir, &name, directory()).await?;
                    Ok(Resolved { id: made.id, parent: dir, name, created_at: made.created_at })
                }
            };
            let (row, made) = measure(load, op, workload.directories, each).await?;
            subjects.directories = made;
            row
        }
        "create" => {
            let each = move |client: Client, i: usize| {
                let dir = parents[i % parents.len()];
                async move {
                    let name = Bytes::from(format!("file{i}"));
                    let made =
                        client.write_file(dir, &name, ordinary, false, &mut tokio::io::empty()).await?;
                    Ok(Resolved { id: made.id, parent: dir, name, created_at: made.created_at })
                }
            };
            let (row, made) = measure(load, op, workload.files, each).await?;
            subjects.files = Arc::new(made);
            row
        }
        "lookup" => {
            let each = move |client: Client, i: usize| {
                let at = files[i].clone();
                async move {
                    client.lookup(at.parent, &at.name).await?;
                    Ok(())
                }
            };
            measure(load, op, workload.files, each).await?.0
        }
        "stat" => {
            let each = move |client: Client, i: usize| {
                let id = files[i].id;
                async move {
                    client.stat(id).await?;
                    Ok(())
                }
            };
            measure(load, op, workload.files, each).await?.0
        }
        "readdir" => {
            let each = move |client: Client, i: usize| {
                let dir = parents[i % parents.len()];
                async move { Ok(client.read_dir(dir).await?.len()) }
            };
            let few = Load { clients: load.clients.clone(), depth: load.depth.min(8) };
            let (mut row, entries) = measure(&few, op, subjects.parents.len() * 4, each).await?;
            row.entries = entries.iter().sum();
            row
        }
        "rename" => {
            let each = move |client: Client, i: usize| {
                let at = files[i].clone();
                async move {
                    let name = Bytes::from(format!("renamed{i}"));
                    let moved = client.rename(&at, at.parent, &name).await?;
                    Ok(Resolved { name, created_at: moved.created_at, ..at })
                }
            };
            let (row, moved) = measure(load, op, workload.files, each).await?;
            subjects.files = Arc::new(moved);
            row
        }
        "unlink" => {
            let each = move |client: Client, i: usize| {
                let at = files[i].clone();
                async move { Ok(client.unlink(&at).await?) }
            };
            measure(load, op, workload.files, each).await?.0
        }
        "rename-dir" => rename_directories(workload, load, &subjects.parents).await?,
        "rmdir" => {
            let targets = Arc::new(std::mem::take(&mut subjects.directories));
            let each = move |client: Client, i: usize| {
                let at = targets[i].clone();
                async move { Ok(client.remove_directory(&at).await?) }
            };
            measure(load, op, workload.directories, each).await?.0
        }
        other => bail!("operation {other:?} has no row"),
    })
}

/// Directories that move to and fro between two parents, each in a tree of its own.
async fn rename_directories(workload: &Workload<'_>, load: &Load, parents: &[InodeId]) -> Result<Row> {
    const OUTSTANDING: usize = 16;
    let client = &load.clients[0];
    let mut trees = Vec::new();
    for i in 0..OUTSTANDING {
        let parent = parents[i % parents.len()];
        let make =
            async |dir: InodeId, name: String| client.make_directory(dir, &name.into(), directory()).await;
        let here = make(parent, format!("here{i}")).await?.id;
        let there = make(parent, format!("there{i}")).await?.id;
        let moved = make(here, "moved".into()).await?;
        let at = Resolved { id: moved.id, parent: here, name: "moved".into(), created_at: moved.created_at };
        trees.push(tokio::sync::Mutex::new((at, there)));
    }
    let trees = Arc::new(trees);
    let each = move |client: Client, i: usize| {
        let trees = trees.clone();
        async move {
            let mut tree = trees[i % OUTSTANDING].lock().await;
            let (at, there) = tree.clone();
            let moved = client.rename(&at, there, &at.name).await?;
            *tree = (Resolved { parent: there, created_at: moved.created_at, ..at.clone() }, at.parent);
            Ok(())
        }
    };
    let clients: Vec<Client> = load.clients.iter().take(OUTSTANDING).cloned().collect();
    let few = Load { depth: OUTSTANDING.div_ceil(clients.len()), clients };
    Ok(measure(&few, "rename-dir", (workload.directories / 2).max(OUTSTANDING), each).await?.0)
}
