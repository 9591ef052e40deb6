//! Whether a rewind was interrupted while it exchanged logs: whoever opens a directory looks, and refuses it.

use std::path::{Path, PathBuf};

use clutch_log::LogFault;
use clutch_runtime::Disk;

/// In the directory of the old logs while they are being exchanged: how far it has come.
pub(crate) const STAGE: &str = "unfinished";

fn storage(what: &str, error: &std::io::Error) -> LogFault {
    LogFault::Storage(format!("{what}: {error}"))
}

/// Whether logs were made ready and could not all be put in place: only [`crate::cut::put_in_place`] helps then.
pub fn is_unfinished(disk: &dyn Disk, dir: &Path) -> bool {
    matches!(unfinished(disk, dir), Ok(Some(_)))
}

/// The fault of a directory that cannot be opened because of that.
pub(crate) fn check_finished(disk: &dyn Disk, dir: &Path) -> Result<(), LogFault> {
    match unfinished(disk, dir)? {
        None => Ok(()),
        Some(_) => Err(LogFault::Storage(format!(
            "{}: a rewind was interrupted; run `clutch log rewind` once more, which finishes it",
            dir.display()
        ))),
    }
}

/// The directory of old logs that an exchange was interrupted in, and how far that had come.
pub(crate) fn unfinished(disk: &dyn Disk, dir: &Path) -> Result<Option<(PathBuf, Vec<u8>)>, LogFault> {
    for name in olds(disk, dir)? {
        let path = dir.join(name);
        if disk.exists(&path.join(STAGE)) {
            let stage =
                disk.read(&path.join(STAGE)).map_err(|e| storage("read how far a rewind came", &e))?;
            return Ok(Some((path, stage)));
        }
    }
    Ok(None)
}

pub(crate) fn olds(disk: &dyn Disk, dir: &Path) -> Result<Vec<String>, LogFault> {
    let names = disk.list(dir).map_err(|e| storage("list the log's directory", &e))?;
    Ok(names.into_iter().filter(|name| name.starts_with("before-rewind-")).collect())
}
