//! CUDA devices through the driver library, which is loaded when it is first needed.
//!
//! Owns: the calls of the driver but those for kernels. Refuses to know: kernels, collectives.
//!
//! `DV-1`: [`driver`] is asked before any other call; it looks for the library first, because a call into a library that
//! is missing would panic. Only functions that every driver since CUDA 11 has are called, for a missing one would, too.
//! `DV-3`: a call binds the device's primary context to its thread first, and returns when the device is done.
#![expect(unsafe_code, reason = "the driver is a C library")]

use std::fmt;
use std::sync::{Arc, OnceLock};

use cudarc::driver::sys::{self, CUresult};
use cudarc::driver::{CudaContext, CudaStream, DriverError, result};

use super::{CudaSlice, CudaSliceMut, Device, DeviceError, DeviceInfo};
use crate::types::{as_u64, as_usize};

/// The driver, once it was found and started; else why it is of no use.
pub(super) fn driver() -> Result<(), DeviceError> {
    static DRIVER: OnceLock<Result<(), String>> = OnceLock::new();
    let found = DRIVER.get_or_init(|| {
        if !library_is_there() {
            return Err("no NVIDIA driver: libcuda.so.1 not found".to_owned());
        }
        match result::init() {
            Ok(()) => Ok(()),
            Err(DriverError(CUresult::CUDA_ERROR_NO_DEVICE)) => Err("the NVIDIA driver finds no device".to_owned()),
            Err(error) => {
                let (name, description) = describe(error);
                Err(format!("the NVIDIA driver does not start: {name}: {description}"))
            }
        }
    });
    found.clone().map_err(|reason| DeviceError::NoDriver { reason })
}

/// Whether the driver's library can be loaded (`DV-1`).
#[cfg(not(feature = "cuda"))]
fn library_is_there() -> bool {
    // SAFETY: Loading the vendor's driver library runs its initializers, which have no preconditions.
    unsafe { sys::is_culib_present() }
}

/// With candle's CUDA the driver is linked: a program without it does not start.
#[cfg(feature = "cuda")]
const fn library_is_there() -> bool {
    true
}

/// What the driver says about every visible device. Takes no context, so no device memory.
pub(super) fn devices() -> Result<Vec<DeviceInfo>, DeviceError> {
    driver()?;
    (0..device_count()?).map(device_info).collect()
}

fn device_count() -> Result<u32, DeviceError> {
    let device = Device::Cuda { ordinal: 0 };
    let count = result::device::get_count().map_err(|error| failed(device, "counting devices", error))?;
    Ok(u32::try_from(count).unwrap_or(0))
}

fn device_info(ordinal: u32) -> Result<DeviceInfo, DeviceError> {
    use sys::CUdevice_attribute_enum::{
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
    };
    let device = Device::Cuda { ordinal };
    let error = |error| failed(device, "describing a device", error);
    let handle = result::device::get(number(ordinal)).map_err(error)?;
    let attribute = |which| {
        // SAFETY: The handle was just given by the driver.
        let value = unsafe { result::device::get_attribute(handle, which) }.map_err(error)?;
        Ok::<_, DeviceError>(u32::try_from(value).unwrap_or(0))
    };
    Ok(DeviceInfo {
        device,
        name: result::device::get_name(handle).map_err(error)?,
        // SAFETY: The handle was just given by the driver.
        total_bytes: as_u64(unsafe { result::device::total_mem(handle) }.map_err(error)?),
        compute_capability: Some((
            attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        )),
    })
}

/// One thread's access to one device: the primary context, which all users of the device in this process share, and a
/// stream of its own.
#[derive(Clone)]
pub(super) struct Cuda {
    ordinal: u32,
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
}

impl Cuda {
    pub(super) fn open(ordinal: u32) -> Result<Self, DeviceError> {
        driver()?;
        let count = device_count()?;
        if ordinal >= count {
            return Err(DeviceError::NoDevice { ordinal, count });
        }
        let device = Device::Cuda { ordinal };
        let context = CudaContext::new(as_usize(u64::from(ordinal)));
        let context = context.map_err(|error| failed(device, "retaining the primary context", error))?;
        let stream = context.new_stream().map_err(|error| failed(device, "creating a stream", error))?;
        Ok(Self { ordinal, context, stream })
    }

    pub(super) const fn device(&self) -> Device {
        Device::Cuda { ordinal: self.ordinal }
    }

    /// Makes the device current for this thread, for libraries that use the current one.
    pub(super) fn bind(&self) -> Result<(), DeviceError> {
        self.context.bind_to_thread().map_err(|error| failed(self.device(), "binding the context", error))
    }

    /// The stream, as libraries of the vendor take it.
    pub(super) fn raw_stream(&self) -> *mut std::ffi::c_void {
        self.stream.cu_stream().cast()
    }

