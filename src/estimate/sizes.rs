//! Sizes of what comes and goes while a model computes, per token and per block, from the configuration.

use crate::model::{Architecture, ModelConfig};
use crate::types::DType;

/// Bytes of the keys and values of `tokens` tokens in all layers, kept as `dtype`: 2 · layers · key-value heads · head size ·
/// element size, of a layer with a window those of the window only. Only a decoder keeps any.
pub(super) fn cache_bytes(config: &ModelConfig, tokens: u64, dtype: DType) -> u64 {
    (0..cached_layers(config)).map(|layer| layer_cache_bytes(config, layer, tokens, dtype)).sum()
}

/// The same for one layer.
pub(super) fn layer_cache_bytes(config: &ModelConfig, layer: u32, tokens: u64, dtype: DType) -> u64 {
    let tokens = config.window_of(layer).map_or(tokens, |window| tokens.min(window));
    // A T5 layer keeps those of the encoder's tokens too, once per sequence; `cross_cache_bytes` has them.
    2 * config.key_value_size() * dtype.size_bytes() * tokens
}

/// The layers that keep keys and values.
pub(super) fn cached_layers(config: &ModelConfig) -> u32 {
    match config.encoder_decoder {
        Some(stacks) => stacks.decoder_layers,
        None if config.architecture == Architecture::Bert => 0,
        None => config.num_hidden_layers,
    }
}

/// Bytes of an element of bf16, which PyTorch computes in here.
pub(super) const BF16: u64 = 2;
/// Bytes of an f32.
pub(super) const F32: u64 = 4;

/// Keys and values of an encoder's tokens, which T5's decoder layers keep too.
pub(super) fn cross_cache_bytes(config: &ModelConfig, tokens: u64, dtype: DType) -> u64 {
    let layers = config.encoder_decoder.map_or(0, |stacks| stacks.decoder_layers);
    u64::from(layers) * 2 * config.key_value_size() * dtype.size_bytes() * tokens
}

/// Sizes of one block in elements.
#[derive(Clone, Copy, Debug)]
pub(super) struct Block {
    pub(super) hidden: u64,
    pub(super) query: u64,
    pub(super) key_value: u64,
    pub(super) heads: u64,
    /// Size within the MLP: of all experts that compute one token.
    pub(super) inner: u64,
    /// Whether the MLP multiplies two projections.
    pub(super) gated: bool,
    /// Attentions of one block.
    pub(super) attentions: u64,
}

/// What an adapter keeps of a block.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct AdapterInputs {
    /// The sum of the inputs of all adapted modules of a block.
    pub(super) inputs: u64,
    /// Whether some of them are dropped: then each module has a copy and a mask of its own.
    pub(super) dropout: bool,
}

impl Block {
    pub(super) fn new(config: &ModelConfig) -> Self {
        let plain = matches!(config.architecture, Architecture::Gpt2 | Architecture::Bert);
        let inner = match &config.experts {
            None => config.intermediate_size,
            Some(experts) => {
                experts.per_token * experts.intermediate_size + experts.shared_intermediate_size.unwrap_or(0)
            }
        };
        Self {
            hidden: config.hidden_size,
            query: config.query_size(),
            key_value: config.key_value_size(),
            heads: config.num_attention_heads,
            inner,
            gated: config.encoder_decoder.map_or(!plain, |stacks| stacks.gated),
            attentions: if config.encoder_decoder.is_some() { 2 } else { 1 },
        }
    }

    /// Bytes per token that autograd keeps of one block in bf16, with frozen weights and `adapter`, or all weights trained.
    ///
    /// - both norms: their input in f32 (transformers computes them so);
    /// - attention: queries, keys and values (repeated to all heads) and the result; scores only where they are exact:
    ///   probabilities of each head in f32 and bf16;
    /// - MLP: gate, its activation, up and, where the last matrix needs them, their product;
    /// - an adapter: the input of each of its modules, with dropout a copy in bf16 and a mask of a byte;
    /// - trained weights: the inputs of all matrices and of the norms' weights.
    pub(super) fn saved_bytes(&self, sequence_tokens: u64, adapter: Option<AdapterInputs>, exact: bool) -> u64 {
        let Self { hidden, query, heads, inner, .. } = *self;
        let norms = 2 * F32 * hidden;
        let scores = if exact { (F32 + BF16) * heads * sequence_tokens } else { F32 * heads };
        let attention = self.attentions * (4 * BF16 * query + scores);
        let mlp = if self.gated { 3 * BF16 * inner } else { 2 * BF16 * inner };
        let inputs = match adapter {
            Some(AdapterInputs { inputs, dropout }) => (BF16 + u64::from(dropout)) * inputs,
            None => BF16 * (4 * hidden + query + inner),
        };
        norms + attention + mlp + inputs
    }

    /// Bytes per token of the gradients that are there at once in the backward pass of an MLP in bf16: of its result and of the
    /// residual stream, of the product and both its factors, and of the adapter's path beside it.
    pub(super) const fn flowing_bytes(&self) -> u64 {
        BF16 * (2 * self.hidden + 4 * self.inner)
    }

    /// Bytes per token of a forward pass that keeps nothing: the residual stream, a norm's result, and the wider of attention
    /// and MLP.
    pub(super) fn forward_bytes(&self, sequence_tokens: u64, exact: bool) -> u64 {
        let scores = if exact { (F32 + BF16) * self.heads * sequence_tokens } else { 0 };
        let attention = BF16 * (2 * self.query + 2 * self.key_value) + scores;
        let mlp = BF16 * 3 * self.inner;
        BF16 * 2 * self.hidden + attention.max(mlp)
    }
}
