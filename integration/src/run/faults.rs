//! Faults: how each strikes, and how it ends.

use std::time::Duration;

use clutch_log::LogId;
use clutch_runtime::simulated::{DiskFaults, Faults, NodeId};

use super::{RESTART_PAUSE, Runner, client_node};
use crate::{
    checkers::Violation,
    script::{Fault, Party},
    sim_cluster::{Engine, disk_node},
};

/// Members that hear nothing of their leader have elected another by then.
const ELECTED_WITHIN: Duration = Duration::from_secs(1);
/// How long a clock drifts before somebody sets it: not so long that nobody believes its node any more.
const DRIFT: Duration = Duration::from_secs(8);

/// What ends a fault.
#[derive(Clone, Debug)]
pub(super) enum End {
    Network(usize),
    Unblock(NodeId, NodeId),
    Unclog(NodeId, NodeId),
    Boot(NodeId),
    Resume(NodeId),
    SlowPause(NodeId, Duration),
    Stop(NodeId),
    Hear(LogId, NodeId),
    HealDisk(NodeId, Party),
    SetClock(NodeId),
    SetRight(NodeId),
    Mount(u32),
}

impl Runner {
    pub(super) fn crash(&mut self, node: NodeId) {
        self.cluster.world.crash(node);
        self.paused.remove(&node);
        self.armed.remove(&node);
        self.down.insert(node);
    }

    /// As [`Runner::crash`], and the machine goes on.
    pub(super) fn kill(&mut self, node: NodeId) {
        // A power cut that was to come finds the machine all the same.
        self.cluster.world.kill(node);
        self.paused.remove(&node);
        self.down.insert(node);
    }

    pub(super) fn block(&mut self, from: NodeId, to: NodeId, lasting: Duration) {
        *self.blocked.entry((from, to)).or_default() += 1;
        self.cluster.world.set_blocked(from, to, true);
        self.end_after(lasting, End::Unblock(from, to));
    }

    /// Stops a node, unless it is down, and starts it again after a while.
    fn stop(&mut self, how: &Fault, node: NodeId, lasting: Duration) {
        if self.down.contains(&node) {
            return;
        }
        match how {
            Fault::Kill(..) => {
                self.cluster.world.note("world: a process dies and its machine goes on");
                self.kill(node);
            }
            Fault::Lose(..) => {
                self.crash(node);
                // One disk at a time, as three members bear.
                if self.cluster.is_kept_without(node) {
                    self.cluster.lose_states(node);
                }
            }
            _ => self.crash(node),
        }
        self.end_after(lasting, End::Boot(node));
    }

    fn isolate(&mut self, lonely: NodeId, lasting: Duration) {
        let others: Vec<NodeId> =
            self.cluster.nodes().into_iter().chain(self.clients()).filter(|n| *n != lonely).collect();
        for other in others {
            self.block(lonely, other, lasting);
            self.block(other, lonely, lasting);
        }
        if self.cluster.config().replicas > 1 && self.cluster.config().engine == Engine::Sim {
            for log in self.cluster.log_ids() {
                if self.cluster.members(log).contains(&lonely) {
                    self.deafen(log, lonely, lasting);
                }
            }
        }
    }

    fn move_leader(&mut self, party: Party, lasting: Duration) {
        let Some(log) = log_of(party) else { return };
        if self.cluster.config().replicas > 1 {
            // The others elect another, and the old leader hears of it late.
            let leader = self.cluster.home(log).unwrap_or(NodeId(0));
            self.deafen(log, leader, lasting / 2 + ELECTED_WITHIN);
        } else if let Some((old, _)) = self.cluster.move_log(log) {
            // For the first half of the time the old leader hears nothing of the new one.
            self.zombies.insert(old);
            self.deafen(log, old, lasting / 2);
            self.end_after(lasting, End::Stop(old));
        }
    }

