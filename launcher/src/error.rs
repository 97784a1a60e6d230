//! Why a launch could not begin, or could not be supervised.
//!
//! Owns: [`LaunchError`] and its exit codes. The failure of a rank is not an error of the launcher: it stands in the report.

use std::path::PathBuf;

use crate::end::{EXIT_CONFIGURATION, EXIT_UNREACHABLE, EXIT_USAGE};

/// Why a launch could not begin or go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LaunchError {
    /// A flag, or its environment twin, has no such value.
    #[error("{origin}: expected {expected}, found {found:?}")]
    BadValue {
        /// The flag or the variable.
        origin: String,
        /// What it accepts.
        expected: &'static str,
        /// What it had.
        found: String,
    },
    /// The command line lacks something, or says two things that exclude each other.
    #[error("{message}")]
    Usage {
        /// What is wrong, and what to do.
        message: String,
    },
    /// The environment does not say what the launch needs to know.
    #[error("{source_words}: {missing} is not known; give {flag}")]
    Unknown {
        /// Which description of the job was read.
        source_words: String,
        /// What it lacks.
        missing: &'static str,
        /// The flag that says it.
        flag: &'static str,
    },
    /// A file or directory of the launcher's own cannot be written or read.
    #[error("cannot {action} {path}")]
    File {
        /// What was tried, such as `create`.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// A process, a thread, a pipe or a socket could not be made.
    #[error("cannot {action}")]
    System {
        /// What was tried.
        action: &'static str,
        /// The system's error.
        source: std::io::Error,
    },
    /// The nodes of the job did not come together in time, or lost the rendezvous.
    #[error("rendezvous at {endpoint}: {message}")]
    Rendezvous {
        /// Host and port.
        endpoint: String,
        /// What happened, and what was being waited for.
        message: String,
    },
    /// The rendezvous does not take this node.
    #[error("rendezvous at {endpoint} refuses this node: {reason}")]
    Refused {
        /// Host and port.
        endpoint: String,
        /// The reason, in its words.
        reason: String,
    },
}

impl LaunchError {
    /// The exit code of a launcher that ends with this error.
    #[must_use]
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::BadValue { .. } | Self::Usage { .. } => EXIT_USAGE,
            Self::Unknown { .. } | Self::File { .. } | Self::Refused { .. } => EXIT_CONFIGURATION,
            // sysexits.h: an error of the operating system, such as "cannot fork".
            Self::System { .. } => 71,
            Self::Rendezvous { .. } => EXIT_UNREACHABLE,
        }
    }
}
