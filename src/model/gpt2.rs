//! GPT-2, whose linear layers (`Conv1D`) are stored `[in, out]`.

use super::config::{ModelConfig, ModelHead};
use super::skeleton::{Alias, Role, Skeleton, Tensors};

/// The base model within a model with a head; the published files lack it.
const PREFIX: &str = "transformer.";
const DROPPED_BY_BASE: [&str; 1] = ["lm_head."];

pub(super) fn skeleton(config: ModelConfig) -> Skeleton {
    let base = if config.head == ModelHead::Base { "" } else { PREFIX };
    let mut tensors = Tensors { prefix: base.to_owned(), ..Tensors::default() };
    let (hidden, vocab) = (config.hidden_size, config.vocab_size);
    tensors.add("wte.weight", [vocab, hidden], Role::Embedding);
    tensors.add("wpe.weight", [config.max_position_embeddings, hidden], Role::Embedding);
    for number in 0..config.num_hidden_layers {
        tensors.prefix = format!("{base}h.{number}.");
        tensors.layer = Some(number);
        layer(&mut tensors, &config);
    }
    tensors.prefix = base.to_owned();
    tensors.layer = None;
    tensors.layer_norm("ln_f", hidden);
    let mut aliases = Vec::new();
    if config.head != ModelHead::Base {
        tensors.prefix.clear();
        if config.tie_word_embeddings {
            let target = format!("{base}wte.weight").into();
            aliases.push(Alias { alias: "lm_head.weight".into(), target });
        } else {
            tensors.add("lm_head.weight", [vocab, hidden], Role::Head);
        }
    }
    Skeleton {
        architecture: config.architecture,
        tensors: tensors.list,
        aliases,
        buffers: Vec::new(),
        base_prefix: PREFIX,
        dropped: if config.head == ModelHead::Base { &DROPPED_BY_BASE } else { &[] },
        config: Some(config),
    }
}

fn layer(tensors: &mut Tensors, config: &ModelConfig) {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let conv = |tensors: &mut Tensors, name: &str, [inputs, outputs]: [u64; 2]| {
        tensors.add(&format!("{name}.weight"), [inputs, outputs], Role::Linear);
        tensors.add(&format!("{name}.bias"), [outputs], Role::Bias);
    };
    tensors.layer_norm("ln_1", hidden);
    conv(tensors, "attn.c_attn", [hidden, 3 * hidden]);
    conv(tensors, "attn.c_proj", [hidden, hidden]);
    tensors.layer_norm("ln_2", hidden);
    conv(tensors, "mlp.c_fc", [hidden, inner]);
    conv(tensors, "mlp.c_proj", [inner, hidden]);
}
