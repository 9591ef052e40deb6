//! The cluster's key is exchanged while the cluster runs, in steps that every node has taken before any takes the next: all believe the next
//! key (`keys/cluster.next`), all use it and go on believing the one before (both in `keys/cluster.key`), all forget that.
//!
//! Invariant: what a node uses, all others believe already. [Why so](../../docs/design/2026-11-28-rotating-the-key.md).

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use clutch_proto::{
    Refusal,
    admin::{KeyReply, RotateKey, rotate_key::Step},
    certificate::Key,
    mutants::{self, Mutant},
    types::Code,
};
use clutch_runtime::{ClusterKeys, Runtime};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::{joining, keys};

const KEY_FILE: &str = "cluster.key";
const NEXT_FILE: &str = "cluster.next";

/// What hears of other keys: those that sign and are believed, the one that is used first.
type Listener = Box<dyn Fn(&[Key]) + Send + Sync>;

struct State {
    /// In `cluster.key`, the one that is used first: it has the highest epoch.
    live: Vec<Key>,
    /// In `cluster.next`.
    next: Option<Key>,
}

impl State {
    fn used(&self) -> &Key {
        &self.live[0]
    }

    fn believed(&self) -> Vec<Key> {
        self.live.iter().chain(&self.next).cloned().collect()
    }
}

/// The cluster's keys of one node, in its directory and in what runs.
pub struct Rotation {
    /// Where they are written; `None` for a node without a directory.
    dir: Option<PathBuf>,
    cluster: u64,
    state: Mutex<State>,
    shared: ClusterKeys,
    listeners: Mutex<Vec<Listener>>,
    changes: watch::Sender<u64>,
}

/// Says which key it is, without telling it.
pub fn digest(key: &[u8; 32]) -> u64 {
    let digest = blake3::derive_key("clutch 2026 which cluster key", key);
    u64::from_le_bytes(digest[..8].try_into().expect("eight bytes"))
}

/// What a key travels under, between who has the other one.
fn sealing(under: &[u8; 32]) -> [u8; 32] {
    blake3::derive_key("clutch 2026 next cluster key", under)
}

fn bound(cluster: u64, epoch: u32) -> Vec<u8> {
    [cluster, u64::from(epoch)].map(u64::to_le_bytes).concat()
}

/// Closes a key under another that the one that it is for has.
///
/// # Errors
/// Never in practice: it is 32 bytes.
pub fn seal(runtime: &Runtime, cluster: u64, under: &[u8; 32], key: &Key) -> Result<Vec<u8>> {
    joining::seal(runtime, sealing(under), &bound(cluster, key.epoch), &key.secret)
}

/// Opens what [`seal`] has closed.
///
/// # Errors
/// When it was closed under another key, or for another cluster or epoch, or was changed.
pub fn open(cluster: u64, under: &[u8; 32], epoch: u32, sealed: &[u8]) -> Result<Key> {
    let opened = joining::open(sealing(under), &bound(cluster, epoch), sealed);
    let secret = opened.and_then(|bytes| bytes.try_into().ok()).context("the key cannot be opened")?;
    Ok(Key { epoch, secret })
}

