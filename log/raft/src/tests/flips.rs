//! Bytes change on the disk of a member that is down, and then it is the only one that has the newest records beside a leader that is gone:
//! it must not lead with less than was acknowledged. It refuses, or has everything all the same, and nothing is lost.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use clutch_log::{Event, Log as _, Outcome};
use clutch_log_store::SegmentReader;
use clutch_proto::mutants::{self, Mutant};
use clutch_runtime::simulated::Unmounted;

use super::*;

/// Who leads at first, who has everything beside it, and who was cut off when the last records came.
struct Cast {
    leader: NodeId,
    second: NodeId,
    behind: NodeId,
}

/// Disks of three nodes as they were when the power of all went, and what had been acknowledged.
struct Prepared {
    cast: Cast,
    disks: Vec<Unmounted>,
    acknowledged: Vec<Bytes>,
}

const LAST: usize = 3;

async fn prepare(nodes: &Nodes) -> Prepared {
    for node in nodes.numbers() {
        nodes.boot(node).await;
    }
    let leader = nodes.leader(None).await;
    let mut others = nodes.numbers().filter(|node| *node != leader);
    let (second, behind) = (others.next().expect("three"), others.next().expect("three"));
    let mut acknowledged = Vec::new();
    for number in 0..5 + LAST {
        if number == 5 {
            let last = nodes.log(leader).status().bounds.last;
            let has_all = |node| nodes.log(node).status().bounds.last >= last;
            nodes.until("everybody has all", || nodes.numbers().all(has_all)).await;
            nodes.cut_off(behind, true);
        }
        let (log, text) = (nodes.log(leader), Bytes::from(format!("acknowledged {number}")));
        let epoch = log.status().epoch;
        let outcome = log.propose(epoch, vec![text.clone()]).expect("taken").await;
        assert!(matches!(outcome, Outcome::Committed(_)), "{outcome:?}");
        acknowledged.push(text);
    }
    // At once: nothing that is written later than an acknowledgement helps.
    for node in nodes.numbers() {
        nodes.crash(node);
    }
    nodes.cut_off(behind, false);
    let disks = nodes.numbers().map(|node| nodes.world.disk(SimNode(node as u32)).copy()).collect();
    Prepared { cast: Cast { leader, second, behind }, disks, acknowledged }
}

/// Where the last records of the log are that the second has: file, first byte and the one behind the last.
fn last_records(nodes: &Nodes, second: NodeId) -> (PathBuf, u64, u64) {
    let disk = nodes.world.disk(SimNode(second as u32));
    let mut reader = SegmentReader::open(&*disk, Path::new("log"), 1).expect("opens");
    let mut begins = Vec::new();
    loop {
        let begin = reader.offset();
        let Some(record) = reader.next_record().expect("reads") else { break };
        begins.push((begin, record.group));
    }
    let end = reader.offset();
    let (begin, _) = begins[begins.len() - LAST];
    ("log/0000000000000001.log".into(), begin, end)
}

/// Everything that a log delivers from its beginning to where it stands, as far as it says so within a while.
async fn delivered(nodes: &Nodes, node: NodeId) -> Vec<Bytes> {
    let log = nodes.log(node);
    let (mut events, last, mut all) = (log.events(Position(1)), log.status().bounds.last, Vec::new());
    let runtime = nodes.driver();
    while let Some(Ok(event)) = runtime.timeout(Duration::from_secs(2), events.next()).await {
        let at = match event {
            Event::Committed(batch) => {
                all.extend(batch.entries);
                batch.position
            }
            Event::Gap { to } => to,
            _ => continue,
        };
        if at >= last {
            break;
        }
    }
    all
}

/// What came of one changed byte.
#[derive(Debug, Default, PartialEq, Eq)]
struct Outcomes {
    refused: u32,
    harmless: u32,
    /// Of the last records, though they were synced.
    passed_over: u32,
}

