//! The data thread: it owns the communicator and the shards, and carries out one command after the other.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};

use tokio::sync::mpsc as async_mpsc;

use super::figures::Figures;
use super::models::{Loaded, Places, load_models};
use super::plane::{Meeting, Offer, Plane};
use super::proc_stat::peak_resident_bytes;
use crate::checkpoint::{CheckpointError, WriteRequest, write_shard};
use crate::comm::tcp::TcpPort;
use crate::comm::{AbortHandle, CommError, Communicator, Counters, Group};
use crate::device::Device;
use crate::error::{Classify, Kind, chain};
use crate::load::{Cancel, LoadError, LoadReport};
use crate::manifest::ShardReceipt;
use crate::membership::Blame;
use crate::plan::{LoadPlan, Strategy};
use crate::state::StateDict;
use crate::store::{StoreError, open_root};
use crate::telemetry::TraceSpan;
use crate::train::{Control, Grant, News, TrainError, TrainRequest, train};
use crate::types::{Attempt, DeviceWish, Generation, Rank, Step};

/// What the data thread is told to do.
#[derive(Debug)]
pub(super) enum Command {
    /// Form the group and load.
    Load(Box<LoadCommand>),
    /// Write the shard of a checkpoint.
    Save(SaveCommand),
    /// Train on what was loaded; the host's root of checkpoints.
    Train(Option<PathBuf>),
    /// Let a model go.
    Unload(String),
    /// The generation is over: leave its group, keep the base, and be ready for another one.
    Regroup(TcpPort, Watched),
}

/// Which try at a checkpoint is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SaveCommand {
    pub(super) step: Step,
    pub(super) attempt: Attempt,
    pub(super) root: PathBuf,
    pub(super) directory: String,
    /// The checkpoint's trace; empty when nobody traces.
    pub(super) traceparent: String,
}

/// Everything that a load needs.
#[derive(Debug)]
pub(super) struct LoadCommand {
    pub(super) plan: LoadPlan,
    /// Where the plan's files are on this host, if not where the plan says.
    pub(super) root: Option<PathBuf>,
    /// What tells the base's files from others; empty when nothing does.
    pub(super) base_id: String,
    /// Whether all ranks may keep what they hold.
    pub(super) keeps_base: bool,
    pub(super) meeting: Meeting,
    /// The load's trace; empty when nobody traces.
    pub(super) traceparent: String,
}

/// What the data thread answers.
#[derive(Debug)]
pub(super) enum Outcome {
    Loaded(Box<LoadReport>),
    Saved {
        command: SaveCommand,
        receipt: Box<ShardReceipt>,
    },
    /// The ranks hold a snapshot of this step, to be written.
    SnapshotTaken {
        step: Step,
        answers: u64,
    },
    Trained,
    /// Ready for another generation; the one whose load is still here, if it is.
    Regrouped(Generation),
    Failed(Failure),
}

/// Why the rank cannot go on.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    pub(super) message: String,
    pub(super) exit_code: u8,
    pub(super) blame: Blame,
}

/// What other threads see of the data thread, and how they end its work.
#[derive(Clone, Debug)]
pub(super) struct Watched {
    pub(super) done_bytes: Arc<AtomicU64>,
    pub(super) total_bytes: Arc<AtomicU64>,
    pub(super) cancel: Cancel,
    pub(super) control: Control,
    pub(super) figures: Figures,
    abort: Arc<Mutex<Option<AbortHandle>>>,
}

impl Default for Watched {
    fn default() -> Self {
        let cancel = Cancel::default();
        let control = Control::new(cancel.clone());
        let (done_bytes, total_bytes, figures) = (Arc::default(), Arc::default(), Figures::default());
        Self { done_bytes, total_bytes, cancel, control, figures, abort: Arc::default() }
    }
}

impl Watched {
    /// For another generation of the same process.
    pub(super) fn renewed(&self) -> Self {
        let cancel = Cancel::default();
        let control = self.control.renewed(cancel.clone());
        Self { cancel, control, figures: self.figures.clone(), ..Self::default() }
    }

    /// Ends whatever the data thread is doing, within 100 ms.
    pub(super) fn abort(&self, reason: &str) {
        self.cancel.cancel();
        if let Some(handle) = self.abort.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
            handle.abort(reason);
        }
    }

    /// How many bytes the work at hand has.
    pub(super) fn expect(&self, total_bytes: u64) {
        self.done_bytes.store(0, Ordering::Relaxed);
        self.total_bytes.store(total_bytes, Ordering::Relaxed);
    }

    pub(super) fn set_abort(&self, handle: AbortHandle) {
        let mut abort = self.abort.lock().unwrap_or_else(PoisonError::into_inner);
        // Whoever cancelled in the meantime found no handle.
        if self.cancel.is_cancelled() {
            handle.abort("cancelled");
        }
        *abort = Some(handle);
    }
}

