//! The flags.

mod bench;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use weightcast_launcher::LaunchArgs;

pub(super) use self::bench::{BenchCommand, BenchDevice};
use super::estimate::EstimateFlags;
use super::quantize::QuantizeFlags;
use crate::app::ObservePlaces;
use crate::config::{JobConfig, ResumePolicy};
use crate::plan::{Placement, Strategy};
use crate::tls::TlsFiles;
use crate::types::{BackendWish, DeviceWish};

/// Loads a large model onto many ranks in low memory, quantized on the way, and checkpoints all ranks as one
#[derive(Debug, Parser)]
#[command(name = "weightcast", version)]
pub struct Arguments {
    /// How log lines look on stderr
    #[arg(long, global = true, value_enum, default_value_t)]
    pub log_format: LogFormat,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people
    #[default]
    Text,
    /// One JSON object a line
    Json,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a job's ranks on this node: a job file (job.toml), a model (--model), or any program as torchrun would
    Launch(Box<LaunchFlags>),
    /// Coordinate one job as a process of its own, which may be started again: for several nodes, and for schedulers
    Coordinator(Box<CoordinatorFlags>),
    /// Be one rank of a job, as the launcher or a scheduler starts it
    Worker(WorkerFlags),
    /// Say what each rank would read and keep, without loading anything; for a model's profile, what it would take on which
    /// devices
    Plan(Box<PlanFlags>),
    /// Look at a model, or make one
    Model {
        /// What to do
        #[command(subcommand)]
        command: super::model::ModelCommand,
    },
    /// Export, merge or look at a LoRA adapter
    Adapter {
        /// What to do
        #[command(subcommand)]
        command: super::adapter::AdapterCommand,
    },
    /// List, inspect, verify and prune checkpoints
    Checkpoint {
        /// What to do
        #[command(subcommand)]
        command: CheckpointCommand,
    },
    /// List, verify and prune the cache of what loads made
    Cache {
        /// What to do
        #[command(subcommand)]
        command: super::cache::CacheCommand,
    },
    /// Kubernetes manifests of a job
    K8s {
        /// What to do
        #[command(subcommand)]
        command: super::k8s::K8sCommand,
    },
    /// Show the ranks of a running job
    Status(StatusFlags),
    /// Show what the ranks of a running job have written
    Logs(super::logs::LogsFlags),
    /// Have a running job write a checkpoint now, and wait until it is committed
    Save(JobFlags),
    /// Have a running job let go one of the models that it holds beside its own
    Unload {
        /// The model's name in the job
        name: String,
        /// Which job.
        #[command(flatten)]
        job: JobFlags,
    },
    /// Queue a job for the ranks of a job that holds; with the same base nothing is read again
    Submit(super::queue::SubmitFlags),
    /// List the jobs of ranks that stay
    Jobs(JobFlags),
    /// Take a queued job back, or end the one that trains at its next step; the ranks stay
    Cancel(super::queue::CancelFlags),
    /// End a running job in an orderly way, with a checkpoint if it has none
    Drain(JobFlags),
    /// Run the main job on a small real model, with a crash in the middle
    Demo(DemoFlags),
    /// Measure, beside the machine's limits
    Bench {
        /// What to measure
        #[command(subcommand)]
        command: BenchCommand,
        /// Print one JSON object a line on stdout
        #[arg(long, global = true)]
        json: bool,
    },
}

/// Mutual TLS.
#[derive(Clone, Debug, Default, PartialEq, Eq, Args)]
#[command(next_help_heading = "TLS")]
pub struct TlsFlags {
    /// This side's certificate and intermediate ones (PEM); read again when it changes
    #[arg(long, value_name = "FILE", env = "WEIGHTCAST_TLS_CERT", requires_all = ["tls_key", "tls_ca"])]
    pub tls_cert: Option<PathBuf>,
    /// Its private key (PEM), which others than owner and group must not be able to read
    #[arg(long, value_name = "FILE", env = "WEIGHTCAST_TLS_KEY", requires_all = ["tls_cert", "tls_ca"])]
    pub tls_key: Option<PathBuf>,
    /// The authorities that sign this job's certificates (PEM); the other side must show one of theirs
    #[arg(long, value_name = "FILE", env = "WEIGHTCAST_TLS_CA", requires_all = ["tls_cert", "tls_key"])]
    pub tls_ca: Option<PathBuf>,
    /// The name in the coordinator's certificate, if it is not the host that it is called by
    #[arg(long, value_name = "NAME", env = "WEIGHTCAST_TLS_SERVER_NAME", requires = "tls_cert")]
    pub tls_server_name: Option<String>,
}

