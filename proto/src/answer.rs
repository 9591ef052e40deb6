//! How large answers may become: what a node sets aside before it makes one.

use prost::encoding::{DecodeContext, WireType, decode_key, skip_field};

use crate::session::Role;

/// Set aside for a page of a listing, a layout or a visit. Nearly all are smaller; what is larger is bounded by the number
/// of rows in a page.
const PAGE_BYTES: usize = 2 << 20;
/// Set aside for a part of a scan or of the log, which is bounded by `SCAN_BYTES_MAX`.
const SCAN_BYTES: usize = 4 << 20;

/// Fields of requests whose answers are pages: the numbers are in the protos.
const SHARD_PAGES: std::ops::RangeInclusive<u32> = 3..=12;
const REGISTRY_MAP: u32 = 1;
const CDC_TRANSACTIONS: u32 = 10;
const ADMIN_SCANS: std::ops::RangeInclusive<u32> = 2..=3;

/// About how many bytes the answer to an encoded request may have, if that is more than a few KiB; otherwise 0. Answers of
/// block services have the length that was asked for.
pub fn bytes_max(role: Role, is_admin: bool, mut body: &[u8]) -> usize {
    let mut most = 0;
    // Of several operations the last one counts; whoever sends them gets room for the largest.
    while let Ok((field, wire_type)) = decode_key(&mut body) {
        let bytes = match (is_admin, role) {
            (true, _) if ADMIN_SCANS.contains(&field) => SCAN_BYTES,
            (false, Role::Shard) if SHARD_PAGES.contains(&field) => PAGE_BYTES,
            (false, Role::Registry) if field == REGISTRY_MAP => PAGE_BYTES,
            (false, Role::Cdc) if field == CDC_TRANSACTIONS => PAGE_BYTES,
            (_, Role::Unspecified | Role::Registry | Role::Cdc | Role::Shard | Role::Blocks) => 0,
        };
        most = most.max(bytes);
        if wire_type == WireType::EndGroup
            || skip_field(wire_type, field, &mut body, DecodeContext::default()).is_err()
        {
            break;
        }
    }
    most
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::{
        admin::{AdminRequest, ReadLog, ScanRows, Status, admin_request},
        cdc::{CdcRequest, ListTransactions, MakeDirectory, cdc_request},
        registry::{GetMap, PlaceShard, RegistryRequest, registry_request},
        shard::{
            ContentHistory, CreateFile, History, Layout, Lookup, ReadDir, ShardRequest, Stat, VisitBlocks,
            VisitDeadSpans, VisitInodes, VisitPastContents, VisitSpans, VisitTransients, shard_request::Op,
        },
    };

    #[test]
    fn pages_are_known_by_the_numbers_of_their_requests() {
        let shard = |op: Op| bytes_max(Role::Shard, false, &ShardRequest { op: Some(op) }.encode_to_vec());
        for page in [
            Op::ReadDir(ReadDir::default()),
            Op::Layout(Layout { id: 7, ..Layout::default() }),
            Op::History(History::default()),
            Op::ContentHistory(ContentHistory::default()),
            Op::VisitInodes(VisitInodes::default()),
            Op::VisitTransients(VisitTransients::default()),
            Op::VisitPastContents(VisitPastContents::default()),
            Op::VisitDeadSpans(VisitDeadSpans::default()),
            Op::VisitBlocks(VisitBlocks::default()),
            Op::VisitSpans(VisitSpans::default()),
        ] {
            assert_eq!(shard(page.clone()), PAGE_BYTES, "{page:?}");
        }
        for small in [
            Op::Lookup(Lookup { name: vec![24; 200].into(), ..Lookup::default() }),
            Op::Stat(Stat::default()),
            Op::CreateFile(CreateFile { data: vec![26; 200].into(), ..CreateFile::default() }),
        ] {
            assert_eq!(shard(small.clone()), 0, "{small:?}");
        }
        let map = RegistryRequest { op: Some(registry_request::Op::GetMap(GetMap::default())) };
        assert_eq!(bytes_max(Role::Registry, false, &map.encode_to_vec()), PAGE_BYTES);
        let place = RegistryRequest { op: Some(registry_request::Op::PlaceShard(PlaceShard::default())) };
        assert_eq!(bytes_max(Role::Registry, false, &place.encode_to_vec()), 0);
        let list = CdcRequest { op: Some(cdc_request::Op::ListTransactions(ListTransactions::default())) };
        assert_eq!(bytes_max(Role::Cdc, false, &list.encode_to_vec()), PAGE_BYTES);
        let make = CdcRequest { op: Some(cdc_request::Op::MakeDirectory(MakeDirectory::default())) };
        assert_eq!(bytes_max(Role::Cdc, false, &make.encode_to_vec()), 0);
        for (op, bytes) in [
            (admin_request::Op::ScanRows(ScanRows::default()), SCAN_BYTES),
            (admin_request::Op::ReadLog(ReadLog::default()), SCAN_BYTES),
            (admin_request::Op::Status(Status::default()), 0),
        ] {
            let body = AdminRequest { op: Some(op) }.encode_to_vec();
            assert_eq!(bytes_max(Role::Shard, true, &body), bytes);
        }
        // A small operation in front of a large one, and bytes that are none.
        let both =
            [&ShardRequest { op: Some(Op::Stat(Stat::default())) }.encode_to_vec()[..], &[26, 0]].concat();
        assert_eq!(bytes_max(Role::Shard, false, &both), PAGE_BYTES);
        for bytes in [&[][..], &[255; 30], &[28], &[26, 200]] {
            bytes_max(Role::Shard, false, bytes);
        }
    }
}
