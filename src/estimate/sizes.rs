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
