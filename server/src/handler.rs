//! What a node answers: opens the envelope and hands the body to whom it is for.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use clutch_blocks::BlockService;
use clutch_log::{Engines, LogId, Position};
use clutch_proto::{
    Parts, Refusal, Time,
    admin::{AdminReply, AdminRequest, KnownNode, admin_request::Op},
    answer,
    blocks::BlocksReply,
    certificate::{AdminClaims, SYSTEM_CLIENTS, is_admin_mac, is_system_mac},
    limits::{MESSAGE_BYTES_MAX, METADATA_REQUEST_BYTES_MAX},
    mutants::{self, Mutant},
    operation,
    registry::{RedeemInvitation, RegistryReply, RegistryRequest, registry_request},
    session::{self, Request, Response, Role},
    types::Code,
};
use clutch_runtime::{
    Answers, BoxFuture, Clock, ClusterKeys, Handled, Handler, Held, HybridClock, PeerStream, Runtime,
};
use clutch_state_replica::{Answer, Freshness, ReplicaHandle};
use parking_lot::RwLock;
use prost::Message as _;

use crate::{
    healer::Board,
    joining::Token,
    metrics::Meters,
    node::OfSeveral,
    room::Room,
    routes::{Routes, log_of},
};

/// An administrative request that changes something is good for so long, by the cluster's time.
const ADMIN_LIFETIME_NS: u64 = 60_000_000_000;

/// The roles of a node, as seen from the network.
pub(crate) struct NodeHandler {
    pub(crate) cluster: u64,
    pub(crate) clock: Arc<HybridClock>,
    pub(crate) keys: ClusterKeys,
    pub(crate) registry: Option<ReplicaHandle>,
    pub(crate) cdc: Option<ReplicaHandle>,
    pub(crate) shards: BTreeMap<u32, ReplicaHandle>,
    pub(crate) blocks: BTreeMap<u64, Arc<BlockService>>,
    /// What the node does for what is stored.
    pub(crate) board: Arc<Board>,
    pub(crate) process_usage: ProcessUsage,
    pub(crate) meters: Arc<Meters>,
    /// Where the cluster has several nodes.
    pub(crate) of_several: Option<OfSeveral>,
    pub(crate) runtime: Runtime,
    /// By which requests are timed.
    pub(crate) monotonic: Arc<dyn Clock>,
    pub(crate) engines: Engines,
    /// In which life each log of this node is.
    pub(crate) incarnations: BTreeMap<LogId, u32>,
    pub(crate) room: Arc<Room>,
    /// Logs that the node goes on without.
    pub(crate) left_out: BTreeMap<LogId, String>,
    pub(crate) routes: Arc<Routes>,
    /// Whether what is not here is perhaps still to come.
    pub(crate) is_starting: bool,
    /// Everything has started.
    pub(crate) ready: Arc<AtomicBool>,
}

/// Who takes an invitation, as he has shown.
struct Joining {
    token: Token,
    joiner: u64,
}

impl NodeHandler {
    /// What answers for the node, and hands on the streams that others open.
    pub(crate) fn shared(self, accept: &Arc<dyn Fn(PeerStream) + Send + Sync>) -> Arc<SharedHandler> {
        Arc::new(SharedHandler { node: RwLock::new(Arc::new(self)), accept: accept.clone() })
    }

    /// Adds what only the node knows.
    fn add_node(&self, reply: &mut AdminReply) {
        if let Some(status) = &mut reply.status {
            let (cpu_us, resident_bytes) = (self.process_usage)().unwrap_or_default();
            (status.process_cpu_us, status.resident_bytes) = (cpu_us, resident_bytes);
            status.node_faults = node_faults(&self.blocks, &self.room, &self.left_out);
            status.log_bytes = self.engines.usage().bytes;
            status.clock_ahead_ms = self.clock.wall_ahead_ms();
            let nodes = self.routes.nodes();
            let address = |node: &u64| nodes.get(node).map(ToString::to_string).unwrap_or_default();
            status.members.iter_mut().for_each(|member| member.address = address(&member.node));
            status.nodes =
                nodes.keys().map(|node| KnownNode { node: *node, address: address(node) }).collect();
        }
    }
}

