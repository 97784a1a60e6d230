//! The parts that collectives are made of: one message out, one message in, a relay, a sum.
//!
//! Owns: the order of frames. Each part goes as far as its links allow and is called again later.
//! Refuses to know: sockets, waiting.
//!
//! `CM-1`: both ends derive a message's identity from the call and count messages for each direction of each pair.
//! `CM-4`: [`Sum`] adds frame by frame in the order of ranks.

use std::ops::Range;

use super::mesh::Mesh;
use super::wire::{FRAME_BYTES, Header, frame_count, frame_of, frame_range};
use crate::comm::{CommError, MessageId, Operation, reduce};
use crate::types::{Rank, as_u64, as_usize, crc32c};

/// The numbers of the next messages to and from every rank.
#[derive(Debug)]
pub(super) struct Sequences {
    out: Vec<u64>,
    into: Vec<u64>,
}

impl Sequences {
    pub(super) fn new(world: usize) -> Self {
        Self { out: vec![0; world], into: vec![0; world] }
    }

    /// The next message that `to` gets from us: `bytes` of `root`'s.
    pub(super) fn sending(&mut self, operation: Operation, root: Rank, to: Rank, bytes: usize) -> Sending {
        let message = next(&mut self.out, operation, root, to, bytes);
        Sending { to, message, index: 0, header: None }
    }

    /// The next message that we get from `from`.
    pub(super) fn receiving(&mut self, operation: Operation, root: Rank, from: Rank, bytes: usize) -> Receiving {
        let message = next(&mut self.into, operation, root, from, bytes);
        Receiving { from, message, index: 0 }
    }
}

fn next(sequences: &mut [u64], operation: Operation, root: Rank, peer: Rank, bytes: usize) -> MessageId {
    let sequence = sequences[peer.index()];
    sequences[peer.index()] += 1;
    MessageId { operation, root, sequence, bytes: as_u64(bytes) }
}

/// A message on its way out.
#[derive(Debug)]
pub(super) struct Sending {
    to: Rank,
    message: MessageId,
    index: usize,
    /// The header of the frame under way, so that its checksum is computed once.
    header: Option<Header>,
}

