//! A `libnccl` for tests: the C functions that Weightcast calls, over loopback TCP in host memory, with faults on request.
//!
//! Owns: the C interface. Refuses to know: CUDA; stream arguments are ignored and pointers are the host's.
//!
//! It behaves as NCCL does with non-blocking communicators: calls return at once with `ncclInProgress`, the outcome is
//! asked for with `ncclCommGetAsyncError`, an operation with a peer that is gone ends in `ncclRemoteError`, and
//! `ncclCommAbort` ends whatever is under way and frees the communicator.
//!
//! Faults belong to one communicator: they travel in its unique id. [`weightcast_mock_nccl_fault`] puts one into an id; so
//! does the environment variable `WEIGHTCAST_MOCK_NCCL_FAULT=kind:rank:call` for ids made while it is set.
#![expect(unsafe_code, reason = "a C interface takes raw pointers")]

mod communicator;
mod fault;
mod id;
mod mesh;

use std::cell::RefCell;
use std::ffi::{c_char, c_int, c_void};
use std::sync::Arc;

use communicator::{Communicator, Work};
use fault::Fault;
use id::UniqueId;

/// `ncclSuccess` of `ncclResult_t`; the others follow.
pub const SUCCESS: c_int = 0;
/// `ncclSystemError`.
pub const SYSTEM_ERROR: c_int = 2;
/// `ncclInternalError`.
pub const INTERNAL_ERROR: c_int = 3;
/// `ncclInvalidArgument`.
pub const INVALID_ARGUMENT: c_int = 4;
/// `ncclInvalidUsage`.
pub const INVALID_USAGE: c_int = 5;
/// `ncclRemoteError`.
pub const REMOTE_ERROR: c_int = 6;
/// `ncclInProgress`.
pub const IN_PROGRESS: c_int = 7;

/// 2.23.4: old enough that a caller must not count on the newest fields of the configuration.
const VERSION: c_int = 22304;
const CONFIG_MAGIC: u32 = 0xcafe_beef;
const UINT8: c_int = 1;
const FLOAT32: c_int = 7;
const SUM: c_int = 0;

/// The first fields of `ncclConfig_t`, which every version since 2.14 has.
#[repr(C)]
#[derive(Debug)]
pub struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
}

/// How deeply groups are open, and what was called inside.
type Group = (u32, Vec<(Arc<Communicator>, Work)>);

thread_local! {
    /// The group that this thread has open.
    static GROUP: RefCell<Group> = const { RefCell::new((0, Vec::new())) };
}

/// A communicator as callers hold it.
type Handle = *const Communicator;

/// The communicator behind a handle, which stays the caller's.
///
/// # Safety
/// `handle` is null or came from [`ncclCommInitRankConfig`] and was not freed.
unsafe fn borrow(handle: Handle) -> Option<Arc<Communicator>> {
    if handle.is_null() {
        return None;
    }
    // SAFETY: The handle came from `Arc::into_raw` and its reference is still counted.
    unsafe { Arc::increment_strong_count(handle) };
    // SAFETY: The count was raised for this reference.
    Some(unsafe { Arc::from_raw(handle) })
}

/// `ncclGetVersion`.
///
/// # Safety
/// `version` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetVersion(version: *mut c_int) -> c_int {
    // SAFETY: See above.
    let Some(version) = (unsafe { version.as_mut() }) else { return INVALID_ARGUMENT };
    *version = VERSION;
    SUCCESS
}

/// `ncclGetUniqueId`: starts a rendezvous in this process.
///
/// # Safety
/// `id` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetUniqueId(id: *mut UniqueId) -> c_int {
    // SAFETY: See above.
    let Some(id) = (unsafe { id.as_mut() }) else { return INVALID_ARGUMENT };
    match mesh::start_rendezvous(Fault::from_environment()) {
        Ok(new) => {
            *id = new;
            SUCCESS
        }
        Err(_) => SYSTEM_ERROR,
    }
}

