//! Runs a machine over a store: one batch in, one atomic write and the outcomes out.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use bytes::Bytes;
use clutch_proto::{
    Refusal, Time, level,
    log::{Batch, Position},
    mutants::{self, Mutant},
    state::{AppliedRow, ClientRow, Entry, OutcomeRow, Verdict, entry::Kind},
    types::{ClientTag, Code},
};
use prost::Message as _;

use crate::{
    client_table::{ClientTable, Known, outcome_row},
    hash::{StateHash, Sums, row_hash},
    machine::{Applied, Effects, Machine, Stop},
    overlay::{Overlay, Tx},
    store::{Store, StoreError, Table, View, get_row},
};

/// The format of the rows that this build writes.
pub const FORMAT: u32 = 6;
/// Positions whose hash is kept for comparison.
pub const RECENT_HASHES_MAX: usize = 65_536;
const APPLIED_KEY: &[u8] = b"";

/// Why a replica must stop.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Fault {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A committed entry cannot be decoded by this build.
    #[error("entry {position}.{ordinal} cannot be decoded ({what}); a newer version may have written it")]
    Entry {
        /// The batch.
        position: Position,
        /// The entry within it.
        ordinal: usize,
        /// The decoder's words.
        what: String,
    },
    /// Part of an entry is not known to this build; becomes [`Fault::Entry`] where the entry's place is known.
    #[error("{0}")]
    Unknown(String),
    /// The log delivered something out of order.
    #[error("the log delivered position {got} after {applied}")]
    Order {
        /// What was applied last.
        applied: Position,
        /// What came.
        got: Position,
    },
    /// Another replica had another hash at the same position.
    #[error(
        "state differs at position {position}: {ours} here, {theirs} in the check; keep this replica's files as evidence and restore it from a peer"
    )]
    Diverged {
        /// Where.
        position: Position,
        /// Our hash.
        ours: StateHash,
        /// The check's hash.
        theirs: StateHash,
    },
    /// The rows were written by an older build, in a format that this one does not read.
    #[error(
        "the state has format {0}, this build reads format {FORMAT} only; with the build that wrote it, copy the files out (clutch fs get -r), then put them into a new directory"
    )]
    OldFormat(u32),
    /// The log has agreed on what this build does not know.
    #[error(
        "the members of the log have agreed on feature level {0}, and this build knows levels up to {known}: run the newer build, as they do",
        known = level::KNOWN
    )]
    Level(u32),
    /// The rows were written by a newer build.
    #[error("the state has format {0}, this build knows up to {FORMAT}; use the newer build")]
    Format(u32),
}

impl Fault {
    /// Whether the state on disk is wrong and must be built anew.
    pub fn is_damage(&self) -> bool {
        match self {
            Fault::Store(error) => error.is_damage(),
            Fault::Entry { .. }
            | Fault::Unknown(_)
            | Fault::Order { .. }
            | Fault::Diverged { .. }
            | Fault::OldFormat(_)
            | Fault::Level(_)
            | Fault::Format(_) => false,
        }
    }
}

/// What one entry gave.
#[derive(Clone, Debug, PartialEq)]
pub enum EntryOutcome<R> {
    /// Its answer.
    Done(Result<R, Refusal>),
    /// Answered when the transaction that it began ends.
    Pending,
    /// Nobody asked: a check or a time mark.
    Internal,
}

/// What a batch gave.
pub struct AppliedBatch<M: Machine> {
    /// Where.
    pub position: Position,
    /// The time of its last entry.
    pub time: Time,
    /// For each entry: its time and outcome.
    pub outcomes: Vec<(Time, EntryOutcome<M::Reply>)>,
    /// Actions for the leader's shell.
    pub actions: Vec<M::Effect>,
    /// Answers to requests that were pending.
    pub resolved: Vec<(ClientTag, Result<M::Reply, Refusal>)>,
}

/// How checks went so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckCounts {
    /// Compared and equal.
    pub compared: u64,
    /// The position asked for was not among the recent ones.
    pub not_compared: u64,
    /// Most members did not have one and the same.
    pub undecided: u64,
}

/// A machine's state and how far it has come.
pub struct Applier<M: Machine> {
    store: Arc<dyn Store>,
    position: Position,
    time: Time,
    /// CRC-32 over the batch at the stored position, which may lie before `position` by records of the engine.
    stored: (Position, u32),
    sums: Sums,
    /// The feature level that the log has agreed on.
    level: u32,
    /// The same with the entries of the batch that is being applied.
    agreed: u32,
    clients: ClientTable,
    recent: VecDeque<(Position, StateHash)>,
    checks: CheckCounts,
    machine: std::marker::PhantomData<fn() -> M>,
}

