//! Anonymous host memory in huge pages.
//!
//! Owns: mapping and unmapping. Refuses to know: what the bytes mean.
//!
//! A tensor is written once into fresh memory, and the first touch of a fresh 4 KiB page costs a fault each: 2 GB/s per
//! thread on a machine that copies 12 GB/s. With 2 MiB pages there are 512 times fewer faults.
#![expect(unsafe_code, reason = "mapping memory is a matter of raw pointers")]

use std::fmt;
use std::ptr::NonNull;

use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::{Device, DeviceError};

/// Zeroed bytes of this process, page-aligned, freed on drop.
pub(super) struct Mapping {
    /// Dangling when there are no bytes.
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: A mapping is owned by one value, like a `Box<[u8]>`; `mmap(2)` memory belongs to the process, not to a thread.
unsafe impl Send for Mapping {}
// SAFETY: Shared access only reads, as with `&[u8]`.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// `bytes` zeroed bytes. They take memory when they are first written.
    pub(super) fn new(bytes: usize) -> Result<Self, DeviceError> {
        if bytes == 0 {
            return Ok(Self { start: NonNull::dangling(), bytes });
        }
        let out_of_memory = |_| DeviceError::OutOfMemory { device: Device::Host, bytes };
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        // SAFETY: A new private mapping at an address of the kernel's choice touches no memory that exists.
        let start = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), bytes, protection, flags) };
        let start = start.map_err(out_of_memory)?;
        // Advice only: a kernel without huge pages serves the same memory in small ones.
        // SAFETY: The range was just mapped, and this advice does not change its contents.
        let _no_huge_pages = unsafe { rustix::mm::madvise(start, bytes, Advice::LinuxHugepage) };
        let start = NonNull::new(start.cast()).ok_or(DeviceError::OutOfMemory { device: Device::Host, bytes })?;
        Ok(Self { start, bytes })
    }

    pub(super) const fn as_slice(&self) -> &[u8] {
        // SAFETY: The mapping has `bytes` initialized (zeroed) bytes, lives as long as `self`, and is only written
        // through `&mut self`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes) }
    }

    pub(super) const fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: As above; `&mut self` makes this the only access.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.bytes) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.bytes > 0 {
            // SAFETY: The range was mapped by `new`, and no borrow of it outlives `self`.
            // Unmapping a range that we mapped does not fail; there would be nothing to do about it.
            let _still_mapped = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.bytes) };
        }
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mapping").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}
