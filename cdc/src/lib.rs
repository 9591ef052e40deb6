//! The cross-directory coordinator: transactions over shards, as step machines. Pure.
//!
//! A transaction is a row. Each step is one request to one shard; its answer comes back as an entry and moves the
//! row on. What each kind holds and does is its plan ([`plans`]); how a transaction
//! goes on and rolls back follows from it ([`steps`]).
//!
//! Invariants:
//! * A transaction takes all its directories in one entry and runs when it heads every queue: first in, first
//!   out, so no deadlock and no starvation.
//! * Before the point of no return a refused step rolls the transaction back; after it, it only goes forward.
//! * A step is sent with (transaction, step) as its tag, so a shard executes it once, however often it is sent.
//! * What follows a step that succeeded needs no entry in between: the step machine is a pure function of the row and
//!   the answers, and a tagged step that succeeded gives the same answer when a later leader sends it again. So the
//!   shell runs ahead with [`SendStep::after`], and one entry brings all answers. It stops at a refusal and before
//!   anything that depends on a read, because those may come out differently the next time.
//! * Two moves of directories cannot make a loop together ([`walks`]).

mod locks;
mod plans;
pub mod steps;
pub mod tables;
mod walks;

use clutch_proto::{
    Refusal, Time,
    cdc::{
        Begin, CdcEntry, CdcReply, CdcRequest, CountersRow, Jump, StepDone, TransactionRow,
        TransactionSummary, cdc_entry::Body, cdc_request::Op,
    },
    log::Position,
    mutants::{self, Mutant},
    operation::{self, Class},
    rules,
    shard::{ShardReply, ShardRequest},
    types::{ClientTag, Code},
};
use clutch_state::{
    Applied, Machine, ProduceContext, Stop, StoreError, Tx, View, broken_unless, get_row, key_after,
    machine::Effects, store::decode_row,
};

use steps::{Next, State};

/// The client id under which the CDC sends its steps to shards.
pub const STEP_CLIENT: u64 = 1;
/// Transactions in flight at a time, above which more are refused as overloaded; and ended moves that are remembered for
/// walks: a walk during which more moves ended begins again.
pub use clutch_proto::rules::v1::{MOVES_REMEMBERED, TRANSACTIONS_MAX};
/// Steps whose answers one entry brings.
pub const STEPS_PER_ENTRY_MAX: usize = 64;
/// Bits of a step's number within a tag's sequence. Walks have the most steps, one for each ancestor and retry.
const STEP_BITS: u32 = 24;

/// The CDC's machine.
pub struct Cdc;

/// A request that the leader's shell sends until it is answered for good, and whose answer it proposes.
#[derive(Clone, Debug, PartialEq)]
pub struct SendStep {
    /// The transaction.
    pub transaction: u64,
    /// Its step.
    pub step: u32,
    /// What to send.
    pub request: ShardRequest,
    /// `None` for reads.
    pub tag: Option<ClientTag>,
    /// The transaction when this step is sent.
    row: TransactionRow,
    /// The oldest transaction in flight when the last entry was applied.
    oldest: u64,
}

impl SendStep {
    /// The step that follows when this one succeeded, where it may be sent before the answer is logged; `None` where
    /// the answer must be logged first.
    pub fn after(&self, reply: &ShardReply) -> Option<SendStep> {
        let mut row = self.row.clone();
        // What is wrong with the row stops the replica when the answer is applied.
        let Ok(Next::Enter(state)) = steps::next(&mut row, Ok(reply.clone())) else { return None };
        // A read may come out differently when it is sent again, so only reads may follow before it is logged.
        if self.tag.is_none() && state != State::Walk {
            return None;
        }
        steps::enter(&mut row, state);
        send(self.transaction, &row, self.oldest).ok()
    }

    /// Words for people: the kind of the transaction and where it stands.
    pub fn names(&self) -> (&'static str, String) {
        (steps::kind_name(&self.row), steps::state_name(&self.row))
    }
}

impl Machine for Cdc {
    const NAME: &'static str = "cdc";
    type Request = CdcRequest;
    type Reply = CdcReply;
    type Entry = CdcEntry;
    type Effect = SendStep;
    type Facts = ();

