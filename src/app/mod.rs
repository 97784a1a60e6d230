//! Use cases: what the commands do, put together from the flows.
//!
//! Owns: resolving a model, preparing a job, launching it, the demo. Refuses to know: flags and how results are printed.

mod coordinate;
pub mod demo;
mod join;
mod launch;
mod new_model;
mod prepare;
mod running;
mod source;
mod train;

pub use coordinate::{CoordinateError, Coordinated, CoordinatorPlace, coordinate};
pub use join::{CoordinatorAddress, join};
pub use launch::{Audience, LaunchJob, LaunchJobError, Launched, launch};
pub use new_model::{NewModelError, new_model};
pub use prepare::{PrepareError, Prepared, prepare, prepare_with};
pub use running::{RunFile, RunFileError};
pub use source::{ModelSource, SourceError, open_model};
