//! What this process has done, read while it goes on: handles on the counters of its loads, its data plane and its checkpoints.
//!
//! Owns: the sum over all loads and connections. Refuses to know: who hears of it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::comm::Counters;
use crate::load::Meters;
use crate::membership::RankFigures;
use crate::store::ReadCounter;
use crate::train::CheckpointTally;

/// See the module. Clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct Figures(Arc<Mutex<Parts>>);

#[derive(Debug, Default)]
struct Parts {
    loads: Vec<Arc<Meters>>,
    reads: Vec<ReadCounter>,
    connections: Vec<Counters>,
}

impl Figures {
    /// Meters for one more load, which reads through `reads`.
    pub(super) fn load(&self, reads: impl IntoIterator<Item = ReadCounter>) -> Arc<Meters> {
        let meters = Arc::<Meters>::default();
        let mut parts = self.lock();
        parts.loads.push(meters.clone());
        parts.reads.extend(reads);
        meters
    }

    /// One more communicator.
    pub(super) fn connection(&self, counters: Counters) {
        self.lock().connections.push(counters);
    }

    /// All together, now.
    pub(super) fn now(&self, checkpoints: CheckpointTally) -> RankFigures {
        let parts = self.lock();
        let mut sum = RankFigures {
            storage_bytes: parts.reads.iter().map(ReadCounter::bytes).sum(),
            checkpoint_bytes: checkpoints.bytes,
            checkpoint_s: checkpoints.writing.as_secs_f64(),
            stall_s: checkpoints.stalled.as_secs_f64(),
            ..RankFigures::default()
        };
        for traffic in parts.connections.iter().map(Counters::traffic) {
            sum.sent_bytes += traffic.payload_sent_bytes;
            sum.received_bytes += traffic.payload_received_bytes;
        }
        for load in &parts.loads {
            let stages = load.stages();
            sum.allocate_s += stages.allocate_s;
            sum.read_s += stages.read_s;
            sum.encode_s += stages.encode_s;
            sum.exchange_s += stages.exchange_s;
            sum.place_s += stages.place_s;
            sum.quantized_values += load.quantized_values();
            // Loads come one after the other: the last one has the queue.
            (sum.queue_used_chunks, sum.queue_capacity_chunks) = load.queue();
        }
        sum
    }

    fn lock(&self) -> MutexGuard<'_, Parts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