impl TlsFlags {
    /// The files, if TLS is asked for.
    #[must_use]
    pub fn files(self) -> Option<TlsFiles> {
        let Self { tls_cert, tls_key, tls_ca, tls_server_name: server_name } = self;
        let (cert, key, ca) = (tls_cert?, tls_key?, tls_ca?);
        Some(TlsFiles { cert, key, ca, server_name })
    }
}

/// `weightcast worker`
#[derive(Debug, Args)]
pub struct WorkerFlags {
    /// How its connections are encrypted
    #[command(flatten)]
    pub tls: TlsFlags,
}

/// `weightcast launch`
#[derive(Debug, Args)]
pub struct LaunchFlags {
    /// The job, instead of or over a job file
    #[command(flatten)]
    pub job: JobOverrides,
    /// Print the result as JSON on stdout
    #[arg(long)]
    pub json: bool,
    /// Start this node's ranks of the job that `weightcast coordinator` coordinates at this host:port
    #[arg(long, value_name = "ADDRESS", requires = "token_file")]
    pub coordinator: Option<String>,
    /// The token of that job
    #[arg(long, value_name = "PATH", requires = "coordinator")]
    pub token_file: Option<PathBuf>,
    /// How calls and the data plane are encrypted
    #[command(flatten)]
    pub tls: TlsFlags,
    /// Where to look at it.
    #[command(flatten)]
    pub observe: ObserveFlags,
    /// The launcher's flags, and the job file or program
    #[command(flatten)]
    pub launch: LaunchArgs,
}

/// `weightcast coordinator`
#[derive(Debug, Args)]
pub struct CoordinatorFlags {
    /// The number of ranks on all nodes together
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub ranks: u32,
    /// Where to listen; port 0 is any free one, and the one of before after a restart
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0")]
    pub listen: std::net::SocketAddr,
    /// Allow other hosts to talk to it without encryption, on a network that is trusted
    #[arg(long)]
    pub insecure: bool,
    /// Where it keeps what it must know after a restart
    #[arg(long, value_name = "DIR")]
    pub state_dir: PathBuf,
    /// The job's token; made as DIR/token when absent
    #[arg(long, value_name = "PATH")]
    pub token_file: Option<PathBuf>,
    /// The token of those who command the job: save, drain, unload. The job's token is then for ranks and launchers alone
    #[arg(long, value_name = "PATH")]
    pub control_token_file: Option<PathBuf>,
    /// How calls are encrypted
    #[command(flatten)]
    pub tls: TlsFlags,
    /// The job, instead of or over a job file
    #[command(flatten)]
    pub job: JobOverrides,
    /// How long the job waits for ranks that it lost, in seconds; then it goes on from its last checkpoint. With 0 it ends when it
    /// loses one
    #[arg(long, value_name = "SECONDS", env = "WEIGHTCAST_REJOIN_TIMEOUT", default_value_t = 600,
          value_parser = clap::value_parser!(u64).range(..=2_592_000))]
    pub rejoin_timeout: u64,
    /// Where to look at it.
    #[command(flatten)]
    pub observe: ObserveFlags,
    /// Print the result as JSON on stdout
    #[arg(long)]
    pub json: bool,
    /// A job file
    pub job_file: Option<PathBuf>,
}

/// Where a coordinator lets itself be looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Args)]
#[command(next_help_heading = "Looking at it")]
pub struct ObserveFlags {
    /// Serve grpc.health.v1 here in plain text, with the services startup, readiness and liveness; port 0 is any free one
    #[arg(long, value_name = "ADDRESS", env = "WEIGHTCAST_HEALTH_LISTEN")]
    pub health_listen: Option<std::net::SocketAddr>,
    /// Serve the status page and /metrics here; on an address that other hosts reach the page asks for the job's token
    #[arg(long, value_name = "ADDRESS", env = "WEIGHTCAST_HTTP_LISTEN")]
    pub http_listen: Option<std::net::SocketAddr>,
}

