//! The bound of clients, and the count that it rests on.

use super::*;
use crate::{hash::Sums, memory::MemoryStore, overlay::Overlay, store::Store as _};

const MINUTE_NS: u64 = NS_PER_MINUTE;

/// Admits and records one request of each client as one batch; what the last one was told.
fn batch(
    table: &mut ClientTable,
    store: &MemoryStore,
    clients: &[u64],
    time: Time,
) -> Result<Known, Refusal> {
    let mut overlay = Overlay::default();
    let mut tx = Tx::new(&mut overlay, store);
    let mut last = Ok(Known::New);
    for client in clients {
        let tag = ClientTag { client: *client, sequence: 1, acknowledged: 0, issued_at: time.0 };
        last = table.admit(&mut tx, &tag, time).expect("reads");
        if last == Ok(Known::New) {
            let row = outcome_row(&tag, Ok(Bytes::new()), Position(1), time);
            table.record(&mut tx, &tag, row).expect("records");
        }
    }
    table.finish(&mut tx, time).expect("finishes");
    store.write(overlay.finish(store, &mut Sums::default()).expect("rows")).expect("writes");
    last
}

fn counted(store: &MemoryStore) -> u64 {
    let row = store.get(Table::CLIENT_COUNT, &[]).expect("reads");
    row.map_or(0, |row| u64::from_be_bytes(row[..].try_into().expect("8 bytes")))
}

fn rows(store: &MemoryStore, table: Table) -> u64 {
    store.scan(table, &[], &[], usize::MAX).expect("scans").len() as u64
}

#[test]
fn the_count_is_that_of_the_rows_through_uses_idleness_and_restarts() {
    let store = MemoryStore::new();
    let mut table = ClientTable::default();
    let lifetime_minutes = CLIENT_IDLE_LIFETIME_MS / 60_000;
    let mut seen_many = false;
    for minute in 0..4 * lifetime_minutes {
        let first = SYSTEM_CLIENTS + minute % 50 * 3;
        // Known ones, new ones, and one of the cluster's own, which is never counted.
        let clients = [1, first, first + 1, first + 2, SYSTEM_CLIENTS + 7];
        // For a while nobody comes but one, so that all others are forgotten.
        let clients = if minute > 2 * lifetime_minutes { &clients[4..] } else { &clients[..] };
        batch(&mut table, &store, clients, Time((minute + 1) * MINUTE_NS)).expect("known or new");
        if minute % 7 == 0 {
            table = ClientTable::default();
        }
        assert_eq!(rows(&store, Table::CLIENTS_BY_MINUTE), counted(&store));
        let own = u64::from(store.get(Table::CLIENTS, &1u64.to_be_bytes()).expect("reads").is_some());
        assert_eq!(rows(&store, Table::CLIENTS), counted(&store) + own);
        seen_many |= counted(&store) > 100;
    }
    assert!(seen_many);
    assert_eq!(counted(&store), 1, "only who still comes is left");
}

#[test]
fn beyond_the_bound_only_known_clients_are_served() {
    let store = MemoryStore::new();
    let mut table = ClientTable::default();
    let time = Time(MINUTE_NS);
    batch(&mut table, &store, &[100, 101], time).expect("new");
    let full = CLIENTS_MAX.to_be_bytes().to_vec();
    store.write(vec![(Table::CLIENT_COUNT.stored_key(&[]), Some(full.into()))]).expect("writes");
    let mut table = ClientTable::default();
    let refusal = batch(&mut table, &store, &[102], time).expect_err("one too many");
    assert_eq!(refusal.code, Code::Overloaded);
    assert!(refusal.is_retryable() && refusal.detail.contains("10000000 clients"), "{refusal:?}");
    assert_eq!(rows(&store, Table::CLIENTS), 2, "nothing is kept of who was refused");
    assert!(matches!(batch(&mut table, &store, &[101], time), Ok(Known::Done(_))));
    assert_eq!(batch(&mut table, &store, &[3], time), Ok(Known::New), "the cluster's own");
    // An hour later those who were there are forgotten, and there is room.
    let later = Time(time.0 + CLIENT_IDLE_LIFETIME_MS * 1_000_000 + 3 * MINUTE_NS);
    batch(&mut table, &store, &[], later).expect("nobody");
    assert_eq!(counted(&store), CLIENTS_MAX - 2);
    assert_eq!(batch(&mut table, &store, &[102], later), Ok(Known::New));
    assert_eq!(counted(&store), CLIENTS_MAX - 1);
}

/// One client's request at a time: what it is told.
fn ask(
    table: &mut ClientTable,
    store: &MemoryStore,
    tag: ClientTag,
    time: Time,
    records: bool,
) -> Result<Known, Code> {
    let peeked = table.peek(store, &tag, time).expect("reads").map_err(|refusal| refusal.code);
    let mut overlay = Overlay::default();
    let mut tx = Tx::new(&mut overlay, store);
    let known = table.admit(&mut tx, &tag, time).expect("reads").map_err(|refusal| refusal.code);
    if records && known == Ok(Known::New) {
        let row = outcome_row(&tag, Ok(Bytes::from_static(b"done")), Position(tag.sequence), time);
        table.record(&mut tx, &tag, row).expect("records");
    }
    table.finish(&mut tx, time).expect("finishes");
    store.write(overlay.finish(store, &mut Sums::default()).expect("rows")).expect("writes");
    // Who only asks is told the same, but for what its acknowledgement takes away, and its bound.
    if !matches!(known, Err(Code::Acknowledged | Code::Overloaded)) {
        assert_eq!(peeked, known, "{tag:?}");
    }
    known
}

