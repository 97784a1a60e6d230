//! A `libcuda` for tests: the functions of the driver that Weightcast calls, with device memory in host memory.
//!
//! Owns: the C interface. Refuses to know: kernels; loading a module is refused in the driver's words.
//!
//! It is stricter than a driver where that finds faults: a copy that is put on a stream is carried out when somebody waits
//! for the stream, and not before, so bytes that are used too early are old ones; a call without a current context and an
//! address outside of live memory are errors.
//!
//! `WEIGHTCAST_MOCK_CUDA_DEVICES` (1) and `WEIGHTCAST_MOCK_CUDA_BYTES` (1 GiB for each device) say what there is.
#![expect(unsafe_code, reason = "a C interface takes raw pointers")]

mod state;

use std::ffi::{CStr, c_char, c_int, c_uchar, c_uint, c_void};

use state::{Copied, Failure, current, driver, set_current};

/// `CUresult` where nothing is wrong; the others are those of `cuda.h`.
pub const SUCCESS: c_int = 0;
/// `CUDA_ERROR_NOT_READY`.
pub const NOT_READY: c_int = 600;
/// `CUDA_ERROR_NOT_SUPPORTED`.
pub const NOT_SUPPORTED: c_int = 801;

/// The compute capability of the devices: 8.0, the oldest that the kernels are made for.
const CAPABILITY_MAJOR: (c_int, c_int) = (75, 8);
const CAPABILITY_MINOR: (c_int, c_int) = (76, 0);

fn code(result: Result<(), Failure>) -> c_int {
    result.map_or_else(Failure::code, |()| SUCCESS)
}

/// Writes an answer.
///
/// # Safety
/// `into` is null or writable.
unsafe fn give<T>(into: *mut T, value: Result<T, Failure>) -> c_int {
    match value {
        Err(failure) => failure.code(),
        Ok(_) if into.is_null() => Failure::InvalidValue.code(),
        Ok(value) => {
            // SAFETY: Writable, by the caller's promise.
            unsafe { into.write(value) };
            SUCCESS
        }
    }
}

/// `cuInit`.
#[unsafe(no_mangle)]
pub extern "C" fn cuInit(_flags: c_uint) -> c_int {
    SUCCESS
}

/// `cuDeviceGetCount`.
///
/// # Safety
/// `count` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> c_int {
    // SAFETY: See above.
    unsafe { give(count, Ok(c_int::try_from(driver().devices()).unwrap_or(c_int::MAX))) }
}

/// `cuDeviceGet`.
///
/// # Safety
/// `device` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> c_int {
    // SAFETY: See above.
    unsafe { give(device, driver().check_device(ordinal).map(|()| ordinal)) }
}

/// `cuDeviceGetName`.
///
/// # Safety
/// `name` has room for `room` characters.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, room: c_int, device: c_int) -> c_int {
    let text = c"Mock CUDA device".to_bytes_with_nul();
    if driver().check_device(device).is_err() || usize::try_from(room).unwrap_or(0) < text.len() {
        return Failure::InvalidValue.code();
    }
    // SAFETY: There is room, by the caller's promise.
    unsafe { name.cast::<u8>().copy_from_nonoverlapping(text.as_ptr(), text.len()) };
    SUCCESS
}

/// `cuDeviceTotalMem`.
///
/// # Safety
/// `bytes` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, device: c_int) -> c_int {
    // SAFETY: See above.
    unsafe { give(bytes, driver().check_device(device).map(|()| driver().bytes())) }
}

/// `cuDeviceGetAttribute`: the compute capability; 0 for all others.
///
/// # Safety
/// `value` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, device: c_int) -> c_int {
    let known = [CAPABILITY_MAJOR, CAPABILITY_MINOR].into_iter().find(|known| known.0 == attribute);
    // SAFETY: See above.
    unsafe { give(value, driver().check_device(device).map(|()| known.map_or(0, |known| known.1))) }
}

/// `cuDevicePrimaryCtxRetain`.
///
/// # Safety
/// `context` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut *mut c_void, device: c_int) -> c_int {
    let handle = usize::try_from(device).unwrap_or(0) + 1;
    // SAFETY: See above.
    unsafe { give(context, driver().check_device(device).map(|()| std::ptr::without_provenance_mut(handle))) }
}

/// `cuDevicePrimaryCtxRelease`.
#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRelease_v2(device: c_int) -> c_int {
    code(driver().check_device(device))
}

/// `cuCtxGetCurrent`.
///
/// # Safety
/// `context` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetCurrent(context: *mut *mut c_void) -> c_int {
    // SAFETY: See above.
    unsafe { give(context, Ok(std::ptr::without_provenance_mut(current().map_or(0, |device| device + 1)))) }
}

/// `cuCtxSetCurrent`.
#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSetCurrent(context: *mut c_void) -> c_int {
    set_current(context.addr().checked_sub(1));
    SUCCESS
}

/// `cuCtxSynchronize`.
#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSynchronize() -> c_int {
    code(driver().run_all())
}

