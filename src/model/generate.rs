//! New models of a chosen size with random weights: sizes, config.json, files. Writing them is the caller's.

use serde_json::{Value, json};

use super::config::{Architecture, ModelConfig};
use super::fill::{Init, Values};
use super::preset::Preset;
use super::{Role, Skeleton};
use crate::error::{Classify, Kind};
use crate::format::safetensors::build_header;
use crate::types::{ByteRange, DType, Fqn, Shape, as_u64, as_usize};

/// A file's tensors have at most this many bytes, unless one tensor alone has more.
pub const DEFAULT_FILE_BYTES: u64 = 1_000_000_000;

/// Models of fewer parameters have hardly a layer.
const MIN_PARAMETERS: u64 = 100_000;
/// Beyond the largest published dense models.
const MAX_PARAMETERS: u64 = 1_000_000_000_000;

/// The families whose sizes are chosen here.
pub const GENERATED: [Architecture; 8] = [
    Architecture::Llama,
    Architecture::Mistral,
    Architecture::Qwen2,
    Architecture::Qwen3,
    Architecture::Mixtral,
    Architecture::Qwen2Moe,
    Architecture::Qwen3Moe,
    Architecture::Bert,
];

/// What model to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GenerateRequest {
    /// The family, one of [`GENERATED`].
    pub architecture: Architecture,
    /// About how many parameters.
    pub parameters: u64,
    /// Element type of all weights: F16, BF16 or F32.
    pub dtype: DType,
    /// What the values follow from.
    pub seed: u64,
    /// Bytes of tensors in one file at most; see [`DEFAULT_FILE_BYTES`].
    pub max_file_bytes: u64,
}

/// Why there is no such model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GenerateError {
    /// The number of parameters is out of range.
    #[error("parameters: expected {MIN_PARAMETERS} to {MAX_PARAMETERS}, found {found}")]
    Parameters {
        /// The number.
        found: u64,
    },
    /// A text is no number of parameters.
    #[error("parameters: expected a number such as 135M, 1B or 1.5B, found {found:?}")]
    NotACount {
        /// The text.
        found: String,
    },
    /// The element type is none of weights.
    #[error("dtype: expected F16, BF16 or F32, found {found}")]
    DType {
        /// The type.
        found: DType,
    },
    /// The family has no layers of its own, or its sizes are not chosen here.
    #[error("architecture: expected one of {}, found {found}", GENERATED.map(Architecture::name).join(", "))]
    Architecture {
        /// The family's name.
        found: &'static str,
    },
}

impl Classify for GenerateError {
    fn kind(&self) -> Kind {
        Kind::Invalid
    }
}

/// Everything about a new model but its bytes, which [`NewModel::fill`] makes.
#[derive(Clone, Debug)]
pub struct NewModel {
    /// The text of config.json.
    pub config_json: String,
    /// The weight files.
    pub files: Vec<NewFile>,
    /// The text of model.safetensors.index.json, where there are several files.
    pub index_json: Option<String>,
    /// The number of parameters.
    pub parameters: u64,
    values: Values,
}

/// One weight file of a new model.
#[derive(Clone, Debug)]
pub struct NewFile {
    /// Its name.
    pub name: String,
    /// Its length.
    pub len_bytes: u64,
    header: Vec<u8>,
    tensors: Vec<NewTensor>,
}

#[derive(Clone, Copy, Debug)]
struct NewTensor {
    number: u64,
    init: Init,
    range: ByteRange,
}

impl NewModel {
    /// Fills `out` with the bytes of file number `file` from `offset`; zeros beyond its end. Any range of any file, in
    /// any order, on any number of threads, gives the same file (`MO-3`).
    pub fn fill(&self, file: usize, offset: u64, out: &mut [u8]) {
        out.fill(0);
        let Some(file) = self.files.get(file) else { return };
        let Some(wanted) = ByteRange::with_len(offset, as_u64(out.len())) else { return };
        let part_of = |whole: ByteRange| whole.intersect(wanted);
        let header = ByteRange::with_len(0, as_u64(file.header.len())).unwrap_or_default();
        if let Some(part) = part_of(header) {
            let source = file.header.get(as_usize(part.start())..as_usize(part.end())).unwrap_or_default();
            out[..source.len()].copy_from_slice(source);
        }
        let first = file.tensors.partition_point(|tensor| tensor.range.end() <= wanted.start());
        for tensor in file.tensors.iter().skip(first) {
            if tensor.range.start() >= wanted.end() {
                break;
            }
            if let Some(part) = part_of(tensor.range) {
                let target = as_usize(part.start() - offset)..as_usize(part.end() - offset);
                self.values.fill(tensor.number, tensor.init, part.start() - tensor.range.start(), &mut out[target]);
            }
        }
    }

    /// The length of all weight files together.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.len_bytes).sum()
    }
}

/// Chooses the sizes of a model and lays out its files.
///
/// # Errors
/// [`GenerateError`].
pub fn generate(request: &GenerateRequest) -> Result<NewModel, GenerateError> {
    let found = request.parameters;
    if !(MIN_PARAMETERS..=MAX_PARAMETERS).contains(&found) {
        return Err(GenerateError::Parameters { found });
    }
    if !GENERATED.contains(&request.architecture) {
        return Err(GenerateError::Architecture { found: request.architecture.name() });
    }
    new_model(super::size::choose(request.architecture, request.parameters).config_json(request.dtype), request)
}

/// Lays out the files of a preset.
///
/// # Errors
/// [`GenerateError::DType`].
pub fn generate_preset(preset: Preset, dtype: DType, seed: u64) -> Result<NewModel, GenerateError> {
    let (architecture, parameters, max_file_bytes) = (Architecture::Gpt2, 0, DEFAULT_FILE_BYTES);
    new_model(preset.config_json(dtype), &GenerateRequest { architecture, parameters, dtype, seed, max_file_bytes })
}

