//! The vendor's library, found at run time.
//!
//! Owns: loading `libnccl`, its C types and functions, the words for its errors. Refuses to know: communicators' state.
//!
//! `NC-1`: a library that is missing or too old is an error that names what was tried; nothing is linked.
//! The names and layouts are those of `nccl.h`, which are the same from 2.18 to 2.32.
#![expect(unsafe_code, reason = "loading a C library and naming its functions")]

use std::ffi::{CStr, c_char, c_int, c_void};
use std::fmt;
use std::mem::ManuallyDrop;
use std::path::Path;
use std::sync::Arc;

use libloading::Library;

use crate::comm::{CommError, Operation};

/// `ncclSuccess` of `ncclResult_t`.
pub(super) const SUCCESS: c_int = 0;
/// `ncclInProgress`: a call of a non-blocking communicator has not come to its end.
pub(super) const IN_PROGRESS: c_int = 7;
/// `ncclUint8` of `ncclDataType_t`.
pub(super) const UINT8: c_int = 1;
/// `ncclFloat32`.
pub(super) const FLOAT32: c_int = 7;
/// `ncclSum` of `ncclRedOp_t`.
pub(super) const SUM: c_int = 0;

/// The oldest release whose configuration structure is the one below, and whose calls can all be non-blocking.
const OLDEST: NcclVersion = NcclVersion { major: 2, minor: 18, patch: 0 };
/// `NCCL_API_MAGIC`.
const CONFIG_MAGIC: u32 = 0xcafe_beef;
/// `NCCL_VERSION(2, 18, 0)`: the release whose structure [`RawConfig`] is. The library copies as many bytes as `size`
/// says, and takes its defaults for every field that came after `version`; so one layout serves all later releases, and
/// naming the loaded release here instead would promise fields that are not there.
const CONFIG_VERSION: u32 = 21800;
/// `NCCL_CONFIG_UNDEF_INT`: the library decides.
const UNDEFINED: c_int = c_int::MIN;

/// What the library is looked for as, when no path is given: the name of the run-time library, then of the development link.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// A release of NCCL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "the parts of a version")]
pub struct NcclVersion {
    pub major: u32,
    pub minor: u32,
    pub patch: u32,
}

impl NcclVersion {
    /// Decodes `ncclGetVersion`: from 2.9 on 10000, 100 and 1 for the three parts, before 1000, 100 and 1.
    #[must_use]
    pub const fn from_code(code: u32) -> Self {
        let unit = if code < 10_000 { 1000 } else { 10_000 };
        Self { major: code / unit, minor: code % unit / 100, patch: code % 100 }
    }
}

impl fmt::Display for NcclVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// `ncclUniqueId`: made by one rank, given to all by the coordinator. Who has it can join the group, so it is not printed.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct NcclUniqueId([u8; Self::BYTES]);

impl NcclUniqueId {
    /// The length of an id.
    pub const BYTES: usize = 128;

    /// The id that travelled as these bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; Self::BYTES]) -> Self {
        Self(bytes)
    }

    /// The bytes to send to the other ranks.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; Self::BYTES] {
        &self.0
    }
}

impl fmt::Debug for NcclUniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NcclUniqueId(..)")
    }
}

/// `ncclComm_t`.
pub(super) type RawComm = *mut c_void;
/// `cudaStream_t`.
pub(super) type RawStream = *mut c_void;

