//! What a client remembers for a while: entries of directories, and policies. Bounded in number and age.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use clutch_proto::{
    InodeId,
    mutants::{self, Mutant},
    name,
    shard::EdgeReply,
    types::DirectoryPolicy,
};
use quick_cache::sync::Cache;

/// Directory entries that were looked up lately: bounded in number and age.
pub(crate) struct EdgeCache {
    cache: Cache<(InodeId, Bytes), (EdgeReply, Duration)>,
    lifetime: Duration,
}

impl EdgeCache {
    pub(crate) fn new(entries_max: usize, lifetime: Duration) -> EdgeCache {
        EdgeCache { cache: Cache::new(entries_max.max(1)), lifetime }
    }

    pub(crate) fn get(&self, dir: InodeId, name: &Bytes, now: Duration) -> Option<EdgeReply> {
        let (edge, since) = self.cache.get(&(dir, known_as(name)))?;
        (now.saturating_sub(since) < self.lifetime).then_some(edge)
    }

    pub(crate) fn put(&self, dir: InodeId, name: &Bytes, edge: &EdgeReply, now: Duration) {
        if !self.lifetime.is_zero() {
            self.cache.insert((dir, known_as(name)), (*edge, now));
        }
    }

    pub(crate) fn forget(&self, dir: InodeId, name: &Bytes) {
        self.cache.remove(&(dir, known_as(name)));
    }
}

/// What an entry is found by.
fn known_as(name: &Bytes) -> Bytes {
    if mutants::is(Mutant::CachedByHash) {
        return Bytes::copy_from_slice(&name::hash63(name).to_be_bytes());
    }
    name.clone()
}

/// Policies that were looked up lately.
#[derive(Default)]
pub(crate) struct PolicyCache {
    pub(crate) known: BTreeMap<InodeId, (DirectoryPolicy, Duration)>,
}
