//! Writing snapshots while training goes on (`TR-3`): one thread, one snapshot at a time.
//!
//! Owns: the memory of the snapshot, which is allocated once, and the thread that writes it.
//!
//! `SN-1`: the snapshot is kept until the coordinator has committed it, so a coordinator that is started again can ask for
//! it once more.

use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::checkpoint::{CheckpointError, WriteRequest, write_shard};
use crate::manifest::TrainingState;
use crate::plan::LoadPlan;
use crate::state::StateDict;
use crate::store::open_root;
use crate::tasks::spawn_thread;
use crate::telemetry::TraceSpan;
use crate::types::Step;

use super::control::{Control, News, Next};
use super::{TrainError, state::Layout, state::Shards};

/// How often the wait for the writer looks whether the run was cancelled.
const LOOK: Duration = Duration::from_millis(50);

struct Snapshot {
    step: Step,
    answers: u64,
    state: StateDict,
    training: Option<Box<TrainingState>>,
}

/// The trainer's end.
pub(super) struct Writer {
    snapshots: SyncSender<Snapshot>,
    free: Receiver<StateDict>,
    idle: Option<StateDict>,
    control: Control,
    thread: Option<JoinHandle<()>>,
}

/// Who is told when a shard is written, or why it cannot be.
pub(super) type Tell = Box<dyn Fn(Result<News, CheckpointError>) + Send>;

impl Writer {
    /// Starts the thread; `memory` is a state dict of `plan` that snapshots are copied into.
    pub(super) fn start(
        plan: LoadPlan,
        memory: StateDict,
        control: Control,
        tell: Tell,
    ) -> Result<Self, std::io::Error> {
        let (snapshots, work) = sync_channel::<Snapshot>(1);
        let (give_back, free) = sync_channel(1);
        let seen = control.clone();
        let thread = spawn_thread("snapshot", move || {
            while let Ok(snapshot) = work.recv() {
                if !write(&plan, &snapshot, &seen, &tell) || give_back.send(snapshot.state).is_err() {
                    return;
                }
            }
        })?;
        Ok(Self { snapshots, free, idle: Some(memory), control, thread: Some(thread) })
    }

    /// Takes a snapshot of `step` and hands it to the thread. Waits for the snapshot before it, if that is not committed
    /// yet. `answers` is the newest request for a checkpoint.
    pub(super) fn take(
        &mut self,
        (step, answers): (Step, u64),
        (layout, shards): (&Layout, &Shards),
        training: Option<Box<TrainingState>>,
    ) -> Result<(), TrainError> {
        self.finish()?;
        let Some(mut state) = self.idle.take() else { return Err(TrainError::WriterEnded) };
        shards.copy_to(layout, &mut state)?;
        self.snapshots.send(Snapshot { step, answers, state, training }).map_err(|_| TrainError::WriterEnded)
    }

    /// Returns when every snapshot is committed.
    pub(super) fn finish(&mut self) -> Result<(), TrainError> {
        while self.idle.is_none() {
            match self.free.recv_timeout(LOOK) {
                Ok(state) => self.idle = Some(state),
                Err(RecvTimeoutError::Timeout) if !self.control.is_cancelled() => {}
                Err(RecvTimeoutError::Timeout) => return Err(TrainError::Cancelled),
                Err(RecvTimeoutError::Disconnected) => return Err(TrainError::WriterEnded),
            }
        }
        Ok(())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // Without snapshots to come the thread ends; one that waits for a commit ends when the run is cancelled.
        let (closed, _) = sync_channel(1);
        self.snapshots = closed;
        if let Some(thread) = self.thread.take().filter(|_| self.idle.is_some()) {
            let _ = thread.join();
        }
    }
}

/// Writes a snapshot as often as it is granted, until it is committed. False when there is nobody left to write for.
fn write(plan: &LoadPlan, snapshot: &Snapshot, control: &Control, tell: &Tell) -> bool {
    let step = snapshot.step;
    tell(Ok(News::SnapshotTaken { step, answers: snapshot.answers }));
    let mut done = None;
    loop {
        let grant = match control.wait_for(step, done.as_ref()) {
            Some(Next::Write(grant)) => grant,
            Some(Next::Committed) => return true,
            None => return false,
        };
        crate::faults::point("train.write");
        let started = crate::clock::now();
        let mut span = TraceSpan::child(&grant.traceparent, "write shard");
        let written = open_root(&grant.root).map_err(CheckpointError::from).and_then(|root| {
            let (state, store, directory) = (&snapshot.state, root.store.as_ref(), grant.directory.as_str());
            write_shard(&WriteRequest { plan, state, store, directory, step }, &|_| {})
        });
        match written {
            Ok(mut receipt) => {
                control.wrote(&receipt, started.elapsed());
                span.count("weightcast.rank", u64::from(receipt.rank.0));
                drop(span);
                receipt.training.clone_from(&snapshot.training);
                done = Some(grant.clone());
                tell(Ok(News::Saved { grant, receipt: Box::new(receipt) }));
            }
            Err(error) => {
                span.fail(&crate::error::chain(&error));
                tell(Err(error));
                return false;
            }
        }
    }
}
