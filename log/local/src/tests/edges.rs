//! The edges: what an engine says of its logs, how much may wait, records of the largest size, and what a start writes of what
//! it found.

use std::path::Path;

use super::*;

const DIR: &str = "log";

pub(super) fn in_world<T: Send + 'static>(
    world: &World,
    part: impl Future<Output = T> + Send + 'static,
) -> T {
    world.run(NODE, Duration::from_secs(60), part).expect("ends")
}

/// Does not become smaller when it is packed.
pub(super) fn batch(number: u32) -> Vec<Bytes> {
    let noise: Vec<u8> = (0..225).flat_map(|n| scattered(number * 1000 + n).to_le_bytes()).collect();
    vec![noise.into(), Bytes::from_static(b"second")]
}

pub(super) async fn append(log: &Arc<dyn Log>, epoch: Epoch, numbers: std::ops::Range<u32>) {
    for number in numbers {
        let outcome = log.propose(epoch, batch(number)).expect("leads").await;
        assert!(matches!(outcome, Outcome::Committed(_)), "{outcome:?}");
    }
}

/// Bytes of all segments as the disk has them.
fn on_disk(world: &World) -> u64 {
    let is_segment = |path: &PathBuf| path.extension().is_some_and(|e| e == "log");
    world.disk(NODE).files().into_iter().filter(|(path, _)| is_segment(path)).map(|(_, bytes)| bytes).sum()
}

#[test]
fn what_an_engine_says_of_its_logs_is_so_also_when_it_has_been_trimmed() {
    let world = World::new(31);
    let runtime = world.node(NODE);
    let options = Options { segment_bytes_max: 6 << 10, ..small() };
    let look = move |engine: &LocalEngine, first: u64, last: u64| {
        let bounds = Bounds { first: Position(first), last: Position(last) };
        assert_eq!(engine.bounds(LogId::CDC), Some(bounds));
        for position in 1..=last + 1 {
            let found = engine.batch(LogId::CDC, Position(position)).expect("reads");
            // Positions 1 and 32 are the beginnings of reigns.
            let number = position.saturating_sub(if position < 32 { 2 } else { 3 }) as u32;
            let is_batch = position >= first && ![1, 32, last + 1].contains(&position);
            let expected = is_batch.then(|| batch(number));
            assert_eq!(found.map(|batch| batch.entries), expected, "position {position}");
        }
        assert_eq!(engine.batch(LogId::shard(3), Position(1)).expect("reads"), None);
        assert_eq!(engine.bounds(LogId::shard(3)), None);
    };
    let options_of_first = options.clone();
    in_world(&world, async move {
        let engine = LocalEngine::open(&runtime, DIR.into(), options_of_first).expect("opens");
        let log = engine.log(LogId::CDC).await.expect("opens");
        append(&log, Epoch(1), 0..30).await;
        assert_eq!((log.status().bounds.first, log.status().bounds.last), (Position(1), Position(31)));
        let refused = log.transfer_leader(1).await;
        assert!(matches!(refused, Err(LogFault::Unsupported(_))), "{refused:?}");
    });
    let runtime = world.node(NODE);
    let counted = in_world(&world, async move {
        let engine = LocalEngine::open(&runtime, DIR.into(), options).expect("opens");
        let found = engine.bounds(LogId::CDC).expect("is there");
        assert_eq!((found.first, found.last), (Position(1), Position(31)), "before it is opened");
        let log = engine.log(LogId::CDC).await.expect("opens");
        append(&log, Epoch(2), 30..40).await;
        look(&engine, 1, 42);
        let before = engine.usage().bytes;
        trim(&log, Position(20)).await.expect("trims");
        let first = log.status().bounds.first;
        assert!(first > Position(10) && first <= Position(21), "{first}");
        look(&engine, first.0, 42);
        assert!(
            engine.usage().bytes + 10_000 < before,
            "{} of {before} bytes are left",
            engine.usage().bytes
        );
        engine.usage().bytes
    });
    assert_eq!(counted, on_disk(&world));
}

