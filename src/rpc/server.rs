//! Serving the contract on a port.

use std::net::SocketAddr;

use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;
use tonic::{Code, Request, Status};
use weightcast_proto::v1::job_service_server::JobServiceServer;
use weightcast_proto::v1::worker_service_server::WorkerServiceServer;

use super::accept::{QUEUE, accept};
use super::auth::Access;
use super::count::CountCalls;
use super::gate::{BySize, Gate};
use super::job::JobServer;
use super::limits::{
    KEEPALIVE, KEEPALIVE_TIMEOUT, MAX_HEADER_BYTES, MAX_LARGE_MESSAGE_BYTES, MAX_MESSAGE_BYTES, MAX_PENDING_RESETS,
    MAX_STREAMS,
};
use super::status::refused;
use super::worker::WorkerServer;
use crate::coordinator::Coordinator;
use crate::error::{Classify, Kind};
use crate::tasks::Tasks;
use crate::tls::Tls;

/// Who may call, and how connections are encrypted.
#[derive(Clone, Debug)]
pub struct Security {
    /// The tokens.
    pub access: Access,
    /// The certificates; none means that calls are not encrypted.
    pub tls: Option<Tls>,
}

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
pub fn serve(coordinator: Coordinator, security: Security, listener: Listener, tasks: &mut Tasks) {
    let Security { access, tls } = security;
    let count = CountCalls(coordinator.calls().clone());
    let worker = WorkerServiceServer::new(WorkerServer { coordinator: coordinator.clone() });
    let worker = BySize::new(
        worker.clone().max_decoding_message_size(MAX_MESSAGE_BYTES),
        worker.max_decoding_message_size(MAX_LARGE_MESSAGE_BYTES),
        &["ReportSaved", "ReportLoaded"],
    );
    let job = JobServiceServer::new(JobServer { coordinator }).max_decoding_message_size(MAX_MESSAGE_BYTES);
    let server = Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .http2_max_header_list_size(MAX_HEADER_BYTES)
        .http2_max_pending_accept_reset_streams(Some(MAX_PENDING_RESETS))
        .max_concurrent_streams(MAX_STREAMS)
        .layer(count)
        .add_service(Gate::new(worker, access.clone()))
        .add_service(Gate::new(super::reflection::of_contract(), access.clone()))
        .add_service(Gate::new(job, access));
    let (served, arrivals) = mpsc::channel(QUEUE);
    tasks.spawn("rpc listener", accept(listener.listener, tls, served));
    tasks.spawn("rpc server", async move {
        if let Err(error) = server.serve_with_incoming(ReceiverStream::new(arrivals)).await {
            tracing::error!(%error, "the gRPC server ended");
        }
    });
}

/// Refuses a call without a deadline: a caller that waits for ever is a hang that nobody sees.
pub(super) fn expect_deadline<T>(request: &Request<T>) -> Result<(), Status> {
    if request.metadata().contains_key("grpc-timeout") {
        Ok(())
    } else {
        Err(refused(Code::InvalidArgument, "deadline-missing", "no deadline: expected grpc-timeout"))
    }
}
