//! A cluster of the real binary in a temporary directory.

#![allow(dead_code, unreachable_pub)]

use std::{
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

/// The binary under test.
pub const CLUTCH: &str = env!("CARGO_BIN_EXE_clutch");

/// A running `clutch up`; killed when dropped.
pub struct Cluster {
    pub dir: PathBuf,
    pub address: String,
    process: Option<Child>,
    arguments: Vec<String>,
    /// A file that says how wrong the process's clock is.
    pub clock_shift: Option<PathBuf>,
    /// File systems in memory that only the process sees: where, and how many MiB each has.
    pub mounts: Vec<(PathBuf, u32)>,
}

impl Cluster {
    /// Starts a cluster and waits until it serves.
    pub fn start(dir: &Path, arguments: &[&str]) -> Cluster {
        Cluster::booted(dir, arguments, None, &[])
    }

    /// The same with a clock that is wrong by the seconds in a file.
    pub fn start_with_clock(dir: &Path, arguments: &[&str], shift: &Path) -> Cluster {
        Cluster::booted(dir, arguments, Some(shift), &[])
    }

    /// The same on small file systems of its own, in memory.
    pub fn start_on(dir: &Path, arguments: &[&str], mounts: &[(PathBuf, u32)]) -> Cluster {
        Cluster::booted(dir, arguments, None, mounts)
    }

    fn booted(dir: &Path, arguments: &[&str], shift: Option<&Path>, mounts: &[(PathBuf, u32)]) -> Cluster {
        let mut cluster = Cluster {
            dir: dir.to_owned(),
            address: String::new(),
            process: None,
            arguments: arguments.iter().map(|a| (*a).to_owned()).collect(),
            clock_shift: shift.map(Path::to_owned),
            mounts: mounts.to_vec(),
        };
        cluster.boot();
        cluster
    }

    /// Starts the process again on the same directory.
    pub fn boot(&mut self) {
        let mut command = Command::new(CLUTCH);
        if !self.mounts.is_empty() {
            // In a namespace of its own, which ends with the process. It takes the place of the shell.
            let mut script = String::from("set -e; ");
            for (at, mib) in &self.mounts {
                let at = at.display();
                script.push_str(&format!("mkdir -p '{at}'; mount -t tmpfs -o size={mib}m tmpfs '{at}'; "));
            }
            script.push_str("exec \"$0\" \"$@\"");
            command = Command::new("unshare");
            command.args(["--map-root-user", "--mount", "sh", "-c", &script, CLUTCH]);
        }
        if let Some(shift) = &self.clock_shift {
            command.env("CLUTCH_CLOCK_SHIFT", shift);
        }
        let mut process = command
            .args(["up", "--listen", "127.0.0.1:0", "--dir"])
            .arg(&self.dir)
            .args(&self.arguments)
            .stderr(Stdio::piped())
            .spawn()
            .expect("starts");
        let mut lines = BufReader::new(process.stderr.take().expect("piped")).lines();
        let mut told = String::new();
        self.address = loop {
            let Some(Ok(line)) = lines.next() else { panic!("up ended: {told}") };
            told.push_str(&line);
            told.push('\n');
            if let Some(rest) = line.trim().strip_prefix("listening on ") {
                break rest.split(';').next().expect("an address").to_owned();
            }
        };
        // Whatever it says later must not fill the pipe.
        std::thread::spawn(move || for _ in lines {});
        self.process = Some(process);
        assert!(self.run(&["status", "--wait", "60"]).status.success(), "does not serve");
    }

    /// The process's id.
    pub fn pid(&self) -> u32 {
        self.process.as_ref().expect("it runs").id()
    }

    /// Kills the process at once, as `kill -9` does.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().expect("killed");
            process.wait().expect("reaped");
        }
    }

    /// Stops the process as Ctrl-C does; returns whether it ended well.
    pub fn stop(&mut self) -> bool {
        let Some(mut process) = self.process.take() else { return false };
        let pid = process.id().to_string();
        assert!(Command::new("kill").args(["-INT", &pid]).status().expect("kill runs").success());
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(60) {
            if let Some(status) = process.try_wait().expect("waits") {
                return status.success();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        process.kill().expect("killed");
        process.wait().expect("reaped");
        false
    }

    /// A command against this cluster.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(CLUTCH);
        command.env("CLUTCH_REGISTRY", &self.address).args(arguments);
        command
    }

    /// Runs a command to its end.
    pub fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("runs")
    }

    /// Runs a command that must succeed; what it printed.
    pub fn ok(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text")
    }

    /// Runs a command that must fail with this exit code; what it complained.
    pub fn fails(&self, code: i32, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {text}");
        assert!(!text.contains("panicked"), "{arguments:?}: {text}");
        text
    }

    /// Runs a reading command and takes its JSON document.
    pub fn json(&self, arguments: &[&str]) -> serde_json::Value {
        let output = self.run(arguments);
        serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|e| panic!("{arguments:?}: {e}: {}", String::from_utf8_lossy(&output.stderr)))
    }

    /// Fails unless fsck says that all is well.
    pub fn fsck(&self) {
        let report = self.json(&["fsck", "--json"]);
        assert_eq!(report["clean"], true, "{report:#}");
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Bytes that no compressor or shortcut makes smaller, the same for the same seed.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}
