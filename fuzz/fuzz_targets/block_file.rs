//! A block file: whatever is on the disk, reading it gives the bytes that were granted, or an error.
#![no_main]

use std::{path::PathBuf, sync::Arc};

use clutch_blocks::{BlockStore, format::Header, store::Expected};
use clutch_proto::{BlockId, ServiceId};
use clutch_runtime::{Disk as _, simulated::SimDisk};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let disk = Arc::new(SimDisk::new(1));
    let path = PathBuf::from("disk/00/0000000000000003");
    let file = disk.open(&path, true).expect("opens");
    file.write_at(data, 0).expect("writes");
    let header = Header::decode(data);
    let (cluster, service) = header.as_ref().map_or((1, ServiceId(2)), |h| (h.cluster, h.service));
    let (size, crc) = header.as_ref().map_or((4096, 0), |h| (h.size, h.crc));
    let store = BlockStore::create(disk, "disk".into(), cluster, service, clutch_proto::Time(1)).expect("opens");
    let expected = Expected { block: BlockId(3), size, crc, time: 0 };
    if store.verify(&expected).is_ok() {
        let bytes = store.read(&expected, 0, expected.size).expect("what was verified can be read");
        assert_eq!((bytes.len(), crc32fast_of(&bytes)), (size as usize, crc));
    }
    let _ = store.read(&expected, 100, 5000);
    let _ = store.read(&expected, u32::MAX, u32::MAX);
    let _ = store.write(&expected, data, &|| true);
    let _ = store.list();
});

fn crc32fast_of(bytes: &[u8]) -> u32 {
    clutch_proto::crc::of(bytes)
}
