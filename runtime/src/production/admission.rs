//! No message is taken in before there is memory for it, and none stays there half for ever.
//!
//! A layer around the gRPC services reads the length before each message and waits for so many bytes of the node's budget;
//! meanwhile nothing of the message is read, and flow control holds its sender up. What was held is handed to whoever
//! handles the message, in order, and is given back when it is answered. Large messages and small ones have
//! budgets of their own, so that requests for metadata never wait for blocks.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, Bytes};
use clutch_proto::limits::METADATA_REQUEST_BYTES_MAX;
use http_body::{Frame, SizeHint};
use parking_lot::Mutex;
use tokio::time::{Instant, Sleep};
use tonic::{Status, body::Body};

use super::{
    sessions::{FRAMES_BYTES_MAX, SessionService, opens_session},
    sockets::{Counted, Meter, STALLED_MAX},
};
use crate::{Answers, BoxFuture, Budget, Held};

/// So much of a message comes at least in the time that it may stand.
const CAME_MIN: usize = 64 << 10;
/// Bytes before each gRPC message: whether it is packed, and its length.
pub(super) const PREFIX_BYTES: usize = 5;
/// Messages up to this size are small: several requests for metadata travel in one.
const SMALL_BYTES_MAX: usize = 2 * METADATA_REQUEST_BYTES_MAX + (64 << 10);
/// Requests of sessions that carry blocks: reads and erases, which must not wait behind blocks.
const SMALL_BULK_BYTES_MAX: usize = 64 << 10;
/// Memory for those.
const SMALL_BULK_BUDGET_BYTES: u32 = 8 << 20;
/// Memory for small messages that are read or not yet answered.
const SMALL_BUDGET_BYTES: u32 = 48 << 20;
/// The same for large ones: a message of the largest size fits.
const LARGE_BUDGET_BYTES: u32 = 112 << 20;
/// The same for large messages of calls of their own: those of sessions do not wait for them.
const LARGE_CALLS_BYTES: u32 = 104 << 20;
/// Memory for answers to requests for metadata that are large: pages of listings.
const SMALL_ANSWERS_BYTES: u32 = 32 << 20;
/// Memory for blocks that were read and are not yet sent.
const LARGE_ANSWERS_BYTES: u32 = 64 << 20;

/// Sessions that carry blocks say so in this header: what they hold does not take from the others' budgets.
pub(super) const LANE_HEADER: &str = "clutch-lane";
/// Its value then.
pub(super) const LANE_BULK: &str = "bulk";

/// A node's memory for messages of all connections.
#[derive(Clone)]
pub(super) struct Budgets {
    small: Budget,
    small_bulk: Budget,
    large: Budget,
    large_calls: Budget,
    small_answers: Budget,
    large_answers: Budget,
}

impl Budgets {
    pub(super) fn new() -> Budgets {
        Budgets {
            small: Budget::new(SMALL_BUDGET_BYTES),
            small_bulk: Budget::new(SMALL_BULK_BUDGET_BYTES),
            large: Budget::new(LARGE_BUDGET_BYTES),
            large_calls: Budget::new(LARGE_CALLS_BYTES),
            small_answers: Budget::new(SMALL_ANSWERS_BYTES),
            large_answers: Budget::new(LARGE_ANSWERS_BYTES),
        }
    }

    /// What holds for one call or session.
    fn share(&self, is_session: bool, is_bulk: bool, meter: Option<Arc<Meter>>) -> Share {
        let (small, small_bytes_max) = match is_session && is_bulk {
            true => (&self.small_bulk, SMALL_BULK_BYTES_MAX),
            false => (&self.small, SMALL_BYTES_MAX),
        };
        Share {
            small: small.view(),
            small_bytes_max,
            is_session,
            large: if is_session { self.large.view() } else { self.large_calls.view() },
            answers: Answers { pages: self.small_answers.view(), blocks: self.large_answers.view() },
            admitted: Arc::default(),
            meter: meter.unwrap_or_default(),
        }
    }
}

/// The part of one call or session in the budgets.
#[derive(Clone)]
pub(super) struct Share {
    small: Budget,
    small_bytes_max: usize,
    large: Budget,
    is_session: bool,
    /// For answers of this session.
    pub(super) answers: Answers,
    /// What is held for messages that have come in, in their order.
    admitted: Arc<Mutex<VecDeque<Held>>>,
    /// The connection.
    pub(super) meter: Arc<Meter>,
}

