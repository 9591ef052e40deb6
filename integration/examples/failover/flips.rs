//! Bytes that change on the disk of a node that is down: it may refuse to start, or put itself right, and must do no harm.

use std::{
    fs::{self, File},
    io::{Read as _, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clutch_client::Client;
use rand::{Rng as _, rngs::StdRng, seq::IndexedRandom as _};

use crate::{faults, trial::Trial};

/// A node that is neither whole nor gone for so long is taken for one that hangs, and is put right.
const UNDECIDED: Duration = Duration::from_secs(45);
/// Half of the flips are so near the end of a file: the last records of a log are there.
const TAIL: u64 = 4 << 10;
/// What nobody reads again, or what is not of the node.
const LEFT_ALONE: [&str; 7] = ["LOCK", "LOG", "IDENTITY", "lock", "out", "pid", "node.toml"];

/// The files under a directory that hold what a node knows; blocks have their own trials.
fn files(dir: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))? {
        let entry = entry?;
        let name = entry.file_name();
        if entry.file_type()?.is_dir() {
            if name != "blocks" {
                files(&entry.path(), found)?;
            }
        } else if entry.metadata()?.len() > 0 && !LEFT_ALONE.iter().any(|left| name == *left) {
            found.push(entry.path());
        }
    }
    Ok(())
}

/// Gives a byte of a file another value; what it was.
fn change(path: &Path, at: u64, to: impl FnOnce(u8) -> u8) -> Result<u8> {
    let mut file = File::options().read(true).write(true).open(path)?;
    let mut byte = [0];
    file.seek(SeekFrom::Start(at))?;
    file.read_exact(&mut byte)?;
    file.seek(SeekFrom::Start(at))?;
    file.write_all(&[to(byte[0])])?;
    Ok(byte[0])
}

/// Whether a process has ended, with all its threads; nobody may have waited for it, so that its number stays.
fn is_gone(process: &Path) -> bool {
    let has_threads = || fs::read_dir(process.join("task")).is_ok_and(|threads| threads.count() > 1);
    fs::read_to_string(process.join("stat")).map_or(true, |stat| stat.contains(") Z ") && !has_threads())
}

impl Trial {
    fn end(&self, node: u64) -> Result<()> {
        let pid = self.process(node)?;
        if PathBuf::from("/proc").join(&pid).exists() {
            faults::run("kill", &["-9", &pid])?;
        }
        self.ended(node)
    }

    /// Waits until a node's process has ended.
    pub(crate) fn ended(&self, node: u64) -> Result<()> {
        let dir = PathBuf::from("/proc").join(self.process(node)?);
        // Its files are its own until its last thread is gone.
        let begin = Instant::now();
        while !is_gone(&dir) {
            ensure!(begin.elapsed() < UNDECIDED, "node {node} does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Starts nodes again that have met what was changed on their disks before, and stopped with it. Any other fault is the trial's.
    pub(crate) async fn start_stopped(&self, operator: &Client, found: anyhow::Error) -> Result<()> {
        for (node, fault) in self.stopped(operator).await {
            let is_damage = fault.contains("damaged") || fault.contains("corrupt");
            if !is_damage || !self.damaged.lock().contains(&node) {
                return Err(found);
            }
            println!("     node {node} has met what was changed there before, and is started again: {fault}");
            self.end(node)?;
            self.script(&["start", &node.to_string()])?;
        }
        Ok(())
    }

    fn has_ended(&self, node: u64) -> Result<bool> {
        Ok(is_gone(&Path::new("/proc").join(self.process(node)?)))
    }

    /// Ends a node, changes a byte of its files, starts it, and puts the byte back if it did not become whole with it.
    pub(crate) async fn flip(&self, node: u64, operator: &Client, random: &mut StdRng) -> Result<()> {
        let dir = self.dir.join(format!("n{node}"));
        self.end(node)?;
        let mut all = Vec::new();
        files(&dir, &mut all)?;
        let of_log = |path: &&PathBuf| {
            path.extension().is_some_and(|e| e == "log") && path.starts_with(dir.join("log"))
        };
        let logs: Vec<&PathBuf> = all.iter().filter(of_log).collect();
        let path = match random.random() {
            true => (*logs.choose(random).context("there is no log")?).clone(),
            // Keys are many files, and small: mostly what states have, checkpoints among it.
            false => {
                let of_state: Vec<&PathBuf> =
                    all.iter().filter(|path| path.starts_with(dir.join("state"))).collect();
                let is_state = random.random_range(0..4) > 0;
                let chosen = of_state.choose(random).filter(|_| is_state).copied();
                chosen.or_else(|| all.choose(random)).context("there are no files")?.clone()
            }
        };
        let length = fs::metadata(&path)?.len();
        let at = match random.random() {
            true => length - 1 - random.random_range(0..length.min(TAIL)),
            false => random.random_range(0..length),
        };
        let mask = random.random_range(1..=255);
        self.damaged.lock().insert(node);
        let before = change(&path, at, |byte| byte ^ mask)?;
        let shown = path.strip_prefix(&dir)?.display().to_string();
        self.script(&["start", &node.to_string()])?;
        let mut begin = Instant::now();
        let outcome = loop {
            tokio::time::sleep(Duration::from_millis(50)).await;
            if self.has_ended(node)? {
                break format!("does not start: {}", self.last_said(node)?);
            }
            match self.is_whole(operator).await {
                Ok(true) => break "whole".to_string(),
                Ok(false) if begin.elapsed() > UNDECIDED => {
                    break format!("hangs: {}", self.last_said(node)?);
                }
                Ok(false) => {}
                Err(fault) if self.stopped(operator).await.contains_key(&node) => {
                    break format!("has a fault: {fault:#}");
                }
                Err(fault) => {
                    self.start_stopped(operator, fault).await?;
                    begin = Instant::now();
                }
            }
        };
        println!("     {shown} byte {at} of {length}, {before:#04x} ^ {mask:#04x}: {outcome}");
        if outcome != "whole" {
            self.end(node)?;
            if fs::metadata(&path).is_ok_and(|file| file.len() > at) {
                change(&path, at, |_| before)?;
            }
            self.script(&["start", &node.to_string()])?;
        }
        Ok(())
    }

    fn last_said(&self, node: u64) -> Result<String> {
        let out = fs::read(self.dir.join(format!("n{node}/out")))?;
        Ok(String::from_utf8_lossy(&out).lines().last().unwrap_or("nothing").to_string())
    }
}