    fn check_home(view: &dyn View, cluster: u64, _number: u32) -> Result<(), StoreError> {
        let genesis: Option<clutch_proto::cdc::Genesis> = get_row(view, tables::GENESIS, &[])?;
        match genesis {
            Some(genesis) if genesis.cluster != cluster => {
                Err(StoreError::Damaged(format!("they are of cluster {:016x}", genesis.cluster)))
            }
            _ => Ok(()),
        }
    }

    fn is_read(request: &CdcRequest) -> bool {
        request.op.as_ref().is_none_or(|op| operation::of_cdc(op).is_read())
    }

    fn gives_space_back(request: &CdcRequest) -> bool {
        request.op.as_ref().is_some_and(|op| operation::of_cdc(op) == Class::Release)
    }

    fn read(view: &dyn View, request: &CdcRequest, _facts: &()) -> Result<CdcReply, Stop> {
        match request.op {
            Some(Op::ListTransactions(_)) => {}
            Some(
                Op::MakeDirectory(_)
                | Op::RemoveDirectory(_)
                | Op::RenameFile(_)
                | Op::RenameDirectory(_)
                | Op::ForgetFile(_)
                | Op::ForgetDirectory(_)
                | Op::UndeleteDirectory(_),
            ) => return Err(Refusal::malformed("not a read").into()),
            None => {
                return Err(Refusal::malformed("a request without an operation that this build knows").into());
            }
        }
        let hidden = usize::from(mutants::is(Mutant::OldestNotListed));
        let transactions = live(view)?.into_iter().skip(hidden).map(|(id, row)| TransactionSummary {
            transaction: id,
            kind: steps::kind_name(&row).to_owned(),
            state: steps::state_name(&row),
            started_at: row.started_at,
        });
        Ok(CdcReply { transactions: transactions.collect(), ..CdcReply::default() })
    }

    fn produce(
        _view: &dyn View,
        request: CdcRequest,
        tag: Option<ClientTag>,
        context: &mut ProduceContext<'_>,
        _facts: &(),
    ) -> Result<CdcEntry, Stop> {
        let tag = tag.ok_or_else(|| Refusal::malformed("a transaction needs a client tag"))?;
        let plan = request.op.as_ref().and_then(plans::of);
        plan.ok_or_else(|| Refusal::malformed("not a transaction"))?.check()?;
        let slot = ((context.random)() & 0xff) as u32;
        Ok(CdcEntry { tag: Some(tag), body: Some(Body::Begin(Begin { request: Some(request), slot })) })
    }

    fn tag(entry: &CdcEntry) -> Option<&ClientTag> {
        entry.tag.as_ref()
    }

    fn apply(
        tx: &mut Tx<'_>,
        _position: Position,
        time: Time,
        entry: CdcEntry,
        effects: &mut Effects<Cdc>,
    ) -> Result<Applied<CdcReply>, Stop> {
        match entry.body {
            Some(Body::Genesis(genesis)) => {
                if tx.get(tables::GENESIS, &[])?.is_some() {
                    return Err(Stop::refuse(Code::Exists, "the CDC has begun already"));
                }
                rules::check(genesis.rules).map_err(Stop::unknown)?;
                tx.put_row(tables::GENESIS, &[], &genesis);
                Ok(Applied::Reply(CdcReply::default()))
            }
            Some(Body::Begin(begin)) => {
                let tag = entry.tag.ok_or_else(|| Stop::unknown("a transaction without a client tag"))?;
                apply_begin(tx, time, begin, tag, effects)?;
                Ok(Applied::Pending)
            }
            Some(Body::Jump(jump)) => {
                let mut counters = counters(tx)?;
                counters.transaction = counters.transaction.max(jump.transaction);
                tx.put_row(tables::COUNTERS, &[], &counters);
                Ok(Applied::Reply(CdcReply::default()))
            }
            Some(Body::StepDone(done)) => {
                apply_step_done(tx, done, effects)?;
                Ok(Applied::Reply(CdcReply::default()))
            }
            None => Err(Stop::unknown("it has no operation that this build knows")),
        }
    }

    fn recover(view: &dyn View) -> Result<Vec<SendStep>, StoreError> {
        let live = live(view)?;
        let oldest = live.first().map_or(0, |(id, _)| *id);
        let running = live.iter().filter(|(_, row)| row.run_order != 0 && row.walk_blocked_by == 0);
        running.map(|(id, row)| send(*id, row, oldest)).collect()
    }
}