    /// Cuts a member of a log off from the others.
    fn deafen(&mut self, log: LogId, node: NodeId, lasting: Duration) {
        if self.cluster.config().engine == Engine::Raft {
            let others = self.cluster.members(log).into_iter().filter(|other| *other != node);
            for other in others.collect::<Vec<_>>() {
                self.block(node, other, lasting);
                self.block(other, node, lasting);
            }
            return;
        }
        self.cluster.logs.set_deaf(log, u64::from(node.0), true);
        *self.deaf.entry((log, node)).or_default() += 1;
        self.end_after(lasting, End::Hear(log, node));
    }

    pub(super) fn clients(&self) -> Vec<NodeId> {
        (0..self.clients).map(client_node).collect()
    }

    pub(super) fn strike(&mut self, fault: Fault) {
        self.tell(self.shown(&fault));
        if self.can_strike(&fault) {
            *self.faults.entry(fault.kind()).or_default() += 1;
        }
        let node = |this: &Runner, party: &Party| this.node(*party);
        match &fault {
            Fault::Loss(_, d) | Fault::Duplicate(_, d) | Fault::Delay(_, d) => {
                let id = self.next as usize;
                self.network.insert(id, fault.clone());
                self.end_after(*d, End::Network(id));
                self.set_network();
            }
            Fault::Partition(a, b, d) => {
                let (a, b) = (node(self, a), node(self, b));
                self.block(a, b, *d);
                self.block(b, a, *d);
            }
            Fault::OneWay(a, b, d) => {
                let (a, b) = (node(self, a), node(self, b));
                self.block(a, b, *d);
            }
            Fault::Isolate(party, d) => self.isolate(node(self, party), *d),
            Fault::Clog(a, b, d) => {
                let (a, b) = (node(self, a), node(self, b));
                self.cluster.world.set_clogged(a, b, true);
                self.end_after(*d, End::Unclog(a, b));
            }
            Fault::Crash(party, d) | Fault::Kill(party, d) | Fault::Lose(party, d) => {
                self.stop(&fault, node(self, party), *d);
            }
            Fault::Trim(party, member) => {
                if let Some((log, node)) = self.member(*party, *member) {
                    self.cluster.trim(log, node);
                }
            }
            Fault::Stall(party, operations, d) => {
                self.cluster.world.disk(node(self, party)).stall_after(u64::from(*operations), *d);
            }
            Fault::Hang(party, operations, d) => {
                self.cluster.world.disk(node(self, party)).hang_after(u64::from(*operations), *d);
            }
            Fault::PowerCut(party, operations, d) => {
                let node = node(self, party);
                if !self.down.contains(&node) {
                    self.cluster.world.disk(node).cut_power_after(u64::from(*operations));
                    self.armed.insert(node, *d);
                }
            }
            Fault::Pause(party, d) => {
                let node = node(self, party);
                if !self.down.contains(&node) && self.paused.insert(node) {
                    self.cluster.world.pause(node);
                    self.end_after(*d, End::Resume(node));
                }
            }
            Fault::Slow(party, d) => {
                let node = node(self, party);
                let until = self.now() + *d;
                self.end(End::SlowPause(node, until));
            }
            Fault::Move(party, d) => self.move_leader(*party, *d),
            Fault::UnknownCommitted(party) | Fault::UnknownLost(party) => {
                if let Some(log) = log_of(*party) {
                    self.cluster.logs.make_next_unknown(log, matches!(fault, Fault::UnknownCommitted(_)));
                }
            }
            Fault::Skew(party, ms) => self.cluster.world.set_skew_ms(node(self, party), i64::from(*ms)),
            Fault::Drift(party, ppm) => {
                let node = node(self, party);
                self.cluster.world.set_drift_ppm(node, i64::from(*ppm));
                self.end_after(DRIFT, End::SetClock(node));
            }
            Fault::Suspend(d) => self.cluster.world.suspend_ms(d.as_millis() as u64),
            Fault::Flip(disk, draw) => {
                self.cluster.spoil(*disk);
                self.flip(*disk, *draw);
            }
            Fault::Misdirect(disk) => {
                self.cluster.spoil(*disk);
                self.cluster.world.disk(disk_node(*disk)).misdirect_next();
            }
            Fault::DiskErrors(party, permille, d) => {
                let faults = DiskFaults {
                    read_error_permille: *permille,
                    write_error_permille: *permille,
                    full: false,
                };
                let node = node(self, party);
                self.cluster.world.disk(node).set_faults(faults);
                self.end_after(*d, End::HealDisk(node, *party));
            }
            Fault::Full(party, d) => {
                let faults = DiskFaults { full: true, ..DiskFaults::default() };
                let node = node(self, party);
                self.cluster.world.disk(node).set_faults(faults);
                self.end_after(*d, End::HealDisk(node, *party));
            }
            Fault::Step(party, seconds, d) => {
                let node = node(self, party);
                self.cluster.world.set_step_ms(node, seconds.saturating_mul(1000));
                self.end_after(*d, End::SetRight(node));
            }
            Fault::Unmount(disk, d) => {
                let node = disk_node(*disk);
                if !self.unmounted.contains_key(disk) {
                    self.crash(node);
                    self.unmounted.insert(*disk, self.cluster.world.disk(node).unmount());
                    self.end_after(RESTART_PAUSE, End::Boot(node));
                    self.end_after(RESTART_PAUSE + *d, End::Mount(*disk));
                }
            }
            // The right disk is not there.
            Fault::Wipe(disk) if self.unmounted.contains_key(disk) => {}
            Fault::Wipe(disk) => {
                self.wipe(*disk);
            }
        }
    }

