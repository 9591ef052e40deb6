//! Queues of transactions in front of directories.

use clutch_proto::cdc::LockQueueRow;
use clutch_state::{StoreError, Tx};

use crate::tables;

fn queue(tx: &mut Tx<'_>, dir: u64) -> Result<LockQueueRow, StoreError> {
    Ok(tx.get_row(tables::LOCK, &tables::key(dir))?.unwrap_or_default())
}

/// Enters all queues at once; true if the transaction heads every one of them.
pub(crate) fn enqueue(tx: &mut Tx<'_>, id: u64, dirs: &[u64]) -> Result<bool, StoreError> {
    let mut heads_all = true;
    for dir in dirs {
        let mut row = queue(tx, *dir)?;
        heads_all &= row.transactions.is_empty();
        row.transactions.push(id);
        tx.put_row(tables::LOCK, &tables::key(*dir), &row);
    }
    Ok(heads_all)
}

/// Leaves all queues and returns the transactions that head all of theirs now, oldest first.
pub(crate) fn release(tx: &mut Tx<'_>, id: u64, dirs: &[u64]) -> Result<Vec<u64>, StoreError> {
    let mut heads = Vec::new();
    for dir in dirs {
        let mut row = queue(tx, *dir)?;
        if row.transactions.first() != Some(&id) {
            return Err(StoreError::Broken(format!("transaction {id} does not hold directory {dir:x}")));
        }
        row.transactions.remove(0);
        match row.transactions.first() {
            Some(head) => {
                heads.push(*head);
                tx.put_row(tables::LOCK, &tables::key(*dir), &row);
            }
            None => tx.delete(tables::LOCK, &tables::key(*dir)),
        }
    }
    heads.sort_unstable();
    heads.dedup();
    let mut ready = Vec::new();
    for head in heads {
        let transaction = crate::get(tx, head)?;
        let mut heads_all = transaction.run_order == 0;
        for dir in crate::steps::directories(&transaction) {
            heads_all &= queue(tx, dir)?.transactions.first() == Some(&head);
        }
        if heads_all {
            ready.push(head);
        }
    }
    Ok(ready)
}