/// The entry for a log that was cut, from the state that it had at its end: no transaction gets an id of the lost future
/// again, under which shards may have seen steps.
///
/// # Errors
/// [`StoreError`] when the state cannot be read.
pub fn jump_past(lost: &dyn View) -> Result<CdcEntry, StoreError> {
    let counters: CountersRow = get_row(lost, tables::COUNTERS, &[])?.unwrap_or_default();
    Ok(CdcEntry { tag: None, body: Some(Body::Jump(Jump { transaction: counters.transaction })) })
}

fn live(view: &dyn View) -> Result<Vec<(u64, TransactionRow)>, StoreError> {
    let counters: CountersRow = get_row(view, tables::COUNTERS, &[])?.unwrap_or_default();
    let rows = view.scan(tables::TRANSACTION, &tables::key(counters.oldest), &[], usize::MAX)?;
    rows.into_iter()
        .map(|(key, value)| Ok((tables::parse(&key)?, decode_row(tables::TRANSACTION, &key, value)?)))
        .collect()
}

fn counters(tx: &mut Tx<'_>) -> Result<CountersRow, StoreError> {
    Ok(tx.get_row(tables::COUNTERS, &[])?.unwrap_or_default())
}

fn put(tx: &mut Tx<'_>, id: u64, row: &TransactionRow) {
    tx.put_row(tables::TRANSACTION, &tables::key(id), row);
}

fn get(tx: &mut Tx<'_>, id: u64) -> Result<TransactionRow, StoreError> {
    tx.get_row(tables::TRANSACTION, &tables::key(id))?
        .ok_or_else(|| StoreError::Broken(format!("transaction {id} is queued but does not exist")))
}

fn apply_begin(
    tx: &mut Tx<'_>,
    time: Time,
    begin: Begin,
    tag: ClientTag,
    effects: &mut Effects<Cdc>,
) -> Result<(), Stop> {
    let op = begin.request.as_ref().and_then(|request| request.op.as_ref());
    let plan = op.and_then(plans::of);
    plan.ok_or_else(|| Stop::unknown("a transaction of a kind that this build does not know"))?.check()?;
    let mut counters = counters(tx)?;
    if counters.live >= TRANSACTIONS_MAX {
        return Err(Stop::refuse(Code::Overloaded, format!("{TRANSACTIONS_MAX} transactions are in flight")));
    }
    counters.transaction += 1;
    broken_unless!(
        counters.live == 0 || counters.oldest < counters.transaction,
        "the oldest transaction, {}, is not older than {}",
        counters.oldest,
        counters.transaction
    );
    if counters.live == 0 {
        counters.oldest = counters.transaction;
    }
    counters.live += 1;
    tx.put_row(tables::COUNTERS, &[], &counters);
    let id = counters.transaction;
    let row = TransactionRow {
        begin: Some(begin),
        tag: Some(tag),
        started_at: time.0,
        ..TransactionRow::default()
    };
    let runs = locks::enqueue(tx, id, &steps::directories(&row)?)?;
    put(tx, id, &row);
    if runs {
        run(tx, id, row, effects)?;
    }
    Ok(())
}

/// The transaction has its directories: its first step.
fn run(tx: &mut Tx<'_>, id: u64, mut row: TransactionRow, effects: &mut Effects<Cdc>) -> Result<(), Stop> {
    let mut counters = counters(tx)?;
    broken_unless!(row.run_order == 0, "transaction {id} runs a second time");
    counters.run_order += 1;
    tx.put_row(tables::COUNTERS, &[], &counters);
    row.run_order = counters.run_order;
    if let Some(moved) = steps::moved_directory(&row)? {
        tx.put(tables::MOVING, &tables::key(moved), tables::key(id).to_vec());
    }
    issue(tx, id, row, State::First, effects)
}

/// Enters a state and sends its request.
fn issue(
    tx: &mut Tx<'_>,
    id: u64,
    mut row: TransactionRow,
    state: State,
    effects: &mut Effects<Cdc>,
) -> Result<(), Stop> {
    steps::enter(&mut row, state);
    if state == State::Walk
        && let Some(blocker) = walks::blocker(tx, &row)?
    {
        walks::block(tx, id, row, blocker);
        return Ok(());
    }
    let counters = counters(tx)?;
    row.sent_after_moves = counters.moves_ended;
    put(tx, id, &row);
    effects.actions.push(send(id, &row, counters.oldest)?);
    Ok(())
}

