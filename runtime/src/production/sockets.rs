//! TCP connections that are counted: how many there are, and what moves on each.
//!
//! Accepting waits while as many connections are open as may be, and while the system has no file descriptor left. One on
//! which nobody has a request open is closed after a while, and one whose peer does not take its answers, too.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use futures_util::{Stream, task::AtomicWaker};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
};
use tonic::transport::server::Connected;

use super::peers;
use crate::BoxFuture;

/// Where no more can be accepted, it is tried again after so long.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// How often connections are looked at.
const LOOK: Duration = Duration::from_secs(2);
/// A connection without an open request is closed after so long.
const UNUSED_MAX: Duration = Duration::from_secs(60);
/// A peer to which answers are owed takes at least [`MOVED_MIN`] in this time.
pub(super) const STALLED_MAX: Duration = Duration::from_secs(30);
/// What moves on a connection although nobody gets on: pings, and answers to pings.
pub(super) const MOVED_MIN: u64 = 1 << 10;

/// What moves on one connection.
#[derive(Default)]
pub(super) struct Meter {
    moved: AtomicU64,
    /// Those of them that were written: what a peer sends is no sign that it takes anything.
    written: AtomicU64,
    /// Requests and sessions that are open.
    open: AtomicUsize,
    /// Messages that are ready and that the peer has not taken yet.
    owed: AtomicUsize,
    closed: AtomicBool,
    reader: AtomicWaker,
}

impl Meter {
    /// Bytes that were read and written so far.
    pub(super) fn moved(&self) -> u64 {
        self.moved.load(Ordering::Relaxed)
    }

    /// Counts something while it lasts.
    pub(super) fn open(self: &Arc<Meter>) -> Counted {
        Counted::new(self, |meter| &meter.open)
    }

    /// Counts a message that the peer is to take.
    pub(super) fn owe(self: &Arc<Meter>) -> Counted {
        Counted::new(self, |meter| &meter.owed)
    }

    fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.reader.wake();
    }
}

/// Is counted as long as it lives.
pub(super) struct Counted {
    meter: Arc<Meter>,
    count: fn(&Meter) -> &AtomicUsize,
}

impl Counted {
    fn new(meter: &Arc<Meter>, count: fn(&Meter) -> &AtomicUsize) -> Counted {
        count(meter).fetch_add(1, Ordering::Relaxed);
        Counted { meter: meter.clone(), count }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        (self.count)(&self.meter).fetch_sub(1, Ordering::Relaxed);
    }
}

/// A connection whose bytes are counted.
pub(super) struct Metered {
    stream: TcpStream,
    meter: Arc<Meter>,
    /// Its place among the connections that may be open.
    _permit: Option<OwnedSemaphorePermit>,
}

impl Metered {
    /// Counts the bytes of a connection of our own.
    pub(super) fn new(stream: TcpStream, meter: Arc<Meter>) -> Metered {
        Metered { stream, meter, _permit: None }
    }
}

impl AsyncRead for Metered {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.meter.reader.register(context.waker());
        if self.meter.closed.load(Ordering::Acquire) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(context, buffer);
        self.meter.moved.fetch_add((buffer.filled().len() - before) as u64, Ordering::Relaxed);
        polled
    }
}

impl Metered {
    fn refuse_closed(&self) -> Option<Poll<io::Result<usize>>> {
        let is_closed = self.meter.closed.load(Ordering::Acquire);
        is_closed.then(|| Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into())))
    }

    fn wrote(&self, polled: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(bytes)) = &polled {
            self.meter.moved.fetch_add(*bytes as u64, Ordering::Relaxed);
            self.meter.written.fetch_add(*bytes as u64, Ordering::Relaxed);
        }
        polled
    }
}

