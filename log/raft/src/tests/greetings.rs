//! Who is let in, and whom a node believes: with every key that is not the cluster's, and with what was heard elsewhere.

use bytes::Bytes;
use clutch_runtime::{
    Answers, BoxFuture, Handled, Handler, PeerStream, Runtime,
    simulated::{NodeId as SimNode, World},
};
use parking_lot::Mutex;

use super::*;
use crate::{
    Identities,
    greeting::{self, Hello, Me},
    identities::Mark,
};

const CLUSTER: u64 = 7;
const KEY: [u8; 32] = [5; 32];
const AT: &str = "greeted";

fn identity(runtime: &Runtime, cluster: u64, node: NodeId, key: u8) -> Me {
    let identities = Identities::open(runtime, "identities".into(), node, || Ok(true)).expect("is there");
    Me { cluster, node, identities, keys: [key; 32].into(), address: format!("at{node}") }
}

/// Greets whoever comes, and writes down what came of it.
struct Greets(Runtime, Arc<Mutex<Vec<Result<NodeId, String>>>>);

impl Handler for Greets {
    fn handle(&self, _: Bytes, _: Answers) -> BoxFuture<Handled> {
        Box::pin(async { Handled::default() })
    }

    fn accept(&self, mut stream: PeerStream) {
        let (runtime, greeted) = (self.0.clone(), self.1.clone());
        self.0.spawn("greets", async move {
            let me = identity(&runtime, CLUSTER, 1, KEY[0]);
            let outcome = greeting::accept(&runtime, &me, &mut stream).await.map(|(from, _)| from);
            greeted.lock().push(outcome);
            // It stays open while the other looks.
            while stream.receiver.recv().await.is_some() {}
        });
    }
}

/// What an opener does with a new stream.
type Opener = Box<dyn FnOnce(Runtime, PeerStream) -> BoxFuture<Result<(), String>> + Send>;

/// What node 1 makes of an opener, and what the opener makes of node 1.
fn meet(opener: Opener) -> (Option<Result<NodeId, String>>, Result<(), String>) {
    let world = World::new(1);
    let (node, other) = (world.node(SimNode(1)), world.node(SimNode(2)));
    // Before anything else is drawn: node 1 is the same whoever comes, as it is outside of worlds.
    identity(&node, CLUSTER, 1, KEY[0]);
    let greeted: Arc<Mutex<Vec<Result<NodeId, String>>>> = Arc::default();
    let handler = Arc::new(Greets(node.clone(), greeted.clone()));
    let opened = world.run(SimNode(2), Duration::from_secs(60), async move {
        let _listening = node.network.listen(&AT.into(), handler).await.expect("a free name");
        let stream = other.network.open(&AT.into()).await.expect("it listens");
        let opened = opener(other.clone(), stream).await;
        other.clock.sleep(Duration::from_secs(10)).await;
        opened
    });
    let greeted = greeted.lock().pop();
    (greeted, opened.expect("ends"))
}

/// One that does as it should, as somebody.
fn honest(cluster: u64, to: NodeId, key: u8) -> Opener {
    Box::new(move |runtime, mut stream| {
        Box::pin(async move {
            greeting::open(&runtime, &identity(&runtime, cluster, 2, key), to, &mut stream).await.map(drop)
        })
    })
}

/// One that says these frames, whatever it hears; what it heard.
fn saying(frames: Vec<Bytes>, heard: Arc<Mutex<Vec<Bytes>>>) -> Opener {
    Box::new(move |runtime, mut stream| {
        Box::pin(async move {
            for frame in frames {
                // The other side may have had enough.
                let _ = stream.sender.send(frame).await;
                if let Some(Some(frame)) =
                    runtime.timeout(Duration::from_secs(1), stream.receiver.recv()).await
                {
                    heard.lock().push(frame);
                }
            }
            Ok(())
        })
    })
}

/// What a good opener says when it meets node 1, as somebody who listens hears it.
fn overheard() -> Vec<Bytes> {
    let said: Arc<Mutex<Vec<Bytes>>> = Arc::default();
    let on_the_way = said.clone();
    let opener: Opener = Box::new(move |runtime, PeerStream { sender, mut receiver }| {
        Box::pin(async move {
            let (own, mut taken) = tokio::sync::mpsc::channel::<Bytes>(4);
            let (given, from_other) = tokio::sync::mpsc::channel(4);
            let mut stream = PeerStream { sender: own, receiver: from_other };
            let me = identity(&runtime, CLUSTER, 2, KEY[0]);
            let relay = async {
                while let Some(frame) = taken.recv().await {
                    on_the_way.lock().push(frame.clone());
                    if sender.send(frame).await.is_err() {
                        return;
                    }
                    if on_the_way.lock().len() == 1
                        && let Some(answer) = receiver.recv().await
                    {
                        // It waits for it.
                        let _ = given.send(answer).await;
                    }
                }
            };
            let greets = async {
                let opened = greeting::open(&runtime, &me, 1, &mut stream).await;
                drop(stream);
                opened.map(drop)
            };
            tokio::join!(greets, relay).0
        })
    });
    assert_eq!(meet(opener), (Some(Ok(2)), Ok(())));
    let said = std::mem::take(&mut *said.lock());
    assert_eq!(said.len(), 2);
    said
}

