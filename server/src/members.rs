//! Asks the other members of a log what their states are.

use std::{
    collections::BTreeMap,
    sync::{Arc, OnceLock},
    time::Duration,
};

use bytes::Bytes;
use clutch_client::Client;
use clutch_log::{ConfigId, LogId, NodeId, Position};
use clutch_proto::{
    admin::{AdminRequest, HashAt, Status, admin_request::Op},
    session::Role,
};
use clutch_runtime::Endpoint;
use clutch_state_replica::{AskLevels, AskMembers};
use futures_util::{StreamExt as _, future::join_all, stream::FuturesUnordered};

use crate::routes::Routes;

/// A member that has not come so far yet is asked again after this.
const ASK_AGAIN: Duration = Duration::from_millis(100);
/// How long it is asked.
const ASK_FOR: Duration = Duration::from_secs(2);

/// By what members are asked; known when the node listens.
#[derive(Clone, Default)]
pub(crate) struct Asker(Arc<OnceLock<(Client, Arc<Routes>)>>);

impl Asker {
    /// From now on members can be asked.
    pub(crate) fn begin(&self, client: Client, routes: Arc<Routes>) {
        assert!(self.0.set((client, routes)).is_ok(), "a node begins to listen once");
    }

    /// Asks the other members of a log; nobody before the node listens.
    pub(crate) fn of(&self, log: LogId) -> AskMembers {
        let asker = self.clone();
        Arc::new(move |position| {
            let asker = asker.clone();
            Box::pin(async move {
                let Some((client, routes)) = asker.0.get() else { return BTreeMap::new() };
                let asked = routes.others(log).into_iter().map(|(node, endpoint)| async move {
                    let runtime = client.runtime();
                    let asked = runtime.timeout(ASK_FOR, hash_at(client, endpoint, log, position)).await;
                    asked.flatten().map(|hash| (node, hash))
                });
                join_all(asked).await.into_iter().flatten().collect::<BTreeMap<NodeId, Bytes>>()
            })
        })
    }

    /// Asks the other members of a log for the feature levels that they know; nobody before the node listens.
    pub(crate) fn levels(&self, log: LogId) -> AskLevels {
        let asker = self.clone();
        Arc::new(move || {
            let asker = asker.clone();
            Box::pin(async move {
                let Some((client, routes)) = asker.0.get() else { return BTreeMap::new() };
                let (role, number) = role_of(log);
                let asked = routes.others(log).into_iter().map(|(node, endpoint)| async move {
                    let request = AdminRequest { op: Some(Op::Status(Status::default())) };
                    let asked = client.admin_at(endpoint, role, number, request);
                    let status = client.runtime().timeout(ASK_FOR, asked).await?.ok()?.status?;
                    Some((node, status.level_known))
                });
                join_all(asked).await.into_iter().flatten().collect()
            })
        })
    }
}

impl Asker {
    /// Whether a log has other members than this node by now, which knows them as they were in a configuration: the leader says so, or
    /// who knows of a later one.
    pub(crate) async fn has_gone_on(&self, log: LogId, own: NodeId, config: ConfigId) -> bool {
        let Some((client, routes)) = self.0.get() else { return false };
        let (role, number) = role_of(log);
        // All that are known: none of those that were members once may be one now.
        let others = routes.nodes().into_iter().filter(|(node, _)| *node != own);
        let mut asked: FuturesUnordered<_> = others
            .map(|(_, endpoint)| async move {
                let request = AdminRequest { op: Some(Op::Status(Status::default())) };
                let asked = client.admin_at(endpoint, role, number, request);
                let status = client.runtime().timeout(ASK_FOR, asked).await?.ok()?.status?;
                let has = status.members.iter().any(|member| member.node == own);
                Some((status.leading, status.config, !has))
            })
            .collect();
        let mut newest = (config.0, false);
        while let Some(answer) = asked.next().await {
            match answer {
                Some((true, _, has_no)) => return has_no,
                Some((false, config, has_no)) => newest = newest.max((config, has_no)),
                None => {}
            }
        }
        newest.0 > config.0 && newest.1
    }
}

/// A member's hash, when it has come so far; `None` when it has forgotten it.
async fn hash_at(client: &Client, endpoint: Endpoint, log: LogId, position: Position) -> Option<Bytes> {
    let (role, number) = role_of(log);
    loop {
        let request = AdminRequest { op: Some(Op::HashAt(HashAt { position: position.0 })) };
        let reply = client.admin_at(endpoint.clone(), role, number, request).await;
        if let Ok(Some(reply)) = reply.map(|reply| reply.hash) {
            if !reply.hash.is_empty() {
                return Some(reply.hash);
            }
            if reply.position >= position.0 {
                return None;
            }
        }
        client.runtime().clock.sleep(ASK_AGAIN).await;
    }
}

fn role_of(log: LogId) -> (Role, u32) {
    match log {
        LogId::REGISTRY => (Role::Registry, 0),
        LogId::CDC => (Role::Cdc, 0),
        shard => (Role::Shard, shard.number),
    }
}
