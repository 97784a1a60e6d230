//! The room that entries take, with files of a few bytes; whole loads through the cache are in `tests/cache.rs`.

use std::path::Path;

use super::{CachePlace, list, make_room, verify};
use crate::store::{LocalStore, LockKind, Store as _, write_small};

const KEYS: [&str; 3] =
    ["00000000000000000000000000000001", "00000000000000000000000000000002", "00000000000000000000000000000003"];

/// Three entries of 1000 bytes; the later ones were used later.
fn three(root: &Path) -> LocalStore {
    let store = LocalStore::new(root);
    for key in KEYS {
        store.create_dir(key).expect("it is writable");
        write_small(&store, &format!("{key}/00000-0.safetensors"), &[0; 1000]).expect("it is writable");
    }
    for key in KEYS {
        store.lock(key, LockKind::Shared).expect("flock").expect("free").touch().expect("it is ours");
    }
    store
}

fn keys(place: &CachePlace) -> Vec<String> {
    list(place).expect("it can be listed").into_iter().map(|entry| entry.key).collect()
}

/// By hand: 3000 bytes are taken. For 500 more within 2600 one entry must go, the one that was used longest ago and is not
/// held; what is held stays even where there is then no room.
#[test]
fn the_oldest_entry_that_nobody_holds_makes_room() {
    let root = tempfile::tempdir().expect("a directory");
    let store = three(root.path());
    let place = |max_bytes| CachePlace { root: root.path().to_owned(), max_bytes };
    assert!(make_room(&place(3500), "", 500).expect("it can be listed"));
    assert_eq!(keys(&place(0)), KEYS);
    let held = store.lock(KEYS[0], LockKind::Shared).expect("flock").expect("free");
    assert!(make_room(&place(2600), "", 500).expect("it can be listed"));
    assert_eq!(keys(&place(0)), [KEYS[0], KEYS[2]]);
    assert!(!make_room(&place(900), KEYS[2], 0).expect("it can be listed"), "one is held, one is to be kept");
    assert_eq!(keys(&place(0)), [KEYS[0], KEYS[2]]);
    drop(held);
    assert!(make_room(&place(1000), KEYS[2], 0).expect("it can be listed"));
    assert_eq!(keys(&place(0)), [KEYS[2]]);
    assert_eq!(std::fs::read_dir(root.path()).expect("a directory").count(), 1, "nothing hidden stays");
}

/// What is no file of weights is found and removed, and nothing else.
#[test]
fn files_that_do_not_hold_are_removed() {
    let root = tempfile::tempdir().expect("a directory");
    let _store = three(root.path());
    let place = CachePlace { root: root.path().to_owned(), max_bytes: 0 };
    let checked = verify(&place).expect("it can be listed");
    assert_eq!(checked.len(), 3);
    for entry in &checked {
        assert_eq!((entry.bytes, entry.damaged.len()), (0, 1));
        assert!(entry.damaged[0].contains("00000-0.safetensors"), "{}", entry.damaged[0]);
    }
    let again = verify(&place).expect("it can be listed");
    assert!(again.iter().all(|entry| entry.damaged.is_empty()));
}

#[test]
fn a_cache_that_is_not_there_is_empty() {
    let root = tempfile::tempdir().expect("a directory");
    let place = CachePlace { root: root.path().join("none"), max_bytes: 0 };
    assert!(keys(&place).is_empty());
}
