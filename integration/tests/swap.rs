//! An engine that does nothing is an engine: it is written against the log's contract alone, here, and what stands above the log
//! starts on it, waits for a leader and says so. Nothing of shards, states or nodes knows which engine there is.

use std::{path::PathBuf, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use clutch_client::{Client, ClientOptions};
use clutch_log::{
    Batch, Bounds, Commit, ConfigId, Engine, Engines, Epoch, Event, Events, Floors, Log, LogFault, LogId,
    LogletId, LogletSpec, Member, NodeId, Position, Purpose, Rejected, Snapshots, Status, Usage,
};
use clutch_proto::{
    admin::{self, AdminRequest, admin_request::Op},
    session::Role,
};
use clutch_runtime::simulated::{self, World};
use clutch_server::{
    Chains, ClusterFile, NewLogs, Node, NodeConfig, Packing, Peers, Roles,
    room::Room,
    stores::{IsHome, Rebuilt, StoreProvider},
};
use clutch_shard::{Keyring, Lifetimes, Pages};
use clutch_state::{MemoryStore, Store, StoreError};
use clutch_state_replica::OpenCheckpoint;

/// A log that takes nothing and tells nothing.
struct Nothing;

fn unsupported() -> LogFault {
    LogFault::Unsupported("this engine does nothing".into())
}

#[async_trait]
impl Log for Nothing {
    fn propose(&self, epoch: Epoch, _: Vec<Bytes>) -> Result<Commit, Rejected> {
        Err(Rejected::NotLeader { epoch, hint: None })
    }

    fn events(&self, _: Position) -> Box<dyn Events> {
        Box::new(Silence)
    }

    async fn read_barrier(&self, patience: Duration) -> Result<Position, LogFault> {
        Err(LogFault::NoQuorum { waited: patience })
    }

    async fn seal(&self) -> Result<Position, LogFault> {
        Err(unsupported())
    }

    async fn set_floors(&self, _: Floors) -> Result<(), LogFault> {
        Ok(())
    }

    async fn transfer_leader(&self, _: NodeId) -> Result<(), LogFault> {
        Err(unsupported())
    }

    fn resign(&self) {}

    async fn reconfigure(&self, _: ConfigId, _: Vec<Member>) -> Result<ConfigId, LogFault> {
        Err(unsupported())
    }

    fn status(&self) -> Status {
        Status {
            epoch: Epoch(0),
            leader: None,
            is_self: false,
            bounds: Bounds { first: Position(1), last: Position(0) },
            sealed: None,
            config: ConfigId::default(),
            members: Vec::new(),
            changes_kept: 0,
            queued_bytes: 0,
            fault: None,
        }
    }
}

struct Silence;

#[async_trait]
impl Events for Silence {
    async fn next(&mut self) -> Result<Event, LogFault> {
        std::future::pending().await
    }
}

/// Provides the engine, and stores in memory.
struct Nowhere;

#[async_trait]
impl Engine for Nowhere {
    async fn open_loglet(
        &self,
        _: LogletId,
        _: &LogletSpec,
        _: Purpose,
        _: Arc<dyn Snapshots>,
    ) -> Result<Arc<dyn Log>, LogFault> {
        Ok(Arc::new(Nothing))
    }

    async fn remove(&self, _: LogletId) -> Result<(), LogFault> {
        Ok(())
    }

    fn loglets(&self) -> Vec<LogletId> {
        Vec::new()
    }

    fn bounds(&self, _: LogletId) -> Option<Bounds> {
        None
    }

    fn batch(&self, _: LogletId, _: Position) -> Result<Option<Batch>, LogFault> {
        Ok(None)
    }

    fn usage(&self) -> Usage {
        Usage::default()
    }
}

impl StoreProvider for Nowhere {
    fn store(&self, _: LogId) -> Result<Arc<dyn Store>, StoreError> {
        Ok(Arc::new(MemoryStore::new()))
    }

    fn checkpoints(&self, _: LogId) -> Option<PathBuf> {
        None
    }

    fn open_checkpoint(&self) -> OpenCheckpoint {
        Arc::new(|_| Err(StoreError::Engine("there are no checkpoints".into())))
    }

    fn condemn(&self, _: LogId, _: &str) {}

    fn condemned(&self, _: LogId) -> Option<String> {
        None
    }

    fn rebuild(&self, _: LogId, _: Bounds, _: IsHome<'_>) -> Result<Rebuilt, StoreError> {
        Ok(Rebuilt::default())
    }
}

#[test]
fn an_engine_that_does_nothing_is_an_engine() {
    let world = World::new(1);
    let node = simulated::NodeId(1);
    let runtime = world.node(node);
    let config = NodeConfig {
        runtime: runtime.clone(),
        listen: "node1".into(),
        advertise: None,
        failure_domain: None,
        registry: None,
        peers: Peers::none(),
        cluster: ClusterFile::generate(&runtime, 1, 1, 1, 0).expect("within the limits"),
        roles: Roles::all(1, Vec::new()),
        engines: Engines::one("nothing", Arc::new(Nowhere)),
        chains: Arc::new(Chains::open(runtime.disk.clone(), "chains".into(), 0).expect("there is no file")),
        stores: Arc::new(Nowhere),
        new_logs: NewLogs::of("nothing"),
        accept: Arc::new(drop),
        keyring: Keyring::default(),
        keys: [7; 32].into(),
        level: clutch_proto::level::KNOWN,
        of_several: None,
        process_usage: || None,
        lifetimes: Lifetimes::default(),
        pages: Pages::default(),
        clock_skew_ms_max: 500,
        down: Arc::new(|_| None),
        accept_clock: false,
        room: Arc::new(Room::new(runtime.disk.clone(), vec!["log".into()], Some(1 << 30), None)),
        reserve_on: Vec::new(),
        heal: None,
        packing: Packing::with(clutch_blocks::PackOptions::default()),
    };
    runtime.spawn("boot", async move {
        let started = Node::start(config).await;
        panic!("it starts without a leader: {}", started.is_ok());
    });
    let asks = simulated::NodeId(2);
    let options = ClientOptions { patience: Duration::from_secs(5), ..ClientOptions::default() };
    let client = Client::new(world.node(asks), "node1", options);
    let asked = world.run(asks, Duration::from_secs(120), async move {
        client.runtime().clock.sleep(Duration::from_secs(1)).await;
        let map = client.refresh_map().await;
        let mut standing = Vec::new();
        for role in [Role::Registry, Role::Cdc, Role::Shard] {
            let request = AdminRequest { op: Some(Op::Status(admin::Status::default())) };
            let reply = client.admin_at("node1".into(), role, 0, request).await.expect("an answer");
            standing.push(reply.status.expect("a status"));
        }
        (map.is_err(), standing)
    });
    let (is_refused, standing) = asked.expect("it ends");
    assert!(is_refused, "nobody leads the registry");
    for status in standing {
        assert!(!status.leading && status.fault.is_empty(), "{status:?}");
        assert_eq!((status.applied_position, status.log_last), (0, 0));
    }
}
