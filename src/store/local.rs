//! The local file system as a store.
#![expect(clippy::disallowed_methods, reason = "this is the module that touches files")]

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FallocateFlags, RenameFlags};

use super::{NewFile, Operation, ReadAt, ReadCounter, Store, StoreError, confined};
use crate::types::as_u64;

/// Files below one directory.
#[derive(Clone, Debug)]
pub struct LocalStore {
    root: PathBuf,
    read: ReadCounter,
}

impl LocalStore {
    /// The store of all files below `root`; nothing is touched yet.
    #[must_use]
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), read: ReadCounter::default() }
    }

    /// The directory of the store.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The bytes read through this store and its clones.
    #[must_use]
    pub fn read_counter(&self) -> ReadCounter {
        self.read.clone()
    }

    /// When a file was changed last, in nanoseconds since 1970.
    ///
    /// # Errors
    /// [`StoreError`] when it does not exist.
    pub fn modified_ns(&self, name: &str) -> Result<i128, StoreError> {
        let path = self.path(name)?;
        let metadata = fs::metadata(&path).map_err(|source| StoreError::io(Operation::Open, &path, source))?;
        Ok(i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec()))
    }

    /// Bytes that other files may take on the medium below the root.
    ///
    /// # Errors
    /// [`StoreError`] when the root does not exist.
    pub fn free_bytes(&self) -> Result<u64, StoreError> {
        let space = rustix::fs::statvfs(&self.root)
            .map_err(|errno| StoreError::io(Operation::Open, &self.root, errno.into()))?;
        Ok(space.f_bavail.saturating_mul(space.f_frsize))
    }

    pub(super) fn path(&self, name: &str) -> Result<PathBuf, StoreError> {
        if name.is_empty() { Ok(self.root.clone()) } else { confined(&self.root, name) }
    }
}

impl Store for LocalStore {
    fn open(&self, name: &str) -> Result<Box<dyn ReadAt>, StoreError> {
        let path = self.path(name)?;
        let failed = |source| StoreError::io(Operation::Open, &path, source);
        let file = File::open(&path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "it is not a file")));
        }
        Ok(Box::new(LocalFile { file, path, len_bytes: metadata.len(), read: self.read.clone() }))
    }

    fn create(&self, name: &str, len_bytes: u64) -> Result<Box<dyn NewFile>, StoreError> {
        crate::faults::point("store.create");
        let path = self.path(name)?;
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&path)
            .map_err(|source| StoreError::io(Operation::Create, &path, source))?;
        reserve(&file, &path, len_bytes)?;
        Ok(Box::new(LocalNewFile { file, path, pending_start: 0, pending_end: 0 }))
    }

    fn create_dir(&self, name: &str) -> Result<(), StoreError> {
        crate::faults::point("store.create-dir");
        let path = self.path(name)?;
        fs::create_dir_all(&path).map_err(|source| StoreError::Io {
            operation: Operation::Create,
            path: path.display().to_string(),
            source,
        })
    }

    fn list(&self, directory: &str) -> Result<Vec<String>, StoreError> {
        let path = self.path(directory)?;
        let failed = |source| StoreError::io(Operation::List, &path, source);
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed(error)),
        };
        let mut names = Vec::new();
        for entry in entries {
            // A name that is not UTF-8 is none of ours.
            if let Ok(name) = entry.map_err(failed)?.file_name().into_string() {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    fn publish(&self, from: &str, to: &str) -> Result<(), StoreError> {
        crate::faults::point("store.publish");
        let (from, to) = (self.path(from)?, self.path(to)?);
        rename_noreplace(&from, &to).map_err(|source| StoreError::io(Operation::Publish, &to, source))?;
        crate::faults::point("store.published");
        for changed in [to.parent(), from.parent()].into_iter().flatten() {
            sync_directory(changed)?;
        }
        Ok(())
    }

    fn sync_dir(&self, name: &str) -> Result<(), StoreError> {
        crate::faults::point("store.sync-dir");
        sync_directory(&self.path(name)?)
    }

    fn remove(&self, name: &str) -> Result<(), StoreError> {
        crate::faults::point("store.remove");
        let path = self.path(name)?;
        let result = match fs::symlink_metadata(&path) {
            Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(&path),
            Ok(_) => fs::remove_file(&path),
            Err(error) => Err(error),
        };
        match result {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(StoreError::io(Operation::Remove, &path, error))
            }
            _ => Ok(()),
        }
    }

    fn describe(&self, name: &str) -> String {
        self.root.join(name).display().to_string()
    }
}

