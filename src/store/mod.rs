//! Where files of data are: the one place, besides `hub`, that touches them.
//!
//! Owns: the [`Store`] trait, its errors, the backends (local files; object stores and web servers, with the feature
//! `remote`) and the counting of bytes read.
//! Refuses to know: what is in a file, tensors, plans, checkpoints.
//!
//! Invariants:
//! - `ST-1`: [`NewFile::finish`] returns only after the bytes are on the medium (fsync).
//! - `ST-2`: [`Store::publish`] is atomic and never replaces anything; after it returns the name survives a crash.
//! - `ST-3`: a read gives exactly the bytes asked for or an error; there is no short read.

mod address;
mod error;
mod local;
mod lock;
mod path;
#[cfg(feature = "remote")]
mod remote;
mod settings;

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub use address::{RemoteAddress, Scheme, absolute, is_remote};
pub use error::{Operation, StoreError};
pub use local::LocalStore;
pub use lock::{DirectoryLock, LockKind};
pub use path::confined;
#[cfg(feature = "remote")]
pub use remote::RemoteStore;
pub use settings::{MAX_BACKOFF, Patience, RemoteSettings, remote_settings, set_remote_settings};

/// A set of named files. Names are relative paths with `/` between parts; they never leave the store's root.
pub trait Store: Send + Sync + fmt::Debug {
    /// Opens a file for ranged reads.
    ///
    /// # Errors
    /// [`StoreError`] when the file does not exist or cannot be opened.
    fn open(&self, name: &str) -> Result<Box<dyn ReadAt>, StoreError>;

    /// Creates a file that must not exist yet, with `len_bytes` reserved, so that a full disk shows before the first byte.
    ///
    /// # Errors
    /// [`StoreError`] when it exists, the place is not writable, or there is no room.
    fn create(&self, name: &str, len_bytes: u64) -> Result<Box<dyn NewFile>, StoreError>;

    /// Creates a directory, and the ones above it.
    ///
    /// # Errors
    /// [`StoreError`] when the place is not writable.
    fn create_dir(&self, name: &str) -> Result<(), StoreError>;

    /// The names directly below a directory, sorted; empty when it does not exist.
    ///
    /// # Errors
    /// [`StoreError`] when the directory cannot be read.
    fn list(&self, directory: &str) -> Result<Vec<String>, StoreError>;

    /// Renames `from` to `to`, which must not exist, and makes both directories' new content durable (`ST-2`).
    ///
    /// # Errors
    /// [`StoreError`] of kind `Conflict` when `to` exists, and always in a store that does not rename ([`Store::renames`]).
    fn publish(&self, from: &str, to: &str) -> Result<(), StoreError>;

    /// Makes the entries of a directory durable.
    ///
    /// # Errors
    /// [`StoreError`] when the medium fails.
    fn sync_dir(&self, name: &str) -> Result<(), StoreError>;

    /// Deletes a file or a directory with all below it; nothing happens when it does not exist.
    ///
    /// # Errors
    /// [`StoreError`] when it cannot be deleted.
    fn remove(&self, name: &str) -> Result<(), StoreError>;

    /// The store's place in words, for messages.
    fn describe(&self, name: &str) -> String;

    /// Whether [`Store::publish`] works. Where it does not, what makes files visible is the creation of one more: of two who
    /// create the same name, exactly one succeeds.
    fn renames(&self) -> bool {
        true
    }
}

/// A file open for reading.
pub trait ReadAt: Send + Sync + fmt::Debug {
    /// The file's length in bytes when it was opened.
    fn len_bytes(&self) -> u64;

    /// What tells this version of the file from others, where the store knows.
    fn version(&self) -> Option<String> {
        None
    }

    /// Fills `into` with the bytes from `offset` (`ST-3`).
    ///
    /// # Errors
    /// [`StoreError::Truncated`] when the file ends before; otherwise the medium's error.
    fn read_exact_at(&self, offset: u64, into: &mut [u8]) -> Result<(), StoreError>;
}

