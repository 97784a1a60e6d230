//! What whoever runs the training and the training say to each other while it goes on.
//!
//! Owns: requests to stop, grants to write, the progress that others look at. Refuses to know: who asks and who looks.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::load::Cancel;
use crate::manifest::ShardReceipt;
use crate::membership::TrainingProgress;
use crate::types::{Attempt, Step};

/// How often a wait looks whether the run was cancelled.
const LOOK: Duration = Duration::from_millis(50);

/// A try at writing a checkpoint, granted by the coordinator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The step.
    pub step: Step,
    /// The try.
    pub attempt: Attempt,
    /// The root of checkpoints.
    pub root: PathBuf,
    /// The attempt's directory in it.
    pub directory: String,
    /// The checkpoint's trace; empty when nobody traces.
    pub traceparent: String,
}

/// What the training tells.
#[derive(Debug)]
pub enum News {
    /// This rank holds a snapshot.
    SnapshotTaken {
        /// The step.
        step: Step,
        /// The newest request for a checkpoint that had been seen before; 0 for none.
        answers: u64,
    },
    /// This rank has written its part.
    Saved {
        /// What was granted.
        grant: Grant,
        /// What was written.
        receipt: Box<ShardReceipt>,
    },
}

/// The line between a training run and the session that follows the coordinator. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Control {
    shared: Arc<Shared>,
    cancel: Cancel,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    save_request: AtomicU64,
    saves: Mutex<Saves>,
    changed: Condvar,
    progress: Mutex<Option<TrainingProgress>>,
    checkpoint_bytes: AtomicU64,
    checkpoint_ns: AtomicU64,
    stall_ns: AtomicU64,
}

/// What checkpoints took since the process started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckpointTally {
    /// Bytes written.
    pub bytes: u64,
    /// The time that writing took, beside training or not.
    pub writing: Duration,
    /// The time that training stood still.
    pub stalled: Duration,
}

#[derive(Debug, Default)]
struct Saves {
    granted: Option<Grant>,
    committed: Option<Step>,
}

impl Control {
    /// A line whose waits end when `cancel` is.
    #[must_use]
    pub fn new(cancel: Cancel) -> Self {
        Self { shared: Arc::default(), cancel }
    }

    /// A new line for another generation of the same process, which goes on counting. What still waits on this one never hears of
    /// the new one.
    #[must_use]
    pub fn renewed(&self, cancel: Cancel) -> Self {
        let copy = |cell: &AtomicU64| AtomicU64::new(cell.load(Ordering::Relaxed));
        let shared = Shared {
            checkpoint_bytes: copy(&self.shared.checkpoint_bytes),
            checkpoint_ns: copy(&self.shared.checkpoint_ns),
            stall_ns: copy(&self.shared.stall_ns),
            ..Shared::default()
        };
        Self { shared: Arc::new(shared), cancel }
    }

    /// For another run of the same process: nothing is asked for any more, and nothing was said.
    pub fn reset(&self) {
        self.shared.stop.store(false, Ordering::Relaxed);
        self.shared.save_request.store(0, Ordering::Relaxed);
        *self.lock() = Saves::default();
        *self.shared.progress.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Asks all ranks to end at the next step boundary, with a checkpoint.
    pub fn stop(&self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }

    /// Asks for a checkpoint after the step that is computed. Requests have rising numbers; the same one is the same request.
    pub fn request_save(&self, request: u64) {
        self.shared.save_request.fetch_max(request, Ordering::Relaxed);
    }

    /// The newest request for a checkpoint; 0 for none.
    pub(super) fn save_request(&self) -> u64 {
        self.shared.save_request.load(Ordering::Relaxed)
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.shared.stop.load(Ordering::Relaxed)
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.cancel.is_cancelled()
    }

    /// What the coordinator says of checkpoints.
    pub fn saves(&self, granted: Option<Grant>, committed: Option<Step>) {
        let mut saves = self.lock();
        *saves = Saves { granted, committed };
        self.shared.changed.notify_all();
    }

    /// How far the run is; none before its first step.
    #[must_use]
    pub fn progress(&self) -> Option<TrainingProgress> {
        self.shared.progress.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set_progress(&self, progress: TrainingProgress) {
        *self.shared.progress.lock().unwrap_or_else(PoisonError::into_inner) = Some(progress);
    }

    /// A shard was written.
    pub(crate) fn wrote(&self, receipt: &ShardReceipt, took: Duration) {
        let bytes = receipt.file.as_ref().map_or(0, |file| file.bytes);
        self.shared.checkpoint_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.shared.checkpoint_ns.fetch_add(nanoseconds(took), Ordering::Relaxed);
    }

    /// Training stood still for a checkpoint.
    pub(super) fn stalled(&self, time: Duration) {
        self.shared.stall_ns.fetch_add(nanoseconds(time), Ordering::Relaxed);
    }

    /// What checkpoints took.
    #[must_use]
    pub fn tally(&self) -> CheckpointTally {
        let read = |cell: &AtomicU64| cell.load(Ordering::Relaxed);
        CheckpointTally {
            bytes: read(&self.shared.checkpoint_bytes),
            writing: Duration::from_nanos(read(&self.shared.checkpoint_ns)),
            stalled: Duration::from_nanos(read(&self.shared.stall_ns)),
        }
    }

    /// Waits until `step` is committed, or until there is a grant for it that is not `done`. None when cancelled.
    pub(super) fn wait_for(&self, step: Step, done: Option<&Grant>) -> Option<Next> {
        let mut saves = self.lock();
        loop {
            if saves.committed.is_some_and(|committed| committed >= step) {
                return Some(Next::Committed);
            }
            if let Some(grant) = saves.granted.as_ref().filter(|grant| grant.step == step && Some(*grant) != done) {
                return Some(Next::Write(grant.clone()));
            }
            if self.cancel.is_cancelled() {
                return None;
            }
            let waited = self.shared.changed.wait_timeout(saves, LOOK);
            saves = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Saves> {
        self.shared.saves.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// What a snapshot waits for.
#[derive(Debug)]
pub(super) enum Next {
    /// Write it.
    Write(Grant),
    /// It is durable.
    Committed,
}
