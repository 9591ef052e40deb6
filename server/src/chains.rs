//! Which loglets a node's logs are made of: asked of the registry, and kept in a file, so that a node starts without it.
//!
//! The registry's own log has its chain in itself; the file says where to begin to read it. Whoever knows a later incarnation is
//! right. A node that holds records of a later one than anybody tells it of opens nothing: it would write to what is over.
//!
//! File `chains`, one JSON object and its checksum: `{"cluster":"16 hex digits","logs":[{"role":3,"number":0,"loglets":[{"incarnation":1,"base":0,
//! "engine":"local","parameters":""}]}]}`, a line feed, CRC-32 of the line before as 8 hex digits, a line feed.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use clutch_client::{Client, ClientError};
use clutch_log::{Chain, Engines, LogId};
use clutch_proto::registry::{self, GetChain, registry_request::Op};
use clutch_runtime::{Disk, Runtime};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

/// The file's name in a directory of `up`.
pub const FILE: &str = "chains";

/// What a node that knows a chain waits for the registry to say that there is a newer one: longer than two members are silent.
const NEWER_PATIENCE: Duration = Duration::from_secs(3);
/// Pause before the registry is asked again.
const AGAIN: Duration = Duration::from_millis(200);
/// How often it is said that the registry is waited for.
const SAY_AGAIN: Duration = Duration::from_secs(5);

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    cluster: String,
    logs: Vec<Row>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    role: u8,
    number: u32,
    loglets: Vec<Loglet>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Loglet {
    incarnation: u64,
    base: u64,
    engine: String,
    parameters: String,
}

fn encode(cluster: u64, chains: &BTreeMap<LogId, Chain>) -> Result<Vec<u8>> {
    let row = |(log, chain): (&LogId, &Chain)| Row {
        role: log.role,
        number: log.number,
        loglets: chain.to_wire().segments.into_iter().map(Loglet::from).collect(),
    };
    let file = File { cluster: format!("{cluster:016x}"), logs: chains.iter().map(row).collect() };
    let line = serde_json::to_string(&file)? + "\n";
    Ok(format!("{line}{:08x}\n", crc32fast::hash(line.as_bytes())).into_bytes())
}

/// The cluster and its chains; `None` when the bytes are no such file, or chains that cannot be right.
fn decode(bytes: &[u8]) -> Option<(u64, BTreeMap<LogId, Chain>)> {
    let text = std::str::from_utf8(bytes).ok()?;
    let (line, crc) = text.split_at(text.find('\n')? + 1);
    if crc != format!("{:08x}\n", crc32fast::hash(line.as_bytes())) {
        return None;
    }
    let file: File = serde_json::from_str(line).ok()?;
    let chain = |row: Row| {
        let log = LogId { role: row.role, number: row.number };
        let segments = row.loglets.into_iter().map(registry::Segment::from).collect();
        Some((log, Chain::from_wire(log, &registry::Chain { segments }).ok()?))
    };
    let cluster = u64::from_str_radix(&file.cluster, 16).ok()?;
    Some((cluster, file.logs.into_iter().map(chain).collect::<Option<_>>()?))
}

impl From<registry::Segment> for Loglet {
    fn from(segment: registry::Segment) -> Loglet {
        let registry::Segment { base_position, engine, parameters, incarnation } = segment;
        Loglet { incarnation, base: base_position, engine, parameters }
    }
}

impl From<Loglet> for registry::Segment {
    fn from(loglet: Loglet) -> registry::Segment {
        let Loglet { incarnation, base, engine, parameters } = loglet;
        registry::Segment { base_position: base, engine, parameters, incarnation }
    }
}

/// What logs begin with that nobody has begun yet: the same on all nodes of a cluster.
#[derive(Clone)]
pub struct NewLogs {
    engine: String,
    parameters: Arc<dyn Fn(LogId) -> String + Send + Sync>,
}

impl NewLogs {
    /// This engine, which needs to know nothing.
    pub fn of(engine: &str) -> NewLogs {
        NewLogs::with(engine, |_| String::new())
    }

    /// This engine, and of each log what the engine is to know.
    pub fn with(engine: &str, parameters: impl Fn(LogId) -> String + Send + Sync + 'static) -> NewLogs {
        NewLogs { engine: engine.to_owned(), parameters: Arc::new(parameters) }
    }

    /// The chain that a log begins with.
    pub(crate) fn chain(&self, log: LogId) -> Chain {
        Chain::first_with(log, &self.engine, (self.parameters)(log))
    }
}

