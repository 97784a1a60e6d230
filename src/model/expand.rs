//! Block expansion as LLaMA Pro does it (wu2024, arXiv:2401.02415): copies of blocks between the blocks of a decoder, whose
//! last projections are zero, so that at first they change nothing.
//!
//! Owns: which block a block of the larger model is made from, its tensors' names, and what config.json says then. Refuses
//! to know: bytes.

use serde_json::{Map, Value};

use super::{Architecture, ModelConfig, ModelError};
use crate::types::Fqn;

/// The key of config.json that lists the inserted blocks; transformers passes over it.
pub const EXPANDED_LAYERS: &str = "expanded_layers";

/// How a decoder of `layers` blocks gets `inserted` more, evenly spread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expansion {
    layers: u32,
    inserted: u32,
}

/// What a block of the larger model is made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSource {
    /// The block of the smaller model.
    pub layer: u32,
    /// Whether it is a copy that was inserted.
    pub inserted: bool,
}

impl Expansion {
    /// After every `layers / inserted` blocks one copy of the last of them.
    ///
    /// # Errors
    /// [`ModelError::Field`] for a model that is no decoder with known blocks, and where the copies cannot be spread evenly.
    pub fn new(config: &ModelConfig, inserted: u32) -> Result<Self, ModelError> {
        let layers = config.num_hidden_layers;
        if !has_known_blocks(config.architecture) {
            let found = config.architecture.name().to_owned();
            return Err(ModelError::Expansion {
                what: "the architecture",
                expected: "llama, mistral, qwen2, qwen3 or gpt2".to_owned(),
                found,
            });
        }
        if inserted == 0 || !layers.is_multiple_of(inserted) {
            let even: Vec<String> =
                (1..=layers).filter(|count| layers.is_multiple_of(*count)).map(|count| count.to_string()).collect();
            let expected = format!("a number that divides the model's {layers} blocks ({})", even.join(", "));
            return Err(ModelError::Expansion {
                what: "the number of inserted blocks",
                expected,
                found: inserted.to_string(),
            });
        }
        Ok(Self { layers, inserted })
    }

    /// Every block of the larger model, in order.
    pub fn blocks(self) -> impl Iterator<Item = BlockSource> {
        let group = self.layers / self.inserted;
        (0..self.layers + self.inserted).map(move |block| {
            let (group_index, place) = (block / (group + 1), block % (group + 1));
            BlockSource { layer: group_index * group + place.min(group - 1), inserted: place == group }
        })
    }

    /// The numbers of the inserted blocks.
    #[must_use]
    pub fn inserted(self) -> Vec<u32> {
        (0..).zip(self.blocks()).filter(|(_, source)| source.inserted).map(|(number, _)| number).collect()
    }

    /// config.json of the larger model, from that of the smaller one.
    #[must_use]
    pub fn config(self, config: &Map<String, Value>) -> Map<String, Value> {
        let mut config = config.clone();
        let layers = self.layers + self.inserted;
        for key in ["num_hidden_layers", "n_layer"] {
            if let Some(value) = config.get_mut(key) {
                *value = Value::from(layers);
            }
        }
        // Qwen's count of first blocks without a window, and transformers' list of what each block is.
        if let Some(first) = config.get("max_window_layers").and_then(Value::as_u64) {
            let count = self.blocks().filter(|source| u64::from(source.layer) < first).count();
            config.insert("max_window_layers".to_owned(), Value::from(count));
        }
        if let Some(types) = config.get("layer_types").and_then(Value::as_array).cloned() {
            let of = |source: BlockSource| types.get(crate::types::as_usize(u64::from(source.layer))).cloned();
            config.insert("layer_types".to_owned(), self.blocks().filter_map(of).collect());
        }
        config.insert(EXPANDED_LAYERS.to_owned(), Value::from(self.inserted()));
        config
    }
}

fn has_known_blocks(architecture: Architecture) -> bool {
    use Architecture::{Gpt2, Llama, Mistral, Qwen2, Qwen3};
    matches!(architecture, Llama | Mistral | Qwen2 | Qwen3 | Gpt2)
}

