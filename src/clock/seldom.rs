//! A gate for log lines that others could cause in any number: one in an interval passes, the rest is counted.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::{Instant, now};

/// Lets one line pass in an interval.
#[derive(Debug)]
pub struct Seldom {
    interval: Duration,
    state: Mutex<(Option<Instant>, u64)>,
}

impl Seldom {
    /// At most one line each `interval`.
    #[must_use]
    pub const fn every(interval: Duration) -> Self {
        Self { interval, state: Mutex::new((None, 0)) }
    }

    /// Nothing when this line is one too many; else the number of lines that were held back since the last.
    #[must_use]
    pub fn pass(&self) -> Option<u64> {
        self.pass_at(now())
    }

    fn pass_at(&self, now: Instant) -> Option<u64> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (last, held_back) = &mut *state;
        if last.is_some_and(|last| now.saturating_duration_since(last) < self.interval) {
            *held_back += 1;
            return None;
        }
        *last = Some(now);
        Some(std::mem::take(held_back))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_in_an_interval_passes_and_the_rest_is_counted() {
        let (seldom, start) = (Seldom::every(Duration::from_secs(1)), now());
        let at = |milliseconds| seldom.pass_at(start + Duration::from_millis(milliseconds));
        assert_eq!(
            [at(0), at(10), at(999), at(1000), at(1001), at(2500)],
            [Some(0), None, None, Some(2), None, Some(1)]
        );
    }
}
