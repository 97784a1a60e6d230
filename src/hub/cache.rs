//! The cache's layout, shared with Python's `huggingface_hub`: `models--org--name/{blobs,refs,snapshots}`, and locks
//! beside it.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use super::HubError;
use crate::clock;

/// How often a lock that another process holds is tried. The system has no wait for a lock with a deadline.
const LOCK_RETRY: Duration = Duration::from_millis(100);

/// The directory of one repository in the cache.
#[derive(Clone, Debug)]
pub(super) struct Repository {
    root: PathBuf,
    locks: PathBuf,
}

/// An exclusive lock between processes and threads; released when it is dropped, or its process ends.
#[derive(Debug)]
pub(super) struct Lock {
    _file: File,
}

impl Repository {
    /// The repository `id`, whose name was checked by [`super::Reference::parse`] or must be confined here.
    pub(super) fn new(cache: &Path, id: &str) -> Self {
        let name = format!("models--{}", id.replace('/', "--"));
        Self { root: cache.join(&name), locks: cache.join(".locks").join(name) }
    }

    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(etag)
    }

    /// What there is of a blob whose download is not complete.
    pub(super) fn incomplete(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(format!("{etag}.incomplete"))
    }

    /// The commit that a branch or tag had when it was last looked up; a commit stands for itself.
    pub(super) fn commit(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_owned());
        }
        let text = fs::read_to_string(self.root.join("refs").join(revision)).ok()?;
        Some(text.trim().to_owned()).filter(|commit| is_commit(commit))
    }

    /// Notes the commit of a branch or tag, for use offline.
    pub(super) fn note_commit(&self, revision: &str, commit: &str) -> Result<(), HubError> {
        if is_commit(revision) {
            return Ok(());
        }
        let path = self.root.join("refs").join(revision);
        replace(&path, |temporary| fs::write(temporary, commit))
    }

    /// Makes `snapshots/<commit>/<name>` a relative link to the blob, in place of whatever stands there.
    pub(super) fn link(&self, commit: &str, name: &str, etag: &str) -> Result<(), HubError> {
        let target = format!("{}blobs/{etag}", "../".repeat(name.split('/').count() + 1));
        replace(&self.snapshot(commit).join(name), |temporary| std::os::unix::fs::symlink(&target, temporary))
    }

    /// Takes the lock of a blob (`HU-2`), waiting as long as its holder makes progress: `grown` gives a number that
    /// differs from the one before when it has. The lock's file is the one that `huggingface_hub` takes.
    pub(super) fn lock(
        &self,
        etag: &str,
        patience: Duration,
        grown: &mut dyn FnMut() -> u64,
    ) -> Result<Lock, HubError> {
        let path = self.locks.join(format!("{etag}.lock"));
        fs::create_dir_all(&self.locks).map_err(HubError::io("create", &self.locks))?;
        let file = File::options().create(true).append(true).open(&path).map_err(HubError::io("open", &path))?;
        let (mut last, mut since) = (grown(), clock::now());
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Lock { _file: file }),
                Err(TryLockError::WouldBlock) => thread::park_timeout(LOCK_RETRY),
                Err(TryLockError::Error(source)) => return Err(HubError::Io { action: "lock", path, source }),
            }
            let now = clock::now();
            let current = grown();
            if current != last {
                (last, since) = (current, now);
            } else if now.duration_since(since) > patience {
                return Err(HubError::Locked { lock: path, waited: patience });
            }
        }
    }
}

/// A git commit in full: 40 lower-case hexadecimal digits.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Makes a file at `path` in one step, through a name beside it that no other thread or process uses.
fn replace(path: &Path, create: impl FnOnce(&Path) -> std::io::Result<()>) -> Result<(), HubError> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let directory = path.parent().unwrap_or_else(|| Path::new("."));
    fs::create_dir_all(directory).map_err(HubError::io("create", directory))?;
    let number = COUNTER.fetch_add(1, Ordering::Relaxed);
    let temporary = directory.join(format!(".{}-{number}.tmp", std::process::id()));
    create(&temporary).map_err(HubError::io("create", &temporary))?;
    fs::rename(&temporary, path).map_err(HubError::io("create", path))
}
