//! Weightcast loads a large model onto many ranks for training: it reads every byte once, quantizes once, sends each rank
//! the packed bytes that it keeps, and checkpoints all ranks as one.
//!
//! The modules form rings, and imports go downward only; docs/ARCHITECTURE.md draws them and `tests/tidy.rs` checks them.

pub mod adapter;
pub mod app;
pub mod bench;
pub mod cache;
pub mod checkpoint;
pub mod cli;
pub mod clock;
pub mod comm;
pub mod config;
pub mod coordinator;
pub mod data;
pub mod device;
pub mod error;
pub mod estimate;
pub mod faults;
pub mod format;
pub mod hub;
pub mod k8s;
pub mod load;
pub mod manifest;
pub mod membership;
pub mod metrics;
pub mod model;
pub mod nn;
pub mod plan;
pub mod quant;
pub mod recipe;
pub mod rpc;
pub mod state;
pub mod store;
pub mod tasks;
pub mod telemetry;
pub mod tls;
pub mod train;
pub mod types;
pub mod web;
pub mod worker;
