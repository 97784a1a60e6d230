//! How long a call goes on waiting.
//!
//! Owns: deadlines that move on with progress (`CM-2`). Refuses to know: what is waited for.

use std::time::Duration;

use crate::clock::{Instant, now};

/// A deadline that moves on with every progress.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    limit: Duration,
    since: Instant,
}

impl Patience {
    /// Gives up `limit` after now.
    pub(super) fn new(limit: Duration) -> Self {
        Self { limit, since: now() }
    }

    /// Something moved: the time starts again.
    pub(super) fn renew(&mut self) {
        self.since = now();
    }

    /// The time without progress.
    pub(super) fn waited(&self) -> Duration {
        now().saturating_duration_since(self.since)
    }

    /// What is left, or nothing when the time ran out.
    pub(super) fn left(&self) -> Option<Duration> {
        self.limit.checked_sub(self.waited()).filter(|left| !left.is_zero())
    }
}
