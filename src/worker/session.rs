//! The session with the coordinator: follow the snapshots, have the data thread do what they say, report.
//!
//! Refuses to know: how the coordinator is found again (`joining`), leases (`renewing`), signals (`leaving`).

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use tokio::sync::{mpsc as async_mpsc, watch};
use tonic::Streaming;
use weightcast_proto::v1;

use super::calls::{Entered, Joined, refused};
use super::data::{Command, DataThread, Failure, LoadCommand, Outcome, SaveCommand, Watched};
use super::leaving::Leaving;
use super::plane::{Meeting, Offer};
use super::reports::Reported;
use super::{WorkerConfig, WorkerError};
use crate::comm::Group;
use crate::error::Kind;
use crate::membership::Blame;
use crate::plan::{LoadPlan, PLAN_VERSION};
use crate::rpc::{Clients, describe_status, kind_of, request};
use crate::tasks::{Tasks, spawn_thread, survive_file_size_limit};
use crate::train::Grant;
use crate::types::{Attempt, Generation, Step, unpack_addresses};

/// After a failure of its own a rank waits this long for the coordinator to name the cause, which may be another rank.
const CAUSE_DEADLINE: Duration = Duration::from_secs(2);
/// A rank that ends because of another one lets it end first: the launcher takes the first process that fails for the
/// root cause.
const CULPRIT_FIRST: Duration = Duration::from_millis(200);
/// The word on a failure is not waited for longer than this: where it does not come through, the rank is lost anyway.
const REPORT_DEADLINE: Duration = Duration::from_secs(3);
/// Commands that wait for the data thread. There is one load and one save, and a save more each time that a coordinator is
/// started again meanwhile.
const COMMANDS: usize = 64;

/// Runs one rank until the job ends.
///
/// # Errors
/// [`WorkerError`], whose exit code the process ends with.
pub async fn run(config: WorkerConfig) -> Result<Ended, WorkerError> {
    survive_file_size_limit().map_err(|source| WorkerError::System { what: "handling SIGXFSZ", source })?;
    let mut tasks = Tasks::new();
    let leaving = Leaving::on_signals(&config, &mut tasks)?;
    let offer = Offer::look(&config)?;
    let Some((mut session, port, mut snapshots)) = Session::begin(config, &offer, &leaving).await? else {
        return Ok(Ended::Preempted);
    };
    let (commands, work) = mpsc::sync_channel(COMMANDS);
    let (report, outcomes) = async_mpsc::channel(1);
    let data = DataThread { port: Some(port), watched: session.watched.borrow().clone(), offer, held: None };
    spawn_thread("data", move || data.run(&work, &report))
        .map_err(|source| WorkerError::System { what: "starting the data thread", source })?;
    session.start_renewing(&mut tasks);
    let result = session.follow(&mut snapshots, &mut DataLine { commands, outcomes }).await;
    session.watched.borrow().abort("the session ended");
    tasks.shut_down(Duration::from_millis(200)).await;
    result
}

/// How a rank ended without failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The job is done.
    Finished,
    /// The job, or this rank alone, was asked to end because a host is being taken away, and did so in an orderly way.
    Preempted,
}

/// The line to the data thread.
pub(super) struct DataLine {
    pub(super) commands: mpsc::SyncSender<Command>,
    pub(super) outcomes: async_mpsc::Receiver<Outcome>,
}

pub(super) struct Session {
    pub(super) config: WorkerConfig,
    pub(super) clients: Clients,
    pub(super) join: v1::JoinRequest,
    pub(super) data_ip: IpAddr,
    pub(super) offer: Offer,
    pub(super) member: watch::Sender<String>,
    /// Of the generation at hand.
    pub(super) watched: watch::Sender<Watched>,
    pub(super) renew_interval: Duration,
    /// How long the job waits for a rank that was lost; zero when it does not.
    pub(super) rejoin: Duration,
    pub(super) stage: watch::Sender<&'static str>,
    pub(super) training: bool,
    saving: Option<(u64, u64)>,
    /// Models that were let go.
    unloaded: BTreeSet<String>,
    /// 0 until one is formed.
    pub(super) generation: u64,
    /// The newest request for a checkpoint that was seen in it.
    pub(super) save_request: u64,
    /// To be said again to a coordinator that was restarted.
    pub(super) reported: Reported,
    pub(super) leaving: Leaving,
    /// The last member whose renewal was refused because it is none any more.
    pub(super) fenced: watch::Sender<String>,
}

