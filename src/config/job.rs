//! job.toml.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::QuantizationConfig;
use crate::cache::CachePlace;
use crate::error::{Classify, Kind};
use crate::membership::ExitPolicy;
use crate::plan::{Chunking, DTypeRule, DeviceBudget, DeviceRule, MemoryBudget, Placement, QuantizationRule, Strategy};
use crate::store::{absolute, is_remote};
use crate::train::Recipe;
use crate::types::{BackendWish, DType, DeviceWish, Sharing};

/// Source bytes that a reader's thread handles at once, so that source and codes stay in a core's cache between reading
/// and quantizing. Loading 2 GB of bf16 in NF4, the threads spent in reading and encoding 1.4 to 1.6 s with 256 KiB,
/// 2.2 to 2.6 s with 1 MiB and 2.9 to 3.2 s with 4 MiB (two runs each in turn, docs/MEASUREMENTS.md).
const CHUNK_BYTES: u64 = 256 << 10;
/// Results that may wait to be sent: 16 MiB of source.
const QUEUE_CHUNKS: u32 = 64;

/// What the cache may take: a model of 70 billion weights in 4 bits, and some smaller ones.
pub(crate) const CACHE_MAX_BYTES: u64 = 64 << 30;

/// A job.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JobConfig {
    /// `[job]`.
    pub job: JobSection,
    /// `[model]`.
    pub model: ModelSection,
    /// `[models.NAME]`: models that the ranks hold beside it.
    pub models: BTreeMap<String, OtherModelConfig>,
    /// `[load]`.
    pub load: LoadConfig,
    /// `[quantization]`.
    pub quantization: QuantizationConfig,
    /// `[checkpoint]`.
    pub checkpoint: CheckpointConfig,
    /// `[train]`: what follows the load.
    pub train: Option<Recipe>,
}

/// `[job]`: the job as a whole.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct JobSection {
    /// Its name; the model's by default.
    pub name: Option<String>,
    /// Ranks of each node, where neither `--nproc-per-node` nor a scheduler says; 1 by default.
    pub ranks_per_node: Option<std::num::NonZeroU32>,
    /// Keep the ranks resident when the work is done.
    pub hold: bool,
}

/// `[model]`: what is loaded.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelSection {
    /// A directory, a file, or a hub id with an optional revision: `org/name@revision`.
    pub source: Option<String>,
}

/// `[models.NAME]`: a model beside the job's own, loaded in the same placement. It has a type and a quantization of its own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OtherModelConfig {
    /// As `model.source`.
    pub source: String,
    /// As `load.dtype`.
    pub dtype: Option<String>,
    /// As `[quantization]`.
    pub quantization: QuantizationConfig,
}

/// `[load]`: how it is loaded.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct LoadConfig {
    /// Which ranks read; low-memory for a model, full for a checkpoint.
    pub strategy: Option<Strategy>,
    /// What ranks keep.
    pub placement: Placement,
    /// With the placement `layers`, the ranks' parts of the model in proportion, such as `[3, 1]`; a rank that is not listed
    /// has 1.
    pub split: Vec<u32>,
    /// The type of what is not quantized: `auto`, `float32`, `float16`, `bfloat16`.
    pub dtype: Option<String>,
    /// Threads of a reader.
    pub reader_threads: Option<u32>,
    /// Source bytes of a chunk.
    pub chunk_bytes: Option<u64>,
    /// Report the digest of every tensor when the load is done.
    pub digests: bool,
    /// Host memory that each rank may use, in bytes.
    pub memory_per_rank_bytes: Option<u64>,
    /// Where the weights go: `auto` (CUDA devices where there is one for every rank of the host, else the host), `cpu`,
    /// `cuda`.
    pub device: DeviceWish,
    /// Let several ranks share a CUDA device when there are fewer devices than ranks.
    pub share_devices: bool,
    /// The directory that keeps what loads make (quantized and converted weights) for later loads of the same model in the
    /// same form.
    pub cache: Option<PathBuf>,
    /// Bytes that all entries of the cache may take; 64 GiB by default.
    pub cache_max_bytes: Option<u64>,
    /// What moves weights between ranks: `auto` (NCCL between CUDA devices where it can be loaded, else TCP), `nccl`,
    /// `tcp`.
    pub backend: BackendWish,
}

