//! The empty module: names, shapes and roles of tensors, without storage.

use serde::{Deserialize, Serialize};

use super::config::{Architecture, ModelConfig};
use super::rope::RopeParameters;
use super::{ModelError, bert, decoder, gpt2, t5};
use crate::format::ModelIndex;
use crate::types::{Fqn, Shape};

/// What a tensor is for; decides what is quantized and what is cut over the ranks.
///
/// Quantized are [`Role::Linear`] matrices only. That is what transformers with bitsandbytes does: linear layers, except
/// the output head (tied or not) and, in a base model without a head, the last module. Of experts it quantizes nothing where
/// they are fused; here each matrix of each expert is a linear layer's, as in files that store them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// The matrix of a linear layer, `[out, in]`; in GPT-2 `[in, out]`.
    Linear,
    /// A table that is looked up.
    Embedding,
    /// Weight or bias of a norm.
    Norm,
    /// The bias of a linear layer.
    Bias,
    /// The matrix that sends tokens to experts, or the gate of the shared expert; kept whole by all, never quantized.
    Router,
    /// The matrix of the output head, of the last module of a base model, or one that 16 bits are too few for (T5's `wo`);
    /// never quantized.
    Head,
    /// Anything else.
    Other,
}

/// One tensor that the architecture has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SkeletonTensor {
    /// Its name.
    pub fqn: Fqn,
    /// Its shape.
    pub shape: Shape,
    /// What it is for.
    pub role: Role,
    /// The layer that it belongs to, from 0; T5's decoder counts on from its encoder.
    pub layer: Option<u32>,
    /// Whether files may lack it.
    pub optional: bool,
}

/// A name whose tensor is another's (tied weights).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alias {
    /// The name without a tensor of its own.
    pub alias: Fqn,
    /// The tensor that it stands for.
    pub target: Fqn,
}

/// A tensor that every rank computes from the configuration; never read from a file, never left empty.
#[derive(Clone, Debug, PartialEq)]
pub struct Buffer {
    /// Its name.
    pub fqn: Fqn,
    /// Its shape.
    pub shape: Shape,
    /// How it is computed.
    pub kind: BufferKind,
}

/// How a buffer is computed.
#[derive(Clone, Debug, PartialEq)]
pub enum BufferKind {
    /// Inverse frequencies of rotary embedding, f32.
    RotaryInvFreq {
        /// The parameters.
        rope: RopeParameters,
    },
    /// 0, 1, 2 …, i64.
    PositionIds {
        /// How many.
        len: u64,
    },
    /// Zeros, i64.
    TokenTypeIds {
        /// How many.
        len: u64,
    },
}

/// The values of a buffer, row-major.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "the names are the types'")]
pub enum BufferValues {
    F32(Vec<f32>),
    I64(Vec<i64>),
}

impl Buffer {
    /// The values.
    #[must_use]
    pub fn compute(&self) -> BufferValues {
        match &self.kind {
            BufferKind::RotaryInvFreq { rope } => BufferValues::F32(rope.inv_freq()),
            BufferKind::PositionIds { len } => BufferValues::I64((0_i64..).zip(0..*len).map(|(id, _)| id).collect()),
            BufferKind::TokenTypeIds { len } => BufferValues::I64((0..*len).map(|_| 0).collect()),
        }
    }
}

/// Everything that an architecture has, without storage.
#[derive(Clone, Debug)]
pub struct Skeleton {
    /// The family.
    pub architecture: Architecture,
    /// The configuration; absent for [`Architecture::Generic`].
    pub config: Option<ModelConfig>,
    /// The tensors in the order in which a forward pass needs them: embeddings, layers, last norm, head.
    pub tensors: Vec<SkeletonTensor>,
    /// Tied names.
    pub aliases: Vec<Alias>,
    /// Computed tensors.
    pub buffers: Vec<Buffer>,
    /// The module that holds the base model, such as `model.`; files of a base model lack it.
    pub(super) base_prefix: &'static str,
    /// Names below these are of heads that this architecture does not have; transformers drops them too.
    pub(super) dropped: &'static [&'static str],
}

impl Skeleton {
    /// The skeleton of the architecture that a `config.json` names.
    ///
    /// # Errors
    /// [`ModelError`].
    pub fn from_config(config_json: &[u8]) -> Result<Self, ModelError> {
        ModelConfig::parse(config_json).map(Self::new)
    }

    /// The skeleton of a configuration.
    #[must_use]
    pub fn new(config: ModelConfig) -> Self {
        if let Some(stacks) = config.encoder_decoder {
            return t5::skeleton(config, stacks);
        }
        match config.architecture {
            Architecture::Bert => bert::skeleton(config),
            Architecture::Gpt2 => gpt2::skeleton(config),
            _ => decoder::skeleton(config),
        }
    }

