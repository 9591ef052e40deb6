//! Logs that are begun anew, as another incarnation of them: who starts hears of it, or goes on with what it knows while the
//! registry is away; who leads what is over gives it up; and every reader has all of both lives.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use clutch_client::{Client, ClientError};
use clutch_log::{Chain, Log, LogId, LogletId, Position};
use clutch_proto::{
    InodeId,
    log::Epoch,
    registry::{GetChain, Segment, SwapChain, registry_request::Op},
    session::{Request, Response, Role},
    shard::{ShardEntry, ShardRequest, Stat, shard_entry, shard_request},
    state::{Entry, entry::Kind},
    types::{Code, ShardPlacement},
};
use clutch_runtime::{Lane, simulated::NodeId};
use prost::Message as _;

use crate::{
    sim_cluster::{CLIENT, ClusterConfig, REGISTRY, SimCluster, endpoint},
    workload::attributes,
};

/// Whoever asks for a log by hand.
const OPERATOR: NodeId = NodeId(CLIENT.0 + 7);
const SHARD: LogId = LogId { role: 3, number: 0 };
const PER_PART: u32 = 6;

fn cluster(seed: u64, replicas: u32) -> Result<SimCluster, String> {
    let config = ClusterConfig { flush_permille: 300, replicas, ..ClusterConfig::of(1, 3, (1, 1)) };
    SimCluster::start_with(seed, config).ok_or_else(|| "the cluster does not come up".into())
}

fn run<T: Send + 'static>(
    cluster: &SimCluster,
    part: impl Future<Output = Result<T, ClientError>> + Send + 'static,
) -> Result<T, String> {
    let ended = cluster.world.run(CLIENT, Duration::from_secs(300), part);
    ended.ok_or("it does not come to an end")?.map_err(|e| e.to_string())
}

/// Directories and a file whose names begin with the part's.
fn work(cluster: &SimCluster, client: &Client, part: &'static str) -> Result<(), String> {
    let client = client.clone();
    run(cluster, async move {
        for number in 0..PER_PART {
            let name = Bytes::from(format!("{part}{number}"));
            client.make_directory(InodeId::ROOT, &name, attributes()).await?;
        }
        let bytes = part.as_bytes().repeat(1000);
        let name = Bytes::from(format!("{part} file"));
        client.write_file(InodeId::ROOT, &name, attributes(), true, &mut &bytes[..]).await.map(drop)
    })
}

/// What is missing of parts.
fn missing(cluster: &SimCluster, client: &Client, parts: &'static [&'static str]) -> Result<(), String> {
    let client = client.clone();
    run(cluster, async move {
        for part in parts {
            for number in 0..PER_PART {
                client.lookup(InodeId::ROOT, &Bytes::from(format!("{part}{number}"))).await?;
            }
            let found = client.lookup(InodeId::ROOT, &Bytes::from(format!("{part} file"))).await?;
            let id = InodeId::from_wire(found.target).ok_or(ClientError::Local("no id".into()))?;
            let mut read = Vec::new();
            let mut sink = |bytes: Bytes| {
                read.extend_from_slice(&bytes);
                Ok(())
            };
            client.read_file(id, &mut sink).await?;
            if read != part.as_bytes().repeat(1000) {
                return Err(ClientError::Local(format!("the file of {part:?} has other bytes")));
            }
        }
        Ok(())
    })
    .map_err(|what| format!("of {parts:?}: {what}"))
}

/// The chain of the shard as the registry has it.
fn chain(cluster: &SimCluster, client: &Client) -> Result<Chain, String> {
    let client = client.clone();
    let get = GetChain { role: u32::from(SHARD.role), number: u64::from(SHARD.number) };
    let reply = run(cluster, async move { client.registry(Op::GetChain(get)).await })?;
    Chain::from_wire(SHARD, &reply.chain.ok_or("no chain")?).map_err(|e| e.to_string())
}

/// A life of the shard's log, by itself.
fn loglet(cluster: &SimCluster, incarnation: u32) -> Arc<dyn Log> {
    let id = LogletId { log: SHARD, incarnation };
    cluster.logs.log(&cluster.world.node(OPERATOR), id, u64::from(OPERATOR.0))
}

