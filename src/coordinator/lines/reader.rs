//! One reader's way through the lines: its own cursor, and the order of times.
//!
//! Launchers hand lines on a tenth of a second late, if they can. So lines wait here for longer than that before they go to the
//! reader, in the order of their times; what comes later still goes when it comes.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use super::{Kept, Line, LineChoice, Lines};
use crate::clock::Instant;

/// How long a line waits for those that were written before it.
const SETTLING: Duration = Duration::from_millis(300);
/// Lines with their overhead that are looked up at once, under the lock that ranks' lines come through.
const TAKEN_BYTES: usize = 256 << 10;
/// Lines with their overhead that may wait; more go as they came.
const SETTLING_BYTES: usize = 512 << 10;

/// What a reader has at this moment.
#[derive(Debug)]
pub enum Read {
    /// These lines.
    Lines(Vec<Line>),
    /// Nothing; there may be more later.
    Nothing,
    /// Nothing, and there will be no more.
    Ended,
}

/// Reads the lines of some ranks.
#[derive(Debug)]
pub struct LineReader {
    lines: Lines,
    ranks: Vec<usize>,
    /// The order of the next line that it has not seen.
    next: u64,
    /// Reads up to here and no further, unless it follows.
    until: u64,
    settling: Vec<Arc<Kept>>,
    settled: VecDeque<Arc<Kept>>,
    _guard: Arc<()>,
}

impl LineReader {
    pub(super) fn new(lines: Lines, choice: &LineChoice, guard: Arc<()>) -> Self {
        let (ranks, next, until) = {
            let store = lines.store();
            let ranks = store.choose(choice.ranks.iter().copied());
            let next = choice.tail.map_or(0, |count| store.tail(&ranks, count));
            (ranks, next, if choice.follow { u64::MAX } else { store.arrived() })
        };
        Self { lines, ranks, next, until, settling: Vec::new(), settled: VecDeque::new(), _guard: guard }
    }

    /// Whether nothing more will come for it, as [`Lines::is_complete`] has it.
    fn is_complete(&self, over: Option<Instant>, now: Instant) -> bool {
        self.until != u64::MAX || self.lines.is_complete(over, now)
    }

    /// The next lines, of at most `most_bytes` with their overhead, or one. `over` is since when the job is over.
    pub fn next(&mut self, over: Option<Instant>, now: Instant, most_bytes: usize) -> Read {
        // Before the look at the lines: what came before it was complete is there then.
        let is_complete = self.is_complete(over, now);
        while self.settled.is_empty() {
            let (taken, next, is_all) = self.lines.store().take(&self.ranks, (self.next, self.until), TAKEN_BYTES);
            self.next = next;
            let newest = taken.last().map_or(now, |line| line.arrived);
            self.settling.extend(taken);
            self.settle(if is_all { now } else { newest }, is_all && is_complete);
            if is_all {
                break;
            }
        }
        let lines = self.settled_lines(most_bytes);
        match (lines.is_empty(), is_complete) {
            (false, _) => Read::Lines(lines),
            (true, false) => Read::Nothing,
            (true, true) => Read::Ended,
        }
    }

    /// Puts what has waited long enough before `now`, or all, in the order of its time.
    fn settle(&mut self, now: Instant, all: bool) {
        self.settling.sort_by_key(|line| (line.sort_ns, line.order));
        let bytes: usize = self.settling.iter().map(|line| line.bytes()).sum();
        let has_waited = |line: &Arc<Kept>| now.saturating_duration_since(line.arrived) >= SETTLING;
        let count = match self.settling.iter().rposition(has_waited) {
            _ if all || bytes > SETTLING_BYTES => self.settling.len(),
            Some(last) => last + 1,
            None => 0,
        };
        self.settled.extend(self.settling.drain(..count));
    }

    fn settled_lines(&mut self, most_bytes: usize) -> Vec<Line> {
        let (mut lines, mut bytes) = (Vec::new(), 0);
        while let Some(line) = self.settled.front() {
            bytes += line.bytes();
            if bytes > most_bytes && !lines.is_empty() {
                break;
            }
            lines.extend(self.settled.pop_front().map(|line| line.line.clone()));
        }
        lines
    }
}
