//! Log and state machine of a node, in memory.

use std::{collections::BTreeMap, fmt, io, ops::RangeBounds, sync::Arc};

use futures_util::{Stream, TryStreamExt as _};
use openraft::{
    EntryPayload, LogState, OptionalSend, RaftLogReader, RaftSnapshotBuilder, Snapshot, SnapshotMeta,
    StoredMembership,
    storage::{EntryResponder, IOFlushed, RaftLogStorage, RaftStateMachine},
    type_config::alias::{EntryOf, LogIdOf, SnapshotMetaOf, SnapshotOf, StoredMembershipOf, VoteOf},
};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::TypeConfig;

pub(crate) type LogId = LogIdOf<TypeConfig>;
pub(crate) type Entry = EntryOf<TypeConfig>;
pub(crate) type Vote = VoteOf<TypeConfig>;
pub(crate) type Snap = SnapshotOf<TypeConfig, Vec<u8>>;

#[derive(Debug, Default)]
struct LogInner {
    vote: Option<Vote>,
    committed: Option<LogId>,
    purged: Option<LogId>,
    entries: BTreeMap<u64, Entry>,
}

/// The log of a node; durable as far as the process lives.
#[derive(Clone, Debug, Default)]
pub(crate) struct MemoryLog(Arc<Mutex<LogInner>>);

impl MemoryLog {
    pub(crate) fn entry(&self, index: u64) -> Option<Entry> {
        self.0.lock().entries.get(&index).cloned()
    }
}

impl RaftLogReader<TypeConfig> for MemoryLog {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + fmt::Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, io::Error> {
        Ok(self.0.lock().entries.range(range).map(|(_, entry)| entry.clone()).collect())
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(self.0.lock().vote)
    }
}

impl RaftLogStorage<TypeConfig> for MemoryLog {
    type LogReader = MemoryLog;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        let inner = self.0.lock();
        let last_log_id = inner.entries.last_key_value().map(|(_, entry)| entry.log_id).or(inner.purged);
        Ok(LogState { last_purged_log_id: inner.purged, last_log_id })
    }

    async fn get_log_reader(&mut self) -> MemoryLog {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        self.0.lock().vote = Some(*vote);
        Ok(())
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        self.0.lock().committed = committed;
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        Ok(self.0.lock().committed)
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        self.0.lock().entries.extend(entries.into_iter().map(|entry| (entry.log_id.index, entry)));
        callback.io_completed(Ok(()));
        Ok(())
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> Result<(), io::Error> {
        let from = last_log_id.map_or(0, |last| last.index + 1);
        drop(self.0.lock().entries.split_off(&from));
        Ok(())
    }

    async fn purge(&mut self, log_id: LogId) -> Result<(), io::Error> {
        let mut inner = self.0.lock();
        inner.entries = inner.entries.split_off(&(log_id.index + 1));
        inner.purged = Some(log_id);
        Ok(())
    }
}

#[derive(Debug, Default)]
struct DeliveredInner {
    last: Option<LogId>,
    membership: StoredMembershipOf<TypeConfig>,
}

/// What raft has delivered: index and term, and the membership. The entries are read from the log.
#[derive(Clone, Debug, Default)]
pub(crate) struct Delivered {
    inner: Arc<Mutex<DeliveredInner>>,
    index: watch::Sender<u64>,
}

impl Delivered {
    /// Index and term of the last entry.
    pub(crate) fn last(&self) -> (u64, u64) {
        self.inner.lock().last.map_or((0, 0), |last| (last.index, last.leader_id.term))
    }

    pub(crate) async fn wait_for(&self, index: u64) {
        // The sender is in this value, so it is not gone.
        let _ = self.index.subscribe().wait_for(|delivered| *delivered >= index).await;
    }
}

impl RaftSnapshotBuilder<TypeConfig> for Delivered {
    type SnapshotData = Vec<u8>;

    async fn build_snapshot(&mut self) -> Result<Snap, io::Error> {
        let inner = self.inner.lock();
        let meta = SnapshotMeta { last_log_id: inner.last, last_membership: inner.membership.clone() };
        Ok(Snapshot { meta, snapshot: Vec::new() })
    }
}

impl RaftStateMachine<TypeConfig> for Delivered {
    type SnapshotData = Vec<u8>;
    type SnapshotBuilder = Delivered;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembershipOf<TypeConfig>), io::Error> {
        let inner = self.inner.lock();
        Ok((inner.last, inner.membership.clone()))
    }

    async fn apply<S>(&mut self, mut entries: S) -> Result<(), io::Error>
    where
        S: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        while let Some((entry, responder)) = entries.try_next().await? {
            let id = entry.log_id;
            {
                let mut inner = self.inner.lock();
                inner.last = Some(id);
                if let EntryPayload::Membership(membership) = entry.payload {
                    inner.membership = StoredMembership::new(Some(id), membership);
                }
            }
            self.index.send_replace(id.index);
            if let Some(responder) = responder {
                responder.send(());
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Delivered {
        self.clone()
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMetaOf<TypeConfig>,
        _data: Vec<u8>,
    ) -> Result<(), io::Error> {
        let mut inner = self.inner.lock();
        inner.last = meta.last_log_id;
        inner.membership = meta.last_membership.clone();
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snap>, io::Error> {
        Ok(None)
    }
}
