//! Finding who serves what, and asking until there is an answer.

use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use clutch_blocks::Codec;
use clutch_proto::{
    Parts, Refusal, Slot, Time,
    admin::{self, AdminReply, AdminRequest, admin_request},
    blocks::{BlocksReply, BlocksRequest, blocks_request},
    cdc::{CdcReply, CdcRequest, cdc_request},
    certificate,
    log::Epoch,
    mutants::{self, Mutant},
    operation::{self, Class},
    registry::{GetMap, Map, RegistryReply, RegistryRequest, registry_request},
    session::{self, Request, Response, Role},
    shard::{ShardReply, ShardRequest, shard_reply::Reply, shard_request},
    types::{ClientTag, Code},
};
use clutch_runtime::{Budget, ClusterKeys, Endpoint, HybridClock, Lane, Runtime};
use prost::Message as _;

use crate::{
    caches::{EdgeCache, PolicyCache},
    error::ClientError,
    gather::Usual,
    policy::{INLINE_FILE_BYTES_DEFAULT, MIRROR_BYTES_DEFAULT},
    registries::Registries,
    routes::Routes,
    seen::{Began, Seen},
    verdict::{Asked, Attempt},
};

/// One request as its caller sees it, with all its attempts.
#[derive(Clone, Debug)]
pub struct Call {
    /// Whom it is for.
    pub role: Role,
    /// The slot, for a shard's request; `None` when a shard was named by its number.
    pub slot: Option<Slot>,
    /// The encoded request of that role.
    pub body: Bytes,
    /// What makes a mutation happen once; `None` for reads.
    pub tag: Option<ClientTag>,
    /// Who asks.
    pub client: u64,
    /// How much of the log a read must have seen.
    pub freshness: Freshness,
}

/// How much of a log a read must have seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Freshness {
    /// All that was acknowledged before it, as its leader knows.
    #[default]
    Leader,
    /// The same, of any member.
    Member,
    /// This position and whatever else a member has applied.
    Position(u64),
}

impl Freshness {
    /// What the next attempt asks for: where a position is not there yet, whoever answers asks how much there is. After a log was
    /// rewound it may never come.
    fn after(self, error: &ClientError) -> Freshness {
        match self {
            Freshness::Position(_) if error.code() == Some(Code::NotReady) => Freshness::Member,
            freshness => freshness,
        }
    }
}

/// Whom reads are asked of, where a log has several members.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reads {
    /// The leader: they see all that was acknowledged before.
    #[default]
    Leader,
    /// Any member, which asks how much there is before it answers: they see the same.
    Member,
    /// Any member, which asks nobody: of each log they see all that this client has done or seen there, and may be behind what
    /// others have done. What one shard names, another may not have yet where somebody else made it.
    Seen,
}

/// Where a log stood when a request was answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AnsweredAt {
    /// The record of a mutation, or the last one that a read saw. 0 when no log was asked.
    pub position: u64,
    /// The answering node's time: at or above the log's time there.
    pub time: u64,
}

/// Watches a client's requests, for tests and tracing.
pub trait Observer: Send + Sync {
    /// A request begins; what is returned comes back when it ends. One that never ends was dropped by its caller.
    fn began(&self, call: &Call) -> u64;
    /// A request has ended.
    fn ended(&self, id: u64, result: Result<&Bytes, &ClientError>, at: AnsweredAt);
}

/// How a client behaves.
#[derive(Clone)]
pub struct ClientOptions {
    /// How long a request is retried, and any other wait lasts without getting on, before the outcome is reported as it is.
    pub patience: Duration,
    /// How long one attempt may take; a second at most where there are others to ask.
    pub attempt: Duration,
    /// How long one block transfer may take before another block is used.
    pub block_attempt: Duration,
    /// How long a resolved directory entry is believed; zero asks every time.
    pub cache_lifetime: Duration,
    /// Entries that the cache holds at most.
    pub cache_entries_max: usize,
    /// MiB of files that are in memory at a time, on their way in or out, all of this client's transfers together. A span
    /// that takes more is alone.
    pub memory_mib_max: u32,
    /// Files of up to so many bytes lie in the metadata where no directory says otherwise; more than the shortest only where all
    /// members of the shard's log know of it.
    pub inline_bytes: u32,
    /// Spans of up to so many bytes are mirrored where no directory says otherwise.
    pub mirror_bytes: u32,
    /// Whom reads are asked of.
    pub reads: Reads,
    /// The clock of the node that the client is part of, so that what it sends is above all that the node has seen, and what the
    /// node logs is above all that it was answered; `None` for one of its own, which goes by what servers say.
    pub clock: Option<Arc<HybridClock>>,
    /// What proves that a request comes from the cluster itself, or from who looks after it; clients have none.
    pub keys: Option<ClusterKeys>,
    /// Who watches requests to registry, CDC and shards.
    pub observer: Option<Arc<dyn Observer>>,
}

