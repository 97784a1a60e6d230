//! Collectives between the ranks of one generation.
//!
//! Owns: the [`Communicator`] trait, its errors, aborting and counting, and the backends: [`mem`] (threads of one
//! process), [`tcp`] (processes and hosts) and [`nccl`] (GPUs).
//! Refuses to know: tensors, plans, checkpoints, the coordinator, configuration and the environment.
//!
//! Calls block: a communicator lives on a thread of its own. Every rank makes the same calls in the same order; that
//! order comes from the plan.
//!
//! - `CM-1`: messages between two ranks are strictly ordered and say what they are; ranks that follow different plans get
//!   [`CommError::Mismatch`] with what was expected and what was found, not a hang and not garbage.
//! - `CM-2`: every wait ends: by progress, by [`AbortHandle::abort`], by the loss of a peer, or by a deadline without
//!   progress.
//! - `CM-3`: after an error that may have left a message half sent, the communicator is closed, its peers are told why,
//!   and later calls return the same error.
//! - `CM-4`: a sum adds the ranks' values in one fixed order, so it has the same bits on every rank and in every run with
//!   as many ranks. With [`mem`] and [`tcp`] it is the order of the ranks.
//! - `CM-5`: nothing that a peer sends makes us allocate more than a named limit.

mod abort;
#[cfg(test)]
pub(crate) mod conformance;
mod counters;
mod error;
pub mod mem;
pub mod nccl;
mod patience;
mod reduce;
pub mod tcp;

pub use abort::AbortHandle;
pub use counters::{Counters, Traffic};
pub use error::{CommError, MessageId, Operation, Refusal};

use crate::device::{Device, Slice, SliceMut};
use crate::types::{Rank, WorldSize};

/// Who we are among how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    /// Our rank.
    pub rank: Rank,
    /// The number of ranks.
    pub world: WorldSize,
}

/// The two sides of a scatter.
#[derive(Debug)]
pub enum Scatter<'a> {
    /// The root's side: one part for each rank, in the order of ranks. The root's own part must be empty: it has it
    /// already. A rank whose part is empty takes no part in the call.
    Send {
        /// The parts.
        parts: &'a [Slice<'a>],
    },
    /// A receiver's side. Its length is part of the plan; the root sends exactly as many bytes.
    Receive {
        /// Where the part goes.
        into: SliceMut<'a>,
    },
}

/// The collectives. All calls block until this rank's part is done; none waits for an acknowledgement of its peers,
/// except [`Communicator::barrier`].
///
/// # Errors
/// Every call: [`CommError`]. Errors of argument checks leave the communicator usable; all others close it (`CM-3`).
pub trait Communicator: Send {
    /// Who we are among how many.
    fn group(&self) -> Group;

