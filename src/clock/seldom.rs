//! A gate for log lines that others could cause in any number: a few pass, then one in an interval; the rest is counted.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::{Instant, now};

/// Lines that pass at once after a time of silence.
const BURST: u32 = 8;

/// Lets few lines pass.
#[derive(Debug)]
pub struct Seldom {
    interval: Duration,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    left: u32,
    counted: Option<Instant>,
    held_back: u64,
}

impl Seldom {
    /// After the first few, one line each `interval`, which is not zero.
    #[must_use]
    pub const fn every(interval: Duration) -> Self {
        Self { interval, state: Mutex::new(State { left: BURST, counted: None, held_back: 0 }) }
    }

    /// Nothing when this line is one too many; else the number of lines that were held back since the last.
    #[must_use]
    pub fn pass(&self) -> Option<u64> {
        self.pass_at(now())
    }

    fn pass_at(&self, now: Instant) -> Option<u64> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let since = now.saturating_duration_since(*state.counted.get_or_insert(now));
        let earned = since.as_nanos() / self.interval.as_nanos().max(1);
        if earned > 0 {
            state.left = state.left.saturating_add(u32::try_from(earned).unwrap_or(BURST)).min(BURST);
            state.counted = Some(now);
        }
        if state.left == 0 {
            state.held_back += 1;
            return None;
        }
        state.left -= 1;
        Some(std::mem::take(&mut state.held_back))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_lines_pass_then_one_in_an_interval_and_the_rest_is_counted() {
        let (seldom, start) = (Seldom::every(Duration::from_secs(1)), now());
        let at = |milliseconds| seldom.pass_at(start + Duration::from_millis(milliseconds));
        assert!((0..8).all(|_| at(0) == Some(0)));
        assert_eq!([at(10), at(999), at(1000), at(1001), at(2500)], [None, None, Some(2), None, Some(1)]);
        assert_eq!((at(60_000), at(60_000)), (Some(0), Some(0)), "silence earns a few again");
    }
}