/// `cuMemGetInfo`.
///
/// # Safety
/// Both are null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> c_int {
    // SAFETY: See above.
    let first = unsafe { give(free, driver().free_bytes()) };
    // SAFETY: See above.
    let second = unsafe { give(total, Ok(driver().bytes())) };
    first.max(second)
}

/// `cuMemAlloc`.
///
/// # Safety
/// `address` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAlloc_v2(address: *mut u64, bytes: usize) -> c_int {
    // SAFETY: See above.
    unsafe { give(address, driver().allocate(bytes)) }
}

/// `cuMemFree`.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemFree_v2(address: u64) -> c_int {
    code(driver().free(address))
}

/// `cuMemHostAlloc`.
///
/// # Safety
/// `address` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostAlloc(address: *mut *mut c_void, bytes: usize, _flags: c_uint) -> c_int {
    // SAFETY: See above.
    unsafe { give(address, driver().allocate_host(bytes)) }
}

/// `cuMemFreeHost`.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemFreeHost(address: *mut c_void) -> c_int {
    code(driver().free_host(address))
}

/// `cuMemsetD8Async`.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemsetD8Async(address: u64, value: c_uchar, bytes: usize, stream: *mut c_void) -> c_int {
    code(driver().put(stream, Copied::Set { into: address, value, bytes }))
}

/// `cuMemcpyHtoDAsync`.
///
/// # Safety
/// `from` has `bytes` bytes and lives until the stream was waited for.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyHtoDAsync_v2(
    into: u64,
    from: *const c_void,
    bytes: usize,
    stream: *mut c_void,
) -> c_int {
    code(driver().put(stream, Copied::In { into, from: from.expose_provenance(), bytes }))
}

/// `cuMemcpyDtoHAsync`.
///
/// # Safety
/// `into` has room for `bytes` bytes and lives until the stream was waited for.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoHAsync_v2(
    into: *mut c_void,
    from: u64,
    bytes: usize,
    stream: *mut c_void,
) -> c_int {
    code(driver().put(stream, Copied::Out { into: into.expose_provenance(), from, bytes }))
}

/// `cuMemcpyDtoDAsync`.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoDAsync_v2(into: u64, from: u64, bytes: usize, stream: *mut c_void) -> c_int {
    code(driver().put(stream, Copied::Within { into, from, bytes }))
}

/// `cuStreamCreate`.
///
/// # Safety
/// `stream` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreate(stream: *mut *mut c_void, _flags: c_uint) -> c_int {
    // SAFETY: See above.
    unsafe { give(stream, driver().open_stream()) }
}

/// `cuStreamDestroy`: what is on the stream still ends.
#[unsafe(no_mangle)]
pub extern "C" fn cuStreamDestroy_v2(stream: *mut c_void) -> c_int {
    code(driver().close_stream(stream))
}

/// `cuStreamSynchronize`.
#[unsafe(no_mangle)]
pub extern "C" fn cuStreamSynchronize(stream: *mut c_void) -> c_int {
    code(driver().run(stream))
}

/// `cuStreamQuery`: each call carries out one piece of work, so that whoever asks long enough comes to the end.
#[unsafe(no_mangle)]
pub extern "C" fn cuStreamQuery(stream: *mut c_void) -> c_int {
    match driver().step(stream) {
        Ok(true) => SUCCESS,
        Ok(false) => NOT_READY,
        Err(failure) => failure.code(),
    }
}

/// `cuModuleLoadData`: there is nothing that could run a kernel.
#[unsafe(no_mangle)]
pub extern "C" fn cuModuleLoadData(_module: *mut *mut c_void, _image: *const c_void) -> c_int {
    NOT_SUPPORTED
}

/// `cuGetErrorName`.
///
/// # Safety
/// `name` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorName(error: c_int, name: *mut *const c_char) -> c_int {
    // SAFETY: See above.
    unsafe { give(name, Ok(words(error).0.as_ptr())) }
}

/// `cuGetErrorString`.
///
/// # Safety
/// `text` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorString(error: c_int, text: *mut *const c_char) -> c_int {
    // SAFETY: See above.
    unsafe { give(text, Ok(words(error).1.as_ptr())) }
}

fn words(error: c_int) -> (&'static CStr, &'static CStr) {
    match error {
        1 => (c"CUDA_ERROR_INVALID_VALUE", c"invalid argument"),
        2 => (c"CUDA_ERROR_OUT_OF_MEMORY", c"out of memory"),
        101 => (c"CUDA_ERROR_INVALID_DEVICE", c"invalid device ordinal"),
        201 => (c"CUDA_ERROR_INVALID_CONTEXT", c"invalid device context"),
        400 => (c"CUDA_ERROR_INVALID_HANDLE", c"invalid resource handle"),
        700 => (c"CUDA_ERROR_ILLEGAL_ADDRESS", c"an illegal memory access was encountered"),
        NOT_SUPPORTED => (c"CUDA_ERROR_NOT_SUPPORTED", c"operation not supported: the mock runs no kernels"),
        _ => (c"CUDA_ERROR_UNKNOWN", c"unknown error"),
    }
}