    /// The stream, for calls of the driver.
    pub(super) fn stream(&self) -> sys::CUstream {
        self.stream.cu_stream()
    }

    /// Whether everything put on the stream is done.
    pub(super) fn is_idle(&self) -> Result<bool, DeviceError> {
        self.bind()?;
        // SAFETY: The stream belongs to `self` and lives as long.
        match unsafe { sys::cuStreamQuery(self.stream.cu_stream()) } {
            CUresult::CUDA_SUCCESS => Ok(true),
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            error => Err(failed(self.device(), "querying the stream", DriverError(error))),
        }
    }

    /// Free and total bytes.
    pub(super) fn memory_info(&self) -> Result<(u64, u64), DeviceError> {
        let info = self.context.mem_get_info();
        let (free, total) = info.map_err(|error| failed(self.device(), "asking for free memory", error))?;
        Ok((as_u64(free), as_u64(total)))
    }

    /// Zeroed device memory.
    pub(super) fn allocate(&self, bytes: usize) -> Result<CudaMemory, DeviceError> {
        let mut memory = CudaMemory { address: 0, bytes, cuda: self.clone() };
        if bytes > 0 {
            self.bind()?;
            // SAFETY: The context is current; the memory is zeroed below before anybody sees it.
            memory.address = unsafe { result::malloc_sync(bytes) }.map_err(|error| match error {
                DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY) => {
                    DeviceError::OutOfMemory { device: self.device(), bytes }
                }
                error => failed(self.device(), "allocating memory", error),
            })?;
            // SAFETY: The allocation has `bytes` bytes and nobody else uses it yet.
            let zeroed = unsafe { result::memset_d8_async(memory.address, 0, bytes, self.stream.cu_stream()) };
            zeroed.map_err(|error| failed(self.device(), "zeroing memory", error))?;
            self.wait()?;
        }
        Ok(memory)
    }

    /// Page-locked host memory, from which the device copies without a detour.
    pub(super) fn allocate_pinned(&self, bytes: usize) -> Result<Pinned, DeviceError> {
        self.bind()?;
        let error = |error| failed(self.device(), "locking host memory", error);
        // SAFETY: The context is current; the memory is zeroed below before anybody sees it. The driver takes no
        // allocation of zero bytes.
        let start = unsafe { result::malloc_host(bytes.max(1), sys::CU_MEMHOSTALLOC_PORTABLE) }.map_err(error)?;
        let start = std::ptr::NonNull::new(start.cast::<u8>());
        let start = start.ok_or(DeviceError::OutOfMemory { device: Device::Host, bytes })?;
        // SAFETY: The driver gave at least `bytes` writable bytes.
        unsafe { start.as_ptr().write_bytes(0, bytes) };
        Ok(Pinned { start, bytes, cuda: self.clone() })
    }

    pub(super) fn copy_in(&self, into: &CudaSliceMut<'_>, from: &[u8]) -> Result<(), DeviceError> {
        self.copy("copying to the device", into.ordinal(), (from.len(), into.len()), |stream| {
            // SAFETY: The view borrows live device memory of as many bytes exclusively; `copy` waits for the end of the
            // copy before either borrow ends.
            unsafe { result::memcpy_htod_async(into.address(), from, stream) }
        })
    }

    pub(super) fn copy_out(&self, into: &mut [u8], from: &CudaSlice<'_>) -> Result<(), DeviceError> {
        self.copy("copying from the device", from.ordinal(), (from.len(), into.len()), |stream| {
            // SAFETY: As for `copy_in`.
            unsafe { result::memcpy_dtoh_async(into, from.address(), stream) }
        })
    }

    pub(super) fn copy_within(&self, into: &CudaSliceMut<'_>, from: &CudaSlice<'_>) -> Result<(), DeviceError> {
        self.check(from.ordinal())?;
        self.copy("copying on the device", into.ordinal(), (from.len(), into.len()), |stream| {
            // SAFETY: As for `copy_in`; one side is borrowed exclusively, so the two do not overlap.
            unsafe { result::memcpy_dtod_async(into.address(), from.address(), into.len(), stream) }
        })
    }

    /// Starts a copy to the device address `into` and returns before it has ended.
    ///
    /// # Safety
    /// Both sides are live, the device's has as many bytes, and neither is touched until [`Cuda::wait`] has returned.
    pub(super) unsafe fn start_copy_in(&self, into: u64, from: &[u8]) -> Result<(), DeviceError> {
        self.bind()?;
        // SAFETY: The caller's promise.
        unsafe { result::memcpy_htod_async(into, from, self.stream.cu_stream()) }
            .map_err(|error| failed(self.device(), "copying to the device", error))
    }

    /// Starts a copy from the device address `from` and returns before it has ended.
    ///
    /// # Safety
    /// As for [`Cuda::start_copy_in`].
    pub(super) unsafe fn start_copy_out(&self, into: &mut [u8], from: u64) -> Result<(), DeviceError> {
        self.bind()?;
        // SAFETY: The caller's promise.
        unsafe { result::memcpy_dtoh_async(into, from, self.stream.cu_stream()) }
            .map_err(|error| failed(self.device(), "copying from the device", error))
    }

    fn check(&self, ordinal: u32) -> Result<(), DeviceError> {
        let (expected, found) = (self.device(), Device::Cuda { ordinal });
        if expected == found { Ok(()) } else { Err(DeviceError::WrongDevice { expected, found }) }
    }

    fn copy(
        &self,
        what: &'static str,
        ordinal: u32,
        (from, into): (usize, usize),
        start: impl FnOnce(sys::CUstream) -> Result<(), DriverError>,
    ) -> Result<(), DeviceError> {
        self.check(ordinal)?;
        if from != into {
            return Err(DeviceError::LengthMismatch { from, into });
        }
        if into == 0 {
            return Ok(());
        }
        self.bind()?;
        let started = start(self.stream.cu_stream()).map_err(|error| failed(self.device(), what, error));
        // Also after an error: part of the copy may be under way.
        let waited = self.wait();
        started.and(waited)
    }

    /// Returns when everything put on the stream is done.
    pub(super) fn wait(&self) -> Result<(), DeviceError> {
        self.stream.synchronize().map_err(|error| failed(self.device(), "waiting for the stream", error))
    }
}

