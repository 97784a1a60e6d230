//! The plan of a load: which rank reads, what each keeps, in which order it moves, and what memory that takes.
//!
//! Owns: [`LoadPlan`] and the pure function that makes it from the index, the skeleton and the job.
//! Refuses to know: files, sockets, threads; a plan is data.
//!
//! Invariants:
//! - `PL-1`: the components of an encoding depend on the shape alone (`quant::Encoding`).
//! - `PL-2`: the kept ranges of all ranks cover every component; the owned ranges cover it exactly once (`cut`).
//! - `PL-3`: the sequence of pieces is a function of the plan alone, so every rank walks the same one (`pieces`).
//! - `PL-4`: an expert's matrices have one owner, a function of the expert's number and the number of ranks (`experts`).

mod build;
mod cut;
mod experts;
mod ggml_mix;
mod layers;
mod memory;
mod pieces;
mod select;
mod stream;
mod train;
mod train_memory;

use serde::{Deserialize, Serialize};

pub(crate) use build::assemble;
pub use build::{LoadRequest, PlanError, Quantized, plan};
pub use cut::Holding;
pub use ggml_mix::{GgmlMix, fitting};
pub use memory::{
    ARENA_ALIGN_BYTES, CUDA_CONTEXT_BYTES, CUDA_HOST_BYTES, DeviceBudget, DeviceRule, MemoryBudget,
    PROCESS_OVERHEAD_BYTES, RankMemory, STAGING_BYTES, aligned,
};
pub use pieces::{Chunking, Piece, SourceSpan};
pub use select::{DTypeRule, ModuleRule, QuantizationRule, names};
pub use train::{Resumed, TrainPlan, exp_avg, exp_avg_sq, state_plan};
pub use train_memory::{StepSizes, TrainMemory};

use crate::format::{Encoding as SourceEncoding, FileEntry};
pub use crate::quant::{Claim, Component, Cut, Encoding, Fp8Scales, Part};
pub use crate::types::f32Bits;
use crate::types::{ByteRange, DType, DigestTable, Fqn, Rank, Shape, WorldSize};

/// The version of the plan's own form; ranks of another version refuse it.
pub const PLAN_VERSION: u32 = 4;

/// Which ranks read the weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    /// Rank 0 reads, quantizes and sends; the others build empty modules and receive.
    #[default]
    LowMemory,
    /// Each rank reads what it keeps, and nothing is sent.
    Full,
    /// Every rank reads a part of the tensors and sends; each byte is still read once.
    Striped,
    /// Each rank reads what it keeps of a layer when the layer is needed, and lets it go afterwards.
    Streaming,
}

impl Strategy {
    /// The name in job files and flags.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::LowMemory => "low-memory",
            Self::Full => "full",
            Self::Striped => "striped",
            Self::Streaming => "streaming",
        }
    }
}

/// What each rank keeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Placement {
    /// Everything (data parallel).
    Replicate,
    /// Dim 0 of every large tensor is cut over the ranks; small tensors are kept by all (FSDP-like).
    #[default]
    Shard,
    /// Whole experts go to ranks (expert parallel); all else is cut as with [`Placement::Shard`].
    Experts,
    /// Whole layers go to ranks, in proportion to what each can take (a device map); small tensors are kept by all.
    Layers,
}

/// Everything that the ranks need to load together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadPlan {
    /// [`PLAN_VERSION`].
    pub version: u32,
    /// The model in words, as the user named it.
    pub model: String,
    /// The text of config.json, from which every rank builds its skeleton; absent for bare safetensors.
    pub config_json: Option<String>,
    /// The number of ranks.
    pub world: WorldSize,
    /// Which ranks read.
    pub strategy: Strategy,
    /// What ranks keep.
    pub placement: Placement,
    /// How tensors are cut for reading and sending.
    pub chunking: Chunking,
    /// Whether ranks report the digests of what they own when they have loaded.
    pub digests: bool,
    /// Where the weights are to lie, and what moves them.
    pub device: DeviceRule,
    /// The directory that all file names below are relative to.
    pub root: String,
    /// What was made of the model before, and where what is made now is kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<CachePlan>,
    /// The files.
    pub files: Vec<FileEntry>,
    /// What tells the version of each file from others, for a model whose store knows; else empty. Every rank reads these
    /// versions or nothing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub versions: Vec<String>,
    /// The digest tables of the files, for a checkpoint; empty for a model.
    pub digest_tables: Vec<DigestTable>,
    /// The tensors in the order in which they move.
    pub tensors: Vec<TensorPlan>,
    /// Names that are another tensor's (tied weights): alias, target.
    pub aliases: Vec<(Fqn, Fqn)>,
    /// What follows the load, when the ranks train.
    pub train: Option<Box<TrainPlan>>,
    /// Models that the ranks hold beside this one; they have none beside them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub others: Vec<OtherModel>,
}

