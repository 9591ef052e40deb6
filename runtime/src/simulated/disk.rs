//! A disk in memory that forgets what was not synced, and fails as it is told.
//!
//! Names and bytes are kept twice: as a running process sees them and as they would be found after a crash. A
//! crash draws for every unsynced write of a file whether it reached the platter, cuts some of them short, and leaves pages out of others; of
//! unsynced changes of names the first so many survive, as a journal would have them.
//!
//! A sync that fails is as bad as Linux makes it: what it was to write may or may not have reached the platter, reads go on
//! showing it, and later syncs do not try again. A write, a sync, a rename or a removal may take long,
//! and all of the disk may hang until it is done.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;

use super::job;
use crate::{Disk, File};

/// A disk writes whole pages, in any order.
const PAGE_BYTES: usize = 4096;

/// What a disk does wrong from now on.
#[derive(Clone, Debug, Default)]
pub struct DiskFaults {
    /// Reads that fail, per mille.
    pub read_error_permille: u32,
    /// Writes and syncs that fail, per mille.
    pub write_error_permille: u32,
    /// Writes find no room.
    pub full: bool,
}

#[derive(Default)]
struct Inode {
    bytes: Vec<u8>,
    durable: Vec<u8>,
    /// Bytes before here have their room.
    allocated: u64,
    /// Writes since the last sync: offset and bytes; a changed length is a write of nothing.
    unsynced: Vec<(u64, Vec<u8>)>,
}

impl Inode {
    /// Some of what was not synced reaches the platter, some of that cut short; none of it will be written again.
    fn forget_unsynced(&mut self, below: &mut dyn FnMut(u64) -> u64) {
        for (offset, bytes) in std::mem::take(&mut self.unsynced) {
            match below(3) {
                0 => {}
                1 => {
                    let kept = below(bytes.len() as u64 + 1) as usize;
                    match kept.is_multiple_of(2) && bytes.len() > PAGE_BYTES {
                        true => put_some(&mut self.durable, offset, &bytes, kept as u64),
                        false => put(&mut self.durable, offset, &bytes[..kept]),
                    }
                }
                _ => put(&mut self.durable, offset, &bytes),
            }
        }
    }
}

type InodeRef = Arc<Mutex<Inode>>;

/// A change of names that no directory sync has covered yet.
#[derive(Clone)]
enum NameChange {
    Put(PathBuf, InodeRef),
    Remove(PathBuf),
    Move(PathBuf, PathBuf, InodeRef),
}

impl NameChange {
    fn touches(&self, dir: &Path) -> bool {
        let inside = |p: &Path| p.parent() == Some(dir);
        match self {
            NameChange::Put(path, _) | NameChange::Remove(path) => inside(path),
            NameChange::Move(from, to, _) => inside(from) || inside(to),
        }
    }

    fn apply(self, names: &mut BTreeMap<PathBuf, InodeRef>) {
        match self {
            NameChange::Put(path, inode) => drop(names.insert(path, inode)),
            NameChange::Remove(path) => drop(names.remove(&path)),
            NameChange::Move(from, to, inode) => {
                names.remove(&from);
                names.insert(to, inode);
            }
        }
    }
}

/// The time of the world that a disk is in, in nanoseconds.
#[derive(Clone)]
pub(super) struct Time {
    /// What it is.
    pub(super) now: Arc<dyn Fn() -> u64 + Send + Sync>,
    /// Lets so much of it pass.
    pub(super) pass: Arc<dyn Fn(u64) + Send + Sync>,
}

#[derive(Default)]
struct Tree {
    files: BTreeMap<PathBuf, InodeRef>,
    durable: BTreeMap<PathBuf, InodeRef>,
    unsynced_names: Vec<NameChange>,
    directories: BTreeSet<PathBuf>,
    faults: DiskFaults,
    fail_writes_after: Option<u64>,
    /// Operations until the power goes.
    cut_after: Option<u64>,
    dead: bool,
    misdirect_next: bool,
    /// Operations until one takes long, and how long in nanoseconds.
    stall_after: Option<(u64, u64)>,
    /// Whether all of the disk hangs when an operation takes long, reads too.
    hangs_whole: bool,
    /// Until when it does so.
    hung_until: u64,
    time: Option<Time>,
    /// Faults that were in fact met.
    faults_met: u64,
    random: u64,
}

