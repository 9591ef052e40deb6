//! After the faults everything comes to rest within bounded virtual time: every replica leads and is well, no
//! transaction is in flight, and requests are answered.

use std::time::Duration;

use clutch_client::Client;
use clutch_log::LogId;
use clutch_proto::{
    admin::{AdminRequest, Status, StatusReply, admin_request},
    cdc::{ListTransactions, cdc_request},
    session::Role,
};

use super::Violation;

/// How long the CDC may take to finish what is in flight.
const REST_MAX: Duration = Duration::from_secs(120);

/// How a replica stands.
pub type Statuses = Vec<(LogId, StatusReply)>;

/// Waits until nothing is in flight; what is wrong if that does not happen, and how the replicas stand.
pub async fn at_rest(client: &Client) -> (Vec<Violation>, Statuses) {
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
        let request = AdminRequest { op: Some(admin_request::Op::Status(Status {})) };
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
    (violations, statuses)
}
