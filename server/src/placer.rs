//! Tells the registry which logs are led by this node, whatever else the node waits for.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result};
use clutch_client::Client;
use clutch_log::{Epoch, LogId};
use clutch_proto::{
    mutants::{self, Mutant},
    registry::{GetChain, PlaceCdc, PlaceShard, Segment, SwapChain, registry_request::Op},
    session::Role,
    types,
};
use parking_lot::Mutex;
use tokio::sync::mpsc;

use crate::{handler::INCARNATION, routes::Routes, stores::log_name};

/// Pause before the registry is told again what it did not hear.
const AGAIN: Duration = Duration::from_millis(200);

/// Which logs are led by this node at the moment.
pub(crate) struct Reigns {
    led: Mutex<BTreeMap<LogId, Epoch>>,
    news: mpsc::UnboundedSender<()>,
}

impl Reigns {
    /// None so far; what is received says that there may be another.
    pub(crate) fn new() -> (Arc<Reigns>, mpsc::UnboundedReceiver<()>) {
        let (news, heard) = mpsc::unbounded_channel();
        (Arc::new(Reigns { led: Mutex::default(), news }), heard)
    }

    /// A replica of this node leads from now on, or has ceased to.
    pub(crate) fn tell(&self, log: LogId, epoch: Option<Epoch>) {
        match epoch {
            Some(epoch) => drop(self.led.lock().insert(log, epoch)),
            None => drop(self.led.lock().remove(&log)),
        }
        // Who hears it ends with the node.
        let _ = self.news.send(());
    }

    /// All of them.
    pub(crate) fn all(&self) -> BTreeMap<LogId, Epoch> {
        self.led.lock().clone()
    }
}

/// What the registry is told of a reign.
pub(crate) struct Placing {
    /// Where the node is.
    pub(crate) address: String,
    /// How many shards the cluster has.
    pub(crate) shard_count: u32,
    /// The name of the log engine.
    pub(crate) engine: String,
    /// Where the other members are.
    pub(crate) routes: Arc<Routes>,
}

/// Tells the registry of each reign until that is known, or over.
pub(crate) struct Placer {
    client: Client,
    placing: Placing,
    reigns: Arc<Reigns>,
    heard: mpsc::UnboundedReceiver<()>,
    /// What the registry knows of this node: the reign, and the members in it.
    placed: BTreeMap<LogId, (Epoch, Vec<String>)>,
}

impl Placer {
    /// One that has told nothing yet.
    pub(crate) fn new(
        client: Client,
        placing: Placing,
        reigns: Arc<Reigns>,
        heard: mpsc::UnboundedReceiver<()>,
    ) -> Placer {
        Placer { client, placing, reigns, heard, placed: BTreeMap::new() }
    }

    /// What is led now before it returns, the others as a task.
    pub(crate) async fn run(mut self, stopping: Arc<AtomicBool>) -> Result<()> {
        self.place().await?;
        if mutants::is(Mutant::PlacedOnce) {
            return Ok(());
        }
        let runtime = self.client.runtime().clone();
        runtime.spawn("placer", async move {
            let clock = self.client.runtime().clock.clone();
            while !stopping.load(Ordering::Relaxed) {
                match self.place().await {
                    Ok(()) => {
                        if self.heard.recv().await.is_none() {
                            return;
                        }
                    }
                    Err(error) => {
                        self.client.runtime().note("node: a reign is not placed at once");
                        tracing::warn!(%error, "tell the registry what this node leads");
                        clock.sleep(AGAIN).await;
                    }
                }
            }
        });
        Ok(())
    }

    /// Tells the registry which logs are led here, as far as it has not been told. One that fails keeps no other from it. Where
    /// the registry itself is led, its members' clients find out.
    async fn place(&mut self) -> Result<()> {
        let mut failed = None;
        let led = self.reigns.all().into_iter().filter(|(log, _)| *log != LogId::REGISTRY);
        for (log, epoch) in led {
            let members = self.placing.routes.members(log);
            if self.placed.get(&log).is_some_and(|placed| (placed.0, &placed.1) == (epoch, &members)) {
                continue;
            }
            match self.place_one(log, epoch, members.clone()).await {
                Ok(()) => drop(self.placed.insert(log, (epoch, members))),
                Err(error) => failed = Some(error),
            }
        }
        failed.map_or(Ok(()), Err)
    }

    async fn place_one(&self, log: LogId, Epoch(epoch): Epoch, members: Vec<String>) -> Result<()> {
        let address = self.placing.address.clone();
        let (role, op) = if log == LogId::CDC {
            (Role::Cdc, Op::PlaceCdc(PlaceCdc { address, epoch, members }))
        } else {
            let (slot_first, slot_last) = clutch_registry::slots(log.number, self.placing.shard_count);
            let shard = log.number;
            let placement = types::ShardPlacement { shard, slot_first, slot_last, address, epoch, members };
            (Role::Shard, Op::PlaceShard(PlaceShard { placement: Some(placement) }))
        };
        let what = || format!("place {}", log_name(log));
        self.begin_chain(role, u64::from(log.number)).await.with_context(what)?;
        self.tell(op).await.with_context(what)
    }

    /// Tells the registry where something is led; that a newer leader was first is no failure.
    async fn tell(&self, op: Op) -> Result<()> {
        match self.client.registry(op).await {
            Err(error) if error.code() == Some(types::Code::Stale) => {
                self.client.runtime().note("node: a newer leader was placed first");
                tracing::warn!(%error, "this node's leadership is over before it was known");
                Ok(())
            }
            told => Ok(told.map(drop)?),
        }
    }

    async fn begin_chain(&self, role: Role, number: u64) -> Result<()> {
        let role = role as u32;
        match self.client.registry(Op::GetChain(GetChain { role, number })).await {
            Ok(_) => Ok(()),
            Err(error) if error.is_not_found() => {
                let append = Segment {
                    base_position: 0,
                    engine: self.placing.engine.clone(),
                    parameters: String::new(),
                    incarnation: INCARNATION,
                };
                let swap = SwapChain { role, number, expect_incarnation: 0, append: Some(append) };
                match self.client.registry(Op::SwapChain(swap)).await {
                    // Another member of the log was first.
                    Err(error) if error.code() == Some(types::Code::StaleIncarnation) => Ok(()),
                    begun => Ok(begun.map(drop)?),
                }
            }
            Err(error) => Err(error.into()),
        }
    }
}
