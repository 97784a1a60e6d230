//! The two clocks of the launcher.
//!
//! Owns: reading them. Refuses to know: what is timed.
//! - The monotonic clock decides (deadlines, and what came first): it is one for all processes of a host, and other hosts are told
//!   how long ago something was. The wall clock only describes (time stamps of a report): those of two hosts may be days
//!   apart, and each may jump.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// One reading of both clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Now {
    /// Time since an arbitrary start; never goes back.
    pub(crate) monotonic: Duration,
    /// Nanoseconds since 1970.
    pub(crate) wall_ns: u64,
}

/// Reads both clocks.
pub(crate) fn now() -> Now {
    let wall_ns = u64::try_from(read(ClockId::Realtime).as_nanos()).unwrap_or(u64::MAX);
    Now { monotonic: read(ClockId::Monotonic), wall_ns }
}

fn read(clock: ClockId) -> Duration {
    let time = clock_gettime(clock);
    // Both fields are negative only for a clock set before 1970, which then reads as zero.
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}
