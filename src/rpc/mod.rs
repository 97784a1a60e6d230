//! gRPC: the only module that names proto types. It translates between the contract and the coordinator's events.
//!
//! Owns: servers and clients of `weightcast.v1`, health, reflection, tokens and roles, TLS, limits, the mapping of errors to
//! status codes.
//! Refuses to know: what a job does.

mod accept;
mod auth;
mod client;
mod connect;
mod convert;
mod count;
mod gate;
mod health;
mod job;
mod limits;
mod lines;
mod reflection;
mod server;
mod status;
mod swarm;
mod validate;
mod worker;

pub use auth::{Access, Token, TokenError};
pub use client::{
    Clients, ConnectError, MEMBER, ProcessEnded, SHORT_CONNECT_TIMEOUT, WATCH_SILENCE, describe_status,
    lasting_request, patient_request, request,
};
pub(crate) use convert::{figures as rank_figures, training as training_progress};
pub use health::{Health, serve_health};
pub use lines::LineReport;
pub use server::{Listener, Security, ServeError, serve};
pub use status::{is_stale, kind_of, status};
pub use swarm::{SwarmError, SwarmTimes, swarm};
