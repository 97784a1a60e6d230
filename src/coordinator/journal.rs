//! The journal: which generations were ever given out. Each is a file that is created exclusively and synced before the
//! number is announced, so a number cannot be used twice, whatever crashes when (A-10, MS-1).

use std::path::Path;

use crate::error::{Classify, Kind};
use crate::store::{LocalStore, Store, StoreError, write_small};
use crate::types::Generation;

/// The journal cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[error("coordinator journal: {source}")]
pub struct JournalError {
    /// Storage's error.
    #[from]
    source: StoreError,
}

impl Classify for JournalError {
    fn kind(&self) -> Kind {
        self.source.kind()
    }
}

/// The generations of a job.
#[derive(Clone, Debug)]
pub struct Journal {
    store: LocalStore,
    last: Generation,
}

impl Journal {
    /// Opens the journal in `directory`, which is made when it does not exist.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn open(directory: &Path) -> Result<Self, JournalError> {
        let store = LocalStore::new(directory);
        store.create_dir("")?;
        let names = store.list("")?;
        let last = names.iter().filter_map(|name| name.strip_prefix("generation-")?.parse().ok()).max();
        Ok(Self { store, last: Generation(last.unwrap_or(0)) })
    }

    /// The highest generation that was ever given out.
    #[must_use]
    pub const fn last(&self) -> Generation {
        self.last
    }

    /// Makes a generation durable.
    ///
    /// # Errors
    /// [`JournalError`], of kind `Conflict` when another coordinator has given it out.
    pub fn persist(&self, generation: Generation) -> Result<(), JournalError> {
        write_small(&self.store, &format!("generation-{:09}", generation.0), b"")?;
        Ok(self.store.sync_dir("")?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// a number is given out once, also by two coordinators at the same directory.
    #[test]
    fn a_10_generations_are_never_reused() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let (first, second) = (Journal::open(directory.path()), Journal::open(directory.path()));
        let (first, second) = (first.expect("new"), second.expect("new"));
        first.persist(Generation(1)).expect("free");
        let refused = second.persist(Generation(1)).expect_err("given out already");
        assert_eq!(refused.kind(), Kind::Conflict);
        assert_eq!(Journal::open(directory.path()).expect("again").last(), Generation(1));
    }
}
