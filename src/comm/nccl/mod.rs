//! A communicator between GPUs through NVIDIA's NCCL, which is loaded at run time.
//!
//! Owns: [`NcclLibrary`], [`NcclConfig`], [`NcclCommunicator`], [`probe`]; how each collective is put together from
//! NCCL's. Refuses to know: how the unique id travels (the coordinator's task), the environment, kernels.
//!
//! NCCL's messages carry no lengths, so of the promises of [`super`] this backend does not keep `CM-1`: ranks that follow
//! different plans wait until the deadline. Sums have the same bits on every rank, in NCCL's order, not that of the ranks.
//! A deadline counts from the start of a call: NCCL does not show progress. Nobody else's work on a buffer may be under way
//! on the device when a call begins; the copies of [`crate::device`] have ended when they return.
//!
//! See [`library`] and [`handle`] for `NC-1` to `NC-4`.

mod calls;
mod handle;
mod library;
#[cfg(test)]
mod tests;

use std::ffi::{c_int, c_void};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

pub use self::library::{NcclLibrary, NcclUniqueId, NcclVersion};

use self::handle::Handle;
use self::library::{FLOAT32, Functions, IN_PROGRESS, RawComm, RawStream, SUCCESS, SUM, UINT8};
use super::abort::AbortFlag;
use super::patience::Patience;
use super::{AbortHandle, CommError, Communicator, Counters, F32_BYTES, Group, Operation, Scatter};
use super::{check_len, check_root, check_scatter, layout};
use crate::device::{Device, DeviceContext, DeviceError, Memory, Slice, SliceMut};
use crate::types::Rank;

/// What is known of an NCCL library without a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NcclInfo {
    /// The name or path that it was loaded by.
    pub library: String,
    /// Its release.
    pub version: NcclVersion,
}

/// Looks for NCCL at `path`, or else where the dynamic linker finds it, and tries what needs no device: its release and a
/// unique id, which also shows that it finds a network interface.
///
/// # Errors
/// Those of [`NcclLibrary::load`] and [`NcclLibrary::unique_id`].
pub fn probe(path: Option<&Path>) -> Result<NcclInfo, CommError> {
    let library = NcclLibrary::load(path)?;
    library.unique_id()?;
    Ok(NcclInfo { library: library.name().to_owned(), version: library.version() })
}

/// What a rank must know to connect.
#[derive(Clone, Debug)]
pub struct NcclConfig {
    /// Who we are.
    pub group: Group,
    /// The library.
    pub library: NcclLibrary,
    /// The id that one rank made and all have.
    pub unique_id: NcclUniqueId,
    /// The memory that is moved: a CUDA device. A mock library takes the host's.
    pub device: Device,
    /// How long connecting may take.
    pub deadline: Duration,
    /// How long one call may take.
    pub idle_deadline: Duration,
}

/// One rank's end of the group.
#[derive(Debug)]
pub struct NcclCommunicator {
    group: Group,
    idle_deadline: Duration,
    handle: Arc<Handle>,
    context: DeviceContext,
    /// The one value that a barrier sums.
    token: Memory,
    aborted: AbortFlag,
    counters: Counters,
    failed: Option<CommError>,
}

/// A communicator that is connecting; dropping it ends that.
#[derive(Debug)]
pub struct NcclConnecting {
    communicator: NcclCommunicator,
    patience: Patience,
}

/// Starts to connect this rank with the others.
///
/// # Errors
/// [`CommError::Nccl`] in the library's words, [`CommError::Device`] when the device cannot be used.
pub fn start(config: NcclConfig) -> Result<NcclConnecting, CommError> {
    let NcclConfig { group, library, unique_id, device, deadline, idle_deadline } = config;
    let operation = Operation::Connect;
    check_root(group, group.rank, operation)?;
    let failed = |source| CommError::Device { operation, source };
    let context = DeviceContext::open(device).map_err(failed)?;
    let token = context.allocate(F32_BYTES).map_err(failed)?;
    context.bind().map_err(failed)?;
    let (aborted, counters) = (AbortFlag::default(), Counters::default());
    let patience = Patience::new(deadline);
    let handle = Arc::new(Handle::start(&library, group, unique_id, aborted.clone())?);
    let communicator =
        NcclCommunicator { group, idle_deadline, handle, context, token, aborted, counters, failed: None };
    Ok(NcclConnecting { communicator, patience })
}

/// Connects this rank with the others and returns when all ranks have done so.
///
/// # Errors
/// Those of [`start`] and [`NcclConnecting::finish`].
pub fn connect(config: NcclConfig) -> Result<NcclCommunicator, CommError> {
    start(config)?.finish()
}

