//! A toy machine over the real applier, overlay, client table and stores, against a sorted map: entries that read what earlier ones
//! of their batch wrote, that are refused after they wrote, that come twice, that are answered by later ones; batches cut in any
//! way; restarts, from the store and from a checkpoint of it.
//!
//! What an entry gives must not depend on how entries are cut into batches, the state not on the store below.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use bytes::Bytes;
use clutch_proto::{
    Refusal, Time,
    log::{Batch, Epoch, Position},
    rules::v1::{CLIENT_IDLE_LIFETIME_MS, FORGOTTEN_PER_BATCH_MAX},
    state::{Entry, entry::Kind},
    types::{ClientTag, Code},
};
use clutch_state::{
    Applied, Applier, EntryOutcome, Machine, MemoryStore, ProduceContext, Stop, Store, StoreError, Table, Tx,
    View, hash::digest, machine::Effects, store::WriteBatch,
};
use clutch_state_buffered::{BufferedStore, RowCache};
use parking_lot::Mutex;
use prost::Message;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

const ROWS: Table = Table(200);

/// One thing that an entry does.
#[derive(Clone, PartialEq, Message)]
struct Act {
    /// 0 get, 1 put, 2 delete, 3 insert, 4 scan, 5 remove what has not been looked at, by its digest.
    #[prost(uint32, tag = "1")]
    kind: u32,
    #[prost(bytes = "bytes", tag = "2")]
    key: Bytes,
    #[prost(bytes = "bytes", tag = "3")]
    until: Bytes,
    #[prost(uint64, tag = "4")]
    value: u64,
}

#[derive(Clone, PartialEq, Message)]
struct ToyEntry {
    #[prost(message, optional, tag = "1")]
    tag: Option<ClientTag>,
    #[prost(message, repeated, tag = "2")]
    acts: Vec<Act>,
    /// 0 not, 1 refused at its end, 2 the same if the key of its first act had no row, 3 refused for now: it may come again.
    #[prost(uint32, tag = "3")]
    refuse: u32,
    /// It is answered later, by another entry.
    #[prost(bool, tag = "4")]
    promise: bool,
    /// Whom it answers, as a transaction's last entry does.
    #[prost(message, optional, tag = "5")]
    answers: Option<ClientTag>,
    /// With what: 0 what it saw itself, 1 a refusal, 2 one after which the request may come again.
    #[prost(uint32, tag = "6")]
    with: u32,
}

impl ToyEntry {
    /// Whether it is refused itself, and how.
    fn refused_with(&self, has_no_row: bool) -> Option<Code> {
        match self.refuse {
            1 => Some(Code::NotFound),
            2 if has_no_row => Some(Code::NotFound),
            3 => Some(Code::Busy),
            _ => None,
        }
    }

    /// The refusal with which it answers another.
    fn refusal(&self) -> Option<Code> {
        [None, Some(Code::NotFound), Some(Code::Busy)][self.with as usize % 3]
    }
}

/// What the reads of an entry saw: values, 0 for none.
#[derive(Clone, PartialEq, Message)]
struct Seen {
    #[prost(uint64, repeated, tag = "1")]
    values: Vec<u64>,
}

#[derive(Clone, PartialEq, Message)]
struct Value {
    #[prost(uint64, tag = "1")]
    value: u64,
}

struct Toy;

impl Machine for Toy {
    const NAME: &'static str = "toy";
    type Request = ToyEntry;
    type Reply = Seen;
    type Entry = ToyEntry;
    type Effect = ();
    type Facts = ();

    fn check_home(_: &dyn View, _: u64, _: u32) -> Result<(), StoreError> {
        Ok(())
    }

    fn is_read(_: &ToyEntry) -> bool {
        false
    }

    fn gives_space_back(_: &ToyEntry) -> bool {
        false
    }

    fn read(_: &dyn View, _: &ToyEntry, (): &()) -> Result<Seen, Stop> {
        Err(Stop::refuse(Code::Unsupported, "a toy is not asked"))
    }

    fn produce(
        _: &dyn View,
        request: ToyEntry,
        _: Option<ClientTag>,
        _: &mut ProduceContext<'_>,
        (): &(),
    ) -> Result<ToyEntry, Stop> {
        Ok(request)
    }

    fn tag(entry: &ToyEntry) -> Option<&ClientTag> {
        entry.tag.as_ref()
    }