/// Puts a fault into an id that was just made: on `rank`, at its `call`th call of a collective, counted from 0. Kinds:
/// 0 none, 1 the operation fails, 2 it never ends, 3 the call itself fails, 4 the rank's connections break without a
/// word, 5 the initialization never ends.
///
/// # Safety
/// `id` is null or came from [`ncclGetUniqueId`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn weightcast_mock_nccl_fault(id: *mut UniqueId, kind: c_int, rank: u32, call: u64) -> c_int {
    // SAFETY: See above.
    let Some(id) = (unsafe { id.as_mut() }) else { return INVALID_ARGUMENT };
    match Fault::new(kind, rank, call) {
        Some(fault) => {
            id.set_fault(fault);
            SUCCESS
        }
        None => INVALID_ARGUMENT,
    }
}

/// `ncclCommInitRankConfig`, non-blocking only.
///
/// # Safety
/// `handle` and `config` are null or valid; `config` has as many bytes as its first field says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommInitRankConfig(
    handle: *mut Handle,
    ranks: c_int,
    id: UniqueId,
    rank: c_int,
    config: *const Config,
) -> c_int {
    // SAFETY: See above.
    let (Some(handle), Some(config)) = (unsafe { handle.as_mut() }, unsafe { config.as_ref() }) else {
        return INVALID_ARGUMENT;
    };
    *handle = std::ptr::null();
    let is_known = config.magic == CONFIG_MAGIC && config.size >= size_of::<Config>() && config.version >= 21400;
    if !is_known || config.blocking != 0 {
        return INVALID_ARGUMENT;
    }
    let (Ok(ranks), Ok(rank)) = (u32::try_from(ranks), u32::try_from(rank)) else { return INVALID_ARGUMENT };
    if rank >= ranks || !id.is_ours() {
        return INVALID_ARGUMENT;
    }
    match Communicator::start(id, rank, ranks) {
        Ok(communicator) => {
            *handle = Arc::into_raw(communicator);
            IN_PROGRESS
        }
        Err(_) => SYSTEM_ERROR,
    }
}

/// `ncclCommGetAsyncError`.
///
/// # Safety
/// `handle` is null or a live communicator; `result` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommGetAsyncError(handle: Handle, result: *mut c_int) -> c_int {
    // SAFETY: See above.
    let (Some(communicator), Some(result)) = (unsafe { borrow(handle) }, unsafe { result.as_mut() }) else {
        return INVALID_ARGUMENT;
    };
    *result = communicator.status();
    SUCCESS
}

/// `ncclCommFinalize`: the state is `ncclInProgress` until everything is done.
///
/// # Safety
/// `handle` is null or a live communicator.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommFinalize(handle: Handle) -> c_int {
    // SAFETY: See above.
    let Some(communicator) = (unsafe { borrow(handle) }) else { return INVALID_ARGUMENT };
    communicator.status()
}

/// `ncclCommDestroy`: waits for what is under way, then frees.
///
/// # Safety
/// `handle` is null or a live communicator, and is not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommDestroy(handle: Handle) -> c_int {
    // SAFETY: See above.
    unsafe { free(handle, Communicator::drain) }
}

/// `ncclCommAbort`: ends what is under way, then frees. No buffer is touched after it has returned.
///
/// # Safety
/// `handle` is null or a live communicator, and is not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommAbort(handle: Handle) -> c_int {
    // SAFETY: See above.
    unsafe { free(handle, |_| ()) }
}

/// # Safety
/// `handle` is null or a live communicator, and is not used again.
unsafe fn free(handle: Handle, before: impl FnOnce(&Communicator)) -> c_int {
    if handle.is_null() {
        return SUCCESS;
    }
    // SAFETY: The handle came from `Arc::into_raw`; this takes back the caller's reference.
    let communicator = unsafe { Arc::from_raw(handle) };
    before(&communicator);
    communicator.stop();
    SUCCESS
}

