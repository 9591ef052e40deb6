//! The gRPC network: one pipelined session per peer and lane, many frames in one message.
//!
//! A unary call reaches the same handler. Frames that wait together travel together, so under load the cost
//! of a gRPC message is shared; nothing waits for company. Both directions are bounded: a session that has
//! `SESSION_REQUESTS_MAX` requests unanswered stops reading until some are answered, and what all sessions and calls hold
//! comes out of budgets (`admission`). A session of which something waits for memory says so to its peer by messages
//! without frames: time limits are for those who do not get on, not for those who queue.

use std::{
    collections::{HashMap, VecDeque},
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use clutch_proto::{
    DESCRIPTORS, Parts,
    limits::{
        CONNECTION_STREAMS_MAX, MESSAGE_BYTES_MAX, MESSAGE_FRAMES_MAX, SESSION_REQUESTS_MAX, SESSIONS_MAX,
    },
    parts::{Frame, Frames},
    session::{Request, Response},
    types::{Code, Error},
};
use futures_util::{Stream, StreamExt as _, stream::FuturesUnordered};
use parking_lot::Mutex;
use prost::Message as _;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming, body::Body, transport};

use self::service::{
    session_client::SessionClient,
    session_server::{SERVICE_NAME, Session, SessionServer},
};
use super::{
    admission::{AdmissionLayer, AnswerHeld, Budgets, LANE_BULK, LANE_HEADER, Share},
    peers,
    sockets::{self, Meter, Metered},
    streams::{Incoming, Outgoing, Sending},
};
use crate::{
    Answers, BoxFuture, CallError, Endpoint, Handled, Handler, Held, Lane, Listening, Network, PeerStream,
};

/// The service of `session.proto`, as generated.
#[allow(missing_docs, unreachable_pub, clippy::all)]
mod service {
    tonic::include_proto!("clutch.session.v1");
}

/// Bytes that travel in one message, unless a single frame is larger.
const MESSAGE_BYTES_TARGET: usize = 1 << 20;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// A peer that does not answer a ping for this long is gone.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// How often the health service asks whether requests are served.
const HEALTH: Duration = Duration::from_millis(500);
/// A session that was just being closed is opened anew; so often at most.
const SESSIONS_TRIED_MAX: usize = 3;
/// How often callers that have given up are forgotten.
const SWEEP: Duration = Duration::from_secs(1);
/// What the peer may send before it is read: on a server, where there are many sessions, so little that all together stay
/// small; a client has few.
const SERVER_WINDOW_BYTES: u32 = 320 << 10;
const CLIENT_WINDOW_BYTES: u32 = 16 << 20;
/// HTTP/2 frames: sixteen KiB at a time, as by default, cost too much, and a server has one of them in memory for each
/// connection.
const SERVER_FRAME_BYTES_MAX: u32 = 128 << 10;
const CLIENT_FRAME_BYTES_MAX: u32 = 1 << 20;
/// A session on which nothing was asked for so long ends: on the client's side first.
const CLIENT_IDLE: Duration = Duration::from_secs(60);
const SERVER_IDLE: Duration = Duration::from_secs(600);
/// How often a peer is told that something of its session waits for memory.
const NOTICE: Duration = Duration::from_millis(250);
const NOTICE_RESTING: Duration = Duration::from_secs(2);
/// With so many messages of answers that a peer has not taken, nothing more is read from it.
const MADE_MAX: usize = 4;
/// A time limit is looked at in so many parts.
const LIMIT_PARTS: u32 = 4;
/// For so many time limits at most a call queues: what holds the peer's memory may never end.
const QUEUED_LIMITS_MAX: u32 = 12;
/// A way on which less moves in a part of a time limit does not get on.
const GETS_ON_BYTES: u64 = 16 << 10;
pub(super) const FRAMES_BYTES_MAX: usize = MESSAGE_BYTES_MAX + MESSAGE_BYTES_TARGET + (1 << 20);

/// Sessions to every peer, opened when first used and again after they break.
pub struct GrpcNetwork {
    peers: Mutex<HashMap<(Endpoint, Lane), Arc<Way>>>,
    own: Own,
}

/// A session as its callers see it.
struct Way {
    calls: mpsc::Sender<Call>,
    progress: Arc<Progress>,
}

