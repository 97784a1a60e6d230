//! The session with the coordinator: join, renew, follow the snapshots, report.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc as async_mpsc;
use tonic::Streaming;
use weightcast_proto::{PROTOCOL_VERSION, v1};

use super::calls::{RETRY_DELAY, drain, enter, ip_towards, join_and_watch, open_watch, refused};
use super::data::{Blame, Command, DataThread, Failure, LoadCommand, Outcome, SaveCommand, Watched};
use super::plane::{Meeting, Offer};
use super::proc_stat::peak_resident_bytes;
use super::reports::Reported;
use super::{WorkerConfig, WorkerError};
use crate::comm::Group;
use crate::comm::tcp::TcpPort;
use crate::error::{Kind, chain};
use crate::plan::{LoadPlan, PLAN_VERSION};
use crate::rpc::{Clients, describe_status, kind_of, rank_figures, request, training_progress};
use crate::tasks::{Tasks, spawn_thread, survive_file_size_limit};
use crate::train::Grant;
use crate::types::{Attempt, Generation, Step};

/// After a failure of its own a rank waits this long for the coordinator to name the cause, which may be another rank.
const CAUSE_DEADLINE: Duration = Duration::from_secs(2);
/// A rank that ends because of another one lets it end first: the launcher takes the first process that fails for the
/// root cause.
const CULPRIT_FIRST: Duration = Duration::from_millis(200);
/// Commands that wait for the data thread. There is one load and one save, and a save more each time that a coordinator is
/// started again meanwhile.
const COMMANDS: usize = 64;

/// Runs one rank until the job ends.
///
/// # Errors
/// [`WorkerError`], whose exit code the process ends with.
pub async fn run(config: WorkerConfig) -> Result<Ended, WorkerError> {
    survive_file_size_limit().map_err(|source| WorkerError::System { what: "handling SIGXFSZ", source })?;
    let data_ip = match config.data_ip {
        Some(ip) => ip,
        None => ip_towards(&config.coordinator)
            .map_err(|source| WorkerError::System { what: "finding this host's address for the data plane", source })?,
    };
    let port = TcpPort::bind(data_ip)?;
    let offer = Offer::look(&config)?;
    let mut tasks = Tasks::new();
    let (mut session, mut snapshots) = Session::join(&config, port.address(), &offer).await?;
    let (commands, work) = mpsc::sync_channel(COMMANDS);
    let (report, mut outcomes) = async_mpsc::channel(1);
    let data = DataThread { port: Some(port), watched: session.watched.clone(), offer, held: None };
    spawn_thread("data", move || data.run(&work, &report))
        .map_err(|source| WorkerError::System { what: "starting the data thread", source })?;
    session.start_renewing(&mut tasks);
    session.start_draining_on_sigterm(&mut tasks)?;
    let result = session.follow(&mut snapshots, &commands, &mut outcomes).await;
    session.watched.abort("the session ended");
    tasks.shut_down(Duration::from_millis(200)).await;
    result.map(|()| if session.preempted.load(Ordering::Relaxed) { Ended::Preempted } else { Ended::Finished })
}

/// How a rank ended without failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The job is done.
    Finished,
    /// The job was asked to end by a signal, and ended in an orderly way.
    Preempted,
}

pub(super) struct Session {
    pub(super) config: WorkerConfig,
    pub(super) clients: Clients,
    join: v1::JoinRequest,
    pub(super) member: tokio::sync::watch::Sender<String>,
    watched: Watched,
    renew_interval: Duration,
    pub(super) stage: tokio::sync::watch::Sender<&'static str>,
    pub(super) training: bool,
    saving: Option<(u64, u64)>,
    /// Models that were let go.
    unloaded: BTreeSet<String>,
    pub(super) generation: u64,
    /// To be said again to a coordinator that was restarted.
    pub(super) reported: Reported,
    preempted: Arc<AtomicBool>,
}