/// What follows from something that happened.
enum Turn {
    GoOn,
    Ended(Ended),
    Failed(Failure),
    /// The watch is broken.
    Broken(String),
}

impl Session {
    /// As it stands when the rank has joined and no generation is formed yet.
    pub(super) fn new(config: WorkerConfig, offer: &Offer, leaving: &Leaving, entered: Entered) -> Self {
        let Entered { clients, member, join, data_ip } = entered;
        Self {
            config,
            clients,
            renew_interval: member.renew_interval,
            rejoin: member.rejoin,
            join,
            data_ip,
            offer: offer.clone(),
            member: watch::Sender::new(member.id),
            watched: watch::Sender::new(Watched::default()),
            stage: watch::Sender::new("joining"),
            training: false,
            saving: None,
            unloaded: BTreeSet::new(),
            generation: 0,
            save_request: 0,
            reported: Reported::default(),
            leaving: leaving.clone(),
            fenced: watch::Sender::default(),
        }
    }

    async fn follow(
        &mut self,
        snapshots: &mut Streaming<v1::WatchResponse>,
        data: &mut DataLine,
    ) -> Result<Ended, WorkerError> {
        self.leaving.member_is(self.member.subscribe());
        loop {
            let (mut fenced, left) = (self.fenced.subscribe(), self.leaving.clone());
            let own = self.member.borrow().clone();
            // Cancel safe: a stream, a receiver and a watch lose nothing when another branch wins.
            let turn = tokio::select! {
                message = snapshots.message() => match message {
                    Ok(Some(snapshot)) => self.act(&snapshot, &data.commands).await,
                    Ok(None) => Ok(Turn::Broken("it ended the watch".to_owned())),
                    Err(status) => match refused(&self.config, "watch")(status) {
                        error @ WorkerError::Stale { .. } => Err(error),
                        error => Ok(Turn::Broken(error.to_string())),
                    },
                },
                outcome = data.outcomes.recv() => match outcome {
                    Some(Outcome::Failed(failure)) => Ok(Turn::Failed(failure)),
                    // A coordinator that is away is not the end: it is told again when it is back.
                    Some(outcome) => self.report(outcome).await.map(|()| Turn::GoOn),
                    None => {
                        let message = "the data thread ended by itself".to_owned();
                        Ok(Turn::Failed(Failure { message, exit_code: Kind::Internal.exit_code(), blame: Blame::Own }))
                    }
                },
                // Not of a member that this rank was before.
                Ok(_) = fenced.wait_for(|member| *member == own), if self.rejoins() => {
                    Err(WorkerError::Stale { rank: self.config.rank.0, message: "its lease has ended".to_owned() })
                }
                // With no generation there is nothing to be saved.
                () = left.left(), if self.generation == 0 => Ok(Turn::Ended(Ended::Preempted)),
            };
            let turn = match turn {
                Err(error) if error.is_transient() => Ok(Turn::Broken(error.to_string())),
                turn => turn,
            };
            let lost = match turn {
                Ok(Turn::GoOn) => continue,
                Ok(Turn::Ended(ended)) => return Ok(ended),
                Ok(Turn::Broken(reason)) => match self.reconnect(&reason).await {
                    Ok(again) => {
                        *snapshots = again;
                        continue;
                    }
                    Err(error) => error,
                },
                Ok(Turn::Failed(failure)) => self.fail(failure, snapshots).await,
                Err(error) => error,
            };
            match lost {
                WorkerError::Stale { message, .. } if self.rejoins() => match self.regroup(&message, data).await? {
                    Some(again) => *snapshots = again,
                    None => return Ok(Ended::Preempted),
                },
                error => return Err(error),
            }
        }
    }

