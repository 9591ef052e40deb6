//! A disk in memory that forgets what was not synced.
//!
//! Names and bytes are kept twice: as a running process sees them and as they would be found after a crash. A
//! crash draws for every unsynced write of a file whether it reached the platter, and cuts one of them short.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use parking_lot::Mutex;

use crate::{Disk, File};

#[derive(Default)]
struct Inode {
    bytes: Vec<u8>,
    durable: Vec<u8>,
    /// Writes since the last sync: offset and bytes; a changed length is a write of nothing.
    unsynced: Vec<(u64, Vec<u8>)>,
}

type InodeRef = Arc<Mutex<Inode>>;

#[derive(Default)]
struct Tree {
    files: BTreeMap<PathBuf, InodeRef>,
    durable: BTreeMap<PathBuf, InodeRef>,
    directories: BTreeSet<PathBuf>,
    fail_writes_after: Option<u64>,
}

/// The disk of one node.
#[derive(Default)]
pub struct SimDisk {
    tree: Arc<Mutex<Tree>>,
}

impl SimDisk {
    /// An empty disk.
    pub fn new() -> SimDisk {
        SimDisk::default()
    }

    /// Loses what was not synced. `below(n)` draws from `0..n`.
    pub(super) fn crash(&self, below: &mut dyn FnMut(u64) -> u64) {
        let mut tree = self.tree.lock();
        tree.files = tree.durable.clone();
        tree.fail_writes_after = None;
        for inode in tree.files.values() {
            let mut inode = inode.lock();
            let mut image = std::mem::take(&mut inode.durable);
            for (offset, bytes) in std::mem::take(&mut inode.unsynced) {
                let kept = match below(3) {
                    0 => 0,
                    1 => below(bytes.len() as u64 + 1) as usize,
                    _ => bytes.len(),
                };
                put(&mut image, offset, &bytes[..kept]);
            }
            inode.durable = image.clone();
            inode.bytes = image;
        }
    }

    /// Makes every write and sync fail after `writes` more.
    pub fn fail_writes_after(&self, writes: u64) {
        self.tree.lock().fail_writes_after = Some(writes);
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

fn charge(tree: &Mutex<Tree>) -> io::Result<()> {
    match &mut tree.lock().fail_writes_after {
        Some(0) => Err(io::Error::other("simulated disk fault")),
        Some(left) => {
            *left -= 1;
            Ok(())
        }
        None => Ok(()),
    }
}

struct SimFile {
    inode: InodeRef,
    tree: Arc<Mutex<Tree>>,
}

impl File for SimFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let inode = self.inode.lock();
        let start = (offset as usize).min(inode.bytes.len());
        let count = buffer.len().min(inode.bytes.len() - start);
        buffer[..count].copy_from_slice(&inode.bytes[start..start + count]);
        Ok(count)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        charge(&self.tree)?;
        let mut inode = self.inode.lock();
        put(&mut inode.bytes, offset, bytes);
        inode.unsynced.push((offset, bytes.to_vec()));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        charge(&self.tree)?;
        let mut inode = self.inode.lock();
        // Only what changed is copied: logs sync often.
        let Inode { bytes, durable, unsynced } = &mut *inode;
        durable.resize(bytes.len(), 0);
        for (offset, written) in unsynced.drain(..) {
            let start = (offset as usize).min(bytes.len());
            let end = (start + written.len()).min(bytes.len());
            durable[start..end].copy_from_slice(&bytes[start..end]);
        }
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.inode.lock().bytes.len() as u64)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        charge(&self.tree)?;
        let mut inode = self.inode.lock();
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
        let mut tree = self.tree.lock();
        let inode = match tree.files.get(path) {
            Some(inode) => inode.clone(),
            None if create => tree.files.entry(path.to_owned()).or_default().clone(),
            None => return Err(not_found(path)),
        };
        Ok(Box::new(SimFile { inode, tree: self.tree.clone() }))
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        let mut tree = self.tree.lock();
        for ancestor in path.ancestors() {
            tree.directories.insert(ancestor.to_owned());
        }
        Ok(())
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let tree = self.tree.lock();
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
        charge(&self.tree)?;
        let mut tree = self.tree.lock();
        let inode = tree.files.remove(from).ok_or_else(|| not_found(from))?;
        tree.files.insert(to.to_owned(), inode);
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        charge(&self.tree)?;
        self.tree.lock().files.remove(path).map(drop).ok_or_else(|| not_found(path))
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        charge(&self.tree)?;
        let mut tree = self.tree.lock();
        let inside = |p: &Path| p.parent() == Some(path);
        tree.durable.retain(|p, _| !inside(p));
        let current: Vec<_> =
            tree.files.iter().filter(|(p, _)| inside(p)).map(|(p, i)| (p.clone(), i.clone())).collect();
        tree.durable.extend(current);
        Ok(())
    }

    fn exists(&self, path: &Path) -> bool {
        let tree = self.tree.lock();
        tree.files.contains_key(path) || tree.directories.contains(path)
    }

    fn space(&self, _path: &Path) -> io::Result<(u64, u64)> {
        Ok((1 << 40, 1 << 40))
    }
}
