//! Keys of every table: read back, they are what was put in, and they sort as their parts do.

use clutch_proto::{ContentId, InodeId, InodeKind, ServiceId, Slot, SpanId, name::hash63};
use clutch_shard::tables::*;

const NUMBERS: [u64; 7] = [0, 1, 255, 256, 1 << 32, u64::MAX - 1, u64::MAX];
const NAMES: [&[u8]; 6] = [b"a", b"b", b"a\0", b"ab", b"\xff\xfe", &[7; 255]];

fn inodes() -> Vec<InodeId> {
    let mut ids = Vec::new();
    for kind in [InodeKind::Directory, InodeKind::File, InodeKind::Symlink] {
        for sequence in [1, 2, 255, 256, 1 << 40] {
            ids.extend([0, 1, 255].map(|slot| InodeId::new(kind, sequence, Slot(slot)).expect("an id")));
        }
    }
    ids
}

/// Keys sort as `parts` do, and equal parts have equal keys.
fn sorts<P: Ord + std::fmt::Debug>(mut all: Vec<(P, Vec<u8>)>) {
    all.sort();
    for pair in all.windows(2) {
        let [(a, key_a), (b, key_b)] = pair else { continue };
        assert_eq!(a.cmp(b), key_a.cmp(key_b), "{a:?} and {b:?}");
    }
}

#[test]
fn keys_of_one_number() {
    let mut all = Vec::new();
    for id in inodes() {
        assert_eq!(parse_single(&inode_key(id)), Some(id.raw()));
        all.push(((id.slot().0, id.raw()), inode_key(id).to_vec()));
    }
    sorts(all);
    for make in [|n| content_key(ContentId(n)), |n| span_key(SpanId(n))] {
        let all = NUMBERS.map(|n| ((n as u8, n), make(n).to_vec()));
        all.iter().for_each(|((_, n), key)| assert_eq!(parse_single(key), Some(*n)));
        sorts(all.to_vec());
    }
    sorts(NUMBERS.map(|n| ((3, n), from_number(Slot(3), n).to_vec())).to_vec());
}

#[test]
fn keys_of_two_numbers() {
    let pairs = || NUMBERS.iter().flat_map(|a| NUMBERS.map(|b| (*a, b)));
    let mut all = Vec::new();
    for (a, b) in pairs() {
        let key = extent_key(ContentId(a), b);
        assert_eq!(parse_pair(&key), Some((a, b)));
        all.push(((a as u8, a, b), key.to_vec()));
    }
    sorts(all);
    // A deadline comes before its content, so that what expires first is first.
    let mut all = Vec::new();
    for (deadline, content) in pairs() {
        let key = transient_key(deadline, ContentId(content));
        assert_eq!(parse_pair(&key), Some((deadline, content)));
        all.push(((content as u8, deadline, content), key.to_vec()));
    }
    sorts(all);
    let mut all = Vec::new();
    for (service, block) in pairs() {
        let key = block_key(Slot(9), ServiceId(service), block);
        assert_eq!(parse_pair(&key), Some((service, block)));
        all.push(((service, block), key.to_vec()));
    }
    sorts(all);
    let mut all = Vec::new();
    for file in inodes() {
        for ended_at in NUMBERS {
            let key = past_content_key(file, ended_at);
            assert_eq!(parse_pair(&key), Some((file.raw(), ended_at)));
            all.push(((file.slot().0, file.raw(), ended_at), key.to_vec()));
        }
    }
    sorts(all);
}

#[test]
fn keys_of_names() {
    let (mut edges, mut past) = (Vec::new(), Vec::new());
    for dir in inodes().into_iter().filter(|id| id.is_directory()) {
        for name in NAMES {
            let hash = hash63(name);
            let key = edge_key(dir, name);
            assert_eq!(parse_edge_key(&key), Some((dir, hash, name)));
            assert!(key[..] >= edge_from(dir, hash)[..] && key[..] < edge_behind(dir, name)[..]);
            assert!(key.starts_with(&directory_prefix(dir)));
            edges.push(((dir.slot().0, dir.raw(), hash, name), key.to_vec()));
            for ended_at in NUMBERS {
                let key = past_edge_key(dir, name, ended_at);
                assert_eq!(parse_past_edge_key(&key), Some((dir, hash, name, ended_at)));
                assert!(key.starts_with(&past_edge_prefix(dir, name)));
                assert!(key.starts_with(&directory_prefix(dir)));
                past.push(((dir.slot().0, dir.raw(), hash, name.len(), name, ended_at), key.to_vec()));
            }
        }
    }
    sorts(edges);
    sorts(past);
}

#[test]
fn keys_have_their_bytes() {
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    let dir = InodeId::new(InodeKind::Directory, 0x0203, Slot(4)).expect("an id");
    let file = InodeId::new(InodeKind::File, 0x0506, Slot(7)).expect("an id");
    let now = [
        hex(&inode_key(dir)),
        hex(&edge_key(dir, b"name")),
        hex(&past_edge_key(dir, b"name", 0x0809)),
        hex(&content_key(ContentId(0x0a0b))),
        hex(&extent_key(ContentId(0x0a0b), 0x0c0d)),
        hex(&past_content_key(file, 0x0e0f)),
        hex(&from_number(Slot(8), 0x1011)),
        hex(&span_key(SpanId(0x1213))),
        hex(&transient_key(0x1415, ContentId(0x0a0b))),
        hex(&block_key(Slot(9), ServiceId(0x1617), 0x1819)),
    ];
    assert_eq!(now.join("\n"), include_str!("../../docs/formats/golden/shard-keys.hex").trim());
}

#[test]
fn what_is_no_key_is_none() {
    let dir = InodeId::ROOT;
    for whole in [edge_key(dir, b"name").to_vec(), past_edge_key(dir, b"name", 7).to_vec()] {
        for cut in 0..17 {
            assert_eq!(parse_edge_key(&whole[..cut]), None, "{cut} bytes");
        }
    }
    let past = past_edge_key(dir, b"name", 7);
    for cut in 0..past.len() {
        assert_eq!(parse_past_edge_key(&past[..cut]), None, "{cut} bytes");
    }
    assert_eq!(parse_past_edge_key(&[&past[..], b"x"].concat()), None);
    let (single, pair) = (inode_key(dir), extent_key(ContentId(1), 2));
    for cut in 0..single.len() {
        assert_eq!(parse_single(&single[..cut]), None, "{cut} bytes");
    }
    for cut in 0..pair.len() {
        assert_eq!(parse_pair(&pair[..cut]), None, "{cut} bytes");
    }
    assert_eq!((parse_single(&pair), parse_pair(&single)), (None, None));
}
