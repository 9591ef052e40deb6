//! What reading a log takes: each part of a segment is read about once, and what is handed out keeps no more than itself.

use std::{
    io,
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

use bytes::Bytes;
use clutch_log::{Event, Log as _, Outcome, conformance::SuiteSnapshots};
use clutch_log_store::Options;
use clutch_proto::mutants::{self, Mutant};
use clutch_runtime::{
    Disk, File,
    simulated::{NodeId as SimNode, World},
};

use super::*;

const BATCHES: u64 = 3000;
const BATCH_BYTES: usize = 300;

/// A disk that counts what is read of it.
struct Counting(Arc<dyn Disk>, Arc<AtomicU64>);

struct CountedFile(Box<dyn File>, Arc<AtomicU64>);

impl File for CountedFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let read = self.0.read_at(buffer, offset)?;
        self.1.fetch_add(buffer.len() as u64, Ordering::Relaxed);
        Ok(read)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }

    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }

    fn allocate(&self, end: u64) -> io::Result<()> {
        self.0.allocate(end)
    }

    fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.0.discard(offset, length)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }
}

impl Disk for Counting {
    fn open(&self, path: &Path, create: bool) -> io::Result<Box<dyn File>> {
        Ok(Box::new(CountedFile(self.0.open(path, create)?, self.1.clone())))
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        self.0.create_dir_all(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        self.0.list(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.0.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.0.remove(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.0.sync_dir(path)
    }

    fn exists(&self, path: &Path) -> bool {
        self.0.exists(path)
    }

    fn space(&self, path: &Path) -> io::Result<(u64, u64)> {
        self.0.space(path)
    }
}

async fn open(runtime: &Runtime) -> (Arc<RaftLog>, u64) {
    let peers =
        Peers::new(runtime.clone(), 7, 1, [0; 32], group::identities(runtime, 1), "", Arc::new(|_| None));
    let options = Options { node: 1, cluster: 7, ..Options::default() };
    let store = Store::open(runtime, "log".into(), options).expect("the store opens");
    let bytes = store.usage().bytes;
    let engine = RaftEngine::new(runtime.clone(), store, peers, Timing::default());
    let snapshots = Arc::new(SuiteSnapshots::default());
    let log = engine.open(clutch_log::LogId::CDC.into(), &parameters(&[1]), snapshots).await;
    (log.expect("the log opens"), bytes)
}

async fn write(runtime: Runtime) {
    let (log, _) = open(&runtime).await;
    let mut events = log.events(Position(1));
    let epoch = loop {
        if let Event::Leader { epoch, is_self: true, .. } = events.next().await.expect("the log goes on") {
            break epoch;
        }
    };
    for number in 0..BATCHES {
        let batch = vec![Bytes::from(vec![number as u8; BATCH_BYTES])];
        let outcome = log.propose(epoch, batch).expect("it leads").await;
        assert!(matches!(outcome, Outcome::Committed { .. }), "{outcome:?}");
    }
}

/// Reads all of the log from the disk: bytes of the log, and bytes that were read.
async fn read(mut runtime: Runtime) -> (u64, u64) {
    let read = Arc::new(AtomicU64::new(0));
    runtime.disk = Arc::new(Counting(runtime.disk.clone(), read.clone()));
    let (log, bytes) = open(&runtime).await;
    let before = read.load(Ordering::Relaxed);
    let (mut events, mut seen) = (log.events(Position(1)), 0);
    while seen < BATCHES {
        if let Event::Committed(_) = events.next().await.expect("the log goes on") {
            seen += 1;
        }
    }
    (bytes, read.load(Ordering::Relaxed) - before)
}

/// How many times the log's bytes are read.
fn times_read() -> u64 {
    let world = World::new(1);
    let node = world.node(SimNode(1));
    world.run(SimNode(1), Duration::from_secs(3600), write(node)).expect("all is written");
    world.kill(SimNode(1));
    let node = world.node(SimNode(1));
    let (bytes, read) = world.run(SimNode(1), Duration::from_secs(3600), read(node)).expect("all is read");
    assert!(bytes > BATCHES * BATCH_BYTES as u64, "the log is there: {bytes} bytes");
    read / bytes
}

#[test]
fn a_log_is_read_about_once_to_be_read() {
    let times = times_read();
    assert!(times < 4, "read {times} times");
}

#[test]
fn planted_bugs_are_found() {
    mutants::plant(Some(Mutant::CursorForgotten));
    let (is_planted, times) = (mutants::planted().is_some(), times_read());
    mutants::plant(None);
    assert_eq!(times >= 4, is_planted, "read {times} times");
}
