//! Know before you load: how much memory a model takes on each rank, whether it fits, and how to place it.
//!
//! Owns: published models by name ([`ModelProfile`]), the memory of each rank by terms ([`estimate`]), and the placement of
//! layers on unequal devices ([`DeviceMap`]). docs/ESTIMATES.md states every assumption, and compares with measurements.
//! Refuses to know: files, devices, processes. Memory sizes are arguments.
//!
//! Invariants:
//! - `ES-1`: weights and their statistics are those of a [`LoadPlan`](crate::plan::LoadPlan) made by the same code as for
//!   files, so what is predicted is what is allocated.
//! - `ES-2`: a rank's terms are those of one moment, its worst, and add up to its peak.
//! - `ES-3`: more sequences or longer ones never take less memory.

mod base;
mod compute;
mod device_map;
mod error;
mod fit;
mod other_tools;
mod picture;
mod profile;
mod pytorch;
mod recommend;
mod report;
mod sizes;
mod surroundings;
mod workload;

pub use base::{plan_without_files, trained_tensors};
pub use compute::estimate;
pub use device_map::{DeviceMap, DeviceMapError, Objective, Place, Unit};
pub use error::EstimateError;
pub use fit::{Change, Fit, Fitted, OffloadGain};
pub use other_tools::OtherTool;
pub use picture::Picture;
pub use profile::{ModelProfile, ProfileError, ProfileFields};
pub use recommend::{Advice, Recommendation, recommend};
pub use report::{Estimate, Moment, RankEstimate};
pub use surroundings::{LOCAL_BYTES_PER_SECOND, Storage, Surroundings};
pub use workload::{Attention, MemoryKind, Method, Optimizer, Purpose, TrainEngine, Training, Workload};

/// What PyTorch's caching allocator has reserved for 100 bytes that are allocated at the worst moment.
///
/// The published measurements state both for one configuration (Llama-2 7B, LoRA, one sequence): 10.22 GiB reserved for 9.16
/// allocated with 2048 tokens, 10.24 for 8.28 with 512: 1.116 and 1.237, in the middle 1.18.
pub const RESERVED_PERCENT: u64 = 118;

/// NCCL's buffers on a device: 16 channels, to and from a neighbour, of 4 MiB each (`NCCL_BUFFSIZE`); not measured.
pub const NCCL_BYTES: u64 = 16 * 2 * (4 << 20);

#[cfg(test)]
mod published_tests;
