//! Space comes back: what is deleted, replaced, given up or left behind is gone after collection, from the rows and
//! from the disks, and nothing else is.

use std::time::Duration;

use bytes::Bytes;
use clutch_client::{Client, FileAttributes, Resolved};
use clutch_client_maintenance::{
    collector::{CollectOptions, Collected, collect},
    fsck,
};
use clutch_integration::{
    SimCluster,
    sim_cluster::{CLIENT, disk_node},
};
use clutch_proto::{
    ContentId, InodeId,
    limits::EXTENTS_PER_ENTRY_MAX,
    registry::{SetServiceFlags, registry_request},
    shard::{CollectContent, Remaining, shard_reply::Reply, shard_request::Op},
    types::{DirectoryPolicy, Extent, SnapshotPolicy, extent::Source},
};

const DISKS: u32 = 5;
/// Longer than a grant and twice the skew of clocks.
const GRANTS_END: Duration = Duration::from_secs(4);

fn attributes() -> FileAttributes {
    FileAttributes { mode: 0o644, ..FileAttributes::default() }
}

fn noise(length: usize, seed: u64) -> Vec<u8> {
    (0..length as u64)
        .map(|i| ((i + 1).wrapping_mul(seed | 1).wrapping_mul(0x9e37_79b9) >> 13) as u8)
        .collect()
}

/// Lets everything that ended go at once.
async fn keep_nothing(client: &Client) {
    let snapshot = Some(SnapshotPolicy { age_ms: Some(0), versions: None });
    let policy = DirectoryPolicy { snapshot, ..DirectoryPolicy::default() };
    client.set_policy(InodeId::ROOT, policy, &[]).await.expect("sets");
}

async fn put(client: &Client, dir: InodeId, name: &str, bytes: &[u8]) -> InodeId {
    let name = Bytes::copy_from_slice(name.as_bytes());
    client.write_file(dir, &name, attributes(), true, &mut &bytes[..]).await.expect("writes").id
}

async fn at(client: &Client, path: &str) -> Resolved {
    client.resolve(path).await.expect("resolves")
}

/// Collects until nothing is left that may go.
async fn collect_all(client: &Client) -> Collected {
    client.runtime().clock.sleep(GRANTS_END).await;
    let done = collect(client, CollectOptions::default()).await.expect("collects");
    assert_eq!(done.failures, Vec::<String>::new());
    assert_eq!(done.too_early, 0);
    done
}

async fn counts(client: &Client) -> (fsck::Counts, u64) {
    let checked = fsck::check(client, &mut |_, _| {}).await.expect("checks");
    assert!(checked.violations.is_empty(), "{:?}", checked.violations);
    (checked.counts, checked.rows)
}

/// Files of a disk but its label.
fn blocks_on_disks(cluster: &SimCluster) -> usize {
    (0..DISKS).map(|disk| cluster.blocks_on(disk).expect("looked through").len()).sum()
}

fn bytes_on_disks(cluster: &SimCluster) -> u64 {
    let files = (0..DISKS).flat_map(|disk| cluster.world.disk(disk_node(disk)).files());
    files.map(|(_, bytes)| bytes).sum()
}

/// Runs a client's part to its end.
fn run<T: Send + 'static>(cluster: &SimCluster, part: impl Future<Output = T> + Send + 'static) -> T {
    cluster.world.run(CLIENT, Duration::from_secs(36_000), part).expect("comes to an end")
}

