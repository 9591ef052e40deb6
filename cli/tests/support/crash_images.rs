//! What a power cut leaves of a directory: follows the system calls of a process, as strace writes them down, in a model of a
//! strict file system. Nothing is durable but what was synced: of a file its bytes, of a directory its names.

#![allow(dead_code, unreachable_pub)]

use std::{
    collections::{BTreeMap, HashMap},
    fs::Permissions,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

/// The calls that the model knows, or that must not occur.
const CALLS: &str = "open,openat,creat,close,dup,dup2,dup3,write,writev,pwrite64,pwritev,pwritev2,ftruncate,truncate,fallocate,rename,\
                     renameat,renameat2,link,linkat,symlink,symlinkat,unlink,unlinkat,mkdir,mkdirat,rmdir,fsync,fdatasync,syncfs,sync,\
                     copy_file_range,sendfile,splice,lseek";

/// The words before a command that write its system calls down.
pub fn recorder(trace: &Path) -> Vec<String> {
    let words = ["strace", "-D", "-f", "-ttt", "-y", "-xx", "-s", "20000000", "-e", "signal=none", "-e"];
    let mut words: Vec<String> = words.into_iter().map(str::to_owned).collect();
    words.push(format!("trace={CALLS}"));
    words.extend(["-o".to_owned(), trace.to_str().expect("text").to_owned()]);
    words
}

/// A finished trace: the recorder goes on for a moment after the process.
pub fn read_trace(path: &Path) -> String {
    let start = std::time::Instant::now();
    loop {
        let text = std::fs::read_to_string(path).expect("a trace");
        let last = text.lines().last().unwrap_or_default();
        if text.ends_with('\n')
            && last.contains("+++ exited with")
            && last.split(' ').next() == text.split(' ').next()
        {
            return text;
        }
        assert!(start.elapsed().as_secs() < 60, "the trace {} does not end: {last}", path.display());
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

/// How kind the file system is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strictness {
    /// Names are durable when their directory was synced.
    Strict,
    /// Names are durable at once, bytes are not: a new file may be there, and empty.
    NamesAtOnce,
    /// As `Strict`, but syncs under this directory do nothing: a disk that lies. For tests of tests.
    Lying(&'static str),
}

type Node = usize;

#[derive(Clone, Default)]
struct File {
    now: Arc<Vec<u8>>,
    durable: Arc<Vec<u8>>,
}

#[derive(Clone)]
enum Inode {
    File(File),
    /// Names, as they are and as they are durable.
    Directory(BTreeMap<String, Node>, BTreeMap<String, Node>),
}

struct Descriptor {
    node: Node,
    offset: u64,
    appends: bool,
}

/// A directory tree under one path.
pub struct Model {
    root: PathBuf,
    strictness: Strictness,
    nodes: Vec<Inode>,
    descriptors: HashMap<i64, Descriptor>,
    /// How often what is durable has changed.
    pub changes: u64,
}

/// A call with what it returned.
struct Call<'a> {
    name: &'a str,
    arguments: &'a str,
    result: i64,
}

/// Reads a trace: every event that changed what is durable is told with the time at which it began, before it is applied.
pub fn follow(model: &mut Model, trace: &str, mut change: impl FnMut(&mut Model, f64)) {
    let mut begun: HashMap<&str, (f64, String)> = HashMap::new();
    model.descriptors.clear();
    for line in trace.lines() {
        // Threads of fewer digits are padded.
        let Some((thread, rest)) = line.split_once(' ') else { continue };
        let Some((time, call)) = rest.trim_start().split_once(' ') else { continue };
        let time: f64 = time.parse().unwrap_or_else(|e| panic!("{e}: {line}"));
        if let Some(head) = call.strip_suffix(" <unfinished ...>") {
            if let Some(fd) = head.strip_prefix("close(") {
                // The number is free before the call returns.
                model.descriptors.remove(&number(fd));
            }
            begun.insert(thread, (time, head.to_owned()));
            continue;
        }
        let (time, call) = match call.strip_prefix("<... ") {
            Some(rest) => {
                let (_, tail) = rest.split_once(" resumed>").unwrap_or_else(|| panic!("{line}"));
                let Some((time, head)) = begun.remove(thread) else { continue };
                (time, format!("{head}{tail}"))
            }
            None => (time, call.to_owned()),
        };
        let Some((name, rest)) = call.split_once('(') else { continue };
        let Some((arguments, result)) = rest.rsplit_once(" = ") else { continue };
        let arguments = arguments.trim_end().strip_suffix(')').unwrap_or(arguments);
        let Some(result) = result.split([' ', '<']).next().and_then(|r| r.parse().ok()) else { continue };
        if result < 0 {
            continue;
        }
        let call = Call { name, arguments, result };
        if model.is_durable_change(&call) {
            change(model, time);
            model.changes += 1;
        }
        model.apply(&call);
    }
}

/// The number that an argument begins with.
fn number(argument: &str) -> i64 {
    let end = argument.find(|c: char| c != '-' && !c.is_ascii_digit()).unwrap_or(argument.len());
    argument[..end].parse().unwrap_or_else(|e| panic!("{e}: {argument:.80}"))
}

/// The bytes of a string in hexadecimal.
fn bytes(text: &str) -> Vec<u8> {
    assert!(!text.ends_with("..."), "a string was cut");
    let digits: Vec<u8> = text.bytes().filter(|b| b.is_ascii_hexdigit()).collect();
    let digit = |b: u8| (b as char).to_digit(16).expect("a digit") as u8;
    digits.chunks_exact(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect()
}

/// The strings among arguments, decoded.
fn strings(arguments: &str) -> Vec<Vec<u8>> {
    arguments.split('"').skip(1).step_by(2).map(bytes).collect()
}

/// Arguments apart from each other; strings and names of descriptors have no commas in hexadecimal.
fn split(arguments: &str) -> Vec<&str> {
    arguments.split(", ").collect()
}

impl Model {
    pub fn new(root: &Path, strictness: Strictness) -> Model {
        let nodes = vec![Inode::Directory(BTreeMap::new(), BTreeMap::new())];
        Model { root: root.to_owned(), strictness, nodes, descriptors: HashMap::new(), changes: 0 }
    }

    /// The path under the root, if it is there: absolute, or behind the directory that a descriptor is annotated with.
    fn inside(&self, base: Option<&str>, path: &[u8]) -> Option<Vec<String>> {
        let path = PathBuf::from(String::from_utf8(path.to_vec()).expect("text"));
        let path = match base.and_then(|b| b.split_once('<')) {
            Some((_, name)) if path.is_relative() => {
                let base = String::from_utf8(bytes(name.trim_end_matches('>'))).expect("text");
                Path::new(&base).join(path)
            }
            _ => path,
        };
        let rest = path.strip_prefix(&self.root).ok()?;
        Some(rest.iter().map(|part| part.to_str().expect("text").to_owned()).collect())
    }

    fn find(&self, parts: &[String]) -> Option<Node> {
        parts.iter().try_fold(0, |at, part| match &self.nodes[at] {
            Inode::Directory(names, _) => names.get(part).copied(),
            Inode::File(_) => None,
        })
    }

    fn names(&mut self, parts: &[String]) -> (&mut BTreeMap<String, Node>, &mut BTreeMap<String, Node>) {
        let at = self.find(parts).unwrap_or_else(|| panic!("{parts:?} is not there"));
        match &mut self.nodes[at] {
            Inode::Directory(names, durable) => (names, durable),
            Inode::File(_) => panic!("{parts:?} is a file"),
        }
    }

    fn set(&mut self, parts: &[String], node: Option<Node>) {
        let at_once = self.strictness == Strictness::NamesAtOnce;
        let (name, parent) = parts.split_last().expect("a name");
        let (names, durable) = self.names(parent);
        for names in std::iter::once(names).chain(at_once.then_some(durable)) {
            match node {
                Some(node) => names.insert(name.clone(), node),
                None => names.remove(name),
            };
        }
    }

    fn add(&mut self, inode: Inode) -> Node {
        self.nodes.push(inode);
        self.nodes.len() - 1
    }

    /// The paths that a call names, and whether they lie under the root.
    fn paths(&self, call: &Call<'_>) -> Vec<Option<Vec<String>>> {
        let mut base = None;
        let mut paths = Vec::new();
        for argument in split(call.arguments) {
            if let Some(text) = argument.strip_prefix('"') {
                paths.push(self.inside(base.take(), &bytes(text.trim_end_matches('"'))));
            } else {
                base = Some(argument);
            }
        }
        paths
    }

    fn is_durable_change(&self, call: &Call<'_>) -> bool {
        match call.name {
            "fsync" | "fdatasync" => self.descriptors.contains_key(&number(call.arguments)),
            "rename" | "renameat" | "renameat2" | "link" | "linkat" | "unlink" | "unlinkat" | "mkdir"
            | "mkdirat" | "rmdir" => {
                self.strictness == Strictness::NamesAtOnce && self.paths(call).iter().any(Option::is_some)
            }
            _ => false,
        }
    }

    fn write(&mut self, fd: i64, at: Option<u64>, data: &[u8]) {
        let Some(descriptor) = self.descriptors.get_mut(&fd) else { return };
        let Inode::File(file) = &mut self.nodes[descriptor.node] else { panic!("a write to a directory") };
        let now = Arc::make_mut(&mut file.now);
        let at = match at {
            Some(at) => at as usize,
            None if descriptor.appends => now.len(),
            None => descriptor.offset as usize,
        };
        now.resize(now.len().max(at + data.len()), 0);
        now[at..at + data.len()].copy_from_slice(data);
        descriptor.offset = (at + data.len()) as u64;
    }

    fn resize(&mut self, fd: i64, change: impl FnOnce(usize) -> usize) {
        let Some(descriptor) = self.descriptors.get(&fd) else { return };
        let Inode::File(file) = &mut self.nodes[descriptor.node] else { panic!("a directory has no length") };
        let length = change(file.now.len());
        Arc::make_mut(&mut file.now).resize(length, 0);
    }

    fn apply(&mut self, call: &Call<'_>) {
        let arguments = split(call.arguments);
        let fd = || number(arguments[0]);
        match call.name {
            "open" | "openat" | "creat" => self.open(call),
            "close" => drop(self.descriptors.remove(&fd())),
            "write" | "writev" => {
                if self.descriptors.contains_key(&fd()) {
                    let data = strings(call.arguments).concat();
                    self.write(fd(), None, &data[..call.result as usize]);
                }
            }
            "pwrite64" | "pwritev" | "pwritev2" => {
                if self.descriptors.contains_key(&fd()) {
                    let data = strings(call.arguments).concat();
                    let last =
                        if call.name == "pwritev2" { arguments.len() - 2 } else { arguments.len() - 1 };
                    self.write(fd(), Some(number(arguments[last]) as u64), &data[..call.result as usize]);
                }
            }
            "ftruncate" => self.resize(fd(), |_| number(arguments[1]) as usize),
            "fallocate" => match arguments[1] {
                "0" => {
                    let end = (number(arguments[2]) + number(arguments[3])) as usize;
                    self.resize(fd(), |length| length.max(end));
                }
                "FALLOC_FL_KEEP_SIZE" => {}
                // A hole: zeros, and the file stays as long as it is.
                "FALLOC_FL_KEEP_SIZE|FALLOC_FL_PUNCH_HOLE" => {
                    let (at, length) = (number(arguments[2]) as u64, number(arguments[3]) as usize);
                    if self.descriptors.contains_key(&fd()) {
                        self.write(fd(), Some(at), &vec![0; length]);
                    }
                }
                other => assert!(!self.descriptors.contains_key(&fd()), "fallocate with {other}"),
            },
            "lseek" => {
                if let Some(descriptor) = self.descriptors.get_mut(&fd()) {
                    descriptor.offset = call.result as u64;
                }
            }
            "rename" | "renameat" | "renameat2" | "link" | "linkat" => match &self.paths(call)[..] {
                [Some(from), Some(to)] => {
                    let node = self.find(from).unwrap_or_else(|| panic!("{from:?} is not there"));
                    if call.name.starts_with("rename") {
                        self.set(from, None);
                    }
                    self.set(to, Some(node));
                }
                [None, None] => {}
                paths => panic!("{}: {paths:?} leads in or out", call.name),
            },
            "unlink" | "unlinkat" | "rmdir" => {
                if let [Some(path)] = &self.paths(call)[..] {
                    self.set(path, None);
                }
            }
            "mkdir" | "mkdirat" => {
                if let [Some(path)] = &self.paths(call)[..] {
                    if path.is_empty() {
                        return;
                    }
                    let node = self.add(Inode::Directory(BTreeMap::new(), BTreeMap::new()));
                    self.set(path, Some(node));
                }
            }
            "fsync" | "fdatasync" => self.sync(fd()),
            "copy_file_range" => self.copy(call, &arguments),
            "truncate" | "symlink" | "symlinkat" => {
                assert!(self.paths(call).iter().all(Option::is_none), "{} is not modelled", call.name);
            }
            "dup" | "dup2" | "dup3" | "sendfile" | "splice" => {
                let held = arguments.iter().filter(|a| a.contains('<')).map(|a| number(a));
                let mut held = held.filter(|fd| self.descriptors.contains_key(fd));
                assert!(held.next().is_none(), "{} is not modelled", call.name);
            }
            "sync" | "syncfs" => panic!("{} is not modelled", call.name),
            other => panic!("{other} is not known"),
        }
    }

    fn open(&mut self, call: &Call<'_>) {
        let paths = self.paths(call);
        let [Some(path)] = &paths[..] else {
            self.descriptors.remove(&call.result);
            return;
        };
        let has = |flag: &str| call.arguments.contains(flag);
        let node = match self.find(path) {
            Some(node) => node,
            None => {
                assert!(has("O_CREAT"), "{path:?} was opened and is not there");
                let node = self.add(Inode::File(File::default()));
                self.set(path, Some(node));
                node
            }
        };
        if has("O_TRUNC")
            && let Inode::File(file) = &mut self.nodes[node]
        {
            file.now = Arc::default();
        }
        let descriptor = Descriptor { node, offset: 0, appends: has("O_APPEND") };
        self.descriptors.insert(call.result, descriptor);
    }

    fn sync(&mut self, fd: i64) {
        let Some(descriptor) = self.descriptors.get(&fd) else { return };
        let node = descriptor.node;
        if let Strictness::Lying(under) = self.strictness
            && self.find(&[under.to_owned()]).is_some_and(|at| self.holds(at, node))
        {
            return;
        }
        match &mut self.nodes[node] {
            Inode::File(file) => file.durable = file.now.clone(),
            Inode::Directory(names, durable) => *durable = names.clone(),
        }
    }

    fn holds(&self, at: Node, node: Node) -> bool {
        at == node
            || match &self.nodes[at] {
                Inode::Directory(names, _) => names.values().any(|inner| self.holds(*inner, node)),
                Inode::File(_) => false,
            }
    }

    fn copy(&mut self, call: &Call<'_>, arguments: &[&str]) {
        let (from, to) = (number(arguments[0]), number(arguments[2]));
        if !self.descriptors.contains_key(&to) {
            return;
        }
        assert!(arguments[1] == "NULL" && arguments[3] == "NULL", "copies with offsets are not modelled");
        let source = self.descriptors.get_mut(&from).expect("a copy from inside");
        let Inode::File(file) = &self.nodes[source.node] else { panic!("a copy of a directory") };
        let start = source.offset as usize;
        source.offset += call.result as u64;
        let data = file.now[start..start + call.result as usize].to_vec();
        self.write(to, None, &data);
    }

    /// Writes down what a power cut at this moment leaves.
    pub fn write_image(&self, to: &Path) {
        std::fs::create_dir_all(to).expect("made");
        let mut known = HashMap::new();
        self.write_directory(0, to, &mut known);
    }

    fn write_directory(&self, node: Node, to: &Path, known: &mut HashMap<Node, PathBuf>) {
        let Inode::Directory(_, durable) = &self.nodes[node] else { panic!("not a directory") };
        for (name, node) in durable {
            let path = to.join(name);
            match &self.nodes[*node] {
                Inode::Directory(..) => {
                    std::fs::create_dir(&path).expect("made");
                    self.write_directory(*node, &path, known);
                }
                // Names of one file stay names of one file.
                Inode::File(_) if known.contains_key(node) => {
                    std::fs::hard_link(&known[node], &path).expect("linked");
                }
                Inode::File(file) => {
                    std::fs::write(&path, &*file.durable).expect("written");
                    // As private as the most private among them.
                    std::fs::set_permissions(&path, Permissions::from_mode(0o600)).expect("set");
                    known.insert(*node, path);
                }
            }
        }
    }
}
