//! The CDC's tables.

use clutch_state::{StoreError, Table};

/// One row: `Genesis`.
pub const GENESIS: Table = Table(16);
/// Transaction → `TransactionRow`; only what is in flight.
pub const TRANSACTION: Table = Table(17);
/// One row: `CountersRow`.
pub const COUNTERS: Table = Table(18);
/// Directory → `LockQueueRow`.
pub const LOCK: Table = Table(19);
/// Directory that is being moved → transaction.
pub const MOVING: Table = Table(20);
/// Directory and transaction that waits for it behind the head of its queue → nothing.
pub const LOCK_WAITER: Table = Table(21);
/// Transaction that moves a directory and one whose walk met it → nothing.
pub const BLOCKED_WALK: Table = Table(22);
/// Directory and number of a move of it that has ended → when the move began to run, as its `run_order`. Of the last
/// [`crate::MOVES_REMEMBERED`].
pub const MOVED: Table = Table(23);
/// Number of such a move → its directory.
pub const MOVED_ORDER: Table = Table(24);

/// Two numbers as key.
pub fn pair(first: u64, second: u64) -> [u8; 16] {
    let mut key = [0; 16];
    key[..8].copy_from_slice(&first.to_be_bytes());
    key[8..].copy_from_slice(&second.to_be_bytes());
    key
}

/// The second number of a key of two.
pub fn second(key: &[u8]) -> Result<u64, StoreError> {
    match key.split_at_checked(8) {
        Some((_, second)) => parse(second),
        None => parse(key),
    }
}

/// A number as key.
pub fn key(number: u64) -> [u8; 8] {
    number.to_be_bytes()
}

/// The number in a key.
pub fn parse(key: &[u8]) -> Result<u64, StoreError> {
    let bytes =
        key.try_into().map_err(|_| StoreError::Broken("a key of the CDC is not 8 bytes long".into()))?;
    Ok(u64::from_be_bytes(bytes))
}