#[test]
fn after_deleting_everything_nothing_is_left() {
    let cluster = SimCluster::start(11, 4, DISKS);
    let client = cluster.client();
    let c = client.clone();
    run(&cluster, async move {
        keep_nothing(&c).await;
        let name = |n: &str| Bytes::copy_from_slice(n.as_bytes());
        let mut dirs = vec![InodeId::ROOT];
        for n in 0..6u64 {
            let parent = dirs[n as usize / 2];
            let dir =
                c.make_directory(parent, &name(&format!("d{n}")), attributes()).await.expect("makes").id;
            put(&c, dir, "small", b"few bytes").await;
            put(&c, dir, "large", &noise(50_000, n)).await;
            c.symlink(dir, &name("link"), name("large"), attributes(), false).await.expect("links");
            dirs.push(dir);
        }
        // Written over in place, replaced, moved to where the file lives in another shard, given up, left behind.
        c.write_range(&at(&c, "/d0/large").await, 1000, false, &mut &noise(9000, 77)[..])
            .await
            .expect("writes");
        c.truncate(&at(&c, "/d1/large").await, 100).await.expect("cuts");
        put(&c, dirs[1], "large", &noise(20_000, 99)).await;
        c.rename(&at(&c, "/d0/small").await, dirs[2], &name("large")).await.expect("moves");
        let policy = c.write_policy(dirs[1]).await.expect("a policy");
        let mut left = c.start_draft(dirs[1]).await.expect("starts");
        c.append(&mut left, noise(30_000, 5), &policy).await.expect("appends");
        let mut given_up = c.start_draft(dirs[1]).await.expect("starts");
        c.append(&mut given_up, noise(30_000, 6), &policy).await.expect("appends");
        c.scrap(&given_up).await.expect("scraps");
        // Then everything goes.
        for dir in dirs[1..].iter().rev() {
            for entry in c.read_dir(*dir).await.expect("lists") {
                let id = InodeId::from_wire(entry.target).expect("an id");
                let at = Resolved { id, parent: *dir, name: entry.name, created_at: entry.created_at };
                if id.is_directory() {
                    c.remove_directory(&at).await.expect("removes");
                } else {
                    c.unlink(&at).await.expect("unlinks");
                }
            }
        }
        for entry in c.read_dir(InodeId::ROOT).await.expect("lists") {
            let id = InodeId::from_wire(entry.target).expect("an id");
            let at = Resolved { id, parent: InodeId::ROOT, name: entry.name, created_at: entry.created_at };
            c.remove_directory(&at).await.expect("removes");
        }
    });
    assert!(blocks_on_disks(&cluster) > 0);
    let (done, (counts, _)) =
        run(&cluster, async move { (collect_all(&client).await, counts(&client).await) });
    assert_eq!((done.directories, done.contents > 0, done.spans > 0), (6, true, true), "{done:?}");
    assert_eq!(counts, fsck::Counts { inodes: 1, ..fsck::Counts::default() }, "only the root is left");
    assert_eq!(blocks_on_disks(&cluster), 0);
}

#[test]
fn a_hundred_cycles_leave_rows_and_disks_as_they_were() {
    let cluster = SimCluster::start(12, 2, DISKS);
    let client = cluster.client();
    let c = client.clone();
    run(&cluster, async move { keep_nothing(&c).await });
    let (mut seen, mut bytes) = (Vec::new(), Vec::new());
    for cycle in 0..100u64 {
        let c = client.clone();
        let (_, rows) = run(&cluster, async move {
            let root = InodeId::ROOT;
            put(&c, root, "kept", &noise(40_000, 3)).await;
            put(&c, root, "a", &noise(30_000, cycle)).await;
            put(&c, root, "a", &noise(25_000, cycle + 1)).await;
            let a = at(&c, "/a").await;
            c.write_range(&a, 5000, false, &mut &noise(10_000, cycle + 2)[..]).await.expect("writes");
            put(&c, root, "b", &noise(12_000, cycle + 3)).await;
            c.rename(&a, root, &Bytes::from_static(b"b")).await.expect("renames over");
            c.unlink(&at(&c, "/b").await).await.expect("unlinks");
            collect_all(&c).await;
            counts(&c).await
        });
        seen.push((rows, blocks_on_disks(&cluster)));
        bytes.push(bytes_on_disks(&cluster));
    }
    assert!(seen[0].1 > 0, "the file that is kept has blocks");
    assert!(seen.iter().all(|s| *s == seen[0]), "rows and blocks after each cycle: {seen:?}");
    // Segments hold some that is dead, but not more and more.
    let most = |cycles: std::ops::Range<usize>| bytes[cycles].iter().max().copied().unwrap_or_default();
    assert!(most(50..100) <= most(0..50) * 11 / 10, "bytes after each cycle: {bytes:?}");
}