    /// A fault, and which of a log's members it strikes, where it does not name that itself.
    fn shown(&self, fault: &Fault) -> String {
        let is_drawn = self.cluster.config().replicas > 1 && !matches!(fault, Fault::Trim(..));
        match fault.parties().first().filter(|_| is_drawn) {
            Some(party) => format!("fault {fault} (node {})", self.node(*party).0),
            None => format!("fault {fault}"),
        }
    }

    /// As an operator would: stop the node, change the disk, start it.
    fn wipe(&mut self, disk: u32) {
        let node = disk_node(disk);
        self.cluster.spoil(disk);
        self.crash(node);
        self.cluster.world.disk(node).wipe();
        self.cluster.label(disk);
        self.end_after(RESTART_PAUSE, End::Boot(node));
    }

    /// A log's member by its number.
    fn member(&self, party: Party, number: u32) -> Option<(LogId, NodeId)> {
        let log = log_of(party)?;
        Some((log, *self.cluster.members(log).get(number as usize)?))
    }

    /// Whether a fault does anything now: nobody is cut off from himself, and who is down cannot fall. Chances (loss,
    /// disk errors) count once, when they begin to act.
    pub(super) fn can_strike(&self, fault: &Fault) -> bool {
        let is_up = |party: &Party| !self.down.contains(&self.node(*party));
        match fault {
            Fault::Partition(a, b, _) | Fault::OneWay(a, b, _) | Fault::Clog(a, b, _) => a != b,
            Fault::Lose(party, _) => is_up(party) && self.cluster.is_kept_without(self.node(*party)),
            Fault::Crash(party, _) | Fault::Kill(party, _) | Fault::PowerCut(party, ..) => is_up(party),
            Fault::Pause(party, _) | Fault::Slow(party, _) => {
                is_up(party) && !self.paused.contains(&self.node(*party))
            }
            Fault::Trim(party, member) => {
                self.member(*party, *member).is_some_and(|(_, node)| !self.down.contains(&node))
            }
            // What a quorum has decided is nobody's to lose.
            Fault::UnknownCommitted(_) | Fault::UnknownLost(_) => {
                self.cluster.config().engine != Engine::Raft
            }
            Fault::Flip(disk, _) => !self.cluster.world.disk(disk_node(*disk)).files().is_empty(),
            _ => true,
        }
    }

    pub(super) fn flip(&self, disk: u32, draw: u64) {
        let disk = self.cluster.world.disk(disk_node(disk));
        let blocks: Vec<_> = disk
            .files()
            .into_iter()
            .filter(|(p, _)| !p.components().any(|c| c.as_os_str() == "tmp"))
            .collect();
        let Some((path, length)) = blocks.get((draw % blocks.len().max(1) as u64) as usize) else { return };
        let offset = draw.rotate_left(17) % (*length).max(1);
        disk.corrupt(path, offset, 1 << (draw >> 60 & 7));
    }

