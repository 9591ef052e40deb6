//! Ctrl-C, SIGTERM and SIGHUP: a command that is ended in the middle leaves nothing temporary behind.
//!
//! What a command makes for a while is written down here before it is made; whoever ends the process removes it. Work that
//! must be undone at the cluster waits for [`interrupted`] and asks for time with [`Cleanup`].

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::Result;
use tokio::signal::unix::{SignalKind, signal};

/// How long work that must be undone may take.
const CLEANUP_MAX: Duration = Duration::from_secs(20);

static TEMPORARY: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());
static CLEANUPS: AtomicUsize = AtomicUsize::new(0);
static SIGNAL: tokio::sync::Notify = tokio::sync::Notify::const_new();

fn temporary() -> std::sync::MutexGuard<'static, BTreeSet<PathBuf>> {
    TEMPORARY.lock().unwrap_or_else(|e| e.into_inner())
}

/// A file or directory that goes with this value, however the process ends.
pub(crate) struct Temporary(PathBuf);

impl Temporary {
    /// Takes note of a path that is about to be made.
    pub(crate) fn new(path: PathBuf) -> Temporary {
        temporary().insert(path.clone());
        Temporary(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// It was given another name and stays.
    pub(crate) fn kept(self) {
        temporary().remove(&self.0);
        std::mem::forget(self);
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        remove(&self.0);
        temporary().remove(&self.0);
    }
}

fn remove(path: &Path) {
    match path.symlink_metadata() {
        Ok(found) if found.is_dir() => {
            // Somebody may still be writing in there.
            for _ in 0..20 {
                if std::fs::remove_dir_all(path).is_ok() {
                    return;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        // What is not there any more was removed or renamed.
        _ => drop(std::fs::remove_file(path)),
    }
}

/// Removes everything temporary: the process ends.
pub(crate) fn remove_all() {
    let paths: Vec<PathBuf> = temporary().iter().cloned().collect();
    paths.iter().for_each(|path| remove(path));
}

/// Asks for time to undo something when the process is interrupted, as long as this value lives.
pub(crate) struct Cleanup;

impl Cleanup {
    pub(crate) fn new() -> Cleanup {
        CLEANUPS.fetch_add(1, Ordering::Relaxed);
        Cleanup
    }
}

impl Drop for Cleanup {
    fn drop(&mut self) {
        CLEANUPS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Completes when the process is to end.
pub(crate) async fn interrupted() {
    SIGNAL.notified().await;
}

/// Runs a command until it ends or a signal comes; the exit code of a signal is 128 and its number.
pub(crate) async fn guard<T>(command: impl Future<Output = Result<T>>) -> Result<Result<T>, u8> {
    let (Ok(mut int), Ok(mut term), Ok(mut hup)) =
        (signal(SignalKind::interrupt()), signal(SignalKind::terminate()), signal(SignalKind::hangup()))
    else {
        return Ok(command.await);
    };
    let mut command = std::pin::pin!(command);
    let number = tokio::select! {
        result = &mut command => return Ok(result),
        _ = int.recv() => 2,
        _ = term.recv() => 15,
        _ = hup.recv() => 1,
    };
    if CLEANUPS.load(Ordering::Relaxed) > 0 {
        SIGNAL.notify_waiters();
        tokio::select! {
            _ = tokio::time::timeout(CLEANUP_MAX, &mut command) => {}
            // Who asks twice does not want to wait.
            _ = int.recv() => {}
            _ = term.recv() => {}
        }
    }
    Err(128 + number)
}
