//! Owned memory and access to the device that has it.
//!
//! Owns: [`DeviceContext`], [`Memory`], [`HostStaging`], copies in any direction.
//! Refuses to know: what the bytes mean, when to copy.
//!
//! `DV-3`: a copy is complete when the call returns.

use super::cuda::{Cuda, CudaMemory, Pinned};
use super::host::Mapping;
use super::{Device, DeviceError, Slice, SliceMut};

/// One thread's access to one device: its own stream on the device's shared context. Open one in each thread that works
/// with the device. For the host there is nothing behind it.
#[derive(Debug)]
pub struct DeviceContext(Access);

#[derive(Debug)]
enum Access {
    Host,
    Cuda(Cuda),
}

/// Zeroed bytes on a device, freed on drop.
///
/// ```
/// # use weightcast::device::{Device, DeviceContext, Slice};
/// let context = DeviceContext::open(Device::Host)?;
/// let mut memory = context.allocate(4)?;
/// context.copy_from_host(memory.as_slice_mut(), &[1, 2, 3, 4])?;
/// assert_eq!(memory.as_host(), Some(&[1, 2, 3, 4][..]));
/// # Ok::<(), weightcast::device::DeviceError>(())
/// ```
#[derive(Debug)]
pub struct Memory(Owned);

#[derive(Debug)]
enum Owned {
    Host(Mapping),
    Cuda(CudaMemory),
}

/// Host bytes from which, and into which, a device copies fast: page-locked for CUDA. Made once and used again for every
/// transfer, because page-locking is slow and takes memory from everybody.
#[derive(Debug)]
pub struct HostStaging(Staged);

#[derive(Debug)]
enum Staged {
    Pageable(Mapping),
    Pinned(Pinned),
}

/// Free and total bytes of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryInfo {
    /// Bytes that an allocation could still take.
    pub free_bytes: u64,
    /// All bytes of the device.
    pub total_bytes: u64,
}

impl DeviceContext {
    /// Access to `device`.
    ///
    /// # Errors
    /// [`DeviceError::NoDriver`] and [`DeviceError::NoDevice`] when it is not there, [`DeviceError::Driver`] when it
    /// cannot be used.
    pub fn open(device: Device) -> Result<Self, DeviceError> {
        Ok(Self(match device {
            Device::Host => Access::Host,
            Device::Cuda { ordinal } => Access::Cuda(Cuda::open(ordinal)?),
        }))
    }

    /// The device.
    #[must_use]
    pub const fn device(&self) -> Device {
        match &self.0 {
            Access::Host => Device::Host,
            Access::Cuda(cuda) => cuda.device(),
        }
    }

