//! Finding the coordinator: at the beginning, when it was away, and when the job has lost ranks and those that live join again.
//!
//! Owns: how long it is looked for, and what is said meanwhile. Refuses to know: what the coordinator's snapshots ask for.

use std::net::IpAddr;
use std::time::Duration;

use tokio::time::timeout;
use tonic::Streaming;
use weightcast_proto::{PROTOCOL_VERSION, v1};

use super::calls::{
    ENTER_DEADLINE, Entered, RETRY_DELAY, connect, enter, ip_towards, join_and_watch, no_answer, open_watch, refused,
};
use super::data::{Command, Outcome};
use super::leaving::Leaving;
use super::plane::Offer;
use super::session::{DataLine, Session};
use super::{WorkerConfig, WorkerError};
use crate::clock::{Instant, now};
use crate::comm::tcp::TcpPort;
use crate::error::{Kind, chain};
use crate::rpc::ConnectError;
use crate::types::Generation;

/// What is waited for is said after the first failure, and then this often.
const REMINDER: Duration = Duration::from_secs(15);
/// How long the data thread may take to leave a generation: it looks for a cancellation every 50 ms, and may be in the middle of a
/// write to a slow disk.
const IDLE_DEADLINE: Duration = Duration::from_secs(60);

type Snapshots = Streaming<v1::WatchResponse>;

/// A search for the coordinator, and what is said of it.
struct Search {
    began: Instant,
    next_reminder: Duration,
}

impl Search {
    fn new() -> Self {
        Self { began: now(), next_reminder: Duration::ZERO }
    }

    /// Waits a moment and says what for; false when `limit` is over.
    async fn goes_on(&mut self, config: &WorkerConfig, reason: &str, limit: Duration) -> bool {
        let waited = self.began.elapsed();
        if waited >= limit {
            return false;
        }
        if waited >= self.next_reminder {
            self.next_reminder = waited + REMINDER;
            tracing::warn!(coordinator = config.coordinator, reason, "waiting for the coordinator");
        }
        tokio::time::sleep(RETRY_DELAY).await;
        true
    }
}

impl Session {
    /// Connects, joins and opens the watch; the coordinator may still be starting, or start again, and its name may not be known
    /// yet. Nothing when this rank is asked to end before it has joined.
    pub(super) async fn begin(
        config: WorkerConfig,
        offer: &Offer,
        leaving: &Leaving,
    ) -> Result<Option<(Self, TcpPort, Snapshots)>, WorkerError> {
        let mut search = Search::new();
        let data_ip = loop {
            match data_ip(&config).await {
                Ok(ip) => break ip,
                Err(error)
                    if leaving.is_asked()
                        || !search.goes_on(&config, &error.to_string(), config.join_deadline).await =>
                {
                    return match leaving.is_asked() {
                        true => Ok(None),
                        false => Err(error),
                    };
                }
                Err(_) => {}
            }
        };
        let port = TcpPort::bind(data_ip)?;
        let join = join_request(&config, &port, offer, Generation::default());
        let (clients, member, snapshots) = loop {
            match enter(&config, &join).await {
                Ok(entered) => break entered,
                Err(_) if leaving.is_asked() => return Ok(None),
                Err(error)
                    if error.is_transient()
                        && search.goes_on(&config, &chain(&error), first_limit(&config, &error)).await => {}
                Err(error) => return Err(error),
            }
        };
        let session = Self::new(config, offer, leaving, Entered { clients, member, join, data_ip });
        Ok(Some((session, port, snapshots)))
    }

    /// Opens the watch again after it broke, and says again what a restarted coordinator cannot know.
    pub(super) async fn reconnect(&mut self, reason: &str) -> Result<Snapshots, WorkerError> {
        tracing::warn!(reason, "the watch on the coordinator broke");
        let mut search = Search::new();
        let mut reason = reason.to_owned();
        while search.goes_on(&self.config, &reason, self.patience()).await {
            match timeout(ENTER_DEADLINE, self.rejoin()).await.unwrap_or_else(|_| Err(no_answer(&self.config))) {
                Ok(snapshots) => {
                    tracing::info!("the coordinator is back");
                    return Ok(snapshots);
                }
                Err(error) if error.is_transient() => reason = chain(&error),
                Err(error) => return Err(error),
            }
        }
        let (address, seconds) = (self.config.coordinator.clone(), search.began.elapsed().as_secs());
        Err(WorkerError::CoordinatorLost { address, seconds, reason })
    }

    /// How long the coordinator may be away. A host that is being taken away has no time to wait.
    fn patience(&self) -> Duration {
        let least = self.config.coordinator_deadline;
        if self.leaving.is_asked() { least } else { least.max(self.rejoin) }
    }

