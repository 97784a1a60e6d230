//! Where an adapter's tensors come from: a directory of PEFT's, a repository of the hub, or a checkpoint of a training run.
//!
//! A checkpoint's bytes are verified (`CK-3`); PEFT's files carry no digests.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::run_tensors::{RunTensors, RunTensorsError, StepChoice};
use crate::adapter::{
    AdapterConfig, AdapterError, AdapterTensor, LinearModule, LoadedAdapter, Orientation, Target, parse_name,
};
use crate::error::{Classify, Kind};
use crate::format::{FormatError, safetensors};
use crate::hub::{HubConfig, HubError, Progress, Reference, resolve};
use crate::manifest::TrainingState;
use crate::quant::{Kernels, QuantError, Source};
use crate::store::{LocalStore, ReadAt, Store, StoreError, read_small};
use crate::types::{ByteRange, DType, Fqn, Shape, Step, as_usize};

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";

/// A longer configuration is none; one that names every layer of a large model has 100 kB.
const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// Why an adapter cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdapterSourceError {
    /// The reference leads to no files.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// Storage failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The header of the tensors' file does not hold.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The checkpoint cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] RunTensorsError),
    /// The configuration or the tensors do not hold.
    #[error("{place}: {source}")]
    Adapter {
        /// Where the adapter is.
        place: String,
        /// What is wrong.
        source: AdapterError,
    },
    /// The checkpoint is of a model and not of a training run with an adapter.
    #[error("{place}: the checkpoint has no adapter")]
    NoAdapter {
        /// The checkpoint.
        place: String,
    },
    /// The adapter has values that are not numbers.
    #[error("tensor {fqn}: {count} values are infinite or not a number")]
    NotFinite {
        /// The tensor.
        fqn: Fqn,
        /// How many.
        count: usize,
    },
    /// The elements cannot be converted.
    #[error("tensor {fqn}: {source}")]
    Convert {
        /// The tensor.
        fqn: Fqn,
        /// The reason.
        source: QuantError,
    },
}

impl Classify for AdapterSourceError {
    fn kind(&self) -> Kind {
        match self {
            Self::Hub(source) => source.kind(),
            Self::Store(source) => source.kind(),
            Self::Format(source) => source.kind(),
            Self::Checkpoint(source) => source.kind(),
            Self::Adapter { source, .. } => source.kind(),
            Self::NoAdapter { .. } => Kind::NotFound,
            Self::NotFinite { .. } => Kind::Invalid,
            Self::Convert { source, .. } => source.kind(),
        }
    }
}

/// An adapter whose configuration and table of tensors were read, but no tensor.
#[derive(Debug)]
pub struct AdapterSource {
    /// Where it is, in words.
    pub place: String,
    /// Its configuration; the base model is named wherever it is known.
    pub config: AdapterConfig,
    /// The state of the run, for a checkpoint.
    pub training: Option<Box<TrainingState>>,
    /// The step, for a checkpoint.
    pub step: Option<Step>,
    /// Element type and shape of every tensor, by PEFT's name.
    pub tensors: BTreeMap<Fqn, (DType, Shape)>,
    bytes: Bytes,
}

#[derive(Debug)]
enum Bytes {
    Peft { file: Box<dyn ReadAt>, ranges: BTreeMap<Fqn, ByteRange> },
    Checkpoint(RunTensors),
}

