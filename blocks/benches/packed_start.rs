//! How long a disk with many small blocks takes to start, and how much memory that is: `cargo bench --package clutch-blocks --bench
//! packed_start -- [BLOCKS [DIR]]`, 10,000,000 of 64 bytes when nothing is said, in a directory beside the temporary ones.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use clutch_blocks::{
    BlockStore, PackOptions,
    packed::Upkeep,
    store::{Change, Expected},
};
use clutch_proto::{BlockId, ServiceId, Time};
use clutch_runtime::{Disk, production::OsDisk};

const BLOCK_BYTES: usize = 64;
/// Blocks of one write and one sync.
const AT_A_TIME: u64 = 4096;
/// Blocks that are read after the start.
const READS: u64 = 1000;

fn data(block: u64) -> Vec<u8> {
    let words =
        (0..BLOCK_BYTES as u64 / 8).flat_map(|word| (block.wrapping_mul(word + 3) | 1 << 63).to_le_bytes());
    words.collect()
}

fn expected(block: u64) -> Expected {
    let data = data(block);
    Expected { block: BlockId(block), size: data.len() as u32, crc: crc32fast::hash(&data), time: 1 }
}

/// Bytes of memory that this process has and that no file backs, and those with files.
fn resident() -> (u64, u64) {
    let status = fs::read_to_string("/proc/self/status").expect("Linux says");
    let of = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).expect("is there");
        line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).expect("a number") * 1024
    };
    (of("RssAnon:"), of("VmRSS:"))
}

fn fill(store: &BlockStore, blocks: u64) {
    let begun = Instant::now();
    let tail = store.tail();
    for first in (1..=blocks).step_by(AT_A_TIME as usize) {
        let all: Vec<(Expected, Vec<u8>)> = (first..(first + AT_A_TIME).min(blocks + 1))
            .map(|block| (expected(block), data(block)))
            .collect();
        let changes: Vec<Change<'_>> = all
            .iter()
            .map(|(expected, data)| Change::Write { expected: *expected, data, is_granted: &|| true })
            .collect();
        let done = store.change(&mut tail.blocking_lock(), &changes);
        assert!(done.iter().all(Result::is_ok), "written");
        while store.is_due() {
            if store.look_after().expect("looked after") == Upkeep::Nothing {
                break;
            }
        }
    }
    println!("{blocks} blocks of {BLOCK_BYTES} bytes written in {:.1} s", begun.elapsed().as_secs_f64());
}

fn size(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).expect("lists").map(|entry| entry.expect("an entry"));
    entries
        .map(|e| if e.path().is_dir() { size(&e.path()) } else { e.metadata().map_or(0, |m| m.len()) })
        .sum()
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let blocks = arguments.first().map_or(10_000_000, |n| n.parse().expect("BLOCKS is a number"));
    let dir =
        arguments.get(1).map_or_else(|| std::env::temp_dir().join("clutch-packed-start"), PathBuf::from);
    let disk: Arc<dyn Disk> = Arc::new(OsDisk);
    let (cluster, service) = (1, ServiceId(1));
    let open = || {
        BlockStore::open(disk.clone(), dir.clone(), cluster, service, PackOptions::default()).expect("opens")
    };
    if !dir.exists() {
        BlockStore::create(disk.clone(), dir.clone(), cluster, service, Time(1)).expect("labelled");
        fill(&open(), blocks);
        // What is measured is another process: this one has had all of it in memory.
        let own = std::env::current_exe().expect("has a name");
        let status = std::process::Command::new(own).arg(blocks.to_string()).arg(&dir).status();
        fs::remove_dir_all(&dir).expect("removed");
        assert!(status.expect("runs").success());
        return;
    }
    println!("{:.1} MiB on the disk", size(&dir) as f64 / f64::from(1 << 20));
    let before = resident().0;
    let begun = Instant::now();
    let store = open();
    store.read(&expected(1), 0, BLOCK_BYTES as u32).expect("the first block");
    println!("start and first read: {:.3} s", begun.elapsed().as_secs_f64());
    let begun = Instant::now();
    for n in 0..READS {
        let block = 1 + n * (blocks / READS).max(1) % blocks;
        assert_eq!(store.read(&expected(block), 0, BLOCK_BYTES as u32).expect("reads"), data(block));
    }
    println!(
        "then {:.1} µs for each read, one after the other",
        begun.elapsed().as_micros() as f64 / READS as f64
    );
    let (anonymous, all) = resident();
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    println!(
        "{:.1} MiB more memory than before, {:.1} MiB resident in all",
        mib(anonymous - before),
        mib(all)
    );
}
