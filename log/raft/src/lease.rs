//! Reads by what a quorum has promised, without asking it.
//!
//! Whoever has answered its leader votes for nobody else for a lease, by its own clock. A leader that most members have answered
//! within one is therefore the only one, and what it knows to be committed is all there is. Asked for by [`crate::Timing`],
//! because it believes that clocks run alike, as far as the margin goes.
//!
//! Invariants:
//! * Whoever has started votes for nobody, itself not either, before a lease has passed: it does not know whom it has answered.
//! * A leader whose machine was suspended believes only what a quorum has answered since: monotonic clocks stand still meanwhile.
//! * A reign that was given up is read by no lease, nor one that is handed on, which openraft sees to: a successor does not wait.

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use clutch_proto::mutants::{self, Mutant};
use clutch_runtime::Runtime;
use openraft::{Instant as _, RaftMetrics};
use parking_lot::Mutex;

use crate::{Timing, member::Member, seam::SeamInstant, types::TypeConfig};

/// The clocks of a node that was not suspended differ by no more.
const APART_MAX: Duration = Duration::from_millis(5);

/// What a member keeps of promises: its own, and those of others to it.
pub(crate) struct Lease {
    lasts: Duration,
    /// How much earlier a leader stops to believe in it; `None` where it always asks.
    margin: Option<Duration>,
    /// Whether this member votes.
    may_vote: AtomicBool,
    awake: Mutex<Awake>,
}

/// Since when the node was not suspended.
struct Awake {
    /// What the clock that counts suspensions was ahead by.
    ahead: Duration,
    since: SeamInstant,
}

impl Lease {
    /// For a member that votes from now on, or when a lease has passed.
    pub(crate) fn new(runtime: &Runtime, timing: Timing, may_vote: bool) -> Lease {
        let may_vote = AtomicBool::new(may_vote || mutants::is(Mutant::VotesAfterRestart));
        let awake = Mutex::new(Awake { ahead: ahead(runtime), since: SeamInstant::now() });
        Lease { lasts: timing.lease, margin: timing.lease_reads, may_vote, awake }
    }

    /// Whether this member may vote for anybody.
    pub(crate) fn may_vote(&self) -> bool {
        self.may_vote.load(Ordering::Acquire)
    }

    /// Whether reads may go without a question at all.
    pub(crate) fn is_used(&self) -> bool {
        self.margin.is_some()
    }

    /// Whether a quorum has promised that nobody else leads yet.
    pub(crate) fn holds(&self, runtime: &Runtime, metrics: &RaftMetrics<TypeConfig>) -> bool {
        let Some(margin) = self.margin else { return false };
        let Some(acked) = metrics.last_quorum_acked.as_deref().copied() else { return false };
        acked >= self.awake_since(runtime) && acked.elapsed() + margin < self.lasts
    }

    fn awake_since(&self, runtime: &Runtime) -> SeamInstant {
        let (mut awake, ahead) = (self.awake.lock(), ahead(runtime));
        if ahead > awake.ahead + APART_MAX && !mutants::is(Mutant::LeaseThroughSuspension) {
            runtime.note("raft: a leader was suspended");
            *awake = Awake { ahead, since: SeamInstant::now() };
        }
        awake.since
    }
}

/// How far the clock that counts suspensions is ahead of the one that does not.
fn ahead(runtime: &Runtime) -> Duration {
    // In this order: a suspension between the two is seen.
    let monotonic = runtime.clock.monotonic();
    runtime.clock.steady().saturating_sub(monotonic)
}

/// Lets a member vote when a lease has passed since its start, and stand somewhat later, so that not all do at once.
pub(crate) async fn wait(runtime: Runtime, lease: Arc<Lease>, member: Weak<Member>) {
    let more = runtime.random.below(u64::try_from(lease.lasts.as_micros() / 2).unwrap_or(u64::MAX));
    runtime.clock.sleep(lease.lasts).await;
    lease.may_vote.store(true, Ordering::Release);
    runtime.clock.sleep(Duration::from_micros(more)).await;
    if let Some(member) = member.upgrade() {
        member.stand();
    }
}
