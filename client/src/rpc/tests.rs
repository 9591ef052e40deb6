//! A client whose reads any member may answer, beside a member that cannot, and one that is quicker than its cluster.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use clutch_proto::{
    admin::Status,
    mutants::{self, Mutant},
    registry::{Map, RegistryReply},
    types::ShardPlacement,
};
use clutch_runtime::{
    Answers, BoxFuture, Handled, Handler,
    simulated::{NodeId, World},
};

use super::*;

/// A member of a registry, which reads from it if it `can`.
struct Member {
    can: bool,
}

impl Handler for Member {
    fn handle(&self, _: Bytes, _: Answers) -> BoxFuture<Handled> {
        let response = match self.can {
            true => {
                let map = Map { cluster: 7, services_version: 1, ..Map::default() };
                let reply = RegistryReply { map: Some(map), ..RegistryReply::default() };
                Response { body: reply.encode_to_vec().into(), position: 3, ..Response::default() }
            }
            false => {
                let refusal = Refusal::new(Code::NotLeader, "no quorum answers");
                Response { error: Some(refusal.to_wire()), ..Response::default() }
            }
        };
        Box::pin(async move { Handled { answer: response.encode_to_vec().into(), ..Handled::default() } })
    }
}

/// How many of twenty clients, each of which begins with some member, are told where everything is.
fn told() -> usize {
    let world = World::new(1);
    let driver = world.node(NodeId(9));
    let ended = world.run(NodeId(9), Duration::from_secs(3600), async move {
        let mut listening = Vec::new();
        for name in ["a", "b", "c"] {
            let member = Arc::new(Member { can: name != "a" });
            listening.push(driver.network.listen(&name.into(), member).await.expect("a free name"));
        }
        let mut told = 0;
        for _ in 0..20 {
            let members = ["a", "b", "c"].into_iter().map(Endpoint::from).collect();
            let registries = Registries::new(members).expect("three");
            let options = ClientOptions {
                reads: Reads::Member,
                patience: Duration::from_secs(10),
                ..ClientOptions::default()
            };
            told += usize::from(Client::new(driver.clone(), registries, options).refresh_map().await.is_ok());
        }
        told
    });
    ended.expect("ends")
}

#[test]
fn a_read_that_one_member_cannot_answer_is_asked_of_another() {
    assert_eq!(told(), 20);
}

#[test]
fn planted_bugs_are_found() {
    mutants::plant(Some(Mutant::ReaderKept));
    let (is_planted, is_found) = (mutants::planted().is_some(), told() < 20);
    mutants::plant(None);
    assert_eq!(is_planted, is_found);
}

mod young {
    use super::*;

    /// A node of a young cluster: its registry is told of shard 0, which it has, when it has been asked for the map once.
    #[derive(Default)]
    struct Young {
        asked: AtomicU32,
    }

    impl Handler for Young {
        fn handle(&self, request: Bytes, _: Answers) -> BoxFuture<Handled> {
            let request = Request::decode(request).expect("a request");
            let response = match request.role == Role::Registry as i32 {
                true => {
                    let is_told = self.asked.fetch_add(1, Ordering::Relaxed) > 0;
                    let shard =
                        ShardPlacement { slot_last: 255, address: "a".into(), ..ShardPlacement::default() };
                    let shards = Vec::from_iter(is_told.then_some(shard));
                    let map = Map { cluster: 7, services_version: 1, shards, ..Map::default() };
                    let reply = RegistryReply { map: Some(map), ..RegistryReply::default() };
                    Response { body: reply.encode_to_vec().into(), position: 3, ..Response::default() }
                }
                false => Response::default(),
            };
            Box::pin(async move { Handled { answer: response.encode_to_vec().into(), ..Handled::default() } })
        }
    }

