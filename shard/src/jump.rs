//! Goes past everything that a lost future has handed out: a log that was cut in the past would give the same ids once more,
//! and blocks of the lost future still lie on disks under them.

use clutch_proto::{
    Slot,
    shard::{CounterRow, Done, Jump, ShardEntry, SlotCounters, shard_entry::Body, shard_reply::Reply},
};
use clutch_state::{Stop, StoreError, View, store::decode_row};

use crate::{
    inode,
    rows::{Reapplied, check_slot},
    tables,
};

/// The entry for a log that was cut, from the state that it had at its end: a shard that applies it hands out no id of the
/// lost future again.
///
/// # Errors
/// [`StoreError`] when the state cannot be read.
pub fn past(lost: &dyn View) -> Result<ShardEntry, StoreError> {
    let rows = lost.scan(tables::COUNTER, &[], &[], usize::MAX)?;
    let counters: Result<Vec<SlotCounters>, StoreError> = rows
        .into_iter()
        .map(|(key, value)| {
            let [slot] = key[..] else {
                return Err(StoreError::Damaged(format!("a counter's key has {} bytes", key.len())));
            };
            let counters = decode_row(tables::COUNTER, &key, value)?;
            Ok(SlotCounters { slot: u32::from(slot), counters: Some(counters) })
        })
        .collect();
    Ok(ShardEntry { tag: None, body: Some(Body::Jump(Jump { slots: counters? })) })
}

/// Counters never go back, whatever the entry says.
pub(crate) fn apply(tx: &mut clutch_state::Tx<'_>, jump: &Jump) -> Reapplied {
    for line in &jump.slots {
        let slot = u8::try_from(line.slot).map_err(|_| Stop::unknown("a slot above 255"))?;
        let past = line.counters.as_ref().ok_or_else(|| Stop::unknown("a slot without counters"))?;
        check_slot(tx, Slot(slot))?;
        inode::with_counters(tx, Slot(slot), |row| {
            *row = CounterRow {
                inode: row.inode.max(past.inode),
                content: row.content.max(past.content),
                span: row.span.max(past.span),
                block: row.block.max(past.block),
            };
        })?;
    }
    Ok(Reply::Done(Done {}))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use clutch_proto::{
        InodeId,
        log::{Batch, Epoch, Position},
        shard::{CreateFile, Genesis, shard_request},
    };
    use clutch_state::{Applier, EntryOutcome, MemoryStore};
    use prost::Message as _;

    use super::*;
    use crate::Shard;

    fn apply(applier: &mut Applier<Shard>, entry: &ShardEntry) -> Reply {
        let entry = clutch_proto::state::Entry {
            stamp: 1,
            kind: Some(clutch_proto::state::entry::Kind::Body(entry.encode_to_vec().into())),
        };
        let position = applier.position().next();
        let batch = Batch { position, epoch: Epoch(1), entries: vec![entry.encode_to_vec().into()] };
        let mut applied = applier.apply(&batch).expect("applies");
        match applied.outcomes.remove(0).1 {
            EntryOutcome::Done(Ok(reply)) => reply.reply.expect("a reply"),
            other => panic!("{other:?}"),
        }
    }

    fn begun() -> (Arc<MemoryStore>, Applier<Shard>) {
        let store = Arc::new(MemoryStore::new());
        let mut applier = Applier::<Shard>::open(store.clone()).expect("opens");
        let genesis =
            Genesis { cluster: 7, slot_last: 255, rules: clutch_proto::rules::VERSION, ..Genesis::default() };
        let entry = ShardEntry { tag: None, body: Some(Body::Genesis(genesis)) };
        apply(&mut applier, &entry);
        assert_eq!(applier.position(), Position(1));
        (store, applier)
    }

    fn create(applier: &mut Applier<Shard>, name: &'static str) -> u64 {
        let op =
            CreateFile { dir: InodeId::ROOT.raw(), name: name.into(), mode: 0o644, ..CreateFile::default() };
        match apply(applier, &ShardEntry { tag: None, body: Some(shard_request::Op::CreateFile(op).into()) })
        {
            Reply::Edge(edge) => edge.target,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn ids_of_a_lost_future_do_not_come_again() {
        let (store, mut lost) = begun();
        let handed_out: Vec<u64> = ["a", "b", "c"].into_iter().map(|name| create(&mut lost, name)).collect();
        let jump = past(&*store).expect("reads");
        let (_, mut cut) = begun();
        apply(&mut cut, &jump);
        let next = create(&mut cut, "d");
        assert!(handed_out.iter().all(|id| *id < next), "{next:x} after {handed_out:x?}");
        // Once more, and from a past that knows less: counters stay where they are.
        apply(&mut cut, &jump);
        assert!(create(&mut cut, "e") > next);
    }
}