    fn apply(
        tx: &mut Tx<'_>,
        _: Position,
        _: Time,
        entry: ToyEntry,
        effects: &mut Effects<Toy>,
    ) -> Result<Applied<Seen>, Stop> {
        let first = entry.acts.first().map(|act| tx.get(ROWS, &act.key)).transpose()?.flatten();
        let refuse = entry.refused_with(first.is_none());
        let mut seen = Seen::default();
        let refusal = entry.refusal();
        for act in entry.acts {
            let row = Value { value: act.value };
            match act.kind {
                0 => {
                    let found: Option<Value> = tx.get_row(ROWS, &act.key)?;
                    seen.values.push(found.map_or(0, |row| row.value));
                }
                1 => tx.put_row(ROWS, &act.key, &row),
                2 => tx.delete(ROWS, &act.key),
                3 => tx.insert_row(ROWS, &act.key, &row),
                5 => {
                    let after = [&act.key[..], &[0]].concat();
                    if let Some((_, value)) = tx.scan(ROWS, &act.key, &after, 1)?.first() {
                        tx.remove_large(ROWS, &act.key, digest(value));
                    }
                }
                _ => {
                    for (_, bytes) in tx.scan(ROWS, &act.key, &act.until, act.value as usize)? {
                        seen.values.push(Value::decode(bytes).map_or(u64::MAX, |row| row.value));
                    }
                }
            }
        }
        if let Some(tag) = entry.answers {
            let answer =
                refusal.map_or(Ok(seen.clone()), |code| Err(Refusal::new(code, "as it was asked to")));
            effects.resolved.push((tag, answer));
        }
        if let Some(code) = refuse {
            return Err(Stop::refuse(code, "as it was asked to"));
        }
        Ok(if entry.promise { Applied::Pending } else { Applied::Reply(seen) })
    }
}

/// What is known of an entry: nothing yet, what it saw, or why it was refused.
type ToyOutcome = Option<Result<Vec<u64>, Code>>;

/// The naive machine.
#[derive(Default)]
struct Model {
    rows: BTreeMap<Bytes, u64>,
    outcomes: BTreeMap<(u64, u64), ToyOutcome>,
}

impl Model {
    fn apply(&mut self, entry: &ToyEntry) -> ToyOutcome {
        let tag = entry.tag.as_ref().map(|tag| (tag.client, tag.sequence));
        if let Some(known) = tag.and_then(|tag| self.outcomes.get(&tag)) {
            return known.clone();
        }
        let before = self.rows.clone();
        let first = entry.acts.first().and_then(|act| self.rows.get(&act.key));
        let refuse = entry.refused_with(first.is_none());
        let mut seen = Vec::new();
        for act in &entry.acts {
            match act.kind {
                0 => seen.push(self.rows.get(&act.key).copied().unwrap_or(0)),
                1 | 3 => drop(self.rows.insert(act.key.clone(), act.value)),
                2 | 5 => drop(self.rows.remove(&act.key)),
                _ => {
                    let inside = |key: &Bytes| *key >= act.key && (act.until.is_empty() || *key < act.until);
                    let found = self.rows.iter().filter(|(key, _)| inside(key)).map(|(_, value)| *value);
                    seen.extend(found.take(act.value as usize));
                }
            }
        }
        let outcome = if let Some(code) = refuse {
            self.rows = before;
            Some(Err(code))
        } else if entry.promise {
            None
        } else {
            Some(Ok(seen.clone()))
        };
        if let Some(tag) = tag
            && refuse.is_none_or(|code| !code.is_retryable())
        {
            self.outcomes.insert(tag, outcome.clone());
        }
        if let (Some(tag), None) = (entry.answers, refuse) {
            let tag = (tag.client, tag.sequence);
            match entry.refusal() {
                Some(code) if code.is_retryable() => drop(self.outcomes.remove(&tag)),
                Some(code) => drop(self.outcomes.insert(tag, Some(Err(code)))),
                None => drop(self.outcomes.insert(tag, Some(Ok(seen)))),
            }
        }
        outcome
    }
}

fn key(number: u32) -> Bytes {
    format!("k{number:03}").into()
}

