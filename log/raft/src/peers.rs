//! Streams between the nodes that keep logs: one for each ordered pair of them, for all groups.
//!
//! Who asks opens the stream and says who and where it is; answers come back on it, in any order. A stream that breaks leaves everything
//! on it unknown, and the next question opens another. A node is looked for where it has said that it is, and where the settings say.
//!
//! Invariant: who does not have the cluster's key, a node of another cluster, one that looks for somebody else, and another incarnation
//! of a log are refused before a byte of consensus is looked at.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use clutch_log::{LogletId, NodeId};
use clutch_log_store::group_key;
use clutch_proto::mutants::{self, Mutant};
use clutch_runtime::{BoxFuture, ClusterKeys, Endpoint, PeerStream, Runtime};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

use crate::{
    codec::{Form, Frame, Kind, Reader},
    greeting::{self, Me},
    identities::{Identities, Mark},
};

/// A group as the streams see it.
pub(crate) trait Group: Send + Sync {
    /// Answers one request of another node.
    fn answer(self: Arc<Self>, kind: Kind, body: Bytes, from: NodeId) -> BoxFuture<Result<Bytes, String>>;
    /// Answers appends in the order in which they come, until no more do.
    fn append_all(
        self: Arc<Self>,
        frames: mpsc::UnboundedReceiver<Frame>,
        answers: mpsc::Sender<Bytes>,
    ) -> BoxFuture<()>;
}

/// Where a node is, as the settings say.
pub type Addresses = Arc<dyn Fn(NodeId) -> Option<Endpoint> + Send + Sync>;

/// Why there is no answer.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum NoAnswer {
    /// The stream broke, or could not be opened.
    #[error("node {0} cannot be reached: {1}")]
    Unreachable(NodeId, String),
    /// Nothing came in time.
    #[error("node {0} did not answer within {1:?}")]
    Late(NodeId, Duration),
    /// The other node would not.
    #[error("node {0} refuses: {1}")]
    Refused(NodeId, String),
}

type Answer = oneshot::Sender<Result<Bytes, String>>;

/// A question on its way.
struct Asked {
    number: u64,
    frame: Bytes,
    answer: Answer,
}

/// The streams of one node.
pub struct Peers {
    runtime: Runtime,
    me: Me,
    addresses: Addresses,
    links: Mutex<BTreeMap<NodeId, mpsc::UnboundedSender<Asked>>>,
    /// How often each node was not found: where it may be is tried in turn.
    missed: Mutex<BTreeMap<NodeId, usize>>,
    groups: Mutex<BTreeMap<u64, Arc<dyn Group>>>,
    next: AtomicU64,
    said: Said,
}

/// What was said of streams that do not come about: they are tried many times in a second.
#[derive(Default)]
struct Said(Mutex<BTreeMap<String, Duration>>);

/// A node that nobody has asked anything is greeted after so long.
const GREET_AGAIN: Duration = Duration::from_secs(2);
/// Every so many greetings a node goes on to its next mark, so an older copy of it is known for one by what it did since.
const TURNS_OF_MARK: u32 = 2;
/// How long the answer to a mark may take.
const MARK_PATIENCE: Duration = Duration::from_secs(2);
/// A node that cannot be reached is tried again after so long.
const OPEN_AGAIN: Duration = Duration::from_millis(50);
/// The same is said again after so long.
const SAY_AGAIN: Duration = Duration::from_secs(60);
/// So many things are remembered.
const SAID_MAX: usize = 64;

impl Said {
    /// Whether it was not said of late.
    fn is_news(&self, what: &str, now: Duration) -> bool {
        let mut said = self.0.lock();
        said.retain(|_, at| now.saturating_sub(*at) < SAY_AGAIN);
        if said.contains_key(what) || said.len() >= SAID_MAX {
            return false;
        }
        said.insert(what.to_owned(), now);
        true
    }
}

