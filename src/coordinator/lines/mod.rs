//! The lines that ranks have written, as far as they are kept, and those who read them. It works beside the owner's task,
//! which knows nothing of it: many lines cost the job nothing.
//!
//! Owns: what is kept and for how long, and who still hands lines on or reads them. Refuses to know: where lines come from,
//! and how they look.
//!
//! - `LL-1`: memory is bounded: per rank, over all ranks, and per reader. What comes later pushes out what came before.
//! - `LL-2`: nobody waits for a reader. One that is slow finds lines gone.
//! - `LL-3`: every line of a rank has its number, counted where it was written or read from its pipe. So whoever reads sees
//!   by the numbers how many lines are missing, wherever they were lost, and what was sent twice is kept once.

mod reader;
mod store;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub use reader::{LineReader, Read};

use self::store::Store;
use crate::clock::Instant;
use crate::types::{Rank, WorldSize};

/// A longer line is cut: the launcher hands longer ones on in pieces.
pub const MAX_LINE_BYTES: usize = 8 << 10;
/// What a line counts for beside its text: its places in the lists, and what the allocator adds.
pub const LINE_OVERHEAD_BYTES: usize = 128;
/// Lines of one rank, with their overhead.
const RANK_BYTES: usize = 256 << 10;
/// Lines of all ranks, with their overhead; of more than 256 ranks each has its part of it.
const TOTAL_BYTES: usize = 64 << 20;
/// Readers at once: each holds up to a megabyte.
const MAX_READERS: usize = 32;
/// How long those who hand lines on may take, once the job is over, to hand on the last ones.
const LAST_LINES: Duration = Duration::from_secs(2);
/// Between two looks whether the readers have gone.
const READERS_TICK: Duration = Duration::from_millis(10);

/// Where a rank wrote a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LineStream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// A line that a rank has written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// The rank.
    pub rank: Rank,
    /// Its number among the rank's lines, from 1.
    pub number: u64,
    /// Where it was written.
    pub stream: LineStream,
    /// When its launcher had it, in nanoseconds since 1970.
    pub unix_ns: u64,
    /// Without its end.
    pub text: String,
}

/// A line in the store.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Kept {
    line: Line,
    /// Its time, or that of the rank's line before it where a clock was set back: a rank's lines keep their order.
    sort_ns: u64,
    /// How many lines of any rank came before it.
    order: u64,
    arrived: Instant,
}

impl Kept {
    fn bytes(&self) -> usize {
        self.line.text.len() + LINE_OVERHEAD_BYTES
    }
}

/// Which lines are to be read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LineChoice {
    /// Whose; everybody's when there is none.
    pub ranks: BTreeSet<Rank>,
    /// At most so many of those that are there already; all when absent.
    pub tail: Option<u32>,
    /// Whether to go on with those that come.
    pub follow: bool,
}

/// There are too many readers already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("readers of the ranks' lines: expected at most {MAX_READERS}, and there are as many")]
pub struct TooManyReaders;

impl crate::error::Classify for TooManyReaders {
    fn kind(&self) -> crate::error::Kind {
        crate::error::Kind::Exhausted
    }
}

/// The lines of a job's ranks.
#[derive(Clone, Debug)]
pub struct Lines {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    store: Mutex<Store>,
    is_closed: AtomicBool,
    /// Held by everybody who may hand on more lines.
    sources: Arc<()>,
    /// Held by everybody who reads.
    readers: Arc<()>,
}

/// To be held by whoever hands lines on, for as long as there may be more.
#[derive(Debug)]
pub struct LineSource {
    _source: Arc<()>,
}

impl Lines {
    pub(super) fn new(world: WorldSize) -> Self {
        let store = Mutex::new(Store::new(world.count(), (TOTAL_BYTES / world.count()).min(RANK_BYTES)));
        let (sources, readers) = (Arc::default(), Arc::default());
        Self { shared: Arc::new(Shared { store, is_closed: AtomicBool::new(false), sources, readers }) }
    }

    fn store(&self) -> MutexGuard<'_, Store> {
        self.shared.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a line that a rank of this process's launcher has just written.
    pub fn write(&self, rank: Rank, stream: LineStream, text: String) {
        let unix_ns = unix_ns();
        self.store().write((rank, stream, unix_ns), text, crate::clock::now());
    }

    /// Keeps lines that another launcher hands on, each rank's in the order of their numbers. Those that are known already
    /// change nothing; ranks that do not exist are passed over.
    pub fn receive(&self, launcher: &str, lines: impl IntoIterator<Item = Line>) {
        let (mut store, now) = (self.store(), crate::clock::now());
        for line in lines {
            store.receive(launcher, line, now);
        }
    }

    /// See [`LineSource`].
    #[must_use]
    pub fn source(&self) -> LineSource {
        LineSource { _source: self.shared.sources.clone() }
    }

    /// Begins to read.
    ///
    /// # Errors
    /// [`TooManyReaders`].
    pub fn read(&self, choice: &LineChoice) -> Result<LineReader, TooManyReaders> {
        let guard = self.shared.readers.clone();
        if Arc::strong_count(&guard) > MAX_READERS + 1 {
            return Err(TooManyReaders);
        }
        Ok(LineReader::new(self.clone(), choice, guard))
    }

    /// Nothing more will be written: readers end when they have read what there is.
    pub fn close(&self) {
        self.shared.is_closed.store(true, Ordering::Release);
    }

    /// Whether nothing more will come, or has to be waited for, when the job was over at `over`.
    #[must_use]
    pub fn is_complete(&self, over: Option<Instant>, now: Instant) -> bool {
        let is_left = Arc::strong_count(&self.shared.sources) > 1;
        let waited = |over: Instant| !is_left || now.saturating_duration_since(over) >= LAST_LINES;
        self.shared.is_closed.load(Ordering::Acquire) || over.is_some_and(waited)
    }

    /// Waits until nobody reads any more, at most as long as `limit`.
    pub async fn farewell(&self, limit: Duration) {
        let start = crate::clock::now();
        while Arc::strong_count(&self.shared.readers) > 1 && start.elapsed() < limit {
            tokio::time::sleep(READERS_TICK).await;
        }
    }
}

/// Now, as lines have it.
#[must_use]
pub fn unix_ns() -> u64 {
    u64::try_from(crate::clock::unix_ns()).unwrap_or(u64::MAX)
}

/// The beginning of `text` that has at most `limit` bytes.
#[must_use]
pub fn cut(mut text: String, limit: usize) -> String {
    let mut end = text.len().min(limit);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text
}
