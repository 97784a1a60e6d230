//! Object stores and web servers as a store, through the crate `object_store`.
//!
//! Owns: how the operations of a [`Store`] are requests. Refuses to know: what is in a file, checkpoints.
//!
//! Invariants:
//! - `RS-1`: an open file is one version of its object: length and entity tag are fixed when it is opened, every answer is
//!   held against them, and an object that changed is [`StoreError::Changed`]. Bytes of two versions are never mixed.
//! - `RS-2`: memory is bounded: a read takes what it was asked for and one answer on its way, an upload the parts that are
//!   under way and those that are not full yet.
//! - `RS-3`: an object is created whole or not at all, and never replaces one.
//!
//! Directories do not exist here, names with slashes do; so there is no renaming of directories either, and who publishes
//! does so by creating one object last ([`Store::renames`]).

mod connect;
mod failure;
mod read;
mod write;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use object_store::path::Path;
use object_store::{GetOptions, ObjectMeta, ObjectStoreExt as _};
use tokio_stream::StreamExt as _;

use self::connect::Client;
use self::failure::{carry_out, refused};
use super::path::is_inside;
use super::{NewFile, Operation, ReadAt, ReadCounter, RemoteAddress, RemoteSettings, Store, StoreError};

/// The objects below one address.
#[derive(Clone, Debug)]
pub struct RemoteStore {
    address: RemoteAddress,
    client: Arc<Client>,
    read: ReadCounter,
    /// The versions of the objects that were opened, where they are kept.
    pins: Option<Arc<Mutex<BTreeMap<String, ObjectMeta>>>>,
}

impl RemoteStore {
    /// The store of the objects below `address`; nothing is requested yet.
    ///
    /// # Errors
    /// [`StoreError::Io`] when the variables of its cloud do not make a client.
    pub fn new(address: RemoteAddress, settings: &RemoteSettings) -> Result<Self, StoreError> {
        let client =
            Client::new(&address, settings).map_err(|error| refused(Operation::Open, address.to_string(), &error))?;
        Ok(Self { address, client: Arc::new(client), read: ReadCounter::default(), pins: None })
    }

    /// The same store, in which every object stays the version that it was when it was first opened (`RS-1`), for as long as
    /// the store lives.
    #[must_use]
    pub fn pinned(self) -> Self {
        Self { pins: Some(Arc::default()), ..self }
    }

    /// The bytes read through this store and its clones.
    #[must_use]
    pub fn read_counter(&self) -> ReadCounter {
        self.read.clone()
    }

    fn path(&self, name: &str) -> Result<Path, StoreError> {
        let outside = || StoreError::Outside { root: self.address.to_string(), name: name.to_owned() };
        if !is_inside(name) {
            return Err(outside());
        }
        let prefix = &self.address.prefix;
        let whole = match (prefix.as_str(), name) {
            ("", name) => name.to_owned(),
            (prefix, "") => prefix.to_owned(),
            (prefix, name) => format!("{prefix}/{name}"),
        };
        // What a person writes into the address of a web server may be encoded already.
        let parsed = if self.address.scheme.is_web() { Path::from_url_path(&whole) } else { Path::parse(&whole) };
        parsed.map_err(|_| outside())
    }

    /// Length and version of an object now.
    fn head(&self, operation: Operation, name: &str) -> Result<ObjectMeta, StoreError> {
        let (path, place) = (self.path(name)?, self.address.join(name));
        let client = self.client.clone();
        let options = GetOptions { head: true, ..GetOptions::default() };
        carry_out((operation, &place), async move { client.objects.get_opts(&path, options).await })
            .map(|result| result.meta)
    }

    fn pinned_head(&self, name: &str) -> Result<ObjectMeta, StoreError> {
        let Some(pins) = &self.pins else { return self.head(Operation::Open, name) };
        let pinned = pins.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned();
        if let Some(meta) = pinned {
            return Ok(meta);
        }
        let found = self.head(Operation::Open, name)?;
        // Another thread may have been first; then its version counts.
        Ok(pins.lock().unwrap_or_else(PoisonError::into_inner).entry(name.to_owned()).or_insert(found).clone())
    }
}

impl Store for RemoteStore {
    fn open(&self, name: &str) -> Result<Box<dyn ReadAt>, StoreError> {
        let meta = self.pinned_head(name)?;
        let place = self.address.join(name);
        Ok(Box::new(read::RemoteFile::new(self.client.clone(), (place, meta), self.read.clone())))
    }

    fn create(&self, name: &str, len_bytes: u64) -> Result<Box<dyn NewFile>, StoreError> {
        crate::faults::point("store.create");
        let (path, place) = (self.path(name)?, self.address.join(name));
        Ok(Box::new(write::RemoteNewFile::create(self.client.clone(), (path, place), len_bytes)?))
    }

    fn create_dir(&self, name: &str) -> Result<(), StoreError> {
        self.path(name).map(drop)
    }

    fn list(&self, directory: &str) -> Result<Vec<String>, StoreError> {
        let (path, place) = (self.path(directory)?, self.address.join(directory));
        let client = self.client.clone();
        let listed =
            carry_out((Operation::List, &place), async move { client.objects.list_with_delimiter(Some(&path)).await })?;
        let objects = listed.objects.iter().map(|object| &object.location);
        let found = objects.chain(&listed.common_prefixes).filter_map(Path::filename);
        let mut names: Vec<String> = found.map(str::to_owned).collect();
        names.sort();
        names.dedup();
        Ok(names)
    }

    fn publish(&self, _from: &str, to: &str) -> Result<(), StoreError> {
        let source = std::io::Error::new(std::io::ErrorKind::Unsupported, "an object store renames no directory");
        Err(StoreError::Io { operation: Operation::Publish, path: self.address.join(to), source })
    }

    fn sync_dir(&self, _name: &str) -> Result<(), StoreError> {
        // An object that was created is durable, and so is its name.
        Ok(())
    }

    fn remove(&self, name: &str) -> Result<(), StoreError> {
        crate::faults::point("store.remove");
        let (path, place) = (self.path(name)?, self.address.join(name));
        let client = self.client.clone();
        carry_out((Operation::Remove, &place), async move {
            let mut below = client.objects.list(Some(&path));
            while let Some(object) = below.next().await.transpose()? {
                delete(&client, &object.location).await?;
            }
            delete(&client, &path).await
        })
    }

    fn renames(&self) -> bool {
        false
    }

    fn describe(&self, name: &str) -> String {
        self.address.join(name)
    }
}

/// Deletes an object; nothing happens when it does not exist.
async fn delete(client: &Client, path: &Path) -> object_store::Result<()> {
    match client.objects.delete(path).await {
        Err(object_store::Error::NotFound { .. }) => Ok(()),
        result => result,
    }
}
