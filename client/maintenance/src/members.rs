//! Who keeps the logs of a running cluster, and who leads them: changes that are told again go on where they stopped.
//!
//! Every step is looked at anew from what the log's leader says, which refuses what would leave it without a quorum. Changes need the
//! cluster's key, which the client must have.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context as _, Result, bail};
use clutch_client::{Client, ClientError};
use clutch_proto::{
    admin::{
        AdminReply, AdminRequest, LogMember, MoveLeader, Reconfigure, Status, StatusReply, admin_request::Op,
    },
    log::LogId,
    session::Role,
    types::Code,
};

/// Pause before a log is looked at again.
const AGAIN: Duration = Duration::from_millis(200);
/// How often a change is refused before that is believed: leaders come and go, and silence may pass.
const REFUSALS_MAX: u32 = 10;
/// Pause after a refusal.
const AFTER_REFUSAL: Duration = Duration::from_millis(800);
/// How long a log may have no leader, and a member may not get on.
const STILL_MAX: Duration = Duration::from_secs(60);
/// How long a member may take for a snapshot.
const SNAPSHOT_MAX: Duration = Duration::from_secs(3600);
/// A member that lags no further than so many positions has what the others have.
const LAG_MAX: u64 = 1024;

/// What is to become of the members of a log.
#[derive(Clone, Copy, Debug)]
pub enum Change {
    /// This node keeps the log, too, and votes.
    Add(u64),
    /// This node does not keep it any more.
    Remove(u64),
    /// The second node keeps it in the place of the first.
    Replace(u64, u64),
}

/// The next thing to do on the way to a change.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// Nothing is left to do.
    Done,
    /// These are to be the members, and which of them vote.
    Members(BTreeMap<u64, bool>),
    /// This one is to lead.
    Lead(u64),
    /// This one does not have what the others have yet.
    Wait(u64),
}

/// The members of a log, and which of them vote.
pub fn members_of(status: &StatusReply) -> BTreeMap<u64, bool> {
    status.members.iter().map(|member| (member.node, member.voter)).collect()
}

fn matched(status: &StatusReply, node: u64) -> u64 {
    status.members.iter().find(|member| member.node == node).map_or(0, |member| member.matched)
}

/// Who had best lead instead of a node: the voter that has most of the log.
pub fn successor(status: &StatusReply, instead_of: u64) -> Option<u64> {
    let others =
        status.members.iter().filter(|member| member.voter && member.node != instead_of && member.heard);
    others.max_by_key(|member| member.matched).map(|member| member.node)
}

/// The next step of a change, by what a log's leader says.
fn next_step(status: &StatusReply, change: Change) -> Result<Step> {
    let members = members_of(status);
    let with = |node: u64, voter: bool| {
        let mut members = members.clone();
        members.insert(node, voter);
        members
    };
    let without = |node: u64, mut members: BTreeMap<u64, bool>| {
        members.remove(&node);
        Step::Members(members)
    };
    let has_all = |node: u64| matched(status, node) > 0 && matched(status, node) + LAG_MAX >= status.log_last;
    Ok(match change {
        Change::Replace(old, new) if !members.contains_key(&old) => match members.get(&new) {
            Some(true) => Step::Done,
            Some(false) | None => {
                bail!("node {old} is no member, and node {new} does not vote: which one is to be replaced?")
            }
        },
        Change::Add(node) | Change::Replace(_, node) if !members.contains_key(&node) => {
            Step::Members(with(node, false))
        }
        Change::Add(node) | Change::Replace(_, node) if !members[&node] && !has_all(node) => Step::Wait(node),
        Change::Add(node) if !members[&node] => Step::Members(with(node, true)),
        Change::Add(_) => Step::Done,
        Change::Remove(node) if !members.contains_key(&node) => Step::Done,
        Change::Remove(node) if status.leader == node => match successor(status, node) {
            Some(other) => Step::Lead(other),
            None => bail!("no other member that votes answers node {node}, which leads: add one, or wait"),
        },
        Change::Remove(node) => without(node, members.clone()),
        Change::Replace(old, new) if status.leader == old => match successor(status, old) {
            Some(other) => Step::Lead(other),
            None => Step::Members(with(new, true)),
        },
        Change::Replace(old, new) => without(old, with(new, true)),
    })
}

/// What a log's replicas are asked as.
pub fn role_of(id: LogId) -> Role {
    match id {
        LogId::REGISTRY => Role::Registry,
        LogId::CDC => Role::Cdc,
        LogId { .. } => Role::Shard,
    }
}

/// Asks the leader of a log, which is there; where nobody says where that is there is only one.
async fn ask_at(client: &Client, at: Option<&str>, id: LogId, op: Op) -> Result<AdminReply, ClientError> {
    let request = AdminRequest { op: Some(op) };
    match at {
        None => client.admin(role_of(id), id.number, request).await,
        Some(at) => client.admin_at(at.into(), role_of(id), id.number, request).await,
    }
}

