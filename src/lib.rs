//! Weightcast loads a large model onto many ranks for training: it reads every byte once, quantizes once, sends each rank
//! the packed bytes that it keeps, and checkpoints all ranks as one.
//!
//! The modules form rings, and imports go downward only; docs/ARCHITECTURE.md draws them and `tests/tidy.rs` checks them.

pub mod app;
pub mod bench;
pub mod checkpoint;
pub mod cli;
pub mod clock;
pub mod comm;
pub mod config;
pub mod coordinator;
pub mod device;
pub mod error;
pub mod faults;
pub mod format;
pub mod hub;
pub mod load;
pub mod manifest;
pub mod membership;
pub mod model;
pub mod plan;
pub mod quant;
pub mod rpc;
pub mod state;
pub mod store;
pub mod tasks;
pub mod types;
pub mod worker;
