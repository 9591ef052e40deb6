//! Walks of directory moves: up the ancestors of the new parent, so that no directory ends below itself, also when
//! several move at a time.
//!
//! A walk that meets a directory which an earlier move has in flight waits for that move and begins again, and so does one
//! that read a directory whose earlier move has ended since: two moves cannot make a loop together.

use bytes::Bytes;
use clutch_proto::{
    InodeId, Refusal,
    cdc::{CountersRow, TransactionRow},
    mutants::{self, Mutant},
    rules::v1::{MOVES_REMEMBERED, PATH_DEPTH_MAX},
    shard::{ShardReply, shard_reply::Reply},
    types::Code,
};
use clutch_state::{Stop, StoreError, Tx, key_after};

use crate::{
    counters, get, put,
    steps::{self, Next, State, advance, roll_back},
    tables,
};

/// Puts the walk at its beginning: the new parent itself.
pub(crate) fn begin(row: &mut TransactionRow) -> Result<(), StoreError> {
    if let Some((_, new_parent)) = steps::plan(row)?.moves() {
        (row.walk_at, row.walk_depth) = (new_parent, 0);
    }
    Ok(())
}

/// One ancestor is known: go on to its parent, or decide.
pub(crate) fn walked(row: &mut TransactionRow, reply: ShardReply) -> Result<Next, StoreError> {
    let Some((target, _)) = steps::plan(row)?.moves() else {
        return Err(StoreError::Broken("a transaction walks and moves nothing".into()));
    };
    let Some(Reply::Attributes(attributes)) = reply.reply else {
        return roll_back(row, Refusal::malformed("a stat without attributes"));
    };
    if attributes.parent == 0 {
        return roll_back(row, Refusal::new(Code::NotFound, "the new parent was removed"));
    }
    if row.walk_at == target || attributes.parent == target {
        return roll_back(
            row,
            Refusal::new(Code::Loop, "the new parent lies below the directory that moves"),
        );
    }
    if row.walk_at == InodeId::ROOT.raw() {
        return advance(row, State::Walk);
    }
    row.walk_depth += 1;
    if mutants::is(Mutant::WalkEndsEarly) {
        return advance(row, State::Walk);
    }
    if row.walk_depth as usize > PATH_DEPTH_MAX {
        let text = format!("deeper than {PATH_DEPTH_MAX} directories");
        return roll_back(row, Refusal::new(Code::TooLarge, text));
    }
    row.walk_at = attributes.parent;
    Ok(Next::Enter(State::Walk))
}

/// Its walk goes on, from its beginning, when that other transaction has ended.
pub(crate) fn block(tx: &mut Tx<'_>, id: u64, mut row: TransactionRow, blocker: u64) {
    row.walk_blocked_by = blocker;
    put(tx, id, &row);
    tx.put(tables::BLOCKED_WALK, &tables::pair(blocker, id), Bytes::new());
}

/// The earlier move that has the directory in flight where the walk stands.
pub(crate) fn blocker(tx: &mut Tx<'_>, row: &TransactionRow) -> Result<Option<u64>, Stop> {
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
pub(crate) fn has_moved(tx: &mut Tx<'_>, row: &TransactionRow) -> Result<bool, Stop> {
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
pub(crate) fn remember_move(
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
