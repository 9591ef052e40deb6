//! The suite that every log engine must pass. An engine brings a [`Harness`]; a failed check panics with what
//! was expected. What an engine cannot do, a harness says, and the checks of that are left out.

mod members;
mod readers;
mod sealing;
mod snapshots;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use clutch_proto::limits::{BATCH_BYTES_MAX, BATCH_ENTRIES_MAX};
use clutch_runtime::Runtime;

use crate::{
    Batch, ConfigId, Epoch, Event, Events, Floors, Log, LogFault, NodeId, Outcome, Position, Refused,
    Rejected,
};

pub use members::Part;
pub use snapshots::SuiteSnapshots;

/// How the suite handles an engine.
#[async_trait]
pub trait Harness: Send + Sync {
    /// What the suite waits with.
    fn runtime(&self) -> Runtime;
    /// The log as the node sees it that leads, or will soon.
    async fn leader(&self) -> Arc<dyn Log>;
    /// Every log handle of the group; the leader's among them.
    async fn all(&self) -> Vec<Arc<dyn Log>>;
    /// Ends the present reign: another node leads after, or the same one in a new epoch. Old handles of the
    /// engine stay usable where the engine allows it.
    async fn change_leader(&self);
    /// Stops every node and starts it again from what is durable. False where the engine keeps nothing.
    async fn restart(&self) -> bool;
    /// Whether members that do not lead answer barriers, too.
    fn any_member_answers(&self) -> bool;
    /// Makes the next proposal's outcome unknown; `committed` says whether it takes effect. False where the
    /// engine cannot be made to.
    async fn make_next_unknown(&self, committed: bool) -> bool;
    /// Every member with its id; one where the engine has no more.
    async fn members(&self) -> Vec<Part>;
    /// Cuts a member off all others, or joins it again. False where the engine has one member.
    async fn cut_off(&self, node: NodeId, is_cut_off: bool) -> bool;
    /// Stops a member, takes all that it has, and starts it again under its id. False where the engine cannot.
    async fn wipe(&self, node: NodeId) -> bool;
    /// Whether members are restored from snapshots; those of the suite are [`SuiteSnapshots`].
    fn restores(&self) -> bool;
    /// A member's replica has applied everything up to there.
    async fn applied(&self, node: NodeId, upto: Position);
}

const PATIENCE: Duration = Duration::from_secs(30);