    /// Copies the root's buffer into the buffers of all others, which are as long. Does nothing in a world of one.
    ///
    /// # Errors
    /// See the trait.
    fn broadcast(&mut self, root: Rank, buffer: SliceMut<'_>) -> Result<(), CommError>;

    /// Sends each rank its own part. Ranks whose part is empty do not call; with one part that is not empty this is a
    /// plain send from the root to one owner.
    ///
    /// # Errors
    /// See the trait.
    fn scatter(&mut self, root: Rank, parts: Scatter<'_>) -> Result<(), CommError>;

    /// Puts the parts of all ranks one after the other, in the order of ranks, into everybody's `recv`. `counts[r]` is
    /// the length of rank `r`'s part in bytes.
    ///
    /// # Errors
    /// See the trait.
    fn all_gather(&mut self, send: Slice<'_>, recv: SliceMut<'_>, counts: &[usize]) -> Result<(), CommError>;

    /// Sums the `f32` buffers `send` of all ranks (`CM-4`) and gives rank `r` the part of `counts[r]` elements that
    /// follows the parts of the ranks before it.
    ///
    /// # Errors
    /// See the trait.
    fn reduce_scatter(&mut self, send: Slice<'_>, recv: SliceMut<'_>, counts: &[usize]) -> Result<(), CommError>;

    /// Replaces everybody's `f32` buffer by the sum over all ranks (`CM-4`).
    ///
    /// # Errors
    /// See the trait.
    fn all_reduce(&mut self, buffer: SliceMut<'_>) -> Result<(), CommError>;

    /// Returns after every rank has called it.
    ///
    /// # Errors
    /// See the trait.
    fn barrier(&mut self) -> Result<(), CommError>;

    /// A handle that ends, from any thread, every call of this communicator.
    fn abort_handle(&self) -> AbortHandle;
}

/// Bytes of one element of a reduction.
pub(crate) const F32_BYTES: usize = size_of::<f32>();

/// The host bytes of `slice`, for backends that move host memory only.
fn host(slice: Slice<'_>, operation: Operation) -> Result<&[u8], CommError> {
    let found = slice.device();
    slice.as_host().ok_or(CommError::WrongDevice { operation, expected: Device::Host, found })
}

/// The host bytes of `slice`, to be written.
fn host_mut(slice: SliceMut<'_>, operation: Operation) -> Result<&mut [u8], CommError> {
    let found = slice.device();
    match slice {
        SliceMut::Host(bytes) => Ok(bytes),
        SliceMut::Cuda(_) => Err(CommError::WrongDevice { operation, expected: Device::Host, found }),
    }
}

/// The range of each rank's part when parts of `counts[r] * unit` bytes lie one after the other in `total` bytes.
fn layout(
    operation: Operation,
    world: WorldSize,
    counts: &[usize],
    unit: usize,
    total: usize,
) -> Result<Vec<std::ops::Range<usize>>, CommError> {
    check(counts.len() == world.count(), operation, || {
        format!("expected {world} counts, one for each rank, found {}", counts.len())
    })?;
    let mut end = 0_usize;
    let mut ranges = Vec::with_capacity(counts.len());
    for &count in counts {
        let start = end;
        let next = count.checked_mul(unit).and_then(|bytes| start.checked_add(bytes));
        end = next.ok_or_else(|| CommError::BadArgument { operation, detail: "the counts overflow".to_owned() })?;
        ranges.push(start..end);
    }
    check(end == total, operation, || format!("the counts sum to {end} bytes, the buffer has {total}"))?;
    Ok(ranges)
}

/// `total` `f32` elements in nearly equal parts, one for each rank.
fn even_counts(world: WorldSize, total: usize) -> Vec<usize> {
    let (each, rest) = (total / world.count(), total % world.count());
    (0..world.count()).map(|rank| each + usize::from(rank < rest)).collect()
}

/// [`CommError::BadArgument`] unless `holds`.
fn check(holds: bool, operation: Operation, detail: impl FnOnce() -> String) -> Result<(), CommError> {
    if holds { Ok(()) } else { Err(CommError::BadArgument { operation, detail: detail() }) }
}

/// The checks of a scatter's arguments that all backends share; gives the parts back when we are the root.
fn check_scatter(group: Group, root: Rank, scatter: &Scatter<'_>) -> Result<(), CommError> {
    let operation = Operation::Scatter;
    check_root(group, root, operation)?;
    match scatter {
        Scatter::Send { parts } => {
            check(group.rank == root, operation, || format!("rank {} sends, but the root is rank {root}", group.rank))?;
            check(parts.len() == group.world.count(), operation, || {
                format!("expected {} parts, one for each rank, found {}", group.world, parts.len())
            })?;
            let own = parts.get(root.index()).map_or(0, Slice::len);
            check(own == 0, operation, || format!("expected no part for the root itself, found {own} bytes"))
        }
        Scatter::Receive { .. } => check(group.rank != root, operation, || format!("the root, rank {root}, receives")),
    }
}

/// [`CommError::BadArgument`] unless the root belongs to the group.
fn check_root(group: Group, root: Rank, operation: Operation) -> Result<(), CommError> {
    check(group.world.contains(root), operation, || format!("root {root} in a world of {}", group.world))
}

/// [`CommError::BadArgument`] unless a buffer has the length that the counts say.
fn check_len(operation: Operation, found: usize, expected: usize) -> Result<(), CommError> {
    check(found == expected, operation, || format!("this rank's part: expected {expected} bytes, found {found}"))
}

/// Copies our part of a gather to its place among the others.
fn place_own(
    group: Group,
    operation: Operation,
    send: &[u8],
    recv: &mut [u8],
    ranges: &[std::ops::Range<usize>],
) -> Result<(), CommError> {
    let range = ranges.get(group.rank.index()).cloned().unwrap_or_default();
    check_len(operation, send.len(), range.len())?;
    recv[range].copy_from_slice(send);
    Ok(())
}