const CLIENT: u64 = SYSTEM_CLIENTS + 5;

fn tag(sequence: u64, acknowledged: u64) -> ClientTag {
    ClientTag { client: CLIENT, sequence, acknowledged, issued_at: 1 }
}

#[test]
fn tags_that_make_no_sense_are_refused() {
    let (mut table, store) = (ClientTable::default(), MemoryStore::new());
    for bad in [ClientTag { client: 0, ..tag(1, 0) }, tag(0, 0), tag(3, 3), tag(3, 4)] {
        assert_eq!(ask(&mut table, &store, bad, Time(5), true), Err(Code::Malformed), "{bad:?}");
    }
    assert_eq!(ask(&mut table, &store, tag(3, 2), Time(5), true), Ok(Known::New));
}

#[test]
fn a_request_is_expired_when_its_outcome_may_have_been_forgotten_and_not_before() {
    let lifetime = CLIENT_IDLE_LIFETIME_MS * 1_000_000;
    let issued_at = 7_000;
    for (client, late, expected) in [
        (CLIENT, 0, Ok(Known::New)),
        (CLIENT, 1, Err(Code::ExpiredUnknown)),
        (SYSTEM_CLIENTS, 1, Err(Code::ExpiredUnknown)),
        // The cluster's own are kept for good.
        (SYSTEM_CLIENTS - 1, lifetime, Ok(Known::New)),
    ] {
        let (mut table, store) = (ClientTable::default(), MemoryStore::new());
        let tag = ClientTag { client, issued_at, ..tag(1, 0) };
        let now = Time(issued_at + lifetime + late);
        assert_eq!(ask(&mut table, &store, tag, now, false), expected, "client {client}, {late} late");
    }
}

#[test]
fn outcomes_are_kept_until_they_are_acknowledged() {
    let store = MemoryStore::new();
    for reopens in [false, true] {
        let mut table = ClientTable::default();
        let mut ask = |tag, records| {
            if reopens {
                table = ClientTable::default();
            }
            ask(&mut table, &store, tag, Time(9), records)
        };
        let base = if reopens { 100 } else { 0 };
        for sequence in 1..=4 {
            assert_eq!(ask(tag(base + sequence, base), true), Ok(Known::New));
        }
        for sequence in 1..=4 {
            let Ok(Known::Done(row)) = ask(tag(base + sequence, base), true) else { panic!("is known") };
            assert_eq!(
                (row.sequence, row.position, &row.reply[..]),
                (base + sequence, base + sequence, &b"done"[..])
            );
        }
        // Acknowledges two of them, as part of a new one.
        assert_eq!(ask(tag(base + 5, base + 2), true), Ok(Known::New));
        for (sequence, is_gone) in [(1, true), (2, true), (3, false), (5, false)] {
            let known = ask(tag(base + sequence, base + sequence - 1), false);
            assert_eq!(known == Err(Code::Acknowledged), is_gone, "{sequence}: {known:?}");
        }
        // An outcome that comes when it was acknowledged already is not kept.
        assert_eq!(ask(tag(base + 9, base + 8), true), Ok(Known::New));
        assert_eq!(ask(tag(base + 7, base), true), Err(Code::Acknowledged));
    }
}

#[test]
fn a_client_has_at_most_so_many_outcomes_that_it_has_not_acknowledged() {
    let (mut table, store) = (ClientTable::default(), MemoryStore::new());
    let most = CLIENT_OUTCOMES_MAX as u64;
    let mut overlay = Overlay::default();
    let mut tx = Tx::new(&mut overlay, &store);
    for sequence in 1..=most {
        let tag = tag(sequence, 0);
        assert_eq!(table.admit(&mut tx, &tag, Time(9)).expect("reads"), Ok(Known::New));
        let row = outcome_row(&tag, Ok(Bytes::new()), Position(1), Time(9));
        table.record(&mut tx, &tag, row).expect("records");
    }
    let code = |known: Result<Known, Refusal>| known.map_err(|refusal| refusal.code);
    let mut admit = |tag| code(table.admit(&mut tx, &tag, Time(9)).expect("reads"));
    assert_eq!(admit(tag(most + 1, 0)), Err(Code::Overloaded));
    assert!(matches!(admit(tag(most, 0)), Ok(Known::Done(_))), "what is known is told all the same");
    assert_eq!(admit(tag(most + 1, 1)), Ok(Known::New));
}

#[test]
fn keys_of_minutes_have_their_bytes_and_sort_by_them() {
    assert_eq!(index_key(0x0102, 3), [0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0, 3]);
    let numbers = [0, 1, 255, 256, u64::MAX];
    let keys: Vec<_> =
        numbers.iter().flat_map(|minute| numbers.map(|client| index_key(*minute, client))).collect();
    assert!(keys.is_sorted());
}
