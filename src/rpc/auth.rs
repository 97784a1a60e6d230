//! The job's token: whoever has it may join and command the job. It lives in a file that is read again at each call, so
//! that it can be rotated while a job runs.

use std::path::{Path, PathBuf};

use tonic::metadata::{Ascii, MetadataValue};
use tonic::{Request, Status};

use crate::store::{LocalStore, Store, StoreError, read_small};

/// A token is at most this long.
const MAX_TOKEN_BYTES: u64 = 4096;

/// Where the token is.
#[derive(Clone, Debug)]
pub struct Token {
    path: PathBuf,
}

/// The token cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenError {
    /// Storage's error.
    #[error("job token: {0}")]
    Store(#[from] StoreError),
    /// It is empty or has characters that no header carries.
    #[error("job token in {path}: expected one line of visible ASCII")]
    Malformed {
        /// The file.
        path: String,
    },
}

impl crate::error::Classify for TokenError {
    fn kind(&self) -> crate::error::Kind {
        match self {
            Self::Store(source) => source.kind(),
            Self::Malformed { .. } => crate::error::Kind::Conflict,
        }
    }
}

impl Token {
    /// The token in the file at `path`.
    #[must_use]
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Makes a new token in a new file that only this user can read.
    ///
    /// # Errors
    /// [`TokenError::Store`].
    pub fn create(directory: &Path) -> Result<Self, TokenError> {
        let secret = crate::coordinator::random_secret();
        let text: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
        let store = LocalStore::new(directory);
        // Published whole: a half-written token would be a token that nobody else can have.
        let draft = format!(".token.{:x}", crate::clock::unix_ns());
        crate::store::write_small(&store, &draft, text.as_bytes())?;
        store.publish(&draft, "token")?;
        Ok(Self { path: directory.join("token") })
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn read(&self) -> Result<String, TokenError> {
        let malformed = || TokenError::Malformed { path: self.path.display().to_string() };
        let (Some(directory), Some(name)) = (self.path.parent(), self.path.file_name().and_then(|name| name.to_str()))
        else {
            return Err(malformed());
        };
        let store = LocalStore::new(directory);
        let bytes = read_small(&store as &dyn Store, name, MAX_TOKEN_BYTES)?;
        let text = String::from_utf8(bytes).map_err(|_| malformed())?;
        let text = text.trim().to_owned();
        if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_graphic()) { Err(malformed()) } else { Ok(text) }
    }

    /// The header that a client sends.
    ///
    /// # Errors
    /// [`TokenError`].
    pub fn header(&self) -> Result<MetadataValue<Ascii>, TokenError> {
        let text = format!("Bearer {}", self.read()?);
        text.parse().map_err(|_| TokenError::Malformed { path: self.path.display().to_string() })
    }

    /// Lets a request pass that has the token.
    pub(super) fn check<T>(&self, request: Request<T>) -> Result<Request<T>, Status> {
        let expected = self.header().map_err(|error| {
            tracing::error!(%error, "the job's token cannot be read");
            Status::unavailable("the job's token cannot be read by the coordinator")
        })?;
        match request.metadata().get("authorization") {
            None => Err(Status::unauthenticated("no job token: expected authorization metadata")),
            Some(found) if same(found.as_bytes(), expected.as_bytes()) => Ok(request),
            Some(_) => Err(Status::permission_denied("wrong job token")),
        }
    }
}

/// Compares in a time that does not depend on where the first difference is.
fn same(found: &[u8], expected: &[u8]) -> bool {
    found.len() == expected.len() && found.iter().zip(expected).fold(0, |all, (a, b)| all | (a ^ b)) == 0
}
