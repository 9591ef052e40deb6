//! Every persistent thing, damaged in every way: a start either serves all files, or refuses and names what is wrong. The
//! table in `docs/damage.md` is what this test finds.

mod support;

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io::{BufRead as _, BufReader, Read as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use support::{CLUTCH, Cluster, noise};

const ARGUMENTS: &[&str] = &["--shards", "1", "--disks", "4", "--policy", "2+2", "--segment-mib", "1"];
/// Files that only fill the log.
const FILLERS: usize = 4400;
const DAMAGES: [&str; 6] = ["missing", "empty", "older copy", "cut", "flipped", "swapped"];

fn copy_tree(from: &Path, to: &Path) {
    if from.is_dir() {
        std::fs::create_dir_all(to).expect("made");
        for entry in std::fs::read_dir(from).expect("lists") {
            let entry = entry.expect("an entry");
            copy_tree(&entry.path(), &to.join(entry.file_name()));
        }
    } else if from.exists() {
        std::fs::copy(from, to).expect("copied");
    }
}

fn remove(path: &Path) {
    if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) }.expect("removed");
}

/// The names in a directory that end so, in order.
fn names(dir: &Path, end: &str) -> Vec<String> {
    let entries = std::fs::read_dir(dir).expect("lists");
    let mut names: Vec<String> = entries
        .map(|e| e.expect("an entry").file_name().into_string().expect("text"))
        .filter(|n| n.ends_with(end))
        .collect();
    names.sort();
    names
}

/// A path below the cluster's directory, and what it is swapped with: below the same directory, or of another cluster.
struct Thing {
    what: &'static str,
    path: PathBuf,
    sibling: Option<PathBuf>,
}

/// Damages `path`; whether that is possible and changes anything.
fn damage(how: &str, thing: &Thing, dir: &Path, older: &Path, other: &Path) -> bool {
    let path = dir.join(&thing.path);
    let is_dir = path.is_dir();
    match how {
        "missing" => remove(&path),
        "empty" if is_dir => {
            remove(&path);
            std::fs::create_dir(&path).expect("made");
        }
        "empty" => std::fs::write(&path, b"").expect("written"),
        "older copy" => {
            let older = older.join(&thing.path);
            let is_same = || std::fs::read(&older).expect("reads") == std::fs::read(&path).expect("reads");
            if !older.exists() || (!is_dir && is_same()) {
                return false;
            }
            remove(&path);
            copy_tree(&older, &path);
        }
        "cut" | "flipped" if is_dir => return false,
        "cut" | "flipped" => {
            let mut bytes = std::fs::read(&path).expect("reads");
            let middle = bytes.len() / 2;
            if bytes.is_empty() {
                return false;
            }
            if how == "cut" {
                bytes.truncate(middle)
            } else {
                bytes[middle] ^= 0x10
            }
            std::fs::write(&path, bytes).expect("written");
        }
        _ => match &thing.sibling {
            Some(sibling) => {
                let (sibling, aside) = (dir.join(sibling), dir.join("aside"));
                std::fs::rename(&path, &aside).expect("moved");
                std::fs::rename(&sibling, &path).expect("moved");
                std::fs::rename(&aside, &sibling).expect("moved");
            }
            None => {
                let other = other.join(&thing.path);
                if !other.exists() {
                    return false;
                }
                remove(&path);
                copy_tree(&other, &path);
            }
        },
    }
    true
}

/// What a start on the directory does.
fn start(dir: &Path, stored: &BTreeMap<String, Vec<u8>>, back: &Path) -> String {
    let mut process = Command::new(CLUTCH)
        .args(["up", "--listen", "127.0.0.1:0", "--dir"])
        .arg(dir)
        .args(ARGUMENTS)
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts");
    let mut errors = BufReader::new(process.stderr.take().expect("piped"));
    let (mut told, mut address, mut line) = (String::new(), None, String::new());
    while address.is_none() && errors.read_line(&mut line).expect("reads") > 0 {
        address =
            line.trim().strip_prefix("listening on ").and_then(|a| a.split(';').next()).map(str::to_owned);
        told.push_str(&std::mem::take(&mut line));
    }
    let Some(address) = address else {
        let code = process.wait().expect("reaped").code();
        assert!(!told.contains("panicked"), "{told}");
        assert_eq!(code, Some(1), "{told}");
        return format!("refuses: {}", told.trim());
    };
    let rest = std::thread::spawn(move || {
        let mut rest = String::new();
        // What it says to the end.
        let _ = errors.read_to_string(&mut rest);
        rest
    });
    let client = |arguments: &[&str]| {
        let output =
            Command::new(CLUTCH).env("CLUTCH_REGISTRY", &address).args(arguments).output().expect("runs");
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned(), output.stdout)
    };
    let (is_up, text, _) = client(&["status", "--wait", "60"]);
    let mut found = if is_up { "serves".to_owned() } else { format!("does not serve: {text}") };
    std::fs::create_dir(back).expect("made");
    let mut why = String::new();
    for part in ["p0", "p1"] {
        why.push_str(
            &client(&["fs", "get", "-r", &format!("/{part}"), back.join(part).to_str().expect("text")]).1,
        );
        let (_, text, listed) = client(&["fs", "ls", &format!("/fill{}", &part[1..])]);
        if listed.split(|b| *b == b'\n').count() != FILLERS + 1 {
            found = format!("lost files of {part}: {text}; {told}");
        }
    }
    for (name, bytes) in stored {
        let read = std::fs::read(back.join(name));
        if !read.is_ok_and(|read| read == *bytes) {
            found = format!("lost or changed {name}: {why}; {told}");
            break;
        }
    }
    let (_, _, status) = client(&["status", "--json"]);
    let status: serde_json::Value = serde_json::from_slice(&status).expect("JSON");
    let faults = status["faults"].as_array().expect("a list").iter().filter_map(|f| f.as_str());
    for fault in faults {
        let _ = write!(found, "; fault: {fault}");
    }
    process.kill().expect("killed");
    process.wait().expect("reaped");
    told.push_str(&rest.join().expect("joins"));
    for line in told.lines().filter(|l| l.contains("built anew") || l.contains("behind the log")) {
        let _ = write!(found, "; says: {line}");
    }
    if back.exists() {
        std::fs::remove_dir_all(back).expect("removed");
    }
    found
}