/// What is wrong with a node beside its replicas.
pub(crate) fn node_faults(
    blocks: &BTreeMap<u64, Arc<BlockService>>,
    room: &Room,
    left_out: &BTreeMap<LogId, String>,
) -> Vec<String> {
    let disks = blocks.values().filter_map(|service| service.fault());
    left_out.values().cloned().chain(disks).chain(room.shortage()).collect()
}

/// Asks for the processor time in microseconds and the resident bytes of this process, where it has some of its own.
pub type ProcessUsage = fn() -> Option<(u64, u64)>;

/// Requests share the handler without copying it.
pub(crate) struct SharedHandler {
    node: RwLock<Arc<NodeHandler>>,
    /// Takes the streams of other nodes.
    accept: Arc<dyn Fn(PeerStream) + Send + Sync>,
}

impl SharedHandler {
    /// Requests that come from now on are for this.
    pub(crate) fn serve(&self, node: NodeHandler) {
        *self.node.write() = Arc::new(node);
    }
}

impl Handler for SharedHandler {
    fn handle(&self, request: Bytes, answers: Answers) -> BoxFuture<Handled> {
        let handler = self.node.read().clone();
        Box::pin(async move {
            let mut held = Held::default();
            let answer: Parts = match handler.respond(request, &answers, &mut held).await {
                (response, None) => response.encode_to_vec().into(),
                (response, Some(reply)) => Parts::of_response(&response, reply),
            };
            held.shrink(answer.len());
            Handled { answer, held }
        })
    }

    fn accept(&self, stream: PeerStream) {
        (self.accept)(stream);
    }

    fn is_serving(&self) -> bool {
        let node = self.node.read().clone();
        let replicas = node.registry.iter().chain(&node.cdc).chain(node.shards.values());
        node.ready.load(Ordering::Acquire) && replicas.into_iter().all(|replica| replica.fault().is_none())
    }
}

impl NodeHandler {
    /// The answer, and its body where that is a block service's.
    async fn respond(
        &self,
        request: Bytes,
        answers: &Answers,
        held: &mut Held,
    ) -> (Response, Option<BlocksReply>) {
        let (began, mut role) = (self.monotonic.monotonic(), None);
        let (mut response, body) = match self.dispatch(request, answers, held, &mut role).await {
            Ok(answer) => answer,
            Err(refusal) => (Response { error: Some(refusal.to_wire()), ..Response::default() }, None),
        };
        self.meters.answered(role, self.monotonic.monotonic() - began, response.error.is_some());
        response.time = response.time.max(self.clock.told().0);
        (response, body)
    }

    /// Looks at what every request says of itself; its role, which is told in any case.
    fn admit(&self, request: &Request, asked: &mut Option<Role>) -> Result<Role, Refusal> {
        let role = *asked.insert(Role::try_from(request.role).unwrap_or(Role::Unspecified));
        if !mutants::is(Mutant::TimeGoesBack) {
            let observed = self.clock.observe(Time(request.time));
            // Who stamps entries is led ahead by nobody. A block service stamps none: what counts there is signed.
            if role != Role::Blocks || mutants::is(Mutant::DisksMindClients) {
                observed?;
            }
        }
        if request.cluster != 0 && request.cluster != self.cluster {
            return Err(Refusal::new(Code::WrongCluster, "this node belongs to another cluster"));
        }
        let own = log_of(role, request.number).and_then(|log| self.incarnations.get(&log)).copied();
        let is_other = |own: &u32| ![0, u64::from(*own)].contains(&request.incarnation);
        if let Some(own) = own.filter(|own| is_other(own) && !mutants::is(Mutant::AnyLifeServed)) {
            let text = format!("this node has incarnation {own} of the log, not {}", request.incarnation);
            return Err(Refusal::new(Code::StaleIncarnation, text));
        }
        if let Some(tag) = request.tag.as_ref().filter(|tag| tag.client < SYSTEM_CLIENTS)
            && self.keys.find(|key| is_system_mac(key, tag, &request.body, &request.system_mac)).is_none()
        {
            // A node that has another key than the others must not have the last word: who leads has.
            let leads = log_of(role, request.number).is_none_or(|log| self.routes.leads(log));
            return Err(match leads {
                true => Refusal::new(Code::Permission, "client ids below 16 are the cluster's own"),
                false => Refusal::new(Code::NotLeader, "this node does not lead the log"),
            });
        }
        Ok(role)
    }

