//! What the kernel says of this process: its peak resident memory, and whether it ignores SIGHUP.

use crate::store::{LocalStore, ReadAt, Store};

/// `VmHWM` of /proc/self/status in bytes; 0 where there is no /proc.
#[must_use]
pub(crate) fn peak_resident_bytes() -> u64 {
    status()
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
        .map_or(0, |kilobytes| kilobytes * 1024)
}

/// Whether SIGHUP, signal 1, is ignored, as whoever started this process may have chosen.
pub(super) fn ignores_hangup() -> bool {
    let ignored = status().lines().find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok());
    ignored.is_some_and(|ignored| ignored & 1 == 1)
}

fn status() -> String {
    let store = LocalStore::new("/proc/self");
    store.open("status").map_or_else(|_| String::new(), |file| read_to_end(file.as_ref()))
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
