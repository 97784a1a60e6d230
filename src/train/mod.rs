//! Training on the shards that the ranks hold: LoRA adapters over a frozen, quantized, sharded base, or all weights.
//!
//! Owns: the loop over steps, the gathering of the base block by block, the trained parameters with AdamW's state cut over
//! the ranks, evaluation, and the snapshots that are written while training goes on.
//! Refuses to know: how weights were loaded, RPC, the coordinator; who runs it passes requests and news through
//! [`Control`].
//!
//! Invariants:
//! - `TR-1`: every rank makes the same collective calls in the same order, whatever samples it has.
//! - `TR-2`: what a step computes is a function of recipe, base, state and step number; nothing else is random. So a run
//!   that goes on from a checkpoint on as many ranks has the same bits as one that was never ended.
//! - `TR-3`: a snapshot is of one step boundary on all ranks; what is trained meanwhile does not touch it.

mod adamw;
mod base;
mod config;
mod control;
mod engine;
mod error;
mod exchange;
mod parameters;
mod probe;
mod report;
mod retention;
mod run;
mod snapshot;
mod stall;
mod state;
mod steps;
mod stream;
mod table;

pub use config::{
    CheckpointRecipe, EvaluationRecipe, LayerSet, LoraRecipe, Method, OptimizerRecipe, Recipe, Targets, TrainedLayers,
};
pub use control::{CheckpointTally, Control, Grant, News};
pub use error::TrainError;
pub(crate) use probe::{Gradients, Probe, Wanted};
pub use retention::{Policy, keeps};
pub use run::{Ended, TrainRequest, train};
pub(crate) use stall::stalls;
pub(crate) use steps::tokens;
pub use table::{Trained, is_trainable, trained_tensors};
