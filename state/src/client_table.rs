//! Recognises repeated requests: one row for each client with the outcomes that it has not acknowledged.
//!
//! Invariants: a tag takes effect at most once; its outcome is kept until the client acknowledges it or has been
//! idle for [`CLIENT_IDLE_LIFETIME_MS`] of logged time; a request issued before that is refused as expired,
//! because its outcome may have been forgotten. The stored count is the number of rows of clients that are not the
//! cluster's own, and new ones are refused while it is [`CLIENTS_MAX`] or more.

use std::collections::{BTreeMap, btree_map};

use bytes::Bytes;
use clutch_proto::{
    Refusal, Time,
    log::Position,
    mutants::{self, Mutant},
    rules::v1::{CLIENT_IDLE_LIFETIME_MS, CLIENT_OUTCOMES_MAX, CLIENTS_MAX, FORGOTTEN_PER_BATCH_MAX},
    state::{ClientRow, OutcomeRow},
    types::{ClientTag, Code},
};

use crate::{
    overlay::Tx,
    store::{StoreError, Table, View, get_row},
};

pub use clutch_proto::certificate::SYSTEM_CLIENTS;
/// Decoded rows that are kept in memory between batches.
const CACHED_CLIENTS_MAX: usize = 4096;
const NS_PER_MINUTE: u64 = 60_000_000_000;

/// What is known of a tag.
#[derive(Clone, Debug, PartialEq)]
pub enum Known {
    /// Nothing: it may be applied.
    New,
    /// It was applied; its answer comes later.
    Pending,
    /// It was applied with this outcome.
    Done(OutcomeRow),
}

/// The table, with decoded rows in memory.
#[derive(Default)]
pub struct ClientTable {
    cached: BTreeMap<u64, Client>,
    /// The oldest minute that a client may have been used in and be kept, when all older ones were forgotten last.
    forgotten_before: u64,
    /// The stored count, once it was read.
    count: Option<u64>,
}

#[derive(Clone, Default)]
struct Client {
    acknowledged: u64,
    outcomes: BTreeMap<u64, OutcomeRow>,
    used_minute: u64,
    /// The minute in the stored row, whose index row must go when it changes.
    stored_minute: Option<u64>,
    dirty: bool,
}

impl Client {
    fn from_row(row: ClientRow) -> Client {
        Client {
            acknowledged: row.acknowledged,
            outcomes: row.outcomes.into_iter().map(|o| (o.sequence, o)).collect(),
            used_minute: row.used_minute,
            stored_minute: Some(row.used_minute),
            dirty: false,
        }
    }

    /// Whether nothing of it was ever kept.
    fn is_new(&self) -> bool {
        self.stored_minute.is_none() && !self.dirty
    }

    fn check(&self, tag: &ClientTag) -> Result<Known, Refusal> {
        match self.outcomes.get(&tag.sequence) {
            Some(outcome) if outcome.pending => Ok(Known::Pending),
            Some(outcome) => Ok(Known::Done(outcome.clone())),
            None if tag.sequence <= self.acknowledged => Err(Refusal::new(
                Code::Acknowledged,
                format!("request {} was answered and acknowledged before", tag.sequence),
            )),
            None => Ok(Known::New),
        }
    }
}

fn check_form(tag: &ClientTag) -> Result<(), Refusal> {
    if tag.client == 0 || tag.sequence == 0 || tag.acknowledged >= tag.sequence {
        let text =
            "a client tag needs a client and a sequence above 0, and acknowledges only what came before it";
        return Err(Refusal::malformed(text));
    }
    Ok(())
}

fn check_age(tag: &ClientTag, last_time: Time) -> Result<(), Refusal> {
    let lifetime_ns = CLIENT_IDLE_LIFETIME_MS * 1_000_000;
    if tag.client >= SYSTEM_CLIENTS && tag.issued_at < last_time.0.saturating_sub(lifetime_ns) {
        return Err(Refusal::new(
            Code::ExpiredUnknown,
            "the request was issued too long ago; whether it took effect is not known any more",
        ));
    }
    Ok(())
}

