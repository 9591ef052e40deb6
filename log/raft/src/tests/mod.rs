//! The conformance suite on three nodes of a simulated world, and what is raft's own.

mod copies;
mod flips;
mod greetings;
mod group;
mod lease;
mod members;
mod messages;
mod nemesis;
mod reads;
mod room;
mod standing;
mod suites;
mod unreadable;
mod votes;

use std::time::Duration;

use async_trait::async_trait;
use clutch_log::conformance::{self, Harness, Part};
use clutch_runtime::simulated::{NodeId as SimNode, World};

use super::*;
use group::Nodes;

struct Elected(Arc<Nodes>);

#[async_trait]
impl Harness for Elected {
    fn runtime(&self) -> Runtime {
        self.0.driver()
    }

    async fn leader(&self) -> Arc<dyn Log> {
        // Nobody needs to lead what has ended.
        let any = self.0.log(1);
        if any.status().sealed.is_some() {
            return any;
        }
        self.0.log(self.0.leader(None).await)
    }

    async fn all(&self) -> Vec<Arc<dyn Log>> {
        self.0.numbers().map(|node| self.0.log(node) as Arc<dyn Log>).collect()
    }

    async fn change_leader(&self) {
        let old = self.0.leader(None).await;
        // Where one has resigned the last one must have all, or nobody could lead.
        let last = self.0.log(old).status().bounds.last;
        let has_all = |node| self.0.log(node).status().bounds.last >= last;
        self.0.until("everybody has all", || self.0.numbers().all(has_all)).await;
        self.0.cut_off(old, true);
        self.0.leader(Some(old)).await;
        self.0.cut_off(old, false);
        self.0.until("the old leader steps down", || !self.0.log(old).status().is_self).await;
    }

    async fn restart(&self) -> bool {
        for node in self.0.numbers() {
            self.0.crash(node);
        }
        for node in self.0.numbers() {
            self.0.boot(node).await;
        }
        true
    }

    fn any_member_answers(&self) -> bool {
        true
    }

    async fn make_next_unknown(&self, committed: bool) -> bool {
        // What is lost with its leader is not ours to say beforehand.
        if committed {
            self.0.log(self.0.leader(None).await).0.lose_next_answer();
        }
        committed
    }

    async fn members(&self) -> Vec<Part> {
        self.0.numbers().map(|node| Part { node, log: self.0.log(node) }).collect()
    }

    async fn cut_off(&self, node: NodeId, is_cut_off: bool) -> bool {
        self.0.cut_off(node, is_cut_off);
        true
    }

    async fn wipe(&self, _: NodeId) -> bool {
        // Its votes would be lost: whoever has lost its disk is another member.
        false
    }

    fn restores(&self) -> bool {
        true
    }

    async fn applied(&self, node: NodeId, upto: Position) {
        // Nobody applies what was not delivered to it.
        self.0.until("it is delivered", || self.0.log(node).status().bounds.last >= upto).await;
        self.0.snapshots(node).applied(upto);
    }
}

/// Runs a part on three nodes that have started. Returns the hash of all that happened, too.
fn on_three<F, T>(seed: u64, part: impl FnOnce(Arc<Nodes>) -> F + Send + 'static) -> (T, u64)
where
    F: Future<Output = T> + Send + 'static,
    T: Send + 'static,
{
    on_nodes(seed, |world| Nodes::new(world, 3), part)
}

/// The same on nodes that are made in another way.
fn on_nodes<F, T>(
    seed: u64,
    make: impl FnOnce(Arc<World>) -> Nodes,
    part: impl FnOnce(Arc<Nodes>) -> F + Send + 'static,
) -> (T, u64)
where
    F: Future<Output = T> + Send + 'static,
    T: Send + 'static,
{
    let world = Arc::new(World::new(seed));
    let nodes = Arc::new(make(world.clone()));
    let done = world.run(SimNode(0), Duration::from_secs(3600), async move {
        for node in nodes.numbers() {
            nodes.boot(node).await;
        }
        part(nodes).await
    });
    (done.unwrap_or_else(|| panic!("seed {seed} got stuck")), world.trace().0)
}

#[test]
fn conforms() {
    for seed in 0..10 {
        on_three(seed, |nodes| async move { conformance::full(&Elected(nodes)).await });
    }
}

#[test]
fn one_seed_one_trace() {
    let trace = |seed| on_three(seed, |nodes| async move { conformance::core(&Elected(nodes)).await }).1;
    for seed in 0..3 {
        assert_eq!(trace(seed), trace(seed), "seed {seed}");
    }
    assert_ne!(trace(1), trace(2));
}
