//! Snapshots of a replica's state, of which its log makes use: read where a member has one, received where another needs one.

use async_trait::async_trait;
use bytes::Bytes;

use crate::{LogFault, Position};

/// What a snapshot is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// The state has everything up to here, and nothing behind it.
    pub position: Position,
    /// The state's hash.
    pub hash: [u8; 16],
    /// Its files.
    pub files: Vec<SnapshotFile>,
}

/// A file of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotFile {
    /// Its name; empty where the snapshot is one file.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// CRC-32 of all of it.
    pub crc: u32,
}

/// The snapshots of one replica. A log asks for them when a member needs what was trimmed; nothing waits for it meanwhile.
#[async_trait]
pub trait Snapshots: Send + Sync {
    /// A snapshot that has `least` and may have more: the newest that there is, or one that is taken now.
    async fn take(&self, least: Position) -> Result<Manifest, LogFault>;
    /// Part of a file of the snapshot at `position`; fewer bytes at its end.
    async fn read(
        &self,
        position: Position,
        file: &str,
        offset: u64,
        bytes: usize,
    ) -> Result<Bytes, LogFault>;
    /// Begins to receive a snapshot; what was received of one before is thrown away.
    async fn receive(&self, manifest: &Manifest) -> Result<(), LogFault>;
    /// Part of the snapshot that is being received.
    async fn write(&self, position: Position, file: &str, offset: u64, bytes: Bytes) -> Result<(), LogFault>;
    /// All parts are there. Durable, and the same files with the same hash, when it returns.
    async fn commit(&self, manifest: &Manifest) -> Result<(), LogFault>;
}

/// For replicas whose log never needs a snapshot: there is nobody to have trimmed it.
pub struct NoSnapshots;

#[async_trait]
impl Snapshots for NoSnapshots {
    async fn take(&self, _: Position) -> Result<Manifest, LogFault> {
        Err(none())
    }

    async fn read(&self, _: Position, _: &str, _: u64, _: usize) -> Result<Bytes, LogFault> {
        Err(none())
    }

    async fn receive(&self, _: &Manifest) -> Result<(), LogFault> {
        Err(none())
    }

    async fn write(&self, _: Position, _: &str, _: u64, _: Bytes) -> Result<(), LogFault> {
        Err(none())
    }

    async fn commit(&self, _: &Manifest) -> Result<(), LogFault> {
        Err(none())
    }
}

fn none() -> LogFault {
    LogFault::Unsupported("this replica has no snapshots".into())
}
