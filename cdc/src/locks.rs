//! Queues of transactions in front of directories.

use bytes::Bytes;
use clutch_proto::cdc::LockQueueRow;
use clutch_state::{StoreError, Tx, broken_unless, key_after};

use crate::tables;

fn queue(tx: &mut Tx<'_>, dir: u64) -> Result<Option<LockQueueRow>, StoreError> {
    tx.get_row(tables::LOCK, &tables::key(dir))
}

/// Enters all queues at once; true if the transaction heads every one of them.
pub(crate) fn enqueue(tx: &mut Tx<'_>, id: u64, dirs: &[u64]) -> Result<bool, StoreError> {
    let mut heads_all = true;
    for dir in dirs {
        let row = match queue(tx, *dir)? {
            None => LockQueueRow { head: id, waiting: 0 },
            Some(row) => {
                broken_unless!(row.head < id, "{} heads the queue in which {id} is the newest", row.head);
                heads_all = false;
                tx.put(tables::LOCK_WAITER, &tables::pair(*dir, id), Bytes::new());
                LockQueueRow { waiting: row.waiting + 1, ..row }
            }
        };
        tx.put_row(tables::LOCK, &tables::key(*dir), &row);
    }
    Ok(heads_all)
}

/// Leaves all queues and returns the transactions that head all of theirs now, oldest first.
pub(crate) fn release(tx: &mut Tx<'_>, id: u64, dirs: &[u64]) -> Result<Vec<u64>, StoreError> {
    let mut heads = Vec::new();
    for dir in dirs {
        let row = queue(tx, *dir)?.filter(|row| row.head == id);
        let row = row
            .ok_or_else(|| StoreError::Broken(format!("transaction {id} does not hold directory {dir:x}")))?;
        if row.waiting == 0 {
            tx.delete(tables::LOCK, &tables::key(*dir));
            continue;
        }
        // Who waits is younger than the head, so what left the queue before is never looked at again.
        let from = tables::pair(*dir, id + 1);
        let next = tx.scan(tables::LOCK_WAITER, &from, &key_after(&tables::key(*dir)), 1)?;
        let (key, _) = next.first().ok_or_else(|| {
            StoreError::Broken(format!("{} wait for directory {dir:x}, but none is there", row.waiting))
        })?;
        let head = tables::second(key)?;
        broken_unless!(head > id, "{head} waited behind {id}, which is younger");
        tx.delete(tables::LOCK_WAITER, key);
        let row = LockQueueRow { head, waiting: row.waiting - 1 };
        tx.put_row(tables::LOCK, &tables::key(*dir), &row);
        heads.push(head);
    }
    heads.sort_unstable();
    heads.dedup();
    let mut ready = Vec::new();
    for head in heads {
        let transaction = crate::get(tx, head)?;
        let mut heads_all = transaction.run_order == 0;
        for dir in crate::steps::directories(&transaction)? {
            heads_all &= queue(tx, dir)?.is_some_and(|row| row.head == head);
        }
        if heads_all {
            ready.push(head);
        }
    }
    Ok(ready)
}