impl ObserveFlags {
    /// The places.
    #[must_use]
    pub const fn places(self) -> ObservePlaces {
        ObservePlaces { health: self.health_listen, http: self.http_listen }
    }
}

/// `weightcast plan`
#[derive(Debug, Args)]
pub struct PlanFlags {
    /// The number of ranks; the job file's by default, else 1
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub ranks: Option<u32>,
    /// The job, instead of or over a job file
    #[command(flatten)]
    pub job: JobOverrides,
    /// What to estimate, without files.
    #[command(flatten)]
    pub estimate: EstimateFlags,
    /// Print the plan as JSON on stdout
    #[arg(long)]
    pub json: bool,
    /// A job file, or a model's profile such as llama-2-7b
    pub job_file: Option<PathBuf>,
}

impl PlanFlags {
    /// The number of ranks: as the flag says, else as the job file does.
    pub(super) fn ranks(&self, config: &JobConfig) -> u32 {
        self.ranks.or_else(|| config.job.ranks_per_node.map(std::num::NonZeroU32::get)).unwrap_or(1)
    }
}

/// Flags that stand for entries of a job file.
#[derive(Clone, Debug, Default, PartialEq, Args)]
#[command(next_help_heading = "Job")]
pub struct JobOverrides {
    /// Model directory, file, or hub id (`org/name[@revision]`)
    #[arg(long, value_name = "MODEL")]
    pub model: Option<String>,
    /// The job's name
    #[arg(long, value_name = "NAME")]
    pub job_name: Option<String>,
    /// Which ranks read: low-memory (rank 0), striped, full; streaming (each its part of a layer when it is needed)
    #[arg(long, value_parser = parse_strategy)]
    pub strategy: Option<Strategy>,
    /// What ranks keep: shard, replicate, experts, layers
    #[arg(long, value_parser = parse_placement)]
    pub placement: Option<Placement>,
    /// How it is quantized.
    #[command(flatten)]
    pub quantize: QuantizeFlags,
    /// Type of what is not quantized: auto, float32, float16, bfloat16
    #[arg(long, value_name = "DTYPE")]
    pub dtype: Option<String>,
    /// Threads that read and quantize at a reader
    #[arg(long, value_name = "N")]
    pub reader_threads: Option<u32>,
    /// Host memory that each rank may use, in MiB
    #[arg(long, value_name = "MIB")]
    pub memory_per_rank_mib: Option<u64>,
    /// Where the weights go: auto (CUDA devices if there is one for every rank, else the host), cpu, cuda
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<DeviceWish>,
    /// Let several ranks share a CUDA device when there are fewer devices than ranks
    #[arg(long)]
    pub share_devices: bool,
    /// What moves weights between ranks: auto (NCCL between CUDA devices if it can be loaded, else TCP), nccl, tcp
    #[arg(long, value_name = "BACKEND")]
    pub backend: Option<BackendWish>,
    /// Report the digest of every tensor when the load is done
    #[arg(long)]
    pub digests: bool,
    /// Keep what is made of the weights in this directory, and read from it what was made before [env: WEIGHTCAST_CACHE]
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
    /// What the cache may take, in GiB; 64 by default
    #[arg(long, value_name = "GIB")]
    pub cache_max_gib: Option<u64>,
    /// Where checkpoints are
    #[arg(long, value_name = "DIR")]
    pub checkpoint_dir: Option<PathBuf>,
    /// Write a checkpoint when the load is done
    #[arg(long)]
    pub save: bool,
    /// The step that the checkpoint is of, when the job starts from a model; 0 by default
    #[arg(long, value_name = "N")]
    pub step: Option<u64>,
    /// Whether to load from the newest checkpoint
    #[arg(long, value_enum, value_name = "WHEN")]
    pub resume: Option<ResumePolicy>,
    /// Keep the ranks resident when the work is done
    #[arg(long)]
    pub hold: bool,
}

fn parse_strategy(text: &str) -> Result<Strategy, String> {
    word(text, "low-memory, striped, full or streaming")
}

fn parse_placement(text: &str) -> Result<Placement, String> {
    word(text, "shard, replicate, experts or layers")
}