impl Default for ClientOptions {
    fn default() -> ClientOptions {
        ClientOptions {
            patience: Duration::from_secs(30),
            attempt: Duration::from_secs(10),
            block_attempt: Duration::from_secs(10),
            cache_lifetime: Duration::from_secs(1),
            cache_entries_max: 16_384,
            memory_mib_max: 64,
            inline_bytes: INLINE_FILE_BYTES_DEFAULT,
            mirror_bytes: MIRROR_BYTES_DEFAULT,
            reads: Reads::Leader,
            clock: None,
            keys: None,
            observer: None,
        }
    }
}

/// A client of one cluster; cheap to clone.
#[derive(Clone)]
pub struct Client {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) runtime: Runtime,
    pub(crate) options: ClientOptions,
    registries: Registries,
    clock: Arc<HybridClock>,
    id: u64,
    routes: Routes,
    seen: Seen,
    tags: Mutex<Tags>,
    pub(crate) edges: EdgeCache,
    /// For the bytes of files that are on their way.
    pub(crate) memory: Budget,
    pub(crate) codecs: Mutex<std::collections::BTreeMap<(u32, u32), Arc<Codec>>>,
    pub(crate) policies: Mutex<PolicyCache>,
    /// Services that failed lately, and until when they are tried last.
    pub(crate) suspects: Mutex<std::collections::BTreeMap<u64, Duration>>,
    /// What reads of blocks take.
    pub(crate) usual: Usual,
    /// Spans that were written with less parity than their policy says.
    pub(crate) less_parity: AtomicU64,
    /// When the last of them was.
    pub(crate) less_parity_at: Mutex<Option<Duration>>,
    /// Until when files of a slot are not given to its shard as inline data, which would not take one.
    pub(crate) inline_not_before: Mutex<std::collections::BTreeMap<u8, Duration>>,
}

#[derive(Default)]
struct Tags {
    last: u64,
    outstanding: BTreeSet<u64>,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What these locks guard is whole between any two statements, also when a thread panicked.
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// An attempt gets this long, however little patience there is.
const ATTEMPT_MIN: Duration = Duration::from_secs(1);
/// One that is silent for so long keeps nobody from asking the next.
const ATTEMPT_OF_SEVERAL: Duration = Duration::from_secs(1);
/// Hints that are followed at once; between more of them there is a pause, for nodes may point at each other.
const HINTS_AT_ONCE: u32 = 2;

/// A log: role and number as in a request.
pub(crate) type LogKey = (i32, u64);

/// An answer that came and cannot be read: what was asked for has happened, if it changes anything.
fn undecodable(error: impl std::fmt::Display, mutates: bool) -> ClientError {
    let text = format!("decode the answer: {error}");
    if mutates { ClientError::Unknown(text) } else { ClientError::unexpected(&text) }
}

/// The tag of one mutation; acknowledged when dropped.
struct Tag<'a> {
    inner: &'a Inner,
    tag: ClientTag,
}

impl Drop for Tag<'_> {
    fn drop(&mut self) {
        lock(&self.inner.tags).outstanding.remove(&self.tag.sequence);
    }
}

/// Where a request goes.
struct Target {
    endpoint: Endpoint,
    role: Role,
    number: u64,
    /// Where else it may go; none where there is one place.
    members: Vec<Endpoint>,
    /// In which life of its log it is believed to be; 0 where nothing is known.
    incarnation: u32,
}

impl Target {
    fn log(&self) -> LogKey {
        (self.role as i32, self.number)
    }
}

