//! `weightcast model quality`: what each format costs a model: bytes, errors of its weights, perplexity on a text.
//!
//! Owns: the loads in this process, one format after the other, and the figures. The arithmetic is that of training.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::alone::load_alone;
use super::prepare::{PrepareError, prepare};
use crate::config::{ConfigError, JobConfig, QuantizationConfig, QuantizationFormat};
use crate::data::{DataConfig, DataError, Dataset, Split, Tokenizer};
use crate::device::DeviceError;
use crate::error::{Classify, Kind, chain};
use crate::hub::Progress;
use crate::load::{LoadError, WholeTensor};
use crate::model::Skeleton;
use crate::plan::{Encoding, LoadPlan};
use crate::quant::{Kernels, QuantError};
use crate::state::StateDict;
use crate::train::{Probe, TrainError, tokens};
use crate::types::{DeviceWish, Fqn, Rank, WorldSize, as_f64};

/// What is measured.
#[derive(Clone, Debug)]
pub struct QualityRequest {
    /// The model: a directory, a file or a hub id.
    pub model: String,
    /// The formats, in the order of the table.
    pub formats: Vec<QualityFormat>,
    /// A text (JSONL or plain), and how much of it; without it only errors of weights are measured.
    pub text: Option<QualityText>,
}

/// A text that perplexity is measured on.
#[derive(Clone, Debug)]
pub struct QualityText {
    /// The file.
    pub path: PathBuf,
    /// The directory of tokenizer.json; without it the model's.
    pub tokenizer: Option<PathBuf>,
    /// Tokens of a sequence.
    pub sequence_length: u32,
    /// Sequences at most; the first of the text.
    pub sequences: u64,
}

/// A format of the table.
#[derive(Clone, Debug, PartialEq)]
pub struct QualityFormat {
    /// Its name in the table.
    pub name: String,
    /// The quantization.
    pub quantization: QuantizationConfig,
    /// The type of what is not quantized, where it is not the model's.
    pub dtype: Option<String>,
}

/// A name that is no format.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnknownFormat {
    /// The name is none of a format.
    #[error(
        "format {found:?}: expected stored, bf16, f16, f32, int8, nf4, nf4-double, fp4, fp4-double, hqq or mlx with bits \
         (hqq4), q8_0, q4_0, q4_k, q5_k, q6_k, q4_k_m, q5_k_m, or a job file (NAME.toml)"
    )]
    Name {
        /// The name.
        found: String,
    },
    /// It is a job file that cannot work.
    #[error("{reason}")]
    JobFile {
        /// Why not.
        reason: String,
    },
}

impl std::str::FromStr for QualityFormat {
    type Err = UnknownFormat;

    fn from_str(name: &str) -> Result<Self, UnknownFormat> {
        use QuantizationFormat as Format;
        let unknown = || UnknownFormat::Name { found: name.to_owned() };
        if name.ends_with(".toml") {
            let failed = |error: ConfigError| UnknownFormat::JobFile { reason: error.to_string() };
            let job = JobConfig::read(Path::new(name)).map_err(failed)?;
            job.quantization_rule().map_err(failed)?;
            return Ok(Self { name: name.to_owned(), quantization: job.quantization, dtype: job.load.dtype });
        }
        let (stem, double) = name.strip_suffix("-double").map_or((name, false), |stem| (stem, true));
        let (stem, bits) = match stem.strip_prefix("hqq").or_else(|| stem.strip_prefix("mlx")) {
            Some(bits) => (&stem[..3], Some(bits.parse().map_err(|_| unknown())?)),
            None => (stem, None),
        };
        let (format, dtype) = match stem {
            "stored" => (Format::None, None),
            "bf16" => (Format::None, Some("bfloat16")),
            "f16" => (Format::None, Some("float16")),
            "f32" => (Format::None, Some("float32")),
            "int8" => (Format::Int8, None),
            "nf4" => (Format::Nf4, None),
            "fp4" => (Format::Fp4, None),
            "hqq" => (Format::Hqq, None),
            "mlx" => (Format::Mlx, None),
            other => {
                let found =
                    <Format as clap::ValueEnum>::from_str(other, false).ok().filter(|found| *found != Format::None);
                (found.ok_or_else(unknown)?, None)
            }
        };
        let quantization = QuantizationConfig { format, double, bits, ..QuantizationConfig::default() };
        quantization.rule().map_err(|_| unknown())?;
        Ok(Self { name: name.to_owned(), quantization, dtype: dtype.map(str::to_owned) })
    }
}

