//! One direction of one connection: frames out, or frames in.
//!
//! Owns: how far the current frame has got. Refuses to know: which collective a frame belongs to, other peers.
//!
//! Each connection carries data in one direction only, from the rank that dialed to the rank that accepted; the other
//! direction carries nothing but one goodbye (`CM-3`).

use std::io::{self, IoSlice, IoSliceMut};
use std::sync::Arc;

use super::pipe::Pipe;
use super::wire::{BadHeader, Frame, HEADER_BYTES, Header, MAX_REASON_BYTES, decode_goodbye};
use crate::comm::MessageId;
use crate::comm::error::Goodbye;
use crate::types::{as_u64, crc32c};

/// Why no further frame goes over a link.
#[derive(Debug)]
pub(super) enum LinkError {
    /// The peer closed its end.
    Closed,
    /// The connection broke.
    Io(io::Error),
    /// The peer said why it leaves.
    Goodbye(Goodbye),
    /// The peer sends something else than we expect.
    Mismatch { expected: MessageId, found: MessageId },
    /// Bytes changed on the way.
    Corrupt(BadHeader),
}

/// The sending side of a connection.
#[derive(Debug)]
pub(super) struct OutLink {
    pub(super) stream: Arc<Pipe>,
    header: [u8; HEADER_BYTES],
    /// Bytes of the current frame, header included, that are sent.
    written: usize,
    back: Back,
}

/// The receiving side of a connection.
#[derive(Debug)]
pub(super) struct InLink {
    pub(super) stream: Arc<Pipe>,
    header: [u8; HEADER_BYTES],
    header_have: usize,
    /// The next frame's header, which is read together with the end of this one's payload.
    ahead: [u8; HEADER_BYTES],
    ahead_have: usize,
    /// The checksum from the header, once it is read and checked.
    crc: Option<u32>,
    payload_have: usize,
    reason: Reason,
}

impl OutLink {
    pub(super) const fn new(stream: Arc<Pipe>) -> Self {
        Self { stream, header: [0; HEADER_BYTES], written: 0, back: Back::new() }
    }

    /// Whether no frame is half sent.
    pub(super) const fn is_between_frames(&self) -> bool {
        self.written == 0
    }

    /// Sends what the socket takes of a frame; true when all of it is sent. Adds the bytes sent to `moved`. A call after
    /// false continues with the same frame.
    pub(super) fn send(&mut self, header: &Header, payload: &[u8], moved: &mut usize) -> Result<bool, LinkError> {
        if self.written == 0 {
            self.header = header.encode();
        }
        while self.written < HEADER_BYTES + payload.len() {
            let header_rest = self.header.get(self.written..).unwrap_or_default();
            let payload_rest = payload.get(self.written.saturating_sub(HEADER_BYTES)..).unwrap_or_default();
            let parts = [IoSlice::new(header_rest), IoSlice::new(payload_rest)];
            match self.stream.send(&parts) {
                Ok(count) => {
                    self.written += count;
                    *moved += count;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(LinkError::Io(error)),
            }
        }
        match self.stream.flush() {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(LinkError::Io(error)),
        }
        self.written = 0;
        Ok(true)
    }

    /// Reads what the peer said against the direction of the data.
    pub(super) fn hear(&mut self) -> Option<LinkError> {
        self.back.hear(&self.stream)
    }
}

impl InLink {
    pub(super) const fn new(stream: Arc<Pipe>) -> Self {
        Self {
            stream,
            header: [0; HEADER_BYTES],
            header_have: 0,
            ahead: [0; HEADER_BYTES],
            ahead_have: 0,
            crc: None,
            payload_have: 0,
            reason: Reason::new(),
        }
    }

    /// Receives what has arrived of the `expected` frame, whose payload has the length of `into`. Gives the payload's
    /// checksum when all of it is there and intact; a call after nothing continues with the same frame.
    pub(super) fn receive(
        &mut self,
        expected: &Frame,
        into: &mut [u8],
        moved: &mut usize,
    ) -> Result<Option<u32>, LinkError> {
        let Some(crc) = self.header_of(expected, moved)? else { return Ok(None) };
        while self.payload_have < into.len() {
            let rest = into.get_mut(self.payload_have..).unwrap_or_default();
            let wanted = rest.len();
            let ahead = self.ahead.get_mut(self.ahead_have..).unwrap_or_default();
            let mut parts = [IoSliceMut::new(rest), IoSliceMut::new(ahead)];
            let Some(count) = read(|| self.stream.read_vectored(&mut parts))? else { return Ok(None) };
            *moved += count;
            self.payload_have += count.min(wanted);
            self.ahead_have += count.saturating_sub(wanted);
        }
        let found = crc32c(into);
        if found != crc {
            let (expected, found) = (u64::from(crc), u64::from(found));
            return Err(LinkError::Corrupt(BadHeader { what: "checksum of a payload", expected, found }));
        }
        (self.header, self.header_have) = (self.ahead, self.ahead_have);
        (self.ahead_have, self.payload_have, self.crc) = (0, 0, None);
        Ok(Some(crc))
    }

