//! The run file: how `status`, `drain` and the demo find a job that runs on this host.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::config::runtime_directory;
use crate::error::{Classify, Kind};
use crate::store::{LocalStore, Store, StoreError, read_small, write_small};
use crate::tls::TlsFiles;

/// A running job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunFile {
    /// The job's name.
    pub job: String,
    /// The coordinator's `host:port`.
    pub coordinator: String,
    /// The job's token.
    pub token_file: PathBuf,
    /// The launcher's process.
    pub process_id: u32,
    /// The certificates that it speaks TLS with, if it does.
    #[serde(default)]
    pub tls: Option<TlsFiles>,
}

/// A run file cannot be found or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunFileError {
    /// No job runs here.
    #[error("no running job found in {directory}: start one with `weightcast launch`, or name its coordinator")]
    NoJob {
        /// Where was looked.
        directory: String,
    },
    /// Several jobs run here.
    #[error("several jobs run here: {names}; name one with --job")]
    Several {
        /// Their names.
        names: String,
    },
    /// Storage failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Classify for RunFileError {
    fn kind(&self) -> Kind {
        match self {
            Self::NoJob { .. } => Kind::NotFound,
            Self::Several { .. } => Kind::Invalid,
            Self::Store(source) => source.kind(),
        }
    }
}

const NAME: &str = "run.json";

impl RunFile {
    /// A new directory for the files of one launch, readable by this user only.
    ///
    /// # Errors
    /// [`RunFileError::Store`].
    pub fn directory() -> Result<PathBuf, RunFileError> {
        let root = runtime_directory();
        let store = LocalStore::new(&root);
        store.create_dir("")?;
        let name = format!("run-{}-{:x}", std::process::id(), crate::clock::unix_ns());
        store.create_dir(&name)?;
        let path = root.join(name);
        for directory in [&root, &path] {
            // Other users must not read the token; a failure here shows as a refused token, not as a leak.
            let mode = rustix::fs::Mode::RWXU;
            if let Err(errno) = rustix::fs::chmod(directory, mode) {
                tracing::warn!(directory = %directory.display(), %errno, "cannot restrict the directory to this user");
            }
        }
        Ok(path)
    }

    /// Writes the file into the launch's directory.
    ///
    /// # Errors
    /// [`RunFileError::Store`].
    pub fn write(&self, directory: &Path) -> Result<(), RunFileError> {
        let json = serde_json::to_vec_pretty(self).unwrap_or_default();
        Ok(write_small(&LocalStore::new(directory), NAME, &json)?)
    }

    /// Removes a launch's directory.
    pub fn remove(directory: &Path) {
        if let (Some(root), Some(name)) = (directory.parent(), directory.file_name().and_then(|name| name.to_str()))
            && let Err(error) = LocalStore::new(root).remove(name)
        {
            tracing::warn!(%error, "cannot remove the directory of this launch");
        }
    }

    /// The job of this name that runs here, or the only one.
    ///
    /// # Errors
    /// [`RunFileError`].
    pub fn find(job: Option<&str>) -> Result<Self, RunFileError> {
        let root = runtime_directory();
        let store = LocalStore::new(&root);
        let mut found = Vec::new();
        for name in store.list("")? {
            let Ok(bytes) = read_small(&store, &format!("{name}/{NAME}"), 1 << 16) else { continue };
            let Ok(run) = serde_json::from_slice::<Self>(&bytes) else { continue };
            if is_alive(run.process_id) {
                if job.is_none_or(|job| job == run.job) {
                    found.push(run);
                }
            } else {
                // Its launcher was killed before it could tidy up.
                Self::remove(&root.join(name));
            }
        }
        match found.len() {
            0 => Err(RunFileError::NoJob { directory: root.display().to_string() }),
            1 => Ok(found.remove(0)),
            _ => {
                let names: Vec<String> = found.into_iter().map(|run| run.job).collect();
                Err(RunFileError::Several { names: names.join(", ") })
            }
        }
    }
}

/// Whether a process exists.
#[must_use]
pub(super) fn is_alive(process_id: u32) -> bool {
    i32::try_from(process_id)
        .ok()
        .and_then(rustix::process::Pid::from_raw)
        .is_some_and(|process| rustix::process::test_kill_process(process) != Err(rustix::io::Errno::SRCH))
}