/// What the leader of a log says, and where it is.
///
/// # Errors
/// When nobody leads it for a minute.
pub async fn leader_of(client: &Client, id: LogId) -> Result<(StatusReply, Option<String>)> {
    let clock = client.runtime().clock.clone();
    let began = clock.monotonic();
    let mut last = None;
    while clock.monotonic() - began < STILL_MAX {
        match look_for_leader(client, id).await {
            Ok(Some(found)) => return Ok(found),
            Ok(None) => {}
            Err(error) => last = Some(error),
        }
        // A leader may have gone: who leads now is placed anew.
        let _ = client.refresh_map().await;
        clock.sleep(AGAIN).await;
    }
    let error = last.map_or_else(|| "nobody leads it".to_owned(), |error| format!("{error:#}"));
    bail!("{id}: {error}")
}

async fn look_for_leader(client: &Client, id: LogId) -> Result<Option<(StatusReply, Option<String>)>> {
    let status = |reply: AdminReply| reply.status.context("an answer without a status");
    let request = AdminRequest { op: Some(Op::Status(Status::default())) };
    let one = status(client.admin(role_of(id), id.number, request).await?)?;
    let leader = one.members.iter().find(|member| member.node == one.leader);
    let at = leader.filter(|leader| !leader.address.is_empty()).map(|leader| leader.address.clone());
    if one.leading || at.is_none() {
        return Ok(one.leading.then_some((one, at)));
    }
    let leader = status(ask_at(client, at.as_deref(), id, Op::Status(Status::default())).await?)?;
    Ok(leader.leading.then_some((leader, at)))
}

/// What the leader of a log says of its members, after most of them have confirmed that it leads.
///
/// # Errors
/// When that cannot be had for a minute.
pub async fn confirmed(client: &Client, id: LogId) -> Result<StatusReply> {
    let clock = client.runtime().clock.clone();
    let began = clock.monotonic();
    loop {
        let (_, at) = leader_of(client, id).await?;
        match ask_at(client, at.as_deref(), id, Op::Status(Status { confirm: true, ..Status::default() }))
            .await
        {
            Ok(reply) => return reply.status.context("an answer without a status"),
            Err(error) if clock.monotonic() - began > STILL_MAX => {
                return Err(error).with_context(|| format!("{id}: no quorum confirms who leads"));
            }
            Err(_) => clock.sleep(AGAIN).await,
        }
    }
}

/// All nodes that the registry's leader knows, and where they are.
///
/// # Errors
/// When the registry cannot be asked.
pub async fn nodes(client: &Client) -> Result<BTreeMap<u64, String>> {
    client.map().await?;
    let (status, _) = leader_of(client, LogId::REGISTRY).await?;
    Ok(status.nodes.into_iter().map(|known| (known.node, known.address)).collect())
}

