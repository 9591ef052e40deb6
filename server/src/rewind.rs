//! Takes a stopped cluster back to an instant: every log is cut at one time, which keeps the causes of all that it keeps.
//! States and checkpoints of later times are set aside, and the next start builds the states anew. Nothing is removed.
//!
//! It is the way back from a future that should not have been: logs that a wrong clock has led ahead, or a mistake that no
//! undelete mends. What was acknowledged after the instant is not in the cluster any more.
//!
//! Invariant: an interruption at any moment leaves the cluster as it was, or one that says that the rewind must be finished.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, Result, bail, ensure};
use clutch_log::{Event, LogId, Outcome, Position};
use clutch_log_local::{
    LocalEngine, Options,
    cut::{self, Kept},
};
use clutch_proto::state::{Entry, entry::Kind};
use clutch_runtime::Runtime;
use clutch_state::Store;
use prost::Message as _;

use crate::{
    ClusterFile, clock_file,
    replay::{self, Places, Report, Until},
    stores::RocksStores,
    up,
};

/// What becomes of one log.
#[derive(Clone, Debug)]
pub struct Line {
    /// Which.
    pub log: LogId,
    /// What remains of it.
    pub remains: Report,
    /// All of it.
    pub whole: Report,
    /// Opens what remains: no id of the lost future is handed out again. The registry needs none.
    jump: Option<Vec<u8>>,
}

impl Line {
    /// How many entries go.
    pub fn entries_lost(&self) -> u64 {
        self.whole.entries.saturating_sub(self.remains.entries)
    }
}

/// What a rewind would do.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The instant, in nanoseconds.
    pub time: u64,
    /// Of every log.
    pub lines: Vec<Line>,
}

/// The directory of a stopped cluster.
#[derive(Clone)]
pub struct Rewind {
    runtime: Runtime,
    dir: PathBuf,
    cluster: ClusterFile,
}

impl Rewind {
    /// Looks at a directory of `clutch up`; the caller holds its lock.
    ///
    /// # Errors
    /// It is none.
    pub fn new(runtime: &Runtime, dir: &Path) -> Result<Rewind> {
        let cluster = up::cluster_in(runtime, dir)?;
        Ok(Rewind { runtime: runtime.clone(), dir: dir.to_owned(), cluster })
    }

    fn log_dir(&self) -> PathBuf {
        self.dir.join("log")
    }

    fn state_dir(&self) -> PathBuf {
        self.dir.join("state")
    }

    /// All logs of the cluster.
    pub fn logs(&self) -> impl Iterator<Item = LogId> + use<> {
        [LogId::REGISTRY, LogId::CDC].into_iter().chain((0..self.cluster.shards).map(LogId::shard))
    }

    /// Whether an earlier rewind was interrupted while files were moved; [`Rewind::finish`] is all that can be done then.
    pub fn is_unfinished(&self) -> bool {
        cut::is_unfinished(&*self.runtime.disk, &self.log_dir())
    }

