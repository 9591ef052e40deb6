//! Asks the other members of a log what their states are.

use std::{
    collections::BTreeMap,
    sync::{Arc, OnceLock},
    time::Duration,
};

use bytes::Bytes;
use clutch_client::Client;
use clutch_log::{LogId, NodeId, Position};
use clutch_proto::{
    admin::{AdminRequest, HashAt, admin_request::Op},
    session::Role,
};
use clutch_runtime::Endpoint;
use clutch_state_replica::AskMembers;
use futures_util::future::join_all;

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
}

/// A member's hash, when it has come so far; `None` when it has forgotten it.
async fn hash_at(client: &Client, endpoint: Endpoint, log: LogId, position: Position) -> Option<Bytes> {
    let (role, number) = match log {
        LogId::REGISTRY => (Role::Registry, 0),
        LogId::CDC => (Role::Cdc, 0),
        shard => (Role::Shard, shard.number),
    };
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
