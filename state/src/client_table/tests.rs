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
