//! What a rank's process has done since it started. It only ever grows, but for the queue.

use serde::Serialize;

/// See the module.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct RankFigures {
    /// Bytes that left storage for loads.
    pub storage_bytes: u64,
    /// Payload bytes sent to other ranks.
    pub sent_bytes: u64,
    /// Payload bytes received.
    pub received_bytes: u64,
    /// Values that were quantized.
    pub quantized_values: u64,
    /// Seconds of loads spent getting memory.
    pub allocate_s: f64,
    /// Seconds of loads spent reading, summed over threads, as those below.
    pub read_s: f64,
    /// Seconds of loads spent quantizing and converting.
    pub encode_s: f64,
    /// Seconds of loads spent in collectives.
    pub exchange_s: f64,
    /// Seconds of loads spent copying into the rank's own memory.
    pub place_s: f64,
    /// Chunks in the reader's queue now.
    pub queue_used_chunks: u64,
    /// Room for them.
    pub queue_capacity_chunks: u64,
    /// Bytes written to checkpoints.
    pub checkpoint_bytes: u64,
    /// Seconds that it took.
    pub checkpoint_s: f64,
    /// Seconds that training stood still for checkpoints.
    pub stall_s: f64,
}
