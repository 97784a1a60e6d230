//! Single calls to the coordinator: with the token, a deadline, and refusals in words.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::time::Duration;

use tonic::Streaming;
use weightcast_proto::v1;

use super::{WorkerConfig, WorkerError};
use crate::error::{Kind, chain};
use crate::rpc::{Clients, ConnectError, MEMBER, SHORT_CONNECT_TIMEOUT, describe_status, is_stale, kind_of, request};

/// Between tries to reach the coordinator.
pub(super) const RETRY_DELAY: Duration = Duration::from_millis(200);
/// How long finding the coordinator, joining and opening the watch may take at one try.
pub(super) const ENTER_DEADLINE: Duration = Duration::from_secs(3);

/// A rank that has joined for the first time.
pub(super) struct Entered {
    pub(super) clients: Clients,
    pub(super) member: Joined,
    pub(super) join: v1::JoinRequest,
    pub(super) data_ip: IpAddr,
}

/// A rank's membership, as the coordinator granted it.
pub(super) struct Joined {
    pub(super) id: String,
    pub(super) renew_interval: Duration,
    /// How long the job waits for a rank that was lost; zero when it does not.
    pub(super) rejoin: Duration,
}

pub(super) async fn send_join(
    clients: &mut Clients,
    config: &WorkerConfig,
    join: &v1::JoinRequest,
) -> Result<Joined, WorkerError> {
    crate::faults::point("worker.join");
    let joined = clients.worker.join(request(&config.token, join.clone())?).await.map_err(refused(config, "join"))?;
    crate::faults::point("worker.joined");
    let v1::JoinResponse { member_id: id, renew_interval_ms, rejoin_ms, .. } = joined.into_inner();
    let milliseconds = |number: u32| Duration::from_millis(u64::from(number));
    Ok(Joined { id, renew_interval: milliseconds(renew_interval_ms.max(10)), rejoin: milliseconds(rejoin_ms) })
}

pub(super) fn refused(config: &WorkerConfig, action: &'static str) -> impl Fn(tonic::Status) -> WorkerError + use<> {
    let rank = config.rank.0;
    move |status| match is_stale(&status) {
        true => WorkerError::Stale { rank, message: describe_status(&status) },
        false => WorkerError::Refused { rank, action, message: describe_status(&status), kind: kind_of(&status) },
    }
}

/// Asks for an orderly end, with a checkpoint if the job can write one and has none.
pub(super) async fn drain(clients: &mut Clients, config: &WorkerConfig, member: &str) -> Result<(), String> {
    let request_id = format!("drain-{}-{:x}", config.rank, crate::clock::unix_ns());
    let message = v1::DrainRequest { request_id, save: true };
    let mut message = request(&config.token, message).map_err(|error| chain(&error))?;
    let member = member.parse().map_err(|_| format!("member id {member:?} fits in no header"))?;
    message.metadata_mut().insert(MEMBER, member);
    match clients.job.drain(message).await {
        // A job that is over needs no request to end.
        Err(status) if kind_of(&status) != Kind::Fenced => Err(describe_status(&status)),
        Ok(_) | Err(_) => Ok(()),
    }
}

/// Connects, joins and opens the watch. All of it may be repeated with the same join; what takes too long is tried again on another
/// connection.
pub(super) async fn enter(
    config: &WorkerConfig,
    join: &v1::JoinRequest,
) -> Result<(Clients, Joined, Streaming<v1::WatchResponse>), WorkerError> {
    let entering = async {
        let mut clients = connect(config).await?;
        let (member, snapshots) = join_and_watch(&mut clients, config, join).await?;
        Ok((clients, member, snapshots))
    };
    tokio::time::timeout(ENTER_DEADLINE, entering).await.unwrap_or_else(|_| Err(no_answer(config)))
}

/// Clients of the coordinator, or an error to try again after.
pub(super) async fn connect(config: &WorkerConfig) -> Result<Clients, WorkerError> {
    Ok(Clients::connect_within(SHORT_CONNECT_TIMEOUT, &config.coordinator, config.tls.as_ref()).await?)
}

/// The coordinator did not answer within [`ENTER_DEADLINE`].
pub(super) fn no_answer(config: &WorkerConfig) -> WorkerError {
    let reason = format!("no answer within {:.1} s", ENTER_DEADLINE.as_secs_f64());
    ConnectError::Unreachable { address: config.coordinator.clone(), reason }.into()
}

/// Joins and opens the watch. A coordinator that does not know who has just joined was started again in between: then the
/// error is one to try again after, as if it had been away.
pub(super) async fn join_and_watch(
    clients: &mut Clients,
    config: &WorkerConfig,
    join: &v1::JoinRequest,
) -> Result<(Joined, Streaming<v1::WatchResponse>), WorkerError> {
    let member = send_join(clients, config, join).await?;
    let snapshots = open_watch(clients, config, (&member.id, 0)).await.map_err(|status| {
        match refused(config, "watch")(status) {
            WorkerError::Stale { rank, message } => {
                WorkerError::Refused { rank, action: "watch", message, kind: Kind::Unavailable }
            }
            error => error,
        }
    })?;
    Ok((member, snapshots))
}

/// A watch has no deadline: keepalive ends it when the coordinator is gone. The member says which request for a checkpoint it has
/// seen.
pub(super) async fn open_watch(
    clients: &mut Clients,
    config: &WorkerConfig,
    (member, save_request): (&str, u64),
) -> Result<Streaming<v1::WatchResponse>, tonic::Status> {
    let mut message = tonic::Request::new(v1::WatchRequest { member_id: member.to_owned(), save_request });
    let header = config.token.header().map_err(|error| tonic::Status::unauthenticated(error.to_string()))?;
    message.metadata_mut().insert("authorization", header);
    Ok(clients.worker.watch(message).await?.into_inner())
}

/// This host's address on the way to the coordinator, which is on the network that its peers are on too.
pub(super) async fn ip_towards(coordinator: &str) -> std::io::Result<IpAddr> {
    let mut addresses = tokio::net::lookup_host(coordinator).await?;
    let no_address = || std::io::Error::new(std::io::ErrorKind::NotFound, format!("{coordinator} has no address"));
    let peer = addresses.next().ok_or_else(no_address)?;
    let any: IpAddr = if peer.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    // Connecting a datagram socket chooses a route and sends nothing.
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(peer)?;
    Ok(socket.local_addr()?.ip())
}