/// A cut that may hit the edge of a record: what is left is then a whole database of an earlier time, and the log brings it up.
const EITHER: (&str, &str) = ("`state/LOG/db/MANIFEST`", "cut");

/// One cell of the table.
fn cell(what: &str, how: &str, found: &str) -> &'static str {
    if (what, how) == EITHER && found.starts_with("serves") && !found.contains("fault: ") {
        return "serves, state rebuilt and said, or brought up";
    }
    match found {
        f if f.starts_with("refuses") => "refused, named",
        f if f.contains("built anew") => "serves, state rebuilt, said",
        f if f.contains("fault: ") => "serves without the disk, said",
        f if f.starts_with("serves") => "serves",
        _ => "WRONG",
    }
}

#[test]
fn the_table_of_damage_is_what_happens() {
    let temp = tempfile::tempdir().expect("temporary directory");
    let at = |name: &str| temp.path().join(name);
    let mut stored = BTreeMap::new();
    let source = at("source");
    std::fs::create_dir(&source).expect("made");
    let mut store = |cluster: &Cluster, part: usize| {
        let part_dir = source.join(format!("p{part}"));
        std::fs::create_dir(&part_dir).expect("made");
        let fill_dir = source.join(format!("fill{part}"));
        std::fs::create_dir(&fill_dir).expect("made");
        for i in 0..FILLERS + 100 {
            let bytes = noise(if i < 6 { 30_000 } else { 250 }, (i + part * 10_000) as u64);
            if i >= 100 {
                std::fs::write(fill_dir.join(format!("f{i}")), &bytes).expect("written");
                continue;
            }
            std::fs::write(part_dir.join(format!("f{i}")), &bytes).expect("written");
            stored.insert(format!("p{part}/f{i}"), bytes);
        }
        // Fills segments of the log; is counted, not fetched.
        cluster.ok(&["fs", "put", "-r", fill_dir.to_str().expect("text"), &format!("/fill{part}")]);
        cluster.ok(&["fs", "put", "-r", part_dir.to_str().expect("text"), &format!("/p{part}")]);
        cluster.ok(&["log", "checkpoint", "--all"]);
    };
    let mut cluster = Cluster::start(&at("d"), ARGUMENTS);
    store(&cluster, 0);
    assert!(cluster.stop());
    copy_tree(&at("d"), &at("older"));
    cluster.boot();
    store(&cluster, 1);
    assert!(cluster.stop());
    let mut other = Cluster::start(&at("other"), ARGUMENTS);
    other.ok(&["fs", "mkdir", "/x"]);
    assert!(other.stop());

    let dir = at("d");
    let segments = names(&dir.join("log"), ".log");
    let indexes = names(&dir.join("log"), ".idx");
    assert!(segments.len() >= 3 && indexes.len() >= 2, "{segments:?} {indexes:?}");
    let state = Path::new("state/shard-000");
    let database = |end: &str| {
        let found = names(&dir.join(state).join("db"), "");
        state
            .join("db")
            .join(found.iter().find(|n| n.contains(end)).unwrap_or_else(|| panic!("{end}: {found:?}")))
    };
    // The number in it may be the same in two databases by chance; then nothing would be swapped.
    let another_current = || {
        let ours = std::fs::read(dir.join(state).join("db/CURRENT")).expect("read");
        let others = ["state/cdc/db/CURRENT", "state/registry/db/CURRENT"].map(PathBuf::from);
        others.into_iter().find(|other| std::fs::read(dir.join(other)).is_ok_and(|theirs| theirs != ours))
    };
    let key = names(&dir.join("keys"), ".key").into_iter().filter(|n| n != "cluster.key").collect::<Vec<_>>();
    let segment_of = |disk: u32| PathBuf::from(format!("blocks/{disk}/packed/00000001.pack"));
    let thing = |what, path: &Path, sibling: Option<PathBuf>| Thing { what, path: path.to_owned(), sibling };
    let log = |name: &String| Path::new("log").join(name);
    let things = [
        thing("`cluster.json`", Path::new("cluster.json"), None),
        thing("`clock`", Path::new("clock"), None),
        thing("`chains`", Path::new("chains"), None),
        thing("`reserve`", Path::new("reserve"), None),
        thing("`keys/cluster.key`", Path::new("keys/cluster.key"), None),
        thing("`keys/SERVICE.key`", &Path::new("keys").join(&key[0]), Some(Path::new("keys").join(&key[1]))),
        thing("`log/`", Path::new("log"), None),
        thing("`log/`: the first segment", &log(&segments[0]), Some(log(&segments[1]))),
        thing("`log/`: the last segment", &log(segments.last().expect("some")), Some(log(&segments[0]))),
        thing("`log/`: an index", &log(&indexes[0]), Some(log(&indexes[1]))),
        thing("`log/synced`: the mark", Path::new("log/synced"), None),
        thing("`state/LOG/`", state, Some("state/cdc".into())),
        thing("`state/LOG/db/CURRENT`", &database("CURRENT"), another_current()),
        thing("`state/LOG/db/MANIFEST`", &database("MANIFEST"), None),
        thing("`state/LOG/db/*.sst`", &database(".sst"), None),
        thing("`blocks/DISK/`", Path::new("blocks/0"), Some("blocks/1".into())),
        thing("`blocks/DISK/label`", Path::new("blocks/0/label"), Some("blocks/1/label".into())),
        thing("a segment of small blocks", &segment_of(0), Some(segment_of(1))),
    ];
    let mut wrong: Vec<String> = Vec::new();
    let mut table = format!("| | {} |\n|---|{}\n", DAMAGES.join(" | "), "---|".repeat(DAMAGES.len()));
    for thing in &things {
        let _ = write!(table, "| {} |", thing.what);
        for how in DAMAGES {
            let work = at("work");
            if work.exists() {
                remove(&work);
            }
            copy_tree(&dir, &work);
            if !damage(how, thing, &work, &at("older"), &at("other")) {
                table.push_str(" – |");
                continue;
            }
            let found = start(&work, &stored, &at("back"));
            if std::env::var_os("CLUTCH_SHOW").is_some() {
                eprintln!("{} {how}: {found}", thing.what);
            }
            let cell = cell(thing.what, how, &found);
            // The error names a file or a directory.
            if found.starts_with("refuses") && !found.contains("/work") {
                wrong.push(format!("{} {how}: does not say where: {found}", thing.what));
            }
            if cell == "WRONG" {
                wrong.push(format!("{} {how}: {found}", thing.what));
            }
            let _ = write!(table, " {cell} |");
        }
        table.push('\n');
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/damage.md");
    let page = std::fs::read_to_string(page).expect("the page");
    assert!(page.contains(&table), "docs/damage.md has another table than\n{table}");
}

/// A start reads nothing of inline data: that it is missing or damaged is found when it is read, and put right by the next start.
#[test]
fn inline_data_that_is_lost_or_damaged_stops_its_shard_and_comes_back_with_the_next_start() {
    let temp = tempfile::tempdir().expect("temporary directory");
    let dir = temp.path().join("c");
    let mut cluster = Cluster::start(&dir, ARGUMENTS);
    let tree = temp.path().join("tree");
    std::fs::create_dir(&tree).expect("made");
    for number in 0..200 {
        std::fs::write(tree.join(format!("f{number}")), noise(3000, number)).expect("writes");
    }
    cluster.ok(&["fs", "put", "-r", tree.to_str().expect("text"), "/tree"]);
    let database = dir.join("state/shard-000/db");
    let blobs = || names(&database, ".blob");
    for how in ["missing", "flipped"] {
        assert!(cluster.stop());
        let blob = database.join(blobs().first().expect("large values have files of their own"));
        match how {
            "missing" => std::fs::remove_file(&blob).expect("removes"),
            _ => {
                let mut bytes = std::fs::read(&blob).expect("reads");
                let middle = bytes.len() / 2;
                bytes[middle] ^= 1;
                std::fs::write(&blob, bytes).expect("writes");
            }
        }
        cluster.boot();
        let back = temp.path().join(how);
        let get = ["fs", "get", "-r", "/tree", back.to_str().expect("text")];
        let output = cluster.run(&[&["--patience-s", "3"], &get[..]].concat());
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains("the state's files are damaged"), "{how}: {said}");
        // It has a fault to tell of.
        cluster.stop();
        cluster.boot();
        std::fs::remove_dir_all(&back).expect("removes");
        cluster.ok(&get);
        for number in 0..200 {
            let bytes = std::fs::read(back.join(format!("f{number}"))).expect("is there");
            assert!(bytes == noise(3000, number), "{how}: f{number}");
        }
        cluster.fsck();
    }
}