impl Rotation {
    /// The keys in the directory `keys` of a node.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn read(dir: &Path, cluster: u64) -> Result<Rotation> {
        let mut live = keys::read(&dir.join(KEY_FILE))?;
        live.sort_by_key(|key| std::cmp::Reverse(key.epoch));
        let next_file = dir.join(NEXT_FILE);
        let next = match next_file.exists() {
            true => {
                let read = keys::read(&next_file).with_context(|| {
                    format!(
                        "the key that is to be used next: remove {}, and tell clutch cluster rotate-key again",
                        next_file.display()
                    )
                });
                read?.into_iter().next()
            }
            false => None,
        };
        // One that is used already was left there.
        let next = next.filter(|next| next.epoch > live[0].epoch);
        Ok(Rotation::begin(Some(dir.to_owned()), cluster, State { live, next }))
    }

    /// A node that has this key, and writes none.
    pub fn in_memory(cluster: u64, key: Key) -> Rotation {
        Rotation::begin(None, cluster, State { live: vec![key], next: None })
    }

    fn begin(dir: Option<PathBuf>, cluster: u64, state: State) -> Rotation {
        let shared = ClusterKeys::new(state.believed().iter().map(|key| key.secret).collect());
        let (changes, _) = watch::channel(0);
        Rotation { dir, cluster, state: Mutex::new(state), shared, listeners: Mutex::default(), changes }
    }

    fn write(&self, name: &str, keys: &[Key]) -> Result<()> {
        self.dir.as_ref().map_or(Ok(()), |dir| keys::write_all(&dir.join(name), keys))
    }

    /// The keys, as they are at any time.
    pub fn keys(&self) -> &ClusterKeys {
        &self.shared
    }

    /// The keys with their epochs, the one that is used first.
    pub fn believed(&self) -> Vec<Key> {
        self.state.lock().believed()
    }

    /// Counts the changes.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Tells this of the keys that there are now, and again of others.
    pub(crate) fn tell(&self, listener: impl Fn(&[Key]) + Send + Sync + 'static) {
        // No step is told to some and not to others.
        let mut listeners = self.listeners.lock();
        listener(&self.believed());
        listeners.push(Box::new(listener));
    }

    /// Takes a step that an operator asks for, who has shown this key; what there is then.
    ///
    /// # Errors
    /// When the step is not the next one, or cannot be written.
    pub(crate) fn step(
        &self,
        runtime: &Runtime,
        op: &RotateKey,
        shown: &[u8; 32],
    ) -> Result<KeyReply, Refusal> {
        // What could not be written may be there all the same.
        let refused = |error: anyhow::Error| {
            let is_io = error.chain().any(|cause| cause.is::<std::io::Error>());
            let code = if is_io { Code::OutcomeUnknown } else { Code::InvalidArgument };
            Refusal::new(code, format!("{error:#}"))
        };
        let sealed = match Step::try_from(op.step) {
            Ok(Step::Look) => Vec::new(),
            Ok(Step::Believe) => self.believe(runtime, op, shown).map_err(refused)?,
            Ok(Step::Use) => self.use_next(op).map(|()| Vec::new()).map_err(refused)?,
            Ok(Step::Forget) => self.forget(op).map(|()| Vec::new()).map_err(refused)?,
            Err(_) => return Err(Refusal::malformed("a step of a rotation that this build does not know")),
        };
        let mut reply = self.look();
        reply.sealed = sealed.into();
        Ok(reply)
    }

    fn look(&self) -> KeyReply {
        let state = self.state.lock();
        let file = self.dir.as_ref().and_then(|dir| fs::metadata(dir.join(KEY_FILE)).ok());
        let changed = file.and_then(|file| file.modified().ok());
        let since = changed.and_then(|at| at.elapsed().ok()).unwrap_or(Duration::ZERO);
        KeyReply {
            used: state.used().epoch,
            used_digest: digest(&state.used().secret),
            next: state.next.as_ref().map_or(0, |key| key.epoch),
            next_digest: state.next.as_ref().map_or(0, |key| digest(&key.secret)),
            before: state.live.get(1).map_or(0, |key| key.epoch),
            used_for_s: since.as_secs(),
            ..KeyReply::default()
        }
    }

    /// Believes the next key: the one that is named, the one that is there, or one that is drawn here. Closed under the shown one.
    fn believe(&self, runtime: &Runtime, op: &RotateKey, shown: &[u8; 32]) -> Result<Vec<u8>> {
        {
            let mut state = self.state.lock();
            if op.epoch == state.used().epoch {
                // Whoever has only the one before is given nothing by it.
                ensure!(
                    *shown == state.used().secret,
                    "the key of epoch {} is used already: name keys/cluster.key of a node as it is now",
                    op.epoch
                );
                return seal(runtime, self.cluster, shown, state.used());
            }
            ensure!(
                op.epoch == state.used().epoch + 1,
                "the key of epoch {} is used here, so {} cannot be the next one",
                state.used().epoch,
                op.epoch
            );
            ensure!(
                state.live.len() == 1,
                "the key before the one that is used is believed still: end that change first (clutch cluster rotate-key --finish)"
            );
            let given = match op.sealed.is_empty() {
                true => state.next.clone(),
                false => Some(open(self.cluster, shown, op.epoch, &op.sealed)?),
            };
            let next = given.unwrap_or_else(|| {
                let mut secret = [0; 32];
                runtime.random.fill(&mut secret);
                Key { epoch: op.epoch, secret }
            });
            self.write(NEXT_FILE, std::slice::from_ref(&next))?;
            state.next = Some(next);
        }
        self.publish();
        let state = self.state.lock();
        let next = state.next.as_ref().context("it is there")?;
        seal(runtime, self.cluster, shown, next)
    }

    fn use_next(&self, op: &RotateKey) -> Result<()> {
        {
            let mut state = self.state.lock();
            if state.used().epoch == op.epoch && digest(&state.used().secret) == op.digest {
                return Ok(());
            }
            let next = state.next.clone().filter(|next| next.epoch == op.epoch);
            let Some(next) = next.filter(|next| digest(&next.secret) == op.digest) else {
                bail!("the key of epoch {} that is to be used is not believed here", op.epoch);
            };
            let live: Vec<Key> = [&next, state.used()].into_iter().cloned().collect();
            self.write(KEY_FILE, &live)?;
            (state.live, state.next) = (live, None);
        }
        self.publish();
        if let Err(error) = self.remove_next() {
            // A start does not mind it: what is used already is not the next one.
            tracing::warn!(%error, "remove the key that is used by now");
        }
        Ok(())
    }

    fn forget(&self, op: &RotateKey) -> Result<()> {
        {
            let mut state = self.state.lock();
            ensure!(
                state.used().epoch == op.epoch && digest(&state.used().secret) == op.digest,
                "the key of epoch {} is used here, not that of {}",
                state.used().epoch,
                op.epoch
            );
            if state.live.len() == 1 {
                return Ok(());
            }
            let live = vec![state.used().clone()];
            self.write(KEY_FILE, &live)?;
            if !mutants::is(Mutant::ForgottenKeyBelieved) {
                state.live = live;
            }
        }
        self.publish();
        Ok(())
    }

    fn remove_next(&self) -> Result<()> {
        let Some(path) = self.dir.as_ref().map(|dir| dir.join(NEXT_FILE)) else { return Ok(()) };
        match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("remove {}", path.display()))
            }
            _ => Ok(()),
        }
    }

    fn publish(&self) {
        // One after the other: what is told last is what there is.
        let listeners = self.listeners.lock();
        let believed = self.believed();
        self.shared.set(believed.iter().map(|key| key.secret).collect());
        listeners.iter().for_each(|listener| listener(&believed));
        self.changes.send_modify(|count| *count += 1);
    }
}

#[cfg(test)]
mod tests;
