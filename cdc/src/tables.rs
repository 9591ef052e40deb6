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
