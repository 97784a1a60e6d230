//! Ranged reads of one version of an object (`RS-1`).
//!
//! The client below tries a request again after errors of the server, of the connection and after a stall, also in the
//! middle of an answer whose version it knows. Here an answer that is too short, or broke off where the client could not go
//! on, is requested again, and every answer is held against the version that was opened.

use std::sync::Arc;

use object_store::path::Path;
use object_store::{GetOptions, GetRange, ObjectMeta};
use tokio_stream::StreamExt as _;

use super::super::settings::MAX_BACKOFF;
use super::super::{Operation, ReadAt, ReadCounter, StoreError};
use super::connect::Client;
use super::failure::{reason, refused, wait};
use crate::types::{as_u64, as_usize};

/// Bytes of one request at most (`RS-2`): what an answer takes beside the memory that it is read into.
const MAX_REQUEST_BYTES: usize = 8 << 20;

/// Tries beside the client's own, of objects whose version it knows.
const RETRIES_BESIDE: u32 = 2;

/// An object of which one version is read.
#[derive(Debug)]
pub(super) struct RemoteFile {
    client: Arc<Client>,
    version: Arc<Version>,
    read: ReadCounter,
}

/// What identifies a version.
#[derive(Debug)]
struct Version {
    place: String,
    meta: ObjectMeta,
}

/// Why a request did not give its bytes.
enum Fault {
    /// Asking again will not help.
    Final(StoreError),
    /// The answer broke off.
    Broken(String),
}

impl RemoteFile {
    pub(super) fn new(client: Arc<Client>, (place, meta): (String, ObjectMeta), read: ReadCounter) -> Self {
        Self { client, version: Arc::new(Version { place, meta }), read }
    }
}

impl ReadAt for RemoteFile {
    fn len_bytes(&self) -> u64 {
        self.version.meta.size
    }

    fn version(&self) -> Option<String> {
        Some(self.version.tag())
    }

    fn read_exact_at(&self, offset: u64, into: &mut [u8]) -> Result<(), StoreError> {
        let end = offset.saturating_add(as_u64(into.len()));
        if end > self.len_bytes() {
            let path = self.version.place.clone();
            return Err(StoreError::Truncated { path, expected_bytes: end, found_bytes: self.len_bytes() });
        }
        let mut at = offset;
        for part in into.chunks_mut(MAX_REQUEST_BYTES) {
            let range = at..at + as_u64(part.len());
            at = range.end;
            let (client, version) = (self.client.clone(), self.version.clone());
            let work = async move { version.fetch(&client, range).await };
            let bytes = wait((Operation::Read, &self.version.place), work)??;
            part.copy_from_slice(&bytes);
            self.read.add(as_u64(part.len()));
        }
        Ok(())
    }
}

impl Version {
    /// The entity tag; of servers that give none, the time of the last change.
    fn tag(&self) -> String {
        tag_of(&self.meta)
    }

    /// The bytes of a range, requested as often as it takes and patience allows.
    async fn fetch(&self, client: &Client, range: std::ops::Range<u64>) -> Result<Vec<u8>, StoreError> {
        let mut wait = client.patience.backoff;
        let mut tries = 0;
        // Where the client knows the version it has asked again itself, and what is left is rare.
        let retries = if self.meta.e_tag.is_some() { RETRIES_BESIDE } else { client.patience.retries };
        loop {
            let why = match self.fetch_once(client, range.clone()).await {
                Ok(bytes) => return Ok(bytes),
                Err(Fault::Final(error)) => return Err(error),
                Err(Fault::Broken(why)) => why,
            };
            tries += 1;
            if tries > retries {
                let source =
                    std::io::Error::other(format!("bytes {}..{}: {why}, {tries} times", range.start, range.end));
                return Err(StoreError::Io { operation: Operation::Read, path: self.place.clone(), source });
            }
            tracing::debug!(place = self.place, start = range.start, end = range.end, why, "an answer broke off");
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(MAX_BACKOFF);
        }
    }

    async fn fetch_once(&self, client: &Client, range: std::ops::Range<u64>) -> Result<Vec<u8>, Fault> {
        let expected = as_usize(range.end - range.start);
        if expected == 0 {
            return Ok(Vec::new());
        }
        // A weak tag never matches as a condition (RFC 9110, 13.1.1); it is compared below.
        let if_match = self.meta.e_tag.clone().filter(|tag| !tag.starts_with("W/"));
        let bounded = Some(GetRange::Bounded(range.clone()));
        let options = GetOptions { if_match, range: bounded, ..GetOptions::default() };
        let answer = client.objects.get_opts(&self.meta.location, options).await;
        let answer = answer.map_err(|error| Fault::Final(self.failed(&error, &range)))?;
        if tag_of(&answer.meta) != self.tag() || answer.meta.size != self.meta.size {
            return Err(Fault::Final(self.changed(format!("{} of {} bytes", tag_of(&answer.meta), answer.meta.size))));
        }
        let mut bytes = Vec::with_capacity(expected);
        let mut body = answer.into_stream();
        while let Some(piece) = body.next().await {
            let piece = piece.map_err(|error| Fault::Broken(reason(&error)))?;
            if bytes.len() + piece.len() > expected {
                return Err(Fault::Broken(format!("expected {expected} bytes, found more")));
            }
            bytes.extend_from_slice(&piece);
        }
        if bytes.len() < expected {
            return Err(Fault::Broken(format!("expected {expected} bytes, found {}", bytes.len())));
        }
        Ok(bytes)
    }

    fn failed(&self, error: &object_store::Error, range: &std::ops::Range<u64>) -> StoreError {
        if let object_store::Error::Precondition { .. } = error {
            return self.changed("another version".to_owned());
        }
        match refused(Operation::Read, self.place.clone(), error) {
            StoreError::Io { operation, path, source } => {
                let words = format!("bytes {}..{}: {source}", range.start, range.end);
                StoreError::Io { operation, path, source: std::io::Error::new(source.kind(), words) }
            }
            other => other,
        }
    }

    fn changed(&self, found: String) -> StoreError {
        let expected = format!("{} of {} bytes", self.tag(), self.meta.size);
        StoreError::Changed { path: self.place.clone(), expected, found }
    }
}

fn tag_of(meta: &ObjectMeta) -> String {
    meta.e_tag.clone().unwrap_or_else(|| format!("the version of {}", meta.last_modified.to_rfc3339()))
}

/// Reads a whole small object, whatever its version.
pub(super) async fn whole(client: &Client, path: &Path, limit_bytes: usize) -> object_store::Result<Option<Vec<u8>>> {
    let mut body = client.objects.get_opts(path, GetOptions::default()).await?.into_stream();
    let mut bytes = Vec::new();
    while let Some(piece) = body.next().await.transpose()? {
        if bytes.len() + piece.len() > limit_bytes {
            return Ok(None);
        }
        bytes.extend_from_slice(&piece);
    }
    Ok(Some(bytes))
}