    /// Whether who asks shows that it has the cluster's key, for this replica and of late.
    fn is_proven(&self, request: &Request) -> bool {
        self.proof(request).is_some()
    }

    /// By which of the cluster's keys a request is proven.
    fn proof(&self, request: &Request) -> Option<[u8; 32]> {
        self.keys.find(|key| self.is_proven_by(key, request))
    }

    fn is_proven_by(&self, key: &[u8; 32], request: &Request) -> bool {
        let Request { cluster, role, number, time, .. } = *request;
        let claims = AdminClaims { cluster, role, number, time: Time(time) };
        let is_now = self.clock.told().0.abs_diff(time) <= ADMIN_LIFETIME_NS;
        // Another cluster's was refused before; a node that has just started does not name its own yet.
        is_now && is_admin_mac(key, claims, &request.body, &request.system_mac)
    }

    /// Refuses what changes the registry, and so where everything is, from who is no node of the cluster.
    ///
    /// An invitation is taken by whoever shows its secret in the place of the cluster's key; which, and by whom.
    fn admit_change(&self, role: Role, request: &Request) -> Result<Option<Joining>, Refusal> {
        // What is too large is refused where it goes.
        if role != Role::Registry || request.body.len() > METADATA_REQUEST_BYTES_MAX {
            return Ok(None);
        }
        // What cannot be read, or is nothing, is refused where it goes.
        let op = RegistryRequest::decode(request.body.clone()).ok().and_then(|request| request.op);
        let Some(op) = op.filter(|op| !operation::of_registry(op).is_read()) else { return Ok(None) };
        let joins =
            matches!(op, registry_request::Op::InviteNode(_) | registry_request::Op::RedeemInvitation(_));
        if joins && self.of_several.is_none() {
            let text = "this cluster is one process, which no other node can join";
            return Err(Refusal::new(Code::Unsupported, text));
        }
        let is_any = mutants::is(Mutant::AnybodyRegisters);
        let invitation = match op {
            registry_request::Op::RedeemInvitation(op) => Some(op),
            _ if self.is_proven(request) || is_any => return Ok(None),
            _ => None,
        };
        if let Some(joining) = invitation.as_ref().and_then(|op| self.joining(op, request)) {
            return Ok(Some(joining));
        }
        // A node that has another key than the others must not have the last word: who leads has.
        Err(match self.routes.leads(LogId::REGISTRY) {
            true if invitation.is_some() => Refusal::new(
                Code::Permission,
                "the token is not one that this cluster has made (clutch cluster invite)",
            ),
            true => Refusal::new(
                Code::Permission,
                "only who has the cluster's key tells the registry: name keys/cluster.key of one of its nodes with --key",
            ),
            false => Refusal::new(Code::NotLeader, "this node does not lead the log"),
        })
    }

    /// Refuses what changes a cluster, or shows all of it, from who does not show that he has its key, and members that nobody could find.
    fn admit_operator(&self, op: &AdminRequest, request: &Request) -> Result<(), Refusal> {
        let members = match &op.op {
            Some(Op::Reconfigure(change)) => &change.members[..],
            Some(
                Op::MoveLeader(_)
                | Op::ScanRows(_)
                | Op::ReadLog(_)
                | Op::TakeCheckpoint(_)
                | Op::TrimLog(_)
                | Op::Rescan(_)
                | Op::RotateKey(_),
            ) => &[],
            None | Some(Op::Status(_) | Op::HashAt(_)) => return Ok(()),
        };
        if !self.is_proven(request) && !mutants::is(Mutant::AnybodyAdministers) {
            let text = match request.system_mac.is_empty() {
                true => {
                    "only who has the cluster's key looks into its logs and tables, trims them, or changes its members: name \
                     keys/cluster.key of a node with --key"
                }
                false => {
                    "the key that was used is not this cluster's (or the clocks are more than a minute apart): name \
                     keys/cluster.key of one of its nodes with --key"
                }
            };
            return Err(Refusal::new(Code::Permission, text));
        }
        match members.iter().find(|member| self.routes.address(member.node).is_empty()) {
            Some(unknown) => {
                let text = format!(
                    "node {} is not known here: start it, and wait until it has greeted this node",
                    unknown.node
                );
                Err(Refusal::new(Code::NotFound, text))
            }
            None => Ok(()),
        }
    }

