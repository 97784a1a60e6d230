//! The two clocks of the launcher.
//!
//! Owns: reading them. Refuses to know: what is timed.
//! - The monotonic clock decides (deadlines); the wall clock only describes (time stamps of a report, comparable between
//!   the launcher and its nannies, and between nodes as far as their clocks agree).

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// One reading of both clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Now {
    /// Time since an arbitrary start; never goes back.
    pub(crate) monotonic: Duration,
    /// Nanoseconds since 1970.
    pub(crate) wall_ns: u64,
}

/// Reads both clocks.
pub(crate) fn now() -> Now {
    Now { monotonic: read(ClockId::Monotonic), wall_ns: wall_ns() }
}

/// Reads the wall clock: nanoseconds since 1970.
pub(crate) fn wall_ns() -> u64 {
    u64::try_from(read(ClockId::Realtime).as_nanos()).unwrap_or(u64::MAX)
}

fn read(clock: ClockId) -> Duration {
    let time = clock_gettime(clock);
    // Both fields are negative only for a clock set before 1970, which then reads as zero.
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}
