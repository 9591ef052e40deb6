//! A log's directory: a segment, a mark and an index of any content. Opening it gives the records or an error.
#![no_main]

use std::path::Path;

use clutch_log::LogId;
use clutch_log_local::{LocalEngine, Options, SegmentReader, open_read_only};
use clutch_runtime::{
    Disk as _,
    simulated::{NodeId, World},
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((lengths, data)) = data.split_first_chunk::<3>() else { return };
    let mark_length = usize::from(lengths[0]).min(data.len());
    let (mark, data) = data.split_at(mark_length);
    let second = usize::from(u16::from_le_bytes([lengths[1], lengths[2]])).min(data.len());
    let (second, first) = data.split_at(second);
    let world = World::new(1);
    let disk = world.disk(NodeId(1));
    for (name, bytes) in [("synced", mark), ("0000000000000001.log", first), ("0000000000000002.log", second)] {
        if !bytes.is_empty() {
            let file = disk.open(&Path::new("log").join(name), true).expect("opens");
            file.write_at(bytes, 0).expect("writes");
        }
    }
    let _ = open_read_only(&*disk, Path::new("log"));
    if let Ok(mut reader) = SegmentReader::open(&*disk, Path::new("log"), 1) {
        while let Ok(Some(_)) = reader.next_record() {}
    }
    let runtime = world.node(NodeId(1));
    if let Ok(engine) = LocalEngine::open(&runtime, "log".into(), Options::default()) {
        world.run(NodeId(1), std::time::Duration::from_secs(10), async move {
            if let Ok(log) = engine.log(LogId::CDC).await {
                let mut events = log.events(log.status().bounds.first);
                for _ in 0..50 {
                    match runtime.timeout(std::time::Duration::from_secs(1), events.next()).await {
                        Some(Ok(_)) => {}
                        _ => return,
                    }
                }
            }
        });
    }
});
