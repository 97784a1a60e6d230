//! gRPC: the only module that names proto types. It translates between the contract and the coordinator's events.
//!
//! Owns: servers and clients of `weightcast.v1`, health, reflection, the token check, the mapping of errors to status codes.
//! Refuses to know: what a job does.

mod auth;
mod client;
mod convert;
mod count;
mod health;
mod job;
mod reflection;
mod server;
mod status;
mod worker;

pub use auth::{Token, TokenError};
pub use client::{Clients, ConnectError, WATCH_SILENCE, describe_status, patient_request, request};
pub(crate) use convert::{figures as rank_figures, training as training_progress};
pub use health::{Health, serve_health};
pub use server::{Listener, ServeError, serve};
pub use status::{kind_of, status};