fn new_model(config_json: String, request: &GenerateRequest) -> Result<NewModel, GenerateError> {
    let config = ModelConfig::parse(config_json.as_bytes()).expect("a configuration of ours is one that we read");
    let skeleton = Skeleton::new(config);
    // GPT-2 (radford2019): the weights of residual layers are smaller by 1 / sqrt(N), N being two per block.
    let part = 1.0 / f64::from(2 * skeleton.layers().max(1)).sqrt();
    let values = Values::new(request.dtype, request.seed, part).ok_or(GenerateError::DType { found: request.dtype })?;
    let files = layout(&skeleton, request);
    let index_json = (files.len() > 1).then(|| index_json(&skeleton, &files, request.dtype));
    let files = files.into_iter().map(|(file, _)| file).collect();
    Ok(NewModel { config_json, files, index_json, parameters: skeleton.parameters(), values })
}

/// The files, each with the names of its tensors.
fn layout(skeleton: &Skeleton, request: &GenerateRequest) -> Vec<(NewFile, Vec<Fqn>)> {
    let bytes = |shape: &Shape| shape.bytes(request.dtype).expect("sizes are bounded by MAX_PARAMETERS");
    let mut groups: Vec<Vec<usize>> = Vec::new();
    let mut room = 0;
    for (number, tensor) in skeleton.tensors.iter().enumerate() {
        let need = bytes(&tensor.shape);
        match groups.last_mut() {
            Some(group) if need <= room => group.push(number),
            _ => {
                groups.push(vec![number]);
                room = request.max_file_bytes;
            }
        }
        room = room.saturating_sub(need);
    }
    let count = groups.len();
    let file = |(index, group): (usize, Vec<usize>)| {
        let tensors: Vec<(Fqn, DType, Shape)> = group
            .iter()
            .filter_map(|&number| skeleton.tensors.get(number))
            .map(|tensor| (tensor.fqn.clone(), request.dtype, tensor.shape.clone()))
            .collect();
        let header = build_header(&tensors, &[("format", "pt")]).expect("sizes are bounded by MAX_PARAMETERS");
        let mut offset = as_u64(header.len());
        let mut placed = Vec::with_capacity(group.len());
        for (&number, (_, _, shape)) in group.iter().zip(&tensors) {
            let range = ByteRange::with_len(offset, bytes(shape)).unwrap_or_default();
            let role = skeleton.tensors.get(number).map_or(Role::Other, |tensor| tensor.role);
            placed.push(NewTensor { number: as_u64(number), init: init(role, tensors.get(placed.len())), range });
            offset = range.end();
        }
        let name = match count {
            1 => "model.safetensors".to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
        };
        let names = tensors.into_iter().map(|(fqn, ..)| fqn).collect();
        (NewFile { name, len_bytes: offset, header, tensors: placed }, names)
    };
    groups.into_iter().enumerate().map(file).collect()
}

/// As transformers initializes: weights around 0, norms 1, biases 0.
fn init(role: Role, tensor: Option<&(Fqn, DType, Shape)>) -> Init {
    let name = tensor.map_or("", |(fqn, ..)| fqn.as_str());
    let bias = name.ends_with("bias");
    match role {
        _ if bias => Init::Zeros,
        // Only GPT-2's are of this name.
        Role::Linear if name.ends_with(".c_proj.weight") => Init::Residual,
        Role::Norm => Init::Ones,
        _ => Init::Normal,
    }
}

/// The index as transformers writes it: totals, then names in order.
fn index_json(skeleton: &Skeleton, files: &[(NewFile, Vec<Fqn>)], dtype: DType) -> String {
    let mut weight_map: Vec<(&str, &str)> =
        files.iter().flat_map(|(file, names)| names.iter().map(|name| (name.as_str(), file.name.as_str()))).collect();
    weight_map.sort_unstable();
    let weight_map: serde_json::Map<String, Value> =
        weight_map.into_iter().map(|(name, file)| (name.to_owned(), file.into())).collect();
    let parameters = skeleton.parameters();
    let metadata = json!({"total_parameters": parameters, "total_size": parameters * dtype.size_bytes()});
    pretty(&json!({"metadata": metadata, "weight_map": weight_map}))
}

pub(super) fn pretty(value: &Value) -> String {
    let mut text = serde_json::to_string_pretty(value).expect("a value always becomes text");
    text.push('\n');
    text
}

/// Reads a number of parameters such as `135M`, `1B`, `1.5B` or `250000`.
///
/// # Errors
/// [`GenerateError::NotACount`].
pub fn parse_parameters(text: &str) -> Result<u64, GenerateError> {
    let parse = || {
        let unit = text.chars().last()?;
        let (digits, zeros) = match unit.to_ascii_uppercase() {
            'K' => (text.get(..text.len() - 1)?, 3_usize),
            'M' => (text.get(..text.len() - 1)?, 6),
            'B' => (text.get(..text.len() - 1)?, 9),
            'T' => (text.get(..text.len() - 1)?, 12),
            _ => (text, 0),
        };
        let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
        let only_digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
        if whole.is_empty() || !only_digits(whole) || !only_digits(fraction) || fraction.len() > zeros {
            return None;
        }
        // The fraction's digits stand before the zeros that are left of the unit.
        format!("{whole}{fraction}{}", "0".repeat(zeros - fraction.len())).parse().ok()
    };
    parse().ok_or_else(|| GenerateError::NotACount { found: text.to_owned() })
}