#[test]
fn only_so_many_bytes_wait_and_only_those_of_the_present_reign() {
    let size: usize = batch(7).iter().map(Bytes::len).sum();
    for (queued_bytes_max, is_taken) in [(size, true), (size - 1, false)] {
        let world = World::new(32);
        let runtime = world.node(NODE);
        in_world(&world, async move {
            let options = Options { queued_bytes_max, ..small() };
            let engine = LocalEngine::open(&runtime, DIR.into(), options).expect("opens");
            let older = engine.log(LogId::CDC).await.expect("opens");
            let log = engine.log(LogId::CDC).await.expect("opens");
            for (handle, epoch) in
                [(&older, Epoch(1)), (&older, Epoch(2)), (&log, Epoch(1)), (&log, Epoch(3))]
            {
                let refused = handle.propose(epoch, batch(7)).map(drop);
                assert_eq!(refused, Err(Rejected::NotLeader { epoch, hint: Some(1) }));
            }
            // Nothing of what is refused counts.
            for _ in 0..3 {
                match log.propose(Epoch(2), batch(7)) {
                    Ok(commit) if is_taken => drop(commit.await),
                    Err(Rejected::Overloaded) if !is_taken => {}
                    other => panic!("with room for {queued_bytes_max} bytes: {:?}", other.map(drop)),
                }
            }
            if is_taken {
                // While one waits there is no room for another.
                let waiting = log.propose(Epoch(2), batch(7)).expect("has room");
                assert_eq!(log.propose(Epoch(2), batch(7)).map(drop), Err(Rejected::Overloaded));
                assert!(matches!(waiting.await, Outcome::Committed(_)));
            }
        });
    }
}

#[test]
fn a_barrier_does_not_wait_for_an_engine_that_has_stopped() {
    let world = World::new(33);
    let (runtime, disk) = (world.node(NODE), world.disk(NODE));
    in_world(&world, async move {
        let engine = LocalEngine::open(&runtime, DIR.into(), small()).expect("opens");
        let log = engine.log(LogId::CDC).await.expect("opens");
        append(&log, Epoch(1), 0..2).await;
        let patience = Duration::from_secs(30);
        assert_eq!(log.read_barrier(patience).await.expect("leads"), Position(3));
        disk.fail_writes_after(0);
        let lost = log.propose(Epoch(1), batch(9)).expect("leads");
        assert_eq!(lost.await, Outcome::Unknown);
        // Long after whoever waited was told: nothing changes any more.
        runtime.clock.sleep(Duration::from_secs(1)).await;
        let before = runtime.clock.monotonic();
        let refused = log.read_barrier(patience).await;
        assert_eq!(runtime.clock.monotonic(), before, "it waits for nothing");
        assert!(matches!(refused, Err(LogFault::Storage(_))), "{refused:?}");
    });
}

#[test]
fn a_seal_is_told_once_behind_all_that_it_closes() {
    let world = World::new(34);
    let runtime = world.node(NODE);
    in_world(&world, async move {
        let engine = LocalEngine::open(&runtime, DIR.into(), small()).expect("opens");
        let log = engine.log(LogId::CDC).await.expect("opens");
        append(&log, Epoch(1), 0..3).await;
        let mut early = log.events(Position(1));
        let tail = log.seal().await.expect("seals");
        assert_eq!(log.seal().await.expect("says it again"), tail);
        assert_eq!(log.propose(Epoch(1), batch(9)).map(drop), Err(Rejected::Sealed));
        for events in [&mut early, &mut log.events(Position(1))] {
            let mut batches = 0;
            let sealed = loop {
                match events.next().await.expect("reads") {
                    Event::Committed(_) => batches += 1,
                    Event::Sealed { tail } => break tail,
                    _ => {}
                }
            };
            assert_eq!((batches, sealed), (3, tail));
            tokio::select! {
                event = events.next() => panic!("after the seal: {event:?}"),
                () = runtime.clock.sleep(Duration::from_secs(1)) => {}
            }
        }
    });
}

#[test]
fn entries_end_within_their_record_and_fill_it() {
    let read = |payload: &[u8], entries: u32| {
        let mut record = header(payload.len() as u32, RecordKind::Batch as u32);
        record[12..16].copy_from_slice(&crc32fast::hash(payload).to_le_bytes());
        record[44..48].copy_from_slice(&entries.to_le_bytes());
        let crc = crc32fast::hash(&record[8..format::RECORD_HEADER_BYTES]);
        record[4..8].copy_from_slice(&crc.to_le_bytes());
        record.extend_from_slice(payload);
        decode(&record).map(|record| record.entries.len())
    };
    assert_eq!(read(b"\x02\0\0\0ab\0\0\0\0", 2), Ok(2));
    for (payload, entries, what) in [
        (&b"\x03\0\0\0ab"[..], 1, "longer than its record"),
        (b"\xff\xff\xff\xffab", 1, "longer than its record"),
        (b"\x02\0\0\0ab\0\0\0", 2, "cut short"),
        (b"\x02\0\0\0ab", 2, "cut short"),
        (b"\x01\0\0\0ab", 1, "left over"),
        (b"x", 0, "left over"),
    ] {
        let error = read(payload, entries).expect_err("is refused");
        assert!(error.contains(what), "{payload:?}: {error}");
    }
}

