//! T5: an encoder and a decoder that share one table of tokens, with or without the head.

use serde::Deserialize;

use super::ModelError;
use super::config::{MAX_DIM, ModelConfig, ModelHead, within};
use super::skeleton::{Alias, Role, Skeleton, Tensors};

/// The table of positions that the first published checkpoints have in the decoder's attention to the encoder, where
/// nothing uses it; transformers drops it too.
const DROPPED: [&str; 1] = ["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias."];
const DROPPED_BY_BASE: [&str; 2] = [DROPPED[0], "lm_head."];

/// What a model of two stacks has beside the sizes of the first one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncoderDecoder {
    /// Layers of the decoder; those of the encoder are `num_hidden_layers`.
    pub decoder_layers: u32,
    /// Distances that attention tells apart, each with a bias for each head.
    pub relative_attention_buckets: u64,
    /// Whether the MLP multiplies two projections (T5 1.1) or has one.
    pub gated: bool,
}

/// The fields of config.json that only T5 has.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Raw {
    num_decoder_layers: Option<u64>,
    relative_attention_num_buckets: Option<u64>,
    feed_forward_proj: Option<String>,
}

/// The stacks that a `config.json` states, with transformers' defaults; the encoder has `layers`.
pub(super) fn parse(config_json: &[u8], layers: u64, max_layers: u64) -> Result<EncoderDecoder, ModelError> {
    let raw: Raw = serde_json::from_slice(config_json)?;
    let layers = within("num_decoder_layers", raw.num_decoder_layers.or(Some(layers)), max_layers)?;
    let buckets = raw.relative_attention_num_buckets.or(Some(32));
    Ok(EncoderDecoder {
        decoder_layers: u32::try_from(layers).unwrap_or(u32::MAX),
        relative_attention_buckets: within("relative_attention_num_buckets", buckets, MAX_DIM)?,
        gated: raw.feed_forward_proj.is_some_and(|name| name.starts_with("gated-")),
    })
}

pub(super) fn skeleton(config: ModelConfig, stacks: EncoderDecoder) -> Skeleton {
    let mut tensors = Tensors::default();
    let (hidden, vocab) = (config.hidden_size, config.vocab_size);
    tensors.add("shared.weight", [vocab, hidden], Role::Embedding);
    let encoder_layers = config.num_hidden_layers;
    for (stack, layers, first) in
        [("encoder", encoder_layers, 0), ("decoder", stacks.decoder_layers, config.num_hidden_layers)]
    {
        for number in 0..layers {
            tensors.layer = Some(first + number);
            tensors.prefix = format!("{stack}.block.{number}.layer.");
            block(&mut tensors, &config, stacks, (stack == "decoder", number == 0));
        }
        tensors.layer = None;
        tensors.prefix.clear();
        tensors.add(&format!("{stack}.final_layer_norm.weight"), [hidden], Role::Norm);
    }
    let alias = |alias: &str| Alias { alias: alias.into(), target: "shared.weight".into() };
    let mut aliases = vec![alias("encoder.embed_tokens.weight"), alias("decoder.embed_tokens.weight")];
    if config.head != ModelHead::Base {
        if config.tie_word_embeddings {
            aliases.push(alias("lm_head.weight"));
        } else {
            tensors.add("lm_head.weight", [vocab, hidden], Role::Head);
        }
    }
    Skeleton {
        architecture: config.architecture,
        tensors: tensors.list,
        aliases,
        buffers: Vec::new(),
        base_prefix: "",
        dropped: if config.head == ModelHead::Base { &DROPPED_BY_BASE } else { &DROPPED },
        config: Some(config),
    }
}

/// Attention, in the decoder attention to the encoder, and the MLP, each with its norm. Only the first block of a stack
/// has the table of relative positions, which the others use too.
fn block(tensors: &mut Tensors, config: &ModelConfig, stacks: EncoderDecoder, (decoder, first): (bool, bool)) {
    let (hidden, inner, query) = (config.hidden_size, config.intermediate_size, config.query_size());
    let attention = |tensors: &mut Tensors, name: &str| {
        for projection in ["q", "k", "v"] {
            tensors.linear(&format!("{name}.{projection}"), [query, hidden], false);
        }
        tensors.linear(&format!("{name}.o"), [hidden, query], false);
    };
    tensors.add("0.layer_norm.weight", [hidden], Role::Norm);
    attention(tensors, "0.SelfAttention");
    if first {
        let table = [stacks.relative_attention_buckets, config.num_attention_heads];
        tensors.add("0.SelfAttention.relative_attention_bias.weight", table, Role::Embedding);
    }
    if decoder {
        tensors.add("1.layer_norm.weight", [hidden], Role::Norm);
        attention(tensors, "1.EncDecAttention");
    }
    let number = if decoder { 2 } else { 1 };
    let prefix = format!("{number}.DenseReluDense");
    tensors.add(&format!("{number}.layer_norm.weight"), [hidden], Role::Norm);
    let inputs: &[&str] = if stacks.gated { &["wi_0", "wi_1"] } else { &["wi"] };
    for name in inputs {
        tensors.linear(&format!("{prefix}.{name}"), [inner, hidden], false);
    }
    // It overflows with 16 bits: transformers keeps it in 32, and quantizes it as little as a head.
    tensors.add(&format!("{prefix}.wo.weight"), [hidden, inner], Role::Head);
}