impl<M: Machine> Applier<M> {
    /// Opens a state where it stands; an empty store stands before the first position.
    pub fn open(store: Arc<dyn Store>) -> Result<Applier<M>, Fault> {
        let applied: AppliedRow = get_row(&*store, Table::APPLIED, APPLIED_KEY)?.unwrap_or_default();
        if applied.format > FORMAT {
            return Err(Fault::Format(applied.format));
        }
        if applied.position > 0 && applied.format < FORMAT {
            return Err(Fault::OldFormat(applied.format));
        }
        let sums = stored_sums(&*store)?;
        let level = stored_level(&*store)?;
        let mut applier = Applier {
            store,
            position: Position(applied.position),
            time: Time(applied.time),
            stored: (Position(applied.position), applied.batch_crc),
            sums,
            level,
            agreed: level,
            clients: ClientTable::default(),
            recent: VecDeque::new(),
            checks: CheckCounts::default(),
            machine: std::marker::PhantomData,
        };
        applier.remember_hash();
        Ok(applier)
    }

    /// The feature level that the log has agreed on.
    pub fn level(&self) -> u32 {
        self.level
    }

    /// The last position applied.
    pub fn position(&self) -> Position {
        self.position
    }

    /// The time of the last entry applied.
    pub fn time(&self) -> Time {
        self.time
    }

    /// Where the last batch stands that is in the state, and the checksum of its entries: the log must hold that batch.
    pub fn last_batch(&self) -> (Position, u32) {
        self.stored
    }

    /// The hash of the state now.
    pub fn hash(&self) -> StateHash {
        self.sums.total()
    }

    /// The hash after `position`; `None` when it lies too far back or ahead. Gaps keep the hash before them.
    pub fn hash_at(&self, position: Position) -> Option<StateHash> {
        if position > self.position {
            return None;
        }
        let after = self.recent.partition_point(|(p, _)| *p <= position);
        self.recent.get(after.checked_sub(1)?).map(|(_, hash)| *hash)
    }

    /// What is known of a request before anything is logged.
    pub fn peek(&mut self, tag: &ClientTag) -> Result<Result<Known, Refusal>, StoreError> {
        self.clients.peek(&*self.store, tag, self.time)
    }

    /// How checks went.
    pub fn checks(&self) -> CheckCounts {
        self.checks
    }

    /// The state, readable.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// The applied position that a crash now would leave behind.
    pub fn flushed(&self) -> Result<Position, StoreError> {
        let row = self.store.get_flushed(Table::APPLIED, APPLIED_KEY)?;
        let row = row
            .map(|v| crate::store::decode_row::<AppliedRow>(Table::APPLIED, APPLIED_KEY, v))
            .transpose()?;
        Ok(Position(row.unwrap_or_default().position))
    }

    fn remember_hash(&mut self) {
        self.recent.push_back((self.position, self.sums.total()));
        if self.recent.len() > RECENT_HASHES_MAX {
            self.recent.pop_front();
        }
    }

    /// Takes note that nothing up to `to` is for the state. Persisted with the next batch.
    pub fn skip(&mut self, to: Position) {
        self.position = self.position.max(to);
    }