/// Whether a session gets on.
#[derive(Default)]
struct Progress {
    meter: Arc<Meter>,
    /// Bytes of requests that are not answered, and of their answers.
    asked: AtomicU64,
    /// How often the peer said that something waits there.
    notices: AtomicU64,
}

/// Bytes that were asked for, as long as they are.
struct Asked<'a>(&'a AtomicU64, u64);

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(self.1, Ordering::Relaxed);
    }
}

impl Progress {
    /// Completes when the call that begins now has not got on for `timeout`: neither it nor what was asked for before.
    async fn ends(&self, bytes: u64, timeout: Duration) {
        let goal = self.meter.moved() + self.asked.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let _asked = Asked(&self.asked, bytes);
        let (mut standing, mut queued) = (0, 0);
        let (mut moved, mut notices) = (self.meter.moved(), self.notices.load(Ordering::Relaxed));
        while standing < LIMIT_PARTS {
            tokio::time::sleep(timeout / LIMIT_PARTS).await;
            let (moved_now, notices_now) = (self.meter.moved(), self.notices.load(Ordering::Relaxed));
            let is_queued = notices_now != notices && queued < QUEUED_LIMITS_MAX * LIMIT_PARTS;
            queued += u32::from(is_queued);
            let gets_on = is_queued || moved < goal && moved_now - moved >= GETS_ON_BYTES;
            standing = if gets_on { 0 } else { standing + 1 };
            (moved, notices) = (moved_now, notices_now);
        }
    }
}

/// What this network listens on itself: metadata requests to it need no wire.
type Own = Arc<Mutex<HashMap<Endpoint, OwnListener>>>;

#[derive(Clone)]
struct OwnListener {
    handler: Arc<dyn Handler>,
    /// As many requests at a time as a session may have.
    requests: Arc<tokio::sync::Semaphore>,
}

struct Call {
    request: Parts,
    answer: oneshot::Sender<Result<Bytes, Ended>>,
}

/// Why a session has no answer.
#[derive(Clone)]
enum Ended {
    /// Nothing was sent.
    NotSent(String),
    /// It was sent, or a part of it.
    Unknown(String),
    /// Nothing was sent, because the session was just being closed after nobody had used it: another will do.
    Unused(Parts),
}

impl GrpcNetwork {
    /// A network without sessions.
    pub fn new() -> GrpcNetwork {
        GrpcNetwork { peers: Mutex::default(), own: Own::default() }
    }

    fn session(&self, to: &Endpoint, lane: Lane) -> Arc<Way> {
        let mut peers = self.peers.lock();
        if let Some(way) = peers.get(&(to.clone(), lane)).filter(|way| !way.calls.is_closed()) {
            return way.clone();
        }
        let (calls, receiver) = mpsc::channel(SESSION_REQUESTS_MAX);
        let way = Arc::new(Way { calls, progress: Arc::default() });
        peers.insert((to.clone(), lane), way.clone());
        tokio::spawn(run_session(to.clone(), lane, receiver, way.progress.clone()));
        way
    }
}

impl Default for GrpcNetwork {
    fn default() -> GrpcNetwork {
        GrpcNetwork::new()
    }
}

