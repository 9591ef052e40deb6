//! How a transaction goes on: from its row and the answer to its step to its next step, or to its end. What the steps of a
//! kind are is in [`crate::plans`].

use clutch_proto::{
    Refusal,
    cdc::{CdcReply, TransactionRow},
    mutants::{self, Mutant},
    shard::{Remaining, ShardReply, ShardRequest, Stat, shard_reply::Reply, shard_request},
    types::{Code, Error},
};
use clutch_state::StoreError;

use crate::{
    plans::{self, Plan},
    walks,
};

/// Where a transaction stands. The numbers are in the rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Waits for its directories.
    Waiting = 0,
    /// Makes the inode, locks the edge, or whatever a kind begins with.
    First = 1,
    /// Reads the ancestors of the new parent, one by one.
    Walk = 2,
    /// Inserts the new edge, or orphans what is removed.
    Insert = 3,
    /// Tells the moved directory of its new parent.
    SetParent = 4,
    /// Ends the old edge, or removes the file.
    Remove = 5,
    /// Takes the first step back.
    Back = 6,
}

impl State {
    /// What a row's number says; a number that this build does not know is a broken row.
    pub(crate) fn of(row: &TransactionRow) -> Result<State, StoreError> {
        use State::{Back, First, Insert, Remove, SetParent, Waiting, Walk};
        [Waiting, First, Walk, Insert, SetParent, Remove, Back]
            .into_iter()
            .find(|s| *s as u32 == row.state)
            .ok_or_else(|| {
                StoreError::Broken(format!("a transaction stands at {}, which is no step", row.state))
            })
    }
}

/// What follows a step.
pub(crate) enum Next {
    Enter(State),
    Finish(Result<CdcReply, Refusal>),
}

/// What a transaction does.
pub(crate) fn plan(row: &TransactionRow) -> Result<&dyn Plan, StoreError> {
    let op = row.begin.as_ref().and_then(|begin| begin.request.as_ref()).and_then(|r| r.op.as_ref());
    op.and_then(plans::of)
        .ok_or_else(|| StoreError::Broken("a transaction has no operation that this build knows".into()))
}

/// A word for people.
pub fn kind_name(row: &TransactionRow) -> &'static str {
    plan(row).map_or("unknown", Plan::kind)
}

/// A few words for people.
pub fn state_name(row: &TransactionRow) -> String {
    match (row.walk_blocked_by, State::of(row)) {
        (0, Ok(state)) => format!("{state:?}").to_lowercase(),
        (0, Err(_)) => format!("unknown ({})", row.state),
        (other, _) => format!("waits for transaction {other}"),
    }
}

/// The directories that a transaction holds while it runs, each once.
pub(crate) fn directories(row: &TransactionRow) -> Result<Vec<u64>, StoreError> {
    let mut dirs = plan(row)?.holds();
    dirs.sort_unstable();
    dirs.dedup();
    Ok(dirs)
}

/// The directory that a move takes with it.
pub(crate) fn moved_directory(row: &TransactionRow) -> Result<Option<u64>, StoreError> {
    Ok(plan(row)?.moves().map(|(moved, _)| moved))
}

/// Enters a state: the next step begins.
pub(crate) fn enter(row: &mut TransactionRow, state: State) {
    row.state = state as u32;
    row.step += 1;
    row.walk_blocked_by = 0;
}

/// The request of the state that a transaction is in.
pub(crate) fn request(row: &TransactionRow) -> Result<ShardRequest, StoreError> {
    let (plan, state) = (plan(row)?, State::of(row)?);
    let op = match state {
        State::Walk => Some(shard_request::Op::Stat(Stat { id: row.walk_at })),
        State::Back => plan.undo(row),
        state => plan.request(state, row),
    };
    let op = op.ok_or_else(|| StoreError::Broken(format!("to {} has no step {state:?}", plan.kind())))?;
    Ok(ShardRequest { op: Some(op) })
}

/// Before the point of no return: what was done is taken back.
pub(crate) fn roll_back(row: &mut TransactionRow, cause: Refusal) -> Result<Next, StoreError> {
    let nothing_was_done = State::of(row)? == State::First || plan(row)?.undo(row).is_none();
    if nothing_was_done || mutants::is(Mutant::RollbackForgets) {
        return Ok(Next::Finish(Err(cause)));
    }
    // The code alone: a sentence of this build must not become part of the state.
    row.cause = Some(Error { code: cause.code as i32, detail: String::new() });
    Ok(Next::Enter(State::Back))
}

/// What comes behind a step of the plan that is done.
pub(crate) fn advance(row: &mut TransactionRow, done: State) -> Result<Next, StoreError> {
    let plan = plan(row)?;
    let mut steps = plan.steps().iter().skip_while(|step| **step != done).skip(1);
    let Some(next) = steps.next().copied() else {
        let id = plan.id(row);
        let reply = CdcReply { id, created_at: row.created_at, ..CdcReply::default() };
        return Ok(Next::Finish(Ok(reply)));
    };
    if next == State::Walk {
        walks::begin(row)?;
    }
    Ok(Next::Enter(next))
}

/// Moves a transaction on by the answer to its current step.
pub(crate) fn next(
    row: &mut TransactionRow,
    result: Result<ShardReply, Refusal>,
) -> Result<Next, StoreError> {
    let state = State::of(row)?;
    let at = |state: State, plan: &dyn Plan| plan.steps().iter().position(|step| *step == state);
    let plan = plan(row)?;
    let is_forward = state == State::Back || at(state, plan) > at(plan.commits(), plan);
    match (state, result) {
        (State::Waiting, _) => Err(StoreError::Broken("an answer to a transaction that waits".into())),
        // Only forward from here. What these steps change is held by this transaction, so "not there" and "not as it
        // was" mean that it is done already; any other refusal means that it is not, and it is asked for again.
        (state, Err(refusal)) if is_forward && !matches!(refusal.code, Code::NotFound | Code::Stale) => {
            Ok(Next::Enter(state))
        }
        (State::Back, _) => {
            let cause = row.cause.take().map(Refusal::from_wire);
            Ok(Next::Finish(Err(cause.unwrap_or_else(|| Refusal::new(Code::Stale, "rolled back")))))
        }
        (_, Err(refusal)) if !is_forward => roll_back(row, refusal),
        (State::Walk, Ok(reply)) => walks::walked(row, reply),
        // A file with a long history goes in parts.
        (_, Ok(ShardReply { reply: Some(Reply::Remaining(Remaining { gone: false, .. })) })) => {
            Ok(Next::Enter(state))
        }
        (state, result) => {
            if let Ok(reply) = result {
                match (state, &reply.reply) {
                    (State::First, _) => match plan.begun(&reply) {
                        Ok(made) => row.made = made,
                        Err(refusal) => return Ok(Next::Finish(Err(refusal))),
                    },
                    (State::Insert, Some(Reply::Edge(edge))) => row.created_at = edge.created_at,
                    _ => {}
                }
            }
            advance(row, state)
        }
    }
}
