//! The keys of clusters whose nodes run here under the same user, so that commands need not be told where a node's directory is.
//!
//! A node puts a copy of its cluster's key into a directory that only its user can look into, and keeps it locked for as long as it
//! runs: what nobody has locked was left by a node that is gone, and the next one removes it.

use std::{
    fs::{self, DirBuilder, File, TryLockError},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use clutch_runtime::Runtime;
use clutch_server::keys;
use tokio::sync::watch;

use crate::output::talk;

/// A copy of a cluster's key that is there while a node runs.
pub(crate) struct Published {
    path: PathBuf,
    locked: File,
}

impl Published {
    /// Copies the key again, which is another one by now.
    fn renew(&self, key: &Path) -> io::Result<()> {
        let content = fs::read(key)?;
        self.locked.set_len(0)?;
        self.locked.write_all_at(&content, 0)
    }
}

/// Copies a key again whenever it has changed, for as long as anybody tells of that.
pub(crate) async fn follow(published: Vec<Published>, key: PathBuf, mut changes: watch::Receiver<u64>) {
    while changes.changed().await.is_ok() {
        for copy in &published {
            if let Err(error) = copy.renew(&key) {
                tracing::warn!(%error, "copy the cluster's key for commands");
            }
        }
    }
}

impl Drop for Published {
    fn drop(&mut self) {
        // The next node removes what is left.
        let _ = fs::remove_file(&self.path);
    }
}

/// Where keys are, best first: in the directory of this user, where the system has one, and under `/tmp`. Not by the environment: nodes
/// and commands may have different ones. Both, because the first comes and goes as its user logs in and out.
fn places() -> [PathBuf; 2] {
    let uid = rustix::process::getuid().as_raw();
    [PathBuf::from(format!("/run/user/{uid}/clutch")), PathBuf::from(format!("/tmp/clutch-{uid}"))]
}

/// Fails unless a directory is this user's, and nobody else can look into it.
fn check(dir: &Path) -> Result<()> {
    let meta = fs::symlink_metadata(dir).with_context(|| format!("look at {}", dir.display()))?;
    let is_private =
        meta.is_dir() && meta.uid() == rustix::process::getuid().as_raw() && meta.mode() & 0o077 == 0;
    ensure!(
        is_private,
        "{} is not a directory of this user that is closed to others: remove it",
        dir.display()
    );
    Ok(())
}

/// Puts the key of a node's cluster, which this file holds, where commands find it, and says so where that cannot be; `address` is
/// where the node is reached.
pub(crate) fn publish(cluster: u64, address: &str, key: &Path) -> Vec<Published> {
    let all = places().map(|place| publish_in(&place, cluster, address, key));
    if let [Err(_), Err(error)] = &all {
        talk!("clutch: commands that need the cluster's key must be told where it is (--key): {error:#}");
    }
    all.into_iter().flatten().collect()
}

fn publish_in(dir: &Path, cluster: u64, address: &str, key: &Path) -> Result<Published> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(error).with_context(|| format!("make {}", dir.display()));
        }
        Ok(()) | Err(_) => check(dir)?,
    }
    let content = fs::read(key).with_context(|| format!("read {}", key.display()))?;
    for (path, file) in files(dir)? {
        if file.try_lock().is_ok() {
            // Another one may have been quicker.
            let _ = fs::remove_file(path);
        }
    }
    remove_unnamed(dir);
    // Nodes in containers may have the same process number.
    let now = std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_nanos());
    let address = address.replace(['/', '-'], "_");
    let name = format!("{cluster:016x}-{address}-{}-{now}", std::process::id());
    let path = dir.join(&name);
    // Locked before it has its name: else it could be taken for one that was left.
    let unnamed = dir.join(format!(".{name}"));
    let written = || -> io::Result<File> {
        let mut file = File::options().write(true).create_new(true).mode(0o600).open(&unnamed)?;
        file.lock()?;
        file.write_all(&content)?;
        fs::rename(&unnamed, &path)?;
        Ok(file)
    };
    let locked = written().with_context(|| format!("write {}", path.display()))?;
    Ok(Published { path, locked })
}