/// The data thread's own state.
pub(super) struct DataThread {
    pub(super) port: Option<TcpPort>,
    pub(super) watched: Watched,
    pub(super) offer: Offer,
    pub(super) held: Option<Held>,
}

/// What a rank holds after its load.
pub(super) struct Held {
    plan: LoadPlan,
    base_id: String,
    state: StateDict,
    /// By name, those beside it.
    others: BTreeMap<String, StateDict>,
    /// The generation that loaded it, or found it here.
    generation: Generation,
    group: Group,
    /// For training and for the next job; with the memory that it moves.
    comm: Option<Kept>,
}

/// A communicator that is connected.
struct Kept {
    comm: Box<dyn Communicator>,
    counters: Counters,
    device: Device,
    backend: &'static str,
}

impl Held {
    /// Whether it is what a job with this plan and these files is to hold; the job before may have let models go.
    fn is_base_of(&self, plan: &LoadPlan, base_id: &str) -> bool {
        let same_files = !base_id.is_empty() && self.base_id == base_id;
        same_files && !plan.digests && self.others.len() == plan.others.len() && self.plan.holds_as(plan)
    }

    /// The figures of a load that had nothing to do.
    fn report(&self) -> LoadReport {
        LoadReport {
            weights_bytes: self.plan.kept_bytes(self.group.rank),
            peak_resident_bytes: peak_resident_bytes(),
            ..LoadReport::of_nothing(self.group.rank)
        }
    }
}

impl DataThread {
    /// Carries out commands until there are no more.
    pub(super) fn run(mut self, commands: &mpsc::Receiver<Command>, outcomes: &async_mpsc::Sender<Outcome>) {
        while let Ok(command) = commands.recv() {
            let is_cancelled = self.watched.cancel.is_cancelled();
            let outcome = match command {
                Command::Regroup(port, watched) => self.regroup(port, watched),
                // Of a generation that is over.
                _ if is_cancelled => continue,
                Command::Load(command) => {
                    let mut span = TraceSpan::child(&command.traceparent, "load shard");
                    span.count("weightcast.rank", u64::from(command.meeting.group.rank.0));
                    traced(span, self.load(*command))
                }
                Command::Save(command) => {
                    let span = TraceSpan::child(&command.traceparent, "write shard");
                    traced(span, self.save(command))
                }
                Command::Train(root) => self.train(root, outcomes).unwrap_or_else(Outcome::Failed),
                Command::Unload(name) => {
                    self.unload(&name);
                    continue;
                }
            };
            if outcomes.blocking_send(outcome).is_err() {
                return;
            }
        }
    }

    fn regroup(&mut self, port: TcpPort, watched: Watched) -> Outcome {
        (self.port, self.watched) = (Some(port), watched);
        let held = self.held.as_mut().map(|held| {
            held.comm = None;
            // Others may not have let a model go yet that this rank has.
            let is_whole = held.others.len() == held.plan.others.len();
            if is_whole { held.generation } else { Generation::default() }
        });
        Outcome::Regrouped(held.unwrap_or_default())
    }

