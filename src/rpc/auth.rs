//! The job's token: whoever has it may join and command the job. It lives in a file that is read again now and then, so that
//! it can be rotated while a job runs.
//!
//! No call waits for the file once it was read: a disk that stalls must not cost a rank its lease. What was read is used for
//! [`REFRESH`], then read again aside. A coordinator that meets a token it does not know reads the file at once, and takes the
//! one before for as long as others may still send it; so a rotation refuses nobody.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tonic::metadata::{Ascii, MetadataValue};

use crate::store::{LocalStore, Store, StoreError, read_small};

/// A token is at most this long.
const MAX_TOKEN_BYTES: u64 = 4096;

/// How long a token is used before its file is read again.
const REFRESH: Duration = Duration::from_secs(5);

/// Reads of the file because of tokens that nobody knows: this many at once, then two a second. Wrong tokens come from
/// anybody, and a read waits for a disk.
const REREADS: u32 = 16;
/// After this long there is one more.
const REREAD_INTERVAL: Duration = Duration::from_millis(500);

/// Where the token is, and what it was.
#[derive(Clone)]
pub struct Token {
    path: PathBuf,
    known: Arc<Mutex<Option<Known>>>,
    rereads: Arc<Mutex<Rereads>>,
}

/// How many reads of the file are left.
struct Rereads {
    left: u32,
    counted: Instant,
}

impl Default for Rereads {
    fn default() -> Self {
        Self { left: REREADS, counted: crate::clock::now() }
    }
}

impl Rereads {
    fn take(&mut self, now: Instant) -> bool {
        let earned = now.saturating_duration_since(self.counted).as_millis() / REREAD_INTERVAL.as_millis();
        if earned > 0 {
            self.left = self.left.saturating_add(u32::try_from(earned).unwrap_or(REREADS)).min(REREADS);
            self.counted = now;
        }
        let is_left = self.left > 0;
        self.left = self.left.saturating_sub(1);
        is_left
    }
}

struct Known {
    text: String,
    read: Instant,
    /// The token before, until when it is good.
    previous: Option<(String, Instant)>,
}

impl std::fmt::Debug for Token {
    /// Without the secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Token({})", self.path.display())
    }
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
        Self { path: path.into(), known: Arc::default(), rereads: Arc::default() }
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
        Ok(Self::at(directory.join("token")))
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

    fn known(&self) -> MutexGuard<'_, Option<Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the file now, and remembers what was there before.
    fn refresh(&self) -> Result<String, TokenError> {
        let text = self.read()?;
        let now = crate::clock::now();
        let mut known = self.known();
        let previous = match known.take() {
            Some(old) if old.text != text => Some((old.text, now + 2 * REFRESH)),
            Some(old) => old.previous,
            None => None,
        };
        *known = Some(Known { text: text.clone(), read: now, previous });
        Ok(text)
    }

    /// The token as it was read last; from the file only the first time.
    fn current(&self) -> Result<String, TokenError> {
        let text = {
            let mut known = self.known();
            match known.as_mut() {
                None => None,
                Some(last) if last.read.elapsed() < REFRESH => Some((last.text.clone(), false)),
                Some(last) => {
                    // Whoever comes next finds it read already.
                    last.read = crate::clock::now();
                    Some((last.text.clone(), true))
                }
            }
        };
        let Some((text, is_old)) = text else { return self.refresh() };
        if is_old {
            let token = self.clone();
            // A file that cannot be read now is read later; until then the token stands.
            let again = move || drop(token.refresh().inspect_err(|error| tracing::warn!(%error, "reading it again")));
            match tokio::runtime::Handle::try_current() {
                Ok(runtime) => drop(runtime.spawn_blocking(again)),
                Err(_) => again(),
            }
        }
        Ok(text)
    }

    /// The header that a client sends.
    ///
    /// # Errors
    /// [`TokenError`].
    pub fn header(&self) -> Result<MetadataValue<Ascii>, TokenError> {
        let text = format!("Bearer {}", self.current()?);
        text.parse().map_err(|_| TokenError::Malformed { path: self.path.display().to_string() })
    }

    /// Whether a header has the token as it was read last, or the one before while that is good.
    fn knows(&self, found: &[u8]) -> Result<bool, TokenError> {
        let is = |text: &str| same(found, format!("Bearer {text}").as_bytes());
        if is(&self.current()?) {
            return Ok(true);
        }
        let known = self.known();
        let previous = known.as_ref().and_then(|known| known.previous.as_ref());
        Ok(previous.is_some_and(|(text, until)| is(text) && crate::clock::now() < *until))
    }

    /// As [`Self::knows`], after another look at the file if that is needed and was not had too often.
    pub(crate) fn accepts(&self, found: &[u8]) -> Result<bool, TokenError> {
        if self.knows(found)? {
            return Ok(true);
        }
        if !self.rereads.lock().unwrap_or_else(PoisonError::into_inner).take(crate::clock::now()) {
            return Ok(false);
        }
        self.refresh()?;
        self.knows(found)
    }
}

