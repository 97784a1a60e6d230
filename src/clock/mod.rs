//! The clock: the one place that reads the time, so that decisions can be tested by moving it.
//!
//! Decisions take an [`Instant`] as an argument; only shells call [`now`].

mod seldom;

pub use std::time::Instant;

pub use seldom::Seldom;

/// The monotonic time.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "this is the module that owns it")]
pub fn now() -> Instant {
    Instant::now()
}

/// Nanoseconds since the Unix epoch, for logs and names; never for decisions.
#[must_use]
pub fn unix_ns() -> u128 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_nanos())
}