fn send(id: u64, row: &TransactionRow, oldest: u64) -> Result<SendStep, StoreError> {
    let request = steps::request(row)?;
    let is_read = request.op.as_ref().is_some_and(|op| operation::of_shard(op).1.is_read());
    let tag = (!is_read).then(|| ClientTag {
        client: STEP_CLIENT,
        sequence: id << STEP_BITS | u64::from(row.step),
        // All steps of transactions before the oldest in flight have been answered.
        acknowledged: (oldest << STEP_BITS).saturating_sub(1),
        issued_at: row.started_at,
    });
    Ok(SendStep { transaction: id, step: row.step, request, tag, row: row.clone(), oldest })
}

fn apply_step_done(tx: &mut Tx<'_>, done: StepDone, effects: &mut Effects<Cdc>) -> Result<(), Stop> {
    let id = done.transaction;
    let row: Option<TransactionRow> = tx.get_row(tables::TRANSACTION, &tables::key(id))?;
    // A late duplicate: the step was answered before.
    let Some(mut row) = row.filter(|r| r.step == done.step && r.run_order != 0) else { return Ok(()) };
    for reply in done.earlier {
        match steps::next(&mut row, Ok(reply))? {
            Next::Enter(state) => steps::enter(&mut row, state),
            // The shell does not run ahead of the end.
            Next::Finish(result) => return finish(tx, id, &row, result, effects),
        }
        if State::of(&row)? != State::Walk {
            continue;
        }
        // The next answer was read while nobody looked at what else moves.
        if let Some(blocker) = walks::blocker(tx, &row)? {
            walks::block(tx, id, row, blocker);
            return Ok(());
        }
        if walks::has_moved(tx, &row)? {
            walks::begin(&mut row)?;
            return issue(tx, id, row, State::Walk, effects);
        }
    }
    let result = match done.error {
        Some(error) => Err(Refusal::from_wire(error)),
        None => Ok(done.reply.unwrap_or_default()),
    };
    match steps::next(&mut row, result)? {
        Next::Enter(state) => issue(tx, id, row, state, effects),
        Next::Finish(result) => finish(tx, id, &row, result, effects),
    }
}

fn finish(
    tx: &mut Tx<'_>,
    id: u64,
    row: &TransactionRow,
    result: Result<CdcReply, Refusal>,
    effects: &mut Effects<Cdc>,
) -> Result<(), Stop> {
    tx.delete(tables::TRANSACTION, &tables::key(id));
    let mut counters = counters(tx)?;
    broken_unless!(counters.live > 0, "transaction {id} ends, and none is in flight");
    broken_unless!(
        row.run_order <= counters.run_order,
        "transaction {id} ran as number {}, and {} have run",
        row.run_order,
        counters.run_order
    );
    counters.live -= 1;
    if counters.oldest == id {
        // What was deleted before the oldest is never looked at again.
        let next = tx.scan(tables::TRANSACTION, &tables::key(id + 1), &[], 1)?;
        let next = next.first().map(|(key, _)| tables::parse(key)).transpose()?;
        counters.oldest = next.unwrap_or(counters.transaction + 1);
    }
    if let Some(moved) = steps::moved_directory(row)? {
        walks::remember_move(tx, &mut counters, moved, row.run_order)?;
    }
    tx.put_row(tables::COUNTERS, &[], &counters);
    if let Some(tag) = &row.tag {
        effects.resolve(*tag, result);
    }
    if let Some(moved) = steps::moved_directory(row)? {
        tx.delete(tables::MOVING, &tables::key(moved));
        // Walks that met this move begin again from their start.
        let until = key_after(&tables::key(id));
        for (key, _) in tx.scan(tables::BLOCKED_WALK, &tables::pair(id, 0), &until, usize::MAX)? {
            tx.delete(tables::BLOCKED_WALK, &key);
            let waiting = tables::second(&key)?;
            let mut other = get(tx, waiting)?;
            walks::begin(&mut other)?;
            issue(tx, waiting, other, State::Walk, effects)?;
        }
    }
    for ready in locks::release(tx, id, &steps::directories(row)?)? {
        let row = get(tx, ready)?;
        run(tx, ready, row, effects)?;
    }
    Ok(())
}