/// `[checkpoint]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointConfig {
    /// Where checkpoints are.
    pub directory: Option<PathBuf>,
    /// Write one when the load is done.
    pub save: bool,
    /// The step that it is a checkpoint of, when the job starts from a model; 0 by default.
    pub step: u64,
    /// Whether to load from a checkpoint.
    pub resume: ResumePolicy,
}

/// Whether a job loads from its newest checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum ResumePolicy {
    /// From a checkpoint if there is one, else from the model.
    #[default]
    Auto,
    /// From a checkpoint; it is an error if there is none.
    Must,
    /// From the model.
    Never,
}

/// A job file or flag that cannot work.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The job file cannot be read.
    #[error("job file {path}: {message}")]
    File {
        /// The file.
        path: String,
        /// What is wrong, with the place.
        message: String,
    },
    /// A value cannot work.
    #[error("{key}: expected {expected}, found {found}")]
    Value {
        /// The key.
        key: &'static str,
        /// What it must be.
        expected: &'static str,
        /// What it is.
        found: String,
    },
}

impl Classify for ConfigError {
    fn kind(&self) -> Kind {
        // A configuration that cannot work ends with 78.
        Kind::Conflict
    }
}

impl JobConfig {
    /// Reads a job file. Relative paths in it are relative to its directory.
    ///
    /// # Errors
    /// [`ConfigError::File`], with line and column.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let failed = |message: String| ConfigError::File { path: path.display().to_string(), message };
        #[expect(clippy::disallowed_methods, reason = "the job file is configuration, not data")]
        let text = std::fs::read(path).map_err(|error| failed(error.to_string()))?;
        let text = String::from_utf8(text).map_err(|error| failed(error.to_string()))?;
        Self::parse(&text, path.parent().unwrap_or_else(|| Path::new(""))).map_err(failed)
    }

    /// Reads the text of a job file whose relative paths start from `base`.
    ///
    /// # Errors
    /// What is wrong, with line and column.
    pub fn parse(text: &str, base: &Path) -> Result<Self, String> {
        let mut config: Self = toml::from_str(text).map_err(|error| error.to_string().trim().to_owned())?;
        if let Some(directory) = config.checkpoint.directory.as_mut().filter(|directory| !is_remote(directory)) {
            *directory = base.join(&*directory);
        }
        if let Some(directory) = &mut config.load.cache {
            *directory = base.join(&*directory);
        }
        let sources = config.models.values_mut().map(|model| &mut model.source);
        for source in config.model.source.iter_mut().chain(sources) {
            let local = base.join(&*source);
            if !is_remote(&*source) && local.exists() {
                *source = local.display().to_string();
            }
        }
        if let Some(recipe) = &mut config.train {
            recipe.resolve_paths(base);
        }
        Ok(config)
    }

    /// The element type of what is not quantized.
    ///
    /// # Errors
    /// [`ConfigError::Value`].
    pub fn dtype_rule(&self) -> Result<DTypeRule, ConfigError> {
        match self.load.dtype.as_deref() {
            None | Some("auto") => Ok(DTypeRule::Keep),
            Some(name) => {
                name.parse::<DType>().ok().filter(|dtype| dtype.is_weight_float()).map(DTypeRule::Convert).ok_or_else(
                    || ConfigError::Value {
                        key: "load.dtype",
                        expected: "auto, float32, float16 or bfloat16",
                        found: name.to_owned(),
                    },
                )
            }
        }
    }

    /// What is quantized.
    ///
    /// # Errors
    /// As [`QuantizationConfig::rule`].
    pub fn quantization_rule(&self) -> Result<QuantizationRule, ConfigError> {
        self.quantization.rule()
    }

    /// Sizes of chunks; as many reader threads as there are processors, four at most.
    ///
    /// # Errors
    /// [`ConfigError::Value`] for sizes out of range.
    pub fn chunking(&self) -> Result<Chunking, ConfigError> {
        let range = |key, expected, value: u64, allowed: std::ops::RangeInclusive<u64>| {
            let found = value.to_string();
            if allowed.contains(&value) { Ok(value) } else { Err(ConfigError::Value { key, expected, found }) }
        };
        let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let threads = self.load.reader_threads.map_or_else(|| crate::types::as_u64(processors.min(4)), u64::from);
        let threads = range("load.reader-threads", "1 to 64", threads, 1..=64)?;
        let chunk = self.load.chunk_bytes.unwrap_or(CHUNK_BYTES);
        Ok(Chunking {
            chunk_bytes: range("load.chunk-bytes", "65536 to 268435456", chunk, 1 << 16..=1 << 28)?,
            reader_threads: u32::try_from(threads).unwrap_or(1),
            queue_chunks: QUEUE_CHUNKS,
        })
    }

    /// Where what loads make is kept: as the job says, else `WEIGHTCAST_CACHE`, else nowhere.
    #[must_use]
    pub fn cache_place(&self) -> Option<CachePlace> {
        let root = self.load.cache.clone().or_else(|| super::variable("WEIGHTCAST_CACHE").map(PathBuf::from))?;
        Some(CachePlace { root: absolute(&root), max_bytes: self.load.cache_max_bytes.unwrap_or(CACHE_MAX_BYTES) })
    }

    /// The memory that ranks may use.
    #[must_use]
    pub fn memory_budget(&self, host_bytes: Option<u64>, devices: Option<DeviceBudget>) -> MemoryBudget {
        MemoryBudget { per_rank_bytes: self.load.memory_per_rank_bytes, host_bytes, devices }
    }

    /// What is asked of devices and the data plane.
    #[must_use]
    pub const fn device_rule(&self) -> DeviceRule {
        let sharing = if self.load.share_devices { Sharing::Allowed } else { Sharing::Refused };
        DeviceRule { device: self.load.device, sharing, backend: self.load.backend }
    }

    /// That a job whose weights stream asks for nothing that wants them in memory.
    ///
    /// # Errors
    /// [`ConfigError::Value`].
    pub fn check_streaming(&self) -> Result<(), ConfigError> {
        if self.load.strategy != Some(Strategy::Streaming) {
            return Ok(());
        }
        let refuse = |key, expected, found: &str| Err(ConfigError::Value { key, expected, found: found.to_owned() });
        if self.train.is_none() {
            let expected = "low-memory, striped or full, because the job does not train; streaming keeps nothing";
            return refuse("load.strategy", expected, "streaming");
        }
        if self.load.digests {
            return refuse("load.digests", "false, because the weights stream", "true");
        }
        Ok(())
    }

    /// What follows when the work is done.
    #[must_use]
    pub const fn exit_policy(&self) -> ExitPolicy {
        if self.job.hold { ExitPolicy::Hold } else { ExitPolicy::Exit }
    }
}