    /// Who takes an invitation, where he shows its secret: under the key that it was made under.
    fn joining(&self, op: &RedeemInvitation, request: &Request) -> Option<Joining> {
        let token = |key: &[u8; 32]| Token::of(key, self.cluster, op.invitation);
        let key = self.keys.find(|key| self.is_proven_by(&token(key).signing_key(), request));
        let key = key.or_else(|| mutants::is(Mutant::AnyTokenTaken).then(|| self.keys.used()))?;
        Some(Joining { token: token(&key), joiner: op.joiner })
    }

    /// The request of who joins, with the least number that its node may get, which this node knows better.
    fn numbered(&self, joining: &Joining) -> Bytes {
        let last = self.routes.nodes().keys().max().copied().unwrap_or(0);
        let (invitation, joiner) = (joining.token.invitation, joining.joiner);
        let op = RedeemInvitation { invitation, joiner, least_node: last + 1 };
        RegistryRequest { op: Some(registry_request::Op::RedeemInvitation(op)) }.encode_to_vec().into()
    }

    /// Goes a step from one of the cluster's keys to the next, where that is asked: of the node, whatever logs it keeps.
    fn rotate(&self, request: &Request) -> Result<Option<Bytes>, Refusal> {
        // What is too large, or cannot be read, is refused where it goes.
        let is_small = request.admin && request.body.len() <= METADATA_REQUEST_BYTES_MAX;
        let asked = is_small.then(|| AdminRequest::decode(request.body.clone()).ok()).flatten();
        let Some(asked @ AdminRequest { op: Some(Op::RotateKey(op)) }) = &asked else { return Ok(None) };
        self.admit_operator(asked, request)?;
        let Some(of) = &self.of_several else {
            return Err(Refusal::new(
                Code::Unsupported,
                "this cluster is one process, whose key nobody else has",
            ));
        };
        let shown = self.proof(request).unwrap_or_else(|| self.keys.used());
        let key = of.rotation.step(&self.runtime, op, &shown)?;
        let reply = AdminReply { key: Some(key), ..AdminReply::default() };
        Ok(Some(reply.encode_to_vec().into()))
    }

    /// Adds to the number of a node that has taken an invitation what it is handed over.
    fn welcome(&self, joining: Option<&Joining>, body: Bytes) -> Result<Bytes, Refusal> {
        let (Some(Joining { token, joiner }), Some(of)) = (joining, &self.of_several) else {
            return Ok(body);
        };
        let unwilling = |error: anyhow::Error| Refusal::new(Code::NotReady, format!("{error:#}"));
        let mut reply = RegistryReply::decode(body).map_err(|error| Refusal::malformed(error.to_string()))?;
        if let Some(welcome) = &mut reply.welcome {
            let plain = (of.hand_over)().and_then(|belongings| belongings.encode()).map_err(unwilling)?;
            let sealed = token.seal(&self.runtime, (*joiner, welcome.node), &plain);
            welcome.sealed = sealed.map_err(unwilling)?.into();
        }
        Ok(reply.encode_to_vec().into())
    }

    /// Answers who looks after a cluster.
    async fn administer(&self, replica: &ReplicaHandle, request: &Request) -> Result<Bytes, Refusal> {
        let op = AdminRequest::decode(request.body.clone())
            .map_err(|e| Refusal::malformed(format!("decode admin request: {e}")))?;
        self.admit_operator(&op, request)?;
        let asks_for_disks = matches!(&op.op, Some(Op::Status(asked)) if asked.disks);
        let mut reply = replica.admin(op).await?;
        self.add_node(&mut reply);
        if let Some(status) = reply.status.as_mut().filter(|_| asks_for_disks) {
            status.disks = self.board.disks(&self.blocks);
            status.healing = self.board.healing();
        }
        Ok(reply.encode_to_vec().into())
    }