/// Meets a node that says it is node 1 and answers so.
fn believes(answer: Bytes) -> bool {
    let world = World::new(1);
    let runtime = world.node(SimNode(2));
    let opened = world.run(SimNode(2), Duration::from_secs(60), async move {
        let (sender, mut asked) = tokio::sync::mpsc::channel(4);
        let (answers, receiver) = tokio::sync::mpsc::channel(4);
        answers.send(answer).await.expect("there is room");
        let mut stream = PeerStream { sender, receiver };
        let opened = greeting::open(&runtime, &identity(&runtime, CLUSTER, 2, KEY[0]), 1, &mut stream).await;
        asked.close();
        opened
    });
    opened.expect("ends").is_ok()
}

/// Who was let in, or believed, and should not have been; who was not, and should.
fn wrong() -> Vec<&'static str> {
    let mut wrong = Vec::new();
    let mut check = |what: &'static str, is_good: bool| wrong.extend((!is_good).then_some(what));
    check("a node of the cluster", meet(honest(CLUSTER, 1, KEY[0])) == (Some(Ok(2)), Ok(())));
    for (what, cluster, to, key) in [
        ("another key", CLUSTER, 1, 6),
        ("another cluster", CLUSTER + 1, 1, KEY[0]),
        ("somebody else's address", CLUSTER, 3, KEY[0]),
    ] {
        let (greeted, opened) = meet(honest(cluster, to, key));
        check(what, matches!(greeted, Some(Err(_))) && opened.is_err());
    }
    let hello = Hello {
        cluster: CLUSTER,
        from: 2,
        to: 1,
        identity: [4; 16],
        mark: Mark { count: 1, drawn: 4 },
        remembered: Mark::default(),
        nonce: [9; 32],
        address: "at2".into(),
    };
    let hello = hello.encode();
    let said = overheard();
    let heard: Arc<Mutex<Vec<Bytes>>> = Arc::default();
    for (what, frames) in [
        ("nothing but a hello", vec![hello.clone()]),
        ("a made-up proof", vec![hello.clone(), Bytes::from_static(&[0; 32])]),
        ("no proof", vec![hello.clone(), Bytes::new()]),
        ("no hello", vec![Bytes::from_static(b"PRI * HTTP/2.0")]),
        ("silence", vec![]),
        ("what was said on another stream", said.clone()),
        ("a proof of another stream", vec![hello.clone(), said[1].clone()]),
    ] {
        let (greeted, _) = meet(saying(frames, heard.clone()));
        check(what, matches!(greeted, Some(Err(_))));
    }
    // What the node has said itself is no proof.
    let heard: Arc<Mutex<Vec<Bytes>>> = Arc::default();
    meet(saying(vec![hello.clone()], heard.clone())).1.expect("it says what it is told");
    let own = heard.lock().pop().expect("it answers a hello");
    let (greeted, _) = meet(saying(vec![hello, own.slice(80..)], Arc::default()));
    check("its own answer", matches!(greeted, Some(Err(_))));
    check("an answer to somebody else", !believes(own));
    check("a made-up answer", !believes(Bytes::from_static(&[3; 112])));
    check("an answer that is cut off", !believes(Bytes::from_static(&[3; 111])));
    wrong
}

#[test]
fn only_who_has_the_key_is_let_in_and_believed() {
    assert_eq!(wrong(), Vec::<&str>::new());
}

#[test]
fn a_node_that_was_another_before_is_spoken_to_by_nobody() {
    let world = World::new(1);
    let [one, two, three, four] = [1, 2, 3, 4].map(|node| world.node(SimNode(node)));
    let greeted: Arc<Mutex<Vec<Result<NodeId, String>>>> = Arc::default();
    let handler = Arc::new(Greets(one.clone(), greeted.clone()));
    let again = Arc::new(Greets(four.clone(), Arc::default()));
    let opened = world.run(SimNode(2), Duration::from_secs(60), async move {
        let _first = one.network.listen(&AT.into(), handler).await.expect("a free name");
        let _second = four.network.listen(&"again".into(), again).await.expect("a free name");
        let open = async |runtime: &Runtime, at: &str| {
            let mut stream = runtime.network.open(&at.into()).await.expect("it listens");
            let me = identity(runtime, CLUSTER, 2, KEY[0]);
            let opened = greeting::open(runtime, &me, 1, &mut stream).await.map(drop);
            runtime.clock.sleep(Duration::from_secs(5)).await;
            opened
        };
        // Node 2, then another disk under its number; and another disk under the number of node 1.
        (open(&two, AT).await, open(&three, AT).await, open(&two, "again").await)
    });
    let (first, _, other) = opened.expect("ends");
    assert_eq!(first, Ok(()));
    assert!(other.is_err_and(|why| why.contains("forgotten its votes")));
    let greeted = std::mem::take(&mut *greeted.lock());
    assert!(matches!(&greeted[..], [Ok(2), Err(why)] if why.contains("forgotten its votes")), "{greeted:?}");
}

