//! The cross-directory coordinator: transactions over shards, as step machines. Pure.
//!
//! A transaction is a row. Each step is one request to one shard; its answer comes back as an entry and moves the
//! row on. The steps of all kinds, and how they roll back, are in [`steps`].
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
//! * A directory move whose ancestor walk meets a directory that an earlier move has in flight waits for that
//!   move and walks again, and so does one that read a directory whose earlier move has ended since: two moves cannot
//!   make a loop together.

mod locks;
pub mod steps;
pub mod tables;

use bytes::Bytes;
use clutch_proto::{
    InodeId, Refusal, Time,
    cdc::{
        Begin, CdcEntry, CdcReply, CdcRequest, CountersRow, Jump, StepDone, TransactionRow,
        TransactionSummary, begin, cdc_entry::Body, cdc_request::Op,
    },
    log::Position,
    mutants::{self, Mutant},
    name, rules,
    shard::{ShardReply, ShardRequest, shard_request},
    types::{ClientTag, Code},
};
use clutch_state::{
    Applied, Machine, ProduceContext, Stop, StoreError, Tx, View, get_row, key_after, machine::Effects,
    store::decode_row,
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
    /// The slot whose shard gets it.
    pub slot: u8,
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
        let Next::Enter(state) = steps::next(&mut row, Ok(reply.clone())) else { return None };
        // A read may come out differently when it is sent again, so only reads may follow before it is logged.
        if self.tag.is_none() && state != State::Walk {
            return None;
        }
        steps::enter(&mut row, state);
        Some(send(self.transaction, &row, self.oldest))
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
        matches!(request.op, None | Some(Op::ListTransactions(_)))
    }

    fn gives_space_back(request: &CdcRequest) -> bool {
        matches!(request.op, Some(Op::RemoveDirectory(_) | Op::ForgetFile(_) | Op::ForgetDirectory(_)))
    }

    fn read(view: &dyn View, request: &CdcRequest, _facts: &()) -> Result<CdcReply, Stop> {
        let Some(Op::ListTransactions(_)) = request.op else {
            return Err(Refusal::malformed("a request without an operation that this build knows").into());
        };
        let transactions = live(view)?.into_iter().map(|(id, row)| TransactionSummary {
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
        let op = match request.op {
            Some(Op::MakeDirectory(op)) => begin::Op::MakeDirectory(op),
            Some(Op::RemoveDirectory(op)) => begin::Op::RemoveDirectory(op),
            Some(Op::RenameFile(op)) => begin::Op::RenameFile(op),
            Some(Op::RenameDirectory(op)) => begin::Op::RenameDirectory(op),
            Some(Op::ForgetFile(op)) => begin::Op::ForgetFile(op),
            Some(Op::ForgetDirectory(op)) => begin::Op::ForgetDirectory(op),
            Some(Op::UndeleteDirectory(op)) => begin::Op::UndeleteDirectory(op),
            Some(Op::ListTransactions(_)) | None => {
                return Err(Refusal::malformed("not a transaction").into());
            }
        };
        check(&op)?;
        let slot = ((context.random)() & 0xff) as u32;
        Ok(CdcEntry { tag: Some(tag), body: Some(Body::Begin(Begin { op: Some(op), slot })) })
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
        Ok(running.map(|(id, row)| send(*id, row, oldest)).collect())
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

/// Refuses what can never work, before it is logged.
fn check(op: &begin::Op) -> Result<(), Refusal> {
    let directory = |raw: u64| match InodeId::from_wire(raw) {
        None => Err(Refusal::invalid(format!("{raw:x} is not an inode id"))),
        Some(id) if !id.is_directory() => {
            Err(Refusal::new(Code::NotDirectory, format!("{id} is not a directory")))
        }
        Some(_) => Ok(()),
    };
    match op {
        begin::Op::MakeDirectory(op) => {
            directory(op.parent)?;
            name::check(&op.name)
        }
        begin::Op::RemoveDirectory(op) => {
            directory(op.parent)?;
            directory(op.target)?;
            name::check(&op.name)
        }
        begin::Op::RenameFile(op) => {
            directory(op.old_parent)?;
            directory(op.new_parent)?;
            if op.old_parent == op.new_parent {
                return Err(Refusal::invalid("a rename within one directory goes to its shard"));
            }
            match InodeId::from_wire(op.target) {
                Some(target) if !target.is_directory() => {}
                _ => {
                    return Err(Refusal::new(
                        Code::IsDirectory,
                        format!("{:x} is not a file or link", op.target),
                    ));
                }
            }
            name::check(&op.old_name)?;
            name::check(&op.new_name)
        }
        begin::Op::RenameDirectory(op) => {
            directory(op.old_parent)?;
            directory(op.new_parent)?;
            directory(op.target)?;
            if op.old_parent == op.new_parent {
                return Err(Refusal::invalid("a rename within one directory goes to its shard"));
            }
            if op.target == op.new_parent {
                return Err(Refusal::new(Code::Loop, "a directory cannot be moved into itself"));
            }
            name::check(&op.old_name)?;
            name::check(&op.new_name)
        }
        begin::Op::ForgetFile(op) => {
            directory(op.dir)?;
            match InodeId::from_wire(op.target) {
                Some(target) if !target.is_directory() => name::check(&op.name),
                _ => {
                    let text = format!("{:x} is not a file or link", op.target);
                    Err(Refusal::new(Code::IsDirectory, text))
                }
            }
        }
        begin::Op::ForgetDirectory(op) => directory(op.target),
        begin::Op::UndeleteDirectory(op) => {
            directory(op.target)?;
            directory(op.parent)?;
            if op.target == op.parent {
                return Err(Refusal::new(Code::Loop, "a directory cannot be brought back into itself"));
            }
            name::check(&op.name)
        }
    }
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
    let op = begin
        .op
        .as_ref()
        .ok_or_else(|| Stop::unknown("a transaction of a kind that this build does not know"))?;
    check(op)?;
    let mut counters = counters(tx)?;
    if counters.live >= TRANSACTIONS_MAX {
        return Err(Stop::refuse(Code::Overloaded, format!("{TRANSACTIONS_MAX} transactions are in flight")));
    }
    counters.transaction += 1;
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
    let runs = locks::enqueue(tx, id, &steps::directories(&row))?;
    put(tx, id, &row);
    if runs {
        run(tx, id, row, effects)?;
    }
    Ok(())
}

/// The transaction has its directories: its first step.
fn run(tx: &mut Tx<'_>, id: u64, mut row: TransactionRow, effects: &mut Effects<Cdc>) -> Result<(), Stop> {
    let mut counters = counters(tx)?;
    counters.run_order += 1;
    tx.put_row(tables::COUNTERS, &[], &counters);
    row.run_order = counters.run_order;
    if let Some(moved) = steps::moved_directory(&row) {
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
        && let Some(blocker) = walk_blocker(tx, &row)?
    {
        block(tx, id, row, blocker);
        return Ok(());
    }
    let counters = counters(tx)?;
    row.sent_after_moves = counters.moves_ended;
    put(tx, id, &row);
    effects.actions.push(send(id, &row, counters.oldest));
    Ok(())
}

/// Its walk goes on, from its beginning, when that other transaction has ended.
fn block(tx: &mut Tx<'_>, id: u64, mut row: TransactionRow, blocker: u64) {
    row.walk_blocked_by = blocker;
    put(tx, id, &row);
    tx.put(tables::BLOCKED_WALK, &tables::pair(blocker, id), Bytes::new());
}

/// The earlier move that has the directory in flight where the walk stands.
fn walk_blocker(tx: &mut Tx<'_>, row: &TransactionRow) -> Result<Option<u64>, Stop> {
    let Some(mover) = tx.get(tables::MOVING, &tables::key(row.walk_at))? else { return Ok(None) };
    let mover = tables::parse(&mover)?;
    if mutants::is(Mutant::LoopThroughMoves) {
        return Ok(None);
    }
    let earlier = get(tx, mover)?.run_order < row.run_order;
    Ok(earlier.then_some(mover))
}

/// Whether a move that began before this one has taken the directory where the walk stands elsewhere since the step
/// was sent: what was read of the directory may be from before.
fn has_moved(tx: &mut Tx<'_>, row: &TransactionRow) -> Result<bool, Stop> {
    let ended = counters(tx)?.moves_ended;
    let is_ignored = mutants::is(Mutant::LoopThroughMoves) || mutants::is(Mutant::EndedMoveForgotten);
    if ended == row.sent_after_moves || is_ignored {
        return Ok(false);
    }
    if ended - row.sent_after_moves > MOVES_REMEMBERED {
        return Ok(true);
    }
    let from = tables::pair(row.walk_at, row.sent_after_moves + 1);
    let until = key_after(&tables::key(row.walk_at));
    for (_, run_order) in tx.scan(tables::MOVED, &from, &until, usize::MAX)? {
        if tables::parse(&run_order)? < row.run_order {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Remembers that a move has ended, and forgets the one that ended [`MOVES_REMEMBERED`] moves ago.
fn remember_move(
    tx: &mut Tx<'_>,
    counters: &mut CountersRow,
    moved: u64,
    run_order: u64,
) -> Result<(), StoreError> {
    counters.moves_ended += 1;
    let number = counters.moves_ended;
    tx.put(tables::MOVED, &tables::pair(moved, number), tables::key(run_order).to_vec());
    tx.put(tables::MOVED_ORDER, &tables::key(number), tables::key(moved).to_vec());
    if let Some(old) = number.checked_sub(MOVES_REMEMBERED)
        && let Some(dir) = tx.get(tables::MOVED_ORDER, &tables::key(old))?
    {
        tx.delete(tables::MOVED, &tables::pair(tables::parse(&dir)?, old));
        tx.delete(tables::MOVED_ORDER, &tables::key(old));
    }
    Ok(())
}

fn send(id: u64, row: &TransactionRow, oldest: u64) -> SendStep {
    let (slot, request) = steps::request(row);
    let is_read = matches!(request.op, Some(shard_request::Op::Stat(_)));
    let tag = (!is_read).then(|| ClientTag {
        client: STEP_CLIENT,
        sequence: id << STEP_BITS | u64::from(row.step),
        // All steps of transactions before the oldest in flight have been answered.
        acknowledged: (oldest << STEP_BITS).saturating_sub(1),
        issued_at: row.started_at,
    });
    SendStep { transaction: id, step: row.step, slot, request, tag, row: row.clone(), oldest }
}

fn apply_step_done(tx: &mut Tx<'_>, done: StepDone, effects: &mut Effects<Cdc>) -> Result<(), Stop> {
    let id = done.transaction;
    let row: Option<TransactionRow> = tx.get_row(tables::TRANSACTION, &tables::key(id))?;
    // A late duplicate: the step was answered before.
    let Some(mut row) = row.filter(|r| r.step == done.step && r.run_order != 0) else { return Ok(()) };
    for reply in done.earlier {
        match steps::next(&mut row, Ok(reply)) {
            Next::Enter(state) => steps::enter(&mut row, state),
            // The shell does not run ahead of the end.
            Next::Finish(result) => return finish(tx, id, &row, result, effects),
        }
        if State::of(&row) != State::Walk {
            continue;
        }
        // The next answer was read while nobody looked at what else moves.
        if let Some(blocker) = walk_blocker(tx, &row)? {
            block(tx, id, row, blocker);
            return Ok(());
        }
        if has_moved(tx, &row)? {
            steps::begin_walk(&mut row);
            return issue(tx, id, row, State::Walk, effects);
        }
    }
    let result = match done.error {
        Some(error) => Err(Refusal::from_wire(error)),
        None => Ok(done.reply.unwrap_or_default()),
    };
    match steps::next(&mut row, result) {
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
    counters.live -= 1;
    if counters.oldest == id {
        // What was deleted before the oldest is never looked at again.
        let next = tx.scan(tables::TRANSACTION, &tables::key(id + 1), &[], 1)?;
        let next = next.first().map(|(key, _)| tables::parse(key)).transpose()?;
        counters.oldest = next.unwrap_or(counters.transaction + 1);
    }
    if let Some(moved) = steps::moved_directory(row) {
        remember_move(tx, &mut counters, moved, row.run_order)?;
    }
    tx.put_row(tables::COUNTERS, &[], &counters);
    if let Some(tag) = &row.tag {
        effects.resolve(*tag, result);
    }
    if let Some(moved) = steps::moved_directory(row) {
        tx.delete(tables::MOVING, &tables::key(moved));
        // Walks that met this move begin again from their start.
        let until = key_after(&tables::key(id));
        for (key, _) in tx.scan(tables::BLOCKED_WALK, &tables::pair(id, 0), &until, usize::MAX)? {
            tx.delete(tables::BLOCKED_WALK, &key);
            let waiting = tables::second(&key)?;
            let mut other = get(tx, waiting)?;
            steps::begin_walk(&mut other);
            issue(tx, waiting, other, State::Walk, effects)?;
        }
    }
    for ready in locks::release(tx, id, &steps::directories(row))? {
        let row = get(tx, ready)?;
        run(tx, ready, row, effects)?;
    }
    Ok(())
}
