//! After the faults everything comes to rest within bounded virtual time: every log is led and every replica well, no
//! transaction is in flight, requests are answered, and the registry's map says who leads.

use std::time::Duration;

use clutch_client::Client;
use clutch_log::LogId;
use clutch_proto::{
    admin::{AdminRequest, Status, StatusReply, admin_request},
    cdc::{ListTransactions, cdc_request},
    session::Role,
    types::{Code, ShardPlacement},
};
use clutch_runtime::Endpoint;

use super::Violation;

/// How long the CDC may take to finish what is in flight.
const REST_MAX: Duration = Duration::from_secs(120);

/// How long the members of one log may take to elect a leader and to follow it, and the registry to be told.
const MEMBERS_REST_MAX: Duration = Duration::from_secs(20);

/// How a replica stands.
pub type Statuses = Vec<(LogId, StatusReply)>;

/// Where all members of each log are.
pub type Members = Vec<(LogId, Vec<Endpoint>)>;

/// Waits until nothing is in flight; what is wrong if that does not happen, and how the replicas stand, followers as well.
pub async fn at_rest(client: &Client, members: Members) -> (Vec<Violation>, Statuses) {
    let clock = client.runtime().clock.clone();
    let begin = clock.monotonic();
    let wrong = |what: String| (vec![Violation::new("convergence", what)], Vec::new());
    loop {
        let left = match client.cdc(cdc_request::Op::ListTransactions(ListTransactions {})).await {
            Ok(reply) if reply.transactions.is_empty() => break,
            Ok(reply) => {
                let shown: Vec<String> = reply
                    .transactions
                    .iter()
                    .take(5)
                    .map(|t| format!("{} {} ({})", t.transaction, t.kind, t.state))
                    .collect();
                format!("transactions stay in flight: {}", shown.join(", "))
            }
            Err(error) => format!("the CDC does not answer: {error}"),
        };
        if clock.monotonic() - begin > REST_MAX {
            return wrong(left);
        }
        clock.sleep(Duration::from_millis(100)).await;
    }
    let map = match client.refresh_map().await {
        Ok(map) => map,
        Err(error) => return wrong(format!("the registry does not answer: {error}")),
    };
    let mut all = vec![(LogId::REGISTRY, Role::Registry, 0), (LogId::CDC, Role::Cdc, 0)];
    all.extend(map.shards.iter().map(|s| (LogId::shard(s.shard), Role::Shard, s.shard)));
    let (mut violations, mut statuses) = (Vec::new(), Vec::new());
    for (id, role, number) in all {
        let members = members.iter().find(|(of, _)| *of == id).map_or(&[][..], |(_, all)| all);
        if members.len() > 1 {
            match all_at_rest(client, members, role, number).await {
                Ok(all) => statuses.extend(all.into_iter().map(|status| (id, status))),
                Err(what) => violations.push(Violation::new("convergence", format!("{id}: {what}"))),
            }
            continue;
        }
        let request = AdminRequest { op: Some(admin_request::Op::Status(Status::default())) };
        match client.admin(role, number, request).await.map(|reply| reply.status) {
            Ok(Some(status)) => {
                if !status.fault.is_empty() {
                    violations.push(Violation::new("state hash", format!("{id}: {}", status.fault)));
                } else if !status.leading {
                    violations.push(Violation::new("convergence", format!("{id} has no leader")));
                }
                statuses.push((id, status));
            }
            Ok(None) => violations.push(Violation::new("convergence", format!("{id} gives no status"))),
            Err(error) => {
                violations.push(Violation::new("convergence", format!("{id} does not answer: {error}")))
            }
        }
    }
    if violations.is_empty() {
        let named = map_names_leaders(client).await;
        violations.extend(named.err().map(|what| Violation::new("convergence", what)));
    }
    (violations, statuses)
}

/// Waits until the registry's map names the leader of every log that it knows, and the reign of every shard. Clients find a
/// leader without it, too, but every new one begins with the map.
async fn map_names_leaders(client: &Client) -> Result<(), String> {
    let clock = client.runtime().clock.clone();
    let begin = clock.monotonic();
    loop {
        let left = match unplaced(client).await {
            Ok(()) => return Ok(()),
            Err(left) => left,
        };
        if clock.monotonic() - begin > MEMBERS_REST_MAX {
            return Err(left);
        }
        clock.sleep(Duration::from_millis(100)).await;
    }
}

/// What the map says wrongly, if anything.
async fn unplaced(client: &Client) -> Result<(), String> {
    let map = client.refresh_map().await.map_err(|error| format!("the registry does not answer: {error}"))?;
    let mut named = vec![(LogId::CDC, Role::Cdc, 0, map.cdc_address.clone(), None)];
    let shard =
        |s: &ShardPlacement| (LogId::shard(s.shard), Role::Shard, s.shard, s.address.clone(), Some(s.epoch));
    named.extend(map.shards.iter().map(shard));
    for (id, role, number, address, epoch) in named {
        let request = AdminRequest { op: Some(admin_request::Op::Status(Status::default())) };
        let asked = client.admin_at(Endpoint::from(address.as_str()), role, number, request).await;
        let status = match asked.map(|reply| reply.status) {
            Ok(Some(status)) => status,
            // It is there, and has to be asked by somebody whose clock was not led ahead.
            Err(error) if error.code() == Some(Code::ClockAhead) => continue,
            other => return Err(format!("{address}, which the map names for {id}, says {other:?}")),
        };
        if !status.leading || epoch.is_some_and(|epoch| epoch != status.epoch) {
            return Err(format!(
                "the map names {address} in {epoch:?} for {id}, which leads: {}, in {}",
                status.leading, status.epoch
            ));
        }
    }
    Ok(())
}

/// Waits until one of a log's members leads and the others have applied what it has; how all stand then.
async fn all_at_rest(
    client: &Client,
    members: &[Endpoint],
    role: Role,
    number: u32,
) -> Result<Vec<StatusReply>, String> {
    let clock = client.runtime().clock.clone();
    let begin = clock.monotonic();
    let mut left = String::new();
    while clock.monotonic() - begin <= MEMBERS_REST_MAX {
        let (mut all, mut silent) = (Vec::new(), false);
        for member in members {
            let request = AdminRequest { op: Some(admin_request::Op::Status(Status::default())) };
            match client.admin_at(member.clone(), role, number, request).await.map(|reply| reply.status) {
                Ok(Some(status)) => all.push(status),
                Ok(None) => return Err(format!("{member} gives no status")),
                Err(error) => (left, silent) = (format!("{member} does not answer: {error}"), true),
            }
        }
        if let Some(fault) = all.iter().find(|status| !status.fault.is_empty()) {
            return Err(format!("{}: {}", fault.name, fault.fault));
        }
        let leaders: Vec<&StatusReply> = all.iter().filter(|status| status.leading).collect();
        let at: Vec<u64> = all.iter().map(|status| status.applied_position).collect();
        match leaders[..] {
            [leader] if all.len() == members.len() && at.iter().all(|at| *at >= leader.applied_position) => {
                return Ok(all);
            }
            [_] if all.len() == members.len() => left = format!("its members are at {at:?}"),
            _ if silent => {}
            [_] => {}
            _ => left = format!("{} of its members lead", leaders.len()),
        }
        clock.sleep(Duration::from_millis(100)).await;
    }
    Err(left)
}