    /// Applies one batch and writes it.
    pub fn apply(&mut self, batch: &Batch) -> Result<AppliedBatch<M>, Fault> {
        if batch.position <= self.position {
            return Err(Fault::Order { applied: self.position, got: batch.position });
        }
        let store = self.store.clone();
        let (mut overlay, mut effects) = (Overlay::default(), Effects::default());
        let mut outcomes = Vec::with_capacity(batch.entries.len());
        let mut time = self.time;
        for (ordinal, bytes) in batch.entries.iter().enumerate() {
            let undecodable = |what: String| Fault::Entry { position: batch.position, ordinal, what };
            let entry = Entry::decode(bytes.clone()).map_err(|e| undecodable(e.to_string()))?;
            if entry.encoded_len() != bytes.len() {
                return Err(undecodable("it has fields that this build does not know".into()));
            }
            time = Time(entry.stamp.max(time.0 + 1));
            if mutants::is(Mutant::TimeGoesBack) {
                time = Time(entry.stamp);
            }
            let outcome = match entry.kind {
                Some(Kind::Body(body)) => {
                    let encoded = body.len();
                    let body = M::Entry::decode(body).map_err(|e| undecodable(e.to_string()))?;
                    if body.encoded_len() != encoded {
                        return Err(undecodable("its body has fields that this build does not know".into()));
                    }
                    overlay.begin_entry();
                    let mut tx = Tx::new(&mut overlay, &*store);
                    match self.apply_entry(&mut tx, batch.position, time, body, &mut effects) {
                        // Unknown is never a value: what a newer build logged must not become a refusal here.
                        Err(Fault::Unknown(what)) => return Err(undecodable(what)),
                        outcome => outcome?,
                    }
                }
                Some(kind) => {
                    self.take(kind).map_err(|fault| match fault {
                        Fault::Unknown(what) => undecodable(what),
                        fault => fault,
                    })?;
                    EntryOutcome::Internal
                }
                None => return Err(undecodable("it has no kind".into())),
            };
            outcomes.push((time, outcome));
        }
        let mut tx = Tx::new(&mut overlay, &*store);
        self.clients.finish(&mut tx, time)?;
        if self.agreed > self.level {
            tx.put(Table::LEVEL, &[], self.agreed.to_be_bytes().to_vec());
        }
        let batch_crc = batch_crc(&batch.entries);
        let applied = AppliedRow { position: batch.position.0, time: time.0, format: FORMAT, batch_crc };
        tx.put_row(Table::APPLIED, APPLIED_KEY, &applied);
        let mut rows = overlay.finish(&*store, &mut self.sums)?;
        if mutants::is(Mutant::PositionWrittenApart) {
            let (apart, together) =
                rows.into_iter().partition(|(key, _)| key.first() == Some(&Table::APPLIED.0));
            store.write(together)?;
            rows = apart;
        }
        for (lane, sum) in self.sums.take_dirty() {
            rows.push((Table::SUMS.stored_key(&[lane]), Some(Bytes::copy_from_slice(&sum.to_le_bytes()))));
        }
        store.write(rows)?;
        assert!(time >= self.time || mutants::is(Mutant::TimeGoesBack), "time never goes backwards");
        (self.position, self.time, self.level) = (batch.position, time, self.agreed);
        self.stored = (batch.position, batch_crc);
        self.remember_hash();
        let Effects { actions, resolved } = effects;
        Ok(AppliedBatch { position: batch.position, time, outcomes, actions, resolved })
    }

    fn apply_entry(
        &mut self,
        tx: &mut Tx<'_>,
        position: Position,
        time: Time,
        entry: M::Entry,
        effects: &mut Effects<M>,
    ) -> Result<EntryOutcome<M::Reply>, Fault> {
        let is_step = |tag: &ClientTag| tag.client < clutch_proto::certificate::SYSTEM_CLIENTS;
        let tag =
            M::tag(&entry).filter(|tag| !(is_step(tag) && mutants::is(Mutant::StepNotIdempotent))).copied();
        if let Some(tag) = &tag {
            match self.clients.admit(tx, tag, time)? {
                Ok(Known::New) => {}
                Ok(Known::Pending) => return Ok(EntryOutcome::Pending),
                Ok(Known::Done(outcome)) => return Ok(EntryOutcome::Done(recorded::<M>(outcome)?)),
                Err(refusal) => return Ok(EntryOutcome::Done(Err(refusal))),
            }
        }
        let before = (effects.actions.len(), effects.resolved.len());
        let outcome = match M::apply(tx, position, time, entry, effects) {
            Ok(Applied::Reply(reply)) => EntryOutcome::Done(Ok(reply)),
            Ok(Applied::Pending) => EntryOutcome::Pending,
            Err(Stop::Refused(refusal)) => {
                tx.undo_entry();
                effects.actions.truncate(before.0);
                effects.resolved.truncate(before.1);
                EntryOutcome::Done(Err(refusal))
            }
            Err(Stop::Fault(fault)) => return Err(fault.into()),
            Err(Stop::Unknown(what)) => return Err(Fault::Unknown(what)),
        };
        if let Some(tag) = &tag {
            match &outcome {
                EntryOutcome::Done(Err(refusal))
                    if refusal.is_retryable() || mutants::is(Mutant::RefusalNotRecorded) => {}
                EntryOutcome::Done(result) => {
                    let result = result.as_ref().map(|reply| Bytes::from(reply.encode_to_vec()));
                    self.clients.record(tx, tag, outcome_row(tag, result, position, time))?;
                }
                EntryOutcome::Pending => {
                    let row = OutcomeRow { sequence: tag.sequence, pending: true, ..OutcomeRow::default() };
                    self.clients.record(tx, tag, row)?;
                }
                EntryOutcome::Internal => {}
            }
        }
        for (tag, result) in &effects.resolved[before.1..] {
            match result {
                Err(refusal) if refusal.is_retryable() => self.clients.forget(tx, tag)?,
                _ => {
                    let result = result.as_ref().map(|reply| Bytes::from(reply.encode_to_vec()));
                    self.clients.record(tx, tag, outcome_row(tag, result, position, time))?;
                }
            }
        }
        Ok(outcome)
    }

