//! Memory of each rank under a plan, exactly for weights and statistics, as named constants for the rest.

use serde::{Deserialize, Serialize};

use super::{LoadPlan, Strategy};
use crate::types::{BackendWish, DeviceWish, Rank, Sharing};

/// Every kept component starts at a multiple of this in a rank's memory: a cache line, and what vector loads and CUDA
/// copies like.
pub const ARENA_ALIGN_BYTES: u64 = 64;

/// What a worker takes besides weights and window: program, runtime threads and their stacks, gRPC, the plan itself.
/// Measured peak of a worker that loads tiny-llama: see docs/MEASUREMENTS.md.
pub const PROCESS_OVERHEAD_BYTES: u64 = 48 << 20;

/// Socket and staging buffers of the data plane of one rank.
pub const STAGING_BYTES: u64 = 16 << 20;

/// The host's side of a CUDA context: the driver's own memory, and the page-locked buffers of the arena. With the two
/// figures above it stays below the 256 MiB that a rank that does not read may take; not measured on a device yet.
pub const CUDA_HOST_BYTES: u64 = 176 << 20;

/// What a process takes on a device before it allocates: its context, and a piece on its way to other ranks. Contexts of
/// current devices take about 500 MB; not measured on a device yet.
pub const CUDA_CONTEXT_BYTES: u64 = 576 << 20;

/// Where the ranks' weights are to lie, and what moves them there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DeviceRule {
    /// Host or CUDA devices; [`DeviceWish::Auto`] only where the plan was made without knowing the ranks' hosts: then each
    /// rank takes what it finds, and the accounts below count host memory.
    pub device: DeviceWish,
    /// Whether ranks may share a device.
    pub sharing: Sharing,
    /// What moves pieces between ranks.
    pub backend: BackendWish,
}

/// Memory that the ranks may use; absent means: not checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryBudget {
    /// Host memory for each rank by itself.
    pub per_rank_bytes: Option<u64>,
    /// For all ranks of one host together.
    pub host_bytes: Option<u64>,
    /// CUDA devices, when the weights go there.
    pub devices: Option<DeviceBudget>,
}

/// The CUDA devices of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceBudget {
    /// How many the ranks use.
    pub count: u32,
    /// The bytes that are free on the fullest of them.
    pub free_bytes: u64,
}

/// The memory of one rank in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankMemory {
    /// The rank.
    pub rank: Rank,
    /// Weights and statistics that it keeps, on the host or on a device: exact, without padding.
    pub weights_bytes: u64,
    /// Padding between them.
    pub padding_bytes: u64,
    /// Bytes in flight while it reads; 0 for a rank that does not read.
    pub window_bytes: u64,
    /// What training takes of the host's memory beside the weights; 0 for a job that does not train. It comes after the load,
    /// when the window is free again.
    #[serde(default)]
    pub training_bytes: u64,
    /// [`PROCESS_OVERHEAD_BYTES`], beside other ranks [`STAGING_BYTES`], and with a device [`CUDA_HOST_BYTES`].
    pub overhead_bytes: u64,
    /// The most host memory that the rank needs at any time: all of the above, the larger of window and training, without weights and padding
    /// when they lie on a device.
    pub peak_host_bytes: u64,
    /// The most device memory that it needs: weights, padding, [`CUDA_CONTEXT_BYTES`] and what a step of training computes
    /// with; 0 without a device.
    pub peak_device_bytes: u64,
}

impl RankMemory {
    /// Weights and padding in host memory.
    #[must_use]
    pub const fn host_weights_bytes(&self) -> u64 {
        if self.peak_device_bytes == 0 { self.weights_bytes + self.padding_bytes } else { 0 }
    }
}

/// `bytes` rounded up to [`ARENA_ALIGN_BYTES`].
#[must_use]
pub const fn aligned(bytes: u64) -> u64 {
    bytes.div_ceil(ARENA_ALIGN_BYTES) * ARENA_ALIGN_BYTES
}

impl LoadPlan {
    /// Whether `rank` reads from storage.
    #[must_use]
    pub fn reads(&self, rank: Rank) -> bool {
        match self.strategy {
            Strategy::LowMemory => rank == Rank::ZERO,
            Strategy::Full | Strategy::Streaming => true,
            Strategy::Striped => self.tensors.iter().any(|tensor| tensor.reader == rank),
        }
    }

    /// The memory of `rank`, with all models that it holds.
    #[must_use]
    pub fn memory(&self, rank: Rank) -> RankMemory {
        let mut memory = self.own_memory(rank);
        for other in &self.others {
            let other = other.plan.own_memory(rank);
            let before = memory.window_bytes.max(memory.training_bytes);
            memory.weights_bytes += other.weights_bytes;
            memory.padding_bytes += other.padding_bytes;
            memory.window_bytes = memory.window_bytes.max(other.window_bytes);
            memory.peak_host_bytes += memory.window_bytes.max(memory.training_bytes) - before;
            if other.peak_device_bytes == 0 {
                memory.peak_host_bytes += other.weights_bytes + other.padding_bytes;
            } else {
                memory.peak_device_bytes += other.weights_bytes + other.padding_bytes;
            }
        }
        memory
    }

    fn own_memory(&self, rank: Rank) -> RankMemory {
        let (mut weights, mut padded) = (0, 0);
        let resident = self.tensors.iter().filter(|tensor| !self.streams(tensor));
        for holding in resident.flat_map(|tensor| tensor.holdings(rank, self.world)) {
            weights += holding.kept.len();
            padded += aligned(holding.kept.len());
        }
        let window = if self.reads(rank) { self.window_bytes() } else { 0 };
        let on_device = self.device.device == DeviceWish::Cuda;
        let training = self.train.as_ref().and_then(|train| train.memory.get(rank.index()));
        let (training, on_device_training) = match training {
            Some(train) if on_device => (train.beside_device_bytes(), train.device_bytes()),
            Some(train) => (train.total_bytes(), 0),
            None => (0, 0),
        };
        // What streams is read while the rank trains.
        let training = if self.strategy == Strategy::Streaming { training + window } else { training };
        let staging = if self.world.get() > 1 { STAGING_BYTES } else { 0 };
        let overhead = PROCESS_OVERHEAD_BYTES + staging + if on_device { CUDA_HOST_BYTES } else { 0 };
        let (host, device) =
            if on_device { (0, padded + CUDA_CONTEXT_BYTES + on_device_training) } else { (padded, 0) };
        RankMemory {
            rank,
            weights_bytes: weights,
            padding_bytes: padded - weights,
            window_bytes: window,
            training_bytes: training,
            overhead_bytes: overhead,
            peak_host_bytes: host + window.max(training) + overhead,
            peak_device_bytes: device,
        }
    }
}
