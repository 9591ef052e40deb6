//! The list of block services on its way into the shards' logs.

use clutch_proto::{limits::METADATA_REQUEST_BYTES_MAX, types::BlockService};
use prost::Message as _;

/// Bytes of services in one entry, unless a single one has more. A large cluster's list is logged in several entries, each of
/// which may stand alone: services are added and replaced, never removed.
pub(crate) const PART_BYTES: usize = METADATA_REQUEST_BYTES_MAX / 2;

/// The services in parts of at most so many bytes, in their order. No services are one part without any.
pub(crate) fn in_parts(services: &[BlockService], bytes_max: usize) -> Vec<&[BlockService]> {
    let mut parts = Vec::new();
    let (mut from, mut bytes) = (0, 0);
    for (at, service) in services.iter().enumerate() {
        let len = service.encoded_len() + 8;
        if at > from && bytes + len > bytes_max {
            parts.push(&services[from..at]);
            (from, bytes) = (at, 0);
        }
        bytes += len;
    }
    parts.push(&services[from..]);
    parts
}

#[cfg(test)]
mod tests {
    use clutch_proto::{limits::BATCH_BYTES_MAX, shard::ServicesChanged};

    use super::*;

    #[test]
    fn a_list_of_any_length_fits_into_entries() {
        let service = |id: u64| BlockService {
            service_id: id,
            address: format!("storage-{id}.example:7400"),
            failure_domain: "x".repeat((id % 900) as usize),
            capacity_bytes: u64::MAX,
            available_bytes: u64::MAX,
            ..BlockService::default()
        };
        for count in [0, 1, 2, 50_000] {
            let services: Vec<BlockService> = (0..count).map(service).collect();
            let whole = ServicesChanged { version: 9, services: services.clone() }.encoded_len();
            assert!(count < 50_000 || whole > 4 * BATCH_BYTES_MAX, "the test is about long lists");
            let parts = in_parts(&services, PART_BYTES);
            for part in &parts {
                let changed = ServicesChanged { version: u64::MAX, services: part.to_vec() };
                assert!(changed.encoded_len() <= PART_BYTES + 64);
            }
            assert_eq!(parts.concat(), services);
            assert_eq!(parts.len() == 1, whole <= PART_BYTES, "{count} services");
        }
        // One that is larger than a part is a part of its own.
        let large = BlockService { failure_domain: "x".repeat(100), ..service(0) };
        assert_eq!(in_parts(&[service(1), large.clone(), service(2)], 90).len(), 3);
    }
}
