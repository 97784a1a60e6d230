//! The room that entries take: which there are, which must go, and whether they hold.

use super::entry::{ABOUT, remove_file};
use super::layout::{FileOnDisk, SUFFIX};
use super::{CacheError, CachePlace};
use crate::checkpoint::VerifiedFile;
use crate::store::{LocalStore, LockKind, Store as _, StoreError, read_small};

/// Entries that are being removed.
const REMOVED: &str = ".removed-";
/// Room that stays free on the medium.
const RESERVE_BYTES: u64 = 1 << 30;

/// An entry of the cache.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct ListedEntry {
    /// Its key.
    pub key: String,
    /// What it says of itself: the model and the forms of its tensors.
    pub about: serde_json::Value,
    /// Bytes of its files.
    pub bytes: u64,
    /// When it was used last, in nanoseconds since 1970.
    pub used_ns: i128,
    /// Whether a job holds it.
    pub in_use: bool,
}

/// What the verification of an entry has found.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct CheckedEntry {
    /// Its key.
    pub key: String,
    /// Bytes that hold.
    pub bytes: u64,
    /// Files that did not hold, and were removed: what was wrong with each.
    pub damaged: Vec<String>,
}

/// All entries, the one that was used longest ago first.
///
/// # Errors
/// [`CacheError::Store`].
pub fn list(place: &CachePlace) -> Result<Vec<ListedEntry>, CacheError> {
    let cache = LocalStore::new(&place.root);
    let mut entries = Vec::new();
    for key in cache.list("")?.into_iter().filter(|name| is_key(name)) {
        let mut bytes = 0;
        for name in cache.list(&key)? {
            // Another process may finish or remove a file meanwhile.
            bytes += cache.open(&format!("{key}/{name}")).map_or(0, |file| file.len_bytes());
        }
        let about = read_small(&cache, &format!("{key}/{ABOUT}"), 1 << 20).ok();
        let about = about.and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
        let Ok(used_ns) = cache.modified_ns(&key) else { continue };
        let in_use = cache.lock(&key, LockKind::Exclusive)?.is_none();
        entries.push(ListedEntry { key, about, bytes, used_ns, in_use });
    }
    entries.sort_by(|one, other| (one.used_ns, &one.key).cmp(&(other.used_ns, &other.key)));
    Ok(entries)
}

/// Removes entries, the one that was used longest ago first, until what all take and `needed_bytes` more is within the
/// place's bound; never the entry `keep`, nor one that a job holds. Says whether there is room now, on the medium too.
///
/// # Errors
/// [`CacheError::Store`].
pub fn make_room(place: &CachePlace, keep: &str, needed_bytes: u64) -> Result<bool, CacheError> {
    let cache = LocalStore::new(&place.root);
    let entries = list(place)?;
    let mut taken: u64 = entries.iter().map(|entry| entry.bytes).sum();
    for entry in entries.iter().filter(|entry| entry.key != keep && !entry.in_use) {
        if taken.saturating_add(needed_bytes) <= place.max_bytes {
            break;
        }
        if remove_entry(&cache, &entry.key)? {
            tracing::info!(key = entry.key, bytes = entry.bytes, "an entry of the cache makes room");
            taken = taken.saturating_sub(entry.bytes);
        }
    }
    let free_bytes = cache.free_bytes()?.saturating_sub(RESERVE_BYTES);
    let fits = taken.saturating_add(needed_bytes) <= place.max_bytes;
    if !fits || free_bytes < needed_bytes {
        let max_bytes = place.max_bytes;
        tracing::warn!(
            needed_bytes,
            taken_bytes = taken,
            max_bytes,
            free_bytes,
            "no room in the cache: nothing is kept"
        );
    }
    Ok(fits && free_bytes >= needed_bytes)
}

/// Removes an entry that nobody holds: out of sight first, then its files.
fn remove_entry(cache: &LocalStore, key: &str) -> Result<bool, StoreError> {
    let Some(_lock) = cache.lock(key, LockKind::Exclusive)? else { return Ok(false) };
    let hidden = format!("{REMOVED}{key}-{}", std::process::id());
    cache.publish(key, &hidden)?;
    cache.remove(&hidden)?;
    Ok(true)
}

/// Reads every byte of every entry; files that do not hold are removed.
///
/// # Errors
/// [`CacheError::Store`] when the cache cannot be read or changed.
pub fn verify(place: &CachePlace) -> Result<Vec<CheckedEntry>, CacheError> {
    let mut checked = Vec::new();
    for entry in list(place)? {
        let store = LocalStore::new(place.root.join(&entry.key));
        let mut result = CheckedEntry { key: entry.key, bytes: 0, damaged: Vec::new() };
        for name in store.list("")?.iter().filter(|name| name.ends_with(SUFFIX)) {
            let verified = FileOnDisk::open(&store, name).and_then(|file| {
                let open = VerifiedFile::open(&store, name, file.len_bytes, file.digest_table)?;
                open.read_all(|_, _| {})?;
                Ok(file.len_bytes)
            });
            match verified {
                Ok(bytes) => result.bytes += bytes,
                Err(error) => {
                    result.damaged.push(error.to_string());
                    remove_file(&store, name)?;
                }
            }
        }
        checked.push(result);
    }
    Ok(checked)
}

fn is_key(name: &str) -> bool {
    name.len() == 32 && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}
