//! Peak resident memory of this process, as the kernel counts it.

use crate::store::{LocalStore, ReadAt, Store};

/// `VmHWM` of /proc/self/status in bytes; 0 where there is no /proc.
#[must_use]
pub(crate) fn peak_resident_bytes() -> u64 {
    let store = LocalStore::new("/proc/self");
    let Ok(file) = store.open("status") else { return 0 };
    read_to_end(file.as_ref())
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
        .map_or(0, |kilobytes| kilobytes * 1024)
}

/// Files below /proc have length 0 and are read until they end.
fn read_to_end(file: &dyn ReadAt) -> String {
    let mut text = Vec::new();
    let mut byte = [0; 1];
    while text.len() < 8192 && file.read_exact_at(crate::types::as_u64(text.len()), &mut byte).is_ok() {
        text.push(byte[0]);
    }
    String::from_utf8_lossy(&text).into_owned()
}
