//! Why a rank ends with failure, and the exit code that this means.

use crate::comm::CommError;
use crate::device::DeviceError;
use crate::error::{Classify, Kind};
use crate::rpc::{ConnectError, TokenError};

/// Why a worker ends with failure.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorkerError {
    /// The coordinator cannot be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The token cannot be read.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The coordinator refused a call.
    #[error("the coordinator refused to let rank {rank} {action}: {message}")]
    Refused {
        /// The rank.
        rank: u32,
        /// What was asked.
        action: &'static str,
        /// Its reason.
        message: String,
        /// Its kind.
        kind: Kind,
    },
    /// The job has lost ranks, and goes on with those that join again.
    #[error("rank {rank} is to join again: {message}")]
    Stale {
        /// The rank.
        rank: u32,
        /// The coordinator's words.
        message: String,
    },
    /// The coordinator cancelled the job.
    #[error("the job was ended: {message}")]
    Aborted {
        /// The cause.
        message: String,
        /// The exit code of the job.
        exit_code: u8,
    },
    /// This rank failed.
    #[error("{message}")]
    Failed {
        /// What went wrong.
        message: String,
        /// The exit code.
        exit_code: u8,
    },
    /// The coordinator stayed away for longer than it may.
    #[error("the coordinator at {address} has been out of reach for {seconds} s: {reason}")]
    CoordinatorLost {
        /// Its address.
        address: String,
        /// How long.
        seconds: u64,
        /// The last error.
        reason: String,
    },
    /// Something of this host is missing.
    #[error("{what}: {source}")]
    System {
        /// What.
        what: &'static str,
        /// The system's error.
        source: std::io::Error,
    },
    /// The data plane cannot listen.
    #[error(transparent)]
    Comm(#[from] CommError),
    /// There is no device for this rank.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

impl WorkerError {
    /// Whether the coordinator was only away.
    pub(super) const fn is_transient(&self) -> bool {
        match self {
            // Certificates are rotated on both sides, and not at the same moment.
            Self::Connect(ConnectError::Unreachable { .. } | ConnectError::Tls { .. }) => true,
            Self::Refused { kind, .. } => kind.is_retryable(),
            _ => false,
        }
    }

    /// The exit code of the process.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Aborted { exit_code, .. } | Self::Failed { exit_code, .. } => *exit_code,
            Self::Connect(source) => source.kind().exit_code(),
            Self::Token(source) => source.kind().exit_code(),
            // A rank that is refused will be refused again: wrong token, wrong world, wrong version.
            Self::Refused { kind, .. } if !kind.is_retryable() => Kind::Conflict.exit_code(),
            Self::Refused { kind, .. } => kind.exit_code(),
            Self::CoordinatorLost { .. } => Kind::Unavailable.exit_code(),
            Self::Stale { .. } => Kind::Fenced.exit_code(),
            Self::System { .. } => Kind::Internal.exit_code(),
            Self::Comm(source) => source.kind().exit_code(),
            Self::Device(source) => source.kind().exit_code(),
        }
    }
}
