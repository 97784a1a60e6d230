//! The manifest's bytes: JSON with its own digest as the last member (`FM-2`).

use sha2::{Digest as _, Sha256};

use super::{CoverageError, MANIFEST_VERSION, Manifest};
use crate::error::{Classify, Kind};

/// No manifest is longer: 100,000 tensors on 1,000 ranks stay below.
pub const MAX_MANIFEST_BYTES: u64 = 1 << 30;

/// The line with which the part that is not digested starts.
const DIGEST_LINE: &str = "\n \"digest\": \"sha256:";

/// Why a manifest cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// The file does not end with a digest.
    #[error("manifest has no digest at its end: it is truncated or not a manifest")]
    NoDigest,
    /// The digest does not fit the bytes.
    #[error("manifest is damaged: its digest says {expected}, its bytes give {found}")]
    Damaged {
        /// The digest in the file.
        expected: String,
        /// The digest of the bytes.
        found: String,
    },
    /// The bytes have their digest but are no manifest.
    #[error("manifest cannot be read: {source}")]
    Malformed {
        /// What the parser says.
        source: serde_json::Error,
    },
    /// A later program wrote it.
    #[error("manifest has version {found}, this program reads up to {MANIFEST_VERSION}")]
    Version {
        /// The version found.
        found: u64,
    },
    /// Chunks are missing, overlap or lie outside their file.
    #[error("manifest does not describe a whole model: {source}")]
    Coverage {
        /// What is wrong.
        source: CoverageError,
    },
}

impl Classify for ManifestError {
    fn kind(&self) -> Kind {
        match self {
            Self::Version { .. } => Kind::Invalid,
            _ => Kind::Corrupt,
        }
    }
}

impl Manifest {
    /// The manifest's bytes.
    ///
    /// # Panics
    /// Never: a manifest has only strings, integers and lists, which JSON can hold.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let format = serde_json::ser::PrettyFormatter::with_indent(b" ");
        let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, format);
        serde::Serialize::serialize(self, &mut serializer).expect("plain data serializes into memory");
        // Replace the closing brace by the last member.
        bytes.truncate(bytes.len() - "\n}".len());
        bytes.push(b',');
        let digest = hex(&Sha256::digest(&bytes));
        bytes.extend_from_slice(DIGEST_LINE.as_bytes());
        bytes.extend_from_slice(digest.as_bytes());
        bytes.extend_from_slice(b"\"\n}\n");
        bytes
    }

    /// Reads a manifest and checks digest, version and coverage, in this order.
    ///
    /// # Errors
    /// [`ManifestError`], the first that applies.
    pub fn decode(bytes: &[u8]) -> Result<Self, ManifestError> {
        let line = DIGEST_LINE.as_bytes();
        let tail_start = bytes.len().saturating_sub(line.len() + 64 + "\"\n}\n".len());
        let (body, tail) = bytes.split_at_checked(tail_start).ok_or(ManifestError::NoDigest)?;
        let expected = tail
            .strip_prefix(line)
            .and_then(|rest| rest.strip_suffix(b"\"\n}\n"))
            .and_then(|digest| std::str::from_utf8(digest).ok())
            .ok_or(ManifestError::NoDigest)?;
        let found = hex(&Sha256::digest(body));
        if expected != found {
            return Err(ManifestError::Damaged { expected: expected.to_owned(), found });
        }
        check_version(bytes)?;
        let manifest: Self = serde_json::from_slice(bytes).map_err(|source| ManifestError::Malformed { source })?;
        manifest.check_coverage().map_err(|source| ManifestError::Coverage { source })?;
        Ok(manifest)
    }
}

/// The version is looked at before the rest, whose form a later version may change.
fn check_version(bytes: &[u8]) -> Result<(), ManifestError> {
    #[derive(serde::Deserialize)]
    struct Version {
        weightcast_manifest: u64,
    }
    let version: Version = serde_json::from_slice(bytes).map_err(|source| ManifestError::Malformed { source })?;
    if version.weightcast_manifest == u64::from(MANIFEST_VERSION) {
        Ok(())
    } else {
        Err(ManifestError::Version { found: version.weightcast_manifest })
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