    /// Finds out what a rewind to `time` does with one log: replays it twice, into stores that the caller makes. Nothing is
    /// changed. Blocks on the disk.
    ///
    /// # Errors
    /// The log is damaged, or what is kept of it does not reach back to `time`.
    pub fn plan(
        &self,
        id: LogId,
        time: u64,
        stores: [Arc<dyn Store>; 2],
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Line> {
        let places = Places::of(&self.dir);
        let mut replay = |store: Arc<dyn Store>, until: Until| {
            replay::from_directory(&*self.runtime.disk, &places, id, store, until, None, progress)
                .with_context(|| format!("replay {id}"))
        };
        let [remains, whole] = stores;
        let lost = whole.clone();
        let remains = replay(remains, Until { time: Some(time), position: None })?;
        let whole = replay(whole, Until::default())?;
        let jump = if id == LogId::REGISTRY {
            None
        } else if id == LogId::CDC {
            Some(clutch_cdc::jump_past(&*lost)?.encode_to_vec())
        } else {
            Some(clutch_shard::jump::past(&*lost)?.encode_to_vec())
        };
        Ok(Line { log: id, remains, whole, jump })
    }

    /// Cuts the logs as planned, compares what remains with the plan, and sets the states aside. `store` makes an empty store
    /// for each replay. Returns where the old logs are. Durable when it returns.
    ///
    /// # Errors
    /// A file cannot be read or written, or what remains is not what was planned. The cluster is as it was then, unless
    /// [`Rewind::is_unfinished`].
    pub async fn execute(
        &self,
        plan: &Plan,
        store: impl FnMut() -> Result<Arc<dyn Store>>,
    ) -> Result<PathBuf> {
        let done = self.try_execute(plan, store).await;
        if done.is_err()
            && let Err(error) = cut::discard(&*self.runtime.disk, &self.log_dir())
        {
            tracing::warn!(%error, "remove the copy that was made");
        }
        done
    }

    async fn try_execute(
        &self,
        plan: &Plan,
        mut store: impl FnMut() -> Result<Arc<dyn Store>>,
    ) -> Result<PathBuf> {
        let (disk, log_dir) = (&*self.runtime.disk, self.log_dir());
        let keep: BTreeMap<LogId, Kept> =
            plan.lines.iter().map(|line| (line.log, kept(&line.remains))).collect();
        cut::prepare(disk, &log_dir, &keep)?;
        let prepared = cut::prepared(&log_dir);
        for line in &plan.lines {
            let places = Places { log: prepared.clone(), state: self.state_dir() };
            let until = Until::default();
            let again =
                replay::from_directory(disk, &places, line.log, store()?, until, None, &mut |_, _| {})?;
            let (ours, planned) =
                ((again.position, &again.hash), (line.remains.position, &line.remains.hash));
            ensure!(
                ours == planned,
                "{}: {ours:?} remains, {planned:?} was planned; nothing was changed",
                line.log
            );
        }
        self.jump(plan, &prepared).await?;
        self.set_states_aside(plan)?;
        self.finish()
    }

    /// Opens what remains with entries that go past the lost future.
    async fn jump(&self, plan: &Plan, prepared: &Path) -> Result<()> {
        let options = Options { cluster: self.cluster.cluster_id()?, ..Options::default() };
        let engine = LocalEngine::open(&self.runtime, prepared.to_owned(), options)?;
        for line in &plan.lines {
            let Some(body) = &line.jump else { continue };
            let log = engine.log(line.log).await?;
            let entry = Entry { stamp: line.remains.time, kind: Some(Kind::Body(body.clone().into())) };
            let mut events = log.events(kept(&line.remains).position.next());
            let epoch = loop {
                if let Event::Leader { epoch, is_self: true, .. } = events.next().await? {
                    break epoch;
                }
            };
            match log.propose(epoch, vec![entry.encode_to_vec().into()])?.await {
                Outcome::Committed(_) => {}
                other => bail!("append to what remains of {}: {other:?}", line.log),
            }
        }
        Ok(())
    }

    /// States that know the lost future, and checkpoints of it, make way for those that the next start builds.
    fn set_states_aside(&self, plan: &Plan) -> Result<()> {
        for line in &plan.lines {
            let database = RocksStores::database(&self.state_dir(), line.log);
            let home = database.parent().context("a state has a directory")?.to_owned();
            if !home.exists() {
                continue;
            }
            let checkpoints = RocksStores::checkpoints_of(&self.state_dir(), line.log);
            let aside = (1..).map(|n| home.join(format!("before-rewind-{n}"))).find(|path| !path.exists());
            let aside = aside.context("a free name")?;
            fs::create_dir_all(aside.join("checkpoints"))
                .with_context(|| format!("make {}", aside.display()))?;
            let mut moves = vec![(database, aside.join("db"))];
            let note = RocksStores::condemned_note(&self.state_dir(), line.log);
            moves.push((note, aside.join("condemned")));
            for position in RocksStores::checkpoint_positions(&self.state_dir(), line.log)? {
                // The one that all begins from stays; one at the cut may hold entries of its batch that do not remain.
                let is_later = position > line.remains.position
                    || line.remains.cut_inside_batch && position == line.remains.position;
                if is_later && position != line.remains.from_checkpoint {
                    let name = format!("{position:020}");
                    moves.push((checkpoints.join(&name), aside.join("checkpoints").join(&name)));
                }
            }
            for (from, to) in moves {
                if from.exists() {
                    fs::rename(&from, &to).with_context(|| format!("set {} aside", from.display()))?;
                }
            }
            for changed in [aside.join("checkpoints"), aside, checkpoints, home] {
                if changed.exists() {
                    self.runtime
                        .disk
                        .sync_dir(&changed)
                        .with_context(|| format!("sync {}", changed.display()))?;
                }
            }
        }
        Ok(())
    }

    /// Exchanges the logs with those that were made ready, or finishes that. Returns where the old ones are.
    ///
    /// # Errors
    /// A file cannot be moved; doing it again goes on where it stopped.
    pub fn finish(&self) -> Result<PathBuf> {
        self.set_clock()?;
        Ok(cut::put_in_place(&*self.runtime.disk, &self.log_dir())?)
    }

    /// What the file says of the time is of the lost future. Whoever rewinds vouches for the machine's present time: from the
    /// end of what remains the next start goes on to it, however long ago that is.
    fn set_clock(&self) -> Result<()> {
        let clock = self.dir.join(clock_file::FILE);
        match fs::remove_file(&clock) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            removed => removed.with_context(|| format!("remove {}", clock.display()))?,
        }
        clock_file::write(&self.runtime, &self.dir, self.runtime.clock.now());
        Ok(())
    }
}

fn kept(remains: &Report) -> Kept {
    // Where nothing was replayed, a checkpoint is the end of what remains, and its batch remains whole.
    let entries = if remains.batches == 0 { usize::MAX } else { remains.last_entries };
    // A checkpoint's position may lie behind its last batch: the engine's own records have positions, too.
    Kept { position: Position(remains.position.max(remains.from_checkpoint)), entries }
}
