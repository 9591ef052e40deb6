//! Records of a log whose checksums match, whatever they hold: kind, number of entries, payload, packed or not. The first
//! five bytes are the kind and the number of entries, the rest is the payload.
#![no_main]

use std::path::Path;

use clutch_log_local::{RECORD_HEADER_BYTES, SegmentReader};
use clutch_runtime::{
    Disk as _,
    simulated::{NodeId, World},
};
use libfuzzer_sys::fuzz_target;

fn segment_header() -> Vec<u8> {
    let mut header = vec![0; 32];
    header[..8].copy_from_slice(b"CLUTLOG1");
    header[8..16].copy_from_slice(&1u64.to_le_bytes());
    let crc = crc32fast::hash(&header[..28]);
    header[28..].copy_from_slice(&crc.to_le_bytes());
    header
}

fn record(kind: u8, entries: &[u8; 4], payload: &[u8]) -> Vec<u8> {
    let mut header = vec![0; RECORD_HEADER_BYTES];
    header[..4].copy_from_slice(b"CREC");
    header[8..12].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    header[12..16].copy_from_slice(&crc32fast::hash(payload).to_le_bytes());
    header[24..32].copy_from_slice(&1u64.to_le_bytes());
    header[32..40].copy_from_slice(&1u64.to_le_bytes());
    header[40] = kind;
    header[44..48].copy_from_slice(entries);
    let crc = crc32fast::hash(&header[8..]);
    header[4..8].copy_from_slice(&crc.to_le_bytes());
    header.extend_from_slice(payload);
    header
}

fuzz_target!(|data: &[u8]| {
    let Some((kind, data)) = data.split_first() else { return };
    let Some((entries, payload)) = data.split_first_chunk::<4>() else { return };
    let world = World::new(1);
    let disk = world.disk(NodeId(1));
    let file = disk.open(Path::new("log/0000000000000001.log"), true).expect("opens");
    let bytes = [segment_header(), record(*kind, entries, payload)].concat();
    file.write_at(&bytes, 0).expect("writes");
    if let Ok(mut reader) = SegmentReader::open(&*disk, Path::new("log"), 1) {
        while let Ok(Some(read)) = reader.next_record() {
            assert_eq!(read.entries.len() as u64, u64::from(u32::from_le_bytes(*entries)));
        }
    }
});