#[cfg(test)]
mod tests {
    use super::super::QuantizationFormat;
    use super::*;
    use crate::quant::{BlockSize, FourBitCode};

    #[test]
    fn a_whole_job_file_is_read() {
        let job: JobConfig = toml::from_str(
            r#"
            job.hold = true
            model.source = "org/name@main"
            quantization = { format = "nf4", double = true, block = 128, skip = ["lm_head"] }
            checkpoint = { directory = "out", save = true, resume = "never" }
            [load]
            strategy = "striped"
            placement = "replicate"
            dtype = "bfloat16"
            reader-threads = 3
            device = "cuda"
            share-devices = true
            backend = "tcp"
            "#,
        )
        .expect("a job");
        assert_eq!(job.load.strategy, Some(Strategy::Striped));
        let device = DeviceRule { device: DeviceWish::Cuda, sharing: Sharing::Allowed, backend: BackendWish::Tcp };
        assert_eq!(job.device_rule(), device);
        assert_eq!(job.dtype_rule().expect("a dtype"), DTypeRule::Convert(DType::BF16));
        assert_eq!(job.chunking().expect("sizes").reader_threads, 3);
        let block = BlockSize::new(128).expect("allowed");
        let skip = vec!["lm_head".to_owned()];
        let expected = QuantizationRule::FourBit { code: FourBitCode::Nf4, block, nested: true, skip };
        assert_eq!(job.quantization_rule().expect("a rule"), expected);
    }

    #[test]
    fn unknown_keys_and_impossible_values_are_named() {
        let unknown =
            toml::from_str::<JobConfig>("[load]\nstrategi = \"full\"\n").expect_err("unknown key").to_string();
        assert!(unknown.contains("strategi") && unknown.contains("line 2"), "{unknown}");
        let mut job = JobConfig::default();
        job.load.dtype = Some("int4".to_owned());
        assert!(job.dtype_rule().expect_err("no dtype").to_string().contains("load.dtype: expected auto, float32"));
        job.quantization =
            QuantizationConfig { format: QuantizationFormat::Nf4, block: Some(100), ..Default::default() };
        assert!(job.quantization_rule().expect_err("no block").to_string().contains("found 100"));
        job.load.chunk_bytes = Some(1);
        assert!(job.chunking().is_err());
    }
}
