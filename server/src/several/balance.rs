//! Leaders that are spread over the nodes: a node that was away leads nothing when it is back, and those that took over do all the work.
//!
//! The node that leads the registry looks at all logs now and then, and lets one log after the other be led by a member that leads
//! fewer. It leaves alone logs that have changed lately, and nodes that have given a log away lately, so that it undoes no operator's drain,
//! nor the election behind a fault; everything, while members change; and nodes that say that something is wrong with them.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use anyhow::{Context as _, Result};
use clutch_client::Client;
use clutch_client_maintenance::members;
use clutch_log::{LogId, NodeId};
use clutch_proto::{
    admin::{AdminRequest, Status, StatusReply, admin_request::Op},
    mutants::{self, Mutant},
    session::Role,
};
use clutch_runtime::Endpoint;

/// Who lacks more of a log is not asked to lead it.
const LAG_MAX: u64 = 1024;
/// The log of a node that leads this many more than another one goes to that.
const DIFFERENCE: usize = 2;
/// How long a look at a log, or at a node, may take.
const LOOK_MAX: Duration = Duration::from_secs(5);

/// A log, as its leader says it.
#[derive(Clone, Debug)]
struct Led {
    id: LogId,
    leader: NodeId,
    /// Members that could lead it at once, the leader among them.
    able: BTreeSet<NodeId>,
    /// Whether it may be led by another: its reign is old enough, and its members stay who they are.
    is_settled: bool,
}

/// The log that another member is to lead, and which.
fn next_move(logs: &[Led]) -> Option<(LogId, NodeId)> {
    let mut leads: BTreeMap<NodeId, usize> = BTreeMap::new();
    for led in logs {
        for node in &led.able {
            leads.entry(*node).or_default();
        }
        *leads.entry(led.leader).or_default() += 1;
    }
    let count = |node: &NodeId| leads.get(node).copied().unwrap_or(0);
    let difference = if mutants::is(Mutant::BalancedForNothing) { 1 } else { DIFFERENCE };
    let moves = logs.iter().filter(|led| led.is_settled).filter_map(|led| {
        let to =
            *led.able.iter().filter(|node| **node != led.leader).min_by_key(|node| (count(node), **node))?;
        let gain = count(&led.leader).checked_sub(count(&to))?;
        (gain >= difference).then_some((gain, led.id, to))
    });
    // The registry's leader looks at all others, so it goes last.
    let best = moves.max_by_key(|(gain, id, _)| (*gain, id.role, std::cmp::Reverse(id.number)));
    best.map(|(_, id, to)| (id, to))
}

/// What has changed of the logs, as far as it was seen, and when.
#[derive(Default)]
struct Changes {
    /// Who leads each log in which reign, which members it has, and since when it is so.
    logs: BTreeMap<LogId, (Seen, Duration)>,
    /// When a node was seen last to lead a log no more.
    left: BTreeMap<NodeId, Duration>,
    /// When the members of any log were seen last to have changed.
    members: Option<Duration>,
}

/// How a log stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    leader: NodeId,
    epoch: u64,
    config: u64,
}

impl Changes {
    /// A log stands so now.
    fn see(&mut self, id: LogId, now_is: Seen, now: Duration) {
        let (was, since) = self.logs.entry(id).or_insert((now_is, now));
        if *was == now_is {
            return;
        }
        if was.leader != now_is.leader {
            self.left.insert(was.leader, now);
        }
        if was.config != now_is.config {
            self.members = Some(now);
        }
        (*was, *since) = (now_is, now);
    }

    /// Whether a log has stood as it does for so long.
    fn is_settled(&self, id: LogId, after: Duration, now: Duration) -> bool {
        self.logs.get(&id).is_some_and(|(_, since)| now - *since >= after)
    }

    /// Whether a node may be let lead something: it has given nothing away within so long, as one that is drained has.
    fn may_lead(&self, node: NodeId, after: Duration, now: Duration) -> bool {
        self.left.get(&node).is_none_or(|left| now - *left >= after)
    }

