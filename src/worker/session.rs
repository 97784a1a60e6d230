//! The session with the coordinator: join, renew, follow the snapshots, report.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc as async_mpsc;
use tonic::Streaming;
use weightcast_proto::{PROTOCOL_VERSION, v1};

use super::WorkerConfig;
use super::data::{Command, DataThread, Failure, LoadCommand, Outcome, Watched};
use super::plane::{Meeting, Offer};
use super::proc_stat::peak_resident_bytes;
use crate::comm::tcp::TcpPort;
use crate::comm::{CommError, Group};
use crate::device::DeviceError;
use crate::error::{Classify, Kind, chain};
use crate::plan::{LoadPlan, PLAN_VERSION};
use crate::rpc::{Clients, ConnectError, TokenError, describe_status, kind_of, request};
use crate::tasks::{Tasks, spawn_thread};
use crate::types::{Generation, Step};

/// After a failure of its own a rank waits this long for the coordinator to name the cause, which may be another rank.
const CAUSE_DEADLINE: Duration = Duration::from_secs(2);
/// A rank that ends because of another one lets it end first: the launcher takes the first process that fails for the
/// root cause.
const CULPRIT_FIRST: Duration = Duration::from_millis(200);
/// Between tries to reach the coordinator.
const RETRY_DELAY: Duration = Duration::from_millis(200);

/// Why a worker ends with failure.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorkerError {
    /// The coordinator cannot be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The token cannot be read.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The coordinator refused a call.
    #[error("the coordinator refused to let rank {rank} {action}: {message}")]
    Refused {
        /// The rank.
        rank: u32,
        /// What was asked.
        action: &'static str,
        /// Its reason.
        message: String,
        /// Its kind.
        kind: Kind,
    },
    /// The coordinator cancelled the job.
    #[error("the job was ended: {message}")]
    Aborted {
        /// The cause.
        message: String,
        /// The exit code of the job.
        exit_code: u8,
    },
    /// This rank failed.
    #[error("{message}")]
    Failed {
        /// What went wrong.
        message: String,
        /// The exit code.
        exit_code: u8,
    },
    /// The coordinator stayed away for longer than it may.
    #[error("the coordinator at {address} has been out of reach for {seconds} s: {reason}")]
    CoordinatorLost {
        /// Its address.
        address: String,
        /// How long.
        seconds: u64,
        /// The last error.
        reason: String,
    },
    /// Something of this host is missing.
    #[error("{what}: {source}")]
    System {
        /// What.
        what: &'static str,
        /// The system's error.
        source: std::io::Error,
    },
    /// The data plane cannot listen.
    #[error(transparent)]
    Comm(#[from] CommError),
    /// There is no device for this rank.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

impl WorkerError {
    /// The exit code of the process.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Aborted { exit_code, .. } | Self::Failed { exit_code, .. } => *exit_code,
            Self::Connect(source) => source.kind().exit_code(),
            Self::Token(source) => source.kind().exit_code(),
            // A rank that is refused will be refused again: wrong token, wrong world, wrong version.
            Self::Refused { kind, .. } if !kind.is_retryable() => Kind::Conflict.exit_code(),
            Self::Refused { kind, .. } => kind.exit_code(),
            Self::CoordinatorLost { .. } => Kind::Unavailable.exit_code(),
            Self::System { .. } => Kind::Internal.exit_code(),
            Self::Comm(source) => source.kind().exit_code(),
            Self::Device(source) => source.kind().exit_code(),
        }
    }
}

