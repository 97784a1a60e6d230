//! Creating objects: in one request when they are small, in parts when they are not (`RS-2`, `RS-3`).
//!
//! A file's header is written last and stands first, so parts are uploaded in the order in which they become full, whatever
//! their place.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use object_store::multipart::PartId;
use object_store::path::Path;
use object_store::{Error, GetOptions, PutMode, PutPayload};

use super::super::{NewFile, Operation, StoreError};
use super::connect::Client;
use super::failure::{carry_out, refused, wait};
use super::read::whole;
use crate::tasks::{Answer, request};
use crate::types::{as_u64, as_usize};

/// Bytes of a part, and of an object that takes one request: stores want 5 MiB at least.
const PART_BYTES: u64 = 8 << 20;
/// Stores take 10,000 parts; larger objects have larger parts.
const MAX_PARTS: u64 = 9_000;
/// Parts under way at a time.
const PARTS_UNDER_WAY: usize = 4;

type Uploaded = Result<(u64, PartId), Error>;

/// An object that is being written.
#[derive(Debug)]
pub(super) struct RemoteNewFile {
    client: Arc<Client>,
    path: Path,
    place: String,
    len_bytes: u64,
    part_bytes: u64,
    written_bytes: u64,
    /// The parts that are not full yet, by number.
    open: BTreeMap<u64, Part>,
    /// The upload's id; none when one request is enough.
    upload: Option<String>,
    under_way: VecDeque<Answer<Uploaded>>,
    uploaded: BTreeMap<u64, PartId>,
}

#[derive(Debug)]
struct Part {
    bytes: Vec<u8>,
    filled_bytes: u64,
}

impl RemoteNewFile {
    pub(super) fn create(
        client: Arc<Client>,
        (path, place): (Path, String),
        len_bytes: u64,
    ) -> Result<Self, StoreError> {
        let part_bytes = PART_BYTES.max(len_bytes.div_ceil(MAX_PARTS).next_multiple_of(1 << 20));
        let mut file = Self {
            client,
            path,
            place,
            len_bytes,
            part_bytes,
            written_bytes: 0,
            open: BTreeMap::new(),
            upload: None,
            under_way: VecDeque::new(),
            uploaded: BTreeMap::new(),
        };
        if file.client.uploads.is_none() {
            return Err(file.unsupported());
        }
        if len_bytes > part_bytes {
            file.expect_new()?;
            let (client, path) = (file.client.clone(), file.path.clone());
            file.upload = Some(carry_out((Operation::Create, &file.place), async move {
                let uploads = client.uploads.as_ref().ok_or_else(no_uploads)?;
                uploads.create_multipart(&path).await
            })?);
        }
        Ok(file)
    }

    fn unsupported(&self) -> StoreError {
        let source = std::io::Error::new(std::io::ErrorKind::Unsupported, "a web server is read from, not written to");
        StoreError::Io { operation: Operation::Create, path: self.place.clone(), source }
    }

