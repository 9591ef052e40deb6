//! Transcripts of every operation of the registry. [`clutch_state_transcript`] says how they are read and renewed.

use std::path::Path;

use clutch_proto::{
    registry::{
        Chain, ClusterRow, Genesis, GetChain, GetMap, InvitationRow, InviteNode, PlaceCdc, PlaceShard,
        RedeemInvitation, RegisterServices, RegistryEntry, RegistryRequest, Segment, SetServiceFlags,
        SwapChain, registry_entry::Body, registry_request::Op,
    },
    rules,
    types::{BlockService, ShardPlacement},
};
use clutch_registry::{Registry, RegistryFacts, tables};
use clutch_state::Table;
use clutch_state_transcript::{Shows, Transcript, compare, short, shown};

fn row(table: Table, value: &[u8]) -> (&'static str, String) {
    match table {
        tables::CLUSTER => ("cluster", shown::<ClusterRow>(value)),
        tables::SERVICE => ("service", shown::<BlockService>(value)),
        tables::SHARD => ("shard", shown::<ShardPlacement>(value)),
        tables::CHAIN => ("chain", shown::<Chain>(value)),
        tables::INVITATION => ("invitation", shown::<InvitationRow>(value)),
        other => panic!("{other:?} is in no transcript"),
    }
}

fn entry(transcript: &mut Transcript<Registry>, op: Op) {
    let body = Some(Body::Request(RegistryRequest { op: Some(op.clone()) }));
    transcript.entry(&short(&op), &RegistryEntry { tag: None, body });
}

fn read(transcript: &mut Transcript<Registry>, op: Op) {
    transcript.read(&short(&op), &RegistryRequest { op: Some(op.clone()) }, &RegistryFacts::default());
}

fn place(shard: u32, address: &str, epoch: u64) -> Op {
    let (slot_first, slot_last) = clutch_registry::slots(shard, 2);
    let address = address.into();
    let placement =
        Some(ShardPlacement { shard, slot_first, slot_last, address, epoch, ..ShardPlacement::default() });
    Op::PlaceShard(PlaceShard { placement })
}

fn swap(expect_incarnation: u64, incarnation: u64) -> Op {
    let append =
        Some(Segment { base_position: 7, engine: "local".into(), incarnation, ..Segment::default() });
    Op::SwapChain(SwapChain { role: 3, number: 1, expect_incarnation, append })
}

fn invitations(t: &mut Transcript<Registry>) {
    t.title("an invitation is taken once, by whoever comes first, until it is over; its node has a number of its own");
    t.stamp = 1_000_000_000;
    for (invitation, lifetime_ms) in [(7, 1000), (7, 1000), (8, 2000), (0, 1000), (9, 0), (9, u64::MAX)] {
        entry(t, Op::InviteNode(InviteNode { invitation, lifetime_ms }));
    }
    let take = |invitation, joiner, least_node| {
        Op::RedeemInvitation(RedeemInvitation { invitation, joiner, least_node })
    };
    for (invitation, joiner, least_node) in [(6, 1, 4), (7, 0, 4), (7, 1, 0), (7, 1, 4), (7, 1, 4), (7, 2, 4)]
    {
        entry(t, take(invitation, joiner, least_node));
    }
    // The others do not know of the one that was given a number and has not started yet.
    entry(t, take(8, 3, 4));
    t.stamp = 2_500_000_000;
    entry(t, take(7, 1, 4));
    entry(t, Op::InviteNode(InviteNode { invitation: 7, lifetime_ms: 1 }));
    t.stamp = 603_000_000_000;
    entry(t, Op::InviteNode(InviteNode { invitation: 10, lifetime_ms: 1 }));
    entry(t, take(10, 1, u64::MAX));
}

fn said() -> String {
    let shows = Shows { tables: 16..=u8::MAX, row, reply: |reply| short(reply) };
    let mut t = Transcript::new(shows);
    t.title("a cluster begins, once");
    read(&mut t, Op::GetMap(GetMap::default()));
    let genesis = Genesis { cluster: 1, shards: 2, rules: rules::VERSION, ..Genesis::default() };
    for genesis in [Genesis { shards: 3, ..genesis }, genesis, genesis] {
        t.entry(&short(&genesis), &RegistryEntry { tag: None, body: Some(Body::Genesis(genesis)) });
    }
    t.title("disks register; what an operator has set stays");
    let service = |service_id, blocks| BlockService {
        service_id,
        blocks,
        address: "a:1".into(),
        failure_domain: "rack".into(),
        ..BlockService::default()
    };
    entry(&mut t, Op::RegisterServices(RegisterServices { services: vec![service(1, 0), service(2, 0)] }));
    entry(&mut t, Op::SetServiceFlags(SetServiceFlags { service_id: 2, flags: 1 }));
    entry(&mut t, Op::SetServiceFlags(SetServiceFlags { service_id: 3, flags: 1 }));
    t.stamp = 9;
    entry(&mut t, Op::RegisterServices(RegisterServices { services: vec![service(2, 5), service(0, 0)] }));
    entry(&mut t, Op::RegisterServices(RegisterServices { services: vec![service(2, 5)] }));
    t.title("leaders say where they are; one of an older epoch does not replace a newer one");
    for (shard, address, epoch) in [(0, "a:1", 2), (0, "b:1", 3), (0, "a:1", 2), (2, "a:1", 1)] {
        entry(&mut t, place(shard, address, epoch));
    }
    for (address, epoch) in [("c:1", 5), ("d:1", 4)] {
        entry(&mut t, Op::PlaceCdc(PlaceCdc { address: address.into(), epoch, ..PlaceCdc::default() }));
    }
    read(&mut t, Op::GetMap(GetMap::default()));
    t.title("chains are exchanged by who knows their newest incarnation");
    for (expected, incarnation) in [(0, 1), (0, 2), (1, 2), (2, 2)] {
        entry(&mut t, swap(expected, incarnation));
    }
    read(&mut t, Op::GetChain(GetChain { role: 3, number: 1 }));
    read(&mut t, Op::GetChain(GetChain { role: 3, number: 2 }));
    invitations(&mut t);
    t.text
}

#[test]
fn every_operation_does_what_its_transcript_says() {
    let text = said();
    compare(&Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/all.txt"), &text);
    for operation in Op::NAMES {
        let is_said =
            [format!("> {operation}("), format!("? {operation}(")].iter().any(|words| text.contains(words));
        assert!(is_said, "no transcript has {operation}");
    }
}

/// Their bytes are in the transcript; a listing of either table comes in the order of its numbers.
#[test]
fn keys_of_services_and_shards_sort_as_their_numbers() {
    let numbers = [0, 1, 255, 256, 1 << 31];
    assert!(numbers.map(tables::shard_key).is_sorted() && tables::shard_key(0x0102) == [0, 0, 1, 2]);
    let numbers = [0, 1, 255, 256, u64::MAX];
    assert!(numbers.map(tables::service_key).is_sorted());
    assert_eq!(tables::service_key(0x0102), [0, 0, 0, 0, 0, 0, 1, 2]);
}

#[test]
fn keys_of_chains_have_their_bytes_and_sort_as_their_numbers() {
    assert_eq!(tables::chain_key(3, 0x0102), [0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 1, 2]);
    let numbers = [0, 1, 255, 256, u64::MAX];
    let keys: Vec<_> =
        [1, 2, 256].iter().flat_map(|role| numbers.map(|number| tables::chain_key(*role, number))).collect();
    assert!(keys.is_sorted());
}
