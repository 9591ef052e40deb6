//! Logs of which this node's part is damaged: it is taken out of them by the others, forgets what it has, and comes back as one that
//! has nothing.
//!
//! A member that has lost a record may have lost what it acknowledged, so it must neither vote nor lead with what is left. The other
//! members have everything. Where they cannot be asked, the node goes on without the log, and tries again when it is started.
//!
//! Invariants: nothing is forgotten before the leader of a log, confirmed by a quorum, has said that this node is no member; what is
//! forgotten is written down (`DIR/rejoin`) from before that until this node votes again, or has learned that it is not meant to.

use std::{collections::BTreeMap, io, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, ensure};
use clutch_client::Client;
use clutch_client_maintenance::members::{self, Change};
use clutch_log::{LogFault, LogId, LogletId, NodeId};
use clutch_log_raft::RaftEngine;
use clutch_runtime::{Disk, Runtime};
use futures_util::future::join_all;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::stores::StoreProvider;

/// The file that says where this node is to vote again.
pub(super) const FILE: &str = "rejoin";
const VERSION: u32 = 1;
/// How long the others may take to take this node out of a log before it starts without that.
const TAKE_OUT_MAX: Duration = Duration::from_secs(30);
/// Pause before this node asks again to be taken in.
const AGAIN: Duration = Duration::from_secs(5);
/// How long a node waits until it is written down that it forgets a log.
const FORGET_PATIENCE: Duration = Duration::from_secs(10);

#[derive(Serialize, Deserialize)]
struct RejoinFile {
    version: u32,
    logs: Vec<Note>,
}

/// A loglet that this node is about to forget, or has forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    role: u8,
    number: u32,
    incarnation: u32,
    /// Whether it voted, and is to vote again.
    voted: bool,
    /// The members that there were when it was taken out; 0 before that is known. Who finds others was not meant to come back.
    config: u64,
}

impl Note {
    fn id(&self) -> LogletId {
        LogletId { log: LogId { role: self.role, number: self.number }, incarnation: self.incarnation }
    }
}

/// What this node has forgotten, or is about to, as `DIR/rejoin` says it.
pub(super) struct Rejoining {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    notes: Mutex<Vec<Note>>,
}

impl Rejoining {
    /// What the file says; nothing where there is none. `logs` are all that there can be.
    ///
    /// # Errors
    /// When it cannot be read, or names another log.
    pub(super) fn open(disk: Arc<dyn Disk>, path: PathBuf, logs: &[LogId]) -> Result<Rejoining> {
        let notes = match disk.read(&path) {
            Ok(bytes) => {
                let damaged = || {
                    format!(
                        "{} is damaged: it names the logs that this node is to come back to. Remove it, and look with clutch status \
                         whether the node votes in all of them; clutch cluster add-replica brings it back",
                        path.display()
                    )
                };
                let file: RejoinFile = serde_json::from_slice(&bytes).with_context(damaged)?;
                ensure!(
                    file.version == VERSION,
                    "{} has version {}, and this build knows {VERSION}: start a newer one",
                    path.display(),
                    file.version
                );
                ensure!(file.logs.iter().all(|note| logs.contains(&note.id().log)), damaged());
                file.logs
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
        };
        Ok(Rejoining { disk, path, notes: Mutex::new(notes) })
    }

    fn notes(&self) -> Vec<Note> {
        self.notes.lock().clone()
    }

    fn note(&self, id: LogletId) -> Option<Note> {
        self.notes.lock().iter().find(|note| note.id() == id).copied()
    }

    /// Writes down what holds of a loglet, nothing where it is `None`; durable when it returns.
    fn write(&self, id: LogletId, note: Option<Note>) -> io::Result<()> {
        let mut notes = self.notes.lock();
        let mut wanted: Vec<Note> = notes.iter().filter(|known| known.id() != id).copied().collect();
        wanted.extend(note);
        if wanted.is_empty() {
            match self.disk.remove(&self.path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                Ok(()) | Err(_) => {}
            }
        } else {
            let file = RejoinFile { version: VERSION, logs: wanted.clone() };
            self.disk.replace(&self.path, &serde_json::to_vec(&file)?)?;
        }
        *notes = wanted;
        Ok(())
    }
}

/// By what a node is taken out of logs, before it serves.
pub(super) struct Healing<'a> {
    pub(super) runtime: &'a Runtime,
    /// One that has the cluster's key.
    pub(super) client: &'a Client,
    pub(super) node: NodeId,
    pub(super) engine: &'a RaftEngine,
    pub(super) stores: &'a dyn StoreProvider,
    pub(super) rejoining: &'a Rejoining,
}