impl Session {
    /// Connects, joins and opens the watch; the coordinator may still be starting, or start again.
    async fn join(
        config: &WorkerConfig,
        data_address: SocketAddr,
        offer: &Offer,
    ) -> Result<(Self, Streaming<v1::WatchResponse>), WorkerError> {
        let join = v1::JoinRequest {
            request_id: format!("{}-{:x}", std::process::id(), crate::clock::unix_ns()),
            rank: config.rank.0,
            world_size: config.world.get(),
            host: config.host.clone(),
            process_id: std::process::id(),
            data_address: data_address.to_string(),
            protocol_version: PROTOCOL_VERSION,
            device: offer.device_words(),
            nccl_version: offer.nccl_version(),
            nccl_unique_id: offer.nccl_unique_id(),
        };
        let start = crate::clock::now();
        let (clients, member, snapshots) = loop {
            match enter(config, &join).await {
                Err(error) if error.is_transient() && start.elapsed() < config.coordinator_deadline => {
                    tracing::debug!(error = chain(&error), "waiting for the coordinator");
                    tokio::time::sleep(RETRY_DELAY).await;
                }
                entered => break entered?,
            }
        };
        let session = Self {
            config: config.clone(),
            clients,
            renew_interval: member.renew_interval,
            join,
            member: tokio::sync::watch::Sender::new(member.id),
            watched: Watched::default(),
            stage: tokio::sync::watch::Sender::new("joining"),
            training: false,
            saving: None,
            unloaded: BTreeSet::new(),
            generation: 0,
            reported: Reported::default(),
            preempted: Arc::default(),
        };
        Ok((session, snapshots))
    }

    /// Renews the lease for as long as the process lives, whatever the data thread is doing.
    fn start_renewing(&self, tasks: &mut Tasks) {
        let (mut clients, config, member) = (self.clients.clone(), self.config.clone(), self.member.subscribe());
        let (watched, stage, interval) = (self.watched.clone(), self.stage.subscribe(), self.renew_interval);
        tasks.spawn("renew", async move {
            let mut ticks = tokio::time::interval(interval);
            loop {
                ticks.tick().await;
                let progress = v1::Progress {
                    stage: (*stage.borrow()).to_owned(),
                    done_bytes: watched.done_bytes.load(Ordering::Relaxed),
                    total_bytes: watched.total_bytes.load(Ordering::Relaxed),
                    peak_resident_bytes: peak_resident_bytes(),
                    figures: Some(rank_figures(&watched.figures.now(watched.control.tally()))),
                    training: watched.control.progress().filter(|_| config.rank.0 == 0).as_ref().map(training_progress),
                };
                let member_id = member.borrow().clone();
                let renew = v1::RenewRequest { member_id, progress: Some(progress) };
                // A lost renewal is made good by the next one; a lost coordinator is noticed by the watch.
                if let Ok(request) = request(&config.token, renew) {
                    let _ = clients.worker.renew(request).await;
                }
            }
        });
    }

    /// On SIGTERM asks the coordinator to end the job in an orderly way: save what is not saved, then finish. Every rank
    /// may ask; the first one counts.
    fn start_draining_on_sigterm(&self, tasks: &mut Tasks) -> Result<(), WorkerError> {
        let mut terminate = signal(SignalKind::terminate())
            .map_err(|source| WorkerError::System { what: "handling SIGTERM", source })?;
        let (preempted, mut clients, config) = (self.preempted.clone(), self.clients.clone(), self.config.clone());
        let member = self.member.subscribe();
        tasks.spawn("drain", async move {
            while terminate.recv().await.is_some() {
                // A launcher that lost a rank sends this signal to the others too; then the session ends meanwhile.
                tokio::time::sleep(CULPRIT_FIRST).await;
                preempted.store(true, Ordering::Relaxed);
                let member = member.borrow().clone();
                if let Err(reason) = drain(&mut clients, &config, &member).await {
                    tracing::warn!(reason, "the coordinator did not take the request to end");
                }
            }
        });
        Ok(())
    }

