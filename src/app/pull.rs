//! `weightcast model pull`: what a download would bring and take, said before it starts; then the download.

use std::path::PathBuf;

use serde::Serialize;

use super::prepare::{PrepareError, prepare_peek};
use super::source::SourceError;
use crate::config::{JobConfig, QuantizationConfig, QuantizationFormat, variable};
use crate::error::{Classify, Kind};
use crate::hub::{HubConfig, HubError, HubPeek, PeekedFile, Progress, Reference, resolve};
use crate::store::{LocalStore, StoreError};
use crate::types::{DeviceWish, WorldSize};

/// Room that a download leaves on the medium.
const RESERVE_BYTES: u64 = 256 << 20;

/// What a download would bring and take.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PullPlan {
    /// The model or adapter in words.
    pub model: String,
    /// The commit.
    pub commit: String,
    /// Files that loading, training and publishing use.
    pub files: usize,
    /// Bytes of them.
    pub total_bytes: u64,
    /// Bytes that the cache has.
    pub cached_bytes: u64,
    /// Bytes that a download fetches.
    pub missing_bytes: u64,
    /// Bytes that are free where the cache is.
    pub free_bytes: u64,
    /// Bytes of weights on one rank at run time, by format; empty for an adapter.
    pub run_time_bytes: Vec<(String, u64)>,
}

/// Why nothing is pulled.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PullError {
    /// The hub.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// A file of the hub.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The model.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// Its memory at run time.
    #[error(transparent)]
    Prepare(#[from] PrepareError),
    /// It is no hub id.
    #[error("{reference}: expected a hub id (org/name[@revision]), because what is here need not be pulled")]
    Local {
        /// What was named.
        reference: String,
    },
    /// The disk is too small.
    #[error(
        "{model}: no room in {cache}: {missing_bytes} bytes to fetch, {free_bytes} free, of which 256 MiB stay free"
    )]
    NoRoom {
        /// The model.
        model: String,
        /// The cache.
        cache: String,
        /// Bytes to fetch.
        missing_bytes: u64,
        /// Bytes free.
        free_bytes: u64,
    },
}

impl Classify for PullError {
    fn kind(&self) -> Kind {
        match self {
            Self::Hub(source) => source.kind(),
            Self::Store(source) => source.kind(),
            Self::Source(source) => source.kind(),
            Self::Prepare(source) => source.kind(),
            Self::Local { .. } => Kind::Invalid,
            Self::NoRoom { .. } => Kind::Exhausted,
        }
    }
}

/// Looks at a model, or an adapter, in the hub. Of weights, headers alone are fetched.
///
/// # Errors
/// [`PullError`].
pub fn plan_pull(reference: &str, is_adapter: bool) -> Result<PullPlan, PullError> {
    let config = HubConfig::from_vars(&variable)?;
    let Reference::Hub { id, revision } = Reference::parse(reference)? else {
        return Err(PullError::Local { reference: reference.to_owned() });
    };
    let peek = HubPeek::open(&id, &revision, &config)?;
    let files = peek.files(&peek.model()?, &config)?;
    let sum = |of: fn(&PeekedFile) -> u64| files.iter().map(of).sum::<u64>();
    let (total_bytes, cached_bytes) = (sum(|file| file.len_bytes), sum(|file| file.cached_bytes));
    Ok(PullPlan {
        model: reference.to_owned(),
        commit: peek.commit().to_owned(),
        files: files.len(),
        total_bytes,
        cached_bytes,
        missing_bytes: total_bytes.saturating_sub(cached_bytes),
        free_bytes: free_bytes(&config)?,
        run_time_bytes: if is_adapter { Vec::new() } else { run_time_bytes(reference)? },
    })
}

/// Downloads what is missing, and gives the directory.
///
/// # Errors
/// [`PullError::NoRoom`] before the first byte; else as a load of the model.
pub fn pull(plan: &PullPlan, progress: &dyn Fn(Progress<'_>)) -> Result<PathBuf, PullError> {
    let config = HubConfig::from_vars(&variable)?;
    if plan.missing_bytes > plan.free_bytes.saturating_sub(RESERVE_BYTES) {
        return Err(PullError::NoRoom {
            model: plan.model.clone(),
            cache: config.cache.display().to_string(),
            missing_bytes: plan.missing_bytes,
            free_bytes: plan.free_bytes,
        });
    }
    Ok(resolve(&Reference::parse(&plan.model)?, &config, progress)?.root)
}

/// Of the cache's medium, or of what is to become its parent.
fn free_bytes(config: &HubConfig) -> Result<u64, StoreError> {
    let parent = config.cache.ancestors().find(|path| path.is_dir());
    LocalStore::new(parent.unwrap_or(&config.cache)).free_bytes()
}

fn run_time_bytes(reference: &str) -> Result<Vec<(String, u64)>, PullError> {
    use QuantizationFormat as Format;
    let formats =
        [("as it is", Format::None, false), ("int8", Format::Int8, false), ("nf4, double", Format::Nf4, true)];
    let mut found = Vec::with_capacity(formats.len());
    for (name, format, double) in formats {
        let mut config = JobConfig::default();
        config.model.source = Some(reference.to_owned());
        config.load.device = DeviceWish::Cpu;
        config.quantization = QuantizationConfig { format, double, ..QuantizationConfig::default() };
        match prepare_peek(&config, WorldSize::ONE, None) {
            Ok((prepared, _)) => found.push((name.to_owned(), prepared.plan.kept_bytes(crate::types::Rank::ZERO))),
            // One that is quantized already is not quantized again.
            Err(PrepareError::Plan(crate::plan::PlanError::Quantized { .. })) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(found)
}
