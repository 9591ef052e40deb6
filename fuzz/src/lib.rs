//! What the targets share: states to apply to, and the first byte as a choice.

use std::sync::Arc;

use bytes::Bytes;
use clutch_log::{Batch, Epoch};
use clutch_proto::state::{Entry, entry::Kind};
use clutch_state::{Applier, Machine, MemoryStore};
use prost::Message as _;

/// A machine that has begun.
pub fn begun<M: Machine>(genesis: Bytes) -> Applier<M> {
    let mut applier = Applier::open(Arc::new(MemoryStore::new())).expect("an empty store opens");
    apply(&mut applier, genesis);
    applier
}

/// Applies one body; a fault is an answer, a panic is a finding.
pub fn apply<M: Machine>(applier: &mut Applier<M>, body: Bytes) {
    let entry = Entry { stamp: 1, kind: Some(Kind::Body(body)) }.encode_to_vec();
    apply_raw(applier, vec![entry.into()]);
}

/// Applies raw entries as one batch.
pub fn apply_raw<M: Machine>(applier: &mut Applier<M>, entries: Vec<Bytes>) {
    let batch = Batch { position: applier.position().next(), epoch: Epoch(1), entries };
    drop(applier.apply(&batch));
}

/// Genesis of shard 0 of one.
pub fn shard_genesis() -> Bytes {
    use clutch_proto::shard::{Genesis, ShardEntry, shard_entry::Body};
    let genesis = Genesis { shard: 0, slot_first: 0, slot_last: 255, cluster: 1, root_mode: 0o755, rules: 1 };
    ShardEntry { tag: None, body: Some(Body::Genesis(genesis)) }.encode_to_vec().into()
}

/// Genesis of the CDC.
pub fn cdc_genesis() -> Bytes {
    use clutch_proto::cdc::{CdcEntry, Genesis, cdc_entry::Body};
    CdcEntry { tag: None, body: Some(Body::Genesis(Genesis { cluster: 1, rules: 1 })) }.encode_to_vec().into()
}

/// Genesis of the registry.
pub fn registry_genesis() -> Bytes {
    use clutch_proto::registry::{Genesis, RegistryEntry, registry_entry::Body};
    let genesis = Genesis { cluster: 1, shards: 1, default_policy: None, rules: 1 };
    RegistryEntry { tag: None, body: Some(Body::Genesis(genesis)) }.encode_to_vec().into()
}
