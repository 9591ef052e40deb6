//! Room for logs and states: watched, so that metadata is read-only before the disk is full and not broken after.
//!
//! Three things keep a node alive on a full disk. Blocks are refused while there is less than the reserve. Changes of
//! metadata are refused while there is hardly any, but for those that give space back; those live on room that the log has
//! set aside. And a file of its own holds room that a start on a full disk gives free, because opening needs some.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, RwLock},
};

use clutch_runtime::Disk;

/// The file that holds room for a start.
const BALLAST: &str = "reserve";
/// The reserve where nothing else is said: this part of the file system, and at most this much.
const RESERVE_PART: u64 = 16;
const RESERVE_BYTES_MAX: u64 = 1 << 30;

/// Watches the file systems of logs and states.
pub struct Room {
    disk: Arc<dyn Disk>,
    places: Vec<PathBuf>,
    reserve_bytes: u64,
    /// Where the file that holds room lies; `None` where a node has none.
    ballast: Option<PathBuf>,
    shortage: RwLock<Option<String>>,
}

impl Room {
    /// Watches these directories. `reserve_bytes` is what blocks never take; `None` takes a part of the file system.
    pub fn new(
        disk: Arc<dyn Disk>,
        places: Vec<PathBuf>,
        reserve_bytes: Option<u64>,
        ballast_in: Option<&Path>,
    ) -> Room {
        let by_default = || {
            let space = ballast_in.or(places.first().map(PathBuf::as_path)).and_then(|p| disk.space(p).ok());
            space.map_or(0, |(total, _)| (total / RESERVE_PART).min(RESERVE_BYTES_MAX))
        };
        let reserve_bytes = reserve_bytes.unwrap_or_else(by_default);
        let ballast = ballast_in.map(|dir| dir.join(BALLAST));
        Room { disk, places, reserve_bytes, ballast, shortage: RwLock::default() }
    }

    /// Watches nothing: there is always room.
    pub fn unlimited(disk: Arc<dyn Disk>) -> Room {
        Room::new(disk, Vec::new(), Some(0), None)
    }

    /// What blocks leave free, in bytes.
    pub fn reserve_bytes(&self) -> u64 {
        self.reserve_bytes
    }

    /// Why there is hardly room, while that is so.
    pub fn shortage(&self) -> Option<String> {
        self.shortage.read().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Looks at the file systems.
    pub fn look(&self) {
        let had = self.shortage().is_some();
        // Not at once again when a little is free: what is refused and allowed should not flap.
        let part = if had { 4 } else { 8 };
        let short = self.places.iter().find_map(|place| {
            let (total, available) = self.disk.space(place).ok()?;
            // A log or a state may lie on a file system of its own that is much smaller than the reserve is for.
            let reserve = self.reserve_bytes.min(total / 4);
            let least = reserve / part;
            (available < least).then(|| {
                format!(
                    "no space: {} has {} KiB left, so metadata is read-only: files can be read and deleted. It goes on by itself \
                     when there are {} KiB: make room, or delete files and collect",
                    place.display(),
                    available >> 10,
                    (reserve / 4) >> 10
                )
            })
        });
        match &short {
            Some(text) if !had => tracing::error!("{text}"),
            None if had => tracing::warn!("there is room again: metadata takes changes"),
            _ => {}
        }
        *self.shortage.write().unwrap_or_else(|e| e.into_inner()) = short;
        if !had {
            self.grow_ballast();
        }
    }

    fn ballast_bytes(&self) -> u64 {
        self.reserve_bytes / 2
    }

    /// Takes room for the next start on a full disk, when there is much.
    fn grow_ballast(&self) {
        let Some(path) = &self.ballast else { return };
        let wanted = self.ballast_bytes();
        if wanted == 0 || held(path) >= wanted {
            return;
        }
        let available =
            self.disk.space(path.parent().unwrap_or(Path::new("."))).map_or(0, |(_, available)| available);
        if available > wanted + self.reserve_bytes
            && let Err(error) = self.hold(path, wanted)
        {
            tracing::debug!(%error, "hold room for a start on a full disk");
        }
    }

    fn hold(&self, path: &Path, bytes: u64) -> io::Result<()> {
        self.disk.open(path, true)?.allocate(bytes)
    }

    /// Gives free what is held, if the disk is full: opening logs and states needs a little room. Returns the bytes.
    pub fn release_for_start(&self) -> u64 {
        let Some(path) = &self.ballast else { return 0 };
        let held = held(path);
        let is_short = self.places.iter().chain(path.parent().map(Path::to_path_buf).as_ref()).any(|place| {
            self.disk.space(place).is_ok_and(|(_, available)| available < self.ballast_bytes().max(1 << 20))
        });
        if held == 0 || !is_short || self.disk.remove(path).is_err() {
            return 0;
        }
        tracing::warn!(bytes = held, "the disk is full: room that was kept for this start is given free");
        held
    }

    /// Takes back what a start has left of it, however little.
    pub fn hold_again(&self) {
        let Some(path) = &self.ballast else { return };
        let available =
            self.disk.space(path.parent().unwrap_or(Path::new("."))).map_or(0, |(_, available)| available);
        let wanted = self.ballast_bytes().min(available / 2);
        if held(path) < wanted {
            // There is less than was hoped for: the next look tries again.
            let _ = self.hold(path, wanted);
        }
    }
}

/// Bytes that a file in fact takes.
fn held(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    path.metadata().map_or(0, |metadata| metadata.blocks() * 512)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use clutch_runtime::simulated::{DiskFaults, NodeId, World};

    use super::*;

    #[test]
    fn a_full_disk_is_said_and_so_is_its_end() {
        let world = World::new(1);
        let disk = world.disk(NodeId(0));
        let room = Room::new(disk.clone(), vec!["log".into()], Some(1 << 20), None);
        room.look();
        assert_eq!(room.shortage(), None);
        disk.set_faults(DiskFaults { full: true, ..DiskFaults::default() });
        room.look();
        let text = room.shortage().expect("full");
        assert!(text.contains("no space") && text.contains("log"), "{text}");
        disk.set_faults(DiskFaults::default());
        room.look();
        assert_eq!(room.shortage(), None);
        assert_eq!(world.elapsed(), Duration::ZERO);
    }
}