#[test]
fn a_long_history_goes_in_bounded_steps() {
    let cluster = SimCluster::start(13, 4, DISKS);
    let client = cluster.client();
    let (done, counts) = run(&cluster, async move {
        let c = &client;
        let root = InodeId::ROOT;
        let file = put(c, root, "f", b"first").await;
        // More past contents than go with their file in one entry, and a content of more extents than one entry takes.
        for n in 0..300u32 {
            let at = at(c, "/f").await;
            let text = format!("version {n}");
            c.write_range(&at, 0, true, &mut text.as_bytes()).await.expect("writes");
        }
        assert_eq!(c.content_history(file).await.expect("a history").len(), 300);
        let policy = c.write_policy(root).await.expect("a policy");
        let mut draft = c.start_draft(root).await.expect("starts");
        for n in 0..600u32 {
            c.append(&mut draft, vec![(n % 255) as u8 + 1; 3], &policy).await.expect("appends");
        }
        let many =
            c.link(draft, root, &Bytes::from_static(b"many"), attributes(), false).await.expect("links");
        let mut copy = c.start_draft(many.id).await.expect("starts");
        let content = c.stat(many.id).await.expect("stats").content;
        c.append_shared(&mut copy, content, 100, 1500).await.expect("shares in parts");
        c.publish(copy, many.id, content, root).await.expect("publishes");
        let (_, bytes) = c.read_range_of(many.id, 0, 0, 5000).await.expect("reads");
        let whole: Vec<u8> = (0..600u32).flat_map(|n| vec![(n % 255) as u8 + 1; 3]).collect();
        assert_eq!(bytes, whole[100..1600]);
        keep_nothing(c).await;
        // From a directory of another shard the file is forgotten through the CDC, in parts, too.
        let mut n = 0;
        let (dir, path) = loop {
            n += 1;
            let name = Bytes::from(format!("d{n}"));
            let dir = c.make_directory(root, &name, attributes()).await.expect("makes").id;
            if dir.slot().0 >= 64 {
                break (dir, format!("/d{n}/f"));
            }
        };
        c.rename(&at(c, "/f").await, dir, &Bytes::from_static(b"f")).await.expect("moves");
        c.unlink(&at(c, &path).await).await.expect("unlinks");
        for n in 1..=n {
            c.remove_directory(&at(c, &format!("/d{n}")).await).await.expect("removes");
        }
        c.unlink(&at(c, "/many").await).await.expect("unlinks");
        (collect_all(c).await, counts(c).await.0)
    });
    assert_eq!((done.files, done.contents), (2, 303), "{done:?}");
    assert_eq!(counts, fsck::Counts { inodes: 1, ..fsck::Counts::default() });
}

#[test]
fn blocks_of_a_service_that_is_gone_are_forgotten() {
    let cluster = SimCluster::start(15, 2, DISKS);
    let client = cluster.client();
    let c = client.clone();
    let services = cluster.service_ids();
    let gone = services[0];
    run(&cluster, async move {
        keep_nothing(&c).await;
        for n in 0..8u64 {
            put(&c, InodeId::ROOT, &format!("f{n}"), &noise(20_000, n)).await;
        }
        let (held, _) = c.visit_blocks(gone, Bytes::new()).await.expect("visits");
        assert!(!held.is_empty(), "the disk has blocks");
        let op = SetServiceFlags { service_id: gone, flags: clutch_shard::FLAG_GONE };
        c.registry(registry_request::Op::SetServiceFlags(op)).await.expect("sets");
    });
    cluster.world.crash(disk_node(0));
    let (done, counts) = run(&cluster, async move {
        for n in 0..8u64 {
            client.unlink(&at(&client, &format!("/f{n}")).await).await.expect("unlinks");
        }
        // Nodes look at the registry every few seconds.
        (collect_all(&client).await, counts(&client).await.0)
    });
    assert_eq!(done.files, 8);
    assert_eq!(counts, fsck::Counts { inodes: 1, ..fsck::Counts::default() });
    let left = (1..DISKS).map(|disk| cluster.blocks_on(disk).expect("looked through").len());
    assert_eq!(left.sum::<usize>(), 0, "the other disks are empty");
}

#[test]
fn policies_keep_what_they_say() {
    let cluster = SimCluster::start(14, 2, DISKS);
    let client = cluster.client();
    run(&cluster, async move {
        let c = &client;
        let name = |n: &str| Bytes::copy_from_slice(n.as_bytes());
        let above = c.make_directory(InodeId::ROOT, &name("above"), attributes()).await.expect("makes").id;
        let below = c.make_directory(above, &name("below"), attributes()).await.expect("makes").id;
        let snapshot = |age_ms, versions| DirectoryPolicy {
            snapshot: Some(SnapshotPolicy { age_ms, versions }),
            ..DirectoryPolicy::default()
        };
        // Two versions of each name, for as long as one likes.
        c.set_policy(above, snapshot(None, Some(2)), &[]).await.expect("sets");
        for n in 0..6u64 {
            put(c, below, "f", &noise(5000, n)).await;
        }
        let ends = |past: Vec<clutch_proto::shard::PastEdge>| past.len();
        assert_eq!(ends(c.history(below, None).await.expect("a history")), 5);
        assert_eq!(collect_all(c).await.files, 3);
        assert_eq!(ends(c.history(below, None).await.expect("a history")), 2);
        // What is said below counts more; an hour has not passed.
        c.set_policy(below, snapshot(Some(3_600_000), None), &[]).await.expect("sets");
        c.unlink(&at(c, "/above/below/f").await).await.expect("unlinks");
        assert_eq!(collect_all(c).await.files, 0);
        // A pass that read a laxer policy before is stopped by what the directory says now.
        let kept = c.history(below, None).await.expect("a history");
        let stale = SnapshotPolicy { age_ms: Some(0), versions: None };
        let refused = c.forget_edge(below, &kept[0], stale).await.expect_err("is kept");
        assert!(
            matches!(&refused, clutch_client::ClientError::Refused(r) if r.code == clutch_proto::types::Code::TooEarly),
            "{refused}"
        );
        c.runtime().clock.sleep(Duration::from_secs(3600)).await;
        assert_eq!(collect_all(c).await.files, 3);
        assert_eq!(ends(c.history(below, None).await.expect("a history")), 0);
        // A removed directory stays as long, and can be brought back until then.
        let at_below = at(c, "/above/below").await;
        c.remove_directory(&at_below).await.expect("removes");
        assert_eq!(collect_all(c).await.directories, 0);
        c.undelete_directory(below, above, &name("again")).await.expect("comes back");
        put(c, below, "g", b"lives").await;
        assert_eq!(at(c, "/above/again").await.id, below);
    });
}