/// One line of the table.
#[derive(Clone, Debug, Serialize)]
pub struct QualityRow {
    /// The format.
    pub format: String,
    /// Bytes of all weights and statistics.
    pub bytes: u64,
    /// Bits of a weight of the quantized tensors, statistics counted in; absent where nothing is quantized.
    pub bits_per_weight: Option<f64>,
    /// `exp` of the mean negative log likelihood of a token.
    pub perplexity: Option<f64>,
    /// The root of the summed squares of the differences from the first format by that of its weights, all tensors together.
    pub relative_error: f64,
    /// The same of each layer that differs, by its number.
    pub layers: BTreeMap<u32, f64>,
    /// The three tensors with the largest relative error.
    pub worst: Vec<(String, f64)>,
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QualityError {
    /// The model cannot be loaded in a format.
    #[error("format {format}: {source}")]
    Prepare {
        /// The format.
        format: String,
        /// Why.
        source: PrepareError,
    },
    /// The load failed.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The text cannot be read.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The model cannot be computed.
    #[error(transparent)]
    Compute(#[from] Box<TrainError>),
    /// The bytes of a weight cannot be had.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A weight cannot be read.
    #[error("tensor {fqn}: {source}")]
    Weight {
        /// The tensor.
        fqn: Fqn,
        /// Why.
        source: QuantError,
    },
    /// The model has no forward.
    #[error("{model} cannot be computed: {reason}")]
    Model {
        /// The model.
        model: String,
        /// Why.
        reason: String,
    },
}

impl Classify for QualityError {
    fn kind(&self) -> Kind {
        match self {
            Self::Prepare { source, .. } => source.kind(),
            Self::Load(source) => source.kind(),
            Self::Data(source) => source.kind(),
            Self::Compute(source) => source.kind(),
            Self::Device(source) => source.kind(),
            Self::Weight { source, .. } => source.kind(),
            Self::Model { .. } => Kind::Invalid,
        }
    }
}

/// A model that was loaded in one format.
struct Loaded {
    plan: LoadPlan,
    state: StateDict,
}

/// Loads the model in each format and measures it; the first format is what the others are held against, and stays in memory.
/// `done` hears of each line as it is there.
///
/// # Errors
/// [`QualityError`].
pub fn measure_quality(
    request: &QualityRequest,
    progress: &dyn Fn(Progress<'_>),
    done: &mut dyn FnMut(&QualityRow),
) -> Result<Vec<QualityRow>, QualityError> {
    let mut rows = Vec::with_capacity(request.formats.len());
    let mut reference: Option<Loaded> = None;
    let mut dataset = None;
    for format in &request.formats {
        let loaded = load_in(request, format, progress)?;
        if let (Some(text), None) = (&request.text, &dataset) {
            dataset = Some(read_text(text, &loaded.plan)?);
        }
        let row = row(request, (&format.name, &loaded), reference.as_ref().unwrap_or(&loaded), dataset.as_ref())?;
        done(&row);
        rows.push(row);
        reference.get_or_insert(loaded);
    }
    Ok(rows)
}

fn load_in(
    request: &QualityRequest,
    format: &QualityFormat,
    progress: &dyn Fn(Progress<'_>),
) -> Result<Loaded, QualityError> {
    let mut config = JobConfig::default();
    config.model.source = Some(request.model.clone());
    config.load.device = DeviceWish::Cpu;
    config.load.dtype.clone_from(&format.dtype);
    config.quantization = format.quantization.clone();
    let prepared = prepare(&config, WorldSize::ONE, progress);
    let prepared = prepared.map_err(|source| QualityError::Prepare { format: format.name.clone(), source })?;
    let (plan, state) = load_alone(prepared)?;
    Ok(Loaded { plan, state })
}

fn read_text(text: &QualityText, plan: &LoadPlan) -> Result<Dataset, QualityError> {
    let directory = text.tokenizer.clone().unwrap_or_else(|| PathBuf::from(&plan.root));
    let tokenizer = Tokenizer::open(&directory)?;
    let config = DataConfig { shuffle: false, ..DataConfig::new(vec![text.path.clone()], text.sequence_length) };
    Ok(Dataset::load(&config, &tokenizer)?)
}

fn row(
    request: &QualityRequest,
    (name, loaded): (&str, &Loaded),
    reference: &Loaded,
    dataset: Option<&Dataset>,
) -> Result<QualityRow, QualityError> {
    let mut quantized = (0_u64, 0_u64);
    let mut sums: BTreeMap<Option<u32>, (f64, f64)> = BTreeMap::new();
    let mut worst = Vec::new();
    for (index, tensor) in loaded.plan.tensors.iter().enumerate() {
        if !matches!(tensor.encoding, Encoding::Plain { .. }) {
            quantized.0 += tensor.kept_bytes(Rank::ZERO, WorldSize::ONE);
            quantized.1 += tensor.elements();
        }
        let (difference, whole) = differences(loaded, reference, index)?;
        let sum = sums.entry(tensor.fqn.layer()).or_default();
        *sum = (sum.0 + difference, sum.1 + whole);
        if difference > 0.0 {
            worst.push((tensor.fqn.to_string(), (difference / whole).sqrt()));
        }
    }
    worst.sort_by(|one, other| other.1.total_cmp(&one.1));
    worst.truncate(3);
    let total = sums.values().fold((0.0, 0.0), |total, sum| (total.0 + sum.0, total.1 + sum.1));
    let relative = |(difference, whole): (f64, f64)| if difference > 0.0 { (difference / whole).sqrt() } else { 0.0 };
    let layers =
        sums.iter().filter_map(|(layer, sum)| Some(((*layer)?, relative(*sum)))).filter(|(_, error)| *error > 0.0);
    let bits_per_weight = (quantized.1 > 0).then(|| 8.0 * as_f64(quantized.0) / as_f64(quantized.1));
    Ok(QualityRow {
        format: name.to_owned(),
        bytes: loaded.plan.kept_bytes(Rank::ZERO),
        bits_per_weight,
        perplexity: dataset.map(|dataset| perplexity(request, loaded, dataset)).transpose()?,
        relative_error: relative(total),
        layers: layers.collect(),
        worst,
    })
}

/// The summed squares of the differences of one tensor, and of its values in the reference.
fn differences(loaded: &Loaded, reference: &Loaded, index: usize) -> Result<(f64, f64), QualityError> {
    let expected = values(reference, index)?;
    let whole = expected.iter().map(|value| f64::from(*value).powi(2)).sum();
    if std::ptr::eq(loaded, reference) {
        return Ok((0.0, whole));
    }
    let found = values(loaded, index)?;
    let squares =
        found.iter().zip(&expected).map(|(found, expected)| (f64::from(*found) - f64::from(*expected)).powi(2));
    Ok((squares.sum(), whole))
}

fn values(loaded: &Loaded, index: usize) -> Result<Vec<f32>, QualityError> {
    let tensor = &loaded.plan.tensors[index];
    let components = 0..tensor.components().len();
    let parts = components.map(|component| loaded.state.kept_bytes(index, component)).collect::<Result<Vec<_>, _>>()?;
    let parts: Vec<&[u8]> = parts.iter().map(AsRef::as_ref).collect();
    let nested_offset = loaded.state.nested_offset(index)?;
    let whole = WholeTensor { encoding: tensor.encoding, shape: &tensor.shape, parts: &parts, nested_offset };
    whole.dequantize(Kernels::detect()).map_err(|source| QualityError::Weight { fqn: tensor.fqn.clone(), source })
}

fn perplexity(request: &QualityRequest, loaded: &Loaded, dataset: &Dataset) -> Result<f64, QualityError> {
    let plan = &loaded.plan;
    let refused = |reason: String| QualityError::Model { model: plan.model.clone(), reason };
    let json = plan.config_json.as_deref().ok_or_else(|| refused("it has no config.json".to_owned()))?;
    let skeleton = Skeleton::from_config(json.as_bytes()).map_err(|error| refused(chain(&error)))?;
    let config = skeleton.config.as_ref().ok_or_else(|| refused("its architecture is unknown".to_owned()))?;
    if u64::from(dataset.largest_id()) >= config.vocab_size {
        let (id, vocabulary) = (dataset.largest_id(), config.vocab_size);
        return Err(refused(format!("the tokenizer gives token {id}, and the vocabulary has {vocabulary} entries")));
    }
    let limit = request.text.as_ref().map_or(0, |text| text.sequences);
    let count = dataset.sequences(Split::Train).min(limit);
    let probe = Probe { plan, base: &loaded.state, config, adapter: None };
    // Four sequences at a time read the weights a quarter as often.
    let starts = (0..count).step_by(4);
    let batches = starts.map(|start| {
        let indices: Vec<u64> = (start..(start + 4).min(count)).collect();
        tokens(dataset, Split::Train, &indices)
    });
    let (nats, targets) = probe.evaluate(batches).map_err(Box::new)?;
    if targets == 0 {
        return Err(refused("the text has no sequence of two tokens".to_owned()));
    }
    Ok((nats / as_f64(targets)).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_formats() {
        let of = |name: &str| name.parse::<QualityFormat>().map(|format| format.quantization);
        let hqq = of("hqq3").expect("a format");
        assert_eq!((hqq.format, hqq.bits), (QuantizationFormat::Hqq, Some(3)));
        assert!(of("nf4-double").expect("a format").double);
        assert_eq!(of("q4_k_m").expect("a format").format, QuantizationFormat::Q4KM);
        for wrong in ["none", "hqq", "hqq7", "mlx1", "int8-double", "q4", ""] {
            assert!(of(wrong).is_err(), "{wrong}");
        }
    }
}