impl Tree {
    /// Another disk in the same place with the same files.
    fn copy(&self) -> Tree {
        let copied = |(path, inode): (&PathBuf, &InodeRef)| {
            let bytes = inode.lock().bytes.clone();
            let (durable, allocated) = (bytes.clone(), bytes.len() as u64);
            (path.clone(), Arc::new(Mutex::new(Inode { bytes, durable, allocated, unsynced: Vec::new() })))
        };
        let files: BTreeMap<PathBuf, InodeRef> = self.files.iter().map(copied).collect();
        Tree { durable: files.clone(), files, directories: self.directories.clone(), ..self.fresh() }
    }

    /// Another, empty disk in the same place.
    fn fresh(&self) -> Tree {
        Tree { random: self.random, time: self.time.clone(), ..Tree::default() }
    }

    /// SplitMix64 (Steele, Lea and Flood, 2014): a stream of the disk's own, so that what it draws does not depend on
    /// anybody else.
    fn draw(&mut self, bound: u64) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ z >> 31) % bound.max(1)
    }

    fn fault(&mut self, kind: io::ErrorKind) -> io::Error {
        self.faults_met += 1;
        io::Error::new(kind, "simulated disk fault")
    }

    fn alive(&mut self) -> io::Result<()> {
        if let Some(left) = &mut self.cut_after {
            if *left == 0 {
                self.dead = true;
            } else {
                *left -= 1;
            }
        }
        if self.dead { Err(io::Error::other("the power is gone")) } else { Ok(()) }
    }

    fn charge_read(&mut self) -> io::Result<()> {
        self.alive()?;
        let permille = u64::from(self.faults.read_error_permille);
        if permille > 0 && self.draw(1000) < permille {
            return Err(self.fault(io::ErrorKind::Other));
        }
        Ok(())
    }

    /// Before a write that needs room that was not set aside.
    fn charge_room(&mut self) -> io::Result<()> {
        if self.faults.full && !self.dead {
            return Err(self.fault(io::ErrorKind::StorageFull));
        }
        Ok(())
    }

    fn charge_write(&mut self) -> io::Result<()> {
        self.alive()?;
        let permille = u64::from(self.faults.write_error_permille);
        if permille > 0 && self.draw(1000) < permille {
            return Err(self.fault(io::ErrorKind::Other));
        }
        match &mut self.fail_writes_after {
            Some(0) => Err(self.fault(io::ErrorKind::Other)),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }
}

/// A disk that is not where it belongs.
pub struct Unmounted(Tree);

impl Unmounted {
    /// Another with the same files.
    pub fn copy(&self) -> Unmounted {
        Unmounted(self.0.copy())
    }
}

/// The disk of one node.
pub struct SimDisk {
    tree: Arc<Mutex<Tree>>,
}

impl SimDisk {
    /// An empty disk whose own draws come from a seed.
    pub fn new(seed: u64) -> SimDisk {
        SimDisk { tree: Arc::new(Mutex::new(Tree { random: seed, ..Tree::default() })) }
    }

    /// An empty disk on which operations can take time.
    pub(super) fn in_time(seed: u64, time: Time) -> SimDisk {
        let tree = Tree { random: seed, time: Some(time), ..Tree::default() };
        SimDisk { tree: Arc::new(Mutex::new(tree)) }
    }

    /// The change of a file after `operations` more takes `lasting`. Meanwhile others go on, unless the change is made in a task
    /// of its node instead of in blocking work; then everybody waits.
    pub fn stall_after(&self, operations: u64, lasting: Duration) {
        let mut tree = self.tree.lock();
        tree.stall_after = Some((operations, lasting.as_nanos() as u64));
        tree.hangs_whole = false;
    }

    /// As [`SimDisk::stall_after`], but until that change is done nothing else is, and nothing is read.
    pub fn hang_after(&self, operations: u64, lasting: Duration) {
        self.stall_after(operations, lasting);
        self.tree.lock().hangs_whole = true;
    }

    /// Nothing takes long any more, but what waits already; how long that is.
    pub fn end_stall(&self) -> Duration {
        let mut tree = self.tree.lock();
        tree.stall_after = None;
        let until = std::mem::take(&mut tree.hung_until);
        let now = tree.time.as_ref().map_or(0, |time| (time.now)());
        Duration::from_nanos(until.saturating_sub(now))
    }

