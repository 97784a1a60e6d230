//! Advisory locks on directories (`flock`), by which processes agree who uses one and who may remove it.
#![expect(clippy::disallowed_methods, reason = "this is the module that touches files")]

use std::fs::File;
use std::os::unix::fs::MetadataExt as _;

use rustix::fs::{FlockOperation, Timespec, Timestamps, UTIME_NOW, flock, futimens};

use super::{LocalStore, Operation, StoreError};

/// Who may have the lock beside its holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockKind {
    /// Others who share it.
    Shared,
    /// Nobody.
    Exclusive,
}

/// A lock on a directory, until it is dropped or its process ends.
#[derive(Debug)]
pub struct DirectoryLock {
    directory: File,
    path: std::path::PathBuf,
}

impl LocalStore {
    /// Locks the directory `name`; nothing when it does not exist. Who would share it waits for who has it alone, who must
    /// therefore be quick; who wants it alone does not wait and gets nothing while others have it.
    ///
    /// # Errors
    /// [`StoreError`] when the directory cannot be opened or its file system has no locks.
    pub fn lock(&self, name: &str, kind: LockKind) -> Result<Option<DirectoryLock>, StoreError> {
        let path = self.path(name)?;
        let failed = |source| StoreError::io(Operation::Open, &path, source);
        let directory = match File::open(&path) {
            Ok(directory) => directory,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let operation = match kind {
            LockKind::Shared => FlockOperation::LockShared,
            LockKind::Exclusive => FlockOperation::NonBlockingLockExclusive,
        };
        match flock(&directory, operation) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            Err(errno) => return Err(failed(errno.into())),
        }
        // Whoever removed the directory meanwhile had its lock before.
        let locked = directory.metadata().map_err(failed)?;
        let is_there =
            std::fs::metadata(&path).is_ok_and(|found| (found.ino(), found.dev()) == (locked.ino(), locked.dev()));
        Ok(is_there.then_some(DirectoryLock { directory, path }))
    }
}

impl DirectoryLock {
    /// Makes now the time of the directory's last change.
    ///
    /// # Errors
    /// [`StoreError`] when the directory is not writable.
    pub fn touch(&self) -> Result<(), StoreError> {
        let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
        let times = Timestamps { last_access: now, last_modification: now };
        futimens(&self.directory, &times).map_err(|errno| StoreError::io(Operation::Write, &self.path, errno.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Store as _;

    #[test]
    fn who_shares_a_lock_keeps_out_who_does_not() {
        let root = tempfile::tempdir().expect("a directory");
        let store = LocalStore::new(root.path());
        store.create_dir("a").expect("it is writable");
        let lock = |kind| store.lock("a", kind).expect("flock");
        let first = lock(LockKind::Shared).expect("free");
        assert!(lock(LockKind::Exclusive).is_none());
        let second = lock(LockKind::Shared).expect("shared");
        drop((first, second));
        let alone = lock(LockKind::Exclusive).expect("free again");
        assert!(lock(LockKind::Exclusive).is_none());
        drop(alone);
        assert!(lock(LockKind::Shared).is_some());
        assert!(store.lock("b", LockKind::Shared).expect("flock").is_none(), "nothing to lock");
    }

    #[test]
    fn a_touched_directory_is_younger() {
        let root = tempfile::tempdir().expect("a directory");
        let store = LocalStore::new(root.path());
        store.create_dir("a").expect("it is writable");
        store.create_dir("b").expect("it is writable");
        let modified = |name| store.modified_ns(name).expect("it is there");
        store.lock("a", LockKind::Shared).expect("flock").expect("free").touch().expect("it is ours");
        assert!(modified("a") >= modified("b"));
    }
}
