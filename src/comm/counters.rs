//! What a communicator has moved.
//!
//! Owns: [`Counters`]. Refuses to know: metrics systems; whoever exports them reads [`Counters::traffic`].

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::types::as_u64;

/// A handle on the byte counts of one communicator; cheap to clone and to read from any thread.
#[derive(Clone, Debug, Default)]
pub struct Counters(Arc<Cells>);

#[derive(Debug, Default)]
struct Cells {
    payload_sent: AtomicU64,
    payload_received: AtomicU64,
    wire_sent: AtomicU64,
    wire_received: AtomicU64,
}

/// Byte counts at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes of buffers that left this rank, counting each forwarded or repeated copy.
    pub payload_sent_bytes: u64,
    /// Bytes of buffers that arrived.
    pub payload_received_bytes: u64,
    /// Bytes that left this rank with all framing.
    pub wire_sent_bytes: u64,
    /// Bytes that arrived with all framing.
    pub wire_received_bytes: u64,
}

impl Counters {
    /// The counts now.
    #[must_use]
    pub fn traffic(&self) -> Traffic {
        // Relaxed: the counts are independent statistics, nothing is published through them.
        let read = |cell: &AtomicU64| cell.load(Ordering::Relaxed);
        Traffic {
            payload_sent_bytes: read(&self.0.payload_sent),
            payload_received_bytes: read(&self.0.payload_received),
            wire_sent_bytes: read(&self.0.wire_sent),
            wire_received_bytes: read(&self.0.wire_received),
        }
    }

    pub(super) fn sent(&self, payload: usize, framing: usize) {
        self.0.payload_sent.fetch_add(as_u64(payload), Ordering::Relaxed);
        self.0.wire_sent.fetch_add(as_u64(payload + framing), Ordering::Relaxed);
    }

    pub(super) fn received(&self, payload: usize, framing: usize) {
        self.0.payload_received.fetch_add(as_u64(payload), Ordering::Relaxed);
        self.0.wire_received.fetch_add(as_u64(payload + framing), Ordering::Relaxed);
    }
}
