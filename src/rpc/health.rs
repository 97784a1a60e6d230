//! `grpc.health.v1` on a port of its own, in plain text and without a token, because the probes of a kubelet have neither.
//!
//! Owns: what each service means. `startup` serves once the journal is open, the plan made and the port of the contract bound;
//! `readiness` while ranks can join or are being served, so not while the job drains or when it is over; `liveness`, which is
//! also the service without a name, while the coordinator's owner answers. Before there is an owner liveness serves, because
//! a process that plans would plan again after a restart. Refuses to know: who asks.
//!
//! `HE-1`: liveness is an answer of the owner, not older than [`PROBE_INTERVAL`] and [`PROBE_DEADLINE`] together.
//! `HE-2`: health has a thread of its own, so that it can say that the others are stuck.

use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;
use tonic_health::ServingStatus;
use tonic_health::server::{HealthReporter, health_reporter};

use super::reflection;
use super::server::{Listener, ServeError};
use crate::coordinator::Coordinator;
use crate::error::chain;
use crate::tasks::{Tasks, spawn_thread};

/// How often the owner is asked.
const PROBE_INTERVAL: Duration = Duration::from_millis(250);
/// An owner that takes longer than this is stuck: an event takes it microseconds, and the end of a job one synced file.
const PROBE_DEADLINE: Duration = Duration::from_secs(2);

const STARTUP: &str = "startup";
const READINESS: &str = "readiness";
/// The second name is what a client asks for that names no service.
const LIVENESS: [&str; 2] = ["liveness", ""];

/// The health of a coordinator that is starting.
#[derive(Debug)]
pub struct Health {
    started: oneshot::Sender<Coordinator>,
}

/// Serves the health of a coordinator that is starting, until `tasks` end.
///
/// # Errors
/// [`ServeError`] when there is no thread for it.
pub fn serve_health(listener: Listener, tasks: &mut Tasks) -> Result<Health, ServeError> {
    let address = listener.address();
    let failed = |source| ServeError { address, source };
    let port = listener.into_inner().into_std().map_err(failed)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    let (started, coordinator) = oneshot::channel();
    let (held, ended) = oneshot::channel::<()>();
    spawn_thread("health", move || {
        runtime.block_on(async {
            tokio::select! {
                () = serve(port, coordinator) => {}
                _ = ended => {}
            }
        });
    })
    .map_err(failed)?;
    tasks.spawn("health", async move {
        let _held = held;
        std::future::pending::<()>().await;
    });
    Ok(Health { started })
}

impl Health {
    /// The start is done; from now on the owner and the job are looked at.
    pub fn follow(self, coordinator: Coordinator) {
        // A health server that has ended has said why.
        let _ = self.started.send(coordinator);
    }
}

async fn serve(port: std::net::TcpListener, coordinator: oneshot::Receiver<Coordinator>) {
    let (reporter, service) = health_reporter();
    let said = Said { reporter, ready: false, live: true };
    for name in [STARTUP, READINESS] {
        said.say(name, false).await;
    }
    for name in LIVENESS {
        said.say(name, true).await;
    }
    let server = Server::builder().add_service(service).add_service(reflection::of_health());
    let served = async {
        let port = TcpListener::from_std(port).map_err(|error| chain(&error))?;
        server.serve_with_incoming(TcpListenerStream::new(port)).await.map_err(|error| chain(&error))
    };
    tokio::select! {
        served = served => if let Err(error) = served {
            tracing::error!(error, "the health server ended");
        },
        () = look(said, coordinator) => {}
    }
}

/// Looks at the owner and at the job, once there are any.
async fn look(mut said: Said, coordinator: oneshot::Receiver<Coordinator>) {
    // A start that failed ends the process.
    let Ok(coordinator) = coordinator.await else { return std::future::pending().await };
    said.say(STARTUP, true).await;
    let mut ticks = tokio::time::interval(PROBE_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let live = coordinator.answers(PROBE_DEADLINE).await;
        let (open, over) = {
            let views = coordinator.views();
            let view = views.borrow();
            (!view.is_draining && !view.is_over(), view.is_over())
        };
        if !live && !over && said.live {
            tracing::error!(deadline = ?PROBE_DEADLINE, "the coordinator's owner does not answer");
        }
        said.tell(live && open, live).await;
    }
}

/// What was said last.
struct Said {
    reporter: HealthReporter,
    ready: bool,
    live: bool,
}

impl Said {
    /// Says what has changed; who watches hears each change once.
    async fn tell(&mut self, ready: bool, live: bool) {
        if self.ready != ready {
            self.say(READINESS, ready).await;
        }
        if self.live != live {
            for name in LIVENESS {
                self.say(name, live).await;
            }
        }
        (self.ready, self.live) = (ready, live);
    }

    async fn say(&self, service: &str, serves: bool) {
        let status = if serves { ServingStatus::Serving } else { ServingStatus::NotServing };
        self.reporter.set_service_status(service, status).await;
    }
}
