//! The coordinator's HTTP port: the status page, its live updates, and what Prometheus scrapes. It reads and never changes
//! anything.
//!
//! Owns: the HTTP server and its limits, the page, who may see what. Refuses to know: what a job does, and the contract.
//!
//! - `WB-1`: on a loopback address everything is open, but only to requests that name this host, so that a web site cannot have
//!   a browser ask for it under a name of its own. On another address the page and its data need the job's token; `/metrics`
//!   does not.
//! - `WB-2`: connections, streams and the time that a request may take are bounded; none keeps the job from ending.

mod access;
mod follow;
mod measure;
mod page;
mod routes;
mod snapshot;

use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use crate::coordinator::Coordinator;
use crate::rpc::{Listener, Token};
use crate::tasks::Tasks;
use access::Access;
use routes::Shared;

/// Connections at a time; more wait to be accepted. A browser opens six at most.
const MAX_CONNECTIONS: usize = 128;
/// Browsers that may follow the page at a time.
const MAX_VIEWERS: usize = 32;
/// How long a client may take to send the head of a request.
const HEAD_DEADLINE: Duration = Duration::from_secs(10);
/// After a connection could not be accepted: the usual reason is too many open files, which takes time to pass.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Serves the page of `coordinator` within `tasks`; `token` is asked for where other hosts can reach the port.
pub fn serve_web(coordinator: Coordinator, token: Token, listener: Listener, tasks: &mut Tasks) {
    let access = Access::new(listener.address(), token);
    let viewers = Arc::new(Semaphore::new(MAX_VIEWERS));
    let (publisher, snapshots) = watch::channel(Arc::<str>::from(""));
    let shared = Arc::new(Shared { coordinator: coordinator.clone(), access, viewers, snapshots });
    tasks.spawn("status page", follow::follow(coordinator, publisher));
    tasks.spawn("http server", accept(listener.into_inner(), routes::router(shared)));
}

/// Serves connections until it is dropped, and they with it.
async fn accept(listener: TcpListener, router: axum::Router) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        // The semaphore is never closed.
        let Ok(permit) = room.clone().acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let router = router.clone();
        connections.spawn(async move {
            let _permit = permit;
            serve_connection(stream, router).await;
        });
        while connections.try_join_next().is_some() {}
    }
}

async fn serve_connection(stream: TcpStream, router: axum::Router) {
    // Small answers should leave at once; without it they leave a little later.
    let _ = stream.set_nodelay(true);
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_DEADLINE)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    if let Err(error) = served.await {
        // A browser that went away.
        tracing::debug!(%error, "a connection ended");
    }
}