fn word<T: serde::de::DeserializeOwned>(text: &str, expected: &str) -> Result<T, String> {
    serde_json::from_value(text.into()).map_err(|_| format!("expected {expected}"))
}

impl JobOverrides {
    /// Whether any flag says that a job is meant, and not a program.
    #[must_use]
    pub const fn names_a_job(&self) -> bool {
        self.model.is_some() || self.resume.is_some()
    }

    /// Puts the flags over a job file's entries.
    pub fn apply(self, config: &mut JobConfig) {
        fn over<T>(flag: Option<T>, entry: &mut Option<T>) {
            if flag.is_some() {
                *entry = flag;
            }
        }
        over(self.model, &mut config.model.source);
        over(self.job_name, &mut config.job.name);
        over(self.strategy, &mut config.load.strategy);
        over(self.dtype, &mut config.load.dtype);
        over(self.reader_threads, &mut config.load.reader_threads);
        over(self.memory_per_rank_mib.map(|mebibytes| mebibytes << 20), &mut config.load.memory_per_rank_bytes);
        over(self.cache, &mut config.load.cache);
        over(self.cache_max_gib.map(|gibibytes| gibibytes << 30), &mut config.load.cache_max_bytes);
        over(self.checkpoint_dir, &mut config.checkpoint.directory);
        config.load.placement = self.placement.unwrap_or(config.load.placement);
        self.quantize.apply(&mut config.quantization);
        config.checkpoint.resume = self.resume.unwrap_or(config.checkpoint.resume);
        config.load.device = self.device.unwrap_or(config.load.device);
        config.load.backend = self.backend.unwrap_or(config.load.backend);
        config.load.share_devices |= self.share_devices;
        config.load.digests |= self.digests;
        config.checkpoint.save |= self.save;
        config.checkpoint.step = self.step.unwrap_or(config.checkpoint.step);
        config.job.hold |= self.hold;
    }
}

/// `weightcast checkpoint …`
#[derive(Debug, Subcommand)]
pub enum CheckpointCommand {
    /// All checkpoints of a directory, oldest first
    List {
        /// The checkpoint directory
        directory: PathBuf,
        /// Print JSON on stdout
        #[arg(long)]
        json: bool,
    },
    /// The tensors and files of a checkpoint
    Inspect {
        /// The checkpoint directory
        directory: PathBuf,
        /// The step; the newest by default
        #[arg(long)]
        step: Option<u64>,
        /// Print JSON on stdout
        #[arg(long)]
        json: bool,
    },
    /// Check a checkpoint
    Verify {
        /// The checkpoint directory
        directory: PathBuf,
        /// The step; the newest by default
        #[arg(long)]
        step: Option<u64>,
        /// Read every byte and check all digests
        #[arg(long)]
        deep: bool,
    },
    /// Delete all but the newest verified checkpoints
    Prune {
        /// The checkpoint directory
        directory: PathBuf,
        /// How many verified checkpoints stay
        #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
        keep: u32,
        /// Only say what would be deleted
        #[arg(long)]
        dry_run: bool,
    },
}

/// Which running job is meant.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
pub struct JobFlags {
    /// The job's name, if several run here
    #[arg(long, value_name = "NAME")]
    pub job: Option<String>,
    /// The coordinator's host:port, for a job of another host
    #[arg(long, value_name = "ADDRESS", requires = "token_file")]
    pub coordinator: Option<String>,
    /// The job's token; its control token, if it has one
    #[arg(long, value_name = "PATH")]
    pub token_file: Option<PathBuf>,
    /// How calls are encrypted, for a job of another host
    #[command(flatten)]
    pub tls: TlsFlags,
    /// Print JSON on stdout
    #[arg(long)]
    pub json: bool,
}

/// `weightcast status`
#[derive(Debug, Args)]
pub struct StatusFlags {
    /// Which job.
    #[command(flatten)]
    pub job: JobFlags,
    /// Print again every second until the job is over
    #[arg(long)]
    pub watch: bool,
}

/// `weightcast demo`
#[derive(Debug, Args)]
pub struct DemoFlags {
    /// The model; the project's tiny-llama by default
    #[arg(long, value_name = "MODEL")]
    pub model: Option<PathBuf>,
    /// Where to work; a temporary directory that is removed by default
    #[arg(long, value_name = "DIR")]
    pub directory: Option<PathBuf>,
}
