//! Serving the contract on a port.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Server;
use tonic::{Request, Status};
use weightcast_proto::v1::job_service_server::JobServiceServer;
use weightcast_proto::v1::worker_service_server::WorkerServiceServer;

use super::auth::Token;
use super::job::JobServer;
use super::worker::WorkerServer;
use crate::coordinator::Coordinator;
use crate::error::{Classify, Kind};
use crate::tasks::Tasks;

/// HTTP/2 pings find dead connections; liveness of ranks is the lease's business.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// Receipts name every chunk of a rank: 200 bytes each, so this is room for 300,000.
const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// The server cannot start.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address}: {source}")]
pub struct ServeError {
    /// Where.
    pub address: SocketAddr,
    /// The system's error.
    pub source: std::io::Error,
}

impl Classify for ServeError {
    fn kind(&self) -> Kind {
        Kind::Conflict
    }
}

/// A server that runs.
#[derive(Clone, Copy, Debug)]
pub struct Served {
    /// The address that it listens on; the port is the bound one.
    pub address: SocketAddr,
}

/// Binds `address` (port 0 for any free one) and serves the coordinator there within `tasks`.
///
/// # Errors
/// [`ServeError`] when the port cannot be had.
pub async fn serve(
    coordinator: Coordinator,
    token: Token,
    address: SocketAddr,
    tasks: &mut Tasks,
) -> Result<Served, ServeError> {
    let failed = |source| ServeError { address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    let worker = WorkerServiceServer::new(WorkerServer { coordinator: coordinator.clone() })
        .max_decoding_message_size(MAX_MESSAGE_BYTES);
    let job = JobServiceServer::new(JobServer { coordinator });
    let job_token = token.clone();
    let server = Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .tcp_nodelay(true)
        .add_service(InterceptedService::new(worker, move |request| token.check(request)))
        .add_service(InterceptedService::new(job, move |request| job_token.check(request)));
    tasks.spawn("rpc server", async move {
        if let Err(error) = server.serve_with_incoming(TcpListenerStream::new(listener)).await {
            tracing::error!(%error, "the gRPC server ended");
        }
    });
    Ok(Served { address: bound })
}

/// Refuses a call without a deadline: a caller that waits for ever is a hang that nobody sees.
pub(super) fn expect_deadline<T>(request: &Request<T>) -> Result<(), Status> {
    if request.metadata().contains_key("grpc-timeout") {
        Ok(())
    } else {
        Err(Status::invalid_argument("no deadline: expected grpc-timeout"))
    }
}