/// How an attempt ended.
struct Heard {
    result: Result<Bytes, ClientError>,
    at: AnsweredAt,
    /// Who leads, where it was not who was asked.
    leader: Option<Endpoint>,
}

impl Heard {
    fn nothing(error: ClientError) -> Heard {
        Heard { result: Err(error), at: AnsweredAt::default(), leader: None }
    }
}

/// What a request carries. Blocks are large: they are encoded where they go.
enum Body {
    Encoded(Bytes),
    Blocks(BlocksRequest),
}

/// How one attempt is made.
#[derive(Clone, Copy)]
struct How {
    admin: bool,
    freshness: Freshness,
    /// What the answer may take besides what every answer does.
    answer_bytes: usize,
}

/// Which service a request is for; turned into a [`Target`] by the map of the moment.
#[derive(Clone, Copy)]
enum Service {
    Registry,
    Cdc,
    Slot(Slot),
    Shard(u32),
}

impl Client {
    /// A client that finds its cluster through a registry, one address or those of all its members. Does not connect yet.
    pub fn new(runtime: Runtime, registry: impl Into<Registries>, options: ClientOptions) -> Client {
        // Small ids are the cluster's own.
        let id = runtime.random.u64() | 1 << 32;
        let edges = EdgeCache::new(options.cache_entries_max, options.cache_lifetime);
        let own = || Arc::new(HybridClock::following(runtime.clock.clone()));
        let clock = options.clock.clone().unwrap_or_else(own);
        let memory = Budget::new(options.memory_mib_max.clamp(1, 4095) << 20);
        Client {
            inner: Arc::new(Inner {
                runtime,
                options,
                registries: registry.into(),
                clock,
                id,
                routes: Routes::default(),
                seen: Seen::default(),
                tags: Mutex::default(),
                edges,
                memory,
                codecs: Mutex::default(),
                policies: Mutex::default(),
                suspects: Mutex::default(),
                usual: Usual::default(),
                less_parity: AtomicU64::new(0),
                less_parity_at: Mutex::default(),
                inline_not_before: Mutex::default(),
            }),
        }
    }

    /// Another client of the same cluster, with an id, caches and sessions of its own.
    pub fn sibling(&self) -> Client {
        let runtime = self.inner.runtime.separate();
        Client::new(runtime, self.inner.registries.clone(), self.inner.options.clone())
    }

    /// The same client with other patience; ids, caches and sessions are its own.
    pub fn with_patience(&self, patience: Duration) -> Client {
        let patience = patience.min(self.inner.options.patience);
        let options = ClientOptions { patience, ..self.inner.options.clone() };
        Client::new(self.inner.runtime.clone(), self.inner.registries.clone(), options)
    }

    /// How many spans this client wrote with less parity than their policy says, because disks are missing.
    pub fn spans_with_less_parity(&self) -> u64 {
        self.inner.less_parity.load(Ordering::Relaxed)
    }

    /// The key by which it shows that it may look after the cluster, where it has one.
    pub fn key(&self) -> Option<[u8; 32]> {
        self.inner.options.keys.as_ref().map(ClusterKeys::used)
    }

    /// What the client runs on.
    pub fn runtime(&self) -> &Runtime {
        &self.inner.runtime
    }

    /// The client's id.
    pub fn id(&self) -> u64 {
        self.inner.id
    }

    /// The highest log time that this client has seen.
    pub fn seen_time(&self) -> Time {
        self.inner.clock.highest()
    }

    /// The cluster's time, as far as it is known from what its servers have said.
    pub fn cluster_time(&self) -> Time {
        self.inner.clock.now()
    }

