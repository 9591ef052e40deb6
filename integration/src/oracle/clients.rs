//! What a log's entries are known by when they come again.

use std::collections::BTreeMap;

use clutch_proto::{
    limits::CLIENT_IDLE_LIFETIME_MS,
    types::{ClientTag, Code},
};

struct Client<R> {
    acknowledged: u64,
    outcomes: BTreeMap<u64, Result<R, Code>>,
}

/// The outcomes of every client, none of them ever forgotten.
pub(super) struct Clients<R> {
    clients: BTreeMap<u64, Client<R>>,
}

impl<R> Default for Clients<R> {
    fn default() -> Clients<R> {
        Clients { clients: BTreeMap::new() }
    }
}

impl<R: Clone> Clients<R> {
    fn client(&mut self, tag: &ClientTag) -> &mut Client<R> {
        self.clients
            .entry(tag.client)
            .or_insert_with(|| Client { acknowledged: 0, outcomes: BTreeMap::new() })
    }

    /// What is known of a tag at a time of the log; `None` when it may be executed.
    pub(super) fn admit(&mut self, tag: &ClientTag, time: u64) -> Option<Result<R, Code>> {
        if tag.client == 0 || tag.sequence == 0 || tag.acknowledged >= tag.sequence {
            return Some(Err(Code::Malformed));
        }
        let lifetime = CLIENT_IDLE_LIFETIME_MS * 1_000_000;
        if tag.client >= 16 && tag.issued_at < time.saturating_sub(lifetime) {
            return Some(Err(Code::ExpiredUnknown));
        }
        let client = self.client(tag);
        client.acknowledged = client.acknowledged.max(tag.acknowledged);
        // A client that acknowledged an outcome is not told it again.
        if tag.sequence <= client.acknowledged {
            return Some(Err(Code::Acknowledged));
        }
        client.outcomes.get(&tag.sequence).cloned()
    }

    /// Takes note of what came of a tag that was executed.
    pub(super) fn record(&mut self, tag: &ClientTag, outcome: &Result<R, Code>) {
        if !matches!(outcome, Err(code) if code.is_retryable()) {
            self.client(tag).outcomes.insert(tag.sequence, outcome.clone());
        }
    }
}
