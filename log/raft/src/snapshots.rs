//! Snapshots between members: the leader says which it has, and who needs it fetches it piece by piece.
//!
//! Invariants: a snapshot is whole, durable and has been looked at before the log begins behind it; one that is not ahead of the
//! member's own records is not taken, because openraft would go back.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use clutch_log::{LogFault, LogletId, Manifest, NodeId, Position, SnapshotFile, Snapshots};
use clutch_runtime::Runtime;
use parking_lot::Mutex;

use crate::{
    codec::{Builder, Kind, Reader},
    network::meta_of,
    peers::Peers,
    storage::GroupLog,
    types::{LogId, SnapshotMeta, index_of, position_of},
};

/// Bytes of a file that are asked for at a time.
const PIECE_BYTES: usize = 256 << 10;
/// How long a piece may take.
const PIECE_PATIENCE: Duration = Duration::from_secs(5);

fn failed(what: impl std::fmt::Display) -> LogFault {
    LogFault::Storage(what.to_string())
}

/// What a member has for others.
pub(crate) struct Sent {
    pub(crate) log: GroupLog,
    pub(crate) snapshots: Arc<dyn Snapshots>,
}

impl Sent {
    /// A snapshot that reaches `least` at least, with what the log knows of its end.
    pub(crate) async fn offered(&self, least: Option<LogId>) -> Result<(SnapshotMeta, Manifest), LogFault> {
        let least = least.map_or(Position(0), |least| position_of(least.index));
        let manifest = self.snapshots.take(least).await?;
        let index = index_of(manifest.position).ok_or_else(|| failed("a snapshot of nothing"))?;
        let id = self.log.id_at(index).map_err(failed)?;
        let id = id.ok_or_else(|| failed(format!("no record at {} of a snapshot", manifest.position)))?;
        Ok((meta_of(id, self.log.members_at(index).map_err(failed)?), manifest))
    }

    /// A piece of a file.
    pub(crate) async fn read(&self, body: Bytes) -> Result<Bytes, String> {
        let mut from = Reader(body);
        let read = (|| {
            let read = (Position(from.u64()?), from.bytes()?, from.u64()?, from.u32()? as usize);
            from.end()?;
            Ok::<_, crate::codec::Malformed>(read)
        })();
        let (position, name, offset, bytes) = read.map_err(|error| error.to_string())?;
        let name = std::str::from_utf8(&name).map_err(|error| error.to_string())?;
        let piece = self.snapshots.read(position, name, offset, bytes.min(PIECE_BYTES)).await;
        let piece = piece.map_err(|fault| fault.to_string())?;
        Ok(Builder::default().u32(crc32fast::hash(&piece) as usize).bytes(&piece).done())
    }
}

/// How far a snapshot has come.
struct Coming {
    manifest: Manifest,
    /// The file that comes, and the bytes of it that are here.
    file: usize,
    offset: u64,
}

/// What a member gets of others, one at a time.
pub(crate) struct Received {
    runtime: Runtime,
    peers: Arc<Peers>,
    id: LogletId,
    snapshots: Arc<dyn Snapshots>,
    coming: tokio::sync::Mutex<Option<Coming>>,
    whole: Mutex<Option<Manifest>>,
}

impl Received {
    pub(crate) fn new(
        runtime: Runtime,
        peers: Arc<Peers>,
        id: LogletId,
        snapshots: Arc<dyn Snapshots>,
    ) -> Received {
        let (coming, whole) = (tokio::sync::Mutex::new(None), Mutex::new(None));
        Received { runtime, peers, id, snapshots, coming, whole }
    }

    /// Asks a member for a snapshot that reaches `least` at least, and receives it.
    pub(crate) async fn fetch(&self, from: NodeId, least: Position) -> Result<Manifest, LogFault> {
        let body = Builder::default().u64(least.0).done();
        let answer = self.peers.ask(from, self.id, Kind::Take, body, PIECE_PATIENCE).await.map_err(failed)?;
        let manifest = Reader(answer).manifest().map_err(failed)?;
        if manifest.position < least {
            return Err(failed(format!("node {from} offers {}, and {least} is needed", manifest.position)));
        }
        self.receive(from, manifest.clone()).await?;
        Ok(manifest)
    }

    /// Receives a snapshot of a member; where one that was cut off is the same, it is gone on with.
    pub(crate) async fn receive(&self, from: NodeId, manifest: Manifest) -> Result<(), LogFault> {
        let mut coming = self.coming.lock().await;
        if self.whole.lock().as_ref() == Some(&manifest) {
            return Ok(());
        }
        let mut is = match coming.take().filter(|is| is.manifest == manifest) {
            Some(is) => {
                self.runtime.note("raft: a snapshot is gone on with");
                is
            }
            None => {
                self.snapshots.receive(&manifest).await?;
                Coming { manifest, file: 0, offset: 0 }
            }
        };
        while let Some(SnapshotFile { name, bytes, .. }) = is.manifest.files.get(is.file).cloned() {
            if is.offset == bytes {
                (is.file, is.offset) = (is.file + 1, 0);
                continue;
            }
            let piece = match self.piece(from, &is, &name).await {
                Ok(piece) => piece,
                Err(fault) => {
                    self.runtime.note("raft: a snapshot is cut off");
                    *coming = Some(is);
                    return Err(fault);
                }
            };
            let length = piece.len() as u64;
            self.snapshots.write(is.manifest.position, &name, is.offset, piece).await?;
            is.offset += length;
        }
        self.snapshots.commit(&is.manifest).await?;
        *self.whole.lock() = Some(is.manifest);
        Ok(())
    }

    async fn piece(&self, from: NodeId, is: &Coming, name: &str) -> Result<Bytes, LogFault> {
        let left = is.manifest.files[is.file].bytes - is.offset;
        let bytes = PIECE_BYTES.min(usize::try_from(left).unwrap_or(PIECE_BYTES));
        let mut body = Builder::default();
        body.u64(is.manifest.position.0).bytes(name.as_bytes()).u64(is.offset).u32(bytes);
        let asked = self.peers.ask(from, self.id, Kind::Read, body.done(), PIECE_PATIENCE);
        let mut answer = Reader(asked.await.map_err(failed)?);
        let (crc, piece) = (answer.u32().map_err(failed)?, answer.bytes().map_err(failed)?);
        answer.end().map_err(failed)?;
        if crc32fast::hash(&piece) != crc || piece.is_empty() || piece.len() > bytes {
            return Err(failed(format!("what node {from} sends of {name:?} is not what it read")));
        }
        Ok(piece)
    }
}
