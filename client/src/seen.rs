//! How far a client has seen each log: what makes it read its own changes, whichever member answers.
//!
//! A transaction of the CDC changes shards whose positions it does not tell. After one, a client's next read of each shard is
//! therefore one that sees all, and positions count from there on.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use clutch_proto::mutants::{self, Mutant};

use crate::rpc::{Freshness, LogKey, lock};

#[derive(Default)]
pub(crate) struct Seen {
    /// Of each log: the highest position that was seen, and how many transactions had ended before a read that saw all.
    logs: Mutex<BTreeMap<LogKey, (u64, u64)>>,
    transactions: AtomicU64,
}

/// A request was begun after so many transactions.
#[derive(Clone, Copy)]
pub(crate) struct Began(u64);

impl Seen {
    pub(crate) fn begin(&self) -> Began {
        Began(self.transactions.load(Ordering::Acquire))
    }

    /// What a read must have seen to see all that this client has done and seen.
    pub(crate) fn freshness(&self, log: LogKey, began: Began) -> Freshness {
        let (position, transactions) = lock(&self.logs).get(&log).copied().unwrap_or_default();
        match transactions == began.0 || mutants::is(Mutant::TransactionsUnseen) {
            true => Freshness::Position(position),
            false => Freshness::Member,
        }
    }

    /// A request was answered.
    pub(crate) fn answered(&self, log: LogKey, began: Began, freshness: Freshness, position: u64) {
        if position == 0 {
            return;
        }
        let mut logs = lock(&self.logs);
        let seen = logs.entry(log).or_default();
        seen.0 = seen.0.max(position);
        // A read of a position may be answered by who has not heard of a transaction yet; all else comes behind it.
        if !matches!(freshness, Freshness::Position(_)) {
            seen.1 = seen.1.max(began.0);
        }
    }

    /// A transaction may have ended.
    pub(crate) fn transaction(&self) {
        self.transactions.fetch_add(1, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_a_transaction_each_shard_is_read_whole_once() {
        let (seen, shard, other) = (Seen::default(), (3, 0), (3, 1));
        let begin = || seen.begin();
        assert_eq!(seen.freshness(shard, begin()), Freshness::Position(0));
        seen.answered(shard, begin(), Freshness::Leader, 7);
        seen.answered(shard, begin(), Freshness::Position(7), 5);
        assert_eq!(seen.freshness(shard, begin()), Freshness::Position(7));
        let before = begin();
        seen.transaction();
        assert_eq!(seen.freshness(shard, begin()), Freshness::Member);
        seen.answered(shard, begin(), Freshness::Position(7), 9);
        assert_eq!(seen.freshness(shard, begin()), Freshness::Member, "it was answered by a follower");
        // A read that began before may have seen the moment before.
        seen.answered(shard, before, Freshness::Member, 10);
        assert_eq!(seen.freshness(shard, begin()), Freshness::Member);
        seen.answered(shard, begin(), Freshness::Member, 11);
        assert_eq!(seen.freshness(shard, begin()), Freshness::Position(11));
        assert_eq!(seen.freshness(other, begin()), Freshness::Member);
        seen.answered(other, begin(), Freshness::Leader, 3);
        assert_eq!(seen.freshness(other, begin()), Freshness::Position(3), "what was changed lies behind it");
    }
}