    /// An upload in parts has no condition of its own in every store, so the name is looked at first. Names that two could
    /// write at once are small objects, or lie below a name that one of them has created.
    fn expect_new(&self) -> Result<(), StoreError> {
        let (client, path) = (self.client.clone(), self.path.clone());
        let options = GetOptions { head: true, ..GetOptions::default() };
        let found =
            wait((Operation::Create, &self.place), async move { client.objects.get_opts(&path, options).await })?;
        match found {
            Ok(_) => Err(StoreError::Exists { path: self.place.clone() }),
            Err(Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(refused(Operation::Create, self.place.clone(), &error)),
        }
    }

    fn part_len(&self, number: u64) -> u64 {
        let start = number * self.part_bytes;
        self.part_bytes.min(self.len_bytes.saturating_sub(start))
    }

    /// Uploads a part that is full; waits while too many are under way.
    fn upload(&mut self, number: u64, bytes: Vec<u8>) -> Result<(), StoreError> {
        while self.under_way.len() >= PARTS_UNDER_WAY {
            self.take_uploaded()?;
        }
        let (client, path, upload) = (self.client.clone(), self.path.clone(), self.upload.clone().unwrap_or_default());
        let work = async move {
            let uploads = client.uploads.as_ref().ok_or_else(no_uploads)?;
            let part = uploads.put_part(&path, &upload, as_usize(number), PutPayload::from(bytes)).await?;
            Ok((number, part))
        };
        let answer = request(work).map_err(|source| self.io(source))?;
        self.under_way.push_back(answer);
        Ok(())
    }

    fn take_uploaded(&mut self) -> Result<(), StoreError> {
        if let Some(answer) = self.under_way.pop_front() {
            let uploaded = answer.wait().map_err(|source| self.io(source))?;
            let (number, part) = uploaded.map_err(|error| refused(Operation::Write, self.place.clone(), &error))?;
            self.uploaded.insert(number, part);
        }
        Ok(())
    }

    fn io(&self, source: std::io::Error) -> StoreError {
        StoreError::Io { operation: Operation::Write, path: self.place.clone(), source }
    }

    fn hole(&self) -> StoreError {
        let (expected_bytes, found_bytes) = (self.len_bytes, self.written_bytes);
        StoreError::Truncated { path: self.place.clone(), expected_bytes, found_bytes }
    }

    /// Creates an object in one request (`RS-3`).
    fn put_whole(&mut self) -> Result<(), StoreError> {
        let bytes = self.open.remove(&0).map(|part| part.bytes).unwrap_or_default();
        let (client, path) = (self.client.clone(), self.path.clone());
        carry_out((Operation::Write, &self.place), async move {
            let payload = PutPayload::from(bytes.clone());
            match client.objects.put_opts(&path, payload, PutMode::Create.into()).await {
                // An answer may be lost and the request carried out twice: an object with exactly these bytes is ours.
                Err(error @ Error::AlreadyExists { .. }) => match whole(&client, &path, bytes.len()).await? {
                    Some(found) if found == bytes => Ok(()),
                    _ => Err(error),
                },
                result => result.map(drop),
            }
        })
    }

    fn complete(&mut self, upload: String) -> Result<(), StoreError> {
        while !self.under_way.is_empty() {
            self.take_uploaded()?;
        }
        let parts: Vec<PartId> = std::mem::take(&mut self.uploaded).into_values().collect();
        if as_u64(parts.len()) != self.len_bytes.div_ceil(self.part_bytes) {
            return Err(self.hole());
        }
        let (client, path, len_bytes) = (self.client.clone(), self.path.clone(), self.len_bytes);
        carry_out((Operation::Write, &self.place), async move {
            let uploads = client.uploads.as_ref().ok_or_else(no_uploads)?;
            match uploads.complete_multipart(&path, &upload, parts).await {
                // The same here: the upload is gone because it was completed, if the object is whole.
                Err(error @ Error::NotFound { .. }) => {
                    let options = GetOptions { head: true, ..GetOptions::default() };
                    let found = client.objects.get_opts(&path, options).await;
                    if found.is_ok_and(|found| found.meta.size == len_bytes) { Ok(()) } else { Err(error) }
                }
                result => result.map(drop),
            }
        })?;
        self.upload = None;
        Ok(())
    }
}

impl NewFile for RemoteNewFile {
    fn write_all_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), StoreError> {
        crate::faults::point("store.write");
        let end = offset.saturating_add(as_u64(bytes.len()));
        if end > self.len_bytes {
            return Err(StoreError::TooLarge {
                path: self.place.clone(),
                limit_bytes: self.len_bytes,
                found_bytes: end,
            });
        }
        let (mut at, mut rest) = (offset, bytes);
        while !rest.is_empty() {
            let number = at / self.part_bytes;
            let (start, len) = (at - number * self.part_bytes, self.part_len(number));
            let (now, later) = rest.split_at(rest.len().min(as_usize(len - start)));
            let part =
                self.open.entry(number).or_insert_with(|| Part { bytes: vec![0; as_usize(len)], filled_bytes: 0 });
            let target = as_usize(start)..as_usize(start) + now.len();
            part.bytes.get_mut(target).expect("a part has its length").copy_from_slice(now);
            part.filled_bytes += as_u64(now.len());
            let is_full = part.filled_bytes == len;
            if is_full && self.upload.is_some() {
                let part = self.open.remove(&number).expect("it was written to just now");
                self.upload(number, part.bytes)?;
            }
            self.written_bytes += as_u64(now.len());
            (at, rest) = (at + as_u64(now.len()), later);
        }
        Ok(())
    }

    fn finish(mut self: Box<Self>) -> Result<(), StoreError> {
        crate::faults::point("store.finish");
        if self.written_bytes != self.len_bytes {
            return Err(self.hole());
        }
        match self.upload.clone() {
            None => self.put_whole(),
            Some(upload) => self.complete(upload),
        }
    }
}

impl Drop for RemoteNewFile {
    /// Parts of an upload that is given up are stored, and paid for, until it is aborted.
    fn drop(&mut self) {
        let Some(upload) = self.upload.take() else { return };
        while let Some(answer) = self.under_way.pop_front() {
            let _ = answer.wait();
        }
        let (client, path) = (self.client.clone(), self.path.clone());
        let aborted = carry_out((Operation::Remove, &self.place), async move {
            let uploads = client.uploads.as_ref().ok_or_else(no_uploads)?;
            uploads.abort_multipart(&path, &upload).await
        });
        if let Err(error) = aborted {
            tracing::warn!(%error, "an upload that was given up stays until the store's own rules delete it");
        }
    }
}

fn no_uploads() -> Error {
    Error::NotImplemented { operation: "upload".to_owned(), implementer: "a web server".to_owned() }
}
