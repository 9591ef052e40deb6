//! Power cuts of a real process, its databases included: its system calls are recorded from the making of a cluster over
//! checkpoints and trimming to a rewind, and after each one that makes something durable a cluster is started on what a strict
//! file system would have kept. Whatever was acknowledged before is there.
//!
//! A run takes some of the cuts; `CLUTCH_POWER_CUTS=all` takes all of them.

#[path = "support/crash_images.rs"]
mod crash_images;
mod support;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use crash_images::{Model, Strictness, follow, read_trace, recorder};
use support::{CLUTCH, Cluster, noise};

const ARGUMENTS: [&str; 8] = ["--shards", "1", "--disks", "4", "--policy", "2+2", "--segment-mib", "1"];
/// What a run takes of each kind of file system.
const CUTS: usize = 45;

/// Which of the recorded processes is the rewind.
const REWIND: usize = 2;
/// How often a start has said that a rewind was interrupted.
static INTERRUPTED: AtomicUsize = AtomicUsize::new(0);

/// The files under `/a`.
type Tree = BTreeMap<String, Vec<u8>>;

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs_f64()
}

/// What was done to the cluster: when it was acknowledged, and what is there from then on.
struct History {
    steps: Vec<(f64, Tree)>,
    /// One for each process, in their order.
    traces: Vec<PathBuf>,
    dir: PathBuf,
}

impl History {
    fn acknowledged(&mut self, change: impl FnOnce(&mut Tree)) {
        let mut tree = self.steps.last().map(|(_, tree)| tree.clone()).unwrap_or_default();
        change(&mut tree);
        self.steps.push((now(), tree));
    }

    fn runner(&mut self, scratch: &Path) -> Vec<String> {
        self.traces.push(scratch.join(format!("trace{}", self.traces.len())));
        recorder(self.traces.last().expect("just added"))
    }

    fn put(&mut self, cluster: &Cluster, scratch: &Path, number: u64) {
        let (local, bytes) = (scratch.join("local"), noise(20_000, number));
        std::fs::write(&local, &bytes).expect("written");
        cluster.ok(&["fs", "put", local.to_str().expect("text"), &format!("/a/f{number}")]);
        self.acknowledged(|tree| drop(tree.insert(format!("f{number}"), bytes)));
    }
}

/// Makes a cluster, works with it, and records all of it.
fn record(scratch: &Path) -> History {
    let dir = scratch.join("recorded");
    let mut history = History { steps: Vec::new(), traces: Vec::new(), dir: dir.clone() };
    let runner = history.runner(scratch);
    let mut cluster = Cluster::start_under(&dir, &ARGUMENTS, runner);
    cluster.ok(&["fs", "mkdir", "/a"]);
    history.acknowledged(|_| {});
    for number in 0..3 {
        history.put(&cluster, scratch, number);
    }
    cluster.ok(&["log", "checkpoint", "--all"]);
    cluster.ok(&["fs", "mv", "/a/f0", "/a/moved"]);
    history.acknowledged(|tree| {
        let bytes = tree.remove("f0").expect("there");
        tree.insert("moved".into(), bytes);
    });
    // Some segments of the log.
    let crowd =
        ["bench", "meta", "--ops", "create,unlink", "--files", "20000", "--clients", "2", "--depth", "256"];
    cluster.ok(&crowd);
    cluster.ok(&["log", "checkpoint", "--all"]);
    history.put(&cluster, scratch, 3);
    assert!(cluster.stop(), "stops");
    let runner = history.runner(scratch);
    let mut cluster = Cluster::start_under(&dir, &ARGUMENTS, runner);
    cluster.ok(&["log", "trim", "--all"]);
    assert!(!dir.join("log/0000000000000001.log").exists(), "the log is trimmed");
    history.put(&cluster, scratch, 4);
    cluster.ok(&["fs", "rm", "/a/f1"]);
    history.acknowledged(|tree| drop(tree.remove("f1")));
    let (_, before) = history.steps.last().cloned().expect("some");
    let instant = jiff::Timestamp::now().to_string();
    history.put(&cluster, scratch, 5);
    // Whole segments that go.
    cluster.ok(&crowd);
    cluster.ok(&["log", "checkpoint", "--all"]);
    assert!(cluster.stop(), "stops");
    assert_eq!(history.traces.len(), REWIND);
    let runner = history.runner(scratch);
    let rewound = Command::new(&runner[0])
        .args(&runner[1..])
        .args([CLUTCH, "log", "rewind", "--yes", "--to-time", &instant, "--dir"])
        .arg(&dir)
        .output()
        .expect("runs");
    assert!(rewound.status.success(), "{}", String::from_utf8_lossy(&rewound.stderr));
    history.acknowledged(|tree| *tree = before);
    let runner = history.runner(scratch);
    let mut cluster = Cluster::start_under(&dir, &ARGUMENTS, runner);
    history.put(&cluster, scratch, 6);
    assert!(cluster.stop(), "stops");
    history
}

