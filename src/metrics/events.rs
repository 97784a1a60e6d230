//! TensorBoard event files: the `Event` messages and the frames around them.
//!
//! Owns: the few fields of `tensorflow/core/util/event.proto` and `summary.proto` that scalars need, and TFRecord framing.
//! Refuses to know: files, which scalars there are.

use prost::Message;

use crate::types::{as_u64, crc32c};

/// The version that event files start with.
const FILE_VERSION: &str = "brain.Event:2";
/// `SessionLog.SessionStatus.START`.
const SESSION_START: i32 = 1;
/// The constant of masked checksums in TFRecord and leveldb.
const CRC_MASK_DELTA: u32 = 0xa282_ead8;

#[derive(Clone, PartialEq, Message)]
pub(super) struct Event {
    /// Seconds since the Unix epoch.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(string, optional, tag = "3")]
    file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    summary: Option<Summary>,
    #[prost(message, optional, tag = "7")]
    session_log: Option<SessionLog>,
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Value>,
}

#[derive(Clone, PartialEq, Message)]
struct Value {
    #[prost(string, tag = "1")]
    tag: String,
    /// Optional, so that 0 is written.
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct SessionLog {
    #[prost(int32, tag = "1")]
    status: i32,
}

impl Event {
    /// The first event of a file.
    pub(super) fn first(wall_time: f64) -> Self {
        Self { wall_time, file_version: Some(FILE_VERSION.to_owned()), ..Self::default() }
    }

    /// A restart: TensorBoard forgets what earlier files say of `step` and later ones.
    pub(super) fn restart(wall_time: f64, step: u64) -> Self {
        let session_log = Some(SessionLog { status: SESSION_START });
        Self { wall_time, step: signed(step), session_log, ..Self::default() }
    }

    /// Scalars of a step.
    pub(super) fn scalars(wall_time: f64, step: u64, scalars: &[(&str, f64)]) -> Self {
        #[expect(clippy::cast_possible_truncation, reason = "the field is a float; more digits are in metrics.jsonl")]
        let value = |(tag, value): &(&str, f64)| Value { tag: (*tag).to_owned(), simple_value: Some(*value as f32) };
        let summary = Some(Summary { value: scalars.iter().map(value).collect() });
        Self { wall_time, step: signed(step), summary, ..Self::default() }
    }

    /// The event as a TFRecord: length, masked CRC of the length, message, masked CRC of the message; little-endian.
    pub(super) fn frame(&self) -> Vec<u8> {
        let message = self.encode_to_vec();
        let length = as_u64(message.len()).to_le_bytes();
        let mut frame = length.to_vec();
        frame.extend(masked(&length).to_le_bytes());
        frame.extend(&message);
        frame.extend(masked(&message).to_le_bytes());
        frame
    }
}

fn signed(step: u64) -> i64 {
    i64::try_from(step).unwrap_or(i64::MAX)
}

fn masked(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(CRC_MASK_DELTA)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The record that torch 2.15's `SummaryWriter().add_scalar("train/loss", 0.5, 3, walltime=1700000000.25)` wrote.
    const TORCH: &str =
        "200000000000000029eda9500900001040fc54d94110032a130a110a0a747261696e2f6c6f7373150000003f8d3d56af";

    #[test]
    fn a_frame_equals_torch() {
        let frame = Event::scalars(1_700_000_000.25, 3, &[("train/loss", 0.5)]).frame();
        let hex: String = frame.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, TORCH);
    }

    /// The bytes by hand: field 1 is a double, field 3 a string of 13 bytes.
    #[test]
    fn the_first_event_by_hand() {
        let message = Event::first(1.0).encode_to_vec();
        let mut expected = vec![0x09, 0, 0, 0, 0, 0, 0, 0xf0, 0x3f, 0x1a, 13];
        expected.extend(b"brain.Event:2");
        assert_eq!(message, expected);
        let restart = Event::restart(1.0, 7).encode_to_vec();
        assert_eq!(restart, [0x09, 0, 0, 0, 0, 0, 0, 0xf0, 0x3f, 0x10, 7, 0x3a, 2, 0x08, 1]);
    }

    #[test]
    fn zero_is_a_value() {
        let message = Event::scalars(1.0, 1, &[("a", 0.0)]).encode_to_vec();
        assert!(message.ends_with(&[0x2a, 10, 0x0a, 8, 0x0a, 1, b'a', 0x15, 0, 0, 0, 0]), "{message:?}");
    }
}
