//! Configuration: the job file, and the one place that reads the environment.
//!
//! Owns: [`JobConfig`] (job.toml, overridden by flags), [`WorkerEnvironment`], the host's memory.
//! Refuses to know: how a job is carried out. Everything is validated before a port is opened or a process started.

mod environment;
mod job;
mod quantization;

pub use environment::{
    EnvironmentError, WorkerEnvironment, available_memory_bytes, host_name, remote_settings, runtime_directory,
    variable,
};
pub use job::{
    CheckpointConfig, ConfigError, JobConfig, JobSection, LoadConfig, ModelSection, OtherModelConfig, ResumePolicy,
};
pub use quantization::{ModuleConfig, QuantizationConfig, QuantizationFormat};