impl NcclConnecting {
    /// A handle that ends connecting, and later the calls of the communicator.
    #[must_use]
    pub fn abort_handle(&self) -> AbortHandle {
        self.communicator.abort_handle()
    }

    /// Returns when all ranks have connected.
    ///
    /// # Errors
    /// [`CommError::Nccl`] in the library's words, [`CommError::Deadline`] when a rank does not come,
    /// [`CommError::Aborted`].
    pub fn finish(mut self) -> Result<NcclCommunicator, CommError> {
        let done = self.communicator.handle.wait(Operation::Connect, &self.patience, || Ok(true));
        self.communicator.failed = done.err();
        self.communicator.failed.clone().map_or(Ok(self.communicator), Err)
    }
}

/// The calls of one collective on a live communicator, from which the first error is kept.
struct Calls<'a> {
    functions: &'a Functions,
    raw: RawComm,
    stream: RawStream,
    result: c_int,
}

impl Calls<'_> {
    fn note(&mut self, result: c_int) {
        if matches!(self.result, SUCCESS | IN_PROGRESS) {
            self.result = result;
        }
    }
}

/// Where a buffer lies, for the library.
#[derive(Clone, Copy)]
struct Address(*mut c_void);

impl Address {
    /// The address of the byte `offset` further on.
    const fn at(self, offset: usize) -> Self {
        Self(self.0.wrapping_byte_add(offset))
    }
}

impl NcclCommunicator {
    /// The bytes that this rank has given to and got from the library; what NCCL adds on the wire is not known.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters.clone()
    }

    fn address(&self, slice: Slice<'_>, operation: Operation) -> Result<Address, CommError> {
        address_of(self.context.device(), slice, operation)
    }

    fn address_mut(&self, slice: SliceMut<'_>, operation: Operation) -> Result<Address, CommError> {
        address_of_mut(self.context.device(), slice, operation)
    }

    /// Runs one collective to its end. Its buffers are borrowed by the caller for as long.
    fn run(
        &mut self,
        operation: Operation,
        name: &'static str,
        issue: impl FnOnce(&mut Calls<'_>),
    ) -> Result<(), CommError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let failed = |source: DeviceError| CommError::Device { operation, source };
        let stream = self.context.raw_stream();
        let patience = Patience::new(self.idle_deadline);
        let done = self.context.bind().map_err(failed).and_then(|()| {
            self.handle.call(operation, name, |functions, raw| {
                let mut calls = Calls { functions, raw, stream, result: SUCCESS };
                issue(&mut calls);
                calls.result
            })?;
            self.handle.wait(operation, &patience, || self.context.is_idle().map_err(failed))
        });
        done.inspect_err(|error| {
            self.handle.abort();
            self.failed = Some(error.clone());
        })
    }

    fn send_parts(&mut self, parts: &[Slice<'_>]) -> Result<(), CommError> {
        let operation = Operation::Scatter;
        let mut messages = Vec::new();
        for (to, part) in self.group.world.ranks().zip(parts).filter(|(_, part)| !part.is_empty()) {
            messages.push((to, self.address(*part, operation)?, part.len()));
        }
        if messages.is_empty() {
            return Ok(());
        }
        let total = messages.iter().map(|(_, _, bytes)| bytes).sum();
        self.run(operation, "ncclSend", |calls| {
            calls.group(|calls| messages.iter().for_each(|&(to, from, bytes)| calls.send(from, bytes, to)));
        })?;
        self.counters.sent(total, 0);
        Ok(())
    }
}

impl Communicator for NcclCommunicator {
    fn group(&self) -> Group {
        self.group
    }

    fn broadcast(&mut self, root: Rank, buffer: SliceMut<'_>) -> Result<(), CommError> {
        let operation = Operation::Broadcast;
        check_root(self.group, root, operation)?;
        let bytes = buffer.len();
        let address = self.address_mut(buffer, operation)?;
        if bytes == 0 || self.group.world.get() == 1 {
            return Ok(());
        }
        self.run(operation, "ncclBroadcast", |calls| calls.broadcast(address, bytes, root))?;
        let (sent, received) = if self.group.rank == root { (bytes, 0) } else { (0, bytes) };
        self.counters.sent(sent, 0);
        self.counters.received(received, 0);
        Ok(())
    }

    fn scatter(&mut self, root: Rank, parts: Scatter<'_>) -> Result<(), CommError> {
        let operation = Operation::Scatter;
        check_scatter(self.group, root, &parts)?;
        match parts {
            Scatter::Send { parts } => self.send_parts(parts),
            Scatter::Receive { into } if into.is_empty() => Ok(()),
            Scatter::Receive { into } => {
                let bytes = into.len();
                let address = self.address_mut(into, operation)?;
                self.run(operation, "ncclRecv", |calls| calls.receive(address, bytes, root))?;
                self.counters.received(bytes, 0);
                Ok(())
            }
        }
    }