/// Changes the members of a log, and returns what its leader says then. `progress` is told how much a new member has, of how much.
///
/// # Errors
/// When the log has no leader, its leader refuses for good, or a new member does not get on; what was done by then stays.
pub async fn change(
    client: &Client,
    id: LogId,
    change: Change,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<StatusReply> {
    let clock = client.runtime().clock.clone();
    let (mut refusals, mut leads, mut moved) = (0, 0, (clock.monotonic(), 0));
    loop {
        let (status, at) = leader_of(client, id).await?;
        let op = match next_step(&status, change)? {
            Step::Done => {
                return Ok(status);
            }
            Step::Wait(node) => {
                let has = matched(&status, node);
                progress(has, status.log_last);
                if has > moved.1 {
                    moved = (clock.monotonic(), has);
                }
                // What has not moved may be on its way as a snapshot.
                let is_heard = status.members.iter().any(|member| member.node == node && member.heard);
                if clock.monotonic() - moved.0 > if is_heard { SNAPSHOT_MAX } else { STILL_MAX } {
                    bail!(
                        "node {node} has {has} of {} positions and does not get on: does it run, and is it reached?",
                        status.log_last
                    );
                }
                clock.sleep(AGAIN).await;
                continue;
            }
            Step::Lead(to) => {
                leads += 1;
                if leads > REFUSALS_MAX {
                    bail!("node {to} does not take over from node {}", status.leader);
                }
                Op::MoveLeader(MoveLeader { to })
            }
            Step::Members(members) => {
                let member = |(node, voter)| LogMember { node, voter, ..LogMember::default() };
                let members = members.into_iter().map(member).collect();
                Op::Reconfigure(Reconfigure { expect_config: status.config, members })
            }
        };
        match ask_at(client, at.as_deref(), id, op).await {
            Ok(_) => {}
            Err(error) if is_final(&error) || refusals == REFUSALS_MAX => return Err(error.into()),
            // Leaders and members may have changed, also by this request: the next look says.
            Err(_) => {
                refusals += 1;
                clock.sleep(AFTER_REFUSAL).await;
            }
        }
        clock.sleep(AGAIN).await;
    }
}

/// Whether asking again is of no use.
fn is_final(error: &ClientError) -> bool {
    matches!(error.code(), Some(Code::Permission | Code::NoSpace | Code::Unsupported | Code::Malformed))
}

/// Lets whom `to` says lead a log, until it says nobody; who leads then.
///
/// # Errors
/// When it says who is no voter, or who does not take over.
pub async fn move_leader(
    client: &Client,
    id: LogId,
    to: &(dyn Fn(&StatusReply) -> Option<u64> + Sync),
) -> Result<u64> {
    let clock = client.runtime().clock.clone();
    let mut tries = 0;
    loop {
        let (status, at) = leader_of(client, id).await?;
        let Some(to) = to(&status) else {
            return Ok(status.leader);
        };
        if members_of(&status).get(&to) != Some(&true) {
            bail!("node {to} is no voter of {id}: make it one first (clutch cluster add-replica {to} --all)");
        }
        if tries % 10 == 0 {
            match ask_at(client, at.as_deref(), id, Op::MoveLeader(MoveLeader { to })).await {
                Err(error) if is_final(&error) => return Err(error.into()),
                // It may be another's turn by now: the next look says.
                Ok(_) | Err(_) => {}
            }
        }
        tries += 1;
        if tries > 50 {
            bail!("{id}: node {to} does not take over; node {} leads", status.leader);
        }
        clock.sleep(AGAIN).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A log that has come to 5000: its members with a vote, those without, and who leads.
    fn status(voters: &[(u64, u64)], others: &[(u64, u64)], leader: u64) -> StatusReply {
        let member = |voter: bool| {
            move |(node, matched): &(u64, u64)| LogMember {
                node: *node,
                voter,
                matched: *matched,
                heard: *matched > 1000,
                ..LogMember::default()
            }
        };
        let members = voters.iter().map(member(true)).chain(others.iter().map(member(false))).collect();
        StatusReply { leader, log_last: 5000, members, ..StatusReply::default() }
    }

    fn members(voters: &[u64], others: &[u64]) -> Step {
        let voters = voters.iter().map(|node| (*node, true));
        Step::Members(voters.chain(others.iter().map(|node| (*node, false))).collect())
    }

    #[test]
    fn changes_go_step_by_step() {
        let three = [(1, 5000), (2, 4999), (3, 100)];
        for (voters, others, leader, change, expected) in [
            (&three[..], &[][..], 1, Change::Add(4), members(&[1, 2, 3], &[4])),
            (&three[..], &[(4, 3000)][..], 1, Change::Add(4), Step::Wait(4)),
            (&three[..], &[(4, 4000)][..], 1, Change::Add(4), members(&[1, 2, 3, 4], &[])),
            (&three[..], &[][..], 1, Change::Add(3), Step::Done),
            (&three[..], &[][..], 1, Change::Remove(1), Step::Lead(2)),
            (&three[..], &[][..], 1, Change::Remove(3), members(&[1, 2], &[])),
            (&three[..], &[][..], 1, Change::Remove(4), Step::Done),
            (&three[..], &[][..], 1, Change::Replace(3, 4), members(&[1, 2, 3], &[4])),
            (&three[..], &[(4, 0)][..], 1, Change::Replace(3, 4), Step::Wait(4)),
            (&three[..], &[(4, 5000)][..], 1, Change::Replace(3, 4), members(&[1, 2, 4], &[])),
            (&three[..], &[(4, 5000)][..], 1, Change::Replace(1, 4), Step::Lead(2)),
            (&three[..], &[][..], 1, Change::Replace(4, 3), Step::Done),
            // Who is heard leads rather than who has as much and is not.
            (&[(1, 5000), (2, 4000), (3, 900)], &[], 1, Change::Remove(1), Step::Lead(2)),
            (&three[..1], &[(4, 5000)][..], 1, Change::Replace(1, 4), members(&[1, 4], &[])),
            (&three[..2], &[][..], 2, Change::Replace(1, 2), members(&[2], &[])),
        ] {
            let status = status(voters, others, leader);
            assert_eq!(next_step(&status, change).expect("a step"), expected, "{change:?} of {status:?}");
        }
        assert!(next_step(&status(&three[..1], &[], 1), Change::Remove(1)).is_err(), "nobody would be left");
        for others in [&[][..], &[(4, 5000)]] {
            let mistyped = next_step(&status(&three, others, 1), Change::Replace(9, 4));
            assert!(mistyped.is_err(), "nobody would be replaced");
        }
        let young = StatusReply { log_last: 7, ..status(&three, &[(4, 0)], 1) };
        assert_eq!(next_step(&young, Change::Add(4)).expect("a step"), Step::Wait(4), "it has nothing yet");
    }
}
