//! The figures of one rank's load.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::plan::LoadPlan;
use crate::types::{Fqn, Rank, TensorDigest};

/// What one rank's load took.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoadReport {
    /// The rank.
    pub rank: Rank,
    /// Bytes that left storage at this rank.
    pub storage_bytes: u64,
    /// Payload bytes sent to peers.
    pub sent_bytes: u64,
    /// Payload bytes received.
    pub received_bytes: u64,
    /// Weights and statistics kept, without padding.
    pub weights_bytes: u64,
    /// Values that were quantized.
    pub quantized_values: u64,
    /// Input values that were NaN or infinite.
    pub non_finite_values: u64,
    /// Wall time in seconds.
    pub wall_s: f64,
    /// Time in each stage.
    pub stages: StageTimes,
    /// Peak resident memory of the process.
    pub peak_resident_bytes: u64,
    /// Where the weights lie, such as `host` or `cuda:0`.
    pub device: String,
    /// What moved the pieces: `tcp`, `nccl`, or nothing when nothing moved.
    pub backend: String,
    /// By tensor and component: the digests of the bytes that the rank owns; empty unless the plan asks for them.
    pub owned_digests: Vec<Vec<TensorDigest>>,
}

impl LoadReport {
    /// Of a rank that had nothing to load.
    #[must_use]
    pub fn of_nothing(rank: Rank) -> Self {
        Self {
            rank,
            storage_bytes: 0,
            sent_bytes: 0,
            received_bytes: 0,
            weights_bytes: 0,
            quantized_values: 0,
            non_finite_values: 0,
            wall_s: 0.0,
            stages: StageTimes::default(),
            peak_resident_bytes: 0,
            device: String::new(),
            backend: String::new(),
            owned_digests: Vec::new(),
        }
    }
}

/// The digest of every logical tensor, from the reports of all ranks in order; nothing when one has none.
#[must_use]
pub fn logical_digests(plan: &LoadPlan, reports: &[LoadReport]) -> Option<BTreeMap<Fqn, TensorDigest>> {
    if reports.len() != plan.world.count() {
        return None;
    }
    let mut digests = BTreeMap::new();
    for (index, tensor) in plan.tensors.iter().enumerate() {
        let mut digest = TensorDigest::empty();
        for component in 0..tensor.components().len() {
            for report in reports {
                digest = digest.append(*report.owned_digests.get(index)?.get(component)?);
            }
        }
        digests.insert(tensor.fqn.clone(), digest);
    }
    Some(digests)
}

/// Seconds spent in each stage, summed over the threads that work in it; waiting for others is not counted, except in
/// `exchange_s`, where it cannot be told from moving.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StageTimes {
    /// Getting the rank's memory: on a device with its context and page-locked buffers.
    pub allocate_s: f64,
    /// Reading from storage.
    pub read_s: f64,
    /// Quantizing and converting.
    pub encode_s: f64,
    /// In collectives.
    pub exchange_s: f64,
    /// Copying into the rank's own memory.
    pub place_s: f64,
}

/// Times and counts of one load that several threads add to, and that others may read while it goes on.
#[derive(Debug, Default)]
pub struct Meters {
    pub(super) allocate_ns: AtomicU64,
    pub(super) read_ns: AtomicU64,
    pub(super) encode_ns: AtomicU64,
    pub(super) exchange_ns: AtomicU64,
    pub(super) place_ns: AtomicU64,
    pub(super) quantized_values: AtomicU64,
    pub(super) non_finite_values: AtomicU64,
    pub(super) done_bytes: AtomicU64,
    /// Chunks in the queue between the reader's threads and the one that sends, and room for them.
    pub(super) queue_used: AtomicU64,
    pub(super) queue_capacity: AtomicU64,
}

impl Meters {
    /// Values that were quantized so far.
    #[must_use]
    pub fn quantized_values(&self) -> u64 {
        self.quantized_values.load(Ordering::Relaxed)
    }

    /// Chunks that wait in the reader's queue now, and room for them; the room is 0 for a rank that does not read.
    #[must_use]
    pub fn queue(&self) -> (u64, u64) {
        (self.queue_used.load(Ordering::Relaxed), self.queue_capacity.load(Ordering::Relaxed))
    }

    /// The time in each stage so far.
    #[must_use]
    pub fn stages(&self) -> StageTimes {
        let seconds = |meter: &AtomicU64| Duration::from_nanos(meter.load(Ordering::Relaxed)).as_secs_f64();
        StageTimes {
            allocate_s: seconds(&self.allocate_ns),
            read_s: seconds(&self.read_ns),
            encode_s: seconds(&self.encode_ns),
            exchange_s: seconds(&self.exchange_ns),
            place_s: seconds(&self.place_ns),
        }
    }
}

/// Runs `work` and adds its time to `meter`.
pub(super) fn timed<R>(meter: &AtomicU64, work: impl FnOnce() -> R) -> R {
    let start = crate::clock::now();
    let result = work();
    let nanoseconds = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
    meter.fetch_add(nanoseconds, Ordering::Relaxed);
    result
}
