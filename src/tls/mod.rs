//! Certificates: the files of mutual TLS, and what control plane and data plane make of them.
//!
//! Owns: reading certificate, private key and CA, reading them again when they are rotated, rustls configurations, and
//! TLS errors in words. Refuses to know: sockets, what is said over a connection.
//!
//! - `TL-1`: both sides of every connection show a certificate of the CA; only TLS 1.3 is spoken.
//! - `TL-2`: no connection waits for the files once they were read. What was read is used for [`REFRESH`], then read again
//!   aside; files that cannot be used leave what was read before in place. Connections that exist go on.
//! - `TL-3`: ranks are on addresses that no certificate can foresee, so on the data plane the CA vouches for a peer and the
//!   generation's secret, bound to the TLS session, for its rank; names are checked where the coordinator is called.

mod config;
mod words;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustls::{ClientConfig, ServerConfig};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::clock::Instant;
use crate::error::{Classify, Kind};
use crate::store::{LocalStore, Store, StoreError, read_small};

pub use words::{explain, explain_io};

/// A chain of certificates, a key, or some authorities.
const MAX_PEM_BYTES: u64 = 256 << 10;

/// How long what was read is used before the files are looked at again.
const REFRESH: Duration = Duration::from_secs(5);

/// The files of mutual TLS, all PEM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TlsFiles {
    /// Our certificate, followed by intermediate ones.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// The authorities that sign certificates of this job.
    pub ca: PathBuf,
    /// The name in the coordinator's certificate, if it is not the host that it is called by.
    pub server_name: Option<String>,
}

/// The files cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// Storage's error.
    #[error("TLS: {0}")]
    Store(#[from] StoreError),
    /// Users other than the owner and the group can read the key.
    #[error(
        "TLS private key {path}: expected a mode that lets only its owner and group read it, such as 400 or 440, found \
         {found:o}"
    )]
    Exposed {
        /// The file.
        path: String,
        /// Its mode.
        found: u32,
    },
    /// A file has nothing of what it should have.
    #[error("TLS: {path}: expected {expected} in PEM, found {found}")]
    Pem {
        /// The file.
        path: String,
        /// What it should have.
        expected: &'static str,
        /// What is wrong.
        found: String,
    },
    /// What the files have does not fit together.
    #[error("TLS: {path}: {reason}")]
    Unusable {
        /// The file.
        path: String,
        /// What is wrong.
        reason: String,
    },
}

impl Classify for TlsError {
    fn kind(&self) -> Kind {
        match self {
            Self::Store(source) => source.kind(),
            Self::Exposed { .. } | Self::Pem { .. } | Self::Unusable { .. } => Kind::Conflict,
        }
    }
}

/// Configurations of one reading of the files.
#[derive(Debug)]
pub struct TlsConfigs {
    /// Of the coordinator.
    pub call_server: Arc<ServerConfig>,
    /// Of those who call it.
    pub call_client: Arc<ClientConfig>,
    /// Of a rank that accepts a peer.
    pub data_server: Arc<ServerConfig>,
    /// Of a rank that dials a peer.
    pub data_client: Arc<ClientConfig>,
}

/// The files, and what was in them.
#[derive(Clone)]
pub struct Tls {
    files: Arc<TlsFiles>,
    known: Arc<Mutex<Known>>,
}

struct Known {
    configs: Arc<TlsConfigs>,
    digest: [u8; 32],
    read: Instant,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Tls").field(&self.files).finish()
    }
}

impl Tls {
    /// Reads the files for the first time.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn open(files: TlsFiles) -> Result<Self, TlsError> {
        let pems = Pems::read(&files)?;
        let known = Known {
            configs: Arc::new(config::build(&files, &pems)?),
            digest: pems.digest(),
            read: crate::clock::now(),
        };
        Ok(Self { files: Arc::new(files), known: Arc::new(Mutex::new(known)) })
    }

    /// The files.
    #[must_use]
    pub fn files(&self) -> &TlsFiles {
        &self.files
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was read last (`TL-2`).
    #[must_use]
    pub fn configs(&self) -> Arc<TlsConfigs> {
        let (configs, is_old) = {
            let mut known = self.known();
            let is_old = known.read.elapsed() >= REFRESH;
            if is_old {
                // Whoever comes next finds it read already.
                known.read = crate::clock::now();
            }
            (Arc::clone(&known.configs), is_old)
        };
        if is_old {
            let tls = self.clone();
            let again = move || {
                if let Err(error) = tls.refresh() {
                    tracing::warn!(%error, "the certificates cannot be read again; those from before stay in use");
                }
            };
            if let Err(error) = crate::tasks::spawn_thread("certificates", again) {
                tracing::warn!(%error, "no thread to read the certificates again");
            }
        }
        configs
    }

    /// Reads the files now.
    ///
    /// # Errors
    /// [`TlsError`]; what was read before stays in use.
    pub fn refresh(&self) -> Result<(), TlsError> {
        let pems = Pems::read(&self.files)?;
        let digest = pems.digest();
        if self.known().digest == digest {
            return Ok(());
        }
        let configs = Arc::new(config::build(&self.files, &pems)?);
        *self.known() = Known { configs, digest, read: crate::clock::now() };
        tracing::info!(cert = %self.files.cert.display(), "the certificates were rotated");
        Ok(())
    }
}

/// The contents of the files.
pub(crate) struct Pems {
    cert: Vec<u8>,
    key: Vec<u8>,
    ca: Vec<u8>,
}

impl Pems {
    fn read(files: &TlsFiles) -> Result<Self, TlsError> {
        expect_private(&files.key)?;
        Ok(Self { cert: read(&files.cert)?, key: read(&files.key)?, ca: read(&files.ca)? })
    }

    fn digest(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        for part in [&self.cert, &self.key, &self.ca] {
            hash.update(crate::types::as_u64(part.len()).to_le_bytes());
            hash.update(part);
        }
        hash.finalize().into()
    }
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    if name.is_empty() {
        let (path, found) = (path.display().to_string(), "no file name".to_owned());
        return Err(TlsError::Pem { path, expected: "a file", found });
    }
    Ok(read_small(&LocalStore::new(directory) as &dyn Store, name, MAX_PEM_BYTES)?)
}

/// The group may read, because that is how Kubernetes gives a secret to a process that is not root (`fsGroup`).
fn expect_private(path: &Path) -> Result<(), TlsError> {
    use rustix::fs::Mode;
    // A file that is not there is an error of reading it.
    let Ok(stat) = rustix::fs::stat(path) else { return Ok(()) };
    let mode = Mode::from_raw_mode(stat.st_mode);
    if mode.intersects(Mode::RWXO | Mode::WGRP) {
        return Err(TlsError::Exposed { path: path.display().to_string(), found: mode.as_raw_mode() });
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests;
