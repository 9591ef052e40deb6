//! A store for all log engines of a node: what their groups append lies in one sequence of segment files, with one writer and
//! one sync for all.
//!
//! A group is what one engine keeps of one log in one of its incarnations. Its records have contiguous positions; an engine
//! may take the newest away again, begin behind a base, and keep a vote and its members ([`Write`]).
//!
//! Invariants:
//! * What was written is answered only after the sync that covers it, and in the order in which it was asked for.
//! * A failed sync is final: everything waiting becomes unknown and the store stops.
//! * What lies before the durable mark was synced; damage there is an error with a position, never dropped.
//!   What lies after it was never acknowledged; damage there is a torn tail and is cut off.
//! * Positions of a group have no holes; one that is missing is damage, found when the store opens wherever a segment was
//!   replaced or cut, and at the latest when it is read.
//! * A reader of one group reads no record of another: each segment has an index of each group.

mod continuity;
pub mod cut;
mod format;
mod group;
mod reader;
mod recovery;
mod segment;
mod shared;
mod span;
mod state;
mod unfinished;
mod vote;
mod writer;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use clutch_log::{Bounds, Epoch, LogFault, LogletId, Position, Usage};
use clutch_runtime::Runtime;
use parking_lot::Mutex;
use tokio::sync::mpsc;

use shared::{Handle, Shared};
use state::{Group, GroupState};

pub use continuity::Continuity;
pub use format::{RECORD_HEADER_BYTES, Record, RecordKind, SEGMENT_HEADER_BYTES, group_key};
pub use group::{Cursor, Look, StoredGroup, View};
pub use reader::SegmentReader;
pub use recovery::{Summary, open_read_only};
pub use shared::Options;
pub use span::Restart;
pub use state::{TailRecord, Write};
pub use vote::Vote;
pub use writer::MEMBERS_MAX;

/// All groups of a node; cheap to clone.
///
/// The writer ends when the store and every group of it are dropped.
#[derive(Clone)]
pub struct Store {
    handle: Handle,
}

impl Store {
    /// Opens the store on a directory and recovers what is there. Blocks on the disk.
    ///
    /// # Errors
    /// [`LogFault::Corrupt`] when a synced record is damaged in a segment that recovery reads, or when positions of a group
    /// are missing, unless that group alone is not opened; [`LogFault::Storage`] when a file is missing or cannot be read.
    pub fn open(runtime: &Runtime, dir: PathBuf, options: Options) -> Result<Store, LogFault> {
        let recovered = recovery::recover(&*runtime.disk, &dir, options.cluster, options.may_quarantine)?;
        recovered.check();
        let (commands, receiver) = mpsc::channel(4096);
        let groups = recovered.groups.into_iter().map(|(id, state)| (id, Arc::new(Group::new(id, state))));
        let shared = Arc::new(Shared {
            disk: runtime.disk.clone(),
            dir,
            options,
            queued_bytes: AtomicUsize::new(0),
            appended: AtomicU64::new(0),
            syncs: AtomicU64::new(0),
            groups: Mutex::new(groups.collect()),
            quarantined: Mutex::new(recovered.quarantined),
            segments: Mutex::new(recovered.segments),
            cuts: AtomicU64::new(0),
            failed: Mutex::new(None),
        });
        let writer = writer::Writer::new(&shared, recovered.current, recovered.mark);
        runtime.spawner.spawn_owner("log-writer".into(), Box::pin(writer.run(runtime.clone(), receiver)));
        Ok(Store { handle: Handle { shared, commands } })
    }

    /// How the store behaves.
    pub fn options(&self) -> &Options {
        &self.handle.shared.options
    }

    /// All groups, but for those that were removed.
    pub fn groups(&self) -> Vec<LogletId> {
        let groups = self.handle.shared.groups.lock();
        groups.iter().filter(|(_, group)| !group.state.lock().is_removed).map(|(id, _)| *id).collect()
    }

    /// Whether a group was removed and has not begun again.
    pub fn is_removed(&self, id: LogletId) -> bool {
        self.handle.shared.groups.lock().get(&id).is_some_and(|group| group.state.lock().is_removed)
    }

    /// Groups that are not opened because a record of theirs is damaged: they can only be removed, and begin again then.
    pub fn quarantined(&self) -> BTreeMap<LogletId, LogFault> {
        self.handle.shared.quarantined.lock().clone()
    }

    /// A group; it is made if there is none of that id.
    ///
    /// # Errors
    /// Why it is not opened: a record of it is damaged, or it was removed.
    pub fn group(&self, id: impl Into<LogletId>) -> Result<StoredGroup, LogFault> {
        let id = id.into();
        if let Some(fault) = self.handle.shared.quarantined.lock().get(&id) {
            return Err(fault.clone());
        }
        let made = || Arc::new(Group::new(id, GroupState::default()));
        let group = self.handle.shared.groups.lock().entry(id).or_insert_with(made).clone();
        if group.state.lock().is_removed {
            return Err(LogFault::Unsupported(format!(
                "{id} was removed; a log begins anew as another incarnation"
            )));
        }
        Ok(StoredGroup { handle: self.handle.clone(), group })
    }