impl fmt::Debug for Cuda {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cuda").field("ordinal", &self.ordinal).finish_non_exhaustive()
    }
}

/// An allocation on a device, freed on drop.
#[derive(Debug)]
pub(super) struct CudaMemory {
    address: u64,
    bytes: usize,
    cuda: Cuda,
}

impl CudaMemory {
    pub(super) const fn len(&self) -> usize {
        self.bytes
    }

    pub(super) const fn device(&self) -> Device {
        self.cuda.device()
    }

    pub(super) const fn as_slice(&self) -> CudaSlice<'_> {
        CudaSlice::new(self.address, self.bytes, self.cuda.ordinal)
    }

    pub(super) const fn as_slice_mut(&mut self) -> CudaSliceMut<'_> {
        CudaSliceMut::new(self.address, self.bytes, self.cuda.ordinal)
    }
}

impl Drop for CudaMemory {
    fn drop(&mut self) {
        if self.address != 0 && self.cuda.bind().is_ok() {
            // SAFETY: The address came from `malloc_sync` in this context and is freed once; no borrow outlives `self`.
            // A device that is gone has freed its memory already.
            let _device_is_gone = unsafe { result::free_sync(self.address) };
        }
    }
}

/// Page-locked host memory, freed on drop.
pub(super) struct Pinned {
    start: std::ptr::NonNull<u8>,
    bytes: usize,
    cuda: Cuda,
}

// SAFETY: The allocation is owned by one value, like a `Box<[u8]>`. CUDA driver API, cuMemHostAlloc: with
// CU_MEMHOSTALLOC_PORTABLE "the memory returned by this call will be considered as pinned memory by all CUDA contexts".
unsafe impl Send for Pinned {}
// SAFETY: Shared access only reads, as with `&[u8]`.
unsafe impl Sync for Pinned {}

impl Pinned {
    pub(super) const fn as_slice(&self) -> &[u8] {
        // SAFETY: The allocation has `bytes` initialized bytes, lives as long as `self`, and is only written through
        // `&mut self`: copies wait for the device before they return (`DV-3`).
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes) }
    }

    pub(super) const fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: As above; `&mut self` makes this the only access.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.cuda.bind().is_ok() {
            // SAFETY: The address came from `malloc_host` and is freed once; no borrow outlives `self`.
            let _device_is_gone = unsafe { result::free_host(self.start.as_ptr().cast()) };
        }
    }
}

impl fmt::Debug for Pinned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pinned").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

fn number(ordinal: u32) -> i32 {
    i32::try_from(ordinal).unwrap_or(i32::MAX)
}

pub(super) fn failed(device: Device, what: &'static str, error: DriverError) -> DeviceError {
    let (name, description) = describe(error);
    DeviceError::Driver { device, what, name, description }
}

/// The driver's own name and words for an error.
fn describe(error: DriverError) -> (String, String) {
    let text = |found: Result<&std::ffi::CStr, DriverError>| {
        found.map_or_else(|_| "no description".to_owned(), |text| text.to_string_lossy().into_owned())
    };
    (text(error.error_name()), text(error.error_string()))
}