/// `ncclGetLastError`.
///
/// # Safety
/// `handle` is null or a live communicator, which outlives the text.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetLastError(handle: Handle) -> *const c_char {
    // SAFETY: See above.
    unsafe { handle.as_ref() }.map_or(c"".as_ptr(), Communicator::last_error)
}

/// `ncclGetErrorString`.
#[unsafe(no_mangle)]
pub extern "C" fn ncclGetErrorString(result: c_int) -> *const c_char {
    let text = match result {
        SUCCESS => c"no error",
        SYSTEM_ERROR => c"unhandled system error (mock)",
        INTERNAL_ERROR => c"internal error (mock)",
        INVALID_ARGUMENT => c"invalid argument (mock)",
        INVALID_USAGE => c"invalid usage (mock)",
        REMOTE_ERROR => c"remote process exited or there was a network error (mock)",
        IN_PROGRESS => c"NCCL operation in progress (mock)",
        _ => c"unknown result code (mock)",
    };
    text.as_ptr()
}

/// `ncclGroupStart`.
#[unsafe(no_mangle)]
pub extern "C" fn ncclGroupStart() -> c_int {
    GROUP.with_borrow_mut(|(depth, _)| *depth += 1);
    SUCCESS
}

/// `ncclGroupEnd`: starts everything that was called since the outermost start.
#[unsafe(no_mangle)]
pub extern "C" fn ncclGroupEnd() -> c_int {
    let calls = GROUP.with_borrow_mut(|(depth, calls)| {
        let left = depth.checked_sub(1)?;
        *depth = left;
        Some(if left == 0 { std::mem::take(calls) } else { Vec::new() })
    });
    let Some(calls) = calls else { return INVALID_USAGE };
    let mut groups: Vec<(Arc<Communicator>, Vec<Work>)> = Vec::new();
    for (communicator, work) in calls {
        match groups.iter_mut().find(|(known, _)| Arc::ptr_eq(known, &communicator)) {
            Some((_, works)) => works.push(work),
            None => groups.push((communicator, vec![work])),
        }
    }
    let results: Vec<c_int> = groups.into_iter().map(|(communicator, works)| communicator.enqueue(works)).collect();
    results.iter().copied().find(|&result| result != IN_PROGRESS).unwrap_or(IN_PROGRESS)
}

/// Starts one operation, or keeps it for the end of the group.
///
/// # Safety
/// `handle` is null or a live communicator; the buffers of `work` live until the operation has ended.
unsafe fn call(handle: Handle, work: Option<Work>) -> c_int {
    // SAFETY: See above.
    let (Some(communicator), Some(work)) = (unsafe { borrow(handle) }, work) else { return INVALID_ARGUMENT };
    let kept = GROUP.with_borrow_mut(|(depth, calls)| {
        let inside = *depth > 0;
        if inside {
            calls.push((Arc::clone(&communicator), work.clone()));
        }
        inside
    });
    if kept { IN_PROGRESS } else { communicator.enqueue(vec![work]) }
}

fn bytes_of(count: usize, kind: c_int) -> Option<usize> {
    match kind {
        UINT8 => Some(count),
        FLOAT32 => count.checked_mul(4),
        _ => None,
    }
}

fn sum_of(count: usize, kind: c_int, operation: c_int) -> Option<usize> {
    if (kind, operation) == (FLOAT32, SUM) { count.checked_mul(4) } else { None }
}

fn peer(rank: c_int) -> Option<u32> {
    u32::try_from(rank).ok()
}

/// `ncclSend`.
///
/// # Safety
/// As for NCCL: `send` has `count` elements and lives until the operation has ended.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclSend(
    send: *const c_void,
    count: usize,
    kind: c_int,
    to: c_int,
    handle: Handle,
    _stream: *mut c_void,
) -> c_int {
    let work =
        bytes_of(count, kind).zip(peer(to)).map(|(bytes, to)| Work::Send { send: send.expose_provenance(), bytes, to });
    // SAFETY: See above.
    unsafe { call(handle, work) }
}

