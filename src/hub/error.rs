//! Why a model's files cannot be had.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Classify, Kind};
use crate::format::FormatError;

/// A model's files cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// The text names neither a path nor a repository.
    #[error("model {found:?}: expected a path that exists or organization/name[@revision]")]
    Reference {
        /// The text.
        found: String,
    },
    /// A path does not exist.
    #[error("{} does not exist", path.display())]
    NoSuchPath {
        /// The path.
        path: PathBuf,
    },
    /// Nothing says where the cache is.
    #[error("no cache directory: expected one of HF_HUB_CACHE, HF_HOME, XDG_CACHE_HOME or HOME to be set")]
    NoCache,
    /// A variable has a value that cannot be used.
    #[error("{variable}: expected {expected}, found {found:?}")]
    Variable {
        /// The variable.
        variable: &'static str,
        /// What it must be.
        expected: &'static str,
        /// What it is.
        found: String,
    },
    /// There are no weights.
    #[error(
        "{place} has no weights: expected model.safetensors, model.safetensors.index.json, one *.gguf or other *.safetensors"
    )]
    NoWeights {
        /// The directory or repository.
        place: String,
    },
    /// There are several models.
    #[error("{place} has several *.gguf files, of which one must be chosen: {found}")]
    Ambiguous {
        /// The directory or repository.
        place: String,
        /// Their names.
        found: String,
    },
    /// A file is none of weights.
    #[error("{}: expected a .safetensors or .gguf file", path.display())]
    NotWeights {
        /// The file.
        path: PathBuf,
    },
    /// An index or a listing names a file outside its directory.
    #[error("{place} names {found:?}, which leads outside its directory")]
    Outside {
        /// The index file or the address.
        place: String,
        /// The name.
        found: String,
    },
    /// An index names a file that is not there.
    #[error("{index} names {file}, which {place} does not have")]
    MissingFile {
        /// The index file.
        index: String,
        /// The missing file.
        file: String,
        /// The directory or repository.
        place: String,
    },
    /// An index cannot be read.
    #[error("{place}: {source}")]
    Index {
        /// The directory or repository.
        place: String,
        /// Why.
        source: Box<FormatError>,
    },
    /// Offline, and the cache does not have it.
    #[error(
        "{id}@{revision} is not in the cache at {} ({what} is missing), and HF_HUB_OFFLINE is set, so it is not downloaded",
        cache.display()
    )]
    Offline {
        /// The repository.
        id: String,
        /// The revision.
        revision: String,
        /// The cache directory.
        cache: PathBuf,
        /// What is missing.
        what: String,
    },
    /// The hub asks for a token, or refuses the one given.
    #[error("{url}: status 401: the repository does not exist or needs a token, and {token}")]
    Unauthorized {
        /// The address.
        url: String,
        /// What is known of the token.
        token: &'static str,
    },
    /// The token's owner has no access.
    #[error("{url}: status 403: access is restricted (a gated model must be requested on its page), and {token}")]
    Forbidden {
        /// The address.
        url: String,
        /// What is known of the token.
        token: &'static str,
    },
    /// There is no such repository, revision or file.
    #[error("{url}: status 404: there is no such repository, revision or file")]
    NotFound {
        /// The address.
        url: String,
    },
    /// Any other status.
    #[error("{url}: status {status}, expected 200")]
    Status {
        /// The address.
        url: String,
        /// The status.
        status: u16,
    },
    /// The server cannot be reached, or the connection broke.
    #[error("{url} cannot be reached: {source}")]
    Unreachable {
        /// The address.
        url: String,
        /// Why.
        source: Box<ureq::Error>,
    },
    /// The server took too long.
    #[error("{url}: no answer within {} s while {phase}", limit.as_secs_f32())]
    Timeout {
        /// The address.
        url: String,
        /// What was being waited for.
        phase: &'static str,
        /// How long.
        limit: Duration,
    },
    /// An answer lacks what it must have.
    #[error("{url}: {what}")]
    Answer {
        /// The address.
        url: String,
        /// What is wrong with it.
        what: String,
    },
    /// A download broke off and did not go on.
    #[error(
        "{url}: the download broke off at byte {found_bytes} of {expected_bytes}, {attempts} times without a byte more"
    )]
    BrokenOff {
        /// The address.
        url: String,
        /// The file's size.
        expected_bytes: u64,
        /// The bytes that are here, kept for the next attempt.
        found_bytes: u64,
        /// Attempts without progress.
        attempts: u32,
    },
    /// A file does not have the size that the server states.
    #[error("{file}: expected {expected_bytes} bytes, found {found_bytes}")]
    Size {
        /// The file or address.
        file: String,
        /// By the server.
        expected_bytes: u64,
        /// Found.
        found_bytes: u64,
    },
    /// A file does not have the digest that the server states.
    #[error("{file}: expected SHA-256 {expected}, found {found}")]
    Digest {
        /// The file.
        file: String,
        /// By the server.
        expected: String,
        /// Found.
        found: String,
    },
    /// Another process holds a file's lock and makes no progress.
    #[error("{} is locked by another process, whose download has not grown for {} s", lock.display(), waited.as_secs())]
    Locked {
        /// The lock file.
        lock: PathBuf,
        /// How long was waited.
        waited: Duration,
    },
    /// A file cannot be used.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl HubError {
    /// An [`HubError::Io`] for `map_err`.
    pub(super) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }
}