    /// Takes an entry that nobody asked for: mostly compares the state with what it says of it.
    fn take(&mut self, kind: Kind) -> Result<(), Fault> {
        match kind {
            Kind::Check(check) => {
                let theirs = StateHash::from_bytes(&check.hash);
                let theirs = theirs.ok_or_else(|| Fault::Unknown("a check's hash".into()))?;
                self.check(Position(check.position), theirs)
            }
            Kind::Verdict(verdict) => self.judge(&verdict),
            Kind::Level(agreed) => {
                check_level(agreed).map_err(|fault| Fault::Unknown(fault.to_string()))?;
                self.agreed = self.agreed.max(agreed);
                Ok(())
            }
            Kind::TimeMark(_) | Kind::Body(_) => Ok(()),
        }
    }

    /// Compares with what most members have, where most have the same. Their word counts, not that of who leads.
    fn judge(&mut self, verdict: &Verdict) -> Result<(), Fault> {
        let mut voices = BTreeMap::new();
        for voice in &verdict.voices {
            let hash = StateHash::from_bytes(&voice.hash);
            let hash = hash.ok_or_else(|| Fault::Unknown("a verdict has a hash of another length".into()))?;
            if voices.insert(voice.node, hash).is_some() {
                return Err(Fault::Unknown(format!("node {} has two voices in a verdict", voice.node)));
            }
        }
        match of_most(verdict.members, &voices) {
            Some(hash) => self.check(Position(verdict.position), hash),
            None => {
                self.checks.undecided += 1;
                Ok(())
            }
        }
    }

    fn check(&mut self, position: Position, theirs: StateHash) -> Result<(), Fault> {
        match self.hash_at(position) {
            None => self.checks.not_compared += 1,
            Some(ours) if ours == theirs => self.checks.compared += 1,
            Some(ours) => return Err(Fault::Diverged { position, ours, theirs }),
        }
        Ok(())
    }
}

/// A recorded outcome as an answer.
pub fn recorded<M: Machine>(outcome: OutcomeRow) -> Result<Result<M::Reply, Refusal>, StoreError> {
    let row =
        |what: String| StoreError::Row { table: Table::CLIENTS.0, key: outcome.sequence.to_string(), what };
    match Code::try_from(outcome.refused) {
        Ok(Code::Ok) => M::Reply::decode(outcome.reply).map(Ok).map_err(|e| row(e.to_string())),
        Ok(code) => {
            let text = format!("it was refused when it came first, at position {}", outcome.position);
            Ok(Err(Refusal::new(code, text)))
        }
        Err(_) => Err(row(format!("code {} is not known to this build", outcome.refused))),
    }
}

/// CRC-32 over a batch's entries, each with its length in front.
pub fn batch_crc(entries: &[Bytes]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    for entry in entries {
        hasher.update(&(entry.len() as u64).to_le_bytes());
        hasher.update(entry);
    }
    hasher.finalize()
}

/// The hash that more than half of a log's members have; `None` where none has so many.
fn of_most(members: u32, voices: &BTreeMap<u64, StateHash>) -> Option<StateHash> {
    let mut counts: BTreeMap<[u8; 16], u32> = BTreeMap::new();
    for hash in voices.values() {
        *counts.entry(hash.to_bytes()).or_default() += 1;
    }
    let (hash, count) = counts.into_iter().max_by_key(|(_, count)| *count)?;
    (count > members / 2).then(|| StateHash::from_bytes(&hash)).flatten()
}

/// What [`rescan`] found.
#[derive(Debug, Default)]
pub struct Rescan {
    /// Rows read.
    pub rows: u64,
    /// Where the rows do not give the stored hash, and rows that cannot be read.
    pub differences: Vec<String>,
    /// The position of the state.
    pub position: Position,
}

/// The position and the time of a state.
pub fn stands_at(view: &dyn View) -> Result<(Position, Time), StoreError> {
    let applied: AppliedRow = get_row(view, Table::APPLIED, APPLIED_KEY)?.unwrap_or_default();
    Ok((Position(applied.position), Time(applied.time)))
}

