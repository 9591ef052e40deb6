//! Rows by their keys, from a view or inside a transaction, and the ids that come from outside: whether they are any, and
//! this shard's.

use clutch_proto::{
    InodeId, Slot,
    shard::{Genesis, shard_reply::Reply},
    types::Code,
};
use clutch_state::{Stop, StoreError, Tx, View};

use crate::tables;

/// What applying an operation gives.
pub(crate) type Reapplied = Result<Reply, Stop>;

/// Keys and values as they are stored.
pub(crate) type RawRows = Vec<(bytes::Bytes, bytes::Bytes)>;

/// Reads either from a view or from a transaction.
pub(crate) trait Rows {
    fn row<M: prost::Message + Default>(
        &mut self,
        table: clutch_state::Table,
        key: &[u8],
    ) -> Result<Option<M>, StoreError>;

    fn page(
        &mut self,
        table: clutch_state::Table,
        from: &[u8],
        until: &[u8],
        limit: usize,
    ) -> Result<RawRows, StoreError>;
}

impl Rows for Tx<'_> {
    fn page(
        &mut self,
        table: clutch_state::Table,
        from: &[u8],
        until: &[u8],
        limit: usize,
    ) -> Result<RawRows, StoreError> {
        self.scan(table, from, until, limit)
    }

    fn row<M: prost::Message + Default>(
        &mut self,
        table: clutch_state::Table,
        key: &[u8],
    ) -> Result<Option<M>, StoreError> {
        self.get_row(table, key)
    }
}

impl Rows for &dyn View {
    fn page(
        &mut self,
        table: clutch_state::Table,
        from: &[u8],
        until: &[u8],
        limit: usize,
    ) -> Result<RawRows, StoreError> {
        (**self).scan(table, from, until, limit)
    }

    fn row<M: prost::Message + Default>(
        &mut self,
        table: clutch_state::Table,
        key: &[u8],
    ) -> Result<Option<M>, StoreError> {
        clutch_state::get_row(*self, table, key)
    }
}

/// Refuses what belongs to another shard.
pub(crate) fn check_slot(rows: &mut impl Rows, slot: Slot) -> Result<(), Stop> {
    let shard: Genesis = rows
        .row(tables::SHARD, &[])?
        .ok_or_else(|| Stop::refuse(Code::NotReady, "the shard has not begun yet"))?;
    let slot = u32::from(slot.0);
    if slot < shard.slot_first || slot > shard.slot_last {
        return Err(Stop::refuse(
            Code::WrongShard,
            format!(
                "slot {slot} is not of shard {} (slots {} to {})",
                shard.shard, shard.slot_first, shard.slot_last
            ),
        ));
    }
    Ok(())
}

/// Reads a slot that came from outside and checks that it is this shard's.
pub(crate) fn parse_slot(rows: &mut impl Rows, raw: u32) -> Result<Slot, Stop> {
    let slot = u8::try_from(raw)
        .map_err(|_| Stop::refuse(Code::InvalidArgument, format!("slot {raw}; slots go from 0 to 255")))?;
    check_slot(rows, Slot(slot))?;
    Ok(Slot(slot))
}

/// Reads an inode id that came from outside.
pub(crate) fn parse_inode(raw: u64) -> Result<InodeId, Stop> {
    InodeId::from_wire(raw)
        .ok_or_else(|| Stop::refuse(Code::InvalidArgument, format!("{raw:x} is not an inode id")))
}

/// Reads a directory's id that came from outside and checks that it is this shard's.
pub(crate) fn parse_directory(rows: &mut impl Rows, raw: u64) -> Result<InodeId, Stop> {
    let id = parse_inode(raw)?;
    if !id.is_directory() {
        return Err(Stop::refuse(Code::NotDirectory, format!("{id} is not a directory")));
    }
    check_slot(rows, id.slot())?;
    Ok(id)
}
