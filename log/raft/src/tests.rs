//! The core of the conformance suite on three nodes, with a real leader change by partition.

use clutch_log::conformance::{self, Harness, Part};
use clutch_runtime::Runtime;

use super::*;

struct RaftHarness {
    runtime: Runtime,
    router: Router,
    logs: Vec<Arc<RaftLog>>,
    /// A leader that was cut off and does not know it yet.
    cut_off: Mutex<Option<usize>>,
    /// A node that nobody hears, although it may still believe to lead.
    unheard: Arc<Mutex<Option<usize>>>,
}

const PATIENCE: Duration = Duration::from_secs(20);

impl RaftHarness {
    /// The index of a node that leads with a quorum, other than `but`.
    async fn find_leader(&self, but: Option<usize>) -> usize {
        let start = tokio::time::Instant::now();
        loop {
            for (i, log) in self.logs.iter().enumerate() {
                if Some(i) != but && log.leading().is_some() && log.writable(Duration::from_millis(300)).await
                {
                    return i;
                }
            }
            assert!(start.elapsed() < PATIENCE, "no leader");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

#[async_trait]
impl Harness for RaftHarness {
    fn runtime(&self) -> Runtime {
        self.runtime.clone()
    }

    async fn leader(&self) -> Arc<dyn Log> {
        // The first question after a cut still finds the old leader; then the others have elected another.
        let cut_off = self.cut_off.lock().take();
        if let Some(old) = cut_off {
            let (router, logs, unheard) = (self.router.clone(), self.logs.clone(), self.unheard.clone());
            tokio::spawn(async move {
                // Only when the others have a leader of their own is the old one's proposal certain to be lost.
                loop {
                    for (i, log) in logs.iter().enumerate() {
                        if i != old
                            && log.leading().is_some()
                            && log.writable(Duration::from_millis(300)).await
                        {
                            // The proposer's patience ends before the old leader can learn of its successor.
                            tokio::time::sleep(PROPOSAL_PATIENCE).await;
                            router.set_isolated(old as u64 + 1, false);
                            *unheard.lock() = None;
                            return;
                        }
                    }
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            });
            return self.logs[old].clone();
        }
        let unheard = *self.unheard.lock();
        self.logs[self.find_leader(unheard).await].clone()
    }

    async fn all(&self) -> Vec<Arc<dyn Log>> {
        self.logs.iter().map(|log| log.clone() as Arc<dyn Log>).collect()
    }

    async fn change_leader(&self) {
        let old = self.find_leader(None).await;
        self.router.set_isolated(old as u64 + 1, true);
        self.find_leader(Some(old)).await;
        self.router.set_isolated(old as u64 + 1, false);
        // The old leader learns of its successor from the first message.
        let start = tokio::time::Instant::now();
        while self.logs[old].leading().is_some() {
            assert!(start.elapsed() < PATIENCE, "the old leader never steps down");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn restart(&self) -> bool {
        false
    }

    fn any_member_answers(&self) -> bool {
        false
    }

    async fn make_next_unknown(&self, committed: bool) -> bool {
        let leader = self.find_leader(None).await;
        if committed {
            self.logs[leader].lose_next_answer();
        } else {
            self.router.set_isolated(leader as u64 + 1, true);
            *self.cut_off.lock() = Some(leader);
            *self.unheard.lock() = Some(leader);
        }
        true
    }

    async fn members(&self) -> Vec<Part> {
        let part = |(i, log): (usize, &Arc<RaftLog>)| Part { node: i as u64 + 1, log: log.clone() };
        self.logs.iter().enumerate().map(part).collect()
    }

    async fn cut_off(&self, node: NodeId, is_cut_off: bool) -> bool {
        self.router.set_isolated(node, is_cut_off);
        true
    }

    async fn wipe(&self, _: NodeId) -> bool {
        false
    }

    fn restores(&self) -> bool {
        false
    }

    async fn applied(&self, _: NodeId, _: Position) {}
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conforms_in_its_core() {
    let router = Router::default();
    let logs = start(&router, 3).await.expect("starts");
    let runtime = clutch_runtime::production::runtime();
    let harness = RaftHarness {
        runtime,
        router: router.clone(),
        logs,
        cut_off: Mutex::new(None),
        unheard: Arc::default(),
    };
    conformance::core(&harness).await;
    router.shutdown().await;
}