#[async_trait]
impl Network for GrpcNetwork {
    async fn listen(&self, at: &Endpoint, handler: Arc<dyn Handler>) -> io::Result<Box<dyn Listening>> {
        let listener = tokio::net::TcpListener::bind(&*at.0)
            .await
            .map_err(|e| io::Error::new(e.kind(), format!("listen on {at}: {e}")))?;
        let endpoint = Endpoint::from(listener.local_addr()?.to_string().as_str());
        let (stop, stopped) = watch::channel(());
        let own_listener = OwnListener {
            handler: handler.clone(),
            requests: Arc::new(tokio::sync::Semaphore::new(SESSION_REQUESTS_MAX)),
        };
        let sessions = Arc::new(tokio::sync::Semaphore::new(SESSIONS_MAX));
        let (asked, accepting, stopping) = (handler.clone(), handler.clone(), stopped.clone());
        let service = SessionService { handler, stopped: stopped.clone(), sessions };
        let layer = AdmissionLayer(Budgets::new(), service.clone());
        let service = SessionServer::new(service)
            .max_decoding_message_size(FRAMES_BYTES_MAX)
            .max_encoding_message_size(FRAMES_BYTES_MAX);
        let (reporter, health) = tonic_health::server::health_reporter();
        tokio::spawn(report_health(asked, reporter, stopped.clone()));
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTORS)
            .build_v1()
            .map_err(io::Error::other)?;
        let take_stream: sockets::TakeStream = Arc::new(move |stream| {
            let (handler, stopped) = (accepting.clone(), stopping.clone());
            Box::pin(async move {
                match peers::accept(stream, ended(stopped)).await {
                    Ok((stream, ends)) => {
                        handler.accept(stream);
                        ends.await;
                    }
                    Err(error) => tracing::debug!(%error, "a stream between nodes does not come about"),
                }
            })
        });
        let incoming = sockets::accept(listener, sockets::connections_max(SESSIONS_MAX), take_stream);
        tokio::spawn(async move {
            let server = transport::Server::builder()
                .layer(layer)
                .initial_stream_window_size(SERVER_WINDOW_BYTES)
                .initial_connection_window_size(SERVER_WINDOW_BYTES)
                .max_frame_size(SERVER_FRAME_BYTES_MAX)
                .max_concurrent_streams(CONNECTION_STREAMS_MAX)
                .http2_keepalive_interval(Some(KEEP_ALIVE))
                .http2_keepalive_timeout(Some(KEEP_ALIVE))
                .add_service(service)
                .add_service(health)
                .add_service(reflection)
                .serve_with_incoming_shutdown(incoming, ended(stopped));
            if let Err(error) = server.await {
                tracing::error!(%error, "serve sessions");
            }
        });
        let requests = own_listener.requests.clone();
        self.own.lock().insert(endpoint.clone(), own_listener);
        Ok(Box::new(GrpcListening { endpoint, own: self.own.clone(), requests, _stop: stop }))
    }

    async fn call(
        &self,
        to: &Endpoint,
        lane: Lane,
        mut request: Parts,
        answer_bytes: usize,
        timeout: Duration,
    ) -> Result<Bytes, CallError> {
        let silence = || CallError::Unknown(to.clone(), format!("nothing within {timeout:?}"));
        // Blocks take the wire also here: it is what bounds how many are in memory.
        let own = (lane == Lane::Metadata).then(|| self.own.lock().get(to).cloned()).flatten();
        if let Some(OwnListener { handler, requests }) = own {
            let answer = async {
                // Never closed; without a permit it would only be less bounded.
                let _permit = requests.acquire().await;
                handler.handle(request.joined(), Answers::unbounded()).await.answer.joined()
            };
            return tokio::time::timeout(timeout, answer).await.map_err(|_| silence());
        }
        let bytes = (request.len() + answer_bytes) as u64;
        for _ in 0..SESSIONS_TRIED_MAX {
            let way = self.session(to, lane);
            let exchange = async {
                let (answer, answered) = oneshot::channel();
                match way.calls.send(Call { request, answer }).await {
                    Err(mpsc::error::SendError(call)) => Err(Ended::Unused(call.request)),
                    Ok(()) => {
                        answered.await.unwrap_or_else(|_| Err(Ended::Unknown("the session ended".into())))
                    }
                }
            };
            let ended = tokio::select! {
                biased;
                exchanged = exchange => exchanged,
                () = way.progress.ends(bytes, timeout) => return Err(silence()),
            };
            request = match ended {
                Ok(answer) => return Ok(answer),
                Err(Ended::NotSent(reason)) => return Err(CallError::NotSent(to.clone(), reason)),
                Err(Ended::Unknown(reason)) => return Err(CallError::Unknown(to.clone(), reason)),
                Err(Ended::Unused(request)) => request,
            };
        }
        Err(CallError::NotSent(to.clone(), "the session ended".into()))
    }

    async fn open(&self, to: &Endpoint) -> io::Result<PeerStream> {
        peers::open(to).await
    }

    fn separate(&self) -> Option<Arc<dyn Network>> {
        Some(Arc::new(GrpcNetwork::new()))
    }
}

struct GrpcListening {
    endpoint: Endpoint,
    own: Own,
    /// Tells its own entry from one that came later.
    requests: Arc<tokio::sync::Semaphore>,
    /// Dropping it ends the sessions.
    _stop: watch::Sender<()>,
}

impl Listening for GrpcListening {
    fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }
}

impl Drop for GrpcListening {
    fn drop(&mut self) {
        let mut own = self.own.lock();
        if own.get(&self.endpoint).is_some_and(|listener| Arc::ptr_eq(&listener.requests, &self.requests)) {
            own.remove(&self.endpoint);
        }
    }
}