/// The header of a record that says it is so long.
fn header(payload_len: u32, kind: u32) -> Vec<u8> {
    let mut record = Vec::new();
    format::encode_record(&mut record, RecordKind::Batch, LogId::CDC, Position(8), Epoch(3), &[]);
    record[8..12].copy_from_slice(&payload_len.to_le_bytes());
    record[40..44].copy_from_slice(&kind.to_le_bytes());
    let crc = crc32fast::hash(&record[8..format::RECORD_HEADER_BYTES]);
    record[4..8].copy_from_slice(&crc.to_le_bytes());
    record
}

#[test]
fn payloads_up_to_the_limit_are_read_and_none_beyond() {
    let batch = RecordKind::Batch as u32;
    assert!(format::decode_header(&header(format::PAYLOAD_BYTES_MAX, batch)).is_ok());
    for (len, kind, what) in [
        (format::PAYLOAD_BYTES_MAX + 1, batch, "over the limit"),
        (u32::MAX, batch, "over the limit"),
        (4, 77, "unknown record kind"),
    ] {
        let error = format::decode_header(&header(len, kind)).map(drop).expect_err("is refused");
        assert!(error.contains(what), "{error}");
    }
    // The same of what a packed batch says of itself.
    let packed = |len: u32| {
        let payload = [&len.to_le_bytes()[..], &lz4_flex::block::compress(b"x")].concat();
        let mut record = header(payload.len() as u32, format::PACKED_BATCH);
        record[12..16].copy_from_slice(&crc32fast::hash(&payload).to_le_bytes());
        let crc = crc32fast::hash(&record[8..format::RECORD_HEADER_BYTES]);
        record[4..8].copy_from_slice(&crc.to_le_bytes());
        record.extend_from_slice(&payload);
        decode(&record).expect_err("is refused")
    };
    assert!(packed(format::PAYLOAD_BYTES_MAX + 1).contains("over the limit"));
    assert!(!packed(format::PAYLOAD_BYTES_MAX).contains("over the limit"));
}

#[test]
fn a_batch_is_packed_from_its_smallest_size_on_when_an_eighth_is_saved() {
    let encoded = |entry: Vec<u8>| {
        let mut record = Vec::new();
        format::encode_record(
            &mut record,
            RecordKind::Batch,
            LogId::CDC,
            Position(8),
            Epoch(3),
            &[entry.clone().into()],
        );
        let read = decode(&record).expect("reads back");
        assert_eq!(read.entries[0], entry);
        format::u32_at(&record, 40) == format::PACKED_BATCH
    };
    // An entry has its length in front.
    for (payload, is_packed) in [
        (format::PACKED_BYTES_MIN - 1, false),
        (format::PACKED_BYTES_MIN, true),
        (format::PACKED_BYTES_MIN + 1, true),
    ] {
        assert_eq!(encoded(vec![7; payload - 4]), is_packed, "{payload} bytes");
    }
    // Noise, and more and more that is alike behind it.
    let mut changes = Vec::new();
    for alike in 0..1200 {
        let mut entry: Vec<u8> = (0..1000u32).flat_map(|n| scattered(n).to_le_bytes()).collect();
        entry.resize(4000 + alike, 1);
        let plain = entry.len() + 4;
        let block = lz4_flex::block::compress(&[&(entry.len() as u32).to_le_bytes()[..], &entry].concat());
        let is_packed = encoded(entry);
        assert_eq!(is_packed, block.len() + 4 <= plain - plain / 8, "{alike} bytes alike");
        changes.push(is_packed);
    }
    assert!(!changes[0] && changes[1199], "both happen");
}

#[test]
fn an_index_with_another_beginning_or_half_a_line_is_none() {
    let span =
        format::Span { first: Position(1), last: Position(9), restart: None, offsets: (0..9).collect() };
    let spans = BTreeMap::from([(LogId::CDC.into(), span)]);
    let bytes = format::encode_index(&format::Index { number: 3, bytes: 77, spans });
    assert!(format::decode_index(&bytes).is_some());
    // A head of 32 bytes and a line of 48; then the offsets.
    let (body, offsets) = (&bytes[..80], &bytes[84..]);
    assert_eq!((bytes.len(), offsets.len()), (84 + 9 * 4, 9 * 4));
    let with_crc = |mut body: Vec<u8>| {
        body.extend_from_slice(&crc32fast::hash(&body).to_le_bytes());
        body
    };
    assert_eq!([&with_crc(body.to_vec()), offsets].concat(), bytes);
    let mut other = body.to_vec();
    other[0] ^= 1;
    assert!(format::decode_index(&with_crc(other)).is_none(), "another kind of file");
    let mut more = body.to_vec();
    more[24] = 2;
    assert!(format::decode_index(&with_crc(more)).is_none(), "fewer lines than it says");
    assert!(format::decode_index(&with_crc(body[..79].to_vec())).is_none(), "half a line");
    assert!(format::decode_index(&with_crc(body[..20].to_vec())).is_none(), "half a head");
    assert!(format::decode_index(&[]).is_none());
}