    async fn rejoin(&mut self) -> Result<Snapshots, WorkerError> {
        self.clients = connect(&self.config).await?;
        let member = self.member.borrow().clone();
        let opened = open_watch(&mut self.clients, &self.config, (&member, self.save_request)).await;
        let snapshots = match opened.map_err(refused(&self.config, "watch")) {
            // Before its generation was formed, a rank is known to nobody but the coordinator that has gone.
            Err(WorkerError::Stale { .. }) if self.generation == 0 => {
                let (member, snapshots) = join_and_watch(&mut self.clients, &self.config, &self.join).await?;
                let _ = self.member.send(member.id);
                snapshots
            }
            opened => opened?,
        };
        match self.report_again().await {
            // Of a job that is over: its ranks are told of the next one.
            Err(WorkerError::Refused { kind: Kind::Fenced, .. }) => {}
            // Of a generation before this one.
            Err(WorkerError::Stale { .. }) if !self.rejoins() => {}
            told => told?,
        }
        if self.leaving.is_asked() {
            // The signal came once; whether the last coordinator heard of it is not known.
            self.leaving.tell(&self.config).await;
        }
        Ok(snapshots)
    }

    /// Leaves the generation and joins again: the job has lost this rank or others, and goes on in another generation when all are
    /// there. What was loaded stays where it is. Nothing when this rank is asked to end.
    pub(super) async fn regroup(
        &mut self,
        reason: &str,
        data: &mut DataLine,
    ) -> Result<Option<Snapshots>, WorkerError> {
        tracing::warn!(rank = self.config.rank.0, generation = self.generation, reason, "joining again");
        let holds = self.leave_generation(reason, data).await?;
        let mut search = Search::new();
        loop {
            if self.leaving.is_asked() {
                return Ok(None);
            }
            self.join.holds_generation = holds.0;
            let reason = match enter(&self.config, &self.join).await {
                Ok((clients, member, snapshots)) => {
                    tracing::info!(rank = self.config.rank.0, holds = holds.0, "joined again");
                    self.begin_anew(clients, member);
                    return Ok(Some(snapshots));
                }
                // The job is over: everybody is told how.
                Err(WorkerError::Refused { kind: Kind::Fenced, message, .. }) => match self.watch_the_end().await {
                    Ok(snapshots) => return Ok(Some(snapshots)),
                    Err(_) => message,
                },
                Err(error) if error.is_transient() => chain(&error),
                Err(error) => return Err(error),
            };
            if !search.goes_on(&self.config, &reason, self.patience()).await {
                let (address, seconds) = (self.config.coordinator.clone(), search.began.elapsed().as_secs());
                return Err(WorkerError::CoordinatorLost { address, seconds, reason });
            }
        }
    }

    async fn watch_the_end(&mut self) -> Result<Snapshots, WorkerError> {
        self.clients = connect(&self.config).await?;
        let member = self.member.borrow().clone();
        open_watch(&mut self.clients, &self.config, (&member, 0)).await.map_err(refused(&self.config, "watch"))
    }

    /// Ends what the data thread does, and gives it a port that the generation's peers do not know. The generation whose load is
    /// still here comes back.
    async fn leave_generation(&mut self, reason: &str, data: &mut DataLine) -> Result<Generation, WorkerError> {
        let failed = |message: String| WorkerError::Failed { message, exit_code: Kind::Internal.exit_code() };
        self.watched.borrow().abort(reason);
        let port = TcpPort::bind(self.data_ip)?;
        self.offer.renew();
        self.join = join_request(&self.config, &port, &self.offer, Generation::default());
        let watched = self.watched.borrow().renewed();
        let command = Command::Regroup(port, watched.clone());
        data.commands
            .try_send(command)
            .map_err(|error| failed(format!("the data thread takes no command: {error}")))?;
        let idle = async {
            while let Some(outcome) = data.outcomes.recv().await {
                if let Outcome::Regrouped(holds) = outcome {
                    return Ok(holds);
                }
            }
            Err(failed("the data thread ended by itself".to_owned()))
        };
        let seconds = IDLE_DEADLINE.as_secs();
        let late = |_| Err(failed(format!("the data thread did not leave its generation within {seconds} s")));
        let holds = timeout(IDLE_DEADLINE, idle).await.unwrap_or_else(late)?;
        let _ = self.watched.send(watched);
        Ok(holds)
    }
}

/// How long a rank goes on after this error at the beginning. A coordinator that is not there yet may still be placed; one that refuses
/// is waited for no longer than a rotation of certificates, or the lease of a process before this one, takes.
fn first_limit(config: &WorkerConfig, error: &WorkerError) -> Duration {
    match error {
        WorkerError::Connect(ConnectError::Unreachable { .. }) => config.join_deadline,
        _ => config.coordinator_deadline,
    }
}

/// The address that the data plane listens on: as told, else this host's on the way to the coordinator.
async fn data_ip(config: &WorkerConfig) -> Result<IpAddr, WorkerError> {
    let system = |source| WorkerError::System { what: "finding this host's address for the data plane", source };
    match config.data_ip {
        Some(ip) => Ok(ip),
        None => ip_towards(&config.coordinator).await.map_err(system),
    }
}

fn join_request(config: &WorkerConfig, port: &TcpPort, offer: &Offer, holds: Generation) -> v1::JoinRequest {
    v1::JoinRequest {
        request_id: format!("{}-{:x}", std::process::id(), crate::clock::unix_ns()),
        rank: config.rank.0,
        world_size: config.world.get(),
        host: config.host.clone(),
        process_id: std::process::id(),
        data_address: port.address().to_string(),
        protocol_version: PROTOCOL_VERSION,
        device: offer.device_words(),
        nccl_version: offer.nccl_version(),
        nccl_unique_id: offer.nccl_unique_id(),
        holds_generation: holds.0,
    }
}
