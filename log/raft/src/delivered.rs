//! What openraft takes for the state machine: how far the log is delivered. Readers read the log itself up to there.

use std::{io, sync::Arc};

use clutch_log::{Manifest, Position};
use futures_util::{Stream, TryStreamExt as _};
use openraft::{
    EntryPayload, OptionalSend, RaftSnapshotBuilder, SnapshotMeta as Meta, StoredMembership,
    storage::{EntryResponder, RaftStateMachine},
};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::{
    storage::GroupLog,
    types::{Command, LogId, RaftSnapshot, SnapshotMeta, StoredMembers, Taken, TypeConfig, position_of},
};

#[derive(Debug, Default)]
struct State {
    last: Option<LogId>,
    members: StoredMembers,
    sealed: Option<Position>,
    /// What the replica has a snapshot of, at least.
    snapshot: Option<SnapshotMeta>,
    /// The snapshot that was received last.
    restored: Option<Manifest>,
}

/// How far a group is delivered; cheap to clone.
#[derive(Clone)]
pub(crate) struct Delivered {
    log: GroupLog,
    state: Arc<Mutex<State>>,
    /// Counts changes, for those who wait for one.
    changed: Arc<watch::Sender<u64>>,
}

impl Delivered {
    /// As far as it was when the node stopped, or somewhat less.
    pub(crate) fn open(log: GroupLog) -> io::Result<Delivered> {
        let last = log.committed();
        let members = last.map_or(Ok(StoredMembership::default()), |last| log.members_at(last.index))?;
        let snapshot = match log.purged() {
            Some(purged) => {
                Some(Meta { last_log_id: Some(purged), last_membership: log.members_at(purged.index)? })
            }
            None => None,
        };
        let last_position = last.map_or(Position(0), |last| position_of(last.index));
        let sealed = log.group().view().sealed.filter(|sealed| *sealed <= last_position);
        let state = State { last, members, sealed, snapshot, restored: None };
        Ok(Delivered { log, state: Arc::new(Mutex::new(state)), changed: Arc::new(watch::Sender::new(0)) })
    }

    /// The last position that is delivered, and its reign.
    pub(crate) fn last(&self) -> (Position, u64) {
        let last = self.state.lock().last;
        last.map_or((Position(0), 0), |last| (position_of(last.index), last.leader_id.term))
    }

    /// Where the log was sealed, once that is delivered.
    pub(crate) fn sealed(&self) -> Option<Position> {
        self.state.lock().sealed
    }

    /// The snapshot that was received last.
    pub(crate) fn restored(&self) -> Option<Manifest> {
        self.state.lock().restored.clone()
    }

    /// Tells of every change from now on.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// The replica has a snapshot that reaches so far at least.
    pub(crate) fn has_snapshot(&self, meta: SnapshotMeta) {
        self.state.lock().snapshot = Some(meta);
    }

    pub(crate) fn tell(&self) {
        self.changed.send_modify(|count| *count += 1);
    }
}

impl RaftSnapshotBuilder<TypeConfig> for Delivered {
    type SnapshotData = Option<Manifest>;

    async fn build_snapshot(&mut self) -> Result<RaftSnapshot, io::Error> {
        let meta = self.state.lock().snapshot.clone();
        let meta = meta.ok_or_else(|| io::Error::other("the replica has no snapshot"))?;
        Ok(RaftSnapshot { meta, snapshot: None })
    }
}

impl RaftStateMachine<TypeConfig> for Delivered {
    type SnapshotData = Option<Manifest>;
    type SnapshotBuilder = Delivered;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembers), io::Error> {
        let state = self.state.lock();
        Ok((state.last, state.members.clone()))
    }

    async fn apply<S>(&mut self, mut entries: S) -> Result<(), io::Error>
    where
        S: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        while let Some((entry, responder)) = entries.try_next().await? {
            let id = entry.log_id;
            let taken = {
                let mut state = self.state.lock();
                assert!(
                    state.last.is_none_or(|last| last.index + 1 == id.index),
                    "{id} is delivered after {:?}",
                    state.last
                );
                state.last = Some(id);
                match entry.payload {
                    EntryPayload::Membership(members) => {
                        state.members = StoredMembership::new(Some(id), members);
                    }
                    EntryPayload::Normal(Command::Seal) => {
                        state.sealed = state.sealed.or(Some(position_of(id.index)));
                    }
                    EntryPayload::Normal(Command::Batch(_)) | EntryPayload::Blank => {}
                }
                match state.sealed {
                    Some(tail) if tail < position_of(id.index) => Taken::BehindSeal(tail),
                    _ => Taken::Delivered,
                }
            };
            self.tell();
            if let Some(responder) = responder {
                responder.send(taken);
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Delivered {
        self.clone()
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        manifest: Option<Manifest>,
    ) -> Result<(), io::Error> {
        let manifest = manifest.ok_or_else(|| io::Error::other("a snapshot without its manifest"))?;
        let last = meta.last_log_id.ok_or_else(|| io::Error::other("a snapshot of nothing"))?;
        // Before the replica takes it: a state may not be ahead of its log, whenever the power goes.
        self.log.begin_behind(last, &meta.last_membership).await?;
        self.log.runtime().note("raft: a log begins behind a snapshot");
        {
            let mut state = self.state.lock();
            state.last = meta.last_log_id;
            state.members = meta.last_membership.clone();
            state.snapshot = Some(meta.clone());
            state.restored = Some(manifest);
        }
        self.tell();
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<RaftSnapshot>, io::Error> {
        let meta = self.state.lock().snapshot.clone();
        Ok(meta.map(|meta| RaftSnapshot { meta, snapshot: None }))
    }
}