    fn all_gather(&mut self, send: Slice<'_>, recv: SliceMut<'_>, counts: &[usize]) -> Result<(), CommError> {
        let operation = Operation::AllGather;
        let total = recv.len();
        let ranges = layout(operation, self.group.world, counts, 1, total)?;
        let own = counts.get(self.group.rank.index()).copied().unwrap_or(0);
        check_len(operation, send.len(), own)?;
        let (from, into) = (self.address(send, operation)?, self.address_mut(recv, operation)?);
        if total == 0 {
            return Ok(());
        }
        self.run(operation, "ncclAllGather", |calls| {
            if counts.iter().all(|&count| count == own) {
                calls.all_gather(from, into, own);
            } else {
                calls.group(|calls| calls.exchange(from, own, into, &ranges));
            }
        })?;
        self.counters.sent(own, 0);
        self.counters.received(total - own, 0);
        Ok(())
    }

    fn reduce_scatter(&mut self, send: Slice<'_>, recv: SliceMut<'_>, counts: &[usize]) -> Result<(), CommError> {
        let operation = Operation::ReduceScatter;
        let total = send.len();
        let ranges = layout(operation, self.group.world, counts, F32_BYTES, total)?;
        let own = counts.get(self.group.rank.index()).copied().unwrap_or(0);
        check_len(operation, recv.len(), own * F32_BYTES)?;
        let (from, into) = (self.address(send, operation)?, self.address_mut(recv, operation)?);
        if total == 0 {
            return Ok(());
        }
        self.run(operation, "ncclReduceScatter", |calls| {
            if counts.iter().all(|&count| count == own) {
                calls.reduce_scatter(from, into, own);
            } else {
                calls.group(|calls| calls.reduce_each(from, into, &ranges));
            }
        })?;
        self.counters.sent(total - own * F32_BYTES, 0);
        self.counters.received(own * F32_BYTES, 0);
        Ok(())
    }

    fn all_reduce(&mut self, buffer: SliceMut<'_>) -> Result<(), CommError> {
        let operation = Operation::AllReduce;
        let bytes = buffer.len();
        let counts = super::even_counts(self.group.world, bytes / F32_BYTES);
        layout(operation, self.group.world, &counts, F32_BYTES, bytes)?;
        let address = self.address_mut(buffer, operation)?;
        if bytes == 0 {
            return Ok(());
        }
        self.run(operation, "ncclAllReduce", |calls| calls.all_reduce(address, bytes / F32_BYTES))?;
        self.counters.sent(bytes, 0);
        self.counters.received(bytes, 0);
        Ok(())
    }

    fn barrier(&mut self) -> Result<(), CommError> {
        let operation = Operation::Barrier;
        let address = address_of_mut(self.context.device(), self.token.as_slice_mut(), operation)?;
        // The values are zeros, and so is their sum: nothing has to be read.
        self.run(operation, "ncclAllReduce", |calls| calls.all_reduce(address, 1))
    }

    fn abort_handle(&self) -> AbortHandle {
        let handle = Arc::clone(&self.handle);
        self.aborted.handle(move |_| handle.abort_from_outside())
    }
}

impl Drop for NcclCommunicator {
    fn drop(&mut self) {
        if self.failed.is_none() && self.aborted.reason().is_none() {
            self.handle.finish();
        } else {
            self.handle.abort();
        }
    }
}

/// The address of a buffer, when it lies on the communicator's device.
fn address_of(expected: Device, slice: Slice<'_>, operation: Operation) -> Result<Address, CommError> {
    let found = slice.device();
    if expected != found {
        return Err(CommError::WrongDevice { operation, expected, found });
    }
    Ok(Address(match slice {
        Slice::Host(bytes) => bytes.as_ptr().cast_mut().cast(),
        Slice::Cuda(view) => device_address(view.address()),
    }))
}

/// The same for a buffer that is written.
fn address_of_mut(expected: Device, slice: SliceMut<'_>, operation: Operation) -> Result<Address, CommError> {
    let found = slice.device();
    if expected != found {
        return Err(CommError::WrongDevice { operation, expected, found });
    }
    Ok(Address(match slice {
        SliceMut::Host(bytes) => bytes.as_mut_ptr().cast(),
        SliceMut::Cuda(view) => device_address(view.address()),
    }))
}

/// A device's address as the library takes it; the host never follows it.
const fn device_address(address: u64) -> *mut c_void {
    std::ptr::without_provenance_mut(crate::types::as_usize(address))
}
