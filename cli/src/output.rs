//! How things are shown: JSON documents, times, modes, sizes, progress.

use std::io::{IsTerminal as _, Write as _};

use anyhow::Result;
use clutch_proto::{InodeId, InodeKind};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

/// Prints one JSON document.
pub(crate) fn json(document: &impl Serialize) -> Result<()> {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, document).map_err(std::io::Error::from)?;
    writeln!(out)?;
    Ok(())
}

/// Prints one line, and reports a closed pipe as an error instead of panicking.
pub(crate) fn line(text: impl std::fmt::Display) -> Result<()> {
    writeln!(std::io::stdout().lock(), "{text}")?;
    Ok(())
}

/// Nanoseconds since 1970 as a person reads them.
pub(crate) fn time(ns: u64) -> String {
    i64::try_from(ns)
        .ok()
        .and_then(|ns| jiff::Timestamp::from_nanosecond(i128::from(ns)).ok())
        .map_or_else(|| ns.to_string(), |t| t.strftime("%Y-%m-%d %H:%M:%S").to_string())
}

/// A word for the kind of an inode.
pub(crate) fn kind(id: InodeId) -> &'static str {
    match id.kind() {
        InodeKind::Directory => "directory",
        InodeKind::File => "file",
        InodeKind::Symlink => "symlink",
    }
}

/// Kind and permission bits as `ls -l` shows them.
pub(crate) fn mode(id: InodeId, mode: u32) -> String {
    let mut text = String::from(match id.kind() {
        InodeKind::Directory => "d",
        InodeKind::File => "-",
        InodeKind::Symlink => "l",
    });
    for shift in [6, 3, 0] {
        for (bit, letter) in [(4, 'r'), (2, 'w'), (1, 'x')] {
            text.push(if mode >> shift & bit != 0 { letter } else { '-' });
        }
    }
    text
}

/// Bytes with a unit.
pub(crate) fn bytes(count: u64) -> String {
    indicatif::BinaryBytes(count).to_string()
}

/// A counter on standard error; nothing where nobody looks.
pub(crate) fn counter(what: &str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix}: {msg} {elapsed}") {
        bar.set_style(style);
    }
    bar.set_prefix(what.to_owned());
    bar.enable_steady_tick(std::time::Duration::from_millis(100));
    bar
}

/// A bar on standard error; nothing where nobody looks.
pub(crate) fn bar(what: &str, total: u64) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(total);
    if let Ok(style) = ProgressStyle::with_template("{prefix} {wide_bar} {pos}/{len} {eta}") {
        bar.set_style(style);
    }
    bar.set_prefix(what.to_owned());
    bar
}
