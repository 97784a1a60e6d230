//! The checkpoint's table of contents: encode, decode, check coverage, seal. The contract is docs/FORMAT.md.
//!
//! Owns: [`Manifest`], [`ShardReceipt`], [`seal`] and the checks `FM-2` (own digest) and `FM-3` (coverage).
//! Refuses to know: files, directories, ranks' memory; it is given receipts and gives bytes.

mod codec;
mod coverage;
mod extras;
mod seal;

use serde::{Deserialize, Serialize};

pub use codec::{MAX_MANIFEST_BYTES, ManifestError};
pub use coverage::CoverageError;
pub use extras::{Extra, extras};
pub use seal::{SealError, SealRequest, seal};

use crate::plan::{Encoding, Fp8Scales, Part, Placement, f32Bits};
use crate::types::{
    Attempt, ByteRange, DType, DigestTable, Fqn, Generation, Rank, Shape, Step, TensorDigest, WorldSize,
};

/// The version of the format that this build writes.
pub const MANIFEST_VERSION: u32 = 1;

/// A committed checkpoint in all its parts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The version of the format.
    pub weightcast_manifest: u32,
    /// The step that was saved.
    pub step: Step,
    /// The try that was committed.
    pub attempt: Attempt,
    /// The generation that wrote it.
    pub generation: Generation,
    /// The number of ranks that wrote it.
    pub world: WorldSize,
    /// How tensors were cut.
    pub placement: Placement,
    /// The model in words.
    pub model: String,
    /// The text of config.json.
    pub config_json: Option<String>,
    /// The trainer's state.
    pub trainer: TrainerState,
    /// The shard files.
    pub files: Vec<ShardFile>,
    /// The logical tensors in model order.
    pub tensors: Vec<SavedTensor>,
    /// Tied weights: alias, target.
    pub aliases: Vec<(Fqn, Fqn)>,
}

/// Where training stood.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainerState {
    /// Optimizer steps done.
    pub step: Step,
    /// What a training run needs to go on; absent in a checkpoint of a model that was only loaded. The tensors are then
    /// those of the run and not the model's: adapters under PEFT's names (or weights, when all are trained), and
    /// `optimizer.exp_avg.<name>` and `optimizer.exp_avg_sq.<name>` for each.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub training: Option<Box<TrainingState>>,
}

/// A training run at a step boundary, without its tensors. Randomness needs no state: it is a function of
/// (seed, step, sample).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainingState {
    /// The `[train]` section that the run follows, with every default filled in.
    pub recipe: serde_json::Value,
    /// `adapter_config.json` of PEFT; absent when all weights are trained.
    pub adapter: Option<serde_json::Value>,
    /// The model that was loaded, as the user named it.
    pub base_model: String,
    /// The digest of all tensors of the base as they lay in memory, quantized or not.
    pub base_digest: String,
    /// The digest of the training data as it was tokenized and packed.
    pub data_digest: String,
    /// The global data cursor: sequences consumed since the first step, over all epochs and ranks.
    pub samples: u64,
    /// Tokens that counted in the loss since the first step.
    pub tokens: u64,
    /// The step and loss of the best evaluation.
    pub best: Option<BestEvaluation>,
    /// Evaluations since the best one.
    pub evaluations_since_best: u32,
    /// The step after which the last evaluation was made.
    pub last_evaluation: Option<Step>,
}

/// The evaluation with the lowest loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BestEvaluation {
    /// After this step.
    pub step: Step,
    /// Mean loss per token in nats, as the bits of an f32.
    pub loss: f32Bits,
}

/// One shard file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardFile {
    /// Its name within the checkpoint's directory.
    pub name: String,
    /// The rank that wrote it.
    pub rank: Rank,
    /// Its length.
    pub bytes: u64,
    /// Its block digests.
    pub digest_table: DigestTable,
}

