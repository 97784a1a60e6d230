//! Clients of the contract: a channel, the token, and a deadline on every call.

use std::time::Duration;

use tonic::Request;
use tonic::transport::{Channel, Endpoint};
use weightcast_proto::v1;
use weightcast_proto::v1::job_service_client::JobServiceClient;
use weightcast_proto::v1::worker_service_client::WorkerServiceClient;

use super::auth::{Token, TokenError};
use super::connect::TlsConnector;
use crate::error::{Classify, Kind};
use crate::tls::Tls;

/// How long a connection may take to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The same for those who try again at once: where packets were lost a new connection comes through sooner than the old one's
/// next attempt, which the kernel makes after 1, 2, 4 s and so on.
pub const SHORT_CONNECT_TIMEOUT: Duration = Duration::from_millis(1500);
/// The deadline of a call.
const CALL_DEADLINE: Duration = Duration::from_secs(20);
/// HTTP/2 pings while a call is open, and how long an answer to them may take: a watch on a dead coordinator ends.
const KEEPALIVE: Duration = Duration::from_secs(2);
/// After this long without an answer to a ping a watch is broken.
pub const WATCH_SILENCE: Duration = Duration::from_secs(3);

/// Metadata with the member that asks for the end of its job.
pub const MEMBER: &str = "weightcast-member";

/// The coordinator cannot be reached.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The address is none.
    #[error("coordinator address {address:?}: {source}")]
    Address {
        /// The address.
        address: String,
        /// What is wrong.
        source: tonic::transport::Error,
    },
    /// Nobody answers.
    #[error("coordinator at {address} cannot be reached: {reason}")]
    Unreachable {
        /// The address.
        address: String,
        /// Why, with all sources.
        reason: String,
    },
    /// One side does not believe the other's certificate, or speaks no TLS.
    #[error("coordinator at {address}: TLS: {reason}")]
    Tls {
        /// The address.
        address: String,
        /// Whose certificate, and why.
        reason: String,
    },
    /// The token cannot be read.
    #[error(transparent)]
    Token(#[from] TokenError),
}

impl Classify for ConnectError {
    fn kind(&self) -> Kind {
        match self {
            Self::Address { .. } | Self::Tls { .. } => Kind::Conflict,
            Self::Unreachable { .. } => Kind::Unavailable,
            Self::Token(source) => source.kind(),
        }
    }
}

/// Clients on one channel.
#[derive(Clone, Debug)]
pub struct Clients {
    /// What ranks say.
    pub worker: WorkerServiceClient<Channel>,
    /// What people ask.
    pub job: JobServiceClient<Channel>,
}

impl Clients {
    /// Connects to the coordinator at `host:port`, with TLS where there are certificates.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub async fn connect(address: &str, tls: Option<&Tls>) -> Result<Self, ConnectError> {
        Self::connect_within(CONNECT_TIMEOUT, address, tls).await
    }

    /// As [`Self::connect`], with a time of its own for the connection.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub async fn connect_within(limit: Duration, address: &str, tls: Option<&Tls>) -> Result<Self, ConnectError> {
        let bad = |source| ConnectError::Address { address: address.to_owned(), source };
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .map_err(bad)?
            .connect_timeout(limit)
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(WATCH_SILENCE)
            .tcp_nodelay(true);
        let unreachable = |error: tonic::transport::Error| ConnectError::Unreachable {
            address: address.to_owned(),
            reason: crate::error::chain(&error),
        };
        let channel = match tls {
            None => endpoint.connect().await.map_err(unreachable)?,
            Some(tls) => {
                let connector = TlsConnector::new(tls.clone(), address);
                let connected = endpoint.connect_with_connector(connector.clone()).await;
                connected.map_err(|error| match connector.failure() {
                    Some(reason) => ConnectError::Tls { address: address.to_owned(), reason },
                    None => unreachable(error),
                })?
            }
        };
        Ok(Self { worker: WorkerServiceClient::new(channel.clone()), job: JobServiceClient::new(channel) })
    }
}

/// A rank's process that ended with failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessEnded {
    /// The rank.
    pub rank: u32,
    /// Its process.
    pub process_id: u32,
    /// Its exit code, 128 + n for a signal.
    pub exit_code: u8,
    /// Whether its launcher starts it again.
    pub will_restart: bool,
    /// How it ended, in words.
    pub message: String,
}

impl Clients {
    /// Tells of a rank's process that ended with failure; whether the coordinator took it.
    pub async fn report_process_ended(&mut self, token: &Token, ended: ProcessEnded) -> bool {
        let ProcessEnded { rank, process_id, exit_code, will_restart, message } = ended;
        let request_id = format!("ended-{rank}-{:x}", crate::clock::unix_ns());
        let exit_code = u32::from(exit_code);
        let report = v1::ReportProcessEndedRequest { request_id, rank, message, exit_code, process_id, will_restart };
        match request(token, report) {
            Ok(report) => self.job.report_process_ended(report).await.is_ok(),
            Err(_) => false,
        }
    }
}

/// A request with the job's token and a deadline.
///
/// # Errors
/// [`TokenError`] when the token cannot be read.
pub fn request<T>(token: &Token, message: T) -> Result<Request<T>, TokenError> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", token.header()?);
    request.set_timeout(CALL_DEADLINE);
    Ok(request)
}

/// As [`request`], for an answer that may take as long as `deadline`.
///
/// # Errors
/// As [`request`].
pub fn patient_request<T>(token: &Token, message: T, deadline: Duration) -> Result<Request<T>, TokenError> {
    let mut request = request(token, message)?;
    request.set_timeout(deadline);
    Ok(request)
}

/// A request for a stream, which lasts as long as there is something to say.
///
/// # Errors
/// As [`request`].
pub fn lasting_request<T>(token: &Token, message: T) -> Result<Request<T>, TokenError> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", token.header()?);
    Ok(request)
}

/// A status in words.
#[must_use]
pub fn describe_status(status: &tonic::Status) -> String {
    match status.message() {
        "" => status.code().to_string(),
        // What a client without certificates sees of a coordinator that has some.
        message if message.starts_with("h2 protocol error") => {
            format!("{message}; if the coordinator speaks TLS, so must we: --tls-cert, --tls-key, --tls-ca")
        }
        message => message.to_owned(),
    }
}
