//! Memory of each rank under a plan, exactly for weights and statistics, as named constants for the rest.

use serde::{Deserialize, Serialize};

use super::{LoadPlan, Strategy};
use crate::types::Rank;

/// Every kept component starts at a multiple of this in a rank's memory: a cache line, and what vector loads and CUDA
/// copies like.
pub const ARENA_ALIGN_BYTES: u64 = 64;

/// What a worker takes besides weights and window: program, runtime threads and their stacks, gRPC, the plan itself.
/// Measured peak of a worker that loads tiny-llama: see docs/MEASUREMENTS.md.
pub const PROCESS_OVERHEAD_BYTES: u64 = 48 << 20;

/// Socket and staging buffers of the data plane of one rank.
pub const STAGING_BYTES: u64 = 16 << 20;

/// Memory that the ranks may use; absent means: not checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryBudget {
    /// For each rank by itself.
    pub per_rank_bytes: Option<u64>,
    /// For all ranks of one host together.
    pub host_bytes: Option<u64>,
}

/// The memory of one rank in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankMemory {
    /// The rank.
    pub rank: Rank,
    /// Weights and statistics that it keeps: exact, without padding.
    pub weights_bytes: u64,
    /// Padding between them.
    pub padding_bytes: u64,
    /// Bytes in flight while it reads; 0 for a rank that does not read.
    pub window_bytes: u64,
    /// [`PROCESS_OVERHEAD_BYTES`] and [`STAGING_BYTES`].
    pub overhead_bytes: u64,
    /// The sum: the most that the rank needs at any time of the load.
    pub peak_host_bytes: u64,
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
            Strategy::Full => true,
            Strategy::Striped => self.tensors.iter().any(|tensor| tensor.reader == rank),
        }
    }

    /// The memory of `rank`.
    #[must_use]
    pub fn memory(&self, rank: Rank) -> RankMemory {
        let (mut weights, mut padded) = (0, 0);
        for holding in self.tensors.iter().flat_map(|tensor| tensor.holdings(rank, self.world)) {
            weights += holding.kept.len();
            padded += aligned(holding.kept.len());
        }
        let window = if self.reads(rank) { self.window_bytes() } else { 0 };
        let overhead = PROCESS_OVERHEAD_BYTES + STAGING_BYTES;
        RankMemory {
            rank,
            weights_bytes: weights,
            padding_bytes: padded - weights,
            window_bytes: window,
            overhead_bytes: overhead,
            peak_host_bytes: padded + window + overhead,
        }
    }
}
