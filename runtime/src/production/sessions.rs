//! The gRPC network: one pipelined session per peer and lane, many frames in one message.
//!
//! A unary call reaches the same handler. Frames that wait together travel together, so under load the cost
//! of a gRPC message is shared; nothing waits for company. Both directions are bounded: a session that has
//! `IN_FLIGHT_MAX` requests unanswered stops reading until some are.

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
    DESCRIPTORS,
    limits::MESSAGE_BYTES_MAX,
    session::{
        Frame, Frames, Request, Response,
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

/// Requests of one session that may be unanswered at a time.
const IN_FLIGHT_MAX: usize = 4096;
/// Frames and bytes that travel in one message, unless a single frame is larger.
const MESSAGE_FRAMES_MAX: usize = 512;
const MESSAGE_BYTES_TARGET: usize = 1 << 20;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// A peer that does not answer a ping for this long is gone.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// How often callers that have given up are forgotten.
const SWEEP: Duration = Duration::from_secs(1);
/// HTTP/2 flow-control windows: large enough that a block never waits for a window update.
const WINDOW_BYTES: u32 = 16 << 20;
const FRAMES_BYTES_MAX: usize = MESSAGE_BYTES_MAX + MESSAGE_BYTES_TARGET + (1 << 20);

/// Sessions to every peer, opened when first used and again after they break.
pub struct GrpcNetwork {
    peers: Mutex<HashMap<(Endpoint, Lane), mpsc::Sender<Call>>>,
    own: Own,
}

/// What this network listens on itself: metadata requests to it need no wire.
type Own = Arc<Mutex<HashMap<Endpoint, Arc<dyn Handler>>>>;

struct Call {
    request: Bytes,
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
        let (sender, receiver) = mpsc::channel(IN_FLIGHT_MAX);
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
        self.own.lock().insert(endpoint.clone(), handler.clone());
        let service = SessionServer::new(SessionService { handler, stopped: stopped.clone() })
            .max_decoding_message_size(FRAMES_BYTES_MAX)
            .max_encoding_message_size(FRAMES_BYTES_MAX);
        let (reporter, health) = tonic_health::server::health_reporter();
        reporter.set_serving::<SessionServer<SessionService>>().await;
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
                .max_frame_size(1 << 20)
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
        Ok(Box::new(GrpcListening { endpoint, own: self.own.clone(), _stop: stop }))
    }

    async fn call(
        &self,
        to: &Endpoint,
        lane: Lane,
        request: Bytes,
        timeout: Duration,
    ) -> Result<Bytes, CallError> {
        let silence = || CallError::Unknown(to.clone(), format!("nothing within {timeout:?}"));
        // Blocks take the wire also here: it is what bounds how many are in memory.
        let own = (lane == Lane::Metadata).then(|| self.own.lock().get(to).cloned()).flatten();
        if let Some(handler) = own {
            return tokio::time::timeout(timeout, handler.handle(request)).await.map_err(|_| silence());
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
        self.own.lock().remove(&self.endpoint);
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
                        let _ = answer.send(Ok(frame.message));
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
            received = calls.recv_many(&mut batch, MESSAGE_FRAMES_MAX), if unsent.is_empty() && waiting.len() < IN_FLIGHT_MAX => {
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
        let (sender, receiver) = mpsc::channel(4);
        tokio::spawn(serve_session(self.handler.clone(), request.into_inner(), sender, self.stopped.clone()));
        Ok(tonic::Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn call(&self, request: tonic::Request<Request>) -> Result<tonic::Response<Response>, Status> {
        let answer = self.handler.handle(Bytes::from(request.into_inner().encode_to_vec())).await;
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
    answer: BoxFuture<Bytes>,
}

impl Future for Answering {
    type Output = Frame;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Frame> {
        let id = self.id;
        self.answer.as_mut().poll(context).map(|message| Frame { id, message })
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
    while open || !running.is_empty() {
        tokio::select! {
            biased;
            () = &mut stopped => return,
            Some(frame) = running.next(), if !running.is_empty() => {
                let mut bytes = frame.message.len();
                done.frames.push(frame);
                // Take along what is ready by now; the poll below never waits.
                while done.frames.len() < MESSAGE_FRAMES_MAX && bytes < MESSAGE_BYTES_TARGET {
                    match futures_util::FutureExt::now_or_never(running.next()).flatten() {
                        Some(frame) => {
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
            frames = incoming.next(), if open && running.len() < IN_FLIGHT_MAX => match frames {
                Some(Ok(frames)) if frames.frames.len() > MESSAGE_FRAMES_MAX => {
                    let text = format!("{} frames in one message; at most {MESSAGE_FRAMES_MAX} are allowed", frames.frames.len());
                    // The peer may be gone; the session ends in any case.
                    let _ = outgoing.send(Err(Status::invalid_argument(text))).await;
                    return;
                }
                Some(Ok(frames)) => for frame in frames.frames {
                    running.push(Answering { id: frame.id, answer: handler.handle(frame.message) });
                },
                Some(Err(_)) | None => open = false,
            }
        }
    }
}
