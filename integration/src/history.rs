//! What clients asked and were told, in the order in which it happened.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use clutch_client::{AnsweredAt, Call, ClientError, Observer};
use clutch_proto::InodeId;
use clutch_runtime::Runtime;
use parking_lot::Mutex;

use crate::script::{Lane, Operation};

/// A request of a client to a shard or the CDC.
#[derive(Clone, Debug)]
pub struct Record {
    /// What was asked.
    pub call: Call,
    /// Its place among all beginnings and ends.
    pub began: u64,
    /// `None` for one that its caller never saw end.
    pub ended: Option<Ended>,
}

/// How a request ended.
#[derive(Clone, Debug)]
pub struct Ended {
    /// Its place among all beginnings and ends.
    pub order: u64,
    /// The answer.
    pub result: Result<Bytes, ClientError>,
    /// Where its log stood.
    pub at: AnsweredAt,
}

/// An operation of the script, done.
#[derive(Clone, Debug)]
pub struct Performed {
    /// When it began.
    pub began: Duration,
    /// When it ended.
    pub ended: Duration,
    /// Who did it.
    pub lane: Lane,
    /// What.
    pub operation: Operation,
    /// What came of it, in a few words.
    pub outcome: String,
}

/// Bytes that a client wanted to store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Data {
    /// What they are made from.
    pub salt: u64,
    /// How many.
    pub bytes: u32,
}

#[derive(Default)]
struct Inner {
    order: u64,
    records: Vec<Record>,
    performed: Vec<Performed>,
    /// What files hold as long as their contents are not told apart, by acknowledgement.
    stored: BTreeMap<InodeId, Data>,
    /// What contents hold whose ids their writers know; nothing when a part is not known.
    contents: BTreeMap<u64, Option<Arc<Vec<u8>>>>,
    violations: Vec<(&'static str, String)>,
}

/// Everything that clients saw.
#[derive(Default)]
pub struct History {
    inner: Mutex<Inner>,
}

impl History {
    /// Takes note of a finished operation.
    pub fn performed(&self, performed: Performed) {
        self.inner.lock().performed.push(performed);
    }

    /// Takes note of what a file holds.
    pub fn stored(&self, file: InodeId, data: Data) {
        self.inner.lock().stored.insert(file, data);
    }

    /// Takes note of what a content will hold, before anybody can see it; `None` when that is not known.
    pub fn content(&self, content: u64, bytes: Option<Vec<u8>>) {
        self.inner.lock().contents.insert(content, bytes.map(Arc::new));
    }

    /// What a content of a file must hold, as far as anybody can know.
    pub fn bytes_of_content(&self, file: InodeId, content: u64) -> Option<Arc<Vec<u8>>> {
        if content == 0 {
            return Some(Arc::default());
        }
        let inner = self.inner.lock();
        match inner.contents.get(&content) {
            Some(known) => known.clone(),
            None => inner.stored.get(&file).map(|data| Arc::new(bytes_of(*data))),
        }
    }

    /// Takes note of something that must not be, under the checker's name.
    pub fn violation(&self, checker: &'static str, what: String) {
        let mut inner = self.inner.lock();
        if inner.violations.len() < 50 {
            inner.violations.push((checker, what));
        }
    }

    /// What must not be.
    pub fn violations(&self) -> Vec<(&'static str, String)> {
        self.inner.lock().violations.clone()
    }

    /// All requests.
    pub fn take_records(&self) -> Vec<Record> {
        std::mem::take(&mut self.inner.lock().records)
    }

    /// All operations that ended.
    pub fn take_performed(&self) -> Vec<Performed> {
        std::mem::take(&mut self.inner.lock().performed)
    }
}

/// One client's eyes.
pub struct Watcher {
    /// Where what it sees goes.
    pub history: Arc<History>,
    /// The client's runtime.
    pub runtime: Runtime,
}

impl Observer for Watcher {
    fn began(&self, call: &Call) -> u64 {
        let mut inner = self.history.inner.lock();
        inner.order += 1;
        let began = inner.order;
        inner.records.push(Record { call: call.clone(), began, ended: None });
        inner.records.len() as u64 - 1
    }

    fn ended(&self, id: u64, result: Result<&Bytes, &ClientError>, at: AnsweredAt) {
        let mut inner = self.history.inner.lock();
        inner.order += 1;
        let ended = Ended { order: inner.order, result: result.cloned().map_err(Clone::clone), at };
        if let Some(record) = inner.records.get_mut(id as usize) {
            record.ended = Some(ended);
        }
    }
}

/// The bytes that a salt gives; salt 0 gives zeros.
pub fn bytes_of(data: Data) -> Vec<u8> {
    let mut bytes = vec![0; data.bytes as usize];
    if data.salt != 0 {
        for (i, chunk) in bytes.chunks_mut(8).enumerate() {
            let word = (data.salt.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ i as u64)
                .wrapping_mul(0xbf58_476d_1ce4_e5b9);
            chunk.copy_from_slice(&(word ^ word >> 31).to_le_bytes()[..chunk.len()]);
        }
    }
    bytes
}
