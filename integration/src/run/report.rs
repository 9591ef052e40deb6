//! The end of a run: everything is healed, comes to rest and is looked at.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use clutch_runtime::simulated::DiskFaults;
use parking_lot::Mutex;

use super::{Runner, Timed, client_node};
use crate::{
    checkers::{self, Violation},
    sim_cluster::{CLIENT, Engine, disk_node, endpoint},
};

/// Virtual time within which everything must have come to rest after the faults.
const CONVERGENCE_MAX: Duration = Duration::from_secs(180);

/// What a run gave.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Operations of the script that ended.
    pub operations: u64,
    /// Requests to shards and CDC that were answered.
    pub requests: u64,
    /// Faults that struck, by kind.
    pub faults: BTreeMap<&'static str, u64>,
    /// What must not be.
    pub violations: Vec<Violation>,
    /// Hash of everything that happened.
    pub trace_hash: u64,
    /// Rare states that were reached.
    pub coverage: BTreeSet<String>,
    /// What happened, for people.
    pub timeline: Vec<(Duration, String)>,
    /// Virtual time.
    pub elapsed: Duration,
    /// What every log delivered.
    pub logs: crate::golden_logs::Logs,
}

impl Runner {
    /// Ends all faults; for every second seed all nodes stop at once and start again.
    pub(super) fn heal(&mut self, seed: u64) {
        self.tell("all faults end".into());
        self.queue.clear();
        self.network.clear();
        let world = self.cluster.world.clone();
        world.heal_network();
        world.heal_clocks();
        for node in std::mem::take(&mut self.paused) {
            world.resume(node);
        }
        for node in std::mem::take(&mut self.zombies) {
            world.crash(node);
        }
        for (log, node) in std::mem::take(&mut self.deaf).into_keys() {
            self.cluster.logs.set_deaf(log, u64::from(node.0), false);
        }
        let unmounted: Vec<u32> = self.unmounted.keys().copied().collect();
        for disk in unmounted {
            self.mount(disk);
            self.down.insert(disk_node(disk));
        }
        let mut nodes = self.cluster.nodes();
        let mut hung = Duration::ZERO;
        for node in &nodes {
            let disk = world.disk(*node);
            disk.set_faults(DiskFaults::default());
            hung = hung.max(disk.end_stall());
        }
        if !hung.is_zero() {
            // What waits for a disk already waits until then.
            let clock = world.node(CLIENT).clock;
            world.run(CLIENT, hung * 2, async move { clock.sleep(hung).await });
        }
        let everything = seed.is_multiple_of(2);
        // Power cuts that have not come yet must not come any more, and replicas that failed start again.
        let local = self.cluster.config().engine != Engine::Sim;
        nodes.retain(|n| everything || self.down.contains(n) || self.armed.contains_key(n) || local);
        for node in nodes {
            self.crash(node);
            self.cluster.boot(node);
        }
        for client in 0..self.clients {
            if self.down.contains(&client_node(client)) {
                self.start_client(client);
            }
        }
        self.down.clear();
        self.armed.clear();
    }

    pub(super) fn finish(mut self) -> Report {
        let mut violations = std::mem::take(&mut self.seen);
        if !self.run_until_done(CONVERGENCE_MAX) {
            let busy: Vec<String> = self.busy.lock().iter().map(ToString::to_string).collect();
            violations.push(Violation::new("convergence", format!("lanes {busy:?} do not come to an end")));
        }
        let (found, statuses) = self.converge();
        violations.extend(found);
        let records = self.history.take_records();
        let performed = self.history.take_performed();
        let mut report = Report {
            operations: performed.len() as u64,
            requests: records.iter().filter(|r| r.ended.is_some()).count() as u64,
            faults: std::mem::take(&mut self.faults),
            elapsed: self.now(),
            ..Report::default()
        };
        let mut evidence = checkers::Evidence::collect(&self.cluster, records);
        if !violations.is_empty() {
            let found = self.cluster.recording.violations();
            violations.extend(found.into_iter().map(|what| Violation::new("log", what)));
            // A clock that is far off keeps a cluster from its rest: then that is what is wrong.
            violations.extend(checkers::clock::check(&evidence, &self.cluster));
        } else {
            violations.extend(checkers::check(&mut evidence, &self.cluster, &self.history, &statuses));
        }
        violations.extend(
            self.history.violations().into_iter().map(|(checker, what)| Violation::new(checker, what)),
        );
        report.coverage = crate::coverage::reached(&evidence, &self.cluster.world);
        report.logs = std::mem::take(&mut evidence.logs);
        report.timeline = std::mem::take(&mut self.timeline);
        for p in performed {
            let text = format!(
                "{} {} -> {} ({} µs)",
                p.lane,
                p.operation,
                p.outcome,
                (p.ended - p.began).as_micros()
            );
            report.timeline.push((p.began, text));
        }
        report.timeline.sort_by_key(|(at, _)| *at);
        for (at, _) in &mut report.timeline {
            *at = at.saturating_sub(self.start);
        }
        report.trace_hash = self.cluster.world.trace().0;
        report.violations = violations;
        report
    }

    /// Drives the world until nothing is in flight.
    pub(super) fn converge(&mut self) -> (Vec<Violation>, checkers::convergence::Statuses) {
        let client = self.cluster.client();
        let done = Arc::new(Mutex::new(None));
        let slot = done.clone();
        let runtime = self.cluster.world.node(CLIENT);
        let of = |id| (id, self.cluster.members(id).into_iter().map(endpoint).collect());
        let members = self.cluster.log_ids().into_iter().map(of).collect();
        runtime.spawn("converge", async move {
            let result = checkers::convergence::at_rest(&client, members).await;
            *slot.lock() = Some(result);
        });
        let end = self.now() + CONVERGENCE_MAX;
        while done.lock().is_none() {
            let until = self.queue.keys().next().map_or(end, |(at, _)| *at).min(end);
            if self.drive(until) {
                continue;
            }
            let due = self.queue.first_key_value().map(|(key, _)| *key).filter(|(at, _)| *at <= until);
            match due.and_then(|key| self.queue.remove(&key)) {
                Some(Timed::End(end)) => self.end(end),
                Some(Timed::Strike(_)) => {}
                None if self.now() >= end || self.queue.is_empty() => break,
                None => {}
            }
        }
        match done.lock().take() {
            Some(found) => found,
            None => {
                let what = "the cluster does not come to rest after the faults".to_owned();
                (vec![Violation::new("convergence", what)], Vec::new())
            }
        }
    }
}