    fn load(&mut self, command: LoadCommand) -> Result<Outcome, Failure> {
        let LoadCommand { plan, root, base_id, keeps_base, meeting, .. } = command;
        let (group, generation) = (meeting.group, meeting.generation);
        let device = placed(self.offer.device, &plan, group.rank)?;
        // The base of the job before stays where it is; another one makes room first.
        let mut comm = None;
        if let Some(held) = self.held.take() {
            if keeps_base && held.is_base_of(&plan, &base_id) {
                tracing::info!(rank = %group.rank, "the base is here already");
                let report = held.report();
                self.held = Some(Held { plan, generation, ..held });
                self.connect_for(device, meeting)?;
                return Ok(Outcome::Loaded(Box::new(report)));
            }
            comm = held.comm;
        }
        let exchanging = |plan: &LoadPlan| !matches!(plan.strategy, Strategy::Full | Strategy::Streaming);
        let exchanges = exchanging(&plan) || plan.others.iter().any(|other| exchanging(&other.plan));
        if comm.is_none() && (exchanges || plan.train.is_some()) {
            comm = self.connect(&plan, device, meeting)?;
        }
        let before = comm.as_ref().map(|kept| kept.counters.traffic());
        let watched = self.watched.clone();
        let comm_device = comm.as_ref().map_or(Device::Host, |kept| kept.device);
        let places = Places { rank: group.rank, device, comm_device, root: root.as_deref(), watched: &watched };
        let lent: Option<&mut dyn Communicator> = match comm.as_mut().filter(|_| exchanges) {
            Some(kept) => Some(kept.comm.as_mut()),
            None => None,
        };
        let loaded = load_models(&plan, places, lent);
        if let (Err(error), Some(kept)) = (&loaded, &comm) {
            kept.comm.abort_handle().abort(&chain(error));
        }
        let Loaded { state, others, mut report } = loaded.map_err(|error| load_failure(&error, group.rank))?;
        report.peak_resident_bytes = peak_resident_bytes();
        if let (Some(kept), Some(before)) = (&comm, before) {
            let traffic = kept.counters.traffic();
            report.backend = kept.backend.to_owned();
            report.sent_bytes = traffic.payload_sent_bytes - before.payload_sent_bytes;
            report.received_bytes = traffic.payload_received_bytes - before.payload_received_bytes;
        }
        self.held = Some(Held { plan, base_id, state, others, generation, group, comm });
        Ok(Outcome::Loaded(Box::new(report)))
    }

    /// Connects with the other ranks, if there are any and it was not done.
    fn connect(&mut self, plan: &LoadPlan, device: Device, meeting: Meeting) -> Result<Option<Kept>, Failure> {
        if meeting.group.world.get() == 1 {
            return Ok(None);
        }
        let Some(port) = self.port.take() else { return Ok(None) };
        let plane = Plane::choose(plan.device, device, &self.offer, &meeting)?;
        let (backend, comm_device) = (plane.name(), plane.device());
        let (comm, counters) = plane.connect(meeting, port, &self.watched)?;
        self.watched.figures.connection(counters.clone());
        crate::faults::point("worker.connected");
        Ok(Some(Kept { comm, counters, device: comm_device, backend }))
    }

    /// Where the base that is held was loaded without the others' help, and the job needs them.
    fn connect_for(&mut self, device: Device, meeting: Meeting) -> Result<(), Failure> {
        let Some(held) = &self.held else { return Ok(()) };
        if held.comm.is_some() || held.plan.train.is_none() {
            return Ok(());
        }
        let plan = held.plan.clone();
        let comm = self.connect(&plan, device, meeting)?;
        if let Some(held) = &mut self.held {
            held.comm = comm;
        }
        Ok(())
    }

    /// Lets a model go; the job's own goes with the job.
    fn unload(&mut self, name: &str) {
        if let Some(held) = &mut self.held
            && let Some(state) = held.others.remove(name)
        {
            tracing::info!(name, bytes = state.arena_bytes(), "a model is unloaded");
        }
    }

    fn train(&mut self, root: Option<PathBuf>, outcomes: &async_mpsc::Sender<Outcome>) -> Result<Outcome, Failure> {
        let Some(Held { plan, state, group, comm, .. }) = &mut self.held else {
            let message = "told to train before it has loaded".to_owned();
            return Err(Failure { message, exit_code: Kind::Internal.exit_code(), blame: Blame::Own });
        };
        let (rank, news) = (group.rank, outcomes.clone());
        let abort = comm.as_ref().map(|kept| kept.comm.abort_handle());
        let comm_device = comm.as_ref().map_or(Device::Host, |kept| kept.device);
        let request = TrainRequest {
            plan,
            base: state,
            comm: match comm {
                Some(kept) => Some(kept.comm.as_mut()),
                None => None,
            },
            comm_device,
            group: *group,
            checkpoint_root: root,
            control: self.watched.control.clone(),
            tell: Box::new(move |told| {
                // A session that is gone needs no news.
                let _ = news.blocking_send(outcome_of(told));
            }),
        };
        match train(request) {
            Ok(_) => Ok(Outcome::Trained),
            Err(error) => {
                if let Some(abort) = abort {
                    abort.abort(&chain(&error));
                }
                Err(train_failure(&error, rank))
            }
        }
    }

