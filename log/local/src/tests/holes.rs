//! Segments, indexes and the mark that are missing, cut, older, or of somebody else: refused when the engine opens, with
//! the file and the position.

use std::path::Path;

use clutch_runtime::simulated::SimDisk;

use super::*;

const DIR: &str = "log";

fn path(name: &str) -> PathBuf {
    Path::new(DIR).join(name)
}

fn segment(number: u64) -> PathBuf {
    path(&format::segment_name(number))
}

fn index(number: u64) -> PathBuf {
    recovery::index_path(Path::new(DIR), number)
}

/// Files of a log's directory by name.
fn files(disk: &SimDisk) -> BTreeMap<PathBuf, Vec<u8>> {
    disk.files().into_iter().map(|(path, _)| (path.clone(), disk.read(&path).expect("reads"))).collect()
}

fn put(disk: &SimDisk, path: &Path, bytes: Option<&[u8]>) {
    if disk.exists(path) {
        disk.remove(path).expect("removes");
    }
    if let Some(bytes) = bytes {
        let file = disk.open(path, true).expect("opens");
        file.write_at(bytes, 0).expect("writes");
        file.sync().expect("syncs");
    }
    disk.sync_dir(Path::new(DIR)).expect("syncs");
}

/// A world with several closed segments, and copies of its files as they were when each segment was open.
fn several_segments(seed: u64) -> (World, Vec<BTreeMap<PathBuf, Vec<u8>>>) {
    let world = World::new(seed);
    let acknowledged = Arc::new(Mutex::new(Vec::new()));
    let mut copies = Vec::new();
    while world.disk(NODE).files().iter().filter(|(p, _)| p.extension().is_some_and(|e| e == "log")).count()
        < 4
    {
        append_until(&world, Duration::from_secs(60), 40, &acknowledged);
        world.crash(NODE);
        copies.push(files(&world.disk(NODE)));
    }
    (world, copies)
}

/// Opens the engine as a whole; what it says when it refuses.
fn open(world: &World) -> Result<(), LogFault> {
    recovery::recover(&*world.disk(NODE), Path::new(DIR), 0).map(drop)
}

/// Where each record of a segment ends.
fn boundaries(disk: &SimDisk, number: u64) -> Vec<u64> {
    let mut reader = SegmentReader::open(disk, Path::new(DIR), number).expect("opens");
    let mut ends = Vec::new();
    while reader.next_record().expect("reads").is_some() {
        ends.push(reader.offset());
    }
    ends
}

#[test]
fn a_closed_segment_that_was_cut_at_a_record_is_refused_with_its_name() {
    let (world, _) = several_segments(3);
    let disk = world.disk(NODE);
    let whole = files(&disk);
    for number in 1..=3 {
        let ends = boundaries(&disk, number);
        for end in &ends[..ends.len() - 1] {
            for with_index in [true, false] {
                put(&disk, &segment(number), Some(&whole[&segment(number)][..*end as usize]));
                if !with_index {
                    put(&disk, &index(number), None);
                }
                match open(&world) {
                    Err(LogFault::Corrupt { file, position, .. }) => {
                        assert_eq!(file, format::segment_name(number), "cut at {end}");
                        assert!(position.0 > 0, "the first position that is missing is named");
                    }
                    other => panic!("segment {number} cut at {end}, index {with_index}: {other:?}"),
                }
                put(&disk, &segment(number), Some(&whole[&segment(number)]));
                put(&disk, &index(number), Some(&whole[&index(number)]));
            }
        }
    }
    open(&world).expect("whole again");
}

#[test]
fn older_copies_are_refused_or_harmless() {
    let (world, copies) = several_segments(4);
    let disk = world.disk(NODE);
    let whole = files(&disk);
    let mut refused = 0;
    for older in &copies[..copies.len() - 1] {
        for (path, bytes) in older.iter().filter(|(path, bytes)| whole[*path] != **bytes) {
            put(&disk, path, Some(bytes));
            let is_mark = path.ends_with("synced");
            match open(&world) {
                Err(LogFault::Corrupt { file, .. }) => {
                    assert!(path.ends_with(&file), "{} was replaced, {file} is named", path.display());
                    refused += 1;
                }
                // A mark that says less than is true, of the segment that is still open, hides nothing.
                Err(LogFault::Storage(text)) if is_mark => {
                    assert!(text.contains("synced") && text.contains("older copy"), "{text}");
                    refused += 1;
                }
                Ok(()) if is_mark => {}
                other => panic!("an older {}: {other:?}", path.display()),
            }
            for (path, bytes) in &whole {
                put(&disk, path, Some(bytes));
            }
        }
    }
    assert!(refused > 3, "{refused} older copies were refused");
    open(&world).expect("whole again");
}

