//! A communicator between threads of one process, for tests and simulation.
//!
//! Owns: the bounded queues between ranks and the plainest form of every collective.
//! Refuses to know: sockets, devices other than the host, speed.
//!
//! - `CM-1`: each message carries its [`MessageId`], compared on receipt.
//! - `CM-2`: every wait is on one condition variable, which progress, aborts and endings notify, with a deadline.
//! - `CM-5`: a queue holds [`QUEUE_FRAMES`] frames of [`FRAME_BYTES`] at most; a sender waits.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::abort::AbortFlag;
use super::error::Goodbye;
use super::patience::Patience;
use super::{AbortHandle, CommError, Communicator, Counters, F32_BYTES, Group, MessageId, Operation, Scatter};
use super::{check_len, check_root, check_scatter, even_counts, host, host_mut, layout, place_own, reduce};
use crate::device::{Slice, SliceMut};
use crate::types::{Rank, WorldSize, as_u64};

/// Bytes of one queue entry: small enough that tests with buffers of a few MiB see several.
const FRAME_BYTES: usize = 256 << 10;
/// Entries between one sender and one receiver. Two let a sender fill one while the other is read.
const QUEUE_FRAMES: usize = 2;

/// One rank's end of the queues.
#[derive(Debug)]
pub struct MemCommunicator {
    group: Group,
    idle_deadline: Duration,
    hub: Arc<Hub>,
    aborted: AbortFlag,
    counters: Counters,
    failed: Option<CommError>,
    sent: Vec<u64>,
    received: Vec<u64>,
}

#[derive(Debug)]
struct Hub {
    world: WorldSize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// Indexed by sender * world + receiver.
    queues: Vec<VecDeque<Frame>>,
    ended: Vec<Option<Goodbye>>,
}

#[derive(Debug)]
struct Frame {
    message: MessageId,
    bytes: Vec<u8>,
}

/// The communicators of all ranks of a new group, in the order of ranks. A call that makes no progress for
/// `idle_deadline` fails.
#[must_use]
pub fn group(world: WorldSize, idle_deadline: Duration) -> Vec<MemCommunicator> {
    let queues = (0..world.count() * world.count()).map(|_| VecDeque::new()).collect();
    let state = Mutex::new(State { queues, ended: vec![None; world.count()] });
    let hub = Arc::new(Hub { world, state, changed: Condvar::new() });
    let end = |rank| MemCommunicator {
        group: Group { rank, world },
        idle_deadline,
        hub: Arc::clone(&hub),
        aborted: AbortFlag::default(),
        counters: Counters::default(),
        failed: None,
        sent: vec![0; world.count()],
        received: vec![0; world.count()],
    };
    world.ranks().map(end).collect()
}

impl Hub {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A thread that panicked here left whole frames behind: every change under the lock is one push or pop.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, rank: Rank, goodbye: Goodbye) {
        let mut state = self.lock();
        if let Some(ended @ None) = state.ended.get_mut(rank.index()) {
            *ended = Some(goodbye);
        }
        drop(state);
        self.changed.notify_all();
    }
}

