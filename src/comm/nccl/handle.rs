//! One `ncclComm_t`: who may touch it when, and waiting for it.
//!
//! Owns: the lock around the communicator, polling with a deadline, finalizing and aborting.
//! Refuses to know: which collective is under way.
//!
//! - `NC-2`: every call on the communicator is made under one lock, because the vendor allows one thread at a time. With
//!   non-blocking communicators every call but destroy and abort returns at once, so the lock is held for moments.
//! - `NC-3`: an abort from another thread takes the lock when it is free. When it is not, the owner is about to leave a
//!   call, looks at the flag after it, and aborts itself. Nobody waits for anybody.
//! - `NC-4`: the communicator is freed once: the pointer is null from then on, and a null pointer is never passed on.
#![expect(unsafe_code, reason = "calling a C library")]

use std::ffi::c_int;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

use super::library::{Functions, IN_PROGRESS, NcclLibrary, NcclUniqueId, RawComm, RawConfig, SUCCESS};
use crate::comm::abort::AbortFlag;
use crate::comm::patience::Patience;
use crate::comm::{CommError, Group, Operation};
use crate::types::Rank;

/// Polls that only give way to other threads: a small collective is done within some tens of microseconds.
const BUSY_POLLS: u32 = 200;
/// The longest pause between two polls after that: short beside any transfer that takes so long.
const MAX_PAUSE: Duration = Duration::from_micros(500);
/// How long a healthy communicator may take to finalize: peers acknowledge in round trips.
const FINALIZE_DEADLINE: Duration = Duration::from_secs(5);

/// A communicator that can be aborted from any thread.
#[derive(Debug)]
pub(super) struct Handle {
    library: NcclLibrary,
    own: Rank,
    aborted: AbortFlag,
    raw: Mutex<Raw>,
    /// Notified when the communicator was freed.
    freed: Condvar,
}

/// The communicator; null once it was freed (`NC-4`).
#[derive(Debug)]
struct Raw(RawComm);

// SAFETY: NCCL user guide, "Thread Safety": "It is safe to operate a communicator from multiple threads as long as users
// can guarantee only one thread operates the communicator at a time." The mutex guarantees it (NC-2). The same page asks
// that one thread issues all operations of a group: a group is opened and closed under one hold of the lock.
unsafe impl Send for Raw {}

impl Handle {
    /// A communicator that is connecting. The device of `id`'s group is current on this thread.
    pub(super) fn start(
        library: &NcclLibrary,
        group: Group,
        id: NcclUniqueId,
        aborted: AbortFlag,
    ) -> Result<Self, CommError> {
        let number = |value: u32| {
            let detail = format!("rank or world size {value} is beyond what NCCL counts");
            c_int::try_from(value).map_err(|_| CommError::BadArgument { operation: Operation::Connect, detail })
        };
        let (world, rank) = (number(group.world.get())?, number(group.rank.0)?);
        let (mut raw, mut config) = (std::ptr::null_mut(), RawConfig::non_blocking());
        // SAFETY: The function writes the communicator and reads the id and the configuration, which has the layout and
        // the version it says.
        let result = unsafe { (library.functions().init_rank)(&raw mut raw, world, id, rank, &raw mut config) };
        let handle = Self {
            library: library.clone(),
            own: group.rank,
            aborted,
            raw: Mutex::new(Raw(raw)),
            freed: Condvar::new(),
        };
        let checked = {
            let raw = handle.lock();
            handle.library.check(Operation::Connect, "ncclCommInitRankConfig", result, raw.0)
        };
        checked.inspect_err(|_| handle.abort()).map(|()| handle)
    }

    fn lock(&self) -> MutexGuard<'_, Raw> {
        // Every change under the lock is one assignment.
        self.raw.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes calls on the communicator, all under one hold of the lock; `calls` gives the first result that is an error.
    pub(super) fn call(
        &self,
        operation: Operation,
        name: &'static str,
        calls: impl FnOnce(&Functions, RawComm) -> c_int,
    ) -> Result<(), CommError> {
        let raw = self.lock();
        let outcome = if raw.0.is_null() {
            Err(self.aborted_error(operation))
        } else {
            let result = calls(self.library.functions(), raw.0);
            self.library.check(operation, name, result, raw.0)
        };
        drop(raw);
        self.abort_when_asked(operation)?;
        outcome
    }

