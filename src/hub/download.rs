//! One blob: resumed, counted, verified, and only then given its name (`HU-1`, `HU-2`).

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::HubError;
use super::cache::Repository;
use super::http::{FileFacts, Http};
use crate::types::{as_u64, as_usize};

/// A download that breaks off so many times in a row without a byte more is given up.
const MAX_STALLS: u32 = 3;
/// A holder of a lock whose download does not grow for so long is taken for stuck. Between two bytes it may wait for a
/// stalled read, a new connection and an answer; verifying 50 GB takes about a minute.
const LOCK_PATIENCE: Duration = Duration::from_secs(300);
const BUFFER_BYTES: usize = 1 << 20;

/// Sees to it that the blob of a file is complete. `progress` is told how many of its bytes are here.
pub(super) fn ensure_blob(
    http: &Http,
    repository: &Repository,
    facts: &FileFacts,
    progress: &dyn Fn(u64),
) -> Result<(), HubError> {
    let (blob, incomplete) = (repository.blob(&facts.etag), repository.incomplete(&facts.etag));
    if is_complete(&blob, facts) {
        return Ok(());
    }
    let _lock = repository.lock(&facts.etag, LOCK_PATIENCE, &mut || {
        let here = incomplete.metadata().map_or(0, |metadata| metadata.len());
        progress(here.min(facts.len_bytes));
        here
    })?;
    // Another process may have completed it while this one waited.
    if is_complete(&blob, facts) {
        return Ok(());
    }
    let directory = blob.parent().unwrap_or_else(|| Path::new("."));
    fs::create_dir_all(directory).map_err(HubError::io("create", directory))?;
    let mut file = File::options()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(&incomplete)
        .map_err(HubError::io("open", &incomplete))?;
    download(http, facts, (&mut file, &incomplete), progress)?;
    if let Err(error) = verify(&mut file, &incomplete, facts) {
        // Nothing of it can be trusted, so nothing of it is resumed.
        file.set_len(0).map_err(HubError::io("empty", &incomplete))?;
        return Err(error);
    }
    file.sync_all().map_err(HubError::io("sync", &incomplete))?;
    fs::rename(&incomplete, &blob).map_err(HubError::io("rename", &incomplete))
}

/// Whether a blob, or what it links to, has the size that the server states.
pub(super) fn is_complete(path: &Path, facts: &FileFacts) -> bool {
    path.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.len() == facts.len_bytes)
}

/// Brings the file to its full length, resuming as often as the server gives more.
fn download(
    http: &Http,
    facts: &FileFacts,
    (file, path): (&mut File, &Path),
    progress: &dyn Fn(u64),
) -> Result<(), HubError> {
    let mut here = file.seek(SeekFrom::End(0)).map_err(HubError::io("read", path))?;
    if here > facts.len_bytes {
        here = restart(file, path)?;
    }
    let mut stalls = 0;
    while here < facts.len_bytes {
        let content = match http.content(facts, here) {
            Ok(content) => content,
            // The server cannot begin there: from the start, then.
            Err(HubError::Status { status: 416, .. }) if here > 0 => {
                here = restart(file, path)?;
                continue;
            }
            Err(error) => return Err(error),
        };
        if content.start != here {
            here = restart(file, path)?;
        }
        let before = here;
        here = copy(content.reader, (file, path), here, &|here| progress(here), facts)?;
        stalls = if here > before { 0 } else { stalls + 1 };
        if stalls == MAX_STALLS {
            let (url, expected_bytes) = (facts.url.clone(), facts.len_bytes);
            return Err(HubError::BrokenOff { url, expected_bytes, found_bytes: here, attempts: stalls });
        }
    }
    Ok(())
}

fn restart(file: &mut File, path: &Path) -> Result<u64, HubError> {
    file.set_len(0).map_err(HubError::io("empty", path))?;
    file.seek(SeekFrom::Start(0)).map_err(HubError::io("empty", path))
}

/// Appends what the reader gives until the file is whole or the connection breaks, and gives the length reached.
fn copy(
    mut reader: Box<dyn Read>,
    (file, path): (&mut File, &Path),
    mut here: u64,
    progress: &dyn Fn(u64),
    facts: &FileFacts,
) -> Result<u64, HubError> {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        // One byte more than there should be shows a server that sends too much.
        let room = (facts.len_bytes - here).saturating_add(1).min(as_u64(BUFFER_BYTES));
        let Some(space) = buffer.get_mut(..as_usize(room)) else { return Ok(here) };
        // A broken connection ends the answer early, with an error or without; the next request resumes either way.
        let Ok(count @ 1..) = reader.read(space) else { return Ok(here) };
        let received = here + as_u64(count);
        if received > facts.len_bytes {
            let (file, expected_bytes) = (facts.url.clone(), facts.len_bytes);
            return Err(HubError::Size { file, expected_bytes, found_bytes: received });
        }
        let bytes = space.get(..count).unwrap_or_default();
        file.write_all(bytes).map_err(HubError::io("write", path))?;
        here = received;
        progress(here);
    }
}

/// Checks the digest, where the etag is one: for every large file on the hub.
fn verify(file: &mut File, path: &Path, facts: &FileFacts) -> Result<(), HubError> {
    let is_sha256 = facts.etag.len() == 64 && facts.etag.bytes().all(|byte| byte.is_ascii_hexdigit());
    if !is_sha256 {
        return Ok(());
    }
    file.seek(SeekFrom::Start(0)).map_err(HubError::io("read", path))?;
    let (mut hasher, mut buffer) = (Sha256::new(), vec![0; BUFFER_BYTES]);
    loop {
        let count = file.read(&mut buffer).map_err(HubError::io("read", path))?;
        if count == 0 {
            break;
        }
        hasher.update(buffer.get(..count).unwrap_or_default());
    }
    let found: String = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    if found == facts.etag.to_ascii_lowercase() {
        Ok(())
    } else {
        Err(HubError::Digest { file: facts.url.clone(), expected: facts.etag.clone(), found })
    }
}