/// Entries over few keys, so that they meet.
fn entries(rng: &mut ChaCha8Rng) -> Vec<ToyEntry> {
    let (mut made, mut fresh) = (Vec::<ToyEntry>::new(), 100);
    for sequence in 1..=rng.random_range(5..60) {
        if !made.is_empty() && rng.random_ratio(1, 6) {
            let again = rng.random_range(0..made.len());
            made.push(made[again].clone());
            continue;
        }
        let promise = rng.random_ratio(1, 4);
        let mut acts = Vec::new();
        for _ in 0..rng.random_range(1..6) {
            let kind = rng.random_range(0..6u32);
            let (from, value) = (rng.random_range(0..8u32), rng.random_range(1..1000));
            acts.push(match kind {
                // Who is told to come again may be executed again.
                3 if !promise => {
                    // The caller's word: there was never one of that key.
                    fresh += 1;
                    Act { kind, key: key(fresh), until: Bytes::new(), value }
                }
                4 => {
                    let until = if rng.random() { key(from + rng.random_range(0..5)) } else { Bytes::new() };
                    Act { kind, key: key(from), until, value: rng.random_range(1..5) }
                }
                5 => Act { kind, key: key(from), until: Bytes::new(), value },
                _ => Act { kind: kind % 3, key: key(from), until: Bytes::new(), value },
            });
        }
        let tag = ClientTag { client: 100 + rng.random_range(0..3), sequence, acknowledged: 0, issued_at: 1 };
        let promised = made.iter().filter(|entry| entry.promise).map(|entry| entry.tag);
        let promised: Vec<_> = promised.flatten().collect();
        let answers = (!promised.is_empty() && rng.random_ratio(1, 3))
            .then(|| promised[rng.random_range(0..promised.len())]);
        made.push(ToyEntry {
            tag: Some(tag),
            acts,
            refuse: [0, 0, 1, 2, 3][rng.random_range(0..5usize)],
            promise,
            answers,
            with: rng.random_range(0..3),
        });
    }
    made
}

/// A store in memory whose checkpoint is a copy.
#[derive(Default)]
struct Copied {
    rows: MemoryStore,
    checkpoint: Mutex<Option<Arc<MemoryStore>>>,
}

impl View for Copied {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        self.rows.get(table, key)
    }

    fn visit(
        &self,
        table: Table,
        from: &[u8],
        until: &[u8],
        each: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), StoreError> {
        self.rows.visit(table, from, until, each)
    }
}

impl Store for Copied {
    fn write(&self, batch: WriteBatch) -> Result<(), StoreError> {
        self.rows.write(batch)
    }

    fn flush(&self) -> Result<(), StoreError> {
        self.rows.flush()
    }

    fn get_flushed(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        self.rows.get_flushed(table, key)
    }

    fn snapshot(&self) -> Result<Arc<dyn View>, StoreError> {
        self.rows.snapshot()
    }

    fn checkpoint(&self, _: &Path) -> Result<(), StoreError> {
        let copy = MemoryStore::new();
        for table in (0..=u8::MAX).map(Table) {
            let rows = self.rows.scan(table, &[], &[], usize::MAX)?;
            copy.write(rows.into_iter().map(|(key, row)| (table.stored_key(&key), Some(row))).collect())?;
        }
        *self.checkpoint.lock() = Some(Arc::new(copy));
        Ok(())
    }
}

/// A checkpoint stands where the state stands, and has its rows.
fn check_checkpoint(applier: &Applier<Toy>, below: &Copied) -> Result<(), String> {
    applier.store().checkpoint(Path::new("anywhere")).map_err(|e| e.to_string())?;
    let copy = below.checkpoint.lock().take().ok_or("no checkpoint was made")?;
    let opened = Applier::<Toy>::open(copy.clone()).map_err(|e| e.to_string())?;
    let rows = |store: &dyn Store| store.scan(ROWS, &[], &[], usize::MAX).map_err(|e| e.to_string());
    if (opened.position(), opened.hash()) != (applier.position(), applier.hash())
        || rows(&*copy)? != rows(&**applier.store())?
    {
        return Err(format!("a checkpoint at {} is of {}", applier.position(), opened.position()));
    }
    Ok(())
}

/// Applies all entries in batches of up to `batch_max`, and opens the state anew now and then; the hash at the end.
fn apply(
    entries: &[ToyEntry],
    below: &Copied,
    store: &dyn Fn() -> Arc<dyn Store>,
    batch_max: usize,
    rng: &mut ChaCha8Rng,
) -> Result<String, String> {
    let failed = |e: clutch_state::Fault| e.to_string();
    let mut model = Model::default();
    let mut applier = Applier::<Toy>::open(store()).map_err(failed)?;
    let (mut rest, mut position) = (entries, Position(0));
    while !rest.is_empty() {
        let (now, later) = rest.split_at(rng.random_range(1..=batch_max.min(rest.len())));
        rest = later;
        position = position.next();
        let encode = |entry: &ToyEntry| {
            let kind = Some(Kind::Body(entry.encode_to_vec().into()));
            Bytes::from(Entry { stamp: 1, kind }.encode_to_vec())
        };
        let batch = Batch { position, epoch: Epoch(1), entries: now.iter().map(encode).collect() };
        let applied = applier.apply(&batch).map_err(failed)?;
        for (entry, (_, outcome)) in now.iter().zip(applied.outcomes) {
            let expected = model.apply(entry);
            let found = match outcome {
                EntryOutcome::Done(Ok(seen)) => Some(Ok(seen.values)),
                EntryOutcome::Done(Err(refusal)) => Some(Err(refusal.code)),
                EntryOutcome::Pending => None,
                EntryOutcome::Internal => return Err("not an answer".into()),
            };
            if found != expected {
                return Err(format!("{entry:?} gave {found:?}, and should {expected:?}"));
            }
        }
        if rng.random_ratio(1, 6) {
            check_checkpoint(&applier, below)?;
        }
        if rng.random_ratio(1, 4) {
            applier.store().flush().map_err(|e| e.to_string())?;
            applier = Applier::open(store()).map_err(failed)?;
        }
        let rows = applier.store().scan(ROWS, &[], &[], usize::MAX).map_err(|e| e.to_string())?;
        let rows: Result<BTreeMap<Bytes, u64>, _> =
            rows.into_iter().map(|(key, row)| Ok((key, Value::decode(row)?.value))).collect();
        let rows = rows.map_err(|e: prost::DecodeError| e.to_string())?;
        if rows != model.rows {
            return Err(format!("{rows:?} are there, and should be {:?}", model.rows));
        }
    }
    Ok(applier.hash().to_string())
}

