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
use clutch_log::{Chain, Epoch, LogId};
use clutch_proto::{
    mutants::{self, Mutant},
    registry::{PlaceCdc, PlaceShard, SwapChain, registry_request::Op},
    types,
};
use parking_lot::Mutex;
use tokio::sync::mpsc;

use crate::{
    chains::{self, Chains},
    routes::Routes,
    stores::log_name,
};

/// Pause before the registry is told again what it did not hear.
const AGAIN: Duration = Duration::from_millis(200);
/// How often it is looked whether a log that is led here has other members by now.
const LOOK_AT_MEMBERS: Duration = Duration::from_secs(2);

/// Which logs are led by this node at the moment.
pub(crate) struct Reigns {
    led: Mutex<BTreeMap<LogId, Led>>,
    news: mpsc::UnboundedSender<()>,
}

#[derive(Clone, Copy)]
struct Led {
    epoch: Epoch,
    /// Whether the registry has said that the log was not begun anew behind this life of it.
    is_newest: bool,
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
            Some(epoch) => drop(self.led.lock().insert(log, Led { epoch, is_newest: false })),
            None => drop(self.led.lock().remove(&log)),
        }
        // Who hears it ends with the node.
        let _ = self.news.send(());
    }

    /// All of them.
    pub(crate) fn all(&self) -> BTreeMap<LogId, Epoch> {
        self.led.lock().iter().map(|(log, led)| (*log, led.epoch)).collect()
    }

    /// Those whose log has not been begun anew, as far as the registry knows: what is logged of them counts.
    pub(crate) fn newest(&self) -> BTreeMap<LogId, Epoch> {
        let led = self.led.lock();
        let newest = led.iter().filter(|(_, led)| led.is_newest || mutants::is(Mutant::LoggedBeforeAsked));
        newest.map(|(log, led)| (*log, led.epoch)).collect()
    }

    fn is_newest(&self, log: LogId, epoch: Epoch) -> bool {
        self.led.lock().get(&log).is_some_and(|led| led.epoch == epoch && led.is_newest)
    }

    /// The registry knows no life of the log behind the one that is led in this reign.
    fn set_newest(&self, log: LogId, epoch: Epoch) {
        if let Some(led) = self.led.lock().get_mut(&log).filter(|led| led.epoch == epoch) {
            led.is_newest = true;
        }
    }
}

/// What the registry is told of a reign.
pub(crate) struct Placing {
    /// Where the node is.
    pub(crate) address: String,
    /// How many shards the cluster has.
    pub(crate) shard_count: u32,
    /// What keeps the logs.
    pub(crate) chains: Arc<Chains>,
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

    /// Asks the registry whether what is led now has been begun anew; where that cannot be asked, [`Placer::run`] does.
    pub(crate) async fn ask(&self) -> Result<()> {
        for (log, epoch) in self.reigns.all() {
            match self.is_newest(log, epoch).await {
                Err(error) if !chains::is_for_now(&error) => return Err(error),
                Err(error) => {
                    tracing::warn!(%error, "the registry does not say whether logs were begun anew");
                    return Ok(());
                }
                Ok(_) => {}
            }
        }
        Ok(())
    }

    /// What is led now before it returns, however long the registry is away, the others as a task.
    pub(crate) async fn run(mut self, stopping: Arc<AtomicBool>) -> Result<()> {
        while let Err(error) = self.place().await {
            if !chains::is_for_now(&error) {
                return Err(error);
            }
            tracing::warn!(%error, "waits for the registry to hear what this node leads");
            self.client.runtime().clock.sleep(AGAIN).await;
        }
        if mutants::is(Mutant::PlacedOnce) {
            return Ok(());
        }
        let runtime = self.client.runtime().clone();
        runtime.spawn("placer", async move {
            let clock = self.client.runtime().clock.clone();
            while !stopping.load(Ordering::Relaxed) {
                match self.place().await {
                    Ok(()) => {
                        let runtime = self.client.runtime().clone();
                        if let Some(None) = runtime.timeout(LOOK_AT_MEMBERS, self.heard.recv()).await {
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

    /// Tells the registry which logs are led here, as far as it has not been told. One that fails keeps no other from it.
    async fn place(&mut self) -> Result<()> {
        let mut failed = None;
        for (log, epoch) in self.reigns.all() {
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
        let op = match log {
            // Its members' clients find out where it is led.
            LogId::REGISTRY => None,
            LogId::CDC => Some(Op::PlaceCdc(PlaceCdc { address, epoch, members })),
            LogId { number: shard, .. } => {
                let (slot_first, slot_last) = clutch_registry::slots(shard, self.placing.shard_count);
                let placement =
                    types::ShardPlacement { shard, slot_first, slot_last, address, epoch, members };
                Some(Op::PlaceShard(PlaceShard { placement: Some(placement) }))
            }
        };
        match op {
            _ if !self.is_newest(log, Epoch(epoch)).await? => Ok(()),
            Some(op) => self.tell(op).await.with_context(|| format!("place {}", log_name(log))),
            None => Ok(()),
        }
    }

    /// Whether the life of a log that is led here in a reign is the newest; the registry is asked once in each reign.
    async fn is_newest(&self, log: LogId, epoch: Epoch) -> Result<bool> {
        if self.reigns.is_newest(log, epoch) {
            return Ok(true);
        }
        let told = self.tell_chain(log, epoch.incarnation()).await;
        let is_newest = told.with_context(|| format!("place {}", log_name(log)))?;
        if is_newest {
            self.reigns.set_newest(log, epoch);
        }
        Ok(is_newest)
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

    /// Tells the registry what keeps a log, as far as it does not know. False when the log was begun anew since this node
    /// opened it: what is led here is over, and nobody is to come here for it.
    async fn tell_chain(&self, log: LogId, led: u32) -> Result<bool> {
        let chains = &self.placing.chains;
        let own = chains.get(log).context("what is led was opened by a chain")?;
        loop {
            let known = chains::asked(&self.client, log).await?;
            let newest = known.as_ref().map_or(0, Chain::incarnation);
            if let Some(known) = known.filter(|_| newest > led && !mutants::is(Mutant::LaterLifeIgnored)) {
                self.client.runtime().note("node: a log was begun anew elsewhere");
                tracing::error!(
                    %log,
                    "incarnation {newest} of the log has begun, and this node leads {led}: it gives that up; start it again"
                );
                self.placing.routes.resign(log);
                let chains = chains.clone();
                let kept = self.client.runtime().blocking(move || chains.keep([known])).await;
                kept.context("the node stops")??;
                return Ok(false);
            }
            let mut untold = own.to_wire().segments.into_iter();
            let Some(append) = untold.find(|segment| segment.incarnation > u64::from(newest)) else {
                return Ok(true);
            };
            let (role, number) = (u32::from(log.role), u64::from(log.number));
            let swap =
                SwapChain { role, number, expect_incarnation: u64::from(newest), append: Some(append) };
            match self.client.registry(Op::SwapChain(swap)).await {
                // Another member of the log was first.
                Err(error) if error.code() == Some(types::Code::StaleIncarnation) => {}
                told => drop(told?),
            }
        }
    }
}
