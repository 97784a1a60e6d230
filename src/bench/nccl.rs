//! NCCL with one rank on CUDA device 0: it loads, connects without blocking, and works on the device's stream.

use std::path::PathBuf;

use super::{BenchError, Figure, GIGA, float, median_s, timed};
use crate::comm::nccl::{NcclConfig, NcclLibrary, connect};
use crate::comm::tcp::DEFAULT_DEADLINE;
use crate::comm::{Communicator as _, Group};
use crate::device::{Device, DeviceContext};
use crate::types::{Rank, WorldSize, as_u64};

const BYTES: usize = 256 << 20;
const RUNS: usize = 5;

/// Connecting, a barrier, and a sum over one rank, whose values must stay.
///
/// # Errors
/// [`BenchError`], also when a value changed.
pub fn nccl(library: Option<PathBuf>) -> Result<Vec<Figure>, BenchError> {
    let library = NcclLibrary::load(library.as_deref()).map_err(BenchError::of)?;
    let device = Device::Cuda { ordinal: 0 };
    let unique_id = library.unique_id().map_err(BenchError::of)?;
    let name = format!("NCCL {}", library.version());
    let group = Group { rank: Rank::ZERO, world: WorldSize::ONE };
    let (deadline, idle_deadline) = (DEFAULT_DEADLINE, DEFAULT_DEADLINE);
    let mut connected = Err(BenchError(String::new()));
    let connecting = timed(|| {
        let config = NcclConfig { group, library, unique_id, device, deadline, idle_deadline };
        connected = connect(config).map_err(BenchError::of);
    });
    let mut comm = connected?;
    comm.barrier().map_err(BenchError::of)?;
    let context = DeviceContext::open(device).map_err(BenchError::of)?;
    let pattern: Vec<u8> = (0..BYTES / 4).flat_map(|_| 1.25_f32.to_le_bytes()).collect();
    let mut memory = context.allocate(BYTES).map_err(BenchError::of)?;
    context.copy_from_host(memory.as_slice_mut(), &pattern).map_err(BenchError::of)?;
    let mut other = context.allocate(BYTES).map_err(BenchError::of)?;
    let copied = median_s(RUNS, || {
        let mut result = Ok(());
        let time = timed(|| result = context.copy(other.as_slice_mut(), memory.as_slice()));
        result.map(|()| time).map_err(BenchError::of)
    })?;
    let summed = median_s(RUNS, || {
        let mut result = Ok(());
        let time = timed(|| result = comm.all_reduce(memory.as_slice_mut()));
        result.map(|()| time).map_err(BenchError::of)
    })?;
    let mut found = vec![0; BYTES];
    context.copy_to_host(&mut found, memory.as_slice()).map_err(BenchError::of)?;
    if found != pattern {
        return Err(BenchError(format!("{name}: a sum over one rank changed values")));
    }
    let rate = |seconds: f64| float(as_u64(BYTES)) / seconds / GIGA;
    let limit = (rate(copied), "copying on the device");
    Ok(vec![
        Figure::new(format!("{name}: connect"), connecting.as_secs_f64(), "s", (connecting.as_secs_f64(), "itself")),
        Figure::new(format!("{name}: all_reduce, one rank"), rate(summed), "GB/s", limit),
    ])
}
