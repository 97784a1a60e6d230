//! What is asked: how a model is placed, and what is done with it.

use crate::adapter::AdapterConfig;
use crate::plan::{Chunking, DTypeRule, Placement, QuantizationRule, Strategy};
use crate::types::{DType, WorldSize};

/// What is done with a model, on how many ranks. All sizes that are counts of bytes or tokens say so in their names.
#[derive(Clone, Debug, PartialEq)]
pub struct Workload {
    /// The number of ranks.
    pub world: WorldSize,
    /// Which ranks read.
    pub strategy: Strategy,
    /// What ranks keep.
    pub placement: Placement,
    /// With [`Placement::Layers`], the ranks' parts of the model in proportion; a rank that is not listed has 1.
    pub split: Vec<u32>,
    /// What is quantized.
    pub quantization: QuantizationRule,
    /// The element type of the weights in files.
    pub source_dtype: DType,
    /// What that becomes where nothing is quantized.
    pub dtype: DTypeRule,
    /// How a reader cuts what it reads.
    pub chunking: Chunking,
    /// Sequences that a rank computes on at once.
    pub batch_sequences: u64,
    /// Tokens of one sequence.
    pub sequence_tokens: u64,
    /// Where weights lie.
    pub memory: MemoryKind,
    /// What is done.
    pub purpose: Purpose,
}

/// Where weights lie.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MemoryKind {
    /// In the memory of a host.
    #[default]
    Host,
    /// On a CUDA device for each rank.
    Device,
}

/// What is done with the model.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Purpose {
    /// It is loaded and held.
    #[default]
    Load,
    /// It generates text: all sequences at their full length.
    Inference {
        /// The element type of keys and values.
        cache_dtype: DType,
        /// How attention is computed.
        attention: Attention,
    },
    /// It is trained.
    Train(Training),
}

/// How it is trained.
#[derive(Clone, Debug, PartialEq)]
pub struct Training {
    /// Which parameters.
    pub method: Method,
    /// By which program.
    pub engine: TrainEngine,
    /// What keeps the moments.
    pub optimizer: Optimizer,
    /// Whether blocks are computed again in the backward pass.
    pub activation_checkpointing: bool,
    /// How attention is computed.
    pub attention: Attention,
}

/// Which parameters are trained.
#[derive(Clone, Debug, PartialEq)]
pub enum Method {
    /// All.
    Full,
    /// An adapter's; QLoRA when the base is quantized.
    Lora(Box<AdapterConfig>),
}

/// The program that trains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrainEngine {
    /// This project's trainer: f32, where the weights are; base and optimizer are cut over the ranks as its plan says, and the
    /// optimizer's rows lie in host memory.
    Weightcast,
    /// PyTorch in pure bf16 on CUDA devices: FSDP with full sharding for [`Placement::Shard`], data parallel for
    /// [`Placement::Replicate`]; quantized layers are bitsandbytes'.
    PyTorch {
        /// Whether parameters, gradients and optimizer lie in host memory (FSDP's CPU offload).
        offload: bool,
    },
}

/// What keeps AdamW's two moments of each trained parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Optimizer {
    /// f32: 8 bytes a parameter.
    F32,
    /// bitsandbytes' 8 bits: 2 bytes a parameter, and for each moment an f32 absmax of 256 values.
    EightBit,
    /// The parameters' own type, as torch's AdamW does by itself: 4 bytes a parameter in bf16.
    AsParameters,
}

/// How attention is computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Attention {
    /// Without keeping scores (FlashAttention and its like).
    #[default]
    Flash,
    /// With all scores of a sequence, tokens squared.
    Exact,
}

impl Workload {
    /// Loading as a job without any settings does it: rank 0 reads in chunks of 256 KiB with four threads, matrices are cut
    /// over the ranks, nothing is quantized or converted, in host memory. Fields are public, to be changed.
    #[must_use]
    pub fn load(world: WorldSize, source_dtype: DType) -> Self {
        Self {
            world,
            strategy: Strategy::LowMemory,
            placement: Placement::Shard,
            split: Vec::new(),
            quantization: QuantizationRule::None,
            source_dtype,
            dtype: DTypeRule::Keep,
            chunking: Chunking { chunk_bytes: 256 << 10, reader_threads: 4, queue_chunks: 64 },
            batch_sequences: 1,
            sequence_tokens: 1,
            memory: MemoryKind::Host,
            purpose: Purpose::Load,
        }
    }

    /// Tokens that a rank computes on at once.
    pub(super) const fn tokens(&self) -> u64 {
        self.batch_sequences.saturating_mul(self.sequence_tokens)
    }

    /// Whether linear layers are quantized.
    pub(super) fn is_quantized(&self) -> bool {
        self.quantization != QuantizationRule::None
    }
}

impl Optimizer {
    /// Bytes of both moments of `parameters` parameters whose type has `element_bytes`.
    #[must_use]
    pub const fn moments_bytes(self, parameters: u64, element_bytes: u64) -> u64 {
        match self {
            Self::F32 => 8 * parameters,
            Self::EightBit => 2 * (parameters + 4 * parameters.div_ceil(256)),
            Self::AsParameters => 2 * element_bytes * parameters,
        }
    }
}
