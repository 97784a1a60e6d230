//! NCCL's collectives on buffers that the caller has checked and keeps borrowed.
//!
//! Owns: the calls themselves. Refuses to know: locks, waiting, errors beyond the first result that is none.
#![expect(unsafe_code, reason = "calling a C library")]

use std::ffi::c_int;
use std::ops::Range;

use super::{Address, Calls, FLOAT32, SUM, UINT8};
use crate::comm::F32_BYTES;
use crate::types::Rank;

/// A rank as the library counts it; the communicator was created with as many ranks, so it fits.
fn number(rank: Rank) -> c_int {
    c_int::try_from(rank.0).unwrap_or(c_int::MAX)
}

// SAFETY, for all calls below: the communicator is live and under our lock (`Calls` exists only inside of `Handle::call`).
// The addresses are of buffers of at least the bytes named, on the communicator's device, checked in `address` and
// `layout`; the caller's borrows of them last until `NcclCommunicator::run` returns, which is after the operation has
// ended on the stream, or after the communicator was aborted.
impl Calls<'_> {
    /// Several calls as one.
    pub(super) fn group(&mut self, inside: impl FnOnce(&mut Self)) {
        // SAFETY: The functions take no arguments; start and end are called by one thread, under one hold of the lock.
        self.note(unsafe { (self.functions.group_start)() });
        inside(self);
        // Also after an error inside: an open group would swallow all later calls of this thread.
        // SAFETY: As above.
        self.note(unsafe { (self.functions.group_end)() });
    }

    pub(super) fn send(&mut self, from: Address, bytes: usize, to: Rank) {
        // SAFETY: See above the block.
        self.note(unsafe { (self.functions.send)(from.0, bytes, UINT8, number(to), self.raw, self.stream) });
    }

    pub(super) fn receive(&mut self, into: Address, bytes: usize, from: Rank) {
        // SAFETY: See above the block.
        self.note(unsafe { (self.functions.receive)(into.0, bytes, UINT8, number(from), self.raw, self.stream) });
    }

    pub(super) fn broadcast(&mut self, buffer: Address, bytes: usize, root: Rank) {
        let (functions, root) = (self.functions, number(root));
        // SAFETY: See above the block.
        self.note(unsafe { (functions.broadcast)(buffer.0, buffer.0, bytes, UINT8, root, self.raw, self.stream) });
    }

    pub(super) fn all_reduce(&mut self, buffer: Address, elements: usize) {
        let functions = self.functions;
        // SAFETY: See above the block.
        self.note(unsafe { (functions.all_reduce)(buffer.0, buffer.0, elements, FLOAT32, SUM, self.raw, self.stream) });
    }

    pub(super) fn all_gather(&mut self, from: Address, into: Address, bytes: usize) {
        // SAFETY: See above the block.
        self.note(unsafe { (self.functions.all_gather)(from.0, into.0, bytes, UINT8, self.raw, self.stream) });
    }

    pub(super) fn reduce_scatter(&mut self, from: Address, into: Address, elements: usize) {
        let functions = self.functions;
        // SAFETY: See above the block.
        self.note(unsafe { (functions.reduce_scatter)(from.0, into.0, elements, FLOAT32, SUM, self.raw, self.stream) });
    }

    /// A gather of parts of different lengths: everybody sends its own to everybody, itself included.
    pub(super) fn exchange(&mut self, from: Address, own: usize, into: Address, ranges: &[Range<usize>]) {
        for (rank, range) in (0..).map(Rank).zip(ranges) {
            if own > 0 {
                self.send(from, own, rank);
            }
            if !range.is_empty() {
                self.receive(into.at(range.start), range.len(), rank);
            }
        }
    }

    /// A reduce_scatter of parts of different lengths: one reduction to each rank.
    pub(super) fn reduce_each(&mut self, from: Address, into: Address, ranges: &[Range<usize>]) {
        for (root, range) in (0..).map(Rank).zip(ranges).filter(|(_, range)| !range.is_empty()) {
            let (part, elements) = (from.at(range.start), range.len() / F32_BYTES);
            let (functions, root) = (self.functions, number(root));
            // SAFETY: See above the block; the result is written on the root only, whose part has this length.
            self.note(unsafe {
                (functions.reduce)(part.0, into.0, elements, FLOAT32, SUM, root, self.raw, self.stream)
            });
        }
    }
}