impl Peers {
    /// The streams of a node that keeps logs of this cluster, whose nodes know each other by this key. It says of itself that it is
    /// at `address`, unless that is empty.
    pub fn new(
        runtime: Runtime,
        cluster: u64,
        node: NodeId,
        keys: impl Into<ClusterKeys>,
        identities: Identities,
        address: &str,
        addresses: Addresses,
    ) -> Arc<Peers> {
        Arc::new(Peers {
            runtime,
            me: Me { cluster, node, identities, keys: keys.into(), address: address.to_owned() },
            addresses,
            links: Mutex::default(),
            missed: Mutex::default(),
            groups: Mutex::default(),
            next: AtomicU64::new(1),
            said: Said::default(),
        })
    }

    /// The node that asks.
    pub(crate) fn node(&self) -> NodeId {
        self.me.node
    }

    /// Answers what others ask of a group from now on.
    pub(crate) fn serve(&self, id: LogletId, group: Arc<dyn Group>) {
        self.groups.lock().insert(group_key(id), group);
    }

    /// Asks a node now, so that what is asked later comes later; the answer comes in its time.
    pub(crate) fn ask(
        self: &Arc<Self>,
        to: NodeId,
        id: LogletId,
        kind: Kind,
        body: Bytes,
        patience: Duration,
    ) -> impl Future<Output = Result<Bytes, NoAnswer>> + Send + use<> {
        self.ask_of(to, group_key(id), kind, body, patience)
    }