/// Runs one rank until the job ends.
///
/// # Errors
/// [`WorkerError`], whose exit code the process ends with.
pub async fn run(config: WorkerConfig) -> Result<Ended, WorkerError> {
    let port = TcpPort::bind(config.data_ip)?;
    let offer = Offer::look(&config)?;
    let mut tasks = Tasks::new();
    let (mut session, mut snapshots) = Session::join(&config, port.address(), &offer).await?;
    let (commands, work) = mpsc::sync_channel(1);
    let (report, mut outcomes) = async_mpsc::channel(1);
    let data = DataThread {
        port: Some(port),
        watched: session.watched.clone(),
        checkpoint_root: config.checkpoint_root.clone(),
        offer,
        held: None,
    };
    spawn_thread("data", move || data.run(&work, &report))
        .map_err(|source| WorkerError::System { what: "starting the data thread", source })?;
    session.start_renewing(&mut tasks);
    let preempted = session.start_draining_on_sigterm(&mut tasks)?;
    let result = session.follow(&mut snapshots, &commands, &mut outcomes).await;
    session.watched.abort("the session ended");
    tasks.shut_down(Duration::from_millis(200)).await;
    result.map(|()| if preempted.load(Ordering::Relaxed) { Ended::Preempted } else { Ended::Finished })
}

/// How a rank ended without failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The job is done.
    Finished,
    /// The job was asked to end by a signal, and ended in an orderly way.
    Preempted,
}

struct Session {
    config: WorkerConfig,
    clients: Clients,
    member: String,
    watched: Watched,
    renew_interval: Duration,
    stage: tokio::sync::watch::Sender<&'static str>,
    loading: bool,
    saving: Option<(u64, u64)>,
    generation: u64,
}

impl Session {
    /// Connects, joins and opens the watch; the coordinator may still be starting.
    async fn join(
        config: &WorkerConfig,
        data_address: SocketAddr,
        offer: &Offer,
    ) -> Result<(Self, Streaming<v1::WatchResponse>), WorkerError> {
        let mut clients = connect(config).await?;
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
        let refused = |action| {
            let rank = config.rank.0;
            move |status: tonic::Status| WorkerError::Refused {
                rank,
                action,
                message: describe_status(&status),
                kind: kind_of(&status),
            }
        };
        let joined = clients.worker.join(request(&config.token, join)?).await.map_err(refused("join"))?.into_inner();
        let watch = v1::WatchRequest { member_id: joined.member_id.clone() };
        let snapshots = open_watch(&mut clients, config, watch).await.map_err(refused("watch"))?;
        let session = Self {
            config: config.clone(),
            clients,
            member: joined.member_id,
            watched: Watched::default(),
            renew_interval: Duration::from_millis(u64::from(joined.renew_interval_ms.max(10))),
            stage: tokio::sync::watch::Sender::new("joining"),
            loading: false,
            saving: None,
            generation: 0,
        };
        Ok((session, snapshots))
    }