/// `ncclRecv`.
///
/// # Safety
/// As for NCCL: `recv` has `count` elements and lives until the operation has ended.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclRecv(
    recv: *mut c_void,
    count: usize,
    kind: c_int,
    from: c_int,
    handle: Handle,
    _stream: *mut c_void,
) -> c_int {
    let work = bytes_of(count, kind).zip(peer(from)).map(|(bytes, from)| Work::Receive {
        recv: recv.expose_provenance(),
        bytes,
        from,
    });
    // SAFETY: See above.
    unsafe { call(handle, work) }
}

/// `ncclBroadcast`.
///
/// # Safety
/// As for NCCL: the buffers have `count` elements and live until the operation has ended.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclBroadcast(
    send: *const c_void,
    recv: *mut c_void,
    count: usize,
    kind: c_int,
    root: c_int,
    handle: Handle,
    _stream: *mut c_void,
) -> c_int {
    let sized = bytes_of(count, kind).zip(peer(root));
    let work = sized.map(|(bytes, root)| Work::Broadcast {
        send: send.expose_provenance(),
        recv: recv.expose_provenance(),
        bytes,
        root,
    });
    // SAFETY: See above.
    unsafe { call(handle, work) }
}

/// `ncclReduce`, sums of `f32` only.
///
/// # Safety
/// As for NCCL: the buffers have `count` elements and live until the operation has ended.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclReduce(
    send: *const c_void,
    recv: *mut c_void,
    count: usize,
    kind: c_int,
    operation: c_int,
    root: c_int,
    handle: Handle,
    _stream: *mut c_void,
) -> c_int {
    let sized = sum_of(count, kind, operation).zip(peer(root));
    let work = sized.map(|(bytes, root)| Work::Reduce {
        send: send.expose_provenance(),
        recv: recv.expose_provenance(),
        bytes,
        root,
    });
    // SAFETY: See above.
    unsafe { call(handle, work) }
}

/// `ncclAllReduce`, sums of `f32` only.
///
/// # Safety
/// As for NCCL: the buffers have `count` elements and live until the operation has ended.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclAllReduce(
    send: *const c_void,
    recv: *mut c_void,
    count: usize,
    kind: c_int,
    operation: c_int,
    handle: Handle,
    _stream: *mut c_void,
) -> c_int {
    let sized = sum_of(count, kind, operation);
    let work =
        sized.map(|bytes| Work::AllReduce { send: send.expose_provenance(), recv: recv.expose_provenance(), bytes });
    // SAFETY: See above.
    unsafe { call(handle, work) }
}

/// `ncclAllGather`.
///
/// # Safety
/// As for NCCL: `send` has `count` elements, `recv` those of all ranks, and both live until the operation has ended.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclAllGather(
    send: *const c_void,
    recv: *mut c_void,
    count: usize,
    kind: c_int,
    handle: Handle,
    _stream: *mut c_void,
) -> c_int {
    let sized = bytes_of(count, kind);
    let work =
        sized.map(|bytes| Work::AllGather { send: send.expose_provenance(), recv: recv.expose_provenance(), bytes });
    // SAFETY: See above.
    unsafe { call(handle, work) }
}

/// `ncclReduceScatter`, sums of `f32` only.
///
/// # Safety
/// As for NCCL: `recv` has `count` elements, `send` those for all ranks, and both live until the operation has ended.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclReduceScatter(
    send: *const c_void,
    recv: *mut c_void,
    count: usize,
    kind: c_int,
    operation: c_int,
    handle: Handle,
    _stream: *mut c_void,
) -> c_int {
    let sized = sum_of(count, kind, operation);
    let work = sized.map(|bytes| Work::ReduceScatter {
        send: send.expose_provenance(),
        recv: recv.expose_provenance(),
        bytes,
    });
    // SAFETY: See above.
    unsafe { call(handle, work) }
}
