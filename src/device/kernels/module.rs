//! A loaded module and its launches.
//!
//! Owns: the module's handle. Refuses to know: what its kernels do; their arguments are its caller's promise.

use std::collections::BTreeMap;
use std::ffi::{CString, c_void};
use std::fmt;
use std::sync::Mutex;

use cudarc::driver::result;
use cudarc::driver::sys::{CUfunction, CUmodule};

use crate::device::DeviceError;
use crate::device::cuda::{Cuda, failed};

/// Threads of a block: a whole number of warps, small enough for any register count.
const BLOCK: u32 = 256;

/// The kernels of `quantize.cu`.
const NAMES: [&str; 6] = [
    "weightcast_absmax",
    "weightcast_quantize_4bit",
    "weightcast_dequantize_4bit",
    "weightcast_dequantize_nested",
    "weightcast_quantize_int8",
    "weightcast_dequantize_int8",
];

/// One argument of a kernel.
#[derive(Clone, Copy, Debug)]
pub(super) enum Argument {
    U64(u64),
    U32(u32),
    F32(f32),
}

impl Argument {
    /// Where the value is, for the driver to copy.
    const fn address(&self) -> *mut c_void {
        let address: *const c_void = match self {
            Self::U64(value) => std::ptr::from_ref(value).cast(),
            Self::U32(value) => std::ptr::from_ref(value).cast(),
            Self::F32(value) => std::ptr::from_ref(value).cast(),
        };
        address.cast_mut()
    }
}

/// A module in a device's primary context.
pub(super) struct Module {
    cuda: Cuda,
    raw: CUmodule,
    functions: BTreeMap<&'static str, CUfunction>,
    /// A module is used by one thread at a time; handles of the driver may move between threads.
    _one_user: Mutex<()>,
}

// SAFETY: CUDA programming guide, driver API: handles of modules and functions belong to a context, and any thread that has
// made the context current may use them; every call here binds it first.
unsafe impl Send for Module {}

impl Module {
    /// Compiles `ptx` for the device of `cuda`.
    pub(super) fn load(cuda: Cuda, ptx: &str) -> Result<Self, DeviceError> {
        let error = |what| {
            let device = cuda.device();
            move |error| failed(device, what, error)
        };
        cuda.bind()?;
        let text = CString::new(ptx).expect("PTX has no zero byte");
        // SAFETY: The image is a text that ends in a zero byte and lives until the call returns.
        let raw = unsafe { result::module::load_data(text.as_ptr().cast()) }.map_err(error("loading the kernels"))?;
        let mut module = Self { cuda: cuda.clone(), raw, functions: BTreeMap::new(), _one_user: Mutex::new(()) };
        for name in NAMES {
            let text = CString::new(name).expect("a name has no zero byte");
            // SAFETY: The module was just loaded.
            let function = unsafe { result::module::get_function(raw, text) }.map_err(error("finding a kernel"))?;
            module.functions.insert(name, function);
        }
        Ok(module)
    }

    /// Runs a kernel of `threads` threads to its end. The callers of this module pass the arguments that the kernel's
    /// source names, with live addresses of as many bytes as it touches for its count.
    pub(super) fn launch(
        &mut self,
        name: &'static str,
        threads: u64,
        arguments: &[Argument],
    ) -> Result<(), DeviceError> {
        let Some(&function) = self.functions.get(name) else { unreachable!("{name} is one of NAMES") };
        if threads == 0 {
            return Ok(());
        }
        let device = self.cuda.device();
        self.cuda.bind()?;
        let blocks = u32::try_from(threads.div_ceil(u64::from(BLOCK))).unwrap_or(u32::MAX);
        let mut addresses: Vec<*mut c_void> = arguments.iter().map(Argument::address).collect();
        let (grid, block, stream) = ((blocks, 1, 1), (BLOCK, 1, 1), self.cuda.stream());
        // SAFETY: The function is of this live module; the arguments are those that its source names (see above), and the
        // driver copies them before it returns. The caller's borrows of the buffers last until `wait` returns.
        let launched = unsafe { result::launch_kernel(function, grid, block, 0, stream, &mut addresses) };
        let launched = launched.map_err(|error| failed(device, "launching a kernel", error));
        // Also after an error: what was put on the stream before may be under way.
        let waited = self.cuda.wait();
        launched.and(waited)
    }

    /// Zeroes device memory that the caller has to itself.
    pub(super) fn zero(&mut self, address: u64, bytes: usize) -> Result<(), DeviceError> {
        if bytes == 0 {
            return Ok(());
        }
        let device = self.cuda.device();
        self.cuda.bind()?;
        // SAFETY: The caller's exclusive view has these bytes; what follows on the same stream comes after it.
        let zeroed = unsafe { result::memset_d8_async(address, 0, bytes, self.cuda.stream()) };
        zeroed.map_err(|error| failed(device, "zeroing memory", error))
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        if self.cuda.bind().is_ok() {
            // SAFETY: Loaded by `load` and unloaded once; every launch has ended.
            let _device_is_gone = unsafe { result::module::unload(self.raw) };
        }
    }
}

impl fmt::Debug for Module {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Module").field("cuda", &self.cuda).finish_non_exhaustive()
    }
}
