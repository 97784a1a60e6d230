//! The newest lines of each rank, in bounded memory (`LL-1`), each once (`LL-3`). Pure: time is an argument.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::sync::Arc;

use super::{Kept, LINE_OVERHEAD_BYTES, Line, LineStream, MAX_LINE_BYTES, cut};
use crate::clock::Instant;
use crate::types::Rank;

/// Other launchers have a name.
const OWN: &str = "";

/// All ranks' lines.
#[derive(Debug)]
pub(super) struct Store {
    rings: Vec<Ring>,
    /// Of each rank.
    bound_bytes: usize,
    /// Lines that have arrived.
    arrived: u64,
}

/// One rank's.
#[derive(Debug, Default)]
struct Ring {
    lines: VecDeque<Arc<Kept>>,
    bytes: usize,
    /// The number of the newest line.
    last_number: u64,
    /// Who handed it on, and the number that it had there.
    launcher: String,
    last_of_launcher: u64,
    /// The latest time that one of its lines had.
    last_ns: u64,
}

impl Ring {
    /// The number of a line that `launcher` calls `number`; nothing when it is known already. Another launcher than the one
    /// before begins anew, and what is missing before its first line is missing.
    fn number(&mut self, launcher: &str, number: u64) -> Option<u64> {
        if self.launcher != launcher {
            launcher.clone_into(&mut self.launcher);
            self.last_of_launcher = 0;
        }
        let steps = number.checked_sub(self.last_of_launcher).filter(|steps| *steps > 0)?;
        self.last_of_launcher = number;
        self.last_number = self.last_number.saturating_add(steps);
        Some(self.last_number)
    }

    fn push(&mut self, line: Arc<Kept>, bound_bytes: usize) {
        self.bytes += line.bytes();
        self.lines.push_back(line);
        while self.bytes > bound_bytes
            && self.lines.len() > 1
            && let Some(oldest) = self.lines.pop_front()
        {
            self.bytes -= oldest.bytes();
        }
    }

    /// Where lines begin that came at `order` or later.
    fn position(&self, order: u64) -> usize {
        self.lines.partition_point(|line| line.order < order)
    }
}

impl Store {
    pub(super) fn new(ranks: usize, bound_bytes: usize) -> Self {
        Self { rings: std::iter::repeat_with(Ring::default).take(ranks).collect(), bound_bytes, arrived: 0 }
    }

    /// How many lines have arrived so far.
    pub(super) const fn arrived(&self) -> u64 {
        self.arrived
    }

    /// Keeps the next line of a rank.
    pub(super) fn write(&mut self, (rank, stream, unix_ns): (Rank, LineStream, u64), text: String, now: Instant) {
        let Some(ring) = self.rings.get(rank.index()) else { return };
        let number = if ring.launcher == OWN { ring.last_of_launcher.saturating_add(1) } else { 1 };
        self.receive(OWN, Line { rank, number, stream, unix_ns, text }, now);
    }

    /// Keeps a line that has a number already.
    pub(super) fn receive(&mut self, launcher: &str, mut line: Line, now: Instant) {
        let Some(ring) = self.rings.get_mut(line.rank.index()) else { return };
        let Some(number) = ring.number(launcher, line.number) else { return };
        line.number = number;
        // A world of many thousands leaves a rank less than the longest line.
        let longest = MAX_LINE_BYTES.min(self.bound_bytes.saturating_sub(LINE_OVERHEAD_BYTES));
        line.text = cut(line.text, longest);
        ring.last_ns = ring.last_ns.max(line.unix_ns);
        let kept = Kept { sort_ns: ring.last_ns, order: self.arrived, arrived: now, line };
        ring.push(Arc::new(kept), self.bound_bytes);
        self.arrived += 1;
    }

    fn chosen<'a>(&'a self, ranks: &'a [usize]) -> impl Iterator<Item = &'a Ring> {
        ranks.iter().filter_map(|rank| self.rings.get(*rank))
    }

    /// All ranks, or those of `ranks`.
    pub(super) fn choose(&self, ranks: impl ExactSizeIterator<Item = Rank>) -> Vec<usize> {
        if ranks.len() == 0 { (0..self.rings.len()).collect() } else { ranks.map(Rank::index).collect() }
    }

    /// The order from which on there are the newest `count` lines of `ranks`.
    pub(super) fn tail(&self, ranks: &[usize], count: u32) -> u64 {
        let wanted = usize::try_from(count).unwrap_or(usize::MAX);
        let from = |order: u64| self.chosen(ranks).map(|ring| ring.lines.len() - ring.position(order)).sum::<usize>();
        // The least order with no more than `count` lines from there on.
        let (mut low, mut high) = (0, self.arrived);
        while low < high {
            let middle = low + (high - low) / 2;
            if from(middle) <= wanted { high = middle } else { low = middle + 1 }
        }
        low
    }

    /// The lines of `ranks` that came at `from` or later and before `until`, in the order of their arrival: some 256 KiB at
    /// most. With the order to go on from, and whether that is all.
    pub(super) fn take(
        &self,
        ranks: &[usize],
        (from, until): (u64, u64),
        most_bytes: usize,
    ) -> (Vec<Arc<Kept>>, u64, bool) {
        let mut taken = Vec::new();
        if from >= until.min(self.arrived) {
            return (taken, from, true);
        }
        let mut heads = BinaryHeap::new();
        for ring in self.chosen(ranks) {
            let position = ring.position(from);
            heads.extend(ring.lines.get(position).map(|line| Reverse((line.order, line.line.rank, position))));
        }
        let mut bytes = 0;
        while let Some(Reverse((order, rank, position))) = heads.pop() {
            let Some(lines) = self.rings.get(rank.index()).map(|ring| &ring.lines) else { continue };
            let Some(line) = lines.get(position).filter(|_| order < until) else { continue };
            if bytes >= most_bytes {
                return (taken, order, false);
            }
            bytes += line.bytes();
            taken.push(Arc::clone(line));
            heads.extend(lines.get(position + 1).map(|next| Reverse((next.order, rank, position + 1))));
        }
        (taken, until.min(self.arrived), true)
    }
}