    async fn follow(
        &mut self,
        snapshots: &mut Streaming<v1::WatchResponse>,
        commands: &mpsc::SyncSender<Command>,
        outcomes: &mut async_mpsc::Receiver<Outcome>,
    ) -> Result<(), WorkerError> {
        loop {
            // Cancel safe: a stream and a receiver lose nothing when the other branch wins.
            tokio::select! {
                message = snapshots.message() => match message {
                    Ok(Some(snapshot)) => match self.act(&snapshot, commands).await {
                        // The next watch begins with the same snapshot.
                        Err(error) if error.is_transient() => *snapshots = self.reconnect(&error.to_string()).await?,
                        is_over => {
                            if is_over? {
                                return Ok(());
                            }
                        }
                    },
                    ended => {
                        let reason = match ended {
                            Err(status) => describe_status(&status),
                            _ => "it ended the watch".to_owned(),
                        };
                        *snapshots = self.reconnect(&reason).await?;
                    }
                },
                outcome = outcomes.recv() => match outcome {
                    Some(Outcome::Failed(failure)) => return Err(self.fail(failure, snapshots).await),
                    Some(outcome) => match self.report(outcome).await {
                        // A coordinator that is away is not the end: it is told again when it is back.
                        Err(error) if error.is_transient() => *snapshots = self.reconnect(&error.to_string()).await?,
                        reported => reported?,
                    },
                    None => {
                        let message = "the data thread ended by itself".to_owned();
                        let exit_code = Kind::Internal.exit_code();
                        return Err(self.fail(Failure { message, exit_code, blame: Blame::Own }, snapshots).await);
                    }
                },
            }
        }
    }

    /// Does what a snapshot says, if it has not been done (`WK-1`). True when the job is finished.
    async fn act(
        &mut self,
        snapshot: &v1::WatchResponse,
        commands: &mpsc::SyncSender<Command>,
    ) -> Result<bool, WorkerError> {
        let generation = snapshot.header.as_ref().map_or(0, |header| header.generation);
        match snapshot.phase() {
            // The first job, or the next one of the queue.
            v1::Phase::Loading if self.generation != generation => {
                let plan = self.fetch_plan(&snapshot.plan_sha256).await?;
                self.begin_generation(generation);
                let _ = self.stage.send("loading");
                crate::faults::point("worker.planned");
                let command = self.load_command(plan, snapshot)?;
                tell(commands, Command::Load(Box::new(command)))?;
            }
            v1::Phase::Holding => {
                for name in &snapshot.unloaded {
                    if self.unloaded.insert(name.clone()) {
                        tell(commands, Command::Unload(name.clone()))?;
                    }
                }
            }
            v1::Phase::Saving => {
                if let Some(save) = &snapshot.save
                    && self.saving != Some((save.step, save.attempt))
                {
                    self.saving = Some((save.step, save.attempt));
                    let _ = self.stage.send("saving");
                    let command = SaveCommand {
                        step: Step(save.step),
                        attempt: Attempt(save.attempt),
                        root: self.checkpoint_root(snapshot).unwrap_or_default(),
                        directory: save.directory.clone(),
                        traceparent: snapshot.traceparent.clone(),
                    };
                    tell(commands, Command::Save(command))?;
                }
            }
            v1::Phase::Training => {
                let root = self.checkpoint_root(snapshot);
                let granted = snapshot.save.as_ref().zip(root.clone()).map(|(save, root)| Grant {
                    step: Step(save.step),
                    attempt: Attempt(save.attempt),
                    root,
                    directory: save.directory.clone(),
                    traceparent: snapshot.traceparent.clone(),
                });
                if snapshot.stop {
                    self.watched.control.stop();
                }
                self.watched.control.request_save(snapshot.save_request);
                self.watched.control.saves(granted, snapshot.committed_step.map(Step));
                if !self.training {
                    self.training = true;
                    let _ = self.stage.send("training");
                    tell(commands, Command::Train(root))?;
                }
            }
            v1::Phase::Finished => {
                crate::faults::point("worker.finished");
                return Ok(true);
            }
            v1::Phase::Aborted => {
                let culprit = snapshot.cause.as_ref().and_then(|cause| cause.rank);
                if culprit.is_some_and(|rank| rank != self.config.rank.0) {
                    tokio::time::sleep(CULPRIT_FIRST).await;
                }
                return Err(aborted(snapshot));
            }
            _ => {}
        }
        Ok(false)
    }

