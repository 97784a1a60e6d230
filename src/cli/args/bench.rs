//! The flags of `weightcast bench`.

use std::path::PathBuf;

use clap::{Subcommand, ValueEnum};

use super::parse_strategy;
use crate::plan::Strategy;

/// `weightcast bench …`
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// A whole load in real processes, and its stages alone
    Load {
        /// Where the generated model is, or will be made
        #[arg(long, value_name = "DIR")]
        directory: PathBuf,
        /// Parameters of the generated model; 1B are 2 GB
        #[arg(long, default_value = "1B")]
        params: String,
        /// Ranks
        #[arg(long, default_value_t = 4)]
        ranks: u32,
        /// Threads of the reader
        #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
        reader_threads: u32,
        /// Which ranks read: low-memory (rank 0), striped, full
        #[arg(long, value_parser = parse_strategy, default_value = "low-memory")]
        strategy: Strategy,
        /// Load to the host (cpu), or to a CUDA device beside the page-locked copy (cuda)
        #[arg(long, value_enum, default_value_t)]
        device: BenchDevice,
    },
    /// Quantizing on one core, or on a CUDA device
    Quantize {
        /// Quantize on the processor (cpu), or on a CUDA device against the processor's bytes (cuda)
        #[arg(long, value_enum, default_value_t)]
        device: BenchDevice,
    },
    /// NCCL with one rank on a CUDA device; the library's path is in NCCL_LIBRARY, unless the dynamic linker finds it
    Nccl,
    /// Broadcast and scatter over TCP
    Collective {
        /// Ranks
        #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(2..=64))]
        ranks: u32,
    },
    /// Ranks that do nothing but talk to one coordinator: until they are formed, through a barrier, and its memory
    Coordinator {
        /// Where a small model and the coordinator's state go
        #[arg(long, value_name = "DIR")]
        directory: PathBuf,
        /// Numbers of ranks
        #[arg(long, value_delimiter = ',', default_value = "10,100,1000,2000,5000,10000", value_parser = clap::value_parser!(u32).range(2..=65_536))]
        ranks: Vec<u32>,
    },
    /// The time that training stands still for a checkpoint
    Stall {
        /// Where to write
        #[arg(long, value_name = "DIR")]
        directory: PathBuf,
        /// Size of the state in MiB
        #[arg(long, default_value_t = 512)]
        mib: u64,
    },
    /// Writing a checkpoint
    Checkpoint {
        /// Where to write
        #[arg(long, value_name = "DIR")]
        directory: PathBuf,
        /// Writers
        #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
        ranks: u32,
        /// Size in MiB
        #[arg(long, default_value_t = 2048)]
        mib: u64,
    },
}

/// What a benchmark runs on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum BenchDevice {
    /// The processor and host memory.
    #[default]
    Cpu,
    /// CUDA device 0.
    Cuda,
}