/// A world in which a segment was begun and the mark does not know it yet, if dying after `steps` disk operations leaves that.
fn unmarked(steps: u64) -> Option<World> {
    let world = World::new(35);
    let (runtime, disk) = (world.node(NODE), world.disk(NODE));
    in_world(&world, async move {
        let options = Options { segment_bytes_max: 4 << 10, ..small() };
        let engine = LocalEngine::open(&runtime, DIR.into(), options).expect("opens");
        let log = engine.log(LogId::CDC).await.expect("opens");
        append(&log, Epoch(1), 0..2).await;
        disk.cut_power_after(steps);
        for number in 2..20 {
            let Ok(commit) = log.propose(Epoch(1), batch(number)) else { return };
            commit.await;
        }
    });
    world.kill(NODE);
    world.disk(NODE).heal();
    let mark = recovery::read_mark(&*world.disk(NODE), Path::new(DIR)).expect("reads")?;
    world.disk(NODE).exists(&Path::new(DIR).join(format::segment_name(mark.segment + 1))).then_some(world)
}

#[test]
fn a_start_marks_the_segment_that_its_predecessor_began_and_nothing_more() {
    let mut met = 0;
    for steps in 0..80 {
        let Some(world) = unmarked(steps) else { continue };
        met += 1;
        let (disk, dir) = (world.disk(NODE), Path::new(DIR));
        let before = recovery::read_mark(&*disk, dir).expect("reads").expect("a mark");
        let path = dir.join(format::segment_name(before.segment + 1));
        // Garbage behind it, as a torn write leaves it.
        let file = disk.open(&path, false).expect("opens");
        let length = file.len().expect("has one");
        file.write_at(&[9; 100], length).expect("writes");
        let recovered = recovery::recover(&*disk, dir, 0).expect("recovers");
        let mark = recovery::read_mark(&*disk, dir).expect("reads").expect("a mark");
        assert_eq!(mark, recovered.mark());
        match recovered.current() {
            Some((segment, end)) if segment > before.segment => {
                assert_eq!((mark.sequence, mark.first), (before.sequence + 1, before.first));
                assert_eq!((mark.segment, mark.offset), (segment, end));
                assert_eq!(disk.read(&path).expect("reads").len() as u64, end, "what was torn is cut off");
            }
            // It held nothing whole, and goes.
            current => {
                assert_eq!(mark, before, "{current:?}");
                assert!(!disk.exists(&path));
            }
        }
        // What was written again is durable.
        world.crash(NODE);
        let again = recovery::recover(&*disk, dir, 0).expect("recovers again");
        assert_eq!((again.mark(), again.current()), (recovered.mark(), recovered.current()));
    }
    assert!(met > 3, "{met} times a segment was begun and not marked");
}

#[test]
fn a_first_start_that_lost_its_power_begins_anew_and_a_lost_mark_does_not() {
    let world = World::new(36);
    let acknowledged = Arc::new(Mutex::new(Vec::new()));
    append_until(&world, Duration::from_secs(60), 100, &acknowledged);
    world.kill(NODE);
    let (disk, dir) = (world.disk(NODE), Path::new(DIR));
    let (mark, first) = (dir.join(recovery::MARK_FILE), dir.join(format::segment_name(1)));
    let whole = disk.read(&first).expect("reads");
    assert!(whole.len() > 4096);
    // The record that begins a segment ends at 80; a mark comes before the second one.
    for (length, is_taken) in [(whole.len(), false), (4097, false), (4096, false), (100, true), (20, true)] {
        disk.remove(&mark).ok();
        let file = disk.open(&first, true).expect("opens");
        file.set_len(0).expect("cuts");
        file.write_at(&whole[..length], 0).expect("writes");
        let found = recovery::recover(&*disk, dir, 0);
        assert_eq!(found.is_ok(), is_taken, "{length} bytes: {:?}", found.err());
        if is_taken {
            assert_eq!(found.expect("recovered").mark().first, 1);
        } else {
            assert!(found.err().expect("refused").to_string().contains("mark"), "{length}");
        }
    }
    // A segment that cannot be the first.
    disk.remove(&first).ok();
    let file = disk.open(&dir.join(format::segment_name(2)), true).expect("opens");
    file.write_at(&format::segment_header(2, 0), 0).expect("writes");
    assert!(recovery::recover(&*disk, dir, 0).is_err());
}