impl LoadPlan {
    /// Whether ranks that have carried out `other` hold just what this plan has them hold, if the files are the same: whatever
    /// follows the load, and whatever a cache has.
    #[must_use]
    pub fn holds_as(&self, other: &Self) -> bool {
        let base = |plan: &Self| {
            let others: Vec<OtherModel> =
                plan.others.iter().map(|other| OtherModel { plan: base_of(&other.plan), ..other.clone() }).collect();
            Self { others, ..base_of(plan) }
        };
        base(self) == base(other)
    }
}

/// Without what is of no matter to what ranks hold.
fn base_of(plan: &LoadPlan) -> LoadPlan {
    LoadPlan { model: String::new(), train: None, cache: None, ..plan.clone() }
}

/// A model beside the job's own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OtherModel {
    /// Its name in the job.
    pub name: String,
    /// Its load.
    pub plan: LoadPlan,
}

/// The name of the job's own model among those that ranks hold.
pub const OWN_MODEL: &str = "base";

/// An entry of the cache, as a load uses it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CachePlan {
    /// The entry's directory.
    pub root: String,
    /// Its files; in chunks their numbers follow those of [`LoadPlan::files`].
    pub files: Vec<FileEntry>,
    /// Their digest tables.
    pub digest_tables: Vec<DigestTable>,
    /// Whether readers write what they make into the entry.
    pub writes: bool,
}

/// One tensor of the plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorPlan {
    /// Its name.
    pub fqn: Fqn,
    /// Its logical shape.
    pub shape: Shape,
    /// The form in which it is kept.
    pub encoding: Encoding,
    /// Whether it is cut over the ranks or kept by all.
    pub sharded: bool,
    /// The rank that keeps all of a sharded tensor, when whole layers or experts go to ranks.
    pub owner: Option<Rank>,
    /// The rank that reads it (unless each reads its own, [`Strategy::Full`] and [`Strategy::Streaming`]), and that owns it if it is not sharded.
    pub reader: Rank,
    /// Where its bytes are.
    pub input: Input,
}

/// Where the bytes of a tensor come from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Input {
    /// Elements in a model's file, to be converted or quantized.
    Elements {
        /// Index into [`LoadPlan::files`].
        file: u32,
        /// The bytes in the file.
        range: ByteRange,
        /// Element type in the file (logical type for encoded blocks).
        dtype: DType,
        /// How the bytes are encoded in the file.
        encoding: SourceEncoding,
    },
    /// Components that are in the plan's form already, as a checkpoint has them.
    Stored {
        /// For each component of the encoding, in order, the chunks that make it up, in order and without holes.
        parts: Vec<Vec<StoredChunk>>,
        /// The value of [`Part::NestedOffset`], which is no tensor in the file.
        nested_offset: Option<f32Bits>,
    },
}

impl Input {
    /// Whether the file has the bytes of `encoding` already, for a tensor that is read as elements.
    #[must_use]
    pub fn is_as_it_is(&self, encoding: Encoding) -> bool {
        match (self, encoding) {
            (Self::Elements { dtype, encoding: SourceEncoding::Plain, .. }, Encoding::Plain { dtype: to }) => {
                *dtype == to
            }
            // Blocks and packed components decode to f32.
            (Self::Elements { encoding: SourceEncoding::Ggml(blocks), .. }, Encoding::Ggml { ggml_type }) => {
                blocks.ggml_type == ggml_type
            }
            (
                Self::Elements { encoding: SourceEncoding::Ggml(_) | SourceEncoding::Packed(_), .. },
                Encoding::Plain { dtype: to },
            ) => to == DType::F32,
            _ => false,
        }
    }
}

/// A contiguous part of a component in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredChunk {
    /// Index into [`LoadPlan::files`], and after them into [`CachePlan::files`].
    pub file: u32,
    /// The bytes in the file.
    pub range: ByteRange,
    /// Where they belong in the component.
    pub at: u64,
}

impl TensorPlan {
    /// Elements of one row (the product of all dims but the first); 1 for a scalar. A tensor without rows may have rows
    /// that are too long to count: then as many as 64 bits can.
    #[must_use]
    pub fn row_elements(&self) -> u64 {
        self.shape.0.iter().skip(1).fold(1, |product: u64, &size| product.saturating_mul(size))
    }

    /// The number of elements. The plan was checked for overflow when it was made.
    #[must_use]
    pub fn elements(&self) -> u64 {
        self.shape.0.iter().product()
    }

    /// The components of the tensor, whole. The plan was checked for overflow when it was made.
    #[must_use]
    pub fn components(&self) -> Vec<Component> {
        self.encoding.components(&self.shape).unwrap_or_default()
    }
}

impl LoadPlan {
    /// The bytes that storage must give up: each byte of each input once.
    #[must_use]
    pub fn input_bytes(&self) -> u64 {
        self.tensors
            .iter()
            .map(|tensor| match &tensor.input {
                Input::Elements { range, .. } => range.len(),
                Input::Stored { parts, .. } => parts.iter().flatten().map(|chunk| chunk.range.len()).sum(),
            })
            .sum()
    }
}
