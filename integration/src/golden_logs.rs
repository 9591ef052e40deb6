//! Logs that are kept: a build must replay what an earlier one wrote to the hashes that were recorded then.
//!
//! A file holds all logs of one simulated cluster: batches one after another, compressed with LZ4. `docs/formats/golden/logs`
//! has the files and `hashes.txt`; the example `golden` makes more, and never writes over one.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    sync::Arc,
};

use anyhow::{Context as _, Result, bail};
use bytes::{Buf as _, BufMut as _, Bytes};
use clutch_cdc::Cdc;
use clutch_log::{Batch, Epoch, LogId, Position};
use clutch_proto::types::Code;
use clutch_registry::Registry;
use clutch_shard::Shard;
use clutch_state::{Applier, EntryOutcome, Machine, MemoryStore};

use crate::recording::Batches;

/// All logs of one cluster.
pub type Logs = BTreeMap<LogId, Batches>;

/// The bytes of a file.
pub fn encode(logs: &Logs) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (id, batch) in logs.iter().flat_map(|(id, batches)| batches.values().map(move |batch| (id, batch))) {
        bytes.put_u8(id.role);
        bytes.put_u32_le(id.number);
        bytes.put_u64_le(batch.position.0);
        bytes.put_u64_le(batch.epoch.0);
        bytes.put_u32_le(batch.entries.len() as u32);
        for entry in &batch.entries {
            bytes.put_u32_le(entry.len() as u32);
            bytes.put_slice(entry);
        }
    }
    lz4_flex::compress_prepend_size(&bytes)
}

/// What [`encode`] wrote.
pub fn decode(file: &[u8]) -> Result<Logs> {
    let mut bytes = Bytes::from(lz4_flex::decompress_size_prepended(file).context("decompress")?);
    let mut logs = Logs::new();
    while bytes.has_remaining() {
        let id = LogId { role: bytes.try_get_u8()?, number: bytes.try_get_u32_le()? };
        let (position, epoch) = (Position(bytes.try_get_u64_le()?), Epoch(bytes.try_get_u64_le()?));
        let mut entries = Vec::new();
        for _ in 0..bytes.try_get_u32_le()? {
            let len = bytes.try_get_u32_le()? as usize;
            if len > bytes.remaining() {
                bail!("an entry of {len} bytes, and {} are left", bytes.remaining());
            }
            entries.push(bytes.split_to(len));
        }
        logs.entry(id).or_default().insert(position, Batch { position, epoch, entries });
    }
    Ok(logs)
}

/// What a replay of all logs gives: a line with position and state hash for each, and the codes of all refusals that apply
/// decided.
pub fn replay(logs: &Logs) -> Result<(String, BTreeSet<Code>)> {
    let (mut lines, mut codes) = (String::new(), BTreeSet::new());
    for (id, batches) in logs {
        let (position, hash) = match *id {
            LogId::REGISTRY => replay_one::<Registry>(batches, &mut codes),
            LogId::CDC => replay_one::<Cdc>(batches, &mut codes),
            _ => replay_one::<Shard>(batches, &mut codes),
        }
        .with_context(|| format!("replay the log of {id}"))?;
        writeln!(lines, "{id} {} {hash}", position.0)?;
    }
    Ok((lines, codes))
}

fn replay_one<M: Machine>(batches: &Batches, codes: &mut BTreeSet<Code>) -> Result<(Position, String)> {
    let mut applier = Applier::<M>::open(Arc::new(MemoryStore::new()))?;
    for batch in batches.values() {
        if batch.position > applier.position().next() {
            applier.skip(Position(batch.position.0 - 1));
        }
        let applied = applier.apply(batch)?;
        codes.extend(applied.outcomes.iter().filter_map(|(.., outcome)| match outcome {
            EntryOutcome::Done(Err(refusal)) => Some(refusal.code),
            _ => None,
        }));
        codes.extend(applied.resolved.iter().filter_map(|(_, result)| result.as_ref().err().map(|r| r.code)));
    }
    Ok((applier.position(), applier.hash().to_string()))
}