    /// Whether the job goes on when it has lost ranks, with those that join again.
    pub(super) fn rejoins(&self) -> bool {
        !self.rejoin.is_zero()
    }

    /// Does what a snapshot says, if it has not been done (`WK-1`).
    async fn act(
        &mut self,
        snapshot: &v1::WatchResponse,
        commands: &mpsc::SyncSender<Command>,
    ) -> Result<Turn, WorkerError> {
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
                let control = self.watched.borrow().control.clone();
                if snapshot.stop {
                    control.stop();
                }
                self.save_request = self.save_request.max(snapshot.save_request);
                control.request_save(snapshot.save_request);
                control.saves(granted, snapshot.committed_step.map(Step));
                if !self.training {
                    self.training = true;
                    let _ = self.stage.send("training");
                    tell(commands, Command::Train(root))?;
                }
            }
            v1::Phase::Finished => {
                crate::faults::point("worker.finished");
                let preempted = snapshot.preempted || self.leaving.is_asked();
                return Ok(Turn::Ended(if preempted { Ended::Preempted } else { Ended::Finished }));
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
        Ok(Turn::GoOn)
    }

    /// Nothing was done in it yet.
    fn begin_generation(&mut self, generation: u64) {
        self.generation = generation;
        (self.training, self.saving, self.reported) = (false, None, Reported::default());
        self.save_request = 0;
        self.unloaded.clear();
        self.watched.borrow().control.reset();
    }

    /// Back to where a rank is that has just joined.
    pub(super) fn begin_anew(&mut self, clients: Clients, member: Joined) {
        (self.generation, self.training, self.saving) = (0, false, None);
        self.reported = Reported::default();
        self.unloaded.clear();
        (self.clients, self.renew_interval, self.rejoin) = (clients, member.renew_interval, member.rejoin);
        let _ = self.stage.send("joining");
        let _ = self.member.send(member.id);
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
        let peers = unpack_addresses(&snapshot.peers).map_err(|error| bad(error.to_string()))?;
        let group = Group { rank: self.config.rank, world: self.config.world };
        let (generation, nccl_unique_id) = (Generation(self.generation), snapshot.nccl_unique_id.clone());
        let root = self.config.checkpoint_root.as_ref().and_then(|root| stored_in(root, &plan));
        let tls = self.config.tls.clone();
        let meeting = Meeting { group, generation, secret, peers, tls, nccl_unique_id };
        Ok(LoadCommand {
            plan,
            root,
            base_id: snapshot.base_id.clone(),
            keeps_base: snapshot.keep_base,
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
    /// taken for the culprit. Where ranks may come back, one that lost others joins again.
    async fn fail(&mut self, failure: Failure, snapshots: &mut Streaming<v1::WatchResponse>) -> WorkerError {
        let rejoins = self.rejoins();
        // NCCL does not say which rank has gone. That rank, its launcher or its lease will.
        if failure.blame == Blame::Unknown
            && !rejoins
            && let Some(cause) = cause_from(snapshots).await
        {
            return cause;
        }
        let lost_peer = match failure.blame {
            Blame::Peer(rank) => Some(rank),
            Blame::Own | Blame::Unknown => None,
        };
        let message = v1::ReportFailedRequest {
            request_id: format!("{}-{:x}", *self.member.borrow(), crate::clock::unix_ns()),
            member_id: self.member.borrow().clone(),
            generation: self.generation,
            message: failure.message.clone(),
            exit_code: u32::from(failure.exit_code),
            lost_peer: lost_peer.map(|rank| rank.0),
            lost_contact: rejoins && failure.blame == Blame::Unknown,
        };
        if let Ok(mut message) = request(&self.config.token, message) {
            message.set_timeout(REPORT_DEADLINE);
            let _ = self.clients.worker.report_failed(message).await;
        }
        let own = WorkerError::Failed { message: failure.message.clone(), exit_code: failure.exit_code };
        match failure.blame {
            Blame::Own => own,
            _ if rejoins => WorkerError::Stale { rank: self.config.rank.0, message: failure.message },
            Blame::Unknown => own,
            Blame::Peer(_) => cause_from(snapshots).await.unwrap_or(own),
        }
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