/// One logical tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedTensor {
    /// Its name.
    pub fqn: Fqn,
    /// Its logical shape.
    pub shape: Shape,
    /// Its form.
    pub encoding: Encoding,
    /// Whether it was cut over the ranks.
    pub sharded: bool,
    /// The mean of nested statistics.
    pub nested_offset: Option<f32Bits>,
    /// The digest of all its bytes, independent of the number of ranks.
    pub digest: TensorDigest,
    /// Its components.
    pub parts: Vec<SavedPart>,
}

/// One component of a logical tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedPart {
    /// Its role.
    pub part: Part,
    /// Its name in the shard files.
    pub name: String,
    /// Its element type.
    pub dtype: DType,
    /// Its shape, whole.
    pub shape: Shape,
    /// Where its bytes are, ordered by `at`.
    pub chunks: Vec<SavedChunk>,
}

/// A contiguous range of a component in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedChunk {
    /// Index into [`Manifest::files`].
    pub file: u32,
    /// The bytes of the file.
    pub range: ByteRange,
    /// Their position in the component.
    pub at: u64,
    /// Their digest.
    pub digest: TensorDigest,
}

/// What one rank says it wrote.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardReceipt {
    /// The rank.
    pub rank: Rank,
    /// Its file; absent when it owns no byte.
    pub file: Option<ShardFile>,
    /// The chunks in it: tensor index in the plan, component index, and where they are (`file` is 0).
    pub chunks: Vec<ReceiptChunk>,
    /// The nested offsets of the tensors that the rank is the reader of: tensor index and bits.
    pub nested_offsets: Vec<(usize, f32Bits)>,
    /// Where training stands; only rank 0 says it, and only when it trains.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub training: Option<Box<TrainingState>>,
}

/// A chunk in a receipt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceiptChunk {
    /// Index into the plan's tensors.
    pub tensor: usize,
    /// Index into the tensor's components.
    pub component: usize,
    /// Where it is; `file` is 0 until sealed.
    pub chunk: SavedChunk,
}

/// The name of a component in a shard file, as the format's own tool names it.
#[must_use]
pub fn part_name(fqn: &Fqn, encoding: &Encoding, part: Part) -> String {
    let name = fqn.as_str();
    let module = name.strip_suffix(".weight").unwrap_or(name);
    match (encoding, part) {
        (Encoding::Hqq { .. }, part) => {
            let end = match part {
                Part::Weight => "W_q",
                Part::Scales => "scale",
                _ => "zero",
            };
            format!("{module}.{end}")
        }
        (Encoding::Gptq { .. } | Encoding::Awq { .. }, part) => {
            let end = match part {
                Part::Weight => "qweight",
                Part::Zeros => "qzeros",
                part => statistic(part),
            };
            format!("{module}.{end}")
        }
        (Encoding::Fp8 { scales: Fp8Scales::Block { .. }, .. }, Part::Scales) => format!("{module}.weight_scale_inv"),
        (Encoding::Fp8 { .. }, Part::Scales) => format!("{module}.weight_scale"),
        (_, Part::Weight) => name.to_owned(),
        (Encoding::Int8, _) => format!("{module}.SCB"),
        (Encoding::Mlx { .. }, part) => format!("{module}.{}", statistic(part)),
        (_, Part::Absmax) => format!("{name}.absmax"),
        (_, Part::NestedAbsmax) => format!("{name}.nested_absmax"),
        (_, Part::NestedOffset) => format!("{name}.nested_offset"),
        (_, part) => format!("{name}.{}", statistic(part)),
    }
}

/// What the tools call it.
const fn statistic(part: Part) -> &'static str {
    match part {
        Part::Weight => "weight",
        Part::Absmax | Part::RowAbsmax => "absmax",
        Part::NestedAbsmax => "nested_absmax",
        Part::NestedOffset => "nested_offset",
        Part::Scales => "scales",
        Part::Biases => "biases",
        Part::Zeros => "zeros",
        Part::GroupIndex => "g_idx",
    }
}