    /// Renews the lease for as long as the process lives, whatever the data thread is doing.
    fn start_renewing(&self, tasks: &mut Tasks) {
        let (mut clients, config, member) = (self.clients.clone(), self.config.clone(), self.member.clone());
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
                };
                let renew = v1::RenewRequest { member_id: member.clone(), progress: Some(progress) };
                // A lost renewal is made good by the next one; a lost coordinator is noticed by the watch.
                if let Ok(request) = request(&config.token, renew) {
                    let _ = clients.worker.renew(request).await;
                }
            }
        });
    }

    /// On SIGTERM asks the coordinator to end the job in an orderly way: save what is not saved, then finish. Every rank
    /// may ask; the first one counts. The returned flag says whether it happened.
    fn start_draining_on_sigterm(&self, tasks: &mut Tasks) -> Result<Arc<AtomicBool>, WorkerError> {
        let mut terminate = signal(SignalKind::terminate())
            .map_err(|source| WorkerError::System { what: "handling SIGTERM", source })?;
        let preempted = Arc::new(AtomicBool::new(false));
        let (seen, mut clients, config) = (preempted.clone(), self.clients.clone(), self.config.clone());
        tasks.spawn("drain", async move {
            while terminate.recv().await.is_some() {
                seen.store(true, Ordering::Relaxed);
                let save = config.checkpoint_root.is_some();
                let request_id = format!("drain-{}-{:x}", config.rank, crate::clock::unix_ns());
                let Ok(message) = request(&config.token, v1::DrainRequest { request_id, save }) else { continue };
                if let Err(status) = clients.job.drain(message).await {
                    tracing::warn!(
                        reason = describe_status(&status),
                        "the coordinator did not take the request to end"
                    );
                }
            }
        });
        Ok(preempted)
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
                    Ok(Some(snapshot)) => {
                        if self.act(&snapshot, commands).await? {
                            return Ok(());
                        }
                    }
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
                    Some(outcome) => self.report(outcome).await?,
                    None => {
                        let message = "the data thread ended by itself".to_owned();
                        let exit_code = Kind::Internal.exit_code();
                        return Err(self.fail(Failure { message, exit_code, lost_peer: None }, snapshots).await);
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
            v1::Phase::Loading if !self.loading => {
                self.loading = true;
                self.generation = generation;
                let _ = self.stage.send("loading");
                let plan = self.fetch_plan(&snapshot.plan_sha256).await?;
                let command = self.load_command(plan, snapshot)?;
                let _ = commands.try_send(Command::Load(Box::new(command)));
            }
            v1::Phase::Saving => {
                if let Some(save) = &snapshot.save
                    && self.saving != Some((save.step, save.attempt))
                {
                    self.saving = Some((save.step, save.attempt));
                    let _ = self.stage.send("saving");
                    let directory = save.directory.clone();
                    let _ = commands.try_send(Command::Save { step: Step(save.step), directory });
                }
            }
            v1::Phase::Finished => return Ok(true),
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

    fn load_command(&self, plan: LoadPlan, snapshot: &v1::WatchResponse) -> Result<LoadCommand, WorkerError> {
        let bad = |message: String| WorkerError::Failed { message, exit_code: Kind::Internal.exit_code() };
        let secret = snapshot.secret.as_slice().try_into();
        let secret = secret.map_err(|_| bad(format!("secret: expected 32 bytes, found {}", snapshot.secret.len())))?;
        let peers: Result<Vec<SocketAddr>, _> = snapshot.peers.iter().map(|peer| peer.parse()).collect();
        let peers = peers.map_err(|error| bad(format!("address of a peer: {error}")))?;
        let group = Group { rank: self.config.rank, world: self.config.world };
        let (generation, nccl_unique_id) = (Generation(self.generation), snapshot.nccl_unique_id.clone());
        Ok(LoadCommand { plan, meeting: Meeting { group, generation, secret, peers, nccl_unique_id } })
    }

    /// Gets the plan and checks that it is the one that all ranks have.
    async fn fetch_plan(&mut self, expected: &[u8]) -> Result<LoadPlan, WorkerError> {
        let refused = |status: tonic::Status| WorkerError::Refused {
            rank: self.config.rank.0,
            action: "get the plan",
            message: describe_status(&status),
            kind: kind_of(&status),
        };
        let message = v1::GetPlanRequest { member_id: self.member.clone() };
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

    async fn report(&mut self, outcome: Outcome) -> Result<(), WorkerError> {
        let request_id = format!("{}-{:x}", self.member, crate::clock::unix_ns());
        let (member_id, generation) = (self.member.clone(), self.generation);
        let refused = |action| {
            let rank = self.config.rank.0;
            move |status: tonic::Status| WorkerError::Refused {
                rank,
                action,
                message: describe_status(&status),
                kind: kind_of(&status),
            }
        };
        let _ = self.stage.send("holding");
        match outcome {
            Outcome::Loaded(report) => {
                let report_json = serde_json::to_string(&report).unwrap_or_default();
                let message = v1::ReportLoadedRequest { request_id, member_id, generation, report_json };
                let message = request(&self.config.token, message)?;
                self.clients.worker.report_loaded(message).await.map_err(refused("report its load"))?;
            }
            Outcome::Saved { step, receipt } => {
                let receipt_json = serde_json::to_string(&receipt).unwrap_or_default();
                let attempt = self.saving.map_or(0, |(_, attempt)| attempt);
                let step = step.0;
                let message = v1::ReportSavedRequest { request_id, member_id, generation, step, attempt, receipt_json };
                let message = request(&self.config.token, message)?;
                self.clients.worker.report_saved(message).await.map_err(refused("report its shard"))?;
            }
            Outcome::Failed(_) => {}
        }
        Ok(())
    }

    /// Reports a failure and waits for the coordinator's word on the cause: a rank that only lost its peer must not be
    /// taken for the culprit.
    async fn fail(&mut self, failure: Failure, snapshots: &mut Streaming<v1::WatchResponse>) -> WorkerError {
        let message = v1::ReportFailedRequest {
            request_id: format!("{}-{:x}", self.member, crate::clock::unix_ns()),
            member_id: self.member.clone(),
            generation: self.generation,
            message: failure.message.clone(),
            exit_code: u32::from(failure.exit_code),
            lost_peer: failure.lost_peer.map(|rank| rank.0),
        };
        if let Ok(message) = request(&self.config.token, message) {
            let _ = self.clients.worker.report_failed(message).await;
        }
        let own = WorkerError::Failed { message: failure.message, exit_code: failure.exit_code };
        if failure.lost_peer.is_none() {
            return own;
        }
        let cause = async {
            while let Ok(Some(snapshot)) = snapshots.message().await {
                if snapshot.phase() == v1::Phase::Aborted {
                    return Some(aborted(&snapshot));
                }
            }
            None
        };
        tokio::time::timeout(CAUSE_DEADLINE, cause).await.ok().flatten().unwrap_or(own)
    }

    /// Opens the watch again after it broke; the coordinator may have been restarted.
    async fn reconnect(&mut self, reason: &str) -> Result<Streaming<v1::WatchResponse>, WorkerError> {
        tracing::warn!(reason, "the watch on the coordinator broke");
        let start = crate::clock::now();
        let mut reason = reason.to_owned();
        while start.elapsed() < self.config.coordinator_deadline {
            tokio::time::sleep(RETRY_DELAY).await;
            match Clients::connect(&self.config.coordinator).await {
                Err(error) => reason = chain(&error),
                Ok(mut clients) => {
                    let watch = v1::WatchRequest { member_id: self.member.clone() };
                    match open_watch(&mut clients, &self.config, watch).await {
                        Ok(snapshots) => {
                            self.clients = clients;
                            return Ok(snapshots);
                        }
                        Err(status) => reason = describe_status(&status),
                    }
                }
            }
        }
        let seconds = start.elapsed().as_secs();
        Err(WorkerError::CoordinatorLost { address: self.config.coordinator.clone(), seconds, reason })
    }
}

fn aborted(snapshot: &v1::WatchResponse) -> WorkerError {
    let cause = snapshot.cause.clone().unwrap_or_default();
    WorkerError::Aborted { message: cause.message, exit_code: u8::try_from(cause.exit_code).unwrap_or(1) }
}

/// Connects to a coordinator that may not listen yet.
async fn connect(config: &WorkerConfig) -> Result<Clients, WorkerError> {
    let start = crate::clock::now();
    loop {
        match Clients::connect(&config.coordinator).await {
            Ok(clients) => return Ok(clients),
            Err(error) if error.kind().is_retryable() && start.elapsed() < config.coordinator_deadline => {
                tracing::debug!(error = chain(&error), "waiting for the coordinator");
                tokio::time::sleep(RETRY_DELAY).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// A watch has no deadline: keepalive ends it when the coordinator is gone.
async fn open_watch(
    clients: &mut Clients,
    config: &WorkerConfig,
    watch: v1::WatchRequest,
) -> Result<Streaming<v1::WatchResponse>, tonic::Status> {
    let mut message = tonic::Request::new(watch);
    let header = config.token.header().map_err(|error| tonic::Status::unauthenticated(error.to_string()))?;
    message.metadata_mut().insert("authorization", header);
    Ok(clients.worker.watch(message).await?.into_inner())
}