impl Sending {
    /// Sends the frames of `bytes`, the whole message; true when all are sent.
    pub(super) fn advance(&mut self, mesh: &mut Mesh, bytes: &[u8]) -> Result<bool, CommError> {
        while self.index < frame_count(bytes.len()) {
            if !self.frame(mesh, bytes, None)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Sends the next frame, whose checksum may be known; true when it is sent.
    fn frame(&mut self, mesh: &mut Mesh, bytes: &[u8], crc: Option<u32>) -> Result<bool, CommError> {
        let payload = &bytes[frame_range(self.index, bytes.len())];
        let header = *self.header.get_or_insert_with(|| Header::Frame {
            frame: frame_of(self.message, self.index),
            crc: crc.unwrap_or_else(|| crc32c(payload)),
        });
        if !mesh.send(self.to, &header, payload)? {
            return Ok(false);
        }
        self.header = None;
        self.index += 1;
        Ok(true)
    }

    fn is_done(&self) -> bool {
        self.index == frame_count(as_usize(self.message.bytes))
    }
}

/// A message on its way in.
#[derive(Debug)]
pub(super) struct Receiving {
    from: Rank,
    message: MessageId,
    index: usize,
}

impl Receiving {
    /// Receives frames into `bytes`, the whole message; true when all have arrived.
    pub(super) fn advance(&mut self, mesh: &mut Mesh, bytes: &mut [u8]) -> Result<bool, CommError> {
        while !self.is_done() {
            let range = frame_range(self.index, bytes.len());
            if self.frame(mesh, &mut bytes[range])?.is_none() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Receives the next frame into a buffer of its length; its checksum when it has arrived.
    fn frame(&mut self, mesh: &mut Mesh, into: &mut [u8]) -> Result<Option<u32>, CommError> {
        let crc = mesh.receive(self.from, &frame_of(self.message, self.index), into)?;
        self.index += usize::from(crc.is_some());
        Ok(crc)
    }

    fn is_done(&self) -> bool {
        self.index == frame_count(as_usize(self.message.bytes))
    }
}

/// Messages that pass through us: received from one neighbour, and sent to the other frame by frame as they arrive.
/// A chain of relays is a broadcast, a ring of them an all_gather.
#[derive(Debug, Default)]
pub(super) struct Relay {
    incoming: Vec<(Receiving, Range<usize>)>,
    /// The checksums of frames that have arrived and not left yet, in order.
    arrived: std::collections::VecDeque<u32>,
    incoming_done: usize,
    outgoing: Vec<(Sending, Range<usize>)>,
    outgoing_done: usize,
    /// How many of the first outgoing messages are our own, not received first.
    own: usize,
}

impl Relay {
    /// Receives a message into `range` of the buffer, after those added before.
    pub(super) fn receive(&mut self, message: Receiving, range: Range<usize>) {
        self.incoming.push((message, range));
    }

    /// Sends our own bytes at `range` of the buffer, before all that is forwarded.
    pub(super) fn send_own(&mut self, message: Sending, range: Range<usize>) {
        self.outgoing.push((message, range));
        self.own += 1;
    }

    /// Sends on the next message received, which lies at `range`. Messages are forwarded in the order of arrival.
    pub(super) fn forward(&mut self, message: Sending, range: Range<usize>) {
        self.outgoing.push((message, range));
    }

    /// Moves what can be moved; true when everything is.
    pub(super) fn advance(&mut self, mesh: &mut Mesh, buffer: &mut [u8]) -> Result<bool, CommError> {
        loop {
            let before = mesh.moved;
            mesh.retry();
            self.receive_frame(mesh, buffer)?;
            self.send_frames(mesh, buffer)?;
            if self.incoming_done == self.incoming.len() && self.outgoing_done == self.outgoing.len() {
                return Ok(true);
            }
            if mesh.moved == before {
                return Ok(false);
            }
        }
    }

    fn receive_frame(&mut self, mesh: &mut Mesh, buffer: &mut [u8]) -> Result<(), CommError> {
        let Some((message, range)) = self.incoming.get_mut(self.incoming_done) else { return Ok(()) };
        let part = frame_range(message.index, range.len());
        let into = &mut buffer[range.start + part.start..range.start + part.end];
        if let Some(crc) = message.frame(mesh, into)? {
            // The last messages of a gather are not sent on, the rest is.
            if self.own + self.incoming_done < self.outgoing.len() {
                self.arrived.push_back(crc);
            }
            self.incoming_done += usize::from(message.is_done());
        }
        Ok(())
    }

    /// Sends own frames while the socket takes them, and those that have arrived.
    fn send_frames(&mut self, mesh: &mut Mesh, buffer: &[u8]) -> Result<(), CommError> {
        while let Some((message, range)) = self.outgoing.get_mut(self.outgoing_done) {
            let crc = self.arrived.front().copied().filter(|_| self.outgoing_done >= self.own);
            if self.outgoing_done >= self.own && crc.is_none() {
                return Ok(());
            }
            if !message.frame(mesh, &buffer[range.clone()], crc)? {
                return Ok(());
            }
            if crc.is_some() {
                self.arrived.pop_front();
            }
            self.outgoing_done += usize::from(message.is_done());
        }
        Ok(())
    }
}

/// The two buffers of a sum, kept between calls.
#[derive(Debug)]
pub(super) struct Scratch {
    sum: Vec<u8>,
    part: Vec<u8>,
}

impl Scratch {
    pub(super) fn new() -> Self {
        Self { sum: vec![0; FRAME_BYTES], part: vec![0; FRAME_BYTES] }
    }
}

/// Our part of a reduction: everybody's values for it come to us, ours for the others go to them, all at once. Of each
/// rank only one frame is held at a time, so memory does not grow with the world.
#[derive(Debug)]
pub(super) struct Sum {
    own: Rank,
    sending: Vec<Sending>,
    /// One for each rank but our own, in order.
    receiving: Vec<Option<Receiving>>,
    frame: usize,
    rank: usize,
}

impl Sum {
    /// A sum over the ranks whose parts are `ranges`.
    pub(super) fn new(operation: Operation, own: Rank, ranges: &[Range<usize>], sequences: &mut Sequences) -> Self {
        let ranks = || (0_u32..).map(Rank).zip(ranges);
        let own_bytes = ranges[own.index()].len();
        Self {
            own,
            sending: (ranks().filter(|(to, _)| *to != own))
                .map(|(to, range)| sequences.sending(operation, to, to, range.len()))
                .collect(),
            receiving: (ranks().map(|(from, _)| from))
                .map(|from| (from != own).then(|| sequences.receiving(operation, own, from, own_bytes)))
                .collect(),
            frame: 0,
            rank: 0,
        }
    }

    /// Moves what can be moved; true when everything is. `part_of` gives our values for another rank's part; `sum` holds
    /// our values for our own part, and in the end the sum.
    pub(super) fn advance<'a>(
        &mut self,
        mesh: &mut Mesh,
        part_of: &impl Fn(Rank) -> &'a [u8],
        sum: &mut [u8],
        scratch: &mut Scratch,
    ) -> Result<bool, CommError> {
        let mut all_sent = true;
        for sending in &mut self.sending {
            all_sent &= sending.advance(mesh, part_of(sending.to))?;
        }
        while self.frame < frame_count(sum.len()) {
            let range = frame_range(self.frame, sum.len());
            let length = range.len();
            while let Some(receiving) = self.receiving.get_mut(self.rank) {
                let values = match receiving {
                    None => &sum[range.clone()],
                    Some(message) => {
                        if message.frame(mesh, &mut scratch.part[..length])?.is_none() {
                            return Ok(false);
                        }
                        &scratch.part[..length]
                    }
                };
                if self.rank == 0 {
                    scratch.sum[..length].copy_from_slice(values);
                } else {
                    reduce::add(&mut scratch.sum[..length], values);
                }
                self.rank += 1;
            }
            sum[range].copy_from_slice(&scratch.sum[..length]);
            self.frame += 1;
            self.rank = 0;
        }
        debug_assert!(self.sending.iter().all(|sending| sending.to != self.own), "nobody sends to itself");
        Ok(all_sent)
    }
}