    /// Nothing was done in it yet.
    fn begin_generation(&mut self, generation: u64) {
        self.generation = generation;
        (self.training, self.saving, self.reported) = (false, None, Reported::default());
        self.unloaded.clear();
        self.watched.control.reset();
    }

    /// Where this host has the job's checkpoints; none when the job has no place for them.
    fn checkpoint_root(&self, snapshot: &v1::WatchResponse) -> Option<PathBuf> {
        let told = Some(&snapshot.checkpoint_root).filter(|root| !root.is_empty());
        told.map(|root| self.config.checkpoint_root.clone().unwrap_or_else(|| PathBuf::from(root)))
    }

    fn load_command(&self, plan: LoadPlan, snapshot: &v1::WatchResponse) -> Result<LoadCommand, WorkerError> {
        let bad = |message: String| WorkerError::Failed { message, exit_code: Kind::Internal.exit_code() };
        let secret = snapshot.secret.as_slice().try_into();
        let secret = secret.map_err(|_| bad(format!("secret: expected 32 bytes, found {}", snapshot.secret.len())))?;
        let peers: Result<Vec<SocketAddr>, _> = snapshot.peers.iter().map(|peer| peer.parse()).collect();
        let peers = peers.map_err(|error| bad(format!("address of a peer: {error}")))?;
        let group = Group { rank: self.config.rank, world: self.config.world };
        let (generation, nccl_unique_id) = (Generation(self.generation), snapshot.nccl_unique_id.clone());
        let root = self.config.checkpoint_root.as_ref().and_then(|root| stored_in(root, &plan));
        let tls = self.config.tls.clone();
        let meeting = Meeting { group, generation, secret, peers, tls, nccl_unique_id };
        Ok(LoadCommand {
            plan,
            root,
            base_id: snapshot.base_id.clone(),
            meeting,
            traceparent: snapshot.traceparent.clone(),
        })
    }

    /// Gets the plan and checks that it is the one that all ranks have.
    async fn fetch_plan(&mut self, expected: &[u8]) -> Result<LoadPlan, WorkerError> {
        let refused = |status: tonic::Status| WorkerError::Refused {
            rank: self.config.rank.0,
            action: "get the plan",
            message: describe_status(&status),
            kind: kind_of(&status),
        };
        let message = v1::GetPlanRequest { member_id: self.member.borrow().clone() };
        let message = request(&self.config.token, message)?;
        let mut parts = self.clients.worker.get_plan(message).await.map_err(refused)?.into_inner();
        let mut bytes = Vec::new();
        while let Some(part) = parts.message().await.map_err(refused)? {
            bytes.extend_from_slice(&part.part);
        }
        let bad = |message: String| WorkerError::Failed { message, exit_code: Kind::Internal.exit_code() };
        if LoadPlan::sha256(&bytes) != expected {
            return Err(bad("the plan is not the one that the generation agreed on".to_owned()));
        }
        let plan: LoadPlan =
            serde_json::from_slice(&bytes).map_err(|error| bad(format!("the plan cannot be read: {error}")))?;
        if plan.version == PLAN_VERSION {
            Ok(plan)
        } else {
            Err(bad(format!("plan version: expected {PLAN_VERSION}, found {}", plan.version)))
        }
    }

    /// Reports a failure and waits for the coordinator's word on the cause: a rank that only lost its peer must not be
    /// taken for the culprit.
    async fn fail(&mut self, failure: Failure, snapshots: &mut Streaming<v1::WatchResponse>) -> WorkerError {
        let lost_peer = match failure.blame {
            Blame::Own => None,
            Blame::Peer(rank) => Some(rank),
            Blame::Unknown => {
                // NCCL does not say which rank has gone. That rank, its launcher or its lease will.
                if let Some(cause) = cause_from(snapshots).await {
                    return cause;
                }
                None
            }
        };
        let message = v1::ReportFailedRequest {
            request_id: format!("{}-{:x}", *self.member.borrow(), crate::clock::unix_ns()),
            member_id: self.member.borrow().clone(),
            generation: self.generation,
            message: failure.message.clone(),
            exit_code: u32::from(failure.exit_code),
            lost_peer: lost_peer.map(|rank| rank.0),
        };
        if let Ok(message) = request(&self.config.token, message) {
            let _ = self.clients.worker.report_failed(message).await;
        }
        let own = WorkerError::Failed { message: failure.message, exit_code: failure.exit_code };
        match lost_peer {
            None => own,
            Some(_) => cause_from(snapshots).await.unwrap_or(own),
        }
    }