#[test]
fn a_collection_that_was_broken_off_is_no_damage() {
    let cluster = SimCluster::start(15, 1, DISKS);
    let client = cluster.client();
    let c = client.clone();
    let content = run(&cluster, async move {
        let mut left = c.start_draft(InodeId::ROOT).await.expect("starts");
        for _ in 0..EXTENTS_PER_ENTRY_MAX + 50 {
            c.append_hole(&mut left, 10).await.expect("appends");
        }
        counts(&c).await;
        // Nobody says that it was given up: it expires.
        c.runtime().clock.sleep(Duration::from_secs(10)).await;
        let op = Op::CollectContent(CollectContent { content: left.content() });
        let reply = c.shard(op).await.expect("collects");
        assert!(matches!(reply, Reply::Remaining(Remaining { gone: false, bytes: 500 })), "{reply:?}");
        ContentId(left.content())
    });
    cluster.fsck();
    run(&cluster, async move {
        assert_eq!(client.collect_content(content).await.expect("collects the rest"), 1);
        counts(&client).await;
    });
}

#[test]
fn sharing_in_parts_leaves_no_pieces() {
    let cluster = SimCluster::start(16, 1, DISKS);
    let client = cluster.client();
    run(&cluster, async move {
        let c = &client;
        let policy = c.write_policy(InodeId::ROOT).await.expect("a policy");
        let mut draft = c.start_draft(InodeId::ROOT).await.expect("starts");
        let mut bytes = Vec::new();
        for n in 0..20u64 {
            let chunk = noise(if n % 5 == 0 { 100 } else { 3000 }, n);
            bytes.extend_from_slice(&chunk);
            c.append(&mut draft, chunk, &policy).await.expect("appends");
            c.append_hole(&mut draft, 1000).await.expect("appends");
            bytes.resize(bytes.len() + 1000, 0);
        }
        let first = draft.content();
        let name = Bytes::from_static(b"f");
        c.link(draft, InodeId::ROOT, &name, attributes(), false).await.expect("links");
        let file = at(c, "/f").await;
        let extents = async |content| {
            let layout = c.layout(file.id, content, 0).await.expect("a layout");
            assert_eq!(layout.next_offset, 0);
            layout.extents
        };
        let before = extents(first).await;
        assert_eq!(before.len(), 40);
        // Cut where no extent ends, again and again.
        let mut content = first;
        for part in [77u64, 501, 1, 1999, 40_000].map(|part| part.max(3)) {
            let mut draft = c.start_draft(file.id).await.expect("starts");
            while draft.size() < bytes.len() as u64 {
                let length = part.min(bytes.len() as u64 - draft.size());
                let from = draft.size();
                c.append_shared(&mut draft, content, from, length).await.expect("shares");
            }
            let next = draft.content();
            c.publish(draft, file.id, content, InodeId::ROOT).await.expect("publishes");
            content = next;
            let after = extents(content).await;
            let inline = |e: &Extent| matches!(e.source, Some(Source::Inline(_)));
            let whole = |all: &[Extent]| all.iter().filter(|e| !inline(e)).cloned().collect::<Vec<_>>();
            assert_eq!(whole(&after), whole(&before), "in parts of {part} bytes");
            assert_eq!(c.read_range(file.id, 0, 1 << 20).await.expect("reads"), bytes);
        }
        counts(c).await;
    });
}