impl Share {
    /// What is held for the message that was read last.
    pub(super) fn take(&self) -> Held {
        self.admitted.lock().pop_front().unwrap_or_default()
    }

    /// Whether something of this session waits for memory.
    pub(super) fn is_waiting(&self) -> bool {
        let Share { small, large, answers, .. } = self;
        [small, large, &answers.pages, &answers.blocks].iter().any(|budget| budget.waiting() > 0)
    }

    /// Keeps what is held for a message until it is handled. Where nobody takes it, in services of others, it is for one
    /// message at a time.
    fn keep(&self, held: Held) {
        let mut admitted = self.admitted.lock();
        if !self.is_session {
            admitted.clear();
        }
        admitted.push_back(held);
    }

    fn admit(&self, bytes: usize) -> BoxFuture<Held> {
        let budget = if bytes > self.small_bytes_max { self.large.clone() } else { self.small.clone() };
        // One that is too large is refused when its length has been read; nothing of it comes into memory.
        let bytes = if bytes > FRAMES_BYTES_MAX { 0 } else { bytes };
        Box::pin(async move { budget.hold(bytes).await })
    }
}

/// Puts [`Admitted`] bodies under services.
#[derive(Clone)]
pub(super) struct AdmissionLayer(pub(super) Budgets, pub(super) SessionService);

impl<S> tower::Layer<S> for AdmissionLayer {
    type Service = Admission<S>;

    fn layer(&self, inner: S) -> Admission<S> {
        Admission { inner, budgets: self.0.clone(), sessions: self.1.clone() }
    }
}

/// A service whose messages are admitted one by one.
#[derive(Clone)]
pub(super) struct Admission<S> {
    inner: S,
    budgets: Budgets,
    sessions: SessionService,
}

impl<S> tower::Service<http::Request<Body>> for Admission<S>
where
    S: tower::Service<http::Request<Body>, Response = http::Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let is_bulk = request.headers().get(LANE_HEADER).is_some_and(|lane| lane == LANE_BULK);
        let meter = request.extensions().get::<Arc<Meter>>().cloned();
        let open = meter.as_ref().map(Meter::open);
        let is_session = opens_session(request.uri().path());
        let share = self.budgets.share(is_session, is_bulk, meter);
        if is_session {
            let opened = self.sessions.open_stream(request.into_body(), share);
            let guard = Arc::new((open, None, None));
            let body = opened.map(|inner| Body::new(Answered { inner, guard }));
            let response = match body {
                Ok(body) => {
                    let mut response = http::Response::new(body);
                    let grpc = http::HeaderValue::from_static("application/grpc");
                    response.headers_mut().insert(http::header::CONTENT_TYPE, grpc);
                    response
                }
                Err(status) => status.into_http(),
            };
            return Box::pin(async { Ok(response) });
        }
        let (mut parts, body) = request.into_parts();
        parts.extensions.insert(share.clone());
        let body = Body::new(Admitted::new(body, share.clone()));
        let answered = self.inner.call(http::Request::from_parts(parts, body));
        Box::pin(async move {
            let (mut parts, body) = answered.await?.into_parts();
            let held = parts.extensions.remove::<AnswerHeld>();
            let guard = Arc::new((open, held.as_ref().map(|_| share.meter.owe()), held));
            let body = Body::new(Answered { inner: body, guard });
            Ok(http::Response::from_parts(parts, body))
        })
    }
}

/// What the answer to a call of its own holds until it is sent; put into the response's extensions.
#[derive(Clone)]
pub(super) struct AnswerHeld {
    _held: Arc<(Held, Held)>,
}

impl AnswerHeld {
    pub(super) fn new(request: Held, answer: Held) -> AnswerHeld {
        AnswerHeld { _held: Arc::new((request, answer)) }
    }
}

/// What ends when a response is on its way: its place among the open ones, what it owes, what is held for it.
type Guard = Arc<(Option<Counted>, Option<Counted>, Option<AnswerHeld>)>;

/// The body of a response. Its bytes keep its guard until they are written.
struct Answered {
    inner: Body,
    guard: Guard,
}