    /// Removes a group for good, quarantined or not; durable when it returns.
    ///
    /// # Errors
    /// [`LogFault::Storage`] or [`LogFault::NoRoom`] when that cannot be written.
    pub async fn remove(&self, id: LogletId) -> Result<(), LogFault> {
        let Some(group) = self.handle.shared.groups.lock().get(&id).cloned() else { return Ok(()) };
        let is_removed = group.state.lock().is_removed;
        if !is_removed {
            let group = StoredGroup { handle: self.handle.clone(), group };
            group.write(vec![Write::Remove]).await?;
        }
        self.handle.shared.quarantined.lock().remove(&id);
        self.handle.trim().await
    }

    /// Begins a group again that was removed, with nothing but this vote, which must promise nothing (its epoch is 0); durable when
    /// it returns. What is left of the group's records is none of it any more. Where there was none of that id, it is made.
    ///
    /// # Errors
    /// [`LogFault::Unsupported`] for a group that is there, or a vote that promises something; [`LogFault::Storage`] or
    /// [`LogFault::NoRoom`] when it cannot be written.
    pub async fn revive(&self, id: LogletId, vote: Vote) -> Result<(), LogFault> {
        let made = || Arc::new(Group::new(id, GroupState { is_removed: true, ..GroupState::default() }));
        let group = self.handle.shared.groups.lock().entry(id).or_insert_with(made).clone();
        if !group.state.lock().is_removed || vote.epoch != Epoch(0) {
            return Err(LogFault::Unsupported(format!("{id} is there: only what was removed begins again")));
        }
        let group = StoredGroup { handle: self.handle.clone(), group };
        group.write(vec![Write::Vote(vote)]).await
    }

    /// What a group holds, without opening it; `None` when there is none of that id.
    pub fn bounds(&self, id: impl Into<LogletId>) -> Option<Bounds> {
        let id = id.into();
        let group = self.handle.shared.groups.lock().get(&id).cloned()?;
        let last = *group.last.borrow();
        Some(Bounds { first: self.handle.shared.first_position(id), last })
    }

    /// The record at a position, without opening its group; `None` when there is none. Blocks on the disk.
    ///
    /// # Errors
    /// [`LogFault::Corrupt`] where it is damaged.
    pub fn record(&self, id: impl Into<LogletId>, position: Position) -> Result<Option<Record>, LogFault> {
        reader::GroupReader::new(self.handle.shared.clone(), id.into()).at(position)
    }

    /// What all segments take, and what was appended to them.
    pub fn usage(&self) -> Usage {
        let shared = &self.handle.shared;
        Usage {
            bytes: shared.segments.lock().iter().map(|segment| segment.bytes).sum(),
            appended: shared.appended.load(Ordering::Relaxed),
            syncs: shared.syncs.load(Ordering::Relaxed),
        }
    }

    /// Why the store stopped, if it has.
    pub fn failed(&self) -> Option<String> {
        self.handle.failed()
    }
}

/// For tests of what lies on disk.
#[doc(hidden)]
pub mod internals {
    use crate::{LogFault, recovery};
    pub use crate::{
        format::*,
        recovery::{make_durable, read_mark},
        span::Span,
    };

    /// Recovers a directory as a store does, and says nothing of it but what is wrong.
    pub fn recover(
        disk: &dyn clutch_runtime::Disk,
        dir: &std::path::Path,
        cluster: u64,
    ) -> Result<Found, LogFault> {
        recovery::recover(disk, dir, cluster, false).map(Found)
    }

    /// What was recovered.
    pub struct Found(recovery::Recovered);

    impl Found {
        /// The position that a group goes on at.
        pub fn next(&self, id: impl Into<crate::LogletId>) -> Option<clutch_log::Position> {
            self.0.groups.get(&id.into()).map(|state| state.next)
        }

        /// The newest reign of a group.
        pub fn epoch(&self, id: impl Into<crate::LogletId>) -> Option<clutch_log::Epoch> {
            self.0.groups.get(&id.into()).map(|state| state.epoch)
        }

        /// The mark.
        pub fn mark(&self) -> crate::format::Mark {
            self.0.mark
        }

        /// Where it would be gone on.
        pub fn current(&self) -> Option<(u64, u64)> {
            self.0.current
        }

        /// The numbers of the segments.
        pub fn segments(&self) -> Vec<u64> {
            self.0.segments.iter().map(|segment| segment.number).collect()
        }
    }
}

#[cfg(test)]
mod tests;