/// Reserves room for the whole file; a file system without fallocate gets its length only.
fn reserve(file: &File, path: &Path, len_bytes: u64) -> Result<(), StoreError> {
    if len_bytes == 0 {
        return Ok(());
    }
    match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, len_bytes) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {
            file.set_len(len_bytes).map_err(|source| StoreError::io(Operation::Reserve, path, source))
        }
        Err(rustix::io::Errno::NOSPC | rustix::io::Errno::DQUOT | rustix::io::Errno::FBIG) => {
            Err(StoreError::NoSpace { path: path.display().to_string(), needed_bytes: len_bytes })
        }
        Err(errno) => Err(StoreError::io(Operation::Reserve, path, errno.into())),
    }
}

/// `renameat2(RENAME_NOREPLACE)`. Where the file system lacks it, a check and a plain rename: there the coordinator,
/// the only writer of names, is what keeps two publishers apart.
fn rename_noreplace(from: &Path, to: &Path) -> io::Result<()> {
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {
            if to.symlink_metadata().is_ok() {
                return Err(io::Error::from(io::ErrorKind::AlreadyExists));
            }
            fs::rename(from, to)
        }
        result => result.map_err(io::Error::from),
    }
}

fn sync_directory(path: &Path) -> Result<(), StoreError> {
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .map_err(|source| StoreError::io(Operation::Sync, path, source))
}

#[derive(Debug)]
struct LocalFile {
    file: File,
    path: PathBuf,
    len_bytes: u64,
    read: ReadCounter,
}

impl ReadAt for LocalFile {
    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn read_exact_at(&self, offset: u64, into: &mut [u8]) -> Result<(), StoreError> {
        let wanted = as_u64(into.len());
        self.file.read_exact_at(into, offset).map_err(|source| {
            if source.kind() == io::ErrorKind::UnexpectedEof {
                StoreError::Truncated {
                    path: self.path.display().to_string(),
                    expected_bytes: offset.saturating_add(wanted),
                    found_bytes: self.file.metadata().map_or(0, |metadata| metadata.len()),
                }
            } else {
                StoreError::io(Operation::Read, &self.path, source)
            }
        })?;
        self.read.add(wanted);
        Ok(())
    }
}

/// After this many bytes the kernel is asked to start writing: a checkpoint then goes to the disk while it is digested,
/// instead of all at once in the final sync.
const WRITEBACK_BYTES: u64 = 16 << 20;

#[derive(Debug)]
struct LocalNewFile {
    file: File,
    path: PathBuf,
    /// Bytes from `pending_start` to `pending_end` were written and the kernel was not told yet.
    pending_start: u64,
    pending_end: u64,
}

impl LocalNewFile {
    /// Starts the writing of what was written in order. It is a hint: where it fails, the sync does all.
    fn start_writeback(&mut self, offset: u64, len: u64) {
        if offset != self.pending_end {
            (self.pending_start, self.pending_end) = (offset, offset);
        }
        self.pending_end += len;
        let pending = std::num::NonZeroU64::new(self.pending_end - self.pending_start);
        if let Some(pending) = pending.filter(|pending| pending.get() >= WRITEBACK_BYTES) {
            // On Linux this advice writes dirty pages of the range without waiting for them.
            let _ = rustix::fs::fadvise(&self.file, self.pending_start, Some(pending), rustix::fs::Advice::DontNeed);
            self.pending_start = self.pending_end;
        }
    }
}

impl NewFile for LocalNewFile {
    fn write_all_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), StoreError> {
        crate::faults::point("store.write");
        self.file.write_all_at(bytes, offset).map_err(|source| StoreError::io(Operation::Write, &self.path, source))?;
        self.start_writeback(offset, as_u64(bytes.len()));
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<(), StoreError> {
        crate::faults::point("store.finish");
        self.file.sync_all().map_err(|source| StoreError::io(Operation::Sync, &self.path, source))
    }
}
