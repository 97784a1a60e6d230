//! gRPC: the only module that names proto types. It translates between the contract and the coordinator's events.
//!
//! Owns: servers and clients of `weightcast.v1`, the token check, the mapping of errors to status codes.
//! Refuses to know: what a job does.

mod auth;
mod client;
mod convert;
mod job;
mod server;
mod status;
mod swarm;
mod worker;

pub use auth::{Token, TokenError};
pub use client::{Clients, ConnectError, WATCH_SILENCE, describe_status, patient_request, request};
pub(crate) use convert::training as training_progress;
pub use server::{Listener, ServeError, serve};
pub use status::{kind_of, status};
pub use swarm::{SwarmError, SwarmTimes, swarm};
