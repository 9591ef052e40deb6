//! `DIR/clock`: how late it was when the cluster was up last, by a clock that nobody sets.
//!
//! After a stop the wall clock may be anything. While the machine is not started anew, its boot clock says how long the
//! cluster was down, so that a wall clock that was set meanwhile is not believed. The file is a hint: where it is missing,
//! damaged or of another boot, nothing is known.

use std::{path::Path, sync::Arc, time::Duration};

use clutch_proto::Time;
use clutch_runtime::Runtime;
use serde::{Deserialize, Serialize};

/// How often it is written.
pub const PERIOD: Duration = Duration::from_secs(10);
/// Its name in the directory.
pub const FILE: &str = "clock";

#[derive(Serialize, Deserialize)]
struct ClockFile {
    /// Names this boot of the machine.
    boot: String,
    /// The boot clock, in nanoseconds.
    steady_ns: u64,
    /// The cluster's time then.
    time: u64,
}

fn boot() -> Option<String> {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(id.trim().to_owned())
}

/// How long ago logs ended, as the file in a directory tells.
pub fn downtime(runtime: &Runtime, dir: &Path) -> Arc<dyn Fn(Time) -> Option<Duration> + Send + Sync> {
    let (runtime, dir) = (runtime.clone(), dir.to_owned());
    Arc::new(move |last| down_since(&runtime, &dir, last))
}

/// How long ago the logs ended at `last`; `None` when it cannot be told.
fn down_since(runtime: &Runtime, dir: &Path, last: Time) -> Option<Duration> {
    let bytes = runtime.disk.read(&dir.join(FILE)).ok()?;
    let file: ClockFile = serde_json::from_slice(&bytes).ok()?;
    if file.boot != boot()? {
        return None;
    }
    let since = runtime.clock.steady().checked_sub(Duration::from_nanos(file.steady_ns))?;
    // The logs may have gone on a little after the file was written, or have ended before.
    let written = i128::from(file.time) - i128::from(last.0);
    let down = i128::try_from(since.as_nanos()).ok()? + written;
    Some(Duration::from_nanos(u64::try_from(down.max(0)).ok()?))
}

/// Writes the file. A failure only means that the next start knows less.
pub fn write(runtime: &Runtime, dir: &Path, time: Time) {
    let Some(boot) = boot() else { return };
    let steady_ns = u64::try_from(runtime.clock.steady().as_nanos()).unwrap_or(u64::MAX);
    let file = ClockFile { boot, steady_ns, time: time.0 };
    let written = serde_json::to_vec(&file)
        .map_err(std::io::Error::from)
        .and_then(|b| runtime.disk.replace(&dir.join(FILE), &b));
    if let Err(error) = written {
        tracing::debug!(%error, "write the clock file");
    }
}