/// Keeps the standard health service truthful, for the whole server and for the session service, until the listener goes.
async fn report_health(
    handler: Arc<dyn Handler>,
    reporter: tonic_health::server::HealthReporter,
    stopped: watch::Receiver<()>,
) {
    let mut stopped = std::pin::pin!(ended(stopped));
    let mut ticks = tokio::time::interval(HEALTH);
    loop {
        tokio::select! {
            () = &mut stopped => return,
            _ = ticks.tick() => {}
        }
        let status = match handler.is_serving() {
            true => tonic_health::ServingStatus::Serving,
            false => tonic_health::ServingStatus::NotServing,
        };
        let session = <SessionServer<SessionService> as tonic::server::NamedService>::NAME;
        for service in ["", session] {
            reporter.set_service_status(service, status).await;
        }
    }
}

/// Owns one session: connects, then moves frames until either side ends.
async fn run_session(to: Endpoint, lane: Lane, mut calls: mpsc::Receiver<Call>, progress: Arc<Progress>) {
    let (outgoing, outgoing_frames) = mpsc::channel::<Frames>(1);
    let opening = open(&to, lane, progress.meter.clone(), outgoing_frames);
    let opened = tokio::time::timeout(CONNECT_TIMEOUT, opening).await;
    let mut incoming = match opened.unwrap_or_else(|_| Err(format!("nothing within {CONNECT_TIMEOUT:?}"))) {
        Ok(incoming) => incoming,
        Err(reason) => {
            calls.close();
            while let Some(call) = calls.recv().await {
                // A caller that gave up needs no answer.
                let _ = call.answer.send(Err(Ended::NotSent(reason.clone())));
            }
            return;
        }
    };
    let mut waiting: HashMap<u64, oneshot::Sender<Result<Bytes, Ended>>> = HashMap::new();
    let next_id = AtomicU64::new(1);
    let mut batch = Vec::new();
    // Answers are read also while the peer takes no requests: two sides that only send would wait for ever.
    let mut unsent: VecDeque<Frames> = VecDeque::new();
    let mut sweep = tokio::time::interval(SWEEP);
    let mut used = tokio::time::Instant::now();
    let mut is_unused = false;
    let reason = loop {
        tokio::select! {
            biased;
            now = sweep.tick() => {
                waiting.retain(|_, answer| !answer.is_closed());
                if !waiting.is_empty() || !unsent.is_empty() {
                    used = now;
                } else if now.saturating_duration_since(used) > CLIENT_IDLE {
                    is_unused = true;
                    break "nobody used the session".to_owned();
                }
            }
            frames = incoming.next() => match frames {
                Some(Ok(frames)) if frames.frames.is_empty() => {
                    progress.notices.fetch_add(1, Ordering::Relaxed);
                }
                Some(Ok(frames)) => for frame in frames.frames {
                    if let Some(answer) = waiting.remove(&frame.id) {
                        let _ = answer.send(Ok(frame.message.joined()));
                    }
                },
                Some(Err(status)) => break status.message().to_owned(),
                None => break "the peer closed the session".to_owned(),
            },
            permit = outgoing.reserve(), if !unsent.is_empty() => match permit {
                Ok(permit) => if let Some(message) = unsent.pop_front() {
                    permit.send(message);
                },
                Err(_) => break "the peer closed the session".to_owned(),
            },
            received = calls.recv_many(&mut batch, MESSAGE_FRAMES_MAX), if unsent.is_empty() && waiting.len() < SESSION_REQUESTS_MAX => {
                if received == 0 {
                    break "the network was closed".to_owned();
                }
                used = tokio::time::Instant::now();
                let mut frames = Frames::default();
                let mut bytes = 0;
                for call in batch.drain(..) {
                    if call.answer.is_closed() {
                        continue;
                    }
                    let id = next_id.fetch_add(1, Ordering::Relaxed);
                    bytes += call.request.len();
                    frames.frames.push(Frame { id, message: call.request });
                    waiting.insert(id, call.answer);
                    if bytes > MESSAGE_BYTES_TARGET {
                        unsent.push_back(std::mem::take(&mut frames));
                        bytes = 0;
                    }
                }
                if !frames.frames.is_empty() {
                    frames.pad();
                    unsent.push_back(frames);
                }
            }
        }
    };
    calls.close();
    for (_, answer) in waiting {
        let _ = answer.send(Err(Ended::Unknown(reason.clone())));
    }
    while let Some(Call { request, answer }) = calls.recv().await {
        let ended = if is_unused { Ended::Unused(request) } else { Ended::NotSent(reason.clone()) };
        let _ = answer.send(Err(ended));
    }
}

