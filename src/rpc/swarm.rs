//! Ranks that say what ranks say and do nothing, many in one process: what a coordinator is measured with.
//!
//! Owns: joining, renewing, and the barrier that a load is for its coordinator. Refuses to know: what is done with the times.

use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::Streaming;
use weightcast_proto::{PROTOCOL_VERSION, v1};

use super::auth::{Token, TokenError};
use super::client::{Clients, ConnectError, describe_status, patient_request};
use crate::error::{Classify, Kind};

/// Of every call: on a machine that is full of ranks an answer takes long.
const DEADLINE: Duration = Duration::from_secs(300);
/// Ranks that connect at the same time, so that no queue of a listener overflows.
const CONNECTING: usize = 64;

/// The swarm could not do its part.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SwarmError {
    /// No connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// No token.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// A call was refused, or a watch broke.
    #[error("rank {rank}: {message}")]
    Refused {
        /// The rank.
        rank: u32,
        /// What the coordinator said.
        message: String,
    },
}

impl Classify for SwarmError {
    fn kind(&self) -> Kind {
        match self {
            Self::Connect(source) => source.kind(),
            Self::Token(source) => source.kind(),
            Self::Refused { .. } => Kind::Unavailable,
        }
    }
}

/// Times of a swarm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SwarmTimes {
    /// From the first connection until every rank knows that the generation is formed, and who its peers are.
    pub formed: Duration,
    /// From the arrival of the last rank at a barrier until every rank knows that all have arrived.
    pub barrier: Duration,
    /// From the first arrival at it until then: all ranks arrive at once.
    pub arrivals: Duration,
}

/// A rank that is connected.
struct Rank {
    number: u32,
    clients: Clients,
    token: Token,
    member: String,
    snapshots: Streaming<v1::WatchResponse>,
}

/// Has `ranks` ranks join the coordinator at `address`, renew their leases twice a second, and pass one barrier; then calls
/// `measured` while they still renew, and ends them after that.
///
/// # Errors
/// [`SwarmError`] of the first rank that fails.
pub async fn swarm<R>(
    address: &str,
    token: &Token,
    ranks: u32,
    measured: impl AsyncFnOnce(SwarmTimes) -> R,
) -> Result<R, SwarmError> {
    let start = crate::clock::now();
    let gate = std::sync::Arc::new(tokio::sync::Semaphore::new(CONNECTING));
    let mut joining = JoinSet::new();
    for number in 0..ranks {
        let (address, token, gate) = (address.to_owned(), token.clone(), gate.clone());
        joining.spawn(async move {
            let _turn = gate.acquire().await;
            Rank::join(&address, token, number, ranks).await
        });
    }
    let joined = all(joining).await?;
    let (over, ends) = watch::channel(());
    let mut renewing = JoinSet::new();
    let mut forming = JoinSet::new();
    for rank in joined {
        renewing.spawn(renew(rank.clients.clone(), rank.token.clone(), rank.member.clone(), ends.clone()));
        forming.spawn(rank.until(v1::Phase::Loading));
    }
    let mut formed_ranks = all(forming).await?;
    let formed = start.elapsed();

    let arriving = crate::clock::now();
    let last = formed_ranks.pop();
    let mut reporting = JoinSet::new();
    for (rank, generation) in formed_ranks {
        reporting.spawn(rank.report(generation));
    }
    let mut released = JoinSet::new();
    for rank in all(reporting).await? {
        released.spawn(rank.until(v1::Phase::Holding));
    }
    let barrier = crate::clock::now();
    if let Some((rank, generation)) = last {
        let rank = rank.report(generation).await?;
        released.spawn(rank.until(v1::Phase::Holding));
    }
    let _watching = all(released).await?;
    let times = SwarmTimes { formed, barrier: barrier.elapsed(), arrivals: arriving.elapsed() };
    let result = measured(times).await;
    drop(over);
    renewing.shutdown().await;
    Ok(result)
}

async fn all<T: 'static>(mut tasks: JoinSet<Result<T, SwarmError>>) -> Result<Vec<T>, SwarmError> {
    let mut results = Vec::with_capacity(tasks.len());
    while let Some(done) = tasks.join_next().await {
        match done {
            Ok(result) => results.push(result?),
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }
    Ok(results)
}

async fn renew(mut clients: Clients, token: Token, member_id: String, mut over: watch::Receiver<()>) {
    let mut ticks = tokio::time::interval(crate::membership::RENEW_INTERVAL);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            _ = over.changed() => return,
        }
        let progress = Some(v1::Progress { stage: "holding".to_owned(), ..v1::Progress::default() });
        let renew = v1::RenewRequest { member_id: member_id.clone(), progress };
        if let Ok(request) = patient_request(&token, renew, DEADLINE) {
            // The next one makes it good.
            let _ = clients.worker.renew(request).await;
        }
    }
}

impl Rank {
    async fn join(address: &str, token: Token, number: u32, world: u32) -> Result<Self, SwarmError> {
        let mut clients = Clients::connect(address, None).await?;
        let join = v1::JoinRequest {
            request_id: format!("swarm-{number}"),
            rank: number,
            world_size: world,
            host: format!("host-{}", number / 8),
            process_id: number,
            // Nobody connects to it.
            data_address: format!("10.{}.{}.{}:29600", number >> 16, (number >> 8) & 255, number & 255),
            protocol_version: PROTOCOL_VERSION,
            device: "cpu".to_owned(),
            nccl_version: String::new(),
            nccl_unique_id: Vec::new(),
            holds_generation: 0,
        };
        let refused = |status: tonic::Status| SwarmError::Refused { rank: number, message: describe_status(&status) };
        let request = patient_request(&token, join, DEADLINE)?;
        let member = clients.worker.join(request).await.map_err(refused)?.into_inner().member_id;
        let mut request = tonic::Request::new(v1::WatchRequest { member_id: member.clone(), save_request: 0 });
        request.metadata_mut().insert("authorization", token.header()?);
        let snapshots = clients.worker.watch(request).await.map_err(refused)?.into_inner();
        Ok(Self { number, clients, token, member, snapshots })
    }

    /// Until the job is in `phase`; with the generation.
    async fn until(mut self, phase: v1::Phase) -> Result<(Self, u64), SwarmError> {
        let failed = |rank: u32, message: String| SwarmError::Refused { rank, message };
        loop {
            let message = self.snapshots.message().await;
            let message = message.map_err(|status| failed(self.number, describe_status(&status)))?;
            let Some(snapshot) = message else {
                return Err(failed(self.number, "its watch has ended".to_owned()));
            };
            if snapshot.phase() == v1::Phase::Aborted {
                let cause = snapshot.cause.unwrap_or_default();
                return Err(failed(self.number, format!("the job was aborted: {}", cause.message)));
            }
            if snapshot.phase() == phase {
                let generation = snapshot.header.map_or(0, |header| header.generation);
                return Ok((self, generation));
            }
        }
    }

    async fn report(mut self, generation: u64) -> Result<Self, SwarmError> {
        let report = v1::ReportLoadedRequest {
            request_id: format!("{}-loaded", self.member),
            member_id: self.member.clone(),
            generation,
            report_json: String::new(),
        };
        let request = patient_request(&self.token, report, DEADLINE)?;
        let answer = self.clients.worker.report_loaded(request).await;
        answer.map_err(|status| SwarmError::Refused { rank: self.number, message: describe_status(&status) })?;
        Ok(self)
    }
}