/// The chains that a node knows. What is kept here is on its disk.
pub struct Chains {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    cluster: u64,
    known: Mutex<BTreeMap<LogId, Chain>>,
}

impl Chains {
    /// Those of a file; none where there is no file yet. Blocks on the disk.
    ///
    /// # Errors
    /// When the file cannot be read, is damaged, or is another cluster's.
    pub fn open(disk: Arc<dyn Disk>, path: PathBuf, cluster: u64) -> Result<Chains> {
        let mut known = BTreeMap::new();
        if disk.exists(&path) {
            let bytes = disk.read(&path).with_context(|| format!("read {}", path.display()))?;
            let (found, read) = decode(&bytes).with_context(|| {
                format!(
                    "{} is damaged; restore it from a copy, or remove it: the registry is asked again, and a log that it does \
                     not know to have been begun anew is refused",
                    path.display()
                )
            })?;
            ensure!(
                found == cluster,
                "{} is of cluster {found:016x}, not of {cluster:016x}; put back the one that was here, or remove it: the registry is \
                 asked again",
                path.display()
            );
            known = read;
        }
        Ok(Chains { disk, path, cluster, known: Mutex::new(known) })
    }

    /// The chain of a log, if it is known.
    pub fn get(&self, log: LogId) -> Option<Chain> {
        self.known.lock().get(&log).cloned()
    }

    /// Takes chains over, each unless a later incarnation of its log is known already. Durable when it returns. Blocks.
    pub fn keep(&self, chains: impl IntoIterator<Item = Chain>) -> Result<()> {
        let mut known = self.known.lock();
        let mut all = known.clone();
        for chain in chains {
            let is_newer = |old: &Chain| old.incarnation() < chain.incarnation();
            if all.get(&chain.log()).is_none_or(is_newer) {
                all.insert(chain.log(), chain);
            }
        }
        if all != *known {
            let written =
                encode(self.cluster, &all).and_then(|bytes| Ok(self.disk.replace(&self.path, &bytes)?));
            written.with_context(|| format!("write {}", self.path.display()))?;
            *known = all;
        }
        Ok(())
    }
}

/// Says what is wrong where this node holds records of a later life of a log than its chain tells of.
pub(crate) fn refuse_older(engines: &Engines, chains: &BTreeMap<LogId, Chain>) -> Result<()> {
    for id in engines.loglets() {
        let Some(chain) = chains.get(&id.log) else { continue };
        if id.incarnation > chain.incarnation() {
            bail!(
                "this node has records of incarnation {} of the log of {}, and its chain ends with incarnation {}: the chain \
                 is older than the log. Put back the file `chains` that was here with the log",
                id.incarnation,
                id.log,
                chain.incarnation()
            );
        }
    }
    Ok(())
}

/// Asks the registry for the chains of logs. Those that this node does not know are waited for, as long as it takes, and
/// begin as `begin` says where the registry has never heard of them; of the others it is asked once whether there is a newer one.
pub(crate) async fn ask(
    client: &Client,
    logs: &[LogId],
    known: &Chains,
    begin: &NewLogs,
) -> Result<Vec<Chain>> {
    let runtime = client.runtime().clone();
    let (old, new): (Vec<LogId>, Vec<LogId>) = logs.iter().partition(|log| known.get(**log).is_some());
    let mut chains = Vec::new();
    for log in new {
        let chain = awaited(client, log).await?;
        chains.push(chain.unwrap_or_else(|| begin.chain(log)));
    }
    // What was learned before the registry fell silent counts.
    let newer = runtime.timeout(NEWER_PATIENCE, async {
        for log in old {
            chains.extend(asked(client, log).await?);
        }
        Ok::<_, anyhow::Error>(())
    });
    match newer.await {
        Some(Ok(())) => {}
        Some(Err(error)) if !is_for_now(&error) => return Err(error),
        Some(Err(error)) => {
            runtime.note("node: starts with the chains that it knows");
            tracing::warn!(%error, "the registry does not say whether logs were begun anew");
        }
        None => {
            runtime.note("node: starts with the chains that it knows");
            tracing::warn!("the registry is silent; this node starts with the chains that it knows");
        }
    }
    Ok(chains)
}

/// Whether the registry may answer in a moment: who starts waits for it.
pub(crate) fn is_for_now(error: &anyhow::Error) -> bool {
    error.downcast_ref::<ClientError>().is_some_and(ClientError::may_pass)
}