    /// A tag for a mutation. Its time is the cluster's, so somebody is asked first where nobody has said it yet: by this
    /// machine's own clock a request may be long expired, or never expire.
    async fn tag(&self) -> Result<Tag<'_>, ClientError> {
        if !self.inner.clock.is_set() && !mutants::is(Mutant::TagFromWallClock) {
            Box::pin(self.refresh_map()).await?;
        }
        Ok(self.draw_tag())
    }

    fn issue_time(&self) -> u64 {
        match mutants::is(Mutant::TagFromWallClock) {
            true => self.inner.runtime.clock.now().0,
            false => self.inner.clock.now().0,
        }
    }

    fn draw_tag(&self) -> Tag<'_> {
        let mut tags = lock(&self.inner.tags);
        tags.last += 1;
        let sequence = tags.last;
        tags.outstanding.insert(sequence);
        let acknowledged = tags.outstanding.first().map_or(0, |first| first - 1);
        let issued_at = self.issue_time();
        Tag {
            inner: &self.inner,
            tag: ClientTag { client: self.inner.id, sequence, acknowledged, issued_at },
        }
    }

    /// The cluster's map, from memory when it was read before.
    pub async fn map(&self) -> Result<Arc<Map>, ClientError> {
        match self.inner.routes.map() {
            Some(map) => Ok(map),
            // What moved is who leads, mostly: the services are not sent again when they are known.
            None => self.read_map(false).await,
        }
    }

    /// Reads the cluster's map anew, all of it.
    pub async fn refresh_map(&self) -> Result<Arc<Map>, ClientError> {
        self.read_map(true).await
    }

    async fn read_map(&self, mut is_whole: bool) -> Result<Arc<Map>, ClientError> {
        loop {
            let reading = self.inner.routes.begin_reading(is_whole);
            let op = registry_request::Op::GetMap(GetMap { services_version: reading.services_version });
            let (reply, at) = self.registry_at(op).await?;
            let map = reply.map.ok_or_else(|| ClientError::unexpected("a map"))?;
            self.inner.registries.learn(&map.registry_members);
            match self.inner.routes.read(&reading, map, at.position) {
                Some(map) => return Ok(map),
                None => is_whole = true,
            }
        }
    }

    async fn target(&self, service: Service) -> Result<Target, ClientError> {
        let not_yet = |what: String| {
            // It may know by now.
            if !mutants::is(Mutant::YoungMapKept) {
                self.inner.routes.doubt();
            }
            ClientError::Refused(Refusal::new(Code::NotReady, what))
        };
        let by_shard = |find: &dyn Fn(&clutch_proto::types::ShardPlacement) -> bool, map: &Map| {
            map.shards.iter().find(|s| find(s)).cloned()
        };
        // Who was said to lead since the map was read is asked first.
        let target = |role: Role, number: u64, address: &str, members: &[String]| Target {
            endpoint: self.inner.routes.leader((role as i32, number)).unwrap_or_else(|| address.into()),
            role,
            number,
            members: members.iter().map(|member| member.as_str().into()).collect(),
            incarnation: 0,
        };
        let (placement, what) = match service {
            Service::Registry => {
                return Ok(Target {
                    endpoint: self.inner.registries.current(),
                    role: Role::Registry,
                    number: 0,
                    members: self.inner.registries.all(),
                    incarnation: 0,
                });
            }
            Service::Cdc => {
                let map = Box::pin(self.map()).await?;
                if map.cdc_address.is_empty() {
                    return Err(not_yet("the registry does not know the CDC yet".into()));
                }
                return Ok(target(Role::Cdc, 0, &map.cdc_address, &map.cdc_members));
            }
            Service::Slot(slot) => {
                let slot = u32::from(slot.0);
                let map = Box::pin(self.map()).await?;
                (
                    by_shard(&|s| (s.slot_first..=s.slot_last).contains(&slot), &map),
                    format!("the shard of slot {slot}"),
                )
            }
            Service::Shard(number) => {
                let map = Box::pin(self.map()).await?;
                (by_shard(&|s| s.shard == number, &map), format!("shard {number}"))
            }
        };
        let placement = placement.ok_or_else(|| not_yet(format!("the registry does not know {what}")))?;
        let incarnation = Epoch(placement.epoch).incarnation();
        let target = target(Role::Shard, u64::from(placement.shard), &placement.address, &placement.members);
        Ok(Target { incarnation, ..target })
    }

    /// One attempt: an answer from the service, or why there is none. `Unknown` means that it may have acted.
    async fn attempt(
        &self,
        target: &Target,
        lane: Lane,
        tag: Option<ClientTag>,
        body: Body,
        how: How,
    ) -> Heard {
        let cluster = self.inner.routes.cluster();
        let (time, key) = (self.inner.clock.highest(), self.key());
        let system_mac = match (&key, &tag, &body) {
            (Some(key), Some(tag), Body::Encoded(body)) if tag.client < certificate::SYSTEM_CLIENTS => {
                certificate::system_mac(key, tag, body)
            }
            // What changes the registry is told by nodes only.
            (Some(key), tag, Body::Encoded(body))
                if how.admin || tag.is_some() && target.role == Role::Registry =>
            {
                let (role, number) = (target.role as i32, target.number);
                let claims = certificate::AdminClaims { cluster, role, number, time };
                Bytes::copy_from_slice(&certificate::admin_mac(key, claims, body))
            }
            _ => Bytes::new(),
        };
        let (freshness, at_least) = match how.freshness {
            Freshness::Leader => (session::Freshness::Leader, 0),
            Freshness::Member => (session::Freshness::Member, 0),
            Freshness::Position(position) => (session::Freshness::Position, position),
        };
        let is_change = tag.is_some();
        let request = Request {
            system_mac,
            role: target.role as i32,
            number: target.number,
            time: time.0,
            incarnation: u64::from(target.incarnation),
            tag,
            body: Bytes::new(),
            admin: how.admin,
            cluster,
            freshness: freshness as i32,
            at_least,
        };
        let request = match body {
            Body::Encoded(body) => Request { body, ..request }.encode_to_vec().into(),
            Body::Blocks(body) => Parts::of_request(&request, body),
        };
        let options = &self.inner.options;
        let timeout = if lane == Lane::Bulk { options.block_attempt } else { options.attempt };
        // No attempt outlasts patience; a moment is always given.
        let timeout = timeout.min(options.patience.max(ATTEMPT_MIN));
        // Who looks after a replica means that one, and what is asked of it may take long.
        let has_others = target.members.len() > 1 && !how.admin;
        let timeout = if has_others { timeout.min(ATTEMPT_OF_SEVERAL) } else { timeout };
        let network = &self.inner.runtime.network;
        let answer = match network.call(&target.endpoint, lane, request, how.answer_bytes, timeout).await {
            Ok(answer) => answer,
            Err(error) if error.certainly_no_effect() => {
                return Heard::nothing(ClientError::Unreachable(error.to_string()));
            }
            Err(error) => return Heard::nothing(ClientError::Unknown(error.to_string())),
        };
        match Response::decode(answer) {
            Ok(response) => self.heard(target, response, is_change),
            Err(error) => {
                let text = format!("decode answer of {}: {error}", target.endpoint);
                Heard::nothing(ClientError::Unknown(text))
            }
        }
    }

    /// What an answer says.
    fn heard(&self, target: &Target, response: Response, is_change: bool) -> Heard {
        if let Err(refusal) = self.inner.clock.learn(Time(response.time)) {
            self.inner.runtime.note("client: an answer is ahead of the node's clock");
            // What the node logs of it must come behind it: it is asked again until the clocks agree.
            if is_change || target.role == Role::Shard {
                return Heard::nothing(ClientError::Unknown(format!("{}: {refusal}", target.endpoint)));
            }
        }
        if response.error.as_ref().is_some_and(|error| Code::try_from(error.code) == Ok(Code::ClockAhead)) {
            self.inner.clock.refused();
        }
        let at = AnsweredAt { position: response.position, time: response.time };
        let leader = (!response.leader.is_empty()).then(|| response.leader.as_str().into());
        let result = match response.error {
            Some(error) => Err(ClientError::Refused(Refusal::from_wire(error))),
            None => Ok(response.body),
        };
        Heard { result, at, leader }
    }

    /// Asks until there is an answer that a retry cannot better, or patience ends.
    async fn ask(
        &self,
        service: Service,
        body: Bytes,
        tag: Option<&ClientTag>,
        admin: bool,
    ) -> Result<(Bytes, AnsweredAt), ClientError> {
        let mut at = AnsweredAt::default();
        let began = self.inner.seen.begin();
        let freshness = match (self.inner.options.reads, tag) {
            (_, Some(_)) | (Reads::Leader, _) => Freshness::Leader,
            _ if admin => Freshness::Leader,
            (Reads::Member, _) => Freshness::Member,
            (Reads::Seen, _) => self.freshness(service, began),
        };
        let observer = self.inner.options.observer.as_ref().filter(|_| !admin);
        let id = observer.map_or(0, |observer| {
            let (role, slot) = match service {
                Service::Registry => (Role::Registry, None),
                Service::Cdc => (Role::Cdc, None),
                Service::Slot(slot) => (Role::Shard, Some(slot)),
                Service::Shard(_) => (Role::Shard, None),
            };
            let (body, tag, client) = (body.clone(), tag.copied(), self.inner.id);
            observer.began(&Call { role, slot, body, tag, client, freshness })
        });
        let how = How { admin, freshness, answer_bytes: 0 };
        let result = self.ask_until(service, body, tag, how, began, &mut at).await;
        if let Some(observer) = observer {
            observer.ended(id, result.as_ref(), at);
        }
        result.map(|answer| (answer, at))
    }

    /// How fresh a read of a shard must be to see all that this client has seen. Others are few, and see everything: where all
    /// is, and what is in flight.
    fn freshness(&self, service: Service, began: Began) -> Freshness {
        let number = match (service, self.inner.routes.map()) {
            (Service::Slot(Slot(slot)), Some(map)) => {
                let slot = u32::from(slot);
                let placed = map.shards.iter().find(|s| (s.slot_first..=s.slot_last).contains(&slot));
                placed.map(|placement| placement.shard)
            }
            _ => None,
        };
        match number {
            Some(shard) => self.inner.seen.freshness((Role::Shard as i32, u64::from(shard)), began),
            None => Freshness::Member,
        }
    }

    /// Which member a read goes to that need not go to the leader.
    fn reader(&self, target: Target, how: How) -> Target {
        if how.freshness == Freshness::Leader {
            return target;
        }
        match self.inner.routes.reader(target.log(), self.inner.id, &target.members) {
            Some(endpoint) => {
                self.inner.runtime.note("client: any member is asked");
                Target { endpoint, ..target }
            }
            None => target,
        }
    }

    /// Whom a request is sent to next, after it failed where it was sent; true where that is known so well that it is sent at
    /// once.
    fn turn(&self, target: &Target, how: How, leader: Option<&Endpoint>, failed: &mut Vec<Endpoint>) -> bool {
        let routes = &self.inner.routes;
        // A node may go on naming a leader that is gone.
        let leader = leader.filter(|leader| !failed.contains(leader));
        // Before the registry's own turn: what any member may answer was asked of the one that reads are asked of.
        let is_kept = target.role == Role::Registry && mutants::is(Mutant::ReaderKept);
        let is_of_any =
            !how.admin && how.freshness != Freshness::Leader && target.members.len() > 1 && !is_kept;
        if leader.is_none() || is_of_any && !mutants::is(Mutant::FormerMembersKept) {
            failed.push(target.endpoint.clone());
        }
        // When all have been asked, the registry may know of others.
        if failed.len() >= target.members.len() || how.admin {
            failed.clear();
            routes.doubt();
        }
        if is_of_any {
            if target.role == Role::Registry
                && let Some(leader) = leader
            {
                // Others may have been put in the place of all that are known.
                self.inner.registries.learn(&[leader.to_string()]);
            }
            routes.turn_reader(target.log(), &target.endpoint, &target.members);
            return false;
        }
        if target.role == Role::Registry {
            let is_hinted = leader.is_some_and(|leader| self.inner.registries.lead(&target.endpoint, leader));
            if !is_hinted {
                self.inner.registries.turn_from(&target.endpoint);
            }
            return is_hinted;
        }
        if how.admin {
            return false;
        }
        match leader {
            Some(leader) => routes.lead(target.log(), &target.endpoint, leader),
            None => {
                routes.turn_from(target.log(), &target.endpoint, &target.members);
                false
            }
        }
    }

    async fn ask_until(
        &self,
        service: Service,
        body: Bytes,
        tag: Option<&ClientTag>,
        mut how: How,
        began: Began,
        at: &mut AnsweredAt,
    ) -> Result<Bytes, ClientError> {
        let clock = &self.inner.runtime.clock;
        let start = clock.monotonic();
        let mut backoff = Duration::from_millis(5);
        let (mut asked, mut tag) = (Asked::new(tag.is_some()), tag.copied());
        let (mut hints, mut failed) = (0, Vec::new());
        loop {
            let target = Box::pin(self.target(service)).await.map(|target| self.reader(target, how));
            let heard = match &target {
                Ok(target) => {
                    asked.sent(clock.steady());
                    let body = Body::Encoded(body.clone());
                    let heard = self.attempt(target, Lane::Metadata, tag, body, how).await;
                    // Only these clients look at it.
                    if self.inner.options.reads == Reads::Seen {
                        self.inner.seen.answered(target.log(), began, how.freshness, heard.at.position);
                    }
                    heard
                }
                Err(error) => Heard::nothing(error.clone()),
            };
            *at = heard.at;
            let error = match heard.result {
                Ok(answer) => {
                    if asked.maybe_done && asked.is_tagged {
                        self.inner.runtime.note("client: an answer after an unknown attempt");
                    }
                    return Ok(answer);
                }
                Err(error) => error,
            };
            let (was_sent, is_logged) = (target.is_ok(), heard.at.position != 0);
            let has_others = target.as_ref().is_ok_and(|target| target.members.len() > 1);
            let now = clock.steady();
            let verdict = asked.failed(Attempt { error: &error, was_sent, is_logged, has_others, now });
            if let Some(note) = verdict.note {
                self.inner.runtime.note(note);
            }
            let is_hinted = match &target {
                Ok(target) if verdict.look_again || verdict.again && how.freshness != Freshness::Leader => {
                    how.freshness = how.freshness.after(&error);
                    self.turn(target, how, heard.leader.as_ref(), &mut failed)
                }
                _ => false,
            };
            if verdict.renew
                && let Some(tag) = &mut tag
            {
                tag.issued_at = self.issue_time();
            }
            if !verdict.again || clock.monotonic() - start >= self.inner.options.patience {
                return Err(self.told(&asked, error, is_logged, verdict.again));
            }
            if is_hinted && hints < HINTS_AT_ONCE {
                self.inner.runtime.note("client: a hint is followed");
                hints += 1;
                continue;
            }
            hints = 0;
            backoff = self.back_off(backoff).await;
        }
    }

    /// What the caller is told of a request that is not asked again.
    fn told(&self, asked: &Asked, error: ClientError, is_logged: bool, may_get_better: bool) -> ClientError {
        self.inner.runtime.note(match may_get_better {
            true => "client: patience ended",
            false => "client: refused for good",
        });
        let (told, note) = asked.told(error, is_logged);
        if let Some(note) = note {
            self.inner.runtime.note(note);
        }
        told
    }

    /// Waits about that long, and says how long to wait the next time.
    async fn back_off(&self, backoff: Duration) -> Duration {
        let jitter = Duration::from_micros(self.inner.runtime.random.below(backoff.as_micros() as u64 + 1));
        self.inner.runtime.clock.sleep(backoff / 2 + jitter / 2).await;
        (backoff * 2).min(Duration::from_millis(500))
    }

    /// Asks the registry.
    pub async fn registry(&self, op: registry_request::Op) -> Result<RegistryReply, ClientError> {
        Ok(self.registry_at(op).await?.0)
    }

    async fn registry_at(
        &self,
        op: registry_request::Op,
    ) -> Result<(RegistryReply, AnsweredAt), ClientError> {
        let mutates = !operation::of_registry(&op).is_read();
        let body = Bytes::from(RegistryRequest { op: Some(op) }.encode_to_vec());
        let tag = if mutates { Some(self.tag().await?) } else { None };
        let (answer, at) = self.ask(Service::Registry, body, tag.as_ref().map(|t| &t.tag), false).await?;
        let reply = RegistryReply::decode(answer).map_err(|e| undecodable(e, tag.is_some()))?;
        Ok((reply, at))
    }

    /// Asks the CDC for a transaction, or what is in flight.
    pub async fn cdc(&self, op: cdc_request::Op) -> Result<CdcReply, ClientError> {
        let mutates = !operation::of_cdc(&op).is_read();
        let body = Bytes::from(CdcRequest { op: Some(op) }.encode_to_vec());
        let tag = if mutates { Some(self.tag().await?) } else { None };
        let answered = self.ask(Service::Cdc, body, tag.as_ref().map(|t| &t.tag), false).await;
        if mutates {
            self.inner.seen.transaction();
        }
        let (answer, _) = answered?;
        CdcReply::decode(answer).map_err(|e| undecodable(e, tag.is_some()))
    }

    /// Asks the shard that an operation is for. What changes something is done once, however often it must be asked.
    pub async fn shard(&self, op: shard_request::Op) -> Result<Reply, ClientError> {
        let (home, class) = operation::of_shard(&op);
        let slot = home.slot();
        match class {
            Class::Read => self.ask_shard(slot, op, None).await,
            Class::Change | Class::Release | Class::Step => {
                let tag = self.tag().await?;
                self.ask_shard(slot, op, Some(&tag.tag)).await
            }
        }
    }

    /// Sends a step of the cluster's own under a tag that it keeps itself.
    pub async fn shard_step(
        &self,
        op: shard_request::Op,
        tag: Option<&ClientTag>,
    ) -> Result<Reply, ClientError> {
        self.ask_shard(operation::of_shard(&op).0.slot(), op, tag).await
    }

    async fn ask_shard(
        &self,
        slot: Slot,
        op: shard_request::Op,
        tag: Option<&ClientTag>,
    ) -> Result<Reply, ClientError> {
        let body = Bytes::from(ShardRequest { op: Some(op) }.encode_to_vec());
        let (answer, _) = self.ask(Service::Slot(slot), body, tag, false).await?;
        let reply = ShardReply::decode(answer).map_err(|e| undecodable(e, tag.is_some()))?;
        reply.reply.ok_or_else(|| undecodable("a reply that this build does not know", tag.is_some()))
    }

    /// Asks a replica's administration: role 1 registry, 2 CDC, 3 shard `number`.
    pub async fn admin(
        &self,
        role: Role,
        number: u32,
        request: AdminRequest,
    ) -> Result<AdminReply, ClientError> {
        let service = match role {
            Role::Registry => Service::Registry,
            Role::Cdc => Service::Cdc,
            _ => Service::Shard(number),
        };
        let (answer, _) = self.ask(service, request.encode_to_vec().into(), None, true).await?;
        AdminReply::decode(answer).map_err(|_| ClientError::unexpected("an admin reply"))
    }

    /// As [`Client::admin`], of the replica at that address, whether it leads or follows.
    pub async fn admin_at(
        &self,
        address: Endpoint,
        role: Role,
        number: u32,
        request: AdminRequest,
    ) -> Result<AdminReply, ClientError> {
        let number = u64::from(number);
        let target = Target { endpoint: address, role, number, members: Vec::new(), incarnation: 0 };
        let body = Body::Encoded(request.encode_to_vec().into());
        let how = How { admin: true, freshness: Freshness::Leader, answer_bytes: 0 };
        if self.inner.options.keys.is_some() && self.inner.clock.highest() == Time(0) {
            // What shows that the key is there is good for a while by the cluster's time, which any answer tells.
            let status = AdminRequest { op: Some(admin_request::Op::Status(admin::Status::default())) };
            let status = Body::Encoded(status.encode_to_vec().into());
            self.attempt(&target, Lane::Metadata, None, status, how).await.result?;
        }
        let answer = self.attempt(&target, Lane::Metadata, None, body, how).await.result?;
        AdminReply::decode(answer).map_err(|_| ClientError::unexpected("an admin reply"))
    }

    /// One attempt at a block service; whoever asks has other blocks to turn to.
    pub(crate) async fn blocks(
        &self,
        address: &str,
        service: u64,
        op: blocks_request::Op,
    ) -> Result<BlocksReply, ClientError> {
        if address.is_empty() {
            return Err(ClientError::Unreachable(format!(
                "no address is known for block service {service:016x}"
            )));
        }
        let (endpoint, members) = (address.into(), Vec::new());
        let target = Target { endpoint, role: Role::Blocks, number: service, members, incarnation: 0 };
        let answer_bytes = match &op {
            blocks_request::Op::Read(read) => read.length as usize,
            blocks_request::Op::Write(_) | blocks_request::Op::Check(_) | blocks_request::Op::Erase(_) => 0,
        };
        let body = Body::Blocks(BlocksRequest { op: Some(op) });
        let how = How { admin: false, freshness: Freshness::Leader, answer_bytes };
        let answer = self.attempt(&target, Lane::Bulk, None, body, how).await.result?;
        BlocksReply::decode(answer).map_err(|_| ClientError::unexpected("a blocks reply"))
    }
}

#[cfg(test)]
mod tests;