    /// The checksum in the header of the `expected` frame, once that header has arrived.
    fn header_of(&mut self, expected: &Frame, moved: &mut usize) -> Result<Option<u32>, LinkError> {
        if self.crc.is_some() {
            return Ok(self.crc);
        }
        while self.header_have < HEADER_BYTES {
            let rest = self.header.get_mut(self.header_have..).unwrap_or_default();
            let Some(count) = read(|| self.stream.read(rest))? else { return Ok(None) };
            *moved += count;
            self.header_have += count;
        }
        match Header::decode(&self.header).map_err(LinkError::Corrupt)? {
            Header::Goodbye { .. } => match self.reason.goodbye(&self.header, &self.stream)? {
                Some(goodbye) => Err(LinkError::Goodbye(goodbye)),
                None => Ok(None),
            },
            Header::Frame { frame, .. } if frame.message != expected.message => {
                Err(LinkError::Mismatch { expected: expected.message, found: frame.message })
            }
            Header::Frame { frame, .. } if frame != *expected => Err(LinkError::Corrupt(BadHeader {
                what: "place of a frame in its message",
                expected: expected.offset,
                found: frame.offset,
            })),
            Header::Frame { crc, .. } => {
                self.crc = Some(crc);
                Ok(self.crc)
            }
        }
    }
}

/// The direction against the data.
#[derive(Debug)]
struct Back {
    header: [u8; HEADER_BYTES],
    have: usize,
    reason: Reason,
}

impl Back {
    const fn new() -> Self {
        Self { header: [0; HEADER_BYTES], have: 0, reason: Reason::new() }
    }

    fn hear(&mut self, stream: &Pipe) -> Option<LinkError> {
        self.try_hear(stream).unwrap_or_else(Some)
    }

    fn try_hear(&mut self, stream: &Pipe) -> Result<Option<LinkError>, LinkError> {
        while self.have < HEADER_BYTES {
            let rest = self.header.get_mut(self.have..).unwrap_or_default();
            let Some(count) = read(|| stream.read(rest))? else { return Ok(None) };
            self.have += count;
        }
        Ok(self.reason.goodbye(&self.header, stream)?.map(LinkError::Goodbye))
    }
}

/// The reason that follows a goodbye's header.
#[derive(Debug)]
struct Reason {
    bytes: Vec<u8>,
}

impl Reason {
    const fn new() -> Self {
        Self { bytes: Vec::new() }
    }

    /// The goodbye with this header, once its reason has arrived. The header's limit bounds what is kept (`CM-5`).
    fn goodbye(&mut self, header: &[u8; HEADER_BYTES], stream: &Pipe) -> Result<Option<Goodbye>, LinkError> {
        let Header::Goodbye { code, culprit, length, crc } = Header::decode(header).map_err(LinkError::Corrupt)? else {
            let found = as_u64(usize::from(header[4]));
            return Err(LinkError::Corrupt(BadHeader { what: "kind of a goodbye", expected: 255, found }));
        };
        let mut part = [0; MAX_REASON_BYTES];
        while self.bytes.len() < length {
            let room = part.get_mut(..length - self.bytes.len()).unwrap_or_default();
            let Some(count) = read(|| stream.read(room))? else { return Ok(None) };
            self.bytes.extend_from_slice(&part[..count]);
        }
        let found = crc32c(&self.bytes);
        if found != crc {
            let (expected, found) = (u64::from(crc), u64::from(found));
            return Err(LinkError::Corrupt(BadHeader { what: "checksum of a goodbye", expected, found }));
        }
        Ok(Some(decode_goodbye(code, culprit, &self.bytes)))
    }
}

/// One read: a number of bytes, or nothing when none has arrived.
fn read(mut once: impl FnMut() -> io::Result<usize>) -> Result<Option<usize>, LinkError> {
    loop {
        match once() {
            Ok(0) => return Err(LinkError::Closed),
            Ok(count) => return Ok(Some(count)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(LinkError::Io(error)),
        }
    }
}
