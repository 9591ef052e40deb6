//! The gRPC network: one pipelined session per peer and lane, many frames in one message.
//!
//! A unary call reaches the same handler. Frames that wait together travel together, so under load the cost
//! of a gRPC message is shared; nothing waits for company. Both directions are bounded: a session that has
//! `SESSION_REQUESTS_MAX` requests or `SESSION_BYTES_MAX` bytes unanswered stops reading until some are answered.

use std::{
    collections::HashMap,
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
        CONNECTION_STREAMS_MAX, MESSAGE_BYTES_MAX, MESSAGE_FRAMES_MAX, SESSION_BYTES_MAX,
        SESSION_REQUESTS_MAX, SESSIONS_MAX,
    },
    parts::{Frame, Frames},
    session::{
        Request, Response,
        session_client::SessionClient,
        session_server::{Session, SessionServer},
    },
    types::{Code, Error},
};
use futures_util::{Stream, StreamExt as _, stream::FuturesUnordered};
use parking_lot::Mutex;
use prost::Message as _;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Status, Streaming, transport};

use crate::{BoxFuture, CallError, Endpoint, Handler, Lane, Listening, Network};

/// Bytes that travel in one message, unless a single frame is larger.
const MESSAGE_BYTES_TARGET: usize = 1 << 20;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// A peer that does not answer a ping for this long is gone.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// How often the health service asks whether requests are served.
const HEALTH: Duration = Duration::from_millis(500);
/// How often callers that have given up are forgotten.
const SWEEP: Duration = Duration::from_secs(1);
/// HTTP/2 flow-control windows: large enough that a block never waits for a window update.
const WINDOW_BYTES: u32 = 16 << 20;
/// HTTP/2 frames as large as the messages: sixteen KiB at a time would cost more than the bytes.
const FRAME_BYTES_MAX: u32 = 1 << 20;
const FRAMES_BYTES_MAX: usize = MESSAGE_BYTES_MAX + MESSAGE_BYTES_TARGET + (1 << 20);

/// Sessions to every peer, opened when first used and again after they break.
pub struct GrpcNetwork {
    peers: Mutex<HashMap<(Endpoint, Lane), mpsc::Sender<Call>>>,
    own: Own,
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
    answer: oneshot::Sender<Result<Bytes, CallError>>,
}

impl GrpcNetwork {
    /// A network without sessions.
    pub fn new() -> GrpcNetwork {
        GrpcNetwork { peers: Mutex::default(), own: Own::default() }
    }

