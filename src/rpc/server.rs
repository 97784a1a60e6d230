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
use super::count::CountCalls;
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

/// A port that is held, and not served yet.
#[derive(Debug)]
pub struct Listener {
    listener: TcpListener,
    address: SocketAddr,
}

impl Listener {
    /// Binds `address`; port 0 stands for any free one.
    ///
    /// # Errors
    /// [`ServeError`] when the port cannot be had.
    pub async fn bind(address: SocketAddr) -> Result<Self, ServeError> {
        let failed = |source| ServeError { address, source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        Ok(Self { listener, address })
    }

    /// Where it listens, with the port that was bound.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// The port itself.
    #[must_use]
    pub fn into_inner(self) -> TcpListener {
        self.listener
    }
}

/// Serves the coordinator within `tasks`.
pub fn serve(coordinator: Coordinator, token: Token, listener: Listener, tasks: &mut Tasks) {
    let count = CountCalls(coordinator.calls().clone());
    let worker = WorkerServiceServer::new(WorkerServer { coordinator: coordinator.clone() })
        .max_decoding_message_size(MAX_MESSAGE_BYTES);
    let job = JobServiceServer::new(JobServer { coordinator });
    let (job_token, reflection_token) = (token.clone(), token.clone());
    let reflection = super::reflection::of_contract();
    let server = Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .tcp_nodelay(true)
        .layer(count)
        .add_service(InterceptedService::new(worker, move |request| token.check(request)))
        .add_service(InterceptedService::new(job, move |request| job_token.check(request)))
        .add_service(InterceptedService::new(reflection, move |request| reflection_token.check(request)));
    tasks.spawn("rpc server", async move {
        if let Err(error) = server.serve_with_incoming(TcpListenerStream::new(listener.listener)).await {
            tracing::error!(%error, "the gRPC server ended");
        }
    });
}

/// Refuses a call without a deadline: a caller that waits for ever is a hang that nobody sees.
pub(super) fn expect_deadline<T>(request: &Request<T>) -> Result<(), Status> {
    if request.metadata().contains_key("grpc-timeout") {
        Ok(())
    } else {
        Err(Status::invalid_argument("no deadline: expected grpc-timeout"))
    }
}