    /// Whether the members of some log have changed within so long: more of that may be to come.
    fn are_members_changing(&self, after: Duration, now: Duration) -> bool {
        self.members.is_some_and(|changed| now - changed < after)
    }
}

/// Looks again and again, until the node ends. `logs` are all that there are, `at` is where this node answers, and what has changed
/// within `settled_after` is left alone.
pub(super) async fn balance(client: Client, at: Endpoint, logs: Vec<LogId>, settled_after: Duration) {
    let clock = client.runtime().clock.clone();
    let mut changes = Changes::default();
    loop {
        clock.sleep((settled_after / 20).clamp(Duration::from_millis(250), Duration::from_secs(10))).await;
        match leads_registry(&client, &at).await {
            Ok(true) => {
                if let Err(error) = look(&client, &logs, settled_after, &mut changes).await {
                    tracing::debug!(error = %format!("{error:#}"), "leaders are not balanced for now");
                }
            }
            // Who comes to lead it begins to watch then.
            Ok(false) | Err(_) => changes = Changes::default(),
        }
    }
}

async fn status_at(client: &Client, at: &Endpoint, role: Role, number: u32) -> Result<StatusReply> {
    let request = AdminRequest { op: Some(Op::Status(Status::default())) };
    let asked = client.admin_at(at.clone(), role, number, request);
    let reply = client.runtime().timeout(LOOK_MAX, asked).await.context("no answer in time")??;
    reply.status.context("an answer without a status")
}

/// Whether the node there leads the registry: one node of all looks after what concerns all.
pub(super) async fn leads_registry(client: &Client, at: &Endpoint) -> Result<bool> {
    Ok(status_at(client, at, Role::Registry, 0).await?.leading)
}