    /// The same of a group by its key.
    fn ask_of(
        self: &Arc<Self>,
        to: NodeId,
        group: u64,
        kind: Kind,
        body: Bytes,
        patience: Duration,
    ) -> impl Future<Output = Result<Bytes, NoAnswer>> + Send + use<> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let frame = Frame { kind, form: Form::Request, group, number, body }.encode();
        let (answer, answered) = oneshot::channel();
        self.send(to, Asked { number, frame, answer });
        let runtime = self.runtime.clone();
        async move {
            match runtime.timeout(patience, answered).await {
                None => Err(NoAnswer::Late(to, patience)),
                Some(Err(_)) => Err(NoAnswer::Unreachable(to, "the stream broke".into())),
                Some(Ok(Err(why))) => Err(NoAnswer::Refused(to, why)),
                Some(Ok(Ok(body))) => Ok(body),
            }
        }
    }

    /// Greets these nodes, and all that were ever met, and again when a stream to one breaks: so they know where this one is, and
    /// this one whether they are there.
    pub fn greet(self: &Arc<Self>, nodes: Vec<NodeId>) {
        let (this, clock) = (self.clone(), self.runtime.clock.clone());
        self.runtime.spawn("raft greets", async move {
            for turn in 0.. {
                let met = this.me.identities.met().into_keys();
                let others: BTreeSet<NodeId> = met.chain(nodes.iter().copied()).collect();
                for node in others.into_iter().filter(|node| *node != this.me.node) {
                    let mut links = this.links.lock();
                    if links.get(&node).is_none_or(mpsc::UnboundedSender::is_closed) {
                        this.open(node, &mut links);
                    }
                }
                if turn % TURNS_OF_MARK == 0 {
                    this.tell_mark().await;
                }
                clock.sleep(GREET_AGAIN).await;
            }
        });
    }

    /// Goes on to the next mark where that may be, and tells all nodes that can be spoken to.
    async fn tell_mark(self: &Arc<Self>) {
        let own = self.me.identities.next_mark(&self.runtime).await;
        let linked: Vec<NodeId> = {
            let links = self.links.lock();
            links.iter().filter(|(_, link)| !link.is_closed()).map(|(node, _)| *node).collect()
        };
        for node in linked {
            let remembered = self.me.identities.remembered(node);
            let body = Bytes::from([own, remembered].map(Mark::encode).concat());
            let asked = self.ask_of(node, 0, Kind::Mark, body, MARK_PATIENCE);
            let identities = self.me.identities.clone();
            self.runtime.spawn("raft mark", async move {
                let Ok(body) = asked.await else { return };
                if let Ok(remembered) = Mark::read(&mut Reader(body)) {
                    // Who is condemned by it is told by the next greeting, and stops.
                    let _ = identities.is_remembered(node, remembered);
                }
            });
        }
    }

    /// What another node says of its mark, and remembers of this one's; what this one remembers of it.
    fn hear_mark(&self, from: NodeId, body: Bytes) -> Result<(Bytes, Result<(), String>), String> {
        let mut body = Reader(body);
        let marks = Mark::read(&mut body).and_then(|its| Ok((its, Mark::read(&mut body)?)));
        let (its, remembered) = marks.map_err(|error| error.to_string())?;
        self.me.identities.is_remembered(from, remembered)?;
        // Where it is behind, it is told so.
        let heard = self.me.identities.hear(from, its);
        let known = Bytes::copy_from_slice(&self.me.identities.remembered(from).encode());
        Ok((known, heard))
    }

    fn send(self: &Arc<Self>, to: NodeId, asked: Asked) {
        // Who must not go on asks nothing more: dropping it says so.
        if self.me.identities.condemned().is_some() {
            return;
        }
        let mut links = self.links.lock();
        let asked = match links.get(&to) {
            None => asked,
            Some(link) => match link.send(asked) {
                Ok(()) => return,
                Err(mpsc::error::SendError(asked)) => asked,
            },
        };
        // Its receiver has just been made.
        let _ = self.open(to, &mut links).send(asked);
    }

    /// Begins to speak to a node.
    fn open(
        self: &Arc<Self>,
        to: NodeId,
        links: &mut BTreeMap<NodeId, mpsc::UnboundedSender<Asked>>,
    ) -> mpsc::UnboundedSender<Asked> {
        let (link, mut questions) = mpsc::unbounded_channel();
        links.insert(to, link.clone());
        let (this, runtime) = (self.clone(), self.runtime.clone());
        self.runtime.spawn("raft link", async move {
            if let Err(error) = this.run_link(to, &mut questions).await {
                runtime.note("raft: a stream cannot be opened");
                if this.said.is_news(&error.to_string(), runtime.clock.monotonic()) {
                    tracing::warn!(%error, "cannot speak to another node");
                }
                *this.missed.lock().entry(to).or_default() += 1;
                // Each group asks many times in a second; what is asked meanwhile is asked in vain.
                runtime.clock.sleep(OPEN_AGAIN).await;
            }
        });
        link
    }

    /// Where a node is, or may be: where it was met, and where the settings say.
    fn address(&self, node: NodeId) -> Option<Endpoint> {
        let met = self.me.identities.address(node).map(|address| Endpoint::from(address.as_str()));
        let said = (self.addresses)(node).filter(|said| Some(said) != met.as_ref());
        let places: Vec<Endpoint> = met.into_iter().chain(said).collect();
        let missed = self.missed.lock().get(&node).copied().unwrap_or(0);
        places.get(missed % places.len().max(1)).cloned()
    }

    /// Owns the stream to a node until it breaks; what waits then is dropped, which says so.
    async fn run_link(
        &self,
        to: NodeId,
        questions: &mut mpsc::UnboundedReceiver<Asked>,
    ) -> std::io::Result<()> {
        let none = || std::io::Error::other(format!("the address of node {to} is not known"));
        if let Some(why) = self.me.identities.condemned() {
            return Err(std::io::Error::other(why));
        }
        let address = self.address(to).ok_or_else(none)?;
        let mut stream = self.runtime.network.open(&address).await?;
        let greeted = greeting::open(&self.runtime, &self.me, to, &mut stream).await;
        let key = greeted.map_err(|why| std::io::Error::other(format!("node {to} at {address}: {why}")))?;
        let PeerStream { sender, mut receiver } = stream;
        let waiting: Mutex<BTreeMap<u64, Answer>> = Mutex::default();
        let write = async {
            while let Some(Asked { number, frame, answer }) = questions.recv().await {
                if answer.is_closed() {
                    continue;
                }
                // A stream is good for as long as the key that it was greeted under.
                if !self.believes(&key) {
                    return;
                }
                waiting.lock().insert(number, answer);
                if sender.send(frame).await.is_err() {
                    return;
                }
            }
        };
        let read = async {
            while let Some(frame) = receiver.recv().await {
                let Ok(Frame { form, number, body, .. }) = Frame::decode(frame) else { return };
                let Some(answer) = waiting.lock().remove(&number) else { continue };
                // Who asked may have given up.
                let _ = answer.send(match form {
                    Form::Answer => Ok(body),
                    Form::Request | Form::Refusal => Err(String::from_utf8_lossy(&body).into_owned()),
                });
            }
        };
        tokio::select! {
            biased;
            () = read => {}
            () = write => {}
        }
        self.runtime.note("raft: a stream has broken");
        Ok(())
    }

    /// Whether this is one of the cluster's keys still.
    fn believes(&self, key: &[u8; 32]) -> bool {
        self.me.keys.find(|known| known == key).is_some() || mutants::is(Mutant::StreamOutlivesKey)
    }

    /// Answers what another node asks on a stream that it has opened.
    pub fn accept(self: &Arc<Self>, stream: PeerStream) {
        let (this, runtime) = (self.clone(), self.runtime.clone());
        self.runtime.spawn("raft accept", async move {
            if let Err(why) = this.clone().answer(stream).await {
                runtime.note("raft: a stream is refused");
                if this.said.is_news(&why, runtime.clock.monotonic()) {
                    tracing::warn!(%why, "another node is refused");
                }
            }
        });
    }

    async fn answer(self: Arc<Self>, mut stream: PeerStream) -> Result<(), String> {
        let (from, key) = greeting::accept(&self.runtime, &self.me, &mut stream).await?;
        let PeerStream { sender, mut receiver } = stream;
        // Appends of a group keep their order; all else is answered when it is ready.
        let mut appends: BTreeMap<u64, mpsc::UnboundedSender<Frame>> = BTreeMap::new();
        while let Some(bytes) = receiver.recv().await {
            let frame = Frame::decode(bytes).map_err(|error| error.to_string())?;
            if let Some(why) = self.me.identities.condemned() {
                return Err(why);
            }
            if !self.believes(&key) {
                return Ok(());
            }
            if frame.kind == Kind::Mark {
                let (known, heard) = self.hear_mark(from, frame.body.clone())?;
                answer_with(&sender, &frame, Ok(known)).await;
                // Nothing more is heard of one that is an older copy.
                heard?;
                continue;
            }
            let Some(group) = self.groups.lock().get(&frame.group).cloned() else {
                let text = "no such log here, or another incarnation of it";
                answer_with(&sender, &frame, Err(text.into())).await;
                continue;
            };
            if frame.kind != Kind::Append {
                let sender = sender.clone();
                self.runtime.spawn("raft answer", async move {
                    let answered = group.answer(frame.kind, frame.body.clone(), from).await;
                    answer_with(&sender, &frame, answered).await;
                });
                continue;
            }
            let queue = appends.entry(frame.group).or_insert_with(|| {
                let (queue, frames) = mpsc::unbounded_channel();
                self.runtime.spawn("raft appends", group.append_all(frames, sender.clone()));
                queue
            });
            // The queue lives as long as this stream.
            let _ = queue.send(frame);
        }
        Ok(())
    }
}

/// Sends the answer to a request, if the stream is still there.
pub(crate) async fn answer_with(
    sender: &mpsc::Sender<Bytes>,
    asked: &Frame,
    answered: Result<Bytes, String>,
) {
    let (form, body) = match answered {
        Ok(body) => (Form::Answer, body),
        Err(why) => (Form::Refusal, why.into()),
    };
    let frame = Frame { kind: asked.kind, form, group: asked.group, number: asked.number, body };
    // Who asked may be gone.
    let _ = sender.send(frame.encode()).await;
}
