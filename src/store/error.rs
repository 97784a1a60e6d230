//! What can go wrong with a store, in words that name the file.

use std::fmt;
use std::io;

use crate::error::{Classify, Kind};

/// What was being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Operation {
    Open,
    Read,
    Create,
    Reserve,
    Write,
    Sync,
    List,
    Publish,
    Remove,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Open => "open",
            Self::Read => "read",
            Self::Create => "create",
            Self::Reserve => "reserve room for",
            Self::Write => "write",
            Self::Sync => "sync",
            Self::List => "list",
            Self::Publish => "publish",
            Self::Remove => "remove",
        })
    }
}

/// An operation on a file failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The operating system refused.
    #[error("cannot {operation} {path}: {source}")]
    Io {
        /// What was being done.
        operation: Operation,
        /// The file.
        path: String,
        /// The system's error.
        source: io::Error,
    },
    /// There is no room, or a quota is used up.
    #[error("no space left for {path}{}", needed(*needed_bytes))]
    NoSpace {
        /// The file.
        path: String,
        /// The bytes that were asked for; 0 when that is not known, as when there is no room for one more file.
        needed_bytes: u64,
    },
    /// The name exists already.
    #[error("{path} exists already and is never overwritten")]
    Exists {
        /// The file or directory.
        path: String,
    },
    /// The file is shorter than it must be.
    #[error("{path} is truncated: expected bytes up to {expected_bytes}, found {found_bytes}")]
    Truncated {
        /// The file.
        path: String,
        /// The end of the range asked for.
        expected_bytes: u64,
        /// The file's length.
        found_bytes: u64,
    },
    /// The file is longer than a file of its kind may be.
    #[error("{path} has {found_bytes} bytes, more than the limit of {limit_bytes}")]
    TooLarge {
        /// The file.
        path: String,
        /// The limit.
        limit_bytes: u64,
        /// The file's length.
        found_bytes: u64,
    },
    /// The object is not the version that it was.
    #[error("{path} has changed since it was opened: expected {expected}, found {found}")]
    Changed {
        /// The object.
        path: String,
        /// The version that was opened.
        expected: String,
        /// The version that is there.
        found: String,
    },
    /// An address is not of the form, or not of a kind that this program reaches.
    #[error("address {found}: expected {expected}")]
    Address {
        /// The address, without secrets.
        found: String,
        /// What it must be.
        expected: &'static str,
    },
    /// A name would lead outside the store.
    #[error("name {name:?} leads outside {root}")]
    Outside {
        /// The store's root.
        root: String,
        /// The name.
        name: String,
    },
}

fn needed(bytes: u64) -> String {
    if bytes == 0 { String::new() } else { format!(": {bytes} bytes needed") }
}

impl StoreError {
    pub(super) fn io(operation: Operation, path: &std::path::Path, source: io::Error) -> Self {
        let path = path.display().to_string();
        match source.kind() {
            io::ErrorKind::AlreadyExists => Self::Exists { path },
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                Self::NoSpace { path, needed_bytes: 0 }
            }
            _ => Self::Io { operation, path, source },
        }
    }
}

impl Classify for StoreError {
    fn kind(&self) -> Kind {
        match self {
            Self::Io { source, .. } => match source.kind() {
                io::ErrorKind::NotFound => Kind::NotFound,
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::NotADirectory => {
                    Kind::Conflict
                }
                _ => Kind::Unavailable,
            },
            Self::NoSpace { .. } => Kind::Exhausted,
            Self::Exists { .. } => Kind::Conflict,
            Self::Truncated { .. } | Self::TooLarge { .. } | Self::Changed { .. } => Kind::Corrupt,
            Self::Outside { .. } | Self::Address { .. } => Kind::Invalid,
        }
    }
}