    async fn dispatch(
        &self,
        bytes: Bytes,
        answers: &Answers,
        held: &mut Held,
        asked: &mut Option<Role>,
    ) -> Result<(Response, Option<BlocksReply>), Refusal> {
        if bytes.len() > MESSAGE_BYTES_MAX {
            return Err(Refusal::new(Code::TooLarge, format!("a message of {} bytes", bytes.len())));
        }
        let request =
            Request::decode(bytes).map_err(|e| Refusal::malformed(format!("decode request: {e}")))?;
        let role = self.admit(&request, asked)?;
        let not_here = |code: Code, what: String| match self.is_starting {
            true => Refusal::new(Code::NotReady, "this node is starting; try again"),
            false => Refusal::new(code, what),
        };
        let replica = match role {
            Role::Registry => self.registry.as_ref(),
            Role::Cdc => self.cdc.as_ref(),
            Role::Shard => u32::try_from(request.number).ok().and_then(|n| self.shards.get(&n)),
            Role::Blocks => {
                let service = self.blocks.get(&request.number);
                let service = service.ok_or_else(|| {
                    not_here(
                        Code::WrongService,
                        format!("block service {:016x} is not on this node", request.number),
                    )
                })?;
                // In a box of its own: requests to the logs, which are many and small, must not carry its size.
                let reply = Box::pin(service.handle(request.body, &answers.blocks)).await?;
                *held = reply.held;
                return Ok((Response::default(), Some(reply.reply)));
            }
            Role::Unspecified => {
                return Err(Refusal::malformed(format!("role {} is not known", request.role)));
            }
        };
        if let Some(body) = self.rotate(&request)? {
            return Ok((Response { body, ..Response::default() }, None));
        }
        let replica = replica.ok_or_else(|| {
            not_here(Code::WrongShard, format!("{role:?} {} is not on this node", request.number))
        })?;
        // What is too large is refused below, and not looked through for that.
        let may_be_large = request.body.len() <= METADATA_REQUEST_BYTES_MAX;
        let answer_bytes =
            if may_be_large { answer::bytes_max(role, request.admin, &request.body) } else { 0 };
        *held = answers.pages.hold(answer_bytes).await;
        if request.admin {
            let body = Box::pin(self.administer(replica, &request)).await?;
            return Ok((Response { body, ..Response::default() }, None));
        }
        let joining = self.admit_change(role, &request)?;
        let freshness = freshness(&request)?;
        let body = joining.as_ref().map_or(request.body, |joining| self.numbered(joining));
        let Answer { result, position, time } = replica.call_as(body, request.tag, freshness).await;
        let response = Response { time: time.0, position: position.0, ..Response::default() };
        let response = match result {
            Ok(body) => Response { body: self.welcome(joining.as_ref(), body)?, ..response },
            Err(refusal) => {
                let leader = match (refusal.code, log_of(role, request.number)) {
                    (Code::NotLeader, Some(log)) => self.routes.leader(log),
                    _ => String::new(),
                };
                Response { error: Some(refusal.to_wire()), leader, ..response }
            }
        };
        Ok((response, None))
    }
}

/// How much of its log a read must have seen.
fn freshness(request: &Request) -> Result<Freshness, Refusal> {
    match session::Freshness::try_from(request.freshness) {
        Ok(session::Freshness::Leader) => Ok(Freshness::Leader),
        Ok(session::Freshness::Member) => Ok(Freshness::Member),
        Ok(session::Freshness::Position) => Ok(Freshness::Position(Position(request.at_least))),
        Err(_) => Err(Refusal::malformed(format!("freshness {} is not known", request.freshness))),
    }
}

/// Processor time in microseconds and resident bytes of this process, from Linux's `/proc`.
pub fn process_usage() -> Option<(u64, u64)> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The command's name may hold spaces; the fields after it do not.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks: u64 = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
    let pages: u64 = fields.get(21)?.parse().ok()?;
    // Linux counts 100 ticks a second on every platform it exports to user space.
    Some((ticks * 10_000, pages * rustix::param::page_size() as u64))
}