    /// `bytes` zeroed bytes on the device. Host memory is page-aligned and takes pages when they are first written.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    pub fn allocate(&self, bytes: usize) -> Result<Memory, DeviceError> {
        Ok(Memory(match &self.0 {
            Access::Host => Owned::Host(Mapping::new(bytes)?),
            Access::Cuda(cuda) => Owned::Cuda(cuda.allocate(bytes)?),
        }))
    }

    /// `bytes` zeroed host bytes for transfers to and from the device.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`] or [`DeviceError::Driver`] when so much cannot be page-locked.
    pub fn staging(&self, bytes: usize) -> Result<HostStaging, DeviceError> {
        Ok(HostStaging(match &self.0 {
            Access::Host => Staged::Pageable(Mapping::new(bytes)?),
            Access::Cuda(cuda) => Staged::Pinned(cuda.allocate_pinned(bytes)?),
        }))
    }

    /// The device's memory now; nothing for the host, whose limits the caller knows better (control groups).
    ///
    /// # Errors
    /// [`DeviceError::Driver`].
    pub fn memory_info(&self) -> Result<Option<MemoryInfo>, DeviceError> {
        match &self.0 {
            Access::Host => Ok(None),
            Access::Cuda(cuda) => {
                let (free_bytes, total_bytes) = cuda.memory_info()?;
                Ok(Some(MemoryInfo { free_bytes, total_bytes }))
            }
        }
    }

    /// Copies bytes between memories of the host and of this device, in any direction; complete on return (`DV-3`).
    ///
    /// # Errors
    /// [`DeviceError::LengthMismatch`] when the lengths differ, [`DeviceError::WrongDevice`] when one side lies on
    /// another device, [`DeviceError::Driver`].
    pub fn copy(&self, into: SliceMut<'_>, from: Slice<'_>) -> Result<(), DeviceError> {
        let wrong = |found| Err(DeviceError::WrongDevice { expected: self.device(), found });
        match (&self.0, into, from) {
            (_, SliceMut::Host(into), Slice::Host(from)) => {
                if into.len() != from.len() {
                    return Err(DeviceError::LengthMismatch { from: from.len(), into: into.len() });
                }
                into.copy_from_slice(from);
                Ok(())
            }
            (Access::Cuda(cuda), SliceMut::Cuda(into), Slice::Host(from)) => cuda.copy_in(&into, from),
            (Access::Cuda(cuda), SliceMut::Host(into), Slice::Cuda(from)) => cuda.copy_out(into, &from),
            (Access::Cuda(cuda), SliceMut::Cuda(into), Slice::Cuda(from)) => cuda.copy_within(&into, &from),
            (Access::Host, into @ SliceMut::Cuda(_), _) => wrong(into.device()),
            (Access::Host, SliceMut::Host(_), from @ Slice::Cuda(_)) => wrong(from.device()),
        }
    }

    /// Copies host bytes to where `into` lies.
    ///
    /// # Errors
    /// See [`DeviceContext::copy`].
    pub fn copy_from_host(&self, into: SliceMut<'_>, from: &[u8]) -> Result<(), DeviceError> {
        self.copy(into, Slice::Host(from))
    }

    /// Copies to host bytes from where `from` lies.
    ///
    /// # Errors
    /// See [`DeviceContext::copy`].
    pub fn copy_to_host(&self, into: &mut [u8], from: Slice<'_>) -> Result<(), DeviceError> {
        self.copy(SliceMut::Host(into), from)
    }

    /// The CUDA device behind this context.
    pub(super) fn cuda(&self) -> Result<Cuda, DeviceError> {
        match &self.0 {
            Access::Host => {
                Err(DeviceError::WrongDevice { expected: Device::Cuda { ordinal: 0 }, found: Device::Host })
            }
            Access::Cuda(cuda) => Ok(cuda.clone()),
        }
    }

    /// Makes the device current for this thread, for libraries that use the current one.
    pub(crate) fn bind(&self) -> Result<(), DeviceError> {
        match &self.0 {
            Access::Host => Ok(()),
            Access::Cuda(cuda) => cuda.bind(),
        }
    }

    /// This context's stream, as libraries of the vendor take it; null for the host.
    pub(crate) fn raw_stream(&self) -> *mut std::ffi::c_void {
        match &self.0 {
            Access::Host => std::ptr::null_mut(),
            Access::Cuda(cuda) => cuda.raw_stream(),
        }
    }

    /// Whether everything put on this context's stream is done; always so for the host.
    pub(crate) fn is_idle(&self) -> Result<bool, DeviceError> {
        match &self.0 {
            Access::Host => Ok(true),
            Access::Cuda(cuda) => cuda.is_idle(),
        }
    }
}

impl Memory {
    /// `bytes` zeroed bytes on `device`; a shorthand for one allocation without keeping the device's context.
    ///
    /// # Errors
    /// Those of [`DeviceContext::open`] and [`DeviceContext::allocate`].
    pub fn allocate(device: Device, bytes: usize) -> Result<Self, DeviceError> {
        DeviceContext::open(device)?.allocate(bytes)
    }

    /// Where the bytes lie.
    #[must_use]
    pub const fn device(&self) -> Device {
        match &self.0 {
            Owned::Host(_) => Device::Host,
            Owned::Cuda(memory) => memory.device(),
        }
    }

    /// The number of bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        match &self.0 {
            Owned::Host(mapping) => mapping.as_slice().len(),
            Owned::Cuda(memory) => memory.len(),
        }
    }

    /// Whether there is no byte in it.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All bytes, to be read.
    #[must_use]
    pub const fn as_slice(&self) -> Slice<'_> {
        match &self.0 {
            Owned::Host(mapping) => Slice::Host(mapping.as_slice()),
            Owned::Cuda(memory) => Slice::Cuda(memory.as_slice()),
        }
    }

    /// All bytes, to be written.
    #[must_use]
    pub const fn as_slice_mut(&mut self) -> SliceMut<'_> {
        match &mut self.0 {
            Owned::Host(mapping) => SliceMut::Host(mapping.as_mut_slice()),
            Owned::Cuda(memory) => SliceMut::Cuda(memory.as_slice_mut()),
        }
    }

    /// The bytes, when they are the host's.
    #[must_use]
    pub const fn as_host(&self) -> Option<&[u8]> {
        match &self.0 {
            Owned::Host(mapping) => Some(mapping.as_slice()),
            Owned::Cuda(_) => None,
        }
    }

    /// The bytes, when they are the host's, to be written.
    #[must_use]
    pub const fn as_host_mut(&mut self) -> Option<&mut [u8]> {
        match &mut self.0 {
            Owned::Host(mapping) => Some(mapping.as_mut_slice()),
            Owned::Cuda(_) => None,
        }
    }
}

