//! What readers of a group wait for in openraft's metrics.
//!
//! openraft tells of every heartbeat that is answered. Each replica reads on a thread of its own, and waking that costs more than the
//! heartbeat does; so a task tells them only of what they look at.
//!
//! Invariant: it is told after it can be seen in the metrics.

use clutch_log::NodeId;
use clutch_proto::mutants::{self, Mutant};
use clutch_runtime::Runtime;
use openraft::{RaftMetrics, ServerState, async_runtime::WatchReceiver as _};
use tokio::sync::watch;

use crate::types::{LogId, Raft, TypeConfig};

/// What may make a reader go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Standing {
    term: u64,
    leader: Option<NodeId>,
    leads: bool,
    purged: Option<LogId>,
    /// Who belongs to the group: one that is alone can be sent nothing.
    members: Option<LogId>,
    has_failed: bool,
}

impl Standing {
    fn of(metrics: &RaftMetrics<TypeConfig>) -> Standing {
        Standing {
            term: metrics.current_term,
            leader: metrics.current_leader,
            leads: metrics.state == ServerState::Leader,
            purged: metrics.purged,
            members: *metrics.membership_config.log_id(),
            has_failed: metrics.running_state.is_err(),
        }
    }
}

/// Tells of changes from now on; it closes with the group.
pub(crate) fn watch(runtime: &Runtime, raft: &Raft) -> watch::Receiver<Standing> {
    let mut metrics = raft.metrics();
    let (told, standing) = watch::channel(Standing::of(&metrics.borrow_watched()));
    runtime.spawn("raft standing", async move {
        while metrics.changed().await.is_ok() {
            let now = Standing::of(&metrics.borrow_watched());
            told.send_if_modified(|before| {
                let is_news = *before != now && !mutants::is(Mutant::StandingUntold);
                *before = now;
                is_news
            });
        }
    });
    standing
}
