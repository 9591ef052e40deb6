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

/// A small file system of a cluster's own.
#[derive(Clone, Debug)]
pub struct Mount {
    /// Where it is mounted.
    pub at: PathBuf,
    /// How large it is.
    pub mib: u32,
    /// The file that holds it, as ext4; none is one in memory.
    pub image: Option<PathBuf>,
}

impl Mount {
    /// In memory.
    pub fn memory(at: PathBuf, mib: u32) -> Mount {
        Mount { at, mib, image: None }
    }

    /// On a loop device: an ext4 in a file that is made here.
    pub fn device(at: PathBuf, mib: u32, image: PathBuf) -> Mount {
        std::fs::File::create(&image).and_then(|file| file.set_len(u64::from(mib) << 20)).expect("made");
        // All of it at once: what is zeroed later would make noise.
        let made = Command::new("mkfs.ext4")
            .args(["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"])
            .arg(&image)
            .output();
        assert!(made.is_ok_and(|output| output.status.success()), "mkfs.ext4");
        Mount { at, mib, image: Some(image) }
    }
}

/// A running `clutch up`; killed when dropped.
pub struct Cluster {
    pub dir: PathBuf,
    pub address: String,
    process: Option<Child>,
    arguments: Vec<String>,
    /// A file that says how wrong the process's clock is.
    pub clock_shift: Option<PathBuf>,
    /// File systems that only the process sees.
    pub mounts: Vec<Mount>,
    /// Words in front of the command: a program that runs it and ends with it.
    pub runner: Vec<String>,
}

impl Cluster {
    /// Starts a cluster and waits until it serves.
    pub fn start(dir: &Path, arguments: &[&str]) -> Cluster {
        Cluster::booted(dir, arguments, None, &[])
    }

    /// The same, run by another program.
    pub fn start_under(dir: &Path, arguments: &[&str], runner: Vec<String>) -> Cluster {
        let mut cluster = Cluster::stopped(dir, arguments, None, &[]);
        cluster.runner = runner;
        cluster.boot();
        cluster
    }

    /// The same with a clock that is wrong by the seconds in a file.
    pub fn start_with_clock(dir: &Path, arguments: &[&str], shift: &Path) -> Cluster {
        Cluster::booted(dir, arguments, Some(shift), &[])
    }

    /// The same on small file systems of its own.
    pub fn start_on(dir: &Path, arguments: &[&str], mounts: &[Mount]) -> Cluster {
        Cluster::booted(dir, arguments, None, mounts)
    }

    fn booted(dir: &Path, arguments: &[&str], shift: Option<&Path>, mounts: &[Mount]) -> Cluster {
        let mut cluster = Cluster::stopped(dir, arguments, shift, mounts);
        cluster.boot();
        cluster
    }

    fn stopped(dir: &Path, arguments: &[&str], shift: Option<&Path>, mounts: &[Mount]) -> Cluster {
        Cluster {
            dir: dir.to_owned(),
            address: String::new(),
            process: None,
            arguments: arguments.iter().map(|a| (*a).to_owned()).collect(),
            clock_shift: shift.map(Path::to_owned),
            mounts: mounts.to_vec(),
            runner: Vec::new(),
        }
    }

    /// Starts the process again on the same directory.
    pub fn boot(&mut self) {
        // A namespace goes a moment after its process; until then what was mounted in it still is.
        let in_use = |image: &Path| {
            Command::new("losetup")
                .arg("-j")
                .arg(image)
                .output()
                .is_ok_and(|output| !output.stdout.is_empty())
        };
        let start = Instant::now();
        while self.mounts.iter().any(|mount| mount.image.as_deref().is_some_and(in_use)) {
            assert!(start.elapsed() < Duration::from_secs(30), "still mounted");
            std::thread::sleep(Duration::from_millis(20));
        }
        let mut command = Command::new(CLUTCH);
        if !self.mounts.is_empty() {
            // In a namespace of its own, which ends with the process. It takes the place of the shell.
            let mut script = String::from("set -e; ");
            for Mount { at, mib, image } in &self.mounts {
                let at = at.display();
                script.push_str(&format!("mkdir -p '{at}'; "));
                script.push_str(&match image {
                    None => format!("mount -t tmpfs -o size={mib}m tmpfs '{at}'; "),
                    Some(image) => format!("mount -o loop '{}' '{at}'; ", image.display()),
                });
            }
            script.push_str("exec \"$0\" \"$@\"");
            command = Command::new("unshare");
            if self.mounts.iter().all(|mount| mount.image.is_none()) {
                command.arg("--map-root-user");
            }
            command.args(["--mount", "sh", "-c", &script, CLUTCH]);
        }
        if let Some((program, words)) = self.runner.split_first() {
            command = Command::new(program);
            command.args(words).arg(CLUTCH);
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

    /// Runs a command where the process sees its mounts.
    pub fn inside(&self, words: &[&str]) -> bool {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.pid().to_string(), "--mount"]);
        if self.mounts.iter().all(|mount| mount.image.is_none()) {
            command.args(["--user", "--preserve-credentials"]);
        }
        command.args(words).status().is_ok_and(|status| status.success())
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

    /// Waits until no fault is in the status that says this; disks are looked at anew with every report of theirs.
    pub fn wait_until_over(&self, fault: &str) {
        let begin = std::time::Instant::now();
        loop {
            let status = self.json(&["status", "--json"]);
            let faults = status["faults"].as_array().expect("a list");
            if !faults.iter().any(|f| f.as_str().is_some_and(|f| f.contains(fault))) {
                return;
            }
            assert!(begin.elapsed() < std::time::Duration::from_secs(60), "not over: {status:#}");
        }
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

/// All files of a directory and below, sorted.
pub fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut stack = vec![dir.to_owned()];
    while let Some(dir) = stack.pop() {
        for entry in std::fs::read_dir(dir).expect("lists") {
            let path = entry.expect("an entry").path();
            if path.is_dir() { stack.push(path) } else { found.push(path) }
        }
    }
    found.sort();
    found
}