/// Many clients come and go: how many are forgotten with which batch is the log's word alone, whoever opens the state when.
pub fn idle() -> Vec<String> {
    const HOUR: u64 = CLIENT_IDLE_LIFETIME_MS * 1_000_000;
    let touch = |client: u64, time: u64| {
        let tag = ClientTag { client, sequence: 1, acknowledged: 0, issued_at: time };
        let act = Act { kind: 1, key: key((client % 8) as u32), until: Bytes::new(), value: client };
        let entry = ToyEntry { tag: Some(tag), acts: vec![act], ..ToyEntry::default() };
        Bytes::from(
            Entry { stamp: time, kind: Some(Kind::Body(entry.encode_to_vec().into())) }.encode_to_vec(),
        )
    };
    // More than a few batches forget, and then time that passes batch by batch.
    let count = FORGOTTEN_PER_BATCH_MAX as u64 * 5;
    let mut batches = vec![(0..count).map(|n| touch(1000 + n, HOUR + n)).collect::<Vec<_>>()];
    batches.extend((0..12).map(|n| vec![touch(100_000 + n, 3 * HOUR + n * 30_000_000_000)]));
    let run = |reopened_before: usize| -> Result<Vec<String>, String> {
        let mut hashes = Vec::new();
        let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
        let mut applier = Applier::<Toy>::open(store.clone()).map_err(|e| e.to_string())?;
        for (number, entries) in batches.iter().enumerate() {
            if number == reopened_before {
                applier = Applier::open(store.clone()).map_err(|e| e.to_string())?;
            }
            let position = Position(number as u64 + 1);
            let batch = Batch { position, epoch: Epoch(1), entries: entries.clone() };
            applier.apply(&batch).map_err(|e| e.to_string())?;
            hashes.push(applier.hash().to_string());
        }
        let left = store.scan(Table::CLIENTS, &[], &[], usize::MAX).map_err(|e| e.to_string())?.len();
        match left {
            12 => Ok(hashes),
            _ => Err(format!("{left} clients are left of {count} idle ones and 12")),
        }
    };
    let mut wrong = Vec::new();
    let expected = run(usize::MAX);
    for before in 0..batches.len() {
        let found = run(before);
        if found.is_err() || found != expected {
            wrong.push(format!("opened before batch {before}: {found:?}, and {expected:?} where it goes on"));
        }
    }
    wrong
}

/// One history in several forms; what is wrong.
pub fn check(seed: u64) -> Vec<String> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let entries = entries(&mut rng);
    let mut wrong = Vec::new();
    let mut hashes = Vec::new();
    for (what, batch_max, buffered) in
        [("entries alone", 1, false), ("batches", 9, false), ("batches over a buffer", 9, true)]
    {
        let memory = Arc::new(Copied::default());
        let open = || -> Arc<dyn Store> {
            match buffered {
                // Passes rows on after a few, keeps few.
                true => Arc::new(BufferedStore::new(memory.clone(), RowCache::new(2 << 10), 5, 1 << 20)),
                false => memory.clone(),
            }
        };
        // The same cuts where the batches are as large.
        match apply(&entries, &memory, &open, batch_max, &mut rng.clone()) {
            // Outcomes name the position of their batch.
            Ok(hash) if batch_max > 1 => hashes.push(hash),
            Ok(_) => {}
            Err(error) => wrong.push(format!("seed {seed}, {what}: {error}")),
        }
    }
    hashes.dedup();
    if hashes.len() > 1 {
        wrong.push(format!("seed {seed}: the same batches gave the hashes {hashes:?}"));
    }
    wrong
}