/// The name of a block's tensor with another block's number; nothing for a tensor outside the blocks.
#[must_use]
pub fn renumber(fqn: &Fqn, layer: u32) -> Option<Fqn> {
    let old = fqn.layer()?.to_string();
    let mut done = false;
    let parts = fqn.as_str().split('.').map(|part| {
        if !done && part == old {
            done = true;
            layer.to_string()
        } else {
            part.to_owned()
        }
    });
    Some(parts.collect::<Vec<_>>().join(".").into())
}

/// Whether a tensor writes into the residual stream: it is zero in an inserted block.
#[must_use]
pub fn writes_residual(fqn: &Fqn) -> bool {
    let name = fqn.as_str();
    let module = name.strip_suffix(".weight").or_else(|| name.strip_suffix(".bias")).unwrap_or(name);
    [".o_proj", ".down_proj", ".c_proj"].iter().any(|projection| module.ends_with(projection))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config(layers: u32, more: Value) -> (ModelConfig, Map<String, Value>) {
        let mut fields = json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_hidden_layers": layers, "num_attention_heads": 2,
            "intermediate_size": 16, "vocab_size": 32,
        });
        let fields = fields.as_object_mut().expect("an object");
        fields.extend(more.as_object().expect("an object").clone());
        let json = serde_json::to_vec(fields).expect("JSON");
        (ModelConfig::parse(&json).expect("a configuration"), fields.clone())
    }

    /// By hand from the rule of LLaMA Pro's `block_expansion.py`: split = layers / inserted, old block i moves to
    /// i + i // split, and after each i with (i + 1) % split = 0 comes its copy.
    #[test]
    fn blocks_are_spread_as_llama_pro_spreads_them() {
        let (config, _) = config(4, json!({}));
        let expansion = Expansion::new(&config, 2).expect("even");
        let found: Vec<(u32, bool)> = expansion.blocks().map(|source| (source.layer, source.inserted)).collect();
        assert_eq!(found, [(0, false), (1, false), (1, true), (2, false), (3, false), (3, true)]);
        assert_eq!(expansion.inserted(), [2, 5]);
        let all: Vec<u32> = Expansion::new(&config, 4).expect("even").blocks().map(|source| source.layer).collect();
        assert_eq!(all, [0, 0, 1, 1, 2, 2, 3, 3]);
        let error = Expansion::new(&config, 3).expect_err("uneven").to_string();
        assert!(error.contains("expected a number that divides the model's 4 blocks (1, 2, 4), found 3"), "{error}");
    }

    #[test]
    fn the_configuration_follows_the_blocks() {
        let more = json!({"layer_types": ["a", "b", "c", "d"], "max_window_layers": 3});
        let (config, fields) = config(4, more);
        let expanded = Expansion::new(&config, 2).expect("even").config(&fields);
        assert_eq!(expanded["num_hidden_layers"], 6);
        assert_eq!(expanded["layer_types"], json!(["a", "b", "b", "c", "d", "d"]));
        // The blocks from 0, 1, their copy and 2.
        assert_eq!(expanded["max_window_layers"], 4);
        assert_eq!(expanded["expanded_layers"], json!([2, 5]));
        let parsed = ModelConfig::parse(&serde_json::to_vec(&expanded).expect("JSON")).expect("a configuration");
        assert_eq!((parsed.num_hidden_layers, parsed.expanded_layers), (6, vec![2, 5]));
    }

    #[test]
    fn names_get_another_number_once() {
        let name = |name: &str, layer| renumber(&name.into(), layer).map(|fqn| fqn.to_string());
        assert_eq!(
            name("model.layers.3.self_attn.q_proj.weight", 11).as_deref(),
            Some("model.layers.11.self_attn.q_proj.weight")
        );
        assert_eq!(name("h.0.mlp.c_fc.weight", 2).as_deref(), Some("h.2.mlp.c_fc.weight"));
        assert_eq!(name("model.embed_tokens.weight", 2), None);
        assert!(writes_residual(&"h.0.attn.c_proj.bias".into()) && !writes_residual(&"h.0.attn.c_attn.bias".into()));
    }
}