async fn look(client: &Client, ids: &[LogId], settled_after: Duration, changes: &mut Changes) -> Result<()> {
    let mut logs = Vec::new();
    let mut nodes: BTreeMap<NodeId, String> = BTreeMap::new();
    for id in ids {
        let looked = client.runtime().timeout(LOOK_MAX, members::leader_of(client, *id)).await;
        let (status, _) = looked.with_context(|| format!("{id} has no leader"))??;
        let is_whole = status.members.iter().all(|member| member.voter);
        let now = client.runtime().clock.monotonic();
        let StatusReply { leader, epoch, config, .. } = status;
        changes.see(*id, Seen { leader, epoch, config }, now);
        let able = status.members.iter().filter(|member| {
            member.voter
                && (member.node == status.leader
                    || member.heard && member.matched + LAG_MAX >= status.log_last)
        });
        let able = able.map(|member| member.node);
        let able: BTreeSet<NodeId> =
            able.filter(|node| *node == leader || changes.may_lead(*node, settled_after, now)).collect();
        nodes.extend(status.members.iter().map(|member| (member.node, member.address.clone())));
        let is_settled = is_whole && changes.is_settled(*id, settled_after, now);
        logs.push(Led { id: *id, leader, able, is_settled });
    }
    if changes.are_members_changing(settled_after, client.runtime().clock.monotonic()) {
        return Ok(());
    }
    let Some((id, to)) = next_move(&logs) else { return Ok(()) };
    // A node without room, or whose disks fail, is left as it is.
    let at = Endpoint::from(nodes.get(&to).context("a member without an address")?.as_str());
    let status = status_at(client, &at, members::role_of(id), id.number).await?;
    if !status.fault.is_empty() || !status.node_faults.is_empty() {
        return Ok(());
    }
    let from = logs.iter().find(|led| led.id == id).map(|led| led.leader);
    let still = |status: &StatusReply| (Some(status.leader) == from).then_some(to);
    let leads = members::move_leader(client, id, &still).await?;
    tracing::warn!(log = %id, node = leads, "leads now, so that nodes lead as many logs as others");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn led(id: LogId, leader: NodeId, able: &[NodeId]) -> Led {
        Led { id, leader, able: able.iter().copied().collect(), is_settled: true }
    }

    /// Six logs that node 1 leads, of which these nodes have members.
    fn all_on_one(able: &[NodeId]) -> Vec<Led> {
        let shards = (0..4).map(LogId::shard);
        [LogId::REGISTRY, LogId::CDC].into_iter().chain(shards).map(|id| led(id, 1, able)).collect()
    }

    /// How many logs each node leads when nothing is moved any more, and after how many moves; `None` where that never comes.
    fn settled(mut logs: Vec<Led>) -> Option<(BTreeMap<NodeId, usize>, usize)> {
        for moves in 0..100 {
            let Some((id, to)) = next_move(&logs) else {
                let mut counts = BTreeMap::new();
                logs.iter().for_each(|led| *counts.entry(led.leader).or_default() += 1);
                return Some((counts, moves));
            };
            let led = logs.iter_mut().find(|led| led.id == id)?;
            assert!(led.able.contains(&to) && led.is_settled && led.leader != to);
            led.leader = to;
        }
        None
    }

    #[test]
    fn leaders_are_spread_and_then_left_alone() {
        let spread = |of: &[(NodeId, usize)], moves| Some((of.iter().copied().collect(), moves));
        assert_eq!(settled(all_on_one(&[1, 2, 3])), spread(&[(1, 2), (2, 2), (3, 2)], 4));
        assert_eq!(settled(all_on_one(&[1, 2])), spread(&[(1, 3), (2, 3)], 3));
        assert_eq!(settled(all_on_one(&[1])), spread(&[(1, 6)], 0));
        assert_eq!(settled(all_on_one(&[1, 2, 3, 4])).map(|(counts, _)| counts.len()), Some(4));
        let mut logs = all_on_one(&[1, 2, 3]);
        logs.iter_mut().for_each(|led| led.is_settled = false);
        assert_eq!(settled(logs.clone()), spread(&[(1, 6)], 0), "what has changed lately is left alone");
        logs[0].is_settled = true;
        assert_eq!(next_move(&logs), Some((LogId::REGISTRY, 2)));
        // The registry goes last.
        assert_eq!(next_move(&all_on_one(&[1, 2])).map(|(id, _)| id == LogId::REGISTRY), Some(false));
    }

    #[test]
    fn what_has_changed_is_left_alone_for_a_while() {
        let (mut changes, s, after) = (Changes::default(), Duration::from_secs, Duration::from_secs(10));
        let seen = |leader, epoch, config| Seen { leader, epoch, config };
        changes.see(LogId::CDC, seen(1, 3, 7), s(10));
        changes.see(LogId::REGISTRY, seen(2, 3, 7), s(10));
        assert!(
            !changes.is_settled(LogId::CDC, after, s(19)) && changes.is_settled(LogId::CDC, after, s(20))
        );
        // Node 1 is drained: it gives away what it leads, and gets nothing back, also not of what has not changed.
        changes.see(LogId::CDC, seen(2, 4, 7), s(30));
        assert!(
            !changes.is_settled(LogId::CDC, after, s(39))
                && changes.is_settled(LogId::REGISTRY, after, s(39))
        );
        assert!(!changes.may_lead(1, after, s(39)) && changes.may_lead(1, after, s(40)));
        assert!(changes.may_lead(2, after, s(31)) && !changes.are_members_changing(after, s(39)));
        // A node is put in the place of another, one log after the other.
        changes.see(LogId::CDC, seen(2, 4, 8), s(50));
        assert!(changes.are_members_changing(after, s(59)) && !changes.are_members_changing(after, s(60)));
        assert!(!changes.is_settled(LogId::CDC, after, s(59)));
        changes.see(LogId::CDC, seen(2, 4, 8), s(61));
        assert!(changes.is_settled(LogId::CDC, after, s(61)), "nothing has changed since");
    }

    #[test]
    fn planted_bugs_are_found() {
        mutants::plant(Some(Mutant::BalancedForNothing));
        let (is_planted, ends) = (mutants::planted().is_some(), settled(all_on_one(&[1, 2, 3, 4])).is_some());
        mutants::plant(None);
        assert_eq!(is_planted, !ends);
    }
}