/// Opens connections whose bytes are counted.
struct Connector {
    to: Endpoint,
    meter: Arc<Meter>,
}

impl tower::Service<http::Uri> for Connector {
    type Response = hyper_util::rt::TokioIo<Metered>;
    type Error = io::Error;
    type Future = BoxFuture<io::Result<Self::Response>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: http::Uri) -> Self::Future {
        let (to, meter) = (self.to.clone(), self.meter.clone());
        Box::pin(async move {
            let stream = tokio::net::TcpStream::connect(&*to.0).await?;
            stream.set_nodelay(true)?;
            Ok(hyper_util::rt::TokioIo::new(Metered::new(stream, meter)))
        })
    }
}

async fn open(
    to: &Endpoint,
    lane: Lane,
    meter: Arc<Meter>,
    outgoing: mpsc::Receiver<Frames>,
) -> Result<Streaming<Frames>, String> {
    let channel = transport::Endpoint::from_shared(format!("http://{to}"))
        .map_err(|e| format!("not an address: {e}"))?
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .initial_stream_window_size(CLIENT_WINDOW_BYTES)
        .initial_connection_window_size(CLIENT_WINDOW_BYTES)
        .max_frame_size(CLIENT_FRAME_BYTES_MAX)
        .connect_with_connector(Connector { to: to.clone(), meter })
        .await
        .map_err(|e| source_of(&e))?;
    let mut client = SessionClient::new(channel)
        .max_decoding_message_size(FRAMES_BYTES_MAX)
        .max_encoding_message_size(FRAMES_BYTES_MAX);
    let mut request = tonic::Request::new(ReceiverStream::new(outgoing));
    if lane == Lane::Bulk {
        request.metadata_mut().insert(LANE_HEADER, tonic::metadata::MetadataValue::from_static(LANE_BULK));
    }
    let opened = client.open(request).await.map_err(|s| s.message().to_owned())?;
    Ok(opened.into_inner())
}

/// The innermost cause: tonic's own text is "transport error".
fn source_of(error: &dyn std::error::Error) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}

/// The server side of sessions and unary calls.
#[derive(Clone)]
pub(super) struct SessionService {
    handler: Arc<dyn Handler>,
    stopped: watch::Receiver<()>,
    /// One permit for each session that may begin.
    sessions: Arc<tokio::sync::Semaphore>,
}

/// Whether a request opens a session.
pub(super) fn opens_session(path: &str) -> bool {
    let method = path.strip_prefix('/').and_then(|path| path.strip_prefix(SERVICE_NAME));
    method == Some("/Open")
}

impl SessionService {
    /// Serves a session on the body of its request; the body of its response.
    pub(super) fn open_stream(&self, body: Body, share: Share) -> Result<Body, Status> {
        let permit = self.sessions.clone().try_acquire_owned().map_err(|_| {
            Status::resource_exhausted(format!(
                "{SESSIONS_MAX} sessions are open; close some, or try again later"
            ))
        })?;
        let (sender, answers) = mpsc::channel(4);
        let incoming = Incoming::new(body, share.clone());
        let session = serve_session(self.handler.clone(), share, incoming, sender, self.stopped.clone());
        tokio::spawn(async move {
            session.await;
            drop(permit);
        });
        Ok(Body::new(Outgoing::new(answers)))
    }
}

/// Completes when the listener is dropped.
async fn ended(mut stopped: watch::Receiver<()>) {
    while stopped.changed().await.is_ok() {}
}

#[async_trait]
impl Session for SessionService {
    type OpenStream = Pin<Box<dyn Stream<Item = Result<Frames, Status>> + Send>>;

    /// The layer below takes these: see [`SessionService::open_stream`].
    async fn open(
        &self,
        _: tonic::Request<Streaming<Frames>>,
    ) -> Result<tonic::Response<Self::OpenStream>, Status> {
        Err(no_share())
    }