    /// Whether a client that has read the map too early finds a shard later.
    fn is_found_later() -> bool {
        let world = World::new(1);
        let driver = world.node(NodeId(9));
        let ended = world.run(NodeId(9), Duration::from_secs(3600), async move {
            let young = Arc::new(Young::default());
            let _listening = driver.network.listen(&"a".into(), young).await.expect("a free name");
            let client = Client::new(driver.clone(), "a", ClientOptions::default());
            client.map().await.expect("a map");
            let request = AdminRequest { op: Some(admin_request::Op::Status(Status::default())) };
            client.admin(Role::Shard, 0, request).await.is_ok()
        });
        ended.expect("ends")
    }

    #[test]
    fn a_map_that_lacks_what_is_asked_for_is_read_anew() {
        assert!(is_found_later());
    }

    #[test]
    fn planted_bugs_are_found() {
        mutants::plant(Some(Mutant::YoungMapKept));
        let (is_planted, is_found) = (mutants::planted().is_some(), !is_found_later());
        mutants::plant(None);
        assert_eq!(is_planted, is_found);
    }
}

mod former {
    use clutch_proto::shard::{EdgeReply, Lookup, shard_request};

    use super::*;

    /// One of four nodes, of which the last one keeps the shard in the place of the others.
    struct Moved {
        is_member: bool,
        asked: AtomicU32,
    }

    impl Handler for Moved {
        fn handle(&self, request: Bytes, _: Answers) -> BoxFuture<Handled> {
            let request = Request::decode(request).expect("a request");
            let names = |all: &[&str]| all.iter().map(|name| (*name).to_owned()).collect();
            let response = match (request.role == Role::Registry as i32, self.is_member) {
                (true, _) => {
                    let is_moved = self.asked.fetch_add(1, Ordering::Relaxed) > 0;
                    let (address, members) = match is_moved {
                        true => ("d", names(&["d"])),
                        false => ("a", names(&["a", "b", "c"])),
                    };
                    let (slot_last, address) = (255, address.into());
                    let shard = ShardPlacement { slot_last, address, members, ..ShardPlacement::default() };
                    let map = Map { cluster: 7, services_version: 1, shards: vec![shard], ..Map::default() };
                    let reply = RegistryReply { map: Some(map), ..RegistryReply::default() };
                    Response { body: reply.encode_to_vec().into(), position: 3, ..Response::default() }
                }
                (false, true) => {
                    let reply = Reply::Edge(EdgeReply::default());
                    let reply = ShardReply { reply: Some(reply) };
                    Response { body: reply.encode_to_vec().into(), position: 3, ..Response::default() }
                }
                (false, false) => {
                    let refusal = Refusal::new(Code::NotLeader, "who leads is another");
                    Response { error: Some(refusal.to_wire()), leader: "d".into(), ..Response::default() }
                }
            };
            Box::pin(async move { Handled { answer: response.encode_to_vec().into(), ..Handled::default() } })
        }
    }

    /// Whether a client that has read the map, and whose reads any member may answer, finds a log all of whose members went.
    fn is_followed() -> bool {
        let world = World::new(1);
        let driver = world.node(NodeId(9));
        let ended = world.run(NodeId(9), Duration::from_secs(3600), async move {
            let mut listening = Vec::new();
            for name in ["a", "b", "c", "d", "registry"] {
                let node = Arc::new(Moved { is_member: name == "d", asked: AtomicU32::new(0) });
                listening.push(driver.network.listen(&name.into(), node).await.expect("a free name"));
            }
            let options = ClientOptions {
                reads: Reads::Member,
                patience: Duration::from_secs(20),
                ..ClientOptions::default()
            };
            let client = Client::new(driver.clone(), "registry", options);
            client.map().await.expect("a map");
            client.shard(shard_request::Op::Lookup(Lookup::default())).await.is_ok()
        });
        ended.expect("ends")
    }

    #[test]
    fn who_was_a_member_and_names_another_is_not_asked_for_ever() {
        assert!(is_followed());
    }

    #[test]
    fn planted_bugs_are_found() {
        mutants::plant(Some(Mutant::FormerMembersKept));
        let (is_planted, is_found) = (mutants::planted().is_some(), !is_followed());
        mutants::plant(None);
        assert_eq!(is_planted, is_found);
    }
}
