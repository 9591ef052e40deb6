//! What keeps loglets, and which of them a node has.

use std::{collections::BTreeMap, sync::Arc};

use async_trait::async_trait;

use crate::{
    Batch, Bounds, Chain, Log, LogFault, LogId, LogletId, LogletSpec, Position, Snapshots,
    virtual_log::VirtualLog,
};

/// What a loglet is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// It is the newest of its chain: the node takes part in it. It is made if there is none of that id.
    Append,
    /// Others follow it: it is read up to this index, of which each record is there or comes from other members, and nothing
    /// is written, no reign begun.
    Read {
        /// The last index that is wanted.
        upto: Position,
    },
}

/// One kind of log: it opens loglets, each of which is a [`Log`] that counts from 1. A node has one of each kind.
#[async_trait]
pub trait Engine: Send + Sync {
    /// Opens a loglet, for a replica that has these snapshots, whose positions are the loglet's own.
    ///
    /// # Errors
    /// Also when records are missing that nobody else has.
    async fn open_loglet(
        &self,
        id: LogletId,
        spec: &LogletSpec,
        purpose: Purpose,
        snapshots: Arc<dyn Snapshots>,
    ) -> Result<Arc<dyn Log>, LogFault>;
    /// Removes what the node has of a loglet, for good; that there is nothing is no error.
    async fn remove(&self, id: LogletId) -> Result<(), LogFault>;
    /// All loglets that the node has something of; none where they are not on its disk.
    fn loglets(&self) -> Vec<LogletId>;
    /// What a loglet holds here, without opening it; `None` when there is none of that id. Indices of the loglet.
    fn bounds(&self, id: LogletId) -> Option<Bounds>;
    /// The batch at an index, without opening the loglet; `None` when there is none, or where it cannot be told. Blocks.
    fn batch(&self, id: LogletId, index: Position) -> Result<Option<Batch>, LogFault>;
    /// What all loglets take here, and have taken; nothing where they are not on the node's disk.
    fn usage(&self) -> Usage;
}

/// What logs use of a node's disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes of what is there now.
    pub bytes: u64,
    /// Bytes that were appended since the start.
    pub appended: u64,
    /// How often appended bytes were synced since the start.
    pub syncs: u64,
}

/// What is put around each log that is opened: whoever looks on sees what the replica sees.
pub type Around = Arc<dyn Fn(LogId, Arc<dyn Log>) -> Arc<dyn Log> + Send + Sync>;

/// The engines of a node, by the names that chains call them by.
#[derive(Clone, Default)]
pub struct Engines {
    by_name: BTreeMap<String, Arc<dyn Engine>>,
    around: Option<Around>,
}

impl Engines {
    /// One engine.
    pub fn one(name: &str, engine: Arc<dyn Engine>) -> Engines {
        Engines { by_name: BTreeMap::from([(name.to_owned(), engine)]), around: None }
    }

    /// The same, and another.
    #[must_use]
    pub fn and(mut self, name: &str, engine: Arc<dyn Engine>) -> Engines {
        self.by_name.insert(name.to_owned(), engine);
        self
    }

    /// The same, whose logs have that around them.
    #[must_use]
    pub fn seen_through(self, around: Around) -> Engines {
        Engines { around: Some(around), ..self }
    }

    /// The engine of a loglet.
    ///
    /// # Errors
    /// When the node has none of that name.
    pub fn get(&self, id: LogletId, spec: &LogletSpec) -> Result<&Arc<dyn Engine>, LogFault> {
        self.by_name.get(&spec.engine).ok_or_else(|| {
            let known: Vec<&str> = self.by_name.keys().map(String::as_str).collect();
            LogFault::Unsupported(format!(
                "{id} is kept by the engine {:?}, which this node does not have (it has {}); start a build that has it",
                spec.engine,
                known.join(", ")
            ))
        })
    }

    /// Opens a log: every loglet of its chain, the newest to be appended to.
    pub async fn open(&self, chain: Chain, snapshots: Arc<dyn Snapshots>) -> Result<Arc<dyn Log>, LogFault> {
        let id = chain.log();
        let log: Arc<dyn Log> = Arc::new(VirtualLog::open(self, chain, snapshots).await?);
        Ok(match &self.around {
            Some(around) => around(id, log),
            None => log,
        })
    }

    /// What a log holds here, without opening it: nothing is appended.
    pub fn bounds(&self, chain: &Chain) -> Result<Bounds, LogFault> {
        let mut parts = Vec::new();
        for (id, spec) in chain.ids().zip(chain.loglets()) {
            let none = Bounds { first: Position(1), last: Position(0) };
            parts.push(self.get(id, spec)?.bounds(id).unwrap_or(none));
        }
        Ok(chain.bounds(&parts))
    }

    /// The batch at a position, before the log is opened; `None` when there is none, or where it cannot be told. Blocks.
    pub fn batch(&self, chain: &Chain, position: Position) -> Result<Option<Batch>, LogFault> {
        let number = chain.holder(position);
        let (Some(id), spec) = (chain.ids().nth(number), &chain.loglets()[number]) else { return Ok(None) };
        let Some(index) = spec.index_of(position) else { return Ok(None) };
        let batch = self.get(id, spec)?.batch(id, index).map_err(|fault| spec.fault(fault))?;
        Ok(batch.map(|batch| spec.batch(id, batch)))
    }

    /// All loglets that the node has something of.
    pub fn loglets(&self) -> Vec<LogletId> {
        self.by_name.values().flat_map(|engine| engine.loglets()).collect()
    }

    /// What all logs of the node take.
    pub fn usage(&self) -> Usage {
        self.by_name.values().map(|engine| engine.usage()).fold(Usage::default(), |all, one| Usage {
            bytes: all.bytes + one.bytes,
            appended: all.appended + one.appended,
            syncs: all.syncs + one.syncs,
        })
    }
}