    /// Waits until the library has done what it was called for and `is_idle` says that the device has, too.
    pub(super) fn wait(
        &self,
        operation: Operation,
        patience: &Patience,
        is_idle: impl Fn() -> Result<bool, CommError>,
    ) -> Result<(), CommError> {
        let mut polls = 0_u32;
        loop {
            if self.poll(operation)? && is_idle()? {
                return Ok(());
            }
            let Some(left) = patience.left() else {
                return Err(CommError::Deadline { operation, waiting_for: Vec::new(), waited: patience.waited() });
            };
            polls = polls.saturating_add(1);
            if polls < BUSY_POLLS {
                std::thread::yield_now();
            } else {
                let raw = self.lock();
                let _woken = self.freed.wait_timeout(raw, left.min(MAX_PAUSE)).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// Whether the library is done with what it was called for.
    fn poll(&self, operation: Operation) -> Result<bool, CommError> {
        let mut state = IN_PROGRESS;
        self.call(operation, "ncclCommGetAsyncError", |functions, raw| {
            // SAFETY: The communicator is live and ours under the lock; the function writes one integer.
            let result = unsafe { (functions.async_error)(raw, &raw mut state) };
            if result == SUCCESS { state } else { result }
        })?;
        Ok(state == SUCCESS)
    }

    fn aborted_error(&self, operation: Operation) -> CommError {
        let reason = self.aborted.reason().unwrap_or("the communicator has ended").to_owned();
        CommError::Aborted { operation, rank: self.own, reason }
    }

    /// The owner's half of `NC-3`.
    fn abort_when_asked(&self, operation: Operation) -> Result<(), CommError> {
        // Pairs with the fence in `abort_from_outside`: either that thread sees the lock free, or we see its flag.
        fence(Ordering::SeqCst);
        if self.aborted.reason().is_none() {
            return Ok(());
        }
        self.abort();
        Err(self.aborted_error(operation))
    }

    /// The other half of `NC-3`; the flag is set already.
    pub(super) fn abort_from_outside(&self) {
        fence(Ordering::SeqCst);
        match self.raw.try_lock() {
            Ok(mut raw) => self.free(&mut raw, "ncclCommAbort", |functions| functions.abort),
            Err(TryLockError::Poisoned(poisoned)) => {
                self.free(&mut poisoned.into_inner(), "ncclCommAbort", |functions| functions.abort);
            }
            Err(TryLockError::WouldBlock) => {}
        }
    }

    /// Ends whatever is under way and frees the communicator, unless that has happened.
    pub(super) fn abort(&self) {
        self.free(&mut self.lock(), "ncclCommAbort", |functions| functions.abort);
    }

    /// Frees a communicator on which nothing is under way: first flushes what the library still has to send.
    pub(super) fn finish(&self) {
        let operation = Operation::Connect;
        let finalized = self
            // SAFETY: The communicator is live and ours under the lock.
            .call(operation, "ncclCommFinalize", |functions, raw| unsafe { (functions.finalize)(raw) })
            .and_then(|()| self.wait(operation, &Patience::new(FINALIZE_DEADLINE), || Ok(true)));
        match finalized {
            Ok(()) => self.free(&mut self.lock(), "ncclCommDestroy", |functions| functions.destroy),
            Err(error) => {
                tracing::warn!(error = crate::error::chain(&error), "a communicator did not end in peace");
                self.abort();
            }
        }
    }

    fn free(
        &self,
        raw: &mut Raw,
        name: &'static str,
        function: impl FnOnce(&Functions) -> unsafe extern "C" fn(RawComm) -> c_int,
    ) {
        let live = std::mem::replace(&mut raw.0, std::ptr::null_mut());
        if !live.is_null() {
            // SAFETY: The communicator is live, ours under the lock, and not used again: the pointer is gone (NC-4).
            // nccl.h: abort "frees resources associated with communicator object and aborts any operations that might
            // still be running on the device"; so buffers are the caller's again afterwards.
            let result = unsafe { function(self.library.functions())(live) };
            if let Err(error) = self.library.check(Operation::Connect, name, result, std::ptr::null_mut()) {
                tracing::warn!(error = crate::error::chain(&error), "a communicator was not freed");
            }
        }
        self.freed.notify_all();
    }
}
