//! Memory on the host and on CUDA devices, behind one set of types.
//!
//! Owns: finding devices and dealing them out to ranks, owned memory ([`Memory`]), borrowed views of it ([`Slice`], [`SliceMut`]), copies between host
//! and device, pinned staging buffers.
//! Refuses to know: tensors, dtypes, plans, collectives, configuration and the environment.
//!
//! - `DV-1`: a missing driver is an answer in plain words, never a panic and never a link-time dependency.
//! - `DV-2`: two `SliceMut` never name the same byte.
//! - `DV-3`: a call returns when the device is done with it; [`Arena`] alone lets copies go on, of memory that it owns.

mod arena;
mod assign;
mod cuda;
mod error;
mod host;
mod kernels;
mod memory;
mod slice;

pub use arena::{Arena, LANE_BYTES};
pub use assign::{LocalRank, assign, free_bytes};
pub use error::DeviceError;
pub use kernels::{DeviceNested, DeviceSource, QuantKernels};
pub use memory::{DeviceContext, HostStaging, Memory, MemoryInfo};
pub use slice::{CudaSlice, CudaSliceMut, OutOfRange, Slice, SliceMut};

use std::fmt;

/// Where bytes lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Device {
    /// Memory of this process.
    Host,
    /// Memory of one CUDA device.
    Cuda {
        /// The index of the device as the driver counts the visible ones, from 0.
        ordinal: u32,
    },
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => f.write_str("host"),
            Self::Cuda { ordinal } => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// What is known of one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Which one.
    pub device: Device,
    /// Its name, such as `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// All its memory; of the host, what the kernel counts, whatever limit a control group sets.
    pub total_bytes: u64,
    /// CUDA's compute capability, major and minor; nothing for the host.
    pub compute_capability: Option<(u32, u32)>,
}

/// The devices of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// The host first, then the CUDA devices in the driver's order.
    pub devices: Vec<DeviceInfo>,
    /// Why there is no CUDA device, in plain words; nothing when there is one.
    pub no_gpu_reason: Option<String>,
}

/// Looks for devices. Takes no memory on them.
#[must_use]
pub fn probe() -> Probe {
    let system = rustix::system::sysinfo();
    let host = DeviceInfo {
        device: Device::Host,
        name: "host".to_owned(),
        total_bytes: system.totalram.saturating_mul(u64::from(system.mem_unit)),
        compute_capability: None,
    };
    let (gpus, no_gpu_reason) = match cuda::devices() {
        Ok(gpus) if gpus.is_empty() => (gpus, Some("the NVIDIA driver finds no device".to_owned())),
        Ok(gpus) => (gpus, None),
        Err(error) => (Vec::new(), Some(error.to_string())),
    };
    Probe { devices: std::iter::once(host).chain(gpus).collect(), no_gpu_reason }
}