/// Ends the newest life of the shard's log and tells the registry of another, which begins behind it.
fn begin_anew(cluster: &SimCluster, client: &Client, is_sealed: bool) -> Result<(), String> {
    let chain = chain(cluster, client)?;
    let (expect, base) = (chain.incarnation(), chain.newest().base.0);
    let log = loglet(cluster, expect);
    let tail = match is_sealed {
        true => cluster.world.run(OPERATOR, Duration::from_secs(10), async move { log.seal().await }),
        false => Some(Ok(log.status().bounds.last)),
    };
    let tail = tail.ok_or("sealing does not end")?.map_err(|e| e.to_string())?;
    let append = Segment {
        base_position: base + tail.0,
        engine: "sim".into(),
        parameters: String::new(),
        incarnation: u64::from(expect) + 1,
    };
    let swap = SwapChain {
        role: u32::from(SHARD.role),
        number: u64::from(SHARD.number),
        expect_incarnation: u64::from(expect),
        append: Some(append),
    };
    let client = client.clone();
    run(cluster, async move { client.registry(Op::SwapChain(swap)).await }).map(drop)
}

/// Where the map says that the shard is led.
fn placed(cluster: &SimCluster, client: &Client) -> Result<ShardPlacement, String> {
    let client = client.clone();
    let map = run(cluster, async move { client.refresh_map().await })?;
    map.shards.first().cloned().ok_or_else(|| "the map has no shard".into())
}

/// Waits until the map says that the shard is led in that life of its log.
fn led_in(cluster: &SimCluster, client: &Client, incarnation: u32) -> Result<(), String> {
    for _ in 0..200 {
        if Epoch(placed(cluster, client)?.epoch).incarnation() == incarnation {
            return Ok(());
        }
        cluster.pause(Duration::from_millis(100));
    }
    Err(format!("the map does not name incarnation {incarnation}"))
}

fn restart_all(cluster: &SimCluster) {
    cluster.members(SHARD).into_iter().for_each(|node| cluster.restart(node));
}

fn recorded(cluster: &SimCluster) -> Result<(), String> {
    match cluster.recording.violations() {
        violations if violations.is_empty() => Ok(()),
        violations => Err(format!("{violations:?}")),
    }
}

/// Two further lives; then a member that has lost everything.
fn goes_on(seed: u64, replicas: u32) -> Result<(), String> {
    let cluster = cluster(seed, replicas)?;
    // It goes by the map that it has read, until it is told better.
    let client = cluster.keeping_client();
    work(&cluster, &client, "first")?;
    begin_anew(&cluster, &client, true)?;
    restart_all(&cluster);
    work(&cluster, &client, "second")?;
    missing(&cluster, &client, &["first", "second"])?;
    led_in(&cluster, &client, 2)?;
    begin_anew(&cluster, &client, true)?;
    restart_all(&cluster);
    work(&cluster, &client, "third")?;
    led_in(&cluster, &client, 3)?;
    let node = cluster.home(SHARD).ok_or("nobody keeps the shard")?;
    cluster.world.crash(node);
    cluster.lose_states(node);
    cluster.boot(node);
    missing(&cluster, &client, &["first", "second", "third"])?;
    // What the member has that lost its own, if the others served until now.
    cluster.pause(Duration::from_secs(5));
    missing(&cluster, &client, &["first", "second", "third"])?;
    let batches = cluster.recording.batches(SHARD);
    let lives: std::collections::BTreeSet<u32> = batches.values().map(|b| b.epoch.incarnation()).collect();
    if lives != [1, 2, 3].into() || !batches.values().is_sorted_by_key(|batch| batch.epoch) {
        return Err(format!("the log has entries of the lives {lives:?}"));
    }
    recorded(&cluster)
}

/// What a node answers who is asked by somebody who believes in a life of the shard's log.
fn answer(cluster: &SimCluster, node: NodeId, incarnation: u64) -> Result<Option<Code>, String> {
    let stat = shard_request::Op::Stat(Stat { id: InodeId::ROOT.raw() });
    let body = ShardRequest { op: Some(stat) }.encode_to_vec().into();
    let request = Request { role: Role::Shard as i32, incarnation, body, ..Request::default() };
    let network = cluster.world.node(OPERATOR).network.clone();
    let answer = cluster.world.run(OPERATOR, Duration::from_secs(10), async move {
        let bytes = request.encode_to_vec().into();
        network.call(&endpoint(node), Lane::Metadata, bytes, 1 << 20, Duration::from_secs(5)).await
    });
    let answer = answer.ok_or("no answer")?.map_err(|e| e.to_string())?;
    let response = Response::decode(answer).map_err(|e| e.to_string())?;
    Ok(response.error.and_then(|error| Code::try_from(error.code).ok()))
}