impl http_body::Body for Answered {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = ready!(Pin::new(&mut self.inner).poll_frame(context));
        Poll::Ready(frame.map(|frame| frame.map(|frame| frame.map_data(|data| guarded(data, &self.guard)))))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// Bytes that keep something until nobody needs them any more: HTTP/2 takes them long before it writes them.
pub(super) fn guarded<T: Send + Sync + 'static>(bytes: Bytes, guard: &Arc<T>) -> Bytes {
    struct Guarded<T> {
        bytes: Bytes,
        _guard: Arc<T>,
    }
    impl<T> AsRef<[u8]> for Guarded<T> {
        fn as_ref(&self) -> &[u8] {
            &self.bytes
        }
    }
    Bytes::from_owner(Guarded { bytes, _guard: guard.clone() })
}

enum Reading {
    /// So many bytes of the next message's prefix are there.
    Prefix(usize),
    /// The prefix is there; memory is waited for.
    Waiting(BoxFuture<Held>),
    /// So many bytes of the message are still to come.
    Message(usize),
}

/// The body of a request, message by message.
pub(super) struct Admitted {
    inner: Body,
    share: Share,
    reading: Reading,
    prefix: [u8; PREFIX_BYTES],
    /// Was read and belongs to what comes next.
    unread: Bytes,
    /// Ends when too little of a message that has begun has come for too long.
    stalled: Pin<Box<Sleep>>,
    /// What came since it was set.
    came: usize,
}

impl Admitted {
    pub(super) fn new(inner: Body, share: Share) -> Admitted {
        Admitted {
            inner,
            share,
            reading: Reading::Prefix(0),
            prefix: [0; PREFIX_BYTES],
            unread: Bytes::new(),
            stalled: Box::pin(tokio::time::sleep(STALLED_MAX)),
            came: 0,
        }
    }

    fn message_len(&self) -> usize {
        let [_, length @ ..] = self.prefix;
        u32::from_be_bytes(length) as usize
    }

    /// Takes from what was read what may be handed on; `None` when more must be read first.
    fn step(&mut self, context: &mut Context<'_>) -> Poll<Option<Bytes>> {
        loop {
            match &mut self.reading {
                Reading::Prefix(have) => {
                    let count = self.unread.len().min(PREFIX_BYTES - *have);
                    self.unread.copy_to_slice(&mut self.prefix[*have..*have + count]);
                    *have += count;
                    if *have < PREFIX_BYTES {
                        return Poll::Ready(None);
                    }
                    self.reading = Reading::Waiting(self.share.admit(self.message_len()));
                }
                Reading::Waiting(held) => {
                    let held = ready!(held.as_mut().poll(context));
                    self.share.keep(held);
                    self.reading = match self.message_len() {
                        0 => Reading::Prefix(0),
                        length => Reading::Message(length),
                    };
                    self.touch(CAME_MIN);
                    return Poll::Ready(Some(Bytes::copy_from_slice(&self.prefix)));
                }
                Reading::Message(_) if self.unread.is_empty() => return Poll::Ready(None),
                Reading::Message(left) => {
                    let piece = self.unread.split_to(self.unread.len().min(*left));
                    *left -= piece.len();
                    if *left == 0 {
                        self.reading = Reading::Prefix(0);
                    }
                    let is_whole = matches!(self.reading, Reading::Prefix(_));
                    self.touch(if is_whole { CAME_MIN } else { piece.len() });
                    return Poll::Ready(Some(piece));
                }
            }
        }
    }

    /// Takes note that so much came; what comes in drops is as good as nothing.
    fn touch(&mut self, bytes: usize) {
        self.came += bytes;
        if self.came >= CAME_MIN {
            self.came = 0;
            self.stalled.as_mut().reset(Instant::now() + STALLED_MAX);
        }
    }

    /// Whether nothing of a message is there, and none is waited for.
    pub(super) fn is_resting(&self) -> bool {
        matches!(self.reading, Reading::Prefix(0)) && self.unread.is_empty()
    }
}