/// Whose tokens open which doors.
#[derive(Clone, Debug)]
pub struct Access {
    /// The ranks', and everybody's when there is no other.
    pub worker: Token,
    /// That of people and schedulers who command the job.
    pub operator: Option<Token>,
}

/// What a caller may do, by its token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// Everything, because there is one token.
    Any,
    /// What ranks and their launchers do.
    Worker,
    /// Command the job.
    Operator,
}

impl Access {
    /// The role of the token in a header; none when nobody knows it.
    pub(super) fn role(&self, found: &[u8]) -> Result<Option<Role>, TokenError> {
        let Some(operator) = &self.operator else {
            return Ok(self.worker.accepts(found)?.then_some(Role::Any));
        };
        // What both have read already comes first: a rank's call does not look at the other's file.
        for looks in [Token::knows, Token::accepts] {
            if looks(operator, found)? {
                return Ok(Some(Role::Operator));
            }
            if looks(&self.worker, found)? {
                return Ok(Some(Role::Worker));
            }
        }
        Ok(None)
    }
}

/// Compares in a time that does not depend on where the first difference is.
fn same(found: &[u8], expected: &[u8]) -> bool {
    found.len() == expected.len() && found.iter().zip(expected).fold(0, |all, (a, b)| all | (a ^ b)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Guesses become a bounded number of reads.
    #[test]
    fn unknown_tokens_are_looked_up_a_few_times_and_then_twice_a_second() {
        let start = crate::clock::now();
        let mut rereads = Rereads { left: REREADS, counted: start };
        assert!((0..REREADS).all(|_| rereads.take(start)));
        assert!(!rereads.take(start) && !rereads.take(start + Duration::from_millis(499)));
        let later = start + Duration::from_secs(1);
        assert_eq!([later; 3].map(|now| rereads.take(now)), [true, true, false]);
    }

    /// A new token is accepted at once, the one before for a while, another never.
    #[test]
    fn a_rotation_refuses_nobody() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("token");
        let store = LocalStore::new(directory.path());
        let write = |text: &str| {
            store.remove("token")?;
            crate::store::write_small(&store, "token", text.as_bytes())
        };
        write("first").expect("written");
        let token = Token::at(&path);
        let accepts = |text: &str| token.accepts(format!("Bearer {text}").as_bytes()).expect("readable");
        assert!(accepts("first") && !accepts("second"));
        write("second").expect("written");
        // A client that has read it goes on with the old one.
        assert_eq!(token.header().expect("a header"), "Bearer first");
        assert!(accepts("second") && accepts("first") && !accepts("third"));
        assert_eq!(token.header().expect("a header"), "Bearer second");
        write("third").expect("written");
        assert!(accepts("third") && accepts("second") && !accepts("first"));
    }
}