/// A cut: what is left, and the trees one of which must be there: the one that was acknowledged last, or the one that was to
/// come; none before there was one.
struct Cut {
    image: PathBuf,
    number: u64,
    trees: Vec<Tree>,
}

/// Calls `take` with each cut that `wanted` chooses by the process and its number, and with `None` for the others; returns how many there are.
fn cuts(
    history: &History,
    strictness: Strictness,
    scratch: &Path,
    wanted: impl Fn(usize, u64) -> bool,
    mut take: impl FnMut(Option<Cut>),
) -> u64 {
    let mut model = Model::new(&history.dir, strictness);
    for (process, trace) in history.traces.iter().enumerate() {
        let text = read_trace(trace);
        follow(&mut model, &text, |model, time| {
            // Until this moment nothing more was durable than now.
            if !wanted(process, model.changes) {
                return take(None);
            }
            let done = history.steps.iter().take_while(|(at, _)| *at < time).count();
            let around = history.steps[done.saturating_sub(1)..].iter().take(if done == 0 { 1 } else { 2 });
            let image = scratch.join(format!("image{}", model.changes));
            model.write_image(&image);
            let mut trees: Vec<Tree> = around.map(|(_, tree)| tree.clone()).collect();
            if done == 0 {
                trees.push(Tree::new());
            }
            take(Some(Cut { image, number: model.changes, trees }));
        });
    }
    model.changes
}

/// Reads what is under `/a` of a started cluster.
fn read(cluster: &Cluster, to: &Path) -> Result<Tree, String> {
    let to_text = to.to_str().expect("text");
    let output = cluster.run(&["fs", "get", "-r", "/a", to_text]);
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr).into_owned();
        return if why.contains("not found") || why.contains("no such file") {
            Ok(Tree::new())
        } else {
            Err(why)
        };
    }
    let files = std::fs::read_dir(to).map_err(|e| e.to_string())?;
    let files = files.map(|file| {
        let file = file.map_err(|e| e.to_string())?;
        let name = file.file_name().into_string().map_err(|_| "a name")?;
        Ok::<_, String>((name, std::fs::read(file.path()).map_err(|e| e.to_string())?))
    });
    files.collect()
}