impl ClientTable {
    /// What a producer can tell before anything is logged: what the batches applied so far have left.
    pub fn peek(
        &mut self,
        view: &dyn View,
        tag: &ClientTag,
        last_time: Time,
    ) -> Result<Result<Known, Refusal>, StoreError> {
        if let Err(refusal) = check_form(tag) {
            return Ok(Err(refusal));
        }
        if let Err(refusal) = check_age(tag, last_time) {
            return Ok(Err(refusal));
        }
        let client = match self.cached.entry(tag.client) {
            btree_map::Entry::Occupied(client) => client.into_mut(),
            btree_map::Entry::Vacant(vacant) => {
                let row: Option<ClientRow> = get_row(view, Table::CLIENTS, &tag.client.to_be_bytes())?;
                // Nobody who only asks takes room here.
                let Some(row) = row else {
                    let is_full =
                        tag.client >= SYSTEM_CLIENTS && self.count.is_some_and(|c| c >= CLIENTS_MAX);
                    return Ok(if is_full { Err(too_many()) } else { Ok(Known::New) });
                };
                vacant.insert(Client::from_row(row))
            }
        };
        Ok(client.check(tag))
    }

    fn client(&mut self, tx: &mut Tx<'_>, id: u64) -> Result<&mut Client, StoreError> {
        match self.cached.entry(id) {
            btree_map::Entry::Occupied(client) => Ok(client.into_mut()),
            btree_map::Entry::Vacant(vacant) => {
                let row: Option<ClientRow> = tx.get_row(Table::CLIENTS, &id.to_be_bytes())?;
                Ok(vacant.insert(row.map(Client::from_row).unwrap_or_default()))
            }
        }
    }

    fn count(&mut self, tx: &mut Tx<'_>) -> Result<u64, StoreError> {
        if let Some(count) = self.count {
            return Ok(count);
        }
        let count = match tx.get(Table::CLIENT_COUNT, &[])? {
            None => 0,
            Some(row) => <[u8; 8]>::try_from(&row[..])
                .map(u64::from_be_bytes)
                .map_err(|_| StoreError::Broken("the count of clients has not 8 bytes".into()))?,
        };
        self.count = Some(count);
        Ok(count)
    }

    /// What is known of a tag, and takes note of what the client acknowledges.
    pub fn admit(
        &mut self,
        tx: &mut Tx<'_>,
        tag: &ClientTag,
        time: Time,
    ) -> Result<Result<Known, Refusal>, StoreError> {
        if let Err(refusal) = check_form(tag) {
            return Ok(Err(refusal));
        }
        if let Err(refusal) = check_age(tag, time) {
            return Ok(Err(refusal));
        }
        let is_full = self.count(tx)? >= CLIENTS_MAX;
        let client = self.client(tx, tag.client)?;
        if is_full && tag.client >= SYSTEM_CLIENTS && client.is_new() {
            self.cached.remove(&tag.client);
            return Ok(Err(too_many()));
        }
        if tag.acknowledged > client.acknowledged {
            client.acknowledged = tag.acknowledged;
            client.outcomes = client.outcomes.split_off(&tag.acknowledged.saturating_add(1));
            client.dirty = true;
        }
        let known = client.check(tag);
        if known == Ok(Known::New)
            && tag.client >= SYSTEM_CLIENTS
            && client.outcomes.len() >= CLIENT_OUTCOMES_MAX
        {
            return Ok(Err(Refusal::new(
                Code::Overloaded,
                format!("{CLIENT_OUTCOMES_MAX} answers of this client are not acknowledged yet"),
            )));
        }
        Ok(known)
    }

    /// Keeps an outcome. One that may be retried unchanged is not kept: the retry is to be tried.
    pub fn record(
        &mut self,
        tx: &mut Tx<'_>,
        tag: &ClientTag,
        outcome: OutcomeRow,
    ) -> Result<(), StoreError> {
        let client = self.client(tx, tag.client)?;
        if tag.sequence > client.acknowledged {
            client.outcomes.insert(tag.sequence, outcome);
        }
        client.dirty = true;
        Ok(())
    }

    /// Forgets a pending outcome whose transaction ended with a refusal that may be retried.
    pub fn forget(&mut self, tx: &mut Tx<'_>, tag: &ClientTag) -> Result<(), StoreError> {
        let client = self.client(tx, tag.client)?;
        let was_known = client.outcomes.remove(&tag.sequence).is_some();
        client.dirty |= was_known && !mutants::is(Mutant::ForgottenInMemory);
        Ok(())
    }

