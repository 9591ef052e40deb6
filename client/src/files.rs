//! Directories, links, attributes and history.

use bytes::Bytes;
use clutch_proto::{
    InodeId, Refusal,
    cdc::{MakeDirectory, RemoveDirectory, RenameDirectory, RenameFile, cdc_request},
    listing::{self, DirEntry},
    shard::{
        CreateSymlink, EdgeReply, History, PastEdge, ReadDir, RenameInDirectory, SetAttributes, Stat,
        Undelete, Unlink, shard_reply::Reply, shard_request::Op,
    },
    types::{Attributes, Code},
};

use crate::{error::ClientError, path::Resolved, rpc::Client};

/// What a new file or directory gets.
#[derive(Clone, Copy, Debug, Default)]
pub struct FileAttributes {
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time in nanoseconds; 0 takes the time of the creation.
    pub mtime: u64,
}

/// Where a page of a directory begins; the default is the first one's begin. Valid as long as the directory is there,
/// whatever changes in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DirCursor {
    hash: u64,
    /// The last name of the page before, if its hash is the same.
    after: Bytes,
}

/// What was made.
#[derive(Clone, Copy, Debug)]
pub struct Created {
    /// The inode.
    pub id: InodeId,
    /// When its entry was made.
    pub created_at: u64,
}

pub(crate) fn created(reply: Reply) -> Result<Created, ClientError> {
    match reply {
        Reply::Edge(EdgeReply { target, created_at, .. }) => {
            let id = InodeId::from_wire(target).ok_or_else(|| ClientError::unexpected("an inode id"))?;
            Ok(Created { id, created_at })
        }
        _ => Err(ClientError::unexpected("an edge")),
    }
}

pub(crate) fn attributes_of(reply: Reply) -> Result<Attributes, ClientError> {
    match reply {
        Reply::Attributes(attributes) => Ok(attributes),
        _ => Err(ClientError::unexpected("attributes")),
    }
}

impl Client {
    /// An inode's attributes.
    pub async fn stat(&self, id: InodeId) -> Result<Attributes, ClientError> {
        attributes_of(self.shard(Op::Stat(Stat { id: id.raw() })).await?)
    }

    /// One page of a directory of at most so many entries (0: as many as the server likes), and where the next one
    /// begins; `None` after the last. The default cursor is the first page's.
    pub async fn read_dir_page(
        &self,
        dir: InodeId,
        cursor: &DirCursor,
        limit: u32,
    ) -> Result<(Vec<DirEntry>, Option<DirCursor>), ClientError> {
        let DirCursor { hash, after } = cursor.clone();
        let op = Op::ReadDir(ReadDir { dir: dir.raw(), cursor: hash, limit, after });
        match self.shard(op).await? {
            Reply::ReadDir(page) => {
                let next = DirCursor { hash: page.next_cursor, after: page.next_after };
                Ok((listing::entries(page.entries)?, Some(next).filter(|next| next.hash != 0)))
            }
            _ => Err(ClientError::unexpected("a page")),
        }
    }