impl std::ops::Deref for HostStaging {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.0 {
            Staged::Pageable(mapping) => mapping.as_slice(),
            Staged::Pinned(pinned) => pinned.as_slice(),
        }
    }
}

impl std::ops::DerefMut for HostStaging {
    fn deref_mut(&mut self) -> &mut [u8] {
        match &mut self.0 {
            Staged::Pageable(mapping) => mapping.as_mut_slice(),
            Staged::Pinned(pinned) => pinned.as_mut_slice(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEN: usize = 3 * 4096 + 5;

    fn host() -> DeviceContext {
        DeviceContext::open(Device::Host).expect("the host is always there")
    }

    #[test]
    fn host_memory_is_zeroed_aligned_and_writable() {
        let mut memory = host().allocate(LEN).expect("a few pages");
        let bytes = memory.as_host_mut().expect("host memory");
        assert_eq!((bytes.len(), bytes.as_ptr().align_offset(4096)), (LEN, 0));
        assert!(bytes.iter().all(|&byte| byte == 0));
        bytes.fill(7);
        assert_eq!(memory.as_slice().range(LEN - 1..LEN).map(|last| last.as_host()), Ok(Some(&[7][..])));
        assert_eq!((memory.len(), memory.device(), memory.is_empty()), (LEN, Device::Host, false));
    }

    #[test]
    fn no_bytes_need_no_memory() {
        let mut memory = Memory::allocate(Device::Host, 0).expect("nothing");
        assert!(memory.is_empty());
        assert_eq!(memory.as_host_mut(), Some(&mut [][..]));
    }

    /// More than any address space has.
    #[test]
    fn too_much_is_an_error() {
        let bytes = usize::MAX / 2;
        let found = Memory::allocate(Device::Host, bytes).map(drop);
        assert_eq!(found, Err(DeviceError::OutOfMemory { device: Device::Host, bytes }));
    }

    #[test]
    fn copies_go_both_ways() {
        let context = host();
        let mut memory = context.allocate(5).expect("a page");
        context.copy_from_host(memory.as_slice_mut(), b"hello").expect("same length");
        let mut back = [0; 5];
        context.copy_to_host(&mut back, memory.as_slice()).expect("same length");
        assert_eq!(&back, b"hello");
        let found = context.copy_from_host(memory.as_slice_mut(), b"hi");
        assert_eq!(found, Err(DeviceError::LengthMismatch { from: 2, into: 5 }));
    }

    #[test]
    fn the_host_does_not_reach_device_memory() {
        let view = super::super::CudaSlice::new(0x1000, 4, 2);
        let found = host().copy_to_host(&mut [0; 4], Slice::Cuda(view));
        let expected = DeviceError::WrongDevice { expected: Device::Host, found: Device::Cuda { ordinal: 2 } };
        assert_eq!(found, Err(expected));
    }

    #[test]
    fn staging_is_host_memory() {
        let mut staging = host().staging(10).expect("a page");
        staging.copy_from_slice(b"0123456789");
        assert_eq!(&staging[3..5], b"34");
    }

    /// On a machine with a device this moves bytes to it and back; on one without, it checks that nothing panics and
    /// that the reason is in words.
    #[test]
    fn a_device_is_used_or_its_absence_explained() {
        let probe = super::super::probe();
        let Some(info) = probe.devices.iter().find(|info| info.device != Device::Host) else {
            let reason = probe.no_gpu_reason.expect("a reason when there is no device");
            assert!(reason.contains("NVIDIA"), "{reason}");
            let found = DeviceContext::open(Device::Cuda { ordinal: 0 }).map(drop);
            assert_eq!(found, Err(DeviceError::NoDriver { reason }));
            return;
        };
        let context = DeviceContext::open(info.device).expect("the device that was found");
        let mut memory = context.allocate(LEN).expect("a few pages");
        let mut staging = context.staging(LEN).expect("a few pages");
        context.copy_to_host(&mut staging, memory.as_slice()).expect("device to host");
        assert!(staging.iter().all(|&byte| byte == 0), "fresh memory is zeroed");
        staging.iter_mut().zip(0_u8..=255).for_each(|(byte, value)| *byte = value);
        context.copy_from_host(memory.as_slice_mut(), &staging).expect("host to device");
        let mut other = context.allocate(LEN).expect("a few pages");
        context.copy(other.as_slice_mut(), memory.as_slice()).expect("on the device");
        let mut back = vec![1; LEN];
        context.copy_to_host(&mut back, other.as_slice()).expect("device to host");
        assert_eq!(back, staging[..]);
        let free = context.memory_info().expect("known").expect("a device has memory");
        assert!(free.free_bytes <= free.total_bytes && free.total_bytes == info.total_bytes);
    }
}
