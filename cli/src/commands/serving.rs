//! What commands have in common that serve until they are told to stop.

use std::{process::ExitCode, time::Duration};

use anyhow::Result;
use clutch_server::Node;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::output::talk;

/// Below this many open files a cluster of many shards, or one with many clients, meets the limit.
const OPEN_FILES_LOW: u64 = 4096;
/// How often it is looked whether anything useful is served.
const LOOK: Duration = Duration::from_millis(500);

/// Raises the limit of open files as far as it goes without privileges: the usual soft limit of 1,024 is for programs that
/// use `select`, and databases and sessions need more.
pub(crate) fn raise_open_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if limit.current < limit.maximum || limit.maximum.is_none() {
        let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
        if let Err(error) = setrlimit(Resource::Nofile, raised) {
            tracing::warn!(%error, "raise the limit of open files");
        }
    }
    if let Some(most) = getrlimit(Resource::Nofile).current.filter(|most| *most < OPEN_FILES_LOW) {
        talk!(
            "clutch: at most {most} files may be open at a time (ulimit -n); {OPEN_FILES_LOW} or more are advised"
        );
    }
}

/// What asks the process to end.
pub(crate) struct Stops {
    interrupted: Signal,
    terminated: Signal,
    hung_up: Signal,
}

impl Stops {
    /// From now on the process does not end by itself when it is asked to.
    pub(crate) fn new() -> Result<Stops> {
        Ok(Stops {
            interrupted: signal(SignalKind::interrupt())?,
            terminated: signal(SignalKind::terminate())?,
            hung_up: signal(SignalKind::hangup())?,
        })
    }

    /// Completes when the process is asked to end.
    pub(crate) async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupted.recv() => {}
            _ = self.terminated.recv() => {}
            _ = self.hung_up.recv() => {}
        }
    }

    /// Serves until the process is asked to end, or serves nothing useful any more, which is said. True for the latter.
    pub(crate) async fn serve(&mut self, node: &Node) -> bool {
        tokio::select! {
            () = self.next() => false,
            faults = useless(node) => {
                for fault in faults {
                    talk!("clutch: {fault}");
                }
                talk!("clutch: no replica serves any more");
                true
            }
        }
    }

    /// Ends cleanly, unless that is interrupted.
    pub(crate) async fn end(&mut self, stop: impl Future<Output = ()>, ended_by_fault: bool) -> ExitCode {
        talk!("clutch: stopping");
        tokio::select! {
            () = stop => talk!("clutch: stopped"),
            _ = self.interrupted.recv() => talk!("clutch: stopped without flushing; the next start replays the log"),
        }
        // Whoever supervises the process must notice.
        if ended_by_fault { ExitCode::FAILURE } else { ExitCode::SUCCESS }
    }
}

/// Completes when nothing useful is served any more: all replicas have stopped for good. Why they have.
pub(crate) async fn useless(node: &Node) -> Vec<String> {
    loop {
        let (faults, serves) = node.faults();
        if !serves {
            return faults;
        }
        tokio::time::sleep(LOOK).await;
    }
}
