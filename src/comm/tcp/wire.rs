//! The bytes of frames and goodbyes between two connected ranks.
//!
//! Owns: the header's layout, encoding and decoding. Refuses to know: sockets, collectives.
//!
//! A message is cut into frames of [`FRAME_BYTES`], the last one shorter; an empty message is one empty frame. A frame is
//! a header of [`HEADER_BYTES`] and its payload. All numbers are little-endian:
//!
//! | bytes | field |
//! |---|---|
//! | 0..4 | magic `WCF1` |
//! | 4 | kind: 1 to 7 an operation, 255 a goodbye |
//! | 5..8 | zero |
//! | 8..12 | root of the message; of a goodbye, the culprit |
//! | 12..16 | length of the payload |
//! | 16..24 | number of the message on this connection; of a goodbye, its code |
//! | 24..32 | length of the message |
//! | 32..40 | where in the message the payload goes |
//! | 40..44 | CRC32C of the payload |
//! | 44..48 | CRC32C of bytes 0..44 |
//!
//! `CM-5`: nothing is allocated for what a header says; a payload that is not the expected one is refused by its header.

use crate::comm::error::Goodbye;
use crate::comm::{MessageId, Operation};
use crate::types::{Rank, as_u64, as_usize, crc32c};

/// Payload of a full frame. A frame is checksummed and copied to or from the socket while it is still in the
/// second-level cache (1 to 2 MiB per core), and its 48 bytes of header are 0.02 % of it.
pub(super) const FRAME_BYTES: usize = 256 << 10;
/// Bytes of a header.
pub(super) const HEADER_BYTES: usize = 48;
/// Bytes of the reason in a goodbye; longer reasons are cut.
pub(super) const MAX_REASON_BYTES: usize = 512;

const MAGIC: [u8; 4] = *b"WCF1";
const KIND_GOODBYE: u8 = 255;
const OPERATIONS: [Operation; 7] = [
    Operation::Connect,
    Operation::Broadcast,
    Operation::Scatter,
    Operation::AllGather,
    Operation::ReduceScatter,
    Operation::AllReduce,
    Operation::Barrier,
];

/// One piece of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Frame {
    /// The message that it belongs to.
    pub(super) message: MessageId,
    /// Where in the message the payload goes.
    pub(super) offset: u64,
    /// Bytes of payload.
    pub(super) length: u32,
}

/// A decoded header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Header {
    /// A piece of a message with the CRC32C of its payload.
    Frame { frame: Frame, crc: u32 },
    /// The sender ends the connection; `length` bytes of reason follow.
    Goodbye { code: u64, culprit: Rank, length: usize, crc: u32 },
}

/// Bytes that are no header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BadHeader {
    /// What is wrong.
    pub(super) what: &'static str,
    /// What should be there.
    pub(super) expected: u64,
    /// What is there.
    pub(super) found: u64,
}

/// The number of frames of a message of `bytes`.
pub(super) const fn frame_count(bytes: usize) -> usize {
    if bytes == 0 { 1 } else { bytes.div_ceil(FRAME_BYTES) }
}

/// The range of frame `index` in a message of `bytes`.
pub(super) fn frame_range(index: usize, bytes: usize) -> std::ops::Range<usize> {
    let start = bytes.min(index.saturating_mul(FRAME_BYTES));
    start..bytes.min(start + FRAME_BYTES)
}

/// Frame `index` of `message`.
#[expect(clippy::cast_possible_truncation, reason = "a frame has at most FRAME_BYTES")]
pub(super) fn frame_of(message: MessageId, index: usize) -> Frame {
    let range = frame_range(index, as_usize(message.bytes));
    Frame { message, offset: as_u64(range.start), length: range.len() as u32 }
}

impl Header {
    /// The header's bytes.
    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &MAGIC);
        match self {
            Self::Frame { frame, crc } => {
                let MessageId { operation, root, sequence, bytes } = frame.message;
                put(4, &[code_of(operation)]);
                put(8, &root.0.to_le_bytes());
                put(12, &frame.length.to_le_bytes());
                put(16, &sequence.to_le_bytes());
                put(24, &bytes.to_le_bytes());
                put(32, &frame.offset.to_le_bytes());
                put(40, &crc.to_le_bytes());
            }
            Self::Goodbye { code, culprit, length, crc } => {
                let length = u32::try_from(*length).unwrap_or(u32::MAX);
                put(4, &[KIND_GOODBYE]);
                put(8, &culprit.0.to_le_bytes());
                put(12, &length.to_le_bytes());
                put(16, &code.to_le_bytes());
                put(24, &u64::from(length).to_le_bytes());
                put(40, &crc.to_le_bytes());
            }
        }
        let crc = crc32c(&bytes[..44]);
        bytes[44..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads a header.
    pub(super) fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, BadHeader> {
        let bad = |what, expected, found| Err(BadHeader { what, expected, found });
        let (expected, found) = (crc32c(&bytes[..44]), number32(bytes, 44));
        if bytes[..4] != MAGIC {
            return bad("magic of a frame", u64::from(u32::from_le_bytes(MAGIC)), u64::from(number32(bytes, 0)));
        }
        if expected != found {
            return bad("checksum of a header", u64::from(expected), u64::from(found));
        }
        let (kind, crc) = (bytes[4], number32(bytes, 40));
        let (root, length, sequence) = (Rank(number32(bytes, 8)), number32(bytes, 12), number64(bytes, 16));
        if kind == KIND_GOODBYE {
            let length = as_usize(u64::from(length));
            if length > MAX_REASON_BYTES {
                return bad("length of a reason", as_u64(MAX_REASON_BYTES), as_u64(length));
            }
            return Ok(Self::Goodbye { code: sequence, culprit: root, length, crc });
        }
        let Some(operation) = OPERATIONS.into_iter().find(|&operation| code_of(operation) == kind) else {
            return bad("kind of a frame", as_u64(OPERATIONS.len()), u64::from(kind));
        };
        let message = MessageId { operation, root, sequence, bytes: number64(bytes, 24) };
        Ok(Self::Frame { frame: Frame { message, offset: number64(bytes, 32), length }, crc })
    }
}

