//! The runtime that openraft asks: the world's where its task belongs to a simulated node, tokio's elsewhere.
//!
//! Channels, locks and watches are tokio's, which need no reactor. In a world the order in which they wake does not matter: what is
//! ready there is sorted before one is drawn.

use std::{
    fmt,
    future::Future,
    ops::{Add, AddAssign, Sub, SubAssign},
    panic::AssertUnwindSafe,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use clutch_runtime::{BoxFuture, ambient};
use futures_util::FutureExt as _;
use openraft::{AsyncRuntime, Instant, OptionalSend, TokioRuntime};
use rand_10::{SeedableRng as _, rngs::SmallRng};
use tokio::sync::oneshot;

/// What waits for less is no tick.
const SHORT: Duration = Duration::from_millis(1);

/// See the module.
#[derive(Debug)]
pub(crate) struct SeamRuntime;

/// Time since some fixed moment of the node that asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SeamInstant(Duration);

impl Instant for SeamInstant {
    fn now() -> SeamInstant {
        SeamInstant(ambient::monotonic())
    }
}

impl Add<Duration> for SeamInstant {
    type Output = SeamInstant;

    fn add(self, by: Duration) -> SeamInstant {
        SeamInstant(self.0 + by)
    }
}

impl AddAssign<Duration> for SeamInstant {
    fn add_assign(&mut self, by: Duration) {
        self.0 += by;
    }
}

impl Sub<Duration> for SeamInstant {
    type Output = SeamInstant;

    fn sub(self, by: Duration) -> SeamInstant {
        SeamInstant(self.0.saturating_sub(by))
    }
}

impl SubAssign<Duration> for SeamInstant {
    fn sub_assign(&mut self, by: Duration) {
        self.0 = self.0.saturating_sub(by);
    }
}

impl Sub for SeamInstant {
    type Output = Duration;

    fn sub(self, other: SeamInstant) -> Duration {
        self.0.saturating_sub(other.0)
    }
}

/// The time was up.
#[derive(Debug)]
pub(crate) struct Elapsed;

impl fmt::Display for Elapsed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the time was up")
    }
}

/// A future with a time limit.
pub(crate) struct Limited<F> {
    future: Pin<Box<F>>,
    limit: BoxFuture<()>,
}

impl<F: Future> Future for Limited<F> {
    type Output = Result<F::Output, Elapsed>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if let Poll::Ready(output) = self.future.as_mut().poll(context) {
            return Poll::Ready(Ok(output));
        }
        self.limit.as_mut().poll(context).map(|()| Err(Elapsed))
    }
}

/// Why a task has no result.
#[derive(Debug)]
pub(crate) enum NoResult {
    /// It has panicked.
    Panicked,
    /// Its node has gone.
    Gone,
}

impl fmt::Display for NoResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            NoResult::Panicked => "the task has panicked",
            NoResult::Gone => "the task is gone",
        })
    }
}

/// Waits for a task.
pub(crate) struct Joining<T>(oneshot::Receiver<Result<T, NoResult>>);

impl<T> Future for Joining<T> {
    type Output = Result<T, NoResult>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(context).map(|ended| ended.unwrap_or(Err(NoResult::Gone)))
    }
}

impl AsyncRuntime for SeamRuntime {
    type JoinError = NoResult;
    type JoinHandle<T: OptionalSend + 'static> = Joining<T>;
    type Sleep = BoxFuture<()>;
    type Instant = SeamInstant;
    type TimeoutError = Elapsed;
    type Timeout<R, T: Future<Output = R> + OptionalSend> = Limited<T>;
    type ThreadLocalRng = SmallRng;
    type Mpsc = <TokioRuntime as AsyncRuntime>::Mpsc;
    type Watch = <TokioRuntime as AsyncRuntime>::Watch;
    type Oneshot = <TokioRuntime as AsyncRuntime>::Oneshot;
    type Mutex<T: OptionalSend + 'static> = <TokioRuntime as AsyncRuntime>::Mutex<T>;

    fn spawn<T>(future: T) -> Joining<T::Output>
    where
        T: Future + OptionalSend + 'static,
        T::Output: OptionalSend + 'static,
    {
        let (ended, joining) = oneshot::channel();
        ambient::spawn("raft", async move {
            let output = AssertUnwindSafe(future).catch_unwind().await;
            if output.is_err() {
                tracing::error!("a task of a raft group has panicked");
            }
            // Nobody may wait for it.
            let _ = ended.send(output.map_err(|_| NoResult::Panicked));
        });
        Joining(joining)
    }

    fn sleep(duration: Duration) -> BoxFuture<()> {
        ambient::sleep(duration)
    }

    fn sleep_until(deadline: SeamInstant) -> BoxFuture<()> {
        let wait = deadline - SeamInstant::now();
        // Ticks of all groups come together. openraft waits for microseconds, too, where something waits for it.
        match wait < SHORT {
            true => ambient::sleep(wait),
            false => ambient::sleep_about(wait),
        }
    }

    fn timeout<R, F: Future<Output = R> + OptionalSend>(duration: Duration, future: F) -> Limited<F> {
        Limited { future: Box::pin(future), limit: ambient::sleep(duration) }
    }

    fn timeout_at<R, F: Future<Output = R> + OptionalSend>(deadline: SeamInstant, future: F) -> Limited<F> {
        SeamRuntime::timeout(deadline - SeamInstant::now(), future)
    }

    fn is_panic(error: &NoResult) -> bool {
        matches!(error, NoResult::Panicked)
    }

    fn thread_rng() -> SmallRng {
        SmallRng::seed_from_u64(ambient::random())
    }

    fn new(_threads: usize) -> SeamRuntime {
        SeamRuntime
    }

    fn block_on<F, T>(&mut self, future: F) -> T
    where
        F: Future<Output = T>,
    {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
        runtime.expect("threads for a test").block_on(future)
    }
}
