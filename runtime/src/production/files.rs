//! Files of the operating system.

use std::{
    fs, io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use crate::{Disk, File};

/// The operating system's file system.
pub struct OsDisk;

struct OsFile {
    file: fs::File,
    path: PathBuf,
}

/// Adds the path to an error of the operating system, which never says it.
fn at<T>(path: &Path, result: io::Result<T>) -> io::Result<T> {
    result.map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))
}

impl File for OsFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut done = 0;
        while done < buffer.len() {
            match self.file.read_at(&mut buffer[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(read) => done += read,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return at(&self.path, Err(e)),
            }
        }
        Ok(done)
    }

    fn read_onto(&self, buffer: &mut Vec<u8>, length: usize, offset: u64) -> io::Result<usize> {
        let (before, end) = (buffer.len(), buffer.len() + length);
        buffer.reserve_exact(length);
        while buffer.len() < end {
            let from = offset + (buffer.len() - before) as u64;
            match rustix::io::pread(&self.file, rustix::buffer::spare_capacity(buffer), from) {
                Ok(0) => break,
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    buffer.truncate(before);
                    return at(&self.path, Err(error.into()));
                }
            }
        }
        // The allocator may have given more room than was asked for.
        buffer.truncate(end);
        Ok(buffer.len() - before)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        at(&self.path, self.file.write_all_at(bytes, offset))
    }

    fn sync(&self) -> io::Result<()> {
        at(&self.path, self.file.sync_data())
    }

    fn len(&self) -> io::Result<u64> {
        at(&self.path, self.file.metadata().map(|m| m.len()))
    }

    fn allocate(&self, end: u64) -> io::Result<()> {
        use rustix::{
            fs::{FallocateFlags, fallocate},
            io::Errno,
        };
        loop {
            match fallocate(&self.file, FallocateFlags::KEEP_SIZE, 0, end.max(1)) {
                Err(Errno::INTR) => {}
                Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(()),
                Err(error) => return at(&self.path, Err(error.into())),
            }
        }
    }

    fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        use rustix::{
            fs::{FallocateFlags, fallocate},
            io::Errno,
        };
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        loop {
            match fallocate(&self.file, flags, offset, length) {
                Err(Errno::INTR) => {}
                Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(()),
                Err(error) => return at(&self.path, Err(error.into())),
            }
        }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        at(&self.path, self.file.set_len(len))
    }
}

impl Disk for OsDisk {
    fn open(&self, path: &Path, create: bool) -> io::Result<Box<dyn File>> {
        // Opening for writing fails on read-only media; reading tools still work there.
        let opened = fs::OpenOptions::new().read(true).write(true).create(create).truncate(false).open(path);
        let file = match opened {
            Err(e)
                if !create
                    && matches!(
                        e.kind(),
                        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem
                    ) =>
            {
                at(path, fs::File::open(path))?
            }
            other => at(path, other)?,
        };
        Ok(Box::new(OsFile { file, path: path.to_owned() }))
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        if path.is_dir() {
            return Ok(());
        }
        if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
            self.create_dir_all(parent)?;
        }
        match fs::create_dir(path) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
            Err(e) => at(path, Err(e)),
            Ok(()) => self.sync_dir(path.parent().unwrap_or(Path::new("."))),
        }
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => at(path, other)?,
        };
        let mut names = Vec::new();
        for entry in entries {
            names.push(at(path, entry)?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        at(to, fs::rename(from, to))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        at(path, fs::remove_file(path))
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        at(path, fs::File::open(path).and_then(|dir| dir.sync_all()))
    }

    fn exists(&self, path: &Path) -> bool {
        path.exists()
    }

    fn space(&self, path: &Path) -> io::Result<(u64, u64)> {
        let stat = at(path, rustix::fs::statvfs(path).map_err(io::Error::from))?;
        Ok((stat.f_blocks.saturating_mul(stat.f_frsize), stat.f_bavail.saturating_mul(stat.f_frsize)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_onto_a_buffer_appends_what_there_is() {
        let dir = std::env::temp_dir().join(format!("clutch-files-{}", std::process::id()));
        OsDisk.create_dir_all(&dir).expect("makes the directory");
        let path = dir.join("file");
        let bytes: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
        let file = OsDisk.open(&path, true).expect("opens");
        file.write_at(&bytes, 0).expect("writes");
        let mut plain = vec![0; bytes.len()];
        for (length, offset) in [
            (0, 0),
            (1, 0),
            (4096, 4095),
            (100_000, 0),
            (100_001, 0),
            (1 << 20, 99_999),
            (10, 100_000),
            (10, 1 << 40),
        ] {
            let read = file.read_at(&mut plain[..length.min(100_000)], offset).expect("reads");
            // Also where the buffer has more room than is asked for.
            for capacity in [0, 3, 1 << 21] {
                let mut buffer = Vec::with_capacity(capacity);
                buffer.extend_from_slice(b"abc");
                let appended = file.read_onto(&mut buffer, length, offset).expect("reads");
                assert_eq!((appended, buffer.len()), (read, 3 + read), "{length} bytes at {offset}");
                assert_eq!((&buffer[..3], &buffer[3..]), (&b"abc"[..], &plain[..read]));
            }
        }
        // What cannot be read leaves the buffer as it was.
        let unreadable = OsFile { file: fs::File::open(&dir).expect("opens"), path: dir.clone() };
        let mut buffer = b"abc".to_vec();
        let error = unreadable.read_onto(&mut buffer, 10, 0).expect_err("a directory");
        assert!(error.to_string().contains("clutch-files-"), "{error}");
        assert_eq!(buffer, b"abc");
        fs::remove_dir_all(&dir).expect("removes");
    }
}