    /// All entries of a directory, in the order of their names.
    pub async fn read_dir(&self, dir: InodeId) -> Result<Vec<DirEntry>, ClientError> {
        let mut entries = Vec::new();
        let mut cursor = Some(DirCursor::default());
        while let Some(at) = cursor {
            let (page, next) = self.read_dir_page(dir, &at, 0).await?;
            entries.extend(page);
            cursor = next;
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    /// Makes a directory.
    pub async fn make_directory(
        &self,
        parent: InodeId,
        name: &Bytes,
        attributes: FileAttributes,
    ) -> Result<Created, ClientError> {
        let FileAttributes { mode, uid, gid, mtime } = attributes;
        let op = MakeDirectory { parent: parent.raw(), name: name.clone(), mode, uid, gid, mtime };
        let reply = self.cdc(cdc_request::Op::MakeDirectory(op)).await?;
        let id = InodeId::from_wire(reply.id).ok_or_else(|| ClientError::unexpected("an inode id"))?;
        Ok(Created { id, created_at: reply.created_at })
    }

    /// Removes an empty directory.
    pub async fn remove_directory(&self, at: &Resolved) -> Result<(), ClientError> {
        self.inner.edges.forget(at.parent, &at.name);
        let op = RemoveDirectory {
            parent: at.parent.raw(),
            name: at.name.clone(),
            target: at.id.raw(),
            created_at: at.created_at,
        };
        let removed = self.cdc(cdc_request::Op::RemoveDirectory(op)).await.map(drop);
        // A lookup on the way may have found it again.
        self.inner.edges.forget(at.parent, &at.name);
        removed
    }

    /// Removes a file or symbolic link; it stays in the history until the policy says otherwise.
    pub async fn unlink(&self, at: &Resolved) -> Result<(), ClientError> {
        let op = Unlink {
            dir: at.parent.raw(),
            name: at.name.clone(),
            target: at.id.raw(),
            created_at: at.created_at,
        };
        self.shard(Op::Unlink(op)).await.map(drop)
    }

    /// Gives a file or directory another name or place, and returns it as it is found there. A file of the new name is
    /// replaced.
    pub async fn rename(
        &self,
        at: &Resolved,
        new_parent: InodeId,
        new_name: &Bytes,
    ) -> Result<Resolved, ClientError> {
        if at.name.is_empty() {
            return Err(Refusal::new(Code::InvalidArgument, "the root directory cannot be moved").into());
        }
        let forget = || {
            self.inner.edges.forget(at.parent, &at.name);
            self.inner.edges.forget(new_parent, new_name);
        };
        forget();
        let moved = self.rename_uncached(at, new_parent, new_name).await;
        // A lookup on the way may have found what was there before.
        forget();
        moved
    }

    async fn rename_uncached(
        &self,
        at: &Resolved,
        new_parent: InodeId,
        new_name: &Bytes,
    ) -> Result<Resolved, ClientError> {
        let (target, old_parent, old_name, created_at) =
            (at.id.raw(), at.parent.raw(), at.name.clone(), at.created_at);
        if new_parent == at.parent {
            let op = RenameInDirectory {
                dir: old_parent,
                old_name,
                target,
                created_at,
                new_name: new_name.clone(),
            };
            let made = created(self.shard(Op::RenameInDirectory(op)).await?)?;
            return Ok(Resolved { name: new_name.clone(), created_at: made.created_at, ..at.clone() });
        }
        let moved =
            |created_at| Resolved { parent: new_parent, name: new_name.clone(), created_at, ..at.clone() };
        let (new_parent, new_name) = (new_parent.raw(), new_name.clone());
        let op = if at.id.is_directory() {
            cdc_request::Op::RenameDirectory(RenameDirectory {
                target,
                old_parent,
                old_name,
                created_at,
                new_parent,
                new_name,
            })
        } else {
            cdc_request::Op::RenameFile(RenameFile {
                target,
                old_parent,
                old_name,
                created_at,
                new_parent,
                new_name,
            })
        };
        self.cdc(op).await.map(|reply| moved(reply.created_at))
    }

    /// Makes a symbolic link.
    pub async fn symlink(
        &self,
        dir: InodeId,
        name: &Bytes,
        target: Bytes,
        attributes: FileAttributes,
        replace: bool,
    ) -> Result<Created, ClientError> {
        let FileAttributes { uid, gid, mtime, .. } = attributes;
        let op = CreateSymlink { dir: dir.raw(), name: name.clone(), target, uid, gid, mtime, replace };
        created(self.shard(Op::CreateSymlink(op)).await?)
    }

    /// Changes what is set in the request, and nothing else.
    pub async fn set_attributes(
        &self,
        id: InodeId,
        change: SetAttributes,
    ) -> Result<Attributes, ClientError> {
        let op = Op::SetAttributes(SetAttributes { id: id.raw(), ..change });
        attributes_of(self.shard(op).await?)
    }

    /// What a directory, or one name in it, held before; oldest first.
    pub async fn history(&self, dir: InodeId, name: Option<&Bytes>) -> Result<Vec<PastEdge>, ClientError> {
        let mut past = self.edges_of(dir, name, false).await?;
        past.sort_by_key(|p| p.ended_at);
        Ok(past)
    }

    /// Present and past entries of a directory, or of one name in it, in the order of names and ends. Present ones have
    /// no end.
    pub async fn whole_history(
        &self,
        dir: InodeId,
        name: Option<&Bytes>,
    ) -> Result<Vec<PastEdge>, ClientError> {
        let mut all = self.edges_of(dir, name, true).await?;
        all.sort_by(|a, b| (&a.name, a.ended_at.wrapping_sub(1)).cmp(&(&b.name, b.ended_at.wrapping_sub(1))));
        Ok(all)
    }

    /// What a directory held at a time, as far as its history still goes; in the order of names.
    pub async fn read_dir_at(&self, dir: InodeId, time: u64) -> Result<Vec<PastEdge>, ClientError> {
        let mut all = self.whole_history(dir, None).await?;
        all.retain(|edge| edge.created_at <= time && (edge.ended_at == 0 || time < edge.ended_at));
        Ok(all)
    }

    async fn edges_of(
        &self,
        dir: InodeId,
        name: Option<&Bytes>,
        with_present: bool,
    ) -> Result<Vec<PastEdge>, ClientError> {
        let mut past = Vec::new();
        let mut after = Bytes::new();
        loop {
            let (page, next) = self.page_of_edges(dir, name, with_present, after).await?;
            past.extend(page);
            if next.is_empty() {
                return Ok(past);
            }
            after = next;
        }
    }

    /// A page of what a directory, or one name in it, held before: all of one name together, oldest first. Begin with
    /// nothing and go on with what was returned, until that is empty; a page may end within a name.
    pub async fn history_page(
        &self,
        dir: InodeId,
        name: Option<&Bytes>,
        after: Bytes,
    ) -> Result<(Vec<PastEdge>, Bytes), ClientError> {
        self.page_of_edges(dir, name, false, after).await
    }

    async fn page_of_edges(
        &self,
        dir: InodeId,
        name: Option<&Bytes>,
        with_present: bool,
        after: Bytes,
    ) -> Result<(Vec<PastEdge>, Bytes), ClientError> {
        let name = name.cloned().unwrap_or_default();
        let op = History { dir: dir.raw(), name, after, with_present };
        match self.shard(Op::History(op)).await? {
            Reply::History(page) => Ok((page.past, page.next)),
            _ => Err(ClientError::unexpected("a history")),
        }
    }

    /// Brings a deleted or replaced file back under a name that is free.
    pub async fn undelete(
        &self,
        dir: InodeId,
        past: &PastEdge,
        new_name: &Bytes,
    ) -> Result<Created, ClientError> {
        let op = Undelete {
            dir: dir.raw(),
            name: past.name.clone(),
            target: past.target,
            ended_at: past.ended_at,
            new_name: new_name.clone(),
        };
        created(self.shard(Op::Undelete(op)).await?)
    }
}