    /// Loses what was not synced. `below(n)` draws from `0..n`. The disk works again afterwards.
    pub(super) fn crash(&self, below: &mut dyn FnMut(u64) -> u64) {
        let mut tree = self.tree.lock();
        let changes = std::mem::take(&mut tree.unsynced_names);
        let kept = below(changes.len() as u64 + 1) as usize;
        let mut names = std::mem::take(&mut tree.durable);
        changes.into_iter().take(kept).for_each(|change| change.apply(&mut names));
        tree.files = names.clone();
        tree.durable = names;
        (tree.fail_writes_after, tree.cut_after, tree.dead, tree.misdirect_next) = (None, None, false, false);
        (tree.stall_after, tree.hung_until) = (None, 0);
        for inode in tree.files.values() {
            let mut inode = inode.lock();
            inode.forget_unsynced(below);
            inode.bytes = inode.durable.clone();
        }
    }

    /// Makes every write and sync fail after `writes` more, until the next crash.
    pub fn fail_writes_after(&self, writes: u64) {
        self.tree.lock().fail_writes_after = Some(writes);
    }

    /// What was to fail works again, and nothing is lost: the process has died, or somebody tries again.
    pub fn heal(&self) {
        let mut tree = self.tree.lock();
        (tree.fail_writes_after, tree.cut_after, tree.dead, tree.hung_until) = (None, None, false, 0);
    }

    /// Sets what goes wrong by chance. Survives a crash.
    pub fn set_faults(&self, faults: DiskFaults) {
        self.tree.lock().faults = faults;
    }

    /// The power goes at the operation after `operations` more: it and all later ones fail until the next crash.
    pub fn cut_power_after(&self, operations: u64) {
        self.tree.lock().cut_after = Some(operations);
    }

    /// Whether the power is gone: its node must be crashed before anything else of it runs.
    pub fn is_dead(&self) -> bool {
        self.tree.lock().dead
    }

    /// Whether an operation that takes long is to come.
    pub(super) fn is_about_to_stall(&self) -> bool {
        let tree = self.tree.lock();
        tree.stall_after.is_some() || tree.hung_until > 0
    }

    /// The next write lands at another place of the same file and reports success.
    pub fn misdirect_next(&self) {
        self.tree.lock().misdirect_next = true;
    }

    /// How many operations have met a fault.
    pub fn faults_met(&self) -> u64 {
        self.tree.lock().faults_met
    }

    /// Removes everything, as when a disk is exchanged for an empty one.
    pub fn wipe(&self) {
        let mut tree = self.tree.lock();
        *tree = tree.fresh();
    }

    /// Removes everything under a directory.
    pub fn wipe_under(&self, dir: &Path) {
        let mut tree = self.tree.lock();
        tree.files.retain(|path, _| !path.starts_with(dir));
        tree.durable.retain(|path, _| !path.starts_with(dir));
    }

    /// Takes the disk away and leaves an empty directory in its place, as when it is not mounted.
    pub fn unmount(&self) -> Unmounted {
        let mut tree = self.tree.lock();
        let fresh = tree.fresh();
        Unmounted(std::mem::replace(&mut *tree, fresh))
    }

    /// Another disk with all that is on this one, as somebody makes who copies it while nobody writes.
    pub fn copy(&self) -> Unmounted {
        Unmounted(self.tree.lock().copy())
    }

    /// Puts a disk back; what was written into its place meanwhile is hidden, and returned.
    pub fn mount(&self, disk: Unmounted) -> Vec<PathBuf> {
        let mut tree = self.tree.lock();
        let hidden = std::mem::replace(&mut *tree, disk.0);
        hidden.files.into_keys().collect()
    }

    /// Flips bits of one byte, as a failing medium would.
    pub fn corrupt(&self, path: &Path, offset: u64, mask: u8) -> bool {
        let tree = self.tree.lock();
        let Some(inode) = tree.files.get(path) else { return false };
        let mut inode = inode.lock();
        let at = offset as usize;
        if at >= inode.bytes.len() {
            return false;
        }
        inode.bytes[at] ^= mask;
        if let Some(byte) = inode.durable.get_mut(at) {
            *byte ^= mask;
        }
        true
    }

    /// All files with their lengths.
    pub fn files(&self) -> Vec<(PathBuf, u64)> {
        self.tree.lock().files.iter().map(|(p, i)| (p.clone(), i.lock().bytes.len() as u64)).collect()
    }
}