    /// Opens the watch again after it broke, and says again what a restarted coordinator cannot know.
    async fn reconnect(&mut self, reason: &str) -> Result<Streaming<v1::WatchResponse>, WorkerError> {
        tracing::warn!(reason, "the watch on the coordinator broke");
        let start = crate::clock::now();
        let mut reason = reason.to_owned();
        while start.elapsed() < self.config.coordinator_deadline {
            tokio::time::sleep(RETRY_DELAY).await;
            match self.rejoin().await {
                Ok(snapshots) => {
                    tracing::info!("the coordinator is back");
                    return Ok(snapshots);
                }
                Err(error) if error.is_transient() => reason = chain(&error),
                Err(error) => return Err(error),
            }
        }
        let seconds = start.elapsed().as_secs();
        Err(WorkerError::CoordinatorLost { address: self.config.coordinator.clone(), seconds, reason })
    }

    async fn rejoin(&mut self) -> Result<Streaming<v1::WatchResponse>, WorkerError> {
        self.clients = Clients::connect(&self.config.coordinator, self.config.tls.as_ref()).await?;
        let member = self.member.borrow().clone();
        let snapshots = match open_watch(&mut self.clients, &self.config, &member).await {
            // Before its generation was formed, a rank is known to nobody but the coordinator that has gone.
            Err(status) if kind_of(&status) == Kind::Fenced && self.generation == 0 => {
                let (member, snapshots) = join_and_watch(&mut self.clients, &self.config, &self.join).await?;
                let _ = self.member.send(member.id);
                snapshots
            }
            answer => answer.map_err(refused(&self.config, "watch"))?,
        };
        match self.report_again().await {
            // Of a job that is over: its ranks are told of the next one.
            Err(WorkerError::Refused { kind: Kind::Fenced, .. }) => {}
            told => told?,
        }
        if self.preempted.load(Ordering::Relaxed) {
            // The signal came once; whether the last coordinator heard of it is not known.
            let member = self.member.borrow().clone();
            let _ = drain(&mut self.clients, &self.config, &member).await;
        }
        Ok(snapshots)
    }
}

/// The coordinator's word on why the job ends, if it comes soon. The culprit ends first.
async fn cause_from(snapshots: &mut Streaming<v1::WatchResponse>) -> Option<WorkerError> {
    let cause = async {
        while let Ok(Some(snapshot)) = snapshots.message().await {
            if snapshot.phase() == v1::Phase::Aborted {
                return Some(aborted(&snapshot));
            }
        }
        None
    };
    let cause = tokio::time::timeout(CAUSE_DEADLINE, cause).await.ok().flatten();
    tokio::time::sleep(CULPRIT_FIRST).await;
    cause
}

/// The directory of the checkpoint that `plan` loads below this host's own `root` of checkpoints.
fn stored_in(root: &Path, plan: &LoadPlan) -> Option<PathBuf> {
    let step = Path::new(&plan.root).file_name().filter(|_| !plan.digest_tables.is_empty())?;
    Some(root.join(step))
}

/// A command must not get lost: the job would wait for it for ever.
fn tell(commands: &mpsc::SyncSender<Command>, command: Command) -> Result<(), WorkerError> {
    commands.try_send(command).map_err(|error| WorkerError::Failed {
        message: format!("the data thread takes no command: {error}"),
        exit_code: Kind::Internal.exit_code(),
    })
}

fn aborted(snapshot: &v1::WatchResponse) -> WorkerError {
    let cause = snapshot.cause.clone().unwrap_or_default();
    WorkerError::Aborted { message: cause.message, exit_code: u8::try_from(cause.exit_code).unwrap_or(1) }
}
