//! Ending a communicator's calls from another thread.
//!
//! Owns: [`AbortHandle`]. Refuses to know: how a backend wakes its thread; it brings a function for that.
//!
//! `CM-2`: the reason is set before the thread is woken, so that a woken thread always finds it.

use std::fmt;
use std::sync::{Arc, OnceLock};

/// Ends every pending and later call of one communicator with [`super::CommError::Aborted`]; cheap to clone, usable from
/// any thread, at any time, more than once (the first reason stays).
#[derive(Clone)]
pub struct AbortHandle {
    flag: AbortFlag,
    wake: Arc<dyn Fn(&str) + Send + Sync>,
}

/// The reason of an abort, once there is one.
#[derive(Clone, Debug, Default)]
pub(super) struct AbortFlag(Arc<OnceLock<String>>);

impl AbortFlag {
    /// The reason, when the communicator was aborted.
    pub(super) fn reason(&self) -> Option<&str> {
        self.0.get().map(String::as_str)
    }

    /// A handle that sets this flag, then calls `wake`, which must not block.
    pub(super) fn handle(&self, wake: impl Fn(&str) + Send + Sync + 'static) -> AbortHandle {
        AbortHandle { flag: self.clone(), wake: Arc::new(wake) }
    }
}

impl AbortHandle {
    /// Aborts the communicator. The thread inside a call returns at once, and the peers see that this rank is gone.
    pub fn abort(&self, reason: &str) {
        if self.flag.0.set(reason.to_owned()).is_ok() {
            (self.wake)(reason);
        }
    }

    /// The reason of the first abort, if there was one.
    #[must_use]
    pub fn reason(&self) -> Option<&str> {
        self.flag.reason()
    }
}

impl fmt::Debug for AbortHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AbortHandle").field("reason", &self.reason()).finish_non_exhaustive()
    }
}