    fn session(&self, to: &Endpoint, lane: Lane) -> mpsc::Sender<Call> {
        let mut peers = self.peers.lock();
        if let Some(sender) = peers.get(&(to.clone(), lane)).filter(|s| !s.is_closed()) {
            return sender.clone();
        }
        let (sender, receiver) = mpsc::channel(SESSION_REQUESTS_MAX);
        peers.insert((to.clone(), lane), sender.clone());
        tokio::spawn(run_session(to.clone(), receiver));
        sender
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
        let asked = handler.clone();
        let service = SessionServer::new(SessionService { handler, stopped: stopped.clone(), sessions })
            .max_decoding_message_size(FRAMES_BYTES_MAX)
            .max_encoding_message_size(FRAMES_BYTES_MAX);
        let (reporter, health) = tonic_health::server::health_reporter();
        tokio::spawn(report_health(asked, reporter, stopped.clone()));
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTORS)
            .build_v1()
            .map_err(io::Error::other)?;
        let incoming = TcpListenerStream::new(listener).map(|stream| {
            stream.inspect(|s| {
                // Small answers must not wait for more; failing to say so only costs latency.
                let _ = s.set_nodelay(true);
            })
        });
        tokio::spawn(async move {
            let server = transport::Server::builder()
                .initial_stream_window_size(WINDOW_BYTES)
                .initial_connection_window_size(WINDOW_BYTES)
                .max_frame_size(FRAME_BYTES_MAX)
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
        request: Parts,
        timeout: Duration,
    ) -> Result<Bytes, CallError> {
        let silence = || CallError::Unknown(to.clone(), format!("nothing within {timeout:?}"));
        // Blocks take the wire also here: it is what bounds how many are in memory.
        let own = (lane == Lane::Metadata).then(|| self.own.lock().get(to).cloned()).flatten();
        if let Some(OwnListener { handler, requests }) = own {
            let answer = async {
                // Never closed; without a permit it would only be less bounded.
                let _permit = requests.acquire().await;
                handler.handle(request.joined()).await.joined()
            };
            return tokio::time::timeout(timeout, answer).await.map_err(|_| silence());
        }
        let (answer, answered) = oneshot::channel();
        let session = self.session(to, lane);
        let exchange = async {
            if session.send(Call { request, answer }).await.is_err() {
                return Err(CallError::NotSent(to.clone(), "the session ended".into()));
            }
            answered.await.unwrap_or_else(|_| Err(CallError::Unknown(to.clone(), "the session ended".into())))
        };
        tokio::time::timeout(timeout, exchange).await.unwrap_or_else(|_| Err(silence()))
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
async fn run_session(to: Endpoint, mut calls: mpsc::Receiver<Call>) {
    let (outgoing, outgoing_frames) = mpsc::channel::<Frames>(4);
    let opened = tokio::time::timeout(CONNECT_TIMEOUT, open(&to, outgoing_frames)).await;
    let mut incoming = match opened.unwrap_or_else(|_| Err(format!("nothing within {CONNECT_TIMEOUT:?}"))) {
        Ok(incoming) => incoming,
        Err(reason) => {
            calls.close();
            while let Some(call) = calls.recv().await {
                // A caller that gave up needs no answer.
                let _ = call.answer.send(Err(CallError::NotSent(to.clone(), reason.clone())));
            }
            return;
        }
    };
    let mut waiting: HashMap<u64, oneshot::Sender<Result<Bytes, CallError>>> = HashMap::new();
    let next_id = AtomicU64::new(1);
    let mut batch = Vec::new();
    // Answers are read also while the peer takes no requests: two sides that only send would wait for ever.
    let mut unsent: std::collections::VecDeque<Frames> = std::collections::VecDeque::new();
    let mut sweep = tokio::time::interval(SWEEP);
    let reason = loop {
        tokio::select! {
            biased;
            _ = sweep.tick() => waiting.retain(|_, answer| !answer.is_closed()),
            frames = incoming.next() => match frames {
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
                    unsent.push_back(frames);
                }
            }
        }
    };
    calls.close();
    for (_, answer) in waiting {
        let _ = answer.send(Err(CallError::Unknown(to.clone(), reason.clone())));
    }
    while let Some(call) = calls.recv().await {
        let _ = call.answer.send(Err(CallError::NotSent(to.clone(), reason.clone())));
    }
}

async fn open(to: &Endpoint, outgoing: mpsc::Receiver<Frames>) -> Result<Streaming<Frames>, String> {
    let channel = transport::Endpoint::from_shared(format!("http://{to}"))
        .map_err(|e| format!("not an address: {e}"))?
        .tcp_nodelay(true)
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES_MAX)
        .connect()
        .await
        .map_err(|e| source_of(&e))?;
    let mut client = SessionClient::new(channel)
        .max_decoding_message_size(FRAMES_BYTES_MAX)
        .max_encoding_message_size(FRAMES_BYTES_MAX);
    let opened = client.open(ReceiverStream::new(outgoing)).await.map_err(|s| s.message().to_owned())?;
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
struct SessionService {
    handler: Arc<dyn Handler>,
    stopped: watch::Receiver<()>,
    /// One permit for each session that may begin.
    sessions: Arc<tokio::sync::Semaphore>,
}

/// Completes when the listener is dropped.
async fn ended(mut stopped: watch::Receiver<()>) {
    while stopped.changed().await.is_ok() {}
}

#[async_trait]
impl Session for SessionService {
    type OpenStream = Pin<Box<dyn Stream<Item = Result<Frames, Status>> + Send>>;

    async fn open(
        &self,
        request: tonic::Request<Streaming<Frames>>,
    ) -> Result<tonic::Response<Self::OpenStream>, Status> {
        let permit = self.sessions.clone().try_acquire_owned().map_err(|_| {
            Status::resource_exhausted(format!(
                "{SESSIONS_MAX} sessions are open; close some, or try again later"
            ))
        })?;
        let (sender, receiver) = mpsc::channel(4);
        let session = serve_session(self.handler.clone(), request.into_inner(), sender, self.stopped.clone());
        tokio::spawn(async move {
            session.await;
            drop(permit);
        });
        Ok(tonic::Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn call(&self, request: tonic::Request<Request>) -> Result<tonic::Response<Response>, Status> {
        let answer = self.handler.handle(Bytes::from(request.into_inner().encode_to_vec())).await.joined();
        let response = Response::decode(answer).unwrap_or_else(|e| Response {
            error: Some(Error { code: Code::ReplicaFault as i32, detail: format!("decode own answer: {e}") }),
            ..Response::default()
        });
        Ok(tonic::Response::new(response))
    }
}

/// The answer to one frame in the making.
struct Answering {
    id: u64,
    /// Bytes of the request.
    weight: usize,
    answer: BoxFuture<Parts>,
}

impl Future for Answering {
    type Output = (Frame, usize);

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<(Frame, usize)> {
        let (id, weight) = (self.id, self.weight);
        self.answer.as_mut().poll(context).map(|message| (Frame { id, message }, weight))
    }
}

async fn serve_session(
    handler: Arc<dyn Handler>,
    mut incoming: Streaming<Frames>,
    outgoing: mpsc::Sender<Result<Frames, Status>>,
    stopped: watch::Receiver<()>,
) {
    let mut stopped = std::pin::pin!(ended(stopped));
    let mut running: FuturesUnordered<Answering> = FuturesUnordered::new();
    let mut done = Frames::default();
    let mut open = true;
    // Why the peer's messages are not read any more; it is told when what it asked before is answered.
    let mut refused = None;
    // Bytes of the requests that are running.
    let mut held = 0;
    while open || !running.is_empty() {
        tokio::select! {
            biased;
            () = &mut stopped => return,
            Some((frame, weight)) = running.next(), if !running.is_empty() => {
                held -= weight;
                let mut bytes = frame.message.len();
                done.frames.push(frame);
                // Take along what is ready by now; the poll below never waits.
                while done.frames.len() < MESSAGE_FRAMES_MAX && bytes < MESSAGE_BYTES_TARGET {
                    match futures_util::FutureExt::now_or_never(running.next()).flatten() {
                        Some((frame, weight)) => {
                            held -= weight;
                            bytes += frame.message.len();
                            done.frames.push(frame);
                        }
                        None => break,
                    }
                }
                if outgoing.send(Ok(std::mem::take(&mut done))).await.is_err() {
                    return;
                }
            }
            frames = incoming.next(), if open && running.len() < SESSION_REQUESTS_MAX && held < SESSION_BYTES_MAX => match frames {
                Some(Ok(frames)) => for frame in frames.frames {
                    let weight = frame.message.len();
                    held += weight;
                    running.push(Answering { id: frame.id, weight, answer: handler.handle(frame.message.joined()) });
                },
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
