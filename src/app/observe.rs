//! The ports at which a coordinator lets itself be looked at, beside the one of the contract.

use std::net::SocketAddr;

use crate::coordinator::Coordinator;
use crate::rpc::{Health, Listener, ServeError, Token, serve_health};
use crate::tasks::Tasks;
use crate::web::serve_web;

/// Where they are; port 0 stands for any free one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ObservePlaces {
    /// `grpc.health.v1`, in plain text.
    pub health: Option<SocketAddr>,
    /// The status page and what Prometheus scrapes.
    pub http: Option<SocketAddr>,
}

/// Ports that are held.
#[derive(Debug)]
pub(super) struct Observers {
    health: Option<Health>,
    http: Option<Listener>,
}

impl Observers {
    /// Takes the ports and says where they are. Health is served from now on; who asks for the page waits.
    pub(super) async fn bind(places: ObservePlaces, note: fn(&str), tasks: &mut Tasks) -> Result<Self, ServeError> {
        let mut health = None;
        if let Some(address) = places.health {
            let listener = Listener::bind(address).await?;
            note(&format!("health checks at {}", listener.address()));
            health = Some(serve_health(listener, tasks)?);
        }
        let mut http = None;
        if let Some(address) = places.http {
            let listener = Listener::bind(address).await?;
            note(&format!("status page at http://{}/", listener.address()));
            http = Some(listener);
        }
        Ok(Self { health, http })
    }

    /// The coordinator is there and its port is served.
    pub(super) fn follow(self, coordinator: &Coordinator, token: &Token, tasks: &mut Tasks) {
        if let Some(health) = self.health {
            health.follow(coordinator.clone());
        }
        if let Some(listener) = self.http {
            serve_web(coordinator.clone(), token.clone(), listener, tasks);
        }
    }
}