    async fn call(&self, request: tonic::Request<Request>) -> Result<tonic::Response<Response>, Status> {
        let share = request.extensions().get::<Share>().cloned().ok_or_else(no_share)?;
        let held = share.take();
        let request = Bytes::from(request.into_inner().encode_to_vec());
        let handled = self.handler.handle(request, share.answers.clone()).await;
        let response = Response::decode(handled.answer.joined()).unwrap_or_else(|e| Response {
            error: Some(Error { code: Code::ReplicaFault as i32, detail: format!("decode own answer: {e}") }),
            ..Response::default()
        });
        let mut response = tonic::Response::new(response);
        response.extensions_mut().insert(AnswerHeld::new(held, handled.held));
        Ok(response)
    }
}

/// Every request comes through the layer that adds it.
fn no_share() -> Status {
    Status::internal("a request without its share of the memory")
}

/// The answer to one frame in the making.
struct Answering {
    id: u64,
    /// What the message that the request came in holds, until all in it are answered.
    _request: Arc<Held>,
    answer: BoxFuture<Handled>,
}

impl Future for Answering {
    type Output = (Frame, Held);

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<(Frame, Held)> {
        let id = self.id;
        let handled = self.answer.as_mut().poll(context);
        handled.map(|Handled { answer: message, held }| (Frame { id, message }, held))
    }
}

async fn serve_session(
    handler: Arc<dyn Handler>,
    share: Share,
    mut incoming: Incoming,
    outgoing: mpsc::Sender<Result<Sending, Status>>,
    stopped: watch::Receiver<()>,
) {
    let mut stopped = std::pin::pin!(ended(stopped));
    let mut running: FuturesUnordered<Answering> = FuturesUnordered::new();
    let mut open = true;
    // Why the peer's messages are not read any more; it is told when what it asked before is answered.
    let mut refused = None;
    let message = |frames, held| Sending { frames, held, owed: share.meter.owe() };
    // Answers that are made while the peer takes none: whoever waits for memory is asked on meanwhile, or it would be kept
    // for somebody who does not take it.
    let mut made: VecDeque<Sending> = VecDeque::new();
    let mut tick = std::pin::pin!(tokio::time::sleep(NOTICE));
    let mut used = tokio::time::Instant::now();
    while open || !running.is_empty() || !made.is_empty() {
        tokio::select! {
            biased;
            () = &mut stopped => return,
            () = outgoing.closed() => return,
            () = &mut tick => {
                let now = tokio::time::Instant::now();
                // A peer whose answers are not taken needs no notice.
                if made.is_empty() && share.is_waiting() && let Ok(place) = outgoing.try_reserve() {
                    place.send(Ok(message(Frames::default(), Vec::new())));
                }
                let is_used = !running.is_empty() || !made.is_empty() || !incoming.is_resting();
                // Sessions that rest, of which there may be thousands, look seldom.
                tick.as_mut().reset(now + if is_used { NOTICE } else { NOTICE_RESTING });
                if is_used {
                    used = now;
                } else if now.saturating_duration_since(used) > SERVER_IDLE {
                    return;
                }
            }
            place = outgoing.reserve(), if !made.is_empty() => match place {
                Ok(place) => if let Some(message) = made.pop_front() {
                    place.send(Ok(message));
                },
                Err(_) => return,
            },
            Some((frame, held)) = running.next(), if !running.is_empty() => {
                let mut bytes = frame.message.len();
                let mut done = (Frames::new(vec![frame]), vec![held]);
                // Take along what is ready by now; the poll below never waits.
                while done.1.len() < MESSAGE_FRAMES_MAX && bytes < MESSAGE_BYTES_TARGET {
                    match futures_util::FutureExt::now_or_never(running.next()).flatten() {
                        Some((frame, held)) => {
                            bytes += frame.message.len();
                            done.0.frames.push(frame);
                            done.1.push(held);
                        }
                        None => break,
                    }
                }
                let (frames, held) = done;
                made.push_back(message(frames, held));
            }
            frames = incoming.next(), if open && running.len() < SESSION_REQUESTS_MAX && made.len() < MADE_MAX => match frames {
                Some(Ok((frames, held))) => {
                    used = tokio::time::Instant::now();
                    let request = Arc::new(held);
                    for frame in frames.frames {
                        let answer = handler.handle(frame.message.joined(), share.answers.clone());
                        running.push(Answering { id: frame.id, _request: request.clone(), answer });
                    }
                }
                Some(Err(status)) => (open, refused) = (false, Some(status)),
                None => open = false,
            }
        }
    }
    if let Some(status) = refused {
        // The peer may be gone.
        let _ = outgoing.send(Err(status)).await;
    }
}