/// Removes what a node left that ended before it gave its copy a name, long ago: one that is about to is left alone.
fn remove_unnamed(dir: &Path) {
    let is_old = |entry: &fs::DirEntry| {
        let age = entry.metadata().and_then(|meta| meta.modified()).ok().and_then(|at| at.elapsed().ok());
        entry.file_name().to_string_lossy().starts_with('.') && age.is_some_and(|age| age.as_secs() > 3600)
    };
    for entry in fs::read_dir(dir).into_iter().flatten().flatten().filter(is_old) {
        let _ = fs::remove_file(entry.path());
    }
}

/// The files of a directory that are there, but those without a name yet.
fn files(dir: &Path) -> Result<Vec<(PathBuf, File)>> {
    let entries = fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))?;
    let paths = entries.flatten().map(|entry| entry.path());
    let named =
        paths.filter(|path| !path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.')));
    Ok(named.filter_map(|path| Some((path.clone(), File::open(path).ok()?))).collect())
}

/// The key of a cluster of which a node runs here, best of one at these addresses. One whose node has just begun to serve may take a
/// moment.
pub(crate) async fn find_of(runtime: &Runtime, cluster: u64, registry: &str) -> Option<[u8; 32]> {
    for _ in 0..20 {
        if let Some(key) = places().iter().find_map(|place| find_in(place, cluster, registry)) {
            return Some(key);
        }
        runtime.clock.sleep(Duration::from_millis(50)).await;
    }
    None
}

/// The key of a cluster of which a node runs here, best of one that is asked; `None` where none does. A copy of a directory that runs
/// beside it is the same cluster, and may have another key.
fn find_in(dir: &Path, cluster: u64, registry: &str) -> Option<[u8; 32]> {
    check(dir).ok()?;
    let own = format!("{cluster:016x}-");
    let is_own = |path: &Path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&own));
    let asked: Vec<String> =
        registry.split(',').map(|at| format!("-{}-", at.replace(['/', '-'], "_"))).collect();
    let is_asked = |path: &Path| asked.iter().any(|at| path.to_string_lossy().contains(at));
    let mut all: Vec<_> = files(dir).ok()?.into_iter().filter(|(path, _)| is_own(path)).collect();
    all.sort_by_key(|(path, _)| !is_asked(path));
    all.into_iter().find_map(|(path, file)| match file.try_lock_shared() {
        // One that was left may be of another cluster, in whose place a new one was made.
        Ok(()) => None,
        Err(TryLockError::WouldBlock) => keys::read_key(&path).ok(),
        Err(TryLockError::Error(_)) => None,
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    const LINE: &str = "1 0707070707070707070707070707070707070707070707070707070707070707\n";

    #[test]
    fn a_key_is_found_while_a_node_runs_and_not_in_a_place_that_others_can_see() {
        let at = tempfile::tempdir().expect("a directory");
        let (dir, key) = (at.path().join("ring"), at.path().join("cluster.key"));
        fs::write(&key, LINE).expect("written");
        assert_eq!(find_in(&dir, 5, "h:1,h:2"), None);
        let published = publish_in(&dir, 5, "h:2", &key).expect("published");
        assert_eq!((find_in(&dir, 5, "h:1,h:2"), find_in(&dir, 6, "h:1,h:2")), (Some([7; 32]), None));
        let left = dir.join("0000000000000006-1");
        fs::copy(&published.path, &left).expect("copied");
        assert_eq!(find_in(&dir, 6, "h:1,h:2"), None, "nobody has it locked");
        let other = publish_in(&dir, 7, "h:2", &key).expect("published");
        assert!(
            !left.exists() && find_in(&dir, 5, "h:1,h:2").is_some() && find_in(&dir, 7, "h:1,h:2").is_some()
        );
        fs::write(&key, LINE.replace("07", "09")).expect("written");
        let copies = ["h:3", "h:1"].map(|at| publish_in(&dir, 5, at, &key).expect("published"));
        assert_eq!(find_in(&dir, 5, "h:2"), Some([7; 32]), "a copy of the cluster has another key");
        assert_eq!(find_in(&dir, 5, "h:3"), Some([9; 32]));
        drop((published, copies));
        assert_eq!(find_in(&dir, 5, "h:1,h:2"), None, "the node has ended");
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).expect("opened");
        assert_eq!(find_in(&dir, 7, "h:1,h:2"), None);
        assert!(publish_in(&dir, 7, "h:2", &key).is_err());
        drop(other);
    }
}