impl AsyncWrite for Metered {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if let Some(closed) = self.refuse_closed() {
            return closed;
        }
        let polled = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.wrote(polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if let Some(closed) = self.refuse_closed() {
            return closed;
        }
        let polled = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.wrote(polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

impl Connected for Metered {
    type ConnectInfo = Arc<Meter>;

    fn connect_info(&self) -> Arc<Meter> {
        self.meter.clone()
    }
}

/// How many connections a process may have open, of `most` that are wanted: a quarter of the files that it may open, since
/// databases, logs and blocks need the others.
pub(super) fn connections_max(most: usize) -> usize {
    let files = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let files = files.and_then(|files| usize::try_from(files).ok()).unwrap_or(usize::MAX);
    most.min(files / 4).max(8)
}

/// Takes a connection that is a stream between nodes, and completes when that has ended.
pub(super) type TakeStream = Arc<dyn Fn(TcpStream) -> BoxFuture<()> + Send + Sync>;

/// Connections as they come, until the receiver goes. At most `most` are open at a time; others wait to be accepted. Those
/// that are streams between nodes are not among them: `take_stream` gets them.
pub(super) fn accept(
    listener: TcpListener,
    most: usize,
    take_stream: TakeStream,
) -> impl Stream<Item = io::Result<Metered>> + Send {
    let (sender, accepted) = mpsc::channel(1);
    let open = Arc::new(Semaphore::new(most));
    let meters: Arc<Mutex<Vec<Weak<Meter>>>> = Arc::default();
    tokio::spawn(look_after(meters.clone(), sender.downgrade()));
    tokio::spawn(async move {
        let mut is_full = false;
        loop {
            if open.available_permits() == 0 && !std::mem::replace(&mut is_full, true) {
                tracing::warn!("{most} connections are open; more wait until one ends");
            }
            let next = async {
                // It is never closed; the listener is asked only when there is room.
                let permit = open.clone().acquire_owned().await.ok();
                (listener.accept().await, permit)
            };
            let (accepted, permit) = tokio::select! {
                () = sender.closed() => return,
                next = next => next,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                // Of one connection, which is gone.
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset
                    ) =>
                {
                    continue;
                }
                Err(error) => {
                    // Without a file descriptor it stays ready: asking again at once would only take the processor.
                    if !std::mem::replace(&mut is_full, true) {
                        tracing::warn!(%error, "accept a connection");
                    }
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            is_full &= open.available_permits() == 0;
            tokio::spawn(begin(stream, permit, sender.clone(), meters.clone(), take_stream.clone()));
        }
    });
    tokio_stream::wrappers::ReceiverStream::new(accepted)
}

/// Hands a connection on when its first byte says what it is.
async fn begin(
    stream: TcpStream,
    permit: Option<OwnedSemaphorePermit>,
    sessions: mpsc::Sender<io::Result<Metered>>,
    meters: Arc<Mutex<Vec<Weak<Meter>>>>,
    take_stream: TakeStream,
) {
    let mut first = [0];
    let is_stream = tokio::select! {
        peeked = stream.peek(&mut first) => match peeked {
            Ok(1..) => first[0] == peers::FIRST_BYTE,
            // It is gone.
            Ok(0) | Err(_) => return,
        },
        () = tokio::time::sleep(UNUSED_MAX) => return,
        () = sessions.closed() => return,
    };
    if is_stream {
        drop(sessions);
        take_stream(stream).await;
        return;
    }
    // Small answers must not wait for more; failing to say so only costs latency.
    let _ = stream.set_nodelay(true);
    let meter = Arc::new(Meter::default());
    meters.lock().push(Arc::downgrade(&meter));
    // Nobody listens any more.
    let _ = sessions.send(Ok(Metered { stream, meter, _permit: permit })).await;
}

/// What was seen of a connection when it was looked at.
struct Seen {
    meter: Weak<Meter>,
    written: u64,
    /// Since when nobody has had a request open.
    unused_since: Option<Instant>,
    /// Since when answers are owed and nearly nothing moves.
    stalled_since: Option<Instant>,
}

/// Closes connections that are of no use any more, as long as there is a listener.
async fn look_after(meters: Arc<Mutex<Vec<Weak<Meter>>>>, listener: mpsc::WeakSender<io::Result<Metered>>) {
    let mut seen: Vec<Seen> = Vec::new();
    while listener.upgrade().is_some() {
        tokio::time::sleep(LOOK).await;
        seen.extend(meters.lock().drain(..).map(|meter| Seen {
            meter,
            written: 0,
            unused_since: None,
            stalled_since: None,
        }));
        let now = Instant::now();
        seen.retain_mut(|seen| seen.meter.upgrade().is_some_and(|meter| !seen.look(&meter, now)));
    }
}

impl Seen {
    /// Whether the connection was closed.
    fn look(&mut self, meter: &Meter, now: Instant) -> bool {
        let written = meter.written.load(Ordering::Relaxed);
        let is_stalled =
            meter.owed.load(Ordering::Relaxed) > 0 && written.saturating_sub(self.written) < MOVED_MIN;
        if !is_stalled {
            self.written = written;
        }
        let lasts = |since: &mut Option<Instant>, is: bool, most: Duration| match (is, *since) {
            (false, _) => {
                *since = None;
                false
            }
            (true, None) => {
                *since = Some(now);
                false
            }
            (true, Some(begin)) => now.duration_since(begin) >= most,
        };
        let is_unused = meter.open.load(Ordering::Relaxed) == 0;
        let unused = lasts(&mut self.unused_since, is_unused, UNUSED_MAX);
        let stalled = lasts(&mut self.stalled_since, is_stalled, STALLED_MAX);
        if stalled {
            tracing::warn!("close a connection whose peer has not taken its answers for {STALLED_MAX:?}");
        }
        if unused || stalled {
            meter.close();
        }
        unused || stalled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_end_that_nobody_uses_and_whose_peers_take_nothing() {
        let (meter, start) = (Arc::new(Meter::default()), Instant::now());
        let mut seen =
            Seen { meter: Arc::downgrade(&meter), written: 0, unused_since: None, stalled_since: None };
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let session = meter.open();
        assert!(!seen.look(&meter, at(0)) && !seen.look(&meter, at(1000)));
        // Owed, and only pings move.
        let owed = meter.owe();
        for second in 1000..1030 {
            meter.written.fetch_add(17, Ordering::Relaxed);
            assert!(!seen.look(&meter, at(second)), "{second}");
        }
        // A slow peer is not one that takes nothing.
        meter.written.fetch_add(MOVED_MIN, Ordering::Relaxed);
        assert!(!seen.look(&meter, at(1031)));
        assert!(!seen.look(&meter, at(1032)) && seen.look(&meter, at(1062)));
        drop(owed);
        assert!(!seen.look(&meter, at(1063)));
        drop(session);
        assert!(!seen.look(&meter, at(1064)) && !seen.look(&meter, at(1123)) && seen.look(&meter, at(1124)));
    }
}