    fn save(&mut self, command: SaveCommand) -> Result<Outcome, Failure> {
        let internal = |message: &str| Failure {
            message: message.to_owned(),
            exit_code: crate::error::Kind::Internal.exit_code(),
            blame: Blame::Own,
        };
        let held = self.held.as_ref().ok_or_else(|| internal("told to save before it has loaded"))?;
        let (plan, state) = (&held.plan, &held.state);
        let store = open_root(&command.root).map_err(store_failure)?.store;
        let total = crate::checkpoint::data_bytes(plan, state);
        self.watched.expect(total);
        let request =
            WriteRequest { plan, state, store: store.as_ref(), directory: &command.directory, step: command.step };
        let progress = |done| self.watched.done_bytes.store(done, Ordering::Relaxed);
        let started = crate::clock::now();
        let receipt = write_shard(&request, &progress).map_err(|error: CheckpointError| Failure {
            message: chain(&error),
            exit_code: error.kind().exit_code(),
            blame: Blame::Own,
        })?;
        self.watched.control.wrote(&receipt, started.elapsed());
        Ok(Outcome::Saved { command, receipt: Box::new(receipt) })
    }
}

/// Says in a span how its work ended, and ends it.
fn traced(mut span: TraceSpan, result: Result<Outcome, Failure>) -> Outcome {
    let outcome = result.unwrap_or_else(Outcome::Failed);
    match &outcome {
        Outcome::Loaded(report) => {
            span.count("weightcast.storage_bytes", report.storage_bytes);
            span.count("weightcast.sent_bytes", report.sent_bytes);
            span.count("weightcast.received_bytes", report.received_bytes);
            span.count("weightcast.weights_bytes", report.weights_bytes);
            span.set("weightcast.read_seconds", report.stages.read_s);
            span.set("weightcast.encode_seconds", report.stages.encode_s);
            span.set("weightcast.exchange_seconds", report.stages.exchange_s);
        }
        Outcome::Saved { receipt, .. } => {
            span.count("weightcast.rank", u64::from(receipt.rank.0));
            span.count("weightcast.written_bytes", receipt.file.as_ref().map_or(0, |file| file.bytes));
        }
        Outcome::Failed(failure) => span.fail(&failure.message),
        Outcome::SnapshotTaken { .. } | Outcome::Trained | Outcome::Regrouped(_) => {}
    }
    outcome
}

/// Where the plan puts the weights of a rank that has `found`.
fn placed(found: Device, plan: &LoadPlan, rank: Rank) -> Result<Device, Failure> {
    match (plan.device.device, found) {
        (DeviceWish::Cpu, _) => Ok(Device::Host),
        (DeviceWish::Cuda, Device::Host) => Err(Failure {
            message: format!(
                "the plan places weights on CUDA devices, and rank {rank} has none: its host has no driver, or fewer \
                 devices than ranks, which --share-devices at the host's launcher allows"
            ),
            exit_code: Kind::NotFound.exit_code(),
            blame: Blame::Own,
        }),
        (DeviceWish::Cuda | DeviceWish::Auto, found) => Ok(found),
    }
}

/// What a snapshot's writer tells, as the session hears it.
fn outcome_of(told: Result<News, CheckpointError>) -> Outcome {
    match told {
        Ok(News::SnapshotTaken { step, answers }) => Outcome::SnapshotTaken { step, answers },
        Ok(News::Saved { grant: Grant { step, attempt, root, directory, traceparent }, receipt }) => {
            Outcome::Saved { command: SaveCommand { step, attempt, root, directory, traceparent }, receipt }
        }
        Err(error) => {
            Outcome::Failed(Failure { message: chain(&error), exit_code: error.kind().exit_code(), blame: Blame::Own })
        }
    }
}

fn store_failure(error: StoreError) -> Failure {
    Failure { message: chain(&error), exit_code: error.kind().exit_code(), blame: Blame::Own }
}

fn train_failure(error: &TrainError, own: Rank) -> Failure {
    match error {
        TrainError::Comm(source) => comm_failure(source, own),
        _ => Failure { message: chain(error), exit_code: error.kind().exit_code(), blame: Blame::Own },
    }
}

fn load_failure(error: &LoadError, own: Rank) -> Failure {
    match error {
        LoadError::Comm { fqn, source } => {
            let failure = comm_failure(source, own);
            Failure { message: format!("tensor {fqn}: {}", failure.message), ..failure }
        }
        _ => Failure { message: chain(error), exit_code: error.kind().exit_code(), blame: Blame::Own },
    }
}

pub(super) fn comm_failure(error: &CommError, own: Rank) -> Failure {
    let blame = match error {
        CommError::PeerLost { rank, .. } | CommError::Aborted { rank, .. } if *rank != own => Blame::Peer(*rank),
        // Others may say of this rank that it is gone, when the way to it is cut.
        CommError::PeerLost { .. } | CommError::Nccl { .. } | CommError::Deadline { .. } => Blame::Unknown,
        _ => Blame::Own,
    };
    Failure { message: chain(error), exit_code: error.kind().exit_code(), blame }
}