/// A file that is being written; it is not part of anything until its directory is published.
pub trait NewFile: Send + fmt::Debug {
    /// Writes all of `bytes` at `offset`, within the length given at creation.
    ///
    /// # Errors
    /// [`StoreError`] when the medium fails.
    fn write_all_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), StoreError>;

    /// Makes the bytes durable and closes the file (`ST-1`).
    ///
    /// # Errors
    /// [`StoreError`] when the medium fails; the file must then be thrown away, never written again.
    fn finish(self: Box<Self>) -> Result<(), StoreError>;
}

/// Bytes that left storage, counted over all files of a store.
#[derive(Clone, Debug, Default)]
pub struct ReadCounter(Arc<AtomicU64>);

impl ReadCounter {
    /// Bytes read so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    fn add(&self, bytes: u64) {
        self.0.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// A store, and the count of what is read from it.
#[derive(Clone, Debug)]
pub struct Root {
    /// The store.
    pub store: Arc<dyn Store>,
    /// The bytes read through it.
    pub read: ReadCounter,
}

/// The store below a directory of this machine, or below the address of a remote place ([`RemoteAddress`]).
///
/// # Errors
/// [`StoreError::Address`] for an address that is not of the form, or when this program was built without remote places;
/// otherwise as `RemoteStore::new`.
pub fn open_root(root: impl AsRef<Path>) -> Result<Root, StoreError> {
    let root = root.as_ref();
    if is_remote(root) {
        return remote_root(RemoteAddress::parse(&root.to_string_lossy())?);
    }
    let store = LocalStore::new(root);
    let read = store.read_counter();
    Ok(Root { store: Arc::new(store), read })
}

/// The store at a remote place, in which every object stays the version that it was when it was first opened.
///
/// # Errors
/// As [`open_root`].
#[cfg(feature = "remote")]
pub fn open_pinned(address: &RemoteAddress) -> Result<Arc<dyn Store>, StoreError> {
    Ok(Arc::new(RemoteStore::new(address.clone(), &remote_settings())?.pinned()))
}

/// As [`open_root`], which refuses remote places in this build.
///
/// # Errors
/// As [`open_root`].
#[cfg(not(feature = "remote"))]
pub fn open_pinned(address: &RemoteAddress) -> Result<Arc<dyn Store>, StoreError> {
    remote_root(address.clone()).map(|root| root.store)
}

#[cfg(feature = "remote")]
fn remote_root(address: RemoteAddress) -> Result<Root, StoreError> {
    let store = RemoteStore::new(address, &remote_settings())?;
    let read = store.read_counter();
    Ok(Root { store: Arc::new(store), read })
}

#[cfg(not(feature = "remote"))]
fn remote_root(address: RemoteAddress) -> Result<Root, StoreError> {
    let expected = "a path of this machine, because this program was built without the cargo feature remote";
    Err(StoreError::Address { found: address.to_string(), expected })
}

/// Reads a whole small file.
///
/// # Errors
/// [`StoreError::TooLarge`] when it is longer than `limit_bytes`; otherwise as [`Store::open`] and [`ReadAt`].
pub fn read_small(store: &dyn Store, name: &str, limit_bytes: u64) -> Result<Vec<u8>, StoreError> {
    let file = store.open(name)?;
    let len = file.len_bytes();
    if len > limit_bytes {
        return Err(StoreError::TooLarge { path: store.describe(name), limit_bytes, found_bytes: len });
    }
    let mut bytes = vec![0; crate::types::as_usize(len)];
    file.read_exact_at(0, &mut bytes)?;
    Ok(bytes)
}

/// Writes a whole small file durably; the name must not exist.
///
/// # Errors
/// As [`Store::create`] and [`NewFile`].
pub fn write_small(store: &dyn Store, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
    let mut file = store.create(name, crate::types::as_u64(bytes.len()))?;
    file.write_all_at(0, bytes)?;
    file.finish()
}