    /// Ends a batch: writes the rows that changed and forgets clients that have been idle too long.
    pub fn finish(&mut self, tx: &mut Tx<'_>, time: Time) -> Result<(), StoreError> {
        let minute = time.0 / NS_PER_MINUTE;
        let (mut added, mut removed) = (0u64, 0);
        for (id, client) in &mut self.cached {
            if !std::mem::take(&mut client.dirty) {
                continue;
            }
            if mutants::is(Mutant::OutcomeForgottenEarly) {
                client.outcomes.clear();
            }
            client.used_minute = minute;
            if client.stored_minute != Some(minute) && *id >= SYSTEM_CLIENTS {
                if let Some(old) = client.stored_minute {
                    tx.delete(Table::CLIENTS_BY_MINUTE, &index_key(old, *id));
                } else {
                    added += 1;
                }
                tx.put(Table::CLIENTS_BY_MINUTE, &index_key(minute, *id), Bytes::new());
                client.stored_minute = Some(minute);
            }
            let row = ClientRow {
                acknowledged: client.acknowledged,
                outcomes: client.outcomes.values().cloned().collect(),
                used_minute: minute,
            };
            tx.put_row(Table::CLIENTS, &id.to_be_bytes(), &row);
        }
        // What is cached must not matter: dropping it only costs reading it again.
        if self.cached.len() > CACHED_CLIENTS_MAX {
            self.cached.clear();
        }
        let oldest = minute.saturating_sub(CLIENT_IDLE_LIFETIME_MS / 60_000 + 1);
        // Unless it was looked already: nobody becomes older without the minute moving on.
        if oldest != self.forgotten_before {
            removed = self.forget_idle(tx, oldest, FORGOTTEN_PER_BATCH_MAX + added as usize)?;
        }
        if added != removed {
            let count = (self.count(tx)? + added).checked_sub(removed);
            let count = count
                .ok_or_else(|| StoreError::Broken("more clients are forgotten than were counted".into()))?;
            tx.put(Table::CLIENT_COUNT, &[], count.to_be_bytes().to_vec());
            self.count = Some(count);
        }
        Ok(())
    }

    /// Forgets up to `limit` clients that were last used before a minute, and says how many.
    fn forget_idle(&mut self, tx: &mut Tx<'_>, oldest: u64, limit: usize) -> Result<u64, StoreError> {
        let idle = tx.scan(Table::CLIENTS_BY_MINUTE, &[], &oldest.to_be_bytes(), limit)?;
        let idle_count = idle.len();
        for (key, _) in idle {
            tx.delete(Table::CLIENTS_BY_MINUTE, &key);
            let id = key.get(8..).and_then(|id| id.try_into().ok()).map(u64::from_be_bytes);
            let id = id.ok_or_else(|| StoreError::Broken("a key of the idle clients is too short".into()))?;
            tx.delete(Table::CLIENTS, &id.to_be_bytes());
            self.cached.remove(&id);
        }
        if idle_count < limit || mutants::is(Mutant::ForgettingEndsEarly) {
            self.forgotten_before = oldest;
        }
        Ok(idle_count as u64)
    }
}

fn too_many() -> Refusal {
    let text = format!(
        "{CLIENTS_MAX} clients used this log within the last hour; use one client for many requests, or try again later"
    );
    Refusal::new(Code::Overloaded, text)
}

fn index_key(minute: u64, client: u64) -> [u8; 16] {
    let mut key = [0; 16];
    key[..8].copy_from_slice(&minute.to_be_bytes());
    key[8..].copy_from_slice(&client.to_be_bytes());
    key
}

/// An outcome as it is kept.
pub fn outcome_row(
    tag: &ClientTag,
    result: Result<Bytes, &Refusal>,
    position: Position,
    time: Time,
) -> OutcomeRow {
    // The sentence of a refusal stays out: a row is a function of the log, on any build.
    let (refused, reply) = match result {
        Ok(reply) => (Code::Ok, reply),
        Err(refusal) => (refusal.code, Bytes::new()),
    };
    OutcomeRow {
        sequence: tag.sequence,
        pending: false,
        refused: refused as i32,
        reply,
        position: position.0,
        time: time.0,
    }
}

#[cfg(test)]
mod tests;