impl MemCommunicator {
    /// The byte counts of this rank.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters.clone()
    }

    /// Runs a call: refuses it when closed, and closes the communicator when it fails (`CM-3`).
    fn call<T>(&mut self, call: impl FnOnce(&mut Self) -> Result<T, CommError>) -> Result<T, CommError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        call(self).inspect_err(|error| {
            if error.is_fatal() {
                self.hub.end(self.group.rank, Goodbye::after(error, self.group.rank));
                self.failed = Some(error.clone());
            }
        })
    }

    /// Waits until `ready` gives something. `peer` is needed for it: when that rank has ended, nothing more will come.
    fn wait<T>(
        &self,
        operation: Operation,
        peer: Rank,
        mut ready: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<T, CommError> {
        let patience = Patience::new(self.idle_deadline);
        let mut state = self.hub.lock();
        loop {
            if let Some(reason) = self.aborted.reason() {
                return Err(CommError::Aborted { operation, rank: self.group.rank, reason: reason.to_owned() });
            }
            for (rank, ended) in self.group.world.ranks().zip(&state.ended) {
                if let Some(goodbye @ (Goodbye::Lost { .. } | Goodbye::Aborted { .. })) = ended {
                    return Err(goodbye.clone().into_error(operation, rank));
                }
            }
            if let Some(value) = ready(&mut state) {
                drop(state);
                self.hub.changed.notify_all();
                return Ok(value);
            }
            if state.ended.get(peer.index()).is_some_and(Option::is_some) {
                return Err(Goodbye::Finished.into_error(operation, peer));
            }
            let Some(left) = patience.left() else {
                return Err(CommError::Deadline { operation, waiting_for: vec![peer], waited: patience.waited() });
            };
            state = self.hub.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn put(&self, to: Rank, frame: Frame) -> Result<(), CommError> {
        let queue = self.group.rank.index() * self.hub.world.count() + to.index();
        let length = frame.bytes.len();
        let operation = frame.message.operation;
        let mut frame = Some(frame);
        self.wait(operation, to, |state| {
            if state.ended[to.index()].is_some() || state.queues[queue].len() >= QUEUE_FRAMES {
                return None;
            }
            state.queues[queue].extend(frame.take());
            Some(())
        })?;
        self.counters.sent(length, 0);
        Ok(())
    }

    fn take(&self, from: Rank, expected: MessageId, into: &mut [u8]) -> Result<(), CommError> {
        let queue = from.index() * self.hub.world.count() + self.group.rank.index();
        let frame = self.wait(expected.operation, from, |state| state.queues[queue].pop_front())?;
        if frame.message != expected {
            return Err(CommError::Mismatch { rank: from, expected, found: frame.message });
        }
        into.copy_from_slice(&frame.bytes);
        self.counters.received(into.len(), 0);
        Ok(())
    }

    /// Sends one message and receives another, frame by frame in turn. When every rank is in such an exchange, no ring
    /// of full queues can form: the rank that is furthest behind always finds its receiver waiting or its queue free.
    fn exchange(
        &mut self,
        operation: Operation,
        send: Option<Send<'_>>,
        recv: Option<Receive<'_>>,
    ) -> Result<(), CommError> {
        let out = send.map(|send| {
            let message = next_message(&mut self.sent, operation, send.to, send.root, send.bytes.len());
            (send.to, message, send.bytes)
        });
        let mut arriving = recv.map(|recv| {
            let message = next_message(&mut self.received, operation, recv.from, recv.root, recv.into.len());
            (recv.from, message, recv.into)
        });
        let count = |bytes: usize| bytes.div_ceil(FRAME_BYTES).max(1);
        let out_frames = out.as_ref().map_or(0, |(_, _, bytes)| count(bytes.len()));
        let in_frames = arriving.as_ref().map_or(0, |(_, _, into)| count(into.len()));
        for index in 0..out_frames.max(in_frames) {
            if let Some((to, message, bytes)) = out.as_ref().filter(|_| index < out_frames) {
                self.put(*to, Frame { message: *message, bytes: bytes[frame(index, bytes.len())].to_vec() })?;
            }
            if let Some((from, message, into)) = arriving.as_mut().filter(|_| index < in_frames) {
                let range = frame(index, into.len());
                self.take(*from, *message, &mut into[range])?;
            }
        }
        Ok(())
    }

    fn send(&mut self, operation: Operation, root: Rank, to: Rank, bytes: &[u8]) -> Result<(), CommError> {
        self.exchange(operation, Some(Send { to, root, bytes }), None)
    }

    fn receive(&mut self, operation: Operation, root: Rank, from: Rank, into: &mut [u8]) -> Result<(), CommError> {
        self.exchange(operation, None, Some(Receive { from, root, into }))
    }

    /// The pairs of a full exchange in rounds: in each, everybody sends to one rank and receives from another.
    fn rounds(&self) -> impl Iterator<Item = (Rank, Rank)> + use<> {
        let (own, world) = (self.group.rank.0, self.group.world.get());
        (1..world).map(move |step| (Rank((own + step) % world), Rank((own + world - step) % world)))
    }

    fn gather(&mut self, operation: Operation, parts: &mut [u8], ranges: &[Range<usize>]) -> Result<(), CommError> {
        let own = parts[ranges[self.group.rank.index()].clone()].to_vec();
        for (to, from) in self.rounds() {
            let into = &mut parts[ranges[from.index()].clone()];
            let send = Send { to, root: self.group.rank, bytes: &own };
            self.exchange(operation, Some(send), Some(Receive { from, root: from, into }))?;
        }
        Ok(())
    }

    /// The sum of everybody's values in our range, added in the order of ranks (`CM-4`).
    fn reduce(&mut self, operation: Operation, all: &[u8], ranges: &[Range<usize>]) -> Result<Vec<u8>, CommError> {
        let own = all[ranges[self.group.rank.index()].clone()].to_vec();
        let mut parts = vec![vec![0; own.len()]; self.group.world.count()];
        for (to, from) in self.rounds() {
            let send = Send { to, root: to, bytes: &all[ranges[to.index()].clone()] };
            let recv = Receive { from, root: self.group.rank, into: &mut parts[from.index()] };
            self.exchange(operation, Some(send), Some(recv))?;
        }
        parts[self.group.rank.index()] = own;
        let mut parts = parts.into_iter();
        let mut sum = parts.next().unwrap_or_default();
        parts.for_each(|part| reduce::add(&mut sum, &part));
        Ok(sum)
    }
}

/// One message to be sent.
struct Send<'a> {
    to: Rank,
    root: Rank,
    bytes: &'a [u8],
}

/// One message to be received.
struct Receive<'a> {
    from: Rank,
    root: Rank,
    into: &'a mut [u8],
}