/// The registry's word about a log, however long that takes.
async fn awaited(client: &Client, log: LogId) -> Result<Option<Chain>> {
    let runtime: &Runtime = client.runtime();
    let mut last_told = runtime.clock.monotonic();
    loop {
        let error = match asked(client, log).await {
            Ok(chain) => return Ok(chain),
            Err(error) => error,
        };
        if !is_for_now(&error) {
            return Err(error);
        }
        if runtime.clock.monotonic() - last_told > SAY_AGAIN {
            last_told = runtime.clock.monotonic();
            tracing::warn!(%log, %error, "waits for the registry to say what keeps a log");
        }
        runtime.clock.sleep(AGAIN).await;
    }
}

pub(crate) async fn asked(client: &Client, log: LogId) -> Result<Option<Chain>> {
    let op = GetChain { role: u32::from(log.role), number: u64::from(log.number) };
    match client.registry(Op::GetChain(op)).await {
        Ok(reply) => {
            let chain = reply.chain.context("an answer without a chain")?;
            Ok(Some(Chain::from_wire(log, &chain)?))
        }
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error).with_context(|| format!("ask the registry for the chain of {log}")),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clutch_log::LogletId;
    use clutch_log_local::{LocalEngine, Options};
    use clutch_runtime::simulated::{NodeId, World};

    use super::*;

    fn chain(log: LogId, parts: &[(u64, u64)]) -> Chain {
        let segment = |(incarnation, base): &(u64, u64)| {
            let parameters = format!("of {incarnation}");
            Loglet { incarnation: *incarnation, base: *base, engine: "local".into(), parameters }.into()
        };
        let segments = parts.iter().map(segment).collect();
        Chain::from_wire(log, &registry::Chain { segments }).expect("a good chain")
    }

    #[test]
    fn golden_chains_and_every_flip() {
        let all = [chain(LogId::REGISTRY, &[(1, 0)]), chain(LogId::shard(7), &[(1, 0), (2, 99), (5, 99)])];
        let all: BTreeMap<LogId, Chain> = all.into_iter().map(|chain| (chain.log(), chain)).collect();
        let bytes = encode(0x0102_0304_0506_0708, &all).expect("encodes");
        assert_eq!(bytes, include_bytes!("../../docs/formats/golden/chains"));
        assert_eq!(decode(&bytes), Some((0x0102_0304_0506_0708, all)));
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode(&flipped), None, "bit {bit}");
        }
        for end in 0..bytes.len() {
            assert_eq!(decode(&bytes[..end]), None, "{end} bytes");
        }
    }

    #[test]
    fn the_later_incarnation_is_kept() {
        let world = World::new(1);
        let disk = world.node(NodeId(0)).disk.clone();
        let open = || Chains::open(disk.clone(), "chains".into(), 7);
        let log = LogId::CDC;
        let (one, three) = (chain(log, &[(1, 0)]), chain(log, &[(1, 0), (3, 20)]));
        let known = open().expect("there is no file");
        assert_eq!(known.get(log), None);
        for (kept, expected) in [(&one, &one), (&three, &three), (&one, &three)] {
            known.keep([kept.clone()]).expect("writes");
            assert_eq!(known.get(log).as_ref(), Some(expected));
            assert_eq!(open().expect("reads").get(log).as_ref(), Some(expected), "it is on the disk");
        }
        assert!(Chains::open(disk.clone(), "chains".into(), 8).is_err(), "it is another cluster's");
        assert!(world.disk(NodeId(0)).corrupt(Path::new("chains"), 9, 1));
        assert!(open().is_err());
    }

    #[test]
    fn a_chain_that_is_older_than_the_log_opens_nothing() {
        let world = World::new(1);
        let runtime = world.node(NodeId(0));
        let engine = LocalEngine::open(&runtime, "log".into(), Options::default()).expect("opens");
        let done = world.run(NodeId(0), Duration::from_secs(10), async move {
            engine.log(LogletId { log: LogId::CDC, incarnation: 3 }).await.expect("opens");
            let engines = Engines::one("local", Arc::new(engine));
            let refused =
                |chain: Chain| refuse_older(&engines, &BTreeMap::from([(LogId::CDC, chain)])).is_err();
            assert!(refused(Chain::first(LogId::CDC, "local")));
            assert!(!refused(chain(LogId::CDC, &[(1, 0), (3, 4)])));
            assert!(!refused(chain(LogId::CDC, &[(4, 0)])));
        });
        assert!(done.is_some());
    }
}
