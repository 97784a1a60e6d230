//! Adapters as PEFT writes them: configuration, names of tensors, the arithmetic of merging.
//!
//! Owns: `adapter_config.json` of PEFT 0.21, its rule of which modules an adapter is on, the names of an adapter's tensors,
//! their first values, and merging on slices of f32.
//! Refuses to know: files, checkpoints, devices, training.
//!
//! Invariants:
//! - `AD-1`: a configuration that asks for anything beyond LoRA, rsLoRA and DoRA on linear layers is refused by name of the
//!   field; fields that change nothing are kept and written back.
//! - `AD-2`: the first values depend on seed, module and element alone, so every rank makes the same.
//!
//! Source of the rules: peft 0.21, `tuners/tuners_utils.py`, `tuners/lora/layer.py`, `tuners/lora/dora.py`.

mod check;
mod config;
mod error;
mod init;
mod loaded;
mod merge;
mod names;
mod python_json;
mod target;

pub use config::{AdapterConfig, MAX_RANK, TargetModules};
pub use error::{AdapterError, TensorMismatch};
pub use init::{initial_a, row_norms};
pub use loaded::{AdapterTensor, LoadedAdapter, LoadedModule, MAX_NAMED_TENSORS};
pub use merge::{LowRank, Matrix, Orientation, merge};
pub use names::{AdapterPart, adapter_name, lora_a_name, lora_b_name, magnitude_name, parse_name};
pub use target::{LinearModule, Target, linears, scale};

#[cfg(test)]
mod tests;
