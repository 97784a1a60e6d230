//! What work with memory and devices can fail with.
//!
//! Owns: [`DeviceError`]. Refuses to know: how a driver is called.

use crate::error::{Classify, Kind};
use crate::quant::QuantError;

use super::{Device, OutOfRange};

/// Finding a device, allocating on it or copying failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "each field is what the message says")]
pub enum DeviceError {
    /// There is no usable driver; `reason` says why in plain words.
    #[error("{reason}")]
    NoDriver { reason: String },
    /// The driver sees fewer devices.
    #[error("device cuda:{ordinal} of {count} visible devices")]
    NoDevice { ordinal: u32, count: u32 },
    /// The driver refused something.
    #[error("{what} on {device}: {name}: {description}")]
    Driver { device: Device, what: &'static str, name: String, description: String },
    /// The memory does not suffice.
    #[error("{bytes} bytes on {device}: out of memory")]
    OutOfMemory { device: Device, bytes: usize },
    /// Memory of another device than the context's.
    #[error("expected memory on {expected}, found memory on {found}")]
    WrongDevice { expected: Device, found: Device },
    /// The two sides of a copy differ in length.
    #[error("copy of {from} bytes into {into} bytes")]
    LengthMismatch { from: usize, into: usize },
    /// A range that is not within the memory.
    #[error(transparent)]
    OutOfRange {
        #[from]
        source: OutOfRange,
    },
    /// Arguments of a kernel that do not fit together.
    #[error(transparent)]
    Quant {
        #[from]
        source: QuantError,
    },
    /// An address that is no multiple of what a kernel needs.
    #[error("{what}: expected an address that is a multiple of {bytes} bytes")]
    Misaligned { what: &'static str, bytes: u64 },
    /// Fewer devices than ranks, and sharing was not asked for.
    #[error(
        "{ranks} ranks on this host and {count} CUDA devices: run at most {count} ranks, let them share devices (--share-devices), or keep the weights on the host (--device cpu)"
    )]
    TooFewDevices { ranks: u32, count: u32 },
}

impl Classify for DeviceError {
    fn kind(&self) -> Kind {
        match self {
            Self::Driver { .. } => Kind::Unavailable,
            Self::OutOfMemory { .. } => Kind::Exhausted,
            Self::WrongDevice { .. }
            | Self::LengthMismatch { .. }
            | Self::OutOfRange { .. }
            | Self::Misaligned { .. } => Kind::Internal,
            Self::Quant { source } => source.kind(),
            // The environment cannot do what was asked.
            Self::NoDriver { .. } | Self::NoDevice { .. } | Self::TooFewDevices { .. } => Kind::Conflict,
        }
    }
}