#[test]
fn missing_files_are_named() {
    let (world, _) = several_segments(5);
    let disk = world.disk(NODE);
    let whole = files(&disk);
    for (path, bytes) in &whole {
        put(&disk, path, None);
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        match open(&world) {
            Err(LogFault::Storage(text)) => {
                assert!(text.contains(&name) && text.contains("restore"), "{name}: {text}")
            }
            Ok(()) => assert!(name.ends_with(".idx"), "{name} is missing and nothing was said"),
            other => panic!("{name}: {other:?}"),
        }
        // A tool that only reads needs the mark as much: without it damage would look like a torn tail.
        let read_only = open_read_only(&*disk, Path::new(DIR)).map(drop);
        assert_eq!(read_only.is_ok(), name.ends_with(".idx"), "{name}: {read_only:?}");
        put(&disk, path, Some(bytes));
    }
}

#[test]
fn an_index_that_is_missing_cut_flipped_or_of_another_segment_is_rebuilt() {
    let (world, _) = several_segments(6);
    let disk = world.disk(NODE);
    let whole = files(&disk);
    let bytes = &whole[&index(2)];
    let mut flipped = bytes.clone();
    flipped[20] ^= 1;
    for wrong in [None, Some(&bytes[..10]), Some(&flipped[..]), Some(&whole[&index(1)][..]), Some(&[])] {
        put(&disk, &index(2), wrong);
        open(&world).expect("the segment itself is whole");
        assert_eq!(&disk.read(&index(2)).expect("reads"), bytes);
    }
}

#[test]
fn segments_in_each_others_place_or_of_another_cluster_are_refused() {
    let (world, _) = several_segments(7);
    let disk = world.disk(NODE);
    let whole = files(&disk);
    put(&disk, &segment(1), Some(&whole[&segment(2)]));
    put(&disk, &index(1), Some(&whole[&index(2)]));
    let text = open(&world).expect_err("another segment").to_string();
    assert!(
        text.contains("0000000000000001.log") && text.contains("holds segment 0000000000000002"),
        "{text}"
    );
    put(&disk, &segment(1), Some(&whole[&segment(1)]));
    put(&disk, &index(1), Some(&whole[&index(1)]));
    let text = recovery::recover(&*disk, Path::new(DIR), 7).map(drop).expect_err("refused").to_string();
    assert!(text.contains("belongs to cluster 0000000000000000, not to 0000000000000007"), "{text}");
}

#[test]
fn a_hole_that_opens_while_the_engine_runs_is_an_error_and_no_gap() {
    let (world, _) = several_segments(8);
    let disk = world.disk(NODE);
    let ends = boundaries(&disk, 1);
    let cut = disk.read(&segment(1)).expect("reads")[..ends[ends.len() / 2] as usize].to_vec();
    let runtime = world.node(NODE);
    let fault = world.run(NODE, Duration::from_secs(60), async move {
        let engine = LocalEngine::open(&runtime, DIR.into(), small()).expect("opens");
        let log = engine.log(LogId::CDC).await.expect("opens");
        put(&disk, &segment(1), Some(&cut));
        let mut events = log.events(Position(1));
        loop {
            match events.next().await {
                Ok(Event::Leader { .. }) => return None,
                Ok(_) => {}
                Err(fault) => return Some(fault),
            }
        }
    });
    match fault.expect("ends").expect("the hole is seen") {
        LogFault::Corrupt { position, what, .. } => {
            assert!(position.0 > 1 && what.contains("missing"), "{position}: {what}")
        }
        other => panic!("{other}"),
    }
}

#[test]
fn what_an_interrupted_trim_left_is_no_hole_and_what_was_taken_away_is() {
    let (world, _) = several_segments(9);
    let disk = world.disk(NODE);
    let before = files(&disk);
    let runtime = world.node(NODE);
    world.run(NODE, Duration::from_secs(60), async move {
        let engine = LocalEngine::open(&runtime, DIR.into(), small()).expect("opens");
        let (log, other) = (engine.log(LogId::CDC).await.expect("opens"), engine.log(LogId::shard(7)).await);
        let other = other.expect("opens");
        trim(&other, other.status().bounds.last).await.expect("trims");
        trim(&log, Position(log.status().bounds.last.0 - 20)).await.expect("trims");
    });
    world.crash(NODE);
    assert!(!disk.exists(&segment(1)), "something was trimmed");
    open(&world).expect("trimmed");
    // The file that a trim had said would go came back: it goes.
    put(&disk, &segment(1), Some(&before[&segment(1)]));
    open(&world).expect("trimmed");
    assert!(!disk.exists(&segment(1)));
    let first =
        disk.files().iter().filter_map(|(p, _)| format::segment_number(p.file_name()?.to_str()?)).min();
    put(&disk, &segment(first.expect("a segment")), None);
    assert!(matches!(open(&world), Err(LogFault::Storage(text)) if text.contains("is missing")));
}
