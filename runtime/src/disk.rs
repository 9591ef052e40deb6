//! Files. The calls block: they are made by owners on threads of their own.
//!
//! Nothing is durable before [`File::sync`], and no name before [`Disk::sync_dir`] of its directory.

use std::{io, path::Path};

/// An open file. Reads and writes carry their offset; there is no cursor.
pub trait File: Send + Sync {
    /// Reads up to `buffer.len()` bytes; fewer only at the end of the file.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Appends up to `length` bytes to `buffer`, fewer only at the end of the file, and says how many. Large buffers
    /// need not be zeroed for it.
    fn read_onto(&self, buffer: &mut Vec<u8>, length: usize, offset: u64) -> io::Result<usize> {
        let before = buffer.len();
        buffer.resize(before + length, 0);
        let read = self.read_at(&mut buffer[before..], offset);
        buffer.truncate(before + read.as_ref().copied().unwrap_or_default());
        read
    }
    /// Writes all bytes.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Makes the bytes and the length durable. A failure is final: what was written may be lost, and a second
    /// call that succeeds says nothing.
    fn sync(&self) -> io::Result<()>;
    /// Length in bytes.
    fn len(&self) -> io::Result<u64>;
    /// Whether it has no bytes.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
    /// Sets room aside for the bytes before `end`, without making the file longer: writes of them need none then. Where a
    /// file system cannot do that, nothing happens.
    ///
    /// # Errors
    /// [`io::ErrorKind::StorageFull`] when there is no such room; nothing has changed then.
    fn allocate(&self, end: u64) -> io::Result<()>;
    /// Gives bytes back to the file system: they read as zeros from now on, and the length stays. Where a file system cannot do that,
    /// nothing happens.
    fn discard(&self, offset: u64, length: u64) -> io::Result<()>;
    /// Cuts or extends with zeros.
    fn set_len(&self, len: u64) -> io::Result<()>;
}

/// A file system.
pub trait Disk: Send + Sync {
    /// Opens for reading and writing; creates when asked and missing.
    fn open(&self, path: &Path, create: bool) -> io::Result<Box<dyn File>>;
    /// Makes a directory and its parents, durably.
    fn create_dir_all(&self, path: &Path) -> io::Result<()>;
    /// Names in a directory, sorted. Empty when there is no such directory.
    fn list(&self, path: &Path) -> io::Result<Vec<String>>;
    /// Renames over what is there.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a file.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Makes a directory's names durable.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// Whether a file or directory of that name exists.
    fn exists(&self, path: &Path) -> bool;
    /// Total and available bytes of the file system that holds `path`.
    fn space(&self, path: &Path) -> io::Result<(u64, u64)>;

    /// Reads a whole file.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let file = self.open(path, false)?;
        let mut bytes = vec![0; usize::try_from(file.len()?).map_err(io::Error::other)?];
        let read = file.read_at(&mut bytes, 0)?;
        bytes.truncate(read);
        Ok(bytes)
    }

    /// Replaces a file so that a crash leaves the old or the new bytes: temporary name, sync, rename, sync.
    fn replace(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let temporary = path.with_extension("new");
        let file = self.open(&temporary, true)?;
        file.set_len(0)?;
        file.write_at(bytes, 0)?;
        file.sync()?;
        drop(file);
        self.rename(&temporary, path)?;
        self.sync_dir(path.parent().unwrap_or(Path::new(".")))
    }
}