/// `ncclConfig_t` of 2.18.
#[repr(C)]
#[derive(Debug)]
pub(super) struct RawConfig {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

impl RawConfig {
    /// Everything at the library's defaults, but non-blocking.
    pub(super) const fn non_blocking() -> Self {
        Self {
            size: size_of::<Self>(),
            magic: CONFIG_MAGIC,
            version: CONFIG_VERSION,
            blocking: 0,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: UNDEFINED,
            net_name: std::ptr::null(),
            split_share: UNDEFINED,
        }
    }
}

macro_rules! functions {
    ($($(#[$doc:meta])* $field:ident = $symbol:literal: fn($($argument:ty),*) -> $result:ty;)+) => {
        /// The library's functions that we call, under their own names.
        pub(super) struct Functions {
            $($(#[$doc])* pub(super) $field: unsafe extern "C" fn($($argument),*) -> $result,)+
        }

        impl Functions {
            /// # Safety
            /// The library is NCCL.
            unsafe fn load(library: &Library) -> Result<Self, libloading::Error> {
                Ok(Self {
                    $(
                        // SAFETY: The type is that of `nccl.h`; the pointer is used while the library is loaded.
                        $field: *unsafe { library.get(concat!($symbol, "\0").as_bytes()) }?,
                    )+
                })
            }
        }
    };
}

functions! {
    get_version = "ncclGetVersion": fn(*mut c_int) -> c_int;
    get_unique_id = "ncclGetUniqueId": fn(*mut NcclUniqueId) -> c_int;
    init_rank = "ncclCommInitRankConfig": fn(*mut RawComm, c_int, NcclUniqueId, c_int, *mut RawConfig) -> c_int;
    async_error = "ncclCommGetAsyncError": fn(RawComm, *mut c_int) -> c_int;
    finalize = "ncclCommFinalize": fn(RawComm) -> c_int;
    destroy = "ncclCommDestroy": fn(RawComm) -> c_int;
    abort = "ncclCommAbort": fn(RawComm) -> c_int;
    last_error = "ncclGetLastError": fn(RawComm) -> *const c_char;
    error_string = "ncclGetErrorString": fn(c_int) -> *const c_char;
    group_start = "ncclGroupStart": fn() -> c_int;
    group_end = "ncclGroupEnd": fn() -> c_int;
    send = "ncclSend": fn(*const c_void, usize, c_int, c_int, RawComm, RawStream) -> c_int;
    receive = "ncclRecv": fn(*mut c_void, usize, c_int, c_int, RawComm, RawStream) -> c_int;
    broadcast = "ncclBroadcast": fn(*const c_void, *mut c_void, usize, c_int, c_int, RawComm, RawStream) -> c_int;
    reduce = "ncclReduce": fn(*const c_void, *mut c_void, usize, c_int, c_int, c_int, RawComm, RawStream) -> c_int;
    all_reduce = "ncclAllReduce": fn(*const c_void, *mut c_void, usize, c_int, c_int, RawComm, RawStream) -> c_int;
    all_gather = "ncclAllGather": fn(*const c_void, *mut c_void, usize, c_int, RawComm, RawStream) -> c_int;
    reduce_scatter = "ncclReduceScatter":
        fn(*const c_void, *mut c_void, usize, c_int, c_int, RawComm, RawStream) -> c_int;
}

/// The loaded library; cheap to clone.
#[derive(Clone)]
pub struct NcclLibrary(Arc<Loaded>);

struct Loaded {
    name: String,
    version: NcclVersion,
    functions: Functions,
    /// Never unloaded: it runs threads of its own, and registers things to be done when the process ends.
    _library: ManuallyDrop<Library>,
}

impl NcclLibrary {
    /// Loads NCCL from `path`, or else from where the dynamic linker finds `libnccl.so.2` or `libnccl.so`.
    ///
    /// # Errors
    /// [`CommError::LibraryMissing`], [`CommError::LibraryTooOld`].
    pub fn load(path: Option<&Path>) -> Result<Self, CommError> {
        let mut tried = Vec::new();
        let names: Vec<String> = match path {
            Some(path) => vec![path.display().to_string()],
            None => NAMES.map(str::to_owned).to_vec(),
        };
        for name in names {
            // SAFETY: Loading runs the library's initializers. Those of NCCL have no preconditions; a path that was
            // given names the library that the user trusts.
            match unsafe { Library::new(&name) } {
                Ok(library) => return Self::bind(name, library),
                Err(error) => tried.push(format!("{name}: {}", crate::error::chain(&error))),
            }
        }
        Err(CommError::LibraryMissing { tried: tried.join("; ") })
    }

    fn bind(name: String, library: Library) -> Result<Self, CommError> {
        let library = ManuallyDrop::new(library);
        // SAFETY: The names are NCCL's; a library that has them all and is none is beyond what can be checked.
        let functions = unsafe { Functions::load(&library) };
        let functions = functions
            .map_err(|error| CommError::LibraryMissing { tried: format!("{name}: {}", crate::error::chain(&error)) })?;
        let mut code = 0;
        // SAFETY: The function writes one integer.
        let result = unsafe { (functions.get_version)(&raw mut code) };
        let version = NcclVersion::from_code(u32::try_from(code).unwrap_or(0));
        let this = Self(Arc::new(Loaded { name, version, functions, _library: library }));
        this.check(Operation::Connect, "ncclGetVersion", result, std::ptr::null_mut())?;
        if version < OLDEST {
            let name = this.0.name.clone();
            return Err(CommError::LibraryTooOld { name, found: version, oldest: OLDEST });
        }
        Ok(this)
    }

    /// The name or path that it was loaded by.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Its release.
    #[must_use]
    pub fn version(&self) -> NcclVersion {
        self.0.version
    }

    /// A new id for one group. The process that made it must live until all ranks have connected.
    ///
    /// # Errors
    /// [`CommError::Nccl`] when the library finds no network interface to meet on.
    pub fn unique_id(&self) -> Result<NcclUniqueId, CommError> {
        let mut id = NcclUniqueId([0; NcclUniqueId::BYTES]);
        // SAFETY: The function writes one id.
        let result = unsafe { (self.0.functions.get_unique_id)(&raw mut id) };
        self.check(Operation::Connect, "ncclGetUniqueId", result, std::ptr::null_mut())?;
        Ok(id)
    }

    pub(super) fn functions(&self) -> &Functions {
        &self.0.functions
    }

    /// The error for a result that is neither success nor in progress. `raw` is null or a live communicator that this
    /// thread has to itself.
    pub(super) fn check(
        &self,
        operation: Operation,
        call: &'static str,
        result: c_int,
        raw: RawComm,
    ) -> Result<(), CommError> {
        if matches!(result, SUCCESS | IN_PROGRESS) {
            return Ok(());
        }
        // SAFETY: The function takes any integer and gives a static text.
        let name = text(unsafe { (self.0.functions.error_string)(result) });
        // SAFETY: `raw` is as promised above; the text is copied before anything else is called.
        let detail = text(unsafe { (self.0.functions.last_error)(raw) });
        Err(CommError::Nccl { operation, call, code: result, name, detail })
    }
}

impl fmt::Debug for NcclLibrary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Loaded { name, version, .. } = &*self.0;
        f.debug_struct("NcclLibrary").field("name", name).field("version", version).finish_non_exhaustive()
    }
}

/// A text of the library's; empty when there is none.
fn text(pointer: *const c_char) -> String {
    if pointer.is_null() {
        return String::new();
    }
    // SAFETY: The library gives null or a text that ends in a zero byte and lives until its next call.
    unsafe { CStr::from_ptr(pointer) }.to_string_lossy().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From the macro NCCL_VERSION in nccl.h: 2.8.3 is 2803, 2.18.1 is 21801, 2.32.3 is 23203.
    #[test]
    fn versions_are_decoded() {
        let decoded = [2803, 21801, 23203].map(|code| NcclVersion::from_code(code).to_string());
        assert_eq!(decoded, ["2.8.3", "2.18.1", "2.32.3"]);
    }

    /// Eight bytes, two times four, four times four, a pointer, four and padding.
    #[test]
    fn the_configuration_has_the_layout_of_2_18() {
        assert_eq!(size_of::<RawConfig>(), 48);
        assert_eq!(std::mem::offset_of!(RawConfig, blocking), 16);
        assert_eq!(std::mem::offset_of!(RawConfig, net_name), 32);
    }

    #[test]
    fn a_missing_library_is_named() {
        let path = Path::new("/nowhere/libnccl.so.2");
        match NcclLibrary::load(Some(path)) {
            Err(CommError::LibraryMissing { tried }) => {
                assert!(tried.starts_with("/nowhere/libnccl.so.2: "), "{tried}")
            }
            other => panic!("{other:?}"),
        }
    }

    /// A library that is there and is another one: the system's own.
    #[test]
    fn another_library_is_refused() {
        match NcclLibrary::load(Some(Path::new("libc.so.6"))) {
            Err(CommError::LibraryMissing { tried }) => assert!(tried.contains("ncclGetVersion"), "{tried}"),
            other => panic!("{other:?}"),
        }
    }
}
