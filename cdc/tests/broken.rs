//! Rows of the CDC that cannot be: whoever meets one stops, and says which. Each is made by hand in a state that was fine.

use std::sync::Arc;

use clutch_cdc::{Cdc, tables};
use clutch_proto::{
    InodeId,
    cdc::{
        Begin, CdcEntry, CdcRequest, CountersRow, Genesis, ListTransactions, LockQueueRow, MakeDirectory,
        RemoveDirectory, StepDone, TransactionRow, cdc_entry::Body, cdc_request::Op,
    },
    log::{Batch, Epoch},
    rules,
    state::{Entry, entry::Kind},
    types::{ClientTag, Code, Error},
};
use clutch_state::{Applier, Machine as _, MemoryStore, Store as _, Table, get_row};
use prost::Message;

const ROOT: u64 = InodeId::ROOT.raw();

/// A directory of slot 0.
fn dir(number: u64) -> u64 {
    1 << 62 | number << 8
}

struct Coordinator {
    store: Arc<MemoryStore>,
    applier: Applier<Cdc>,
    sequence: u64,
}

impl Coordinator {
    fn new() -> Coordinator {
        let store = Arc::new(MemoryStore::new());
        let applier = Applier::open(store.clone()).expect("an empty store opens");
        let mut coordinator = Coordinator { store, applier, sequence: 0 };
        coordinator.apply(Body::Genesis(Genesis { cluster: 1, rules: rules::VERSION })).expect("begins");
        coordinator
    }

    fn apply(&mut self, body: Body) -> Result<(), String> {
        self.sequence += 1;
        let (sequence, acknowledged) = (self.sequence, self.sequence - 1);
        let tag = ClientTag { client: 77, sequence, acknowledged, issued_at: 1 };
        let tag = matches!(body, Body::Begin(_)).then_some(tag);
        let body = CdcEntry { tag, body: Some(body) }.encode_to_vec().into();
        let entry = Entry { stamp: 1, kind: Some(Kind::Body(body)) }.encode_to_vec().into();
        let position = self.applier.position().next();
        let batch = Batch { position, epoch: Epoch(1), entries: vec![entry] };
        self.applier.apply(&batch).map(drop).map_err(|fault| fault.to_string())
    }

    fn begin(&mut self, op: Op) -> Result<(), String> {
        self.apply(Body::Begin(Begin { request: Some(CdcRequest { op: Some(op) }), slot: 0 }))
    }

    /// A transaction that runs, with number 1.
    fn running() -> Coordinator {
        let mut coordinator = Coordinator::new();
        coordinator.begin(remove(2)).expect("begins");
        coordinator
    }

    fn row<M: Message + Default>(&self, table: Table, key: &[u8]) -> M {
        get_row(&*self.store, table, key).expect("reads").expect("is there")
    }

    fn set(&self, table: Table, key: &[u8], row: &impl Message) {
        let write = vec![(table.stored_key(key), Some(row.encode_to_vec().into()))];
        self.store.write(write).expect("writes");
    }

    fn change(&self, change: impl FnOnce(&mut TransactionRow)) {
        let mut row: TransactionRow = self.row(tables::TRANSACTION, &tables::key(1));
        change(&mut row);
        self.set(tables::TRANSACTION, &tables::key(1), &row);
    }

    /// The first step of transaction 1 is refused, so that it ends.
    fn refused(&mut self) -> Result<(), String> {
        let error = Some(Error { code: Code::NotFound as i32, detail: String::new() });
        self.apply(Body::StepDone(StepDone { transaction: 1, step: 1, error, ..StepDone::default() }))
    }
}

fn remove(number: u64) -> Op {
    let (target, name) = (dir(number), "d".into());
    Op::RemoveDirectory(RemoveDirectory { parent: ROOT, name, target, created_at: 1 })
}

fn says(result: Result<(), String>, words: &str) {
    let fault = result.expect_err(words);
    assert!(fault.contains(words), "{fault:?} does not say {words:?}");
}

#[test]
fn the_state_that_they_are_made_in_is_fine() {
    let mut coordinator = Coordinator::running();
    coordinator.refused().expect("ends");
    assert_eq!(coordinator.row::<CountersRow>(tables::COUNTERS, &[]).live, 0);
}

#[test]
fn a_step_or_an_operation_that_this_build_does_not_know_is_no_step() {
    let mut coordinator = Coordinator::running();
    coordinator.change(|row| row.state = 77);
    says(coordinator.refused(), "stands at 77");
    assert!(Cdc::recover(&*coordinator.store).is_err(), "and no leader begins with it");

    for op in [None, Some(Op::ListTransactions(ListTransactions {}))] {
        let mut coordinator = Coordinator::running();
        coordinator.change(|row| row.begin = Some(Begin { request: Some(CdcRequest { op }), slot: 0 }));
        says(coordinator.refused(), "no operation that this build knows");
        assert!(Cdc::recover(&*coordinator.store).is_err(), "and no leader begins with it");
    }
    says(Coordinator::new().begin(Op::ListTransactions(ListTransactions {})), "a kind that this build");

    // A step that its kind does not have.
    let mut coordinator = Coordinator::new();
    let make = MakeDirectory { parent: ROOT, name: "d".into(), ..MakeDirectory::default() };
    coordinator.begin(Op::MakeDirectory(make)).expect("begins");
    coordinator.change(|row| row.state = 5);
    assert!(Cdc::recover(&*coordinator.store).is_err(), "no request is guessed");
}

#[test]
fn no_more_transactions_end_than_began() {
    let mut coordinator = Coordinator::running();
    let counters: CountersRow = coordinator.row(tables::COUNTERS, &[]);
    coordinator.set(tables::COUNTERS, &[], &CountersRow { live: 0, ..counters });
    says(coordinator.refused(), "none is in flight");
}

#[test]
fn the_oldest_in_flight_is_older_than_a_new_one() {
    let mut coordinator = Coordinator::running();
    let counters: CountersRow = coordinator.row(tables::COUNTERS, &[]);
    coordinator.set(tables::COUNTERS, &[], &CountersRow { oldest: 9, ..counters });
    says(coordinator.begin(remove(3)), "is not older");
}

#[test]
fn queues_are_first_in_first_out() {
    let mut coordinator = Coordinator::running();
    coordinator.set(tables::LOCK, &tables::key(ROOT), &LockQueueRow { head: 9, waiting: 0 });
    says(coordinator.begin(remove(3)), "is the newest");

    // Whoever does not head the queue cannot leave it.
    says(coordinator.refused(), "does not hold directory");
}

#[test]
fn a_transaction_runs_once() {
    let mut coordinator = Coordinator::running();
    coordinator.begin(remove(3)).expect("waits");
    let mut row: TransactionRow = coordinator.row(tables::TRANSACTION, &tables::key(2));
    assert_eq!(row.run_order, 0, "it waits for the root");
    row.run_order = 7;
    coordinator.set(tables::TRANSACTION, &tables::key(2), &row);
    // It is not begun again when it heads its queues.
    coordinator.refused().expect("ends");
    assert_eq!(coordinator.row::<TransactionRow>(tables::TRANSACTION, &tables::key(2)).step, 0);
}

#[test]
fn nobody_ran_later_than_all() {
    let mut coordinator = Coordinator::running();
    let counters: CountersRow = coordinator.row(tables::COUNTERS, &[]);
    coordinator.set(tables::COUNTERS, &[], &CountersRow { run_order: 0, ..counters });
    says(coordinator.refused(), "ran as number 1, and 0 have run");
}