/// The feature level of a state.
fn stored_level(view: &dyn View) -> Result<u32, Fault> {
    let Some(stored) = view.get(Table::LEVEL, &[])? else { return Ok(level::FIRST) };
    let stored = <[u8; 4]>::try_from(&stored[..]);
    let stored = stored.map_err(|_| StoreError::Broken("the feature level has the wrong length".into()))?;
    check_level(u32::from_be_bytes(stored))
}

fn check_level(level: u32) -> Result<u32, Fault> {
    if level > level::KNOWN {
        return Err(Fault::Level(level));
    }
    Ok(level)
}

fn stored_sums(view: &dyn View) -> Result<Sums, StoreError> {
    let mut sums = Sums::default();
    for (key, value) in view.scan(Table::SUMS, &[], &[], 256)? {
        match (key.first(), StateHash::from_bytes(&value)) {
            (Some(&lane), Some(sum)) => sums.load(lane, sum.0),
            _ => return Err(StoreError::Broken("a hash sum has the wrong length".into())),
        }
    }
    Ok(sums)
}

/// The hash that a state says of itself; whether its rows give it, [`rescan`] finds out.
pub fn stored_hash(view: &dyn View) -> Result<StateHash, StoreError> {
    Ok(stored_sums(view)?.total())
}

/// Reads every row and compares with the stored sums: finds rows that changed behind our back.
pub fn rescan(view: &dyn View) -> Result<Rescan, StoreError> {
    let mut rescanner = Rescanner::default();
    for table in 0..=255u8 {
        let mut from: Vec<u8> = Vec::new();
        loop {
            let rows = view.scan(Table(table), &from, &[], Table(table).page_rows())?;
            let Some((last, _)) = rows.last() else { break };
            from = [last, &[0][..]].concat();
            for (key, value) in &rows {
                rescanner.row(Table(table), key, value);
            }
        }
    }
    rescanner.finish()
}

/// Compares the rows of a state with its stored sums, as they come, in any order.
pub struct Rescanner {
    found: Rescan,
    sums: Vec<u128>,
    stored: Vec<StateHash>,
    applied: Option<Bytes>,
    clients: u64,
    /// How many clients the state says that it has.
    counted: Bytes,
}

impl Default for Rescanner {
    fn default() -> Rescanner {
        Rescanner {
            found: Rescan::default(),
            sums: vec![0; 256],
            stored: vec![StateHash::default(); 256],
            applied: None,
            clients: 0,
            counted: Bytes::new(),
        }
    }
}

impl Rescanner {
    /// Takes one row into account.
    pub fn row(&mut self, table: Table, key: &[u8], value: &Bytes) {
        match table {
            Table::APPLIED if key == APPLIED_KEY => self.applied = Some(value.clone()),
            Table::SUMS => {
                if let ([lane], Some(stored)) = (key, StateHash::from_bytes(value)) {
                    self.stored[usize::from(*lane)] = stored;
                }
            }
            Table::CLIENT_COUNT => self.counted = value.clone(),
            Table::CLIENTS_BY_MINUTE => self.clients += 1,
            Table::CLIENTS if ClientRow::decode(value.clone()).is_err() => {
                let text = format!("client row {} cannot be decoded", crate::store::hex(key));
                self.found.differences.push(text);
            }
            _ => {}
        }
        if table.is_hashed() {
            self.found.rows += 1;
            let lane = usize::from(table.lane(key));
            self.sums[lane] = self.sums[lane].wrapping_add(row_hash(table, key, value));
        }
    }

    /// What was found.
    pub fn finish(self) -> Result<Rescan, StoreError> {
        let Rescanner { mut found, sums, stored, applied, clients, counted } = self;
        if let Some(applied) = applied {
            let applied: AppliedRow = crate::store::decode_row(Table::APPLIED, APPLIED_KEY, applied)?;
            found.position = Position(applied.position);
        }
        if *counted != clients.to_be_bytes() && !(counted.is_empty() && clients == 0) {
            let what = format!("{clients} clients, but their count is {}", crate::store::hex(&counted));
            found.differences.push(what);
        }
        for (lane, (sum, stored)) in sums.into_iter().zip(stored).enumerate() {
            if stored.0 != sum && !mutants::is(Mutant::RescanBlind) {
                found.differences.push(format!(
                    "slot {lane}: the rows give {}, the stored hash is {stored}; a row was changed on disk",
                    StateHash(sum)
                ));
            }
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests;