impl AdapterSource {
    /// Opens PEFT's files in a directory or, through the cache, of a hub id. `progress` hears of downloads.
    ///
    /// # Errors
    /// [`AdapterSourceError`].
    pub fn open_peft(reference: &str, progress: &dyn Fn(Progress<'_>)) -> Result<Self, AdapterSourceError> {
        let root: PathBuf = match Reference::parse(reference)? {
            Reference::Directory(path) => path,
            other => resolve(&other, &HubConfig::from_vars(&crate::config::variable)?, progress)?.root,
        };
        let store = LocalStore::new(&root);
        let place = store.describe("");
        let json = read_small(&store, CONFIG, MAX_CONFIG_BYTES)?;
        let config = AdapterConfig::parse(&json).map_err(adapter_error(&place))?;
        let file = store.open(TENSORS)?;
        let path = store.describe(TENSORS);
        let mut first = vec![0; as_usize(safetensors::LENGTH_BYTES.min(file.len_bytes()))];
        file.read_exact_at(0, &mut first)?;
        let mut json = vec![0; as_usize(safetensors::header_len(&path, &first, file.len_bytes())?)];
        file.read_exact_at(safetensors::LENGTH_BYTES, &mut json)?;
        let header = safetensors::parse_header(&path, &json, file.len_bytes())?;
        let (mut tensors, mut ranges) = (BTreeMap::new(), BTreeMap::new());
        for (fqn, tensor) in header.tensors {
            ranges.insert(fqn.clone(), tensor.range);
            tensors.insert(fqn, (tensor.dtype, tensor.shape));
        }
        let bytes = Bytes::Peft { file, ranges };
        Ok(Self { place, config, training: None, step: None, tensors, bytes })
    }

    /// Opens a checkpoint of a training run.
    ///
    /// # Errors
    /// [`AdapterSourceError`].
    pub fn open_checkpoint(root: &Path, choice: StepChoice) -> Result<Self, AdapterSourceError> {
        let checkpoint = RunTensors::open(root, choice)?;
        let place = checkpoint.place.clone();
        let no_adapter = || AdapterSourceError::NoAdapter { place: place.clone() };
        let training = checkpoint.training.clone().ok_or_else(no_adapter)?;
        let mut config = AdapterConfig::from_value(training.adapter.as_ref().ok_or_else(no_adapter)?)
            .map_err(adapter_error(&place))?;
        if config.base_model_name_or_path.is_none() {
            name_base(&mut config, &training.base_model);
        }
        let tensors = checkpoint.plain(|fqn| parse_name(fqn.as_str()).is_some())?;
        let step = Some(checkpoint.step);
        Ok(Self { place, config, training: Some(training), step, tensors, bytes: Bytes::Checkpoint(checkpoint) })
    }

    /// The modules that the tensors speak of, with the sizes of A and B: what the adapter can say of its base.
    #[must_use]
    pub fn own_modules(&self) -> Vec<LinearModule> {
        let shape = |name: Fqn| self.tensors.get(&name).map(|(_, shape)| shape.clone());
        let module = |fqn: &Fqn| {
            let (module, crate::adapter::AdapterPart::A) = parse_name(fqn.as_str())? else { return None };
            let in_features = *shape(crate::adapter::lora_a_name(module))?.0.get(1)?;
            let out_features = *shape(crate::adapter::lora_b_name(module))?.0.first()?;
            let orientation = if self.config.fan_in_fan_out { Orientation::InOut } else { Orientation::OutIn };
            let module = module.to_owned();
            Some(LinearModule { module, out_features, in_features, head: false, tied: false, orientation })
        };
        self.tensors.keys().filter_map(module).collect()
    }

    /// Reads the adapter onto a model with these linear layers, widened to f32.
    ///
    /// # Errors
    /// [`AdapterSourceError`] when the adapter does not fit them, a byte is damaged or a value is no number.
    pub fn read(&self, linears: &[LinearModule]) -> Result<LoadedAdapter, AdapterSourceError> {
        let targets = self.targets(linears)?;
        LoadedAdapter::read(self.config.clone(), targets, |tensor| self.values(tensor))
    }

    /// That the adapter fits a model with these linear layers, without reading a tensor.
    ///
    /// # Errors
    /// As [`AdapterSource::read`].
    pub fn check(&self, linears: &[LinearModule]) -> Result<(), AdapterSourceError> {
        self.targets(linears).map(|_| ())
    }

    fn targets(&self, linears: &[LinearModule]) -> Result<Vec<Target>, AdapterSourceError> {
        let error = adapter_error(&self.place);
        let targets = self.config.targets(linears).map_err(&error)?;
        self.config.check_tensors(&targets, &self.tensors).map_err(&error)?;
        Ok(targets)
    }

    fn values(&self, tensor: &AdapterTensor) -> Result<Vec<f32>, AdapterSourceError> {
        let fqn = &tensor.fqn;
        let dtype = self.tensors.get(fqn).map_or(DType::F32, |(dtype, _)| *dtype);
        let elements = as_usize(tensor.shape.elements().expect("the file's header was checked"));
        let mut bytes = vec![0; elements * as_usize(dtype.size_bytes())];
        match &self.bytes {
            Bytes::Peft { file, ranges } => {
                let range = ranges.get(fqn).copied().unwrap_or_default();
                file.read_exact_at(range.start(), &mut bytes)?;
            }
            Bytes::Checkpoint(checkpoint) => checkpoint.read(fqn, &mut bytes)?,
        }
        let values = widen(dtype, &bytes).map_err(|source| AdapterSourceError::Convert { fqn: fqn.clone(), source })?;
        match values.iter().filter(|value| !value.is_finite()).count() {
            0 => Ok(values),
            count => Err(AdapterSourceError::NotFinite { fqn: fqn.clone(), count }),
        }
    }

    /// The bytes of all tensors as they are stored.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        self.tensors.values().map(|(dtype, shape)| shape.bytes(*dtype).unwrap_or(0)).fold(0, u64::saturating_add)
    }
}

/// Elements of F16, BF16 or F32 as f32.
pub(super) fn widen(dtype: DType, bytes: &[u8]) -> Result<Vec<f32>, QuantError> {
    let source = Source::new(dtype, bytes)?;
    let mut wide = vec![0; source.len() * 4];
    Kernels::detect().convert(source, DType::F32, &mut wide)?;
    Ok(wide.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
}

/// f32 values as elements of `dtype`, appended to `out`.
pub(super) fn narrow(values: &[f32], dtype: DType, out: &mut Vec<u8>) -> Result<(), QuantError> {
    let wide: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let start = out.len();
    out.resize(start + values.len() * as_usize(dtype.size_bytes()), 0);
    Kernels::detect().convert(Source::new(DType::F32, &wide)?, dtype, out.get_mut(start..).unwrap_or_default())
}

fn adapter_error(place: &str) -> impl Fn(AdapterError) -> AdapterSourceError {
    move |source| AdapterSourceError::Adapter { place: place.to_owned(), source }
}

/// A run names its base as users do, with the revision behind an `@`; PEFT has a field for it.
fn name_base(config: &mut AdapterConfig, base: &str) {
    if let Ok(Reference::Hub { id, .. }) = Reference::parse(base) {
        config.revision = base.split_once('@').map(|(_, revision)| revision.to_owned());
        config.base_model_name_or_path = Some(id);
    } else {
        config.base_model_name_or_path = Some(base.to_owned());
    }
}