    /// A skeleton of whatever the files have, in the natural order of names, for architectures that are not known.
    ///
    /// Roles go by name: a 2-D `*.weight` is a linear layer's, unless a part of its name says embedding (`embed`, `wte`,
    /// `wpe`, `token_type`), norm (`norm`, `ln`, `ln_1` …), router (`router`, `shared_expert_gate`, `gate` alone) or head
    /// (`lm_head`, `score`, `classifier`).
    #[must_use]
    pub fn generic(index: &ModelIndex) -> Self {
        let mut tensors: Vec<SkeletonTensor> = index
            .tensors
            .iter()
            .map(|(fqn, entry)| SkeletonTensor {
                fqn: fqn.clone(),
                shape: entry.shape.clone(),
                role: role_by_name(fqn.as_str(), entry.shape.dims()),
                layer: fqn.as_str().split('.').find_map(|part| part.parse().ok()),
                optional: false,
            })
            .collect();
        tensors.sort_by_cached_key(|tensor| natural_key(tensor.fqn.as_str()));
        Self {
            architecture: Architecture::Generic,
            config: None,
            tensors,
            aliases: Vec::new(),
            buffers: Vec::new(),
            base_prefix: "",
            dropped: &[],
        }
    }

    /// The number of parameters, tied ones once (`MO-2`), optional ones included.
    #[must_use]
    pub fn parameters(&self) -> u64 {
        let elements = |tensor: &SkeletonTensor| tensor.shape.elements().unwrap_or(u64::MAX);
        self.tensors.iter().map(elements).fold(0, u64::saturating_add)
    }

    /// The number of layers.
    #[must_use]
    pub fn layers(&self) -> u32 {
        self.tensors.iter().filter_map(|tensor| tensor.layer).max().map_or(0, |last| last.saturating_add(1))
    }

    /// The tensor that `fqn` stands for: itself, or the target of the alias.
    #[must_use]
    pub fn resolve<'a>(&'a self, fqn: &'a Fqn) -> &'a Fqn {
        self.aliases.iter().find(|alias| &alias.alias == fqn).map_or(fqn, |alias| &alias.target)
    }
}

/// Collects the tensors of one module after the other.
#[derive(Debug, Default)]
pub(super) struct Tensors {
    pub(super) list: Vec<SkeletonTensor>,
    pub(super) prefix: String,
    pub(super) layer: Option<u32>,
}

impl Tensors {
    /// Adds `{prefix}{name}`.
    pub(super) fn add(&mut self, name: &str, shape: impl Into<Shape>, role: Role) {
        let fqn = format!("{}{name}", self.prefix).into();
        self.list.push(SkeletonTensor { fqn, shape: shape.into(), role, layer: self.layer, optional: false });
    }

    /// Adds weight and, where there is one, bias of a linear layer.
    pub(super) fn linear(&mut self, name: &str, [rows, columns]: [u64; 2], bias: bool) {
        self.add(&format!("{name}.weight"), [rows, columns], Role::Linear);
        if bias {
            self.add(&format!("{name}.bias"), [rows], Role::Bias);
        }
    }

    /// Adds weight and bias of a layer norm.
    pub(super) fn layer_norm(&mut self, name: &str, size: u64) {
        self.add(&format!("{name}.weight"), [size], Role::Norm);
        self.add(&format!("{name}.bias"), [size], Role::Norm);
    }
}

fn role_by_name(name: &str, dims: usize) -> Role {
    let lower = name.to_ascii_lowercase();
    let has = |words: &[&str]| words.iter().any(|word| lower.contains(word));
    let part = |test: &dyn Fn(&str) -> bool| lower.split('.').any(test);
    if has(&["lm_head"]) || part(&|part| part == "score" || part == "classifier") {
        Role::Head
    } else if has(&["norm"]) || part(&|part| part == "ln" || part.starts_with("ln_")) {
        Role::Norm
    } else if has(&["embed", "wte", "wpe", "token_type"]) {
        Role::Embedding
    } else if lower.ends_with("bias") {
        Role::Bias
    } else if part(&|part| part == "router" || part == "shared_expert_gate") || lower.ends_with(".gate.weight") {
        Role::Router
    } else if dims == 2 && lower.ends_with(".weight") {
        Role::Linear
    } else {
        Role::Other
    }
}

/// Orders `h.2` before `h.10`.
fn natural_key(name: &str) -> Vec<(bool, u64, String)> {
    let key = |part: &str| match part.parse::<u64>() {
        Ok(number) => (false, number, String::new()),
        Err(_) => (true, 0, part.to_owned()),
    };
    name.split('.').map(key).collect()
}
