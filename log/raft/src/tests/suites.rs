//! openraft's own suites: of what stores its log, of its state machine, and of the runtime that it asks.
//!
//! openraft asks no storage to refuse holes, and its suite makes some: logs that begin at their second record, and records that are
//! delivered without those before them. Ours refuses them at once, so the suite is given blank records in their place. And it makes
//! snapshots of its state machine, where ours are the replica's, which says that it has one.
//! It trims what was not delivered, too, after which ours could not start.

use std::{
    io,
    ops::RangeBounds,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::atomic::{AtomicU32, Ordering},
};

use clutch_log::Manifest;
use clutch_log_store::Options;
use futures_util::{Stream, TryStreamExt as _};
use openraft::{
    LogState, OptionalSend, RaftLogReader, SnapshotMeta as Meta, StorageError,
    entry::RaftEntry as _,
    storage::{EntryResponder, IOFlushed, RaftLogStorage, RaftStateMachine},
    testing::{
        log::{StoreBuilder, Suite},
        runtime,
    },
};

use super::*;
use crate::{
    delivered::Delivered,
    seam::SeamRuntime,
    storage::GroupLog,
    types::{Entry, LogId, RaftSnapshot, SnapshotMeta, StoredMembers, TypeConfig, Vote, position_of},
};

/// Blank records from an index up to an entry, in its reign.
fn blanks(from: u64, entry: &Entry) -> impl Iterator<Item = Entry> + use<> {
    let (until, leader) = (entry.log_id.index, entry.log_id.leader_id);
    (from..until).map(move |index| Entry::new_blank(LogId::new(leader, index)))
}

/// A log without holes, of which nothing is trimmed that was not delivered.
#[derive(Clone)]
struct Whole(GroupLog, Delivered);

impl RaftLogReader<TypeConfig> for Whole {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + std::fmt::Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, io::Error> {
        self.0.try_get_log_entries(range).await
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, io::Error> {
        self.0.limited_get_log_entries(start, end).await
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        self.0.read_vote().await
    }
}

impl RaftLogStorage<TypeConfig> for Whole {
    type LogReader = GroupLog;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        self.0.get_log_state().await
    }

    async fn get_log_reader(&mut self) -> GroupLog {
        self.0.get_log_reader().await
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        self.0.save_vote(vote).await
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        self.0.save_committed(committed).await
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        self.0.read_committed().await
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut entries: Vec<Entry> = entries.into_iter().collect();
        let next = self.0.last_id().map_or(0, |last| last.index + 1);
        let missing: Vec<Entry> = blanks(next, &entries[0]).collect();
        entries.splice(0..0, missing);
        self.0.append(entries, callback).await
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> Result<(), io::Error> {
        self.0.truncate_after(last).await
    }

    async fn purge(&mut self, id: LogId) -> Result<(), io::Error> {
        let (last, _) = self.1.applied_state().await?;
        let entries = self.0.try_get_log_entries(last.map_or(0, |last| last.index + 1)..=id.index).await?;
        self.1.apply(futures_util::stream::iter(entries.into_iter().map(|entry| Ok((entry, None))))).await?;
        self.0.purge(id).await
    }
}

/// What is delivered without holes, and of which there is a snapshot whenever one is asked for.
struct Snapped(Delivered);

impl RaftStateMachine<TypeConfig> for Snapped {
    type SnapshotData = Option<Manifest>;
    type SnapshotBuilder = Delivered;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembers), io::Error> {
        self.0.applied_state().await
    }