const fn code_of(operation: Operation) -> u8 {
    match operation {
        Operation::Connect => 1,
        Operation::Broadcast => 2,
        Operation::Scatter => 3,
        Operation::AllGather => 4,
        Operation::ReduceScatter => 5,
        Operation::AllReduce => 6,
        Operation::Barrier => 7,
    }
}

fn number32(bytes: &[u8; HEADER_BYTES], at: usize) -> u32 {
    let mut number = [0; 4];
    number.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(number)
}

fn number64(bytes: &[u8; HEADER_BYTES], at: usize) -> u64 {
    let mut number = [0; 8];
    number.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(number)
}

/// The bytes of a goodbye: header and reason.
pub(super) fn encode_goodbye(goodbye: &Goodbye, own: Rank) -> Vec<u8> {
    let (code, culprit, reason) = match goodbye {
        Goodbye::Finished => (0, own, ""),
        Goodbye::Lost { culprit } => (1, *culprit, ""),
        Goodbye::Aborted { culprit, reason } => (2, *culprit, reason.as_str()),
    };
    let reason = &reason.as_bytes()[..reason.floor_char_boundary(MAX_REASON_BYTES)];
    let header = Header::Goodbye { code, culprit, length: reason.len(), crc: crc32c(reason) };
    [&header.encode()[..], reason].concat()
}

/// The goodbye of a header with `code` and `culprit`, and its reason.
pub(super) fn decode_goodbye(code: u64, culprit: Rank, reason: &[u8]) -> Goodbye {
    match code {
        0 => Goodbye::Finished,
        1 => Goodbye::Lost { culprit },
        _ => Goodbye::Aborted { culprit, reason: String::from_utf8_lossy(reason).into_owned() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame() -> Frame {
        let message = MessageId { operation: Operation::Scatter, root: Rank(5), sequence: 7, bytes: 600_000 };
        frame_of(message, 2)
    }

    /// 600,000 = 2 * 262,144 + 75,712.
    #[test]
    fn frames_cover_a_message() {
        assert_eq!(
            (frame_count(0), frame_count(1), frame_count(FRAME_BYTES), frame_count(FRAME_BYTES + 1)),
            (1, 1, 1, 2)
        );
        assert_eq!((frame().offset, frame().length), (524_288, 75_712));
        assert_eq!(frame_range(0, 0), 0..0);
    }

    /// The documented layout, written out by hand.
    #[test]
    fn the_layout_is_as_documented() {
        let bytes = Header::Frame { frame: frame(), crc: 0x0403_0201 }.encode();
        let mut expected = b"WCF1\x03\0\0\0\x05\0\0\0".to_vec();
        expected.extend([0xc0, 0x27, 0x01, 0x00]);
        expected.extend([7, 0, 0, 0, 0, 0, 0, 0]);
        expected.extend([0xc0, 0x27, 0x09, 0, 0, 0, 0, 0]);
        expected.extend([0, 0, 0x08, 0, 0, 0, 0, 0]);
        expected.extend([1, 2, 3, 4]);
        assert_eq!(bytes[..44], expected);
        assert_eq!(Header::decode(&bytes), Ok(Header::Frame { frame: frame(), crc: 0x0403_0201 }));
    }

    #[test]
    fn any_flipped_bit_is_noticed() {
        let good = Header::Frame { frame: frame(), crc: 9 }.encode();
        for bit in 0..HEADER_BYTES * 8 {
            let mut bytes = good;
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::decode(&bytes).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_long_reason_is_cut_between_characters() {
        let reason = "é".repeat(400);
        let bytes = encode_goodbye(&Goodbye::Aborted { culprit: Rank(3), reason }, Rank(1));
        let header = bytes.first_chunk().map(Header::decode);
        let Some(Ok(Header::Goodbye { code, culprit, length, .. })) = header else { panic!("{header:?}") };
        assert_eq!((code, culprit, length, bytes.len()), (2, Rank(3), 512, 48 + 512));
        let expected = Goodbye::Aborted { culprit, reason: "é".repeat(256) };
        assert_eq!(decode_goodbye(code, culprit, &bytes[HEADER_BYTES..]), expected);
    }

    #[test]
    fn a_reason_beyond_the_limit_is_refused() {
        let bytes = Header::Goodbye { code: 2, culprit: Rank(0), length: MAX_REASON_BYTES + 1, crc: 0 }.encode();
        let expected = BadHeader { what: "length of a reason", expected: 512, found: 513 };
        assert_eq!(Header::decode(&bytes), Err(expected));
    }
}