impl http_body::Body for Admitted {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        loop {
            if let Some(data) = ready!(this.step(context)) {
                return Poll::Ready(Some(Ok(Frame::data(data))));
            }
            let frame = match Pin::new(&mut this.inner).poll_frame(context) {
                Poll::Ready(frame) => frame,
                Poll::Pending => {
                    // Between two messages a session may rest; a message that has begun is in memory, and so is a call that
                    // does not end.
                    if !this.share.is_session || matches!(this.reading, Reading::Message(_)) {
                        ready!(this.stalled.as_mut().poll(context));
                        let text = format!(
                            "next to nothing of a message or call that had begun came for {STALLED_MAX:?}"
                        );
                        return Poll::Ready(Some(Err(Status::deadline_exceeded(text))));
                    }
                    return Poll::Pending;
                }
            };
            match frame.map(|frame| frame.map(Frame::into_data)) {
                Some(Ok(Ok(data))) => this.unread = data,
                Some(Ok(Err(other))) => return Poll::Ready(Some(Ok(other))),
                Some(Err(status)) => return Poll::Ready(Some(Err(status))),
                None => return Poll::Ready(None),
            }
        }
    }
}

const _: () = assert!(LARGE_BUDGET_BYTES as usize >= FRAMES_BYTES_MAX);
const _: () = assert!(LARGE_CALLS_BYTES as usize >= FRAMES_BYTES_MAX);

#[cfg(test)]
mod tests {
    use http_body::Body as _;

    use super::*;

    /// Hands out pieces, then ends.
    struct Pieces(VecDeque<Bytes>);

    impl http_body::Body for Pieces {
        type Data = Bytes;
        type Error = Status;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
            Poll::Ready(self.0.pop_front().map(|piece| Ok(Frame::data(piece))))
        }
    }

    fn message(length: usize) -> Vec<u8> {
        let mut bytes = vec![0];
        bytes.extend_from_slice(&(length as u32).to_be_bytes());
        bytes.extend((0..length).map(|at| at as u8));
        bytes
    }

    #[tokio::test]
    async fn messages_come_through_whole_and_each_holds_its_length() {
        let stream: Vec<u8> = [3, 0, 70, 1].into_iter().flat_map(message).collect();
        for size in 1..stream.len() {
            let budgets = Budgets { small: Budget::new(100), large: Budget::new(100), ..Budgets::new() };
            let share = budgets.share(true, false, None);
            let pieces = stream.chunks(size).map(Bytes::copy_from_slice).collect();
            let mut body = Box::pin(Admitted::new(Body::new(Pieces(pieces)), share.clone()));
            let mut came = Vec::new();
            while let Some(frame) = std::future::poll_fn(|context| body.as_mut().poll_frame(context)).await {
                came.extend_from_slice(&frame.expect("no error").into_data().expect("data"));
            }
            assert_eq!(came, stream, "in pieces of {size}");
            assert!(budgets.small.try_hold(27).is_none() && budgets.small.try_hold(26).is_some());
            for (count, free) in [(3, 29), (2, 29), (1, 99)] {
                drop(share.take());
                assert_eq!(share.admitted.lock().len(), count);
                assert!(budgets.small.try_hold(free).is_some() && budgets.small.try_hold(free + 1).is_none());
            }
            drop(share.take());
            assert!(budgets.small.try_hold(100).is_some() && share.admitted.lock().is_empty());
        }
    }

    #[tokio::test]
    async fn what_does_not_fit_waits_until_something_is_answered() {
        let budgets = Budgets { small: Budget::new(10), ..Budgets::new() };
        let share = budgets.share(true, false, None);
        let stream: Vec<u8> = [8, 8].into_iter().flat_map(message).collect();
        let pieces = VecDeque::from([Bytes::from(stream)]);
        let mut body = Box::pin(Admitted::new(Body::new(Pieces(pieces)), share.clone()));
        let mut came = 0;
        // The first message is there; the second does not even show its prefix.
        while let Poll::Ready(Some(frame)) =
            futures_util::poll!(std::future::poll_fn(|c| body.as_mut().poll_frame(c)))
        {
            came += frame.expect("no error").into_data().expect("data").len();
        }
        assert_eq!((came, share.is_waiting()), (13, true));
        drop(share.take());
        while let Some(frame) = std::future::poll_fn(|c| body.as_mut().poll_frame(c)).await {
            came += frame.expect("no error").into_data().expect("data").len();
        }
        assert_eq!((came, share.is_waiting()), (26, false));
    }
}
