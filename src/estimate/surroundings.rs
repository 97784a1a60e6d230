//! What a model is to run on: devices, the host, and what its files are read from.
//!
//! Owns: how many threads read. Refuses to know: how any of it was found.

use serde::Serialize;

/// Source bytes that one thread of a reader reads and encodes in a second: 2 GB of bf16 in NF4 took 1.4 to 1.6 s of the
/// threads' time (docs/MEASUREMENTS.md).
pub(super) const READER_BYTES_PER_SECOND: u64 = 1_300_000_000;

/// Requests to a remote place that are under way at once, each of a thread: where answers wait 30 ms, 16 of 1 MiB are half a
/// gigabyte per second.
pub(super) const REMOTE_READERS: u32 = 16;

/// What local files are taken to give where nobody says: one NVMe device of a server.
pub const LOCAL_BYTES_PER_SECOND: u64 = 3_000_000_000;

/// What a model's files are read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Storage {
    /// A file system, which gives so much in a second.
    Files {
        /// Bytes.
        bytes_per_second: u64,
    },
    /// An object store or a web server.
    Remote,
}

/// What a model is to run on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Surroundings {
    /// The memory of each CUDA device, one rank each; of none, ranks compute on the host.
    pub device_bytes: Vec<u64>,
    /// The host's memory for all ranks together; nothing when it does not limit.
    pub host_bytes: Option<u64>,
    /// The host's processors.
    pub processors: u32,
    /// Where the files are.
    pub storage: Storage,
}

impl Surroundings {
    /// Threads that read, and why so many.
    pub(super) fn readers(&self) -> (u32, String) {
        let Storage::Files { bytes_per_second } = self.storage else {
            let why = "that many requests hide what a remote place takes to answer";
            return (REMOTE_READERS, format!("{REMOTE_READERS} reader threads: {why}"));
        };
        let needed = bytes_per_second.div_ceil(READER_BYTES_PER_SECOND).max(1);
        let most = self.processors.clamp(1, 64);
        let threads = u32::try_from(needed).unwrap_or(u32::MAX).min(most);
        let rate = format!("{:.1} GB/s of storage", crate::types::as_f64(bytes_per_second) / 1e9);
        let why = match u64::from(threads) < needed {
            true => format!("as many as there are processors, which {rate} keep busy"),
            false => format!("they keep up with {rate}"),
        };
        (threads, format!("{threads} reader threads: {why}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By hand: 3.0 / 1.3 GB/s are 2.3 threads; 0.2 GB/s need one; 20 GB/s need 16 of which 8 are there.
    #[test]
    fn threads_follow_storage_and_processors() {
        let threads = |bytes_per_second, processors| {
            let storage = Storage::Files { bytes_per_second };
            Surroundings { device_bytes: Vec::new(), host_bytes: None, processors, storage }.readers()
        };
        assert_eq!(threads(3_000_000_000, 16).0, 3);
        assert_eq!(threads(200_000_000, 16).0, 1);
        let (count, why) = threads(20_000_000_000, 8);
        assert!(count == 8 && why.contains("as many as there are processors"), "{why}");
        let remote =
            Surroundings { device_bytes: Vec::new(), host_bytes: None, processors: 2, storage: Storage::Remote };
        assert_eq!(remote.readers().0, 16);
    }
}