/// Changes one byte on the second's disk while all are down, and lets it go on with the one that is behind; then the first comes back.
async fn flipped(
    nodes: &Nodes,
    is: &Prepared,
    (path, at, mask): (&Path, u64, u8),
    outcomes: &mut Outcomes,
) -> Result<(), String> {
    for (node, disk) in nodes.numbers().zip(&is.disks) {
        nodes.crash(node);
        nodes.world.disk(SimNode(node as u32)).mount(disk.copy());
    }
    let Cast { leader, second, behind } = is.cast;
    assert!(nodes.world.disk(SimNode(second as u32)).corrupt(path, at, mask), "{} byte {at}", path.display());
    nodes.boot(behind).await;
    let lacks = |all: &[Bytes]| is.acknowledged.iter().any(|text| !all.contains(text));
    match nodes.try_boot(second).await {
        Err(_) => {
            outcomes.refused += 1;
            // It is one kind of outcome: what the others do then is looked at now and then.
            if !outcomes.refused.is_multiple_of(16) {
                return Ok(());
            }
        }
        Ok(()) => {
            outcomes.harmless += 1;
            let runtime = nodes.driver();
            let end = runtime.clock.monotonic() + Duration::from_secs(3);
            while nodes.settled(None).is_none() && runtime.clock.monotonic() < end {
                runtime.clock.sleep(Duration::from_millis(20)).await;
            }
            if let Some(node) = nodes.settled(None) {
                let all = delivered(nodes, node).await;
                if lacks(&all) {
                    return Err(format!("node {node} leads with {} of {}", all.len(), is.acknowledged.len()));
                }
            }
        }
    }
    nodes.boot(leader).await;
    let leads = nodes.leader(None).await;
    let all = delivered(nodes, leads).await;
    match lacks(&all) {
        true => Err(format!("node {leads} leads at last with {} of {}", all.len(), is.acknowledged.len())),
        false => Ok(()),
    }
}

/// Changes every byte of the last records in turn, and so many others of its files; what is wrong, and what came of it.
fn flips(seed: u64, step: usize, others: u64) -> (Vec<String>, Outcomes) {
    let world = Arc::new(World::new(seed));
    let nodes = Arc::new(Nodes::new(world.clone(), 3));
    let driven = nodes.clone();
    let ended = world.run(SimNode(0), Duration::from_secs(1_000_000), async move {
        let prepared = prepare(&driven).await;
        let second = prepared.cast.second;
        let (path, begin, end) = last_records(&driven, second);
        let random = driven.driver().random;
        let (mut places, mut wrong, mut outcomes) = (Vec::new(), Vec::new(), Outcomes::default());
        for at in (begin..end).step_by(step) {
            places.push((path.clone(), at));
        }
        let files: Vec<(PathBuf, u64)> = driven.world.disk(SimNode(second as u32)).files();
        let files: Vec<_> = files.into_iter().filter(|(_, length)| *length > 0).collect();
        let of_last = places.len();
        for _ in 0..others {
            let (path, length) = &files[random.below(files.len() as u64) as usize];
            // What is behind the last record is room, and says nothing.
            let length = if path.extension().is_some_and(|is| is == "log") { end } else { *length };
            places.push((path.clone(), random.below(length)));
        }
        for (number, (path, at)) in places.into_iter().enumerate() {
            let mask = 1 << random.below(8);
            if let Err(what) = flipped(&driven, &prepared, (&path, at, mask), &mut outcomes).await {
                wrong.push(format!("{} byte {at} ^ {mask:#04x}: {what}", path.display()));
            }
            if number < of_last && outcomes.harmless > 0 {
                outcomes.passed_over += 1;
            }
        }
        (wrong, outcomes)
    });
    ended.expect("it comes to an end")
}

#[test]
fn a_member_with_a_changed_byte_never_leads_with_less_than_was_acknowledged() {
    for seed in 1..=3 {
        let (wrong, outcomes) = flips(seed, 1, 340);
        assert_eq!(wrong, Vec::<String>::new(), "seed {seed}: {outcomes:?}");
        assert_eq!(outcomes.passed_over, 0, "each byte of the last records is looked at: {outcomes:?}");
        assert!(outcomes.refused > 300 && outcomes.harmless > 0, "{outcomes:?}");
    }
}

#[test]
fn planted_bugs_are_found() {
    mutants::plant(Some(Mutant::SyncedTailCut));
    let (is_planted, (wrong, _)) = (mutants::planted().is_some(), flips(1, 1, 0));
    mutants::plant(None);
    assert_eq!(is_planted, !wrong.is_empty());
}
