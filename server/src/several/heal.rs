//! Logs of which this node's part is damaged: it is taken out of them by the others, forgets what it has, and comes back as one that
//! has nothing.
//!
//! A member that has lost a record may have lost what it acknowledged, so it must neither vote nor lead with what is left. The other
//! members have everything. Where they cannot be asked, the node goes on without the log, and tries again when it is started.
//!
//! Invariants: nothing is forgotten before the leader of a log has said that this node is no member of it any more; a log that
//! this node was taken out of is written down (`DIR/rejoin`) until it votes in it again.

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

#[derive(Serialize, Deserialize)]
struct RejoinFile {
    version: u32,
    logs: Vec<LogName>,
}

#[derive(Serialize, Deserialize)]
struct LogName {
    role: u8,
    number: u32,
}

/// The logs that this node was taken out of, or is about to be, and is to vote in again.
pub(super) struct Rejoining {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    logs: Mutex<Vec<LogId>>,
}

impl Rejoining {
    /// What the file says; nothing where there is none.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn open(disk: Arc<dyn Disk>, path: PathBuf) -> Result<Rejoining> {
        let logs = match disk.read(&path) {
            Ok(bytes) => {
                let file: RejoinFile = serde_json::from_slice(&bytes).with_context(|| {
                    format!(
                        "{} is damaged: it names the logs that this node is to come back to. Remove it, and look with clutch status \
                         whether the node votes in all of them; clutch cluster add-replica brings it back",
                        path.display()
                    )
                })?;
                ensure!(
                    file.version == VERSION,
                    "{} has version {}, and this build knows {VERSION}: start a newer one",
                    path.display(),
                    file.version
                );
                file.logs.into_iter().map(|log| LogId { role: log.role, number: log.number }).collect()
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
        };
        Ok(Rejoining { disk, path, logs: Mutex::new(logs) })
    }

    fn logs(&self) -> Vec<LogId> {
        self.logs.lock().clone()
    }

    /// Changes what the file says; durable when it returns.
    fn change(&self, change: impl FnOnce(&mut Vec<LogId>)) -> io::Result<()> {
        let mut logs = self.logs.lock();
        let mut wanted = logs.clone();
        change(&mut wanted);
        if wanted.is_empty() {
            match self.disk.remove(&self.path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                Ok(()) | Err(_) => {}
            }
        } else {
            let names = wanted.iter().map(|log| LogName { role: log.role, number: log.number }).collect();
            let file = RejoinFile { version: VERSION, logs: names };
            self.disk.replace(&self.path, &serde_json::to_vec(&file)?)?;
        }
        *logs = wanted;
        Ok(())
    }

    fn add(&self, log: LogId) -> io::Result<()> {
        self.change(|logs| {
            if !logs.contains(&log) {
                logs.push(log);
            }
        })
    }

    fn remove(&self, log: LogId) -> io::Result<()> {
        self.change(|logs| logs.retain(|known| *known != log))
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
    /// Lets the others take this node out of the logs that are damaged here, and forgets what it had of them. The logs where that
    /// could not be done, with what is to be told of them: the node must go on without these.
    pub(super) async fn take_out(&self, damaged: BTreeMap<LogletId, LogFault>) -> BTreeMap<LogId, String> {
        let all = damaged.into_iter().map(|(id, fault)| async move {
            let taken = self.runtime.timeout(TAKE_OUT_MAX, self.take_out_of(id, &fault)).await;
            let taken = taken.unwrap_or_else(|| Err(anyhow::anyhow!("the others do not answer in time")));
            match taken {
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

    async fn take_out_of(&self, id: LogletId, fault: &LogFault) -> Result<()> {
        self.rejoining.add(id.log).context("write down that this node is to come back")?;
        let status = members::change(self.client, id.log, Change::Remove(self.node), &|_, _| {}).await?;
        let is_member = status.members.iter().any(|member| member.node == self.node);
        ensure!(!is_member && status.leading, "node {} is still a member", self.node);
        // The state is made of what is forgotten, and may be ahead of what comes.
        self.stores.condemn(id.log, &format!("its log was damaged: {fault}"));
        ensure!(self.stores.condemned(id.log).is_some(), "the state cannot be marked as one to be made anew");
        self.engine.forget(id).await.context("forget the log")?;
        Ok(())
    }
}

/// Lets the others take this node in again where it was taken out, one log after the other, until it votes in all of them.
/// `left_out` are logs that it goes on without.
pub(super) async fn come_back(client: Client, node: NodeId, rejoining: Arc<Rejoining>, left_out: Vec<LogId>) {
    let clock = client.runtime().clock.clone();
    loop {
        let logs: Vec<LogId> = rejoining.logs().into_iter().filter(|log| !left_out.contains(log)).collect();
        if logs.is_empty() {
            return;
        }
        for log in logs {
            let added = members::change(&client, log, Change::Add(node), &|_, _| {}).await;
            let added = added.and_then(|_| Ok(rejoining.remove(log)?));
            match added {
                Ok(()) => {
                    tracing::warn!(%log, "this node has everything of it again, and votes");
                    client.runtime().note("node: comes back to a log that it had forgotten");
                }
                Err(error) => {
                    tracing::warn!(%log, error = %format!("{error:#}"), "cannot come back to it yet")
                }
            }
        }
        clock.sleep(AGAIN).await;
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clutch_runtime::simulated::{NodeId as SimNode, World};

    use super::*;

    #[test]
    fn what_is_to_be_come_back_to_is_known_after_a_crash_and_a_damaged_note_is_no_empty_one() {
        let world = World::new(1);
        let disk = world.disk(SimNode(1));
        let open = || Rejoining::open(disk.clone(), FILE.into());
        let rejoining = open().expect("there is none");
        assert!(rejoining.logs().is_empty());
        rejoining.add(LogId::CDC).expect("written");
        rejoining.add(LogId::shard(7)).expect("written");
        rejoining.add(LogId::CDC).expect("is there");
        world.crash(SimNode(1));
        assert_eq!(open().expect("reads").logs(), [LogId::CDC, LogId::shard(7)]);
        rejoining.remove(LogId::CDC).expect("written");
        assert_eq!(open().expect("reads").logs(), [LogId::shard(7)]);
        for damaged in [&b"{"[..], b"", b"{\"version\":2,\"logs\":[]}"] {
            disk.replace(Path::new(FILE), damaged).expect("written");
            assert!(open().is_err(), "{damaged:?}");
        }
        rejoining.remove(LogId::shard(7)).expect("written");
        assert!(open().expect("is gone").logs().is_empty());
    }
}