impl Healing<'_> {
    /// Goes on where an earlier start was cut off while it forgot something.
    ///
    /// # Errors
    /// When that cannot be written.
    pub(super) async fn finish(&self) -> Result<()> {
        for note in self.rejoining.notes() {
            if self.engine.is_half_forgotten(note.id()) {
                self.forget(note).await?;
            }
        }
        Ok(())
    }

    /// Lets the others take this node out of the logs that are damaged here, and forgets what it had of them. The logs where that
    /// could not be done, with what is to be told of them: the node must go on without these.
    pub(super) async fn take_out(&self, damaged: BTreeMap<LogletId, LogFault>) -> BTreeMap<LogId, String> {
        let all = damaged.into_iter().map(|(id, fault)| async move {
            let taken = self.runtime.timeout(TAKE_OUT_MAX, self.take_out_of(id)).await;
            let taken = taken.unwrap_or_else(|| Err(anyhow::anyhow!("the others do not answer in time")));
            // What has begun is not given up for want of time.
            let forgotten = match taken {
                Ok(note) => self.forget(note).await,
                Err(error) => Err(error),
            };
            match forgotten {
                Ok(()) => {
                    tracing::warn!(log = %id, %fault, "was damaged here; it comes anew from the others");
                    self.runtime.note("node: a damaged log is forgotten");
                    None
                }
                Err(error) => Some((
                    id.log,
                    format!(
                        "the log {} is damaged here, and this node goes on without it: {fault}. The other members have what it had. \
                         When most of them can be reached, start this node again, and it comes back to the log ({error:#})",
                        id.log
                    ),
                )),
            }
        });
        join_all(all).await.into_iter().flatten().collect()
    }

    /// Lets the others take this node out of a log; what is to be remembered of that, and is written down.
    async fn take_out_of(&self, id: LogletId) -> Result<Note> {
        let known = match self.rejoining.note(id) {
            Some(note) => note,
            None => {
                let (status, _) = members::leader_of(self.client, id.log).await?;
                let own = status.members.iter().find(|member| member.node == self.node);
                let (LogId { role, number }, incarnation) = (id.log, id.incarnation);
                let voted = own.is_some_and(|own| own.voter);
                Note { role, number, incarnation, voted, config: 0 }
            }
        };
        self.rejoining.write(id, Some(known)).context("write down that this node forgets")?;
        members::change(self.client, id.log, Change::Remove(self.node), &|_, _| {}).await?;
        // Who led once and was cut off, or stopped, may not know that this node was taken in again since.
        let status = members::confirmed(self.client, id.log).await?;
        let is_member = status.members.iter().any(|member| member.node == self.node);
        ensure!(!is_member && status.leading, "node {} is still a member", self.node);
        let note = Note { config: status.config, ..known };
        self.rejoining.write(id, Some(note)).context("write down that this node forgets")?;
        Ok(note)
    }

    async fn forget(&self, note: Note) -> Result<()> {
        let id = note.id();
        // The state is made of what is forgotten, and may be ahead of what comes.
        self.stores.condemn(id.log, "its log was damaged");
        ensure!(self.stores.condemned(id.log).is_some(), "the state cannot be marked as one to be made anew");
        // On a full disk that waits for room, and the node is to say so rather than wait with it.
        let forgotten = self.runtime.timeout(FORGET_PATIENCE, self.engine.forget(id)).await;
        let forgotten = forgotten.context("no room to write down that the log is forgotten: make room")?;
        forgotten.context("forget the log")?;
        if !note.voted {
            self.rejoining.write(id, None).context("write down that nothing is to be come back to")?;
        }
        Ok(())
    }
}

/// Lets the others take this node in again where it was taken out, one log after the other, until it votes in all of them.
/// `left_out` are logs that it goes on without.
pub(super) async fn come_back(client: Client, node: NodeId, rejoining: Arc<Rejoining>, left_out: Vec<LogId>) {
    let clock = client.runtime().clock.clone();
    loop {
        let notes = rejoining.notes().into_iter().filter(|note| !left_out.contains(&note.id().log));
        let notes: Vec<Note> = notes.collect();
        if notes.is_empty() {
            return;
        }
        for note in notes {
            let log = note.id().log;
            match come_back_to(&client, node, note).await.and_then(|()| Ok(rejoining.write(note.id(), None)?))
            {
                Ok(()) => client.runtime().note("node: comes back to a log that it had forgotten"),
                Err(error) => {
                    tracing::warn!(%log, error = %format!("{error:#}"), "cannot come back to it yet")
                }
            }
        }
        clock.sleep(AGAIN).await;
    }
}

async fn come_back_to(client: &Client, node: NodeId, note: Note) -> Result<()> {
    let log = note.id().log;
    let status = members::confirmed(client, log).await?;
    let is_member = status.members.iter().any(|member| member.node == node);
    if !is_member && status.config != note.config {
        tracing::warn!(
            %log,
            "others keep it now than when this node was taken out, so it stays out: clutch cluster add-replica brings it back"
        );
        return Ok(());
    }
    members::change(client, log, Change::Add(node), &|_, _| {}).await?;
    tracing::warn!(%log, "this node has everything of it again, and votes");
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clutch_runtime::simulated::{NodeId as SimNode, World};

    use super::*;

    fn note(log: LogId, config: u64) -> Note {
        Note { role: log.role, number: log.number, incarnation: 1, voted: true, config }
    }

    #[test]
    fn what_is_to_be_come_back_to_is_known_after_a_crash_and_a_damaged_note_is_no_empty_one() {
        let world = World::new(1);
        let disk = world.disk(SimNode(1));
        let logs = [LogId::CDC, LogId::shard(7)];
        let open = || Rejoining::open(disk.clone(), FILE.into(), &logs);
        let rejoining = open().expect("there is none");
        assert!(rejoining.notes().is_empty());
        let (cdc, shard) = (note(LogId::CDC, 3), note(LogId::shard(7), 0));
        for written in [note(LogId::CDC, 0), shard, cdc] {
            rejoining.write(written.id(), Some(written)).expect("written");
        }
        world.crash(SimNode(1));
        assert_eq!(open().expect("reads").notes(), [shard, cdc], "what was written last holds");
        rejoining.write(cdc.id(), None).expect("written");
        assert_eq!(open().expect("reads").notes(), [shard]);
        let other =
            serde_json::to_vec(&RejoinFile { version: VERSION, logs: vec![note(LogId::shard(8), 1)] });
        for damaged in
            [b"{".to_vec(), Vec::new(), b"{\"version\":2,\"logs\":[]}".to_vec(), other.expect("text")]
        {
            disk.replace(Path::new(FILE), &damaged).expect("written");
            assert!(open().is_err(), "{damaged:?}");
        }
        rejoining.write(shard.id(), None).expect("written");
        assert!(open().expect("is gone").notes().is_empty());
    }
}
