//! From paths to inodes. Remote paths are absolute; `.` and `..` are resolved in the path itself.

use bytes::Bytes;
use clutch_proto::{
    InodeId, Refusal, name,
    shard::{EdgeReply, Lookup, shard_reply::Reply, shard_request::Op},
    types::Code,
};

use crate::{error::ClientError, rpc::Client};

/// Where a path leads.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// The inode.
    pub id: InodeId,
    /// The directory that holds it; the root's is the root.
    pub parent: InodeId,
    /// Its name there; empty for the root.
    pub name: Bytes,
    /// When the entry was made; what later requests must name.
    pub created_at: u64,
}

/// Whether a path says by its end that it means a directory: a slash, `.` or `..`.
pub fn means_directory(path: &[u8]) -> bool {
    path.ends_with(b"/") || path.ends_with(b"/.") || path.ends_with(b"/..")
}

/// A path for people; names need not be text.
fn shown(path: &[u8]) -> String {
    path.utf8_chunks().fold(String::new(), |mut text, chunk| {
        text.push_str(chunk.valid());
        chunk.invalid().iter().for_each(|byte| text.push_str(&format!("\\x{byte:02x}")));
        text
    })
}

/// The names of an absolute path, `.` and `..` resolved.
pub(crate) fn components(path: &[u8]) -> Result<Vec<Bytes>, ClientError> {
    if path.first() != Some(&b'/') {
        let text = format!("{:?} is not absolute; remote paths begin with /", shown(path));
        return Err(Refusal::invalid(text).into());
    }
    let mut names: Vec<Bytes> = Vec::new();
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => drop(names.pop()),
            part => {
                name::check(part)?;
                names.push(Bytes::copy_from_slice(part));
            }
        }
    }
    if names.len() > clutch_proto::limits::PATH_DEPTH_MAX {
        let text = format!(
            "a path of {} names; at most {} are allowed",
            names.len(),
            clutch_proto::limits::PATH_DEPTH_MAX
        );
        return Err(Refusal::new(Code::NameTooLong, text).into());
    }
    Ok(names)
}

fn in_path(error: ClientError, path: &[u8]) -> ClientError {
    match error {
        ClientError::Refused(refusal) if refusal.code == Code::NotFound => {
            Refusal::new(Code::NotFound, format!("{}: not found", shown(path))).into()
        }
        other => other,
    }
}

fn not_directory(path: &[u8], what: &str) -> ClientError {
    Refusal::new(Code::NotDirectory, format!("{}: {what}", shown(path))).into()
}

impl Client {
    /// Looks up one name, at the shard.
    pub async fn lookup(&self, dir: InodeId, name: &Bytes) -> Result<EdgeReply, ClientError> {
        let op = Op::Lookup(Lookup { dir: dir.raw(), name: name.clone() });
        match self.shard(op).await? {
            Reply::Edge(edge) => Ok(edge),
            _ => Err(ClientError::unexpected("an edge")),
        }
    }

    /// Looks up a directory on the way, believing what was found a moment ago.
    async fn lookup_cached(&self, dir: InodeId, name: &Bytes) -> Result<EdgeReply, ClientError> {
        let now = self.inner.runtime.clock.monotonic();
        if let Some(edge) = self.inner.edges.get(dir, name, now) {
            return Ok(edge);
        }
        let edge = self.lookup(dir, name).await?;
        self.inner.edges.put(dir, name, &edge, now);
        Ok(edge)
    }

    /// Resolves a path; the last name is always asked for anew. Symbolic links are not followed. A path whose end says that
    /// it means a directory is refused where it leads to something else.
    pub async fn resolve(&self, path: impl AsRef<[u8]> + Send) -> Result<Resolved, ClientError> {
        let path = path.as_ref();
        let names = components(path)?;
        let mut at = Resolved { id: InodeId::ROOT, parent: InodeId::ROOT, name: Bytes::new(), created_at: 0 };
        for (i, name) in names.iter().enumerate() {
            if !at.id.is_directory() {
                return Err(not_directory(path, "a part of it is not a directory"));
            }
            let found = match i + 1 == names.len() {
                true => self.lookup(at.id, name).await,
                false => self.lookup_cached(at.id, name).await,
            };
            let edge = found.map_err(|e| in_path(e, path))?;
            let id = InodeId::from_wire(edge.target).ok_or_else(|| ClientError::unexpected("an inode id"))?;
            at = Resolved { id, parent: at.id, name: name.clone(), created_at: edge.created_at };
        }
        if means_directory(path) && !at.id.is_directory() {
            return Err(not_directory(path, "not a directory"));
        }
        Ok(at)
    }

    /// Resolves a path that must lead to a directory.
    pub async fn resolve_directory(&self, path: impl AsRef<[u8]> + Send) -> Result<InodeId, ClientError> {
        let path = path.as_ref();
        let found = self.resolve(path).await?;
        if !found.id.is_directory() {
            return Err(not_directory(path, "not a directory"));
        }
        Ok(found.id)
    }

    /// The directory of a path's last name, and that name; the name itself need not exist.
    pub async fn resolve_parent(
        &self,
        path: impl AsRef<[u8]> + Send,
    ) -> Result<(InodeId, Bytes), ClientError> {
        let path = path.as_ref();
        let mut names = components(path)?;
        let Some(last) = names.pop() else {
            return Err(Refusal::new(Code::InvalidArgument, "the root directory cannot be the target").into());
        };
        let mut at = InodeId::ROOT;
        for name in &names {
            let edge = self.lookup_cached(at, name).await.map_err(|e| in_path(e, path))?;
            at = InodeId::from_wire(edge.target).ok_or_else(|| ClientError::unexpected("an inode id"))?;
            if !at.is_directory() {
                return Err(not_directory(path, "a part of it is not a directory"));
            }
        }
        Ok((at, last))
    }
}

#[cfg(test)]
mod tests {
    use super::{components, means_directory};

    #[test]
    fn paths_are_taken_apart() {
        let names = |path: &str| {
            components(path.as_bytes())
                .map(|n| n.iter().map(|n| String::from_utf8_lossy(n).into_owned()).collect::<Vec<_>>())
        };
        assert_eq!(names("/").expect("ok"), Vec::<String>::new());
        assert_eq!(names("//a/./b/../c/").expect("ok"), ["a", "c"]);
        assert_eq!(names("/../..").expect("ok"), Vec::<String>::new());
        assert!(
            means_directory(b"/a/")
                && means_directory(b"/a/.")
                && !means_directory(b"/a..")
                && means_directory(b"/")
        );
        assert!(names("a").is_err() && names("").is_err());
        assert!(names(&format!("/{}", "x".repeat(256))).is_err() && names("/a\0b").is_err());
    }
}
