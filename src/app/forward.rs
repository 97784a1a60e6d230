//! `weightcast model forward`: what a model computes, written down for another tool to compare with.
//!
//! Owns: the files of tokens and results, and the one rank in this process that the model is loaded on. The arithmetic is
//! that of training ([`crate::train`]), through the same load.

use std::path::{Path, PathBuf};

use super::adapter_source::{AdapterSource, AdapterSourceError};
use super::alone::load_alone;
use super::prepare::{PrepareError, prepare};
use super::weight_files::WeightFiles;
use crate::adapter::{LoadedAdapter, linears};
use crate::config::{JobConfig, QuantizationConfig};
use crate::error::{Classify, Kind, chain};
use crate::format::{FormatError, safetensors};
use crate::hub::Progress;
use crate::load::LoadError;
use crate::model::Skeleton;
use crate::nn::Tokens;
use crate::plan::{LoadPlan, Strategy};
use crate::store::{LocalStore, ReadAt, Store, StoreError};
use crate::train::{Gradients, Probe, TrainError, Wanted};
use crate::types::{ByteRange, DType, DeviceWish, Fqn, Shape, WorldSize, as_u64, as_usize};

/// The tensor that is read.
const INPUT_IDS: &str = "input_ids";

/// What is computed.
#[derive(Clone, Debug)]
pub struct ForwardRequest {
    /// The model: a directory, a file or a hub id.
    pub model: String,
    /// A PEFT adapter beside it: a directory or a hub id.
    pub adapter: Option<String>,
    /// How the model is quantized while it is loaded.
    pub quantization: QuantizationConfig,
    /// Whether each layer's weights are read when it is computed and let go afterwards, instead of all being loaded before.
    pub streams: bool,
    /// A safetensors file with `input_ids`, int64 `[batch, seq]`.
    pub input: PathBuf,
    /// The file that is written, which must not exist.
    pub output: PathBuf,
    /// Whether the loss and the gradients of the adapter's tensors are wanted.
    pub gradients: bool,
}

/// What was computed.
#[derive(Clone, Debug, PartialEq)]
pub struct Forwarded {
    /// The shape of the logits: batch, tokens, vocabulary.
    pub shape: [u64; 3],
    /// The mean loss in nats, where it was wanted.
    pub loss: Option<f32>,
    /// The number of gradients that were written.
    pub gradients: usize,
}

/// Why nothing was computed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ForwardError {
    /// The model cannot be loaded as asked.
    #[error(transparent)]
    Prepare(#[from] PrepareError),
    /// The adapter cannot be read.
    #[error(transparent)]
    Adapter(#[from] AdapterSourceError),
    /// The load failed.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The model cannot be computed.
    #[error(transparent)]
    Compute(#[from] Box<TrainError>),
    /// Storage failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The input is no safetensors file.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The input does not hold.
    #[error("{path}: {what}: expected {expected}, found {found}")]
    Input {
        /// The file.
        path: String,
        /// The place in it.
        what: String,
        /// What it must be.
        expected: &'static str,
        /// What it is.
        found: String,
    },
    /// The output is there already.
    #[error("{path}: expected a file that does not exist yet, found one")]
    OutputExists {
        /// The file.
        path: String,
    },
    /// The model has no forward.
    #[error("{model} cannot be computed: {reason}")]
    Model {
        /// The model.
        model: String,
        /// Why.
        reason: String,
    },
    /// The logits do not fit the memory.
    #[error(
        "the logits of {tokens} tokens over a vocabulary of {vocab} take {needed} bytes of memory, and {available} are \
         available: give it fewer tokens"
    )]
    Memory {
        /// Tokens of all rows.
        tokens: u64,
        /// Entries of the vocabulary.
        vocab: u64,
        /// Bytes.
        needed: u64,
        /// Bytes.
        available: u64,
    },
}

impl Classify for ForwardError {
    fn kind(&self) -> Kind {
        match self {
            Self::Prepare(source) => source.kind(),
            Self::Adapter(source) => source.kind(),
            Self::Load(source) => source.kind(),
            Self::Compute(source) => source.kind(),
            Self::Store(source) => source.kind(),
            Self::Format(source) => source.kind(),
            Self::Input { .. } | Self::Model { .. } => Kind::Invalid,
            Self::OutputExists { .. } => Kind::Conflict,
            Self::Memory { .. } => Kind::Exhausted,
        }
    }
}

