//! BERT: the encoder, with or without its pre-training heads.

use super::config::{ModelConfig, ModelHead};
use super::skeleton::{Alias, Buffer, BufferKind, Role, Skeleton, Tensors};
use crate::types::Shape;

/// The base model within a model with a head.
const PREFIX: &str = "bert.";
/// What published checkpoints have beside the masked-LM head.
const DROPPED_BY_MASKED_LM: [&str; 2] = ["bert.pooler.", "cls.seq_relationship."];
const DROPPED_BY_BASE: [&str; 1] = ["cls."];

pub(super) fn skeleton(config: ModelConfig) -> Skeleton {
    let base = if config.head == ModelHead::Base { "" } else { PREFIX };
    let mut tensors = Tensors { prefix: base.to_owned(), ..Tensors::default() };
    let hidden = config.hidden_size;
    tensors.add("embeddings.word_embeddings.weight", [config.vocab_size, hidden], Role::Embedding);
    tensors.add("embeddings.position_embeddings.weight", [config.max_position_embeddings, hidden], Role::Embedding);
    tensors.add("embeddings.token_type_embeddings.weight", [config.type_vocab_size, hidden], Role::Embedding);
    tensors.layer_norm("embeddings.LayerNorm", hidden);
    for number in 0..config.num_hidden_layers {
        tensors.prefix = format!("{base}encoder.layer.{number}.");
        tensors.layer = Some(number);
        layer(&mut tensors, &config);
    }
    tensors.prefix = base.to_owned();
    tensors.layer = None;
    if config.head != ModelHead::MaskedLm {
        pooler(&mut tensors, hidden, config.head);
    }
    tensors.prefix.clear();
    let mut aliases = Vec::new();
    if config.head != ModelHead::Base {
        head(&mut tensors, &mut aliases, &config);
    }
    let length = config.max_position_embeddings;
    let buffer = |name: &str, kind| Buffer {
        fqn: format!("{base}embeddings.{name}").into(),
        shape: Shape::from([1, length]),
        kind,
    };
    Skeleton {
        architecture: config.architecture,
        tensors: tensors.list,
        aliases,
        buffers: vec![
            buffer("position_ids", BufferKind::PositionIds { len: length }),
            buffer("token_type_ids", BufferKind::TokenTypeIds { len: length }),
        ],
        base_prefix: PREFIX,
        dropped: match config.head {
            ModelHead::Base => &DROPPED_BY_BASE,
            ModelHead::MaskedLm => &DROPPED_BY_MASKED_LM,
            _ => &[],
        },
        config: Some(config),
    }
}

fn layer(tensors: &mut Tensors, config: &ModelConfig) {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    for projection in ["query", "key", "value"] {
        tensors.linear(&format!("attention.self.{projection}"), [hidden, hidden], true);
    }
    tensors.linear("attention.output.dense", [hidden, hidden], true);
    tensors.layer_norm("attention.output.LayerNorm", hidden);
    tensors.linear("intermediate.dense", [inner, hidden], true);
    tensors.linear("output.dense", [hidden, inner], true);
    tensors.layer_norm("output.LayerNorm", hidden);
}

/// Sentence encoders are often saved without the pooler. In a base model it is the last module, which transformers does
/// not quantize.
fn pooler(tensors: &mut Tensors, hidden: u64, head: ModelHead) {
    let role = if head == ModelHead::Base { Role::Head } else { Role::Linear };
    let first = tensors.list.len();
    tensors.add("pooler.dense.weight", [hidden, hidden], role);
    tensors.add("pooler.dense.bias", [hidden], Role::Bias);
    tensors.list.iter_mut().skip(first).for_each(|tensor| tensor.optional = true);
}

fn head(tensors: &mut Tensors, aliases: &mut Vec<Alias>, config: &ModelConfig) {
    let (hidden, vocab) = (config.hidden_size, config.vocab_size);
    tensors.linear("cls.predictions.transform.dense", [hidden, hidden], true);
    tensors.layer_norm("cls.predictions.transform.LayerNorm", hidden);
    tensors.add("cls.predictions.bias", [vocab], Role::Bias);
    let mut alias = |alias: &str, target: &str| aliases.push(Alias { alias: alias.into(), target: target.into() });
    alias("cls.predictions.decoder.bias", "cls.predictions.bias");
    if config.tie_word_embeddings {
        alias("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight");
    } else {
        tensors.add("cls.predictions.decoder.weight", [vocab, hidden], Role::Head);
    }
    if config.head == ModelHead::PreTraining {
        // The last module of the model, which transformers does not quantize.
        tensors.add("cls.seq_relationship.weight", [2, hidden], Role::Head);
        tensors.add("cls.seq_relationship.bias", [2], Role::Bias);
    }
}