    pub(super) fn set_network(&self) {
        let mut faults = Faults::default();
        for fault in self.network.values() {
            match fault {
                Fault::Loss(permille, _) => faults.loss_permille = faults.loss_permille.max(*permille),
                Fault::Duplicate(permille, _) => {
                    faults.duplicate_permille = faults.duplicate_permille.max(*permille);
                }
                Fault::Delay(us, _) => faults.delay_us_max = faults.delay_us_max.max(u64::from(*us)),
                _ => {}
            }
        }
        self.cluster.world.set_faults(faults);
    }

    pub(super) fn end(&mut self, end: End) {
        match end {
            End::Network(id) => {
                self.network.remove(&id);
                self.set_network();
            }
            End::Unblock(from, to) => {
                let count = self.blocked.entry((from, to)).or_default();
                *count = count.saturating_sub(1);
                if *count == 0 {
                    self.cluster.world.set_blocked(from, to, false);
                }
            }
            End::Unclog(from, to) => self.cluster.world.set_clogged(from, to, false),
            End::Boot(node) => {
                if self.down.remove(&node) {
                    self.boot(node);
                }
            }
            End::Resume(node) => {
                if self.paused.remove(&node) {
                    self.cluster.world.resume(node);
                }
            }
            End::SlowPause(node, until) => {
                if self.now() < until && !self.down.contains(&node) && self.paused.insert(node) {
                    self.cluster.world.pause(node);
                    self.end_after(Duration::from_millis(3), End::Resume(node));
                    self.end_after(Duration::from_millis(4), End::SlowPause(node, until));
                }
            }
            End::Stop(node) => {
                if self.zombies.remove(&node) {
                    self.cluster.world.crash(node);
                    self.paused.remove(&node);
                }
            }
            End::SetRight(node) => self.cluster.world.set_step_ms(node, 0),
            End::Mount(disk) => {
                self.mount(disk);
                let node = disk_node(disk);
                if self.down.insert(node) {
                    self.end_after(RESTART_PAUSE, End::Boot(node));
                }
            }
            End::SetClock(node) => self.cluster.world.set_drift_ppm(node, 0),
            End::Hear(log, node) => {
                let count = self.deaf.entry((log, node)).or_default();
                *count = count.saturating_sub(1);
                if *count == 0 {
                    self.cluster.logs.set_deaf(log, u64::from(node.0), false);
                }
            }
            End::HealDisk(node, party) => {
                self.cluster.world.disk(node).set_faults(DiskFaults::default());
                if !matches!(party, Party::Disk(_)) && !self.down.contains(&node) {
                    // A log that met a failed write has stopped for good: its operator starts the node again.
                    self.kill(node);
                    self.end_after(RESTART_PAUSE, End::Boot(node));
                }
            }
        }
    }

    /// Puts a disk back in its place; its node is down afterwards. Nothing may have been written there meanwhile.
    pub(super) fn mount(&mut self, disk: u32) {
        let Some(unmounted) = self.unmounted.remove(&disk) else { return };
        let node = disk_node(disk);
        self.cluster.world.crash(node);
        let hidden = self.cluster.world.disk(node).mount(unmounted);
        if let Some(path) = hidden.first() {
            let what =
                format!("disk {disk} was not mounted, and {} was written in its place", path.display());
            self.seen.push(Violation::new("data", what));
        }
    }

    pub(super) fn boot(&mut self, node: NodeId) {
        self.tell(format!("node {} starts", node.0));
        match (0..self.clients).find(|c| client_node(*c) == node) {
            Some(client) => self.start_client(client),
            None if self.cluster.nodes().contains(&node) => self.cluster.boot(node),
            None => {}
        }
    }
}

fn log_of(party: Party) -> Option<LogId> {
    match party {
        Party::Registry => Some(LogId::REGISTRY),
        Party::Cdc => Some(LogId::CDC),
        Party::Shard(n) => Some(LogId::shard(n)),
        _ => None,
    }
}