    async fn apply<S>(&mut self, mut entries: S) -> Result<(), io::Error>
    where
        S: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        while let Some((entry, responder)) = entries.try_next().await? {
            let (last, _) = self.0.applied_state().await?;
            let missing = last.into_iter().flat_map(|last| blanks(last.index + 1, &entry));
            let all = missing.map(|blank| Ok((blank, None))).collect::<Vec<_>>();
            let all = all.into_iter().chain([Ok((entry, responder))]);
            self.0.apply(futures_util::stream::iter(all)).await?;
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Delivered {
        let (last_log_id, last_membership) = self.0.applied_state().await.expect("it is in memory");
        self.0.has_snapshot(Meta { last_log_id, last_membership });
        self.0.get_snapshot_builder().await
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        manifest: Option<Manifest>,
    ) -> Result<(), io::Error> {
        let position = position_of(meta.last_log_id.expect("a snapshot of something").index);
        let manifest = manifest.unwrap_or(Manifest { position, hash: [0; 16], files: vec![] });
        self.0.install_snapshot(meta, Some(manifest)).await
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<RaftSnapshot>, io::Error> {
        self.0.get_current_snapshot().await
    }
}

/// Makes logs and what is delivered of them, each on a store of its own.
struct Builder(Runtime, AtomicU32);

impl StoreBuilder<TypeConfig, Whole, Snapped> for Builder {
    async fn build(&self) -> Result<((), Whole, Snapped), StorageError<TypeConfig>> {
        let number = self.1.fetch_add(1, Ordering::Relaxed);
        let options = Options { node: 1, cluster: 7, ..Options::default() };
        let store = Store::open(&self.0, format!("log{number}").into(), options).expect("the store opens");
        let group = store.group(clutch_log::LogId::CDC).expect("a group");
        let log = GroupLog::open(&self.0, group).expect("the log opens");
        let delivered = Delivered::open(log.clone()).expect("what is delivered");
        Ok(((), Whole(log, delivered.clone()), Snapped(delivered)))
    }
}

type Stored = Suite<TypeConfig, Whole, Snapped, Builder, ()>;

/// Runs a check in a world of its own; whether it holds.
fn holds<F, T, E>(check: impl FnOnce(Builder) -> F + Send + 'static) -> bool
where
    F: Future<Output = Result<T, E>> + Send + 'static,
    E: std::fmt::Display,
    T: Send + 'static,
{
    let ended = catch_unwind(AssertUnwindSafe(|| {
        let world = World::new(1);
        let builder = Builder(world.node(SimNode(1)), AtomicU32::new(0));
        world.run(SimNode(1), Duration::from_secs(600), async move {
            check(builder).await.map_err(|error| eprintln!("{error}"))
        })
    }));
    matches!(ended, Ok(Some(Ok(_))))
}

/// Runs checks of the suite, each on a log of its own, and names those that do not hold.
macro_rules! failed {
    ($($name:ident),* $(,)?) => {{
        let mut failed: Vec<&str> = Vec::new();
        $(if !holds(|builder| async move {
            let ((), log, delivered) = builder.build().await.expect("it builds");
            Stored::$name(log, delivered).await
        }) {
            failed.push(stringify!($name));
        })*
        failed
    }};
}

#[test]
fn storage() {
    let mut failed = failed![
        last_membership_in_log_initial,
        last_membership_in_log,
        last_membership_in_log_multi_step,
        get_membership_initial,
        get_membership_from_log_and_empty_sm,
        get_membership_from_empty_log_and_sm,
        get_membership_from_log_le_sm_last_applied,
        get_membership_from_log_gt_sm_last_applied_1,
        get_membership_from_log_gt_sm_last_applied_2,
        get_initial_state_without_init,
        get_initial_state_membership_from_empty_log_and_sm,
        get_initial_state_membership_from_sm_inlog_is_smaller,
        get_initial_state_membership_from_log_insm_is_smaller,
        get_initial_state_with_state,
        get_initial_state_last_log_gt_sm,
        get_initial_state_last_log_lt_sm,
        get_initial_state_inverted_log_order,
        get_initial_state_conflict_at_same_index,
        get_initial_state_log_ids,
        get_initial_state_re_apply_committed,
        save_vote,
        get_log_entries,
        limited_get_log_entries,
        leader_bounded_stream,
        entries_stream,
        try_get_log_entry,
        log_reader_reads_new_entries,
        initial_logs,
        get_log_state,
        get_log_id,
        last_id_in_log,
        last_applied_state,
        purge_logs_upto_0,
        purge_logs_upto_5,
        purge_logs_upto_20,
        delete_logs_after_11,
        delete_logs_after_5,
        delete_logs_after_0,
        delete_logs_after_none,
        append_to_log,
        snapshot_meta,
        snapshot_meta_optional,
        apply_single,
        apply_multiple
    ];
    if !holds(|builder| async move { Stored::transfer_snapshot(&builder).await }) {
        failed.push("transfer_snapshot");
    }
    assert_eq!(failed, Vec::<&str>::new());
}

#[test]
fn on_tokio() {
    runtime::Suite::<SeamRuntime>::test_all();
}

#[test]
fn in_a_world() {
    type OnSeam = runtime::Suite<SeamRuntime>;
    let world = World::new(1);
    let ran = world.run(SimNode(1), Duration::from_secs(600), async {
        OnSeam::test_spawn_join_handle().await;
        OnSeam::test_thread_rng().await;
        OnSeam::test_sleep().await;
        OnSeam::test_instant_arithmetic().await;
        OnSeam::test_instant_sub_instant().await;
        OnSeam::test_instant_saturating_duration_since().await;
        OnSeam::test_sleep_until().await;
        OnSeam::test_timeout().await;
        OnSeam::test_timeout_at().await;
    });
    assert!(ran.is_some(), "it ends");
}
