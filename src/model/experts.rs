//! The experts of Mixtral, Qwen2-MoE and Qwen3-MoE: their part of config.json, and the tensors of a sparse layer.
//!
//! Every expert's matrix is a tensor of its own, `[out, in]`, under the name that published files have; `fused` makes the
//! same of files that store the experts of a layer together. Refuses to know: how tokens find their experts.

use serde::Deserialize;

use super::ModelError;
use super::config::{Architecture, MAX_DIM, ModelConfig, within};
use super::skeleton::{Role, Tensors};

/// More experts in all layers than any published model has (Kimi K2: 23,424), and few enough that a skeleton stays small.
pub(super) const MAX_EXPERTS: u64 = 1 << 17;

/// The experts of a model's sparse layers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Experts {
    /// Experts of one sparse layer.
    pub count: u64,
    /// Experts that compute one token.
    pub per_token: u64,
    /// Size within one expert.
    pub intermediate_size: u64,
    /// Size within the expert that computes every token, where there is one (Qwen2-MoE).
    pub shared_intermediate_size: Option<u64>,
    /// Whether the weights of the experts that compute a token are scaled to the sum 1.
    pub norm_topk_prob: bool,
    /// Of so many layers one is sparse, the last; 1 for all (`decoder_sparse_step`).
    pub sparse_step: u64,
    /// Layers that are dense all the same (`mlp_only_layers`).
    pub dense_layers: Vec<u64>,
}

impl Experts {
    /// Whether `layer`, from 0, has experts in place of one MLP.
    #[must_use]
    pub fn is_sparse(&self, layer: u32) -> bool {
        let layer = u64::from(layer);
        !self.dense_layers.contains(&layer) && (layer + 1).is_multiple_of(self.sparse_step)
    }
}

/// The fields of config.json that only mixtures of experts have.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Raw {
    num_experts: Option<u64>,
    num_local_experts: Option<u64>,
    num_experts_per_tok: Option<u64>,
    moe_intermediate_size: Option<u64>,
    shared_expert_intermediate_size: Option<u64>,
    norm_topk_prob: Option<bool>,
    decoder_sparse_step: Option<u64>,
    mlp_only_layers: Option<Vec<u64>>,
}

/// The experts that a `config.json` of `architecture` states; nothing for an architecture that has none.
pub(super) fn parse(
    config_json: &[u8],
    architecture: Architecture,
    layers: u64,
    intermediate_size: Option<u64>,
) -> Result<Option<Experts>, ModelError> {
    if !architecture.has_experts() {
        return Ok(None);
    }
    let raw: Raw = serde_json::from_slice(config_json)?;
    let mixtral = architecture == Architecture::Mixtral;
    // transformers reads either name for Mixtral and Qwen3-MoE, and writes its own.
    let (field, count) = match mixtral {
        true => ("num_local_experts", raw.num_local_experts.or(raw.num_experts)),
        false => ("num_experts", raw.num_experts.or(raw.num_local_experts)),
    };
    let count = within(field, count, MAX_EXPERTS)?;
    within("num_hidden_layers * experts", layers.checked_mul(count), MAX_EXPERTS)?;
    let per_token = within("num_experts_per_tok", raw.num_experts_per_tok, count)?;
    let (field, size) = match mixtral {
        true => ("intermediate_size", intermediate_size),
        false => ("moe_intermediate_size", raw.moe_intermediate_size),
    };
    let intermediate_size = within(field, size, MAX_DIM)?;
    let shared = |size| within("shared_expert_intermediate_size", size, MAX_DIM);
    let shared_intermediate_size = match architecture {
        Architecture::Qwen2Moe => Some(shared(raw.shared_expert_intermediate_size)?),
        _ => None,
    };
    let (step, dense) = if mixtral { (None, None) } else { (raw.decoder_sparse_step, raw.mlp_only_layers) };
    Ok(Some(Experts {
        count,
        per_token,
        intermediate_size,
        shared_intermediate_size,
        norm_topk_prob: mixtral || raw.norm_topk_prob.unwrap_or(false),
        sparse_step: within("decoder_sparse_step", step.or(Some(1)), MAX_DIM)?,
        dense_layers: dense.unwrap_or_default(),
    }))
}

/// The names of the three matrices of one expert: gate, up, down.
pub(super) const fn matrices(architecture: Architecture) -> [&'static str; 3] {
    match architecture {
        Architecture::Mixtral => ["w1", "w3", "w2"],
        _ => ["gate_proj", "up_proj", "down_proj"],
    }
}

/// The module of a layer's experts in published files.
pub(super) const fn module(architecture: Architecture) -> &'static str {
    match architecture {
        Architecture::Mixtral => "block_sparse_moe",
        _ => "mlp",
    }
}

/// Router, experts, and the shared expert with its gate, in the place of a layer's MLP.
pub(super) fn layer(tensors: &mut Tensors, config: &ModelConfig, experts: &Experts) {
    let hidden = config.hidden_size;
    let (module, [gate, up, down]) = (module(config.architecture), matrices(config.architecture));
    tensors.add(&format!("{module}.gate.weight"), [experts.count, hidden], Role::Router);
    for expert in 0..experts.count {
        let (name, inner) = (format!("{module}.experts.{expert}"), experts.intermediate_size);
        tensors.linear(&format!("{name}.{gate}"), [inner, hidden], false);
        tensors.linear(&format!("{name}.{up}"), [inner, hidden], false);
        tensors.linear(&format!("{name}.{down}"), [hidden, inner], false);
    }
    if let Some(inner) = experts.shared_intermediate_size {
        tensors.linear("mlp.shared_expert.gate_proj", [inner, hidden], false);
        tensors.linear("mlp.shared_expert.up_proj", [inner, hidden], false);
        tensors.linear("mlp.shared_expert.down_proj", [hidden, inner], false);
        tensors.add("mlp.shared_expert_gate.weight", [1, hidden], Role::Router);
    }
}