fn try_cut(cut: &Cut) -> Result<(), String> {
    let start = || {
        std::panic::catch_unwind(|| Cluster::start(&cut.image, &ARGUMENTS))
            .map_err(|why| why.downcast_ref::<String>().cloned().unwrap_or_else(|| "does not start".into()))
    };
    let mut cluster = match start() {
        Err(why) if why.contains("a rewind of") && why.contains("was interrupted") => {
            INTERRUPTED.fetch_add(1, Ordering::Relaxed);
            let finish = Command::new(CLUTCH).args(["log", "rewind", "--dir"]).arg(&cut.image).output();
            let finish = finish.map_err(|e| e.to_string())?;
            if !finish.status.success() {
                return Err(String::from_utf8_lossy(&finish.stderr).into_owned());
            }
            start()?
        }
        started => started?,
    };
    let found = read(&cluster, &cut.image.with_extension("read"))?;
    if !cut.trees.contains(&found) {
        let names = |tree: &Tree| {
            tree.iter().map(|(name, bytes)| format!("{name}:{}", bytes.len())).collect::<Vec<_>>()
        };
        let expected: Vec<_> = cut.trees.iter().map(names).collect();
        return Err(format!("{:?} is there, expected one of {expected:?}", names(&found)));
    }
    // It goes on, and what it does now is sound.
    let again = cluster.run(&["fs", "mkdir", "-p", "/a/again"]);
    if !again.status.success() {
        return Err(String::from_utf8_lossy(&again.stderr).into_owned());
    }
    let (fsck, replay) =
        (cluster.json(&["fsck", "--json"]), cluster.run(&["log", "replay", "--all", "--verify"]));
    if fsck["clean"] != true || !replay.status.success() {
        return Err(format!("{fsck:#} {}", String::from_utf8_lossy(&replay.stdout)));
    }
    cluster.stop().then_some(()).ok_or_else(|| "does not stop".into())
}

/// What went wrong after some of the cuts.
fn try_cuts(history: &History, strictness: Strictness, scratch: &Path, cuts_max: usize) -> Vec<String> {
    let scratch = scratch.join(format!("{strictness:?}").replace(['"', '(', ')'], ""));
    std::fs::create_dir(&scratch).expect("made");
    let all = cuts(history, strictness, &scratch, |_, _| false, |_| {});
    let step = (all / cuts_max as u64).max(1);
    assert!(all > 300, "{all} cuts");
    let failures = Mutex::new(Vec::new());
    // Few images at a time: all of them would fill the disk.
    let (sender, chosen) = std::sync::mpsc::sync_channel::<Cut>(2);
    let chosen = Mutex::new(chosen);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let cut = chosen.lock().expect("whole").recv();
                    let Ok(cut) = cut else { break };
                    if let Err(why) = try_cut(&cut) {
                        let what = format!("{strictness:?}, cut {} of {all}: {why}", cut.number);
                        failures.lock().expect("whole").push(what);
                    }
                    std::fs::remove_dir_all(&cut.image).expect("removed");
                    // Where nothing could be read there is none.
                    let _ = std::fs::remove_dir_all(cut.image.with_extension("read"));
                }
            });
        }
        // A rewind is short: each step of it.
        let wanted = |process: usize, n: u64| {
            n % step == step / 2 || process == REWIND && matches!(strictness, Strictness::Strict)
        };
        cuts(history, strictness, &scratch, wanted, |cut| {
            if let Some(cut) = cut {
                sender.send(cut).expect("somebody takes it");
            }
        });
        drop(sender);
    });
    failures.into_inner().expect("whole")
}

#[test]
fn what_was_acknowledged_is_there_after_any_cut() {
    if !Command::new("strace").args(["-o", "/dev/null", "true"]).output().is_ok_and(|o| o.status.success()) {
        return eprintln!("NOT TESTED: strace is not there, or may not look at processes");
    }
    let scratch = tempfile::tempdir().expect("a directory");
    let history = record(scratch.path());
    let cuts_max = match std::env::var("CLUTCH_POWER_CUTS").as_deref() {
        Ok("all") => usize::MAX >> 1,
        _ => CUTS,
    };
    for strictness in [Strictness::Strict, Strictness::NamesAtOnce] {
        let failures = try_cuts(&history, strictness, scratch.path(), cuts_max);
        assert!(failures.is_empty(), "{} cuts: {failures:#?}", failures.len());
    }
    assert!(INTERRUPTED.load(Ordering::Relaxed) >= 3, "rewinds were cut in their middle");
    // The test can fail: on a disk that lies about the states, trimming the log loses what only they hold then.
    let failures = try_cuts(&history, Strictness::Lying("state"), scratch.path(), 40);
    assert!(!failures.is_empty(), "lies about the states were not noticed");
    let noticed = failures.iter().filter(|why| why.contains("checkpoint")).count();
    assert!(noticed > 0, "{failures:#?}");
}