/// The identity of the next message to or from `peer`.
fn next_message(sequences: &mut [u64], operation: Operation, peer: Rank, root: Rank, bytes: usize) -> MessageId {
    let sequence = sequences[peer.index()];
    sequences[peer.index()] += 1;
    MessageId { operation, root, sequence, bytes: as_u64(bytes) }
}

/// The bytes of frame `index` of a message of `total` bytes.
fn frame(index: usize, total: usize) -> Range<usize> {
    let start = index * FRAME_BYTES;
    start..total.min(start + FRAME_BYTES)
}

impl Communicator for MemCommunicator {
    fn group(&self) -> Group {
        self.group
    }

    fn broadcast(&mut self, root: Rank, buffer: SliceMut<'_>) -> Result<(), CommError> {
        let operation = Operation::Broadcast;
        check_root(self.group, root, operation)?;
        let bytes = host_mut(buffer, operation)?;
        self.call(|this| {
            if this.group.rank != root {
                return this.receive(operation, root, root, bytes);
            }
            let others = this.group.world.ranks().filter(|&rank| rank != root);
            others.into_iter().try_for_each(|to| this.send(operation, root, to, bytes))
        })
    }

    fn scatter(&mut self, root: Rank, parts: Scatter<'_>) -> Result<(), CommError> {
        let operation = Operation::Scatter;
        check_scatter(self.group, root, &parts)?;
        match parts {
            Scatter::Receive { into } => {
                let into = host_mut(into, operation)?;
                if into.is_empty() { Ok(()) } else { self.call(|this| this.receive(operation, root, root, into)) }
            }
            Scatter::Send { parts } => {
                let parts: Vec<&[u8]> = parts.iter().map(|part| host(*part, operation)).collect::<Result<_, _>>()?;
                self.call(|this| {
                    let wanted = this.group.world.ranks().zip(parts).filter(|(_, part)| !part.is_empty());
                    wanted.into_iter().try_for_each(|(to, part)| this.send(operation, root, to, part))
                })
            }
        }
    }

    fn all_gather(&mut self, send: Slice<'_>, recv: SliceMut<'_>, counts: &[usize]) -> Result<(), CommError> {
        let operation = Operation::AllGather;
        let (send, recv) = (host(send, operation)?, host_mut(recv, operation)?);
        let ranges = layout(operation, self.group.world, counts, 1, recv.len())?;
        place_own(self.group, operation, send, recv, &ranges)?;
        self.call(|this| this.gather(operation, recv, &ranges))
    }

    fn reduce_scatter(&mut self, send: Slice<'_>, recv: SliceMut<'_>, counts: &[usize]) -> Result<(), CommError> {
        let operation = Operation::ReduceScatter;
        let (send, recv) = (host(send, operation)?, host_mut(recv, operation)?);
        let ranges = layout(operation, self.group.world, counts, F32_BYTES, send.len())?;
        check_len(operation, recv.len(), ranges[self.group.rank.index()].len())?;
        recv.copy_from_slice(&self.call(|this| this.reduce(operation, send, &ranges))?);
        Ok(())
    }

    fn all_reduce(&mut self, buffer: SliceMut<'_>) -> Result<(), CommError> {
        let operation = Operation::AllReduce;
        let bytes = host_mut(buffer, operation)?;
        let counts = even_counts(self.group.world, bytes.len() / F32_BYTES);
        let ranges = layout(operation, self.group.world, &counts, F32_BYTES, bytes.len())?;
        self.call(|this| {
            let sum = this.reduce(operation, bytes, &ranges)?;
            bytes[ranges[this.group.rank.index()].clone()].copy_from_slice(&sum);
            this.gather(operation, bytes, &ranges)
        })
    }

    fn barrier(&mut self) -> Result<(), CommError> {
        self.call(|this| {
            this.rounds().try_for_each(|(to, from)| {
                let send = Send { to, root: this.group.rank, bytes: &[] };
                this.exchange(Operation::Barrier, Some(send), Some(Receive { from, root: from, into: &mut [] }))
            })
        })
    }

    fn abort_handle(&self) -> AbortHandle {
        let (hub, rank) = (Arc::clone(&self.hub), self.group.rank);
        self.aborted.handle(move |reason| {
            hub.end(rank, Goodbye::Aborted { culprit: rank, reason: reason.to_owned() });
        })
    }
}

impl Drop for MemCommunicator {
    fn drop(&mut self) {
        self.hub.end(self.group.rank, Goodbye::Finished);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::conformance::{self, Backend, Starter};

    struct Mem;

    impl Backend for Mem {
        type Comm = MemCommunicator;
        const NAME: &'static str = "mem";

        fn starters(&self, world: WorldSize, idle: Duration) -> Vec<Starter<MemCommunicator>> {
            group(world, idle).into_iter().map(|end| -> Starter<MemCommunicator> { Box::new(|| end) }).collect()
        }
    }

    conformance::suite!(Mem);
    conformance::suite!(Mem; reduces_in_the_order_of_ranks, names_another_length, names_another_call, refuses_device_memory);
}