/// How many lists of disks were logged into the first life of the shard's log behind its end.
fn lists_behind(cluster: &SimCluster, end: Position) -> usize {
    let batches = cluster.recording.batches(SHARD);
    let over = batches.range(end.next()..).filter(|(_, batch)| batch.epoch.incarnation() == 1);
    let is_list = |entry: &&Bytes| {
        let Ok(Entry { kind: Some(Kind::Body(body)), .. }) = Entry::decode((*entry).clone()) else {
            return false;
        };
        let body = ShardEntry::decode(body).ok().and_then(|entry| entry.body);
        matches!(body, Some(shard_entry::Body::ServicesChanged(_)))
    };
    over.flat_map(|(_, batch)| &batch.entries).filter(is_list).count()
}

/// The shard's node starts while the registry is away, and leads the life of its log that it knows, which is over. When clients
/// write to it meanwhile, its state holds what does not count. What the registry knows of disks is not logged there.
fn gives_up(seed: u64, is_written: bool) -> Result<(), String> {
    let cluster = cluster(seed, 1)?;
    let client = cluster.keeping_client();
    work(&cluster, &client, "first")?;
    let node = cluster.home(SHARD).ok_or("nobody keeps the shard")?;
    // It logs nothing behind the end that is looked at.
    cluster.world.crash(node);
    begin_anew(&cluster, &client, false)?;
    let end = chain(&cluster, &client)?.newest().base;
    for (from, to) in [(node, REGISTRY), (REGISTRY, node)] {
        cluster.world.set_blocked(from, to, true);
    }
    cluster.boot(node);
    cluster.pause(Duration::from_secs(4));
    // It serves those who have not heard of another life, however long the registry is away.
    cluster.pause(Duration::from_secs(40));
    let looks = client.clone();
    run(&cluster, async move { looks.lookup(InodeId::ROOT, &Bytes::from_static(b"first0")).await })?;
    if is_written {
        let name = Bytes::from_static(b"does not count");
        let writes = client.clone();
        let made = async move { writes.make_directory(InodeId::ROOT, &name, attributes()).await.map(drop) };
        run(&cluster, made)?;
    }
    for (believed, is_refused) in [(0, false), (1, false), (2, true)] {
        let code = answer(&cluster, node, believed)?;
        if (code == Some(Code::StaleIncarnation)) != is_refused {
            return Err(format!("who believes in incarnation {believed} is answered {code:?}"));
        }
    }
    cluster.world.heal_network();
    let mut waited = Duration::ZERO;
    while answer(&cluster, node, 1)? != Some(Code::NotLeader) {
        if waited > Duration::from_secs(60) {
            return Err("the node goes on with what is over".into());
        }
        cluster.pause(Duration::from_millis(500));
        waited += Duration::from_millis(500);
    }
    match lists_behind(&cluster, end) {
        0 => {}
        lists => return Err(format!("{lists} lists of disks are logged into a life that is over")),
    }
    cluster.restart(node);
    cluster.pause(Duration::from_secs(5));
    // Also a replica's own marks do not count.
    match cluster.take_failed() == [node] {
        true => {
            cluster.lose_states(node);
            cluster.boot(node);
        }
        false if is_written => return Err("a state with what does not count is used".into()),
        false => {}
    }
    led_in(&cluster, &client, 2)?;
    work(&cluster, &client, "second")?;
    missing(&cluster, &client, &["first", "second"])
}

/// What is wrong.
pub fn all() -> Vec<String> {
    let mut wrong = Vec::new();
    for seed in [1, 2, 3] {
        for replicas in [1, 3] {
            let found = goes_on(seed, replicas).err();
            wrong.extend(found.map(|what| format!("seed {seed}, {replicas} members: {what}")));
        }
        for is_written in [true, false] {
            let found = gives_up(seed, is_written).err();
            wrong.extend(found.map(|what| format!("seed {seed}, gives up, written {is_written}: {what}")));
        }
    }
    wrong
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_log_that_is_begun_anew_goes_on() {
        assert_eq!(super::all(), Vec::<String>::new());
    }
}
