//! Nodes that are put in the place of others, by the commands that operators use.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clutch_client::Client;

use crate::trial::Trial;

/// What `replace-node` may take.
const PATIENCE_S: u64 = 600;

/// Bytes of all files under a directory.
fn bytes_under(dir: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(dir) else { return 0 };
    let of_entry = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => bytes_under(&entry.path()),
        Ok(meta) => meta.len(),
        // It went meanwhile.
        Err(_) => 0,
    };
    entries.flatten().map(of_entry).sum()
}

impl Trial {
    fn command(&self, arguments: &[&str]) -> Result<()> {
        let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/release/clutch");
        let program = std::env::var_os("CLUTCH_BIN").map_or(built, PathBuf::from);
        let registry: Vec<String> =
            self.nodes().into_iter().map(|node| self.address(node).to_string()).collect();
        let key = self.dir.join("n1/keys/cluster.key");
        let mut command = Command::new(&program);
        command.args(arguments).env("CLUTCH_REGISTRY", registry.join(",")).env("CLUTCH_KEY", key);
        let output = command.output().with_context(|| format!("run {}", program.display()))?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "clutch {arguments:?}: {}: {said}", output.status);
        Ok(())
    }

    /// Puts a new node in the place of one, and prints how long that took.
    pub(crate) async fn replace(&self, old: u64, operator: &Client) -> Result<()> {
        self.trim(operator).await?;
        let new = self.nodes().last().map_or(1, |last| last + 1);
        let (dir, from) = (self.dir.join(format!("n{new}")), self.dir.join(format!("n{old}")));
        let (dir, from) = (dir.to_str().context("a path")?, from.to_str().context("a path")?);
        self.command(&[
            "cluster",
            "join",
            "--dir",
            dir,
            "--from",
            from,
            "--node",
            &self.address(new).to_string(),
        ])?;
        self.script(&["start", &new.to_string()])?;
        // It is known when it has greeted the others.
        let begin = Instant::now();
        while !clutch_client_maintenance::members::nodes(operator).await?.contains_key(&new) {
            ensure!(begin.elapsed() < crate::trial::PATIENCE, "node {new} greets nobody");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let begin = Instant::now();
        let (gone, come, patience) = (old.to_string(), new.to_string(), PATIENCE_S.to_string());
        self.command(&["--patience-s", &patience, "cluster", "replace-node", &gone, "--with", &come])?;
        let (took, state) = (begin.elapsed().as_secs_f64(), bytes_under(&Path::new(dir).join("state")));
        println!(
            "     node {new} keeps all logs in the place of {old} after {took:.1} s, with {:.1} MB of state ({:.1} MB/s)",
            state as f64 / 1e6,
            state as f64 / 1e6 / took
        );
        self.replaced(old, new);
        Ok(())
    }
}