impl Classify for HubError {
    fn kind(&self) -> Kind {
        match self {
            Self::NoSuchPath { .. }
            | Self::NoWeights { .. }
            | Self::MissingFile { .. }
            | Self::Offline { .. }
            | Self::NotFound { .. } => Kind::NotFound,
            Self::Reference { .. }
            | Self::NoCache
            | Self::Variable { .. }
            | Self::Ambiguous { .. }
            | Self::NotWeights { .. }
            | Self::Outside { .. }
            | Self::Unauthorized { .. }
            | Self::Forbidden { .. } => Kind::Invalid,
            Self::Index { source, .. } => source.kind(),
            Self::Status { status, .. } if *status >= 500 || matches!(status, 408 | 429) => Kind::Unavailable,
            Self::Status { .. } => Kind::Invalid,
            Self::Unreachable { source, .. } if is_tls(source) => Kind::Invalid,
            Self::Unreachable { .. } | Self::BrokenOff { .. } => Kind::Unavailable,
            Self::Timeout { .. } | Self::Locked { .. } => Kind::Deadline,
            Self::Answer { .. } | Self::Size { .. } | Self::Digest { .. } => Kind::Corrupt,
            Self::Io { source, .. } => match source.kind() {
                io::ErrorKind::NotFound => Kind::NotFound,
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Kind::Exhausted,
                _ => Kind::Invalid,
            },
        }
    }
}

/// Whether both sides met and could not agree on TLS, such as on a certificate; trying again changes nothing.
fn is_tls(error: &ureq::Error) -> bool {
    match error {
        ureq::Error::Rustls(_) | ureq::Error::Tls(_) | ureq::Error::Pem(_) => true,
        ureq::Error::Io(error) => error.get_ref().is_some_and(|inner| inner.is::<rustls::Error>()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A certificate that is not trusted is not retried; a connection that was reset is.
    #[test]
    fn only_what_may_pass_is_retried() {
        let kind = |source: ureq::Error| HubError::Unreachable { url: String::new(), source: Box::new(source) }.kind();
        let certificate = rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer);
        assert_eq!(kind(io::Error::new(io::ErrorKind::InvalidData, certificate).into()), Kind::Invalid);
        assert_eq!(kind(io::Error::from(io::ErrorKind::ConnectionReset).into()), Kind::Unavailable);
        let full = io::Error::from(io::ErrorKind::StorageFull);
        assert_eq!(HubError::io("write", Path::new("f"))(full).kind(), Kind::Exhausted);
    }
}
