//! Snapshots for the suite: their only content is how far they are, so that one that is given a wrong name, cut or mixed up is
//! noticed.

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;

use crate::{LogFault, Manifest, Position, SnapshotFile, Snapshots};

/// Larger than what engines send at a time.
const LINES: u64 = 2_000;

#[derive(Default)]
struct State {
    applied: Position,
    kept: Option<Position>,
    receiving: Option<(Position, Vec<u8>)>,
}

/// What a member of the suite is restored from, and others from it.
#[derive(Default)]
pub struct SuiteSnapshots {
    state: Mutex<State>,
}

impl SuiteSnapshots {
    /// The member's replica has applied everything up to there.
    pub fn applied(&self, upto: Position) {
        let mut state = self.state.lock();
        state.applied = state.applied.max(upto);
    }
}

fn content(position: Position) -> Vec<u8> {
    (0..LINES).flat_map(|line| (position.0 * LINES + line).to_le_bytes()).collect()
}

fn named(position: Position) -> Manifest {
    let content = content(position);
    let crc = crc32fast::hash(&content);
    let files = vec![SnapshotFile { name: "rows".into(), bytes: content.len() as u64, crc }];
    Manifest { position, hash: [position.0 as u8; 16], files }
}

fn wrong(what: String) -> LogFault {
    LogFault::Storage(what)
}

#[async_trait]
impl Snapshots for SuiteSnapshots {
    async fn take(&self, least: Position) -> Result<Manifest, LogFault> {
        let mut state = self.state.lock();
        if state.applied < least {
            return Err(wrong(format!("it is at {}, {least} is asked for", state.applied)));
        }
        state.kept = Some(state.applied);
        Ok(named(state.applied))
    }

    async fn read(
        &self,
        position: Position,
        file: &str,
        offset: u64,
        bytes: usize,
    ) -> Result<Bytes, LogFault> {
        let kept = self.state.lock().kept;
        if kept != Some(position) || file != "rows" {
            return Err(wrong(format!("{file:?} of {position} is asked for, {kept:?} is there")));
        }
        let content = content(position);
        let from = content.len().min(offset as usize);
        let to = content.len().min(from + bytes);
        Ok(Bytes::copy_from_slice(&content[from..to]))
    }

    async fn receive(&self, manifest: &Manifest) -> Result<(), LogFault> {
        self.state.lock().receiving = Some((manifest.position, Vec::new()));
        Ok(())
    }

    async fn write(&self, position: Position, _: &str, offset: u64, bytes: Bytes) -> Result<(), LogFault> {
        let mut state = self.state.lock();
        match &mut state.receiving {
            Some((of, received)) if *of == position && received.len() as u64 == offset => {
                received.extend_from_slice(&bytes);
                Ok(())
            }
            other => Err(wrong(format!(
                "bytes at {offset} of {position} come into {:?}",
                other.as_ref().map(|(of, r)| (of, r.len()))
            ))),
        }
    }

    async fn commit(&self, manifest: &Manifest) -> Result<(), LogFault> {
        let mut state = self.state.lock();
        let whole = matches!(&state.receiving, Some((of, bytes)) if *of == manifest.position && *bytes == content(*of));
        assert!(whole && *manifest == named(manifest.position), "a snapshot is committed that is not whole");
        state.receiving = None;
        state.applied = state.applied.max(manifest.position);
        Ok(())
    }
}