fn entry(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

/// A reader that keeps what it saw.
struct Reader {
    events: Box<dyn Events>,
    runtime: Runtime,
    seen: Vec<Batch>,
    last: Position,
    epoch: Epoch,
    leads: bool,
    /// Where it was restored last.
    restored: Position,
}

impl Reader {
    fn new(log: &Arc<dyn Log>, runtime: &Runtime, from: Position) -> Reader {
        let last = Position(from.0.saturating_sub(1));
        let events = log.events(from);
        Reader {
            events,
            runtime: runtime.clone(),
            seen: Vec::new(),
            last,
            epoch: Epoch(0),
            leads: false,
            restored: Position(0),
        }
    }

    /// Reads until `done`, checking order on the way.
    async fn until(&mut self, what: &str, mut done: impl FnMut(&Reader, &Event) -> bool) {
        loop {
            let next = self.runtime.timeout(PATIENCE, self.events.next()).await;
            let event =
                next.unwrap_or_else(|| panic!("nothing more while waiting for {what}")).expect("events");
            self.take(event.clone());
            if done(self, &event) {
                return;
            }
        }
    }

    /// Takes note of an event and checks that it may come now.
    fn take(&mut self, event: Event) {
        match &event {
            Event::Committed(batch) => {
                assert!(
                    batch.position > self.last,
                    "positions increase: {} after {}",
                    batch.position,
                    self.last
                );
                assert!(batch.epoch >= self.epoch, "{:?} after {:?} was told", batch.epoch, self.epoch);
                self.last = batch.position;
                self.seen.push(batch.clone());
            }
            Event::Gap { to } => {
                assert!(*to > self.last, "a gap moves on: {to} after {}", self.last);
                self.last = *to;
            }
            Event::Leader { epoch, leader, is_self } => {
                assert!(*epoch >= self.epoch, "epochs never go back");
                let is_end = self.leads && !is_self;
                assert!(!is_end || *epoch == self.epoch, "{:?} ends under {epoch:?}", self.epoch);
                assert!(
                    !(self.leads && *is_self),
                    "the end of {:?} was not told before {epoch:?}",
                    self.epoch
                );
                assert!(!is_self || leader.is_some(), "who leads knows its own id");
                (self.epoch, self.leads) = (*epoch, *is_self);
            }
            Event::Restore(snapshot) => {
                assert!(
                    snapshot.position > self.last,
                    "a snapshot moves on: {} after {}",
                    snapshot.position,
                    self.last
                );
                (self.last, self.restored) = (snapshot.position, snapshot.position);
            }
            Event::Sealed { tail } => assert!(*tail >= self.last),
        }
    }

    /// How often a text is in what was read.
    fn times(&self, text: &str) -> usize {
        self.seen.iter().flat_map(|batch| &batch.entries).filter(|bytes| **bytes == text).count()
    }

    async fn until_leading(&mut self) -> Epoch {
        if !self.leads {
            self.until("leadership", |_, e| matches!(e, Event::Leader { is_self: true, .. })).await;
        }
        self.epoch
    }

    async fn until_position(&mut self, position: Position) {
        if self.last < position {
            self.until("a position", |r, _| r.last >= position).await;
        }
    }
}

/// Proposes until the engine takes it: leaders may come and go for reasons of their own.
async fn committed(harness: &dyn Harness, text: &str) -> Position {
    for _ in 0..1500 {
        let log = harness.leader().await;
        let mut reader = Reader::new(&log, &harness.runtime(), log.status().bounds.last.next());
        // Who leads now may not be who led when it was asked for.
        let leads = harness.runtime().timeout(Duration::from_secs(2), reader.until_leading()).await;
        let Some(epoch) = leads else { continue };
        match log.propose(epoch, vec![entry(text)]) {
            Ok(commit) => match commit.await {
                Outcome::Committed(position) => return position,
                // Elections happen when a machine is busy; the same text may then be in the log twice.
                Outcome::Unknown | Outcome::Refused(Refused::NoRoom | Refused::NotLeader { .. }) => {
                    harness.runtime().clock.sleep(Duration::from_millis(20)).await
                }
                Outcome::Sealed => panic!("nobody has sealed the log"),
            },
            Err(Rejected::NotLeader { .. } | Rejected::Overloaded) => {
                harness.runtime().clock.sleep(Duration::from_millis(20)).await;
            }
            Err(other) => panic!("rejected: {other}"),
        }
    }
    panic!("no leader takes {text}");
}

/// What an engine must do to be called a log: order, epochs, outcomes, barriers, leader change, members that come and go.
pub async fn core(harness: &dyn Harness) {
    proposals_appear_once_in_order_everywhere(harness).await;
    wrong_sizes_and_epochs_are_rejected(harness).await;
    a_read_barrier_covers_what_was_acknowledged(harness).await;
    readers::a_dropped_wait_loses_nothing(harness).await;
    readers::a_dropped_commit_is_proposed(harness).await;
    readers::readers_begin_anywhere(harness).await;
    readers::proposers_keep_their_order(harness).await;
    an_old_epoch_is_fenced_after_a_leader_change(harness).await;
    status_agrees_with_what_was_told(harness).await;
    a_reader_is_told_of_the_end_of_a_reign(harness).await;
    if harness.members().await.len() > 1 {
        members::who_was_cut_off_catches_up(harness).await;
        members::leadership_is_handed_over(harness).await;
        members::a_hand_over_to_the_dead_loses_nothing(harness).await;
    }
    // Last, because an engine may go on for a while with a leader that is cut off.
    unknown_means_maybe_once(harness).await;
}

/// The whole suite: [`core`], then restart, floors, lost disks, snapshots and the seal. Leaves the log sealed.
pub async fn full(harness: &dyn Harness) {
    core(harness).await;
    a_restart_keeps_what_was_acknowledged(harness).await;
    members::a_power_cut_of_all_keeps_what_was_acknowledged(harness).await;
    if harness.members().await.len() > 1 {
        members::who_lost_its_disk_gets_everything(harness).await;
    }
    who_resigns_leads_no_more(harness).await;
    readers::overload_is_said(harness).await;
    readers::floors_only_rise(harness).await;
    if harness.members().await.len() > 1 {
        members::who_stays_away_too_long_is_restored(harness).await;
        members::who_lost_its_disk_gets_everything(harness).await;
    }
    readers::trimming_is_a_request(harness).await;
    sealing::nothing_comes_behind_a_seal(harness).await;
    sealing::sealing_ends_the_log(harness).await;
}

/// Where a proposal is, if it is known to be somewhere.
fn position_of(outcome: Outcome) -> Option<Position> {
    match outcome {
        Outcome::Committed(position) => Some(position),
        _ => None,
    }
}

async fn proposals_appear_once_in_order_everywhere(harness: &dyn Harness) {
    let runtime = harness.runtime();
    let log = harness.leader().await;
    let mut reader = Reader::new(&log, &runtime, log.status().bounds.last.next());
    let epoch = reader.until_leading().await;
    let batches: Vec<Vec<Bytes>> =
        (0..50).map(|i| (0..1 + i % 3).map(|j| entry(&format!("batch {i} entry {j}"))).collect()).collect();
    let commits: Vec<_> =
        batches.iter().map(|b| log.propose(epoch, b.clone()).expect("this node leads")).collect();
    let mut positions = Vec::new();
    for commit in commits {
        match commit.await {
            Outcome::Committed(position) => positions.push(position),
            other => panic!("a calm log commits, but: {other:?}"),
        }
    }
    assert!(
        positions.is_sorted() && positions.windows(2).all(|w| w[0] < w[1]),
        "positions in order: {positions:?}"
    );
    for log in harness.all().await {
        let mut reader = Reader::new(&log, &runtime, positions[0]);
        reader.until_position(*positions.last().expect("fifty")).await;
        let seen: Vec<_> = reader.seen.iter().filter(|b| positions.contains(&b.position)).collect();
        assert_eq!(seen.len(), batches.len());
        for ((batch, position), seen) in batches.iter().zip(&positions).zip(seen) {
            assert_eq!((&seen.entries, seen.position), (batch, *position));
        }
    }
}

async fn wrong_sizes_and_epochs_are_rejected(harness: &dyn Harness) {
    let log = harness.leader().await;
    let mut reader = Reader::new(&log, &harness.runtime(), log.status().bounds.last.next());
    let epoch = reader.until_leading().await;
    let rejected = |epoch, batch| log.propose(epoch, batch).err();
    assert!(matches!(rejected(epoch, vec![]), Some(Rejected::Size { .. })));
    assert!(matches!(rejected(epoch, vec![entry("x"); BATCH_ENTRIES_MAX + 1]), Some(Rejected::Size { .. })));
    assert!(matches!(
        rejected(epoch, vec![Bytes::from(vec![0; BATCH_BYTES_MAX + 1])]),
        Some(Rejected::Size { .. })
    ));
    assert!(matches!(rejected(Epoch(epoch.0 + 1000), vec![entry("x")]), Some(Rejected::NotLeader { .. })));
    let largest =
        log.propose(epoch, vec![Bytes::from(vec![7; BATCH_BYTES_MAX])]).expect("the largest batch").await;
    assert!(matches!(largest, Outcome::Committed(_)), "{largest:?}");
}

async fn a_read_barrier_covers_what_was_acknowledged(harness: &dyn Harness) {
    let position = committed(harness, "before the barrier").await;
    let log = harness.leader().await;
    let barrier = log.read_barrier(PATIENCE).await.expect("the leader answers");
    assert!(barrier >= position, "barrier {barrier} below {position}");
    for log in harness.all().await {
        match log.read_barrier(PATIENCE).await {
            Ok(barrier) => {
                assert!(barrier >= position, "another member's barrier {barrier} below {position}")
            }
            // An engine may leave it to the asker to go to the leader.
            Err(LogFault::NotLeader { .. }) if !harness.any_member_answers() => {}
            Err(other) => panic!("a calm log answers a barrier, but: {other}"),
        }
    }
}

async fn an_old_epoch_is_fenced_after_a_leader_change(harness: &dyn Harness) {
    let runtime = harness.runtime();
    let before = committed(harness, "before the change").await;
    let old = harness.leader().await;
    let mut reader = Reader::new(&old, &runtime, old.status().bounds.last.next());
    let old_epoch = reader.until_leading().await;
    harness.change_leader().await;
    let after = committed(harness, "after the change").await;
    assert!(after > before);
    let log = harness.leader().await;
    let mut reader = Reader::new(&log, &runtime, before);
    let epoch = reader.until_leading().await;
    assert!(epoch > old_epoch, "a new reign has a greater epoch: {epoch:?} after {old_epoch:?}");
    assert!(reader.last > before, "leadership comes after what the earlier reign committed");
    match old.propose(old_epoch, vec![entry("from the grave")]) {
        Err(Rejected::NotLeader { .. } | Rejected::Stopped(_)) => {}
        Err(other) => panic!("rejected for another reason: {other}"),
        // An engine that learns of the change late may take it, but must never commit it.
        Ok(commit) => {
            let outcome = runtime.timeout(PATIENCE, commit).await;
            assert!(
                matches!(
                    outcome,
                    None | Some(Outcome::Unknown | Outcome::Refused(Refused::NotLeader { .. }))
                ),
                "a fenced proposal committed: {outcome:?}"
            );
        }
    }
    let end = committed(harness, "the end").await;
    let mut reader = Reader::new(&log, &runtime, before);
    reader.until_position(end).await;
    assert!(!reader.seen.iter().any(|b| b.entries.contains(&entry("from the grave"))));
}

async fn unknown_means_maybe_once(harness: &dyn Harness) {
    for takes_effect in [true, false] {
        if !harness.make_next_unknown(takes_effect).await {
            continue;
        }
        let runtime = harness.runtime();
        let log = harness.leader().await;
        let start = log.status().bounds.last.next();
        let mut reader = Reader::new(&log, &runtime, start);
        let epoch = reader.until_leading().await;
        let text = format!("unknown, takes effect: {takes_effect}");
        let commit = log.propose(epoch, vec![entry(&text)]).expect("this node leads");
        let outcome = runtime.timeout(PATIENCE, commit).await;
        assert!(matches!(outcome, None | Some(Outcome::Unknown)), "expected unknown, got {outcome:?}");
        let end = committed(harness, "after the unknown").await;
        let log = harness.leader().await;
        let mut reader = Reader::new(&log, &runtime, start);
        reader.until_position(end).await;
        let times = reader.seen.iter().filter(|b| b.entries.contains(&entry(&text))).count();
        assert_eq!(times, usize::from(takes_effect), "{text}");
    }
}

async fn status_agrees_with_what_was_told(harness: &dyn Harness) {
    let position = committed(harness, "before the status").await;
    let log = harness.leader().await;
    let mut reader = Reader::new(&log, &harness.runtime(), position);
    let epoch = reader.until_leading().await;
    let status = log.status();
    assert!(status.is_self && status.epoch == epoch, "led in {epoch:?}, and: {status:?}");
    assert!(status.bounds.last >= position && status.bounds.first <= position, "{position} in {status:?}");
    let leader = status.leader.expect("it leads itself");
    let member = status.members.iter().find(|p| p.member.node == leader);
    assert!(member.is_some_and(|p| p.member.voter), "node {leader} is a voter of {:?}", status.members);
    assert_eq!((status.sealed, status.fault), (None, None));
    // Who expects another configuration changes nothing; who cannot change any says so.
    let members: Vec<_> = status.members.iter().map(|p| p.member).collect();
    let refused = log.reconfigure(ConfigId(status.config.0 + 1000), members).await;
    assert!(
        matches!(refused, Err(LogFault::Unsupported(_))),
        "no engine changes members yet, and: {refused:?}"
    );
    assert_eq!(log.status().config, status.config);
}

async fn a_reader_is_told_of_the_end_of_a_reign(harness: &dyn Harness) {
    let runtime = harness.runtime();
    let log = harness.leader().await;
    let mut reader = Reader::new(&log, &runtime, log.status().bounds.last.next());
    let epoch = reader.until_leading().await;
    harness.change_leader().await;
    // Also where the same node leads again: `Reader` refuses a beginning without an end before it.
    let ended =
        |_: &Reader, e: &Event| matches!(e, Event::Leader { epoch: of, is_self: false, .. } if *of == epoch);
    reader.until("the end of the reign", ended).await;
    committed(harness, "under another").await;
}

async fn who_resigns_leads_no_more(harness: &dyn Harness) {
    let log = harness.leader().await;
    let mut reader = Reader::new(&log, &harness.runtime(), log.status().bounds.last.next());
    let epoch = reader.until_leading().await;
    log.resign();
    reader.until("the end of the reign", |_, e| matches!(e, Event::Leader { is_self: false, .. })).await;
    assert!(!log.status().is_self || log.status().epoch > epoch, "resigned, and: {:?}", log.status());
    let rejected = log.propose(epoch, vec![entry("after the end")]).err();
    assert!(matches!(rejected, Some(Rejected::NotLeader { .. })), "{rejected:?}");
    harness.change_leader().await;
    // It is nobody's reign: nothing happens.
    log.resign();
    committed(harness, "after one has resigned").await;
}

async fn a_restart_keeps_what_was_acknowledged(harness: &dyn Harness) {
    let mut positions = Vec::new();
    for i in 0..10 {
        positions.push((committed(harness, &format!("kept {i}")).await, entry(&format!("kept {i}"))));
    }
    let log = harness.leader().await;
    let old_epoch =
        Reader::new(&log, &harness.runtime(), log.status().bounds.last.next()).until_leading().await;
    drop(log);
    if !harness.restart().await {
        return;
    }
    let log = harness.leader().await;
    let mut reader = Reader::new(&log, &harness.runtime(), positions[0].0);
    let epoch = reader.until_leading().await;
    assert!(epoch > old_epoch, "a restart begins a new reign");
    for (position, text) in positions {
        let batch = reader.seen.iter().find(|b| b.position == position).expect("acknowledged, so there");
        assert_eq!(batch.entries, vec![text]);
    }
}