/// Puts some of the pages of a write, any of them; the file is as long as with all.
fn put_some(image: &mut Vec<u8>, offset: u64, bytes: &[u8], draw: u64) {
    let end = offset as usize + bytes.len();
    if image.len() < end {
        image.resize(end, 0);
    }
    let first = PAGE_BYTES - offset as usize % PAGE_BYTES;
    let (mut at, mut until) = (0, first.min(bytes.len()));
    let mut bits = draw.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    while at < bytes.len() {
        if bits >> 63 == 1 {
            image[offset as usize + at..offset as usize + until].copy_from_slice(&bytes[at..until]);
        }
        (bits, at, until) = (bits.rotate_left(1), until, (until + PAGE_BYTES).min(bytes.len()));
    }
}

fn put(image: &mut Vec<u8>, offset: u64, bytes: &[u8]) {
    if bytes.is_empty() {
        return;
    }
    let end = offset as usize + bytes.len();
    if image.len() < end {
        image.resize(end, 0);
    }
    image[offset as usize..end].copy_from_slice(bytes);
}

/// Before anything: all of the disk may hang, once more when it has just ended.
fn wait_for(tree: &Mutex<Tree>) -> io::Result<()> {
    loop {
        job::check_alive()?;
        let (until, time) = {
            let tree = tree.lock();
            (tree.hung_until, if tree.hung_until > 0 { tree.time.clone() } else { None })
        };
        let Some(time) = time else { return Ok(()) };
        match until.saturating_sub((time.now)()) {
            0 => return Ok(()),
            left => (time.pass)(left),
        }
    }
}

/// Before a change: it may take long. Nothing is locked meanwhile, and no lock of the program may be held.
fn take_time(tree: &Mutex<Tree>) -> io::Result<()> {
    wait_for(tree)?;
    let stall = {
        let mut tree = tree.lock();
        match &mut tree.stall_after {
            Some((0, ns)) => {
                let ns = *ns;
                tree.stall_after = None;
                tree.faults_met += 1;
                tree.time.clone().map(|time| (time, ns, tree.hangs_whole))
            }
            Some((left, _)) => {
                *left -= 1;
                None
            }
            None => None,
        }
    };
    if let Some((time, ns, whole)) = stall {
        if whole {
            let until = (time.now)() + ns;
            tree.lock().hung_until = until;
        }
        (time.pass)(ns);
    }
    job::check_alive()
}

struct SimFile {
    inode: InodeRef,
    tree: Arc<Mutex<Tree>>,
}

impl File for SimFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        wait_for(&self.tree)?;
        self.tree.lock().charge_read()?;
        let inode = self.inode.lock();
        let start = (offset as usize).min(inode.bytes.len());
        let count = buffer.len().min(inode.bytes.len() - start);
        buffer[..count].copy_from_slice(&inode.bytes[start..start + count]);
        Ok(count)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        take_time(&self.tree)?;
        let misdirected = {
            let needs_room = {
                let inode = self.inode.lock();
                offset + bytes.len() as u64 > inode.allocated.max(inode.bytes.len() as u64)
            };
            let mut tree = self.tree.lock();
            if needs_room {
                tree.charge_room()?;
            }
            tree.charge_write()?;
            tree.faults_met += u64::from(tree.misdirect_next);
            std::mem::take(&mut tree.misdirect_next)
        };
        let mut inode = self.inode.lock();
        // Another sector of the same file: the distance is one page, or the beginning.
        let offset = match misdirected {
            true if offset >= 4096 => offset - 4096,
            true => offset + 4096,
            false => offset,
        };
        put(&mut inode.bytes, offset, bytes);
        inode.unsynced.push((offset, bytes.to_vec()));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        take_time(&self.tree)?;
        let failed = {
            let mut tree = self.tree.lock();
            tree.charge_write().err().map(|error| (error, tree.dead))
        };
        let mut inode = self.inode.lock();
        if let Some((error, dead)) = failed {
            if !dead {
                let mut tree = self.tree.lock();
                inode.forget_unsynced(&mut |bound| tree.draw(bound));
            }
            return Err(error);
        }
        // Only what changed is copied: logs sync often.
        let Inode { bytes, durable, unsynced, .. } = &mut *inode;
        durable.resize(bytes.len(), 0);
        for (offset, written) in unsynced.drain(..) {
            let start = (offset as usize).min(bytes.len());
            let end = (start + written.len()).min(bytes.len());
            durable[start..end].copy_from_slice(&bytes[start..end]);
        }
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        wait_for(&self.tree)?;
        Ok(self.inode.lock().bytes.len() as u64)
    }

    fn allocate(&self, end: u64) -> io::Result<()> {
        wait_for(&self.tree)?;
        let mut inode = self.inode.lock();
        if end > inode.allocated.max(inode.bytes.len() as u64) {
            self.tree.lock().charge_room()?;
            inode.allocated = end;
        }
        Ok(())
    }

    fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        wait_for(&self.tree)?;
        self.tree.lock().charge_write()?;
        let mut inode = self.inode.lock();
        let from = (offset as usize).min(inode.bytes.len());
        let until = (offset.saturating_add(length) as usize).min(inode.bytes.len());
        inode.bytes[from..until].fill(0);
        inode.unsynced.push((from as u64, vec![0; until - from]));
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        wait_for(&self.tree)?;
        self.tree.lock().charge_write()?;
        let mut inode = self.inode.lock();
        inode.allocated = inode.allocated.min(len);
        if inode.bytes.len() as u64 == len {
            return Ok(());
        }
        inode.bytes.resize(len as usize, 0);
        inode.unsynced.retain(|(offset, bytes)| offset + bytes.len() as u64 <= len);
        let whole = inode.bytes.clone();
        inode.unsynced.push((0, whole));
        Ok(())
    }
}