mod outlived {
    use clutch_proto::mutants::{self, Mutant};
    use clutch_runtime::{ClusterKeys, Endpoint};

    use super::{super::group::Accepts, *};
    use crate::Peers;

    const NEXT: [u8; 32] = [6; 32];

    /// How far two nodes hear each other go on: while both have one key, while they go to the next one by one, and when the second has
    /// forgotten the first one and the first has not heard of another.
    fn heard() -> [bool; 3] {
        let world = World::new(1);
        let both = [1, 2].map(|node| world.node(SimNode(node)));
        let done = world.run(SimNode(3), Duration::from_secs(600), async move {
            let mut nodes = Vec::new();
            for (node, runtime) in (1..).zip(&both) {
                let keys = ClusterKeys::from(KEY);
                let identities = group::identities(runtime, node);
                let addresses = Arc::new(|node| Some(Endpoint::from(format!("node{node}").as_str())));
                let peers = Peers::new(
                    runtime.clone(),
                    CLUSTER,
                    node,
                    keys.clone(),
                    identities.clone(),
                    "",
                    addresses,
                );
                let handler = Arc::new(Accepts(peers.clone()));
                let at = format!("node{node}").as_str().into();
                let listening = runtime.network.listen(&at, handler).await.expect("a free name");
                peers.greet(vec![1, 2]);
                nodes.push((keys, identities, listening));
            }
            let clock = &both[0].clock;
            let goes_on = async || {
                clock.sleep(Duration::from_secs(10)).await;
                let before = [nodes[0].1.remembered(2), nodes[1].1.remembered(1)];
                clock.sleep(Duration::from_secs(30)).await;
                nodes[0].1.remembered(2) != before[0] && nodes[1].1.remembered(1) != before[1]
            };
            let first = goes_on().await;
            nodes[0].0.set(vec![KEY, NEXT]);
            nodes[1].0.set(vec![NEXT, KEY]);
            let second = goes_on().await;
            nodes[1].0.set(vec![NEXT]);
            nodes[0].0.set(vec![KEY]);
            [first, second, goes_on().await]
        });
        done.expect("ends")
    }

    #[test]
    fn nodes_that_share_a_key_go_on_and_those_that_do_not_end_their_streams() {
        assert_eq!(heard(), [true, true, false]);
    }

    #[test]
    fn planted_bugs_are_found() {
        mutants::plant(Some(Mutant::StreamOutlivesKey));
        let (is_planted, heard) = (mutants::planted().is_some(), heard());
        mutants::plant(None);
        assert_eq!(heard, [true, true, is_planted]);
    }
}

macro_rules! planted {
    ($($module:ident: $mutant:ident,)*) => {
        $(mod $module {
            #[test]
            fn planted_bugs_are_found() {
                use clutch_proto::mutants::{self, Mutant};
                mutants::plant(Some(Mutant::$mutant));
                let is_planted = mutants::planted().is_some();
                let found = if is_planted { super::wrong() } else { Vec::new() };
                mutants::plant(None);
                assert_eq!(!found.is_empty(), is_planted);
            }
        })*
    };
}

planted! {
    proof: AnyProofTaken,
    answer: AnyAnswerTaken,
    challenge: ChallengeRepeated,
}

#[test]
fn greetings_have_their_golden_bytes() {
    let address = "a:1".to_owned();
    let (mark, remembered) = (Mark { count: 3, drawn: 4 }, Mark { count: 5, drawn: 6 });
    let (identity, nonce) = ([0xcd; 16], [0xab; 32]);
    let hello = Hello { cluster: 7, from: 1, to: 2, identity, mark, remembered, nonce, address };
    let bytes = hello.encode();
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let marks: String = [3, 4, 5, 6].map(|number: u8| format!("{number:02x}{}", "00".repeat(7))).concat();
    let start = "4352414654303034070000000000000001000000000000000200000000000000";
    assert_eq!(hex, format!("{start}{}{marks}{}613a31", "cd".repeat(16), "ab".repeat(32)));
    assert_eq!(Hello::decode(bytes.clone()).ok(), Some(hello));
    for length in 0..bytes.len() - 3 {
        assert!(Hello::decode(bytes.slice(..length)).is_err(), "{length} bytes");
    }
}
