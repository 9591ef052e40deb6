//! Acknowledged bytes are never lost and never wrong, as long as no more disks are bad than parity makes up for (that which a
//! span was written with: some of it, where disks were missing); and no
//! disk holds a block that the metadata does not know, or lacks one that it has proven.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use clutch_client::ClientError;
use clutch_proto::InodeId;

use super::{Evidence, Violation};
use crate::{
    history::History,
    oracle::{Source, Span},
    sim_cluster::{CLIENT, SimCluster},
    workload::Worker,
};

/// Files whose blocks are read back at the end of a run.
const READ_BACK_MAX: usize = 300;

/// Reads files whole; what cannot be read, or nothing when that does not come to an end.
fn read_back(
    cluster: &SimCluster,
    history: &Arc<History>,
    files: Vec<InodeId>,
) -> Option<Vec<(InodeId, ClientError)>> {
    let worker = Worker {
        client: cluster.client(),
        history: history.clone(),
        cluster: cluster.cluster_id(),
        collide: cluster.config().collide,
    };
    cluster.world.run(CLIENT, Duration::from_secs(600), async move {
        let mut failed = Vec::new();
        for file in files {
            if let Err(error) = worker.read(file).await {
                failed.push((file, error));
            }
        }
        failed
    })
}

/// Whether a span was written with less parity than its policy says, and has too many of its blocks on disks that were made bad.
fn is_beyond(cluster: &SimCluster, span: &Span) -> bool {
    let (services, config) = (cluster.service_ids(), cluster.config());
    let is_sound =
        |id: &u64| services.iter().position(|s| s == id).is_some_and(|disk| cluster.is_sound(disk as u32));
    let sound = span.blocks.iter().filter(|(service, _)| is_sound(service)).count();
    span.blocks.len() < (config.data_blocks + config.parity_blocks) as usize
        && sound < config.data_blocks as usize
}

/// Compares what is on each disk with what it has proven, and with what the metadata know.
fn check_disks(
    cluster: &SimCluster,
    known: &BTreeSet<(u64, u64)>,
    proven: &BTreeSet<(u64, u64)>,
    violations: &mut Vec<Violation>,
) {
    for (number, service) in cluster.service_ids().into_iter().enumerate() {
        let number = number as u32;
        let there: BTreeSet<u64> = match cluster.blocks_on(number) {
            Ok(blocks) => blocks.into_iter().collect(),
            Err(error) => {
                violations
                    .push(Violation::new("data", format!("disk {number} cannot be looked through: {error}")));
                continue;
            }
        };
        // Whatever parity makes up for: a proof says that the block is durable.
        if cluster.is_sound(number) {
            for (_, block) in proven.iter().filter(|(s, block)| *s == service && !there.contains(block)) {
                let what = format!("disk {number} does not hold block {block:x}, which it has proven");
                violations.push(Violation::new("proofs", what));
            }
        }
        for block in there {
            // Damage may hit what says that a block is gone, too.
            if cluster.is_sound(number) && !known.contains(&(service, block)) {
                let what = format!("disk {number} holds block {block:x}, which no shard knows");
                violations.push(Violation::new("leaks", what));
            }
        }
    }
}

/// Compares what is stored with what was acknowledged.
pub fn check(evidence: &Evidence, cluster: &SimCluster, history: &Arc<History>) -> Vec<Violation> {
    let mut violations = Vec::new();
    let (mut known, mut proven) = (BTreeSet::new(), BTreeSet::new());
    let (mut in_blocks, mut beyond) = (Vec::new(), BTreeSet::new());
    for shard in evidence.shards.values() {
        known.extend(shard.oracle.spans.values().flat_map(|s| s.blocks.iter().copied()));
        let used =
            shard.oracle.spans.iter().filter(|(id, span)| span.certified && !shard.oracle.is_dead(**id));
        proven.extend(used.flat_map(|(_, span)| span.blocks.iter().copied()));
        for (id, row) in &shard.oracle.inodes {
            let Some(file) = InodeId::from_wire(*id) else { continue };
            let Some(expected) = history.bytes_of_content(file, row.content) else { continue };
            let extents = shard.oracle.contents.get(&row.content).map_or(&[][..], |c| &c.extents);
            let mut spans = extents.iter().filter_map(|(_, _, source)| source.span()).peekable();
            if spans.peek().is_some() {
                in_blocks.push(file);
                if spans.any(|id| shard.oracle.spans.get(&id).is_some_and(|span| is_beyond(cluster, span))) {
                    beyond.insert(file);
                }
                continue;
            }
            let mut stored = Vec::new();
            for (_, length, source) in extents {
                match source {
                    Source::Inline(bytes) => stored.extend_from_slice(bytes),
                    Source::Hole | Source::Span(..) => stored.resize(stored.len() + *length as usize, 0),
                }
            }
            if stored != *expected {
                violations
                    .push(Violation::new("data", format!("file {file} does not hold what was acknowledged")));
            }
        }
    }
    in_blocks.truncate(READ_BACK_MAX);
    let mut read = read_back(cluster, history, in_blocks.clone());
    // A node that was cut off while it started may give up only now: whoever looks after it starts it again.
    let gave_up = cluster.take_failed();
    if !gave_up.is_empty() {
        gave_up.into_iter().for_each(|node| cluster.restart(node));
        read = read_back(cluster, history, in_blocks);
    }
    match read {
        Some(failed) => {
            for (file, error) in failed {
                // Wrong bytes are never forgiven.
                if beyond.contains(&file) && matches!(error, ClientError::DataLost(_)) {
                    cluster.world.note("checkers: bytes are beyond their own parity");
                } else {
                    let what = format!("file {file} cannot be read after the faults: {error}");
                    violations.push(Violation::new("data", what));
                }
            }
        }
        None => violations.push(Violation::new("data", "reading back does not come to an end".into())),
    }
    check_disks(cluster, &known, &proven, &mut violations);
    violations.truncate(10);
    violations
}