fn not_found(path: &Path) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("{}: no such file", path.display()))
}

impl Disk for SimDisk {
    fn open(&self, path: &Path, create: bool) -> io::Result<Box<dyn File>> {
        wait_for(&self.tree)?;
        let mut tree = self.tree.lock();
        tree.alive()?;
        let inode = match tree.files.get(path) {
            Some(inode) => inode.clone(),
            None if create => {
                tree.charge_room()?;
                let inode = InodeRef::default();
                tree.files.insert(path.to_owned(), inode.clone());
                tree.unsynced_names.push(NameChange::Put(path.to_owned(), inode.clone()));
                inode
            }
            None => return Err(not_found(path)),
        };
        Ok(Box::new(SimFile { inode, tree: self.tree.clone() }))
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        wait_for(&self.tree)?;
        let mut tree = self.tree.lock();
        tree.alive()?;
        for ancestor in path.ancestors() {
            tree.directories.insert(ancestor.to_owned());
        }
        Ok(())
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        wait_for(&self.tree)?;
        let mut tree = self.tree.lock();
        tree.alive()?;
        let inside = |p: &&PathBuf| p.parent() == Some(path);
        let mut names: Vec<String> = tree
            .files
            .keys()
            .filter(inside)
            .chain(tree.directories.iter().filter(inside))
            .filter_map(|p| p.file_name())
            .map(|n| n.to_string_lossy().into_owned())
            .collect();
        names.sort();
        Ok(names)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        take_time(&self.tree)?;
        let mut tree = self.tree.lock();
        tree.charge_write()?;
        let inode = tree.files.remove(from).ok_or_else(|| not_found(from))?;
        tree.files.insert(to.to_owned(), inode.clone());
        tree.unsynced_names.push(NameChange::Move(from.to_owned(), to.to_owned(), inode));
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        take_time(&self.tree)?;
        let mut tree = self.tree.lock();
        tree.charge_write()?;
        tree.files.remove(path).ok_or_else(|| not_found(path))?;
        tree.unsynced_names.push(NameChange::Remove(path.to_owned()));
        Ok(())
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        wait_for(&self.tree)?;
        let mut tree = self.tree.lock();
        tree.charge_write()?;
        // A journal keeps the order: what came before the last change of this directory is durable with it.
        let covered = tree.unsynced_names.iter().rposition(|c| c.touches(path)).map_or(0, |i| i + 1);
        let changes: Vec<NameChange> = tree.unsynced_names.drain(..covered).collect();
        changes.into_iter().for_each(|change| change.apply(&mut tree.durable));
        Ok(())
    }

    fn exists(&self, path: &Path) -> bool {
        let _ = wait_for(&self.tree);
        let tree = self.tree.lock();
        tree.files.contains_key(path) || tree.directories.contains(path)
    }

    fn space(&self, _path: &Path) -> io::Result<(u64, u64)> {
        wait_for(&self.tree)?;
        let full = self.tree.lock().faults.full;
        Ok((1 << 40, if full { 0 } else { 1 << 40 }))
    }
}