/// Loads the model on one rank in this process, computes its forward in f32 as training does, and writes `logits` f32
/// `[batch, seq, vocab]`. With `gradients` also `loss`, a scalar f32, the mean in nats over all tokens but the last of each
/// row, each against the token after it (transformers' `labels=input_ids`), and its gradient by every tensor of the adapter,
/// f32, under PEFT's names. `progress` hears of downloads.
///
/// # Errors
/// [`ForwardError`].
pub fn forward(request: &ForwardRequest, progress: &dyn Fn(Progress<'_>)) -> Result<Forwarded, ForwardError> {
    let (output, name) = split(&request.output)?;
    if request.output.exists() {
        return Err(ForwardError::OutputExists { path: output.describe(name) });
    }
    let tokens = read_tokens(&request.input)?;
    let mut config = JobConfig::default();
    config.model.source = Some(request.model.clone());
    config.load.device = DeviceWish::Cpu;
    config.quantization = request.quantization.clone();
    config.load.strategy = request.streams.then_some(Strategy::Streaming);
    let prepared = prepare(&config, WorldSize::ONE, progress)?;
    let plan = &prepared.plan;
    let skeleton = skeleton(plan)?;
    let adapter: Option<LoadedAdapter> = match &request.adapter {
        Some(reference) => Some(AdapterSource::open_peft(reference, progress)?.read(&linears(&skeleton))?),
        None => None,
    };
    let no_config =
        || ForwardError::Model { model: plan.model.clone(), reason: "its architecture is unknown".to_owned() };
    let model = skeleton.config.as_ref().ok_or_else(no_config)?;
    check_memory(&tokens, model.vocab_size)?;
    let (plan, base) = load_alone(prepared)?;
    let probe = Probe { plan: &plan, base: &base, config: model, adapter: adapter.as_ref() };
    let wanted = if request.gradients { Wanted::Gradients } else { Wanted::Logits };
    let (logits, gradients) = probe.run(&tokens, wanted).map_err(Box::new)?;
    let shape = [as_u64(tokens.batch), as_u64(tokens.seq), model.vocab_size];
    write(&output, name, (shape, logits), gradients)
}

/// A path as a store and a name in it.
fn split(path: &Path) -> Result<(LocalStore, &str), ForwardError> {
    let name = path.file_name().and_then(|name| name.to_str()).ok_or_else(|| ForwardError::Input {
        path: path.display().to_string(),
        what: "the path".to_owned(),
        expected: "a file's name in UTF-8",
        found: "none".to_owned(),
    })?;
    let directory = path.parent().filter(|directory| !directory.as_os_str().is_empty());
    Ok((LocalStore::new(directory.unwrap_or_else(|| Path::new("."))), name))
}

fn skeleton(plan: &LoadPlan) -> Result<Skeleton, ForwardError> {
    let refused = |reason: String| ForwardError::Model { model: plan.model.clone(), reason };
    let json = plan.config_json.as_deref().ok_or_else(|| refused("it has no config.json".to_owned()))?;
    Skeleton::from_config(json.as_bytes()).map_err(|error| refused(chain(&error)))
}

/// Logits are there twice while they are written.
fn check_memory(tokens: &Tokens, vocab: u64) -> Result<(), ForwardError> {
    let count = as_u64(tokens.ids.len());
    let needed = count.saturating_mul(vocab).saturating_mul(2 * DType::F32.size_bytes());
    match crate::config::available_memory_bytes() {
        Some(available) if needed > available => Err(ForwardError::Memory { tokens: count, vocab, needed, available }),
        _ => Ok(()),
    }
}

/// The tokens of a file: one document a row, each token's target the one after it.
fn read_tokens(path: &Path) -> Result<Tokens, ForwardError> {
    let (store, name) = split(path)?;
    let path = store.describe(name);
    let file = store.open(name)?;
    let mut first = vec![0; as_usize(safetensors::LENGTH_BYTES.min(file.len_bytes()))];
    file.read_exact_at(0, &mut first)?;
    let mut json = vec![0; as_usize(safetensors::header_len(&path, &first, file.len_bytes())?)];
    file.read_exact_at(safetensors::LENGTH_BYTES, &mut json)?;
    let header = safetensors::parse_header(&path, &json, file.len_bytes())?;
    let bad = |found: String| ForwardError::Input {
        path: path.clone(),
        what: format!("tensor {INPUT_IDS}"),
        expected: "int64 of shape [batch, seq], neither of them 0",
        found,
    };
    let tensor = header.tensors.get(&Fqn::from(INPUT_IDS)).ok_or_else(|| bad("no such tensor".to_owned()))?;
    match tensor.shape.0.as_slice() {
        &[batch, seq] if tensor.dtype == DType::I64 && batch > 0 && seq > 0 => {
            let ids = read_ids(file.as_ref(), tensor.range, &path)?;
            Ok(next_token(ids, as_usize(batch), as_usize(seq)))
        }
        _ => Err(bad(format!("{} {}", tensor.dtype, tensor.shape))),
    }
}

fn read_ids(file: &dyn ReadAt, range: ByteRange, path: &str) -> Result<Vec<u32>, ForwardError> {
    let mut bytes = vec![0; as_usize(range.len())];
    file.read_exact_at(range.start(), &mut bytes)?;
    let id = |(index, bytes): (usize, &[u8; 8])| {
        let id = i64::from_le_bytes(*bytes);
        // The largest is the target that does not count.
        u32::try_from(id).ok().filter(|id| *id != Tokens::IGNORED).ok_or_else(|| ForwardError::Input {
            path: path.to_owned(),
            what: format!("element {index} of {INPUT_IDS}"),
            expected: "a token's number",
            found: id.to_string(),
        })
    };
    bytes.as_chunks::<8>().0.iter().enumerate().map(id).collect()
}

fn next_token(ids: Vec<u32>, batch: usize, seq: usize) -> Tokens {
    let next = |row: &[u32]| row.iter().skip(1).copied().chain([Tokens::IGNORED]).collect::<Vec<_>>();
    let targets = ids.chunks(seq).flat_map(next).collect();
    Tokens { targets, starts: vec![0; ids.len()], ids, batch, seq }
}

fn write(
    store: &LocalStore,
    name: &str,
    (shape, logits): ([u64; 3], Vec<f32>),
    gradients: Option<Gradients>,
) -> Result<Forwarded, ForwardError> {
    let loss = gradients.as_ref().map(|gradients| gradients.loss);
    let mut results = vec![(Fqn::from("logits"), Shape::from(shape), logits)];
    results.extend(loss.map(|loss| (Fqn::from("loss"), Shape::from([]), vec![loss])));
    let gradients = gradients.map_or_else(Vec::new, |gradients| gradients.tensors);
    let count = gradients.len();
    results.extend(gradients);
    let tensors = results.iter().map(|(fqn, shape, _)| (fqn.clone(), DType::F32, shape.clone())).collect();
    WeightFiles::one(name, tensors).write::<ForwardError>(store, |(fqn, ..), bytes| {
        let found = results.iter().find(|(result, ..)| result == fqn);
        let (_, _, values) = found.expect("the file was made of these tensors");
        bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        Ok(())
    })?;
    store.sync_dir("")?;
    Ok(Forwarded { shape, loss, gradients: count })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// Two rows of three: the last token of a row has no target, and the second row does not see the first.
    #[test]
    fn targets_are_the_next_tokens_of_the_row() {
        let tokens = next_token(vec![5, 6, 7, 8, 9, 10], 2, 3);
        assert_eq!(tokens.targets, [6, 7, Tokens::IGNORED, 9, 10, Tokens::IGNORED]);
        assert_eq!((tokens.counted(), tokens.starts), (4, vec![0; 6]));
    }

    fn golden(name: &str) -> String {
        format!("{}/tests/data/golden/{name}", env!("CARGO_MANIFEST_DIR"))
    }

    fn tensors(path: &Path) -> BTreeMap<String, Vec<f32>> {
        let read = candle_core::safetensors::load(path, &candle_core::Device::Cpu).expect("a safetensors file");
        let flat = |tensor: candle_core::Tensor| tensor.flatten_all().and_then(|flat| flat.to_vec1()).expect("f32");
        read.into_iter()
            .filter(|(_, tensor)| tensor.dtype() == candle_core::DType::F32)
            .map(|(name, tensor)| (name, flat(tensor)))
            .collect()
    }

    fn relative(found: &[f32], expected: &[f32]) -> f32 {
        assert_eq!(found.len(), expected.len());
        let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|value| value * value).sum::<f32>().sqrt();
        norm(&mut found.iter().zip(expected).map(|(a, b)| a - b)) / norm(&mut expected.iter().copied())
    }

    fn request(output: PathBuf) -> ForwardRequest {
        ForwardRequest {
            model: format!("{}/tests/data/tiny-llama", env!("CARGO_MANIFEST_DIR")),
            adapter: None,
            quantization: QuantizationConfig::default(),
            streams: false,
            input: golden("tiny-llama-reference.safetensors").into(),
            output,
            gradients: false,
        }
    }

    /// Against PEFT's figures of the same tokens (tests/data/golden/README.md).
    #[test]
    fn logits_loss_and_gradients_are_those_of_peft() {
        let directory = tempfile::tempdir().expect("a directory");
        let output = directory.path().join("results.safetensors");
        let adapter = Some(golden("tiny-llama-peft-r4"));
        let request = ForwardRequest { adapter, gradients: true, ..request(output.clone()) };
        let done = forward(&request, &|_| {}).expect("a forward");
        assert_eq!((done.shape, done.gradients), ([1, 22, 2048], 36));
        let found = tensors(&output);
        let mut expected = tensors(golden("tiny-llama-peft-r4-gradients.safetensors").as_ref());
        expected.extend(tensors(golden("tiny-llama-peft-r4-logits.safetensors").as_ref()));
        assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
        for (name, expected) in &expected {
            let apart = relative(&found[name], expected);
            assert!(apart <= 1e-4, "{name}: {apart:e}");
        }
        let again = forward(&request, &|_| {}).expect_err("the output is there");
        assert_eq!(again.kind(), Kind::Conflict);
    }

    #[test]
    fn what_is_no_input_is_named() {
        let directory = tempfile::tempdir().expect("a directory");
        let output = directory.path().join("results.safetensors");
        let input = golden("tiny-llama-peft-r4-logits.safetensors").into();
        let error = forward(&ForwardRequest { input, ..request(output.clone()) }, &|_| {}).expect_err("no input_ids");
        assert!(error.to_string().contains("tensor input_ids: expected int64"), "{error}");
        assert_eq!((error.kind(), output.exists()), (Kind::Invalid, false));
    }
}
